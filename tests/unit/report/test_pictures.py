"""Pictures and packed matrices, read again as a browser reads them."""

import base64
import struct
import zlib

import numpy as np
import pytest

from moemerge.report.colours import shade
from moemerge.report.pictures import MOST_EXACT, pack, png


def decode(uri):
    """Width, height and RGB of every pixel."""
    raw = base64.b64decode(uri.removeprefix("data:image/png;base64,"))
    assert raw[:8] == b"\x89PNG\r\n\x1a\n"
    chunks, place = {}, 8
    while place < len(raw):
        (length,) = struct.unpack(">I", raw[place : place + 4])
        kind, content = raw[place + 4 : place + 8], raw[place + 8 : place + 8 + length]
        assert struct.unpack(">I", raw[place + 8 + length : place + 12 + length]) == (
            zlib.crc32(kind + content),
        )
        chunks[kind] = content
        place += 12 + length
    width, height = struct.unpack(">II", chunks[b"IHDR"][:8])
    rows = np.frombuffer(zlib.decompress(chunks[b"IDAT"]), np.uint8).reshape(height, width + 1)
    assert not rows[:, 0].any()
    return np.frombuffer(chunks[b"PLTE"], np.uint8).reshape(-1, 3)[rows[:, 1:]]


def test_picture_has_a_pixel_a_value_clipped_and_grey_where_nothing_is():
    pixels = decode(png(np.array([[0.0, 1.0, 2.0], [np.nan, -1.0, 0.5]]), 1.0))
    assert pixels.shape == (2, 3, 3)
    dark, bright = shade(0), shade(1)
    assert [tuple(pixel) for pixel in pixels[0]] == [dark, bright, bright]
    assert tuple(pixels[1, 0]) == (128, 128, 128)
    assert tuple(pixels[1, 1]) == dark


@pytest.mark.parametrize(("size", "exactness"), [(1, 0.0), (2, 1e-4), (24, 1e-4), (MOST_EXACT + 1, 1 / 255)])
def test_packed_matrix_comes_back(size, exactness):
    matrix = np.random.default_rng(0).uniform(0, 1.5, (size, size))
    matrix = (matrix + matrix.T) / 2
    np.fill_diagonal(matrix, 0)
    packed = pack(matrix)
    raw = zlib.decompress(base64.b64decode(packed["data"]))
    numbers = np.frombuffer(raw, "<u2" if packed["bits"] == 16 else "u1")
    upper = numbers * packed["top"] / (2 ** packed["bits"] - 1)
    assert upper == pytest.approx(matrix[np.triu_indices(size, 1)], abs=max(exactness, 1e-9))


def test_matrix_of_equal_experts_is_packed():
    assert pack(np.zeros((3, 3)))["top"] == 0.0
