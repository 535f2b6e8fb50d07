"""Attention of a flat batch: which tokens are attended together, what they see, and the product.

A forward pass plans its groups once and attends with them in every layer. Tokens that are the only new
one of their sequence go together, padded to the longest; longer spans go one by one. Knows nothing of
weights, of positional embeddings and of how keys are stored.

Shapes: T tokens, B sequences of a group, N new tokens of each, S keys, H query heads, G key/value heads,
h head width.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from moemerge.models.batch import Span

Bias = Callable[[Tensor, Tensor], Tensor]
"""From the first tokens [B] of a group's sequences and the distance of every key to every query, key
position minus query position [B, N, S], to what is added to the scores, [B, H, N, S]."""

_SHORT = 64


@dataclass(frozen=True, slots=True)
class Group:
    """Sequences that are attended in one product.

    Attributes:
        tokens: Places of the new tokens in the batch, sequence after sequence.
        sequences: Numbers of their spans.
        num_new: N.
        num_keys: S, the keys of the longest sequence, rounded up to what the cache likes to give.
        mask: Added to the scores, broadcastable to [B, H, N, S]; None when nothing is hidden or
            `is_causal` says it all.
        is_causal: As many keys as queries, each query sees those up to its own.
        is_fresh: The keys are those of the group's own tokens; there is nothing to read.
    """

    tokens: slice | Tensor
    sequences: tuple[int, ...]
    num_new: int
    num_keys: int
    mask: Tensor | None = None
    is_causal: bool = False
    is_fresh: bool = False


class KeyValues(Protocol):
    """Keys and values of the sequences of a batch."""

    @property
    def granularity(self) -> int:
        """The number of keys that `read` is asked for is a multiple of it."""
        ...

    def write(self, layer_index: int, key_TGh: Tensor, value_TGh: Tensor) -> None:
        """Keep those of the batch's T new tokens; writing the same tokens again replaces them."""
        ...

    def read(self, layer_index: int, group: Group) -> tuple[Tensor, Tensor]:
        """Those of the group's sequences, [B, G, S, h] with S = `group.num_keys`.

        What stands behind a sequence's last token is finite and meaningless; the group's mask hides it.
        """
        ...


def plan_groups(
    spans: Sequence[Span],
    window: int | None,
    granularity: int,
    device: torch.device,
    dtype: torch.dtype,
    bias: Bias | None = None,
) -> list[Group]:
    """Groups for causal self-attention: keys at or before a query's position.

    Args:
        spans: Of the batch.
        window: Number of last positions a query sees, itself included; None for all.
        granularity: Of the cache.
        device: Of masks and indices.
        dtype: Of masks: that of the queries.
        bias: Positional bias, if any.
    """

    def mask_of(numbers: Sequence[int], num_keys: int) -> Tensor | None:
        chosen = [spans[number] for number in numbers]
        return _mask(chosen, num_keys, window, device, dtype, bias)

    groups = []
    singles = []
    for number, span in enumerate(spans):
        if span.past and span.length == 1:
            singles.append(number)
        elif span.past:
            num_keys = _round_up(span.num_keys, granularity)
            groups.append(_alone(number, span, num_keys, mask_of([number], num_keys)))
        else:
            is_causal = bias is None and (window is None or span.length <= window)
            mask = None if is_causal else mask_of([number], span.length)
            groups.append(_alone(number, span, span.length, mask, is_causal=is_causal, is_fresh=True))
    for numbers in _similar_lengths({number: spans[number].num_keys for number in singles}):
        longest = max(spans[number].num_keys for number in numbers)
        num_keys = _round_up(longest, granularity)
        groups.append(_together(numbers, spans, num_keys, mask_of(numbers, num_keys), device))
    return groups


def plan_two_way_groups(spans: Sequence[Span], device: torch.device, bias: Bias) -> list[Group]:
    """Groups for self-attention in which every token of a span sees all of them."""
    groups = []
    for number, span in enumerate(spans):
        distance_1NS = _distances([span], span.length, device)
        mask = bias(torch.tensor([span.start], device=device), distance_1NS)
        groups.append(_alone(number, span, span.length, mask, is_fresh=True))
    return groups


def plan_cross_groups(
    spans: Sequence[Span],
    lengths: Sequence[int],
    granularity: int,
    device: torch.device,
    dtype: torch.dtype,
) -> list[Group]:
    """Groups for attention of every token of a span to all `lengths[span]` keys of its sequence."""

    def mask_of(numbers: Sequence[int], num_keys: int) -> Tensor | None:
        if all(lengths[number] == num_keys for number in numbers):
            return None
        length_B111 = torch.tensor([lengths[number] for number in numbers], device=device).view(-1, 1, 1, 1)
        return _hide(torch.arange(num_keys, device=device) >= length_B111, dtype)

    groups = []
    singles = []
    for number, span in enumerate(spans):
        if span.length == 1:
            singles.append(number)
        else:
            num_keys = _round_up(lengths[number], granularity)
            groups.append(_alone(number, span, num_keys, mask_of([number], num_keys)))
    for numbers in _similar_lengths({number: lengths[number] for number in singles}):
        num_keys = _round_up(max(lengths[number] for number in numbers), granularity)
        groups.append(_together(numbers, spans, num_keys, mask_of(numbers, num_keys), device))
    return groups


