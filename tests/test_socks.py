"""SOCKS 4, 4a and 5: every message in any pieces, replies, BIND and datagrams."""

from __future__ import annotations

import contextlib
import copy
import errno
import json
import os
import re
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import addresses
import http_wire
import kernel
import needs
import origins
import pytest
import running
import socks_wire
import wait
import wire

import natwork
import natwork_socks
import natwork_users

Ask = Callable[[str, int], bytes]
endpoint = natwork.endpoint

the_gateway = running.shared()
SOME = bytes(range(256)) * 40


@pytest.fixture
def gateway(the_gateway: running.Gateway) -> running.Gateway:
    """Return the gateway of the module, with nobody in it."""
    the_gateway.at_rest()
    return the_gateway


def caller(server: origins.Origin) -> socks_wire.Address:
    """Return who has called a server."""
    wait.until(lambda: server.callers)
    return server.callers[0]


def fresh(gateway: running.Gateway) -> Callable[[], dict[str, str]]:
    """Return a function that returns the log line of the next session to end."""
    # The client before this one has no line yet while its connection is there.
    place = re.compile(
        rf"^ *\d+: \S+:{gateway.address[1]:04X} \S+ (?:01|08) ", re.MULTILINE
    )
    wait.until(lambda: not place.search(Path("/proc/net/tcp").read_text()))
    count = len(gateway.lines())
    return lambda: gateway.lines(count + 1)[count]


@pytest.fixture
def udp() -> Iterator[Callable[..., socks_wire.UdpEcho]]:
    """Return a function that starts a UDP echo server."""
    with contextlib.ExitStack() as stack:

        def start(host: str = "127.0.0.3") -> socks_wire.UdpEcho:
            server = socks_wire.UdpEcho(host)
            stack.callback(server.close)
            return server

        yield start


Udp = Callable[..., socks_wire.UdpEcho]


# --- CONNECT ------------------------------------------------------------------

ASKS: dict[str, tuple[str, Ask]] = {
    "4": ("127.0.0.3", lambda host, port: socks_wire.four(host, port)),
    "4 without a user": (
        "127.0.0.3",
        lambda host, port: socks_wire.four(host, port, user=b""),
    ),
    "4, longest user": (
        "127.0.0.3",
        lambda host, port: socks_wire.four(host, port, user=b"u" * 255),
    ),
    "4a": ("127.0.0.1", lambda _, port: socks_wire.four("localhost", port)),
    "4a, an address": (
        "127.0.0.3",
        lambda host, port: socks_wire.four("x", port)[:-2] + b"127.0.0.3\0",
    ),
    "5, address": (
        "127.0.0.3",
        lambda host, port: (
            socks_wire.HELLO + socks_wire.five(socks_wire.addressed(host, port))
        ),
    ),
    "5, name": (
        "127.0.0.1",
        lambda _, port: (
            socks_wire.HELLO + socks_wire.five(socks_wire.named("LocalHost", port))
        ),
    ),
    "5, an address as name": (
        "127.0.0.3",
        lambda host, port: (
            socks_wire.HELLO + socks_wire.five(socks_wire.named(host, port))
        ),
    ),
    "5, mapped": (
        "127.0.0.3",
        lambda host, port: (
            socks_wire.HELLO
            + socks_wire.five(socks_wire.addressed("::ffff:" + host, port))
        ),
    ),
    "5, every method but a password": (
        "127.0.0.3",
        lambda host, port: (
            b"\5\xfe"
            + bytes(n for n in range(254, -1, -1) if n != 2)
            + socks_wire.five(socks_wire.addressed(host, port))
        ),
    ),
    "5, IPv6": (
        "::1",
        lambda host, port: (
            socks_wire.HELLO + socks_wire.five(socks_wire.addressed(host, port))
        ),
    ),
    "5, IPv6 as name": (
        "::1",
        lambda host, port: (
            socks_wire.HELLO + socks_wire.five(socks_wire.named(host, port))
        ),
    ),
    "4a, IPv6 as name": ("::1", lambda host, port: socks_wire.four(host, port)),
}
PIECES = ["whole", "bytes", "with more behind"]


def feed(client: socket.socket, data: bytes, pieces: str) -> None:
    """Send a request; what comes after it, if anything, is SOME."""
    if pieces == "bytes":
        wire.drip(client, data)
    else:
        wire.send(client, data + (SOME if pieces == "with more behind" else b""))


@pytest.mark.parametrize("pieces", PIECES)
@pytest.mark.parametrize("name", ASKS)
def test_a_connection_is_granted_however_the_request_arrives(
    gateway: running.Gateway, origin: origins.Start, name: str, pieces: str
) -> None:
    host, ask = ASKS[name]
    if ":" in host and needs.ipv6.args[0]:
        pytest.skip("this box has no ::1")
    server, line = origin(origins.echo, host), fresh(gateway)
    with gateway.connect() as client:
        feed(client, ask(host, server.port), pieces)
        if name.startswith("5"):
            assert wire.read_exactly(client, 2) == socks_wire.AGREED
            code, source = socks_wire.read_five(client)
            assert (code, source) == (0, caller(server))
        else:
            code, source = socks_wire.read_four(client)
            known = ("0.0.0.0", caller(server)[1]) if ":" in host else None
            assert (code, source) == (90, known or caller(server))
        if pieces == "with more behind":  # before anything else that is said
            assert wire.read_exactly(client, len(SOME)) == SOME
        assert wire.echoes(client)
    entry = line()
    assert entry["proto"] == f"socks{name[0]}"
    assert entry["address"] == server.authority
    assert entry["source"] == endpoint(caller(server))
    assert (entry["status"], entry["outcome"]) == (str(code), "closed")
    assert (entry["method"], entry["user"]) == ("CONNECT", "-")
    carried = len(b"still here") + len(SOME) * (pieces == "with more behind")
    told = 8 if name[0] == "4" else 24 if ":" in host else 12
    assert (entry["up"], entry["down"]) == (str(carried), str(carried + told))


