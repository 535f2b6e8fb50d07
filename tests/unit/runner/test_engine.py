"""Requests of several variants through one engine: what is told, and what becomes of blocks and variants."""

import shutil
import time

import pytest
import torch

from moemerge.bundle.reader import open_bundle
from moemerge.errors import (
    Busy,
    InvalidRecipe,
    NotEnoughRoom,
    NotFound,
    ServingError,
    UnsupportedCheckpoint,
)
from moemerge.runner.request import FinishReason, Request
from moemerge.runner.sampling import Sampling
from tests.bundles import NAMES, VOCABULARIES, collect, open_engine, run
from tests.factories import truncate

PROMPTS = ((5, 9, 33, 12), (60, 3, 3, 41, 18, 22, 9, 50, 31), (7,), tuple(range(4, 44)))
TOKENS = 10


def is_decoder(bundle):
    return bundle.manifest.family == "mixtral"


def cache_of(bundle, num_tokens):
    """Bytes of a cache for so many tokens: keys and values, layers, heads, width of a head, of a float32."""
    return num_tokens * 2 * (2 * 2 if is_decoder(bundle) else 4 * 4) * 8 * 4


def request(name, variant="plain", prompt=PROMPTS[0], max_tokens=TOKENS, **options):
    return Request(request_id=name, variant=variant, prompt_ids=prompt, max_tokens=max_tokens, **options)


def everything(**options):
    """Every prompt to every variant."""
    return [
        request(f"{variant}-{number}", variant, prompt, **options)
        for number, prompt in enumerate(PROMPTS)
        for variant in NAMES
    ]


def finished(engine, outputs):
    """All there is to tell from now on."""
    while engine.has_work:
        outputs.extend(engine.step())
    engine.verify_integrity()
    assert engine.snapshot().blocks_used == 0
    return collect(outputs)


@pytest.fixture(scope="module")
def alone(mixtral_bundle, switch_bundle):
    """Answers of an engine that has one request at a time, by bundle folder and request id."""
    answers = {}
    for bundle in (mixtral_bundle, switch_bundle):
        engine = open_engine(bundle)
        for one in everything():
            tokens = list(engine.generate(one.variant, one.prompt_ids, max_tokens=one.max_tokens))
            answers[bundle.folder, one.request_id] = tokens
        engine.close()
    return answers


@pytest.fixture
def engine(bundle):
    engine = open_engine(bundle)
    yield engine
    engine.verify_integrity()
    engine.close()


# Together as alone


def test_variants_answer_differently(alone, bundle):
    for number in range(len(PROMPTS)):
        assert len({tuple(alone[bundle.folder, f"{name}-{number}"]) for name in NAMES}) > 1


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"policy": "grouped", "quantum_s": 0.0},
        {"policy": "fcfs", "resident": "1"},
        {"resident": "2", "min_hold_s": 0.0, "patience_s": 0.0, "drain_s": 0.0},
        {"max_batch": 3, "max_step_tokens": 5},
        {"cache_memory": 60, "block_tokens": 4, "max_wait_s": 0.0},
    ],
    ids=["mixed", "grouped", "fcfs", "swapping", "chunked", "preempting"],
)
def test_answers_are_those_of_each_request_alone(options, alone, bundle):
    if "cache_memory" in options:
        options = {**options, "cache_memory": cache_of(bundle, options["cache_memory"])}
    engine = open_engine(bundle, **options)
    if "resident" not in options:
        engine.preload()  # In the background a busy machine may load a variant after the others are done.
    answers = finished(engine, list(engine.run(everything())))
    engine.close()
    for one in everything():
        answer = answers[one.request_id]
        assert answer.tokens == alone[bundle.folder, one.request_id]
        assert (answer.finish, answer.error) == (FinishReason.LENGTH, None)
    state = engine.snapshot()
    assert (state.steps.mixed > 0) == (options.get("policy", "mixed") == "mixed")
    if "cache_memory" in options:
        assert sum(v.figures.preemptions for v in state.variants.values()) > 0
    if "resident" in options:
        assert sum(v.figures.swaps for v in state.variants.values()) >= len(NAMES)


def test_requests_that_come_one_by_one_are_taken_in(engine, alone, bundle):
    outputs, waiting = [], everything()
    while waiting or engine.has_work:
        if waiting:
            engine.submit(waiting.pop())
        outputs += engine.step()
    answers = finished(engine, outputs)
    for one in everything():
        assert answers[one.request_id].tokens == alone[bundle.folder, one.request_id]


