"""Which variants are in device memory: a state machine without tensors and clocks.

A variant is absent, loading, resident or draining (resident, but admitting nobody). `plan` decides, the
engine carries out and reports back with `loaded`. Never set aside: a variant that is pinned, loading, or
has running sequences. Among idle ones the least popular goes first, popularity being requests that count
half after `half_life_s`; none goes before it was there for `min_hold_s`, unless a request has waited for
`patience_s`. When all are busy, the one with the least work left drains for the variant that has waited
longest, and is emptied by preemption if that takes longer than `drain_s`; but each of its sequences gets a
token first. A variant that was set aside waits anew from then on, so that all have their turn.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from moemerge.errors import InvalidRecipe
from moemerge.runner.scheduler import Demand

NO_DEMAND = Demand()


class Presence(StrEnum):
    """Where a variant's non-expert tensors are."""

    ABSENT = "absent"
    LOADING = "loading"
    RESIDENT = "resident"
    DRAINING = "draining"


@dataclass(frozen=True, slots=True, kw_only=True)
class Patience:
    """How residency weighs those who wait against those who are there.

    Attributes:
        patience_s: Wait after which a variant may drive out one that is busy.
        min_hold_s: Time a variant stays after it was loaded.
        drain_s: Time that a draining variant's running sequences get to finish.
        half_life_s: Time in which a request's share in popularity halves.
    """

    patience_s: float = 1.0
    min_hold_s: float = 1.0
    drain_s: float = 5.0
    half_life_s: float = 60.0

    def __post_init__(self) -> None:
        for name in ("patience_s", "min_hold_s", "drain_s", "half_life_s"):
            value = getattr(self, name)
            if not value >= 0 or (name == "half_life_s" and value == 0):
                raise InvalidRecipe(f"{name} is {value}, expected a positive number of seconds")


@dataclass(frozen=True, slots=True)
class Moves:
    """What is to be done now.

    Attributes:
        evict: Resident variants to set aside, before anything is loaded.
        load: Variant to load, if any.
        empty: Draining variant whose running sequences are to be preempted.
    """

    evict: tuple[str, ...] = ()
    load: str | None = None
    empty: str | None = None


@dataclass(slots=True)
class _Resident:
    loaded_s: float
    has_computed: bool = False
    draining_since_s: float | None = None


@dataclass(slots=True)
class _Popularity:
    value: float = 0.0
    as_of_s: float = 0.0


