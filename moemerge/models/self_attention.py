"""Self-attention of a decoder's layer, from normed hidden states to what is added to the residual stream.

Knows nothing of norms between layers, of experts and of how keys are stored.

Shapes: T tokens, D model width, H query heads, G key/value heads, h head width.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from moemerge.models.attention import KeyValues, attend
from moemerge.models.config import DecoderConfig
from moemerge.models.groups import Group
from moemerge.models.rotary import RotaryTables, rotary_tables, rotate
from moemerge.models.weights import Weights


class GroupedAttention:
    """H query heads over G heads of keys and values, queries and keys rotated by their positions."""

    def __init__(self, config: DecoderConfig) -> None:
        self._config = config
        self._scale = config.head_size**-0.5

    def tables(self, positions_T: Tensor, dtype: torch.dtype) -> RotaryTables:
        """What all layers need to know of the positions of a batch."""
        return rotary_tables(positions_T, self._config.head_size, self._config.rotary, dtype)

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
        query = self._project(f"{role}.query", normed_TD, weights).view(
            -1, config.num_heads, config.head_size
        )
        key, value = self._keys_and_values(role, normed_TD, weights)
        query, key = rotate(query, tables), rotate(key, tables)
        mixed_TD = attend(groups, layer_index, query, key, value, keys, self._scale)
        output_TD = weights.linear(f"{role}.output", mixed_TD)
        return weights.add(f"{role}.output.bias", output_TD) if config.has_output_bias else output_TD

    def _keys_and_values(self, role: str, normed_TD: Tensor, weights: Weights) -> tuple[Tensor, Tensor]:
        """[T, G, h] each."""
        num_heads, head_size = self._config.num_kv_heads, self._config.head_size
        if self._config.has_fused_key_value:
            both = weights.linear(f"{role}.key_value", normed_TD).view(-1, num_heads, 2, head_size)
            return both[:, :, 0], both[:, :, 1]
        key = self._project(f"{role}.key", normed_TD, weights).view(-1, num_heads, head_size)
        value = self._project(f"{role}.value", normed_TD, weights).view(-1, num_heads, head_size)
        return key, value

    def _project(self, role: str, normed_TD: Tensor, weights: Weights) -> Tensor:
        projected = weights.linear(role, normed_TD)
        return weights.add(f"{role}.bias", projected) if self._config.has_qkv_bias else projected
