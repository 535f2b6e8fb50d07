"""Codes for methods that treat every slot alike: which to use, and how a budget is filled with them.

A rung is a code for pool experts with one for residuals. All slots stand on one rung, the highest that
fits, and then one slot after another on the next, until the budget is full.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from moemerge.bundle.manifest import CodeSpec
from moemerge.consolidation.allocation import Point, convex_hull
from moemerge.consolidation.costs import race, slot_costs
from moemerge.consolidation.evidence import Evidence, slot_groups, typical_slot
from moemerge.consolidation.factors import measure_factors
from moemerge.consolidation.ladder import Ladder, Shapes, code_size, residual_size
from moemerge.consolidation.measured import ladder_for
from moemerge.consolidation.plan import PlannedExpert, PlannedLayer
from moemerge.consolidation.slot import Members, Slot, probe
from moemerge.errors import InvalidRecipe
from moemerge.similarity.matrices import LayerSimilarity

Pools = Mapping[int, Sequence[PlannedExpert]]
"""By layer index, pool experts that have no codes yet."""


class Rung(NamedTuple):
    """How a pool expert is stored, and what is added to it for each of its members; None for plain, none."""

    pool: CodeSpec | None
    residual: CodeSpec | None = None


class Sizes(NamedTuple):
    """What codes take.

    Attributes:
        shapes: Of an expert's parts.
        plain_bytes: Of an expert as it is.
    """

    shapes: Shapes
    plain_bytes: int

    def of(self, rung: Rung, num_members: int) -> int:
        """Bytes of a pool expert with residuals for its members."""
        residual = residual_size(rung.residual, self.shapes)
        return code_size(rung.pool, self.shapes, self.plain_bytes) + num_members * residual


def sizes_of(evidence: Evidence) -> Sizes:
    """Of the experts of these variants; plain ones count as the widest."""
    experts = [parts for variant in evidence.variants.variants.values() for parts in variant.experts.values()]
    plain_bytes = max(sum(tensor.nbytes for tensor in parts.values()) for parts in experts)
    return Sizes(ladder_for(evidence.variants)[1], plain_bytes)


def pool_rungs(ladder: Ladder) -> list[Rung]:
    """Every code of a pool expert without residuals, the fewest bits first, plain at the end."""
    return [Rung(code) for code in reversed(list(ladder.pool.values()))]


def fill(pools: Pools, rungs: Sequence[Rung], sizes: Sizes, allowed_bytes: int) -> list[PlannedLayer]:
    """Give every pool expert a rung, and its members residuals.

    Args:
        pools: What is to be stored.
        rungs: By bytes rising.
        sizes: What they take.
        allowed_bytes: The budget.

    Raises:
        InvalidRecipe: Not even the lowest rung fits.
    """
    places = [(number, index) for index, pool in pools.items() for number in range(len(pool))]
    chosen = choose_rungs(
        [
            [sizes.of(rung, len(pools[index][number].members)) for rung in rungs]
            for number, index in sorted(places)
        ],
        allowed_bytes,
    )
    rung_of = {place: rungs[rung] for place, rung in zip(sorted(places), chosen, strict=True)}
    return [
        _layer(index, pool, [rung_of[number, index] for number in range(len(pool))])
        for index, pool in pools.items()
    ]


def choose_rungs(sizes: Sequence[Sequence[int]], allowed_bytes: int) -> list[int]:
    """The rung of every unit: one for all, the highest that fits, and the next for as many as there is room.

    Args:
        sizes: By unit and rung, rungs rising.
        allowed_bytes: The budget.

    Raises:
        InvalidRecipe: Not even the lowest rung fits.
    """
    totals = [sum(column) for column in zip(*sizes, strict=True)]
    fitting = [rung for rung, total in enumerate(totals) if total <= allowed_bytes]
    if not fitting:
        raise InvalidRecipe(f"takes {totals[0]:,} bytes at least, {allowed_bytes:,} are allowed")
    lowest, left = fitting[-1], allowed_bytes - totals[fitting[-1]]
    chosen = [lowest] * len(sizes)
    if lowest + 1 < len(totals):
        for unit, own in enumerate(sizes):
            added = own[lowest + 1] - own[lowest]
            if added <= left:
                chosen[unit], left = lowest + 1, left - added
    return chosen


def measure_rungs(evidence: Evidence, layers: Sequence[LayerSimilarity], operator: str) -> list[Rung]:
    """Pairs of codes on the lower convex hull of bytes and damage, measured on every layer's typical slot.

    Args:
        evidence: What it is measured on.
        layers: Similarity of every routed layer.
        operator: What makes the pool expert.
    """
    ladder, shapes = ladder_for(evidence.variants)
    damage: dict[tuple[str, str], list[float]] = {}
    for layer in layers:
        slot = _typical_slot(evidence, layer)
        for pair, value in _pair_damage(slot, ladder, shapes, operator).items():
            damage.setdefault(pair, []).append(value)
    sizes = sizes_of(evidence)
    num_members = len(evidence.variants.variants)
    rungs = {pair: Rung(ladder.pool[pair[0]], ladder.residuals[pair[1]]) for pair in damage}
    points = {
        Point(sizes.of(rungs[pair], num_members), sum(values), (), ()): rungs[pair]
        for pair, values in damage.items()
        if len(values) == len(layers)
    }
    return [points[point] for point in convex_hull(list(points))]


def _pair_damage(slot: Slot, ladder: Ladder, shapes: Shapes, operator: str) -> dict[tuple[str, str], float]:
    """By pool code and residual code, damage of all variants when they share one expert."""
    everyone: Members = tuple(range(len(slot.members)))
    factors = measure_factors(slot, ladder, operator)
    probes = [probe(slot, number) for number in everyone]
    shared = {everyone: race(slot, everyone, (operator,))}
    costs = slot_costs([[everyone]], shared, probes, [1] * len(everyone), factors, ladder, shapes, 0)
    damage = costs.partitions[0][0].damage
    return {pair: sum(damage[number][pair] for number in everyone) for pair in damage[0]}


def _typical_slot(evidence: Evidence, layer: LayerSimilarity) -> Slot:
    statistics = {name: evidence.statistics.layer(name, layer.layer) for name in layer.variants}
    return evidence.slot(layer, typical_slot(slot_groups(layer), statistics), statistics)


def _layer(index: int, pool: Sequence[PlannedExpert], rungs: Sequence[Rung]) -> PlannedLayer:
    residuals: dict[str, dict[int, CodeSpec | None]] = {}
    for planned, rung in zip(pool, rungs, strict=True):
        for name, slot in planned.members:
            residuals.setdefault(name, {})[slot] = rung.residual
    return PlannedLayer(
        index=index,
        pool=[
            planned.model_copy(update={"code": rung.pool}) for planned, rung in zip(pool, rungs, strict=True)
        ],
        residuals={
            name: [codes[slot] for slot in range(len(codes))]
            for name, codes in residuals.items()
            if any(codes.values())
        },
    )
