"""How far units of work on other machines are: they tell an actor, which the driver asks."""

import time
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from moemerge.progress import Progress

_EVERY_S = 0.5
_ANSWER_S = 2.0


@dataclass(frozen=True, slots=True)
class Advance:
    """How far a unit is, in bytes; `title` is empty while it has not said what it does."""

    title: str = ""
    total_bytes: int = 0
    done_bytes: int = 0


class Tally:
    """The actor: what each unit told last. One that is done again begins anew."""

    def __init__(self) -> None:
        self._advances: dict[int, Advance] = {}

    def tell(self, number: int, advance: Advance) -> None:
        """Note how far a unit is."""
        self._advances[number] = advance

    def read(self) -> dict[int, Advance]:
        """What each unit told last."""
        return self._advances


def start_tally(node_id: str) -> Any:
    """An actor on a node."""
    beside = NodeAffinitySchedulingStrategy(node_id, soft=True)
    actor: Any = ray.remote(num_cpus=0, max_restarts=-1)(Tally)
    return actor.options(scheduling_strategy=beside).remote()


class Teller:
    """`Progress` of one unit, on the machine that does it.

    Args:
        tally: The actor.
        number: Of the unit.
    """

    def __init__(self, tally: Any, number: int) -> None:
        self._tally = tally
        self._number = number
        self._title = ""
        self._total = self._done = 0
        self._last_s = time.monotonic()

    def start(self, title: str, total_bytes: int) -> None:
        """See `Progress.start`; what came before counts on."""
        self._title, self._total = title, self._total + total_bytes
        self._tell()

    def advance(self, num_bytes: int) -> None:
        """See `Progress.advance`."""
        self._done += num_bytes
        if time.monotonic() - self._last_s >= _EVERY_S:
            self._tell()

    @property
    def told(self) -> Advance:
        """How far it is."""
        return Advance(self._title, self._total, self._done)

    def _tell(self) -> None:
        self._last_s = time.monotonic()
        self._tally.tell.remote(self._number, self.told)


class Follower:
    """Passes on to the driver's progress what the units have told.

    Args:
        tally: The actor.
        progress: Told the sum over units; titles and totals too, where units have any.
    """

    def __init__(self, tally: Any, progress: Progress) -> None:
        self._tally = tally
        self._progress = progress
        self._ended: dict[int, Advance] = {}
        self._told = 0
        self._total = 0
        self._last_s = 0.0

    def follow(self) -> None:
        """Ask and pass on, but not more often than is of use."""
        if time.monotonic() - self._last_s < _EVERY_S:
            return
        self._last_s = time.monotonic()
        try:
            advances: dict[int, Advance] = ray.get(self._tally.read.remote(), timeout=_ANSWER_S)
        except RayError:
            # Progress is a convenience; work goes on without.
            return
        self._pass_on(advances | self._ended)

    def end(self, number: int, advance: Advance) -> None:
        """A unit has ended; others have come at least as far as was told."""
        self._ended[number] = advance
        self._pass_on(self._ended)

    def _pass_on(self, advances: dict[int, Advance]) -> None:
        total = sum(advance.total_bytes for advance in advances.values())
        if total > self._total:
            titles = [advance.title for advance in advances.values() if advance.title]
            self._total, self._told = total, 0
            self._progress.start(titles[-1] if len(titles) == 1 else f"{len(titles)} tasks", total)
        done = sum(advance.done_bytes for advance in advances.values())
        if done > self._told:
            self._progress.advance(done - self._told)
            self._told = done
