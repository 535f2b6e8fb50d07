"""Answers from a bundle against transformers: greedy tokens equal one for one, alone and in any company."""

import random
from typing import NamedTuple

import pytest
import torch
import transformers

from moemerge.bundle.export import export_variant
from moemerge.bundle.reader import open_bundle
from moemerge.checkpoint.variants import open_variants
from moemerge.consolidation.pipeline import merge
from moemerge.consolidation.task import options_of
from moemerge.errors import UnsupportedCheckpoint
from moemerge.models.geometry import cache_geometry
from moemerge.refs import FolderRef
from moemerge.runner.forward import model_of
from moemerge.runner.policies import Policy
from moemerge.runner.request import FinishReason, Request
from tests.bundles import NAMES, VOCABULARIES, open_engine, write_family
from tests.factories import write_siblings

FAMILIES = ("mixtral", "switch_transformers")
LAYOUTS = (("mixtral", "per_expert"), ("mixtral", "stacked"), ("switch_transformers", "per_expert"))
POLICIES = tuple(policy.value for policy in Policy)
PROMPT_LENGTHS = (1, 4, 9, 17, 24)
MAX_TOKENS = 16
TOLERANCE = 1e-4
MARGIN = 5e-4
"""Prompts whose answer has two tokens closer than this are not asked: rounding may choose either."""
BF16_TOLERANCE = 0.1
"""Of log-probabilities; bf16 keeps 8 bits, and two implementations round at different places."""
BF16_SHARE = 0.95
"""Of the tokens that are within it; for the others rounding has chosen another expert."""
BLOCK_TOKENS = 4
NUM_BLOCKS = 14
"""Of the small cache: one longest request (24 + 16 tokens, source and target apart) takes 11."""


class Reference(NamedTuple):
    """What transformers makes of a variant."""

    answers: dict[tuple[int, ...], tuple[int, ...]]
    logprobs: dict[tuple[int, ...], torch.Tensor]


class Served(NamedTuple):
    bundle: object
    references: dict[str, Reference]

    @property
    def is_decoder(self):
        return self.bundle.manifest.family == "mixtral"

    def small_cache(self):
        geometry = cache_geometry(model_of(self.bundle, NAMES[0]), BLOCK_TOKENS)
        return NUM_BLOCKS * geometry.block_bytes(torch.float32)


def load_reference(folder, dtype=torch.float32):
    """The model as transformers computes it."""
    config = transformers.AutoConfig.from_pretrained(folder)
    is_pair = config.is_encoder_decoder
    kind = transformers.AutoModelForSeq2SeqLM if is_pair else transformers.AutoModelForCausalLM
    model = kind.from_pretrained(folder, dtype=dtype, attn_implementation="eager").eval()
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
    return tuple(ids[1:] if model.config.is_encoder_decoder else ids[len(prompt) :])


def reference_logits(model, prompt, answer):
    """Logits of the answer's tokens, and of a decoder-only model those of the prompt before them."""
    with torch.no_grad():
        if model.config.is_encoder_decoder:
            decoded = torch.tensor([[model.config.decoder_start_token_id, *answer[:-1]]])
            return model(input_ids=torch.tensor([prompt]), decoder_input_ids=decoded).logits[0].float()
        return model(input_ids=torch.tensor([[*prompt, *answer[:-1]]])).logits[0].float()


def refer(folder, vocab):
    """Prompts of several lengths that have one answer, and that answer."""
    model = load_reference(folder)
    generator = random.Random(vocab)
    answers, logprobs = {}, {}
    for length in PROMPT_LENGTHS:
        while True:
            prompt = tuple(generator.randrange(3, vocab) for _ in range(length))
            answer = reference_tokens(model, prompt)
            logits = reference_logits(model, prompt, answer)
            best = logits[-MAX_TOKENS:].topk(2).values
            if (best[:, 0] - best[:, 1]).min() > MARGIN:
                break
        answers[prompt], logprobs[prompt] = answer, logits.log_softmax(-1)
    return Reference(answers, logprobs)


def merge_family(folders, target, budget):
    merge(
        open_variants({name: FolderRef(path) for name, path in folders.items()}),
        target,
        options_of(budget, None, within=False),
    )
    return open_bundle(target)


@pytest.fixture(scope="module", params=FAMILIES)
def folders(request, tmp_path_factory):
    return write_family(tmp_path_factory.mktemp("family"), request.param)


@pytest.fixture(scope="module", params=["exact", "1x"])
def served(request, folders, tmp_path_factory):
    """An exact bundle beside its sources, a smaller one beside what it exports."""
    target = tmp_path_factory.mktemp("served")
    bundle = merge_family(folders, target / "x.moe", request.param)
    references = {}
    for name in NAMES:
        folder = folders[name]
        if request.param != "exact":
            folder = target / name
            export_variant(bundle, name, folder)
        references[name] = refer(folder, VOCABULARIES[name])
    return Served(bundle, references)


