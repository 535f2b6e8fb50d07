"""Decoder-only model: pre-norm blocks with rotary attention and routed experts, or one expert a layer.

Weights, experts and cache are given with every batch, so one model serves all variants of a geometry.
Knows nothing of files, requests and sampling.

Shapes: T tokens, D model width, W tokens whose successor is wanted, Vo vocabulary.
"""

import torch
from torch import Tensor

from moemerge.models.attention import KeyValues
from moemerge.models.batch import Batch
from moemerge.models.config import DecoderConfig, Norm, SharedExpert
from moemerge.models.experts import ACTIVATIONS, Experts
from moemerge.models.groups import plan_groups
from moemerge.models.latent_attention import LatentAttention
from moemerge.models.rotary import rotary_tables
from moemerge.models.routing import TOKEN_ROUTINGS, Route, RouteObserver, Routing, one_expert, sparsemixer
from moemerge.models.self_attention import GroupedAttention
from moemerge.models.weights import Weights


class Decoder:
    """Mixtral, Llama and their like, inference only.

    All weights and experts of a batch have one dtype, which is the compute dtype; norms, softmax and
    rotary tables are computed in float32.
    """

    def __init__(self, config: DecoderConfig, on_route: RouteObserver | None = None) -> None:
        self.config = config
        self.on_route = on_route
        types = config.layer_types or ("sliding_attention",) * config.num_layers
        self._windows = [config.sliding_window if kind == "sliding_attention" else None for kind in types]
        self._attention = LatentAttention(config) if config.latent_size else GroupedAttention(config)

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
        hidden_TD = self.embed(batch, weights)
        return self.run_layers(range(self.config.num_layers), hidden_TD, batch, weights, experts, keys)

    def embed(self, batch: Batch, weights: Weights) -> Tensor:
        """Hidden states [T, D] of the new tokens before the first layer."""
        config = self.config
        hidden_TD = weights.embed("embedding", batch.token_ids_T)
        if config.has_embedding_norm:
            hidden_TD = weights.norm("embedding_norm", hidden_TD, config.norm_eps)
        return hidden_TD if config.embedding_factor == 1.0 else hidden_TD * config.embedding_factor

    def run_layers(
        self,
        layers: range,
        hidden_TD: Tensor,
        batch: Batch,
        weights: Weights,
        experts: Experts,
        keys: KeyValues | None = None,
    ) -> Tensor:
        """Hidden states [T, D] after neighbouring layers, from those before them; see `forward`."""
        config = self.config
        tables = rotary_tables(batch.positions_T, config.head_size, config.rotary, hidden_TD.dtype)
        granularity = 1 if keys is None else keys.granularity
        groups = {
            window: plan_groups(batch.spans, window, granularity, hidden_TD.device, hidden_TD.dtype)
            for window in dict.fromkeys(self._windows)
        }
        for layer_index in layers:
            normed_TD = self._norm(f"decoder.{layer_index}.attention_norm", hidden_TD, weights)
            group = groups[self._windows[layer_index]]
            added_TD = self._attention.attend(layer_index, normed_TD, weights, tables, group, keys)
            hidden_TD = torch.add(hidden_TD, added_TD, alpha=config.residual_factor)
            normed_TD = self._norm(f"decoder.{layer_index}.ffn_norm", hidden_TD, weights)
            added_TD = self._feed_forward(layer_index, normed_TD, weights, experts)
            hidden_TD = torch.add(hidden_TD, added_TD, alpha=config.residual_factor)
        return hidden_TD

    def final_norm(self, hidden_TD: Tensor, weights: Weights) -> Tensor:
        """What the last layer gives, as the head takes it."""
        return self._norm("decoder.final_norm", hidden_TD, weights)

    def logits(self, hidden_WD: Tensor, weights: Weights) -> Tensor:
        """Logits [W, Vo] of what follows tokens with these hidden states, all of one vocabulary.

        A `head` among the weights is used even if it is tied to the embedding: it may be packed.
        """
        normed_WD = self.final_norm(hidden_WD, weights)
        logits_WV = weights.linear("head" if "head" in weights else "embedding", normed_WD)
        if self.config.has_head_bias:
            logits_WV = weights.add("head.bias", logits_WV)
        divisor = self.config.logits_divisor
        return logits_WV if divisor == 1.0 else logits_WV / divisor

    def route(self, layer_index: int, normed_TD: Tensor, weights: Weights) -> Route:
        """Where a layer's router sends tokens, given what its experts are given."""
        config = self.config
        if config.routing == Routing.ONE_EXPERT:
            return one_expert(normed_TD)
        routed_TD = normed_TD.float() if config.routes_in_float32 else normed_TD
        logits_TE = weights.linear(f"decoder.{layer_index}.router", routed_TD)
        if config.has_router_bias:
            logits_TE = weights.add(f"decoder.{layer_index}.router.bias", logits_TE)
        if config.routing_threshold is not None:
            return sparsemixer(logits_TE, config.num_experts_per_token, config.routing_threshold)
        route = TOKEN_ROUTINGS[config.routing](logits_TE, config.num_experts_per_token)
        if config.routed_factor != 1.0:
            return Route(route.slots_TK, route.gates_TK * config.routed_factor)
        return route

    def _norm(self, role: str, hidden_TD: Tensor, weights: Weights) -> Tensor:
        config = self.config
        if config.norm == Norm.LAYER:
            return weights.layer_norm(role, hidden_TD, config.norm_eps)
        return weights.norm(role, hidden_TD, config.norm_eps)

    def _feed_forward(
        self, layer_index: int, normed_TD: Tensor, weights: Weights, experts: Experts
    ) -> Tensor:
        """A dense network where there is no router, or what experts give."""
        config, layer = self.config, f"decoder.{layer_index}"
        if config.routing != Routing.ONE_EXPERT and f"{layer}.router" not in weights:
            return ACTIVATIONS[config.activation](weights, f"{layer}.ffn.", normed_TD)
        route = self.route(layer_index, normed_TD, weights)
        if self.on_route is not None:
            self.on_route(layer_index, normed_TD, route)
        output_TD = experts.product(layer_index, normed_TD, route)
        if config.shared_expert == SharedExpert.NONE:
            return output_TD
        return output_TD + self._shared_expert(f"{layer}.shared_expert", normed_TD, weights)

    def _shared_expert(self, role: str, normed_TD: Tensor, weights: Weights) -> Tensor:
        output_TD = ACTIVATIONS[self.config.activation](weights, f"{role}.", normed_TD)
        if self.config.shared_expert == SharedExpert.ADDED:
            return output_TD
        return output_TD * weights.linear(f"{role}.strength", normed_TD).sigmoid()
