"""The statements this project makes about serving, each with its bar, measured in one session.

Every figure compares two systems, or a system with a ceiling of the machine, in turns on the same machine:
the ratio is taken within a round, and the median over rounds is what counts.
"""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from moemerge.bench import measures
from moemerge.bench.measures import Measured, Session
from moemerge.bench.metrics import bootstrap_interval
from moemerge.bench.report import Claim
from moemerge.bench.worker import WorkerFailed, last_line
from moemerge.bench.workloads import check_names
from moemerge.errors import InvalidRecipe


@dataclass(frozen=True, slots=True)
class _Bar:
    """What is claimed; the statement may name the number of variants and the model."""

    statement: str
    unit: str
    bar: float
    is_at_least: bool
    measure: Callable[[Session], Measured]


def measure_claims(names: Sequence[str], session: Session) -> list[Claim]:
    """Measure some claims, or all of them when no name is given.

    Raises:
        InvalidRecipe: A name that is none, or a family that is not decoder-only.
        Busy: Others use the machine.
    """
    check_names(names, list(CLAIMS), "claim")
    if not session.subject.is_decoder:
        raise InvalidRecipe("claims are about decoder-only families; leave out --claims")
    session.watch.check()
    return [_measure(name, CLAIMS[name], session) for name in names or CLAIMS]


def _measure(name: str, bar: _Bar, session: Session) -> Claim:
    session.say(f"claim {name}")
    statement = bar.statement.format(variants=session.num_variants, model=session.subject.name)
    claim = Claim(
        name=statement, unit=bar.unit, bar=bar.bar, is_at_least=bar.is_at_least,
        measured=None, interval=None, detail="",
    )  # fmt: skip
    try:
        figure, machine, _ = session.watch.measure(lambda: bar.measure(session))
    except WorkerFailed as error:
        return claim.model_copy(update={"detail": f"not measured: {last_line(str(error))}"})
    return claim.model_copy(
        update={
            "measured": statistics.median(float(figure.of_round(values)) for values in figure.rounds),
            "interval": bootstrap_interval(figure.rounds, figure.of_round),
            "detail": figure.detail,
            "machine": machine,
        }
    )


CLAIMS = {
    "mixed-over-single": _Bar(
        "tokens per second, traffic over {variants} variants against all of it on one", " x", 0.9, True,
        measures.mixed_over_single,
    ),
    "mixed-over-grouped": _Bar(
        "tokens per second, mixed against grouped, {variants} variants x 4 sequences", " x", 1.8, True,
        measures.mixed_over_grouped,
    ),
    "resident-switch": _Bar("resident switch added to a step", " µs", 50, False, measures.resident_switch),
    "cold-swap": _Bar("cold swap against bytes by copy bandwidth", " x", 1.15, False, measures.cold_swap),
    "ttft": _Bar("TTFT in mixed traffic against one model", " x", 1.05, False, measures.ttft_over_single),
    "turnaround": _Bar(
        "turnaround below partitioned, memory for one model in all", " %", 85, True,
        measures.turnaround_below_partitioned,
    ),
    "map-overhead": _Bar(
        "one variant: pool and map against the plain layout", " %", 4, False, measures.map_overhead
    ),
    "transformers-1": _Bar(
        "tokens per second against transformers, batch 1", " x", 1.3, True, measures.over_transformers(1)
    ),
    "transformers-16": _Bar(
        "tokens per second against transformers, batch 16", " x", 2, True, measures.over_transformers(16)
    ),
    "decode-bandwidth": _Bar(
        "batch-1 decode of {model}: share of read bandwidth", " %", 60, True, measures.decode_bandwidth
    ),
}  # fmt: skip
