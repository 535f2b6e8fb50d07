"""A variant's text side: what its files say."""

import pytest

from moemerge.bundle.reader import open_bundle
from moemerge.checkpoint.variants import open_variants
from moemerge.consolidation.pipeline import merge
from moemerge.consolidation.task import options_of
from moemerge.errors import InvalidRecipe, NotFound
from moemerge.refs import FolderRef
from moemerge.runner.sampling import Sampling
from moemerge.text.variants import BundleText, VariantText
from tests.factories import edit_json, write_checkpoint


@pytest.fixture(scope="module", params=["mixtral", "switch_transformers"])
def bundle(request, tmp_path_factory):
    """`plain` has no template and other settings than `tuned`."""
    folder = tmp_path_factory.mktemp("text")
    base = write_checkpoint(folder / "base", request.param, vocab=66)
    for seed, name in enumerate(("plain", "tuned"), start=1):
        write_checkpoint(folder / name, base=base, noise=0.1, seed=seed)
    (folder / "plain" / "chat_template.jinja").unlink(missing_ok=True)
    edit_json(folder / "plain" / "tokenizer_config.json", eos_token={"content": "<|im_end|>"})
    edit_json(folder / "plain" / "generation_config.json", do_sample=True, temperature=0.6, top_p=0.9)
    edit_json(folder / "tuned" / "generation_config.json", temperature=0.6)
    merge(
        open_variants({name: FolderRef(folder / name) for name in ("plain", "tuned")}),
        folder / "x.moe",
        options_of("1x", None),
    )
    return open_bundle(folder / "x.moe")


def test_context_ends_for_decoders_only(bundle):
    text = VariantText(bundle, "tuned")
    if text.is_encoder_decoder:
        assert (text.context_tokens, text.room(1000)) == (None, None)
        assert text.context_of_answer([3, 4]) == ()
    else:
        assert (text.context_tokens, text.room(100), text.room(1000)) == (128, 28, 0)
        assert text.context_of_answer([3, 4]) == [3, 4]


def test_tokens_follow_the_variants_tokenizer(bundle):
    text = VariantText(bundle, "tuned")
    ids = text.encode("a word")
    assert text.decode(ids) == "a word"
    assert set(ids) - set(text.encode("a word", add_special_tokens=False)) == {1}


def test_end_of_text_of_configuration_and_tokenizer_both_stop(bundle):
    end = 1 if VariantText(bundle, "tuned").is_encoder_decoder else 2
    assert VariantText(bundle, "tuned").stop_ids == {end}
    plain = VariantText(bundle, "plain")
    assert plain.stop_ids == {end, plain.tokenizer.id_of("<|im_end|>")}


def test_variant_without_template_says_so(bundle):
    with pytest.raises(NotFound, match="variant plain: has no chat template"):
        VariantText(bundle, "plain").encode_chat([{"role": "user", "content": "a"}])


def test_chat_is_encoded_as_the_template_writes_it(bundle):
    text = VariantText(bundle, "tuned")
    if text.is_encoder_decoder:
        return
    ids = text.encode_chat([{"role": "user", "content": "a"}])
    marker = text.tokenizer.id_of("<|im_start|>")
    assert [ids[0], ids.count(marker)] == [marker, 2]


def test_recommended_sampling_is_greedy_unless_the_files_say_otherwise(bundle):
    assert VariantText(bundle, "tuned").recommended() == Sampling()
    assert VariantText(bundle, "tuned").recommended(otherwise=1.0) == Sampling(temperature=1.0)
    assert VariantText(bundle, "plain").recommended() == Sampling(temperature=0.6, top_p=0.9)


def test_greedy_recommendation_keeps_its_penalty_and_nothing_that_truncates(bundle, tmp_path):
    text = VariantText(bundle, "plain")
    path = tmp_path / "generation_config.json"
    path.write_text('{"do_sample": false, "temperature": 0.3, "top_k": 5, "repetition_penalty": 1.03}')
    text._find = {"generation_config.json": path}.get
    assert text.recommended(otherwise=1.0) == Sampling(repetition_penalty=1.03)


def test_recommended_sampling_that_cannot_be_names_its_file(bundle, tmp_path):
    text = VariantText(bundle, "plain")
    path = tmp_path / "generation_config.json"
    path.write_text('{"do_sample": true, "top_p": 7}')
    text._find = {"generation_config.json": path}.get
    with pytest.raises(InvalidRecipe, match=r"variant plain: generation_config.json: top_p is 7"):
        text.recommended()


def test_variants_are_looked_up_once(bundle):
    texts = BundleText(bundle)
    assert texts.of("plain") is texts.of("plain")
    with pytest.raises(NotFound, match="plain, tuned"):
        texts.of("huge")
