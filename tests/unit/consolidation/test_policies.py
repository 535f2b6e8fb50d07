"""What each policy decides, and that the budget holds."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moemerge.consolidation.clustering import equal_clusters, plan_joins
from moemerge.consolidation.policies import POLICIES, relative_errors
from tests.unit.consolidation.layers import EXPERT_BYTES, draw_layer, similarity_of, task_of

RATIOS = (None, 1.0, 1.3, 1.5, 2.0, 3.0)


def pool_sizes(decisions):
    return [len(layer) for layer in decisions]


def draw_layers(seed, variants=3, slots=4, count=2, noise=1.0):
    return [
        similarity_of(draw_layer(variants, slots, noise=noise, seed=100 * seed + index), index)
        for index in range(count)
    ]


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("ratio", RATIOS)
@given(seed=st.integers(0, 1000))
@settings(max_examples=10)
def test_every_expert_has_one_pool_expert_and_the_budget_holds(policy, ratio, seed):
    layers = draw_layers(seed)
    task = task_of(layers, ratio)
    decisions = POLICIES[policy](task)
    for decided, layer in zip(decisions, layers, strict=True):
        members = sorted(member for decision in decided for member in decision.members)
        assert members == list(range(layer.num_experts))
        assert all(set(decision.sources) <= set(decision.members) for decision in decided)
    if task.allowed_bytes is not None:
        assert sum(pool_sizes(decisions)) * EXPERT_BYTES <= task.allowed_bytes


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("ratio", RATIOS[1:])
def test_budget_is_used_up(policy, ratio):
    """Equal sizes, nothing equal: one more pool expert would not fit."""
    task = task_of(draw_layers(1, noise=0.1), ratio)
    total = sum(pool_sizes(POLICIES[policy](task)))
    group = 2 if policy == "pick" else 1  # a slot of the paper's way shares among all three or not at all
    assert (total + group) * EXPERT_BYTES > task.allowed_bytes or total == 24


@pytest.mark.parametrize("policy", POLICIES)
def test_exact_shares_equal_experts_only(policy):
    models = draw_layer(3, 4)
    models[1, 2] = models[0, 2]
    models[2, 3] = models[0, 1]
    layer = similarity_of(models)
    (decided,) = POLICIES[policy](task_of([layer], None))
    assert {decision.members for decision in decided} == set(equal_clusters(layer))
    assert not relative_errors(layer, decided).any()


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("ratio", RATIOS)
def test_copies_of_one_model_are_stored_once_whatever_the_budget(policy, ratio):
    models = draw_layer(1, 4).expand(3, 4, -1)
    layer = similarity_of(models)
    (decided,) = POLICIES[policy](task_of([layer], ratio))
    assert [decision.members for decision in decided] == [(slot, 4 + slot, 8 + slot) for slot in range(4)]
    assert not relative_errors(layer, decided).any()


@pytest.mark.parametrize("policy", ["medoid", "mean", "pick"])
@given(seed=st.integers(0, 1000))
@settings(max_examples=10)
def test_experts_of_different_slots_share_with_cluster_only(policy, seed):
    models = draw_layer(3, 4, seed=seed)
    models[1] = models[1][[1, 0, 3, 2]]
    (decided,) = POLICIES[policy](task_of([similarity_of(models)], 1.0))
    assert all(len({member % 4 for member in decision.members}) == 1 for decision in decided)


@pytest.mark.parametrize("policy", ["medoid", "mean"])
def test_equal_experts_in_different_slots_do_not_block_a_slot_from_sharing(policy):
    models = draw_layer(3, 4)
    models[1] = models[0][[1, 0, 3, 2]]
    task = task_of([similarity_of(models)], 1.0)
    assert sum(pool_sizes(POLICIES[policy](task))) <= 4


@given(seed=st.integers(0, 2000), variants=st.integers(2, 4))
@settings(max_examples=40)
def test_least_budget_is_reached_even_where_greedy_joins_get_stuck(seed, variants):
    layers = draw_layers(seed, variants=variants, slots=5, count=1, noise=3.0)
    (decided,) = POLICIES["cluster"](task_of(layers, 1.0))
    assert len(decided) == 5
    for decision in decided:
        owners = [layers[0].ref(member).variant for member in decision.members]
        assert len(owners) == len(set(owners))


def test_greedy_joins_do_get_stuck():
    """Otherwise the law above would say nothing about matching."""
    stuck = 0
    for seed in range(50):
        (layer,) = draw_layers(seed, variants=4, slots=5, count=1, noise=3.0)
        joins = plan_joins(layer.distances["relative_l2"], ~layer.same_variant_pairs(), equal_clusters(layer))
        stuck += layer.num_experts - len(list(joins)) > layer.num_slots
    assert stuck > 0


def test_within_goes_below_one_variant():
    layers = draw_layers(3)
    decisions = POLICIES["cluster"](task_of(layers, 0.5, within=True))
    assert sum(pool_sizes(decisions)) == 4


@pytest.mark.parametrize("policy", ["cluster", "medoid"])
def test_medoid_of_each_cluster_is_stored(policy):
    layers = draw_layers(4)
    for layer, decided in zip(layers, POLICIES[policy](task_of(layers, 1.0)), strict=True):
        distance = layer.distances["relative_l2"]
        for decision in decided:
            (source,) = decision.sources
            costs = [distance[member, list(decision.members)].sum() for member in decision.members]
            assert distance[source, list(decision.members)].sum() == pytest.approx(min(costs))


def test_mean_is_made_from_every_member():
    (decided,) = POLICIES["mean"](task_of(draw_layers(5, count=1), 1.0))
    assert all(decision.sources == decision.members for decision in decided)


def spread(layer, slot, variants=3, slots=4):
    members = [slots * variant + slot for variant in range(variants)]
    l2 = layer.distances["l2"]
    return sum(l2[i, j] for i in members for j in members if i < j)


def test_pick_ranks_slots_by_spread_and_lets_variants_take_turns():
    """Algorithm of Imani et al. 2025: the most similar slots share one variant's expert, in rotation."""
    layers = draw_layers(6)
    ranking = sorted(
        ((layer.layer, slot) for layer in layers for slot in range(4)),
        key=lambda position: spread(layers[position[0]], position[1]),
    )
    for ratio in (1.0, 1.5, 2.0):
        decisions = POLICIES["pick"](task_of(layers, ratio))
        num_own = int((ratio - 1) * 8 / 2)
        for rank, (layer, slot) in enumerate(ranking):
            decided = [d for d in decisions[layer] if d.members[0] % 4 == slot]
            if rank >= len(ranking) - num_own:
                assert sorted(d.members for d in decided) == [(slot,), (4 + slot,), (8 + slot,)]
            else:
                (decision,) = decided
                assert decision.members == (slot, 4 + slot, 8 + slot)
                assert decision.sources == (4 * (rank % 3) + slot,)


