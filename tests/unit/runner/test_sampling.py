"""How the next token is chosen: laws, an obvious loop, and transformers where the semantics agree."""

import collections
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moemerge.errors import InvalidRecipe
from moemerge.runner.request import Request
from moemerge.runner.sampling import Sampler, Sampling, _truncate, choose_tokens, prompt_logprobs


def draw(logits, count, prompt=(), **options):
    """`count` tokens of one answer, the logits staying the same."""
    sampler = Sampler(Sampling(**options), prompt)
    tokens = []
    for _ in range(count):
        (chosen,) = choose_tokens(torch.tensor([logits]), [sampler], [None])
        assert chosen.error is None
        sampler.accept(chosen.token_id)
        tokens.append(chosen.token_id)
    return tokens


def test_greedy_takes_the_likeliest_and_the_first_of_equals():
    assert draw([0.0, 3.0, 1.0], 1) == [1]
    assert draw([1.0, 7.0, 7.0, 7.0], 3) == [1, 1, 1]
    assert draw([-math.inf, -5.0], 1) == [1]


def test_temperature_one_follows_the_distribution():
    found = collections.Counter(
        draw([math.log(0.5), math.log(0.3), math.log(0.2)], 4000, temperature=1.0, seed=0)
    )
    for token, probability in enumerate((0.5, 0.3, 0.2)):
        # Four standard deviations.
        assert found[token] / 4000 == pytest.approx(probability, abs=4 * math.sqrt(0.25 / 4000))


def test_truncated_draws_follow_the_distribution_of_what_is_left():
    logits = [math.log(p) for p in (0.1, 0.4, 0.2, 0.3)]
    found = collections.Counter(draw(logits, 4000, temperature=1.0, top_k=2, seed=3))
    assert found.keys() == {1, 3}
    assert found[1] / 4000 == pytest.approx(4 / 7, abs=4 * math.sqrt(0.25 / 4000))


@pytest.mark.parametrize("temperature", [1e-3, 1e-30, 1e-45, 1e-300, 5e-324])
def test_no_temperature_is_too_low(temperature):
    assert set(draw([1.0, 2.0, -3.0], 20, temperature=temperature)) == {1}


@pytest.mark.parametrize("temperature", [1e30, 1e300])
def test_high_temperature_makes_all_equally_likely(temperature):
    assert set(draw([1.0, 20.0, -30.0], 200, temperature=temperature)) == {0, 1, 2}


def test_lower_temperature_prefers_the_likeliest_more():
    shares = [draw([0.0, 1.0], 2000, temperature=t, seed=0).count(1) for t in (0.2, 1.0, 5.0)]
    assert shares == sorted(shares, reverse=True)


def test_seed_repeats_and_another_differs():
    options = {"count": 50, "temperature": 1.0}
    logits = [0.0] * 30
    assert draw(logits, seed=7, **options) == draw(logits, seed=7, **options)
    assert draw(logits, seed=7, **options) != draw(logits, seed=8, **options)


def test_without_a_seed_answers_differ():
    assert draw([0.0] * 30, 50, temperature=1.0) != draw([0.0] * 30, 50, temperature=1.0)


def test_choice_depends_on_seed_and_position_and_not_on_the_batch():
    logits_WV = torch.randn(6, 40, generator=torch.Generator().manual_seed(0))
    settings = [Sampling(temperature=0.9, seed=seed, top_p=0.9) for seed in range(6)]
    alone = [draw(row.tolist(), 5, temperature=0.9, seed=n, top_p=0.9) for n, row in enumerate(logits_WV)]
    samplers = [Sampler(sampling) for sampling in settings]
    for position in range(5):
        order = torch.randperm(6).tolist()
        chosen = choose_tokens(logits_WV[order], [samplers[n] for n in order], [None] * 6)
        for n, choice in zip(order, chosen, strict=True):
            assert choice.token_id == alone[n][position]
            # Asked again for the same position, for example after a preemption.
            assert samplers[n].choose(logits_WV[n]) == choice.token_id
            samplers[n].accept(choice.token_id)


