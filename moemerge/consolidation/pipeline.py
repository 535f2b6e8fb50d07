"""Carry out a consolidation: from checkpoints on disk to a bundle, layer by layer, resumable.

Owns files, progress and the journal. Each step writes whole files and is final once journalled.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from moemerge import __version__
from moemerge.bundle.layout import shared_file, variant_file
from moemerge.bundle.manifest import SCHEMA, Manifest
from moemerge.bundle.target import check_target, staging_folder
from moemerge.bundle.writer import copy_tensors, group_equal, write_bytes
from moemerge.checkpoint.checkpoint import Checkpoint
from moemerge.checkpoint.disk import check_disk
from moemerge.checkpoint.fingerprint import fingerprint
from moemerge.checkpoint.headers import StoredTensor
from moemerge.checkpoint.tensors import TensorReader
from moemerge.checkpoint.variants import VariantSet
from moemerge.consolidation.evidence import Evidence, LayerRecord
from moemerge.consolidation.finishing import finish
from moemerge.consolidation.measure import limit_memory
from moemerge.consolidation.measured import NoiseStatistics, Statistics
from moemerge.consolidation.plan import ConsolidationPlan, dump_plan, read_plan
from moemerge.consolidation.planning import (
    PlanOptions,
    build_measured_plan,
    build_plan,
    check_plan,
    measure_costs,
    measure_layers,
)
from moemerge.consolidation.pools import Errors, write_layer
from moemerge.consolidation.similarity_files import (
    INDEX,
    dump_index,
    load_layer_similarity,
    similarity_index,
    write_layer_similarity,
)
from moemerge.consolidation.staging import Staging, open_staging
from moemerge.progress import Progress, Silent
from moemerge.similarity.matrices import LayerSimilarity


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
    restart: bool = False,
    progress: Progress | None = None,
) -> Merged:
    """Consolidate local checkpoints into a bundle.

    Args:
        variants: Opened together.
        target: Bundle to create.
        decide: Options to make a plan from, or a plan to carry out.
        statistics: Calibration of the variants; without it, noise stands for their inputs where costs are
            measured and codes are chosen.
        max_ram: Bytes of memory to stay within.
        restart: Discard the work of an interrupted run.
        progress: Told of bytes.

    Raises:
        InvalidRecipe: The target exists, the budget cannot be met, the plan is of other variants.
        IncompatibleInputs: A plan's checkpoints have other weights.
        NotEnoughRoom: Disk or memory.
        DamagedInput: NaN or infinity, or a file that changed while it was read.
        Busy: Another process writes the target.
    """
    report = progress or Silent()
    check_target(target)
    if isinstance(decide, PlanOptions):
        limit_memory(variants, max_ram)
    if not (isinstance(decide, PlanOptions) and decide.within) and not any(staging_folder(target).glob("*")):
        # What every such plan needs at least; the plan's own figure is checked when it is known.
        check_disk(
            target.parent, min(v.expert_bytes for v in variants.variants.values()), f"writing {target}"
        )
    with TensorReader() as reader:
        if isinstance(decide, ConsolidationPlan):
            check_plan(decide, variants, reader)
        reports: dict[str, str] = {}
        found = statistics or NoiseStatistics(variants)
        evidence = Evidence(variants=variants, statistics=found, reader=reader)
        task = _task_of(variants, decide, found, reader)
        with open_staging(target, task, restart=restart) as staging:
            if isinstance(decide, ConsolidationPlan):
                plan = decide
            else:
                layers, reports = _measure(variants, staging, report, max_ram)
                if decide.is_measured:
                    records = _measure_costs(layers, evidence, staging, report)
                    plan = build_measured_plan(variants, records, decide, found, reader)
                else:
                    plan = build_plan(variants, layers, decide, reader)
            if staging.finished("plan") is not None:
                # What is already written follows this plan, whatever another library version would decide.
                plan = read_plan(staging.folder / "plan.json")
            missing = _bytes_to_write(variants, plan) - staging.finished_bytes()
            check_disk(target.parent, missing, f"writing {target}")
            _step(
                staging, "plan", partial(write_bytes, staging.folder, "plan.json", dump_plan(plan).encode())
            )
            errors, resumed = _write_pools(plan, evidence, staging, report)
            tensors = _write_non_experts(variants, staging, reader, report)
            manifest = finish(variants, plan, errors, staging, tensors, reports, target)
    return Merged(folder=target, plan=plan, manifest=manifest, resumed_layers=resumed)


def _task_of(
    variants: VariantSet,
    decide: PlanOptions | ConsolidationPlan,
    statistics: Statistics,
    reader: TensorReader,
) -> str:
    """Identifies the work in the journal: the same inputs and decisions continue, others start anew."""
    checkpoints = [*variants.variants.values(), *([variants.base] if variants.base else [])]
    prints = [fingerprint(checkpoint, reader) for checkpoint in checkpoints]
    decision = dump_plan(decide) if isinstance(decide, ConsolidationPlan) else repr(decide)
    origins = [checkpoint.repository.origin for checkpoint in checkpoints]
    stamps = [_file_stamps(checkpoint) for checkpoint in checkpoints]
    evidence = statistics.identity
    names = list(variants.variants)
    return json.dumps([__version__, SCHEMA, origins, names, prints, stamps, decision, evidence])


def _file_stamps(checkpoint: Checkpoint) -> list[tuple[str, int, int]]:
    """Name, size and time of change of its files: fingerprints are samples and may miss a change."""
    experts = [part for parts in checkpoint.experts.values() for part in parts.values()]
    paths = {tensor.path for tensor in [*checkpoint.tensors.values(), *experts]}
    return [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in sorted(paths)]


def _measure(
    variants: VariantSet, staging: Staging, report: Progress, max_ram: int | None
) -> tuple[list[LayerSimilarity], dict[str, str]]:
    """Similarity of all layers, each kept in the bundle's reports as soon as it is measured."""
    names = tuple(variants.variants)
    known = {}
    for layer in variants.first.routed_layers:
        if staging.finished(_similarity_step(layer.index)) is not None:
            known[layer.index] = load_layer_similarity(staging.folder / "reports", layer.index, names)

    def keep(layer: LayerSimilarity) -> None:
        files = write_layer_similarity(staging.folder, "reports", layer)
        staging.finish(_similarity_step(layer.layer), files)

    layers = measure_layers(variants, report, known=known, keep=keep, max_ram=max_ram)
    return layers, {f"reports/{INDEX}": dump_index(similarity_index(layers, variants))}


