"""Safetensors headers: nothing in them is believed before it is checked."""

import json
import math
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from moemerge.checkpoint.headers import StoredTensor, parse_header, read_header
from moemerge.checkpoint.tensors import TensorReader, bytes_of
from moemerge.errors import DamagedInput, NotFound
from tests.factories import edit_header, truncate, write_lfs_pointer

PATH = Path("model.safetensors")


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "model.safetensors"
    tensors = {"a": torch.arange(6.0).view(2, 3), "b": torch.arange(4, dtype=torch.bfloat16)}
    save_file(tensors, path, metadata={"format": "pt"})
    return path


def entry(begin: object, end: object, dtype: object = "F32", shape: object = None) -> dict[str, object]:
    return {"dtype": dtype, "shape": [1] if shape is None else shape, "data_offsets": [begin, end]}


def parse(entries: object, data_bytes: int = 8) -> dict[str, StoredTensor]:
    return parse_header(json.dumps(entries).encode(), data_start=100, file_size=100 + data_bytes, path=PATH)


def test_header_tells_where_the_bytes_are(file):
    header = read_header(file)
    with TensorReader() as reader:
        assert reader.read(header["a"]).equal(torch.arange(6.0).view(2, 3))
        assert reader.read(header["b"]).equal(torch.arange(4, dtype=torch.bfloat16))


def test_file_without_tensors_is_read(tmp_path):
    path = tmp_path / "empty.safetensors"
    save_file({}, path)
    assert read_header(path) == {}


@pytest.mark.parametrize(
    ("first", "shape", "strides", "entries"),
    [
        pytest.param(3, (3,), (1,), [3, 4, 5], id="row"),
        pytest.param(1, (2,), (3,), [1, 4], id="column"),
        pytest.param(0, (3, 2), (1, 3), [[0, 3], [1, 4], [2, 5]], id="transposed"),
        pytest.param(1, (2, 1), (2, 3), [[1], [3]], id="every-second"),
    ],
)
def test_view_holds_the_entries_it_names(file, first, shape, strides, entries):
    view = read_header(file)["a"].view("a'", first, shape, strides)
    assert (view.shape, view.nbytes) == (shape, 4 * math.prod(shape))
    with TensorReader() as reader:
        assert reader.read(view).tolist() == entries
        assert reader.read(view).tolist() == entries
        assert b"".join(map(bytes, reader.chunks(view, 4))) == bytes_of(torch.tensor(entries).float())


def test_missing_file_is_not_found(tmp_path):
    with pytest.raises(NotFound, match=r"absent.safetensors: no such file. Is the download complete\?"):
        read_header(tmp_path / "absent.safetensors")


def test_folder_in_place_of_a_file_is_refused(tmp_path):
    with pytest.raises(DamagedInput, match="cannot be read"):
        read_header(tmp_path)


def test_git_lfs_pointer_is_recognised(file):
    write_lfs_pointer(file)
    with pytest.raises(
        DamagedInput, match=r"model.safetensors: a Git LFS pointer of \d+ bytes.*git lfs pull"
    ):
        read_header(file)


@pytest.mark.parametrize("page", ["<!DOCTYPE html>", "\n <html><body>Sign in</body></html>"])
def test_html_page_is_recognised(file, page):
    file.write_text(page)
    with pytest.raises(DamagedInput, match="an HTML page, not a safetensors file"):
        read_header(file)


def test_other_content_is_not_called_truncated(file):
    file.write_text('{"error": "Entry not found"}')
    with pytest.raises(DamagedInput, match="not a safetensors file"):
        read_header(file)


@pytest.mark.parametrize("keep", [0, 5, 8, 60, -1, -20])
def test_truncated_file_says_so(file, keep):
    truncate(file, keep)
    with pytest.raises(DamagedInput, match=r"truncated.*Download it again"):
        read_header(file)


def test_bytes_after_the_last_tensor_are_refused(file):
    file.write_bytes(file.read_bytes() + b"\0")
    with pytest.raises(DamagedInput, match="1 bytes follow the last tensor"):
        read_header(file)


