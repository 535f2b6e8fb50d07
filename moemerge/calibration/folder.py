"""Calibrations on disk: an index, and a folder of one file a layer for each variant.

A variant is written beside its place and appears whole; others that are there stay as they are.
"""

import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from moemerge import __version__
from moemerge.bundle.target import locked, writing
from moemerge.calibration.passages import PASSAGES, Passages, read_passages, spread, write_passages
from moemerge.calibration.passes import (
    CalibrationOptions,
    calibrate_variant,
    mean_nll,
    measure_nll,
    pass_memory,
)
from moemerge.calibration.sensitivity import Response, measure_sensitivity
from moemerge.calibration.statistics import LayerStatistics, layer_of_tensors, layer_tensors
from moemerge.calibration.texts import Passage, Text, load_texts
from moemerge.checkpoint.checkpoint import Checkpoint
from moemerge.checkpoint.disk import check_disk
from moemerge.checkpoint.fingerprint import fingerprint
from moemerge.checkpoint.tensors import TensorReader, map_tensors
from moemerge.checkpoint.variants import VariantSet
from moemerge.checkpoint.writer import memory_tensor, write_tensors, write_text
from moemerge.errors import (
    DamagedInput,
    Finding,
    IncompatibleInputs,
    InvalidRecipe,
    NotFound,
    UnsupportedCheckpoint,
)
from moemerge.execution import Executor, Local, Work
from moemerge.progress import Progress, Silent

SCHEMA = "moemerge/calibration@1"
INDEX = "calibration.json"
# What a base is compared on, and what layers are disturbed on, spread over the text.
_COMPARED_TOKENS, _DISTURBED_TOKENS = 8192, 2048
_DIGITS = 6
MEASURED = ("nll", "base_nll_excess", "sensitivity", "response")
"""Fields of an entry that follow from the others."""


class VariantCalibration(BaseModel):
    """What one variant's statistics were made from.

    Attributes:
        fingerprint: Of the weights; see `checkpoint.fingerprint`.
        text_sha256: Of the text's file.
        num_tokens: Tokens that were used.
        num_passages: Windows, or rows of input and target.
        num_held_out: How many of them were not counted, to measure on.
        max_tokens: Tokens that were asked for.
        window: Tokens of a window that were asked for.
        reservoir: Tokens sampled per slot.
        seed: Of the sample.
        dtype: Of the computation.
        nll: Mean negative log-likelihood in nats of the variant on what was counted.
        base_nll_excess: By how much the base's is higher, on a part of the text that was not counted
            where there is one; None without a base.
        sensitivity, response: What damage to its layers costs; see `sensitivity.Sensitivity`.
        moemerge: Version that made it.
    """

    model_config = ConfigDict(extra="ignore", frozen=True)
    fingerprint: str
    text_sha256: str
    num_tokens: int = Field(gt=0)
    num_passages: int = Field(gt=0)
    num_held_out: int = Field(default=0, ge=0)
    max_tokens: int = Field(gt=0)
    window: int = Field(gt=0)
    reservoir: int = Field(gt=0)
    seed: int
    dtype: str
    nll: float
    base_nll_excess: float | None = None
    sensitivity: dict[int, float] = Field(default_factory=dict)
    response: Response = Response()
    moemerge: str

    @property
    def identity(self) -> str:
        """What decides all that is measured: weights, text and settings."""
        return self.model_dump_json(exclude={*MEASURED, "moemerge"})


class CalibrationIndex(BaseModel):
    """`calibration.json`: the geometry that all variants share, and each of them."""

    model_config = ConfigDict(extra="ignore", frozen=True)
    schema_: str = Field(default=SCHEMA, alias="schema")
    family: str
    num_slots: int = Field(gt=0)
    hidden_size: int = Field(gt=0)
    layers: list[int] = Field(min_length=1)
    variants: dict[str, VariantCalibration]


