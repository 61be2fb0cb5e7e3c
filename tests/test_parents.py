"""Parents: through which other proxy a target is reached, and what they answer."""

from __future__ import annotations

import base64
import contextlib
import os
import re
import shutil
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import http_wire
import needs
import origins
import pytest
import running
import socks_wire
import wait
import web
import wire

import natwork
from natwork import Chapters
from natwork import Config
from natwork import ConfigError
from natwork import Refused
from natwork import Scoreboard
from natwork import pack
from natwork_parents import Parents
from natwork_parents import join
from natwork_parents import parse_parent
from natwork_users import user_line

NAMED = f"name={running.NAME.decode()}"
PASSWORD = "kQ7-pass%3Aword"  # in a URL; there is a colon in it
LOGIN = f"alice:{PASSWORD}@"
BASIC = base64.b64encode(b"alice:kQ7-pass:word")
NOWHERE = b"no-such-name.invalid"  # RFC 6761: never resolves
NAMED_RULES = "rules=allow to 127.0.0.0/8; allow to .invalid"


def parents(*lines: str) -> str:
    return "parents=" + ";".join(lines)


def one_each(opening: str, asked: list[origins.Origin]) -> str:
    """Return the setting by which parent N takes the target 127.0.1.N."""
    return parents(
        *(f"{opening}{p.authority} to 127.0.1.{n}" for n, p in enumerate(asked))
    )


def connected(
    gateway: running.Gateway, where: origins.Origin | bytes
) -> tuple[http_wire.Message, socket.socket]:
    """Return the answer to a CONNECT, and the client's socket."""
    client = gateway.connect(30)
    client.sendall(http_wire.request(where, method=b"CONNECT"))
    return http_wire.read_answer(client, b"CONNECT"), client


class Liar:
    """A SOCKS5 parent that takes everybody, and then says what it is told."""

    def __init__(self, reply: bytes) -> None:
        self.reply = reply

    def __call__(self, connection: socket.socket, origin: origins.Origin) -> None:
        wire.read_exactly(connection, wire.read_exactly(connection, 2)[1])
        connection.sendall(b"\5\0")
        socks_wire.read_five(connection)
        connection.sendall(self.reply)
        connection.recv(1)


class Socks:
    """A SOCKS5 parent of a few lines: what it was told, and what it replies."""

    def __init__(self, reply: int = 0, user: bytes = b"", method: int | None = None):
        self.reply, self.user = reply, user
        self.method = method if method is not None else 2 if user else 0
        self.heard: list[bytes] = []

    def __call__(self, connection: socket.socket, origin: origins.Origin) -> None:
        methods = wire.read_exactly(connection, 2)
        self.heard.append(methods + wire.read_exactly(connection, methods[1]))
        wire.drip(connection, bytes([5, self.method]))
        if self.method == 255:
            return
        if self.method == 2:
            name = wire.read_exactly(connection, 2)
            name += wire.read_exactly(connection, name[1] + 1)
            self.heard.append(name + wire.read_exactly(connection, name[-1]))
            good = self.heard[-1] == self.user
            wire.drip(connection, bytes([1, not good]))
            if not good:
                return
        start = wire.read_exactly(connection, 5)
        rest = {1: 3, 3: start[4], 4: 15}[start[3]]
        self.heard.append(start + wire.read_exactly(connection, rest + 2))
        address = b"\3\7a.local" if self.reply == 0 else b"\1\0\0\0\0"
        wire.drip(connection, bytes([5, self.reply, 0]) + address + b"\0\0" + b"hello")
        origins.echo(connection, origin)


# --- The lines ----------------------------------------------------------------

BAD = [
    "parents = http://127.0.0.1",
    "parents = 127.0.0.1:3128",
    "parents = https://127.0.0.1:3128",
    "parents = socks4://127.0.0.1:1080",
    "parents = http://127.0.0.1:0",
    "parents = http://127.0.0.1:65536",
    "parents = http://::1:3128",
    "parents = http://[127.0.0.1]:3128",
    "parents = http://alice@127.0.0.1:3128",
    "parents = http://127.0.0.1:3128/path",
    "parents = http://127.0.0.1:3128 to",
    "parents = http://127.0.0.1:3128 to ,",
    "parents = http://127.0.0.1:3128 to 10.0.0.0/33",
    "parents = http://127.0.0.1:3128 via .example",
    "parents = http://127.0.0.1:3128 port 80",
    "parents = http://127.0.0.1:3128 scheme https",
    "parents = http://127.0.0.1:3128 scheme http scheme http",
    "parents = http://127.0.0.1:3128; socks5://x",
]


def joined(lines: str) -> Parents:
    """Return what the chapter makes of `parents`."""
    config = Config(parents=lines)
    chapters = Chapters(config, Scoreboard())
    join(chapters)
    if config.errors:
        raise ConfigError("\n".join(config.errors))
    assert isinstance(chapters.parents, Parents)
    return chapters.parents


@pytest.mark.parametrize("line", BAD)
def test_a_bad_line_is_an_error_that_quotes_it(line: str) -> None:
    value = line.removeprefix("parents = ")
    with pytest.raises(ConfigError) as caught:
        joined(value)
    assert "parents = " in str(caught.value) and value[:9] in str(caught.value)


def test_a_password_is_not_quoted_though_the_url_ends_too_early() -> None:
    for value in ("http://pu:SEKRIT", "socks5://pu:SEKRIT@", "http://pu:SEKRIT@a"):
        with pytest.raises(ConfigError) as caught:
            joined(value)
        assert "SEKRIT" not in str(caught.value) and "pu:***" in str(caught.value)


def test_each_bad_line_is_said_in_words(tmp_path: Path) -> None:
    bad = "http://127.0.0.1:99999; http://1.2.3:3128; http://127.0.0.1:1 port 80"
    done = running.command("-t", "-o", f"parents={bad}", cwd=tmp_path)
    said = done.stderr.splitlines()
    assert done.returncode == 78 and len(said) == 3
    assert said[0].endswith(": port not from 1 to 65535")
    assert said[1].endswith(": '1.2.3' is not an address")


