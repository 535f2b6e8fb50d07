"""`moemerge report` on what the other commands really write."""

import csv
import io
import json
import os
from pathlib import Path

import pytest

from moemerge.report.views import VIEWS
from tests.e2e.program import call_program, run_program
from tests.factories import edit_json, write_siblings

SOURCES = ("code=./code", "law=./law")
LAYERS, SLOTS = 2, 4
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """Two fine-tunes with their similarity, a plan by distance, and a bundle by cost measured on noise."""
    folder = tmp_path_factory.mktemp("report")
    write_siblings(folder, "mixtral")
    for arguments in (
        ("similarity", *SOURCES, "--base", "./base", "-o", "sim"),
        ("plan", *SOURCES, "--budget", "1.5x", "--policy", "cluster", "-o", "plan.json"),
        ("merge", *SOURCES, "--base", "./base", "-o", "duo.moe", "--budget", "0.75x", "--policy", "measured"),
    ):
        done = call_program(*arguments, cwd=folder)
        assert done.code == 0, done.err
    return folder


def report(work, *arguments):
    return call_program("report", *arguments, cwd=work)


def views_of(work, *arguments):
    done = report(work, *arguments, "--json")
    assert done.code == 0, done.err
    return done.envelope["data"]["views"]


def test_bundle_answers_every_view(work):
    views = views_of(work, "duo.moe")
    assert {name for name, rows in views.items() if not rows} == set()
    assert views.keys() == VIEWS.keys()
    assert [row["layer"] for row in views["layers"]] == list(range(LAYERS))
    assert sum(len(row["members"].split()) for row in views["clusters"]) == 2 * LAYERS * SLOTS
    assert sum(row["code"] for row in views["rungs"]) == LAYERS * SLOTS
    assert [row for row in views["budget"] if row["mark"] == "chosen"]


def test_numbers_are_those_of_the_files(work):
    views = views_of(work, "duo.moe")
    manifest = json.loads((work / "duo.moe" / "moemerge.json").read_text())
    errors = [
        (error, int(layer), name, slot)
        for name, entry in manifest["variants"].items()
        for layer, of_slots in entry["errors"].items()
        for slot, error in enumerate(of_slots)
    ]
    worst = max(errors)
    shown = views["worst"][0]
    assert (shown["error"], shown["layer"], shown["variant"], shown["slot"]) == worst
    index = json.loads((work / "sim" / "similarity.json").read_text())
    similar = views_of(work, "sim")["layers"]
    assert [row["same slot, median"] for row in similar] == [
        row["same_slot_median"] for row in index["layers"]
    ]


def test_similarity_and_plan_show_what_they_hold(work):
    of_similarity, of_plan = views_of(work, "sim"), views_of(work, "plan.json")
    assert {name for name, rows in of_similarity.items() if rows} >= {
        "layers",
        "parts",
        "deltas",
        "routers",
        "pairs",
    }
    assert of_similarity["clusters"] is None
    assert {name for name, rows in of_plan.items() if rows} == {
        "layers",
        "clusters",
        "rungs",
        "worst",
        "variants",
    }


def test_overview_tells_evidence_headline_strip_and_map(work):
    shown = report(work, "duo.moe").out
    assert "Decided by outputs on noise" in shown
    assert "pool experts" in shown
    assert "Layer" in shown
    assert "slot by slot: code, law" in shown


@pytest.mark.parametrize("view", ["heat", *VIEWS])
def test_view_prints_as_text_and_csv(work, view):
    assert report(work, "duo.moe", "--view", view, "--layer", 1).code == 0
    done = report(work, "duo.moe", "--view", view, "--csv")
    assert done.code == 0, done.err
    lengths = {len(row) for row in csv.reader(io.StringIO(done.out))}
    assert len(lengths) == 1


def test_variant_and_layer_choose(work):
    rows = views_of(work, "duo.moe", "--view", "worst", "--layer", 1, "--variant", "law", "--top", 3)["worst"]
    assert [(row["layer"], row["variant"]) for row in rows] == [(1, "law")] * 3


@pytest.mark.parametrize(
    ("arguments", "code", "told"),
    [
        (("nowhere",), 5, "no such bundle, similarity folder or plan"),
        (("base",), 4, "moemerge show"),
        (("duo.moe", "--view", "pie"), 3, "expected one of"),
        (("duo.moe", "--layer", "7"), 3, "has layers 0 to 1"),
        (("duo.moe", "--variant", "cook"), 3, "holds code, law"),
        (("plan.json", "--view", "heat"), 3, "moemerge similarity"),
        (("sim", "--view", "budget"), 3, "--policy measured"),
        (("code/config.json",), 4, "config.json: schema"),
    ],
)
def test_what_cannot_be_shown_is_told(work, arguments, code, told):
    done = report(work, *arguments)
    assert (done.code, told in done.err) == (code, True), done.err


def test_damaged_report_in_a_bundle_is_a_note_and_the_rest_is_shown(work, tmp_path):
    import shutil

    bundle = shutil.copytree(work / "duo.moe", tmp_path / "duo.moe")
    (bundle / "reports" / "similarity.json").write_text("{")
    edit_json(bundle / "reports" / "curve.json", schema="moemerge/curve@9")
    done = report(work, bundle)
    assert done.code == 0, done.err
    assert done.out.count("Left out: ") == 2
    assert "pool experts" in done.out


def test_page_is_written_and_named(work, tmp_path):
    page = tmp_path / "pages" / "duo.html"
    done = report(work, "duo.moe", "--html", page)
    assert done.code == 0, done.err
    assert done.out == f"Page: {page}\n"
    assert "Decided by outputs on noise" in page.read_text()
    assert report(work, "duo.moe", "--html", page, "--json").envelope["data"]["html"] == str(page)


def test_page_that_cannot_be_written_is_told_and_leaves_nothing(work, tmp_path):
    done = report(work, "duo.moe", "--html", tmp_path)
    assert (done.code, "it is a folder" in done.err) == (7, True), done.err
    assert list(tmp_path.iterdir()) == []


def test_demo_ends_with_the_path_of_a_page(tmp_path, monkeypatch):
    monkeypatch.setattr("moemerge.evaluation.demo.SYSTEMS", (("moemerge", "copies", "1x"),))
    monkeypatch.setattr("moemerge.evaluation.demo.CALIBRATION_TOKENS", 1024)
    monkeypatch.setattr("moemerge.evaluation.demo.NUM_WINDOWS", 1)
    done = call_program("demo", ROOT / "examples/families/mini", "-o", tmp_path, "--quiet")
    assert done.code == 0, done.err
    page = Path(done.out.splitlines()[-1].rpartition(": ")[2])
    assert "gained by tuning" in page.read_text(encoding="utf-8")


def test_first_output_takes_less_than_a_second(work):
    before = os.times()
    done = run_program("report", "duo.moe", cwd=work)
    assert done.code == 0, done.err
    # By the processor's time, which other programs change little, and twice what is promised.
    used = os.times()
    assert used.children_user + used.children_system - before.children_user - before.children_system < 2
