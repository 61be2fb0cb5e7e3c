"""Relay: what enters one socket leaves by the other, over real TCP through CONNECT."""

from __future__ import annotations

import contextlib
import functools
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Generator
from collections.abc import Iterator

import http_wire
import kernel
import origins
import pytest
import running
import wait
import wire

pytestmark = pytest.mark.filterwarnings(http_wire.STRICT)
gateway = running.shared()
hasty = running.shared("tunnel_timeout=1")

MIB = 1 << 20
DATA = os.urandom(MIB) * 20
SIZES = [0, 1, 100, 64 * 1024, MIB, 20 * MIB]
F_SETPIPE_SZ = 1031  # named in the fcntl module since Python 3.10


@contextlib.contextmanager
def sending(connection: socket.socket, data: bytes, end: bool = True) -> Iterator[None]:
    """Send from a thread for as long as the block lasts, then close that half."""

    def run() -> None:
        wire.send(connection, data)
        if end:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_WR)

    sender = threading.Thread(target=run, daemon=True)
    sender.start()
    yield
    sender.join(20)
    assert not sender.is_alive()


def same(one: bytes | bytearray, other: bytes) -> bool:
    """Compare megabytes without pytest showing them."""
    return one == other


class Counter:
    """An origin that sends without end until told to stop, and counts what it sent."""

    def __init__(self, piece: bytes = b"x" * 10_000) -> None:
        self.piece, self.sent, self.stop = piece, 0, threading.Event()

    def __call__(
        self, connection: socket.socket, server: origins.Origin | None
    ) -> None:
        with connection.dup() as sock:  # its time-out is not the reader's
            sock.settimeout(0.1)
            while not self.stop.is_set():
                with contextlib.suppress(TimeoutError):
                    self.sent += sock.send(self.piece[self.sent % len(self.piece) :])

    def start(self, connection: socket.socket) -> threading.Thread:
        """Send from a thread."""
        thread = threading.Thread(target=self, args=[connection, None], daemon=True)
        thread.start()
        return thread


# --- Close orders -------------------------------------------------------------


def answer_the_end(connection: socket.socket, server: origins.Origin) -> None:
    """Read to the client's end, and only then speak."""
    server.received.append(data := wire.read_all(connection))
    connection.sendall(data[::-1])


def speak_first(connection: socket.socket, server: origins.Origin) -> None:
    """Speak, close this half, and then listen."""
    size = int(wire.read_exactly(connection, 8))
    connection.sendall(DATA[:size][::-1])
    connection.shutdown(socket.SHUT_WR)
    server.received.append(b"%08d" % size + wire.read_all(connection))


def speak_and_listen(connection: socket.socket, server: origins.Origin) -> None:
    """Do both at once."""
    size = int(wire.read_exactly(connection, 8))
    with sending(connection, DATA[:size][::-1]):
        server.received.append(b"%08d" % size + wire.read_all(connection))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("order", ["client first", "server first", "both at once"])
def test_whoever_closes_first_every_byte_arrives(
    gateway: running.Gateway, origin: origins.Start, order: str, size: int
) -> None:
    handle = {
        "client first": answer_the_end,  # trap 5
        "server first": speak_first,
        "both at once": speak_and_listen,
    }[order]
    server, data = origin(handle), b"%08d" % size + DATA[:size]
    answer = data[::-1] if order == "client first" else DATA[:size][::-1]
    with http_wire.tunnel(gateway, server) as client:
        if order == "client first":
            client.sendall(data)
            client.shutdown(socket.SHUT_WR)
            assert same(wire.read_all(client), answer)
        elif order == "server first":
            client.sendall(data[:8])
            assert same(wire.read_all(client), answer)
            client.sendall(data[8:])
        else:
            with sending(client, data):
                assert same(wire.read_all(client), answer)
    line = gateway.line_about(server)  # trap 6
    wait.until(lambda: server.received)
    assert same(server.received[0], data)
    assert line["outcome"] == "closed"
    assert int(line["up"]) == len(data)
    assert int(line["down"]) == len(http_wire.ACCEPTED) + len(answer)


def test_a_half_closed_tunnel_goes_on_the_other_way(
    gateway: running.Gateway, origin: origins.Start
) -> None:
    def converse(connection: socket.socket, server: origins.Origin) -> None:
        assert wire.read_all(connection) == b"the end"
        for piece in (b"one", b"two"):
            connection.sendall(piece)
            server.received.append(piece)
            wait.until(lambda: not server.received)

    server = origin(converse)
    with http_wire.tunnel(gateway, server) as client:  # trap 5
        client.sendall(b"the end")
        client.shutdown(socket.SHUT_WR)
        for piece in (b"one", b"two"):
            assert wire.read_exactly(client, 3) == piece
            wait.until(lambda: server.received)
            server.received.clear()
        assert client.recv(1) == b""


