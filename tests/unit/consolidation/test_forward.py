"""An expert on inputs, stopped before its last product."""

import pytest
import torch

from moemerge.consolidation.forward import run_expert
from moemerge.models import Activation, OneVariant
from moemerge.models.experts import ACTIVATIONS

D, F, S = 16, 24, 10
MATRICES = {"gate": (F, D), "up": (F, D), "down": (D, F)}
SHAPES = {
    Activation.SILU_GATED: MATRICES,
    Activation.SILU_GATED_DOWN_BIAS: MATRICES | {"down_bias": (D,)},
    Activation.CLAMPED_SWIGLU: MATRICES | {"gate_bias": (F,), "up_bias": (F,), "down_bias": (D,)},
    Activation.RELU: {"wi": (F, D), "wo": (D, F)},
}


@pytest.mark.parametrize("activation", Activation)
def test_output_is_that_of_the_whole_expert(activation):
    generator = torch.Generator().manual_seed(1)
    parts = {part: torch.randn(shape, generator=generator) for part, shape in SHAPES[activation].items()}
    inputs = torch.randn(S, D, generator=generator)
    found = run_expert(parts, activation, inputs)
    whole = ACTIVATIONS[activation](OneVariant(parts), "", inputs)
    assert found.output_SD.equal(whole)
    torch.testing.assert_close(found.output(slice(3)), whole[:3])
    assert found.inputs.keys() == {part for part, matrix in parts.items() if matrix.ndim == 2}
    assert all(given.shape == (S, parts[part].shape[1]) for part, given in found.inputs.items())
