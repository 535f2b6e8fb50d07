"""The average by how much each member's expert adds to its variant's hidden states."""

from torch import Tensor

from moemerge.consolidation.operators.cluster import Cluster
from moemerge.consolidation.operators.mean import weighted_mean
from moemerge.similarity.saliency import saliency


def saliency_mean(cluster: Cluster) -> dict[str, Tensor]:
    """Members count by saliency: the sum of gate times norm of the output over their inputs.

    Source: REAP's saliency (arXiv:2510.13999) as the weight of REAM's average (arXiv:2604.04356).
    """
    weights = [member.weight * saliency(member.gates_S, member.own.output_SD) for member in cluster.members]
    return weighted_mean(cluster, weights)
