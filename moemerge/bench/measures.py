"""How each claim is measured: two systems, or a system and a ceiling of the machine, in turns.

The ratio is taken within a round; `claims` has the bars.
"""

import statistics
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace

import numpy as np

from moemerge.bench.comparison import ComparisonOptions, measure_capacity
from moemerge.bench.machine import Watch
from moemerge.bench.metrics import Figure, Record, latencies, output_rate, request_rate
from moemerge.bench.systems import Placement, Subject, System
from moemerge.bench.worker import WorkerFailed
from moemerge.bench.workloads import Trace, WorkloadOptions, draw_trace, shorten
from moemerge.bundle.reader import Bundle, open_bundle

_LOAD = 0.4
_PAIRS_OF_STEPS = 1000
_DECODED = 48
_WARM_TOKENS = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Session:
    """What all claims are measured with.

    Attributes:
        workload: Lengths and seed; its arrivals are replaced where a claim says what they are.
        rounds: Ratios per claim.
        is_quick: Fewer steps and requests; for seeing that it works.
    """

    subject: Subject
    placement: Placement
    workload: WorkloadOptions
    rounds: int
    limit_s: float
    is_quick: bool
    watch: Watch
    say: Callable[[str], None]

    def system(self, name: str, **options: object) -> System:
        """A system over the subject."""
        return System(name, self.subject, self.placement, **options)

    def trace(self, workload: str, num_requests: int, rate_per_s: float | None = None) -> Trace:
        """Requests of the session's lengths."""
        return draw_trace(replace(self.workload, workload=workload, num_requests=num_requests), rate_per_s)

    @property
    def num_variants(self) -> int:
        """K."""
        return len(self.subject.variants)


@dataclass(frozen=True, slots=True)
class Measured:
    """Values of each round, what they were made from, and which figure of a round's values counts."""

    rounds: Sequence[Sequence[float]]
    detail: str
    of_round: Figure = np.mean


def _rate_ratio(session: Session, over: System, under: System, trace: Trace) -> Measured:
    """Output tokens per second of one system over those of another, in turns."""
    pair = (over, under)
    for system in pair:
        # Memory that is touched for the first time is not measured.
        _rate(session, system, shorten(trace, len(trace), _WARM_TOKENS))
    rounds = []
    for number in range(session.rounds):
        rates = {system.name: _rate(session, system, trace) for system in pair[:: -1 if number % 2 else 1]}
        rounds.append([rates[system.name] for system in pair])
    one, two = (statistics.median(rates) for rates in zip(*rounds, strict=True))
    ratios = [[rates[0] / rates[1]] for rates in rounds]
    return Measured(ratios, f"{over.name} {one:.1f}, {under.name} {two:.1f} output tokens/s")


def _rate(session: Session, system: System, trace: Trace) -> float:
    records = system.run(trace, session.limit_s).records
    unfinished = sum(not record.is_finished for record in records)
    if unfinished:
        raise WorkerFailed(
            f"{system.name}: {unfinished} requests were not answered in {session.limit_s:.0f} s"
        )
    return output_rate(records)


def mixed_over_single(session: Session) -> Measured:
    """Everything at once: requests for all variants, and as many for one."""
    trace = session.trace("burst", (2 if session.is_quick else 16) * session.num_variants)
    with session.system("mixed") as mixed, session.system("single") as single:
        return _rate_ratio(session, mixed, single, trace)


def mixed_over_grouped(session: Session) -> Measured:
    """Four sequences of each variant, all there at the start."""
    trace = session.trace("burst", 4 * session.num_variants)
    with session.system("mixed") as mixed, session.system("grouped") as grouped:
        return _rate_ratio(session, mixed, grouped, trace)


def over_transformers(num_sequences: int) -> Callable[[Session], Measured]:
    """So many sequences of one variant at once, in the engine and in `generate`."""

    def measure(session: Session) -> Measured:
        trace = session.trace("burst", num_sequences if num_sequences > 1 else 2)
        trace = tuple(replace(arrival, variant=session.subject.variants[0]) for arrival in trace)
        alone = replace(session, subject=replace(session.subject, variants=session.subject.variants[:1]))
        batch = {"max_batch": num_sequences}
        with alone.system("mixed", **batch) as engine, alone.system("transformers", **batch) as other:
            return _rate_ratio(session, engine, other, trace)

    return measure


def resident_switch(session: Session) -> Measured:
    """Microseconds that a step takes longer after one of another resident variant."""
    pairs = 40 if session.is_quick else _PAIRS_OF_STEPS
    added: list[list[float]] = []
    with session.system("mixed") as mixed:
        for _ in range(session.rounds):
            times = mixed.probe("resident_switch", variants=session.subject.variants, pairs=pairs)
            both = zip(times["switched"], times["same"], strict=True)
            added.append([1e6 * (switched - same) for switched, same in both])
    step_us = 1e6 * statistics.median(times["same"])
    # An interrupted step would weigh more in a mean than all others.
    return Measured(
        added, f"a step of one token takes {step_us:.0f} µs; {pairs} pairs of steps a round", np.median
    )


def cold_swap(session: Session) -> Measured:
    """Seconds until a variant is resident, over bytes by the bandwidth of plain copies just after it."""
    ratios: list[list[float]] = []
    repeats = session.num_variants * (1 if session.is_quick else 4)
    with session.system("mixed", resident="1") as one:
        for _ in range(session.rounds):
            found = one.probe("cold_swap", variants=session.subject.variants, repeats=repeats)
            ratios.append(
                [
                    seconds * bandwidth / num_bytes
                    for seconds, bandwidth, num_bytes in zip(
                        found["seconds"], found["bandwidth"], found["bytes"], strict=True
                    )
                ]
            )
    seconds, num_bytes = statistics.median(found["seconds"]), statistics.median(found["bytes"])
    bandwidth = statistics.median(found["bandwidth"])
    return Measured(
        ratios,
        f"{num_bytes / 1e6:.0f} MB in {1000 * seconds:.2f} ms, plain copies at {bandwidth / 1e9:.1f} GB/s",
        np.median,
    )


