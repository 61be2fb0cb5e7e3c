"""Where a message ends: lengths, chunks, closes, and what is cut off (R42 to R57)."""

from __future__ import annotations

import contextlib
import os
import select
import socket
import threading
import time
from collections.abc import Callable

import http_wire
import origins
import pytest
import running
import wait
import wire

pytestmark = pytest.mark.filterwarnings(http_wire.STRICT)
gateway = running.shared()
hasty = running.shared("head_timeout=0.5", "idle_timeout=0.5")

CHUNKED = b"Transfer-Encoding: chunked"
BULK = os.urandom(1 << 20) * 4  # more than the sockets and the pipes between hold


class Partial(http_wire.Script):
    """An origin that tells when a request has begun to arrive, and when it ended."""

    def __init__(self, answer: bytes = http_wire.OK) -> None:
        super().__init__(answer)
        self.started, self.ended = threading.Event(), threading.Event()

    def __call__(self, connection: socket.socket, origin: origins.Origin) -> None:
        connection.recv(1, socket.MSG_PEEK)
        self.started.set()
        request = http_wire.read_request(connection)
        assert request
        self.requests.append(request)
        if request.complete:
            connection.sendall(self.answers[0])
        self.ended.set()


# --- Chunked request bodies ---------------------------------------------------

GOOD_CHUNKS = {
    "one": b"5\r\nhello\r\n0\r\n\r\n",
    "many": b"1\r\nh\r\n1\r\ne\r\n2\r\nll\r\n1\r\no\r\n0\r\n\r\n",
    "leading-zeros": b"0005\r\nhello\r\n000\r\n\r\n",
    "extension": b"5;a=b\r\nhello\r\n0\r\n\r\n",
    "extension-without-value": b"5;a\r\nhello\r\n0;b\r\n\r\n",
    "many-extensions": b"5;a;b=c;d=e;a=b\r\nhello\r\n0\r\n\r\n",
    "quoted-extension": b'5;a="b; c\\"d\\\\ e"\r\nhello\r\n0\r\n\r\n',
    "extension-with-obs-text": b'5;a="\xe9\t"\r\nhello\r\n0\r\n\r\n',
    "blanks-around-extension": b"5 ; a = b\t;\tc\r\nhello\r\n0\r\n\r\n",
    "trailers": b"5\r\nhello\r\n0\r\nX-A: 1\r\nX-B:\r\n\r\n",
}


@pytest.mark.parametrize("feed", [wire.send, wire.drip])
@pytest.mark.parametrize("body", GOOD_CHUNKS.values(), ids=GOOD_CHUNKS)
def test_good_chunks_arrive_without_extensions(
    gateway: running.Gateway,
    origin: origins.Start,
    body: bytes,
    feed: Callable[..., None],
) -> None:
    server = origin(http_wire.Script())  # R50, R51: http_wire.py knows no extension
    with gateway.connect() as client:
        feed(
            client,
            http_wire.post(server, CHUNKED, body=body) + http_wire.request(server),
        )
        assert [http_wire.read_answer(client).status for _ in range(2)] == [200, 200]
    got, after = server.handle.requests
    assert (got.body, got.complete, after.method) == (b"hello", True, b"GET")


@pytest.mark.parametrize("size", [b"a", b"A", b"0A", b"000000000000000A"])
def test_a_chunk_size_is_hexadecimal(
    gateway: running.Gateway, origin: origins.Start, size: bytes
) -> None:
    body = size + b"\r\n0123456789\r\n0\r\n\r\n"  # R50
    got = http_wire.forwarded(
        gateway, origin(http_wire.Script()), CHUNKED, method=b"POST", body=body
    )
    assert got.body == b"0123456789"


BAD_CHUNKS = {
    "plus": b"+5\r\nhello\r\n0\r\n\r\n",
    "minus": b"-5\r\nhello\r\n0\r\n\r\n",
    "prefix": b"0x5\r\nhello\r\n0\r\n\r\n",
    "prefix-and-underscore": b"0x1_f\r\n" + b"v" * 31 + b"\r\n0\r\n\r\n",
    "underscore": b"1_0\r\n0123456789abcdef\r\n0\r\n\r\n",
    "space-before": b" 5\r\nhello\r\n0\r\n\r\n",
    "tab-before": b"\t5\r\nhello\r\n0\r\n\r\n",
    "vertical-tab-after": b"5\x0b\r\nhello\r\n0\r\n\r\n",
    "form-feed-before": b"\x0c5\r\nhello\r\n0\r\n\r\n",
    "nbsp-after": b"5\xa0\r\nhello\r\n0\r\n\r\n",
    "no-size": b"\r\nhello\r\n0\r\n\r\n",
    "no-size-but-extension": b";a\r\nhello\r\n0\r\n\r\n",
    "no-hex-digit": b"g\r\nhello\r\n0\r\n\r\n",
    "two-sizes": b"5 5\r\nhello\r\n0\r\n\r\n",
    "comma": b"5,\r\nhello\r\n0\r\n\r\n",
    "superscript": b"\xc2\xb2\r\nab\r\n0\r\n\r\n",
    "arabic-digit": b"\xd9\xa5\r\nhello\r\n0\r\n\r\n",
    "nul-before": b"\x005\r\nhello\r\n0\r\n\r\n",
    "nul-after": b"5\0\r\nhello\r\n0\r\n\r\n",
    "over-64-bits": b"10000000000000005\r\nhello\r\n0\r\n\r\n",  # R49
    "far-over-64-bits": b"f" * 64 + b"\r\nhello\r\n0\r\n\r\n",  # R49
    "wraps-at-32-bits-to-zero": b"100000000000000000\r\n\r\n",  # R49
    "semicolon-alone": b"5;\r\nhello\r\n0\r\n\r\n",
    "semicolon-and-space": b"5; \r\nhello\r\n0\r\n\r\n",
    "two-semicolons": b"5;;a\r\nhello\r\n0\r\n\r\n",
    "extension-without-name": b"5;=b\r\nhello\r\n0\r\n\r\n",
    "extension-with-open-quote": b'5;a="b\r\nhello\r\n0\r\n\r\n',
    "cr-in-extension": b"5;a\rb\r\nhello\r\n0\r\n\r\n",  # R2
    "cr-in-quoted-extension": b'5;a="\r"\r\nhello\r\n0\r\n\r\n',  # R2
    "lf-in-extension": b"5;a\nhello\r\n0\r\n\r\n",
    "lf-in-quoted-extension": b'5;a="\n"\r\nhello\r\n0\r\n\r\n',
    "nul-in-extension": b"5;a\0\r\nhello\r\n0\r\n\r\n",
    "control-in-quoted-extension": b'5;a="\x08"\r\nhello\r\n0\r\n\r\n',
    "lf-ends-size": b"5\nhello\r\n0\r\n\r\n",  # R3: erratum 7633
    "cr-ends-size": b"5\rhello\r\n0\r\n\r\n",
    "cr-cr-lf-ends-size": b"5\r\r\nhello\r\n0\r\n\r\n",
    "lf-everywhere": b"5\nhello\n0\n\n",
    "no-line-end-after-data": b"5\r\nhello0\r\n\r\n",
    "too-much-data": b"5\r\nhelloo\r\n0\r\n\r\n",
    "lf-after-data": b"5\r\nhello\n0\r\n\r\n",
    "cr-after-data": b"5\r\nhello\r0\r\n\r\n",
    "letters-after-data": b"5\r\nhelloXX0\r\n\r\n",
    "lf-ends-last-size": b"5\r\nhello\r\n0\n\r\n",
    "semicolon-after-last-size": b"5\r\nhello\r\n0;\r\n\r\n",
    "lf-ends-body": b"5\r\nhello\r\n0\r\n\n",
    "lf-ends-trailer": b"5\r\nhello\r\n0\r\nX: 1\nY: 2\r\n\r\n",
    "cr-in-trailer": b"5\r\nhello\r\n0\r\nX: 1\r2\r\n\r\n",
    "nul-in-trailer": b"5\r\nhello\r\n0\r\nX: 1\0\r\n\r\n",
    "no-colon-in-trailer": b"5\r\nhello\r\n0\r\nX\r\n\r\n",
    "space-before-trailer-colon": b"5\r\nhello\r\n0\r\nX : 1\r\n\r\n",
    "space-before-trailer": b"5\r\nhello\r\n0\r\n X: 1\r\n\r\n",
    "folded-trailer": b"5\r\nhello\r\n0\r\nX: 1\r\n 2\r\n\r\n",
    "empty-trailer-name": b"5\r\nhello\r\n0\r\n: 1\r\n\r\n",
    "request-as-trailer": b"5\r\nhello\r\n0\r\nGET / HTTP/1.1\r\nX: 1\r\n\r\n",
}


