"""Perplexity of a decoder-only model on text, in windows of tokens."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional

TextLogits = Callable[[Tensor], Tensor]
"""From token ids [B, T] to the logits [B, T, Vo] of what follows each, as `StandAlone.forward`."""

_BATCH = 8


def mean_nll(logits_of: TextLogits, windows: Sequence[Sequence[int]]) -> float:
    """Mean negative log-likelihood in nats of every token but each window's first."""
    total, count = 0.0, 0
    for start in range(0, len(windows), _BATCH):
        token_ids_BT = torch.tensor([list(window) for window in windows[start : start + _BATCH]])
        logits_BTV = logits_of(token_ids_BT)[:, :-1].float()
        targets_BT = token_ids_BT[:, 1:]
        total += float(
            functional.cross_entropy(logits_BTV.flatten(0, 1), targets_BT.flatten(), reduction="sum")
        )
        count += targets_BT.numel()
    return total / count


def perplexity(nll: float) -> float:
    """Perplexity of a mean negative log-likelihood in nats."""
    return math.exp(nll)


def gain_recovered(base_nll: float, variant_nll: float, bundle_nll: float) -> float | None:
    """Share of what fine-tuning gained that is left; None when fine-tuning gained nothing.

    `(base - bundle) / (base - variant)`; 1 is lossless.
    """
    gained = base_nll - variant_nll
    return (base_nll - bundle_nll) / gained if gained > 0 else None
