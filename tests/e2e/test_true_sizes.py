"""The program on TeleChat checkpoints of true size, from headers: counts and bytes as they are published."""

import pytest

from tests.e2e.program import call_program
from tests.factories import edit_json
from tests.skeletons import write_skeleton

CODE = {"auto_map": {"AutoConfig": "configuration_telechat.TelechatConfig"}, "model_type": "telechat"}
FIRST = {"layer_norm_epsilon": 1e-05, "training_seqlen": 8192, "embed_layernorm": False, "flash_attn": True}
SECOND = {
    **FIRST,
    "base_seqlen": 8192,
    "seq_length": 8192,
    "vocab_size": 131072,
    "tie_word_embeddings": False,
}


def config(layers, width, expert, heads, **others):
    sizes = {"n_layer": layers, "hidden_size": width, "ffn_hidden_size": expert, "n_head": heads}
    return {**CODE, **sizes, **others}


MODELS = {
    "TeleChat-7B": (config(30, 4096, 12288, 32, vocab_size=160256, **FIRST), "F16"),
    "TeleChat-12B": (
        config(38, 5120, 12288, 32, vocab_size=120000, tie_word_embeddings=False, logn=False, **FIRST), "F16"
    ),
    "TeleChat2-3B": (config(24, 3072, 6144, 24, **SECOND), "BF16"),
    "TeleChat2-7B": (config(30, 4096, 12288, 32, **SECOND), "BF16"),
    "TeleChat2-35B": (config(64, 6144, 20480, 48, **SECOND), "BF16"),
    "TeleChat2-115B": (config(96, 8192, 40960, 64, num_key_value_heads=8, **SECOND), "F32"),
}  # fmt: skip
"""The publisher's sizes, and the dtypes of its files."""
PARAMETERS = {
    "TeleChat-7B": 7_200_018_432,
    "TeleChat-12B": 12_386_432_000,
    "TeleChat2-3B": 3_070_528_512,
    "TeleChat2-7B": 7_617_351_680,
    "TeleChat2-35B": 35_435_059_200,
    "TeleChat2-115B": 113_282_916_352,
}
INDEX_TOTALS = {
    "TeleChat-7B": 14_400_036_864,
    "TeleChat-12B": 24_772_864_000,
    "TeleChat2-115B": 453_131_665_408,
}
"""Bytes that the published indices state."""
FFN_SHARES = {"TeleChat-7B": 0.6292, "TeleChat-12B": 0.5791, "TeleChat2-115B": 0.8531}
MIXTURE = config(30, 4096, 6144, 32, num_experts_per_tok=4, **SECOND)


def told(command, *arguments):
    done = call_program(command, *arguments, "--json")
    assert done.code == 0, done.err
    return done.envelope["data"]


def bundle_sizes(*sources):
    """Bytes of a bundle at most, by budget."""
    return {each["budget"]: each["bundle_bytes"] for each in told("plan", *sources)["estimates"]}


@pytest.mark.parametrize("name", MODELS)
def test_dense_models_have_the_published_sizes(name, tmp_path):
    settings, dtype = MODELS[name]
    folder = write_skeleton(
        tmp_path / "one", "telechat", settings, dtype=dtype, prefixed=name != "TeleChat-7B"
    )
    facts = told("show", folder)
    total = facts["expert_bytes"] + facts["non_expert_bytes"]
    assert facts["parameters"] == PARAMETERS[name]
    assert total == INDEX_TOTALS.get(name, total) == PARAMETERS[name] * {"F32": 4}.get(dtype, 2)
    # The table counts matrices alone, this also their biases.
    assert facts["expert_share"] == pytest.approx(FFN_SHARES.get(name, facts["expert_share"]), abs=1e-4)
    assert facts["tied_head"] == (name == "TeleChat-7B")
    sizes = bundle_sizes(f"chat={folder}", f"reason={folder}")
    assert sizes == {"exact": 2 * total, "1x": total + facts["non_expert_bytes"]}


def test_mixture_has_the_published_sizes(tmp_path):
    folder = write_skeleton(tmp_path / "one", "telechat_moe", {**MIXTURE, "num_experts": 16})
    edit_json(folder / "config.json", num_experts=None)  # names of tensors count them, too
    facts = told("show", folder)
    assert facts["parameters"] == 39_330_099_200
    assert facts["active_parameters"] == pytest.approx(12.15e9, rel=1e-3)
    assert facts["expert_bytes"] == 2 * 36_240_752_640 == 30 * 16 * 2 * 75_501_568
    assert facts["non_expert_bytes"] == 2 * 3_089_346_560
    assert (facts["experts_per_layer"], facts["tensors"]) == (16, 2133)
    sizes = bundle_sizes(f"a={folder}", f"b={folder}", f"c={folder}")
    assert sizes["1x"] == pytest.approx(91.0e9, rel=1e-3)
    assert sizes["exact"] == 3 * 2 * 39_330_099_200
