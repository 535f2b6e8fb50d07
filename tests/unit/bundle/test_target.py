import pytest

from moemerge.bundle.target import building, locked
from moemerge.errors import Busy, InvalidRecipe


def test_two_builders_of_one_target_exclude_each_other(tmp_path):
    with building(tmp_path / "x") as folder:
        (folder / "f").write_text("mine")
        with pytest.raises(Busy), building(tmp_path / "x"):
            pass
    assert (tmp_path / "x" / "f").read_text() == "mine"
    assert [path.name for path in (tmp_path / "x").iterdir()] == ["f"]


def test_folder_that_moemerge_did_not_make_is_left_alone(tmp_path):
    (tmp_path / ".x.building").mkdir()
    (tmp_path / ".x.building" / "precious").write_text("kept")
    with pytest.raises(InvalidRecipe, match="not made by moemerge"), building(tmp_path / "x"):
        pass
    assert (tmp_path / ".x.building" / "precious").read_text() == "kept"


def test_builder_leaves_the_work_of_an_interrupted_merge(tmp_path):
    (tmp_path / ".x.staging").mkdir()
    (tmp_path / ".x.staging" / "journal.jsonl").write_text("work")
    with building(tmp_path / "x"):
        pass
    assert (tmp_path / ".x.staging" / "journal.jsonl").read_text() == "work"


def test_lock_leaves_nothing_behind(tmp_path):
    with locked(tmp_path / "x"):
        assert [path.name for path in tmp_path.iterdir()] == [".x.lock"]
    assert not list(tmp_path.iterdir())
