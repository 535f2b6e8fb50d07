"""How the program ends when it is called wrongly, stopped, or cannot write what it found."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from moemerge.cli import app
from tests.e2e.program import call_program, run_program, start_slow_program
from tests.e2e.test_interruption import wait_for_step
from tests.factories import write_checkpoint, write_siblings


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("one") / "base")


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("show", "--jsonn"), "--jsonn"),
        (("show",), "REF"),
        (("sho", "x"), "sho"),
        (("report", "x", "--top", "many"), "--top"),
        (("run", "x", "-v", "y"), "PROMPT"),
    ],
)
def test_usage_errors_are_told_as_text_and_as_json(arguments, named):
    told = call_program(*arguments)
    assert (told.code, told.out) == (2, "")
    assert named in told.err
    found = call_program(*arguments, "--json")
    assert (found.code, found.err) == (2, "")
    assert found.envelope["command"] == arguments[0]
    assert named in found.envelope["data"]["message"]
    assert found.envelope["findings"][0]["code"] == "Usage"


def test_json_is_asked_for_by_environment_too_and_not_by_an_argument(monkeypatch):
    assert call_program("show", "--", "--json", "more").out == ""
    monkeypatch.setenv("MOEMERGE_JSON", "yes")
    assert call_program("show").envelope["exit_code"] == 2


def test_help_without_arguments_ends_as_a_usage_error():
    outcome = call_program()
    assert outcome.code == 2
    assert "Usage: moemerge" in outcome.out + outcome.err


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_stopped_merge_says_in_json_how_to_continue(number, code, tmp_path):
    write_siblings(tmp_path, names=("code", "law"), settings={"num_layers": 8})
    target = tmp_path / "duo.moe"
    sources = [f"{name}={tmp_path / name}" for name in ("code", "law")]
    process = start_slow_program("merge", *sources, "-o", target, "--budget", "1x", "--json")
    wait_for_step(target, "similarity 1")
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    envelope = json.loads(out)
    assert (process.returncode, envelope["exit_code"], envelope["ok"]) == (code, code, False)
    assert envelope["command"] == "merge"
    assert envelope["findings"][0]["code"] == "Interrupted"
    assert "run the same command again to continue" in envelope["data"]["message"]
    assert "Traceback" not in err


def test_bug_shows_its_traceback_and_is_told_in_json(checkpoint, monkeypatch, capsys):
    monkeypatch.setattr("moemerge.cli.show._show_checkpoint", lambda checkpoint, *, as_json: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        app.main(["show", str(checkpoint), "--json"])
    envelope = json.loads(capsys.readouterr().out)
    assert (envelope["exit_code"], envelope["findings"][0]["code"]) == (1, "Internal")


def shell(command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", "-c", command], capture_output=True, text=True, timeout=60, check=False, env=os.environ
    )


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
@pytest.mark.parametrize("form", ["", "--json"])
def test_full_output_is_an_error_in_one_line(form, checkpoint):
    done = shell(f"{sys.executable} -m moemerge show {checkpoint} {form} >/dev/full")
    assert done.returncode == 7
    assert done.stderr == "error: standard output: cannot be written (No space left on device)\n"


def test_closed_output_does_not_hinder_the_work(checkpoint, tmp_path):
    program = f"{sys.executable} -m moemerge"
    done = shell(f"{program} show {checkpoint} >&-")
    assert (done.returncode, done.stderr) == (0, "")
    target = tmp_path / "one.moe"
    done = shell(f"{program} merge a={checkpoint} -o {target} --budget exact >&- 2>&- <&-")
    assert done.returncode == 0
    assert run_program("verify", target).code == 0
