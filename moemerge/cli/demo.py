"""`moemerge demo`."""

from pathlib import Path
from typing import Annotated

import typer

from moemerge.cli.command import JsonOption, QuietOption, hint, print_json


def demo(
    family: Annotated[
        Path,
        typer.Argument(metavar="FAMILY", help="Folder with base, its fine-tunes, and text/<fine-tune>.txt."),
    ] = Path("examples/families/mini"),
    out: Annotated[Path, typer.Option("--out", "-o", metavar="DIR", help="Folder for bundles.")] = Path(
        "demo-output"
    ),
    quiet: QuietOption = False,
    as_json: JsonOption = False,
) -> None:
    """Merge a small family and show what it costs and saves: similarity, bytes, perplexity, answers.

    Ends with a page about the bundle, as moemerge report writes it.

    Example: moemerge demo examples/families/mini
    """
    import torch

    from moemerge.cli.demo_report import print_report
    from moemerge.evaluation.demo import run_demo
    from moemerge.report.html import write_report

    # The family is so small that threads only wait for each other, on a busy machine ten times longer.
    torch.set_num_threads(1)
    report = run_demo(family, out, say=(lambda text: None) if quiet or as_json else hint)
    page = out / "report.html"
    write_report(report.bundle, page, out / "calibration")
    if as_json:
        print_json("demo", {**report.as_dict(), "page": str(page)})
    else:
        print_report(report)
        typer.echo(f"Report of this bundle, for a browser: {page}")
