"""As many pool experts in device memory as fit into an arena of bytes, and the rest on demand.

Plain experts are cast to the dtype of computing, coded ones stay coded. Knows nothing of who asks, nor why.
"""

from collections import OrderedDict, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from moemerge.bundle.coded import StoredMatrix
from moemerge.bundle.reader import Bundle
from moemerge.checkpoint.headers import StoredTensor
from moemerge.checkpoint.tensors import TORCH_DTYPES, require_mapped
from moemerge.errors import DamagedBundle, NotEnoughRoom
from moemerge.models import Activation, PlainPoolLayer, PoolLayer
from moemerge.models.arranging import Room, arrange
from moemerge.models.packed import Coded, Matrix, PackedMatrix
from moemerge.runner.rows import (
    EffectiveRows,
    activation_of,
    effective_layer,
    needs_effective,
    scratch_of,
)

Parts = dict[str, Tensor]
HeldParts = dict[str, Tensor | Coded]
Forms = dict[str, tuple[torch.dtype, tuple[int, ...]]]
"""Dtype and shape of the tensors that a pool expert takes in memory, by name."""


@dataclass(frozen=True, slots=True)
class _CachedLayer:
    """A layer whose experts, all plain, come through the cache."""

    cache: "CachedExpertPool"
    index: int
    activation: Activation

    def output(self, pool_index: int, hidden_TD: Tensor) -> Tensor:
        """See `PoolLayer.output`."""
        parts = {
            part: matrix
            for part, matrix in self.cache.expert(self.index, pool_index).items()
            if isinstance(matrix, Tensor)
        }
        return PlainPoolLayer([parts], self.activation).output(0, hidden_TD)


@dataclass(frozen=True, slots=True)
class _Held:
    """A pool expert in the arena: its memory by name of tensor, and what it makes."""

    memory: Parts
    parts: HeldParts

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.memory.values())