ZEROS = bytes(6)
FAILURES: dict[str, tuple[bytes, bytes, str]] = {
    "no method": (b"\5\0", b"\5\xff", "no-method"),
    "GSSAPI only": (b"\5\1\1", b"\5\xff", "no-method"),
    "another version": (
        socks_wire.HELLO + b"\4\1\0\1" + ZEROS,
        socks_wire.five_reply(1),
        "bad-request",
    ),
    "reserved byte": (
        socks_wire.HELLO + b"\5\1\1\1" + ZEROS,
        socks_wire.five_reply(1),
        "bad-request",
    ),
    "command 0": (
        socks_wire.HELLO + socks_wire.five(socks_wire.addressed("127.0.0.3", 1), 0),
        socks_wire.five_reply(7),
        "not-implemented",
    ),
    "command 4": (
        socks_wire.HELLO + socks_wire.five(socks_wire.addressed("127.0.0.3", 1), 4),
        socks_wire.five_reply(7),
        "not-implemented",
    ),
    "address type 0": (
        socks_wire.HELLO + b"\5\1\0\0",
        socks_wire.five_reply(8),
        "bad-address-type",
    ),
    "address type 2": (
        socks_wire.HELLO + b"\5\1\0\2",
        socks_wire.five_reply(8),
        "bad-address-type",
    ),
    "address type 255": (
        socks_wire.HELLO + b"\5\1\0\xff",
        socks_wire.five_reply(8),
        "bad-address-type",
    ),
    "port 0": (
        socks_wire.HELLO + socks_wire.five(socks_wire.named("localhost", 0)),
        socks_wire.five_reply(1),
        "bad-request",
    ),
    "denied": (
        socks_wire.HELLO + socks_wire.five(socks_wire.addressed("10.1.2.3", 80)),
        socks_wire.five_reply(2),
        "denied-inside",
    ),
    "denied name": (
        socks_wire.HELLO + socks_wire.five(socks_wire.named("10.1.2.3", 80)),
        socks_wire.five_reply(2),
        "denied-inside",
    ),
    "mail": (
        socks_wire.HELLO + socks_wire.five(socks_wire.named("127.0.0.3", 25)),
        socks_wire.five_reply(2),
        "denied-loopback",
    ),
    "refused": (
        socks_wire.HELLO + socks_wire.five(socks_wire.addressed("127.0.0.3", 1)),
        socks_wire.five_reply(5),
        "refused",
    ),
    "no such host": (
        socks_wire.HELLO + socks_wire.five(socks_wire.named("nosuch.invalid", 80)),
        socks_wire.five_reply(4),
        "no-such-host",
    ),
    **{
        f"the name {name!r}": (
            socks_wire.HELLO + socks_wire.five(socks_wire.named(name, 80)),
            socks_wire.five_reply(1),
            "bad-request",
        )
        for name in (
            b"",
            b"a\0b",
            b"local\0",
            b"user@localhost",
            b"a b",
            b"a%2e",
            b"a\nb",
            b"a:80",
            b"[::1]",
            b"127.1",
            b"0x7f.1",
            b"2130706433",
            b"\xc3\xa9",
        )
    },
    "4, refused": (
        socks_wire.four("127.0.0.3", 1),
        socks_wire.four_reply(91),
        "refused",
    ),
    "4, denied": (
        socks_wire.four("10.1.2.3", 80),
        socks_wire.four_reply(91),
        "denied-inside",
    ),
    "4, port 0": (
        socks_wire.four("127.0.0.3", 0),
        socks_wire.four_reply(91),
        "bad-request",
    ),
    "4, command 0": (
        socks_wire.four("127.0.0.3", 1, 0),
        socks_wire.four_reply(91),
        "not-implemented",
    ),
    "4, command 3": (
        socks_wire.four("127.0.0.3", 1, 3),
        socks_wire.four_reply(91),
        "not-implemented",
    ),
    "4, nowhere": (
        socks_wire.four("0.0.0.0", 80),
        socks_wire.four_reply(91),
        "denied-unspecified",
    ),
    "4, endless user": (
        socks_wire.four("127.0.0.3", 80, user=b"u" * 256)[:264],
        socks_wire.four_reply(91),
        "bad-request",
    ),
    "4a, no such host": (
        socks_wire.four("nosuch.invalid", 80),
        socks_wire.four_reply(91),
        "no-such-host",
    ),
    "4a, empty name": (
        socks_wire.four("x", 80)[:-2] + b"\0",
        socks_wire.four_reply(91),
        "bad-request",
    ),
    "4a, a bad name": (
        socks_wire.four("a@b", 80),
        socks_wire.four_reply(91),
        "bad-request",
    ),
    "4a, 127.1": (
        socks_wire.four("127.1", 80),
        socks_wire.four_reply(91),
        "bad-request",
    ),
    "4a, endless name": (
        socks_wire.four("n" * 256, 80)[:-1],
        socks_wire.four_reply(91),
        "bad-request",
    ),
}


@pytest.mark.parametrize("pieces", PIECES)
@pytest.mark.parametrize("name", FAILURES)
def test_a_failure_has_its_reply_and_is_closed_at_once(
    gateway: running.Gateway, name: str, pieces: str
) -> None:
    asked, told, outcome = FAILURES[name]
    if asked[0] == 5 and told[1] != 0xFF:
        told = socks_wire.AGREED + told
    line, began = fresh(gateway), time.monotonic()
    with gateway.connect() as client:
        feed(client, asked, pieces)
        assert wire.read_all(client) == told
        assert time.monotonic() < began + 5  # R75: within ten
    entry = line()
    code = (
        told[-len(socks_wire.five_reply(0)) + 1]
        if told[:2] == socks_wire.AGREED
        else told[1]
    )
    assert (entry["status"], entry["outcome"]) == (str(code), outcome)
    dialed = "127.0.0.3:1" if outcome == "refused" else "-"
    assert (entry["address"], entry["source"]) == (dialed, "-")
    assert (entry["up"], entry["down"]) == ("0", str(len(told)))


def test_the_gateway_itself_is_a_loop(gateway: running.Gateway) -> None:
    line = fresh(gateway)
    with gateway.connect() as client:
        client.sendall(
            socks_wire.HELLO + socks_wire.five(socks_wire.addressed(*gateway.address))
        )
        assert wire.read_all(client) == socks_wire.AGREED + socks_wire.five_reply(2)
    assert line()["outcome"] == "loop"


@pytest.mark.parametrize(
    ("number", "reply"),
    [
        (errno.ENETUNREACH, 3),
        (errno.ENETDOWN, 3),
        (errno.EHOSTUNREACH, 4),
        (errno.ECONNREFUSED, 5),
        (errno.ECONNRESET, 5),
        (errno.ETIMEDOUT, 6),
        (errno.ENODEV, 3),
        (errno.EADDRNOTAVAIL, 3),
        (errno.EMFILE, 1),
        (errno.EADDRINUSE, 1),
    ],
)
def test_an_error_of_the_kernel_has_its_reply(number: int, reply: int) -> None:
    assert natwork.OUTCOME_OF_ERRNO[number].reply == reply  # RFC 1928 section 6


def test_every_outcome_has_a_reply_and_only_success_has_0() -> None:
    outcomes = [x for x in vars(natwork).values() if isinstance(x, natwork.Outcome)]
    good = {x.word for x in outcomes if x.reply == 0}
    assert len(outcomes) > 30 and good == {"ok", "closed"}
    assert {x.reply for x in outcomes} == {0, 1, 2, 3, 4, 5, 6, 7, 8, 255}


@pytest.mark.parametrize(
    "first", [b"\0", b"\3\1\0", b"\6", b"\x16\3\1", b" GET", b"\n"]
)
def test_what_is_neither_socks_nor_http_is_refused(
    gateway: running.Gateway, first: bytes
) -> None:
    line = fresh(gateway)
    with gateway.connect() as client:
        wire.send(client, first)
        assert http_wire.read_head(client).startswith(b"HTTP/1.1 400 ")
    assert line()["outcome"] == "bad-request"


LOGIN = socks_wire.login(b"alice", b"any")


