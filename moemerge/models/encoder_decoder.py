"""Encoder-decoder mixture-of-experts model after Switch Transformers.

Weights, experts and caches are given with every batch, so one model serves all variants of a geometry.
Layers are counted through both stacks, encoder first, wherever experts or an observer are told a layer
index; caches count the decoder's layers. Knows nothing of files, requests and sampling.

Shapes: T tokens, B sequences, N new tokens of each, S keys, H heads, h head width, D model width, W tokens
whose successor is wanted, Vo vocabulary.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from moemerge.models.attention import KeyValues, attend
from moemerge.models.batch import Batch, Span
from moemerge.models.config import EncoderDecoderConfig
from moemerge.models.experts import ACTIVATIONS, Experts
from moemerge.models.groups import Bias, Group, plan_cross_groups, plan_groups, plan_two_way_groups
from moemerge.models.positions import relative_buckets
from moemerge.models.routing import RouteObserver, drop_over_capacity, switch_top1
from moemerge.models.weights import Weights

NO_SCALE = 1.0


class EncoderDecoder:
    """Switch Transformers, inference only.

    All weights and experts of a batch have one dtype, which is the compute dtype; norms, router and
    softmax are computed in float32. A layer is sparse if and only if the weights hold a router for it.

    A slot serves `expert_capacity` tokens per sequence and pass. A decoder that is fed token by token
    therefore never drops one, while a pass over a long given target can.
    """

    def __init__(self, config: EncoderDecoderConfig, on_route: RouteObserver | None = None) -> None:
        self.config = config
        self.on_route = on_route

    def encode(self, batch: Batch, weights: Weights, experts: Experts) -> Tensor:
        """Hidden states [T, D] of whole inputs, final norm applied."""
        hidden_TD = weights.embed("embedding", batch.token_ids_T)
        bias = self._bias("encoder", hidden_TD, weights)
        groups = plan_two_way_groups(batch.spans, hidden_TD.device, bias)
        for layer in range(self.config.num_encoder_layers):
            hidden_TD = self._self_attention("encoder", layer, hidden_TD, weights, groups, None)
            hidden_TD = self._feed_forward("encoder", layer, hidden_TD, weights, experts, batch.spans)
        return weights.norm("encoder.final_norm", hidden_TD, self.config.norm_eps)

    def cross_keys_and_values(
        self, layer: int, encoded_TD: Tensor, weights: Weights
    ) -> tuple[Tensor, Tensor]:
        """What a decoder layer attends to of the encoder's output: keys and values, each [T, H, h]."""
        return self._keys_and_values(f"decoder.{layer}.cross_attention", encoded_TD, weights)

    def decode(
        self,
        batch: Batch,
        weights: Weights,
        experts: Experts,
        keys: KeyValues | None,
        cross: KeyValues,
        cross_lengths: Sequence[int],
        limit_capacity: bool = False,
    ) -> Tensor:
        """Hidden states [T, D] of the new tokens after the last layer, before the final norm.

        Args:
            batch: New tokens; a sequence's first is the start token.
            weights: Of their variants.
            experts: Of their variants.
            keys: Of the decoder's own tokens, written and read; None when no span has a past and nothing
                is to be kept.
            cross: `cross_keys_and_values` of every layer, only read.
            cross_lengths: Encoded tokens of each span's sequence.
            limit_capacity: Drop tokens over capacity, as one pass over a whole target does.
        """
        hidden_TD = weights.embed("embedding", batch.token_ids_T)
        device, dtype = hidden_TD.device, hidden_TD.dtype
        granularity = 1 if keys is None else keys.granularity
        bias = self._bias("decoder", hidden_TD, weights)
        own_groups = plan_groups(batch.spans, None, granularity, device, dtype, bias)
        cross_groups = plan_cross_groups(batch.spans, cross_lengths, cross.granularity, device, dtype)
        limited_spans = batch.spans if limit_capacity else ()
        for layer in range(self.config.num_decoder_layers):
            hidden_TD = self._self_attention("decoder", layer, hidden_TD, weights, own_groups, keys)
            hidden_TD = self._cross_attention(layer, hidden_TD, weights, cross_groups, cross)
            hidden_TD = self._feed_forward("decoder", layer, hidden_TD, weights, experts, limited_spans)
        return hidden_TD

    def final_norm(self, hidden_TD: Tensor, weights: Weights) -> Tensor:
        """What the decoder's last layer gives, as the head takes it."""
        return weights.norm("decoder.final_norm", hidden_TD, self.config.norm_eps)

    def logits(self, hidden_WD: Tensor, weights: Weights) -> Tensor:
        """Logits [W, Vo] of what follows tokens with these hidden states, all of one vocabulary.

        A `head` among the weights is used even if it is tied to the embedding: it may be packed.
        """
        normed_WD = self.final_norm(hidden_WD, weights)
        if self.config.tied_head:
            normed_WD = normed_WD * self.config.hidden_size**-0.5
        return weights.linear("head" if "head" in weights else "embedding", normed_WD)

    def _self_attention(
        self,
        stack: str,
        layer: int,
        hidden_TD: Tensor,
        weights: Weights,
        groups: list[Group],
        keys: KeyValues | None,
    ) -> Tensor:
        role = f"{stack}.{layer}.attention"
        normed_TD = weights.norm(f"{role}_norm", hidden_TD, self.config.norm_eps)
        query = self._heads(f"{role}.query", normed_TD, weights)
        key, value = self._keys_and_values(role, normed_TD, weights)
        mixed_TD = attend(groups, layer, query, key, value, keys, NO_SCALE)
        return hidden_TD + weights.linear(f"{role}.output", mixed_TD)

    def _cross_attention(
        self, layer: int, hidden_TD: Tensor, weights: Weights, groups: list[Group], cross: KeyValues
    ) -> Tensor:
        role = f"decoder.{layer}.cross_attention"
        normed_TD = weights.norm(f"{role}_norm", hidden_TD, self.config.norm_eps)
        query = self._heads(f"{role}.query", normed_TD, weights)
        mixed_TD = attend(groups, layer, query, None, None, cross, NO_SCALE)
        return hidden_TD + weights.linear(f"{role}.output", mixed_TD)

    def _keys_and_values(self, role: str, hidden_TD: Tensor, weights: Weights) -> tuple[Tensor, Tensor]:
        key = self._heads(f"{role}.key", hidden_TD, weights)
        value = self._heads(f"{role}.value", hidden_TD, weights)
        return key, value

    def _heads(self, role: str, hidden_TD: Tensor, weights: Weights) -> Tensor:
        return weights.linear(role, hidden_TD).view(-1, self.config.num_heads, self.config.head_size)

    def _feed_forward(
        self,
        stack: str,
        layer: int,
        hidden_TD: Tensor,
        weights: Weights,
        experts: Experts,
        limited_spans: Sequence[Span],
    ) -> Tensor:
        normed_TD = weights.norm(f"{stack}.{layer}.ffn_norm", hidden_TD, self.config.norm_eps)
        router = f"{stack}.{layer}.router"
        if router not in weights:
            dense = ACTIVATIONS[self.config.activation]
            return hidden_TD + dense(weights, f"{stack}.{layer}.ffn.", normed_TD)
        logits_TE = weights.linear(router, normed_TD.float())
        route = switch_top1(logits_TE, normed_TD.dtype)
        if limited_spans:
            route = drop_over_capacity(route, self.config.expert_capacity, logits_TE.shape[1], limited_spans)
        layer_index = layer + (self.config.num_encoder_layers if stack == "decoder" else 0)
        if self.on_route is not None:
            self.on_route(layer_index, normed_TD, route)
        return hidden_TD + experts.product(layer_index, normed_TD, route)

    def _bias(self, stack: str, hidden_TD: Tensor, weights: Weights) -> Bias:
        """Relative position bias of a stack, from the table of each sequence's variant."""
        buckets = self.config.position_buckets
        every_bucket = torch.arange(buckets, device=hidden_TD.device).expand(len(hidden_TD), -1)
        tables = weights.embed(f"{stack}.position_bias", every_bucket)

        def bias(first_B: Tensor, distance_BNS: Tensor) -> Tensor:
            bucket_BNS = relative_buckets(
                distance_BNS, buckets, self.config.position_max_distance, bidirectional=stack == "encoder"
            )
            return tables[first_B.view(-1, 1, 1), bucket_BNS].permute(0, 3, 1, 2)

        return bias
