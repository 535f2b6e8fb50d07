"""TeleChat on disk: what tells its generations and kinds apart, and what is refused."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from moemerge.checkpoint.checkpoint import open_checkpoint
from moemerge.checkpoint.repository import LocalFolder
from moemerge.checkpoint.variants import open_variants
from moemerge.errors import IncompatibleInputs, MoemergeError, UnsupportedCheckpoint
from moemerge.refs import FolderRef
from tests.factories import edit_json, edit_tensors, read_canonical, write_checkpoint
from tests.telechat import CODE, MIXTURE, SECOND, SEVENTH, TWELFTH


def opened(folder):
    return open_checkpoint(LocalFolder(folder))


def refusal(folder, kind=MoemergeError):
    with pytest.raises(kind) as caught:
        open_variants({"one": FolderRef(folder)})
    return str(caught.value)


@pytest.mark.parametrize("family", ["telechat", "telechat_moe"])
def test_prefix_may_be_left_out_by_a_whole_checkpoint(family, tmp_path):
    with_prefix = write_checkpoint(tmp_path / "with", family, settings=MIXTURE)
    without = write_checkpoint(tmp_path / "without", family, settings=MIXTURE, prefixed=False)
    assert not any(name.startswith("transformer.") for name in load_file(without / "model.safetensors"))
    expected, found = read_canonical(with_prefix), read_canonical(without)
    assert all(torch.equal(expected[key], found[key]) for key in expected)
    mixed = shutil.copytree(with_prefix, tmp_path / "mixed")
    edit_tensors(
        mixed / "model.safetensors",
        lambda tensors: tensors.update({"ln_f.weight": tensors.pop("transformer.ln_f.weight")}),
    )
    message = refusal(mixed, IncompatibleInputs)
    assert "first transformer.ln_f.weight" in message
    assert "1 tensors are not part of family" in message


def test_first_generation_without_a_head_has_the_7bs_rotation(tmp_path):
    seventh = write_checkpoint(tmp_path / "7b", "telechat", settings=SEVENTH, prefixed=False)
    edit_json(seventh / "config.json", tie_word_embeddings=None)
    twelfth = write_checkpoint(tmp_path / "12b", "telechat", settings=TWELFTH)
    assert opened(seventh).settings["rope_base_length"] == 4096
    assert "head" not in opened(seventh).tensors
    assert opened(twelfth).settings["rope_base_length"] == 8192


@pytest.mark.parametrize(
    ("weights", "config", "told"),
    [
        pytest.param(SEVENTH, TWELFTH, "lm_head.weight (untied head", id="7B as 12B"),
        pytest.param(TWELFTH, SEVENTH, "is declared tied to", id="12B as 7B"),
        pytest.param(TWELFTH, SECOND, "key_value.weight has shape [64, 32]", id="one head each as grouped"),
        pytest.param(SECOND, MIXTURE, "key_value.weight has shape [32, 32]", id="grouped as one head each"),
    ],
)
def test_a_generation_fed_as_another_is_refused(weights, config, told, tmp_path):
    folder = write_checkpoint(tmp_path / "weights", "telechat", settings=weights)
    other = write_checkpoint(tmp_path / "config", "telechat", settings=config)
    shutil.copyfile(other / "config.json", folder / "config.json")
    if config is SEVENTH:
        edit_json(folder / "config.json", tie_word_embeddings=None)
    assert told in refusal(folder)


def test_mixture_without_the_number_of_chosen_experts_is_refused(tmp_path):
    folder = write_checkpoint(tmp_path / "a", "telechat_moe", settings=MIXTURE)
    edit_json(folder / "config.json", num_experts_per_tok=None)
    message = refusal(folder, IncompatibleInputs)
    assert "no num_experts_per_tok or num_experts_per_token or num_chosen_experts" in message
    assert "expected a value for num_experts_per_token" in message
    edit_json(folder / "config.json", num_chosen_experts=2)
    assert opened(folder).settings["num_experts_per_token"] == 2


def test_experts_are_counted_from_names_and_must_agree_with_a_key(tmp_path):
    folder = write_checkpoint(tmp_path / "a", "telechat_moe", settings=MIXTURE)
    edit_json(folder / "config.json", num_experts=None)
    assert opened(folder).num_experts == 4
    edit_json(folder / "config.json", num_experts=3)
    assert "local_experts.3.gate_proj.weight" in refusal(folder, IncompatibleInputs)
    edit_json(folder / "config.json", num_experts=5)
    assert "first missing transformer.h.0.mlp.local_experts.4" in refusal(folder, IncompatibleInputs)


def test_kinds_are_told_by_tensors_and_never_mixed(tmp_path):
    dense = write_checkpoint(tmp_path / "dense", "telechat", settings=MIXTURE)
    mixture = write_checkpoint(tmp_path / "mixture", "telechat_moe", settings=MIXTURE)
    assert [opened(folder).family.name for folder in (dense, mixture)] == ["telechat", "telechat_moe"]
    with pytest.raises(IncompatibleInputs, match="variant b: family is telechat_moe, expected telechat"):
        open_variants({"a": FolderRef(dense), "b": FolderRef(mixture)})
    both = {**load_file(dense / "model.safetensors"), **load_file(mixture / "model.safetensors")}
    save_file(both, dense / "model.safetensors", {"format": "pt"})
    message = refusal(dense, UnsupportedCheckpoint)
    assert "tensor names with several of .mlp.gate_proj. of TeleChat, TeleChat2" in message
    mixed = shutil.copytree(mixture, tmp_path / "none")
    edit_tensors(
        mixed / "model.safetensors", lambda tensors: [tensors.pop(n) for n in [*tensors] if ".mlp." in n]
    )
    assert "tensor names with none of" in refusal(mixed, UnsupportedCheckpoint)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"model_type": "telechat2"}, "model_type 'telechat2' is not supported"),
        ({"model_type": "telechat3"}, "model_type 'telechat3' is not supported"),
        ({"use_mup": True, "auto_map": CODE}, "use_mup = True is not part of telechat"),
        (
            {"apply_residual_connection_post_layernorm": True},
            "apply_residual_connection_post_layernorm = True",
        ),
        ({"logn": True}, "logn = True"),
        ({"embed_layernorm": True}, "word_embeddings_layernorm.weight"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_scaling.factor = 2.0, expected 1.0"),
        ({"rope_scaling": {"type": "yarn", "factor": 1.0}}, "rope_scaling.type = 'yarn'"),
        ({"training_seqlen": None}, "no training_seqlen"),
    ],
)
def test_what_is_not_described_is_refused(changes, told, tmp_path):
    folder = write_checkpoint(tmp_path / "a", "telechat", settings=SECOND)
    edit_json(folder / "config.json", **changes)
    assert told in refusal(folder)


def test_a_lone_pickle_tells_its_family_when_it_is_converted(tmp_path):
    folder = write_checkpoint(tmp_path / "a", "telechat_moe", settings=MIXTURE, weights="pickle")
    assert "pass --allow-pickle" in refusal(folder)
    variants = open_variants({"one": FolderRef(folder)}, allow_pickle=True, cache=tmp_path / "cache")
    assert variants.first.family.name == "telechat_moe"


def test_quantised_repositories_are_refused_though_their_config_says_nothing(tmp_path):
    folder = write_checkpoint(tmp_path / "a", "telechat", settings=SECOND)
    (folder / "quantize_config.json").write_text('{"bits": 4}')
    assert "quantize_config.json: quantised by GPTQ" in refusal(folder, UnsupportedCheckpoint)


@pytest.mark.parametrize("dtype", ["F16", "F32"])
def test_pickles_are_found_by_the_names_of_their_index(dtype, tmp_path):
    """The series writes an underscore where others have a hyphen."""
    folder = write_checkpoint(
        tmp_path / "a", "telechat", dtype=dtype, settings=SEVENTH, prefixed=False, weights="pickle",
        shard_bytes=20_000,
    )  # fmt: skip
    index = json.loads((folder / "pytorch_model.bin.index.json").read_text())
    renamed = {name: name.replace("model-", "model_") for name in set(index["weight_map"].values())}
    assert len(renamed) > 1
    for before, after in renamed.items():
        (folder / before).rename(folder / after)
    edit_json(
        folder / "pytorch_model.bin.index.json",
        weight_map={name: renamed[file] for name, file in index["weight_map"].items()},
    )
    variants = open_variants({"one": FolderRef(folder)}, allow_pickle=True, cache=tmp_path / "cache")
    plain = write_checkpoint(tmp_path / "b", "telechat", dtype=dtype, settings=SEVENTH)
    stored = variants.first
    assert stored.dtype_bytes().keys() == {dtype}
    assert stored.settings == opened(plain).settings
    assert stored.tensors.keys() == opened(plain).tensors.keys()
