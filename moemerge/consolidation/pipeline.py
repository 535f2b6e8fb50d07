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
    SCHEMA,
    Features,
    Manifest,
    PoolLayer,
    Provenance,
    VariantEntry,
    dump_manifest,
)
from moemerge.bundle.target import check_target, staging_folder
from moemerge.bundle.writer import copy_tensors, group_equal, write_bytes, write_checksums, write_pool
from moemerge.checkpoint.checkpoint import Checkpoint
from moemerge.checkpoint.disk import check_disk
from moemerge.checkpoint.fingerprint import fingerprint
from moemerge.checkpoint.headers import StoredTensor
from moemerge.checkpoint.side_files import find_licence, licence_files, side_files
from moemerge.checkpoint.tensors import TensorReader
from moemerge.checkpoint.variants import VariantSet
from moemerge.consolidation.measure import limit_memory
from moemerge.consolidation.operators import OPERATORS
from moemerge.consolidation.plan import ConsolidationPlan, dump_plan, read_plan
from moemerge.consolidation.planning import PlanOptions, build_plan, check_plan, measure_layers
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
    max_ram: int | None = None,
    restart: bool = False,
    progress: Progress | None = None,
) -> Merged:
    """Consolidate local checkpoints into a bundle.

    Args:
        variants: Opened together.
        target: Bundle to create.
        decide: Options to make a plan from, or a plan to carry out.
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
        with open_staging(target, _task_of(variants, decide, reader), restart=restart) as staging:
            if isinstance(decide, ConsolidationPlan):
                plan = decide
            else:
                layers, reports = _measure(variants, staging, report, max_ram)
                plan = build_plan(variants, layers, decide, reader)
            if staging.finished("plan") is not None:
                # What is already written follows this plan, whatever another library version would decide.
                plan = read_plan(staging.folder / "plan.json")
            missing = _bytes_to_write(variants, plan) - staging.finished_bytes()
            check_disk(target.parent, missing, f"writing {target}")
            _step(
                staging, "plan", partial(write_bytes, staging.folder, "plan.json", dump_plan(plan).encode())
            )
            resumed = _write_pools(variants, plan, staging, reader, report)
            tensors = _write_non_experts(variants, staging, reader, report)
            manifest = _finish(variants, plan, staging, tensors, reports, target)
    return Merged(folder=target, plan=plan, manifest=manifest, resumed_layers=resumed)


def _task_of(variants: VariantSet, decide: PlanOptions | ConsolidationPlan, reader: TensorReader) -> str:
    """Identifies the work in the journal: the same inputs and decisions continue, others start anew."""
    checkpoints = [*variants.variants.values(), *([variants.base] if variants.base else [])]
    prints = [fingerprint(checkpoint, reader) for checkpoint in checkpoints]
    decision = dump_plan(decide) if isinstance(decide, ConsolidationPlan) else repr(decide)
    origins = [checkpoint.repository.origin for checkpoint in checkpoints]
    stamps = [_file_stamps(checkpoint) for checkpoint in checkpoints]
    return json.dumps([__version__, SCHEMA, origins, list(variants.variants), prints, stamps, decision])


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


def _similarity_step(layer_index: int) -> str:
    return f"similarity {layer_index}"


def _bytes_to_write(variants: VariantSet, plan: ConsolidationPlan) -> int:
    return plan.pool_bytes + sum(variant.other_bytes for variant in variants.variants.values())


def _step(staging: Staging, name: str, write: Callable[[], dict[str, str]]) -> bool:
    """Do a step unless a run before finished it; returns whether that was so."""
    if staging.finished(name) is not None:
        return True
    staging.finish(name, write())
    return False


def _write_pools(
    variants: VariantSet, plan: ConsolidationPlan, staging: Staging, reader: TensorReader, report: Progress
) -> int:
    report.start("pool", plan.pool_bytes)
    resumed = 0
    for layer in plan.layers:
        experts = []
        for planned in layer.pool:
            sources = [variants.variants[name].experts[layer.index, slot] for name, slot in planned.sources]
            experts.append(
                {
                    part: OPERATORS[planned.operator](part, [source[part] for source in sources], reader)
                    for part in sources[0]
                }
            )
        write = partial(write_pool, staging.folder, layer.index, experts, report.advance)
        if _step(staging, f"pool {layer.index}", write):
            resumed += 1
            report.advance(sum(tensor.nbytes for parts in experts for tensor in parts.values()))
    return resumed


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
        entries[name] = _variant_entry(name, checkpoint, plan, tensors[name], files)
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
    name: str, checkpoint: Checkpoint, plan: ConsolidationPlan, tensors: dict[str, str], files: dict[str, str]
) -> VariantEntry:
    return VariantEntry(
        source=plan.variants[name].source,
        fingerprint=plan.variants[name].fingerprint,
        licence=find_licence(checkpoint.repository),
        settings=checkpoint.settings,
        tensors=tensors,
        files=files,
        maps={layer.index: layer.expert_map(name) for layer in plan.layers},
        errors={layer.index: layer.errors[name] for layer in plan.layers},
    )


def _manifest(variants: VariantSet, plan: ConsolidationPlan, entries: dict[str, VariantEntry]) -> Manifest:
    first = variants.first
    return Manifest(
        schema=SCHEMA,
        features=Features(),
        family=plan.family,
        num_slots=plan.num_slots,
        parts={
            part: list(first.family.part_shape(part, first.settings)) for part in first.family.experts.parts
        },
        variant_bytes=plan.variant_bytes,
        pool_bytes=plan.pool_bytes,
        layers=[
            PoolLayer(
                index=place.index,
                stack=place.stack,
                block=place.block,
                file=pool_file(place.index),
                num_experts=len(layer.pool),
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
