"""Decoder-only mixture-of-experts model: pre-norm blocks with rotary attention and routed experts.

Weights are looked up by role at every forward pass, so exchanging entries of the mapping between
passes exchanges the variant. Knows nothing of files, requests and sampling.

Shapes: B rows, T new tokens, D model width, Vo vocabulary.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from moemerge.models.attention import Visibility, attend, causal_visibility, project_heads
from moemerge.models.cache import KeyValueCache
from moemerge.models.config import DecoderConfig
from moemerge.models.experts import ExpertSource, expert_product
from moemerge.models.norm import rms_norm
from moemerge.models.positions import RotaryTables, rotary_tables, rotate
from moemerge.models.routing import TOKEN_ROUTINGS, RouteObserver


class Decoder:
    """Mixtral and its like, inference only.

    All weights and experts have one dtype, which is the compute dtype; norms, softmax and rotary tables
    are computed in float32.
    """

    def __init__(
        self,
        config: DecoderConfig,
        weights: Mapping[str, Tensor],
        experts: ExpertSource,
        on_route: RouteObserver | None = None,
    ) -> None:
        self.config = config
        self.weights = weights
        self.experts = experts
        self.on_route = on_route

    def new_cache(self, batch_size: int = 1) -> KeyValueCache:
        """An empty cache for `batch_size` rows."""
        return KeyValueCache(self.config.num_layers, batch_size)

    @torch.no_grad()
    def forward(
        self,
        token_ids_BT: Tensor,
        cache: KeyValueCache | None = None,
        lengths: Sequence[int] | None = None,
        last_only: bool = False,
    ) -> Tensor:
        """Logits of the tokens that follow the given ones.

        Args:
            token_ids_BT: New tokens, continuing what the cache holds.
            cache: Read, extended and advanced; None to start from nothing and keep nothing.
            lengths: How many of the T tokens are real, at least one in each row; the others are padding on
                the right, whose logits mean nothing. None when all are real.
            last_only: Return the logits of each row's last real token only.

        Returns:
            [B, T, Vo], or [B, 1, Vo] with `last_only`, in the compute dtype.
        """
        config = self.config
        positions_BT = _positions(token_ids_BT, cache)
        num_keys = token_ids_BT.shape[1] + (0 if cache is None else cache.length)
        is_ragged = cache is not None and cache.is_ragged
        visibility = causal_visibility(positions_BT, num_keys, config.sliding_window, is_ragged)
        hidden_BTD = functional.embedding(token_ids_BT, self.weights["embedding"])
        tables = rotary_tables(positions_BT, config.head_size, config.rope_theta, hidden_BTD.dtype)
        for layer_index in range(config.num_layers):
            hidden_BTD = hidden_BTD + self._attention(layer_index, hidden_BTD, tables, visibility, cache)
            hidden_BTD = hidden_BTD + self._experts(layer_index, hidden_BTD)
        if cache is not None:
            cache.advance(token_ids_BT.shape[1] if lengths is None else lengths)
        return self._logits(_last_tokens(hidden_BTD, lengths) if last_only else hidden_BTD)

    def _attention(
        self,
        layer_index: int,
        hidden_BTD: Tensor,
        tables: RotaryTables,
        visibility: Visibility,
        cache: KeyValueCache | None,
    ) -> Tensor:
        weights, head_size = self.weights, self.config.head_size
        role = f"decoder.{layer_index}.attention"
        normed_BTD = rms_norm(hidden_BTD, weights[f"{role}_norm"], self.config.norm_eps)
        query = rotate(project_heads(normed_BTD, weights[f"{role}.query"], head_size), tables)
        key = rotate(project_heads(normed_BTD, weights[f"{role}.key"], head_size), tables)
        value = project_heads(normed_BTD, weights[f"{role}.value"], head_size)
        if cache is not None:
            key, value = cache.append(layer_index, key, value)
        mixed = attend(query, key, value, visibility, scale=head_size**-0.5)
        return functional.linear(mixed, weights[f"{role}.output"])

    def _experts(self, layer_index: int, hidden_BTD: Tensor) -> Tensor:
        config, weights = self.config, self.weights
        normed_BTD = rms_norm(hidden_BTD, weights[f"decoder.{layer_index}.ffn_norm"], config.norm_eps)
        normed_TD = normed_BTD.flatten(0, 1)
        logits_TE = functional.linear(normed_TD, weights[f"decoder.{layer_index}.router"])
        route = TOKEN_ROUTINGS[config.routing](logits_TE, config.num_experts_per_token)
        if self.on_route is not None:
            self.on_route(layer_index, normed_TD, route)
        output_TD = expert_product(normed_TD, route, self.experts.layer(layer_index), config.activation)
        return output_TD.view_as(hidden_BTD)

    def _logits(self, hidden_BTD: Tensor) -> Tensor:
        normed_BTD = rms_norm(hidden_BTD, self.weights["decoder.final_norm"], self.config.norm_eps)
        return functional.linear(normed_BTD, self.weights["embedding" if self.config.tied_head else "head"])


def _positions(token_ids_BT: Tensor, cache: KeyValueCache | None) -> Tensor:
    """Position of each new token; one row for all unless the cache is ragged."""
    new_T = torch.arange(token_ids_BT.shape[1], device=token_ids_BT.device)
    if cache is None or not cache.is_ragged:
        return new_T.unsqueeze(0) + (0 if cache is None else cache.length)
    return torch.tensor(cache.lengths, device=token_ids_BT.device).unsqueeze(1) + new_T


def _last_tokens(hidden_BTD: Tensor, lengths: Sequence[int] | None) -> Tensor:
    if lengths is None:
        return hidden_BTD[:, -1:]
    rows = torch.arange(len(lengths), device=hidden_BTD.device)
    return hidden_BTD[rows, torch.tensor(lengths, device=hidden_BTD.device) - 1].unsqueeze(1)
