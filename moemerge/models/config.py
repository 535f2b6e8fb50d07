"""Geometry of the two kinds of model, as plain checked settings.

Settings arrive as a mapping with at least the fields of the class that have no default; where a
checkpoint's config keeps them is the family description's business. Knows nothing of tensors and files.
"""

import json
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from enum import StrEnum
from types import NoneType
from typing import Any, Self, get_args, get_origin

from moemerge.errors import UnsupportedCheckpoint
from moemerge.models.experts import Activation
from moemerge.models.rotary import Rotary
from moemerge.models.routing import Routing

_TOKEN_IDS = ("start_token_id", "pad_token_id")


class Norm(StrEnum):
    """The closed list of norms between layers: by root mean square, or by mean and variance."""

    ROOT_MEAN_SQUARE = "root_mean_square"
    LAYER = "layer"


class ProjectionNorm(StrEnum):
    """The closed list of norms of queries and keys: of none, of every head, of all heads together."""

    NONE = "none"
    HEAD = "head"
    ALL = "all"


class SharedExpert(StrEnum):
    """The closed list of uses of a shared expert: there is none, added, added times a sigmoid."""

    NONE = "none"
    ADDED = "added"
    GATED = "gated"


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderConfig:
    """A decoder-only model; what has a default here, few families speak of.

    Attributes:
        max_positions: What the model was made for; callers limit requests with it, the forward pass does not.
        sliding_window: Positions that a token sees, itself included; None for all before it.
        layer_types: Of each layer `sliding_attention` or `full_attention`; None if the window is for all.
        norm: Between layers.
        head_size: Width of a head of grouped attention; of latent attention that of its rotated part.
        latent_size: Width of what latent attention keeps of a token besides a rotated key; None for grouped
            attention.
        unrotated_size: Width of the part of a latent attention's head that is not rotated.
        projection_norm: Root mean square norm of queries and keys before rotation.
        projection_clip: Largest absolute value of queries, keys and values.
        attention_scale: Factor of the scores; None for one over the root of `head_size`.
        embedding_factor: Of embeddings.
        residual_factor: Of what a layer's attention and experts add to the residual stream.
        logits_divisor: Of logits.
        routing_threshold: How far from the best score others count, where routing asks.
        routed_factor: Of what routed experts give.
        shared_expert: How what a layer's shared expert gives is added to what the routed ones give.
        has_qkv_bias: Whether queries, keys and values have biases.
        has_output_bias: Whether the attention's output has one.
        has_router_bias: Whether routers have biases.
        has_sinks: Whether every head has one more score that takes attention from all keys and gives nothing.
        has_head_bias: Whether logits have one.
        has_fused_query_key_value: Whether all queries, keys and values come of one matrix, in this order.
        has_fused_key_value: Whether the keys and the values of a head come of one matrix, in this order.
        has_embedding_norm: Whether embeddings are normed before the first layer.
        routes_in_float32: Whether routers compute in float32 whatever the rest does.
    """

    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    num_experts_per_token: int
    vocab_size: int
    norm_eps: float
    rotary: Rotary
    max_positions: int
    activation: Activation
    routing: Routing
    tied_head: bool
    sliding_window: int | None = None
    layer_types: tuple[str, ...] | None = None
    norm: Norm = Norm.ROOT_MEAN_SQUARE
    latent_size: int | None = None
    unrotated_size: int | None = None
    projection_norm: ProjectionNorm = ProjectionNorm.NONE
    projection_clip: float | None = None
    attention_scale: float | None = None
    embedding_factor: float = 1.0
    residual_factor: float = 1.0
    logits_divisor: float = 1.0
    routing_threshold: float | None = None
    routed_factor: float = 1.0
    shared_expert: SharedExpert = SharedExpert.NONE
    has_qkv_bias: bool = False
    has_output_bias: bool = False
    has_router_bias: bool = False
    has_sinks: bool = False
    has_head_bias: bool = False
    has_fused_query_key_value: bool = False
    has_fused_key_value: bool = False
    has_embedding_norm: bool = False
    routes_in_float32: bool = False

    def __post_init__(self) -> None:
        _require(self.num_heads % self.num_kv_heads == 0, "num_heads is no multiple of num_kv_heads")
        has_types = self.layer_types is None or len(self.layer_types) == self.num_layers
        _require(has_types, f"layer_types are not {self.num_layers}")
        has_parts = (self.latent_size is None) == (self.unrotated_size is None)
        _require(has_parts, "latent_size and unrotated_size belong together")
        has_threshold = self.routing_threshold is not None or self.routing != Routing.SPARSEMIXER
        _require(has_threshold, f"routing {self.routing} needs routing_threshold")
        _require(self.head_size % 2 == 0, "head_size is odd, rotary embedding needs pairs")
        _require(
            self.routing != Routing.SWITCH_TOP1, f"routing {self.routing} is not for a decoder-only model"
        )

    @classmethod
    def from_settings(cls, settings: Mapping[str, object]) -> Self:
        """Read the fields of this class; settings that only describe the checkpoint are passed over.

        Raises:
            UnsupportedCheckpoint: A field is missing, of the wrong type or of a value that no model
                here implements.
        """
        return cls(**_read(cls, settings))


