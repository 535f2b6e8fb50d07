"""Drop most of every delta at random, and scale up the rest."""

import torch
from torch import Tensor

from moemerge.consolidation.operators.cluster import Cluster
from moemerge.consolidation.operators.ties import elect

DROPPED = 0.5


def dare(cluster: Cluster) -> dict[str, Tensor]:
    """Half of the entries of every delta are dropped, the others doubled; then signs as in TIES.

    Source: Yu et al. 2024, DARE (arXiv:2311.03099), combined with TIES as its authors do.
    """
    random = torch.Generator().manual_seed(cluster.seed)
    merged = {}
    for part in cluster.parts:
        base, deltas = cluster.deltas(part)
        kept = [torch.rand(delta.shape, generator=random) >= DROPPED for delta in deltas]
        scaled = [delta * mask / (1 - DROPPED) for delta, mask in zip(deltas, kept, strict=True)]
        merged[part] = base + elect(torch.stack(scaled))
    return merged
