"""Round a matrix to few bits: to the nearest code, or so that later columns make up for earlier errors.

Scales are chosen per row and group of columns, by trying how far the outermost values may be clipped.

Shapes: N rows, D columns, B columns of a group or block.
"""

import torch
from torch import Tensor

from moemerge.consolidation.codes.moments import BLOCK_COLUMNS, Moment
from moemerge.models.packed import PackedMatrix, pack_codes

SCALE_DTYPE = torch.bfloat16
_CLIPS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6, 0.55, 0.5, 0.45)
_GENTLE_CLIPS = _CLIPS[:4]
_MANY_BITS = 5
_SMALLEST_SCALE = 1e-30


def round_nearest(matrix: Tensor, bits: int, group: int, importance_D: Tensor | None = None) -> PackedMatrix:
    """The nearest codes.

    Args:
        matrix: [N, D], float32.
        bits: Of a code.
        group: Columns that share a scale.
        importance_D: What an error of a column weighs when scales are chosen; all alike by default.
    """
    importance_D = torch.ones(matrix.shape[1]) if importance_D is None else importance_D
    scales, codes = [], []
    for start in range(0, matrix.shape[1], group):
        columns = slice(start, min(start + group, matrix.shape[1]))
        scales.append(choose_scale(matrix[:, columns], bits, importance_D[columns]))
        codes.append(_nearest(matrix[:, columns], scales[-1], bits))
    return _packed(codes, scales, bits, group)


def round_with_feedback(matrix: Tensor, bits: int, group: int, moment: Moment) -> PackedMatrix:
    """Codes whose errors cancel on the inputs of this second moment.

    Columns are rounded one after the other; what an error changes in `matrix x` is taken from columns
    that are still to come, as far as inputs allow it. Without inputs these are the nearest codes.

    Args:
        matrix: [N, D], float32.
        bits: Of a code.
        group: Columns that share a scale.
        moment: Of the inputs; needs no full rank.

    Source: Frantar et al. 2022, GPTQ (arXiv:2210.17323).
    """
    if moment.is_empty:
        return round_nearest(matrix, bits, group)
    importance_D = moment.diagonal()
    whole_row = choose_scale(matrix, bits, importance_D) if group >= matrix.shape[1] else None
    scales, codes = [], []
    for block, damped in zip(moment.slices(), moment.damped().blocks, strict=True):
        feedback_BB = torch.linalg.cholesky(_inverse(damped), upper=True)
        rest_NB = matrix[:, block].clone()
        for start in range(0, rest_NB.shape[1], min(group, BLOCK_COLUMNS)):
            columns = slice(start, min(start + group, rest_NB.shape[1]))
            scale_N1 = whole_row
            if scale_N1 is None:
                scale_N1 = choose_scale(rest_NB[:, columns], bits, importance_D[block][columns])
                scales.append(scale_N1)
            codes.append(_round_group(rest_NB, columns, scale_N1, bits, feedback_BB))
    return _packed(codes, [whole_row] if whole_row is not None else scales, bits, group)


def choose_scale(values_NB: Tensor, bits: int, importance_B: Tensor) -> Tensor:
    """The scale [N, 1] of each row with the least weighted square error, as it will be stored."""
    largest_N1 = values_NB.abs().amax(dim=1, keepdim=True)
    # A group whose columns no input reaches is rounded as if all did.
    weight_B = importance_B if bool(importance_B.any()) else torch.ones_like(importance_B)
    if bits == 1:
        mean_N1 = (values_NB.abs() @ weight_B / weight_B.sum()).unsqueeze(1)
        return (2 * mean_N1).clamp_min(_SMALLEST_SCALE).to(SCALE_DTYPE)
    best_N1, least_N1 = largest_N1, torch.full_like(largest_N1, torch.inf)
    for clip in _GENTLE_CLIPS if bits >= _MANY_BITS else _CLIPS:
        scale_N1 = (largest_N1 * (clip / (2 ** (bits - 1) - 0.5))).clamp_min(_SMALLEST_SCALE).to(SCALE_DTYPE)
        difference_NB = decode(_nearest(values_NB, scale_N1, bits), scale_N1, bits) - values_NB
        error_N1 = (difference_NB.square_() @ weight_B).unsqueeze(1)
        best_N1 = torch.where(error_N1 < least_N1, scale_N1.float(), best_N1)
        least_N1 = torch.minimum(error_N1, least_N1)
    return best_N1.to(SCALE_DTYPE)


def decode(codes_NB: Tensor, scale_N1: Tensor, bits: int) -> Tensor:
    """Values of codes with one scale a row, as `PackedMatrix.dense` has them."""
    steps_NB: Tensor = codes_NB.float() - (2 ** (bits - 1) - 0.5)
    return steps_NB * scale_N1.float()


def _nearest(values_NB: Tensor, scale_N1: Tensor, bits: int) -> Tensor:
    places_NB = (values_NB / scale_N1.float()).floor_().add_(2 ** (bits - 1))
    codes_NB: Tensor = places_NB.clamp_(0, 2**bits - 1).to(torch.uint8)
    return codes_NB


def _round_group(rest_NB: Tensor, columns: slice, scale_N1: Tensor, bits: int, feedback_BB: Tensor) -> Tensor:
    """Codes of a group of columns; their errors are taken from the columns behind them, in place."""
    # Rows of the transposed are columns of the matrix: each is one stretch of memory.
    group_BN = rest_NB[:, columns].T.contiguous()
    inner_BB = feedback_BB[columns, columns]
    errors_BN, codes_BN = torch.empty_like(group_BN), torch.empty_like(group_BN, dtype=torch.uint8)
    scale_N = scale_N1.squeeze(1).float()
    for place in range(len(group_BN)):
        code_N = _nearest(group_BN[place], scale_N, bits)
        error_N = (group_BN[place] - decode(code_N, scale_N, bits)) / inner_BB[place, place]
        group_BN[place + 1 :].addr_(inner_BB[place, place + 1 :], error_N, alpha=-1)
        codes_BN[place], errors_BN[place] = code_N, error_N
    rest_NB[:, columns.stop :] -= errors_BN.T @ feedback_BB[columns, columns.stop :]
    return codes_BN.T


def _inverse(moment_BB: Tensor) -> Tensor:
    return torch.cholesky_inverse(torch.linalg.cholesky(moment_BB))


def _packed(codes: list[Tensor], scales: list[Tensor], bits: int, group: int) -> PackedMatrix:
    return PackedMatrix(pack_codes(torch.cat(codes, dim=1), bits), torch.cat(scales, dim=1), bits, group)
