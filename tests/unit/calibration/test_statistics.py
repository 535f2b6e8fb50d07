"""Sums by their definitions, samples by their laws, and the way to disk and back."""

import pytest
import torch

from moemerge.calibration.statistics import (
    SCALARS,
    LayerStatistics,
    SlotStatistics,
    layer_of_tensors,
    layer_tensors,
)

WIDTH = 6


def draw(num_tokens, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {
        "inputs_TD": torch.randn(num_tokens, WIDTH, generator=generator),
        "gates_T": torch.rand(num_tokens, generator=generator),
        "keys_T": torch.rand(num_tokens, generator=generator, dtype=torch.float64),
        "outputs_TD": torch.randn(num_tokens, WIDTH, generator=generator),
    }


def rows(tokens, chosen):
    return {name: tensor[chosen] for name, tensor in tokens.items()}


def count(*parts, reservoir=8):
    slot = SlotStatistics.empty(WIDTH, reservoir)
    for tokens in parts:
        slot.add_tokens(**tokens)
    return slot


def test_sums_are_what_they_say():
    tokens = draw(50)
    slot = count(tokens)
    inputs, gates, outputs = tokens["inputs_TD"], tokens["gates_T"], tokens["outputs_TD"]
    assert slot.count == 50
    assert slot.gate_sum == pytest.approx(sum(gates.tolist()))
    assert slot.gate_square_sum == pytest.approx(sum(g * g for g in gates.tolist()))
    norms = [output.norm().item() for output in outputs]
    assert slot.saliency == pytest.approx(sum(g * n for g, n in zip(gates.tolist(), norms, strict=True)) / 50)
    squares = [(g * n) ** 2 for g, n in zip(gates.tolist(), norms, strict=True)]
    assert slot.output_square_sum == pytest.approx(sum(squares))
    assert slot.output_max == outputs.abs().max().item()
    moment = sum(g * g * torch.outer(x, x) for g, x in zip(gates, inputs, strict=True))
    torch.testing.assert_close(slot.moment_DD, moment)


def test_sample_holds_the_tokens_with_the_smallest_keys():
    tokens = draw(50)
    slot = count(tokens)
    smallest = tokens["keys_T"].argsort()[:8]
    assert slot.keys_S.equal(tokens["keys_T"][smallest])
    assert slot.gates_S.equal(tokens["gates_T"][smallest])
    assert slot.inputs_SD.equal(tokens["inputs_TD"][smallest].bfloat16())


def test_sample_of_few_tokens_holds_all_of_them():
    tokens = draw(5)
    assert sorted(count(tokens).gates_S.tolist()) == sorted(tokens["gates_T"].tolist())


@pytest.mark.parametrize("cut", [0, 1, 20, 49, 50])
def test_parts_give_what_the_whole_gives(cut):
    tokens = draw(50)
    whole = count(tokens)
    first, second = rows(tokens, slice(cut)), rows(tokens, slice(cut, None))
    one_after_the_other = SlotStatistics.empty(WIDTH, 8)
    added = SlotStatistics.empty(WIDTH, 8)
    for part in (first, second):
        if len(part["gates_T"]):
            one_after_the_other.add_tokens(**part)
            added.add(count(part))
    for slot in (one_after_the_other, added):
        assert_same(slot, whole)


def assert_same(slot, other):
    for name in SCALARS:
        assert getattr(slot, name) == pytest.approx(getattr(other, name))
    torch.testing.assert_close(slot.moment_DD, other.moment_DD)
    for name in ("inputs_SD", "gates_S", "keys_S"):
        assert getattr(slot, name).equal(getattr(other, name))


def test_slot_without_tokens_has_no_saliency():
    assert SlotStatistics.empty(WIDTH, 8).saliency == 0.0


def test_layer_survives_its_way_through_tensors():
    layer = LayerStatistics(slots=[count(draw(30)), count()], num_tokens=41, output_square_sum=2.5)
    again = layer_of_tensors(layer_tensors(layer), 8)
    assert (again.num_tokens, again.output_square_sum) == (41, 2.5)
    for slot, other in zip(again.slots, layer.slots, strict=True):
        assert_same(slot, other)


def test_tensors_that_do_not_fit_are_refused():
    tensors = layer_tensors(LayerStatistics(slots=[count(draw(30))], num_tokens=1, output_square_sum=1.0))
    with pytest.raises(ValueError, match="do not fit"):
        layer_of_tensors({**tensors, "s00000.gates": torch.zeros(3)}, 8)
    with pytest.raises(KeyError):
        layer_of_tensors({name: tensor for name, tensor in tensors.items() if "moment" not in name}, 8)
