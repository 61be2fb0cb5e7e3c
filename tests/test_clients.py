"""Clients that people use, where each has a habit of its own: urllib, wget, curl."""

from __future__ import annotations

import os
import socket
import subprocess
import time
import urllib.request
from pathlib import Path

import http_wire
import needs
import origins
import pytest
import running

gateway = running.shared()
pytestmark = pytest.mark.filterwarnings(http_wire.STRICT)

PADDED = (
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
    b"5     \r\na wor\r\n4 \r\nd or\r\n00005\t\r\n two\n\r\n0     \r\n\r\n"
)


def run(*words: str, folder: Path, **environment: str) -> str:
    """Return what a client prints; it must succeed."""
    needs.programs(words[0])
    clean = {k: v for k, v in os.environ.items() if not k.lower().endswith("_proxy")}
    done = subprocess.run(
        words,
        cwd=folder,
        env={**clean, "HOME": str(folder), **environment},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=40,
    )
    assert done.returncode == 0, done
    return done.stdout


def curl(gateway: running.Gateway, *words: str) -> str:
    through = "--noproxy", "", "--proxy", gateway.url
    always = "curl", "--silent", "--show-error", "--max-time", "30"
    return run(*always, *through, *words, folder=gateway.folder)


def wget(gateway: running.Gateway, *words: str) -> str:
    always = "wget", "--quiet", "--no-hsts", "--tries=1", "--timeout=20", "-O", "-"
    return run(*always, *words, folder=gateway.folder, http_proxy=gateway.url)


# urllib


def test_urllib_asks_with_its_fragment(gateway, origin, monkeypatch) -> None:
    """And goes to one when it is redirected; the server sees neither."""
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    moved = http_wire.sized(b"", b"Location: /there?a#two", status=b"302 Found")
    script = http_wire.Script(moved, http_wire.OK)
    server = origin(script)
    handler = urllib.request.ProxyHandler({"http": gateway.url})
    opener = urllib.request.build_opener(handler)
    with opener.open(server.url + "/page#one", timeout=20) as answer:
        assert (answer.status, answer.read()) == (200, b"ok")
        assert answer.url == server.url + "/there?a#two"
    assert [x.target for x in script.requests] == [b"/page", b"/there?a"]


# wget


def test_wget_gives_a_password_that_stands_in_the_url(gateway, origin) -> None:
    """A percent sign in it is decoded once: RFC 3986 section 2.4."""
    asked = []

    def basic(connection: socket.socket, origin: origins.Origin) -> None:
        while request := http_wire.read_request(connection):
            asked.append(request)
            if request.values(b"Authorization") == [b"Basic dTpwQHE="]:  # u:p@q
                connection.sendall(http_wire.sized(b"a secret page"))
                continue
            challenge = b'WWW-Authenticate: Basic realm="here"'
            refusal = http_wire.sized(b"", challenge, status=b"401 Unauthorized")
            connection.sendall(refusal)

    server = origin(basic)
    url = f"http://u:p%40q@{server.authority}/page"
    assert wget(gateway, url) == "a secret page"
    assert {x.target for x in asked} == {b"/page"}


# Both


@pytest.mark.parametrize("client", [curl, wget])
def test_chunk_sizes_may_be_padded_with_blanks(gateway, origin, client) -> None:
    """As old servers do, which write the size into a field of fixed width."""
    script = http_wire.Script(PADDED)
    assert client(gateway, origin(script).url + "/") == "a word or two\n"


# curl


def test_curl_offers_http_2_and_gets_http_1(gateway, origin) -> None:
    """The offer is not passed on, not even by half: RFC 9113 section 3.1."""
    if "HTTP2" not in run("curl", "--version", folder=gateway.folder):
        needs.unavailable("this curl knows no HTTP/2")
    asked = []

    def strict(connection: socket.socket, origin: origins.Origin) -> None:
        while request := http_wire.read_request(connection):
            asked.append(request)
            traces = [request.values(x) for x in (b"Upgrade", b"HTTP2-Settings")]
            half = any(traces) or b"upgrade" in request.members(b"Connection")
            bad = http_wire.sized(b"", status=b"400 Bad Request")
            connection.sendall(bad if half else http_wire.OK)

    words = "--http2", "--fail", "--write-out", " %{http_version}"
    assert curl(gateway, *words, origin(strict).url + "/") == "ok 1.1"
    assert len(asked) == 1


def test_curl_asks_again_without_the_expectation_that_failed(gateway, origin) -> None:
    """On the same connection: RFC 9110 section 10.1.1.

    It expects by itself where the body is over a megabyte.
    """
    asked, body = [], b"0123456789abcdef" * 100_000
    (gateway.folder / "body").write_bytes(body)

    def unexpecting(connection: socket.socket, origin: origins.Origin) -> None:
        while head := http_wire.head_of(connection, http_wire.REQUEST_LINE):
            asked.append(head)
            if head.values(b"Expect"):
                failed = b"417 Expectation Failed"
                connection.sendall(http_wire.sized(b"", status=failed))
                continue
            http_wire.read_body(connection, head)
            assert head.body == body
            connection.sendall(http_wire.OK)

    words = "--data-binary", "@body", "--expect100-timeout", "20"
    url, count = origin(unexpecting).url + "/", "%{num_connects}"
    began = time.monotonic()
    assert curl(gateway, *words, "--write-out", f" {count}", url) == "ok 1"
    assert time.monotonic() - began < 15
    assert [bool(x.values(b"Expect")) for x in asked] == [True, False]


def test_curl_posts_on_a_kept_connection_while_its_server_closes(
    gateway, origin
) -> None:
    """A POST is not repeated, so it must not meet the close: RFC 9112 section 9.5."""

    def impatient(connection: socket.socket, origin: origins.Origin) -> None:
        connection.settimeout(2)
        while request := http_wire.read_request(connection):
            origin.received.append(request.body)
            connection.sendall(http_wire.sized(request.body))

    server = origin(impatient)
    url, counts = server.url + "/", " %{num_connects}\n"
    if "--rate" not in run("curl", "--help", "all", folder=gateway.folder):
        needs.unavailable("this curl knows no --rate")
    words = "--fail", "--data", "form", "--write-out", counts, "--rate", "30/m"
    # One every two seconds, when the server closes.
    said = curl(gateway, *words, url, url, url)
    assert said == "form 1\nform 0\nform 0\n"
    assert server.received == [b"form"] * 3


def test_curl_gives_a_user_where_socks_asks_for_none(gateway, origin) -> None:
    server = origin(http_wire.Script())
    proxy = "u:p@%s:%d" % gateway.address
    words = "--proxy", "", "--socks5-hostname", proxy, server.url + "/"
    assert curl(gateway, *words) == "ok"
    line = gateway.line_about(server)
    assert (line["proto"], line["user"]) == ("socks5", "u")  # as claimed: R87
