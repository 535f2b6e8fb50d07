"""The rungs an expert may stand on: codes of pool experts and of residuals, and what they take.

Pure. Names are what plans and reports show.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from moemerge.bundle.manifest import FACTOR_BITS, CodeSpec
from moemerge.consolidation.codes.low_rank import factorise
from moemerge.consolidation.codes.moments import Moment
from moemerge.consolidation.codes.rounding import restore_length, round_together
from moemerge.models.packed import COLUMN_MULTIPLE, Matrix, PackedMatrix, Residual

PLAIN = "plain"
"""A pool expert in the dtype of its sources."""
NONE = "none"
"""No residual: the pool expert as stored is all."""
_POOL_BITS = (6, 5, 4, 3)
_RESIDUAL_BITS = (1, 2, 3, 4)
_RESIDUAL_RANKS = (4, 16)
_GROUP = 64

BIAS_BYTES = 4
"""Of an entry of a bias: those of coded experts stay uncoded, in float32."""

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class Ladder:
    """Codes by name for experts of certain shapes; None for what needs no code.

    Attributes:
        pool: Of pool experts.
        residuals: Of residuals.
    """

    pool: Mapping[str, CodeSpec | None]
    residuals: Mapping[str, CodeSpec | None]


def ladder_of(shapes: Shapes) -> Ladder:
    """Every rung that an expert with parts of these shapes can stand on, finest pool code first."""
    matrices = _matrices(shapes)
    fits = all(columns % COLUMN_MULTIPLE == 0 for _, columns in matrices)
    narrow = min(map(min, matrices))
    # One scale a row is what the packed products of eight bits take.
    pool = {"8-bit": bits_code(8, None)}
    pool |= {f"{bits}-bit": bits_code(bits, _GROUP) for bits in _POOL_BITS if fits}
    residuals = {f"{bits}-bit": bits_code(bits, _GROUP) for bits in _RESIDUAL_BITS if fits}
    residuals |= {f"rank-{rank}": rank_code(rank) for rank in _RESIDUAL_RANKS if rank < narrow}
    return Ladder({PLAIN: None, **pool}, {NONE: None, **residuals})


def bits_code(bits: int, group: int | None) -> CodeSpec:
    """Group-wise codes; without a group one scale a row."""
    return CodeSpec.model_validate({"kind": "bits", "bits": bits, "group": group})


def rank_code(rank: int) -> CodeSpec:
    """Two thin factors in bf16."""
    return CodeSpec(kind="low_rank", bits=FACTOR_BITS, rank=rank)


def code_size(code: CodeSpec | None, shapes: Shapes, plain_bytes: int) -> int:
    """Bytes that an expert of these shapes takes in a code; `plain_bytes` without one."""
    if code is None:
        return plain_bytes
    biases = sum(BIAS_BYTES * shape[0] for shape in shapes.values() if len(shape) == 1)
    return residual_size(code, shapes) + biases


def residual_size(code: CodeSpec | None, shapes: Shapes) -> int:
    """Bytes that a residual of an expert of these shapes takes: of its matrices alone."""
    return sum(code.part_bytes(*shape) for shape in _matrices(shapes)) if code else 0


def _matrices(shapes: Shapes) -> list[tuple[int, int]]:
    return [(shape[0], shape[1]) for shape in shapes.values() if len(shape) == 2]


def encode(parts: Mapping[str, Tensor], code: CodeSpec, moments: Mapping[str, Moment]) -> dict[str, Matrix]:
    """An expert's float32 matrices in few bits, with feedback from moments of their inputs, and biases."""
    coded = _round(parts, code, moments)
    return {part: coded.get(part, matrix) for part, matrix in parts.items()}


def _round(
    parts: Mapping[str, Tensor], code: CodeSpec, moments: Mapping[str, Moment]
) -> dict[str, PackedMatrix]:
    coded: dict[str, PackedMatrix] = {}
    for together in _by_inputs(parts, moments):
        matrices = [parts[part] for part in together]
        group = code.group or matrices[0].shape[1]
        coded |= dict(
            zip(together, round_together(matrices, code.bits, group, moments[together[0]]), strict=True)
        )
    return {part: coded[part] for part in parts if part in coded}


def _by_inputs(parts: Mapping[str, Tensor], moments: Mapping[str, Moment]) -> list[list[str]]:
    """Names of matrices, those with one moment together."""
    found: dict[int, list[str]] = {}
    for part in parts:
        if part in moments:
            found.setdefault(id(moments[part]), []).append(part)
    return list(found.values())


def encode_residual(
    parts: Mapping[str, Tensor], code: CodeSpec, moments: Mapping[str, Moment]
) -> dict[str, Residual]:
    """What is missing of an expert's matrices, float32, in a residual's code; biases are not corrected."""
    if code.kind == "bits":
        coded = _round(parts, code, moments)
        return {part: restore_length(matrix, parts[part], moments[part]) for part, matrix in coded.items()}
    assert code.rank is not None
    return {part: factorise(parts[part], code.rank, moments[part]) for part in parts if part in moments}