def _at_load(session: Session, names: Sequence[str]) -> tuple[list[dict[str, list[Record]]], float]:
    """Records of systems at 0.4 of the capacity of `mixed`, by round; all alive at once, in turns."""
    options = ComparisonOptions(systems=(), loads=(), limit_s=session.limit_s)
    workload = replace(session.workload, workload="poisson", num_requests=8 if session.is_quick else 64)
    capacity = measure_capacity(
        session.subject, session.placement, workload, options, session.watch, session.say, "mixed"
    )
    trace = draw_trace(workload, _LOAD * capacity)
    rounds = []
    with ExitStack() as stack:
        systems = [stack.enter_context(session.system(name)) for name in names]
        for number in range(session.rounds):
            order = systems[:: -1 if number % 2 else 1]
            rounds.append({one.name: one.run(trace, session.limit_s).records for one in order})
    return rounds, capacity


def ttft_over_single(session: Session) -> Measured:
    """Mean TTFT of mixed traffic over that of the same requests to one model, at the same times."""
    rounds, capacity = _at_load(session, ("mixed", "single"))
    ratios = [[latencies(one["mixed"]).ttft.mean / latencies(one["single"]).ttft.mean] for one in rounds]
    ttft = {name: [latencies(one[name]).ttft for one in rounds] for name in ("mixed", "single")}
    shown = ", ".join(
        f"{name} mean {1000 * statistics.median(s.mean for s in spreads):.1f} ms, median "
        f"{1000 * statistics.median(s.p50 for s in spreads):.1f} ms"
        for name, spreads in ttft.items()
    )
    return Measured(ratios, f"{shown}; Poisson arrivals at {_LOAD} of {capacity:.2f} requests/s")


def turnaround_below_partitioned(session: Session) -> Measured:
    """How much lower mean turnaround is than in fixed partitions, with the memory of one model in all."""
    rounds, capacity = _at_load(session, ("mixed", "partitioned"))
    ratios, means = [], []
    unfinished = 0
    for one in rounds:
        pair = [latencies(one[name]).turnaround.mean for name in ("mixed", "partitioned")]
        unfinished += sum(not record.is_finished for record in one["partitioned"])
        means.append(pair)
        ratios.append([100 * (1 - pair[0] / pair[1])])
    mixed, partitioned = (statistics.median(values) for values in zip(*means, strict=True))
    answered = statistics.median(request_rate(one["partitioned"]) for one in rounds)
    bound = f"; {unfinished} requests of partitioned unanswered, a lower bound" if unfinished else ""
    return Measured(
        ratios,
        f"mixed {mixed:.2f} s, partitioned {partitioned:.2f} s mean turnaround; Poisson arrivals at {_LOAD} "
        f"of {capacity:.2f} requests/s, of which partitioned answered {answered:.2f}{bound}",
    )


def map_overhead(session: Session) -> Measured:
    """Percent that a decoding step of one variant takes longer than in a bare loop without pool and map."""
    variant = session.subject.variants[0]
    tokens, repeats = (8, 2) if session.is_quick else (_DECODED, 5)
    overheads: list[list[float]] = []
    with session.system("mixed") as mixed:
        for _ in range(session.rounds):
            found = mixed.probe("map_overhead", variant=variant, tokens=tokens, repeats=repeats)
            overheads.append(
                [100 * (statistics.median(found["engine"]) / statistics.median(found["plain"]) - 1)]
            )
    steps = {name: 1000 * statistics.median(values) for name, values in found.items()}
    return Measured(
        overheads,
        f"a step takes {steps['engine']:.2f} ms in the engine, {steps['mapped']:.2f} ms in a bare loop with "
        f"the map, {steps['plain']:.2f} ms without",
    )


def decode_bandwidth(session: Session) -> Measured:
    """Percent of the measured read bandwidth that decoding one sequence reaches."""
    variant = session.subject.variants[0]
    num_bytes = bytes_per_token(open_bundle(session.subject.bundle), variant)
    shares: list[list[float]] = []
    tokens = 8 if session.is_quick else 2 * _DECODED
    with session.system("single") as single:
        for _ in range(session.rounds):
            bandwidth = single.probe("memory_read", repeats=5)
            seconds = single.probe("decode", variant=variant, batch=1, tokens=tokens)
            shares.append([100 * num_bytes / seconds / bandwidth])
    return Measured(
        shares,
        f"{num_bytes / 1e6:.0f} MB per token, {1 / seconds:.1f} tokens/s, memory is read at "
        f"{bandwidth / 1e9:.1f} GB/s",
    )


def bytes_per_token(bundle: Bundle, variant: str) -> int:
    """Bytes of weights, as stored, that a decoding step of one sequence reads.

    All non-expert tensors, but of the embedding only a row, and the experts of one token in every layer.
    """
    tensors = bundle.tensors(variant)
    others = sum(
        tensor.nbytes for role, tensor in tensors.items() if role != "embedding" or "head" not in tensors
    )
    chosen = int(bundle.variant(variant).settings["num_experts_per_token"] or 0)
    layers = [bundle.pool(layer.index) for layer in bundle.manifest.layers]
    return others + sum(chosen * sum(part.nbytes for part in pool[0].values()) for pool in layers)
