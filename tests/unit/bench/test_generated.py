import hashlib

import pytest
import torch

from moemerge.bench.generated import generate, write_variant
from moemerge.bench.shapes import SHAPES, find_shape
from moemerge.bench.subjects import bundle_subject, generated_subject
from moemerge.bundle.verify import verify_bundle
from moemerge.checkpoint import disk
from moemerge.checkpoint.checkpoint import open_checkpoint
from moemerge.checkpoint.repository import LocalFolder
from moemerge.errors import InvalidRecipe, NotEnoughRoom
from tests.factories import read_canonical

TINY = find_shape("tiny")


def digests(folder):
    return {
        p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir()) if p.is_file()
    }


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("mix-S", 186e6), ("mix-M", 742e6), ("mix-L", 1.10e9), ("switch-base-8", 619e6), ("tiny", 113312)],
)
def test_shapes_have_the_size_they_are_named_for(name, parameters):
    shape = SHAPES[name]
    symbols = shape.family.symbols(shape.settings)
    assert symbols["E"] == 8
    total = 0
    for role, _, pattern in shape.family.expected_tensors(shape.settings):
        if not (pattern.tied_to and shape.settings["tied_head"]):
            total += torch.Size(generated_shape(shape, role)).numel()
    per_layer = sum(
        torch.Size(shape.family.part_shape(p, shape.settings)).numel() for p in shape.family.experts.parts
    )
    total += 8 * per_layer * len(shape.family.routed_layers(shape.settings))
    assert total == pytest.approx(parameters, rel=0.02)


def generated_shape(shape, wanted):
    from moemerge.checkpoint.family import evaluate_shape

    symbols = shape.family.symbols(shape.settings)
    return next(
        evaluate_shape(pattern.shape, symbols)
        for role, _, pattern in shape.family.expected_tensors(shape.settings)
        if role == wanted
    )


def test_a_generated_bundle_is_whole_and_takes_the_experts_of_one_variant(tmp_path):
    generated = generate(TINY, 3, tmp_path)
    bundle = verify_bundle(generated.bundle)
    assert list(bundle.manifest.variants) == ["variant-0", "variant-1", "variant-2"]
    assert bundle.manifest.pool_bytes == bundle.manifest.variant_bytes
    entries = bundle.manifest.variants.values()
    assert all(set(entry.tensors.values()) == {f"variants/{v}/tensors.safetensors"}
               for v, entry in bundle.manifest.variants.items())  # fmt: skip
    assert all(expert_map == list(range(8)) for entry in entries for expert_map in entry.maps.values())


def test_checkpoints_share_experts_and_differ_in_everything_else(tmp_path):
    generated = generate(TINY, 2, tmp_path)
    one, other = (read_canonical(folder) for folder in generated.checkpoints.values())
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]) == name.startswith("experts."), name
        assert tensor.isfinite().all()


def test_what_is_there_is_used_again(tmp_path):
    first = generate(TINY, 2, tmp_path)
    stamps = {path: path.stat().st_mtime_ns for path in first.bundle.rglob("*")}
    assert generate(TINY, 2, tmp_path) == first
    assert {path: path.stat().st_mtime_ns for path in first.bundle.rglob("*")} == stamps
    generate(TINY, 3, tmp_path)
    assert {path: path.stat().st_mtime_ns for path in first.bundle.rglob("*")} == stamps


def test_the_same_seed_gives_the_same_bytes(tmp_path):
    for name in ("one", "two"):
        write_variant(TINY, tmp_path / name, 0, 1)
    write_variant(TINY, tmp_path / "three", 1, 1)
    assert digests(tmp_path / "one") == digests(tmp_path / "two")
    assert digests(tmp_path / "one") != digests(tmp_path / "three")


def test_experts_may_differ_too(tmp_path):
    for number in range(2):
        write_variant(TINY, tmp_path / str(number), 0, number, expert_distance=0.1)
    one, other = (read_canonical(tmp_path / str(number)) for number in range(2))
    assert not any(torch.equal(tensor, other[name]) for name, tensor in one.items())


def test_a_full_disk_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(disk, "free_bytes", lambda folder: 1000)
    with pytest.raises(NotEnoughRoom, match="generating tiny"):
        generate(TINY, 2, tmp_path)
    assert not list(tmp_path.iterdir())


def test_unknown_shapes_are_refused():
    with pytest.raises(InvalidRecipe, match="there are mix-S, mix-M, mix-L, switch-base-8"):
        find_shape("mix-XL")


def test_a_bundle_is_exported_for_those_who_need_checkpoints(tmp_path):
    generated = generated_subject("tiny", 2, tmp_path, seed=0)
    work = tmp_path / "work"
    again = bundle_subject(generated.bundle, None, work, needs_checkpoints=True)
    assert again.variants == generated.variants
    assert again.model_bytes == generated.model_bytes == 2 * again.model_elements
    for name, folder in again.checkpoints.items():
        exported = open_checkpoint(LocalFolder(folder))
        assert exported.expert_bytes == open_checkpoint(LocalFolder(generated.checkpoints[name])).expert_bytes
    assert bundle_subject(generated.bundle, 1, work, needs_checkpoints=False).checkpoints == {}
    with pytest.raises(InvalidRecipe, match="holds 2 variants"):
        bundle_subject(generated.bundle, 3, work, needs_checkpoints=False)
