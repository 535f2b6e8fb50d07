"""Kinds of checkpoint that are not read: each message names the sign and says what to do instead."""

import json
import re

import pytest
import torch

from moemerge.checkpoint.checkpoint import open_checkpoint
from moemerge.checkpoint.family import load_families
from moemerge.checkpoint.repository import LocalFolder
from moemerge.errors import DamagedInput, IncompatibleInputs, MoemergeError, UnsupportedCheckpoint
from tests.factories import edit_json, edit_tensors, write_checkpoint, write_json, write_lfs_pointer


@pytest.fixture
def folder(tmp_path):
    return write_checkpoint(tmp_path / "model")


def refusal(folder, kind: type[MoemergeError] = UnsupportedCheckpoint) -> str:
    with pytest.raises(kind) as caught:
        open_checkpoint(LocalFolder(folder))
    assert str(folder) in str(caught.value)
    return str(caught.value)


def replace_weights(folder, *names: str) -> None:
    (folder / "model.safetensors").unlink()
    for name in names:
        (folder / name).write_bytes(b"not opened")


@pytest.mark.parametrize("method", ["gptq", "awq", "bitsandbytes", "fp8", "compressed-tensors"])
def test_quantised_config(folder, method):
    edit_json(folder / "config.json", quantization_config={"quant_method": method, "bits": 4})
    message = refusal(folder)
    assert re.search(rf"config.json: quantization_config: quantised by {method}", message)
    assert "Use the unquantised repository" in message


def test_gpt_oss_as_published_says_how_to_dequantise_it(tmp_path):
    layers = {"layer_types": '["sliding_attention", "full_attention"]'}
    folder = write_checkpoint(tmp_path / "model", "gpt_oss", settings=layers)
    edit_json(folder / "config.json", quantization_config={"quant_method": "mxfp4"})
    message = refusal(folder)
    assert "quantised by mxfp4" in message
    assert "Mxfp4Config(dequantize=True)" in message
    edit_json(folder / "config.json", quantization_config=None)
    name = "model.layers.0.mlp.experts.down_proj"
    blocks = torch.zeros(4, 8, dtype=torch.uint8)
    edit_tensors(folder / "model.safetensors", lambda t: (t.pop(name), t.update({f"{name}_blocks": blocks})))
    assert f"quantised weights ({name}_blocks)" in refusal(folder, IncompatibleInputs)


@pytest.mark.parametrize(
    ("family", "key", "value"),
    [
        ("deepseek_v2", "q_lora_rank", 8),
        ("deepseek_v2", "norm_topk_prob", True),
        ("deepseek_v2", "topk_method", "group_limited_greedy"),
        ("qwen3_moe", "use_sliding_window", True),
        ("qwen2_moe", "layer_types", ["full_attention", "sliding_attention"]),
        ("llama", "mlp_bias", True),
        ("dbrx", "ffn_config", {"moe_normalize_expert_weights": 2}),
    ],
)
def test_arithmetic_that_is_not_computed_is_named(family, key, value, tmp_path):
    folder = write_checkpoint(tmp_path / "model", family)
    config = json.loads((folder / "config.json").read_text())
    changed = {**config[key], **value} if isinstance(value, dict) else value
    edit_json(folder / "config.json", **{key: changed})
    message = refusal(folder, IncompatibleInputs)
    assert key.partition(".")[0] in message or "moe_normalize_expert_weights" in message
    assert "expected" in message


def test_quantize_config_file(folder):
    write_json(folder / "quantize_config.json", {"bits": 4})
    message = refusal(folder)
    assert "quantize_config.json: quantised by GPTQ" in message
    assert "Use the unquantised repository" in message


def test_gptq_weight_file_alone(folder):
    replace_weights(folder, "gptq_model-4bit-128g.safetensors")
    assert "gptq_model-*); use the unquantised repository" in refusal(folder)


@pytest.mark.parametrize(
    "ending",
    ["qweight", "qzeros", "g_idx", "weight.absmax", "SCB", "weight_scale", "weight_scale_inv",
     "down_proj_blocks", "down_proj_scales", "weight_packed", "q_weight"],
)  # fmt: skip
def test_names_of_quantised_weights(folder, ending):
    name = f"model.layers.0.self_attn.q_proj.{ending}"
    edit_tensors(folder / "model.safetensors", lambda t: t.update({name: torch.zeros(1)}))
    message = refusal(folder, IncompatibleInputs)
    assert f"quantised weights ({name})" in message
    assert "Use the unquantised repository" in message


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn, torch.float8_e5m2])
def test_dtypes_of_quantised_weights(folder, dtype):
    name = "model.layers.0.self_attn.q_proj.weight"
    edit_tensors(folder / "model.safetensors", lambda t: t.update({name: torch.zeros(32, 32).to(dtype)}))
    message = refusal(folder, IncompatibleInputs)
    assert f"quantised weights ({name} (" in message
    assert "Use the unquantised repository" in message


