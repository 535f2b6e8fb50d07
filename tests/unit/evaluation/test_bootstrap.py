"""Bootstrap intervals against all resamples there are, and laws of paired draws."""

import itertools

import numpy as np
import pytest

from moemerge.evaluation.bootstrap import (
    Ratio,
    draw_shares,
    interval_of,
    interval_of_difference,
    mean_share,
)

PARTS, WHOLES = [0.9, 0.2, 0.5, 0.8], [1.0, 0.7, 0.9, 1.2]


def every_share(part, whole):
    """The share of each of the n^n resamples, all equally likely."""
    draws = itertools.product(range(len(part)), repeat=len(part))
    return [sum(part[i] for i in draw) / sum(whole[i] for i in draw) for draw in draws]


def test_interval_is_close_to_that_of_all_resamples():
    exact = np.percentile(every_share(PARTS, WHOLES), [2.5, 97.5])
    found = interval_of({"code": Ratio(PARTS, WHOLES)}, num_draws=40_000)
    assert found == pytest.approx(exact, abs=0.01)


def test_interval_of_two_variants_is_close_to_that_of_all_pairs_of_resamples():
    other = ([0.4, 0.1, 0.9], [0.8, 0.6, 1.1])
    pairs = itertools.product(every_share(PARTS, WHOLES), every_share(*other))
    exact = np.percentile([(one + two) / 2 for one, two in pairs], [2.5, 97.5])
    ratios = {"code": Ratio(PARTS, WHOLES), "law": Ratio(*other)}
    assert interval_of(ratios, num_draws=40_000) == pytest.approx(exact, abs=0.01)


def test_draws_do_not_depend_on_how_many_are_held_at_a_time(monkeypatch):
    ratios = {"code": Ratio(PARTS, WHOLES)}
    whole = draw_shares(ratios, seed=3, num_draws=50)
    monkeypatch.setattr("moemerge.evaluation.bootstrap._ENTRIES", 7 * len(PARTS))
    assert np.array_equal(draw_shares(ratios, seed=3, num_draws=50), whole)


def test_what_is_worse_by_the_same_everywhere_differs_without_doubt():
    ratios = {"code": Ratio(PARTS, np.ones(4))}
    lower = {"code": Ratio(np.subtract(PARTS, 0.125), np.ones(4))}
    assert interval_of_difference(lower, ratios) == pytest.approx((-0.125, -0.125))
    low, high = interval_of(ratios)
    assert high - low > 0.2


def test_a_method_differs_from_itself_by_nothing_and_the_original_keeps_all():
    ratios = {"code": Ratio(PARTS, WHOLES), "law": Ratio(WHOLES, WHOLES)}
    assert interval_of_difference(ratios, ratios) == (0.0, 0.0)
    original = {"law": ratios["law"]}
    assert (mean_share(original), *interval_of(original)) == (1.0, 1.0, 1.0)


def test_another_seed_draws_otherwise_and_the_same_seed_alike():
    ratios = {"code": Ratio(PARTS, WHOLES)}
    first, again, other = (interval_of(ratios, seed=seed, num_draws=200) for seed in (0, 0, 1))
    assert first == again != other


def test_draws_in_which_nothing_was_gained_are_left_out():
    low, high = interval_of({"code": Ratio([1.0, 1.0], [4.0, -2.0])}, num_draws=1000)
    assert 0.25 <= low <= high == pytest.approx(1.0)
    assert interval_of({"code": Ratio([1.0], [-1.0])}) == (-np.inf, np.inf)
