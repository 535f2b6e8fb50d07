"""The encoder-decoder against transformers' Switch Transformers, on tiny random models.

Shapes: B rows, S input tokens, T target tokens, D 32, E 4 slots.
"""

import pytest
import torch
from torch import Tensor
from transformers import SwitchTransformersConfig, SwitchTransformersForConditionalGeneration
from transformers.models.switch_transformers.modeling_switch_transformers import SwitchTransformersAttention

from moemerge.models import (
    EncoderDecoder,
    EncoderDecoderConfig,
    PlainExpertLayer,
    PlainExperts,
    own_experts,
)
from moemerge.models.positions import relative_buckets

EXACT = {"atol": 2e-5, "rtol": 1e-5}
NUM_ENCODER_LAYERS, NUM_DECODER_LAYERS, NUM_SLOTS, PAD, START = 4, 2, 4, 0, 3
FEED_FORWARD = {"encoder": 1, "decoder": 2}


def build_reference(**changes) -> SwitchTransformersForConditionalGeneration:
    """A random Switch whose logits, norms and position bias are far from uniform."""
    settings = {
        "vocab_size": 50,
        "d_model": 32,
        "d_kv": 12,
        "d_ff": 24,
        "num_heads": 4,
        "num_layers": NUM_ENCODER_LAYERS,
        "num_decoder_layers": NUM_DECODER_LAYERS,
        "encoder_sparse_step": 2,
        "decoder_sparse_step": 2,
        "num_experts": NUM_SLOTS,
        "expert_capacity": 64,
        "relative_attention_num_buckets": 8,
        "relative_attention_max_distance": 12,
        "dropout_rate": 0.0,
        "pad_token_id": PAD,
        "eos_token_id": 1,
        "decoder_start_token_id": START,
        "tie_word_embeddings": True,
        "attn_implementation": "eager",
    }
    torch.manual_seed(11)
    model = SwitchTransformersForConditionalGeneration(
        SwitchTransformersConfig(**(settings | changes))
    ).eval()
    with torch.no_grad():
        for stack in (model.encoder, model.decoder):
            # With an untied head transformers unties these two from `shared` as well.
            stack.embed_tokens.weight.copy_(model.shared.weight)
        for name, parameter in model.named_parameters():
            if "layer_norm" in name:
                parameter.uniform_(0.5, 1.5)
            if "relative_attention_bias" in name:
                parameter.normal_(std=2.0)
    return model


def config_of(model: SwitchTransformersForConditionalGeneration) -> EncoderDecoderConfig:
    config = model.config
    return EncoderDecoderConfig.from_settings(
        {
            "hidden_size": config.d_model,
            "head_size": config.d_kv,
            "num_heads": config.num_heads,
            "num_encoder_layers": config.num_layers,
            "num_decoder_layers": config.num_decoder_layers,
            "expert_capacity": config.expert_capacity,
            "vocab_size": config.vocab_size,
            "norm_eps": config.layer_norm_epsilon,
            "position_buckets": config.relative_attention_num_buckets,
            "position_max_distance": config.relative_attention_max_distance,
            "activation": "relu",
            "tied_head": config.tie_word_embeddings,
            "start_token_id": config.decoder_start_token_id,
            "pad_token_id": config.pad_token_id,
        }
    )


def weights_of(model: SwitchTransformersForConditionalGeneration) -> dict[str, Tensor]:
    state = model.state_dict()
    weights = {"embedding": state["shared.weight"]}
    if not model.config.tie_word_embeddings:
        weights["head"] = state["lm_head.weight"]
    for stack, ff in FEED_FORWARD.items():
        weights[f"{stack}.final_norm"] = state[f"{stack}.final_layer_norm.weight"]
        bias = f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
        weights[f"{stack}.position_bias"] = state[bias]
        for layer in range(len(getattr(model, stack).block)):
            weights |= _layer_weights(state, stack, layer, ff)
    return weights


def _layer_weights(state, stack, layer, ff) -> dict[str, Tensor]:
    source, role = f"{stack}.block.{layer}.layer", f"{stack}.{layer}"
    names = {
        f"{source}.0.layer_norm.weight": f"{role}.attention_norm",
        f"{source}.{ff}.layer_norm.weight": f"{role}.ffn_norm",
        f"{source}.{ff}.mlp.router.classifier.weight": f"{role}.router",
        f"{source}.{ff}.mlp.wi.weight": f"{role}.ffn.wi",
        f"{source}.{ff}.mlp.wo.weight": f"{role}.ffn.wo",
    }
    for letter, part in {"q": "query", "k": "key", "v": "value", "o": "output"}.items():
        names[f"{source}.0.SelfAttention.{letter}.weight"] = f"{role}.attention.{part}"
        names[f"{source}.1.EncDecAttention.{letter}.weight"] = f"{role}.cross_attention.{part}"
    if stack == "decoder":
        names[f"{source}.1.layer_norm.weight"] = f"{role}.cross_attention_norm"
    return {role: state[name] for name, role in names.items() if name in state}


