"""`moemerge calibrate`."""

import math
from pathlib import Path
from typing import Annotated

import typer

from moemerge.cli.command import (
    AllowPickleOption,
    BaseOption,
    JsonOption,
    MaxRamOption,
    OfflineOption,
    QuietOption,
    print_findings,
    print_json,
)
from moemerge.cli.executors import LOCAL, AddressOption, ExecutorOption, open_executor
from moemerge.cli.progress import show_progress

TextOption = Annotated[
    list[str],
    typer.Option(
        "--text", metavar="NAME=FILE", help="A variant's own text: .txt, or .jsonl of input and target."
    ),
]


def calibrate(
    sources: Annotated[list[str], typer.Argument(metavar="NAME=REF...", help="Variants to calibrate.")],
    text: TextOption,
    out: Annotated[
        Path, typer.Option("--out", "-o", metavar="DIR", help="Folder to write, or to add variants to.")
    ],
    tokens: Annotated[
        int, typer.Option("--tokens", metavar="N", min=1, help="Most tokens of each text to use.")
    ] = 65536,
    window: Annotated[
        int,
        typer.Option("--window", metavar="N", min=2, help="Tokens of a window: as many as in fine-tuning."),
    ] = 256,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of the sample of tokens that is kept.")] = 0,
    dtype: Annotated[
        str, typer.Option("--dtype", help="Of the computation: float32, or bfloat16 where that is fast.")
    ] = "float32",
    base: BaseOption = None,
    max_ram: MaxRamOption = None,
    engine: ExecutorOption = LOCAL,
    address: AddressOption = None,
    offline: OfflineOption = False,
    allow_pickle: AllowPickleOption = False,
    quiet: QuietOption = False,
    as_json: JsonOption = False,
) -> None:
    """Run each variant on its own text and keep what its experts met.

    What plan and merge measure the cost of sharing with. Variants that the folder holds already, from the
    same weights, text and settings, are not run again, nor touched.

    Example: moemerge calibrate code=examples/families/mini/code -o calibration --tokens 4096
    --text code=examples/families/mini/text/code.txt
    """
    from moemerge.calibration.calibrating import calibrate as calibrate_variants
    from moemerge.calibration.passes import CalibrationOptions
    from moemerge.calibration.texts import parse_texts
    from moemerge.cli.inputs import open_sources, parse_max_ram
    from moemerge.cli.tables import print_table

    memory = parse_max_ram(max_ram)
    options = CalibrationOptions(num_tokens=tokens, window=window, seed=seed, dtype=dtype, max_ram=memory)
    paths = parse_texts(text)
    with open_executor(engine, address, memory) as executor, show_progress(quiet=quiet) as progress:
        variants = open_sources(
            sources, base, progress, offline=offline, allow_pickle=allow_pickle, quiet=quiet
        )
        done = calibrate_variants(variants, paths, out, options, progress, executor)
    index = done.calibration.index
    if as_json:
        data = {"folder": str(out), "reused": list(done.reused), **index.model_dump(by_alias=True)}
        print_json("calibrate", data, (*variants.findings, *done.findings))
        return
    if not quiet:
        print_findings(done.findings)
    rows = [
        [name, entry.num_tokens, entry.nll, math.exp(entry.nll), entry.base_nll_excess]
        for name, entry in index.variants.items()
    ]
    columns = ["variant", "tokens", "nats per token", "perplexity", "gained on the base"]
    print_table("Variants on their own text", columns, rows)
    again = f" ({', '.join(done.reused)} as before)" if done.reused else ""
    typer.echo(f"Calibration: {out}{again}")
