"""`/v1/chat/completions`: a variant answers in a conversation, by its own template."""

import asyncio
import time
from collections.abc import AsyncGenerator
from typing import Any

from fastapi import APIRouter, Request, Response

from moemerge.server.answers import Piece, Prompt
from moemerge.server.body import JsonRoute
from moemerge.server.errors import invalid
from moemerge.server.events import STREAMED, EventStream, answer_whole
from moemerge.server.generation import Generation, Wanted
from moemerge.server.logprobs import PlacedLogprob
from moemerge.server.requests import ChatBody, Message
from moemerge.server.responses import (
    Chat,
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatDelta,
    ChatLogprobs,
    ChatMessage,
)
from moemerge.server.serving import ServedVariant, Serving, ServingOf
from moemerge.text.reasoning import Parts

chat = APIRouter(tags=["text"], route_class=JsonRoute)


@chat.post("/v1/chat/completions", response_model=Chat, responses=STREAMED)
async def create_chat_completion(body: ChatBody, request: Request, serving: ServingOf) -> Response:
    """Answer the last message of a conversation.

    Each variant renders the messages by its own chat template; one that has none answers 400. With `stream`
    the answer comes as server-sent events.
    """
    arrival_s = time.perf_counter()
    name = serving.require(body.model)
    variant, token_ids = await asyncio.to_thread(_prepare, serving, name, body)
    is_older = body.max_completion_tokens is None
    wanted = Wanted(
        prompt_field="messages",
        max_tokens_field="max_tokens" if is_older else "max_completion_tokens",
        max_tokens=body.max_tokens if is_older else body.max_completion_tokens,
        default_tokens=None,
        num_logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        arrival_s=arrival_s,
    )
    generation = Generation(serving, variant, body, wanted, [Prompt(token_ids)], "chatcmpl")
    form = _Form(generation, variant, body, token_ids)
    if body.stream:
        return EventStream(generation.inbox, form.chunks())
    return await answer_whole(request.receive, generation.inbox, form.whole())


def encode_messages(
    variant: ServedVariant, messages: list[Message], *, add_special_tokens: bool = False, **options: Any
) -> tuple[int, ...]:
    """A conversation's token ids.

    Raises:
        ApiError: The variant has no chat template.
        InvalidRecipe: The template refuses the messages.
    """
    if variant.text.chat_template is None:
        raise invalid(
            f"variant {variant.text.name} has no chat template; ask it at /v1/completions to continue a text",
            "messages",
            "no_chat_template",
        )
    plain = [message.model_dump(exclude_unset=True) for message in messages]
    rendered = variant.text.render_chat(plain, **options)
    return variant.text.encode(rendered, add_special_tokens=add_special_tokens)


def _prepare(serving: Serving, name: str, body: ChatBody) -> tuple[ServedVariant, tuple[int, ...]]:
    """In a worker thread: templates and long texts take a while."""
    variant = serving.variant(name)
    return variant, encode_messages(variant, body.messages, variables=body.chat_template_kwargs)


class _Form:
    """A generation in the form of chats."""

    def __init__(
        self, generation: Generation, variant: ServedVariant, body: ChatBody, prompt_ids: tuple[int, ...]
    ) -> None:
        self._generation = generation
        self._reasoning = [variant.text.reasoning(prompt_ids) for _ in range(body.n or 1)]
        self._names = variant.names
        self._body = body
        self._with_usage = body.stream_options is not None and body.stream_options.include_usage

    async def whole(self) -> Chat:
        """All in one."""
        return Chat(
            id=self._generation.id,
            object="chat.completion",
            created=self._generation.created,
            model=self._body.model,
            choices=[
                ChatChoice(
                    index=answer.index,
                    message=self._message(answer),
                    logprobs=self._logprobs(answer.logprobs),
                    finish_reason=answer.finish_reason,
                )
                for answer in await self._generation.whole()
            ],
            usage=self._generation.usage(),
        )

    async def chunks(self) -> AsyncGenerator[ChatChunk, None]:
        """Piece by piece; the first chunk of every answer says who speaks."""
        for index in range(self._body.n or 1):
            yield self._chunk(ChatDelta(role="assistant", content=""), Piece(index, "", [], None))
        async for piece in self._generation.pieces():
            yield self._chunk(self._delta(piece), piece)
        if self._with_usage:
            last = self._empty_chunk()
            last.usage = self._generation.usage()
            yield last

    def _message(self, answer: Piece) -> ChatMessage:
        parts = self._reasoning[answer.index].split(answer.text)
        message = ChatMessage(role="assistant", content=parts.content)
        if parts.reasoning:
            message.reasoning_content = parts.reasoning
        return message

    def _delta(self, piece: Piece) -> ChatDelta:
        reasoning = self._reasoning[piece.index]
        parts = reasoning.add(piece.text)
        if piece.finish_reason is not None:
            parts = Parts(*(now + rest for now, rest in zip(parts, reasoning.finish(), strict=True)))
        given = {"content": parts.content, "reasoning_content": parts.reasoning}
        return ChatDelta(**{name: text for name, text in given.items() if text})

    def _chunk(self, delta: ChatDelta, piece: Piece) -> ChatChunk:
        chunk = self._empty_chunk()
        chunk.choices = [
            ChatChunkChoice(
                index=piece.index,
                delta=delta,
                logprobs=self._logprobs(piece.logprobs) if piece.logprobs else None,
                finish_reason=piece.finish_reason,
            )
        ]
        if self._with_usage:
            chunk.usage = None
        return chunk

    def _empty_chunk(self) -> ChatChunk:
        return ChatChunk(
            id=self._generation.id,
            object="chat.completion.chunk",
            created=self._generation.created,
            model=self._body.model,
            choices=[],
        )

    def _logprobs(self, placed: list[PlacedLogprob]) -> ChatLogprobs | None:
        return self._names.for_chat(placed) if self._body.logprobs else None
