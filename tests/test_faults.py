"""What the kernel may refuse: each call that natwork makes fails once, by strace.

strace attaches to a worker or to the master of a running gateway and has one
call return an error in place of being made.  What was asked for then may fail;
the next one to ask is served, the master lives, and nobody has seen a traceback.
"""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import http_wire
import origins
import pytest
import running
import wait
import wire

BIG = bytes(400_000)  # more than BULK_SIZE: spliced
STRACE_TIMEOUT = 10
NAMES = (
    "time pid client user proto method target address source status outcome up down "
    "secs".split()
)
NO_ROOM = "EMFILE ENFILE ENOBUFS ENOMEM"

# Of a worker: the call, the errors it can return, and at how many of its places
# in a talk() each of them is tried.
OF_A_WORKER = [
    ("accept4", f"{NO_ROOM} EPERM", 1),
    ("accept4", "ECONNABORTED EINTR EAGAIN EPROTO ENETDOWN EHOSTUNREACH", 2),
    ("ioctl", "ENOMEM EINTR", 3),  # which makes a socket non-blocking
    ("recvfrom", "EINTR EAGAIN ECONNRESET ENOMEM ETIMEDOUT EHOSTUNREACH", 7),
    ("sendto", "EINTR EAGAIN ECONNRESET EPIPE ENOBUFS", 5),
    ("socket", f"{NO_ROOM} EAFNOSUPPORT EACCES", 3),
    ("connect", "EADDRNOTAVAIL ENETDOWN EHOSTUNREACH ETIMEDOUT EAGAIN EINTR EPERM", 2),
    ("connect", "ECONNREFUSED ENETUNREACH EINVAL ENOBUFS", 2),
    ("getsockname", "ENOBUFS ENOMEM", 2),
    ("setsockopt", "ENOMEM EINVAL ENOBUFS", 4),
    ("poll", "EINTR ENOMEM EINVAL EAGAIN", 4),
    ("epoll_wait", "EINTR ENOMEM EINVAL", 3),
    ("epoll_ctl", "ENOMEM ENOSPC", 2),
    ("pipe2", "EMFILE ENFILE ENOMEM", 1),
    ("fcntl", "EPERM EBUSY ENOMEM", 1),
    ("splice", "EINTR EAGAIN ECONNRESET EINVAL ENOMEM EPIPE", 3),
    ("shutdown", "ENOTCONN", 2),
    ("write", "EAGAIN ENOSPC EIO EPIPE EINTR", 3),  # to the log, and to the master
    ("openat", "EMFILE ENFILE EACCES ENOMEM", 2),  # of the resolver
]
# Of the master, in reap_and_reload().
OF_THE_MASTER = [
    ("clone", "EAGAIN ENOMEM", 2),
    ("wait4", "EINTR ECHILD", 2),
    ("poll", "EINTR ENOMEM EAGAIN", 2),
    ("rt_sigtimedwait", "EINTR EAGAIN EINVAL", 2),
    ("read", "EINTR EIO", 1),
    ("openat", "EMFILE ENFILE ENOMEM EACCES EIO", 2),
    ("pipe2", "EMFILE ENFILE", 1),
    ("socket", f"{NO_ROOM} EACCES", 1),
    ("bind", "EADDRINUSE EADDRNOTAVAIL EACCES", 1),
    ("listen", "EADDRINUSE", 1),
    ("setsockopt", "ENOMEM", 2),
    ("getsockname", "ENOBUFS", 2),
    ("shutdown", "ENOTCONN", 1),
]
# Of a worker that has just been forked.
OF_THE_NEWBORN = [
    ("epoll_create1", "EMFILE ENOMEM", 1),
    ("epoll_ctl", "ENOMEM ENOSPC", 1),
]


def places(
    table: list[tuple[str, str, int]], only: str = ""
) -> Iterator[tuple[str, str, int]]:
    """Yield each single injection of a table: the call, the error, which call it is."""
    for call, errors, count in table:
        for error in errors.split() if call == only or not only else ():
            for number in range(1, count + 1):
                yield call, error, number


def calls(table: list[tuple[str, str, int]]) -> list[str]:
    return list(dict.fromkeys(call for call, _, _ in table))


def anything(connection: socket.socket, origin: origins.Origin) -> None:
    """Be an origin that answers a little, or at /big a lot."""
    while asked := http_wire.read_request(connection):
        connection.sendall(
            http_wire.sized(BIG) if asked.target == b"/big" else http_wire.OK
        )


