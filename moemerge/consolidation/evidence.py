"""What a plan by measured cost is made from: a layer's experts, met by their own variants' inputs.

Loads one slot of all variants at a time; the arithmetic is `costs`. What is measured of a layer is a plain
record, kept with the bundle's reports, so that a killed run measures each layer once.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from moemerge.calibration.statistics import LayerStatistics, SlotStatistics
from moemerge.checkpoint.headers import StoredTensor
from moemerge.checkpoint.tensors import TensorReader
from moemerge.checkpoint.variants import VariantSet
from moemerge.consolidation.clustering import match_variants, plan_joins
from moemerge.consolidation.costs import Shared, race
from moemerge.consolidation.factors import Factors, measure_factors
from moemerge.consolidation.ladder import Ladder
from moemerge.consolidation.operators import RACED, Member
from moemerge.consolidation.slot import Members, Slot, probe
from moemerge.models import Activation
from moemerge.similarity.matrices import LayerSimilarity

_LEAST_TOKENS = 16
"""A slot with fewer tokens is judged by those of the most used slot."""

# The interpreter with torch and everything else that does not grow with the work.
_FIXED_BYTES = 400 * 2**20
# Of an expert, and of the moment of its inputs, while they are coded.
_COPIES = 6

logger = logging.getLogger(__name__)

Ref = tuple[str, int]


class LayerSource(Protocol):
    """Where statistics come from."""

    def layer(self, variant: str, layer_index: int) -> LayerStatistics:
        """Statistics of one layer of one variant."""


class SlotRecord(BaseModel):
    """What was measured of a slot.

    Attributes:
        owners: (variant, slot) of every different expert; those of one entry are bytewise equal.
        partitions: Ways to divide the experts, by number, into those that share.
        shared: By cluster, its numbers with commas between: the operator that won, and each member's damage.
        probes: Damage of every expert in four bits, plainly rounded.
        largest: Largest absolute output of every expert.
    """

    model_config = ConfigDict(frozen=True)
    owners: list[list[Ref]]
    partitions: list[list[list[int]]]
    shared: dict[str, tuple[str, list[float]]]
    probes: list[float]
    largest: list[float]

    def clusters(self) -> dict[Members, Shared]:
        """`shared` as `costs` wants it."""
        found = {}
        for text, (operator, damage) in self.shared.items():
            numbers = tuple(int(number) for number in text.split(","))
            found[numbers] = Shared(operator, dict(zip(numbers, damage, strict=True)))
        return found


class LayerRecord(BaseModel):
    """What was measured of a layer.

    Attributes:
        factors: By variant, what codes do.
        tokens: By variant, how many tokens were measured on.
        routed: By variant and slot, how many of them the router sent there.
    """

    model_config = ConfigDict(frozen=True)
    index: int
    factors: dict[str, Factors]
    slots: list[SlotRecord]
    tokens: dict[str, int] = Field(default_factory=dict)
    routed: dict[str, list[int]] = Field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """Reads what costs are measured on.

    Attributes:
        variants: Local checkpoints.
        statistics: Of their layers.
        operators: Names of those that race.
        reader: Open reader.
    """

    variants: VariantSet
    statistics: LayerSource
    reader: TensorReader
    operators: Sequence[str] = RACED

    @property
    def activation(self) -> Activation:
        """Form of the experts."""
        return Activation(str(self.variants.first.settings["activation"]))

    def measure(
        self, similarity: LayerSimilarity, ladder: Ladder, advance: Callable[[int], None]
    ) -> LayerRecord:
        """Measure a layer.

        Args:
            similarity: Of the layer.
            ladder: Codes that are to be measured.
            advance: Told of the bytes of experts that are done.
        """
        statistics = {name: self.statistics.layer(name, similarity.layer) for name in similarity.variants}
        for name, seen in statistics.items():
            if slots := unreached(seen):
                logger.warning(
                    "variant %s, layer %d: text hardly reaches slot %s; the most used one stands in",
                    name,
                    similarity.layer,
                    ", ".join(map(str, slots)),
                )
        groups = slot_groups(similarity)
        typical = typical_slot(groups, statistics)
        found_factors = measure_factors(self.slot(similarity, typical, statistics), ladder)
        factors = {
            name: found for refs, found in zip(typical, found_factors, strict=True) for name, _ in refs
        }
        records = []
        for owners in groups:
            slot = self.slot(similarity, owners, statistics)
            shared = {}
            for numbers in {n for partition in slot.partitions for n in partition if len(n) > 1}:
                found = race(slot, numbers, self.operators)
                shared[",".join(map(str, numbers))] = (found.operator, [found.damage[n] for n in numbers])
            probes = [probe(slot, number) for number in range(len(owners))]
            partitions = [[list(numbers) for numbers in partition] for partition in slot.partitions]
            largest = [
                max(statistics[name].slots[place].output_max for name, place in refs) for refs in owners
            ]
            records.append(
                SlotRecord(
                    owners=owners,
                    partitions=partitions,
                    shared=dict(sorted(shared.items())),
                    probes=probes,
                    largest=largest,
                )
            )
            advance(sum(t.nbytes for refs in owners for t in self.stored(similarity.layer, refs[0]).values()))
        return LayerRecord(
            index=similarity.layer,
            factors=factors,
            slots=records,
            tokens={name: seen.num_tokens for name, seen in statistics.items()},
            routed={name: [slot.count for slot in seen.slots] for name, seen in statistics.items()},
        )

    def slot(
        self, similarity: LayerSimilarity, owners: list[list[Ref]], statistics: Mapping[str, LayerStatistics]
    ) -> Slot:
        """The experts of a slot with half of their inputs to decide on, and a quarter to judge by."""
        found = [self.halves(similarity.layer, refs, statistics) for refs in owners]
        members, judges, factors = zip(*found, strict=True)
        base = self.base_parts(similarity.layer, owners[0][0][1])
        return Slot(members, judges, factors, partitions_of(similarity, owners), base)

    def halves(
        self, layer_index: int, refs: Sequence[Ref], statistics: Mapping[str, LayerStatistics]
    ) -> tuple[Member, Member, float]:
        """An expert with half of its inputs, the same with the others, and damage per mean square error."""
        parts = self.parts(layer_index, refs[0])
        found = [inputs_of(statistics[name], slot) for name, slot in refs]
        energy = sum(statistics[name].output_square_sum for name, _ in refs) or 1.0
        factor = sum(one.count for one in found) / energy
        member = self.member(parts, found, slice(0, None, 2))
        # Values in float32 are made once for both.
        judge = self.member(member.matrices, found, slice(1, None, 4))
        member = replace(member, parts=member.matrices, weight=factor)
        return member, judge, factor

    def base_parts(self, layer_index: int, slot: int) -> dict[str, Tensor] | None:
        """The base's expert in a slot, when there is a base."""
        if self.variants.base is None:
            return None
        stored = self.variants.base.experts[layer_index, slot]
        return {part: self.reader.read(tensor) for part, tensor in stored.items()}

    def parts(self, layer_index: int, ref: Ref) -> dict[str, Tensor]:
        """An expert's parts as stored."""
        return {part: self.reader.read(tensor) for part, tensor in self.stored(layer_index, ref).items()}

    def member(self, parts: Mapping[str, Tensor], found: Sequence[SlotStatistics], rows: slice) -> Member:
        """An expert with some of its inputs; of all that have it, when several variants do."""
        moment = torch.stack([one.moment_DD for one in found]).sum(dim=0)
        count = max(1, sum(one.count for one in found))
        return Member(
            parts,
            self.activation,
            torch.cat([one.inputs_SD[rows] for one in found]).float(),
            torch.cat([one.gates_S[rows] for one in found]).float(),
            1.0,
            moment / count,
        )

    def without_inputs(self, parts: Mapping[str, StoredTensor]) -> Member:
        """An expert, or some of its parts, for operators that look at weights alone."""
        read = {part: self.reader.read(tensor) for part, tensor in parts.items()}
        return Member(read, self.activation, torch.zeros(0, 0), torch.zeros(0))

    def stored(self, layer_index: int, ref: Ref) -> Mapping[str, StoredTensor]:
        """Places of an expert's parts."""
        return self.variants.variants[ref[0]].experts[layer_index, ref[1]]


