"""The product of hidden states with a matrix, in the layout and by the library that are fastest.

On a CPU that computes in bf16, matrices packed into oneDNN's blocks take about half the time of plain
ones for the few rows of a decoding step; coded ones bring a product of their own. In float32, too, oneDNN
takes half the time where the library that torch asks by itself keeps to AVX2, as on AMD's processors with
AVX-512. Knows nothing of what the matrices are for.
"""

import torch
from torch import Tensor
from torch.nn import functional

from moemerge.models.layouts import Multiplied

_LEAST_PRODUCTS = 2**22
"""Of two numbers: with fewer, calling oneDNN takes longer than they do."""


def can_pack(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether `pack` does anything for such matrices."""
    return (
        dtype == torch.bfloat16
        and device.type == "cpu"
        and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
        and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    )


def pack(matrix: Tensor) -> Tensor:
    """The matrix [N, D] as `multiply` likes it best: packed, or itself where that cannot be.

    A packed matrix has the same shape, dtype and size in memory, and nothing but `multiply` takes it;
    `to_dense` gives the values back.
    """
    if matrix.layout != torch.strided or not can_pack(matrix.dtype, matrix.device):
        return matrix
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(matrix.contiguous(), None)
    return packed


def multiply(hidden_TD: Tensor, matrix: Tensor | Multiplied) -> Tensor:
    """`hidden matrix^T`, [T, N], computed in the dtype of `hidden_TD`; the matrix may be packed."""
    if not isinstance(matrix, Tensor):
        return matrix.multiply(hidden_TD)
    if matrix.dtype != hidden_TD.dtype:
        matrix = (matrix if matrix.layout == torch.strided else matrix.to_dense()).to(hidden_TD.dtype)
    if matrix.layout == torch.strided:
        if not _is_for_onednn(hidden_TD, matrix):
            return functional.linear(hidden_TD, matrix)
        hidden_TD, matrix = _compact(hidden_TD), _compact(matrix)
    product: Tensor = torch.ops.mkldnn._linear_pointwise(hidden_TD, matrix, None, "none", [], "")
    return product


def matmul(left: Tensor, right: Tensor) -> Tensor:
    """`left right` of matrices [N, D] and [D, M], as `multiply` computes it."""
    return multiply(left, right.T)


def _is_for_onednn(hidden_TD: Tensor, matrix: Tensor) -> bool:
    """Whether a product in float32 is large enough to be worth calling it; it knows no gradients."""
    return (
        hidden_TD.dtype == torch.float32
        and hidden_TD.device.type == "cpu"
        and len(hidden_TD) * matrix.numel() >= _LEAST_PRODUCTS
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
        and not (torch.is_grad_enabled() and (hidden_TD.requires_grad or matrix.requires_grad))
    )


def _compact(matrix: Tensor) -> Tensor:
    """A view that is part of a larger matrix is copied: for some oneDNN has nothing but a slow loop."""
    return matrix if matrix.is_contiguous() or matrix.T.is_contiguous() else matrix.contiguous()