@pytest.mark.parametrize(
    "text",
    [
        "http://alice:kQ7@127.0.0.1",
        "http:/alice:kQ7@127.0.0.1:1",
        "http://alice:x@kQ7@127.0.0.1:1",
        "http://alice:x kQ7@127.0.0.1:1",
        "http://alice:x;kQ7@127.0.0.1:1",
        "http://alice:x\n kQ7@127.0.0.1:1",
        "http://alice:kQ7/@127.0.0.1:1",
        "alice:kQ7@127.0.0.1:1",
        f"http://alice:kQ7{'x' * 300}@127.0.0.1:1",
    ],
)
def test_an_error_does_not_quote_the_password(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], text: str
) -> None:
    file = tmp_path / "natwork.conf"

    def refused(*options: str) -> str:
        """Return why a configuration is no good; in this process, for speed."""
        words = ["-t", "-c", str(file), *options]
        assert natwork.guard(lambda: natwork.command(words)) == 78
        return capfd.readouterr().err

    for name in ("parents", "parent", "gateways", "listen", "outside"):
        file.write_text(f"[natwork]\n{name} = {text}\n")
        why = refused()
        assert re.fullmatch(r"(natwork: .*\n)+", why) and "kQ7" not in why
    file.write_text("[natwork]\n")
    assert "kQ7" not in refused("-o", f"parents {text}")


def test_an_error_says_what_a_url_is(tmp_path: Path) -> None:
    done = running.command("-t", "-o", parents("http://h"), cwd=tmp_path)
    assert done.returncode == 78 and "a host, a colon and a port" in done.stderr


def test_passwords_are_masked_where_settings_are_printed(tmp_path: Path) -> None:
    given = (
        f"http://{LOGIN}10.0.0.9:3128 to .a.example, 10.0.0.0/8 scheme http",
        f"socks5://{LOGIN}[fd00::1]:1080 to b.example",
        "socks5://c.example:1080",
    )
    done = running.command("-t", "-o", parents(*given), cwd=tmp_path)
    assert done.returncode == 0 and "kQ7" not in done.stdout
    for line in given:
        assert f"    {line.replace(PASSWORD, '***')}\n" in done.stdout
    (tmp_path / "natwork.conf").write_text(done.stdout)
    assert running.command("-t", cwd=tmp_path).stdout == done.stdout


@pytest.mark.parametrize("text", ["kQ7", "9kQ7", "*kQ7", "80kQ7", "80:kQ7"])
def test_a_password_without_its_host_is_masked(text: str) -> None:
    assert natwork.masked(f"x http://u:{text} to *") == "x http://u:*** to *"


@pytest.mark.parametrize("text", ["http://h:80", "http://h:80/", "http://[::1]:80"])
def test_a_port_is_no_password(text: str) -> None:
    assert natwork.masked(text) == text


@pytest.mark.parametrize(
    ("proto", "host", "address", "port"),
    [
        ("connect", "a.example", "192.0.2.1", 1),
        ("http", "a.example", "192.0.2.1", 1),
        ("connect", "x.a.example.", "192.0.2.1", 1),
        ("connect", "xa.example", "192.0.2.1", 0),
        ("http", "xa.example", "192.0.2.1", 3),
        ("connect", "b.example", "10.1.2.3", 2),
        ("connect", "b.example", "::ffff:10.1.2.3", 2),
        ("http", "b.example", "2001:db8::1", 2),
        ("socks5", "c.example", "2001:db9::1", 0),
    ],
)
def test_the_first_that_takes_the_target_is_asked(
    proto: str, host: str, address: str, port: int
) -> None:
    lines = (
        "http://p:1 to .a.example",
        "http://p:2 to 10.0.0.0/8,2001:db8::/32",
        "http://p:3 scheme http",
    )
    parent = joined(";".join(lines)).parent_for(proto, host, [pack(address)])
    assert (parent.port if parent else 0) == port


def test_explain_says_which_parent(tmp_path: Path) -> None:
    options = (
        *("-o", parents(f"http://{LOGIN}127.0.0.1:3128 to 192.0.2.0/24, .invalid")),
        *("-o", "rules=allow to .invalid"),
    )

    def explain(target: str) -> str:
        words = ("--explain", "127.0.0.7", target)
        return running.command(*options, *words, cwd=tmp_path).stdout

    said = "would ask the parent http://127.0.0.1:3128\n"
    assert explain("192.0.2.1:443").endswith(said)
    assert explain("http://a.invalid/").endswith(said)
    assert said not in explain("198.51.100.1:443") + explain("10.0.0.1:80")


# --- An http parent -----------------------------------------------------------


def test_a_request_goes_to_the_parent_in_absolute_form(
    natwork: running.Start, origin: origins.Start
) -> None:
    parent = origin(http_wire.Script(http_wire.sized(b"one"), http_wire.sized(b"two")))
    gateway = natwork(parents(f"http://{LOGIN}{parent.authority}"), NAMED)
    body, at = b"Content-Length: 3", b"127.0.0.3:81"
    with gateway.connect() as client:
        sent = http_wire.request(
            at, body, b"X: y", method=b"PUT", path=b"/p?q", body=b"abc"
        )
        assert http_wire.exchange(client, sent).body == b"one"
        assert (
            http_wire.exchange(client, http_wire.request(at, path=b"?q")).body == b"two"
        )
        sent = http_wire.request(at, method=b"OPTIONS", path=b"")
        assert http_wire.exchange(client, sent).body == b"two"
        # Another target is judged and dialed anew.
        assert (
            http_wire.exchange(client, http_wire.request(b"127.0.0.4")).body == b"two"
        )
    got = parent.handle.requests
    assert [r.start for r in got] == [
        b"PUT http://127.0.0.3:81/p?q HTTP/1.1",
        b"GET http://127.0.0.3:81/?q HTTP/1.1",
        b"OPTIONS http://127.0.0.3:81 HTTP/1.1",
        b"GET http://127.0.0.4/ HTTP/1.1",
    ]
    assert got[0].body == b"abc" and got[0].values(b"X") == [b"y"]
    for one in got:
        assert one.values(b"Proxy-Authorization") == [b"Basic " + BASIC]
        assert one.values(b"Via") == [b"1.1 gate.test"]
    assert got[0].values(b"Host") == [at] and len(parent.callers) == 2
    lines = gateway.lines(4)
    assert {line["address"] for line in lines} == {parent.authority}
    assert lines[0]["target"] == "http://127.0.0.3:81/p"
    assert "kQ7" not in gateway.log.read_text() and BASIC.decode() not in str(lines)


