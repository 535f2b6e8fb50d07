"""Calibrations on disk: additive, resumable, and refused for other weights."""

import json
import shutil
from types import SimpleNamespace

import pytest

from moemerge.calibration import calibrating as module
from moemerge.calibration import passes, spans
from moemerge.calibration.calibrating import calibrate
from moemerge.calibration.folder import INDEX, layer_file, open_calibration
from moemerge.calibration.passes import CalibrationOptions
from moemerge.checkpoint.variants import open_variants
from moemerge.errors import (
    DamagedInput,
    IncompatibleInputs,
    InvalidRecipe,
    NotFound,
    UnsupportedCheckpoint,
)
from moemerge.progress import Silent
from moemerge.refs import FolderRef
from tests.e2e.program import tree
from tests.factories import edit_json, edit_tensors, truncate, write_checkpoint, write_siblings

OPTIONS = CalibrationOptions(num_tokens=512, reservoir=16)


@pytest.fixture(scope="module")
def siblings(tmp_path_factory):
    folder = tmp_path_factory.mktemp("siblings")
    base, tunes = write_siblings(folder)
    for name, text in (("code", "def f(x): "), ("law", "whereas, ")):
        (folder / f"{name}.txt").write_text(text * 100)
    return SimpleNamespace(folder=folder, base=base, tunes=tunes)


def variants_of(siblings, *names, base=False):
    sources = {name: FolderRef(siblings.tunes[name]) for name in names}
    return open_variants(sources, FolderRef(siblings.base) if base else None)


def run(siblings, out, *names, base=False, options=OPTIONS):
    paths = {name: siblings.folder / f"{name}.txt" for name in names}
    return calibrate(variants_of(siblings, *names, base=base), paths, out, options)


@pytest.fixture(scope="module")
def both(siblings, tmp_path_factory):
    return run(siblings, tmp_path_factory.mktemp("both") / "calibration", "code", "law").calibration


def test_layers_come_back_as_they_were_counted(both):
    index = both.index
    assert list(index.variants) == ["code", "law"]
    assert both.index == open_calibration(both.folder).index
    for name in index.variants:
        for layer_index in index.layers:
            layer = both.layer(name, layer_index)
            # One of four windows is held out.
            assert (layer.num_tokens, index.variants[name].num_tokens) == (384, 512)
            assert sum(slot.count for slot in layer.slots) == 2 * 384


def test_variants_one_after_the_other_give_the_bytes_of_both(both, siblings, tmp_path):
    run(siblings, tmp_path / "one", "code")
    before = tree(tmp_path / "one" / "code")
    done = run(siblings, tmp_path / "one", "law")
    assert done.reused == ()
    assert tree(tmp_path / "one" / "code") == before
    assert tree(tmp_path / "one") == tree(both.folder)


def test_finished_variant_is_not_run_again(siblings, tmp_path, monkeypatch):
    run(siblings, tmp_path / "out", "code")
    with monkeypatch.context() as patch:
        patch.setattr(spans, "calibrate_layers", lambda *_: pytest.fail("was run again"))
        done = run(siblings, tmp_path / "out", "code")
    assert done.reused == ("code",)
    other = CalibrationOptions(num_tokens=384, reservoir=16)
    assert run(siblings, tmp_path / "out", "code", options=other).reused == ()
    shutil.copy(siblings.folder / "law.txt", tmp_path / "code.txt")
    paths = {"code": tmp_path / "code.txt"}
    assert calibrate(variants_of(siblings, "code"), paths, tmp_path / "out", other).reused == ()


@pytest.fixture
def spans_of_one_layer(monkeypatch):
    monkeypatch.setattr(spans, "SPAN_BYTES", 1)


def test_spans_give_the_bytes_of_the_whole(siblings, both, tmp_path, spans_of_one_layer):
    done = run(siblings, tmp_path / "out", "code", "law")
    assert tree(tmp_path / "out") == tree(both.folder)
    assert done.calibration.index == both.index


