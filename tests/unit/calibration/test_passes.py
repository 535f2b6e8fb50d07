"""A streamed pass against the model in memory, told every route and every token."""

from dataclasses import replace
from types import SimpleNamespace

import psutil
import pytest
import torch

from moemerge.calibration import passes
from moemerge.calibration.passes import (
    CalibrationOptions,
    calibrate_layers,
    mean_nll,
    measure_nll,
    passage_nll,
)
from moemerge.calibration.random_inputs import random_statistics
from moemerge.calibration.spans import next_span
from moemerge.calibration.statistics import SCALARS
from moemerge.calibration.texts import Passage
from moemerge.checkpoint.checkpoint import open_checkpoint
from moemerge.checkpoint.repository import LocalFolder
from moemerge.errors import DamagedInput, InvalidRecipe, NotEnoughRoom
from moemerge.evaluation.loading import load_model
from moemerge.evaluation.reading import predict
from moemerge.models import GrowingCache, build_batch
from tests.factories import edit_tensors, write_checkpoint

FAMILIES = ("mixtral", "switch_transformers")
RESERVOIR = 16


def draw_passages(family, count=9):
    generator = torch.Generator().manual_seed(1)

    def draw(length):
        return torch.randint(3, 64, (length,), generator=generator).tolist()

    if family == "mixtral":
        return [Passage(draw(24)) for _ in range(count)]
    return [Passage(draw(5 + number // 2), draw(2 + number % 3)) for number in range(count)]


@pytest.fixture(scope="module", params=FAMILIES)
def tiny(request, tmp_path_factory):
    folder = write_checkpoint(tmp_path_factory.mktemp("tiny") / "one", request.param, dtype="F32")
    checkpoint = open_checkpoint(LocalFolder(folder))
    return SimpleNamespace(folder=folder, checkpoint=checkpoint, passages=draw_passages(request.param))


def calibrate(tiny, **options):
    kept = {}

    def keep(layer_index, layer):
        if layer_index in kept:
            kept[layer_index].add(layer)
        else:
            kept[layer_index] = layer

    chosen = CalibrationOptions(reservoir=RESERVOIR, **options)
    checkpoint, passages = tiny.checkpoint, tiny.passages
    layers = next_span(checkpoint, passages, tiny.folder, chosen)
    after = torch.cat(list(calibrate_layers(checkpoint, passages, layers, keep, chosen)))
    return kept, passage_nll(checkpoint, passages, lambda rows: after[rows], chosen)


def run_in_memory(tiny, passage, observer):
    """Log-likelihood of one passage by the model in memory."""
    variant = load_model(tiny.checkpoint)
    model = variant.model
    model.on_route = observer
    if passage.target_ids:
        batch = build_batch([passage.token_ids])
        encoded = model.encode(batch, variant.weights, variant.experts)
        cross = GrowingCache().of(batch.spans)
        for layer in range(model.config.num_decoder_layers):
            cross.write(layer, *model.cross_keys_and_values(layer, encoded, variant.weights))
        answer = build_batch([[model.config.start_token_id, *passage.target_ids[:-1]]])
        lengths = [len(passage.token_ids)]
        hidden = model.decode(answer, variant.weights, variant.experts, None, cross, lengths)
        logits, labels = model.logits(hidden, variant.weights), list(passage.target_ids)
    else:
        logits = variant.forward(torch.tensor([passage.token_ids]))[0, :-1]
        labels = list(passage.token_ids[1:])
    return torch.nn.functional.cross_entropy(logits, torch.tensor(labels), reduction="sum").item()


@torch.no_grad()
def observe(tiny):
    """Inputs and gates of every (layer, slot); output energy and tokens of every layer; losses; experts."""
    experts = load_model(tiny.checkpoint).experts
    met, energy, tokens = {}, {}, {}

    def observer(layer, hidden, route):
        tokens[layer] = tokens.get(layer, 0) + len(hidden)
        output = experts.product(layer, hidden, route)
        energy[layer] = energy.get(layer, 0.0) + output.square().sum().item()
        for row, slots, gates in zip(hidden, route.slots_TK.tolist(), route.gates_TK, strict=True):
            for slot, gate in zip(slots, gates, strict=True):
                met.setdefault((layer, slot), []).append((row, gate))

    nll = [run_in_memory(tiny, passage, observer) for passage in tiny.passages]
    return met, energy, tokens, nll, experts


def test_counts_what_the_model_in_memory_routes(tiny):
    met, energy, tokens, nll, experts = observe(tiny)
    kept, losses = calibrate(tiny)
    assert kept.keys() == {layer.index for layer in tiny.checkpoint.routed_layers}
    assert losses == pytest.approx(nll, rel=1e-4)
    for index, layer in kept.items():
        assert layer.num_tokens == tokens[index]
        assert layer.output_square_sum == pytest.approx(energy[index], rel=1e-4)
        assert (
            sum(slot.count for slot in layer.slots)
            == tokens[index] * (tiny.checkpoint.settings["num_experts_per_token"])
        )
        for number, slot in enumerate(layer.slots):
            rows = met.get((index, number), [])
            assert slot.count == len(rows)
            assert len(slot.gates_S) == min(RESERVOIR, len(rows))
            if rows:
                check_slot(slot, *map(torch.stack, zip(*rows, strict=True)), experts.layers[index], number)


def check_slot(slot, inputs, gates, pool, number):
    outputs = pool.output(number, inputs)
    gated = gates.unsqueeze(1) * inputs
    torch.testing.assert_close(slot.moment_DD, gated.T @ gated, rtol=1e-3, atol=1e-4)
    assert slot.gate_sum == pytest.approx(gates.sum().item(), rel=1e-4)
    assert slot.output_max == pytest.approx(outputs.abs().max().item(), rel=1e-3)
    norms = outputs.norm(dim=1)
    assert slot.saliency_sum == pytest.approx((gates * norms).sum().item(), rel=1e-3)
    assert slot.output_square_sum == pytest.approx((gates * norms).square().sum().item(), rel=1e-3)
    for sampled, gate in zip(slot.inputs_SD.float(), slot.gates_S, strict=True):
        nearest = (inputs - sampled).norm(dim=1).argmin()
        torch.testing.assert_close(sampled, inputs[nearest], rtol=1e-2, atol=1e-2)
        assert gate == pytest.approx(gates[nearest].item(), abs=1e-4)


def test_same_seed_gives_the_same_bytes_and_another_seed_another_sample(tiny):
    (first, _), (again, _), (other, _) = calibrate(tiny), calibrate(tiny), calibrate(tiny, seed=1)
    changed = False
    for index, layer in first.items():
        for slot, same, drawn in zip(layer.slots, again[index].slots, other[index].slots, strict=True):
            assert slot.moment_DD.equal(same.moment_DD)
            assert slot.inputs_SD.equal(same.inputs_SD)
            assert slot.count == drawn.count
            changed |= not slot.inputs_SD.equal(drawn.inputs_SD)
    assert changed


def test_many_passes_give_what_one_gives(tiny, monkeypatch):
    whole, nll = calibrate(tiny)
    monkeypatch.setattr(passes, "pass_tokens", lambda *_: 40)
    parts, losses = calibrate(tiny)
    assert losses == pytest.approx(nll, rel=1e-4)
    for index, layer in whole.items():
        assert parts[index].num_tokens == layer.num_tokens
        for slot, other in zip(layer.slots, parts[index].slots, strict=True):
            for name in SCALARS:
                assert getattr(slot, name) == pytest.approx(getattr(other, name), rel=1e-3)
            assert slot.keys_S.equal(other.keys_S)
            torch.testing.assert_close(slot.moment_DD, other.moment_DD, rtol=1e-3, atol=1e-4)


def test_log_likelihood_alone_is_the_same(tiny):
    _, nll = calibrate(tiny)
    options = CalibrationOptions()
    assert measure_nll(tiny.checkpoint, tiny.passages, options) == pytest.approx(nll)


def test_mean_over_windows_is_that_of_evaluation(tmp_path):
    checkpoint = open_checkpoint(LocalFolder(write_checkpoint(tmp_path / "one", dtype="F32")))
    windows = draw_passages("mixtral")
    nll = measure_nll(checkpoint, windows, CalibrationOptions())
    model = load_model(checkpoint)
    expected = mean_nll(predict(model, windows).nll(), windows)
    assert mean_nll(nll, windows) == pytest.approx(expected, rel=1e-5)


def test_bfloat16_is_near_float32(tiny):
    _, exact = calibrate(tiny)
    _, rough = calibrate(tiny, dtype="bfloat16")
    assert sum(rough) == pytest.approx(sum(exact), rel=0.05)


def test_memory_limits_the_tokens_of_a_pass(tiny):
    options = CalibrationOptions(reservoir=RESERVOIR)
    free = passes.pass_tokens(tiny.checkpoint, tiny.passages, options)
    limited = replace(options, max_ram=600 * 2**20)
    assert 0 < passes.pass_tokens(tiny.checkpoint, tiny.passages, limited) < free
    with pytest.raises(NotEnoughRoom, match="--max-ram allows"):
        passes.pass_tokens(tiny.checkpoint, tiny.passages, replace(options, max_ram=2**20))


def test_full_machine_is_told_as_such(tiny, monkeypatch):
    # What this process holds counts as free for it, so that has to be gone, too.
    held = psutil.Process().memory_info().rss
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=-held))
    with pytest.raises(NotEnoughRoom, match="free are"):
        passes.pass_tokens(tiny.checkpoint, tiny.passages, CalibrationOptions())


def test_infinite_weights_are_refused_by_layer(tmp_path):
    folder = write_checkpoint(tmp_path / "one")
    name = "model.layers.1.block_sparse_moe.experts.2.w1.weight"
    edit_tensors(folder / "model.safetensors", lambda tensors: tensors[name].fill_(float("nan")))
    checkpoint = open_checkpoint(LocalFolder(folder))
    broken = SimpleNamespace(folder=folder, checkpoint=checkpoint, passages=draw_passages("mixtral"))
    with pytest.raises(DamagedInput, match="layer 1"):
        calibrate(broken)


@pytest.mark.parametrize(
    "wrong", [{"num_tokens": 0}, {"reservoir": 0}, {"window": 1}, {"seed": -1}, {"dtype": "int8"}]
)
def test_options_that_cannot_be_right_are_refused(wrong):
    with pytest.raises(InvalidRecipe):
        CalibrationOptions(**wrong)


def test_noise_goes_through_router_and_experts(tiny):
    layer_index = tiny.checkpoint.routed_layers[-1].index
    layer = random_statistics(tiny.checkpoint, layer_index, reservoir=RESERVOIR, seed=3)
    again = random_statistics(tiny.checkpoint, layer_index, reservoir=RESERVOIR, seed=3)
    chosen = tiny.checkpoint.settings["num_experts_per_token"]
    assert layer.num_tokens * chosen == RESERVOIR * tiny.checkpoint.num_experts
    assert sum(slot.count for slot in layer.slots) == layer.num_tokens * chosen
    assert layer.output_square_sum > 0
    for slot, same in zip(layer.slots, again.slots, strict=True):
        assert slot.inputs_SD.equal(same.inputs_SD)
        assert slot.moment_DD.equal(same.moment_DD)