def test_two_engines_do_not_disturb_each_other(engine, alone, bundle):
    other = open_engine(bundle, resident="1", policy="fcfs")
    for one in everything():
        engine.submit(one)
        other.submit(one)
    outputs, others = [], []
    while engine.has_work or other.has_work:
        outputs += engine.step()
        others += other.step()
    other.verify_integrity()
    other.close()
    for answers in (collect(outputs), collect(others)):
        for one in everything():
            assert answers[one.request_id].tokens == alone[bundle.folder, one.request_id]


@pytest.mark.parametrize("temperature", [0.7, 3.0])
def test_a_seed_gives_the_same_answer_alone_and_in_any_company(temperature, bundle):
    sampling = Sampling(temperature=temperature, top_p=0.95, seed=7)
    engine = open_engine(
        bundle, max_batch=5, max_step_tokens=9, block_tokens=4, cache_memory=cache_of(bundle, 80)
    )
    requests = everything(sampling=sampling)
    together = run(engine, *requests)
    for one, answer in zip(requests, together, strict=True):
        assert run(engine, one)[0].tokens == answer.tokens
    (other,) = run(engine, request("other", sampling=Sampling(temperature=temperature, seed=8)))
    assert other.tokens != together[0].tokens
    engine.close()


# Limits and ends


def test_no_more_tokens_than_asked_for_and_no_step_for_nothing(engine):
    for count in (1, 5):
        before = engine.snapshot().steps.steps
        (answer,) = run(engine, request("a", max_tokens=count))
        assert len(answer.tokens) == count
        assert answer.finish is FinishReason.LENGTH
        assert engine.snapshot().steps.steps == before + count


def test_stop_id_ends_the_answer_and_is_not_given(engine, alone, bundle):
    tokens = alone[bundle.folder, "plain-0"]
    stop = tokens[4]
    expected = tokens[: tokens.index(stop)]
    (answer,) = run(engine, request("a", stop_ids=frozenset({stop}), num_logprobs=0))
    assert (answer.tokens, answer.finish) == (expected, FinishReason.STOP)
    assert len(answer.logprobs) == len(expected)
    (answer,) = run(engine, request("b", stop_ids=frozenset({tokens[0]})))
    assert (answer.tokens, answer.finish) == ([], FinishReason.STOP)
    (answer,) = run(engine, request("c", stop_ids=frozenset({stop}), ignore_stop=True))
    assert (answer.tokens, answer.finish) == (tokens, FinishReason.LENGTH)


def test_no_stop_id_is_chosen_before_min_tokens(engine, alone, bundle):
    tokens = alone[bundle.folder, "plain-0"]
    stop = frozenset(tokens[:2])
    (answer,) = run(engine, request("a", stop_ids=stop, min_tokens=4))
    assert len(answer.tokens) >= 4
    assert not stop & set(answer.tokens[:4])


def test_answers_end_where_the_context_ends(engine, bundle):
    def answer(length, max_tokens):
        return run(engine, request("a", prompt=(5,) * length, max_tokens=max_tokens))[0]

    if not is_decoder(bundle):  # relative positions have no end
        assert len(answer(150, 30).tokens) == 30
        return
    for length in (120, 127):
        assert len(answer(length, 128 - length).tokens) == 128 - length
        with pytest.raises(InvalidRecipe, match=f"max_tokens is 100, expected at most {128 - length}"):
            answer(length, 100)
    with pytest.raises(
        InvalidRecipe, match="128 tokens, which leave no room for an answer in a context of 128"
    ):
        answer(128, 1)


def test_answers_end_where_the_cache_ends(bundle):
    engine = open_engine(bundle, cache_memory=cache_of(bundle, 4 * 16), block_tokens=16)
    room = engine.limits_of("plain").room(20)
    # Of four blocks the prompt takes 20 tokens, or the encoder two blocks and a start token one place.
    assert room == (64 - 20 if is_decoder(bundle) else 31)
    (answer,) = run(engine, request("a", prompt=(5,) * 20, max_tokens=room))
    assert (answer.finish, len(answer.tokens)) == (FinishReason.LENGTH, room)
    with pytest.raises(InvalidRecipe, match=f"max_tokens is {room + 1}, expected at most {room}"):
        run(engine, request("b", prompt=(5,) * 20, max_tokens=room + 1))
    with pytest.raises(InvalidRecipe, match="the prompt has 64 tokens"):
        engine.submit(request("b", prompt=(5,) * 64))
    if not is_decoder(bundle):  # its source fills all blocks
        with pytest.raises(InvalidRecipe, match="50 tokens, which leave no room"):
            engine.submit(request("b", prompt=(5,) * 50))
    finished(engine, [])
    engine.close()


