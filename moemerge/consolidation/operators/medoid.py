"""A real expert stands for all: the only one, or the one that replaces the others best."""

from torch import Tensor

from moemerge.consolidation.forward import replacement_error
from moemerge.consolidation.operators.cluster import Cluster, Member


def copy(cluster: Cluster) -> dict[str, Tensor]:
    """The first member. With clusters made by taking turns: the paper's pick."""
    return dict(cluster.members[0].matrices)


def medoid(cluster: Cluster) -> dict[str, Tensor]:
    """The member with the least replacement error on the inputs of all.

    Source: selection instead of averaging, as in Imani et al. 2025 (arXiv:2505.06481), with a measured cost.
    """
    return dict(min(cluster.members, key=lambda member: _cost(member, cluster)).matrices)


def _cost(chosen: Member, cluster: Cluster) -> float:
    return sum(
        member.weight
        * replacement_error(
            chosen.matrices, member.activation, member.inputs_SD, member.gates_S, member.own.output_SD
        )
        for member in cluster.members
        if member is not chosen
    )