@dataclass(slots=True)
class Residency:
    """The variants that are in device memory.

    Attributes:
        fits: Whether so many variants may be resident together.
    """

    fits: Callable[[Collection[str]], bool]
    patience: Patience = field(default_factory=Patience)
    pinned: set[str] = field(default_factory=set)
    loading: str | None = None
    _residents: dict[str, _Resident] = field(default_factory=dict)
    _absent_since_s: dict[str, float] = field(default_factory=dict)
    _popularity: dict[str, _Popularity] = field(default_factory=dict)

    # Events

    def requested(self, variant: str, now_s: float) -> None:
        """A request for the variant arrived."""
        known = self._popularity.setdefault(variant, _Popularity(as_of_s=now_s))
        known.value = self.popularity(variant, now_s) + 1.0
        known.as_of_s = now_s

    def begin_loading(self, variant: str) -> None:
        """Its tensors are on their way."""
        assert self.loading is None
        assert variant not in self._residents
        self.loading = variant

    def loaded(self, variant: str, now_s: float) -> None:
        """Its tensors have arrived."""
        assert self.loading == variant
        self.loading = None
        self._residents[variant] = _Resident(loaded_s=now_s)

    def computed(self, variants: Collection[str]) -> None:
        """A step computed tokens of these variants."""
        for variant in variants:
            self._residents[variant].has_computed = True

    def failed(self, variant: str) -> None:
        """Its tensors could not be loaded."""
        assert self.loading == variant
        self.loading = None

    def evicted(self, variant: str, now_s: float) -> None:
        """Its tensors were set aside."""
        del self._residents[variant]
        self._absent_since_s[variant] = now_s

    def pin(self, variant: str) -> None:
        """It is to stay."""
        self.pinned.add(variant)
        if variant in self._residents:
            self._residents[variant].draining_since_s = None

    def unpin(self, variant: str) -> None:
        """It may be set aside like others."""
        self.pinned.discard(variant)

    # Questions

    @property
    def residents(self) -> Collection[str]:
        """Variants that can compute, draining ones included."""
        return self._residents.keys()

    @property
    def open_to(self) -> list[str]:
        """Variants that may admit sequences."""
        return [name for name, resident in self._residents.items() if resident.draining_since_s is None]

    def presence(self, variant: str) -> Presence:
        """Where a variant is."""
        if variant == self.loading:
            return Presence.LOADING
        if variant not in self._residents:
            return Presence.ABSENT
        is_draining = self._residents[variant].draining_since_s is not None
        return Presence.DRAINING if is_draining else Presence.RESIDENT

    def popularity(self, variant: str, now_s: float) -> float:
        """Requests so far, each halved once for every half-life since it came."""
        known = self._popularity.get(variant)
        if known is None:
            return 0.0
        halvings: float = 0.5 ** ((now_s - known.as_of_s) / self.patience.half_life_s)
        return known.value * halvings

    def absent_since_s(self, variant: str) -> float:
        """When the variant was last set aside; minus infinity when it never was."""
        return self._absent_since_s.get(variant, float("-inf"))

    # The decision

    def plan(self, demand: Mapping[str, Demand], now_s: float) -> Moves:
        """What to evict and load now.

        Args:
            demand: Of the variants that have work.
            now_s: Time of the decision, on the clock of the demand.
        """
        waiting_since_s = {
            name: max(known.waiting_since_s, self.absent_since_s(name))
            for name, known in demand.items()
            if known.waiting and self.presence(name) is Presence.ABSENT
        }
        wanted = min(waiting_since_s, key=lambda name: waiting_since_s[name], default=None)
        if wanted is None:
            self._reopen_all()
            return Moves()
        if self.loading is not None:
            return Moves()
        is_impatient = now_s - waiting_since_s[wanted] >= self.patience.patience_s
        evict = self.find_room(wanted, demand, now_s, is_impatient=is_impatient)
        if evict is None:
            return self._drain(demand, now_s, is_impatient=is_impatient)
        return Moves(evict=tuple(evict), load=wanted)

    def find_room(
        self, variant: str, demand: Mapping[str, Demand], now_s: float, *, is_impatient: bool = True
    ) -> list[str] | None:
        """Idle variants to set aside so that this one fits; None if that is not enough."""
        evict: list[str] = []
        while not self.fits([*(name for name in self._residents if name not in evict), variant]):
            idle = [
                name
                for name, resident in self._residents.items()
                if name not in self.pinned
                and name not in evict
                and self._is_idle(name, demand)
                and (is_impatient or now_s - resident.loaded_s >= self.patience.min_hold_s)
            ]
            if not idle:
                return None
            evict.append(min(idle, key=lambda name: self.popularity(name, now_s)))
        return evict

    def _is_idle(self, name: str, demand: Mapping[str, Demand]) -> bool:
        known = demand.get(name, NO_DEMAND)
        is_draining = self._residents[name].draining_since_s is not None
        return known.running == 0 and (known.waiting == 0 or is_draining)

    def _drain(self, demand: Mapping[str, Demand], now_s: float, *, is_impatient: bool) -> Moves:
        """Go on with the variant that drains; let one begin to, when there is none and somebody must go."""
        for name, resident in self._residents.items():
            known = demand.get(name, NO_DEMAND)
            if resident.draining_since_s is not None and known.running:
                is_over = now_s - resident.draining_since_s >= self.patience.drain_s
                return Moves(empty=name if is_over and not known.fresh else None)
        busy = [
            name
            for name, resident in self._residents.items()
            if name not in self.pinned
            and resident.draining_since_s is None
            and resident.has_computed  # or two variants could drive each other out for ever
            and now_s - resident.loaded_s >= self.patience.min_hold_s
        ]
        if busy and is_impatient:
            victim = min(busy, key=lambda name: demand.get(name, NO_DEMAND).remaining_tokens)
            self._residents[victim].draining_since_s = now_s
        return Moves()

    def _reopen_all(self) -> None:
        """Nobody waits for room any more."""
        for resident in self._residents.values():
            resident.draining_since_s = None
