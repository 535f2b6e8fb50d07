"""A bundle with codes and residuals against a checkpoint of what it exports: the same model."""

import random
from typing import NamedTuple

import pytest
import torch
import transformers

from moemerge.bundle.export import export_variant
from moemerge.bundle.reader import Bundle, open_bundle
from moemerge.bundle.verify import verify_bundle
from moemerge.checkpoint.variants import open_variants
from moemerge.consolidation.pipeline import merge
from moemerge.consolidation.task import options_of
from moemerge.refs import FolderRef
from moemerge.runner.request import Request
from moemerge.runner.weights import WeightStore
from tests.bundles import NAMES, VOCABULARIES, open_engine, run, write_bundle
from tests.coded import bits, low_rank, write_coded

TOLERANCE = {"atol": 1e-5, "rtol": 1e-5}
"""In float32 both compute with the same numbers; only products may add up in another order."""
BF16_TOLERANCE = 0.1
"""Of log-probabilities; products with codes round elsewhere than products with what they stand for."""
BF16_SHARE = 0.95
"""Of the tokens that are within it; for the others rounding has chosen another expert."""
MAX_TOKENS = 10
MARGIN = 1e-4
"""Answers in which two tokens are closer than this are not compared: rounding may choose either."""
POOLS = {
    "plain": [None],
    "8 bits": [bits(8)],
    "6 bits": [bits(6, 32)],
    "5 bits": [bits(5, 16)],
    "4 bits": [bits(4, 32)],
    "3 bits": [bits(3, 20)],
    "all kinds": [bits(8), None, bits(4, 32), bits(5, 64), bits(8, 16), bits(3, 32), bits(6)],
}
RESIDUALS = {
    "none": [None],
    "1 bit": [bits(1, 16)],
    "2 bits": [bits(2, 16)],
    "3 bits": [bits(3, 32)],
    "4 bits": [bits(4)],
    "low rank": [low_rank(3)],
    "all kinds": [None, bits(2, 16), low_rank(2), None, bits(1), bits(4, 32), bits(3, 8)],
}
PAIRS = [
    *((pool, "none") for pool in POOLS),
    *(("plain", residual) for residual in RESIDUALS if residual != "none"),
    *(("all kinds", residual) for residual in RESIDUALS if residual != "none"),
    ("4 bits", "2 bits"),
    ("8 bits", "low rank"),
]


class Coded(NamedTuple):
    """A coded bundle and the exact bundle of its export."""

    bundle: Bundle
    exported: Bundle


@pytest.fixture(scope="module", params=["mixtral", "switch_transformers"])
def source(request, tmp_path_factory):
    return open_bundle(write_bundle(tmp_path_factory.mktemp("source"), request.param))


@pytest.fixture(scope="module")
def half_source(tmp_path_factory):
    return open_bundle(write_bundle(tmp_path_factory.mktemp("half"), dtype="BF16"))


def code_bundle(source, folder, pool, residual) -> Coded:
    bundle = write_coded(source, folder / "x.moe", pool=POOLS[pool], residuals=RESIDUALS[residual])
    verify_bundle(bundle.folder)
    for name in NAMES:
        export_variant(bundle, name, folder / name)
    variants = open_variants({name: FolderRef(folder / name) for name in NAMES})
    merge(variants, folder / "export.moe", options_of("exact", None, within=False))
    return Coded(bundle, open_bundle(folder / "export.moe"))


@pytest.fixture(params=PAIRS, ids=lambda pair: f"pool {pair[0]}, residuals {pair[1]}")
def coded(request, source, tmp_path):
    return code_bundle(source, tmp_path, *request.param)


def prompts(name, seed=0):
    generator = random.Random(f"{name}{seed}")
    lengths = (1, 5, 12)
    return [tuple(generator.randrange(3, VOCABULARIES[name]) for _ in range(n)) for n in lengths]


def requests(**options):
    """Prompts of all variants, to be computed together."""
    return [
        Request(request_id=f"{name}-{n}", variant=name, prompt_ids=prompt, max_tokens=MAX_TOKENS, **options)
        for name in NAMES
        for n, prompt in enumerate(prompts(name))
    ]


