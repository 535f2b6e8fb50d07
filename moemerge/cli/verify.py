"""`moemerge verify`."""

from pathlib import Path
from typing import Annotated

import typer

from moemerge.cli.command import JsonOption, QuietOption, print_json
from moemerge.cli.progress import show_progress


def verify(
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help="Bundle to check.")],
    quiet: QuietOption = False,
    as_json: JsonOption = False,
) -> None:
    """Prove that a bundle is whole: hashes, completeness, geometry, expert maps.

    Example: moemerge verify duo.moe
    """
    from moemerge.bundle.verify import verify_bundle

    with show_progress(quiet=quiet) as progress:
        whole = verify_bundle(bundle, progress)
    manifest = whole.manifest
    if as_json:
        print_json("verify", {"bundle": str(bundle), "variants": list(manifest.variants)})
    else:
        typer.echo(
            f"{bundle}: whole. {len(manifest.variants)} variants, {len(manifest.layers)} layers, "
            f"{sum(layer.num_experts for layer in manifest.layers)} pool experts."
        )
