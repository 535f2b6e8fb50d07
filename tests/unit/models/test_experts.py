import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moemerge.models import (
    Activation,
    MappedExperts,
    OneVariant,
    PlainPoolLayer,
    Route,
    expert_product,
    own_experts,
)
from moemerge.models.experts import ACTIVATIONS, EffectiveLayer, Scratch, expert_product_plain
from moemerge.models.packed import effective
from tests.coded import bits, code, low_rank, quantise, random_matrix

D, F = 6, 5
BIASES = {
    Activation.SILU_GATED_DOWN_BIAS: {"down_bias": 8},
    Activation.CLAMPED_SWIGLU: {"gate_bias": 16, "up_bias": 16, "down_bias": 8},
}
"""Sizes of the biases of an expert of 8 and 16 entries."""
SHAPES = {
    **{"gate": (F, D), "up": (F, D), "down": (D, F), "wi": (F, D), "wo": (D, F)},
    **{"gate_bias": (F,), "up_bias": (F,), "down_bias": (D,)},
}


def random_layer(num_experts: int, activation: Activation, generator: torch.Generator) -> PlainPoolLayer:
    experts = [
        {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
        for _ in range(num_experts)
    ]
    return PlainPoolLayer(experts, activation)


class CountingLayer:
    """Passes hidden states on and notes which pool expert got how many."""

    def __init__(self, layer):
        self._layer, self.asked = layer, []

    def output(self, pool_index, hidden_TD):
        self.asked.append((pool_index, len(hidden_TD)))
        return self._layer.output(pool_index, hidden_TD)


def counting_layer(num_experts: int) -> CountingLayer:
    return CountingLayer(random_layer(num_experts, Activation.RELU, torch.Generator().manual_seed(1)))


@st.composite
def products(draw):
    num_experts, num_chosen = draw(st.integers(1, 6)), draw(st.integers(1, 4))
    num_tokens = draw(st.integers(1, 7))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    rows = torch.randint(0, num_experts, (num_tokens, num_chosen), generator=generator)
    gates = torch.rand(num_tokens, num_chosen, generator=generator)
    is_dropped = torch.rand(num_tokens, num_chosen, generator=generator) < draw(st.sampled_from([0, 0.3, 1]))
    hidden = torch.randn(num_tokens, D, generator=generator)
    layer = random_layer(num_experts, draw(st.sampled_from(Activation)), generator)
    return hidden, rows, gates.masked_fill(is_dropped, 0.0), layer


@given(products())
def test_product_equals_the_plain_loop(product):
    torch.testing.assert_close(expert_product(*product), expert_product_plain(*product), atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("num_chosen", [1, 2, 4])
def test_a_token_alone_is_summed_as_in_a_batch(num_chosen):
    """Bit for bit: each pool expert gives a power of two, so that only the order of summing rounds."""
    generator = torch.Generator().manual_seed(3)
    experts = [{"wi": torch.ones(1, 1), "wo": torch.full((1, 1), 2.0**power)} for power in range(0, 24, 4)]
    layer = PlainPoolLayer(experts, Activation.RELU)
    rows = torch.rand(40, 6, generator=generator).argsort(dim=1)[:, :num_chosen]
    gates = torch.rand(40, num_chosen, generator=generator)
    together = expert_product(torch.ones(40, 1), rows, gates, layer)
    alone = [expert_product(torch.ones(1, 1), rows[i : i + 1], gates[i : i + 1], layer) for i in range(40)]
    assert torch.equal(together, torch.cat(alone))


@pytest.mark.parametrize("num_tokens", [1, 3])
def test_gates_of_choices_in_one_pool_expert_add_and_it_is_computed_once(num_tokens):
    layer = counting_layer(3)
    hidden = torch.randn(num_tokens, D, generator=torch.Generator().manual_seed(1))
    rows = torch.tensor([[2, 2]]).expand(num_tokens, 2)
    output = expert_product(hidden, rows, torch.tensor([[0.5, 0.25]]).expand(num_tokens, 2), layer)
    assert layer.asked == [(2, num_tokens)]
    torch.testing.assert_close(output, 0.75 * layer.output(2, hidden))
    assert output.abs().max() > 0.1


@pytest.mark.parametrize("num_tokens", [1, 3])
def test_dropped_token_gets_zero_and_its_expert_is_not_asked_for(num_tokens):
    layer = counting_layer(2)
    rows = torch.ones(num_tokens, 1, dtype=torch.int64)
    output = expert_product(torch.randn(num_tokens, D), rows, torch.zeros(num_tokens, 1), layer)
    assert output.tolist() == [[0.0] * D] * num_tokens
    assert layer.asked == []


def test_only_pool_experts_with_tokens_are_asked_for():
    layer = counting_layer(9)
    rows = torch.tensor([[3, 7], [0, 7], [3, 0]])
    expert_product(torch.randn(3, D), rows, torch.tensor([[0.5, 0.5], [0.5, 0.0], [1.0, 0.5]]), layer)
    assert layer.asked == [(0, 2), (3, 2), (7, 1)]


def test_activations_follow_their_formulas():
    generator = torch.Generator().manual_seed(2)
    layer = random_layer(1, Activation.SILU_GATED, generator)
    hidden = torch.randn(2, D, generator=generator)
    gate, up, down, wi, wo, gate_bias, up_bias, bias = layer.experts[0].values()
    gated = hidden @ gate.T
    gated = gated / (1 + (-gated).exp()) * (hidden @ up.T) @ down.T
    torch.testing.assert_close(layer.output(0, hidden), gated)
    biased = PlainPoolLayer(layer.experts, Activation.SILU_GATED_DOWN_BIAS).output(0, hidden)
    torch.testing.assert_close(biased, gated + bias)
    fused = PlainPoolLayer([{"gate_up": torch.cat((gate, up)), "down": down}], Activation.SILU_GATED)
    torch.testing.assert_close(fused.output(0, hidden), gated)
    large = 40 * hidden  # so that some are clamped
    inner, scaled = (large @ gate.T + gate_bias).clamp(max=7), (large @ up.T + up_bias).clamp(-7, 7)
    clamped = inner / (1 + (-1.702 * inner).exp()) * (scaled + 1) @ down.T + bias
    found = PlainPoolLayer(layer.experts, Activation.CLAMPED_SWIGLU).output(0, large)
    torch.testing.assert_close(found, clamped, atol=1e-4, rtol=1e-5)
    plain = (hidden @ wi.T).clamp(min=0) @ wo.T
    torch.testing.assert_close(PlainPoolLayer(layer.experts, Activation.RELU).output(0, hidden), plain)


def test_a_bias_is_scaled_by_the_gate_as_all_of_an_experts_output():
    layer = random_layer(3, Activation.SILU_GATED_DOWN_BIAS, torch.Generator().manual_seed(4))
    unbiased = PlainPoolLayer(layer.experts, Activation.SILU_GATED)
    hidden, rows, gates = (
        torch.randn(2, D),
        torch.tensor([[0, 2], [2, 1]]),
        torch.tensor([[0.7, 0.3], [0.9, 0.1]]),
    )
    biases = torch.stack([expert["down_bias"] for expert in layer.experts])
    expected = expert_product(hidden, rows, gates, unbiased) + (gates.unsqueeze(2) * biases[rows]).sum(dim=1)
    torch.testing.assert_close(expert_product(hidden, rows, gates, layer), expected)


def test_activations_serve_dense_layers_by_the_prefix_of_their_roles():
    layer = random_layer(1, Activation.RELU, torch.Generator().manual_seed(2))
    weights = OneVariant({f"decoder.0.ffn.{name}": part for name, part in layer.experts[0].items()})
    hidden = torch.randn(3, D)
    dense = ACTIVATIONS[Activation.RELU](weights, "decoder.0.ffn.", hidden)
    assert torch.equal(dense, layer.output(0, hidden))


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
    experts = own_experts({0: tensors}, Activation.RELU)
    route = Route(torch.tensor([[0, 1, 2]]).expand(num_tokens, 3), torch.full((num_tokens, 3), gate))
    output = experts.product(0, torch.ones(num_tokens, 1, dtype=torch.bfloat16), route)
    assert output.dtype == torch.bfloat16
    assert output.tolist() == [[expected]] * num_tokens


@pytest.mark.parametrize(
    ("owner", "asked"), [(0, [(0, 3)]), (1, [(5, 3)]), (torch.tensor([1, 0, 1]), [(0, 1), (5, 2)])], ids=str
)
def test_slots_are_looked_up_in_the_map_of_each_tokens_variant(owner, asked):
    layer = counting_layer(6)
    experts = MappedExperts({4: layer}, {4: torch.tensor([[2, 0], [1, 5]])}, owner)
    experts.product(4, torch.randn(3, D), Route(torch.ones(3, 1, dtype=torch.int64), torch.ones(3, 1)))
    assert layer.asked == asked


def test_own_experts_give_each_slot_its_own():
    experts = own_experts({5: {"wi": [torch.zeros(F, D), torch.ones(F, D)]}}, Activation.RELU)
    assert experts.maps[5].tolist() == [[0, 1]]
    assert experts.layers[5].experts[1]["wi"].sum() == F * D


def effective_layer(pool, bases, residuals, activation, dtype=torch.bfloat16):
    shapes = {part: tuple(matrix.shape) for part, matrix in pool[0].items()}
    scratch = Scratch(shapes, torch.float32, torch.device("cpu"))
    return EffectiveLayer(
        pool=pool.__getitem__, bases=bases, num_experts=len(pool), residuals=residuals, dtype=dtype,
        scratch=scratch, activation=activation,
    )  # fmt: skip


@pytest.mark.parametrize("activation", Activation)
def test_rows_of_an_effective_layer_compute_pool_expert_plus_residual(activation):
    parts = ("wi", "wo") if activation is Activation.RELU else ("gate", "up", "down")
    shapes = {"gate": (16, 8), "up": (16, 8), "down": (8, 16), "wi": (16, 8), "wo": (8, 16)}
    plain = {part: random_matrix(*shapes[part], seed=1) for part in parts}
    coded = {part: quantise(random_matrix(*shapes[part], seed=2), 4, 8) for part in parts}
    for bias, size in BIASES.get(activation, {}).items():
        plain[bias], coded[bias] = random_matrix(2, size)
    repairs = [
        {part: code(random_matrix(*shapes[part], seed=3), spec) for part in parts}
        for spec in (bits(2, 8), low_rank(2))
    ]
    pool = [plain, coded]
    layer = effective_layer(pool, (0, 1, 1, 0), {2: repairs[0], 3: repairs[1]}, activation)
    hidden = random_matrix(5, 8)
    sums = [
        plain,
        {part: effective(coded[part], None, torch.bfloat16) for part in coded},
        {part: effective(coded[part], repairs[0].get(part), torch.bfloat16) for part in coded},
        {part: effective(plain[part], repairs[1].get(part), torch.bfloat16) for part in plain},
    ]
    expected = PlainPoolLayer([{part: t.float() for part, t in e.items()} for e in sums], activation)
    for row in (0, 1, 2, 3, 1, 0):  # the scratch of one must not show in the next
        torch.testing.assert_close(
            layer.output(row, hidden), expected.output(row, hidden), atol=1e-5, rtol=1e-5
        )


def test_a_residual_that_is_not_installed_is_our_own_mistake():
    pool = [{part: random_matrix(8, 8) for part in ("wi", "wo")}]
    with pytest.raises(KeyError):
        effective_layer(pool, (0, 0), {}, Activation.RELU).output(1, random_matrix(1, 8))
