"""Consolidation by measured cost as a user runs it: the shipped family with its texts, and tiny ones."""

import json
import re
from pathlib import Path

import pytest
import torch

from moemerge.bundle.manifest import read_manifest
from moemerge.calibration.folder import open_calibration
from moemerge.checkpoint.tensors import TensorReader
from moemerge.checkpoint.variants import open_variants
from moemerge.consolidation.evidence import LayerRecord
from moemerge.consolidation.measured import TextStatistics
from moemerge.consolidation.plan import write_plan
from moemerge.consolidation.planning import build_measured_plan
from moemerge.consolidation.task import options_of
from moemerge.refs import FolderRef
from tests.e2e.program import call_program, start_slow_program, tree
from tests.e2e.test_interruption import wait_for_step
from tests.factories import write_siblings

MINI = Path(__file__).parents[2] / "examples" / "families" / "mini"
NAMES = ("code", "sums")
SOURCES = [f"{name}={MINI / name}" for name in NAMES]
TEXTS = [word for name in NAMES for word in ("--text", f"{name}={MINI / 'text' / name}.txt")]
MEASURED = ("--policy", "measured")


@pytest.fixture(scope="module")
def calibration(tmp_path_factory):
    folder = tmp_path_factory.mktemp("calibration") / "mini"
    options = ["--tokens", 2048, "--base", MINI / "base"]
    done = call_program("calibrate", *SOURCES, *TEXTS, "-o", folder, *options)
    assert done.code == 0, done.err
    return folder


