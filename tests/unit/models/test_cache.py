import pytest
import torch

from moemerge.models import GrowingCache, Span
from moemerge.models.groups import Group

G, H = 2, 3


def numbered(*tokens: int) -> torch.Tensor:
    """Keys [T, G, h] whose every entry is the token's number."""
    return torch.tensor(tokens, dtype=torch.float32).view(-1, 1, 1).expand(-1, G, H)


def read(keys, layer: int, sequences: tuple[int, ...], num_keys: int) -> list[list[int]]:
    group = Group(slice(0, len(sequences)), sequences, 1, num_keys)
    key, value = keys.read(layer, group)
    assert key.shape == (len(sequences), G, num_keys, H)
    assert torch.equal(value, -key)
    assert torch.equal(key, key[:, :1, :, :1].expand_as(key))
    return key[:, 0, :, 0].int().tolist()


def write(keys, layer: int, *tokens: int) -> None:
    keys.write(layer, numbered(*tokens), -numbered(*tokens))


def test_sequences_grow_by_what_is_written_in_any_batch():
    cache = GrowingCache()
    first = cache.of([Span(0, 2), Span(2, 3)], ["a", "b"])
    for layer in range(2):
        write(first, layer, 10, 11, 20, 21, 22)
    second = cache.of([Span(0, 1, 3), Span(1, 2, 2), Span(3, 1)], ["b", "a", "c"])
    for layer in range(2):
        write(second, layer, 23, 12, 13, 30)
    assert read(second, 1, (1, 0), 4) == [[10, 11, 12, 13], [20, 21, 22, 23]]
    assert read(second, 0, (2,), 1) == [[30]]


def test_what_stands_behind_a_shorter_sequence_is_zero():
    keys = GrowingCache().of([Span(0, 1), Span(1, 3)])
    write(keys, 0, 5, 6, 7, 8)
    assert read(keys, 0, (0, 1), 4) == [[5, 0, 0, 0], [6, 7, 8, 0]]


def test_writing_the_same_tokens_again_replaces_them():
    cache = GrowingCache()
    write(cache.of([Span(0, 2)]), 0, 1, 2)
    keys = cache.of([Span(0, 2, 2)])
    write(keys, 0, 8, 9)
    write(keys, 0, 3, 4)
    assert read(keys, 0, (0,), 4) == [[1, 2, 3, 4]]


def test_a_gap_in_a_sequence_is_refused():
    cache = GrowingCache()
    write(cache.of([Span(0, 2)]), 0, 1, 2)
    with pytest.raises(AssertionError, match="continues behind"):
        write(cache.of([Span(0, 1, 3)]), 0, 9)
