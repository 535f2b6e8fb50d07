"""Small pictures of matrices as PNG, and matrices as compact text that a page's script reads. Pure."""

import base64
import struct
import zlib

import numpy as np

from moemerge.report.colours import shade
from moemerge.report.contents import Matrix

_LEVELS = 255
_MISSING = (128, 128, 128)
_WIDE = 65535
MOST_EXACT = 256
"""Experts of a layer up to which distances are kept in sixteen bits; above, in eight."""


def png(values: Matrix, top: float, *, low: float = 0.0) -> str:
    """A picture with one pixel a value, viridis from `low` to `top` and beyond, NaN in grey: a data URI."""
    span = top - low or 1.0
    places = np.clip((np.nan_to_num(values, nan=low) - low) / span, 0.0, 1.0)
    pixels = np.round(places * (_LEVELS - 1)).astype(np.uint8)
    pixels[np.isnan(values)] = _LEVELS
    palette = bytes(part for level in range(_LEVELS) for part in shade(level / (_LEVELS - 1))) + bytes(
        _MISSING
    )
    height, width = values.shape
    # Every row begins with the number of its filter, which is none.
    rows = np.concatenate([np.zeros((height, 1), np.uint8), pixels], axis=1).tobytes()
    chunks = (
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 3, 0, 0, 0)),
        (b"PLTE", palette),
        (b"IDAT", zlib.compress(rows, 9)),
        (b"IEND", b""),
    )
    whole = b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(kind, content) for kind, content in chunks)
    return "data:image/png;base64," + base64.b64encode(whole).decode()


def pack(matrix: Matrix) -> dict[str, str | int | float]:
    """A symmetric matrix as its upper triangle without the diagonal: whole numbers, deflated, in base64.

    Returns:
        `bits` of a number, little-endian; `top`, the value of the largest; `data`.
    """
    size = matrix.shape[0]
    bits, largest = (16, _WIDE) if size <= MOST_EXACT else (8, _LEVELS)
    upper = matrix[np.triu_indices(size, k=1)]
    top = float(upper.max()) if upper.size else 0.0
    numbers = np.round(upper / (top or 1.0) * largest).clip(0, largest)
    raw = numbers.astype("<u2" if bits == 16 else "u1").tobytes()
    return {"bits": bits, "top": top, "data": base64.b64encode(zlib.compress(raw, 9)).decode()}


def _chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
