"""What an installation can do, and what is said when something is wrong with it."""

from collections import namedtuple
from types import SimpleNamespace

import pytest
import torch

from moemerge.bench import environment
from tests.e2e.program import call_program

Usage = namedtuple("Usage", "total used free")


def doctor(*arguments):
    """The checks by name."""
    outcome = call_program("doctor", *arguments, "--json")
    assert outcome.code == 0, outcome.out
    return {check["name"]: check for check in outcome.envelope["data"]["checks"]}


def test_everything_is_looked_at_and_told():
    checks = doctor("--offline")
    assert {"moemerge", "torch", "processors", "memory", "disk", "hub cache", "extra serve"} <= checks.keys()
    assert torch.__version__ in checks["torch"]["found"]
    told = call_program("doctor", "--offline")
    assert told.code == 0
    for check in checks.values():
        assert check["name"] in told.out
        assert not check["fix"] or check["fix"] in told.out


def test_hub_that_answers_is_told_with_who_is_logged_in(server, monkeypatch):
    found = doctor()["hub"]
    assert (found["level"], server.url in found["found"]) == ("ok", True)
    assert "no token" in found["found"]
    monkeypatch.setenv("HF_TOKEN", server.token)
    assert "logged in as tester" in doctor()["hub"]["found"]


def test_token_that_is_not_valid_is_told_and_not_shown(server, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    outcome = call_program("doctor", "--json")
    hub = next(check for check in outcome.envelope["data"]["checks"] if check["name"] == "hub")
    assert (hub["level"], "hf auth login" in hub["fix"]) == ("warning", True)
    assert "hf_wrong" not in outcome.out + outcome.err


def test_hub_that_does_not_answer_is_a_warning(server, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    found = doctor()["hub"]
    assert (found["level"], "the connection failed" in found["found"]) == ("warning", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE" in doctor()["hub"]["found"]


def test_missing_extra_is_told_with_the_command(monkeypatch):
    is_installed = environment._is_installed
    monkeypatch.setattr(environment, "_is_installed", lambda name: name != "plotly" and is_installed(name))
    found = doctor("--offline")
    assert found["extra report"]["found"] == "not installed: plotly"
    assert found["extra report"]["fix"] == 'pip install "moemerge[report]"'
    assert found["extra serve"]["level"] == "ok"


@pytest.mark.parametrize(
    ("free", "total", "limit", "level", "word"),
    [
        (16, 16, None, "ok", ""),
        (2, 16, None, "warning", "--max-ram"),
        (16, 16, 8, "warning", "--max-ram 6144MiB"),
        (16, 16, 32, "ok", ""),
    ],
)
def test_memory(free, total, limit, level, word, tmp_path, monkeypatch):
    memory = SimpleNamespace(available=free * 2**30, total=total * 2**30)
    monkeypatch.setattr(environment.psutil, "virtual_memory", lambda: memory)
    (tmp_path / "limit").write_text(str(limit * 2**30) if limit else "max\n")
    monkeypatch.setattr(environment, "_CGROUP_LIMITS", (str(tmp_path / "limit"),))
    (found,) = environment._check_memory()
    assert (found.level, word in found.fix) == (level, True)


def test_threads_that_are_too_many_or_few_are_told(monkeypatch):
    monkeypatch.setattr(environment, "usable_cores", lambda: tuple(range(8)))
    for threads, level in ((8, "ok"), (32, "warning"), (1, "warning")):
        monkeypatch.setattr(environment.torch, "get_num_threads", lambda count=threads: count)
        (found,) = environment._check_processors()
        assert found.level == level


def test_full_disk_is_a_warning_and_one_that_cannot_be_written_an_error(monkeypatch, tmp_path):
    monkeypatch.setattr("moemerge.checkpoint.disk.shutil.disk_usage", lambda path: Usage(10**9, 10**9, 999))
    assert {doctor("--offline")[name]["level"] for name in ("disk", "hub cache")} == {"warning"}
    monkeypatch.setattr(environment.os, "access", lambda path, mode: False)
    outcome = call_program("doctor", "--offline", "--json")
    assert outcome.code == 9
    assert {"disk", "hub cache"} <= {
        f["where"] for f in outcome.envelope["findings"] if f["level"] == "error"
    }
    told = call_program("doctor", "--offline")
    assert told.code == 9
    assert "Set HF_HOME" in told.out
