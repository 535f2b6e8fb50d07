"""`moemerge add` and `remove` as a user runs them: what others compute with stays as it is."""

import shutil
from pathlib import Path

import pytest

from moemerge.bundle.export import export_variant
from moemerge.bundle.reader import open_bundle
from moemerge.consolidation.staging import Staging
from tests.e2e.program import call_program, tree
from tests.factories import write_siblings

NAMES = ("code", "law", "novel")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three fine-tunes, and a bundle of the first two."""
    folder = tmp_path_factory.mktemp("joining")
    write_siblings(folder, names=NAMES)
    (folder / "novel.txt").write_text("it was a dark night. " * 100)
    merged = call_program(
        "merge", "code=./code", "law=./law", "-o", "duo.moe", "--budget", "0.8x", cwd=folder
    )
    assert merged.code == 0, merged.err
    return folder


def add(folder, *options):
    return call_program("add", "duo.moe", "novel=./novel", *options, "--json", cwd=folder)


def exported(bundle: Path, name: str, target: Path) -> dict[str, bytes]:
    export_variant(open_bundle(bundle), name, target)
    return tree(target)


@pytest.mark.parametrize("evidence", [(), ("--text", "novel.txt")], ids=["noise", "text"])
def test_newcomer_leaves_the_others_as_they_are_and_its_own_removal_does_too(folder, tmp_path, evidence):
    trio, back = tmp_path / "trio.moe", tmp_path / "back.moe"
    joined = add(folder, "--budget", "+0.4x", *evidence, "-o", trio)
    assert joined.code == 0, joined.err
    data = joined.envelope["data"]
    assert data["variants"] == [*NAMES]
    unit = open_bundle(trio).manifest.variant_bytes
    assert 0 < data["added_bytes"] <= 0.4 * unit
    assert data["evidence"].startswith("text:" if evidence else "noise")
    assert not list(folder.glob(".*calibration*"))
    left = call_program("remove", trio, "novel", "-o", back, "--json")
    assert left.code == 0, left.err
    assert left.envelope["data"]["freed_bytes"] == data["added_bytes"]
    for bundle in (trio, back):
        assert call_program("verify", bundle).code == 0
    for name in NAMES[:2]:
        before = exported(folder / "duo.moe", name, tmp_path / f"before-{name}")
        for number, bundle in enumerate((trio, back)):
            assert exported(bundle, name, tmp_path / f"{name}-{number}") == before


def test_newcomer_stopped_before_it_takes_the_place_continues_when_added_again(folder, tmp_path, monkeypatch):
    def stop(*_arguments, **_options):
        raise KeyboardInterrupt

    bundle, trio = tmp_path / "duo.moe", tmp_path / "trio.moe"
    shutil.copytree(folder / "duo.moe", bundle)
    again = ("add", bundle, f"novel={folder / 'novel'}", "--json")
    with monkeypatch.context() as patched:
        patched.setattr(Staging, "publish", stop)
        assert call_program(*again).code == 130
    assert tree(bundle) == tree(folder / "duo.moe")
    joined = call_program(*again)
    assert joined.code == 0, joined.err
    assert joined.envelope["data"]["resumed_layers"] == 2
    assert [path.name for path in tmp_path.iterdir()] == ["duo.moe"]
    assert add(folder, "-o", trio).code == 0
    assert tree(bundle) == tree(trio)


def test_newcomer_answers(folder, tmp_path):
    trio = tmp_path / "trio.moe"
    assert add(folder, "-o", trio).code == 0
    ran = call_program("run", trio, "-v", "novel", "-v", "code", "a word", "--max-tokens", 3, "--json")
    assert ran.code == 0, ran.err
    assert [answer["variant"] for answer in ran.envelope["data"]["answers"]] == ["novel", "code"]


def test_exact_newcomer_is_bit_identical(folder, tmp_path):
    trio = tmp_path / "trio.moe"
    assert add(folder, "--budget", "exact", "-o", trio).code == 0
    back = call_program("export", trio, "-v", "novel", "-o", tmp_path / "novel")
    assert back.code == 0, back.err
    found = call_program("diff", tmp_path / "novel", folder / "novel", "--json").envelope["data"]
    assert found["equal"]


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("add", "duo.moe", "law=./novel"), 3, "holds a variant law already"),
        (("add", "none.moe", "novel=./novel"), 5, "none.moe"),
        (("add", "duo.moe", "novel=./none"), 5, "none"),
        (("add", "duo.moe", "novel=./novel", "--budget", "much"), 3, "neither exact"),
        (("add", "duo.moe", "novel=./novel", "--text", "none.txt"), 5, "no such text file"),
        (("remove", "duo.moe", "novel"), 5, "no variant 'novel'"),
        (("remove", "none.moe", "law"), 5, "none.moe"),
    ],
)
def test_what_cannot_be_is_refused_and_nothing_is_left(folder, arguments, code, words):
    before = sorted(path.name for path in folder.iterdir())
    done = call_program(*arguments, cwd=folder)
    assert done.code == code, done.err
    assert words in done.err
    assert sorted(path.name for path in folder.iterdir()) == before
