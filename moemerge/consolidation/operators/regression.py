"""Least squares over several members' products, each on its own inputs."""

from collections.abc import Sequence

import torch
from torch import Tensor

from moemerge.consolidation.codes.moments import Moment
from moemerge.consolidation.inverses import inverse
from moemerge.models.products import matmul, multiply
from moemerge.similarity.threads import one_thread

_DAMPING = 0.01


def weighted(matrix: Tensor, moment: Moment) -> Tensor:
    """`W G`, block by block of columns."""
    blocks = zip(moment.slices(), moment.blocks, strict=True)
    return torch.cat([matmul(matrix[:, columns], block) for columns, block in blocks], dim=1)


class RegressionMean:
    """`(sum W_i G_i) (sum G_i)^-1` with damped moments, so that columns no input reaches become plain means.

    Args:
        total: The sum of the moments G of all members.
    """

    def __init__(self, total: Moment) -> None:
        self._columns = total.slices()
        self._damping = float(total.diagonal().mean()) * _DAMPING
        self._inverses = [
            inverse(block + torch.eye(len(block)) * self._damping) for block in total.blocks if self._damping
        ]

    def of(self, reference: Tensor, matrices: Sequence[Tensor], products: Sequence[Tensor]) -> Tensor:
        """Of matrices [N, D] that are given those inputs.

        Args:
            reference: A matrix close to them.
            matrices: One of each member.
            products: `weighted` of what each has beyond the reference, but of those that are the reference.
        """
        plain = torch.stack(list(matrices)).mean(dim=0)
        if not self._inverses:
            return plain
        target = plain.sub_(reference).mul_(self._damping)
        for product in products:
            target += product
        blocks = zip(self._columns, self._inverses, strict=True)
        found = torch.cat([matmul(target[:, columns], inverted) for columns, inverted in blocks], dim=1)
        return found.add_(reference)


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
    missing_SN = wanted_SN * root_S1 - multiply(scaled_SD, start_ND)
    damping = _DAMPING * float(scaled_SD.square().mean(dim=1).mean()) * len(scaled_SD)
    if damping <= 0:
        return start_ND
    if len(scaled_SD) < scaled_SD.shape[1]:
        # As many unknowns as inputs are fewer than as many as columns.
        gram_SS = multiply(scaled_SD, scaled_SD)
        gram_SS.diagonal().add_(damping)
        return start_ND + matmul(_solved(gram_SS, missing_SN).T, scaled_SD)
    gram_DD = matmul(scaled_SD.T, scaled_SD)
    gram_DD.diagonal().add_(damping)
    return start_ND + _solved(gram_DD, matmul(scaled_SD.T, missing_SN)).T


@one_thread()
def _solved(gram: Tensor, target: Tensor) -> Tensor:
    return torch.cholesky_solve(target, torch.linalg.cholesky(gram))