def test_a_request_must_come_within_head_timeout(natwork: running.Start) -> None:
    started = natwork("head_timeout=0.5")
    cases = [
        (b"\5", b""),
        (b"\5\2\0", b""),
        (socks_wire.HELLO, socks_wire.AGREED + socks_wire.five_reply(1)),
        (
            socks_wire.HELLO + socks_wire.five(socks_wire.named("localhost", 80))[:-1],
            socks_wire.AGREED + socks_wire.five_reply(1),
        ),
        (b"\4", socks_wire.four_reply(91)),
        (socks_wire.four("localhost", 80)[:-1], socks_wire.four_reply(91)),
        *[(LOGIN[:size], b"\5\2\1\1") for size in (3, 4, 6, 10, 11)],
    ]
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(started.connect()) for _ in cases]
        for client, (said, _) in zip(clients, cases):
            wire.send(client, said)
        for client, (_, told) in zip(clients, cases):
            assert wire.read_all(client) == told
    outcomes = [line["outcome"] for line in started.lines(len(cases))]
    assert outcomes == ["head-timeout"] * len(cases)


def test_a_refused_client_that_drips_is_let_go(natwork: running.Start) -> None:
    program = running.program({"natwork_socks.FAILED_TIME": 0.3})
    gateway = natwork(program=program)
    with gateway.connect() as client:  # R75
        wire.send(client, socks_wire.four("127.0.0.1", 0))
        assert wire.read_all(client) == socks_wire.four_reply(91)

        def is_let_go() -> bool:
            with contextlib.suppress(ConnectionError):
                client.sendall(b"x")
                return False
            return True

        wait.until(is_let_go)


def test_a_client_who_drips_has_no_more_time_than_others(
    natwork: running.Start,
) -> None:
    started = natwork("head_timeout=0.5")
    with started.connect() as client:
        client.sendall(b"\4\1")
        with contextlib.suppress(ConnectionError):
            for _ in range(12):
                time.sleep(0.1)
                client.sendall(b"\1")
    assert started.lines(1)[0]["outcome"] == "head-timeout"


def test_who_says_nothing_is_closed_without_a_line(natwork: running.Start) -> None:
    started = natwork("head_timeout=0.5")
    with started.connect() as client:
        assert client.recv(1) == b""
    assert started.lines() == []


@pytest.mark.parametrize(
    "said",
    [
        b"\5",
        socks_wire.HELLO + b"\5\1",
        LOGIN[:-1],
        LOGIN,
        b"\4\1",
        socks_wire.four("a", 80)[:-1],
    ],
)
def test_a_client_who_leaves_inside_the_request_is_gone(
    gateway: running.Gateway, said: bytes
) -> None:
    line = fresh(gateway)
    with gateway.connect() as client:
        client.sendall(said)
    assert line()["outcome"] == "client-gone"


@pytest.mark.parametrize("host", ["127.0.0.3", pytest.param("::1", marks=needs.ipv6)])
def test_the_reply_has_the_outside_address(
    natwork: running.Start, origin: origins.Start, host: str
) -> None:
    started, server = natwork("outside=127.0.0.2 ::1"), origin(origins.echo, host)
    with started.connect() as client:
        code, source = socks_wire.ask_five(
            client, socks_wire.five(socks_wire.addressed(host, server.port))
        )
        assert (code, source) == (0, caller(server))
        assert source[0] == ("::1" if host == "::1" else "127.0.0.2")


def test_each_half_of_a_connection_ends_by_itself(
    gateway: running.Gateway, origin: origins.Start
) -> None:
    def late(connection: socket.socket, origin: origins.Origin) -> None:
        connection.sendall(b"heard " + wire.read_all(connection))

    server = origin(late)
    with gateway.connect() as client:
        assert (
            socks_wire.ask_five(
                client, socks_wire.five(socks_wire.addressed(server.host, server.port))
            )[0]
            == 0
        )
        client.sendall(b"all of it")
        client.shutdown(socket.SHUT_WR)
        assert wire.read_all(client) == b"heard all of it"


# --- Names --------------------------------------------------------------------

SERVER = "127.0.0.3"
NAMES = {  # as the client claims it, and as the log has it
    "plain": (b"alice", "alice"),
    "more after it": (b"alice;app=ssh", "alice;app=ssh"),
    "none": (b"", "-"),
    "control bytes": (b'a\n\0 "\x1b[2J\x7f\xff', r"a\x0a\x00\x20\x22\x1b[2J\x7f\xff"),
    "a forged field": (b"a outcome=ok", r"a\x20outcome=ok"),
    "longest": (b"n" * 255, "n" * 255),
    "longest, escaped": (b"\n" * 255, r"\x0a" * 255),
}


@pytest.mark.parametrize("pieces", PIECES)
@pytest.mark.parametrize("name", NAMES)
def test_any_name_is_right_and_is_logged_as_claimed(
    gateway: running.Gateway, origin: origins.Start, name: str, pieces: str
) -> None:
    server, line, (said, logged) = origin(origins.echo), fresh(gateway), NAMES[name]
    where = socks_wire.five(socks_wire.addressed(server.host, server.port))
    with gateway.connect() as client:
        feed(client, socks_wire.login(said, b"p" * 255) + where, pieces)
        assert wire.read_exactly(client, 4) == socks_wire.KNOWN
        assert socks_wire.read_five(client) == (0, caller(server))
        if pieces == "with more behind":
            assert wire.read_exactly(client, len(SOME)) == SOME
        assert wire.echoes(client)
    entry = line()
    assert (entry["user"], entry["proto"]) == (logged, "socks5")
    assert (entry["status"], entry["outcome"]) == ("0", "closed")


@pytest.mark.parametrize("password", [b"", b"any", b"\0\n\xff"])
@pytest.mark.parametrize(
    "methods", [b"\2", b"\0\2", b"\2\0", b"\1\2", bytes(range(254, -1, -1))]
)
def test_a_client_that_offers_a_name_is_asked_for_it(
    gateway: running.Gateway, origin: origins.Start, methods: bytes, password: bytes
) -> None:
    server, line = origin(origins.echo), fresh(gateway)
    where = socks_wire.addressed(server.host, server.port)
    with gateway.connect() as client:
        said = socks_wire.login(b"alice", password, methods)
        wire.send(client, said + socks_wire.five(where))
        assert wire.read_exactly(client, 4) == socks_wire.KNOWN
        assert socks_wire.read_five(client) == (0, caller(server))
    assert line()["user"] == "alice"


@pytest.mark.parametrize("pieces", PIECES)
@pytest.mark.parametrize("version", [0, 2, 5, 255])
def test_another_version_of_the_login_fails_at_once(
    gateway: running.Gateway, version: int, pieces: str
) -> None:
    line, said = fresh(gateway), b"\5\1\2" + bytes([version]) + LOGIN[4:]
    began = time.monotonic()
    with gateway.connect() as client:
        feed(client, said, pieces)
        assert wire.read_all(client) == b"\5\2\1\1"
        assert time.monotonic() < began + 5
    entry = line()
    assert (entry["outcome"], entry["user"]) == ("bad-request", "-")


