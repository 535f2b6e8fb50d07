"""The encoder-decoder against transformers' Switch Transformers, on tiny random models.

Shapes: B texts, S input tokens, T target tokens, D 32, E 4 slots.
"""

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from transformers import SwitchTransformersConfig, SwitchTransformersForConditionalGeneration
from transformers.models.switch_transformers.modeling_switch_transformers import SwitchTransformersAttention

from moemerge.models import (
    Activation,
    EncoderDecoder,
    EncoderDecoderConfig,
    GrowingCache,
    MappedExperts,
    MixedVariants,
    OneVariant,
    PlainPoolLayer,
    StandAlone,
    build_batch,
    own_experts,
)
from moemerge.models.positions import relative_buckets

EXACT = {"atol": 2e-5, "rtol": 1e-5}
NUM_ENCODER_LAYERS, NUM_DECODER_LAYERS, NUM_SLOTS, PAD, START = 4, 2, 4, 0, 3
FEED_FORWARD = {"encoder": 1, "decoder": 2}


def build_reference(seed: int = 11, **changes) -> SwitchTransformersForConditionalGeneration:
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
    torch.manual_seed(seed)
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


def build_own(model, on_route=None) -> StandAlone:
    experts = own_experts(expert_parts_of(model), Activation.RELU)
    return StandAlone(EncoderDecoder(config_of(model), on_route), OneVariant(weights_of(model)), experts)


@torch.no_grad()
def reference_logits(model, inputs_BS: Tensor, targets_BT: Tensor, mask_BS: Tensor | None = None) -> Tensor:
    logits = model(
        input_ids=inputs_BS, attention_mask=mask_BS, decoder_input_ids=targets_BT, use_cache=False
    ).logits
    assert logits.std() > 0.5, "the reference says nothing, so agreeing with it proves nothing"
    return logits


@torch.no_grad()
def reference_hidden(model, text: list[int]) -> Tensor:
    return model.encoder(input_ids=torch.tensor([text])).last_hidden_state[0]


