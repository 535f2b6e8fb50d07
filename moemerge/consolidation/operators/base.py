"""The base's expert stands for all; what fine-tuning added is left to residuals."""

from torch import Tensor

from moemerge.consolidation.operators.cluster import Cluster


def base(cluster: Cluster) -> dict[str, Tensor]:
    """The base's expert of the slot.

    Source: one base and compressed deltas, as in DeltaZip (arXiv:2312.05215).
    """
    assert cluster.base is not None
    return {part: cluster.base[part].float() for part in cluster.parts}