def test_token_that_is_impossible_is_never_drawn():
    assert 1 not in draw([0.0, -math.inf, 0.0], 200, temperature=2.0)
    assert 1 not in draw([0.0, -math.inf, 0.0], 200, temperature=2.0, top_k=3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_are_drawn_from(dtype):
    logits_WV = torch.tensor([[1.0, 60000.0]], dtype=dtype)
    assert choose_tokens(logits_WV, [Sampler(Sampling(temperature=0.7))], [None])[0].token_id == 1


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_numbers_that_are_not_finite_fail_their_own_sequence_only(bad, temperature):
    logits_WV = torch.tensor([[0.0, 1.0], [0.0, bad], [-math.inf, -math.inf]])
    sampling = Sampling(temperature=temperature, top_p=0.5)
    good, *others = choose_tokens(logits_WV, [Sampler(sampling)] * 3, [0] * 3)
    assert (good.token_id, good.error) == (1, None)
    assert all(chosen.error for chosen in others)


def test_forbidding_every_token_is_an_error_and_no_crash():
    sampler = Sampler(Sampling(), stop_ids=frozenset({0, 1}), min_tokens=1)
    assert choose_tokens(torch.zeros(1, 2), [sampler], [None])[0].error


def test_stop_ids_wait_for_the_least_number_of_tokens():
    sampler = Sampler(Sampling(), stop_ids=frozenset({1, 99}), min_tokens=2)
    tokens = []
    for _ in range(3):
        (chosen,) = choose_tokens(torch.tensor([[0.0, 9.0, 5.0]]), [sampler], [None])
        sampler.accept(chosen.token_id)
        tokens.append(chosen.token_id)
    assert tokens == [2, 2, 1]


def test_penalties_count_prompt_and_answer_as_they_should():
    # The prompt's token counts for the repetition penalty and not for the others.
    assert draw([1.0, 1.5], 1, prompt=[1], repetition_penalty=2.0) == [0]
    assert draw([1.0, 1.5], 1, prompt=[1], presence_penalty=2.0, frequency_penalty=2.0) == [1]
    # Presence counts once, frequency each time.
    assert draw([0.0, 1.5], 4, presence_penalty=1.0) == [1, 1, 1, 1]
    assert draw([0.0, 1.5], 4, frequency_penalty=1.0) == [1, 1, 0, 1]
    # Negative logits are multiplied, so that a penalty never helps.
    assert draw([-1.2, -1.0], 2, repetition_penalty=1.5) == [1, 0]


def test_bias_moves_logits_also_when_greedy():
    assert draw([0.0, 1.0, 0.5], 1, logit_bias={0: 1.5}) == [0]
    assert draw([0.0, 1.0, 0.5], 1, logit_bias={1: -100, 7: 100}) == [2]


LOGITS = st.lists(st.sampled_from([-5.0, -1.0, -0.5, 0.0, 0.25, 0.5, 1.0, 2.0, 4.0]), min_size=1, max_size=12)
UNITS = st.sampled_from([0.0, 0.01, 0.1, 0.3, 0.5, 0.9, 0.99])


@given(LOGITS, st.integers(0, 14), UNITS, UNITS, st.sampled_from([0.3, 1.0, 2.5]))
def test_truncation_is_that_of_an_obvious_loop(logits, top_k, top_p, min_p, temperature):
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=1 - top_p, min_p=min_p)
    weights = [math.exp((logit - max(logits)) / temperature) for logit in logits]
    kept = _truncate(torch.tensor(weights, dtype=torch.float64), sampling)
    ids = list(range(len(logits))) if kept is None else kept.tolist()
    if kept is None:
        assert (top_k, top_p, min_p) == (0, 0.0, 0.0)
    assert sorted(ids) == sorted(obvious(weights, top_k, 1 - top_p, min_p))


def obvious(weights, top_k, top_p, min_p):
    likely = sorted(range(len(weights)), key=lambda i: (-weights[i], i))
    likely = [i for i in likely if weights[i] / max(weights) >= min_p]
    likely = likely[: top_k or None]
    total = sum(weights[i] for i in likely)
    kept, mass = [], 0.0
    for i in likely:
        if kept and top_p < 1 and mass >= top_p * total - 1e-12:
            break
        kept.append(i)
        mass += weights[i]
    return kept


