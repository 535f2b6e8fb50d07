"""Coded pool experts and residuals: what a manifest may say of them, and what files must hold."""

import json
import re
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError

from moemerge.bundle.coded import StoredCodes, StoredLowRank
from moemerge.bundle.export import effective_parts, export_variant
from moemerge.bundle.manifest import CodeSpec, Manifest, dump_manifest, map_bytes, read_manifest
from moemerge.bundle.reader import open_bundle
from moemerge.bundle.verify import verify_bundle
from moemerge.bundle.writer import write_pool, write_residuals
from moemerge.checkpoint.headers import StoredTensor, read_header
from moemerge.errors import DamagedBundle, MoemergeError
from moemerge.models.packed import WIDTHS, PackedMatrix, effective, pack_codes, unpack
from tests.bundles import write_bundle
from tests.coded import bits, code, dense, low_rank, quantise, random_matrix, sign, write_coded
from tests.e2e.program import tree
from tests.factories import edit_header, edit_tensors, read_canonical
from tests.unit.bundle.test_manifest import DELETE, WRONG, entries, replace_at, rewrite, use_every_way

ROOT = Path(__file__).parents[3]
POOL = [bits(4, 32), None, bits(8)]
RESIDUALS = [None, bits(2, 16), low_rank(3), bits(1)]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return open_bundle(write_bundle(tmp_path_factory.mktemp("source"), dtype="BF16"))


@pytest.fixture
def coded(source, tmp_path):
    """A bundle with codes of every kind."""
    return write_coded(source, tmp_path / "x.moe", pool=POOL, residuals=RESIDUALS)


@pytest.mark.parametrize(
    ("values", "complaint"),
    [
        ({"kind": "bits", "bits": 7}, "bits"),
        ({"kind": "bits", "bits": 16}, "1 to 8 bits"),
        ({"kind": "bits", "bits": 4, "rank": 2}, "no rank"),
        ({"kind": "bits", "bits": 4, "group": 0}, "greater than 0"),
        ({"kind": "low_rank", "bits": 16}, "a rank"),
        ({"kind": "low_rank", "bits": 16, "rank": 0}, "greater than 0"),
        ({"kind": "low_rank", "bits": 16, "rank": 2, "group": 8}, "no group"),
        ({"kind": "low_rank", "bits": 8, "rank": 2}, "16 bits"),
        ({"kind": "zip", "bits": 4}, "kind"),
    ],
)
def test_a_code_that_cannot_be_is_refused(values, complaint):
    with pytest.raises(ValidationError, match=complaint):
        CodeSpec(**values)


def test_every_width_is_a_code_and_nothing_else_is():
    for number in range(20):
        if number in WIDTHS:
            assert bits(number).bits == number
        else:
            with pytest.raises(ValidationError):
                bits(number)


@pytest.mark.parametrize("spec", [bits(1), bits(3, 20), bits(8, 16), bits(4, 10**9), low_rank(3)])
def test_bytes_are_foretold(spec):
    assert spec.part_bytes(12, 48) == code(random_matrix(12, 48), spec).nbytes


CONTRADICTIONS = [
    (lambda m: m["layers"][0]["codes"].pop(), "4 codes, expected 5"),
    (
        lambda m: m["layers"][0]["codes"][0].update(kind="low_rank", bits=16, group=None, rank=2),
        "codes of bits",
    ),
    (lambda m: m["layers"][0].update(dtype=None), "no dtype of effective experts"),
    (lambda m: m["layers"][0].update(dtype="U8"), "dtype"),
    (lambda m: m["variants"]["plain"]["residuals"]["0"].pop(), "residuals of 3 slots, expected 4"),
    (lambda m: m["variants"]["plain"]["residuals"].update({"7": [None] * 4}), "in a layer that has a pool"),
    (lambda m: m["variants"]["plain"].update(damage={"predicted": "much"}), "damage"),
    (lambda m: m.update(residual_bytes=-1), "residual_bytes"),
    (lambda m: m["features"]["required"].remove("residuals"), "residuals is there"),
    (lambda m: m["features"]["required"].remove("quantised-pool"), "quantised-pool is there"),
    (lambda m: m["parts"].update(gate=[48, 33]), "a multiple of 8 columns"),
]


@pytest.mark.parametrize(("edit", "complaint"), CONTRADICTIONS, ids=[c for _, c in CONTRADICTIONS])
def test_a_manifest_that_contradicts_itself_is_refused(edit, complaint, coded):
    rewrite(coded.folder, edit)
    with pytest.raises(DamagedBundle, match=complaint):
        read_manifest(coded.folder)


@pytest.mark.parametrize("feature", ["residuals", "quantised-pool"])
def test_a_feature_that_nothing_needs_is_refused(feature, bundle):
    rewrite(bundle, lambda manifest: manifest["features"].update(required=[feature]))
    with pytest.raises(DamagedBundle, match=f"{feature} is not there"):
        read_manifest(bundle)