def attend(
    groups: Sequence[Group],
    layer_index: int,
    query_THh: Tensor,
    key_TGh: Tensor | None,
    value_TGh: Tensor | None,
    keys: KeyValues | None,
    scale: float,
) -> Tensor:
    """Softmax attention, heads side by side again.

    Args:
        groups: They cover the T tokens.
        layer_index: Counted in the stack whose keys are kept.
        query_THh: Queries.
        key_TGh: Keys of the same tokens; key/value head g serves the H/G query heads from g * H/G on.
            None when `keys` hold all that is attended to.
        value_TGh: Values of the same tokens.
        keys: Where the new keys and values are written, and those of earlier tokens read; None when there
            are no earlier ones and nothing is kept.
        scale: Factor of the scores.

    Returns:
        [T, H*h].
    """
    if keys is not None and key_TGh is not None and value_TGh is not None:
        keys.write(layer_index, key_TGh, value_TGh)

    def attend_group(group: Group) -> Tensor:
        if group.is_fresh:
            assert key_TGh is not None
            assert value_TGh is not None
            key_BGSh = key_TGh[group.tokens].transpose(0, 1).unsqueeze(0)
            value_BGSh = value_TGh[group.tokens].transpose(0, 1).unsqueeze(0)
        else:
            assert keys is not None, "earlier tokens were computed without a cache"
            key_BGSh, value_BGSh = keys.read(layer_index, group)
        return _attend(group, query_THh[group.tokens], key_BGSh, value_BGSh, scale)

    if len(groups) == 1:
        return attend_group(groups[0])
    mixed_TD = query_THh.new_empty(len(query_THh), query_THh[0].numel())
    for group in groups:
        mixed_TD[group.tokens] = attend_group(group)
    return mixed_TD


def _attend(group: Group, query_THh: Tensor, key_BGSh: Tensor, value_BGSh: Tensor, scale: float) -> Tensor:
    """Attention of the tokens of one group, [T, H*h]."""
    num_tokens, num_heads, head_size = query_THh.shape
    num_kv_heads = key_BGSh.shape[1]
    if group.num_new == 1:
        # Query heads of one key/value head lie along the query axis, so that the keys are read as they
        # are: torch's grouped path took 2.3 ms where this takes 0.2 ms (CPU, one thread, bf16, H 32, G 8,
        # h 64, S 512).
        query = query_THh.reshape(num_tokens, num_kv_heads, -1, head_size)
    else:
        query = query_THh.transpose(0, 1).unsqueeze(0)
    output = functional.scaled_dot_product_attention(
        query,
        key_BGSh,
        value_BGSh,
        attn_mask=group.mask,
        is_causal=group.is_causal,
        scale=scale,
        enable_gqa=group.num_new > 1 and num_heads != num_kv_heads,
    )
    if group.num_new > 1:
        output = output.transpose(1, 2)
    return output.reshape(num_tokens, num_heads * head_size)


def _alone(
    number: int,
    span: Span,
    num_keys: int,
    mask: Tensor | None,
    is_causal: bool = False,
    is_fresh: bool = False,
) -> Group:
    tokens = slice(span.start, span.start + span.length)
    return Group(tokens, (number,), span.length, num_keys, mask, is_causal, is_fresh)


def _together(
    numbers: Sequence[int], spans: Sequence[Span], num_keys: int, mask: Tensor | None, device: torch.device
) -> Group:
    starts = [spans[number].start for number in numbers]
    tokens: slice | Tensor = slice(starts[0], starts[-1] + 1)
    if starts[-1] - starts[0] >= len(starts):
        tokens = torch.tensor(starts, device=device)
    return Group(tokens, tuple(numbers), 1, num_keys, mask)


def _similar_lengths(lengths: dict[int, int]) -> list[list[int]]:
    """Sequences by number, apart where one has less than half the keys of another and both are long."""
    buckets: list[list[int]] = []
    longest = 0
    for number in sorted(lengths, key=lambda number: -lengths[number]):
        if not buckets or (2 * lengths[number] < longest and longest > _SHORT):
            buckets.append([])
            longest = lengths[number]
        buckets[-1].append(number)
    return [sorted(bucket) for bucket in buckets]


def _mask(
    spans: Sequence[Span],
    num_keys: int,
    window: int | None,
    device: torch.device,
    dtype: torch.dtype,
    bias: Bias | None,
) -> Tensor | None:
    """What causal attention adds to the scores of spans of one length; None when all keys are seen."""
    is_everything_seen = spans[0].length == 1 and all(
        span.num_keys == num_keys and (window is None or num_keys <= window) for span in spans
    )
    if is_everything_seen and bias is None:
        return None
    distance_BNS = _distances(spans, num_keys, device)
    hidden_BNS = distance_BNS > 0
    if window is not None:
        hidden_BNS |= distance_BNS <= -window
    if bias is None:
        return _hide(hidden_BNS.unsqueeze(1), dtype)
    first_B = torch.tensor([span.start for span in spans], device=device)
    return bias(first_B, distance_BNS).masked_fill(hidden_BNS.unsqueeze(1), -torch.inf)


def _distances(spans: Sequence[Span], num_keys: int, device: torch.device) -> Tensor:
    """Key position minus query position, [B, N, S], for spans of one length."""
    past_B11 = torch.tensor([span.past for span in spans], device=device).view(-1, 1, 1)
    query_BN1 = past_B11 + torch.arange(spans[0].length, device=device).view(1, -1, 1)
    return torch.arange(num_keys, device=device) - query_BN1


def _hide(hidden: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill_(hidden, -torch.inf)


def _round_up(num_keys: int, granularity: int) -> int:
    return -(-num_keys // granularity) * granularity
