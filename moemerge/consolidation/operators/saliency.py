"""The average by how much each member's expert adds to its variant's hidden states."""

from torch import Tensor

from moemerge.consolidation.operators.cluster import Cluster, Member
from moemerge.consolidation.operators.mean import weighted_mean


def saliency_mean(cluster: Cluster) -> dict[str, Tensor]:
    """Members count by saliency: the sum of gate times norm of the output over their inputs.

    Source: REAP's saliency (arXiv:2510.13999) as the weight of REAM's average (arXiv:2604.04356).
    """
    return weighted_mean(cluster, [member.weight * _saliency(member) for member in cluster.members])


def _saliency(member: Member) -> float:
    if not len(member.gates_S):
        return 0.0
    return float((member.gates_S * member.own.output_SD.norm(dim=1)).mean())
