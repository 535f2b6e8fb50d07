"""Streams of tokens give the text of all tokens at once, for every kind of tokenizer."""

import functools
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moemerge.checkpoint.tokenizer import StreamingDecoder
from moemerge.errors import InvalidRecipe
from tests.unit.checkpoint.tokenizers import KINDS, WORDS, variant_tokenizer

TOKENIZERS = {kind: functools.cache(variant_tokenizer) for kind in KINDS}
BROKEN = "\N{REPLACEMENT CHARACTER}"
kinds = pytest.mark.parametrize("kind", KINDS)


def stream(tokenizer, token_ids, context=(), **options):
    decoder = StreamingDecoder(tokenizer, context, **options)
    pieces = [decoder.add(token_id) for token_id in token_ids]
    return [*pieces, decoder.finish()]


@st.composite
def sequences(draw, kind):
    """Any tokens, also unknown ones; or those of a text, with special ones in between."""
    tokenizer = TOKENIZERS[kind](kind)
    # Two ids more than there are, as a model may have rows to spare.
    any_token = st.integers(0, tokenizer.num_tokens + 1)
    if draw(st.booleans()):
        return draw(st.lists(any_token, max_size=14))
    text = "".join(draw(st.lists(st.sampled_from(WORDS), max_size=8)))
    ids = tokenizer.encode(text, add_special_tokens=False)
    for place in draw(st.lists(st.integers(0, len(ids)), max_size=3)):
        ids.insert(place, draw(st.integers(0, 2)))
    return ids


@kinds
@given(st.data())
def test_pieces_are_the_text_of_all_tokens(kind, data):
    tokenizer, ids = TOKENIZERS[kind](kind), data.draw(sequences(kind))
    whole = tokenizer.decode(ids)
    # Single bytes that make no character spoil all bytes beside them; a stream has given those out by then.
    if kind != "byte_fallback" or BROKEN not in whole:
        assert "".join(stream(tokenizer, ids)) == whole


@kinds
@given(st.data())
def test_pieces_after_a_prompt_are_what_follows_its_text(kind, data):
    tokenizer, ids = TOKENIZERS[kind](kind), data.draw(sequences(kind))
    cut = data.draw(st.integers(0, len(ids)))
    before, whole = tokenizer.decode(ids[:cut]), tokenizer.decode(ids)
    if BROKEN not in whole and BROKEN not in before:
        assert before + "".join(stream(tokenizer, ids[cut:], ids[:cut])) == whole


@kinds
@given(st.data())
def test_special_tokens_can_be_text(kind, data):
    tokenizer, ids = TOKENIZERS[kind](kind), data.draw(sequences(kind))
    whole = tokenizer.decode(ids, skip_special_tokens=False)
    if kind != "byte_fallback" or BROKEN not in whole:
        assert "".join(stream(tokenizer, ids, skip_special_tokens=False)) == whole


def test_first_word_after_a_prompt_keeps_its_space():
    for kind in ("byte_fallback", "metaspace"):
        tokenizer = TOKENIZERS[kind](kind)
        hello, world = (tokenizer.id_of(token) for token in ("▁hello", "▁world"))
        assert "".join(stream(tokenizer, [world], [hello])) == " world"
        # Special tokens in between change nothing; alone they are no text to follow on.
        assert "".join(stream(tokenizer, [world], [hello, 1, 1])) == " world"
        assert "".join(stream(tokenizer, [world], [1])) == "world"
        assert "".join(stream(tokenizer, [world])) == "world"


def test_characters_come_whole_and_at_once():
    tokenizer = TOKENIZERS["byte_fallback"]("byte_fallback")
    ids = [tokenizer.id_of(f"<0x{byte:02X}>") for byte in "a😀😀é".encode()]
    assert stream(tokenizer, ids) == ["a", "", "", "", "😀", "", "", "", "😀", "", "é", ""]
    assert stream(tokenizer, ids[:-1])[-1] == BROKEN


def test_broken_characters_come_as_they_are():
    tokenizer = TOKENIZERS["byte_level"]("byte_level")
    wrong = next(i for i in range(tokenizer.num_tokens) if tokenizer.token_bytes(i) == b"\xff")
    assert "".join(stream(tokenizer, [wrong] * 300)) == BROKEN * 300
    assert "".join(stream(tokenizer, [wrong, *tokenizer.encode("the")])) == BROKEN + "the"


@kinds
def test_a_token_costs_the_same_however_long_the_answer(kind):
    tokenizer = TOKENIZERS[kind](kind)
    for token_id in (tokenizer.num_tokens - 1, 5, 0):
        decoder = StreamingDecoder(tokenizer)
        begin = time.process_time()
        for _ in range(4000):
            decoder.add(token_id)
        assert time.process_time() - begin < 2
        assert len(decoder._window) < 64


@kinds
def test_tokens_have_text_and_bytes(kind):
    tokenizer = TOKENIZERS[kind](kind)
    for token_id in range(tokenizer.num_tokens):
        raw, text = tokenizer.token_bytes(token_id), tokenizer.token_text(token_id)
        assert raw.decode("utf-8", errors="replace").count(BROKEN) <= text.count(BROKEN)
        if BROKEN not in text:
            assert raw.decode() == text
    assert tokenizer.token(tokenizer.num_tokens) is None
    assert tokenizer.token_bytes(tokenizer.num_tokens) == b""
    assert tokenizer.token_text(1) in ("<s>", "</s>", "[CLS]")


def test_bytes_of_tokens_make_the_text_again():
    for kind in ("byte_level", "byte_fallback"):
        tokenizer = TOKENIZERS[kind](kind)
        ids = tokenizer.encode("hello 日本 😀.", add_special_tokens=False)
        assert b"".join(map(tokenizer.token_bytes, ids)).decode().strip() == "hello 日本 😀."


def test_special_tokens_may_be_left_out_and_half_characters_are_refused():
    tokenizer = TOKENIZERS["byte_level"]("byte_level")
    assert tokenizer.special_ids == {0, 1, 2}
    assert not tokenizer.is_visible(1)
    assert tokenizer.is_visible(1, skip_special_tokens=False)
    assert not tokenizer.is_visible(10**6, skip_special_tokens=False)
    with pytest.raises(InvalidRecipe, match="not valid Unicode"):
        tokenizer.encode("\ud800")
