"""A hub on the loopback interface: the part of the HTTP API that downloads use, and uploads beside it.

Serves folders as repositories with commits, branches, gates and broken connections, and counts the
bytes of every file that it sends. Large files are answered, as the real hub does, with a redirect to
another host name. Speaks what `huggingface_hub` 1.x and 2.x ask for.
"""

import hashlib
import json
import re
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from tests.e2e.hub_uploads import Uploads

LARGE = (".safetensors", ".bin")
TREE_PAGE = 5
_SEND_BYTES = 16 * 1024


@dataclass
class Cut:
    """Connections that break when a file's byte `offset` is reached, so many times (None: always)."""

    offset: int
    times: int | None = 1


@dataclass
class ServedRepository:
    """Commits with their files, and where branches point."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    gated: bool = False


class HubServer:
    """Use as a context manager; set `HF_ENDPOINT` to `url`."""

    def __init__(self) -> None:
        self.repositories: dict[str, ServedRepository] = {}
        self.sent: Counter[str] = Counter()
        self.requests: list[str] = []
        self.cuts: dict[str, Cut] = {}
        self.delay_s = 0.0
        self.ignore_ranges = False
        self.token = "hf_of_the_tests"
        self.private: dict[str, bool] = {}
        self.stored: dict[str, bytes] = {}
        self.refused_uploads = 0
        self.on_headers: Callable[[str, Message], object] = lambda path, headers: None
        self._lock = threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler_for(self))
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01})

    def __enter__(self) -> "HubServer":
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    @property
    def port(self) -> int:
        return int(self._server.server_address[1])

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def add(self, name: str, folder: Path, branch: str = "main") -> str:
        """Commit a folder's files to a branch; earlier commits stay. Returns the commit."""
        files = {item.name: item.read_bytes() for item in sorted(folder.iterdir()) if item.is_file()}
        return self.commit(name, files, branch)

    def commit(self, name: str, files: dict[str, bytes], branch: str = "main") -> str:
        repository = self.repositories.setdefault(name, ServedRepository())
        text = "".join(f"{key} {_etag(raw)}\n" for key, raw in files.items())
        commit = hashlib.sha1(f"{len(repository.commits)} {text}".encode()).hexdigest()
        repository.commits[commit] = files
        repository.branches[branch] = commit
        return commit

    def count(self, key: str, num_bytes: int) -> None:
        with self._lock:
            self.sent[key] += num_bytes

    def take_cut(self, key: str, start: int, end: int) -> int | None:
        """Where to break this answer, if it is to be broken."""
        with self._lock:
            cut = self.cuts.get(key)
            if cut is None or cut.times == 0 or not start <= cut.offset < end:
                return None
            if cut.times is not None:
                cut.times -= 1
            return cut.offset


def _etag(raw: bytes) -> str:
    return hashlib.sha256(raw).hexdigest()


