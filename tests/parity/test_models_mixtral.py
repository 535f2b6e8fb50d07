"""The decoder against transformers' Mixtral, on tiny random models.

Shapes: B rows, T tokens, D 32, E 4 slots.
"""

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from transformers import MixtralConfig, MixtralForCausalLM

from moemerge.models import Decoder, DecoderConfig, PlainExpertLayer, PlainExperts, own_experts

EXACT = {"atol": 5e-5, "rtol": 1e-5}
"""The reference's own two attention kernels differ by 1.1e-5 on these models."""
NUM_LAYERS, NUM_SLOTS, EXPERT_WIDTH = 3, 4, 24

ROLES = {
    "input_layernorm.weight": "attention_norm",
    "self_attn.q_proj.weight": "attention.query",
    "self_attn.k_proj.weight": "attention.key",
    "self_attn.v_proj.weight": "attention.value",
    "self_attn.o_proj.weight": "attention.output",
    "post_attention_layernorm.weight": "ffn_norm",
    "mlp.gate.weight": "router",
}


def build_reference(**changes) -> MixtralForCausalLM:
    """A random Mixtral whose logits, norms and routers are far from uniform."""
    settings = {
        "vocab_size": 50,
        "hidden_size": 32,
        "intermediate_size": EXPERT_WIDTH,
        "num_hidden_layers": NUM_LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "num_local_experts": NUM_SLOTS,
        "num_experts_per_tok": 2,
        "max_position_embeddings": 64,
        "rope_parameters": {"rope_type": "default", "rope_theta": 100.0},
        "initializer_range": 0.3,
        "tie_word_embeddings": False,
        "attn_implementation": "eager",
    }
    torch.manual_seed(7)
    model = MixtralForCausalLM(MixtralConfig(**(settings | changes))).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
    return model


def config_of(model: MixtralForCausalLM) -> DecoderConfig:
    config = model.config
    return DecoderConfig.from_settings(
        {
            "hidden_size": config.hidden_size,
            "num_layers": config.num_hidden_layers,
            "num_heads": config.num_attention_heads,
            "num_kv_heads": config.num_key_value_heads,
            "head_size": config.head_dim,
            "num_experts_per_token": config.num_experts_per_tok,
            "vocab_size": config.vocab_size,
            "norm_eps": config.rms_norm_eps,
            "rope_theta": config.rope_parameters["rope_theta"],
            "max_positions": config.max_position_embeddings,
            "sliding_window": config.sliding_window,
            "activation": "silu_gated",
            "routing": "softmax_topk_renormalised",
            "tied_head": config.tie_word_embeddings,
        }
    )


def weights_of(model: MixtralForCausalLM) -> dict[str, Tensor]:
    state = model.state_dict()
    weights = {
        "embedding": state["model.embed_tokens.weight"],
        "decoder.final_norm": state["model.norm.weight"],
    }
    if not model.config.tie_word_embeddings:
        weights["head"] = state["lm_head.weight"]
    for layer in range(model.config.num_hidden_layers):
        for name, role in ROLES.items():
            weights[f"decoder.{layer}.{role}"] = state[f"model.layers.{layer}.{name}"]
    return weights


def expert_parts_of(model: MixtralForCausalLM) -> dict[int, dict[str, list[Tensor]]]:
    parts = {}
    for index, layer in enumerate(model.model.layers):
        gate_up, down = layer.mlp.experts.gate_up_proj.data, layer.mlp.experts.down_proj.data
        width = gate_up.shape[1] // 2
        parts[index] = {
            "gate": list(gate_up[:, :width]),
            "up": list(gate_up[:, width:]),
            "down": list(down),
        }
    return parts


def build_decoder(model: MixtralForCausalLM, on_route=None) -> Decoder:
    return Decoder(config_of(model), weights_of(model), own_experts(expert_parts_of(model)), on_route)


@torch.no_grad()
def reference_logits(model: MixtralForCausalLM, tokens_BT: Tensor) -> Tensor:
    logits = model(tokens_BT, use_cache=False).logits
    assert logits.std() > 0.5, "the reference says nothing, so agreeing with it proves nothing"
    return logits


