"""An engine without tensors: scheduler and swapper, a clock that is set, and a loader that takes time.

What a step computes is only counted; a token is whatever comes next. Every event checks the laws that hold
at every moment.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

from hypothesis import strategies as st

from moemerge.runner.blocks import BlockPool, BlockTable, Owner
from moemerge.runner.dispatch import Dispatcher
from moemerge.runner.fairness import OUTPUT_COST
from moemerge.runner.limits import Limits
from moemerge.runner.policies import Policy
from moemerge.runner.request import Request
from moemerge.runner.residency import Patience, Presence, Residency
from moemerge.runner.sampling import Sampler, Sampling
from moemerge.runner.scheduler import Scheduler, StepPlan
from moemerge.runner.sequence import Sequence, State
from moemerge.runner.swapping import Swapper
from moemerge.runner.transfer import Swap


@dataclass
class Arrival:
    """A variant on its way, in place of `Transfer`."""

    variant: str

    def carry_out(self, *, is_alone: bool = False) -> Swap:
        return Swap(variant=self.variant, moved_bytes=0, kept_bytes=0, seconds=0.0)


class Device:
    """In place of store, forward pass and loader: nothing is moved, but that takes time."""

    def __init__(self, world: "World") -> None:
        self.world = world
        self.current: Arrival | None = None
        self.until_s = 0.0

    # As `WeightStore`

    def prepare(self, variant: str, instead_of: Collection[str] = ()) -> Arrival:
        assert self.world.residency.presence(variant) is Presence.ABSENT
        return Arrival(variant)

    def finish(self, transfer: Arrival) -> None: ...

    def weights(self, variant: str) -> None: ...

    def residuals(self, variant: str) -> None: ...

    def stored_bytes(self, variant: str) -> int:
        return 0

    def release(self, variant: str) -> None: ...

    def forget(self, variant: str) -> None: ...

    # As `Forward`

    def install(self, variant: str, *tensors: None) -> None: ...

    def uninstall(self, variant: str) -> None:
        running = {s.variant for s in self.world.scheduler.running}
        assert variant not in running, "evicts a variant whose sequences run"
        assert variant not in self.world.residency.pinned, "evicts a pinned variant"

    # As `Loader`

    def start(self, transfer: Arrival) -> None:
        assert self.current is None
        self.current = transfer
        self.until_s = self.world.now_s + self.world.load_s

    def wait(self, timeout_s: float | None = None) -> None:
        self.until_s = self.world.now_s

    def poll(self) -> Swap | None:
        if self.current is None or self.world.now_s < self.until_s:
            return None
        arrived, self.current = self.current, None
        return arrived.carry_out()


@dataclass(kw_only=True)
class World:
    """Scheduler and residency of some variants.

    Attributes:
        capacity: Sum of the `sizes` of variants that may be resident; a size is 1 when nothing is said.
        load_s: How long a variant takes to arrive.
        has_encoder: Prompts go to an encoder, all in one step.
    """

    policy: Policy = Policy.MIXED
    variants: tuple[str, ...] = ("a", "b", "c")
    capacity: int = 3
    sizes: Mapping[str, int] = field(default_factory=dict)
    num_blocks: int = 16
    block_tokens: int = 4
    limits: Limits = field(default_factory=Limits)
    patience: Patience = field(default_factory=Patience)
    load_s: float = 0.0
    has_encoder: bool = False

    def __post_init__(self) -> None:
        self.now_s = 0.0
        self.steps = 0
        self.blocks = BlockPool(self.num_blocks, self.block_tokens)
        self.scheduler = Scheduler(self.blocks, self.limits, self.policy)
        self.residency = Residency(self.fits, self.patience)
        device = cast(Any, Device(self))
        self.swapper = Swapper(self.residency, device, device, device, lambda swap, absent_since_s: None)
        self.dispatcher = Dispatcher(self.scheduler, self.swapper)
        self.live: dict[int, Sequence] = {}
        self.finished: list[Sequence] = []
        self.num_submitted = 0
        self.preemptions = 0
        self.served: dict[str, float] = dict.fromkeys(self.variants, 0.0)

    @property
    def cache_tokens(self) -> int:
        return self.num_blocks * self.block_tokens

    def fits(self, names: Collection[str]) -> bool:
        return sum(self.sizes.get(name, 1) for name in set(names)) <= self.capacity

    # Events

    def submit(self, variant: str, num_prompt: int, num_answer: int) -> Sequence:
        """A request arrives, cut to what the cache can hold, as the engine refuses longer ones."""
        num_prompt = min(num_prompt, self.cache_tokens - 1)
        room = self.cache_tokens - num_prompt
        if self.has_encoder:
            num_prompt = min(num_prompt, self.cache_tokens - self.block_tokens)
            room = (self.num_blocks - self.blocks.blocks_for(num_prompt)) * self.block_tokens - 1
        prompt = (1,) * num_prompt
        owner = Owner("bundle", variant, 0)
        sequence = Sequence(
            number=self.num_submitted,
            request=Request(
                request_id=str(self.num_submitted),
                variant=variant,
                prompt_ids=prompt,
                max_tokens=max(1, min(num_answer, room)),
            ),
            arrival_s=self.now_s,
            source_ids=prompt if self.has_encoder else (),
            tokens=[0] if self.has_encoder else list(prompt),
            num_prompt=1 if self.has_encoder else num_prompt,
            table=BlockTable(owner),
            cross_table=BlockTable(owner),
            sampler=Sampler(Sampling()),
            queued_s=self.now_s,
            is_encoded=not self.has_encoder,
        )
        self.num_submitted += 1
        self.live[sequence.number] = sequence
        self.residency.requested(variant, self.now_s)
        self.scheduler.submit(sequence)
        return sequence

    def cancel(self, sequence: Sequence) -> None:
        self.scheduler.remove(sequence)
        del self.live[sequence.number]
        assert not sequence.table.blocks
        assert not sequence.cross_table.blocks

    def pin(self, variant: str) -> bool:
        """As `Engine.pin`, which succeeds if there is room for every other variant beside the pinned ones."""
        has_room = all(self.fits({*self.residency.pinned, variant, other}) for other in self.variants)
        if has_room:
            self.residency.pin(variant)
        return has_room

    def preload(self) -> None:
        """As `Engine.preload`, all variants."""
        for variant in self.variants:
            self.swapper.ensure(variant, {}, self.now_s)

    def remove(self, variant: str) -> None:
        """As `Engine.remove_variant`; the variant is known again at once."""
        for sequence in [s for s in self.live.values() if s.variant == variant]:
            self.cancel(sequence)
        self.residency.unpin(variant)
        self.swapper.remove(variant, self.now_s)

    def bound_on_steps(self) -> int:
        """Steps of a tenth of a second in which everything that is there must end.

        Every step computes something, but for those in which variants move. Tokens are computed again after
        a preemption, at worst all for every single new one.
        """
        tokens = [len(s.tokens) + len(s.source_ids) + s.num_left for s in self.live.values()]
        return 20 + sum(n * n for n in tokens) + len(tokens) * len(self.variants) * self.moving_steps

    @property
    def moving_steps(self) -> int:
        """Steps of a tenth of a second that bringing in one variant may take, at the cost of a busy one.

        Somebody loses patience, the busy one may have been there for a moment only, all its sequences get a
        token, which may mean to compute all that the cache holds, the loading.
        """
        patience = self.patience
        drain_s = 0.0 if patience.drain_s == float("inf") else patience.drain_s
        moving_s = patience.patience_s + patience.min_hold_s + drain_s + self.load_s
        return int(10 * moving_s) + self.cache_tokens + self.limits.max_batch + 5

    def step(self, seconds: float = 0.1) -> StepPlan:
        """What `Engine.step` does, after so much time."""
        self.now_s += seconds
        self.steps += 1
        self._move_variants()
        before = {number: sequence.num_computed for number, sequence in self.live.items()}
        plan = self.dispatcher.plan(self.now_s)
        self.preemptions += len(plan.preempted)
        self._check_plan(plan, before)
        self.dispatcher.computed(plan)
        for work in plan.work:
            sequence = work.sequence
            for token in range(sequence.num_computed - work.num_tokens, sequence.num_computed):
                self.served[sequence.variant] += 1 if token < sequence.num_prompt else OUTPUT_COST
            if sequence.num_pending == 0:
                self._accept(sequence)
        self.verify_integrity()
        return plan

    def run_dry(self, max_steps: int, seconds: float = 0.1) -> None:
        """Nothing new arrives; everything ends within so many steps."""
        for _ in range(max_steps):
            if not self.live:
                return
            self.step(seconds)
        raise AssertionError(f"{len(self.live)} requests have not ended after {max_steps} steps")

    # Laws

    def verify_integrity(self) -> None:
        """Every request is in exactly one place, every block in at most one table."""
        held = list(self.scheduler.sequences())
        assert len(held) == len({id(sequence) for sequence in held}), "a sequence is in two places"
        assert {sequence.number for sequence in held} == self.live.keys(), "a sequence got lost"
        assert all(sequence.state is State.RUNNING for sequence in self.scheduler.running)
        self.blocks.verify_integrity([table for sequence in held for table in sequence.tables])
        for sequence in held:
            if sequence.state is State.WAITING:
                assert not sequence.table.blocks
                assert not sequence.cross_table.blocks
                assert sequence.num_computed == 0
        present = {*self.residency.residents, *filter(None, [self.residency.loading])}
        assert self.fits(present), "more variants than fit"
        if self.policy is Policy.FCFS:
            waiting = [s.number for s in held if s.state is State.WAITING]
            running = [s.number for s in self.scheduler.running]
            assert max(running, default=-1) < min(waiting, default=self.num_submitted), "overtaken"

    def _check_plan(self, plan: StepPlan, computed_before: Mapping[int, int]) -> None:
        sequences = [work.sequence for work in plan.work]
        assert len({s.number for s in sequences}) == len(sequences), "a sequence runs twice in a step"
        assert len(sequences) <= self.limits.max_batch
        assert not {s.number for s in plan.preempted} & {s.number for s in sequences}
        sources = [len(work.sequence.source_ids) for work in plan.work if work.encode]
        num_tokens = sum(work.num_tokens for work in plan.work) + sum(sources[1:])
        assert num_tokens <= self.limits.max_step_tokens, "over the step's budget"
        if len(sources) > 1:
            assert num_tokens + sources[0] <= self.limits.max_step_tokens, "a second encoder input too much"
        for work in plan.work:
            sequence = work.sequence
            assert sequence.state is State.RUNNING
            assert sequence.variant in self.residency.residents, "computes a variant that is not there"
            assert 1 <= work.num_tokens <= sequence.num_pending
            assert work.encode == (sequence.num_to_encode > 0)
            end = sequence.num_computed + work.num_tokens
            assert len(sequence.table.blocks) >= self.blocks.blocks_for(end), "tokens without a block"
            assert len(sequence.cross_table.blocks) == self.blocks.blocks_for(len(sequence.source_ids))
            if computed_before[sequence.number] == 0 and sequence.running_since_s == self.now_s:
                assert sequence.variant in self.residency.open_to, "admitted to a variant that drains"
        if self.policy is not Policy.MIXED:
            assert len({s.variant for s in sequences}) <= 1, "two variants in one step"
        if self.policy is not Policy.GROUPED:
            assert len(self.scheduler.running) <= self.limits.max_batch

    def _move_variants(self) -> None:
        draining = self._draining
        emptied = self.dispatcher.move_variants(self.now_s)
        self.preemptions += len(emptied)
        assert not {s.variant for s in emptied} & self.residency.pinned, "empties a pinned variant"
        assert not (self._draining - draining) & self.residency.pinned, "drains a pinned variant"

    @property
    def _draining(self) -> set[str]:
        residency = self.residency
        return {n for n in residency.residents if residency.presence(n) is Presence.DRAINING}

    def _accept(self, sequence: Sequence) -> None:
        sequence.tokens.append(1)
        sequence.last_token_s = self.now_s
        if sequence.first_token_s is None:
            sequence.first_token_s = self.now_s
        if sequence.num_left == 0:
            self.scheduler.remove(sequence)
            del self.live[sequence.number]
            self.finished.append(sequence)


VARIANTS = ("a", "b", "c", "d")


@st.composite
def worlds(draw: st.DrawFn, *policies: Policy, are_all_resident: bool = False) -> World:
    """Few and small blocks, so that preemption is the rule."""
    variants = VARIANTS[: draw(st.integers(2, 4))]
    sizes = {name: draw(st.sampled_from([1, 1, 2, 3])) for name in variants}
    most = sum(sizes.values())
    max_batch = draw(st.integers(1, 5))
    return World(
        policy=draw(st.sampled_from(policies or list(Policy))),
        variants=variants,
        capacity=most if are_all_resident else draw(st.integers(max(sizes.values()), most)),
        sizes=sizes,
        num_blocks=draw(st.integers(2, 12)),
        block_tokens=draw(st.integers(1, 5)),
        limits=Limits(
            max_batch=max_batch,
            max_step_tokens=max_batch + draw(st.integers(0, 12)),
            max_wait_s=draw(st.sampled_from([0.0, 1.0, 3.0])),
            quantum_s=draw(st.sampled_from([0.0, 0.5, 2.0])),
            shares=draw(st.dictionaries(st.sampled_from(VARIANTS), st.sampled_from([0.5, 3.0]), max_size=2)),
        ),
        patience=Patience(
            patience_s=draw(st.sampled_from([0.0, 1.0])),
            min_hold_s=draw(st.sampled_from([0.0, 1.0])),
            drain_s=draw(st.sampled_from([0.0, 0.3, 2.0])),
        ),
        load_s=draw(st.sampled_from([0.0, 0.15, 1.0])),
        has_encoder=draw(st.booleans()),
    )