class Faulty:
    """A gateway, its origins, and what it takes to have a call of its fail."""

    def __init__(self, folder: Path, **settings: str) -> None:
        self.folder = folder
        self.gateway = running.Gateway.configured(folder, **settings)
        self.http, self.echo = origins.Origin(anything), origins.Origin(origins.echo)

    def connect(self, timeout: float = 3.0) -> socket.socket:
        return socket.create_connection(self.gateway.address, timeout)

    def idle(self, count: int) -> list[int]:
        """Return the idle workers, once there are as many at least."""
        wait.until(lambda: len(self.gateway.idle()) >= count)
        return self.gateway.idle()

    def fresh(self) -> int:
        """Return a new worker, who keeps nothing of an earlier talk."""
        (old,) = self.idle(1)
        os.kill(old, signal.SIGKILL)
        wait.until(lambda: self.idle(1) != [old])
        return self.idle(1)[0]

    def served(self) -> bool:
        """Say whether a client who comes now is served."""
        with self.connect(10) as client:
            answer = http_wire.exchange(
                client, http_wire.request(self.http, b"Connection: close")
            )
            return answer.status == 200

    def talk(self) -> None:
        """Ask in each way there is; who is let down leaves it at that."""
        for way in (self.ask_twice, self.ask_for_bulk, self.put, self.tunnel):
            # http_wire.py's strict readers assert that an answer is whole.
            with contextlib.suppress(OSError, AssertionError), self.connect() as client:
                way(client)

    def ask_twice(self, client: socket.socket) -> None:
        http_wire.exchange(client, http_wire.request(self.http))
        http_wire.exchange(client, http_wire.request(self.http))

    def ask_for_bulk(self, client: socket.socket) -> None:
        http_wire.exchange(client, http_wire.request(self.http, path=b"/big"))

    def put(self, client: socket.socket) -> None:
        body = http_wire.chunks(bytes(1000), bytes(100_000))
        fields = b"Transfer-Encoding: chunked"
        http_wire.exchange(
            client, http_wire.request(self.http, fields, method=b"PUT", body=body)
        )

    def tunnel(self, client: socket.socket) -> None:
        at = b"localhost:%d" % self.echo.port
        http_wire.exchange(client, http_wire.request(at, method=b"CONNECT"), b"CONNECT")
        client.sendall(BIG[:1000])
        wire.read_exactly(client, 1000)
        client.shutdown(socket.SHUT_WR)
        wire.read_all(client)

    def failing(
        self, pid: int, call: str, error: str, number: int, *options: str
    ) -> contextlib.AbstractContextManager[Callable[[], bool]]:
        """Have the process's call fail once; give what says whether it has."""
        return self.tampered(pid, call, f"error={error}:when={number}", *options)

    @contextlib.contextmanager
    def tampered(
        self, pid: int, call: str, how: str, *options: str
    ) -> Iterator[Callable[[], bool]]:
        """Have strace tamper with a call; give what says whether it has."""
        trace = self.folder / "trace"
        trace.write_text("")
        inject = f"inject={call}:{how}"
        command = ["strace", *options, "-e", f"trace={call}", "-e", inject]
        command += ["-o", str(trace), "-p", str(pid)]
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as strace:
            alarm = threading.Timer(STRACE_TIMEOUT, strace.kill)
            alarm.start()
            try:
                assert strace.stderr
                said = strace.stderr.readline()
                assert "attached" in said, said
                yield lambda: "INJECTED" in trace.read_text()
            finally:
                alarm.cancel()
                strace.terminate()  # it detaches
                strace.communicate(timeout=STRACE_TIMEOUT)

    def is_well(self) -> None:
        """See that the master lives and serves, and that nobody saw a traceback."""
        assert self.served()
        assert self.gateway.process.poll() is None
        assert "Traceback" not in self.gateway.errors.read_text()

    def stop(self) -> None:
        said = self.gateway.stop()
        for origin in (self.http, self.echo):
            origin.close()
        # A line that a full disk has cut is no line; see test_log.py.
        for line in self.gateway.log.read_text().splitlines():
            assert [word.partition("=")[0] for word in line.split(" ")] == NAMES, said


def start(**settings: str) -> Callable[..., Iterator[Faulty]]:
    """Return a module's fixture: one gateway for all its injections."""

    @pytest.fixture(scope="module")
    def faulty(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Faulty]:
        if not can_strace():
            pytest.skip("needs strace, and the right to attach to a process")
        faulty = Faulty(tmp_path_factory.mktemp("faults"), **settings)
        yield faulty
        faulty.stop()

    return faulty


@functools.lru_cache
def can_strace() -> bool:
    """Say whether strace is here and may attach; under CI it has to."""
    with contextlib.suppress(FileNotFoundError):
        sleeper = subprocess.Popen(["sleep", "60"])
        try:
            done = subprocess.run(
                ["timeout", "-s", "INT", "1", "strace", "-p", str(sleeper.pid)],
                stderr=subprocess.PIPE,
                timeout=20,
            )
            return b"attached" in done.stderr
        finally:
            sleeper.kill()
            sleeper.wait()
    return False


