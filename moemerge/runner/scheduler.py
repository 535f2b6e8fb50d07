"""Whose tokens the next step computes: a state machine fed by events, without tensors and clocks.

`submit`, `remove` and `computed` tell what happened, `plan` decides: work for the running sequences, the
oldest first, then for as many of the waiting ones as there is room for. `policies` say which variants share
a step, `fairness` who is let in next. A variant that has waited too long and has nothing running takes the
place of the most served variants' youngest sequences. No admission is in vain: but for want of blocks, a
sequence is only preempted after it got a token more.
"""

from collections import deque
from collections.abc import Collection, Iterator
from dataclasses import dataclass

from moemerge.runner.blocks import BlockPool
from moemerge.runner.fairness import Fairness
from moemerge.runner.limits import Limits
from moemerge.runner.policies import Policy, open_policy
from moemerge.runner.sequence import Sequence, State


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
        self.running: list[Sequence] = []
        self._waiting: dict[str, deque[Sequence]] = {}
        self._policy = open_policy(policy, limits.quantum_s)
        self._fairness = Fairness(limits.shares, limits.max_wait_s)

    # Events

    def submit(self, sequence: Sequence) -> None:
        """A sequence arrived."""
        self._fairness.arrived(sequence.variant, {s.variant for s in self.sequences()})
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
            self._fairness.computed(
                sequence.variant,
                num_prompt=min(work.num_tokens, prompt_left) + (sequence.num_to_encode if work.encode else 0),
                num_answer=max(0, work.num_tokens - prompt_left),
            )
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
        demand = {}
        for head in self._policy.in_line(self._heads()):
            queue = self._waiting[head.variant]
            demand[head.variant] = Demand(len(queue), min(sequence.queued_s for sequence in queue))
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
        while stepping := set(self._policy.choose(now_s, self.running, self._heads(), left)):
            opening = [variant for variant in stepping if variant in open_to]
            step.is_short_of_blocks = False
            self._make_room_for_overdue(now_s, opening, step)
            self._continue(stepping, step, now_s, is_prefill=False)
            self._continue(stepping, step, now_s, is_prefill=True)
            self._admit(stepping, opening, step, now_s)
            if step.work:
                break
            left -= stepping  # their turn, but no block is free for them
        return StepPlan(tuple(step.work), tuple(step.preempted))

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
            head.running_since_s = now_s
            head.admitted_s = now_s if head.admitted_s is None else head.admitted_s
            self.running.append(head)
            self._fairness.admitted(head.variant, now_s)
            num_stepping += 1
            self.blocks.grow(head.cross_table, len(head.source_ids))
            num_tokens = min(head.num_pending, max(1, step.tokens_left - head.num_to_encode))
            self.blocks.grow(head.table, num_tokens)
            step.add(head, num_tokens)

    def _next_in_line(self, opening: list[str], now_s: float, step: "_Step") -> Sequence | None:
        in_line = self._policy.in_line(self._heads())
        heads = [head for head in in_line if head.variant in opening and head not in step.preempted]
        return self._fairness.first(heads, {s.variant for s in self.running}, now_s)

    def _make_room_for_overdue(self, now_s: float, opening: list[str], step: "_Step") -> None:
        """An overdue request whose variant has nothing running gets the room of others."""
        head = self._next_in_line(opening, now_s, step) if self._policy.makes_room else None
        if head is None or not self._fairness.is_overdue(head, now_s):
            return
        if any(s.variant == head.variant for s in self.running):
            return
        others = [s for s in self.running if s.has_gained]
        others.sort(key=lambda s: (self._fairness.served(s.variant), s.running_since_s, s.number))
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
