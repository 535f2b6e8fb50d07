"""Writing safetensors files of any size in bounded memory, the same bytes every time.

The safetensors library writes from tensors that are all in memory; a layer's pool can be larger
than memory. Tensor order follows that library: wider dtypes first, then by name.
"""

import errno
import hashlib
import json
import math
import os
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from torch import Tensor

from moemerge.checkpoint.headers import DTYPE_BYTES, StoredTensor
from moemerge.checkpoint.tensors import DTYPE_NAMES, TensorReader, bytes_of
from moemerge.errors import NotEnoughRoom

Chunk = bytes | bytearray | memoryview
# Tensor data begins at a multiple of this, so that a mapped file needs no copies.
_ALIGNMENT = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorToWrite:
    """A tensor whose bytes come when they are asked for.

    Attributes:
        name: Its name in the file.
        dtype: Safetensors dtype.
        shape: Sizes.
        chunks: Gives the bytes, in order; called once. A chunk may be reused after the next is asked for.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    chunks: Callable[[], Iterable[Chunk]]

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return math.prod(self.shape) * DTYPE_BYTES[self.dtype]


def stored_tensor(name: str, tensor: StoredTensor, reader: TensorReader) -> TensorToWrite:
    """A copy of a stored tensor under another name; writing it fails if it holds NaN or infinity."""
    return TensorToWrite(
        name=name, dtype=tensor.dtype, shape=tensor.shape, chunks=lambda: reader.finite_chunks(tensor)
    )


def memory_tensor(name: str, tensor: Tensor) -> TensorToWrite:
    """A tensor in memory."""
    return TensorToWrite(
        name=name,
        dtype=DTYPE_NAMES[tensor.dtype],
        shape=tuple(tensor.shape),
        chunks=lambda: [bytes_of(tensor.contiguous())] if tensor.numel() else [],
    )


def ignore(num_bytes: int) -> None:
    """Tell nobody of the bytes written."""


def write_tensors(
    path: Path,
    tensors: Sequence[TensorToWrite],
    metadata: dict[str, str] | None = None,
    advance: Callable[[int], None] = ignore,
) -> str:
    """Write a safetensors file beside its place and rename it when it is complete.

    Args:
        path: Target.
        tensors: In any order.
        metadata: At most one key, because more would make the bytes depend on their order.
        advance: Told of the bytes written.

    Returns:
        SHA-256 of the file, in hexadecimal.

    Raises:
        NotEnoughRoom: The disk is full; nothing is left at `path`.
    """
    assert not metadata or len(metadata) == 1
    ordered = sorted(tensors, key=lambda tensor: (-DTYPE_BYTES[tensor.dtype], tensor.name))
    with replacing(path) as file:
        header = _header(ordered, metadata)
        file.write(header)
        hasher = hashlib.sha256(header)
        for tensor in ordered:
            written = 0
            for chunk in tensor.chunks():
                file.write(chunk)
                hasher.update(chunk)
                written += len(chunk)
                advance(len(chunk))
            assert written == tensor.nbytes, (
                f"{tensor.name}: {written} bytes given, {tensor.nbytes} announced"
            )
    return hasher.hexdigest()


def write_text(path: Path, text: str) -> None:
    """Write a small text file beside its place and rename it."""
    with replacing(path) as file:
        file.write(text.encode("utf-8"))


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file that takes the place of `path` only when everything was written and flushed.

    Raises:
        NotEnoughRoom: The disk is full.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # Its own name: a node that was given up for lost may still be writing the same.
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise NotEnoughRoom(
                f"{path}: the disk is full. Free some space and run the command again"
            ) from error
        raise
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _header(tensors: Sequence[TensorToWrite], metadata: dict[str, str] | None) -> bytes:
    entries: dict[str, object] = {"__metadata__": metadata} if metadata else {}
    position = 0
    for tensor in tensors:
        entries[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [position, position + tensor.nbytes],
        }
        position += tensor.nbytes
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    text += b" " * (-(8 + len(text)) % _ALIGNMENT)
    return len(text).to_bytes(8, "little") + text
