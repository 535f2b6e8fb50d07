"""`moemerge serve` as a process: what it prints, how it refuses to start, how it stops."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from typer.main import get_command

from moemerge.checkpoint.variants import open_variants
from moemerge.cli.app import app
from moemerge.consolidation.pipeline import merge
from moemerge.consolidation.task import options_of
from moemerge.refs import FolderRef
from tests.e2e.program import call_program
from tests.e2e.serving import error_of, wait_for
from tests.factories import write_siblings

ENDLESS = {"model": "code", "prompt": "a", "ignore_eos": True, "temperature": 0, "stream": True}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    folder = tmp_path_factory.mktemp("program")
    _, siblings = write_siblings(folder, names=("code", "law"), settings={"max_positions": 65536})
    variants = open_variants({name: FolderRef(path) for name, path in siblings.items()})
    merge(variants, folder / "duo.moe", options_of("exact"))
    return folder / "duo.moe"


@contextmanager
def started(bundle, *options):
    """The program, and the object that it prints when it is ready."""
    command = [sys.executable, "-m", "moemerge", "serve", bundle, "--port", "0", "--json", "--threads", "1"]
    process = subprocess.Popen(
        [*map(str, command), *map(str, options)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    try:
        lines = []
        while not lines or lines[-1] != "}\n":
            lines.append(process.stdout.readline())
            assert lines[-1], process.stderr.read()
        yield process, json.loads("".join(lines))["data"]
    finally:
        process.kill()
        process.communicate()


def read_stream(http, body, events):
    with http.stream("POST", "/v1/completions", json=body) as answer:
        events.extend(line.removeprefix("data: ") for line in answer.iter_lines() if line)


def test_sigterm_lets_answers_end_and_takes_no_new_ones(bundle):
    with started(bundle, "--kv-memory", "64MiB", "--drain", "60") as (process, ready):
        assert set(ready["variants"]) == {"code", "law"}
        events = []
        with httpx.Client(base_url=ready["url"], timeout=60) as http:
            body = {**ENDLESS, "max_tokens": 800}
            reader = threading.Thread(target=read_stream, args=(http, body, events))
            reader.start()
            wait_for(lambda: len(events) > 3 or metric(http, 'requests_running{variant="code"}') == 1)
            process.send_signal(signal.SIGTERM)
            wait_for(lambda: http.get("/ready").status_code == 503)
            refused = http.post("/v1/completions", json={**ENDLESS, "max_tokens": 1})
            assert refused.status_code == 503
            assert error_of(refused)["code"] == "stopping"
            assert int(refused.headers["retry-after"]) >= 1
            assert http.get("/health").status_code == 200
            reader.join(60)
        assert events[-1] == "[DONE]"
        choices = [json.loads(event)["choices"][0] for event in events[:-1]]
        assert choices[-1]["finish_reason"] == "length"
        assert process.wait(60) == 0
        assert process.stderr.read() == ""


def metric(http, name):
    text = http.get("/metrics").text
    return next((float(line.rsplit(" ", 1)[1]) for line in text.splitlines() if f"_{name} " in line), None)


def test_answers_beyond_the_drain_are_cut_with_an_error(bundle):
    with started(bundle, "--kv-memory", "64MiB", "--drain", "0.1") as (process, ready):
        events = []
        with httpx.Client(base_url=ready["url"], timeout=60) as http:
            body = {**ENDLESS, "max_tokens": 60_000}
            reader = threading.Thread(target=read_stream, args=(http, body, events))
            reader.start()
            wait_for(lambda: metric(http, 'requests_running{variant="code"}') == 1)
            process.send_signal(signal.SIGINT)
            reader.join(60)
        assert json.loads(events[-2])["error"]["code"] == "stopping"
        assert events[-1] == "[DONE]"
        assert process.wait(60) == 0


def test_second_signal_ends_at_once(bundle):
    with started(bundle, "--kv-memory", "64MiB", "--drain", "300") as (process, ready):
        body = {**ENDLESS, "max_tokens": 60_000}
        with (
            httpx.Client(base_url=ready["url"], timeout=60) as http,
            http.stream("POST", "/v1/completions", json=body) as answer,
        ):
            assert answer.status_code == 200
            lines = answer.iter_lines()
            next(lines)
            process.send_signal(signal.SIGTERM)
            with pytest.raises(subprocess.TimeoutExpired):
                process.wait(0.5)
            process.send_signal(signal.SIGTERM)
            assert process.wait(60) == 143, process.stderr.read()
        assert "second signal" in process.stderr.read()


@pytest.mark.parametrize("options", [("--max-queue", 2), ("--max-queue-per-variant", 2)])
def test_more_answers_than_the_queue_ever_holds_are_refused_for_good(bundle, options):
    with (
        started(bundle, "--max-batch", 1, *options) as (_, ready),
        httpx.Client(base_url=ready["url"], timeout=60) as http,
    ):
        body = {"model": "code", "prompt": ["a", "b"], "max_tokens": 1, "n": 2}
        refused = http.post("/v1/completions", json=body)
        assert (refused.status_code, error_of(refused)["param"]) == (400, "n")
        assert "3" in error_of(refused)["message"]
        assert http.post("/v1/completions", json={**body, "prompt": "a", "n": 3}).status_code == 200


# Refusals to start


def test_broken_chat_template_is_refused(tmp_path):
    _, siblings = write_siblings(tmp_path, names=("code", "law"))
    (siblings["law"] / "chat_template.jinja").write_text("{% if %}")
    variants = open_variants({name: FolderRef(path) for name, path in siblings.items()})
    merge(variants, tmp_path / "duo.moe", options_of("exact"))
    outcome = call_program("serve", tmp_path / "duo.moe", "--port", 0)
    assert outcome.code not in (0, 1), outcome.err
    assert "variant law" in outcome.err
    assert "chat template" in outcome.err


@pytest.mark.parametrize(
    ("options", "code", "said"),
    [
        (("--resident", "0"), 3, "resident"),
        (("--policy", "fair"), 3, "mixed, grouped, fcfs"),
        (("--share", "code"), 3, "NAME=NUMBER"),
        (("--share", "code=-1"), 3, "share of code"),
        (("--share", "prose=2"), 5, "prose"),
        (("--variant", "prose"), 5, "prose"),
        (("--pin", "prose"), 5, "prose"),
        (("--device-memory", "1KiB"), 7, "device memory"),
        (("--kv-memory", "many"), 3, "not a size"),
        (("--host", "no.such.host.invalid"), 3, "no such address"),
        (("--root-path", "moe/"), 3, "root path"),
        (("--api-key-file", "no-such-file"), 5, "no such file"),
        (("--drain", "inf"), 3, "drain"),
        (("--port", "99999"), 2, ""),
    ],
)
def test_options_that_cannot_be_are_refused(bundle, tmp_path, options, code, said):
    outcome = call_program("serve", bundle, "--port", 0, *options, cwd=tmp_path)
    assert outcome.code == code, outcome.err
    assert said in outcome.err


def test_key_file_that_others_may_read_is_refused(bundle, tmp_path):
    keys = tmp_path / "keys"
    for text, mode, said in (
        ("key\n", 0o644, "chmod 600"),
        ("\n \n", 0o600, "no key"),
        ("a b\n", 0o600, "key 1"),
    ):
        keys.write_text(text)
        keys.chmod(mode)
        outcome = call_program("serve", bundle, "--api-key-file", keys)
        assert outcome.code == 3
        assert said in outcome.err


def test_taken_port_is_told_before_anything_is_loaded(bundle):
    with socket.create_server(("127.0.0.1", 0)) as other:
        outcome = call_program("serve", bundle, "--port", other.getsockname()[1])
    assert outcome.code == 10
    assert "--port" in outcome.err


def test_missing_extra_is_named(bundle):
    program = "import sys; sys.modules['fastapi'] = None; from moemerge.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", program, "serve", str(bundle)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 5
    assert "pip install 'moemerge[serve]'" in done.stderr


def test_page_on_serving_names_every_option():
    page = (Path(__file__).parents[2] / "docs" / "serving.md").read_text(encoding="utf-8")
    (command,) = [c for c in get_command(app).commands.values() if c.name == "serve"]
    options = [name for option in command.params for name in option.opts if name.startswith("--")]
    assert len(options) > 20
    assert [name for name in options if name not in page] == []
