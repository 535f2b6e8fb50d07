"""`moemerge similarity`."""

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
    print_json,
)
from moemerge.cli.executors import LOCAL, AddressOption, ExecutorOption, open_executor
from moemerge.cli.progress import show_progress


def similarity(
    sources: Annotated[list[str], typer.Argument(metavar="NAME=REF...", help="Variants to compare.")],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="DIR", help="Folder to write.")],
    base: BaseOption = None,
    max_ram: MaxRamOption = None,
    engine: ExecutorOption = LOCAL,
    address: AddressOption = None,
    offline: OfflineOption = False,
    allow_pickle: AllowPickleOption = False,
    quiet: QuietOption = False,
    as_json: JsonOption = False,
) -> None:
    """Compare all experts of every layer, within and across variants.

    Writes one file of distance matrices per layer and an index, and prints a summary: how far apart the
    variants' experts of one slot are, relative to their norms, beside experts of different slots.

    Example: moemerge similarity code=examples/families/mini/code sums=examples/families/mini/sums -o sim
    """
    from moemerge.bundle.target import check_target
    from moemerge.cli.inputs import open_sources, parse_max_ram
    from moemerge.cli.tables import print_table
    from moemerge.consolidation.layers import write_similarity

    check_target(out)
    memory = parse_max_ram(max_ram)
    with open_executor(engine, address, memory) as executor, show_progress(quiet=quiet) as progress:
        variants = open_sources(
            sources, base, progress, offline=offline, allow_pickle=allow_pickle, quiet=quiet
        )
        index = write_similarity(variants, out, progress, max_ram=memory, executor=executor)
    if as_json:
        print_json("similarity", {"folder": str(out), **index}, variants.findings)
        return
    rows = [
        [
            layer["index"],
            layer["same_slot_median"],
            layer["same_slot_max"],
            layer["other_slot_median"],
            f"{layer['distinct']:.0f} of {len(index['variants']) * index['num_slots']}",
        ]
        for layer in index["layers"]
    ]
    columns = ["layer", "same slot, median", "same slot, worst", "other slots, median", "distinct experts"]
    print_table("Relative L2 distance between variants", columns, rows)
    typer.echo(f"Matrices and index: {out}")
