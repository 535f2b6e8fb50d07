"""One benchmark from its options to its report: what is served, where, by whom, and what is measured."""

import datetime
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from moemerge.bench.claims import CLAIMS, measure_claims
from moemerge.bench.comparison import (
    ComparisonOptions,
    compare,
    describe_subject,
    describe_workload,
    notes_on,
)
from moemerge.bench.machine import Watch, describe_machine, usable_cores
from moemerge.bench.measures import Session
from moemerge.bench.report import Report
from moemerge.bench.served_transformers import has_transformers, require_transformers
from moemerge.bench.subjects import bundle_subject, generated_subject
from moemerge.bench.systems import SYSTEMS, Placement, Subject
from moemerge.bench.workloads import WORKLOADS, WorkloadOptions, check_names, draw_trace
from moemerge.errors import InvalidRecipe
from moemerge.progress import Progress

DEFAULT_VARIANTS = 4
DEFAULT_LOADS = (0.4,)
# What `--quick` changes, where nothing else is asked for.
_FULL = {"requests": 64, "prompt_tokens": 64, "output_tokens": 32, "rounds": 3}
_QUICK = {"requests": 8, "prompt_tokens": 16, "output_tokens": 8, "rounds": 1}
# Probes of claims decode further than a trace does.
_LEAST_ROOM_TOKENS = 128


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchOptions:
    """What is benchmarked, and how.

    Attributes:
        bundle: Bundle to serve; None to generate `model`.
        model: Name of an entry of `shapes.SHAPES`.
        variants: How many; None for 4 generated ones, or all of a bundle.
        systems: Names of `systems.SYSTEMS`; None for all that are installed.
        claims: Names of `claims.CLAIMS` to measure instead of comparing systems; empty for all of them.
        workload: Name of an entry of `workloads.WORKLOADS`, or a trace file.
        loads: Shares of the capacity of one model; empty for what suits the workload.
        requests, prompt_tokens, output_tokens, rounds: See `WorkloadOptions` and `ComparisonOptions`; None
            for what suits `quick`.
        seed: Of weights and trace.
        threads: For arithmetic; None for all processors. As many processors are used.
        dtype, device: Of the computation.
        limit_s: Longest run.
        quick: Little of everything, to see that it works.
        check: Whether tokens are compared.
        allow_busy: Report what was measured beside other programs too, marked.
        work: Folder of generated and exported models.
    """

    bundle: Path | None = None
    model: str = "mix-S"
    variants: int | None = None
    systems: tuple[str, ...] | None = None
    claims: tuple[str, ...] | None = None
    workload: str = "poisson"
    loads: tuple[float, ...] = ()
    requests: int | None = None
    prompt_tokens: int | None = None
    output_tokens: int | None = None
    rounds: int | None = None
    seed: int = 0
    threads: int | None = None
    dtype: str = "auto"
    device: str = "cpu"
    limit_s: float = 300.0
    quick: bool = False
    check: bool = True
    allow_busy: bool = False
    work: Path

    def __post_init__(self) -> None:
        check_names(self.systems or (), list(SYSTEMS), "system")
        check_names(self.claims or (), list(CLAIMS), "claim")
        for load in self.loads:
            if not 0 < load < float("inf"):
                raise InvalidRecipe(f"load is {load}, expected more than 0, for example 0.4")
        if self.loads and self.workload in WORKLOADS and WORKLOADS[self.workload].gaps is None:
            raise InvalidRecipe(f"workload {self.workload} has everything at once, which no load changes")
        if self.threads is not None and self.threads > len(usable_cores()):
            raise InvalidRecipe(f"threads is {self.threads}, there are {len(usable_cores())} processors")
        if "transformers" in (self.systems or ()):
            require_transformers()

    @property
    def chosen_systems(self) -> tuple[str, ...]:
        """Those that are compared."""
        if self.systems is not None:
            return self.systems
        return tuple(name for name in SYSTEMS if name != "transformers" or has_transformers())

    @property
    def chosen_loads(self) -> tuple[float, ...]:
        """Those that are offered; a trace file keeps its times, and `burst` has none."""
        own_times = self.workload not in WORKLOADS or WORKLOADS[self.workload].gaps is None
        return self.loads or (() if own_times else DEFAULT_LOADS)

    def size(self, name: str) -> int:
        """The value of `requests`, `prompt_tokens`, `output_tokens` or `rounds`."""
        given: int | None = getattr(self, name)
        return given if given is not None else (_QUICK if self.quick else _FULL)[name]


def run_benchmark(
    options: BenchOptions, say: Callable[[str], None], progress: Progress | None = None
) -> Report:
    """Make what is missing, measure, and report.

    Args:
        options: What to do.
        say: Told what happens, a line at a time.
        progress: Told of bytes that are generated.

    Raises:
        Busy: Others use the machine.
        QualityGateFailed: A system gave a wrong token.
        MoemergeError: As `generate`, `open_bundle`, `draw_trace`.
    """
    watch = Watch(say, allow_busy=options.allow_busy)
    watch.check()
    cores = usable_cores()[: options.threads]
    placement = Placement(device=options.device, dtype=options.dtype, threads=len(cores), cores=cores)
    subject = _subject(options, progress)
    workload = _workload(options, subject)
    longest = max(len(arrival.prompt_ids) + arrival.output_tokens for arrival in draw_trace(workload, None))
    subject = replace(subject, room_tokens=max(longest, _LEAST_ROOM_TOKENS))
    if options.claims is not None:
        return _claims_report(options, subject, placement, workload, watch, say)
    compared = ComparisonOptions(
        systems=options.chosen_systems,
        loads=options.chosen_loads,
        rounds=options.size("rounds"),
        limit_s=options.limit_s,
        check=options.check,
    )
    return compare(subject, placement, workload, compared, watch, say)


def _subject(options: BenchOptions, progress: Progress | None) -> Subject:
    if options.bundle is None:
        num_variants = options.variants or DEFAULT_VARIANTS
        return generated_subject(
            options.model, num_variants, options.work, seed=options.seed, progress=progress
        )
    needs = "transformers" in options.chosen_systems or options.claims is not None
    return bundle_subject(
        options.bundle, options.variants, options.work, needs_checkpoints=needs, progress=progress
    )


def _workload(options: BenchOptions, subject: Subject) -> WorkloadOptions:
    is_trace = options.workload not in WORKLOADS
    return WorkloadOptions(
        workload=options.workload,
        variants=subject.variants,
        num_requests=options.requests if is_trace else options.size("requests"),
        prompt_tokens=options.size("prompt_tokens"),
        output_tokens=options.size("output_tokens"),
        vocab_size=subject.vocab_size,
        max_tokens=subject.max_tokens,
        seed=options.seed,
    )


def _claims_report(
    options: BenchOptions,
    subject: Subject,
    placement: Placement,
    workload: WorkloadOptions,
    watch: Watch,
    say: Callable[[str], None],
) -> Report:
    started = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    session = Session(
        subject=subject,
        placement=placement,
        workload=workload,
        rounds=options.size("rounds"),
        limit_s=options.limit_s,
        is_quick=options.quick,
        watch=watch,
        say=say,
    )
    claims = measure_claims(options.claims or (), session)
    return Report(
        is_valid=watch.is_calm,
        started=started,
        machine=describe_machine(placement.threads, placement.device),
        subject=describe_subject(subject, placement),
        workload=describe_workload(workload),
        seed=options.seed,
        rounds=options.size("rounds"),
        claims=claims,
        notes=notes_on(("partitioned", "transformers"), subject, placement),
    )
