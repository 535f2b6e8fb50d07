"""Statistics without a text: noise in place of hidden states, through a layer's own router and experts."""

import torch

from moemerge.calibration.statistics import LayerStatistics, layer_bytes
from moemerge.calibration.streaming import CheckpointSource, StreamedExperts, StreamedWeights
from moemerge.checkpoint.checkpoint import Checkpoint
from moemerge.checkpoint.tensors import TensorReader
from moemerge.models import Decoder, build_model, multiply
from moemerge.models.routing import switch_top1

RESERVOIR = 1024
"""Tokens to keep a sample of, per slot."""


def random_bytes(checkpoint: Checkpoint) -> int:
    """Of memory that `random_statistics` takes and leaves, by default."""
    width = int(checkpoint.settings["hidden_size"] or 0)
    num_tokens = _num_tokens(checkpoint, RESERVOIR)
    return layer_bytes(checkpoint.num_experts, width, RESERVOIR) + 4 * 4 * num_tokens * width


def random_statistics(
    checkpoint: Checkpoint, layer_index: int, *, reservoir: int = RESERVOIR, seed: int = 0
) -> LayerStatistics:
    """What a layer would count on noise of unit variance times the weight of the norm before its experts.

    The width of every coordinate is that of real inputs, their correlations are not: what is decided from
    these is to be told as decided without text.

    Args:
        checkpoint: Local.
        layer_index: Through all stacks.
        reservoir: Tokens to keep a sample of, per slot; there are as many tokens as fill it on average.
        seed: Of noise and sample. Variants of one seed are given the same noise.

    Raises:
        DamagedInput: A weight is not finite, or a file changed.
    """
    layer = next(layer for layer in checkpoint.routed_layers if layer.index == layer_index)
    model = build_model(checkpoint.family.arithmetic, checkpoint.settings)
    num_tokens = _num_tokens(checkpoint, reservoir)
    generator = torch.Generator().manual_seed(1_000_003 * seed + layer_index)
    noise_TD = torch.randn(num_tokens, int(checkpoint.settings["hidden_size"] or 0), generator=generator)
    keys = {layer.stack: torch.rand(num_tokens, generator=generator, dtype=torch.float64)}
    kept: list[LayerStatistics] = []
    with TensorReader() as reader, torch.no_grad():
        source = CheckpointSource(checkpoint, reader)
        role = f"{layer.stack}.{layer.block}"
        hidden_TD = noise_TD * source.stored(f"{role}.ffn_norm").float()
        if isinstance(model, Decoder):
            route = model.route(layer.block, hidden_TD, StreamedWeights(source))
        else:
            logits_TE = multiply(hidden_TD, source.stored(f"{role}.router"))
            route = switch_top1(logits_TE, hidden_TD.dtype)
        experts = StreamedExperts(
            source, model.config.activation, keys, reservoir, lambda _, statistics: kept.append(statistics)
        )
        experts.product(layer_index, hidden_TD, route)
    return kept[0]


def _num_tokens(checkpoint: Checkpoint, reservoir: int) -> int:
    chosen = int(checkpoint.settings["num_experts_per_token"] or 1)
    return -(-reservoir * checkpoint.num_experts // chosen)
