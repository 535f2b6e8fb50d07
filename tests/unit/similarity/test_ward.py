"""The Ward increment against the least-squares problem that it solves."""

import pytest
import torch

from moemerge.similarity.ward import ward_increment, ward_increment_diagonal


def draw(seed, tokens=40, width=5, rows=3):
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(tokens, width, generator=generator, dtype=torch.float64)
    return torch.randn(rows, width, generator=generator, dtype=torch.float64), inputs.T @ inputs


def cost(matrix, target, moment):
    difference = matrix - target
    return (difference @ moment @ difference.T).trace().item()


def test_it_is_what_the_best_common_matrix_costs_both():
    (a, moment_a), (b, moment_b) = draw(0), draw(1)
    best = (a @ moment_a + b @ moment_b) @ torch.linalg.inv(moment_a + moment_b)
    expected = cost(best, a, moment_a) + cost(best, b, moment_b)
    assert ward_increment(a, b, moment_a, moment_b) == pytest.approx(expected, rel=1e-4)


def test_it_is_symmetric_and_zero_for_equal_matrices():
    (a, moment_a), (b, moment_b) = draw(0), draw(1)
    there, back = ward_increment(a, b, moment_a, moment_b), ward_increment(b, a, moment_b, moment_a)
    assert there == pytest.approx(back)
    assert ward_increment(a, a, moment_a, moment_b) == 0.0


def test_directions_without_inputs_cost_nothing():
    (a, moment), (b, _) = draw(0), draw(1)
    nothing = torch.zeros_like(moment)
    assert ward_increment(a, b, moment, nothing) == pytest.approx(0.0, abs=1e-9)
    assert ward_increment(a, b, nothing, nothing) == 0.0
    one = torch.zeros_like(moment)
    one[2, 2] = 4.0
    # 4 * 4 / 8 on column 2 alone, though both moments are singular.
    expected = 2 * (a - b)[:, 2].square().sum().item()
    assert ward_increment(a, b, one, one) == pytest.approx(expected, rel=1e-4)


def test_diagonal_form_agrees_where_moments_are_diagonal():
    (a, moment_a), (b, moment_b) = draw(0), draw(1)
    first, second = moment_a.diagonal(), moment_b.diagonal()
    full = ward_increment(a, b, first.diag(), second.diag())
    assert ward_increment_diagonal(a, b, first, second) == pytest.approx(full, rel=1e-4)


def test_diagonal_form_by_hand():
    a, b = torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[0.0, 0.0, 0.0]])
    # Columns weigh 1*1/2, 2*6/8 and nothing.
    cost = ward_increment_diagonal(a, b, torch.tensor([1.0, 2.0, 5.0]), torch.tensor([1.0, 6.0, 0.0]))
    assert cost == pytest.approx(0.5 + 1.5 * 4)
    assert ward_increment_diagonal(a, b, torch.zeros(3), torch.zeros(3)) == 0.0
