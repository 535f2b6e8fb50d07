"""Safetensors headers: what tensors a file holds and where their bytes lie.

The header is read here and not through the safetensors library because byte ranges are needed: an
expert must be read, hashed and copied as a range, also from a hub file that is not downloaded.
Nothing in a header is believed before it is checked. Knows nothing of families.

Source: format description at https://huggingface.co/docs/safetensors/index#format.
"""

import json
import math
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from moemerge.errors import DamagedInput, NotFound

MAX_HEADER_BYTES = 100_000_000
MAX_DIMENSIONS = 64
DTYPE_BYTES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2,
    "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1,
    "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "F8_E4M3FNUZ": 1, "F8_E5M2FNUZ": 1,
}  # fmt: skip
FLOAT_DTYPES = ("F64", "F32", "F16", "BF16")


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredTensor:
    """A tensor, or some of its entries, as a byte range of a file.

    Attributes:
        path: The file; for a hub file that is not downloaded, repository and name, for messages.
        name: The tensor's name in the file.
        dtype: Safetensors dtype, for example `BF16`.
        shape: Sizes.
        start: First byte, counted from the beginning of the file.
        is_local: Whether the bytes can be read from `path`.
        strides: Entries from one index to the next, by dimension; None when the entries follow each other.
    """

    path: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    is_local: bool = True
    strides: tuple[int, ...] | None = None

    @property
    def num_elements(self) -> int:
        """Product of the sizes."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the entries."""
        return self.num_elements * DTYPE_BYTES[self.dtype]

    @property
    def span_bytes(self) -> int:
        """Bytes in the file from the first entry to the last."""
        if self.strides is None:
            return self.nbytes
        last = sum((size - 1) * stride for size, stride in zip(self.shape, self.strides, strict=True))
        return (last + 1) * DTYPE_BYTES[self.dtype]

    def view(self, name: str, first: int, shape: tuple[int, ...], strides: tuple[int, ...]) -> "StoredTensor":
        """Some entries of a whole tensor, from the one numbered `first` on."""
        assert self.strides is None
        lengths = [math.prod(shape[number + 1 :]) for number in range(len(shape))]
        return replace(
            self,
            name=name,
            shape=shape,
            start=self.start + first * DTYPE_BYTES[self.dtype],
            strides=None if list(strides) == lengths else strides,
        )


def read_header(path: Path) -> dict[str, StoredTensor]:
    """Tensors of a local safetensors file by name.

    Raises:
        NotFound: No such file.
        DamagedInput: LFS pointer, truncated, malformed, overlapping or out-of-range tensors.
    """
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = parse_header_length(file.read(512), file_size=size, path=path)
            file.seek(8)
            raw = file.read(length)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise NotFound(f"{path}: no such file. Is the download complete?") from error
    except (IsADirectoryError, PermissionError) as error:
        raise DamagedInput(f"{path}: cannot be read ({error.strerror})") from error
    return parse_header(raw, data_start=8 + length, file_size=size, path=path)


def parse_header_length(head: bytes, *, file_size: int, path: Path) -> int:
    """Length of the header in bytes.

    Args:
        head: The file's first bytes; 8 suffice.
        file_size: Size of the whole file in bytes.
        path: File, for messages.

    Raises:
        DamagedInput: Truncated, or not a safetensors file; the message says what it seems to be.
    """
    length = int.from_bytes(head[:8], "little") if len(head) >= 8 else 0
    if 0 < length <= min(MAX_HEADER_BYTES, file_size - 8):
        return length
    if head.startswith(b"version "):
        raise DamagedInput(
            f"{path}: a Git LFS pointer of {file_size} bytes, not the file itself. "
            f"Fetch it with `git lfs pull` or `moemerge pull`"
        )
    if head.lstrip()[:1] == b"<":
        raise DamagedInput(f"{path}: an HTML page, not a safetensors file. Download it again")
    if len(head) < 8 or 0 < length <= MAX_HEADER_BYTES:
        raise DamagedInput(
            f"{path}: truncated: header of {length} bytes announced, file has {file_size}. Download it again"
        )
    raise DamagedInput(f"{path}: not a safetensors file (header of {length} bytes announced)")


def parse_header(
    raw: bytes, *, data_start: int, file_size: int, path: Path, is_local: bool = True
) -> dict[str, StoredTensor]:
    """Tensors that a header describes, after checking every number in it.

    Args:
        raw: The JSON text.
        data_start: File offset of the first tensor byte.
        file_size: Size of the whole file in bytes.
        path: File, for messages and for the result.
        is_local: See `StoredTensor`.

    Raises:
        DamagedInput: Malformed JSON, unknown dtype, sizes that contradict offsets, gaps, overlaps, or
            tensors beyond the end of the file.
    """
    try:
        entries = json.loads(raw.decode("utf-8"), object_pairs_hook=_refuse_repeated_keys)
    except (ValueError, RecursionError) as error:
        raise DamagedInput(f"{path}: the safetensors header is not valid JSON ({error})") from error
    if not isinstance(entries, dict):
        raise DamagedInput(f"{path}: the safetensors header is not an object")
    entries.pop("__metadata__", None)
    tensors = {}
    ranges = []
    for name, entry in entries.items():
        dtype, shape, begin, end = _check_entry(path, name, entry)
        ranges.append((begin, end, name))
        tensors[name] = StoredTensor(
            path=path, name=name, dtype=dtype, shape=shape, start=data_start + begin, is_local=is_local
        )
    _check_ranges(path, sorted(ranges), file_size - data_start)
    return tensors


def _check_entry(path: Path, name: str, entry: Any) -> tuple[str, tuple[int, ...], int, int]:
    if not name.isprintable():
        raise DamagedInput(f"{path}: tensor name {name!r} has characters that no name has")
    try:
        dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
    except (TypeError, KeyError, ValueError) as error:
        raise DamagedInput(f"{path}: tensor {name!r} has no dtype, shape and two data_offsets") from error
    if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
        raise DamagedInput(f"{path}: tensor {name!r} has unknown dtype {dtype!r}")
    sizes = shape if isinstance(shape, list) and len(shape) <= MAX_DIMENSIONS else [None]
    if not all(type(size) is int and 0 <= size < 2**48 for size in [*sizes, begin, end]):
        raise DamagedInput(f"{path}: tensor {name!r} has impossible shape {shape!r} or data_offsets")
    if end - begin != math.prod(shape) * DTYPE_BYTES[dtype]:
        raise DamagedInput(
            f"{path}: tensor {name!r} spans {end - begin} bytes, expected "
            f"{math.prod(shape) * DTYPE_BYTES[dtype]} for {dtype} {shape}"
        )
    return dtype, tuple(shape), begin, end


def _check_ranges(path: Path, ranges: list[tuple[int, int, str]], data_bytes: int) -> None:
    position = 0
    for begin, end, name in ranges:
        if begin != position:
            raise DamagedInput(
                f"{path}: tensor {name!r} begins at {begin}, expected {position}: gap or overlap"
            )
        position = end
    if position > data_bytes:
        raise DamagedInput(
            f"{path}: truncated: the header describes {position} tensor bytes, the file has {data_bytes}. "
            f"Download it again"
        )
    if position < data_bytes:
        raise DamagedInput(
            f"{path}: {data_bytes - position} bytes follow the last tensor; altered or damaged"
        )


def _refuse_repeated_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a key is given twice")
    return result
