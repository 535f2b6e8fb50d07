"""Every answer that is an error: one table from our error tree to HTTP statuses, one shape.

The shape is OpenAI's: `{"error": {"message", "type", "param", "code"}}`.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from moemerge.errors import (
    Busy,
    DamagedInput,
    IncompatibleInputs,
    InvalidRecipe,
    MoemergeError,
    NetworkFailure,
    NotAuthorised,
    NotEnoughRoom,
    NotFound,
    Overloaded,
    QualityGateFailed,
    ServingError,
    Stopping,
)

_LONGEST_MESSAGE = 2000
_LONGEST_PARAM = 100


class Kind(NamedTuple):
    """How a failure is told to a client."""

    status: int
    type: str
    code: str


# The nearest class of an error's ancestry counts.
KINDS: Mapping[type[MoemergeError], Kind] = {
    InvalidRecipe: Kind(400, "invalid_request_error", "invalid_value"),
    IncompatibleInputs: Kind(400, "invalid_request_error", "not_supported"),
    NotFound: Kind(404, "invalid_request_error", "not_found"),
    NotAuthorised: Kind(403, "permission_error", "not_authorised"),
    NetworkFailure: Kind(502, "server_error", "network_failure"),
    NotEnoughRoom: Kind(503, "server_error", "not_enough_memory"),
    DamagedInput: Kind(500, "server_error", "damaged_bundle"),
    QualityGateFailed: Kind(500, "server_error", "quality_gate_failed"),
    Busy: Kind(409, "invalid_request_error", "busy"),
    Overloaded: Kind(503, "server_error", "overloaded"),
    Stopping: Kind(503, "server_error", "stopping"),
    ServingError: Kind(500, "server_error", "serving_error"),
    MoemergeError: Kind(500, "server_error", "internal_error"),
}
_QUEUE_OF_VARIANT_FULL = Kind(429, "rate_limit_error", "queue_full")
_STOPPING_RETRY_S = 5.0
_STATUS_KINDS = {
    400: Kind(400, "invalid_request_error", "invalid_request"),
    404: Kind(404, "invalid_request_error", "unknown_url"),
    405: Kind(405, "invalid_request_error", "method_not_allowed"),
}
_FIELD_CODES = {
    "extra_forbidden": "unknown_field",
    "missing": "missing_field",
    "unsupported_field": "unsupported_field",
}


class ApiError(HTTPException):
    """An answer that is an error, decided where it is raised."""

    def __init__(
        self, kind: Kind, message: str, *, param: str | None = None, retry_after_s: float | None = None
    ) -> None:
        super().__init__(kind.status, message)
        self.kind = kind
        self.param = param
        self.headers = {"Retry-After": str(max(1, math.ceil(retry_after_s)))} if retry_after_s else None


def invalid(message: str, param: str | None = None, code: str = "invalid_value") -> ApiError:
    """What the client asks for cannot be."""
    return ApiError(Kind(400, "invalid_request_error", code), message, param=param)


def translate(error: MoemergeError, param: str | None = None) -> ApiError:
    """The answer to one of our errors."""
    if isinstance(error, Overloaded):
        kind = _QUEUE_OF_VARIANT_FULL if error.scope == "variant" else KINDS[Overloaded]
        return ApiError(kind, str(error), retry_after_s=error.retry_after_s)
    kind = next(KINDS[ancestor] for ancestor in type(error).__mro__ if ancestor in KINDS)
    retry_after_s = _STOPPING_RETRY_S if isinstance(error, Stopping) else None
    return ApiError(kind, str(error), param=param, retry_after_s=retry_after_s)


def hide_folder(error: ApiError, folder: Path) -> ApiError:
    """The same error with only the name of the bundle's folder: where it lies is no client's business."""
    if folder.name:
        error.detail = str(error.detail).replace(str(folder), folder.name)
    return error


def error_body(error: ApiError) -> dict[str, Any]:
    """The object that a client gets."""
    message = str(error.detail)
    if len(message) > _LONGEST_MESSAGE:
        message = message[:_LONGEST_MESSAGE] + "..."
    kind = error.kind
    return {"error": {"message": message, "type": kind.type, "param": error.param, "code": kind.code}}


def error_response(error: ApiError) -> JSONResponse:
    """The answer as a response."""
    return JSONResponse(error_body(error), error.status_code, headers=error.headers)


def install_handlers(app: FastAPI) -> None:
    """Let the application answer every failure in the one shape."""

    async def on_http(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        told = error if isinstance(error, ApiError) else _plain(request, error)
        return error_response(hide_folder(told, request.app.state.serving.bundle.folder))

    async def on_ours(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, MoemergeError)
        return error_response(hide_folder(translate(error), request.app.state.serving.bundle.folder))

    async def on_invalid(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        return error_response(describe(error.errors()))

    async def on_bug(request: Request, error: Exception) -> JSONResponse:
        # The traceback goes to the log: the framework raises the error again after this answer.
        return error_response(
            ApiError(KINDS[MoemergeError], "internal error; the server's log has the details")
        )

    app.add_exception_handler(HTTPException, on_http)
    app.add_exception_handler(MoemergeError, on_ours)
    app.add_exception_handler(RequestValidationError, on_invalid)
    app.add_exception_handler(Exception, on_bug)


def describe(findings: Sequence[Any]) -> ApiError:
    """The answer to a body that does not fit its model: the first finding, and how many there are."""
    first = findings[0]
    context = first.get("ctx", {})
    param = context.get("field") or _place(first["loc"], keep_last=first["type"] == "extra_forbidden")
    code = _FIELD_CODES.get(first["type"], "invalid_value")
    message = "unknown field" if code == "unknown_field" else str(first["msg"])
    param = param[:_LONGEST_PARAM]
    message = f"{param}: {message}" if param and code != "unsupported_field" else message
    more = f" (and {len(findings) - 1} more)" if len(findings) > 1 else ""
    return invalid(message + more, param or None, code)


def _place(steps: Iterable[int | str], *, keep_last: bool) -> str:
    """The place in a body in a client's terms: without the names that pydantic gives to alternatives."""
    *outer, last = steps
    if not (keep_last or _is_named(last)):
        outer, last = outer, ""
    named = [str(step) for step in outer if _is_named(step)] + ([str(last)] if last != "" else [])
    return ".".join(named[1:] if named[:1] in (["body"], ["query"], ["path"]) else named)


def _is_named(step: int | str) -> bool:
    return isinstance(step, int) or (step.isidentifier() and step not in ("str", "int", "float", "bool"))


def _plain(request: Request, error: HTTPException) -> ApiError:
    """What the framework itself refuses: unknown addresses and methods, bodies it cannot read."""
    kind = _STATUS_KINDS.get(error.status_code)
    if kind is None:
        kind = Kind(error.status_code, "invalid_request_error", "refused")
    message = str(error.detail)
    if error.status_code in (404, 405):
        message = f"{request.method[:20]} {request.url.path[:200]}: {message.lower()}"
    refused = ApiError(kind, message)
    refused.headers = error.headers
    return refused
