"""SHA-256 of files, as the hub and `sha256sum` compute it."""

import hashlib
from collections.abc import Callable
from pathlib import Path

_CHUNK_BYTES = 8 * 2**20


def hash_file(path: Path, advance: Callable[[int], None] = lambda num_bytes: None) -> str:
    """SHA-256 of a file in hexadecimal; `advance` is told of the bytes read."""
    hasher = hashlib.sha256()
    buffer = memoryview(bytearray(_CHUNK_BYTES))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            hasher.update(buffer[:count])
            advance(count)
    return hasher.hexdigest()
