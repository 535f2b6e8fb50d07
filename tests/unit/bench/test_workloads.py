import json

import numpy as np
import pytest

from moemerge.bench.workloads import (
    BURST_CV,
    WORKLOADS,
    WorkloadOptions,
    all_at_once,
    all_to,
    draw_trace,
    scale_trace,
    shorten,
    zipf_shares,
)
from moemerge.errors import InvalidRecipe, NotFound

NAMES = ("a", "b", "c", "d")


def options(workload, num_requests=4000, **changes):
    values = {
        "workload": workload,
        "variants": NAMES,
        "num_requests": num_requests,
        "prompt_tokens": 4,
        "output_tokens": 2,
        "vocab_size": 50,
        "seed": 3,
    }
    return WorkloadOptions(**{**values, **changes})


def gaps(trace):
    return np.diff([arrival.at_s for arrival in trace])


@pytest.mark.parametrize("workload", WORKLOADS)
def test_same_options_give_the_same_trace(workload):
    assert draw_trace(options(workload, 50), 2.0) == draw_trace(options(workload, 50), 2.0)
    assert draw_trace(options(workload, 50), 2.0) != draw_trace(options(workload, 50, seed=4), 2.0)


@pytest.mark.parametrize("workload", ["poisson", "zipf", "bursty", "alternating"])
def test_a_trace_offers_the_rate_asked_for(workload):
    trace = draw_trace(options(workload, 100), 5.0)
    assert trace[0].at_s == 0
    assert gaps(trace).mean() == pytest.approx(0.2)


@pytest.mark.parametrize("workload", ["poisson", "bursty"])
def test_another_load_changes_the_times_alone(workload):
    slow, fast = (draw_trace(options(workload, 100), rate) for rate in (1.0, 4.0))
    assert [a.prompt_ids for a in slow] == [a.prompt_ids for a in fast]
    assert [a.at_s for a in slow] == pytest.approx([4 * a.at_s for a in fast])


@pytest.mark.parametrize(("workload", "expected"), [("poisson", 1.0), ("zipf", 1.0), ("bursty", BURST_CV)])
def test_gaps_vary_as_the_law_says(workload, expected):
    found = gaps(draw_trace(options(workload), 1.0))
    assert found.std() / found.mean() == pytest.approx(expected, rel=0.15)


def test_poisson_chooses_variants_equally_often():
    chosen = [arrival.variant for arrival in draw_trace(options("poisson"), 1.0)]
    assert [chosen.count(name) / len(chosen) for name in NAMES] == pytest.approx([0.25] * 4, abs=0.03)


@pytest.mark.parametrize("workload", ["zipf", "bursty"])
def test_zipf_shares_fall_with_the_rank(workload):
    assert zipf_shares(4) == pytest.approx(np.array([12, 6, 4, 3]) / 25)
    chosen = [arrival.variant for arrival in draw_trace(options(workload), 1.0)]
    assert [chosen.count(name) / len(chosen) for name in NAMES] == pytest.approx(zipf_shares(4), abs=0.03)


def test_alternating_never_asks_a_variant_twice_in_a_row():
    trace = draw_trace(options("alternating", 10), 2.0)
    assert [arrival.variant for arrival in trace] == ["a", "b", "c", "d", "a", "b", "c", "d", "a", "b"]
    assert gaps(trace) == pytest.approx([0.5] * 9)


def test_burst_has_everything_at_once():
    trace = draw_trace(options("burst", 8), 1.0)
    assert {arrival.at_s for arrival in trace} == {0.0}
    assert [arrival.variant for arrival in trace] == [*NAMES, *NAMES]


def test_lengths_are_fixed_or_log_normal_around_the_median():
    fixed = draw_trace(options("poisson", 20), 1.0)
    assert {(len(a.prompt_ids), a.output_tokens) for a in fixed} == {(4, 2)}
    drawn = draw_trace(options("zipf", 4000, prompt_tokens=64, output_tokens=32), 1.0)
    prompts = np.array([len(a.prompt_ids) for a in drawn])
    outputs = np.array([a.output_tokens for a in drawn])
    assert np.median(prompts) == pytest.approx(64, rel=0.05)
    assert np.log(prompts).std() == pytest.approx(0.7, rel=0.05)
    assert (prompts.min(), prompts.max()) >= (16, 17)
    assert prompts.max() <= 512
    assert outputs.min() >= 16
    assert outputs.max() <= 128


def test_prompts_are_in_the_vocabulary_and_differ():
    trace = draw_trace(options("poisson", 100, prompt_tokens=12), 1.0)
    assert all(8 <= token_id < 50 for arrival in trace for token_id in arrival.prompt_ids)
    assert len({arrival.prompt_ids for arrival in trace}) == 100


def test_traces_are_changed_without_touching_the_rest():
    trace = draw_trace(options("poisson", 10), 1.0)
    assert {arrival.at_s for arrival in all_at_once(trace)} == {0.0}
    assert {arrival.variant for arrival in all_to(trace, "c")} == {"c"}
    assert gaps(scale_trace(trace, 10.0)).mean() == pytest.approx(0.1)
    assert [arrival.output_tokens for arrival in shorten(trace, 3, 1)] == [1, 1, 1]


def write_lines(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def record(**changes):
    return {"time_s": 1.5, "variant": "x", "prompt_tokens": 3, "output_tokens": 5, **changes}


def test_a_trace_file_is_replayed(tmp_path):
    lines = [record(time_s=4), record(variant="b"), record(variant="y", output_tokens=7)]
    path = write_lines(tmp_path / "trace.jsonl", lines)
    trace = draw_trace(options(str(path), None), None)
    assert [arrival.at_s for arrival in trace] == [0.0, 0.0, 2.5]
    # b is a variant; y and x are not, and stand for the variants in turn.
    assert [arrival.variant for arrival in trace] == ["b", "b", "c"]
    assert [arrival.output_tokens for arrival in trace] == [5, 7, 5]
    assert all(len(arrival.prompt_ids) == 3 for arrival in trace)


def test_a_trace_file_takes_another_rate(tmp_path):
    path = write_lines(tmp_path / "trace.jsonl", [record(time_s=time_s) for time_s in (0, 1, 9)])
    assert [a.at_s for a in draw_trace(options(str(path), None), 1.0)] == pytest.approx([0, 2 / 9, 2])


@pytest.mark.parametrize(
    "line", ["{", "[]", '{"time_s": 1}', json.dumps(record(time_s=-1)), json.dumps(record(output_tokens=0))]
)
def test_a_bad_line_is_named(tmp_path, line):
    path = tmp_path / "trace.jsonl"
    path.write_text(json.dumps(record()) + "\n" + line + "\n")
    with pytest.raises(InvalidRecipe, match="line 2"):
        draw_trace(options(str(path), None), None)


def test_what_cannot_be_is_refused(tmp_path):
    with pytest.raises(NotFound, match="none of poisson"):
        draw_trace(options("weekly"), 1.0)
    with pytest.raises(InvalidRecipe, match="the context has 5"):
        draw_trace(options("poisson", max_tokens=5), 1.0)
    with pytest.raises(InvalidRecipe, match="requests is 0"):
        options("poisson", 0)
    with pytest.raises(InvalidRecipe, match="prompt_tokens is 0"):
        options("poisson", prompt_tokens=0)
    empty = tmp_path / "empty.jsonl"
    empty.touch()
    with pytest.raises(InvalidRecipe, match="holds no requests"):
        draw_trace(options(str(empty)), None)
