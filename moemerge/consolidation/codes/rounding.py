"""Round matrices to few bits: to the nearest code, or so that later columns make up for earlier errors.

Scales are chosen per row and group of columns, by trying how far the outermost values may be clipped.

Inside, matrices lie transposed, so that a column is one stretch of memory, and several at once: blocks of
columns that do not know of each other are rounded together.

Shapes: N rows, D columns, C columns of a group, W columns of a block, B blocks, G groups.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional

from moemerge.consolidation.codes.moments import Moment
from moemerge.models.packed import PackedMatrix, pack_codes
from moemerge.models.products import matmul

SCALE_DTYPE = torch.bfloat16
_COARSE_CLIPS = (1.0, 0.8, 0.6)
_FINER_STEPS = (0.1, 0.05)
_MANY_BITS = 5
_MANY_BITS_CLIPS, _MANY_BITS_STEPS = (1.0, 0.9), (0.05,)
_SMALLEST_SCALE = 1e-30
_LEAF_COLUMNS = 16
_STRETCH_ROWS = 512
"""Of a matrix at least, that tell how much of it its codes hold."""
_LONGEST = 1.5
"""Signs of normal numbers ask for 1.57. Codes that ask for twice as much would be no better than none."""


def round_nearest(matrix: Tensor, bits: int, group: int) -> PackedMatrix:
    """The nearest codes.

    Args:
        matrix: [N, D], float32.
        bits: Of a code.
        group: Columns that share a scale.
    """
    scales, codes = [], []
    for start in range(0, matrix.shape[1], group):
        values_CN = matrix[:, start : start + group].T.contiguous()
        scale_N = choose_scale(values_CN, bits, torch.ones(len(values_CN)))
        codes.append(_nearest(values_CN, scale_N, bits).to(torch.uint8))
        scales.append(scale_N)
    return _packed(torch.cat(codes), torch.stack(scales), bits, group)


def round_plainly(matrix: Tensor, bits: int, group: int) -> Tensor:
    """What the nearest codes give back where scales reach to the largest entries, [N, D]; nothing is packed.

    Args:
        matrix: [N, D], float32.
        bits: Of a code, more than one.
        group: Columns that share a scale.
    """
    num_columns, half = matrix.shape[1], 2 ** (bits - 1)
    values_NGC = functional.pad(matrix, (0, -num_columns % group)).view(len(matrix), -1, group)
    scale_NG1 = values_NGC.abs().amax(dim=2, keepdim=True) / (half - 0.5)
    scale_NG1 = scale_NG1.clamp_min_(_SMALLEST_SCALE).to(SCALE_DTYPE).float()
    codes_NGC: Tensor = (values_NGC * scale_NG1.reciprocal()).floor_().clamp_(-half, half - 1)
    return codes_NGC.add_(0.5).mul_(scale_NG1).flatten(1)[:, :num_columns]


def round_with_feedback(matrix: Tensor, bits: int, group: int, moment: Moment) -> PackedMatrix:
    """Codes whose errors cancel on the inputs of this second moment; see `round_together`."""
    return round_together([matrix], bits, group, moment)[0]


def round_together(matrices: Sequence[Tensor], bits: int, group: int, moment: Moment) -> list[PackedMatrix]:
    """Codes of matrices that are multiplied with the same inputs.

    Columns are rounded one after the other; what an error changes in `matrix x` is taken from columns
    that are still to come, as far as inputs allow it. Without inputs these are the nearest codes.

    Args:
        matrices: [N, D] each, float32.
        bits: Of a code.
        group: Columns that share a scale.
        moment: Of the inputs; needs no full rank.

    Source: Frantar et al. 2022, GPTQ (arXiv:2210.17323).
    """
    if moment.is_empty:
        return [round_nearest(matrix, bits, group) for matrix in matrices]
    whole_DN = torch.cat(list(matrices)).T
    importance_D = moment.diagonal()
    # One scale a row must hold for all blocks, which are rounded by themselves.
    fixed_N = choose_scale(whole_DN, bits, importance_D) if group >= len(whole_DN) else None
    codes, scales = [], []
    for columns, feedback_BWW in moment.feedback:
        num_blocks, width, _ = feedback_BWW.shape
        rest_BWN = whole_DN[columns].clone(memory_format=torch.contiguous_format).view(num_blocks, width, -1)
        importance_BW = importance_D[columns].view(num_blocks, width)
        rounding = _Feedback(rest_BWN, feedback_BWW, importance_BW, bits, fixed_N)
        rounding.round(min(group, width))
        codes.append(rounding.codes_BWN.flatten(0, 1))
        if fixed_N is None:
            scales.append(torch.stack(rounding.scales, dim=1).flatten(0, 1))
    codes_DN = torch.cat(codes)
    scales_GN = torch.cat(scales) if fixed_N is None else fixed_N.unsqueeze(0)
    rows = [len(matrix) for matrix in matrices]
    pieces = zip(torch.split(codes_DN, rows, dim=1), torch.split(scales_GN, rows, dim=1), strict=True)
    return [_packed(own_codes, own_scales, bits, group) for own_codes, own_scales in pieces]


def restore_length(coded: PackedMatrix, matrix: Tensor, moment: Moment) -> PackedMatrix:
    """The same codes with scales such that what they have of the matrix is as long as that.

    The codes of least error are short of what they stand for: with an error of D they hold 1 - D of the
    matrix, and something else. Of a residual that is 1 - D of what fine-tuning has learnt; losing that counts
    to the first order, what is added by a stretch to the second.

    Args:
        coded: Of that matrix.
        matrix: [N, D], float32.
        moment: Of the inputs.
    """
    # A ratio of sums over all rows, of which some tell as much.
    some = slice(None, None, max(1, len(matrix) // _STRETCH_ROWS))
    along, whole = moment.damped().inner(matrix[some], [coded.dense()[some], matrix[some]])
    if not along > 0:
        return coded
    stretch = min(whole / along, _LONGEST)
    return replace(coded, scales=(coded.scales.float() * stretch).to(SCALE_DTYPE))


def choose_scale(values_CN: Tensor, bits: int, importance_C: Tensor) -> Tensor:
    """The scale [N] of each row with the least weighted square error, as it will be stored.

    Args:
        values_CN: Columns that share a scale, [..., C, N].
        bits: Of a code.
        importance_C: What an error of a column weighs, [..., C].
    """
    reached = importance_C.any(dim=-1, keepdim=True)
    # A group whose columns no input reaches is rounded as if all did.
    weight_1C = torch.where(reached, importance_C, torch.ones_like(importance_C)).unsqueeze(-2)
    if bits == 1:
        mean_N = (weight_1C @ values_CN.abs()).squeeze(-2) / weight_1C.sum(dim=-1)
        return torch.mul(mean_N, 2).clamp_min(_SMALLEST_SCALE).to(SCALE_DTYPE)
    widest_N: Tensor = values_CN.abs().amax(dim=-2) / (2 ** (bits - 1) - 0.5)
    found = _ScaleSearch(values_CN, weight_1C, widest_N, bits)
    clips, steps = (
        (_COARSE_CLIPS, _FINER_STEPS) if bits < _MANY_BITS else (_MANY_BITS_CLIPS, _MANY_BITS_STEPS)
    )
    for clip in clips:
        found.attempt(torch.full_like(widest_N, clip))
    for step in steps:
        middle_N = found.clip_N.clone()
        found.attempt(middle_N - step)
        found.attempt((middle_N + step).clamp_max(1.0))
    return found.scale_N


class _ScaleSearch:
    """The best scale of each row so far."""

    def __init__(self, values_CN: Tensor, weight_1C: Tensor, widest_N: Tensor, bits: int) -> None:
        self._values_CN, self._weight_1C, self._widest_N, self._bits = values_CN, weight_1C, widest_N, bits
        self._least_N = torch.full_like(widest_N, torch.inf)
        self.clip_N = torch.ones_like(widest_N)
        self.scale_N = widest_N.to(SCALE_DTYPE)

    def attempt(self, clip_N: Tensor) -> None:
        """Clip each row at so much of its widest."""
        scale_N = (self._widest_N * clip_N).clamp_min_(_SMALLEST_SCALE).to(SCALE_DTYPE)
        error_CN = _nearest(self._values_CN, scale_N, self._bits)
        error_CN.sub_(2 ** (self._bits - 1) - 0.5).mul_(_rows(scale_N)).sub_(self._values_CN).square_()
        error_N = (self._weight_1C @ error_CN).squeeze(-2)
        better_N = error_N < self._least_N
        self._least_N = torch.where(better_N, error_N, self._least_N)
        self.clip_N = torch.where(better_N, clip_N, self.clip_N)
        self.scale_N = torch.where(better_N, scale_N, self.scale_N)


class _Feedback:
    """Rounds blocks side by side, halving them until few columns are left to go through one by one."""

    def __init__(
        self, rest_BWN: Tensor, feedback_BWW: Tensor, importance_BW: Tensor, bits: int, fixed_N: Tensor | None
    ) -> None:
        self._rest_BWN = rest_BWN
        self._feedback_BWW = feedback_BWW
        self._importance_BW = importance_BW
        self._bits = bits
        self._fixed_BN = None if fixed_N is None else fixed_N.expand(len(rest_BWN), -1)
        self._errors_BWN = torch.empty_like(rest_BWN)
        self.codes_BWN = torch.empty_like(rest_BWN, dtype=torch.uint8)
        self.scales: list[Tensor] = []

    def round(self, group: int) -> None:
        """All columns, of which so many share a scale."""
        self._round(0, self._rest_BWN.shape[1], group, self._fixed_BN)

    def _round(self, first: int, last: int, group: int, scale_BN: Tensor | None) -> None:
        if scale_BN is None and last - first <= group:
            values_BCN = self._rest_BWN[:, first:last]
            scale_BN = choose_scale(values_BCN, self._bits, self._importance_BW[:, first:last])
            self.scales.append(scale_BN)
        if scale_BN is not None and last - first <= _LEAF_COLUMNS:
            self._round_columns(first, last, scale_BN.float())
            return
        unit = group if scale_BN is None else _LEAF_COLUMNS
        middle = first + unit * -(-(last - first) // (2 * unit))
        self._round(first, middle, group, scale_BN)
        passed_on = self._feedback_BWW[:, first:middle, middle:last].mT
        rests, errors = self._rest_BWN[:, middle:last], self._errors_BWN[:, first:middle]
        for rest_WN, factors_WW, errors_WN in zip(rests, passed_on, errors, strict=True):
            rest_WN.sub_(matmul(factors_WW, errors_WN))
        self._round(middle, last, group, scale_BN)

    def _round_columns(self, first: int, last: int, scale_BN: Tensor) -> None:
        inverse_BN, half = scale_BN.reciprocal(), 2 ** (self._bits - 1)
        for place in range(first, last):
            column_BN, error_BN = self._rest_BWN[:, place], self._errors_BWN[:, place]
            code_BN = (column_BN * inverse_BN).floor_().add_(half).clamp_(0, 2 * half - 1)
            self.codes_BWN[:, place] = code_BN
            torch.addcmul(column_BN, code_BN.sub_(half - 0.5), scale_BN, value=-1, out=error_BN)
            error_BN.div_(self._feedback_BWW[:, place, place].unsqueeze(1))
            rest = slice(place + 1, last)
            passed_on = self._feedback_BWW[:, place, rest].unsqueeze(2)
            self._rest_BWN[:, rest].addcmul_(passed_on, error_BN.unsqueeze(1), value=-1)


def _nearest(values_CN: Tensor, scale_N: Tensor, bits: int) -> Tensor:
    """Codes, as float32."""
    places_CN: Tensor = values_CN * _rows(scale_N).reciprocal()
    return places_CN.floor_().add_(2 ** (bits - 1)).clamp_(0, 2**bits - 1)


def _rows(scale_N: Tensor) -> Tensor:
    return scale_N.float().unsqueeze(-2)


def _packed(codes_DN: Tensor, scales_GN: Tensor, bits: int, group: int) -> PackedMatrix:
    return PackedMatrix(pack_codes(codes_DN.T.contiguous(), bits), scales_GN.T.contiguous(), bits, group)
