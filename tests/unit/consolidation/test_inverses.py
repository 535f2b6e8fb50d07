"""Inverses by halves against those of LAPACK in float64."""

import pytest
import torch

from moemerge.consolidation.inverses import inverse, upper_root_of_inverse


def draw(size, spread):
    generator = torch.Generator().manual_seed(size)
    inputs = torch.randn(2 * size, size, generator=generator) * torch.logspace(0, -spread, size)
    moment = inputs.T @ inputs / len(inputs)
    return moment + torch.eye(size) * (0.01 * float(moment.diagonal().mean()))


@pytest.mark.parametrize("size", [1, 3, 128, 129, 300, 512])
@pytest.mark.parametrize("spread", [0, 3], ids=["alike", "few directions"])
def test_inverse_and_its_root_are_those_of_lapack(size, spread):
    matrix = draw(size, spread)
    exact = torch.linalg.inv(matrix.double())
    found, root = inverse(matrix).double(), upper_root_of_inverse(matrix).double()
    assert (found - exact).norm() < 1e-4 * exact.norm()
    assert (root.T @ root - exact).norm() < 1e-4 * exact.norm()
    assert torch.equal(root, root.triu())
    assert (root.diagonal() > 0).all()


def test_one_direction_far_above_the_others_costs_few_digits():
    """Hidden states have some channels of a thousand times the others' size."""
    matrix = draw(512, 0)
    channel = torch.zeros(512)
    channel[[7, 300]] = 300.0
    matrix += torch.outer(channel, channel)
    exact = torch.linalg.inv(matrix.double())
    plain = torch.cholesky_inverse(torch.linalg.cholesky(matrix)).double()
    found, root = inverse(matrix).double(), upper_root_of_inverse(matrix).double()
    most = max(float((plain - exact).norm()), 1e-6 * float(exact.norm()))
    assert (found - exact).norm() < 10 * most
    assert (root.T @ root - exact).norm() < 10 * most


@pytest.mark.parametrize("size", [5, 300])
def test_what_is_not_positive_definite_is_refused(size):
    matrix = draw(size, 0)
    matrix[-1, -1] = -1.0
    for function in (inverse, upper_root_of_inverse):
        with pytest.raises(torch.linalg.LinAlgError):
            function(matrix)