def test_early_data_arrives_first(
    gateway: running.Gateway, origin: origins.Start
) -> None:
    server = origin(origins.echo)
    with http_wire.tunnel(gateway, server, early=DATA[:100_000]) as client:
        client.sendall(b"later")
        client.shutdown(socket.SHUT_WR)
        assert same(wire.read_all(client), DATA[:100_000] + b"later")
    assert int(gateway.line_about(server)["up"]) == 100_005


def test_an_answer_arrives_though_the_server_takes_no_more(
    gateway: running.Gateway, origin: origins.Start
) -> None:
    def refuse(connection: socket.socket, server: origins.Origin) -> None:
        connection.shutdown(socket.SHUT_RD)
        wait.at_rest(lambda: sender.sent)
        connection.sendall(DATA)
        assert read.wait(20)  # to close with input unread resets

    sender, read, server = Counter(), threading.Event(), origin(refuse)
    with http_wire.tunnel(gateway, server) as client:  # trap 5
        thread = sender.start(client)
        assert same(wire.read_exactly(client, len(DATA)), DATA)
        sender.stop.set()
        thread.join(20)
        read.set()
        assert wire.read_all(client) == b""


def test_an_answer_that_is_followed_by_a_reset_arrives(
    natwork: running.Start, origin: origins.Start
) -> None:
    def answer(connection: socket.socket, server: origins.Origin) -> None:
        assert standing.wait(20)
        connection.sendall(DATA[:10_000])
        wire.reset(connection)
        left.set()

    gateway, server = natwork(*running.ALONE), origin(answer)
    standing, left, pid = threading.Event(), threading.Event(), gateway.only_worker()
    with http_wire.tunnel(gateway, server) as client:  # trap 6
        os.kill(pid, signal.SIGSTOP)
        try:
            standing.set()
            client.sendall(b"the server will not read this")
            assert left.wait(20)
        finally:
            os.kill(pid, signal.SIGCONT)
        assert same(wire.read_exactly(client, 10_000), DATA[:10_000])
        assert wire.read_all(client) == b""
    assert gateway.line_about(server)["outcome"] == "server-gone"


# --- Little and much ----------------------------------------------------------


def dribble(connection: socket.socket, data: bytes) -> None:
    """Send in writes of 1 to 100 bytes, each a segment of its own."""
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    at, size = 0, 1
    while at < len(data):
        connection.sendall(data[at : at + size])
        at, size = at + size, size % 100 + 1


@pytest.mark.parametrize("way", ["up", "down"])
def test_a_megabyte_in_tiny_writes_reaches_a_slow_reader(
    gateway: running.Gateway, origin: origins.Start, way: str
) -> None:
    def speak(connection: socket.socket, server: origins.Origin) -> None:
        dribble(connection, DATA[:MIB])

    def listen(connection: socket.socket, server: origins.Origin) -> None:
        server.received.append(wire.read_all(connection))

    server = origin(speak if way == "down" else listen)  # trap 2
    if way == "up":  # what is accepted inherits it
        server.listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 16384)
    with http_wire.tunnel(
        gateway, server, buffer=16384 if way == "down" else 0
    ) as client:
        if way == "down":
            got = bytearray()
            while piece := client.recv(1000):
                got += piece
        else:
            dribble(client, DATA[:MIB])
            client.shutdown(socket.SHUT_WR)
            assert client.recv(1) == b""
            got = bytearray(server.received[0])
    assert same(got, DATA[:MIB])


def test_bulk_goes_both_ways_at_once(
    gateway: running.Gateway, origin: origins.Start
) -> None:
    server = origin(origins.echo)
    with http_wire.tunnel(gateway, server) as client, sending(client, DATA):
        assert same(wire.read_all(client), DATA)


@contextlib.contextmanager
def beside() -> Iterator[socket.socket]:
    """Return a connection to nowhere.

    The kernel joins segments that lie side by side in memory, and they would
    need one slot of a pipe; whoever writes to two sockets in turn has none such.
    """
    with socket.create_server(("127.0.0.1", 0)) as listener:
        with socket.create_connection(listener.getsockname()) as one:
            other, _ = listener.accept()
            reader = threading.Thread(target=wire.read_all, args=[other], daemon=True)
            reader.start()
            yield one
            one.shutdown(socket.SHUT_WR)
            reader.join(10)
            other.close()


SEGMENTS = 64 * 16 + 3  # several times the 16 or 64 slots that a pipe has


