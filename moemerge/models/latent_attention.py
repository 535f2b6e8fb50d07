"""Self-attention over keys and values that are kept as one narrow vector of each token.

Every head's keys and values are products of that vector, so queries are moved into its space instead, and
outputs out of it: all heads attend to one shared key, and the cache holds no heads. Knows nothing of norms
between layers, of experts and of how keys are stored.

Shapes: T tokens, D model width, H heads, n width of a head's unrotated part, r of its rotated part, v of what
it gives, c latent width.

Source: DeepSeek-V2, arXiv:2405.04434, section 2.1.2.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from moemerge.models.attention import KeyValues, attend
from moemerge.models.config import DecoderConfig
from moemerge.models.groups import Group
from moemerge.models.rotary import RotaryTables, pairs_apart, rotate, score_factor
from moemerge.models.weights import Weights


class LatentAttention:
    """H heads over one latent vector of each token, and one key that is rotated by its position."""

    def __init__(self, config: DecoderConfig) -> None:
        assert config.latent_size is not None
        assert config.unrotated_size is not None
        self._config = config
        self._latent, self._unrotated = config.latent_size, config.unrotated_size
        head_size = config.unrotated_size + config.head_size
        self._scale = head_size**-0.5 * score_factor(config.rotary)

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
        config, role = self._config, f"decoder.{layer_index}.attention"
        query_THh = weights.linear(f"{role}.query", normed_TD).view(len(normed_TD), config.num_heads, -1)
        plain_THn, turned_THr = torch.split(query_THh, [self._unrotated, config.head_size], dim=-1)
        both_TD = weights.linear(f"{role}.latent", normed_TD)
        latent_Tc, key_Tr = torch.split(both_TD, [self._latent, config.head_size], dim=-1)
        latent_T1c = weights.norm(f"{role}.latent.norm", latent_Tc, config.norm_eps).unsqueeze(1)
        key = torch.cat((latent_T1c, rotate(pairs_apart(key_Tr.unsqueeze(1)), tables)), dim=-1)
        query_THc = weights.apply(f"{role}.expand", plain_THn, self._into_latent)
        query = torch.cat((query_THc, rotate(pairs_apart(turned_THr), tables)), dim=-1)
        mixed_TD = attend(groups, layer_index, query, key, latent_T1c, keys, self._scale)
        mixed_THc = mixed_TD.view(len(normed_TD), config.num_heads, self._latent)
        given_THv = weights.apply(f"{role}.expand", mixed_THc, self._out_of_latent)
        return weights.linear(f"{role}.output", given_THv.flatten(1))

    def _into_latent(self, plain_THn: Tensor, expand: Tensor) -> Tensor:
        keys_Hnc = expand.view(self._config.num_heads, -1, self._latent)[:, : self._unrotated]
        return torch.einsum("thn,hnc->thc", plain_THn, keys_Hnc)

    def _out_of_latent(self, mixed_THc: Tensor, expand: Tensor) -> Tensor:
        values_Hvc = expand.view(self._config.num_heads, -1, self._latent)[:, self._unrotated :]
        return torch.einsum("thc,hvc->thv", mixed_THc, values_Hvc)
