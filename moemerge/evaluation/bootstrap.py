"""Intervals by the bootstrap: how much a share would vary with other windows or rows of the same texts.

A share is a ratio of two means over a variant's passages, averaged over variants. In every draw each
variant's passages are drawn with replacement. Draws depend on the seed and on the numbers of passages alone,
so that two methods measured on the same passages are compared draw by draw.

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


Values = Sequence[float] | NDArray[np.float64]


class Interval(NamedTuple):
    """Ends of an interval."""

    low: float
    high: float


class Ratio(NamedTuple):
    """One variant's share, as two values for every passage [n]."""

    part: Values
    whole: Values

    @property
    def share(self) -> float:
        """Mean of the parts over the mean of the wholes."""
        return float(np.mean(self.part) / np.mean(self.whole))


Ratios = Mapping[str, Ratio]
"""By variant; the whole is above zero in the mean."""


def mean_share(ratios: Ratios) -> float:
    """Mean over variants."""
    return float(np.mean([ratio.share for ratio in ratios.values()]))


def interval_of(ratios: Ratios, *, seed: int = 0, num_draws: int = NUM_DRAWS) -> Interval:
    """Where `mean_share` lies with a probability of `LEVEL`."""
    return _percentiles(draw_shares(ratios, seed=seed, num_draws=num_draws))


def interval_of_difference(
    ratios: Ratios, others: Ratios, *, seed: int = 0, num_draws: int = NUM_DRAWS
) -> Interval:
    """Where `mean_share(ratios) - mean_share(others)` lies, both on the same passages in every draw."""
    own = draw_shares(ratios, seed=seed, num_draws=num_draws)
    return _percentiles(own - draw_shares(others, seed=seed, num_draws=num_draws))


def draw_shares(ratios: Ratios, *, seed: int, num_draws: int) -> NDArray[np.float64]:
    """[R] `mean_share` of the passages of each draw; NaN where a whole is not above zero."""
    generator = np.random.default_rng(seed)
    total_R = np.zeros(num_draws)
    for ratio in ratios.values():
        part_n, whole_n = np.asarray(ratio.part, np.float64), np.asarray(ratio.whole, np.float64)
        at_once = max(1, _ENTRIES // len(part_n))
        for start in range(0, num_draws, at_once):
            stop = min(start + at_once, num_draws)
            chosen_Rn = generator.integers(0, len(part_n), size=(stop - start, len(part_n)))
            whole_R = whole_n[chosen_Rn].mean(axis=1)
            whole_R[whole_R <= 0] = np.nan
            total_R[start:stop] += part_n[chosen_Rn].mean(axis=1) / whole_R
    return total_R / len(ratios)


def _percentiles(share_R: NDArray[np.float64]) -> Interval:
    """Of the draws that have a share."""
    tail = 100 * (1 - LEVEL) / 2
    known_R = share_R[np.isfinite(share_R)]
    if not len(known_R):
        return Interval(-np.inf, np.inf)
    low, high = np.percentile(known_R, [tail, 100 - tail])
    return Interval(float(low), float(high))
