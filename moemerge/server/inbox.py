"""The way of outputs from the engine's thread to the event loop, for one HTTP request."""

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncIterator, Iterable
from types import TracebackType

from moemerge.errors import Stopping
from moemerge.runner.request import Output, Request
from moemerge.server.errors import ApiError, Kind
from moemerge.server.serving import Service

_TOO_SLOW = Kind(408, "invalid_request_error", "reader_too_slow")

_LOOK_EVERY_S = 5.0
"""How often a wait without outputs looks whether the engine still lives."""


class Inbox:
    """Engine requests of one HTTP request, and their outputs as they come.

    Use as a context manager: on leaving, whatever still runs is cancelled, so that a client that goes
    away frees its blocks. Belongs to the event loop it was made in.
    """

    def __init__(self, service: Service, capacity: int) -> None:
        self._service = service
        self._capacity = capacity
        self._loop = asyncio.get_running_loop()
        self._running: set[str] = set()
        self._outputs: deque[Output] = deque()
        self._arrived = asyncio.Event()
        self._overflowed = False

    def __enter__(self) -> "Inbox":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._cancel_all()

    def submit(self, requests: Iterable[Request]) -> None:
        """Hand requests to the engine, all or none.

        Raises:
            MoemergeError: As `EngineService.submit`.
        """
        try:
            for request in requests:
                self._running.add(request.request_id)
                self._service.submit(request, self._receive)
        except BaseException:
            self._cancel_all()
            raise

    def cancel(self, request_id: str) -> None:
        """End a request; nothing more comes of it."""
        if request_id in self._running:
            self._running.discard(request_id)
            self._service.cancel(request_id)
            self._arrived.set()

    async def outputs(self) -> AsyncIterator[Output]:
        """Every output until all requests have ended.

        Raises:
            ApiError: The reader was too slow; the requests were cancelled.
            Stopping: The engine is no more.
        """
        while True:
            while self._outputs:
                yield self._outputs.popleft()
            if self._overflowed:
                raise ApiError(_TOO_SLOW, f"{self._capacity} outputs were waiting to be read; cancelled")
            if not self._running:
                return
            self._arrived.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_LOOK_EVERY_S):
                    await self._arrived.wait()
            if not self._service.is_alive and not self._outputs:
                raise Stopping("the engine has stopped")

    def _receive(self, output: Output) -> None:
        """On the engine's thread."""
        try:
            self._loop.call_soon_threadsafe(self._put, output)
        except RuntimeError:  # the loop has closed; nobody reads any more
            self._service.cancel(output.request_id)

    def _put(self, output: Output) -> None:
        if output.request_id not in self._running:
            return
        if output.finish is not None:
            self._running.discard(output.request_id)
        self._outputs.append(output)
        self._arrived.set()
        if len(self._outputs) > self._capacity:
            self._overflowed = True
            self._outputs.clear()
            self._cancel_all()

    def _cancel_all(self) -> None:
        for request_id in list(self._running):
            self.cancel(request_id)
