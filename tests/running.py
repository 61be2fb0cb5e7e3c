"""natwork.py, running: as a command to its end, or as the gateway of a test."""

from __future__ import annotations

import contextlib
import importlib
import os
import pwd
import re
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import kernel
import origins
import pytest
import wait
import wire

ROOT = Path(__file__).parent.parent
NAME = b"gate.test"  # what shared() calls the gateway in Via and Proxy-Status
LOOPBACK = "allow to 127.0.0.0/8, ::1"  # the tests' outside is 127/8 too
SELF = pwd.getpwuid(os.geteuid()).pw_name  # keeps a gateway what it was started as
# One worker, so that it is known which serves the next client, and a test may
# change its limits.
ALONE = ("spare_workers=1", "max_workers=1", "user=root")


def program(limits: Mapping[str, float] = {}, *others: str) -> list[str]:
    """Return the words that run natwork.py, with other numbers for some limits.

    Other statements may be run before.

    It is imported, so that not each of the many processes compiles it anew.  A
    limit is named with its module: {"natwork.LINGER_TIMEOUT": 0.5}.  The chapters
    that take one from natwork.py do so later, and so get the other number.
    """
    steps = [f"import sys; sys.path[0] = {str(ROOT)!r}; import natwork"]
    for limit, value in sorted(limits.items()):  # natwork.py's own come first
        module, _, name = limit.rpartition(".")
        assert isinstance(getattr(importlib.import_module(module), name), (int, float))
        steps.append(f"import {module}; {limit} = {value!r}")
    return [
        sys.executable,
        "-c",
        "; ".join([*steps, *others, "sys.exit(natwork.main())"]),
    ]


PROGRAM = program()
# What natwork.py says of the box that runs the tests, if that is itself behind a NAT.
OF_THIS_BOX = re.compile(r"natwork: \S+ leads outside and has .*\n")


def command(
    *arguments: str, cwd: Path, program: list[str] = PROGRAM
) -> subprocess.CompletedProcess[str]:
    """Run natwork.py to its end, and return how it ended and what it said."""
    done = subprocess.run(
        [*program, *arguments],
        cwd=cwd,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=30,
    )
    done.stderr = OF_THIS_BOX.sub("", done.stderr)
    return done


def options(*settings: str) -> list[str]:
    """Return the words of a command line that set these: "name=value"."""
    return [word for setting in settings for word in ("-o", setting)]


def configuration(settings: dict[str, str]) -> str:
    """Return the text of a configuration file."""
    lines = [f"{name} = {value}\n" for name, value in settings.items()]
    return "[natwork]\n" + "".join(lines)


def whole_lines(log: Path) -> list[str]:
    """Return the lines of a log; one that crosses a page may be there by half."""
    return log.read_text().rpartition("\n")[0].splitlines()