def _handler_for(server: HubServer) -> type[BaseHTTPRequestHandler]:
    hub = server

    class Handler(Uploads):
        hub = server
        large = LARGE
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def log_message(self, *args: object) -> None:
            """Say nothing."""

        def do_HEAD(self) -> None:
            self._answer()

        def do_GET(self) -> None:
            self._answer()

        def _answer(self) -> None:
            url = urlsplit(self.path)
            path = unquote(url.path)
            hub.requests.append(f"{self.command} {path}")
            time.sleep(hub.delay_s)
            hub.on_headers(path, self.headers)
            if path == "/api/whoami-v2":
                self._whoami()
            elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/(.+))?", path):
                self._model_info(match[1], match[2] or "main")
            elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/([^/]+)", path):
                self._tree(match[1], match[2], parse_qs(url.query))
            elif match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
                self._resolve(match[1], match[2], match[3])
            elif match := re.fullmatch(r"/cdn/([^/]+/[^/]+)/([0-9a-f]{40})/(.+)", path):
                raw = hub.repositories[match[1]].commits[match[2]][match[3]]
                self._send_file(f"{match[1]}/{match[3]}", raw, {"ETag": f'"{_etag(raw)}"'})
            else:
                self._refuse(404, "", "no such page")

        def _whoami(self) -> None:
            if self.headers.get("Authorization") == f"Bearer {hub.token}":
                self._send_json({"type": "user", "name": "tester", "orgs": []})
            else:
                self._refuse(401, "", "Invalid username or password.")

        def _find(self, name: str, revision: str) -> tuple[ServedRepository, str] | None:
            repository = hub.repositories.get(name)
            if repository is None:
                # What the real hub says to somebody without a token.
                self._refuse(401, "RepoNotFound", "Invalid username or password.")
                return None
            commit = repository.branches.get(revision, revision)
            if commit not in repository.commits:
                self._refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
                return None
            return repository, commit

        def _model_info(self, name: str, revision: str) -> None:
            if found := self._find(name, revision):
                repository, commit = found
                siblings = [{"rfilename": key} for key in repository.commits[commit]]
                gated = "manual" if repository.gated else False
                info = {"id": name, "modelId": name, "sha": commit, "private": False, "gated": gated}
                self._send_json({**info, "siblings": siblings, "tags": [], "downloads": 0})

        def _tree(self, name: str, revision: str, query: dict[str, list[str]]) -> None:
            if not (found := self._find(name, revision)):
                return
            repository, commit = found
            files = repository.commits[commit].items()
            everything = query.get("recursive", ["False"])[0].lower() == "true"
            entries = [self._entry(*item) for item in files if everything or "/" not in item[0]]
            first = int(query.get("cursor", ["0"])[0])
            headers = {}
            if first + TREE_PAGE < len(entries):
                page = f"recursive={everything}&cursor={first + TREE_PAGE}"
                headers["Link"] = f'<{hub.url}/api/models/{name}/tree/{revision}?{page}>; rel="next"'
            self._send_json(entries[first : first + TREE_PAGE], headers)

        def _entry(self, path: str, raw: bytes) -> dict[str, Any]:
            entry: dict[str, Any] = {"type": "file", "path": path, "size": len(raw), "oid": _etag(raw)[:40]}
            if path.endswith(LARGE):
                entry["lfs"] = {"oid": _etag(raw), "size": len(raw), "pointerSize": 134}
            return entry

        def _resolve(self, name: str, revision: str, path: str) -> None:
            if not (found := self._find(name, revision)):
                return
            repository, commit = found
            if repository.gated:
                status = 403 if self.headers.get("Authorization") else 401
                self._refuse(status, "GatedRepo", f"Access to model {name} is restricted.")
                return
            raw = repository.commits[commit].get(path)
            if raw is None:
                self._refuse(404, "EntryNotFound", "Entry not found", {"X-Repo-Commit": commit})
                return
            headers = {"X-Repo-Commit": commit, "ETag": f'"{_etag(raw)[:40]}"'}
            if not path.endswith(LARGE):
                self._send_file(f"{name}/{path}", raw, headers)
                return
            headers |= {"X-Linked-Size": str(len(raw)), "X-Linked-ETag": f'"{_etag(raw)}"'}
            # Another host name, as the real hub's storage has: the token must not follow there.
            headers["Location"] = f"http://localhost:{hub.port}/cdn/{name}/{commit}/{path}"
            self._send(302, b"", headers)

        def _send_file(self, key: str, raw: bytes, headers: dict[str, str]) -> None:
            start, end, status = 0, len(raw), 200
            asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
            if asked and not hub.ignore_ranges:
                start = int(asked[1])
                end = min(int(asked[2]) + 1, len(raw)) if asked[2] else len(raw)
                if start >= len(raw):
                    self._send(416, b"", {"Content-Range": f"bytes */{len(raw)}"})
                    return
                status = 206
                headers = {**headers, "Content-Range": f"bytes {start}-{end - 1}/{len(raw)}"}
            headers = {**headers, "Accept-Ranges": "bytes"}
            if self.command == "HEAD":
                self._send(status, b"", headers, length=end - start)
                return
            self._stream(key, raw[start:end], hub.take_cut(key, start, end), start, status, headers)

        def _stream(
            self, key: str, body: bytes, cut: int | None, start: int, status: int, headers: dict[str, str]
        ) -> None:
            self._head(status, headers, len(body))
            stop = len(body) if cut is None else cut - start
            try:
                for first in range(0, stop, _SEND_BYTES):
                    chunk = body[first : min(first + _SEND_BYTES, stop)]
                    # Before, so that whoever has received the bytes finds them counted.
                    hub.count(key, len(chunk))
                    self.wfile.write(chunk)
            except (BrokenPipeError, ConnectionResetError):
                self.close_connection = True
            if cut is not None:
                self.wfile.flush()
                self.close_connection = True
                self.connection.shutdown(socket.SHUT_RDWR)

        def _refuse(
            self, status: int, code: str, message: str, headers: dict[str, str] | None = None
        ) -> None:
            named = {"X-Error-Code": code, "X-Error-Message": message, **(headers or {})}
            self._send(status, json.dumps({"error": message}).encode(), named)

        def _send_json(self, value: object, headers: dict[str, str] | None = None) -> None:
            self._send(
                200, json.dumps(value).encode(), {"Content-Type": "application/json", **(headers or {})}
            )

        def _send(self, status: int, body: bytes, headers: dict[str, str], length: int | None = None) -> None:
            self._head(status, headers, len(body) if length is None else length)
            if self.command != "HEAD":
                self.wfile.write(body)

        def _head(self, status: int, headers: dict[str, str], length: int) -> None:
            self.send_response(status)
            for key, value in {**headers, "Content-Length": str(length)}.items():
                self.send_header(key, value)
            self.end_headers()

    return Handler
