"""Models to be measured: a checkpoint as it is, or the plain average of several."""

from collections.abc import Sequence

import torch
from torch import Tensor

from moemerge.checkpoint.checkpoint import Checkpoint
from moemerge.checkpoint.headers import StoredTensor
from moemerge.checkpoint.tensors import TensorReader
from moemerge.errors import IncompatibleInputs
from moemerge.models import OneVariant, StandAlone, build_model, own_experts


def load_model(checkpoint: Checkpoint, dtype: torch.dtype = torch.float32) -> StandAlone:
    """A checkpoint's model in memory."""
    return average_models([checkpoint], dtype)


def average_models(checkpoints: Sequence[Checkpoint], dtype: torch.dtype = torch.float32) -> StandAlone:
    """The model whose every tensor is the mean of the checkpoints' tensors; the naive baseline.

    Raises:
        IncompatibleInputs: Shapes differ, for example vocabularies.
    """
    first = checkpoints[0]
    with TensorReader() as reader:

        def mean(tensors: Sequence[StoredTensor]) -> Tensor:
            if len({tensor.shape for tensor in tensors}) > 1:
                raise IncompatibleInputs(
                    f"{tensors[0].name} has several shapes; whole models cannot be averaged"
                )
            total = torch.zeros(tensors[0].shape)
            for tensor in tensors:
                total += reader.read(tensor)
            return (total / len(tensors)).to(dtype)

        weights = {role: mean([c.tensors[role] for c in checkpoints]) for role in first.tensors}
        experts = {
            layer.index: {
                part: [
                    mean([c.experts[layer.index, slot][part] for c in checkpoints])
                    for slot in range(first.num_experts)
                ]
                for part in first.family.experts.parts
            }
            for layer in first.routed_layers
        }
    model = build_model(first.family.arithmetic, first.settings)
    return StandAlone(model, OneVariant(weights), own_experts(experts, model.config.activation))
