"""What an operator is given: experts that are to share one pool expert.

Shapes: S inputs, D model width.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moemerge.consolidation.cached import CachedProperty
from moemerge.consolidation.codes.moments import (
    Moment,
    add_part_moments,
    moment_of_matrix,
    moment_of_rows,
)
from moemerge.consolidation.forward import ExpertPass, run_expert
from moemerge.consolidation.operators.regression import RegressionMean, weighted
from moemerge.models import Activation


@dataclass(frozen=True)
class Member:
    """An expert of the cluster with calibration of its own variant.

    Attributes:
        parts: Matrices and biases by name, as stored.
        activation: Form of the expert.
        inputs_SD: Sampled inputs, float32.
        gates_S: Their gates.
        weight: What an error on one input counts, against other members.
        moment_DD: Mean of squared gate times `x x^T` over all inputs, of which `inputs_SD` are a sample;
            None when there are no others.
    """

    parts: Mapping[str, Tensor]
    activation: Activation
    inputs_SD: Tensor
    gates_S: Tensor
    weight: float = 1.0
    moment_DD: Tensor | None = None

    @CachedProperty
    def matrices(self) -> dict[str, Tensor]:
        """The parts in float32."""
        return {part: matrix.float() for part, matrix in self.parts.items()}

    @CachedProperty
    def own(self) -> ExpertPass:
        """The expert on its own inputs."""
        return run_expert(self.matrices, self.activation, self.inputs_SD)

    @CachedProperty
    def moments(self) -> dict[str, Moment]:
        """Second moment of what each matrix is multiplied with, weighted by squared gates and `weight`."""
        weights_S = self.gates_S.square() * (self.weight / max(1, len(self.gates_S)))
        moments: dict[int, Moment] = {}
        if self.moment_DD is not None:
            moments[id(self.inputs_SD)] = moment_of_matrix(self.moment_DD).scaled(self.weight)
        for inputs in self.own.inputs.values():
            # Parts that read the same input share its moment.
            if id(inputs) not in moments:
                moments[id(inputs)] = moment_of_rows(inputs, weights_S)
        return {part: moments[id(inputs)] for part, inputs in self.own.inputs.items()}

    def products(self, reference: "Member") -> dict[str, Tensor]:
        """What every matrix has beyond that of another expert, times the moment of its inputs; kept."""
        if id(reference) not in self._products:
            products = {
                part: weighted(self.matrices[part] - reference.matrices[part], moment)
                for part, moment in self.moments.items()
            }
            # With the reference, so that no other takes its id.
            self._products[id(reference)] = reference, products
        return self._products[id(reference)][1]

    @CachedProperty
    def _products(self) -> dict[int, tuple["Member", dict[str, Tensor]]]:
        return {}


@dataclass(frozen=True)
class Cluster:
    """Experts that are to share one pool expert.

    Attributes:
        members: At least one.
        base: Parts of the base's expert in that slot, when there is a base.
        seed: For operators that draw.
        reference: An expert close to the members, one of them or not, the same for clusters that have
            members in common: what is computed of them is computed of their differences to it. The first
            member by default.
    """

    members: Sequence[Member]
    base: Mapping[str, Tensor] | None = None
    seed: int = 0
    reference: Member | None = None

    @property
    def parts(self) -> list[str]:
        """Names of the matrices and biases."""
        return list(self.members[0].parts)

    def stack(self, part: str) -> list[Tensor]:
        """A matrix of every member, float32."""
        return [member.matrices[part] for member in self.members]

    @CachedProperty
    def regression_means(self) -> dict[str, Tensor]:
        """By part; see `operators.regmean`. Biases, which no input multiplies, are averaged."""
        totals = add_part_moments([member.moments for member in self.members])
        means = {id(total): RegressionMean(total) for total in totals.values()}
        reference = self.reference or self.members[0]
        products = [member.products(reference) for member in self.members if member is not reference]
        return {
            part: means[id(totals[part])].of(
                reference.matrices[part], self.stack(part), [product[part] for product in products]
            )
            if part in totals
            else torch.stack(self.stack(part)).mean(dim=0)
            for part in self.parts
        }

    def deltas(self, part: str) -> tuple[Tensor, list[Tensor]]:
        """The base's matrix, and what every member adds to it, float32."""
        assert self.base is not None
        base = self.base[part].float()
        return base, [matrix - base for matrix in self.stack(part)]
