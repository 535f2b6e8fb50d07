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
    str | None, typer.Option("--policy", help="cluster (default), medoid, mean, pick or measured.")
]
CalibrationOption = Annotated[
    str | None,
    typer.Option(
        "--calibration",
        metavar="DIR",
        help="Measure costs on what moemerge calibrate kept (policy measured).",
    ),
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
    calibration: CalibrationOption = None,
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
    from moemerge.cli.inputs import open_sources, open_statistics, parse_max_ram
    from moemerge.consolidation.plan import check_plan_target, write_plan
    from moemerge.consolidation.planning import MEASURED, plan_variants
    from moemerge.consolidation.recipe import options_of

    if budget is None and (out or policy or within or calibration):
        raise InvalidRecipe("--out, --policy, --within and --calibration need a --budget to plan for")
    policy = policy or (MEASURED if calibration else None)
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
        made = None
        if options is not None:
            statistics = open_statistics(variants, calibration, policy)
            made = plan_variants(variants, options, progress, statistics=statistics, max_ram=memory)
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
        f"{format_size(plan.stored_bytes)} ({plan.bytes_ratio:.3f} x one variant; budget {plan.budget}, "
        f"policy {plan.policy})"
    )
    if plan.predicted_damage:
        _print_rungs(plan)
        return
    rows = []
    for name in plan.variants:
        errors = [error for layer in plan.layers for error in layer.errors[name]]
        exact = sum(error == 0 for error in errors)
        rows.append([name, f"{exact} of {slots}", statistics.fmean(errors), max(errors)])
    columns = ["variant", "exact slots", "mean distance", "worst distance"]
    print_table("Distance to the pool expert, over the expert's norm", columns, rows)


def _print_rungs(plan: "ConsolidationPlan") -> None:
    """How many experts of each variant stand on which rung, and what the plan expects to lose."""
    from collections import Counter

    from moemerge.cli.tables import print_table
    from moemerge.consolidation.measured import NOISE

    rungs: dict[str, Counter[str]] = {name: Counter() for name in plan.variants}
    for layer in plan.layers:
        for expert in layer.pool:
            for name, slot in expert.members:
                residual = layer.residual((name, slot))
                own = "own" if len(expert.members) == 1 else "shared"
                code = f"{expert.code.bits}-bit" if expert.code else "exact" if own == "own" else "plain"
                added = f" + {residual}" if residual else ""
                rungs[name][f"{own} {code}{added}"] += 1
    names = sorted({rung for counts in rungs.values() for rung in counts})
    rows = [[rung, *(counts[rung] for counts in rungs.values())] for rung in names]
    print_table("Slots of each variant by how they are stored", ["stored", *rungs], rows)
    told = "on noise, without text" if plan.evidence == NOISE else "on calibration text"
    losses = ", ".join(f"{name} {loss:.3g}" for name, loss in plan.predicted_damage.items())
    typer.echo(f"Predicted damage, summed over layers, {told}: {losses}")
