"""All systems over one trace: the check of their tokens, the capacity, rounds at every load, the report."""

import datetime
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from moemerge.bench.machine import Watch, describe_machine
from moemerge.bench.metrics import (
    Record,
    jain_index,
    latencies,
    output_rate,
    request_rate,
    turnaround_by_variant,
)
from moemerge.bench.outputs import Text, check_float32, equal_shares, off_shares
from moemerge.bench.report import OutputCheck, Report, RequestFigures, Run
from moemerge.bench.systems import Outcome, Placement, Subject, System
from moemerge.bench.worker import WorkerFailed, last_line
from moemerge.bench.workloads import Trace, WorkloadOptions, all_at_once, draw_trace

_CAPACITY_RUNS = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class ComparisonOptions:
    """What is compared.

    Attributes:
        systems: Names of `SYSTEMS`, in the order of the tables.
        loads: Offered, as shares of the capacity of `single`; empty for the workload's own times.
        rounds: How often everything is measured; the order of systems rotates.
        limit_s: Longest run; what is not answered by then counts as not answered.
        check: Whether tokens are compared, before and after the measurement.
    """

    systems: tuple[str, ...]
    loads: tuple[float, ...]
    rounds: int = 3
    limit_s: float = 300.0
    check: bool = True


@dataclass(frozen=True, slots=True)
class _Measured:
    """A run with what it is checked by later."""

    run: Run
    records: list[Record]
    texts: list[Text]


def compare(
    subject: Subject,
    placement: Placement,
    workload: WorkloadOptions,
    options: ComparisonOptions,
    watch: Watch,
    say: Callable[[str], None],
) -> Report:
    """Measure.

    Args:
        subject: What is served.
        placement: Where.
        workload: Whose trace is replayed.
        options: What is compared.
        watch: Repeats what was disturbed, and refuses.
        say: Told what happens, a line at a time.

    Raises:
        Busy: Others use the machine.
        QualityGateFailed: A system gave a wrong token.
    """
    started = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    watch.check()
    reference, num_checked = "", 0
    if options.check:
        trace = draw_trace(workload, None)
        reference, num_checked = check_float32(options.systems, subject, placement, trace, say)
    capacity = measure_capacity(subject, placement, workload, options, watch, say) if options.loads else None
    traces: dict[float | None, Trace] = {None: draw_trace(workload, None)}
    if capacity:
        traces = {load: draw_trace(workload, load * capacity) for load in options.loads}
    measured: list[_Measured] = []
    for number in range(options.rounds):
        for system in rotate(options.systems, number):
            measured += _measure_system(system, number, subject, placement, traces, options, watch, say)
    check = None
    if options.check:
        check = _check_measured(measured, reference, num_checked, subject, placement, say)
    order = {name: place for place, name in enumerate(options.systems)}
    runs = sorted(_with_slowdowns(measured), key=lambda run: (run.round, order[run.system]))
    return Report(
        is_valid=watch.is_calm,
        started=started,
        machine=describe_machine(placement.threads, placement.device),
        subject=describe_subject(subject, placement),
        workload=describe_workload(workload),
        seed=workload.seed,
        rounds=options.rounds,
        capacity_requests_per_s=capacity,
        check=check,
        runs=runs,
        notes=notes_on(options.systems, subject, placement),
    )


def measure_capacity(
    subject: Subject,
    placement: Placement,
    workload: WorkloadOptions,
    options: ComparisonOptions,
    watch: Watch,
    say: Callable[[str], None],
    system: str = "single",
) -> float:
    """Requests per second of a system that gets the whole trace at once; the median of three runs."""
    say(f"capacity of {system}")
    trace = all_at_once(draw_trace(workload, None))
    with System(system, subject, placement) as one:
        rates = [
            request_rate(watch.measure(lambda: one.run(trace, options.limit_s).records)[0])
            for _ in range(_CAPACITY_RUNS)
        ]
    return statistics.median(rates)


def rotate(systems: Sequence[str], number: int) -> list[str]:
    """The order of a round: every system comes first, second and so on equally often."""
    start = number % len(systems)
    return [*systems[start:], *systems[:start]]


