"""Decide every slot of every layer from what was measured, within a budget, with an eye on the worst variant.

Pure: records and numbers in, decisions out.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from moemerge.bundle.manifest import CodeSpec
from moemerge.calibration.sensitivity import Response
from moemerge.consolidation.allocation import (
    Allocation,
    Encoding,
    Point,
    SlotCosts,
    allocate,
    slot_hull,
    steepest_steps,
)
from moemerge.consolidation.costs import Shared, slot_costs
from moemerge.consolidation.evidence import LayerRecord, Ref, SlotRecord
from moemerge.consolidation.gate import Gate
from moemerge.consolidation.ladder import NONE, PLAIN, Ladder, Shapes
from moemerge.consolidation.slot import Members
from moemerge.similarity.saliency import find_super_experts

_BALANCING_ROUNDS = 12
_SEARCHED = 0.002
"""How near the fewest bytes come to what is needed, over all bytes."""
_TEMPER = 0.5
"""Of sensitivities: a layer's loss is concave in its damage, so what is worst off gains less from a byte than
they say. Of four small fine-tunes at 0.6x, 0.938 of the gain was kept with all of it, 0.935 with nothing,
0.945 with the square root (valid text)."""
_BALANCED = 1.25
"""The worst variant may be hurt so much more than the mean before its damage counts more."""


@dataclass(frozen=True, slots=True)
class Stored:
    """One pool expert to be.

    Attributes:
        owners: (variant, slot) of every expert it stands for; bytewise equal ones in one list.
        operator: What makes it.
        code: How it is stored.
        residuals: For each entry of `owners`.
    """

    owners: list[list[Ref]]
    operator: str
    code: CodeSpec | None
    residuals: list[CodeSpec | None]


@dataclass(frozen=True, slots=True)
class Spending:
    """All decisions.

    Attributes:
        layers: Pool experts to be, by layer in the order of the records.
        damage: Predicted, by variant and layer index.
        num_bytes: Of pools and residuals.
    """

    layers: list[list[Stored]]
    damage: dict[str, dict[int, float]]
    num_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Prices:
    """What choices are made of.

    Attributes:
        ladder: Codes by name.
        shapes: Of an expert's parts.
        plain_bytes: Of an expert as it is.
        importance: By variant: what its loss counts; 1 for those not there.
        sensitivity: By variant and layer index, what damage counts beside that of other layers; 1 for those
            not there.
        responses: By variant, what is lost of the sum of that; the sum itself for those not there.
        correction: By variant, what that is multiplied with; 1 for those not there.
        emphasis: By variant, what its damage counts beyond its importance; 1 for those not there.
    """

    ladder: Ladder
    shapes: Shapes
    plain_bytes: int
    importance: Mapping[str, float]
    sensitivity: Mapping[str, Mapping[int, float]] = field(default_factory=dict)
    responses: Mapping[str, Response] = field(default_factory=dict)
    correction: Mapping[str, float] = field(default_factory=dict)
    emphasis: Mapping[str, float] = field(default_factory=dict)

    def depth(self, variant: str, layer_index: int) -> float:
        """What a unit of damage counts in a layer, beside that of others."""
        return self.sensitivity.get(variant, {}).get(layer_index, 1.0)

    def weight(self, variant: str, layer_index: int) -> float:
        """What a unit of damage counts, beside that of other layers and variants."""
        counted = self.emphasis.get(variant, 1.0) * self.importance.get(variant, 1.0)
        known = self.sensitivity.get(variant) or {layer_index: 1.0}
        mean = statistics.fmean(known.values())
        tempered = math.pow(self.depth(variant, layer_index), _TEMPER) * math.pow(mean, 1 - _TEMPER)
        return counted * tempered

    def nats(self, variant: str, weighted_damage: float) -> float:
        """What is lost, of the sum over layers of damage times depth."""
        response = self.responses.get(variant, Response())
        return self.correction.get(variant, 1.0) * response.nats(weighted_damage)


def spend(
    records: Sequence[LayerRecord],
    variants: Sequence[str],
    allowed_bytes: int | None,
    prices: Prices,
    gate: Gate | None = None,
) -> Spending:
    """Choose for every slot, first for the least sum of losses, then with more weight on the worst variant.

    Variants whose loss is far above the mean count more in the next round, until what is asked for is kept;
    the best worst case wins.
    """
    gate = gate or Gate()
    emphasis = dict.fromkeys(variants, 1.0)
    best: tuple[tuple[float, float], Spending] | None = None
    for _ in range(_BALANCING_ROUNDS):
        spending = _spend_once(records, variants, allowed_bytes, prices, emphasis)
        # How a variant responds to little damage is foretold too roughly to weigh variants by it unasked.
        balanced = _weighted_damage if gate.is_open else predicted_loss
        losses = {name: balanced(spending, name, prices) for name in variants}
        mean = statistics.fmean(losses.values())
        # A sum that is only a little worse is worth a better worst case.
        excess, score = gate.excess(losses), mean + max(losses.values())
        if best is None or (excess, score) < best[0]:
            best = ((excess, score), spending)
        if mean == 0 or (max(losses.values()) <= _BALANCED * mean and not excess):
            break
        for name, loss in losses.items():
            emphasis[name] *= math.sqrt(max(loss, 0.1 * mean) / mean)
    assert best is not None
    return best[1]


def least_bytes(records: Sequence[LayerRecord], variants: Sequence[str], prices: Prices, gate: Gate) -> int:
    """The fewest bytes that are predicted to keep what is asked for, to within a step of the search."""
    low = spend(records, variants, 0, prices).num_bytes
    high = spend(records, variants, None, prices).num_bytes
    while high - low > _SEARCHED * high:
        middle = (low + high) // 2
        found = spend(records, variants, middle, prices, gate)
        if gate.excess({name: predicted_loss(found, name, prices) for name in variants}) > 0:
            low = middle
        else:
            high = middle
    return high


def trade_off(
    records: Sequence[LayerRecord], variants: Sequence[str], prices: Prices, num_points: int = 64
) -> list[tuple[int, dict[str, float]]]:
    """Bytes, and predicted loss by variant, from the least to everything that lessens damage.

    The way that `allocate` goes, without emphasis on the worst variant, at about so many points; losses as in
    `predicted_nats`.
    """
    hulls = _hulls(records, variants, prices, dict.fromkeys(variants, 1.0))
    places = _places(records)

    def lost() -> dict[str, float]:
        return {name: prices.nats(name, max(0.0, value)) for name, value in damage.items()}

    total = sum(hull[0].num_bytes for hull in hulls)
    most = sum(hull[-1].num_bytes for hull in hulls)
    damage = dict.fromkeys(variants, 0.0)
    for number, hull in enumerate(hulls):
        _add_damage(damage, places[number], hull[0], prices, 1)
    spacing = max(1, (most - total) // num_points)
    points = [(total, lost())]
    for _, number, place in steepest_steps(hulls):
        before, after = hulls[number][place - 1], hulls[number][place]
        _add_damage(damage, places[number], before, prices, -1)
        _add_damage(damage, places[number], after, prices, 1)
        total += after.num_bytes - before.num_bytes
        if total == most or total - points[-1][0] >= spacing:
            points.append((total, lost()))
    return points


def _add_damage(
    damage: dict[str, float], place: tuple[LayerRecord, SlotRecord], point: Point, prices: Prices, sign: int
) -> None:
    record, slot = place
    for refs, value in zip(slot.owners, point.by_member, strict=True):
        for name, _ in refs:
            damage[name] += sign * prices.depth(name, record.index) * value


def predicted_loss(spending: Spending, variant: str, prices: Prices) -> float:
    """What the variant loses, by what that counts."""
    return prices.importance.get(variant, 1.0) * predicted_nats(spending, variant, prices)


def _weighted_damage(spending: Spending, variant: str, prices: Prices) -> float:
    """Damage of all layers by what it counts."""
    return sum(prices.weight(variant, index) * value for index, value in spending.damage[variant].items())


def predicted_nats(spending: Spending, variant: str, prices: Prices) -> float:
    """What the variant loses, whatever that counts."""
    damage = spending.damage[variant].items()
    return prices.nats(variant, sum(prices.depth(variant, index) * value for index, value in damage))


def super_experts(records: Sequence[LayerRecord], variants: Sequence[str]) -> set[tuple[int, Ref]]:
    """Experts with massive activations, which stay as they are: (layer index, (variant, slot))."""
    found = set()
    for name in variants:
        places = [_own_largest(record, name) for record in records]
        extreme = find_super_experts([[value for value, _ in row] for row in places])
        found |= {places[row][column][1] for row, column in extreme}
    return found


def _own_largest(record: LayerRecord, variant: str) -> list[tuple[float, tuple[int, Ref]]]:
    """Largest output of each of the variant's experts in a layer, with the expert."""
    return [
        (value, (record.index, ref))
        for slot in record.slots
        for refs, value in zip(slot.owners, slot.largest, strict=True)
        for ref in refs
        if ref[0] == variant
    ]


