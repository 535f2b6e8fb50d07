"""The last steps of a merge: side files, manifest, card and checksums, then the bundle appears."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from moemerge import __version__
from moemerge.bundle.card import write_card
from moemerge.bundle.layout import licence_file, pool_file, side_file
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
from moemerge.bundle.reader import Bundle
from moemerge.bundle.writer import write_bytes, write_checksums
from moemerge.checkpoint.checkpoint import Checkpoint
from moemerge.checkpoint.side_files import find_licence, licence_files, side_files
from moemerge.checkpoint.variants import VariantSet
from moemerge.consolidation.plan import ConsolidationPlan
from moemerge.consolidation.pools import Errors
from moemerge.consolidation.staging import Staging, is_published


@dataclass(frozen=True, slots=True)
class Outcome:
    """What is said of a variant beyond its plan.

    Attributes:
        damage: See `VariantEntry.damage`.
        repaired: Roles of the tensors that are not the source's.
    """

    damage: Mapping[str, float]
    repaired: Sequence[str] = ()


def finish(
    variants: VariantSet,
    plan: ConsolidationPlan,
    errors: dict[int, Errors],
    staging: Staging,
    tensors: dict[str, dict[str, str]],
    reports: dict[str, str],
    outcomes: Mapping[str, Outcome],
    target: Path,
) -> Manifest:
    """Write everything small, then publish."""
    digests = {name: digest for name, digest in staging.files().items() if is_published(name)}
    for name, text in reports.items():
        digests |= write_bytes(staging.folder, name, text.encode())
    entries = {}
    for name, checkpoint in variants.variants.items():
        files, written = write_side_files(name, checkpoint, staging.folder, digests)
        digests |= written
        entry = _variant_entry(name, checkpoint, plan, errors)
        entries[name] = entry.model_copy(
            update={
                "licence": find_licence(checkpoint.repository),
                "tensors": tensors[name],
                "files": files,
                "damage": dict(outcomes[name].damage) or None,
                "repaired": _exported_names(checkpoint, outcomes[name].repaired),
            }
        )
    manifest = _manifest(variants, plan, entries)
    digests |= write_bytes(staging.folder, MANIFEST, dump_manifest(manifest).encode())
    digests |= write_bytes(staging.folder, CARD, write_card(manifest).encode())
    write_checksums(staging.folder, digests)
    staging.publish(target, {*digests, CHECKSUMS})
    return manifest


def write_side_files(
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


def draft_bundle(
    variants: VariantSet, plan: ConsolidationPlan, errors: dict[int, Errors], folder: Path
) -> Bundle:
    """Pools and residuals as they stand in a staging folder, to be read before the manifest is written."""
    entries = {
        name: _variant_entry(name, checkpoint, plan, errors) for name, checkpoint in variants.variants.items()
    }
    return Bundle(folder, _manifest(variants, plan, entries), variants.first.family)


def _exported_names(checkpoint: Checkpoint, roles: Iterable[str]) -> list[str]:
    names = checkpoint.family.role_names(checkpoint.settings)
    return sorted(names[role] for role in roles)


def _variant_entry(
    name: str, checkpoint: Checkpoint, plan: ConsolidationPlan, errors: dict[int, Errors]
) -> VariantEntry:
    """What is known of a variant when pools are written."""
    residuals = {layer.index: layer.residuals[name] for layer in plan.layers if name in layer.residuals}
    return VariantEntry(
        source=plan.variants[name].source,
        fingerprint=plan.variants[name].fingerprint,
        settings=checkpoint.settings,
        tensors={},
        files={},
        maps={layer.index: layer.expert_map(name) for layer in plan.layers},
        errors={index: by_variant[name] for index, by_variant in errors.items()},
        residuals={index: codes for index, codes in residuals.items() if any(codes)},
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
