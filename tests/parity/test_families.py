"""Every family on tiny checkpoints: its forward pass, its layouts, and bundles of its variants.

Checkpoints are written from the descriptions; transformers reads them and says what is right, or a plain
implementation for TeleChat, which it does not know.
"""

import json
import random

import pytest
import torch
import transformers
from safetensors.torch import load_file

from moemerge.bundle.export import export_variant
from moemerge.bundle.reader import open_bundle
from moemerge.bundle.verify import verify_bundle
from moemerge.calibration.texts import Passage
from moemerge.checkpoint.checkpoint import open_checkpoint
from moemerge.checkpoint.family import load_families
from moemerge.checkpoint.repository import LocalFolder
from moemerge.checkpoint.variants import open_variants
from moemerge.consolidation.pipeline import merge
from moemerge.consolidation.task import options_of
from moemerge.evaluation.loading import load_model
from moemerge.evaluation.reading import predict
from moemerge.refs import FolderRef
from moemerge.runner.request import Request
from tests.bundles import open_engine, run
from tests.factories import read_canonical, write_checkpoint, write_siblings
from tests.parity.telechat_reference import TelechatReference

LLAMA3 = {
    "rope_type": "llama3",
    "rope_factor": 8.0,
    "rope_low_frequency_factor": 1.0,
    "rope_high_frequency_factor": 4.0,
    "rope_original_positions": 32,
}
GRANITE = {
    "embedding_factor": 12.0,
    "residual_factor": 0.22,
    "attention_scale": 0.25,
    "logits_divisor": 0.5,
}
YARN = {
    "rope_type": "yarn",
    "rope_factor": 4.0,
    "rope_original_positions": 32,
    "rope_mscale": 0.707,
    "rope_mscale_all": 0.9,
}
LONGROPE = {
    "rope_type": "longrope",
    "rope_short_factors": "[1.0, 1.1, 1.5, 2.0]",
    "rope_long_factors": "[1.0, 2.0, 4.0, 8.0]",
    "rope_table_factor": 1.25,
    "rope_long_table_factor": 1.5,
}
RENORMALISED = {"routing": "softmax_topk_renormalised"}
CASES = {
    "dbrx": [{"projection_clip": 8.0}, {"projection_clip": 0.5, "rope_theta": 500.0, "stated_theta": 500.0}],
    "deepseek_v2": [
        {"num_kv_heads": 4},
        {"num_kv_heads": 4, "first_routed": 1, "num_layers": 3, "routed_factor": 2.5, **YARN},
    ],
    "gpt_oss": [
        {"layer_types": '["full_attention", "full_attention"]', **YARN, "rope_is_truncated": False},
        {
            "layer_types": '["sliding_attention", "full_attention"]',
            "sliding_window": 5,
            "rope_type": "default",
        },
    ],
    "granitemoe": [{}, GRANITE],
    "llama": [{}, LLAMA3, {"rope_type": "linear", "rope_factor": 4.0}, {"attention_bias": True}],
    "mistral": [{}, {"sliding_window": 5, "head_size": 12}],
    "mixtral": [{}, {"sliding_window": 5, "head_size": 12}],
    "telechat": [
        {"num_kv_heads": 4, "rope_base_length": None, "rope_trained_length": 8192},
        {"tied_head": False, "num_kv_heads": 4, "rope_base_length": None, "rope_trained_length": 8192},
        {"tied_head": False, "has_embedding_norm": True, "rope_theta": 500.0},
        {"tied_head": False, "num_kv_heads": 1},
    ],
    "telechat_moe": [{"tied_head": False, "num_kv_heads": 4}],
    "olmoe": [{}, RENORMALISED, {"projection_clip": 0.5}],
    "phimoe": [{}, {"attention_bias": True, "has_head_bias": True, "num_experts": 6, **LONGROPE}],
    "qwen2": [{}, {**YARN, "rope_mscale": None, "rope_mscale_all": None}],
    "qwen2_moe": [{}, {"has_qkv_bias": False, "dense_layers": "[0]"}, RENORMALISED],
    "qwen3": [{}, {"head_size": 12}],
    "qwen3_moe": [
        {},
        {"sparse_step": 2, "num_layers": 3},
        {"head_size": 12, "dense_layers": "[0]", **RENORMALISED},
    ],
}
"""Settings that reach all that a description can say; keys of config.json that stand for several by name."""
SEVERAL = {
    "attention_bias": ("has_qkv_bias", "has_output_bias"),
    "rope_trained_length": ("rope_trained_length", "max_positions"),
}
FAMILIES = tuple(CASES)
"""Decoder-only; what is special about Switch has tests of its own."""
LAYOUTS = [
    pytest.param(name, layout.name, id=f"{name}-{layout.name}")
    for name in FAMILIES
    for layout in load_families()[name].experts.layouts
]
NAMES = ("code", "law", "sums")
TOLERANCE = 1e-4
MAX_TOKENS = 6
NO_TIGHTER = 100
"""A stated figure is at most so many times what is measured: here, or on a machine that rounds otherwise."""


def settings_of(case):
    return {name: value for key, value in case.items() for name in SEVERAL.get(key, (key,))}


def load_reference(folder):
    if json.loads((folder / "config.json").read_text())["model_type"] == "telechat":
        return TelechatReference(folder)
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()


