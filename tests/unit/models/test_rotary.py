import math

import pytest
import torch

from moemerge.models.rotary import Rotary, rotary_tables, rotate


def rotated_plain(vector: list[float], position: int, theta: float) -> list[float]:
    """Each pair (i, i + h/2) as a complex number, turned by position * theta^(-2i/h)."""
    half = len(vector) // 2
    turned = [
        complex(vector[i], vector[i + half])
        * complex(math.cos(angle := position * theta ** (-2 * i / len(vector))), math.sin(angle))
        for i in range(half)
    ]
    return [number.real for number in turned] + [number.imag for number in turned]


def test_rotation_equals_complex_multiplication():
    heads = torch.randn(4, 3, 6, generator=torch.Generator().manual_seed(0))
    positions = torch.tensor([0, 1, 5, 40])
    rotated = rotate(heads, rotary_tables(positions, 6, Rotary(rope_theta=50.0), torch.float32))
    for token in range(4):
        for head in range(3):
            expected = rotated_plain(heads[token, head].tolist(), int(positions[token]), 50.0)
            assert rotated[token, head].tolist() == pytest.approx(expected, abs=1e-5)


def test_rotary_tables_are_computed_in_float32_and_cast_once():
    positions = torch.tensor([300, 301])
    narrow = rotary_tables(positions, 8, Rotary(rope_theta=1e4), torch.bfloat16)
    wide = rotary_tables(positions, 8, Rotary(rope_theta=1e4), torch.float32)
    assert torch.equal(narrow.cosine, wide.cosine.bfloat16())
    assert torch.equal(narrow.sine, wide.sine.bfloat16())
    assert not torch.equal(narrow.cosine[0], narrow.cosine[1])