@pytest.mark.parametrize("body", BAD_CHUNKS.values(), ids=BAD_CHUNKS)
def test_bad_chunks_at_once_reach_nobody(
    gateway: running.Gateway, origin: origins.Start, body: bytes
) -> None:
    server = origin(recorder := http_wire.Recorder())  # R50
    with gateway.connect() as client:
        wire.send(
            client,
            http_wire.post(server, CHUNKED, body=body) + http_wire.request(server),
        )
        answer = http_wire.read_answer(client)
        assert (answer.status, answer.closes) == (400, True)
        assert wire.at_end(client)
    assert recorder.ended.acquire(timeout=10)
    assert server.received == [b""]


def test_the_extensions_of_all_chunks_have_a_limit(
    gateway: running.Gateway, origin: origins.Start
) -> None:
    chunk = b"1;a=%b\r\nx\r\n" % (b"b" * 4000)  # R51
    server = origin(http_wire.Recorder())
    with gateway.connect() as client:
        wire.send(client, http_wire.post(server, CHUNKED, body=17 * chunk))
        answer = http_wire.read_answer(client)
        assert answer.status == 400 and b"chunk extensions of over" in answer.body


@pytest.mark.parametrize("much", [2, 100, 100_000])
def test_a_chunk_longer_than_its_size_is_called_so(
    gateway: running.Gateway, origin: origins.Start, much: int
) -> None:
    body, why = b"5\r\nhello" + b"o" * much, b"Why: chunk longer than its size."
    server = origin(http_wire.Script(http_wire.response(CHUNKED, body=body)))
    with gateway.connect() as client:  # R50
        asked = http_wire.exchange(client, http_wire.post(server, CHUNKED, body=body))
        assert asked.status == 400 and why in asked.body
    if much <= 100:  # else the answer has begun
        answered = http_wire.ask(gateway, server)
        assert answered.status == 502 and why in answered.body


@pytest.mark.parametrize("body", BAD_CHUNKS.values(), ids=BAD_CHUNKS)
def test_bad_chunks_later_are_never_a_whole_body(
    gateway: running.Gateway, origin: origins.Start, body: bytes
) -> None:
    server, arrived = origin(partial := Partial()), b"3\r\nfor\r\n"  # R50, R54
    with gateway.connect() as client:
        wire.send(client, http_wire.post(server, CHUNKED, body=arrived))
        assert partial.started.wait(10)
        wire.send(client, body + http_wire.request(server))
        answer = http_wire.read_answer(client)
        assert (answer.status, answer.closes) == (400, True)
        assert wire.at_end(client)
    assert partial.ended.wait(10)
    (got,) = partial.requests
    assert not got.complete


@pytest.mark.parametrize("body", BAD_CHUNKS.values(), ids=BAD_CHUNKS)
def test_bad_chunks_in_single_octets_are_never_a_whole_body(
    gateway: running.Gateway, origin: origins.Start, body: bytes
) -> None:
    server = origin(http_wire.Script())  # R50, R54
    with gateway.connect() as client:
        wire.drip(client, http_wire.post(server, CHUNKED, body=body))
        assert http_wire.read_answer(client).status == 400
        assert wire.at_end(client)
    assert not any(got.complete for got in server.handle.requests)


@pytest.mark.parametrize(
    "size",
    [
        pytest.param(b"5;" + b"a" * 65_536, id="name"),
        pytest.param(b"5" + b";a=b" * 16_384, id="number"),
        pytest.param(b'5;a="' + b"b" * 65_536 + b'"', id="value"),
        pytest.param(b"5" + b" " * 65_536 + b";a", id="blanks"),
        pytest.param(b"0" * 65_536 + b"5", id="zeros"),
    ],
)
def test_the_chunk_line_is_bounded(
    gateway: running.Gateway, origin: origins.Start, size: bytes
) -> None:
    server = origin(http_wire.Script())  # R51
    began = time.monotonic()
    with gateway.connect() as client:
        wire.send(
            client,
            http_wire.post(server, CHUNKED, body=size + b"\r\nhello\r\n0\r\n\r\n"),
        )
        assert http_wire.read_answer(client).status == 400
        assert wire.at_end(client)
    assert not any(got.complete for got in server.handle.requests)
    assert time.monotonic() - began < 3


