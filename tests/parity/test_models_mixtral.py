"""The decoder against transformers' Mixtral, on tiny random models.

Shapes: B texts, T tokens, D 32, E 4 slots.
"""

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor
from transformers import MixtralConfig, MixtralForCausalLM

from moemerge.models import (
    Activation,
    Decoder,
    DecoderConfig,
    GrowingCache,
    MappedExperts,
    MixedVariants,
    OneVariant,
    PlainPoolLayer,
    StandAlone,
    build_batch,
    can_pack,
    own_experts,
    pack,
)

EXACT = {"atol": 5e-5, "rtol": 1e-5}
"""The reference's own two attention kernels differ by 1.1e-5 on these models."""
TOGETHER = {"atol": 1e-5, "rtol": 1e-5}
"""Between a token in a batch and the same alone: products of other shapes may round otherwise."""
ONE_BFLOAT16_STEP = {"atol": 0.0, "rtol": 2**-7}
NUM_LAYERS, NUM_SLOTS, EXPERT_WIDTH = 3, 4, 24
SILU = Activation.SILU_GATED

ROLES = {
    "input_layernorm.weight": "attention_norm",
    "self_attn.q_proj.weight": "attention.query",
    "self_attn.k_proj.weight": "attention.key",
    "self_attn.v_proj.weight": "attention.value",
    "self_attn.o_proj.weight": "attention.output",
    "post_attention_layernorm.weight": "ffn_norm",
    "mlp.gate.weight": "router",
}


def build_reference(seed: int = 7, **changes) -> MixtralForCausalLM:
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
    torch.manual_seed(seed)
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


def build_own(model: MixtralForCausalLM, on_route=None) -> StandAlone:
    experts = own_experts(expert_parts_of(model), SILU)
    return StandAlone(Decoder(config_of(model), on_route), OneVariant(weights_of(model)), experts)


@torch.no_grad()
def reference_logits(model: MixtralForCausalLM, tokens_BT: Tensor) -> Tensor:
    logits = model(tokens_BT, use_cache=False).logits
    assert logits.std() > 0.5, "the reference says nothing, so agreeing with it proves nothing"
    return logits


def random_tokens(batch_size: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 50, (batch_size, length), generator=torch.Generator().manual_seed(seed))


def random_texts(*lengths: int, seed: int = 0) -> list[list[int]]:
    return [random_tokens(1, length, seed + number)[0].tolist() for number, length in enumerate(lengths)]


@dataclass
class Running:
    """Texts in a cache, each as far as it was computed."""

    own: StandAlone
    texts: list[list[int]]
    granularity: int = 1

    def __post_init__(self):
        self.cache, self.past = GrowingCache(), [0] * len(self.texts)

    def advance(self, num_new: dict[int, int]) -> list[Tensor]:
        """Compute so many tokens of the texts named, in that order; logits [T, Vo] of each of them."""
        pieces = [self.texts[n][self.past[n] : self.past[n] + count] for n, count in num_new.items()]
        batch = build_batch(pieces, [self.past[n] for n in num_new])
        keys = NoisyTails(self.cache.of(batch.spans, list(num_new)), self.granularity)
        hidden = self.own.model.forward(batch, self.own.weights, self.own.experts, keys)
        for number, count in num_new.items():
            self.past[number] += count
        logits = self.own.model.logits(hidden, self.own.weights)
        return list(torch.split(logits, list(num_new.values())))


@dataclass
class NoisyTails:
    """Keys of a cache that gives whole blocks, with leftovers of others behind a sequence's end."""

    keys: object
    granularity: int

    def write(self, layer_index, key_TGh, value_TGh):
        self.keys.write(layer_index, key_TGh, value_TGh)

    def read(self, layer_index, group):
        assert group.num_keys % self.granularity == 0
        keys, values = (tensor.clone() for tensor in self.keys.read(layer_index, group))
        for row, number in enumerate(group.sequences):
            end = self.keys.spans[number].num_keys
            keys[row, :, end:], values[row, :, end:] = 50.0, -300.0
        return keys, values


