"""From router logits to the slots a token visits and how much each counts.

Routing always happens among a variant's own E slots; where a slot's expert is stored does not matter
here. Knows nothing of experts, pools and layers.

Shapes: T tokens, E slots, K slots per token.
"""

from collections.abc import Callable, Mapping, Sequence
from enum import StrEnum
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from moemerge.models.batch import Span


class Routing(StrEnum):
    """The closed list of routing kinds that a family description may name."""

    SOFTMAX_TOPK_RENORMALISED = "softmax_topk_renormalised"
    SOFTMAX_TOPK_RENORMALISED_GUARDED = "softmax_topk_renormalised_guarded"
    SOFTMAX_TOPK = "softmax_topk"
    TOPK_SOFTMAX = "topk_softmax"
    ONE_EXPERT = "one_expert"
    SPARSEMIXER = "sparsemixer"
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

Layers are counted through all stacks, encoder first.
"""


def softmax_topk_renormalised(logits_TE: Tensor, num_chosen: int) -> Route:
    """Softmax over all slots, the K largest, divided by their sum (Mixtral, Qwen3-MoE)."""
    slots_TK, gates_TK = softmax_topk(logits_TE, num_chosen)
    return Route(slots_TK, gates_TK / gates_TK.sum(dim=-1, keepdim=True))


def softmax_topk_renormalised_guarded(logits_TE: Tensor, num_chosen: int) -> Route:
    """The same, divided by their sum and a little more (TeleChat2-39B-A12B)."""
    slots_TK, gates_TK = softmax_topk(logits_TE, num_chosen)
    return Route(slots_TK, gates_TK / (gates_TK.sum(dim=-1, keepdim=True) + 1e-9))


def softmax_topk(logits_TE: Tensor, num_chosen: int) -> Route:
    """Softmax over all slots, the K largest as they are (Qwen2-MoE, OLMoE)."""
    probabilities_TE = functional.softmax(logits_TE, dim=-1, dtype=torch.float32)
    gates_TK, slots_TK = probabilities_TE.topk(num_chosen, dim=-1)
    return Route(slots_TK, gates_TK)


def topk_softmax(logits_TE: Tensor, num_chosen: int) -> Route:
    """The K largest logits, softmax over those (gpt-oss, Granite)."""
    logits_TK, slots_TK = logits_TE.topk(num_chosen, dim=-1)
    return Route(slots_TK, functional.softmax(logits_TK, dim=-1, dtype=torch.float32))


def sparsemixer(logits_TE: Tensor, num_chosen: int, threshold: float) -> Route:
    """K times the best slot that is left, weighed against those that score nearly as much (Phi-3.5-MoE).

    Slots count while their distance from the best, relative to the larger of the best score and their own
    absolute one, is at most twice the threshold. Gates are near 1 each.

    Source: Liu et al. 2024 (arXiv:2409.12136), as transformers 5.23 `sparsemixer` computes it.
    """
    left_TE, slots, gates = logits_TE, [], []
    for _ in range(num_chosen):
        best_T1, slot_T1 = left_TE.max(dim=-1, keepdim=True)
        distance_TE = (best_T1 - logits_TE) / logits_TE.abs().clamp(min=best_T1)
        near_TE = left_TE.masked_fill(distance_TE > 2 * threshold, -torch.inf)
        gates.append(functional.softmax(near_TE, dim=-1).gather(-1, slot_T1))
        slots.append(slot_T1)
        left_TE = left_TE.scatter(-1, slot_T1, -torch.inf)
    return Route(torch.cat(slots, dim=-1), torch.cat(gates, dim=-1).float())


TOKEN_ROUTINGS: Mapping[Routing, Callable[[Tensor, int], Route]] = {
    Routing.SOFTMAX_TOPK_RENORMALISED: softmax_topk_renormalised,
    Routing.SOFTMAX_TOPK_RENORMALISED_GUARDED: softmax_topk_renormalised_guarded,
    Routing.SOFTMAX_TOPK: softmax_topk,
    Routing.TOPK_SOFTMAX: topk_softmax,
}
"""The kinds that look at the router's scores of one token at a time."""


def one_expert(hidden_TD: Tensor) -> Route:
    """Every token goes to the only slot: layers whose feed-forward network is their single expert."""
    shape = len(hidden_TD), 1
    slots_T1 = torch.zeros(shape, dtype=torch.int64, device=hidden_TD.device)
    return Route(slots_T1, torch.ones(shape, device=hidden_TD.device))


def switch_top1(logits_TE: Tensor, dtype: torch.dtype) -> Route:
    """The best slot with its probability.

    Args:
        logits_TE: Float32 router logits.
        dtype: The model's dtype. Probabilities are rounded to it before the best one is taken, which
            decides near ties as the reference does.

    Source: transformers 5.23 `SwitchTransformersTop1Router`.
    """
    probabilities_TE = functional.softmax(logits_TE, dim=-1, dtype=torch.float32).to(dtype)
    slots_T1 = probabilities_TE.argmax(dim=-1, keepdim=True)
    return Route(slots_T1, probabilities_TE.amax(dim=-1, keepdim=True).float())


def drop_over_capacity(route: Route, capacity: int, num_slots: int, spans: Sequence[Span]) -> Route:
    """Gate zero for each token whose slot has served `capacity` earlier tokens of its span.

    Spans never compete, so a batch equals its sequences one at a time.
    """
    if max(span.length for span in spans) <= capacity:
        return route
    slots_T1, gates_T1 = route
    device = slots_T1.device
    chosen_TE = functional.one_hot(slots_T1[:, 0], num_slots)
    until_TE = chosen_TE.cumsum(dim=0)
    start_T = torch.tensor([span.start for span in spans], device=device).repeat_interleave(
        torch.tensor([span.length for span in spans], device=device)
    )
    before_TE = (until_TE - chosen_TE)[start_T]
    place_T1 = (until_TE - before_TE).gather(1, slots_T1)
    return Route(slots_T1, gates_T1.masked_fill(place_T1 > capacity, 0.0))
