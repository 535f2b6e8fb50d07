"""Laws of codes: they survive packing, keep to their error, and give the same numbers wherever they lie."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from moemerge.bundle.manifest import CodeSpec
from moemerge.models.packed import (
    WIDTHS,
    PackedMatrix,
    code_bytes,
    effective,
    fill_effective,
    pack_codes,
    unpack,
)
from tests.coded import code, low_rank, random_matrix

numbers = st.sampled_from(sorted(WIDTHS))
shapes = st.tuples(st.integers(1, 9), st.integers(1, 9).map(lambda n: 8 * n))


@st.composite
def specs(draw, kinds=("bits", "low_rank")):
    if draw(st.sampled_from(kinds)) == "low_rank":
        return low_rank(draw(st.integers(1, 3)))
    return CodeSpec(kind="bits", bits=draw(numbers), group=draw(st.none() | st.integers(1, 80)))


@given(numbers, shapes, st.integers(0, 99))
def test_codes_survive_packing(number, shape, seed):
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**number, shape, generator=generator, dtype=torch.uint8)
    packed = pack_codes(codes, number)
    assert packed.shape == (shape[0], code_bytes(number, shape[1]))
    assert torch.equal(unpack(packed, number), codes)


@given(numbers, shapes, st.integers(0, 99))
def test_no_two_matrices_of_codes_have_the_same_bytes(number, shape, seed):
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**number, shape, generator=generator, dtype=torch.uint8)
    place = (seed % shape[0], seed % shape[1])
    other = codes.clone()
    other[place] ^= 1 << (seed % number)
    differing = pack_codes(codes, number) ^ pack_codes(other, number)
    assert sum(int(byte).bit_count() for byte in differing.flatten().tolist()) == 1


@given(specs(kinds=("bits",)), shapes, st.integers(0, 99))
def test_the_nearest_code_is_within_half_a_step(spec, shape, seed):
    matrix = random_matrix(*shape, seed=seed)
    packed = code(matrix, spec)
    step = packed.scales.float().repeat_interleave(packed.group, dim=1)[:, : shape[1]]
    # Scales are rounded to bf16, which moves the largest codes by 2^-9 of them.
    largest = (2 ** (spec.bits - 1)) * step
    assert ((packed.dense() - matrix).abs() <= step / 2 + largest * 2**-8).all()
    assert packed.nbytes == spec.part_bytes(*shape)


@given(specs(kinds=("bits",)), shapes, st.integers(0, 99))
def test_a_matrix_turned_round_has_all_entries_turned_round(spec, shape, seed):
    """Codes lie evenly about zero: no code stands for a number without its negative."""
    packed = code(random_matrix(*shape, seed=seed), spec)
    mirrored = pack_codes(2**spec.bits - 1 - unpack(packed.codes, spec.bits), spec.bits)
    turned = PackedMatrix(mirrored, packed.scales, packed.bits, packed.group)
    assert torch.equal(turned.dense(), -packed.dense())


@given(st.none() | specs(kinds=("bits",)), st.none() | specs(), shapes, st.integers(0, 99))
def test_an_effective_expert_is_the_same_however_it_is_asked_for(pool, residual, shape, seed):
    base = random_matrix(*shape, seed=seed)
    stored = code(base, pool) if pool else base
    added = code(random_matrix(*shape, seed=seed + 1), residual) if residual else None
    once = effective(stored, added, torch.bfloat16)
    target = torch.full(shape, float("nan"))
    fill_effective(target, stored, added, torch.bfloat16)
    assert torch.equal(target, once.float())
    expected = stored.float() if pool is None else stored.dense()
    if added is not None:
        expected = expected + added.dense()
    torch.testing.assert_close(once.float(), expected, atol=1e-6, rtol=2**-8)
