"""Coded matrices as places in a bundle's files: which tensors they need, and what these make.

Knows names and shapes of tensors and nothing of how codes become numbers (`models/packed.py`).

Shapes: N rows, D columns, P bytes of a row's codes, G groups, r rank.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from moemerge.bundle.layout import CODES, LEFT, RIGHT, SCALES
from moemerge.bundle.manifest import CodeSpec
from moemerge.checkpoint.headers import StoredTensor
from moemerge.models.packed import LowRank, Matrix, PackedMatrix, Residual, code_bytes

CODE_DTYPE = "U8"
SCALE_DTYPE = "BF16"
FACTOR_DTYPE = "BF16"
Find = Callable[[str, str, tuple[int, ...]], StoredTensor]
"""From suffix, dtype and shape to the tensor that must be there."""


@dataclass(frozen=True, slots=True)
class StoredCodes:
    """Places of a `PackedMatrix`.

    Attributes:
        codes: Bytes [N, P].
        scales: [N, G].
        bits: Of a code.
        group: Columns that share a scale.
    """

    codes: StoredTensor
    scales: StoredTensor
    bits: int
    group: int

    @property
    def shape(self) -> tuple[int, int]:
        """[N, D]."""
        return self.codes.shape[0], self.codes.shape[1] * 8 // self.bits

    @property
    def places(self) -> dict[str, StoredTensor]:
        """Its tensors by suffix."""
        return {CODES: self.codes, SCALES: self.scales}

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return self.codes.nbytes + self.scales.nbytes

    def assemble(self, read: Callable[[StoredTensor], Tensor]) -> PackedMatrix:
        """The matrix, of tensors as `read` gives them."""
        return PackedMatrix(read(self.codes), read(self.scales), self.bits, self.group)


@dataclass(frozen=True, slots=True)
class StoredLowRank:
    """Places of a `LowRank`: `left` [N, r] and `right` [r, D]."""

    left: StoredTensor
    right: StoredTensor

    @property
    def shape(self) -> tuple[int, int]:
        """[N, D]."""
        return self.left.shape[0], self.right.shape[1]

    @property
    def places(self) -> dict[str, StoredTensor]:
        """Its tensors by suffix."""
        return {LEFT: self.left, RIGHT: self.right}

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return self.left.nbytes + self.right.nbytes

    def assemble(self, read: Callable[[StoredTensor], Tensor]) -> LowRank:
        """The matrix, of tensors as `read` gives them."""
        return LowRank(read(self.left), read(self.right))


StoredMatrix = StoredTensor | StoredCodes
"""Also of a bias, which is never coded."""
StoredResidual = StoredCodes | StoredLowRank


def assemble(matrix: StoredMatrix, read: Callable[[StoredTensor], Tensor]) -> Matrix:
    """The matrix, of tensors as `read` gives them."""
    return read(matrix) if isinstance(matrix, StoredTensor) else matrix.assemble(read)


def plain_parts(parts: Mapping[str, StoredMatrix]) -> Mapping[str, StoredTensor] | None:
    """The parts of an expert none of which is coded; None of one that is."""
    plain = {part: place for part, place in parts.items() if isinstance(place, StoredTensor)}
    return plain if len(plain) == len(parts) else None


def find_codes(spec: CodeSpec, shape: tuple[int, int], find: Find) -> StoredCodes:
    """The places of a packed matrix of that shape."""
    num_rows, num_columns = shape
    group = spec.group_of(num_columns)
    return StoredCodes(
        find(CODES, CODE_DTYPE, (num_rows, code_bytes(spec.bits, num_columns))),
        find(SCALES, SCALE_DTYPE, (num_rows, -(-num_columns // group))),
        spec.bits,
        group,
    )


def find_residual(spec: CodeSpec, shape: tuple[int, int], find: Find) -> StoredResidual:
    """The places of a residual of that shape."""
    if spec.rank is None:
        return find_codes(spec, shape, find)
    num_rows, num_columns = shape
    return StoredLowRank(
        find(LEFT, FACTOR_DTYPE, (num_rows, spec.rank)), find(RIGHT, FACTOR_DTYPE, (spec.rank, num_columns))
    )


def tensors_of(matrix: Residual) -> Mapping[str, Tensor]:
    """The tensors of a coded matrix in memory by suffix."""
    if isinstance(matrix, PackedMatrix):
        return {CODES: matrix.codes, SCALES: matrix.scales}
    return {LEFT: matrix.left, RIGHT: matrix.right}