@torch.no_grad()
def reference_logits(model, tokens):
    return model(torch.tensor([tokens]), use_cache=False).logits[0]


def random_tokens(count, seed=0):
    return random.Random(seed).choices(range(3, 60), k=count)


def difference(folder, tokens):
    """Largest difference of logits between the checkpoint here and in transformers."""
    expected = reference_logits(load_reference(folder), tokens)
    assert expected.std() > 0.5, "the reference says nothing, so agreeing with it proves nothing"
    found = load_model(open_checkpoint(LocalFolder(folder))).forward(torch.tensor([tokens]))[0]
    return float((found - expected).abs().max())


def pair_difference(folder, source, target):
    """`difference` of an encoder-decoder that is told the target."""
    model = transformers.AutoModelForSeq2SeqLM.from_pretrained(folder, dtype=torch.float32).eval()
    decoded = [model.config.decoder_start_token_id, *target[:-1]]
    with torch.no_grad():
        expected = model(torch.tensor([source]), decoder_input_ids=torch.tensor([decoded])).logits[0]
    own = load_model(open_checkpoint(LocalFolder(folder)))
    found = predict(own, [Passage(tuple(source), tuple(target))]).logits_WV
    return float((found - expected).abs().max())


def test_every_family_is_compared():
    assert {*FAMILIES, "switch_transformers"} == set(load_families())


@pytest.mark.parametrize("name", load_families())
def test_logits_differ_by_no_more_than_the_description_states(name, tmp_path):
    measured = []
    for number, case in enumerate(CASES.get(name, [{}])):
        folder = write_checkpoint(tmp_path / str(number), name, dtype="F32", settings=settings_of(case))
        if name in FAMILIES:
            measured.append(difference(folder, random_tokens(40)))
        else:
            measured.append(pair_difference(folder, random_tokens(40), random_tokens(30, 1)))
    stated = load_families()[name].parity
    assert max(measured) <= stated <= TOLERANCE
    assert stated <= NO_TIGHTER * max(measured), f"measured {max(measured)}: state less"


@pytest.mark.parametrize(("name", "layout"), LAYOUTS)
def test_layouts_hold_the_same_experts(name, layout, tmp_path):
    settings = settings_of(CASES[name][0])
    first = write_checkpoint(tmp_path / "first", name, dtype="F32", settings=settings)
    other = write_checkpoint(tmp_path / "other", name, dtype="F32", settings=settings, layout=layout)
    expected, found = read_canonical(first), read_canonical(other)
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[key], found[key]) for key in expected)
    assert difference(other, random_tokens(12)) <= load_families()[name].parity


@pytest.fixture(scope="module", params=FAMILIES)
def variants(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    settings = settings_of(CASES[request.param][-1])
    write_siblings(folder, request.param, names=NAMES, dtype="F32", noise=0.3, settings=settings)
    return {name: folder / name for name in NAMES}


def merge_variants(folders, target, budget, policy=None):
    opened = open_variants({name: FolderRef(path) for name, path in folders.items()})
    merge(opened, target, options_of(budget, policy))
    verify_bundle(target)
    return open_bundle(target)


def export_all(bundle, target):
    for name in NAMES:
        export_variant(bundle, name, target / name, shard_bytes=50_000)
    return {name: target / name for name in NAMES}


def test_exact_bundle_exports_what_went_in_and_answers_as_it(variants, tmp_path):
    bundle = merge_variants(variants, tmp_path / "x.moe", "exact")
    for name, exported in export_all(bundle, tmp_path / "out").items():
        before, after = read_tensors(variants[name]), read_tensors(exported)
        assert before.keys() == after.keys()
        assert all(torch.equal(before[key], after[key]) for key in before)
        load_reference(exported)
    check_answers(bundle, variants)


@pytest.mark.parametrize(("budget", "policy"), [("1x", "cluster"), ("1.25x", "measured")])
def test_smaller_bundle_answers_as_what_it_exports(budget, policy, variants, tmp_path):
    bundle = merge_variants(variants, tmp_path / "x.moe", budget, policy)
    check_answers(bundle, export_all(bundle, tmp_path / "out"))


def read_tensors(folder):
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def check_answers(bundle, folders):
    """Of all variants in mixed batches, prompts in pieces, keys in small blocks, each as its model alone."""
    engine = open_engine(bundle, dtype="float32", block_tokens=4, max_step_tokens=7)
    requests = [
        Request(
            request_id=f"{name} {length}",
            variant=name,
            prompt_ids=tuple(random_tokens(length, length)),
            max_tokens=MAX_TOKENS,
            num_logprobs=3,
        )
        for length in (1, 9, 13)
        for name in NAMES
    ]
    engine.preload()
    answers = run(engine, *requests)
    assert engine.snapshot().steps.mixed > 0
    engine.close()
    for name, folder in folders.items():
        model = load_reference(folder)
        for request, answer in zip(requests, answers, strict=True):
            if request.variant == name:
                assert len(answer.logprobs) == MAX_TOKENS
                rows = reference_logits(model, [*request.prompt_ids, *answer.tokens]).log_softmax(-1)
                for told, row in zip(answer.logprobs, rows[len(request.prompt_ids) - 1 :], strict=False):
                    for token, value in [(told.token_id, told.logprob), *told.top]:
                        assert value == pytest.approx(row[token].item(), abs=TOLERANCE)