def test_vocabulary_follows_the_variant(engine):
    for name in NAMES:
        size = VOCABULARIES[name]
        assert engine.limits_of(name).vocab_size == size
        assert max(run(engine, request("a", name, (size - 1,)))[0].tokens) < size
        with pytest.raises(InvalidRecipe, match=f"token ids outside 0 to {size - 1}"):
            engine.submit(request("b", name, (3, size)))
        with pytest.raises(InvalidRecipe, match=f"logit_bias has token id {size}, .* 0 to {size - 1}"):
            engine.submit(request("b", name, sampling=Sampling(logit_bias={size - 1: 1.0, size: 1.0})))
    assert not engine.has_work


@pytest.mark.parametrize("prompt", [(3, 10**9), (10**30,)])
def test_prompt_that_cannot_be_is_refused_and_leaves_nothing_behind(prompt, engine):
    with pytest.raises(InvalidRecipe, match="the prompt has token ids"):
        engine.submit(request("a", prompt=prompt))
    with pytest.raises(NotFound, match="no variant 'huge' is served; there are plain, large, twin, odd"):
        engine.submit(request("a", "huge"))
    assert not engine.has_work


def test_a_request_id_is_free_again_when_its_answer_has_ended(engine):
    engine.submit(request("a"))
    with pytest.raises(InvalidRecipe, match="'a' is in use"):
        engine.submit(request("a", "large"))
    assert len(finished(engine, [])["a"].tokens) == TOKENS
    assert len(run(engine, request("a"))[0].tokens) == TOKENS


# Log-probabilities


@pytest.fixture(params=[512, 3], ids=["whole", "chunked"])
def decoder_engine(request, mixtral_bundle):
    engine = open_engine(mixtral_bundle, max_step_tokens=request.param, max_batch=2)
    yield engine
    engine.verify_integrity()
    engine.close()


def test_logprobs_are_the_models_own(decoder_engine):
    engine = decoder_engine
    asked = [request(n, n, PROMPTS[1], num_logprobs=3, num_prompt_logprobs=2) for n in NAMES]
    for one, answer in zip(asked, run(engine, *asked), strict=True):
        text = [*one.prompt_ids, *answer.tokens]
        expected = engine.logits(one.variant, torch.tensor([text]))[0].log_softmax(-1)
        told = [*answer.prompt_logprobs, *answer.logprobs]
        assert told[0] is None, "nothing foretells the first token"
        assert [logprob.token_id for logprob in told[1:]] == text[1:]
        for position, logprob in enumerate(told[1:]):
            row = expected[position]
            assert logprob.logprob == pytest.approx(float(row[logprob.token_id]), abs=1e-4)
            best = row.topk(2 if position + 1 < len(one.prompt_ids) else 3)
            assert [i for i, _ in logprob.top] == best.indices.tolist()
            assert [p for _, p in logprob.top] == pytest.approx(best.values.tolist(), abs=1e-4)


def test_zero_logprobs_are_those_of_the_tokens_and_no_others(decoder_engine):
    (answer,) = run(decoder_engine, request("a", num_logprobs=0, num_prompt_logprobs=0))
    assert len(answer.logprobs) == TOKENS
    assert len(answer.prompt_logprobs) == len(PROMPTS[0])
    assert all(logprob.top == () for logprob in (*answer.prompt_logprobs[1:], *answer.logprobs))
    (answer,) = run(decoder_engine, request("b", prompt=(7,), num_prompt_logprobs=0))
    assert answer.prompt_logprobs == (None,)
    (answer,) = run(decoder_engine, request("c"))
    assert (answer.logprobs, answer.prompt_logprobs) == ([], None)


