"""The way of a user: inspect, plan, merge, verify, export, run; and what the program says on the way."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from moemerge.cli.app import app
from tests.e2e.program import call_program, run_program, tree
from tests.factories import read_canonical, write_checkpoint, write_siblings

ROOT = Path(__file__).parents[2]
FAMILIES = ("mixtral", "switch_transformers")
COMMANDS = [command.name for command in app.registered_commands]


@pytest.fixture(scope="module", params=FAMILIES)
def user(request, tmp_path_factory):
    """A user's folder with two fine-tunes and the bundle that the program made of them."""
    folder = tmp_path_factory.mktemp(request.param)
    write_siblings(folder, request.param)
    merged = run_program("merge", *SOURCES, "-o", "duo.moe", "--budget", "1.5x", cwd=folder)
    assert merged.code == 0, merged.err
    assert "Bundle: duo.moe" in merged.out
    return folder


SOURCES = ("code=./code", "law=./law")


def test_verify_export_and_run_follow_a_merge(user):
    assert "whole" in run_program("verify", "duo.moe", cwd=user).out
    exported = run_program("export", "duo.moe", "-v", "law", "-o", "law-again", cwd=user)
    assert exported.code == 0, exported.err
    assert read_canonical(user / "law-again").keys() == read_canonical(user / "law").keys()
    ran = run_program("run", "duo.moe", "-v", "code", "-v", "law", "a word", "--max-tokens", "4", cwd=user)
    assert ran.code == 0, ran.err
    assert ran.out.startswith("== code\n")
    assert "\n== law\n" in ran.out
    assert re.search(r"law: .* moved in .* ms, .* kept; \d+ tokens", ran.err)


def test_exact_bundle_exports_every_tensor_as_it_was(user, tmp_path):
    target = tmp_path / "exact.moe"
    assert call_program("merge", *SOURCES, "-o", target, "--budget", "exact", cwd=user).code == 0
    for name in ("code", "law"):
        assert call_program("export", target, "-v", name, "-o", tmp_path / name).code == 0
        before, after = read_canonical(user / name), read_canonical(tmp_path / name)
        assert before.keys() == after.keys()
        assert all(before[key].equal(after[key]) for key in before)
        side = {path for path in tree(user / name) if not path.endswith((".safetensors", "README.md"))}
        for path in side - {"LICENSE"}:
            assert (tmp_path / name / path).read_bytes() == (user / name / path).read_bytes()


def test_plan_carried_out_gives_the_bytes_of_a_merge_in_one_go(user, tmp_path):
    plan = tmp_path / "plan.json"
    planned = call_program("plan", *SOURCES, "--budget", "1.5x", "-o", plan, cwd=user)
    assert planned.code == 0
    assert f"Plan: {plan}" in planned.out
    target = tmp_path / "duo.moe"
    assert call_program("merge", *SOURCES, "-o", target, "--plan", plan, cwd=user).code == 0
    assert without_reports(target) == without_reports(user / "duo.moe")


def without_reports(bundle: Path) -> dict[str, bytes]:
    files = tree(bundle)
    sums = files.pop("SHA256SUMS").decode().splitlines()
    files["sums"] = "\n".join(line for line in sums if "  reports/" not in line).encode()
    return {name: content for name, content in files.items() if not name.startswith("reports/")}


def test_recipe_gives_the_bytes_of_the_same_options(user, tmp_path):
    recipe = user / "duo.yaml"
    recipe.write_text(
        "schema: moemerge/recipe@1\nvariants:\n  code: ./code\n  law: law\nbudget: 1.5x\npolicy: measured\n"
    )
    target = tmp_path / "duo.moe"
    # Folders in a recipe start at the recipe, wherever the program runs.
    outcome = call_program("merge", "--recipe", recipe, "-o", target, cwd=tmp_path)
    assert outcome.code == 0, outcome.err
    assert tree(target) == tree(user / "duo.moe")


def test_similarity_writes_matrices_and_prints_a_line_per_layer(user, tmp_path):
    outcome = call_program("similarity", *SOURCES, "--base", "./base", "-o", tmp_path / "sim", cwd=user)
    assert outcome.code == 0, outcome.err
    index = json.loads((tmp_path / "sim" / "similarity.json").read_text())
    assert {path.name for path in (tmp_path / "sim").iterdir()} == {
        "similarity.json",
        *(layer["file"] for layer in index["layers"]),
    }
    rows = outcome.out.splitlines()[2:-1]
    assert [int(row.split()[0]) for row in rows] == [layer["index"] for layer in index["layers"]]
    assert set(index["distances"]) == {"l2", "relative_l2", "cosine", "delta_l2", "delta_cosine"}


def test_show_reads_checkpoints_and_bundles(user):
    checkpoint = call_program("show", "./code", "--json", cwd=user).envelope["data"]
    bundle = call_program("show", "./duo.moe", "--json", cwd=user).envelope["data"]
    assert (checkpoint["kind"], bundle["kind"]) == ("checkpoint", "bundle")
    assert bundle["pool_bytes"] <= 1.5 * checkpoint["expert_bytes"]
    for name in ("code", "law"):
        facts = bundle["variants"][name]
        assert facts["own_bytes"] + facts["shared_bytes"] == checkpoint["non_expert_bytes"]
    for reference in ("./code", "./duo.moe"):
        assert call_program("show", reference, cwd=user).code == 0


