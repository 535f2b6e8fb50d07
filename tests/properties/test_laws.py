"""Laws of consolidation, over generated families, budgets and policies."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moemerge.bundle.export import export_variant
from moemerge.bundle.manifest import dump_manifest, read_manifest
from moemerge.bundle.reader import open_bundle
from moemerge.bundle.verify import verify_bundle
from moemerge.checkpoint.variants import VariantSet, open_variants
from moemerge.consolidation.pipeline import Merged, merge
from moemerge.consolidation.plan import dump_plan, read_plan, write_plan
from moemerge.consolidation.planning import plan_variants
from moemerge.consolidation.policies import POLICIES
from moemerge.consolidation.task import options_of
from moemerge.refs import FolderRef
from tests.e2e.program import tree
from tests.factories import edit_tensors, read_canonical, write_checkpoint

NAMES = ("a", "b", "c")
ROUTER = "block_sparse_moe.gate.weight"

variant_options = st.fixed_dictionaries(
    {
        "layout": st.sampled_from(["per_expert", "stacked"]),
        "shard_bytes": st.sampled_from([None, 20_000]),
        "dtype": st.sampled_from(["BF16", "F32", "F16"]),
        "vocab": st.sampled_from([64, 66, 96]),
        "noise": st.sampled_from([0.0, 1e-3, 0.3]),
        "generation": st.sampled_from(["4", "5"]),
    }
)
switch_options = variant_options.map(lambda options: {**options, "layout": "per_expert"})


@st.composite
def families(draw: st.DrawFn) -> dict[str, Any]:
    """What a family of two or three checkpoints is made of; the tying of heads is common to all."""
    model_type = draw(st.sampled_from(["mixtral", "mixtral", "switch_transformers", "telechat_moe"]))
    options = variant_options if model_type == "mixtral" else switch_options
    return {
        "model_type": model_type,
        "tied": draw(st.booleans()),
        "variants": draw(st.lists(options, min_size=2, max_size=3)),
        # Only some experts differ, so that some are equal across variants.
        "partly": draw(st.booleans()),
    }


budgets = st.sampled_from(["exact", "1x", "1.3x", "1.5x", "2x", "3x"])
policies = st.sampled_from(sorted(POLICIES))


@contextmanager
def temporary_folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


def write_family(folder: Path, family: dict[str, Any]) -> VariantSet:
    base = write_checkpoint(folder / "base", family["model_type"], tied=family["tied"], dtype="F32")
    only = (lambda name: "experts.0." in name) if family["partly"] else None
    for seed, (name, options) in enumerate(zip(NAMES, family["variants"], strict=False), start=1):
        write_checkpoint(folder / name, base=base, seed=seed, only=only, **options)
    names = NAMES[: len(family["variants"])]
    return open_variants({name: FolderRef(folder / name) for name in names})


def merge_at(variants: VariantSet, target: Path, budget: str, policy: str | None = None) -> Merged:
    return merge(variants, target, options_of(budget, policy, within=False))


@given(family=families())
@settings(max_examples=12)
def test_identity_plan_reproduces_every_variant_bit_for_bit(family):
    with temporary_folder() as folder:
        variants = write_family(folder, family)
        merged = merge_at(variants, folder / "exact.moe", "exact")
        assert merged.manifest.pool_bytes <= sum(v.expert_bytes for v in variants.variants.values())
        bundle = verify_bundle(folder / "exact.moe")
        for name in variants.variants:
            export_variant(bundle, name, folder / f"{name}-again", shard_bytes=50_000)
            before, after = read_canonical(folder / name), read_canonical(folder / f"{name}-again")
            assert before.keys() == after.keys()
            for key in before:
                assert before[key].dtype == after[key].dtype
                assert before[key].view(torch.uint8).equal(after[key].view(torch.uint8)), key


@given(family=families(), budget=budgets, policy=policies)
@settings(max_examples=15)
def test_budget_holds_and_every_slot_has_one_pool_expert(family, budget, policy):
    with temporary_folder() as folder:
        variants = write_family(folder, family)
        merged = merge_at(variants, folder / "x.moe", budget, policy)
        bundle = verify_bundle(folder / "x.moe")
        stored = [tensor for layer in bundle.manifest.layers for tensor in pool_tensors(bundle, layer.index)]
        assert sum(tensor.nbytes for tensor in stored) == merged.manifest.pool_bytes
        allowed = merged.plan.allowed_bytes
        assert allowed is None or merged.manifest.pool_bytes <= allowed
        for name, entry in bundle.manifest.variants.items():
            for layer in merged.plan.layers:
                claims = [(name, slot) for slot in range(bundle.manifest.num_slots)]
                owners = [
                    [index for index, planned in enumerate(layer.pool) if claim in planned.members]
                    for claim in claims
                ]
                assert owners == [[index] for index in entry.maps[layer.index]]


def pool_tensors(bundle, layer_index):
    return [tensor for parts in bundle.pool(layer_index) for tensor in parts.values()]


@given(family=families(), budget=budgets, policy=policies)
@settings(max_examples=8)
def test_plan_and_manifest_survive_a_round_trip_and_repeat_to_the_byte(family, budget, policy):
    with temporary_folder() as folder:
        variants = write_family(folder, family)
        options = options_of(budget, policy, within=False)
        plan = plan_variants(variants, options)
        write_plan(plan, folder / "plan.json")
        assert read_plan(folder / "plan.json") == plan
        merged = merge_at(variants, folder / "one" / "x.moe", budget, policy)
        assert merged.plan == plan
        assert read_manifest(folder / "one" / "x.moe") == merged.manifest
        text = (folder / "one" / "x.moe" / "moemerge.json").read_text()
        assert dump_manifest(merged.manifest) == text
        merge_at(variants, folder / "two" / "x.moe", budget, policy)
        assert tree(folder / "one" / "x.moe") == tree(folder / "two" / "x.moe")
        assert dump_plan(plan_variants(variants, options)) == dump_plan(plan)


@given(family=families(), count=st.integers(1, 4), budget=budgets, policy=policies)
@settings(max_examples=10)
def test_copies_of_one_checkpoint_take_the_bytes_of_one_and_lose_nothing(family, count, budget, policy):
    with temporary_folder() as folder:
        write_checkpoint(folder / "one", family["model_type"], tied=family["tied"])
        variants = open_variants({f"copy{number}": FolderRef(folder / "one") for number in range(count)})
        merged = merge_at(variants, folder / "x.moe", budget, policy)
        assert merged.manifest.pool_bytes == variants.first.expert_bytes
        for entry in merged.manifest.variants.values():
            assert not any(error for errors in entry.errors.values() for error in errors)
        bundle = open_bundle(folder / "x.moe")
        if count > 1:
            assert not list((folder / "x.moe" / "variants").rglob("*.safetensors"))
        export_variant(bundle, f"copy{count - 1}", folder / "again")
        before, after = read_canonical(folder / "one"), read_canonical(folder / "again")
        assert all(before[key].equal(after[key]) for key in before)


@given(seed=st.integers(0, 100), dtype=st.sampled_from(["BF16", "F32", "F16"]))
@settings(max_examples=6)
def test_mean_of_equal_experts_is_that_expert(seed, dtype):
    """The same values in another dtype are not the same bytes, so that they are averaged indeed."""
    with temporary_folder() as folder:
        write_checkpoint(folder / "a", seed=seed, dtype=dtype)
        write_checkpoint(folder / "b", base=folder / "a", dtype="F32")
        write_checkpoint(folder / "c", base=folder / "a", dtype="F32")
        edit_tensors(folder / "c" / "model.safetensors", shift_first_value)
        variants = open_variants({name: FolderRef(folder / name) for name in NAMES})
        merge_at(variants, folder / "x.moe", "1x", "mean")
        export_variant(open_bundle(folder / "x.moe"), "b", folder / "again")
        before, after = read_canonical(folder / "a"), read_canonical(folder / "again")
        for key in before:
            if key.startswith("experts."):
                assert before[key].float().view(-1)[1:].allclose(after[key].float().view(-1)[1:], rtol=1e-6)


def shift_first_value(tensors):
    for name in tensors:
        if ".experts." in name:
            tensors[name].view(-1)[0] += 1


@given(order=st.permutations(range(4)), budget=budgets)
@settings(max_examples=8)
def test_order_of_slots_changes_neither_bytes_nor_clusters(order, budget):
    with temporary_folder() as folder:
        write_checkpoint(folder / "base", dtype="F32")
        for seed, name in enumerate(NAMES):
            write_checkpoint(folder / name, base=folder / "base", noise=0.1, seed=seed)
        plain = plan_for(folder, budget)
        edit_tensors(folder / "b" / "model.safetensors", lambda tensors: permute_slots(tensors, order))
        permuted = plan_for(folder, budget)
        assert permuted.pool_bytes == plain.pool_bytes
        if budget in ("exact", "1x", "3x"):  # in between, nearly equal distances may change places
            for before, after in zip(plain.layers, permuted.layers, strict=True):
                found = {
                    frozenset((name, order[slot] if name == "b" else slot) for name, slot in planned.members)
                    for planned in after.pool
                }
                assert found == {frozenset(planned.members) for planned in before.pool}


def plan_for(folder, budget):
    variants = open_variants({name: FolderRef(folder / name) for name in NAMES})
    return plan_variants(variants, options_of(budget, None, within=False))


def permute_slots(tensors, order):
    """Slot s becomes what slot order[s] was, and the router follows."""
    before = dict(tensors)
    for name in before:
        if ".experts." in name:
            head, _, tail = name.partition(".experts.")
            slot, _, part = tail.partition(".")
            tensors[name] = before[f"{head}.experts.{order[int(slot)]}.{part}"]
        elif name.endswith(ROUTER):
            tensors[name] = before[name][torch.tensor(order)]