def test_many_extensions_in_many_chunks_are_bounded_in_time(
    gateway: running.Gateway, origin: origins.Start
) -> None:
    body = b"1;a=b\r\nx\r\n" * 10_000 + b"0\r\n\r\n"  # R51
    got = http_wire.forwarded(
        gateway, origin(http_wire.Script()), CHUNKED, method=b"POST", body=body
    )
    assert got.body == b"x" * 10_000


def test_trailers_are_bounded(gateway: running.Gateway, origin: origins.Start) -> None:
    server = origin(http_wire.Script())  # R11, R52
    trailers = [b"X-%d: %b" % (i, b"v" * 1000) for i in range(100)]
    with gateway.connect() as client:
        body = http_wire.chunks(b"hello", trailers=trailers)
        wire.send(client, http_wire.post(server, CHUNKED, body=body))
        assert 400 <= http_wire.read_answer(client).status < 500
        assert wire.at_end(client)
    assert not any(got.complete for got in server.handle.requests)


# --- Trailers -----------------------------------------------------------------


def test_trailers_stay_trailers(
    gateway: running.Gateway, origin: origins.Start
) -> None:
    lines = [b"X-Sum: 1", b"X-Empty:", b"X-Sum: \xe9"]  # R52
    trailers = [(b"X-Sum", b"1"), (b"X-Empty", b""), (b"X-Sum", b"\xe9")]
    body = http_wire.chunks(b"hello", trailers=lines)
    server = origin(
        http_wire.Script(http_wire.response(CHUNKED, b"Trailer: X-Sum", body=body))
    )
    answer = http_wire.ask(gateway, server, CHUNKED, method=b"POST", body=body)
    for message in (server.handle.requests[0], answer):
        assert (message.body, message.trailers) == (b"hello", trailers)
        assert not message.values(b"X-Sum")


FORBIDDEN = [
    b"Content-Length: 3",
    b"Transfer-Encoding: chunked",
    b"Host: example.com",
    b"Authorization: Basic YTpi",
    b"Proxy-Authorization: Basic YTpi",
    b"Connection: close",
    b"Keep-Alive: x",
    b"TE: trailers",
    b"Upgrade: x",
]


@pytest.mark.parametrize("line", FORBIDDEN)
def test_trailers_cannot_frame_route_or_identify(
    gateway: running.Gateway, origin: origins.Start, line: bytes
) -> None:
    body = http_wire.chunks(b"hello", trailers=[line, b"X-A: 1"])  # R52
    server = origin(http_wire.Script(http_wire.response(CHUNKED, body=body)))
    with gateway.connect() as client:
        data = http_wire.post(server, CHUNKED, body=body)
        answers = [http_wire.exchange(client, data) for _ in range(2)]
    for message in (*answers, *server.handle.requests):
        assert message.body == b"hello"
        assert message.trailers in ([], [(b"X-A", b"1")])
        assert b"YTpi" not in repr(message).encode()
        assert b"example.com" not in repr(message).encode()


# --- Lengths ------------------------------------------------------------------


@pytest.mark.parametrize("size", [2**31, 2**32 + 5, 2**48, 2**62, 2**63 - 1])
def test_a_huge_length_does_not_wrap(
    gateway: running.Gateway, origin: origins.Start, size: int
) -> None:
    server = origin(partial := Partial())  # R49: carried as it is, or refused
    with gateway.connect() as client:
        wire.send(
            client, http_wire.post(server, b"Content-Length: %d" % size, body=b"hello")
        )
        wait.until(
            lambda: partial.started.is_set() or select.select([client], [], [], 0)[0]
        )
        if not partial.started.is_set():
            assert size > 2**48 and http_wire.read_answer(client).status == 400
            return
        client.shutdown(socket.SHUT_WR)
        assert partial.ended.wait(10)
    (got,) = partial.requests
    assert got.values(b"Content-Length") == [b"%d" % size]
    assert b"hello".startswith(got.body) and not got.complete


@pytest.mark.parametrize("size", [2**31, 2**32 + 5, 2**48, 2**62, 2**63 - 1])
@pytest.mark.parametrize(
    "form", [b"Content-Length: %d\r\n\r\n", CHUNKED + b"\r\n\r\n%x\r\n"]
)
def test_a_huge_response_does_not_wrap(
    gateway: running.Gateway, origin: origins.Start, form: bytes, size: int
) -> None:
    answer = b"HTTP/1.1 200 OK\r\n" + form % size + b"hello"  # R49, R54
    answer = http_wire.ask(gateway, origin(http_wire.Script(answer, close=True)))
    if size > 2**48 and answer.status == 502:
        return  # refused
    assert (answer.status, answer.complete) == (200, False)
    assert b"hello".startswith(answer.body)


BAD_LENGTHS = {
    "plus": [b"+5"],
    "minus": [b"-0"],
    "prefix": [b"0x5"],
    "underscore": [b"1_0"],
    "list-that-differs": [b"5, 6"],
    "two-that-differ": [b"5", b"6"],
    "over-64-bits": [b"18446744073709551621"],
    "of-5000-digits": [b"9" * 5000],
    "superscript": [b"\xc2\xb2"],
    "letters": [b"five"],
    "inner-space": [b"5 5"],
}


@pytest.mark.parametrize("lengths", BAD_LENGTHS.values(), ids=BAD_LENGTHS)
def test_a_response_with_a_bad_length_becomes_502(
    gateway: running.Gateway, origin: origins.Start, lengths: list[bytes]
) -> None:
    ends: list[bytes] = []  # R48

    def handle(connection: socket.socket, server: origins.Origin) -> None:
        http_wire.read_head(connection)
        fields = [b"Content-Length: " + length for length in lengths]
        connection.sendall(http_wire.response(*fields, body=b"hello"))
        ends.append(wire.read_all(connection))

    server = origin(handle)
    with gateway.connect() as client:
        answer = http_wire.exchange(client, http_wire.request(server))
        assert (answer.status, http_wire.proxy_error(answer)) == (
            502,
            b"http_protocol_error",
        )
        wait.until(lambda: ends == [b""])
        assert (
            http_wire.exchange(
                client, http_wire.request(origin(http_wire.Script()))
            ).status
            == 200
        )


