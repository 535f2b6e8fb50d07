"""A plan on disk: the same text again, refused when it contradicts itself or the checkpoints."""

import json
import math

import pytest

from moemerge.checkpoint.tensors import TensorReader
from moemerge.checkpoint.variants import open_variants
from moemerge.consolidation.pipeline import merge
from moemerge.consolidation.plan import dump_plan, read_plan, write_plan
from moemerge.consolidation.planning import PlanOptions, check_plan, plan_variants
from moemerge.consolidation.task import options_of
from moemerge.errors import IncompatibleInputs, InvalidRecipe, MoemergeError, NotFound
from moemerge.refs import FolderRef
from tests.factories import edit_tensors, read_canonical, write_checkpoint, write_siblings

NAMES = ("a", "b")


def open_folders(folder, names=NAMES):
    return open_variants({name: FolderRef(folder / name) for name in names})


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Folder of a family, its variants, and a plan for them."""
    folder = tmp_path_factory.mktemp("plan")
    write_siblings(folder, names=NAMES)
    variants = open_folders(folder)
    return folder, variants, plan_variants(variants, options_of("1.5x", "mean", within=False))


def set_at(value, path, new):
    *outer, last = path
    for step in outer:
        value = value[step]
    value[last] = new


def test_plan_survives_a_round_trip(made, tmp_path):
    _, _, plan = made
    write_plan(plan, tmp_path / "plan.json")
    assert read_plan(tmp_path / "plan.json") == plan
    assert (tmp_path / "plan.json").read_text() == dump_plan(plan)


def test_expert_map_and_members_say_the_same(made):
    _, _, plan = made
    for layer in plan.layers:
        for name in NAMES:
            for slot, index in enumerate(layer.expert_map(name)):
                assert (name, slot) in layer.pool[index].members


def test_errors_are_distances_to_what_is_stored(made):
    folder, _, plan = made
    tensors = {name: read_canonical(folder / name) for name in NAMES}

    def parts(name, layer, slot):
        return [tensors[name][f"experts.{layer}.{slot}.{part}"].double() for part in ("gate", "up", "down")]

    for layer in plan.layers:
        for planned in layer.pool:
            sources = [parts(name, layer.index, slot) for name, slot in planned.sources]
            stored = [sum(same) / len(sources) for same in zip(*sources, strict=True)]
            for name, slot in planned.members:
                own = parts(name, layer.index, slot)
                squared = sum(float(((a - b) ** 2).sum()) for a, b in zip(own, stored, strict=True))
                expected = math.sqrt(squared / sum(float((a**2).sum()) for a in own))
                assert layer.errors[name][slot] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(
    ("path", "new", "told"),
    [
        (("schema",), "moemerge/plan@3", "schema"),
        (("surprise",), 1, "surprise"),
        (("num_slots",), 5, "each slot of each variant"),
        (("layers", 0, "pool", 0, "members", 1), ["a", 7], "its own members"),
        (
            ("layers", 0, "pool"),
            [{"members": [["a", 0]], "operator": "copy", "sources": [["a", 0]]}],
            "each slot",
        ),
        (("layers", 0, "pool", 0, "sources", 0), ["z", 0], "its own members"),
        (("layers", 0, "pool", 0, "sources"), [], "sources"),
        (("layers", 0, "pool", 0, "operator"), "magic", "operator"),
        (("layers", 0, "pool"), [], "pool"),
        (("layers", 0, "errors"), {}, "one error"),
        (("layers", 0, "errors", "a"), [0.0], "one error"),
        (("layers", 0, "errors", "a", 1), -1.0, "errors"),
        (("layers", 0, "errors", "a", 1), math.nan, "errors"),
        (("layers", 0, "errors", "a", 1), math.inf, "errors"),
        (("layers",), [], "layers"),
        (("pool_bytes",), -3, "pool_bytes"),
        (("variants",), {}, "variants"),
    ],
    ids=lambda value: ".".join(map(str, value)) if isinstance(value, tuple) else None,
)
def test_plan_that_contradicts_itself_is_refused(path, new, told, made, tmp_path):
    text = json.loads(dump_plan(made[2]))
    set_at(text, path, new)
    (tmp_path / "plan.json").write_text(json.dumps(text))
    with pytest.raises(InvalidRecipe) as caught:
        read_plan(tmp_path / "plan.json")
    assert str(tmp_path / "plan.json") in str(caught.value)
    assert told in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b'"plan"', b"null", b"[" * 100_000])
def test_file_that_is_no_plan_is_refused(content, tmp_path):
    (tmp_path / "plan.json").write_bytes(content)
    with pytest.raises(InvalidRecipe, match="not a consolidation plan"):
        read_plan(tmp_path / "plan.json")


def test_missing_plan_is_not_found(tmp_path):
    with pytest.raises(NotFound, match=r"plan\.json"):
        read_plan(tmp_path / "plan.json")


@pytest.mark.parametrize(
    ("path", "new", "kind"),
    [
        (("pool_bytes",), 10, InvalidRecipe),
        (("variant_bytes",), 10, InvalidRecipe),
        (("family",), "switch_transformers", IncompatibleInputs),
        (("variants", "a", "fingerprint"), "0" * 64, IncompatibleInputs),
        (("layers", 1, "index"), 7, IncompatibleInputs),
        (("layers", 1, "index"), 0, IncompatibleInputs),
    ],
    ids=lambda value: ".".join(map(str, value)) if isinstance(value, tuple) else None,
)
def test_plan_that_contradicts_the_checkpoints_is_refused_before_anything_is_written(
    path, new, kind, made, tmp_path
):
    text = json.loads(dump_plan(made[2]))
    set_at(text, path, new)
    (tmp_path / "plan.json").write_text(json.dumps(text))
    with pytest.raises(kind):
        merge(made[1], tmp_path / "out" / "x.moe", read_plan(tmp_path / "plan.json"))
    assert not (tmp_path / "out").exists()


def test_plan_for_other_variants_is_refused(made, tmp_path):
    folder, _, plan = made
    swapped = open_variants({"a": FolderRef(folder / "b"), "b": FolderRef(folder / "a")})
    renamed = open_variants({"a": FolderRef(folder / "a"), "c": FolderRef(folder / "b")})
    with TensorReader() as reader:
        with pytest.raises(IncompatibleInputs, match="other weights"):
            check_plan(plan, swapped, reader)
        with pytest.raises(InvalidRecipe, match="variants a, b, given are a, c"):
            check_plan(plan, renamed, reader)


def test_values_that_became_infinite_after_planning_are_not_averaged(tmp_path):
    """The fingerprint samples tensors; a change in between reaches the operator."""
    write_siblings(tmp_path, names=NAMES, settings={"hidden_size": 96, "expert_size": 300})
    plan = plan_variants(open_folders(tmp_path), options_of("1x", "mean", within=False))
    name = "model.layers.1.block_sparse_moe.experts.1.w1.weight"

    def edit(tensors):
        tensors[name].view(-1)[6000] = float("nan")

    edit_tensors(tmp_path / "b" / "model.safetensors", edit)
    variants = open_folders(tmp_path)
    with TensorReader() as reader:
        check_plan(plan, variants, reader)
    with pytest.raises(MoemergeError, match="NaN or infinity"):
        merge(variants, tmp_path / "x.moe", plan)
    assert not (tmp_path / "x.moe").exists()


def test_bytes_of_mixed_dtypes_are_those_that_are_stored(tmp_path):
    write_checkpoint(tmp_path / "a", dtype="F32")
    write_checkpoint(tmp_path / "b", base=tmp_path / "a", dtype="BF16", noise=0.1)
    variants = open_folders(tmp_path)
    assert variants.variants["a"].expert_bytes == 2 * variants.variants["b"].expert_bytes
    for policy in ("cluster", "mean", "pick"):
        for budget in ("exact", "1x", "1.3x"):
            target = tmp_path / f"{policy}-{budget}.moe"
            merged = merge(variants, target, options_of(budget, policy, within=False))
            headers = sum(
                path.stat().st_size - 8 - int.from_bytes(path.read_bytes()[:8], "little")
                for path in (target / "pool").iterdir()
            )
            assert merged.plan.pool_bytes == headers
            assert merged.plan.variant_bytes == variants.variants["a"].expert_bytes
            assert merged.plan.allowed_bytes is None or headers <= merged.plan.allowed_bytes


def test_unknown_policy_and_within_of_another_policy_are_refused():
    with pytest.raises(InvalidRecipe, match="'best' is unknown"):
        options_of("1x", "best", within=False)
    with pytest.raises(InvalidRecipe, match="--within"):
        options_of("1x", "pick", within=True)
    assert isinstance(options_of("1x", None, within=True), PlanOptions)
