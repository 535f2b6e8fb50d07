"""Intervals by the bootstrap: how much a mean would vary with other windows or rows of the same text.

Every variant's passages are drawn with replacement, and the mean over its draws is averaged over variants.
Draws depend on the seed and on the numbers of passages alone, so that two methods measured on the same
passages are compared draw by draw.

Shapes: R draws, n passages of a variant.

Source: Efron 1979, bootstrap methods; percentile intervals, paired for differences.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

LEVEL = 0.95
NUM_DRAWS = 2000
_ENTRIES = 2**22
"""Drawn numbers that are held at a time."""

Values = Mapping[str, Sequence[float]]
"""A value for every passage, by variant."""


class Interval(NamedTuple):
    """Ends of an interval."""

    low: float
    high: float


def mean_of(values: Values) -> float:
    """Mean over variants of the mean over passages."""
    return float(np.mean([np.mean(own) for own in values.values()]))


def interval_of(values: Values, *, seed: int = 0, num_draws: int = NUM_DRAWS) -> Interval:
    """Where `mean_of` lies with a probability of `LEVEL`."""
    return _percentiles(draw_means(values, seed=seed, num_draws=num_draws))


def interval_of_difference(
    values: Values, others: Values, *, seed: int = 0, num_draws: int = NUM_DRAWS
) -> Interval:
    """Where `mean_of(values) - mean_of(others)` lies, both on the same passages in every draw."""
    pairs = {name: np.subtract(own, others[name]) for name, own in values.items()}
    return _percentiles(draw_means(pairs, seed=seed, num_draws=num_draws))


def draw_means(values: Mapping[str, Sequence[float]], *, seed: int, num_draws: int) -> NDArray[np.float64]:
    """[R] `mean_of` of the passages of each draw."""
    generator = np.random.default_rng(seed)
    total_R = np.zeros(num_draws)
    for own in values.values():
        value_n = np.asarray(own, dtype=np.float64)
        at_once = max(1, _ENTRIES // len(value_n))
        for start in range(0, num_draws, at_once):
            size = (min(at_once, num_draws - start), len(value_n))
            chosen_Rn = generator.integers(0, len(value_n), size=size)
            total_R[start : start + size[0]] += value_n[chosen_Rn].mean(axis=1)
    return total_R / len(values)


def _percentiles(mean_R: NDArray[np.float64]) -> Interval:
    tail = 100 * (1 - LEVEL) / 2
    low, high = np.percentile(mean_R, [tail, 100 - tail])
    return Interval(float(low), float(high))
