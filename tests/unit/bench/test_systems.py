import time
from dataclasses import replace
from itertools import pairwise

import pytest

from moemerge.bench.served_engine import ServedEngine, ServedFullSwap
from moemerge.bench.systems import SYSTEMS, System, divide_cores, plan_workers
from moemerge.bench.worker import Counts, WorkerFailed, WorkerSpec
from moemerge.bench.workloads import WorkloadOptions, draw_trace


@pytest.fixture
def trace(subject):
    return draw_trace(
        WorkloadOptions(
            workload="poisson",
            variants=subject.variants,
            num_requests=9,
            prompt_tokens=5,
            output_tokens=4,
            vocab_size=subject.vocab_size,
        ),
        1000.0,
    )


def answers(served, trace):
    return [record.token_ids for record in served.run(trace, time.perf_counter(), 60.0)]


@pytest.mark.parametrize("name", ["mixed", "grouped", "fcfs", "full-swap"])
def test_systems_give_the_tokens_of_one_request_after_the_other(subject, placement, trace, name):
    [alone_spec] = plan_workers("mixed", subject, placement, {"max_batch": 1})
    [spec] = plan_workers(name, subject, placement, {})
    kinds = {"engine": ServedEngine, "full-swap": ServedFullSwap}
    alone, served = ServedEngine(alone_spec), kinds[spec.kind](spec)
    try:
        assert answers(served, trace) == answers(alone, trace)
    finally:
        served.close()
        alone.close()


def test_fcfs_and_full_swap_count_their_swaps(subject, placement, trace):
    changes = sum(a.variant != b.variant for a, b in pairwise(trace))
    for name, kind, num_bytes in (
        ("fcfs", ServedEngine, 0),
        ("full-swap", ServedFullSwap, subject.model_bytes),
    ):
        [spec] = plan_workers(name, subject, placement, {})
        served = kind(spec)
        before = served.counts()
        answers(served, trace)
        counts = served.counts().minus(before)
        served.close()
        assert changes <= counts.swaps <= changes + 1, name
        assert counts.swap_bytes > counts.swaps * num_bytes
        assert counts.swap_s > 0


def test_times_are_counted_from_the_arrival(subject, placement, trace):
    [spec] = plan_workers("mixed", subject, placement, {})
    served = ServedEngine(spec)
    records = served.run(trace, time.perf_counter(), 60.0)
    served.close()
    for record, arrival in zip(records, trace, strict=True):
        assert record.arrival_s == arrival.at_s
        assert record.is_finished
        assert arrival.at_s < record.token_times_s[0] <= record.token_times_s[-1]


@pytest.mark.parametrize("kind", [ServedEngine, ServedFullSwap])
def test_a_run_is_broken_off_and_another_one_goes_well(subject, placement, trace, kind):
    name = "mixed" if kind is ServedEngine else "full-swap"
    [spec] = plan_workers(name, subject, placement, {})
    served = kind(spec)
    whole = answers(served, trace)
    records = served.run(trace, time.perf_counter(), 0.0)
    assert [record.token_ids for record in records] == [()] * len(trace)
    assert all(record.turnaround_s >= 0 for record in records)
    assert answers(served, trace) == whole
    served.close()


def test_systems_differ_in_policy_and_residency(subject, placement):
    def options(name):
        [spec] = plan_workers(name, subject, placement, {})
        return {key: spec.options.get(key) for key in ("policy", "resident")}

    assert options("mixed") == {"policy": "mixed", "resident": "all"}
    assert options("grouped") == {"policy": "grouped", "resident": "all"}
    assert options("fcfs") == {"policy": "fcfs", "resident": "1"}
    assert plan_workers("single", subject, placement, {})[0].variants == subject.variants[:1]


def test_partitions_share_cores_and_the_memory_of_one_model(subject, placement):
    specs = plan_workers("partitioned", subject, placement, {})
    assert [spec.variants for spec in specs] == [(variant,) for variant in subject.variants]
    memory = sum(spec.options["device_memory"] for spec in specs)
    assert subject.bytes_in("float32") - len(specs) < memory <= subject.bytes_in("float32")
    assert {spec.threads for spec in specs} == {1}


@pytest.mark.parametrize(
    ("num_cores", "num_parts", "expected"),
    [
        (4, 2, [(0, 1), (2, 3)]),
        (2, 2, [(0,), (1,)]),
        (2, 4, [(0,), (0,), (1,), (1,)]),
        (1, 3, [(0,), (0,), (0,)]),
        (5, 2, [(0, 1), (2, 3)]),
    ],
)
def test_cores_are_divided(num_cores, num_parts, expected):
    assert divide_cores(range(num_cores), num_parts) == expected


def test_a_system_of_several_processes_answers_every_request(subject, placement, trace):
    with System("partitioned", subject, placement) as partitioned:
        outcome = partitioned.run(trace, 60.0)
        assert [record.variant for record in outcome.records] == [arrival.variant for arrival in trace]
        assert all(record.is_finished for record in outcome.records)
        assert outcome.counts.expert_misses > 0
        assert outcome.memory.peak_rss_bytes > 0
    with System("single", subject, placement) as single:
        outcome = single.run(trace, 60.0)
        assert set(outcome.asked) == {subject.variants[0]}
        assert [record.variant for record in outcome.records] == [arrival.variant for arrival in trace]
        gaps = single.probe(
            "token_gaps", texts=[(outcome.asked[0], trace[0].prompt_ids, outcome.records[0].token_ids)]
        )
        assert gaps == [[0.0] * 4]


def test_a_system_that_cannot_start_says_why(subject, placement):
    with pytest.raises(WorkerFailed, match="device memory of"):
        System("mixed", subject, placement, device_memory=1000)
    with pytest.raises(WorkerFailed, match="no such bundle"):
        System("mixed", replace(subject, bundle=subject.bundle / "gone"), placement)


def test_counts_add_up():
    one, two = Counts(swaps=2, swap_s=0.5), Counts(swaps=1, swap_s=0.25, steps=4)
    assert one.plus(two) == Counts(swaps=3, swap_s=0.75, steps=4)
    assert one.plus(two).minus(one) == two


def test_every_system_has_workers(subject, placement):
    for name in SYSTEMS:
        specs = plan_workers(name, subject, placement, {})
        assert all(isinstance(spec, WorkerSpec) for spec in specs)
