"""Which variants stay in memory: examples of each rule; laws over random events are in the properties."""

import pytest

from moemerge.errors import InvalidRecipe
from moemerge.runner.residency import Moves, Patience, Presence, Residency
from moemerge.runner.scheduler import Demand

LONG_AGO = float("-inf")


def waiting(since_s=0.0, running=0, remaining_tokens=0, fresh=0):
    return Demand(1, since_s, running, fresh, remaining_tokens)


def running(remaining_tokens=10, fresh=0):
    return Demand(running=1, fresh=fresh, remaining_tokens=remaining_tokens)


def residency(*residents, capacity=2, **patience):
    """Residents that have computed, loaded at second 0."""
    state = Residency(lambda names: len(set(names)) <= capacity, Patience(**patience))
    for name in residents:
        state.begin_loading(name)
        state.loaded(name, 0.0)
    state.computed(residents)
    return state


def test_nothing_moves_when_everybody_is_there_or_nobody_asks():
    state = residency("a", "b")
    assert state.plan({}, 5.0) == Moves()
    assert state.plan({"a": waiting(), "b": running()}, 5.0) == Moves()


def test_there_is_one_load_at_a_time_for_the_one_that_has_waited_longest():
    state = residency(capacity=3)
    demand = {"a": waiting(2.0), "b": waiting(1.0), "c": running()}
    assert state.plan(demand, 3.0) == Moves(load="b")
    state.begin_loading("b")
    assert state.presence("b") is Presence.LOADING
    assert state.plan(demand, 3.0) == Moves()
    state.loaded("b", 4.0)
    assert state.presence("b") is Presence.RESIDENT
    assert state.plan(demand, 4.0) == Moves(load="a")


def test_the_idle_variant_with_the_fewest_recent_requests_makes_room():
    state = residency("a", "b", half_life_s=10.0)
    for _ in range(5):
        state.requested("a", 0.0)
    state.requested("b", 60.0)
    assert state.popularity("a", 0.0) == 5.0
    assert state.popularity("a", 10.0) == pytest.approx(2.5)
    assert state.popularity("b", 60.0) > state.popularity("a", 60.0)
    assert state.plan({"c": waiting(60.0)}, 60.0) == Moves(evict=("a",), load="c")


def test_a_variant_that_has_just_come_stays_unless_patience_is_over():
    state = residency("a", capacity=1, min_hold_s=3.0, patience_s=1.0)
    assert state.plan({"b": waiting(0.5)}, 1.0) == Moves()
    assert state.plan({"b": waiting(0.5)}, 1.5) == Moves(evict=("a",), load="b")
    assert state.plan({"b": waiting(2.9)}, 3.0) == Moves(evict=("a",), load="b")


@pytest.mark.parametrize("demand", [running(), waiting(), waiting(running=1)])
def test_a_variant_with_work_is_not_set_aside(demand):
    state = residency("a", capacity=1, patience_s=5.0)
    assert state.plan({"a": demand, "b": waiting()}, 4.0) == Moves()
    assert state.presence("a") is Presence.RESIDENT


def test_when_all_are_busy_the_one_with_the_least_left_drains():
    state = residency("a", "b", patience_s=1.0, drain_s=2.0)
    demand = {"a": running(5), "b": running(7), "c": waiting()}
    assert state.plan(demand, 1.0) == Moves()
    assert state.presence("a") is Presence.DRAINING
    assert state.open_to == ["b"]
    assert set(state.residents) == {"a", "b"}, "it computes on"
    demand["a"] = waiting()  # what waits for it does not keep it
    assert state.plan(demand, 1.5) == Moves(evict=("a",), load="c")


def test_draining_ends_by_preemption_but_not_before_everybody_got_a_token():
    state = residency("a", capacity=1, patience_s=1.0, drain_s=2.0)
    assert state.plan({"a": running(), "b": waiting()}, 1.0) == Moves()
    assert state.plan({"a": running(), "b": waiting()}, 2.9) == Moves()
    assert state.plan({"a": running(fresh=1), "b": waiting()}, 3.0) == Moves()
    assert state.plan({"a": running(), "b": waiting()}, 3.1) == Moves(empty="a")
    assert state.plan({"a": waiting(), "b": waiting()}, 3.2) == Moves(evict=("a",), load="b")


