"""Request and response heads: accepted, refused, judged and rewritten (R1 to R41).

A name such as reject-400-r08-space-before-colon.http says what is expected and
which requirement says so.
"""

from __future__ import annotations

import base64
import contextlib
import json
import re
import select
import socket
import subprocess
import time
from collections.abc import Callable
from collections.abc import Iterator
from email.utils import parsedate_to_datetime
from pathlib import Path

import addresses
import http_wire
import needs
import origins
import pytest
import running
import wait
import wire

pytestmark = pytest.mark.filterwarnings(http_wire.STRICT)
gateway = running.shared()
hasty = running.shared("head_timeout=0.5", "connect_timeout=0.5", "idle_timeout=0.5")

HEADS = Path(__file__).parent / "heads"
SECOND = b"/second"


@pytest.fixture(scope="module")
def witness() -> Iterator[origins.Origin]:
    """An origin for all the data files; each test starts it from nothing."""
    server = origins.Origin(http_wire.Script())
    yield server
    server.close()


def cases(kind: str) -> list[object]:
    paths = sorted(HEADS.glob(f"{kind}-*.http"))
    assert paths
    return [pytest.param(path, id=path.stem) for path in paths]


def filled(path: Path, origin: origins.Origin) -> bytes:
    """Return a data file with the origin's address in it."""
    origin.callers.clear()
    origin.handle.requests.clear()
    data = path.read_bytes().replace(b"{origin}", origin.authority.encode())
    return data.replace(b"{port}", b"%d" % origin.port)


def authority(data: bytes) -> bytes:
    """Return the authority that an absolute-form target names."""
    match = re.search(rb" (?:http|ws)://(?:[^/?# ]*@)?([^/?# ]+)", data, re.IGNORECASE)
    assert match
    return match[1].lower()


# --- Heads as data ------------------------------------------------------------


@pytest.mark.parametrize("feed", [wire.send, wire.drip])
@pytest.mark.parametrize("path", cases("accept"))
def test_a_good_request_is_served(
    gateway: running.Gateway,
    witness: origins.Origin,
    path: Path,
    feed: Callable[..., None],
) -> None:
    data = filled(path, witness)
    with gateway.connect() as client:
        feed(client, data)
        answer = http_wire.read_answer(client)
        assert (answer.status, answer.body) == (200, b"ok")
        assert answer.closes == path.name.startswith("accept-close")
    (got,) = witness.handle.requests
    assert got.method == re.match(rb"\s*(\S+)", data)[1]
    assert got.target == b"*" or got.target.startswith(b"/")  # R19
    assert got.values(b"Host")[0].lower() == authority(data)  # R18
    version = re.search(rb"HTTP/(1\.\d)\r\n", data)[1]
    assert got.via in (version + b" " + running.NAME, b"1.1 " + running.NAME)  # R34
    assert got.body == (b"hello" if b"hello" in data else b"")


@pytest.mark.parametrize("path", cases("accept"))
def test_what_follows_a_good_request_is_the_next_one(
    gateway: running.Gateway, witness: origins.Origin, path: Path
) -> None:
    data = filled(path, witness)
    with gateway.connect() as client:
        wire.send(client, data + http_wire.request(witness, path=SECOND))
        assert http_wire.read_answer(client).status == 200
        if path.name.startswith("accept-close"):
            assert wire.at_end(client)
        else:
            assert http_wire.read_answer(client).status == 200
    targets = [got.target for got in witness.handle.requests]
    assert targets[1:] == ([] if path.name.startswith("accept-close") else [SECOND])


@pytest.mark.parametrize("feed", [wire.send, wire.drip])
@pytest.mark.parametrize("path", cases("reject"))
def test_a_bad_request_is_refused_and_reaches_nobody(
    gateway: running.Gateway,
    witness: origins.Origin,
    path: Path,
    feed: Callable[..., None],
) -> None:
    with gateway.connect() as client:
        feed(client, filled(path, witness))
        answer = http_wire.read_answer(client)
        assert b"%d" % answer.status == path.name.split("-")[1].encode(), answer
        assert answer.closes and wire.at_end(client)
    assert http_wire.uncalled(witness)


@pytest.mark.parametrize("path", cases("reject"))
def test_what_follows_a_bad_request_is_never_a_request(
    gateway: running.Gateway, witness: origins.Origin, path: Path
) -> None:
    with gateway.connect() as client:
        wire.send(
            client, filled(path, witness) + http_wire.request(witness, path=SECOND)
        )
        assert (
            b"%d" % http_wire.read_answer(client).status
            == path.name.split("-")[1].encode()
        )
        assert wire.at_end(client)
    assert http_wire.uncalled(witness)


@pytest.mark.parametrize("feed", [wire.send, wire.drip])
@pytest.mark.parametrize("path", cases("tunnel"))
def test_a_good_connect_is_served(
    gateway: running.Gateway,
    witness: origins.Origin,
    path: Path,
    feed: Callable[..., None],
) -> None:
    with gateway.connect() as client:
        feed(client, filled(path, witness) + http_wire.request(witness, path=SECOND))
        assert http_wire.read_answer(client, b"CONNECT").status == 200
        assert http_wire.read_answer(client).status == 200  # by the tunnel
    (got,) = witness.handle.requests
    assert got.target.endswith(SECOND) and not got.values(b"Via")


def test_a_user_in_a_url_is_not_dialed(
    gateway: running.Gateway, origin: origins.Start
) -> None:
    server, dead = origin(http_wire.Script()), b"127.0.0.1:1"  # R84
    with gateway.connect() as client:
        asked = b"GET http://%b@%b/ HTTP/1.1\r\nHost: a\r\n\r\n"
        asked %= server.authority.encode(), dead
        assert http_wire.exchange(client, asked).status == 502
    assert http_wire.uncalled(server)


@pytest.mark.parametrize(
    ("login", "basic"),
    [
        (b"user:secret", b"user:secret"),
        (b"user", b"user:"),
        (b"us%65r:p%40%3a%00%zz", b"user:p@:\0%zz"),
    ],
)
def test_a_user_in_a_url_becomes_the_authorization_that_was_meant(
    natwork: running.Start, origin: origins.Start, login: bytes, basic: bytes
) -> None:
    gateway, server = natwork(), origin(http_wire.Script())
    bare = http_wire.request(server)  # R84
    asked = bare.replace(b"http://", b"http://" + login + b"@", 1)
    with gateway.connect() as client:
        http_wire.exchange(client, asked)
        own = asked.replace(b"Host:", b"Authorization: Own x\r\nHost:")
        http_wire.exchange(client, own)
        http_wire.exchange(client, bare)
    found = [got.values(b"Authorization") for got in server.handle.requests]
    assert found == [[b"Basic " + base64.b64encode(basic)], [b"Own x"], []]
    assert all(got.target == b"/" for got in server.handle.requests)
    said = gateway.lines(3)
    assert {line["target"] for line in said} == {f"http://{server.authority}/"}


# --- Octets, lines, fields ----------------------------------------------------


def test_octets_above_ascii_pass_unchanged(
    gateway: running.Gateway, origin: origins.Start
) -> None:
    value = bytes(range(0x80, 0x100)) + b'\t!"' + bytes(range(0x23, 0x7F))  # R1
    server = origin(
        http_wire.Script(
            http_wire.sized(b"ok", b"X-Back: " + value, status=b"200 \xe4\xff")
        )
    )
    answer = http_wire.ask(gateway, server, b"X-There: " + value)
    assert server.handle.requests[0].values(b"X-There") == [value]
    assert answer.values(b"X-Back") == [value]
    assert answer.start == b"HTTP/1.1 200 \xe4\xff"


