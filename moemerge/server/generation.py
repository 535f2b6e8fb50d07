"""All answers to one HTTP request: engine requests made from its body, and pieces made from their outputs."""

import asyncio
import time
import uuid
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from typing import TypeVar

from moemerge.errors import ServingError, Stopping
from moemerge.runner.request import FinishReason, Output, Request
from moemerge.runner.sampling import Sampling
from moemerge.server.answers import Piece, PlacedAnswer, Prompt, join_pieces
from moemerge.server.errors import invalid
from moemerge.server.inbox import Inbox
from moemerge.server.requests import GenerationBody
from moemerge.server.responses import Usage
from moemerge.server.serving import ServedVariant, Serving
from moemerge.text.answers import RunningAnswer
from moemerge.text.limits import check_ids, check_min_tokens, check_prompt, longest_answer

Value = TypeVar("Value")
_MANY_TOKENS = 512
"""Tokens of a prompt that are not placed in its text on the event loop."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What completions and chats name differently.

    Attributes:
        prompt_field: Name of the field with the prompt.
        max_tokens_field: Name of the field with the longest answer.
        max_tokens: Longest answer as the client gave it; 0 computes only the prompt.
        default_tokens: Longest answer otherwise; None for what the context leaves.
        num_logprobs: Likeliest tokens to name with each token; None for no log-probabilities.
        arrival_s: When the request came in, by `time.perf_counter()`.
    """

    prompt_field: str
    max_tokens_field: str = "max_tokens"
    max_tokens: int | None
    default_tokens: int | None
    num_logprobs: int | None
    arrival_s: float


class Generation:
    """Answers under way."""

    def __init__(
        self,
        serving: Serving,
        variant: ServedVariant,
        body: GenerationBody,
        wanted: Wanted,
        prompts: Sequence[Prompt],
        prefix: str,
    ) -> None:
        """Hand the requests to the engine.

        Raises:
            ApiError: Too many answers.
            InvalidRequest: More tokens than the context holds, or ids that are no tokens.
            MoemergeError: As `EngineService.submit`.
        """
        self.id = f"{prefix}-{uuid.uuid4().hex}"
        self.created = int(time.time())
        self.inbox = Inbox(serving.service, serving.options.max_unread_outputs)
        self._serving = serving
        self._variant = variant.text.name
        self._num_prompt_tokens = sum(len(prompt.token_ids) for prompt in prompts)
        self._answers: dict[str, PlacedAnswer] = {}
        requests = []
        num_each = body.n or 1
        if num_each * len(prompts) > serving.options.max_choices:
            raise invalid(
                f"{num_each * len(prompts)} answers are asked for, the most at once are "
                f"{serving.options.max_choices}",
                "n",
            )
        stop = [body.stop] if isinstance(body.stop, str) else body.stop or []
        for index, (prompt, copy) in enumerate((p, c) for p in prompts for c in range(num_each)):
            request = _request(f"{self.id}-{index}", serving, variant, body, wanted, prompt, copy)
            requests.append(request)
            self._answers[request.request_id] = PlacedAnswer(
                index,
                prompt,
                RunningAnswer(request, variant.text, stop),
                variant.text,
                is_empty=wanted.max_tokens == 0,
            )
        self.inbox.submit(requests)

    async def pieces(self) -> AsyncGenerator[Piece, None]:
        """Pieces of all answers as they come.

        Raises:
            ApiError: The reader was too slow, the variant is not served any more, or the engine refused.
            ServingError, Stopping: The engine failed, or stopped before the end.
        """
        async for output in self.inbox.outputs():
            answer = self._answers[output.request_id]
            if answer.has_ended:
                continue
            if output.finish is FinishReason.CANCELLED:
                raise Stopping("the server is stopping; the answer was cut off")
            if output.finish is FinishReason.ERROR:
                raise self._failure(output)
            if output.prompt_logprobs is not None and len(output.prompt_logprobs) > _MANY_TOKENS:
                piece = await asyncio.to_thread(answer.add, output)
            else:
                piece = answer.add(output)
            if answer.has_ended:
                self.inbox.cancel(output.request_id)
            if not piece.is_empty:
                yield piece

    async def whole(self) -> list[Piece]:
        """All answers, each in one piece, in order.

        Raises:
            ApiError, ServingError, Stopping: As `pieces`.
        """
        parts: dict[int, list[Piece]] = {}
        async for piece in self.pieces():
            parts.setdefault(piece.index, []).append(piece)
        return [join_pieces(parts[index]) for index in sorted(parts)]

    def _failure(self, output: Output) -> Exception:
        """Why a request ended with an error.

        Raises:
            ApiError: Its variant is not served any more.
        """
        self._serving.require(self._variant)
        error = output.error or "the engine failed"
        # Only what the engine refused when it took it up has no times.
        was_refused = output.timing is None and self._serving.service.is_ready
        return invalid(error) if was_refused else ServingError(error)

    def usage(self) -> Usage:
        """Tokens so far."""
        completion = sum(answer.num_tokens for answer in self._answers.values())
        return Usage(
            prompt_tokens=self._num_prompt_tokens,
            completion_tokens=completion,
            total_tokens=self._num_prompt_tokens + completion,
        )


