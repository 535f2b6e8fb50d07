"""Choosing the next tokens from logits: penalties, temperature, truncation, and log-probabilities.

Semantics are vLLM's: `logit_bias` comes first, then penalties, the repetition penalty over prompt and answer,
presence and frequency penalties over the answer; then temperature, `min_p`, `top_k` and `top_p`.
Log-probabilities are the model's own, before any of that. Two differences: `top_k` keeps exactly k tokens,
of equally likely ones those with the smallest ids, and the random number of a position comes from the
seed and that position alone, so that neither the batch nor a preemption changes an answer. Knows nothing
of models and requests.
"""

import math
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from moemerge.errors import InvalidRecipe

_LARGEST_NUMBER = sys.float_info.max


class TokenLogprob(NamedTuple):
    """How likely the model found a token.

    Attributes:
        token_id: The token that is there.
        logprob: Natural logarithm of its probability.
        top: Ids and log-probabilities of the likeliest tokens, best first, as many as asked for.
    """

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How tokens are chosen.

    Attributes:
        temperature: 0 takes the likeliest token, 1 samples from the model's distribution.
        top_k: Only the k likeliest tokens; 0 for all.
        top_p: Only the likeliest tokens that together reach this probability.
        min_p: Only tokens at least this fraction as likely as the likeliest.
        repetition_penalty: Above 1 discourages tokens of the prompt and of the answer.
        presence_penalty: Taken from the logits of tokens that the answer has.
        frequency_penalty: The same, times how often it has them.
        seed: Of the random choices; None for other ones each time.
        logit_bias: Added to the logits of these token ids.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    logit_bias: Mapping[int, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _require("temperature", self.temperature, 0, _LARGEST_NUMBER)
        _require_whole("top_k", self.top_k, 2**31 - 1)
        _require("top_p", self.top_p, 0, 1, above=True)
        _require("min_p", self.min_p, 0, 1)
        _require("repetition_penalty", self.repetition_penalty, 0, _LARGEST_NUMBER, above=True)
        _require("presence_penalty", self.presence_penalty, -2, 2)
        _require("frequency_penalty", self.frequency_penalty, -2, 2)
        if self.seed is not None:
            _require_whole("seed", self.seed, 2**63 - 1)
        if not isinstance(self.logit_bias, Mapping):
            raise InvalidRecipe(f"logit_bias is {self.logit_bias!r}, expected token ids and numbers")
        for token_id, bias in self.logit_bias.items():
            _require_whole("a token id of logit_bias", token_id, 2**31 - 1)
            _require(f"logit_bias of token {token_id}", bias, -100, 100)

    @property
    def has_penalties(self) -> bool:
        """Whether earlier tokens change what is likely."""
        penalties = (self.repetition_penalty - 1, self.presence_penalty, self.frequency_penalty)
        return any(penalties)


def _require(name: str, value: float, low: float, high: float, *, above: bool = False) -> None:
    """A number from `low` (not included when `above`) to `high`."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    # Not true of NaN.
    if is_number and low <= value <= high and not (above and value == low):
        return
    expected = f"a number {'above' if above else 'of at least'} {low}"
    upper = "" if high == _LARGEST_NUMBER else f" and at most {high}"
    raise InvalidRecipe(f"{name} is {value!r}, expected {expected}{upper}")


def _require_whole(name: str, value: object, high: int) -> None:
    if type(value) is not int or not 0 <= value <= high:
        raise InvalidRecipe(f"{name} is {value!r}, expected a whole number from 0 to {high}")


@dataclass(frozen=True, slots=True)
class Chosen:
    """The next token of a sequence.

    Attributes:
        token_id: The token; without meaning when there is an error.
        logprob: How likely the model found it, when asked for.
        error: Why no token can be chosen: the model's numbers are not finite.
    """

    token_id: int
    logprob: TokenLogprob | None = None
    error: str | None = None


class Sampler:
    """Chooses the tokens of one answer and remembers what its penalties need.

    Keep it with the sequence when that is preempted; `accept` each token once.
    """

    def __init__(
        self,
        sampling: Sampling,
        prompt_ids: Sequence[int] = (),
        *,
        stop_ids: frozenset[int] = frozenset(),
        min_tokens: int = 0,
    ) -> None:
        """Start an answer.

        Args:
            sampling: How tokens are chosen.
            prompt_ids: What the repetition penalty counts besides the answer.
            stop_ids: Not chosen before the answer has `min_tokens` tokens.
            min_tokens: See `stop_ids`.
        """
        self.sampling = sampling
        self._seed = torch.Generator().seed() if sampling.seed is None else sampling.seed
        self._position = 0
        self._prompt = frozenset(prompt_ids) if sampling.repetition_penalty != 1 else frozenset()
        self._answer: Counter[int] = Counter()
        self._stop_ids, self._min_tokens = stop_ids, min_tokens

    @property
    def takes_likeliest(self) -> bool:
        """Whether the next token is simply the likeliest."""
        sampling = self.sampling
        return not (
            sampling.temperature or sampling.has_penalties or sampling.logit_bias or self._forbids_stop
        )

    def accept(self, token_id: int) -> None:
        """The answer has one token more."""
        self._position += 1
        if self.sampling.has_penalties:
            self._answer[token_id] += 1

    def choose(self, logits_V: Tensor) -> int | None:
        """The token at the current position; None when the logits leave none."""
        scores_V = self._adjust(logits_V.detach().to("cpu", torch.float64, copy=True))
        best, token_id = scores_V.max(dim=-1)
        if not math.isfinite(best):
            return None
        if not self.sampling.temperature:
            return int(token_id)
        return _draw(scores_V - best, self.sampling, self._random_number())

    @property
    def _forbids_stop(self) -> bool:
        return bool(self._stop_ids) and self._position < self._min_tokens

    def _adjust(self, scores_V: Tensor) -> Tensor:
        """Penalties and biases, in place."""
        sampling = self.sampling
        if sampling.logit_bias:
            biased = _indices(sampling.logit_bias, scores_V)
            biases = [sampling.logit_bias[token_id] for token_id in biased.tolist()]
            scores_V[biased] += torch.tensor(biases, dtype=scores_V.dtype)
        if sampling.has_penalties:
            seen = _indices(self._prompt | self._answer.keys(), scores_V)
            repetition = sampling.repetition_penalty
            values = scores_V[seen]
            scores_V[seen] = torch.where(values > 0, values / repetition, values * repetition)
            answered = _indices(self._answer, scores_V)
            counts = torch.tensor([self._answer[i] for i in answered.tolist()], dtype=scores_V.dtype)
            scores_V[answered] -= sampling.frequency_penalty * counts + sampling.presence_penalty
        if self._forbids_stop:
            scores_V[_indices(self._stop_ids, scores_V)] = -math.inf
        return scores_V

    def _random_number(self) -> float:
        """From 0 to below 1, of this seed and position.

        Source: a counter-based generator, Philox, Salmon et al. 2011.
        """
        return float(np.random.Generator(np.random.Philox(key=self._seed, counter=self._position)).random())


def choose_tokens(
    logits_WV: Tensor, samplers: Sequence[Sampler], num_logprobs: Sequence[int | None]
) -> list[Chosen]:
    """The next token of each of W sequences.

    Args:
        logits_WV: A row per sequence; -inf where its vocabulary is shorter.
        samplers: One per sequence. The caller tells them what it accepts.
        num_logprobs: Per sequence None, or how many of the likeliest tokens to give with their
            log-probabilities besides the chosen one's.
    """
    best_W, likeliest_W = logits_WV.max(dim=-1)
    bests, likeliest = best_W.tolist(), likeliest_W.tolist()
    chosen = []
    for row, sampler in enumerate(samplers):
        token_id = likeliest[row] if sampler.takes_likeliest else None
        if math.isfinite(bests[row]) and token_id is None:
            token_id = sampler.choose(logits_WV[row])
        if not math.isfinite(bests[row]) or token_id is None:
            chosen.append(Chosen(0, error=_not_finite(bests[row])))
            continue
        num = num_logprobs[row]
        asked = None if num is None else prompt_logprobs(logits_WV[row : row + 1], [token_id], num)[0]
        chosen.append(Chosen(token_id, asked))
    return chosen


def _not_finite(largest: float) -> str:
    return (
        f"no token can be chosen: the largest logit is {largest}. Look for damage with moemerge verify "
        f"BUNDLE; half precision or a penalty near 0 can do it, too"
    )


def prompt_logprobs(logits_TV: Tensor, next_ids: Sequence[int], num: int) -> list[TokenLogprob]:
    """How likely the model found the tokens that follow T positions.

    Args:
        logits_TV: The model's logits at each position.
        next_ids: The token after each position.
        num: How many of the likeliest tokens to give with each.
    """
    logprobs_TV = torch.log_softmax(logits_TV, dim=-1, dtype=torch.float32).cpu()
    found = []
    for logprobs_V, token_id in zip(logprobs_TV, next_ids, strict=True):
        ids = _largest(logprobs_V, num)
        top = tuple(zip(ids.tolist(), logprobs_V[ids].tolist(), strict=True))
        found.append(TokenLogprob(token_id, float(logprobs_V[token_id]), top))
    return found


def _draw(relative_V: Tensor, sampling: Sampling, random_number: float) -> int:
    """One of the tokens that truncation leaves.

    Args:
        relative_V: Adjusted logits minus their largest, so that no temperature is too small.
        sampling: Temperature and truncation.
        random_number: From 0 to below 1.
    """
    weights_V = torch.exp(relative_V / sampling.temperature)
    ids = _truncate(weights_V, sampling)
    cumulative = (weights_V if ids is None else weights_V[ids]).cumsum(dim=0)
    total = cumulative[-1]
    place = torch.searchsorted(cumulative, random_number * total, right=True)
    # Rounding may reach the total; the last token that is possible gets it.
    place = torch.minimum(place, torch.searchsorted(cumulative, total))
    return int(place if ids is None else ids[place])


def _truncate(weights_V: Tensor, sampling: Sampling) -> Tensor | None:
    """Ids that `min_p`, `top_k` and `top_p` leave, likeliest first; None for all."""
    if not (sampling.min_p or sampling.top_k or sampling.top_p < 1):
        return None
    # The likeliest weighs 1.
    ids = (weights_V >= sampling.min_p).nonzero().squeeze(-1)
    ids = ids[_largest(weights_V[ids], sampling.top_k)] if sampling.top_k else ids
    return ids[_nucleus(weights_V[ids], sampling.top_p)] if sampling.top_p < 1 else ids


def _nucleus(weights_C: Tensor, top_p: float) -> Tensor:
    """Places of the largest weights that together reach `top_p` of the total, the last one included."""
    total = weights_C.sum()
    # All that weigh less than this together miss from the total no more than `top_p` leaves out, and
    # sorting a whole vocabulary would cost more than the rest of the choice.
    places = (weights_C >= (1 - top_p) * total / len(weights_C)).nonzero().squeeze(-1)
    places = places[_largest(weights_C[places], len(places))]
    before = weights_C[places].cumsum(dim=0) - weights_C[places]
    return places[: max(1, int((before < top_p * total).sum()))]


def _largest(values: Tensor, num: int) -> Tensor:
    """Places of the `num` largest values, largest first, of equal ones the first."""
    if num <= 0:
        return torch.zeros(0, dtype=torch.int64)
    places = torch.arange(len(values))
    if num < len(values):
        least = values.topk(num).values[-1]
        places = (values >= least).nonzero().squeeze(-1)
    order = values[places].sort(descending=True, stable=True).indices
    return places[order[:num]]


def _indices(token_ids: Iterable[int], scores_V: Tensor) -> Tensor:
    """Token ids that the vocabulary has, as an index."""
    return torch.tensor([i for i in token_ids if i < len(scores_V)], dtype=torch.int64)