def random_tokens(batch_size: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 50, (batch_size, length), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def reference() -> MixtralForCausalLM:
    return build_reference()


@pytest.fixture(scope="module")
def decoder(reference) -> Decoder:
    return build_decoder(reference)


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({}, id="grouped-heads"),
        pytest.param({"num_key_value_heads": 4}, id="as-many-kv-heads"),
        pytest.param({"num_key_value_heads": 1}, id="one-kv-head"),
        pytest.param({"tie_word_embeddings": True}, id="tied-head"),
        pytest.param({"sliding_window": 4}, id="sliding-window"),
        pytest.param({"head_dim": 12}, id="heads-wider-than-model"),
        pytest.param({"num_experts_per_tok": 1}, id="top-1"),
        pytest.param({"num_experts_per_tok": 3}, id="top-3"),
        pytest.param({"rms_norm_eps": 0.1}, id="large-eps"),
    ],
)
def test_logits_equal_the_reference(changes):
    model = build_reference(**changes)
    tokens = random_tokens(2, 11)
    torch.testing.assert_close(build_decoder(model).forward(tokens), reference_logits(model, tokens), **EXACT)


@pytest.mark.parametrize("window", [None, 3])
def test_decoding_token_by_token_equals_one_pass(window):
    model = build_reference(sliding_window=window)
    decoder, tokens = build_decoder(model), random_tokens(2, 12)
    cache = decoder.new_cache(batch_size=2)
    steps = [decoder.forward(tokens[:, :5], cache)]
    steps += [decoder.forward(tokens[:, i : i + 1], cache) for i in range(5, 12)]
    assert cache.length == 12
    torch.testing.assert_close(torch.cat(steps, dim=1), reference_logits(model, tokens), **EXACT)


@pytest.mark.parametrize("window", [None, 3])
def test_prefill_in_pieces_equals_one_pass(window):
    model = build_reference(sliding_window=window)
    decoder, tokens = build_decoder(model), random_tokens(1, 13)
    cache = decoder.new_cache()
    pieces = [decoder.forward(piece, cache) for piece in tokens.split([2, 6, 4, 1], dim=1)]
    torch.testing.assert_close(torch.cat(pieces, dim=1), reference_logits(model, tokens), **EXACT)


def test_sliding_window_hides_what_lies_before_it(decoder):
    tokens = random_tokens(1, 12)
    narrow = Decoder(replace(decoder.config, sliding_window=3), decoder.weights, decoder.experts)
    full, windowed = decoder.forward(tokens), narrow.forward(tokens)
    torch.testing.assert_close(windowed[:, :3], full[:, :3], **EXACT)
    assert (windowed[:, 3:] - full[:, 3:]).abs().max() > 0.1


def test_padding_on_the_right_leaves_real_tokens_as_they_are_alone(reference, decoder):
    lengths = [4, 9, 1]
    tokens = random_tokens(3, 9)
    logits = decoder.forward(tokens, lengths=lengths)
    for row, length in enumerate(lengths):
        alone = reference_logits(reference, tokens[row : row + 1, :length])
        torch.testing.assert_close(logits[row : row + 1, :length], alone, **EXACT)


@pytest.mark.parametrize("window", [None, 3])
def test_rows_of_different_lengths_decode_together_as_they_do_alone(window):
    model = build_reference(sliding_window=window)
    decoder, lengths, num_steps = build_decoder(model), [2, 7, 5], 6
    prompts, continuation = random_tokens(3, 7, seed=1), random_tokens(3, num_steps, seed=2)
    cache = decoder.new_cache(batch_size=3)
    steps = [decoder.forward(prompts, cache, lengths=lengths, last_only=True)]
    steps += [decoder.forward(continuation[:, i : i + 1], cache) for i in range(num_steps)]
    together = torch.cat(steps, dim=1)
    assert cache.lengths == (8, 13, 11)
    for row, length in enumerate(lengths):
        whole = torch.cat((prompts[row, :length], continuation[row])).unsqueeze(0)
        alone = reference_logits(model, whole)[:, length - 1 :]
        torch.testing.assert_close(together[row : row + 1], alone, **EXACT)


def test_last_only_returns_each_rows_last_real_token(decoder):
    tokens = random_tokens(2, 6)
    every = decoder.forward(tokens)
    last = decoder.forward(tokens, last_only=True)
    padded = decoder.forward(tokens, lengths=[6, 2], last_only=True)
    assert last.shape == padded.shape == (2, 1, 50)
    torch.testing.assert_close(last[:, 0], every[:, -1], **EXACT)
    torch.testing.assert_close(padded[:, 0], torch.stack((every[0, 5], every[1, 1])), **EXACT)


def test_greedy_tokens_equal_those_of_generate(reference, decoder):
    prompt = random_tokens(1, 5, seed=3)
    expected = reference.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=20,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    cache, tokens = decoder.new_cache(), prompt
    new = prompt
    for _ in range(20):
        new = decoder.forward(new, cache, last_only=True).argmax(dim=-1)
        tokens = torch.cat((tokens, new), dim=1)
    assert tokens.tolist() == expected.tolist()
    assert len(set(tokens[0].tolist())) > 5, "a constant continuation would prove little"


