"""Text and logits from a bundle against transformers, in float32: greedy tokens equal one for one."""

import pytest
import torch
import transformers

from moemerge.bundle.export import export_variant
from moemerge.bundle.reader import open_bundle
from moemerge.checkpoint.variants import open_variants
from moemerge.consolidation.pipeline import merge
from moemerge.consolidation.recipe import options_of
from moemerge.models import Decoder
from moemerge.refs import FolderRef
from moemerge.runner.engine import Engine
from moemerge.runner.sampling import Sampling
from tests.factories import write_siblings

CASES = [("mixtral", "per_expert"), ("mixtral", "stacked"), ("switch_transformers", "per_expert")]
NAMES = ("code", "law", "sums")
PROMPTS = ([5, 9, 33, 12], [60, 3, 3, 41, 18, 22, 9, 50, 31])
MAX_TOKENS = 16
TOLERANCE = 1e-4


@pytest.fixture(scope="module", params=CASES, ids="-".join)
def family(request, tmp_path_factory):
    name, layout = request.param
    folder = tmp_path_factory.mktemp("family")
    write_siblings(folder, name, names=NAMES, dtype="F32", noise=0.3, layout=layout)
    return folder


@pytest.fixture(scope="module", params=["exact", "1x"])
def bundle(request, family):
    target = family / f"{request.param}.moe"
    variants = open_variants({name: FolderRef(family / name) for name in NAMES})
    merge(variants, target, options_of(request.param, None, within=False))
    return target


def load_reference(folder):
    """The model as transformers computes it."""
    config = transformers.AutoConfig.from_pretrained(folder)
    is_pair = config.is_encoder_decoder
    kind = transformers.AutoModelForSeq2SeqLM if is_pair else transformers.AutoModelForCausalLM
    model = kind.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    # Of random weights ends nothing; both sides get the same number of tokens.
    model.generation_config.eos_token_id = None
    return model


def reference_tokens(model, prompt):
    ids = model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        max_new_tokens=MAX_TOKENS,
        do_sample=False,
        pad_token_id=0,
    )[0].tolist()
    return ids[1:] if model.config.is_encoder_decoder else ids[len(prompt) :]


def reference_logits(model, prompt, answer):
    """Logits at every position of the answer."""
    with torch.no_grad():
        if model.config.is_encoder_decoder:
            decoded = torch.tensor([[model.config.decoder_start_token_id, *answer]])
            return model(input_ids=torch.tensor([prompt]), decoder_input_ids=decoded).logits[0]
        return model(input_ids=torch.tensor([prompt + answer])).logits[0]


def engine_logits(engine, prompt, answer):
    model = engine.model
    if isinstance(model, Decoder):
        return model.forward(torch.tensor([prompt + answer]))[0]
    decoded = torch.tensor([[model.config.start_token_id, *answer]])
    return model.decode(decoded, model.new_cache(), model.encode(torch.tensor([prompt])))[0]


def engine_tokens(engine, prompt):
    return list(engine.generate(prompt, max_tokens=MAX_TOKENS, sampling=Sampling()))


def test_greedy_tokens_and_logits_equal_transformers(family, bundle, tmp_path):
    """An exact bundle against the sources, a smaller one against what it exports."""
    opened = open_bundle(bundle)
    engine = Engine(opened, dtype="float32")
    for name in NAMES:
        folder = family / name
        if bundle.name != "exact.moe":
            folder = tmp_path / name
            export_variant(opened, name, folder)
        reference = load_reference(folder)
        engine.switch(name)
        for prompt in PROMPTS:
            expected = reference_tokens(reference, prompt)
            assert engine_tokens(engine, prompt) == expected
            torch.testing.assert_close(
                engine_logits(engine, prompt, expected),
                reference_logits(reference, prompt, expected),
                atol=TOLERANCE,
                rtol=0,
            )


def test_variants_answer_differently(bundle):
    engine = Engine(open_bundle(bundle), dtype="float32")
    answers = set()
    for name in NAMES:
        engine.switch(name)
        answers.add(tuple(engine_tokens(engine, PROMPTS[0])))
    assert len(answers) == len(NAMES)


def test_export_of_an_exact_bundle_loads_with_equal_logits(family, tmp_path):
    variants = open_variants({name: FolderRef(family / name) for name in NAMES})
    merge(variants, tmp_path / "exact.moe", options_of("exact", None, within=False))
    for name in NAMES:
        # Small files, so that the index is used as well.
        export_variant(open_bundle(tmp_path / "exact.moe"), name, tmp_path / name, shard_bytes=50_000)
        assert (tmp_path / name / "model.safetensors.index.json").is_file()
        before, after = load_reference(family / name), load_reference(tmp_path / name)
        expected, found = before.state_dict(), after.state_dict()
        assert expected.keys() == found.keys()
        assert all(torch.equal(expected[key], found[key]) for key in expected)
        torch.testing.assert_close(
            reference_logits(before, PROMPTS[1], PROMPTS[1]),
            reference_logits(after, PROMPTS[1], PROMPTS[1]),
            atol=1e-6,
            rtol=0,
        )
