"""Base and adapter as a variant in the program: shown, merged, compared, exported, from folders and a hub."""

import json

import pytest
import torch
from safetensors.torch import load_file

from moemerge.bundle.reader import open_bundle
from tests.adapters import write_adapter
from tests.e2e.program import call_program
from tests.factories import read_canonical, write_checkpoint

ATTENTION = [f"model.layers.{layer}.self_attn.{name}_proj" for layer in range(2) for name in ("q", "v")]


def factors(modules, seed=0, rank=4):
    generator = torch.Generator().manual_seed(seed)
    shapes = {"q_proj": (32, 32), "v_proj": (16, 32), "w2": (32, 48)}
    drawn = {}
    for module in modules:
        rows, columns = shapes[module.rpartition(".")[2]]
        drawn[f"{module}.lora_A.weight"] = torch.randn(rank, columns, generator=generator) / 8
        drawn[f"{module}.lora_B.weight"] = torch.randn(rows, rank, generator=generator) / 8
    return drawn


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))


@pytest.fixture
def family(tmp_path):
    """A base, two adapters of its attention, and one of an expert."""
    write_checkpoint(tmp_path / "base")
    write_adapter(tmp_path / "law", factors(ATTENTION, 1), target_modules=["q_proj", "v_proj"])
    write_adapter(tmp_path / "code", factors(ATTENTION, 2), base_model_name_or_path=str(tmp_path / "base"))
    expert = ["model.layers.1.block_sparse_moe.experts.3.w2"]
    write_adapter(tmp_path / "sums", factors(expert, 3), base_model_name_or_path="./base")
    return tmp_path


def program(*arguments, cwd, code=0):
    outcome = call_program(*arguments, "--json", cwd=cwd)
    assert outcome.code == code, outcome.out + outcome.err
    return outcome.envelope["data"]


def test_adapters_of_the_attention_share_every_expert_of_the_base(family):
    """Nothing of the base's experts is touched, so that one pool expert per slot is exact for all."""
    sources = ("base=./base", "law=./base+./law", "code=./code")
    program("merge", *sources, "--budget", "exact", "-o", "trio.moe", cwd=family)
    shown = program("show", "./trio.moe", cwd=family)
    assert shown["bytes_ratio"] == pytest.approx(1, abs=0.01)
    bundle = open_bundle(family / "trio.moe")
    original = read_canonical(family / "base")
    for layer in bundle.manifest.layers:
        assert layer.num_experts == bundle.manifest.num_slots
        pool = load_file(family / "trio.moe" / layer.file)
        for name, tensor in pool.items():
            expert, part = name.removeprefix("e").split(".")
            slot = bundle.manifest.variants["law"].maps[layer.index].index(int(expert))
            assert torch.equal(tensor, original[f"experts.{layer.index}.{slot}.{part}"])
    assert shown["variants"]["law"]["source"] == "local:base+local:law"
    assert shown["variants"]["code"]["source"] == "local:base+local:code"
    # Norms, routers, embeddings and the other half of attention are the base's as well.
    own = 2 * (32 * 32 + 16 * 32) * 2
    assert shown["variants"]["law"]["own_bytes"] == own


def test_adapter_of_an_expert_adds_that_expert(family):
    program("merge", "base=./base", "sums=./sums", "--budget", "exact", "-o", "duo.moe", cwd=family)
    assert program("show", "./duo.moe", cwd=family)["pool_experts"] == [4, 5]


def test_exported_variant_is_base_and_adapter(family):
    program("merge", "law=./base+./law", "code=./code", "--budget", "exact", "-o", "duo.moe", cwd=family)
    program("export", "./duo.moe", "-v", "law", "-o", "out", cwd=family)
    difference = program("diff", "./out", "./base+./law", cwd=family)
    assert difference["equal"]
    changed = program("diff", "./base", "./base+./law", "--numeric", cwd=family)["models"][""]
    assert changed["num_changed"] == len(ATTENTION)


def test_quality_is_measured_beside_base_and_adapter(family):
    (family / "text.txt").write_text("the law of the sea\n" * 40)
    program("merge", "law=./base+./law", "code=./code", "--budget", "exact", "-o", "duo.moe", cwd=family)
    compared = ("--original", "law=./base+./law", "--base", "./base")
    program("eval", "./duo.moe", "--text", "law=text.txt", *compared, "-o", "quality", cwd=family)


def test_similarity_calibration_and_plan_take_it(family):
    (family / "text.txt").write_text("the law of the sea\n" * 40)
    sources = ("law=./base+./law", "sums=./sums")
    program("similarity", *sources, "--base", "./base", "-o", "similarity", cwd=family)
    texts = ("--text", "law=text.txt", "--text", "sums=text.txt")
    program("calibrate", *sources, *texts, "-o", "calibration", cwd=family)
    plan = ("plan", *sources, "--budget", "1x", "--calibration", "calibration", "-o", "plan.json")
    program(*plan, cwd=family)
    made = json.loads((family / "plan.json").read_text())
    assert made["variants"]["law"]["source"] == "local:base+local:law"
    program("merge", *sources, "--plan", "plan.json", "-o", "duo.moe", cwd=family)


