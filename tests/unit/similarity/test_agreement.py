"""Signals for reports: their extremes, and what they must not depend on."""

import pytest
import torch

from moemerge.similarity import agreement
from moemerge.similarity.agreement import gate_agreement, linear_cka, neuron_identity


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_gates_agree_as_their_correlation_says():
    gates = torch.tensor([0.1, 0.2, 0.6])
    assert gate_agreement(gates, 3 * gates + 1) == pytest.approx(1.0)
    assert gate_agreement(gates, -gates) == pytest.approx(-1.0)
    assert gate_agreement(torch.tensor([0.0, 1.0, 0.0, 1.0]), torch.tensor([0.0, 0.0, 1.0, 1.0])) == 0.0
    assert gate_agreement(gates, torch.ones(3)) == 0.0


def test_alignment_sees_through_rotation_and_scale():
    outputs = draw(50, 4)
    rotation, _ = torch.linalg.qr(draw(4, 4, seed=1))
    assert linear_cka(outputs, 3 * outputs @ rotation + 7) == pytest.approx(1.0)
    assert linear_cka(outputs, draw(50, 4, seed=2)) < 0.3
    assert linear_cka(outputs, torch.zeros(50, 4)) == 0.0


@pytest.mark.parametrize("rows", [3, 1024])
def test_neurons_of_siblings_keep_their_places(rows, monkeypatch):
    monkeypatch.setattr(agreement, "_ROWS", rows)
    neurons = draw(32, 16)
    assert neuron_identity(neurons, neurons + 0.1 * draw(32, 16, seed=1)) == 1.0
    assert neuron_identity(neurons, neurons.roll(1, dims=0)) == 0.0
    half = torch.cat((neurons[:16], neurons[16:].roll(1, dims=0)))
    assert neuron_identity(neurons, half) == 0.5


def test_equal_neurons_are_in_their_places():
    assert neuron_identity(torch.ones(4, 2), torch.ones(4, 2)) == 1.0
    assert neuron_identity(torch.ones(0, 2), torch.ones(0, 2)) == 1.0