@pytest.mark.parametrize(
    ("files", "words"),
    [
        (["model-q4.gguf"], r"only GGUF files \(model-q4.gguf\).*use the original repository"),
        (["measurement.json"], r"measurement.json belongs to EXL2.*use the original repository"),
        (
            ["consolidated.00.pt", "consolidated.01.pt"],
            r"raw layout \(consolidated.00.pt\); use the converted",
        ),
        (["consolidated.safetensors"], r"raw layout \(consolidated.safetensors\); use the converted files"),
        (["flax_model.msgpack"], r"only Flax.*\(flax_model.msgpack\); use a revision with PyTorch weights"),
        (["tf_model.h5"], r"only Flax.*\(tf_model.h5\); use a revision with PyTorch weights"),
        (["model.onnx"], r"only Flax.*\(model.onnx\); use a revision with PyTorch weights"),
        (["pytorch_model.bin"], r"pickles \(pytorch_model.bin\).*safetensors, or pass --allow-pickle"),
        (["pytorch_model-00001-of-00002.bin"], r"of-00002.bin is a shard.*no pytorch_model.bin.index.json"),
        ([], r"no weights: neither model.safetensors nor .*Is the download complete\?"),
    ],
)
@pytest.mark.parametrize("with_config", [True, False])
def test_other_kinds_of_weights(folder, files, words, with_config):
    replace_weights(folder, *files)
    if not with_config:
        (folder / "config.json").unlink()
    assert re.search(words, refusal(folder))


def test_pickle_index_is_named(folder):
    replace_weights(folder, "pytorch_model_00001-of-00002.bin")
    write_json(folder / "pytorch_model.bin.index.json", {"weight_map": {}})
    assert "pickles (pytorch_model.bin.index.json)" in refusal(folder)


@pytest.mark.parametrize("with_config", [True, False])
def test_adapter_names_its_base(folder, with_config):
    replace_weights(folder, "adapter_model.safetensors")
    write_json(folder / "adapter_config.json", {"base_model_name_or_path": "org/base", "peft_type": "LORA"})
    if not with_config:
        (folder / "config.json").unlink()
    message = refusal(folder)
    assert "adapter_config.json says that this is an adapter of org/base" in message
    assert f"Write BASE+{folder} to apply it" in message


def test_weights_without_config(folder):
    (folder / "config.json").unlink()
    assert "it has weights but no config.json" in refusal(folder)


@pytest.mark.parametrize("model_type", ["llama_of_yore", None, 3, ["mixtral"]])
def test_unknown_family_lists_the_known_ones(folder, model_type):
    edit_json(folder / "config.json", model_type=model_type)
    message = refusal(folder)
    assert f"config.json: model_type {model_type!r} is not supported" in message
    known = dict.fromkeys(family.model_type for family in load_families().values())
    assert f"supported are {', '.join(known)}" in message


def test_custom_code_with_a_key_of_its_own(folder):
    edit_json(folder / "config.json", auto_map={"AutoModel": "m.M"}, mixture_temperature=0.5)
    message = refusal(folder, IncompatibleInputs)
    assert "mixture_temperature = 0.5" in message
    assert "custom model code is never run" in message


def test_custom_code_that_adds_nothing_is_accepted_and_not_run(folder):
    (folder / "m.py").write_text("raise SystemExit('run')")
    edit_json(folder / "config.json", auto_map={"AutoModel": "m.M"})
    assert open_checkpoint(LocalFolder(folder)).num_experts == 4


def test_expert_counts_per_layer(folder):
    edit_json(folder / "config.json", num_local_experts=[4, 3])
    assert "num_local_experts = [4, 3], expected a whole number" in refusal(folder, IncompatibleInputs)


def test_custom_key_with_expert_counts_per_layer(folder):
    edit_json(folder / "config.json", layer_expert_counts=[4, 3])
    assert "layer_expert_counts = [4, 3]" in refusal(folder, IncompatibleInputs)


def test_layer_with_fewer_experts_is_named(folder):
    gone = "model.layers.1.block_sparse_moe.experts.3."
    edit_tensors(folder / "model.safetensors", lambda t: [t.pop(n) for n in list(t) if n.startswith(gone)])
    assert f"first missing {gone}w1.weight" in refusal(folder, IncompatibleInputs)


def test_layer_of_another_width_is_named(folder):
    name = "model.layers.1.self_attn.q_proj.weight"
    edit_tensors(folder / "model.safetensors", lambda t: t.update({name: t[name][:16]}))
    assert f"{name} has shape [16, 32], expected [32, 32]" in refusal(folder, IncompatibleInputs)


def test_prefix_before_all_names_is_shown(folder):
    def add_prefix(tensors):
        for name in list(tensors):
            tensors[f"base_model.{name}"] = tensors.pop(name)

    edit_tensors(folder / "model.safetensors", add_prefix)
    message = refusal(folder, IncompatibleInputs)
    assert "base_model.lm_head.weight (nearest known: lm_head.weight)" in message


def test_lfs_pointer(folder):
    write_lfs_pointer(folder / "model.safetensors")
    message = refusal(folder, DamagedInput)
    assert "model.safetensors: a Git LFS pointer" in message
    assert "git lfs pull" in message


def test_router_cannot_choose_more_experts_than_there_are(tmp_path):
    folder = write_checkpoint(tmp_path / "a")
    edit_json(folder / "config.json", num_experts_per_tok=5)
    with pytest.raises(IncompatibleInputs, match=r"config\.json: 5 experts per token of 4, expected 1 to 4"):
        open_checkpoint(LocalFolder(folder))
