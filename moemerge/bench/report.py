"""The result of a benchmark as a file that can be read again: everything that was measured."""

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from moemerge.bench.machine import Load, Memory
from moemerge.bench.metrics import Latencies
from moemerge.bench.worker import Counts
from moemerge.checkpoint.writer import write_text
from moemerge.errors import InvalidRecipe, NotFound, list_problems


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
        raise InvalidRecipe(f"{path}: not a benchmark result ({list_problems(error)})") from error
