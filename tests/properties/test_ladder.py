"""Laws of the ladder's rungs, whatever the matrices and however few inputs were seen."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from moemerge.consolidation.codes.moments import moment_of_rows
from moemerge.consolidation.ladder import code_size, encode, encode_residual, ladder_of, residual_size
from moemerge.models.packed import effective
from tests.coded import random_matrix

sizes = st.integers(3, 12).map(lambda n: 8 * n)
inputs = st.integers(0, 40)
seeds = st.integers(0, 99)


def expert(num_rows, num_columns, num_inputs, seed):
    """Two matrices of the same inputs and one of others, with moments of as many inputs."""
    shapes = {"gate": (num_rows, num_columns), "up": (num_rows, num_columns), "down": (num_columns, num_rows)}
    parts = {part: random_matrix(*shape, seed=seed + n) for n, (part, shape) in enumerate(shapes.items())}
    ones = torch.ones(num_inputs)
    outer = moment_of_rows(random_matrix(num_inputs, num_columns, seed + 3), ones)
    inner = moment_of_rows(random_matrix(num_inputs, num_rows, seed + 4), ones)
    return shapes, parts, {"gate": outer, "up": outer, "down": inner}


def distance(parts, stored, moments, added=None):
    """What is missing, weighed as inputs and damping say."""
    total = 0.0
    for part, matrix in parts.items():
        stands = effective(stored[part], added[part] if added else None, torch.float32)
        assert stands.isfinite().all()
        total += moments[part].damped().error(stands - matrix)
    return total


@given(sizes, sizes, inputs, seeds)
def test_every_rung_takes_the_bytes_it_is_priced_at(num_rows, num_columns, num_inputs, seed):
    shapes, parts, moments = expert(num_rows, num_columns, num_inputs, seed)
    ladder = ladder_of(shapes)
    for code in filter(None, ladder.pool.values()):
        stored = encode(parts, code, moments)
        assert sum(matrix.nbytes for matrix in stored.values()) == code_size(code, shapes, 0)
    for code in filter(None, ladder.residuals.values()):
        added = encode_residual(parts, code, moments)
        assert sum(matrix.nbytes for matrix in added.values()) == residual_size(code, shapes)


@given(sizes, sizes, inputs, seeds)
def test_a_finer_rung_is_closer(num_rows, num_columns, num_inputs, seed):
    shapes, parts, moments = expert(num_rows, num_columns, num_inputs, seed)
    ladder = ladder_of(shapes)
    for codes, make in ((ladder.pool, encode), (ladder.residuals, encode_residual)):
        grouped = [code for code in codes.values() if code and code.kind == "bits" and code.group]
        by_bits = sorted(grouped, key=lambda code: code.bits)
        found = [distance(parts, make(parts, code, moments), moments) for code in by_bits]
        assert len(found) == len(grouped) > 2
        assert found == sorted(found, reverse=True)


@given(sizes, sizes, inputs, seeds)
def test_every_residual_brings_every_pool_expert_closer(num_rows, num_columns, num_inputs, seed):
    shapes, parts, moments = expert(num_rows, num_columns, num_inputs, seed)
    ladder = ladder_of(shapes)
    shared = {
        part: matrix + 0.3 * random_matrix(*matrix.shape, seed=seed + 5) for part, matrix in parts.items()
    }
    for code in ladder.pool.values():
        stored = encode(shared, code, moments) if code else shared
        dense = {part: effective(matrix, None, torch.float32) for part, matrix in stored.items()}
        missing = {part: parts[part] - matrix for part, matrix in dense.items()}
        without = distance(parts, stored, moments)
        for residual in filter(None, ladder.residuals.values()):
            added = encode_residual(missing, residual, moments)
            assert distance(parts, stored, moments, added) < without
