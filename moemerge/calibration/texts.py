"""Text to calibrate and measure with: files read, checked, and cut into what a model is given.

A `.txt` file is cut into windows for decoders; a `.jsonl` file of `input` and `target` is questions and
answers for encoder-decoders. Knows nothing of statistics.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from moemerge.checkpoint.checkpoint import Checkpoint
from moemerge.checkpoint.digest import hash_file
from moemerge.checkpoint.tokenizer import VariantTokenizer, load_tokenizer
from moemerge.errors import InvalidRecipe, MoemergeError, NotFound

# Models tell what they could take, not what they were tuned on: of a small Mixtral family tuned on 256 tokens
# and said to take 512, one predicted its own text at 0.70 nats a token in the former and 1.89 in the latter.
WINDOW_TOKENS = 256
_ROW_TOKENS = 512
# A token of more characters on average than this is not met; so much of a longer text is looked at.
_CHARACTERS_PER_TOKEN = 32
_KINDS = {"decoder": ".txt", "encoder_decoder": ".jsonl"}
_KIND_NAMES = {
    "decoder": "running text (.txt)",
    "encoder_decoder": "rows of input and target (.jsonl)",
}


class Passage(NamedTuple):
    """What a model is given at once: a window of text; or an input and, for the decoder, its answer."""

    token_ids: Sequence[int]
    target_ids: Sequence[int] = ()

    @property
    def num_tokens(self) -> int:
        """Tokens of both."""
        return len(self.token_ids) + len(self.target_ids)


@dataclass(frozen=True, slots=True, kw_only=True)
class Text:
    """One variant's text, cut.

    Attributes:
        path: The file.
        sha256: Of the file.
        passages: In the order in which they are computed.
    """

    path: Path
    sha256: str
    passages: list[Passage]

    @property
    def num_tokens(self) -> int:
        """Tokens of all passages."""
        return sum(passage.num_tokens for passage in self.passages)


@dataclass(frozen=True, slots=True)
class TaskRow:
    """One question and its answer."""

    input: str
    target: str


def parse_texts(texts: Sequence[str]) -> dict[str, Path]:
    """Files by variant from `NAME=FILE` arguments.

    Raises:
        InvalidRecipe: No `=`, or a name given twice.
    """
    paths: dict[str, Path] = {}
    for text in texts:
        name, equals, path = text.partition("=")
        if not equals or not name or not path:
            raise InvalidRecipe(f"{text!r} does not say whose text it is; write NAME=FILE")
        if name in paths:
            raise InvalidRecipe(f"variant {name!r} has two texts; give one file per variant")
        paths[name] = Path(path).expanduser()
    return paths


def load_texts(
    checkpoints: Mapping[str, Checkpoint],
    paths: Mapping[str, Path],
    num_tokens: int,
    window: int = WINDOW_TOKENS,
) -> dict[str, Text]:
    """Every variant's text, all of them checked before any is used.

    Raises:
        InvalidRecipe, NotFound: With every problem: texts missing, of no variant, or as `load_text`.
    """
    problems: list[MoemergeError] = []
    if missing := [name for name in checkpoints if name not in paths]:
        problems.append(
            InvalidRecipe(f"no text for {', '.join(missing)}; give --text {missing[0]}=FILE for each variant")
        )
    if unknown := [name for name in paths if name not in checkpoints]:
        problems.append(
            InvalidRecipe(
                f"text for {', '.join(unknown)}, which is no variant here: {', '.join(checkpoints)}"
            )
        )
    texts = {}
    for name, checkpoint in checkpoints.items():
        if name in paths:
            try:
                texts[name] = load_text(checkpoint, paths[name], num_tokens, window)
            except (InvalidRecipe, NotFound) as error:
                problems.append(type(error)(f"variant {name}: {error}"))
    if problems:
        raise type(problems[0])("\n".join(map(str, problems))) from problems[0].__cause__
    return texts


def load_text(checkpoint: Checkpoint, path: Path, num_tokens: int, window: int = WINDOW_TOKENS) -> Text:
    """A file in the tokens of a variant, cut from its beginning, up to `num_tokens`.

    Windows have `window` tokens, or as many as the model was made for; what is left at the end is not used.

    Raises:
        NotFound: No such file, or the variant has no tokenizer.
        InvalidRecipe: The wrong kind of file for the family, empty, not UTF-8, or too short.
    """
    kind = checkpoint.family.arithmetic
    if path.suffix not in _KINDS.values():
        raise InvalidRecipe(f"{path}: expected {_KIND_NAMES[kind]}, by the name of the file")
    if path.suffix != _KINDS[kind]:
        raise InvalidRecipe(
            f"{path}: {checkpoint.family.title} needs {_KIND_NAMES[kind]}, this is named as the other kind"
        )
    if not path.is_file():
        raise NotFound(f"{path}: no such text file")
    tokenizer = load_tokenizer(checkpoint.side_file, checkpoint.label)
    if kind == "decoder":
        window = min(window, int(checkpoint.settings["max_positions"] or window))
        passages = _windows(path, tokenizer, window, num_tokens)
    else:
        passages = _questions(path, tokenizer, num_tokens)
    _check_vocabulary(passages, int(checkpoint.settings["vocab_size"] or 0), path)
    return Text(path=path, sha256=hash_file(path), passages=passages)


def read_text(path: Path) -> str:
    """A file's text.

    Raises:
        NotFound: No such file.
        InvalidRecipe: Not UTF-8, or nothing but white space.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InvalidRecipe(f"{path}: not UTF-8 text ({error})") from error
    except OSError as error:
        raise NotFound(f"{path}: cannot be read ({error.strerror})") from error
    if not text.strip():
        raise InvalidRecipe(f"{path}: empty; give text of the kind that the variant is for")
    return text


