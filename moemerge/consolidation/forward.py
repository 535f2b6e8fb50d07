"""One expert on sampled inputs, with a look at what each of its matrices is given.

Shapes: S inputs, D model width.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from moemerge.models import Activation, OneVariant
from moemerge.models.experts import ACTIVATIONS
from moemerge.similarity.replacement import gated_replacement_error

Parts = Mapping[str, Tensor]


@dataclass(frozen=True, slots=True)
class ExpertPass:
    """An expert on inputs.

    Attributes:
        output_SD: What it gives.
        inputs: What each part was multiplied with, [S, columns of the part].
    """

    output_SD: Tensor
    inputs: dict[str, Tensor]


class _Watched(OneVariant):
    """Weights that keep what they are multiplied with."""

    def __init__(self, parts: Parts) -> None:
        super().__init__(parts)
        self.inputs: dict[str, Tensor] = {}

    def linear(self, role: str, hidden_TD: Tensor) -> Tensor:
        self.inputs[role] = hidden_TD
        return super().linear(role, hidden_TD)


def run_expert(parts: Parts, activation: Activation, inputs_SD: Tensor) -> ExpertPass:
    """Compute an expert in the dtype of the inputs."""
    watched = _Watched(parts)
    return ExpertPass(ACTIVATIONS[activation](watched, "", inputs_SD), watched.inputs)


def replacement_error(
    parts: Parts, activation: Activation, inputs_SD: Tensor, gates_S: Tensor, own_SD: Tensor
) -> float:
    """`gated_replacement_error` of an expert with these parts.

    Args:
        parts: What would stand in the expert's place.
        activation: Form of both.
        inputs_SD: Inputs of the expert that is replaced.
        gates_S: What its outputs are multiplied with.
        own_SD: Its outputs.
    """
    if not len(inputs_SD):
        return 0.0
    return gated_replacement_error(gates_S, own_SD, run_expert(parts, activation, inputs_SD).output_SD)