def test_a_request_goes_out_again_in_the_same_form(
    natwork: running.Start, origin: origins.Start
) -> None:
    parent = origin(http_wire.Script(close=True))
    gateway = natwork(parents(f"http://{parent.authority}"))
    with gateway.connect() as client:
        for _ in range(5):
            assert (
                http_wire.exchange(client, http_wire.request(b"127.0.0.3")).status
                == 200
            )
    assert len(parent.callers) == 5
    starts = {one.start for one in parent.handle.requests}
    assert starts == {b"GET http://127.0.0.3/ HTTP/1.1"}
    # Nor does it say who we are to one that has no user for us.
    assert not any(one.values(b"Proxy-Authorization") for one in parent.handle.requests)


def test_a_trace_shows_no_client_the_parents_password(
    natwork: running.Start, origin: origins.Start
) -> None:
    """Apache's httpd, as a parent, answers with all that it was told."""
    parent = origin(http_wire.Script(http_wire.OK))
    gateway = natwork(parents(f"http://{LOGIN}{parent.authority}"))
    for hops in b"1", b"2":
        fields = b"Max-Forwards: " + hops, b"Connection: close"
        data = http_wire.request(b"127.0.0.3", *fields, method=b"TRACE")
        with gateway.connect() as client:
            assert http_wire.exchange(client, data).status == 200
    assert [one.start[:5] for one in parent.handle.requests] == [b"TRACE"] * 2
    assert not any(one.values(b"Proxy-Authorization") for one in parent.handle.requests)


def test_a_fault_of_the_client_is_not_its_parents(
    natwork: running.Start, origin: origins.Start
) -> None:
    parent = origin(lambda connection, origin: wire.read_all(connection))
    gateway = natwork(parents(f"http://{parent.authority}"))
    with gateway.connect() as client:
        lines, body = b"Transfer-Encoding: chunked", b"no size\r\n"
        data = http_wire.request(b"127.0.0.3", lines, method=b"PUT", body=body)
        assert http_wire.exchange(client, data).status == 400
    assert gateway.lines(1)[0]["outcome"] == "bad-request"


def test_a_tunnel_leads_through_the_parents_tunnel(
    natwork: running.Start, origin: origins.Start
) -> None:
    head = (
        b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.0 200 Fine\r\nContent-Length: 9\r\n\r\n"
    )
    for dripping in (False, True):
        # What the server says first comes with the parent's answer.
        parent = origin(http_wire.Parent(head + b"220 hello", dripping))
        gateway = natwork(parents(f"http://{LOGIN}{parent.authority}"), NAMED)
        answer, client = connected(gateway, b"127.0.0.3:25000")
        with client:
            assert answer.start == b"HTTP/1.1 200 Connection established"
            assert wire.read_exactly(client, 9) == b"220 hello" and wire.echoes(client)
        (head_sent,) = parent.handle.heads
        assert head_sent.split(b"\r\n") == [
            b"CONNECT 127.0.0.3:25000 HTTP/1.1",
            b"Host: 127.0.0.3:25000",
            b"Via: 1.1 gate.test",
            b"Proxy-Authorization: Basic " + BASIC,
            b"",
            b"",
        ]
        assert gateway.lines(1)[0]["address"] == parent.authority


REFUSALS = {
    b"403 Forbidden": (403, b"http_request_denied", "parent-403"),
    b"407 Who": (502, b"destination_unavailable", "parent-407"),
    b"404 Nothing": (502, b"destination_unavailable", "parent-404"),
    b"500 Oh": (502, b"destination_unavailable", "parent-500"),
    b"503 Later": (503, b"connection_limit_reached", "parent-503"),
    b"504 Slow": (504, b"connection_timeout", "parent-504"),
}


def test_a_parents_refusal_is_passed_on_with_its_name(
    natwork: running.Start, origin: origins.Start
) -> None:
    challenge = b'Proxy-Authenticate: Basic realm="parent"'
    pages = [http_wire.sized(b"a page", challenge, status=said) for said in REFUSALS]
    asked = [origin(http_wire.Parent(page)) for page in pages]
    gateway = natwork(one_each(f"http://{LOGIN}", asked), NAMED)
    for number, (said, expected) in enumerate(REFUSALS.items()):
        status, error, word = expected
        answer, client = connected(gateway, b"127.0.1.%d:443" % number)
        with client:
            assert (answer.status, http_wire.proxy_error(answer)) == (status, error)
            assert wire.at_end(client) and not answer.values(b"Proxy-Authenticate")
        why = f"parent http://{asked[number].authority}: {said.decode()}"
        assert why.encode() in answer.body and b"kQ7" not in answer.body
        assert gateway.lines(number + 1)[number]["outcome"] == word


