"""What the documentation says is so: commands run as written, numbers, links and names are right."""

import importlib
import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from moemerge.bundle.manifest import Features, Manifest, PoolLayer, Provenance, VariantEntry
from moemerge.checkpoint.headers import read_header

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [
    *sorted(ROOT.glob("*.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
    *sorted((ROOT / "examples").rglob("*.md")),
]
MARKED = re.compile(r"<!-- run(: varies)? -->\n```(\w+)\n(.*?)```", re.DOTALL)
NUMBER = re.compile(r"-?\d+(?:\.\d+)?")


@pytest.fixture
def workplace(tmp_path):
    """A folder with what a clone has, as far as the documented commands need it."""
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    return tmp_path


def run_bash(command, folder):
    """Standard output of a command line that finds this environment's programs first."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        ["bash", "-c", command], cwd=folder, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
    return done.stdout


def commands_of(text):
    """Command lines of a console block, each with the output that is shown after it."""
    for part in re.split(r"^\$ ", text, flags=re.MULTILINE)[1:]:
        lines = part.splitlines(keepends=True)
        length = next(number for number, line in enumerate(lines, 1) if not line.endswith("\\\n"))
        yield "".join(lines[:length]), "".join(lines[length:])


def test_commands_in_readme_run_as_written(workplace):
    blocks = MARKED.findall(README)
    assert len(blocks) >= 5
    for varies, language, text in blocks:
        if language == "python":
            (workplace / "snippet.py").write_text(text, encoding="utf-8")
            run_bash(f"{sys.executable} snippet.py", workplace)
            continue
        for command, shown in commands_of(text):
            printed = run_bash(command, workplace)
            assert varies or printed.strip() == shown.strip(), command


def test_demo_in_readme_is_what_the_demo_prints(workplace):
    shown = re.search(r"<!-- demo -->\n```\n(.*?)```", README, re.DOTALL)[1]
    output = run_bash("moemerge demo --quiet", workplace)
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
    run_bash(f"moemerge merge {sources} --base {family}/base --budget 1x -o out.moe", workplace)
    manifest = json.loads((workplace / "out.moe" / "moemerge.json").read_text())
    excerpt = re.search(r"```json\n(.*?)```", text, re.DOTALL)[1]
    assert shown_of(json.loads(re.sub(r",?\s*\.\.\.", "", excerpt)), manifest)
    raw = (workplace / "out.moe" / "pool" / "layer-00000.safetensors").read_bytes()
    header = re.search(r"```\n(\{\"__metadata__\".*?) \.\.\.\n```", text, re.DOTALL)[1]
    assert raw[8:].startswith(header.replace("\n", "").rstrip().encode())
    assert f"8 + {int.from_bytes(raw[:8], 'little')} bytes" in text
    expert = [t for n, t in read_pool(workplace).items() if n.startswith("e00000.")]
    begin, end = min(t.start for t in expert), max(t.start + t.nbytes for t in expert)
    assert f"bytes {begin} to {end - 1}" in text


def read_pool(workplace):
    """Tensors of the first layer's pool by name."""
    return read_header(workplace / "out.moe" / "pool" / "layer-00000.safetensors")


def shown_of(excerpt, whole):
    """Whether an excerpt says nothing that the whole does not."""
    if isinstance(excerpt, dict):
        return all(key in whole and shown_of(value, whole[key]) for key, value in excerpt.items())
    if isinstance(excerpt, list) and excerpt and isinstance(excerpt[0], dict):
        return all(shown_of(value, whole[number]) for number, value in enumerate(excerpt))
    return excerpt == whole
