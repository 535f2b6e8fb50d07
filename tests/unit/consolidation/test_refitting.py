"""Matrices and norms refitted to changed inputs: better where nothing was fitted, or left alone."""

import pytest
import torch

from moemerge.consolidation.refitting import (
    refit_matrix,
    refit_norm,
    routing_divergence,
    squared_error,
)

T, D, N = 400, 16, 6


@pytest.fixture
def given():
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(T, D, generator=generator)
    matrix = torch.randn(N, D, generator=generator)
    turned = inputs @ (torch.eye(D) + 0.1 * torch.randn(D, D, generator=generator))
    return inputs, turned, matrix, torch.arange(T) % 4 == 3


@pytest.mark.parametrize("miss", [squared_error, routing_divergence])
def test_matrix_gives_what_it_gave_before_its_inputs_changed(given, miss):
    inputs, turned, matrix, judged = given
    wanted = inputs @ matrix.T
    fitted = refit_matrix(turned, wanted, matrix, judged, miss)
    before = miss(turned[judged] @ matrix.T, wanted[judged])
    assert miss(turned[judged] @ fitted.T, wanted[judged]) < 0.05 * before


def test_matrix_whose_inputs_did_not_change_is_left_alone(given):
    inputs, _, matrix, judged = given
    assert refit_matrix(inputs, inputs @ matrix.T, matrix, judged) is None


def test_what_helps_fitted_tokens_alone_is_not_kept(given):
    inputs, _, matrix, judged = given
    wanted = inputs @ matrix.T
    wanted[~judged] += torch.randn(T, N, generator=torch.Generator().manual_seed(5))[~judged]
    fitted = refit_matrix(inputs, wanted, matrix, judged, ridges=(1e-6,))
    assert fitted is None


def test_matrix_stays_in_its_dtype(given):
    inputs, turned, matrix, judged = given
    fitted = refit_matrix(turned, inputs @ matrix.T, matrix.bfloat16(), judged)
    assert fitted.dtype == torch.bfloat16


def test_inputs_of_zeros_fit_nothing(given):
    _, _, matrix, judged = given
    assert refit_matrix(torch.zeros(T, D), torch.ones(T, N), matrix, judged) is None
    assert refit_norm(torch.zeros(T, D), torch.ones(T, D), torch.ones(D), judged) is None


def test_norm_takes_back_a_change_of_scale(given):
    inputs, _, _, judged = given
    own = torch.linspace(0.5, 2, D)
    scale = torch.linspace(0.8, 1.2, D)
    fitted = refit_norm(inputs * scale, inputs * own, own, judged)
    assert torch.allclose(fitted, own / scale, rtol=0.05)
    assert refit_norm(inputs, inputs * own, own, judged) is None
