"""Shapes of generated models: configurations with the proportions of real ones, small enough for a laptop."""

from dataclasses import dataclass
from typing import Any

from moemerge.checkpoint.family import Family, Settings, find_family
from moemerge.checkpoint.settings import read_settings
from moemerge.errors import InvalidRecipe


@dataclass(frozen=True, slots=True)
class Shape:
    """A model to generate.

    Attributes:
        name: As on the command line.
        config: Its `config.json`.
        is_listed: Whether help texts name it.
    """

    name: str
    config: dict[str, Any]
    is_listed: bool = True

    @property
    def family(self) -> Family:
        """Its description."""
        return find_family(self.config["model_type"], self.name)

    @property
    def settings(self) -> Settings:
        """Canonical settings of its config."""
        settings, _ = read_settings(self.config, self.family, self.name)
        return settings


def find_shape(name: str) -> Shape:
    """A shape by name.

    Raises:
        InvalidRecipe: There is none of that name.
    """
    if name not in SHAPES:
        listed = ", ".join(shape.name for shape in SHAPES.values() if shape.is_listed)
        raise InvalidRecipe(f"model {name!r} is unknown; there are {listed}")
    return SHAPES[name]


def _mixtral(
    name: str,
    hidden: int,
    layers: int,
    heads: int,
    kv_heads: int,
    width: int,
    vocab: int,
    *,
    is_listed: bool = True,
) -> Shape:
    """A Mixtral whose experts take the share of the weights that they take in the real one."""
    config: dict[str, Any] = {
        "model_type": "mixtral",
        "architectures": ["MixtralForCausalLM"],
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "intermediate_size": width,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "vocab_size": vocab,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e6,
        "max_position_embeddings": 4096,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "hidden_act": "silu",
    }
    return Shape(name, config, is_listed)


def _switch_base_8() -> Shape:
    """`google/switch-base-8` at its true shape."""
    config: dict[str, Any] = {
        "model_type": "switch_transformers",
        "architectures": ["SwitchTransformersForConditionalGeneration"],
        "is_encoder_decoder": True,
        "d_model": 768,
        "d_kv": 64,
        "d_ff": 3072,
        "num_layers": 12,
        "num_decoder_layers": 12,
        "num_heads": 12,
        "num_experts": 8,
        "expert_capacity": 64,
        "encoder_sparse_step": 2,
        "decoder_sparse_step": 2,
        "num_sparse_encoder_layers": 6,
        "num_sparse_decoder_layers": 6,
        "vocab_size": 32128,
        "relative_attention_num_buckets": 32,
        "relative_attention_max_distance": 128,
        "layer_norm_epsilon": 1e-6,
        "feed_forward_proj": "relu",
        "tie_word_embeddings": True,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "decoder_start_token_id": 0,
        "router_bias": False,
        "router_dtype": "float32",
        "torch_dtype": "bfloat16",
    }
    return Shape("switch-base-8", config)


SHAPES = {
    shape.name: shape
    for shape in (
        _mixtral("mix-S", 512, 8, 8, 2, 1792, 4000),
        _mixtral("mix-M", 1024, 8, 16, 4, 3584, 8000),
        _mixtral("mix-L", 1024, 12, 16, 4, 3584, 8000),
        _switch_base_8(),
        # For tests: a few hundred kilobytes.
        _mixtral("tiny", 32, 2, 4, 2, 64, 128, is_listed=False),
    )
}
