"""Carry out a consolidation: from checkpoints on disk to a bundle, layer by layer, resumable.

Owns files, progress and the journal. Each step writes whole files and is final once journalled.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from moemerge import __version__
from moemerge.bundle.card import write_card
from moemerge.bundle.layout import licence_file, pool_file, shared_file, side_file, variant_file
from moemerge.bundle.manifest import (
    CARD,
    CHECKSUMS,
    MANIFEST,
    QUANTISED_POOL,
    RESIDUALS,
    SCHEMA,
    Features,
    Manifest,
    PoolLayer,
    Provenance,
    VariantEntry,
    dump_manifest,
)
from moemerge.bundle.target import check_target, staging_folder
from moemerge.bundle.writer import copy_tensors, group_equal, write_bytes, write_checksums
from moemerge.checkpoint.checkpoint import Checkpoint
from moemerge.checkpoint.disk import check_disk
from moemerge.checkpoint.fingerprint import fingerprint
from moemerge.checkpoint.headers import StoredTensor
from moemerge.checkpoint.side_files import find_licence, licence_files, side_files
from moemerge.checkpoint.tensors import TensorReader
from moemerge.checkpoint.variants import VariantSet
from moemerge.consolidation.evidence import Evidence, LayerRecord
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
            manifest = _finish(variants, plan, errors, staging, tensors, reports, target)
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


def _finish(
    variants: VariantSet,
    plan: ConsolidationPlan,
    errors: dict[int, Errors],
    staging: Staging,
    tensors: dict[str, dict[str, str]],
    reports: dict[str, str],
    target: Path,
) -> Manifest:
    """Write everything small, then publish."""
    digests = staging.files()
    digests.pop("plan.json")
    for name, text in reports.items():
        digests |= write_bytes(staging.folder, name, text.encode())
    entries = {}
    for name, checkpoint in variants.variants.items():
        files, written = _write_side_files(name, checkpoint, staging.folder, digests)
        digests |= written
        own_errors = {index: by_variant[name] for index, by_variant in errors.items()}
        entries[name] = _variant_entry(name, checkpoint, plan, own_errors, tensors[name], files)
    manifest = _manifest(variants, plan, entries)
    digests |= write_bytes(staging.folder, MANIFEST, dump_manifest(manifest).encode())
    digests |= write_bytes(staging.folder, CARD, write_card(manifest).encode())
    write_checksums(staging.folder, digests)
    staging.publish(target, {*digests, CHECKSUMS})
    return manifest


def _write_side_files(
    name: str, checkpoint: Checkpoint, folder: Path, digests: dict[str, str]
) -> tuple[dict[str, str], dict[str, str]]:
    """Copy side files; returns bundle path by original name, and digests of what was written.

    A file that an earlier variant has with the same bytes is not written again.
    """
    known = {digest: path for path, digest in digests.items() if path.startswith("variants/")}
    files, written = {}, {}
    for original in side_files(checkpoint.repository):
        content = checkpoint.repository.read_bytes(original)
        place = side_file(name, original)
        digest = next(iter(write_bytes(folder, place, content).values()))
        if digest in known:
            (folder / place).unlink()
            place = known[digest]
        else:
            written[place] = digest
        files[original] = place
    for original in licence_files(checkpoint.repository):
        content = checkpoint.repository.read_bytes(original)
        files[original] = licence_file(name, original)
        written |= write_bytes(folder, files[original], content)
    return files, written


def _variant_entry(
    name: str,
    checkpoint: Checkpoint,
    plan: ConsolidationPlan,
    errors: dict[int, list[float]],
    tensors: dict[str, str],
    files: dict[str, str],
) -> VariantEntry:
    residuals = {layer.index: layer.residuals[name] for layer in plan.layers if name in layer.residuals}
    predicted = plan.predicted_damage.get(name)
    return VariantEntry(
        source=plan.variants[name].source,
        fingerprint=plan.variants[name].fingerprint,
        licence=find_licence(checkpoint.repository),
        settings=checkpoint.settings,
        tensors=tensors,
        files=files,
        maps={layer.index: layer.expert_map(name) for layer in plan.layers},
        errors=errors,
        residuals={index: codes for index, codes in residuals.items() if any(codes)},
        damage=None if predicted is None else {"predicted": predicted},
    )


def _manifest(variants: VariantSet, plan: ConsolidationPlan, entries: dict[str, VariantEntry]) -> Manifest:
    first = variants.first
    return Manifest(
        schema=SCHEMA,
        features=_features(plan),
        family=plan.family,
        num_slots=plan.num_slots,
        parts={
            part: list(first.family.part_shape(part, first.settings)) for part in first.family.experts.parts
        },
        variant_bytes=plan.variant_bytes,
        pool_bytes=plan.pool_bytes,
        residual_bytes=plan.residual_bytes,
        layers=[
            PoolLayer(
                index=place.index,
                stack=place.stack,
                block=place.block,
                file=pool_file(place.index),
                num_experts=len(layer.pool),
                codes=[e.code for e in layer.pool] if any(e.code for e in layer.pool) else [],
                dtype=_dtype_of(first, layer.index) if layer.has_codes else None,
            )
            for place, layer in zip(first.routed_layers, plan.layers, strict=True)
        ],
        variants=entries,
        provenance=Provenance(
            policy=plan.policy,
            budget=plan.budget,
            within=plan.within,
            base=plan.base.source if plan.base else None,
            moemerge=__version__,
        ),
    )


def _features(plan: ConsolidationPlan) -> Features:
    required = [QUANTISED_POOL] if any(e.code for layer in plan.layers for e in layer.pool) else []
    return Features(required=[*required, *([RESIDUALS] if plan.residual_bytes else [])])


def _dtype_of(checkpoint: Checkpoint, layer_index: int) -> str:
    return next(iter(checkpoint.experts[layer_index, 0].values())).dtype