def is_clear(answer):
    """No token of the answer was chosen by a hair."""
    best = [sorted((p for _, p in token.top), reverse=True)[:2] for token in answer.logprobs]
    return all(first - second > MARGIN for first, second in best)


def test_mixed_batches_answer_as_the_export_does(coded):
    engines = [open_engine(bundle) for bundle in coded]
    asked = requests(num_logprobs=2)
    together, exported = (run(engine, *asked) for engine in engines)
    clear = 0
    for ours, theirs in zip(together, exported, strict=True):
        if is_clear(theirs):
            clear += 1
            assert ours.tokens == theirs.tokens
            for one, other in zip(ours.logprobs, theirs.logprobs, strict=True):
                assert abs(one.logprob - other.logprob) < 1e-4
    assert clear > len(asked) // 2
    for request, answer in zip(asked, exported, strict=True):
        if is_clear(answer):
            alone = engines[0].generate(request.variant, request.prompt_ids, max_tokens=MAX_TOKENS)
            assert list(alone) == answer.tokens
    for engine in engines:
        engine.verify_integrity()
        engine.close()


def test_logits_are_those_of_the_export(coded):
    if coded.bundle.manifest.family != "mixtral":
        pytest.skip("logits of a text are for decoder-only models")
    engines = [open_engine(bundle) for bundle in coded]
    for name in NAMES:
        ids = torch.tensor([prompts(name)[2], prompts(name, 1)[2]])
        ours, theirs = (engine.logits(name, ids) for engine in engines)
        torch.testing.assert_close(ours, theirs, **TOLERANCE)
    for engine in engines:
        engine.close()


def test_an_exported_variant_is_the_one_that_transformers_loads(source, tmp_path):
    if source.manifest.family != "mixtral":
        pytest.skip("its logits are compared as those of a text")
    coded = code_bundle(source, tmp_path, "all kinds", "all kinds")
    engine = open_engine(coded.bundle)
    for name in NAMES:
        model = transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path / name, dtype=torch.float32, attn_implementation="eager"
        ).eval()
        ids = torch.tensor([prompts(name)[2]])
        with torch.no_grad():
            expected = model(input_ids=ids).logits
        torch.testing.assert_close(engine.logits(name, ids), expected, atol=1e-4, rtol=1e-4)
    engine.close()


@pytest.mark.parametrize("pack", [True, False])
@pytest.mark.parametrize(("pool", "residual"), [("8 bits", "none"), ("all kinds", "all kinds")])
def test_in_bf16_log_probabilities_agree_within_rounding(pool, residual, pack, half_source, tmp_path):
    coded = code_bundle(half_source, tmp_path, pool, residual)
    engines = [open_engine(bundle, pack=pack) for bundle in coded]
    assert {engine.dtype for engine in engines} == {torch.bfloat16}
    differences = []
    for name in NAMES:
        ids = torch.tensor([prompts(name, seed)[2] for seed in range(8)])
        ours, theirs = (engine.logits(name, ids).float().log_softmax(-1) for engine in engines)
        differences.append((ours - theirs).abs().amax(-1).flatten())
    within = (torch.cat(differences) <= BF16_TOLERANCE).float().mean()
    assert within >= BF16_SHARE
    for engine in engines:
        engine.close()


def test_one_variant_at_a_time_over_a_small_arena_answers_the_same(source, tmp_path):
    coded = code_bundle(source, tmp_path, "all kinds", "all kinds")
    usual = open_engine(coded.bundle)
    store = WeightStore(coded.bundle, NAMES, torch.float32, torch.device("cpu"))
    memory = max(store.set_bytes([name]) for name in NAMES) + 2**18 + usual.snapshot().pool_bytes // 2
    small = open_engine(coded.bundle, resident="1", min_hold_s=0.0, device_memory=memory, cache_memory=2**18)
    ours, theirs = run(small, *requests()), run(usual, *requests())
    assert [answer.tokens for answer in ours] == [answer.tokens for answer in theirs]
    assert small.snapshot().expert_misses > 0
    assert small.snapshot().expert_hits > 0
    small.verify_integrity()
    for engine in (small, usual):
        engine.close()
