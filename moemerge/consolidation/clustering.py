"""Which experts of a layer become one, in the order in which joining them hurts least.

Pure. N experts in order (variant, slot).
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.cluster.hierarchy import linkage
from scipy.optimize import linear_sum_assignment
from scipy.spatial.distance import squareform

from moemerge.similarity.gram import Matrix
from moemerge.similarity.matrices import LayerSimilarity

Cluster = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Join:
    """Two clusters become one.

    Attributes:
        height: Largest distance between members of the result.
        first: Members of one.
        second: Members of the other.
    """

    height: float
    first: Cluster
    second: Cluster

    @property
    def result(self) -> Cluster:
        """Members of the joined cluster, sorted."""
        return tuple(sorted(self.first + self.second))


def equal_clusters(similarity: LayerSimilarity) -> list[Cluster]:
    """Bytewise equal experts together, all others alone: the lossless start."""
    groups: dict[int, list[int]] = {}
    for index, label in enumerate(similarity.identity.tolist()):
        groups.setdefault(label, []).append(index)
    return [tuple(members) for members in groups.values()]


def plan_joins(distance: Matrix, allowed: NDArray[np.bool_], start: list[Cluster]) -> Iterator[Join]:
    """Agglomerative clustering with complete linkage, from the cheapest join on.

    Complete linkage keeps constraints: a cluster's height is the distance of its worst pair, so a
    pair that may not share is given a distance beyond all others and joins containing one are left out.

    Args:
        distance: [N, N].
        allowed: [N, N]; whether two experts may share.
        start: Clusters to begin with.

    Yields:
        Joins by rising height.
    """
    if len(start) < 2:
        return
    members = [np.array(cluster) for cluster in start]
    forbidden = _forbidden(distance)
    between = np.zeros((len(start), len(start)))
    for i, first in enumerate(members):
        for j, second in enumerate(members[:i]):
            pair = np.ix_(first, second)
            height = float(distance[pair].max()) if allowed[pair].all() else forbidden
            between[i, j] = between[j, i] = height
    clusters: list[Cluster] = list(start)
    for left, right, height, _ in linkage(squareform(between), method="complete"):
        join = Join(float(height), clusters[int(left)], clusters[int(right)])
        clusters.append(join.result)
        if height < forbidden:
            yield join


def match_variants(distance: Matrix, allowed: NDArray[np.bool_], num_slots: int) -> list[Cluster]:
    """Exactly E clusters with one expert of every variant each.

    Variants are added in order, each by the assignment of least summed cost to the clusters so far.
    Greedy joining can end with more clusters, none of which may join; this cannot.

    Args:
        distance: [N, N].
        allowed: [N, N]; whether two experts may share. Experts of one slot always may.
        num_slots: E.
    """
    clusters: list[list[int]] = [[slot] for slot in range(num_slots)]
    constrained = np.where(allowed, distance, _forbidden(distance))
    for first in range(num_slots, len(distance), num_slots):
        added = range(first, first + num_slots)
        cost = np.stack([constrained[np.ix_(cluster, added)].max(axis=0) for cluster in clusters])
        for row, column in zip(*linear_sum_assignment(cost), strict=True):
            clusters[row].append(first + int(column))
    return [tuple(cluster) for cluster in clusters]


def medoid(distance: Matrix, members: Cluster) -> int:
    """The member with the least summed distance to the others; the first of equals."""
    inside = distance[np.ix_(members, members)].sum(axis=1)
    return members[int(np.argmin(inside))]


def _forbidden(distance: Matrix) -> float:
    """A cost beyond that of any assignment without forbidden pairs."""
    return len(distance) * (float(distance.max()) + 1)
