"""Layouts of coded matrices: the entries of their codes, and products near those of the entries."""

import pytest
import torch

from moemerge.models import multiply
from moemerge.models.arranging import (
    Form,
    Room,
    arrange,
    arranged_bytes,
    can_arrange_int4,
    can_multiply_blocks,
    can_multiply_int8,
)
from moemerge.models.layouts import Int4Matrix, Int4Planes, Int8Blocks, Int8Matrix, Summed
from moemerge.models.packed import PackedMatrix, effective
from tests.coded import code, low_rank, quantise, random_matrix

CPU = torch.device("cpu")
BF16 = torch.bfloat16
CODED_TOLERANCE = 2**-7
"""Two roundings to bf16, of 2^-8 each, of numbers as large as a random sum of the product's terms."""
needs_int8 = pytest.mark.skipif(not can_multiply_int8(BF16, CPU), reason="this torch has no int8 product")
needs_blocks = pytest.mark.skipif(
    not can_multiply_blocks(BF16, CPU), reason="this CPU or this torch has no exact products of bytes"
)
needs_int4 = pytest.mark.skipif(
    not can_arrange_int4(Form(4, 32, (64, 64), BF16, CPU, by_rows=False)),
    reason="this torch has no int4 product",
)


LOW_RANK = code(random_matrix(192, 512, seed=4), low_rank(3))


def copy_of(matrix: PackedMatrix) -> PackedMatrix:
    return PackedMatrix(matrix.codes.clone(), matrix.scales.clone(), matrix.bits, matrix.group)


def arranged(matrix: PackedMatrix, kind):
    """`arrange` may write over the codes."""
    return arrange(copy_of(matrix), BF16, Room.FOUR_BITS, by_rows=kind is Int8Matrix)


def form_of(matrix: PackedMatrix, dtype=BF16, *, by_rows=False):
    return Form(matrix.bits, matrix.group, matrix.shape, dtype, CPU, by_rows)


KINDS = [
    pytest.param(8, None, Int8Matrix, marks=needs_int8),
    pytest.param(8, 600, Int8Blocks, marks=needs_blocks),
    *(pytest.param(4, group, Int4Matrix, marks=needs_int4) for group in (32, 64, 128, 256)),
    *(pytest.param(number, 64, Int4Matrix, marks=needs_int4) for number in (1, 2, 3)),
    *(pytest.param(number, 64, Int4Planes, marks=needs_int4) for number in (5, 6)),
]


@pytest.mark.parametrize(("number", "group", "kind"), KINDS)
def test_an_arranged_matrix_has_the_entries_of_its_codes_bit_for_bit(number, group, kind):
    matrix = quantise(random_matrix(192, 512), number, group)
    held = arranged(matrix, kind)
    assert isinstance(held, kind)
    assert held.shape == matrix.shape
    assert held.nbytes == arranged_bytes(form_of(matrix, by_rows=kind is Int8Matrix), Room.FOUR_BITS)
    assert torch.equal(held.dense(), matrix.dense())
    assert torch.equal(held.rows(64, 128).dense(), matrix.dense()[64:128])
    residual = quantise(random_matrix(192, 512, seed=1), 2, 64)
    assert torch.equal(effective(held, residual, BF16), effective(matrix, residual, BF16))


@pytest.mark.parametrize("num_rows", [1, 3, 8, 40])
@pytest.mark.parametrize(("number", "group", "kind"), KINDS)
def test_a_coded_product_is_near_that_of_the_entries(number, group, kind, num_rows):
    held = arranged(quantise(random_matrix(192, 512), number, group), kind)
    # Far from zero on average, so that the halves count.
    hidden = (random_matrix(num_rows, 512, seed=2) + 0.5).to(BF16)
    product = multiply(hidden, held)
    assert product.dtype == BF16
    exact = hidden.double() @ held.dense().double().T
    sizes = (hidden.double().abs() @ held.dense().double().abs().T) / 512**0.5
    assert ((product.double() - exact).abs() <= CODED_TOLERANCE * (sizes + exact.abs())).all()


