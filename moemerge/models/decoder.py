"""Decoder-only mixture-of-experts model: pre-norm blocks with rotary attention and routed experts.

Weights, experts and cache are given with every batch, so one model serves all variants of a geometry.
Knows nothing of files, requests and sampling.

Shapes: T tokens, D model width, W tokens whose successor is wanted, Vo vocabulary.
"""

from torch import Tensor

from moemerge.models.attention import KeyValues, attend
from moemerge.models.batch import Batch
from moemerge.models.config import DecoderConfig
from moemerge.models.experts import Experts
from moemerge.models.groups import Group, plan_groups
from moemerge.models.positions import RotaryTables, rotary_tables, rotate
from moemerge.models.routing import TOKEN_ROUTINGS, RouteObserver
from moemerge.models.weights import Weights


class Decoder:
    """Mixtral and its like, inference only.

    All weights and experts of a batch have one dtype, which is the compute dtype; norms, softmax and
    rotary tables are computed in float32.
    """

    def __init__(self, config: DecoderConfig, on_route: RouteObserver | None = None) -> None:
        self.config = config
        self.on_route = on_route

    def forward(
        self, batch: Batch, weights: Weights, experts: Experts, keys: KeyValues | None = None
    ) -> Tensor:
        """Hidden states [T, D] of the new tokens after the last layer, before the final norm.

        Args:
            batch: New tokens.
            weights: Of their variants.
            experts: Of their variants.
            keys: Written and read; None when no span has a past and nothing is to be kept.
        """
        config = self.config
        hidden_TD = weights.embed("embedding", batch.token_ids_T)
        tables = rotary_tables(batch.positions_T, config.head_size, config.rope_theta, hidden_TD.dtype)
        granularity = 1 if keys is None else keys.granularity
        groups = plan_groups(
            batch.spans, config.sliding_window, granularity, hidden_TD.device, hidden_TD.dtype
        )
        for layer_index in range(config.num_layers):
            hidden_TD = hidden_TD + self._attention(layer_index, hidden_TD, weights, tables, groups, keys)
            hidden_TD = hidden_TD + self._experts(layer_index, hidden_TD, weights, experts)
        return hidden_TD

    def logits(self, hidden_WD: Tensor, weights: Weights) -> Tensor:
        """Logits [W, Vo] of what follows tokens with these hidden states, all of one vocabulary.

        A `head` among the weights is used even if it is tied to the embedding: it may be packed.
        """
        normed_WD = weights.norm("decoder.final_norm", hidden_WD, self.config.norm_eps)
        return weights.linear("head" if "head" in weights else "embedding", normed_WD)

    def _attention(
        self,
        layer_index: int,
        hidden_TD: Tensor,
        weights: Weights,
        tables: RotaryTables,
        groups: list[Group],
        keys: KeyValues | None,
    ) -> Tensor:
        config = self.config
        role = f"decoder.{layer_index}.attention"
        normed_TD = weights.norm(f"{role}_norm", hidden_TD, config.norm_eps)
        query = weights.linear(f"{role}.query", normed_TD).view(-1, config.num_heads, config.head_size)
        key = weights.linear(f"{role}.key", normed_TD).view(-1, config.num_kv_heads, config.head_size)
        value = weights.linear(f"{role}.value", normed_TD).view(-1, config.num_kv_heads, config.head_size)
        query, key = rotate(query, tables), rotate(key, tables)
        mixed_TD = attend(groups, layer_index, query, key, value, keys, config.head_size**-0.5)
        return weights.linear(f"{role}.output", mixed_TD)

    def _experts(self, layer_index: int, hidden_TD: Tensor, weights: Weights, experts: Experts) -> Tensor:
        config = self.config
        normed_TD = weights.norm(f"decoder.{layer_index}.ffn_norm", hidden_TD, config.norm_eps)
        logits_TE = weights.linear(f"decoder.{layer_index}.router", normed_TD)
        route = TOKEN_ROUTINGS[config.routing](logits_TE, config.num_experts_per_token)
        if self.on_route is not None:
            self.on_route(layer_index, normed_TD, route)
        return experts.product(layer_index, normed_TD, route)
