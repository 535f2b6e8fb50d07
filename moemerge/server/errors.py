"""Every answer that is an error: one table from our error tree to HTTP statuses, one shape.

The shape is OpenAI's: `{"error": {"message", "type", "param", "code"}}`.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

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
from moemerge.text.limits import ContextExceeded, InvalidRequest

_LONGEST_MESSAGE = 2000


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
_STOPPING_RETRY_S = 5


class ApiError(HTTPException):
    """An answer that is an error, decided where it is raised."""

    def __init__(
        self, kind: Kind, message: str, *, param: str | None = None, retry_after_s: int | None = None
    ) -> None:
        super().__init__(kind.status, message)
        self.kind = kind
        self.param = param
        self.headers = None if retry_after_s is None else {"Retry-After": str(retry_after_s)}


def invalid(message: str, param: str | None = None, code: str = "invalid_value") -> ApiError:
    """What the client asks for cannot be."""
    return ApiError(Kind(400, "invalid_request_error", code), message, param=param)


def translate(error: MoemergeError) -> ApiError:
    """The answer to one of our errors."""
    if isinstance(error, Overloaded):
        return _full(error)
    if isinstance(error, Stopping):
        advice = f"Try again in {_STOPPING_RETRY_S} s"
        return ApiError(KINDS[Stopping], f"{error}. {advice}", retry_after_s=_STOPPING_RETRY_S)
    if isinstance(error, InvalidRequest):
        code = "context_length_exceeded" if isinstance(error, ContextExceeded) else "invalid_value"
        return invalid(str(error), error.field, code)
    kind = next(KINDS[ancestor] for ancestor in type(error).__mro__ if ancestor in KINDS)
    return ApiError(kind, str(error))


def _full(error: Overloaded) -> ApiError:
    """The answer to a request for which there is no room in a queue."""
    is_of_variant = error.scope == "variant"
    retry_after_s = max(1, math.ceil(error.retry_after_s))
    option = "--max-queue-per-variant" if is_of_variant else "--max-queue"
    return ApiError(
        _QUEUE_OF_VARIANT_FULL if is_of_variant else KINDS[Overloaded],
        f"{error}. Try again in {retry_after_s} s; a server with a larger {option} lets more wait",
        retry_after_s=retry_after_s,
    )


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
