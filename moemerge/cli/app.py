"""The program: its commands in the order of the work."""

import inspect
from collections.abc import Sequence
from typing import NoReturn

import typer

from moemerge.cli import (
    add,
    bench,
    calibrate,
    chat,
    compare,
    demo,
    deploy,
    diff,
    doctor,
    evaluate,
    export,
    families,
    init,
    merge,
    plan,
    pull,
    push,
    remove,
    report,
    run,
    schema,
    serve,
    show,
    similarity,
    status,
    undeploy,
    verify,
)
from moemerge.cli.command import command
from moemerge.cli.logs import show_logs
from moemerge.cli.program import run_program

app = typer.Typer(
    name="moemerge",
    help="Consolidate the experts of several fine-tuned MoE checkpoints into one bundle, and run it.",
    epilog="Exit codes: 0 done, 1 internal error, 2 usage, 3 recipe or option values, 4 incompatible inputs, "
    "5 not found or not authorised, 6 network, 7 not enough disk or memory, 8 damaged, 9 quality gate, "
    "10 busy, 130 and 143 stopped and resumable.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        from moemerge import __version__

        typer.echo(f"moemerge {__version__}")
        raise typer.Exit


@app.callback()
def _program(
    context: typer.Context,
    version: bool = typer.Option(
        False, "--version", callback=_print_version, is_eager=True, help="Print the version and exit."
    ),
    verbose: bool = typer.Option(
        False, "--verbose", "-v", help="As --verbose of every command, whose -v is a variant."
    ),
) -> None:
    context.with_resource(show_logs(verbose=verbose))


_BUILT_IN = {"evaluate": "eval"}
"""Commands whose names are built-in functions', which no function of ours replaces."""

for module in (
    init, pull, show, diff, similarity, calibrate, plan, merge, add, remove, report, verify, evaluate,
    compare, export, push, run, chat, serve, deploy, status, undeploy, bench, demo, families, schema, doctor,
):  # fmt: skip
    name = module.__name__.rpartition(".")[2]
    shown = _BUILT_IN.get(name, name)
    function = getattr(module, name)
    # Given as it is, the first line of a description is not cut to one line of the terminal.
    summary = (inspect.getdoc(function) or "").partition("\n\n")[0]
    app.command(shown, short_help=summary)(command(function, shown))


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the program with these arguments, or with those of the process."""
    run_program(app, arguments)
