"""Recipes to begin with: from references, and from mergekit's configurations."""

from pathlib import Path

import pytest

from moemerge.consolidation.recipe import read_recipe
from tests.e2e.program import call_program
from tests.factories import write_siblings


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("family")
    write_siblings(folder)
    return folder


def init(*arguments, cwd=None):
    outcome = call_program("init", *arguments, "--json", cwd=cwd)
    assert outcome.code == 0, outcome.out
    return outcome.envelope["data"]


def test_recipe_is_carried_out_from_where_it_stands(folder, tmp_path):
    made = init(
        "./code", "second=law", "--base", "base", "--budget", "1x", "-o", tmp_path / "a/r.yaml", cwd=folder
    )
    places = [Path(source.partition("=")[2]).resolve() for source in made["variants"]]
    assert places == [folder / "code", folder / "law"]
    bundle = tmp_path / "duo.moe"
    merged = call_program("merge", "--recipe", tmp_path / "a/r.yaml", "-o", bundle, cwd=tmp_path)
    assert merged.code == 0, merged.err
    shown = call_program("show", bundle, "--json").envelope["data"]
    assert list(shown["variants"]) == ["code", "second"]
    assert shown["budget"] == "1x"


def test_hint_tells_the_next_command(folder, tmp_path):
    told = call_program("init", "./code", "./law", "-o", tmp_path / "r.yaml", cwd=folder)
    assert told.out == f"Recipe: {tmp_path / 'r.yaml'}, 2 variants\n"
    assert f"moemerge merge --recipe {tmp_path / 'r.yaml'} -o out.moe" in told.err


def test_names_come_from_references_and_differ(tmp_path):
    made = init(
        "org/moe-v0.1@main", "lab/moe-v0.1", "hf://lab/MOE-v0-1", "other=lab/x", "-o", tmp_path / "r.yaml"
    )
    assert made["variants"] == [
        "moe-v0-1=org/moe-v0.1@main",
        "moe-v0-1-2=lab/moe-v0.1",
        "MOE-v0-1-3=lab/MOE-v0-1",
        "other=lab/x",
    ]


MERGEKIT = {
    "models": """
models:
  - model: org/code
    parameters: {weight: 0.5}
  - model: org/law@v2
  - model: org/base
merge_method: ties
base_model: org/base
dtype: bfloat16
""",
    "slices": """
slices:
  - sources:
      - {model: org/code, layer_range: [0, 16]}
      - model: {model: {path: org/law, revision: v2}}
        layer_range: [0, 16]
  - sources:
      - {model: org/code, layer_range: [16, 32]}
merge_method: slerp
base_model: {model: {path: org/base}}
""",
    "modules": """
modules:
  decoder:
    slices:
      - sources: [{model: org/code}, {model: org/law@v2}]
base_model: org/base
merge_method: linear
""",
}


@pytest.mark.parametrize("form", MERGEKIT)
def test_mergekit_configurations_give_models_and_base(form, tmp_path):
    (tmp_path / "config.yml").write_text(MERGEKIT[form])
    made = init("--from-mergekit", tmp_path / "config.yml", "-o", tmp_path / "r.yaml")
    assert made["variants"] == ["code=org/code", "law=org/law@v2"]
    assert made["base"] == "org/base"
    assert "merge_method" in made["notes"][0]
    task = read_recipe(tmp_path / "r.yaml")
    assert task.sources == made["variants"]
    assert (tmp_path / "r.yaml").read_text().startswith("# Left out of config.yml: ")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("models: [{model: {model: {path: org/b}, lora: 3}}]", "is not a model"),
        ("models: [{model: 3}]", "is not a model"),
        ("base_model: org/a\nexperts: [{source_model: org/b}]", "mixture of dense models"),
        ("merge_method: ties", "names no models"),
        ("modules: &m {a: *m}", "names no models"),
        ("models: [", "not valid YAML"),
        ("- 1", "expected keys and values"),
        ("models: [{model: nowhere}]", "neither an existing folder"),
    ],
)
def test_other_files_are_refused(text, words, tmp_path):
    (tmp_path / "config.yml").write_text(text)
    outcome = call_program("init", "--from-mergekit", tmp_path / "config.yml", "-o", tmp_path / "r.yaml")
    assert outcome.code == 3
    assert words in outcome.err
    assert not (tmp_path / "r.yaml").exists()


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        ((), 3, "no variants given"),
        (("./nowhere",), 5, "no such folder"),
        (("a=org/x", "A=org/y"), 3, "given twice"),
        (("org/x", "--budget", "much"), 3, "'much'"),
        (("org/x", "--from-mergekit", "f.yml"), 3, "not both"),
        (("--from-mergekit", "f.yml"), 5, "f.yml"),
        (("org/x", "-o", "there.yaml"), 3, "exists already"),
    ],
)
def test_wrong_commands_write_nothing(arguments, code, words, tmp_path):
    (tmp_path / "there.yaml").write_text("mine")
    outcome = call_program("init", *arguments, cwd=tmp_path)
    assert outcome.code == code, outcome.err
    assert words in outcome.err
    assert [path.name for path in tmp_path.iterdir()] == ["there.yaml"]
    assert (tmp_path / "there.yaml").read_text() == "mine"


def test_odd_folders_are_quoted(tmp_path):
    write_siblings(tmp_path / "a: #b", names=("code",))
    made = init("./a: #b/code", "-o", "r.yaml", cwd=tmp_path)
    assert made["variants"] == [f"code={tmp_path / 'a: #b/code'}"]