@pytest.mark.parametrize("policy", POLICIES)
def test_ties_are_broken_by_the_order_of_variants(policy):
    """All experts of a slot are equally far apart, so that only the order can decide."""
    corners = torch.eye(12, dtype=torch.float64).view(3, 4, 12)
    common = 10 * torch.randn(1, 4, 40, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    models = torch.cat([corners, common.expand(3, 4, 40)], dim=2)
    layer = similarity_of(models)
    (decided,) = POLICIES[policy](task_of([layer], 1.0))
    assert [decision.members for decision in decided] == [(slot, 4 + slot, 8 + slot) for slot in range(4)]
    if policy in ("cluster", "medoid"):
        assert [decision.sources for decision in decided] == [(slot,) for slot in range(4)]


@pytest.mark.parametrize("policy", POLICIES)
@given(seed=st.integers(0, 1000), noise=st.sampled_from([1e-6, 1e-3, 1.0]))
@settings(max_examples=10)
def test_relative_errors_equal_those_computed_from_the_tensors(policy, seed, noise):
    models = draw_layer(3, 4, noise=noise, seed=seed)
    layer = similarity_of(models)
    (decided,) = POLICIES[policy](task_of([layer], 1.3))
    rows = models.flatten(0, 1).numpy()
    expected = np.zeros(12)
    for decision in decided:
        stored = rows[list(decision.sources)].mean(axis=0)
        for member in decision.members:
            expected[member] = np.linalg.norm(rows[member] - stored) / np.linalg.norm(rows[member])
    found = relative_errors(layer, decided)
    # Distances of different slots are accurate to rounding of the norms only.
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-9)


def test_wide_experts_count_their_bytes():
    """One variant in float32: what stands for it takes twice the bytes of the others'."""
    layers = draw_layers(7, variants=2)
    expert_bytes = np.array([200] * 4 + [100] * 4)
    for policy in POLICIES.values():
        task = type(task_of(layers, 1.0))(layers=layers, expert_bytes=expert_bytes, allowed_bytes=1600)
        decisions = policy(task)
        total = sum(expert_bytes[list(d.sources)].max() for layer in decisions for d in layer)
        assert total <= 1600
