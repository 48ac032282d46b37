"""A headless chromium that is spoken to over a pipe: real keys, media and sizes, and what its console said."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

#: The browser reads commands from descriptor 3 and writes to 4.
_PIPES = 'exec 3<&"$0" 4>&"$1"; shift; exec chromium "$@"'


class Page:
    """One page of the browser."""

    def __init__(self, commands: int, answers: int) -> None:
        self._commands, self._answers = os.fdopen(commands, "wb", 0), os.fdopen(answers, "rb")
        self._sent, self.console = 0, list[str]()
        self._session: str | None = None
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """A command of the DevTools protocol, and its result."""
        self._sent += 1
        session = {} if self._session is None else {"sessionId": self._session}
        self._commands.write(
            json.dumps({"id": self._sent, "method": method, "params": params} | session).encode() + b"\0"
        )
        while (found := self._next()).get("id") != self._sent:
            pass
        assert "result" in found, found
        return dict(found["result"])

    def _next(self) -> dict[str, Any]:
        text = b""
        while not text.endswith(b"\0"):
            piece = self._answers.read1(1)  # type: ignore[attr-defined]
            assert piece, "the browser has gone"
            text += piece
        found: dict[str, Any] = json.loads(text[:-1])
        if found.get("method") in ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded"):
            self.console.append(json.dumps(found["params"]))
        return found

    def open(self, html: Path, width: int = 1100, **media: str) -> None:
        """Load a file, as wide as given, with media features such as `prefers_color_scheme="dark"`."""
        features = [{"name": name.replace("_", "-"), "value": value} for name, value in media.items()]
        self.call("Emulation.setEmulatedMedia", features=features)
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False)
        self.call("Page.navigate", url=html.as_uri())
        while self._next().get("method") != "Page.loadEventFired":
            pass

    def value(self, expression: str) -> Any:
        """What an expression gives in the page; a promise is waited for."""
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def press(self, key: str, code: int) -> None:
        """A key goes down and up."""
        for kind in ("rawKeyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code)


@contextmanager
def browser(profile: Path) -> Iterator[Page]:
    """A browser with an empty profile, gone when the block ends."""
    (in_read, in_write), (out_read, out_write) = os.pipe(), os.pipe()
    process = subprocess.Popen(
        ["bash", "-c", _PIPES, str(in_read), str(out_write), "--headless", "--no-sandbox", "--disable-gpu",
         "--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync",
         "--hide-scrollbars", f"--user-data-dir={profile}", "--remote-debugging-pipe"],
        pass_fds=(in_read, out_write), stderr=subprocess.DEVNULL,
    )  # fmt: skip
    os.close(in_read)
    os.close(out_write)
    try:
        yield Page(in_write, out_read)
    finally:
        process.terminate()
        process.wait(30)