def test_recipe_of_adapters(family, tmp_path):
    made = program("init", "./base+./law", "mine=./code", "--budget", "exact", "-o", "a/r.yaml", cwd=family)
    assert [name.partition("=")[0] for name in made["variants"]] == ["law", "mine"]
    program("merge", "--recipe", family / "a/r.yaml", "-o", tmp_path / "duo.moe", cwd=tmp_path.parent)


def test_mergekit_configuration_with_adapters(family):
    (family / "config.yml").write_text(
        "models:\n- model: ./base+./law\n- model: {model: {path: ./base}, lora: {path: ./code}}\n"
    )
    made = program("init", "--from-mergekit", "config.yml", "-o", "r.yaml", cwd=family)
    places = [source.partition("=")[2] for source in made["variants"]]
    assert [place.rpartition("+")[2].rpartition("/")[2] for place in places] == ["law", "code"]
    program("merge", "--recipe", "r.yaml", "-o", "duo.moe", cwd=family)


def test_show_tells_what_an_adapter_is(family):
    shown = program("show", "./law", cwd=family)
    assert (shown["kind"], shown["method"], shown["rank"], shown["alpha"]) == ("adapter", "LoRA", 4, 8)
    assert shown["modules"] == ["q_proj", "v_proj"]
    assert shown["base"] == "org/base"
    text = call_program("show", "./law", cwd=family)
    assert text.out.startswith("law: an adapter\n")
    assert "moemerge show BASE+law tells what it makes of its base" in text.err
    assert program("show", "./base+./law", cwd=family)["kind"] == "checkpoint"
    listed = program("show", "./law", "--tensors", "*lora_A*", cwd=family)["tensors"]
    assert len(listed) == len(ATTENTION)
    listed = program("show", "./base+./law", "--tensors", "*query*", cwd=family)["tensors"]
    assert [tensor["file"] for tensor in listed] == [None, None]
    assert not (family / "xdg").exists()


def test_unreadable_adapter_is_told_as_any_variant(family):
    outcome = call_program(
        "merge", "a=./base+./law", "b=./base+./nowhere", "--budget", "1x", "-o", "x", cwd=family
    )
    assert outcome.code == 5
    assert "variant b: nowhere: no such folder" in outcome.err
    write_checkpoint(family / "wide", settings={"hidden_size": 64})
    outcome = call_program("plan", "a=./wide+./law", "--budget", "1x", cwd=family)
    assert outcome.code == 4
    assert "4 tensors that do not fit wide" in outcome.err


class TestHub:
    @pytest.fixture
    def hub(self, server, family):
        write_adapter(family / "far", factors(ATTENTION, 4), base_model_name_or_path="lab/base")
        server.add("lab/base", family / "base")
        server.add("lab/far", family / "far")
        return server

    def test_halves_are_pinned_and_found_offline(self, hub, family):
        pulled = program("pull", "lab/base+lab/far", cwd=family)
        assert {label.partition("@")[0] for label in pulled["folders"]} == {"lab/base", "lab/far"}
        hub.requests.clear()
        program("merge", "far=lab/base+lab/far", "near=./base+./law", "--budget", "exact", "--offline",
                "-o", "duo.moe", cwd=family)  # fmt: skip
        assert hub.requests == []
        source = program("show", "./duo.moe", cwd=family)["variants"]["far"]["source"]
        base, adapter = source.split("+")
        assert base.startswith("lab/base@")
        assert adapter.startswith("lab/far@")
        card = (family / "duo.moe" / "README.md").read_text()
        assert "base_model:\n- lab/base\n- lab/far\n" in card

    def test_base_that_an_adapter_names_comes_along(self, hub, family):
        files = program("pull", "lab/far", "--dry-run", cwd=family)["files"]
        assert {label.partition("@")[0] for label in files} == {"lab/base", "lab/far"}
        program("merge", "far=lab/far", "--budget", "exact", "-o", "solo.moe", cwd=family)
        program("merge", "far=lab/far", "--budget", "exact", "--offline", "-o", "again.moe", cwd=family)

    def test_looking_sends_no_weights(self, hub, family):
        shown = program("show", "lab/base+lab/far", cwd=family)
        assert shown["kind"] == "checkpoint"
        weights = family / "base" / "model.safetensors"
        assert hub.sent["lab/base/model.safetensors"] < weights.stat().st_size / 4

    def test_adapter_for_another_base_is_told(self, hub, family):
        hub.add("lab/other", family / "base")
        outcome = call_program("plan", "a=lab/other+lab/far", "--budget", "1x", cwd=family)
        assert outcome.code == 0
        assert "was made for lab/base, is applied to lab/other" in outcome.err

    def test_adapter_that_does_not_fit_is_refused_before_weights(self, hub, family):
        write_adapter(family / "off", factors(["model.layers.9.self_attn.q_proj"]))
        hub.add("lab/off", family / "off")
        outcome = call_program("merge", "a=lab/base+lab/off", "--budget", "1x", "-o", "x.moe", cwd=family)
        assert outcome.code == 4
        weights = family / "base" / "model.safetensors"
        assert hub.sent["lab/base/model.safetensors"] < weights.stat().st_size / 4
