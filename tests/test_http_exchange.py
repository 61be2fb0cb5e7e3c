"""Connections: kept, pipelined, retried, upgraded, tunneled, closed (R58 to R70)."""

from __future__ import annotations

import contextlib
import os
import select
import socket
import threading
import time
from collections.abc import Callable

import http_wire
import kernel
import needs
import origins
import pytest
import running
import wait
import wire

pytestmark = pytest.mark.filterwarnings(http_wire.STRICT)
gateway = running.shared()
HASTE = ("head_timeout=0.5", "idle_timeout=0.5", "tunnel_timeout=0.5")
hasty = running.shared("keepalive_timeout=1", *HASTE)

CHUNKED = b"Transfer-Encoding: chunked"
EXPECT = b"Expect: 100-continue"
BULK = os.urandom(1 << 20) * 4


# --- Keeping connections ------------------------------------------------------


def test_both_connections_are_kept(
    gateway: running.Gateway, origin: origins.Start
) -> None:
    server = origin(http_wire.Script())  # R58
    with gateway.connect() as client:
        for _ in range(5):
            answer = http_wire.exchange(client, http_wire.request(server))
            assert answer.status == 200 and not answer.closes
    assert len(server.callers) == 1


@pytest.mark.parametrize(
    "answer",
    [
        http_wire.sized(b"hello"),
        http_wire.sized(b""),
        http_wire.response(CHUNKED, body=http_wire.chunks(b"hello")),
        http_wire.response(status=b"204 None"),
        http_wire.response(status=b"304 Same"),
        http_wire.sized(b"no", status=b"404 None"),
        http_wire.sized(b"no", status=b"500 Oh"),
    ],
)
def test_every_delimited_answer_keeps_the_connections(
    gateway: running.Gateway, origin: origins.Start, answer: bytes
) -> None:
    server = origin(http_wire.Script(answer))  # R58
    with gateway.connect() as client:
        for _ in range(2):
            assert not http_wire.exchange(client, http_wire.request(server)).closes
    assert len(server.callers) == 1


def test_each_request_goes_to_its_own_server(
    gateway: running.Gateway, origin: origins.Start
) -> None:
    servers = [
        origin(http_wire.Script(http_wire.sized(b"%d" % i))) for i in range(3)
    ]  # R18, R62
    with gateway.connect() as client:
        for i in (0, 1, 0, 2, 2, 1, 0):
            assert (
                http_wire.exchange(client, http_wire.request(servers[i])).body
                == b"%d" % i
            )
        wire.send(client, b"".join(http_wire.request(servers[i]) for i in (2, 0, 1)))
        assert [http_wire.read_answer(client).body for _ in range(3)] == [
            b"2",
            b"0",
            b"1",
        ]


def test_each_request_is_judged(
    gateway: running.Gateway, origin: origins.Start
) -> None:
    server = origin(
        http_wire.Script()
    )  # R62: the last request's permission is not this one's
    with gateway.connect() as client:
        statuses = [
            http_wire.exchange(client, http_wire.request(where)).status
            for where in (server, http_wire.DENIED, server, http_wire.DENIED, server)
        ]
    assert statuses == [200, 403, 200, 403, 200]


def test_a_server_connection_serves_one_client_only(
    natwork: running.Start, origin: origins.Start
) -> None:
    gateway, server = (
        natwork("spare_workers=1", "max_workers=1"),
        origin(http_wire.Script()),
    )
    for _ in range(3):  # R62: the same worker, one client after another
        with gateway.connect() as client:
            assert http_wire.exchange(client, http_wire.request(server)).status == 200
    assert len(server.callers) == 3


def test_a_client_does_not_make_room_for_itself(
    natwork: running.Start, origin: origins.Start
) -> None:
    gateway, server = (
        natwork("spare_workers=1", "max_workers=1"),
        origin(http_wire.Script()),
    )
    first = gateway.connect()  # R61: one leaves and one comes, and nobody waits
    assert http_wire.exchange(first, http_wire.request(server)).status == 200
    for _ in range(200):
        second = gateway.connect()
        first.close()
        assert not select.select([second], [], [], 0.01)[0]  # still welcome
        assert http_wire.exchange(second, http_wire.request(server)).status == 200
        first = second
    first.close()


def test_a_server_that_closes_does_not_close_the_client(
    gateway: running.Gateway, origin: origins.Start
) -> None:
    server = origin(
        http_wire.Script(http_wire.sized(b"ok", b"Connection: close"), close=True)
    )  # R58
    with gateway.connect() as client:
        for _ in range(3):
            answer = http_wire.exchange(client, http_wire.request(server))
            assert answer.status == 200 and not answer.closes
    assert len(server.callers) == 3


def test_an_http_1_0_server_does_not_close_the_client(
    gateway: running.Gateway, origin: origins.Start
) -> None:
    answer = http_wire.OK.replace(b"HTTP/1.1", b"HTTP/1.0")  # R58
    server = origin(http_wire.Script(answer, close=True))
    with gateway.connect() as client:
        for _ in range(3):
            answer = http_wire.exchange(client, http_wire.request(server))
            assert answer.status == 200 and not answer.closes
    assert len(server.callers) == 3


@pytest.mark.parametrize("version", [b"HTTP/1.0", b"HTTP/1.1"])
def test_the_end_is_announced(
    gateway: running.Gateway, origin: origins.Start, version: bytes
) -> None:
    field = b"Connection: close" if version == b"HTTP/1.1" else b"X-A: 1"  # R58, R60
    with gateway.connect() as client:
        data = http_wire.request(origin(http_wire.Script()), field, version=version)
        assert http_wire.exchange(client, data).closes
        assert wire.at_end(client)


@pytest.mark.parametrize(
    "field",
    [
        b"Connection: keep-alive",
        b"Proxy-Connection: keep-alive",
        b"Connection: Keep-Alive, x",
        b"Keep-Alive: 300",
    ],
)
def test_an_http_1_0_client_is_never_kept(
    gateway: running.Gateway, origin: origins.Start, field: bytes
) -> None:
    server = origin(http_wire.Script())  # R59
    data = http_wire.request(server, field, version=b"HTTP/1.0")
    with gateway.connect() as client:
        answer = http_wire.exchange(client, data + data)
        assert answer.closes and b"keep-alive" not in answer.members(b"Connection")
        assert wire.at_end(client)
    assert len(server.handle.requests) == 1


@pytest.mark.parametrize("where", [http_wire.DENIED, http_wire.CLOSED])
def test_an_http_1_0_client_is_not_kept_after_an_error(
    gateway: running.Gateway, where: bytes
) -> None:
    with gateway.connect() as client:  # R59
        data = http_wire.request(where, b"Connection: keep-alive", version=b"HTTP/1.0")
        assert http_wire.exchange(client, data).closes
        assert wire.at_end(client)


# --- Pipelining and the last answer -------------------------------------------


def test_pipelined_answers_come_in_order(
    gateway: running.Gateway, origin: origins.Start
) -> None:
    def slow(connection: socket.socket, server: origins.Origin) -> None:
        while http_wire.read_request(connection):
            select.select([connection], [], [], 0.2)  # the quick one is ready long ago
            connection.sendall(http_wire.sized(b"slow"))

    first, second = (
        origin(slow),
        origin(http_wire.Script(http_wire.sized(b"quick"))),
    )  # R60
    where = [first, second, second, http_wire.DENIED, first]
    with gateway.connect() as client:
        wire.send(client, b"".join(http_wire.request(one) for one in where))
        answers = [http_wire.read_answer(client) for _ in where]
    assert [answer.status for answer in answers] == [200, 200, 200, 403, 200]
    bodies = [answer.body for answer in answers if answer.status == 200]
    assert bodies == [b"slow", b"quick", b"quick", b"slow"]


def test_a_hundred_pipelined_requests_are_answered(
    gateway: running.Gateway, origin: origins.Start
) -> None:
    server = origin(http_wire.Script())  # R60
    data = [http_wire.request(server, path=b"/%d" % i) for i in range(100)]
    data[30] = http_wire.request(
        server, CHUNKED, method=b"POST", path=b"/30", body=http_wire.chunks(b"hello")
    )
    with gateway.connect() as client:
        wire.send(client, b"".join(data))
        assert [http_wire.read_answer(client).status for _ in data] == [200] * 100
    targets = [got.target for got in server.handle.requests]
    assert targets == [b"/%d" % i for i in range(100)]


