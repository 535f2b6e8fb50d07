"""Whose tokens a step computes: examples of each rule; laws over random events are in the properties."""

import pytest

from moemerge.errors import InvalidRecipe
from moemerge.runner.limits import Limits
from moemerge.runner.policies import Policy
from tests.properties.world import World


def world(policy=Policy.MIXED, num_blocks=100, has_encoder=False, **limits):
    limits = {"max_batch": 4, "max_step_tokens": 16, "max_wait_s": 1e6, **limits}
    made = World(policy=policy, num_blocks=num_blocks, has_encoder=has_encoder, limits=Limits(**limits))
    made.preload()
    return made


def work_of(plan):
    return [(item.sequence.variant, item.num_tokens) for item in plan.work]


def test_prompts_are_computed_in_pieces_beside_the_answers_of_others():
    made = world()
    made.submit("a", 4, 9)
    assert work_of(made.step()) == [("a", 4)]
    made.submit("b", 40, 9)
    steps = [work_of(made.step()) for _ in range(4)]
    assert steps == [
        [("a", 1), ("b", 15)],
        [("a", 1), ("b", 15)],
        [("a", 1), ("b", 10)],
        [("a", 1), ("b", 1)],
    ]


def test_variants_share_a_step_or_do_not():
    for policy, expected in ((Policy.MIXED, {"a", "b"}), (Policy.GROUPED, {"a"}), (Policy.FCFS, {"a"})):
        made = world(policy)
        made.submit("a", 2, 5)
        made.submit("b", 2, 5)
        made.step()
        assert {name for name, _ in work_of(made.step())} == expected


def test_grouped_changes_variants_after_a_quantum_and_back():
    made = world(Policy.GROUPED, quantum_s=1.0)
    for name in ("a", "b", "c"):
        made.submit(name, 2, 99)
    turns = [work_of(made.step(0.5))[0][0] for _ in range(12)]
    assert turns == ["a", "a", "b", "b", "c", "c"] * 2


def test_grouped_goes_on_with_the_only_one_that_has_work():
    made = world(Policy.GROUPED, quantum_s=0.0)
    made.submit("a", 2, 5)
    assert [work_of(made.step()) for _ in range(3)] == [[("a", 2)], [("a", 1)], [("a", 1)]]


def test_fcfs_does_not_begin_with_the_next_variant_before_the_last_has_ended():
    made = world(Policy.FCFS)
    for name in ("a", "a", "b", "a"):
        made.submit(name, 2, 2)
    assert work_of(made.step()) == [("a", 2), ("a", 2)]
    assert work_of(made.step()) == [("a", 1), ("a", 1)]
    assert work_of(made.step()) == [("b", 2)]
    made.step()
    assert work_of(made.step()) == [("a", 2)]


def test_the_variant_that_got_least_is_admitted_next():
    made = world(max_batch=3)
    made.submit("b", 1, 99)
    made.submit("a", 8, 99)
    made.step()
    made.submit("a", 2, 9)
    made.submit("b", 2, 9)
    assert work_of(made.step()) == [("b", 1), ("a", 1), ("b", 2)]


def test_the_youngest_gives_its_blocks_to_the_oldest():
    made = world(num_blocks=4, max_batch=2)
    old = made.submit("a", 7, 9)
    young = made.submit("b", 7, 9)
    while not made.preemptions:
        made.step()
    assert old in made.scheduler.running
    assert young not in made.scheduler.running
    assert young.num_computed == 0
    assert len(young.tokens) > 7, "what was chosen is not forgotten"
    assert young.admitted_s is not None
    assert young.queued_s == made.now_s
    made.run_dry(100)


def test_nobody_is_let_in_while_one_that_runs_lacks_blocks():
    made = world(num_blocks=4, max_batch=4)
    made.submit("a", 8, 2)
    large = made.submit("b", 8, 9)
    small = made.submit("c", 1, 1)
    while large.num_computed < 8:
        plan = made.step()
        assert not (plan.preempted and small in [item.sequence for item in plan.work])
    made.run_dry(100)


def test_what_is_set_aside_together_keeps_its_order():
    made = world()
    together = [made.submit("a", 2, 9) for _ in range(3)]
    made.step()
    late = made.submit("a", 2, 9)
    assert made.scheduler.empty("a", made.now_s) == together
    assert [item.sequence for item in made.step().work] == [*together, late]


def test_an_overdue_variant_takes_the_place_of_the_most_served():
    made = world(max_batch=2, max_wait_s=1.0)
    first = made.submit("a", 2, 99)
    made.step(0.1)
    second = made.submit("b", 1, 99)
    made.step(0.1)
    late = made.submit("c", 2, 9)
    for _ in range(9):
        assert not made.step(0.1).preempted
    made.step(0.2)
    assert late in made.scheduler.running
    assert first not in made.scheduler.running
    assert second in made.scheduler.running


def test_an_encoder_input_is_read_in_one_step_that_it_may_have_for_itself():
    made = world(has_encoder=True)
    made.submit("a", 40, 5)
    made.submit("b", 3, 5)
    plan = made.step()
    assert [(item.sequence.variant, item.encode, item.num_tokens) for item in plan.work] == [("a", True, 1)]
    plan = made.step()
    assert [(item.sequence.variant, item.encode) for item in plan.work] == [("a", False), ("b", True)]


def test_demand_is_what_variants_ask_for():
    made = world(max_batch=1)
    made.submit("a", 6, 5)
    made.step()
    made.submit("b", 2, 5)
    made.step()
    made.submit("b", 2, 5)
    demand = made.scheduler.demand()
    assert (demand["a"].waiting, demand["a"].running, demand["a"].fresh) == (0, 1, 0)
    assert demand["a"].waiting_since_s == float("inf")
    assert demand["a"].remaining_tokens == 3 + 1
    assert (demand["b"].waiting, demand["b"].running) == (2, 0)
    assert demand["b"].waiting_since_s == pytest.approx(0.1)
    assert made.scheduler.waiting("b") == 2
    assert made.scheduler.waiting("c") == 0


def test_under_fcfs_only_the_first_in_line_waits():
    made = world(Policy.FCFS, max_batch=1)
    for name in ("a", "b", "c", "b"):
        made.submit(name, 2, 5)
    made.step()
    demand = made.scheduler.demand()
    assert {name for name, known in demand.items() if known.waiting} == {"b"}


@pytest.mark.parametrize(
    ("limits", "complaint"),
    [
        ({"max_batch": 0}, "max batch is 0"),
        ({"max_batch": 8, "max_step_tokens": 7}, "max step tokens is 7, expected at least max batch, 8"),
        ({"max_wait_s": -1.0}, "max wait"),
        ({"quantum_s": float("nan")}, "quantum"),
        ({"shares": {"a": -2.0}}, "share of a is -2.0"),
    ],
)
def test_limits_that_cannot_be_are_refused(limits, complaint):
    with pytest.raises(InvalidRecipe, match=complaint):
        Limits(**limits)
