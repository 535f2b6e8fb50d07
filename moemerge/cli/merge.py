"""`moemerge merge`."""

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
from moemerge.cli.plan import (
    BudgetOption,
    CalibrationOption,
    PolicyOption,
    WithinOption,
    print_plan,
)
from moemerge.cli.progress import show_progress


def merge(
    out: Annotated[Path, typer.Option("--out", "-o", metavar="OUT.moe", help="Bundle to create.")],
    sources: Annotated[
        list[str] | None, typer.Argument(metavar="NAME=REF...", help="Variants to consolidate.")
    ] = None,
    budget: BudgetOption = None,
    plan: Annotated[
        Path | None, typer.Option("--plan", metavar="FILE", help="Carry out a plan made before.")
    ] = None,
    recipe: Annotated[
        Path | None, typer.Option("--recipe", metavar="FILE", help="YAML with variants, budget and policy.")
    ] = None,
    policy: PolicyOption = None,
    within: WithinOption = False,
    calibration: CalibrationOption = None,
    base: BaseOption = None,
    max_ram: MaxRamOption = None,
    restart: Annotated[
        bool, typer.Option("--restart", help="Discard what an interrupted run has finished.")
    ] = False,
    offline: OfflineOption = False,
    allow_pickle: AllowPickleOption = False,
    quiet: QuietOption = False,
    as_json: JsonOption = False,
) -> None:
    """Consolidate checkpoints into a bundle.

    Give exactly one of --budget, --plan and --recipe. Streams layer by layer; a run that was stopped
    continues when the same command is given again, and the result is the same to the byte.

    Example: moemerge merge code=examples/families/mini/code sums=examples/families/mini/sums
    -o duo.moe --budget 1x
    """
    from moemerge.bundle.target import check_target
    from moemerge.cli.inputs import open_sources, open_statistics, parse_max_ram
    from moemerge.consolidation.pipeline import merge as merge_variants
    from moemerge.consolidation.planning import MEASURED
    from moemerge.consolidation.recipe import choose_task

    check_target(out)
    if calibration and budget:
        policy = policy or MEASURED
    task = choose_task(
        sources or [], base, budget=budget, policy=policy, within=within, plan=plan, recipe=recipe
    )
    memory = parse_max_ram(max_ram or task.max_ram)
    with show_progress(quiet=quiet) as progress:
        variants = open_sources(
            task.sources, task.base, progress, offline=offline, allow_pickle=allow_pickle, quiet=quiet
        )
        merged = merge_variants(
            variants,
            out,
            task.decision,
            statistics=open_statistics(variants, calibration, policy),
            max_ram=memory,
            restart=restart,
            progress=progress,
        )
    if as_json:
        data = {
            "bundle": str(merged.folder),
            "variants": list(merged.manifest.variants),
            "pool_bytes": merged.manifest.pool_bytes,
            "residual_bytes": merged.manifest.residual_bytes,
            "bytes_ratio": merged.manifest.bytes_ratio,
            "pool_experts": [layer.num_experts for layer in merged.manifest.layers],
            "resumed_layers": merged.resumed_layers,
        }
        print_json("merge", data, variants.findings)
        return
    print_plan(merged.plan)
    resumed = f" ({merged.resumed_layers} layers from the run before)" if merged.resumed_layers else ""
    typer.echo(f"Bundle: {merged.folder}{resumed}")
