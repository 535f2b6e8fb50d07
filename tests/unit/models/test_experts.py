import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moemerge.models.experts import (
    Activation,
    PlainExpertLayer,
    add_shared_gates,
    expert_output,
    expert_product,
    expert_product_plain,
    own_experts,
)
from moemerge.models.routing import Route

D, F = 6, 5


def random_layer(slot_to_pool: list[int], generator: torch.Generator) -> PlainExpertLayer:
    shapes = {"gate": (F, D), "up": (F, D), "down": (D, F), "wi": (F, D), "wo": (D, F)}
    num_pool = max(slot_to_pool) + 1
    parts = {
        name: [torch.randn(shape, generator=generator) for _ in range(num_pool)]
        for name, shape in shapes.items()
    }
    return PlainExpertLayer(torch.tensor(slot_to_pool), parts)


class CountingLayer:
    """Passes parts on and notes which pool expert was asked for."""

    def __init__(self, layer: PlainExpertLayer):
        self._layer, self.asked = layer, []
        self.slot_to_pool = layer.slot_to_pool

    def part(self, name, pool_index):
        self.asked.append((name, pool_index))
        return self._layer.part(name, pool_index)


@st.composite
def products(draw):
    num_slots = draw(st.integers(1, 6))
    slot_to_pool = draw(st.lists(st.integers(0, 4), min_size=num_slots, max_size=num_slots))
    num_tokens, num_chosen = draw(st.integers(1, 7)), draw(st.integers(1, num_slots))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    slots = torch.rand(num_tokens, num_slots, generator=generator).argsort(dim=1)[:, :num_chosen]
    gates = torch.rand(num_tokens, num_chosen, generator=generator)
    is_dropped = torch.rand(num_tokens, num_chosen, generator=generator) < draw(st.sampled_from([0, 0.3, 1]))
    route = Route(slots, gates.masked_fill(is_dropped, 0.0))
    hidden = torch.randn(num_tokens, D, generator=generator)
    return hidden, route, random_layer(slot_to_pool, generator), draw(st.sampled_from(Activation))


@settings(max_examples=60, deadline=None)
@given(products())
def test_product_equals_the_plain_loop(product):
    torch.testing.assert_close(expert_product(*product), expert_product_plain(*product), atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("num_tokens", [1, 3])
def test_gates_of_slots_in_one_pool_expert_add_and_it_is_computed_once(num_tokens):
    generator = torch.Generator().manual_seed(1)
    layer = CountingLayer(random_layer([0, 1, 0], generator))
    hidden = torch.randn(num_tokens, D, generator=generator)
    route = Route(
        torch.tensor([[0, 2]]).expand(num_tokens, 2), torch.tensor([[0.5, 0.25]]).expand(num_tokens, 2)
    )
    output = expert_product(hidden, route, layer, Activation.RELU)
    assert layer.asked == [("wi", 0), ("wo", 0)]
    torch.testing.assert_close(output, 0.75 * expert_output(hidden, layer, 0, Activation.RELU))
    assert output.abs().max() > 0.1


@pytest.mark.parametrize("num_tokens", [1, 3])
def test_dropped_token_gets_zero_and_its_expert_is_not_asked_for(num_tokens):
    generator = torch.Generator().manual_seed(1)
    layer = CountingLayer(random_layer([0, 1], generator))
    route = Route(torch.ones(num_tokens, 1, dtype=torch.int64), torch.zeros(num_tokens, 1))
    output = expert_product(torch.randn(num_tokens, D), route, layer, Activation.SILU_GATED)
    assert output.tolist() == [[0.0] * D] * num_tokens
    assert layer.asked == []


def test_only_pool_experts_with_tokens_are_asked_for():
    generator = torch.Generator().manual_seed(1)
    layer = CountingLayer(random_layer([3, 1, 0, 2], generator))
    route = Route(torch.tensor([[0], [2], [0]]), torch.ones(3, 1))
    expert_product(torch.randn(3, D, generator=generator), route, layer, Activation.RELU)
    assert {pool_index for _, pool_index in layer.asked} == {0, 3}


def test_shared_gates_add_into_the_first_choice_of_each_pool_expert():
    pool = torch.tensor([[4, 2, 4, 4], [0, 1, 2, 3]])
    gates = torch.tensor([[0.5, 0.25, 0.125, 1.0], [0.1, 0.2, 0.3, 0.4]])
    added = add_shared_gates(pool, gates)
    torch.testing.assert_close(added, torch.tensor([[1.625, 0.25, 0, 0], [0.1, 0.2, 0.3, 0.4]]))
    assert torch.equal(added[1], gates[1])


def test_activations_follow_their_formulas():
    generator = torch.Generator().manual_seed(2)
    layer, hidden = random_layer([0], generator), torch.randn(2, D, generator=generator)
    gate, up, down, wi, wo = (layer.part(name, 0) for name in ("gate", "up", "down", "wi", "wo"))
    gated = hidden @ gate.T
    gated = gated / (1 + (-gated).exp()) * (hidden @ up.T) @ down.T
    torch.testing.assert_close(expert_output(hidden, layer, 0, Activation.SILU_GATED), gated)
    plain = (hidden @ wi.T).clamp(min=0) @ wo.T
    torch.testing.assert_close(expert_output(hidden, layer, 0, Activation.RELU), plain)


@pytest.mark.parametrize("num_tokens", [1, 2])
@pytest.mark.parametrize(
    ("outputs", "gate", "expected"),
    [
        pytest.param((256.0, 1.0, 1.0), 1.0, 258.0, id="sum"),
        pytest.param((1.0, 1.0, 1.0), 1.0035, 3.015625, id="product"),
    ],
)
def test_bfloat16_outputs_are_weighted_and_summed_in_float32_and_cast_once(
    num_tokens, outputs, gate, expected
):
    """Bf16 has no 257, so adding to 256 in bf16 loses both ones; and it rounds 1.0035 to 1."""
    tensors = {
        "wi": [torch.ones(1, 1, dtype=torch.bfloat16)] * 3,
        "wo": [torch.full((1, 1), value, dtype=torch.bfloat16) for value in outputs],
    }
    layer = own_experts({0: tensors}).layer(0)
    route = Route(torch.tensor([[0, 1, 2]]).expand(num_tokens, 3), torch.full((num_tokens, 3), gate))
    hidden = torch.ones(num_tokens, 1, dtype=torch.bfloat16)
    output = expert_product(hidden, route, layer, Activation.RELU)
    assert output.dtype == torch.bfloat16
    assert output.tolist() == [[expected]] * num_tokens


def test_own_experts_give_each_slot_its_own():
    source = own_experts({5: {"wi": [torch.zeros(F, D), torch.ones(F, D)]}})
    layer = source.layer(5)
    assert layer.slot_to_pool.tolist() == [0, 1]
    assert layer.part("wi", 1).sum() == F * D
