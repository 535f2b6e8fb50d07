"""New tokens of several sequences, side by side without padding.

Knows nothing of variants, caches and models. Tokens of one variant stand together, so that each of its
matrices is one product; the order is the caller's business.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor


class Span(NamedTuple):
    """Consecutive new tokens of one sequence.

    Attributes:
        start: The first of them in the batch.
        length: How many there are.
        past: Tokens of the sequence before them, whose keys and values are in the cache.
    """

    start: int
    length: int
    past: int = 0

    @property
    def num_keys(self) -> int:
        """Tokens of the sequence so far, the new ones included."""
        return self.past + self.length


@dataclass(frozen=True, slots=True)
class Batch:
    """What one forward pass takes: token ids, int64 [T], and the spans that cover them in order."""

    token_ids_T: Tensor
    spans: tuple[Span, ...]

    @property
    def positions_T(self) -> Tensor:
        """Position of each token in its sequence, int64."""
        positions = chain.from_iterable(range(span.past, span.num_keys) for span in self.spans)
        return torch.tensor(list(positions), device=self.token_ids_T.device)


def build_batch(
    sequences: Sequence[Sequence[int]],
    past: Sequence[int] | None = None,
    device: torch.device | str = "cpu",
) -> Batch:
    """The new token ids of each sequence, after as many tokens as `past` says (none by default)."""
    spans, start = [], 0
    for token_ids, before in zip(sequences, past or [0] * len(sequences), strict=True):
        spans.append(Span(start, len(token_ids), before))
        start += len(token_ids)
    return Batch(torch.tensor(list(chain.from_iterable(sequences)), device=device), tuple(spans))