def test_prompt_logprobs_survive_preemption_and_a_stop_at_once(mixtral_bundle):
    calm = open_engine(mixtral_bundle)
    tight = open_engine(
        mixtral_bundle,
        cache_memory=cache_of(mixtral_bundle, 60),
        block_tokens=4,
        max_step_tokens=20,
        max_batch=6,
    )
    asked = everything(num_prompt_logprobs=0)
    expected, found = run(calm, *asked), run(tight, *asked)
    assert sum(v.figures.preemptions for v in tight.snapshot().variants.values()) > 0
    for one, other in zip(expected, found, strict=True):
        assert one.tokens == other.tokens
        assert [p and p.token_id for p in one.prompt_logprobs] == [
            p and p.token_id for p in other.prompt_logprobs
        ]
        for a, b in zip(one.prompt_logprobs[1:], other.prompt_logprobs[1:], strict=True):
            assert a.logprob == pytest.approx(b.logprob, abs=1e-4)
    (stopped,) = run(tight, request("a", num_prompt_logprobs=0, stop_ids=frozenset(range(64))))
    assert (stopped.tokens, len(stopped.prompt_logprobs)) == ([], len(PROMPTS[0]))
    calm.close()
    tight.close()


def test_logprobs_of_a_prompt_and_logits_of_a_text_are_for_decoders(switch_bundle):
    engine = open_engine(switch_bundle)
    with pytest.raises(InvalidRecipe, match="decoder-only"):
        engine.submit(request("a", num_prompt_logprobs=0))
    with pytest.raises(UnsupportedCheckpoint, match="decoder-only"):
        engine.logits("plain", torch.tensor([[5, 6]]))
    (answer,) = run(engine, request("b", num_logprobs=2))
    assert all(logprob.top[0] == (logprob.token_id, logprob.logprob) for logprob in answer.logprobs)
    engine.close()


# Cancellation


def test_a_cancelled_request_frees_its_blocks_at_once(engine, alone, bundle):
    engine.preload()
    for one in everything():
        engine.submit(one)
    outputs = [*engine.step(), *engine.step()]
    used = engine.snapshot().blocks_used
    for name in NAMES:
        engine.cancel(f"{name}-1")
    engine.cancel("plain-1")
    engine.cancel("nobody")
    assert engine.snapshot().blocks_used < used
    engine.verify_integrity()
    answers = finished(engine, outputs)
    for one in everything():
        answer, expected = answers[one.request_id], alone[bundle.folder, one.request_id]
        if one.request_id.endswith("-1"):
            assert answer.finish is FinishReason.CANCELLED
            assert answer.tokens == expected[: len(answer.tokens)]
            assert len(answer.tokens) < TOKENS
        else:
            assert answer.tokens == expected


def test_what_waits_can_be_cancelled_as_well(bundle):
    engine = open_engine(bundle, max_batch=1)
    for one in everything():
        engine.submit(one)
    outputs = engine.step()
    for one in everything():
        engine.cancel(one.request_id)
    assert not engine.scheduler.has_work
    assert engine.has_work, "the ends are still to be told"
    answers = finished(engine, outputs)
    assert {answer.finish for answer in answers.values()} == {FinishReason.CANCELLED}
    assert len(answers) == len(everything())
    engine.close()


# One answer at a time


def test_generate_needs_an_engine_without_other_work(engine):
    tokens = engine.generate("plain", PROMPTS[0], max_tokens=5)
    first = next(tokens)
    with pytest.raises(Busy, match="other requests"):
        next(engine.generate("large", PROMPTS[0], max_tokens=5))
    rest = list(tokens)
    assert [first, *rest] == list(engine.generate("plain", PROMPTS[0], max_tokens=5))


def test_an_abandoned_answer_leaves_nothing_behind(engine):
    tokens = engine.generate("plain", PROMPTS[0], max_tokens=5)
    next(tokens)
    tokens.close()
    assert not engine.has_work
    assert engine.snapshot().blocks_used == 0


# Errors


def test_numbers_that_are_not_finite_end_their_request_and_no_other(alone, bundle):
    """Not even through blocks that the poisoned variant had before."""
    engine = open_engine(bundle, cache_memory=cache_of(bundle, 60), block_tokens=4, max_step_tokens=20)
    engine.preload()
    for role, tensor in engine._memory.store.weights("odd").items():
        if role.endswith(("attention.value", "attention.key")):
            tensor.fill_(torch.nan)
    answers = collect(engine.run(everything()))
    for one in everything():
        answer = answers[one.request_id]
        if one.variant == "odd":
            assert answer.finish is FinishReason.ERROR
            assert "no token can be chosen" in answer.error
            assert "moemerge verify" in answer.error
        else:
            assert answer.tokens == alone[bundle.folder, one.request_id]
    with pytest.raises(ServingError, match="variant odd: no token can be chosen"):
        list(engine.generate("odd", PROMPTS[0], max_tokens=3))
    assert engine.snapshot().blocks_used == 0
    engine.close()


