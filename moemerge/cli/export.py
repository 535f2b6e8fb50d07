"""`moemerge export`."""

from pathlib import Path
from typing import Annotated

import typer

from moemerge.cli.command import JsonOption, QuietOption, print_json
from moemerge.cli.completion import complete_variant
from moemerge.cli.progress import show_progress


def export(
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help="Bundle to read.")],
    variant: Annotated[
        str,
        typer.Option(
            "--variant", "-v", metavar="NAME", help="Variant to export.", autocompletion=complete_variant
        ),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="DIR", help="Folder to create.")],
    shard_size: Annotated[
        str, typer.Option("--shard-size", metavar="SIZE", help="Largest size of a file.")
    ] = "4GiB",
    quiet: QuietOption = False,
    as_json: JsonOption = False,
) -> None:
    """Turn a variant back into an ordinary checkpoint, in the layout that its family is published in.

    transformers loads the result, and for decoder-only families so do vLLM and llama.cpp's converter.

    Example: moemerge export duo.moe -v code -o code-again
    """
    from moemerge.bundle.export import export_variant
    from moemerge.bundle.reader import open_bundle
    from moemerge.checkpoint.sizes import format_size, parse_size

    limit = parse_size(shard_size)
    with show_progress(quiet=quiet) as progress:
        files = export_variant(open_bundle(bundle), variant, out, shard_bytes=limit, progress=progress)
    if as_json:
        print_json("export", {"folder": str(out), "files": [path.name for path in files]})
    else:
        total = sum(path.stat().st_size for path in files)
        typer.echo(f"{out}: {len(files)} files, {format_size(total)}")
