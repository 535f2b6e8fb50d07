"""Shares that must be kept, devices that must hold, and what a missed share does to the next plan."""

from types import SimpleNamespace

import pytest

from moemerge.checkpoint.variants import open_variants
from moemerge.consolidation import spending
from moemerge.consolidation.budget import LEAST
from moemerge.consolidation.fitting import Device, budget_of
from moemerge.consolidation.gate import Gate, check_gate
from moemerge.consolidation.quality import Quality
from moemerge.consolidation.rounds import Lessons, Rounds, corrected, emphasised
from moemerge.consolidation.spending import Prices, least_bytes, predicted_loss, spend
from moemerge.errors import InvalidRecipe
from moemerge.refs import FolderRef
from tests.factories import write_siblings
from tests.unit.consolidation.test_spending import (
    LADDER,
    NAMES,
    PLAIN_BYTES,
    SHAPES,
    SLOTS,
    layer_record,
    layers,
    twins_record,
)


@pytest.mark.parametrize("share", [0, 1, -0.5, 1.5, 99])
def test_only_a_share_can_be_asked_for(share):
    for kind in ("floor", "mean"):
        with pytest.raises(InvalidRecipe, match="expected a share"):
            Gate(**{kind: share})


def test_gate_names_whoever_misses_it():
    gate = Gate(floor=0.9, mean=0.95)
    assert gate.missed({"a": 0.99, "b": 0.93}) == []
    told = "; ".join(gate.missed({"a": 0.99, "b": 0.85}))
    assert "variant b keeps 0.8500" in told
    assert "0.9200 of what they gained on average" in told
    assert "variant a" not in told


def test_excess_is_how_much_too_much_is_lost():
    gate = Gate(floor=0.9, mean=0.95)
    assert gate.excess({"a": 0.01, "b": 0.08}) == 0
    assert gate.excess({"a": 0.01, "b": 0.2}) == pytest.approx(0.1)
    assert gate.excess({"a": 0.1, "b": 0.1}) == pytest.approx(0.05)
    assert Gate().is_open
    assert Gate().excess({"a": 5.0}) == 0


def test_share_of_a_gain_that_is_not_known_is_refused():
    check_gate(Gate(), {})
    check_gate(Gate(floor=0.9), {"a": 0.1})
    with pytest.raises(InvalidRecipe, match="needs the base, and text"):
        check_gate(Gate(floor=0.9), {})


def prices(scale=1.0, **importance):
    return Prices(
        ladder=LADDER,
        shapes=SHAPES,
        plain_bytes=PLAIN_BYTES,
        importance=importance,
        correction=dict.fromkeys(NAMES, scale),
    )


@pytest.mark.parametrize("gate", [Gate(mean=0.9), Gate(floor=0.95), Gate(mean=0.97, floor=0.9)])
def test_least_bytes_keep_what_is_asked_for_and_fewer_do_not(gate):
    records, given = layers(), prices()
    least = least_bytes(records, NAMES, given, gate)
    lost = {}
    for name, allowed in (("kept", least), ("missed", int(0.98 * least))):
        found = spend(records, NAMES, allowed, given, gate)
        lost[name] = {variant: predicted_loss(found, variant, given) for variant in NAMES}
    assert gate.excess(lost["kept"]) == 0
    assert gate.excess(lost["missed"]) > 0
    assert least_bytes(records, NAMES, prices(scale=3.0), gate) > least


def test_floor_moves_bytes_to_the_variant_that_misses_it(monkeypatch):
    """Where losses are otherwise left as uneven as the sum wants them."""
    monkeypatch.setattr(spending, "_BALANCED", 10.0)
    slots = [twins_record(slot, shared=1.0, probe=1e-3 * (1 + slot)) for slot in range(SLOTS)]
    records, given = [layer_record(slots, number) for number in range(2)], prices()
    lost = {}
    for floor in (None, 0.999):
        found = spend(records, NAMES, int(0.6 * PLAIN_BYTES * 2 * SLOTS), given, Gate(floor=floor))
        lost[floor] = max(predicted_loss(found, name, given) for name in NAMES)
    assert lost[0.999] < lost[None]


def test_prediction_is_corrected_by_what_was_measured():
    qualities = {
        "a": Quality(damage={"measured": 0.02, "kl": 0.01}),
        "b": Quality(damage={"measured": -0.001, "kl": 0.005}),
        "c": Quality(),
    }
    predicted = {"a": 0.01, "b": 0.01, "c": 0.01}
    found = corrected({"a": 3.0}, predicted, qualities)
    # A little past what was measured over what was predicted.
    assert found == pytest.approx({"a": 3 * 2**1.1, "b": 0.5**1.1})
    extreme = {"a": Quality(damage={"measured": 9.0, "kl": 9.0})}
    assert corrected({}, {"a": 1e-9}, extreme)["a"] == pytest.approx(10)


def test_variant_that_loses_more_than_others_counts_more():
    found = emphasised({"a": 0.01, "b": 0.02, "c": 0.06})
    assert found == pytest.approx({"a": 1 / 3, "b": 2 / 3, "c": 2})


