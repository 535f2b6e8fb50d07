"""Units of work from files to files, and what carries them out: this process, or a cluster (`distributed/`).

Whoever has work to do describes it and takes the results; only he writes journals. Knows nothing of what the
work is.
"""

import ctypes
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, Protocol, TypeVar

import psutil

from moemerge.progress import Progress

Result = TypeVar("Result")
# Of the free memory, when no limit is given.
_FREE_SHARE = 0.7
_GRACE_S, _POLL_S = 2.0, 0.01


@dataclass(frozen=True, slots=True, kw_only=True)
class Work(Generic[Result]):
    """A unit of work.

    Attributes:
        title: What messages call it.
        run: Does it, and tells how far it is. It can be sent to another process, so what it is made of is
            small: places of tensors, not tensors; so is its result. Done again, it writes the same bytes.
        reads: Files that must be there, with absolute paths.
        folder: Absolute path of the folder that it writes into.
        memory_bytes: Most that its process takes.
        is_parallel: Whether one thread does it, and one process others beside it: it computes little at a
            time, which many threads hardly make faster but may round otherwise. It tells only advances.
    """

    title: str
    run: Callable[[Progress], Result]
    reads: frozenset[Path]
    folder: Path
    memory_bytes: int
    is_parallel: bool = False


class Executor(Protocol):
    """Carries work out."""

    def map(self, works: Sequence[Work[Result]], progress: Progress) -> Iterator[tuple[int, Result]]:
        """Results as they come, each with the number of its work.

        Args:
            works: All of it, in the order in which it is begun.
            progress: Told by `Work.run`, and of nothing else.

        Raises:
            MoemergeError: As the work; what has begun is ended, and what was handed out stays.
        """
        ...


class Local:
    """Everything in this process: parallel units side by side, others one by one on all of torch's threads.

    Args:
        max_ram: Bytes of memory that units side by side stay within, if one does; most of what is free by
            default.
    """

    def __init__(self, max_ram: int | None = None) -> None:
        self._max_ram = max_ram

    def map(self, works: Sequence[Work[Result]], progress: Progress) -> Iterator[tuple[int, Result]]:
        """See `Executor.map`."""
        if works and all(work.is_parallel for work in works):
            yield from _SideBySide(progress).map(works, self._num_workers(works))
            return
        for number, work in enumerate(works):
            yield number, work.run(progress)

    def _num_workers(self, works: Sequence[Work[Result]]) -> int:
        import torch

        limit = self._max_ram or int(_FREE_SHARE * psutil.virtual_memory().available)
        room = limit // max(work.memory_bytes for work in works)
        return max(1, min(len(works), torch.get_num_threads(), room))


class _Stopped(BaseException):
    """Raised inside a unit that nobody waits for any more."""


class _SideBySide:
    """Units of work on threads, each of which is the only one that computes its unit.

    Args:
        progress: Told of advances, by one thread at a time.
    """

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._lock = threading.Lock()
        self._running: set[int] = set()
        self._end: BaseException | None = None

    def map(self, works: Sequence[Work[Result]], num_workers: int) -> Iterator[tuple[int, Result]]:
        """See `Executor.map`."""
        import torch

        threads = torch.get_num_threads()
        pool = ThreadPoolExecutor(num_workers, initializer=torch.set_num_threads, initargs=(1,))
        grace_s = 0.0
        try:
            numbers = {pool.submit(self._run, work): number for number, work in enumerate(works)}
            for done in as_completed(numbers):
                if self._end is not None:
                    raise self._end
                yield numbers[done], done.result()
        except GeneratorExit:
            # Whoever took the results has failed: units that soon tell an advance end there.
            grace_s = _GRACE_S
            raise
        finally:
            self._stop(grace_s)
            pool.shutdown(cancel_futures=True)
            torch.set_num_threads(threads)

    def start(self, title: str, total_bytes: int) -> None:
        """Never told: see `Work.is_parallel`."""
        raise AssertionError("a unit beside others starts no task")

    def advance(self, num_bytes: int) -> None:
        """See `Progress.advance`."""
        with self._lock:
            if self._end is not None:
                raise _Stopped
            self._progress.advance(num_bytes)

    def _run(self, work: Work[Result]) -> Result:
        thread = threading.get_ident()
        with self._lock:
            if self._end is not None:
                raise _Stopped
            self._running.add(thread)
        try:
            return work.run(self)
        except BaseException as error:
            # The others end when they tell an advance: nothing is hurried, no file is left open.
            self._end = self._end or error
            raise
        finally:
            with self._lock:
                self._running.discard(thread)

    def _stop(self, grace_s: float) -> None:
        """Unless a unit has failed: end what runs after a while at its next step, as Ctrl-C does."""
        with self._lock:
            if self._end is not None:
                return
            self._end = _Stopped()
        deadline_s = time.monotonic() + grace_s
        while self._running and time.monotonic() < deadline_s:
            time.sleep(_POLL_S)
        with self._lock:
            for thread in self._running:
                raise_in = ctypes.pythonapi.PyThreadState_SetAsyncExc
                raise_in(ctypes.c_ulong(thread), ctypes.py_object(_Stopped))