@pytest.mark.parametrize("method", [b"GET", b"HEAD"])
@pytest.mark.parametrize(
    "fields", [[b"Content-Length: 3", CHUNKED], [CHUNKED, b"Content-Length: 99"]]
)
def test_a_response_with_length_and_coding_is_not_trusted(
    gateway: running.Gateway, origin: origins.Start, fields: list[bytes], method: bytes
) -> None:
    body = b"hello" if method == b"GET" else b""
    chunks = http_wire.chunks(body) if body else b""
    server = origin(
        http_wire.Script(http_wire.response(*fields, body=chunks))
    )  # R42, R47, R86
    with gateway.connect() as client:
        for _ in range(2):
            data = http_wire.request(server, method=method)
            answer = http_wire.exchange(client, data, method)
            assert (answer.status, answer.body) == (200, body)
    assert len(server.callers) == 2  # whoever sent that is not asked again


BAD_CODINGS = {
    "chunked-not-last": [b"chunked, gzip"],  # R43
    "chunked-twice": [b"chunked, chunked"],  # R44
    "chunked-twice-on-two-lines": [b"chunked", b"chunked"],  # R44
    "parameter": [b"chunked;q=1"],  # R50
    "quoted": [b'"chunked"'],  # R43
    "unknown": [b"x-new, chunked"],  # R43
    "gzip": [b"gzip, chunked"],  # R43
    "not-chunked": [b"gzip"],  # R43
}


@pytest.mark.parametrize("codings", BAD_CODINGS.values(), ids=BAD_CODINGS)
def test_a_response_with_a_bad_coding_becomes_502(
    gateway: running.Gateway, origin: origins.Start, codings: list[bytes]
) -> None:
    fields = [b"Transfer-Encoding: " + coding for coding in codings]
    server = origin(
        http_wire.Script(
            http_wire.response(*fields, body=http_wire.chunks(b"hello")), close=True
        )
    )
    with gateway.connect() as client:
        answer = http_wire.exchange(client, http_wire.request(server))
        assert answer.status == 502
        assert http_wire.proxy_error(answer) in (
            b"http_protocol_error",
            b"http_response_transfer_coding",
        )
        assert (
            http_wire.exchange(
                client, http_wire.request(origin(http_wire.Script()))
            ).status
            == 200
        )


@pytest.mark.parametrize(
    "coding", [b"Chunked", b"CHUNKED", b"chunked,", b", chunked\t"]
)
def test_a_response_may_write_chunked_as_it_likes(
    gateway: running.Gateway, origin: origins.Start, coding: bytes
) -> None:
    field = b"Transfer-Encoding: " + coding  # R14, R43: http_wire.py wants it plain
    answer = http_wire.ask(
        gateway,
        origin(
            http_wire.Script(http_wire.response(field, body=http_wire.chunks(b"hello")))
        ),
    )
    assert (answer.body, answer.complete) == (b"hello", True)


def test_a_coding_in_an_http_1_0_response_is_not_trusted(
    gateway: running.Gateway, origin: origins.Start
) -> None:
    answer = http_wire.response(
        CHUNKED, b"Connection: keep-alive", body=http_wire.chunks(b"hello")
    )  # R45
    server = origin(http_wire.Script(answer.replace(b"HTTP/1.1", b"HTTP/1.0")))
    with gateway.connect() as client:
        for _ in range(2):
            got = http_wire.exchange(client, http_wire.request(server))
            assert got.status == 502 or got.body == b"hello"
            if got.closes:
                break
    assert len(server.callers) == len(server.handle.requests)


# --- Messages without a body --------------------------------------------------

BODILESS = {
    "length": [b"Content-Length: 5"],
    "coding": [CHUNKED],
    "nothing": [],
}


@pytest.mark.parametrize("fields", BODILESS.values(), ids=BODILESS)
@pytest.mark.parametrize("status", [b"204 None", b"304 Same"])
def test_204_and_304_have_no_body(
    gateway: running.Gateway, origin: origins.Start, status: bytes, fields: list[bytes]
) -> None:
    server = origin(
        http_wire.Script(http_wire.response(*fields, status=status), http_wire.OK)
    )  # R46, R53
    with gateway.connect() as client:
        answer = http_wire.exchange(client, http_wire.request(server))
        assert answer.start == b"HTTP/1.1 " + status and not answer.closes
        assert http_wire.exchange(client, http_wire.request(server)).body == b"ok"


@pytest.mark.parametrize("fields", BODILESS.values(), ids=BODILESS)
def test_a_head_answer_has_no_body(
    gateway: running.Gateway, origin: origins.Start, fields: list[bytes]
) -> None:
    server = origin(http_wire.Script(http_wire.response(*fields), http_wire.OK))  # R53
    with gateway.connect() as client:
        answer = http_wire.exchange(
            client, http_wire.request(server, method=b"HEAD"), b"HEAD"
        )
        assert answer.status == 200 and not answer.closes
        assert http_wire.exchange(client, http_wire.request(server)).body == b"ok"


@pytest.mark.parametrize("status", [b"200 OK", b"304 Same"])
def test_the_length_of_what_is_not_sent_passes(
    gateway: running.Gateway, origin: origins.Start, status: bytes
) -> None:
    server = origin(
        http_wire.Script(http_wire.response(b"Content-Length: 12345", status=status))
    )  # R53
    method = b"HEAD" if status.startswith(b"200") else b"GET"
    answer = http_wire.ask(gateway, server, method=method)
    assert answer.values(b"Content-Length") == [b"12345"]


@pytest.mark.parametrize("method", [b"GET", b"POST", b"DELETE", b"BREW"])
def test_a_request_without_framing_has_no_body(
    gateway: running.Gateway, origin: origins.Start, method: bytes
) -> None:
    server = origin(http_wire.Script())  # R53
    with gateway.connect() as client:
        wire.send(
            client, http_wire.request(server, method=method) + http_wire.request(server)
        )
        assert [http_wire.read_answer(client).status for _ in range(2)] == [200, 200]
    assert [got.method for got in server.handle.requests] == [method, b"GET"]