def test_a_failed_pass_can_be_repeated_with_the_same_cache(decoder):
    tokens = random_tokens(1, 6)
    cache = decoder.new_cache()
    decoder.forward(tokens[:, :4], cache)
    broken = Decoder(decoder.config, decoder.weights, PlainExperts({}))
    with pytest.raises(KeyError):
        broken.forward(tokens[:, 4:], cache)
    repeated = decoder.forward(tokens[:, 4:], cache)
    torch.testing.assert_close(repeated, decoder.forward(tokens)[:, 4:], **EXACT)


def test_exchanging_weights_between_passes_exchanges_the_variant():
    first, second = build_reference(), build_reference(initializer_range=0.4)
    tokens = random_tokens(1, 6)
    weights = weights_of(first)
    decoder = Decoder(config_of(first), weights, own_experts(expert_parts_of(first)))
    before = decoder.forward(tokens)
    weights.update(weights_of(second))
    hybrid = decoder.forward(tokens)
    weights.update(weights_of(first))
    expected = Decoder(config_of(second), weights_of(second), own_experts(expert_parts_of(first))).forward(
        tokens
    )
    assert not torch.allclose(before, hybrid, atol=0.1)
    assert torch.equal(hybrid, expected)
    assert torch.equal(before, decoder.forward(tokens))


def test_pool_order_does_not_change_logits(reference, decoder):
    order = torch.tensor([2, 0, 3, 1])
    layers = {
        index: PlainExpertLayer(
            slot_to_pool=order.argsort(), parts={name: [p[i] for i in order] for name, p in parts.items()}
        )
        for index, parts in expert_parts_of(reference).items()
    }
    tokens = random_tokens(2, 7)
    mapped = Decoder(decoder.config, decoder.weights, PlainExperts(layers))
    torch.testing.assert_close(mapped.forward(tokens), reference_logits(reference, tokens), **EXACT)


def test_slots_sharing_a_pool_expert_equal_a_model_with_that_expert_twice():
    """Slots 1 and 3 get one expert; the reference holds it twice and adds the two gated outputs."""
    model = build_reference()
    for layer in model.model.layers:
        for stacked in (layer.mlp.experts.gate_up_proj.data, layer.mlp.experts.down_proj.data):
            stacked[3] = stacked[1]
    layers = {
        index: PlainExpertLayer(
            slot_to_pool=torch.tensor([0, 1, 2, 1]), parts={name: p[:3] for name, p in parts.items()}
        )
        for index, parts in expert_parts_of(model).items()
    }
    chosen = []
    decoder = Decoder(
        config_of(model),
        weights_of(model),
        PlainExperts(layers),
        on_route=lambda _layer, _hidden, route: chosen.append(route.slots_TK.sort(dim=-1).values),
    )
    tokens = random_tokens(2, 12)
    logits = decoder.forward(tokens)
    assert (torch.cat(chosen) == torch.tensor([1, 3])).all(dim=-1).any(), "no token chose both slots"
    torch.testing.assert_close(logits, reference_logits(model, tokens), **EXACT)


def test_observer_sees_the_references_routes(reference):
    seen = {}
    decoder = build_decoder(reference, on_route=lambda layer, hidden, route: seen.update({layer: route}))
    tokens = random_tokens(2, 5)
    decoder.forward(tokens)
    with torch.no_grad():
        expected = reference(tokens, output_router_logits=True).router_logits
    assert sorted(seen) == list(range(NUM_LAYERS))
    for layer, logits in enumerate(expected):
        gates, slots = logits.softmax(dim=-1).topk(2, dim=-1)
        assert seen[layer].slots_TK.tolist() == slots.tolist()
        torch.testing.assert_close(seen[layer].gates_TK, gates / gates.sum(dim=-1, keepdim=True), **EXACT)


def test_bfloat16_stays_as_close_to_float32_as_the_reference_does():
    """In bf16 a near tie may route otherwise, so errors are compared as a mean over all logits.

    Tolerance: at most 1.5 times the mean error that transformers itself has in bf16.
    """
    model = build_reference(num_experts_per_tok=NUM_SLOTS)
    tokens = random_tokens(4, 16)
    expected = reference_logits(model, tokens)
    model = model.to(torch.bfloat16)
    logits = build_decoder(model).forward(tokens)
    assert logits.dtype == torch.bfloat16
    own_error = (logits.float() - expected).abs().mean()
    reference_error = (reference_logits(model, tokens).float() - expected).abs().mean()
    assert 0 < own_error < 1.5 * reference_error
