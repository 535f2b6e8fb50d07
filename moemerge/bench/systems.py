"""The systems that are compared: what each is, and the workers it is made of."""

import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from moemerge.bench.machine import Memory
from moemerge.bench.metrics import Record
from moemerge.bench.worker import Counts, Worker, WorkerSpec
from moemerge.bench.workloads import Trace, all_to
from moemerge.runner.options import DTYPES

# Workers need a moment to receive a trace before it begins.
_LEAD_S = 0.25

SYSTEMS = {
    "single": "all requests to one variant: the upper bound",
    "mixed": "all variants resident, their tokens in one batch",
    "grouped": "all variants resident, batches of one variant in turn",
    "fcfs": "one variant resident (R=1), in order of arrival: the paper",
    "partitioned": "a process per variant with 1/K of the cores and of one model's memory",
    "full-swap": "one whole model in memory, loaded again at each change of variant",
    "transformers": "generate, a model per variant, batches of consecutive requests for one variant",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """What is served.

    Attributes:
        name: For people: the shape or the bundle.
        bundle: The bundle.
        checkpoints: Stand-alone model of each variant; empty when no system needs them.
        variants: Names, in order.
        is_decoder: Whether the family is decoder-only.
        vocab_size: Smallest vocabulary among the variants.
        max_tokens: Context length, where there is a limit.
        room_tokens: Longest prompt and answer together; engines keep room for full batches of them.
        model_bytes: One whole model as stored: its experts and the non-expert tensors of the largest variant.
        model_elements: The numbers in it.
    """

    name: str
    bundle: Path
    checkpoints: dict[str, Path]
    variants: tuple[str, ...]
    is_decoder: bool
    vocab_size: int
    max_tokens: int | None
    room_tokens: int | None
    model_bytes: int
    model_elements: int

    def bytes_in(self, dtype: str) -> int:
        """One whole model in a dtype; `auto` is as stored."""
        if dtype == "auto":
            return self.model_bytes
        return self.model_elements * DTYPES[dtype].itemsize


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """Where systems run, the same for all.

    Attributes:
        device: `cpu` or `cuda`.
        dtype: `auto` for the stored one.
        threads: For arithmetic, in all.
        cores: Processors that may be used.
    """

    device: str
    dtype: str
    threads: int
    cores: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What a run brought.

    Attributes:
        records: One per request, in the order of the trace, under the variant that the trace names.
        asked: The variant that answered each.
    """

    records: list[Record]
    asked: list[str]
    counts: Counts
    memory: Memory


class System:
    """A system at work, as a context manager: its workers, and how a trace is spread over them."""

    def __init__(self, name: str, subject: Subject, placement: Placement, **options: Any) -> None:
        """Start it.

        Args:
            name: An entry of `SYSTEMS`.
            subject: What it serves.
            placement: Where.
            options: More fields of `EngineOptions`.

        Raises:
            WorkerFailed: It cannot serve this.
        """
        self.name = name
        self._subject = subject
        begin = time.perf_counter()
        with ExitStack() as stack:
            self._workers = [
                stack.enter_context(Worker(spec)) for spec in plan_workers(name, subject, placement, options)
            ]
            self._stack = stack.pop_all()
        self.startup_s = time.perf_counter() - begin

    def __enter__(self) -> "System":
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    def run(self, trace: Trace, limit_s: float) -> Outcome:
        """Serve a trace; broken off after `limit_s` seconds.

        Raises:
            WorkerFailed: It broke.
        """
        asked = all_to(trace, self._subject.variants[0]) if self.name == "single" else trace
        shares = self._spread(asked)
        start_s = time.perf_counter() + _LEAD_S
        for worker, indices in zip(self._workers, shares, strict=True):
            worker.begin_run(tuple(asked[index] for index in indices), start_s, limit_s)
        records: list[Record | None] = [None] * len(trace)
        counts = Counts()
        for worker, indices in zip(self._workers, shares, strict=True):
            found, own = worker.end_run(limit_s)
            counts = counts.plus(own)
            for index, record in zip(indices, found, strict=True):
                records[index] = record
        whole = [record for record in records if record is not None]
        memories = [worker.memory() for worker in self._workers]
        return Outcome(
            records=_relabel(whole, trace),
            asked=[arrival.variant for arrival in asked],
            counts=counts,
            memory=Memory(*(sum(values) for values in zip(*memories, strict=True))),
        )

    def probe(self, name: str, **arguments: Any) -> Any:
        """A measurement of `probes.PROBES` in the system's first worker."""
        return self._workers[0].probe(name, **arguments)

    def _spread(self, trace: Trace) -> list[list[int]]:
        """Which requests go to which worker."""
        if len(self._workers) == 1:
            return [list(range(len(trace)))]
        return [
            [index for index, arrival in enumerate(trace) if arrival.variant in worker.spec.variants]
            for worker in self._workers
        ]


def plan_workers(
    name: str, subject: Subject, placement: Placement, options: dict[str, Any]
) -> list[WorkerSpec]:
    """The workers of a system.

    The engine's systems differ by policy and residency alone. `partitioned` shares processors between
    variants when there are fewer of them, which a fixed partition of a GPU would not: its figures are then
    those of time slices.
    """

    def spec(kind: str, variants: Sequence[str], **more: Any) -> WorkerSpec:
        threads, cores = more.pop("threads", placement.threads), more.pop("cores", placement.cores)
        room_tokens = None if "device_memory" in more else subject.room_tokens
        return WorkerSpec(
            kind=kind,
            bundle=subject.bundle,
            checkpoints=subject.checkpoints if kind == "transformers" else {},
            variants=tuple(variants),
            device=placement.device,
            dtype=placement.dtype,
            threads=threads,
            cores=cores,
            room_tokens=room_tokens,
            options={**more, **options},
        )

    variants = subject.variants
    match name:
        case "single":
            return [spec("engine", variants[:1], resident="all")]
        case "mixed" | "grouped":
            return [spec("engine", variants, policy=name, resident="all")]
        case "fcfs":
            return [spec("engine", variants, policy="fcfs", resident="1")]
        case "full-swap":
            return [spec("full-swap", variants, resident="all")]
        case "transformers":
            return [spec("transformers", variants)]
    share = subject.bytes_in(placement.dtype) // len(variants)
    return [
        spec(
            "engine",
            (variant,),
            resident="all",
            device_memory=share,
            cores=cores,
            threads=max(1, placement.threads // len(variants)),
        )
        for variant, cores in zip(variants, divide_cores(placement.cores, len(variants)), strict=True)
    ]


def divide_cores(cores: Sequence[int], num_parts: int) -> list[tuple[int, ...]]:
    """Processors of each of K parts: equal shares, or one that several parts share when there are too few."""
    if len(cores) >= num_parts:
        each = len(cores) // num_parts
        return [tuple(cores[part * each : (part + 1) * each]) for part in range(num_parts)]
    return [(cores[part * len(cores) // num_parts],) for part in range(num_parts)]


def _relabel(records: Sequence[Record], trace: Trace) -> list[Record]:
    """Records under the variants of the trace, so that systems are compared request by request."""
    return [replace(record, variant=arrival.variant) for record, arrival in zip(records, trace, strict=True)]
