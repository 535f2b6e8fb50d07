"""Weight distance that counts directions by how much of them the experts' inputs have.

For linear maps it is exactly what merging two experts costs: with gate-weighted second moments G of the
inputs, the best single map for both is the G-weighted mean of the two, and the distance is the squared
error that is left. It adds up along a dendrogram as Ward's variance does. Pure; knows nothing of files.

Shapes: N rows of a matrix, D columns.
"""

import torch
from torch import Tensor

from moemerge.similarity.threads import one_thread

DAMPING = 1e-6
"""Added to the moments' diagonal, relative to its mean: directions no input had are told apart by nothing."""


def ward_increment(a_ND: Tensor, b_ND: Tensor, moment_a_DD: Tensor, moment_b_DD: Tensor) -> float:
    """`tr[(A - B) Ga (Ga + Gb)^-1 Gb (A - B)^T]`, in float64.

    Args:
        a_ND: One expert's matrix, applied as `A x`.
        b_ND: The other's.
        moment_a_DD: Sum of `g^2 x x^T` over the tokens of the first.
        moment_b_DD: Over those of the other.

    Returns:
        0 when a side has no tokens, for then the other is kept as it is.

    Source: completing the square in the objective of RegMean (arXiv:2212.09849); the parallel sum
        `Ga (Ga + Gb)^-1 Gb` of Anderson and Duffin 1969.
    """
    difference = (a_ND.double() - b_ND.double()).T
    first, second = moment_a_DD.double(), moment_b_DD.double()
    total = first + second
    scale = float(total.diagonal().mean())
    if scale <= 0:
        return 0.0
    damped = total + DAMPING * scale * torch.eye(len(total), dtype=torch.float64)
    with one_thread():
        weighed = first @ torch.linalg.solve(damped, second @ difference)
    return max(0.0, float((difference * weighed).sum()))


def ward_increment_diagonal(a_ND: Tensor, b_ND: Tensor, moment_a_D: Tensor, moment_b_D: Tensor) -> float:
    """The same as if coordinates were uncorrelated; moments are given as their diagonals.

    `sum_d (ga gb / (ga + gb)) |A_d - B_d|^2` over columns d: one pass over the weights.
    """
    first, second = moment_a_D.double(), moment_b_D.double()
    total = first + second
    harmonic_D = torch.where(total > 0, first * second / total.clamp_min(torch.finfo(total.dtype).tiny), 0.0)
    return float(((a_ND.double() - b_ND.double()).square() * harmonic_D).sum())
