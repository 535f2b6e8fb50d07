"""The plain average of whole models, routers and attention too, as a checkpoint: the naive baseline."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from moemerge.bundle.target import building
from moemerge.calibration.statistics import LayerStatistics
from moemerge.checkpoint.checkpoint import Checkpoint
from moemerge.checkpoint.headers import StoredTensor
from moemerge.checkpoint.side_files import find_side_files
from moemerge.checkpoint.tensors import TensorReader, bytes_of, torch_dtype
from moemerge.checkpoint.weights import SINGLE
from moemerge.checkpoint.writer import TensorToWrite, write_tensors
from moemerge.consolidation.measured import Statistics
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
    sources = {names[role]: [c.tensors[role] for c in checkpoints] for role in first.tensors}
    layout = family.experts.layouts[0]
    for layer in first.routed_layers:
        for slot in range(first.num_experts):
            for tensor in layout.tensors:
                name = family.expert_tensor_name(tensor, layer, slot)
                sources[name] = [c.experts[layer.index, slot][tensor.holds[0]] for c in checkpoints]
    with building(folder) as place, TensorReader() as reader:
        averages = [_average(name, tensors, reader) for name, tensors in sources.items()]
        write_tensors(place / SINGLE, averages, {"format": "pt"})
        for name in find_side_files(first.repository):
            (place / name).write_bytes(first.repository.read_bytes(name))


def _average(name: str, tensors: Sequence[StoredTensor], reader: TensorReader) -> TensorToWrite:
    def chunks() -> list[memoryview]:
        return [bytes_of(mean_of_tensors(tensors, reader).to(torch_dtype(tensors[0])))]

    return TensorToWrite(name=name, dtype=tensors[0].dtype, shape=tensors[0].shape, chunks=chunks)


@dataclass(frozen=True, slots=True)
class SummedStatistics:
    """Statistics of several variants' texts as if they were one's: what an average of them is coded for."""

    of: Statistics
    variants: Sequence[str]

    @property
    def identity(self) -> str:
        """See `Statistics`."""
        return f"sum:{self.of.identity}"

    @property
    def gained(self) -> dict[str, float]:
        """Not known."""
        return {}

    def passages(self, variant: str) -> None:
        """None are its own."""

    def sensitivity(self, variant: str) -> Mapping[int, float]:
        """Not known."""
        return {}

    def at_layer(self, layer_index: int) -> "SummedStatistics":
        """See `Statistics`."""
        return SummedStatistics(self.of.at_layer(layer_index), self.variants)

    def layer(self, variant: str, layer_index: int) -> LayerStatistics:
        """See `Statistics`."""
        layers = [self.of.layer(name, layer_index) for name in self.variants]
        first = layers[0].slots[0]
        total = LayerStatistics.empty(len(layers[0].slots), len(first.moment_DD), first.reservoir)
        for layer in layers:
            total.add(layer)
        return total
