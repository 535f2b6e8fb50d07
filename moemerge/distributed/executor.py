"""Carries units of work out on the nodes of a cluster, as the local engine would.

What travels are places of tensors and small results; all else is files, on paths that every node sees, or
that a node fetches from the hub by itself. A unit whose node is lost is done again elsewhere.
"""

import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import ray
import torch
from ray.exceptions import OutOfMemoryError, RayError, RayTaskError

from moemerge.checkpoint.hub_nodes import fetch_path, is_hub_path
from moemerge.checkpoint.sizes import format_size
from moemerge.distributed.cluster import Cluster
from moemerge.distributed.tally import Advance, Follower, Teller, start_tally
from moemerge.errors import ClusterFailure, Finding, MoemergeError, NotEnoughRoom, NotFound, list_findings
from moemerge.execution import Result, Work
from moemerge.progress import Progress

_RETRIES = 3
_POLL_S = 0.25
_PATIENCE_S = 30.0
"""How long no node may be there that could do what is left."""
Value = TypeVar("Value")


@dataclass(frozen=True, slots=True)
class _Done(Generic[Value]):
    """A unit's end."""

    value: Value
    advance: Advance


@dataclass(frozen=True, slots=True)
class _Failed:
    """A unit's end with an error that is the user's to see, not Ray's to wrap or repeat."""

    error: MoemergeError


class OnCluster:
    """`Executor` on the nodes of a cluster.

    Every unit has as many threads as with the local engine: what they add up may depend on that in its last
    digits.

    Attributes:
        cluster: Connected.
    """

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self._threads = torch.get_num_threads()
        self._seen: set[Path] = set()

    def map(self, works: Sequence[Work[Result]], progress: Progress) -> Iterator[tuple[int, Result]]:
        """See `Executor.map`.

        Raises:
            NotFound: A node does not see an input or the folder of the output.
            NotEnoughRoom: No node offers what a unit takes, or one took more.
            ClusterFailure: Nodes were lost again and again.
        """
        if not works:
            return
        self._require_visible(works)
        self._require_room(works)
        tally = start_tally(self.cluster.driver_id)
        follower = Follower(tally, progress)
        pending = {self._begin(work, number, tally): number for number, work in enumerate(works)}
        watch = _Watch(self.cluster)
        try:
            while pending:
                ready, _ = ray.wait(list(pending), timeout=_POLL_S)
                follower.follow()
                for reference in ready:
                    number = pending.pop(reference)
                    done = _result(reference, works[number])
                    follower.end(number, done.advance)
                    yield number, done.value
                if not ready:
                    work = works[min(pending.values())]
                    watch.require_node(self._cpus(work), work)
        finally:
            for reference in pending:
                ray.cancel(reference, force=True)
            ray.kill(tally)

    def _begin(self, work: Work[Result], number: int, tally: Any) -> "ray.ObjectRef[_Done[Result] | _Failed]":
        remote: Any = ray.remote(_carry_out)
        reference: ray.ObjectRef[_Done[Result] | _Failed] = remote.options(
            name=work.title,
            num_cpus=self._cpus(work),
            memory=work.memory_bytes,
            max_retries=_RETRIES,
            scheduling_strategy="SPREAD",
        ).remote(work.run, sorted(work.reads), self._threads_of(work), tally, number)
        return reference

    def _threads_of(self, work: Work[Any]) -> int:
        return 1 if work.is_parallel else self._threads

    def _cpus(self, work: Work[Any]) -> int:
        """Of a unit: its threads, or as many as the largest node has."""
        most = max((node.cpus for node in self.cluster.nodes()), default=1.0)
        return max(1, min(self._threads_of(work), int(most)))

    def _require_room(self, works: Sequence[Work[Result]]) -> None:
        largest = max(works, key=lambda work: work.memory_bytes)
        most = max((node.memory_bytes for node in self.cluster.nodes()), default=0)
        if largest.memory_bytes > most:
            raise NotEnoughRoom(
                f"{largest.title} takes {format_size(largest.memory_bytes)} of memory, the largest node of "
                f"the cluster offers {format_size(most)}. Give --max-ram, or larger nodes"
            )

    def _require_visible(self, works: Sequence[Work[Result]]) -> None:
        """Make sure that every node sees the inputs, and the folder as this process does."""
        reads = frozenset[Path]().union(*(work.reads for work in works)) - self._seen
        sizes = {path: path.stat().st_size for path in sorted(reads)}
        marks = [folder / f".{uuid.uuid4().hex}.seen" for folder in {work.folder for work in works}]
        try:
            for mark in marks:
                mark.touch()
            answers = self.cluster.ask(_find_invisible, sizes, marks)
        finally:
            for mark in marks:
                mark.unlink(missing_ok=True)
        findings = [
            Finding(
                level="error",
                code="NOT_VISIBLE",
                where=f"node {node.name}",
                found=f"{'input' if path in sizes else 'output'} path not visible: "
                f"{path if path in sizes else path.parent}",
                fix="Put it on storage that every node has under this path"
                + (", or name inputs on the hub" if path in sizes else ""),
            )
            for node, missing in answers.items()
            for path in missing[:1]
        ]
        if findings:
            raise NotFound(list_findings(findings, "the cluster cannot do this work"), findings)
        self._seen |= reads


