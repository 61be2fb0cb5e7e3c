"""What the tests share: the real program, and servers and clients on real TCP."""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / "tests"))
PROGRAM = [sys.executable, str(ROOT / "natwork.py")]
LOOPBACK = "rules=allow to 127.0.0.0/8, ::1"  # the tests' outside is 127/8 too


def eventually(check: Callable[[], object], seconds: float = 10.0) -> object:
    """Return the first true answer of check(), asked again until a deadline."""
    deadline = time.monotonic() + seconds
    while not (answer := check()):
        assert time.monotonic() < deadline, f"not within {seconds} s: {check}"
        time.sleep(0.01)
    return answer


def whole_lines(log: Path) -> list[str]:
    """Return the lines of a log; one that crosses a page may be there by half."""
    return log.read_text().rpartition("\n")[0].splitlines()


class Gateway:
    """A running natwork.py: where it listens, and what it has written."""

    def __init__(
        self,
        folder: Path,
        options: tuple[str, ...],
        loopback: bool,
        program: list[str] = PROGRAM,
    ) -> None:
        self.log, self.errors = folder / "access.log", folder / "stderr"
        self.log.write_text("")
        self.listener = socket.create_server(("127.0.0.1", 0), backlog=512)
        self.address: tuple[str, int] = self.listener.getsockname()
        self.url = "http://%s:%d" % self.address
        settings = [f"log={self.log}", *([LOOPBACK] if loopback else []), *options]
        words = [word for setting in settings for word in ("-o", setting)]
        # As systemd does: the socket listens already, and is descriptor 3.
        launch = f"LISTEN_FDS=1 LISTEN_PID=$$ exec {shlex.join([*program, *words])}"
        self.process = subprocess.Popen(
            ["sh", "-c", launch],
            preexec_fn=lambda: os.dup2(self.listener.fileno(), 3),
            pass_fds=[3],
            stderr=self.errors.open("w"),
            cwd=folder,
            start_new_session=True,
        )

    def connect(self, timeout: float = 10.0) -> socket.socket:
        """Return a new connection to the gateway."""
        return socket.create_connection(self.address, timeout)

    def lines(self, count: int = 0) -> list[dict[str, str]]:
        """Return the access log as dictionaries, once it has count lines."""

        eventually(lambda: len(whole_lines(self.log)) >= count)
        lines = whole_lines(self.log)
        return [dict(w.split("=", 1) for w in line.split(" ")) for line in lines]

    def workers(self) -> list[int]:
        """Return the process numbers of the workers that live now."""
        path = f"/proc/{self.process.pid}/task/{self.process.pid}/children"
        return [int(pid) for pid in Path(path).read_text().split()]

    def stop(self) -> str:
        """Ask the gateway to stop; return what it said on standard error."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        code = self.process.wait(timeout=40)
        self.listener.close()
        said = self.errors.read_text()
        assert code == 0 and "Traceback" not in said, (code, said)
        with pytest.raises(ProcessLookupError):  # nobody of the group is left
            os.killpg(self.process.pid, 0)
        return said


@pytest.fixture
def natwork(tmp_path: Path) -> Iterator[Callable[..., Gateway]]:
    """Return a function that starts a gateway: natwork("spare_workers=2", ...)."""
    running: list[Gateway] = []

    def start(*options: str, loopback: bool = True, **program: list[str]) -> Gateway:
        folder = tmp_path / f"gateway{len(running)}"
        folder.mkdir()
        running.append(Gateway(folder, options, loopback, **program))
        return running[-1]

    yield start
    for gateway in running:
        gateway.stop()


class Origin:
    """A TCP server whose whole behaviour is one function of the test.

    handle(connection, origin) runs in a thread for each connection accepted.
    """

    ports: set[int] = set()  # that any origin has had

    def __init__(self, handle: Callable[..., None], host: str = "127.0.0.1") -> None:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        while True:
            self.listener = socket.create_server((host, 0), family=family, backlog=512)
            self.host, self.port = self.listener.getsockname()[:2]
            if self.port not in self.ports:
                break
            self.listener.close()  # the log has an earlier origin's lines with it
        self.ports.add(self.port)
        name = f"[{host}]" if ":" in host else host
        self.authority = f"{name}:{self.port}"
        self.url = f"http://{self.authority}"
        self.callers: list[tuple[str, int]] = []  # who connected, in order
        self.received: list[bytes] = []  # heads and bodies, as the test stores them
        self.handle = handle
        threading.Thread(target=self.run, daemon=True).start()

    def run(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, caller = self.listener.accept()
                connection.settimeout(20)
                self.callers.append(caller[:2])
                serve = threading.Thread(target=self.one, args=[connection])
                serve.daemon = True
                serve.start()

    def one(self, connection: socket.socket) -> None:
        with contextlib.suppress(OSError), connection:
            self.handle(connection, self)


@pytest.fixture
def origin() -> Iterator[Callable[..., Origin]]:
    """Return a function that starts an Origin: origin(handle, "127.0.0.3")."""
    started: list[Origin] = []

    def start(handle: Callable[..., None], host: str = "127.0.0.1") -> Origin:
        started.append(Origin(handle, host))
        return started[-1]

    yield start
    for one in started:
        with contextlib.suppress(OSError):
            one.listener.shutdown(socket.SHUT_RDWR)  # close() leaves accept() waiting
        one.listener.close()


def read_head(connection: socket.socket) -> bytes:
    """Take one head off a socket, byte for byte, blank line included."""
    head = b""
    while not head.endswith(b"\r\n\r\n"):
        byte = connection.recv(1)
        if not byte:
            break
        head += byte
    return head


def read_exactly(connection: socket.socket, size: int) -> bytes:
    """Take size bytes off a socket, fewer if it ends before."""
    body = bytearray()
    while len(body) < size and (
        piece := connection.recv(min(size - len(body), 1 << 20))
    ):
        body += piece
    return bytes(body)


def read_all(connection: socket.socket) -> bytes:
    """Take what comes until the other side closes or resets."""
    everything = bytearray()
    with contextlib.suppress(ConnectionResetError):
        while piece := connection.recv(65536):
            everything += piece
    return bytes(everything)
