"""Fit the last matrix so that the merged expert's outputs match the members'."""

import torch
from torch import Tensor

from moemerge.consolidation.forward import run_expert
from moemerge.consolidation.operators.cluster import Cluster
from moemerge.consolidation.operators.regression import ridge

_INPUTS = 256
"""Of each member; more take time and hardly change the fit."""


def refit(cluster: Cluster) -> dict[str, Tensor]:
    """Regression means of the first matrices; the last one by least squares on the merged hidden units.

    With hidden units `h` of the merged expert and outputs `y` of each member on its inputs, the last matrix
    W minimises `sum gate^2 |W h - y|^2`, drawn towards its regression mean where `h` says little. A bias
    behind it is taken from the outputs first.

    Source: the output matching of MergeMoE (arXiv:2510.14436).
    """
    merged = dict(cluster.regression_means)
    last = cluster.members[0].own.last
    hidden, wanted, weights = [], [], []
    for member in cluster.members:
        gates_S = member.gates_S[:_INPUTS]
        hidden.append(run_expert(merged, member.activation, member.inputs_SD[:_INPUTS]).inputs[last])
        wanted.append(member.own.output(slice(_INPUTS)) - merged.get(f"{last}_bias", 0.0))
        weights.append(gates_S.square() * (member.weight / max(1, len(gates_S))))
    merged[last] = ridge(torch.cat(hidden), torch.cat(wanted), merged[last], torch.cat(weights))
    return merged
