"""Tokens get the place of their text, and are held back until it is out."""

from itertools import pairwise
from pathlib import Path

import pytest

from moemerge.checkpoint.tokenizer import load_tokenizer
from moemerge.runner.sampling import TokenLogprob
from moemerge.server.logprobs import LogprobQueue, TokenNames, place_prompt

MINI = Path(__file__).parents[3] / "examples" / "families" / "mini" / "code"
TEXT = "naïve 漢字 \N{GRINNING FACE}\n  end of it"


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(lambda name: MINI / name, "mini")


def logprobs_of(token_ids):
    return [TokenLogprob(token_id, -0.5, ((token_id, -0.5), (7, -2.0))) for token_id in token_ids]


def test_offsets_are_where_the_text_of_a_token_begins(tokenizer):
    token_ids = tokenizer.encode(TEXT)
    text = tokenizer.decode(token_ids)
    placed = place_prompt(tokenizer, token_ids, [None, *logprobs_of(token_ids[1:])], text)
    for item, following in pairwise(placed):
        before = tokenizer.decode(token_ids[: placed.index(item)])
        assert item.offset == len(before.rstrip("\N{REPLACEMENT CHARACTER}"))
        assert item.offset <= following.offset
    assert placed[-1].offset < len(text)
    assert placed[0].logprob is None


@pytest.mark.parametrize("text", ["</s><s><|user|>x y", "a</s> b <s>", "<|user|>"])
def test_special_tokens_that_the_text_spells_take_their_room(tokenizer, text):
    token_ids = tokenizer.encode(text)
    placed = place_prompt(tokenizer, token_ids, logprobs_of(token_ids), text)
    assert tokenizer.special_ids.intersection(token_ids)
    for item in placed:
        assert text.startswith(tokenizer.token_text(item.token_id), item.offset)


def test_special_tokens_that_the_text_lacks_take_no_room(tokenizer):
    token_ids = [*tokenizer.encode("</s>"), *tokenizer.encode("x y")]
    placed = place_prompt(tokenizer, token_ids, logprobs_of(token_ids), "x y")
    assert [item.offset for item in placed[:2]] == [0, 0]
    assert placed[-1].offset < len("x y")


def test_tokens_wait_until_their_text_is_out(tokenizer):
    token_ids = tokenizer.encode(TEXT)
    text = tokenizer.decode(token_ids)
    queue = LogprobQueue(tokenizer, (), 0)
    queue.add(logprobs_of(token_ids))
    taken = []
    for end in range(len(text)):
        fresh = queue.take(end)
        assert all(item.offset < end for item in fresh)
        taken += fresh
    taken += queue.take_all()
    assert [item.token_id for item in taken] == token_ids


def test_bytes_of_parts_of_characters_add_up(tokenizer):
    names = TokenNames(tokenizer)
    token_ids = tokenizer.encode(TEXT, add_special_tokens=False)
    assert b"".join(bytes(names.bytes(token_id)) for token_id in token_ids).decode() == TEXT
    broken = [token_id for token_id in token_ids if "\N{REPLACEMENT CHARACTER}" in names.text(token_id)]
    assert broken
    assert all(names.key(token_id).startswith("bytes:\\x") for token_id in broken)


def test_chosen_token_is_among_the_likeliest(tokenizer):
    names = TokenNames(tokenizer)
    unlikely = TokenLogprob(9, -8.0, ((7, -0.1), (8, -3.0)))
    (best,) = names.for_completion(place_prompt(tokenizer, [9], [unlikely], "")).top_logprobs
    assert best == {names.key(7): -0.1, names.key(8): -3.0, names.key(9): -8.0}