@pytest.mark.parametrize("size", [5, 300_000], ids=["small", "spliced"])
def test_what_a_server_says_behind_an_answer_answers_nothing(
    gateway: running.Gateway, origin: origins.Start, size: int
) -> None:
    def handle(connection: socket.socket, server: origins.Origin) -> None:
        while got := http_wire.read_request(connection):
            server.received.append(got.target)
            trap = http_wire.response(b"Content-Length: 4") + b"EVIL"
            connection.sendall(
                http_wire.sized(b"x" * size) + (trap if got.target == b"/a" else b"")
            )

    server = origin(handle)  # R55
    pair = http_wire.request(server, path=b"/a") + http_wire.request(server, path=b"/b")
    with gateway.connect() as client:
        wire.send(client, pair)
        assert [http_wire.read_answer(client).body for _ in "ab"] == [b"x" * size] * 2
    assert server.received == [b"/a", b"/b"] and len(server.callers) == 2


@pytest.mark.parametrize("ends", [False, True])
def test_what_a_server_says_during_a_slow_head_answers_nothing(
    gateway: running.Gateway, origin: origins.Start, ends: bool
) -> None:
    speak = threading.Event()

    def handle(connection: socket.socket, server: origins.Origin) -> None:
        """Answer; on the first connection, speak again when nobody asks, or leave."""
        server.received.append(http_wire.read_request(connection).target)
        connection.sendall(http_wire.sized(b"good"))
        if len(server.callers) == 1:
            speak.wait(10)
            if ends:
                return
            connection.sendall(http_wire.sized(b"evil"))
        while got := http_wire.read_request(connection):
            server.received.append(got.target)
            connection.sendall(http_wire.sized(b"good"))

    server = origin(handle)  # R55
    with gateway.connect() as client:
        assert (
            http_wire.exchange(client, http_wire.request(server, path=b"/a")).body
            == b"good"
        )
        data = http_wire.post(server, b"Content-Length: 2", body=b"hi")
        wire.send(client, data[:6])
        time.sleep(0.2)  # it knows that a request has begun
        speak.set()
        time.sleep(0.2)
        wire.send(client, data[6:])
        answer = http_wire.read_answer(client)
        assert (answer.status, answer.body) == (200, b"good")
    assert len(server.callers) == 2


def test_a_server_that_closes_between_pipelined_requests_is_seen(
    gateway: running.Gateway, origin: origins.Start
) -> None:
    def handle(connection: socket.socket, server: origins.Origin) -> None:
        while got := http_wire.read_request(connection):
            server.received.append(got.target)
            last = got.target == b"/last"
            if last:  # the end is in the same segment as the answer
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_CORK, 1)
            connection.sendall(http_wire.OK)
            if last:
                connection.shutdown(socket.SHUT_WR)

    server = origin(handle)
    pair = http_wire.request(server, path=b"/last")
    pair += http_wire.post(server, b"Content-Length: 2", body=b"hi")
    for _ in range(5):
        with gateway.connect() as client:
            assert (
                http_wire.exchange(client, http_wire.request(server, path=b"/a")).status
                == 200
            )
            time.sleep(0.01)
            client.sendall(pair)
            assert [http_wire.read_answer(client).status for _ in "ab"] == [200, 200]


def test_a_pipelined_post_does_not_go_to_a_server_that_has_closed(
    gateway: running.Gateway, origin: origins.Start
) -> None:
    def handle(connection: socket.socket, server: origins.Origin) -> None:
        server.received.append(http_wire.read_request(connection).target)
        # The end is in the same segment as the last octets: none sees them before it.
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_CORK, 1)
        connection.sendall(http_wire.sized(b"x" * 300_000))
        connection.shutdown(socket.SHUT_WR)
        connection.recv(4096)

    server = origin(handle)
    data = http_wire.request(server, path=b"/a") + http_wire.post(
        server, b"Content-Length: 2", body=b"hi"
    )
    with gateway.connect() as client:
        client.sendall(data)
        assert [http_wire.read_answer(client).status for _ in "ab"] == [200, 200]
    assert server.received[0] == b"/a" and len(server.callers) == 2


def test_pipelined_requests_in_single_octets_are_answered(
    gateway: running.Gateway, origin: origins.Start
) -> None:
    server = origin(http_wire.Script())  # R60
    body = http_wire.post(server, b"Content-Length: 5", body=b"hello")
    with gateway.connect() as client:
        wire.drip(client, (http_wire.request(server) + body) * 2)
        assert [http_wire.read_answer(client).status for _ in range(4)] == [200] * 4
    got = [(one.method, one.body) for one in server.handle.requests]
    assert got == [(b"GET", b""), (b"POST", b"hello")] * 2


def test_nothing_after_close_is_processed(
    gateway: running.Gateway, origin: origins.Start
) -> None:
    server = origin(http_wire.Script())  # R60
    with gateway.connect() as client:
        last = http_wire.request(server, b"Connection: close", path=b"/last")
        wire.send(
            client,
            http_wire.request(server)
            + last
            + http_wire.request(server, path=b"/after"),
        )
        assert not http_wire.read_answer(client).closes
        assert http_wire.read_answer(client).closes
        assert wire.at_end(client)
    assert [got.target for got in server.handle.requests] == [b"/", b"/last"]


@pytest.mark.parametrize("more", [b"", b"x" * 300_000], ids=["silent", "talkative"])
def test_the_last_answer_survives_what_is_not_read(
    gateway: running.Gateway, origin: origins.Start, more: bytes
) -> None:
    server = origin(
        http_wire.Script(http_wire.sized(BULK))
    )  # R60: a plain close would reset it away
    data = http_wire.request(server, b"Connection: close") + more
    with gateway.connect() as client:
        sender = threading.Thread(target=wire.send, args=[client, data], daemon=True)
        sender.start()
        answer = http_wire.read_answer(client)
        assert (wire.digest(answer.body), answer.complete) == (wire.digest(BULK), True)
        assert wire.at_end(client)
        sender.join(10)


def test_a_line_end_too_many_does_not_cost_the_answer(
    gateway: running.Gateway, origin: origins.Start
) -> None:
    seen = threading.Event()  # R4, R60: as very old browsers sent after a POST

    def slow(connection: socket.socket, server: origins.Origin) -> None:
        assert http_wire.read_request(connection)
        seen.set()
        connection.sendall(http_wire.sized(BULK))

    fields = b"Content-Length: 5", b"Connection: close"
    with gateway.connect() as client:
        wire.send(client, http_wire.post(origin(slow), *fields, body=b"hello"))
        assert seen.wait(10)
        wire.send(client, b"\r\n")
        assert wire.digest(http_wire.read_answer(client).body) == wire.digest(BULK)
        assert wire.at_end(client)


@pytest.mark.parametrize("target", [b"*", b"http://a/"])
def test_an_answer_of_our_own_survives_a_body_nobody_reads(
    gateway: running.Gateway, target: bytes
) -> None:
    with gateway.connect() as client:  # R56, R60
        head = b"OPTIONS %b HTTP/1.1\r\nHost: a\r\nMax-Forwards: 0\r\n" % target
        body = b"x" * 300_000
        wire.send(client, head + b"Content-Length: %d\r\n\r\n" % len(body) + body)
        answer = http_wire.read_answer(client)
        assert (answer.status, answer.closes) == (200, True)
        assert wire.at_end(client)


def test_a_half_closed_client_still_gets_its_answer(
    gateway: running.Gateway, origin: origins.Start
) -> None:
    def slow(connection: socket.socket, server: origins.Origin) -> None:
        assert http_wire.read_request(connection)
        select.select([connection], [], [], 0.3)
        connection.sendall(http_wire.OK)

    with gateway.connect() as client:  # R61, R68
        wire.send(client, http_wire.request(origin(slow)))
        client.shutdown(socket.SHUT_WR)
        assert http_wire.read_answer(client).body == b"ok"
        assert wire.at_end(client)


