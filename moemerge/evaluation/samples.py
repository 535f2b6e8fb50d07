"""What models are measured on: a variant's own text or tasks, in its tokens.

A `.txt` file becomes windows, a `.jsonl` file rows of input and target. Knows nothing of models.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from moemerge.calibration.texts import (
    WINDOW_TOKENS,
    Passage,
    TaskRow,
    cut_windows,
    read_task,
    read_text,
)
from moemerge.checkpoint.digest import hash_file
from moemerge.checkpoint.tokenizer import FileLookup, VariantTokenizer, load_tokenizer
from moemerge.errors import InvalidRecipe, MoemergeError, NotFound

DECODER, ENCODER_DECODER = "decoder", "encoder_decoder"
_ENDINGS = {DECODER: ".txt", ENCODER_DECODER: ".jsonl"}
_KIND_NAMES = {
    DECODER: "running text (.txt)",
    ENCODER_DECODER: "rows of input and target (.jsonl)",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleSize:
    """How much of a text is measured on.

    Attributes:
        windows: Most windows of running text.
        window: Tokens of a window.
        rows: Most rows of a task.
    """

    windows: int = 96
    window: int = WINDOW_TOKENS
    rows: int = 400

    def __post_init__(self) -> None:
        if self.windows < 1 or self.window < 2 or self.rows < 1:
            raise InvalidRecipe("measuring needs at least one window of two tokens, and one row")


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One variant's passages.

    Attributes:
        sha256: Of the file.
        passages: Windows; or inputs with their targets as the decoder gives them.
        rows: The same as text; empty for running text.
        tokenizer: The variant's.
    """

    sha256: str
    passages: Sequence[Passage]
    rows: Sequence[TaskRow]
    tokenizer: VariantTokenizer

    @property
    def num_bytes(self) -> int:
        """What progress counts in: token ids of four bytes."""
        return 4 * sum(passage.num_tokens for passage in self.passages)

    @property
    def largest_id(self) -> int:
        """Of all tokens."""
        return max(max((*passage.token_ids, *passage.target_ids)) for passage in self.passages)


@dataclass(frozen=True, slots=True)
class TextOwner:
    """Whose text it is.

    Attributes:
        where: How messages name it.
        arithmetic: Of its family, `decoder` or `encoder_decoder`.
        side_file: Finds its tokenizer.
        vocab_size: Rows of its embedding.
        max_positions: Most tokens of a text that it takes; None for any number.
    """

    where: str
    arithmetic: str
    side_file: FileLookup
    vocab_size: int
    max_positions: int | None


def load_samples(
    owners: Mapping[str, TextOwner], paths: Mapping[str, Path], size: SampleSize
) -> dict[str, Sample]:
    """Every variant's sample, all of them checked before any is used.

    Raises:
        InvalidRecipe, NotFound: With every problem: texts missing, of no variant, or as `load_sample`.
    """
    problems: list[MoemergeError] = []
    if missing := [name for name in owners if name not in paths]:
        problems.append(InvalidRecipe(f"no text for {', '.join(missing)}; give --text {missing[0]}=FILE"))
    if unknown := [name for name in paths if name not in owners]:
        problems.append(
            InvalidRecipe(f"text for {', '.join(unknown)}, which is no variant here: {', '.join(owners)}")
        )
    samples = {}
    for name, owner in owners.items():
        if name in paths:
            try:
                samples[name] = load_sample(owner, paths[name], size)
            except (InvalidRecipe, NotFound) as error:
                problems.append(type(error)(f"variant {name}: {error}"))
    if problems:
        raise type(problems[0])("\n".join(map(str, problems))) from problems[0].__cause__
    return samples


def load_sample(owner: TextOwner, path: Path, size: SampleSize) -> Sample:
    """A file in the tokens of its variant, cut from its beginning.

    Raises:
        NotFound: No such file, or the variant has no tokenizer.
        InvalidRecipe: The wrong kind of file for the family, empty, not UTF-8, too short, or of other tokens.
    """
    if path.suffix != _ENDINGS[owner.arithmetic]:
        raise InvalidRecipe(f"{path}: expected {_KIND_NAMES[owner.arithmetic]}, by the name of the file")
    if not path.is_file():
        raise NotFound(f"{path}: no such text file")
    tokenizer = load_tokenizer(owner.side_file, owner.where)
    rows: list[TaskRow] = []
    if owner.arithmetic == DECODER:
        passages = _windows(path, tokenizer, owner, size)
    else:
        rows, passages = _questions(path, tokenizer, size.rows)
    sample = Sample(sha256=hash_file(path), passages=passages, rows=rows, tokenizer=tokenizer)
    if sample.largest_id >= owner.vocab_size:
        raise InvalidRecipe(
            f"{path}: the tokenizer gives token {sample.largest_id}, the model has {owner.vocab_size}; "
            f"is the tokenizer that of another model?"
        )
    return sample


def _windows(path: Path, tokenizer: VariantTokenizer, owner: TextOwner, size: SampleSize) -> list[Passage]:
    window = min(size.window, owner.max_positions or size.window)
    try:
        cut = cut_windows(tokenizer.encode(read_text(path)), window, size.windows)
    except InvalidRecipe as error:
        raise error if str(path) in str(error) else InvalidRecipe(f"{path}: {error}") from error
    return [Passage(token_ids) for token_ids in cut]


def _questions(path: Path, tokenizer: VariantTokenizer, limit: int) -> tuple[list[TaskRow], list[Passage]]:
    rows = read_task(path, limit)
    passages = []
    for number, row in enumerate(rows, start=1):
        target_ids = tokenizer.encode(row.target)
        if tokenizer.stop_token_ids and (not target_ids or target_ids[-1] not in tokenizer.stop_token_ids):
            target_ids = [*target_ids, min(tokenizer.stop_token_ids)]
        passage = Passage(tokenizer.encode(row.input), target_ids)
        if not passage.token_ids or not passage.target_ids:
            raise InvalidRecipe(f"{path}, row {number}: input and target must hold something")
        passages.append(passage)
    return rows, passages
