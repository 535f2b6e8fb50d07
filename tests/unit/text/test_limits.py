"""The rule of what a request may ask."""

import pytest

from moemerge.runner.intake import VariantLimits
from moemerge.text.limits import (
    ContextExceeded,
    InvalidRequest,
    check_ids,
    check_min_tokens,
    check_prompt,
    longest_answer,
    require_whole,
    show_value,
)
from moemerge.text.variants import BundleText


@pytest.fixture(scope="session")
def text(decoder_engine):
    """Its context has 128 tokens, its vocabulary 64."""
    return BundleText(decoder_engine.bundle).of("plain")


@pytest.mark.parametrize(
    ("asked", "default", "context", "longest"),
    [
        (118, 16, None, 118),
        (None, 16, None, 16),
        (None, 400, None, 118),
        (None, None, None, 118),
        (22, None, 32, 22),
        (None, None, 32, 22),
        (0, 16, None, 0),
    ],
)
def test_what_is_asked_counts_and_a_default_is_cut(asked, default, context, longest, text):
    limits = context and VariantLimits(vocab_size=64, context_tokens=context)
    assert longest_answer(text, 10, asked=asked, default=default, limits=limits) == longest


@pytest.mark.parametrize(
    ("num_prompt", "asked", "field", "said"),
    [
        (
            128,
            None,
            "messages",
            "messages has 128 tokens, which leave no room for an answer in a context of 128",
        ),
        (500, 1, "messages", "messages has 500 tokens"),
        (
            10,
            119,
            "limit",
            "limit is 119, expected at most 118: the context holds 128 tokens, the prompt has 10",
        ),
    ],
)
def test_what_does_not_fit_is_refused_by_the_senders_names(num_prompt, asked, field, said, text):
    with pytest.raises(ContextExceeded, match=said) as caught:
        longest_answer(
            text, num_prompt, asked=asked, default=None, prompt_field="messages", asked_field="limit"
        )
    assert caught.value.field == field


@pytest.mark.parametrize("wrong", [64, -1, True, "a", 1.0, None])
def test_only_ids_of_the_variant_are_tokens(wrong, text):
    check_ids("logit_bias", [0, 63], text)
    with pytest.raises(InvalidRequest, match=r"logit_bias holds .*expected token ids from 0 to 63"):
        check_ids("logit_bias", [0, wrong], text)


def test_prompt_has_tokens(text):
    with pytest.raises(InvalidRequest, match="prompt has no tokens"):
        check_prompt("prompt", [], text)


def test_shortest_answer_is_not_longer_than_the_longest():
    check_min_tokens(5, 5)
    with pytest.raises(InvalidRequest, match="min_tokens is 6, expected at most max_tokens, 5"):
        check_min_tokens(6, 5)


def test_whole_numbers_have_bounds():
    assert require_whole("n", 3, 3, 3) == 3
    for value, said in (
        ("3", 'is "3", expected a whole'),
        (2, "is 2, expected at least 3"),
        (4, "at most 3"),
    ):
        with pytest.raises(InvalidRequest, match=said):
            require_whole("n", value, 3, 3)


@pytest.mark.parametrize(
    ("value", "shown"), [(None, "null"), (True, "true"), ("x", '"x"'), ([1], "a list"), ({}, "an object")]
)
def test_values_are_shown_as_in_json(value, shown):
    assert show_value(value) == shown
    assert len(show_value("x" * 1000)) < 80
