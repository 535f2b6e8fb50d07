import math

import pytest
import torch

from moemerge.models.positions import position_bias, rotary_tables, rotate


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
    heads = torch.randn(2, 3, 4, 6, generator=torch.Generator().manual_seed(0))
    positions = torch.tensor([[0, 1, 2, 3], [5, 6, 7, 40]])
    rotated = rotate(heads, rotary_tables(positions, 6, 50.0, torch.float32))
    for row in range(2):
        for head in range(3):
            for token in range(4):
                expected = rotated_plain(heads[row, head, token].tolist(), int(positions[row, token]), 50.0)
                assert rotated[row, head, token].tolist() == pytest.approx(expected, abs=1e-5)


def test_rotary_tables_are_computed_in_float32_and_cast_once():
    positions = torch.tensor([[300, 301]])
    narrow = rotary_tables(positions, 8, 1e4, torch.bfloat16)
    wide = rotary_tables(positions, 8, 1e4, torch.float32)
    assert torch.equal(narrow.cosine, wide.cosine.bfloat16())
    assert torch.equal(narrow.sine, wide.sine.bfloat16())
    assert not torch.equal(narrow.cosine[0, 0, 0], narrow.cosine[0, 0, 1])


def test_bias_of_the_last_queries_is_the_end_of_the_whole():
    table = torch.randn(8, 3, generator=torch.Generator().manual_seed(0))
    whole = position_bias(table, 10, 10, 12, bidirectional=False)
    assert whole.shape == (1, 3, 10, 10)
    assert torch.equal(position_bias(table, 2, 10, 12, bidirectional=False), whole[:, :, 8:])
