"""A matrix as a product of two thin ones, exact where inputs reach.

Shapes: N rows, D columns, r rank.
"""

import torch
from torch import Tensor

from moemerge.consolidation.codes.moments import Moment
from moemerge.models.packed import LowRank
from moemerge.models.products import matmul
from moemerge.similarity.threads import one_thread

FACTOR_DTYPE = torch.bfloat16
_OVERSAMPLING, _ROUNDS = 16, 4


@one_thread()
def factorise(matrix: Tensor, rank: int, moment: Moment | None = None) -> LowRank:
    """The matrix of that rank with the least error on inputs of this second moment.

    The singular value decomposition is of `matrix L`, where `L L^T` is the damped moment; its right factor
    is multiplied by `L^-1` again. Both factors carry the root of the singular values.

    Args:
        matrix: [N, D], float32.
        rank: At most the smaller side is used.
        moment: Of the inputs; None for plain truncation.

    Source: EoRA, Liu et al. 2024 (arXiv:2410.21271), and SVD-LLM, Wang et al. 2024 (arXiv:2403.07378).
    """
    rank = min(rank, *matrix.shape)
    if moment is None or moment.is_empty:
        left, values, right = _truncated(matrix, rank)
        return _factors(left, values, right)
    roots = [torch.linalg.cholesky(block) for block in moment.damped().blocks]
    columns = moment.slices()
    whitened = torch.cat([matmul(matrix[:, c], root) for c, root in zip(columns, roots, strict=True)], dim=1)
    left, values, right = _truncated(whitened, rank)
    pieces = [
        torch.linalg.solve_triangular(root, right[:, c], upper=False, left=False)
        for c, root in zip(columns, roots, strict=True)
    ]
    return _factors(left, values, torch.cat(pieces, dim=1))


def _truncated(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """The largest singular values and their vectors, from a few rounds of subspace iteration.

    Source: Halko, Martinsson and Tropp 2011 (arXiv:0909.4061), algorithm 4.4.
    """
    width = rank + _OVERSAMPLING
    if width >= min(matrix.shape):
        left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    else:
        # The same draw every time, so that the same matrix gives the same factors.
        draw = torch.randn(matrix.shape[1], width, generator=torch.Generator().manual_seed(0))
        basis = torch.linalg.qr(matrix @ draw).Q
        for _ in range(_ROUNDS):
            basis = torch.linalg.qr(matrix @ torch.linalg.qr(matrix.T @ basis).Q).Q
        left, values, right = torch.linalg.svd(basis.T @ matrix, full_matrices=False)
        left = basis @ left
    return left[:, :rank], values[:rank], right[:rank]


def _factors(left: Tensor, values: Tensor, right: Tensor) -> LowRank:
    root = values.sqrt()
    return LowRank((left * root).to(FACTOR_DTYPE), (right * root.unsqueeze(1)).to(FACTOR_DTYPE))