def test_a_claimed_name_is_in_the_title_and_the_table(
    gateway: running.Gateway, origin: origins.Start, udp: Udp
) -> None:
    server, peer = origin(origins.echo), udp()
    where = socks_wire.five(socks_wire.addressed(server.host, server.port))
    with gateway.connect() as client, socks_wire.associated(gateway, b"bob") as other:
        wire.send(client, socks_wire.login(b"al ice") + where)
        assert wire.read_exactly(client, 4) == socks_wire.KNOWN
        assert socks_wire.read_five(client)[0] == 0 and wire.echoes(client)
        other.exchange(socks_wire.addressed(peer.host, peer.port), b"x")
        for name, sock in ((r"al\x20ice", client), ("bob", other.control)):
            title = kernel.title(gateway.worker_of(sock))
            assert title.startswith("natwork: %s:%d " % sock.getsockname() + name)
        done = running.command("--table", "--json", cwd=gateway.folder)
        rows = {row["original_source_port"]: row for row in json.loads(done.stdout)}
        for name, sock in ((r"al\x20ice", client), ("bob", other.control)):
            assert rows[sock.getsockname()[1]]["user"] == name


def test_a_long_claimed_name_leaves_the_title_room_for_the_host(
    gateway: running.Gateway, origin: origins.Start
) -> None:
    server = origin(origins.echo)
    where = socks_wire.addressed(server.host, server.port)
    with gateway.connect() as client:
        wire.send(client, socks_wire.login(b"x" * 255) + socks_wire.five(where))
        assert wire.read_exactly(client, 4) == socks_wire.KNOWN
        assert socks_wire.read_five(client)[0] == 0
        title = kernel.title(gateway.worker_of(client))
    assert " %s > " % ("x" * 64) in title and title.endswith(f" socks5 {server.host}")


def asked_as(
    gateway: running.Gateway, name: bytes, where: bytes, command: int
) -> tuple[int, str]:
    """Return the reply to a client that claims a name, and the log's outcome."""
    line = fresh(gateway)
    with gateway.connect() as client:
        wire.send(client, socks_wire.login(name) + socks_wire.five(where, command))
        assert wire.read_exactly(client, 4) == socks_wire.KNOWN
        code, _ = socks_wire.read_five(client)
    entry = line()
    assert entry["user"] == name.decode()
    return code, entry["outcome"]


@pytest.mark.parametrize("command", [socks_wire.CONNECT, socks_wire.BIND])
def test_a_claimed_name_opens_nothing(
    natwork: running.Start, origin: origins.Start, command: int
) -> None:
    rules = "allow user alice to 127.0.0.3/32; allow user alice to *"
    started, server = natwork(f"rules={rules}", loopback=False), origin(origins.echo)
    for host in (SERVER, "localhost"):
        where = socks_wire.addressed(host, server.port)
        for name in (b"alice", b"alice;app=x"):
            told = asked_as(started, name, where, command)
            assert told == (2, "denied-loopback")
    assert server.callers == []


@pytest.mark.parametrize("command", [socks_wire.CONNECT, socks_wire.BIND])
def test_a_proven_name_opens_what_its_rule_says(
    natwork: running.Start, origin: origins.Start, tmp_path: Path, command: int
) -> None:
    users = tmp_path / "users"
    users.write_bytes(natwork_users.user_line(b"alice", b"any") + b"\n")
    users.chmod(0o640)
    words = "rules=allow user alice to 127.0.0.3/32", f"users={users}"
    started, server = natwork(*words, loopback=False), origin(origins.echo, SERVER)
    where = socks_wire.addressed(SERVER, server.port)
    told = asked_as(started, b"alice", where, command)
    assert told == (0, "closed" if command == socks_wire.CONNECT else "client-gone")


def test_a_claimed_name_closes_nothing(
    natwork: running.Start, origin: origins.Start
) -> None:
    rules = f"deny user alice; {running.LOOPBACK}"
    started, server = natwork(f"rules={rules}", loopback=False), origin(origins.echo)
    where = socks_wire.addressed(server.host, server.port)
    assert asked_as(started, b"alice", where, socks_wire.CONNECT) == (0, "closed")


def test_a_claimed_name_sends_no_datagram(natwork: running.Start, udp: Udp) -> None:
    rules = "allow to 127.0.0.4/32; allow user alice to 127.0.0.0/8"
    started = natwork(f"rules={rules}", "udp_from_anyone=yes", loopback=False)
    closed, peer = udp(), udp("127.0.0.4")
    where = socks_wire.addressed(peer.host, peer.port)
    with socks_wire.associated(started, b"alice") as client:
        client.send(socks_wire.addressed(closed.host, closed.port), b"not this")
        assert client.exchange(where, b"x")[1] == b"x"
        closed.sock.sendto(b"nor this", outer_port(peer))
        assert client.exchange(where, b"y")[1] == b"y"
        assert closed.senders == []
    (line,) = started.lines(1)
    assert (line["user"], line["up"]) == ("alice", "2")


def test_a_claimed_name_is_not_for_a_parent(
    natwork: running.Start, origin: origins.Start
) -> None:
    parent = origin(origins.echo)
    rules = f"allow user alice to nosuch.invalid; {running.LOOPBACK}"
    words = f"rules={rules}", f"parents=http://{parent.authority}"
    started, where = natwork(*words), socks_wire.named("nosuch.invalid", 80)
    told = asked_as(started, b"alice", where, socks_wire.CONNECT)
    assert told == (4, "no-such-host") and parent.callers == []


@pytest.mark.parametrize("scheme", ["socks5", "socks5h"])
@pytest.mark.parametrize(("login", "user"), [("u:p@", "u"), ("u:@", "u"), ("", "-")])
def test_curl_names_itself(
    gateway: running.Gateway, origin: origins.Start, scheme: str, login: str, user: str
) -> None:
    needs.programs("curl")
    server = origin(http_wire.Script(http_wire.sized(b"a page")))
    proxy = f"{scheme}://{login}%s:%d" % gateway.address
    words = ["curl", "--silent", "--show-error", "--noproxy", "", "--max-time", "20"]
    done = subprocess.run(
        [*words, "--proxy", proxy, server.url], capture_output=True, timeout=30
    )
    assert done.stdout == b"a page", done
    assert gateway.line_about(server)["user"] == user


# --- RESOLVE and RESOLVE_PTR --------------------------------------------------

RESOLVED = {
    "name": (socks_wire.RESOLVE, "localhost", socks_wire.five_reply(0, "127.0.0.1")),
    "address": (socks_wire.RESOLVE, "127.0.0.9", socks_wire.five_reply(0, "127.0.0.9")),
    "IPv6": (socks_wire.RESOLVE, "::1", socks_wire.five_reply(0, "::1")),
    "back": (
        socks_wire.RESOLVE_PTR,
        "127.0.0.1",
        socks_wire.five_reply(0, "localhost"),
    ),
    "denied": (socks_wire.RESOLVE, "10.1.2.3", socks_wire.five_reply(2)),
    "denied back": (socks_wire.RESOLVE_PTR, "10.1.2.3", socks_wire.five_reply(2)),
    "no name": (socks_wire.RESOLVE, "a b", socks_wire.five_reply(1)),
}


