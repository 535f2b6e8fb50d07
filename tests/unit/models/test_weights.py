import pytest
import torch

from moemerge.models import MixedVariants, OneVariant
from moemerge.models.norm import rms_norm
from moemerge.models.weights import is_only_multiplied

D = 6


def tensors_of(seed: int, vocab_size: int = 5) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"matrix": (4, D), "norm": (D,), "bias": (D,), "embedding": (vocab_size, D)}
    return {role: torch.randn(shape, generator=generator) for role, shape in shapes.items()}


def apply_all(weights, hidden, ids) -> dict[str, torch.Tensor]:
    return {
        "linear": weights.linear("matrix", hidden),
        "add": weights.add("bias", hidden),
        "norm": weights.norm("norm", hidden, 1e-5),
        "embed": weights.embed("embedding", ids),
        "embed many": weights.embed("embedding", torch.stack((ids, ids, ids * 0), dim=1)),
    }


@pytest.mark.parametrize("counts", [(1, 1, 1), (3, 1, 2), (1, 4, 1)])
def test_each_token_meets_the_tensors_of_its_variant(counts):
    variants = [tensors_of(0), tensors_of(1, vocab_size=7), tensors_of(2)]
    hidden, ids = torch.randn(sum(counts), D), torch.arange(sum(counts)) % 5
    mixed = apply_all(MixedVariants(list(zip(counts, variants, strict=True))), hidden, ids)
    start = 0
    for count, tensors in zip(counts, variants, strict=True):
        rows = slice(start, start + count)
        for name, alone in apply_all(OneVariant(tensors), hidden[rows], ids[rows]).items():
            torch.testing.assert_close(mixed[name][rows], alone)
        start += count


def test_one_variant_applies_the_plain_formulas():
    tensors, hidden, ids = tensors_of(0), torch.randn(3, D), torch.tensor([4, 0, 4])
    found = apply_all(OneVariant(tensors), hidden, ids)
    torch.testing.assert_close(found["linear"], hidden @ tensors["matrix"].T)
    assert torch.equal(found["add"], hidden + tensors["bias"])
    assert torch.equal(found["norm"], rms_norm(hidden, tensors["norm"], 1e-5))
    assert torch.equal(found["embed"], tensors["embedding"][ids])
    assert found["embed many"].shape == (3, 3, D)


def test_neighbours_that_hold_the_same_tensor_are_one_product(monkeypatch):
    shared, other = tensors_of(0), tensors_of(1)
    equal = {role: tensor.clone() for role, tensor in shared.items()}
    products = []

    def multiply(hidden, matrix):
        products.append(len(hidden))
        return hidden @ matrix.T

    monkeypatch.setattr("moemerge.models.weights.multiply", multiply)
    hidden = torch.randn(10, D)
    for parts, expected in (
        ([(3, shared), (7, dict(shared))], [10]),
        ([(3, shared), (2, other), (5, shared)], [3, 2, 5]),
        ([(3, shared), (2, dict(shared)), (4, other), (1, other)], [5, 5]),
        ([(3, shared), (7, equal)], [3, 7]),
    ):
        products.clear()
        MixedVariants(parts).linear("matrix", hidden)
        assert products == expected


def test_roles_are_those_of_the_variants():
    for weights in (OneVariant(tensors_of(0)), MixedVariants([(1, tensors_of(0)), (1, tensors_of(1))])):
        assert "matrix" in weights
        assert "router" not in weights


@pytest.mark.parametrize(
    ("role", "expected"),
    [
        ("decoder.0.attention.query", True),
        ("decoder.3.cross_attention.output", True),
        ("encoder.1.ffn.wi", True),
        ("head", True),
        ("embedding", False),  # looked up, and a tied head
        ("decoder.0.router", False),  # Switch computes it in float32
        ("encoder.position_bias", False),
        ("decoder.0.attention_norm", False),
        ("decoder.final_norm", False),
    ],
)
def test_only_matrices_that_are_only_multiplied_may_be_packed(role, expected):
    assert is_only_multiplied(role) == expected
