"""A small hub on this machine: the routes that huggingface_hub's client takes for a push, and a record of what came."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

TOKEN = "hf_right"
LARGE = (".safetensors", ".bin", ".gguf")
"""Files that go to the large file storage."""


@dataclass
class Hub:
    """What the server was told, and how it is to answer."""

    url: str = ""
    repos: dict[str, dict[str, Any]] = field(default_factory=dict)
    commits: list[dict[str, Any]] = field(default_factory=list)
    branches: list[str] = field(default_factory=list)
    stored: dict[str, bytes] = field(default_factory=dict)
    """Large files by their sha256."""
    requests: list[tuple[str, str]] = field(default_factory=list)
    failures: int = 0
    """Commits that are answered with 503 before one is taken."""

    def files(self, number: int = -1) -> dict[str, bytes]:
        """Paths to contents of a commit."""
        found = {}
        for line in self.commits[number]["lines"]:
            value = line["value"]
            if line["key"] == "file":
                found[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                found[value["path"]] = self.stored[value["oid"]]
        return found


class _Server(ThreadingHTTPServer):
    hub: Hub


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def log_message(self, *_: object) -> None:
        pass

    def answer(self, body: Any, status: int = 200) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def body(self) -> bytes:
        self.server.hub.requests.append((self.command, self.path))
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        chunks = b""
        while size := int(self.rfile.readline(), 16):
            chunks += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return chunks

    def do_GET(self) -> None:
        self.body()
        name = self.path.removeprefix("/api/models/").partition("?")[0]
        found = self.server.hub.repos.get(name)
        if found is None:
            self.answer({"error": "Repository not found"}, 404)
        else:
            self.answer({"id": name, "private": found["private"], "tags": [], "siblings": []})

    def do_PUT(self) -> None:
        self.server.hub.stored[self.path.rpartition("/")[2]] = self.body()
        self.answer({})

    def do_POST(self) -> None:
        raw = self.body()
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self.answer({"error": "Invalid credentials"}, 401)
            return
        routes = (
            ("/api/repos/create", self.create),
            ("/api/validate-yaml", self.validate),
            ("/preupload/", self.preupload),
            ("/info/lfs/objects/batch", self.batch),
            ("/branch/", self.branch),
            ("/commit/", self.commit),
        )
        for part, route in routes:
            if part in self.path:
                route(raw)
                return
        self.answer({"error": f"no route {self.path}"}, 404)

    def create(self, raw: bytes) -> None:
        told, hub = json.loads(raw), self.server.hub
        name = f"{told['organization']}/{told['name']}"
        if name in hub.repos:
            self.answer({"error": "You already created this model repo", "url": f"{hub.url}/{name}"}, 409)
            return
        hub.repos[name] = {"private": bool(told.get("private")) or told.get("visibility") == "private"}
        self.answer({"url": f"{hub.url}/{name}"})

    def validate(self, raw: bytes) -> None:
        self.answer({"errors": [], "warnings": []})

    def preupload(self, raw: bytes) -> None:
        modes = [(f["path"], "lfs" if f["path"].endswith(LARGE) else "regular") for f in json.loads(raw)["files"]]
        self.answer({"files": [{"path": p, "uploadMode": mode, "shouldIgnore": False} for p, mode in modes]})

    def batch(self, raw: bytes) -> None:
        made = []
        for told in json.loads(raw)["objects"]:
            place = {"href": f"{self.server.hub.url}/store/{told['oid']}"}
            made.append({"oid": told["oid"], "size": told["size"], "actions": {"upload": place}})
        self.answer({"transfer": "basic", "objects": made})

    def branch(self, raw: bytes) -> None:
        self.server.hub.branches.append(self.path.rpartition("/")[2])
        self.answer({})

    def commit(self, raw: bytes) -> None:
        hub = self.server.hub
        if hub.failures:
            hub.failures -= 1
            self.answer({"error": "over capacity"}, 503)
            return
        lines = [json.loads(line) for line in raw.splitlines() if line.strip()]
        hub.commits.append({"branch": self.path.rpartition("/")[2], "lines": lines})
        name = self.path.removeprefix("/api/models/").partition("/commit/")[0]
        oid = "0" * 40
        self.answer({"success": True, "commitOid": oid, "commitUrl": f"{hub.url}/{name}/commit/{oid}"})


@contextmanager
def served() -> Iterator[Hub]:
    """The hub, listening on a port of its own until the block ends."""
    hub = Hub()
    server = _Server(("127.0.0.1", 0), _Handler)
    server.hub = hub
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def asked_instead(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let huggingface_hub's client take this hub for the hub, with a token that it knows; without xet, which is no HTTP
    that could be answered here."""
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.url)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
