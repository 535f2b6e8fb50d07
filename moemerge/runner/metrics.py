"""What an engine has done so far, as plain figures: counts, sums and histograms.

Knows nothing of how they are shown; the server turns a `Snapshot` into Prometheus text.
"""

from bisect import bisect_left
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import TypeVar

LATENCY_BOUNDS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)


_NEARNESS = ("resident", "loading", "draining", "absent")
"""States of a variant, the readiest first."""


@dataclass(slots=True)
class Histogram:
    """Counts of values up to each bound, and beyond the last; values in seconds."""

    counts: list[int] = field(default_factory=lambda: [0] * (len(LATENCY_BOUNDS_S) + 1))
    total_s: float = 0.0

    def add(self, value_s: float) -> None:
        """Count a value."""
        self.counts[bisect_left(LATENCY_BOUNDS_S, value_s)] += 1
        self.total_s += value_s

    def __add__(self, other: "Histogram") -> "Histogram":
        counts = [a + b for a, b in zip(self.counts, other.counts, strict=True)]
        return Histogram(counts, self.total_s + other.total_s)

    def copy(self) -> "Histogram":
        """A histogram that later additions leave alone."""
        return Histogram(list(self.counts), self.total_s)


@dataclass(slots=True)
class VariantFigures:
    """What happened to the requests of one variant.

    Attributes:
        finished: Requests by finish reason.
        stall_s: Time in which requests of this variant waited for its non-expert tensors.
    """

    submitted: int = 0
    finished: Counter[str] = field(default_factory=Counter)
    prompt_tokens: int = 0
    output_tokens: int = 0
    preemptions: int = 0
    swaps: int = 0
    swap_bytes: int = 0
    swap_seconds: float = 0.0
    stall_s: float = 0.0
    ttft: Histogram = field(default_factory=Histogram)
    tpot: Histogram = field(default_factory=Histogram)
    itl: Histogram = field(default_factory=Histogram)
    turnaround: Histogram = field(default_factory=Histogram)

    def copy(self) -> "VariantFigures":
        """Figures that later work leaves alone."""
        return VariantFigures(
            submitted=self.submitted,
            finished=Counter(self.finished),
            prompt_tokens=self.prompt_tokens,
            output_tokens=self.output_tokens,
            preemptions=self.preemptions,
            swaps=self.swaps,
            swap_bytes=self.swap_bytes,
            swap_seconds=self.swap_seconds,
            stall_s=self.stall_s,
            ttft=self.ttft.copy(),
            tpot=self.tpot.copy(),
            itl=self.itl.copy(),
            turnaround=self.turnaround.copy(),
        )


@dataclass(slots=True)
class StepFigures:
    """What the forward steps did.

    Attributes:
        mixed: Steps with tokens of several variants.
        tokens: Tokens computed, recomputed ones included.
    """

    steps: int = 0
    mixed: int = 0
    tokens: int = 0
    seconds: float = 0.0

    def add(self, *, num_variants: int, num_tokens: int, seconds: float) -> None:
        """Count a step."""
        self.steps += 1
        self.mixed += num_variants > 1
        self.tokens += num_tokens
        self.seconds += seconds

    def copy(self) -> "StepFigures":
        """Figures that later steps leave alone."""
        return replace(self)


Figures = TypeVar("Figures", VariantFigures, StepFigures)


@dataclass(frozen=True, slots=True, kw_only=True)
class VariantState:
    """A variant at one moment: `state` is absent, loading, resident or draining."""

    figures: VariantFigures
    state: str
    pinned: bool
    waiting: int
    running: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """An engine at one moment.

    Attributes:
        variants: By name, those that the engine serves.
        steps: See `StepFigures`.
        blocks_used: Blocks of the key/value cache in use.
        blocks_total: Blocks there are.
        block_tokens: Tokens a block holds.
        pool_bytes: Bytes of pool experts in device memory.
        resident_bytes: Bytes of non-expert tensors in device memory, shared ones once.
        shared_bytes: Bytes that residents would take more if each kept tensors of its own.
        expert_hits: Times a pool expert was in device memory when needed.
        expert_misses: Times it had to be fetched from the mapped bundle.
    """

    variants: Mapping[str, VariantState]
    steps: StepFigures
    blocks_used: int
    blocks_total: int
    block_tokens: int
    pool_bytes: int
    resident_bytes: int
    shared_bytes: int
    expert_hits: int
    expert_misses: int


def add_snapshots(snapshots: Sequence[Snapshot]) -> Snapshot:
    """Several engines as if they were one; a variant is in the nearest state that any of them has it in."""
    names = dict.fromkeys(name for snapshot in snapshots for name in snapshot.variants)
    parts = {name: [s.variants[name] for s in snapshots if name in s.variants] for name in names}
    return Snapshot(
        variants={name: _add_states(states) for name, states in parts.items()},
        steps=_sum(StepFigures, [snapshot.steps for snapshot in snapshots]),
        block_tokens=max((snapshot.block_tokens for snapshot in snapshots), default=0),
        **{
            field.name: sum(getattr(snapshot, field.name) for snapshot in snapshots)
            for field in fields(Snapshot)
            if field.name not in ("variants", "steps", "block_tokens")
        },
    )


def _add_states(states: Sequence[VariantState]) -> VariantState:
    return VariantState(
        figures=_sum(VariantFigures, [state.figures for state in states]),
        state=min((state.state for state in states), key=_NEARNESS.index),
        pinned=any(state.pinned for state in states),
        waiting=sum(state.waiting for state in states),
        running=sum(state.running for state in states),
    )


def _sum(kind: type[Figures], figures: Sequence[Figures]) -> Figures:
    """Field by field, from none."""
    total = kind()
    for one in figures:
        for place in fields(kind):
            setattr(total, place.name, getattr(total, place.name) + getattr(one, place.name))
    return total
