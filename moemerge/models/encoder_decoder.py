"""Encoder-decoder mixture-of-experts model after Switch Transformers.

Weights are looked up by role at every pass, so exchanging entries of the mapping between passes
exchanges the variant. Layers are counted through both stacks, encoder first, wherever an expert source
or an observer is told a layer index. Knows nothing of files, requests and sampling.

Shapes: B rows, T new tokens, S encoder tokens, D model width, Vo vocabulary.
"""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional

from moemerge.models.attention import Visibility, attend, project_heads
from moemerge.models.cache import DecodingCache, KeysAndValues, KeyValueCache
from moemerge.models.config import EncoderDecoderConfig
from moemerge.models.experts import ACTIVATIONS, ExpertSource, expert_product
from moemerge.models.norm import rms_norm
from moemerge.models.positions import position_bias
from moemerge.models.routing import RouteObserver, switch_top1

NO_SCALE = 1.0


class EncoderDecoder:
    """Switch Transformers, inference only.

    All weights and experts have one dtype, which is the compute dtype; norms, router and softmax are
    computed in float32. A layer is sparse if and only if `weights` holds a router for it.

    A slot serves `expert_capacity` tokens per row and pass. A decoder that is fed token by token
    therefore never drops one, while a pass over a long given target can.
    """

    def __init__(
        self,
        config: EncoderDecoderConfig,
        weights: Mapping[str, Tensor],
        experts: ExpertSource,
        on_route: RouteObserver | None = None,
    ) -> None:
        self.config = config
        self.weights = weights
        self.experts = experts
        self.on_route = on_route

    def new_cache(self, batch_size: int = 1) -> DecodingCache:
        """An empty cache for `batch_size` rows."""
        return DecodingCache(KeyValueCache(self.config.num_decoder_layers, batch_size))

    @torch.no_grad()
    def encode(self, token_ids_BS: Tensor, mask_BS: Tensor | None = None) -> Tensor:
        """Hidden states of an input.

        Args:
            token_ids_BS: Input tokens. Padding counts towards the experts' capacity, so only padding on
                the right leaves the real tokens as they would be alone.
            mask_BS: True where a token is real, at least once per row; None when all are.

        Returns:
            [B, S, D] in the compute dtype; what stands at padding means nothing.
        """
        num_tokens = token_ids_BS.shape[1]
        bias = self._position_bias("encoder", num_tokens, num_tokens)
        if mask_BS is not None:
            bias = bias.masked_fill(~mask_BS[:, None, None, :].bool(), -torch.inf)
        hidden_BSD = functional.embedding(token_ids_BS, self.weights["embedding"])
        for layer in range(self.config.num_encoder_layers):
            hidden_BSD = self._self_attention("encoder", layer, hidden_BSD, Visibility(bias), None)
            hidden_BSD = self._feed_forward("encoder", layer, hidden_BSD)
        return self._norm(hidden_BSD, "encoder.final_norm")

    @torch.no_grad()
    def decode(
        self,
        token_ids_BT: Tensor,
        cache: DecodingCache | None,
        encoder_hidden_BSD: Tensor,
        encoder_mask_BS: Tensor | None = None,
        last_only: bool = False,
    ) -> Tensor:
        """Logits of the tokens that follow the given ones.

        Args:
            token_ids_BT: New tokens, continuing what the cache holds; the first is the start token.
            cache: Read, extended and advanced; belongs to one encoder output. None to start from
                nothing and keep nothing.
            encoder_hidden_BSD: What `encode` returned. Read at the first step of a cache only.
            encoder_mask_BS: The mask given to `encode`.
            last_only: Return the logits of the last token only.

        Returns:
            [B, T, Vo], or [B, 1, Vo] with `last_only`, in the compute dtype.
        """
        num_new = token_ids_BT.shape[1]
        own = Visibility(self._causal_bias(num_new, num_new + (0 if cache is None else cache.length)))
        encoder = Visibility(None if encoder_mask_BS is None else encoder_mask_BS[:, None, None, :].bool())
        past = None if cache is None else cache.past
        hidden_BTD = functional.embedding(token_ids_BT, self.weights["embedding"])
        for layer in range(self.config.num_decoder_layers):
            hidden_BTD = self._self_attention("decoder", layer, hidden_BTD, own, past)
            hidden_BTD = self._cross_attention(layer, hidden_BTD, encoder_hidden_BSD, encoder, cache)
            hidden_BTD = self._feed_forward("decoder", layer, hidden_BTD)
        if past is not None:
            past.advance(num_new)
        return self._logits(hidden_BTD[:, -1:] if last_only else hidden_BTD)

    def _self_attention(
        self, stack: str, layer: int, hidden_BTD: Tensor, visibility: Visibility, past: KeyValueCache | None
    ) -> Tensor:
        role = f"{stack}.{layer}.attention"
        normed_BTD = self._norm(hidden_BTD, f"{role}_norm")
        key, value = self._keys_and_values(role, normed_BTD)
        if past is not None:
            key, value = past.append(layer, key, value)
        return hidden_BTD + self._attend(role, normed_BTD, (key, value), visibility)

    def _cross_attention(
        self,
        layer: int,
        hidden_BTD: Tensor,
        encoder_hidden_BSD: Tensor,
        visibility: Visibility,
        cache: DecodingCache | None,
    ) -> Tensor:
        role = f"decoder.{layer}.cross_attention"
        normed_BTD = self._norm(hidden_BTD, f"{role}_norm")
        if cache is None:
            keys_and_values = self._keys_and_values(role, encoder_hidden_BSD)
        else:
            keys_and_values = cache.cross_or(layer, lambda: self._keys_and_values(role, encoder_hidden_BSD))
        return hidden_BTD + self._attend(role, normed_BTD, keys_and_values, visibility)

    def _keys_and_values(self, role: str, hidden: Tensor) -> KeysAndValues:
        head_size = self.config.head_size
        return (
            project_heads(hidden, self.weights[f"{role}.key"], head_size),
            project_heads(hidden, self.weights[f"{role}.value"], head_size),
        )

    def _attend(
        self, role: str, normed_BTD: Tensor, keys_and_values: KeysAndValues, visibility: Visibility
    ) -> Tensor:
        query = project_heads(normed_BTD, self.weights[f"{role}.query"], self.config.head_size)
        mixed = attend(query, *keys_and_values, visibility, NO_SCALE)
        return functional.linear(mixed, self.weights[f"{role}.output"])

    def _feed_forward(self, stack: str, layer: int, hidden_BTD: Tensor) -> Tensor:
        normed_BTD = self._norm(hidden_BTD, f"{stack}.{layer}.ffn_norm")
        if f"{stack}.{layer}.router" in self.weights:
            return hidden_BTD + self._experts(stack, layer, normed_BTD)
        dense = ACTIVATIONS[self.config.activation]
        return hidden_BTD + dense(normed_BTD, lambda part: self.weights[f"{stack}.{layer}.ffn.{part}"])

    def _experts(self, stack: str, layer: int, normed_BTD: Tensor) -> Tensor:
        router = self.weights[f"{stack}.{layer}.router"]
        logits_BTE = functional.linear(normed_BTD.float(), router.float())
        route = switch_top1(logits_BTE, self.config.expert_capacity, normed_BTD.dtype)
        layer_index = layer + (self.config.num_encoder_layers if stack == "decoder" else 0)
        normed_TD = normed_BTD.flatten(0, 1)
        if self.on_route is not None:
            self.on_route(layer_index, normed_TD, route)
        output_TD = expert_product(normed_TD, route, self.experts.layer(layer_index), self.config.activation)
        return output_TD.view_as(normed_BTD)

    def _causal_bias(self, num_new: int, num_keys: int) -> Tensor:
        bias = self._position_bias("decoder", num_new, num_keys)
        if num_new == 1:
            return bias
        visible_TS = torch.ones(num_new, num_keys, dtype=torch.bool, device=bias.device)
        return bias.masked_fill(visible_TS.triu(num_keys - num_new + 1), -torch.inf)

    def _position_bias(self, stack: str, num_new: int, num_keys: int) -> Tensor:
        return position_bias(
            self.weights[f"{stack}.position_bias"],
            num_new,
            num_keys,
            self.config.position_max_distance,
            bidirectional=stack == "encoder",
        )

    def _norm(self, hidden_BTD: Tensor, role: str) -> Tensor:
        return rms_norm(hidden_BTD, self.weights[role], self.config.norm_eps)

    def _logits(self, hidden_BTD: Tensor) -> Tensor:
        normed_BTD = self._norm(hidden_BTD, "decoder.final_norm")
        if not self.config.tied_head:
            return functional.linear(normed_BTD, self.weights["head"])
        return functional.linear(normed_BTD * self.config.hidden_size**-0.5, self.weights["embedding"])
