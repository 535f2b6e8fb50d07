"""Units of work from files to files, and what carries them out: this process, or a cluster (`distributed/`).

Whoever has work to do describes it and takes the results; only he writes journals. Knows nothing of what the
work is.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, Protocol, TypeVar

from moemerge.progress import Progress

Result = TypeVar("Result")


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
    """

    title: str
    run: Callable[[Progress], Result]
    reads: frozenset[Path]
    folder: Path
    memory_bytes: int


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
    """Everything in this process, one unit after the other, each on all of torch's threads."""

    def map(self, works: Sequence[Work[Result]], progress: Progress) -> Iterator[tuple[int, Result]]:
        """See `Executor.map`."""
        for number, work in enumerate(works):
            yield number, work.run(progress)
