"""What follows from scores by passage, and what of a results folder is measured again."""

import pytest

from moemerge.errors import InvalidRecipe
from moemerge.evaluation.comparison import BASE, NO_BUDGET, ORIGINALS
from moemerge.evaluation.curves import check_plot, draw_curves
from moemerge.evaluation.results import (
    ACCURACY,
    GAIN,
    Comparison,
    Measured,
    read_measured,
    write_measured,
)


def measured(method, budget=NO_BUDGET, ratio=1.0, **fields):
    return Measured(method=method, budget=budget, identity="same", bytes_ratio=ratio, **fields)


def text_comparison(*methods):
    return Comparison(
        names=["code", "law"],
        base=measured(BASE, nll={"code": [3.0, 3.2], "law": [2.0, 2.4]}),
        originals=measured(ORIGINALS, ratio=2.0, nll={"code": [2.0, 2.2], "law": [1.0, 1.4]}),
        measured=methods,
        seed=0,
        num_draws=200,
    )


OURS = measured("ours", "1x", nll={"code": [2.1, 2.3], "law": [1.1, 1.5]})
WORSE = measured("pick", "1x", nll={"code": [2.5, 2.7], "law": [1.1, 1.5]})
BETTER = measured("copies", "1x", nll={"code": [2.05, 2.25], "law": [1.05, 1.45]})


def test_share_of_the_gain_its_worst_variant_and_the_difference_to_ours():
    comparison = text_comparison(OURS, WORSE, BETTER)
    assert comparison.unit == GAIN
    base, originals, ours, worse, better = comparison.rows()
    assert (base.kept, originals.kept, ours.kept) == pytest.approx((0.0, 1.0, 0.9))
    assert worse.by_variant == pytest.approx({"code": 0.5, "law": 0.9})
    assert (worse.worst, worse.kept, worse.difference) == pytest.approx((0.5, 0.7, -0.2))
    assert ours.difference is None
    assert worse.difference_interval == pytest.approx((-0.2, -0.2))
    assert [row.is_better for row in (ours, worse, better)] == [False, False, True]


def test_better_on_some_passages_and_worse_on_others_is_not_better():
    mixed = measured("copies", "1x", nll={"code": [1.9, 2.45], "law": [1.1, 1.5]})
    row = text_comparison(OURS, mixed).rows()[-1]
    assert row.difference > 0
    assert not row.is_better


def test_a_variant_that_gained_nothing_is_left_out():
    same = {"code": [3.0, 3.2], "law": [2.0, 2.4]}
    comparison = text_comparison(OURS)
    comparison = Comparison(
        names=comparison.names,
        base=comparison.base,
        originals=measured(ORIGINALS, ratio=2.0, nll={**comparison.originals.nll, "law": same["law"]}),
        measured=[OURS],
        seed=0,
        num_draws=200,
    )
    assert comparison.rows()[-1].by_variant == pytest.approx({"code": 0.9})


def test_tasks_are_compared_by_the_originals_accuracy():
    nll = {"code": [1.0, 1.0]}
    comparison = Comparison(
        names=["code"],
        base=measured(BASE, nll=nll, correct={"code": [0.0] * 4}),
        originals=measured(ORIGINALS, nll=nll, correct={"code": [1.0, 1.0, 0.0, 0.0]}),
        measured=[measured("ours", "1x", nll=nll, correct={"code": [1.0, 0.0, 0.0, 0.0]})],
        seed=0,
        num_draws=200,
    )
    assert comparison.unit == ACCURACY
    row = comparison.rows()[-1]
    assert (row.kept, row.scores) == (0.5, {"code": 0.25})


def test_what_cannot_be_measured_says_so_and_has_no_figures(tmp_path):
    comparison = text_comparison(OURS, Measured(method="copies", budget="1x", identity="", cannot="no room"))
    row = comparison.rows()[-1]
    assert (row.cannot, row.kept, row.worst) == ("no room", None, None)
    draw_curves(comparison, tmp_path / "curves.svg", "two")
    assert (tmp_path / "curves.svg").read_text().startswith("<?xml")


def test_results_come_back_and_those_of_other_inputs_do_not(tmp_path):
    path = tmp_path / "ours-1x.json"
    write_measured(OURS, path)
    assert read_measured(path, "same") == OURS
    assert read_measured(path, "other") is None
    path.write_text(path.read_text()[:-20])
    assert read_measured(path, "same") is None
    assert read_measured(tmp_path / "none.json", "same") is None


def test_a_plot_of_unknown_kind_is_refused(tmp_path):
    with pytest.raises(InvalidRecipe, match=r"\.png"):
        check_plot(tmp_path / "curves.txt")