def test_ten_thousand_empty_lines_are_not_waited_out(gateway: running.Gateway) -> None:
    with gateway.connect() as client:  # R4
        wire.send(client, b"\r\n" * 10_000)
        assert http_wire.read_answer(client).status == 400
        assert wire.at_end(client)


def test_an_empty_line_after_a_body_is_ignored(
    gateway: running.Gateway, origin: origins.Start
) -> None:
    server = origin(http_wire.Script())  # R4: as very old browsers sent after a POST
    post = http_wire.request(
        server, b"Content-Length: 2", method=b"POST", body=b"hi\r\n"
    )
    with gateway.connect() as client:
        assert http_wire.exchange(client, post).status == 200
        assert http_wire.exchange(client, http_wire.request(server)).status == 200
    assert [got.body for got in server.handle.requests] == [b"hi", b""]


def test_the_http2_preface_is_refused(gateway: running.Gateway) -> None:
    with gateway.connect() as client:  # R6, R16: two rules, either answer is right
        wire.send(client, b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")
        assert http_wire.read_answer(client).status in (400, 505)
        assert wire.at_end(client)


@pytest.mark.parametrize(
    "start",
    [b"GET / HTTP/1.1 x\r\n", b"HELO\r\n", b"GET http://a/ HTTP/3.0\r\n", b"\x16\x03"],
)
def test_a_bad_first_line_is_refused_at_once(
    hasty: running.Gateway, start: bytes
) -> None:
    with hasty.connect() as client:  # R6: at head_timeout it would be a 408
        wire.send(client, start)
        assert http_wire.read_answer(client).status in (400, 505)


@pytest.mark.parametrize(
    "value",
    [
        pytest.param(b" " * 60_000 + b"x", id="blanks-before"),
        pytest.param(b"x" + b" " * 60_000 + b"x", id="blanks-inside"),
        pytest.param(b"x" + b"\t " * 30_000, id="blanks-after"),
        pytest.param(b" " * 60_000, id="blanks-only"),
    ],
)
@pytest.mark.parametrize("name", [b"X-A", b"Connection", b"Via", b"Accept"])
def test_long_runs_of_blanks_cost_no_time(
    gateway: running.Gateway, origin: origins.Start, name: bytes, value: bytes
) -> None:
    began = time.monotonic()  # R11; a quadratic pattern needs minutes for this
    http_wire.forwarded(gateway, origin(http_wire.Script()), name + b":" + value)
    assert time.monotonic() - began < 3


@pytest.mark.parametrize(
    "field",
    [
        pytest.param(b"X-A" + b" " * 60_000 + b": 1", id="blanks-before-colon"),
        pytest.param(b"Content-Length:" + b" " * 60_000 + b"x", id="length"),
        pytest.param(b"Content-Length: 5" + b" " * 60_000 + b"5", id="two-lengths"),
        pytest.param(b"Transfer-Encoding:" + b" ," * 30_000 + b"x", id="coding"),
        pytest.param(b"Transfer-Encoding: chunked" + b" " * 60_000 + b";", id="param"),
    ],
)
def test_long_runs_of_blanks_are_refused_in_no_time(
    gateway: running.Gateway, origin: origins.Start, field: bytes
) -> None:
    began = time.monotonic()  # R8, R11, R43, R48
    assert http_wire.ask(gateway, origin(http_wire.Script()), field).status == 400
    assert time.monotonic() - began < 3


@pytest.mark.parametrize("end", [b"a: b", b"b"])
def test_long_runs_of_blanks_in_a_status_line_cost_no_time(
    gateway: running.Gateway, origin: origins.Start, end: bytes
) -> None:
    lines = b"HTTP/1.1 200" + b" " * 30_000 + b"\r\n" + b"a:\r\n" * 7_000
    answer = lines + b"Content-Length: 2\r\n" + end + b"\r\n\r\nok"
    began = time.monotonic()
    assert http_wire.ask(gateway, origin(http_wire.Script(answer))).status == 200
    assert time.monotonic() - began < 3


@pytest.mark.parametrize("size", [8_000, 15_000])
def test_a_long_target_is_served(
    gateway: running.Gateway, origin: origins.Start, size: int
) -> None:
    path = b"/" + b"u" * size  # R11
    assert (
        http_wire.forwarded(gateway, origin(http_wire.Script()), path=path).target
        == path
    )


def test_a_request_line_over_16_kib_is_too_long(
    gateway: running.Gateway, origin: origins.Start
) -> None:
    server = origin(http_wire.Script())  # R11
    with gateway.connect() as client:
        wire.send(client, http_wire.request(server, path=b"/" + b"u" * 17_000))
        answer = http_wire.read_answer(client)
        assert (answer.status, answer.closes) == (414, True)
        assert wire.at_end(client)
    assert http_wire.uncalled(server)


def test_a_request_line_without_end_is_not_waited_out(gateway: running.Gateway) -> None:
    with gateway.connect() as client:  # R11
        wire.send(client, b"GET http://a/" + b"u" * 17_000)
        assert http_wire.read_answer(client).status == 414
        assert wire.at_end(client)


def test_a_large_head_is_served(
    gateway: running.Gateway, origin: origins.Start
) -> None:
    fields = [b"X-%d: %b" % (i, b"v" * 1000) for i in range(60)]  # R11
    got = http_wire.forwarded(
        gateway, origin(http_wire.Script()), *fields, b"X-Long: " + b"v" * 2000
    )
    assert [got.values(b"X-%d" % i) for i in range(60)] == [[b"v" * 1000]] * 60


@pytest.mark.parametrize(
    "fields",
    [
        pytest.param([b"X-A: " + b"v" * 70_000], id="one-field"),
        pytest.param([b"X-%d: %b" % (i, b"v" * 1000) for i in range(70)], id="many"),
        pytest.param([b"a:" for _ in range(20_000)], id="very-many"),
    ],
)
def test_a_head_over_64_kib_is_too_large(
    gateway: running.Gateway, origin: origins.Start, fields: list[bytes]
) -> None:
    server = origin(http_wire.Script())  # R11
    with gateway.connect() as client:
        wire.send(client, http_wire.request(server, *fields))
        answer = http_wire.read_answer(client)
        assert (answer.status, answer.closes) == (431, True)
        assert wire.at_end(client)
    assert http_wire.uncalled(server)


def test_a_head_without_end_is_not_waited_out(gateway: running.Gateway) -> None:
    with gateway.connect() as client:  # R11
        wire.send(client, b"GET http://a/ HTTP/1.1\r\nX-A: " + b"v" * 70_000)
        assert http_wire.read_answer(client).status == 431
        assert wire.at_end(client)


def test_nothing_happens_before_the_blank_line(
    gateway: running.Gateway, origin: origins.Start
) -> None:
    server = origin(
        http_wire.Script()
    )  # R12: the last octet is the line feed that ends the head
    data = http_wire.request(server, b"X-A: 1")
    with gateway.connect() as client:
        wire.send(client, data[:-1])
        assert not select.select([server.listener], [], [], 0.3)[0]
        assert not server.callers
        wire.send(client, data[-1:])
        assert http_wire.read_answer(client).status == 200


def test_a_host_that_comes_last_is_waited_for(
    gateway: running.Gateway, origin: origins.Start
) -> None:
    server = origin(http_wire.Script())  # R12
    at = server.authority.encode()
    with gateway.connect() as client:
        wire.send(client, b"GET http://%b/ HTTP/1.1\r\nX-A: 1\r\nHost: " % at)
        assert not select.select([client], [], [], 0.3)[0]
        assert not server.callers
        wire.send(client, at + b"\r\n\r\n")
        assert http_wire.read_answer(client).status == 200


@pytest.mark.parametrize(
    "part", [b"", b"GET http://a/ HT", b"GET http://a/ HTTP/1.1\r\n"]
)
def test_a_head_that_does_not_arrive_is_timed_out(
    hasty: running.Gateway, part: bytes
) -> None:
    with hasty.connect() as client:  # R12
        wire.send(client, part)
        if part:
            answer = http_wire.read_answer(client)
            assert (answer.status, answer.closes) == (408, True)
        assert wire.at_end(client)


def test_a_head_that_drips_for_ever_is_timed_out(hasty: running.Gateway) -> None:
    with hasty.connect() as client:  # R12: the deadline is the head's, not the octet's
        began = time.monotonic()
        wire.send(client, b"GET http://a/ HTTP/1.1\r\nX-A: ")
        while not select.select([client], [], [], 0.2)[0]:
            assert time.monotonic() - began < 5
            wire.send(client, b"x")
        assert http_wire.read_answer(client).status == 408


def test_unknown_fields_pass_in_their_order(
    gateway: running.Gateway, origin: origins.Start
) -> None:
    fields = [b"X-B: 2", b"X-A: 1", b"x-b: 3", b"DNT: 1", b"X-B: 2", b"X-E:", b"X-A: 4"]
    server = origin(http_wire.Script(http_wire.sized(b"ok", *fields)))  # R13
    answer = http_wire.ask(gateway, server, *fields)
    for message in (server.handle.requests[0], answer):
        assert message.values(b"X-A") == [b"1", b"4"]
        assert message.values(b"X-B") == [b"2", b"3", b"2"]
        assert message.values(b"X-E") == [b""]
        assert message.values(b"DNT") == [b"1"]


def test_cookies_stay_on_their_lines(
    gateway: running.Gateway, origin: origins.Start
) -> None:
    dated = b"Set-Cookie: b=2; Expires=Wed, 21 Oct 2026 07:28:00 GMT"  # R13
    server = origin(
        http_wire.Script(
            http_wire.sized(b"", b"Set-Cookie: a=1", dated, b"Set-Cookie: a=1")
        )
    )
    answer = http_wire.ask(gateway, server)
    cookies = [b"Set-Cookie: " + value for value in answer.values(b"Set-Cookie")]
    assert cookies == [b"Set-Cookie: a=1", dated, b"Set-Cookie: a=1"]


@pytest.mark.parametrize("value", [b",close,,", b" , ,CLOSE", b"\t,x, ,close\t,"])
def test_empty_members_are_accepted(
    gateway: running.Gateway, origin: origins.Start, value: bytes
) -> None:
    server = origin(
        http_wire.Script(http_wire.sized(b"ok", b"Connection: " + value, b"X: 1"))
    )  # R14
    with gateway.connect() as client:
        assert http_wire.exchange(client, http_wire.request(server)).status == 200
        assert http_wire.exchange(client, http_wire.request(server)).status == 200
    assert len(server.callers) == 2  # each answer said that it was the last


# --- Response heads -----------------------------------------------------------

# What an origin says is data too, in files whose names tell what becomes of it: the
# server's connection is kept, or closed though the end of the body shows, or the body
# ends with it; or it has no meaning, or two, and is a 502.


def answers(kind: str) -> list[object]:
    return cases(f"answer-{kind}")


def read_status(path: Path) -> int:
    """Return the status that a client is to get of a file."""
    found = re.search(rb" +(\d\d\d)", path.read_bytes())
    assert found
    return 502 if path.name.startswith("answer-502") else int(found[1])


class Saying(http_wire.Script):
    """An origin that says what a file has, whole or byte by byte, or with more."""

    def __init__(self, path: Path, drips: bool, more: bytes = b"") -> None:
        super().__init__(path.read_bytes() + more, close="-end-" in path.name)
        self.drips = drips

    def send(self, connection: socket.socket, answer: bytes) -> None:
        (wire.drip if self.drips else wire.send)(connection, answer)


@pytest.mark.parametrize("drips", [False, True], ids=["whole", "drip"])
@pytest.mark.parametrize("path", answers("keep") + answers("close") + answers("end"))
def test_a_response_is_read_by_its_one_meaning(
    gateway: running.Gateway, origin: origins.Start, path: Path, drips: bool
) -> None:
    server = origin(Saying(path, drips))
    with gateway.connect() as client:  # R86
        for _ in range(2):
            answer = http_wire.exchange(client, http_wire.request(server))
            assert (answer.status, answer.body) == (read_status(path), b"hello")
            assert answer.complete and len(answer.values(b"Content-Length")) <= 1
            assert answer.values(b"X-A") in ([], [b"1"], [b"1 2"])
            if "-end-" in path.name:
                return
    assert len(server.callers) == (1 if "-keep-" in path.name else 2)


@pytest.mark.parametrize("path", answers("keep") + answers("close"))
def test_what_follows_an_answer_is_no_answer(
    gateway: running.Gateway, origin: origins.Start, path: Path
) -> None:
    server = origin(Saying(path, False, b"HTTP/1.1 299 More\r\n\r\n"))
    with gateway.connect() as client:  # R47
        for _ in range(2):
            answer = http_wire.exchange(client, http_wire.request(server))
            assert (answer.status, answer.body) == (read_status(path), b"hello")
    assert len(server.callers) == 2


HUGE = http_wire.response(b"X-A: " + b"v" * 300_000, b"Content-Length: 0")  # R11


@pytest.mark.parametrize("drips", [False, True], ids=["whole", "drip"])
@pytest.mark.parametrize("path", answers("502"))
def test_a_response_with_no_meaning_or_two_becomes_502(
    gateway: running.Gateway, origin: origins.Start, path: Path, drips: bool
) -> None:
    refused_once(gateway, origin(Saying(path, drips)), origin(http_wire.Script()))


def test_a_huge_response_head_becomes_502(
    gateway: running.Gateway, origin: origins.Start
) -> None:
    bad = origin(http_wire.Script(HUGE, close=True))
    refused_once(gateway, bad, origin(http_wire.Script()))


def refused_once(
    gateway: running.Gateway, bad: origins.Origin, good: origins.Origin
) -> None:
    with gateway.connect() as client:  # R70
        refused = http_wire.exchange(client, http_wire.request(bad))
        error = http_wire.proxy_error(refused)
        assert (refused.status, error) == (502, b"http_protocol_error")
        assert http_wire.exchange(client, http_wire.request(good)).status == 200
    assert len(bad.callers) == 1


# What leaves us is read by h11 too, an independent reader, and must mean the same.

ORACLE = """
import json, sys
import h11
kind, seen = sys.argv[1], []
for raw in json.load(sys.stdin):
    if kind == "answers":
        us = h11.Connection(h11.CLIENT)
        us.send(h11.Request(method="GET", target="/", headers=[("Host", "a")]))
        us.send(h11.EndOfMessage())
    else:
        us = h11.Connection(h11.SERVER)
    us.receive_data(bytes.fromhex(raw))
    us.receive_data(b"")
    start, fields, body = "", [], b""
    while type(event := us.next_event()) not in (h11.ConnectionClosed, h11.PAUSED):
        if type(event) is h11.Response:
            start, fields = str(event.status_code), event.headers
        elif type(event) is h11.Request:
            start, fields = event.target.decode("latin-1"), event.headers
        elif type(event) is h11.Data:
            body += event.data
        elif type(event) is h11.EndOfMessage:
            break
    seen.append([start, len(fields), bytes(body).decode()])
print(json.dumps(seen))
"""


def read_by_h11(kind: str, messages: list[bytes]) -> list[list[object]]:
    """Return start, number of fields and body of each message, as h11 reads them."""
    python = "/usr/bin/python3"
    needs.programs(python)
    has_h11 = [python, "-c", "import h11"]
    if subprocess.run(has_h11, capture_output=True).returncode:
        needs.unavailable("not installed: python3-h11")
    done = subprocess.run(
        [python, "-c", ORACLE, kind],
        input=json.dumps([raw.hex() for raw in messages]),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert not done.stderr, done.stderr
    return json.loads(done.stdout)


def field_count(raw: bytes) -> int:
    return raw.partition(b"\r\n\r\n")[0].count(b"\r\n")


def test_an_answer_that_leaves_us_is_read_the_same_way_by_h11(
    gateway: running.Gateway, origin: origins.Start
) -> None:
    said, expected = [], []
    for param in answers("keep") + answers("close") + answers("end"):
        (path,) = param.values
        server = origin(Saying(path, False))
        with gateway.connect() as client:
            wire.send(client, http_wire.request(server, b"Connection: close"))
            said.append(raw := wire.read_all(client))
        expected.append([str(read_status(path)), field_count(raw), "hello"])
    assert read_by_h11("answers", said) == expected


class Tee:
    """A connection, and what was received from it."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection, self.raw = connection, b""

    def recv(self, *arguments: int) -> bytes:
        data = self.connection.recv(*arguments)
        self.raw += data
        return data

    def __getattr__(self, name: str) -> object:
        return getattr(self.connection, name)


class Noting(http_wire.Script):
    """An origin that keeps the raw bytes of each request."""

    def __init__(self) -> None:
        super().__init__()
        self.raw: list[bytes] = []

    def __call__(self, connection: socket.socket, origin: origins.Origin) -> None:
        while (request := http_wire.read_request(tee := Tee(connection))) is not None:
            self.requests.append(request)
            self.raw.append(tee.raw)
            connection.sendall(http_wire.OK)


def test_a_request_that_leaves_us_is_read_the_same_way_by_h11(
    gateway: running.Gateway,
) -> None:
    server = origins.Origin(Noting())
    try:
        for path in sorted(HEADS.glob("accept-r[89][0-9]-*.http")):  # read tolerantly
            data = path.read_bytes().replace(b"{origin}", server.authority.encode())
            with gateway.connect() as client:
                wire.send(client, data.replace(b"{port}", b"%d" % server.port))
                assert http_wire.read_answer(client).status == 200, path
        noted = list(zip(server.handle.requests, server.handle.raw))
        assert len(noted) > 10
        expected = [
            [got.target.decode("latin-1"), field_count(raw), got.body.decode()]
            for got, raw in noted
        ]
        assert read_by_h11("requests", [raw for _, raw in noted]) == expected
    finally:
        server.close()


def test_a_bad_response_ends_the_server_connection(
    gateway: running.Gateway, origin: origins.Start
) -> None:
    ends: list[bytes] = []

    def handle(connection: socket.socket, server: origins.Origin) -> None:
        connection.recv(65536)
        connection.sendall(http_wire.response(b"X-A: 1\0", b"Content-Length: 0"))
        ends.append(wire.read_all(connection))

    assert http_wire.ask(gateway, origin(handle)).status == 502  # R2
    wait.until(lambda: ends == [b""])


@pytest.mark.parametrize(
    "start",
    [
        b"HTTP/1.1 200 OK\nContent-Length: 0\0\n\n",
        b"HTTP/3 200 OK\r\n",
        b"SSH-2.0-OpenSSH_9.6\r\n",
        b"220 mail.example.com ESMTP\r\n",
    ],
)
def test_a_bad_response_is_not_waited_out(
    gateway: running.Gateway, origin: origins.Start, start: bytes
) -> None:
    def handle(connection: socket.socket, server: origins.Origin) -> None:
        connection.recv(65536)
        connection.sendall(start)
        wire.read_all(connection)

    assert http_wire.ask(gateway, origin(handle)).status == 502  # R3, R10, R70


@pytest.mark.parametrize("space", [b" ", b"\t", b" \t ", b" " * 10_000])
def test_space_before_a_response_colon_is_stripped(
    gateway: running.Gateway, origin: origins.Start, space: bytes
) -> None:
    fields = [b"X-A%b: 1" % space, b"Content-Length%b: 2" % space]  # R8
    answer = http_wire.ask(
        gateway, origin(http_wire.Script(http_wire.response(*fields, body=b"ok")))
    )
    assert (answer.values(b"X-A"), answer.body) == ([b"1"], b"ok")


@pytest.mark.parametrize(
    "status", [b"200 ", b"200 All is well", b"299 \x80", b"599 x", b"600 y", b"999 z"]
)
def test_status_and_reason_pass_unchanged(
    gateway: running.Gateway, origin: origins.Start, status: bytes
) -> None:
    answer = http_wire.ask(
        gateway, origin(http_wire.Script(http_wire.sized(b"ok", status=status)))
    )  # R1, R28
    assert (answer.start, answer.body) == (b"HTTP/1.1 " + status, b"ok")


# --- Versions -----------------------------------------------------------------


@pytest.mark.parametrize("version", [b"HTTP/1.0", b"HTTP/1.1", b"HTTP/1.3"])
def test_the_origin_sees_our_version(
    gateway: running.Gateway, origin: origins.Start, version: bytes
) -> None:
    got = http_wire.forwarded(
        gateway, origin(http_wire.Script()), version=version
    )  # R16: see http_wire.py
    assert got.start == b"GET / HTTP/1.1"


@pytest.mark.parametrize("version", [b"HTTP/1.0", b"HTTP/1.1", b"HTTP/1.3"])
def test_the_client_sees_our_version(
    gateway: running.Gateway, origin: origins.Start, version: bytes
) -> None:
    answer = version + b" 200 Fine\r\nContent-Length: 2\r\n\r\nok"  # R16
    answer = http_wire.ask(gateway, origin(http_wire.Script(answer, close=True)))
    assert (answer.start, answer.body) == (b"HTTP/1.1 200 Fine", b"ok")


def test_a_simple_request_of_http_0_9_is_refused(gateway: running.Gateway) -> None:
    with gateway.connect() as client:  # R16: and answered with a head, not bare text
        wire.send(client, b"GET http://127.0.0.1/\r\n")
        assert http_wire.read_answer(client).status == 400


# --- Targets ------------------------------------------------------------------


def test_the_target_decides_and_not_the_host(
    gateway: running.Gateway, origin: origins.Start
) -> None:
    right, wrong = (
        origin(http_wire.Script()),
        origin(http_wire.Script()),
    )  # R18, R28: and no 421
    at = right.authority.encode(), wrong.authority.encode()
    with gateway.connect() as client:
        data = b"GET http://%b/x HTTP/1.1\r\nHost: %b\r\n\r\n" % at
        assert http_wire.exchange(client, data).status == 200
    assert right.handle.requests[0].values(b"Host") == [at[0]]
    assert http_wire.uncalled(wrong)


TARGETS = {
    b"": b"/",  # R19
    b"/": b"/",
    b"?": b"/?",
    b"?q=1": b"/?q=1",
    b"?@example.com/": b"/?@example.com/",  # R25
    b"/a/b": b"/a/b",
    b"/%2e%2e/%2E/%41": b"/%2e%2e/%2E/%41",  # R23: from here on
    b"//a//b//": b"//a//b//",
    b"/a;b=c": b"/a;b=c",
    b"/?a=%00&b=%0D%0a": b"/?a=%00&b=%0D%0a",
    b"/../a/./b/..": b"/../a/./b/..",
    b"/\xe9\xff\x80?\xc3\xa9": b"/\xe9\xff\x80?\xc3\xa9",
    b"/http://a@b:80/": b"/http://a@b:80/",
    b"/a??b?": b"/a??b?",
    b"/%zz%": b"/%zz%",
    b'/a|b{c}^d`"<>\\[]': b'/a|b{c}^d`"<>\\[]',
    b"/*": b"/*",
}


@pytest.mark.parametrize("path", TARGETS)
@pytest.mark.parametrize("method", [b"GET", b"POST", b"DELETE"])
def test_path_and_query_pass_unchanged(
    gateway: running.Gateway, origin: origins.Start, method: bytes, path: bytes
) -> None:
    got = http_wire.forwarded(
        gateway, origin(http_wire.Script()), method=method, path=path
    )
    assert got.target == TARGETS[path]


@pytest.mark.parametrize(
    ("path", "target"), [(b"", b"*"), (b"/", b"/"), (b"?q", b"/?q"), (b"/*", b"/*")]
)
def test_options_without_path_means_the_server(
    gateway: running.Gateway, origin: origins.Start, path: bytes, target: bytes
) -> None:
    got = http_wire.forwarded(
        gateway, origin(http_wire.Script()), method=b"OPTIONS", path=path
    )  # R20
    assert got.target == target


def test_options_for_everything_is_answered_by_the_gateway(
    gateway: running.Gateway, origin: origins.Start
) -> None:
    server = origin(http_wire.Script())  # R21
    host = server.authority.encode()
    with gateway.connect() as client:
        answer = http_wire.exchange(
            client, b"OPTIONS * HTTP/1.1\r\nHost: %b\r\n\r\n" % host
        )
        assert (answer.status, answer.body) == (200, b"")
        assert answer.values(b"Content-Length") == [b"0"]
        assert b"get" in answer.members(b"Allow")
    assert http_wire.uncalled(server)


@pytest.mark.parametrize("method", [b"GET", b"POST", b"HEAD", b"PUT", b"OPTIONS"])
@pytest.mark.parametrize("path", [b"/", b"/x?y", b"//example.com/"])
def test_origin_form_is_never_forwarded_by_its_host(
    gateway: running.Gateway, origin: origins.Start, method: bytes, path: bytes
) -> None:
    server = origin(http_wire.Script())  # R21
    at = server.authority.encode()
    with gateway.connect() as client:
        data = b"%b %b HTTP/1.1\r\nHost: %b\r\n\r\n" % (method, path, at)
        assert http_wire.exchange(client, data, method).status < 500
    assert http_wire.uncalled(server)


@pytest.mark.parametrize("scheme", [b"https", b"ws", b"foo", b"httpx", b"HTTPS"])
def test_other_schemes_are_not_implemented(
    gateway: running.Gateway, origin: origins.Start, scheme: bytes
) -> None:
    server = origin(http_wire.Script())  # R22
    at = server.authority.encode()
    with gateway.connect() as client:
        line = b"GET %b://%b/ HTTP/1.1\r\nHost: %b\r\n\r\n" % (scheme, at, at)
        assert http_wire.exchange(client, line).status == 501
    assert http_wire.uncalled(server)


@needs.ipv6
def test_an_ipv6_literal_is_dialed(
    gateway: running.Gateway, origin: origins.Start
) -> None:
    got = http_wire.forwarded(
        gateway, server := origin(http_wire.Script(), "::1")
    )  # R24
    assert got.values(b"Host") == [b"[::1]:%d" % server.port]


def test_an_empty_port_is_the_default_port(gateway: running.Gateway) -> None:
    with gateway.connect() as client:  # R24: denied, and so understood
        at = b"10.1.2.3:"
        assert (
            http_wire.exchange(
                client, http_wire.request(at, path=b"/empty-port")
            ).status
            == 403
        )
    targets = wait.until(
        lambda: [t for one in gateway.lines() if "empty-port" in (t := one["target"])]
    )
    assert targets[0].replace(":80/", "/") == "http://10.1.2.3/empty-port"


@pytest.mark.parametrize("host", [b"%6cocalhost", b"localhost%00", b"localhost%2f"])
def test_an_encoded_host_is_never_decoded(
    gateway: running.Gateway, origin: origins.Start, host: bytes
) -> None:
    server = origin(http_wire.Script())  # R23, R24: no such name, or no name at all
    with gateway.connect() as client:
        answer = http_wire.exchange(
            client, http_wire.request(host + b":%d" % server.port)
        )
        assert answer.status in (400, 502)
    assert http_wire.uncalled(server)


# --- Loops --------------------------------------------------------------------


@pytest.mark.parametrize("method", [b"GET", b"CONNECT"])
@pytest.mark.parametrize(
    "host",
    ["127.0.0.1", "[::ffff:127.0.0.1]", *addresses.LOCALHOST]
    + [name.title() for name in addresses.LOCALHOST],
)
def test_the_gateway_does_not_call_itself(
    natwork: running.Start, host: str, method: bytes
) -> None:
    gateway = natwork(f"name={running.NAME.decode()}")  # R27
    with gateway.connect() as client:
        at = f"{host}:{gateway.address[1]}".encode()
        answer = http_wire.exchange(client, http_wire.request(at, method=method))
        if method == b"GET":  # answered here: see test_pages.py
            assert (answer.status, answer.values(b"Via")) == (200, [])
        else:
            assert answer.status == 502
            assert http_wire.proxy_error(answer) == b"proxy_loop_detected"
    assert len(gateway.lines(1)) == 1


@needs.ipv6
def test_the_gateway_knows_all_its_addresses(daemon: running.Start) -> None:
    far = {socket.AF_INET: "198.51.100.1", socket.AF_INET6: "2001:db8::1"}
    own = [addresses.here(*one) for one in far.items() if addresses.here(*one)]  # R27
    hosts = ["127.0.0.1", "127.9.8.7", "localhost", "[::1]", "[::ffff:127.0.0.2]"]
    hosts += [f"[{address}]" if ":" in address else address for address in own]
    rules = "allow to " + ", ".join(["127.0.0.0/8", "::1", *own])
    everywhere = daemon(listen="*:0", name=running.NAME.decode(), rules=rules)
    port = everywhere.address[1]
    for host in hosts:
        with socket.create_connection(("127.0.0.1", port), 10) as client:
            at = b"%b:%d" % (host.encode(), port)
            answer = http_wire.exchange(client, http_wire.request(at, path=b"/metrics"))
            assert b"natwork_workers" in answer.body, (host, answer)
            answer = http_wire.exchange(
                client, http_wire.request(at, method=b"CONNECT")
            )
            assert answer.status == 502, (host, answer)
            assert http_wire.proxy_error(answer) == b"proxy_loop_detected"
    for host in (b"0.0.0.0", b"[::]"):
        with socket.create_connection(("127.0.0.1", port), 10) as client:
            answer = http_wire.exchange(
                client, http_wire.request(b"%b:%d" % (host, port))
            )
            assert answer.status in (200, 403, 502), (host, answer)
    everywhere.stop()
    lines = everywhere.lines()
    assert len(lines) == 2 * len(hosts) + 2  # nobody came a second time


@pytest.mark.parametrize(
    "via",
    [
        [b"1.1 " + running.NAME],
        [b"1.0 fred, 1.1 " + running.NAME],
        [b"1.0 fred", b"1.1 " + running.NAME + b" (comment, and more)", b"1.1 other"],
        [b"1.1 GATE.test"],
        [b"HTTP/1.1 \t" + running.NAME],
        [b",, 1.1 " + running.NAME + b" ,"],
    ],
)
def test_a_request_that_was_here_before_is_a_loop(
    gateway: running.Gateway, origin: origins.Start, via: list[bytes]
) -> None:
    server = origin(http_wire.Script())  # R27
    answer = http_wire.ask(gateway, server, *(b"Via: " + value for value in via))
    assert (answer.status, http_wire.proxy_error(answer)) == (
        502,
        b"proxy_loop_detected",
    )
    assert http_wire.uncalled(server)


@pytest.mark.parametrize(
    "via",
    [
        b"1.1 x" + running.NAME,
        b"1.1 " + running.NAME + b"x",
        b"1.1 a (1.1 " + running.NAME + b")",
    ],
)
def test_a_similar_via_is_no_loop(
    gateway: running.Gateway, origin: origins.Start, via: bytes
) -> None:
    got = http_wire.forwarded(
        gateway, origin(http_wire.Script()), b"Via: " + via
    )  # R27, R34
    assert b", ".join(got.values(b"Via")) == via + b", 1.1 " + running.NAME


# --- Hop by hop ---------------------------------------------------------------

HOP_BY_HOP = [
    b"Proxy-Connection: keep-alive",
    b"Keep-Alive: timeout=5",
    b"TE: trailers",  # R57
    b"Upgrade: h2c",  # the last: see below
]


def connection_members(message: http_wire.Message) -> set[bytes]:
    return set(message.members(b"Connection")) - {b"close", b"keep-alive"}


@pytest.mark.parametrize(
    "lines",
    [
        [b"x-a", b"X-B", b"x-c"],
        [b"x-A, X-b", b"", b",X-C,,"],
        [b"connection, x-a, connection", b"connection,x-b\t,x-c"],
        [b"close", b"X-A,x-b,X-C"],
    ],
)
def test_what_connection_names_is_removed(
    gateway: running.Gateway, origin: origins.Start, lines: list[bytes]
) -> None:
    fields = [b"Connection: " + value for value in lines]  # R29
    fields += [b"X-A: 1", b"X-B: 2", b"X-D: 4", b"x-c: 3", b"X-A: 5"]
    server = origin(http_wire.Script(http_wire.sized(b"ok", *fields)))
    answer = http_wire.ask(gateway, server, *fields)
    for message in (server.handle.requests[0], answer):
        assert not connection_members(message)
        assert [message.values(b"X-" + letter) for letter in (b"A", b"B", b"C")] == [
            []
        ] * 3
        assert message.values(b"X-D") == [b"4"]


def test_connection_is_read_before_anything_is_sent(
    gateway: running.Gateway, origin: origins.Start
) -> None:
    got = http_wire.forwarded(
        gateway, origin(http_wire.Script()), b"X-A: 1", b"Connection: x-a"
    )  # R29
    assert not got.values(b"X-A")


def test_trailers_that_connection_names_are_removed(
    gateway: running.Gateway, origin: origins.Start
) -> None:
    fields = b"Connection: x-a", b"Transfer-Encoding: chunked"  # R29, R52
    body = http_wire.chunks(b"hello", trailers=[b"X-A: 1", b"X-B: 2"])
    server = origin(http_wire.Script(http_wire.response(*fields, body=body)))
    answer = http_wire.ask(gateway, server, *fields, method=b"POST", body=body)
    for message in (server.handle.requests[0], answer):
        names = [name.lower() for name, _ in message.fields + message.trailers]
        assert message.body == b"hello" and b"x-a" not in names


@pytest.mark.parametrize(
    "fields",
    # An upgrade that Connection names is asked for properly, and forwarded: R65.
    [[line] for line in HOP_BY_HOP]
    + [[line, b"Connection: " + line.partition(b":")[0]] for line in HOP_BY_HOP[:-1]],
)
def test_hop_by_hop_fields_stay_on_their_hop(
    gateway: running.Gateway, origin: origins.Start, fields: list[bytes]
) -> None:
    name = fields[0].partition(b":")[0]  # R30
    server = origin(http_wire.Script(http_wire.sized(b"ok", *fields)))
    answer = http_wire.ask(gateway, server, *fields)
    for message in (server.handle.requests[0], answer):
        assert not message.values(name) and not connection_members(message)


def test_a_server_is_told_that_nobody_will_ask_again(
    gateway: running.Gateway, origin: origins.Start
) -> None:
    server, leave = origin(http_wire.Script(http_wire.OK)), b"Connection: close"  # R58
    assert not http_wire.forwarded(gateway, server).closes
    assert http_wire.forwarded(gateway, server, leave).closes
    assert http_wire.forwarded(gateway, server, version=b"HTTP/1.0").closes
    # A server with a body to read may answer first, and then does not leave.
    body = {"method": b"POST", "body": b"ok"}
    assert not http_wire.forwarded(
        gateway, server, leave, b"Content-Length: 2", **body
    ).closes


KEPT = [
    b"Cache-Control: no-store",
    b"Authorization: Basic YTpi",
    b"Via: 1.0 fred",
    b"X-Forwarded-For: 192.0.2.1",
    b"Cookie: a=1",
]


@pytest.mark.parametrize("line", KEPT)
def test_connection_cannot_strip_what_others_rely_on(
    gateway: running.Gateway, origin: origins.Start, line: bytes
) -> None:
    name, _, value = line.partition(b": ")  # R31
    server = origin(
        http_wire.Script(http_wire.sized(b"ok", b"Connection: " + name, line))
    )
    answer = http_wire.ask(gateway, server, b"Connection: close, " + name, line)
    assert value in b", ".join(server.handle.requests[0].values(name))
    assert value in b", ".join(answer.values(name))


@pytest.mark.parametrize(
    ("fields", "body"),
    [
        ([b"Connection: Content-Length, host", b"Content-Length: 5"], b"hello"),
        (
            [b"Connection: Transfer-Encoding", b"Transfer-Encoding: chunked"],
            http_wire.chunks(b"hello"),
        ),
    ],
)
def test_connection_cannot_alter_the_framing(
    gateway: running.Gateway, origin: origins.Start, fields: list[bytes], body: bytes
) -> None:
    server = origin(http_wire.Script(http_wire.response(*fields, body=body)))  # R31
    with gateway.connect() as client:
        post = http_wire.request(server, *fields, method=b"POST", body=body)
        answers = [http_wire.exchange(client, post), http_wire.exchange(client, post)]
    assert [answer.body for answer in answers] == [b"hello"] * 2
    assert [got.body for got in server.handle.requests] == [b"hello"] * 2


# --- Max-Forwards, TRACE ------------------------------------------------------


@pytest.mark.parametrize("method", [b"OPTIONS", b"TRACE"])
@pytest.mark.parametrize(
    ("value", "left"), [(b"1", 0), (b"007", 6), (b"70", 69), (b"0000000010", 9)]
)
def test_max_forwards_counts_down(
    gateway: running.Gateway,
    origin: origins.Start,
    method: bytes,
    value: bytes,
    left: int,
) -> None:
    field = b"Max-Forwards: " + value  # R32
    got = http_wire.forwarded(gateway, origin(http_wire.Script()), field, method=method)
    assert [int(value) for value in got.values(b"Max-Forwards")] == [left]


def test_a_huge_max_forwards_does_not_overflow(
    gateway: running.Gateway, origin: origins.Start
) -> None:
    field = b"Max-Forwards: %d" % 2**64  # R32: any smaller number will do
    got = http_wire.forwarded(
        gateway, origin(http_wire.Script()), field, method=b"OPTIONS"
    )
    assert 0 < int(got.values(b"Max-Forwards")[0]) < 2**64


@pytest.mark.parametrize("method", [b"OPTIONS", b"TRACE"])
def test_max_forwards_is_not_added(
    gateway: running.Gateway, origin: origins.Start, method: bytes
) -> None:
    got = http_wire.forwarded(gateway, origin(http_wire.Script()), method=method)  # R32
    assert not got.values(b"Max-Forwards")


@pytest.mark.parametrize("method", [b"GET", b"POST", b"PUT", b"BREW"])
def test_other_methods_do_not_count(
    gateway: running.Gateway, origin: origins.Start, method: bytes
) -> None:
    got = http_wire.forwarded(
        gateway, origin(http_wire.Script()), b"Max-Forwards: 0", method=method
    )  # R32
    assert got.values(b"Max-Forwards") == [b"0"]


@pytest.mark.parametrize("value", [b"0", b"000"])
def test_the_last_hop_answers_options(
    gateway: running.Gateway, origin: origins.Start, value: bytes
) -> None:
    server = origin(http_wire.Script())  # R32
    field = b"Max-Forwards: " + value
    answer = http_wire.ask(gateway, server, field, method=b"OPTIONS")
    assert answer.status == 200 and b"get" in answer.members(b"Allow")
    assert http_wire.uncalled(server)


def test_the_last_hop_does_not_echo_a_trace(
    gateway: running.Gateway, origin: origins.Start
) -> None:
    server = origin(http_wire.Script())  # R32, R33
    hops = b"Max-Forwards: 0", b"COOKIE: c2VjcmV0"
    data = http_wire.request(server, *hops, method=b"TRACE", path=b"/t")
    with gateway.connect() as client:
        answer = http_wire.exchange(client, data)
    assert answer.status == 501 and b"c2VjcmV0" not in answer.body
    assert http_wire.uncalled(server)


# --- Identity -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("version", "earlier", "expected"),
    [
        (b"HTTP/1.1", [], b"1.1 " + running.NAME),
        (b"HTTP/1.0", [], b"1.0 " + running.NAME),
        (
            b"HTTP/1.1",
            [b"1.0 fred, 1.1 p (x)"],
            b"1.0 fred, 1.1 p (x), 1.1 " + running.NAME,
        ),
        (b"HTTP/1.0", [b"1.1 a", b"1.1 b"], b"1.1 a, 1.1 b, 1.0 " + running.NAME),
    ],
)
def test_via_is_appended_both_ways(
    gateway: running.Gateway,
    origin: origins.Start,
    version: bytes,
    earlier: list[bytes],
    expected: bytes,
) -> None:
    fields = [b"Via: " + value for value in earlier]  # R34
    answer = http_wire.sized(b"ok", *fields).replace(b"HTTP/1.1", version, 1)
    server = origin(http_wire.Script(answer, close=True))
    back = http_wire.ask(gateway, server, *fields, version=version)
    for message in (server.handle.requests[0], back):
        assert b", ".join(message.values(b"Via")) == expected


def test_the_inner_names_do_not_leak(
    gateway: running.Gateway, origin: origins.Start
) -> None:
    server = origin(
        http_wire.Script()
    )  # R34, R40: no Forwarded of our own, in any form
    with gateway.connect() as client:
        inner = client.getsockname()
        http_wire.exchange(client, http_wire.request(server))
    everything = repr(server.handle.requests[0])
    assert str(inner[1]) not in everything
    for name in (b"Forwarded", b"X-Forwarded-For", b"X-Real-IP", b"Client-IP"):
        assert not server.handle.requests[0].values(name)


@pytest.mark.parametrize(
    "line",
    [
        b"Cache-Control: no-transform, max-age=0, private=\"set-cookie\", x=y",  # R35
        b"Pragma: no-cache",
        b"Age: 7",
        b"Expires: 0",
        b"ETag: W/\"x\"",
        b"Warning: 214 - \"Transformation Applied\"",
        b"Content-Encoding: gzip",
        b"Accept-Encoding: br;q=1.0, gzip;q=0.8, *;q=0.1",
        b"Accept-Ranges: bytes",
        b"Content-Type: text/html; charset=\"iso-8859-1\"",
        b"Allow: GET,, HEAD , brew",  # R36
        b"WWW-Authenticate: Basic realm=\"a, b\", Digest realm=\"c\", nonce=\"d\"",
        b"Authorization: Negotiate abc==",
        b"Forwarded: for=192.0.2.1;by=_x",  # R40
        b"Proxy-Status: origin.test; error=dns_error",  # R41
        b"Server: x/1 (y)",
        b"User-Agent: curl/8 (z) \"q\"",
        b"Referer: http://a/b?c#d",
        b"Date: yesterday",  # R38: not ours to judge
        b"Trailer: x-checksum",
        b"Strict-Transport-Security: max-age=1",
        b"Alt-Svc: h3=\":443\"",
    ],
)  # fmt: skip
def test_end_to_end_fields_pass_unchanged(
    gateway: running.Gateway, origin: origins.Start, line: bytes
) -> None:
    name, _, value = line.partition(b": ")
    server = origin(http_wire.Script(http_wire.sized(b"\x1f\x8b\0x", line)))
    answer = http_wire.ask(gateway, server, line)
    assert server.handle.requests[0].values(name) == [value]
    assert answer.values(name)[0] == value and answer.body == b"\x1f\x8b\0x"


@pytest.mark.parametrize("status", [b"401 Who", b"405 No", b"407 Who", b"421 Not here"])
def test_an_origin_says_what_it_likes(
    gateway: running.Gateway, origin: origins.Start, status: bytes
) -> None:
    answer = http_wire.ask(
        gateway, origin(http_wire.Script(http_wire.sized(b"no", status=status)))
    )  # R28, R36
    assert answer.start == b"HTTP/1.1 " + status


def test_proxy_credentials_end_here(
    gateway: running.Gateway, origin: origins.Start
) -> None:
    secret = b"Proxy-Authorization: Basic c2VjcmV0"  # R37
    got = http_wire.forwarded(
        gateway, origin(http_wire.Script()), secret, b"PROXY-AUTHORIZATION: x"
    )
    assert (
        not got.values(b"Proxy-Authorization") and b"c2VjcmV0" not in repr(got).encode()
    )
    for where in (http_wire.DENIED, http_wire.CLOSED):
        with gateway.connect() as client:
            answer = http_wire.exchange(client, http_wire.request(where, secret))
            assert b"c2VjcmV0" not in repr(answer).encode()


def is_now(date: bytes) -> bool:
    """Say whether this is an IMF-fixdate of the last minute."""
    form = rb"[A-Z][a-z]{2}, \d\d [A-Z][a-z]{2} \d{4} \d\d:\d\d:\d\d GMT"
    then = parsedate_to_datetime(date.decode()).timestamp()
    return bool(re.fullmatch(form, date)) and abs(time.time() - then) < 60


def test_a_missing_date_is_added(
    gateway: running.Gateway, origin: origins.Start
) -> None:
    (date,) = http_wire.ask(gateway, origin(http_wire.Script())).values(b"Date")  # R38
    assert is_now(date)


def test_a_date_is_not_replaced(
    gateway: running.Gateway, origin: origins.Start
) -> None:
    then = b"Sun, 06 Nov 1994 08:49:37 GMT"  # R38
    server = origin(http_wire.Script(http_wire.sized(b"ok", b"date: " + then)))
    assert http_wire.ask(gateway, server).values(b"Date") == [then]
    twice = http_wire.sized(b"ok", b"date: " + then, b"Date: " + then.upper())
    other = origin(http_wire.Script(twice))  # one field line has one date
    assert http_wire.ask(gateway, other).values(b"Date") == [then]


@pytest.mark.parametrize("where", [http_wire.DENIED, http_wire.CLOSED])
def test_our_own_answers_are_dated(gateway: running.Gateway, where: bytes) -> None:
    with gateway.connect() as client:  # R38
        (date,) = http_wire.exchange(client, http_wire.request(where)).values(b"Date")
        assert is_now(date)


# --- Refusals and failures ----------------------------------------------------


def test_a_denied_target_is_explained(
    gateway: running.Gateway, origin: origins.Start
) -> None:
    server = origin(http_wire.Script())  # R41
    with gateway.connect() as client:
        answer = http_wire.exchange(client, http_wire.request(http_wire.DENIED))
        assert (answer.status, http_wire.proxy_error(answer)) == (
            403,
            b"http_request_denied",
        )
        assert answer.values(b"Content-Type")[0].startswith(b"text/plain")
        assert answer.body.strip() and not answer.closes
        assert http_wire.exchange(client, http_wire.request(server)).status == 200


def test_the_rule_that_denies_is_named(
    natwork: running.Start, origin: origins.Start
) -> None:
    server = origin(http_wire.Script())  # R41
    rule = f"deny port {server.port}"
    gateway = natwork(f"rules={rule}; {running.LOOPBACK}", loopback=False)
    answer = http_wire.ask(gateway, server)
    assert answer.status == 403
    assert rule.encode() in answer.body
    assert rule.encode() in answer.values(b"Proxy-Status")[0]
    assert http_wire.uncalled(server)


def test_a_refused_connection_is_502(
    gateway: running.Gateway, origin: origins.Start
) -> None:
    server = origin(http_wire.Script())  # R41, R70
    with gateway.connect() as client:
        answer = http_wire.exchange(client, http_wire.request(http_wire.CLOSED))
        assert (answer.status, http_wire.proxy_error(answer)) == (
            502,
            b"connection_refused",
        )
        assert http_wire.exchange(client, http_wire.request(server)).status == 200


def test_a_name_that_does_not_exist_is_502(
    gateway: running.Gateway, origin: origins.Start
) -> None:
    server = origin(http_wire.Script())  # R41, R70: without a resolver it is a time-out
    with gateway.connect() as client:
        client.settimeout(20)
        answer = http_wire.exchange(client, http_wire.request(b"no-such-name.invalid"))
        failure = answer.status, http_wire.proxy_error(answer)
        assert failure in ((502, b"dns_error"), (504, b"dns_timeout"))
        assert http_wire.exchange(client, http_wire.request(server)).status == 200


def test_a_server_that_never_accepts_is_504(
    hasty: running.Gateway, origin: origins.Start
) -> None:
    server = origin(http_wire.Script())  # R41, R70
    with wire.full_listener("127.0.0.1") as port, hasty.connect() as client:
        answer = http_wire.exchange(client, http_wire.request(b"127.0.0.1:%d" % port))
        assert (answer.status, http_wire.proxy_error(answer)) == (
            504,
            b"connection_timeout",
        )
        assert http_wire.exchange(client, http_wire.request(server)).status == 200


def test_a_server_that_never_answers_is_504(
    hasty: running.Gateway, origin: origins.Start
) -> None:
    def mute(connection: socket.socket, server: origins.Origin) -> None:
        wire.read_all(connection)

    server = origin(http_wire.Script())  # R41, R70
    with hasty.connect() as client:
        answer = http_wire.exchange(client, http_wire.request(origin(mute)))
        assert (answer.status, http_wire.proxy_error(answer)) == (
            504,
            b"http_response_timeout",
        )
        assert http_wire.exchange(client, http_wire.request(server)).status == 200


@pytest.mark.parametrize(
    "part", [b"", b"HTTP/1.1 2", http_wire.OK[:30], http_wire.OK[:-4]]
)
def test_a_server_that_leaves_before_its_answer_is_502(
    gateway: running.Gateway, origin: origins.Start, part: bytes
) -> None:
    server = origin(http_wire.Script(part, close=True))  # R41, R70
    with gateway.connect() as client:
        answer = http_wire.exchange(client, http_wire.request(server))
        assert answer.status == 502
        assert http_wire.proxy_error(answer) in (
            b"connection_terminated",
            b"http_response_incomplete",
        )
        assert (
            http_wire.exchange(
                client, http_wire.request(origin(http_wire.Script()))
            ).status
            == 200
        )
    assert len(server.callers) == 1


def test_head_requests_get_errors_without_a_body(
    gateway: running.Gateway, origin: origins.Start
) -> None:
    server = origin(
        http_wire.Script()
    )  # R53: the next answer starts right after the head
    with gateway.connect() as client:
        for where in (http_wire.DENIED, http_wire.CLOSED):
            answer = http_wire.exchange(
                client, http_wire.request(where, method=b"HEAD"), b"HEAD"
            )
            assert answer.status in (403, 502)
        assert http_wire.exchange(client, http_wire.request(server)).body == b"ok"


def test_an_exchange_is_one_log_line(
    gateway: running.Gateway, origin: origins.Start
) -> None:
    server = origin(http_wire.Script(http_wire.sized(b"hello")))
    path = b"/logged?secret"
    with gateway.connect() as client:
        for _ in range(2):
            http_wire.exchange(client, http_wire.request(server, path=path))

    def mine() -> list[dict[str, str]]:
        return [one for one in gateway.lines() if "/logged" in one["target"]]

    wait.until(lambda: len(mine()) == 2)
    for line in mine():
        assert line["target"] == server.url + "/logged"
        assert [line["proto"], line["method"], line["status"]] == ["http", "GET", "200"]
        assert [line["outcome"], line["address"]] == ["ok", server.authority]


@pytest.mark.parametrize("cut", [1, 2, 20])
def test_it_is_no_matter_where_a_head_is_cut(
    gateway: running.Gateway, cut: int
) -> None:
    head = http_wire.request(http_wire.DENIED)
    line = b"GET http://%b/" % http_wire.DENIED  # R11, R81
    longest = line + b"a" * (16384 - len(line) - 9) + b" HTTP/1.1"
    for data, status in (
        (b"-" + head, 400),
        (longest + head[head.index(b"\r\n") :], 403),
        (longest.replace(b"aaa", b"aaaa", 1) + head[head.index(b"\r\n") :], 414),
    ):
        end = data.index(b"\r\n") + 1
        for at in (len(data), cut, end):
            with gateway.connect() as client:
                client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                client.sendall(data[:at])
                time.sleep(0.02)
                with contextlib.suppress(ConnectionError):  # it is refused already
                    client.sendall(data[at:])
                assert http_wire.read_answer(client).status == status, (at, data[:40])


@pytest.mark.parametrize("fault", ["field", "hosts", "late"])
def test_head_has_no_page_even_if_it_is_malformed(
    hasty: running.Gateway, fault: str
) -> None:
    head = http_wire.request(http_wire.DENIED, method=b"HEAD")
    fields = {"field": b"a b: c\r\n", "hosts": b"Host: b\r\n", "late": b""}[fault]
    with hasty.connect() as client:
        client.sendall(head[:-2] + fields + (b"" if fault == "late" else b"\r\n"))
        answered = wire.read_all(client)  # RFC 9110 section 9.3.2
    assert answered.startswith(b"HTTP/1.1 40") and answered.endswith(b"\r\n\r\n")
