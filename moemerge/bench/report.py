"""The result of a benchmark as a file: everything that was measured, and tables of it.

A result file can be read again; tables are made from what it holds alone.
"""

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from moemerge.bench.machine import Load, Memory
from moemerge.bench.metrics import Latencies, Spread, bootstrap_interval
from moemerge.bench.worker import Counts
from moemerge.bundle.target import writing
from moemerge.checkpoint.sizes import format_size
from moemerge.checkpoint.writer import write_text
from moemerge.errors import InvalidRecipe, NotFound


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class RequestFigures(_Part):
    """One request: the variant that the trace names, and latencies in seconds."""

    variant: str
    turnaround_s: float
    ttft_s: float
    tpot_s: float | None


class Run(_Part):
    """One system at one load in one round.

    Attributes:
        load: Offered, as a share of the capacity of `single`; None when the workload has its own times.
        failure: Why there are no figures.
        unfinished: Requests that were not answered when the run was broken off; their latencies are lower
            bounds.
        jain: Fairness between variants, by turnaround per token.
        worst_slowdown: Largest turnaround per token of a variant over that of the same requests in `single`.
        machine: Who else used the machine meanwhile.
        repeats: Times the run was repeated because others used the machine.
    """

    system: str
    load: float | None
    round: int
    startup_s: float = 0.0
    failure: str | None = None
    output_tokens_per_s: float = 0.0
    latencies: Latencies | None = None
    unfinished: int = 0
    jain: float = 1.0
    worst_slowdown: float | None = None
    counts: Counts = Counts()
    memory: Memory = Memory(0, 0)
    machine: Load = Load(0.0, 0.0)
    repeats: int = 0
    requests: list[RequestFigures] = []


class OutputCheck(_Part):
    """Whether systems gave the right tokens.

    Attributes:
        reference: Whose tokens were right, in float32.
        num_requests: Compared in float32; there all tokens were equal.
        off_share: By system, share of tokens looked up that are off, as `outputs` explains it; in the
            measured dtype.
        equal_share: By system, share of its requests whose tokens equal those of the first system compared.
    """

    reference: str
    num_requests: int
    off_share: dict[str, float] = {}
    equal_share: dict[str, float] = {}

    def __str__(self) -> str:
        text = f"tokens: in float32 the answers to {self.num_requests} requests are those of {self.reference}"
        if self.off_share:
            text += f"; as measured, off by more than rounding of a logit: {_percents(self.off_share)}"
        return f"{text}; answers equal to the first system's: {_percents(self.equal_share)}"


def _percents(shares: dict[str, float]) -> str:
    return ", ".join(f"{system} {share:.1%}" for system, share in shares.items())


class Claim(_Part):
    """A statement, its bar and what was measured.

    Attributes:
        bar: Number that decides.
        is_at_least: Whether more is better.
        measured: Median over rounds; None when it could not be measured.
        interval: 95 % bootstrap interval of the median.
        detail: The figures it was made from.
        machine: Who else used the machine meanwhile.
    """

    name: str
    unit: str
    bar: float
    is_at_least: bool
    measured: float | None
    interval: tuple[float, float] | None
    detail: str
    machine: Load = Load(0.0, 0.0)

    @property
    def is_met(self) -> bool:
        """Whether the bar is reached."""
        if self.measured is None:
            return False
        return self.measured >= self.bar if self.is_at_least else self.measured <= self.bar

    @property
    def verdict(self) -> str:
        """For people."""
        return "not measured" if self.measured is None else "met" if self.is_met else "missed"


class Report(_Part):
    """Everything a benchmark found.

    Attributes:
        is_valid: Whether the machine was calm enough throughout.
        machine: Hardware and software.
        subject: What was served.
        workload: Options of the trace by name.
        capacity_requests_per_s: Of `single`, all requests at once; loads are shares of it.
        notes: What a reader must know.
    """

    schema_: Literal["moemerge/bench@1"] = Field(default="moemerge/bench@1", alias="schema")
    is_valid: bool
    started: str
    machine: dict[str, str | int]
    subject: dict[str, str | int]
    workload: dict[str, str | int | float | None]
    seed: int
    rounds: int
    capacity_requests_per_s: float | None = None
    check: OutputCheck | None = None
    runs: list[Run] = []
    claims: list[Claim] = []
    notes: list[str] = []

    @property
    def worst_load(self) -> Load:
        """The largest use of the machine by others, over all that was measured."""
        loads = [*(run.machine for run in self.runs), *(claim.machine for claim in self.claims)]
        return max(loads, default=Load(0.0, 0.0))

    @property
    def systems(self) -> list[str]:
        """In the order measured."""
        return list(dict.fromkeys(run.system for run in self.runs))

    @property
    def loads(self) -> list[float | None]:
        """In the order measured."""
        return list(dict.fromkeys(run.load for run in self.runs))


def write_report(report: Report, path: Path) -> None:
    """Write the result file."""
    write_text(path, report.model_dump_json(indent=1, by_alias=True) + "\n")


def write_results(report: Report, folder: Path) -> None:
    """Write `result.json` and `tables.md` into a folder.

    Raises:
        NotEnoughRoom: It cannot be written.
    """
    with writing(folder):
        write_report(report, folder / "result.json")
        write_text(folder / "tables.md", markdown(report))


def read_report(path: Path) -> Report:
    """A result file.

    Raises:
        NotFound: No such file.
        InvalidRecipe: Not a result.
    """
    try:
        return Report.model_validate_json(path.read_bytes())
    except FileNotFoundError as error:
        raise NotFound(f"{path}: no such result") from error
    except ValidationError as error:
        problem = error.errors()[0]
        place = ".".join(map(str, problem["loc"]))
        raise InvalidRecipe(f"{path}: not a benchmark result ({place}: {problem['msg']})") from error


class Summary(_Part):
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


def last_line(failure: str | None) -> str:
    """What a traceback comes down to."""
    return (failure or "").strip().rpartition("\n")[2][:100]


def format_seconds(seconds: float) -> str:
    """Seconds or milliseconds with three digits."""
    return f"{seconds:.3g} s" if seconds >= 0.9995 else f"{1000 * seconds:.3g} ms"
