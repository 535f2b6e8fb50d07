"""A bundle is whole, or it is said what is wrong with it."""

import hashlib
import json
import random
import shutil

import pytest

from moemerge.bundle.manifest import CHECKSUMS, MANIFEST
from moemerge.bundle.reader import open_bundle
from moemerge.bundle.verify import verify_bundle
from moemerge.errors import DamagedBundle, MoemergeError, UnsupportedCheckpoint
from tests.e2e.program import call_program, tree
from tests.factories import edit_header, edit_json, edit_tensors, flip_byte, truncate


def files_of(bundle):
    return sorted(path for path in bundle.rglob("*") if path.is_file())


def findings_of(bundle):
    with pytest.raises(DamagedBundle) as caught:
        verify_bundle(bundle)
    for finding in caught.value.findings:
        assert str(finding) in str(caught.value)
    return {(finding.code, finding.where) for finding in caught.value.findings}


def resign(bundle):
    """Make hashes agree, so that only the contents can tell."""
    files = tree(bundle)
    files.pop(CHECKSUMS)
    lines = [f"{hashlib.sha256(content).hexdigest()}  {name}\n" for name, content in sorted(files.items())]
    (bundle / CHECKSUMS).write_text("".join(lines))


def test_whole_bundle_is_whole(bundle):
    assert verify_bundle(bundle).manifest.variants.keys() == {"a", "b"}


@pytest.mark.parametrize("seed", range(4))
def test_flipped_byte_is_found_at_any_place_of_any_file(seed, bundle):
    places = random.Random(seed)
    for path in files_of(bundle):
        size = path.stat().st_size
        for offset in {0, size - 1, *(places.randrange(size) for _ in range(4))}:
            flip_byte(path, offset)
            with pytest.raises(MoemergeError) as caught:
                verify_bundle(bundle)
            assert caught.value.exit_code in (4, 8), (path, offset)
            name = path.relative_to(bundle).as_posix()
            if isinstance(caught.value, DamagedBundle) and path.name != CHECKSUMS:
                assert name in str(caught.value), offset
            flip_byte(path, offset)
    verify_bundle(bundle)


def test_single_flipped_bit_in_the_checksums_is_found(bundle):
    raw = (bundle / CHECKSUMS).read_bytes()
    for offset in range(0, len(raw), 13):
        for bit in range(8):
            changed = bytearray(raw)
            changed[offset] ^= 1 << bit
            (bundle / CHECKSUMS).write_bytes(changed)
            with pytest.raises(MoemergeError):
                verify_bundle(bundle)


def test_every_missing_file_is_named(made_bundle, tmp_path):
    for path in files_of(made_bundle):
        name = path.relative_to(made_bundle).as_posix()
        damaged = shutil.copytree(made_bundle, tmp_path / "damaged")
        (damaged / name).unlink()
        if name == MANIFEST:
            with pytest.raises(MoemergeError):
                verify_bundle(damaged)
        else:
            codes = {code for code, where in findings_of(damaged) if where in (name, str(damaged / name))}
            assert "FILE_MISSING" in codes
        shutil.rmtree(damaged)


@pytest.mark.parametrize("keep", [0, 1, 7, 8, 100, -1])
def test_truncated_file_is_found(keep, bundle):
    for path in files_of(bundle):
        raw = path.read_bytes()
        if keep < len(raw):
            truncate(path, keep)
            with pytest.raises(MoemergeError):
                verify_bundle(bundle)
            path.write_bytes(raw)
    verify_bundle(bundle)


@pytest.mark.parametrize("name", ["extra.txt", ".hidden", "pool/layer-00009.safetensors", "new/folder/x"])
def test_file_that_does_not_belong_is_named(name, bundle):
    (bundle / name).parent.mkdir(parents=True, exist_ok=True)
    (bundle / name).write_bytes(b"x")
    assert findings_of(bundle) == {("FILE_UNKNOWN", name)}


def test_all_damage_is_told_at_once(bundle):
    flip_byte(bundle / "README.md")
    flip_byte(bundle / "pool" / "layer-00000.safetensors")
    (bundle / "LICENSES" / "a-LICENSE").unlink()
    (bundle / "extra").write_text("x")
    assert {
        ("HASH", "README.md"),
        ("HASH", "pool/layer-00000.safetensors"),
        ("FILE_MISSING", "LICENSES/a-LICENSE"),
        ("FILE_UNKNOWN", "extra"),
    } <= findings_of(bundle)


def edit_manifest(edit):
    def damage(bundle):
        value = json.loads((bundle / MANIFEST).read_text())
        edit(value)
        (bundle / MANIFEST).write_text(json.dumps(value))

    return damage


def drop_pool_tensor(bundle):
    edit_tensors(bundle / "pool" / "layer-00000.safetensors", lambda tensors: tensors.pop("e00001.up"))


def add_pool_tensor(bundle):
    def edit(tensors):
        tensors["e00099.up"] = tensors["e00000.up"].clone()

    edit_tensors(bundle / "pool" / "layer-00000.safetensors", edit)


def reshape_pool_tensor(bundle):
    def edit(header):
        header["e00000.up"]["shape"].reverse()

    edit_header(bundle / "pool" / "layer-00000.safetensors", edit)


def add_own_tensor(bundle):
    path = bundle / "variants" / "a" / "tensors.safetensors"
    edit_tensors(path, lambda tensors: tensors.update(extra=tensors["lm_head.weight"].clone()))


