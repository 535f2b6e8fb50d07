"""Bundles and checkpoints to a hub: what is sent, what is left alone, and what happens when it breaks."""

import shutil

import pytest

from moemerge.bundle.verify import verify_bundle
from tests.e2e.program import call_program, tree
from tests.factories import flip_byte, write_checkpoint, write_siblings

# The hub client's own way to send a file.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("family")
    write_siblings(folder)
    merged = call_program("merge", "code=./code", "law=./law", "-o", "duo.moe", "--budget", "1x", cwd=folder)
    assert merged.code == 0, merged.err
    return folder


@pytest.fixture
def hub(server, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", server.token)
    # The server speaks the git protocol for large files; Xet is the client's affair.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    return server


def push(*arguments, cwd):
    outcome = call_program("push", *arguments, "--json", cwd=cwd)
    assert outcome.code == 0, outcome.out
    return outcome.envelope["data"]


def files_of(hub, name, branch="main"):
    repository = hub.repositories[name]
    return repository.commits[repository.branches[branch]]


def test_bundle_arrives_as_it_is_in_one_commit(hub, folder, tmp_path):
    data = push("duo.moe", "me/duo", "--private", cwd=folder)
    assert files_of(hub, "me/duo") == tree(folder / "duo.moe")
    assert hub.private == {"me/duo": True}
    assert hub.repositories["me/duo"].branches["main"] == data["commit"]
    for name, raw in files_of(hub, "me/duo").items():
        (tmp_path / "again" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "again" / name).write_bytes(raw)
    verify_bundle(tmp_path / "again")


def test_dry_run_sends_nothing(hub, folder):
    data = push("duo.moe", "me/duo", "--dry-run", cwd=folder)
    assert (data["exists"], data["commit"]) == (False, None)
    assert data["bytes"] == sum(map(len, tree(folder / "duo.moe").values()))
    assert {request.split()[0] for request in hub.requests} <= {"GET", "HEAD"}
    told = call_program("push", "duo.moe", "me/duo", "--dry-run", "--private", cwd=folder)
    assert "me/duo would be created, private, branch main" in told.out


def test_example_in_the_help_runs(hub, folder):
    outcome = call_program("push", "duo.moe", "my-name/duo", "--private", "--dry-run", cwd=folder)
    assert outcome.code == 0
    assert "push duo.moe my-name/duo --private --dry-run" in call_program("push", "--help").out


def test_only_files_of_a_checkpoint_are_sent(hub, tmp_path):
    write_checkpoint(tmp_path / "model", shard_bytes=30_000)
    (tmp_path / "model/optimizer.pt").write_bytes(b"secret")
    (tmp_path / "model/notes").mkdir()
    push("model", "me/model", cwd=tmp_path)
    sent = files_of(hub, "me/model")
    assert sent.keys() == tree(tmp_path / "model").keys() - {"optimizer.pt"}


def test_what_is_pushed_can_be_pulled(hub, tmp_path):
    write_checkpoint(tmp_path / "model")
    push("model", "me/model", cwd=tmp_path)
    shown = call_program("show", "me/model", "--json").envelope["data"]
    assert shown == call_program("show", tmp_path / "model", "--json").envelope["data"]


def test_branch_is_made_and_main_is_left_alone(hub, folder):
    push("duo.moe", "me/duo", cwd=folder)
    before = dict(files_of(hub, "me/duo"))
    push("./code", "me/duo@plain", "--replace", cwd=folder)
    assert files_of(hub, "me/duo") == before
    assert files_of(hub, "me/duo", "plain").keys() == tree(folder / "code").keys()


def test_other_files_are_in_the_way_until_they_may_be_replaced(hub, folder):
    hub.commit("me/duo", {".gitattributes": b"", "old.bin": b"1", "README.md": b"mine"})
    refused = call_program("push", "duo.moe", "me/duo", cwd=folder)
    assert refused.code == 3
    assert "old.bin" in refused.err
    assert "--replace" in refused.err
    assert files_of(hub, "me/duo")["README.md"] == b"mine"
    push("duo.moe", "me/duo", "--replace", cwd=folder)
    assert files_of(hub, "me/duo").keys() == tree(folder / "duo.moe").keys() | {".gitattributes"}


def test_pushing_again_sends_no_large_file_again(hub, folder):
    push("duo.moe", "me/duo", cwd=folder)
    hub.requests.clear()
    push("duo.moe", "me/duo", cwd=folder)
    assert not [request for request in hub.requests if request.startswith("PUT")]


def test_broken_upload_makes_no_commit_and_continues(hub, folder):
    hub.refused_uploads = 1
    broken = call_program("push", "duo.moe", "me/duo", cwd=folder)
    assert broken.code == 6
    assert files_of(hub, "me/duo") == {}
    kept = set(hub.stored)
    hub.requests.clear()
    push("duo.moe", "me/duo", cwd=folder)
    sent = [request.removeprefix("PUT /lfs/") for request in hub.requests if request.startswith("PUT")]
    assert not kept & set(sent)
    assert files_of(hub, "me/duo") == tree(folder / "duo.moe")


@pytest.mark.parametrize(
    ("repository", "token", "code", "words"),
    [
        ("me/duo", None, 5, "hf auth login"),
        ("me/duo", "hf_wrong", 5, "refused access (401)"),
        ("others/duo", "hf_of_the_tests", 5, "refused access (403)"),
        ("duo", "hf_of_the_tests", 3, "org/name"),
    ],
)
def test_who_may_not_write_is_told(repository, token, code, words, server, folder, monkeypatch):
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    outcome = call_program("push", "duo.moe", repository, cwd=folder)
    assert outcome.code == code, outcome.err
    assert words in outcome.err
    assert not server.stored


def test_damaged_bundle_is_not_sent(hub, folder, tmp_path):
    shutil.copytree(folder / "duo.moe", tmp_path / "duo.moe")
    flip_byte(next((tmp_path / "duo.moe/pool").iterdir()), -1)
    outcome = call_program("push", "duo.moe", "me/duo", cwd=tmp_path)
    assert outcome.code == 8
    assert not hub.requests


def test_card_that_the_hub_refuses_ends_before_the_commit(hub, tmp_path):
    write_checkpoint(tmp_path / "model")
    (tmp_path / "model/README.md").write_text("---\nlicense: unheard-of\n---\n")
    outcome = call_program("push", "model", "me/model", cwd=tmp_path)
    assert outcome.code == 3
    assert "license is unknown" in outcome.err
    assert files_of(hub, "me/model") == {}


def test_offline_is_told_at_once(folder, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    outcome = call_program("push", "duo.moe", "me/duo", "--dry-run", cwd=folder)
    assert outcome.code == 6
    assert "offline" in outcome.err
