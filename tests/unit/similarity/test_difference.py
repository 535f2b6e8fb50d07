"""Distances of two tensors, added up piece by piece."""

import math

import pytest
import torch

from moemerge.similarity.difference import Difference


def measure(first, second, pieces=1):
    difference = Difference()
    for pair in zip(first.chunk(pieces), second.chunk(pieces), strict=True):
        difference.add(*pair)
    return difference


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("pieces", [1, 7])
def test_distances_are_those_of_whole_tensors(dtype, pieces):
    generator = torch.Generator().manual_seed(1)
    first, second = (torch.randn(1000, generator=generator).to(dtype) for _ in range(2))
    found = measure(first, second, pieces)
    apart = first.double() - second.double()
    assert found.relative == pytest.approx(float(apart.norm() / first.double().norm()), rel=1e-6)
    assert found.largest == pytest.approx(float(apart.abs().max()), rel=1e-6)
    assert not found.is_equal


def test_equal_values_of_two_dtypes_are_equal():
    values = torch.randn(64).to(torch.bfloat16)
    found = measure(values, values.float())
    assert (found.is_equal, found.relative, found.largest) == (True, 0.0, 0.0)


@pytest.mark.parametrize("odd", [math.nan, math.inf])
def test_what_is_no_number_has_no_distance_and_is_not_equal(odd):
    values = torch.tensor([1.0, odd])
    found = measure(torch.ones(2), values)
    assert (found.is_equal, found.relative, found.largest) == (False, None, None)


def test_distance_to_zeros_has_no_unit_but_a_size():
    found = measure(torch.zeros(3), torch.tensor([0.0, 2.0, -3.0]))
    assert (found.relative, found.largest) == (None, 3.0)
