"""A headless Chromium that tests lead by the hand: the DevTools protocol, in a pipe."""

from __future__ import annotations

import base64
import contextlib
import fcntl
import json
import os
import select
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import needs
import web

PHONE, LAPTOP, DESKTOP = 360, 1280, 1920  # widths in pixels


class Browser:
    """One page of Chromium, and what went wrong on it."""

    def __init__(self, folder: Path) -> None:
        """Start it with a profile in a folder; it reads at 3 and writes at 4."""
        reads, self.writes = os.pipe()
        self.reads, writes = os.pipe()
        ends = [fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10) for end in (reads, writes)]
        words = [*web.CHROMIUM, f"--user-data-dir={folder / 'profile'}"]
        self.process = subprocess.Popen(
            [*words, "--remote-debugging-pipe", "about:blank"],
            env={"PATH": os.environ["PATH"], "HOME": str(folder), "LANG": "C.UTF-8"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            preexec_fn=lambda: [os.dup2(end, 3 + n) for n, end in enumerate(ends)],
            pass_fds=[3, 4],
            start_new_session=True,
        )
        for end in (reads, writes, *ends):
            os.close(end)
        self.received, self.calls = b"", 0
        self.session: dict[str, str] = {}
        self.complaints: list[Any] = []
        new = self.call("Target.createTarget", url="about:blank")["targetId"]
        found = self.call("Target.attachToTarget", targetId=new, flatten=True)
        self.session = {"sessionId": found["sessionId"]}
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> Any:
        """Ask for something, and return the answer."""
        self.calls += 1
        asked = {"id": self.calls, "method": method, "params": parameters}
        os.write(self.writes, json.dumps({**asked, **self.session}).encode() + b"\0")
        while (told := self.next_message()).get("id") != self.calls:
            name = told.get("method")
            if name in ("Runtime.exceptionThrown", "Log.entryAdded"):
                self.complaints.append(told)
        assert "error" not in told, (method, told)
        return told["result"]

    def next_message(self) -> dict[str, Any]:
        """Return what it says next."""
        until = time.monotonic() + 60
        while b"\0" not in self.received:
            left = max(0, until - time.monotonic())
            assert select.select([self.reads], [], [], left)[0], "it says nothing"
            assert (data := os.read(self.reads, 1 << 20)), "it has gone"
            self.received += data
        message, _, self.received = self.received.partition(b"\0")
        found = json.loads(message)
        assert isinstance(found, dict)
        return found

    def run(self, script: str) -> Any:
        """Return what an expression of JavaScript is, once its promise is kept."""
        found = self.call(
            "Runtime.evaluate",
            expression=script,
            returnByValue=True,
            awaitPromise=True,
            userGesture=True,
        )
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def resize(self, width: int, height: int = 900) -> None:
        """Be a screen of this width in pixels; a narrow one is that of a phone."""
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=width < 600,
        )

    def set_scheme(self, scheme: str) -> None:
        """Prefer dark colors, or light ones."""
        feature = {"name": "prefers-color-scheme", "value": scheme}
        self.call("Emulation.setEmulatedMedia", features=[feature])

    def type(self, text: str) -> None:
        """Type into what has the focus."""
        self.call("Input.insertText", text=text)

    def press(self, key: str) -> None:
        """Press a key and let it go."""
        text = {"Enter": "\r"}.get(key, "")
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key, text=text)

    def picture(self, path: Path) -> None:
        """Write a PNG of what is on the screen."""
        found = self.call("Page.captureScreenshot", format="png")
        path.write_bytes(base64.b64decode(found["data"]))

    def close(self) -> None:
        """Stop it, and those that it started."""
        os.close(self.writes)
        os.close(self.reads)
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


@contextlib.contextmanager
def chromium(folder: Path) -> Iterator[Browser]:
    """Give a Chromium; it must have found no fault with what it was shown."""
    needs.programs("chromium")
    browser = Browser(folder)
    try:
        yield browser
        assert browser.complaints == []
    finally:
        browser.close()
