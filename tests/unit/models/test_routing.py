import math
from itertools import accumulate, chain

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moemerge.models import Span
from moemerge.models.routing import (
    drop_over_capacity,
    softmax_topk,
    softmax_topk_renormalised,
    sparsemixer,
    switch_top1,
    topk_softmax,
)

LOGITS = torch.tensor([[1.0, 3.0, 2.0, -1.0]])


def exponentials(*logits):
    return [math.exp(logit) for logit in logits]


def test_softmax_topk_keeps_the_probabilities_over_all_slots():
    route = softmax_topk(LOGITS, 2)
    total = sum(exponentials(1, 3, 2, -1))
    assert route.slots_TK.tolist() == [[1, 2]]
    assert route.gates_TK[0].tolist() == pytest.approx([e / total for e in exponentials(3, 2)])


def test_renormalised_gates_sum_to_one():
    route = softmax_topk_renormalised(LOGITS, 2)
    total = sum(exponentials(3, 2))
    assert route.slots_TK.tolist() == [[1, 2]]
    assert route.gates_TK[0].tolist() == pytest.approx([e / total for e in exponentials(3, 2)])


def test_topk_softmax_equals_renormalised_softmax_up_to_rounding():
    logits = torch.randn(50, 8, generator=torch.Generator().manual_seed(0))
    first, second = topk_softmax(logits, 3), softmax_topk_renormalised(logits, 3)
    assert torch.equal(first.slots_TK, second.slots_TK)
    torch.testing.assert_close(first.gates_TK, second.gates_TK, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("routing", [softmax_topk, softmax_topk_renormalised, topk_softmax])
def test_gates_are_float32_whatever_the_logits_are(routing):
    route = routing(torch.tensor([[0.1, 0.7, 0.3]], dtype=torch.bfloat16), 2)
    exact = routing(torch.tensor([[0.1, 0.7, 0.3]], dtype=torch.bfloat16).double(), 2)
    assert route.gates_TK.dtype == torch.float32
    torch.testing.assert_close(route.gates_TK, exact.gates_TK, atol=1e-6, rtol=0)


def sparsemixer_plain(scores, num_chosen, threshold):
    """One token, slot by slot."""
    left, chosen = dict(enumerate(scores)), []
    for _ in range(num_chosen):
        best = max(left, key=left.get)
        near = [
            slot
            for slot, score in left.items()
            if (left[best] - score) / max(abs(score), left[best]) <= 2 * threshold
        ]
        chosen.append((best, math.exp(left[best]) / sum(math.exp(left[slot]) for slot in near)))
        del left[best]
    return chosen


def test_sparsemixer_weighs_each_choice_against_those_that_are_near():
    logits = 4 + torch.randn(40, 6, generator=torch.Generator().manual_seed(0)) / 8
    route, shared = sparsemixer(logits, 2, 0.01), 0
    for token, scores in enumerate(logits.tolist()):
        slots, gates = zip(*sparsemixer_plain(scores, 2, 0.01), strict=True)
        assert route.slots_TK[token].tolist() == list(slots)
        assert route.gates_TK[token].tolist() == pytest.approx(gates, abs=1e-5)
        shared += min(gates) < 0.99
    assert 0 < shared < 40, "scores that nearly tie, and others"
    apart = sparsemixer(torch.tensor([[1.0, 3.0, 2.0, -1.0]]), 2, 0.01)
    assert apart.gates_TK.tolist() == [[1.0, 1.0]]


def switch_logits(*slots: int, num_slots: int = 3) -> torch.Tensor:
    return 4.0 * torch.nn.functional.one_hot(torch.tensor(slots), num_slots).float()


def test_switch_gate_is_the_best_probability_and_not_renormalised():
    route = switch_top1(switch_logits(2, 0), torch.float32)
    assert route.slots_TK.tolist() == [[2], [0]]
    assert route.gates_TK[:, 0].tolist() == pytest.approx([math.exp(4) / (math.exp(4) + 2)] * 2)


def test_switch_rounds_probabilities_to_the_model_dtype_before_choosing():
    logits = torch.tensor([[1.0, 1.0 + 1e-5]])
    assert switch_top1(logits, torch.float32).slots_TK.item() == 1
    route = switch_top1(logits, torch.bfloat16)
    assert route.slots_TK.item() == 0
    assert route.gates_TK.dtype == torch.float32
    assert route.gates_TK.item() == 0.5


def test_a_slot_serves_the_first_tokens_of_each_span():
    slots = [0, 0, 1, 0, 0, 1, 1, 0, 0, 1, 1, 0, 0, 0]
    spans = [Span(0, 6), Span(6, 1), Span(7, 7)]
    route = switch_top1(switch_logits(*slots), torch.float32)
    limited = drop_over_capacity(route, 2, 3, spans)
    assert torch.equal(limited.slots_TK, route.slots_TK)
    served = [True, True, True, False, False, True, True, True, True, True, True, False, False, False]
    assert (limited.gates_TK[:, 0] > 0).tolist() == served


@given(
    st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=9), min_size=1, max_size=4), st.integers(1, 5)
)
def test_capacity_of_spans_equals_counting_each_alone(slots_of_spans, capacity):
    served = []
    for slots in slots_of_spans:
        counts = [0, 0, 0]
        for slot in slots:
            counts[slot] += 1
            served.append(counts[slot] <= capacity)
    starts = [0, *accumulate(map(len, slots_of_spans))]
    spans = [Span(start, len(slots)) for start, slots in zip(starts, slots_of_spans, strict=False)]
    route = switch_top1(switch_logits(*chain.from_iterable(slots_of_spans)), torch.float32)
    limited = drop_over_capacity(route, capacity, 3, spans)
    assert (limited.gates_TK[:, 0] > 0).tolist() == served
