"""Similarities of made-up layers, from tensors in memory."""

import numpy as np
import torch

from moemerge.consolidation.policies import Task
from moemerge.similarity.gram import gram_of
from moemerge.similarity.matrices import LayerSimilarity, build_layer_similarity

EXPERT_BYTES = 100


def similarity_of(models: torch.Tensor, layer: int = 0) -> LayerSimilarity:
    """Of experts [variants, slots, size]."""
    rows = models.flatten(0, 1)
    identity = np.array([int((rows == row).all(dim=1).nonzero()[0]) for row in rows])
    names = tuple("abcdefgh"[: len(models)])
    return build_layer_similarity(layer, names, {"gate": gram_of(list(models), has_base=False)}, identity)


def draw_layer(variants: int, slots: int, *, noise: float = 0.1, seed: int = 0) -> torch.Tensor:
    """Fine-tunes of one random layer."""
    generator = torch.Generator().manual_seed(seed)
    common = torch.randn(1, slots, 40, generator=generator, dtype=torch.float64)
    return common + noise * torch.randn(variants, slots, 40, generator=generator, dtype=torch.float64)


def task_of(layers: list[LayerSimilarity], ratio: float | None, *, within: bool = False) -> Task:
    one = len(layers) * layers[0].num_slots * EXPERT_BYTES
    return Task(
        layers=layers,
        expert_bytes=np.full(layers[0].num_experts, EXPERT_BYTES),
        allowed_bytes=None if ratio is None else int(ratio * one + 1e-9),
        within=within,
    )
