"""Pool experts and residuals as a plan has them, against the experts they stand for."""

import pytest
import torch

from moemerge.checkpoint.tensors import TensorReader
from moemerge.checkpoint.variants import open_variants
from moemerge.consolidation.encoding import encode_expert
from moemerge.consolidation.evidence import Evidence
from moemerge.consolidation.ladder import bits_code, code_size, ladder_of, rank_code
from moemerge.consolidation.measured import NoiseStatistics
from moemerge.consolidation.plan import PlannedExpert, PlannedLayer
from moemerge.models.packed import LowRank, PackedMatrix, effective
from moemerge.refs import FolderRef
from tests.factories import write_siblings

NAMES = ("a", "b", "c")
SHAPES = {"gate": (48, 32), "up": (48, 32), "down": (32, 48)}


@pytest.fixture(scope="module")
def evidence(tmp_path_factory):
    """Of two fine-tunes and `c`, a copy of the base."""
    folder = tmp_path_factory.mktemp("family")
    base, tunes = write_siblings(folder, names=("a", "b"))
    variants = open_variants({name: FolderRef(path) for name, path in {**tunes, "c": base}.items()})
    with TensorReader() as reader:
        yield Evidence(variants=variants, statistics=NoiseStatistics(variants), reader=reader)


def planned(members=("a", "b"), operator="mean", code=None, residual=None):
    refs = [(name, 1) for name in members]
    expert = PlannedExpert(members=refs, operator=operator, sources=refs, code=code)
    residuals = {name: [None, residual, None, None] for name in members}
    return PlannedLayer(index=1, pool=[expert], residuals=residuals if residual else {})


def encode(evidence, **options):
    layer = planned(**options)
    return encode_expert(evidence, layer, layer.pool[0])


def distance(encoded, evidence, ref):
    """Of what a slot computes with, over the norm of the expert."""
    squared = norm = 0.0
    for part, own in evidence.parts(1, ref).items():
        residual = encoded.residuals[ref][part] if ref in encoded.residuals else None
        stands = effective(encoded.parts[part], residual, own.dtype).double()
        squared += float((stands - own.double()).square().sum())
        norm += float(own.double().square().sum())
    return (squared / norm) ** 0.5


def test_plain_copy_is_the_expert(evidence):
    encoded = encode(evidence, members=("a",), operator="copy")
    own = evidence.parts(1, ("a", 1))
    assert all(torch.equal(encoded.parts[part], matrix) for part, matrix in own.items())
    assert encoded.errors == {("a", 1): 0.0}
    assert not encoded.residuals


@pytest.mark.parametrize("residual", [None, bits_code(2, 64), rank_code(4)])
@pytest.mark.parametrize("code", [None, bits_code(8, None), bits_code(3, 64)])
def test_errors_are_those_of_what_a_slot_computes_with(code, residual, evidence):
    encoded = encode(evidence, code=code, residual=residual)
    assert encoded.errors.keys() == {("a", 1), ("b", 1)}
    for ref, error in encoded.errors.items():
        assert error == pytest.approx(distance(encoded, evidence, ref), rel=1e-4)


def test_parts_and_residuals_take_the_bytes_that_were_counted(evidence):
    for code in (c for c in ladder_of(SHAPES).pool.values() if c is not None):
        encoded = encode(evidence, code=code)
        assert all(isinstance(matrix, PackedMatrix) for matrix in encoded.parts.values())
        assert sum(matrix.nbytes for matrix in encoded.parts.values()) == code_size(code, SHAPES, 0)
    for code in (c for c in ladder_of(SHAPES).residuals.values() if c is not None):
        encoded = encode(evidence, residual=code)
        for parts in encoded.residuals.values():
            assert sum(matrix.nbytes for matrix in parts.values()) == code_size(code, SHAPES, 0)
            assert all(isinstance(m, PackedMatrix if code.rank is None else LowRank) for m in parts.values())


def test_finer_residuals_bring_every_member_closer(evidence):
    found = [
        encode(evidence, code=bits_code(4, 64), residual=bits_code(bits, 64) if bits else None)
        for bits in (0, 1, 2, 3, 4)
    ]
    for ref in (("a", 1), ("b", 1)):
        errors = [encoded.errors[ref] for encoded in found]
        assert errors == sorted(errors, reverse=True)


def test_residual_repairs_the_code_of_the_pool_expert_too(evidence):
    """It is taken against the pool expert as stored: alone in its place, it needs no sharing to be of use."""
    coarse = encode(evidence, members=("a",), operator="copy", code=bits_code(3, 64))
    repaired = encode(
        evidence, members=("a",), operator="copy", code=bits_code(3, 64), residual=bits_code(4, 64)
    )
    assert repaired.errors["a", 1] < 0.2 * coarse.errors["a", 1]


def test_same_plan_gives_the_same_bytes(evidence):
    options = {"operator": "regmean", "code": bits_code(4, 64), "residual": bits_code(1, 64)}
    one, other = encode(evidence, **options), encode(evidence, **options)
    assert one.errors == other.errors
    for part, matrix in one.parts.items():
        assert torch.equal(matrix.codes, other.parts[part].codes)
        assert torch.equal(matrix.scales, other.parts[part].scales)


def test_equal_experts_count_once_in_what_is_made_of_them(tmp_path):
    base, tunes = write_siblings(tmp_path, names=("a",))
    folders = {"a": tunes["a"], "b": base, "c": base}
    variants = open_variants({name: FolderRef(folder) for name, folder in folders.items()})
    with TensorReader() as reader:
        found = Evidence(variants=variants, statistics=NoiseStatistics(variants), reader=reader)
        three = encode(found, members=NAMES)
        two = encode(found, members=("a", "b"))
    assert all(torch.equal(matrix, two.parts[part]) for part, matrix in three.parts.items())
    assert three.errors["b", 1] == three.errors["c", 1]
