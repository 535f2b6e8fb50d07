"""What the documentation says is so: commands run as written, numbers, links and names are right."""

import importlib
import json
import math
import re
from contextlib import closing
from pathlib import Path

import pytest

from moemerge.bundle.manifest import Features, Manifest, PoolLayer, Provenance, VariantEntry
from moemerge.checkpoint.headers import read_header
from moemerge.cli.app import app
from moemerge.consolidation.recipe import KINDS
from tests.documented import Workplace, steps_of

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [
    *sorted(ROOT.glob("*.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
    *sorted((ROOT / "examples").rglob("*.md")),
]
NUMBER = re.compile(r"-?\d+(?:\.\d+)?")
SHOWN = [page for page in PAGES if steps_of(page.read_text(encoding="utf-8"))]


@pytest.fixture
def workplace(tmp_path):
    """A folder with what a clone has, as far as the documented commands need it."""
    with closing(Workplace(tmp_path)) as place:
        yield place


@pytest.mark.parametrize("page", SHOWN, ids=lambda page: page.stem)
def test_commands_run_as_written_and_print_what_is_shown(page, workplace):
    for step in steps_of(page.read_text(encoding="utf-8")):
        printed = workplace.run(step)
        assert step.agrees(printed), f"{page}: python -m tests.documented {page.relative_to(ROOT)}\n{printed}"


def test_readme_names_every_command():
    commands = README.partition("## Commands")[2].partition("\n## ")[0]
    assert set(re.findall(r"`([a-z]+)`", commands)) >= {command.name for command in app.registered_commands}


def test_pages_for_beginners_have_commands_that_run():
    assert {"README", "tutorial", "terminal", "export"} <= {page.stem for page in SHOWN}


def test_demo_in_readme_is_what_the_demo_prints(workplace):
    shown = re.search(r"<!-- demo -->\n```\n(.*?)```", README, re.DOTALL)[1]
    output = workplace.bash("moemerge demo --quiet")
    printed = re.search(r"Perplexity of every.*?(?=\n\n)", output, re.DOTALL)[0]
    assert NUMBER.sub("#", printed).split() == NUMBER.sub("#", shown).split()
    for found, expected in zip(NUMBER.findall(printed), NUMBER.findall(shown), strict=True):
        # Another processor rounds float32 sums otherwise.
        assert math.isclose(float(found), float(expected), rel_tol=0.01, abs_tol=0.03)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_to_files(page):
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text(encoding="utf-8")):
        if "://" not in target:
            assert (page.parent / target).exists(), target


def test_names_in_architecture_exist():
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    named = re.findall(r"`([a-z_]+(?:/[a-z_]+)*)\.py`\s+`(\w+)(?:\.(\w+))?`", text)
    assert len(named) > 25
    for module, name, member in named:
        found = getattr(importlib.import_module(f"moemerge.{module.replace('/', '.')}"), name)
        assert not member or hasattr(found, member), f"{module}: {name}.{member}"
    for path in re.findall(r"`((?:[a-z_]+/)+(?:[\w]+\.\w+)?)`", text):
        assert any((root / path).exists() for root in (ROOT, ROOT / "moemerge")) or path in BUNDLE_PLACES, (
            path
        )


BUNDLE_PLACES = {"reports/", "shared/", "variants/code/"}


def test_page_on_recipes_names_every_key():
    keys = (ROOT / "examples" / "README.md").read_text(encoding="utf-8").partition("## Recipe keys")[2]
    assert set(re.findall(r"`([a-z_]+)`", keys)) >= KINDS.keys()


def test_bundle_format_names_every_manifest_key():
    text = (ROOT / "docs" / "bundle-format.md").read_text(encoding="utf-8")
    for model in (Manifest, Features, PoolLayer, VariantEntry, Provenance):
        for name, field in model.model_fields.items():
            assert f"`{field.alias or name}`" in text, f"{model.__name__}.{name}"


def test_example_in_bundle_format_is_what_a_merge_writes(workplace):
    text = (ROOT / "docs" / "bundle-format.md").read_text(encoding="utf-8")
    family = "examples/families/mini"
    names = ("code", "scripture", "sums")
    sources = " ".join(f"{name}={family}/{name}" for name in names)
    workplace.bash(f"moemerge merge {sources} --base {family}/base --budget 1x --policy cluster -o out.moe")
    bundle = workplace.folder / "out.moe"
    manifest = json.loads((bundle / "moemerge.json").read_text())
    excerpt = re.search(r"```json\n(.*?)```", text, re.DOTALL)[1]
    assert shown_of(json.loads(re.sub(r",?\s*\.\.\.", "", excerpt)), manifest)
    pool = bundle / "pool" / "layer-00000.safetensors"
    raw = pool.read_bytes()
    header = re.search(r"```\n(\{\"__metadata__\".*?) \.\.\.\n```", text, re.DOTALL)[1]
    assert raw[8:].startswith(header.replace("\n", "").rstrip().encode())
    assert f"8 + {int.from_bytes(raw[:8], 'little')} bytes" in text
    expert = [t for n, t in read_header(pool).items() if n.startswith("e00000.")]
    begin, end = min(t.start for t in expert), max(t.start + t.nbytes for t in expert)
    assert f"bytes {begin} to {end - 1}" in text


def shown_of(excerpt, whole):
    """Whether an excerpt says nothing that the whole does not."""
    if isinstance(excerpt, dict):
        return all(key in whole and shown_of(value, whole[key]) for key, value in excerpt.items())
    if isinstance(excerpt, list) and excerpt and isinstance(excerpt[0], dict):
        return all(shown_of(value, whole[number]) for number, value in enumerate(excerpt))
    return excerpt == whole
