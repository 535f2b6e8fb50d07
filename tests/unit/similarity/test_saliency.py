"""Saliency by hand, and which experts are super."""

import pytest
import torch

from moemerge.similarity.saliency import find_super_experts, saliency


def test_saliency_is_the_mean_of_gate_times_norm():
    assert saliency(torch.tensor([0.5, 1.0]), torch.tensor([[3.0, 4.0], [0.0, 2.0]])) == pytest.approx(2.25)
    assert saliency(torch.zeros(0), torch.zeros(0, 2)) == 0.0


def test_few_experts_with_extreme_outputs_are_super():
    maxima = [[1.0] * 64 for _ in range(16)]
    maxima[1][3], maxima[2][5] = 500.0, 300.0
    assert find_super_experts(maxima) == [(1, 3), (2, 5)]


def test_experts_far_below_the_largest_are_not_super():
    maxima = [[1.0] * 64 for _ in range(16)]
    maxima[1][3], maxima[2][5] = 500.0, 40.0
    assert find_super_experts(maxima) == [(1, 3)]


def test_experts_alike_are_not_super():
    assert find_super_experts([[2.0, 2.0], [2.0, 2.0]]) == []
    assert find_super_experts([]) == []