def test_a_parents_407_to_a_request_is_not_for_our_client(
    natwork: running.Start, origin: origins.Start
) -> None:
    challenge = b'Proxy-Authenticate: Basic realm="parent"'
    parent = origin(
        http_wire.Script(
            http_wire.sized(b"page", challenge, status=b"407 Who"),
            http_wire.sized(b"ok"),
        )
    )
    gateway = natwork(parents(f"http://{parent.authority}"), NAMED)
    with gateway.connect() as client:
        answer = http_wire.exchange(client, http_wire.request(b"127.0.0.3"))
        assert answer.status == 502 and not answer.values(b"Proxy-Authenticate")
        assert parent.authority.encode() in answer.body
        # Its page does not answer the next request.
        assert http_wire.exchange(client, http_wire.request(b"127.0.0.3")).body == b"ok"
    assert gateway.lines(1)[0]["outcome"] == "parent-407"
    # Any other answer is an answer.
    parent.handle.answers = [http_wire.sized(b"no", status=b"403 Forbidden")]
    assert http_wire.ask(gateway, b"127.0.0.3").status == 403
    assert gateway.lines(3)[2]["outcome"] == "ok"


ODD = {
    "silence": (b"", 504, "parent-connect-timeout"),
    "half a head": (b"HTTP/1.1 200 OK\r\n", 504, "parent-connect-timeout"),
    "not HTTP": (b"SSH-2.0-x\r\n\r\n", 502, "parent-bad-response"),
    "an odd status": (b"HTTP/1.1 2000 OK\r\n\r\n", 502, "parent-bad-response"),
    "no end of interim ones": (
        b"HTTP/1.1 100 Continue\r\n\r\n" * 100,
        502,
        "parent-bad-response",
    ),
    "no end": (b"HTTP/1.1 200 OK\r\nX: " + b"x" * 70000, 502, "parent-bad-response"),
    "only interim": (
        http_wire.response(status=b"102 x") * 3,
        504,
        "parent-connect-timeout",
    ),
}


def test_a_parent_that_does_not_answer_well_is_said_to(
    natwork: running.Start, origin: origins.Start
) -> None:
    asked = [origin(http_wire.Parent(said)) for said, _, _ in ODD.values()]
    gateway = natwork(one_each("http://", asked), "connect_timeout=1", NAMED)
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(gateway.connect()) for _ in ODD]
        for number, client in enumerate(clients):  # who is silent is so to all at once
            where = b"127.0.1.%d:443" % number
            client.sendall(http_wire.request(where, method=b"CONNECT"))
        answers = [http_wire.read_answer(client, b"CONNECT") for client in clients]
    words = {line["target"]: line["outcome"] for line in gateway.lines(len(ODD))}
    for number, (_, status, word) in enumerate(ODD.values()):
        assert answers[number].status == status
        name = f"parent http://{asked[number].authority}"
        assert name.encode() in answers[number].body
        assert words[f"127.0.1.{number}:443"] == word


def hang_up(connection: socket.socket, origin: origins.Origin) -> None:
    connection.recv(100)


@pytest.mark.parametrize("scheme", ["http", "socks5"])
def test_a_parent_that_hangs_up_is_said_to(
    natwork: running.Start, origin: origins.Start, scheme: str
) -> None:
    parent = origin(hang_up)
    gateway = natwork(parents(f"{scheme}://{parent.authority}"), NAMED)
    answer, client = connected(gateway, b"127.0.0.3:443")
    client.close()
    answers = [answer, http_wire.ask(gateway, b"127.0.0.3")]
    for answer in answers:
        assert (answer.status, http_wire.proxy_error(answer)) == (
            502,
            b"connection_terminated",
        )
        assert f"parent {scheme}://{parent.authority}: ".encode() in answer.body
    outcomes = [line["outcome"] for line in gateway.lines(2)]
    assert outcomes == ["parent-server-gone"] * 2


def test_a_parent_that_does_not_answer_a_request_is_said_to(
    natwork: running.Start, origin: origins.Start
) -> None:
    silent, odd = origin(http_wire.Parent(b"")), origin(speak_ssh)
    lines = (f"http://{silent.authority} to 127.0.0.3", f"http://{odd.authority}")
    gateway = natwork(parents(*lines), "idle_timeout=1", NAMED)
    answer = http_wire.ask(gateway, b"127.0.0.3")
    assert (answer.status, http_wire.proxy_error(answer)) == (
        504,
        b"http_response_timeout",
    )
    assert silent.authority.encode() in answer.body
    answer = http_wire.ask(gateway, b"127.0.0.4")
    assert (answer.status, http_wire.proxy_error(answer)) == (
        502,
        b"http_protocol_error",
    )
    assert odd.authority.encode() in answer.body
    outcomes = [line["outcome"] for line in gateway.lines(2)]
    assert outcomes == ["parent-answer-timeout", "parent-bad-response"]


def speak_ssh(connection: socket.socket, origin: origins.Origin) -> None:
    connection.recv(1000)
    connection.sendall(b"SSH-2.0-x\r\n\r\n")
    connection.recv(1)


@pytest.mark.parametrize("scheme", ["http", "socks5"])
def test_a_parent_that_is_not_there_is_said_not_to_be(
    natwork: running.Start, origin: origins.Start, scheme: str
) -> None:
    closed = http_wire.CLOSED.decode()
    gateway = natwork(parents(f"{scheme}://{LOGIN}{closed}"), NAMED)
    answer = http_wire.ask(gateway, b"127.0.0.3")
    assert (answer.status, http_wire.proxy_error(answer)) == (
        502,
        b"connection_refused",
    )
    assert f"parent {scheme}://{closed}: ".encode() in answer.body
    assert b"kQ7" not in answer.body + repr(answer.fields).encode()
    assert gateway.lines(1)[0]["outcome"] == "parent-refused"
    gateway = natwork(parents("http://parent.invalid:80"), NAMED)
    assert (
        b"parent http://parent.invalid:80: "
        in http_wire.ask(gateway, b"127.0.0.3").body
    )
    assert gateway.lines(1)[0]["outcome"] == "parent-no-such-host"


# --- A SOCKS5 parent ----------------------------------------------------------