@pytest.fixture(scope="module")
def reference() -> MixtralForCausalLM:
    return build_reference()


@pytest.fixture(scope="module")
def own(reference) -> StandAlone:
    return build_own(reference)


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
    torch.testing.assert_close(build_own(model).forward(tokens), reference_logits(model, tokens), **EXACT)


@pytest.mark.parametrize("granularity", [1, 4])
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("pieces", [[5, *[1] * 8], [2, 6, 4, 1], [1] * 13], ids=str)
def test_a_text_in_pieces_equals_one_pass(pieces, window, granularity):
    model = build_reference(sliding_window=window)
    (text,) = random_texts(13)
    running = Running(build_own(model), [text], granularity)
    logits = torch.cat([running.advance({0: count})[0] for count in pieces])
    torch.testing.assert_close(logits, reference_logits(model, torch.tensor([text]))[0], **EXACT)


def test_sliding_window_hides_what_lies_before_it(own):
    tokens = random_tokens(1, 12)
    narrow = replace(own, model=Decoder(replace(own.model.config, sliding_window=3)))
    full, windowed = own.forward(tokens), narrow.forward(tokens)
    torch.testing.assert_close(windowed[:, :3], full[:, :3], **EXACT)
    assert (windowed[:, 3:] - full[:, 3:]).abs().max() > 0.1


def test_texts_of_different_lengths_pass_side_by_side(reference, own):
    texts = random_texts(4, 9, 1, 9)
    together = Running(own, texts).advance({number: len(text) for number, text in enumerate(texts)})
    for text, logits in zip(texts, together, strict=True):
        torch.testing.assert_close(logits, reference_logits(reference, torch.tensor([text]))[0], **EXACT)


@pytest.mark.parametrize("granularity", [1, 16])
@pytest.mark.parametrize("window", [None, 3])
def test_ragged_texts_decode_together_as_they_do_alone(window, granularity):
    """Lengths far enough apart to be attended in several groups, given in no order of length."""
    model = build_reference(sliding_window=window, max_position_embeddings=512)
    lengths = [2, 150, 7, 5, 149, 70, 1]
    texts = random_texts(*(length + 3 for length in lengths))
    running = Running(build_own(model), texts, granularity)
    steps = [running.advance(dict(enumerate(lengths)))]
    steps += [running.advance(dict.fromkeys(range(len(texts)), 1)) for _ in range(3)]
    for number, text in enumerate(texts):
        logits = torch.cat([step[number] for step in steps])
        torch.testing.assert_close(logits, reference_logits(model, torch.tensor([text]))[0], **EXACT)


@pytest.mark.parametrize("window", [None, 4])
def test_prompts_chunks_and_decoding_pass_in_one_step(window):
    model = build_reference(sliding_window=window)
    texts = random_texts(12, 11, 9, 14, 10)
    running = Running(build_own(model), texts, granularity=4)
    found = {number: [] for number in range(len(texts))}
    for step in ({0: 11, 2: 3}, {1: 2, 0: 1, 2: 1, 3: 5}, {4: 9, 3: 4, 2: 1, 1: 9}, {4: 1, 3: 5, 2: 4}):
        for number, logits in zip(step, running.advance(step), strict=True):
            found[number].append(logits)
    for number, text in enumerate(texts):
        expected = reference_logits(model, torch.tensor([text]))[0]
        torch.testing.assert_close(torch.cat(found[number]), expected, **EXACT)


def test_greedy_tokens_equal_those_of_generate(reference, own):
    prompt = random_tokens(1, 5, seed=3)
    expected = reference.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=20,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    running = Running(own, prompt.tolist())
    text, num_new = running.texts[0], 5
    for _ in range(20):
        (logits,) = running.advance({0: num_new})
        text.append(int(logits[-1].argmax()))
        num_new = 1
    assert [text] == expected.tolist()
    assert len(set(text)) > 5, "a constant continuation would prove little"


