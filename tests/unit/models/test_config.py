from dataclasses import asdict

import pytest

from moemerge.errors import UnsupportedCheckpoint
from moemerge.models import DecoderConfig, EncoderDecoderConfig, Routing, build_model

DECODER = {
    "hidden_size": 32,
    "num_layers": 2,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_size": 8,
    "num_experts_per_token": 2,
    "vocab_size": 50,
    "norm_eps": 1e-5,
    "rope_theta": 10000,
    "max_positions": 64,
    "sliding_window": None,
    "activation": "silu_gated",
    "routing": "softmax_topk_renormalised",
    "tied_head": False,
}
ENCODER_DECODER = {
    "hidden_size": 32,
    "head_size": 8,
    "num_heads": 4,
    "num_encoder_layers": 2,
    "num_decoder_layers": 2,
    "expert_capacity": 64,
    "vocab_size": 50,
    "norm_eps": 1e-6,
    "position_buckets": 32,
    "position_max_distance": 128,
    "activation": "relu",
    "tied_head": True,
    "start_token_id": 0,
    "pad_token_id": 0,
}


@pytest.mark.parametrize(
    ("kind", "settings"), [(DecoderConfig, DECODER), (EncoderDecoderConfig, ENCODER_DECODER)]
)
def test_config_holds_the_settings_it_was_read_from(kind, settings):
    held = asdict(kind.from_settings(settings))
    held |= held.pop("rotary", {})
    assert settings.items() <= held.items()


def test_choices_become_members_of_the_closed_lists():
    assert DecoderConfig.from_settings(DECODER).routing is Routing.SOFTMAX_TOPK_RENORMALISED


@pytest.mark.parametrize(
    ("kind", "settings"), [(DecoderConfig, DECODER), (EncoderDecoderConfig, ENCODER_DECODER)]
)
def test_missing_setting_is_named_and_others_are_passed_over(kind, settings):
    extended = settings | {"num_experts": 8}
    assert kind.from_settings(extended) == kind.from_settings(settings)
    with pytest.raises(UnsupportedCheckpoint, match="missing norm_eps"):
        kind.from_settings({key: value for key, value in extended.items() if key != "norm_eps"})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("hidden_size", "32"),
        ("hidden_size", 0),
        ("num_layers", True),
        ("norm_eps", 0),
        ("rope_theta", None),
        ("sliding_window", 0),
        ("tied_head", 1),
        ("activation", "gelu"),
        ("routing", "sinkhorn"),
        ("routing", "switch_top1"),
        ("num_kv_heads", 3),
        ("head_size", 7),
    ],
)
def test_impossible_value_is_refused_and_named(key, value):
    with pytest.raises(UnsupportedCheckpoint, match=key):
        DecoderConfig.from_settings(DECODER | {key: value})


@pytest.mark.parametrize(
    ("arithmetic", "settings", "kind"),
    [("decoder", DECODER, DecoderConfig), ("encoder_decoder", ENCODER_DECODER, EncoderDecoderConfig)],
)
def test_build_model_reads_the_settings_of_its_arithmetic(arithmetic, settings, kind):
    model = build_model(arithmetic, settings)
    assert isinstance(model.config, kind)


def test_unknown_arithmetic_is_refused():
    with pytest.raises(UnsupportedCheckpoint, match="'diffusion'"):
        build_model("diffusion", DECODER)
