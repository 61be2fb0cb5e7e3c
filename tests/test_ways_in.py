"""Every way in meets the same rules: closed addresses are reached by none of them.

A way is one entry of WAYS; whoever adds a protocol adds one.
"""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Callable
from collections.abc import Iterator
from typing import NamedTuple

import addresses
import http_wire
import needs
import origins
import pytest
import running
import socks_wire
import wait
import wire

MARK = "127.0.0.77"  # the one loopback address that the rules open, for udp()
RULES = f"allow to *; allow port 1-65535; allow to localhost; allow to {MARK}"
OPEN = "allow to 0.0.0.0/0, ::/0 port 1-65535"

# Asks a gateway for a host and port; returns the outcome that the log is to
# tell, "" for the rule's own.
Ask = Callable[[running.Gateway, str, int], str]


class Way(NamedTuple):
    takes: Callable[[str], object]  # says whether it can ask for such a host
    ask: Ask


def tcp(write: Callable[[str, int], bytes], refused: Callable[[bytes], object]) -> Ask:
    """Return a way that sends some bytes and checks that the answer is a refusal."""

    def ask(gateway: running.Gateway, host: str, port: int) -> str:
        with gateway.connect() as client:
            wire.send(client, write(host, port))
            answer = wire.read_all(client)
        assert refused(answer), answer
        return ""

    return ask


def http(method: bytes) -> Ask:
    """Return the way of an HTTP request that asks for the end of the connection."""

    def write(host: str, port: int) -> bytes:
        place = (f"[{host}]:{port}" if ":" in host else f"{host}:{port}").encode()
        return http_wire.request(place, b"Connection: close", method=method)

    return tcp(write, lambda answer: answer[:12] in (b"HTTP/1.1 403", b"HTTP/1.1 502"))


def udp(gateway: running.Gateway, host: str, port: int) -> str:
    """Send a datagram that is to be dropped, and one after it that passes."""
    mark = socks_wire.UdpEcho(MARK)
    with contextlib.closing(mark), contextlib.ExitStack() as stack:
        victim = stack.enter_context(
            socket.socket(
                socket.AF_INET6 if host == "::1" else socket.AF_INET, socket.SOCK_DGRAM
            )
        )
        victim.bind(("::1" if host == "::1" else "127.0.0.1", port))
        victim.settimeout(0)
        client = stack.enter_context(socks_wire.associated(gateway))
        client.send(socks_wire.addressed(host, port), b"to be dropped")
        assert (
            client.exchange(socks_wire.addressed(MARK, mark.port), b"mark")[1]
            == b"mark"
        )
        with pytest.raises(BlockingIOError):
            victim.recv(1)
    return "closed"


def rejected(answer: bytes) -> bool:
    return len(answer) == 8 and answer[1] == 91


def ruled_out(answer: bytes) -> bool:
    return answer[:5] == b"\5\0\5\2\0"


WAYS = {
    "GET": Way(lambda host: True, http(b"GET")),
    "CONNECT": Way(lambda host: True, http(b"CONNECT")),
    "SOCKS4 address": Way(
        lambda host: (
            len(socks_wire.packed(host)) == 4
            and socks_wire.packed(host)[:3] != bytes(3)
        ),
        tcp(socks_wire.four, rejected),
    ),
    "SOCKS4a name": Way(
        lambda host: True,
        tcp(
            lambda host, port: socks_wire.four("x", port)[:-2] + host.encode() + b"\0",
            rejected,
        ),
    ),
    "SOCKS5 address": Way(
        socks_wire.packed,
        tcp(
            lambda host, port: (
                socks_wire.HELLO + socks_wire.five(socks_wire.addressed(host, port))
            ),
            ruled_out,
        ),
    ),
    "SOCKS5 name": Way(
        lambda host: True,
        tcp(
            lambda host, port: (
                socks_wire.HELLO + socks_wire.five(socks_wire.named(host, port))
            ),
            ruled_out,
        ),
    ),
    "SOCKS5 BIND": Way(
        lambda host: True,
        tcp(
            lambda host, port: (
                socks_wire.HELLO + socks_wire.five(socks_wire.named(host, port), 2)
            ),
            ruled_out,
        ),
    ),
    "UDP": Way(lambda host: True, udp),
}

