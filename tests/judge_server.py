"""A local stand-in for a judge's endpoint: what it is asked, and replies that a test decides on."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from abliterate.evaluate.agreement import labelled

GOLD = {text: label for _, text, label in labelled()}


@dataclass
class JudgeServer:
    """`reply(prompt, completion)` gives the word, or a status to fail with; all requests are kept."""

    reply: Callable[[str, str], str | int]
    url: str = ""
    paths: list[str] = field(default_factory=list)
    keys: list[str | None] = field(default_factory=list)
    bodies: list[dict[str, Any]] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def texts(self) -> list[tuple[str, str]]:
        """Prompt and completion of every question, as a reader of JSON finds them."""
        return [pair(body) for body in self.bodies]


def pair(body: dict[str, Any]) -> tuple[str, str]:
    """The two texts inside a question."""
    question = body["messages"][0]["content"]
    prompt, completion = (
        json.loads(line) for line in re.findall(r"^(?:request|completion): (.*)$", question, re.MULTILINE)
    )
    return prompt, completion


def right(_prompt: str, completion: str) -> str:
    """The label of a labelled completion; of any other, whether it says sorry."""
    return GOLD.get(completion, "refusal" if "help with that" in completion else "compliance")


class _Handler(BaseHTTPRequestHandler):
    served: JudgeServer

    def log_message(self, *_args: Any) -> None:
        """Keep quiet."""

    def do_GET(self) -> None:
        self.note()
        self.send(200, {"data": [{"id": "stand-in"}, {"id": "another"}]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.served.lock:
            self.note()
            self.served.bodies.append(body)
        reply = self.served.reply(*pair(body))
        if isinstance(reply, int):
            self.send(reply, {"error": {"message": "out of\x1b[31m order"}}, {"Location": "/elsewhere"})
        else:
            self.send(200, {"choices": [{"message": {"role": "assistant", "content": reply}}]})

    def note(self) -> None:
        self.served.paths.append(self.path)
        self.served.keys.append(self.headers.get("Authorization"))

    def send(self, status: int, value: Any, headers: dict[str, str] | None = None) -> None:
        data = json.dumps(value).encode()
        try:
            self.send_response(status)
            for name, text in {"Content-Length": str(len(data)), **(headers or {})}.items():
                self.send_header(name, text)
            self.end_headers()
            self.wfile.write(data)
        except BrokenPipeError:
            pass  # the client has given up, as the test about that wants


class _Server(ThreadingHTTPServer):
    request_queue_size = 64  # with the usual five, a burst of connections waits for a second


@contextmanager
def judging(reply: Callable[[str, str], str | int] = right) -> Iterator[JudgeServer]:
    """Serve on a free local port; `url` is the bare address."""
    served = JudgeServer(reply)
    server = _Server(("127.0.0.1", 0), type("Handler", (_Handler,), {"served": served}))
    served.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield served
    finally:
        server.shutdown()
        server.server_close()
