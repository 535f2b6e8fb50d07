"""Laws of plans by measured cost, on tiny families: budgets, equal variants, and the order of slots."""

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from moemerge.bundle.verify import verify_bundle
from moemerge.checkpoint.tensors import TensorReader
from moemerge.checkpoint.variants import open_variants
from moemerge.consolidation.evidence import LayerRecord, SlotRecord, slot_groups
from moemerge.consolidation.factors import Factors
from moemerge.consolidation.ladder import code_size, ladder_of
from moemerge.consolidation.layers import measure_costs, measure_layers, passing_steps
from moemerge.consolidation.measured import NoiseStatistics
from moemerge.consolidation.pipeline import merge
from moemerge.consolidation.planning import build_measured_plan, plan_variants
from moemerge.consolidation.spending import Prices, spend
from moemerge.consolidation.task import options_of
from moemerge.refs import FolderRef
from tests.factories import edit_tensors, write_checkpoint, write_siblings

NAMES = ["a", "b", "c"]
SHAPES = {"gate": (64, 64), "up": (64, 64), "down": (64, 64)}
PLAIN_BYTES = 2 * 3 * 64 * 64
LADDER = ladder_of(SHAPES)
damages = st.floats(0, 1e3, allow_subnormal=False)


@st.composite
def slots(draw):
    """Three variants, some with equal experts, and whatever sharing may cost."""
    equal = draw(st.sampled_from([[["a"], ["b"], ["c"]], [["a", "c"], ["b"]], [["a", "b", "c"]]]))
    numbers = list(range(len(equal)))
    partitions = [[[n] for n in numbers]]
    if len(numbers) == 3:
        partitions.append([[0, 2], [1]])
    if len(numbers) > 1:
        partitions.append([numbers])
    clusters = [n for partition in partitions for n in partition if len(n) > 1]
    return SlotRecord(
        owners=[[(name, 0) for name in names] for names in equal],
        partitions=partitions,
        shared={",".join(map(str, n)): ("mean", [draw(damages) for _ in n]) for n in clusters},
        probes=[draw(damages) for _ in numbers],
        largest=[draw(damages) for _ in numbers],
    )


@st.composite
def records(draw):
    one = st.fixed_dictionaries({name: st.floats(0, 5) for name in LADDER.pool})
    left = st.fixed_dictionaries({name: st.floats(0, 1) for name in LADDER.residuals if name != "none"})
    layer = draw(st.lists(slots(), min_size=1, max_size=3))
    factors = {}
    for name in NAMES:
        own, pool = ({**draw(one), "plain": 0.0} for _ in range(2))
        factors[name] = Factors(own, pool, draw(left), draw(left))
    return LayerRecord(index=draw(st.integers(0, 3)), factors=factors, slots=layer)


@settings(max_examples=40)
@given(records(), st.floats(0.2, 3), st.lists(st.floats(0.1, 50), min_size=3, max_size=3))
def test_whatever_was_measured_bytes_add_up_within_the_budget(record, ratio, importance):
    given_prices = Prices(
        ladder=LADDER,
        shapes=SHAPES,
        plain_bytes=PLAIN_BYTES,
        importance=dict(zip(NAMES, importance, strict=True)),
    )
    allowed = int(ratio * PLAIN_BYTES * len(record.slots))
    found = spend([record], NAMES, allowed, given_prices)
    total = 0
    for stored in found.layers[0]:
        total += code_size(stored.code, SHAPES, PLAIN_BYTES)
        for refs, code in zip(stored.owners, stored.residuals, strict=True):
            total += len(refs) * code_size(code, SHAPES, 0)
    assert found.num_bytes == total
    least = spend([record], NAMES, 0, given_prices).num_bytes
    assert total <= max(allowed, least)
    owned = sorted(name for stored in found.layers[0] for refs in stored.owners for name, _ in refs)
    assert owned == sorted(NAMES * len(record.slots))
    assert all(value >= 0 for by_layer in found.damage.values() for value in by_layer.values())


def plan_of(folders, budget, reader):
    variants = open_variants({name: FolderRef(folder) for name, folder in folders.items()})
    statistics = NoiseStatistics(variants)
    with passing_steps() as steps:
        layers = measure_layers(variants, steps=steps)
        found = measure_costs(layers, variants, statistics, steps=steps)
    plan = build_measured_plan(variants, found, options_of(budget, "measured"), statistics, reader)
    return layers, found, plan


