"""Regression mean: the matrix whose products are closest to every member's on that member's inputs."""

import torch
from torch import Tensor

from moemerge.consolidation.codes.moments import Moment, add_moments
from moemerge.consolidation.operators.cluster import Cluster


def regmean(cluster: Cluster) -> dict[str, Tensor]:
    """`(sum W_i G_i) (sum G_i)^-1` for every part, with gate-weighted moments G of its inputs.

    Moments are damped, which draws the result towards the plain mean where inputs say little.

    Source: Jin et al. 2023, RegMean (arXiv:2212.09849).
    """
    return {part: regression_mean(cluster, part) for part in cluster.parts}


def regression_mean(cluster: Cluster, part: str) -> Tensor:
    """The regression mean of one part."""
    matrices = cluster.stack(part)
    moments = [member.moments[part] for member in cluster.members]
    if add_moments(moments).is_empty:
        return torch.stack(matrices).mean(dim=0)
    return solve(matrices, [_evenly_damped(moment, moments) for moment in moments])


def solve(matrices: list[Tensor], moments: list[Moment]) -> Tensor:
    """`(sum W_i G_i) (sum G_i)^-1`, block by block of columns."""
    pieces = []
    for number, columns in enumerate(moments[0].slices()):
        blocks = [moment.blocks[number] for moment in moments]
        target = sum(matrix[:, columns] @ block for matrix, block in zip(matrices, blocks, strict=True))
        pieces.append(torch.linalg.solve(torch.stack(blocks).sum(dim=0), target, left=False))
    return torch.cat(pieces, dim=1)


def _evenly_damped(moment: Moment, moments: list[Moment]) -> Moment:
    """With the same small diagonal for every member, so that unseen columns become plain means."""
    share = float(add_moments(moments).diagonal().mean()) * 0.01 / len(moments)
    return Moment(tuple(block + torch.eye(len(block)) * share for block in moment.blocks))
