"""The example that makes a family: it runs from fresh weights to served answers, and rates what it should."""

import importlib
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from moemerge.bundle.reader import open_bundle

EXAMPLE = Path(__file__).parents[2] / "examples" / "variants"
TRAINERS = ("datasets", "peft", "transformers", "trl")
STARTS = {
    "base": None,
    "code": "base",
    "chat": "base",
    "preferred": "chat",
    "thinker-start": "base",
    "thinker": "thinker-start",
}
missing = [name for name in TRAINERS if importlib.util.find_spec(name) is None]
needs_trainers = pytest.mark.skipif(bool(missing), reason=f"not installed: {', '.join(missing)}")


def make(*arguments):
    return subprocess.run(
        [sys.executable, EXAMPLE / "make.py", "--threads", "1", *arguments],
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    """Everything the quick command makes."""
    folder = tmp_path_factory.mktemp("variants") / "family"
    done = make("--quick", "-o", folder)
    assert done.returncode == 0, done.stderr
    return folder


def experts_of(folder):
    tensors = load_file(folder / "model.safetensors")
    return {name: tensor for name, tensor in tensors.items() if ".experts." in name}


@needs_trainers
def test_every_stage_starts_where_it_says_and_measures_before_and_after(family):
    figures = json.loads((family / "figures.json").read_text())
    assert {stage["name"]: stage["start"] for stage in figures["stages"]} == STARTS
    for stage in figures["stages"]:
        assert stage["figures"]
        assert all(figure[when] >= 0 for figure in stage["figures"] for when in ("before", "after"))
    base = figures["stages"][0]["figures"]
    assert all(figure["after"] < figure["before"] for figure in base), "pre-training learns something"


@needs_trainers
def test_attention_only_preferences_leave_experts_as_they_were(family):
    chat, preferred = experts_of(family / "chat"), experts_of(family / "preferred")
    assert chat.keys() == preferred.keys()
    assert all(chat[name].equal(preferred[name]) for name in chat)
    thinker, start = experts_of(family / "thinker"), experts_of(family / "thinker-start")
    assert not all(start[name].equal(thinker[name]) for name in thinker)


@needs_trainers
def test_bundle_stays_in_budget_and_answers_as_the_variants_do(family):
    manifest = open_bundle(family / "family.moe").manifest
    assert manifest.pool_bytes + manifest.residual_bytes <= manifest.variant_bytes
    found = json.loads((family / "figures.json").read_text())["family"]
    assert found["served"].keys() == found["eval"]["variants"].keys()
    lines = (family / "results.jsonl").read_text().splitlines()
    assert {json.loads(line)["variant"] for line in lines} == {"chat", "preferred", "thinker"}


@needs_trainers
def test_other_settings_are_refused_and_change_nothing(family):
    done = make("-o", family)
    assert done.returncode == 1
    assert "made with other settings" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.fixture
def example(monkeypatch):
    """Imports a file of the example that needs no trainer."""
    monkeypatch.syspath_prepend(EXAMPLE)
    return importlib.import_module


def test_reward_is_for_form_working_and_number(example):
    sums = example("sums")
    problem = sums.Problem((7, 5, 9))
    assert problem.worked == "7 + 5 = 12\n12 + 9 = 21\n</think>\n21"
    assert sums.reward(problem, problem.worked) == pytest.approx(1)
    wrong_number = problem.worked.replace(">\n21", ">\n20")
    assert sums.reward(problem, wrong_number) == pytest.approx(sums.FORM + sums.STEPS)
    one_line = "7 + 5 = 12\n12 + 8 = 20\n</think>\n20"
    assert sums.reward(problem, one_line) == pytest.approx(sums.FORM + sums.STEPS / 2)
    padded = "7 + 5 = 12\n" * 2 + "12 + 9 = 21\n</think>\n21"
    assert sums.reward(problem, padded) < 1
    for formless in ("21", "</think>\n21", "7 + 5 = 12 21", "12\n</think>\n21 or so"):
        assert sums.reward(problem, formless) == 0


def test_held_out_problems_and_towns_are_never_trained(example):
    from random import Random

    sums, world = example("sums"), example("world")
    held_out, shown, rewarded = (
        {sums.problem(Random(seed), parts) for seed in range(500)}
        for parts in (sums.HELD_OUT, sums.SHOWN, sums.REWARDED)
    )
    assert not held_out & (shown | rewarded)
    assert rewarded - shown
    asked = {
        held_out: {world.question(Random(seed), held_out=held_out) for seed in range(500)}
        for held_out in (0, 1)
    }
    assert not asked[0] & asked[1]
    assert set(world.towns(held_out=False)) | set(world.towns(held_out=True)) == set(world.TOWNS)


def test_an_answer_is_right_when_it_names_the_value_alone(example):
    from random import Random

    world = example("world")
    asked = world.question(Random(0))
    assert world.is_right(asked, asked.brief)
    assert world.is_right(asked, asked.wordy)
    (kind,) = (relation.values for relation in world.RELATIONS if asked.value in relation.values)
    assert not world.is_right(asked, " ".join(kind))
    assert not world.is_right(asked, "I do not know.")
