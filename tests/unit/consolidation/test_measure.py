"""The streamed measurement of a layer against the one in memory."""

from dataclasses import fields

import numpy as np
import pytest
import torch

from moemerge.checkpoint.variants import open_variants
from moemerge.consolidation import measure
from moemerge.consolidation.measure import Measurer, measurement_bytes
from moemerge.consolidation.similarity_files import load_layer_similarity, write_layer_similarity
from moemerge.errors import DamagedInput, NotEnoughRoom
from moemerge.refs import FolderRef
from moemerge.similarity.gram import gram_of
from moemerge.similarity.matrices import build_layer_similarity
from tests.factories import edit_tensors, read_canonical, write_checkpoint, write_siblings

NAMES = ("a", "b")
LARGE = {"hidden_size": 96, "expert_size": 200}


def open_folders(folder, *, base=False, names=NAMES):
    sources = {name: FolderRef(folder / name) for name in names}
    return open_variants(sources, FolderRef(folder / "base") if base else None)


def measure_layer(variants, layer, max_ram=None, progress=None):
    with Measurer(variants, max_ram, progress) as measurer:
        return measurer.measure(layer)


def in_memory(folder, layer, *, base=False, names=NAMES):
    """The same with all experts in memory and in float64."""
    models = [read_canonical(folder / name) for name in (("base", *names) if base else names)]
    grams = {
        part: gram_of(
            [[tensors[f"experts.{layer}.{slot}.{part}"] for slot in range(4)] for tensors in models],
            has_base=base,
        )
        for part in ("gate", "up", "down")
    }
    return build_layer_similarity(layer, names, grams, np.arange(4 * len(names)))


@pytest.mark.parametrize("base", [True, False])
@pytest.mark.parametrize("layout", ["per_expert", "stacked"])
def test_streamed_distances_equal_those_in_memory(base, layout, tmp_path):
    write_siblings(tmp_path, names=NAMES, layout=layout, settings=LARGE, shard_bytes=100_000)
    found = measure_layer(open_folders(tmp_path, base=base), 1)
    expected = in_memory(tmp_path, 1, base=base)
    assert found.distances.keys() == expected.distances.keys()
    for name, matrix in expected.distances.items():
        np.testing.assert_allclose(found.distances[name], matrix, rtol=1e-4, atol=1e-6, err_msg=name)
    for part, matrix in expected.part_l2.items():
        np.testing.assert_allclose(found.part_l2[part], matrix, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found.norms, expected.norms, rtol=1e-6)
    for part, norms in expected.part_norms.items():
        np.testing.assert_allclose(found.part_norms[part], norms, rtol=1e-6)


def test_routers_are_compared_row_by_row(tmp_path):
    base = write_checkpoint(tmp_path / "base")
    write_checkpoint(tmp_path / "a", base=base, noise=0.1, seed=1)
    write_checkpoint(tmp_path / "b", base=base, noise=0.1, seed=2, only=lambda n: n != "decoder.1.router")
    found = measure_layer(open_folders(tmp_path, names=("base", "a", "b")), 1).router_l2
    rows = [read_canonical(tmp_path / name)["decoder.1.router"].double() for name in ("base", "a")]
    norms = torch.stack([row.square().sum(dim=1) for row in rows]).mean(dim=0).sqrt()
    np.testing.assert_allclose(found[0, 1], (rows[0] - rows[1]).norm(dim=1) / norms, rtol=1e-12)
    assert found.shape == (3, 3, 4)
    assert not found[0, 2].any()
    np.testing.assert_array_equal(found[1], found[:, 1])


@pytest.mark.parametrize("noise", [1e-4, 1e-6])
@pytest.mark.parametrize("base", [True, False])
def test_close_siblings_are_told_apart_accurately(noise, base, tmp_path):
    write_siblings(tmp_path, names=NAMES, noise=noise, dtype="F32", settings=LARGE)
    found = measure_layer(open_folders(tmp_path, base=base), 0)
    expected = in_memory(tmp_path, 0, base=base)
    pairs = found.same_slot_pairs()
    for name in ("l2", "relative_l2"):
        np.testing.assert_allclose(found.distances[name][pairs], expected.distances[name][pairs], rtol=1e-3)


def test_mixed_dtypes_are_compared_by_value(tmp_path):
    write_checkpoint(tmp_path / "base", settings=LARGE)
    write_checkpoint(tmp_path / "a", base=tmp_path / "base", noise=0.1, dtype="F32")
    write_checkpoint(tmp_path / "b", base=tmp_path / "base", noise=0.1, dtype="F16", seed=3)
    found = measure_layer(open_folders(tmp_path, base=True), 1)
    expected = in_memory(tmp_path, 1, base=True)
    for name, matrix in expected.distances.items():
        np.testing.assert_allclose(found.distances[name], matrix, rtol=1e-4, atol=1e-6, err_msg=name)


