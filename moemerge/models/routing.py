"""From router logits to the slots a token visits and how much each counts.

Routing always happens among a variant's own E slots; where a slot's expert is stored does not matter
here. Knows nothing of experts, pools and layers.

Shapes: T tokens, E slots, K slots per token; B rows (sequences) of S tokens where capacity counts.
"""

from collections.abc import Callable, Mapping
from enum import StrEnum
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional


class Routing(StrEnum):
    """The closed list of routing kinds that a family description may name."""

    SOFTMAX_TOPK_RENORMALISED = "softmax_topk_renormalised"
    SOFTMAX_TOPK = "softmax_topk"
    TOPK_SOFTMAX = "topk_softmax"
    SWITCH_TOP1 = "switch_top1"


class Route(NamedTuple):
    """Where each token goes.

    Attributes:
        slots_TK: Int64, the chosen slots, best first.
        gates_TK: Float32, the factor of each chosen expert's output. Zero means that the slot was chosen
            and the token dropped: its expert is not computed.
    """

    slots_TK: Tensor
    gates_TK: Tensor


RouteObserver = Callable[[int, Tensor, Route], None]
"""Told the layer index, the experts' input [T, D] and the route, before the experts are computed.

Layers are counted through all stacks, encoder first. T runs over all rows of a batch in order, padding
included.
"""


def softmax_topk_renormalised(logits_TE: Tensor, num_chosen: int) -> Route:
    """Softmax over all slots, the K largest, divided by their sum (Mixtral, Qwen3-MoE)."""
    slots_TK, gates_TK = softmax_topk(logits_TE, num_chosen)
    return Route(slots_TK, gates_TK / gates_TK.sum(dim=-1, keepdim=True))


def softmax_topk(logits_TE: Tensor, num_chosen: int) -> Route:
    """Softmax over all slots, the K largest as they are (Qwen2-MoE, OLMoE)."""
    probabilities_TE = functional.softmax(logits_TE, dim=-1, dtype=torch.float32)
    gates_TK, slots_TK = probabilities_TE.topk(num_chosen, dim=-1)
    return Route(slots_TK, gates_TK)


def topk_softmax(logits_TE: Tensor, num_chosen: int) -> Route:
    """The K largest logits, softmax over those (gpt-oss, Granite)."""
    logits_TK, slots_TK = logits_TE.topk(num_chosen, dim=-1)
    return Route(slots_TK, functional.softmax(logits_TK, dim=-1, dtype=torch.float32))


TOKEN_ROUTINGS: Mapping[Routing, Callable[[Tensor, int], Route]] = {
    Routing.SOFTMAX_TOPK_RENORMALISED: softmax_topk_renormalised,
    Routing.SOFTMAX_TOPK: softmax_topk,
    Routing.TOPK_SOFTMAX: topk_softmax,
}
"""The kinds that look at one token at a time, which is what a decoder-only model may use."""


def switch_top1(logits_BSE: Tensor, capacity: int, dtype: torch.dtype) -> Route:
    """The best slot with its probability, as long as the slot has room.

    Within each row a slot serves its first `capacity` tokens by position, padding included; later ones
    are dropped. Rows never compete, so a batch equals its rows one at a time.

    Args:
        logits_BSE: Float32 router logits.
        capacity: Tokens per slot and row.
        dtype: The model's dtype. Probabilities are rounded to it before the best one is taken, which
            decides near ties as the reference does.

    Returns:
        Route of T = B * S tokens in row order, K = 1.

    Source: transformers 5.23 `SwitchTransformersTop1Router`.
    """
    probabilities_BSE = functional.softmax(logits_BSE, dim=-1, dtype=torch.float32).to(dtype)
    gates_BS = probabilities_BSE.amax(dim=-1)
    slots_BS = probabilities_BSE.argmax(dim=-1)
    chosen_BSE = functional.one_hot(slots_BS, logits_BSE.shape[-1])
    place_BS = chosen_BSE.cumsum(dim=-2).gather(-1, slots_BS.unsqueeze(-1)).squeeze(-1)
    gates_BS = gates_BS.float().masked_fill(place_BS > capacity, 0.0)
    return Route(slots_BS.reshape(-1, 1), gates_BS.reshape(-1, 1))
