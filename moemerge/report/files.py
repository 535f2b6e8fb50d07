"""Files that a report is made from, read without torch, whose import takes longer than a report may.

Nothing in them is believed before it is checked. The shapes name only what a report shows; whatever else
there is belongs to those who wrote it.
"""

from pathlib import Path
from typing import Annotated, Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from moemerge.bundle.manifest import CodeSpec, FiniteFloat, RelativeError
from moemerge.checkpoint.headers import read_header
from moemerge.errors import DamagedInput, NotFound, UnsupportedCheckpoint, list_problems

MAX_JSON_BYTES = 256 * 2**20
MAX_LAYERS = 100_000
_DTYPES = {"F64": "<f8", "F32": "<f4", "I64": "<i8"}
Kind = TypeVar("Kind", bound=BaseModel)


def printable(text: str) -> str:
    """Text without control characters, which terminals obey."""
    return "".join(character if character.isprintable() else "�" for character in text)


Text = Annotated[str, AfterValidator(printable)]
LayerIndex = Annotated[int, Field(ge=0, lt=MAX_LAYERS)]
Count = Annotated[int, Field(ge=0)]
Member = tuple[Text, Count]


class _File(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True)


class IndexedLayer(_File):
    """A line of `similarity.json`."""

    index: LayerIndex
    same_slot_median: RelativeError | None
    same_slot_max: RelativeError | None
    other_slot_median: RelativeError | None
    distinct: float = Field(ge=0)


class SimilarityIndex(_File):
    """`similarity.json`."""

    schema_: str = Field(alias="schema", pattern=r"^moemerge/similarity@1$")
    family: Text
    variants: list[Text] = Field(min_length=1)
    has_base: bool
    num_slots: int = Field(gt=0)
    distances: dict[Text, Text]
    not_computed: dict[Text, Text]
    layers: list[IndexedLayer] = Field(min_length=1)


class PlannedExpert(_File):
    """A pool expert in a plan."""

    members: list[Member] = Field(min_length=1)
    operator: Text
    code: CodeSpec | None = None


class PlannedLayer(_File):
    """A layer in a plan."""

    index: LayerIndex
    pool: list[PlannedExpert] = Field(min_length=1)
    errors: dict[Text, list[RelativeError]] = Field(default_factory=dict)
    residuals: dict[Text, list[CodeSpec | None]] = Field(default_factory=dict)


class PlannedVariant(_File):
    """A variant in a plan."""

    source: Text


class Plan(_File):
    """`plan.json`."""

    schema_: str = Field(alias="schema", pattern=r"^moemerge/plan@2$")
    family: Text
    budget: Text
    policy: Text
    num_slots: int = Field(gt=0)
    variants: dict[Text, PlannedVariant] = Field(min_length=1)
    variant_bytes: int = Field(gt=0)
    pool_bytes: Count
    residual_bytes: Count = 0
    predicted_damage: dict[Text, FiniteFloat] = Field(default_factory=dict)
    evidence: Text
    layers: list[PlannedLayer] = Field(min_length=1)


class CurvePoint(_File):
    """A budget, and what it leaves each variant to lose."""

    bytes: Count
    loss: dict[Text, RelativeError]


class CurveFile(_File):
    """`curve.json`."""

    schema_: str = Field(alias="schema", pattern=r"^moemerge/curve@1$")
    evidence: Text
    points: list[CurvePoint]


class SlotCosts(_File):
    """What was measured of a slot; see `consolidation.evidence.SlotRecord`."""

    owners: list[list[Member]]
    shared: dict[str, tuple[Text, list[RelativeError]]]


class LayerCosts(_File):
    """`costs-layer-*.json`."""

    index: LayerIndex
    slots: list[SlotCosts]
    tokens: dict[Text, Count] = Field(default_factory=dict)
    routed: dict[Text, list[Count]] = Field(default_factory=dict)


class CalibratedVariant(_File):
    """A variant in `calibration.json`."""

    text_sha256: Text
    num_tokens: int = Field(gt=0)
    nll: FiniteFloat
    base_nll_excess: FiniteFloat | None = None


class CalibrationIndex(_File):
    """`calibration.json`."""

    schema_: str = Field(alias="schema", pattern=r"^moemerge/calibration@1$")
    num_slots: int = Field(gt=0)
    layers: list[LayerIndex] = Field(min_length=1)
    variants: dict[Text, CalibratedVariant]


def read_json(path: Path, kind: type[Kind]) -> Kind:
    """A checked file.

    Raises:
        NotFound: No such file.
        UnsupportedCheckpoint: Of another kind or version.
        DamagedInput: Malformed, or larger than any such file.
    """
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise DamagedInput(f"{path}: larger than any such file ({MAX_JSON_BYTES} bytes)")
        return kind.model_validate_json(path.read_bytes())
    except FileNotFoundError as error:
        raise NotFound(f"{path}: no such file") from error
    except OSError as error:
        raise DamagedInput(f"{path}: cannot be read ({error.strerror})") from error
    except ValidationError as error:
        message = f"{path}: {list_problems(error)}"
        if error.errors()[0]["loc"] == ("schema",):
            raise UnsupportedCheckpoint(f"{message}. Was it written by another moemerge?") from error
        raise DamagedInput(message) from error


def read_arrays(path: Path) -> dict[str, NDArray[Any]]:
    """Arrays of a safetensors file by name; those of types that reports do not use are left out.

    Raises:
        NotFound, DamagedInput: As `read_header`.
    """
    found = {}
    header = read_header(path)
    with path.open("rb") as file:
        for name, tensor in header.items():
            if tensor.dtype not in _DTYPES:
                continue
            file.seek(tensor.start)
            raw = file.read(tensor.nbytes)
            found[name] = np.frombuffer(raw, dtype=_DTYPES[tensor.dtype]).reshape(tensor.shape)
    return found