def test_a_half_closed_client_gets_all_its_pipelined_answers(
    gateway: running.Gateway, origin: origins.Start
) -> None:
    server = origin(http_wire.Script())  # R60
    with gateway.connect() as client:
        wire.send(client, http_wire.request(server) * 5)
        client.shutdown(socket.SHUT_WR)
        assert [http_wire.read_answer(client).status for _ in range(5)] == [200] * 5
        assert wire.at_end(client)


# --- Idle connections ---------------------------------------------------------


def test_an_idle_client_is_let_go_gracefully(
    hasty: running.Gateway, origin: origins.Start
) -> None:
    with hasty.connect() as client:  # R61: no 408 that a next request might take
        assert (
            http_wire.exchange(
                client, http_wire.request(origin(http_wire.Script()))
            ).status
            == 200
        )
        began = time.monotonic()
        assert wire.at_end(client)
        assert time.monotonic() - began > 0.5


def test_a_next_head_that_does_not_arrive_is_timed_out(
    hasty: running.Gateway, origin: origins.Start
) -> None:
    with hasty.connect() as client:  # R12, R61
        assert (
            http_wire.exchange(
                client, http_wire.request(origin(http_wire.Script()))
            ).status
            == 200
        )
        wire.send(client, b"GET http://a/ HT")
        assert http_wire.read_answer(client).status == 408
        assert wire.at_end(client)


def test_the_server_connection_goes_with_the_client(
    gateway: running.Gateway, origin: origins.Start
) -> None:
    ends: list[bytes] = []  # R61

    def handle(connection: socket.socket, server: origins.Origin) -> None:
        http_wire.read_head(connection)
        connection.sendall(http_wire.OK)
        ends.append(wire.read_all(connection))

    with gateway.connect() as client:
        assert (
            http_wire.exchange(client, http_wire.request(origin(handle))).status == 200
        )
        assert not ends
    wait.until(lambda: ends == [b""], 5)


def test_a_reset_client_is_not_worked_for(
    gateway: running.Gateway, origin: origins.Start
) -> None:
    asked, left = threading.Event(), threading.Event()  # R61

    def mute(connection: socket.socket, server: origins.Origin) -> None:
        http_wire.read_head(connection)
        asked.set()
        wire.read_all(connection)
        left.set()

    client = gateway.connect()
    wire.send(client, http_wire.request(origin(mute)))
    assert asked.wait(10)
    wire.reset(client)
    assert left.wait(5)


def leaves_when_idle(left: threading.Event) -> Callable[..., None]:
    """Return an origin that closes after each answer without having said so."""

    def handle(connection: socket.socket, server: origins.Origin) -> None:
        if request := http_wire.read_request(connection):
            server.received.append(request.method)
            connection.sendall(http_wire.OK)
        connection.close()
        left.set()

    return handle


@pytest.mark.parametrize("method", [b"GET", b"POST"])
def test_a_server_that_left_while_idle_is_called_again(
    gateway: running.Gateway, origin: origins.Start, method: bytes
) -> None:
    server = origin(
        leaves_when_idle(left := threading.Event())
    )  # R61: seen, not sent to
    data = http_wire.request(server, b"Content-Length: 5", method=method, body=b"hello")
    with gateway.connect() as client:
        for _ in range(3):
            left.clear()
            assert http_wire.exchange(client, data).status == 200
            assert left.wait(10)
    assert server.received == [method] * 3


# --- Retries ------------------------------------------------------------------


class Leaving(http_wire.Script):
    """An origin whose first connection ends at its second request."""

    def __init__(
        self, last_words: bytes = b"", end: Callable[..., None] = wire.reset
    ) -> None:
        super().__init__()
        self.last_words, self.end = last_words, end

    def __call__(self, connection: socket.socket, origin: origins.Origin) -> None:
        while request := http_wire.read_request(connection):
            self.requests.append(request)
            if len(self.requests) == 2:
                connection.sendall(self.last_words)
                self.end(connection)
                return
            connection.sendall(http_wire.OK)


def close(connection: socket.socket) -> None:
    connection.shutdown(socket.SHUT_RDWR)


@pytest.mark.parametrize("end", [wire.reset, close])
@pytest.mark.parametrize("method", [b"GET", b"HEAD", b"OPTIONS", b"DELETE", b"PUT"])
def test_an_idempotent_request_is_tried_again_once(
    gateway: running.Gateway,
    origin: origins.Start,
    method: bytes,
    end: Callable[..., None],
) -> None:
    server = origin(Leaving(end=end))  # R39
    with gateway.connect() as client:
        assert http_wire.exchange(client, http_wire.request(server)).status == 200
        data = http_wire.request(server, method=method)
        assert http_wire.exchange(client, data, method).status == 200
    methods = [got.method for got in server.handle.requests]
    assert methods == [b"GET", method, method]


@pytest.mark.parametrize("end", [wire.reset, close])
@pytest.mark.parametrize(
    ("method", "field", "body"),
    [
        (b"POST", b"X-A: 1", b""),
        (b"POST", b"Content-Length: 0", b""),
        (b"POST", b"Content-Length: 5", b"hello"),
        (b"PATCH", b"X-A: 1", b""),
        (b"BREW", b"X-A: 1", b""),
        (b"get", b"X-A: 1", b""),
        (b"PUT", b"Content-Length: 5", b"hello"),
        (b"PUT", CHUNKED, http_wire.chunks(b"hello")),
    ],
)
def test_other_requests_are_not_tried_again(
    gateway: running.Gateway,
    origin: origins.Start,
    method: bytes,
    field: bytes,
    body: bytes,
    end: Callable[..., None],
) -> None:
    server = origin(Leaving(end=end))  # R39
    with gateway.connect() as client:
        assert http_wire.exchange(client, http_wire.request(server)).status == 200
        answer = http_wire.exchange(
            client, http_wire.request(server, field, method=method, body=body)
        )
        assert answer.status == 502
    assert [got.method for got in server.handle.requests] == [b"GET", method]


class Reckoning(http_wire.Script):
    """An origin that keeps a connection for two seconds; it notes who called."""

    def __call__(self, connection: socket.socket, origin: origins.Origin) -> None:
        connection.settimeout(2)
        with contextlib.suppress(TimeoutError):
            while request := http_wire.read_request(connection):
                self.requests.append(request)
                origin.received.append(str(connection.getpeername()[1]).encode())
                connection.sendall(http_wire.OK)


@pytest.mark.parametrize("pause", [0, 1.2])
@pytest.mark.parametrize("method", [b"GET", b"POST"])
def test_what_may_not_be_repeated_goes_to_a_server_that_has_just_answered(
    gateway: running.Gateway, origin: origins.Start, method: bytes, pause: float
) -> None:
    server = origin(Reckoning())  # R91
    with gateway.connect() as client:
        assert http_wire.exchange(client, http_wire.request(server)).status == 200
        time.sleep(pause)
        data = http_wire.request(server, method=method)
        assert http_wire.exchange(client, data).status == 200
    callers = len(set(server.received))
    assert callers == (2 if pause and method == b"POST" else 1)


def test_an_answer_that_has_begun_is_not_tried_again(
    gateway: running.Gateway, origin: origins.Start
) -> None:
    server = origin(Leaving(b"H", close))  # R39
    with gateway.connect() as client:
        assert http_wire.exchange(client, http_wire.request(server)).status == 200
        assert http_wire.exchange(client, http_wire.request(server)).status == 502
    assert len(server.handle.requests) == 2


@pytest.mark.parametrize("end", [wire.reset, close])
def test_a_new_connection_is_not_tried_again(
    gateway: running.Gateway, origin: origins.Start, end: Callable[..., None]
) -> None:
    def leave(connection: socket.socket, server: origins.Origin) -> None:
        http_wire.read_request(connection)
        end(connection)

    server = origin(leave)  # R39
    with gateway.connect() as client:
        answer = http_wire.exchange(client, http_wire.request(server))
        assert answer.status == 502
        assert http_wire.proxy_error(answer) == b"connection_terminated"
        assert (
            http_wire.exchange(
                client, http_wire.request(origin(http_wire.Script()))
            ).status
            == 200
        )
    assert len(server.callers) == 1