class _Watch:
    """Notices that nobody is left who could do the work."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._since_s: float | None = None
        self._asked_s = time.monotonic()

    def require_node(self, cpus: int, work: Work[Any]) -> None:
        """Make sure that a node could do a unit, once some time has passed.

        Raises:
            ClusterFailure: There has been none for a while.
        """
        now_s = time.monotonic()
        if now_s - self._asked_s < 1.0:
            return
        self._asked_s = now_s
        nodes = self._cluster.nodes()
        if any(node.cpus >= cpus and node.memory_bytes >= work.memory_bytes for node in nodes):
            self._since_s = None
            return
        self._since_s = self._since_s or now_s
        if now_s - self._since_s > _PATIENCE_S:
            raise ClusterFailure(
                f"{work.title}: no node of the cluster is left that offers {cpus} processors and "
                f"{format_size(work.memory_bytes)} of memory. What was finished is kept"
            )


def _carry_out(
    run: Callable[[Progress], Value], reads: Sequence[Path], threads: int, tally: Any, number: int
) -> _Done[Value] | _Failed:
    """On a node."""
    torch.set_num_threads(threads)
    teller = Teller(tally, number)
    try:
        for path in reads:
            if not path.exists():
                fetch_path(path)
        return _Done(run(teller), teller.told)
    except MoemergeError as error:
        return _Failed(error)


def _find_invisible(sizes: dict[Path, int], marks: Sequence[Path]) -> list[Path]:
    """On a node: inputs that are not there as on the driver's and cannot be fetched, then folders."""
    unlike = [path for path, size in sizes.items() if not _is_there(path, size)]
    return unlike + [mark for mark in marks if not mark.exists()]


def _is_there(path: Path, size: int) -> bool:
    return path.stat().st_size == size if path.exists() else is_hub_path(path)


def _result(reference: "ray.ObjectRef[_Done[Result] | _Failed]", work: Work[Result]) -> _Done[Result]:
    try:
        found = ray.get(reference)
    except RayTaskError as bug:
        # What was raised on the node, with its traceback.
        raise bug.as_instanceof_cause() from None  # type: ignore[no-untyped-call]  # not annotated
    except OutOfMemoryError as error:
        raise NotEnoughRoom(
            f"{work.title}: its node ran out of memory, again and again. Give --max-ram, or nodes with more "
            f"memory. What was finished is kept"
        ) from error
    except RayError as error:
        raise ClusterFailure(
            f"{work.title}: its node was lost, and those that it was given to after that ({error}). What was "
            f"finished is kept"
        ) from error
    if isinstance(found, _Failed):
        raise found.error
    return found
