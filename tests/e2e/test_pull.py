"""Checkpoints from a hub: what is asked for, what is sent, and what happens when it breaks."""

import json
import os
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest
from huggingface_hub import constants

from moemerge.checkpoint import hub
from moemerge.checkpoint.checkpoint import open_checkpoint
from moemerge.checkpoint.tensors import TensorReader
from moemerge.checkpoint.variants import open_variants
from moemerge.errors import (
    DamagedInput,
    IncompatibleInputs,
    InvalidRecipe,
    MissingTensors,
    NetworkFailure,
    NotAuthorised,
    NotEnoughRoom,
    NotFound,
    UnsupportedCheckpoint,
)
from moemerge.refs import FolderRef, HubRef
from tests.e2e.hub_server import Cut
from tests.factories import edit_json, read_canonical, write_checkpoint, write_siblings


class Recorder:
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.totals: list[int] = []
        self.done: list[int] = []

    def start(self, title: str, total_bytes: int) -> None:
        self.totals.append(total_bytes)
        self.done.append(0)

    def advance(self, num_bytes: int) -> None:
        assert num_bytes > 0
        self.done[-1] += num_bytes


def header_bytes(path: Path) -> int:
    return 8 + int.from_bytes(path.read_bytes()[:8], "little")


def blobs(tmp_path: Path) -> list[Path]:
    return [path for path in (tmp_path / "cache").rglob("blobs/*") if path.is_file()]


def test_looking_sends_headers_and_no_weight_bytes(server, tmp_path):
    base, tunes = write_siblings(tmp_path / "source")
    for name, folder in {"base": base, **tunes}.items():
        server.add(f"lab/{name}", folder)
    opened = open_variants(
        {name: HubRef(f"lab/{name}") for name in tunes}, HubRef("lab/base"), download=False
    )
    for name, folder in {"base": base, **tunes}.items():
        weights = folder / "model.safetensors"
        assert server.sent[f"lab/{name}/model.safetensors"] == header_bytes(weights) < weights.stat().st_size
    assert not opened.first.is_local
    assert opened.first.expert_bytes == open_checkpoint_bytes(tunes["code"])


def open_checkpoint_bytes(folder: Path) -> int:
    return open_variants({"a": FolderRef(folder)}).first.expert_bytes


def test_looking_at_shards_sends_the_header_of_each(server, tmp_path):
    folder = write_checkpoint(tmp_path / "source", shard_bytes=30_000)
    server.add("lab/sharded", folder)
    opened = open_variants({"a": HubRef("lab/sharded")}, download=False)
    shards = sorted(folder.glob("*.safetensors"))
    assert len(shards) > 3
    assert {server.sent[f"lab/sharded/{shard.name}"] for shard in shards} == {
        header_bytes(shard) for shard in shards
    }
    assert opened.first.experts.keys() == {(layer, slot) for layer in range(2) for slot in range(4)}


def test_server_without_ranges_sends_little_more_than_the_header(server, tmp_path):
    folder = write_checkpoint(tmp_path / "source", vocab=40_000)
    server.ignore_ranges = True
    server.add("lab/large", folder)
    repository = hub.HubRepository(HubRef("lab/large"))
    found = repository.header("model.safetensors")
    server.ignore_ranges = False
    assert found.keys() == repository.header("model.safetensors").keys()
    assert all(tensor.nbytes for tensor in found.values())


def test_remote_and_local_headers_name_the_same_bytes(server, tmp_path):
    folder = write_checkpoint(tmp_path / "source")
    server.add("lab/model", folder)
    remote = open_checkpoint(hub.HubRepository(HubRef("lab/model")))
    local = open_variants({"a": FolderRef(folder)}).first
    assert {role: (t.start, t.nbytes, t.shape) for role, t in remote.tensors.items()} == {
        role: (t.start, t.nbytes, t.shape) for role, t in local.tensors.items()
    }


def test_incompatible_pair_is_refused_before_weights(server, tmp_path):
    server.add("lab/small", write_checkpoint(tmp_path / "small"))
    server.add("lab/wide", write_checkpoint(tmp_path / "wide", settings={"expert_size": 64}))
    with pytest.raises(IncompatibleInputs, match="expert_size is 64, expected 48 as in a"):
        open_variants({"a": HubRef("lab/small"), "b": HubRef("lab/wide")})
    for name in ("small", "wide"):
        weights = tmp_path / name / "model.safetensors"
        assert server.sent[f"lab/{name}/model.safetensors"] == header_bytes(weights)