@pytest.mark.parametrize(
    "arguments",
    [
        ("show", "./duo.moe"),
        ("similarity", *SOURCES, "-o", "{new}"),
        ("plan", *SOURCES),
        ("plan", *SOURCES, "--budget", "1x"),
        ("merge", *SOURCES, "--budget", "1x", "-o", "{new}"),
        ("verify", "duo.moe"),
        ("export", "duo.moe", "-v", "law", "-o", "{new}"),
        ("run", "duo.moe", "-v", "law", "word", "--max-tokens", "2"),
    ],
    ids=lambda arguments: arguments[0],
)
def test_json_is_one_envelope_on_standard_output(arguments, user, tmp_path):
    filled = [argument.format(new=tmp_path / "new") for argument in arguments]
    done = call_program(*filled, "--json", cwd=user)
    assert done.code == 0, done.err
    assert done.envelope["command"] == arguments[0]
    failed = call_program(*["./missing" if a in SOURCES or "duo.moe" in a else a for a in filled], "--json")
    assert failed.code not in (0, 1)
    assert failed.envelope["data"]["message"]
    assert all(finding["level"] for finding in failed.envelope["findings"])


def test_results_and_hints_go_separate_ways(user):
    ran = run_program("run", "duo.moe", "-v", "law", "-", "--max-tokens", "3", cwd=user, stdin="word")
    quiet = call_program("run", "duo.moe", "-v", "law", "word", "--max-tokens", "3", "--quiet", cwd=user)
    assert ran.code == quiet.code == 0
    assert ran.out == quiet.out
    assert "tokens/s" in ran.err
    assert quiet.err == ""
    failed = run_program("verify", "missing.moe", cwd=user)
    assert (failed.code, failed.out) == (5, "")
    assert failed.err.startswith("error: missing.moe")


def test_running_twice_gives_the_same_text(user):
    sampled = ("run", "duo.moe", "-v", "law", "word", "--max-tokens", "8", "--temperature", "1", "--json")
    first, second, other = (
        call_program(*sampled, "--seed", seed, cwd=user).envelope["data"]["answers"][0]["token_ids"]
        for seed in (1, 1, 2)
    )
    assert first == second != other


def test_same_folder_twice_is_allowed_and_told(tmp_path):
    write_checkpoint(tmp_path / "one")
    outcome = call_program("merge", "a=./one", "b=./one", "-o", "twice.moe", "--budget", "1x", cwd=tmp_path)
    assert outcome.code == 0
    assert "a, b: are the same checkpoint" in outcome.err
    shown = call_program("show", "./twice.moe", "--json", cwd=tmp_path).envelope["data"]
    assert shown["bytes_ratio"] == pytest.approx(1, abs=0.01), "and the maps"
    assert {facts["worst_error"] for facts in shown["variants"].values()} == {0}
    assert {facts["own_bytes"] for facts in shown["variants"].values()} == {0}


def test_reader_that_goes_away_ends_the_program_quietly(user):
    reading, writing = os.pipe()
    os.close(reading)
    program = [sys.executable, "-m", "moemerge", "show", "./duo.moe"]
    done = subprocess.run(
        program, cwd=user, stdout=writing, stderr=subprocess.PIPE, text=True, timeout=60, check=False
    )
    os.close(writing)
    assert (done.returncode, done.stderr) == (0, "")


def test_importing_moemerge_imports_no_torch():
    code = "import sys, moemerge; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("arguments", [["--help"], *([name, "--help"] for name in COMMANDS)], ids=" ".join)
def test_help_imports_nothing_heavy(arguments):
    code = f"""
import sys
sys.argv = ["moemerge", *{arguments!r}]
from moemerge.cli import main
try:
    main()
except SystemExit as stop:
    heavy = sorted({{"torch", "scipy", "numpy", "huggingface_hub", "tokenizers"}} & sys.modules.keys())
    sys.exit(stop.code or ", ".join(heavy) or 0)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "Usage: moemerge" in done.stdout


def example_of(name: str) -> list[str]:
    """The arguments of the example in a command's help, which a terminal may have wrapped."""
    outcome = call_program(name, "--help")
    text = " ".join(outcome.out.split("Example: moemerge ")[1].split("\n\n")[0].split())
    return [quoted or plain for quoted, plain in re.findall(r'"([^"]*)"|(\S+)', text)]


# Repositories that do not exist, a server that does not end, measurements of minutes: tested elsewhere.
NOT_TRIED = ("pull", "push", "serve", "deploy", "status", "undeploy", "bench")


def test_examples_in_the_help_run(tmp_path, monkeypatch):
    for name in ("base", "code", "sums", "scripture", "text"):
        shutil.copytree(ROOT / "examples/families/mini" / name, tmp_path / "examples/families/mini" / name)
    # The whole demonstration takes a minute; one merge and a few windows show that it runs.
    monkeypatch.setattr("moemerge.evaluation.demo.SYSTEMS", (("moemerge", "copies", "1x"),))
    monkeypatch.setattr("moemerge.evaluation.demo.CALIBRATION_TOKENS", 1024)
    monkeypatch.setattr("moemerge.evaluation.demo.NUM_WINDOWS", 1)
    names = sorted(COMMANDS, key=lambda name: name != "merge")
    assert {"merge", "verify", "export", "run", "show", "similarity", "plan", "demo", "chat"} < set(names)
    for name in names:
        example = example_of(name)
        assert example[0] == name
        if name not in NOT_TRIED:
            outcome = call_program(*example, cwd=tmp_path, stdin="hello\n")
            assert outcome.code == 0, outcome.err
            assert outcome.out
