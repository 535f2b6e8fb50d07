"""Measure a layer: read the experts of all variants once, in chunks, and compare them.

The loop over files, chunks and threads stands here; the arithmetic is `similarity/`.
"""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from types import TracebackType

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

_MAX_COLUMNS = 131072
_MIN_COLUMNS = 1024
# The interpreter with torch and everything else that does not grow with the work.
_FIXED_BYTES = 320 * 2**20
# Sums are added up in this many parts whatever the number of threads, so that results do not depend on it.
_SHARES = 4


@dataclass(frozen=True, slots=True)
class _Chunk:
    """Columns of every expert."""

    first: int
    columns: int

    def cut(self, columns: int) -> list["_Chunk"]:
        """The same in pieces of so many columns."""
        end = self.first + self.columns
        return [_Chunk(first, min(columns, end - first)) for first in range(self.first, end, columns)]


class Measurer(AbstractContextManager["Measurer"]):
    """Measures layers of one set of variants; holds threads and buffers for the length of a pass.

    Args:
        variants: Local checkpoints of one family.
        max_ram: Bytes of memory to stay within.
        progress: Told of the bytes read.

    Raises:
        NotEnoughRoom: The memory does not suffice for the smallest chunks.
    """

    def __init__(
        self, variants: VariantSet, max_ram: int | None = None, progress: Progress | None = None
    ) -> None:
        self._variants = variants
        self._columns = limit_memory(variants, max_ram)
        self._report = progress or Silent()
        self._models = [*([variants.base] if variants.base else []), *variants.variants.values()]
        self._num_slots = variants.first.num_experts
        self._shares = [_Share(len(self._models), self._num_slots) for _ in range(_SHARES)]
        self._reader = TensorReader()
        # Each thread computes on one core: small products parallelise badly inside torch.
        self._torch_threads = torch.get_num_threads()
        self._pool = ThreadPoolExecutor(_num_threads(), initializer=torch.set_num_threads, initargs=(1,))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown(cancel_futures=True)
        torch.set_num_threads(self._torch_threads)
        self._reader.__exit__(kind, error, trace)

    def measure(self, layer: int) -> LayerSimilarity:
        """Compare all experts of a layer (counted through all stacks), within and across variants.

        Raises:
            DamagedInput: NaN or infinity in an expert; the message names the tensor.
        """
        experts = [m.experts[layer, slot] for m in self._models for slot in range(self._num_slots)]
        has_base = self._variants.base is not None
        grams = {}
        for part in experts[0]:
            tensors = [expert[part] for expert in experts]
            centred = self._accumulate(tensors)
            _require_finite(centred, tensors, self._reader)
            grams[part] = ExpertGram(centred=centred, num_slots=self._num_slots, has_base=has_base)
        own = experts[self._num_slots if has_base else 0 :]
        names = tuple(self._variants.variants)
        identity = find_identical(own, self._reader)
        return build_layer_similarity(layer, names, grams, identity, self._routers(layer))

    def _routers(self, layer: int) -> list[NDArray[np.float64]] | None:
        """Every variant's router in a layer, when all have one."""
        place = next(routed for routed in self._variants.first.routed_layers if routed.index == layer)
        role = f"{place.stack}.{place.block}.router"
        models = self._variants.variants.values()
        if any(role not in model.tensors for model in models):
            return None
        return [self._reader.read(model.tensors[role]).double().numpy() for model in models]

    def _accumulate(self, tensors: list[StoredTensor]) -> NDArray[np.float64]:
        length = tensors[0].num_elements
        # Small tensors are cut finer, so that every share has something to do. A memory limit only cuts
        # chunks into whole blocks, so that it does not change the order of sums, nor the result.
        columns = min(_MAX_COLUMNS, max(_MIN_COLUMNS, -(-length // (2 * _SHARES))))
        chunks = _Chunk(0, length).cut(columns)
        work = [
            self._pool.submit(
                share.accumulate,
                tensors,
                [piece for chunk in chunks[number::_SHARES] for piece in chunk.cut(self._columns)],
                self._reader,
                self._report,
            )
            for number, share in enumerate(self._shares)
        ]
        total: NDArray[np.float64] = np.sum([future.result() for future in work], axis=0)
        return total


class _Share:
    """A part of the chunks of every tensor, with buffers that are used again."""

    def __init__(self, num_models: int, num_slots: int) -> None:
        self._accumulator = GramAccumulator(num_models, num_slots)
        self._buffer = torch.empty(0)

    def accumulate(
        self, tensors: list[StoredTensor], chunks: list[_Chunk], reader: TensorReader, report: Progress
    ) -> NDArray[np.float64]:
        """Sum over the chunks, [N, N]."""
        one_dtype = len({tensor.dtype for tensor in tensors}) == 1
        width = max((chunk.columns for chunk in chunks), default=0)
        buffer = self._reserve(len(tensors), width, torch_dtype(tensors[0]) if one_dtype else torch.float32)
        for chunk in chunks:
            rows = buffer[:, : chunk.columns]
            for row, tensor in zip(rows, tensors, strict=True):
                if one_dtype:
                    reader.read_into(tensor, bytes_of(row), chunk.first * row.dtype.itemsize)
                else:
                    own = torch.empty(chunk.columns, dtype=torch_dtype(tensor))
                    reader.read_into(tensor, bytes_of(own), chunk.first * own.dtype.itemsize)
                    row.copy_(own)
            self._accumulator.add(rows)
            report.advance(sum(DTYPE_BYTES[tensor.dtype] for tensor in tensors) * chunk.columns)
        return self._accumulator.take_total()

    def _reserve(self, rows: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
        if self._buffer.numel() < rows * columns or self._buffer.dtype != dtype:
            self._buffer = torch.empty(rows * columns, dtype=dtype)
        return self._buffer[: rows * columns].view(rows, columns)


def measurement_bytes(variants: VariantSet) -> int:
    """Bytes that measuring every layer reads."""
    base = [variants.base] if variants.base else []
    return sum(model.expert_bytes for model in [*variants.variants.values(), *base])


def measurement_memory(variants: VariantSet, max_ram: int | None = None) -> int:
    """Bytes of memory that measuring a layer takes where there is enough, or `max_ram` if that is less."""
    most = _memory_of(variants, _MAX_COLUMNS)
    return most if max_ram is None else min(most, max_ram)


def limit_memory(variants: VariantSet, max_ram: int | None) -> int:
    """Columns that may be read at once so that measuring stays within `max_ram` bytes.

    Raises:
        NotEnoughRoom: Not even the smallest chunks fit, or less memory is free than is needed.
    """
    available = psutil.virtual_memory().available + psutil.Process().memory_info().rss
    limit = min(max_ram or available, available)
    columns = _MAX_COLUMNS
    while columns > BLOCK_COLUMNS and _memory_of(variants, columns) > limit:
        columns //= 2
    if _memory_of(variants, columns) > limit:
        limited_by = "--max-ram allows" if max_ram and max_ram <= available else "available are"
        raise NotEnoughRoom(
            f"comparing {_num_rows(variants)} experts needs {format_size(_memory_of(variants, columns))} of "
            f"memory; {limited_by} {format_size(limit)}"
        )
    return columns


def least_memory(variants: VariantSet) -> int:
    """Bytes of memory that measuring takes with the smallest chunks."""
    return _memory_of(variants, BLOCK_COLUMNS)


def _memory_of(variants: VariantSet, columns: int) -> int:
    rows = _num_rows(variants)
    return _FIXED_BYTES + _SHARES * rows * (4 * columns + 4 * BLOCK_COLUMNS + 24 * rows)


def _num_rows(variants: VariantSet) -> int:
    return sum(model.num_experts for model in variants.checkpoints)


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


def _require_finite(centred: NDArray[np.float64], tensors: list[StoredTensor], reader: TensorReader) -> None:
    if np.isfinite(centred).all():
        return
    for tensor in tensors:
        if not torch.isfinite(reader.read(tensor)).all():
            raise DamagedInput(f"{tensor.path}: tensor {tensor.name} contains NaN or infinity")
    raise DamagedInput(
        f"{tensors[0].path}: values of {tensors[0].name} or its siblings overflow float32 squares"
    )


def _num_threads() -> int:
    return max(1, min(_available_cores(), _SHARES))


def _available_cores() -> int:
    # Only Linux tells which cores this process may use.
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