@pytest.mark.parametrize("lost", ["while it ran", "when it was done"])
def test_interrupted_run_goes_on(siblings, both, tmp_path, monkeypatch, spans_of_one_layer, lost):
    real, begun = spans.calibrate_layers, []

    def fail_in_the_last(checkpoint, passages, layers, *arguments):
        begun.append((checkpoint.label.rpartition("/")[2], layers.start))
        yield from real(checkpoint, passages, layers, *arguments)
        if begun[-1] == ("law", 1) and lost == "while it ran":
            raise KeyboardInterrupt

    def fail_at_the_end(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(spans, "calibrate_layers", fail_in_the_last)
        if lost == "when it was done":
            patch.setattr(module, "measure_sensitivity", fail_at_the_end)
        with pytest.raises(KeyboardInterrupt):
            run(siblings, tmp_path / "out", "code", "law")
    assert begun == [("code", 0), ("law", 0), ("code", 1), ("law", 1)]
    again, asked = [], []

    def count(*arguments):
        again.append(arguments[2])
        return real(*arguments)

    # Spans of another length begin where the others ended; what a killed run left half done is not kept.
    monkeypatch.setattr(spans, "SPAN_BYTES", 2**40)
    monkeypatch.setattr(spans, "calibrate_layers", count)
    half_done = tmp_path / "out" / ".law.building" / "span-1"
    half_done.mkdir()
    (half_done / "layer-00001.safetensors").write_bytes(b"cut short")
    (half_done.parent / ".layer-00001.safetensors.1.tmp").write_bytes(b"cut short")
    # Only what is missing has to find room.
    monkeypatch.setattr(module, "check_disk", lambda folder, needed, what: asked.append(needed))
    run(siblings, tmp_path / "out", "code", "law")
    assert again == ([range(1, 2)] if lost == "while it ran" else [])
    assert tree(tmp_path / "out") == tree(both.folder)
    run(siblings, tmp_path / "new", "code", "law")
    assert asked[0] < asked[1]


def test_finished_variants_stay_when_another_is_interrupted(siblings, both, tmp_path, monkeypatch):
    real = module.measure_sensitivity

    def fail_on_law(checkpoint, *arguments):
        if checkpoint.label.endswith("law"):
            raise KeyboardInterrupt
        return real(checkpoint, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(module, "measure_sensitivity", fail_on_law)
        with pytest.raises(KeyboardInterrupt):
            run(siblings, tmp_path / "out", "code", "law")
    assert list(open_calibration(tmp_path / "out").index.variants) == ["code"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [".law.building", INDEX, "code"]
    assert run(siblings, tmp_path / "out", "code", "law").reused == ("code",)
    assert tree(tmp_path / "out") == tree(both.folder)


@pytest.mark.parametrize("several_passes", [False, True])
def test_span_done_again_counts_once(siblings, both, tmp_path, monkeypatch, several_passes):
    """As on a cluster whose node is lost: nothing is added to what that has left, or leaves meanwhile."""
    variants, passages = variants_of(siblings, "law"), both.passages("law").counted
    if several_passes:
        monkeypatch.setattr(passes, "pass_tokens", lambda *_: 200)
    real, beside = spans.calibrate_layers, []

    def meddle(*arguments):
        for number, hidden in enumerate(real(*arguments)):
            yield hidden
            if not number and not beside:
                # Another node does the same from begin to end while this one is at it.
                beside.append(None)
                calibrate_first(tmp_path / "place")

    def calibrate_first(place):
        place.mkdir(exist_ok=True)
        layers = spans.next_span(variants.first, passages, tmp_path / "none", OPTIONS)
        spans.calibrate_span(variants.first, passages, layers, place, OPTIONS, "law", Silent())

    calibrate_first(tmp_path / "alone")
    monkeypatch.setattr(spans, "calibrate_layers", meddle)
    calibrate_first(tmp_path / "place")
    assert beside
    assert tree(tmp_path / "place") == tree(tmp_path / "alone")
    calibrate_first(tmp_path / "place")
    assert tree(tmp_path / "place") == tree(tmp_path / "alone")


def test_what_another_run_left_is_not_begun_with(siblings, both, tmp_path, spans_of_one_layer, caplog):
    place = tmp_path / "out" / ".code.building"
    place.mkdir(parents=True)
    (place / "hidden-00002.safetensors").write_bytes(b"stale")
    run(siblings, tmp_path / "out", "code")
    assert "unfinished work of another command is discarded" in caplog.text
    assert tree(tmp_path / "out" / "code") == tree(both.folder / "code")


def test_what_cannot_go_on_leaves_nothing(siblings, tmp_path):
    broken = write_checkpoint(tmp_path / "broken", base=siblings.base, noise=0.1, seed=9)
    name = "model.layers.1.block_sparse_moe.experts.2.w1.weight"
    edit_tensors(broken / "model.safetensors", lambda tensors: tensors[name].fill_(float("nan")))
    sources = {"code": FolderRef(siblings.tunes["code"]), "broken": FolderRef(broken)}
    paths = dict.fromkeys(sources, siblings.folder / "code.txt")
    with pytest.raises(DamagedInput, match="layer 1"):
        calibrate(open_variants(sources), paths, tmp_path / "out", OPTIONS)
    assert list((tmp_path / "out").glob(".*.building")) == []


def test_several_passes_are_added_on_disk(siblings, both, tmp_path, monkeypatch):
    monkeypatch.setattr(passes, "pass_tokens", lambda *_: 200)
    parts = run(siblings, tmp_path / "out", "code").calibration
    for index in both.index.layers:
        layer, other = both.layer("code", index), parts.layer("code", index)
        assert layer.num_tokens == other.num_tokens
        for slot, same in zip(layer.slots, other.slots, strict=True):
            assert slot.count == same.count
            assert slot.keys_S.equal(same.keys_S)


def test_base_tells_whether_a_text_suits(siblings, tmp_path):
    done = run(siblings, tmp_path / "out", "code", "law", base=True)
    told = {finding.where.split(",")[0] for finding in done.findings}
    for name, entry in done.calibration.index.variants.items():
        assert (f"variant {name}" in told) == (entry.base_nll_excess < 0)


def test_text_of_another_language_is_told(siblings, tmp_path, monkeypatch):
    def know_better(checkpoint, passages, *_):
        return [0.0 if checkpoint.label.endswith("base") else 1.0] * len(passages)

    monkeypatch.setattr(module, "measure_nll", know_better)
    (finding,) = run(siblings, tmp_path / "out", "code", base=True).findings
    assert finding.level == "warning"
    assert "the base predicts it better" in str(finding)


def test_weights_and_variants_must_be_those_calibrated(siblings, both, tmp_path):
    both.check(variants_of(siblings, "law"))
    other = write_checkpoint(tmp_path / "other", base=siblings.base, noise=0.1, seed=9)
    with pytest.raises(IncompatibleInputs, match="other weights than those given: code"):
        both.check(open_variants({"code": FolderRef(other)}))
    with pytest.raises(InvalidRecipe, match="not calibrated: novel"):
        both.check(open_variants({"novel": FolderRef(other)}))
    with pytest.raises(InvalidRecipe, match="not calibrated"):
        both.layer("novel", 0)


def test_folder_of_another_geometry_or_kind_is_refused(siblings, both, tmp_path):
    wide = write_checkpoint(tmp_path / "wide", settings={"num_experts": 8})
    paths = {"code": siblings.folder / "code.txt"}
    with pytest.raises(IncompatibleInputs, match="Choose another folder"):
        calibrate(open_variants({"code": FolderRef(wide)}), paths, both.folder, OPTIONS)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "letter.txt").write_text("dear")
    with pytest.raises(InvalidRecipe, match="not a calibration"):
        run(siblings, tmp_path / "full", "code")


def test_damage_is_told(both, tmp_path):
    copy = tmp_path / "copy"
    with pytest.raises(NotFound):
        open_calibration(copy)
    shutil.copytree(both.folder, copy)
    truncate(copy / "code" / layer_file(0), -10)
    with pytest.raises(DamagedInput):
        open_calibration(copy).layer("code", 0)
    (copy / "law" / layer_file(1)).unlink()
    with pytest.raises(NotFound):
        open_calibration(copy).layer("law", 1)
    edit_json(copy / INDEX, num_slots=5)
    with pytest.raises(DamagedInput, match="another geometry"):
        open_calibration(copy).layer("law", 0)
    edit_json(copy / INDEX, schema="moemerge/calibration@2")
    with pytest.raises(UnsupportedCheckpoint, match="@2"):
        open_calibration(copy)
    (copy / INDEX).write_text(json.dumps({"variants": 3}))
    with pytest.raises(DamagedInput):
        open_calibration(copy)
    (copy / INDEX).unlink()
    with pytest.raises(UnsupportedCheckpoint, match="not a calibration"):
        open_calibration(copy)
