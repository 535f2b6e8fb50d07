import numpy as np
import pytest

from moemerge.bench.metrics import (
    Record,
    bootstrap_interval,
    jain_index,
    latencies,
    output_rate,
    request_rate,
    spread,
    turnaround_by_variant,
)


def answered(arrival_s, *times, variant="a"):
    return Record(
        variant=variant,
        arrival_s=arrival_s,
        token_ids=tuple(range(len(times))),
        token_times_s=times,
        wanted_tokens=len(times),
    )


def broken_off(arrival_s, ended_s, *times):
    return Record(
        variant="a",
        arrival_s=arrival_s,
        token_ids=tuple(range(len(times))),
        token_times_s=times,
        wanted_tokens=len(times) + 1,
        ended_s=ended_s,
    )


def test_latencies_of_a_request():
    request = answered(1.0, 1.5, 1.75, 2.5)
    assert request.turnaround_s == 1.5
    assert request.ttft_s == 0.5
    assert request.tpot_s == 0.5
    assert request.itl_s == [0.25, 0.75]


def test_a_single_token_has_no_time_per_output_token():
    request = answered(1.0, 3.0)
    assert (request.turnaround_s, request.ttft_s, request.tpot_s, request.itl_s) == (2.0, 2.0, None, [])


def test_an_unfinished_request_counts_until_the_end_of_the_run():
    waiting, begun = broken_off(1.0, 10.0), broken_off(1.0, 10.0, 4.0)
    assert not waiting.is_finished
    assert (waiting.turnaround_s, waiting.ttft_s, waiting.tpot_s) == (9.0, 9.0, None)
    assert (begun.turnaround_s, begun.ttft_s, begun.tpot_s) == (9.0, 3.0, None)


def test_latencies_of_a_run():
    found = latencies([answered(0.0, 1.0, 2.0), answered(1.0, 4.0, 5.0), answered(2.0, 10.0)])
    assert (found.turnaround.mean, found.turnaround.p50) == (pytest.approx(14 / 3), 4.0)
    assert (found.ttft.mean, found.ttft.p50) == (4.0, 3.0)
    # Linear between the second and the third of three values.
    assert found.ttft.p99 == pytest.approx(3 + 0.98 * 5)
    assert found.tpot == spread([1.0, 1.0])
    assert found.itl == spread([1.0, 1.0])


def test_rates_go_from_the_first_arrival_to_the_last_token():
    records = [answered(1.0, 2.0, 3.0), answered(2.0, 4.0, 5.0, 6.0)]
    assert output_rate(records) == 1.0
    assert request_rate(records) == pytest.approx(2 / 5)
    assert request_rate([records[0], broken_off(1.0, 11.0, 2.0)]) == pytest.approx(1 / 10)


def test_turnaround_by_variant_is_per_token():
    records = [answered(0.0, 1.0, 2.0), answered(0.0, 4.0), answered(0.0, 3.0, variant="b")]
    assert turnaround_by_variant(records) == {"a": 2.5, "b": 3.0}


def test_jain_index():
    assert jain_index([2.0, 2.0, 2.0]) == 1.0
    assert jain_index([1.0, 0.0, 0.0, 0.0]) == 0.25
    assert jain_index([1.0, 3.0]) == pytest.approx(16 / 20)


def test_interval_of_equal_values_is_the_value():
    assert bootstrap_interval([[2.0, 2.0], [2.0, 2.0, 2.0]]) == (2.0, 2.0)


def test_interval_lies_around_the_figure_and_shrinks_with_more_values():
    generator = np.random.default_rng(0)
    few, many = ([list(generator.normal(5, 1, size)) for _ in range(3)] for size in (10, 1000))
    for rounds in (few, many):
        low, high = bootstrap_interval(rounds)
        assert low < 5 < high
    assert np.diff(bootstrap_interval(many)) < np.diff(bootstrap_interval(few))
    assert bootstrap_interval(few) == bootstrap_interval(few)


def test_interval_of_a_median_ignores_one_wild_value():
    rounds = [[1.0] * 20 + [1e6]] * 3
    assert bootstrap_interval(rounds, np.median) == (1.0, 1.0)
    assert bootstrap_interval(rounds)[1] > 1e3
