"""Non-expert tensors fitted again in closed form, to give what they gave before their inputs changed.

Pure: inputs and wanted outputs in, tensors out. A fit is judged on tokens that it has not seen, as it will be
stored, and nothing is the answer when it is not better there.

Shapes: T tokens, N outputs, D inputs of a matrix or width of a norm.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from moemerge.models.products import matmul, multiply
from moemerge.similarity.threads import one_thread

RIDGES = (10.0, 1.0, 0.1, 0.01, 0.001)
"""Pulls towards the matrix as it was, over the mean square of an input; the strongest first."""
_NORM_RIDGE = 0.01

Miss = Callable[[Tensor, Tensor], float]
"""How far outputs [T, N] are from the wanted ones; lower is better."""


def squared_error(output_TN: Tensor, wanted_TN: Tensor) -> float:
    """Mean of the squared differences."""
    return float((output_TN - wanted_TN).square().mean(dim=-1).mean())


def routing_divergence(logits_TN: Tensor, wanted_TN: Tensor) -> float:
    """KL of the probabilities from the wanted ones, mean over tokens."""
    wanted, found = functional.log_softmax(wanted_TN, dim=-1), functional.log_softmax(logits_TN, dim=-1)
    return float(functional.kl_div(found, wanted, reduction="batchmean", log_target=True))


def refit_matrix(
    inputs_TD: Tensor,
    wanted_TN: Tensor,
    own_ND: Tensor,
    judged_T: Tensor,
    miss: Miss = squared_error,
    ridges: Sequence[float] = RIDGES,
) -> Tensor | None:
    """The matrix whose products with the inputs come closest to what is wanted.

    Ridge regression towards the matrix as it was; the ridge is the one that is best on the judged tokens.

    Args:
        inputs_TD: What the matrix is given now, float32.
        wanted_TN: What it is to give.
        own_ND: The matrix as it was, in its stored dtype.
        judged_T: Bool; tokens that are judged by, the others are fitted to.
        miss: What is to be small on the judged tokens.
        ridges: Strengths to choose from.

    Returns:
        The matrix in the dtype of `own_ND`, or None when it is not better than that.
    """
    fitted_TD, judged_TD = inputs_TD[~judged_T], inputs_TD[judged_T]
    wanted_JN = wanted_TN[judged_T]
    own = own_ND.float()
    missing_TN = wanted_TN[~judged_T] - multiply(fitted_TD, own)
    gram_DD = matmul(fitted_TD.T, fitted_TD).double()
    cross_DN = matmul(fitted_TD.T, missing_TN).double()
    scale = float(gram_DD.diagonal().mean())
    best, least = None, miss(multiply(judged_TD, own), wanted_JN)
    if not scale > 0:
        return None
    for ridge in ridges:
        damped = gram_DD.clone()
        damped.diagonal().add_(ridge * scale)
        with one_thread():
            factor, failed = torch.linalg.cholesky_ex(damped)
            if failed:
                break
            change_ND = torch.cholesky_solve(cross_DN, factor).T.float()
        matrix_ND = (own + change_ND).to(own_ND.dtype)
        found = miss(multiply(judged_TD, matrix_ND.float()), wanted_JN)
        if found < least:
            best, least = matrix_ND, found
    return best


def refit_norm(
    units_TD: Tensor, wanted_TD: Tensor, own_D: Tensor, judged_T: Tensor, ridge: float = _NORM_RIDGE
) -> Tensor | None:
    """The weight of a norm that brings its outputs closest to what is wanted, channel by channel.

    Args:
        units_TD: Inputs at unit mean square, float32.
        wanted_TD: What the norm is to give.
        own_D: Its weight as it was, in its stored dtype.
        judged_T: Bool; tokens that are judged by, the others are fitted to.
        ridge: Pull towards the weight as it was, over the mean square of an input.

    Returns:
        The weight in the dtype of `own_D`, or None when it is not better than that.
    """
    own = own_D.float()
    fitted_TD, wanted = units_TD[~judged_T].double(), wanted_TD[~judged_T].double()
    square_D = fitted_TD.square().sum(dim=0)
    damp = ridge * square_D.mean()
    if not damp > 0:
        return None
    change_D = (fitted_TD * (wanted - fitted_TD * own)).sum(dim=0) / (square_D + damp)
    weight_D = (own + change_D.float()).to(own_D.dtype)
    judged_TD, wanted_JD = units_TD[judged_T], wanted_TD[judged_T]
    before = squared_error(judged_TD * own, wanted_JD)
    return weight_D if squared_error(judged_TD * weight_D.float(), wanted_JD) < before else None
