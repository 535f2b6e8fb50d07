"""How coded matrices come into the layouts that a device multiplies without unpacking them.

Which layouts a device takes is found out once, by trying. Knows nothing of what the matrices are for.

Shapes: N rows and D columns of a matrix, G groups of columns, B blocks of H times two rows.
"""

from collections.abc import Sequence
from enum import IntEnum
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from moemerge.models.layouts import (
    INT16_MIDDLE,
    Arranged,
    Int4Matrix,
    Int4Planes,
    Int8Blocks,
    Int8Matrix,
)
from moemerge.models.packed import PackedMatrix, code_bytes, unpack

INT4_GROUPS = (32, 64, 128, 256)
_INT4_BITS = (1, 2, 3, 4)
_PLANED_BITS = (5, 6)
"""Codes of more bits are two of four bits at most, side by side."""
_INT4_BLOCK = 64
"""Rows of a four-bit matrix come in multiples of this; a CPU's own blocks are as long, or half of it."""


class Room(IntEnum):
    """What arranging a matrix may take."""

    NONE = 0
    """Neither time nor memory."""
    SOME = 1
    """Time, and scales that take more; nothing where it must still be unpacked row by row."""
    FOUR_BITS = 2
    """Every code of up to six bits may become one or two of four."""


class Form(NamedTuple):
    """What the layout of a packed matrix depends on.

    Attributes:
        bits: Of a code.
        group: Columns that share a scale.
        shape: [N, D].
        dtype: Of hidden states.
        device: Where it is.
        by_rows: It must still be unpacked row by row: residuals are added to it, or it is one.
    """

    bits: int
    group: int
    shape: tuple[int, int]
    dtype: torch.dtype
    device: torch.device
    by_rows: bool


def arrange(
    matrix: PackedMatrix, dtype: torch.dtype, room: Room, *, by_rows: bool
) -> PackedMatrix | Arranged:
    """The matrix as the product of its device takes it, or itself where there is none.

    Args:
        matrix: May be written over; the result shares memory with it where it is no larger.
        dtype, by_rows: See `Form`.
        room: What it may take.
    """
    form = Form(matrix.bits, matrix.group, matrix.shape, dtype, matrix.device, by_rows)
    if _takes_blocks(form, room):
        return _int8_blocks(matrix)
    if matrix.bits == 8 and matrix.scales.shape[1] == 1 and can_multiply_int8(dtype, matrix.device):
        return Int8Matrix(matrix.codes.view(torch.int8).bitwise_xor_(-128), matrix.scales)
    num_planes = _int4_planes(form, room)
    if not num_planes:
        return matrix
    codes_ND, scales_GN = unpack(matrix.codes, matrix.bits), matrix.scales.T
    if num_planes == 1:
        return _int4_matrix(codes_ND + (8 - 2 ** (matrix.bits - 1)), scales_GN)
    low = matrix.bits - 4
    both_ND = torch.cat((codes_ND >> low, (codes_ND & (2**low - 1)) + (8 - 2 ** (low - 1))), dim=1)
    return Int4Planes(_int4_matrix(both_ND, torch.cat((scales_GN * 2**low, scales_GN))))


