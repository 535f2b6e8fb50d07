"""Least squares over several members' products, each on its own inputs."""

from collections.abc import Sequence

import torch
from torch import Tensor

from moemerge.consolidation.codes.moments import Moment
from moemerge.similarity.threads import one_thread

_DAMPING = 0.01


def weighted(matrix: Tensor, moment: Moment) -> Tensor:
    """`W G`, block by block of columns."""
    blocks = zip(moment.slices(), moment.blocks, strict=True)
    return torch.cat([matrix[:, columns] @ block for columns, block in blocks], dim=1)


class RegressionMean:
    """`(sum W_i G_i) (sum G_i)^-1` with damped moments, so that columns no input reaches become plain means.

    Args:
        total: The sum of the moments G of all members.
    """

    def __init__(self, total: Moment) -> None:
        self._columns = total.slices()
        self._damping = float(total.diagonal().mean()) * _DAMPING
        self._inverses = [_inverse(block, self._damping) for block in total.blocks] if self._damping else []

    def of(self, matrices: Sequence[Tensor], products: Sequence[Tensor]) -> Tensor:
        """Of matrices [N, D] that are given those inputs, one of each member, each with its `weighted`."""
        plain = torch.stack(list(matrices)).mean(dim=0)
        if not self._inverses:
            return plain
        target = torch.stack(list(products)).sum(dim=0).add_(plain, alpha=self._damping)
        blocks = zip(self._columns, self._inverses, strict=True)
        return torch.cat([target[:, columns] @ inverse for columns, inverse in blocks], dim=1)


def ridge(inputs_SD: Tensor, wanted_SN: Tensor, start_ND: Tensor, weights_S: Tensor) -> Tensor:
    """The matrix closest to `start_ND` where inputs say little, whose products are closest to what is wanted.

    Args:
        inputs_SD: What it is multiplied with.
        wanted_SN: What that should give.
        start_ND: Where it is drawn to.
        weights_S: What a square error on each input counts.
    """
    root_S1 = weights_S.sqrt().unsqueeze(1)
    scaled_SD = inputs_SD * root_S1
    missing_SN = wanted_SN * root_S1 - scaled_SD @ start_ND.T
    damping = _DAMPING * float(scaled_SD.square().mean(dim=1).mean()) * len(scaled_SD)
    if damping <= 0:
        return start_ND
    if len(scaled_SD) < scaled_SD.shape[1]:
        # As many unknowns as inputs are fewer than as many as columns.
        gram_SS = scaled_SD @ scaled_SD.T
        gram_SS.diagonal().add_(damping)
        return start_ND + _solved(gram_SS, missing_SN).T @ scaled_SD
    gram_DD = scaled_SD.T @ scaled_SD
    gram_DD.diagonal().add_(damping)
    return start_ND + _solved(gram_DD, scaled_SD.T @ missing_SN).T


@one_thread()
def _solved(gram: Tensor, target: Tensor) -> Tensor:
    return torch.cholesky_solve(target, torch.linalg.cholesky(gram))


@one_thread()
def _inverse(block: Tensor, damping: float) -> Tensor:
    return torch.cholesky_inverse(torch.linalg.cholesky(block + torch.eye(len(block)) * damping))
