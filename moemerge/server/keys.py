"""API keys: read from a file, compared in constant time, asked for before anything else is looked at."""

import hashlib
import hmac
import re
import stat
from collections.abc import Sequence
from pathlib import Path

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from moemerge.errors import InvalidRecipe, NotFound
from moemerge.server.errors import ApiError, Kind, error_response

OPEN_PATHS = frozenset({"/health", "/ready", "/docs", "/openapi.json"})
_WRONG_KEY = Kind(401, "authentication_error", "invalid_api_key")


def read_keys(path: Path) -> tuple[str, ...]:
    """The keys in a file, one per line; empty lines do not count.

    Raises:
        NotFound: There is no such file.
        InvalidRecipe: Others may read or change it, it holds no key, or one that no client could send.
    """
    try:
        mode = path.stat().st_mode
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise NotFound(f"{path}: no such file") from error
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidRecipe(f"{path}: cannot be read as a file of keys ({error})") from error
    if mode & (stat.S_IRWXO | stat.S_IWGRP):
        raise InvalidRecipe(
            f"{path}: its mode is {stat.S_IMODE(mode):04o}, so other users can read or change the keys. "
            f"Run chmod 600 {path}"
        )
    keys = tuple(line.strip() for line in text.splitlines() if line.strip())
    if not keys:
        raise InvalidRecipe(f"{path}: holds no key; write one per line")
    if wrong := [number for number, key in enumerate(keys, 1) if not re.fullmatch(r"[!-~]+", key)]:
        raise InvalidRecipe(f"{path}: key {wrong[0]} has spaces or characters beyond ASCII")
    return keys


class KeyGate:
    """Lets only those through who send one of the keys."""

    def __init__(self, app: ASGIApp, keys: Sequence[str]) -> None:
        self._app = app
        self._digests = [_digest(key.encode()) for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on, or answer 401."""
        is_open = scope["type"] != "http" or not self._digests or _path(scope) in OPEN_PATHS
        if is_open or self._holds_key(Headers(scope=scope).get("authorization")):
            await self._app(scope, receive, send)
            return
        refused = ApiError(_WRONG_KEY, "missing or wrong API key; send Authorization: Bearer KEY")
        refused.headers = {"WWW-Authenticate": "Bearer"}
        await error_response(refused)(scope, receive, send)

    def _holds_key(self, header: str | None) -> bool:
        scheme, _, key = (header or "").partition(" ")
        given = _digest(key.strip().encode("utf-8", "replace"))
        # All are compared, so that the time tells nothing.
        matches = [hmac.compare_digest(given, digest) for digest in self._digests]
        return scheme.lower() == "bearer" and any(matches)


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


def _path(scope: Scope) -> str:
    path: str = scope["path"]
    return path.removeprefix(scope.get("root_path", ""))
