"""Geometry of the two kinds of model, as plain checked settings.

Settings arrive as a mapping with at least the fields of the class; where a checkpoint's config keeps
them is the family description's business. Knows nothing of tensors and files.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Self, TypeVar

from moemerge.errors import UnsupportedCheckpoint
from moemerge.models.experts import Activation
from moemerge.models.routing import TOKEN_ROUTINGS, Routing

Choice = TypeVar("Choice", Activation, Routing)


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderConfig:
    """A decoder-only model.

    `max_positions` is what the model was made for; callers limit requests with it, the forward pass
    does not. `sliding_window` counts the positions a token sees, itself included.
    """

    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    num_experts_per_token: int
    vocab_size: int
    norm_eps: float
    rope_theta: float
    max_positions: int
    sliding_window: int | None
    activation: Activation
    routing: Routing
    tied_head: bool

    def __post_init__(self) -> None:
        _require(self.num_heads % self.num_kv_heads == 0, "num_heads is no multiple of num_kv_heads")
        _require(self.head_size % 2 == 0, "head_size is odd, rotary embedding needs pairs")
        _require(self.routing in TOKEN_ROUTINGS, f"routing {self.routing} is not for a decoder-only model")

    @classmethod
    def from_settings(cls, settings: Mapping[str, object]) -> Self:
        """Read the fields of this class; settings that only describe the checkpoint are passed over.

        Raises:
            UnsupportedCheckpoint: A field is missing, of the wrong type or of a value that no model
                here implements.
        """
        _require_fields(settings, {field.name for field in fields(cls)})
        window = settings["sliding_window"]
        return cls(
            hidden_size=_size(settings, "hidden_size"),
            num_layers=_size(settings, "num_layers"),
            num_heads=_size(settings, "num_heads"),
            num_kv_heads=_size(settings, "num_kv_heads"),
            head_size=_size(settings, "head_size"),
            num_experts_per_token=_size(settings, "num_experts_per_token"),
            vocab_size=_size(settings, "vocab_size"),
            norm_eps=_number(settings, "norm_eps"),
            rope_theta=_number(settings, "rope_theta"),
            max_positions=_size(settings, "max_positions"),
            sliding_window=None if window is None else _size(settings, "sliding_window"),
            activation=_choice(settings, "activation", Activation),
            routing=_choice(settings, "routing", Routing),
            tied_head=_flag(settings, "tied_head"),
        )


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
        _require_fields(settings, {field.name for field in fields(cls)})
        return cls(
            hidden_size=_size(settings, "hidden_size"),
            head_size=_size(settings, "head_size"),
            num_heads=_size(settings, "num_heads"),
            num_encoder_layers=_size(settings, "num_encoder_layers"),
            num_decoder_layers=_size(settings, "num_decoder_layers"),
            expert_capacity=_size(settings, "expert_capacity"),
            vocab_size=_size(settings, "vocab_size"),
            norm_eps=_number(settings, "norm_eps"),
            position_buckets=_size(settings, "position_buckets"),
            position_max_distance=_size(settings, "position_max_distance"),
            activation=_choice(settings, "activation", Activation),
            tied_head=_flag(settings, "tied_head"),
            start_token_id=_integer(settings, "start_token_id"),
            pad_token_id=_integer(settings, "pad_token_id"),
        )


def _require(is_met: bool, complaint: str) -> None:
    if not is_met:
        raise UnsupportedCheckpoint(f"model settings: {complaint}")


def _require_fields(settings: Mapping[str, object], expected: set[str]) -> None:
    missing = sorted(expected - settings.keys())
    _require(not missing, f"missing {', '.join(missing)}")


def _integer(settings: Mapping[str, object], key: str) -> int:
    value = settings[key]
    if not isinstance(value, int) or isinstance(value, bool):
        raise UnsupportedCheckpoint(f"model settings: {key} is {value!r}, expected an integer")
    return value


def _size(settings: Mapping[str, object], key: str) -> int:
    value = _integer(settings, key)
    _require(value > 0, f"{key} is {value}, expected at least 1")
    return value


def _number(settings: Mapping[str, object], key: str) -> float:
    value = settings[key]
    if not isinstance(value, int | float) or isinstance(value, bool) or not value > 0:
        raise UnsupportedCheckpoint(f"model settings: {key} is {value!r}, expected a positive number")
    return float(value)


def _flag(settings: Mapping[str, object], key: str) -> bool:
    value = settings[key]
    if not isinstance(value, bool):
        raise UnsupportedCheckpoint(f"model settings: {key} is {value!r}, expected true or false")
    return value


def _choice(settings: Mapping[str, object], key: str, kinds: type[Choice]) -> Choice:
    value = settings[key]
    for kind in kinds:
        if value == kind:
            return kind
    known = ", ".join(kinds)
    raise UnsupportedCheckpoint(f"model settings: {key} is {value!r}, expected one of {known}")
