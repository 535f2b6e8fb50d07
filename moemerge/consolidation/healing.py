"""Healing: a few steps of distillation of the tensors that repair may change, with a bundle's experts fixed.

What is to be matched is every prediction of the variant as it was, on its own passages. Experts are read when
a step needs them, forwards and backwards, one at a time.

Shapes: T tokens, D model width, C tokens routed to a slot, Vo vocabulary.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import count
from typing import cast

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint as recomputed

from moemerge.bundle.reader import Bundle
from moemerge.calibration.lanes import divergence, head_of, log_probabilities
from moemerge.calibration.passes import (
    LOGIT_ENTRIES,
    NO_LABEL,
    CalibrationOptions,
    cut_passes,
    hidden_states,
    labels_of,
    pass_tokens,
)
from moemerge.calibration.streaming import Source, StreamedWeights
from moemerge.calibration.texts import Passage
from moemerge.checkpoint.checkpoint import Checkpoint
from moemerge.checkpoint.tensors import TensorReader
from moemerge.consolidation.prefix import ChangedSource, open_lanes
from moemerge.consolidation.repair import is_repaired
from moemerge.models import Decoder, EncoderDecoder, PlainPoolLayer, Route, build_model
from moemerge.progress import Progress, Silent

_STEP_TOKENS = 2048
_RATE = 0.026
"""Of a step, over the root mean square of a tensor's entries and the root of the divergence at the start.

A divergence grows with the square of a change: where little is to be healed, long steps do harm.
"""
_SEED = 0


class SteppedExperts:
    """`Experts` through which gradients flow to their inputs; every expert is read again for the way back."""

    def __init__(self, source: Source, model: Decoder | EncoderDecoder) -> None:
        self._source = source
        self._activation = model.config.activation

    def product(self, layer_index: int, hidden_TD: Tensor, route: Route) -> Tensor:
        """See `Experts.product`."""
        output_TD = torch.zeros_like(hidden_TD)
        for slot in range(self._source.checkpoint.num_experts):
            chosen_TK = (route.slots_TK == slot) & (route.gates_TK != 0)
            token_C, choice_C = chosen_TK.nonzero(as_tuple=True)
            if len(token_C):
                found = recomputed(self._output, layer_index, slot, hidden_TD[token_C], use_reentrant=False)
                gates_C1 = route.gates_TK[token_C, choice_C].unsqueeze(1)
                output_TD = output_TD.index_add(0, token_C, cast(Tensor, found) * gates_C1)
        return output_TD

    def _output(self, layer_index: int, slot: int, inputs_CD: Tensor) -> Tensor:
        expert = PlainPoolLayer([self._source.expert(layer_index, slot)], self._activation)
        return expert.output(0, inputs_CD)


def heal_variant(
    checkpoint: Checkpoint,
    bundle: Bundle,
    variant: str,
    passages: Sequence[Passage],
    num_steps: int,
    start: Mapping[str, Tensor],
    options: CalibrationOptions | None = None,
    progress: Progress | None = None,
) -> dict[str, Tensor]:
    """Distil a variant into what a bundle has of it.

    Args:
        checkpoint: The variant as it was, local.
        bundle: Published, or being written with pools and residuals in place.
        variant: Its name there.
        passages: In its own tokens; used in a seeded order.
        num_steps: Of Adam, each on about `_STEP_TOKENS` tokens.
        start: Tensors by role that repair has changed.
        options: Memory and dtype; non-expert tensors are held in memory, those that are changed four times.
        progress: Told of the bytes of weights whose work is done.

    Returns:
        By role, in their stored dtype, all tensors that repair may change.

    Raises:
        NotEnoughRoom: A step does not fit into memory.
        DamagedInput: A weight is not finite, or a file changed.
    """
    options = options or CalibrationOptions()
    # What lies between the layers is kept for the way back.
    copies = len(checkpoint.family.stacks) + _num_layers(checkpoint)
    limit = min(_STEP_TOKENS, pass_tokens(checkpoint, passages, options, copies=copies))
    first = 0.0
    report = progress or Silent()
    report.start(f"healing {variant}", num_steps * (checkpoint.expert_bytes + checkpoint.other_bytes))
    model = build_model(checkpoint.family.arithmetic, checkpoint.settings)
    with TensorReader() as reader:
        own, shared = open_lanes(checkpoint, bundle, variant, reader, options)
        roles = [role for role in checkpoint.tensors if is_repaired(role)]
        before = {role: start[role] if role in start else own.source.stored(role) for role in roles}
        trained = {role: tensor.float().requires_grad_() for role, tensor in before.items()}
        steps = torch.optim.Adam(
            [{"params": [tensor], "size": _size(tensor)} for tensor in trained.values()], betas=(0.9, 0.99)
        )
        source = ChangedSource(shared.source, trained)
        weights, experts = StreamedWeights(source), SteppedExperts(source, model)
        for number, part in zip(range(num_steps), _batches(passages, limit), strict=False):
            with torch.no_grad():
                wanted_TD = hidden_states(model, part, StreamedWeights(own.source), own.experts)
            steps.zero_grad()
            found_TD = hidden_states(model, part, weights, experts)
            loss = _descend(model, part, wanted_TD, found_TD, own.source, source)
            first = loss if number == 0 else first
            for group in steps.param_groups:
                group["lr"] = _RATE * math.sqrt(first) * group["size"] * (1 - number / num_steps)
            steps.step()
            report.advance(checkpoint.expert_bytes + checkpoint.other_bytes)
    return {role: tensor.detach().to(before[role].dtype) for role, tensor in trained.items()}


def _descend(
    model: Decoder | EncoderDecoder,
    passages: Sequence[Passage],
    wanted_TD: Tensor,
    found_TD: Tensor,
    own: Source,
    source: Source,
) -> float:
    """Add the gradients of the mean divergence, which is returned; logits are made a few tokens at a time."""
    label_T = torch.tensor([label for labels in labels_of(model, passages) for label in labels])
    kept = label_T != NO_LABEL
    heads = head_of(own, wanted_TD.dtype), head_of(source, found_TD.dtype)
    rows = max(1, LOGIT_ENTRIES // (4 * heads[0].tensors["head"].shape[0]))
    leaf_TD = found_TD.detach().requires_grad_()
    num_predicted = int(kept.sum())
    total = 0.0
    for wanted, found in zip(
        torch.split(wanted_TD[kept], rows), torch.split(leaf_TD[kept], rows), strict=True
    ):
        with torch.no_grad():
            target = log_probabilities(model, wanted, heads[0])
        loss = divergence(target, log_probabilities(model, found, heads[1])).sum() / num_predicted
        torch.autograd.backward(loss, retain_graph=True)
        total += float(loss.detach())
    assert leaf_TD.grad is not None
    torch.autograd.backward(found_TD, leaf_TD.grad)
    return total


def _batches(passages: Sequence[Passage], num_tokens: int) -> Iterator[list[Passage]]:
    """Passages in a seeded order, as many as fit, again and again."""
    generator = torch.Generator().manual_seed(_SEED)
    for _ in count():
        order = torch.randperm(len(passages), generator=generator).tolist()
        mixed = [passages[number] for number in order]
        for first, last in cut_passes(mixed, num_tokens):
            yield mixed[first:last]


def _size(tensor: Tensor) -> float:
    """Root mean square of the entries."""
    return float(tensor.detach().square().mean().sqrt())


def _num_layers(checkpoint: Checkpoint) -> int:
    return sum(int(checkpoint.settings[stack.layers] or 0) for stack in checkpoint.family.stacks)
