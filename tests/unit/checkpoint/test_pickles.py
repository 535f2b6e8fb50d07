"""Pickles: converted once without running them, and refused when they ask for anything but tensors."""

import collections
import os
import pickle
import shutil
from collections import namedtuple

import pytest
import torch

from moemerge.checkpoint.conversions import default_cache
from moemerge.checkpoint.pickles import convert_pickles, load_pickle
from moemerge.checkpoint.repository import LocalFolder
from moemerge.checkpoint.variants import open_variants
from moemerge.errors import DamagedInput, MissingTensors, NotEnoughRoom, UnsupportedCheckpoint
from moemerge.refs import FolderRef
from tests.factories import (
    edit_json,
    flip_byte,
    read_canonical,
    truncate,
    write_checkpoint,
    write_json,
    write_lfs_pointer,
)

FAMILIES = ["mixtral", "switch_transformers"]


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache"


def convert(folder, cache):
    return convert_pickles(LocalFolder(folder), cache).path


class Malicious:
    """Writes a file when unpickled carelessly."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", ["BF16", "F32"])
def test_conversion_keeps_every_weight(tmp_path, cache, family, dtype):
    plain = write_checkpoint(tmp_path / "plain", family, dtype=dtype)
    pickled = write_checkpoint(tmp_path / "pickled", family, dtype=dtype, weights="pickle")
    expected, found = read_canonical(plain), read_canonical(convert(pickled, cache))
    assert expected.keys() == found.keys()
    assert all(expected[name].equal(found[name]) for name in expected)
    assert all(expected[name].dtype == found[name].dtype for name in expected)


def test_switch_pickle_with_four_tied_names_is_the_variant_of_the_file_with_one(tmp_path, cache):
    plain = write_checkpoint(tmp_path / "plain", "switch_transformers")
    pickled = write_checkpoint(
        tmp_path / "pickled", "switch_transformers", weights="pickle", tied_copies=True
    )
    opened = open_variants(
        {"plain": FolderRef(plain), "pickled": FolderRef(pickled)}, allow_pickle=True, cache=cache
    )
    one, four = opened.variants.values()
    assert one.tensors.keys() == four.tensors.keys()
    assert len(four.dropped) == 3
    assert four.settings == one.settings


def test_shards_keep_their_number_and_get_an_index(tmp_path, cache):
    pickled = write_checkpoint(tmp_path / "pickled", weights="pickle", shard_bytes=30_000)
    converted = convert(pickled, cache)
    assert len(list(converted.glob("model-*.safetensors"))) == len(list(pickled.glob("*.bin"))) > 3
    plain = read_canonical(write_checkpoint(tmp_path / "plain"))
    assert all(plain[name].equal(tensor) for name, tensor in read_canonical(converted).items())


def test_file_names_come_from_the_index(tmp_path, cache):
    pickled = write_checkpoint(tmp_path / "pickled", weights="pickle", shard_bytes=60_000)
    index = (pickled / "pytorch_model.bin.index.json").read_text()
    for path in pickled.glob("pytorch_model-*.bin"):
        path.rename(path.with_name(path.name.replace("model-", "model_")))
    (pickled / "pytorch_model.bin.index.json").write_text(index.replace("model-", "model_"))
    (pickled / "pytorch_model-00009-of-00009.bin").write_bytes(b"never opened")
    assert read_canonical(convert(pickled, cache))


def test_side_files_come_along(tmp_path, cache):
    pickled = write_checkpoint(tmp_path / "pickled", weights="pickle")
    converted = convert(pickled, cache)
    assert {path.name for path in converted.iterdir()} == (
        {path.name for path in pickled.iterdir()} - {"pytorch_model.bin"} | {"model.safetensors"}
    )
    assert (converted / "tokenizer.json").read_bytes() == (pickled / "tokenizer.json").read_bytes()


def test_second_conversion_reuses_the_first(tmp_path, cache, monkeypatch):
    pickled = write_checkpoint(tmp_path / "pickled", weights="pickle")
    first = convert(pickled, cache)
    monkeypatch.setattr(torch, "load", None)
    assert convert(pickled, cache) == first
    moved = shutil.move(pickled, tmp_path / "moved")
    assert convert(moved, cache) == first


@pytest.mark.parametrize(
    "change",
    [
        lambda folder: write_checkpoint(folder, weights="pickle", seed=1),
        lambda folder: edit_json(folder / "config.json", max_position_embeddings=77),
    ],
)
def test_changed_checkpoint_is_converted_anew(tmp_path, cache, change):
    pickled = write_checkpoint(tmp_path / "pickled", weights="pickle")
    first = convert(pickled, cache)
    change(pickled)
    assert convert(pickled, cache) != first


def test_conversion_keeps_the_label(tmp_path, cache):
    pickled = write_checkpoint(tmp_path / "pickled", weights="pickle")
    assert convert_pickles(LocalFolder(pickled, "org/name@12345678"), cache).label == "org/name@12345678"


def test_failed_conversion_leaves_nothing_behind(tmp_path, cache):
    pickled = write_checkpoint(tmp_path / "pickled", weights="pickle", shard_bytes=60_000)
    last = sorted(pickled.glob("*.bin"))[-1]
    truncate(last, 100)
    with pytest.raises(DamagedInput, match=last.name):
        convert(pickled, cache)
    assert [path for path in cache.iterdir() if path.is_dir()] == []


def test_remains_of_a_killed_conversion_are_replaced(tmp_path, cache):
    pickled = write_checkpoint(tmp_path / "pickled", weights="pickle")
    converted = convert(pickled, cache)
    converted.rename(converted.with_name(f"{converted.name}.tmp"))
    (cache / f"{converted.name}.tmp" / "model.safetensors").write_bytes(b"half")
    assert read_canonical(convert(pickled, cache))
    assert [path.name for path in cache.iterdir() if path.is_dir()] == [converted.name]


def test_too_small_a_disk_is_found_before_writing(tmp_path, cache, monkeypatch):
    pickled = write_checkpoint(tmp_path / "pickled", weights="pickle")
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9, 0))
    with pytest.raises(NotEnoughRoom, match=r"converting .*pickled needs"):
        convert(pickled, cache)
    assert [path for path in cache.iterdir() if path.is_dir()] == []


def test_absent_shard_is_named(tmp_path, cache):
    pickled = write_checkpoint(tmp_path / "pickled", weights="pickle", shard_bytes=60_000)
    gone = sorted(pickled.glob("*.bin"))[0]
    gone.unlink()
    with pytest.raises(MissingTensors, match=f"pytorch_model.bin.index.json: .*first {gone.name}"):
        convert(pickled, cache)


def test_index_that_leaves_the_folder_is_refused(tmp_path, cache):
    pickled = write_checkpoint(tmp_path / "pickled", weights="pickle", shard_bytes=60_000)
    write_json(pickled / "pytorch_model.bin.index.json", {"weight_map": {"a": "../pytorch_model.bin"}})
    with pytest.raises(DamagedInput, match="not a file of the folder"):
        convert(pickled, cache)


def test_tensor_in_two_files_is_refused(tmp_path, cache):
    pickled = write_checkpoint(tmp_path / "pickled", weights="pickle", shard_bytes=60_000)
    first, second, *_ = sorted(pickled.glob("*.bin"))
    shutil.copy(first, second)
    with pytest.raises(DamagedInput, match=f"{second.name}: .* is in another file as well"):
        convert(pickled, cache)


def test_without_permission_nothing_is_opened(tmp_path, cache, monkeypatch):
    pickled = write_checkpoint(tmp_path / "pickled", weights="pickle")
    monkeypatch.setattr(torch, "load", None)
    with pytest.raises(UnsupportedCheckpoint, match=r"pickles \(pytorch_model.bin\).*--allow-pickle"):
        open_variants({"a": FolderRef(pickled)}, cache=cache)
    assert not cache.exists()


@pytest.mark.parametrize("archive", [True, False])
def test_malicious_pickle_is_refused_and_not_run(tmp_path, cache, archive):
    pickled = write_checkpoint(tmp_path / "pickled", weights="pickle")
    mark = tmp_path / "was-run"
    content = {"model.norm.weight": torch.zeros(32), "x": Malicious(mark)}
    torch.save(content, pickled / "pytorch_model.bin", _use_new_zipfile_serialization=archive)
    with pytest.raises(
        UnsupportedCheckpoint, match=r"pytorch_model.bin: refused: .*nothing of it was run"
    ) as caught:
        open_variants({"a": FolderRef(pickled)}, allow_pickle=True, cache=cache)
    assert "mkdir" in str(caught.value)
    assert not mark.exists()
    pickle.loads(pickle.dumps(Malicious(mark)))
    assert mark.exists(), "the fixture would have done harm"


def test_plain_malicious_pickle_is_refused_and_not_run(tmp_path):
    mark = tmp_path / "was-run"
    path = tmp_path / "pytorch_model.bin"
    path.write_bytes(pickle.dumps(Malicious(mark)))
    with pytest.raises(UnsupportedCheckpoint, match="nothing of it was run"):
        load_pickle(path)
    assert not mark.exists()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ([torch.zeros(1)], "holds a list, expected tensors by name"),
        ({}, "holds a dict, expected tensors by name"),
        ({"model": {"a": torch.zeros(1)}}, "'model' is a dict, expected a tensor. Is this a training state"),
        ({"step": 3, "a": torch.zeros(1)}, "'step' is a int, expected a tensor"),
        ({0: torch.zeros(1)}, "0 is a Tensor"),
        ({"a": torch.zeros(2, 2).to_sparse()}, "a is stored as torch.float32, torch.sparse_coo"),
        ({"a": torch.zeros(1, dtype=torch.complex64)}, "a is stored as torch.complex64"),
    ],
)
def test_anything_but_tensors_by_name_is_refused(tmp_path, content, words):
    path = tmp_path / "pytorch_model.bin"
    torch.save(content, path)
    with pytest.raises(UnsupportedCheckpoint, match=f"pytorch_model.bin: {words}"):
        load_pickle(path)


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: truncate(path, 0),
        lambda path: truncate(path, 50),
        lambda path: truncate(path, -1000),
        lambda path: path.write_bytes(b"<html></html>"),
        write_lfs_pointer,
    ],
)
def test_damaged_pickle_is_named(tmp_path, damage):
    path = write_checkpoint(tmp_path / "a", weights="pickle") / "pytorch_model.bin"
    damage(path)
    with pytest.raises((DamagedInput, UnsupportedCheckpoint), match=r"pytorch_model.bin: "):
        load_pickle(path)


def test_parameters_views_and_ordered_dictionaries_are_read(tmp_path, cache):
    folder = write_checkpoint(tmp_path / "a", weights="pickle")
    path = folder / "pytorch_model.bin"
    tensors = load_pickle(path)
    whole = torch.stack([tensors["model.norm.weight"].clone()] * 2, dim=1)
    changed = collections.OrderedDict(
        (name, torch.nn.Parameter(tensor.clone())) for name, tensor in tensors.items()
    )
    changed["model.norm.weight"] = whole[:, 1]
    torch.save(changed, path)
    assert not load_pickle(path)["model.norm.weight"].is_contiguous()
    expected = read_canonical(write_checkpoint(tmp_path / "plain"))
    found = read_canonical(convert(folder, cache))
    assert all(expected[name].equal(found[name]) for name in expected)


def test_files_of_old_torch_are_read(tmp_path, cache):
    folder = write_checkpoint(tmp_path / "a", weights="pickle")
    tensors = {name: tensor.clone() for name, tensor in load_pickle(folder / "pytorch_model.bin").items()}
    torch.save(tensors, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    expected = read_canonical(write_checkpoint(tmp_path / "plain"))
    found = read_canonical(convert(folder, cache))
    assert all(expected[name].equal(found[name]) for name in expected)


def test_conversions_live_in_the_cache_of_the_user(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_cache() == tmp_path / "moemerge"


def test_flipped_byte_of_a_stored_tensor_is_another_checkpoint(tmp_path, cache):
    folder = write_checkpoint(tmp_path / "a", weights="pickle")
    first = convert(folder, cache)
    flip_byte(folder / "pytorch_model.bin", offset=200)
    assert convert_or_refuse(folder, cache) != first


def convert_or_refuse(folder, cache):
    try:
        return convert(folder, cache)
    except (DamagedInput, UnsupportedCheckpoint):
        return None