@pytest.fixture(scope="module")
def merged(calibration, tmp_path_factory):
    """A bundle of 0.6x, and what the program said of it."""
    bundle = tmp_path_factory.mktemp("merged") / "duo.moe"
    options = ["--budget", "0.6x", *MEASURED, "--calibration", calibration]
    done = call_program("merge", *SOURCES, *options, "-o", bundle, "--json")
    assert done.code == 0, done.err
    return bundle, done.envelope["data"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Arguments for two fine-tunes that are planned in a second, without text."""
    _, folders = write_siblings(tmp_path_factory.mktemp("tiny"))
    return [*(f"{name}={folder}" for name, folder in folders.items()), *MEASURED, "--budget", "0.7x"]


def check_bundle(bundle, data, budget):
    """It is whole, and within a budget that it makes use of; maps come on top."""
    assert call_program("verify", bundle).code == 0
    manifest = read_manifest(bundle)
    stored = data["pool_bytes"] + data["residual_bytes"]
    assert 0.9 * budget * manifest.variant_bytes < stored <= budget * manifest.variant_bytes
    assert stored / manifest.variant_bytes <= data["bytes_ratio"] < budget + 0.001
    return {name: variant.damage["predicted"] for name, variant in manifest.variants.items()}


def test_bundle_is_whole_and_within_its_budget(merged):
    assert check_bundle(*merged, 0.6).keys() == set(NAMES)


def test_more_budget_is_predicted_to_lose_less(merged, calibration, tmp_path):
    """What the first merge measured is in its reports, and serves a plan for another budget."""
    variants = open_variants({name: FolderRef(MINI / name) for name in NAMES})
    reports = sorted((merged[0] / "reports").glob("costs-layer-*.json"))
    records = [LayerRecord.model_validate_json(path.read_bytes()) for path in reports]
    statistics = TextStatistics(open_calibration(calibration), NAMES)
    with TensorReader() as reader:
        plan = build_measured_plan(variants, records, options_of("1x", "measured"), statistics, reader)
    assert plan.evidence.startswith("text:")
    write_plan(plan, tmp_path / "plan.json")
    options = ["--plan", tmp_path / "plan.json", "--calibration", calibration]
    done = call_program("merge", *SOURCES, *options, "-o", tmp_path / "duo.moe", "--json")
    assert done.code == 0, done.err
    tight, wide = check_bundle(*merged, 0.6), check_bundle(tmp_path / "duo.moe", done.envelope["data"], 1)
    assert all(0 < wide[name] < predicted for name, predicted in tight.items())


def test_exported_variant_answers_in_transformers_as_the_bundle_does(merged, tmp_path):
    import torch
    import transformers

    folder, prompt = tmp_path / "code", "def add("
    assert call_program("export", merged[0], "-v", "code", "-o", folder).code == 0
    options = ["-v", "code", "--max-tokens", 16, "--dtype", "float32", "--json"]
    ran = call_program("run", merged[0], prompt, *options)
    assert ran.code == 0, ran.err
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokens = transformers.AutoTokenizer.from_pretrained(folder)(prompt, return_tensors="pt")["input_ids"]
    answer = model.generate(
        tokens, attention_mask=tokens.new_ones(tokens.shape), max_new_tokens=16, do_sample=False
    )
    assert answer[0, tokens.shape[1] :].tolist() == ran.envelope["data"]["answers"][0]["token_ids"]


def test_calibration_of_other_weights_is_refused(calibration):
    sources = [f"code={MINI / 'scripture'}", f"sums={MINI / 'sums'}"]
    done = call_program("plan", *sources, "--budget", "1x", "--calibration", calibration, "--json")
    assert done.code == 4
    assert "other weights than those given: code" in done.envelope["data"]["message"]


def test_evidence_for_a_policy_that_does_not_read_it_is_refused(calibration):
    for evidence in (["--calibration", calibration], TEXTS):
        done = call_program("plan", *SOURCES, "--budget", "1x", "--policy", "mean", *evidence, "--json")
        assert done.code == 3
        assert "--policy measured" in done.envelope["data"]["message"]


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """A bundle of as few bytes as keep nine tenths, made from text, and what the program said of it."""
    bundle = tmp_path_factory.mktemp("kept") / "duo.moe"
    options = ["--quality", 0.9, "--floor", 0.8, "--base", MINI / "base", "--tokens", 4096]
    options += ["--dtype", "bfloat16"]
    done = call_program("merge", *SOURCES, *TEXTS, *options, "-o", bundle, "--json")
    assert done.code == 0, done.err
    return bundle, done.envelope["data"]


def test_quality_takes_the_bytes_that_it_needs_and_is_measured(kept):
    bundle, data = kept
    damage = data["damage"]
    assert damage == {name: variant.damage for name, variant in read_manifest(bundle).variants.items()}
    shares = [found["gain_recovered"] for found in damage.values()]
    assert sum(shares) / len(shares) >= 0.9
    assert min(shares) >= 0.8
    # Far from the bytes of two models, and no more than what is asked for costs.
    assert data["bytes_ratio"] < 1
    assert all(found.keys() >= {"predicted", "measured", "kl"} for found in damage.values())
    assert call_program("verify", bundle).code == 0
    assert [path.name for path in bundle.parent.iterdir() if "calibration" in path.name] == []


def test_repair_is_told_apart_and_can_be_left_out(kept, calibration, tmp_path):
    bundle, data = kept
    repaired = read_manifest(bundle).variants
    for name, found in data["damage"].items():
        assert ("unrepaired" in found) == bool(repaired[name].repaired)
        assert found["measured"] < found.get("unrepaired", float("inf"))
    options = ["--budget", "0.4x", "--no-repair", "--calibration", calibration]
    done = call_program("merge", *SOURCES, *options, "-o", tmp_path / "duo.moe", "--json")
    assert done.code == 0, done.err
    assert not any(variant.repaired for variant in read_manifest(tmp_path / "duo.moe").variants.values())


def test_healing_lessens_the_divergence(calibration, tmp_path):
    # One plan for both: plans go by what was measured, which healing changes. Plain means leave much to heal.
    plan = tmp_path / "plan.json"
    made = call_program("plan", *SOURCES, "--budget", "1x", "--policy", "mean", "-o", plan)
    assert made.code == 0, made.err
    found = {}
    for steps in (0, 8):
        target = tmp_path / f"{steps}.moe"
        options = ["--plan", plan, "--heal", steps, "--no-repair", "--calibration", calibration]
        done = call_program("merge", *SOURCES, *options, "-o", target, "--json")
        assert done.code == 0, done.err
        found[steps] = done.envelope["data"]["damage"]
    assert all(found[8][name]["kl"] < found[0][name]["kl"] for name in NAMES)


@pytest.mark.parametrize("has_text", [False, True], ids=["noise", "text"])
def test_pools_and_residuals_do_not_depend_on_threads(has_text, calibration, tmp_path):
    """Two compute layers side by side; of three, memory is for one. What is measured is told apart."""
    evidence = ["--calibration", calibration, "--no-repair"] if has_text else []
    before, found = torch.get_num_threads(), []
    for threads, options in ((1, []), (2, []), (3, ["--max-ram", "600MiB"])):
        torch.set_num_threads(threads)
        target = tmp_path / f"{threads}.moe"
        done = call_program("merge", *SOURCES, *evidence, *options, "--budget", "0.5x", "-o", target)
        assert done.code == 0, done.err
        files = tree(target)
        del files["SHA256SUMS"]
        manifest = json.loads(files.pop("moemerge.json"))
        assert all(variant.pop("damage") for variant in manifest["variants"].values())
        found.append((files, manifest))
    torch.set_num_threads(before)
    assert found[0] == found[1] == found[2]


def test_slots_that_a_text_hardly_reaches_are_told_and_served(tmp_path):
    target, few = tmp_path / "duo.moe", ["--tokens", 40, "--window", 20]
    made = call_program("calibrate", *SOURCES, *TEXTS, *few, "-o", tmp_path / "few")
    assert made.code == 0, made.err
    evidence = ["--calibration", tmp_path / "few"]
    done = call_program("merge", *SOURCES, *evidence, "--budget", "0.5x", "-o", target)
    assert done.code == 0, done.err
    assert re.search(r"variant code, layer 0: text hardly reaches slot [\d, ]+; the most used", done.err)
    assert call_program("verify", target).code == 0


def test_what_was_calibrated_in_half_precision_is_healed_and_measured(tmp_path):
    options = ["--budget", "0.5x", "--tokens", 1024, "--dtype", "bfloat16", "--heal", 1]
    done = call_program("merge", *SOURCES, *TEXTS, *options, "-o", tmp_path / "duo.moe", "--json")
    assert done.code == 0, done.err
    assert all(found["kl"] > 0 for found in done.envelope["data"]["damage"].values())


def test_recipe_says_all_that_options_say(tmp_path, kept):
    recipe = tmp_path / "duo.yaml"
    texts = "".join(f"  {name}: {MINI}/text/{name}.txt\n" for name in NAMES)
    sources = "".join(f"  {name}: {MINI}/{name}\n" for name in NAMES)
    recipe.write_text(
        f"schema: moemerge/recipe@1\nvariants:\n{sources}base: {MINI}/base\nquality: 0.9\nfloor: 0.8\n"
        f"text:\n{texts}tokens: 4096\ndtype: bfloat16\n"
    )
    done = call_program("merge", "--recipe", recipe, "-o", tmp_path / "duo.moe")
    assert done.code == 0, done.err
    assert tree(tmp_path / "duo.moe") == tree(kept[0])


def test_floor_that_a_budget_cannot_keep_ends_with_the_quality_gate(calibration, tmp_path):
    options = ["--budget", "0.3x", "--floor", 0.999, "--calibration", calibration]
    done = call_program("merge", *SOURCES, *options, "-o", tmp_path / "duo.moe", "--json")
    assert done.code == 9
    assert "its floor is 0.999" in done.envelope["data"]["message"]
    assert not (tmp_path / "duo.moe").exists()


def test_device_leaves_its_experts_what_variants_and_cache_do_not_take(tiny, tmp_path):
    sources = tiny[:2]
    options = ["--fit-batch", 1, "--fit-tokens", 64, "--json"]
    planned = call_program("plan", *sources, "--fit", "150kB", *options)
    assert planned.code == 0, planned.err
    data = planned.envelope["data"]
    assert data["budget"] == "fit 150kB"
    others = 150_000 - data["allowed_bytes"]
    merged = call_program("merge", *sources, "--fit", "150kB", *options, "-o", tmp_path / "duo.moe")
    assert merged.code == 0, merged.err
    bundle = call_program("show", tmp_path / "duo.moe", "--json").envelope["data"]
    own = sum(facts["own_bytes"] + facts["shared_bytes"] for facts in bundle["variants"].values())
    # Keys and values of 64 tokens: two layers, two heads of eight, in bf16.
    assert others == own + 64 * 2 * 2 * 2 * 8 * 2
    refused = call_program("plan", *sources, "--fit", "10kB", "--json")
    assert refused.code == 3
    assert "leaves nothing for experts" in refused.envelope["data"]["message"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--quality", 0.99], "needs the base"),
        (["--budget", "1x", "--floor", 0.9], "needs the base"),
        (["--quality", 1.5], "expected a share"),
        (["--budget", "exact", "--quality", 0.9], "keeps everything"),
        (["--budget", "1x", "--fit", "1GiB"], "not both"),
        (["--budget", "1x", "--fit-batch", 2], "go with --fit"),
        (["--budget", "1x", "--tokens", 2], "tokens go with text"),
        (["--budget", "1x", "--dtype", "bfloat16"], "a dtype goes with text"),
        (["--budget", "1x", "--dtype", "int8", "--text", "code=a"], "expected float32 or bfloat16"),
        (["--budget", "1x", "--heal", 2], "--heal goes with --text or --calibration"),
        (["--quality", 0.9, "--policy", "mean"], "--policy measured"),
        (["--budget", "0.01x"], "the least possible here is"),
        (["--budget", "1x", "--heal", 1, "--text", "code=a", "--calibration", "b"], "not both"),
    ],
)
def test_what_cannot_be_asked_for_is_refused(tiny, tmp_path, options, words):
    done = call_program("merge", *tiny[:2], *options, "-o", tmp_path / "duo.moe", "--json")
    assert done.code == 3
    assert words in done.envelope["data"]["message"]
    assert list(tmp_path.iterdir()) == []


def test_without_text_noise_decides_and_the_plan_says_so(tiny, tmp_path):
    plan, bundle = tmp_path / "plan.json", tmp_path / "duo.moe"
    planned = call_program("plan", *tiny, "-o", plan, "--json")
    assert planned.code == 0, planned.err
    assert planned.envelope["data"]["evidence"] == "noise"
    assert call_program("merge", *tiny[:2], "--plan", plan, "-o", bundle).code == 0
    assert call_program("verify", bundle).code == 0


def test_merge_killed_after_the_first_layer_continues_to_the_same_bytes(tiny, tmp_path):
    whole, target = tmp_path / "whole.moe", tmp_path / "duo.moe"
    assert call_program("merge", *tiny, "-o", whole).code == 0
    process = start_slow_program("merge", *tiny, "-o", target)
    wait_for_step(target, "pool 0")
    process.kill()
    process.communicate()
    assert not target.exists()
    again = call_program("merge", *tiny, "-o", target, "--json")
    assert again.code == 0, again.err
    assert again.envelope["data"]["resumed_layers"] == 1
    assert tree(target) == tree(whole)