def test_pull_fetches_what_a_merge_needs_and_nothing_else(server, tmp_path):
    folder = write_checkpoint(tmp_path / "source", shard_bytes=30_000)
    for unwanted in (
        "pytorch_model.bin",
        "model.gguf",
        "consolidated.00.pt",
        "model-old.safetensors",
        "a.png",
    ):
        (folder / unwanted).write_bytes(b"x" * 100)
    (folder / "tool_use.jinja").write_text("another template")
    server.add("lab/model", folder)
    pulled = hub.pull(hub.HubRepository(HubRef("lab/model")))
    wanted = {path.name for path in folder.iterdir()} - {
        "pytorch_model.bin", "model.gguf", "consolidated.00.pt", "model-old.safetensors", "a.png",
    }  # fmt: skip
    assert set(pulled.files()) == wanted
    assert {"LICENSE", "tokenizer.json", "tool_use.jinja"} <= wanted
    assert {key for key, count in server.sent.items() if count} == {f"lab/model/{name}" for name in wanted}


def test_opened_from_the_hub_holds_the_weights_of_the_folder(server, tmp_path):
    folder = write_checkpoint(tmp_path / "source", shard_bytes=30_000)
    server.add("lab/model", folder)
    opened = open_variants({"a": HubRef("lab/model")}).first
    expected = read_canonical(folder)
    with TensorReader() as reader:
        assert all(reader.read(t).equal(expected[role]) for role, t in opened.tensors.items())
        for (layer, slot), parts in opened.experts.items():
            for part, tensor in parts.items():
                assert reader.read(tensor).equal(expected[f"experts.{layer}.{slot}.{part}"])


def test_second_pull_sends_nothing(server, tmp_path):
    server.add("lab/model", write_checkpoint(tmp_path / "source"))
    hub.pull(hub.HubRepository(HubRef("lab/model")))
    server.sent.clear()
    recorder = Recorder()
    hub.pull(hub.HubRepository(HubRef("lab/model")), recorder)
    assert not server.sent.total()
    assert recorder.totals == recorder.done == [0]


def test_unchanged_weights_of_a_new_commit_are_not_sent_again(server, tmp_path):
    folder = write_checkpoint(tmp_path / "source")
    server.add("lab/model", folder)
    hub.pull(hub.HubRepository(HubRef("lab/model")))
    (folder / "README.md").write_text("a new text")
    server.add("lab/model", folder)
    server.sent.clear()
    recorder = Recorder()
    pulled = hub.pull(hub.HubRepository(HubRef("lab/model")), recorder)
    assert +server.sent == {"lab/model/README.md": len("a new text")}
    assert recorder.totals == recorder.done == [len("a new text")]
    assert "model.safetensors" in pulled.files()


def test_progress_adds_up_to_the_announced_total(server, tmp_path):
    folder = write_checkpoint(tmp_path / "source", shard_bytes=30_000)
    server.add("lab/model", folder)
    recorder = Recorder()
    hub.pull(hub.HubRepository(HubRef("lab/model")), recorder)
    # The index is read to know the files, and in the cache from then on.
    fetched = [path for path in folder.iterdir() if not path.name.endswith("index.json")]
    assert recorder.done == recorder.totals == [sum(path.stat().st_size for path in fetched)]


def test_branch_that_moves_meanwhile_does_not_mix_commits(server, tmp_path):
    old, new = (write_checkpoint(tmp_path / name, seed=seed) for name, seed in (("old", 1), ("new", 2)))
    server.add("lab/model", old)
    repository = hub.HubRepository(HubRef("lab/model"))
    server.add("lab/model", new)
    pulled = hub.pull(repository)
    assert (pulled.path / "model.safetensors").read_bytes() == (old / "model.safetensors").read_bytes()
    assert pulled.label == f"lab/model@{repository.commit[:8]}"


def test_named_revision_and_commit_are_honoured(server, tmp_path):
    old, new = (write_checkpoint(tmp_path / name, seed=seed) for name, seed in (("old", 1), ("new", 2)))
    commit = server.add("lab/model", old, branch="v1")
    server.add("lab/model", new)
    for revision in ("v1", commit):
        assert hub.HubRepository(HubRef("lab/model", revision)).commit == commit
    assert hub.HubRepository(HubRef("lab/model")).commit != commit


