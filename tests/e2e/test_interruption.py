"""Merges that are killed, stopped, or in each other's way."""

import json
import multiprocessing
import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest

from moemerge.checkpoint.variants import open_variants
from moemerge.consolidation import pipeline
from moemerge.consolidation.task import options_of
from moemerge.refs import FolderRef
from tests.e2e.program import call_program, run_program, start_slow_program, tree
from tests.factories import edit_tensors, read_canonical, write_siblings

NAMES = ("code", "law", "sums")


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    """Fine-tunes large enough that killing them takes effect somewhere in the middle."""
    folder = tmp_path_factory.mktemp("family")
    write_siblings(folder, names=NAMES, settings={"hidden_size": 64, "expert_size": 192, "num_layers": 8})
    return folder


def sources(family: Path) -> list[str]:
    return [f"{name}={family / name}" for name in NAMES]


def merge_all(family: Path, target: Path) -> None:
    """What the killed processes do."""
    variants = open_variants({name: FolderRef(family / name) for name in NAMES})
    pipeline.merge(variants, target, options_of("1.5x", None, within=False))


@pytest.fixture(scope="module")
def whole(family, tmp_path_factory):
    """The bundle of a merge that nobody disturbs, and the seconds it took."""
    target = tmp_path_factory.mktemp("whole") / "trio.moe"
    begin = time.perf_counter()
    merge_all(family, target)
    return tree(target), time.perf_counter() - begin


@pytest.fixture(scope="module")
def children():
    """A server that has imported everything, whose children start at once."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    return context


@pytest.mark.parametrize("seed", range(3))
def test_merge_killed_at_random_moments_gives_the_bytes_of_an_undisturbed_one(
    seed, family, whole, children, tmp_path
):
    expected, seconds = whole
    target = tmp_path / "trio.moe"
    moments = random.Random(seed)
    kills = 0
    for _ in range(40):
        child = children.Process(target=merge_all, args=(family, target))
        child.start()
        if kills < 6:
            child.join(moments.uniform(0, seconds))
        if child.is_alive() and kills < 6:
            assert child.pid is not None
            os.kill(child.pid, signal.SIGKILL)
            kills += 1
        child.join()
        if not target.exists():
            assert child.exitcode == -signal.SIGKILL
        elif kills:
            break
        else:  # quicker than the first moment that was drawn: begin again
            shutil.rmtree(target)
    assert kills > 0
    assert tree(target) == expected
    assert list(tmp_path.iterdir()) == [target]


def wait_for_step(target: Path, step: str) -> None:
    journal = target.with_name(f".{target.name}.staging") / "journal.jsonl"
    for _ in range(3000):
        if journal.exists() and any(f'"{step}"' in line for line in journal.read_text().splitlines()):
            return
        time.sleep(0.01)
    raise AssertionError(f"{step} was never finished")


def test_rerun_after_kill_continues_and_says_so(family, whole, tmp_path):
    target = tmp_path / "trio.moe"
    command = ["merge", *sources(family), "-o", target, "--budget", "1.5x"]
    process = start_slow_program(*command)
    wait_for_step(target, "pool 1")
    process.kill()
    assert process.wait() == -signal.SIGKILL
    process.communicate()
    assert not target.exists()
    again = run_program(*command)
    assert again.code == 0
    assert "layers from the run before" in again.out
    assert tree(target) == whole[0]
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_stopped_merge_hints_at_continuing(number, code, family, tmp_path):
    target = tmp_path / "trio.moe"
    process = start_slow_program("merge", *sources(family), "-o", target, "--budget", "1.5x")
    wait_for_step(target, "similarity 1")
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == code
    assert "run the same command again to continue" in err
    assert "Traceback" not in err
    assert out == ""
    assert not target.exists()


def test_second_merge_into_the_same_target_is_told_that_it_is_busy(family, tmp_path):
    target = tmp_path / "trio.moe"
    command = ["merge", *sources(family), "-o", target, "--budget", "1.5x"]
    first = start_slow_program(*command)
    wait_for_step(target, "similarity 0")
    second = call_program(*command, "--json")
    assert second.code == 10
    assert str(target) in second.envelope["data"]["message"]
    out, _ = first.communicate(timeout=120)
    assert first.returncode == 0, out
    assert call_program("verify", target).code == 0


def test_other_task_does_not_continue_what_was_left(family, tmp_path):
    target = tmp_path / "trio.moe"
    process = start_slow_program("merge", *sources(family), "-o", target, "--budget", "1.5x")
    wait_for_step(target, "pool 0")
    process.kill()
    process.communicate()
    other = call_program("merge", *sources(family), "-o", target, "--budget", "2x", "--json")
    assert other.envelope["data"]["resumed_layers"] == 0
    assert call_program("verify", target).code == 0
    assert json.loads((target / "moemerge.json").read_text())["provenance"]["budget"] == "2x"


def test_source_that_changed_after_a_kill_is_read_again(family, tmp_path):
    """Even where the change is too small for the samples that a fingerprint takes."""
    shutil.copytree(family, tmp_path / "family")
    target = tmp_path / "trio.moe"
    process = start_slow_program("merge", *sources(tmp_path / "family"), "-o", target, "--budget", "exact")
    wait_for_step(target, "pool 0")
    process.kill()
    process.communicate()
    name = "model.layers.0.block_sparse_moe.experts.0.w1.weight"
    edit_tensors(
        tmp_path / "family" / "law" / "model.safetensors", lambda t: t[name].view(-1)[5000:5001].neg_()
    )
    again = call_program("merge", *sources(tmp_path / "family"), "-o", target, "--budget", "exact")
    assert again.code == 0
    assert call_program("export", target, "-v", "law", "-o", tmp_path / "law").code == 0
    before, after = read_canonical(tmp_path / "family" / "law"), read_canonical(tmp_path / "law")
    assert all(before[key].equal(after[key]) for key in before)
