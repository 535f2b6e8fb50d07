"""Figures of a run from what was seen of each request: latencies, rates, fairness, intervals.

Times are those at which the caller had the token, the same way for every system.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

_RESAMPLES = 1000
Figure = Callable[..., Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """What was seen of one request; times in seconds after the start of the trace.

    Attributes:
        variant: Who was asked.
        arrival_s: When it arrived.
        token_ids: The answer.
        token_times_s: When each token was there.
        wanted_tokens: Length the answer should have.
        ended_s: When the run was broken off, for a request that was not finished by then.
        swap_wait_s: Seconds it waited for its variant to become resident, where the system tells.
    """

    variant: str
    arrival_s: float
    token_ids: tuple[int, ...]
    token_times_s: tuple[float, ...]
    wanted_tokens: int
    ended_s: float | None = None
    swap_wait_s: float = 0.0

    @property
    def is_finished(self) -> bool:
        """Whether the whole answer came."""
        return len(self.token_ids) == self.wanted_tokens

    @property
    def finished_s(self) -> float:
        """When the last token was there; the end of the run, a lower bound, when it was not finished."""
        if self.is_finished:
            return self.token_times_s[-1]
        assert self.ended_s is not None
        return self.ended_s

    @property
    def turnaround_s(self) -> float:
        """From arrival to the last token."""
        return self.finished_s - self.arrival_s

    @property
    def ttft_s(self) -> float:
        """From arrival to the first token, queue and swap included."""
        return (self.token_times_s[0] if self.token_times_s else self.finished_s) - self.arrival_s

    @property
    def tpot_s(self) -> float | None:
        """(turnaround - TTFT) / (tokens - 1); None for a single token or an unfinished answer."""
        if not self.is_finished or self.wanted_tokens < 2:
            return None
        return (self.turnaround_s - self.ttft_s) / (self.wanted_tokens - 1)

    @property
    def itl_s(self) -> list[float]:
        """Gaps between consecutive tokens."""
        times = self.token_times_s
        return [later - earlier for earlier, later in pairwise(times)]


@dataclass(frozen=True, slots=True)
class Spread:
    """Mean, median and 99th percentile of one latency, in seconds."""

    mean: float
    p50: float
    p99: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Latencies:
    """Latencies of a run; None where no request has the figure."""

    turnaround: Spread
    ttft: Spread
    tpot: Spread | None
    itl: Spread | None


def latencies(records: Sequence[Record]) -> Latencies:
    """Latencies over all requests of a run."""
    turnaround = spread([record.turnaround_s for record in records])
    ttft = spread([record.ttft_s for record in records])
    assert turnaround is not None
    assert ttft is not None
    return Latencies(
        turnaround=turnaround,
        ttft=ttft,
        tpot=spread([tpot for record in records if (tpot := record.tpot_s) is not None]),
        itl=spread([gap for record in records for gap in record.itl_s]),
    )


def spread(values: Sequence[float]) -> Spread | None:
    """Mean, median and 99th percentile (linear between values); None of nothing."""
    if not values:
        return None
    p50, p99 = np.percentile(values, [50, 99])
    return Spread(float(np.mean(values)), float(p50), float(p99))


def output_rate(records: Sequence[Record]) -> float:
    """Output tokens per second, from the first arrival to the last token."""
    tokens = sum(len(record.token_ids) for record in records)
    seconds = max(record.finished_s for record in records) - min(record.arrival_s for record in records)
    return tokens / seconds if seconds > 0 else 0.0


def request_rate(records: Sequence[Record]) -> float:
    """Finished requests per second over the same time."""
    seconds = max(record.finished_s for record in records) - min(record.arrival_s for record in records)
    return sum(record.is_finished for record in records) / seconds if seconds > 0 else 0.0


def turnaround_by_variant(records: Sequence[Record]) -> dict[str, float]:
    """Mean turnaround per output token of each variant's requests."""
    found: dict[str, list[float]] = {}
    for record in records:
        found.setdefault(record.variant, []).append(record.turnaround_s / record.wanted_tokens)
    return {variant: float(np.mean(values)) for variant, values in found.items()}


def jain_index(values: Sequence[float]) -> float:
    """Fairness of shares: 1 when all are equal, 1 / n when one has everything.

    Source: Jain, Chiu, Hawe 1984, DEC-TR-301.
    """
    total, squares = sum(values), sum(value * value for value in values)
    return total * total / (len(values) * squares) if squares else 1.0


def bootstrap_interval(
    rounds: Sequence[Sequence[float]], figure: Figure = np.mean, *, seed: int = 0
) -> tuple[float, float]:
    """95 % interval of the median over rounds of a figure of each round's values.

    Rounds are drawn with replacement, and within each the values, since both vary. With one value per round
    it is the interval of the rounds alone.

    Args:
        rounds: Values of each round.
        figure: Of a round: `np.mean` or `np.median`.
        seed: Of the draws.

    Source: percentile bootstrap of clusters, Davison and Hinkley 1997, section 3.8.
    """
    generator = np.random.default_rng(seed)
    arrays = [np.asarray(values, dtype=np.float64) for values in rounds]
    drawn = np.empty((len(arrays), _RESAMPLES))
    for row in drawn:
        chosen = generator.integers(len(arrays), size=_RESAMPLES)
        for number, array in enumerate(arrays):
            samples = np.flatnonzero(chosen == number)
            values = array[generator.integers(len(array), size=(len(samples), len(array)))]
            row[samples] = figure(values, axis=1)
    low, high = np.percentile(np.median(drawn, axis=0), [2.5, 97.5])
    return float(low), float(high)
