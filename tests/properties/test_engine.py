"""Whatever happens to an engine, in whatever order: every answer is the one its request gets alone."""

import random

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    precondition,
    rule,
    run_state_machine_as_test,
)

from moemerge.bundle.reader import open_bundle
from moemerge.errors import Busy, InvalidRecipe
from moemerge.models.geometry import cache_geometry
from moemerge.runner.forward import model_of
from moemerge.runner.policies import Policy
from moemerge.runner.pool import pool_bytes
from moemerge.runner.request import FinishReason, Request
from tests.bundles import NAMES, VOCABULARIES, Answer, open_engine, run, write_bundle

LONGEST_PROMPT, LONGEST_ANSWER = 20, 12
MARGIN = 1e-3
"""Prompts whose answer has two tokens with log-probabilities nearer than this are not asked."""


class Served:
    """A bundle, and what each of some requests gets alone."""

    def __init__(self, folder, family):
        self.bundle = open_bundle(write_bundle(folder, family))
        geometry = cache_geometry(model_of(self.bundle, NAMES[0]), block_tokens=1)
        self.token_bytes = geometry.block_bytes(torch.float32)
        self.answers = {}
        draw, engine = random.Random(0), open_engine(self.bundle)
        while len(self.answers) < 32:
            variant = NAMES[len(self.answers) % 4]
            length = draw.randint(1, LONGEST_PROMPT)
            prompt = tuple(draw.randrange(3, VOCABULARIES[variant]) for _ in range(length))
            asked = Request(
                request_id="a", variant=variant, prompt_ids=prompt, max_tokens=LONGEST_ANSWER, num_logprobs=2
            )
            (answer,) = run(engine, asked)
            if all(best[1] - second[1] > MARGIN for best, second in (p.top for p in answer.logprobs)):
                self.answers[variant, prompt] = answer.tokens
        self.residents = engine.snapshot().resident_bytes
        engine.close()


@st.composite
def engines(draw, served):
    """Options under which everything is scarce."""
    block_tokens = draw(st.sampled_from([1, 3, 8]))
    longest = 2 * (LONGEST_PROMPT + LONGEST_ANSWER + 2 * block_tokens)
    cache = draw(st.integers(longest // 2 + 8, 2 * longest)) * served.token_bytes
    share = draw(st.sampled_from([None, None, 0.1, 0.6]))
    memory = served.residents + cache + int((share or 0) * pool_bytes(served.bundle, torch.float32))
    max_batch = draw(st.integers(1, 6))
    return open_engine(
        served.bundle,
        policy=draw(st.sampled_from([policy.value for policy in Policy])),
        resident=draw(st.sampled_from(["1", "2", "3", "all", f"{served.residents // 2}B"])),
        cache_memory=cache,
        device_memory=memory if share else None,
        block_tokens=block_tokens,
        max_batch=max_batch,
        max_step_tokens=max_batch + draw(st.integers(0, 20)),
        max_wait_s=draw(st.sampled_from([0.0, 0.01, 10.0])),
        quantum_s=draw(st.sampled_from([0.0, 0.005])),
        patience_s=draw(st.sampled_from([0.0, 0.005])),
        min_hold_s=draw(st.sampled_from([0.0, 0.005])),
        drain_s=draw(st.sampled_from([0.0, 0.005, float("inf")])),
    )


class AnyOrderOfRequests(RuleBasedStateMachine):
    """Requests come and are cancelled, variants are pinned, asked for, removed and added."""

    served: Served

    @initialize(data=st.data())
    def begin(self, data):
        self.engine = data.draw(engines(self.served))
        self.requests: dict[str, Request] = {}
        self.answers: dict[str, Answer] = {}
        self.may_be_cut: dict[str, FinishReason] = {}

    @rule(data=st.data(), count=st.integers(1, 6), max_tokens=st.integers(1, LONGEST_ANSWER))
    def submit(self, data, count, max_tokens):
        for _ in range(count):
            variant, prompt = data.draw(st.sampled_from(list(self.served.answers)))
            name = str(len(self.requests))
            request = Request(request_id=name, variant=variant, prompt_ids=prompt, max_tokens=max_tokens)
            self.engine.submit(request)
            self.requests[name], self.answers[name] = request, Answer()

    @rule(count=st.integers(1, 10))
    def step(self, count):
        for _ in range(count):
            for output in self.engine.step():
                self.answers[output.request_id].add(output)

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def cancel(self, data):
        name = data.draw(st.sampled_from(list(self.requests)))
        self.engine.cancel(name)
        self.may_be_cut.setdefault(name, FinishReason.CANCELLED)

    @rule(variant=st.sampled_from(NAMES))
    def exchange(self, variant):
        self.engine.remove_variant(variant)
        self.engine.add_variant(variant)
        for name, request in self.requests.items():
            if request.variant == variant:
                self.may_be_cut.setdefault(name, FinishReason.ERROR)

    @rule(variant=st.sampled_from(NAMES))
    def pin(self, variant):
        try:
            self.engine.pin(variant)
        except (Busy, InvalidRecipe):
            return
        assert self.engine.snapshot().variants[variant].state == "resident"

    @rule(variant=st.sampled_from(NAMES))
    def unpin(self, variant):
        self.engine.unpin(variant)

    @rule(variant=st.sampled_from(NAMES))
    def ask_for(self, variant):
        try:
            self.engine.ensure_resident(variant)
        except Busy:
            return
        assert self.engine.snapshot().variants[variant].state in ("resident", "draining")

    @rule()
    def verify(self):
        self.engine.verify_integrity()

    def teardown(self):
        if not hasattr(self, "engine"):
            return
        while self.engine.has_work:
            self.step(1)
        for name, answer in self.answers.items():
            request = self.requests[name]
            expected = self.served.answers[request.variant, request.prompt_ids][: request.max_tokens]
            if answer.finish is FinishReason.LENGTH:
                assert answer.tokens == expected
            else:
                assert answer.finish is self.may_be_cut[name]
                assert answer.tokens == expected[: len(answer.tokens)]
        self.engine.verify_integrity()
        assert self.engine.snapshot().blocks_used == 0
        self.engine.close()


@pytest.mark.parametrize(("family", "examples"), [("mixtral", 30), ("switch_transformers", 10)])
def test_every_answer_is_the_one_its_request_gets_alone(family, examples, tmp_path):
    machine = type("AnyOrder", (AnyOrderOfRequests,), {"served": Served(tmp_path, family)})
    run_state_machine_as_test(machine, settings=settings(max_examples=examples, stateful_step_count=25))