@dataclass(frozen=True, slots=True)
class Calibration:
    """A folder of statistics, opened."""

    folder: Path
    index: CalibrationIndex

    def layer(self, variant: str, layer_index: int) -> LayerStatistics:
        """What a layer of a variant has counted; tensors are views of the mapped file.

        Raises:
            InvalidRecipe: The variant was not calibrated.
            NotFound, DamagedInput: The file is missing or damaged.
        """
        if variant not in self.index.variants:
            raise InvalidRecipe(f"{self.folder}: variant {variant!r} is not calibrated there")
        path = self.folder / variant / layer_file(layer_index)
        try:
            layer = layer_of_tensors(map_tensors(path), self.index.variants[variant].reservoir)
        except (KeyError, ValueError) as error:
            raise DamagedInput(f"{path}: not the statistics of a layer ({error})") from error
        widths = {slot.moment_DD.shape[0] for slot in layer.slots}
        if len(layer.slots) != self.index.num_slots or widths != {self.index.hidden_size}:
            raise DamagedInput(f"{path}: statistics of another geometry than {INDEX} says")
        return layer

    def passages(self, variant: str) -> Passages:
        """The variant's text in its tokens.

        Raises:
            NotFound, DamagedInput: The file is missing or damaged.
        """
        path = self.folder / variant / PASSAGES
        try:
            return read_passages(path)
        except (KeyError, ValueError) as error:
            raise DamagedInput(f"{path}: not the passages of a variant ({error})") from error

    def check(self, variants: VariantSet) -> None:
        """Make sure that these statistics are of these variants.

        Raises:
            InvalidRecipe: A variant was not calibrated.
            IncompatibleInputs: A variant was calibrated with other weights.
        """
        missing = [name for name in variants.variants if name not in self.index.variants]
        if missing:
            raise InvalidRecipe(
                f"{self.folder}: not calibrated: {', '.join(missing)}. Add with moemerge calibrate -o "
                f"{self.folder}; what is there stays"
            )
        with TensorReader() as reader:
            other = [
                name
                for name, checkpoint in variants.variants.items()
                if fingerprint(checkpoint, reader) != self.index.variants[name].fingerprint
            ]
        if other:
            raise IncompatibleInputs(
                f"{self.folder}: calibrated with other weights than those given: {', '.join(other)}. "
                f"Calibrate again, or give the checkpoints that were calibrated"
            )


@dataclass(frozen=True, slots=True)
class Calibrated:
    """What `calibrate` has done.

    Attributes:
        calibration: The folder, opened.
        reused: Variants that were there already, from the same weights, text and settings.
        findings: Warnings.
    """

    calibration: Calibration
    reused: tuple[str, ...]
    findings: tuple[Finding, ...]


def calibrate(
    variants: VariantSet,
    paths: Mapping[str, Path],
    folder: Path,
    options: CalibrationOptions | None = None,
    progress: Progress | None = None,
    executor: Executor | None = None,
) -> Calibrated:
    """Run every variant on its own text and keep the statistics in `folder`, beside those it holds already.

    Args:
        variants: Local checkpoints; a base, if there is one, tells whether a text suits its variant.
        paths: Text by variant.
        folder: Created when it is not there.
        options: How to.
        progress: Told of the bytes of weights whose work is done.
        executor: Does the work, a variant at a time; this process by default.

    Raises:
        InvalidRecipe, NotFound: As `load_texts`, or the folder holds something else.
        IncompatibleInputs: The folder holds statistics of another geometry.
        NotEnoughRoom: Memory or disk does not suffice.
        Busy: Another process writes the same folder.
    """
    options = options or CalibrationOptions()
    texts = load_texts(variants.variants, paths, options.num_tokens, options.window)
    findings: dict[str, list[Finding]] = {}
    with writing(folder), locked(folder):
        index = _open_index(folder, variants.first)
        entries = {name: _describe(c, texts[name], options) for name, c in variants.variants.items()}
        missing = [name for name, entry in entries.items() if not _is_there(folder, name, entry, index)]
        needed = sum(_folder_bytes(variants.variants[name], options) for name in missing)
        check_disk(folder, needed, f"calibrating {', '.join(missing)}")
        with _places(folder, missing) as places:
            works = [_work(variants, name, texts[name].passages, places[name], options) for name in missing]
            for number, measured in (executor or Local()).map(works, progress or Silent()):
                name = missing[number]
                _replace(folder, name, places[name], index)
                entry = entries[name].model_copy(update=measured)
                index = index.model_copy(update={"variants": {**index.variants, name: entry}})
                write_text(folder / INDEX, _dump(index))
                findings[name] = _judge(name, entry, texts[name])
    reused = tuple(name for name in entries if name not in missing)
    told = tuple(finding for name in missing for finding in findings[name])
    return Calibrated(Calibration(folder, index), reused, told)