@pytest.mark.parametrize("method", [b"GET", b"DELETE", b"OPTIONS", b"BREW"])
def test_any_method_may_have_a_body(
    gateway: running.Gateway, origin: origins.Start, method: bytes
) -> None:
    got = http_wire.forwarded(
        gateway,
        origin(http_wire.Script()),
        b"Content-Length: 5",
        method=method,
        body=b"hello",
    )  # R53
    assert got.body == b"hello"


# --- Bodies, whole ------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 1, 2, 1459, 65_535, 65_536, 65_537, 300_001])
@pytest.mark.parametrize("way", ["sized", "chunked", "closed"])
def test_bodies_of_all_sizes_come_back_whole(
    gateway: running.Gateway, origin: origins.Start, way: str, size: int
) -> None:
    body = BULK[:size]  # R53
    answer = {
        "sized": http_wire.sized(body),
        "chunked": http_wire.response(
            CHUNKED, body=http_wire.chunks(*([body] if body else []))
        ),
        "closed": http_wire.response(body=body),
    }[way]
    server = origin(http_wire.Script(answer, close=way == "closed"))
    answer = http_wire.ask(gateway, server)
    assert (wire.digest(answer.body), answer.complete) == (wire.digest(body), True)


@pytest.mark.parametrize("size", [0, 1, 1459, 65_535, 65_536, 65_537, 300_001])
@pytest.mark.parametrize("way", ["sized", "chunked"])
def test_bodies_of_all_sizes_go_there_whole(
    gateway: running.Gateway, origin: origins.Start, way: str, size: int
) -> None:
    body = BULK[:size]  # R53
    field, data = {
        "sized": (b"Content-Length: %d" % size, body),
        "chunked": (CHUNKED, http_wire.chunks(*([body] if body else []))),
    }[way]
    got = http_wire.forwarded(
        gateway, origin(http_wire.Script()), field, method=b"POST", body=data
    )
    assert (wire.digest(got.body), got.complete) == (wire.digest(body), True)


@pytest.mark.parametrize("way", ["sized", "chunked", "closed"])
def test_bulk_comes_back_whole(
    gateway: running.Gateway, origin: origins.Start, way: str
) -> None:
    pieces = [BULK[i : i + 100_000] for i in range(0, len(BULK), 100_000)]
    answer = {
        "sized": http_wire.sized(BULK),
        "chunked": http_wire.response(CHUNKED, body=http_wire.chunks(*pieces)),
        "closed": http_wire.response(body=BULK),
    }[way]
    answer = http_wire.ask(
        gateway, origin(http_wire.Script(answer, close=way == "closed"))
    )
    assert wire.digest(answer.body) == wire.digest(BULK)


def test_bulk_goes_both_ways_at_once(
    gateway: running.Gateway, origin: origins.Start
) -> None:
    def echo(connection: socket.socket, server: origins.Origin) -> None:
        http_wire.read_head(connection)
        connection.sendall(http_wire.response(b"Content-Length: %d" % len(BULK)))
        left = len(BULK)
        while left and (piece := connection.recv(65536)):
            connection.sendall(piece)
            left -= len(piece)

    server = origin(echo)
    data = http_wire.post(server, b"Content-Length: %d" % len(BULK), body=BULK)
    with gateway.connect() as client:
        sender = threading.Thread(target=wire.send, args=[client, data], daemon=True)
        sender.start()
        assert wire.digest(http_wire.read_answer(client).body) == wire.digest(BULK)
        sender.join(10)


def test_each_piece_travels_when_it_is_sent(
    gateway: running.Gateway, origin: origins.Start
) -> None:
    def echo(connection: socket.socket, server: origins.Origin) -> None:
        http_wire.read_head(connection)
        connection.sendall(http_wire.response(CHUNKED))
        for _ in range(3):
            piece = wire.read_exactly(connection, len(b"5\r\nhello\r\n"))
            connection.sendall(piece)
        connection.sendall(wire.read_exactly(connection, len(b"0\r\n\r\n")))

    with gateway.connect() as client:  # nobody may wait for the end, or for more
        wire.send(client, http_wire.post(origin(echo), CHUNKED))
        head = http_wire.read_head(client)
        assert CHUNKED.lower() in head.lower()
        for _ in range(3):
            wire.send(client, b"5\r\nhello\r\n")
            assert wire.read_exactly(client, 10) == b"5\r\nhello\r\n"
        wire.send(client, b"0\r\n\r\n")
        assert wire.read_exactly(client, 5) == b"0\r\n\r\n"


@pytest.mark.parametrize("count", [1, 2000])
def test_chunks_of_one_octet_come_back_whole(
    gateway: running.Gateway, origin: origins.Start, count: int
) -> None:
    body = http_wire.chunks(*[b"x"] * count)  # R50
    answer = http_wire.ask(
        gateway, origin(http_wire.Script(http_wire.response(CHUNKED, body=body)))
    )
    assert (answer.body, answer.complete) == (b"x" * count, True)


@pytest.mark.parametrize(
    "answer",
    [
        pytest.param(http_wire.sized(b"hello"), id="sized"),
        pytest.param(http_wire.response(body=b"hello"), id="closed"),
        pytest.param(
            http_wire.response(
                CHUNKED, body=http_wire.chunks(b"hel", b"lo", trailers=[b"X-A: 1"])
            ),
            id="chunked",
        ),
        pytest.param(
            http_wire.response(b"Link: x", status=b"103 Hints")
            + http_wire.sized(b"hello"),
            id="interim",
        ),
    ],
)
def test_answers_in_single_octets_come_back_whole(
    gateway: running.Gateway, origin: origins.Start, answer: bytes
) -> None:
    def handle(connection: socket.socket, server: origins.Origin) -> None:
        http_wire.read_head(connection)
        wire.drip(connection, answer)

    with gateway.connect() as client:  # R12, R53
        got = http_wire.exchange(client, http_wire.request(origin(handle)))
        if got.status == 103:
            got = http_wire.read_answer(client)
    assert (got.status, got.body, got.complete) == (200, b"hello", True)
    assert bool(got.trailers) == (b"X-A" in answer)


