"""The examples run, and the recipes are recipes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import moemerge
from moemerge.consolidation.recipe import read_recipe
from moemerge.refs import HubRef, parse_named_sources, parse_source

EXAMPLES = Path(__file__).parents[2] / "examples"
RECIPES = sorted((EXAMPLES / "recipes").glob("*.yaml"))


def run_python(*arguments):
    return subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_python_example_merges_answers_and_exports(tmp_path):
    done = run_python(EXAMPLES / "merge_in_python.py", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert "2.00 x one variant" in done.stdout
    assert (tmp_path / "out" / "sums" / "model.safetensors").is_file()


def test_python_example_tells_errors_in_a_line(tmp_path):
    (tmp_path / "trio.moe").mkdir()
    done = run_python(EXAMPLES / "merge_in_python.py", tmp_path)
    assert done.returncode == 1
    assert "exists already" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_names_hub_repositories(path):
    task = read_recipe(path)
    assert all(isinstance(ref, HubRef) for ref in parse_named_sources(task.sources).values())
    assert isinstance(parse_source(task.base), HubRef)


def test_there_is_a_trio_and_a_quartet():
    assert sorted(len(read_recipe(path).sources) for path in RECIPES) == [3, 4]


def test_every_public_name_is_there():
    assert moemerge.__all__ == dir(moemerge)
    for name in moemerge.__all__:
        assert getattr(moemerge, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = moemerge.nonsense


def test_importing_the_package_imports_nothing_heavy():
    heavy = "{'torch', 'numpy', 'scipy', 'pydantic', 'huggingface_hub', 'rich'}"
    done = run_python("-c", f"import moemerge, sys; sys.exit(bool({heavy} & sys.modules.keys()))")
    assert done.returncode == 0