def _request(
    request_id: str,
    serving: Serving,
    variant: ServedVariant,
    body: GenerationBody,
    wanted: Wanted,
    prompt: Prompt,
    copy: int,
) -> Request:
    text = variant.text
    longest = longest_answer(
        text,
        len(prompt.token_ids),
        asked=wanted.max_tokens,
        default=wanted.default_tokens,
        limits=serving.service.limits_of(text.name),
        prompt_field=wanted.prompt_field,
        asked_field=wanted.max_tokens_field,
    )
    check_prompt(wanted.prompt_field, prompt.token_ids, text)
    check_ids("logit_bias", map(int, body.logit_bias or ()), text)
    check_ids("stop_token_ids", body.stop_token_ids or (), text)
    max_tokens, min_tokens = max(1, longest), body.min_tokens or 0
    check_min_tokens(min_tokens, max_tokens)
    # So that every echoed prompt is followed by one token, as clients that score prompts count on.
    is_scoring = prompt.echo is not None and wanted.num_logprobs is not None and max_tokens == 1
    return Request(
        request_id=request_id,
        variant=text.name,
        prompt_ids=prompt.token_ids,
        max_tokens=max_tokens,
        sampling=_sampling(body, variant.recommended, copy),
        stop_ids=text.stop_ids | frozenset(body.stop_token_ids or ()),
        min_tokens=min_tokens,
        ignore_stop=bool(body.ignore_eos) or is_scoring,
        num_logprobs=wanted.num_logprobs,
        num_prompt_logprobs=wanted.num_logprobs if prompt.echo is not None else None,
        arrival_s=wanted.arrival_s,
    )


def _sampling(body: GenerationBody, recommended: Sampling, copy: int) -> Sampling:
    """The client's wishes, then the variant's recommendation, which begins with OpenAI's default."""
    top_k = None if body.top_k is None else max(0, body.top_k)
    return Sampling(
        temperature=_first(body.temperature, recommended.temperature),
        top_k=_first(top_k, recommended.top_k),
        top_p=_first(body.top_p, recommended.top_p),
        min_p=_first(body.min_p, recommended.min_p),
        repetition_penalty=_first(body.repetition_penalty, recommended.repetition_penalty),
        presence_penalty=body.presence_penalty or 0.0,
        frequency_penalty=body.frequency_penalty or 0.0,
        seed=None if body.seed is None else (body.seed + copy) % 2**63,
        logit_bias={int(token_id): value for token_id, value in (body.logit_bias or {}).items()},
    )


def _first(given: Value | None, default: Value) -> Value:
    return default if given is None else given
