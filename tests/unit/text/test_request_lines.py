"""What a line of a request file may hold."""

import json
import re
from pathlib import Path

import pytest

from moemerge.errors import MoemergeError
from moemerge.runner.sampling import Sampling
from moemerge.text.request_lines import FIELDS, parse_line
from moemerge.text.variants import BundleText

GOOD = {"variant": "plain", "prompt": "a word"}
TURN = {"variant": "large", "messages": [{"role": "user", "content": "a"}]}


@pytest.fixture(scope="session")
def texts(decoder_engine):
    return BundleText(decoder_engine.bundle)


def parse(texts, line, number=7, **defaults):
    raw = line if isinstance(line, bytes) else json.dumps(line).encode()
    return parse_line(raw, number, texts, defaults)


def test_line_becomes_a_request(texts):
    line = {
        **GOOD,
        "custom_id": "x",
        "max_tokens": 5,
        "min_tokens": 2,
        "stop": "y",
        "logprobs": 3,
        "temperature": 0.5,
        "top_k": 4,
        "logit_bias": {"5": -1.5},
        "seed": 11,
        "ignore_stop": True,
    }
    found = parse(texts, line)
    assert (found.number, found.custom_id, found.stop) == (7, "x", ("y",))
    request = found.request
    assert request.prompt_ids == texts.of("plain").encode("a word")
    assert (request.max_tokens, request.min_tokens, request.num_logprobs) == (5, 2, 3)
    assert request.sampling == Sampling(temperature=0.5, top_k=4, logit_bias={5: -1.5}, seed=11)
    assert request.stop_ids == {2}
    assert request.ignore_stop


def test_prompt_may_be_text_tokens_or_messages(texts):
    ids = list(texts.of("plain").encode("a word"))
    assert parse(texts, {"variant": "plain", "prompt_ids": ids}).request.prompt_ids == tuple(ids)
    messages = [{"role": "user", "content": "a"}]
    found = parse(texts, {"variant": "large", "messages": messages}).request.prompt_ids
    assert found == texts.of("large").encode_chat(messages)


def test_defaults_are_for_what_a_line_does_not_say(texts):
    defaults = {"variant": "odd", "max_tokens": 9, "temperature": 1.0, "stop": ["x"]}
    found = parse(texts, {"prompt": "a", "temperature": 0.25}, **defaults)
    assert (found.text.name, found.request.max_tokens, found.stop) == ("odd", 9, ("x",))
    assert found.request.sampling.temperature == 0.25
    assert parse(texts, GOOD, **defaults).text.name == "plain"


def test_equal_lines_get_seeds_of_their_own(texts):
    seeds = [parse(texts, GOOD, number, seed=5).request.sampling.seed for number in (1, 2, 1)]
    assert seeds[0] == seeds[2] != seeds[1]
    assert parse(texts, {**GOOD, "seed": 3}, 2, seed=5).request.sampling.seed == 3
    assert parse(texts, GOOD).request.sampling.seed is None


@pytest.mark.parametrize(
    ("line", "named"),
    [
        (b"{", "is not JSON"),
        (b"\xff", "is not UTF-8"),
        (b"[" * 100_000, "is not JSON"),
        (b'{"max_tokens": ' + b"1" * 5000 + b"}", "is not JSON"),
        ([], "is not an object"),
        ({**GOOD, "temprature": 1}, "unknown field 'temprature'; there are custom_id"),
        ({"prompt": "a"}, "variant is missing, expected one of plain, large, twin, odd"),
        ({**GOOD, "variant": True}, "variant is true, expected one of"),
        ({**GOOD, "variant": "huge"}, "no variant 'huge'"),
        ({**GOOD, "custom_id": 1}, "custom_id is 1"),
        ({"variant": "plain"}, "has none of prompt, messages, prompt_ids"),
        (
            {**GOOD, "chat_template_kwargs": {}},
            "expected an object beside messages",
        ),
        ({**TURN, "chat_template_kwargs": 5}, "chat_template_kwargs is 5"),
        ({**TURN, "chat_template_kwargs": {"tools": 1}}, "has tools, which the template is given anyway"),
        ({**GOOD, "prompt_ids": [1]}, "has prompt and prompt_ids of"),
        ({**GOOD, "prompt": 1}, "prompt is 1, expected a string"),
        ({**GOOD, "prompt": "\ud800"}, "not valid Unicode"),
        ({"variant": "plain", "prompt_ids": 5}, "prompt_ids is 5"),
        ({"variant": "plain", "prompt_ids": []}, "prompt_ids has no tokens, expected at least one"),
        ({"variant": "plain", "prompt_ids": [64]}, "prompt_ids holds 64, expected token ids from 0 to 63"),
        ({"variant": "plain", "prompt_ids": ["a"]}, 'prompt_ids holds "a"'),
        ({"variant": "plain", "prompt_ids": [True]}, "prompt_ids holds true"),
        ({"variant": "plain", "prompt_ids": [5, None]}, "prompt_ids holds null"),
        ({"variant": "plain", "messages": "a"}, 'messages is "a"'),
        ({"variant": "plain", "messages": [{}]}, r"messages\[0\] has no role"),
        ({"variant": "plain", "prompt": "a" * 127}, "128 tokens, which leave no room"),
        ({**GOOD, "max_tokens": 0}, "max_tokens is 0, expected at least 1"),
        ({**GOOD, "max_tokens": "5"}, 'max_tokens is "5", expected a whole number'),
        (
            {**GOOD, "max_tokens": 200},
            "max_tokens is 200, expected at most 121: the context holds 128 tokens",
        ),
        ({**GOOD, "max_tokens": 4, "min_tokens": 5}, "min_tokens is 5, expected at most max_tokens, 4"),
        ({**GOOD, "min_tokens": 127}, "min_tokens is 127, expected at most max_tokens, 1"),
        ({**GOOD, "temperature": -1}, "temperature is -1"),
        ({**GOOD, "top_p": float("nan")}, "NaN is not a number of JSON"),
        ({**GOOD, "logit_bias": {"a": 1}}, "token id of logit_bias is 'a'"),
        ({**GOOD, "stop": ["a", ""]}, "stop is .*none of them empty"),
        ({**GOOD, "stop": 5}, "stop is 5"),
        ({**GOOD, "ignore_stop": 1}, "ignore_stop is 1"),
        ({**GOOD, "logprobs": True}, "logprobs is true"),
        ({**GOOD, "logprobs": 21}, "logprobs is 21, expected at most 20"),
        ({**GOOD, "logit_bias": {"64": 1}}, "logit_bias holds 64, expected token ids from 0 to 63"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_line_that_cannot_be_answered_says_why(line, named, texts):
    with pytest.raises(MoemergeError, match=named):
        parse(texts, line)


def test_default_length_is_cut_to_what_the_context_leaves(texts):
    ids = [5] * 120
    assert parse(texts, {"variant": "plain", "prompt_ids": ids}).request.max_tokens == 8
    assert parse(texts, {"variant": "plain", "prompt_ids": ids}, max_tokens=50).request.max_tokens == 8
    assert parse(texts, {**GOOD, "max_tokens": None}, max_tokens=50).request.max_tokens == 50


def test_page_on_serving_has_a_row_for_every_field():
    page = (Path(__file__).parents[3] / "docs" / "serving.md").read_text(encoding="utf-8")
    table = page.partition("## Files of requests")[2].partition("\n## ")[0]
    named = set(
        re.findall(r"`(\w+)`", "".join(row.split("|")[1] for row in table.splitlines() if "|" in row))
    )
    assert named == set(FIELDS)
