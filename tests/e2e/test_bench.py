"""`moemerge bench` on generated weights of a few hundred kilobytes."""

import json

import pytest

from moemerge.bench.report import read_report
from tests.e2e.program import call_program

ARGUMENTS = ("bench", "--model", "tiny", "--variants", "3", "--quick", "--allow-busy", "--threads", "1")


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    return tmp_path_factory.mktemp("work")


def test_systems_are_compared_and_give_the_same_tokens(work, tmp_path):
    out = tmp_path / "out"
    outcome = call_program(
        *ARGUMENTS, "--systems", "single,mixed,grouped,fcfs", "--requests", "6", "--load", "0.5",
        "--work", work, "-o", out, "--json",
    )  # fmt: skip
    assert outcome.code == 0, outcome.err
    data = outcome.envelope["data"]
    assert data["schema"] == "moemerge/bench@1"
    assert [run["system"] for run in data["runs"]] == ["single", "mixed", "grouped", "fcfs"]
    assert all(run["failure"] is None and run["unfinished"] == 0 for run in data["runs"])
    assert all(len(run["requests"]) == 6 for run in data["runs"])
    assert data["check"]["num_requests"] == 6
    assert data["capacity_requests_per_s"] > 0
    assert read_report(out / "result.json").model_dump(mode="json", by_alias=True) == data
    assert "| mixed |" in (out / "tables.md").read_text()


def test_a_bundle_and_a_trace_file(work, tmp_path):
    trace = tmp_path / "trace.jsonl"
    lines = [
        {"time_s": 0.01 * number, "variant": "xyz"[number % 3], "prompt_tokens": 5, "output_tokens": 3}
        for number in range(4)
    ]
    trace.write_text("".join(json.dumps(line) + "\n" for line in lines))
    bundle = next(work.glob("tiny-*/3-variants.moe"))
    outcome = call_program(
        "bench", bundle, "--systems", "mixed", "--workload", trace, "--quick", "--no-check", "--allow-busy",
        "--threads", "1", "--work", work,
    )  # fmt: skip
    assert outcome.code == 0, outcome.err
    assert "Arrivals as the workload has them" in outcome.out
    assert "mixed" in outcome.out


def test_claims_are_printed_with_their_bars(work):
    outcome = call_program(
        *ARGUMENTS, "--claims", "cold-swap,map-overhead,decode-bandwidth,resident-switch", "--work", work
    )
    assert outcome.code == 0, outcome.err
    assert "cold swap against bytes by copy bandwidth" in outcome.out
    assert "at most 1.15 x" in outcome.out
    assert outcome.out.count("missed") + outcome.out.count(" met") >= 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--systems", "mixed,fast"), "system 'fast' is unknown"),
        (("--claims", "speed"), "claim 'speed' is unknown"),
        (("--model", "huge"), "model 'huge' is unknown"),
        (("--load", "0"), "load is 0.0"),
        (("--load", "0.5", "--workload", "burst"), "everything at once"),
        (("--threads", "1000"), "threads is 1000"),
        (("--plot", "load.txt"), "a plot ends with"),
    ],
)
def test_options_that_cannot_be_are_refused_before_anything_is_made(tmp_path, arguments, message):
    outcome = call_program("bench", "--allow-busy", "--work", tmp_path / "work", *arguments)
    assert outcome.code == 3
    assert message in outcome.err
    assert not (tmp_path / "work").exists()