def falls_silent(asked: threading.Event) -> Callable[..., None]:
    """Return an origin that answers one request a connection, and no more."""

    def handle(connection: socket.socket, server: origins.Origin) -> None:
        server.received.append(http_wire.read_head(connection))
        connection.sendall(http_wire.OK)
        if second := http_wire.read_head(connection):
            server.received.append(second)
            asked.set()
            wire.read_all(connection)

    return handle


def test_a_kept_server_that_falls_silent_is_not_asked_again(
    hasty: running.Gateway, origin: origins.Start
) -> None:
    server = origin(falls_silent(threading.Event()))  # R39: it may be at work on it
    with hasty.connect() as client:
        assert http_wire.exchange(client, http_wire.request(server)).status == 200
        answer = http_wire.exchange(client, http_wire.request(server))
        assert (answer.status, http_wire.proxy_error(answer)) == (
            504,
            b"http_response_timeout",
        )
    assert len(server.received) == 2


def test_nobody_is_asked_again_for_a_client_that_left(
    gateway: running.Gateway, origin: origins.Start
) -> None:
    server = origin(falls_silent(asked := threading.Event()))  # R39, R61
    client = gateway.connect()
    assert http_wire.exchange(client, http_wire.request(server)).status == 200
    wire.send(client, http_wire.request(server, path=b"/left"))
    assert asked.wait(10)
    wire.reset(client)
    wait.until(lambda: [one for one in gateway.lines() if "/left" in one["target"]])
    with socket.create_connection((server.host, server.port)) as probe:
        wait.until(lambda: probe.getsockname() in server.callers)
    assert len(server.callers) == 2  # the gateway once, and the probe


# --- Expect and interim answers -----------------------------------------------


class Continuing(http_wire.Script):
    """An origin that sends interim answers between a head and its body."""

    def __init__(self, *interim: bytes, final: bytes = http_wire.OK) -> None:
        super().__init__(final)
        self.interim = interim

    def __call__(self, connection: socket.socket, origin: origins.Origin) -> None:
        while connection.recv(1, socket.MSG_PEEK):
            for one in self.interim:
                connection.sendall(http_wire.response(status=one))
            if request := http_wire.read_request(connection):
                self.requests.append(request)
                connection.sendall(self.answers[0])


def test_an_expecting_client_is_told_to_continue(
    gateway: running.Gateway, origin: origins.Start
) -> None:
    server = origin(Continuing(b"100 Continue"))  # R63: nobody sends the body unasked
    with gateway.connect() as client:
        head = http_wire.post(server, EXPECT, b"Content-Length: 5")
        assert http_wire.exchange(client, head).status == 100
        assert http_wire.exchange(client, b"hello").status == 200
        assert http_wire.exchange(client, head).status == 100
        assert http_wire.exchange(client, b"hello").status == 200
    got = server.handle.requests[0]
    assert (got.body, got.members(b"Expect")) == (b"hello", [b"100-continue"])


@pytest.mark.parametrize("expect", [[b"100-Continue"], [b"100-continue"] * 2])
def test_expect_may_be_written_otherwise(
    gateway: running.Gateway, origin: origins.Start, expect: list[bytes]
) -> None:
    server = origin(Continuing(b"100 Continue"))  # R63
    fields = [b"Expect: " + value for value in expect]
    with gateway.connect() as client:
        head = http_wire.post(server, b"Content-Length: 5", *fields)
        assert http_wire.exchange(client, head).status == 100
        assert http_wire.exchange(client, b"hello").status == 200


def test_an_expecting_client_may_lose_patience(
    gateway: running.Gateway, origin: origins.Start
) -> None:
    server = origin(
        http_wire.Script()
    )  # R63: this origin says nothing until it has the body
    with gateway.connect() as client:
        wire.send(client, http_wire.post(server, EXPECT, b"Content-Length: 5"))
        if select.select([client], [], [], 0.3)[0]:
            assert http_wire.read_answer(client).status == 100
        wire.send(client, b"hello")
        answer = http_wire.read_answer(client)
        assert (
            answer if answer.status >= 200 else http_wire.read_answer(client)
        ).status == 200
    assert server.handle.requests[0].body == b"hello"


@pytest.mark.parametrize(
    ("field", "body"),
    [(b"Content-Length: 5", b"hello"), (CHUNKED, http_wire.chunks(b"hello"))],
)
def test_an_expecting_client_may_send_at_once(
    gateway: running.Gateway, origin: origins.Start, field: bytes, body: bytes
) -> None:
    server = origin(Continuing(b"100 Continue"))  # R63
    with gateway.connect() as client:
        answer = http_wire.exchange(
            client, http_wire.post(server, EXPECT, field, body=body)
        )
        assert (
            answer if answer.status >= 200 else http_wire.read_answer(client)
        ).status == 200
        assert (
            http_wire.exchange(client, http_wire.request(server)).status == 100
        )  # and in step
        assert http_wire.read_answer(client).status == 200
    assert server.handle.requests[0].body == b"hello"


@pytest.mark.parametrize("minor", [0, 1])
def test_a_body_that_has_begun_is_not_given_up_for_want_of_a_continue(
    gateway: running.Gateway, origin: origins.Start, minor: int
) -> None:
    def early(connection: socket.socket, server: origins.Origin) -> None:
        """Answer at the first octet of the body, and go on reading it."""
        http_wire.read_head(connection)
        first = connection.recv(1)
        connection.sendall(http_wire.sized(b"early"))
        rest = wire.read_exactly(connection, len(BULK) - 1)
        server.received.append(first + rest)

    server = origin(early)
    fields = EXPECT, b"Content-Length: %d" % len(BULK)
    data = http_wire.post(server, *fields)  # R63
    if not minor:
        data = data.replace(b"HTTP/1.1", b"HTTP/1.0", 1)
    with gateway.connect() as client:
        wire.send(client, data)
        wire.send(client, BULK[:100_000])
        assert http_wire.read_answer(client).body == b"early"
        wire.send(client, BULK[100_000:])
        wait.until(lambda: server.received)
    assert server.received == [BULK]


def test_a_final_answer_instead_of_continue_ends_the_upload(
    gateway: running.Gateway, origin: origins.Start
) -> None:
    def refuse(connection: socket.socket, server: origins.Origin) -> None:
        server.received.append(http_wire.read_head(connection))
        connection.sendall(http_wire.sized(b"no", status=b"401 Who"))
        server.received.append(wire.read_all(connection))

    server = origin(refuse)  # R63
    with gateway.connect() as client:
        head = http_wire.post(server, EXPECT, b"Content-Length: 5")
        answer = http_wire.exchange(client, head)
        assert (answer.status, answer.body) == (401, b"no")
        assert answer.closes  # the body may or may not follow: no way to tell
        assert wire.at_end(client)
    wait.until(lambda: server.received[1:] == [b""])


def test_a_failed_expectation_leaves_the_connection_to_ask_without_it(
    gateway: running.Gateway, origin: origins.Start
) -> None:
    def refuse(connection: socket.socket, server: origins.Origin) -> None:
        """Know no Expect, as some embedded servers do."""
        while (request := http_wire.read_head(connection)) and EXPECT not in request:
            server.received.append(wire.read_exactly(connection, 5))
            connection.sendall(http_wire.OK)
        connection.sendall(http_wire.sized(b"no", status=b"417 No"))
        wire.read_all(connection)

    server = origin(refuse)  # R94
    length = b"Content-Length: 5"
    with gateway.connect() as client:
        wire.send(client, http_wire.post(server, EXPECT, length))
        answer = http_wire.read_answer(client)
        assert (answer.status, answer.body, answer.closes) == (417, b"no", False)
        data = http_wire.post(server, length, body=b"hello")
        assert http_wire.exchange(client, data).status == 200
    assert server.received == [b"hello"]


@pytest.mark.parametrize("late", [0, 0.3])
@pytest.mark.parametrize("words", [b"", b'{"a": 1}'])
def test_a_body_that_follows_a_417_is_no_request(
    gateway: running.Gateway, origin: origins.Start, late: float, words: bytes
) -> None:
    def refuse(connection: socket.socket, server: origins.Origin) -> None:
        http_wire.read_head(connection)
        connection.sendall(http_wire.sized(b"no", status=b"417 No"))
        wire.read_all(connection)

    server, victim = origin(refuse), origin(http_wire.Script())  # R94
    body = words or http_wire.request(victim)
    head = http_wire.post(server, EXPECT, b"Content-Length: %d" % len(body))
    with gateway.connect() as client:
        assert http_wire.exchange(client, head).status == 417
        time.sleep(late)
        wire.send(client, body)  # by a client that would not wait for an answer
        # No answer: a client that means another request makes it elsewhere.
        assert wire.read_all(client) == b""
    assert http_wire.uncalled(victim)


