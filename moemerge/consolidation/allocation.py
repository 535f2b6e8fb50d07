"""Spend a byte budget where it buys most: rate and distortion over all slots of all layers together.

Pure. A slot's options are given by what every choice in it costs; a slot's own trade-off is the lower
convex hull of bytes and damage, and the budget goes, step by step along all hulls, to the steeper step.

Sources: Shoham and Gersho 1988, efficient bit allocation for an arbitrary set of quantizers; Everett 1963,
generalized Lagrange multiplier method.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

Choice = str
"""Name of a rung: of a pool expert's code, or of a residual."""


@dataclass(frozen=True, slots=True)
class ClusterCosts:
    """Experts that may share a pool expert, and what that costs.

    Attributes:
        members: Experts of the slot, by number.
        pool_bytes: Of the pool expert in each code.
        residual_bytes: Of one residual, by code.
        copies: By member, how many slots have it; each of them stores its own residual.
        damage: Of a member by pool code and residual; a cluster of one needs no residual.
    """

    members: tuple[int, ...]
    pool_bytes: Mapping[Choice, int]
    residual_bytes: Mapping[Choice, int]
    copies: Mapping[int, int]
    damage: Mapping[int, Mapping[tuple[Choice, Choice], float]]


@dataclass(frozen=True, slots=True)
class SlotCosts:
    """What a slot may do: one of several partitions of its experts into clusters."""

    partitions: Sequence[Sequence[ClusterCosts]]


@dataclass(frozen=True, slots=True)
class Encoding:
    """What a cluster does: its pool expert's code, and the residual of each member."""

    members: tuple[int, ...]
    pool: Choice
    residuals: tuple[Choice, ...]


@dataclass(frozen=True, slots=True)
class Point:
    """A choice for a slot.

    Attributes:
        num_bytes: What it takes.
        damage: Weighted sum over the slot's experts.
        by_member: Damage of each of them, unweighted.
        encodings: The choice.
    """

    num_bytes: int
    damage: float
    by_member: tuple[float, ...]
    encodings: tuple[Encoding, ...]


@dataclass(frozen=True, slots=True)
class Allocation:
    """A choice for every slot.

    Attributes:
        points: In the order of the slots.
        price: Damage per byte of the last step that was taken; 0 when nothing more can be bought.
    """

    points: tuple[Point, ...]
    price: float

    @property
    def num_bytes(self) -> int:
        """What all of it takes."""
        return sum(point.num_bytes for point in self.points)


def slot_hull(costs: SlotCosts, weights: Sequence[float]) -> list[Point]:
    """The lower convex hull of a slot's choices, fewest bytes first.

    Args:
        costs: Of the slot.
        weights: What damage of each of the slot's experts counts.
    """
    points = [point for partition in costs.partitions for point in _partition_hull(partition, weights)]
    return convex_hull(points)


def allocate(hulls: Sequence[Sequence[Point]], allowed_bytes: int | None) -> Allocation:
    """Start every slot at its fewest bytes, and buy the steepest steps until the budget is spent.

    A step that does not fit is passed over, and with it the rest of its slot; cheaper ones of other slots
    are still taken.

    Args:
        hulls: Of every slot, as `slot_hull` gives them.
        allowed_bytes: The budget; None buys everything that lessens damage.

    Returns:
        The choice; more than `allowed_bytes` only when even the fewest bytes are.
    """
    places = [0] * len(hulls)
    total = sum(hull[0].num_bytes for hull in hulls)
    price = math.inf
    for falling_slope, slot, place in steepest_steps(hulls):
        added = hulls[slot][place].num_bytes - hulls[slot][place - 1].num_bytes
        if places[slot] != place - 1 or (allowed_bytes is not None and total + added > allowed_bytes):
            continue
        places[slot], total, price = place, total + added, -falling_slope
    return Allocation(tuple(hull[place] for hull, place in zip(hulls, places, strict=True)), price)


def steepest_steps(hulls: Sequence[Sequence[Point]]) -> list[tuple[float, int, int]]:
    """Every step along every hull, the steepest first: its slope, negative, its hull, and where it leads."""
    return sorted(
        (-_slope(before, after), number, place + 1)
        for number, hull in enumerate(hulls)
        for place, (before, after) in enumerate(pairwise(hull))
    )


def convex_hull(points: Sequence[Point]) -> list[Point]:
    """Points on the lower convex hull, by bytes rising and damage falling."""
    hull: list[Point] = []
    for point in sorted(points, key=lambda p: (p.num_bytes, p.damage)):
        if hull and point.damage >= hull[-1].damage:
            continue
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) <= _slope(hull[-2], point):
            hull.pop()
        hull.append(point)
    return hull


def _slope(before: Point, after: Point) -> float:
    """Damage that a byte saves."""
    return (before.damage - after.damage) / (after.num_bytes - before.num_bytes)


def _partition_hull(partition: Sequence[ClusterCosts], weights: Sequence[float]) -> list[Point]:
    """Hull of choices of clusters that are independent of each other: the sum of their hulls."""
    hulls = [_cluster_hull(cluster, weights) for cluster in partition]
    return _sum_of_hulls(hulls, len(weights))


def _cluster_hull(cluster: ClusterCosts, weights: Sequence[float]) -> list[Point]:
    points = []
    for pool, pool_bytes in cluster.pool_bytes.items():
        members = [
            convex_hull(
                [
                    _member_point(cluster, member, pool, residual, weights)
                    for residual in cluster.residual_bytes
                    if (pool, residual) in cluster.damage[member]
                ]
            )
            for member in cluster.members
        ]
        for point in _sum_of_hulls(members, len(weights)):
            residuals = tuple(encoding.residuals[0] for encoding in point.encodings)
            points.append(
                Point(
                    point.num_bytes + pool_bytes,
                    point.damage,
                    point.by_member,
                    (Encoding(cluster.members, pool, residuals),),
                )
            )
    return convex_hull(points)


def _member_point(
    cluster: ClusterCosts, member: int, pool: Choice, residual: Choice, weights: Sequence[float]
) -> Point:
    damage = cluster.damage[member][pool, residual]
    by_member = tuple(damage if number == member else 0.0 for number in range(len(weights)))
    encoding = Encoding((member,), pool, (residual,))
    num_bytes = cluster.copies[member] * cluster.residual_bytes[residual]
    return Point(num_bytes, weights[member] * damage, by_member, (encoding,))


def _sum_of_hulls(hulls: Sequence[Sequence[Point]], num_members: int) -> list[Point]:
    """Hull of the sums of one point of each: all at their fewest bytes, then the steepest step each time."""
    places = [0] * len(hulls)
    points = [_added(hulls, places, num_members)]
    for _, number, place in steepest_steps(hulls):
        places[number] = place
        points.append(_added(hulls, places, num_members))
    return points


def _added(hulls: Sequence[Sequence[Point]], places: Sequence[int], num_members: int) -> Point:
    chosen = [hull[place] for hull, place in zip(hulls, places, strict=True)]
    return Point(
        sum(point.num_bytes for point in chosen),
        math.fsum(point.damage for point in chosen),
        tuple(math.fsum(point.by_member[number] for point in chosen) for number in range(num_members)),
        tuple(encoding for point in chosen for encoding in point.encodings),
    )
