"""Tables of a result, made from what its report holds alone: medians over rounds, and claims."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from moemerge.bench.metrics import Spread, bootstrap_interval
from moemerge.bench.report import Claim, Report, write_report
from moemerge.bench.worker import last_line
from moemerge.bundle.target import writing
from moemerge.checkpoint.sizes import format_size
from moemerge.checkpoint.writer import write_text


def write_results(report: Report, folder: Path) -> None:
    """Write `result.json` and `tables.md` into a folder.

    Raises:
        NotEnoughRoom: It cannot be written.
    """
    with writing(folder):
        write_report(report, folder / "result.json")
        write_text(folder / "tables.md", markdown(report))


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """A system at one load: medians over rounds, with 95 % intervals of mean turnaround and mean TTFT."""

    system: str
    load: float | None
    failure: str | None
    turnaround: Spread | None = None
    turnaround_interval: tuple[float, float] | None = None
    ttft: Spread | None = None
    ttft_interval: tuple[float, float] | None = None
    tpot: Spread | None = None
    itl: Spread | None = None
    output_tokens_per_s: float = 0.0
    output_tokens_per_s_interval: tuple[float, float] | None = None
    swaps: float = 0.0
    swap_bytes: float = 0.0
    swap_s: float = 0.0
    memory_bytes: float = 0.0
    jain: float = 1.0
    worst_slowdown: float | None = None
    unfinished: float = 0.0


def summarise(report: Report, system: str, load: float | None) -> Summary:
    """Medians over the rounds of a system at a load."""
    runs = [run for run in report.runs if (run.system, run.load) == (system, load)]
    good = [run for run in runs if run.latencies]
    if not good:
        failure = next((run.failure for run in runs if run.failure), "not run")
        return Summary(system=system, load=load, failure=failure)
    slowdowns = [run.worst_slowdown for run in good if run.worst_slowdown is not None]
    return Summary(
        system=system,
        load=load,
        failure=None,
        turnaround=_median_spread([run.latencies.turnaround for run in good if run.latencies]),
        turnaround_interval=bootstrap_interval([[r.turnaround_s for r in run.requests] for run in good]),
        ttft=_median_spread([run.latencies.ttft for run in good if run.latencies]),
        ttft_interval=bootstrap_interval([[r.ttft_s for r in run.requests] for run in good]),
        tpot=_median_spread([run.latencies.tpot for run in good if run.latencies and run.latencies.tpot]),
        itl=_median_spread([run.latencies.itl for run in good if run.latencies and run.latencies.itl]),
        output_tokens_per_s=statistics.median(run.output_tokens_per_s for run in good),
        output_tokens_per_s_interval=bootstrap_interval([[run.output_tokens_per_s] for run in good]),
        swaps=statistics.median(run.counts.swaps for run in good),
        swap_bytes=statistics.median(run.counts.swap_bytes for run in good),
        swap_s=statistics.median(run.counts.swap_s for run in good),
        memory_bytes=statistics.median(run.memory.pss_bytes for run in good),
        jain=statistics.median(run.jain for run in good),
        worst_slowdown=statistics.median(slowdowns) if slowdowns else None,
        unfinished=statistics.median(run.unfinished for run in good),
    )


def _median_spread(spreads: Sequence[Spread]) -> Spread | None:
    if not spreads:
        return None
    return Spread(
        mean=statistics.median(one.mean for one in spreads),
        p50=statistics.median(one.p50 for one in spreads),
        p99=statistics.median(one.p99 for one in spreads),
    )


COLUMNS = (
    "system", "turnaround", "p99", "TTFT", "p99", "TPOT", "ITL p99", "tok/s", "swaps", "moved", "memory",
    "worst", "fair",
)  # fmt: skip
LEGEND = (
    "turnaround, TTFT and TPOT are means over requests, then medians over rounds; worst is the largest "
    "slowdown of a variant against single, fair Jain's index over variants; ≥ marks runs that were broken off"
)


def title_of(load: float | None) -> str:
    """Of the table of one load."""
    return (
        "Arrivals as the workload has them" if load is None else f"Load {load:g} of the capacity of one model"
    )


def rows(report: Report, load: float | None) -> list[list[str]]:
    """The table of one load, a row per system."""
    return [_row(summarise(report, system, load)) for system in report.systems]


def _row(summary: Summary) -> list[str]:
    if summary.failure is not None or summary.turnaround is None or summary.ttft is None:
        return [summary.system, f"failed: {last_line(summary.failure)}", *[""] * (len(COLUMNS) - 2)]
    bound = "≥" if summary.unfinished else ""
    return [
        summary.system,
        f"{bound}{format_seconds(summary.turnaround.mean)}",
        f"{bound}{format_seconds(summary.turnaround.p99)}",
        f"{bound}{format_seconds(summary.ttft.mean)}",
        f"{bound}{format_seconds(summary.ttft.p99)}",
        format_seconds(summary.tpot.mean) if summary.tpot else "-",
        format_seconds(summary.itl.p99) if summary.itl else "-",
        f"{summary.output_tokens_per_s:.1f}",
        f"{summary.swaps:.0f}",
        format_size(summary.swap_bytes),
        format_size(summary.memory_bytes),
        f"{summary.worst_slowdown:.2f}" if summary.worst_slowdown is not None else "-",
        f"{summary.jain:.3f}",
    ]


CLAIM_COLUMNS = ("claim", "bar", "measured", "95 % interval", "verdict")


def claim_rows(claims: Sequence[Claim]) -> list[list[str]]:
    """The table of claims."""
    return [
        [
            claim.name,
            f"{'at least' if claim.is_at_least else 'at most'} {claim.bar:g}{claim.unit}",
            "-" if claim.measured is None else f"{claim.measured:.3g}{claim.unit}",
            "-" if claim.interval is None else f"{claim.interval[0]:.3g} to {claim.interval[1]:.3g}",
            claim.verdict,
        ]
        for claim in claims
    ]


def markdown(report: Report) -> str:
    """All tables with what they were measured on, for documents."""
    machine = ", ".join(f"{key} {value}" for key, value in report.machine.items())
    lines = [f"Measured {report.started} on: {machine}.", ""]
    workload = ", ".join(f"{key} {value}" for key, value in report.workload.items())
    lines += [f"{report.subject['name']}, {report.subject['variants']} variants; {workload}.", ""]
    for load in report.loads:
        lines += [f"**{title_of(load)}**", "", *_markdown_table(COLUMNS, rows(report, load)), ""]
    if report.runs:
        lines += [LEGEND[0].upper() + LEGEND[1:] + ".", ""]
    if report.claims:
        lines += [*_markdown_table(CLAIM_COLUMNS, claim_rows(report.claims)), ""]
        lines += [f"- {claim.name}: {claim.detail}" for claim in report.claims if claim.detail]
    lines += [f"- {report.check}"] if report.check else []
    lines += [f"- {note}" for note in report.notes]
    if not report.is_valid:
        lines += ["", f"**Not valid: {report.worst_load}.**"]
    return "\n".join(lines).rstrip() + "\n"


def _markdown_table(columns: Sequence[str], cells: Sequence[Sequence[str]]) -> list[str]:
    return [
        f"| {' | '.join(columns)} |",
        f"|{' --- |' * len(columns)}",
        *(f"| {' | '.join(row)} |" for row in cells),
    ]


def format_seconds(seconds: float) -> str:
    """Seconds or milliseconds with three digits."""
    return f"{seconds:.3g} s" if seconds >= 0.9995 else f"{1000 * seconds:.3g} ms"
