"""How long work tells that it advances, in bytes. Knows nothing of terminals."""

from typing import Protocol


class Progress(Protocol):
    """Receives the advance of one task after another."""

    def start(self, title: str, total_bytes: int) -> None:
        """A task of `total_bytes` begins; the one before has ended."""

    def advance(self, num_bytes: int) -> None:
        """So many more bytes of the task are done."""


class Silent:
    """Tells nobody."""

    def start(self, title: str, total_bytes: int) -> None:
        """Ignore."""

    def advance(self, num_bytes: int) -> None:
        """Ignore."""