def open_calibration(folder: Path) -> Calibration:
    """A folder that `calibrate` has written.

    Raises:
        NotFound: No such folder.
        UnsupportedCheckpoint: Not a calibration, or of another version.
        DamagedInput: Its index is malformed.
    """
    if not folder.is_dir():
        raise NotFound(f"{folder}: no such calibration")
    path = folder / INDEX
    if not path.is_file():
        raise UnsupportedCheckpoint(f"{folder}: not a calibration: it has no {INDEX}")
    try:
        index = CalibrationIndex.model_validate_json(path.read_bytes())
    except ValidationError as error:
        problem = error.errors()[0]
        raise DamagedInput(f"{path}: {'.'.join(map(str, problem['loc']))}: {problem['msg']}") from error
    if index.schema_ != SCHEMA:
        raise UnsupportedCheckpoint(f"{path}: schema {index.schema_!r}, this moemerge reads {SCHEMA}")
    return Calibration(folder, index)


def layer_file(layer_index: int) -> str:
    """File of a layer's statistics in a variant's folder."""
    return f"layer-{layer_index:05d}.safetensors"


def _open_index(folder: Path, first: Checkpoint) -> CalibrationIndex:
    """The index that is there, or one without variants."""
    index = CalibrationIndex(
        family=first.family.name,
        num_slots=first.num_experts,
        hidden_size=int(first.settings["hidden_size"] or 0),
        layers=[layer.index for layer in first.routed_layers],
        variants={},
    )
    if not folder.exists():
        folder.mkdir(parents=True)
    if (folder / INDEX).is_file():
        there = open_calibration(folder).index
        if there.model_copy(update={"variants": {}}) != index:
            raise IncompatibleInputs(
                f"{folder}: holds a calibration of {there.family} with {len(there.layers)} routed layers of "
                f"{there.num_slots} experts, which these variants are not. Choose another folder"
            )
        return there
    if not folder.is_dir() or any(not path.name.startswith(".") for path in folder.iterdir()):
        raise InvalidRecipe(f"{folder} exists and is not a calibration; choose another output")
    return index


def _describe(checkpoint: Checkpoint, text: Text, options: CalibrationOptions) -> VariantCalibration:
    """The entry of a variant, but for what is measured."""
    with TensorReader() as reader:
        weights = fingerprint(checkpoint, reader)
    return VariantCalibration(
        fingerprint=weights,
        text_sha256=text.sha256,
        num_tokens=text.num_tokens,
        num_passages=len(text.passages),
        num_held_out=len(Passages.divide(text.passages).held_out),
        max_tokens=options.num_tokens,
        window=options.window,
        reservoir=options.reservoir,
        seed=options.seed,
        dtype=options.dtype,
        nll=0.0,
        moemerge=__version__,
    )


def _is_there(folder: Path, name: str, entry: VariantCalibration, index: CalibrationIndex) -> bool:
    """Whether the same was calibrated before, and its files are there."""
    there = index.variants.get(name)
    if there is None or there.identity != entry.identity:
        return False
    files = [PASSAGES, *map(layer_file, index.layers)]
    return all((folder / name / file).is_file() for file in files)


@contextmanager
def _places(folder: Path, names: Sequence[str]) -> Iterator[dict[str, Path]]:
    """A folder for each variant, that takes the place of its own when it is complete, or disappears."""
    places = {name: folder.absolute() / f".{name}.building" for name in names}
    try:
        for place in places.values():
            shutil.rmtree(place, ignore_errors=True)
            place.mkdir()
        yield places
    finally:
        for place in places.values():
            shutil.rmtree(place, ignore_errors=True)


def _replace(folder: Path, name: str, place: Path, index: CalibrationIndex) -> None:
    """Put a folder in a variant's place; the index never tells of a half one."""
    others = {other: entry for other, entry in index.variants.items() if other != name}
    if name in index.variants:
        write_text(folder / INDEX, _dump(index.model_copy(update={"variants": others})))
    shutil.rmtree(folder / name, ignore_errors=True)
    place.replace(folder / name)


