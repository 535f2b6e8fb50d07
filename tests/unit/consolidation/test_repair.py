"""Repair of families that norm, route and add to the residual stream in other ways than Mixtral."""

import random

import pytest

from moemerge.bundle.reader import open_bundle
from moemerge.calibration.texts import Passage
from moemerge.checkpoint.checkpoint import open_checkpoint
from moemerge.checkpoint.repository import LocalFolder
from moemerge.checkpoint.variants import open_variants
from moemerge.consolidation.pipeline import merge
from moemerge.consolidation.prefix import measure_bundle
from moemerge.consolidation.repair import is_repaired, repair_variant
from moemerge.consolidation.task import options_of
from moemerge.refs import FolderRef
from tests.factories import write_siblings

SETTINGS = {
    "qwen3_moe": {"dense_layers": "[1]", "num_layers": 3},
    "granitemoe": {"residual_factor": 0.22, "embedding_factor": 12.0, "attention_scale": 0.1},
    "phimoe": {"has_qkv_bias": True, "has_output_bias": True, "has_head_bias": True},
    "deepseek_v2": {"num_kv_heads": 4, "first_routed": 1, "num_layers": 3},
}


def random_passages(count, seed):
    generator = random.Random(seed)
    return [Passage(tuple(generator.choices(range(3, 60), k=32))) for _ in range(count)]


@pytest.mark.parametrize("family", SETTINGS)
def test_repaired_variant_predicts_more_as_it_did_before(family, tmp_path):
    _, folders = write_siblings(tmp_path, family, noise=0.3, dtype="F32", settings=SETTINGS[family])
    variants = open_variants({name: FolderRef(folder) for name, folder in folders.items()})
    merge(variants, tmp_path / "x.moe", options_of("1x", "mean"))
    bundle, checkpoint = open_bundle(tmp_path / "x.moe"), open_checkpoint(LocalFolder(folders["code"]))
    changed = repair_variant(checkpoint, bundle, "code", random_passages(60, seed=0))
    assert changed
    assert all(is_repaired(role) and role in checkpoint.tensors for role in changed)
    fresh = random_passages(20, seed=1)
    _, before, after = measure_bundle(checkpoint, bundle, "code", fresh, changed=changed)
    assert 0 < after.kl < before.kl
