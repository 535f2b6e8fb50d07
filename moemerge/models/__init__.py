"""Forward passes in plain torch, inference only, over weights given by role and experts given by map.

Two kinds of arithmetic cover the families: a decoder and an encoder-decoder, described by settings.
Others may use `build_model` and what it takes and returns, listed in `__all__`.
"""

from collections.abc import Mapping

from torch import Tensor

from moemerge.errors import UnsupportedCheckpoint
from moemerge.models.cache import DecodingCache, KeyValueCache
from moemerge.models.config import DecoderConfig, EncoderDecoderConfig
from moemerge.models.decoder import Decoder
from moemerge.models.encoder_decoder import EncoderDecoder
from moemerge.models.experts import (
    Activation,
    ExpertLayer,
    ExpertSource,
    PlainExpertLayer,
    PlainExperts,
    own_experts,
)
from moemerge.models.routing import Route, RouteObserver, Routing

__all__ = [
    "Activation",
    "Decoder",
    "DecoderConfig",
    "DecodingCache",
    "EncoderDecoder",
    "EncoderDecoderConfig",
    "ExpertLayer",
    "ExpertSource",
    "KeyValueCache",
    "PlainExpertLayer",
    "PlainExperts",
    "Route",
    "RouteObserver",
    "Routing",
    "build_model",
    "own_experts",
]


def build_model(
    arithmetic: str,
    settings: Mapping[str, object],
    weights: Mapping[str, Tensor],
    experts: ExpertSource,
    on_route: RouteObserver | None = None,
) -> Decoder | EncoderDecoder:
    """A model of the given arithmetic, `decoder` or `encoder_decoder`.

    Args:
        arithmetic: Which of the two.
        settings: At least the fields of `DecoderConfig` or `EncoderDecoderConfig`.
        weights: Non-expert tensors by role, read at each forward pass.
        experts: The routed experts, asked for at each forward pass.
        on_route: Told every routing decision; see `RouteObserver`.

    Raises:
        UnsupportedCheckpoint: Unknown arithmetic, or settings that no model here implements.
    """
    if arithmetic == "decoder":
        return Decoder(DecoderConfig.from_settings(settings), weights, experts, on_route)
    if arithmetic == "encoder_decoder":
        return EncoderDecoder(EncoderDecoderConfig.from_settings(settings), weights, experts, on_route)
    raise UnsupportedCheckpoint(f"arithmetic is {arithmetic!r}, expected decoder or encoder_decoder")
