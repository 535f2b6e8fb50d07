"""What every command shares: errors to exit codes, `--json`, and where output goes.

Results go to standard output, progress, hints and errors to standard error.
"""

import functools
import json
import signal
import sys
from collections.abc import Callable
from typing import Annotated, Any, NoReturn, ParamSpec

import typer

from moemerge.errors import Finding, MoemergeError

_RESUMABLE = "What was finished is kept; run the same command again to continue."
_STOPPED = "Nothing half-written is left; run the same command again."
Parameters = ParamSpec("Parameters")
SCHEMA = "moemerge/cli@1"

JsonOption = Annotated[
    bool, typer.Option("--json", help="Print one JSON object instead of text.", envvar="MOEMERGE_JSON")
]
QuietOption = Annotated[
    bool, typer.Option("--quiet", "-q", help="No progress and no hints.", envvar="MOEMERGE_QUIET")
]
OfflineOption = Annotated[
    bool, typer.Option("--offline", help="Use the hub cache only, no network.", envvar="MOEMERGE_OFFLINE")
]
BaseOption = Annotated[
    str | None, typer.Option("--base", metavar="REF", help="Common ancestor, for distances of deltas.")
]
MaxRamOption = Annotated[
    str | None,
    typer.Option("--max-ram", metavar="SIZE", help="Memory to stay within.", envvar="MOEMERGE_MAX_RAM"),
]
AllowPickleOption = Annotated[
    bool,
    typer.Option("--allow-pickle", help="Convert pickled weights (opened weights-only) to safetensors."),
]


def command(function: Callable[Parameters, None], name: str = "") -> Callable[Parameters, None]:
    """Give a command its error handling; its name is the function's unless told otherwise."""
    name = name or function.__name__

    @functools.wraps(function)
    def run(*args: Parameters.args, **kwargs: Parameters.kwargs) -> None:
        as_json = bool(kwargs.get("as_json"))
        try:
            function(*args, **kwargs)
        except MoemergeError as error:
            _report(error, name, as_json=as_json)
            raise typer.Exit(error.exit_code) from error
        except (KeyboardInterrupt, _Terminated) as stop:
            hint(f"Stopped.{_what_is_left(name, kwargs)}")
            raise typer.Exit(_stop_code(stop)) from stop
        except BrokenPipeError:
            # The reader of our output has gone; nobody is left to tell.
            sys.stderr.close()
            raise typer.Exit(0) from None

    return run


def print_json(name: str, data: dict[str, Any], findings: tuple[Finding, ...] = ()) -> None:
    """The envelope of `--json` for a command that succeeded."""
    _print_envelope(name, 0, data, findings)


def print_findings(findings: tuple[Finding, ...]) -> None:
    """Warnings and notes on standard error."""
    for finding in findings:
        hint(f"{finding.level}: {finding}")


def hint(text: str) -> None:
    """A line on standard error."""
    typer.echo(text, err=True)


def run_program(program: Callable[[], None]) -> None:
    """Run it so that SIGTERM unwinds like Ctrl-C, also before a command has begun."""
    try:
        signal.signal(signal.SIGTERM, _raise_terminated)
        program()
    except (KeyboardInterrupt, _Terminated) as stop:
        raise SystemExit(_stop_code(stop)) from None


def _what_is_left(name: str, options: dict[str, Any]) -> str:
    """What a stopped command leaves, for those who would start it again."""
    if name in ("merge", "pull", "calibrate", "compare") or (name == "run" and options.get("source")):
        return f" {_RESUMABLE}"
    return "" if name in ("run", "chat", "serve") else f" {_STOPPED}"


def _stop_code(stop: BaseException) -> int:
    return 143 if isinstance(stop, _Terminated) else 130


class _Terminated(BaseException):
    """SIGTERM arrived."""


def _raise_terminated(number: int, frame: object) -> NoReturn:
    raise _Terminated


def _report(error: MoemergeError, name: str, *, as_json: bool) -> None:
    if as_json:
        findings = error.findings or (
            Finding(level="error", code=type(error).__name__, where=name, found=str(error)),
        )
        _print_envelope(name, error.exit_code, {"message": str(error)}, findings)
    else:
        hint(f"error: {error}")


def _print_envelope(name: str, exit_code: int, data: dict[str, Any], findings: tuple[Finding, ...]) -> None:
    envelope = {
        "schema": SCHEMA,
        "command": name,
        "ok": exit_code == 0,
        "exit_code": exit_code,
        "data": data,
        "findings": [finding.as_dict() for finding in findings],
    }
    typer.echo(json.dumps(envelope, indent=2))
