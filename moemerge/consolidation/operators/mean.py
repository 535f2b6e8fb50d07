"""The plain average, and averages with weights."""

from collections.abc import Sequence

import torch
from torch import Tensor

from moemerge.consolidation.operators.cluster import Cluster


def mean(cluster: Cluster) -> dict[str, Tensor]:
    """Every member counts the same; summed in float32 and divided once."""
    return {part: sum_of(cluster.stack(part)) / len(cluster.members) for part in cluster.parts}


def weighted_mean(cluster: Cluster, weights: Sequence[float]) -> dict[str, Tensor]:
    """Members count by weights, which are normalised; all alike when they are all zero."""
    total = sum(weights)
    shares = [weight / total for weight in weights] if total > 0 else [1 / len(weights)] * len(weights)
    return {
        part: sum_of([share * m for share, m in zip(shares, cluster.stack(part), strict=True)])
        for part in cluster.parts
    }


def sum_of(matrices: Sequence[Tensor]) -> Tensor:
    """Of all matrices, in their order."""
    total = torch.zeros_like(matrices[0])
    for matrix in matrices:
        total += matrix
    return total
