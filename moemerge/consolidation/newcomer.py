"""What a variant costs that joins a bundle, and how the bytes it may add are spent.

For every slot there are pool experts that may stand for it as they are, at no bytes; the same with a
residual; and an own pool expert, in any code. Costs and the way of spending are those of a merge; what is
stored already stays.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor

from moemerge.bundle.manifest import CodeSpec
from moemerge.bundle.reader import Bundle
from moemerge.consolidation.allocation import ClusterCosts, Point, SlotCosts, allocate, slot_hull
from moemerge.consolidation.budget import Budget, refuse_budget
from moemerge.consolidation.evidence import Evidence
from moemerge.consolidation.factors import measure_factors, residual_shares
from moemerge.consolidation.ladder import NONE, PLAIN, Ladder, Shapes, code_size, residual_size
from moemerge.consolidation.slot import Slot, probe
from moemerge.models.packed import Matrix, effective
from moemerge.similarity.saliency import find_super_experts

_CANDIDATES = 4
"""Pool experts, the nearest by weights, whose cost is measured for a slot."""
_FULLY_MEASURED = 2
"""Slots of a layer, the most used ones, on which codes are measured in full."""
_SKETCH_ENTRIES = 65536
"""Entries of an expert that tell how near it is to others."""
_STORED = "stored "
_DIGITS = 6

Parts = Mapping[str, Tensor]


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Candidate(_Record):
    """A pool expert that may stand for a slot.

    Attributes:
        index: Its place in the pool.
        damage: What it does as stored.
        is_equal: Whether it has the same bytes as the newcomer's expert.
    """

    index: int
    damage: float
    is_equal: bool


class SlotRecord(_Record):
    """What was measured of a slot; see `evidence.SlotRecord`."""

    candidates: list[Candidate]
    probe: float
    largest: float


class LayerRecord(_Record):
    """What was measured of a layer; see `evidence.LayerRecord`."""

    index: int
    own: dict[str, float]
    residual: dict[str, float]
    slots: list[SlotRecord]


class SlotChoice(_Record):
    """How a slot of the newcomer is stored.

    Attributes:
        stored: Pool expert that was there before and stands for it; None for a pool expert of its own.
        code: Of its own pool expert; None where that is plain, or there is none.
        residual: Of what is missing of the expert, if that is stored.
    """

    stored: int | None = Field(default=None, ge=0)
    code: CodeSpec | None = None
    residual: CodeSpec | None = None

    @model_validator(mode="after")
    def _fits(self) -> "SlotChoice":
        if (self.stored is None and self.residual) or (self.stored is not None and self.code):
            raise ValueError("a code goes with an own pool expert, a residual with one that was there")
        return self


class JoiningPlan(_Record):
    """All decisions about a variant that joins.

    Attributes:
        variant: Its name.
        budget: As it was given.
        allowed_bytes: What it may add; None for `exact`.
        added_bytes: What its pool experts and residuals add.
        evidence: What decided; see `ConsolidationPlan`.
        predicted_damage: Summed over layers.
        layers: By layer index, for each slot.
    """

    variant: str
    budget: str
    allowed_bytes: int | None
    added_bytes: int
    evidence: str
    predicted_damage: float
    layers: dict[int, list[SlotChoice]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """What the bytes are spent by.

    Attributes:
        budget: As it was given.
        allowed_bytes: What may be added; None for `exact`.
        variant_bytes: The unit of budgets.
        ladder: Codes by name.
        shapes: Of an expert's parts.
        plain_bytes: Of one of the newcomer's experts as it is.
        weights: By layer index, what damage counts there; 1 for layers not there.
    """

    budget: Budget
    allowed_bytes: int | None
    variant_bytes: int
    ladder: Ladder
    shapes: Shapes
    plain_bytes: int
    weights: Mapping[int, float]


def measure_layer(
    evidence: Evidence, bundle: Bundle, name: str, layer_index: int, ladder: Ladder
) -> LayerRecord:
    """What every choice for a newcomer's slots costs in a layer, on its own inputs."""
    seen = evidence.statistics.layer(name, layer_index)
    pool = bundle.map_pool(layer_index)
    num_slots = bundle.manifest.num_slots
    near = _nearest(evidence, name, layer_index, pool, num_slots)
    usage = [slot.output_square_sum for slot in seen.slots]
    most_used = sorted(range(num_slots), key=lambda number: -usage[number])[:_FULLY_MEASURED]
    own: list[Slot] = []
    shares: list[dict[str, float]] = []
    slots = []
    for number in range(num_slots):
        slot = _slot(evidence, name, layer_index, number)
        candidates = [
            Candidate(
                index=index,
                damage=slot.damage(0, _dense(pool[index])),
                is_equal=_is_equal(slot.members[0].parts, pool[index]),
            )
            for index in near[number]
        ]
        slots.append(
            SlotRecord(candidates=candidates, probe=probe(slot, 0), largest=seen.slots[number].output_max)
        )
        if number in most_used:
            own.append(slot)
            best = min(candidates, key=lambda candidate: candidate.damage)
            if best.damage > 0:
                shares.append(residual_shares(slot, 0, _dense(pool[best.index]), ladder.residuals))
    return LayerRecord(
        index=layer_index,
        own=_typical([measure_factors(slot, ladder)[0].own for slot in own]),
        residual=_typical(shares),
        slots=slots,
    )