@pytest.mark.parametrize("kind", ["tunnel", "body"])
def test_many_small_segments_fill_a_pipe_and_nothing_hangs(
    natwork: running.Start, origin: origins.Start, kind: str
) -> None:
    # While the worker stands still the segments queue up; then it splices. The
    # rest is sent only when they have arrived: whoever waits for more input
    # while its pipe holds bytes waits for ever.
    before = 65536 if kind == "tunnel" else 0
    first, total = before + 100 * SEGMENTS, MIB
    standing, arrived = threading.Event(), threading.Event()
    sent = 0

    def speak(connection: socket.socket, server: origins.Origin) -> None:
        nonlocal sent
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if kind == "body":
            http_wire.read_head(connection)
        assert standing.wait(20)
        if kind == "body":
            connection.sendall(http_wire.response(b"Content-Length: %d" % total))
        connection.sendall(DATA[:before])
        with beside() as other:
            for sent in range(before, first, 100):
                connection.sendall(DATA[sent : sent + 100])
                other.sendall(DATA[:100])
        assert arrived.wait(20)
        connection.sendall(DATA[first:total])

    gateway, server = natwork(*running.ALONE), origin(speak)
    pid = gateway.only_worker()  # trap 2
    with contextlib.ExitStack() as stack:
        if kind == "tunnel":
            client = stack.enter_context(http_wire.tunnel(gateway, server))
        else:
            client = stack.enter_context(gateway.connect(20))
            client.sendall(http_wire.request(server))
        wait.until(lambda: server.callers)
        os.kill(pid, signal.SIGSTOP)
        try:
            standing.set()
            wait.at_rest(lambda: sent)
        finally:
            os.kill(pid, signal.SIGCONT)
        if kind == "body":
            assert b"Content-Length: %d\r\n" % total in http_wire.read_head(client)
        assert same(wire.read_exactly(client, first), DATA[:first])
        arrived.set()
        assert same(wire.read_exactly(client, total - first), DATA[first:total])


# --- Stalls -------------------------------------------------------------------


