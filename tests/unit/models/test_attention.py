import pytest
import torch

from moemerge.models import GrowingCache, Span
from moemerge.models.attention import attend
from moemerge.models.groups import plan_cross_groups, plan_groups

CPU, H = torch.device("cpu"), 4
SPANS = [Span(0, 3), Span(3, 1, 5), Span(4, 1, 90), Span(5, 3), Span(8, 2, 7), Span(10, 1, 4)]


def random_heads(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def attend_plain(query_Hh, key_SGh, value_SGh, scale: float) -> torch.Tensor:
    """One token's attention, head by head."""
    num_kv_heads = key_SGh.shape[1]
    outputs = []
    for head in range(H):
        kv_head = head * num_kv_heads // H
        weights = (scale * key_SGh[:, kv_head] @ query_Hh[head]).softmax(dim=0)
        outputs.append(weights @ value_SGh[:, kv_head])
    return torch.cat(outputs)


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("num_kv_heads", [1, 2, 4])
def test_a_flat_batch_equals_one_token_at_a_time(num_kv_heads, window):
    num_tokens = 11
    query = random_heads(num_tokens, H, 6)
    key, value = random_heads(2, num_tokens, num_kv_heads, 6)
    cache = GrowingCache()
    for number, span in enumerate(SPANS):
        if span.past:
            past = Span(0, span.past)
            cache.of([past], [number]).write(0, *random_heads(2, span.past, num_kv_heads, 6))
    groups = plan_groups(SPANS, window, 1, CPU, torch.float32)
    assert len(groups) > 3
    keys = cache.of(SPANS)
    output = attend(groups, 0, query, key, value, keys, 0.3)
    for number, span in enumerate(SPANS):
        all_keys, all_values = cache.stored[number, 0]
        for i in range(span.length):
            end = span.past + i + 1
            seen = slice(0 if window is None else max(0, end - window), end)
            expected = attend_plain(query[span.start + i], all_keys[seen], all_values[seen], 0.3)
            torch.testing.assert_close(output[span.start + i], expected)


def test_cross_attention_sees_all_keys_of_the_sequence():
    spans, lengths = [Span(0, 1, 2), Span(1, 3), Span(4, 1, 8)], [4, 9, 2]
    query, cache = random_heads(5, H, 6), GrowingCache()
    encoded = [Span(0, 4), Span(4, 9), Span(13, 2)]
    cache.of(encoded).write(1, *random_heads(2, 15, H, 6))
    groups = plan_cross_groups(spans, lengths, 1, CPU, torch.float32)
    output = attend(groups, 1, query, None, None, cache.of(spans), 1.0)
    for number, span in enumerate(spans):
        for token in range(span.start, span.start + span.length):
            torch.testing.assert_close(
                output[token], attend_plain(query[token], *cache.stored[number, 1], 1.0)
            )


def test_without_a_cache_each_sequence_sees_itself():
    spans = [Span(0, 2), Span(2, 2), Span(4, 1)]
    query, (key, value) = random_heads(5, H, 6), random_heads(2, 5, 2, 6)
    output = attend(plan_groups(spans, None, 1, CPU, torch.float32), 0, query, key, value, None, 0.5)
    for span in spans:
        for end in range(span.start + 1, span.start + span.length + 1):
            expected = attend_plain(query[end - 1], key[span.start : end], value[span.start : end], 0.5)
            torch.testing.assert_close(output[end - 1], expected)
