"""Replicas behind the face of one engine's service, for the front door that `serve` has, too.

A request whose replica is lost before its first output is sent to another; one that has begun ends with an
error, because its client has read tokens that another replica might choose otherwise.
"""

import asyncio
import logging
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ray.exceptions import RayError

from moemerge.distributed.replica import ReplicaState
from moemerge.errors import InvalidRecipe, NotFound, ServingError
from moemerge.runner.backlog import Backlog
from moemerge.runner.intake import VariantLimits, check_request
from moemerge.runner.metrics import Snapshot, add_snapshots
from moemerge.runner.request import FinishReason, Output, Request, Timing
from moemerge.runner.service import Listener

_ATTEMPTS = 4
_LOOK_EVERY_S = 0.5
_ANSWER_S = 5.0
_STALE_S = 30.0
_LOG = logging.getLogger(__name__)


class ReplicaService:
    """`Service` over the replicas of one deployment; belongs to the event loop it was begun on.

    Args:
        handle: Of the deployment of `Replica`.
        max_batch: Requests that all replicas together may compute at once.
        max_queue: Unfinished requests beyond those.
    """

    def __init__(self, handle: Any, max_batch: int, max_queue: int) -> None:
        self._handle = handle
        self._backlog = Backlog(max_batch, max_queue, None)
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._states: list[ReplicaState] = []
        self._seen_s = 0.0

    async def begin(self) -> None:
        """Wait for the first replica, and follow all of them from then on."""
        self._loop = asyncio.get_running_loop()
        while not self._states:
            await self._look()
            await asyncio.sleep(0 if self._states else _LOOK_EVERY_S)
        self._follower = self._loop.create_task(self._follow())

    # Requests

    def submit(self, request: Request, listener: Listener) -> None:
        """See `EngineService.submit`; outputs come on the event loop.

        Raises:
            NotFound, InvalidRecipe, Overloaded: As there.
        """
        check_request(request, self.limits_of(request.variant))
        if request.request_id in self._tasks:
            raise InvalidRecipe(f"request id {request.request_id!r} is in use")
        self._backlog.check_room(request.variant)
        self._backlog.begin(request.variant)
        # Clocks of machines differ.
        task = self._loop.create_task(self._answer(replace(request, arrival_s=None), listener))
        self._tasks[request.request_id] = task
        task.add_done_callback(lambda _: self._end(request))

    def cancel(self, request_id: str) -> None:
        """See `EngineService.cancel`."""
        if request_id in self._tasks:
            self._tasks[request_id].cancel()

    # Variants

    @property
    def variants(self) -> Mapping[str, VariantLimits]:
        """Variants that are served, and what requests to them may hold."""
        return {name: limits for state in self._states for name, limits in state.limits.items()}

    def limits_of(self, variant: str) -> VariantLimits:
        """See `EngineService.limits_of`."""
        limits = self.variants.get(variant)
        if limits is None:
            raise NotFound(f"no variant {variant!r} is served; there are {', '.join(self.variants)}")
        return limits

    def add_variant(self, variant: str) -> None:
        """See `EngineService.add_variant`."""
        self._change("add_variant", variant)

    def remove_variant(self, variant: str) -> None:
        """See `EngineService.remove_variant`."""
        self._change("remove_variant", variant)

    def pin(self, variant: str) -> None:
        """See `EngineService.pin`; on every replica."""
        self._change("pin", variant)

    def unpin(self, variant: str) -> None:
        """See `EngineService.unpin`."""
        self._change("unpin", variant)

    # State

    @property
    def is_alive(self) -> bool:
        """Replicas have answered lately."""
        return time.monotonic() - self._seen_s < _STALE_S

    @property
    def is_ready(self) -> bool:
        """Requests are taken."""
        return self.is_alive and bool(self._states)

    def snapshot(self) -> Snapshot:
        """Figures of all replicas together."""
        return add_snapshots([state.snapshot for state in self._states])

    async def _answer(self, request: Request, listener: Listener) -> None:
        for attempt in range(1, _ATTEMPTS + 1):
            has_begun = False
            stream = self._handle.options(stream=True).generate.remote(request)
            try:
                async for output in stream:
                    has_begun = True
                    listener(output)
                return
            except asyncio.CancelledError:
                stream.cancel()
                raise
            except RayError as error:
                _LOG.warning("request %s, attempt %d: %s", request.request_id, attempt, error)
                if has_begun or attempt == _ATTEMPTS:
                    listener(_lost(request))
                    return

    def _end(self, request: Request) -> None:
        del self._tasks[request.request_id]
        self._backlog.end(request.variant, time.perf_counter())

    def _change(self, action: str, variant: str) -> None:
        """On every replica, from a worker thread.

        Raises:
            ServingError: A replica refuses; the others have done it.
        """
        if variant not in self.variants and action != "add_variant":
            raise NotFound(f"no variant {variant!r} is served; there are {', '.join(self.variants)}")

        async def carry_out() -> list[str | None]:
            results: list[str | None] = await self._handle.broadcast("change", action, variant).results_async(
                timeout_s=_STALE_S
            )
            await self._look()
            return results

        refused = [
            text for text in asyncio.run_coroutine_threadsafe(carry_out(), self._loop).result() if text
        ]
        if refused:
            raise ServingError(f"{len(refused)} of {len(self._states)} replicas: {refused[0]}")

    async def _follow(self) -> None:
        while True:
            await asyncio.sleep(_LOOK_EVERY_S)
            await self._look()

    async def _look(self) -> None:
        try:
            found = await self._handle.broadcast("state").results_async(
                timeout_s=_ANSWER_S, return_exceptions=True
            )
        except (RayError, TimeoutError) as error:
            _LOG.warning("replicas do not answer: %s", error)
            return
        states = [state for state in found if isinstance(state, ReplicaState)]
        if states:
            self._states, self._seen_s = states, time.monotonic()


def _lost(request: Request) -> Output:
    now_s = time.perf_counter()
    return Output(
        request_id=request.request_id,
        finish=FinishReason.ERROR,
        error="the replica that computed the answer was lost; send the request again",
        timing=Timing(arrival_s=now_s, admitted_s=now_s, first_token_s=None, finished_s=now_s),
    )
