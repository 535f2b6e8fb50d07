"""Similarity folders, costs, curves and calibrations as a report's values."""

from collections.abc import Callable, Collection, Iterable, Mapping
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moemerge.errors import DamagedInput, IncompatibleInputs
from moemerge.refs import VARIANT_NAME
from moemerge.report.contents import (
    Calibrated,
    Curve,
    LayerMatrices,
    LayerSummary,
    Routing,
    Similarity,
)
from moemerge.report.files import (
    CalibrationIndex,
    CurveFile,
    LayerCosts,
    SimilarityIndex,
    read_arrays,
    read_json,
)

SIMILARITY = "similarity.json"
CALIBRATION = "calibration.json"
CURVE = "curve.json"
MATRIX = "relative_l2"
"""The distance that summaries and findings are about; every similarity has it."""
_REMEMBERED_BYTES = 256 * 2**20
_MATRICES = 8
"""Of a layer: five distances and three parts."""
_COUNT = 0
"""Column of `slots` in a calibration's layer that holds tokens."""


def open_similarity(folder: Path) -> tuple[SimilarityIndex, Similarity]:
    """What `moemerge similarity` wrote; matrices are read when they are asked for.

    Raises:
        NotFound, UnsupportedCheckpoint, DamagedInput: As `read_json`.
    """
    index = read_json(folder / SIMILARITY, SimilarityIndex)
    if len(set(index.variants)) != len(index.variants):
        raise DamagedInput(f"{folder / SIMILARITY}: a variant is listed twice")
    layers = [
        LayerSummary(
            index=layer.index,
            same_slot_median=layer.same_slot_median,
            same_slot_max=layer.same_slot_max,
            other_slot_median=layer.other_slot_median,
            distinct=int(layer.distinct),
        )
        for layer in sorted(index.layers, key=lambda layer: layer.index)
    ]
    similarity = Similarity(
        variants=tuple(index.variants),
        num_slots=index.num_slots,
        meanings=index.distances,
        not_computed=index.not_computed,
        has_base=index.has_base,
        layers=layers,
        load=_remembering(folder, len(index.variants), index.num_slots),
    )
    return index, similarity


