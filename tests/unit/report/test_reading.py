"""Reports of other rooms are believed after a check only."""

import json
import re

import pytest

from moemerge.errors import DamagedBundle, DamagedInput, IncompatibleInputs, UnsupportedCheckpoint
from moemerge.report.html import render
from moemerge.report.reading import open_report
from tests.factories import edit_json, edit_tensors
from tests.reports import names_of, write_json, write_reports, write_similarity


@pytest.fixture
def bundle(tmp_path):
    return write_reports(tmp_path / "x.moe")


def similarity(tmp_path, names=("a", "b")):
    return write_similarity(tmp_path / "sim", list(names), 4, 2)


def test_bundle_holds_what_its_reports_say(bundle):
    report = open_report(bundle)
    assert report.notes == ()
    assert report.variants == tuple(names_of(3))
    assert report.storage.num_pool_experts == 12
    rung = report.storage.layers[0].rungs["v0"][0]
    assert str(rung) == "shared 5-bit + 2-bit"
    # Codes and one scale a row, by hand: a third of the pool expert and all of the residual.
    scales = 16 * (64 + 64 + 32) / (3 * 64 * 32)
    assert rung.bits == pytest.approx((5 + scales) / 3 + 2 + scales)
    assert report.sharing[1]["v0"] == pytest.approx(4 * 0.002)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"variants": ["a", "a"]}, "listed twice"),
        ({"num_slots": 3}, "has shape"),
        ({"num_slots": 0}, "num_slots"),
        ({"layers": [{"index": 10**9}]}, "layers.0"),
    ],
)
def test_similarity_that_contradicts_itself_is_refused(tmp_path, changes, message):
    folder = similarity(tmp_path)
    edit_json(folder / "similarity.json", **changes)
    with pytest.raises(DamagedInput, match=message):
        open_report(folder).similarity.load(0)


def test_matrix_that_is_not_finite_is_refused(tmp_path):
    folder = similarity(tmp_path)
    path = folder / "similarity-layer-00000.safetensors"
    edit_tensors(path, lambda tensors: tensors["distance.relative_l2"].fill_(float("nan")))
    with pytest.raises(DamagedInput, match=r"distance\.relative_l2 contains NaN"):
        open_report(folder).similarity.load(0)


def test_other_versions_are_told_as_that(tmp_path):
    folder = similarity(tmp_path)
    edit_json(folder / "similarity.json", schema="moemerge/similarity@2")
    with pytest.raises(UnsupportedCheckpoint, match="another moemerge"):
        open_report(folder)


def test_plan_without_a_slot_is_refused(bundle):
    path = bundle / "reports" / "plan.json"
    report = open_report(path)
    assert report.kind == "plan"
    layers = open_plan_layers(path)
    layers[0]["pool"].pop()
    edit_json(path, layers=layers)
    with pytest.raises(DamagedInput, match="expected each of 4 slots of 3 variants once"):
        open_report(path)


def open_plan_layers(path):
    return json.loads(path.read_text())["layers"]


def test_distances_of_other_variants_are_left_out_of_a_bundle_with_a_note(bundle, tmp_path):
    write_similarity(bundle / "reports", ["x", "y"], 4, 3)
    report = open_report(bundle)
    assert report.similarity is None
    assert re.search("distances between x, y", report.notes[0])


def test_variant_that_left_is_told_and_its_costs_are_gone(bundle):
    manifest = json.loads((bundle / "moemerge.json").read_text())
    del manifest["variants"]["v2"]
    manifest["provenance"]["changes"] = [{"action": "remove", "variant": "v2", "moemerge": "0"}]
    write_json(bundle / "moemerge.json", manifest)
    report = open_report(bundle)
    assert report.notes[0].startswith("v2 left after the merge")
    assert set(report.sharing[0]) == set(report.routing.counts[0]) == {"v0", "v1"}
    assert report.curve is None
    assert "How experts are kept" in render(report)


def test_manifest_that_is_damaged_is_refused(bundle):
    edit_json(bundle / "moemerge.json", num_slots=-1)
    with pytest.raises(DamagedBundle):
        open_report(bundle)


def test_control_characters_do_not_reach_a_terminal(tmp_path):
    bundle = write_reports(tmp_path / "x.moe", source="org/\x1b[2Jmodel")
    assert open_report(bundle).sources["v0"] == "org/�[2Jmodel"


def test_calibration_of_something_else_is_refused(bundle, tmp_path):
    one = {"text_sha256": "0", "num_tokens": 5, "nll": 1.0}
    index = {"schema": "moemerge/calibration@1", "num_slots": 4, "layers": [0], "variants": {"other": one}}
    write_json(tmp_path / "calibration" / "calibration.json", index)
    with pytest.raises(IncompatibleInputs, match="a calibration of other"):
        open_report(bundle, tmp_path / "calibration")
