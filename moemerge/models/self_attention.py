"""Self-attention of a decoder's layer, from normed hidden states to what is added to the residual stream.

Knows nothing of norms between layers, of experts and of how keys are stored.

Shapes: T tokens, D model width, H query heads, G key/value heads, h head width.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from moemerge.models.attention import KeyValues, attend
from moemerge.models.config import DecoderConfig, ProjectionNorm
from moemerge.models.groups import Group
from moemerge.models.rotary import RotaryTables, rotate
from moemerge.models.weights import Weights


class GroupedAttention:
    """H query heads over G heads of keys and values, queries and keys rotated by their positions."""

    def __init__(self, config: DecoderConfig) -> None:
        self._config = config
        self._scale = config.attention_scale or config.head_size**-0.5
        has_norm = config.projection_norm != ProjectionNorm.NONE
        self._is_adjusted = bool(config.has_qkv_bias or config.projection_clip or has_norm)

    def attend(
        self,
        layer_index: int,
        normed_TD: Tensor,
        weights: Weights,
        tables: RotaryTables,
        groups: Sequence[Group],
        keys: KeyValues | None,
    ) -> Tensor:
        """Output [T, D] of a layer's attention."""
        config = self._config
        role = f"decoder.{layer_index}.attention"
        query, key, value = self._project(role, normed_TD, weights)
        if self._is_adjusted:
            query, key, value = self._adjust(role, query, key, value, weights)
        query = rotate(query.view(-1, config.num_heads, config.head_size), tables)
        key = rotate(key.view(-1, config.num_kv_heads, config.head_size), tables)
        value = value.view(-1, config.num_kv_heads, config.head_size)
        sinks_TH = self._sinks(role, query, weights) if config.has_sinks else None
        mixed_TD = attend(groups, layer_index, query, key, value, keys, self._scale, sinks_TH)
        output_TD = weights.linear(f"{role}.output", mixed_TD)
        return weights.add(f"{role}.output.bias", output_TD) if config.has_output_bias else output_TD

    def _project(self, role: str, normed_TD: Tensor, weights: Weights) -> Sequence[Tensor]:
        """Queries [T, H*h], keys and values [T, G*h] each, or [T, G, h]."""
        config = self._config
        if config.has_fused_query_key_value:
            sizes = [config.num_heads * config.head_size, *[config.num_kv_heads * config.head_size] * 2]
            return torch.split(weights.linear(f"{role}.query_key_value", normed_TD), sizes, dim=-1)
        query = weights.linear(f"{role}.query", normed_TD)
        if config.has_fused_key_value:
            both = weights.linear(f"{role}.key_value", normed_TD)
            return query, *both.view(len(both), -1, 2, config.head_size).unbind(2)
        return query, weights.linear(f"{role}.key", normed_TD), weights.linear(f"{role}.value", normed_TD)

    def _adjust(self, role: str, query: Tensor, key: Tensor, value: Tensor, weights: Weights) -> list[Tensor]:
        """What stands between projections and rotation: biases, norms of queries and keys, clipping."""
        config = self._config
        projected = {f"{role}.query": query, f"{role}.key": key, f"{role}.value": value}
        if config.has_qkv_bias:
            projected = {own: weights.add(f"{own}.bias", tensor) for own, tensor in projected.items()}
        if config.projection_norm != ProjectionNorm.NONE:
            for own in (f"{role}.query", f"{role}.key"):
                projected[own] = self._norm(f"{own}.norm", projected[own], weights)
        if config.projection_clip:
            limit = config.projection_clip
            projected = {own: tensor.clamp(-limit, limit) for own, tensor in projected.items()}
        return list(projected.values())

    def _norm(self, role: str, projected_TN: Tensor, weights: Weights) -> Tensor:
        if self._config.projection_norm == ProjectionNorm.ALL:
            return weights.norm(role, projected_TN, self._config.norm_eps)
        heads = projected_TN.view(len(projected_TN), -1, self._config.head_size)
        return weights.norm(role, heads, self._config.norm_eps)

    def _sinks(self, role: str, query_THh: Tensor, weights: Weights) -> Tensor:
        return weights.add(f"{role}.sinks", query_THh.new_zeros(query_THh.shape[:2]))
