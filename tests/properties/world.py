"""An engine without tensors: scheduler and residency, a clock that is set, and a loader that takes time.

What a step computes is only counted; a token is whatever comes next. Every event checks the laws that hold
at every moment.
"""

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from hypothesis import strategies as st

from moemerge.runner.blocks import BlockPool, BlockTable, Owner
from moemerge.runner.request import Request
from moemerge.runner.residency import Patience, Presence, Residency
from moemerge.runner.sampling import Sampler, Sampling
from moemerge.runner.scheduler import OUTPUT_COST, Limits, Policy, Scheduler, StepPlan
from moemerge.runner.sequence import Sequence, State


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
        self.live: dict[int, Sequence] = {}
        self.finished: list[Sequence] = []
        self.loading_until_s = 0.0
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
                request_id=str(self.num_submitted), variant=variant, prompt_ids=prompt, max_tokens=num_answer
            ),
            arrival_s=self.now_s,
            source_ids=prompt if self.has_encoder else (),
            tokens=[0] if self.has_encoder else list(prompt),
            num_prompt=1 if self.has_encoder else num_prompt,
            room=max(1, min(num_answer, room)),
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
            self.residency.begin_loading(variant)
            self.residency.loaded(variant, self.now_s)

    def remove(self, variant: str) -> None:
        """As `Engine.remove_variant`; the variant is known again at once."""
        for sequence in [s for s in self.live.values() if s.variant == variant]:
            self.cancel(sequence)
        if self.residency.loading == variant:
            self.residency.loaded(variant, self.now_s)
        if variant in self.residency.residents:
            self.residency.evicted(variant, self.now_s)
        self.residency.unpin(variant)

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
        plan = self.scheduler.plan(self.now_s, self.residency.residents, self.residency.open_to)
        self.preemptions += len(plan.preempted)
        self._check_plan(plan, before)
        self.scheduler.computed(plan)
        self.residency.computed({work.sequence.variant for work in plan.work})
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
        residency = self.residency
        if residency.loading is not None and self.now_s >= self.loading_until_s:
            residency.loaded(residency.loading, self.now_s)
        running = Counter(s.variant for s in self.scheduler.running)
        draining_before = [n for n in residency.residents if residency.presence(n) is Presence.DRAINING]
        moves = residency.plan(self.scheduler.demand(), self.now_s)
        for name in residency.residents:
            if residency.presence(name) is Presence.DRAINING and name not in draining_before:
                assert name not in residency.pinned, "drains a pinned variant"
        for name in moves.evict:
            assert name in residency.residents
            assert name not in residency.pinned, "evicts a pinned variant"
            assert not running[name], "evicts a variant whose sequences run"
            residency.evicted(name, self.now_s)
        if moves.load is not None:
            assert residency.presence(moves.load) is Presence.ABSENT
            residency.begin_loading(moves.load)
            self.loading_until_s = self.now_s + self.load_s
        if moves.empty is not None:
            assert moves.empty not in residency.pinned, "empties a pinned variant"
            self.preemptions += len(self.scheduler.empty(moves.empty, self.now_s))

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
