"""Disturbed lanes against the same models computed one by one; passages that are held out."""

import pytest
import torch

from moemerge.calibration.lanes import Lane, lane_of, measure_lanes
from moemerge.calibration.passages import Passages, read_passages, spread, write_passages
from moemerge.calibration.passes import CalibrationOptions, mean_nll, measure_nll
from moemerge.calibration.sensitivity import (
    _SIZE,
    Response,
    _DisturbedSource,
    _response,
    measure_sensitivity,
)
from moemerge.calibration.streaming import CheckpointSource
from moemerge.calibration.texts import Passage
from moemerge.checkpoint.checkpoint import open_checkpoint
from moemerge.checkpoint.repository import LocalFolder
from moemerge.checkpoint.tensors import TensorReader
from tests.factories import write_checkpoint
from tests.unit.calibration.test_passes import draw_passages

OPTIONS = CalibrationOptions()


@pytest.fixture(scope="module", params=("mixtral", "switch_transformers"))
def tiny(request, tmp_path_factory):
    folder = write_checkpoint(tmp_path_factory.mktemp("tiny") / "one", request.param, dtype="F32")
    return open_checkpoint(LocalFolder(folder)), draw_passages(request.param, 6)


class OneLayer(_DisturbedSource):
    """Disturbed in one layer alone, read by itself."""

    def __init__(self, source, layer_index):
        super().__init__(source, OPTIONS.seed)
        self.layer_index = layer_index

    def expert(self, layer_index, slot):
        here = layer_index == self.layer_index
        return super().expert(layer_index, slot) if here else self._source.expert(layer_index, slot)


def test_each_layer_is_disturbed_by_itself(tiny):
    checkpoint, passages = tiny
    found = measure_sensitivity(checkpoint, passages, OPTIONS)
    with TensorReader() as reader:
        own = CheckpointSource(checkpoint, reader)
        for layer in checkpoint.routed_layers:
            lanes = [lane_of(own), lane_of(OneLayer(own, layer.index))]
            expected = measure_lanes(passages, lanes, OPTIONS)[1].kl
            # What a unit costs, times what was done: the divergence of that lane.
            assert found.by_layer[layer.index] > 0
            assert found.by_layer[layer.index] / expected == pytest.approx(
                1 / damage_of(own, layer.index, passages), rel=0.05
            )


def test_response_tells_what_a_little_in_all_layers_costs(tiny, monkeypatch):
    """A fifth of the output's change stands for weights that are disturbed by a fifth."""
    checkpoint, passages = tiny
    found = measure_sensitivity(checkpoint, passages, OPTIONS)
    monkeypatch.setattr("moemerge.calibration.sensitivity._SIZE", _SIZE / 5)
    with TensorReader() as reader:
        own = CheckpointSource(checkpoint, reader)
        lanes = [lane_of(own), lane_of(_DisturbedSource(own, OPTIONS.seed))]
        expected = measure_lanes(passages, lanes, OPTIONS)[1].kl
        indices = [layer.index for layer in checkpoint.routed_layers]
        weighted = sum(found.by_layer[index] * damage_of(own, index, passages) for index in indices)
    assert found.response.nats(weighted) == pytest.approx(expected, rel=0.1)


def damage_of(source, layer_index, passages):
    """Energy that is added to a layer's output over its own, with everything before as it was."""
    outputs = {}

    class Watched:
        def __init__(self, experts, name):
            self.experts, self.name = experts, name

        def product(self, layer, hidden_TD, route):
            output_TD = self.experts.product(layer, hidden_TD, route)
            if layer == layer_index:
                outputs[self.name] = output_TD.double()
            return output_TD

    for name, lane in (("own", lane_of(source)), ("other", lane_of(OneLayer(source, layer_index)))):
        measure_lanes(passages, [Lane(lane.source, Watched(lane.experts, name))], OPTIONS)
    return float((outputs["other"] - outputs["own"]).square().sum() / outputs["own"].square().sum())


def test_lanes_that_share_their_source_are_the_model_itself(tiny):
    checkpoint, passages = tiny
    with TensorReader() as reader:
        lane = lane_of(CheckpointSource(checkpoint, reader))
        losses = measure_lanes(passages, [lane] * 3, OPTIONS)
    alone = mean_nll(measure_nll(checkpoint, passages, OPTIONS), passages)
    assert [loss.nll for loss in losses] == pytest.approx([alone] * 3, rel=1e-5)
    assert [loss.kl for loss in losses] == pytest.approx([0] * 3, abs=1e-6)


def test_response_goes_through_what_was_measured():
    found = _response([1e-2, 1e-4], [2e-2, 1e-3])
    assert found.nats(1e-2) == pytest.approx(2e-2 * (found.nats(1e-4) / 1e-3), rel=1e-6)
    assert found.nats(1e-4) == pytest.approx(1e-3)
    assert 0.4 <= found.exponent <= 1
    assert found.nats(0) == 0


@pytest.mark.parametrize(("weighted", "nats"), [([0, 0], [0, 0]), ([1e-3, 1e-3], [1, 2]), ([1, 0], [1, 0])])
def test_response_of_nothing_measured_is_the_sum_itself(weighted, nats):
    assert _response(weighted, nats) == Response()


@pytest.mark.parametrize(("count", "held_out"), [(1, 0), (3, 0), (4, 1), (11, 1), (12, 2), (64, 8)])
def test_one_passage_in_eight_is_held_out_and_counted_nowhere(count, held_out, tmp_path):
    every = [Passage([number, number + 1], [7] * (number % 3)) for number in range(count)]
    divided = Passages.divide(every)
    assert len(divided.held_out) == held_out
    assert sorted([*divided.counted, *divided.held_out]) == sorted(every)
    write_passages(divided, tmp_path / "passages.safetensors")
    again = read_passages(tmp_path / "passages.safetensors")
    assert [[(list(p.token_ids), list(p.target_ids)) for p in part] for part in again] == [
        [(list(p.token_ids), list(p.target_ids)) for p in part] for part in divided
    ]


def test_passages_are_spread_over_the_text():
    every = [Passage([number] * 10) for number in range(20)]
    chosen = [passage.token_ids[0] for passage in spread(every, 50)]
    assert chosen == [0, 4, 8, 12, 16]
    assert spread(every, 1000) == every
    assert len(spread(every, 1)) == 1


def test_disturbance_is_the_same_every_time(tiny):
    checkpoint, _ = tiny
    layer = checkpoint.routed_layers[0].index
    with TensorReader() as reader:
        source = _DisturbedSource(CheckpointSource(checkpoint, reader), 3)
        one, two = source.expert(layer, 0), source.expert(layer, 0)
        own = CheckpointSource(checkpoint, reader).expert(layer, 0)
    for part, matrix in own.items():
        assert torch.equal(one[part], two[part])
        size = (one[part] - matrix).square().mean().sqrt() / matrix.square().mean().sqrt()
        assert float(size) == pytest.approx(_SIZE, rel=0.1)
