"""The writing half of the hub on the loopback interface: repositories, branches, large files, commits."""

import base64
import hashlib
import json
import re
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler
from typing import Any
from urllib.parse import unquote, urlsplit


class Uploads(BaseHTTPRequestHandler):
    """Answers POST and PUT for whoever has the server's token.

    Mixed into the handler of `hub_server`, which has `hub`, `_refuse`, `_send`, `_send_json` and `_find`.
    """

    hub: Any
    large: tuple[str, ...]
    _refuse: Callable[..., None]
    _send: Callable[..., None]
    _send_json: Callable[..., None]
    _find: Callable[..., Any]

    def do_POST(self) -> None:
        self._write(
            (
                (r"/api/repos/create", self._create),
                (r"/api/validate-yaml", self._validate_card),
                (r"/api/models/([^/]+/[^/]+)/branch/(.+)", self._branch),
                (r"/api/models/([^/]+/[^/]+)/preupload/(.+)", self._preupload),
                (r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", self._batch),
                (r"/api/models/([^/]+/[^/]+)/commit/(.+)", self._commit),
            )
        )

    def do_PUT(self) -> None:
        self._write(((r"/lfs/([0-9a-f]{64})", self._store),))

    def _write(self, routes: tuple[tuple[str, Callable[..., None]], ...]) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append(f"{self.command} {path}")
        length = self.headers.get("Content-Length")
        body = self.rfile.read(int(length)) if length else self._read_chunks()
        stored = path.startswith("/lfs/")
        if not stored and self.headers.get("Authorization") != f"Bearer {self.hub.token}":
            self._refuse(401, "", "Invalid username or password.")
            return
        for pattern, answer in routes:
            if match := re.fullmatch(pattern, path):
                answer(body, *match.groups())
                return
        self._refuse(404, "", "no such page")

    def _read_chunks(self) -> bytes:
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _create(self, body: bytes) -> None:
        asked = json.loads(body)
        name = f"{asked['organization']}/{asked['name']}"
        if name.startswith("others/"):
            self._refuse(403, "", "You don't have the rights to create a model under this namespace")
            return
        self.hub.private[name] = asked.get("private") is True or asked.get("visibility") == "private"
        self.hub.commit(name, {})
        self._send_json({"url": f"{self.hub.url}/{name}", "name": name})

    def _validate_card(self, body: bytes) -> None:
        content = json.loads(body)["content"]
        if "license: unheard-of" in content:
            self._send(400, b'{"errors": [{"message": "license is unknown"}]}', {})
        else:
            self._send_json({"errors": [], "warnings": []})

    def _branch(self, body: bytes, name: str, branch: str) -> None:
        repository = self.hub.repositories[name]
        repository.branches.setdefault(branch, repository.branches["main"])
        self._send_json({})

    def _preupload(self, body: bytes, name: str, branch: str) -> None:
        files = json.loads(body)["files"]
        modes = {f["path"]: "lfs" if f["path"].endswith(self.large) else "regular" for f in files}
        self._send_json(
            {"files": [{"path": p, "uploadMode": mode, "shouldIgnore": False} for p, mode in modes.items()]}
        )

    def _batch(self, body: bytes, name: str) -> None:
        objects = []
        for item in json.loads(body)["objects"]:
            place = {"upload": {"href": f"{self.hub.url}/lfs/{item['oid']}"}}
            actions = {} if item["oid"] in self.hub.stored else {"actions": place}
            objects.append({**item, **actions})
        self._send_json({"transfer": "basic", "objects": objects})

    def _store(self, body: bytes, oid: str) -> None:
        if self.hub.refused_uploads > 0:
            self.hub.refused_uploads -= 1
            self._refuse(400, "", "the storage refuses")
            return
        assert hashlib.sha256(body).hexdigest() == oid
        self.hub.stored[oid] = body
        self._send(200, b"", {})

    def _commit(self, body: bytes, name: str, branch: str) -> None:
        repository = self.hub.repositories[name]
        parent = repository.branches[branch]
        files = dict(repository.commits[parent])
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "header" and value.get("parentCommit", parent) != parent:
                self._refuse(412, "", "A commit has happened since. Please refresh and try again.")
                return
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.stored[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        commit = self.hub.commit(name, files, branch)
        self._send_json(
            {"commitUrl": f"{self.hub.url}/{name}/commit/{commit}", "commitOid": commit, "hookOutput": ""}
        )
