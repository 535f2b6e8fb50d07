"""The plain average of whole models, routers and attention too, as a checkpoint: the naive baseline."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from moemerge.bundle.joined import JoinedTensor, expert_tensors
from moemerge.bundle.target import building
from moemerge.calibration.statistics import LayerStatistics
from moemerge.checkpoint.checkpoint import Checkpoint
from moemerge.checkpoint.headers import StoredTensor
from moemerge.checkpoint.side_files import find_side_files
from moemerge.checkpoint.tensors import TensorReader, bytes_of, torch_dtype
from moemerge.checkpoint.weights import SINGLE
from moemerge.checkpoint.writer import TensorToWrite, write_tensors
from moemerge.consolidation.measured import Statistics, WithoutText
from moemerge.errors import IncompatibleInputs


def mean_of_tensors(tensors: Sequence[StoredTensor], reader: TensorReader) -> Tensor:
    """Mean in float32.

    Raises:
        IncompatibleInputs: Shapes differ, for example of vocabularies.
    """
    if len({tensor.shape for tensor in tensors}) > 1:
        raise IncompatibleInputs(f"{tensors[0].name} has several shapes; whole models cannot be averaged")
    total = torch.zeros(tensors[0].shape)
    for tensor in tensors:
        total += reader.read(tensor)
    return total / len(tensors)


def write_average(checkpoints: Sequence[Checkpoint], folder: Path) -> None:
    """Write the checkpoint whose every tensor is the mean of theirs; all else is the first's.

    Raises:
        IncompatibleInputs: Shapes differ.
        NotEnoughRoom: It cannot be written.
    """
    first = checkpoints[0]
    family, names = first.family, first.family.role_names(first.settings)
    averages: dict[str, Mean | JoinedTensor] = {
        names[role]: Mean([c.tensors[role] for c in checkpoints]) for role in first.tensors
    }
    averages |= expert_tensors(family, first.settings, lambda layer: _mean_experts(checkpoints, layer.index))
    with building(folder) as place, TensorReader() as reader:
        writes = [average.to_write(name, reader) for name, average in averages.items()]
        write_tensors(place / SINGLE, writes, {"format": "pt"})
        for name in find_side_files(first.repository):
            (place / name).write_bytes(first.repository.read_bytes(name))


@dataclass(frozen=True, slots=True)
class Mean:
    """The mean of tensors of one shape, in the dtype of the first."""

    tensors: Sequence[StoredTensor]

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes."""
        return self.tensors[0].shape

    @property
    def dtype(self) -> str:
        """Safetensors dtype."""
        return self.tensors[0].dtype

    def compute(self, reader: TensorReader) -> Tensor:
        """Its value."""
        return mean_of_tensors(self.tensors, reader).to(torch_dtype(self.tensors[0]))

    def to_write(self, name: str, reader: TensorReader) -> TensorToWrite:
        """The mean under that name, computed when it is written."""
        return TensorToWrite(
            name=name, dtype=self.dtype, shape=self.shape, chunks=lambda: [bytes_of(self.compute(reader))]
        )


def _mean_experts(checkpoints: Sequence[Checkpoint], layer_index: int) -> list[dict[str, Mean]]:
    """Parts of every slot of a layer."""
    return [
        {
            part: Mean([checkpoint.experts[layer_index, slot][part] for checkpoint in checkpoints])
            for part in checkpoints[0].family.experts.parts
        }
        for slot in range(checkpoints[0].num_experts)
    ]


@dataclass(frozen=True, slots=True)
class SummedStatistics(WithoutText):
    """Statistics of several variants' texts as if they were one's: what an average of them is coded for."""

    of: Statistics
    variants: Sequence[str]

    @property
    def identity(self) -> str:
        """See `Statistics`."""
        return f"sum:{self.of.identity}"

    def at_layer(self, layer_index: int) -> "SummedStatistics":
        """See `Statistics`."""
        return SummedStatistics(self.of.at_layer(layer_index), self.variants)

    def files(self, layer_index: int) -> frozenset[Path]:
        """See `Statistics`."""
        return self.of.files(layer_index)

    @property
    def layer_bytes(self) -> int:
        """See `Statistics`; sums of those of the variants."""
        return self.of.layer_bytes

    def layer(self, variant: str, layer_index: int) -> LayerStatistics:
        """See `Statistics`."""
        layers = [self.of.layer(name, layer_index) for name in self.variants]
        first = layers[0].slots[0]
        total = LayerStatistics.empty(len(layers[0].slots), len(first.moment_DD), first.reservoir)
        for layer in layers:
            total.add(layer)
        return total
