"""Reading a request's body: JSON only, bounded in bytes and in time.

A route of class `JsonRoute` gives its handler a request whose body is read this way. Whatever cannot be
read is refused before any model of the body is looked at.
"""

import asyncio
import json
from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request, Response
from fastapi.routing import APIRoute

from moemerge.errors import Stopping
from moemerge.server.errors import ApiError, Kind, invalid, translate

_TOO_LARGE = Kind(413, "invalid_request_error", "body_too_large")
_TOO_SLOW = Kind(408, "invalid_request_error", "body_too_slow")
_WRONG_TYPE = Kind(415, "invalid_request_error", "unsupported_media_type")


class JsonRequest(Request):
    """A request whose body must be JSON."""

    @property
    def _limits(self) -> tuple[int, float]:
        options = self.app.state.serving.options
        return options.max_body_bytes, options.body_timeout_s

    async def body(self) -> bytes:
        """The whole body.

        Raises:
            ApiError: Not declared as plain JSON (415), too large (413), too slow (408), or not there when the
                server began to stop (503).
        """
        if not hasattr(self, "_body"):
            max_bytes, timeout_s = self._limits
            try:
                async with asyncio.timeout(timeout_s):
                    self._body = await self._read_unless_stopping(max_bytes)
            except TimeoutError:
                raise ApiError(_TOO_SLOW, f"the body did not arrive within {timeout_s:g} s") from None
        return self._body

    async def json(self) -> Any:
        """The value of the body.

        Raises:
            ApiError: Not JSON that can be read.
        """
        body = await self.body()
        # Long bodies would hold up the answers of others.
        return await asyncio.to_thread(parse_json, body) if len(body) > 2**16 else parse_json(body)

    async def _read_unless_stopping(self, max_bytes: int) -> bytes:
        reading = asyncio.ensure_future(self._read(max_bytes))
        stopping = asyncio.ensure_future(self.app.state.serving.stopping.wait())
        try:
            await asyncio.wait((reading, stopping), return_when=asyncio.FIRST_COMPLETED)
            if not reading.done():
                raise translate(Stopping("the server is stopping; the request had not arrived yet"))
            return reading.result()
        finally:
            reading.cancel()
            stopping.cancel()
            await asyncio.gather(reading, stopping, return_exceptions=True)

    async def _read(self, max_bytes: int) -> bytes:
        too_large = ApiError(_TOO_LARGE, f"the body is larger than {max_bytes} bytes")
        if _declared_bytes(self.headers.get("content-length")) > max_bytes:
            raise too_large
        self._require_plain()
        body = bytearray()
        async for chunk in self.stream():
            body += chunk
            if len(body) > max_bytes:
                raise too_large
        if body:
            self._require_json()
        return bytes(body)

    def _require_plain(self) -> None:
        encoding = self.headers.get("content-encoding", "")
        if encoding.strip().lower() not in ("", "identity"):
            raise ApiError(_WRONG_TYPE, f"Content-Encoding is {encoding[:100]!r}, expected none")

    def _require_json(self) -> None:
        declared = self.headers.get("content-type", "")
        if declared.partition(";")[0].strip().lower() != "application/json":
            raise ApiError(_WRONG_TYPE, f"Content-Type is {declared[:100]!r}, expected application/json")


class JsonRoute(APIRoute):
    """A route whose handler gets a `JsonRequest`."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """The handler, given a request of that kind."""
        handler = super().get_route_handler()

        async def handle(request: Request) -> Response:
            return await handler(JsonRequest(request.scope, request.receive))

        return handle


def parse_json(body: bytes) -> Any:
    """The value of a JSON text.

    Raises:
        ApiError: Not UTF-8, not JSON, nested too deeply, or with numbers or strings that are not to be had.
    """
    try:
        value = json.loads(body.decode("utf-8"), parse_constant=_refuse_constant)
        if b"\\ud" in body or b"\\uD" in body:
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeDecodeError as error:
        raise invalid(f"the body is not UTF-8: byte {error.start}", code="invalid_json") from None
    except UnicodeEncodeError:
        raise invalid("the body has half a surrogate pair in a string", code="invalid_json") from None
    except RecursionError:
        raise invalid("the body is nested too deeply", code="invalid_json") from None
    except json.JSONDecodeError as error:
        raise invalid(
            f"the body is not JSON: {error.msg} at line {error.lineno}, column {error.colno}",
            code="invalid_json",
        ) from None
    except ValueError as error:
        raise invalid(f"the body has a number that cannot be read: {error}", code="invalid_json") from None
    return value


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _declared_bytes(header: str | None) -> int:
    return int(header) if header is not None and header.isascii() and header.isdigit() else 0
