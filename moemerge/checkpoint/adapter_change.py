"""What an adapter makes of one tensor, computed some rows at a time.

Pure arithmetic over stored factors: in float32, cast once to the dtype that the tensor is stored in.

Source: peft 0.21.2, `tuners/lora/layer.py` and `tuners/lora/dora.py`; LoRA arXiv:2106.09685, rsLoRA
arXiv:2312.03732, DoRA arXiv:2402.09353.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from moemerge.checkpoint.headers import StoredTensor
from moemerge.checkpoint.tensors import COPY_BYTES, TensorReader, bytes_of, torch_dtype
from moemerge.errors import DamagedInput


@dataclass(frozen=True, slots=True, kw_only=True)
class LowRank:
    """A product of two factors that is added to a tensor W [out, in].

    Attributes:
        a: A [r, in]; where `is_transposed`, [r, out]. For stacked experts [E * r, in].
        b: B [out, r]; where `is_transposed`, [in, r]. For stacked experts [out, r * E], those of one expert
            E columns apart.
        scale: Factor s of the sum, W + s B A.
        is_transposed: Whether the transposed product is added, as for embeddings.
        slot: Which of the stacked experts, and how many there are.
        outputs: The rows of B A that belong to this tensor; None for all.
        magnitude: Norms that DoRA gives to rows; where `is_transposed`, to columns.
    """

    a: StoredTensor
    b: StoredTensor
    scale: float
    is_transposed: bool = False
    slot: tuple[int, int] = (0, 1)
    outputs: slice | None = None
    magnitude: StoredTensor | None = None

    def factors(self, reader: TensorReader, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Left [out, r], of this tensor's rows, and right [r, in]."""
        slot, experts = self.slot
        rank = self.a.shape[0] // experts
        a = _read_rows(self.a, slot * rank, rank, reader).to(dtype)
        b = reader.read(self.b)[:, slot::experts].to(dtype)
        left, right = (a.T, b.T) if self.is_transposed else (b, a)
        return left if self.outputs is None else left[self.outputs], right


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """What happens to one tensor: another takes its place, then a product is added.

    Attributes:
        replacement: Tensor that takes the place of the base's.
        low_rank: What is added.
    """

    replacement: StoredTensor | None = None
    low_rank: LowRank | None = None

    def shape(self, original: StoredTensor) -> tuple[int, ...]:
        """Shape of the result; a replacement may have more rows, for a larger vocabulary."""
        return (self.replacement or original).shape

    def stored(self) -> list[StoredTensor]:
        """The adapter's tensors that are needed."""
        low_rank = self.low_rank
        needed = [self.replacement, *([low_rank.a, low_rank.b, low_rank.magnitude] if low_rank else [])]
        return [tensor for tensor in needed if tensor is not None]


def changed_rows(change: Change, original: StoredTensor, reader: TensorReader) -> Iterator[Tensor]:
    """The changed tensor in the dtype of the original, some rows at a time.

    Raises:
        DamagedInput: A value is NaN, infinite, or too large for the dtype.
    """
    stored = torch_dtype(original)
    for values in _normed(change, original, reader):
        rows = values.to(stored)
        if not rows.isfinite().all():
            raise DamagedInput(
                f"{change.stored()[0].path}: applied to {original.name} gives NaN, infinity, or values too "
                f"large for {original.dtype}"
            )
        yield rows


def _normed(change: Change, original: StoredTensor, reader: TensorReader) -> Iterator[Tensor]:
    low_rank = change.low_rank
    if low_rank is None or low_rank.magnitude is None:
        yield from _added(change, original, reader)
        return
    magnitude = reader.read(low_rank.magnitude).flatten()
    if low_rank.is_transposed:
        # All rows must be seen before the norm of a column is known.
        squares = sum(values.square().sum(0) for values in _added(change, original, reader))
        assert isinstance(squares, Tensor)
        for values in _added(change, original, reader):
            yield values * (magnitude.to(values.dtype) / squares.sqrt())
        return
    first = 0
    for values in _added(change, original, reader):
        kept = magnitude[first : first + len(values)].to(values.dtype)
        yield values * (kept / values.norm(dim=1))[:, None]
        first += len(values)


def _added(change: Change, original: StoredTensor, reader: TensorReader) -> Iterator[Tensor]:
    stored = torch_dtype(original)
    dtype = torch.promote_types(stored, torch.float32)
    factors = change.low_rank.factors(reader, dtype) if change.low_rank else None
    for first, block in _blocks(change.replacement or original, reader):
        values = block.to(stored).to(dtype)
        if change.low_rank and factors:
            left, right = factors
            values = values.addmm(left[first : first + len(values)], right, alpha=change.low_rank.scale)
        yield values


def _blocks(tensor: StoredTensor, reader: TensorReader) -> Iterator[tuple[int, Tensor]]:
    """Consecutive rows with the index of the first; always cut alike, so that sums come out alike."""
    rows = max(1, COPY_BYTES * tensor.shape[0] // max(1, tensor.nbytes))
    for first in range(0, tensor.shape[0], rows):
        count = min(rows, tensor.shape[0] - first)
        yield first, _read_rows(tensor, first, count, reader)


def _read_rows(tensor: StoredTensor, first: int, count: int, reader: TensorReader) -> Tensor:
    rows = torch.empty((count, *tensor.shape[1:]), dtype=torch_dtype(tensor))
    reader.read_into(tensor, bytes_of(rows), first * (tensor.nbytes // tensor.shape[0]))
    return rows