def _work(
    variants: VariantSet, name: str, passages: Sequence[Passage], place: Path, options: CalibrationOptions
) -> Work[dict[str, object]]:
    """The calibration of a variant as a unit of work; its result are the fields that are measured."""
    checkpoint, divided = variants.variants[name], Passages.divide(passages)
    # The runs on what is held out have a few lanes, on an eighth of the tokens.
    return Work(
        title=f"calibrating {name}",
        run=partial(_calibrate, name, checkpoint, variants.base, divided, place, options),
        reads=checkpoint.files | (variants.base.files if variants.base else frozenset()),
        folder=place,
        memory_bytes=pass_memory(checkpoint, passages, options),
    )


def _calibrate(
    name: str,
    checkpoint: Checkpoint,
    base: Checkpoint | None,
    passages: Passages,
    place: Path,
    options: CalibrationOptions,
    progress: Progress,
) -> dict[str, object]:
    nll = _write_layers(checkpoint, passages.counted, place, options, progress, name)
    write_passages(passages, place / PASSAGES)
    measured = _measure(name, checkpoint, base, passages, options, progress)
    return {"nll": mean_nll(nll, passages.counted), **measured}


def _write_layers(
    checkpoint: Checkpoint,
    passages: Sequence[Passage],
    place: Path,
    options: CalibrationOptions,
    progress: Progress | None,
    name: str,
) -> list[float]:
    """Statistics of every layer into `place`; those of several passes are added there."""

    def keep(layer_index: int, layer: LayerStatistics) -> None:
        path = place / layer_file(layer_index)
        if path.exists():
            before = layer_of_tensors(map_tensors(path), options.reservoir)
            before.add(layer)
            layer = before
        tensors = [memory_tensor(key, tensor) for key, tensor in layer_tensors(layer).items()]
        write_tensors(path, tensors, {"format": "pt"})

    return calibrate_variant(checkpoint, passages, keep, options, progress, f"calibrating {name}")


def _folder_bytes(checkpoint: Checkpoint, options: CalibrationOptions) -> int:
    """What a variant's files take, and one of them a second time while it is written anew."""
    width = int(checkpoint.settings["hidden_size"] or 0)
    slot = 4 * width * width + options.reservoir * (2 * width + 12)
    return (len(checkpoint.routed_layers) + 1) * checkpoint.num_experts * slot


def _measure(
    name: str,
    checkpoint: Checkpoint,
    base: Checkpoint | None,
    passages: Passages,
    options: CalibrationOptions,
    progress: Progress | None,
) -> dict[str, object]:
    """What damage costs in every layer, and what fine-tuning gained where there is a base; by field."""
    # A text too short to hold anything out is better than none.
    every = passages.held_out or passages.counted
    disturbed = spread(every, _DISTURBED_TOKENS)
    found = measure_sensitivity(checkpoint, disturbed, options, progress, f"disturbing {name}")
    measured: dict[str, object] = {
        "sensitivity": {index: _rounded(value) for index, value in found.by_layer.items()},
        "response": Response(*map(_rounded, found.response)),
    }
    if base is not None:
        chosen = spread(every, _COMPARED_TOKENS)
        measured["base_nll_excess"] = _compare(name, checkpoint, base, chosen, options, progress)
    return measured


def _rounded(value: float) -> float:
    return float(f"{value:.{_DIGITS}g}")


def _compare(
    name: str,
    checkpoint: Checkpoint,
    base: Checkpoint,
    passages: Sequence[Passage],
    options: CalibrationOptions,
    progress: Progress | None,
) -> float | None:
    """Mean log-likelihood of the base minus the variant's; None when the base does not know the tokens."""
    vocab_size = int(base.settings["vocab_size"] or 0)
    if any(max((*passage.token_ids, *passage.target_ids)) >= vocab_size for passage in passages):
        return None
    of_base = measure_nll(base, passages, options, progress, f"base on {name}'s text")
    own = measure_nll(checkpoint, passages, options, progress, f"{name} on its text")
    return mean_nll(of_base, passages) - mean_nll(own, passages)


def _judge(name: str, entry: VariantCalibration, text: Text) -> list[Finding]:
    if entry.base_nll_excess is None or entry.base_nll_excess >= 0:
        return []
    return [
        Finding(
            level="warning",
            code="TEXT_OF_ANOTHER_KIND",
            where=f"variant {name}, {text.path}",
            found=f"the base predicts it better, by {-entry.base_nll_excess:.3f} nats a token",
            expected="text of the kind and language that the variant was tuned on",
        )
    ]


def _dump(index: CalibrationIndex) -> str:
    return index.model_dump_json(indent=1, by_alias=True) + "\n"