def test_response_extensions_are_dropped(
    gateway: running.Gateway, origin: origins.Start
) -> None:
    body = b'5;a="b;c"\r\nhello\r\n0;x\r\n\r\n'  # R51: http_wire.py knows none
    answer = http_wire.ask(
        gateway, origin(http_wire.Script(http_wire.response(CHUNKED, body=body)))
    )
    assert (answer.body, answer.complete) == (b"hello", True)


# --- HTTP/1.0 clients ---------------------------------------------------------


@pytest.mark.parametrize("body", [b"", b"hello", BULK], ids=["none", "short", "long"])
def test_an_http_1_0_client_gets_no_chunks(
    gateway: running.Gateway, origin: origins.Start, body: bytes
) -> None:
    coded = http_wire.chunks(*([body] if body else []), trailers=[b"X-A: 1"])  # R46
    server = origin(http_wire.Script(http_wire.response(CHUNKED, body=coded)))
    answer = http_wire.ask(
        gateway, server, b"Connection: keep-alive", version=b"HTTP/1.0"
    )
    assert not answer.values(b"Transfer-Encoding") and answer.closes
    assert (wire.digest(answer.body), answer.complete) == (wire.digest(body), True)


@pytest.mark.parametrize(
    "rest",
    [
        pytest.param(b"", id="no-last-chunk"),
        pytest.param(b"5\r\nhel", id="half-a-chunk"),
        pytest.param(b"zz\r\n", id="bad-chunk"),
    ],
)
def test_an_http_1_0_client_sees_a_missing_end(
    gateway: running.Gateway, origin: origins.Start, rest: bytes
) -> None:
    body = b"5\r\nhello\r\n" + rest  # R54: a plain close would look like the end
    server = origin(
        http_wire.Script(http_wire.response(CHUNKED, body=body), close=True)
    )
    answer = http_wire.ask(gateway, server, version=b"HTTP/1.0")
    assert answer.status == 502 or not answer.complete


# --- What is cut off ----------------------------------------------------------

CUT = {
    "sized": http_wire.response(b"Content-Length: 10", body=b"hello"),
    "sized-by-one": http_wire.response(b"Content-Length: 6", body=b"hello"),
    "sized-at-start": http_wire.response(b"Content-Length: 10"),
    "sized-bulk": http_wire.response(b"Content-Length: 4000000", body=BULK[:3_000_000]),
    "in-a-chunk": http_wire.response(CHUNKED, body=b"a\r\nhello"),
    "after-a-chunk": http_wire.response(CHUNKED, body=b"5\r\nhello\r\n"),
    "in-a-line-end": http_wire.response(CHUNKED, body=b"5\r\nhello\r"),
    "in-the-last-size": http_wire.response(CHUNKED, body=b"5\r\nhello\r\n0"),
    "in-the-last-line": http_wire.response(CHUNKED, body=b"5\r\nhello\r\n0\r\n"),
    "in-a-trailer": http_wire.response(CHUNKED, body=b"5\r\nhello\r\n0\r\nX-A: 1\r\n"),
    "before-chunks": http_wire.response(CHUNKED),
}


@pytest.mark.parametrize("answer", CUT.values(), ids=CUT)
def test_a_cut_response_looks_cut(
    gateway: running.Gateway, origin: origins.Start, answer: bytes
) -> None:
    server = origin(http_wire.Script(answer, close=True))  # R54
    with gateway.connect() as client:
        got = http_wire.exchange(client, http_wire.request(server))
        assert (got.status, got.complete) == (200, False)
        assert wire.read_all(client) == b""
    assert len(server.callers) == 1  # R39


# In a response an extension has no meaning, and so no second one: R86.
IN_EXTENSIONS = {
    "semicolon-alone",
    "semicolon-and-space",
    "two-semicolons",
    "extension-without-name",
    "extension-with-open-quote",
    "control-in-quoted-extension",
    "semicolon-after-last-size",
}
# Of a response's trailers, what is no field is left out, as of its head.
IN_TRAILERS = {
    "cr-in-trailer": [(b"X", b"1 2")],
    "no-colon-in-trailer": [],
    "space-before-trailer-colon": [(b"X", b"1")],
    "space-before-trailer": [],
    "folded-trailer": [(b"X", b"1 2")],
    "empty-trailer-name": [],
    "request-as-trailer": [(b"X", b"1")],
}


@pytest.mark.parametrize("name", IN_TRAILERS)
def test_trailers_of_a_response_are_cleaned(
    gateway: running.Gateway, origin: origins.Start, name: str
) -> None:
    server = origin(
        http_wire.Script(http_wire.response(CHUNKED, body=BAD_CHUNKS[name]))
    )
    answer = http_wire.ask(gateway, server)
    assert (answer.body, answer.complete) == (b"hello", True)
    assert answer.trailers == IN_TRAILERS[name]


@pytest.mark.parametrize(
    "name", sorted(BAD_CHUNKS.keys() - IN_EXTENSIONS - IN_TRAILERS.keys())
)
def test_a_response_with_bad_chunks_looks_cut(
    gateway: running.Gateway, origin: origins.Start, name: str
) -> None:
    body = BAD_CHUNKS[name]
    body = b"3\r\nfor\r\n" + body  # R2, R3, R50
    server = origin(
        http_wire.Script(http_wire.response(CHUNKED, body=body), close=True)
    )
    answer = http_wire.ask(gateway, server)
    assert answer.status == 502 or not answer.complete


@pytest.mark.parametrize("size", [5, 100_000, len(BULK)])
@pytest.mark.parametrize("way", ["sized", "chunked"])
def test_what_came_before_the_cut_is_delivered(
    gateway: running.Gateway, origin: origins.Start, way: str, size: int
) -> None:
    body = BULK[:size]  # R54: a download that can be resumed begins with this
    answer = {
        "sized": http_wire.response(b"Content-Length: %d" % (size + 1), body=body),
        "chunked": http_wire.response(CHUNKED, body=b"%x\r\n%b\r\n" % (size, body)),
    }[way]
    got = http_wire.ask(gateway, origin(http_wire.Script(answer, close=True)))
    assert (got.status, got.complete) == (200, False)
    assert wire.digest(got.body) == wire.digest(body)


