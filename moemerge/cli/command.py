"""What every command shares: errors to exit codes, `--json`, and where output goes.

Results go to standard output, progress, hints and errors to standard error.
"""

import functools
import inspect
import json
import os
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import typer

from moemerge.cli.logs import choose_level
from moemerge.cli.signature import complete_signature
from moemerge.cli.streams import forget_output
from moemerge.errors import Finding, MoemergeError

_RESUMABLE = "What was finished is kept; run the same command again to continue."
_CONTINUED = ("add", "calibrate", "compare", "merge", "pull", "push", "remove")
_STOPPED = "Nothing half-written is left; run the same command again."
SCHEMA = "moemerge/cli@1"
_TRUE = ("1", "true", "t", "yes", "y", "on")

JsonOption = Annotated[
    bool, typer.Option("--json", help="Print one JSON object instead of text.", envvar="MOEMERGE_JSON")
]
QuietOption = Annotated[
    bool, typer.Option("--quiet", "-q", help="No progress and no hints.", envvar="MOEMERGE_QUIET")
]
VerboseOption = Annotated[
    bool,
    typer.Option("--verbose", help="Tell what happens, with times.", envvar="MOEMERGE_VERBOSE"),
]
OfflineOption = Annotated[
    bool, typer.Option("--offline", help="Use the hub cache only, no network.", envvar="MOEMERGE_OFFLINE")
]
BaseOption = Annotated[
    str | None,
    typer.Option("--base", metavar="REF", help="Common ancestor: tells what fine-tuning changed and gained."),
]
MaxRamOption = Annotated[
    str | None,
    typer.Option("--max-ram", metavar="SIZE", help="Memory to stay within.", envvar="MOEMERGE_MAX_RAM"),
]
RestartOption = Annotated[
    bool, typer.Option("--restart", help="Discard what an interrupted run has finished.")
]
AllowPickleOption = Annotated[
    bool,
    typer.Option("--allow-pickle", help="Convert pickled weights (opened weights-only) to safetensors."),
]


def command(function: Callable[..., None], name: str = "") -> Callable[..., None]:
    """Give a command its error handling and common options; its name is the function's unless told."""
    name = name or function.__name__
    declared = inspect.signature(function).parameters

    @functools.wraps(function)
    def run(**kwargs: Any) -> None:
        as_json = bool(kwargs.get("as_json"))
        choose_level(quiet=bool(kwargs.get("quiet")), verbose=bool(kwargs.get("verbose")))
        try:
            function(**{key: value for key, value in kwargs.items() if key in declared})
        except MoemergeError as error:
            _report(error, name, as_json=as_json)
            raise typer.Exit(error.exit_code) from error
        except (KeyboardInterrupt, Terminated) as stop:
            left = _what_is_left(name, kwargs)
            _report_stop(name, stop_code(stop), left, as_json=as_json)
            raise typer.Exit(stop_code(stop)) from stop
        except BrokenPipeError:
            # The reader of our output has gone; nobody is left to tell.
            forget_output()
            raise typer.Exit(0) from None

    common = {"quiet": QuietOption, "verbose": VerboseOption}
    run.__signature__ = complete_signature(function, name, common)  # type: ignore[attr-defined]
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


def print_failure(name: str, exit_code: int, message: str, findings: tuple[Finding, ...]) -> None:
    """The envelope of `--json` for a command that failed."""
    _print_envelope(name, exit_code, {"message": message}, findings)


def wants_json(words: Sequence[str]) -> bool:
    """Whether a command line that could not be parsed asks for JSON, by option or environment."""
    options = words[: words.index("--")] if "--" in words else words
    return "--json" in options or os.environ.get("MOEMERGE_JSON", "").lower() in _TRUE


class Terminated(BaseException):
    """SIGTERM arrived."""


def stop_code(stop: BaseException) -> int:
    """The exit code of a program that was stopped."""
    return 143 if isinstance(stop, Terminated) else 130


def _what_is_left(name: str, options: dict[str, Any]) -> str:
    """What a stopped command leaves, for those who would start it again."""
    if name in _CONTINUED or (name == "run" and options.get("source")):
        return _RESUMABLE
    return "" if name in ("run", "chat", "serve") else _STOPPED


def _report_stop(name: str, exit_code: int, left: str, *, as_json: bool) -> None:
    if as_json:
        finding = Finding(level="error", code="Interrupted", where=name, found="stopped", fix=left)
        print_failure(name, exit_code, f"Stopped. {left}".rstrip(), (finding,))
    hint(f"Stopped. {left}".rstrip())


def _report(error: MoemergeError, name: str, *, as_json: bool) -> None:
    if as_json:
        findings = error.findings or (
            Finding(level="error", code=type(error).__name__, where=name, found=str(error)),
        )
        print_failure(name, error.exit_code, str(error), findings)
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
