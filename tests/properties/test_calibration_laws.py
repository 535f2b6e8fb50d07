"""Statistics of parts of a text, in any cut and order, are those of the text; samples are fair."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moemerge.calibration.statistics import SCALARS, SlotStatistics
from moemerge.similarity.replacement import gated_replacement_error
from moemerge.similarity.ward import ward_increment

WIDTH = 3


def count(tokens, reservoir):
    slot = SlotStatistics.empty(WIDTH, reservoir)
    if len(tokens[1]):
        slot.add_tokens(*tokens)
    return slot


def draw(num_tokens, seed):
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(num_tokens, WIDTH, generator=generator),
        torch.rand(num_tokens, generator=generator),
        torch.rand(num_tokens, generator=generator, dtype=torch.float64),
        torch.randn(num_tokens, WIDTH, generator=generator),
    )


@given(
    st.lists(st.integers(0, 12), min_size=1, max_size=5),
    st.integers(1, 10),
    st.randoms(use_true_random=False),
    st.integers(0, 99),
)
def test_any_cut_in_any_order_gives_the_same(lengths, reservoir, random, seed):
    tokens = draw(sum(lengths), seed)
    pieces = [count(part, reservoir) for part in zip(*(t.split(lengths) for t in tokens), strict=True)]
    random.shuffle(pieces)
    total = SlotStatistics.empty(WIDTH, reservoir)
    for piece in pieces:
        total.add(piece)
    whole = count(tokens, reservoir)
    for name in SCALARS:
        assert getattr(total, name) == pytest.approx(getattr(whole, name))
    torch.testing.assert_close(total.moment_DD, whole.moment_DD)
    assert total.keys_S.equal(whole.keys_S)
    assert total.inputs_SD.equal(whole.inputs_SD)
    assert total.gates_S.equal(whole.gates_S)


def test_every_token_is_as_likely_to_be_kept():
    kept = torch.zeros(20)
    inputs = torch.arange(20.0).unsqueeze(1).expand(-1, WIDTH).contiguous()
    for seed in range(1000):
        keys = torch.rand(20, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        slot = count((inputs, torch.ones(20), keys, inputs), 5)
        kept[slot.inputs_SD[:, 0].long()] += 1
    # 1000 draws at 1/4: standard deviation 13.7.
    assert (kept - 250).abs().max() < 60


@given(st.integers(0, 999), st.floats(0.1, 10.0))
def test_costs_grow_with_the_square_of_the_difference(seed, factor):
    inputs, gates, _, outputs = draw(12, seed)
    once = gated_replacement_error(gates, outputs, outputs + inputs)
    assert gated_replacement_error(gates, outputs, outputs + factor * inputs) == pytest.approx(
        factor**2 * once, rel=1e-4
    )
    moment = inputs.T @ inputs
    a, b = outputs[:4], outputs[4:8]
    assert ward_increment(a, b, moment, factor * moment) == pytest.approx(
        ward_increment(b, a, factor * moment, moment)
    )
    assert ward_increment(factor * a, factor * b, moment, moment) == pytest.approx(
        factor**2 * ward_increment(a, b, moment, moment), rel=1e-3
    )
