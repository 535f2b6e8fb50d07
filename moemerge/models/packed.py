"""Matrices in few bits: how codes lie in bytes, and how they become numbers again.

A matrix of b bits has codes from 0 to 2^b - 1 and a scale per row and group of consecutive columns; an
entry is `(code - 2^(b-1) + 1/2) * scale`, so that one bit is a sign. Knows nothing of how codes are chosen.

Shapes: N rows, D columns, P bytes of a row's codes, G groups.
"""

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

WIDTHS = {1: (1,), 2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 8: (8,)}
"""By bits of a code, the widths of the planes that it is cut into, lowest bits first.

A plane of width w holds D / (8 / w) bytes a row; the i-th w bits of byte j are those of column
`i * D * w / 8 + j`, so that unpacking is a shift and a mask of whole rows.
"""
COLUMN_MULTIPLE = 8
"""Rows of fewer than eight bits have a multiple of so many columns, so that every plane ends at a byte."""


_STRETCH = 2**18
"""Entries of an effective expert that are computed at a time: what lies between fits into a core's cache."""


_ROW_MULTIPLE = 64
"""Rows of such a stretch are a multiple of it, the largest block of rows that any product reads."""


class Coded(Protocol):
    """A matrix [N, D] that is not stored as its entries."""

    @property
    def shape(self) -> tuple[int, int]:
        """[N, D]."""
        ...

    @property
    def nbytes(self) -> int:
        """Bytes that it takes."""
        ...

    @property
    def device(self) -> torch.device:
        """Where it is."""
        ...

    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The matrix [N, D]; computed in float32, rounded once."""
        ...

    def rows(self, start: int, stop: int) -> "Coded":
        """Rows from `start` to before `stop`, or to the end."""
        ...


@dataclass(frozen=True, slots=True)
class PackedMatrix:
    """A matrix [N, D] in few bits.

    Attributes:
        codes: Bytes [N, P], the planes side by side.
        scales: [N, G], of any floating dtype.
        bits: Of a code; a key of `WIDTHS`.
        group: Columns that share a scale; the last group of a row may be shorter.
    """

    codes: Tensor
    scales: Tensor
    bits: int
    group: int

    @property
    def num_columns(self) -> int:
        """D."""
        return self.codes.shape[1] * 8 // self.bits

    @property
    def shape(self) -> tuple[int, int]:
        """[N, D]."""
        return self.codes.shape[0], self.num_columns

    @property
    def device(self) -> torch.device:
        """Where it is."""
        return self.codes.device

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales."""
        return self.codes.nbytes + self.scales.nbytes

    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The matrix [N, D]; computed in float32, rounded once."""
        values_ND = unpack(self.codes, self.bits).to(torch.float32)
        values_ND -= 2 ** (self.bits - 1) - 0.5
        return scale_columns(values_ND, self.scales, self.group).to(dtype)

    def rows(self, start: int, stop: int) -> "PackedMatrix":
        """Rows from `start` to before `stop`, or to the end."""
        return PackedMatrix(self.codes[start:stop], self.scales[start:stop], self.bits, self.group)


def spread(scales_NG: Tensor, group: int, num_columns: int) -> Tensor:
    """Scales by column, float32; [N, D], or [N, 1] where a row has only one."""
    scales_NG = scales_NG.to(torch.float32)
    if scales_NG.shape[1] == 1:
        return scales_NG
    return scales_NG.repeat_interleave(group, dim=1)[:, :num_columns]


def scale_columns(values_ND: Tensor, scales_NG: Tensor, group: int) -> Tensor:
    """Multiply float32 values by the scale of their row and group, in place."""
    num_rows, num_columns = values_ND.shape
    num_groups = scales_NG.shape[1]
    if num_columns == num_groups * group:
        # One multiplication over groups costs a third of one by scales that were spread first.
        values_ND.view(num_rows, num_groups, group).mul_(scales_NG.to(torch.float32).unsqueeze(2))
        return values_ND
    return values_ND.mul_(spread(scales_NG, group, num_columns))


def code_bytes(bits: int, num_columns: int) -> int:
    """P, bytes of the codes of a row."""
    return bits * num_columns // 8


def pack_codes(codes_ND: Tensor, bits: int) -> Tensor:
    """Bytes [N, P] of codes from 0 to 2^bits - 1, uint8."""
    planes, shift = [], 0
    for width in WIDTHS[bits]:
        plane = (codes_ND >> shift) & (2**width - 1)
        pieces = plane.chunk(8 // width, dim=1)
        packed = torch.zeros_like(pieces[0])
        for place, piece in enumerate(pieces):
            packed |= piece << (place * width)
        planes.append(packed)
        shift += width
    return torch.cat(planes, dim=1)


def unpack(bytes_NP: Tensor, bits: int) -> Tensor:
    """Codes [N, D], uint8."""
    num_columns = bytes_NP.shape[1] * 8 // bits
    codes, start, shift = None, 0, 0
    for width in WIDTHS[bits]:
        stop = start + num_columns * width // 8
        plane = bytes_NP[:, start:stop]
        mask = 2**width - 1
        if width == 8:
            return plane
        pieces = [(plane >> (place * width)) & mask for place in range(8 // width)]
        values = torch.cat(pieces, dim=1)
        codes = values if codes is None else codes | (values << shift)
        start, shift = stop, shift + width
    assert codes is not None
    return codes


@dataclass(frozen=True, slots=True)
class LowRank:
    """A matrix [N, D] of rank r at most, as a product: `left` [N, r] times `right` [r, D]."""

    left: Tensor
    right: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """[N, D]."""
        return self.left.shape[0], self.right.shape[1]

    @property
    def device(self) -> torch.device:
        """Where it is."""
        return self.left.device

    @property
    def nbytes(self) -> int:
        """Bytes of both factors."""
        return self.left.nbytes + self.right.nbytes

    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The matrix [N, D]; computed in float32, rounded once."""
        return (self.left.to(torch.float32) @ self.right.to(torch.float32)).to(dtype)

    def rows(self, start: int, stop: int) -> "LowRank":
        """Rows from `start` to before `stop`, or to the end."""
        return LowRank(self.left[start:stop], self.right)

    @property
    def max_rows(self) -> int:
        """Rows of hidden states up to which `multiply` is the faster way: it always is."""
        return 2**31

    def multiply(self, hidden_TD: Tensor) -> Tensor:
        """`hidden matrix^T`, [T, N], through the rank, in the dtype of the hidden states."""
        inner_TR = hidden_TD @ self.right.to(hidden_TD.dtype).T
        return inner_TR @ self.left.to(hidden_TD.dtype).T