def test_broken_connection_is_resumed(server, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)
    folder = write_checkpoint(tmp_path / "source")
    server.add("lab/model", folder)
    server.cuts["lab/model/model.safetensors"] = Cut(offset=50_000, times=2)
    recorder = Recorder()
    repository = hub.HubRepository(HubRef("lab/model"))
    server.sent.clear()
    pulled = hub.pull(repository, recorder)
    assert (pulled.path / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    assert server.cuts["lab/model/model.safetensors"].times == 0
    assert recorder.done == recorder.totals
    assert server.sent["lab/model/model.safetensors"] == (folder / "model.safetensors").stat().st_size


def test_connection_that_stays_broken_keeps_finished_files(server, tmp_path):
    folder = write_checkpoint(tmp_path / "source", shard_bytes=30_000)
    shards = sorted(path.name for path in folder.glob("*.safetensors"))
    server.add("lab/model", folder)
    last_byte = (folder / shards[-1]).stat().st_size - 1
    server.cuts[f"lab/model/{shards[-1]}"] = Cut(offset=last_byte, times=None)
    repository = hub.HubRepository(HubRef("lab/model"))
    with pytest.raises(NetworkFailure, match=rf"{shards[-1]}.*run again to continue"):
        hub.pull(repository)
    assert not list((tmp_path / "cache").rglob("*.incomplete"))
    kept = {file.name for file in hub.files_to_pull(repository) if file.cached}
    assert kept >= set(shards[:-1])
    with pytest.raises(NetworkFailure, match=rf"not completely in the cache.*{shards[-1]}"):
        hub.find_cached(HubRef("lab/model", repository.commit))

    server.cuts.clear()
    server.sent.clear()
    pulled = hub.pull(repository)
    assert (pulled.path / shards[-1]).read_bytes() == (folder / shards[-1]).read_bytes()
    assert not any(server.sent[f"lab/model/{name}"] for name in kept)


def test_pulled_model_opens_offline_by_branch_and_by_default(server, tmp_path):
    folder = write_checkpoint(tmp_path / "source")
    server.add("lab/model", folder)
    server.add("lab/model", folder, branch="v1")
    for revision in (None, "v1"):
        open_variants({"a": HubRef("lab/model", revision)})
    server.requests.clear()
    for revision in (None, "v1"):
        assert open_variants({"a": HubRef("lab/model", revision)}, offline=True).first.is_local
    assert server.requests == []


def test_offline_without_a_pull_says_what_to_run(server, tmp_path):
    server.add("lab/model", write_checkpoint(tmp_path / "source"))
    with pytest.raises(NetworkFailure, match=r"lab/model@v1: offline.*Run `moemerge pull lab/model@v1`"):
        open_variants({"a": HubRef("lab/model", "v1")}, offline=True)
    # Looking leaves config.json in the cache, which is not a checkpoint yet.
    commit = hub.HubRepository(HubRef("lab/model")).commit
    open_variants({"a": HubRef("lab/model")}, download=False)
    with pytest.raises(NetworkFailure, match=r"model.safetensors is missing"):
        open_variants({"a": HubRef("lab/model", commit)}, offline=True)


def test_offline_accepts_a_repository_with_further_weight_files(server, tmp_path):
    folder = write_checkpoint(tmp_path / "source", shard_bytes=60_000)
    (folder / "model-other.safetensors").write_bytes(b"not asked for")
    server.add("lab/model", folder)
    hub.pull(hub.HubRepository(HubRef("lab/model")))
    assert hub.find_cached(HubRef("lab/model")).files()


def test_gated_missing_and_unknown_are_told_apart(server, tmp_path):
    folder = write_checkpoint(tmp_path / "source")
    server.add("lab/gated", folder)
    server.repositories["lab/gated"].gated = True
    server.add("lab/open", folder)
    with pytest.raises(NotAuthorised, match=r"lab/gated.*gated.*hf auth login"):
        open_variants({"a": HubRef("lab/gated")})
    with pytest.raises(NotFound, match=r"lab/absent: no such repository, or it is private") as absent:
        open_variants({"a": HubRef("lab/absent")})
    assert not isinstance(absent.value, NotAuthorised)
    with pytest.raises(NotFound, match=r"lab/open@v9: the repository has no such revision"):
        open_variants({"a": HubRef("lab/open", "v9")})
    with pytest.raises(NotFound, match=r"lab/open@\w+/none.json: no such file"):
        hub.HubRepository(HubRef("lab/open")).read_bytes("none.json")
    with pytest.raises(InvalidRecipe, match=r"not a possible repository name"):
        open_variants({"a": HubRef("lab/a--b")})


def test_gated_with_a_token_is_still_gated(server, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_no_rights")
    server.add("lab/gated", write_checkpoint(tmp_path / "source"))
    server.repositories["lab/gated"].gated = True
    with pytest.raises(NotAuthorised, match="gated"):
        open_variants({"a": HubRef("lab/gated")})


def test_all_sources_are_reported_together(server, tmp_path):
    server.add("lab/gguf", write_checkpoint(tmp_path / "gguf"))
    files = {"config.json": (tmp_path / "gguf" / "config.json").read_bytes(), "model.gguf": b"GGUF"}
    server.commit("lab/gguf", files)
    with pytest.raises(NotFound) as caught:
        open_variants(
            {"a": HubRef("lab/absent"), "b": HubRef("lab/gguf"), "c": FolderRef(tmp_path / "nowhere")}
        )
    for words in ("variant a: lab/absent", "variant b: lab/gguf", "model.gguf", "variant c: ", "nowhere"):
        assert words in str(caught.value)
    assert len(caught.value.findings) == 3


def test_unreachable_hub_is_a_network_failure(server, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(NetworkFailure, match=r"lab/model: the connection failed"):
        open_variants({"a": HubRef("lab/model")})


def test_offline_mode_of_the_client_is_a_network_failure(server, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(NetworkFailure, match=r"lab/model: offline"):
        open_variants({"a": HubRef("lab/model")})
    assert server.requests == []


def test_full_disk_is_found_before_any_weight_byte(server, tmp_path, monkeypatch):
    folder = write_checkpoint(tmp_path / "source")
    server.add("lab/model", folder)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9 - 1000, 1000))
    with pytest.raises(NotEnoughRoom, match=r"pulling lab/model@\w{8} needs 1\d\d kB .* 1 kB are free"):
        open_variants({"a": HubRef("lab/model")})
    assert server.sent["lab/model/model.safetensors"] == header_bytes(folder / "model.safetensors")


def test_cache_that_cannot_be_written_is_named(server, tmp_path, monkeypatch):
    server.add("lab/model", write_checkpoint(tmp_path / "source"))

    def refuse(*args: object, **kwargs: object) -> None:
        raise PermissionError(13, "Permission denied", "/cache/blobs")

    monkeypatch.setattr(hub, "hf_hub_download", refuse)
    with pytest.raises(NotAuthorised, match=r"cannot write /cache/blobs.*HF_HOME"):
        hub.HubRepository(HubRef("lab/model")).read_bytes("config.json")


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (
            lambda raw: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
            "Git LFS pointer",
        ),
        (lambda raw: b"<!doctype html><title>Sign in</title>", "HTML page"),
        (lambda raw: raw[:-7], "truncated"),
        (lambda raw: raw[:100], "truncated"),
        (lambda raw: raw[:5], "truncated"),
        (lambda raw: raw + b"more", "4 bytes follow the last tensor"),
    ],
)
def test_damaged_remote_file_is_found_without_a_download(server, tmp_path, damage, expected):
    folder = write_checkpoint(tmp_path / "source")
    weights = folder / "model.safetensors"
    weights.write_bytes(damage(weights.read_bytes()))
    server.add("lab/model", folder)
    with pytest.raises(DamagedInput, match=rf"lab/model@\w+/model.safetensors: .*{expected}"):
        open_variants({"a": HubRef("lab/model")})
    assert not any(path.stat().st_size == weights.stat().st_size for path in blobs(tmp_path))


