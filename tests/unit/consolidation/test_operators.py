"""How a pool expert is made from the experts it stands for."""

import pytest
import torch

from moemerge.checkpoint.headers import read_header
from moemerge.checkpoint.tensors import TORCH_DTYPES, TensorReader, bytes_of
from moemerge.checkpoint.writer import memory_tensor, write_tensors
from moemerge.consolidation import operators
from moemerge.errors import DamagedInput


def store(folder, tensors):
    write_tensors(folder / "t.safetensors", [memory_tensor(f"t{n}", t) for n, t in enumerate(tensors)])
    header = read_header(folder / "t.safetensors")
    return [header[f"t{number}"] for number in range(len(tensors))]


def result_of(operator, sources):
    with TensorReader() as reader:
        made = operators.OPERATORS[operator]("gate", sources, reader)
        raw = bytearray().join(bytes(chunk) for chunk in made.chunks())
    assert (made.name, made.nbytes) == ("gate", len(raw))
    return torch.frombuffer(raw, dtype=TORCH_DTYPES[made.dtype]).view(made.shape)


def draw(*dtypes):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(13, 7, generator=generator).to(dtype) for dtype in dtypes]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_copy_gives_the_bytes_of_its_source(dtype, tmp_path):
    (tensor,) = draw(dtype)
    found = result_of("copy", store(tmp_path, [tensor]))
    assert bytes(bytes_of(found)) == bytes(bytes_of(tensor))


@pytest.mark.parametrize("chunk_bytes", [4, 40, 8 * 2**20])
@pytest.mark.parametrize(
    "dtypes",
    [
        (torch.float32, torch.float32, torch.float32),
        (torch.bfloat16, torch.bfloat16),
        (torch.bfloat16, torch.float32, torch.float16),
    ],
)
def test_mean_is_summed_in_float32_and_rounded_once(dtypes, chunk_bytes, tmp_path, monkeypatch):
    monkeypatch.setattr(operators, "COPY_BYTES", chunk_bytes)
    tensors = draw(*dtypes)
    found = result_of("mean", store(tmp_path, tensors))
    widest = max(dtypes, key=lambda dtype: dtype.itemsize)
    expected = (sum(tensor.float() for tensor in tensors) / len(tensors)).to(widest)
    assert found.dtype == widest
    assert torch.equal(found, expected)


def test_mean_of_one_value_is_that_value(tmp_path):
    (tensor,) = draw(torch.bfloat16)
    assert torch.equal(result_of("mean", store(tmp_path, [tensor, tensor.clone()])), tensor)


@pytest.mark.parametrize("operator", ["copy", "mean"])
def test_value_that_is_not_finite_is_named(operator, tmp_path):
    tensors = draw(*[torch.float32] * (1 if operator == "copy" else 2))
    tensors[-1].view(-1)[40] = float("nan")
    with pytest.raises(DamagedInput, match=rf"t\.safetensors: tensor t{len(tensors) - 1} contains NaN"):
        result_of(operator, store(tmp_path, tensors))