def test_a_body_that_follows_a_417_does_not_cost_its_page(
    gateway: running.Gateway, origin: origins.Start
) -> None:
    page, body = b"x" * 700_000, b"y" * 300_000

    def refuse(connection: socket.socket, server: origins.Origin) -> None:
        http_wire.read_head(connection)
        connection.sendall(http_wire.sized(page, status=b"417 No"))
        wire.read_all(connection)

    server = origin(refuse)  # R60, R94
    with gateway.connect(buffer=8192) as client:
        head = http_wire.post(server, EXPECT, b"Content-Length: %d" % len(body))
        wire.send(client, head)
        assert gateway.line_about(server)["status"] == "417"
        wire.send(client, body)  # by a client that did not look for an answer
        answer = http_wire.read_answer(client)
    assert (answer.status, len(answer.body)) == (417, len(page))


def test_a_denied_target_is_told_before_the_body(gateway: running.Gateway) -> None:
    with gateway.connect() as client:  # R63
        head = http_wire.request(
            http_wire.DENIED, EXPECT, b"Content-Length: 5", method=b"POST"
        )
        answer = http_wire.exchange(client, head)
        assert (answer.status, answer.closes) == (403, True)
        assert wire.at_end(client)


@pytest.mark.parametrize(
    "value", [b"the-unexpected", b"100-continued", b"100-continue, x"]
)
def test_other_expectations_fail(
    gateway: running.Gateway, origin: origins.Start, value: bytes
) -> None:
    server = origin(http_wire.Script())  # R63
    data = http_wire.post(
        server, b"Expect: " + value, b"Content-Length: 5", body=b"hello"
    )
    assert_refused(gateway, data, 417)
    assert http_wire.uncalled(server)


def assert_refused(gateway: running.Gateway, data: bytes, status: int) -> None:
    with gateway.connect() as client:
        answer = http_wire.exchange(client, data)
        assert (answer.status, answer.closes) == (status, True)
        assert wire.at_end(client)


def test_expect_without_a_body_goes_no_further(
    gateway: running.Gateway, origin: origins.Start
) -> None:
    for length in (b"X-A: 1", b"Content-Length: 0"):  # R63
        got = http_wire.forwarded(gateway, origin(http_wire.Script()), EXPECT, length)
        assert not got.values(b"Expect")


def test_expect_of_an_http_1_0_client_is_ignored(
    gateway: running.Gateway, origin: origins.Start
) -> None:
    server = origin(Continuing(b"100 Continue", b"103 Hints"))  # R63, R64
    fields = EXPECT, b"Content-Length: 5"
    with gateway.connect() as client:
        data = http_wire.request(
            server, *fields, method=b"POST", version=b"HTTP/1.0", body=b"hello"
        )
        assert (
            http_wire.exchange(client, data).status == 200
        )  # the first thing it reads
        assert wire.at_end(client)
    assert not server.handle.requests[0].values(b"Expect")


def test_interim_answers_pass_in_order(
    gateway: running.Gateway, origin: origins.Start
) -> None:
    interim = b"100 Continue", b"102 Wait", b"103 Hints", b"103 More", b"199 Odd"  # R64
    server = origin(Continuing(*interim))
    with gateway.connect() as client:
        wire.send(client, http_wire.request(server))
        starts = [http_wire.read_answer(client).start for _ in range(6)]
        assert starts == [b"HTTP/1.1 " + one for one in (*interim, b"200 OK")]


def test_interim_answers_keep_their_fields(
    gateway: running.Gateway, origin: origins.Start
) -> None:
    link = b"Link: </style.css>; rel=preload"  # R64
    hints = http_wire.response(
        link, b"Connection: x-a", b"X-A: 1", status=b"103 Early Hints"
    )
    server = origin(http_wire.Script(hints + http_wire.OK))
    with gateway.connect() as client:
        answer = http_wire.exchange(client, http_wire.request(server))
        assert (answer.status, answer.values(b"Link")) == (103, [link[6:]])
        assert not answer.values(b"X-A")
        assert http_wire.read_answer(client).status == 200


def test_interim_answers_have_no_body(
    gateway: running.Gateway, origin: origins.Start
) -> None:
    for field in (
        b"Content-Length: 2",
        CHUNKED,
    ):  # R46, R53: http_wire.py wants neither
        server = origin(
            http_wire.Script(
                http_wire.response(field, status=b"103 Hints") + http_wire.OK
            )
        )
        with gateway.connect() as client:
            assert http_wire.exchange(client, http_wire.request(server)).status == 103
            assert http_wire.read_answer(client).body == b"ok"


def test_interim_answers_travel_at_once(
    gateway: running.Gateway, origin: origins.Start
) -> None:
    seen = threading.Event()  # R64

    def handle(connection: socket.socket, server: origins.Origin) -> None:
        http_wire.read_head(connection)
        connection.sendall(http_wire.response(b"Date: then", status=b"103 Hints"))
        if seen.wait(10):
            connection.sendall(http_wire.OK)

    with gateway.connect() as client:
        early = http_wire.exchange(client, http_wire.request(origin(handle)))
        assert (early.status, early.values(b"Date")) == (103, [b"then"])
        seen.set()
        assert http_wire.read_answer(client).status == 200


def test_an_http_1_0_client_gets_no_interim_answer(
    gateway: running.Gateway, origin: origins.Start
) -> None:
    server = origin(Continuing(b"100 Continue", b"103 Hints"))  # R64
    assert http_wire.ask(gateway, server, version=b"HTTP/1.0").status == 200


@pytest.mark.parametrize("version", [b"HTTP/1.0", b"HTTP/1.1"])
def test_interim_answers_are_bounded(
    gateway: running.Gateway, origin: origins.Start, version: bytes
) -> None:
    def babble(connection: socket.socket, server: origins.Origin) -> None:
        http_wire.read_head(connection)
        connection.sendall(
            http_wire.response(status=b"103 Hints") * 10_000 + http_wire.OK
        )
        wire.read_all(connection)

    with gateway.connect() as client:  # R64
        answer = http_wire.exchange(
            client, http_wire.request(origin(babble), version=version)
        )
        count = 0
        while answer.status < 200:
            answer, count = http_wire.read_answer(client), count + 1
        assert answer.status == 502 and count <= 64


def test_sixty_interim_answers_are_fine(
    gateway: running.Gateway, origin: origins.Start
) -> None:
    server = origin(
        http_wire.Script(http_wire.response(status=b"103 Hints") * 60 + http_wire.OK)
    )  # R64
    with gateway.connect() as client:
        wire.send(client, http_wire.request(server))
        assert [http_wire.read_answer(client).status for _ in range(61)] == [
            103
        ] * 60 + [200]


# --- Upgrade ------------------------------------------------------------------

UPGRADE = b"Connection: Upgrade", b"Upgrade: websocket"
SWITCH = http_wire.response(*UPGRADE, status=b"101 Switching Protocols")


def switching(early: bytes = b"", answer: bytes = SWITCH) -> Callable[..., None]:
    """Return an origin that switches protocols and then echoes until the end."""

    def handle(connection: socket.socket, server: origins.Origin) -> None:
        server.received.append(http_wire.read_head(connection))
        connection.sendall(answer + early)
        while piece := connection.recv(65536):
            connection.sendall(piece)
        connection.shutdown(socket.SHUT_WR)

    return handle