def test_a_failed_pass_can_be_repeated_with_the_same_cache(own):
    (text,) = random_texts(6)
    running = Running(own, [text])
    running.advance({0: 4})
    running.own = replace(own, experts=MappedExperts({}, {}))
    with pytest.raises(KeyError):
        running.advance({0: 2})
    running.own = own
    (repeated,) = running.advance({0: 2})
    torch.testing.assert_close(repeated, own.forward(torch.tensor([text]))[0, 4:], **EXACT)


def build_variants() -> tuple[Decoder, list[dict[str, Tensor]], MappedExperts]:
    """Three variants over one pool of all their experts; the second shares most tensors with the first."""
    references = [build_reference(seed) for seed in (7, 8, 9)]
    tensors = [weights_of(model) for model in references]
    tensors[1] |= {role: tensors[0][role] for role in tensors[0] if "attention" in role or "norm" in role}
    pools = [expert_parts_of(model) for model in references]
    layers = {
        layer: PlainPoolLayer(
            [
                {name: parts[layer][name][slot] for name in ("gate", "up", "down")}
                for parts in pools
                for slot in range(NUM_SLOTS)
            ],
            SILU,
        )
        for layer in range(NUM_LAYERS)
    }
    # The third variant takes two of its slots from the first.
    maps = torch.tensor([[0, 1, 2, 3], [4, 5, 6, 7], [8, 1, 3, 11]])
    return Decoder(config_of(references[0])), tensors, MappedExperts(layers, dict.fromkeys(layers, maps))


@pytest.mark.parametrize("order", [[0, 1, 2], [2, 0, 1], [0, 2, 0, 1], [1, 0]])
def test_a_batch_of_several_variants_equals_each_variant_alone(order):
    model, tensors, experts = build_variants()
    lengths = [[3, 1], [8], [1], [5, 5]][: len(order)]
    texts = [random_texts(*counts, seed=10 * place) for place, counts in enumerate(lengths)]
    counts = [sum(map(len, group)) for group in texts]
    batch = build_batch([text for group in texts for text in group])
    owner = torch.tensor(order).repeat_interleave(torch.tensor(counts))
    weights = MixedVariants([(count, tensors[v]) for count, v in zip(counts, order, strict=True)])
    together = model.forward(batch, weights, replace(experts, owner=owner))
    for hidden, variant, group in zip(torch.split(together, counts), order, texts, strict=True):
        one = OneVariant(tensors[variant])
        alone = model.forward(build_batch(group), one, replace(experts, owner=variant))
        torch.testing.assert_close(model.logits(hidden, one), model.logits(alone, one), **TOGETHER)


def test_variants_of_different_vocabularies_pass_together():
    model, tensors, experts = build_variants()
    tensors[1]["embedding"] = torch.cat((tensors[1]["embedding"], torch.randn(14, 32)))
    tensors[1]["head"] = torch.cat((tensors[1]["head"], torch.randn(14, 32)))
    batch = build_batch([[4, 49, 7], [63, 50, 2]])
    weights = MixedVariants([(3, tensors[0]), (3, tensors[1])])
    together = model.forward(batch, weights, replace(experts, owner=torch.tensor([0, 0, 0, 1, 1, 1])))
    for variant, tokens in enumerate(([4, 49, 7], [63, 50, 2])):
        one = OneVariant(tensors[variant])
        alone = model.forward(build_batch([tokens]), one, replace(experts, owner=variant))
        hidden = together[3 * variant : 3 * variant + 3]
        assert model.logits(hidden, one).shape == (3, (50, 64)[variant])
        torch.testing.assert_close(model.logits(hidden, one), model.logits(alone, one), **TOGETHER)