@pytest.mark.parametrize(("resident", "is_mapped"), [("1", False), ("1", True), ("all", False)])
def test_a_variant_that_cannot_be_loaded_fails_alone(resident, is_mapped, alone, mixtral_bundle, tmp_path):
    copy = open_bundle(shutil.copytree(mixtral_bundle.folder, tmp_path / "x.moe"))
    engine = open_engine(copy, resident=resident, patience_s=0.0, min_hold_s=0.0, drain_s=0.1)
    if is_mapped:
        engine.ensure_resident("large")
        engine.ensure_resident("odd")
    file = copy.folder / "variants" / "large" / "tensors.safetensors"
    whole = file.read_bytes()
    truncate(file, -200)
    for _ in range(2):
        answers = finished(engine, list(engine.run(everything())))
        for one in everything():
            answer = answers[one.request_id]
            if one.variant == "large":
                assert answer.finish is FinishReason.ERROR
                assert "variant large could not be loaded" in answer.error
            else:
                assert answer.tokens == alone[mixtral_bundle.folder, one.request_id]
    with pytest.raises(ServingError, match="large could not be loaded"):
        engine.ensure_resident("large")
    file.write_bytes(whole)
    (answer,) = run(engine, request("again", "large"))
    assert answer.tokens == alone[mixtral_bundle.folder, "large-0"]
    engine.verify_integrity()
    engine.close()


def test_all_requests_can_be_failed_and_the_engine_goes_on(engine, alone, bundle):
    for one in everything():
        engine.submit(one)
    outputs = engine.step()
    engine.fail_all("the roof is on fire")
    answers = finished(engine, outputs)
    assert all(answer.error == "the roof is on fire" for answer in answers.values())
    assert run(engine, request("a"))[0].tokens == alone[bundle.folder, "plain-0"]


# Variants come and go


def test_requests_of_a_removed_variant_end_and_those_of_others_go_on(engine, alone, bundle):
    for one in everything():
        engine.submit(one)
    outputs = [*engine.step(), *engine.step()]
    engine.remove_variant("twin")
    engine.verify_integrity()
    assert list(engine.variants) == ["plain", "large", "odd"]
    with pytest.raises(NotFound, match="no variant 'twin' is served"):
        engine.submit(request("late", "twin"))
    with pytest.raises(NotFound):
        engine.remove_variant("twin")
    answers = finished(engine, outputs)
    for one in everything():
        answer = answers[one.request_id]
        if one.variant == "twin":
            assert (answer.finish, answer.error) == (FinishReason.ERROR, "variant twin was removed")
        else:
            assert answer.tokens == alone[bundle.folder, one.request_id]
    engine.add_variant("twin")
    assert run(engine, request("again", "twin"))[0].tokens == alone[bundle.folder, "twin-0"]


def test_a_variant_may_go_while_it_is_loaded(engine, alone, bundle):
    engine.submit(request("a", "odd"))
    engine.step()  # begins to load
    engine.remove_variant("odd")
    engine.verify_integrity()
    assert finished(engine, [])["a"].finish is FinishReason.ERROR
    assert engine.snapshot().resident_bytes == 0
    engine.add_variant("odd")
    assert run(engine, request("a", "odd"))[0].tokens == alone[bundle.folder, "odd-0"]


def test_every_variant_may_go(engine):
    for name in NAMES:
        engine.ensure_resident(name)
    for name in NAMES:
        engine.remove_variant(name)
    state = engine.snapshot()
    assert (state.resident_bytes, dict(state.variants)) == (0, {})
    with pytest.raises(NotFound):
        engine.submit(request("a"))


def test_what_is_served_already_or_unknown_is_not_added(engine):
    with pytest.raises(InvalidRecipe, match="plain is served already"):
        engine.add_variant("plain")
    with pytest.raises(NotFound, match="no variant 'huge'"):
        engine.add_variant("huge")


