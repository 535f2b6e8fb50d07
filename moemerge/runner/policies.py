"""The three policies: which variants share a step, and who of those that wait may be let in.

* `mixed`: every resident variant in every step.
* `grouped`: one variant at a time, for a quantum, then the one that has waited longest.
* `fcfs`: one variant at a time, strictly in order of arrival (the paper's mode).
"""

from collections.abc import Collection
from enum import StrEnum
from typing import Protocol

from moemerge.runner.sequence import Sequence


class Policy(StrEnum):
    """The policies' names."""

    MIXED = "mixed"
    GROUPED = "grouped"
    FCFS = "fcfs"


class StepPolicy(Protocol):
    """What a policy decides. `heads` are the first sequences of the variants that have some waiting."""

    def choose(
        self, now_s: float, running: list[Sequence], heads: list[Sequence], resident: Collection[str]
    ) -> Collection[str]:
        """Which resident variants share the next step; none when nobody's turn can come."""
        ...

    def in_line(self, heads: list[Sequence]) -> list[Sequence]:
        """Those of the heads that may be let in."""
        ...

    @property
    def makes_room(self) -> bool:
        """Whether running sequences make room for a variant that has waited too long."""
        ...


class Mixed:
    """Every resident variant in every step."""

    makes_room = True

    def choose(
        self, now_s: float, running: list[Sequence], heads: list[Sequence], resident: Collection[str]
    ) -> Collection[str]:
        """See `StepPolicy.choose`."""
        return resident

    def in_line(self, heads: list[Sequence]) -> list[Sequence]:
        """See `StepPolicy.in_line`."""
        return heads


class Grouped:
    """One variant at a time; its turn lasts a quantum, and longer when no other one is ready."""

    makes_room = False

    def __init__(self, quantum_s: float) -> None:
        self._quantum_s = quantum_s
        self._turn: str | None = None
        self._turn_since_s = 0.0

    def choose(
        self, now_s: float, running: list[Sequence], heads: list[Sequence], resident: Collection[str]
    ) -> Collection[str]:
        """See `StepPolicy.choose`."""
        at_hand = [s for s in (*running, *heads) if s.variant in resident]
        ready = {s.variant for s in at_hand}
        is_over = now_s - self._turn_since_s >= self._quantum_s
        if ready and (self._turn not in ready or (is_over and len(ready) > 1)):
            # The one whose work has waited longest, but for the one whose turn it was.
            others = [s for s in at_hand if s.variant != self._turn]
            longest = min(others, key=lambda s: (s.last_token_s or s.queued_s, s.number))
            self._turn, self._turn_since_s = longest.variant, now_s
        return [self._turn] if self._turn in ready else []

    def in_line(self, heads: list[Sequence]) -> list[Sequence]:
        """See `StepPolicy.in_line`."""
        return heads


class Fcfs:
    """One variant at a time, strictly in order of arrival."""

    makes_room = False

    def choose(
        self, now_s: float, running: list[Sequence], heads: list[Sequence], resident: Collection[str]
    ) -> Collection[str]:
        """See `StepPolicy.choose`."""
        first = min(running or heads, key=lambda s: s.number, default=None)
        return [first.variant] if first is not None and first.variant in resident else []

    def in_line(self, heads: list[Sequence]) -> list[Sequence]:
        """See `StepPolicy.in_line`."""
        return [min(heads, key=lambda s: s.number)] if heads else []


def open_policy(policy: Policy, quantum_s: float) -> StepPolicy:
    """A policy at its beginning."""
    match policy:
        case Policy.MIXED:
            return Mixed()
        case Policy.GROUPED:
            return Grouped(quantum_s)
        case Policy.FCFS:
            return Fcfs()
