"""One step's tokens through the model: batches are put together here, and logits come out.

Tokens lie side by side, sorted by variant, so that each variant's are consecutive. Variants whose settings
change the arithmetic (another rotary base, another number of experts per token) go through a pass of their
own; all others share one.

Shapes: T tokens, W tokens whose logits are wanted, Vo vocabulary of a variant, E slots, V variants.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor

from moemerge.bundle.reader import Bundle
from moemerge.models import (
    Decoder,
    EncoderDecoder,
    Experts,
    MappedExperts,
    MixedVariants,
    OneVariant,
    Span,
    StandAlone,
    Weights,
    build_batch,
    build_model,
)
from moemerge.runner.blocks import BlockTable
from moemerge.runner.cache import BlockCache, BlockKeys
from moemerge.runner.cached_pool import CachedExpertPool
from moemerge.runner.pool import ExpertPool
from moemerge.runner.rows import VariantResiduals
from moemerge.runner.scheduler import Work
from moemerge.runner.sequence import Sequence as Running

Model = Decoder | EncoderDecoder


class Wanted(NamedTuple):
    """Which rows of its variant's logits are a sequence's, from `start` to before `stop`."""

    sequence: Running
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class VariantLogits:
    """Logits [W, Vo] of the tokens of one variant that somebody asked for."""

    logits_WV: Tensor
    wanted: tuple[Wanted, ...]


class Forward:
    """The models of a bundle's variants over one pool and one cache."""

    def __init__(
        self, bundle: Bundle, pool: ExpertPool | CachedExpertPool, cache: BlockCache, device: torch.device
    ) -> None:
        self._bundle = bundle
        self._pool = pool
        self._cache = cache
        self._device = device
        self._models: dict[str, Model] = {}
        self._shared_models: dict[object, Model] = {}
        self._weights: dict[str, dict[str, Tensor]] = {}
        self._numbers = {name: number for number, name in enumerate(bundle.manifest.variants)}
        self._maps = {
            layer.index: torch.tensor(pool.rows.maps(layer.index), device=device)
            for layer in bundle.manifest.layers
        }

    def model(self, variant: str) -> Model:
        """A variant's model; variants of one arithmetic share it.

        Raises:
            UnsupportedCheckpoint: Settings that no model here implements.
        """
        if variant not in self._models:
            model = model_of(self._bundle, variant)
            self._models[variant] = self._shared_models.setdefault(_arithmetic_of(model), model)
        return self._models[variant]

    def install(self, variant: str, weights: dict[str, Tensor], residuals: VariantResiduals) -> None:
        """The variant's tensors are in device memory now."""
        self._weights[variant] = weights
        self._pool.rows.install(variant, residuals)

    def uninstall(self, variant: str) -> None:
        """They are no more."""
        del self._weights[variant]
        self._pool.rows.uninstall(variant)

    @torch.inference_mode()
    def compute(self, work: Iterable[Work]) -> list[VariantLogits]:
        """Compute a step; logits of each sequence's last token, where nothing of it is pending after it.

        Those who asked for the prompt's log-probabilities get the logits of all their tokens.
        """
        ordered = sorted(work, key=lambda item: self._numbers[item.sequence.variant])
        passes: dict[int, list[Work]] = {}
        for item in ordered:
            passes.setdefault(id(self.model(item.sequence.variant)), []).append(item)
        return [logits for items in passes.values() for logits in self._pass(items)]

    @torch.inference_mode()
    def logits_alone(self, variant: str, token_ids_BT: Tensor) -> Tensor:
        """Logits [B, T, Vo] of rows of a decoder-only variant, without a cache."""
        return self.stand_alone(variant).forward(token_ids_BT.to(self._device))

    def stand_alone(self, variant: str) -> StandAlone:
        """An installed variant by itself, with a model of its own."""
        weights, experts = self._view([(variant, 0)])
        return StandAlone(model_of(self._bundle, variant), weights, experts)

    def _pass(self, items: list[Work]) -> list[VariantLogits]:
        model = self.model(items[0].sequence.variant)
        if isinstance(model, EncoderDecoder):
            self._encode(model, [item.sequence for item in items if item.encode])
        sequences = [item.sequence for item in items]
        lengths = [item.num_tokens for item in items]
        batch = build_batch(
            [s.tokens[s.num_computed : s.num_computed + n] for s, n in zip(sequences, lengths, strict=True)],
            [s.num_computed for s in sequences],
            self._device,
        )
        weights, experts = self._view(_runs(sequences, lengths))
        keys = self._keys([s.table for s in sequences], [s.num_computed for s in sequences], lengths)
        if isinstance(model, Decoder):
            hidden_TD = model.forward(batch, weights, experts, keys)
        else:
            num_source = [len(s.source_ids) for s in sequences]
            cross = self._keys([s.cross_table for s in sequences], num_source, [0] * len(sequences))
            hidden_TD = model.decode(
                batch, weights, experts, keys, cross, cross_lengths=num_source, limit_capacity=False
            )
        return self._logits(model, hidden_TD, items, batch.spans)

    def _encode(self, model: EncoderDecoder, sequences: list[Running]) -> None:
        if not sequences:
            return
        lengths = [len(s.source_ids) for s in sequences]
        batch = build_batch([s.source_ids for s in sequences], device=self._device)
        weights, experts = self._view(_runs(sequences, lengths))
        encoded_TD = model.encode(batch, weights, experts)
        cross = self._keys([s.cross_table for s in sequences], [0] * len(sequences), lengths)
        for layer_index in range(model.config.num_decoder_layers):
            cross.write(layer_index, *model.cross_keys_and_values(layer_index, encoded_TD, weights))

    def _logits(
        self, model: Model, hidden_TD: Tensor, items: list[Work], spans: tuple[Span, ...]
    ) -> list[VariantLogits]:
        result = []
        for variant, group in groupby(zip(items, spans, strict=True), lambda p: p[0].sequence.variant):
            rows: list[int] = []
            wanted = []
            for item, span in group:
                tokens = _wanted_tokens(item, span)
                if tokens:
                    wanted.append(Wanted(item.sequence, len(rows), len(rows) + len(tokens)))
                    rows += tokens
            if rows:
                chosen_WD = hidden_TD if len(rows) == len(hidden_TD) else hidden_TD[rows]
                logits_WV = model.logits(chosen_WD, OneVariant(self._weights[variant]))
                result.append(VariantLogits(logits_WV, tuple(wanted)))
        return result

    def _view(self, runs: list[tuple[str, int]]) -> tuple[Weights, Experts]:
        """Non-expert tensors and experts as the tokens of these runs see them."""
        if len(runs) == 1:
            variant = runs[0][0]
            experts = MappedExperts(self._pool.layers, self._maps, self._numbers[variant])
            return OneVariant(self._weights[variant]), experts
        owners = torch.tensor([self._numbers[variant] for variant, _ in runs], device=self._device)
        counts = torch.tensor([count for _, count in runs], device=self._device)
        experts = MappedExperts(self._pool.layers, self._maps, owners.repeat_interleave(counts))
        return MixedVariants([(count, self._weights[variant]) for variant, count in runs]), experts

    def _keys(self, tables: list[BlockTable], starts: list[int], lengths: list[int]) -> BlockKeys:
        return BlockKeys(self._cache, tables, starts, lengths)


