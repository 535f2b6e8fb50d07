"""Reading tensor bytes: into a reused buffer, as a tensor, or as a digest.

Reads with `pread` rather than a memory map so that the memory of a pass over many gigabytes stays
what its buffers take. The runner maps bundles by itself (`map_tensors`).
"""

import os
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from types import TracebackType

import torch
from blake3 import blake3
from torch import Tensor

from moemerge.checkpoint.headers import StoredTensor, read_header
from moemerge.errors import DamagedInput, NotFound, UnsupportedCheckpoint

TORCH_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
DTYPE_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}
COPY_BYTES = 8 * 2**20
_SAMPLE_BYTES = 4096


class TensorReader(AbstractContextManager["TensorReader"]):
    """Reads byte ranges of many files, keeping each open; safe to share between threads."""

    def __init__(self) -> None:
        self._descriptors: dict[Path, int] = {}
        self._opening = threading.Lock()
        self._gathered = threading.local()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors.clear()

    def read_into(self, tensor: StoredTensor, buffer: memoryview, offset: int = 0) -> None:
        """Fill `buffer` with the tensor's bytes from byte `offset` on.

        Raises:
            DamagedInput, NotFound: The file has become shorter or is gone since its header was read.
        """
        if tensor.strides is None:
            self._read_range(tensor, buffer, tensor.start + offset)
        else:
            buffer[:] = self._gather(tensor, tensor.strides)[offset : offset + len(buffer)]

    def _gather(self, tensor: StoredTensor, strides: tuple[int, ...]) -> memoryview:
        """Entries that do not follow each other, side by side; a thread keeps those it asked for last."""
        if getattr(self._gathered, "tensor", None) != tensor:
            dtype = torch_dtype(tensor)
            span = torch.empty(tensor.span_bytes // dtype.itemsize, dtype=dtype)
            self._read_range(tensor, bytes_of(span), tensor.start)
            self._gathered.values = span.as_strided(tensor.shape, strides).contiguous()
            self._gathered.tensor = tensor
        return bytes_of(self._gathered.values)

    def _read_range(self, tensor: StoredTensor, buffer: memoryview, start: int) -> None:
        descriptor = self._open(tensor)
        done = 0
        while done < len(buffer):
            count = os.preadv(descriptor, [buffer[done:]], start + done)
            if count == 0:
                raise DamagedInput(
                    f"{tensor.path}: ends within tensor {tensor.name}; was it changed just now?"
                )
            done += count

    def read(self, tensor: StoredTensor) -> Tensor:
        """The tensor, in its stored dtype and shape."""
        result = torch.empty(tensor.shape, dtype=torch_dtype(tensor))
        if tensor.nbytes:
            self.read_into(tensor, bytes_of(result))
        return result

    def chunks(self, tensor: StoredTensor, chunk_bytes: int = COPY_BYTES) -> Iterator[memoryview]:
        """The bytes in order, in views of one reused buffer."""
        buffer = memoryview(bytearray(min(chunk_bytes, tensor.nbytes)))
        for offset in range(0, tensor.nbytes, chunk_bytes):
            view = buffer[: min(chunk_bytes, tensor.nbytes - offset)]
            self.read_into(tensor, view, offset)
            yield view

    def finite_chunks(self, tensor: StoredTensor) -> Iterator[memoryview]:
        """As `chunks`, checked on the way.

        Raises:
            DamagedInput: NaN or infinity; the message names the tensor.
        """
        dtype = torch_dtype(tensor)
        for chunk in self.chunks(tensor):
            # A sum is finite only if every value is, and cheaper than testing each; it may overflow.
            values = torch.frombuffer(chunk, dtype=dtype)
            if dtype.is_floating_point and not values.sum().isfinite() and not values.isfinite().all():
                raise DamagedInput(f"{tensor.path}: tensor {tensor.name} contains NaN or infinity")
            yield chunk

    def digest(self, tensor: StoredTensor) -> str:
        """BLAKE3 of the tensor's bytes, in hexadecimal."""
        hasher = blake3()
        for chunk in self.chunks(tensor):
            hasher.update(chunk)
        return hasher.hexdigest()

    def sample_digest(self, tensor: StoredTensor) -> str:
        """BLAKE3 of dtype, shape and three short stretches: if it differs, the tensor differs."""
        hasher = blake3(f"{tensor.dtype} {list(tensor.shape)}".encode())
        length = min(_SAMPLE_BYTES, tensor.nbytes)
        buffer = memoryview(bytearray(length))
        for offset in sorted({0, (tensor.nbytes - length) // 2, tensor.nbytes - length}):
            self.read_into(tensor, buffer, offset)
            hasher.update(buffer)
        return hasher.hexdigest()

    def _open(self, tensor: StoredTensor) -> int:
        assert tensor.is_local, f"{tensor.path} has not been downloaded"
        with self._opening:
            if tensor.path not in self._descriptors:
                try:
                    self._descriptors[tensor.path] = os.open(tensor.path, os.O_RDONLY)
                except OSError as error:
                    raise NotFound(f"{tensor.path}: cannot be opened any more ({error.strerror})") from error
            return self._descriptors[tensor.path]


def map_tensors(path: Path) -> dict[str, Tensor]:
    """Every tensor of a safetensors file as a read-only view of the mapped file.

    Raises:
        DamagedInput, NotFound: As `read_header`.
    """
    header = read_header(path)
    storage = torch.from_file(str(path), shared=False, size=path.stat().st_size, dtype=torch.uint8)
    mapped = {}
    for name, tensor in header.items():
        window = storage[tensor.start : tensor.start + tensor.nbytes]
        dtype = torch_dtype(tensor)
        aligned = window if tensor.start % dtype.itemsize == 0 else window.clone()
        mapped[name] = aligned.view(dtype).view(tensor.shape)
    return mapped


def require_mapped(tensor: StoredTensor) -> None:
    """Make sure that a mapped tensor can be read; reading behind the end of a file would end the process.

    Raises:
        DamagedInput: The file has become shorter since it was mapped.
    """
    with suppress(FileNotFoundError):  # one that was deleted stays as it was for those who mapped it
        if tensor.path.stat().st_size < tensor.start + tensor.nbytes:
            raise DamagedInput(f"{tensor.path}: ends within tensor {tensor.name}; was it changed just now?")


def torch_dtype(tensor: StoredTensor) -> torch.dtype:
    """The torch dtype of a stored tensor.

    Raises:
        UnsupportedCheckpoint: A dtype that moemerge does not compute with.
    """
    if tensor.dtype not in TORCH_DTYPES:
        raise UnsupportedCheckpoint(f"{tensor.path}: tensor {tensor.name} is stored as {tensor.dtype}")
    return TORCH_DTYPES[tensor.dtype]


def bytes_of(tensor: Tensor) -> memoryview:
    """The contiguous tensor's memory, writable."""
    return tensor.view(-1).view(torch.uint8).numpy().data