def test_index_that_names_an_absent_shard_is_refused(server, tmp_path):
    folder = write_checkpoint(tmp_path / "source", shard_bytes=60_000)
    gone = sorted(folder.glob("*.safetensors"))[0]
    gone.unlink()
    server.add("lab/model", folder)
    with pytest.raises(
        MissingTensors, match=rf"index.json: names 1 files that do not exist; first {gone.name}"
    ):
        open_variants({"a": HubRef("lab/model")})


def test_interrupt_leaves_no_partial_file(server, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)
    server.add("lab/model", write_checkpoint(tmp_path / "source", shard_bytes=30_000))

    class Impatient(Recorder):
        def advance(self, num_bytes: int) -> None:
            super().advance(num_bytes)
            if self.done[-1] > 40_000:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        hub.pull(hub.HubRepository(HubRef("lab/model")), Impatient())
    assert not list((tmp_path / "cache").rglob("*.incomplete"))


def test_downloads_end_once_nobody_waits():
    recorder = Recorder()
    recorder.start("pull", 100)
    meter = hub._Meter(recorder)
    bar = meter.bars_of(hub.FileToPull(name="a", size=100, cached=False))(total=100)
    bar.update(10)
    meter.stopped = True
    with pytest.raises(hub._Stopped):
        bar.update(10)
    assert recorder.done == [10]


