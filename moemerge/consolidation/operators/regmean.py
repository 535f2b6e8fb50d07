"""Regression mean: the matrix whose products are closest to every member's on that member's inputs."""

from torch import Tensor

from moemerge.consolidation.operators.cluster import Cluster


def regmean(cluster: Cluster) -> dict[str, Tensor]:
    """`(sum W_i G_i) (sum G_i)^-1` for every part, with gate-weighted moments G of its inputs.

    Moments are damped, which draws the result towards the plain mean where inputs say little.

    Source: Jin et al. 2023, RegMean (arXiv:2212.09849).
    """
    return cluster.regression_means