HELLO = b"\5\2\0\2"


@pytest.mark.parametrize(
    ("host", "told"),
    [
        (b"127.0.0.3:81", b"\1\x7f\0\0\3\0\x51"),
        (b"[::ffff:127.0.0.3]:81", b"\4" + bytes(10) + b"\xff\xff\x7f\0\0\3\0\x51"),
        (b"localhost:81", b"\3\x09localhost\0\x51"),
        (b"a.no-such-name.invalid:443", b"\3\x16a.no-such-name.invalid\1\xbb"),
    ],
)
def test_a_socks_parent_is_told_the_host_as_the_client_gave_it(
    natwork: running.Start, origin: origins.Start, host: bytes, told: bytes
) -> None:
    user = b"\1\5alice\x0dkQ7-pass:word"
    for login, parent in (("", origin(Socks())), (LOGIN, origin(Socks(user=user)))):
        url = f"socks5://{login}{parent.authority}"
        gateway = natwork(parents(url), NAMED, NAMED_RULES, loopback=False)
        answer, client = connected(gateway, host)
        with client:
            assert answer.status == 200
            assert wire.read_exactly(client, 5) == b"hello" and wire.echoes(client)
        spoken = [HELLO, user] if login else [b"\5\1\0"]
        assert parent.handle.heard == [*spoken, b"\5\1\0" + told]
        assert gateway.lines(1)[0]["address"] == parent.authority


def test_a_request_goes_through_a_socks_parent_as_to_its_server(
    natwork: running.Start, origin: origins.Start
) -> None:
    def serve(connection: socket.socket, origin: origins.Origin) -> None:
        wire.read_exactly(connection, 3)
        connection.sendall(b"\5\0")
        wire.read_exactly(connection, 10)
        connection.sendall(b"\5\0\0\1\0\0\0\0\0\0")
        script(connection, origin)

    script = http_wire.Script(http_wire.sized(b"ok"))
    gateway = natwork(parents(f"socks5://{origin(serve).authority}"))
    with gateway.connect() as client:
        for _ in range(2):
            assert (
                http_wire.exchange(client, http_wire.request(b"127.0.0.3:81")).body
                == b"ok"
            )
    assert [one.start for one in script.requests] == [b"GET / HTTP/1.1"] * 2


def speak_http(connection: socket.socket, origin: origins.Origin) -> None:
    connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
    connection.recv(100)


def test_a_socks_parents_refusal_is_passed_on(
    natwork: running.Start, origin: origins.Start
) -> None:
    refusals = [
        (Socks(1), 502, b"destination_unavailable", "parent-reply-1"),
        (Socks(2), 403, b"http_request_denied", "parent-reply-2"),
        (Socks(3), 502, b"destination_ip_unroutable", "parent-reply-3"),
        (Socks(4), 502, b"destination_ip_unroutable", "parent-reply-4"),
        (Socks(5), 502, b"connection_refused", "parent-reply-5"),
        (Socks(6), 504, b"connection_timeout", "parent-reply-6"),
        (Socks(99), 502, b"destination_unavailable", "parent-reply-99"),
        (Socks(method=255), 502, b"destination_unavailable", "parent-auth-required"),
        (Socks(user=b"x"), 502, b"destination_unavailable", "parent-auth-failed"),
        (speak_http, 502, b"http_protocol_error", "parent-bad-response"),
        *(
            (Liar(reply), 502, b"http_protocol_error", "parent-bad-response")
            for reply in (b"\7\0\0\1" + bytes(6), b"\5\0\0\x09" + bytes(6))
        ),
    ]
    asked = [origin(parent) for parent, *_ in refusals]
    gateway = natwork(one_each(f"socks5://{LOGIN}", asked), NAMED)
    for number, (_, status, error, word) in enumerate(refusals):
        answer, client = connected(gateway, b"127.0.1.%d:81" % number)
        with client:
            assert (answer.status, http_wire.proxy_error(answer)) == (status, error)
        assert f"parent socks5://{asked[number].authority}".encode() in answer.body
        known = "auth" not in word
        assert (b"Ask the operator" in answer.body) is (not known or status == 403)
        assert gateway.lines(number + 1)[number]["outcome"] == word


def test_a_socks_parents_reply_is_the_clients(
    natwork: running.Start, origin: origins.Start
) -> None:
    replies = range(2, 7)
    asked = [origin(Socks(reply)) for reply in replies]
    gateway = natwork(one_each("socks5://", asked))
    for number, reply in enumerate(replies):
        with gateway.connect() as client:
            client.sendall(
                b"\5\1\0"
                + socks_wire.five(socks_wire.addressed(f"127.0.1.{number}", 81))
            )
            assert wire.read_exactly(client, 2) == socks_wire.AGREED
            assert socks_wire.read_five(client)[0] == reply


# --- What is asked of whom ----------------------------------------------------


def test_the_target_is_judged_first(
    natwork: running.Start, origin: origins.Start
) -> None:
    parent = origin(http_wire.Script())
    rules = "rules=deny to .invalid port 81; allow to 127.0.0.3, .invalid; deny to *"
    line = parents(f"http://{parent.authority}")
    gateway = natwork(line, rules, NAMED, loopback=False)
    for where, status in {
        b"127.0.0.3": 200,  # and so the parent's own address needs no rule
        NOWHERE: 200,
        b"a." + NOWHERE + b".": 200,
        b"127.0.0.4": 403,
        b"localhost": 403,
        b"10.0.0.1": 403,
        NOWHERE + b":25": 502,  # the rule does not say 25
        NOWHERE + b":81": 502,
        b"no-such-name.test": 502,
    }.items():
        assert http_wire.ask(gateway, where).status == status, where
    assert len(parent.handle.requests) == 3


