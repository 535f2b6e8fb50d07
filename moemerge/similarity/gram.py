"""Inner products of all experts of a layer, the source of every weight distance.

Siblings differ by a tenth of their norm or much less, and a distance taken as `|a|^2 + |b|^2 - 2ab`
drowns in rounding when they differ little. So each expert is stored as its difference from the
expert that a reference model has in the same slot; experts of one slot then never cancel.

Shapes: V variants, E slots, N = V * E experts in order (variant, slot), C columns of a block.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Matrix = NDArray[np.float64]

# 24 experts of this many float32 columns take 1.5 MiB; larger and smaller blocks measured slower.
BLOCK_COLUMNS = 16384


class GramAccumulator:
    """Adds up inner products over blocks of columns; one per thread, its buffer is reused.

    Products within a block are float32, sums over blocks float64.
    """

    def __init__(self, num_models: int, num_slots: int) -> None:
        self._shape = (num_models, num_slots)
        self._buffer = torch.empty(num_models * num_slots, BLOCK_COLUMNS)
        self._sum = torch.zeros(num_models * num_slots, num_models * num_slots, dtype=torch.float64)

    def add(self, weights_NC: Tensor) -> None:
        """Add columns of all experts, reference model first, any floating dtype."""
        for start in range(0, weights_NC.shape[1], BLOCK_COLUMNS):
            part = weights_NC[:, start : start + BLOCK_COLUMNS]
            block = self._buffer[:, : part.shape[1]]
            block.copy_(part)
            centred = block.view(*self._shape, part.shape[1])
            centred[1:] -= centred[:1]
            self._sum += block @ block.T

    def take_total(self) -> Matrix:
        """What has been added up, [N, N]; the sum begins anew."""
        result: Matrix = self._sum.numpy().copy()
        self._sum.zero_()
        return result


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertGram:
    """Inner products of a layer's experts relative to their slot's reference expert.

    Attributes:
        centred: [N, N] float64; the first E rows are the reference model's experts themselves, the
            others differences from them.
        num_slots: E.
        has_base: Whether the reference is a base model and not one of the variants; then its rows
            are left out of every distance matrix.
    """

    centred: Matrix
    num_slots: int
    has_base: bool

    @property
    def num_experts(self) -> int:
        """Experts compared, without the base."""
        return len(self.centred) - (self.num_slots if self.has_base else 0)

    def inner_products(self) -> Matrix:
        """`<W_i, W_j>` of the experts themselves, [N, N]."""
        spread = self._to_weights()
        products = self._variants_only(spread @ self.centred @ spread.T)
        # The product of three matrices is symmetric up to rounding only.
        return (products + products.T) / 2

    def squared_distances(self) -> Matrix:
        """`|W_i - W_j|^2`, [N, N], accurate for experts of one slot however close they are."""
        plain = _distances_from_products(self.inner_products())
        difference = self.centred.copy()
        difference[: self.num_slots] = 0
        difference[:, : self.num_slots] = 0
        same_slot_distances = self._variants_only(_distances_from_products(difference))
        slots = np.arange(self.num_experts) % self.num_slots
        return np.where(slots[:, None] == slots[None, :], same_slot_distances, plain)

    def delta_products(self) -> Matrix:
        """`<W_i - base_i, W_j - base_j>`, [N, N].

        Raises:
            ValueError: The reference is not a base.
        """
        if not self.has_base:
            raise ValueError("distances of deltas need a base")
        return self.centred[self.num_slots :, self.num_slots :]

    def _to_weights(self) -> Matrix:
        """Linear map from reference experts and differences to experts."""
        result = np.eye(len(self.centred))
        for row in range(self.num_slots, len(self.centred)):
            result[row, row % self.num_slots] = 1
        return result

    def _variants_only(self, matrix: Matrix) -> Matrix:
        first = self.num_slots if self.has_base else 0
        return matrix[first:, first:]


def gram_of(models: Sequence[Sequence[Tensor]], *, has_base: bool) -> ExpertGram:
    """The Gram of experts held in memory; the specification of the streamed one.

    Args:
        models: For each model, the reference first, one tensor per slot, all of one shape.
        has_base: See `ExpertGram`.
    """
    rows = torch.stack([expert.double().flatten() for model in models for expert in model])
    num_slots = len(models[0])
    centred = rows.view(len(models), num_slots, -1).clone()
    centred[1:] -= centred[:1].clone()
    flat = centred.flatten(0, 1)
    return ExpertGram(centred=(flat @ flat.T).numpy(), num_slots=num_slots, has_base=has_base)


def _distances_from_products(products: Matrix) -> Matrix:
    norms = np.diag(products)
    squared: Matrix = np.maximum(norms[:, None] + norms[None, :] - 2 * products, 0)
    np.fill_diagonal(squared, 0)
    return squared
