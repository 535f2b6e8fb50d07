"""Which rows are whose, and what a layer's summary says."""

import numpy as np
import pytest
import torch

from moemerge.refs import ExpertRef
from moemerge.similarity.gram import gram_of
from moemerge.similarity.matrices import build_layer_similarity

VARIANTS = ("a", "b", "c")


@pytest.fixture
def layer():
    generator = torch.Generator().manual_seed(0)
    models = {part: torch.randn(3, 2, 30, generator=generator) for part in ("gate", "down")}
    for part in models.values():
        part[2, 1] = part[0, 1]
    grams = {part: gram_of(list(rows), has_base=False) for part, rows in models.items()}
    return build_layer_similarity(5, VARIANTS, grams, np.array([0, 1, 2, 3, 4, 1]))


def test_rows_are_in_order_of_variant_and_slot(layer):
    assert [layer.ref(index) for index in range(6)] == [
        ExpertRef(name, 5, slot) for name in VARIANTS for slot in range(2)
    ]


def test_pairs_of_one_slot_and_of_one_variant_are_told_apart(layer):
    for i in range(6):
        for j in range(6):
            one, two = layer.ref(i), layer.ref(j)
            assert layer.same_slot_pairs()[i, j] == (one.slot == two.slot and one.variant != two.variant)
            assert layer.same_variant_pairs()[i, j] == (one.variant == two.variant)


def test_identical_experts_are_exactly_zero_apart(layer):
    for matrix in [*layer.distances.values(), *layer.part_l2.values()]:
        assert matrix[1, 5] == matrix[5, 1] == 0


def test_distances_of_parts_add_up_to_that_of_the_expert(layer):
    parts = sum(matrix**2 for matrix in layer.part_l2.values())
    np.testing.assert_allclose(np.sqrt(parts), layer.distances["l2"], rtol=1e-12, atol=1e-12)


def test_summary_counts_distinct_experts_and_compares_across_variants(layer):
    summary = layer.summary()
    relative = layer.distances["relative_l2"]
    same = [relative[i, j] for i in range(6) for j in range(6) if i % 2 == j % 2 and i // 2 != j // 2]
    other = [relative[i, j] for i in range(6) for j in range(6) if i % 2 != j % 2 and i // 2 != j // 2]
    assert summary["distinct"] == 5
    assert summary["same_slot_median"] == np.median(same)
    assert summary["same_slot_max"] == max(same)
    assert summary["other_slot_median"] == np.median(other)