@pytest.mark.parametrize("version", [b"HTTP/1.0", b"HTTP/1.1"])
def test_a_reset_before_the_close_looks_cut(
    gateway: running.Gateway, origin: origins.Start, version: bytes
) -> None:
    seen = threading.Event()  # R54

    def handle(connection: socket.socket, server: origins.Origin) -> None:
        http_wire.read_head(connection)
        connection.sendall(http_wire.response(body=b"hello"))
        seen.wait(10)
        wire.reset(connection)

    with gateway.connect() as client:
        wire.send(client, http_wire.request(origin(handle), version=version))
        assert b"close" in http_wire.read_head(client).lower()
        assert wire.read_exactly(client, 5) == b"hello"
        seen.set()
        with pytest.raises(ConnectionResetError):
            client.recv(1)


@pytest.mark.parametrize(
    ("field", "body"), [(b"Content-Length: 10", b"hello"), (CHUNKED, b"5\r\nhello\r\n")]
)
@pytest.mark.parametrize("end", [lambda c: c.shutdown(socket.SHUT_WR), wire.reset])
def test_a_cut_request_looks_cut(
    gateway: running.Gateway,
    origin: origins.Start,
    field: bytes,
    body: bytes,
    end: Callable[[socket.socket], None],
) -> None:
    server = origin(partial := Partial())  # R54
    with gateway.connect() as client:
        wire.send(client, http_wire.post(server, field, body=body))
        assert partial.started.wait(10)
        end(client)
        assert partial.ended.wait(10)
    assert [got.complete for got in partial.requests] == [False]


@pytest.mark.parametrize(
    "answer",
    [
        http_wire.response(b"Content-Length: 10", body=b"hello"),
        http_wire.response(CHUNKED),
    ],
)
def test_a_response_that_stalls_looks_cut(
    hasty: running.Gateway, origin: origins.Start, answer: bytes
) -> None:
    def stall(connection: socket.socket, server: origins.Origin) -> None:
        http_wire.read_head(connection)
        connection.sendall(answer)
        wire.read_all(connection)

    got = http_wire.ask(hasty, origin(stall))  # R54
    assert (got.status, got.complete) == (200, False)


@pytest.mark.parametrize(
    ("field", "body"), [(b"Content-Length: 10", b"hello"), (CHUNKED, b"5\r\nhello\r\n")]
)
def test_a_request_that_stalls_looks_cut(
    hasty: running.Gateway, origin: origins.Start, field: bytes, body: bytes
) -> None:
    server = origin(partial := Partial())  # R54
    with hasty.connect() as client:
        answer = http_wire.exchange(client, http_wire.post(server, field, body=body))
        assert (answer.status in (408, 504), answer.closes) == (True, True)
        assert wire.at_end(client)
    assert partial.ended.wait(10)
    assert [got.complete for got in partial.requests] == [False]


def test_a_client_that_does_not_read_is_let_go(
    hasty: running.Gateway, origin: origins.Start
) -> None:
    left = threading.Event()  # R54: no state without a deadline

    def pour(connection: socket.socket, server: origins.Origin) -> None:
        http_wire.read_head(connection)
        with contextlib.suppress(OSError):
            connection.sendall(http_wire.response(b"Content-Length: %d" % 2**40))
            while True:
                connection.sendall(BULK)
        left.set()

    with hasty.connect() as client:
        wire.send(client, http_wire.request(origin(pour)))
        assert left.wait(10)
        with contextlib.suppress(ConnectionResetError):
            while client.recv(1 << 20):
                pass


def test_a_server_that_does_not_read_is_let_go(
    hasty: running.Gateway, origin: origins.Start
) -> None:
    free = threading.Event()  # R54

    def stall(connection: socket.socket, server: origins.Origin) -> None:
        http_wire.read_head(connection)
        free.wait(20)

    with hasty.connect() as client:
        data = http_wire.post(
            origin(stall), b"Content-Length: %d" % 2**40, body=BULK * 4
        )
        sender = threading.Thread(target=wire.send, args=[client, data], daemon=True)
        sender.start()
        answer = http_wire.read_answer(client)
        assert (answer.status, answer.closes) == (504, True)
        sender.join(10)
        free.set()


def test_a_client_that_leaves_ends_the_download(
    gateway: running.Gateway, origin: origins.Start
) -> None:
    left = threading.Event()  # R61

    def pour(connection: socket.socket, server: origins.Origin) -> None:
        http_wire.read_head(connection)
        with contextlib.suppress(OSError):
            connection.sendall(http_wire.response(b"Content-Length: %d" % 2**40))
            while True:
                connection.sendall(BULK)
        left.set()

    with gateway.connect() as client:
        wire.send(client, http_wire.request(origin(pour)))
        assert wire.read_exactly(client, 1_000_000)
    assert left.wait(10)


# --- Surplus ------------------------------------------------------------------

EVIL = http_wire.sized(b"evil", b"X-Evil: 1")
SURPLUS = {
    "after-length": http_wire.OK + EVIL,
    "after-length-zero": http_wire.sized(b"") + EVIL,
    "after-chunks": http_wire.response(CHUNKED, body=http_wire.chunks(b"ok")) + EVIL,
    "after-204": http_wire.response(status=b"204 None") + EVIL,
    "after-304": http_wire.response(status=b"304 Same") + EVIL,
    "one-octet": http_wire.OK + b"X",
    "line-end": http_wire.OK + b"\r\n",
    "body-of-204": http_wire.response(b"Content-Length: 4", status=b"204 None")
    + b"evil",
}


def clean(answer: http_wire.Message) -> bool:
    return b"evil" not in repr(answer).lower().encode()


@pytest.mark.parametrize("answer", SURPLUS.values(), ids=SURPLUS)
def test_what_follows_a_response_is_no_response(
    gateway: running.Gateway, origin: origins.Start, answer: bytes
) -> None:
    server = origin(http_wire.Script(answer, http_wire.OK))  # R55
    with gateway.connect() as client:
        first = http_wire.exchange(client, http_wire.request(server))
        assert clean(first) and not first.closes
        second = http_wire.exchange(client, http_wire.request(server))
        assert clean(second) and second.body == b"ok"
    assert len(server.callers) == 2


