"""Tied heads and copies: dropped only after their bytes were compared."""

import pytest
import torch

from moemerge.checkpoint.checkpoint import open_checkpoint
from moemerge.checkpoint.repository import LocalFolder
from moemerge.checkpoint.tensors import TensorReader
from moemerge.checkpoint.ties import resolve_ties
from moemerge.checkpoint.variants import open_variants
from moemerge.errors import IncompatibleInputs
from moemerge.refs import FolderRef
from tests.factories import edit_json, edit_tensors, write_checkpoint


def resolve(folder):
    with TensorReader() as reader:
        return resolve_ties(open_checkpoint(LocalFolder(folder)), reader)


@pytest.mark.parametrize("family", ["mixtral", "switch_transformers"])
def test_absent_head_of_a_tied_model_is_the_embedding(tmp_path, family):
    opened = resolve(write_checkpoint(tmp_path / "a", family, tied=True))
    assert "head" not in opened.tensors
    assert opened.settings["tied_head"] is True


@pytest.mark.parametrize("family", ["mixtral", "switch_transformers"])
def test_absent_head_of_an_untied_model_is_missing(tmp_path, family):
    folder = write_checkpoint(tmp_path / "a", family, tied=False)
    edit_tensors(folder / "model.safetensors", lambda t: t.pop("lm_head.weight"))
    with pytest.raises(IncompatibleInputs, match=r"first lm_head.weight \(untied head"):
        resolve(folder)


@pytest.mark.parametrize("family", ["mixtral", "switch_transformers"])
def test_equal_head_of_a_tied_model_is_dropped(tmp_path, family):
    opened = resolve(write_checkpoint(tmp_path / "a", family, tied=True, tied_copies=True))
    assert "head" not in opened.tensors
    assert opened.dropped["lm_head.weight"] == "copy of embedding"
    assert opened.settings["tied_head"] is True


@pytest.mark.parametrize("family", ["mixtral", "switch_transformers"])
def test_different_head_of_a_tied_model_needs_a_choice(tmp_path, family):
    folder = write_checkpoint(tmp_path / "a", family, tied=True, tied_copies=True)
    edit_tensors(folder / "model.safetensors", lambda t: t["lm_head.weight"].add_(1))
    with pytest.raises(IncompatibleInputs, match=r"lm_head.weight is declared tied") as caught:
        resolve(folder)
    for words in ("4.57 would drop it", "5.23 would use it", "tie_word_embeddings in config.json to false"):
        assert words in str(caught.value)
    edit_json(folder / "config.json", tie_word_embeddings=False)
    opened = resolve(folder)
    assert "head" in opened.tensors
    assert opened.settings["tied_head"] is False


def test_untied_head_that_happens_to_be_equal_is_kept(tmp_path):
    folder = write_checkpoint(tmp_path / "a", tied=True, tied_copies=True)
    edit_json(folder / "config.json", tie_word_embeddings=False)
    assert "head" in resolve(folder).tensors


def test_absent_key_means_the_class_default(tmp_path):
    folder = write_checkpoint(tmp_path / "a", "switch_transformers", tied_copies=True, generation="4")
    assert "tie_word_embeddings" not in (folder / "config.json").read_text()
    assert "head" not in resolve(folder).tensors
    edit_json(folder / "config.json", tie_word_embeddings=None)
    assert "head" not in resolve(folder).tensors


def test_all_tied_copies_of_switch_are_dropped(tmp_path):
    opened = resolve(write_checkpoint(tmp_path / "a", "switch_transformers", tied_copies=True))
    assert opened.dropped == dict.fromkeys(
        ["encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight"], "copy of embedding"
    )
    plain = resolve(write_checkpoint(tmp_path / "b", "switch_transformers"))
    assert opened.tensors.keys() == plain.tensors.keys()


@pytest.mark.parametrize("name", ["encoder.embed_tokens.weight", "decoder.embed_tokens.weight"])
def test_copy_that_is_none_is_refused(tmp_path, name):
    folder = write_checkpoint(tmp_path / "a", "switch_transformers", tied_copies=True)
    edit_tensors(folder / "model.safetensors", lambda t: t[name].add_(1))
    with pytest.raises(IncompatibleInputs, match=f"{name} is declared tied to shared.weight but differs"):
        resolve(folder)


def test_copy_without_its_original_reports_the_original(tmp_path):
    folder = write_checkpoint(tmp_path / "a", "switch_transformers", tied_copies=True)
    edit_tensors(folder / "model.safetensors", lambda t: t.pop("shared.weight"))
    with pytest.raises(IncompatibleInputs, match=r"first shared\.weight"):
        resolve(folder)


def test_variants_with_and_without_the_copy_go_together(tmp_path):
    plain = write_checkpoint(tmp_path / "a", tied=True)
    copied = write_checkpoint(tmp_path / "b", tied=True, tied_copies=True)
    opened = open_variants({"a": FolderRef(plain), "b": FolderRef(copied)})
    assert [variant.tensors.keys() for variant in opened.variants.values()] == [
        opened.first.tensors.keys()
    ] * 2


def test_tied_and_untied_variants_do_not_go_together(tmp_path):
    tied = write_checkpoint(tmp_path / "a", tied=True)
    untied = write_checkpoint(tmp_path / "b", tied=False)
    with pytest.raises(IncompatibleInputs, match="tied_head is False, expected True as in a"):
        open_variants({"a": FolderRef(tied), "b": FolderRef(untied)})


def test_negative_zero_is_not_the_same_bytes(tmp_path):
    folder = write_checkpoint(tmp_path / "a", tied=True, tied_copies=True)

    def edit(tensors):
        tensors["model.embed_tokens.weight"][0, 0] = 0.0
        tensors["lm_head.weight"][0, 0] = torch.tensor(-0.0)

    edit_tensors(folder / "model.safetensors", edit)
    with pytest.raises(IncompatibleInputs, match="differs from it"):
        resolve(folder)
