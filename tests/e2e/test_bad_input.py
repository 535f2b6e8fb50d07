"""Inputs that cannot be right: the documented exit code, a message that helps, and nothing written."""

import errno
import json
import os
import shutil
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.e2e.program import call_program, run_program, tree
from tests.factories import (
    edit_json,
    edit_tensors,
    flip_byte,
    truncate,
    write_checkpoint,
    write_json,
    write_lfs_pointer,
    write_siblings,
)

Usage = namedtuple("Usage", "total used free")
MERGE = ("merge", "code=./code", "law=./law", "-o", "duo.moe", "--budget", "1x")


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    folder = tmp_path_factory.mktemp("originals")
    write_siblings(folder)
    write_checkpoint(folder / "sharded", shard_bytes=30_000)
    assert call_program(*MERGE, cwd=folder).code == 0
    return folder


@pytest.fixture
def place(originals, tmp_path):
    """A fresh copy: `base`, `code`, `law`, `sharded` and `duo.moe`, which is renamed to `good.moe`."""
    shutil.copytree(originals, tmp_path, dirs_exist_ok=True)
    (tmp_path / "duo.moe").rename(tmp_path / "good.moe")
    return tmp_path


def set_values(value: float, ending: str) -> Callable[[Path], None]:
    def damage(place: Path) -> None:
        def edit(tensors):
            name = next(name for name in tensors if name.endswith(ending))
            tensors[name].view(-1)[7] = value

        edit_tensors(place / "law" / "model.safetensors", edit)

    damage.__name__ = f"{value} in {ending}"
    return damage


def drop_config(place: Path) -> None:
    (place / "law" / "config.json").unlink()


def empty_folder(place: Path) -> None:
    shutil.rmtree(place / "law")
    (place / "law").mkdir()


def remove_folder(place: Path) -> None:
    shutil.rmtree(place / "law")


def file_instead(place: Path) -> None:
    remove_folder(place)
    (place / "law").write_text("no folder")


def lfs_pointer(place: Path) -> None:
    write_lfs_pointer(place / "law" / "model.safetensors")


def lfs_config(place: Path) -> None:
    write_lfs_pointer(place / "law" / "config.json")


def cut_weights(place: Path) -> None:
    truncate(place / "law" / "model.safetensors", -10)


def cut_shard(place: Path) -> None:
    remove_folder(place)
    (place / "sharded").rename(place / "law")
    truncate(next((place / "law").glob("model-00002-of-*.safetensors")), 4000)


def lose_shard(place: Path) -> None:
    remove_folder(place)
    (place / "sharded").rename(place / "law")
    next((place / "law").glob("model-00002-of-*.safetensors")).unlink()


def other_shape(place: Path) -> None:
    remove_folder(place)
    write_checkpoint(place / "law", settings={"hidden_size": 64})


def other_family(place: Path) -> None:
    remove_folder(place)
    write_checkpoint(place / "law", "switch_transformers")


def quantised(place: Path) -> None:
    edit_json(place / "law" / "config.json", quantization_config={"quant_method": "gptq"})


def broken_config(place: Path) -> None:
    truncate(place / "law" / "config.json", 40)


def existing_bundle(place: Path) -> None:
    (place / "duo.moe").mkdir()


def existing_file(place: Path) -> None:
    (place / "duo.moe").write_text("mine")


def existing_link(place: Path) -> None:
    (place / "duo.moe").symlink_to("nowhere")