def expert_parts_of(model) -> dict[int, dict[str, list[Tensor]]]:
    parts = {}
    for layer_index, block in enumerate([*model.encoder.block, *model.decoder.block]):
        if block.is_sparse:
            experts = block.layer[-1].mlp.experts.values()
            matrices = [(expert.wi.weight.data, expert.wo.weight.data) for expert in experts]
            parts[layer_index] = {
                "wi": [wi for wi, _ in matrices],
                "wo": [wo for _, wo in matrices],
            }
    return parts


def build_own(model, on_route=None) -> EncoderDecoder:
    return EncoderDecoder(config_of(model), weights_of(model), own_experts(expert_parts_of(model)), on_route)


@torch.no_grad()
def reference_logits(model, inputs_BS: Tensor, targets_BT: Tensor, mask_BS: Tensor | None = None) -> Tensor:
    logits = model(
        input_ids=inputs_BS, attention_mask=mask_BS, decoder_input_ids=targets_BT, use_cache=False
    ).logits
    assert logits.std() > 0.5, "the reference says nothing, so agreeing with it proves nothing"
    return logits


@torch.no_grad()
def reference_hidden(model, inputs_BS: Tensor, mask_BS: Tensor | None = None) -> Tensor:
    return model.encoder(input_ids=inputs_BS, attention_mask=mask_BS).last_hidden_state