def test_every_variant_alone_answers_as_transformers(served):
    engine = open_engine(served.bundle, dtype="float32")
    for name, reference in served.references.items():
        for prompt, answer in reference.answers.items():
            assert tuple(engine.generate(name, prompt, max_tokens=MAX_TOKENS)) == answer
            stop = answer[MAX_TOKENS // 2]
            stopped = engine.generate(name, prompt, max_tokens=MAX_TOKENS, stop_ids=frozenset({stop}))
            assert tuple(stopped) == answer[: answer.index(stop)]
    engine.verify_integrity()
    engine.close()


def test_variants_answer_differently(served):
    engine = open_engine(served.bundle, dtype="float32")
    answers = {tuple(engine.generate(name, (5, 9, 33, 12), max_tokens=MAX_TOKENS)) for name in NAMES}
    assert len(answers) == len(NAMES)
    engine.close()


def test_logits_of_a_text_are_those_of_transformers(served):
    engine = open_engine(served.bundle, dtype="float32")
    for name, reference in served.references.items():
        if not served.is_decoder:
            with pytest.raises(UnsupportedCheckpoint, match="decoder-only"):
                engine.logits(name, torch.tensor([[5, 9]]))
            continue
        for prompt, answer in reference.answers.items():
            logits = engine.logits(name, torch.tensor([[*prompt, *answer[:-1]]]))[0]
            torch.testing.assert_close(
                logits.log_softmax(-1), reference.logprobs[prompt], atol=TOLERANCE, rtol=0
            )
    engine.close()


class Crowd:
    """Requests of all variants that come, stop, run full or are cancelled at random moments."""

    def __init__(self, served, engine, seed, size=24):
        self.served = served
        self.engine = engine
        self.random = random.Random(seed)
        self.requests = [self.draw(number) for number in range(size)]
        self.cancelled = set(self.random.sample([r.request_id for r in self.requests], size // 6))
        self.outputs = {request.request_id: [] for request in self.requests}

    def draw(self, number):
        name = self.random.choice(NAMES)
        answers = self.served.references[name].answers
        prompt = self.random.choice(list(answers))
        can_stop = self.random.random() < 0.25
        tells = self.random.random() < 0.5
        return Request(
            request_id=str(number),
            variant=name,
            prompt_ids=prompt,
            max_tokens=self.random.randint(1, MAX_TOKENS),
            stop_ids=frozenset({self.random.choice(answers[prompt])} if can_stop else ()),
            num_logprobs=3 if tells else None,
            num_prompt_logprobs=3 if tells and self.served.is_decoder else None,
        )

    def run(self):
        to_come, to_cancel = list(self.requests), set(self.cancelled)
        while to_come or self.engine.has_work:
            for _ in range(self.random.randint(0, 3)):
                if to_come:
                    self.engine.submit(to_come.pop(0))
            begun = [i for i in to_cancel if self.outputs[i] or self.random.random() < 0.02]
            for request_id in begun:
                self.engine.cancel(request_id)
            to_cancel -= set(begun) - {request.request_id for request in to_come}
            for output in self.engine.step():
                self.outputs[output.request_id].append(output)
            self.engine.verify_integrity()

    def verify(self):
        for request in self.requests:
            outputs = self.outputs[request.request_id]
            assert [output.finish is not None for output in outputs] == [False] * (len(outputs) - 1) + [True]
            tokens = tuple(token for output in outputs for token in output.token_ids)
            expected, finish = self.expected(request)
            if outputs[-1].finish is FinishReason.CANCELLED:
                assert request.request_id in self.cancelled
                assert tokens == expected[: len(tokens)]
            else:
                assert (tokens, outputs[-1].finish) == (expected, finish)
            self.verify_logprobs(request, outputs, tokens)

    def expected(self, request):
        answer = self.served.references[request.variant].answers[request.prompt_ids][: request.max_tokens]
        end = next((n for n, token in enumerate(answer) if token in request.stop_ids), None)
        return (answer, FinishReason.LENGTH) if end is None else (answer[:end], FinishReason.STOP)

    def verify_logprobs(self, request, outputs, tokens):
        reference = self.served.references[request.variant].logprobs[request.prompt_ids]
        told = [logprob for output in outputs for logprob in output.logprobs]
        if request.num_logprobs is None:
            assert told == []
            return
        assert tuple(logprob.token_id for logprob in told) == tokens
        for logprob, row in zip(told, reference[-MAX_TOKENS:], strict=False):
            assert_logprob(logprob, row)
        prompts = [output.prompt_logprobs for output in outputs if output.prompt_logprobs is not None]
        if request.num_prompt_logprobs is None or not tokens:
            return
        [(first, *rest)] = prompts
        assert first is None
        assert tuple(logprob.token_id for logprob in rest) == request.prompt_ids[1:]
        for logprob, row in zip(rest, reference, strict=False):
            assert_logprob(logprob, row)


def assert_logprob(logprob, row, tolerance=TOLERANCE):
    """It is that token's in a row [Vo] of the reference, and so are those of the likeliest."""
    assert logprob.logprob == pytest.approx(row[logprob.token_id].item(), abs=tolerance)
    for (token, value), best in zip(logprob.top, row.topk(len(logprob.top)).values, strict=True):
        assert value == pytest.approx(row[token].item(), abs=tolerance)
        assert value == pytest.approx(best.item(), abs=tolerance)


@pytest.mark.parametrize("resident", ["all", "1", "2"])
@pytest.mark.parametrize("policy", POLICIES)
def test_no_company_changes_an_answer(served, policy, resident):
    """Not other variants, a cache too small, prompts in pieces, evictions nor cancellations."""
    engine = open_engine(
        served.bundle,
        dtype="float32",
        policy=policy,
        resident=resident,
        cache_memory=served.small_cache(),
        block_tokens=BLOCK_TOKENS,
        max_batch=5,
        max_step_tokens=6,
        quantum_s=0.01,
        patience_s=0.01,
        min_hold_s=0.0,
        drain_s=0.0,
    )
    for seed in range(2):
        crowd = Crowd(served, engine, seed)
        crowd.run()
        crowd.verify()
    snapshot = engine.snapshot()
    assert snapshot.blocks_used == 0
    assert sum(state.figures.finished["cancelled"] for state in snapshot.variants.values()) > 0
    if policy != "fcfs":
        assert sum(state.figures.preemptions for state in snapshot.variants.values()) > 0
    if resident != "all":
        assert sum(state.figures.swaps for state in snapshot.variants.values()) > len(NAMES)
    if policy == "mixed" and resident != "1":
        assert snapshot.steps.mixed > 0
    engine.close()


@pytest.mark.parametrize("policy", POLICIES)
def test_large_batches_answer_as_transformers(served, policy):
    """All at once, with room for all."""
    engine = open_engine(served.bundle, dtype="float32", policy=policy, quantum_s=0.01)
    crowd = Crowd(served, engine, seed=7, size=60)
    crowd.run()
    crowd.verify()
    engine.close()


@pytest.mark.parametrize("family", FAMILIES)
def test_bf16_is_as_near_as_bf16_is(family, tmp_path):
    """All log-probabilities of all tokens after the engine's own answer, against transformers in bf16.

    Where two experts are nearly as likely, rounding chooses between them, on either side; such tokens are
    few, and over all of them the engine is as near to float32 as transformers is.
    """
    folders = write_family(tmp_path, family, "BF16")
    engine = open_engine(merge_family(folders, tmp_path / "x.moe", "exact"))
    generator = random.Random(0)
    apart, errors, reference_errors = [], [], []
    for name in NAMES:
        vocab = VOCABULARIES[name]
        half, full = load_reference(folders[name], torch.bfloat16), load_reference(folders[name])
        for length in (*PROMPT_LENGTHS, *PROMPT_LENGTHS):
            prompt = tuple(generator.randrange(3, vocab) for _ in range(length))
            request = Request(
                request_id="x", variant=name, prompt_ids=prompt, max_tokens=MAX_TOKENS, num_logprobs=vocab
            )
            told = [logprob for output in engine.run([request]) for logprob in output.logprobs]
            answer = [logprob.token_id for logprob in told]
            found = torch.tensor([[value for _, value in sorted(logprob.top)] for logprob in told])
            expected, exact = (
                reference_logits(model, prompt, answer)[-MAX_TOKENS:].log_softmax(-1)
                for model in (half, full)
            )
            apart += (found - expected).abs().amax(-1).tolist()
            errors += (found - exact).abs().mean(-1).tolist()
            reference_errors += (expected - exact).abs().mean(-1).tolist()
    assert sum(value <= BF16_TOLERANCE for value in apart) >= BF16_SHARE * len(apart)
    assert sum(errors) <= 1.2 * sum(reference_errors)
    engine.close()


@pytest.mark.parametrize(("family", "layout"), LAYOUTS, ids=[" ".join(case) for case in LAYOUTS])
def test_export_of_an_exact_bundle_loads_with_equal_logits(family, layout, tmp_path):
    names = ("code", "law", "sums")
    write_siblings(tmp_path, family, names=names, dtype="F32", noise=0.3, layout=layout)
    bundle = merge_family({name: tmp_path / name for name in names}, tmp_path / "exact.moe", "exact")
    for name in names:
        # Small files, so that the index is used as well.
        export_variant(bundle, name, tmp_path / "out" / name, shard_bytes=50_000)
        assert (tmp_path / "out" / name / "model.safetensors.index.json").is_file()
        before, after = load_reference(tmp_path / name), load_reference(tmp_path / "out" / name)
        expected, found = before.state_dict(), after.state_dict()
        assert expected.keys() == found.keys()
        assert all(torch.equal(expected[key], found[key]) for key in expected)
        prompt = (60, 3, 3, 41, 18, 22, 9, 50, 31)
        logits = [reference_logits(model, prompt, prompt) for model in (before, after)]
        torch.testing.assert_close(*logits, atol=1e-6, rtol=0)