class CachedExpertPool:
    """As many pool experts as fit in an arena of fixed size; the rest is fetched when it is asked for.

    Every layer has a share of the arena by its bytes. The layer that is furthest over its share gives up the
    expert it has used least recently. Over all layers together that would be the one that is asked for next,
    because tokens go through the layers in a circle: nothing would ever be found.
    """

    def __init__(self, bundle: Bundle, dtype: torch.dtype, device: torch.device, *, arena_bytes: int) -> None:
        self.hits = 0
        self.misses = 0
        self.rows = EffectiveRows(bundle)
        self._bundle = bundle
        self._dtype, self._device = dtype, device
        self._stored = {layer.index: bundle.map_pool(layer.index) for layer in bundle.manifest.layers}
        self._sources = {layer.index: bundle.pool(layer.index) for layer in bundle.manifest.layers}
        sizes = {index: self._sizes(index) for index in self._sources}
        largest = max(max(of_layer) for of_layer in sizes.values())
        self.num_places = arena_bytes // largest
        if self.num_places < 1:
            raise NotEnoughRoom(
                f"{arena_bytes} bytes are left for pool experts, one takes {largest}. Give more device "
                f"memory, or fewer residents or less memory for the key/value cache"
            )
        self._arena_bytes = arena_bytes
        self._layer_bytes = {index: sum(of_layer) for index, of_layer in sizes.items()}
        self._used: dict[int, int] = defaultdict(int)
        self._held: OrderedDict[tuple[int, int], _Held] = OrderedDict()
        self.layers = self._build_layers(bundle)

    @property
    def nbytes(self) -> int:
        """Bytes of the arena that are in use."""
        return sum(held.nbytes for held in self._held.values())

    def expert(self, layer_index: int, pool_index: int) -> HeldParts:
        """Parts of a pool expert, fetched if it is not there; valid until the next call.

        Raises:
            DamagedInput: The bundle's file has become shorter.
        """
        key = (layer_index, pool_index)
        if key in self._held:
            self.hits += 1
            self._held.move_to_end(key)
        else:
            self.misses += 1
            stored = self._mapped(layer_index, pool_index)
            forms = self._forms(layer_index, pool_index)
            memory = self._take(layer_index, forms)
            self._held[key] = self._fill(memory, stored)
            self._used[layer_index] += self._held[key].nbytes
        return self._held[key].parts

    def verify_integrity(self) -> None:
        """Prove that what is held is the bundle's, in no more bytes than there are.

        Raises:
            DamagedInput: It is not.
        """
        assert self.nbytes <= self._arena_bytes
        assert self.nbytes == sum(self._used.values())
        for (layer_index, pool_index), held in self._held.items():
            stored = self._mapped(layer_index, pool_index)
            for part, matrix in held.parts.items():
                if not _has_values_of(matrix, stored[part]):
                    raise DamagedBundle(f"pool expert {pool_index} of layer {layer_index}: {part} differs")

    def _build_layers(self, bundle: Bundle) -> dict[int, PoolLayer]:
        activation, scratch = activation_of(bundle), scratch_of(bundle, self._dtype, self._device)
        layers: dict[int, PoolLayer] = {}
        for layer in bundle.manifest.layers:
            if scratch is None or not needs_effective(bundle, layer):
                layers[layer.index] = _CachedLayer(self, layer.index, activation)
            else:
                rows, source = self.rows.layers[layer.index], partial(self.expert, layer.index)
                layers[layer.index] = effective_layer(layer, rows, source, scratch, activation)
        return layers

    def _sizes(self, layer_index: int) -> list[int]:
        """Bytes that each pool expert of a layer takes in the arena."""
        rows = self.rows.layers[layer_index]
        return [
            sum(plain_bytes(matrix, self._dtype, number in rows.residual_bases) for matrix in parts.values())
            for number, parts in enumerate(self._sources[layer_index])
        ]

    def _forms(self, layer_index: int, pool_index: int) -> Forms:
        """Dtype and shape of the tensors that a pool expert takes in memory, by name."""
        is_base = pool_index in self.rows.layers[layer_index].residual_bases
        forms: Forms = {}
        for part, matrix in self._sources[layer_index][pool_index].items():
            if isinstance(matrix, StoredTensor):
                forms[part] = (TORCH_DTYPES[matrix.dtype] if is_base else self._dtype, matrix.shape)
            else:
                for suffix, place in matrix.places.items():
                    forms[f"{part}.{suffix}"] = (TORCH_DTYPES[place.dtype], place.shape)
        return forms

    def _mapped(self, layer_index: int, pool_index: int) -> dict[str, Matrix]:
        for matrix in self._sources[layer_index][pool_index].values():
            for place in [matrix] if isinstance(matrix, StoredTensor) else matrix.places.values():
                require_mapped(place)
        return self._stored[layer_index][pool_index]

    def _take(self, layer_index: int, forms: Forms) -> Parts:
        """Memory for a pool expert, of those that make room if it has the same form."""
        nbytes = sum(dtype.itemsize * torch.Size(shape).numel() for dtype, shape in forms.values())
        found: Parts | None = None
        while sum(self._used.values()) + nbytes > self._arena_bytes:
            memory = self._give_up(layer_index, nbytes)
            if {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in memory.items()} == forms:
                found = memory
        return found or {
            name: torch.empty(shape, dtype=dtype, device=self._device)
            for name, (dtype, shape) in forms.items()
        }

    def _give_up(self, layer_index: int, nbytes: int) -> Parts:
        """Set an expert aside for one of so many bytes in a layer; gives back its memory."""
        total = sum(self._layer_bytes.values())

        def excess(index: int) -> int:
            used = self._used[index] + (nbytes if index == layer_index else 0)
            return used * total - self._layer_bytes[index] * self._arena_bytes

        holders = {index for index, _ in self._held}
        victim = max(holders, key=lambda index: (excess(index), index == layer_index, -index))
        key = next(key for key in self._held if key[0] == victim)
        held = self._held.pop(key)
        self._used[victim] -= held.nbytes
        return held.memory

    def _fill(self, memory: Parts, stored: Mapping[str, Matrix]) -> _Held:
        parts: HeldParts = {}
        for part, matrix in stored.items():
            if isinstance(matrix, Tensor):
                memory[part].copy_(matrix)
                parts[part] = memory[part]
                continue
            codes, scales = memory[f"{part}.codes"], memory[f"{part}.scales"]
            codes.copy_(matrix.codes)
            scales.copy_(matrix.scales)
            held = PackedMatrix(codes, scales, matrix.bits, matrix.group)
            parts[part] = arrange(held, self._dtype, Room.NONE, by_rows=True)
        return _Held(memory, parts)


def plain_bytes(matrix: StoredMatrix, dtype: torch.dtype, is_base: bool) -> int:
    """Bytes of a part in memory: plain ones in the dtype of computing, unless something is added to them."""
    if isinstance(matrix, StoredTensor) and not is_base:
        return matrix.num_elements * dtype.itemsize
    return matrix.nbytes


def _has_values_of(held: Tensor | Coded, stored: Matrix) -> bool:
    if isinstance(held, Tensor):
        return isinstance(stored, Tensor) and torch.equal(stored.to(held.dtype), held.cpu())
    return not isinstance(stored, Tensor) and torch.equal(stored.dense(), held.dense().cpu())