def test_nobody_drains_any_more_when_nobody_waits():
    state = residency("a", capacity=1, patience_s=1.0)
    state.plan({"a": running(), "b": waiting()}, 1.0)
    assert state.presence("a") is Presence.DRAINING
    assert state.plan({"a": running()}, 1.1) == Moves()
    assert state.presence("a") is Presence.RESIDENT


def test_a_variant_that_has_computed_nothing_yet_does_not_drain():
    state = residency(capacity=1, patience_s=0.0, min_hold_s=0.0)
    state.begin_loading("a")
    state.loaded("a", 0.0)
    demand = {"a": waiting(), "b": waiting()}
    assert state.plan(demand, 9.0) == Moves()
    assert state.presence("a") is Presence.RESIDENT
    state.computed(["a"])
    state.plan(demand, 9.1)
    assert state.presence("a") is Presence.DRAINING


def test_pinned_variants_stay_and_the_others_take_turns():
    state = residency("a", "b", patience_s=0.0, min_hold_s=0.0)
    state.pin("a")
    demand = {"a": running(1), "b": running(99), "c": waiting()}
    state.plan(demand, 1.0)
    assert state.presence("b") is Presence.DRAINING
    state.unpin("a")
    state.pin("b")
    assert state.presence("b") is Presence.RESIDENT, "who is pinned does not drain any more"
    state.plan(demand, 1.1)
    assert state.presence("a") is Presence.DRAINING


def test_as_many_go_as_it_takes():
    sizes = {"a": 1, "b": 1, "c": 1, "big": 3}
    state = Residency(lambda names: sum(sizes[n] for n in set(names)) <= 3, Patience(patience_s=0.0))
    for name in "abc":
        state.begin_loading(name)
        state.loaded(name, 0.0)
    state.computed("abc")
    assert set(state.find_room("big", {}, 5.0)) == {"a", "b", "c"}
    demand = {"a": running(3), "b": running(9), "big": waiting()}
    assert state.find_room("big", demand, 5.0) is None
    for gone, others in (("a", "b"), ("b", "")):  # one after the other
        for now_s in (6.0, 6.1):
            state.plan(demand, now_s)
        assert state.presence(gone) is Presence.DRAINING
        assert all(state.presence(other) is Presence.RESIDENT for other in others)
        del demand[gone]
    assert set(state.plan(demand, 8.0).evict) == {"a", "b", "c"}


def test_who_was_set_aside_waits_anew():
    """However old its requests are: those of the others have not been heard at all."""
    state = residency("a", capacity=1, patience_s=0.0, min_hold_s=0.0)
    demand = {"a": waiting(0.0), "b": waiting(1.0), "c": waiting(2.0)}
    state.evicted("a", 5.0)
    assert state.absent_since_s("a") == 5.0
    assert state.absent_since_s("b") == LONG_AGO
    assert state.plan(demand, 5.0).load == "b"
    for name in ("b", "c"):
        state.begin_loading(name)
        state.loaded(name, 6.0)
        state.evicted(name, 7.0 if name == "b" else 8.0)
        demand[name] = waiting(0.0)
    assert state.plan(demand, 9.0).load == "a"


def test_a_load_that_failed_may_be_tried_again():
    state = residency()
    state.begin_loading("a")
    state.failed("a")
    assert state.presence("a") is Presence.ABSENT
    assert state.plan({"a": waiting()}, 1.0) == Moves(load="a")


@pytest.mark.parametrize("name", ["patience_s", "min_hold_s", "drain_s", "half_life_s"])
def test_times_are_not_negative(name):
    for value in (-1.0, float("nan")):
        with pytest.raises(InvalidRecipe, match=name):
            Patience(**{name: value})
    with pytest.raises(InvalidRecipe, match="half_life_s"):
        Patience(half_life_s=0.0)
