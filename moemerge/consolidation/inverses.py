"""Inverses of positive definite matrices, for the most part by products, which are far faster than LAPACK's.

Shapes: D rows and columns.
"""

import torch
from torch import Tensor

from moemerge.models.products import matmul, multiply
from moemerge.similarity.threads import one_thread

_LEAF = 128
"""Rows of blocks that LAPACK factorises."""


@one_thread()
def inverse(matrix_DD: Tensor) -> Tensor:
    """The inverse of a positive definite matrix.

    Raises:
        torch.linalg.LinAlgError: It is not.
    """
    root_DD = _inverse_root(matrix_DD)
    return matmul(root_DD.T, root_DD)


@one_thread()
def upper_root_of_inverse(matrix_DD: Tensor) -> Tensor:
    """The upper triangular R with `R^T R` the inverse of a positive definite matrix.

    Raises:
        torch.linalg.LinAlgError: It is not.
    """
    # Turned around, an upper triangle is a lower one.
    return _inverse_root(matrix_DD.flip(0, 1)).flip(0, 1)


def _inverse_root(matrix_DD: Tensor) -> Tensor:
    """The lower triangular inverse of the Cholesky factor, half by half."""
    size = len(matrix_DD)
    if size <= _LEAF:
        root = torch.linalg.cholesky(matrix_DD)
        inverted: Tensor = torch.linalg.solve_triangular(root, torch.eye(size), upper=False)
        return inverted
    middle = size // 2
    first = _inverse_root(matrix_DD[:middle, :middle])
    below = multiply(matrix_DD[middle:, :middle], first)
    second = _inverse_root(matrix_DD[middle:, middle:] - multiply(below, below))
    found = torch.zeros_like(matrix_DD)
    found[:middle, :middle] = first
    found[middle:, middle:] = second
    found[middle:, :middle] = matmul(second, matmul(below, first)).neg_()
    return found