def test_manifest_survives_a_round_trip_and_damage_is_kept(coded):
    values = {"predicted": 0.25, "measured": 0.5}
    rewrite(coded.folder, lambda manifest: manifest["variants"]["odd"].update(damage=values))
    manifest = read_manifest(coded.folder)
    assert manifest.variants["odd"].damage == values
    assert Manifest.model_validate_json(dump_manifest(manifest)) == manifest


def test_bytes_ratio_counts_pool_residuals_and_maps(coded):
    manifest = coded.manifest
    stored = (*coded.folder.glob("pool/*"), *coded.folder.glob("residuals/*/*"))
    tensors = sum(tensor.nbytes for path in stored for tensor in read_header(path).values())
    assert manifest.pool_bytes + manifest.residual_bytes == tensors
    assert map_bytes(4, 2, 4) == 4 * 4 * 2 * 4
    assert manifest.bytes_ratio == (tensors + 128) / manifest.variant_bytes


def test_a_manifest_of_before_has_neither_codes_nor_residuals(bundle):
    def edit(manifest):
        del manifest["residual_bytes"]
        for layer in manifest["layers"]:
            del layer["codes"], layer["dtype"]
        for variant in manifest["variants"].values():
            del variant["residuals"], variant["damage"]

    before = read_manifest(bundle)
    rewrite(bundle, edit)
    assert read_manifest(bundle) == before
    opened = open_bundle(bundle)
    assert opened.residuals("a", 0) == opened.map_residuals("a", 0) == [None] * 4


def test_places_have_the_form_that_the_manifest_says(coded):
    kinds = {None: set(), "bits": set(), "low_rank": set()}
    for layer in coded.manifest.layers:
        for spec, parts in zip(layer.codes, coded.pool(layer.index), strict=True):
            kinds[spec.kind if spec else None] |= {type(matrix) for matrix in parts.values()}
            assert {part: list(matrix.shape) for part, matrix in parts.items()} == coded.manifest.parts
        for name, entry in coded.manifest.variants.items():
            slots = coded.residuals(name, layer.index)
            for spec, parts in zip(entry.residuals[layer.index], slots, strict=True):
                assert (spec is None) == (parts is None)
                for part, matrix in (parts or {}).items():
                    kinds[spec.kind].add(type(matrix))
                    assert list(matrix.shape) == coded.manifest.parts[part]
                    assert matrix.nbytes == spec.part_bytes(*matrix.shape)
    assert kinds == {None: {StoredTensor}, "bits": {StoredCodes}, "low_rank": {StoredLowRank}}


def test_what_was_written_is_read(tmp_path, source):
    """Pool experts and residuals of random codes, bit for bit."""
    bundle = write_coded(source, tmp_path / "x.moe", pool=POOL, residuals=RESIDUALS)
    own = source.map_pool(0)
    first = source.variant("plain").maps[0]
    for number, parts in enumerate(bundle.map_pool(0)[:4]):
        spec = bundle.layer(0).code(number)
        for part, matrix in parts.items():
            expected = own[first[number]][part]
            assert torch.equal(dense(matrix), dense(code(expected, spec) if spec else expected))
    residuals = bundle.map_residuals("plain", 0)
    for slot, parts in enumerate(residuals):
        spec = bundle.variant("plain").residual(0, slot)
        assert (parts is None) == (spec is None)
        for part, matrix in (parts or {}).items():
            difference = own[first[slot]][part].float() - dense(bundle.map_pool(0)[slot][part])
            assert torch.equal(matrix.dense(), code(difference, spec).dense())


def test_the_same_tensors_give_the_same_bytes(source, tmp_path):
    trees = [
        tree(write_coded(source, tmp_path / name, pool=POOL, residuals=RESIDUALS).folder) for name in "ab"
    ]
    assert trees[0] == trees[1]


def test_slots_without_residuals_make_no_file(tmp_path):
    assert write_residuals(tmp_path, "a", 0, [None, None]) == {}
    assert not list(tmp_path.iterdir())


def test_names_and_dtypes_in_files(tmp_path):
    parts = {"gate": quantise(random_matrix(8, 16), 5, 8)}
    repair = {"gate": code(random_matrix(8, 16), low_rank(2))}
    (pool_name,) = write_pool(tmp_path, 3, [parts])
    (name,) = write_residuals(tmp_path, "law", 3, [None, parts, repair])
    assert (pool_name, name) == ("pool/layer-00003.safetensors", "residuals/law/layer-00003.safetensors")
    forms = {key: (tensor.dtype, tensor.shape) for key, tensor in read_header(tmp_path / name).items()}
    assert forms == {
        "s00001.gate.codes": ("U8", (8, 10)),
        "s00001.gate.scales": ("BF16", (8, 2)),
        "s00002.gate.left": ("BF16", (8, 2)),
        "s00002.gate.right": ("BF16", (2, 16)),
    }
    assert list(read_header(tmp_path / pool_name)) == ["e00000.gate.scales", "e00000.gate.codes"]


def test_a_coded_bundle_is_whole(coded):
    assert verify_bundle(coded.folder).manifest == coded.manifest


def drop(file, name):
    return lambda bundle: edit_tensors(bundle / file, lambda tensors: tensors.pop(name))


