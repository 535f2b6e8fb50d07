"""Connections: the socket, and limits on those who open it and say nothing, too much or nonsense.

uvicorn bounds the length of a request's head; this adds a time for it to arrive, a number of connections,
and answers in the API's shape to what is not HTTP.
"""

import asyncio
import errno
import json
import socket
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

from moemerge.errors import Busy, InvalidRecipe
from moemerge.server.errors import ApiError, Kind, error_body
from moemerge.server.options import ServerOptions

_MALFORMED = Kind(400, "invalid_request_error", "malformed_request")
_FULL = Kind(503, "server_error", "too_many_connections")
_BACKLOG = 1024


def open_socket(host: str, port: int, write_timeout_s: float) -> socket.socket:
    """A bound socket that does not listen yet; port 0 for any free one.

    Raises:
        InvalidRecipe: The address does not exist here, or this user may not have the port.
        Busy: The port is taken.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (OSError, UnicodeError) as error:
        raise InvalidRecipe(f"--host {host}: no such address ({error})") from error
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        _set_timeouts(listener, write_timeout_s)
        listener.bind(address)
    except OSError as error:
        listener.close()
        if error.errno != errno.EADDRINUSE:
            raise InvalidRecipe(f"cannot listen on {host}, port {port}: {error.strerror}") from error
        raise Busy(f"port {port} of {host} is taken; choose another with --port, 0 for any") from error
    listener.setblocking(False)
    return listener


def url_of(listener: socket.socket) -> str:
    """Where the socket can be reached."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class BoundedConnection(H11Protocol):
    """A connection that must bring whole requests in time."""

    def __init__(self, *args: Any, limits: ServerOptions, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._limits = limits
        self._head_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin to wait for a request."""
        super().connection_made(transport)
        if len(self.connections) > self._limits.max_connections:
            most = self._limits.max_connections
            message = f"{most} connections are open, the most allowed. Try again in 1 s"
            self._refuse(ApiError(_FULL, message, retry_after_s=1))
            return
        self._watch()

    def data_received(self, data: bytes) -> None:
        """Take in bytes."""
        super().data_received(data)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop waiting."""
        self._unwatch()
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:
        """Answer to what is not HTTP; in the middle of another answer, only hang up."""
        if self.cycle is not None and self.cycle.response_started and not self.cycle.response_complete:
            self.transport.close()
            return
        self._refuse(ApiError(_MALFORMED, f"{msg.rstrip('.')}: malformed, or its head is too long"))

    def _watch(self) -> None:
        """Time runs while no request is being answered and one has begun to arrive."""
        if self.cycle is not None and not self.cycle.response_complete:
            self._unwatch()
        elif self._head_timer is None and not self.transport.is_closing():
            self._head_timer = self.loop.call_later(self._limits.header_timeout_s, self.transport.abort)

    def _unwatch(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _refuse(self, error: ApiError) -> None:
        body = json.dumps(error_body(error)).encode()
        head = [
            f"HTTP/1.1 {error.status_code} Refused",
            "Content-Type: application/json",
            f"Content-Length: {len(body)}",
            "Connection: close",
            *(f"{name}: {value}" for name, value in (error.headers or {}).items()),
        ]
        self.transport.write("\r\n".join([*head, "", ""]).encode() + body)
        self.transport.close()


def _set_timeouts(listener: socket.socket, write_timeout_s: float) -> None:
    """Let the kernel close connections whose other end has gone; those accepted inherit this."""
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (
        ("TCP_KEEPIDLE", 30),
        ("TCP_KEEPINTVL", 10),
        ("TCP_KEEPCNT", 3),
        ("TCP_USER_TIMEOUT", int(1000 * write_timeout_s)),
    ):
        if hasattr(socket, option):
            listener.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
