"""How much an expert's output counts, and which few experts must never be touched.

Pure functions of values that calibration kept. Knows nothing of weights.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

SUPER_PERCENTILE = 99.5
SUPER_SHARE = 0.1
SUPER_OVER_MEDIAN = 30.0
"""Of few experts one always lies above the percentile; massive activations are far above all others."""


def saliency(gates_S: Tensor, outputs_SD: Tensor) -> float:
    """Mean over the tokens routed to an expert of gate times output norm; 0 without tokens.

    Source: REAP (arXiv:2510.13999).
    """
    if not len(gates_S):
        return 0.0
    return float((gates_S.double() * outputs_SD.double().norm(dim=1)).mean())


def find_super_experts(output_max_LE: Sequence[Sequence[float]]) -> list[tuple[int, int]]:
    """Experts whose outputs hold the model's extreme values, as (row, slot); they are to stay exact.

    An expert is one when its largest absolute output entry lies above the 99.5th percentile of all
    experts', above a tenth of the model's largest, and far above the median.

    Args:
        output_max_LE: Largest absolute output entry by layer and slot.

    Source: Super Experts (arXiv:2507.23279), the criterion of section 3.
    """
    maxima_LE = torch.tensor(output_max_LE, dtype=torch.float64)
    if not maxima_LE.numel():
        return []
    percentile = torch.quantile(maxima_LE.flatten(), SUPER_PERCENTILE / 100)
    least = max(SUPER_SHARE * maxima_LE.max(), SUPER_OVER_MEDIAN * maxima_LE.median())
    is_super_LE = (maxima_LE > percentile) & (maxima_LE > least)
    return [(int(layer), int(slot)) for layer, slot in is_super_LE.nonzero()]