@pytest.mark.parametrize(
    ("rules", "status"),
    [
        ("", 502),
        ("allow", 502),
        ("allow from 127.0.0.1", 502),
        ("allow to 0.0.0.0/0", 502),
        ("allow to .example", 502),
        ("allow to *", 200),
        ("allow to .invalid", 200),
        ("allow from 127.0.0.1; allow to .invalid", 200),
        ("deny from 127.0.0.1; allow to .invalid", 502),
        ("allow to .invalid port 443", 502),
    ],
)
def test_a_name_unknown_here_goes_on_if_a_rule_names_it(
    natwork: running.Start, origin: origins.Start, rules: str, status: int
) -> None:
    line = parents(f"http://{origin(http_wire.Script()).authority}")
    gateway = natwork(line, f"rules={rules}", NAMED, loopback=False)
    assert http_wire.ask(gateway, NOWHERE).status == status
    # A name whose address is known, and closed, is not unknown: no parent opens it.
    gateway = natwork(line, "rules=allow to *", NAMED, loopback=False)
    assert http_wire.ask(gateway, b"localhost").status == 403


@pytest.mark.parametrize("word", ["no-such-host", "dns-timeout", "dns-failed"])
def test_whatever_keeps_a_name_unknown_here(word: str) -> None:
    config = Config(rules="allow to .example", parents="http://127.0.0.1:3128")
    chapters = Chapters(config, Scoreboard())
    join(chapters)
    asks = "127.0.0.1", "-", "http", "www.example", 80
    refusal = Refused(natwork.OUTCOMES[word])
    assert (
        chapters.parents.that_may_know(refusal, *asks).name == "http://127.0.0.1:3128"
    )
    assert not chapters.parents.that_may_know(Refused(natwork.DENIED), *asks)


def test_what_this_box_lacks_is_not_the_parents_fault() -> None:
    parent = parse_parent("http://127.0.0.1:3128")
    ours = Refused(natwork.OVERLOAD, "cannot open more files")
    assert parent.blamed(ours) is ours
    theirs = Refused(natwork.OVERLOAD._replace(word="503"), "busy")
    assert parent.blamed(theirs).outcome.word == "parent-503"


def test_an_uplink_that_is_not_there_is_not_the_parents_fault(
    natwork: running.Start,
) -> None:
    # TEST-NET-3: it is dialed from the uplink, and this box does not have that.
    line = parents("http://203.0.113.80:3128")
    gateway = natwork(line, "outside=198.51.100.77", NAMED)
    answer = http_wire.ask(gateway, b"203.0.113.81")
    assert answer.status == 502
    assert gateway.lines(1)[0]["outcome"] == "no-uplink"


def test_a_name_unknown_here_goes_to_no_server(
    natwork: running.Start, origin: origins.Start
) -> None:
    line = parents(f"http://{origin(http_wire.Script()).authority} to .example")
    gateway = natwork(line, "rules=allow to *", NAMED, loopback=False)
    assert http_wire.ask(gateway, NOWHERE).status == 502
    assert gateway.lines(1)[0]["outcome"] == "no-such-host"


def test_what_no_parent_takes_is_dialed(
    natwork: running.Start, origin: origins.Start
) -> None:
    parent, server = (
        origin(http_wire.Script(http_wire.sized(b"parent"))),
        origin(http_wire.Script(), "127.0.0.3"),
    )
    gateway = natwork(parents(f"http://{parent.authority} to 127.0.0.4/32"))
    assert http_wire.ask(gateway, server).body == b"ok"
    assert http_wire.ask(gateway, b"127.0.0.4").body == b"parent"
    addresses = [line["address"] for line in gateway.lines(2)]
    assert addresses == [server.authority, parent.authority]


def test_a_near_parent_is_not_dialed_from_the_outside(
    natwork: running.Start, origin: origins.Start
) -> None:
    parent, server = origin(http_wire.Script()), origin(http_wire.Script(), "127.0.0.3")
    line = parents(f"http://{parent.authority} to 127.0.0.4/32")
    gateway = natwork(line, "outside=127.0.0.2")
    assert (
        http_wire.ask(gateway, b"127.0.0.4").status
        == http_wire.ask(gateway, server).status
        == 200
    )
    assert [host for host, _ in parent.callers + server.callers] == [
        "127.0.0.1",
        "127.0.0.2",
    ]
    # Two workers, either of which may be the first to write.
    sources = sorted(line["source"].split(":")[0] for line in gateway.lines(2))
    assert sources == ["127.0.0.1", "127.0.0.2"]


def test_a_body_that_never_comes_through_a_parent_swallows_no_request(
    natwork: running.Start, origin: origins.Start
) -> None:
    def refuse(connection: socket.socket, origin: origins.Origin) -> None:
        origin.received.append(http_wire.read_head(connection))
        connection.sendall(http_wire.sized(b"no", status=b"401 Unauthorized"))
        origin.received.append(wire.read_all(connection))

    parent = origin(refuse)
    gateway = natwork(parents("http://%s scheme http" % parent.authority))
    fields = b"Expect: 100-continue", b"Content-Length: 200"
    with gateway.connect() as client:  # RFC 9110 section 10.1.1
        data = http_wire.request(b"127.0.0.3", *fields, method=b"PUT")
        assert http_wire.exchange(client, data).status == 401
        client.sendall(http_wire.request(b"127.0.0.3"))
        assert wire.read_all(client) == b""
    wait.until(lambda: len(parent.received) == 2)
    assert parent.received[1] == b""


def test_gateways_that_are_each_others_parents_are_a_loop(
    daemon: running.Start,
) -> None:
    one = daemon(name="one")
    two = daemon(name="two", parents="http://%s:%d" % one.address)
    one.hangup(parents="http://%s:%d" % two.address)
    answer = http_wire.ask(one, b"127.0.0.3")
    assert answer.status == 502 and b"has been here before" in answer.body
    answer, client = connected(one, b"127.0.0.3:443")
    client.close()
    assert answer.status == 502
    found = [line["outcome"] for line in one.lines(4)]
    assert sorted(found) == ["loop", "loop", "ok", "parent-502"]
    assert [line["outcome"] for line in two.lines(2)] == ["ok", "parent-502"]


