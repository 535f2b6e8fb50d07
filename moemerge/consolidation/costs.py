"""What every choice for a slot costs, measured on calibration inputs.

Damage of a variant is the gated replacement error of its experts over the energy of its layer's output.
Sharing is measured for every slot and every cluster that may share; plain rounding to four bits for every
expert. What codes add, and what residuals take away, are multiples of these: see `factors`.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from moemerge.consolidation.allocation import ClusterCosts, SlotCosts
from moemerge.consolidation.factors import Factors
from moemerge.consolidation.ladder import NONE, Ladder, Shapes, code_size, residual_size
from moemerge.consolidation.operators import OPERATORS
from moemerge.consolidation.slot import Members, Slot

_RACE_INPUTS = 64
"""Of each variant, that operators are compared on: 128 choose alike, what is kept moves by 0.003."""


@dataclass(frozen=True, slots=True)
class Shared:
    """A cluster's best pool expert, uncoded.

    Attributes:
        operator: Name of the operator that made it.
        damage: Of every member.
    """

    operator: str
    damage: Mapping[int, float]


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


def slot_costs(
    partitions: Sequence[Sequence[Members]],
    shared: Mapping[Members, Shared],
    probes: Sequence[float],
    copies: Sequence[int],
    factors: Sequence[Factors],
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
        factors: Of every expert.
        ladder: The codes.
        shapes: Of an expert.
        plain_bytes: Of an expert as it is.
    """
    pool_bytes = {name: code_size(code, shapes, plain_bytes) for name, code in ladder.pool.items()}
    residual_bytes = {name: residual_size(code, shapes) for name, code in ladder.residuals.items()}
    costs: dict[Members, ClusterCosts] = {}
    for numbers in {numbers for partition in partitions for numbers in partition}:
        if len(numbers) == 1:
            own, probed = factors[numbers[0]].own, probes[numbers[0]]
            damage = {numbers[0]: {(name, NONE): own[name] * probed for name in pool_bytes}}
        else:
            damage = {
                number: _shared_damage(
                    shared[numbers].damage[number], probes[number], factors[number], ladder
                )
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
