"""Calibrations on disk: an index, and a folder of one file a layer for each variant.

A variant is written beside its place and appears whole; others that are there stay as they are. What an
interrupted run has left beside it is where the next one begins.
"""

import logging
import shutil
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from moemerge.calibration.passages import PASSAGES, Passages, read_passages
from moemerge.calibration.sensitivity import Response
from moemerge.calibration.statistics import LayerStatistics, layer_of_tensors
from moemerge.checkpoint.checkpoint import Checkpoint
from moemerge.checkpoint.fingerprint import fingerprint
from moemerge.checkpoint.tensors import TensorReader, map_tensors
from moemerge.checkpoint.variants import VariantSet
from moemerge.checkpoint.writer import write_text
from moemerge.errors import (
    DamagedInput,
    IncompatibleInputs,
    InvalidRecipe,
    NotFound,
    UnsupportedCheckpoint,
    list_problems,
)

SCHEMA = "moemerge/calibration@1"
INDEX = "calibration.json"
_TASK = "task.json"
logger = logging.getLogger(__name__)
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
        raise DamagedInput(f"{path}: {list_problems(error)}") from error
    if index.schema_ != SCHEMA:
        raise UnsupportedCheckpoint(f"{path}: schema {index.schema_!r}, this moemerge reads {SCHEMA}")
    return Calibration(folder, index)


def layer_file(layer_index: int) -> str:
    """File of a layer's statistics in a variant's folder."""
    return f"layer-{layer_index:05d}.safetensors"


def open_index(folder: Path, first: Checkpoint) -> CalibrationIndex:
    """The index that a folder has for such checkpoints, or one without variants.

    Raises:
        IncompatibleInputs: The folder holds statistics of another geometry.
        InvalidRecipe: It holds something else.
    """
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


def is_calibrated(folder: Path, name: str, entry: VariantCalibration, index: CalibrationIndex) -> bool:
    """Whether the same was calibrated before, and its files are there."""
    there = index.variants.get(name)
    if there is None or there.identity != entry.identity:
        return False
    files = [PASSAGES, *map(layer_file, index.layers)]
    return all((folder / name / file).is_file() for file in files)


def building_place(folder: Path, name: str, task: str) -> Path:
    """Folder in which a variant is built, with what an interrupted run has left there.

    Args:
        folder: Of the calibration.
        name: Of the variant.
        task: Identifies the work; what other work has left is discarded.
    """
    place = folder.absolute() / f".{name}.building"
    mark = place / _TASK
    if mark.is_file() and mark.read_text() == task:
        for half_done in place.glob("span-*"):
            shutil.rmtree(half_done, ignore_errors=True)
        return place
    if place.exists():
        logger.warning("%s: unfinished work of another command is discarded", place)
        shutil.rmtree(place)
    place.mkdir()
    write_text(mark, task)
    return place


def put_variant(
    folder: Path, name: str, place: Path, entry: VariantCalibration, index: CalibrationIndex
) -> CalibrationIndex:
    """Put what was built into a variant's place; returns the index, which never tells of a half one."""
    others = {other: known for other, known in index.variants.items() if other != name}
    if name in index.variants:
        _write_index(folder, index.model_copy(update={"variants": others}))
    shutil.rmtree(folder / name, ignore_errors=True)
    keep = {PASSAGES, *map(layer_file, index.layers)}
    for path in place.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name not in keep:
            path.unlink()
    place.replace(folder / name)
    # By name: variants come when their work is done, in any order.
    ordered = dict(sorted({**index.variants, name: entry}.items()))
    complete = index.model_copy(update={"variants": ordered})
    _write_index(folder, complete)
    return complete


def _write_index(folder: Path, index: CalibrationIndex) -> None:
    write_text(folder / INDEX, index.model_dump_json(indent=1, by_alias=True) + "\n")
