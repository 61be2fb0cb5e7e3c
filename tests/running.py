"""natwork.py as a command, and as a daemon with its own file; /proc; the README."""

from __future__ import annotations

import contextlib
import ctypes
import os
import pwd
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import LOOPBACK
from conftest import PROGRAM
from conftest import ROOT
from conftest import Gateway
from conftest import Origin
from conftest import eventually
from conftest import read_head
from wire import request
from wire import sized

PLAIN = [sys.executable, "-I", "-S", str(ROOT / "natwork.py")]  # nothing installed
SELF = pwd.getpwuid(os.geteuid()).pw_name  # keeps a gateway what it was started as
ACCEPTED = b"HTTP/1.1 200 "


def with_limit(folder: Path, name: str, value: float) -> list[str]:
    """Return what runs the same program with another number for one of its limits."""
    count = 0
    for path in ROOT.glob("natwork*.py"):  # the chapters too
        text, found = re.subn(
            rf"(?m)^{name} = [0-9.]+", f"{name} = {value}", path.read_text()
        )
        (folder / path.name).write_text(text)
        count += found
    assert count == 1, name
    return [sys.executable, str(folder / "natwork.py")]


def command(
    *arguments: str, cwd: Path, program: list[str] = PROGRAM
) -> subprocess.CompletedProcess[str]:
    """Run natwork.py to its end, and return how it ended and what it said."""
    return subprocess.run(
        [*program, *arguments],
        cwd=cwd,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=30,
    )


def configuration(settings: dict[str, str]) -> str:
    """Return the text of a configuration file."""
    lines = [f"{name} = {value}\n" for name, value in settings.items()]
    return "[natwork]\n" + "".join(lines)


class Daemon(Gateway):
    """A running natwork.py that opens its own listeners, from ./natwork.conf."""

    def __init__(
        self,
        folder: Path,
        *options: str,
        program: list[str] = PROGRAM,
        stdout: int | None = None,
        before: Callable[[], None] | None = None,
        **settings: str,
    ) -> None:
        self.folder, self.expected = folder, 0  # the exit code
        self.file, self.log = folder / "natwork.conf", folder / "access.log"
        self.errors = folder / "stderr"
        self.settings = {
            "listen": "127.0.0.1:0",
            "rules": LOOPBACK.removeprefix("rules="),
            "log": str(self.log),
            "user": SELF,
            **settings,
        }
        self.file.write_text(configuration(self.settings))
        self.log.touch()
        with self.errors.open("w") as errors:
            self.process = subprocess.Popen(
                [*program, *options],
                stdout=stdout,
                stderr=errors,
                cwd=folder,
                start_new_session=True,
                preexec_fn=before,
            )
        eventually(lambda: self.listening() or self.process.poll() is not None)
        self.address = self.listening()[0]

    def said(self) -> list[str]:
        """Return the lines on standard error."""
        return self.errors.read_text().splitlines()

    def listening(self) -> list[tuple[str, int]]:
        """Return the addresses it has said that it listens on, in order."""
        said = "\n".join([*self.said(), ""])
        found = re.findall(r"^natwork: listening on (.*):([0-9]+)\n", said, re.M)
        return [(host.strip("[]"), int(port)) for host, port in found]

    def hangup(self, **settings: str) -> str:
        """Change settings in the file, send HUP, and return what is said of it."""
        self.settings.update(settings)
        self.file.write_text(configuration(self.settings))

        def answers() -> list[str]:
            return [line for line in self.said() if "reloaded" in line]

        before = len(answers())
        self.process.send_signal(signal.SIGHUP)
        eventually(lambda: len(answers()) > before)
        return answers()[-1]

    def stop(self) -> str:
        """Ask it to stop, if it has not ended; return what it said."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        code = self.process.wait(timeout=40)
        said = self.errors.read_text()
        assert code == self.expected and "Traceback" not in said, (code, said)
        eventually(lambda: not group(self.process.pid))
        return said


def daemons() -> Callable[..., Iterator[Callable[..., Daemon]]]:
    """Return a module's fixture: a function that starts a Daemon with settings."""

    @pytest.fixture
    def start(tmp_path: Path) -> Iterator[Callable[..., Daemon]]:
        running: list[Daemon] = []

        def one(*options: str, **settings: Any) -> Daemon:
            folder = tmp_path / f"daemon{len(running)}"
            folder.mkdir()
            running.append(Daemon(folder, *options, **settings))
            return running[-1]

        yield one
        for daemon in running:
            daemon.stop()

    return start