def add(file):
    return lambda bundle: edit_tensors(bundle / file, lambda tensors: tensors.update(x=torch.zeros(3)))


def change_header(file, name, **changes):
    return lambda bundle: edit_header(bundle / file, lambda header: header[name].update(**changes))


POOL_FILE, RESIDUAL_FILE = "pool/layer-00000.safetensors", "residuals/plain/layer-00000.safetensors"
DAMAGES = [
    (drop(POOL_FILE, "e00000.up.codes"), "no tensor e00000.up.codes"),
    (drop(POOL_FILE, "e00000.up.scales"), "no tensor e00000.up.scales"),
    (drop(RESIDUAL_FILE, "s00002.up.left"), "no tensor s00002.up.left"),
    (add(POOL_FILE), "tensors that the manifest does not know; first x"),
    (add(RESIDUAL_FILE), "tensors that the manifest does not know; first x"),
    (change_header(POOL_FILE, "e00000.up.codes", shape=[16, 48]), "e00000.up.codes has shape"),
    (change_header(POOL_FILE, "e00000.up.codes", dtype="I8"), "e00000.up.codes is I8, expected U8"),
    (change_header(RESIDUAL_FILE, "s00001.up.scales", dtype="F16"), "is F16, expected BF16"),
    (
        lambda bundle: rewrite(bundle, lambda m: m.update(residual_bytes=m["residual_bytes"] + 1)),
        "residual_bytes",
    ),
    (lambda bundle: rewrite(bundle, lambda m: m.update(pool_bytes=m["pool_bytes"] + 1)), "pool_bytes"),
    (lambda bundle: (bundle / RESIDUAL_FILE).unlink(), "no such file"),
    (
        lambda bundle: (bundle / RESIDUAL_FILE).with_name("layer-00009.safetensors").write_bytes(b"x"),
        "no variant has residuals there",
    ),
]


@pytest.mark.parametrize(("damage", "told"), DAMAGES, ids=[told for _, told in DAMAGES])
def test_contradiction_is_found_where_all_hashes_agree(damage, told, coded):
    damage(coded.folder)
    sign(coded.folder)
    with pytest.raises(MoemergeError) as caught:
        verify_bundle(coded.folder)
    assert told in str(caught.value)


def test_export_writes_effective_experts(coded, tmp_path):
    for name, entry in coded.manifest.variants.items():
        export_variant(coded, name, tmp_path / name)
        exported = read_canonical(tmp_path / name)
        for layer in coded.manifest.layers:
            pool, residuals = coded.map_pool(layer.index), coded.map_residuals(name, layer.index)
            for slot, index in enumerate(entry.maps[layer.index]):
                for part, matrix in pool[index].items():
                    residual = residuals[slot][part] if residuals[slot] else None
                    expected = effective(matrix, residual, torch.bfloat16)
                    assert torch.equal(exported[f"experts.{layer.index}.{slot}.{part}"], expected)


def test_export_copies_what_needs_no_computing(coded):
    slots = effective_parts(coded, "plain", 0)
    plain = [type(parts["up"]) is StoredTensor for parts in slots]
    assert plain == [
        coded.layer(0).code(slot) is None and coded.variant("plain").residual(0, slot) is None
        for slot in range(4)
    ]


@pytest.mark.parametrize("wrong", WRONG, ids=lambda value: "delete" if value is DELETE else repr(value))
def test_wrong_value_in_what_is_coded_is_refused_or_harmless(wrong, coded):
    path = coded.folder / "moemerge.json"
    text = path.read_text()
    values = json.loads(text)
    for place in entries(values):
        if {"codes", "dtype", "residuals", "residual_bytes"} & set(place) and "large" not in place:
            rewrite(coded.folder, lambda manifest, place=place: replace_at(manifest, place, wrong))
            try:
                use_every_way(coded.folder, "plain")
            except Exception as error:
                raise AssertionError(f"{'.'.join(map(str, place))} = {wrong!r}") from error
            path.write_text(text)


def test_the_example_in_the_format_is_right():
    text = (ROOT / "docs" / "bundle-format.md").read_text(encoding="utf-8")
    rows = dict.fromkeys(("codes", "bytes", "scales", "values"))
    name = ""
    for line in re.search(r"```text\n(codes.*?)```", text, re.DOTALL)[1].splitlines():
        name = line[:9].strip() or name
        rows[name] = [*(rows[name] or []), line[9:].split()]
    packed = torch.tensor([[int(byte, 16) for byte in row] for row in rows["bytes"]], dtype=torch.uint8)
    scales = torch.tensor([[float(scale) for scale in row] for row in rows["scales"]]).bfloat16()
    matrix = PackedMatrix(packed, scales, 3, 4)
    assert matrix.dense().tolist() == [[float(value) for value in row] for row in rows["values"]]
    codes = torch.tensor([[int(c) for c in row] for row in rows["codes"]], dtype=torch.uint8)
    assert torch.equal(unpack(packed, 3), codes)
    assert torch.equal(pack_codes(codes, 3), packed)
