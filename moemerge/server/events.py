"""Answers over HTTP: as one body or as server-sent events, in both cases only while the client is there."""

import asyncio
import json
from collections.abc import AsyncGenerator, Coroutine
from contextlib import aclosing
from typing import Any, TypeVar

from pydantic import BaseModel
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from moemerge.errors import MoemergeError
from moemerge.server.errors import ApiError, error_body, hide_folder, translate
from moemerge.server.inbox import Inbox

Result = TypeVar("Result")
EVENTS = "text/event-stream"
CLIENT_GONE = 499
"""Status that only logs and metrics see; nginx's number for it."""
STREAMED: dict[int | str, dict[str, Any]] = {
    200: {"content": {EVENTS: {}}, "description": "Whole, or as events."}
}
"""What an address that may answer with an `EventStream` says of that."""


class ClientGone(Exception):
    """The client closed the connection before its answer was ready."""


class EventStream(Response):
    """Server-sent events, one per chunk, then `[DONE]`.

    A failure after the beginning becomes an event in the shape of every error. When the client goes away,
    the inbox cancels what still runs for it.
    """

    media_type = EVENTS

    def __init__(self, inbox: Inbox, chunks: AsyncGenerator[BaseModel, None]) -> None:
        super().__init__(headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._inbox = inbox
        self._chunks = chunks

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the chunks while the client reads."""
        with self._inbox:
            try:
                await while_connected(receive, self._send_all(scope, send))
            except ClientGone:
                return

    async def _send_all(self, scope: Scope, send: Send) -> None:
        async def send_event(data: bytes) -> None:
            await send({"type": "http.response.body", "body": b"data: " + data + b"\n\n", "more_body": True})

        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        try:
            async with aclosing(self._chunks) as chunks:
                async for chunk in chunks:
                    await send_event(chunk.model_dump_json(exclude_unset=True).encode())
        except (ApiError, MoemergeError) as error:
            told = error if isinstance(error, ApiError) else translate(error)
            told = hide_folder(told, scope["app"].state.serving.bundle.folder)
            await send_event(json.dumps(error_body(told)).encode())
        await send_event(b"[DONE]")
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def answer_whole(receive: Receive, inbox: Inbox, work: Coroutine[Any, Any, BaseModel]) -> Response:
    """The result of `work` as one body; the inbox cancels what still runs for a client that went away.

    Raises:
        ApiError, MoemergeError: As `work`.
    """
    with inbox:
        try:
            result = await while_connected(receive, work)
        except ClientGone:
            return Response(status_code=CLIENT_GONE)
    return Response(result.model_dump_json(exclude_unset=True), media_type="application/json")


async def while_connected(receive: Receive, work: Coroutine[Any, Any, Result]) -> Result:
    """The result of `work`, which is cancelled when the client goes away.

    Raises:
        ClientGone: It did.
    """
    working = asyncio.ensure_future(work)
    watching = asyncio.ensure_future(_until_disconnected(receive))
    try:
        await asyncio.wait((working, watching), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientGone
        return working.result()
    finally:
        working.cancel()
        watching.cancel()
        await asyncio.gather(working, watching, return_exceptions=True)


async def _until_disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
