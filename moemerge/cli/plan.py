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
from moemerge.cli.executors import LOCAL, AddressOption, ExecutorOption, open_executor
from moemerge.cli.planning_options import (
    BudgetOption,
    CalibrationOption,
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
from moemerge.errors import InvalidRecipe

if TYPE_CHECKING:
    from moemerge.checkpoint.variants import VariantSet
    from moemerge.consolidation.plan import ConsolidationPlan


def plan(
    sources: Annotated[list[str], typer.Argument(metavar="NAME=REF...", help="Variants to consolidate.")],
    budget: BudgetOption = None,
    quality: QualityOption = None,
    floor: FloorOption = None,
    fit: FitOption = None,
    fit_batch: FitBatchOption = None,
    fit_tokens: FitTokensOption = None,
    text: EvidenceTextOption = None,
    tokens: TokensOption = None,
    calibration: CalibrationOption = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", metavar="FILE", help="Plan to write.")] = None,
    policy: PolicyOption = None,
    within: WithinOption = False,
    base: BaseOption = None,
    max_ram: MaxRamOption = None,
    engine: ExecutorOption = LOCAL,
    address: AddressOption = None,
    offline: OfflineOption = False,
    allow_pickle: AllowPickleOption = False,
    quiet: QuietOption = False,
    as_json: JsonOption = False,
) -> None:
    """Decide which experts share and how they are stored, without writing a bundle.

    Without --budget, --fit, --quality or --floor only compatibility is checked, from headers, before any
    download. Costs are measured on text; without any, on noise that goes through the variants' own routers.

    Example: moemerge plan code=examples/families/mini/code sums=examples/families/mini/sums --budget 1x
    """
    from moemerge.cli.inputs import open_sources, open_statistics, parse_max_ram
    from moemerge.consolidation.plan import check_plan_target, write_plan
    from moemerge.consolidation.planning import plan_variants
    from moemerge.consolidation.task import EvidenceOptions, Limits, options_of

    limits = Limits(
        budget=budget, fit=fit, fit_batch=fit_batch, fit_tokens=fit_tokens, quality=quality, floor=floor
    )
    evidence = EvidenceOptions.of(text, tokens, calibration)
    if not limits.is_given and (out or policy or within or evidence.is_given):
        raise InvalidRecipe(
            "--out, --policy, --within, --text and --calibration need a --budget (or --fit, --quality, "
            "--floor) to plan for"
        )
    options = options_of(limits, policy, within=within) if limits.is_given else None
    if options is not None and engine != LOCAL and out is None:
        raise InvalidRecipe(f"--engine {engine} needs --out: work lies beside it, where all nodes see it")
    if out:
        check_plan_target(out)
    beside = out if engine != LOCAL else None
    memory = parse_max_ram(max_ram)
    with open_executor(engine, address) as executor, show_progress(quiet=quiet) as progress:
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
            with open_statistics(
                variants,
                evidence,
                options.policy,
                beside=beside,
                max_ram=memory,
                progress=progress,
                executor=executor,
                quiet=quiet,
            ) as statistics:
                made = plan_variants(
                    variants,
                    options,
                    progress,
                    statistics=statistics,
                    max_ram=memory,
                    executor=executor,
                    beside=beside,
                )
    if made is None:
        _print_sizes(variants, as_json=as_json)
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


def _print_sizes(variants: "VariantSet", *, as_json: bool) -> None:
    """What headers tell of a consolidation: that it can be, and between which sizes it lies."""
    from moemerge.checkpoint.sizes import format_size

    checkpoints = variants.variants.values()
    rest = sum(checkpoint.other_bytes for checkpoint in checkpoints)
    separate = rest + sum(checkpoint.expert_bytes for checkpoint in checkpoints)
    one_pool = rest + max(checkpoint.expert_bytes for checkpoint in checkpoints)
    if as_json:
        sizes = {"separate_bytes": separate, "one_pool_bytes": one_pool}
        data = {"compatible": True, "variants": list(variants.variants), **sizes}
        print_json("plan", data, variants.findings)
        return
    typer.echo(
        f"{len(variants.variants)} variants fit together: {format_size(separate)} apart, "
        f"{format_size(one_pool)} with the experts of one for all. Decide with --budget, for example 1x."
    )


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
    losses = ", ".join(f"{name} {loss:.3g}" for name, loss in plan.predicted_damage.items())
    typer.echo(f"Predicted loss, {loss_unit(plan.evidence)}: {losses}")


def loss_unit(evidence: str) -> str:
    """What predicted losses are in."""
    from moemerge.consolidation.measured import NOISE

    if evidence == NOISE:
        return "as damage summed over layers, on noise, for there is no text"
    return "in nats per token of its text"
