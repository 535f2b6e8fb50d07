"""Every tensor has one role, every role has its tensor; layouts and shards do not matter."""

from itertools import pairwise

import pytest
import torch

from moemerge.checkpoint.checkpoint import open_checkpoint
from moemerge.checkpoint.repository import LocalFolder
from moemerge.checkpoint.tensors import TensorReader
from moemerge.errors import IncompatibleInputs
from tests.factories import edit_json, edit_tensors, read_canonical, write_checkpoint

FAMILIES = ["mixtral", "switch_transformers"]
W1 = "model.layers.1.block_sparse_moe.experts.2.w1.weight"


def open_folder(folder):
    return open_checkpoint(LocalFolder(folder))


def refusal(folder, edit=None):
    if edit:
        edit_tensors(folder / "model.safetensors", edit)
    with pytest.raises(IncompatibleInputs) as caught:
        open_folder(folder)
    return str(caught.value)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_stored_byte_belongs_to_exactly_one_role(tmp_path, family):
    opened = open_folder(write_checkpoint(tmp_path / "a", family))
    parts = [part for parts in opened.experts.values() for part in parts.values()]
    ranges = sorted((t.start, t.start + t.nbytes) for t in [*opened.tensors.values(), *parts])
    assert all(before[1] == after[0] for before, after in pairwise(ranges))
    assert ranges[-1][1] == (tmp_path / "a" / "model.safetensors").stat().st_size
    assert opened.expert_bytes + opened.other_bytes == ranges[-1][1] - ranges[0][0]


@pytest.mark.parametrize(
    "options",
    [
        {"layout": "stacked"},
        {"shard_bytes": 20_000},
        {"layout": "stacked", "shard_bytes": 20_000},
        {"generation": "4"},
    ],
)
def test_layout_shards_and_generation_give_the_same_weights(tmp_path, options):
    plain = read_canonical(write_checkpoint(tmp_path / "plain"))
    other = read_canonical(write_checkpoint(tmp_path / "other", **options))
    assert plain.keys() == other.keys()
    assert all(plain[name].equal(other[name]) for name in plain)


def test_shards_of_the_test_separate_the_parts_of_an_expert(tmp_path):
    opened = open_folder(write_checkpoint(tmp_path / "a", shard_bytes=12_500))
    files = {part.path.name for part in opened.experts[0, 0].values()}
    assert len(files) == 3


def test_layout_is_taken_from_names(tmp_path):
    assert open_folder(write_checkpoint(tmp_path / "a")).layout == "per_expert"
    assert open_folder(write_checkpoint(tmp_path / "b", layout="stacked")).layout == "stacked"


def test_stacked_rows_are_gate_then_up(tmp_path):
    folder = write_checkpoint(tmp_path / "a", layout="stacked", dtype="F32")

    def mark(tensors):
        stacked = tensors["model.layers.0.mlp.experts.gate_up_proj"]
        stacked[3, :48] = 1.0
        stacked[3, 48:] = 2.0

    edit_tensors(folder / "model.safetensors", mark)
    parts = open_folder(folder).experts[0, 3]
    with TensorReader() as reader:
        gate, up, down = (reader.read(parts[part]) for part in ("gate", "up", "down"))
    assert gate.equal(torch.full((48, 32), 1.0))
    assert up.equal(torch.full((48, 32), 2.0))
    assert down.shape == (32, 48)


def test_sparse_layers_of_switch_count_through_both_stacks(tmp_path):
    opened = open_folder(write_checkpoint(tmp_path / "a", "switch_transformers"))
    assert [(r.index, r.stack, r.block) for r in opened.routed_layers] == [
        (1, "encoder", 1), (3, "encoder", 3), (5, "decoder", 1), (7, "decoder", 3),
    ]  # fmt: skip
    assert {layer for layer, _ in opened.experts} == {1, 3, 5, 7}


def test_step_one_makes_every_layer_sparse(tmp_path):
    folder = write_checkpoint(
        tmp_path / "a",
        "switch_transformers",
        settings={"encoder_sparse_step": 1, "num_sparse_encoder_layers": 4},
    )
    assert {layer for layer, _ in open_folder(folder).experts} == {0, 1, 2, 3, 5, 7}


def test_sparse_layers_follow_from_the_count_when_no_step_is_given(tmp_path):
    folder = write_checkpoint(
        tmp_path / "a",
        "switch_transformers",
        config={"encoder_sparse_step": None, "decoder_sparse_step": None},
    )
    assert {layer for layer, _ in open_folder(folder).experts} == {1, 3, 5, 7}


def test_step_that_contradicts_the_count_is_refused(tmp_path):
    folder = write_checkpoint(tmp_path / "a", "switch_transformers")
    edit_json(folder / "config.json", num_sparse_encoder_layers=1)
    message = refusal(folder)
    assert "encoder_sparse_step = 2 makes 2 sparse layers, num_sparse_encoder_layers = 1" in message


def test_step_that_contradicts_the_tensors_is_refused(tmp_path):
    folder = write_checkpoint(tmp_path / "a", "switch_transformers")
    edit_json(folder / "config.json", encoder_sparse_step=4, num_sparse_encoder_layers=1)
    message = refusal(folder)
    assert "encoder.block.3.layer.1.mlp.wi.weight" in message