def test_only_the_variants_asked_for_are_served_until_more_are_added(alone, bundle):
    engine = open_engine(bundle, variants=("odd", "plain"))
    assert list(engine.variants) == ["odd", "plain"]
    with pytest.raises(NotFound, match="there are odd, plain"):
        engine.submit(request("a", "large"))
    engine.add_variant("large")
    assert run(engine, request("a", "large"))[0].tokens == alone[bundle.folder, "large-0"]
    engine.close()


def test_a_variant_for_which_there_is_no_room_is_not_added(mixtral_bundle):
    plain = open_engine(mixtral_bundle, variants=("plain",))
    plain.preload()
    state, cache = plain.snapshot(), cache_of(mixtral_bundle, 128)
    plain.close()
    engine = open_engine(
        mixtral_bundle,
        variants=("plain", "twin"),
        resident=f"{state.resident_bytes + 5000}B",
        cache_memory=cache,
        device_memory=state.resident_bytes + 5000 + cache + state.pool_bytes,
    )
    engine.remove_variant("twin")
    engine.pin("plain")
    with pytest.raises(InvalidRecipe, match="no room for variant large beside plain, pinned"):
        engine.add_variant("large")
    engine.add_variant("twin")
    engine.close()

    engine = open_engine(
        mixtral_bundle,
        variants=("plain",),
        cache_memory=cache,
        device_memory=state.resident_bytes + cache + state.pool_bytes,
    )
    with pytest.raises(NotEnoughRoom, match="with variant large residents may take"):
        engine.add_variant("large")
    assert list(engine.variants) == ["plain"]
    assert len(run(engine, request("a"))[0].tokens) == TOKENS
    engine.close()


def test_swap_to_resident_variant_moves_nothing(engine):
    first = engine.ensure_resident("plain")
    assert (first.variant, first.kept_bytes) == ("plain", 0)
    again = engine.ensure_resident("plain")
    assert (again.moved_bytes, again.kept_bytes) == (0, first.moved_bytes)
    other = engine.ensure_resident("twin")
    assert 0 < other.moved_bytes < first.moved_bytes
    with pytest.raises(NotFound):
        engine.ensure_resident("huge")


def test_a_resident_is_not_replaced_while_it_works(bundle):
    engine = open_engine(bundle, resident="1")
    engine.submit(request("a", max_tokens=30))
    while not engine.snapshot().variants["plain"].running:
        engine.step()
    with pytest.raises(Busy, match="no room for variant odd"):
        engine.ensure_resident("odd")
    assert engine.snapshot().variants["plain"].state == "resident"
    assert len(finished(engine, [])["a"].tokens) > 0
    engine.ensure_resident("odd")
    states = {name: state.state for name, state in engine.snapshot().variants.items()}
    assert states == {"plain": "absent", "large": "absent", "twin": "absent", "odd": "resident"}
    engine.close()


def test_a_pinned_variant_stays(bundle):
    engine = open_engine(bundle, resident="2", pinned=("plain",), min_hold_s=0.0)
    assert engine.snapshot().variants["plain"].pinned
    for name in ("large", "twin", "odd"):
        run(engine, request("a", name))
        assert engine.snapshot().variants["plain"].state == "resident"
    with pytest.raises(
        InvalidRecipe, match="resident is 2, which leaves no room for variant large beside odd, plain"
    ):
        engine.pin("odd")
    assert not engine.snapshot().variants["odd"].pinned
    engine.unpin("plain")
    engine.pin("odd")
    for name in ("large", "twin"):
        run(engine, request("a", name))
    states = {name: state.state for name, state in engine.snapshot().variants.items()}
    assert (states["plain"], states["odd"]) == ("absent", "resident")
    for change in (engine.pin, engine.unpin):
        with pytest.raises(NotFound):
            change("huge")
    engine.close()


@pytest.mark.parametrize(("resident", "expected"), [("all", 4), ("3", 3), ("1", 1)])
def test_what_fits_can_be_loaded_before_anybody_asks(resident, expected, bundle):
    engine = open_engine(bundle, resident=resident)
    engine.preload()
    states = [state.state for state in engine.snapshot().variants.values()]
    assert states == ["resident"] * expected + ["absent"] * (4 - expected)
    engine.close()


# Figures


