"""`moemerge add`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moemerge.cli.command import (
    AllowPickleOption,
    BaseOption,
    JsonOption,
    MaxRamOption,
    OfflineOption,
    QuietOption,
    RestartOption,
    print_findings,
    print_json,
)
from moemerge.cli.planning_options import CalibrationOption, DtypeOption, TokensOption
from moemerge.cli.progress import show_progress

if TYPE_CHECKING:
    from moemerge.consolidation.joining import Joined

BundleArgument = Annotated[Path, typer.Argument(metavar="BUNDLE", help="Bundle to change.")]
NewBundleOption = Annotated[
    Path | None,
    typer.Option("--out", "-o", metavar="NEW.moe", help="Write a new bundle and leave the old one alone."),
]
LinkOption = Annotated[
    bool,
    typer.Option("--link", help="With -o: link files that stay instead of copying them. Never edit either."),
]


def add(
    bundle: BundleArgument,
    source: Annotated[str, typer.Argument(metavar="NAME=REF", help="Variant that joins.")],
    out: NewBundleOption = None,
    budget: Annotated[
        str | None,
        typer.Option(
            "--budget",
            metavar="B",
            help="What it may add: +0.3x of one variant's expert bytes, a size (4GiB), or exact. By default "
            "what a variant has in the bundle on average; exact where everything is kept.",
        ),
    ] = None,
    text: Annotated[
        Path | None, typer.Option("--text", metavar="FILE", help="Measure costs on this text of its own.")
    ] = None,
    tokens: TokensOption = None,
    dtype: DtypeOption = None,
    calibration: CalibrationOption = None,
    base: BaseOption = None,
    max_ram: MaxRamOption = None,
    link: LinkOption = False,
    restart: RestartOption = False,
    offline: OfflineOption = False,
    allow_pickle: AllowPickleOption = False,
    quiet: QuietOption = False,
    as_json: JsonOption = False,
) -> None:
    """Let a variant join a bundle, without the sources of the others.

    It shares pool experts that are there, with residuals where they pay, and brings its own where nothing
    fits. What the other variants compute with stays as it is, bit for bit. Without -o the bundle is replaced
    when the new one is complete; a running server keeps the old one until it is started again.

    Example: moemerge add duo.moe scripture=examples/families/mini/scripture --budget +0.5x
    """
    from functools import partial

    from moemerge.checkpoint.variants import open_variants
    from moemerge.cli.inputs import open_statistics, parse_max_ram
    from moemerge.consolidation.joining import add_variant, check_newcomer, parse_addition, require_new
    from moemerge.consolidation.rewriting import open_origin
    from moemerge.consolidation.task import EvidenceOptions
    from moemerge.refs import parse_named_sources, parse_source

    addition = parse_addition(budget) if budget is not None else None
    sources = parse_named_sources([source])
    (name,) = sources
    memory = parse_max_ram(max_ram)
    origin = open_origin(bundle, out, link=link)
    require_new(origin.bundle, name)
    with show_progress(quiet=quiet) as progress:
        variants = open_variants(
            sources,
            parse_source(base) if base else None,
            offline=offline,
            allow_pickle=allow_pickle,
            check=partial(check_newcomer, origin.bundle),
            progress=progress,
        )
        if not quiet:
            print_findings(variants.findings)
        evidence = EvidenceOptions.of([f"{name}={text}"] if text else None, tokens, dtype, calibration)
        with open_statistics(
            variants, evidence, None, beside=origin.target, max_ram=memory, progress=progress, quiet=quiet
        ) as statistics:
            joined = add_variant(
                origin, variants, addition, statistics=statistics, restart=restart, progress=progress
            )
    before = origin.bundle.manifest
    if as_json:
        data = {
            "bundle": str(joined.folder),
            "variants": list(joined.manifest.variants),
            "added": joined.plan.variant,
            "budget": joined.plan.budget,
            "added_bytes": joined.plan.added_bytes,
            "bytes_ratio_before": before.bytes_ratio,
            "bytes_ratio": joined.manifest.bytes_ratio,
            "evidence": joined.plan.evidence,
            "damage": joined.manifest.variants[joined.plan.variant].damage,
            "resumed_layers": joined.resumed_layers,
        }
        print_json("add", data, variants.findings)
        return
    _print_joined(joined, before.bytes_ratio)
    typer.echo(f"Bundle: {out or bundle}")


def _print_joined(joined: "Joined", ratio_before: float) -> None:
    """Headline, and how the newcomer's slots are stored."""
    from collections import Counter

    from moemerge.checkpoint.sizes import format_size
    from moemerge.cli.plan_report import loss_unit
    from moemerge.cli.tables import print_table

    plan, manifest = joined.plan, joined.manifest
    typer.echo(
        f"{plan.variant} adds {format_size(plan.added_bytes)} (budget {plan.budget}): {ratio_before:.3f} -> "
        f"{manifest.bytes_ratio:.3f} x one variant, {len(manifest.variants)} variants"
    )
    rungs: Counter[str] = Counter()
    for choices in plan.layers.values():
        for choice in choices:
            if choice.stored is None:
                rungs[f"own {f'{choice.code.bits}-bit' if choice.code else 'exact'}"] += 1
            else:
                rungs[f"shared + {choice.residual}" if choice.residual else "shared"] += 1
    print_table(f"Slots of {plan.variant} by how they are stored", ["stored", "slots"], sorted(rungs.items()))
    typer.echo(f"Predicted loss, {loss_unit(plan.evidence)}: {plan.predicted_damage:.3g}")