def test_pool_order_does_not_change_logits(reference, own):
    order = torch.tensor([2, 0, 3, 1])
    layers = {
        index: PlainPoolLayer([{name: p[i] for name, p in parts.items()} for i in order], SILU)
        for index, parts in expert_parts_of(reference).items()
    }
    tokens = random_tokens(2, 7)
    maps = dict.fromkeys(layers, order.argsort().unsqueeze(0))
    mapped = replace(own, experts=MappedExperts(layers, maps))
    torch.testing.assert_close(mapped.forward(tokens), reference_logits(reference, tokens), **EXACT)


def test_slots_sharing_a_pool_expert_equal_a_model_with_that_expert_twice():
    """Slots 1 and 3 get one expert; the reference holds it twice and adds the two gated outputs."""
    model, chosen = build_reference(), []
    for layer in model.model.layers:
        for stacked in (layer.mlp.experts.gate_up_proj.data, layer.mlp.experts.down_proj.data):
            stacked[3] = stacked[1]
    layers = {
        index: PlainPoolLayer([{name: p[i] for name, p in parts.items()} for i in range(3)], SILU)
        for index, parts in expert_parts_of(model).items()
    }
    own = build_own(model, lambda _layer, _hidden, route: chosen.append(route.slots_TK.sort(dim=-1).values))
    maps = dict.fromkeys(layers, torch.tensor([[0, 1, 2, 1]]))
    own = replace(own, experts=MappedExperts(layers, maps))
    tokens = random_tokens(2, 12)
    logits = own.forward(tokens)
    assert (torch.cat(chosen) == torch.tensor([1, 3])).all(dim=-1).any(), "no token chose both slots"
    torch.testing.assert_close(logits, reference_logits(model, tokens), **EXACT)
    running = Running(own, tokens[:1].tolist())
    stepwise = torch.cat([running.advance({0: 1})[0] for _ in range(12)])
    torch.testing.assert_close(stepwise, logits[0], **EXACT)


def test_observer_sees_the_references_routes(reference):
    seen = {}
    own = build_own(reference, on_route=lambda layer, hidden, route: seen.update({layer: route}))
    tokens = random_tokens(2, 5)
    own.forward(tokens)
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
    logits = build_own(model).forward(tokens)
    assert logits.dtype == torch.bfloat16
    own_error = (logits.float() - expected).abs().mean()
    reference_error = (reference_logits(model, tokens).float() - expected).abs().mean()
    assert 0 < own_error < 1.5 * reference_error


@pytest.mark.skipif(
    not can_pack(torch.bfloat16, torch.device("cpu")), reason="this CPU or this torch packs nothing"
)
@pytest.mark.parametrize("tied", [False, True])
def test_packed_matrices_give_the_logits_of_plain_ones(tied):
    """Fused and packed experts, packed attention and head, of one variant and of two side by side."""
    model = build_reference(tie_word_embeddings=tied).to(torch.bfloat16)
    own, tokens = build_own(model), random_tokens(2, 9)
    plain = own.weights.tensors
    packed = plain | {role: pack(tensor) for role, tensor in plain.items() if ".attention." in role}
    packed["head"] = pack(plain["embedding" if tied else "head"])
    layers = {}
    for index, layer in own.experts.layers.items():
        fused = [
            {"gate_up": pack(torch.cat((e["gate"], e["up"]))), "down": pack(e["down"])} for e in layer.experts
        ]
        layers[index] = PlainPoolLayer(fused, SILU)
    other = StandAlone(own.model, OneVariant(packed), replace(own.experts, layers=layers))
    expected = own.forward(tokens)
    torch.testing.assert_close(other.forward(tokens), expected, **ONE_BFLOAT16_STEP)
    mixed = replace(other, weights=MixedVariants([(9, packed), (9, plain | {"head": packed["head"]})]))
    torch.testing.assert_close(mixed.forward(tokens), expected, **ONE_BFLOAT16_STEP)
