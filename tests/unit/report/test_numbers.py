"""What is derived from matrices, beside plain loops."""

from itertools import combinations

import numpy as np
import pytest

from moemerge.report.numbers import joins, overlap, same_slot, slots_in_use


def test_same_slot_takes_the_pairs_of_one_slot():
    variants, slots = 3, 4
    matrix = np.arange(144.0).reshape(12, 12)
    expected = [
        [matrix[a * slots + slot, b * slots + slot] for slot in range(slots)]
        for a, b in combinations(range(variants), 2)
    ]
    assert same_slot(matrix, variants).tolist() == expected
    assert same_slot(matrix, 1).shape == (0, 12)


def test_joins_are_the_heights_of_single_linkage():
    from scipy.cluster.hierarchy import linkage

    pairs = np.random.default_rng(0).uniform(size=(10, 6))
    expected = [height for slot in pairs.T for height in linkage(slot, "single")[:, 2]]
    assert joins(pairs, 5) == pytest.approx(expected)


def test_overlap_is_one_for_equal_shares_and_zero_for_disjoint_ones():
    a, b = np.array([0.5, 0.5, 0.0]), np.array([0.0, 0.0, 1.0])
    assert (overlap(a, a), overlap(a, b)) == (1.0, 0.0)


def test_slots_in_use_counts_even_ones():
    assert slots_in_use(np.array([0.25] * 4 + [0.0] * 4)) == pytest.approx(4)
