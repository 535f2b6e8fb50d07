"""Carry out a consolidation: from checkpoints on disk to a bundle, layer by layer, resumable.

Owns files, progress and the journal. Each step writes whole files and is final once journalled.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from moemerge import __version__
from moemerge.bundle.layout import shared_file, variant_file
from moemerge.bundle.manifest import SCHEMA, Manifest
from moemerge.bundle.target import check_target, staging_folder
from moemerge.bundle.writer import copy_tensors, group_equal
from moemerge.checkpoint.checkpoint import Checkpoint
from moemerge.checkpoint.disk import check_disk
from moemerge.checkpoint.fingerprint import file_stamps, fingerprint
from moemerge.checkpoint.headers import StoredTensor
from moemerge.checkpoint.tensors import TensorReader
from moemerge.checkpoint.variants import VariantSet
from moemerge.consolidation.budget import LEAST
from moemerge.consolidation.evidence import LayerRecord
from moemerge.consolidation.finishing import Outcome, finish
from moemerge.consolidation.gate import Gate, check_gate
from moemerge.consolidation.layers import measure_costs, measure_layers
from moemerge.consolidation.measure import limit_memory
from moemerge.consolidation.measured import CURVE, NoiseStatistics, Statistics, dump_curve
from moemerge.consolidation.plan import PLAN, ConsolidationPlan, dump_plan
from moemerge.consolidation.planning import (
    PlanOptions,
    build_measured_plan,
    build_plan,
    check_plan,
)
from moemerge.consolidation.quality import RepairOptions
from moemerge.consolidation.rounds import Lessons, MakePlan, Rounds
from moemerge.consolidation.similarity_files import INDEX, dump_index, similarity_index
from moemerge.consolidation.staging import Staging, open_staging
from moemerge.execution import Executor, Local
from moemerge.progress import Progress, Silent

_REPORTS = "reports"


@dataclass(frozen=True, slots=True, kw_only=True)
class Merged:
    """What a merge produced.

    Attributes:
        folder: The bundle.
        plan: What was carried out.
        manifest: What was written.
        resumed_layers: Layers that an earlier, interrupted run had finished.
    """

    folder: Path
    plan: ConsolidationPlan
    manifest: Manifest
    resumed_layers: int


def merge(
    variants: VariantSet,
    target: Path,
    decide: PlanOptions | ConsolidationPlan,
    *,
    statistics: Statistics | None = None,
    max_ram: int | None = None,
    repair: RepairOptions | None = None,
    restart: bool = False,
    progress: Progress | None = None,
    executor: Executor | None = None,
) -> Merged:
    """Consolidate local checkpoints into a bundle.

    What was measured of the bundle, on passages held out of the statistics, goes into its manifest; where the
    options ask for a share of the gain that is missed, plans are made again.

    Args:
        variants: Opened together.
        target: Bundle to create.
        decide: Options to make a plan from, or a plan to carry out.
        statistics: Calibration of the variants; without it, noise stands for their inputs where costs are
            measured and codes are chosen.
        max_ram: Bytes of memory to stay within, for each unit of work.
        repair: What may be done to variants' own tensors; repair in closed form by default, where there is
            text.
        restart: Discard the work of an interrupted run.
        progress: Told of bytes.
        executor: Does the work on layers; this process by default.

    Raises:
        InvalidRecipe: The target exists, the budget cannot be met, the plan is of other variants, or a share
            of the gain is asked for that cannot be measured.
        QualityGateFailed: A variant keeps less than was asked for.
        IncompatibleInputs: A plan's checkpoints have other weights.
        NotEnoughRoom: Disk or memory.
        DamagedInput: NaN or infinity, or a file that changed while it was read.
        Busy: Another process writes the target.
    """
    report, executor = progress or Silent(), executor or Local(max_ram)
    check_target(target)
    found = statistics or NoiseStatistics(variants)
    gate = Gate()
    if isinstance(decide, PlanOptions):
        decide = decide.for_variants(variants)
        gate = decide.gate
    check_gate(gate, found.gained)
    asked = repair or RepairOptions()
    _check_room(variants, target, decide, max_ram)
    with TensorReader() as reader:
        if isinstance(decide, ConsolidationPlan):
            check_plan(decide, variants, reader)
        task = _task_of(variants, decide, asked, found, reader)
        with open_staging(target, task, restart=restart) as staging:
            make_plan, reports = _planner(
                variants, decide, found, staging, reader, report, max_ram=max_ram, executor=executor
            )
            rounds = Rounds(
                variants=variants,
                statistics=found,
                staging=staging,
                target=target,
                asked=asked,
                is_least=isinstance(decide, PlanOptions) and decide.budget == LEAST,
                max_ram=max_ram,
                report=report,
                executor=executor,
            )
            done = rounds.run(make_plan, gate)
            outcomes = {
                name: Outcome(_predicted(done.plan, name) | dict(quality.damage), tuple(quality.tensors))
                for name, quality in done.qualities.items()
            }
            repaired = {name: quality.tensors for name, quality in done.qualities.items()}
            tensors = _write_non_experts(variants, repaired, staging, reader, report)
            reports[f"{_REPORTS}/{PLAN}"] = dump_plan(done.plan)
            manifest = finish(variants, done.plan, done.errors, staging, tensors, reports, outcomes, target)
    return Merged(folder=target, plan=done.plan, manifest=manifest, resumed_layers=done.resumed_layers)


def _check_room(
    variants: VariantSet, target: Path, decide: PlanOptions | ConsolidationPlan, max_ram: int | None
) -> None:
    """Refuse what could never end, before anything is read."""
    if isinstance(decide, PlanOptions):
        limit_memory(variants, max_ram)
    shares_within = isinstance(decide, PlanOptions) and decide.within
    if not shares_within and not any(staging_folder(target).glob("*")):
        # What every such plan needs at least; the plan's own figure is checked when it is known.
        least = min(variant.expert_bytes for variant in variants.variants.values())
        check_disk(target.parent, least, f"writing {target}")


def _planner(
    variants: VariantSet,
    decide: PlanOptions | ConsolidationPlan,
    statistics: Statistics,
    staging: Staging,
    reader: TensorReader,
    report: Progress,
    *,
    max_ram: int | None,
    executor: Executor,
) -> tuple[MakePlan, dict[str, str]]:
    """What makes the plans, with all measured that they are made from, and reports on that by path."""
    if isinstance(decide, ConsolidationPlan):
        return partial(_always, decide), {}
    layers = measure_layers(
        variants, report, steps=staging, subfolder=_REPORTS, max_ram=max_ram, executor=executor
    )
    reports = {f"{_REPORTS}/{INDEX}": dump_index(similarity_index(layers, variants))}
    if not decide.is_measured:
        return partial(_always, build_plan(variants, layers, decide, reader)), reports
    records = measure_costs(
        layers, variants, statistics, report, steps=staging, subfolder=_REPORTS, executor=executor
    )
    reports[f"{_REPORTS}/{CURVE}"] = dump_curve(variants, records, statistics)
    return partial(_measured, variants, records, decide, statistics, reader), reports


def _task_of(
    variants: VariantSet,
    decide: PlanOptions | ConsolidationPlan,
    asked: RepairOptions,
    statistics: Statistics,
    reader: TensorReader,
) -> str:
    """Identifies the work in the journal: the same inputs and decisions continue, others start anew."""
    prints = [fingerprint(checkpoint, reader) for checkpoint in variants.checkpoints]
    decision = dump_plan(decide) if isinstance(decide, ConsolidationPlan) else repr(decide)
    origins = [checkpoint.repository.origin for checkpoint in variants.checkpoints]
    stamps = [file_stamps(checkpoint) for checkpoint in variants.checkpoints]
    evidence = statistics.identity
    names = list(variants.variants)
    return json.dumps([__version__, SCHEMA, origins, names, prints, stamps, decision, repr(asked), evidence])


def _always(plan: ConsolidationPlan, lessons: Lessons) -> ConsolidationPlan:
    """What does not depend on how a round came out."""
    return plan


def _measured(
    variants: VariantSet,
    records: list[LayerRecord],
    decide: PlanOptions,
    statistics: Statistics,
    reader: TensorReader,
    lessons: Lessons,
) -> ConsolidationPlan:
    return build_measured_plan(
        variants,
        records,
        decide,
        statistics,
        reader,
        correction=lessons.correction,
        emphasis=lessons.emphasis,
    )


def _predicted(plan: ConsolidationPlan, variant: str) -> dict[str, float]:
    damage = plan.predicted_damage.get(variant)
    return {} if damage is None else {"predicted": damage}


def _step(staging: Staging, name: str, write: Callable[[], dict[str, str]]) -> bool:
    """Do a step unless a run before finished it; returns whether that was so."""
    if staging.finished(name) is not None:
        return True
    staging.finish(name, write())
    return False


def _write_non_experts(
    variants: VariantSet,
    repaired: Mapping[str, Mapping[str, StoredTensor]],
    staging: Staging,
    reader: TensorReader,
    report: Progress,
) -> dict[str, dict[str, str]]:
    """Write shared and own tensors; returns the file of every tensor by variant and exported name.

    Args:
        variants: Whose tensors they are.
        repaired: By variant and role, what stands in place of its own.
        staging: Takes a step for each file.
        reader: Open reader.
        report: Told of bytes.
    """
    named = {name: _exported(checkpoint, repaired[name]) for name, checkpoint in variants.variants.items()}
    shared, places = group_equal(named, reader)
    report.start("non-expert tensors", sum(variant.other_bytes for variant in variants.variants.values()))
    for number, tensors in enumerate(shared, start=1):
        file = shared_file(number)
        _step(staging, file, partial(copy_tensors, staging.folder, file, tensors, reader, report.advance))
    files: dict[str, dict[str, str]] = {}
    for name, stored in named.items():
        own = {key: tensor for key, tensor in stored.items() if places[name][key] is None}
        if own:
            file = variant_file(name)
            _step(staging, file, partial(copy_tensors, staging.folder, file, own, reader, report.advance))
        files[name] = {
            key: variant_file(name) if place is None else shared_file(place + 1)
            for key, place in places[name].items()
        }
    return files


def _exported(checkpoint: Checkpoint, repaired: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    names = checkpoint.family.role_names(checkpoint.settings)
    return {names[role]: repaired.get(role, tensor) for role, tensor in checkpoint.tensors.items()}
