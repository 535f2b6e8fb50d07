"""What is supported, and in which form things are written: told from where it is decided."""

import difflib
import json
from pathlib import Path

import jsonschema_rs
import pytest
from ruamel.yaml import YAML

from moemerge.checkpoint.family import load_families
from moemerge.consolidation.recipe import KINDS, read_recipe
from moemerge.errors import InvalidRecipe
from tests.e2e.program import call_program
from tests.factories import write_siblings

ROOT = Path(__file__).parents[2]


def schema_of(name):
    outcome = call_program("schema", name)
    assert outcome.code == 0, outcome.err
    found = json.loads(outcome.out)
    assert call_program("schema", name, "--json").envelope["data"] == found
    jsonschema_rs.meta.validate(found)
    return jsonschema_rs.validator_for(found)


def test_families_are_those_with_a_description():
    listed = call_program("families", "--json").envelope["data"]["families"]
    assert [family["name"] for family in listed] == list(load_families())
    told = call_program("families").out
    assert all(family.title in told for family in load_families().values())


@pytest.mark.parametrize("name", load_families())
def test_family_is_told_as_its_description_says(name):
    family = load_families()[name]
    told = call_program("families", name).out
    for key in (key for rule in family.settings.values() for key in rule.keys):
        assert key in told
    for pattern in family.tensors:
        assert pattern.names[0] in told
    for layout in family.experts.layouts:
        assert all(tensor.name in told for tensor in layout.tensors)
    for left_out in (family.dropped_tensors, family.ignored_settings):
        assert all(key in told and reason in told for key, reason in left_out.items())
    data = call_program("families", name, "--json").envelope["data"]
    assert type(family).model_validate(data) == family


def test_page_on_adding_a_family_shows_what_one_took():
    folder = ROOT / "moemerge" / "checkpoint" / "families"
    before, after = (
        (folder / f"{name}.json").read_text(encoding="utf-8").splitlines() for name in ("qwen2", "qwen3")
    )
    lines = difflib.unified_diff(before, after, "qwen2.json", "qwen3.json", n=0, lineterm="")
    diff = "\n".join(line for line in lines if not line.startswith("@@"))
    assert f"```diff\n{diff}\n```" in (ROOT / "docs" / "add-a-family.md").read_text(encoding="utf-8")


def test_unknown_family_is_refused_with_those_that_are_known():
    outcome = call_program("families", "llama_of_yore")
    assert outcome.code == 4
    assert all(name in outcome.err for name in load_families())


def test_manifest_and_plan_of_a_merge_fit_their_schemas(tmp_path):
    write_siblings(tmp_path)
    sources = ("code=./code", "law=./law")
    for arguments in (("merge", "-o", "duo.moe"), ("plan", "-o", "plan.json")):
        done = call_program(arguments[0], *sources, *arguments[1:], "--budget", "1x", cwd=tmp_path)
        assert done.code == 0, done.err
    manifest = json.loads((tmp_path / "duo.moe/moemerge.json").read_text())
    schema_of("manifest").validate(manifest)
    assert not schema_of("manifest").is_valid({**manifest, "num_slots": 0})
    schema_of("plan").validate(json.loads((tmp_path / "plan.json").read_text()))


def test_output_of_commands_fits_its_schema(tmp_path):
    validator = schema_of("cli")
    for arguments in (("families",), ("families", "none"), ("schema",), ("show", tmp_path)):
        validator.validate(json.loads(call_program(*arguments, "--json").out))
    assert not validator.is_valid({"schema": "moemerge/cli@1"})


CHANGES = [
    {},
    {"budget": "exact"},
    {"budget": "1.5 X"},
    {"budget": "40 gib"},
    {"budget": "12B"},
    {"budget": "40"},
    {"budget": "lots"},
    {"budget": 2},
    {"variants": {}},
    {"variants": {"a b": "./code"}},
    {"variants": {"Code-2": "./code"}},
    {"variants": {"code": 3}},
    {"within": True},
    {"within": "yes"},
    {"max_ram": "8GiB"},
    {"max_ram": "8"},
    {"schema": "moemerge/recipe@9"},
    {"polcy": "cluster"},
    {"base": "./base"},
]
"""Of a recipe that is right."""


@pytest.mark.parametrize("change", CHANGES, ids=str)
def test_recipe_is_valid_where_it_can_be_read(change, tmp_path):
    recipe = {"schema": "moemerge/recipe@1", "variants": {"code": "./code"}, "budget": "1x", **change}
    path = tmp_path / "recipe.yaml"
    with path.open("w") as file:
        YAML().dump(recipe, file)
    try:
        read_recipe(path)
    except InvalidRecipe:
        assert not schema_of("recipe").is_valid(recipe)
    else:
        schema_of("recipe").validate(recipe)


def test_every_key_of_a_recipe_is_described():
    properties = json.loads(call_program("schema", "recipe").out)["properties"]
    assert properties.keys() == KINDS.keys()
    assert all(value["description"] for value in properties.values())
