"""`moemerge plan`."""

from dataclasses import asdict
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
    hint,
    print_json,
)
from moemerge.cli.executors import LOCAL, AddressOption, ExecutorOption, open_executor
from moemerge.cli.plan_report import print_checkpoints, print_estimates, print_plan
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
from moemerge.errors import InvalidRecipe


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
    dtype: DtypeOption = None,
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

    Prints what fits together, the share of every way of storing, and what disk and memory it will take.
    Without --budget, --fit, --quality or --floor only compatibility is checked, from headers, before any
    download. Costs are measured on text; without any, on noise that goes through the variants' own routers.

    Example: moemerge plan code=examples/families/mini/code sums=examples/families/mini/sums --budget 1x
    """
    from moemerge.cli.inputs import open_sources, open_statistics, parse_max_ram
    from moemerge.consolidation.estimates import estimate
    from moemerge.consolidation.plan import check_plan_target, write_plan
    from moemerge.consolidation.planning import plan_variants
    from moemerge.consolidation.task import EvidenceOptions, Limits, options_of

    limits = Limits(
        budget=budget, fit=fit, fit_batch=fit_batch, fit_tokens=fit_tokens, quality=quality, floor=floor
    )
    evidence = EvidenceOptions.of(text, tokens, dtype, calibration)
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
    with open_executor(engine, address, memory) as executor, show_progress(quiet=quiet) as progress:
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
    estimates = estimate(variants, made)
    if out and made:
        write_plan(made, out)
    if as_json:
        told = made.model_dump(by_alias=True, mode="json") if made else {"variants": list(variants.variants)}
        data = {"compatible": True, **told, "estimates": [asdict(each) for each in estimates]}
        print_json("plan", data, variants.findings)
        return
    print_checkpoints(variants)
    if made:
        print_plan(made)
    print_estimates(variants, estimates)
    if made is None:
        typer.echo("Decide with --budget, for example 1x.")
    if out:
        typer.echo(f"Plan: {out}")
    elif made and not quiet:
        hint("Write it with -o plan.json and carry it out with moemerge merge --plan plan.json.")