def test_unknown_tensor_is_named_with_its_nearest(tmp_path):
    folder = write_checkpoint(tmp_path / "a")
    message = refusal(folder, lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": torch.zeros(2)}))
    assert (
        "1 tensors are not part of family mixtral: model.layers.0.self_attn.q_proj.bias "
        "(nearest known: model.layers.0.self_attn.q_proj.weight)"
    ) in message


def test_many_unknown_tensors_are_counted(tmp_path):
    folder = write_checkpoint(tmp_path / "a")
    message = refusal(folder, lambda t: t.update({f"zzz{n}": torch.zeros(1) for n in range(10)}))
    assert "10 tensors are not part of family mixtral" in message
    assert "and 7 more" in message


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("model.norm.weight", "1 expected tensors are missing; first model.norm.weight"),
        ("lm_head.weight", "first lm_head.weight (untied head: tie_word_embeddings is false)"),
        (W1, f"23 of 24 expert tensors; first missing {W1}"),
    ],
)
def test_missing_tensor_is_named_and_nothing_else_is_blamed(tmp_path, name, words):
    folder = write_checkpoint(tmp_path / "a")
    message = refusal(folder, lambda t: t.pop(name))
    assert words in message
    assert "Is the download complete" in message
    assert "1 problem" in message


def test_fewer_experts_than_configured_names_the_first(tmp_path):
    folder = write_checkpoint(tmp_path / "a")

    def prune(tensors):
        for part in ("w1", "w2", "w3"):
            del tensors[f"model.layers.1.block_sparse_moe.experts.3.{part}.weight"]

    message = refusal(folder, prune)
    assert (
        "21 of 24 expert tensors; first missing model.layers.1.block_sparse_moe.experts.3.w1.weight"
        in message
    )
    assert "Layers with fewer experts than others are not supported" in message


def test_more_experts_than_configured_are_refused(tmp_path):
    folder = write_checkpoint(tmp_path / "a")
    edit_json(folder / "config.json", num_local_experts=3)
    message = refusal(folder)
    assert "model.layers.0.block_sparse_moe.gate.weight has shape [4, 32], expected [3, 32]" in message
    assert "6 tensors are not part of family" in message


def test_experts_in_both_layouts_are_refused(tmp_path):
    folder = write_checkpoint(tmp_path / "a")
    stacked = {"model.layers.0.mlp.experts.down_proj": torch.zeros(4, 32, 48)}
    message = refusal(folder, lambda t: t.update(stacked))
    assert "experts are stored in two layouts at once, expected one of per_expert, stacked" in message


def test_checkpoint_without_experts_is_refused(tmp_path):
    folder = write_checkpoint(tmp_path / "a")
    message = refusal(folder, lambda t: [t.pop(name) for name in list(t) if ".experts." in name])
    assert "experts are stored in no known layout" in message


def test_router_under_two_names_is_ambiguous(tmp_path):
    folder = write_checkpoint(tmp_path / "a")
    message = refusal(folder, lambda t: t.update({"model.layers.0.mlp.gate.weight": torch.zeros(4, 32)}))
    assert "decoder.0.router is there under two names" in message


@pytest.mark.parametrize(
    ("layout", "name", "expected"),
    [
        ("per_expert", W1, "[48, 32]"),
        ("per_expert", "model.embed_tokens.weight", "[64, 32]"),
        ("stacked", "model.layers.0.mlp.experts.gate_up_proj", "[4, 96, 32]"),
    ],
)
def test_wrong_shape_is_named_with_the_right_one(tmp_path, layout, name, expected):
    folder = write_checkpoint(tmp_path / "a", layout=layout)
    message = refusal(folder, lambda t: t.update({name: torch.zeros(5, 32)}))
    assert f"{name} has shape [5, 32], expected {expected}" in message


def test_config_that_disagrees_with_the_weights_is_found_by_shapes(tmp_path):
    folder = write_checkpoint(tmp_path / "a")
    edit_json(folder / "config.json", vocab_size=66, intermediate_size=40)
    message = refusal(folder)
    assert "model.embed_tokens.weight has shape [64, 32], expected [66, 32]" in message
    assert ".w1.weight has shape [48, 32], expected [40, 32]" in message


def test_integer_weights_are_refused(tmp_path):
    folder = write_checkpoint(tmp_path / "a")
    message = refusal(folder, lambda t: t.update({"model.norm.weight": torch.zeros(32, dtype=torch.int32)}))
    assert "1 tensors are not floating point; first model.norm.weight (I32)" in message


def test_recomputed_tensors_are_dropped_with_a_reason(tmp_path):
    folder = write_checkpoint(tmp_path / "a")
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    edit_tensors(folder / "model.safetensors", lambda t: t.update({name: torch.zeros(4)}))
    assert open_folder(folder).dropped == {name: "recomputed from rope_theta"}


def test_dtypes_are_kept_per_tensor(tmp_path):
    folder = write_checkpoint(tmp_path / "a")
    edit_tensors(
        folder / "model.safetensors",
        lambda t: t.update({"model.norm.weight": t["model.norm.weight"].float()}),
    )
    opened = open_folder(folder)
    assert opened.tensors["decoder.final_norm"].dtype == "F32"
    assert list(opened.dtype_bytes()) == ["BF16", "F32"]
    assert opened.dtype_bytes()["F32"] == 32 * 4
