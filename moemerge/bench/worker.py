"""A process of its own for a system, or for one of its parts: threads, cores and memory are its alone.

The caller holds a `Worker`; what runs in the process is a `Served`, made from its `WorkerSpec`. Nothing runs
in two workers at once unless the caller asks for it.
"""

import multiprocessing
import os
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext, SpawnContext
from operator import add, sub
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from moemerge.bench.machine import Memory, measure_memory
from moemerge.bench.metrics import Record
from moemerge.bench.workloads import Trace
from moemerge.errors import MoemergeError

_START_LIMIT_S = 600.0
_GRACE_S = 120.0
_CLOSE_LIMIT_S = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerSpec:
    """What a worker serves.

    Attributes:
        kind: Name of an entry of `served.KINDS`.
        bundle: Bundle to serve.
        checkpoints: Stand-alone model of each variant, for kinds that need them.
        variants: Those that are served.
        device: `cpu` or `cuda`.
        dtype: `auto` for the stored one.
        threads: For arithmetic.
        cores: Processors to stay on; None for all.
        room_tokens: Longest prompt and answer together: the key/value cache holds full batches of them. None
            for an engine's own choice.
        options: More fields of `EngineOptions`.
    """

    kind: str
    bundle: Path
    checkpoints: dict[str, Path] = field(default_factory=dict)
    variants: tuple[str, ...]
    device: str = "cpu"
    dtype: str = "auto"
    threads: int = 1
    cores: tuple[int, ...] | None = None
    room_tokens: int | None = None
    options: dict[str, Any] = field(default_factory=dict)


class Counts(NamedTuple):
    """What a system did besides answering; zero where it does not tell.

    Attributes:
        swaps: Times a variant was made resident.
        swap_bytes: Bytes moved for that.
        swap_s: Seconds it took.
        steps: Forward steps.
        mixed_steps: Steps with tokens of several variants.
        expert_hits: Times a pool expert was in device memory when needed.
        expert_misses: Times it had to be fetched.
    """

    swaps: int = 0
    swap_bytes: int = 0
    swap_s: float = 0.0
    steps: int = 0
    mixed_steps: int = 0
    expert_hits: int = 0
    expert_misses: int = 0

    def minus(self, earlier: "Counts") -> "Counts":
        """What was counted since then."""
        return Counts(*map(sub, self, earlier))

    def plus(self, other: "Counts") -> "Counts":
        """Both together."""
        return Counts(*map(add, self, other))


class Served(Protocol):
    """A system inside its process."""

    def run(self, trace: Trace, start_s: float, limit_s: float) -> list[Record]:
        """Serve a trace as it comes.

        Args:
            trace: In order of arrival.
            start_s: When it begins, by `time.perf_counter()`, which all processes of a machine share.
            limit_s: Seconds after which the run is broken off.

        Returns:
            One record per request, in the order of the trace.
        """

    def counts(self) -> Counts:
        """What was counted since the start."""

    def probe(self, name: str, arguments: dict[str, Any]) -> Any:
        """A measurement of `probes.PROBES` on this system."""

    def close(self) -> None:
        """Give everything back."""


class WorkerFailed(Exception):
    """A system could not start, or broke; a result like any other."""


def last_line(failure: str | None) -> str:
    """What a traceback comes down to."""
    return (failure or "").strip().rpartition("\n")[2][:100]


class Worker:
    """A system in its process, as the caller sees it; a context manager."""

    def __init__(self, spec: WorkerSpec) -> None:
        self.spec = spec
        context = _context()
        self._connection, theirs = context.Pipe()
        self._is_working = True
        self._process = context.Process(target=_serve, args=(spec, theirs), daemon=True)
        begin = time.perf_counter()
        try:
            self._process.start()
        except (EOFError, OSError) as error:
            # The process that starts others is told of no reason; it has none left, or no memory.
            raise WorkerFailed("the system lets no process be started") from error
        finally:
            theirs.close()
        try:
            self._receive(_START_LIMIT_S)
        except BaseException:
            self.close()
            raise
        self.startup_s = time.perf_counter() - begin

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def begin_run(self, trace: Trace, start_s: float, limit_s: float) -> None:
        """Let it serve a trace; `end_run` waits for the outcome."""
        self._send("run", trace, start_s, limit_s)

    def end_run(self, limit_s: float) -> tuple[list[Record], Counts]:
        """The outcome of the run that was begun.

        Raises:
            WorkerFailed: It broke, or did not come to an end.
        """
        records, counts = self._receive(limit_s + _GRACE_S)
        return records, counts

    def probe(self, name: str, **arguments: Any) -> Any:
        """A measurement of `probes.PROBES` in its process.

        Raises:
            WorkerFailed: It broke.
        """
        self._send("probe", name, arguments)
        return self._receive(_START_LIMIT_S)

    def memory(self) -> Memory:
        """Memory of its process now."""
        assert self._process.pid is not None
        return measure_memory([self._process.pid])

    def close(self) -> None:
        """End the process."""
        if not self._is_working:
            with suppress(WorkerFailed):
                self._send("close")
            self._process.join(_CLOSE_LIMIT_S)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()
        self._connection.close()

    def _send(self, message: str, *arguments: Any) -> None:
        try:
            self._connection.send((message, arguments))
        except OSError as error:
            raise WorkerFailed("its process has ended") from error
        self._is_working = True

    def _receive(self, limit_s: float) -> Any:
        if not self._connection.poll(limit_s):
            self._process.kill()
            raise WorkerFailed(f"no answer within {limit_s:.0f} s")
        try:
            is_done, value = self._connection.recv()
        except EOFError as error:
            self._process.join(10)
            raise WorkerFailed(f"its process ended with code {self._process.exitcode}") from error
        self._is_working = False
        if not is_done:
            raise WorkerFailed(value)
        return value


def _context() -> ForkServerContext | SpawnContext:
    """How processes are started: forked from one that has imported everything and computed nothing.

    Forking this process would not be safe once it has threads, and starting afresh takes seconds each time.
    """
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["moemerge.bench.served", "moemerge.bench.probes"])
    return context


def _serve(spec: WorkerSpec, connection: Connection) -> None:
    """The process: start, then answer one message after another."""
    served: Served | None = None
    try:
        served = _start(spec)
        connection.send((True, None))
        actions: dict[str, Callable[..., Any]] = {
            "run": lambda *arguments: _run(served, *arguments),
            "probe": served.probe,
        }
        while True:
            message, arguments = connection.recv()
            if message == "close":
                return
            connection.send((True, actions[message](*arguments)))
    except (EOFError, KeyboardInterrupt):
        # The caller has gone, or the user stops everything.
        return
    except MoemergeError as error:
        connection.send((False, str(error)))
    except Exception:
        connection.send((False, traceback.format_exc()))
    finally:
        if served:
            served.close()


def _start(spec: WorkerSpec) -> Served:
    if spec.cores is not None and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, spec.cores)
    import torch

    from moemerge.bench.served import KINDS

    torch.set_num_threads(spec.threads)
    return KINDS[spec.kind](spec)


def _run(served: Served, trace: Trace, start_s: float, limit_s: float) -> tuple[list[Record], Counts]:
    before = served.counts()
    records = served.run(trace, start_s, limit_s)
    return records, served.counts().minus(before)
