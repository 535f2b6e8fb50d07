"""`moemerge eval`."""

from pathlib import Path
from typing import Annotated

import typer

from moemerge.cli.command import (
    JsonOption,
    OfflineOption,
    QuietOption,
    print_findings,
    print_json,
)
from moemerge.cli.completion import complete_variant
from moemerge.cli.progress import show_progress
from moemerge.errors import InvalidRecipe

TextOption = Annotated[
    list[str],
    typer.Option(
        "--text",
        metavar="NAME=FILE",
        help="A variant's own text to measure on: .txt, or .jsonl of input and target.",
    ),
]
WindowsOption = Annotated[int, typer.Option("--windows", min=1, help="Most windows of running text.")]
WindowOption = Annotated[
    int, typer.Option("--window", min=2, help="Tokens of a window: as many as in fine-tuning.")
]
RowsOption = Annotated[int, typer.Option("--rows", min=1, help="Most rows of a task.")]


def evaluate(
    subject: Annotated[str, typer.Argument(metavar="BUNDLE", help="A bundle, or a checkpoint reference.")],
    text: TextOption,
    original: Annotated[
        list[str] | None,
        typer.Option("--original", metavar="NAME=REF", help="What a variant was made from, to compare with."),
    ] = None,
    base: Annotated[
        str | None, typer.Option("--base", metavar="REF", help="Common ancestor, for the gain recovered.")
    ] = None,
    variant: Annotated[
        list[str] | None,
        typer.Option(
            "--variant", "-v", metavar="NAME", help="Measure only these.", autocompletion=complete_variant
        ),
    ] = None,
    windows: WindowsOption = 96,
    window: WindowOption = 256,
    rows: RowsOption = 400,
    lm_eval: Annotated[
        list[str] | None,
        typer.Option(
            "--lm-eval",
            metavar="NAME=FILE",
            help="Results of lm-evaluation-harness to show beside: of NAME, original:NAME, or base.",
        ),
    ] = None,
    dtype: Annotated[
        str, typer.Option("--dtype", help="Of the computation: float32 or bfloat16.")
    ] = "float32",
    out: Annotated[
        Path | None, typer.Option("--out", "-o", metavar="FILE", help="Write all figures as JSON, too.")
    ] = None,
    offline: OfflineOption = False,
    quiet: QuietOption = False,
    as_json: JsonOption = False,
) -> None:
    """Measure the variants of a bundle on text: perplexity, accuracy, and distance to their originals.

    With --original: KL divergence, agreement of the likeliest token, and how often both routers choose the
    same slots. With --base as well: the share of what fine-tuning gained that is left, 1 being all.

    Example: moemerge eval duo.moe --text code=examples/families/mini/text/code.txt --windows 4
    --original code=examples/families/mini/code --base examples/families/mini/base
    """
    import json

    from moemerge.bundle.target import check_writable, writing
    from moemerge.checkpoint.writer import write_text
    from moemerge.cli.evaluation_report import print_evaluation
    from moemerge.evaluation.evaluating import evaluate as evaluate_subject
    from moemerge.evaluation.lm_eval import parse_lm_eval
    from moemerge.evaluation.samples import SampleSize
    from moemerge.evaluation.selection import open_evaluation

    if out:
        check_writable(out)
    if dtype not in ("float32", "bfloat16"):
        raise InvalidRecipe(f"dtype {dtype!r}: expected float32 or bfloat16")
    size = SampleSize(windows=windows, window=window, rows=rows)
    with show_progress(quiet=quiet) as progress:
        opened = open_evaluation(
            subject,
            text,
            originals=original or [],
            base=base,
            variants=variant,
            size=size,
            offline=offline,
            progress=progress,
        )
        found = evaluate_subject(
            opened.subject,
            opened.samples,
            originals=opened.originals,
            base=opened.base,
            lm_eval=parse_lm_eval(lm_eval or [], list(opened.samples)),
            dtype=dtype,
            progress=progress,
        )
    if out:
        with writing(out):
            write_text(out, json.dumps(found.as_dict(), indent=1) + "\n")
    if as_json:
        print_json("eval", found.as_dict(), (*opened.findings, *found.findings))
        return
    if not quiet:
        print_findings((*opened.findings, *found.findings))
    print_evaluation(found)
    if out:
        typer.echo(f"Figures: {out}")
