import pytest
import torch

from moemerge.models.attention import Visibility, attend, causal_visibility


def visible_plain(positions, num_keys, window):
    return [
        [
            [key <= query and (window is None or key > query - window) for key in range(num_keys)]
            for query in row
        ]
        for row in positions
    ]


def as_mask(visibility: Visibility, num_new: int, num_keys: int) -> torch.Tensor:
    everything = torch.ones(num_new, num_keys, dtype=torch.bool)
    if visibility.is_causal:
        assert visibility.mask is None
        return everything.tril()[None]
    return everything[None] if visibility.mask is None else visibility.mask[:, 0]


@pytest.mark.parametrize("window", [None, 1, 3, 100])
@pytest.mark.parametrize("positions", [[[0]], [[0, 1, 2, 3]], [[5]], [[4, 5, 6]], [[2, 3], [6, 7]]])
def test_visible_keys_are_those_before_the_query_and_within_the_window(positions, window):
    num_keys = positions[-1][-1] + 1
    visibility = causal_visibility(torch.tensor(positions), num_keys, window, is_ragged=len(positions) > 1)
    mask = as_mask(visibility, len(positions[0]), num_keys)
    assert mask.tolist() == visible_plain(positions, num_keys, window)


def test_decoding_one_token_without_window_needs_no_mask():
    assert causal_visibility(torch.tensor([[7]]), 8, None, is_ragged=False) == Visibility()


@pytest.mark.parametrize("num_new", [1, 4])
@pytest.mark.parametrize("num_kv_heads", [1, 2, 4])
def test_each_kv_head_serves_its_neighbouring_query_heads(num_new, num_kv_heads):
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(2, 4, num_new, 6, generator=generator)
    key, value = torch.randn(2, 2, num_kv_heads, 5, 6, generator=generator)
    mask = torch.rand(2, 1, num_new, 5, generator=generator) < 0.7
    mask[..., 0] = True
    output = attend(query, key, value, Visibility(mask), scale=0.3)
    for head in range(4):
        kv_head = head * num_kv_heads // 4
        scores = 0.3 * query[:, head] @ key[:, kv_head].transpose(1, 2)
        weights = scores.masked_fill(~mask[:, 0], -torch.inf).softmax(dim=-1)
        expected = weights @ value[:, kv_head]
        torch.testing.assert_close(output[..., 6 * head : 6 * head + 6], expected)