INPUTS = [
    (drop_config, 4, ["law", "config.json"]),
    (empty_folder, 4, ["law", "no weights"]),
    (remove_folder, 5, ["law", "no such folder"]),
    (file_instead, 4, ["law", "expected a folder"]),
    (lfs_pointer, 8, ["law/model.safetensors", "git lfs pull"]),
    (lfs_config, 8, ["law/config.json", "git lfs pull"]),
    (cut_weights, 8, ["law/model.safetensors", "truncated", "Download it again"]),
    (cut_shard, 8, ["model-00002-of-", "truncated"]),
    (lose_shard, 8, ["model.safetensors.index.json", "model-00002-of-"]),
    (set_values(float("nan"), "experts.2.w3.weight"), 8, ["law/model.safetensors", "experts.2.w3", "NaN"]),
    (set_values(float("inf"), "experts.0.w2.weight"), 8, ["law/model.safetensors", "experts.0.w2"]),
    (set_values(float("nan"), "q_proj.weight"), 8, ["law/model.safetensors", "q_proj.weight", "NaN"]),
    (set_values(float("-inf"), "embed_tokens.weight"), 8, ["law/model.safetensors", "embed_tokens"]),
    (other_shape, 4, ["law", "hidden_size is 64", "32"]),
    (other_family, 4, ["law", "family is switch_transformers", "mixtral"]),
    (quantised, 4, ["law/config.json", "gptq", "unquantised"]),
    (broken_config, 8, ["law/config.json", "JSON"]),
    (existing_bundle, 3, ["duo.moe exists already"]),
    (existing_file, 3, ["duo.moe exists already"]),
    (existing_link, 3, ["duo.moe exists already"]),
]


def name_of(value: object) -> str | None:
    return value.__name__ if callable(value) else None


@pytest.mark.parametrize(("damage", "code", "told"), INPUTS, ids=name_of)
def test_merge_of_bad_input_says_what_and_leaves_nothing(damage, code, told, place):
    damage(place)
    before = {path.name for path in place.iterdir()}
    outcome = call_program(*MERGE, cwd=place)
    assert outcome.code == code, outcome.err
    assert outcome.out == ""
    assert [part for part in told if part not in outcome.err] == []
    assert {path.name for path in place.iterdir()} == before