@dataclass(frozen=True, slots=True, kw_only=True)
class EncoderDecoderConfig:
    """An encoder-decoder with Switch routing.

    `expert_capacity` is in tokens per slot, sequence and layer. `start_token_id` and `pad_token_id` are
    for callers; the forward passes know no padding.
    """

    hidden_size: int
    head_size: int
    num_heads: int
    num_encoder_layers: int
    num_decoder_layers: int
    expert_capacity: int
    vocab_size: int
    norm_eps: float
    position_buckets: int
    position_max_distance: int
    activation: Activation
    tied_head: bool
    start_token_id: int
    pad_token_id: int

    @classmethod
    def from_settings(cls, settings: Mapping[str, object]) -> Self:
        """Read the fields of this class.

        Raises:
            UnsupportedCheckpoint: As for `DecoderConfig.from_settings`.
        """
        return cls(**_read(cls, settings))


def _require(is_met: bool, complaint: str) -> None:
    if not is_met:
        raise UnsupportedCheckpoint(f"model settings: {complaint}")


def _read(kind: type, settings: Mapping[str, object]) -> dict[str, Any]:
    """Values for the fields of a dataclass; those with a default may be missing, or None where that is it."""
    values: dict[str, Any] = {}
    missing = []
    for field in fields(kind):
        if field.type is Rotary:
            values[field.name] = Rotary(**_read(Rotary, settings))
        elif settings.get(field.name) is not None or (field.name in settings and field.default is MISSING):
            values[field.name] = _value(field.name, settings[field.name], field.type)
        elif field.default is MISSING:
            missing.append(field.name)
    _require(not missing, f"missing {', '.join(missing)}")
    return values


def _value(name: str, value: Any, kind: Any) -> Any:
    listed = next((option for option in get_args(kind) if get_origin(option) is tuple), None)
    if listed is not None:
        return tuple(map(get_args(listed)[0], json.loads(value)))
    kind = next((option for option in get_args(kind) if option is not NoneType), kind)
    if issubclass(kind, StrEnum):
        known = ", ".join(kind)
        _require(value in list(kind), f"{name} is {value!r}, expected one of {known}")
        return kind(value)
    if kind is bool:
        _require(isinstance(value, bool), f"{name} is {value!r}, expected true or false")
        return value
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if kind is float:
        _require(is_number and value > 0, f"{name} is {value!r}, expected a positive number")
        return float(value)
    _require(is_number and isinstance(value, int), f"{name} is {value!r}, expected an integer")
    _require(value > 0 or name in _TOKEN_IDS, f"{name} is {value}, expected at least 1")
    return value
