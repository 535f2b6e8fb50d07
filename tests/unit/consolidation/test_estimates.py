"""Estimates are what bundles then take, and what `--fit` counts with."""

from moemerge.bundle.reader import open_bundle
from moemerge.checkpoint.variants import open_variants
from moemerge.consolidation.estimates import estimate, resources
from moemerge.consolidation.fitting import Device, budget_of
from moemerge.consolidation.measure import limit_memory
from moemerge.consolidation.pipeline import merge
from moemerge.consolidation.planning import plan_variants
from moemerge.consolidation.task import options_of
from moemerge.refs import FolderRef
from tests.factories import write_siblings


def open_siblings(folder):
    write_siblings(folder)
    return open_variants({name: FolderRef(folder / name) for name in ("code", "law")})


def test_bundles_take_what_was_estimated(tmp_path):
    variants = open_siblings(tmp_path)
    for found in estimate(variants):
        merge(variants, tmp_path / found.budget, options_of(found.budget))
        bundle = open_bundle(tmp_path / found.budget)
        names = bundle.manifest.variants
        tensors = {(t.path, t.start): t.nbytes for name in names for t in bundle.tensors(name).values()}
        stored = bundle.manifest.pool_bytes + bundle.manifest.residual_bytes + sum(tensors.values())
        # A budget is a limit, and equal tensors are stored once.
        assert 0.8 * found.bundle_bytes <= stored <= found.bundle_bytes


def test_fit_leaves_what_is_estimated_for_experts(tmp_path):
    variants = open_siblings(tmp_path)
    plan = plan_variants(variants, options_of("1.5x"))
    (found,) = estimate(variants, plan)
    device = Device(text=f"{found.serving_bytes}B")
    assert budget_of(device, variants).limit == plan.stored_bytes


def test_memory_that_is_named_suffices(tmp_path):
    variants = open_siblings(tmp_path)
    found = resources(variants)
    assert found.download_bytes == 0
    limit_memory(variants, found.merge_memory)
