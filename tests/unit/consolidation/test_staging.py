"""Work in progress: what a run after a killed one may rely on."""

import hashlib

import pytest
from filelock import FileLock

from moemerge.bundle.target import staging_folder
from moemerge.consolidation.staging import open_staging
from moemerge.errors import Busy, DamagedInput, InvalidRecipe, NotEnoughRoom
from tests.e2e.program import tree


class Killed(BaseException):
    """Ends a run as a kill does: nothing is tidied up but what the system tidies."""


def work(target, steps, *, task="task", publish=False, restart=False):
    """Finish steps, each with a file of its own; returns the steps that had to be done."""
    done = []
    with open_staging(target, task, restart=restart) as staging:
        for step in steps:
            if staging.finished(step) is None:
                content = step.encode()
                (staging.folder / step).write_bytes(content)
                digest = hashlib.sha256(content).hexdigest()
                staging.finish(step, {step: digest}, {"length": len(step)})
                done.append(step)
        if publish:
            staging.publish(target, set(steps))
    return done


def fail_after_a_step(target, error):
    with open_staging(target, "task") as staging:
        staging.finish("one", {})
        raise error


@pytest.fixture
def target(tmp_path):
    return tmp_path / "out" / "x.moe"


def test_finished_steps_are_not_done_again(target):
    assert work(target, ["one", "two"]) == ["one", "two"]
    assert work(target, ["one", "two", "three"]) == ["three"]
    with open_staging(target, "task") as staging:
        assert staging.finished("two") == {"length": 3}
        assert staging.finished("four") is None
        assert staging.finished_bytes() == len("onetwothree")


@pytest.mark.parametrize("cut", range(1, 60, 7))
def test_journal_cut_within_a_line_loses_that_step_only(cut, target):
    work(target, ["one", "two"])
    journal = staging_folder(target) / "journal.jsonl"
    whole = journal.read_bytes()
    last = len(whole.splitlines(keepends=True)[-1])
    journal.write_bytes(whole[: -min(cut, last - 1)])
    assert work(target, ["one", "two"]) == ["two"]
    assert work(target, ["one", "two"]) == []


def test_journal_cut_within_its_first_line_starts_anew(target):
    work(target, ["one", "two"])
    journal = staging_folder(target) / "journal.jsonl"
    journal.write_bytes(journal.read_bytes()[:5])
    assert work(target, ["one", "two"]) == ["one", "two"]


@pytest.mark.parametrize("junk", [b"\x00" * 40 + b"\n", b"[]\n", b"not json\n", b'{"step": 1}\n', b"\xff\n"])
def test_journal_with_junk_starts_anew(junk, target):
    work(target, ["one", "two"])
    journal = staging_folder(target) / "journal.jsonl"
    journal.write_bytes(journal.read_bytes() + junk)
    assert work(target, ["one", "two"]) == ["one", "two"]


@pytest.mark.parametrize("damage", ["change", "remove", "lengthen"])
def test_finished_file_that_was_tampered_with_is_done_again(damage, target):
    work(target, ["one", "two"])
    path = staging_folder(target) / "one"
    if damage == "remove":
        path.unlink()
    else:
        path.write_bytes(b"ONE" if damage == "change" else b"one and more")
    assert work(target, ["one", "two"]) == ["one"]
    assert path.read_bytes() == b"one"


def test_other_task_and_restart_discard_what_is_there(target):
    work(target, ["one"])
    assert work(target, ["one"], task="other") == ["one"]
    assert work(target, ["one"], task="other", restart=True) == ["one"]
    assert work(target, ["one"], task="other") == []


def test_publishing_keeps_what_is_named_and_leaves_nothing_else(target):
    work(target, ["one"])
    (staging_folder(target) / "folder").mkdir()
    (staging_folder(target) / "folder" / "rest").write_text("of an earlier attempt")
    work(target, ["one", "two"], publish=True)
    assert tree(target) == {"one": b"one", "two": b"two"}
    assert list(target.parent.iterdir()) == [target]


def test_killed_run_keeps_its_steps_and_releases_the_lock(target):
    with pytest.raises(Killed):
        fail_after_a_step(target, Killed())
    with open_staging(target, "task") as staging:
        assert staging.finished("one") == {}
    assert not target.exists()


@pytest.mark.parametrize("error", [InvalidRecipe("no"), DamagedInput("no")])
def test_run_that_cannot_succeed_keeps_nothing(error, target):
    with pytest.raises(type(error)):
        fail_after_a_step(target, error)
    assert list(target.parent.iterdir()) == []


def test_run_without_room_keeps_its_steps(target):
    with pytest.raises(NotEnoughRoom):
        fail_after_a_step(target, NotEnoughRoom("full"))
    with open_staging(target, "task") as staging:
        assert staging.finished("one") == {}


def test_locked_target_is_busy_and_left_alone(target):
    work(target, ["one"])
    with FileLock(target.with_name(f".{target.name}.lock")), pytest.raises(Busy, match=r"x\.moe"):
        work(target, ["one"], restart=True)
    assert work(target, ["one"]) == []


def test_target_that_came_into_being_meanwhile_is_refused(target):
    work(target, ["one"])
    target.mkdir()
    with pytest.raises(InvalidRecipe, match="exists already"):
        work(target, ["one"], publish=True)
    assert list(target.iterdir()) == []


def test_file_in_place_of_the_folder_is_told(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(NotEnoughRoom, match="cannot be written"):
        work(tmp_path / "file" / "x.moe", ["one"])
