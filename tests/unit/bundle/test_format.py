"""The bytes of a bundle, as `docs/bundle-format.md` promises them."""

import hashlib
import json
import re
import subprocess

import pytest
import torch
from safetensors import safe_open

from moemerge.bundle.manifest import read_manifest
from moemerge.bundle.reader import open_bundle
from moemerge.checkpoint.variants import open_variants
from moemerge.consolidation.pipeline import merge
from moemerge.consolidation.task import options_of
from moemerge.refs import FolderRef
from tests.e2e.program import tree
from tests.factories import read_canonical, write_checkpoint, write_siblings

WIDTHS = {"F64": 8, "F32": 4, "BF16": 2, "F16": 2}


def header_of(path):
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    return json.loads(raw[8 : 8 + length]), 8 + length, len(raw)


def tensor_files(folder):
    return sorted(folder.rglob("*.safetensors"))


def merged(folder, budget="1.5x", names=("a", "b", "c"), policy=None):
    variants = open_variants({name: FolderRef(folder / name) for name in names})
    merge(variants, folder / "x.moe", options_of(budget, policy, within=False))
    return folder / "x.moe"


def test_tensor_files_have_one_metadata_key_and_data_aligned_to_64_bytes(bundle):
    assert len(tensor_files(bundle)) > 3
    for path in tensor_files(bundle):
        header, start, size = header_of(path)
        assert header.pop("__metadata__") == {"format": "pt"}
        assert start % 64 == 0
        position = 0
        for name, entry in header.items():  # the order in the header is the order of the data
            begin, end = entry["data_offsets"]
            assert begin == position, name
            position = end
        assert start + position == size
        order = [(-WIDTHS.get(entry["dtype"], 8), name) for name, entry in header.items()]
        assert order == sorted(order)


def test_tensor_files_are_read_by_the_safetensors_library(bundle):
    for path in tensor_files(bundle):
        with safe_open(path, "pt") as file:
            header, _, _ = header_of(path)
            assert set(file.keys()) == header.keys() - {"__metadata__"}
            assert all(file.get_tensor(name).isfinite().all() for name in file.keys())  # noqa: SIM118


def test_pool_expert_is_one_range_of_bytes_in_order_of_its_number(bundle):
    manifest = read_manifest(bundle)
    expert_bytes = 2 * sum(rows * columns for rows, columns in manifest.parts.values())
    for layer in manifest.layers:
        header, _, _ = header_of(bundle / layer.file)
        del header["__metadata__"]
        assert len(header) == layer.num_experts * len(manifest.parts)
        for number in range(layer.num_experts):
            parts = {name: header[f"e{number:05d}.{name}"] for name in sorted(manifest.parts)}
            offsets = [offset for entry in parts.values() for offset in entry["data_offsets"]]
            assert offsets == sorted(offsets)
            assert (offsets[0], offsets[-1]) == (number * expert_bytes, (number + 1) * expert_bytes)
            for name, entry in parts.items():
                assert entry["shape"] == manifest.parts[name]


def test_slots_without_error_keep_the_bytes_of_their_source(tmp_path):
    write_siblings(tmp_path, names=("a", "b", "c"))
    opened = open_bundle(merged(tmp_path, "1x", policy="cluster"))
    exact = 0
    for name, entry in opened.manifest.variants.items():
        source = read_canonical(tmp_path / name)
        for layer in opened.manifest.layers:
            pool = opened.map_pool(layer.index)
            for slot, index in enumerate(entry.maps[layer.index]):
                equal = all(
                    source[f"experts.{layer.index}.{slot}.{part}"].equal(tensor)
                    for part, tensor in pool[index].items()
                )
                assert equal == (entry.errors[layer.index][slot] == 0)
                exact += equal
    assert exact == 8  # a medoid for each of 2 layers with 4 slots


def test_checksums_list_every_file_and_sha256sum_agrees(bundle):
    files = tree(bundle)
    text = files.pop("SHA256SUMS").decode()
    lines = [f"{hashlib.sha256(content).hexdigest()}  {name}\n" for name, content in sorted(files.items())]
    assert text == "".join(lines)
    done = subprocess.run(
        ["sha256sum", "--check", "--strict", "--quiet", "SHA256SUMS"], cwd=bundle, check=False
    )
    assert done.returncode == 0


def test_equal_non_expert_tensors_are_stored_once_and_groups_are_kept_apart(tmp_path):
    """Two pairs of variants with one router each: one name, two groups, two files."""
    write_checkpoint(tmp_path / "a")
    write_checkpoint(tmp_path / "b", base=tmp_path / "a", noise=0.1, only=lambda name: "experts" in name)
    write_checkpoint(tmp_path / "c", seed=5)
    write_checkpoint(tmp_path / "d", base=tmp_path / "c", noise=0.1, only=lambda name: "experts" in name)
    write_checkpoint(
        tmp_path / "e", base=tmp_path / "a", noise=0.1, only=lambda name: name.endswith("router")
    )
    opened = open_bundle(merged(tmp_path, names=("a", "b", "c", "d", "e")))
    places = {name: entry.tensors for name, entry in opened.manifest.variants.items()}
    router = "model.layers.0.block_sparse_moe.gate.weight"
    assert places["a"][router] == places["b"][router] == "shared/tensors-00001.safetensors"
    assert places["c"][router] == places["d"][router] == "shared/tensors-00002.safetensors"
    assert places["e"][router] == "variants/e/tensors.safetensors"
    assert places["e"]["lm_head.weight"] == places["a"]["lm_head.weight"]
    for name in "abcde":
        source = read_canonical(tmp_path / name)
        tensors = {role: read_tensor(tensor) for role, tensor in opened.tensors(name).items()}
        assert tensors.keys() == {role for role in source if not role.startswith("experts.")}
        assert all(torch.equal(tensors[role], source[role]) for role in tensors)


def read_tensor(stored):
    with safe_open(stored.path, "pt") as file:
        return file.get_tensor(stored.name)


def test_equal_side_files_are_stored_once(bundle):
    manifest = read_manifest(bundle)
    assert manifest.variants["b"].files["tokenizer.json"] == "variants/a/tokenizer.json"
    assert not (bundle / "variants" / "b" / "tokenizer.json").exists()


def test_nothing_in_a_bundle_depends_on_where_and_when_it_was_made(tmp_path):
    for place in ("one", "other/place"):
        write_siblings(tmp_path / place, names=("a", "b", "c"))
        merged(tmp_path / place)
    one, other = tree(tmp_path / "one" / "x.moe"), tree(tmp_path / "other/place" / "x.moe")
    assert one == other
    for name, content in one.items():
        assert str(tmp_path).encode() not in content, name
        assert not re.search(rb"20\d\d-\d\d-\d\d", content), name


@pytest.mark.parametrize("layout", ["per_expert", "stacked"])
def test_layout_and_shards_of_the_sources_do_not_change_pools(layout, tmp_path):
    write_siblings(tmp_path / "plain", names=("a", "b"))
    write_siblings(tmp_path / "other", names=("a", "b"), layout=layout, shard_bytes=25_000)
    plain, other = (merged(tmp_path / place, names=("a", "b")) for place in ("plain", "other"))
    pools = [{k: v for k, v in tree(folder).items() if k.startswith("pool/")} for folder in (plain, other)]
    assert pools[0] == pools[1]
