"""Codes in bytes and back: each width, each group, and the sum of pool expert and residual."""

import pytest
import torch

from moemerge.models.packed import (
    WIDTHS,
    LowRank,
    PackedMatrix,
    code_bytes,
    effective,
    fill_effective,
    pack_codes,
    unpack,
)
from tests.coded import bits, code, low_rank, quantise, random_matrix


def random_codes(number, num_rows=5, num_columns=24, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 2**number, (num_rows, num_columns), generator=generator, dtype=torch.uint8)


@pytest.mark.parametrize("number", WIDTHS)
def test_codes_survive_packing(number):
    codes = random_codes(number)
    packed = pack_codes(codes, number)
    assert packed.shape == (5, code_bytes(number, 24)) == (5, 24 * number // 8)
    assert torch.equal(unpack(packed, number), codes)


@pytest.mark.parametrize("number", WIDTHS)
@pytest.mark.parametrize("group", [1, 8, 16, 20, 24])
def test_entries_are_code_less_the_middle_times_the_scale_of_their_group(number, group):
    codes = random_codes(number)
    scales = (random_matrix(5, -(-24 // group)).abs() + 0.1).bfloat16()
    matrix = PackedMatrix(pack_codes(codes, number), scales, number, group)
    assert matrix.shape == (5, 24)
    assert matrix.nbytes == 5 * 24 * number // 8 + 2 * scales.numel()
    dense = matrix.dense()
    for row in range(5):
        for column in range(24):
            entry = (int(codes[row, column]) - 2 ** (number - 1) + 0.5) * float(scales[row, column // group])
            assert float(dense[row, column]) == torch.tensor(entry, dtype=torch.float32)
    assert torch.equal(matrix.dense(torch.bfloat16), dense.bfloat16())


def test_a_bit_is_a_sign():
    matrix = quantise(torch.tensor([[2.0, -2.0, 2.0, 2.0, -2.0, -2.0, 2.0, -2.0]]), 1)
    assert matrix.dense().tolist() == [[2.0, -2.0, 2.0, 2.0, -2.0, -2.0, 2.0, -2.0]]


@pytest.mark.parametrize("spec", [bits(3, 12), bits(8), low_rank(2)])
def test_rows_are_those_of_the_whole(spec):
    matrix = code(random_matrix(130, 32), spec)
    assert torch.equal(matrix.rows(64, 130).dense(), matrix.dense()[64:])


@pytest.mark.parametrize("residual", [None, bits(1, 32), bits(3, 8), low_rank(2)])
@pytest.mark.parametrize("pool", [None, bits(4, 32), bits(8)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_effective_expert_is_the_sum_rounded_once(pool, residual, dtype):
    # More rows than a stretch has, so that stretches have to meet.
    base, own = random_matrix(4200, 64), random_matrix(4200, 64, seed=1)
    stored = code(base, pool) if pool else base.bfloat16()
    added = code(own - base, residual) if residual else None
    expected = stored.float() if pool is None else stored.dense()
    if added is not None:
        expected = expected + added.dense()
    result = effective(stored, added, dtype)
    assert result.dtype == dtype
    torch.testing.assert_close(result, expected.to(dtype), atol=1e-6, rtol=1e-2 * (dtype == torch.bfloat16))
    if not isinstance(added, LowRank):  # whose rows a product may add up in another order
        assert torch.equal(result, expected.to(dtype))
    target = torch.empty(4200, 64)
    fill_effective(target, stored, added, dtype)
    assert torch.equal(target, result.float()), "rounded to its own dtype, whatever it is written to"
