"""Looking at checkpoints, bundles and variants, and at the tensors in their files."""

import pytest

from moemerge.checkpoint.headers import read_header
from tests.e2e.program import call_program
from tests.factories import edit_json, write_checkpoint, write_siblings

FAMILIES = ("mixtral", "switch_transformers")


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    write_siblings(folder, request.param)
    sources = ("code=./code", "law=./law")
    for name, budget in (("exact", "exact"), ("half", "0.5x")):
        policy = ("--policy", "measured") if budget == "0.5x" else ()
        merged = call_program("merge", *sources, "-o", f"{name}.moe", "--budget", budget, *policy, cwd=folder)
        assert merged.code == 0, merged.err
    return folder


def shown(*arguments, cwd=None):
    outcome = call_program("show", *arguments, "--json", cwd=cwd)
    assert outcome.code == 0, outcome.err
    return outcome.envelope["data"]


def test_variant_of_an_exact_bundle_is_told_like_its_checkpoint(folder):
    checkpoint, variant = shown("./code", cwd=folder), shown("exact.moe:code", cwd=folder)
    assert (checkpoint.pop("kind"), variant.pop("kind")) == ("checkpoint", "variant")
    assert variant.items() <= checkpoint.items()
    assert call_program("show", "exact.moe:code", cwd=folder).out.startswith("exact.moe:code\n")


def test_parameters_are_counted(folder):
    facts = shown("./code", cwd=folder)
    total = sum(tensor.num_elements for tensor in read_header(folder / "code/model.safetensors").values())
    assert facts["parameters"] == total
    experts = facts["expert_bytes"] // 2
    unused = experts - experts * facts["experts_per_token"] // facts["experts_per_layer"]
    assert facts["parameters"] - facts["active_parameters"] == unused


def test_tensors_are_listed_by_pattern(folder):
    header = read_header(folder / "code/model.safetensors")
    assert {t["name"] for t in shown("./code", "--tensors", "*", cwd=folder)["tensors"]} == set(header)
    some = shown("./code", "--tensors", "*norm*", cwd=folder)["tensors"]
    assert {t["name"] for t in some} == {name for name in header if "norm" in name}
    assert all(t["shape"] == list(header[t["name"]].shape) for t in some)
    assert all((t["dtype"], t["nbytes"]) == ("BF16", header[t["name"]].nbytes) for t in some)
    told = call_program("show", "./code", "--tensors", "*norm*", cwd=folder)
    assert told.out.startswith(f"{len(some)} of {len(header)} tensors, ")


def test_tensors_of_bundles_and_variants(folder):
    bundle = shown("half.moe", "--tensors", "e00000.*", cwd=folder)["tensors"]
    assert {t["file"].rpartition("/")[0] for t in bundle} == {"pool"}
    assert {t["name"].rpartition(".")[2] for t in bundle} >= {"codes", "scales"}
    names = {t["name"] for t in shown("half.moe:law", "--tensors", "*", cwd=folder)["tensors"]}
    assert names == set(read_header(folder / "law/model.safetensors"))
    assert "computed" in call_program("show", "half.moe:law", "--tensors", "*", cwd=folder).out


def test_pattern_that_matches_nothing_is_told_with_a_name(folder):
    outcome = call_program("show", "./code", "--tensors", "nothing", cwd=folder)
    assert outcome.code == 5
    assert "none of" in outcome.err
    assert "weight" in outcome.err


def test_variant_that_is_not_there_is_told_with_those_that_are(folder):
    outcome = call_program("show", "exact.moe:poem", cwd=folder)
    assert outcome.code == 5
    assert "code, law" in outcome.err


def test_tensors_are_listed_of_a_family_that_nobody_described(tmp_path):
    write_checkpoint(tmp_path / "other")
    edit_json(tmp_path / "other/config.json", model_type="unheard_of")
    assert call_program("show", tmp_path / "other").code == 4
    assert len(shown(tmp_path / "other", "--tensors", "lm_head*")["tensors"]) == 1


def test_pickles_are_shown_when_allowed(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    write_checkpoint(tmp_path / "safe")
    write_checkpoint(tmp_path / "pickled", weights="pickle")
    refused = call_program("show", tmp_path / "pickled")
    assert refused.code == 4
    assert "--allow-pickle" in refused.err
    assert not (tmp_path / "cache").exists()
    assert shown(tmp_path / "pickled", "--allow-pickle") == shown(tmp_path / "safe")
    listed = [shown(tmp_path / name, "--tensors", "*", "--allow-pickle") for name in ("pickled", "safe")]
    assert listed[0] == listed[1]