@needs_int4
@pytest.mark.parametrize("number", [1, 2, 3, 4, 5, 6])
@pytest.mark.parametrize("shape", [(64, 64), (64, 256), (128, 64)])
def test_the_smallest_matrices_are_multiplied_too(shape, number):
    held = arrange(quantise(random_matrix(*shape), number, 64), BF16, Room.FOUR_BITS, by_rows=True)
    hidden = random_matrix(3, shape[1], seed=2).to(BF16)
    exact = hidden.double() @ held.dense().double().T
    assert float((multiply(hidden, held).double() - exact).norm() / exact.norm()) < 2**-6


@needs_int4
@pytest.mark.parametrize("num_rows", [1, 5, 40])
@pytest.mark.parametrize("number", [3, 4, 6])
@pytest.mark.parametrize("residual", [quantise(random_matrix(192, 512, seed=3), 2, 64), LOW_RANK])
def test_a_sum_is_near_the_product_of_summed_entries(residual, number, num_rows):
    held = arrange(quantise(random_matrix(192, 512), number, 64), BF16, Room.FOUR_BITS, by_rows=True)
    added = residual if residual is LOW_RANK else arranged(residual, Int4Matrix)
    hidden = (random_matrix(num_rows, 512, seed=2) + 0.5).to(BF16)
    for pool in (held, held.dense(BF16)):
        product = multiply(hidden, Summed(pool, added))
        exact = hidden.double() @ (pool.double() if pool is not held else held.dense().double()).T
        exact += hidden.double() @ added.dense().double().T
        assert product.dtype == BF16
        assert float((product.double() - exact).norm() / exact.norm()) < 2**-7


@pytest.mark.parametrize("room", Room)
@pytest.mark.parametrize("by_rows", [False, True])
@pytest.mark.parametrize("number", [1, 2, 3, 4, 5, 6, 8])
def test_only_with_room_codes_take_more_bytes(number, by_rows, room):
    matrix = quantise(random_matrix(128, 128), number, None if number == 8 else 64)
    form, stored = form_of(matrix, by_rows=by_rows), matrix.nbytes
    held = arrange(copy_of(matrix), BF16, room, by_rows=by_rows)
    assert held.nbytes == arranged_bytes(form, room)
    if room == Room.NONE or (room == Room.SOME and by_rows):
        assert held.nbytes == stored
    elif room == Room.SOME and number < 8:
        # Scales of four bits come in pairs.
        assert held.nbytes <= stored + matrix.scales.nbytes


@pytest.mark.parametrize(
    ("number", "group", "dtype"),
    [
        (8, 64, BF16),
        (5, None, BF16),
        (4, 16, BF16),
        (4, None, BF16),
        (8, None, torch.float32),
        (4, 32, torch.float32),
    ],
)
def test_codes_without_a_product_stay_as_they_are(number, group, dtype):
    matrix = quantise(random_matrix(64, 96), number, group)
    assert arrange(matrix, dtype, Room.FOUR_BITS, by_rows=False) is matrix
    assert arranged_bytes(form_of(matrix, dtype), Room.FOUR_BITS) == matrix.nbytes


@needs_int4
def test_codes_of_a_shape_that_has_no_blocks_stay_as_they_are():
    for shape in ((96, 64), (64, 48), (40, 32)):
        matrix = quantise(random_matrix(*shape), 4, 32)
        assert arrange(matrix, BF16, Room.FOUR_BITS, by_rows=False) is matrix


@needs_blocks
@pytest.mark.parametrize("fill", [0, 255])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_the_largest_bytes_do_not_overflow(fill, sign):
    codes = torch.full((64, 4096), fill, dtype=torch.uint8)
    held = arrange(PackedMatrix(codes, torch.ones(64, 1).bfloat16(), 8, 4096), BF16, Room.SOME, by_rows=False)
    product = held.multiply(torch.full((2, 4096), sign * 3.0))
    assert torch.allclose(product, torch.tensor(sign * 3.0 * 4096 * (fill - 127.5)), rtol=1e-4)


@needs_blocks
def test_rows_of_zeros_and_rows_of_very_different_sizes_do_not_meet():
    held = arrange(quantise(random_matrix(64, 96), 8), BF16, Room.SOME, by_rows=False)
    hidden = random_matrix(3, 96) * torch.tensor([[1e-3], [0.0], [1e3]])
    exact = hidden @ held.dense().T
    product = held.multiply(hidden)
    assert product[1].abs().max() < 1e-30
    for row in (0, 2):
        torch.testing.assert_close(product[row], exact[row], atol=1e-3 * float(exact[row].std()), rtol=0)
