"""The base plus a share of what all members add to it."""

import torch
from torch import Tensor

from moemerge.consolidation.operators.cluster import Cluster

SCALE = 0.4


def task_arithmetic(cluster: Cluster) -> dict[str, Tensor]:
    """`base + 0.4 * sum of deltas`, the factor that the authors use for several tasks.

    Source: Ilharco et al. 2023 (arXiv:2212.04089).
    """
    merged = {}
    for part in cluster.parts:
        base, deltas = cluster.deltas(part)
        merged[part] = base + SCALE * torch.stack(deltas).sum(dim=0)
    return merged