@pytest.mark.parametrize(
    ("arguments", "code", "told"),
    [
        (("merge", "code=./code", "code=./law", "-o", "x.moe", "--budget", "1x"), 3, ["'code'", "twice"]),
        (("merge", "code=./code", "CODE=./law", "-o", "x.moe", "--budget", "1x"), 3, ["'CODE'", "twice"]),
        (("merge", "con=./code", "-o", "x.moe", "--budget", "1x"), 3, ["'con'"]),
        (("merge", "../up=./code", "-o", "x.moe", "--budget", "1x"), 3, ["'../up'"]),
        (("merge", "./code", "-o", "x.moe", "--budget", "1x"), 3, ["./code", "NAME="]),
        (("merge", "-o", "x.moe", "--budget", "1x"), 3, ["NAME=REF"]),
        (("merge", "code=./code", "-o", "x.moe"), 3, ["exactly one of --budget"]),
        (("merge", "a=./code", "-o", "x.moe", "--budget", "1x", "--plan", "p"), 3, ["exactly one of"]),
        (("merge", "a=./code", "-o", "x.moe", "--plan", "p.json"), 5, ["p.json"]),
        (("merge", "a=./code", "-o", "x.moe", "--plan", "code/config.json"), 3, ["code/config.json"]),
        (("merge", "a=./code", "-o", "x.moe", "--plan", "code"), 3, ["code: cannot be read"]),
        (("merge", "-o", "x.moe", "--recipe", "r.yaml"), 5, ["r.yaml"]),
        (("merge", "-o", "x.moe", "--recipe", "code"), 3, ["code: cannot be read"]),
        (("merge", "a=./code", "-o", "x.moe", "--budget", "cheap"), 3, ["'cheap'", "1.5x", "40GiB"]),
        (("merge", "a=./code", "-o", "x.moe", "--budget", "0x"), 3, ["'0x'"]),
        (("merge", "a=./code", "-o", "x.moe", "--budget", "1x", "--policy", "best"), 3, ["'best'", "medoid"]),
        (("merge", "a=./code", "-o", "x.moe", "--budget", "1x", "--max-ram", "1MiB"), 7, ["--max-ram"]),
        (("merge", "a=./code", "-o", "x.moe", "--budget", "1x", "--max-ram", "0GB"), 3, ["--max-ram"]),
        (("merge", "a=./code", "-o", "x.moe", "--budget", "1x", "--max-ram", "many"), 3, ["'many'"]),
        (
            ("merge", "a=./code", "b=./law", "-o", "x.moe", "--policy", "cluster", "--budget", "0.9x"),
            3,
            ["Use --budget 1x"],
        ),
        (
            ("merge", "a=./code", "b=./law", "-o", "x.moe", "--policy", "cluster", "--budget", "1KiB"),
            3,
            ["1,024 bytes", "--budget 1x"],
        ),
        (("merge", "a=./code", "-o", "code/config.json/x.moe", "--budget", "1x"), 7, ["is not a folder"]),
        (("merge", "a=./code", "-o", "x" * 300, "--budget", "1x"), 7, ["name too long"]),
        (("plan", "a=./code", "--budget", "1x", "-o", "code/config.json/p.json"), 7, ["is not a folder"]),
        (("plan", "a=./code", "--budget", "1x", "-o", "law"), 7, ["law", "folder"]),
        (("plan", "a=./code", "-o", "p.json"), 3, ["--budget"]),
        (("similarity", "a=./code", "-o", "code/config.json/x"), 7, ["is not a folder"]),
        (("similarity", "a=./code", "-o", "law"), 3, ["law exists already"]),
        (("export", "good.moe", "-v", "code", "-o", "code/config.json/x"), 7, ["is not a folder"]),
        (("export", "good.moe", "-v", "code", "-o", "law"), 3, ["law exists already"]),
        (("export", "good.moe", "-v", "art", "-o", "x"), 5, ["'art'", "code, law"]),
        (("export", "good.moe", "-v", "code", "-o", "x", "--shard-size", "5"), 3, ["'5'", "unit"]),
        (("export", "code", "-v", "code", "-o", "x"), 4, ["code: not a bundle"]),
        (("verify", "code"), 4, ["code: not a bundle"]),
        (("verify", "missing"), 5, ["missing"]),
        (("verify", "code/config.json"), 5, ["code/config.json"]),
        (("show", "./missing"), 5, ["missing"]),
        (("show", "missing"), 3, ["'missing'"]),
        (("show", ""), 3, ["empty reference"]),
        (("run", "good.moe", "-v", "art", "word"), 5, ["'art'", "code, law"]),
        (("run", "good.moe", "-v", "code", "word", "--dtype", "int4"), 3, ["'int4'", "bfloat16"]),
        (("run", "good.moe", "-v", "code", "word", "--device", "toaster"), 3, ["'toaster'", "cpu"]),
        (("run", "good.moe", "-v", "code", "word", "--device", "cuda:99"), 3, ["'cuda:99'", "cpu"]),
        (("run", "good.moe", "-v", "code", "word", "--seed", "9" * 30, "--temperature", "1"), 3, ["seed"]),
        (("run", "good.moe", "-v", "code", "word " * 100), 3, ["501 tokens", "128"]),
        (("demo", "code", "-o", "x"), 5, ["code: expected base"]),
        (("run", "good.moe", "word"), 2, ["--variant"]),
        (("melt",), 2, ["melt"]),
    ],
    ids=lambda value: "_".join(value)[:60] if isinstance(value, tuple) else None,
)
def test_bad_argument_is_named(arguments, code, told, place):
    before = tree(place)
    outcome = call_program(*arguments, cwd=place)
    assert outcome.code == code, outcome.err
    assert outcome.out == ""
    assert [part for part in told if part not in outcome.err] == []
    assert tree(place) == before


def test_budget_that_the_message_suggests_is_enough(place):
    refused = call_program(*MERGE[:-1], "0.1x", cwd=place)
    suggested = refused.err.split("Use --budget ")[1].split(" or more")[0]
    assert call_program(*MERGE[:-1], suggested, cwd=place).code == 0


def test_recipe_tells_every_problem_with_its_line(place):
    (place / "r.yaml").write_text(
        "schema: moemerge/recipe@1\nvariants:\n  code: ./code\nbudgt: 1x\npolicy: clutser\n"
    )
    outcome = call_program("merge", "--recipe", "r.yaml", "-o", "x.moe", "--json", cwd=place)
    assert outcome.code == 3
    findings = {finding["where"]: finding for finding in outcome.envelope["findings"]}
    assert findings["r.yaml, line 4"]["fix"] == "Did you mean 'budget'?"
    assert "clutser" in findings["r.yaml, line 5"]["found"]
    assert "'budget'" in findings["r.yaml"]["found"]


