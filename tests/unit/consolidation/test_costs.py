"""What sharing and codes cost, measured on an expert's own inputs."""

from dataclasses import replace

import pytest
import torch

from moemerge.consolidation.codes.moments import add_part_moments
from moemerge.consolidation.costs import Shared, race, slot_costs
from moemerge.consolidation.factors import Factors, measure_factors
from moemerge.consolidation.ladder import code_size, encode, encode_residual, ladder_of
from moemerge.consolidation.operators import OPERATORS, RACED, Member
from moemerge.consolidation.slot import Slot, probe
from moemerge.models import Activation

D, F, S = 32, 48, 200
SHAPES = {"gate": (F, D), "up": (F, D), "down": (D, F)}
LADDER = ladder_of(SHAPES)
PLAIN_BYTES = 2 * sum(rows * columns for rows, columns in SHAPES.values())


def draw_parts(seed):
    generator = torch.Generator().manual_seed(seed)
    return {part: torch.randn(shape, generator=generator) / 6 for part, shape in SHAPES.items()}


def member(parts, seed, rows=S, directions=D // 4):
    generator = torch.Generator().manual_seed(100 + seed)
    # Most of an input lies in a few directions, as in hidden states.
    basis = torch.randn(directions, D, generator=torch.Generator().manual_seed(7))
    inputs = torch.randn(rows, directions, generator=generator) @ basis / directions**0.5
    inputs += 0.6 / directions**0.5 * torch.randn(rows, D, generator=generator)
    return Member(parts, Activation.SILU_GATED, inputs, torch.rand(rows, generator=generator))


def slot(num=2, distance=0.1, rows=S):
    base = draw_parts(0)
    experts = [
        {part: matrix + distance * draw_parts(number + 1)[part] for part, matrix in base.items()}
        for number in range(num)
    ]
    members = [member(parts, number, rows) for number, parts in enumerate(experts)]
    judges = [member(parts, 50 + number, rows) for number, parts in enumerate(experts)]
    return Slot(members, judges, [0.5] * num, [])


@pytest.fixture(scope="module")
def both():
    return measure_factors(slot(), LADDER)


@pytest.fixture(params=[0, 1])
def factors(both, request):
    return both[request.param]


def test_every_code_has_its_factors(factors):
    assert factors.own.keys() == factors.pool.keys() == LADDER.pool.keys()
    residuals = [name for name in LADDER.residuals if name != "none"]
    assert list(factors.of_sharing) == list(factors.of_rounding) == residuals
    assert factors.own["plain"] == factors.pool["plain"] == 0


def test_fewer_bits_cost_more(factors):
    codes = ["plain", "8-bit", "6-bit", "5-bit", "4-bit", "3-bit"]
    for found in (factors.own, factors.pool):
        assert [found[name] for name in codes] == sorted(found.values())
    for found in (factors.of_sharing, factors.of_rounding):
        left = [found[f"{bits}-bit"] for bits in (1, 2, 3, 4)]
        assert left == sorted(left, reverse=True)
        # One bit of what rounding has left over may be no better than none.
        assert left[1] < 0.5
    assert factors.of_sharing["1-bit"] < 0.5


@pytest.mark.parametrize(("pool", "residual"), [("5-bit", "1-bit"), ("3-bit", "3-bit"), ("6-bit", "rank-4")])
@pytest.mark.parametrize("number", [0, 1])
def test_damage_is_foretold_for_codes_that_were_not_measured(both, number, pool, residual):
    given = slot()
    centre = OPERATORS["mean"].make(given.cluster((0, 1)))
    sums = add_part_moments([one.moments for one in given.members])
    stored = {p: m.dense() for p, m in encode(centre, LADDER.pool[pool], sums).items()}
    missing = {part: given.members[number].matrices[part] - stored[part] for part in stored}
    added = encode_residual(missing, LADDER.residuals[residual], given.members[number].moments)
    measured = given.damage(number, {part: stored[part] + added[part].dense() for part in stored})
    shared = {(0, 1): Shared("mean", {n: given.damage(n, centre) for n in (0, 1)})}
    probes = [probe(given, n) for n in (0, 1)]
    costs = slot_costs([[(0, 1)]], shared, probes, [1, 1], both, LADDER, SHAPES, PLAIN_BYTES)
    assert costs.partitions[0][0].damage[number][pool, residual] == pytest.approx(measured, rel=0.5)


def test_codes_spare_a_variant_whose_inputs_take_few_directions(both):
    """What they do is measured for each variant, not for the slot."""
    given = slot()
    narrow = member(given.members[1].matrices, 1, S, directions=2)
    judge = member(given.members[1].matrices, 51, S, directions=2)
    changed = replace(given, members=[given.members[0], narrow], judges=[given.judges[0], judge])
    found = measure_factors(changed, LADDER)
    assert found[1].own["4-bit"] < 0.8 * both[1].own["4-bit"]
    assert found[1].of_sharing["1-bit"] < both[1].of_sharing["1-bit"]


def test_feedback_makes_four_bits_cheaper_than_plain_rounding(factors):
    assert factors.own["4-bit"] < 1


def test_race_is_won_by_the_operator_of_least_damage():
    given = slot(3, rows=100)
    found = race(given, (0, 2), RACED)
    sums = {
        name: sum(given.damage(n, OPERATORS[name].make(given.cluster((0, 2)))) for n in (0, 2))
        for name in RACED
    }
    assert sums[found.operator] == min(sums.values())
    assert found.damage.keys() == {0, 2}
    assert sum(found.damage.values()) == pytest.approx(sums[found.operator])


def test_equal_experts_lose_nothing_by_sharing():
    found = race(slot(2, distance=0), (0, 1), ["mean"])
    assert max(found.damage.values()) < 1e-10


def test_damage_is_the_gated_error_times_the_factor():
    given = slot()
    other = given.members[1].matrices
    judge = given.judges[0]
    error = (
        Member(other, judge.activation, judge.inputs_SD, judge.gates_S).own.output_SD - judge.own.output_SD
    )
    expected = 0.5 * float((error.square().sum(dim=1) * judge.gates_S.square()).mean())
    assert given.damage(0, other) == pytest.approx(expected, rel=1e-5)
    assert given.damage(0, given.members[0].matrices) == 0


def test_expert_without_inputs_has_no_damage():
    given = slot(rows=0)
    assert probe(given, 0) == 0
    assert set(race(given, (0, 1), RACED).damage.values()) == {0.0}


def test_costs_of_a_slot_are_put_together_from_what_was_measured():
    factors = Factors(
        dict.fromkeys(LADDER.pool, 0.5),
        dict.fromkeys(LADDER.pool, 0.25),
        {name: 0.1 for name in LADDER.residuals if name != "none"},
        {name: 0.2 for name in LADDER.residuals if name != "none"},
    )
    shared = {(0, 1): Shared("mean", {0: 3.0, 1: 5.0})}
    found = slot_costs(
        [[(0,), (1,)], [(0, 1)]], shared, [1.0, 2.0], [1, 3], [factors] * 2, LADDER, SHAPES, PLAIN_BYTES
    )
    (first, second), (both,) = found.partitions
    assert second.damage == {1: {(name, "none"): 1.0 for name in LADDER.pool}}
    assert first.pool_bytes == {
        name: code_size(code, SHAPES, PLAIN_BYTES) for name, code in LADDER.pool.items()
    }
    assert both.pool_bytes["plain"] == PLAIN_BYTES
    assert both.residual_bytes["none"] == 0
    assert both.copies == {0: 1, 1: 3}
    assert both.damage[1]["4-bit", "none"] == 5.5
    assert both.damage[1]["4-bit", "2-bit"] == pytest.approx(0.1 * 5 + 0.2 * 0.5)