class Held:
    """An origin that answers a request only when the test lets it."""

    def __init__(self) -> None:
        self.asked, self.go = threading.Event(), threading.Event()

    def __call__(self, connection: socket.socket, origin: Origin) -> None:
        if head := connection.recv(65536):
            origin.received.append(head)
            self.asked.set()
            self.go.wait(20)
            connection.sendall(sized(b"at last"))
            connection.recv(1)


def echo(connection: socket.socket, origin: Origin) -> None:
    """Be an origin that sends back what it gets."""
    while data := connection.recv(65536):
        connection.sendall(data)


def tunnel(gateway: Gateway, origin: Origin) -> socket.socket:
    """Return a client's end of an open tunnel to an origin that echoes."""
    client = gateway.connect()
    client.sendall(request(origin, method=b"CONNECT"))
    head = read_head(client)
    assert head.startswith(ACCEPTED), head
    return client


def echoes(client: socket.socket, words: bytes = b"still here") -> bool:
    """Say whether a tunnel still carries bytes there and back."""
    client.sendall(words)
    got = b""
    while len(got) < len(words) and (piece := client.recv(64)):
        got += piece
    return got == words


# The kernel's view.  Each of these is about a process that may end meanwhile.


def read_proc(pid: int, name: str) -> str:
    """Return a file of /proc/PID, "" when the process has ended."""
    try:
        return Path(f"/proc/{pid}/{name}").read_text(errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return ""


def title(pid: int) -> str:
    """Return the title that ps would show."""
    return read_proc(pid, "cmdline").partition("\0")[0]


def status(pid: int, name: str) -> str:
    """Return a line of /proc/PID/status."""
    match = re.search(rf"^{name}:[ \t]*(.*)$", read_proc(pid, "status"), re.M)
    return match[1].strip() if match else ""


def times(pid: int) -> float:
    """Return the seconds of CPU that a process and its reaped children have used."""
    fields = read_proc(pid, "stat").rpartition(")")[2].split()
    return sum(int(ticks) for ticks in fields[11:15]) / os.sysconf("SC_CLK_TCK")


def descriptors(pid: int) -> list[int]:
    """Return the descriptors that a process has open."""
    return sorted(int(name) for name in os.listdir(f"/proc/{pid}/fd"))


def group(leader: int) -> list[int]:
    """Return the processes of a process group that have not ended."""
    found = []
    for pid in (int(name) for name in os.listdir("/proc") if name.isdigit()):
        fields = read_proc(pid, "stat").rpartition(")")[2].split()
        if fields and fields[0] not in "ZX" and int(fields[2]) == leader:
            found.append(pid)
    return found


def idle(gateway: Gateway) -> list[int]:
    """Return the workers that call themselves idle."""
    if not title(gateway.process.pid).startswith("natwork: master"):
        return []  # it is rehearsing, and its child has the title of a worker
    return [pid for pid in gateway.workers() if title(pid) == "natwork: idle"]


def worker_of(gateway: Gateway, client: socket.socket) -> int:
    """Return the worker whose title shows this client."""
    start = "natwork: %s:%d " % client.getsockname()[:2]

    def found() -> list[int]:
        return [pid for pid in gateway.workers() if title(pid).startswith(start)]

    pids = eventually(found)
    assert isinstance(pids, list)
    return int(pids[0])


@contextlib.contextmanager
def network_of(pid: int) -> Iterator[None]:
    """Put this thread, and those it starts, into the network of another process."""
    libc = ctypes.CDLL(None, use_errno=True)
    with open("/proc/self/task/%d/ns/net" % threading.get_native_id()) as own:
        with open(f"/proc/{pid}/ns/net") as other:
            assert libc.setns(other.fileno(), 0) == 0, os.strerror(ctypes.get_errno())
        try:
            yield
        finally:
            assert libc.setns(own.fileno(), 0) == 0


# What the README says.


def section(title: str) -> str:
    """Return a section of the README."""
    text = (ROOT / "README.md").read_text()
    return text.partition(f"\n## {title}\n")[2].partition("\n## ")[0]


def block(title: str, begins: str) -> str:
    """Return the block of code of a section that begins with these words."""
    blocks = re.findall(r"(?:^(?:    .*)?\n)+", section(title), re.M)
    found = [b for b in blocks if b.strip().startswith(begins)]
    assert len(found) == 1, (title, begins, blocks)
    return re.sub("^    ", "", found[0].strip("\n"), flags=re.M) + "\n"