def reshape_own_tensor(bundle):
    path = bundle / "variants" / "b" / "tensors.safetensors"
    edit_header(path, lambda header: header["lm_head.weight"]["shape"].reverse())


def rename_side_file(bundle):
    (bundle / "variants/a/tokenizer.json").rename(bundle / "variants/a/token.json")


SIGNED = [
    (drop_pool_tensor, "e00001.up"),
    (add_pool_tensor, "tensors that the manifest does not know"),
    (reshape_pool_tensor, "e00000.up has shape [32, 48], expected [48, 32]"),
    (add_own_tensor, "extra belongs to no variant"),
    (reshape_own_tensor, "lm_head.weight has shape [32, 64], expected [64, 32]"),
    (rename_side_file, "variants/a/tokenizer.json"),
    (edit_manifest(lambda m: m["variants"]["a"]["tensors"].pop("lm_head.weight")), "lm_head.weight"),
    (edit_manifest(lambda m: m["variants"]["a"]["tensors"].update(x="README.md")), "README.md"),
    (edit_manifest(lambda m: m.update(pool_bytes=m["pool_bytes"] - 1)), "pool_bytes"),
    (edit_manifest(lambda m: m["layers"].pop()), "layers"),
    (edit_manifest(lambda m: m["parts"].update(gate=[1, 1])), "shapes"),
    (edit_manifest(lambda m: m["variants"]["a"]["maps"].update({"0": [0, 0, 0, 0]})), "in no expert map"),
    (edit_manifest(lambda m: m["variants"]["a"]["maps"].update({"0": [0, 1, 2, 99]})), "does not fit"),
    (edit_manifest(lambda m: m["variants"]["a"]["maps"].update({"0": [0, 1, 2]})), "does not fit"),
    (edit_manifest(lambda m: m["variants"]["a"]["maps"].update({"0": [-1, 1, 2, 3]})), "does not fit"),
    (edit_manifest(lambda m: m["layers"].append(m["layers"][0])), "listed twice"),
]


@pytest.mark.parametrize(
    ("damage", "told"), SIGNED, ids=lambda value: value if isinstance(value, str) else None
)
def test_contradiction_is_found_where_all_hashes_agree(damage, told, bundle):
    damage(bundle)
    resign(bundle)
    with pytest.raises(DamagedBundle) as caught:
        verify_bundle(bundle)
    assert told in str(caught.value)


def test_folder_that_is_no_bundle_is_told_as_that(tmp_path):
    with pytest.raises(UnsupportedCheckpoint):
        verify_bundle(tmp_path)


def test_damaged_bytes_are_told_even_where_the_manifest_is_of_a_later_version(bundle):
    edit_json(bundle / MANIFEST, schema="moemerge/bundle@3")
    assert ("HASH", MANIFEST) in findings_of(bundle)
    resign(bundle)
    with pytest.raises(UnsupportedCheckpoint, match="format 3"):
        verify_bundle(bundle)


@pytest.mark.parametrize("seed", range(2))
def test_running_and_exporting_a_damaged_bundle_ends_without_a_traceback(seed, bundle, tmp_path):
    """Neither proves the bytes; what they cannot use they refuse by name."""
    places = random.Random(seed)
    for number, path in enumerate(files_of(bundle)):
        raw = path.read_bytes()
        header = min(len(raw), 200)  # where structure is
        flip_byte(path, places.randrange(header))
        for arguments in (
            ("run", bundle, "-v", "b", "word", "--max-tokens", "2"),
            ("export", bundle, "-v", "b", "-o", tmp_path / f"{number}"),
            ("show", bundle),
        ):
            assert call_program(*arguments).code in (0, 4, 5, 8), (path, arguments)
        path.write_bytes(raw)


def test_missing_side_file_is_named_when_it_is_needed(bundle, tmp_path):
    (bundle / "variants" / "b" / "tensors.safetensors").unlink()
    assert call_program("run", bundle, "-v", "a", "word", "--max-tokens", "1").code in (5, 8)
    (bundle / "variants" / "a" / "config.json").unlink()
    outcome = call_program("export", bundle, "-v", "a", "-o", tmp_path / "x")
    assert outcome.code in (5, 8)
    assert not (tmp_path / "x").exists()


def test_link_that_leads_out_of_the_bundle_is_not_followed(bundle, tmp_path):
    (tmp_path / "secret").write_text("private")
    (bundle / "notes").symlink_to(tmp_path / "secret")
    assert findings_of(bundle) == {("FILE_UNKNOWN", "notes")}


def test_opening_reads_nothing_but_the_manifest(bundle):
    for path in files_of(bundle):
        if path.name != MANIFEST:
            path.unlink()
    assert open_bundle(bundle).manifest.num_slots == 4


@pytest.mark.parametrize("name", [".gitattributes", ".cache/huggingface/x.lock", ".git/HEAD"])
def test_files_that_hubs_and_git_add_are_passed_over(name, bundle):
    (bundle / name).parent.mkdir(parents=True, exist_ok=True)
    (bundle / name).write_bytes(b"x")
    assert verify_bundle(bundle).folder == bundle


def test_symbolic_link_is_named(bundle, tmp_path):
    (bundle / "README.md").rename(tmp_path / "elsewhere.md")
    (bundle / "README.md").symlink_to(tmp_path / "elsewhere.md")
    assert findings_of(bundle) == {("LINK", "README.md")}
