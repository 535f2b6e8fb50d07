"""Laws of scheduling and residency, over random orders of events, without tensors and clocks.

`World` checks at every step what holds at every moment; here is what has to happen in the end.
"""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from moemerge.runner.fairness import OUTPUT_COST
from moemerge.runner.limits import Limits
from moemerge.runner.policies import Policy
from moemerge.runner.sequence import State
from tests.properties.world import World, worlds

sizes = st.integers(1, 30)


class AnyOrderOfEvents(RuleBasedStateMachine):
    """Requests come, are cancelled and are computed; variants are pinned, unpinned and removed."""

    @initialize(world=worlds())
    def begin(self, world):
        self.world = world

    @rule(data=st.data(), num_prompt=sizes, num_answer=sizes)
    def submit(self, data, num_prompt, num_answer):
        self.world.submit(data.draw(st.sampled_from(self.world.variants)), num_prompt, num_answer)

    @rule(count=st.integers(1, 8), seconds=st.sampled_from([0.01, 0.1, 1.0]))
    def step(self, count, seconds):
        for _ in range(count):
            self.world.step(seconds)

    @precondition(lambda self: self.world.live)
    @rule(data=st.data())
    def cancel(self, data):
        self.world.cancel(data.draw(st.sampled_from(list(self.world.live.values()))))

    @rule(data=st.data())
    def pin(self, data):
        self.world.pin(data.draw(st.sampled_from(self.world.variants)))

    @rule(data=st.data())
    def unpin(self, data):
        self.world.residency.unpin(data.draw(st.sampled_from(self.world.variants)))

    @rule(data=st.data())
    def remove(self, data):
        self.world.remove(data.draw(st.sampled_from(self.world.variants)))

    def teardown(self):
        """Whatever came before, everything ends."""
        if hasattr(self, "world"):
            self.world.run_dry(self.world.bound_on_steps())


TestAnyOrderOfEvents = AnyOrderOfEvents.TestCase
TestAnyOrderOfEvents.settings = settings(max_examples=150, stateful_step_count=30)


class Flood:
    """So many requests that the queue of the first variants never gets shorter."""

    def __init__(self, world: World, seed: int, length: int, largest: int) -> None:
        self.world = world
        self.length = length
        self.largest = largest
        self._random = random.Random(seed)
        self.step()

    def step(self) -> None:
        while len(self.world.live) < self.length:
            variant = self._random.choice(self.world.variants[:-1])
            self.submit(variant)
        self.world.step()

    def submit(self, variant: str):
        largest = self.largest
        return self.world.submit(variant, self._random.randint(1, largest), self._random.randint(1, largest))

    def steps_until(self, is_so, bound: float) -> None:
        for _ in range(int(bound) + 1):
            if is_so():
                return
            self.step()
        raise AssertionError(f"it is not so after {int(bound)} steps")


@st.composite
def floods(draw: st.DrawFn, *policies: Policy, are_all_resident: bool = False) -> Flood:
    world = draw(worlds(*policies, are_all_resident=are_all_resident))
    if are_all_resident:
        world.preload()
    flood = Flood(world, draw(st.integers(0, 99)), draw(st.integers(3, 30)), draw(st.sampled_from([3, 30])))
    for _ in range(draw(st.integers(0, 40))):
        flood.step()
    return flood


@given(flood=floods(), num_prompt=sizes, num_answer=st.integers(1, 3))
@settings(max_examples=100)
def test_a_request_ends_however_many_come_after_it(flood, num_prompt, num_answer):
    """Under `fcfs` after those before it, else after each variant's turns, as many as it has tokens."""
    world = flood.world
    request = world.submit(world.variants[-1], num_prompt, num_answer)
    turn = world.cache_tokens * world.limits.max_batch + world.moving_steps
    waits = 10 * (world.limits.max_wait_s + world.limits.quantum_s)
    bound = 4 * (num_answer + 1) * len(world.variants) * (turn + waits)
    if world.policy is Policy.FCFS:
        bound += flood.length * turn
    flood.steps_until(lambda: request.state is State.FINISHED, bound)