@pytest.mark.parametrize("pieces", ["whole", "bytes"])
@pytest.mark.parametrize("case", RESOLVED)
def test_a_client_may_ask_for_an_address_or_a_name(
    gateway: running.Gateway, case: str, pieces: str
) -> None:
    line = fresh(gateway)
    command, host, reply = RESOLVED[case]
    asked = socks_wire.HELLO + socks_wire.five(socks_wire.addressed(host, 0), command)
    with gateway.connect() as client:
        feed(client, asked, pieces)
        # This reply is all, whatever more is said.
        assert wire.read_all(client) == socks_wire.AGREED + reply
    ended = line()
    method = "RESOLVE_PTR" if command == socks_wire.RESOLVE_PTR else "RESOLVE"
    assert (ended["proto"], ended["method"]) == ("socks5", method)
    words = {0: "ok", 1: "bad-request", 2: "denied-inside"}
    assert (ended["status"], ended["outcome"]) == (str(reply[1]), words[reply[1]])
    found = {"back": "127.0.0.1", "name": "127.0.0.1"}.get(case, host)
    dialed = "-" if reply[1] else endpoint((found, 0))
    assert (ended["address"], ended["source"]) == (dialed, "-")


@pytest.mark.parametrize(
    ("rules", "port", "reply"),
    [
        # Some port may be dialed, so the address may be known.
        ("allow to 127.0.0.3/32 port 80,443; deny", 0, 0),
        ("allow to 127.0.0.3/32 port 80,443; deny", 443, 0),
        ("allow to 127.0.0.3/32 port 80,443; deny", 81, 2),
        ("deny port 80; allow to 127.0.0.0/8", 0, 0),
        ("deny port 80; allow to 127.0.0.0/8", 80, 2),
        ("deny to 127.0.0.3; allow to 127.0.0.0/8", 0, 2),
        ("allow to 127.0.0.4/32 port 80", 0, 2),
        ("allow port 80", 0, 2),
        ("allow user bob to 127.0.0.3/32", 0, 2),
    ],
)
def test_what_may_be_dialed_at_some_port_may_be_asked_for(
    natwork: running.Start, rules: str, port: int, reply: int
) -> None:
    started = natwork(f"rules={rules}", loopback=False)
    where = socks_wire.addressed("127.0.0.3", port)
    with started.connect() as client:
        client.sendall(socks_wire.login(b"bob"))  # which is but a claim
        assert wire.read_exactly(client, 4) == socks_wire.KNOWN
        client.sendall(socks_wire.five(where, socks_wire.RESOLVE))
        code, (host, _) = socks_wire.read_five(client)
    assert code == reply and (host == "127.0.0.3") == (reply == 0)
    assert started.lines(1)[0]["user"] == "bob"


def test_version_4_asks_for_no_address(gateway: running.Gateway) -> None:
    for command in (socks_wire.RESOLVE, socks_wire.RESOLVE_PTR):
        with gateway.connect() as client:
            client.sendall(socks_wire.four("127.0.0.3", 0, command))
            assert wire.read_all(client) == socks_wire.four_reply(91)


# --- BIND ---------------------------------------------------------------------


@contextlib.contextmanager
def bound(
    gateway: running.Gateway,
    host: str = SERVER,
    version: int = 5,
    more: bytes = b"",
    port: int = 21,
) -> Iterator[tuple[socket.socket, socks_wire.Address]]:
    """Have a port opened for a host; yield the client's end and where it is."""
    read = socks_wire.read_five if version == 5 else socks_wire.read_four
    with gateway.connect() as client:
        if version == 5:
            client.sendall(
                socks_wire.HELLO
                + socks_wire.five(socks_wire.addressed(host, port), socks_wire.BIND)
                + more
            )
            assert wire.read_exactly(client, 2) == socks_wire.AGREED
        else:
            client.sendall(socks_wire.four(host, port, socks_wire.BIND) + more)
        code, where = read(client)
        assert code == (0 if version == 5 else 90)
        yield client, where


def call(where: socks_wire.Address, source: str = SERVER) -> socket.socket:
    """Return a connection from a server to the port that was opened."""
    return socket.create_connection(where, 10, source_address=(source, 0))


@pytest.mark.parametrize("version", [4, 5])
@pytest.mark.parametrize("outside", ["", "127.0.0.2"])
def test_the_expected_host_calls_back(
    natwork: running.Start, outside: str, version: int
) -> None:
    started = natwork(f"outside={outside}")
    with bound(started, version=version, more=b"early ") as (client, where):
        assert where[0] == outside or not outside
        with call(where) as server:
            reply = (socks_wire.read_five if version == 5 else socks_wire.read_four)(
                client
            )
            assert reply == (0 if version == 5 else 90, server.getsockname())
            client.sendall(b"there")
            assert wire.read_exactly(server, 11) == b"early there"
            server.sendall(b"and back")
            assert wire.read_exactly(client, 8) == b"and back"
            with pytest.raises(ConnectionRefusedError):  # one call, no more
                call(where)
            here = server.getsockname()
        assert wire.read_all(client) == b""
    (line,) = started.lines(1)
    assert (line["method"], line["outcome"]) == ("BIND", "closed")
    assert line["source"] == endpoint(where)
    assert line["address"] == endpoint(here)
    assert line["target"] == f"{SERVER}:21"
    assert line["status"] == ("0" if version == 5 else "90")


