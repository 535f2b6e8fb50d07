"""Expert tensors as a family's layout has them on disk, put together from parts in canonical form.

The inverse of `ExpertTensor.places`. Knows nothing of where parts come from.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from moemerge.checkpoint.expert_layout import ExpertTensor
from moemerge.checkpoint.family import Family, RoutedLayer, Settings
from moemerge.checkpoint.headers import StoredTensor
from moemerge.checkpoint.tensors import DTYPE_NAMES, TORCH_DTYPES, TensorReader, bytes_of
from moemerge.checkpoint.writer import TensorToWrite
from moemerge.errors import DamagedInput


class Computed(Protocol):
    """A tensor that is computed when it is asked for."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes."""
        ...

    @property
    def dtype(self) -> str:
        """Safetensors dtype."""
        ...

    def compute(self, reader: TensorReader) -> Tensor:
        """Its value."""
        ...


Part = StoredTensor | Computed
Own = TypeVar("Own", bound=Part)


@dataclass(frozen=True, slots=True)
class JoinedTensor:
    """A tensor of several parts or experts, computed expert by expert as it is written.

    Attributes:
        tensor: What it holds, and in which order.
        experts: Its parts, of one expert or of all.
    """

    tensor: ExpertTensor
    experts: Sequence[Sequence[Part]]

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes on disk."""
        return self.tensor.shape(self.experts[0][0].shape, len(self.experts))

    @property
    def dtype(self) -> str:
        """The narrowest dtype that holds all parts."""
        dtypes = {TORCH_DTYPES[part.dtype] for parts in self.experts for part in parts}
        return DTYPE_NAMES[reduce(torch.promote_types, dtypes)]

    @property
    def nbytes(self) -> int:
        """Bytes on disk."""
        return math.prod(self.shape) * TORCH_DTYPES[self.dtype].itemsize

    def to_write(self, name: str, reader: TensorReader) -> TensorToWrite:
        """The tensor under that name; writing it fails if it holds NaN or infinity."""
        dtype = TORCH_DTYPES[self.dtype]

        def chunks() -> Iterator[memoryview]:
            for parts in self.experts:
                value = lay_out(self.tensor, [_value(part, reader).to(dtype) for part in parts])
                if not value.isfinite().all():
                    raise DamagedInput(f"{name}: what is stored for it contains NaN or infinity")
                yield bytes_of(value)

        return TensorToWrite(name=name, dtype=self.dtype, shape=self.shape, chunks=chunks)


def lay_out(tensor: ExpertTensor, parts: Sequence[Tensor]) -> Tensor:
    """The entries of one expert, its parts [row, column] or [row] given, in their order on disk."""
    stacked = torch.stack(list(parts))
    dimensions = ["part", "row", "column"][: stacked.ndim]
    order = [factor for factor in tensor.order if factor != "expert"]
    order += [dimension for dimension in dimensions if dimension not in order]
    return stacked.permute([dimensions.index(factor) for factor in order]).contiguous()


def expert_tensors(
    family: Family, settings: Settings, slots_of: Callable[[RoutedLayer], Sequence[Mapping[str, Own]]]
) -> dict[str, Own | JoinedTensor]:
    """All expert tensors by exported name, layer by layer, from the parts of every slot of a layer."""
    tensors = family.experts.layouts[0].tensors
    result: dict[str, Own | JoinedTensor] = {}
    for layer in family.routed_layers(settings):
        slots = slots_of(layer)
        for slot, parts in enumerate(slots):
            for tensor in tensors:
                if not tensor.is_stacked:
                    name = family.expert_tensor_name(tensor, layer, slot)
                    result[name] = _of_one(tensor, [parts[part] for part in tensor.holds])
        for tensor in tensors:
            if tensor.is_stacked:
                experts = [[parts[part] for part in tensor.holds] for parts in slots]
                result[family.expert_tensor_name(tensor, layer)] = JoinedTensor(tensor, experts)
    return result


def _of_one(tensor: ExpertTensor, parts: Sequence[Own]) -> Own | JoinedTensor:
    return parts[0] if tensor.is_canonical else JoinedTensor(tensor, [parts])


def _value(part: Part, reader: TensorReader) -> Tensor:
    return reader.read(part) if isinstance(part, StoredTensor) else part.compute(reader)
