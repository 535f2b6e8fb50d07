"""What is wrong with a body, in plain words, with the field at fault by its name."""

import pytest
from pydantic import TypeAdapter, ValidationError

from moemerge.server.findings import describe
from moemerge.server.requests import ChatBody, CompletionBody, DetokenizeBody, TokenizeBody

MESSAGE = {"role": "user", "content": "x"}


def finding(model, body):
    with pytest.raises(ValidationError) as caught:
        TypeAdapter(model).validate_python(body)
    found = [{**error, "loc": ("body", *error["loc"])} for error in caught.value.errors()]
    return describe(found)


@pytest.mark.parametrize(
    ("model", "body", "param"),
    [
        (CompletionBody, {"model": "m", "prompt": "a", "flying-field": 1}, "flying-field"),
        (CompletionBody, {"model": "m", "prompt": ["a", 1]}, "prompt.1"),
        (CompletionBody, {"model": "m", "prompt": [[1], [2, "x"]]}, "prompt.1.1"),
        (CompletionBody, {"model": "m", "prompt": None}, "prompt"),
        (CompletionBody, {"model": "m", "prompt": "a", "stop": ["x", 1]}, "stop.1"),
        (CompletionBody, {"model": "m", "prompt": "a", "stop": 1}, "stop"),
        (CompletionBody, {"model": "m", "prompt": "a", "top_p": 0}, "top_p"),
        (CompletionBody, {"model": "m", "prompt": "a", "temperature": True}, "temperature"),
        (CompletionBody, {"model": "m", "prompt": "a", "stream": 1}, "stream"),
        (CompletionBody, {"model": "m", "prompt": "a", "best_of": 4}, "best_of"),
        (ChatBody, {"model": "m", "messages": [{"role": "tool", "content": "x"}]}, "messages.0.role"),
        (ChatBody, {"model": "m", "messages": [{"role": "user", "content": None}]}, "messages.0.content"),
        (
            ChatBody,
            {"model": "m", "messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "messages.0.content.0.type",
        ),
        (
            ChatBody,
            {"model": "m", "messages": [{"role": "user", "content": "x", "wings": 2}]},
            "messages.0.wings",
        ),
        (ChatBody, {"model": "m", "messages": []}, "messages"),
        (ChatBody, {"model": "m", "messages": [MESSAGE], "tools": [1]}, "tools"),
        (ChatBody, 7, ""),
    ],
)
def test_the_field_at_fault_is_named(model, body, param):
    told = finding(model, body)
    assert told.status_code == 400
    assert (told.param or "") == param
    assert param in str(told.detail)


def test_many_findings_are_counted_and_long_lists_give_one():
    assert "(and 1 more)" in str(
        finding(CompletionBody, {"model": "m", "prompt": "a", "x": 1, "y": 2}).detail
    )
    assert "more)" not in str(finding(CompletionBody, {"model": "m", "prompt": [1] + ["x"] * 1000}).detail)


COMPLETION = {"model": "m", "prompt": "a"}
CHAT = {"model": "m", "messages": [MESSAGE]}


@pytest.mark.parametrize(
    ("model", "body", "said"),
    [
        (CompletionBody, {"model": "m"}, "prompt is missing"),
        (CompletionBody, {**COMPLETION, "wings": 2}, "wings is not a field that this server knows"),
        (CompletionBody, {**COMPLETION, "max_tokens": "9"}, 'max_tokens is "9", expected a whole number'),
        (CompletionBody, {**COMPLETION, "max_tokens": 1.5}, "max_tokens is 1.5, expected a whole number"),
        (CompletionBody, {**COMPLETION, "max_tokens": -1}, "max_tokens is -1, expected at least 0"),
        (CompletionBody, {**COMPLETION, "logprobs": 21}, "logprobs is 21, expected at most 20"),
        (CompletionBody, {**COMPLETION, "temperature": 3}, "temperature is 3, expected at most 2"),
        (CompletionBody, {**COMPLETION, "temperature": "hot"}, 'temperature is "hot", expected a number'),
        (
            CompletionBody,
            {**COMPLETION, "temperature": float("inf")},
            "temperature is Infinity, expected a finite number",
        ),
        (CompletionBody, {**COMPLETION, "top_p": 0}, "top_p is 0, expected more than 0"),
        (CompletionBody, {**COMPLETION, "stream": 1}, "stream is 1, expected true or false"),
        (CompletionBody, {**COMPLETION, "stop": 1}, "stop is 1, expected a string or several"),
        (CompletionBody, {**COMPLETION, "stop": [""]}, "stop.0 is too short, expected 1 or more characters"),
        (
            CompletionBody,
            {**COMPLETION, "stop": ["a"] * 17},
            "stop has too many entries, expected at most 16",
        ),
        (CompletionBody, {**COMPLETION, "logit_bias": [1]}, "logit_bias is a list, expected an object"),
        (
            CompletionBody,
            {**COMPLETION, "logit_bias": {"x": 1}},
            'logit_bias.x is "x", expected a token id such as 42',
        ),
        (CompletionBody, {**COMPLETION, "best_of": 4}, "best_of is not supported by this server"),
        (CompletionBody, {**COMPLETION, "stream_options": {}}, "stream_options goes only with stream"),
        (CompletionBody, {**COMPLETION, "prompt": None}, "prompt is null, expected a string, several"),
        (CompletionBody, {**COMPLETION, "model": "m" * 300}, "model is too long, expected at most 256 char"),
        (CompletionBody, 7, "the body is 7, expected an object"),
        (ChatBody, {**CHAT, "messages": []}, "messages has too few entries, expected at least 1"),
        (ChatBody, {**CHAT, "messages": "hi"}, 'messages is "hi", expected a list'),
        (
            ChatBody,
            {**CHAT, "messages": [{"role": "tool", "content": "x"}]},
            "messages.0.role is \"tool\", expected 'system', 'developer', 'user', 'assistant' or 'bot'",
        ),
        (ChatBody, {**CHAT, "messages": ["hi"]}, 'messages.0 is "hi", expected an object'),
        (ChatBody, {**CHAT, "top_logprobs": 2}, "top_logprobs goes only with logprobs"),
        (TokenizeBody, {"prompt": 5}, "prompt is 5, expected a string"),
        (TokenizeBody, {}, "either prompt or messages is needed"),
        (DetokenizeBody, {"tokens": [1, -2]}, "tokens.1 is -2, expected at least 0"),
    ],
)
def test_words_are_plain(model, body, said):
    told = str(finding(model, body).detail)
    assert told.startswith(said)
    assert "nput should" not in told