def plan_joining(name: str, records: Sequence[LayerRecord], evidence: str, terms: Terms) -> JoiningPlan:
    """Spend the budget.

    Raises:
        InvalidRecipe: It is below the least possible.
    """
    exact = set(find_super_experts([[slot.largest for slot in record.slots] for record in records]))
    is_exact = terms.allowed_bytes is None
    hulls = [
        _hull(record, slot, terms, is_exact=is_exact or (row, column) in exact)
        for row, record in enumerate(records)
        for column, slot in enumerate(record.slots)
    ]
    least = sum(hull[0].num_bytes for hull in hulls)
    if terms.allowed_bytes is not None and least > terms.allowed_bytes:
        raise refuse_budget(
            terms.budget, terms.allowed_bytes, least, terms.variant_bytes, can_share_more=False
        )
    chosen = allocate(hulls, terms.allowed_bytes)
    choices = iter([_choice(point, terms.ladder) for point in chosen.points])
    damage = math.fsum(point.damage for point in chosen.points)
    return JoiningPlan(
        variant=name,
        budget=terms.budget.text,
        allowed_bytes=terms.allowed_bytes,
        added_bytes=chosen.num_bytes,
        evidence=evidence,
        predicted_damage=float(f"{damage:.{_DIGITS}g}"),
        layers={record.index: [next(choices) for _ in record.slots] for record in records},
    )


def _typical(found: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """By code, the median of what it does; nothing where it was not tried."""
    return {code: statistics.median(one[code] for one in found) for code in (found[0] if found else ())}


def _hull(record: LayerRecord, slot: SlotRecord, terms: Terms, *, is_exact: bool) -> list[Point]:
    """Choices for a slot; only those that keep every bit where it is to stay exact."""
    pool = {PLAIN: None} if is_exact else terms.ladder.pool
    own_bytes = {key: code_size(code, terms.shapes, terms.plain_bytes) for key, code in pool.items()}
    own = {(key, NONE): record.own[key] * slot.probe for key in pool}
    clusters = [ClusterCosts((0,), own_bytes, {NONE: 0}, {0: 1}, {0: own})]
    left = {NONE: 1.0} if is_exact else {NONE: 1.0, **record.residual}
    residual_bytes = {key: residual_size(terms.ladder.residuals[key], terms.shapes) for key in left}
    for candidate in slot.candidates:
        if candidate.is_equal or not is_exact:
            key = f"{_STORED}{candidate.index}"
            damage = {(key, residual): candidate.damage * share for residual, share in left.items()}
            clusters.append(ClusterCosts((0,), {key: 0}, residual_bytes, {0: 1}, {0: damage}))
    return slot_hull(SlotCosts([[cluster] for cluster in clusters]), [terms.weights.get(record.index, 1.0)])


def _choice(point: Point, ladder: Ladder) -> SlotChoice:
    (encoding,) = point.encodings
    if encoding.pool.startswith(_STORED):
        index = int(encoding.pool.removeprefix(_STORED))
        return SlotChoice(stored=index, residual=ladder.residuals[encoding.residuals[0]])
    return SlotChoice(code=ladder.pool[encoding.pool])


def _slot(evidence: Evidence, name: str, layer_index: int, number: int) -> Slot:
    seen = {name: evidence.statistics.layer(name, layer_index)}
    member, judge, factor = evidence.halves(layer_index, [(name, number)], seen)
    return Slot([member], [judge], [factor], [[(0,)]])


def _nearest(
    evidence: Evidence, name: str, layer_index: int, pool: Sequence[Mapping[str, Matrix]], num_slots: int
) -> list[list[int]]:
    """For each slot the pool experts that are nearest, by some entries of every matrix."""
    stored = torch.stack([_sketch(_dense(parts)) for parts in pool])
    own = torch.stack([_sketch(evidence.parts(layer_index, (name, slot))) for slot in range(num_slots)])
    distances = torch.cdist(own, stored, compute_mode="donot_use_mm_for_euclid_dist")
    return [row.argsort(stable=True)[:_CANDIDATES].tolist() for row in distances]


def _sketch(parts: Parts) -> Tensor:
    """Some entries, in float32, always the same."""
    each = _SKETCH_ENTRIES // len(parts)
    flat = [parts[part].reshape(-1) for part in sorted(parts)]
    return torch.cat([entries[:: max(1, len(entries) // each)].float() for entries in flat])


def _dense(parts: Mapping[str, Matrix]) -> dict[str, Tensor]:
    return {part: effective(matrix, None, torch.float32) for part, matrix in parts.items()}


def _is_equal(own: Parts, stored: Mapping[str, Matrix]) -> bool:
    return all(
        isinstance(matrix, Tensor) and matrix.dtype == own[part].dtype and torch.equal(matrix, own[part])
        for part, matrix in stored.items()
    )
