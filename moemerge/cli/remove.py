"""`moemerge remove`."""

from typing import Annotated

import typer

from moemerge.cli.add import BundleArgument, LinkOption, NewBundleOption
from moemerge.cli.command import JsonOption, QuietOption, RestartOption, print_json
from moemerge.cli.progress import show_progress


def remove(
    bundle: BundleArgument,
    variant: Annotated[str, typer.Argument(metavar="NAME", help="Variant that leaves.")],
    out: NewBundleOption = None,
    link: LinkOption = False,
    restart: RestartOption = False,
    quiet: QuietOption = False,
    as_json: JsonOption = False,
) -> None:
    """Take a variant out of a bundle, with all that only it used.

    What the other variants compute with stays as it is, bit for bit. Without -o the bundle is replaced when
    the new one is complete.

    Example: moemerge remove duo.moe scripture
    """
    from moemerge.checkpoint.sizes import format_size
    from moemerge.consolidation.leaving import remove_variant
    from moemerge.consolidation.rewriting import open_origin

    origin = open_origin(bundle, out, link=link)
    with show_progress(quiet=quiet) as progress:
        left = remove_variant(origin, variant, restart=restart, progress=progress)
    before, after = origin.bundle.manifest, left.manifest
    if as_json:
        data = {
            "bundle": str(left.folder),
            "variants": list(after.variants),
            "removed": variant,
            "freed_bytes": left.freed_bytes,
            "bytes_ratio_before": before.bytes_ratio,
            "bytes_ratio": after.bytes_ratio,
        }
        print_json("remove", data)
        return
    typer.echo(
        f"{variant} leaves {format_size(left.freed_bytes)} of expert bytes: {before.bytes_ratio:.3f} -> "
        f"{after.bytes_ratio:.3f} x one variant. Left: {', '.join(after.variants)}"
    )
    typer.echo(f"Bundle: {out or bundle}")