# It is known who serves next; and what waits for a call not made waits a second.
ALONE = {"spare_workers": "1", "max_workers": "1"}
PATIENCE = {"idle_timeout": "1", "tunnel_timeout": "1"}
first, second, third, fourth = (start(**ALONE, **PATIENCE) for _ in range(4))
pair = start(spare_workers="2")


@pytest.fixture(scope="module")
def crew(
    first: Faulty, second: Faulty, third: Faulty, fourth: Faulty
) -> Callable[..., None]:
    """Return a function that has four gateways share the injections of a call."""
    gateways = first, second, third, fourth

    def share(
        table: list[tuple[str, str, int]],
        call: str,
        inject: Callable[[Faulty, str, int], None],
    ) -> None:
        todo = list(places(table, call))

        def work(number: int) -> None:
            for _, error, place in todo[number :: len(gateways)]:
                inject(gateways[number], error, place)

        with ThreadPoolExecutor(len(gateways)) as pool:
            list(pool.map(work, range(len(gateways))))

    return share


def test_there_are_two_hundred_injections() -> None:
    tables = [*OF_A_WORKER, *OF_THE_MASTER, *OF_THE_NEWBORN]
    assert len(set(places(tables))) >= 200
    assert {"accept4", "clone", "splice", "poll"} <= set(calls(tables))


@pytest.mark.parametrize("call", calls(OF_A_WORKER))
def test_a_call_of_a_worker_that_fails_harms_nobody_else(
    crew: Callable[..., None], call: str
) -> None:
    def inject(alone: Faulty, error: str, number: int) -> None:
        worker = alone.fresh()
        with alone.failing(worker, call, error, number) as failed:

            def has_failed() -> bool:
                alone.talk()
                return failed()

            wait.until(has_failed)
        alone.is_well()

    crew(OF_A_WORKER, call, inject)


def test_an_answer_is_whole_though_its_client_speaks_meanwhile(first: Faulty) -> None:
    worker = first.fresh()
    with first.tampered(worker, "recvfrom", "delay_exit=20000"):  # microseconds
        for _ in range(5):
            with first.connect() as client:
                client.sendall(http_wire.request(first.http, b"Connection: close"))
                time.sleep(0.032)  # now the answer is being read
                client.sendall(b"\r\n")
                assert wire.read_all(client).endswith(b"ok")


def reap_and_reload(faulty: Faulty, goes: list[bool]) -> None:
    """Give a master all it has to do: a worker who died, a new configuration."""
    gateway = faulty.gateway
    for pid in gateway.workers()[:1]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    goes.append(True)
    more = " 127.0.0.2:0" * (len(goes) % 2)
    with contextlib.suppress(AssertionError):  # said to nobody, if that was the write
        gateway.hangup(listen="127.0.0.1:0" + more)


@pytest.mark.parametrize("call", calls(OF_THE_MASTER))
def test_a_call_of_the_master_that_fails_does_not_end_him(
    pair: Faulty, call: str
) -> None:
    goes: list[bool] = []
    for _, error, number in places(OF_THE_MASTER, call):
        pair.idle(2)
        with pair.failing(pair.gateway.process.pid, call, error, number) as failed:

            def has_failed() -> bool:
                reap_and_reload(pair, goes)
                return failed()

            wait.until(has_failed)
        pair.is_well()
        assert pair.gateway.hangup().endswith("configuration reloaded")
        pair.idle(2)


@pytest.mark.parametrize("call", calls(OF_THE_NEWBORN))
def test_a_worker_that_cannot_start_is_tried_again(
    crew: Callable[..., None], call: str
) -> None:
    def inject(alone: Faulty, error: str, number: int) -> None:
        alone.idle(1)
        master = alone.gateway.process.pid
        with alone.failing(master, call, error, number, "-f") as failed:

            def has_failed() -> bool:
                for pid in alone.gateway.workers():
                    with contextlib.suppress(ProcessLookupError):  # it has failed
                        os.kill(pid, signal.SIGKILL)
                return failed()

            wait.until(has_failed)
        alone.is_well()
        alone.idle(1)

    crew(OF_THE_NEWBORN, call, inject)


def test_a_client_that_cannot_be_taken_is_no_busy_loop(first: Faulty) -> None:
    worker = first.fresh()
    trace, words = first.folder / "trace", "cannot accept a client: "
    command = ["strace", "-e", "trace=accept4", "-e", "inject=accept4:error=EPERM"]
    command += ["-o", str(trace), "-p", str(worker)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as strace:
        try:
            assert strace.stderr and "attached" in strace.stderr.readline()
            with first.connect() as client:
                client.sendall(b"GET / HTTP/1.1\r\n\r\n")
                wait.until(lambda: words in first.gateway.errors.read_text())
                time.sleep(1)  # the observation itself
                assert trace.read_text().count("INJECTED") < 5
        finally:
            strace.terminate()
            strace.communicate(timeout=STRACE_TIMEOUT)
    first.is_well()
