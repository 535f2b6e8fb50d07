"""Progress on standard error: a bar in a terminal, plain lines elsewhere. Bytes, rate, time left."""

import logging
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from moemerge.checkpoint.sizes import format_size
from moemerge.cli.command import hint
from moemerge.progress import Progress, Silent

logger = logging.getLogger(__name__)
FIRST_SECONDS, PLAIN_SECONDS = 2.0, 5.0
"""When work is told of that takes a while, and how often from then on, where lines are printed."""


@contextmanager
def show_progress(*, quiet: bool) -> Iterator[Progress]:
    """Progress for the length of a command; how long each task took is logged."""
    with _shown(quiet=quiet) as shown:
        logged = _Logged(shown)
        yield logged
        logged.end()


@contextmanager
def _shown(*, quiet: bool) -> Iterator[Progress]:
    if quiet:
        yield Silent()
    elif sys.stderr.isatty():
        with _bar() as progress:
            yield progress
    else:
        plain = _Plain()
        yield plain
        plain.end()


class _Logged:
    """Progress that logs how long it was from the beginning of each task to that of the next."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._title = ""
        self._begin = time.monotonic()
        self.advance = progress.advance

    def start(self, title: str, total_bytes: int) -> None:
        self.end()
        self._title, self._begin = title, time.monotonic()
        self._progress.start(title, total_bytes)

    def end(self) -> None:
        """Close the last task."""
        if self._title:
            logger.info("%s: %.1f s", self._title, time.monotonic() - self._begin)
            self._title = ""


@contextmanager
def _bar() -> Iterator[Progress]:
    from rich import progress as rich_progress
    from rich.console import Console

    bar = rich_progress.Progress(
        rich_progress.TextColumn("{task.description:<20}"),
        rich_progress.BarColumn(),
        rich_progress.DownloadColumn(),
        rich_progress.TransferSpeedColumn(),
        rich_progress.TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
    )
    with bar:
        yield _Bar(bar)


class _Bar:
    def __init__(self, bar: "object") -> None:
        from rich.progress import Progress as RichProgress

        assert isinstance(bar, RichProgress)
        self._bar = bar
        self._task = bar.add_task("", total=None, visible=False)

    def start(self, title: str, total_bytes: int) -> None:
        self._bar.reset(self._task, description=title, total=total_bytes, visible=True)

    def advance(self, num_bytes: int) -> None:
        self._bar.advance(self._task, num_bytes)


class _Plain:
    """A line when a task has taken a while, and every few seconds from then on."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._title = ""
        self._begin = self._last = time.monotonic()
        self._done = self._total = 0
        self._spoke = False

    def start(self, title: str, total_bytes: int) -> None:
        self.end()
        with self._lock:
            self._title, self._total, self._done, self._spoke = title, total_bytes, 0, False
            self._begin = self._last = time.monotonic()

    def advance(self, num_bytes: int) -> None:
        with self._lock:
            self._done += num_bytes
            now = time.monotonic()
            if now - self._last < (PLAIN_SECONDS if self._spoke else FIRST_SECONDS):
                return
            self._last, self._spoke = now, True
            rate = self._done / (now - self._begin)
            left = max(self._total - self._done, 0) / rate if rate else 0
            hint(
                f"{self._title}: {format_size(self._done)} of {format_size(self._total)}, "
                f"{format_size(rate)}/s, {left:.0f} s left"
            )

    def end(self) -> None:
        """Close the last task."""
        if self._spoke:
            seconds = time.monotonic() - self._begin
            hint(f"{self._title}: {format_size(self._done)} in {seconds:.1f} s")
