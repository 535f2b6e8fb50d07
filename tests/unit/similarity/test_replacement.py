"""The cost of replacing an expert, by hand and by its laws."""

import pytest
import torch

from moemerge.similarity.replacement import (
    gated_replacement_error,
    relative_replacement_error,
    replacement_error_of,
)

GATES = torch.tensor([0.5, 1.0])
OUTPUTS = torch.tensor([[1.0, 2.0], [3.0, 0.0]])
OTHER = torch.tensor([[1.0, 0.0], [0.0, 4.0]])


def test_error_by_hand():
    # (0.25 * 4 + 1 * 25) / 2, and over (0.25 * 5 + 9) / 2
    assert gated_replacement_error(GATES, OUTPUTS, OTHER) == pytest.approx(13.0)
    assert relative_replacement_error(GATES, OUTPUTS, OTHER) == pytest.approx(26 / 10.25)


def test_equal_experts_cost_nothing_and_silence_costs_everything():
    assert gated_replacement_error(GATES, OUTPUTS, OUTPUTS) == 0.0
    assert relative_replacement_error(GATES, OUTPUTS, torch.zeros_like(OUTPUTS)) == 1.0


def test_no_tokens_cost_nothing():
    none = torch.zeros(0, 2)
    assert gated_replacement_error(torch.zeros(0), none, none) == 0.0
    assert relative_replacement_error(torch.zeros(0), none, none) == 0.0
    assert replacement_error_of(torch.sin, torch.cos, none, torch.zeros(0)) == 0.0


@pytest.mark.parametrize("rows", [1, 3, 100])
def test_experts_are_computed_in_pieces(rows):
    generator = torch.Generator().manual_seed(0)
    inputs, gates = torch.randn(10, 4, generator=generator), torch.rand(10, generator=generator)
    expected = gated_replacement_error(gates, inputs.sin(), inputs.cos())
    assert replacement_error_of(torch.sin, torch.cos, inputs, gates, rows) == pytest.approx(expected)
