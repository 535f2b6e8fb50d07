import torch
from safetensors.torch import save_file

from moemerge.bundle.writer import group_equal
from moemerge.checkpoint.headers import read_header
from moemerge.checkpoint.tensors import TensorReader


def stored(folder, name, tensor):
    save_file({"t": tensor}, folder / f"{name}.safetensors")
    return {"t": read_header(folder / f"{name}.safetensors")["t"]}


def shared_places(tensors):
    with TensorReader() as reader:
        return {variant: place["t"] for variant, place in group_equal(tensors, reader)[1].items()}


def test_equal_bytes_of_another_dtype_are_not_shared(tmp_path):
    kinds = {"a": torch.bfloat16, "b": torch.bfloat16, "c": torch.float16, "d": torch.float16}
    places = shared_places({n: stored(tmp_path, n, torch.zeros(8, dtype=k)) for n, k in kinds.items()})
    assert places["a"] == places["b"] != places["c"] == places["d"]


def test_tensors_that_differ_outside_the_samples_are_not_shared(tmp_path):
    one = torch.zeros(65536)
    other = one.clone()
    other[20_000] = 1  # beyond the first 4 KiB and before the middle
    assert shared_places({"a": stored(tmp_path, "a", one), "b": stored(tmp_path, "b", other)}) == {
        "a": None,
        "b": None,
    }
