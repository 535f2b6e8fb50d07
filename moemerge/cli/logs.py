"""What the library logs, on standard error: warnings as hints, and all of it with `--verbose`."""

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager

import typer

_LIBRARY = logging.getLogger("moemerge")


class _Hints(logging.Handler):
    """Writes a line as the program writes hints; with the time when it tells everything."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write one record, with its traceback if it has one."""
        text = f"{record.levelname.lower()}: {self.format(record)}"
        if _LIBRARY.level <= logging.DEBUG:
            text = f"{time.strftime('%H:%M:%S', time.localtime(record.created))} {text}"
        typer.echo(text, err=True)


@contextmanager
def show_logs(*, verbose: bool) -> Iterator[None]:
    """Show warnings, or everything, for the length of a program."""
    handler = _Hints()
    before = _LIBRARY.level, _LIBRARY.propagate
    _LIBRARY.addHandler(handler)
    _LIBRARY.propagate = False
    _LIBRARY.setLevel(logging.DEBUG if verbose else logging.WARNING)
    try:
        yield
    finally:
        _LIBRARY.removeHandler(handler)
        _LIBRARY.level, _LIBRARY.propagate = before


def choose_level(*, quiet: bool, verbose: bool) -> None:
    """What a command's own options ask for beyond the program's."""
    if verbose:
        _LIBRARY.setLevel(logging.DEBUG)
    elif quiet and _LIBRARY.level > logging.DEBUG:
        _LIBRARY.setLevel(logging.ERROR)