def _spend_once(
    records: Sequence[LayerRecord],
    variants: Sequence[str],
    allowed_bytes: int | None,
    prices: Prices,
    emphasis: Mapping[str, float],
) -> Spending:
    hulls = _hulls(records, variants, prices, emphasis)
    return _spending(records, variants, allocate(hulls, allowed_bytes), prices)


def _hulls(
    records: Sequence[LayerRecord], variants: Sequence[str], prices: Prices, emphasis: Mapping[str, float]
) -> list[list[Point]]:
    """Of every slot of every layer."""
    exact = super_experts(records, variants)
    hulls = []
    for record, slot in _places(records):
        weights = [
            sum(prices.weight(name, record.index) * emphasis[name] for name, _ in refs)
            for refs in slot.owners
        ]
        ladder = prices.ladder
        partitions = slot.partitions
        if any((record.index, ref) in exact for refs in slot.owners for ref in refs):
            ladder, partitions = Ladder({PLAIN: None}, {NONE: None}), slot.partitions[:1]
        hulls.append(slot_hull(_costs(record, slot, partitions, ladder, prices), weights))
    return hulls


def _places(records: Sequence[LayerRecord]) -> list[tuple[LayerRecord, SlotRecord]]:
    return [(record, slot) for record in records for slot in record.slots]


