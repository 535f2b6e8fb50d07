"""Text up to the first stop string, wherever tokens begin and end."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moemerge.errors import InvalidRecipe
from moemerge.text.streaming import StreamingText
from tests.unit.checkpoint.tokenizers import variant_tokenizer

LLAMA, BYTES = variant_tokenizer("byte_fallback"), variant_tokenizer("byte_level")
LETTERS = {letter: LLAMA.id_of(letter) for letter in "abcde"}


def spell(text):
    return [LETTERS[letter] for letter in text]


def obvious(text, stop):
    """Letter by letter: the text before the first stop string to be complete, the longest if several are."""
    for end in range(len(text) + 1):
        found = [s for s in stop if text[:end].endswith(s)]
        if found:
            longest = max(found, key=len)
            return text[: end - len(longest)], longest
    return text, None


TEXTS = st.text("ab", max_size=12) | st.text("abc", max_size=12)


@given(TEXTS, st.lists(st.text("ab", min_size=1, max_size=4), max_size=3), st.data())
def test_answer_is_that_of_an_obvious_loop(text, stop, data):
    stream = StreamingText(LLAMA, stop=stop)
    ids, out = spell(text), ""
    while ids:
        count = data.draw(st.integers(1, len(ids)))
        out += stream.add(ids[:count])
        # What is out can never be taken back.
        assert obvious(text, stop)[0].startswith(out)
        ids = ids[count:]
    assert (out + stream.finish(), stream.stopped_by) == obvious(text, stop)
    assert stream.add(spell("a")) + stream.finish() == "" or stream.stopped_by is None


def test_only_what_may_begin_a_stop_string_is_held_back():
    stream = StreamingText(LLAMA, stop=["abc", "bd"])
    assert [stream.add([token]) for token in spell("aabeabd")] == ["", "a", "", "abe", "", "", "a"]
    assert stream.stopped_by == "bd"
    assert stream.add(spell("ccc")) == stream.finish() == ""


def test_stop_string_may_be_part_of_the_answer():
    stream = StreamingText(LLAMA, stop=["bc"], include_stop=True)
    assert stream.add(spell("abcd")) == "abc"


def test_stop_string_inside_one_token_cuts_it():
    stream = StreamingText(BYTES, stop=["ll"])
    assert stream.add([BYTES.id_of("hello")]) == "he"
    assert stream.stopped_by == "ll"


def test_stop_string_of_characters_in_several_tokens():
    stream = StreamingText(BYTES, stop=["本😀"])
    text = "".join(stream.add([token]) for token in BYTES.encode("the 日本😀 hello"))
    assert (text, stream.stopped_by) == ("the 日", "本😀")


def test_stop_strings_do_not_count_in_the_first_tokens():
    stream = StreamingText(LLAMA, stop=["b"], min_tokens=3)
    assert stream.add(spell("abbab")) == "abba"
    assert stream.stopped_by == "b"


def test_special_tokens_are_no_text_unless_asked_for():
    assert StreamingText(LLAMA, stop=["a</s>"]).add([*spell("a"), 2]) == ""
    assert StreamingText(LLAMA, skip_special_tokens=False).add([*spell("a"), 2]) == "a</s>"


def test_unfinished_characters_come_at_the_end():
    stream = StreamingText(LLAMA, stop=["zz"])
    assert stream.add([LLAMA.id_of("<0xF0>")]) == ""
    assert stream.finish() == "\N{REPLACEMENT CHARACTER}"


def test_empty_stop_string_is_refused():
    with pytest.raises(InvalidRecipe, match="empty"):
        StreamingText(LLAMA, stop=["a", ""])
