import pytest
import torch

from moemerge.models import can_pack, multiply, pack
from moemerge.models import products as module
from moemerge.models.products import matmul

CPU = torch.device("cpu")
needs_packing = pytest.mark.skipif(
    not can_pack(torch.bfloat16, CPU), reason="this CPU or this torch packs nothing"
)


def random_pair(num_rows: int, dtype=torch.bfloat16) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(num_rows)
    hidden, matrix = torch.randn(num_rows, 48, generator=generator), torch.randn(40, 48, generator=generator)
    return hidden.to(dtype), matrix.to(dtype)


@needs_packing
@pytest.mark.parametrize("num_rows", [0, 1, 2, 3, 5, 64])
def test_a_packed_matrix_gives_the_product_of_the_plain_one(num_rows):
    hidden, matrix = random_pair(num_rows)
    product = multiply(hidden, pack(matrix))
    assert product.dtype == torch.bfloat16
    torch.testing.assert_close(product, multiply(hidden, matrix))


@needs_packing
def test_packing_keeps_shape_dtype_size_and_values():
    _, matrix = random_pair(1)
    packed = pack(matrix)
    assert packed is not matrix
    assert (packed.shape, packed.dtype, packed.nbytes) == (matrix.shape, matrix.dtype, matrix.nbytes)
    assert torch.equal(packed.to_dense(), matrix)
    assert pack(packed) is packed


@needs_packing
def test_rows_and_matrices_may_be_views_of_larger_tensors():
    hidden, matrix = random_pair(4)
    packed = pack(torch.cat((matrix, matrix)).view(2, 40, 48)[1])
    views = torch.cat((hidden, hidden), dim=1)[:, :48]
    assert torch.equal(multiply(views, packed), multiply(hidden, pack(matrix)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_what_cannot_be_packed_stays_as_it_is(dtype):
    _, matrix = random_pair(1, dtype)
    assert pack(matrix) is matrix
    assert not can_pack(dtype, CPU)
    assert not can_pack(torch.bfloat16, torch.device("cuda"))


@pytest.mark.parametrize("arrange", [lambda matrix: matrix, pack], ids=["plain", "packed"])
def test_the_product_is_computed_in_the_dtype_of_the_rows(arrange):
    hidden, matrix = random_pair(3)
    product = multiply(hidden.float(), arrange(matrix))
    assert product.dtype == torch.float32
    torch.testing.assert_close(product, hidden.float() @ matrix.float().T)


@pytest.mark.parametrize("shape", [(64, 320, 256), (3, 16, 8), (0, 320, 256)])
@pytest.mark.parametrize("has_onednn", [True, False])
def test_products_in_float32_have_all_digits_whoever_computes_them(shape, has_onednn, monkeypatch):
    num_rows, inner, num_columns = shape
    if not has_onednn:
        monkeypatch.setattr(module, "_is_for_onednn", lambda *_: False)
    generator = torch.Generator().manual_seed(1)
    # Views, as blocks of larger matrices are.
    left = torch.randn(inner, num_rows, generator=generator).T
    right = torch.randn(inner, 2 * num_columns, generator=generator)[:, num_columns:]
    if has_onednn and hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        assert module._is_for_onednn(left, right.T) == (shape == (64, 320, 256))
    exact = (left.double() @ right.double()).float()
    torch.testing.assert_close(matmul(left, right), exact, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(multiply(left, right.T), exact, rtol=1e-5, atol=1e-4)


def test_gradients_go_through_large_products():
    left = torch.randn(64, 320)
    matrix = torch.randn(256, 320, requires_grad=True)
    multiply(left, matrix).sum().backward()
    torch.testing.assert_close(matrix.grad, left.sum(dim=0).expand(256, -1))
