"""Every failure of the application becomes an answer in the one shape."""

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from moemerge.errors import MoemergeError
from moemerge.server.errors import KINDS, ApiError, Kind, error_response, hide_folder, translate
from moemerge.server.findings import describe

_STATUS_KINDS = {
    400: Kind(400, "invalid_request_error", "invalid_request"),
    404: Kind(404, "invalid_request_error", "unknown_url"),
    405: Kind(405, "invalid_request_error", "method_not_allowed"),
}


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
