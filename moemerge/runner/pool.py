"""The pool experts in device memory: all of them, or as many as fit and the rest on demand.

Layers are `PoolLayer`s for the models. What a pool expert computes does not depend on which of the two
holds it, but for the rounding of another product kernel.
"""

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from moemerge.bundle.reader import Bundle
from moemerge.checkpoint.tensors import require_mapped
from moemerge.errors import DamagedBundle, NotEnoughRoom
from moemerge.models import Activation, PlainPoolLayer, PoolLayer
from moemerge.models.products import can_pack, pack

Parts = dict[str, Tensor]


class ExpertPool:
    """All pool experts of a bundle in device memory.

    Matrices that read the same input are one product, `gate_up`. On a CPU in bf16 they lie in the blocked
    layout of its matrix kernels, which reads 1.5 to 1.8 times faster for few rows than the plain one.
    """

    def __init__(
        self, bundle: Bundle, dtype: torch.dtype, device: torch.device, *, is_packed: bool = True
    ) -> None:
        self.is_packed = is_packed and can_pack(dtype, device)
        activation = activation_of(bundle)
        self.nbytes = pool_bytes(bundle, dtype)
        self.layers: dict[int, PoolLayer] = {}
        for layer in bundle.manifest.layers:
            experts = [self._load(parts, dtype, device) for parts in bundle.map_pool(layer.index)]
            self.layers[layer.index] = PlainPoolLayer(experts, activation)

    hits = 0
    misses = 0

    def verify_integrity(self) -> None:
        """Nothing moves, so there is nothing that could have gone wrong."""

    def _load(self, stored: Parts, dtype: torch.dtype, device: torch.device) -> Parts:
        if not self.is_packed:
            # Never the mapped file itself: it may change, and its pages come and go.
            return {part: t.to(device=device, dtype=dtype, copy=True) for part, t in stored.items()}
        return {part: pack(tensor) for part, tensor in _fused(stored).items()}


@dataclass(frozen=True, slots=True)
class _CachedLayer:
    """A layer whose experts come through the cache."""

    cache: "CachedExpertPool"
    index: int

    def output(self, pool_index: int, hidden_TD: Tensor) -> Tensor:
        """See `PoolLayer.output`."""
        return self.cache.expert(self.index, pool_index).output(0, hidden_TD)


class CachedExpertPool:
    """As many pool experts as fit in an arena of fixed size, the least recently used makes room.

    Every expert has the same shapes, so a place in the arena serves any of them.
    """

    def __init__(self, bundle: Bundle, dtype: torch.dtype, device: torch.device, *, arena_bytes: int) -> None:
        self.hits = 0
        self.misses = 0
        self._shapes = {part: torch.Size(shape) for part, shape in bundle.manifest.parts.items()}
        self._activation = activation_of(bundle)
        expert_bytes = sum(shape.numel() for shape in self._shapes.values()) * dtype.itemsize
        self.num_places = arena_bytes // expert_bytes
        if self.num_places < 1:
            raise NotEnoughRoom(
                f"{arena_bytes} bytes are left for pool experts, one takes {expert_bytes}. Give more device "
                f"memory, or fewer residents or less memory for the key/value cache"
            )
        self._stored = {layer.index: bundle.map_pool(layer.index) for layer in bundle.manifest.layers}
        self._sources = {layer.index: bundle.pool(layer.index) for layer in bundle.manifest.layers}
        self._dtype, self._device = dtype, device
        self._held: OrderedDict[tuple[int, int], Parts] = OrderedDict()
        self.layers: dict[int, PoolLayer] = {
            layer.index: _CachedLayer(self, layer.index) for layer in bundle.manifest.layers
        }

    @property
    def nbytes(self) -> int:
        """Bytes of the arena that are in use."""
        return sum(tensor.nbytes for parts in self._held.values() for tensor in parts.values())

    def expert(self, layer_index: int, pool_index: int) -> PoolLayer:
        """A pool expert, fetched if it is not there; valid until the next call.

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
            place = self._free_place()
            for part, tensor in stored.items():
                place[part].copy_(tensor)
            self._held[key] = place
        return PlainPoolLayer([self._held[key]], self._activation)

    def verify_integrity(self) -> None:
        """Prove that what is held is the bundle's, in no more places than there are.

        Raises:
            DamagedInput: It is not.
        """
        assert len(self._held) <= self.num_places
        for (layer_index, pool_index), parts in self._held.items():
            stored = self._mapped(layer_index, pool_index)
            for part, tensor in parts.items():
                if not torch.equal(stored[part].to(self._dtype), tensor.cpu()):
                    raise DamagedBundle(f"pool expert {pool_index} of layer {layer_index}: {part} differs")

    def _mapped(self, layer_index: int, pool_index: int) -> Parts:
        for source in self._sources[layer_index][pool_index].values():
            require_mapped(source)
        return self._stored[layer_index][pool_index]

    def _free_place(self) -> Parts:
        if len(self._held) < self.num_places:
            return {
                part: torch.empty(shape, dtype=self._dtype, device=self._device)
                for part, shape in self._shapes.items()
            }
        return self._held.popitem(last=False)[1]


def load_pool(
    bundle: Bundle,
    dtype: torch.dtype,
    device: torch.device,
    *,
    memory_bytes: int | None,
    is_packed: bool = True,
) -> ExpertPool | CachedExpertPool:
    """The pool, all of it when it fits into `memory_bytes`.

    Raises:
        NotEnoughRoom: Not even one pool expert fits.
    """
    if memory_bytes is None or pool_bytes(bundle, dtype) <= memory_bytes:
        return ExpertPool(bundle, dtype, device, is_packed=is_packed)
    return CachedExpertPool(bundle, dtype, device, arena_bytes=memory_bytes)


def pool_bytes(bundle: Bundle, dtype: torch.dtype) -> int:
    """Bytes of all pool experts in that dtype."""
    num_experts = sum(layer.num_experts for layer in bundle.manifest.layers)
    return num_experts * sum(torch.Size(s).numel() for s in bundle.manifest.parts.values()) * dtype.itemsize


def activation_of(bundle: Bundle) -> Activation:
    """Form of the experts; the same in every variant, whose settings must agree on it."""
    first = next(iter(bundle.manifest.variants.values()))
    return Activation(str(first.settings["activation"]))


def _fused(parts: Mapping[str, Tensor]) -> Parts:
    if "gate" not in parts:
        return dict(parts)
    rest = {part: tensor for part, tensor in parts.items() if part not in ("gate", "up")}
    return {"gate_up": torch.cat((parts["gate"], parts["up"])), **rest}
