"""Reading bytes: as tensors, in chunks, as digests, and when the file changes meanwhile."""

import pytest
import torch
from safetensors.torch import save_file

from moemerge.checkpoint.headers import read_header
from moemerge.checkpoint.tensors import TensorReader, bytes_of, map_tensors
from moemerge.errors import DamagedInput, NotFound, UnsupportedCheckpoint
from tests.factories import flip_byte, truncate

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool]


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.arange(5000, dtype=torch.float32), "empty": torch.zeros(0, 3)}, path)
    return path


@pytest.mark.parametrize("dtype", DTYPES)
def test_read_and_mapped_tensors_equal_what_was_written(tmp_path, dtype):
    path = tmp_path / "model.safetensors"
    tensors = {"a": torch.arange(12).view(3, 4).to(dtype), "scalar": torch.tensor(1).to(dtype)}
    save_file(tensors, path)
    with TensorReader() as reader:
        for name, stored in read_header(path).items():
            assert reader.read(stored).equal(tensors[name])
    assert all(tensor.equal(tensors[name]) for name, tensor in map_tensors(path).items())


def test_empty_tensor_is_read(path):
    with TensorReader() as reader:
        assert reader.read(read_header(path)["empty"]).shape == (0, 3)
        assert list(reader.chunks(read_header(path)["empty"])) == []


@pytest.mark.parametrize("chunk_bytes", [1000, 4096, 20_000, 10**6])
def test_chunks_add_up_to_the_tensor(path, chunk_bytes):
    tensor = read_header(path)["a"]
    with TensorReader() as reader:
        raw = b"".join(bytes(chunk) for chunk in reader.chunks(tensor, chunk_bytes))
    assert raw == bytes(bytes_of(torch.arange(5000, dtype=torch.float32)))


def test_digest_follows_every_byte_and_the_sample_its_stretches(path):
    tensor = read_header(path)["a"]
    with TensorReader() as reader:
        before = reader.digest(tensor), reader.sample_digest(tensor)
        flip_byte(path, tensor.start + 5000)
        assert reader.digest(tensor) != before[0]
        assert reader.sample_digest(tensor) == before[1]
        flip_byte(path, tensor.start + 10)
        assert reader.sample_digest(tensor) != before[1]


def test_sample_digest_tells_shapes_apart(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.zeros(2, 3), "b": torch.zeros(3, 2), "c": torch.zeros(6)}, path)
    with TensorReader() as reader:
        assert len({reader.sample_digest(tensor) for tensor in read_header(path).values()}) == 3


def test_file_that_becomes_shorter_is_damaged(path):
    tensor = read_header(path)["a"]
    truncate(path, -8)
    with TensorReader() as reader, pytest.raises(DamagedInput, match="ends within tensor a"):
        reader.read(tensor)


def test_file_that_is_gone_is_not_found(path):
    tensor = read_header(path)["a"]
    path.unlink()
    with TensorReader() as reader, pytest.raises(NotFound, match=r"model.safetensors: cannot be opened"):
        reader.read(tensor)


def test_dtype_that_is_not_computed_with_is_refused(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.zeros(4).to(torch.float8_e4m3fn)}, path)
    with TensorReader() as reader, pytest.raises(UnsupportedCheckpoint, match="a is stored as F8_E4M3"):
        reader.read(read_header(path)["a"])
