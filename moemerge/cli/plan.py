"""`moemerge plan`."""

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
    hint,
    print_json,
)
from moemerge.cli.progress import show_progress
from moemerge.errors import InvalidRecipe

if TYPE_CHECKING:
    from moemerge.consolidation.plan import ConsolidationPlan

BudgetOption = Annotated[
    str | None,
    typer.Option(
        "--budget",
        metavar="B",
        help="exact, a multiple of one variant's expert bytes (1x, 1.5x), or a size (40GiB).",
    ),
]
PolicyOption = Annotated[
    str | None, typer.Option("--policy", help="cluster (default), medoid, mean or pick.")
]
WithinOption = Annotated[
    bool, typer.Option("--within", help="Let experts of one variant share, too (policy cluster).")
]


def plan(
    sources: Annotated[list[str], typer.Argument(metavar="NAME=REF...", help="Variants to consolidate.")],
    budget: BudgetOption = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", metavar="FILE", help="Plan to write.")] = None,
    policy: PolicyOption = None,
    within: WithinOption = False,
    base: BaseOption = None,
    max_ram: MaxRamOption = None,
    offline: OfflineOption = False,
    allow_pickle: AllowPickleOption = False,
    quiet: QuietOption = False,
    as_json: JsonOption = False,
) -> None:
    """Decide which experts share, without writing a bundle.

    Without --budget only compatibility is checked, from headers, before any download.

    Example: moemerge plan code=examples/families/mini/code sums=examples/families/mini/sums --budget 1x
    """
    from moemerge.cli.inputs import open_sources, parse_max_ram
    from moemerge.consolidation.plan import check_plan_target, write_plan
    from moemerge.consolidation.planning import plan_variants
    from moemerge.consolidation.recipe import options_of

    if budget is None and (out or policy or within):
        raise InvalidRecipe("--out, --policy and --within need a --budget to plan for")
    options = options_of(budget, policy, within=within) if budget is not None else None
    if out:
        check_plan_target(out)
    memory = parse_max_ram(max_ram)
    with show_progress(quiet=quiet) as progress:
        variants = open_sources(
            sources,
            base,
            progress,
            offline=offline,
            allow_pickle=allow_pickle,
            download=options is not None,
            quiet=quiet,
        )
        made = plan_variants(variants, options, progress, max_ram=memory) if options else None
    if made is None:
        if as_json:
            print_json("plan", {"compatible": True, "variants": list(variants.variants)}, variants.findings)
        else:
            typer.echo(
                f"{len(variants.variants)} variants fit together. Decide with --budget, for example 1x."
            )
        return
    if out:
        write_plan(made, out)
    if as_json:
        print_json("plan", made.model_dump(by_alias=True, mode="json"), variants.findings)
        return
    print_plan(made)
    if out:
        typer.echo(f"Plan: {out}")
    elif not quiet:
        hint("Write it with -o plan.json and carry it out with moemerge merge --plan plan.json.")


def print_plan(plan: "ConsolidationPlan") -> None:
    """Headline and a line per variant."""
    import statistics

    from moemerge.checkpoint.sizes import format_size
    from moemerge.cli.tables import print_table

    slots = len(plan.layers) * plan.num_slots
    experts = sum(len(layer.pool) for layer in plan.layers)
    typer.echo(
        f"{slots * len(plan.variants)} experts of {len(plan.variants)} variants -> {experts} pool experts, "
        f"{format_size(plan.pool_bytes)} ({plan.bytes_ratio:.3f} x one variant; budget {plan.budget}, "
        f"policy {plan.policy})"
    )
    rows = []
    for name in plan.variants:
        errors = [error for layer in plan.layers for error in layer.errors[name]]
        exact = sum(error == 0 for error in errors)
        rows.append([name, f"{exact} of {slots}", statistics.fmean(errors), max(errors)])
    columns = ["variant", "exact slots", "mean distance", "worst distance"]
    print_table("Distance to the pool expert, over the expert's norm", columns, rows)