@pytest.mark.parametrize("early", [b"", b"\x81\x05hello"])
def test_an_upgrade_becomes_a_tunnel(
    gateway: running.Gateway, origin: origins.Start, early: bytes
) -> None:
    server = origin(switching(early))  # R65: a frame may follow in the same segment
    with gateway.connect() as client:
        answer = http_wire.exchange(client, http_wire.request(server, *UPGRADE))
        assert (answer.status, answer.members(b"Upgrade")) == (101, [b"websocket"])
        assert answer.members(b"Connection") == [b"upgrade"]
        assert answer.via == b"1.1 " + running.NAME
        assert wire.read_exactly(client, len(early)) == early
        for piece in (b"GET http://a/ HTTP/1.1\r\n\r\n", b"\0\xff", b"x" * 200_000):
            wire.send(client, piece)
            assert wire.read_exactly(client, len(piece)) == piece
        client.shutdown(socket.SHUT_WR)
        assert wire.at_end(client)
    head = server.received[0].lower()
    assert b"\r\nupgrade: websocket\r\n" in head and b"\r\nconnection: upgrade" in head
    line = gateway.line_about(server)
    assert (line["proto"], line["status"]) == ("upgrade", "101")


def test_what_the_client_says_too_early_reaches_the_server(
    gateway: running.Gateway, origin: origins.Start
) -> None:
    with gateway.connect() as client:  # R65
        data = http_wire.request(origin(switching()), *UPGRADE) + b"early"
        assert http_wire.exchange(client, data).status == 101
        assert wire.read_exactly(client, 5) == b"early"


def test_a_refused_upgrade_stays_http(
    gateway: running.Gateway, origin: origins.Start
) -> None:
    server = origin(http_wire.Script())  # R65
    with gateway.connect() as client:
        wire.send(
            client,
            http_wire.request(server, *UPGRADE)
            + http_wire.request(server, path=b"/next"),
        )
        assert [http_wire.read_answer(client).status for _ in range(2)] == [200, 200]
    assert [got.target for got in server.handle.requests] == [b"/", b"/next"]


def test_a_demand_to_upgrade_says_to_what(
    gateway: running.Gateway, origin: origins.Start
) -> None:
    answer = http_wire.response(
        *UPGRADE, b"Content-Length: 0", status=b"426 Upgrade Required"
    )
    for sent, named in ((answer, [b"websocket"]), (answer.replace(b"Up", b"X-"), [])):
        got = http_wire.ask(
            gateway, origin(http_wire.Script(sent))
        )  # RFC 9110 section 15.5.22
        assert (got.status, got.members(b"Upgrade")) == (426, named)
        assert (b"upgrade" in got.members(b"Connection")) == bool(named)


@pytest.mark.parametrize(
    "fields",
    [
        (b"Connection: Upgrade, HTTP2-Settings", b"Upgrade: h2c", b"HTTP2-Settings: A"),
        (b"Connection: Upgrade", b"Upgrade: H2C", b"HTTP2-Settings: A"),
        (b"Connection: Upgrade", b"Upgrade: h2c, ,,"),
        (b"Connection: Upgrade, X-A", b"Upgrade: own/1", b"X-A: 1"),
    ],
)
def test_an_upgrade_travels_with_its_fields_or_not_at_all(
    gateway: running.Gateway, origin: origins.Start, fields: tuple[bytes, ...]
) -> None:
    got = http_wire.forwarded(gateway, origin(http_wire.Script()), *fields)  # R85
    for name in (b"Upgrade", b"HTTP2-Settings", b"X-A"):
        assert not got.values(name)
    assert b"upgrade" not in got.members(b"Connection")


def test_one_of_several_protocols_may_be_chosen(
    gateway: running.Gateway, origin: origins.Start
) -> None:
    server = origin(switching(answer=SWITCH.replace(b"websocket", b"WebSocket")))  # R65
    fields = (
        b"Connection: keep-alive, upgrade",
        b"Upgrade: h2c, foo/1",
        b"Upgrade: websocket",
    )
    with gateway.connect() as client:
        assert (
            http_wire.exchange(client, http_wire.request(server, *fields)).status == 101
        )
        wire.send(client, b"hello")
        assert wire.read_exactly(client, 5) == b"hello"


@pytest.mark.parametrize(
    "answer",
    [
        pytest.param(SWITCH.replace(b"websocket", b"h2c"), id="not-offered"),
        pytest.param(
            SWITCH.replace(b"websocket", b"websocket, h2c"), id="one-too-many"
        ),
        pytest.param(SWITCH.replace(b"websocket", b"websocket/2"), id="other-version"),
        pytest.param(
            http_wire.response(status=b"101 Switching Protocols"), id="not-named"
        ),
        pytest.param(
            http_wire.response(b"Upgrade:", status=b"101 Switching Protocols"),
            id="empty",
        ),
    ],
)
def test_a_switch_to_what_was_not_offered_is_502(
    gateway: running.Gateway, origin: origins.Start, answer: bytes
) -> None:
    server = origin(switching(b"evil", answer))  # R65, R70
    with gateway.connect() as client:
        answer = http_wire.exchange(client, http_wire.request(server, *UPGRADE))
        assert answer.status == 502
        assert http_wire.proxy_error(answer) in (
            b"http_upgrade_failed",
            b"http_protocol_error",
        )


@pytest.mark.parametrize(
    ("fields", "version"),
    [
        ([], b"HTTP/1.1"),
        ([b"Upgrade: websocket"], b"HTTP/1.1"),  # Connection does not name it
        (UPGRADE, b"HTTP/1.0"),
    ],
)
def test_an_upgrade_nobody_asked_for_is_502(
    gateway: running.Gateway, origin: origins.Start, fields: list[bytes], version: bytes
) -> None:
    server = origin(switching(b"evil"))  # R65
    answer = http_wire.ask(gateway, server, *fields, version=version)
    assert answer.status == 502
    assert b"upgrade" not in server.received[0].lower()


def test_continue_comes_before_the_switch(
    gateway: running.Gateway, origin: origins.Start
) -> None:
    def handle(connection: socket.socket, server: origins.Origin) -> None:
        http_wire.read_head(connection)
        connection.sendall(http_wire.response(status=b"100 Continue"))
        server.received.append(wire.read_exactly(connection, 5))
        connection.sendall(SWITCH + b"after")

    server = origin(handle)  # R65
    with gateway.connect() as client:
        fields = *UPGRADE, EXPECT, b"Content-Length: 5"
        assert http_wire.exchange(client, http_wire.post(server, *fields)).status == 100
        assert http_wire.exchange(client, b"hello").status == 101
        assert wire.read_exactly(client, 6) == b"after"
    assert server.received == [b"hello"]


# --- CONNECT ------------------------------------------------------------------


def test_connect_is_answered_without_framing(
    gateway: running.Gateway, origin: origins.Start
) -> None:
    with http_wire.tunnel(
        gateway, origin(origins.echo)
    ) as client:  # R46, R67: read_answer() looks
        wire.send(client, b"hello")
        assert wire.read_exactly(client, 5) == b"hello"


@pytest.mark.parametrize("feed", [wire.send, wire.drip])
@pytest.mark.parametrize("size", [1, 5, 70_000])
def test_early_data_goes_first(
    gateway: running.Gateway,
    origin: origins.Start,
    size: int,
    feed: Callable[..., None],
) -> None:
    early = BULK[: size if feed is wire.send else min(size, 500)]  # R67
    with gateway.connect() as client:
        feed(client, http_wire.request(origin(origins.echo), method=b"CONNECT") + early)
        assert http_wire.read_answer(client, b"CONNECT").status == 200
        wire.send(client, b"later")
        assert wire.read_exactly(client, len(early) + 5) == early + b"later"


def test_a_server_may_speak_first(
    gateway: running.Gateway, origin: origins.Start
) -> None:
    def greet(connection: socket.socket, server: origins.Origin) -> None:
        connection.sendall(b"220 ready\r\n")
        origins.echo(connection, server)

    with http_wire.tunnel(gateway, origin(greet)) as client:  # R67
        assert wire.read_exactly(client, 11) == b"220 ready\r\n"


def test_what_goes_through_a_tunnel_is_nobodys_business(
    gateway: running.Gateway, origin: origins.Start
) -> None:
    with http_wire.tunnel(gateway, origin(origins.echo)) as client:  # R67
        for piece in (
            http_wire.request(http_wire.DENIED),
            b"\r\n" * 100,
            b"\0\x04\x05\x16",
            SWITCH,
        ):
            wire.send(client, piece)
            assert wire.read_exactly(client, len(piece)) == piece


