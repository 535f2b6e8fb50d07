"""Forward passes in plain torch, inference only, over flat batches of several variants' sequences.

Two kinds of arithmetic cover the families: a decoder and an encoder-decoder, described by settings.
Weights, experts and caches are given with every batch, through the protocols listed in `__all__`.
"""

from collections.abc import Mapping

from moemerge.errors import UnsupportedCheckpoint
from moemerge.models.alone import StandAlone
from moemerge.models.attention import KeyValues
from moemerge.models.batch import Batch, Span, build_batch
from moemerge.models.cache import GrowingCache
from moemerge.models.config import DecoderConfig, EncoderDecoderConfig
from moemerge.models.decoder import Decoder
from moemerge.models.encoder_decoder import EncoderDecoder
from moemerge.models.experts import (
    Activation,
    Experts,
    MappedExperts,
    PlainPoolLayer,
    PoolLayer,
    expert_product,
    own_experts,
)
from moemerge.models.groups import Group
from moemerge.models.products import can_pack, multiply, pack
from moemerge.models.routing import Route, RouteObserver, Routing
from moemerge.models.weights import MixedVariants, OneVariant, Weights

__all__ = [
    "Activation",
    "Batch",
    "Decoder",
    "DecoderConfig",
    "EncoderDecoder",
    "EncoderDecoderConfig",
    "Experts",
    "Group",
    "GrowingCache",
    "KeyValues",
    "MappedExperts",
    "MixedVariants",
    "OneVariant",
    "PlainPoolLayer",
    "PoolLayer",
    "Route",
    "RouteObserver",
    "Routing",
    "Span",
    "StandAlone",
    "Weights",
    "build_batch",
    "build_model",
    "can_pack",
    "expert_product",
    "multiply",
    "own_experts",
    "pack",
]


def build_model(
    arithmetic: str, settings: Mapping[str, object], on_route: RouteObserver | None = None
) -> Decoder | EncoderDecoder:
    """A model of the given arithmetic, `decoder` or `encoder_decoder`.

    Args:
        arithmetic: Which of the two.
        settings: At least the fields of `DecoderConfig` or `EncoderDecoderConfig`.
        on_route: Told every routing decision; see `RouteObserver`.

    Raises:
        UnsupportedCheckpoint: Unknown arithmetic, or settings that no model here implements.
    """
    if arithmetic == "decoder":
        return Decoder(DecoderConfig.from_settings(settings), on_route)
    if arithmetic == "encoder_decoder":
        return EncoderDecoder(EncoderDecoderConfig.from_settings(settings), on_route)
    raise UnsupportedCheckpoint(f"arithmetic is {arithmetic!r}, expected decoder or encoder_decoder")