def test_bytes_sent_twice_are_told_once():
    recorder = Recorder()
    recorder.start("pull", 100)
    file = hub.FileToPull(name="a", size=100, cached=False)
    received, written = (hub._Meter.bars_of(meter, file)() for meter in [hub._Meter(recorder)] * 2)
    for count in (60, -60, 60, 40):  # a server that ignores the range starts anew
        received.update(count)
    for count in (50, 50):
        written.update(count)
    assert recorder.done == [100]


def test_token_is_not_sent_to_the_storage_host(server, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    folder = write_checkpoint(tmp_path / "source")
    server.add("lab/model", folder)
    seen: list[tuple[str, bool]] = []
    server.on_headers = lambda path, headers: seen.append((path, "Authorization" in headers))
    open_variants({"a": HubRef("lab/model")})
    assert {sent for path, sent in seen if path.startswith("/cdn/")} == {False}
    assert {sent for path, sent in seen if path.startswith("/api/")} == {True}


def test_pickles_of_a_hub_repository_are_pulled_and_converted_when_allowed(server, tmp_path):
    folder = write_checkpoint(tmp_path / "source", weights="pickle", shard_bytes=60_000)
    server.add("lab/pickled", folder)
    with pytest.raises(UnsupportedCheckpoint, match=r"lab/pickled@\w+: weights are pickles .*--allow-pickle"):
        open_variants({"a": HubRef("lab/pickled")})
    assert not any(server.sent[f"lab/pickled/{path.name}"] for path in folder.glob("*.bin"))
    opened = open_variants({"a": HubRef("lab/pickled")}, allow_pickle=True, cache=tmp_path / "converted")
    plain = write_checkpoint(tmp_path / "plain")
    assert read_canonical(next((tmp_path / "converted").glob("*/*/config.json")).parent).keys() == (
        read_canonical(plain).keys()
    )
    assert opened.first.is_local
    server.requests.clear()
    again = open_variants(
        {"a": HubRef("lab/pickled")}, offline=True, allow_pickle=True, cache=tmp_path / "converted"
    )
    assert again.first.is_local
    assert server.requests == []


def test_pickles_are_not_fetched_when_another_source_is_refused(server, tmp_path):
    server.add("lab/pickled", write_checkpoint(tmp_path / "source", weights="pickle"))
    other = write_checkpoint(tmp_path / "other")
    edit_json(other / "config.json", model_type="bert")
    with pytest.raises(UnsupportedCheckpoint, match="model_type 'bert'"):
        open_variants(
            {"a": HubRef("lab/pickled"), "b": FolderRef(other)},
            allow_pickle=True,
            cache=tmp_path / "converted",
        )
    assert not server.sent["lab/pickled/pytorch_model.bin"]


def test_environment_of_a_user_is_enough(server, tmp_path):
    """The only test in a process of its own: nothing is patched, only variables are set."""
    server.add("lab/model", write_checkpoint(tmp_path / "source"))
    program = (
        "import json\n"
        "from moemerge.checkpoint.variants import open_variants\n"
        "from moemerge.refs import HubRef\n"
        "first = open_variants({'a': HubRef('lab/model')}).first\n"
        "print(json.dumps([first.label, first.is_local, first.expert_bytes]))"
    )
    environment = {
        key: value for key, value in os.environ.items() if not key.startswith(("HF_", "TRANSFORMERS_"))
    }
    environment |= {"HF_ENDPOINT": server.url, "HF_HOME": str(tmp_path / "home")}
    ran = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
    )
    label, is_local, expert_bytes = json.loads(ran.stdout)
    assert (label.split("@")[0], is_local) == ("lab/model", True)
    assert expert_bytes == open_checkpoint_bytes(tmp_path / "source")
    assert (tmp_path / "home" / "hub" / "models--lab--model").is_dir()
    assert ran.stderr == ""