def _measure_system(
    system: str,
    number: int,
    subject: Subject,
    placement: Placement,
    traces: dict[float | None, Trace],
    options: ComparisonOptions,
    watch: Watch,
    say: Callable[[str], None],
) -> list[_Measured]:
    """One life of a system: all loads of a round. One that fails is a result, too."""
    measured: list[_Measured] = []
    try:
        with System(system, subject, placement) as running:
            for load, trace in traces.items():
                at_load = "" if load is None else f" at load {load:g}"
                say(f"round {number + 1} of {options.rounds}: {system}{at_load}")
                outcome, machine, repeats = watch.measure(lambda t=trace: running.run(t, options.limit_s))  # type: ignore[misc]
                run = _figures(system, load, number, running.startup_s, outcome)
                run = run.model_copy(update={"machine": machine, "repeats": repeats})
                measured.append(_Measured(run, outcome.records, _texts(outcome, trace)))
    except WorkerFailed as error:
        say(f"{system} failed: {last_line(str(error))}")
        done = {one.run.load for one in measured}
        measured += [
            _Measured(Run(system=system, load=load, round=number, failure=str(error)), [], [])
            for load in traces
            if load not in done
        ]
    return measured


def _figures(system: str, load: float | None, number: int, startup_s: float, outcome: Outcome) -> Run:
    records = outcome.records
    return Run(
        system=system,
        load=load,
        round=number,
        startup_s=startup_s,
        output_tokens_per_s=output_rate(records),
        latencies=latencies(records),
        unfinished=sum(not record.is_finished for record in records),
        jain=jain_index(list(turnaround_by_variant(records).values())),
        counts=outcome.counts,
        memory=outcome.memory,
        requests=[
            RequestFigures(
                variant=record.variant,
                turnaround_s=record.turnaround_s,
                ttft_s=record.ttft_s,
                tpot_s=record.tpot_s,
            )
            for record in records
        ],
    )


def _texts(outcome: Outcome, trace: Trace) -> list[Text]:
    return [
        (variant, arrival.prompt_ids, record.token_ids)
        for variant, arrival, record in zip(outcome.asked, trace, outcome.records, strict=True)
    ]


def _with_slowdowns(measured: Sequence[_Measured]) -> list[Run]:
    """Runs with the slowdown of their worst variant against `single` in the same round."""
    alone = {
        (one.run.load, one.run.round): turnaround_by_variant(one.records)
        for one in measured
        if one.run.system == "single" and one.records
    }
    runs = []
    for one in measured:
        base = alone.get((one.run.load, one.run.round))
        if base and one.records:
            own = turnaround_by_variant(one.records)
            worst = max(own[variant] / base[variant] for variant in own)
            runs.append(one.run.model_copy(update={"worst_slowdown": worst}))
        else:
            runs.append(one.run)
    return runs


def _check_measured(
    measured: Sequence[_Measured],
    reference: str,
    num_checked: int,
    subject: Subject,
    placement: Placement,
    say: Callable[[str], None],
) -> OutputCheck:
    """Look up what the measured runs answered.

    Raises:
        QualityGateFailed: A token that rounding does not explain.
    """
    answers: dict[str, list[tuple[Text, Record]]] = {}
    for one in measured:
        pairs = zip(one.texts, one.records, strict=True)
        answers.setdefault(one.run.system, []).extend(pairs)
    texts = {system: [text for text, _ in found] for system, found in answers.items()}
    return OutputCheck(
        reference=reference,
        num_requests=num_checked,
        off_share=off_shares(texts, subject, placement, say),
        equal_share=equal_shares(answers),
    )


def describe_subject(subject: Subject, placement: Placement) -> dict[str, str | int]:
    """For the report."""
    return {
        "name": subject.name,
        "variants": len(subject.variants),
        "dtype": placement.dtype,
        "model_bytes": subject.model_bytes,
    }


def describe_workload(workload: WorkloadOptions) -> dict[str, str | int | float | None]:
    """For the report."""
    return {
        "workload": workload.workload,
        "requests": workload.num_requests,
        "prompt_tokens": workload.prompt_tokens,
        "output_tokens": workload.output_tokens,
    }


def notes_on(systems: Sequence[str], subject: Subject, placement: Placement) -> list[str]:
    """What a reader must know to judge the figures."""
    notes = []
    if "partitioned" in systems and len(placement.cores) < len(subject.variants):
        notes.append(
            f"partitioned: {len(subject.variants)} processes on {len(placement.cores)} processors, so some "
            f"share one; that is time sharing, not isolation"
        )
    if "full-swap" in systems:
        notes.append("full-swap: files are in the page cache; a first load from disk takes longer")
    if "transformers" in systems:
        notes.append(
            "transformers: tokens count when they are chosen, and requests end at their own length; a caller "
            "of generate gets them with the whole batch"
        )
    notes.append(
        "memory: sum of the processes' proportional shares after the run, interpreter and libraries included"
    )
    return notes
