"""One expert on sampled inputs, with a look at what each of its matrices is given.

Shapes: S inputs, D model width.
"""

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass

from torch import Tensor

from moemerge.consolidation.cached import CachedProperty
from moemerge.models import Activation, OneVariant
from moemerge.models.experts import ACTIVATIONS
from moemerge.similarity.replacement import gated_replacement_error

Parts = Mapping[str, Tensor]


@dataclass(frozen=True)
class ExpertPass:
    """An expert on inputs; what its last matrix gives is computed when it is asked for.

    Attributes:
        weights: Its parts.
        inputs: What each matrix is multiplied with, [S, columns of the matrix], the last one at the end.
    """

    weights: OneVariant
    inputs: dict[str, Tensor]

    @property
    def last(self) -> str:
        """Name of the last matrix."""
        return next(reversed(self.inputs))

    @CachedProperty
    def output_SD(self) -> Tensor:
        """What the expert gives."""
        return self.output(slice(None))

    def output(self, some: slice) -> Tensor:
        """What it gives for some of the inputs."""
        output_SD = self.weights.linear(self.last, self.inputs[self.last][some])
        bias = f"{self.last}_bias"
        return self.weights.add(bias, output_SD) if bias in self.weights else output_SD


class _AtLastMatrix(Exception):
    """Nothing but the last product is left to do."""


class _Watched(OneVariant):
    """Weights that keep what they are multiplied with, and stop before the last product."""

    def __init__(self, parts: Parts) -> None:
        super().__init__(parts)
        self.inputs: dict[str, Tensor] = {}
        self._last = [part for part, matrix in parts.items() if matrix.ndim == 2][-1]

    def linear(self, role: str, hidden_TD: Tensor) -> Tensor:
        self.inputs[role] = hidden_TD
        if role == self._last:
            raise _AtLastMatrix
        return super().linear(role, hidden_TD)


def run_expert(parts: Parts, activation: Activation, inputs_SD: Tensor) -> ExpertPass:
    """Compute an expert in the dtype of the inputs."""
    watched = _Watched(parts)
    with suppress(_AtLastMatrix):
        ACTIVATIONS[activation](watched, "", inputs_SD)
    return ExpertPass(OneVariant(parts), watched.inputs)


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