def _remembering(folder: Path, num_variants: int, num_slots: int) -> Callable[[int], LayerMatrices]:
    """`load_matrices` that keeps as many layers as memory may take, since several views look at each."""
    layer_bytes = _MATRICES * 8 * (num_variants * num_slots) ** 2
    return lru_cache(max(1, _REMEMBERED_BYTES // layer_bytes))(
        partial(load_matrices, folder, num_variants, num_slots)
    )


def load_matrices(folder: Path, num_variants: int, num_slots: int, layer: int) -> LayerMatrices:
    """Matrices of a layer.

    Raises:
        NotFound, DamagedInput: The file is missing, damaged, or of other shapes.
    """
    path = folder / f"similarity-layer-{layer:05d}.safetensors"
    arrays = read_arrays(path)
    count = num_variants * num_slots
    square, line, routers = (count, count), (count,), (num_variants, num_variants, num_slots)
    if "identity" not in arrays or "norms" not in arrays or f"distance.{MATRIX}" not in arrays:
        raise DamagedInput(f"{path}: not the matrices of a layer; write them with moemerge similarity")
    _check_shapes(path, arrays, square, line, routers)
    return LayerMatrices(
        distances=_with_prefix(arrays, "distance."),
        part_l2=_with_prefix(arrays, "part_l2."),
        part_norms=_with_prefix(arrays, "part_norms."),
        norms=arrays["norms"],
        identity=arrays["identity"],
        delta_norms=arrays.get("delta_norms"),
        router_l2=arrays.get("router_l2"),
    )


def read_costs(paths: Iterable[Path]) -> list[LayerCosts]:
    """Records of measured costs, by layer.

    Raises:
        UnsupportedCheckpoint, DamagedInput: As `read_json`.
    """
    return sorted((read_json(path, LayerCosts) for path in paths), key=lambda record: record.index)


def sharing_of(records: Iterable[LayerCosts], variants: Collection[str]) -> dict[int, dict[str, float]]:
    """Damage of every one of these variants in a layer when all in a slot share one, summed over slots."""
    found: dict[int, dict[str, float]] = {}
    for record in records:
        lost = {name: 0.0 for name in record.tokens if name in variants}
        for slot in record.slots:
            everybody = ",".join(map(str, range(len(slot.owners))))
            damage = slot.shared.get(everybody, ("", []))[1]
            for refs, value in zip(slot.owners, damage, strict=False):
                for name in {name for name, _ in refs if name in variants}:
                    lost[name] = lost.get(name, 0.0) + value
        found[record.index] = lost
    return found


def routing_of(records: Iterable[LayerCosts], variants: Collection[str], num_slots: int) -> Routing | None:
    """Where tokens of these variants went, as the records of costs say; None when they do not."""
    tokens: dict[str, int] = {}
    counts: dict[int, Mapping[str, list[int]]] = {}
    for record in records:
        known = [name for name in record.routed if name in variants]
        counts[record.index] = {n: record.routed[n] for n in known if len(record.routed[n]) == num_slots}
        tokens |= {name: count for name, count in record.tokens.items() if name in variants}
    return Routing(tokens=tokens, counts=counts) if any(counts.values()) else None


def read_curve(path: Path, unit: str, variants: Collection[str]) -> Curve | None:
    """What other budgets would buy; None when that was not measured for these variants."""
    if not path.is_file():
        return None
    found = read_json(path, CurveFile)
    if any(point.loss.keys() != set(variants) for point in found.points):
        return None
    return Curve(unit=unit, points=[(point.bytes, point.loss) for point in found.points])


def read_calibration(
    folder: Path, variants: Iterable[str], num_slots: int
) -> tuple[dict[str, Calibrated], Routing]:
    """What `moemerge calibrate` kept of these variants.

    Raises:
        NotFound, UnsupportedCheckpoint, DamagedInput: As `read_json`.
        IncompatibleInputs: Another number of slots, or none of the variants is there.
    """
    index = read_json(folder / CALIBRATION, CalibrationIndex)
    # A name becomes a folder: none that leads elsewhere.
    names = [name for name in variants if name in index.variants and VARIANT_NAME.fullmatch(name)]
    if index.num_slots != num_slots or not names:
        raise IncompatibleInputs(
            f"{folder}: a calibration of {', '.join(index.variants) or 'nothing'}, {index.num_slots} slots, "
            f"expected one of {', '.join(variants)} with {num_slots}"
        )
    calibrated = {
        name: Calibrated(
            tokens=index.variants[name].num_tokens,
            nll=index.variants[name].nll,
            gained=index.variants[name].base_nll_excess,
            text=index.variants[name].text_sha256,
        )
        for name in names
    }
    counts = {
        layer: {name: _counts(folder / name / f"layer-{layer:05d}.safetensors", num_slots) for name in names}
        for layer in index.layers
    }
    return calibrated, Routing(tokens={name: one.tokens for name, one in calibrated.items()}, counts=counts)


def _counts(path: Path, num_slots: int) -> list[int]:
    slots = read_arrays(path).get("slots")
    if slots is None or slots.ndim != 2 or len(slots) != num_slots or not np.isfinite(slots).all():
        raise DamagedInput(f"{path}: not the statistics of {num_slots} slots")
    return [int(count) for count in slots[:, _COUNT]]


def _check_shapes(
    path: Path,
    arrays: Mapping[str, NDArray[Any]],
    square: tuple[int, ...],
    line: tuple[int, ...],
    routers: tuple[int, ...],
) -> None:
    expected = {"identity": line, "norms": line, "delta_norms": line, "router_l2": routers}
    for name, array in arrays.items():
        shape = expected.get(name, line if name.startswith("part_norms.") else square)
        if array.shape != shape:
            raise DamagedInput(f"{path}: {name} has shape {array.shape}, expected {shape}")
        if not np.isfinite(array).all():
            raise DamagedInput(f"{path}: {name} contains NaN or infinity")


def _with_prefix(arrays: Mapping[str, NDArray[Any]], prefix: str) -> dict[str, NDArray[Any]]:
    return {name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)}