def random_tokens(batch_size: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(2, 50, (batch_size, length), generator=torch.Generator().manual_seed(seed))


def random_texts(*lengths: int, seed: int = 0) -> list[list[int]]:
    return [random_tokens(1, length, seed + number)[0].tolist() for number, length in enumerate(lengths)]


def padded(texts: list[list[int]]) -> tuple[Tensor, Tensor]:
    longest = max(map(len, texts))
    tokens = torch.tensor([text + [PAD] * (longest - len(text)) for text in texts])
    return tokens, torch.tensor([[i < len(text) for i in range(longest)] for text in texts])


class Running:
    """Inputs encoded, and their targets decoded as far as asked for."""

    def __init__(self, own: StandAlone, inputs: list[list[int]]):
        self.own, self.inputs, self.past = own, inputs, [0] * len(inputs)
        self.cache, self.cross = GrowingCache(), GrowingCache()
        batch = build_batch(inputs)
        self.hidden = own.model.encode(batch, own.weights, own.experts)
        cross = self.cross.of(batch.spans)
        for layer in range(NUM_DECODER_LAYERS):
            cross.write(layer, *own.model.cross_keys_and_values(layer, self.hidden, own.weights))

    def decode(
        self, pieces: dict[int, list[int]], limit_capacity=False, granularity=1, is_kept=True
    ) -> list[Tensor]:
        """Logits [T, Vo] of the next tokens of each target."""
        own, numbers = self.own, list(pieces)
        batch = build_batch(list(pieces.values()), [self.past[n] for n in numbers])
        keys = replace(self.cache.of(batch.spans, numbers), granularity=granularity)
        cross = replace(self.cross.of(batch.spans, numbers), granularity=granularity)
        lengths = [len(self.inputs[n]) for n in numbers]
        hidden = own.model.decode(
            batch, own.weights, own.experts, keys if is_kept else None, cross, lengths, limit_capacity
        )
        for number, piece in pieces.items():
            self.past[number] += len(piece)
        logits = own.model.logits(hidden, own.weights)
        return list(torch.split(logits, [len(piece) for piece in pieces.values()]))


def one_pass(own: StandAlone, inputs: list[list[int]], targets: list[list[int]]) -> list[Tensor]:
    """Logits of whole targets; tokens over capacity are dropped, nothing is kept."""
    return Running(own, inputs).decode(dict(enumerate(targets)), limit_capacity=True, is_kept=False)


def stepwise(own: StandAlone, inputs: list[list[int]], targets: list[list[int]], **options) -> list[Tensor]:
    """The same token by token, each target to its own end."""
    running = Running(own, inputs)
    found = [[] for _ in targets]
    for place in range(max(map(len, targets))):
        step = {n: [target[place]] for n, target in enumerate(targets) if place < len(target)}
        for number, logits in zip(step, running.decode(step, **options), strict=True):
            found[number].append(logits)
    return [torch.cat(logits) for logits in found]


@pytest.fixture(scope="module")
def reference():
    return build_reference()


@pytest.fixture(scope="module")
def own(reference) -> StandAlone:
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
    inputs, targets = random_tokens(2, 20), random_tokens(2, 18, seed=1)
    logits = one_pass(build_own(model), inputs.tolist(), targets.tolist())
    torch.testing.assert_close(torch.stack(logits), reference_logits(model, inputs, targets), **EXACT)


@pytest.mark.parametrize("lengths", [(30, 30, 30), (5, 14, 1, 14, 14)])
def test_encoder_output_equals_the_reference(reference, own, lengths):
    inputs = random_texts(*lengths)
    for text, hidden in zip(inputs, torch.split(Running(own, inputs).hidden, lengths), strict=True):
        torch.testing.assert_close(hidden, reference_hidden(reference, text), **EXACT)


def test_a_ragged_batch_equals_the_reference_with_padding_on_the_right(reference, own):
    inputs, targets = random_texts(5, 14, 9), random_tokens(3, 6, seed=1)
    tokens, mask = padded(inputs)
    logits = one_pass(own, inputs, targets.tolist())
    expected = reference_logits(reference, tokens, targets, mask)
    torch.testing.assert_close(torch.stack(logits), expected, **EXACT)


def count_dropped(model, inputs: list[list[int]]) -> int:
    dropped = []
    own = build_own(model, on_route=lambda _layer, _hidden, route: dropped.append(route.gates_TK == 0))
    Running(own, inputs)
    return int(torch.cat(dropped).sum())


def test_a_text_over_capacity_drops_what_the_reference_drops():
    model = build_reference(expert_capacity=2)
    (text,) = random_texts(16)
    assert count_dropped(model, [text]) >= 16 - 2 * NUM_SLOTS
    hidden = Running(build_own(model), [text]).hidden
    torch.testing.assert_close(hidden, reference_hidden(model, text), **EXACT)
    unlimited = Running(build_own(build_reference()), [text]).hidden
    assert (hidden - unlimited).abs().max() > 0.1, "dropping made no difference"


def test_capacity_is_counted_per_text_so_a_batch_equals_its_texts_alone():
    model = build_reference(expert_capacity=3)
    own, inputs = build_own(model), random_texts(16, 11, 16)
    assert count_dropped(model, inputs) > 0
    together = torch.split(Running(own, inputs).hidden, [16, 11, 16])
    for text, hidden in zip(inputs, together, strict=True):
        torch.testing.assert_close(hidden, reference_hidden(model, text), **EXACT)
        torch.testing.assert_close(hidden, Running(own, [text]).hidden, **EXACT)


def test_one_pass_over_capacity_equals_the_reference_and_differs_from_decoding():
    model = build_reference(expert_capacity=2)
    own, inputs, targets = build_own(model), random_texts(6, 4), random_texts(16, 16, seed=5)
    forced = one_pass(own, inputs, targets)
    for text, target, logits in zip(inputs, targets, forced, strict=True):
        expected = reference_logits(model, torch.tensor([text]), torch.tensor([target]))[0]
        torch.testing.assert_close(logits, expected, **EXACT)
    incremental = stepwise(own, inputs, targets)
    assert (incremental[0] - forced[0]).abs().max() > 0.1
    (unlimited,) = Running(own, inputs[:1]).decode({0: targets[0]})
    torch.testing.assert_close(unlimited, incremental[0], **EXACT)


@pytest.mark.parametrize("granularity", [1, 16])
def test_ragged_texts_decode_token_by_token_as_in_one_pass(reference, own, granularity):
    inputs, targets = random_texts(9, 90, 1, 6), random_texts(20, 3, 20, 7, seed=5)
    logits = stepwise(own, inputs, targets, granularity=granularity)
    for text, target, found in zip(inputs, targets, logits, strict=True):
        expected = reference_logits(reference, torch.tensor([text]), torch.tensor([target]))[0]
        torch.testing.assert_close(found, expected, **EXACT)


@pytest.mark.parametrize("granularity", [1, 16])
def test_decoding_in_pieces_equals_one_pass(reference, own, granularity):
    inputs, targets = random_tokens(2, 9), random_tokens(2, 13, seed=1)
    running, steps = Running(own, inputs.tolist()), []
    for begin, end in ((0, 3), (3, 4), (4, 13)):
        pieces = dict(enumerate(targets[:, begin:end].tolist()))
        steps.append(torch.stack(running.decode(pieces, granularity=granularity)))
    expected = reference_logits(reference, inputs, targets)
    torch.testing.assert_close(torch.cat(steps, dim=1), expected, **EXACT)


def test_greedy_tokens_equal_those_of_generate(reference, own):
    inputs = random_texts(10, 7, seed=2)
    tokens, mask = padded(inputs)
    expected = reference.generate(
        tokens, attention_mask=mask.long(), max_new_tokens=15, do_sample=False, eos_token_id=None
    )
    running, answers = Running(own, inputs), [[START], [START]]
    for _ in range(15):
        logits = running.decode({n: answer[-1:] for n, answer in enumerate(answers)})
        for answer, found in zip(answers, logits, strict=True):
            answer.append(int(found[-1].argmax()))
    assert answers == expected.tolist()
    assert answers[0] != answers[1]


def test_a_batch_of_several_variants_equals_each_variant_alone():
    references = [build_reference(seed, expert_capacity=3) for seed in (11, 12)]
    variants = [build_own(model) for model in references]
    tensors = [variant.weights.tensors for variant in variants]
    tensors[1] |= {role: tensors[0][role] for role in tensors[0] if ".attention." in role}
    layers = {
        layer: PlainPoolLayer([*variants[0].experts.layers[layer].experts, *one.experts], Activation.RELU)
        for layer, one in variants[1].experts.layers.items()
    }
    maps = dict.fromkeys(layers, torch.tensor([[0, 1, 2, 3], [4, 5, 6, 7]]))
    owners, inputs, targets = [0, 1, 1, 0], random_texts(14, 9, 9, 4), random_texts(6, 6, 6, 6, seed=5)

    def mixed(lengths: list[int]) -> StandAlone:
        parts = [(length, tensors[owner]) for owner, length in zip(owners, lengths, strict=True)]
        owner_T = torch.tensor(owners).repeat_interleave(torch.tensor(lengths))
        experts = MappedExperts(layers, maps, owner_T)
        return StandAlone(variants[0].model, MixedVariants(parts), experts)

    running = Running(mixed([14, 9, 9, 4]), inputs)
    running.own = mixed([6] * 4)
    together = running.decode(dict(enumerate(targets)))
    running.own = mixed([1] * 4)
    next_token = running.decode({number: [7] for number in range(4)})
    for number, owner in enumerate(owners):
        alone = Running(variants[owner], [inputs[number]])
        torch.testing.assert_close(together[number], alone.decode({0: targets[number]})[0], **EXACT)
        torch.testing.assert_close(next_token[number], alone.decode({0: [7]})[0], **EXACT)


def test_sharing_experts_keeps_capacity_counted_per_slot():
    """Slots 0 and 1 share a pool expert but not their room, as when the model holds it twice."""
    model, routes = build_reference(expert_capacity=3), []
    for block in [*model.encoder.block, *model.decoder.block]:
        if block.is_sparse:
            experts = block.layer[-1].mlp.experts
            experts["expert_1"].load_state_dict(experts["expert_0"].state_dict())
    own = build_own(model, on_route=lambda _layer, _hidden, route: routes.append(route))
    layers = {
        index: PlainPoolLayer([layer.experts[slot] for slot in (0, 2, 3)], Activation.RELU)
        for index, layer in own.experts.layers.items()
    }
    maps = dict.fromkeys(layers, torch.tensor([[0, 0, 1, 2]]))
    (text,) = random_texts(20)
    hidden = Running(replace(own, experts=MappedExperts(layers, maps)), [text]).hidden
    served = [route.slots_TK[route.gates_TK > 0].bincount(minlength=NUM_SLOTS) for route in routes]
    assert any(counts[0] + counts[1] > 3 for counts in served), "the two slots never needed their own room"
    torch.testing.assert_close(hidden, reference_hidden(model, text), **EXACT)


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
    one_pass(own, random_texts(6, 6), random_texts(4, 4))
    assert seen == [(1, (12, 32)), (3, (12, 32)), (NUM_ENCODER_LAYERS + 1, (8, 32))]


def test_bfloat16_model_computes_router_logits_in_float32():
    model, seen = build_reference().to(torch.bfloat16), []
    own = build_own(model, on_route=lambda _layer, hidden, route: seen.append((hidden, route)))
    Running(own, random_texts(40))
    hidden, route = seen[0]
    router = own.weights.tensors["encoder.1.router"]
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
    logits = torch.stack(one_pass(build_own(model), inputs.tolist(), targets.tolist()))
    assert logits.dtype == torch.bfloat16
    own_error = (logits.float() - expected).abs().mean()
    reference_error = (reference_logits(model, inputs, targets).float() - expected).abs().mean()
    assert 0 < own_error < 1.5 * reference_error
