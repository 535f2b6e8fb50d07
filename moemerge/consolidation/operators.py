"""Merge operators: how a pool expert is made from the experts it stands for.

Each gives the tensor to write, streamed in chunks; arithmetic is float32, cast once.
"""

from collections.abc import Callable, Iterator, Sequence

import torch

from moemerge.checkpoint.headers import DTYPE_BYTES, StoredTensor
from moemerge.checkpoint.tensors import COPY_BYTES, TensorReader, bytes_of, torch_dtype
from moemerge.checkpoint.writer import TensorToWrite, stored_tensor
from moemerge.errors import DamagedInput


def copy(part: str, sources: Sequence[StoredTensor], reader: TensorReader) -> TensorToWrite:
    """The only source, unchanged."""
    (source,) = sources
    return stored_tensor(part, source, reader)


def mean(part: str, sources: Sequence[StoredTensor], reader: TensorReader) -> TensorToWrite:
    """The average of all sources, in the widest of their dtypes (the first of equally wide ones)."""
    widest = max(sources, key=lambda source: DTYPE_BYTES[source.dtype])
    return TensorToWrite(
        name=part,
        dtype=widest.dtype,
        shape=widest.shape,
        chunks=lambda: _mean_chunks(sources, torch_dtype(widest), reader),
    )


OPERATORS: dict[str, Callable[[str, Sequence[StoredTensor], TensorReader], TensorToWrite]] = {
    "copy": copy,
    "mean": mean,
}


def _mean_chunks(
    sources: Sequence[StoredTensor], dtype: torch.dtype, reader: TensorReader
) -> Iterator[memoryview]:
    length = sources[0].num_elements
    columns = COPY_BYTES // 4
    for first in range(0, length, columns):
        count = min(columns, length - first)
        total = torch.zeros(count)
        for source in sources:
            part = torch.empty(count, dtype=torch_dtype(source))
            reader.read_into(source, bytes_of(part), first * part.dtype.itemsize)
            _require_finite(part, source, "contains NaN or infinity")
            total += part
        mean_values = (total / len(sources)).to(dtype)
        _require_finite(mean_values, sources[0], f"has values that overflow {dtype} when they are averaged")
        yield bytes_of(mean_values)


def _require_finite(values: torch.Tensor, source: StoredTensor, complaint: str) -> None:
    if not values.isfinite().all():
        raise DamagedInput(f"{source.path}: tensor {source.name} {complaint}")