def test_what_follows_a_head_answer_is_no_response(
    gateway: running.Gateway, origin: origins.Start
) -> None:
    server = origin(
        http_wire.Script(EVIL.replace(b"X-Evil: 1\r\n", b""), http_wire.OK)
    )  # R53, R55
    with gateway.connect() as client:
        assert (
            http_wire.exchange(
                client, http_wire.request(server, method=b"HEAD"), b"HEAD"
            ).status
            == 200
        )
        assert http_wire.exchange(client, http_wire.request(server)).body == b"ok"
    assert len(server.callers) == 2


@pytest.mark.parametrize("surplus", [EVIL, b"X", http_wire.OK])
def test_what_comes_between_exchanges_is_no_response(
    gateway: running.Gateway, origin: origins.Start, surplus: bytes
) -> None:
    answered, sent = threading.Event(), threading.Event()  # R55

    def handle(connection: socket.socket, server: origins.Origin) -> None:
        http_wire.read_head(connection)
        connection.sendall(http_wire.OK)
        if len(server.callers) == 1:
            answered.wait(10)
            connection.sendall(surplus)
            sent.set()
        wire.read_all(connection)

    server = origin(handle)
    with gateway.connect() as client:
        assert http_wire.exchange(client, http_wire.request(server)).body == b"ok"
        answered.set()
        assert sent.wait(10)
        answer = http_wire.exchange(client, http_wire.request(server))
        assert clean(answer) and answer.body == b"ok"
    assert len(server.callers) == 2


# --- Bodies that nobody reads -------------------------------------------------


def test_the_body_of_a_denied_request_is_never_a_request(
    gateway: running.Gateway, origin: origins.Start
) -> None:
    server = origin(http_wire.Script())  # R56
    size = 10_000_000
    evil = http_wire.request(server, path=b"/evil")
    body = (evil * (size // len(evil) + 1))[:size]
    data = http_wire.request(
        http_wire.DENIED, b"Content-Length: %d" % size, method=b"POST", body=body
    )
    with gateway.connect() as client:
        sender = threading.Thread(
            target=wire.send, args=[client, data + evil], daemon=True
        )
        sender.start()
        answer = http_wire.read_answer(client)
        assert (answer.status, answer.closes) == (403, True)
        assert wire.read_all(client) == b""
        sender.join(10)
    assert http_wire.uncalled(server)


@pytest.mark.parametrize(
    ("field", "body"),
    [(b"Content-Length: 5", b"hello"), (CHUNKED, b"5\r\nhello\r\n0\r\n\r\n")],
)
def test_a_request_behind_a_denied_body_is_harmless(
    gateway: running.Gateway, origin: origins.Start, field: bytes, body: bytes
) -> None:
    server = origin(
        http_wire.Script()
    )  # R56: kept open only by who has read the whole body
    data = http_wire.request(http_wire.DENIED, field, method=b"POST", body=body)
    with gateway.connect() as client:
        wire.send(client, data + http_wire.request(server, path=b"/next"))
        assert http_wire.read_answer(client).status == 403
        rest = wire.read_all(client)
    if rest:
        assert [got.target for got in server.handle.requests] == [b"/next"]
    else:
        assert http_wire.uncalled(server)


@pytest.mark.parametrize("keeps", [True, False])
def test_an_early_answer_ends_the_upload(
    gateway: running.Gateway, origin: origins.Start, keeps: bool
) -> None:
    def refuse(connection: socket.socket, server: origins.Origin) -> None:
        http_wire.read_head(connection)
        wire.read_exactly(connection, 65_536)
        connection.sendall(
            http_wire.sized(b"no", b"Connection: close", status=b"413 Big")
        )
        if keeps:
            wire.read_all(connection)

    server = origin(refuse)  # R56, R60
    data = http_wire.post(server, b"Content-Length: 50000000", body=BULK * 2)
    with gateway.connect() as client:
        sender = threading.Thread(target=wire.send, args=[client, data], daemon=True)
        sender.start()
        answer = http_wire.read_answer(client)
        assert (answer.status, answer.body, answer.closes) == (413, b"no", True)
        wire.read_all(client)
        sender.join(10)
        assert not sender.is_alive()


@pytest.mark.parametrize("framed", ["length", "chunks"])
def test_an_early_answer_is_whole_for_a_slow_client_though_the_upload_was_reset(
    natwork: running.Start, origin: origins.Start, framed: str
) -> None:
    gateway, body = natwork(), b"n" * 20_000
    whole = http_wire.sized(body, b"Connection: close", status=b"413 Big")
    if framed == "chunks":
        head = b"HTTP/1.1 413 Big\r\nConnection: close\r\n" + CHUNKED
        whole = head + b"\r\n\r\n" + http_wire.chunks(body)

    def refuse(connection: socket.socket, server: origins.Origin) -> None:
        http_wire.read_head(connection)
        wire.read_exactly(connection, 500)
        connection.sendall(whole)  # and closes with much unread, which is a reset

    server = origin(refuse)  # R56
    data = http_wire.post(server, b"Content-Length: 50000000", body=BULK * 2)
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8192)
        client.settimeout(10)
        client.connect(gateway.address)
        sender = threading.Thread(target=wire.send, args=[client, data], daemon=True)
        sender.start()
        wait.until(lambda: server.callers and not sender.is_alive())
        answer = http_wire.read_answer(client)
        assert (answer.status, len(answer.body), answer.closes) == (413, 20_000, True)
    assert gateway.lines(1)[0]["outcome"] == "ok"


@pytest.mark.parametrize(
    ("field", "body"),
    [(b"Content-Length: 5", b"hello"), (CHUNKED, http_wire.chunks(b"hello"))],
)
def test_an_early_answer_need_not_end_the_upload(
    gateway: running.Gateway, origin: origins.Start, field: bytes, body: bytes
) -> None:
    def early(connection: socket.socket, server: origins.Origin) -> None:
        http_wire.read_head(connection)
        connection.sendall(http_wire.OK)
        server.received.append(wire.read_exactly(connection, len(body)))
        http_wire.Script()(connection, server)

    server = origin(early)  # R58: who answers early and keeps the connection reads on
    with gateway.connect() as client:
        answer = http_wire.exchange(
            client, http_wire.post(server, field, body=body[:-3])
        )
        assert answer.status == 200 and not answer.closes
        assert (
            http_wire.exchange(client, body[-3:] + http_wire.request(server)).status
            == 200
        )
    assert server.received == [body] and len(server.callers) == 1
