"""`moemerge merge`."""

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
    print_json,
)
from moemerge.cli.executors import LOCAL, AddressOption, ExecutorOption, open_executor
from moemerge.cli.plan_report import print_plan
from moemerge.cli.planning_options import (
    BudgetOption,
    CalibrationOption,
    DtypeOption,
    EvidenceTextOption,
    FitBatchOption,
    FitOption,
    FitTokensOption,
    FloorOption,
    PolicyOption,
    QualityOption,
    TokensOption,
    WithinOption,
)
from moemerge.cli.progress import show_progress

if TYPE_CHECKING:
    from moemerge.bundle.manifest import Manifest


def merge(
    out: Annotated[Path, typer.Option("--out", "-o", metavar="OUT.moe", help="Bundle to create.")],
    sources: Annotated[
        list[str] | None, typer.Argument(metavar="NAME=REF...", help="Variants to consolidate.")
    ] = None,
    budget: BudgetOption = None,
    quality: QualityOption = None,
    floor: FloorOption = None,
    fit: FitOption = None,
    fit_batch: FitBatchOption = None,
    fit_tokens: FitTokensOption = None,
    text: EvidenceTextOption = None,
    tokens: TokensOption = None,
    dtype: DtypeOption = None,
    calibration: CalibrationOption = None,
    plan: Annotated[
        Path | None, typer.Option("--plan", metavar="FILE", help="Carry out a plan made before.")
    ] = None,
    recipe: Annotated[
        Path | None,
        typer.Option("--recipe", metavar="FILE", help="YAML with all of this (moemerge init)."),
    ] = None,
    policy: PolicyOption = None,
    within: WithinOption = False,
    repair: Annotated[
        bool | None,
        typer.Option(
            "--repair/--no-repair",
            help="Fit routers, norms and output projections to what is stored (where there is text).",
            show_default=False,
        ),
    ] = None,
    heal: Annotated[
        int | None,
        typer.Option(
            "--heal",
            metavar="N",
            min=0,
            help="Steps of distillation of the same tensors on text (0).",
        ),
    ] = None,
    base: BaseOption = None,
    max_ram: MaxRamOption = None,
    engine: ExecutorOption = LOCAL,
    address: AddressOption = None,
    restart: RestartOption = False,
    offline: OfflineOption = False,
    allow_pickle: AllowPickleOption = False,
    quiet: QuietOption = False,
    as_json: JsonOption = False,
) -> None:
    """Consolidate checkpoints into a bundle.

    Give --budget (or --fit, --quality, --floor), --plan or --recipe. Costs are measured on text; without
    any, on noise. With text, what the bundle loses is measured on a part held out, and a --floor or --quality
    that is missed ends with exit code 9. A run that was stopped continues when the same command is given
    again, and the result is the same to the byte.

    Example: moemerge merge code=examples/families/mini/code sums=examples/families/mini/sums
    -o duo.moe --budget 1x
    """
    from moemerge.bundle.target import check_target
    from moemerge.cli.inputs import open_sources, open_statistics, parse_max_ram
    from moemerge.consolidation.pipeline import merge as merge_variants
    from moemerge.consolidation.planning import PlanOptions
    from moemerge.consolidation.quality import RepairOptions
    from moemerge.consolidation.recipe import choose_task
    from moemerge.consolidation.task import EvidenceOptions, Limits

    check_target(out)
    asked = None
    if repair is not None or heal is not None:
        asked = RepairOptions(repair=True if repair is None else repair, heal=heal or 0)
    task = choose_task(
        sources or [],
        base,
        limits=Limits(
            budget=budget, fit=fit, fit_batch=fit_batch, fit_tokens=fit_tokens, quality=quality, floor=floor
        ),
        policy=policy,
        within=within,
        evidence=EvidenceOptions.of(text, tokens, dtype, calibration),
        repair=asked,
        plan=plan,
        recipe=recipe,
    )
    memory = parse_max_ram(max_ram or task.max_ram)
    with open_executor(engine, address, memory) as executor, show_progress(quiet=quiet) as progress:
        variants = open_sources(
            task.sources, task.base, progress, offline=offline, allow_pickle=allow_pickle, quiet=quiet
        )
        with open_statistics(
            variants,
            task.evidence,
            task.decision.policy if isinstance(task.decision, PlanOptions) else None,
            beside=out,
            max_ram=memory,
            progress=progress,
            executor=executor,
            quiet=quiet,
        ) as statistics:
            merged = merge_variants(
                variants,
                out,
                task.decision,
                statistics=statistics,
                repair=task.repair,
                max_ram=memory,
                restart=restart,
                progress=progress,
                executor=executor,
            )
    if as_json:
        data = {
            "bundle": str(merged.folder),
            "variants": list(merged.manifest.variants),
            "pool_bytes": merged.manifest.pool_bytes,
            "residual_bytes": merged.manifest.residual_bytes,
            "bytes_ratio": merged.manifest.bytes_ratio,
            "damage": {name: entry.damage or {} for name, entry in merged.manifest.variants.items()},
            "pool_experts": [layer.num_experts for layer in merged.manifest.layers],
            "resumed_layers": merged.resumed_layers,
        }
        print_json("merge", data, variants.findings)
        return
    print_plan(merged.plan)
    print_damage(merged.manifest)
    resumed = f" ({merged.resumed_layers} layers from the run before)" if merged.resumed_layers else ""
    typer.echo(f"Bundle: {merged.folder}{resumed}")


def print_damage(manifest: "Manifest") -> None:
    """What was measured of each variant, where there was text to measure on."""
    from moemerge.cli.tables import print_table

    damage = {name: entry.damage or {} for name, entry in manifest.variants.items()}
    measured = {name: found for name, found in damage.items() if "measured" in found}
    if not measured:
        return
    columns = {"predicted": "predicted", "unrepaired": "without repair", "measured": "measured", "kl": "KL"}
    columns["gain_recovered"] = "gain kept"
    shown = [key for key in columns if any(key in found for found in measured.values())]
    rows = [[name, *(found.get(key) for key in shown)] for name, found in measured.items()]
    print_table(
        "Loss in nats per token, on text held out", ["variant", *(columns[key] for key in shown)], rows
    )