@given(flood=floods(Policy.MIXED, are_all_resident=True), num_prompt=sizes)
@settings(max_examples=100)
def test_an_overdue_request_of_an_idle_variant_is_admitted_soon(flood, num_prompt):
    """In a number of steps that does not depend on how many requests wait."""
    world = flood.world
    request = world.submit(world.variants[-1], num_prompt, 1)
    bound = 4 * len(world.variants) * (world.cache_tokens + world.limits.max_batch)
    flood.steps_until(lambda: request.admitted_s is not None, 10 * world.limits.max_wait_s + bound)


@given(max_batch=st.integers(1, 4), num_others=st.integers(1, 3), backlog=st.integers(0, 10))
@settings(max_examples=20)
def test_long_answers_of_others_keep_no_variant_out(max_batch, num_others, backlog):
    """After `max_wait_s`, or as many steps as there are others, one of them makes room."""
    *others, late = "abcd"[: num_others + 1]
    world = World(
        variants=(*others, late),
        capacity=4,
        num_blocks=10_000,
        limits=Limits(max_batch=max_batch, max_step_tokens=64, max_wait_s=1.0),
    )
    world.preload()
    for number in range(max_batch + backlog):
        world.submit(others[number % num_others], 4, 10_000)
    for _ in range(4):
        world.step()
    request = world.submit(late, 4, 1)
    for _ in range(10 + num_others + 2):
        world.step()
    assert request.admitted_s is not None


@given(
    seed=st.integers(0, 99),
    shares=st.tuples(*[st.sampled_from([0.5, 1.0, 2.0, 5.0])] * 2),
    max_batch=st.integers(1, 8),
    head_start=st.integers(0, 150),
)
@settings(max_examples=8)
def test_backlogged_variants_are_served_by_their_shares(seed, shares, max_batch, head_start):
    """Service over share differs by no more than what a full batch takes; nobody saves up for later."""
    share = dict(zip("ab", shares, strict=True))
    world = World(
        variants=("a", "b"),
        num_blocks=10_000,
        limits=Limits(max_batch=max_batch, max_step_tokens=64, max_wait_s=1e6, shares=share),
    )
    draw = random.Random(seed)

    def fill(*variants: str) -> None:
        for variant in variants:
            while world.scheduler.waiting(variant) <= max_batch:
                world.submit(variant, draw.randint(1, 20), draw.randint(1, 20))

    for _ in range(head_start):  # only `a` asks for something
        fill("a")
        world.step()
    before = world.served.copy()
    for _ in range(120):
        fill("a", "b")
        world.step()
        a, b = ((world.served[name] - before[name]) / share[name] for name in "ab")
        assert abs(a - b) <= max_batch * (20 + OUTPUT_COST * 20) / min(shares)
    assert not world.preemptions


@given(flood=floods(Policy.FCFS))
@settings(max_examples=30)
def test_fcfs_begins_answers_in_order_of_arrival(flood):
    for _ in range(200):
        flood.step()
    everybody = sorted([*flood.world.finished, *flood.world.live.values()], key=lambda s: s.number)
    admitted = [s.admitted_s for s in everybody if s.admitted_s is not None]
    assert admitted == sorted(admitted)
    assert all(s.admitted_s is not None for s in everybody[: len(admitted)])


@pytest.mark.parametrize("policy", list(Policy))
def test_more_requests_than_can_be_served_cause_no_thrashing(policy):
    """Waiting too long must not make everybody take everybody else's place."""
    world = World(
        policy=policy,
        num_blocks=500,
        limits=Limits(max_batch=16, max_step_tokens=64, max_wait_s=1.0),
    )
    flood = Flood(world, seed=1, length=200, largest=60)
    for _ in range(600):
        flood.step()
    assert world.preemptions <= 0.02 * len(world.finished)
