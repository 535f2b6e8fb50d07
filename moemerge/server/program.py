"""Runs the application in uvicorn until a signal, then lets what runs come to its end.

After the first SIGTERM or SIGINT new requests, and those whose body is still on its way, get 503 while
running ones have the drain time; after the second everything ends at once.
"""

import asyncio
import contextlib
import functools
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import uvicorn
from fastapi import FastAPI

from moemerge.bundle.reader import Bundle
from moemerge.runner.engine import Engine
from moemerge.runner.options import EngineOptions
from moemerge.runner.service import EngineService
from moemerge.server.app import build_app
from moemerge.server.connections import BoundedConnection, open_socket, url_of
from moemerge.server.options import ServerOptions
from moemerge.server.serving import Serving

_FLUSH_S = 5
"""Seconds that clients get to read the ends of their answers once the engine has stopped."""
_END_S = 5
"""Seconds that handlers get to notice that their clients have been cut off."""
_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Program(uvicorn.Server):
    """One server in one process or, for tests, in one thread.

    Attributes:
        forced_by: The second signal, if there was one.
    """

    def __init__(
        self,
        app: FastAPI,
        service: EngineService,
        options: ServerOptions,
        on_ready: Callable[[], None] = lambda: None,
    ) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                http=functools.partial(BoundedConnection, limits=options),  # type: ignore[arg-type]
                ws="none",
                lifespan="off",
                loop="asyncio",
                log_config=None,
                log_level="info" if options.access_log else "error",
                access_log=options.access_log,
                server_header=False,
                proxy_headers=False,
                root_path=options.root_path,
                h11_max_incomplete_event_size=options.max_header_bytes,
                timeout_graceful_shutdown=_FLUSH_S + _END_S,
            )
        )
        self._service = service
        self._serving: Serving = app.state.serving
        self._drain_s = options.drain_s
        self._on_ready = on_ready
        self._is_stopping = False
        self.forced_by: signal.Signals | None = None

    def run_on(self, listener: socket.socket) -> None:
        """Serve on a bound socket until stopped; signals count in the main thread only."""

        async def serve() -> None:
            self._loop = asyncio.get_running_loop()
            if threading.current_thread() is threading.main_thread():
                for number in _SIGNALS:
                    self._loop.add_signal_handler(number, self._stop, number)
            await self.serve([listener])

        asyncio.run(serve())

    def stop(self) -> None:
        """As the signals do, from any thread."""
        self._loop.call_soon_threadsafe(self._stop)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave signals to `run_on`: uvicorn's way ends the process with them."""
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, and say so."""
        await super().startup(sockets)
        self._on_ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """End; clients that do not read their answers in time are hung up on, and count as gone."""
        self._loop.call_later(_FLUSH_S, self._hang_up)
        await super().shutdown(sockets)

    def _stop(self, number: signal.Signals | None = None) -> None:
        self._serving.stopping.set()
        if self._is_stopping:
            self.forced_by = number
            self.force_exit = self.should_exit = True
            self._hang_up()
        drain_s = 0.0 if self._is_stopping else self._drain_s
        self._is_stopping = True
        threading.Thread(target=self._drain, args=(drain_s,), name="moemerge-drain", daemon=True).start()

    def _hang_up(self) -> None:
        for connection in list(self.server_state.connections):
            connection.transport.abort()

    def _drain(self, drain_s: float) -> None:
        self._service.stop(drain_s)
        self.should_exit = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Ready:
    """A server that takes requests: where, and for which variants."""

    url: str
    variants: tuple[str, ...]
    resident: tuple[str, ...]


def serve_bundle(
    bundle: Bundle,
    engine_options: EngineOptions,
    options: ServerOptions,
    *,
    host: str,
    port: int,
    max_queue: int,
    max_queue_per_variant: int | None,
    on_ready: Callable[[Ready], None],
    load: Callable[[Bundle, EngineOptions], Engine] = Engine,
) -> signal.Signals | None:
    """Load a bundle and serve it until a signal.

    `load` makes the engine; it may tell of progress.

    Returns:
        The second signal, which cut requests off; None when one was enough.

    Raises:
        InvalidRecipe, Busy: As `open_socket`.
        MoemergeError: As `Engine` and `ServedVariant`; a chat template that is none is refused here too.
    """
    with open_socket(host, port, options.write_timeout_s) as listener:
        engine = load(bundle, engine_options)
        engine.preload()
        service = EngineService(engine, max_queue=max_queue, max_queue_per_variant=max_queue_per_variant)
        # What could never wait all at once is refused for good, not for now.
        room = min(max_queue, max_queue if max_queue_per_variant is None else max_queue_per_variant)
        most = min(options.max_choices, engine.options.max_batch + room)
        serving = Serving(bundle=bundle, service=service, options=replace(options, max_choices=most))
        for name in service.variants:
            serving.variant(name).require_readable()

        def announce() -> None:
            states = service.snapshot().variants
            on_ready(
                Ready(
                    url=url_of(listener) + options.root_path,
                    variants=tuple(states),
                    resident=tuple(name for name, state in states.items() if state.state == "resident"),
                )
            )

        program = Program(build_app(serving), service, options, announce)
        service.start()
        try:
            program.run_on(listener)
        finally:
            service.stop(0.0)
        return program.forced_by