def test_a_tunnel_carries_bulk_both_ways_at_once(
    gateway: running.Gateway, origin: origins.Start
) -> None:
    with http_wire.tunnel(gateway, origin(origins.echo)) as client:  # R68
        sender = threading.Thread(target=wire.send, args=[client, BULK], daemon=True)
        sender.start()
        assert wire.digest(wire.read_exactly(client, len(BULK))) == wire.digest(BULK)
        sender.join(10)
        client.shutdown(socket.SHUT_WR)
        assert wire.at_end(client)


@pytest.mark.parametrize("size", [0, 1, 65_536, len(BULK)])
def test_a_client_may_close_its_half_first(
    gateway: running.Gateway, origin: origins.Start, size: int
) -> None:
    def answer_at_the_end(connection: socket.socket, server: origins.Origin) -> None:
        connection.sendall(
            wire.digest(wire.read_all(connection)).encode() + BULK[:size]
        )

    with http_wire.tunnel(gateway, origin(answer_at_the_end)) as client:  # R68
        wire.send(client, BULK[:size])
        client.shutdown(socket.SHUT_WR)
        expected = wire.digest(BULK[:size]).encode() + BULK[:size]
        assert wire.digest(wire.read_all(client)) == wire.digest(expected)


@pytest.mark.parametrize("size", [0, 1, 65_536, len(BULK)])
def test_a_server_may_close_its_half_first(
    gateway: running.Gateway, origin: origins.Start, size: int
) -> None:
    def speak_and_listen(connection: socket.socket, server: origins.Origin) -> None:
        connection.sendall(BULK[:size])
        connection.shutdown(socket.SHUT_WR)
        server.received.append(wire.read_all(connection))

    server = origin(speak_and_listen)  # R68
    with http_wire.tunnel(gateway, server) as client:
        assert wire.digest(wire.read_all(client)) == wire.digest(BULK[:size])
        wire.send(client, BULK)
    wait.until(lambda: server.received)
    assert wire.digest(server.received[0]) == wire.digest(BULK)


def test_early_data_and_half_close_together_are_answered(
    gateway: running.Gateway, origin: origins.Start
) -> None:
    with gateway.connect() as client:  # R67, R68
        wire.send(
            client,
            http_wire.request(origin(origins.echo), method=b"CONNECT") + b"hello",
        )
        client.shutdown(socket.SHUT_WR)
        assert http_wire.read_answer(client, b"CONNECT").status == 200
        assert wire.read_all(client) == b"hello"


def test_a_reset_goes_through_the_tunnel(
    gateway: running.Gateway, origin: origins.Start
) -> None:
    left = threading.Event()  # R68

    def wait(connection: socket.socket, server: origins.Origin) -> None:
        wire.read_all(connection)
        left.set()

    with http_wire.tunnel(gateway, origin(wait)) as client:
        wire.reset(client)
        assert left.wait(5)


def test_the_worker_of_a_reset_tunnel_serves_the_next_client(
    natwork: running.Start, origin: origins.Start
) -> None:
    gateway = natwork("spare_workers=1", "max_workers=1")
    asked = http_wire.request(origin(origins.echo), method=b"CONNECT")
    for _ in range(3):
        with gateway.connect() as client:
            # Of HTTP/1.0, so nothing is to be expected after an answer.
            client.sendall(asked.replace(b"HTTP/1.1", b"HTTP/1.0"))
            assert http_wire.read_head(client) == http_wire.ACCEPTED
            wire.reset(client)
    assert len({line["pid"] for line in gateway.lines(3)}) == 1


def test_a_server_reset_ends_the_tunnel(
    gateway: running.Gateway, origin: origins.Start
) -> None:
    def leave(connection: socket.socket, server: origins.Origin) -> None:
        connection.recv(1)
        wire.reset(connection)

    with http_wire.tunnel(gateway, origin(leave)) as client:  # R68
        client.settimeout(5)
        wire.send(client, b"x")
        assert wire.read_all(client) == b""


def test_a_silent_tunnel_ends(hasty: running.Gateway, origin: origins.Start) -> None:
    left = threading.Event()  # R61, R68

    def wait(connection: socket.socket, server: origins.Origin) -> None:
        wire.read_all(connection)
        left.set()

    with http_wire.tunnel(hasty, origin(wait)) as client:
        assert wire.read_all(client) == b""
        assert left.wait(5)


def test_a_tunnel_is_one_log_line(
    gateway: running.Gateway, origin: origins.Start
) -> None:
    server = origin(origins.echo)
    with http_wire.tunnel(gateway, server) as client:
        wire.send(client, b"hello")
        assert wire.read_exactly(client, 5) == b"hello"
        client.shutdown(socket.SHUT_WR)
        assert wire.at_end(client)

    line = gateway.line_about(server)
    assert (line["proto"], line["method"]) == ("connect", "CONNECT")
    assert (line["status"], line["outcome"]) == ("200", "closed")
    assert int(line["up"]) >= 5 and int(line["down"]) >= 5


REFUSED = {
    "denied": (http_wire.DENIED + b":443", 403, b"http_request_denied"),
    "port-25": (b"127.0.0.1:25", 403, b"http_request_denied"),
    "closed-port": (http_wire.CLOSED, 502, b"connection_refused"),
}


@pytest.mark.parametrize(("where", "status", "error"), REFUSED.values(), ids=REFUSED)
def test_a_refused_connect_ends_the_connection(
    gateway: running.Gateway,
    origin: origins.Start,
    where: bytes,
    status: int,
    error: bytes,
) -> None:
    server = origin(
        http_wire.Script()
    )  # R66, R69: RFC 9931, early data is never a request
    with gateway.connect() as client:
        early = http_wire.request(server, path=b"/smuggled")
        answer = http_wire.exchange(
            client, http_wire.request(where, method=b"CONNECT") + early
        )
        assert (answer.status, http_wire.proxy_error(answer)) == (status, error)
        assert answer.closes and wire.at_end(client)
    assert http_wire.uncalled(server)


def test_a_tunnel_does_not_hold_the_server_that_was_kept(
    gateway: running.Gateway, origin: origins.Start
) -> None:
    ended = threading.Event()

    def keep(connection: socket.socket, server: origins.Origin) -> None:
        http_wire.read_head(connection)
        connection.sendall(http_wire.OK)
        wire.read_all(connection)
        ended.set()

    with gateway.connect() as client:
        assert http_wire.exchange(client, http_wire.request(origin(keep))).status == 200
        asked = http_wire.request(origin(origins.echo), method=b"CONNECT")
        assert http_wire.exchange(client, asked, b"CONNECT").status == 200
        assert ended.wait(10) and wire.echoes(client)


def test_a_refused_connect_ends_a_kept_connection(
    gateway: running.Gateway, origin: origins.Start
) -> None:
    server = origin(http_wire.Script())  # R69
    with gateway.connect() as client:
        assert http_wire.exchange(client, http_wire.request(server)).status == 200
        wire.send(
            client, http_wire.request(http_wire.DENIED + b":443", method=b"CONNECT")
        )
        assert http_wire.read_answer(client).status == 403
        wire.send(client, http_wire.request(server, path=b"/smuggled"))
        assert wire.read_all(client) == b""
    assert [got.target for got in server.handle.requests] == [b"/"]


def test_connect_may_follow_other_requests(
    gateway: running.Gateway, origin: origins.Start
) -> None:
    server = origin(http_wire.Script())  # R67
    with gateway.connect() as client:
        assert http_wire.exchange(client, http_wire.request(server)).status == 200
        data = http_wire.request(origin(origins.echo), method=b"CONNECT") + b"hello"
        assert http_wire.exchange(client, data, b"CONNECT").status == 200
        assert wire.read_exactly(client, 5) == b"hello"


@needs.ipv6
def test_connect_reaches_ipv6(gateway: running.Gateway, origin: origins.Start) -> None:
    with http_wire.tunnel(gateway, origin(origins.echo, "::1")) as client:  # R24, R66
        wire.send(client, b"hello")
        assert wire.read_exactly(client, 5) == b"hello"