Matrix = Tensor | PackedMatrix
Residual = PackedMatrix | LowRank


def effective(pool: Tensor | Coded, residual: Coded | None, dtype: torch.dtype) -> Tensor:
    """What a slot computes with: pool expert plus residual, added in float32 and rounded once."""
    target = torch.empty(pool.shape, dtype=dtype, device=pool.device)
    fill_effective(target, pool, residual, dtype)
    return target


def fill_effective(target: Tensor, pool: Tensor | Coded, residual: Coded | None, dtype: torch.dtype) -> None:
    """Write an effective matrix over `target` [N, D], which may have a wider or narrower dtype than its own.

    A vector [N] of an expert is never coded, and nothing is added to it.

    Goes through the rows in stretches, always the same, so that the bits do not depend on who asks.
    """
    num_rows, num_columns = pool.shape[0], math.prod(pool.shape[1:])
    step = max(1, _STRETCH // (_ROW_MULTIPLE * max(1, num_columns))) * _ROW_MULTIPLE
    for start in range(0, num_rows, step):
        stop = min(start + step, num_rows)
        values = pool[start:stop] if isinstance(pool, Tensor) else pool.rows(start, stop).dense()
        if residual is not None:
            values = values.to(torch.float32) + residual.rows(start, stop).dense()
        target[start:stop] = values.to(dtype)
