"""Every distance against its definition on the tensors themselves, in float64."""

import numpy as np
import pytest
import torch

from moemerge.similarity.distances import DISTANCES, compute_distances
from moemerge.similarity.gram import GramAccumulator, gram_of

NUM_MODELS, NUM_SLOTS, SIZE = 3, 4, 500


def draw_experts(noise: float, seed: int = 0) -> torch.Tensor:
    """[models, slots, size] float64: a common model and fine-tunes at a relative distance."""
    generator = torch.Generator().manual_seed(seed)
    common = torch.randn(1, NUM_SLOTS, SIZE, generator=generator, dtype=torch.float64)
    own = torch.randn(NUM_MODELS, NUM_SLOTS, SIZE, generator=generator, dtype=torch.float64)
    own[0] = 0
    return common + noise * own


def delta(i, j, base_i, base_j):
    a, b = i - base_i, j - base_j
    return a, b, np.sqrt((a @ a + b @ b) / 2), np.sqrt(a @ a) * np.sqrt(b @ b)


def relative_l2(i, j, *_):
    return np.linalg.norm(i - j) / np.sqrt((i @ i + j @ j) / 2)


def delta_l2(i, j, base_i, base_j):
    a, b, scale, _ = delta(i, j, base_i, base_j)
    return np.linalg.norm(a - b) / scale if scale else 0.0


def delta_cosine(i, j, base_i, base_j):
    a, b, _, scale = delta(i, j, base_i, base_j)
    if not (a @ a) and not (b @ b):
        return 0.0
    return 1 - (a @ b) / scale if scale else 1.0


DEFINITIONS = {
    "l2": lambda i, j, *_: np.linalg.norm(i - j),
    "relative_l2": relative_l2,
    "cosine": lambda i, j, *_: 1 - (i @ j) / (np.linalg.norm(i) * np.linalg.norm(j)),
    "delta_l2": delta_l2,
    "delta_cosine": delta_cosine,
}


def by_definition(name: str, experts: torch.Tensor, base: torch.Tensor) -> np.ndarray:
    rows = experts.reshape(-1, SIZE).numpy()
    bases = base.repeat(len(experts), 1).numpy()
    numbers = range(len(rows))
    return np.array(
        [[DEFINITIONS[name](rows[i], rows[j], bases[i], bases[j]) for j in numbers] for i in numbers]
    )


def test_every_distance_has_a_definition_here():
    assert DEFINITIONS.keys() == DISTANCES.keys()


@pytest.mark.parametrize("name", DEFINITIONS)
@pytest.mark.parametrize("noise", [1.0, 0.1])
def test_distance_equals_its_definition(name, noise):
    experts = draw_experts(noise)
    gram = gram_of(list(experts), has_base=True)
    np.testing.assert_allclose(
        compute_distances(gram)[name], by_definition(name, experts[1:], experts[0]), rtol=1e-9, atol=1e-9
    )


@pytest.mark.parametrize("name", [name for name, d in DISTANCES.items() if not d.needs_base])
def test_distance_without_base_equals_its_definition(name):
    experts = draw_experts(0.1)
    found = compute_distances(gram_of(list(experts), has_base=False))
    np.testing.assert_allclose(found[name], by_definition(name, experts, experts[0]), rtol=1e-9, atol=1e-9)


def test_distances_of_deltas_need_a_base():
    gram = gram_of(list(draw_experts(0.1)), has_base=False)
    assert compute_distances(gram).keys() == {name for name, d in DISTANCES.items() if not d.needs_base}
    with pytest.raises(ValueError, match="base"):
        gram.delta_products()


@pytest.mark.parametrize("has_base", [True, False])
def test_every_distance_is_symmetric_and_zero_only_on_the_diagonal(has_base):
    for name, matrix in compute_distances(gram_of(list(draw_experts(0.1)), has_base=has_base)).items():
        assert np.array_equal(matrix, matrix.T), name
        assert not np.diag(matrix).any(), name
        assert (matrix[~np.eye(len(matrix), dtype=bool)] > 0).all(), name


@pytest.mark.parametrize("noise", [1e-4, 1e-6])
@pytest.mark.parametrize("has_base", [True, False])
@pytest.mark.parametrize("name", ["l2", "relative_l2", "cosine"])
def test_close_siblings_of_one_slot_keep_their_digits(noise, has_base, name):
    """Accumulated in float32 as from files; the plain formula has nothing left at these distances."""
    experts = draw_experts(noise).float()
    accumulator = GramAccumulator(NUM_MODELS, NUM_SLOTS)
    accumulator.add(experts.reshape(-1, SIZE))
    from moemerge.similarity.gram import ExpertGram

    gram = ExpertGram(centred=accumulator.take_total(), num_slots=NUM_SLOTS, has_base=has_base)
    found = compute_distances(gram)[name]
    compared = experts[1:] if has_base else experts
    wide = compared.double().reshape(-1, SIZE).numpy()
    same_slot = [
        (i, j)
        for i in range(len(wide))
        for j in range(len(wide))
        if i != j and i % NUM_SLOTS == j % NUM_SLOTS
    ]
    for i, j in same_slot:
        # The definition of the cosine has lost its digits in float64, too: half the squared sine instead.
        unit_i, unit_j = wide[i] / np.linalg.norm(wide[i]), wide[j] / np.linalg.norm(wide[j])
        expected = {
            "l2": np.linalg.norm(wide[i] - wide[j]),
            "relative_l2": relative_l2(wide[i], wide[j]),
            "cosine": np.linalg.norm(unit_i - unit_j) ** 2 / 2,
        }[name]
        assert found[i, j] == pytest.approx(expected, rel=1e-3)


def test_fine_tune_that_left_an_expert_unchanged_has_no_direction():
    experts = draw_experts(0.1)
    experts[1, 2] = experts[0, 2]
    distances = compute_distances(gram_of(list(experts), has_base=True))
    unchanged = 2
    assert distances["delta_cosine"][unchanged, NUM_SLOTS + 2] == 1
    assert distances["delta_cosine"][unchanged, unchanged] == 0


def test_total_begins_anew_after_it_is_taken():
    rows = draw_experts(0.1).float().reshape(-1, SIZE)
    accumulator = GramAccumulator(NUM_MODELS, NUM_SLOTS)
    accumulator.add(rows)
    first = accumulator.take_total()
    assert not accumulator.take_total().any()
    accumulator.add(rows)
    assert np.array_equal(accumulator.take_total(), first)
