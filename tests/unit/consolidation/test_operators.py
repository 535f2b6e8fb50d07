"""How a pool expert is made from the experts it stands for."""

import pytest
import torch

from moemerge.consolidation.operators import OPERATORS, RACED, Cluster, Member
from moemerge.consolidation.operators.dare import dare
from moemerge.consolidation.operators.ties import elect, trim
from moemerge.models import Activation

D, F, S = 16, 24, 400


SHAPES = {"gate": (F, D), "up": (F, D), "down": (D, F), "down_bias": (D,)}


def draw_parts(seed, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return {part: torch.randn(shape, generator=generator).to(dtype) / 4 for part, shape in SHAPES.items()}


def sibling(parts, seed, distance=0.1):
    noise = draw_parts(seed)
    return {part: matrix + distance * noise[part] for part, matrix in parts.items()}


def member(parts, seed=0, weight=1.0, rows=S):
    generator = torch.Generator().manual_seed(100 + seed)
    # Inputs that differ in size from column to column, as hidden states do.
    inputs = torch.randn(rows, D, generator=generator) * torch.linspace(0.1, 2, D)
    gates = torch.rand(rows, generator=generator)
    return Member(parts, Activation.SILU_GATED_DOWN_BIAS, inputs, gates, weight)


def cluster(num=3, base=None, **options):
    base = base or draw_parts(0)
    members = [member(sibling(base, n + 1), n, **options) for n in range(num)]
    return Cluster(members, base)


def error(found, parts):
    difference = (
        found.own.output_SD - Member(parts, found.activation, found.inputs_SD, found.gates_S).own.output_SD
    )
    return float((difference.square().sum(dim=1) * found.gates_S.square()).mean())


@pytest.mark.parametrize("name", OPERATORS)
def test_every_operator_gives_all_parts_in_float32(name):
    made = OPERATORS[name].make(cluster())
    assert {part: matrix.shape for part, matrix in made.items()} == SHAPES
    assert all(matrix.dtype == torch.float32 and matrix.isfinite().all() for matrix in made.values())


@pytest.mark.parametrize("name", [n for n, operator in OPERATORS.items() if not operator.needs_base])
def test_one_expert_given_several_times_comes_back(name):
    parts = draw_parts(0)
    made = OPERATORS[name].make(Cluster([member(parts, n) for n in range(3)]))
    for part, matrix in made.items():
        torch.testing.assert_close(matrix, parts[part], atol=2e-3, rtol=2e-2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_mean_is_summed_in_float32_and_divided_once(dtype):
    experts = [draw_parts(n, dtype) for n in range(3)]
    made = OPERATORS["mean"].make(Cluster([member(parts) for parts in experts]))
    for part, matrix in made.items():
        assert torch.equal(matrix, sum(parts[part].float() for parts in experts) / 3)


@pytest.mark.parametrize("name", ["regmean", "refit"])
def test_operators_that_see_inputs_do_less_damage_than_the_mean(name):
    group = cluster()
    plain = OPERATORS["mean"].make(group)
    made = OPERATORS[name].make(group)
    assert sum(error(m, made) for m in group.members) < sum(error(m, plain) for m in group.members)


def test_medoid_is_the_member_that_hurts_least():
    group = cluster(4)
    made = OPERATORS["medoid"].make(group)
    costs = [sum(error(other, m.matrices) for other in group.members) for m in group.members]
    best = group.members[costs.index(min(costs))]
    assert all(torch.equal(made[part], best.matrices[part]) for part in made)


@pytest.mark.parametrize("name", RACED)
def test_without_inputs_averages_are_the_mean(name):
    group = cluster(rows=0)
    plain = OPERATORS["mean"].make(group)
    for part, matrix in OPERATORS[name].make(group).items():
        torch.testing.assert_close(matrix, plain[part], atol=1e-6, rtol=1e-5)


def test_regmean_of_disjoint_inputs_takes_each_column_from_who_uses_it():
    base = draw_parts(0)
    found = []
    for number in range(2):
        one = member(sibling(base, number + 1), number)
        inputs = one.inputs_SD.clone()
        inputs[:, (slice(0, D // 2), slice(D // 2, D))[1 - number]] = 0
        found.append(Member(one.parts, one.activation, inputs, one.gates_S))
    made = OPERATORS["regmean"].make(Cluster(found))["gate"]
    for number, columns in enumerate((slice(0, D // 2), slice(D // 2, D))):
        own = found[number].matrices["gate"][:, columns]
        other = found[1 - number].matrices["gate"][:, columns]
        assert (made[:, columns] - own).norm() < 0.2 * (made[:, columns] - other).norm()


@pytest.mark.parametrize("outside", [False, True], ids=["reference-inside", "reference-outside"])
def test_regmean_is_least_squares_whatever_differences_are_taken_to(outside):
    first, *others = cluster(4).members
    members = others if outside else [first, *others]
    made = OPERATORS["regmean"].make(Cluster(members, reference=first))
    for part in ("gate", "up", "down"):
        moments = [one.moments[part].blocks[0].double() for one in members]
        matrices = [one.matrices[part].double() for one in members]
        damping = 0.01 * sum(moments).diagonal().mean()
        target = sum(matrix @ moment for matrix, moment in zip(matrices, moments, strict=True))
        target += damping * sum(matrices) / len(matrices)
        whole = sum(moments) + damping * torch.eye(len(moments[0]))
        torch.testing.assert_close(
            made[part].double(), target @ torch.linalg.inv(whole), rtol=1e-4, atol=1e-6
        )


def test_trimming_keeps_the_largest_share():
    delta = torch.tensor([[0.1, -5.0], [3.0, 0.2]])
    assert torch.equal(trim(delta, 0.5), torch.tensor([[0.0, -5.0], [3.0, 0.0]]))


def test_election_averages_those_that_agree_with_the_sum():
    deltas = torch.tensor([[[2.0, 1.0, 0.0]], [[4.0, -3.0, 0.0]], [[-1.0, 0.0, 0.0]]])
    assert torch.equal(elect(deltas), torch.tensor([[3.0, -3.0, 0.0]]))


def test_dropping_follows_the_seed():
    base = draw_parts(0)
    members = [member(sibling(base, n + 1), n) for n in range(2)]
    one, same, other = (dare(Cluster(members, base, seed))["gate"] for seed in (1, 1, 2))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
