"""Text for pre-training: what this Python brings along, and what `world` and `sums` generate.

Prose is the language reference and the docstrings of the standard library, code its modules.
One module of eight is held out from all training.
"""

import ast
import sysconfig
from pathlib import Path
from random import Random
from zlib import crc32

import sums
import world

LIBRARY = Path(sysconfig.get_path("stdlib"))
CHARACTERS_PER_TOKEN = 2
"""Fewer than there are, so that a text cut by characters has tokens enough."""


def modules(*, held_out: bool) -> list[Path]:
    """Modules and packages of the standard library, without tests, in an order that is always the same."""
    files = [
        path for path in sorted(LIBRARY.glob("*.py")) + sorted(LIBRARY.glob("[a-z]*/*.py")) if is_code(path)
    ]
    chosen = [path for path in files if (crc32(path.name.encode()) % 8 == 0) == held_out]
    Random(0).shuffle(chosen)
    return chosen


def is_code(path: Path) -> bool:
    """Written by people for people: no tests, tables or generated files."""
    skipped = {"site-packages", "test", "idlelib", "lib2to3", "encodings", "pydoc_data", "ensurepip"}
    return path.parent.name not in skipped and not path.name.startswith("_sysconfigdata")


def code(characters: int, *, held_out: bool = False) -> str:
    """Modules, one after the other."""
    return _take((path.read_text(encoding="utf-8") for path in modules(held_out=held_out)), characters)


def prose(characters: int, *, held_out: bool = False) -> str:
    """Docstrings, and for training the language reference as well."""
    texts = [text for path in modules(held_out=held_out) for text in docstrings(path)]
    if not held_out:
        from pydoc_data.topics import topics

        texts += topics.values()
    Random(0).shuffle(texts)
    return _take(texts, characters)


def docstrings(path: Path) -> list[str]:
    """Those of a module with a sentence or more."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef)
    found = [ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, documented)]
    return [text for text in found if text and len(text) > 80]


def mixture(tokens: int) -> list[str]:
    """Training text of about so many tokens: prose, code, facts of the world, and sums."""
    characters = tokens * CHARACTERS_PER_TOKEN
    parts = {
        "prose": prose(characters * 30 // 100),
        "code": code(characters * 20 // 100),
        "facts": _take(world.statements(Random(1)), characters * 35 // 100),
        "sums": _take(sums.additions(Random(2)), characters * 15 // 100),
    }
    passages = [passage for text in parts.values() for passage in cut(text, 1000)]
    Random(3).shuffle(passages)
    return passages


def cut(text: str, characters: int) -> list[str]:
    """A text in pieces of so many characters."""
    return [text[start : start + characters] for start in range(0, len(text), characters)]


def _take(texts: object, characters: int) -> str:
    taken, length = [], 0
    for text in texts:
        taken.append(text)
        length += len(text) + 2
        if length >= characters:
            break
    return "\n\n".join(taken)[:characters]