def stalled(
    natwork: running.Start, origin: origins.Start, way: str, piece: int
) -> Generator[None, None, None]:
    """Stall a reader, and see what that cost when asked to go on."""
    pattern = DATA[:piece]
    read_on, sender = threading.Event(), Counter(pattern)

    def stall(connection: socket.socket, server: origins.Origin) -> None:
        assert read_on.wait(60)
        server.received.append(wire.read_all(connection))

    def body(connection: socket.socket, server: origins.Origin) -> None:
        http_wire.read_head(connection)
        connection.sendall(http_wire.response())
        sender(connection, server)

    handle = {"down": sender, "up": stall, "body": body}[way]
    gateway, server = natwork(*running.ALONE), origin(handle)
    pid = gateway.only_worker()
    with contextlib.ExitStack() as stack:
        if way == "body":
            client = stack.enter_context(gateway.connect(20))
            client.sendall(http_wire.request(server))
            assert http_wire.read_head(client).startswith(b"HTTP/1.1 200 ")
        else:
            client = stack.enter_context(http_wire.tunnel(gateway, server))
        memory = kernel.number(pid, "VmRSS")
        if way == "up":
            sender.start(client)
        wait.at_rest(lambda: sender.sent)
        used = kernel.ticks(pid)
        yield
        assert kernel.ticks(pid) - used <= kernel.TICK // 10  # trap 2
        assert kernel.number(pid, "VmRSS") - memory < 4096  # kB: it holds nothing back
        sender.stop.set()
        if way == "up":
            read_on.set()
            wait.at_rest(lambda: sender.sent)
            client.shutdown(socket.SHUT_WR)
            wait.until(lambda: server.received)
            got = server.received[0]
        else:
            got = wire.read_all(client)
    expected = pattern * (sender.sent // piece + 1)
    assert same(got, expected[: sender.sent])


def test_stalled_readers_cost_neither_cpu_nor_memory(
    natwork: running.Start, origin: origins.Start
) -> None:
    cases = ("down", 100), ("down", 100_000), ("up", 100), ("body", 100_000)
    readers = [stalled(natwork, origin, way, piece) for way, piece in cases]
    for reader in readers:
        next(reader)
    time.sleep(2)  # what is measured, not waited for
    for reader in readers:
        next(reader, None)


# --- Resets, silence, and what the log says -----------------------------------


@pytest.mark.parametrize("moved", [0, 100, MIB])
def test_a_reset_of_the_client_reaches_the_server(
    gateway: running.Gateway, origin: origins.Start, moved: int
) -> None:
    def listen(connection: socket.socket, server: origins.Origin) -> None:
        try:
            while piece := connection.recv(65536):
                server.received.append(piece)
            server.received.append(b"an orderly end")
        except ConnectionResetError:
            server.received.append(b"reset")

    server = origin(listen)
    with http_wire.tunnel(gateway, server) as client:
        client.sendall(DATA[:moved])
        wait.until(lambda: len(b"".join(server.received)) == moved)
        wire.reset(client)
    wait.until(lambda: server.received[-1:] == [b"reset"])
    line = gateway.line_about(server)
    assert (line["outcome"], line["up"]) == ("client-gone", str(moved))


def test_a_killed_worker_makes_no_half_look_whole(
    gateway: running.Gateway, origin: origins.Start
) -> None:
    def listen(connection: socket.socket, server: origins.Origin) -> None:
        server.received.append(connection.recv(100))
        try:
            server.received.append(connection.recv(100))
        except ConnectionResetError:
            server.received.append(b"reset")

    server = origin(listen)
    with http_wire.tunnel(gateway, server) as client:
        client.sendall(b"half")
        wait.until(lambda: server.received)
        os.kill(gateway.worker_of(client), signal.SIGKILL)
        with pytest.raises(ConnectionResetError):
            client.recv(1)
    wait.until(lambda: server.received == [b"half", b"reset"])


@pytest.mark.parametrize("moved", [0, 100, MIB])
def test_a_reset_of_the_server_reaches_the_client(
    gateway: running.Gateway, origin: origins.Start, moved: int
) -> None:
    def leave(connection: socket.socket, server: origins.Origin) -> None:
        connection.sendall(DATA[:moved])
        connection.recv(1)
        wire.reset(connection)

    server = origin(leave)
    with http_wire.tunnel(gateway, server) as client:
        assert same(wire.read_exactly(client, moved), DATA[:moved])
        client.sendall(b"x")
        with pytest.raises(ConnectionResetError):
            client.recv(1)
    line = gateway.line_about(server)
    assert (line["outcome"], line["up"]) == ("server-gone", "1")
    assert int(line["down"]) == len(http_wire.ACCEPTED) + moved


def test_a_client_that_gives_up_is_not_the_servers_fault(
    gateway: running.Gateway, origin: origins.Start
) -> None:
    """A server that has more to send answers the client's end by a reset."""

    def leave(connection: socket.socket, server: origins.Origin) -> None:
        assert wire.read_all(connection) == b""
        wire.reset(connection)

    server = origin(leave)
    http_wire.tunnel(gateway, server).close()
    assert gateway.line_about(server)["outcome"] == "client-gone"


def test_what_was_taken_from_a_client_arrives_before_its_reset(
    gateway: running.Gateway, origin: origins.Start
) -> None:
    gone = threading.Event()

    def handle(connection: socket.socket, server: origins.Origin) -> None:
        """Read what is there only when the client has gone."""
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        assert gone.wait(10)
        time.sleep(0.3)
        server.received.append(wire.read_exactly(connection, 50_000))

    server = origin(handle)  # R68
    with http_wire.tunnel(gateway, server) as client:
        client.sendall(DATA[:50_000])
        time.sleep(0.3)  # the gateway takes it, and passes on what it can
        wire.reset(client)
        gone.set()
    assert same(wait.until(lambda: b"".join(server.received)), DATA[:50_000])
    assert gateway.line_about(server)["outcome"] == "client-gone"


@pytest.mark.parametrize("way", ["tunnel", "endless"])
def test_what_was_taken_from_a_server_arrives_before_his_reset(
    gateway: running.Gateway, origin: origins.Start, way: str
) -> None:
    gone = threading.Event()

    def handle(connection: socket.socket, server: origins.Origin) -> None:
        """Say a piece, and reset when it has been taken."""
        if way == "endless":
            http_wire.read_request(connection)
            connection.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
        connection.sendall(DATA[:50_000])
        time.sleep(0.5)
        wire.reset(connection)
        gone.set()

    server = origin(handle)  # R68
    with gateway.connect() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        wire.send(
            client,
            http_wire.request(server, method=b"CONNECT" if way == "tunnel" else b"GET"),
        )
        assert b" 200 " in http_wire.read_head(client)
        assert gone.wait(10)
        time.sleep(0.5)  # it is slow, and does not wait forever
        assert same(wire.read_exactly(client, 50_000), DATA[:50_000])
        with pytest.raises(ConnectionResetError):  # and it does not look whole
            client.recv(1)


def test_who_sends_on_before_he_reads_gets_the_last_answer(
    gateway: running.Gateway, origin: origins.Start
) -> None:
    page = DATA[:50_000]

    def refuse(connection: socket.socket, server: origins.Origin) -> None:
        http_wire.read_head(connection)
        connection.sendall(
            http_wire.sized(page, b"Connection: close", status=b"413 Too Large")
        )
        with contextlib.suppress(OSError):
            wire.read_all(connection)

    server = origin(refuse)
    with gateway.connect() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        wire.send(
            client,
            http_wire.request(server, b"Content-Length: 100000000", method=b"POST"),
        )
        end = time.monotonic() + 2.6  # longer than a silent one would be waited for
        while time.monotonic() < end:
            wire.send(client, bytes(1000))
            time.sleep(0.05)
        answer = http_wire.read_answer(client)
        assert answer.status == 413 and same(answer.body, page)


@pytest.mark.parametrize("who", ["client", "server"])
def test_a_reset_ends_a_tunnel_that_is_stalled(
    gateway: running.Gateway, origin: origins.Start, who: str
) -> None:
    sender, ended = Counter(), threading.Event()

    def flood(connection: socket.socket, server: origins.Origin) -> None:
        try:
            sender(connection, server)
            wire.reset(connection)
        finally:
            ended.set()

    server = origin(flood)
    with http_wire.tunnel(gateway, server) as client:
        wait.at_rest(lambda: sender.sent)
        if who == "client":
            wire.reset(client)
            assert ended.wait(10)
        else:
            sender.stop.set()
            with pytest.raises(ConnectionResetError):
                while client.recv(65536):
                    pass
    assert gateway.line_about(server)["outcome"] == f"{who}-gone"


def test_a_silent_tunnel_ends_and_its_bytes_are_counted(
    hasty: running.Gateway, origin: origins.Start
) -> None:
    def talk(connection: socket.socket, server: origins.Origin) -> None:
        server.received.append(wire.read_exactly(connection, 1000))
        connection.sendall(DATA[:3000])
        with contextlib.suppress(ConnectionResetError):
            server.received.append(connection.recv(1))

    server = origin(talk)
    with http_wire.tunnel(hasty, server) as client:  # trap 7
        client.sendall(DATA[:1000])
        assert wire.read_all(client) == DATA[:3000]
    line = hasty.line_about(server)
    assert line["outcome"] == "idle-timeout"
    assert (line["up"], line["down"]) == ("1000", str(len(http_wire.ACCEPTED) + 3000))


def test_a_tunnel_in_which_one_side_talks_is_not_silent(
    hasty: running.Gateway, origin: origins.Start
) -> None:
    def talk(connection: socket.socket, server: origins.Origin) -> None:
        end = time.monotonic() + 2
        while time.monotonic() < end:
            connection.sendall(b".")
            server.received.append(b".")
            select.select([], [], [], 0.1)

    server = origin(talk)
    with http_wire.tunnel(hasty, server) as client:
        client.settimeout(5)
        got = wire.read_all(client)
    assert got == b"".join(server.received)
    assert hasty.line_about(server)["outcome"] == "closed"


@pytest.mark.parametrize("who", ["client", "server"])
def test_a_half_closed_tunnel_may_be_silent_for_less(
    natwork: running.Start, origin: origins.Start, who: str
) -> None:
    def close_half(connection: socket.socket, server: origins.Origin) -> None:
        if who == "server":
            connection.shutdown(socket.SHUT_WR)
        server.received.append(wire.read_all(connection))
        assert who == "server" or ended.wait(10)

    ended, program = (
        threading.Event(),
        running.program({"natwork.HALF_CLOSED_TIMEOUT": 0.5}),
    )
    gateway, server = natwork(*running.ALONE, program=program), origin(close_half)
    with http_wire.tunnel(gateway, server) as client:  # trap 7
        if who == "client":
            client.shutdown(socket.SHUT_WR)
        assert wire.read_all(client) == b""
        line = gateway.line_about(server)
        ended.set()
    assert line["outcome"] == "idle-timeout"


# --- Pipes --------------------------------------------------------------------


def test_a_little_used_tunnel_opens_no_pipe(
    natwork: running.Start, origin: origins.Start
) -> None:
    gateway, server = natwork(*running.ALONE), origin(origins.echo)
    pid = gateway.only_worker()
    idle = len(kernel.opened(pid, "pipe:"))
    with http_wire.tunnel(gateway, server) as client:
        assert len(kernel.opened(pid, "pipe:")) == idle
        for size in (1, 1000, 10_000):
            client.sendall(DATA[:size])
            assert same(wire.read_exactly(client, size), DATA[:size])
            assert len(kernel.opened(pid, "pipe:")) == idle  # trap 4


def test_pipes_are_made_for_bulk_and_given_back(
    natwork: running.Start, origin: origins.Start
) -> None:
    sender = Counter()
    gateway, server = natwork(*running.ALONE), origin(sender)
    pid = gateway.only_worker()
    idle = len(kernel.opened(pid, "pipe:"))
    with http_wire.tunnel(gateway, server) as client:  # trap 3
        wait.at_rest(lambda: sender.sent)
        # What came slowly was copied; now there is much at once.
        got = len(wire.read_exactly(client, MIB))
        wait.at_rest(lambda: sender.sent)
        assert len(kernel.opened(pid, "pipe:")) > idle  # it is in there that bytes wait
        while got < max(sender.sent, 4 * MIB):
            got += len(client.recv(65536))
        # Stopped by the reader, who stops: now empty it, and keep it open.
        client.settimeout(0.5)
        with contextlib.suppress(TimeoutError):
            while client.recv(65536):
                sender.stop.set()
        wait.until(lambda: len(kernel.opened(pid, "pipe:")) == idle)
    assert pid in gateway.workers()


def test_an_idle_tunnel_gives_back_the_pipes_of_its_bulk(
    natwork: running.Start, origin: origins.Start
) -> None:
    gateway, server = natwork(*running.ALONE), origin(origins.echo)
    pid = gateway.only_worker()
    idle = len(kernel.opened(pid, "pipe:"))
    with http_wire.tunnel(gateway, server) as client:  # trap 3
        for _ in range(2):
            with sending(client, DATA[:MIB], end=False):
                assert same(wire.read_exactly(client, MIB), DATA[:MIB])
            wait.until(lambda: len(kernel.opened(pid, "pipe:")) == idle)
    assert int(gateway.line_about(server)["up"]) == 2 * MIB


SPEND = f"""
import fcntl, os, pwd, sys
if sys.argv[1]:
    os.setuid(pwd.getpwnam(sys.argv[1]).pw_uid)
held = []
try:
    while True:
        held.append(os.pipe())
        fcntl.fcntl(held[-1][1], {F_SETPIPE_SZ}, 1 << 20)
except PermissionError:
    pass
for fd in held.pop(0):  # 256 of the 16,384 pages: room for four pipes of ours
    os.close(fd)
print(len(held), flush=True)
sys.stdin.read()
"""


@contextlib.contextmanager
def pipe_budget_spent(user: str) -> Iterator[None]:
    """Let a user have no pipe memory left but for a handful of pipes."""
    holder = subprocess.Popen(
        [sys.executable, "-c", SPEND, user],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert holder.stdin and holder.stdout
    with holder, holder.stdin, holder.stdout:
        assert int(holder.stdout.readline()) > 8
        yield


def test_bulk_flows_when_the_pipe_budget_of_the_user_is_spent(
    natwork: running.Start, origin: origins.Start
) -> None:
    # Not as nobody: others on this box may be nobody too. Root has no budget.
    user = "daemon" if os.geteuid() == 0 else ""
    gateway = natwork("spare_workers=4", *([f"user={user}"] if user else []))
    senders = [Counter(DATA[:MIB]) for _ in range(24)]
    with contextlib.ExitStack() as stack:  # trap 3
        stack.enter_context(pipe_budget_spent(user))
        clients = []
        for sender in senders:  # each holds a full pipe, as it is not read from
            one = http_wire.tunnel(gateway, origin(sender), buffer=16384)
            clients.append(stack.enter_context(one))
        for sender in senders:
            wait.at_rest(functools.partial(getattr, sender, "sent"), 0.05)
        assert all(kernel.number(pid, "Uid") != 0 for pid in gateway.workers())
        client = stack.enter_context(http_wire.tunnel(gateway, origin(origins.echo)))
        with sending(client, DATA):
            assert same(wire.read_all(client), DATA)
        for client, sender in zip(clients, senders):
            sender.stop.set()
            got = wire.read_all(client)
            expected = DATA[:MIB] * (len(got) // MIB + 1)
            assert same(got, expected[: len(got)])
            assert len(got) == sender.sent


@pytest.mark.parametrize("way", ["tunnel", "body"])
def test_bulk_is_copied_when_no_pipe_can_be_had(
    natwork: running.Start, origin: origins.Start, way: str
) -> None:
    def answer(connection: socket.socket, server: origins.Origin) -> None:
        while http_wire.read_request(connection):
            connection.sendall(http_wire.sized(DATA))

    handle = origins.echo if way == "tunnel" else answer
    gateway, server = natwork(*running.ALONE), origin(handle)
    pid = gateway.only_worker()
    idle = len(kernel.opened(pid, "pipe:"))
    if way == "tunnel":
        with (
            http_wire.tunnel(gateway, server) as client,
            kernel.no_more_descriptors(pid),
        ):  # trap 22
            with sending(client, DATA):
                assert same(wire.read_all(client), DATA)
            assert len(kernel.opened(pid, "pipe:")) == idle
        return
    with gateway.connect(20) as client:
        client.sendall(http_wire.request(server))
        assert same(http_wire.read_answer(client).body, DATA)
        wait.until(
            lambda: len(kernel.opened(pid, "pipe:")) == idle
        )  # trap 3: silent, too
        with kernel.no_more_descriptors(pid):
            client.sendall(http_wire.request(server))
            assert same(http_wire.read_answer(client).body, DATA)
            assert len(kernel.opened(pid, "pipe:")) == idle
    assert len(server.callers) == 1


# --- Bodies -------------------------------------------------------------------


def framed(way: str, data: bytes) -> tuple[bytes, bytes]:
    """Return the field that announces a body, and the body, 20 chunks at most."""
    if way == "sized":
        return b"Content-Length: %d" % len(data), data
    pieces = [data[i : i + MIB] for i in range(0, len(data), MIB)]
    return b"Transfer-Encoding: chunked", http_wire.chunks(*pieces)


@pytest.mark.parametrize("slow", [False, True], ids=["quick", "slow"])
@pytest.mark.parametrize("way", ["sized", "chunked", "closed"])
def test_twenty_megabytes_come_back_whole(
    gateway: running.Gateway, origin: origins.Start, way: str, slow: bool
) -> None:
    def answer(connection: socket.socket, server: origins.Origin) -> None:
        http_wire.read_head(connection)
        field, body = (b"", DATA) if way == "closed" else framed(way, DATA)
        connection.sendall(http_wire.response(*([field] if field else []), body=body))

    server = origin(answer)
    with socket.socket() as client:
        if slow:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 16384)
        client.settimeout(20)
        client.connect(gateway.address)
        client.sendall(http_wire.request(server))
        got = http_wire.read_answer(client)
    assert (same(got.body, DATA), got.complete) == (True, True)


@pytest.mark.parametrize("slow", [False, True], ids=["quick", "slow"])
@pytest.mark.parametrize("way", ["sized", "chunked"])
def test_twenty_megabytes_get_there_whole(
    gateway: running.Gateway, origin: origins.Start, way: str, slow: bool
) -> None:
    def store(connection: socket.socket, server: origins.Origin) -> None:
        message = http_wire.read_request(connection)
        assert message and message.complete
        server.received.append(message.body)
        connection.sendall(http_wire.sized(b"stored"))

    server = origin(store)
    if slow:  # what is accepted inherits it
        server.listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 16384)
    field, body = framed(way, DATA)
    data = http_wire.request(server, field, method=b"POST", body=body)
    with gateway.connect(20) as client, sending(client, data, end=False):
        assert http_wire.read_answer(client).body == b"stored"
    assert same(server.received[0], DATA)


@pytest.mark.parametrize("way", ["sized", "chunked"])
def test_bodies_go_both_ways_at_once(
    gateway: running.Gateway, origin: origins.Start, way: str
) -> None:
    field, body = framed(way, DATA)

    def answer(connection: socket.socket, server: origins.Origin) -> None:
        connection.recv(1, socket.MSG_PEEK)
        with sending(connection, http_wire.response(field, body=body), end=False):
            message = http_wire.read_request(connection)
        assert message and message.complete
        server.received.append(message.body)

    server = origin(answer)
    with gateway.connect(20) as client:
        data = http_wire.request(server, field, method=b"POST", body=body)
        with sending(client, data, end=False):
            got = http_wire.read_answer(client)
    assert (same(got.body, DATA), got.complete) == (True, True)
    wait.until(lambda: server.received)
    assert same(server.received[0], DATA)


def test_who_reads_slowly_and_all_the_time_is_not_silent(
    natwork: running.Start, origin: origins.Start
) -> None:
    size = 3_000_000

    def give(connection: socket.socket, origin: origins.Origin) -> None:
        connection.sendall(b"x" * size)
        connection.shutdown(socket.SHUT_WR)
        connection.recv(1)

    gateway, server = natwork("tunnel_timeout=1"), origin(give)
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 32768)
        client.settimeout(20)
        client.connect(gateway.address)
        client.sendall(
            f"CONNECT {server.authority} HTTP/1.1\r\nHost: a\r\n\r\n".encode()
        )
        got, began = len(client.recv(39)), time.monotonic()
        while data := client.recv(65536 if time.monotonic() > began + 3 else 8192):
            got += len(data)
            if time.monotonic() < began + 3:
                time.sleep(0.02)  # all that comes here has long left the gateway
    assert got == 39 + size


