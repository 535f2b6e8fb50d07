"""Recipes: every problem at once, each with its line."""

import pytest

from moemerge.consolidation.planning import PlanOptions
from moemerge.consolidation.recipe import choose_task, read_recipe
from moemerge.consolidation.task import EvidenceOptions, Limits
from moemerge.errors import InvalidRecipe, NotFound

GOOD = """schema: moemerge/recipe@1
variants:
  code: ./code
  law: org/law@v1
base: ../base
budget: 1.25x
policy: cluster
within: true
max_ram: 8GiB
"""


def write(folder, text):
    path = folder / "recipe.yaml"
    path.write_text(text)
    return path


def problems(path):
    with pytest.raises(InvalidRecipe) as caught:
        read_recipe(path)
    assert str(path) in str(caught.value)
    return {
        finding.where.removeprefix(str(path)).removeprefix(", "): str(finding)
        for finding in caught.value.findings
    }


def test_recipe_gives_the_task_it_describes(tmp_path):
    task = read_recipe(write(tmp_path, GOOD))
    assert task.sources == [f"code={tmp_path}/code", "law=org/law@v1"]
    assert task.base == f"{tmp_path}/../base"
    assert isinstance(task.decision, PlanOptions)
    assert (task.decision.budget.text, task.decision.policy, task.decision.within) == (
        "1.25x",
        "cluster",
        True,
    )
    assert task.max_ram == "8GiB"


@pytest.mark.parametrize(
    ("reference", "source"),
    [
        ("./code", "{}/./code"),
        ("code", "{}/code"),
        ("models/mixtral/code", "{}/models/mixtral/code"),
        ("/abs/code", "/abs/code"),
        ("org/code", "org/code"),
        ("org/code@main", "org/code@main"),
        ("hf://org/code", "hf://org/code"),
        ("~/code", "~/code"),
    ],
)
def test_relative_folders_start_at_the_recipe_wherever_the_program_runs(
    reference, source, tmp_path, monkeypatch
):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "code").mkdir()
    path = write(tmp_path, f"schema: moemerge/recipe@1\nvariants: {{a: {reference}}}\nbudget: 1x\n")
    (found,) = read_recipe(path).sources
    name, _, folder = found.partition("=")
    assert name == "a"
    expected = source.format(tmp_path)
    assert folder == expected or folder == expected.replace("/./", "/")


@pytest.mark.parametrize(
    ("typo", "meant"),
    [
        ("budgt", "budget"),
        ("Budget", "budget"),
        ("variant", "variants"),
        ("policies", "policy"),
        ("max-ram", "max_ram"),
        ("schemas", "schema"),
        ("with_in", "within"),
        ("bas", "base"),
    ],
)
def test_unknown_key_is_told_with_the_nearest_known_one(typo, meant, tmp_path):
    found = problems(write(tmp_path, GOOD + f"{typo}: 1\n"))
    assert f"Did you mean '{meant}'?" in found["line 10"]


def test_key_like_no_other_is_told_with_all_there_are(tmp_path):
    assert "There are schema, variants, base" in problems(write(tmp_path, GOOD + "zzz: 1\n"))["line 10"]


def test_every_problem_is_told_at_once_with_its_line(tmp_path):
    found = problems(
        write(
            tmp_path,
            "schema: moemerge/recipe@9\n"
            "variants:\n"
            "  code: ./code\n"
            "  CODE: ./other\n"
            "  con: ./con\n"
            "  none:\n"
            "  list: [a, b]\n"
            "  empty: ''\n"
            "polcy: pick\n"
            "budget: cheap\n"
            "within: perhaps\n"
            "max_ram: lots\n"
            "policy: best\n",
        )
    )
    assert {line: found[line] for line in found} == found
    assert found.keys() == {f"line {number}" for number in (1, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13)}
    assert "moemerge/recipe@1" in found["line 1"]
    assert "twice" in found["line 4"]
    assert "'con'" in found["line 5"]
    assert "expected a reference" in found["line 6"]
    assert "expected a reference" in found["line 7"]
    assert "empty reference" in found["line 8"]
    assert "'policy'" in found["line 9"]
    assert "40GiB" in found["line 10"]
    assert "true or false" in found["line 11"]
    assert "4GiB" in found["line 12"]
    assert "medoid" in found["line 13"]


@pytest.mark.parametrize("key", ["schema", "variants", "budget"])
def test_missing_key_is_named(key, tmp_path):
    text = "schema: moemerge/recipe@1\nvariants: {a: ./a}\nbudget: 1x\n"
    kept = "".join(line for line in text.splitlines(keepends=True) if not line.startswith(key))
    assert f"no '{key}'" in problems(write(tmp_path, kept))[""]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "just text",
        "- a\n- b\n",
        "a: [1, 2",
        "a: 1\na: 2\n",
        "\t",
        "schema: moemerge/recipe@1\nvariants: {}\nbudget: 1x\n",
        "schema: moemerge/recipe@1\nvariants: [a]\nbudget: 1x\n",
        "schema: moemerge/recipe@1\nvariants: {a: ./a}\nbudget: 2\n",
        "schema: moemerge/recipe@1\nvariants: {a: ./a}\nbudget:\n",
        "schema: 1\nvariants: {1: ./a, null: ./b}\nbudget: 1x\n",
        "schema: moemerge/recipe@1\nvariants: {'a=b': ./a}\nbudget: 1x\n",
        "schema: !!python/object/apply:os.system ['true']\n",
        "x: &x {colour: red}\n<<: *x\nschema: moemerge/recipe@1\nvariants: {a: ./a}\nbudget: 1x\n",
        "1: 2\n? [a, b]\n: 3\n",
        "[" * 1200,
    ],
)
def test_text_that_is_no_recipe_is_refused(text, tmp_path):
    with pytest.raises(InvalidRecipe, match=r"recipe\.yaml"):
        read_recipe(write(tmp_path, text))


def test_bytes_that_are_no_text_are_refused(tmp_path):
    (tmp_path / "recipe.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InvalidRecipe, match=r"recipe\.yaml"):
        read_recipe(tmp_path / "recipe.yaml")


def test_missing_recipe_is_not_found(tmp_path):
    with pytest.raises(NotFound):
        read_recipe(tmp_path / "recipe.yaml")


def choose(budget=None, evidence=None, **changes):
    options = dict.fromkeys(("policy", "plan", "recipe", "repair")) | {"within": False, **changes}
    limits = budget if isinstance(budget, Limits) else Limits(budget=budget)
    return choose_task(["a=./a"], None, limits=limits, evidence=evidence or EvidenceOptions(), **options)


@pytest.mark.parametrize("changes", [{}, {"budget": "1x", "plan": "p"}, {"plan": "p", "recipe": "r"}])
def test_exactly_one_decision_is_needed(changes):
    with pytest.raises(InvalidRecipe, match="exactly one"):
        choose(**changes)


@pytest.mark.parametrize("extra", [{"policy": "mean"}, {"within": True}])
@pytest.mark.parametrize("decision", ["plan", "recipe"])
def test_policy_goes_with_a_budget_only(extra, decision, tmp_path):
    with pytest.raises(InvalidRecipe, match="go with --budget"):
        choose(**{decision: write(tmp_path, GOOD)}, **extra)


def test_variants_stand_in_the_recipe_or_on_the_command_line(tmp_path):
    with pytest.raises(InvalidRecipe, match="in the recipe"):
        choose(recipe=write(tmp_path, GOOD))
