"""A local stand-in for the model hub: enough of its protocol that the real client downloads from it."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlparse

COMMITS = {"main": "1" * 40, "v2": "2" * 40}


@dataclass
class Hub:
    """What is served: repositories by `models/org/name` or `datasets/org/name`, and what was asked for."""

    repositories: dict[str, Path]
    gated: set[str] = field(default_factory=set)
    tokens: list[str | None] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)
    broken_files: set[str] = field(default_factory=set)
    url: str = ""


class _Handler(BaseHTTPRequestHandler):
    hub: Hub

    def log_message(self, *_args: Any) -> None:
        """Keep quiet."""

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, body: bool) -> None:
        path = unquote(urlparse(self.path).path).strip("/")
        self.hub.requests.append(path)
        self.hub.tokens.append(self.headers.get("Authorization"))
        if path.startswith("api/"):
            kind, org, name, verb, revision = path.removeprefix("api/").split("/")[:5]
            file = ""
        else:
            kind, path = ("datasets", path[9:]) if path.startswith("datasets/") else ("models", path)
            org, name, verb, revision, file = path.split("/", 4)
        repo = f"{kind}/{org}/{name}"
        folder = self.hub.repositories.get(repo)
        if folder is None:
            return self.fail(401, "RepoNotFound", "Invalid username or password.")
        if repo in self.hub.gated and self.headers.get("Authorization") != "Bearer let-me-in":
            return self.fail(403, "GatedRepo", "Access to this repository is restricted.")
        sha = COMMITS.get(revision, revision)
        if sha not in COMMITS.values():
            return self.fail(404, "RevisionNotFound", "Invalid rev id")
        if verb == "revision":
            return self.send(json.dumps({"id": f"{org}/{name}", "sha": sha, "siblings": []}).encode(), body)
        files = {str(p.relative_to(folder)): p for p in folder.rglob("*") if p.is_file()}
        if verb == "tree":
            tree = [
                {"type": "file", "path": n, "size": p.stat().st_size, "oid": _oid(p)} for n, p in sorted(files.items())
            ]
            return self.send(json.dumps(tree).encode(), body)
        if file not in files:
            return self.fail(404, "EntryNotFound", "Entry not found")
        if file in self.hub.broken_files and body:
            return self.fail(503, "", "out of order")
        return self.send(files[file].read_bytes(), body, {"ETag": f'"{_oid(files[file])}"', "X-Repo-Commit": sha})

    def send(self, data: bytes, body: bool, headers: dict[str, str] | None = None) -> None:
        self.send_response(200)
        for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(data)

    def fail(self, status: int, code: str, message: str) -> None:
        self.send_response(status)
        for name, value in {"X-Error-Code": code, "X-Error-Message": message, "Content-Length": "0"}.items():
            self.send_header(name, value)
        self.end_headers()


def _oid(path: Path) -> str:
    return hashlib.sha1(path.read_bytes()).hexdigest()


@contextmanager
def serving(**repositories: Path) -> Iterator[Hub]:
    """Serve repositories (`models__org__name=folder`) on a free local port."""
    hub = Hub({name.replace("__", "/"): folder for name, folder in repositories.items()})
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