@pytest.mark.parametrize("top_p", [0.02, 0.5, 0.9, 0.999])
def test_nucleus_of_a_large_vocabulary_is_that_of_a_full_sort(top_p):
    weights_V = torch.rand(30_000, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    kept = _truncate(weights_V / weights_V.max(), Sampling(temperature=1.0, top_p=top_p))
    ordered = weights_V.sort(descending=True)
    num = int((ordered.values.cumsum(0) < top_p * weights_V.sum()).sum()) + 1
    assert kept.tolist() == ordered.indices[:num].tolist()


def test_truncation_and_penalties_are_those_of_transformers():
    from transformers import (
        LogitsProcessorList,
        MinPLogitsWarper,
        RepetitionPenaltyLogitsProcessor,
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
    )

    generator = torch.Generator().manual_seed(5)
    for trial in range(50):
        logits_V = 3 * torch.randn(200, generator=generator, dtype=torch.float64)
        prompt = torch.randint(200, (20,), generator=generator)
        sampling = Sampling(
            temperature=0.5 + trial % 3, top_k=5 + trial, top_p=0.8, min_p=0.02, repetition_penalty=1.3
        )
        reference = LogitsProcessorList(
            [
                RepetitionPenaltyLogitsProcessor(1.3),
                TemperatureLogitsWarper(float(sampling.temperature)),
                MinPLogitsWarper(0.02),
                TopKLogitsWarper(sampling.top_k),
                TopPLogitsWarper(0.8),
            ]
        )(prompt[None], logits_V[None].clone())[0]
        scores_V = Sampler(sampling, prompt.tolist())._adjust(logits_V.clone())
        weights_V = torch.exp((scores_V - scores_V.max()) / sampling.temperature)
        kept = _truncate(weights_V, sampling)
        assert set(kept.tolist()) == set(reference.isfinite().nonzero().squeeze(-1).tolist())
        torch.testing.assert_close(weights_V[kept] / weights_V[kept].sum(), reference.softmax(-1)[kept])


@given(LOGITS, st.lists(st.integers(0, 11), max_size=6), st.lists(st.integers(0, 11), max_size=6))
def test_penalties_are_those_of_an_obvious_loop(logits, prompt, answer):
    sampling = Sampling(
        repetition_penalty=1.7, presence_penalty=0.4, frequency_penalty=-0.3, logit_bias={1: 2.0, 11: -1}
    )
    sampler = Sampler(sampling, prompt)
    for token in answer:
        sampler.accept(token)
    expected = []
    for token, logit in enumerate(logits):
        score = logit + {1: 2.0, 11: -1}.get(token, 0)
        if token in prompt + answer:
            score = score / 1.7 if score > 0 else score * 1.7
        score -= -0.3 * answer.count(token) + 0.4 * (token in answer)
        expected.append(score)
    adjusted = sampler._adjust(torch.tensor(logits, dtype=torch.float64))
    assert adjusted.tolist() == pytest.approx(expected)


def test_logprobs_are_the_models_own_whatever_the_sampling():
    logits_V = torch.tensor([0.0, 2.0, 1.0, 2.0])
    expected = logits_V.log_softmax(0).tolist()
    sampling = Sampling(temperature=1e-9, logit_bias={2: 50}, top_k=1)
    plain, biased = choose_tokens(logits_V.repeat(2, 1), [Sampler(Sampling()), Sampler(sampling)], [3, 0])
    assert plain.logprob.token_id == 1
    # Of equally likely ones the smallest id comes first.
    assert [token for token, _ in plain.logprob.top] == [1, 3, 2]
    assert [value for _, value in plain.logprob.top] == pytest.approx([expected[i] for i in (1, 3, 2)])
    assert biased.logprob.token_id == 2
    assert biased.logprob.logprob == pytest.approx(expected[2])
    assert biased.logprob.top == ()


def test_logprobs_of_a_prompt_are_those_of_the_tokens_that_follow():
    logits_TV = torch.randn(5, 7, generator=torch.Generator().manual_seed(2))
    found = prompt_logprobs(logits_TV.bfloat16(), [3, 1, 4, 1, 5], 99)
    reference = logits_TV.bfloat16().float().log_softmax(-1)
    for position, one in enumerate(found):
        assert one.logprob == pytest.approx(float(reference[position, one.token_id]))
        assert len(one.top) == 7
        values = [value for _, value in one.top]
        assert values == sorted(values, reverse=True)
    assert [one.token_id for one in found] == [3, 1, 4, 1, 5]


@pytest.mark.parametrize(
    "options",
    [
        *({"temperature": value} for value in (-0.1, math.nan, math.inf, 10**400, "1", True, None)),
        *({"top_k": value} for value in (-1, 1.5, 2**31, True)),
        *({"top_p": value} for value in (0, 0.0, 1.1, math.nan, -1)),
        *({"min_p": value} for value in (-0.1, 1.1, math.nan)),
        *({"repetition_penalty": value} for value in (0, -1, math.nan, math.inf)),
        *(
            {name: value}
            for name in ("presence_penalty", "frequency_penalty")
            for value in (-2.1, 2.1, math.nan)
        ),
        *({"seed": value} for value in (-1, 2**63, 1.0)),
        *({"logit_bias": value} for value in ({-1: 0.0}, {1: 101}, {1: math.nan}, {"1": 2.0}, [1], None)),
    ],
    ids=repr,
)
def test_impossible_settings_are_refused(options):
    with pytest.raises(InvalidRecipe, match=rf"{next(iter(options))}.* is .*, expected"):
        Sampling(**options)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"prompt_ids": ()}, "the prompt is empty"),
        ({"prompt_ids": (1, -1)}, "the prompt holds -1"),
        ({"max_tokens": 0}, "max_tokens is 0"),
        ({"max_tokens": 2.0}, "max_tokens is 2.0"),
        ({"min_tokens": -1}, "min_tokens is -1"),
        ({"min_tokens": 6}, "min_tokens is 6, expected at most max_tokens, 5"),
        ({"stop_ids": frozenset({-2})}, "stop_ids holds -2"),
        ({"num_logprobs": -1}, "num_logprobs is -1"),
        ({"num_prompt_logprobs": True}, "num_prompt_logprobs is True"),
    ],
    ids=lambda value: repr(value) if isinstance(value, dict) else "",
)
def test_impossible_requests_are_refused(options, named):
    whole = {"request_id": "1", "variant": "code", "prompt_ids": (1, 2), "max_tokens": 5}
    Request(**whole)
    with pytest.raises(InvalidRecipe, match=named):
        Request(**{**whole, **options})
