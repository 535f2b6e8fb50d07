"""`moemerge compare`."""

from pathlib import Path
from typing import Annotated

import typer

from moemerge.cli.command import (
    AllowPickleOption,
    JsonOption,
    MaxRamOption,
    OfflineOption,
    QuietOption,
    hint,
    print_findings,
    print_json,
)
from moemerge.cli.evaluate import RowsOption, TextOption, WindowOption, WindowsOption
from moemerge.cli.executors import LOCAL, AddressOption, ExecutorOption, open_executor
from moemerge.cli.progress import show_progress
from moemerge.errors import InvalidRecipe


def compare(
    sources: Annotated[list[str], typer.Argument(metavar="NAME=REF...", help="Variants to keep.")],
    base: Annotated[str, typer.Option("--base", metavar="REF", help="Common ancestor.")],
    text: TextOption,
    budget: Annotated[
        str, typer.Option("--budget", metavar="LIST", help="Budgets with commas between: 0.6x,1x,40GiB.")
    ],
    calibration: Annotated[
        Path | None,
        typer.Option("--calibration", metavar="DIR", help="Made by `moemerge calibrate` from other text."),
    ] = None,
    calibrate_text: Annotated[
        list[str] | None,
        typer.Option("--calibrate-text", metavar="NAME=FILE", help="Calibrate on this text on the way."),
    ] = None,
    tokens: Annotated[
        int, typer.Option("--tokens", metavar="N", min=1, help="Most tokens of each --calibrate-text.")
    ] = 65536,
    methods: Annotated[
        str, typer.Option("--methods", metavar="LIST", help="With commas between; all by default.")
    ] = "all",
    windows: WindowsOption = 96,
    window: WindowOption = 256,
    rows: RowsOption = 400,
    draws: Annotated[int, typer.Option("--draws", min=100, help="Of the bootstrap.")] = 2000,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of the bootstrap.")] = 0,
    out: Annotated[
        Path, typer.Option("--out", "-o", metavar="DIR", help="Folder for results; reused when it has some.")
    ] = Path("comparison"),
    plot: Annotated[
        Path | None, typer.Option("--plot", metavar="FILE", help="Draw the curves: .png, .svg or .pdf.")
    ] = None,
    max_ram: MaxRamOption = None,
    engine: ExecutorOption = LOCAL,
    address: AddressOption = None,
    offline: OfflineOption = False,
    allow_pickle: AllowPickleOption = False,
    quiet: QuietOption = False,
    as_json: JsonOption = False,
) -> None:
    """Measure ways to keep several fine-tunes at equal bytes, with intervals.

    Every method's plan is carried out as a merge would, and its bundle served: all bytes count. Methods: ours
    (policy measured), copies (own experts in few bits), base+residuals, mean+residuals, pick+residuals, pick
    (the paper's), medoid, mean, ties, dare, regmean, average (of whole models). Results are kept in DIR; what
    is there from the same inputs is not measured again.

    Example: moemerge compare code=examples/families/mini/code sums=examples/families/mini/sums --budget 1x
    --base examples/families/mini/base --text code=examples/families/mini/text/code.txt
    --text sums=examples/families/mini/text/sums.txt --windows 2 --methods copies,pick --tokens 2048
    --calibrate-text code=examples/families/mini/text/code.txt
    --calibrate-text sums=examples/families/mini/text/sums.txt
    """
    from moemerge.cli.comparison_report import print_comparison
    from moemerge.cli.inputs import open_sources, parse_max_ram
    from moemerge.evaluation.comparison import compare as compare_methods
    from moemerge.evaluation.curves import check_plot, draw_curves
    from moemerge.evaluation.selection import open_comparison, parse_budgets, parse_methods

    if (calibration is None) == (not calibrate_text):
        raise InvalidRecipe("give --calibration or --calibrate-text, of other text than --text")
    if plot:
        check_plot(plot)
    budgets, chosen = parse_budgets(budget), parse_methods(methods)
    memory = parse_max_ram(max_ram)
    with open_executor(engine, address, memory) as executor, show_progress(quiet=quiet) as progress:
        variants = open_sources(
            sources, base, progress, offline=offline, allow_pickle=allow_pickle, quiet=quiet
        )
        opened = open_comparison(
            variants,
            text,
            calibration=calibration,
            calibrate_texts=calibrate_text or [],
            tokens=tokens,
            window=window,
            windows=windows,
            rows=rows,
            folder=out,
            max_ram=memory,
            progress=progress,
            executor=executor,
        )
        task = opened.task(budgets=budgets, methods=chosen, seed=seed, num_draws=draws)
        say = (lambda line: None) if quiet or as_json else hint
        found = compare_methods(task, progress, say, executor)
    if plot:
        draw_curves(found, plot, f"{len(found.names)} variants: {', '.join(found.names)}")
    if as_json:
        print_json("compare", found.as_dict(), (*variants.findings, *opened.findings))
        return
    if not quiet:
        print_findings(opened.findings)
    print_comparison(found)
    typer.echo(f"Results: {out}{f', curves: {plot}' if plot else ''}")
