"""`moemerge run` with files of requests, chat templates and sampling options."""

import json
import signal
import subprocess
import sys
import time

import pytest

from tests.e2e.program import call_program, run_program
from tests.e2e.serving import error_of, serve

LINES = [
    {"variant": variant, "prompt": prompt, "max_tokens": 12}
    for prompt in ("for", "Q: 17 + 25", "And he said")
    for variant in ("code", "sums", "scripture")
]


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "requests.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in LINES), encoding="utf-8")
    return path


def results(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_file_gives_what_prompts_give_one_at_a_time(mini_bundle, source, tmp_path):
    target = tmp_path / "results.jsonl"
    done = run_program("run", mini_bundle, "--input", source, "--output", target)
    assert done.code == 0, done.err
    assert done.out == f"Results: {target}\n"
    assert "9 lines; " in done.err
    for line, result in zip(LINES, results(target), strict=True):
        alone = call_program(
            "run", mini_bundle, "-v", line["variant"], line["prompt"], "--max-tokens", 12, "--json"
        )
        assert result["text"] == alone.envelope["data"]["answers"][0]["text"]


def test_second_run_has_nothing_to_do_and_options_matter(mini_bundle, source, tmp_path):
    arguments = ("run", mini_bundle, "--input", source, "--output", tmp_path / "results.jsonl")
    call_program(*arguments)
    again = call_program(*arguments, "--json").envelope["data"]
    assert (again["num_lines"], again["num_resumed"], again["num_tokens"]) == (9, 9, 0)
    other = call_program(*arguments, "--temperature", "0.7")
    assert other.code == 3
    assert "is not a result of" in other.err


def test_killed_run_goes_on(mini_bundle, tmp_path):
    source, target = tmp_path / "requests.jsonl", tmp_path / "results.jsonl"
    lines = [{**line, "max_tokens": 200, "ignore_stop": True} for line in LINES * 8]
    source.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    arguments = [sys.executable, "-m", "moemerge", "run", mini_bundle]
    arguments += ["--input", source, "--output", target, "--max-batch", "4"]
    process = subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and (not target.exists() or target.stat().st_size < 2000):
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    written = target.read_bytes().count(b"\n")
    assert 0 < written < len(lines)
    done = call_program(*arguments[3:], "--json").envelope["data"]
    assert done["num_resumed"] == written
    assert [result["line"] for result in results(target)] == list(range(1, len(lines) + 1))


def test_bad_lines_stop_the_run_before_it_begins(mini_bundle, tmp_path):
    source = tmp_path / "requests.jsonl"
    source.write_text('{"variant": "code"}\n{"variant": "latin", "prompt": "a"}\n')
    done = call_program("run", mini_bundle, "--input", source, "--output", tmp_path / "out", "--json")
    assert done.code == 3
    assert [finding["where"][-6:] for finding in done.envelope["findings"]] == ["line 1", "line 2"]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        ("word",),
        ("-v", "code"),
        ("--input", "x"),
        ("--output", "x", "-v", "code", "word"),
        ("--input", "x", "--output", "y", "word"),
        ("--input", "x", "--output", "y", "-v", "code", "-v", "sums"),
        ("--input", "x", "--output", "y", "--chat"),
        ("-v", "code", "word", "--top-k", "-1"),
    ],
    ids=" ".join,
)
def test_options_that_do_not_go_together_are_a_usage_error(arguments, mini_bundle):
    assert call_program("run", mini_bundle, *arguments).code == 2


@pytest.mark.parametrize(
    "option", [("--top-p", "0"), ("--repetition-penalty", "0"), ("--temperature", "inf")]
)
def test_sampling_that_cannot_be_is_refused(option, mini_bundle):
    done = call_program("run", mini_bundle, "-v", "code", "for", *option)
    assert done.code == 3
    assert option[0].strip("-").replace("-", "_") in done.err


def test_stop_string_and_sampling_reach_the_engine(mini_bundle):
    plain = call_program("run", mini_bundle, "-v", "sums", "Q: 17 + 25", "-q").out
    stopped = call_program("run", mini_bundle, "-v", "sums", "Q: 17 + 25", "-q", "--stop", "A:").out
    assert stopped == plain[: plain.index("A:")] + "\n"
    sampled = ("run", mini_bundle, "-v", "sums", "Q:", "-q", "--temperature", "1.5")
    assert call_program(*sampled).out != call_program(*sampled, "--top-k", "1").out


def test_chat_option_asks_through_the_template(mini_bundle):
    arguments = ("run", mini_bundle, "-v", "code", "for", "--max-tokens", "4", "--json")
    plain, chat = (
        call_program(*arguments, *extra).envelope["data"]["answers"][0] for extra in ((), ("--chat",))
    )
    # <|user|>, the prompt, </s>, <|assistant|>
    assert chat["prompt_tokens"] == plain["prompt_tokens"] + 3


def test_file_and_server_refuse_the_same_in_the_same_words(mini_bundle, tmp_path):
    source = tmp_path / "requests.jsonl"
    with serve(mini_bundle) as served:
        for wrong in (
            {"max_tokens": 600},
            {"max_tokens": 4, "min_tokens": 5},
            {"min_tokens": 600, "max_tokens": 500},
            {"min_tokens": -1},
            {"logprobs": 21},
            {"max_tokens": "9"},
            {"logit_bias": {"99999": 1}},
            {"prompt": ""},
            {"prompt": "word " * 600},
        ):
            line = {"prompt": "for", **wrong}
            source.write_text(json.dumps({**line, "variant": "code"}))
            done = call_program("run", mini_bundle, "--input", source, "--output", tmp_path / "out")
            answer = served.post("/v1/completions", {**line, "model": "code"})
            assert (done.code, answer.status_code) == (3, 400)
            assert done.err.rstrip().endswith(f"line 1: {error_of(answer)['message']}")
    assert not (tmp_path / "out").exists()


def test_place_that_cannot_be_written_is_told_before_anything_is_read(mini_bundle, source, tmp_path):
    place = tmp_path / "file"
    place.touch()
    done = call_program("run", mini_bundle, "--input", source, "--output", place / "results.jsonl")
    assert done.code == 7
    assert "cannot be written" in done.err
    assert "another moemerge" not in done.err
