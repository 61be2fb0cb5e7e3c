"""Every pair of NATs: a hole or the relay, by TCP and by UDP."""

from __future__ import annotations

import itertools
import os
import socket
import time
from concurrent.futures import ThreadPoolExecutor

import natlab
import punching

KINDS = list(natlab.KINDS)
PAIRS = list(itertools.combinations_with_replacement(KINDS, 2))
RANDOM = {"random", "fully"}


def expected(pair: tuple[str, str]) -> str:
    """Return what can be got: two that are not to be foreseen get no hole."""
    hard = [kind for kind in pair if kind in RANDOM or kind == "sequential"]
    return "relay" if len(hard) == 2 and RANDOM & set(pair) else "direct"


def by_tcp(lab: natlab.Lab) -> list[str]:
    """Return what the two get for a stream, and that it is carried."""
    peers = [punching.peer(lab, place, "room") for place in "ab"]
    found = [punching.got(process) for process in peers]
    punching.talk(*peers)
    return found


def by_udp(lab: natlab.Lab) -> list[str]:
    """Return what the two get for datagrams, and that these are carried."""
    far = punching.peer(lab, "b", "room", "--udp", "--to", "127.0.0.1:7007")
    near = punching.peer(lab, "a", "room", "--udp", "--listen", "7007")
    found = [punching.got(process) for process in (far, near)]
    here = lab.within("a", lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
    there = lab.within("b", lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
    with here, there:
        there.bind(("127.0.0.1", 7007))
        here.connect(("127.0.0.1", 7007))
        here.settimeout(5)
        there.settimeout(5)
        here.send(b"ping")
        data, source = there.recvfrom(100)
        there.sendto(b"pong", source)
        assert (data, here.recv(100)) == (b"ping", b"pong")
    for process in (far, near):
        process.terminate()
        _, said = process.communicate(timeout=10)
        assert process.returncode == 0 and b"Traceback" not in said, (
            process.returncode,
            said,
        )
    return found


def result(pair: tuple[str, str]) -> dict[str, tuple[list[str], float]]:
    """Return what a pair gets, in a lab of its own, and in how many seconds."""
    found = {}
    with natlab.lab(*pair) as lab, punching.server(lab):
        for name, way in (("tcp", by_tcp), ("udp", by_udp)):
            start = time.monotonic()
            found[name] = way(lab), time.monotonic() - start
    return found


def test_every_pair_gets_what_can_be_got() -> None:
    with ThreadPoolExecutor(2 * (os.cpu_count() or 1)) as pool:
        results = dict(zip(PAIRS, pool.map(result, PAIRS)))
    wrong = {
        (pair, name): (got, seconds)
        for pair, ways in results.items()
        for name, (got, seconds) in ways.items()
        if got != [expected(pair)] * 2 or seconds > 8
    }
    ways = [expected(pair) for pair in PAIRS]
    assert (ways.count("direct"), ways.count("relay")) == (23, 5)
    assert not wrong
