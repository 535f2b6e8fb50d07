"""Second moments of the inputs of a matrix, in blocks along the diagonal.

What inputs do to errors is kept within stretches of neighbouring columns: a matrix of many columns then
needs neither the memory nor the time of their square.

Shapes: S rows of inputs, D columns of the matrix, B columns of a block.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moemerge.consolidation.cached import CachedProperty
from moemerge.consolidation.inverses import upper_root_of_inverse
from moemerge.models.products import matmul

BLOCK_COLUMNS = 1024
_DAMPING = 0.05
"""Of the mean diagonal. Inputs move a little once other layers are coded, and little text leaves directions
out: with less, errors are put where inputs were not but will be. 0.02 to 0.2 come out alike."""


@dataclass(frozen=True)
class Moment:
    """Sum of `weight x x^T`, as blocks [B, B] along the diagonal, float32; all but the last of one size."""

    blocks: tuple[Tensor, ...]

    @property
    def is_empty(self) -> bool:
        """Whether no input was seen that counts."""
        return not any(bool(block.diagonal().any()) for block in self.blocks)

    def diagonal(self) -> Tensor:
        """[D]."""
        return torch.cat([block.diagonal() for block in self.blocks])

    def slices(self) -> list[slice]:
        """Columns of each block."""
        stops = torch.tensor([len(block) for block in self.blocks]).cumsum(0).tolist()
        return [slice(stop - len(block), stop) for stop, block in zip(stops, self.blocks, strict=True)]

    @CachedProperty
    def feedback(self) -> list[tuple[slice, Tensor]]:
        """What an error in a column is to change in later ones, for stretches of blocks of one size.

        Columns, and the upper Cholesky factor of each damped block's inverse, stacked [blocks, B, B].
        """
        groups: dict[int, list[Tensor]] = {}
        for block in self.damped().blocks:
            groups.setdefault(len(block), []).append(upper_root_of_inverse(block))
        found, start = [], 0
        for size, factors in groups.items():
            found.append((slice(start, start + size * len(factors)), torch.stack(factors)))
            start += size * len(factors)
        return found

    def scaled(self, factor: float) -> "Moment":
        """With other weights."""
        return Moment(tuple(block * factor for block in self.blocks))

    def damped(self) -> "Moment":
        """With a small part of the mean diagonal added, so that it has an inverse.

        Columns that no input reached get it, too.
        """
        mean = float(self.diagonal().mean()) or 1.0
        return Moment(tuple(block + torch.eye(len(block)) * (_DAMPING * mean) for block in self.blocks))

    def error(self, difference: Tensor) -> float:
        """Weighted sum of squares of `difference x`, for a difference [N, D] of two matrices."""
        return self.inner(difference, [difference])[0]

    def inner(self, one: Tensor, others: Sequence[Tensor]) -> list[float]:
        """Weighted sums of products of `one x` and `other x`, for matrices [N, D]."""
        sums = [0.0] * len(others)
        for columns, block in zip(self.slices(), self.blocks, strict=True):
            product = matmul(one[:, columns], block)
            for number, other in enumerate(others):
                sums[number] += float((product * other[:, columns]).sum(dim=1).sum())
        return sums


def moment_of_rows(inputs_SD: Tensor, weights_S: Tensor) -> Moment:
    """From inputs, each with its weight."""
    inputs_SD = inputs_SD.float()
    weighted_SD = inputs_SD * weights_S.float().unsqueeze(1)
    stretches = [slice(start, start + BLOCK_COLUMNS) for start in range(0, inputs_SD.shape[1], BLOCK_COLUMNS)]
    return Moment(tuple(matmul(inputs_SD[:, columns].T, weighted_SD[:, columns]) for columns in stretches))


def moment_of_matrix(moment_DD: Tensor) -> Moment:
    """From a whole moment [D, D]."""
    stops = range(0, len(moment_DD), BLOCK_COLUMNS)
    return Moment(tuple(moment_DD[i : i + BLOCK_COLUMNS, i : i + BLOCK_COLUMNS].float() for i in stops))


def add_moments(moments: Sequence[Moment]) -> Moment:
    """Sum of moments of one number of columns."""
    columns = zip(*(moment.blocks for moment in moments), strict=True)
    return Moment(tuple(torch.stack(blocks).sum(dim=0) for blocks in columns))


def add_part_moments(members: Sequence[Mapping[str, Moment]]) -> dict[str, Moment]:
    """Sums by part; parts that share a moment in every member share the sum."""
    sums: dict[tuple[int, ...], Moment] = {}
    found = {}
    for part in members[0]:
        same = tuple(id(moments[part]) for moments in members)
        if same not in sums:
            sums[same] = add_moments([moments[part] for moments in members])
        found[part] = sums[same]
    return found
