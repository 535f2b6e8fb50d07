"""From a folder or file to a `Report`: similarity, plan or bundle, and what lies beside."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from moemerge.bundle.manifest import MANIFEST, Manifest, read_manifest
from moemerge.errors import MoemergeError, NotFound, UnsupportedCheckpoint
from moemerge.report.contents import Report, Similarity
from moemerge.report.files import Plan, printable, read_json
from moemerge.report.measured import (
    CURVE,
    SIMILARITY,
    open_similarity,
    read_calibration,
    read_costs,
    read_curve,
    routing_of,
    sharing_of,
)
from moemerge.report.stored import storage_of_bundle, storage_of_plan

PLAN = "plan.json"
UNITS = {
    "weights": "distance between weights",
    "noise": "damage on noise, summed over layers",
}
"""What predicted losses are in, by evidence."""
TEXT_UNIT = "nats per token of the variants' texts"
Value = TypeVar("Value")


def open_report(path: Path, calibration: Path | None = None) -> Report:
    """What there is to show of a similarity folder, a plan or a bundle.

    Args:
        path: One of the three.
        calibration: Folder of `moemerge calibrate`; adds likelihoods, and routing where the rest has none.

    Raises:
        NotFound: Nothing there.
        UnsupportedCheckpoint: Something else, or of another version.
        DamagedInput, DamagedBundle: It contradicts itself or cannot be read.
        IncompatibleInputs: The calibration is of something else.
    """
    report = _open(path)
    if calibration is None:
        return report
    calibrated, routing = read_calibration(calibration, report.variants, report.num_slots)
    return replace(report, calibrated=calibrated, routing=report.routing or routing)


def _open(path: Path) -> Report:
    if not path.exists():
        raise NotFound(f"{path}: no such bundle, similarity folder or plan")
    if path.is_file():
        return _open_plan(path)
    if (path / MANIFEST).is_file():
        return _open_bundle(path)
    if (path / SIMILARITY).is_file():
        return _open_similarity(path)
    raise UnsupportedCheckpoint(
        f"{path}: found neither {MANIFEST} nor {SIMILARITY}, expected a bundle of moemerge merge, a folder "
        f"of moemerge similarity, or a plan.json. A checkpoint is shown by moemerge show"
    )


def _open_similarity(folder: Path) -> Report:
    index, similarity = open_similarity(folder)
    return Report(
        kind="similarity",
        name=_name(folder),
        family=index.family,
        sources=dict.fromkeys(similarity.variants, ""),
        similarity=similarity,
    )


def _open_plan(path: Path) -> Report:
    plan = read_json(path, Plan)
    return Report(
        kind="plan",
        name=_name(path),
        family=plan.family,
        sources={name: variant.source for name, variant in plan.variants.items()},
        storage=storage_of_plan(plan, path),
        notes=("A plan holds no distances: run moemerge similarity, or report the bundle it becomes.",),
    )


def _open_bundle(folder: Path) -> Report:
    manifest = read_manifest(folder)
    reports, notes = folder / "reports", _changes(manifest)
    plan = _optional(lambda: _read_plan(reports / PLAN), notes)
    similarity = _optional(lambda: _similarity_of(reports, manifest), notes)
    records = _optional(lambda: read_costs(reports.glob("costs-layer-*.json")), notes) or []
    unit = UNITS.get(plan.evidence, TEXT_UNIT) if plan else TEXT_UNIT
    return Report(
        kind="bundle",
        name=_name(folder),
        family=printable(manifest.family),
        sources={name: printable(entry.source) for name, entry in manifest.variants.items()},
        licences={n: printable(e.licence) for n, e in manifest.variants.items() if e.licence},
        similarity=similarity,
        storage=storage_of_bundle(manifest, plan),
        routing=routing_of(records, manifest.variants, manifest.num_slots),
        curve=_optional(lambda: read_curve(reports / CURVE, unit, manifest.variants), notes),
        quality={name: entry.damage for name, entry in manifest.variants.items() if entry.damage},
        sharing=sharing_of(records, manifest.variants),
        notes=tuple(notes),
    )


def _changes(manifest: Manifest) -> list[str]:
    """What happened to a bundle since it was merged, which its reports do not know of."""
    actions = {"add": "joined", "remove": "left"}
    return [
        f"{change.variant} {actions[change.action]} after the merge; distances and costs are those of before."
        for change in manifest.provenance.changes
    ]


def _read_plan(path: Path) -> Plan | None:
    return read_json(path, Plan) if path.is_file() else None


def _similarity_of(folder: Path, manifest: Manifest) -> Similarity | None:
    if not (folder / SIMILARITY).is_file():
        return None
    found = open_similarity(folder)[1]
    of_bundle = tuple(manifest.variants), manifest.num_slots, {layer.index for layer in manifest.layers}
    if (found.variants, found.num_slots, {layer.index for layer in found.layers}) != of_bundle:
        raise UnsupportedCheckpoint(
            f"{folder}: distances between {', '.join(found.variants)} in {len(found.layers)} layers, but the "
            f"bundle holds {', '.join(manifest.variants)} in {len(manifest.layers)}"
        )
    return found


def _optional(read: Callable[[], Value], notes: list[str]) -> Value | None:
    """A report inside a bundle; what is wrong with it is a note, since the bundle is whole without it."""
    try:
        return read()
    except MoemergeError as error:
        notes.append(f"Left out: {error}")
        return None


def _name(path: Path) -> str:
    return printable(path.resolve().name)