@pytest.mark.parametrize("way", ["up", "down", "tunnel"])
def test_an_urgent_byte_neither_stops_bulk_nor_costs_cpu(
    natwork: running.Start, origin: origins.Start, way: str
) -> None:
    def urge(connection: socket.socket) -> None:
        """Send bulk with an urgent byte in it; splice(2) goes no further than that."""
        wire.send(connection, DATA[:MIB])
        time.sleep(0.2)
        connection.send(b"!", socket.MSG_OOB)
        wire.send(connection, DATA[MIB:])

    def serve(connection: socket.socket, server: origins.Origin) -> None:
        http_wire.read_head(connection)
        if way == "up":
            server.received.append(wire.read_exactly(connection, len(DATA)))
            return connection.sendall(http_wire.sized(b"got it"))
        if way == "down":
            connection.sendall(b"HTTP/1.1 200 OK\r\n%b\r\n\r\n" % length)
        urge(connection)
        wire.read_all(connection)

    length = b"Content-Length: %d" % len(DATA)
    gateway, server = natwork(*running.ALONE, "idle_timeout=5"), origin(serve)
    worker = gateway.only_worker()
    with contextlib.ExitStack() as stack:
        if way == "tunnel":
            client = stack.enter_context(http_wire.tunnel(gateway, server, b"\r\n\r\n"))
            assert same(wire.read_exactly(client, len(DATA)), DATA)
        else:
            client = stack.enter_context(gateway.connect(20))
            wire.send(
                client,
                http_wire.request(server, *[length] * (way == "up"), method=b"PUT"),
            )
            if way == "up":
                urge(client)
                assert http_wire.read_answer(client).body == b"got it"
                assert same(server.received[0], DATA)
            else:
                assert same(http_wire.read_answer(client).body, DATA)
        before = kernel.ticks(worker)
        time.sleep(0.3)
        assert kernel.ticks(worker) - before < 0.2 * kernel.TICK


