"""Joins in the order of their cost, within what may share."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moemerge.consolidation.clustering import equal_clusters, match_variants, medoid, plan_joins
from tests.unit.consolidation.layers import draw_layer, similarity_of


def joins_of(layer, allowed=None):
    allowed = ~layer.same_variant_pairs() if allowed is None else allowed
    return list(plan_joins(layer.distances["relative_l2"], allowed, equal_clusters(layer)))


def clusters_after(layer, joins):
    clusters = set(equal_clusters(layer))
    for join in joins:
        clusters -= {join.first, join.second}
        clusters.add(join.result)
    return clusters


@given(seed=st.integers(0, 10_000), variants=st.integers(2, 4), slots=st.integers(1, 5))
def test_experts_of_one_variant_never_share(seed, variants, slots):
    layer = similarity_of(draw_layer(variants, slots, noise=2.0, seed=seed))
    for join in joins_of(layer):
        owners = [layer.ref(member).variant for member in join.result]
        assert len(owners) == len(set(owners))


@given(seed=st.integers(0, 10_000))
def test_heights_rise_and_are_the_largest_distance_inside(seed):
    layer = similarity_of(draw_layer(3, 4, noise=1.0, seed=seed))
    joins = joins_of(layer)
    assert [join.height for join in joins] == sorted(join.height for join in joins)
    for join in joins:
        inside = layer.distances["relative_l2"][np.ix_(join.result, join.result)]
        assert join.height == pytest.approx(inside.max())


@pytest.mark.parametrize("order", list(itertools.permutations(range(4)))[1::5])
def test_permuted_siblings_join_into_exactly_one_cluster_per_slot(order):
    models = draw_layer(3, 4)
    models[1] = models[1][list(order)]
    layer = similarity_of(models)
    assert clusters_after(layer, joins_of(layer)) == {
        tuple(sorted((slot, 4 + order.index(slot), 8 + slot))) for slot in range(4)
    }


def test_equal_experts_are_one_cluster_from_the_start():
    models = draw_layer(2, 3)
    models[1, 2] = models[0, 0]
    assert set(equal_clusters(similarity_of(models))) == {(0, 5), (1,), (2,), (3,), (4,)}


def test_joining_everything_allowed_ends_in_one_cluster():
    layer = similarity_of(draw_layer(2, 3))
    everything = np.ones((6, 6), dtype=bool)
    assert clusters_after(layer, joins_of(layer, everything)) == {tuple(range(6))}


@given(seed=st.integers(0, 10_000), variants=st.integers(2, 4), slots=st.integers(1, 5))
def test_matching_gives_one_expert_of_every_variant_to_each_cluster(seed, variants, slots):
    layer = similarity_of(draw_layer(variants, slots, noise=2.0, seed=seed))
    clusters = match_variants(layer.distances["relative_l2"], ~layer.same_variant_pairs(), slots)
    assert len(clusters) == slots
    assert sorted(member for cluster in clusters for member in cluster) == list(range(variants * slots))
    for cluster in clusters:
        assert [layer.ref(member).variant for member in cluster] == list(layer.variants)


@given(seed=st.integers(0, 10_000))
def test_matching_keeps_to_what_may_share(seed):
    layer = similarity_of(draw_layer(3, 4, noise=5.0, seed=seed))
    clusters = match_variants(layer.distances["relative_l2"], layer.same_slot_pairs(), 4)
    assert clusters == [(slot, 4 + slot, 8 + slot) for slot in range(4)]


def test_matching_of_two_variants_is_the_cheapest_assignment():
    layer = similarity_of(draw_layer(2, 4, noise=3.0, seed=5))
    distance = layer.distances["relative_l2"]
    clusters = match_variants(distance, ~layer.same_variant_pairs(), 4)
    cost = sum(distance[first, second] for first, second in clusters)
    every = [sum(distance[s, 4 + order[s]] for s in range(4)) for order in itertools.permutations(range(4))]
    assert cost == pytest.approx(min(every))


def test_medoid_is_nearest_to_the_others_and_the_first_of_equals():
    distance = np.array([[0, 1, 5.0], [1, 0, 2], [5, 2, 0]])
    assert medoid(distance, (0, 1, 2)) == 1
    assert medoid(distance, (0, 2)) == 0
    assert medoid(np.zeros((3, 3)), (0, 1, 2)) == 0
