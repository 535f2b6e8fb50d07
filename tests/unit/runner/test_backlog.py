"""How many requests are taken, and what callers are told who are turned away."""

import pytest

from moemerge.errors import InvalidRecipe, Overloaded
from moemerge.runner.backlog import Backlog


def filled(count, *, max_queue=2, per_variant=None):
    backlog = Backlog(1, max_queue, per_variant)
    for _ in range(count):
        backlog.begin("a")
    return backlog


def test_full_when_the_batch_and_the_queue_are():
    backlog = filled(3)
    with pytest.raises(Overloaded, match="3 requests are unfinished") as refusal:
        backlog.check_room("b")
    assert refusal.value.scope == "server"
    backlog.end("a", 0.0)
    backlog.check_room("b")


def test_a_variant_may_have_a_bound_of_its_own():
    backlog = filled(2, per_variant=1)
    backlog.check_room("b")
    with pytest.raises(Overloaded, match="2 requests to variant a") as refusal:
        backlog.check_room("a")
    assert refusal.value.scope == "variant"


def test_those_turned_away_are_told_the_pace():
    """A request ends every 2 s: a tenth of 60 unfinished ones takes 12 s."""
    backlog = filled(70, max_queue=59)
    for number in range(10):
        backlog.end("a", 2.0 * number)
    with pytest.raises(Overloaded, match="60 requests") as refusal:
        backlog.check_room("a")
    assert refusal.value.retry_after_s == 12


@pytest.mark.parametrize("bounds", [(-1, None), (0, -1)])
def test_negative_bounds_are_refused(bounds):
    with pytest.raises(InvalidRecipe, match="negative"):
        Backlog(1, *bounds)