def slot_memory(variants: VariantSet) -> int:
    """Bytes of memory of a process that measures the costs of a layer, about.

    A slot of all variants in float32 with what operators and codes make of it, and moments of the inputs of
    both kinds of matrices.
    """
    first = variants.first
    parts = next(iter(first.experts.values())).values()
    entries = sum(part.num_elements for part in parts)
    width = max(int(first.settings["hidden_size"] or 0), int(first.settings["expert_size"] or 0))
    slots = (len(variants.checkpoints) + _COPIES) * 4 * entries
    return _FIXED_BYTES + slots + _COPIES * 4 * width * width


def layer_memory(variants: VariantSet) -> int:
    """Bytes of memory of a process that codes a layer, about: a slot, and a layer's codes."""
    entries = sum(part.num_elements for part in next(iter(variants.first.experts.values())).values())
    return slot_memory(variants) + len(variants.variants) * variants.first.num_experts * entries


def inputs_of(layer: LayerStatistics, slot: int) -> SlotStatistics:
    """Statistics of a slot; where the text hardly reached it, a little of what the most used slot was given.

    An expert that no token met would otherwise count for nothing, and be left in whatever is cheapest.
    """
    own = layer.slots[slot]
    if own.count >= _LEAST_TOKENS:
        return own
    busiest = max(layer.slots, key=lambda other: other.count)
    if not busiest.count:
        return own
    # Moments are sums over tokens: as many as are pretended.
    share = _LEAST_TOKENS / busiest.count
    return replace(
        busiest,
        count=_LEAST_TOKENS,
        gate_sum=busiest.gate_sum * share,
        gate_square_sum=busiest.gate_square_sum * share,
        saliency_sum=busiest.saliency_sum * share,
        output_square_sum=busiest.output_square_sum * share,
        output_max=own.output_max,
        moment_DD=busiest.moment_DD * share,
    )