def test_a_gateway_may_be_a_parent_that_wants_a_user(
    tmp_path: Path, natwork: running.Start, origin: origins.Start
) -> None:
    (tmp_path / "users").write_bytes(user_line(b"alice", b"kQ7-pass:word") + b"\n")
    (tmp_path / "users").chmod(0o600)
    parent = natwork(f"users={tmp_path / 'users'}", "name=two")
    gateway = natwork(parents("http://%s%s:%d" % (LOGIN, *parent.address)), "name=one")
    server, speaker = (
        origin(http_wire.Script(), "127.0.0.3"),
        origin(origins.echo, "127.0.0.3"),
    )
    with gateway.connect() as client:
        # What our client calls himself is not for the parent.
        mine = b"Proxy-Authorization: Basic eDp5"
        assert http_wire.exchange(client, http_wire.request(server, mine)).status == 200
    answer, client = connected(gateway, speaker)
    with client:
        assert answer.status == 200 and wire.echoes(client)
    assert [line["user"] for line in parent.lines(2)] == ["alice", "alice"]
    assert server.handle.requests[0].values(b"Via") == [b"1.1 one, 1.1 two"] or (
        server.handle.requests[0].values(b"Via") == [b"1.1 one", b"1.1 two"]
    )


@pytest.mark.parametrize("scheme", ["http", "socks5"])
def test_socks_goes_through_parents_too(
    natwork: running.Start, origin: origins.Start, scheme: str
) -> None:
    place = (
        http_wire.Parent(b"HTTP/1.1 200 x\r\n\r\nhello")
        if scheme == "http"
        else Socks()
    )
    parent = origin(place)
    gateway = natwork(parents(f"{scheme}://{parent.authority}"))
    with gateway.connect() as client:
        client.sendall(b"\5\1\0\5\1\0\1\x7f\0\0\3\0\x51")
        assert wire.read_exactly(client, 12)[:4] == b"\5\0\5\0"
        assert wire.read_exactly(client, 5) == b"hello" and wire.echoes(client)
    gateway = natwork(parents(f"{scheme}://{http_wire.CLOSED.decode()}"))
    with gateway.connect() as client:
        client.sendall(b"\5\1\0\5\1\0\1\x7f\0\0\3\0\x51")
        assert wire.read_exactly(client, 12)[2:4] == b"\5\5"
    assert gateway.lines(1)[0]["outcome"] == "parent-refused"


# --- Real ones ----------------------------------------------------------------


@contextlib.contextmanager
def serving(words: list[str], port: int, folder: Path) -> Iterator[None]:
    """Run a program until it is no longer needed, which listens on a port."""
    with (folder / f"{Path(words[0]).name}.out").open("w+") as out:
        process = subprocess.Popen(
            words, stdin=subprocess.DEVNULL, stdout=out, stderr=out, cwd=folder
        )

        def ready() -> bool:
            assert process.poll() is None, Path(out.name).read_text()
            with contextlib.suppress(OSError):
                socket.create_connection(("127.0.0.1", port)).close()
                return True
            return False

        try:
            wait.until(ready, 30)
            yield
        finally:
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


@pytest.fixture
def place() -> Iterator[Path]:
    """Return a folder that programs which change their user can read."""
    with running.public_folder() as folder:
        yield folder


SQUID_AUTH = """
auth_param basic program /usr/lib/squid/basic_ncsa_auth {folder}/passwords
auth_param basic children 1
acl known proxy_auth REQUIRED
"""


@contextlib.contextmanager
def squid(folder: Path, password: bool = False) -> Iterator[int]:
    """Run Squid; yield its port."""
    needs.programs("squid", "openssl")
    port = wire.free_port()
    words = ["openssl", "passwd", "-apr1", "kQ7-pass:word"]
    made = subprocess.run(words, capture_output=True, text=True, check=True)
    (folder / "passwords").write_text(f"alice:{made.stdout}")
    (folder / "cache.log").touch()
    if os.geteuid() == 0:
        shutil.chown(folder / "cache.log", "proxy")
    text = web.SQUID.format(
        port=port,
        folder=folder,
        auth=SQUID_AUTH.format(folder=folder) if password else "",
        access="allow known" if password else "allow all",
    )
    (folder / "squid.conf").write_text(text)
    words = ["squid", "-N", "-f", str(folder / "squid.conf")]
    with serving(words, port, folder):
        yield port


def curl(gateway: running.Gateway, *words: str) -> str:
    """Run curl through the gateway; return what it prints."""
    needs.programs("curl")
    always = ["--silent", "--show-error", "--noproxy", "", "--proxy", gateway.url]
    done = subprocess.run(
        ["curl", *always, *words], capture_output=True, text=True, timeout=30
    )
    return done.stdout + done.stderr


WAYS: list[list[str]] = [[], ["--proxytunnel"]]


def test_squid_as_a_parent_with_a_password(
    place: Path, natwork: running.Start, origin: origins.Start
) -> None:
    server = origin(http_wire.Script(http_wire.sized(b"a page")), "127.0.0.3")
    with squid(place, password=True) as port:
        for way in WAYS:
            gateway = natwork(parents(f"http://{LOGIN}127.0.0.1:{port}"), NAMED)
            assert curl(gateway, *way, server.url) == "a page"
            for login in ("alice:wrong@", ""):
                gateway = natwork(parents(f"http://{login}127.0.0.1:{port}"), NAMED)
                said = curl(gateway, "--include", *way, server.url)
                assert "502" in said and f"http://127.0.0.1:{port}" in said
                assert gateway.lines(1)[0]["outcome"] == "parent-407"
            assert "wrong" not in said


