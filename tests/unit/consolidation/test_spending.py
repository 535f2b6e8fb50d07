"""Which experts share, in which codes, when a budget is spent over several layers."""

import pytest

from moemerge.consolidation import spending
from moemerge.consolidation.evidence import LayerRecord, SlotRecord
from moemerge.consolidation.factors import Factors
from moemerge.consolidation.ladder import code_size, ladder_of
from moemerge.consolidation.spending import (
    Prices,
    predicted_loss,
    predicted_nats,
    spend,
    super_experts,
    trade_off,
)

SHAPES = {"gate": (64, 64), "up": (64, 64), "down": (64, 64)}
PLAIN_BYTES = 2 * 3 * 64 * 64
LADDER = ladder_of(SHAPES)
CODED = {"plain": 0.0, "8-bit": 0.005, "6-bit": 0.06, "5-bit": 0.25, "4-bit": 0.9, "3-bit": 4.0}
LEFT = {"1-bit": 0.3, "2-bit": 0.08, "3-bit": 0.02, "4-bit": 0.005, "rank-4": 0.9, "rank-16": 0.7}
FACTORS = Factors(CODED, CODED, LEFT, LEFT)
NAMES = ["a", "b", "c"]
SLOTS = 4


def slot_record(slot=0, *, probes=(1e-3,) * 3, near=0.02, far=0.02, largest=(1.0,) * 3):
    """Three experts of which the first two are `near` each other, and all of them `far` apart."""
    return SlotRecord(
        owners=[[(name, slot)] for name in NAMES],
        partitions=[[[0], [1], [2]], [[0, 1], [2]], [[0, 1, 2]]],
        shared={"0,1": ("mean", [near] * 2), "0,1,2": ("refit", [far] * 3)},
        probes=list(probes),
        largest=list(largest),
    )


def twins_record(slot=0, shared=0.003, probe=1e-3):
    """Two variants have the same expert, the third another one."""
    return SlotRecord(
        owners=[[("a", slot), ("b", slot)], [("c", slot)]],
        partitions=[[[0], [1]], [[0, 1]]],
        shared={"0,1": ("mean", [shared, shared])},
        probes=[probe, probe],
        largest=[1.0, 1.0],
    )


def layer_record(slots, index=0):
    return LayerRecord(index=index, factors=dict.fromkeys(NAMES, FACTORS), slots=slots)


def layers(count=2, **options):
    return [layer_record([slot_record(slot, **options) for slot in range(SLOTS)], n) for n in range(count)]


def prices(**importance):
    return Prices(ladder=LADDER, shapes=SHAPES, plain_bytes=PLAIN_BYTES, importance=importance)


def spend_ratio(records, ratio, given=None, names=NAMES):
    one = PLAIN_BYTES * sum(len(record.slots) for record in records)
    return spend(records, names, int(ratio * one), given or prices())


def damage(found):
    return {name: sum(by_layer.values()) for name, by_layer in found.damage.items()}


def experts(found):
    return [stored for layer in found.layers for stored in layer]


def stored_bytes(found):
    """Added up from what will be stored, a residual for every slot that has one."""
    return sum(
        code_size(stored.code, SHAPES, PLAIN_BYTES)
        + sum(
            code_size(code, SHAPES, 0) * len(refs)
            for refs, code in zip(stored.owners, stored.residuals, strict=True)
        )
        for stored in experts(found)
    )


@pytest.mark.parametrize("ratio", [0.3, 0.5, 0.75, 1, 1.5, 2, 3])
def test_budget_holds_and_bytes_add_up(ratio):
    found = spend_ratio(layers(), ratio)
    assert found.num_bytes == stored_bytes(found) <= ratio * PLAIN_BYTES * 2 * SLOTS
    for layer in found.layers:
        owned = sorted(ref for stored in layer for refs in stored.owners for ref in refs)
        assert owned == sorted((name, slot) for name in NAMES for slot in range(SLOTS))


def test_more_budget_loses_less_until_nothing_is_lost():
    losses = [sum(damage(spend_ratio(layers(), ratio)).values()) for ratio in (0.3, 0.5, 0.75, 1, 1.5, 2, 3)]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] == 0
    assert all(stored.code is None for stored in experts(spend_ratio(layers(), 3)))