def read_task(path: Path, limit: int | None = None) -> list[TaskRow]:
    """Rows of a JSON-lines file with `input` and `target`.

    Raises:
        NotFound: No such file.
        InvalidRecipe: Empty, not UTF-8, or a line that is no such object.
    """
    rows = []
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
            question, target = value["input"], value["target"]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise InvalidRecipe(f"{path}, line {number}: expected an object with input and target") from error
        if not isinstance(question, str) or not isinstance(target, str):
            raise InvalidRecipe(f"{path}, line {number}: input and target must be texts")
        rows.append(TaskRow(question, target))
    return rows[:limit]


def cut_windows(token_ids: Sequence[int], length: int, count: int) -> list[list[int]]:
    """Up to `count` windows of `length` tokens, from the beginning, without overlap.

    Raises:
        InvalidRecipe: The text is shorter than one window.
    """
    windows = [list(token_ids[start : start + length]) for start in range(0, len(token_ids), length)][:count]
    whole = [window for window in windows if len(window) == length]
    if not whole:
        raise InvalidRecipe(f"the text has {len(token_ids)} tokens, fewer than one window of {length}")
    return whole


def _windows(path: Path, tokenizer: VariantTokenizer, window: int, num_tokens: int) -> list[Passage]:
    if num_tokens < window:
        raise InvalidRecipe(f"{num_tokens} tokens are less than one window of {window}")
    token_ids = tokenizer.encode(read_text(path)[: num_tokens * _CHARACTERS_PER_TOKEN])
    try:
        windows = cut_windows(token_ids, window, num_tokens // window)
    except InvalidRecipe as error:
        raise InvalidRecipe(f"{path}: {error}") from error
    return [Passage(token_ids) for token_ids in windows]


def _questions(path: Path, tokenizer: VariantTokenizer, num_tokens: int) -> list[Passage]:
    """Rows as passages, those of one length together, which makes them one product in attention."""
    passages: list[Passage] = []
    for row in read_task(path):
        target_ids = tokenizer.encode(row.target)
        if tokenizer.stop_token_ids and (not target_ids or target_ids[-1] not in tokenizer.stop_token_ids):
            target_ids = [*target_ids, min(tokenizer.stop_token_ids)]
        passage = Passage(tokenizer.encode(row.input)[:_ROW_TOKENS], target_ids[:_ROW_TOKENS])
        if not passage.token_ids or not passage.target_ids:
            continue
        if passage.num_tokens > num_tokens:
            break
        num_tokens -= passage.num_tokens
        passages.append(passage)
    if not passages:
        raise InvalidRecipe(f"{path}: no row with an input and a target fits into the number of tokens")
    return sorted(passages, key=lambda passage: (len(passage.token_ids), len(passage.target_ids)))


def _check_vocabulary(passages: Sequence[Passage], vocab_size: int, path: Path) -> None:
    largest = max(max((*passage.token_ids, *passage.target_ids)) for passage in passages)
    if largest >= vocab_size:
        raise InvalidRecipe(
            f"{path}: the tokenizer gives token {largest}, the model has {vocab_size}; "
            f"is the tokenizer that of another model?"
        )
