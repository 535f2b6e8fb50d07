"""What is derived from a report's values: medians by layer and part, overlaps, the worst slots. Pure."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from moemerge.report.contents import LayerMatrices, Matrix, Report, Routing, Rung, Storage

RELATIVE = "relative_l2"


@dataclass(frozen=True, slots=True, kw_only=True)
class Placed:
    """An expert as it is kept.

    Attributes:
        error: Distance to what stands for it over its norm; None where that is not known yet.
        shares_with: The other experts of its pool expert.
    """

    layer: int
    variant: str
    slot: int
    rung: Rung
    error: float | None
    shares_with: Sequence[tuple[str, int]]


def same_slot(matrix: Matrix, num_variants: int) -> Matrix:
    """[pairs of variants, E]: entries between two variants' experts of one slot, pairs in order."""
    blocks = matrix.reshape(num_variants, -1, num_variants, matrix.shape[1] // num_variants)
    pairs = [np.diagonal(blocks[a, :, b, :]) for a, b in combinations(range(num_variants), 2)]
    return np.array(pairs) if pairs else np.zeros((0, matrix.shape[0] // num_variants))


def joins(pairs: Matrix, num_variants: int) -> list[float]:
    """Distances at which the experts of a slot become one, the closest pairs joined first; for every slot.

    Source: single linkage, Kruskal's minimum spanning tree.
    """
    names = list(combinations(range(num_variants), 2))
    found = []
    for distances in pairs.T:
        cluster = list(range(num_variants))
        for pair in np.argsort(distances, kind="stable"):
            a, b = (cluster[variant] for variant in names[pair])
            if a != b:
                found.append(float(distances[pair]))
                cluster = [a if one == b else one for one in cluster]
    return found


def farthest_siblings(matrix: Matrix, num_variants: int) -> float:
    """The largest distance within slots, up to which colours are spread; of all, with but one variant."""
    shown = same_slot(matrix, num_variants) if num_variants > 1 else matrix
    return float(shown.max())


def relative(distance: Matrix, norms: Matrix) -> Matrix:
    """Over the root mean square of both norms; zero where both are."""
    scale = np.sqrt((norms[:, None] ** 2 + norms[None, :] ** 2) / 2)
    found: Matrix = np.divide(distance, scale, out=np.zeros_like(distance), where=scale > 0)
    return found


def part_distances(layer: LayerMatrices, num_variants: int) -> dict[str, float]:
    """Median relative distance within slots by part; nothing where the parts' norms were not kept."""
    found = {}
    for part, norms in layer.part_norms.items():
        if part in layer.part_l2:
            pairs = same_slot(relative(layer.part_l2[part], norms), num_variants)
            if pairs.size:
                found[part] = float(np.median(pairs))
    return found


def delta_shares(layer: LayerMatrices, num_variants: int) -> Matrix | None:
    """[V, E]: norm of what fine-tuning changed over the expert's norm; None without a base."""
    if layer.delta_norms is None:
        return None
    shares = np.divide(
        layer.delta_norms, layer.norms, out=np.zeros_like(layer.delta_norms), where=layer.norms > 0
    )
    found: Matrix = shares.reshape(num_variants, -1)
    return found


def shares_of(routing: Routing, layer: int, variant: str) -> Matrix | None:
    """[E]: share of a variant's routed tokens that each slot took; None where nothing was counted."""
    counts = np.array(routing.counts.get(layer, {}).get(variant, ()), dtype=float)
    total = counts.sum()
    return counts / total if total else None


def overlap(a: Matrix, b: Matrix) -> float:
    """Of two shares, how much they have in common: 1 when they are equal, 0 when no slot serves both."""
    return float(np.minimum(a, b).sum())


def slots_in_use(shares: Matrix) -> float:
    """As many slots as would be used evenly with the same entropy."""
    used = shares[shares > 0]
    return float(np.exp(-(used * np.log(used)).sum()))


def placed(storage: Storage) -> Iterator[Placed]:
    """Every expert as it is kept, by layer, variant and slot."""
    for layer in storage.layers:
        members = {member: pool for pool in layer.pool for member in pool}
        for name, rungs in layer.rungs.items():
            errors = layer.errors.get(name)
            for slot, rung in enumerate(rungs):
                others = [member for member in members[name, slot] if member != (name, slot)]
                yield Placed(
                    layer=layer.index,
                    variant=name,
                    slot=slot,
                    rung=rung,
                    error=errors[slot] if errors else None,
                    shares_with=others,
                )


def chosen_point(report: Report) -> tuple[int, Mapping[str, float]] | None:
    """Bytes and predicted losses of what was chosen."""
    storage = report.storage
    return (storage.stored_bytes, storage.predicted) if storage and storage.predicted else None


def most_apart(report: Report) -> int:
    """The layer whose experts of one slot differ most; the first where distances are not known."""
    similarity = report.similarity
    known = [
        (-layer.same_slot_median, layer.index)
        for layer in (similarity.layers if similarity else ())
        if layer.same_slot_median is not None
    ]
    return min(known)[1] if known else report.layers[0]


def strips(report: Report) -> dict[str, list[float | None]]:
    """What is worth a look along the layers, by name: a value for each layer, None where there is none."""
    found: dict[str, list[float | None]] = {}
    if report.similarity:
        found["same slot apart"] = [layer.same_slot_median for layer in report.similarity.layers]
    if report.sharing:
        found["lost by sharing, worst"] = [
            max(report.sharing.get(index, {}).values(), default=None) for index in report.layers
        ]
    if report.storage:
        found["pool experts"] = [float(len(layer.pool)) for layer in report.storage.layers]
        errors = [[e for slots in layer.errors.values() for e in slots] for layer in report.storage.layers]
        if any(errors):
            found["worst error"] = [max(of_layer, default=None) for of_layer in errors]
    return found