closed = running.shared(f"rules={RULES}")
opened = running.shared(f"rules={OPEN}")


def asked(
    gateway: running.Gateway, way: str, target: str, port: int
) -> tuple[str, str]:
    """Ask for a target by a way; return the outcome told, and the one expected."""
    host = target.strip("[]")
    if not WAYS[way].takes(host):
        return "", ""
    gateway.at_rest()
    count = len(gateway.lines())
    expected = WAYS[way].ask(gateway, host, port)
    line = gateway.lines(count + 1)[count]
    if not expected:
        assert (line["address"], line["source"], line["up"]) == ("-", "-", "0")
    return line["outcome"], expected


@pytest.fixture
def server() -> Iterator[Callable[[str], origins.Origin]]:
    """Return a function that starts the server that is not to be called."""
    with contextlib.ExitStack() as stack:

        def start(target: str) -> origins.Origin:
            one = origins.Origin(
                http_wire.Script(), "::1" if target == "[::1]" else "127.0.0.1"
            )
            stack.callback(one.close)
            return one

        yield start


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("word", "target"), addresses.TARGETS)
def test_a_closed_address_is_reached_by_no_way(
    closed: running.Gateway,
    server: Callable[[str], origins.Origin],
    word: str,
    target: str,
    way: str,
) -> None:
    victim = server(target)
    outcome, expected = asked(closed, way, target, victim.port)  # traps 12, 13
    if outcome:
        assert outcome == (expected or f"denied-{word}")
    assert http_wire.uncalled(victim)


@pytest.mark.parametrize("way", [way for way in WAYS if way not in ("GET", "UDP")])
@pytest.mark.parametrize(
    "target",
    "127.0.0.1 [::ffff:127.0.0.1] [2002:7f00:1::] 0.0.0.0".split()
    + addresses.LOCALHOST,
)
def test_the_gateway_itself_is_reached_by_no_way(
    opened: running.Gateway, target: str, way: str
) -> None:  # a GET gets one of its pages, and it listens on no UDP port
    outcome, expected = asked(opened, way, target, opened.address[1])
    bind = "denied-" if way == "SOCKS5 BIND" else "-"  # it asks for no port
    assert outcome in ("loop", expected) or outcome.startswith(bind)


@pytest.mark.parametrize("way", WAYS)
def test_an_own_address_is_reached_by_no_way(natwork: running.Start, way: str) -> None:
    address = addresses.here(socket.AF_INET, "198.51.100.1")
    if not address or address.startswith("127."):
        needs.unavailable("this box has loopback addresses only")
    started = natwork(f"rules=allow to {MARK}", "inside=127.0.0.0/8", loopback=False)
    with socket.create_server((address, 0)) as victim:
        victim.settimeout(0)
        outcome, expected = asked(started, way, address, victim.getsockname()[1])
        assert outcome == (expected or "denied-own")
        with pytest.raises(BlockingIOError):
            victim.accept()


@pytest.mark.parametrize("way", [way for way in WAYS if "name" in way or way == "UDP"])
@pytest.mark.parametrize(
    "host",
    "127.1 127.0.1 0x7f.1 0x7f000001 017700000001 2130706433 0 0177.0.0.1".split(),
)
def test_what_only_a_resolver_takes_for_an_address_is_no_name(
    closed: running.Gateway,
    server: Callable[[str], origins.Origin],
    host: str,
    way: str,
) -> None:
    victim = server(host)
    if way == "UDP":
        udp(closed, host, victim.port)
    else:
        closed.at_rest()
        count = len(closed.lines())
        write = {
            "SOCKS4a name": socks_wire.four,
            "SOCKS5 name": lambda h, p: (
                socks_wire.HELLO + socks_wire.five(socks_wire.named(h, p))
            ),
        }
        with closed.connect() as client:
            client.sendall(write[way](host, victim.port))
            told = wire.read_all(client)
        assert told[:2] == b"\0\x5b" or told[2:4] == b"\5\1"
        wait.until(lambda: closed.lines(count + 1)[-1]["outcome"] == "bad-request")
    assert http_wire.uncalled(victim)
