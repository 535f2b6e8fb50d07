"""What every choice for a slot costs, measured on calibration inputs.

Damage of a variant is the gated replacement error of its experts over the energy of its layer's output.
Sharing is measured for every slot and every cluster that may share. What codes add is measured in full for
a sample of a layer's slots, as a multiple of the error of plain rounding to four bits, which is measured
for every expert: the multiples hardly differ within a layer, and encoding every expert in every code
would cost more than the merge.

Shapes: S inputs, D model width.
"""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from moemerge.consolidation.allocation import ClusterCosts, SlotCosts
from moemerge.consolidation.codes.moments import add_moments
from moemerge.consolidation.codes.rounding import round_nearest
from moemerge.consolidation.forward import replacement_error
from moemerge.consolidation.ladder import (
    NONE,
    PLAIN,
    Ladder,
    Shapes,
    code_size,
    encode,
    encode_residual,
)
from moemerge.consolidation.operators import OPERATORS, Cluster, Member
from moemerge.models.packed import PackedMatrix

_PROBE_BITS, _PROBE_GROUP = 4, 64
_TINY = 1e-30

Members = tuple[int, ...]
Parts = Mapping[str, Tensor]


@dataclass(frozen=True, slots=True)
class Slot:
    """The experts of one slot, one per variant.

    Attributes:
        members: With the inputs that decide what is made of them.
        judges: The same experts with other inputs, on which everything is measured.
        factors: Damage of a variant per mean gated square error on its inputs.
        partitions: Ways to divide the variants into those that share.
        base: The base's expert, when there is a base.
        seed: For operators that draw.
    """

    members: Sequence[Member]
    judges: Sequence[Member]
    factors: Sequence[float]
    partitions: Sequence[Sequence[Members]]
    base: Parts | None = None
    seed: int = 0

    def cluster(self, numbers: Members) -> Cluster:
        """Some of the variants' experts, to be merged."""
        return Cluster([self.members[number] for number in numbers], self.base, self.seed)

    def damage(self, number: int, parts: Parts) -> float:
        """Damage of a variant when these parts stand for its expert."""
        judge = self.judges[number]
        error = replacement_error(
            parts, judge.activation, judge.inputs_SD, judge.gates_S, judge.own.output_SD
        )
        return self.factors[number] * error


@dataclass(frozen=True, slots=True)
class Shared:
    """A cluster's best pool expert, uncoded.

    Attributes:
        operator: Name of the operator that made it.
        damage: Of every member.
    """

    operator: str
    damage: Mapping[int, float]


@dataclass(frozen=True, slots=True)
class Factors:
    """What codes do in a layer, as multiples.

    Attributes:
        own: By pool code: damage of an expert alone in it over damage of plain rounding to four bits.
        pool: The same for a shared pool expert: what the code adds to sharing.
        residual: By pool code and residual code: what is left of the damage without a residual.
    """

    own: Mapping[str, float]
    pool: Mapping[str, float]
    residual: Mapping[tuple[str, str], float]


def race(slot: Slot, numbers: Members, operators: Iterable[str]) -> Shared:
    """The operator whose pool expert does the least damage to the cluster."""
    cluster = slot.cluster(numbers)
    found = []
    for name in operators:
        parts = OPERATORS[name].make(cluster)
        damage = {number: slot.damage(number, parts) for number in numbers}
        found.append(Shared(name, damage))
    return min(found, key=lambda shared: sum(shared.damage[n] * slot.members[n].weight for n in numbers))


def probe(slot: Slot, number: int) -> float:
    """Damage of a variant when its expert is plainly rounded to four bits."""
    parts = slot.members[number].matrices
    rounded = {part: round_nearest(m, _PROBE_BITS, _PROBE_GROUP).dense() for part, m in parts.items()}
    return slot.damage(number, rounded)


