"""Which tokens of a flat batch are attended together, and which keys each of them sees.

Tokens that are the only new one of their sequence go together, padded to the longest; whole sequences go
with neighbours of their length; others alone. Planned once per forward pass, masks included. Knows nothing
of weights, of positional embeddings and of how keys are stored.

Shapes: T tokens of the batch, B sequences of a group, N new tokens of each, S keys, H query heads.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

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
    groups = []
    for numbers in _fresh_neighbours(spans):
        length = spans[numbers[0]].length
        if bias is None and (window is None or length <= window):
            groups.append(_group(spans, numbers, length, device, is_causal=length > 1, is_fresh=True))
        else:
            mask = _causal_mask([spans[n] for n in numbers], length, window, device, dtype, bias)
            groups.append(_group(spans, numbers, length, device, mask, is_fresh=True))
    lengths = {number: span.num_keys for number, span in enumerate(spans) if span.past}
    for numbers in _similar_lengths(spans, lengths):
        num_keys = _round_up(max(lengths[number] for number in numbers), granularity)
        mask = _causal_mask([spans[n] for n in numbers], num_keys, window, device, dtype, bias)
        groups.append(_group(spans, numbers, num_keys, device, mask))
    return groups


def plan_two_way_groups(spans: Sequence[Span], device: torch.device, bias: Bias) -> list[Group]:
    """Groups for self-attention in which every token of a span sees all of them."""
    groups = []
    for numbers in _fresh_neighbours(spans):
        chosen = [spans[number] for number in numbers]
        length = chosen[0].length
        mask = bias(_first_tokens(chosen, device), _distances(chosen[:1], length, device))
        groups.append(_group(spans, numbers, length, device, mask, is_fresh=True))
    return groups


def plan_cross_groups(
    spans: Sequence[Span],
    lengths: Sequence[int],
    granularity: int,
    device: torch.device,
    dtype: torch.dtype,
) -> list[Group]:
    """Groups for attention of every token of a span to all `lengths[span]` keys of its sequence."""
    groups = []
    for numbers in _similar_lengths(spans, dict(enumerate(lengths))):
        num_keys = _round_up(max(lengths[number] for number in numbers), granularity)
        mask = _tail_mask([lengths[number] for number in numbers], num_keys, device, dtype)
        groups.append(_group(spans, numbers, num_keys, device, mask))
    return groups


def _group(
    spans: Sequence[Span],
    numbers: Sequence[int],
    num_keys: int,
    device: torch.device,
    mask: Tensor | None = None,
    is_causal: bool = False,
    is_fresh: bool = False,
) -> Group:
    """The group of spans of one length; their tokens are a slice of the batch if they can be."""
    num_new = spans[numbers[0]].length
    starts = [spans[number].start for number in numbers]
    tokens: slice | Tensor = slice(starts[0], starts[-1] + num_new)
    if starts[-1] - starts[0] != (len(starts) - 1) * num_new:
        assert num_new == 1
        tokens = torch.tensor(starts, device=device)
    return Group(tokens, tuple(numbers), num_new, num_keys, mask, is_causal, is_fresh)


def _fresh_neighbours(spans: Sequence[Span]) -> list[list[int]]:
    """Spans without a past, by number; neighbours of one length together."""
    runs: list[list[int]] = []
    for number, span in enumerate(spans):
        if span.past:
            continue
        if runs and runs[-1][-1] == number - 1 and spans[number - 1].length == span.length:
            runs[-1].append(number)
        else:
            runs.append([number])
    return runs


def _similar_lengths(spans: Sequence[Span], num_keys: Mapping[int, int]) -> list[list[int]]:
    """Spans with that many keys, by number; those of a single token together.

    Not if one had less than half the keys of another, so that little is padded, unless both are short.
    """
    runs = [[number] for number in num_keys if spans[number].length > 1]
    singles = [number for number in num_keys if spans[number].length == 1]
    longest = 0
    for number in sorted(singles, key=lambda number: -num_keys[number]):
        if longest == 0 or max(2 * num_keys[number], _SHORT) < longest:
            longest = num_keys[number]
            runs.append([])
        runs[-1].append(number)
    return [sorted(run) for run in runs]


def _causal_mask(
    spans: Sequence[Span],
    num_keys: int,
    window: int | None,
    device: torch.device,
    dtype: torch.dtype,
    bias: Bias | None,
) -> Tensor | None:
    """What is added to the scores of spans of one length; None for nothing."""
    if bias is None and spans[0].length == 1 and (window is None or num_keys <= window):
        return _tail_mask([span.num_keys for span in spans], num_keys, device, dtype)
    distance_BNS = _distances(spans, num_keys, device)
    hidden_BNS = distance_BNS > 0
    if window is not None:
        hidden_BNS |= distance_BNS <= -window
    if bias is None:
        return _hide(hidden_BNS.unsqueeze(1), dtype)
    biased_BHNS = bias(_first_tokens(spans, device), distance_BNS)
    return biased_BHNS.masked_fill(hidden_BNS.unsqueeze(1), -torch.inf)


def _tail_mask(
    lengths: Sequence[int], num_keys: int, device: torch.device, dtype: torch.dtype
) -> Tensor | None:
    """Hides what stands behind each sequence's keys, [B, 1, 1, S]; None when nothing does."""
    if min(lengths) == num_keys:
        return None
    length_B111 = torch.tensor(lengths, device=device).view(-1, 1, 1, 1)
    return _hide(torch.arange(num_keys, device=device) >= length_B111, dtype)


def _first_tokens(spans: Sequence[Span], device: torch.device) -> Tensor:
    return torch.tensor([span.start for span in spans], device=device)


def _distances(spans: Sequence[Span], num_keys: int, device: torch.device) -> Tensor:
    """Key position minus query position, [B, N, S], for spans of one length."""
    past_B11 = torch.tensor([span.past for span in spans], device=device).view(-1, 1, 1)
    query_BN1 = past_B11 + torch.arange(spans[0].length, device=device).view(1, -1, 1)
    return torch.arange(num_keys, device=device) - query_BN1


def _hide(hidden: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill_(hidden, -torch.inf)


def _round_up(num_keys: int, granularity: int) -> int:
    return -(-num_keys // granularity) * granularity
