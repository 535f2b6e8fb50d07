"""Which replica answers: laws of the choice, and what it comes to in the simulation."""

import random
from types import SimpleNamespace

import pytest

from moemerge.runner.metrics import Snapshot, StepFigures, VariantFigures, VariantState


@pytest.fixture(scope="module")
def routing():
    from moemerge.distributed import routing

    return routing


def loads_of(routing, *residents, rows=2):
    found = {}
    for number, names in enumerate(residents):
        found[number] = routing.Load(rows=rows)
        for name in names:
            found[number].use(name)
    return found


def test_resident_variant_is_answered_where_it_is(routing):
    loads = loads_of(routing, ["a", "b"], ["c", "d"])
    assert [routing.rank(name, loads)[0] for name in "abcd"] == [0, 0, 1, 1]


def test_queue_longer_than_a_swap_spills_to_the_least_loaded(routing):
    loads = loads_of(routing, ["a"], ["b"], ["c"])
    loads[0].queued["x"] = loads[0].swap_tokens
    loads[1].queued["y"] = 1
    assert routing.rank("a", loads)[0] == 0
    loads[0].queued["x"] += 1
    assert routing.rank("a", loads) == [2, 0, 1]


def test_what_a_replica_says_counts_when_others_send_to_it_too(routing):
    loads = loads_of(routing, ["a"], ["a"])
    loads[0].told = 10
    assert routing.rank("a", loads) == [1, 0]


def test_new_variant_takes_free_rows_first(routing):
    loads = loads_of(routing, ["a", "b"], ["c"])
    assert routing.rank("d", loads)[0] == 1


def test_rows_keep_the_variants_used_last(routing):
    load = routing.Load(rows=2)
    for name in "abac":
        load.use(name)
    assert list(load.residents) == ["a", "c"]


def test_swap_counts_twice_what_could_have_been_computed_meanwhile(routing):
    figures = VariantFigures(swaps=4, swap_seconds=2.0)
    state = VariantState(figures=figures, state="resident", pinned=False, waiting=0, running=0)
    snapshot = Snapshot(
        variants={"a": state},
        steps=StepFigures(steps=1, tokens=300, seconds=3.0),
        **dict.fromkeys(
            ("blocks_used", "blocks_total", "block_tokens", "pool_bytes", "resident_bytes", "shared_bytes"), 0
        ),
        expert_hits=0,
        expert_misses=0,
    )
    assert routing.swap_tokens_of(snapshot, step_tokens=64) == 2 * 0.5 * 100
    assert routing.swap_tokens_of(snapshot, step_tokens=512) == 512


def test_four_variants_on_two_replicas_of_two_rows_settle(routing):
    loads, draws = loads_of(routing, [], []), random.Random(0)
    swaps = 0
    for _ in range(200):
        (name,) = draws.choices("abcd", weights=[1, 1 / 2, 1 / 3, 1 / 4])
        best = loads[routing.rank(name, loads)[0]]
        swaps += name not in best.residents
        best.use(name)
    assert swaps == 4


@pytest.mark.parametrize(("queued", "wanted"), [({}, 1), ({"a": 1.0}, 1), ({"a": 16384.0, "b": 1.0}, 2)])
def test_number_of_replicas_follows_queued_tokens(queued, wanted):
    from moemerge.distributed.deployment import scale
    from moemerge.distributed.replica import QUEUED_TOKENS

    context = SimpleNamespace(aggregated_metrics={QUEUED_TOKENS: queued} if queued else {})
    assert scale(context) == (wanted, {})
