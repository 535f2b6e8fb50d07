"""Which files hold the weights, and that index and headers agree."""

import json

import pytest

from moemerge.checkpoint.checkpoint import open_checkpoint
from moemerge.checkpoint.repository import LocalFolder, read_json
from moemerge.checkpoint.weights import INDEX, find_weight_files, read_weight_headers
from moemerge.errors import DamagedInput, MissingTensors, NotFound, UnsupportedCheckpoint
from tests.factories import edit_json, edit_tensors, write_checkpoint, write_json, write_lfs_pointer


@pytest.fixture
def sharded(tmp_path):
    return write_checkpoint(tmp_path / "sharded", shard_bytes=30_000)


def weight_map(folder):
    return json.loads((folder / INDEX).read_text())["weight_map"]


def test_files_come_from_the_index_and_not_from_a_pattern(sharded):
    (sharded / "model-99999-of-99999.safetensors").write_bytes(b"left over")
    assert set(find_weight_files(LocalFolder(sharded))) == set(weight_map(sharded).values())
    open_checkpoint(LocalFolder(sharded))


def test_index_wins_over_a_single_file(sharded, tmp_path):
    write_checkpoint(tmp_path / "single", seed=1)
    (tmp_path / "single" / "model.safetensors").rename(sharded / "model.safetensors")
    assert "model.safetensors" not in find_weight_files(LocalFolder(sharded))


def test_safetensors_win_over_pickles(sharded):
    (sharded / "pytorch_model.bin").write_bytes(b"never opened")
    open_checkpoint(LocalFolder(sharded))


def test_absent_shard_is_named(sharded):
    gone = sorted(sharded.glob("*.safetensors"))[1]
    gone.unlink()
    with pytest.raises(MissingTensors, match=rf"{INDEX}: names 1 files that do not exist; first {gone.name}"):
        read_weight_headers(LocalFolder(sharded))


@pytest.mark.parametrize(
    "name", ["../other/model.safetensors", "/etc/model.safetensors", "a\\b.safetensors", "model.bin", 3, None]
)
def test_index_that_leaves_the_folder_is_refused(sharded, name):
    edit_json(sharded / INDEX, weight_map={**weight_map(sharded), "lm_head.weight": name})
    with pytest.raises(
        DamagedInput, match=r"index.json: lm_head.weight is said to be in .* not a file of the"
    ):
        read_weight_headers(LocalFolder(sharded))


@pytest.mark.parametrize("content", [{}, {"weight_map": {}}, {"weight_map": []}])
def test_index_without_a_map_is_refused(sharded, content):
    write_json(sharded / INDEX, content)
    with pytest.raises(DamagedInput, match=f"{INDEX}: no weight_map"):
        read_weight_headers(LocalFolder(sharded))


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (b"{", "not valid JSON"),
        (b"[1]", "expected a JSON object, found list"),
        (b"\xff", "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
    ],
)
@pytest.mark.parametrize("name", ["config.json", INDEX])
def test_broken_json_is_named(sharded, name, raw, words):
    (sharded / name).write_bytes(raw)
    with pytest.raises(DamagedInput, match=f"{name}: {words}"):
        open_checkpoint(LocalFolder(sharded))


@pytest.mark.parametrize("name", ["config.json", INDEX])
def test_lfs_pointer_in_place_of_json_is_named(sharded, name):
    write_lfs_pointer(sharded / name)
    with pytest.raises(DamagedInput, match=f"{name}: a Git LFS pointer"):
        open_checkpoint(LocalFolder(sharded))


def test_tensor_of_the_index_in_no_shard_is_named(sharded):
    edit_json(
        sharded / INDEX, weight_map={**weight_map(sharded), "extra": weight_map(sharded)["lm_head.weight"]}
    )
    with pytest.raises(MissingTensors, match=r"names 1 tensors that are in no shard; first extra"):
        read_weight_headers(LocalFolder(sharded))


def test_tensor_in_another_shard_than_the_index_says_is_refused(sharded):
    files = sorted(set(weight_map(sharded).values()))
    wrong = next(file for file in files if file != weight_map(sharded)["lm_head.weight"])
    edit_json(sharded / INDEX, weight_map={**weight_map(sharded), "lm_head.weight": wrong})
    with pytest.raises(
        DamagedInput, match=rf"lm_head.weight is in .*, the index says {wrong}; shards of two"
    ):
        read_weight_headers(LocalFolder(sharded))


def test_tensor_that_the_index_does_not_know_is_refused(sharded):
    known = weight_map(sharded)
    del known["lm_head.weight"]
    edit_json(sharded / INDEX, weight_map=known)
    with pytest.raises(DamagedInput, match=r"lm_head.weight is in .*, the index says None"):
        read_weight_headers(LocalFolder(sharded))


def test_shards_of_two_uploads_are_refused(sharded, tmp_path):
    other = write_checkpoint(tmp_path / "other", shard_bytes=45_000)
    second = sorted(other.glob("*.safetensors"))[1]
    shards = sorted(sharded.glob("*.safetensors"))
    shards[1].write_bytes(second.read_bytes())
    with pytest.raises(DamagedInput, match="shards of two uploads"):
        read_weight_headers(LocalFolder(sharded))


def test_tensor_in_two_shards_is_refused(sharded):
    first, second, *_ = sorted(sharded.glob("*.safetensors"))
    (name, *_) = [key for key, file in weight_map(sharded).items() if file == first.name]

    def add(tensors):
        tensors[name] = next(iter(tensors.values())).clone()

    edit_tensors(second, add)
    with pytest.raises(DamagedInput, match=f"tensor {name} is in both {first.name} and {second.name}"):
        read_weight_headers(LocalFolder(sharded))


def test_folder_that_does_not_exist_is_not_found(tmp_path):
    with pytest.raises(NotFound, match="absent: no such folder"):
        LocalFolder(tmp_path / "absent")


def test_file_in_place_of_a_folder_is_refused(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(UnsupportedCheckpoint, match=r"file: not a checkpoint: expected a folder"):
        LocalFolder(tmp_path / "file")


def test_huge_configuration_is_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr("moemerge.checkpoint.repository.MAX_TEXT_BYTES", 10)
    (tmp_path / "config.json").write_text("{}" + " " * 20)
    with pytest.raises(DamagedInput, match="not a configuration file"):
        read_json(LocalFolder(tmp_path), "config.json")
