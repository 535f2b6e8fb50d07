"""Whose tokens the next step computes: a state machine fed by events, without tensors and clocks.

`submit`, `remove` and `computed` tell what happened, `plan` decides. Three policies:

* `mixed`: every resident variant in every step.
* `grouped`: one variant at a time, for a quantum, then the one that has waited longest.
* `fcfs`: one variant at a time, strictly in order of arrival (the paper's mode).

Between variants admission is fair by token counters (VTC, Sheng et al., OSDI 2024): the waiting variant
with the least service for its share goes first, and one that comes back starts no lower than the least busy.
A variant that waits and got nothing in for `max_wait_s` goes before all others; if it has nothing running, it
takes the place of the most served variants' youngest sequences. No admission is in vain: but for want of
blocks, a sequence is only preempted after it got a token more.
"""

from collections import deque
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from moemerge.errors import InvalidRecipe
from moemerge.runner.blocks import BlockPool
from moemerge.runner.sequence import Sequence, State

OUTPUT_COST = 2.0
"""Service that an answer's token counts for; a prompt's token counts 1 (the ratio of the VTC paper)."""


class Policy(StrEnum):
    """Which variants share a step."""

    MIXED = "mixed"
    GROUPED = "grouped"
    FCFS = "fcfs"


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What a step and a wait may take.

    Attributes:
        max_batch: Sequences that run at once.
        max_step_tokens: Tokens that a step computes; the first encoder input of a step may go beyond.
        max_wait_s: Time without an admission after which a variant's first request goes before all others.
        quantum_s: Time that `grouped` stays with a variant while others wait.
        shares: Of the service, by variant; 1 for those not named.
    """

    max_batch: int = 64
    max_step_tokens: int = 512
    max_wait_s: float = 30.0
    quantum_s: float = 0.5
    shares: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.max_batch < 1:
            raise InvalidRecipe(f"max batch is {self.max_batch}, expected at least 1")
        if self.max_step_tokens < self.max_batch:
            raise InvalidRecipe(
                f"max step tokens is {self.max_step_tokens}, expected at least max batch, {self.max_batch}, "
                f"so that every running sequence gets its next token"
            )
        for name, value in (("max wait", self.max_wait_s), ("quantum", self.quantum_s)):
            if not 0 <= value < float("inf"):
                raise InvalidRecipe(f"{name} is {value} seconds, expected 0 or more")
        for variant, share in self.shares.items():
            if not 0 < share < float("inf"):
                raise InvalidRecipe(f"share of {variant} is {share}, expected more than 0")


@dataclass(frozen=True, slots=True)
class Work:
    """What a step does for one sequence: encode its source, then compute some of its pending tokens."""

    sequence: Sequence
    num_tokens: int
    encode: bool = False


@dataclass(frozen=True, slots=True)
class StepPlan:
    """What a step does, and which sequences lost their blocks for it."""

    work: tuple[Work, ...]
    preempted: tuple[Sequence, ...]


@dataclass(frozen=True, slots=True)
class Demand:
    """What a variant asks for.

    Attributes:
        waiting: Sequences that cannot go on before they are admitted.
        waiting_since_s: When the first of them began to wait; infinite when there is none.
        running: Sequences with blocks.
        fresh: Those of them that have not gained a token since they were admitted.
        remaining_tokens: Tokens that the running ones may still take.
    """

    waiting: int = 0
    waiting_since_s: float = float("inf")
    running: int = 0
    fresh: int = 0
    remaining_tokens: int = 0


class Scheduler:
    """Waiting and running sequences of all variants."""

    def __init__(self, blocks: BlockPool, limits: Limits, policy: Policy = Policy.MIXED) -> None:
        self.blocks = blocks
        self.limits = limits
        self.policy = policy
        self.running: list[Sequence] = []
        self._waiting: dict[str, deque[Sequence]] = {}
        self._served: dict[str, float] = {}
        self._admitted_s: dict[str, float] = {}
        self._turn: str | None = None
        self._turn_since_s = 0.0

    # Events

    def submit(self, sequence: Sequence) -> None:
        """A sequence arrived."""
        self._lift(sequence.variant)
        self._waiting.setdefault(sequence.variant, deque()).append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """A sequence has finished or was cancelled; its blocks are free again."""
        if sequence.state is State.RUNNING:
            self.running.remove(sequence)
        elif sequence.state is State.WAITING:
            self._waiting[sequence.variant].remove(sequence)
        sequence.state = State.FINISHED
        for table in sequence.tables:
            self.blocks.release(table)

    def preempt(self, sequence: Sequence, now_s: float) -> None:
        """Take a running sequence's blocks; it is computed again when it gets its next turn."""
        self.running.remove(sequence)
        for table in sequence.tables:
            self.blocks.release(table)
        sequence.forget()
        sequence.queued_s = now_s
        self._waiting.setdefault(sequence.variant, deque()).appendleft(sequence)

    def empty(self, variant: str, now_s: float) -> list[Sequence]:
        """Preempt all sequences of a variant; they keep their order."""
        emptied = [sequence for sequence in self.running if sequence.variant == variant]
        for sequence in reversed(emptied):
            self.preempt(sequence, now_s)
        return emptied

    def computed(self, plan: StepPlan) -> None:
        """The step was done; the tokens count as served."""
        for work in plan.work:
            sequence = work.sequence
            prompt_left = max(0, sequence.num_prompt - sequence.num_computed)
            num_read = min(work.num_tokens, prompt_left) + (sequence.num_to_encode if work.encode else 0)
            cost = num_read + OUTPUT_COST * max(0, work.num_tokens - prompt_left)
            self._served[sequence.variant] += cost / self.limits.shares.get(sequence.variant, 1.0)
            sequence.num_computed += work.num_tokens
            sequence.is_encoded |= work.encode

    # Questions

    @property
    def has_work(self) -> bool:
        """Somebody runs or waits."""
        return bool(self.running) or any(self._waiting.values())

    def waiting(self, variant: str) -> int:
        """Sequences of a variant that wait."""
        return len(self._waiting.get(variant, ()))

    def sequences(self) -> Iterator[Sequence]:
        """All that run or wait."""
        yield from self.running
        for queue in self._waiting.values():
            yield from queue

    def demand(self) -> dict[str, Demand]:
        """What each variant with work asks for; under `fcfs` only the first in line waits."""
        heads = [queue for queue in self._waiting.values() if queue]
        if self.policy is Policy.FCFS and heads:
            heads = [min(heads, key=lambda queue: queue[0].number)]
        demand = {
            queue[0].variant: Demand(len(queue), min(sequence.queued_s for sequence in queue))
            for queue in heads
        }
        for sequence in self.running:
            known = demand.get(sequence.variant, Demand())
            demand[sequence.variant] = Demand(
                known.waiting,
                known.waiting_since_s,
                known.running + 1,
                known.fresh + (not sequence.has_gained),
                known.remaining_tokens + sequence.num_left + sequence.num_pending,
            )
        return demand

    # The decision

    def plan(self, now_s: float, resident: Collection[str], open_to: Collection[str]) -> StepPlan:
        """What the next step computes; takes and gives blocks as it says.

        Args:
            now_s: Time of the decision, on the clock of `Sequence.queued_s`.
            resident: Variants that can compute.
            open_to: Those of them that may admit waiting sequences.
        """
        step = _Step(self.limits.max_step_tokens)
        left = set(resident)
        while stepping := self._choose_variants(now_s, left):
            opening = [variant for variant in stepping if variant in open_to]
            step.is_short_of_blocks = False
            self._make_room_for_overdue(now_s, opening, step)
            self._continue(stepping, step, now_s, is_prefill=False)
            self._continue(stepping, step, now_s, is_prefill=True)
            self._admit(stepping, opening, step, now_s)
            if step.work or self.policy is not Policy.GROUPED:
                break
            left -= set(stepping)  # its turn, but no block is free for it
        return StepPlan(tuple(step.work), tuple(step.preempted))

    def _choose_variants(self, now_s: float, resident: Collection[str]) -> Collection[str]:
        if self.policy is Policy.MIXED:
            return resident
        if self.policy is Policy.FCFS:
            first = min(self.running or self._heads(), key=lambda s: s.number, default=None)
            return [first.variant] if first is not None and first.variant in resident else []
        ready = {s.variant for s in (*self.running, *self._heads()) if s.variant in resident}
        is_over = now_s - self._turn_since_s >= self.limits.quantum_s
        if ready and (self._turn not in ready or (is_over and len(ready) > 1)):
            self._turn, self._turn_since_s = self._next_turn(ready), now_s
        return [self._turn] if self._turn in ready else []

    def _next_turn(self, ready: set[str]) -> str:
        """Of the variants that are ready the one whose work has waited longest, but for the last one."""
        others = [s for s in (*self.running, *self._heads()) if s.variant in ready - {self._turn}]
        if not others:
            return next(iter(ready))
        return min(others, key=lambda s: (s.last_token_s or s.queued_s, s.number)).variant

    def _continue(self, stepping: Collection[str], step: "_Step", now_s: float, *, is_prefill: bool) -> None:
        """Work for running sequences, the oldest first."""
        for sequence in list(self.running):
            if sequence.variant not in stepping or sequence.is_prefilling != is_prefill:
                continue
            if sequence.state is not State.RUNNING:  # preempted for an older one
                continue
            if sequence.num_to_encode > step.tokens_left and step.work:
                continue
            num_tokens = min(sequence.num_pending, max(1, step.tokens_left - sequence.num_to_encode))
            if step.tokens_left > 0 and self._find_blocks(sequence, num_tokens, step, now_s):
                step.add(sequence, num_tokens)

    def _find_blocks(self, sequence: Sequence, num_tokens: int, step: "_Step", now_s: float) -> bool:
        """Give a running sequence its blocks, at the cost of younger ones that this step has not used."""
        end = sequence.num_computed + num_tokens
        while not self.blocks.can_grow(sequence.table, end):
            step.is_short_of_blocks = True
            idle = [s for s in self.running if s.number not in step.numbers]
            victim = max(idle, key=lambda s: (s.running_since_s, s.number))
            if victim is sequence and step.work:
                return False  # it keeps what it has and goes on when the others have finished
            self._preempt(victim, step, now_s)
            if victim is sequence:
                return False
        self.blocks.grow(sequence.table, end)
        return True

    def _admit(self, stepping: Collection[str], opening: list[str], step: "_Step", now_s: float) -> None:
        """Let waiting sequences in while there is room for the next in line and all running ones have it."""
        if step.is_short_of_blocks:
            return
        num_stepping = sum(sequence.variant in stepping for sequence in self.running)
        while step.tokens_left > 0 and num_stepping < self.limits.max_batch:
            head = self._next_in_line(opening, now_s, step)
            if head is None or not self._fits(head):
                return
            if step.has_encoded and head.num_to_encode >= step.tokens_left:
                return
            self._waiting[head.variant].popleft()
            head.state = State.RUNNING
            head.running_since_s = self._admitted_s[head.variant] = now_s
            head.admitted_s = now_s if head.admitted_s is None else head.admitted_s
            self.running.append(head)
            num_stepping += 1
            self.blocks.grow(head.cross_table, len(head.source_ids))
            num_tokens = min(head.num_pending, max(1, step.tokens_left - head.num_to_encode))
            self.blocks.grow(head.table, num_tokens)
            step.add(head, num_tokens)

    def _next_in_line(self, opening: list[str], now_s: float, step: "_Step") -> Sequence | None:
        heads = [head for head in self._heads() if head.variant in opening and head not in step.preempted]
        if self.policy is Policy.FCFS:
            first = min(self._heads(), key=lambda s: s.number, default=None)
            return first if first in heads else None
        overdue = [head for head in heads if self._is_overdue(head, now_s)]
        if overdue:
            active = {sequence.variant for sequence in self.running}
            return min(overdue, key=lambda s: (s.variant in active, self._left_out_since_s(s), s.number))
        return min(heads, key=lambda s: (self._served[s.variant], s.number), default=None)

    def _is_overdue(self, head: Sequence, now_s: float) -> bool:
        return now_s - self._left_out_since_s(head) >= self.limits.max_wait_s

    def _left_out_since_s(self, head: Sequence) -> float:
        """Since when its variant waits and gets nothing in; waiting behind one's own kind does not count."""
        return max(head.queued_s, self._admitted_s.get(head.variant, head.queued_s))

    def _make_room_for_overdue(self, now_s: float, opening: list[str], step: "_Step") -> None:
        """An overdue request whose variant has nothing running gets the room of others."""
        head = self._next_in_line(opening, now_s, step) if self.policy is Policy.MIXED else None
        if head is None or not self._is_overdue(head, now_s):
            return
        if any(s.variant == head.variant for s in self.running):
            return
        others = [s for s in self.running if s.has_gained]
        others.sort(key=lambda s: (self._served[s.variant], s.running_since_s, s.number))
        while others and (len(self.running) >= self.limits.max_batch or not self._fits(head)):
            self._preempt(others.pop(), step, now_s)

    def _preempt(self, sequence: Sequence, step: "_Step", now_s: float) -> None:
        self.preempt(sequence, now_s)
        step.preempted.append(sequence)

    def _fits(self, sequence: Sequence) -> bool:
        """Room for all that is known of it, so that it does not drive others out at once."""
        needed = self.blocks.blocks_for(len(sequence.tokens)) + self.blocks.blocks_for(
            len(sequence.source_ids)
        )
        return needed <= self.blocks.num_free

    def _heads(self) -> list[Sequence]:
        return [queue[0] for queue in self._waiting.values() if queue]

    def _lift(self, variant: str) -> None:
        """A variant that comes back does not collect what it left unused."""
        active = {s.variant for s in self.sequences()}
        served = self._served.get(variant, 0.0)
        if variant not in active:
            served = max(served, min((self._served[name] for name in active), default=0.0))
        self._served[variant] = served


class _Step:
    """A step while it is planned."""

    def __init__(self, max_tokens: int) -> None:
        self.tokens_left = max_tokens
        self.work: list[Work] = []
        self.numbers: set[int] = set()
        self.preempted: list[Sequence] = []
        self.is_short_of_blocks = False
        self.has_encoded = False

    def add(self, sequence: Sequence, num_tokens: int) -> None:
        self.work.append(Work(sequence, num_tokens, encode=sequence.num_to_encode > 0))
        self.numbers.add(sequence.number)
        self.has_encoded |= sequence.num_to_encode > 0
        self.tokens_left -= num_tokens + sequence.num_to_encode
