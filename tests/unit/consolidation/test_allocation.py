"""Bytes against damage: hulls, and how a budget is spent along them."""

import itertools
import random

import pytest

from moemerge.consolidation.allocation import (
    ClusterCosts,
    Point,
    SlotCosts,
    allocate,
    convex_hull,
    slot_hull,
)

SEEDS = range(40)


def draw_points(moments, count=6):
    """Whole numbers, so that sums and comparisons are exact."""
    points = [(moments.randrange(1, 30), float(moments.randrange(100))) for _ in range(count)]
    return [Point(num_bytes, damage, (damage,), ()) for num_bytes, damage in points]


def draw_slots(seed, count=4):
    moments = random.Random(seed)
    return [draw_points(moments) for _ in range(count)]


def damage_of(points):
    return sum(point.damage for point in points)


def bytes_of(points):
    return sum(point.num_bytes for point in points)


def least_damage(slots, allowed):
    """By trying every choice; None when nothing fits."""
    fitting = [chosen for chosen in itertools.product(*slots) if bytes_of(chosen) <= allowed]
    return min(map(damage_of, fitting), default=None)


def least_damage_by_table(slots, allowed):
    """The same, by a table of bytes for more slots than can be tried out."""
    table = {0: 0.0}
    for points in slots:
        added = {}
        for spent, damage in table.items():
            for point in points:
                place, value = spent + point.num_bytes, damage + point.damage
                if place <= allowed and value < added.get(place, float("inf")):
                    added[place] = value
        table = added
    return min(table.values(), default=None)


def cheapest_at(slots, price):
    """Every slot for itself: the choice of least damage and bytes at that price for a byte."""
    return [min(points, key=lambda p: (p.damage + price * p.num_bytes, p.num_bytes)) for points in slots]


@pytest.mark.parametrize("seed", SEEDS)
def test_hull_falls_ever_less_steeply_and_no_point_lies_below_it(seed):
    points = draw_points(random.Random(seed), count=12)
    hull = convex_hull(points)
    assert hull[0].num_bytes == min(point.num_bytes for point in points)
    assert hull[-1].damage == min(point.damage for point in points)
    slopes = [(b.damage - a.damage) / (b.num_bytes - a.num_bytes) for a, b in itertools.pairwise(hull)]
    assert all(slope < 0 for slope in slopes)
    assert all(one < other for one, other in itertools.pairwise(slopes))
    for point in points:
        for (before, after), slope in zip(itertools.pairwise(hull), slopes, strict=True):
            if before.num_bytes <= point.num_bytes <= after.num_bytes:
                on_line = before.damage + slope * (point.num_bytes - before.num_bytes)
                assert point.damage >= on_line - 1e-9
    assert convex_hull(hull) == hull
    assert convex_hull(list(reversed(points))) == hull


@pytest.mark.parametrize("seed", SEEDS)
def test_choice_is_never_better_than_the_best_and_stays_within_budget(seed):
    slots = draw_slots(seed)
    hulls = [convex_hull(points) for points in slots]
    least_bytes = sum(hull[0].num_bytes for hull in hulls)
    for allowed in range(least_bytes, least_bytes + 60, 3):
        chosen = allocate(hulls, allowed)
        assert chosen.num_bytes <= allowed
        best = least_damage(slots, allowed)
        assert best == least_damage_by_table(slots, allowed)
        assert damage_of(chosen.points) >= best


@pytest.mark.parametrize("seed", SEEDS)
def test_choice_is_the_best_where_the_budget_falls_on_a_point_of_the_whole_hull(seed):
    slots = draw_slots(seed, count=12)
    hulls = [convex_hull(points) for points in slots]
    for price in (0.013, 0.37, 1.1, 2.9, 7.3, 20.7, 1000.0):
        best = cheapest_at(slots, price)
        chosen = allocate(hulls, bytes_of(best))
        assert damage_of(chosen.points) == damage_of(best) == least_damage_by_table(slots, bytes_of(best))


@pytest.mark.parametrize("seed", SEEDS)
def test_more_budget_never_means_more_damage(seed):
    hulls = [convex_hull(points) for points in draw_slots(seed, count=8)]
    damages = [damage_of(allocate(hulls, allowed).points) for allowed in range(8, 240)]
    assert all(one >= other for one, other in itertools.pairwise(damages))
    assert damages[-1] == damage_of(allocate(hulls, None).points) == sum(hull[-1].damage for hull in hulls)


def test_budget_below_the_least_gives_the_least():
    hulls = [convex_hull(points) for points in draw_slots(0)]
    assert allocate(hulls, 0).points == tuple(hull[0] for hull in hulls)


def test_price_is_that_of_the_last_step():
    hull = [Point(1, 10.0, (10.0,), ()), Point(2, 4.0, (4.0,), ()), Point(4, 0.0, (0.0,), ())]
    assert allocate([hull], 2).price == 6.0
    assert allocate([hull], None).price == 2.0


def draw_cluster(moments, members):
    pool = {name: moments.randrange(4, 20) for name in ("plain", "4-bit")}
    residuals = {"none": 0, "1-bit": moments.randrange(1, 4), "2-bit": moments.randrange(4, 8)}
    damage = {
        member: {
            (one, other): float(moments.randrange(50))
            for one in pool
            for other in (residuals if len(members) > 1 else ["none"])
        }
        for member in members
    }
    copies = {member: moments.randrange(1, 3) for member in members}
    return ClusterCosts(members, pool, residuals, copies, damage)


def every_choice(costs, weights):
    for partition in costs.partitions:
        ways = [
            [(cluster, pool, residuals) for pool in cluster.pool_bytes for residuals in combined(cluster)]
            for cluster in partition
        ]
        for chosen in itertools.product(*ways):
            num_bytes, damage = 0, 0.0
            for cluster, pool, residuals in chosen:
                pairs = list(zip(cluster.members, residuals, strict=True))
                num_bytes += cluster.pool_bytes[pool]
                num_bytes += sum(cluster.copies[m] * cluster.residual_bytes[r] for m, r in pairs)
                damage += sum(weights[m] * cluster.damage[m][pool, r] for m, r in pairs)
            yield Point(num_bytes, damage, (), ())


def combined(cluster):
    names = cluster.residual_bytes if len(cluster.members) > 1 else ["none"]
    return itertools.product(names, repeat=len(cluster.members))


@pytest.mark.parametrize("seed", SEEDS)
def test_hull_of_a_slot_is_that_of_all_its_choices(seed):
    moments = random.Random(seed)
    weights = [1.0, 2.0, 4.0]
    partitions = [[(0,), (1,), (2,)], [(0, 2), (1,)], [(0, 1, 2)]]
    costs = SlotCosts([[draw_cluster(moments, members) for members in one] for one in partitions])
    hull = slot_hull(costs, weights)
    expected = convex_hull(list(every_choice(costs, weights)))
    assert [(p.num_bytes, p.damage) for p in hull] == [(p.num_bytes, p.damage) for p in expected]
    for point in hull:
        assert sorted(m for encoding in point.encodings for m in encoding.members) == [0, 1, 2]
        assert sum(w * d for w, d in zip(weights, point.by_member, strict=True)) == point.damage