def test_residuals_of_equal_experts_are_paid_for_each_slot_that_has_one():
    records = [layer_record([twins_record(slot) for slot in range(SLOTS)])]
    doubled = 0
    for ratio in (0.3, 0.4, 0.5, 0.6, 0.7):
        found = spend_ratio(records, ratio)
        assert found.num_bytes == stored_bytes(found) <= ratio * PLAIN_BYTES * SLOTS
        doubled += sum(stored.residuals[0] is not None for stored in experts(found))
    assert doubled > 0


def test_equal_experts_are_stored_once_and_lose_nothing():
    record = SlotRecord(
        owners=[[(name, 0) for name in NAMES]], partitions=[[[0]]], shared={}, probes=[1e-3], largest=[1.0]
    )
    found = spend_ratio([layer_record([record])], 1)
    assert damage(found) == dict.fromkeys(NAMES, 0.0)
    assert [(stored.operator, stored.code) for stored in experts(found)] == [("copy", None)]


def test_variant_that_gained_little_gets_its_share():
    """One that fine-tuning changed a tenth as much loses its gain to a tenth of the damage."""
    alike, found = spend_ratio(layers(), 0.6), spend_ratio(layers(), 0.6, prices(c=10.0))
    assert damage(found)["c"] < damage(alike)["c"]
    assert predicted_loss(found, "c", prices(c=10.0)) < predicted_loss(alike, "c", prices(c=10.0))


def test_worst_variant_is_helped(monkeypatch):
    """What two variants have in common is worth more to a plain sum than the expert of the third."""
    slots = [twins_record(slot, shared=1.0, probe=1e-3 * (1 + slot)) for slot in range(SLOTS)]
    records = [layer_record(slots, number) for number in range(2)]
    balanced = damage(spend_ratio(records, 0.6))
    monkeypatch.setattr(spending, "_BALANCING_ROUNDS", 1)
    summed = damage(spend_ratio(records, 0.6))
    assert summed["c"] > 1.25 * sum(summed.values()) / 3
    assert balanced["c"] < summed["c"]


def test_expert_far_from_its_siblings_gets_its_own_copy_and_they_share():
    found = spend_ratio(layers(near=1e-9, far=0.5), 2)
    for stored in experts(found):
        names = {name for refs in stored.owners for name, _ in refs}
        assert names in ({"a", "b"}, {"c"})
        assert stored.code is None
        assert stored.operator == ("mean" if len(names) == 2 else "copy")


def test_super_experts_stay_exact():
    records = layers()
    huge = slot_record(0, largest=(1000.0, 1.0, 1.0))
    records[1] = layer_record([huge, *records[1].slots[1:]], 1)
    assert super_experts(records, NAMES) == {(1, ("a", 0))}
    found = spend_ratio(records, 0.75)
    (own,) = [stored for stored in found.layers[1] if [("a", 0)] in stored.owners]
    assert (own.owners, own.operator, own.code, own.residuals) == ([[("a", 0)]], "copy", None, [None])
    others = [stored for stored in found.layers[0] if [("a", 0)] in stored.owners]
    assert all(stored.code is not None or len(stored.owners) > 1 for stored in others)


def test_experts_of_about_one_size_hold_no_super_expert():
    sizes = [(1.0 + number, 2.0, 20.0) for number in range(SLOTS)]
    records = [layer_record([slot_record(slot, largest=size) for slot, size in enumerate(sizes)])]
    assert super_experts(records, NAMES) == set()


@pytest.mark.parametrize("records", [layers(), [layer_record([twins_record(slot) for slot in range(3)])]])
def test_trade_off_goes_from_the_fewest_bytes_to_all_that_helps(records):
    points = trade_off(records, NAMES, prices(a=2.0))
    sizes = [size for size, _ in points]
    # What a variant's loss counts decides the way, not what is told of it.
    sums = [sum(loss.values()) + loss["a"] for _, loss in points]
    assert sizes == sorted(set(sizes))
    assert sums == sorted(sums, reverse=True)
    least, most = (spend(records, NAMES, allowed, prices(a=2.0)) for allowed in (0, None))
    assert [sizes[0], sizes[-1]] == [least.num_bytes, most.num_bytes]
    for (_, loss), bought in zip((points[0], points[-1]), (least, most), strict=True):
        for name in NAMES:
            expected = predicted_nats(bought, name, prices(a=2.0))
            assert loss[name] == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_trade_off_is_what_spending_buys():
    records = layers()
    for size, loss in trade_off(records, NAMES, prices(), num_points=8):
        bought = spend(records, NAMES, size, prices())
        found = sum(predicted_loss(bought, name, prices()) for name in NAMES)
        assert found <= sum(loss.values()) * (1 + 1e-9)