@pytest.mark.parametrize("version", [b"HTTP/1.0", b"HTTP/1.1", b"HTTP/1.2"])
def test_connect_comes_in_any_version(
    gateway: running.Gateway, origin: origins.Start, version: bytes
) -> None:
    data = http_wire.request(
        origin(origins.echo), method=b"CONNECT", version=version
    )  # R67
    with gateway.connect() as client:
        assert http_wire.exchange(client, data, b"CONNECT").status == 200
        wire.send(client, b"hello")
        assert wire.read_exactly(client, 5) == b"hello"


def test_connect_ignores_the_host_field(
    gateway: running.Gateway, origin: origins.Start
) -> None:
    data = http_wire.request(origin(origins.echo), method=b"CONNECT")  # R18
    data = data.replace(b"Host: ", b"Host: example.com\r\nX-Was: ")
    with gateway.connect() as client:
        assert http_wire.exchange(client, data, b"CONNECT").status == 200


# --- Overload -----------------------------------------------------------------


def test_an_overloaded_server_may_say_when(
    gateway: running.Gateway, origin: origins.Start
) -> None:
    busy = http_wire.sized(b"busy", b"Retry-After: 120", status=b"503 Busy")  # R70
    answer = http_wire.ask(gateway, origin(http_wire.Script(busy)))
    assert (answer.status, answer.values(b"Retry-After")) == (503, [b"120"])


FINAL = [
    b"HTTP/1.1 413 No\r\nConnection: close\r\n\r\n" + b"a page" * 1000,
    b"HTTP/1.0 413 No\r\n\r\n" + b"a page" * 1000,
    b"HTTP/1.1 413 No\r\nConnection: close\r\n"
    + b"Transfer-Encoding: chunked\r\n\r\n1770\r\n"
    + b"a page" * 1000
    + b"\r\n0\r\n\r\n",
]


@pytest.mark.parametrize("minor", [0, 1])
@pytest.mark.parametrize("answer", FINAL, ids=["close", "1.0", "chunked"])
def test_an_early_answer_that_ends_by_close_ends_well(
    gateway: running.Gateway, origin: origins.Start, answer: bytes, minor: int
) -> None:
    def refuse(connection: socket.socket, server: origins.Origin) -> None:
        http_wire.read_head(connection)
        connection.sendall(answer)
        connection.shutdown(socket.SHUT_WR)
        wire.read_all(connection)

    data = http_wire.post(origin(refuse), b"Content-Length: 1000000", body=b"x" * 1000)
    if not minor:
        data = data.replace(b"HTTP/1.1", b"HTTP/1.0", 1)
    count = len(gateway.lines())
    with gateway.connect() as client:
        wire.send(client, data)
        answered = b""
        while piece := client.recv(65536):  # to the end: no reset
            answered += piece
    assert answered.startswith(b"HTTP/1.1 413 No\r\n")
    assert answered.count(b"a page") == 1000
    line = gateway.lines(count + 1)[count]
    assert (line["status"], line["outcome"]) == ("413", "ok")


@pytest.mark.parametrize("fault", ["half-close", "malformed"])
def test_a_client_who_breaks_off_his_body_has_the_answer_that_has_begun(
    gateway: running.Gateway, origin: origins.Start, fault: str
) -> None:
    whole, ended = threading.Event(), threading.Event()

    def refuse(connection: socket.socket, server: origins.Origin) -> None:
        http_wire.read_head(connection)
        head = b"HTTP/1.1 413 No\r\nContent-Length: %d\r\n\r\n" % len(BULK)
        connection.sendall(head + BULK[:1000])
        whole.wait(10)
        with contextlib.suppress(ConnectionResetError):
            while connection.recv(65536):
                pass
        ended.set()  # of a body that is not whole
        connection.sendall(BULK[1000:])

    head = http_wire.post(origin(refuse), CHUNKED) + b"5\r\nhello\r\n"
    with gateway.connect(20) as client:
        wire.send(client, head)
        assert client.recv(12, socket.MSG_PEEK) == b"HTTP/1.1 413"
        if fault == "half-close":
            client.shutdown(socket.SHUT_WR)
        else:
            client.sendall(b"zz\r\n")
        whole.set()
        answer = http_wire.read_answer(client)
        assert answer.complete and wire.digest(answer.body) == wire.digest(BULK)
        assert wire.at_end(client)
    assert ended.wait(10)


def test_the_time_of_a_silent_client_does_not_begin_anew_when_his_server_leaves(
    natwork: running.Start, origin: origins.Start
) -> None:
    leave = threading.Event()

    def serve(connection: socket.socket, server: origins.Origin) -> None:
        http_wire.read_head(connection)
        connection.sendall(http_wire.OK)
        leave.wait(10)

    gateway = natwork("keepalive_timeout=2")
    with gateway.connect() as client:
        assert (
            http_wire.exchange(client, http_wire.request(origin(serve))).status == 200
        )
        began = time.monotonic()
        time.sleep(1)
        leave.set()
        assert wire.at_end(client)
        assert time.monotonic() - began < 2.9  # not 3


def test_an_end_behind_a_reset_is_not_the_end_of_an_answer(
    natwork: running.Start, origin: origins.Start
) -> None:
    go = threading.Event()

    def serve(connection: socket.socket, server: origins.Origin) -> None:
        http_wire.read_head(connection)
        connection.sendall(b"HTTP/1.0 200 OK\r\n\r\nhalf")
        go.wait(10)
        wire.reset(connection)

    gateway = natwork("spare_workers=1", "max_workers=1", "user=root")
    with gateway.connect() as client:
        wire.send(
            client, http_wire.post(origin(serve), b"Content-Length: 9", body=b"1234")
        )
        assert http_wire.read_head(client) and wire.read_exactly(client, 4) == b"half"
        (worker,) = gateway.workers()
        with kernel.stopped(worker):
            go.set()
            time.sleep(0.2)
            client.sendall(b"5")
        with pytest.raises(ConnectionResetError):
            client.recv(64)
    assert gateway.lines(1)[0]["outcome"] == "server-gone"


def test_nothing_of_ours_is_said_within_an_interim_answer(
    hasty: running.Gateway, origin: origins.Start
) -> None:
    def hint(connection: socket.socket, server: origins.Origin) -> None:
        http_wire.read_head(connection)
        with contextlib.suppress(OSError):
            for _ in range(60):
                link = b"Link: " + b"a" * 60_000
                connection.sendall(b"HTTP/1.1 103 Early Hints\r\n%b\r\n\r\n" % link)
        connection.recv(1)

    count = len(hasty.lines())
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.settimeout(20)
        client.connect(hasty.address)
        wire.send(client, http_wire.request(origin(hint)))
        line = hasty.lines(count + 1)[count]  # it has read nothing until then
        assert line["outcome"] in ("answer-timeout", "idle-timeout")
        assert b"Gateway Timeout" not in wire.read_all(client)


def test_an_empty_line_behind_a_body_begins_no_request(
    natwork: running.Start, origin: origins.Start
) -> None:
    gateway = natwork("head_timeout=0.5", "keepalive_timeout=1.5")
    server = origin(http_wire.Script())
    with gateway.connect() as client:  # R4, R61
        assert (
            http_wire.exchange(
                client, http_wire.post(server, body=b"") + b"\r\n"
            ).status
            == 200
        )
        assert wire.at_end(client)  # and no 408
    with gateway.connect() as client:
        data = http_wire.post(server, b"Content-Length: 2", body=b"ab") + b"\r\n"
        assert http_wire.exchange(client, data).status == 200
        assert http_wire.exchange(client, http_wire.request(server)).status == 200
    assert [line["method"] for line in gateway.lines(3)] == ["POST", "POST", "GET"]


def test_an_empty_line_first_keeps_a_fresh_client_what_he_was_promised(
    natwork: running.Start, origin: origins.Start
) -> None:
    gateway = natwork("head_timeout=1", "keepalive_timeout=0.2")
    with gateway.connect() as client:
        client.sendall(b"\r\n")  # R4
        time.sleep(0.5)
        assert (
            http_wire.exchange(
                client, http_wire.request(origin(http_wire.Script()))
            ).status
            == 200
        )
    for begun in (b"\r\n", b"\r"):
        with gateway.connect() as client:
            client.sendall(begun)
            assert http_wire.read_answer(client).status == 408
    outcomes = [line["outcome"] for line in gateway.lines(3)]
    assert outcomes == ["ok", "head-timeout", "head-timeout"]
