"""Every way in meets the same rules: closed addresses are reached by none of them.

A way is one entry of WAYS; whoever adds a protocol adds one.
"""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Callable
from collections.abc import Iterator
from typing import NamedTuple

import pytest
from box import unavailable
from conftest import Gateway
from conftest import Origin
from conftest import eventually
from conftest import read_all
from running import idle
from sockswire import HELLO
from sockswire import UdpEcho
from sockswire import addressed
from sockswire import associated
from sockswire import five
from sockswire import four
from sockswire import named
from sockswire import packed
from test_rules import TARGETS
from test_rules import here
from wire import Script
from wire import request
from wire import send
from wire import shared
from wire import uncalled

MARK = "127.0.0.77"  # the one loopback address that the rules open, for udp()
RULES = f"allow to *; allow port 1-65535; allow to localhost; allow to {MARK}"
OPEN = "allow to 0.0.0.0/0, ::/0 port 1-65535"

# Asks a gateway for a host and port; returns the outcome that the log is to
# tell, "" for the rule's own.
Ask = Callable[[Gateway, str, int], str]


class Way(NamedTuple):
    takes: Callable[[str], object]  # says whether it can ask for such a host
    ask: Ask


def tcp(write: Callable[[str, int], bytes], refused: Callable[[bytes], object]) -> Ask:
    """Return a way that sends some bytes and checks that the answer is a refusal."""

    def ask(gateway: Gateway, host: str, port: int) -> str:
        with gateway.connect() as client:
            send(client, write(host, port))
            answer = read_all(client)
        assert refused(answer), answer
        return ""

    return ask


def http(method: bytes) -> Ask:
    """Return the way of an HTTP request that asks for the end of the connection."""

    def write(host: str, port: int) -> bytes:
        place = (f"[{host}]:{port}" if ":" in host else f"{host}:{port}").encode()
        return request(place, b"Connection: close", method=method)

    return tcp(write, lambda answer: answer[:12] in (b"HTTP/1.1 403", b"HTTP/1.1 502"))


def udp(gateway: Gateway, host: str, port: int) -> str:
    """Send a datagram that is to be dropped, and one behind it that passes."""
    mark = UdpEcho(MARK)
    with contextlib.closing(mark), contextlib.ExitStack() as stack:
        victim = stack.enter_context(
            socket.socket(
                socket.AF_INET6 if host == "::1" else socket.AF_INET, socket.SOCK_DGRAM
            )
        )
        victim.bind(("::1" if host == "::1" else "127.0.0.1", port))
        victim.settimeout(0)
        client = stack.enter_context(associated(gateway))
        client.send(addressed(host, port), b"to be dropped")
        assert client.exchange(addressed(MARK, mark.port), b"mark")[1] == b"mark"
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
        lambda host: len(packed(host)) == 4 and packed(host)[:3] != bytes(3),
        tcp(four, rejected),
    ),
    "SOCKS4a name": Way(
        lambda host: True,
        tcp(lambda host, port: four("x", port)[:-2] + host.encode() + b"\0", rejected),
    ),
    "SOCKS5 address": Way(
        packed, tcp(lambda host, port: HELLO + five(addressed(host, port)), ruled_out)
    ),
    "SOCKS5 name": Way(
        lambda host: True,
        tcp(lambda host, port: HELLO + five(named(host, port)), ruled_out),
    ),
    "SOCKS5 BIND": Way(
        lambda host: True,
        tcp(lambda host, port: HELLO + five(named(host, port), 2), ruled_out),
    ),
    "UDP": Way(lambda host: True, udp),
}

closed = shared(f"rules={RULES}")
opened = shared(f"rules={OPEN}")


def asked(gateway: Gateway, way: str, target: str, port: int) -> tuple[str, str]:
    """Ask for a target by a way; return the outcome told, and the one expected."""
    host = target.strip("[]")
    if not WAYS[way].takes(host):
        return "", ""
    eventually(lambda: idle(gateway) == gateway.workers())
    count = len(gateway.lines())
    expected = WAYS[way].ask(gateway, host, port)
    line = gateway.lines(count + 1)[count]
    if not expected:
        assert (line["address"], line["source"], line["up"]) == ("-", "-", "0")
    return line["outcome"], expected


@pytest.fixture
def server() -> Iterator[Callable[[str], Origin]]:
    """Return a function that starts the server that is not to be called."""
    with contextlib.ExitStack() as stack:

        def start(target: str) -> Origin:
            one = Origin(Script(), "::1" if target == "[::1]" else "127.0.0.1")
            stack.callback(one.listener.close)
            stack.callback(one.listener.shutdown, socket.SHUT_RDWR)
            return one

        yield start


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("word", "target"), TARGETS)
def test_a_closed_address_is_reached_by_no_way(
    closed: Gateway,
    server: Callable[[str], Origin],
    word: str,
    target: str,
    way: str,
) -> None:
    victim = server(target)
    outcome, expected = asked(closed, way, target, victim.port)  # traps 12, 13
    if outcome:
        assert outcome == (expected or f"denied-{word}")
    assert uncalled(victim)


@pytest.mark.parametrize("way", [way for way in WAYS if way not in ("GET", "UDP")])
@pytest.mark.parametrize(
    "target", "127.0.0.1 localhost [::ffff:127.0.0.1] [2002:7f00:1::] 0.0.0.0".split()
)
def test_the_gateway_itself_is_reached_by_no_way(
    opened: Gateway, target: str, way: str
) -> None:  # a GET gets one of its pages, and it listens on no UDP port
    outcome, expected = asked(opened, way, target, opened.address[1])
    assert outcome in ("loop", expected)


@pytest.mark.parametrize("way", WAYS)
def test_an_own_address_is_reached_by_no_way(
    natwork: Callable[..., Gateway], way: str
) -> None:
    address = here(socket.AF_INET, "198.51.100.1")
    if not address or address.startswith("127."):
        unavailable("this box has loopback addresses only")
    running = natwork(f"rules=allow to {MARK}", "inside=127.0.0.0/8", loopback=False)
    with socket.create_server((address, 0)) as victim:
        victim.settimeout(0)
        outcome, expected = asked(running, way, address, victim.getsockname()[1])
        assert outcome == (expected or "denied-own")
        with pytest.raises(BlockingIOError):
            victim.accept()


@pytest.mark.parametrize("way", [way for way in WAYS if "name" in way or way == "UDP"])
@pytest.mark.parametrize(
    "host",
    "127.1 127.0.1 0x7f.1 0x7f000001 017700000001 2130706433 0 0177.0.0.1".split(),
)
def test_what_only_a_resolver_takes_for_an_address_is_no_name(
    closed: Gateway, server: Callable[[str], Origin], host: str, way: str
) -> None:
    victim = server(host)
    if way == "UDP":
        udp(closed, host, victim.port)
    else:
        count = len(closed.lines())
        write = {
            "SOCKS4a name": four,
            "SOCKS5 name": lambda h, p: HELLO + five(named(h, p)),
        }
        with closed.connect() as client:
            client.sendall(write[way](host, victim.port))
            told = read_all(client)
        assert told[:2] == b"\0\x5b" or told[2:4] == b"\5\1"
        eventually(lambda: closed.lines(count + 1)[-1]["outcome"] == "bad-request")
    assert uncalled(victim)
