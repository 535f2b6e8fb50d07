"""How the program begins and ends: signals, usage errors, and output that cannot be written.

Knows nothing of commands.
"""

import signal
import sys
from collections.abc import Sequence
from typing import NoReturn

import typer

from moemerge.cli.command import Terminated, hint, print_failure, stop_code, wants_json
from moemerge.cli.streams import forget_output, is_output_stuck, open_closed_streams
from moemerge.errors import PYDANTIC_PREFIX, Finding

_INTERNAL_CODE, _USAGE_CODE, _OUTPUT_CODE = 1, 2, 7
# Typer names only one kind of usage error; its base class stands for all of them.
_UsageError: type[Exception] = typer.BadParameter.__mro__[1]


def run_program(app: typer.Typer, arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the program, SIGTERM unwinding like Ctrl-C, also before a command has begun.

    Args:
        app: The program.
        arguments: Instead of those that the process was started with.

    Raises:
        SystemExit: Always, with a documented exit code; a bug passes through as it is.
    """
    open_closed_streams()
    before = signal.signal(signal.SIGTERM, _raise_terminated)
    try:
        code = _run(app, sys.argv[1:] if arguments is None else list(arguments))
    except OSError as error:
        if not is_output_stuck():
            raise
        forget_output()
        hint(f"error: standard output: cannot be written ({error.strerror})")
        code = _OUTPUT_CODE
    finally:
        signal.signal(signal.SIGTERM, before)
    raise SystemExit(code)


def _run(app: typer.Typer, words: list[str]) -> int:
    """The exit code of a command line; commands have told by then why it is not 0."""
    name = next((word for word in words if not word.startswith("-")), "moemerge")
    as_json = wants_json(words)
    try:
        code = app(args=words, prog_name="moemerge", standalone_mode=False)
    except (KeyboardInterrupt, Terminated) as stop:
        if as_json:
            _print_problem(name, stop_code(stop), "Interrupted", "stopped before the command began")
        return stop_code(stop)
    except _UsageError as error:
        error.message = error.message.removeprefix(PYDANTIC_PREFIX)  # type: ignore[attr-defined]
        if as_json:
            _print_problem(name, _USAGE_CODE, "Usage", error.format_message())  # type: ignore[attr-defined]
        else:
            error.show()  # type: ignore[attr-defined]  # of the base class that Typer does not name
        return _USAGE_CODE
    except Exception as bug:
        if as_json:
            found = f"internal error: {type(bug).__name__}: {bug}"
            _print_problem(name, _INTERNAL_CODE, "Internal", found)
        raise
    return code if isinstance(code, int) else 0


def _print_problem(name: str, exit_code: int, kind: str, found: str) -> None:
    print_failure(name, exit_code, found, (Finding(level="error", code=kind, where=name, found=found),))


def _raise_terminated(number: int, frame: object) -> NoReturn:
    raise Terminated