def _costs(
    record: LayerRecord,
    slot: SlotRecord,
    partitions: Sequence[Sequence[Sequence[int]]],
    ladder: Ladder,
    prices: Prices,
) -> SlotCosts:
    return slot_costs(
        [[tuple(numbers) for numbers in partition] for partition in partitions],
        slot.clusters(),
        slot.probes,
        [len(refs) for refs in slot.owners],
        [record.factors[refs[0][0]] for refs in slot.owners],
        ladder,
        prices.shapes,
        prices.plain_bytes,
    )


def _spending(
    records: Sequence[LayerRecord],
    variants: Sequence[str],
    allocation: Allocation,
    prices: Prices,
) -> Spending:
    stored: dict[int, list[Stored]] = {record.index: [] for record in records}
    damage = {name: dict.fromkeys(stored, 0.0) for name in variants}
    for (record, slot), point in zip(_places(records), allocation.points, strict=True):
        for refs, value in zip(slot.owners, point.by_member, strict=True):
            for name, _ in refs:
                damage[name][record.index] += value
        clusters = slot.clusters()
        for encoding in point.encodings:
            stored[record.index].append(_stored(slot, encoding, clusters, prices.ladder))
    return Spending(list(stored.values()), damage, allocation.num_bytes)


def _stored(
    slot: SlotRecord, encoding: Encoding, clusters: Mapping[Members, Shared], ladder: Ladder
) -> Stored:
    shared = clusters.get(encoding.members)
    return Stored(
        [slot.owners[number] for number in encoding.members],
        shared.operator if shared is not None else "copy",
        ladder.pool[encoding.pool],
        [ladder.residuals[residual] for residual in encoding.residuals],
    )
