"""An engine on a thread of its own, for callers on any other thread.

Calls travel to the engine's thread through a queue, outputs back through each request's listener. What
callers read, limits and snapshots, are immutable values that the thread replaces.
"""

import logging
import queue
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from typing import TypeVar

from moemerge.errors import InvalidRecipe, MoemergeError, NotFound, Stopping
from moemerge.runner.backlog import Backlog
from moemerge.runner.engine import Engine
from moemerge.runner.intake import VariantLimits, check_request
from moemerge.runner.metrics import Snapshot
from moemerge.runner.request import FinishReason, Output, Request

_LOG = logging.getLogger(__name__)
Result = TypeVar("Result")
Listener = Callable[[Output], None]

_SNAPSHOT_EVERY_S = 0.1
_DRAIN_POLL_S = 0.02
_IDLE_WAIT_S = 1.0


class EngineService:
    """Serves one engine to many threads."""

    def __init__(
        self, engine: Engine, *, max_queue: int = 256, max_queue_per_variant: int | None = None
    ) -> None:
        """Take over an engine; nobody else may call it from now on.

        Args:
            engine: To be served.
            max_queue: Unfinished requests beyond those that can run at once.
            max_queue_per_variant: The same for one variant; None for no bound of its own.

        Raises:
            InvalidRecipe: A bound is negative.
        """
        self._engine = engine
        self._calls: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._listeners: dict[str, tuple[str, Listener]] = {}
        self._backlog = Backlog(engine.options.max_batch, max_queue, max_queue_per_variant)
        self._limits: Mapping[str, VariantLimits] = engine.variants
        self._snapshot = engine.snapshot()
        self._is_stopping = False
        self._has_ended = threading.Event()
        self._thread = threading.Thread(target=self._work, name="moemerge-engine", daemon=True)

    # Life

    def start(self) -> None:
        """Begin to serve."""
        self._thread.start()

    def stop(self, drain_s: float = 0.0) -> None:
        """Take no more requests, give those there `drain_s` to finish, cancel the rest, and end."""
        with self._lock:
            self._is_stopping = True
        deadline_s = time.perf_counter() + drain_s
        while self.is_alive and self.num_unfinished and time.perf_counter() < deadline_s:
            time.sleep(_DRAIN_POLL_S)
        if self._thread.is_alive():
            self._calls.put(self._has_ended.set)
            self._thread.join()

    @property
    def is_alive(self) -> bool:
        """The engine's thread runs."""
        return self._thread.is_alive()

    @property
    def is_ready(self) -> bool:
        """Requests are taken."""
        return self.is_alive and not self._is_stopping

    # Requests

    def submit(self, request: Request, listener: Listener) -> None:
        """Hand in a request; its outputs go to `listener`, on the engine's thread, so it must not block.

        Raises:
            NotFound: The variant is not served.
            InvalidRecipe: As `Engine.submit`.
            Overloaded: Too many requests are unfinished, of this variant or in all.
            Stopping: The service takes no more requests.
        """
        check_request(request, self.limits_of(request.variant))
        with self._lock:
            if not self.is_ready:
                raise Stopping("the engine is stopping and takes no more requests")
            if request.request_id in self._listeners:
                raise InvalidRecipe(f"request id {request.request_id!r} is in use")
            self._backlog.check_room(request.variant)
            self._backlog.begin(request.variant)
            self._listeners[request.request_id] = (request.variant, listener)
            self._calls.put(lambda: self._submit(request))

    def cancel(self, request_id: str) -> None:
        """End a request before its next step; its listener is told. Unknown ids are passed over."""
        self._calls.put(lambda: self._engine.cancel(request_id))

    @property
    def num_unfinished(self) -> int:
        """Requests that were handed in and have not ended."""
        return len(self._listeners)

    # Variants

    @property
    def variants(self) -> Mapping[str, VariantLimits]:
        """Variants that are served, and what requests to them may hold."""
        return self._limits

    def limits_of(self, variant: str) -> VariantLimits:
        """What a request to a variant may hold.

        Raises:
            NotFound: The variant is not served.
        """
        limits = self._limits.get(variant)
        if limits is None:
            raise NotFound(f"no variant {variant!r} is served; there are {', '.join(self._limits)}")
        return limits

    def add_variant(self, variant: str) -> None:
        """See `Engine.add_variant`."""
        self._change(lambda: self._engine.add_variant(variant))

    def remove_variant(self, variant: str) -> None:
        """See `Engine.remove_variant`."""
        self._change(lambda: self._engine.remove_variant(variant))

    def pin(self, variant: str) -> None:
        """See `Engine.pin`."""
        self._change(lambda: self._engine.pin(variant))

    def unpin(self, variant: str) -> None:
        """See `Engine.unpin`."""
        self._change(lambda: self._engine.unpin(variant))

    # State

    def snapshot(self) -> Snapshot:
        """Figures of the engine, at most a tenth of a second old while it works."""
        return self._snapshot

    def verify_integrity(self) -> None:
        """See `Engine.verify_integrity`."""
        self.call(self._engine.verify_integrity)

    def call(self, function: Callable[[], Result]) -> Result:
        """Do something on the engine's thread, between two steps, and wait for it.

        Raises:
            Stopping: The thread has ended.
        """
        future: Future[Result] = Future()

        def carry_out() -> None:
            try:
                future.set_result(function())
            except Exception as error:  # raised where the call was made
                future.set_exception(error)

        if not self.is_alive:
            raise Stopping("the engine has stopped")
        self._calls.put(carry_out)
        while True:
            try:
                return future.result(timeout=1.0)
            except TimeoutError:
                if not self.is_alive and not future.done():
                    raise Stopping("the engine has stopped") from None

    def _change(self, change: Callable[[], None]) -> None:
        """Change what is served; who called sees it at once."""

        def carry_out() -> None:
            change()
            self._publish()

        self.call(carry_out)

    # On the engine's thread

    def _work(self) -> None:
        error = None
        try:
            self._serve()
        except Exception as failure:
            _LOG.exception("the engine's thread failed; all requests end with an error")
            error = f"the engine failed: {failure}"
        finally:
            with self._lock:
                self._is_stopping = True
            reason = FinishReason.CANCELLED if error is None else FinishReason.ERROR
            self._tell([Output(request_id=i, finish=reason, error=error) for i in list(self._listeners)])
            self._engine.close()

    def _serve(self) -> None:
        last_s = 0.0
        while not self._has_ended.is_set():
            self._take_calls()
            if self._engine.has_work:
                self._tell(self._step())
            now_s = time.perf_counter()
            if now_s - last_s >= _SNAPSHOT_EVERY_S or not self._engine.has_work:
                self._publish()
                last_s = now_s
        for request_id in list(self._listeners):
            self._engine.cancel(request_id)
        self._tell(self._engine.step() if self._engine.has_work else [])
        self._publish()

    def _take_calls(self) -> None:
        """Carry out what was asked for; wait for something when there is nothing else to do."""
        is_idle = not self._engine.has_work
        try:
            while True:
                call = self._calls.get(timeout=_IDLE_WAIT_S) if is_idle else self._calls.get_nowait()
                call()
                is_idle = False
        except queue.Empty:
            pass

    def _step(self) -> list[Output]:
        try:
            return self._engine.step()
        except Exception as error:
            # Whatever it was, the requests of this step cannot go on, and those to come can.
            _LOG.exception("a step failed; its requests end with an error")
            self._engine.fail_all(f"the engine failed: {error}")
            return self._engine.step()

    def _submit(self, request: Request) -> None:
        try:
            self._engine.submit(request)
        except MoemergeError as error:
            self._tell([Output(request_id=request.request_id, finish=FinishReason.ERROR, error=str(error))])

    def _tell(self, outputs: list[Output]) -> None:
        for output in outputs:
            known = self._listeners.get(output.request_id)
            if known is None:
                continue
            variant, listener = known
            if output.finish is not None:
                with self._lock:
                    del self._listeners[output.request_id]
                    self._backlog.end(variant, time.perf_counter())
            try:
                listener(output)
            except Exception:  # a listener that fails must not stop the others' answers
                _LOG.exception("the listener of request %s failed", output.request_id)
                self._engine.cancel(output.request_id)

    def _publish(self) -> None:
        self._snapshot = self._engine.snapshot()
        self._limits = self._engine.variants
