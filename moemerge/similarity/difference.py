"""How far two tensors of one shape are apart, added up piece by piece. Knows nothing of where they lie."""

import math

import torch
from torch import Tensor


class Difference:
    """Sums over the pieces that were compared so far.

    Attributes:
        is_equal: Whether all values are equal, NaN being equal to nothing.
    """

    def __init__(self) -> None:
        self.is_equal = True
        self._largest = 0.0
        self._squares = self._energy = 0.0

    def add(self, first: Tensor, second: Tensor) -> None:
        """Compare two pieces of the same number of values, at least one; half precision is widened first."""
        wide = torch.promote_types(torch.promote_types(first.dtype, second.dtype), torch.float32)
        reference = first.to(wide)
        apart = reference - second.to(wide)
        self.is_equal = self.is_equal and not apart.any()
        self._largest = max(self._largest, float(apart.abs().amax()))
        self._squares += float(apart.square().sum(dtype=torch.float64))
        self._energy += float(reference.square().sum(dtype=torch.float64))

    @property
    def relative(self) -> float | None:
        """L2 norm of the difference over that of the first tensor; None where that is no number."""
        if self._squares == 0:
            return 0.0
        relative = math.sqrt(self._squares / self._energy) if self._energy > 0 else math.inf
        return relative if math.isfinite(relative) else None

    @property
    def largest(self) -> float | None:
        """Largest absolute difference; None where a value is NaN or infinite."""
        return self._largest if math.isfinite(self._squares) else None
