"""Measure a layer: read the experts of all variants once, in chunks, and compare them.

The loop over files, chunks and threads stands here; the arithmetic is `similarity/`.
"""

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import psutil
import torch
from numpy.typing import NDArray

from moemerge.checkpoint.checkpoint import Parts
from moemerge.checkpoint.headers import DTYPE_BYTES, StoredTensor
from moemerge.checkpoint.sizes import format_size
from moemerge.checkpoint.tensors import TensorReader, bytes_of, torch_dtype
from moemerge.checkpoint.variants import VariantSet
from moemerge.errors import DamagedInput, NotEnoughRoom
from moemerge.progress import Progress, Silent
from moemerge.similarity.gram import BLOCK_COLUMNS, ExpertGram, GramAccumulator
from moemerge.similarity.matrices import LayerSimilarity, build_layer_similarity

_MAX_COLUMNS = 65536
_MIN_COLUMNS = 1024
# The interpreter with torch and everything else that does not grow with the work.
_FIXED_BYTES = 320 * 2**20
# Sums are added up in this many parts whatever the number of threads, so that results do not depend on it.
_SHARES = 4


@dataclass(frozen=True, slots=True)
class _Chunk:
    first: int
    columns: int


def measure_layer(
    variants: VariantSet,
    layer: int,
    reader: TensorReader,
    progress: Progress | None = None,
    *,
    max_ram: int | None = None,
) -> LayerSimilarity:
    """Compare all experts of a layer, within and across variants.

    Args:
        variants: Local checkpoints of one family.
        layer: Index through all stacks.
        reader: Shared between threads.
        progress: Told of the bytes read.
        max_ram: Bytes of memory to stay within.

    Raises:
        NotEnoughRoom: The memory does not suffice for the smallest chunks.
        DamagedInput: NaN or infinity in an expert; the message names the tensor.
    """
    report = progress or Silent()
    models = list(variants.variants.values())
    reference = [variants.base] if variants.base else []
    num_slots = models[0].num_experts
    experts = [model.experts[layer, slot] for model in [*reference, *models] for slot in range(num_slots)]
    columns = limit_memory(variants, max_ram)
    grams = {}
    for part in experts[0]:
        tensors = [expert[part] for expert in experts]
        centred = _accumulate(tensors, num_slots, columns, reader, report)
        _require_finite(centred, tensors, num_slots, reader)
        grams[part] = ExpertGram(centred=centred, num_slots=num_slots, has_base=bool(reference))
    own = experts[num_slots if reference else 0 :]
    return build_layer_similarity(layer, tuple(variants.variants), grams, find_identical(own, reader))


def measurement_bytes(variants: VariantSet) -> int:
    """Bytes that measuring every layer reads."""
    base = [variants.base] if variants.base else []
    return sum(model.expert_bytes for model in [*variants.variants.values(), *base])


def limit_memory(variants: VariantSet, max_ram: int | None) -> int:
    """Columns that may be read at once so that measuring stays within `max_ram` bytes.

    Raises:
        NotEnoughRoom: Not even the smallest chunks fit, or less memory is free than is needed.
    """
    models = [*variants.variants.values(), *([variants.base] if variants.base else [])]
    rows = sum(model.num_experts for model in models)
    threads = _num_threads()

    def needed(columns: int) -> int:
        return _FIXED_BYTES + threads * rows * (4 * columns + 4 * min(columns, BLOCK_COLUMNS) + 24 * rows)

    available = psutil.virtual_memory().available + psutil.Process().memory_info().rss
    limit = min(max_ram or available, available)
    columns = _MAX_COLUMNS
    while columns > _MIN_COLUMNS and needed(columns) > limit:
        columns //= 2
    if needed(columns) > limit:
        limited_by = "--max-ram allows" if max_ram and max_ram <= available else "available are"
        raise NotEnoughRoom(
            f"comparing {rows} experts needs {format_size(needed(columns))} of memory; "
            f"{limited_by} {format_size(limit)}"
        )
    return columns


def find_identical(experts: Sequence[Parts], reader: TensorReader) -> NDArray[np.int64]:
    """For each expert the index of the first one with the same bytes in every part.

    Short samples tell apart most; only what agrees in them is read whole.
    """
    samples = [tuple(reader.sample_digest(tensor) for tensor in parts.values()) for parts in experts]
    counts = {sample: samples.count(sample) for sample in set(samples)}
    first: dict[tuple[str, ...], int] = {}
    identity = np.arange(len(experts), dtype=np.int64)
    for index, (parts, sample) in enumerate(zip(experts, samples, strict=True)):
        if counts[sample] > 1:
            digest = tuple(reader.digest(tensor) for tensor in parts.values())
            identity[index] = first.setdefault((*sample, *digest), index)
    return identity


def _accumulate(
    tensors: list[StoredTensor], num_slots: int, columns: int, reader: TensorReader, report: Progress
) -> NDArray[np.float64]:
    length = tensors[0].num_elements
    chunks = [_Chunk(first, min(columns, length - first)) for first in range(0, length, columns)]
    shares = [chunks[start::_SHARES] for start in range(_SHARES)]
    with _workers() as pool:
        totals = pool.map(lambda share: _accumulate_share(tensors, num_slots, share, reader, report), shares)
        total: NDArray[np.float64] = np.sum(list(totals), axis=0)
    return total


def _accumulate_share(
    tensors: list[StoredTensor], num_slots: int, chunks: list[_Chunk], reader: TensorReader, report: Progress
) -> NDArray[np.float64]:
    accumulator = GramAccumulator(len(tensors) // num_slots, num_slots)
    one_dtype = len({tensor.dtype for tensor in tensors}) == 1
    width = max((chunk.columns for chunk in chunks), default=0)
    buffer = torch.empty(len(tensors), width, dtype=torch_dtype(tensors[0]) if one_dtype else torch.float32)
    for chunk in chunks:
        rows = buffer[:, : chunk.columns]
        for row, tensor in zip(rows, tensors, strict=True):
            if one_dtype:
                reader.read_into(tensor, bytes_of(row), chunk.first * row.dtype.itemsize)
            else:
                own = torch.empty(chunk.columns, dtype=torch_dtype(tensor))
                reader.read_into(tensor, bytes_of(own), chunk.first * own.dtype.itemsize)
                row.copy_(own)
        accumulator.add(rows)
        report.advance(sum(DTYPE_BYTES[tensor.dtype] for tensor in tensors) * chunk.columns)
    return accumulator.total()


def _require_finite(
    centred: NDArray[np.float64], tensors: list[StoredTensor], num_slots: int, reader: TensorReader
) -> None:
    if np.isfinite(centred).all():
        return
    for tensor in tensors:
        if not torch.isfinite(reader.read(tensor)).all():
            raise DamagedInput(f"{tensor.path}: tensor {tensor.name} contains NaN or infinity")
    raise DamagedInput(
        f"{tensors[0].path}: values of {tensors[0].name} or its siblings overflow float32 squares"
    )


@contextmanager
def _workers() -> Iterator[ThreadPoolExecutor]:
    """Threads that each compute on one core; small products parallelise badly inside torch."""
    before = torch.get_num_threads()
    executor = ThreadPoolExecutor(_num_threads(), initializer=torch.set_num_threads, initargs=(1,))
    try:
        yield executor
    finally:
        executor.shutdown()
        torch.set_num_threads(before)


def _num_threads() -> int:
    return max(1, min(len(os.sched_getaffinity(0)), _SHARES))