def test_identical_experts_are_recognised_across_layouts_and_exactly_zero_apart(tmp_path):
    write_checkpoint(tmp_path / "a")
    write_checkpoint(tmp_path / "b", layout="stacked", shard_bytes=20_000)
    found = measure_layer(open_folders(tmp_path), 0)
    assert found.identity.tolist() == [0, 1, 2, 3, 0, 1, 2, 3]
    for matrix in found.distances.values():
        assert not matrix[found.same_slot_pairs()].any()


def test_expert_that_differs_in_one_value_only_is_not_identical(tmp_path):
    write_checkpoint(tmp_path / "a", settings=LARGE)
    write_checkpoint(tmp_path / "b", settings=LARGE)

    def edit(tensors):
        # Away from the stretches that are sampled.
        tensors["model.layers.0.block_sparse_moe.experts.2.w1.weight"].view(-1)[5000] += 1

    edit_tensors(tmp_path / "b" / "model.safetensors", edit)
    found = measure_layer(open_folders(tmp_path), 0)
    assert found.identity.tolist() == [0, 1, 2, 3, 0, 1, 6, 3]
    assert found.distances["l2"][2, 6] == pytest.approx(1, rel=0.01)


def test_number_of_threads_does_not_change_a_bit(tmp_path, monkeypatch):
    write_siblings(tmp_path, names=NAMES, settings=LARGE)
    variants = open_folders(tmp_path)
    results = []
    for threads in (1, 2, 4):
        monkeypatch.setattr(measure, "_num_threads", lambda threads=threads: threads)
        results.append(measure_layer(variants, 0))
    for other in results[1:]:
        for name, matrix in results[0].distances.items():
            assert np.array_equal(matrix, other.distances[name])


def test_memory_limit_does_not_change_a_bit(tmp_path):
    """Otherwise a merge that is continued with less memory would not give the same bytes."""
    write_siblings(tmp_path, names=NAMES, settings={"hidden_size": 256, "expert_size": 700})
    variants = open_folders(tmp_path)
    plenty = measure_layer(variants, 0)
    least = next(size for size in range(300, 4000, 4) if fits(variants, size * 2**20))
    scarce = measure_layer(variants, 0, max_ram=least * 2**20)
    for name, matrix in plenty.distances.items():
        assert np.array_equal(matrix, scarce.distances[name])


def fits(variants, max_ram):
    try:
        measure.limit_memory(variants, max_ram)
    except NotEnoughRoom:
        return False
    return True


def test_too_little_memory_is_refused_with_both_sizes(tmp_path):
    write_siblings(tmp_path, names=NAMES)
    with pytest.raises(NotEnoughRoom, match=r"--max-ram allows 1 MB"):
        measure_layer(open_folders(tmp_path), 0, max_ram=10**6)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_value_that_is_not_finite_is_named(value, tmp_path):
    write_siblings(tmp_path, names=NAMES)
    name = "model.layers.1.block_sparse_moe.experts.3.w2.weight"
    edit_tensors(tmp_path / "b" / "model.safetensors", lambda t: t[name].view(-1).__setitem__(9, value))
    with pytest.raises(DamagedInput) as caught:
        measure_layer(open_folders(tmp_path), 1)
    assert str(tmp_path / "b" / "model.safetensors") in str(caught.value)
    assert name in str(caught.value)


def test_values_too_large_to_square_are_refused(tmp_path):
    write_siblings(tmp_path, names=NAMES, dtype="F32")
    name = "model.layers.0.block_sparse_moe.experts.0.w1.weight"
    edit_tensors(tmp_path / "b" / "model.safetensors", lambda t: t[name].view(-1).__setitem__(0, 1e30))
    with pytest.raises(DamagedInput, match="overflow"):
        measure_layer(open_folders(tmp_path), 0)


def test_progress_adds_up_to_what_is_announced(tmp_path):
    write_siblings(tmp_path, names=NAMES, settings=LARGE)
    variants = open_folders(tmp_path, base=True)
    told: list[int] = []

    class Recorder:
        def start(self, title, total_bytes): ...

        def advance(self, num_bytes):
            told.append(num_bytes)

    for layer in variants.first.routed_layers:
        measure_layer(variants, layer.index, progress=Recorder())
    assert sum(told) == measurement_bytes(variants)


def test_measuring_leaves_torch_threads_as_they_were(tmp_path):
    write_siblings(tmp_path, names=NAMES)
    before = torch.get_num_threads()
    measure_layer(open_folders(tmp_path), 0)
    assert torch.get_num_threads() == before


def test_what_is_written_of_a_layer_is_read_again(tmp_path):
    write_siblings(tmp_path, names=NAMES)
    measured = measure_layer(open_folders(tmp_path, base=True), 1)
    write_layer_similarity(tmp_path, "", measured)
    read = load_layer_similarity(tmp_path, 1, NAMES)
    for field in fields(measured):
        np.testing.assert_equal(getattr(read, field.name), getattr(measured, field.name))