def test_a_request_passes_its_stations_in_order(engine):
    received_s = time.perf_counter() - 5.0
    outputs = list(engine.run([request("a", arrival_s=received_s), request("b")]))
    timings = {output.request_id: output.timing for output in outputs if output.timing}
    for timing in timings.values():
        assert timing.arrival_s < timing.admitted_s < timing.first_token_s < timing.finished_s
        assert 0 < timing.swap_wait_s < timing.first_token_s - timing.arrival_s
    assert timings["a"].arrival_s == received_s
    engine.submit(request("c"))
    engine.cancel("c")
    (output,) = engine.step()
    assert (output.timing.admitted_s, output.timing.first_token_s) == (None, None)


def test_time_before_admission_is_told_once_however_often_a_request_is_preempted(mixtral_bundle):
    engine = open_engine(
        mixtral_bundle, resident="1", patience_s=0.0, min_hold_s=0.0, drain_s=0.0,
        cache_memory=cache_of(mixtral_bundle, 60), block_tokens=4, max_wait_s=0.0,
    )  # fmt: skip
    requests = everything()
    outputs = list(engine.run(requests))
    state = engine.snapshot()
    assert sum(v.figures.preemptions for v in state.variants.values()) > 0
    for timing in (output.timing for output in outputs if output.timing):
        assert timing.arrival_s < timing.admitted_s < timing.first_token_s < timing.finished_s
        assert timing.swap_wait_s <= timing.finished_s - timing.arrival_s
    engine.close()


def test_figures_add_up(bundle):
    engine = open_engine(bundle)
    answers = collect(engine.run(everything()))
    engine.submit(request("cancelled"))
    engine.step()
    engine.cancel("cancelled")
    finished(engine, [])
    state = engine.snapshot()
    for name, variant in state.variants.items():
        figures = variant.figures
        own = [answers[one.request_id] for one in everything() if one.variant == name]
        extra = name == "plain"
        assert figures.submitted == len(own) + extra == sum(figures.finished.values())
        assert figures.finished["length"] == len(own)
        assert figures.finished["cancelled"] == extra
        assert figures.prompt_tokens == sum(map(len, PROMPTS)) + extra * len(PROMPTS[0])
        assert figures.output_tokens == sum(len(answer.tokens) for answer in own) + extra
        assert sum(figures.ttft.counts) == len(own) + extra
        assert sum(figures.itl.counts) == sum(len(answer.tokens) - 1 for answer in own)
        assert sum(figures.tpot.counts) == len(own)
        assert sum(figures.turnaround.counts) == len(own) + extra
        assert (figures.swaps, figures.swap_bytes > 0) == (1, True)
        assert (variant.state, variant.waiting, variant.running) == ("resident", 0, 0)
    assert state.shared_bytes > 0
    assert state.expert_misses == 0
    assert state.steps.tokens >= sum(len(answer.tokens) for answer in answers.values())
    engine.close()


def test_a_snapshot_does_not_change_any_more(engine):
    run(engine, request("a"))
    before = engine.snapshot()
    told = before.variants["plain"].figures.output_tokens
    run(engine, request("a"))
    assert before.variants["plain"].figures.output_tokens == told
    assert engine.snapshot().variants["plain"].figures.output_tokens == 2 * told


def test_experts_fetched_on_demand_change_no_answer(alone, bundle):
    whole = open_engine(bundle)
    run(whole, *everything())
    state = whole.snapshot()
    residents, pool = state.resident_bytes, state.pool_bytes
    whole.close()
    for share in (0.1, 0.5, 0.9):
        memory = residents + 2**19 + int(pool * share)
        engine = open_engine(bundle, device_memory=memory, cache_memory=2**19)
        answers = finished(engine, list(engine.run(everything())))
        for one in everything():
            assert answers[one.request_id].tokens == alone[bundle.folder, one.request_id]
        state = engine.snapshot()
        assert state.expert_misses > 0
        assert state.pool_bytes <= pool * share
        engine.close()


def test_logits_of_a_text_need_no_cache(mixtral_bundle):
    engine = open_engine(mixtral_bundle, resident="1")
    rows = torch.tensor([PROMPTS[0], PROMPTS[0][::-1]])
    for name in NAMES:
        logits = engine.logits(name, rows)
        assert logits.shape == (2, 4, VOCABULARIES[name])
        torch.testing.assert_close(logits[1:], engine.logits(name, rows[1:]), atol=1e-5, rtol=0)
        (answer,) = run(engine, request("a", name, max_tokens=1))
        assert answer.tokens == [int(logits[0, -1].argmax())]
    assert engine.snapshot().blocks_used == 0
    engine.close()
