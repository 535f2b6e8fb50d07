"""A checkpoint as a model in memory, to be measured."""

import psutil
import torch

from moemerge.checkpoint.checkpoint import Checkpoint
from moemerge.checkpoint.sizes import format_size
from moemerge.checkpoint.tensors import TensorReader
from moemerge.errors import NotEnoughRoom
from moemerge.models import OneVariant, StandAlone, build_model, own_experts


def load_model(checkpoint: Checkpoint, dtype: torch.dtype = torch.float32) -> StandAlone:
    """The model with all its weights in `dtype`.

    Raises:
        NotEnoughRoom: They do not fit into memory.
    """
    family = checkpoint.family
    _check_memory(checkpoint, dtype)
    with TensorReader() as reader:
        weights = {role: reader.read(tensor).to(dtype) for role, tensor in checkpoint.tensors.items()}
        experts = {
            layer.index: {
                part: [
                    reader.read(checkpoint.experts[layer.index, slot][part]).to(dtype)
                    for slot in range(checkpoint.num_experts)
                ]
                for part in family.experts.parts
            }
            for layer in checkpoint.routed_layers
        }
    model = build_model(family.arithmetic, checkpoint.settings)
    return StandAlone(model, OneVariant(weights), own_experts(experts, model.config.activation))


def _check_memory(checkpoint: Checkpoint, dtype: torch.dtype) -> None:
    parts = [part for parts in checkpoint.experts.values() for part in parts.values()]
    needed = dtype.itemsize * sum(t.num_elements for t in [*checkpoint.tensors.values(), *parts])
    free = psutil.virtual_memory().available
    if needed > free:
        name = str(dtype).removeprefix("torch.")
        raise NotEnoughRoom(
            f"{checkpoint.label}: takes {format_size(needed)} of memory in {name}, {format_size(free)} are "
            f"free. Compute in a smaller dtype, or on a larger machine"
        )
