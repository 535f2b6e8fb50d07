"""Fit the last matrix so that the merged expert's outputs match the members'."""

import torch
from torch import Tensor

from moemerge.consolidation.forward import run_expert
from moemerge.consolidation.operators.cluster import Cluster
from moemerge.consolidation.operators.regmean import regmean

_DAMPING = 0.01


def refit(cluster: Cluster) -> dict[str, Tensor]:
    """Regression means of the first matrices; the last one by least squares on the merged hidden units.

    With hidden units `h` of the merged expert and outputs `y` of each member on its inputs, the last matrix
    W minimises `sum gate^2 |W h - y|^2`, drawn towards its regression mean where `h` says little.

    Source: the output matching of MergeMoE (arXiv:2510.14436).
    """
    merged = regmean(cluster)
    last = list(cluster.members[0].own.inputs)[-1]
    width = merged[last].shape[1]
    moment = torch.zeros(width, width)
    product = torch.zeros_like(merged[last])
    for member in cluster.members:
        if not len(member.gates_S):
            continue
        hidden = run_expert(merged, member.activation, member.inputs_SD).inputs[last]
        weights = member.gates_S.square().unsqueeze(1) * (member.weight / len(member.gates_S))
        moment += hidden.T @ (hidden * weights)
        product += (member.own.output_SD * weights).T @ hidden
    damping = _DAMPING * float(moment.diagonal().mean())
    if damping > 0:
        moment.diagonal().add_(damping)
        merged[last] = torch.linalg.solve(moment, product + damping * merged[last], left=False)
    return merged