def move_slots(folder, orders):
    """The same model with its experts in other slots: entry e of a layer's order says who takes slot e."""

    def edit(tensors):
        before = dict(tensors)
        for layer, order in enumerate(orders):
            block = f"model.layers.{layer}.block_sparse_moe"
            tensors[f"{block}.gate.weight"] = before[f"{block}.gate.weight"][torch.tensor(order)].clone()
            for slot, source in enumerate(order):
                for part in ("w1", "w2", "w3"):
                    tensors[f"{block}.experts.{slot}.{part}.weight"] = before[
                        f"{block}.experts.{source}.{part}.weight"
                    ]

    edit_tensors(folder / "model.safetensors", edit)


@pytest.mark.parametrize("moved", ["a", "b"])
def test_moving_a_variants_slots_changes_neither_bytes_nor_damage(moved, tmp_path):
    _, folders = write_siblings(tmp_path, names=("a", "b"))
    moments = random.Random(3)
    orders = [moments.sample(range(4), 4) for _ in range(2)]
    with TensorReader() as reader:
        layers, before, plan = plan_of(folders, "0.7x", reader)
    move_slots(folders[moved], orders)
    with TensorReader() as reader:
        other_layers, after, other = plan_of(folders, "0.7x", reader)
    for layer, other_layer, order in zip(layers, other_layers, orders, strict=True):
        expected = {
            frozenset((n, order.index(slot) if n == moved else slot) for refs in group for n, slot in refs)
            for group in slot_groups(layer)
        }
        assert {frozenset(ref for refs in g for ref in refs) for g in slot_groups(other_layer)} == expected
    for one, two in zip(before, after, strict=True):
        assert sorted(p for slot in one.slots for p in slot.probes) == pytest.approx(
            sorted(p for slot in two.slots for p in slot.probes), rel=1e-3
        )
    assert (plan.pool_bytes, plan.residual_bytes) == (other.pool_bytes, other.residual_bytes)
    assert other.predicted_damage == pytest.approx(plan.predicted_damage, rel=1e-3)


def test_copies_of_one_variant_lose_nothing_in_the_bytes_of_one(tmp_path):
    base = write_checkpoint(tmp_path / "base")
    variants = open_variants({name: FolderRef(base) for name in NAMES})
    plan = plan_variants(variants, options_of("1x", "measured"))
    assert plan.predicted_damage == dict.fromkeys(NAMES, 0.0)
    assert plan.stored_bytes == plan.variant_bytes
    assert not plan.has_codes


@pytest.mark.parametrize("budget", ["1x", "2x"])
def test_variants_of_two_dtypes_take_the_bytes_that_the_plan_says(budget, tmp_path):
    base = write_checkpoint(tmp_path / "base")
    wide = write_checkpoint(tmp_path / "a", base=base, noise=0.1, seed=1, dtype="F32")
    narrow = write_checkpoint(tmp_path / "b", base=base, noise=0.1, seed=2)
    variants = open_variants({"a": FolderRef(wide), "b": FolderRef(narrow)})
    plan = plan_variants(variants, options_of(budget, "measured"))
    merge(variants, tmp_path / "duo.moe", plan)
    verify_bundle(tmp_path / "duo.moe")
    files = [path for part in ("pool", "residuals") for path in (tmp_path / "duo.moe" / part).rglob("*.*")]
    stored = sum(tensor.nbytes for path in files for tensor in load_file(path).values())
    assert stored == plan.stored_bytes


def test_variant_far_from_its_siblings_shares_with_none_where_bytes_allow_it(tmp_path):
    base, folders = write_siblings(tmp_path, names=("a", "b"), noise=1e-4, dtype="F32")
    folders["c"] = write_checkpoint(tmp_path / "c", base=base, noise=1.0, seed=9, dtype="F32")
    variants = open_variants({name: FolderRef(folder) for name, folder in folders.items()})
    plan = plan_variants(variants, options_of("2x", "measured"))
    kinds = [{name for name, _ in expert.members} for layer in plan.layers for expert in layer.pool]
    assert all(kind in ({"a", "b"}, {"a"}, {"b"}, {"c"}) for kind in kinds)
    assert kinds.count({"c"}) == len(plan.layers) * plan.num_slots
    assert {"a", "b"} in kinds


@pytest.mark.parametrize("budget", ["1x", "1.5x", "2.5x"])
def test_copies_of_one_variant_lose_nothing_at_any_budget_that_holds_one(budget, tmp_path):
    base = write_checkpoint(tmp_path / "base")
    variants = open_variants({name: FolderRef(base) for name in NAMES})
    merged = merge(variants, tmp_path / "trio.moe", options_of(budget))
    assert merged.manifest.pool_bytes == merged.manifest.variant_bytes
    assert merged.manifest.residual_bytes == 0
    for entry in merged.manifest.variants.values():
        assert all(error == 0 for errors in entry.errors.values() for error in errors)
