"""Budgets as people write them, in exact arithmetic."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moemerge.consolidation.budget import parse_budget, refuse_budget
from moemerge.errors import InvalidRecipe


@pytest.mark.parametrize(
    ("text", "variant_bytes", "allowed"),
    [
        ("exact", 100, None),
        ("EXACT", 100, None),
        ("1x", 100, 100),
        ("1X", 100, 100),
        (" 1.5x ", 100, 150),
        ("1.5 x", 101, 151),
        ("1.15x", 100, 115),  # 114.99999999999999 in floating point
        ("0.5x", 100, 50),
        ("100B", 7, 100),
        ("40GiB", 7, 40 * 2**30),
        ("40 GB", 7, 40 * 10**9),
        ("1.5kb", 7, 1500),
        ("9" * 400 + "x", 1, int("9" * 400)),
    ],
)
def test_budget_allows(text, variant_bytes, allowed):
    assert parse_budget(text).allowed_bytes(variant_bytes) == allowed


@pytest.mark.parametrize(
    "text",
    ["", "x", "-1x", "0x", "0.0x", "1,5x", "1e3x", "infx", "nanx", "40", "40G", "0B", "cheap", "1xx", "٢x"],
)
def test_budget_that_means_nothing_is_refused_with_the_forms_there_are(text):
    with pytest.raises(InvalidRecipe, match="budget") as caught:
        parse_budget(text)
    assert repr(text) in str(caught.value)


@given(st.integers(1, 10**4), st.integers(1, 10**12))
def test_multiple_is_never_exceeded_and_never_wasted(hundredths, variant_bytes):
    ratio = f"{hundredths // 100}.{hundredths % 100:02d}"

    allowed = parse_budget(f"{ratio}x").allowed_bytes(variant_bytes)
    assert 100 * allowed <= hundredths * variant_bytes < 100 * (allowed + 1)


@given(st.integers(1, 10**12), st.integers(1, 10**12))
def test_suggested_budget_is_enough(least, variant_bytes):
    error = refuse_budget(parse_budget("1B"), 1, least, variant_bytes, can_share_more=True)
    suggested = str(error).split("--budget ")[1].split(" or more")[0]
    assert parse_budget(suggested).allowed_bytes(variant_bytes) >= least


def test_within_is_suggested_only_where_it_helps():
    budget = parse_budget("0.5x")
    assert "--within" in str(refuse_budget(budget, 50, 100, 100, can_share_more=True))
    assert "--within" not in str(refuse_budget(budget, 50, 100, 100, can_share_more=False))