def model_of(bundle: Bundle, variant: str) -> Model:
    """A variant's model, without tensors.

    Raises:
        UnsupportedCheckpoint: Settings that no model here implements.
    """
    return build_model(bundle.family.arithmetic, bundle.variant(variant).settings)


def _arithmetic_of(model: Model) -> object:
    """What must agree for tokens to share a pass: all settings but those that only callers read."""
    if isinstance(model, Decoder):
        return replace(model.config, vocab_size=1, max_positions=1)
    return replace(model.config, vocab_size=1, start_token_id=0, pad_token_id=0)


def _runs(sequences: list[Running], lengths: list[int]) -> list[tuple[str, int]]:
    """Variants in order with how many consecutive tokens each has."""
    runs: list[tuple[str, int]] = []
    for sequence, length in zip(sequences, lengths, strict=True):
        if runs and runs[-1][0] == sequence.variant:
            runs[-1] = (sequence.variant, runs[-1][1] + length)
        else:
            runs.append((sequence.variant, length))
    return runs


def _wanted_tokens(item: Work, span: Span) -> range:
    """The tokens of the span whose logits somebody asked for."""
    end = span.start + span.length
    if item.sequence.request.num_prompt_logprobs is not None and not item.sequence.num_answered:
        return range(span.start, end)
    return range(end - 1, end) if item.num_tokens == item.sequence.num_pending else range(0)
