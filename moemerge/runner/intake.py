"""What a request may hold, and the sequence that it becomes."""

import itertools
import time
from dataclasses import dataclass

from moemerge.bundle.reader import Bundle
from moemerge.errors import InvalidRecipe, NotFound
from moemerge.models import Decoder
from moemerge.runner.blocks import BlockPool, BlockTable, Owner
from moemerge.runner.forward import model_of
from moemerge.runner.request import Request
from moemerge.runner.sampling import Sampler
from moemerge.runner.sequence import Sequence


@dataclass(frozen=True, slots=True)
class VariantLimits:
    """What a request to a variant may hold.

    Attributes:
        vocab_size: Token ids are below it.
        context_tokens: Prompt and answer together; of an encoder-decoder each of the two.
        cached_blocks: Of the key/value cache; None in a decoder-only model, whose context fits.
        block_tokens: Of each of them.
    """

    vocab_size: int
    context_tokens: int
    cached_blocks: int | None = None
    block_tokens: int = 1

    def room(self, num_prompt_tokens: int) -> int:
        """Tokens that context and cache leave for the answer to a prompt; 0 for one that is too long."""
        left = max(0, self.context_tokens - num_prompt_tokens)
        if self.cached_blocks is None or not left:
            return left
        # Blocks hold tokens of the source or of the answer, which a start token precedes.
        blocks = self.cached_blocks - -(-num_prompt_tokens // self.block_tokens)
        return max(0, min(self.context_tokens, blocks * self.block_tokens - 1))


def check_request(request: Request, limits: VariantLimits) -> None:
    """What of a request depends on its variant.

    Raises:
        InvalidRecipe: Token ids beyond the vocabulary, a prompt that leaves no room for an answer, or not for
            one that long.
    """
    unknown = next((i for i in request.sampling.logit_bias if i >= limits.vocab_size), None)
    if unknown is not None:
        raise InvalidRecipe(
            f"logit_bias has token id {unknown}, expected ids from 0 to {limits.vocab_size - 1}"
        )
    if max(request.prompt_ids) >= limits.vocab_size:
        raise InvalidRecipe(f"the prompt has token ids outside 0 to {limits.vocab_size - 1}")
    room = limits.room(len(request.prompt_ids))
    if room == 0:
        raise InvalidRecipe(
            f"the prompt has {len(request.prompt_ids)} tokens, which leave no room for an answer in a "
            f"context of {limits.context_tokens}"
        )
    if request.max_tokens > room:
        raise InvalidRecipe(
            f"max_tokens is {request.max_tokens}, expected at most {room}: prompt and answer must fit in "
            f"{limits.context_tokens} tokens of context and cache, the prompt has {len(request.prompt_ids)}"
        )


def max_positions(bundle: Bundle, variant: str) -> int | None:
    """Context that a variant was made for; None when its positions are not bounded."""
    value = bundle.variant(variant).settings.get("max_positions")
    return None if value is None else int(value)


class Intake:
    """The variants that are served, and how requests to them begin."""

    def __init__(self, bundle: Bundle, blocks: BlockPool) -> None:
        self.limits: dict[str, VariantLimits] = {}
        self._bundle = bundle
        self._blocks = blocks
        self._is_decoder = isinstance(model_of(bundle, next(iter(bundle.manifest.variants))), Decoder)
        self._revisions: dict[str, int] = {}
        self._numbers = itertools.count()

    def open(self, variant: str) -> None:
        """Requests to a variant are taken from now on."""
        cached = self._blocks.num_blocks * self._blocks.block_tokens
        context = max_positions(self._bundle, variant)
        vocab_size = int(self._bundle.variant(variant).settings["vocab_size"] or 0)
        self.limits[variant] = VariantLimits(
            vocab_size,
            context_tokens=cached if context is None else min(context, cached),
            cached_blocks=None if self._is_decoder else self._blocks.num_blocks,
            block_tokens=self._blocks.block_tokens,
        )
        self._revisions[variant] = self._revisions.get(variant, -1) + 1

    def close(self, variant: str) -> None:
        """Requests to a variant are taken no more."""
        del self.limits[variant]

    def limits_of(self, variant: str) -> VariantLimits:
        """What a request to a variant may hold.

        Raises:
            NotFound: The variant is not served.
        """
        if variant not in self.limits:
            raise NotFound(f"no variant {variant!r} is served; there are {', '.join(self.limits)}")
        return self.limits[variant]

    def begin(self, request: Request) -> Sequence:
        """The sequence of a request.

        Raises:
            NotFound: The variant is not served.
            InvalidRecipe: As `check_request`, or its log-probabilities cannot be had.
        """
        limits = self.limits_of(request.variant)
        check_request(request, limits)
        if request.num_prompt_logprobs is not None and not self._is_decoder:
            raise InvalidRecipe("log-probabilities of the prompt are for decoder-only models")
        owner = Owner(str(self._bundle.folder), request.variant, self._revisions[request.variant])
        tokens = list(request.prompt_ids) if self._is_decoder else [self._start_token(request.variant)]
        now_s = time.perf_counter()
        return Sequence(
            number=next(self._numbers),
            request=request,
            arrival_s=now_s if request.arrival_s is None else request.arrival_s,
            source_ids=() if self._is_decoder else request.prompt_ids,
            tokens=tokens,
            num_prompt=len(tokens),
            table=BlockTable(owner),
            cross_table=BlockTable(owner),
            sampler=Sampler(
                request.sampling,
                request.prompt_ids,
                stop_ids=frozenset() if request.ignore_stop else request.stop_ids,
                min_tokens=request.min_tokens,
            ),
            queued_s=now_s,
            is_encoded=self._is_decoder,
        )

    def _start_token(self, variant: str) -> int:
        return int(self._bundle.variant(variant).settings["start_token_id"] or 0)