@contextlib.contextmanager
def public_folder() -> Iterator[Path]:
    """Give a folder that every user may look into, as pytest's are not."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        yield folder


class Gateway:
    """A running natwork.py: where it listens, and what it has written."""

    address: tuple[str, int]
    listener: socket.socket | None = None  # of activated()
    file: Path  # of configured(), as are the settings in it
    settings: dict[str, str]

    def __init__(self, folder: Path, command: list[str], **how: Any) -> None:
        """Run a command in a folder, which gets the access log and standard error."""
        self.folder, self.expected = folder, 0  # the exit code
        self.log, self.errors = folder / "access.log", folder / "stderr"
        self.log.touch()
        with self.errors.open("w") as errors:
            self.process = subprocess.Popen(
                command, stderr=errors, cwd=folder, start_new_session=True, **how
            )

    @classmethod
    def activated(
        cls,
        folder: Path,
        *settings: str,
        loopback: bool = True,
        program: list[str] = PROGRAM,
    ) -> Gateway:
        """Start it as systemd does: the socket listens already, as descriptor 3."""
        listener = socket.create_server(("127.0.0.1", 0), backlog=512)
        rules = [f"rules={LOOPBACK}"] if loopback else []
        words = options(f"log={folder / 'access.log'}", *rules, *settings)
        launch = f"LISTEN_FDS=1 LISTEN_PID=$$ exec {shlex.join([*program, *words])}"
        gateway = cls(
            folder,
            ["sh", "-c", launch],
            preexec_fn=lambda: os.dup2(listener.fileno(), 3),
            pass_fds=[3],
        )
        gateway.listener, gateway.address = listener, listener.getsockname()
        return gateway

    @classmethod
    def configured(
        cls,
        folder: Path,
        *options: str,
        program: list[str] = PROGRAM,
        stdout: int | None = None,
        before: Callable[[], None] | None = None,
        **settings: str,
    ) -> Gateway:
        """Start it with a ./natwork.conf, by which it opens its own listeners."""
        file, log = folder / "natwork.conf", folder / "access.log"
        defaults = {"listen": "127.0.0.1:0", "rules": LOOPBACK, "user": SELF}
        settings = {**defaults, "log": str(log), **settings}
        file.write_text(configuration(settings))
        gateway = cls(folder, [*program, *options], stdout=stdout, preexec_fn=before)
        gateway.file, gateway.settings = file, settings
        ended = gateway.process.poll
        wait.until(lambda: gateway.listening() or ended() is not None)
        gateway.address = gateway.listening()[0]
        return gateway

    @property
    def url(self) -> str:
        return "http://%s:%d" % self.address

    def connect(self, timeout: float = 10.0, buffer: int = 0) -> socket.socket:
        """Return a new connection; buffer is the size of what it can hold."""
        client = socket.socket(
            socket.AF_INET6 if ":" in self.address[0] else socket.AF_INET
        )
        if buffer:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
        client.settimeout(timeout)
        client.connect(self.address)
        return client

    def said(self) -> list[str]:
        """Return the lines on standard error."""
        return OF_THIS_BOX.sub("", self.errors.read_text()).splitlines()

    def listening(self) -> list[tuple[str, int]]:
        """Return the addresses it has said that it listens on, in order."""
        said = "\n".join([*self.said(), ""])
        found = re.findall(r"^natwork: listening on (.*):([0-9]+)\n", said, re.M)
        return [(host.strip("[]"), int(port)) for host, port in found]

    def lines(self, count: int = 0) -> list[dict[str, str]]:
        """Return the access log as dictionaries, once it has count lines."""
        wait.until(lambda: len(whole_lines(self.log)) >= count)
        lines = whole_lines(self.log)
        return [dict(w.split("=", 1) for w in line.split(" ")) for line in lines]

    def line_about(self, server: origins.Origin) -> dict[str, str]:
        """Return the one line of the access log about a server, once it is there."""

        def lines() -> list[dict[str, str]]:
            return [x for x in self.lines() if x["address"] == server.authority]

        wait.until(lines)
        (line,) = lines()
        return line

    def workers(self) -> list[int]:
        """Return the process numbers of the workers that live now."""
        return kernel.children(self.process.pid)

    def idle(self) -> list[int]:
        """Return the workers that call themselves idle."""
        if not kernel.title(self.process.pid).startswith("natwork: master"):
            return []  # it is rehearsing, and its child has the title of a worker
        return [pid for pid in self.workers() if kernel.title(pid) == "natwork: idle"]

    def at_rest(self) -> None:
        """Wait until all workers are idle."""
        wait.until(lambda: self.idle() == self.workers())

    def ready(self, count: int) -> list[int]:
        """Return the idle workers that sleep, once there are as many at least."""

        def asleep() -> list[int]:
            return [
                pid for pid in self.idle() if kernel.status(pid, "State")[:1] == "S"
            ]

        wait.until(lambda: len(asleep()) >= count)
        return asleep()

    def worker_of(self, client: socket.socket) -> int:
        """Return the worker whose title shows this client."""
        start = "natwork: %s:%d " % client.getsockname()[:2]

        def found() -> list[int]:
            pids = self.workers()
            return [pid for pid in pids if kernel.title(pid).startswith(start)]

        pids = wait.until(found)
        assert isinstance(pids, list)
        return int(pids[0])

    def only_worker(self) -> int:
        """Return the worker, where there is but one, once it has served somebody."""
        with self.connect() as client:
            client.sendall(
                b"OPTIONS * HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n"
            )
            assert wire.read_all(client).startswith(b"HTTP/1.1 200 ")
        (pid,) = self.workers()
        return pid

    def hangup(self, **settings: str) -> str:
        """Change settings in the file, send HUP, and return what is said of it."""
        self.settings.update(settings)
        self.file.write_text(configuration(self.settings))

        def answers() -> list[str]:
            return [line for line in self.said() if "reloaded" in line]

        before = len(answers())
        self.process.send_signal(signal.SIGHUP)
        wait.until(lambda: len(answers()) > before)
        return answers()[-1]

    def stop(self) -> str:
        """Ask it to stop, if it has not ended; return what it said."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        code = self.process.wait(timeout=40)
        if self.listener:
            self.listener.close()
        said = self.errors.read_text()
        assert code == self.expected and "Traceback" not in said, (code, said)
        if code == 0:
            with pytest.raises(ProcessLookupError):  # nobody of the group is left
                os.killpg(self.process.pid, 0)
        else:
            wait.until(lambda: not kernel.group(self.process.pid))
        return said


Start = Callable[..., Gateway]  # the fixtures: start("name=value", ...)


def shared(*settings: str) -> Callable[..., Iterator[Gateway]]:
    """Return a module's fixture: one gateway with these settings for all its tests."""

    @pytest.fixture(scope="module")
    def start(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
        folder = tmp_path_factory.mktemp("gateway")
        gateway = Gateway.activated(folder, f"name={NAME.decode()}", *settings)
        yield gateway
        gateway.stop()

    return start
