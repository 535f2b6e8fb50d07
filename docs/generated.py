"""Pages of the site that nobody writes: the reference, and what stands outside this folder.

A hook of mkdocs, named in `mkdocs.yml`.
"""

import os.path
import re
import subprocess
import sys
import tempfile
from pathlib import Path, PurePosixPath

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

import moemerge

DOCS = Path(__file__).parent
ROOT = DOCS.parent
BORROWED = {
    "CONTRIBUTING.md": "contributing.md",
    "examples/README.md": "examples.md",
    "examples/families/mini/README.md": "mini.md",
    "examples/variants/README.md": "variants.md",
}
"""Files of the repository by the page that they become."""

_LINK = re.compile(r"\]\(([^)#:\s]+)(#[^)\s]*)?\)")
_EXAMPLE = re.compile(r"^Example: (moemerge .*?)\n\n", re.DOTALL | re.MULTILINE)


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Every decision gets its place in the navigation."""
    notes = sorted(note.name for note in (DOCS / "decisions").glob("*.md"))
    for entry in config.nav or []:
        if "Decisions" in entry:
            entry["Decisions"] = [f"decisions/{note}" for note in notes]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add what is generated and what is borrowed."""
    for source, page in BORROWED.items():
        text = (ROOT / source).read_text(encoding="utf-8")
        files.append(File.generated(config, page, content=_relink(text, source)))
    files.append(File.generated(config, "commands.md", content=_commands()))
    files.append(File.generated(config, "python.md", content=_python()))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links of pages that are files of this folder."""
    written = page.file.abs_src_path is not None
    return _relink(markdown, f"docs/{page.file.src_uri}") if written else markdown


def _relink(markdown: str, source: str) -> str:
    """Links as the site has them, of a file that the repository has at `source`.

    What is no page, such as a file of the program, is named and not linked.
    """
    page = BORROWED.get(source, source.removeprefix("docs/"))

    def link(found: re.Match[str]) -> str:
        target = os.path.normpath(PurePosixPath(source).parent / found[1])
        if (ROOT / target).is_dir():
            target += "/README.md"
        if not target.startswith("docs/") and target not in BORROWED:
            return "]"
        place = BORROWED.get(target, target.removeprefix("docs/"))
        return f"]({os.path.relpath(place, PurePosixPath(page).parent)}{found[2] or ''})"

    return _LINK.sub(link, markdown)


def _commands() -> str:
    """Typer's own description of every command, with examples as blocks of code."""
    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder, "commands.md")
        arguments = ["moemerge.cli.app", "utils", "docs", "--name", "moemerge", "--title", "Commands"]
        subprocess.run(
            [sys.executable, "-m", "typer", *arguments, "--output", str(page)],
            check=True,
            stdout=subprocess.DEVNULL,
            cwd=ROOT,
        )
        return _EXAMPLE.sub(r"```console\n$ \1\n```\n\n", page.read_text(encoding="utf-8"))


def _python() -> str:
    """The public names, each described by its docstring."""
    names = [name for name in moemerge.__all__ if not name.startswith("_")]
    found = {name: getattr(moemerge, name) for name in names}
    entries = [f"::: {value.__module__}.{name}" for name, value in found.items()]
    return "\n\n".join(["# Python", moemerge.__doc__ or "", *entries, "## Errors", "::: moemerge.errors"])
