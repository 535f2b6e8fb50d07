import torch

from moemerge.models.norm import rms_norm


def test_norm_divides_by_the_root_mean_square():
    hidden, weight = torch.tensor([[3.0, 4.0]]), torch.tensor([1.0, 10.0])
    root = (12.5 + 0.5) ** 0.5
    torch.testing.assert_close(rms_norm(hidden, weight, 0.5), torch.tensor([[3 / root, 40 / root]]))


def test_norm_is_cast_back_before_the_weight_multiplies():
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(50, 16, generator=generator).bfloat16()
    weight = torch.randn(16, generator=generator).bfloat16()
    wide = hidden.float() * torch.rsqrt(hidden.float().pow(2).mean(-1, keepdim=True) + 1e-5)
    cast_first, cast_last = weight * wide.bfloat16(), (weight.float() * wide).bfloat16()
    assert torch.equal(rms_norm(hidden, weight, 1e-5), cast_first)
    assert not torch.equal(cast_first, cast_last)
