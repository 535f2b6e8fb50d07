"""How the next token is chosen."""

import collections
import math

import pytest
import torch

from moemerge.errors import InvalidRecipe
from moemerge.runner.sampling import Sampling, choose


def draw(logits, count, **options):
    sampling = Sampling(**options)
    generator = sampling.generator()
    return [choose(torch.tensor(logits), sampling, generator) for _ in range(count)]


def test_greedy_takes_the_likeliest_and_the_first_of_equals():
    assert draw([0.0, 3.0, 1.0], 1) == [1]
    assert draw([1.0, 7.0, 7.0, 7.0], 3) == [1, 1, 1]
    assert draw([-math.inf, -5.0], 1) == [1]


def test_temperature_one_follows_the_distribution():
    found = collections.Counter(draw([math.log(0.5), math.log(0.3), math.log(0.2)], 4000, temperature=1.0))
    for token, probability in enumerate((0.5, 0.3, 0.2)):
        # Four standard deviations.
        assert found[token] / 4000 == pytest.approx(probability, abs=4 * math.sqrt(0.25 / 4000))


@pytest.mark.parametrize("temperature", [1e-3, 1e-30, 1e-45, 1e-300, 5e-324])
def test_no_temperature_is_too_low(temperature):
    assert set(draw([1.0, 2.0, -3.0], 20, temperature=temperature)) == {1}


@pytest.mark.parametrize("temperature", [1e30, 1e300])
def test_high_temperature_makes_all_equally_likely(temperature):
    assert set(draw([1.0, 20.0, -30.0], 200, temperature=temperature)) == {0, 1, 2}


def test_lower_temperature_prefers_the_likeliest_more():
    shares = [draw([0.0, 1.0], 2000, temperature=t).count(1) for t in (0.2, 1.0, 5.0)]
    assert shares == sorted(shares, reverse=True)


def test_seed_repeats_and_another_differs():
    options = {"count": 50, "temperature": 1.0}
    logits = [0.0] * 30
    assert draw(logits, seed=7, **options) == draw(logits, seed=7, **options)
    assert draw(logits, seed=7, **options) != draw(logits, seed=8, **options)


def test_token_that_is_impossible_is_never_drawn():
    assert 1 not in draw([0.0, -math.inf, 0.0], 200, temperature=2.0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_are_drawn_from(dtype):
    sampling = Sampling(temperature=0.7)
    assert choose(torch.tensor([1.0, 60000.0], dtype=dtype), sampling, sampling.generator()) == 1


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": -0.1},
        {"temperature": math.nan},
        {"temperature": math.inf},
        {"seed": -1},
        {"seed": 2**63},
    ],
)
def test_impossible_settings_are_refused(options):
    with pytest.raises(InvalidRecipe, match=next(iter(options))):
        Sampling(**options)
