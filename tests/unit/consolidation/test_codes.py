"""How codes are chosen: nearest, with feedback from inputs, and as thin factors."""

import pytest
import torch

from moemerge.consolidation.codes.low_rank import factorise
from moemerge.consolidation.codes.moments import (
    BLOCK_COLUMNS,
    add_moments,
    moment_of_matrix,
    moment_of_rows,
)
from moemerge.consolidation.codes.rounding import (
    choose_scale,
    restore_length,
    round_nearest,
    round_plainly,
    round_together,
    round_with_feedback,
)
from moemerge.models.packed import WIDTHS, spread, unpack

ROWS, COLUMNS, INPUTS = 24, 128, 600
WIDE = BLOCK_COLUMNS + 16


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def correlated(columns=COLUMNS, seed=1):
    """The moment of inputs that mostly lie in few directions, as hidden states do."""
    directions = draw(columns // 8, columns, seed=seed)
    inputs = draw(INPUTS, columns // 8, seed=seed + 1) @ directions + 0.3 * draw(
        INPUTS, columns, seed=seed + 2
    )
    return moment_of_rows(inputs, torch.rand(INPUTS, generator=torch.Generator().manual_seed(seed)))


@pytest.mark.parametrize("bits", sorted(WIDTHS))
@pytest.mark.parametrize("group", [32, 48, COLUMNS])
def test_nearest_codes_are_within_half_a_step_of_what_is_not_clipped(bits, group):
    matrix = draw(ROWS, COLUMNS)
    packed = round_nearest(matrix, bits, group)
    assert packed.scales.shape == (ROWS, -(-COLUMNS // group))
    step = spread(packed.scales, group, COLUMNS).expand(ROWS, COLUMNS)
    inside = matrix.abs() <= step * 2 ** (bits - 1)
    assert inside.float().mean() > 0.5
    assert ((packed.dense() - matrix).abs()[inside] <= step[inside] * 0.5001).all()
    outside = unpack(packed.codes, bits)[~inside]
    assert ((outside == 0) | (outside == 2**bits - 1)).all()


def test_more_bits_are_closer():
    matrix = draw(ROWS, COLUMNS)
    errors = [float((round_nearest(matrix, bits, 32).dense() - matrix).norm()) for bits in sorted(WIDTHS)]
    assert errors == sorted(errors, reverse=True)


def test_rows_of_zeros_stay_next_to_nothing():
    for bits in sorted(WIDTHS):
        assert float(round_nearest(torch.zeros(2, 16), bits, 16).dense().abs().max()) < 1e-20


def test_scale_follows_the_columns_that_matter():
    """One far entry makes a wide scale, unless an error there weighs nothing."""
    values = draw(32, 1)
    values[0, 0] = 100.0
    unimportant = torch.ones(32)
    unimportant[0] = 0
    assert choose_scale(values, 3, unimportant) < choose_scale(values, 3, torch.ones(32))


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("group", [32, COLUMNS])
def test_feedback_does_less_damage_on_correlated_inputs_than_the_nearest_codes(bits, group):
    matrix, moment = draw(ROWS, COLUMNS), correlated()
    near, fed = round_nearest(matrix, bits, group), round_with_feedback(matrix, bits, group, moment)
    assert moment.error(fed.dense() - matrix) < moment.error(near.dense() - matrix)
    assert (fed.bits, fed.group, fed.codes.shape) == (near.bits, near.group, near.codes.shape)
    assert fed.scales.shape == near.scales.shape


@pytest.mark.parametrize("group", [32, COLUMNS])
def test_matrices_of_the_same_inputs_get_the_codes_that_each_gets_alone(group):
    first, second, moment = draw(ROWS, COLUMNS), draw(ROWS // 2, COLUMNS, seed=9), correlated()
    for together, alone in zip(
        round_together([first, second], 4, group, moment),
        (round_with_feedback(first, 4, group, moment), round_with_feedback(second, 4, group, moment)),
        strict=True,
    ):
        assert torch.equal(together.codes, alone.codes)
        assert torch.equal(together.scales, alone.scales)


def test_feedback_is_that_of_one_column_after_the_other():
    """The rule as it stands in the paper: every later column changes at once."""
    matrix, moment = draw(ROWS, COLUMNS), correlated()
    (found,) = round_together([matrix], 4, COLUMNS, moment)
    (upper,) = (factor[0] for _, factor in moment.feedback)
    rest, scale = matrix.clone(), found.scales.float()
    for place in range(COLUMNS):
        column = rest[:, place : place + 1]
        code = ((column / scale).floor() + 8).clamp(0, 15)
        error = (column - (code - 7.5) * scale) / upper[place, place]
        rest[:, place + 1 :] -= error * upper[place, place + 1 :]
        same = unpack(found.codes, 4)[:, place : place + 1] == code
        assert same.float().mean() > 0.9, place


def test_rows_wider_than_a_block_of_inputs_have_one_scale():
    matrix, moment = draw(4, WIDE), correlated(WIDE)
    assert [len(block) for block in moment.blocks] == [BLOCK_COLUMNS, WIDE - BLOCK_COLUMNS]
    fed = round_with_feedback(matrix, 8, WIDE, moment)
    assert fed.scales.shape == (4, 1)
    assert fed.shape == (4, WIDE)
    near = round_nearest(matrix, 8, WIDE)
    assert moment.error(fed.dense() - matrix) < moment.error(near.dense() - matrix)


@pytest.mark.parametrize("group", [64, BLOCK_COLUMNS])
def test_groups_go_on_behind_a_block_of_inputs(group):
    fed = round_with_feedback(draw(4, WIDE), 4, group, correlated(WIDE))
    assert fed.scales.shape == (4, -(-WIDE // group))
    assert fed.dense().isfinite().all()


def test_without_inputs_codes_are_the_nearest():
    matrix, nothing = draw(ROWS, COLUMNS), moment_of_rows(torch.zeros(0, COLUMNS), torch.zeros(0))
    assert nothing.is_empty
    fed, near = round_with_feedback(matrix, 4, 32, nothing), round_nearest(matrix, 4, 32)
    assert torch.equal(fed.codes, near.codes)
    assert torch.equal(fed.scales, near.scales)


def test_columns_that_no_input_reaches_are_rounded_all_the_same():
    inputs = draw(INPUTS, COLUMNS)
    inputs[:, 32:64] = 0
    matrix = draw(ROWS, COLUMNS)
    fed = round_with_feedback(matrix, 8, 32, moment_of_rows(inputs, torch.ones(INPUTS))).dense()
    torch.testing.assert_close(fed[:, 32:64], matrix[:, 32:64], atol=0.05, rtol=0)


def test_factors_that_know_the_inputs_do_less_damage_than_those_that_do_not():
    matrix, moment = draw(ROWS, COLUMNS), correlated()
    for rank in (1, 4, 16):
        knowing, plain = factorise(matrix, rank, moment), factorise(matrix, rank)
        assert knowing.left.shape == (ROWS, rank)
        assert knowing.right.shape == (rank, COLUMNS)
        assert moment.error(knowing.dense() - matrix) < moment.error(plain.dense() - matrix)


@pytest.mark.parametrize("known", [False, True])
def test_factors_of_full_rank_are_the_matrix_up_to_bf16(known):
    matrix = draw(ROWS, COLUMNS)
    for rank in (ROWS, 10 * ROWS):
        found = factorise(matrix, rank, correlated() if known else None)
        assert found.left.shape == (ROWS, ROWS)
        assert float((found.dense() - matrix).norm() / matrix.norm()) < 2**-6


def test_moments_add_up_and_are_sums_over_inputs():
    inputs, weights = draw(INPUTS, WIDE), torch.linspace(0, 1, INPUTS)
    half = INPUTS // 2
    whole = moment_of_rows(inputs, weights)
    parts = [moment_of_rows(inputs[:half], weights[:half]), moment_of_rows(inputs[half:], weights[half:])]
    for one, other in zip(add_moments(parts).blocks, whole.blocks, strict=True):
        torch.testing.assert_close(one, other, atol=1e-3, rtol=1e-4)
    full = inputs.T @ (inputs * weights.unsqueeze(1))
    for one, other in zip(moment_of_matrix(full).blocks, whole.blocks, strict=True):
        torch.testing.assert_close(one, other, atol=1e-3, rtol=1e-4)
    torch.testing.assert_close(whole.diagonal(), full.diagonal(), atol=1e-3, rtol=1e-4)
    narrow = moment_of_rows(inputs[:, :16], weights)
    difference = draw(3, 16)
    expected = ((inputs[:, :16] @ difference.T).square() * weights.unsqueeze(1)).sum()
    assert narrow.error(difference) == pytest.approx(float(expected), rel=1e-4)


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
@pytest.mark.parametrize("moment", [correlated(), moment_of_rows(torch.zeros(2, COLUMNS), torch.zeros(2))])
@pytest.mark.parametrize("rows", [ROWS, 1500])
def test_restored_codes_hold_the_whole_length_of_their_matrix(rows, bits, moment):
    """Of many rows some decide for all."""
    matrix = draw(rows, COLUMNS)
    coded = round_with_feedback(matrix, bits, 32, moment)
    restored = restore_length(coded, matrix, moment)
    assert torch.equal(restored.codes, coded.codes)

    def held(packed):
        along, whole = moment.damped().inner(matrix, [packed.dense(), matrix])
        return along / whole

    assert held(coded) < 1
    # Scales are rounded to bf16; signs alone may ask for more than is allowed.
    assert held(restored) == pytest.approx(1, abs=0.01 if bits > 1 else 0.1)
    if bits < 4:
        assert held(restored) > held(coded)


def test_codes_that_have_nothing_of_their_matrix_are_left_alone():
    matrix = draw(ROWS, COLUMNS)
    coded = round_nearest(-matrix, 4, 32)
    assert restore_length(coded, matrix, correlated()) is coded


@pytest.mark.parametrize("group", [16, 64, 96])
def test_plain_rounding_keeps_the_largest_and_misses_by_half_a_step(group):
    matrix = torch.randn(6, 96, generator=torch.Generator().manual_seed(1))
    matrix[2] = 0
    found = round_plainly(matrix, 4, group)
    assert found.shape == matrix.shape
    for start in range(0, 96, group):
        own, rounded = matrix[:, start : start + group], found[:, start : start + group]
        step = own.abs().amax(dim=1, keepdim=True) / 7.5
        # Scales are stored in bfloat16.
        assert ((own - rounded).abs() <= step * (0.5 + 8 * 2**-8) + 1e-20).all()
        assert (rounded.div(step.clamp_min(1e-20)).abs() < 7.6).all()
