"""What differs between checkpoints, variants and bundles."""

import math

import pytest
import torch

from tests.e2e.program import call_program
from tests.factories import edit_tensors, read_canonical, write_checkpoint, write_siblings

FAMILIES = ("mixtral", "switch_transformers")


def diff(*arguments, cwd=None):
    outcome = call_program("diff", *arguments, "--json", cwd=cwd)
    assert outcome.code == 0, outcome.out
    return outcome.envelope["data"]


def only_model(data):
    (model,) = data["models"].values()
    return model


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    write_siblings(folder, request.param)
    for budget in ("exact", "1x"):
        merged = call_program(
            "merge", "code=./code", "law=./law", "-o", f"{budget}.moe", "--budget", budget, cwd=folder
        )
        assert merged.code == 0, merged.err
    return folder


def test_layout_and_shards_make_no_difference(tmp_path):
    base = write_checkpoint(tmp_path / "base")
    again = write_checkpoint(tmp_path / "again", layout="stacked", shard_bytes=10_000)
    for numeric in ((), ("--numeric",)):
        data = diff(base, again, *numeric)
        assert data["equal"], data
    assert "equal: " in call_program("diff", base, again).out


def test_distances_are_those_of_the_tensors_and_the_worst_come_first(folder):
    data = only_model(diff("./base", "./code", "--numeric", cwd=folder))
    before, after = read_canonical(folder / "base"), read_canonical(folder / "code")
    assert data["num_tensors"] == len(before)
    for tensor in data["tensors"]:
        first, second = before[tensor["name"]].double(), after[tensor["name"]].double()
        assert tensor["relative"] == pytest.approx(float((first - second).norm() / first.norm()), rel=1e-5)
        assert tensor["largest"] == pytest.approx(float((first - second).abs().max()), rel=1e-5)
    distances = [tensor["relative"] for tensor in data["tensors"]]
    assert distances == sorted(distances, reverse=True)
    worst = max(group["worst"] for group in data["groups"])
    assert worst == distances[0]


def test_only_what_changed_is_named(tmp_path):
    base = write_checkpoint(tmp_path / "base")
    write_checkpoint(
        tmp_path / "tune", base=base, noise=0.1, only=lambda name: name.startswith("experts.1.2.")
    )
    data = only_model(diff(base, tmp_path / "tune"))
    assert {t["name"] for t in data["tensors"]} == {f"experts.1.2.{part}" for part in ("gate", "up", "down")}
    assert {t["status"] for t in data["tensors"]} == {"changed"}
    assert all(t["relative"] is None for t in data["tensors"])
    assert data["settings"] == data["files"] == {}


def test_exact_bundle_holds_its_sources(folder):
    for name in ("code", "law"):
        data = diff(f"./{name}", f"exact.moe:{name}", cwd=folder)
        model = only_model(data)
        assert (model["num_changed"], model["settings"], model["files"]) == (0, {}, {})


def test_what_a_bundle_lost_is_measured_against_the_source(folder):
    model = only_model(diff("./code", "1x.moe:code", "--numeric", cwd=folder))
    assert {t["name"].split(".")[0] for t in model["tensors"]} <= {"experts"}
    both = diff("./exact.moe", "./1x.moe", "--numeric", cwd=folder)["models"]
    assert both.keys() == {"code", "law"}
    assert both["code"]["tensors"] == model["tensors"]


def test_bundles_with_other_variants_name_them(folder, tmp_path):
    lone = tmp_path / "lone.moe"
    merged = call_program("merge", "code=./code", "poem=./law", "-o", lone, "--budget", "exact", cwd=folder)
    assert merged.code == 0
    data = diff("./exact.moe", lone, cwd=folder)
    assert (data["only_in_a"], data["only_in_b"], list(data["models"])) == (["law"], ["poem"], ["code"])
    assert data["equal"] is False
    assert "Variants only in B: poem" in call_program("diff", "./exact.moe", lone, cwd=folder).out


def test_other_shapes_dtypes_and_missing_tensors_come_first(tmp_path):
    base = write_checkpoint(tmp_path / "base", tied=False)
    write_checkpoint(tmp_path / "long", base=base, vocab=70, tied=True)
    model = only_model(diff(base, tmp_path / "long", "--numeric"))
    assert [(t["name"], t["status"]) for t in model["tensors"][:2]] == [
        ("head", "only in A"),
        ("embedding", "other shape"),
    ]
    assert model["settings"]["vocab_size"] == [64, 70]
    write_checkpoint(tmp_path / "wide", base=base, dtype="F32")
    wide = only_model(diff(base, tmp_path / "wide", "--numeric"))
    assert {t["status"] for t in wide["tensors"]} == {"other dtype"}
    assert {t["relative"] for t in wide["tensors"]} == {0}


def test_tensor_with_nan_comes_first_and_has_no_distance(tmp_path):
    base = write_checkpoint(tmp_path / "base")
    write_checkpoint(tmp_path / "tune", base=base, noise=0.1)
    edit_tensors(
        tmp_path / "tune/model.safetensors", lambda tensors: tensors["lm_head.weight"][3].fill_(math.nan)
    )
    model = only_model(diff(base, tmp_path / "tune", "--numeric"))
    first = model["tensors"][0]
    assert (first["name"], first["relative"], first["largest"]) == ("head", None, None)
    assert all(t["relative"] > 0 for t in model["tensors"][1:])


@pytest.mark.parametrize(
    ("pair", "code", "words"),
    [
        (("./code", "./exact.moe"), 3, "exact.moe:code"),
        (("./exact.moe", "./nothing.moe"), 5, "nothing.moe"),
        (("./code", "exact.moe:poem"), 5, "code, law"),
        (("./code", "{other}"), 4, "nothing to do with each other"),
    ],
)
def test_what_cannot_be_compared_is_refused(pair, code, words, folder, tmp_path):
    families = {"mixtral": "switch_transformers", "switch_transformers": "mixtral"}
    other = write_checkpoint(tmp_path / "other", families[folder.name.rstrip("0123456789")])
    outcome = call_program("diff", *(text.format(other=other) for text in pair), cwd=folder)
    assert outcome.code == code, outcome.err
    assert words in outcome.err


def test_repositories_are_compared_by_headers_unless_downloaded(server, tmp_path):
    base = write_checkpoint(tmp_path / "base")
    tune = write_checkpoint(tmp_path / "tune", base=base, noise=0.1)
    server.add("org/base", base)
    seen = only_model(diff("org/base", tune))
    assert {t["status"] for t in seen["tensors"]} == {"not downloaded"}
    assert server.sent["org/base/model.safetensors"] < (base / "model.safetensors").stat().st_size / 2
    fetched = only_model(diff("org/base", tune, "--numeric", "--download"))
    assert fetched == only_model(diff(base, tune, "--numeric"))
    assert torch.tensor([t["relative"] for t in fetched["tensors"]]).gt(0).all()