NGINX = """
daemon off;
pid {folder}/nginx.pid;
error_log {folder}/error.log;
events {{ }}
http {{
    access_log {folder}/access.log;
    client_body_temp_path {folder}/body;
    proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi;
    scgi_temp_path {folder}/scgi;
    server {{
        listen 127.0.0.1:{port};
        root {folder}/site;
        expires 1h;
    }}
}}
"""


def test_a_cache_for_all_plain_requests_is_one_line(
    place: Path, natwork: running.Start
) -> None:
    """DESIGN's recipe: Squid answers the second GET, and no tunnel meets it."""
    needs.programs("nginx")
    (place / "site").mkdir()
    (place / "site" / "page").write_text("to be kept")
    web = wire.free_port()
    (place / "nginx.conf").write_text(NGINX.format(folder=place, port=web))
    nginx = ["nginx", "-e", f"{place}/error.log", "-c", f"{place}/nginx.conf"]
    with serving(nginx, web, place), squid(place) as port:
        gateway = natwork(parents(f"http://127.0.0.1:{port} scheme http"))
        url = f"http://127.0.0.1:{web}/page"

        def seen() -> int:
            return (place / "access.log").read_text().count("GET /page ")

        assert [curl(gateway, url) for _ in range(2)] == ["to be kept"] * 2
        assert seen() == 1
        assert curl(gateway, "--proxytunnel", url) == "to be kept"
        assert seen() == 2
        addresses = [line["address"] for line in gateway.lines(3)]
        assert addresses == [f"127.0.0.1:{n}" for n in (port, port, web)]


@pytest.mark.parametrize("login", ["", LOGIN])
def test_microsocks_as_a_parent(
    tmp_path: Path, natwork: running.Start, origin: origins.Start, login: str
) -> None:
    needs.programs("microsocks")
    server, port = (
        origin(http_wire.Script(http_wire.sized(b"a page")), "127.0.0.3"),
        wire.free_port(),
    )
    words = ["microsocks", "-i", "127.0.0.1", "-p", str(port)]
    words += ["-u", "alice", "-P", "kQ7-pass:word"] if login else []
    with serving(words, port, tmp_path):
        gateway = natwork(parents(f"socks5://{login}127.0.0.1:{port}"), NAMED)
        for way in WAYS:
            assert curl(gateway, *way, server.url) == "a page"
        said = curl(gateway, "--include", f"http://{http_wire.CLOSED.decode()}/")
        assert "502 Bad Gateway" in said and "parent-reply-5" in str(gateway.lines(3))
        if login:
            wrong = natwork(parents(f"socks5://a:b@127.0.0.1:{port}"), NAMED)
            assert "502 Bad Gateway" in curl(wrong, "--include", server.url)
            assert wrong.lines(1)[0]["outcome"] == "parent-auth-failed"


DANTE = """
internal: 127.0.0.1 port = {port}
external: 127.0.0.1
socksmethod: none
clientmethod: none
user.privileged: root
user.unprivileged: nobody
client pass {{ from: 0/0 to: 0/0 }}
socks block {{ from: 0/0 to: 127.0.0.9/32 }}
socks pass {{ from: 0/0 to: 0/0 }}
"""


def test_dante_as_a_parent(
    tmp_path: Path, natwork: running.Start, origin: origins.Start
) -> None:
    needs.programs("danted")
    if os.geteuid() != 0:
        needs.unavailable("Dante wants to be started as root")
    server, port = (
        origin(http_wire.Script(http_wire.sized(b"a page")), "127.0.0.1"),
        wire.free_port(),
    )
    (tmp_path / "danted.conf").write_text(DANTE.format(port=port))
    words = ["danted", "-f", "danted.conf", "-p", str(tmp_path / "danted.pid")]
    with serving(words, port, tmp_path):
        gateway = natwork(parents(f"socks5://127.0.0.1:{port}"), NAMED)
        for way in WAYS:
            assert curl(gateway, *way, server.url) == "a page"
        assert "403 Forbidden" in curl(gateway, "--include", "http://127.0.0.9:81/")
        assert gateway.lines(3)[2]["outcome"] == "parent-reply-2"


def test_ftp_goes_through_a_parent_with_its_data(
    tmp_path: Path, natwork: running.Start, origin: origins.Start
) -> None:
    needs.programs("microsocks")
    data = socket.create_server(("127.0.0.3", 0))
    port = data.getsockname()[1]

    def ftpd(connection: socket.socket, origin: origins.Origin) -> None:
        """Serve one file, from a data port that the parent is to reach."""
        connection.sendall(b"220 ready\r\n")
        lines = connection.makefile("rb")
        for line in lines:
            verb = line.split()[0].upper().decode()
            said = {
                "USER": b"230 in",
                "EPSV": b"229 (|||%d|)" % port,
                "PASV": b"227 (127,0,0,3,%d,%d)" % divmod(port, 256),
                "TYPE": b"200 yes",
                "SIZE": b"213 6",
                "RETR": b"150 now",
                "QUIT": b"221 bye",
            }.get(verb, b"500 what")
            connection.sendall(said + b"\r\n")
            if verb == "RETR":
                stream, caller = data.accept()
                origin.callers.append(caller)
                stream.sendall(b"a file")
                stream.close()
                connection.sendall(b"226 done\r\n")

    server, socks = origin(ftpd, "127.0.0.3"), wire.free_port()
    words = ["microsocks", "-i", "127.0.0.1", "-p", str(socks), "-b", "127.0.0.8"]
    with data, serving(words, socks, tmp_path):
        line = parents(f"socks5://127.0.0.1:{socks}")
        gateway = natwork(line, "rules=allow to 127.0.0.3", loopback=False)
        url = f"ftp://{server.authority}/file"
        assert curl(gateway, url) == "a file"
        assert [host for host, _ in server.callers] == ["127.0.0.8"] * 2
        assert gateway.lines(1)[0]["address"] == f"127.0.0.1:{socks}"
