"""Expert tensors in every order of axes: read as parts, and written back as they were."""

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file, save_file

from moemerge.bundle.joined import JoinedTensor, lay_out
from moemerge.checkpoint.expert_layout import ExpertTensor
from moemerge.checkpoint.headers import read_header
from moemerge.checkpoint.tensors import TensorReader
from moemerge.checkpoint.writer import write_tensors
from moemerge.errors import DamagedInput

NUM_EXPERTS, NUM_ROWS, NUM_COLUMNS = 3, 4, 5
AXES = [
    ["expert", "part*row", "column"],
    ["expert", "row*part", "column"],
    ["expert", "column", "row*part"],
    ["expert*part*row", "column"],
    ["expert*column", "part", "row"],
    ["part*row", "column"],
    ["column", "part*row"],
]


def entry(tensor, **place):
    """The entry of a stored tensor at a place, counted from the meaning of its axes."""
    sizes = {"expert": NUM_EXPERTS, "part": 2, "row": NUM_ROWS, "column": NUM_COLUMNS}
    index = 0
    for factor in [factor for axis in tensor.axes for factor in axis.split("*")]:
        index = index * sizes[factor] + place[factor]
    return index


@pytest.fixture(params=AXES, ids=" ".join)
def stored(request, tmp_path):
    """A tensor of two parts whose entries are their own numbers, in a file."""
    tensor = ExpertTensor(name="w", holds=["gate", "up"], axes=request.param)
    shape = tensor.shape((NUM_ROWS, NUM_COLUMNS), NUM_EXPERTS)
    values = torch.arange(torch.Size(shape).numel(), dtype=torch.float32).reshape(shape)
    save_file({"w": values}, tmp_path / "model.safetensors")
    return tensor, read_header(tmp_path / "model.safetensors")["w"], tmp_path


def test_part_has_the_entries_that_its_axes_say(stored):
    tensor, place, _ = stored
    with TensorReader() as reader:
        for slot, part, view in tensor.places(place, (NUM_ROWS, NUM_COLUMNS), NUM_EXPERTS):
            value, number = reader.read(view), tensor.holds.index(part)
            for row in range(NUM_ROWS):
                for column in range(NUM_COLUMNS):
                    expected = entry(tensor, expert=slot, part=number, row=row, column=column)
                    assert value[row, column] == expected


def test_parts_written_back_are_the_tensor(stored):
    tensor, place, folder = stored
    experts = {}
    for slot, _, view in tensor.places(place, (NUM_ROWS, NUM_COLUMNS), NUM_EXPERTS):
        experts.setdefault(slot, []).append(view)
    joined = JoinedTensor(tensor, list(experts.values()))
    assert (joined.shape, joined.dtype, joined.nbytes) == (place.shape, place.dtype, place.nbytes)
    with TensorReader() as reader:
        write_tensors(folder / "again.safetensors", [joined.to_write("w", reader)])
    assert torch.equal(*(load_file(folder / f"{name}.safetensors")["w"] for name in ("model", "again")))


def test_damaged_part_is_not_written(tmp_path):
    save_file({"w": torch.full((NUM_ROWS, NUM_COLUMNS), torch.nan)}, tmp_path / "model.safetensors")
    tensor = ExpertTensor(name="w", holds=["down"], axes=["column", "row"])
    place = read_header(tmp_path / "model.safetensors")["w"]
    with TensorReader() as reader, pytest.raises(DamagedInput, match="again: what is stored"):
        write_tensors(tmp_path / "x.safetensors", [JoinedTensor(tensor, [[place]]).to_write("again", reader)])


def test_biases_interleave_as_their_matrices_do():
    tensor = ExpertTensor(name="b", holds=["gate_bias", "up_bias"], axes=["expert", "row*part"])
    assert tensor.shape((3,), 2) == (2, 6)
    laid = lay_out(tensor, [torch.tensor([1, 3, 5]), torch.tensor([2, 4, 6])])
    assert laid.flatten().tolist() == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize(
    ("name", "axes"), [("w.{expert}", ["expert", "row", "column"]), ("w", ["row", "expert", "column"])]
)
def test_axes_that_cannot_be_are_refused(name, axes):
    with pytest.raises(ValidationError, match="expert"):
        ExpertTensor(name=name, holds=["gate"], axes=axes)
