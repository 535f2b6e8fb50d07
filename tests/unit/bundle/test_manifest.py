"""Manifests that must be refused, and what a reader passes over."""

import contextlib
import json
import math

import pytest

from moemerge.bundle.export import exported_tensors
from moemerge.bundle.manifest import MANIFEST, check_path, dump_manifest, read_manifest
from moemerge.bundle.reader import open_bundle
from moemerge.bundle.verify import verify_bundle
from moemerge.checkpoint.variants import open_variants
from moemerge.consolidation.pipeline import merge
from moemerge.consolidation.task import options_of
from moemerge.errors import DamagedBundle, MoemergeError, NotFound, UnsupportedCheckpoint
from moemerge.refs import FolderRef
from moemerge.runner.engine import Engine
from moemerge.runner.options import EngineOptions
from tests.e2e.program import call_program
from tests.factories import write_checkpoint

PATHS = ["pool/x.safetensors", "moemerge.json", "variants/a/b c.json", "x/..y", "ä/ö"]
ESCAPES = [
    "..", "../x", "x/../../y", "x/..", "/x", "//x", "\\\\host\\x", "..\\x", "x\\y", "C:x", "C:/x", "C:\\x",
    "", ".", "./x", "x/./y", "x//y", "x/", "x\ny", "x\0y", "file://x",
]  # fmt: skip


@pytest.mark.parametrize("path", PATHS)
def test_path_inside_the_bundle_is_accepted(path):
    assert check_path(path) == path


@pytest.mark.parametrize("path", ESCAPES)
def test_path_that_leaves_the_bundle_is_refused(path):
    with pytest.raises(ValueError, match="leaves the bundle"):
        check_path(path)


def rewrite(bundle, edit):
    path = bundle / MANIFEST
    value = json.loads(path.read_text())
    edit(value)
    path.write_text(json.dumps(value))


@pytest.mark.parametrize("escape", ["../x", "/etc/passwd", "x\\y"])
@pytest.mark.parametrize(
    "place",
    [
        lambda manifest, path: manifest["layers"][0].update(file=path),
        lambda manifest, path: manifest["variants"]["a"]["tensors"].update({"lm_head.weight": path}),
        lambda manifest, path: manifest["variants"]["a"]["files"].update({"config.json": path}),
        lambda manifest, path: manifest["variants"]["a"]["files"].update({path: "README.md"}),
        lambda manifest, path: manifest["variants"].update({path: manifest["variants"]["a"]}),
    ],
    ids=["pool file", "tensor", "side file", "name of a side file", "variant"],
)
def test_no_path_of_a_manifest_leaves_the_bundle(place, escape, bundle):
    rewrite(bundle, lambda manifest: place(manifest, escape))
    with pytest.raises(DamagedBundle) as caught:
        read_manifest(bundle)
    assert str(bundle / MANIFEST) in str(caught.value)


def test_manifest_survives_a_round_trip(bundle):
    manifest = read_manifest(bundle)
    assert dump_manifest(manifest) == (bundle / MANIFEST).read_text()


def test_keys_and_optional_features_of_a_later_minor_version_are_passed_over(bundle):
    before = read_manifest(bundle)

    def edit(manifest):
        manifest["schema"] = "moemerge/bundle@1.7"
        manifest["features"]["optional"] = ["sparkles"]
        manifest["news"] = {"a": 1}
        manifest["layers"][0]["temperature"] = 3
        manifest["variants"]["a"]["colour"] = "red"

    rewrite(bundle, edit)
    after = read_manifest(bundle)
    assert after.layers == before.layers
    assert after.variants == before.variants
    open_bundle(bundle).tensors("a")


def test_required_feature_that_is_unknown_is_named(bundle):
    rewrite(bundle, lambda manifest: manifest["features"].update(required=["sparkles", "time-travel"]))
    with pytest.raises(UnsupportedCheckpoint, match="sparkles, time-travel") as caught:
        read_manifest(bundle)
    assert "newer moemerge" in str(caught.value)


