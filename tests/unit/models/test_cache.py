from itertools import pairwise

import pytest
import torch

from moemerge.models.cache import DecodingCache, KeyValueCache

G, H = 2, 3


def numbered(batch_size: int, num_tokens: int, first: int) -> torch.Tensor:
    """Keys [B, G, T, h] whose every entry is 100 * row + running token number."""
    rows = 100.0 * torch.arange(batch_size)[:, None, None, None]
    tokens = torch.arange(first, first + num_tokens, dtype=torch.float32)[None, None, :, None]
    return (rows + tokens).expand(batch_size, G, num_tokens, H)


def test_appended_tokens_come_back_in_order_across_chunk_borders():
    cache = KeyValueCache(num_layers=2, batch_size=2, chunk_tokens=4)
    seen = 0
    for num_new in (3, 1, 2, 9, 1):
        for layer in range(2):
            keys, values = cache.append(
                layer, numbered(2, num_new, seen), -numbered(2, num_new, seen) - layer
            )
        cache.advance(num_new)
        seen += num_new
        assert cache.length == seen
        assert torch.equal(keys, numbered(2, seen, 0))
        assert torch.equal(values, -numbered(2, seen, 0) - 1)


def test_growing_copies_rarely():
    """Storage moves only when it is full, so most appends leave it where it is."""
    cache, places = KeyValueCache(num_layers=1, chunk_tokens=8), []
    for token in range(200):
        keys, _ = cache.append(0, numbered(1, 1, token), numbered(1, 1, token))
        cache.advance(1)
        places.append(keys.data_ptr())
    moves = sum(before != after for before, after in pairwise(places))
    assert 0 < moves <= 8


def test_nothing_counts_until_advance():
    cache = KeyValueCache(num_layers=1)
    cache.append(0, numbered(1, 3, 50), numbered(1, 3, 50))
    assert cache.length == 0
    keys, _ = cache.append(0, numbered(1, 2, 0), numbered(1, 2, 0))
    assert torch.equal(keys, numbered(1, 2, 0))


def test_shorter_rows_continue_behind_their_own_length():
    cache = KeyValueCache(num_layers=1, batch_size=2)
    cache.append(0, numbered(2, 4, 0), numbered(2, 4, 0))
    cache.advance([2, 4])
    assert cache.is_ragged
    keys, _ = cache.append(0, numbered(2, 1, 9), numbered(2, 1, 9))
    cache.advance(1)
    assert cache.lengths == (3, 5)
    assert keys[0, 0, :3, 0].tolist() == [0, 1, 9]
    assert keys[1, 0, :, 0].tolist() == [100, 101, 102, 103, 109]


def test_unwritten_tails_are_finite():
    cache = KeyValueCache(num_layers=1, batch_size=2, chunk_tokens=4)
    cache.append(0, numbered(2, 3, 0), numbered(2, 3, 0))
    cache.advance([1, 3])
    for token in range(20):
        keys, values = cache.append(0, numbered(2, 1, token), numbered(2, 1, token))
        cache.advance(1)
        assert keys.isfinite().all()
        assert values.isfinite().all()


def test_lengths_of_another_batch_size_are_refused():
    with pytest.raises(ValueError):
        KeyValueCache(num_layers=1, batch_size=2).advance([1])


def test_cross_keys_are_computed_at_the_first_request_only():
    cache, calls = DecodingCache(KeyValueCache(num_layers=2)), []

    def compute():
        calls.append(1)
        return torch.zeros(1), torch.ones(1)

    first = cache.cross_or(1, compute)
    assert cache.cross_or(1, compute) is first
    assert len(calls) == 1
