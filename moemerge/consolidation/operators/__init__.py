"""Merge operators, one file each: how a pool expert is made from the experts it stands for.

Pure, behind `OPERATORS`: a cluster in, the parts of one expert out, float32. Every operator works on one
expert at a time, never on a layer's stacked tensors. To add one: a file, and an entry here.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from moemerge.consolidation.operators.base import base
from moemerge.consolidation.operators.cluster import Cluster, Member
from moemerge.consolidation.operators.dare import dare
from moemerge.consolidation.operators.mean import mean
from moemerge.consolidation.operators.medoid import copy, medoid
from moemerge.consolidation.operators.refit import refit
from moemerge.consolidation.operators.regmean import regmean
from moemerge.consolidation.operators.saliency import saliency_mean
from moemerge.consolidation.operators.task_arithmetic import task_arithmetic
from moemerge.consolidation.operators.ties import ties

__all__ = ["OPERATORS", "RACED", "Cluster", "Member", "Operator"]


@dataclass(frozen=True, slots=True)
class Operator:
    """A registered operator.

    Attributes:
        make: From a cluster to parts by name, float32.
        needs_inputs: Whether it reads calibration.
        needs_base: Whether it works on deltas to a base.
    """

    make: Callable[[Cluster], Mapping[str, Tensor]]
    needs_inputs: bool = False
    needs_base: bool = False


OPERATORS = {
    "copy": Operator(copy),
    "medoid": Operator(medoid, needs_inputs=True),
    "mean": Operator(mean),
    "saliency_mean": Operator(saliency_mean, needs_inputs=True),
    "regmean": Operator(regmean, needs_inputs=True),
    "refit": Operator(refit, needs_inputs=True),
    "task_arithmetic": Operator(task_arithmetic, needs_base=True),
    "ties": Operator(ties, needs_base=True),
    "dare": Operator(dare, needs_base=True),
    "base": Operator(base, needs_base=True),
}
RACED = ("mean", "regmean", "refit")
"""Those that compete for every cluster by default; others won too rarely to be worth their time."""