def measure_factors(slots: Sequence[Slot], ladder: Ladder, operator: str = "mean") -> Factors:
    """What codes do, measured in full on some slots of a layer."""
    own: dict[str, list[float]] = {}
    pool: dict[str, list[float]] = {}
    residual: dict[tuple[str, str], list[float]] = {}
    for slot in slots:
        probes = [max(probe(slot, number), _TINY) for number in range(len(slot.members))]
        for name, code in ladder.pool.items():
            if code is not None:
                for number, member in enumerate(slot.members):
                    coded = _dense(encode(member.matrices, code, member.moments))
                    own.setdefault(name, []).append(slot.damage(number, coded) / probes[number])
        if len(slot.members) > 1:
            _measure_shared(slot, probes, ladder, operator, pool, residual)
    return Factors(
        {PLAIN: 0.0, **{name: statistics.median(values) for name, values in own.items()}},
        {PLAIN: 0.0, **{name: max(0.0, statistics.median(values)) for name, values in pool.items()}},
        {names: min(1.0, statistics.median(values)) for names, values in residual.items()},
    )


def residual_shares(slot: Slot, number: int, stored: Parts, ladder: Ladder) -> dict[str, float]:
    """By residual code, what is left of the damage that a pool expert does to a member.

    Args:
        slot: Of the member.
        number: Its place in the slot.
        stored: The pool expert as stored, float32.
        ladder: The codes.
    """
    member, whole = slot.members[number], slot.damage(number, stored)
    missing = {part: member.matrices[part] - matrix for part, matrix in stored.items()}
    shares = {}
    for name, code in ladder.residuals.items():
        if code is not None:
            added = encode_residual(missing, code, member.moments)
            repaired = {part: matrix + added[part].dense() for part, matrix in stored.items()}
            shares[name] = slot.damage(number, repaired) / max(whole, _TINY)
    return shares


def slot_costs(
    partitions: Sequence[Sequence[Members]],
    shared: Mapping[Members, Shared],
    probes: Sequence[float],
    copies: Sequence[int],
    factors: Factors,
    ladder: Ladder,
    shapes: Shapes,
    plain_bytes: int,
) -> SlotCosts:
    """Bytes and damage of every choice.

    Args:
        partitions: Ways to divide the experts into those that share.
        shared: By cluster of several experts.
        probes: Of every expert, see `probe`.
        copies: How many slots have each expert.
        factors: Of the layer.
        ladder: The codes.
        shapes: Of an expert.
        plain_bytes: Of an expert as it is.
    """
    pool_bytes = {name: code_size(code, shapes, plain_bytes) for name, code in ladder.pool.items()}
    residual_bytes = {name: code_size(code, shapes, 0) for name, code in ladder.residuals.items()}
    costs: dict[Members, ClusterCosts] = {}
    for numbers in {numbers for partition in partitions for numbers in partition}:
        if len(numbers) == 1:
            damage = {numbers[0]: {(n, NONE): factors.own[n] * probes[numbers[0]] for n in pool_bytes}}
        else:
            damage = {
                number: _shared_damage(shared[numbers].damage[number], probes[number], factors, ladder)
                for number in numbers
            }
        of_member = {number: copies[number] for number in numbers}
        costs[numbers] = ClusterCosts(numbers, pool_bytes, residual_bytes, of_member, damage)
    return SlotCosts([[costs[numbers] for numbers in partition] for partition in partitions])


def _shared_damage(
    sharing: float, probed: float, factors: Factors, ladder: Ladder
) -> dict[tuple[str, str], float]:
    damage = {}
    for pool in ladder.pool:
        whole = sharing + factors.pool[pool] * probed
        for residual in ladder.residuals:
            left = 1.0 if residual == NONE else factors.residual[pool, residual]
            damage[pool, residual] = whole * left
    return damage


def _measure_shared(
    slot: Slot,
    probes: Sequence[float],
    ladder: Ladder,
    operator: str,
    pool: dict[str, list[float]],
    residual: dict[tuple[str, str], list[float]],
) -> None:
    everyone = tuple(range(len(slot.members)))
    centre = OPERATORS[operator].make(slot.cluster(everyone))
    moments = {part: add_moments([member.moments[part] for member in slot.members]) for part in centre}
    sharing = [slot.damage(number, centre) for number in everyone]
    for name, code in ladder.pool.items():
        coded = centre if code is None else _dense(encode(centre, code, moments))
        for number in everyone:
            whole = slot.damage(number, coded)
            if code is not None:
                pool.setdefault(name, []).append((whole - sharing[number]) / probes[number])
            for residual_name, left in residual_shares(slot, number, coded, ladder).items():
                residual.setdefault((name, residual_name), []).append(left)


def _dense(coded: Mapping[str, PackedMatrix]) -> dict[str, Tensor]:
    return {part: matrix.dense() for part, matrix in coded.items()}
