"""Softmax attention of a flat batch, group by group. Knows nothing of weights and of how keys are stored.

Shapes: T tokens of the batch, B sequences of a group, N new tokens of each, S keys, H query heads, G
key/value heads, h head width, of values perhaps another one than of queries and keys.
"""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from moemerge.models.groups import Group


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


def attend(
    groups: Sequence[Group],
    layer_index: int,
    query_THh: Tensor,
    key_TGh: Tensor | None,
    value_TGh: Tensor | None,
    keys: KeyValues | None,
    scale: float,
    sinks_TH: Tensor | None = None,
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
        sinks_TH: One more score of each query, of a key whose value is nothing.

    Returns:
        [T, H*h], h the width of values.
    """
    if keys is not None and key_TGh is not None and value_TGh is not None:
        keys.write(layer_index, key_TGh, value_TGh)
    if len(groups) == 1:
        return _attend(groups[0], layer_index, query_THh, key_TGh, value_TGh, keys, scale, sinks_TH)
    mixed = [
        _attend(group, layer_index, query_THh, key_TGh, value_TGh, keys, scale, sinks_TH) for group in groups
    ]
    mixed_TD = query_THh.new_empty(query_THh.shape[0], mixed[0].shape[1])
    for group, mixed_of_group in zip(groups, mixed, strict=True):
        mixed_TD[group.tokens] = mixed_of_group
    return mixed_TD


def _attend(
    group: Group,
    layer_index: int,
    query_THh: Tensor,
    key_TGh: Tensor | None,
    value_TGh: Tensor | None,
    keys: KeyValues | None,
    scale: float,
    sinks_TH: Tensor | None,
) -> Tensor:
    """Attention of the tokens of one group, [B*N, H*h]."""
    batch_size, num_new = len(group.sequences), group.num_new
    num_heads, head_size = query_THh.shape[1:]
    if group.is_fresh:
        assert key_TGh is not None
        assert value_TGh is not None
        shape = batch_size, num_new
        key_BGSh = key_TGh[group.tokens].view(*shape, *key_TGh.shape[1:]).transpose(1, 2)
        value_BGSh = value_TGh[group.tokens].view(*shape, *value_TGh.shape[1:]).transpose(1, 2)
    else:
        assert keys is not None, "earlier tokens are attended to, and no cache was given"
        key_BGSh, value_BGSh = keys.read(layer_index, group)
    query = query_THh[group.tokens]
    if sinks_TH is not None:
        query = query.view(batch_size, num_new, num_heads, head_size).transpose(1, 2)
        sinks = sinks_TH[group.tokens].view(batch_size, num_new, num_heads).transpose(1, 2)
        output = _attend_with_sinks(query, key_BGSh, value_BGSh, group, scale, sinks)
        return output.transpose(1, 2).reshape(batch_size * num_new, -1)
    if num_new == 1:
        # Query heads of one key/value head lie along the query axis, so that the keys are read as they
        # are: torch's grouped path took 2.3 ms where this takes 0.2 ms (CPU, one thread, bf16, H 32, G 8,
        # h 64, S 512).
        query = query.view(batch_size, key_BGSh.shape[1], -1, head_size)
    else:
        query = query.view(batch_size, num_new, num_heads, head_size).transpose(1, 2)
    output = functional.scaled_dot_product_attention(
        query,
        key_BGSh,
        value_BGSh,
        attn_mask=group.mask,
        is_causal=group.is_causal,
        scale=scale,
        enable_gqa=query.shape[1] != key_BGSh.shape[1],
    )
    if num_new > 1:
        output = output.transpose(1, 2)
    return output.reshape(batch_size * num_new, -1)


def _attend_with_sinks(
    query_BHNh: Tensor, key_BGSh: Tensor, value_BGSh: Tensor, group: Group, scale: float, sinks_BHN: Tensor
) -> Tensor:
    """Attention written out, since torch's own has no place for sinks; softmax in float32."""
    repeats = query_BHNh.shape[1] // key_BGSh.shape[1]
    key_BHSh, value_BHSh = (t.repeat_interleave(repeats, dim=1) for t in (key_BGSh, value_BGSh))
    scores_BHNS = (query_BHNh @ key_BHSh.transpose(2, 3)).float() * scale
    if group.mask is not None:
        scores_BHNS = scores_BHNS + group.mask
    if group.is_causal:
        hidden_NS = torch.ones(scores_BHNS.shape[2:], dtype=torch.bool, device=scores_BHNS.device).triu(1)
        scores_BHNS = scores_BHNS.masked_fill(hidden_NS, -torch.inf)
    shares = torch.cat((scores_BHNS, sinks_BHN.unsqueeze(-1).float()), dim=-1).softmax(dim=-1)
    return shares[..., :-1].to(value_BHSh.dtype) @ value_BHSh