def random_tokens(batch_size: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(2, 50, (batch_size, length), generator=torch.Generator().manual_seed(seed))


def padded(tokens_BS: Tensor, lengths: list[int]) -> tuple[Tensor, Tensor]:
    mask = torch.arange(tokens_BS.shape[1]) < torch.tensor(lengths).unsqueeze(1)
    return tokens_BS.masked_fill(~mask, PAD), mask


@pytest.fixture(scope="module")
def reference():
    return build_reference()


@pytest.fixture(scope="module")
def own(reference) -> EncoderDecoder:
    return build_own(reference)


SHAPES = [
    pytest.param({}, id="every-second-layer-sparse"),
    pytest.param({"encoder_sparse_step": 1, "decoder_sparse_step": 1}, id="all-sparse"),
    pytest.param({"encoder_sparse_step": 0, "decoder_sparse_step": 0}, id="all-dense"),
    pytest.param({"tie_word_embeddings": False}, id="untied-head"),
    pytest.param({"relative_attention_num_buckets": 32}, id="more-buckets"),
    pytest.param({"layer_norm_epsilon": 0.1}, id="large-eps"),
]


@pytest.mark.parametrize("changes", SHAPES)
def test_logits_equal_the_reference(changes):
    model = build_reference(**changes)
    own, inputs, targets = build_own(model), random_tokens(2, 20), random_tokens(2, 18, seed=1)
    logits = own.decode(targets, None, own.encode(inputs))
    torch.testing.assert_close(logits, reference_logits(model, inputs, targets), **EXACT)


def test_encoder_output_equals_the_reference(reference, own):
    inputs = random_tokens(3, 30)
    expected = reference_hidden(reference, inputs)
    assert expected.std() > 0.5
    torch.testing.assert_close(own.encode(inputs), expected, **EXACT)


def test_padding_on_the_right_leaves_a_row_as_it_is_alone(reference, own):
    lengths = [5, 14, 9]
    inputs, mask = padded(random_tokens(3, 14), lengths)
    targets = random_tokens(3, 6, seed=1)
    hidden = own.encode(inputs, mask)
    logits = own.decode(targets, None, hidden, mask)
    torch.testing.assert_close(logits, reference_logits(reference, inputs, targets, mask), **EXACT)
    for row, length in enumerate(lengths):
        alone = own.encode(inputs[row : row + 1, :length])
        torch.testing.assert_close(hidden[row : row + 1, :length], alone, **EXACT)
        alone_logits = own.decode(targets[row : row + 1], None, alone)
        torch.testing.assert_close(logits[row : row + 1], alone_logits, **EXACT)


def count_dropped(model, inputs: Tensor, mask: Tensor | None = None) -> int:
    dropped = []
    own = build_own(model, on_route=lambda _layer, _hidden, route: dropped.append(route.gates_TK == 0))
    own.encode(inputs, mask)
    return int(torch.cat(dropped).sum())


def test_a_row_over_capacity_drops_what_the_reference_drops():
    model = build_reference(expert_capacity=2)
    inputs = random_tokens(1, 16)
    assert count_dropped(model, inputs) >= 16 - 2 * NUM_SLOTS
    hidden = build_own(model).encode(inputs)
    torch.testing.assert_close(hidden, reference_hidden(model, inputs), **EXACT)
    unlimited = build_own(build_reference()).encode(inputs)
    assert (hidden - unlimited).abs().max() > 0.1, "dropping made no difference"


def test_capacity_is_counted_per_row_so_a_batch_equals_its_rows_alone():
    model = build_reference(expert_capacity=3)
    own, inputs = build_own(model), random_tokens(2, 16)
    assert count_dropped(model, inputs) > 0
    together = own.encode(inputs)
    torch.testing.assert_close(together, reference_hidden(model, inputs), **EXACT)
    alone = torch.cat([own.encode(inputs[row : row + 1]) for row in range(2)])
    torch.testing.assert_close(together, alone, **EXACT)


def test_padding_uses_capacity_as_in_the_reference():
    """Padding on the left comes first and so takes room from real tokens; on the right it cannot."""
    model = build_reference(expert_capacity=3)
    own, real = build_own(model), random_tokens(1, 8)
    pads, ones = torch.full((1, 8), PAD), torch.ones(1, 8, dtype=torch.bool)
    alone = own.encode(real)
    right = own.encode(torch.cat((real, pads), dim=1), torch.cat((ones, ~ones), dim=1))
    torch.testing.assert_close(right[:, :8], alone, **EXACT)
    inputs, mask = torch.cat((pads, real), dim=1), torch.cat((~ones, ones), dim=1)
    left = own.encode(inputs, mask)
    torch.testing.assert_close(left[:, 8:], reference_hidden(model, inputs, mask)[:, 8:], **EXACT)
    assert (left[:, 8:] - alone).abs().max() > 0.1, "left padding made no difference"


def test_teacher_forcing_over_capacity_equals_the_reference_and_differs_from_decoding():
    model = build_reference(expert_capacity=2)
    own, inputs, targets = build_own(model), random_tokens(1, 6), random_tokens(1, 16, seed=1)
    hidden = own.encode(inputs)
    forced = own.decode(targets, None, hidden)
    torch.testing.assert_close(forced, reference_logits(model, inputs, targets), **EXACT)
    stepwise = decode_stepwise(own, targets, hidden)
    assert (stepwise - forced).abs().max() > 0.1


def decode_stepwise(own: EncoderDecoder, targets: Tensor, hidden: Tensor, mask=None) -> Tensor:
    cache = own.new_cache(batch_size=len(targets))
    steps = [
        own.decode(targets[:, i : i + 1], cache, hidden, mask, last_only=True)
        for i in range(targets.shape[1])
    ]
    assert cache.length == targets.shape[1]
    return torch.cat(steps, dim=1)


def test_decoding_token_by_token_equals_one_pass(reference, own):
    inputs, mask = padded(random_tokens(2, 9), [9, 6])
    targets = random_tokens(2, 20, seed=1)
    stepwise = decode_stepwise(own, targets, own.encode(inputs, mask), mask)
    torch.testing.assert_close(stepwise, reference_logits(reference, inputs, targets, mask), **EXACT)


def test_decoding_in_pieces_equals_one_pass(reference, own):
    inputs, targets = random_tokens(2, 9), random_tokens(2, 13, seed=1)
    hidden, cache = own.encode(inputs), own.new_cache(batch_size=2)
    pieces = [own.decode(piece, cache, hidden) for piece in targets.split([3, 1, 9], dim=1)]
    torch.testing.assert_close(
        torch.cat(pieces, dim=1), reference_logits(reference, inputs, targets), **EXACT
    )


def test_cross_attention_reads_the_encoder_output_once_per_cache(own):
    targets, hidden = random_tokens(1, 4, seed=1), own.encode(random_tokens(1, 7))
    cache = own.new_cache()
    own.decode(targets[:, :2], cache, hidden)
    assert len(cache.cross) == NUM_DECODER_LAYERS
    first_keys = {layer: pair[0] for layer, pair in cache.cross.items()}
    later = own.decode(targets[:, 2:], cache, torch.full_like(hidden, torch.nan))
    torch.testing.assert_close(later, own.decode(targets, None, hidden)[:, 2:], **EXACT)
    assert all(cache.cross[layer][0] is keys for layer, keys in first_keys.items())


def test_greedy_tokens_equal_those_of_generate(reference, own):
    inputs, mask = padded(random_tokens(2, 10, seed=4), [10, 7])
    expected = reference.generate(
        inputs, attention_mask=mask.long(), max_new_tokens=15, do_sample=False, eos_token_id=None
    )
    hidden, cache = own.encode(inputs, mask), own.new_cache(batch_size=2)
    new = torch.full((2, 1), own.config.start_token_id)
    tokens = new
    for _ in range(15):
        new = own.decode(new, cache, hidden, mask, last_only=True).argmax(dim=-1)
        tokens = torch.cat((tokens, new), dim=1)
    assert tokens.tolist() == expected.tolist()
    assert tokens[0].tolist() != tokens[1].tolist()


def test_last_only_returns_the_last_token(own):
    hidden, targets = own.encode(random_tokens(2, 5)), random_tokens(2, 4, seed=1)
    last = own.decode(targets, None, hidden, last_only=True)
    torch.testing.assert_close(last, own.decode(targets, None, hidden)[:, -1:], **EXACT)


def test_sharing_experts_keeps_capacity_counted_per_slot():
    """Slots 0 and 1 share a pool expert but not their room, as when the model holds it twice."""
    model = build_reference(expert_capacity=3)
    for block in [*model.encoder.block, *model.decoder.block]:
        if block.is_sparse:
            experts = block.layer[-1].mlp.experts
            experts["expert_1"].load_state_dict(experts["expert_0"].state_dict())
    layers = {
        index: PlainExpertLayer(
            slot_to_pool=torch.tensor([0, 0, 1, 2]),
            parts={name: [p[0], p[2], p[3]] for name, p in parts.items()},
        )
        for index, parts in expert_parts_of(model).items()
    }
    routes = []
    shared = EncoderDecoder(
        config_of(model),
        weights_of(model),
        PlainExperts(layers),
        on_route=lambda _layer, _hidden, route: routes.append(route),
    )
    inputs = random_tokens(1, 20)
    hidden = shared.encode(inputs)
    served = [route.slots_TK[route.gates_TK > 0].bincount(minlength=NUM_SLOTS) for route in routes]
    assert any(counts[0] + counts[1] > 3 for counts in served), "the two slots never needed their own room"
    torch.testing.assert_close(hidden, reference_hidden(model, inputs), **EXACT)


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize(("num_buckets", "max_distance"), [(32, 128), (8, 12)])
def test_buckets_equal_the_reference(num_buckets, max_distance, bidirectional):
    distance = torch.arange(-300, 301)
    expected = SwitchTransformersAttention._relative_position_bucket(
        distance, bidirectional, num_buckets, max_distance
    )
    buckets = relative_buckets(distance, num_buckets, max_distance, bidirectional)
    assert buckets.tolist() == expected.tolist()
    assert len(set(buckets.tolist())) == num_buckets - bidirectional


def test_observer_counts_layers_through_both_stacks(reference):
    seen = []
    own = build_own(reference, on_route=lambda layer, hidden, _route: seen.append((layer, hidden.shape)))
    own.decode(random_tokens(2, 4), None, own.encode(random_tokens(2, 6)))
    assert seen == [(1, (12, 32)), (3, (12, 32)), (NUM_ENCODER_LAYERS + 1, (8, 32))]


def test_bfloat16_model_computes_router_logits_in_float32():
    model, seen = build_reference().to(torch.bfloat16), []
    own = build_own(model, on_route=lambda _layer, hidden, route: seen.append((hidden, route)))
    own.encode(random_tokens(1, 40))
    hidden, route = seen[0]
    router = own.weights["encoder.1.router"]
    wide = (hidden.float() @ router.float().T).softmax(dim=-1).amax(dim=-1).bfloat16().float()
    narrow = (hidden @ router.T).float().softmax(dim=-1).amax(dim=-1).bfloat16().float()
    assert not torch.equal(wide, narrow)
    assert torch.equal(route.gates_TK[:, 0], wide)


def test_bfloat16_stays_as_close_to_float32_as_the_reference_does():
    """In bf16 a near tie may route otherwise, so errors are compared as a mean over all logits.

    Tolerance: at most 1.5 times the mean error that transformers itself has in bf16.
    """
    model = build_reference()
    inputs, targets = random_tokens(4, 16), random_tokens(4, 12, seed=1)
    expected = reference_logits(model, inputs, targets)
    model = model.to(torch.bfloat16)
    own = build_own(model)
    logits = own.decode(targets, None, own.encode(inputs))
    assert logits.dtype == torch.bfloat16
    own_error = (logits.float() - expected).abs().mean()
    reference_error = (reference_logits(model, inputs, targets).float() - expected).abs().mean()
    assert 0 < own_error < 1.5 * reference_error
