"""What every choice for a slot costs, measured on calibration inputs.

Damage of a variant is the gated replacement error of its experts over the energy of its layer's output.
Sharing is measured for every slot and every cluster that may share. What codes add is measured for a few
experts of a layer, as a multiple of the error of plain rounding to four bits, which is measured for every
expert: the multiples hardly differ within a layer, and encoding every expert in every code would cost more
than the merge. Codes that differ in bits alone follow from one of them: a bit more quarters the damage, as
it does for any fine quantiser (Gersho and Gray 1992, Vector quantization, 5.6).

Shapes: S inputs, D model width.
"""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from moemerge.bundle.manifest import CodeSpec
from moemerge.consolidation.allocation import ClusterCosts, SlotCosts
from moemerge.consolidation.codes.moments import add_part_moments
from moemerge.consolidation.codes.rounding import round_nearest
from moemerge.consolidation.forward import replacement_error, run_expert
from moemerge.consolidation.ladder import (
    NONE,
    PLAIN,
    Ladder,
    Shapes,
    code_size,
    encode,
    encode_residual,
    residual_size,
)
from moemerge.consolidation.operators import OPERATORS, Cluster, Member
from moemerge.models.packed import Matrix, effective

_PROBE_BITS, _PROBE_GROUP = 4, 64
_RACE_INPUTS = 128
# Codes from which those of other bits follow.
_MEASURED_POOL_BITS = (4, 8)
_MEASURED_RESIDUAL_BITS = (1, 2)
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

    def damage(
        self, number: int, parts: Parts, num_inputs: int | None = None, instead_of: Parts | None = None
    ) -> float:
        """Damage of a variant when these parts stand for its expert, on all inputs or on the first ones.

        Args:
            number: Of the variant.
            parts: What stands there.
            num_inputs: How many inputs; None for all.
            instead_of: What is to be stood for, if it is not the expert itself.
        """
        judge, some = self.judges[number], slice(num_inputs)
        inputs_SD, gates_S = judge.inputs_SD[some], judge.gates_S[some]
        own = judge.own if instead_of is None else run_expert(instead_of, judge.activation, inputs_SD)
        error = replacement_error(parts, judge.activation, inputs_SD, gates_S, own.output_SD[some])
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
        of_sharing: By residual code, what it leaves of the damage of sharing.
        of_rounding: What it leaves of the damage that a code does.
    """

    own: Mapping[str, float]
    pool: Mapping[str, float]
    of_sharing: Mapping[str, float]
    of_rounding: Mapping[str, float]


def race(slot: Slot, numbers: Members, operators: Iterable[str]) -> Shared:
    """The operator whose pool expert does the least damage to the cluster, on a part of its inputs."""
    cluster = slot.cluster(numbers)
    least = math.inf
    for name in operators:
        parts = OPERATORS[name].make(cluster)
        damage = sum(slot.members[n].weight * slot.damage(n, parts, _RACE_INPUTS) for n in numbers)
        if damage < least:
            least, winner, best = damage, name, parts
    return Shared(winner, {n: slot.damage(n, best) for n in numbers})


def probe(slot: Slot, number: int) -> float:
    """Damage of a variant when its expert is plainly rounded to four bits."""
    member = slot.members[number]
    rounded = dict(member.matrices)
    for part in member.moments:
        matrix = member.matrices[part]
        rounded[part] = round_nearest(matrix, _PROBE_BITS, _PROBE_GROUP, search=False).dense()
    return slot.damage(number, rounded)


def measure_factors(slots: Sequence[Slot], ladder: Ladder, operator: str = "mean") -> Factors:
    """What codes do, measured on some slots of a layer.

    Each time on one expert: in turn for own ones, for shared ones the one in the middle by what sharing does.
    """
    seen = _Seen()
    for turn, slot in enumerate(slots):
        number = turn % len(slot.members)
        _measure_own(slot, number, ladder, seen)
        if len(slot.members) > 1:
            _measure_shared(slot, ladder, operator, seen)
    return Factors(
        {PLAIN: 0.0, **_filled(seen.own, ladder.pool)},
        {PLAIN: 0.0, **_filled(seen.pool, ladder.pool)},
        _filled(seen.of_sharing, ladder.residuals),
        _filled(seen.of_rounding, ladder.residuals),
    )


def residual_shares(
    slot: Slot, number: int, stored: Parts, residuals: Mapping[str, CodeSpec | None]
) -> dict[str, float]:
    """By residual code, what is left of the damage that a pool expert does to a member.

    Args:
        slot: Of the member.
        number: Its place in the slot.
        stored: The pool expert as stored, float32.
        residuals: The codes; one that is None leaves everything and is not told.
    """
    member, whole = slot.members[number], slot.damage(number, stored)
    missing = {part: member.matrices[part] - matrix for part, matrix in stored.items()}
    measured = _measured(residuals, _MEASURED_RESIDUAL_BITS)
    shares = {}
    for name, code in measured.items():
        added = encode_residual(missing, code, member.moments)
        repaired = {**stored, **{part: stored[part] + matrix.dense() for part, matrix in added.items()}}
        shares[name] = [min(1.0, slot.damage(number, repaired) / max(whole, _TINY))]
    return _filled(shares, residuals)


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
    residual_bytes = {name: residual_size(code, shapes) for name, code in ladder.residuals.items()}
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
        rounding = factors.pool[pool] * probed
        damage[pool, NONE] = sharing + rounding
        for residual, left in factors.of_sharing.items():
            damage[pool, residual] = left * sharing + factors.of_rounding[residual] * rounding
    return damage


@dataclass(frozen=True, slots=True)
class _Seen:
    """Every measurement, by code, before medians are taken; see `Factors`."""

    own: dict[str, list[float]] = field(default_factory=dict)
    pool: dict[str, list[float]] = field(default_factory=dict)
    of_sharing: dict[str, list[float]] = field(default_factory=dict)
    of_rounding: dict[str, list[float]] = field(default_factory=dict)


def _measure_own(slot: Slot, number: int, ladder: Ladder, seen: _Seen) -> None:
    member, probed = slot.members[number], max(probe(slot, number), _TINY)
    coarsest, most = None, 0.0
    for name, code in _measured(ladder.pool, _MEASURED_POOL_BITS).items():
        coded = _dense(encode(member.matrices, code, member.moments))
        damage = slot.damage(number, coded)
        seen.own.setdefault(name, []).append(damage / probed)
        if damage > most:
            coarsest, most = coded, damage
    if coarsest is not None:
        _append(seen.of_rounding, residual_shares(slot, number, coarsest, ladder.residuals))


def _measure_shared(slot: Slot, ladder: Ladder, operator: str, seen: _Seen) -> None:
    centre = OPERATORS[operator].make(slot.cluster(tuple(range(len(slot.members)))))
    moments = add_part_moments([member.moments for member in slot.members])
    # Operators that take a member harm that one not at all, and whom sharing harms most is not typical.
    by_harm = sorted(range(len(slot.members)), key=lambda n: slot.damage(n, centre))
    number = by_harm[len(by_harm) // 2]
    probed = max(probe(slot, number), _TINY)
    for name, code in _measured(ladder.pool, _MEASURED_POOL_BITS).items():
        coded = _dense(encode(centre, code, moments))
        # Where sharing does far more than rounding, the difference of two damages is chance.
        seen.pool.setdefault(name, []).append(slot.damage(number, coded, instead_of=centre) / probed)
    _append(seen.of_sharing, residual_shares(slot, number, centre, ladder.residuals))


def _append(seen: dict[str, list[float]], found: Mapping[str, float]) -> None:
    for name, value in found.items():
        seen.setdefault(name, []).append(value)


def _measured(codes: Mapping[str, CodeSpec | None], bits: Sequence[int]) -> dict[str, CodeSpec]:
    """The codes that others follow from."""
    return {
        name: code
        for name, code in codes.items()
        if code is not None and (code.kind != "bits" or code.bits in bits)
    }


def _filled(seen: Mapping[str, Sequence[float]], codes: Mapping[str, CodeSpec | None]) -> dict[str, float]:
    """Medians of what was measured, and what follows for codes that were not; empty when nothing was."""
    found = {name: statistics.median(values) for name, values in seen.items()}
    for name, code in codes.items():
        if code is None or name in found or not seen:
            continue
        nearest = min(
            (other for other in seen if _differ_in_bits(codes[other], code)),
            key=lambda other: abs(_bits(codes[other]) - code.bits),
        )
        found[name] = found[nearest] * 4.0 ** (_bits(codes[nearest]) - code.bits)
    return {name: found[name] for name in codes if name in found}


def _differ_in_bits(one: CodeSpec | None, other: CodeSpec) -> bool:
    return one is not None and (one.kind, one.group) == (other.kind, other.group)


def _bits(code: CodeSpec | None) -> int:
    assert code is not None
    return code.bits


def _dense(coded: Mapping[str, Matrix]) -> dict[str, Tensor]:
    return {part: effective(matrix, None, torch.float32) for part, matrix in coded.items()}