@pytest.mark.parametrize("rest", [{}, {"features": {"required": ["residuals"]}, "layers": "elsewhere"}])
def test_later_major_version_is_told_even_where_nothing_else_is_as_it_was(rest, bundle):
    text = {"schema": "moemerge/bundle@2", "features": {"required": []}, **rest}
    (bundle / MANIFEST).write_text(json.dumps(text))
    with pytest.raises(UnsupportedCheckpoint, match="format 2"):
        read_manifest(bundle)


@pytest.mark.parametrize(
    "schema", ["moemerge/bundle", "moemerge/plan@1", "bundle@1", "", "moemerge/bundle@1x"]
)
def test_other_schema_is_refused(schema, bundle):
    rewrite(bundle, lambda manifest: manifest.update(schema=schema))
    with pytest.raises(DamagedBundle, match="schema"):
        read_manifest(bundle)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"\xff", b"[" * 10_000, b'{"schema": 1}'])
def test_file_that_is_no_manifest_is_refused(content, bundle):
    (bundle / MANIFEST).write_bytes(content)
    with pytest.raises(DamagedBundle, match=r"moemerge\.json"):
        read_manifest(bundle)


def test_folder_without_manifest_and_no_folder_are_told_apart(tmp_path):
    with pytest.raises(UnsupportedCheckpoint, match="not a bundle"):
        read_manifest(tmp_path)
    with pytest.raises(NotFound):
        read_manifest(tmp_path / "missing")


def entries(value, path=()):
    """Every key path of a JSON value; of equal siblings in long lists only the first two."""
    yield path
    items = (
        value.items() if isinstance(value, dict) else enumerate(value[:2]) if isinstance(value, list) else ()
    )
    for key, item in items:
        yield from entries(item, (*path, key))


def replace_at(value, path, new):
    *outer, last = path
    for step in outer:
        value = value[step]
    if new is DELETE:
        del value[last]
    else:
        value[last] = new


DELETE = object()
WRONG = [DELETE, None, True, -1, 0, 10**12, math.nan, "other", [], {}]


def use_every_way(folder, variant="b"):
    """What commands do with a bundle; each may refuse it, none may fail in another way."""

    def run():
        bundle = open_bundle(folder)
        exported_tensors(bundle, variant)
        options = EngineOptions(variants=(variant,), cache_memory=2**20)
        with contextlib.closing(Engine(bundle, options)) as engine:
            list(engine.generate(variant, [3, 4], max_tokens=1))

    for use in (run, lambda: verify_bundle(folder)):
        with contextlib.suppress(MoemergeError):
            use()
    assert call_program("show", folder).code != 1


@pytest.mark.parametrize("wrong", WRONG, ids=lambda value: "delete" if value is DELETE else repr(value))
def test_wrong_value_anywhere_is_refused_or_harmless(wrong, bundle):
    """No traceback, whatever a hand or a broken disk has put into the manifest."""
    text = (bundle / MANIFEST).read_text()
    for path in entries(json.loads(text)):
        if path and (path[:2] != ("variants", "a") and "tensors" not in path[:-1]):
            rewrite(bundle, lambda manifest, path=path: replace_at(manifest, path, wrong))
            try:
                use_every_way(bundle)
            except Exception as error:
                raise AssertionError(f"{'.'.join(map(str, path))} = {wrong!r}") from error
            (bundle / MANIFEST).write_text(text)


@pytest.mark.parametrize("text", ["[0", "0", '["first"]', None])
def test_setting_that_is_no_list_is_refused(text, tmp_path):
    folder = write_checkpoint(tmp_path / "one", "qwen3_moe", settings={"dense_layers": "[0]"})
    merge(open_variants({"one": FolderRef(folder)}), tmp_path / "x.moe", options_of("exact"))
    rewrite(tmp_path / "x.moe", lambda m: m["variants"]["one"]["settings"].update(dense_layers=text))
    with pytest.raises(DamagedBundle, match=r"dense_layers is .* expected the text of a list of integers"):
        open_bundle(tmp_path / "x.moe")