def test_full_disk_is_refused_before_writing(place, monkeypatch):
    monkeypatch.setattr("moemerge.checkpoint.disk.shutil.disk_usage", lambda path: Usage(10**9, 10**9, 999))
    before = {path.name for path in place.iterdir()}
    for arguments in (MERGE, ("export", "good.moe", "-v", "code", "-o", "x")):
        outcome = call_program(*arguments, cwd=place)
        assert outcome.code == 7
        assert "999 B are free" in outcome.err
    assert {path.name for path in place.iterdir()} - before <= {".duo.moe.staging"}


@pytest.mark.parametrize("writes", range(0, 24, 3))
def test_disk_that_fills_up_ends_the_merge_and_room_continues_it(writes, place, monkeypatch):
    left = [writes]

    def fsync(descriptor: int) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("os.fsync", fsync)
        outcome = call_program(*MERGE, cwd=place)
        assert outcome.code == 7, outcome.err
        assert "duo.moe" in outcome.err
        assert not (place / "duo.moe").exists()
    assert call_program(*MERGE, cwd=place).code == 0
    assert tree(place / "duo.moe") == tree(place / "good.moe")


def test_disk_that_fills_up_ends_an_export_without_remains(place, monkeypatch):
    def copyfile(source: Path, target: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    before = tree(place)
    monkeypatch.setattr("moemerge.bundle.export.shutil.copyfile", copyfile)
    outcome = call_program("export", "good.moe", "-v", "code", "-o", "x", cwd=place)
    assert outcome.code == 7
    assert "x: cannot be written (No space left on device)" in outcome.err
    assert tree(place) == before


def test_read_only_folder_is_refused(place, monkeypatch):
    # The super-user may write anywhere, so the system's answer is simulated.
    allowed = os.access
    monkeypatch.setattr("os.access", lambda path, mode: not mode & os.W_OK and allowed(path, mode))
    for arguments in (MERGE, ("export", "good.moe", "-v", "code", "-o", "x")):
        outcome = call_program(*arguments, cwd=place)
        assert outcome.code == 7
        assert "no permission" in outcome.err


@pytest.mark.parametrize("path", ["../secret", "/etc/passwd", "pool\\..\\x", "C:secret", "pool//x", "./pool"])
def test_manifest_path_that_leaves_the_bundle_is_refused(path, place):
    manifest = json.loads((place / "good.moe" / "moemerge.json").read_text())
    manifest["layers"][0]["file"] = path
    write_json(place / "good.moe" / "moemerge.json", manifest)
    for arguments in (
        ("show", "./good.moe"),
        ("run", "good.moe", "-v", "code", "word"),
        ("export", "good.moe", "-v", "code", "-o", "x"),
        ("verify", "good.moe"),
    ):
        outcome = call_program(*arguments, cwd=place)
        assert outcome.code == 8
        assert "moemerge.json" in outcome.err
        assert "leaves the bundle" in outcome.err
    assert not (place / "x").exists()


def test_export_writes_no_file_outside_its_folder(place):
    manifest = json.loads((place / "good.moe" / "moemerge.json").read_text())
    manifest["variants"]["code"]["files"]["../evil.json"] = "variants/code/config.json"
    write_json(place / "good.moe" / "moemerge.json", manifest)
    outcome = call_program("export", "good.moe", "-v", "code", "-o", "x", cwd=place)
    assert outcome.code == 8
    assert "../evil.json" in outcome.err
    assert not (place / "evil.json").exists()


def test_flipped_byte_is_found_and_the_file_named(place):
    flip_byte(place / "good.moe" / "pool" / "layer-00001.safetensors", -100)
    outcome = run_program("verify", "good.moe", cwd=place)
    assert (outcome.code, outcome.out) == (8, "")
    assert "pool/layer-00001.safetensors: was changed" in outcome.err
    assert "Traceback" not in outcome.err


def test_failure_in_a_process_of_its_own_shows_no_traceback(place):
    remove_folder(place)
    outcome = run_program(*MERGE, cwd=place)
    assert (outcome.code, outcome.out) == (5, "")
    assert outcome.err.startswith("error: ")
    assert "Traceback" not in outcome.err
