"""JSON that arrives, and JSON that does not."""

import contextlib
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moemerge.server.body import parse_json
from moemerge.server.errors import ApiError

texts = st.text(st.characters(exclude_categories=["Cs"]))
numbers = st.integers(-(2**70), 2**70) | st.floats(allow_nan=False, allow_infinity=False)


@given(
    st.recursive(
        st.none() | st.booleans() | numbers | texts,
        lambda inner: st.lists(inner) | st.dictionaries(texts, inner),
        max_leaves=10,
    )
)
def test_what_was_written_is_read(value):
    assert parse_json(json.dumps(value).encode()) == value
    assert parse_json(json.dumps(value, ensure_ascii=False).encode()) == value


@given(st.binary(max_size=200))
def test_any_bytes_give_a_value_or_a_refusal(body):
    with contextlib.suppress(ApiError):
        json.dumps(parse_json(body), ensure_ascii=False).encode()


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"{", "line 1, column 2"),
        (b"\xff", "UTF-8"),
        (b'["\\ud800"]', "surrogate"),
        (b'["\\uDFFF"]', "surrogate"),
        (b'{"\\ud83d": 1}', "surrogate"),
        (b"NaN", "NaN"),
        (b"[-Infinity]", "-Infinity"),
        (b"[" * 100_000, "deeply"),
        (b"9" * 10_000, "number"),
        (b"", "line 1"),
    ],
)
def test_the_reason_is_told(body, said):
    with pytest.raises(ApiError) as caught:
        parse_json(body)
    assert said in str(caught.value.detail)


def test_pairs_of_surrogates_are_characters():
    assert parse_json(b'"\\ud83d\\ude00"') == "\N{GRINNING FACE}"