def test_gap_and_overlap_between_tensors_are_refused(file):
    def shift(by: int) -> object:
        return lambda header: header["b"].update(data_offsets=[24 + by, 32 + by])

    for by in (-4, 4):
        original = file.read_bytes()
        edit_header(file, shift(by))
        with pytest.raises(DamagedInput, match=r"begins at \d+, expected \d+: gap or overlap"):
            read_header(file)
        file.write_bytes(original)


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        ([], "not an object"),
        ({"a": None}, "no dtype, shape and two data_offsets"),
        ({"a": {"dtype": "F32", "shape": [1]}}, "no dtype, shape and two data_offsets"),
        ({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4, 8]}}, "two data_offsets"),
        ({"a": entry(0, 4, dtype="F31")}, "unknown dtype 'F31'"),
        ({"a": entry(0, 4, dtype=["F32"])}, "unknown dtype"),
        ({"a": entry(0, 4, shape="1")}, "impossible shape"),
        ({"a": entry(0, 4, shape=[-1])}, "impossible shape"),
        ({"a": entry(0, 4, shape=[True])}, "impossible shape"),
        ({"a": entry(0, 4, shape=[1.0])}, "impossible shape"),
        ({"a": entry(0, 4, shape=[2**60, 2**60])}, "impossible shape"),
        ({"a": entry(0, 4, shape=[1] * 1000)}, "impossible shape"),
        ({"a": entry(-4, 0)}, "impossible shape"),
        ({"a": entry(0, float("nan"))}, "impossible shape"),
        ({"a": entry("0", "4")}, "impossible shape"),
        ({"a": entry(4, 0)}, "spans -4 bytes, expected 4"),
        ({"a": entry(0, 8)}, r"spans 8 bytes, expected 4 for F32 \[1\]"),
        ({"a": entry(0, 4)}, "4 bytes follow the last tensor"),
        (
            {"a": entry(0, 400, shape=[100])},
            "truncated: the header describes 400 tensor bytes, the file has 8",
        ),
        ({"a\x1b[31m": entry(0, 8, shape=[2])}, "characters that no name has"),
        ({"\ud800": entry(0, 8, shape=[2])}, "characters that no name has"),
    ],
)
def test_hostile_numbers_are_refused(entries, words):
    with pytest.raises(DamagedInput, match=rf"model.safetensors: .*{words}"):
        parse(entries)


@pytest.mark.parametrize(
    "raw",
    [
        b"\xff\xfe",
        b"{",
        b"[" * 100_000,
        b'{"a":' * 50_000,
        b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}, "a": 1}',
        b'{"a": {"dtype": "F32", "dtype": "F16", "shape": [1], "data_offsets": [0, 4]}}',
        b"1" * 5000,
    ],
)
def test_malformed_json_is_refused(raw):
    with pytest.raises(DamagedInput, match="not valid JSON"):
        parse_header(raw, data_start=8, file_size=100, path=PATH)


@given(st.binary(max_size=300))
def test_arbitrary_bytes_never_raise_anything_else(raw):
    # Nothing that short and random describes 992 bytes.
    with pytest.raises(DamagedInput, match=r"^model\.safetensors: "):
        parse_header(raw, data_start=8, file_size=1000, path=PATH)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=10,
)
ENTRY = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "BF16", "I8"]) | JSON,
        "shape": st.lists(st.integers(0, 4), max_size=3) | JSON,
        "data_offsets": st.tuples(st.integers(0, 20), st.integers(0, 20)) | JSON,
    }
)


@given(st.dictionaries(st.text(max_size=5), ENTRY | JSON, max_size=4), st.integers(0, 200))
def test_any_header_is_refused_or_covers_the_file_exactly(entries, data_bytes):
    try:
        tensors = parse(entries, data_bytes)
    except DamagedInput:
        return
    ranges = sorted((tensor.start, tensor.start + tensor.nbytes) for tensor in tensors.values())
    assert sum(end - start for start, end in ranges) == data_bytes
    assert all(before[1] == after[0] for before, after in pairwise(ranges))


@given(st.data())
def test_one_changed_byte_is_refused_or_still_covers_the_file(data):
    raw = bytearray(json.dumps({"a": entry(0, 4), "b": entry(4, 8)}).encode())
    position = data.draw(st.integers(0, len(raw) - 1))
    raw[position] = data.draw(st.integers(0, 255))
    try:
        tensors = parse_header(bytes(raw), data_start=100, file_size=108, path=PATH)
    except DamagedInput:
        return
    assert sum(tensor.nbytes for tensor in tensors.values()) == 8
