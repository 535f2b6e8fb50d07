"""Methods on tiny siblings: budgets are kept and used, and what is written is whole."""

import pytest

from moemerge.bundle.manifest import CodeSpec
from moemerge.bundle.reader import open_bundle
from moemerge.checkpoint.tensors import TensorReader
from moemerge.checkpoint.variants import open_variants
from moemerge.consolidation.budget import parse_budget
from moemerge.consolidation.layers import measure_layers
from moemerge.consolidation.measured import NoiseStatistics
from moemerge.consolidation.plan import PlannedExpert
from moemerge.errors import IncompatibleInputs, InvalidRecipe
from moemerge.evaluation.comparison import build_bundle
from moemerge.evaluation.methods import AVERAGE, METHODS, Materials
from moemerge.evaluation.rungs import Rung, Sizes, choose_rungs, fill
from moemerge.refs import FolderRef
from tests.factories import write_checkpoint, write_siblings

SHAPES = {"wi": (16, 64), "wo": (64, 16)}
FOUR, EIGHT = CodeSpec(kind="bits", bits=4, group=64), CodeSpec(kind="bits", bits=8)


@pytest.fixture(scope="module")
def materials(tmp_path_factory):
    folder = tmp_path_factory.mktemp("methods")
    base, tunes = write_siblings(folder, names=("code", "law"))
    variants = open_variants({name: FolderRef(path) for name, path in tunes.items()}, FolderRef(base))
    with TensorReader() as reader:
        yield Materials(
            variants=variants,
            layers=measure_layers(variants),
            statistics=NoiseStatistics(variants),
            reader=reader,
            folder=folder,
        )


@pytest.mark.parametrize("budget", ["0.7x", "1x", "1.5x"])
@pytest.mark.parametrize("method", METHODS)
def test_every_method_keeps_its_budget_and_writes_a_whole_bundle(method, budget, materials):
    target = materials.folder / f"{method}-{budget}.moe"
    prepared, manifest = build_bundle(materials, method, parse_budget(budget), target)
    allowed = float(budget[:-1]) * materials.variant_bytes
    stored = manifest.pool_bytes + manifest.residual_bytes
    assert stored <= allowed
    assert manifest.bytes_ratio * materials.variant_bytes > stored
    # Above one variant's bytes an average, and the finest codes of shared experts, leave room.
    assert stored > 0.8 * min(allowed, materials.variant_bytes)
    assert set(prepared.serves) == {"code", "law"}
    assert set(prepared.serves.values()) <= set(open_bundle(target).manifest.variants)


@pytest.mark.parametrize("method", METHODS)
def test_a_method_that_does_not_fit_says_what_it_takes(method, materials, tmp_path):
    with pytest.raises(InvalidRecipe, match=r"takes 0\.\d+x at least|Use --budget 0\.\d+x or more"):
        build_bundle(materials, method, parse_budget("0.1x"), tmp_path / "x.moe")


def test_methods_that_share_nothing_or_everything_do(materials):
    budget = parse_budget("0.8x")
    copies = METHODS["copies"](materials, budget).decide
    shared = METHODS["mean+residuals"](materials, budget).decide
    assert {len(expert.members) for layer in copies.layers for expert in layer.pool} == {1}
    assert {len(expert.members) for layer in shared.layers for expert in layer.pool} == {2}
    assert copies.residual_bytes == 0 < shared.residual_bytes


def test_pick_takes_turns_and_stores_whom_it_picked_also_in_few_bits(materials):
    layers = METHODS["pick"](materials, parse_budget("0.5x")).decide.layers
    picked = [expert.sources[0][0] for layer in layers for expert in layer.pool]
    assert picked.count("code") == picked.count("law")
    assert all(expert.members[0] == expert.sources[0] for layer in layers for expert in layer.pool)
    assert all(expert.code is not None for layer in layers for expert in layer.pool)


def test_vocabularies_of_two_lengths_have_no_average(tmp_path, materials):
    base = write_checkpoint(tmp_path / "base")
    longer = write_checkpoint(tmp_path / "longer", base=base, noise=0.1, vocab=96)
    other = write_checkpoint(tmp_path / "other", base=base, noise=0.1, seed=2)
    variants = open_variants({"longer": FolderRef(longer), "other": FolderRef(other)}, FolderRef(base))
    odd = Materials(
        variants=variants,
        layers=measure_layers(variants),
        statistics=NoiseStatistics(variants),
        reader=materials.reader,
        folder=tmp_path,
    )
    with pytest.raises(IncompatibleInputs, match="several shapes"):
        METHODS[AVERAGE](odd, parse_budget("1x"))


@pytest.mark.parametrize("allowed", [30, 31, 39, 40, 41, 60, 61, 75, 90, 1000])
def test_rungs_fill_the_budget_and_are_neighbours(allowed):
    sizes = [[10, 20, 30]] * 3
    chosen = choose_rungs(sizes, allowed)
    total = sum(own[rung] for own, rung in zip(sizes, chosen, strict=True))
    assert total <= allowed
    assert max(chosen) - min(chosen) <= 1
    assert total + 10 > allowed or chosen == [2, 2, 2]


def test_rungs_that_do_not_fit_name_the_least():
    with pytest.raises(InvalidRecipe, match="takes 30 bytes at least, 29 are allowed"):
        choose_rungs([[10, 20]] * 3, 29)


def test_filled_layers_have_codes_and_residuals_of_their_rungs():
    members = [("code", 0), ("law", 0)]
    pool = PlannedExpert(members=members, operator="mean", sources=members)
    sizes = Sizes(SHAPES, 4096)
    rungs = [Rung(FOUR, FOUR), Rung(EIGHT, FOUR)]
    allowed = sizes.of(rungs[0], 2) + sizes.of(rungs[1], 2)
    first, second = fill({0: [pool], 1: [pool]}, rungs, sizes, allowed)
    assert (first.pool[0].code, second.pool[0].code) == (EIGHT, FOUR)
    assert first.residuals == second.residuals == {"code": [FOUR], "law": [FOUR]}