def arranged_bytes(form: Form, room: Room) -> int:
    """Bytes of a packed matrix of this kind, with scales in bf16, after `arrange`."""
    num_rows, num_columns = form.shape
    scales = 2 * num_rows * -(-num_columns // form.group)
    if num_planes := _int4_planes(form, room):
        return num_planes * (num_rows * code_bytes(4, num_columns) + 2 * scales)
    return num_rows * code_bytes(form.bits, num_columns) + scales * (4 if _takes_blocks(form, room) else 1)


def _takes_blocks(form: Form, room: Room) -> bool:
    """Whether a matrix becomes `Int8Blocks`."""
    fits = form.bits == 8 and form.group >= form.shape[1] and room > Room.NONE and not form.by_rows
    return fits and can_multiply_blocks(form.dtype, form.device)


def _int4_planes(form: Form, room: Room) -> int:
    """Codes of four bits that each code becomes; 0 where it stays as it is."""
    allowed: Sequence[int] = (*_INT4_BITS, *_PLANED_BITS)
    if room < Room.FOUR_BITS:
        allowed = (4,) if room == Room.SOME and not form.by_rows else ()
    if form.bits not in allowed or not can_arrange_int4(form):
        return 0
    return 2 if form.bits in _PLANED_BITS else 1


def _int4_matrix(codes_ND: Tensor, scales_GN: Tensor) -> Int4Matrix:
    """From codes, bytes, whose zero lies between 7 and 8."""
    block = _int4_block()
    assert block is not None
    (num_rows, num_columns), scales = codes_ND.shape, scales_GN.unsqueeze(2)
    # As torch's own conversion does it, in a fifth of the time.
    halves_B2HD = codes_ND.view(-1, 2, block // 2, num_columns)
    bytes_BHD = halves_B2HD[:, 0] | (halves_B2HD[:, 1] << 4)
    # A single block would be reshaped without being copied.
    blocks = bytes_BHD.transpose(1, 2).reshape(num_rows, num_columns // 2).contiguous()
    return Int4Matrix(blocks, torch.cat((scales, scales * 0.5), dim=2).contiguous(), block)


def _int8_blocks(matrix: PackedMatrix) -> Int8Blocks:
    entries_ND = matrix.codes.view(torch.int8) ^ -128
    scales = matrix.scales.squeeze(1).to(torch.float32)
    # Added to the products of low and of high bytes, and so to their sum 1 + 256 times.
    offsets = entries_ND.sum(dim=1, dtype=torch.float64) * scales.to(torch.float64) * (-INT16_MIDDLE / 257)
    blocks = torch.ops.onednn.qlinear_prepack(entries_ND, None)
    return Int8Blocks(blocks, scales, offsets.to(torch.float32))


def can_multiply_blocks(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether there is a product for `Int8Blocks`."""
    return dtype == torch.bfloat16 and device.type == "cpu" and _has_exact_bytes()


@cache
def _has_exact_bytes() -> bool:
    """Whether products of bytes are there and exact; on older CPUs sums of two of them overflow."""
    if not hasattr(torch.ops.onednn, "qlinear_pointwise"):
        return False
    scales = torch.ones(64, dtype=torch.bfloat16).unsqueeze(1)
    largest = torch.full((64, 64), 255, dtype=torch.uint8)
    try:
        product = _int8_blocks(PackedMatrix(largest, scales, 8, 64)).multiply(torch.ones(1, 64))
    except (RuntimeError, TypeError, NotImplementedError):
        return False
    return bool((product - 64 * 127.5).abs().max() < 0.01 * 64)


def can_multiply_int8(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether there is a product for `Int8Matrix`."""
    return dtype == torch.bfloat16 and device.type == "cpu" and hasattr(torch, "_weight_int8pack_mm")


def can_arrange_int4(form: Form) -> bool:
    """Whether there is a product for codes of four bits of this form in an `Int4Matrix`."""
    return (
        form.group in INT4_GROUPS
        and form.shape[0] % _INT4_BLOCK == 0
        and form.shape[1] % form.group == 0
        and form.dtype == torch.bfloat16
        and form.device.type == "cpu"
        and _int4_block() is not None
    )


@cache
def _int4_block() -> int | None:
    """Rows of the blocks that this CPU's four-bit product reads; None where it has none, or other ones."""
    if not hasattr(torch, "_weight_int4pack_mm_for_cpu"):
        return None
    codes_ND = torch.arange(2 * _INT4_BLOCK * 32, dtype=torch.int32).view(-1, 32) * 7 // 5 % 16
    try:
        packed = torch._convert_weight_to_int4pack_for_cpu(codes_ND, 2)
    except RuntimeError:
        return None
    expected = codes_ND.to(torch.float32) - 7.5
    scales = torch.tensor([1.0, 0.5], dtype=torch.bfloat16).repeat(1, len(codes_ND), 1)
    for block in (_INT4_BLOCK, _INT4_BLOCK // 2):
        if torch.equal(Int4Matrix(packed, scales, block).dense(), expected):
            return block
    return None