def unreached(layer: LayerStatistics) -> list[int]:
    """Slots that the text hardly reached."""
    return [number for number, slot in enumerate(layer.slots) if slot.count < _LEAST_TOKENS]


def typical_slot(
    groups: Sequence[list[list[Ref]]], statistics: Mapping[str, LayerStatistics]
) -> list[list[Ref]]:
    """The slot in the middle by use, of those with most experts: half of what is used is used more."""
    most = max(map(len, groups))
    use = {
        number: sum(statistics[name].slots[slot].output_square_sum for refs in owners for name, slot in refs)
        for number, owners in enumerate(groups)
        if len(owners) == most
    }
    by_use = sorted(use, key=lambda number: (-use[number], number))
    half, seen = sum(use.values()) / 2, 0.0
    for number in by_use:
        seen += use[number]
        if seen >= half:
            break
    return groups[number]


def slot_groups(similarity: LayerSimilarity) -> list[list[list[Ref]]]:
    """The experts that may share, slot by slot: of every variant one, bytewise equal ones together.

    Slots are matched by distance, so that the order of a variant's slots does not matter.
    """
    distance = similarity.distances["relative_l2"]
    matched = match_variants(distance, ~similarity.same_variant_pairs(), similarity.num_slots)
    groups = []
    for members in matched:
        by_identity: dict[int, list[Ref]] = {}
        for member in members:
            ref = similarity.ref(member)
            by_identity.setdefault(int(similarity.identity[member]), []).append((ref.variant, ref.slot))
        groups.append(list(by_identity.values()))
    return groups


def partitions_of(similarity: LayerSimilarity, owners: list[list[Ref]]) -> list[list[Members]]:
    """From every expert for itself to all in one cluster, the closest joined first."""
    rows = [similarity.variants.index(refs[0][0]) * similarity.num_slots + refs[0][1] for refs in owners]
    distance = similarity.distances["relative_l2"][np.ix_(rows, rows)]
    current: list[Members] = [(number,) for number in range(len(owners))]
    partitions = [list(current)]
    for join in plan_joins(distance, np.ones_like(distance, dtype=bool), current):
        current = sorted([c for c in current if c not in (join.first, join.second)] + [join.result])
        partitions.append(list(current))
    return partitions
