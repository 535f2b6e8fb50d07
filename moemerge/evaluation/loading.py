"""A checkpoint as a model in memory, to be measured."""

import torch

from moemerge.checkpoint.checkpoint import Checkpoint
from moemerge.checkpoint.tensors import TensorReader
from moemerge.models import OneVariant, StandAlone, build_model, own_experts


def load_model(checkpoint: Checkpoint, dtype: torch.dtype = torch.float32) -> StandAlone:
    """The model with all its weights in `dtype`."""
    family = checkpoint.family
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
