"""A server on a free port of the loopback interface, in a thread of the test's process."""

import contextlib
import json
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from moemerge.bundle.reader import open_bundle
from moemerge.runner.engine import Engine
from moemerge.runner.options import EngineOptions
from moemerge.runner.service import EngineService
from moemerge.server.app import build_app
from moemerge.server.connections import open_socket, url_of
from moemerge.server.options import ServerOptions
from moemerge.server.program import Program
from moemerge.server.serving import Serving

PATIENCE_S = 60.0


@dataclass(frozen=True)
class Served:
    """A running server."""

    url: str
    port: int
    service: EngineService
    program: Program
    http: httpx.Client

    def post(self, path: str, body: Any = None, **options: Any) -> httpx.Response:
        return self.http.post(path, json=body, **options)

    def wait_until_idle(self) -> None:
        """Until no request is left, and every block is free again."""
        wait_for(lambda: self.service.num_unfinished == 0)
        wait_for(lambda: self.service.snapshot().blocks_used == 0)
        self.service.verify_integrity()

    @contextlib.contextmanager
    def connect(self) -> Iterator[socket.socket]:
        """A bare connection."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=PATIENCE_S) as connection:
            yield connection


@contextlib.contextmanager
def serve(
    bundle: Path,
    *,
    engine: dict[str, Any] | None = None,
    queue: dict[str, Any] | None = None,
    send_buffer: int | None = None,
    **options: Any,
) -> Iterator[Served]:
    """A server over a bundle, until the end of the block."""
    opened, settings = open_bundle(bundle), ServerOptions(**{"drain_s": 0.0, **options})
    with open_socket("127.0.0.1", 0, settings.write_timeout_s) as listener:
        if send_buffer is not None:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer)
        service = EngineService(Engine(opened, EngineOptions(**(engine or {}))), **(queue or {}))
        serving = Serving(bundle=opened, service=service, options=settings)
        is_ready = threading.Event()
        program = Program(build_app(serving), service, settings, is_ready.set)
        url, port = url_of(listener), listener.getsockname()[1]
        service.start()
        thread = threading.Thread(target=program.run_on, args=(listener,))
        thread.start()
        assert is_ready.wait(PATIENCE_S)
        try:
            with httpx.Client(base_url=url, timeout=PATIENCE_S) as http:
                yield Served(url, port, service, program, http)
        finally:
            if thread.is_alive():
                program.stop()
            thread.join(PATIENCE_S)
            service.stop(0.0)
            assert not thread.is_alive()


def wait_for(condition: Any, patience_s: float = PATIENCE_S) -> None:
    """Until a condition holds."""
    deadline_s = time.monotonic() + patience_s
    while not condition():
        assert time.monotonic() < deadline_s, "waited in vain"
        time.sleep(0.01)


def error_of(answer: httpx.Response) -> dict[str, Any]:
    """The error of an answer, after a look at its shape."""
    assert answer.headers["content-type"].partition(";")[0] == "application/json"
    value = json.loads(answer.content)
    assert value.keys() == {"error"}
    assert value["error"].keys() == {"message", "type", "param", "code"}
    return value["error"]