def _measure_costs(
    layers: list[LayerSimilarity], evidence: Evidence, staging: Staging, report: Progress
) -> list[LayerRecord]:
    """Costs of all layers, each kept in the bundle's reports as soon as it is measured."""

    def place(layer_index: int) -> str:
        return f"reports/costs-layer-{layer_index:05d}.json"

    def keep(record: LayerRecord) -> None:
        text = record.model_dump_json(indent=1) + "\n"
        staging.finish(
            f"costs {record.index}", write_bytes(staging.folder, place(record.index), text.encode())
        )

    known = {
        layer.layer: LayerRecord.model_validate_json((staging.folder / place(layer.layer)).read_bytes())
        for layer in layers
        if staging.finished(f"costs {layer.layer}") is not None
    }
    return measure_costs(layers, evidence, report, known=known, keep=keep)


def _similarity_step(layer_index: int) -> str:
    return f"similarity {layer_index}"


def _bytes_to_write(variants: VariantSet, plan: ConsolidationPlan) -> int:
    return plan.stored_bytes + sum(variant.other_bytes for variant in variants.variants.values())


def _step(staging: Staging, name: str, write: Callable[[], dict[str, str]]) -> bool:
    """Do a step unless a run before finished it; returns whether that was so."""
    if staging.finished(name) is not None:
        return True
    staging.finish(name, write())
    return False


def _write_pools(
    plan: ConsolidationPlan, evidence: Evidence, staging: Staging, report: Progress
) -> tuple[dict[int, Errors], int]:
    """Write every layer; returns errors by layer index, and how many layers were there."""
    report.start("pool", plan.stored_bytes)
    errors: dict[int, Errors] = {}
    resumed = 0
    for layer in plan.layers:
        step = f"pool {layer.index}"
        done = staging.finished(step)
        if done is None:
            written = write_layer(staging.folder, evidence, layer, report.advance)
            staging.finish(step, written.files, {"errors": written.errors})
            errors[layer.index] = written.errors
        else:
            resumed += 1
            errors[layer.index] = done["errors"]
            report.advance(plan.stored_bytes // len(plan.layers))
    return errors, resumed


def _write_non_experts(
    variants: VariantSet, staging: Staging, reader: TensorReader, report: Progress
) -> dict[str, dict[str, str]]:
    """Write shared and own tensors; returns the file of every tensor by variant and exported name."""
    named = {name: _exported(checkpoint) for name, checkpoint in variants.variants.items()}
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


def _exported(checkpoint: Checkpoint) -> dict[str, StoredTensor]:
    names = checkpoint.family.role_names(checkpoint.settings)
    return {names[role]: tensor for role, tensor in checkpoint.tensors.items()}
