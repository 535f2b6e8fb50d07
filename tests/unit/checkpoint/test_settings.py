"""Configurations of several generations give the same settings; contradictions are errors."""

import json

import pytest

from moemerge.checkpoint.family import load_families
from moemerge.checkpoint.settings import read_settings
from tests.factories import write_checkpoint


@pytest.fixture(params=["mixtral", "switch_transformers"])
def family(request):
    return load_families()[request.param]


@pytest.fixture
def mixtral(tmp_path):
    return json.loads((write_checkpoint(tmp_path / "m") / "config.json").read_text())


@pytest.fixture
def switch(tmp_path):
    return json.loads((write_checkpoint(tmp_path / "s", "switch_transformers") / "config.json").read_text())


def read(config):
    return read_settings(config, load_families()[config["model_type"]], "config.json")


def errors(config):
    return [str(finding) for finding in read(config)[1] if finding.level == "error"]


def test_both_generations_of_keys_give_the_same_settings(tmp_path, family):
    configs = [
        json.loads((folder / "config.json").read_text())
        for folder in (
            write_checkpoint(tmp_path / number, family.model_type, generation=number) for number in "45"
        )
    ]
    assert configs[0].keys() != configs[1].keys()
    (old, old_findings), (new, new_findings) = map(read, configs)
    assert old == new
    assert old_findings == new_findings == []


def test_settings_are_complete(mixtral, switch):
    for config in (mixtral, switch):
        assert read(config)[0].keys() == load_families()[config["model_type"]].settings.keys()


@pytest.mark.parametrize(
    ("older", "newer", "value"),
    [
        ("num_experts", "num_local_experts", 4),
        ("num_experts_per_token", "num_experts_per_tok", 2),
    ],
)
def test_alias_alone_is_understood(mixtral, older, newer, value):
    expected = read(mixtral)[0]
    assert mixtral.pop(newer) == value
    mixtral[older] = value
    assert read(mixtral) == (expected, [])


def test_agreeing_aliases_are_accepted(mixtral):
    mixtral |= {"num_experts": 4, "rope_theta": 10000}
    assert errors(mixtral) == []


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("num_experts", 8, "num_local_experts = 4, num_experts = 8"),
        ("rope_theta", 1e6, "rope_parameters.rope_theta = 10000.0, rope_theta = 1000000.0"),
        ("num_experts_per_token", 1, "num_experts_per_tok = 2, num_experts_per_token = 1"),
    ],
)
def test_contradicting_aliases_are_an_error_that_shows_both(mixtral, key, value, words):
    mixtral[key] = value
    assert errors(mixtral) == [
        f"config.json: two spellings of {alias_of(key)} disagree: {words}. Keep the right one"
    ]


def alias_of(key):
    rules = load_families()["mixtral"].settings.items()
    return next(name for name, rule in rules if key in rule.keys)


def test_null_counts_as_absent(mixtral):
    mixtral |= {"num_experts": None, "head_dim": None, "sliding_window": None}
    settings, findings = read(mixtral)
    assert (settings["num_experts"], settings["head_size"], settings["sliding_window"]) == (4, 8, None)
    assert findings == []


def test_absent_keys_take_the_class_default(mixtral, switch):
    for key in ("num_key_value_heads", "head_dim", "rope_parameters", "rms_norm_eps", "tie_word_embeddings"):
        del mixtral[key]
    settings = read(mixtral)[0]
    assert settings["num_kv_heads"] == settings["num_heads"] == 4
    assert settings["head_size"] == 32 // 4
    assert (settings["rope_theta"], settings["norm_eps"], settings["tied_head"]) == (1e6, 1e-5, False)
    for key in ("num_decoder_layers", "decoder_start_token_id", "tie_word_embeddings"):
        del switch[key]
    settings = read(switch)[0]
    assert (settings["num_decoder_layers"], settings["start_token_id"]) == (4, 0)
    assert settings["tied_head"] is True


def test_missing_required_key_is_named(mixtral):
    del mixtral["num_local_experts"]
    assert errors(mixtral) == [
        "config.json: no num_local_experts or num_experts, expected a value for num_experts"
    ]


@pytest.mark.parametrize("value", ["32", 32.0, True, -1, 2**40, float("nan"), float("inf"), [32], {"a": 1}])
def test_value_of_the_wrong_kind_is_named(mixtral, value):
    mixtral["hidden_size"] = value
    assert f"hidden_size = {value!r}, expected a whole number" in errors(mixtral)[0]


def test_counts_that_would_be_enumerated_for_hours_are_refused(mixtral):
    mixtral |= {"num_hidden_layers": 10**9}
    assert errors(mixtral) == [
        "config.json: 1000000000 layers with 4 experts, expected at most 10000 layers and 1000000 experts"
    ]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("hidden_act", "gelu"),
        ("rope_scaling", {"type": "linear", "factor": 2.0}),
        ("rope_parameters", {"rope_type": "yarn", "rope_theta": 10000.0}),
    ],
)
def test_arithmetic_that_is_not_computed_is_refused(mixtral, key, value):
    mixtral[key] = value
    (error,) = errors(mixtral)
    assert key in error


@pytest.mark.parametrize("value", [{"is_gated_act": True}, {"dense_act_fn": "gelu"}, {"router_bias": True}])
def test_switch_variants_that_are_not_computed_are_refused(switch, value):
    switch |= value
    (error,) = errors(switch)
    assert next(iter(value)) in error


def test_unknown_key_that_may_alter_routing_is_refused_when_truthy(switch):
    switch["batch_priority_routing"] = True
    assert "batch_priority_routing = True is not part of switch_transformers" in errors(switch)[0]
    switch["batch_priority_routing"] = False
    assert errors(switch) == []


def test_other_unknown_key_is_only_noted(mixtral):
    mixtral["trained_by"] = "somebody" * 100
    (note,) = read(mixtral)[1]
    assert note.level == "note"
    assert "trained_by" in str(note)
    assert len(str(note)) < 250


def test_custom_code_makes_any_truthy_unknown_key_an_error(mixtral):
    mixtral |= {"auto_map": {"AutoModel": "modeling_x.X"}}
    assert errors(mixtral) == []
    mixtral["logit_bonus"] = 3
    assert "logit_bonus = 3" in errors(mixtral)[0]
    assert "never run" in errors(mixtral)[0]


def test_every_problem_is_reported_at_once(mixtral):
    del mixtral["hidden_size"]
    mixtral |= {"num_experts": 9, "hidden_act": "gelu"}
    found = errors(mixtral)
    assert [any(key in error for error in found) for key in ("hidden_size", "num_experts", "hidden_act")] == [
        True
    ] * 3
