"""A request and what comes of it, in token ids."""

from dataclasses import dataclass, field
from enum import StrEnum

from moemerge.errors import InvalidRecipe
from moemerge.runner.sampling import Sampling
from moemerge.runner.sampling import TokenLogprob as TokenLogprob


class FinishReason(StrEnum):
    """Why a request has ended."""

    STOP = "stop"
    LENGTH = "length"
    CANCELLED = "cancelled"
    ERROR = "error"


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """A prompt for one variant.

    What depends on the bundle, such as the vocabulary's size, the engine checks.

    Attributes:
        request_id: Chosen by the caller; not in use at the same time.
        variant: Who answers.
        prompt_ids: At least one token.
        max_tokens: Longest answer; context and cache must hold it beside the prompt.
        sampling: How tokens are chosen.
        stop_ids: End the answer and are not given out.
        min_tokens: No stop id is chosen before.
        ignore_stop: Stop ids do not count, for measurements.
        num_logprobs: With every token its log-probability and those of so many of the likeliest; None for
            none at all.
        num_prompt_logprobs: The same for the tokens of the prompt; decoder-only families.
        arrival_s: When it was received, by `time.perf_counter()`; None for when it is submitted.
    """

    request_id: str
    variant: str
    prompt_ids: tuple[int, ...]
    max_tokens: int
    sampling: Sampling = field(default_factory=Sampling)
    stop_ids: frozenset[int] = frozenset()
    min_tokens: int = 0
    ignore_stop: bool = False
    num_logprobs: int | None = None
    num_prompt_logprobs: int | None = None
    arrival_s: float | None = None

    def __post_init__(self) -> None:
        if not self.prompt_ids:
            raise InvalidRecipe("the prompt is empty")
        for name, ids in (("the prompt", self.prompt_ids), ("stop_ids", self.stop_ids)):
            wrong = next((i for i in ids if type(i) is not int or i < 0), None)
            if wrong is not None:
                raise InvalidRecipe(f"{name} holds {wrong!r}, expected token ids of 0 or more")
        _require_at_least("max_tokens", self.max_tokens, 1)
        _require_at_least("min_tokens", self.min_tokens, 0)
        if self.min_tokens > self.max_tokens:
            raise InvalidRecipe(
                f"min_tokens is {self.min_tokens}, expected at most max_tokens, {self.max_tokens}"
            )
        for name in ("num_logprobs", "num_prompt_logprobs"):
            if getattr(self, name) is not None:
                _require_at_least(name, getattr(self, name), 0)


def _require_at_least(name: str, value: int, least: int) -> None:
    if type(value) is not int or value < least:
        raise InvalidRecipe(f"{name} is {value!r}, expected a whole number of at least {least}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """When a request passed its stations, by `time.perf_counter()`.

    Attributes:
        arrival_s: Received.
        admitted_s: First taken into a batch; None when it ended in the queue.
        first_token_s: Its first token was chosen; None when there is none.
        finished_s: Ended, for whatever reason.
        swap_wait_s: Seconds it waited for its variant to become resident.
    """

    arrival_s: float
    admitted_s: float | None
    first_token_s: float | None
    finished_s: float
    swap_wait_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Output:
    """What a step brought for one request.

    Attributes:
        request_id: Whose.
        token_ids: New tokens; none when only the end is told.
        logprobs: One per new token when asked for, else empty.
        prompt_logprobs: Once, with the first output, when asked for; None for the first token.
        finish: Why the request has ended; None while it goes on.
        error: What went wrong, with `FinishReason.ERROR`.
        timing: With the end.
    """

    request_id: str
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None
    finish: FinishReason | None = None
    error: str | None = None
    timing: Timing | None = None
