"""`/v1/completions`: a variant continues one or several texts."""

import asyncio
import time
from collections.abc import AsyncGenerator

from fastapi import APIRouter, Request, Response

from moemerge.server.answers import Piece, Prompt
from moemerge.server.body import JsonRoute
from moemerge.server.errors import invalid
from moemerge.server.events import STREAMED, EventStream, answer_whole
from moemerge.server.generation import Generation, Wanted
from moemerge.server.requests import CompletionBody
from moemerge.server.responses import Completion, CompletionChoice
from moemerge.server.serving import ServedVariant, Serving, ServingOf

_DEFAULT_TOKENS = 16

completions = APIRouter(tags=["text"], route_class=JsonRoute)


@completions.post("/v1/completions", response_model=Completion, responses=STREAMED)
async def create_completion(body: CompletionBody, request: Request, serving: ServingOf) -> Response:
    """Continue a prompt: text, token ids, or a list of either.

    With `stream` the answer comes as server-sent events. `echo` with `logprobs` gives the prompt's
    log-probabilities too.
    """
    arrival_s = time.perf_counter()
    name = serving.require(body.model)
    variant, prompts = await asyncio.to_thread(_prepare, serving, name, body)
    _check(body, variant)
    wanted = Wanted(
        prompt_field="prompt",
        max_tokens=body.max_tokens,
        default_tokens=_DEFAULT_TOKENS,
        num_logprobs=body.logprobs,
        arrival_s=arrival_s,
    )
    generation = Generation(serving, variant, body, wanted, prompts, "cmpl")
    form = _Form(generation, variant, body)
    if body.stream:
        return EventStream(generation.inbox, form.chunks())
    return await answer_whole(request.receive, generation.inbox, form.whole())


def _prepare(serving: Serving, name: str, body: CompletionBody) -> tuple[ServedVariant, list[Prompt]]:
    """In a worker thread: long texts take a while."""
    variant = serving.variant(name)
    given = body.prompt if isinstance(body.prompt, list) else [body.prompt]
    if isinstance(given[0], int):
        given = [given]
    prompts = []
    for prompt in given:
        token_ids = variant.text.encode(prompt) if isinstance(prompt, str) else tuple(prompt)
        echo = None
        if body.echo:
            echo = prompt if isinstance(prompt, str) else variant.text.decode(token_ids)
        prompts.append(Prompt(token_ids, echo))
    return variant, prompts


def _check(body: CompletionBody, variant: ServedVariant) -> None:
    if body.max_tokens == 0 and not body.echo:
        raise invalid("max_tokens is 0, expected at least 1 without echo", "max_tokens")
    if body.echo and body.logprobs is not None and variant.text.is_encoder_decoder:
        raise invalid(
            "echo is true, expected false with logprobs: an encoder-decoder gives none of its prompt", "echo"
        )


class _Form:
    """A generation in the form of completions."""

    def __init__(self, generation: Generation, variant: ServedVariant, body: CompletionBody) -> None:
        self._generation = generation
        self._names = variant.names
        self._body = body
        self._with_usage = body.stream_options is not None and body.stream_options.include_usage

    async def whole(self) -> Completion:
        """All in one."""
        choices = [self._choice(answer) for answer in await self._generation.whole()]
        return self._completion(choices, with_usage=True)

    async def chunks(self) -> AsyncGenerator[Completion, None]:
        """Piece by piece."""
        async for piece in self._generation.pieces():
            yield self._completion([self._choice(piece)], with_usage=False)
        if self._with_usage:
            yield self._completion([], with_usage=True)

    def _choice(self, piece: Piece) -> CompletionChoice:
        return CompletionChoice(
            index=piece.index,
            text=piece.text,
            logprobs=None if self._body.logprobs is None else self._names.for_completion(piece.logprobs),
            finish_reason=piece.finish_reason,
        )

    def _completion(self, choices: list[CompletionChoice], *, with_usage: bool) -> Completion:
        completion = Completion(
            id=self._generation.id,
            object="text_completion",
            created=self._generation.created,
            model=self._body.model,
            choices=choices,
        )
        if with_usage or self._with_usage:
            completion.usage = self._generation.usage() if with_usage else None
        return completion
