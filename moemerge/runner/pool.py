"""The expert pool in memory: parts of every pool expert, shared by all variants."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from moemerge.bundle.reader import Bundle
from moemerge.models import PlainExpertLayer, PlainExperts

PoolParts = Mapping[str, list[Tensor]]


@dataclass(frozen=True, slots=True)
class LoadedPool:
    """Parts by layer index and name, one tensor per pool expert."""

    layers: Mapping[int, PoolParts]

    @property
    def nbytes(self) -> int:
        """Bytes of all pool experts."""
        parts = [tensors for layer in self.layers.values() for tensors in layer.values()]
        return sum(tensor.nbytes for tensors in parts for tensor in tensors)

    def seen_by(self, maps: Mapping[int, list[int]], device: torch.device) -> PlainExperts:
        """The pool through a variant's expert maps."""
        return PlainExperts(
            {
                index: PlainExpertLayer(torch.tensor(maps[index], device=device), parts)
                for index, parts in self.layers.items()
            }
        )


def load_pool(bundle: Bundle, dtype: torch.dtype, device: torch.device) -> LoadedPool:
    """Map the pool files; where dtype and device are as stored nothing is read until it is used."""
    layers = {}
    for layer in bundle.manifest.layers:
        pool = bundle.map_pool(layer.index)
        layers[layer.index] = {
            part: [expert[part].to(device=device, dtype=dtype) for expert in pool]
            for part in bundle.manifest.parts
        }
    return LoadedPool(layers)
