"""Policies: from measured similarity and a budget to the pool of every layer.

Pure. A policy is a function behind `POLICIES`; each gives, for every layer, clusters that cover all
experts and the operator that makes each cluster's pool expert.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from moemerge.consolidation.clustering import (
    Cluster,
    equal_clusters,
    match_variants,
    medoid,
    plan_joins,
)
from moemerge.similarity.matrices import LayerSimilarity


@dataclass(frozen=True, slots=True)
class Decision:
    """One pool expert: the experts (row indices) it stands for, and those it is made from."""

    members: Cluster
    sources: Cluster


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """What a policy decides on.

    Attributes:
        layers: Similarity of every routed layer.
        expert_bytes: [N] bytes of each expert, the same order in every layer.
        allowed_bytes: Limit for the sum over all pools; None shares only equal experts.
        within: Whether experts of one variant may share.
    """

    layers: Sequence[LayerSimilarity]
    expert_bytes: NDArray[np.int64]
    allowed_bytes: int | None
    within: bool = False


@dataclass(slots=True)
class _Pools:
    """Clusters of every layer while joins are carried out, and the bytes they take."""

    task: Task
    clusters: list[set[Cluster]] = field(init=False)

    def __post_init__(self) -> None:
        self.clusters = [set(equal_clusters(layer)) for layer in self.task.layers]

    def size(self, cluster: Cluster) -> int:
        """Bytes of the cluster's pool expert: its widest member's."""
        return int(self.task.expert_bytes[list(cluster)].max())

    def total(self) -> int:
        """Bytes of all pools."""
        return sum(self.size(cluster) for layer in self.clusters for cluster in layer)


def cluster_policy(task: Task) -> list[list[Decision]]:
    """Agglomerative clustering of all experts of a layer; the medoid is stored."""
    return _join_until_it_fits(task, _different_variants, _take_medoid)


def medoid_policy(task: Task) -> list[list[Decision]]:
    """As `cluster`, but only experts of one slot may share."""
    return _join_until_it_fits(task, _same_slot, _take_medoid)


def mean_policy(task: Task) -> list[list[Decision]]:
    """Only experts of one slot share; their mean is stored."""
    return _join_until_it_fits(task, _same_slot, _take_mean)


def pick_policy(task: Task) -> list[list[Decision]]:
    """The paper's way: the most similar slots share one variant's expert, variants taking turns.

    Slots of all layers are ranked by the sum of L2 distances over all pairs of variants. Slots that
    the budget does not force to share, the least similar ones, keep every variant's own expert.

    Source: Imani et al. 2025 (arXiv:2505.06481).
    """
    num_slots = task.layers[0].num_slots
    positions = [(layer, slot) for layer in range(len(task.layers)) for slot in range(num_slots)]
    ranking = sorted(positions, key=lambda position: (_slot_spread(task, *position), position))
    chosen: dict[tuple[int, int], list[Decision]] = {}
    for turn, (layer, slot) in enumerate(ranking):
        members = _slot_members(task, slot)
        chosen[layer, slot] = [Decision(members, (members[turn % len(members)],))]
    total = sum(_decided_bytes(task, decisions) for decisions in chosen.values())
    for position in reversed(ranking):
        own = _own_experts(task, *position)
        larger = total + _decided_bytes(task, own) - _decided_bytes(task, chosen[position])
        if task.allowed_bytes is None or larger <= task.allowed_bytes:
            chosen[position], total = own, larger
    return [
        _share_equal(task.layers[layer], [d for slot in range(num_slots) for d in chosen[layer, slot]])
        for layer in range(len(task.layers))
    ]


Policy = Callable[[Task], list[list[Decision]]]
CLUSTER = "cluster"
"""Decides where nothing is measured: for budgets that keep everything, and within variants."""
POLICIES: dict[str, Policy] = {
    CLUSTER: cluster_policy,
    "medoid": medoid_policy,
    "mean": mean_policy,
    "pick": pick_policy,
}


def relative_errors(similarity: LayerSimilarity, decisions: list[Decision]) -> NDArray[np.float64]:
    """[N] distance of each expert to its pool expert, over the expert's norm.

    The distance to a mean follows from the distances between its sources:
    `|W_i - mean|^2 = mean_j d_ij^2 - mean_jk d_jk^2 / 2`.
    """
    squared = similarity.distances["l2"] ** 2
    errors = np.zeros(similarity.num_experts)
    for decision in decisions:
        sources = list(decision.sources)
        spread = squared[np.ix_(sources, sources)].mean() / 2
        for member in decision.members:
            errors[member] = np.sqrt(max(squared[member, sources].mean() - spread, 0.0))
    return np.divide(errors, similarity.norms, out=np.zeros_like(errors), where=similarity.norms > 0)


def _join_until_it_fits(
    task: Task,
    may_share: Callable[[LayerSimilarity], NDArray[np.bool_]],
    make: Callable[[LayerSimilarity, Cluster], Decision],
) -> list[list[Decision]]:
    pools = _Pools(task)
    if task.allowed_bytes is not None:
        _carry_out_joins(pools, task, task.allowed_bytes, may_share)
        if not task.within:
            _match_what_is_stuck(pools, task, task.allowed_bytes, may_share)
    num_slots = task.layers[0].num_slots
    return [
        _share_equal(
            layer, [make(layer, cluster) for cluster in sorted(clusters, key=lambda c: _order(c, num_slots))]
        )
        for layer, clusters in zip(task.layers, pools.clusters, strict=True)
    ]


def _carry_out_joins(
    pools: _Pools, task: Task, allowed_bytes: int, may_share: Callable[[LayerSimilarity], NDArray[np.bool_]]
) -> None:
    joins = []
    for index, layer in enumerate(task.layers):
        allowed = may_share(layer)
        if task.within:
            allowed = allowed | layer.same_variant_pairs()
        distance = layer.distances["relative_l2"]
        joins += [
            (join.height, index, order, join)
            for order, join in enumerate(plan_joins(distance, allowed, equal_clusters(layer)))
        ]
    total = pools.total()
    for _, index, _, join in sorted(joins, key=lambda item: item[:3]):
        if total <= allowed_bytes:
            return
        pools.clusters[index] -= {join.first, join.second}
        pools.clusters[index].add(join.result)
        total += pools.size(join.result) - pools.size(join.first) - pools.size(join.second)


def _match_what_is_stuck(
    pools: _Pools, task: Task, allowed_bytes: int, may_share: Callable[[LayerSimilarity], NDArray[np.bool_]]
) -> None:
    """Bring layers whose clusters block each other to E clusters, as few layers as the budget asks."""
    for index, layer in enumerate(task.layers):
        if pools.total() <= allowed_bytes:
            return
        if len(pools.clusters[index]) > layer.num_slots:
            distance = layer.distances["relative_l2"]
            pools.clusters[index] = set(match_variants(distance, may_share(layer), layer.num_slots))


def _different_variants(layer: LayerSimilarity) -> NDArray[np.bool_]:
    return ~layer.same_variant_pairs()


def _same_slot(layer: LayerSimilarity) -> NDArray[np.bool_]:
    # Equal experts start in one cluster whatever their slots; another expert may join if it shares a
    # slot with every member.
    return layer.same_slot_pairs()


def _take_medoid(layer: LayerSimilarity, cluster: Cluster) -> Decision:
    return Decision(cluster, (medoid(layer.distances["relative_l2"], cluster),))


def _take_mean(layer: LayerSimilarity, cluster: Cluster) -> Decision:
    one_kind = len({layer.identity[member] for member in cluster}) == 1
    return Decision(cluster, cluster[:1] if one_kind else cluster)


def _share_equal(layer: LayerSimilarity, decisions: list[Decision]) -> list[Decision]:
    """Store copies of equal experts once, whatever the policy said."""
    copies: dict[int, Cluster] = {}
    result: list[Decision] = []
    for decision in decisions:
        if len(decision.sources) > 1:
            result.append(decision)
            continue
        label = int(layer.identity[decision.sources[0]])
        copies[label] = tuple(sorted(copies.get(label, ()) + decision.members))
    result += [Decision(members, (_source_of(layer, label, members),)) for label, members in copies.items()]
    return sorted(result, key=lambda decision: _order(decision.members, layer.num_slots))


def _source_of(layer: LayerSimilarity, label: int, members: Cluster) -> int:
    return next(member for member in members if layer.identity[member] == label)


def _order(cluster: Cluster, num_slots: int) -> tuple[int, int]:
    return min((member % num_slots, member) for member in cluster)


def _slot_members(task: Task, slot: int) -> Cluster:
    layer = task.layers[0]
    return tuple(range(slot, layer.num_experts, layer.num_slots))


def _slot_spread(task: Task, layer: int, slot: int) -> float:
    members = list(_slot_members(task, slot))
    return float(task.layers[layer].distances["l2"][np.ix_(members, members)].sum() / 2)


def _own_experts(task: Task, layer: int, slot: int) -> list[Decision]:
    identity = task.layers[layer].identity
    groups: dict[int, Cluster] = {}
    for member in _slot_members(task, slot):
        groups[int(identity[member])] = (*groups.get(int(identity[member]), ()), member)
    return [Decision(members, members[:1]) for members in groups.values()]


def _decided_bytes(task: Task, decisions: list[Decision]) -> int:
    return sum(int(task.expert_bytes[list(decision.sources)].max()) for decision in decisions)
