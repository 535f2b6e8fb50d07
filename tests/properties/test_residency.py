"""How long a variant that is not in device memory may have to wait, whatever the others ask for."""

from hypothesis import given, settings
from hypothesis import strategies as st

from moemerge.runner.policies import Policy
from moemerge.runner.residency import Presence
from tests.properties.test_scheduler import floods
from tests.properties.world import VARIANTS, World, worlds

steps_before = st.integers(0, 60)


@given(flood=floods(Policy.MIXED), before=steps_before)
@settings(max_examples=100)
def test_a_variant_that_somebody_waits_for_gets_its_turn(flood, before):
    """After each other variant at most once, however many requests those have."""
    world = flood.world
    for _ in range(before):
        flood.step()
    wanted = world.variants[-1]
    world.submit(wanted, 3, 3)
    bound = 2 * len(world.variants) * world.moving_steps
    flood.steps_until(lambda: wanted in world.residency.residents, bound)


@given(world=worlds(Policy.MIXED), pins=st.lists(st.sampled_from(VARIANTS), max_size=4), seed=st.data())
@settings(max_examples=100)
def test_pinning_at_any_moment_starves_nobody(world, pins, seed):
    """A variant that is pinned while it makes room for another one stays, and the other one gets room."""
    for pinned in pins:
        for variant in world.variants:
            world.submit(variant, 2, seed.draw(st.integers(1, 20)))
        for _ in range(seed.draw(st.integers(0, 10))):
            world.step()
        if pinned in world.variants and world.pin(pinned):
            assert world.residency.presence(pinned) is not Presence.DRAINING
    world.run_dry(world.bound_on_steps())


@given(world=worlds(Policy.MIXED), seed=st.data())
@settings(max_examples=50)
def test_what_is_idle_and_pinned_nowhere_can_always_be_replaced(world: World, seed):
    for _ in range(seed.draw(st.integers(1, 5))):
        variant = seed.draw(st.sampled_from(world.variants))
        world.submit(variant, 2, 2)
        world.run_dry(world.bound_on_steps())
        assert variant in world.residency.residents
        room = world.residency.find_room(world.variants[0], {}, world.now_s)
        assert room is not None
        if world.variants[0] not in world.residency.residents:
            assert world.fits([*(n for n in world.residency.residents if n not in room), world.variants[0]])
