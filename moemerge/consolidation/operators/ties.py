"""Trim, elect signs, and average what agrees."""

import torch
from torch import Tensor

from moemerge.consolidation.operators.cluster import Cluster

DENSITY = 0.2


def ties(cluster: Cluster) -> dict[str, Tensor]:
    """Of every delta the largest fifth of its entries stays; the sign with more mass wins each entry.

    Trimmed per expert and part: over stacked experts, those with small deltas would be wiped out.

    Source: Yadav et al. 2023, TIES-Merging (arXiv:2306.01708), with its density of 0.2 and factor 1.
    """
    merged = {}
    for part in cluster.parts:
        base, deltas = cluster.deltas(part)
        merged[part] = base + elect(torch.stack([trim(delta, DENSITY) for delta in deltas]))
    return merged


def trim(delta: Tensor, density: float) -> Tensor:
    """The entries of largest magnitude, that share of all; zero elsewhere."""
    kept = max(1, round(density * delta.numel()))
    least = delta.abs().flatten().kthvalue(delta.numel() - kept + 1).values
    return torch.where(delta.abs() >= least, delta, 0.0)


def elect(deltas_KND: Tensor) -> Tensor:
    """Mean of the entries that agree with the sign of the sum; zero where there are none."""
    sign_ND = deltas_KND.sum(dim=0).sign()
    agrees_KND = (deltas_KND.sign() == sign_ND) & (deltas_KND != 0)
    count_ND = agrees_KND.sum(dim=0).clamp_min(1)
    return (deltas_KND * agrees_KND).sum(dim=0) / count_ND