@pytest.mark.parametrize("proto", ["connect", "upgrade"])
def test_a_reset_that_meets_both_lanes_at_once_is_no_end(
    natwork: running.Start, origin: origins.Start, proto: str
) -> None:
    go = threading.Event()
    switch = b"HTTP/1.1 101 Go\r\nConnection: upgrade\r\nUpgrade: x\r\n\r\n"

    def serve(connection: socket.socket, server: origins.Origin) -> None:
        if proto == "upgrade":
            http_wire.read_head(connection)
            connection.sendall(switch)
        go.wait(10)
        connection.sendall(b"half of what I had to")
        time.sleep(0.1)
        wire.reset(connection)

    gateway, server = natwork(*running.ALONE), origin(serve)
    worker = gateway.only_worker()
    fields = [] if proto == "connect" else [b"Connection: upgrade", b"Upgrade: x"]
    method = b"CONNECT" if proto == "connect" else b"GET"
    with gateway.connect() as client:
        client.sendall(http_wire.request(server, *fields, method=method))
        assert http_wire.read_head(client)
        with kernel.stopped(worker):
            go.set()
            time.sleep(0.3)
            client.sendall(b"what the server no longer takes")
        with pytest.raises(ConnectionResetError):
            while client.recv(64):
                pass
    assert gateway.line_about(server)["outcome"] == "server-gone"


@pytest.mark.parametrize("way", ["tunnel", "answer"])
def test_a_reset_behind_the_end_cuts_nothing(
    gateway: running.Gateway, origin: origins.Start, way: str
) -> None:
    def part(connection: socket.socket, server: origins.Origin) -> None:
        """End, and close with unread input: a FIN, and then a reset."""
        if way == "answer":
            http_wire.read_head(connection)
            connection.sendall(b"HTTP/1.0 413 No\r\n\r\n")
        connection.recv(1)
        connection.sendall(b"all of it")
        connection.shutdown(socket.SHUT_WR)

    for _ in range(20):
        server = origin(part)
        fields = [b"Content-Length: 100000000"] if way == "answer" else []
        method = b"POST" if way == "answer" else b"CONNECT"
        with gateway.connect(20) as client:
            client.sendall(http_wire.request(server, *fields, method=method))
            if way == "tunnel":
                assert http_wire.read_head(client) == http_wire.ACCEPTED
            with sending(client, DATA, False):
                said = b""
                while piece := client.recv(65536):  # to the end, and no reset
                    said += piece
            assert said.endswith(b"all of it")