@pytest.mark.parametrize("family", ["mixtral", "switch_transformers"])
def test_device_leaves_what_variants_and_cache_do_not_take(family, tmp_path):
    _, folders = write_siblings(tmp_path, family)
    variants = open_variants({name: FolderRef(folder) for name, folder in folders.items()})
    others = sum(checkpoint.other_bytes for checkpoint in variants.variants.values())
    one, two = (budget_of(Device(text="10MB", batch=2, tokens=n), variants) for n in (100, 200))
    cache = one.limit - two.limit
    # Layers, heads and width of the tiny decoders; keys and values, in bf16.
    layers_, heads = (2, 2) if family == "mixtral" else (4, 4)
    assert cache == 2 * 100 * 2 * layers_ * heads * 8 * 2
    assert one.limit == 10_000_000 - others - cache
    assert one != LEAST
    with pytest.raises(InvalidRecipe, match="leaves nothing for experts"):
        budget_of(Device(text="1kB"), variants)
    with pytest.raises(InvalidRecipe, match="at least one sequence"):
        Device(text="1GB", batch=0)


def quality(kl, measured=None, kept=0.99):
    return Quality(
        damage={"kl": kl, "measured": kl if measured is None else measured, "gain_recovered": kept}
    )


def learn(number, lessons, qualities, gate=None, predicted=0.01, is_least=False):
    """What `Rounds` makes of a round; variants gained 1 nat each."""
    rounds = Rounds.__new__(Rounds)
    rounds.statistics = SimpleNamespace(gained=dict.fromkeys(qualities, 1.0))
    rounds.is_least = is_least
    plan = SimpleNamespace(predicted_damage=dict.fromkeys(qualities, predicted))
    return rounds._learn(number, gate or Gate(), lessons, plan, qualities)


def test_only_a_first_plan_that_came_out_uneven_is_made_again():
    uneven, even = {"a": quality(0.01), "b": quality(0.04)}, {"a": quality(0.03), "b": quality(0.03)}
    learnt = learn(0, Lessons(), uneven)
    assert learnt.emphasis == pytest.approx({"a": 0.4, "b": 1.6})
    assert learnt.score == pytest.approx(0.025 + 0.04)
    assert learn(0, Lessons(), even) is None
    assert learn(1, learnt, even) is None, "better than before"
    assert learn(1, Lessons(correction={"a": 2.0}), uneven) is None
    assert learn(0, Lessons(), {"a": Quality(), "b": Quality()}) is None, "nothing was measured"


def test_plan_that_did_better_is_made_again():
    uneven = {"a": quality(0.01), "b": quality(0.04)}
    learnt = learn(0, Lessons(), uneven)
    worse = learn(1, learnt, {"a": quality(0.09), "b": quality(0.02)})
    assert (worse.emphasis, worse.correction) == ({}, {})
    gate = Gate(mean=0.9)
    missed = learn(1, learnt, {"a": quality(0.01, kept=0.8), "b": quality(0.01, kept=0.8)}, gate)
    assert (missed.emphasis, missed.correction) == ({}, {}), "the first plan had passed"
    assert learn(1, learnt, {"a": quality(0.01), "b": Quality()}) is None, "one of them was not measured"


def test_missed_gate_corrects_predictions():
    learnt = learn(0, Lessons(), {"a": quality(0.02, kept=0.5)}, Gate(mean=0.9))
    assert learnt.correction == pytest.approx({"a": 2**1.1})


def test_where_the_least_bytes_are_wanted_fewer_are_tried_once():
    gate = Gate(mean=0.9, floor=0.8)
    # Divergence is as predicted, loss on the text is not.
    ample = {"a": quality(0.01, measured=0.004, kept=0.97), "b": quality(0.01, measured=-0.001, kept=0.98)}
    less = learn(0, Lessons(), ample, gate, is_least=True)
    assert less.is_less
    assert less.correction == pytest.approx({"a": 0.4, "b": 0.1})
    assert learn(0, Lessons(), ample, gate) is None, "a budget was given"
    foretold = {name: quality(0.01, measured=0.02, kept=0.97) for name in "ab"}
    assert learn(0, Lessons(), foretold, gate, is_least=True) is None, "no fewer bytes would come of it"
    assert learn(0, Lessons(), {"a": Quality(), "b": Quality()}, gate, is_least=True) is None
    assert learn(1, less, ample, gate, is_least=True) is None
    missed = {"a": quality(0.1, kept=0.88), "b": quality(0.1, kept=0.9)}
    back = learn(1, less, missed, gate, is_least=True)
    assert (back.correction, back.emphasis, back.is_less) == ({}, {}, False), "the first plan had passed"
    narrow = {"a": quality(0.01, kept=0.91), "b": quality(0.01, kept=0.91)}
    assert learn(0, Lessons(), narrow, gate, is_least=True) is None


@pytest.mark.parametrize(
    ("gate", "has_slack"),
    [
        (Gate(), False),
        (Gate(mean=0.9), True),
        (Gate(mean=0.95), False),
        (Gate(floor=0.9), True),
        (Gate(floor=0.94), False),
        (Gate(mean=0.9, floor=0.94), False),
    ],
)
def test_slack_is_what_is_not_lost_of_what_may_be(gate, has_slack):
    assert gate.has_slack({"a": 0.97, "b": 0.95}, 0.2) is has_slack