def test_a_kernel_without_ipv6_has_a_way_by_ipv4(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    worker = SimpleNamespace(
        board=natwork.Scoreboard(), policy=natwork.Policy(natwork.Config())
    )
    opener = SimpleNamespace(
        worker=worker, session=natwork.Session("", "", "udp"), wanted=0, outer={}
    )
    found = [natwork.pack("::1"), natwork.pack("127.0.0.1")]
    monkeypatch.setattr(natwork, "INET6", 63)  # no family has this number
    chosen, sock = natwork_socks.Socks.open_outside(opener, found, 80)
    with sock:
        assert chosen == found[1] and sock.getsockname()[0] == "127.0.0.1"


@needs.ipv6
def test_a_host_calls_back_by_ipv6(gateway: running.Gateway) -> None:
    with bound(gateway, "::1") as (client, where):
        assert where[0] == "::1"
        with call(where, "::1") as server:
            assert socks_wire.read_five(client) == (0, server.getsockname()[:2])
            assert echoing(server, client)


def echoing(server: socket.socket, client: socket.socket) -> bool:
    """Say whether a byte gets there and back."""
    client.sendall(b"x")
    server.sendall(server.recv(1))
    return client.recv(1) == b"x"


def test_another_host_that_calls_is_closed(gateway: running.Gateway) -> None:
    with bound(gateway) as (client, where):
        for stranger in ("127.0.0.4", "127.0.0.1"):
            with call(where, stranger) as one:
                assert one.recv(1) == b""
        with call(where) as server:
            assert socks_wire.read_five(client) == (0, server.getsockname())
            assert echoing(server, client)


def refused(gateway: running.Gateway, where: bytes) -> str:
    """Return why a host may not be expected, of which the reply is 2."""
    line = fresh(gateway)
    with gateway.connect() as client:
        asked = socks_wire.five(where, socks_wire.BIND)
        assert socks_wire.ask_five(client, asked) == (2, ("0.0.0.0", 0))
        assert wire.read_all(client) == b""
    entry = line()
    assert (entry["status"], entry["source"]) == ("2", "-")
    return entry["outcome"]


@pytest.mark.parametrize("port", [0, 21, 25, 65535])
def test_the_rules_say_who_may_be_expected(gateway: running.Gateway, port: int) -> None:
    where = socks_wire.addressed("10.1.2.3", port)
    assert refused(gateway, where) == "denied-inside"


@pytest.mark.parametrize("port", [0, 21, 25, "its own"])
def test_a_host_may_call_whatever_port_the_client_names(
    natwork: running.Start, port: int | str
) -> None:
    rules = "rules=deny to 127.0.0.3/32 port 1-65535; allow to 127.0.0.3/32"
    started = natwork(rules, loopback=False)
    number = port if isinstance(port, int) else started.address[1]
    with bound(started, port=number) as (client, where), call(where) as server:
        assert socks_wire.read_five(client) == (0, server.getsockname())
        assert echoing(server, client)
    (line,) = started.lines(1)
    assert (line["target"], line["outcome"]) == (f"{SERVER}:{number}", "closed")


@pytest.mark.parametrize("port", [0, 21])
def test_a_rule_with_a_port_lets_nobody_call(natwork: running.Start, port: int) -> None:
    started = natwork("rules=allow to 127.0.0.3/32 port 1-65535", loopback=False)
    assert refused(started, socks_wire.addressed(SERVER, port)) == "denied-loopback"


ANYONES = [
    socks_wire.addressed("0.0.0.0", 0),
    socks_wire.addressed("::", 0),
    socks_wire.addressed("::ffff:0.0.0.0", 0),
    socks_wire.named("0.0.0.0", 21),
    socks_wire.named("::", 25),
]


@pytest.mark.parametrize("where", ANYONES)
def test_anyone_may_not_call_unless_a_rule_allows_it_by_network(
    natwork: running.Start, where: bytes
) -> None:
    started = natwork("rules=allow to *; allow; allow to 127.0.0.0/8, ::1")
    assert refused(started, where) == "denied-unspecified"
    own = where[:-2] + started.address[1].to_bytes(2, "big")
    assert refused(started, own) == "denied-unspecified"


def test_anyone_may_not_call_a_client_of_version_4(gateway: running.Gateway) -> None:
    line = fresh(gateway)
    with gateway.connect() as client:
        wire.send(client, socks_wire.four("0.0.0.0", 0, socks_wire.BIND))
        assert wire.read_all(client) == socks_wire.four_reply(91)
    assert line()["outcome"] == "denied-unspecified"


def test_a_rule_may_deny_anyone(natwork: running.Start) -> None:
    started = natwork("rules=deny to 0.0.0.0/32; allow to 0.0.0.0/0", loopback=False)
    assert refused(started, ANYONES[0]) == "denied-rule-1"


def test_ports_are_of_bind_ports_and_serve_again(natwork: running.Start) -> None:
    port = wire.free_port()
    started = natwork(f"bind_ports={port}")
    for _ in range(3):
        with bound(started) as (client, where):
            assert where[1] == port
            with started.connect() as other:  # all are taken
                asked = socks_wire.five(
                    socks_wire.addressed(SERVER, 21), socks_wire.BIND
                )
                assert socks_wire.ask_five(other, asked) == (1, ("0.0.0.0", 0))
            with call(where) as server:
                assert socks_wire.read_five(client)[0] == 0
                assert echoing(server, client)
    words = {line["outcome"] for line in started.lines(6)}
    assert words == {"closed", "overload"}


def test_nobody_waits_for_ever_for_a_call(natwork: running.Start) -> None:
    started = natwork("idle_timeout=1")
    with bound(started) as (client, where):
        assert wire.read_all(client) == socks_wire.five_reply(6)
        with pytest.raises(ConnectionRefusedError):
            call(where)
    (line,) = started.lines(1)
    assert (line["outcome"], line["status"]) == ("bind-timeout", "6")


def test_a_client_who_leaves_closes_his_port(gateway: running.Gateway) -> None:
    line = fresh(gateway)
    with bound(gateway, more=b"something early") as (_, where):
        pass
    assert line()["outcome"] == "client-gone"
    with pytest.raises(ConnectionRefusedError):
        call(where)


# --- UDP ASSOCIATE ------------------------------------------------------------


@pytest.mark.parametrize(
    ("host", "spelled"),
    [
        (SERVER, SERVER),
        *[("127.0.0.1", name) for name in addresses.LOCALHOST],
        (SERVER, "::ffff:" + SERVER),
        pytest.param("::1", "::1", marks=needs.ipv6),
    ],
)
def test_datagrams_go_there_and_back(
    gateway: running.Gateway, udp: Udp, host: str, spelled: str
) -> None:
    server, line = udp(host), fresh(gateway)
    where = socks_wire.addressed(spelled, server.port)
    with socks_wire.associated(gateway) as client:
        assert client.relay[0] == "127.0.0.1"
        for payload in (b"a question", b"", SOME):
            answer = client.exchange(where, payload)
            assert answer == ((host, server.port), payload)
    entry = line()
    assert (entry["proto"], entry["method"]) == ("udp", "ASSOCIATE")
    assert (entry["status"], entry["outcome"]) == ("0", "closed")
    size = len(b"a question" + SOME)
    told = len(socks_wire.AGREED + socks_wire.five_reply(0))
    assert (entry["up"], entry["down"]) == (str(size), str(size + told))
    assert entry["address"] == endpoint((host, server.port))
    assert entry["source"] == endpoint(server.senders[0])
    assert entry["target"].endswith(f":{server.port}")


def test_a_burst_waits_while_the_worker_is_busy(natwork: running.Start) -> None:
    most = int(Path("/proc/sys/net/core/rmem_max").read_text())
    count = min(400, most // 512)  # of small ones, each of which takes 768 bytes
    started = natwork("spare_workers=1")
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
        server.bind((SERVER, 0))
        server.settimeout(10)
        server.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
        client = stack.enter_context(socks_wire.associated(started))
        where = socks_wire.addressed(*server.getsockname())
        client.send(where, b"first")
        assert server.recv(10) == b"first"
        worker = started.worker_of(client.control)
        os.kill(worker, signal.SIGSTOP)
        for _ in range(count):
            client.send(where, b"x")
        os.kill(worker, signal.SIGCONT)
        assert [server.recv(10) for _ in range(count)] == [b"x"] * count


def test_one_association_talks_to_many_hosts(
    gateway: running.Gateway, udp: Udp
) -> None:
    servers = [udp(f"127.0.0.{n}") for n in range(3, 9)]
    with socks_wire.associated(gateway) as client:
        for server in servers * 2:
            where = socks_wire.addressed(server.host, server.port)
            assert client.exchange(where, b"x") == ((server.host, server.port), b"x")
    ports = {sender for server in servers for sender in server.senders}
    assert len(ports) == 1  # one source port for all: RFC 4787 section 4.1


def test_what_came_before_the_end_goes_out(gateway: running.Gateway, udp: Udp) -> None:
    server = udp()
    where = socks_wire.addressed(server.host, server.port)
    with socks_wire.associated(gateway) as client:
        for _ in range(100):
            client.send(where, b"x")
        client.control.shutdown(socket.SHUT_WR)
        wait.until(lambda: len(server.senders) == 100)
        assert client.control.recv(1) == b""


def another(
    stack: contextlib.ExitStack, client: socks_wire.Association, host: str = "127.0.0.1"
) -> socks_wire.Association:
    """Return the same association from another socket, of the client's or not."""
    other = copy.copy(client)
    other.sock = stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
    other.sock.bind((host, 0))
    other.sock.settimeout(10)
    return other


def silent(client: socks_wire.Association) -> bool:
    """Say whether nothing has come for a socket; what would, has had its time."""
    client.sock.settimeout(0)
    with contextlib.suppress(BlockingIOError):
        return not client.sock.recv(1)
    client.sock.settimeout(10)
    return True


def test_another_address_is_not_let_in(gateway: running.Gateway, udp: Udp) -> None:
    server = udp()
    where = socks_wire.addressed(server.host, server.port)
    with socks_wire.associated(gateway) as client, contextlib.ExitStack() as stack:
        stranger = another(stack, client, "127.0.0.9")
        stranger.send(where, b"first of all")
        assert client.exchange(where, b"mine")[1] == b"mine"
        stranger.send(where, b"not mine")
        assert client.exchange(where, b"still mine")[1] == b"still mine"
        assert len(server.senders) == 2 and silent(stranger)


def test_an_answer_goes_to_the_port_that_wrote_last_to_its_peer(
    gateway: running.Gateway, udp: Udp
) -> None:
    peers = [udp(), udp("127.0.0.4"), udp()]  # the last is the first one's host
    wheres = [socks_wire.addressed(peer.host, peer.port) for peer in peers]
    with socks_wire.associated(gateway) as client, contextlib.ExitStack() as stack:
        ports = [client, another(stack, client), another(stack, client)]
        for port, where in zip(ports, wheres):
            assert port.exchange(where, b"first")[1] == b"first"
        outer = outer_port(peers[0])
        assert {outer_port(peer) for peer in peers} == {outer}
        for port, peer in zip(ports, peers):  # later, and across each other
            peer.sock.sendto(b"later", outer)
            assert port.receive() == ((peer.host, peer.port), b"later")
        # The client's port changes: its peer's answers follow it, and no other's.
        assert ports[1].exchange(wheres[0], b"moved")[1] == b"moved"
        for port, peer in zip([ports[1], ports[1], ports[2]], peers):
            peer.sock.sendto(b"after", outer)
            assert port.receive() == ((peer.host, peer.port), b"after")
        assert all(map(silent, ports))
    assert len({sender for peer in peers for sender in peer.senders}) == 1


def test_another_port_of_a_host_answers_to_the_port_that_wrote_last_to_it(
    gateway: running.Gateway, udp: Udp
) -> None:
    one, two, other = udp(), udp("127.0.0.4"), udp()
    with socks_wire.associated(gateway) as client, contextlib.ExitStack() as stack:
        second = another(stack, client)
        client.exchange(socks_wire.addressed(one.host, one.port), b"x")
        second.exchange(socks_wire.addressed(two.host, two.port), b"x")
        other.sock.sendto(b"from elsewhere", outer_port(one))
        assert client.receive() == ((other.host, other.port), b"from elsewhere")
        assert silent(second)


def test_who_was_not_written_to_answers_to_the_port_that_wrote_last(
    natwork: running.Start, udp: Udp
) -> None:
    started, server = natwork("udp_from_anyone=yes"), udp()
    stranger = udp("127.0.0.4")
    where = socks_wire.addressed(server.host, server.port)
    with socks_wire.associated(started) as client, contextlib.ExitStack() as stack:
        second = another(stack, client)
        for port in (client, second, client):
            port.exchange(where, b"x")
            stranger.sock.sendto(b"hello", outer_port(server))
            assert port.receive() == ((stranger.host, stranger.port), b"hello")


def test_an_association_remembers_so_many_peers(
    natwork: running.Start, udp: Udp
) -> None:
    few = running.program({"natwork_socks.UDP_PEERS": 4})
    started, peers = natwork(program=few), [udp(f"127.0.0.{n}") for n in (3, 4, 5)]
    same = [udp("127.0.0.6") for _ in range(4)]  # ports of one host, which stays
    with socks_wire.associated(started) as client:
        for peer in (peers[1], peers[0], peers[1], peers[2]):
            client.exchange(socks_wire.addressed(peer.host, peer.port), b"x")
        outer = outer_port(peers[0])
        peers[0].sock.sendto(b"forgotten", outer)
        peers[1].sock.sendto(b"known", outer)
        assert client.receive() == ((peers[1].host, peers[1].port), b"known")
        for peer in same:
            client.exchange(socks_wire.addressed(peer.host, peer.port), b"x")
        for peer in (peers[2], *same):
            peer.sock.sendto(b"known", outer)
        for peer in same:
            assert client.receive() == ((peer.host, peer.port), b"known")


WHERE = socks_wire.addressed(SERVER, 9)
DROPPED = {
    "a fragment": bytes([0, 0, 1]) + WHERE + b"x",
    "the last fragment": bytes([0, 0, 0x80]) + WHERE + b"x",
    "reserved bytes": bytes([0, 1, 0]) + WHERE + b"x",
    "nothing": b"",
    "too short": bytes(3),
    "half an address": bytes(3) + WHERE[:4],
    "half a port": bytes(3) + WHERE[:6],
    "half a name": bytes(3) + socks_wire.named("localhost", 9)[:6],
    "a name's length": bytes(3) + b"\3",
    "another address type": bytes(3) + b"\2" + WHERE[1:] + b"x",
    "no name": bytes(3) + socks_wire.named("", 9) + b"x",
    "a bad name": bytes(3) + socks_wire.named(b"a\0b", 9) + b"x",
    "no such host": bytes(3) + socks_wire.named("nosuch.invalid", 9) + b"x",
    "port 0": bytes(3) + socks_wire.addressed(SERVER, 0) + b"x",
    "mail": bytes(3) + socks_wire.addressed(SERVER, 25) + b"x",
    "inside": bytes(3) + socks_wire.addressed("10.1.2.3", 9) + b"x",
    "multicast": bytes(3) + socks_wire.addressed("224.0.0.1", 9) + b"x",
    "nobody there": bytes(3) + socks_wire.addressed("127.0.0.99", 9) + b"x",
}


@pytest.mark.parametrize("name", DROPPED)
def test_what_cannot_be_sent_is_dropped_and_the_rest_goes_on(
    gateway: running.Gateway, udp: Udp, name: str
) -> None:
    server, line = udp(), fresh(gateway)
    where = socks_wire.addressed(server.host, server.port)
    with socks_wire.associated(gateway) as client:
        for _ in range(3):
            client.sock.sendto(DROPPED[name], client.relay)
        assert client.exchange(where, b"good") == ((server.host, server.port), b"good")
    sent = 3 if name == "nobody there" else 0  # and what the kernel says is survived
    assert line()["up"] == str(sent + 4)


def outer_port(server: socks_wire.UdpEcho) -> socks_wire.Address:
    """Return where the gateway's datagrams to a server came from."""
    return server.senders[-1]


@pytest.mark.parametrize("anyone", ["no", "yes"])
def test_a_host_that_was_not_written_to_is_heard_only_on_demand(
    natwork: running.Start, udp: Udp, anyone: str
) -> None:
    rules = "rules=allow to 127.0.0.3/32, 127.0.0.4/32"
    started = natwork(f"udp_from_anyone={anyone}", rules, loopback=False)
    server, stranger, denied = udp(), udp("127.0.0.4"), udp("127.0.0.5")
    where = socks_wire.addressed(server.host, server.port)
    with socks_wire.associated(started) as client:
        client.exchange(where, b"open")
        denied.sock.sendto(b"denied", outer_port(server))
        stranger.sock.sendto(b"hello", outer_port(server))
        if anyone == "yes":
            assert client.receive() == ((stranger.host, stranger.port), b"hello")
        assert client.exchange(where, b"on")[1] == b"on"  # and nothing before it
        # Another port of a host that was written to is no stranger.
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as other:
            other.bind((SERVER, 0))
            other.sendto(b"as well", outer_port(server))
            assert client.receive() == (other.getsockname(), b"as well")


def test_an_association_ends_with_its_control_connection(
    gateway: running.Gateway, udp: Udp
) -> None:
    server, line = udp(), fresh(gateway)
    where = socks_wire.addressed(server.host, server.port)
    with socks_wire.associated(gateway) as client:
        client.control.sendall(b"what is said here means nothing")
        assert client.exchange(where, b"x")[1] == b"x"
        client.control.close()
        assert line()["outcome"] == "closed"
        for port in (client.relay, outer_port(server)):  # both are free again
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
                sock.bind(port)


def test_an_association_ends_when_nothing_moves(
    natwork: running.Start, udp: Udp
) -> None:
    started, server = natwork("idle_timeout=1"), udp()
    where = socks_wire.addressed(server.host, server.port)
    with socks_wire.associated(started) as client:
        began = time.monotonic()
        for _ in range(4):
            time.sleep(0.4)
            client.exchange(where, b"x")
        for _ in range(20):  # what is dropped keeps nothing alive
            client.send(where, b"x", fragment=1)
            there = socks_wire.addressed("169.254.0.1", server.port)
            client.send(there, b"x")  # it is not reached
            time.sleep(0.1)
        client.control.settimeout(0.5)
        assert client.control.recv(1) == b""
        assert 2.4 < time.monotonic() - began < 6
    (line,) = started.lines(1)
    assert (line["outcome"], line["status"]) == ("idle-timeout", "0")


def test_datagrams_leave_by_the_uplink_and_from_bind_ports(
    natwork: running.Start, udp: Udp
) -> None:
    port = wire.free_port()
    started, server = natwork("outside=127.0.0.2", f"bind_ports={port}"), udp()
    with socks_wire.associated(started) as client:
        where = socks_wire.addressed(server.host, server.port)
        client.exchange(where, b"x")
        assert outer_port(server) == ("127.0.0.2", port)
        with socks_wire.associated(
            started
        ) as other:  # no port is left: its datagrams drop
            other.send(where, b"x")
            client.exchange(where, b"y")
        assert len(server.senders) == 2
    # He of whom no datagram went out is told apart.
    assert {x["outcome"] for x in started.lines(2)} <= {"closed", "overload"}


def test_datagrams_leave_from_the_port_that_is_asked_for(
    natwork: running.Start, udp: Udp
) -> None:
    low = wire.free_port()
    server, far = udp(), 1024 if low > 2048 else 65000
    where = socks_wire.addressed(server.host, server.port)
    started = natwork("outside=127.0.0.2", f"bind_ports={low}-{low + 20}")

    def port_of(client: socks_wire.Association) -> int:
        client.exchange(where, b"x")
        return server.senders[-1][1]

    with socks_wire.associated(started, port=low + 7) as first:
        assert port_of(first) == low + 7
        for taken in (low + 7, far):  # by the first; and not one of bind_ports
            with socks_wire.associated(started, port=taken) as second:
                assert low <= port_of(second) <= low + 20
                assert port_of(second) not in (low + 7, far)
        assert port_of(first) == low + 7


def test_without_bind_ports_a_port_is_not_for_the_asking(
    gateway: running.Gateway, udp: Udp
) -> None:
    server, port = udp(), wire.free_port()
    with socks_wire.associated(gateway, port=port) as client:
        client.exchange(socks_wire.addressed(server.host, server.port), b"x")
        assert server.senders[-1][1] != port


def test_the_largest_datagrams_pass_and_larger_ones_drop(
    gateway: running.Gateway, udp: Udp
) -> None:
    server = udp()
    where = socks_wire.addressed(server.host, server.port)
    most = 65507 - len(socks_wire.datagram(where, b""))
    with socks_wire.associated(gateway) as client:
        assert client.exchange(where, b"m" * most)[1] == b"m" * most
        # An answer with no room left for its header.
        server.sock.sendto(b"m" * 65507, outer_port(server))
        assert client.exchange(where, b"small")[1] == b"small"


def test_version_4_has_no_datagrams(gateway: running.Gateway) -> None:
    with gateway.connect() as client:
        client.sendall(socks_wire.four(SERVER, 9, socks_wire.ASSOCIATE))
        assert socks_wire.read_four(client)[0] == 91


def test_an_open_association_is_in_the_titles(natwork: running.Start, udp: Udp) -> None:
    started, server = natwork("spare_workers=1"), udp()
    with socks_wire.associated(started) as client:
        client.exchange(socks_wire.addressed(server.host, server.port), b"x")
        name = "%s:%d" % client.control.getsockname()
        want = re.escape(f"natwork: {name} > ") + rf".* > {SERVER}:\d+ udp {SERVER}"

        def shown() -> bool:
            return any(
                re.fullmatch(want, kernel.title(pid)) for pid in started.workers()
            )

        wait.until(shown)


@pytest.mark.parametrize(
    "where",
    [
        b"\3\x010\0\0",  # what PySocks sends
        b"\3\0\0\0",
        b"\3\x05a b\xff\0\0\x09",
        b"\1" + bytes(6),
        b"\4" + bytes(18),
    ],
)
def test_where_a_client_says_it_will_send_from_may_be_anything(
    gateway: running.Gateway, where: bytes
) -> None:
    with gateway.connect() as client:
        code, relay = socks_wire.ask_five(
            client, socks_wire.five(where, socks_wire.ASSOCIATE)
        )
        assert code == 0 and relay[0] == "127.0.0.1"


def test_a_malformed_name_is_in_the_log(gateway: running.Gateway) -> None:
    line = fresh(gateway)
    with gateway.connect() as client:
        assert (
            socks_wire.ask_five(client, socks_wire.five(socks_wire.named("127.1", 80)))[
                0
            ]
            == 1
        )
    assert (line()["target"], line()["outcome"]) == ("127.1", "bad-request")


def test_a_long_name_leaves_its_port_in_the_log(gateway: running.Gateway) -> None:
    line, name = fresh(gateway), "a" * 255
    with gateway.connect() as client:
        assert socks_wire.ask_five(client, socks_wire.five(socks_wire.named(name, 9)))[
            0
        ]
    assert line()["target"] == f"{name}:9"


def test_a_session_the_operator_ends_has_been_granted(
    natwork: running.Start, origin: origins.Start
) -> None:
    gateway, server = natwork(), origin(origins.echo)
    with gateway.connect() as client:
        asked = socks_wire.five(socks_wire.addressed("127.0.0.1", server.port))
        assert socks_wire.ask_five(client, asked)[0] == 0 and wire.echoes(client)
        os.kill(gateway.worker_of(client), signal.SIGTERM)
        (line,) = gateway.lines(1)
    assert (line["status"], line["outcome"]) == ("0", "operator")
