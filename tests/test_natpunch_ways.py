"""What happens to a pair: late sides, careless gateways, ends, deaths, TLS."""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import select
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import kernel
import natlab
import needs
import punching
import pytest
import wait

DROP = "table ip no { chain no { type filter hook forward priority -5; "
Pair = tuple[subprocess.Popen[bytes], subprocess.Popen[bytes]]


def new_pythons() -> list[str]:
    """Return the interpreters here that can make TLS of a secret; CI has none."""
    paths = [*Path.home().glob(".pyenv/versions/3.1[3-9]*/bin/python3")]
    paths += [Path(found) for found in [shutil.which("python3.13")] if found]
    code = "import sys; print(sys.version_info >= (3, 13))"
    return sorted(
        str(path)
        for path in paths
        if b"True" in subprocess.run([path, "-c", code], capture_output=True).stdout
    )


NEW_PYTHONS = new_pythons()


ROOMS = itertools.count()  # the one before may not be empty yet


@pytest.fixture(scope="module")
def lab() -> Iterator[natlab.Lab]:
    """A lab where one peer is behind a stepping NAT, with a server."""
    with natlab.lab("port", "sequential") as made, punching.server(made):
        yield made


@pytest.fixture(scope="module")
def relayed() -> Iterator[natlab.Lab]:
    """A lab where no hole can be made, with a server."""
    with natlab.lab("fully", "fully") as made, punching.server(made):
        yield made


def pair(lab: natlab.Lab, expected: str, *options: str, **how: str) -> Pair:
    """Return two peers that have met, in a room of their own."""
    room = f"room {next(ROOMS)}"
    one, other = [punching.peer(lab, place, room, *options, **how) for place in "ab"]
    assert punching.got(one) == punching.got(other) == expected
    return one, other


def ended(process: subprocess.Popen[bytes], seconds: float = 10) -> tuple[int, str]:
    """Return how a peer ended, and its last line."""
    _, said = process.communicate(timeout=seconds)
    text = said.decode()
    assert "Traceback" not in text, text
    return process.returncode, (text.splitlines() or [""])[-1]


def write(process: subprocess.Popen[bytes], data: bytes) -> None:
    assert process.stdin
    process.stdin.write(data)
    process.stdin.flush()


def close(process: subprocess.Popen[bytes]) -> None:
    assert process.stdin
    process.stdin.close()
    process.stdin = None


def read(process: subprocess.Popen[bytes], size: int) -> bytes:
    assert process.stdout
    return process.stdout.read(size)


@pytest.mark.parametrize("way", ["direct", "relay"])
@pytest.mark.parametrize("first", [0, 1])
def test_a_side_may_end_first_and_still_listen(
    way: str, first: int, lab: natlab.Lab, relayed: natlab.Lab
) -> None:
    both = pair(lab if way == "direct" else relayed, way)
    one, other = both[first], both[1 - first]
    write(one, b"question")
    close(one)
    assert read(other, 100) == b"question"  # to its end
    time.sleep(0.3)
    write(other, b"x" * 300_000)
    close(other)
    assert read(one, 400_000) == b"x" * 300_000
    assert ended(one)[0] == ended(other)[0] == 0


def test_a_room_is_free_when_its_relay_has_ended(relayed: natlab.Lab) -> None:
    for _ in range(5):
        both = [punching.peer(relayed, place, "again and again") for place in "ab"]
        assert [punching.got(one) for one in both] == ["relay", "relay"]
        punching.talk(*both)


@pytest.mark.parametrize("way", ["direct", "relay"])
def test_a_peer_that_dies_is_not_one_that_is_done(
    way: str, lab: natlab.Lab, relayed: natlab.Lab
) -> None:
    one, other = pair(lab if way == "direct" else relayed, way)
    write(one, b"half")
    assert read(other, 4) == b"half"
    one.kill()
    last = "natpunch: cannot carry the stream: the peer has vanished\n"
    assert "the stream is plain" in punching.read_line(other)
    assert punching.read_line(other, 2) == last  # standard input is open still
    assert ended(other)[0] == 1
    if way == "relay":  # and no process of it is left
        pids = [*map(int, natlab.boxes.ip("netns", "pids", lab.name("server")).split())]
        wait.until(
            lambda: (
                len(natlab.boxes.ip("netns", "pids", relayed.name("server")).split())
                == 1
            ),
            2,
        )
        assert len(pids) == 1


def test_a_peer_that_dies_after_its_end_is_not_waited_for(lab: natlab.Lab) -> None:
    one, other = pair(lab, "direct")
    close(one)
    assert read(other, 1) == b""
    one.kill()
    assert "the stream is plain" in punching.read_line(other)
    last = "natpunch: cannot carry the stream: the peer has vanished\n"
    assert punching.read_line(other, 2) == last  # standard input is open still
    assert ended(other)[0] == 1


def test_an_interrupt_ends_both_sides_with_a_line(lab: natlab.Lab) -> None:
    one, other = pair(lab, "direct")
    one.send_signal(signal.SIGINT)
    assert ended(one)[0] == 130
    assert ended(other)[0] == 1


def test_a_file_is_carried_to_a_file(lab: natlab.Lab, tmp_path: Path) -> None:
    (tmp_path / "in").write_bytes(data := os.urandom(3_000_000))
    command = punching.words("-s", lab.servers[0], "room")
    processes = []
    for place, given, taken in (("a", "in", "/dev/null"), ("b", "/dev/null", "out")):
        with (tmp_path / given).open("rb") as source:
            with (tmp_path / taken).open("wb") as sink:
                how = {"given": source.fileno(), "output": sink.fileno()}
                started = lab.start(place, *command, **how, **punching.ENVIRONMENT)
                processes.append(started)
    assert [ended(process)[0] for process in processes] == [0, 0]
    assert (tmp_path / "out").read_bytes() == data


def late(lab: natlab.Lab, seconds: float, is_udp: bool) -> None:
    """Let one side come late."""
    room, number = f"late-{seconds}", 7100 + int(seconds * 10)
    ends = [("--udp", "--to", "127.0.0.1:9"), ("--udp", "--listen", str(number))]
    options = ends if is_udp else [(), ()]
    one = punching.peer(lab, "a", room, *options[0])
    time.sleep(seconds)
    other = punching.peer(lab, "b", room, *options[1])
    assert punching.got(one) == punching.got(other) == "direct"
    for process in (one, other):
        process.kill()


def asleep(lab: natlab.Lab, seconds: float) -> None:
    """Let one side sleep when it has met the other."""
    one, other = [punching.peer(lab, at, f"sleepy-{seconds}") for at in "ab"]
    time.sleep(0.3 if seconds < 1 else 0.15)
    with kernel.stopped(one.pid):
        time.sleep(seconds)
    assert punching.got(one) == punching.got(other) == "direct"
    punching.talk(one, other)


def at_once(function: Callable[..., None], cases: Iterable[tuple[Any, ...]]) -> None:
    """Call a function with each case, some at a time."""
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda case: function(*case), cases))


def test_one_side_may_be_late_or_asleep(lab: natlab.Lab) -> None:
    at_once(
        lambda function, *case: function(lab, *case),
        [
            (late, 0.6, 0),
            (late, 0.6, 1),
            (late, 5, 0),
            (late, 5, 1),
            (asleep, 0.6),
            (asleep, 5),
        ],
    )


def udp_pair(lab: natlab.Lab, room: str = "datagrams") -> list[str]:
    ends = [("a", "--listen", "7002"), ("b", "--to", "127.0.0.1:9")]
    peers = [punching.peer(lab, at, room, "--udp", *how) for at, *how in ends]
    return [punching.got(process) for process in peers]


def early(kinds: tuple[str, str], careless: str) -> None:
    """Let gateways take for their own what is sent to them."""
    with natlab.lab(*kinds, router=True, careless=careless) as lab:
        with punching.server(lab):
            assert udp_pair(lab) == ["direct", "direct"], (kinds, careless)


def test_gateways_that_take_what_comes_too_early() -> None:
    kinds = [("port", "port"), ("port", "sequential"), ("port", "fully")]
    at_once(early, itertools.product(kinds, ("a", "b", "ab")))


def test_ten_others_go_through_a_stepping_nat_meanwhile() -> None:
    with natlab.lab("sequential", "sequential") as lab, punching.server(lab) as server:
        other = [
            "python3",
            "-c",
            f"""
import socket, time
end = time.time() + 8
while time.time() < end:
    s = socket.socket(); s.settimeout(.5); s.connect_ex(({server!r}, 4000)); s.close()
    time.sleep(.05)
""",
        ]
        lab.start("a", *other)
        lab.start("b", *other)
        one, two = pair(lab, "direct")
        punching.talk(one, two)
        assert udp_pair(lab) == ["direct", "direct"]


def test_without_udp_a_stream_is_direct_all_the_same() -> None:
    with natlab.lab("port", "port") as lab, punching.server(lab):
        lab.nft("nat_a", DROP + "meta l4proto udp drop; }; }")
        punching.talk(*pair(lab, "direct"))
        assert udp_pair(lab) == ["relay", "relay"]


def test_a_direct_pair_outlives_the_server(tmp_path: Path) -> None:
    with natlab.lab("port", "port") as lab:
        process = lab.start("server", *punching.words("serve", *lab.servers))
        for _ in lab.servers:
            punching.read_line(process)
        one, other = pair(lab, "direct")
        waiting = punching.peer(lab, "a", "elsewhere")
        time.sleep(0.3)
        process.kill()
        assert ended(waiting)[0] == 1
        punching.talk(one, other)
        gone = punching.peer(lab, "a", "room")
        code, said = ended(gone)
        assert code == 1 and re.fullmatch(
            "natpunch: cannot meet .*: connection refused", said
        )


def test_a_hole_that_is_silent_is_punched_anew() -> None:
    quick = "natpunch.KEEP_ALIVE, natpunch.SILENCE = 1.0, 2.5"
    with natlab.lab("port", "port") as lab, punching.server(lab):
        ends = [("a", "--listen", "7002"), ("b", "--to", "127.0.0.1:9")]
        peers = [
            punching.peer(lab, at, "room", "--udp", *how, changed=quick)
            for at, *how in ends
        ]
        assert [punching.got(process) for process in peers] == ["direct", "direct"]
        time.sleep(4)  # kept alive all the time
        assert not any(select_errors(process) for process in peers)
        ours = "{ 3478, 3479 }"
        lab.nft("nat_a", DROP + f"udp dport != {ours} udp sport != {ours} drop; }}; }}")
        for process in peers:
            assert "silent for 2.5 s" in punching.read_line(process)
        lab.nft("nat_a", "delete table ip no")
        assert [last_way(process) for process in peers] == ["direct", "direct"]


def select_errors(process: subprocess.Popen[bytes]) -> bool:
    assert process.stderr
    return bool(select.select([process.stderr], [], [], 0)[0])


def last_way(process: subprocess.Popen[bytes]) -> str:
    """Return what a peer gets in the end: it may have the relay for a moment."""
    for _ in range(6):
        said = punching.got(process)
        if said == "direct":
            break
    return said


def test_a_peer_that_leaves_says_so(lab: natlab.Lab) -> None:
    far = punching.peer(lab, "b", "bye", "--udp", "--to", "127.0.0.1:9")
    near = punching.peer(lab, "a", "bye", "--udp", "--listen", "7009")
    assert punching.got(far) == punching.got(near) == "direct"
    near.terminate()
    assert ended(near)[0] == 0
    assert punching.read_line(far, 3) == (
        "natpunch: cannot carry datagrams: the peer has left; meeting again\n"
    )
    far.terminate()
    assert ended(far)[0] == 0


def test_a_datagram_that_nobody_takes_is_lost_and_no_more(lab: natlab.Lab) -> None:
    far = punching.peer(lab, "b", "none", "--udp", "--to", "127.0.0.1:7013")
    near = punching.peer(lab, "a", "none", "--udp", "--listen", "7013")
    assert punching.got(far) == punching.got(near) == "direct"
    here = lab.within("a", lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
    there = lab.within("b", lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
    with here, there:
        for _ in range(3):
            here.sendto(b"lost", ("127.0.0.1", 7013))
            time.sleep(0.1)
        there.bind(("127.0.0.1", 7013))
        there.settimeout(5)
        here.sendto(b"found", ("127.0.0.1", 7013))
        assert there.recv(100) == b"found"
    assert not select_errors(far) and not select_errors(near)


# What goes over the wire.


def sent(dump: subprocess.Popen[bytes]) -> str:
    dump.send_signal(signal.SIGINT)
    out, _ = dump.communicate(timeout=10)
    return out.decode(errors="replace")


def watched(lab: natlab.Lab, place: str, *words: str) -> subprocess.Popen[bytes]:
    """Start tcpdump on the outside of a gateway."""
    needs.programs("tcpdump")
    command = ["tcpdump", "-l", "-n", "--immediate-mode", *words, "-i", "wan"]
    dump = lab.start(place, *command)
    while "listening on" not in punching.read_line(dump):
        pass
    return dump


LIES = {
    "how": "natpunch.behavior = lambda seen: ('random', 0)",
    "steps": "natpunch.behavior = lambda seen: ('step', 16)",
    "where": "tell = natpunch.tell; natpunch.tell ="
    " lambda sock, *words: tell(sock, *(('round', 'same', 0, 9, '203.0.113.66', 9)"
    " if words[0] == 'round' else words))",
}


def believe(lie: str, is_udp: bool) -> None:
    """Let a peer lie, and see where the other one sends."""
    ends = [("--udp", "--listen", "7002"), ("--udp", "--to", "127.0.0.1:9")]
    options = ends if is_udp else [(), ()]
    with natlab.lab("port", "port") as lab, punching.server(lab):
        dump = watched(lab, "nat_a", "-q", "ip")
        one = punching.peer(lab, "a", "room", *options[0])
        punching.peer(lab, "b", "room", *options[1], changed=LIES[lie])
        punching.got(one)
        pattern = r"IP 198\.51\.100\.1\.\d+ > ([0-9.]+)\.\d+:"
        aimed = set(re.findall(pattern, sent(dump)))
        assert aimed <= {*lab.servers, lab.outside["b"]}
        assert lab.servers[0] in aimed


def test_a_liar_aims_its_peer_at_no_third_address() -> None:
    at_once(believe, itertools.product(LIES, (False, True)))


PLAIN = b"nobody shall read this, nobody shall read this"


@pytest.mark.parametrize("kind", ["port", "fully"])
def test_the_stream_is_tls_or_says_that_it_is_plain(kind: str) -> None:
    # Each Python here that can, and the one that runs this, which perhaps cannot.
    pythons = [*NEW_PYTHONS, sys.executable]
    with natlab.lab(kind, kind) as lab, punching.server(lab):
        for one in pythons:
            for other in pythons:
                check_wire(lab, one, other)


def check_wire(lab: natlab.Lab, one: str, other: str) -> None:
    """Let two Pythons talk, and look at what crosses the wire."""
    dump = watched(lab, "nat_b", "-A", "tcp")
    room = f"room-{one}-{other}"
    peers = [
        punching.peer(lab, at, room, python=python)
        for at, python in (("a", one), ("b", other))
    ]
    for process in peers:
        write(process, PLAIN)
        close(process)
    for process in peers:
        assert read(process, 1000) == PLAIN
        code, said = ended(process)
        both = one in NEW_PYTHONS and other in NEW_PYTHONS
        text = "encrypted" if both else "plain: TLS needs Python 3.13 on both sides"
        assert (code, said) == (0, f"natpunch: the stream is {text}")
    assert (PLAIN.decode() in sent(dump)) != both


def test_a_server_that_alters_what_was_agreed_gets_no_pair(lab: natlab.Lab) -> None:
    # As one that wants a stream to be plain would.
    alters = (
        "natpunch.ANSWER_TIME = 1; natpunch.ROUNDS = {1: ((0.3, False),)}; "
        "hear = natpunch.hear; "
        "natpunch.hear = lambda sock, word: [w.replace('plain', 'other')"
        " if word == 'paired' else w for w in hear(sock, word)]"
    )
    peers = [punching.peer(lab, at, "altered", changed=alters) for at in "ab"]
    for process in peers:
        code, said = ended(process, 30)
        assert code == 1 and said.startswith("natpunch: cannot reach the peer: ")


# One far end, many calls.

ECHO = """
import socket, sys, threading
def echo(sock):
    while data := sock.recv(65536):
        sock.sendall(data)
    sock.close()
server = socket.create_server(("127.0.0.1", 7007))
print("ready", file=sys.stderr, flush=True)
while True:
    threading.Thread(target=echo, args=server.accept()[:1], daemon=True).start()
"""


def echoed(lab: natlab.Lab, text: bytes) -> bool:
    """Return whether a text comes back through a local port of a."""
    place = ("127.0.0.1", 7008)
    with lab.within("a", lambda: socket.create_connection(place, 5)) as sock:
        sock.settimeout(15)
        sock.sendall(text)
        sock.shutdown(socket.SHUT_WR)
        with contextlib.suppress(ConnectionResetError):  # as the target's would be
            return b"".join(iter(lambda: sock.recv(65536), b"")) == text
    return False


@pytest.mark.parametrize("kinds", [("port", "sequential"), ("fully", "fully")])
def test_many_calls_are_carried_at_once(kinds: tuple[str, str]) -> None:
    with natlab.lab(*kinds) as lab, punching.server(lab):
        target = lab.start("b", sys.executable, "-c", ECHO)
        assert punching.read_line(target) == "ready\n"
        far = punching.peer(lab, "b", "calls", "--to", "127.0.0.1:7007")
        near = punching.peer(lab, "a", "calls", "--listen", "7008")
        wait.until(lambda: listening(lab, 7008))
        texts = [os.urandom(200_000) for _ in range(8)]
        with ThreadPoolExecutor(8) as pool:
            assert all(pool.map(lambda text: echoed(lab, text), texts))
        target.kill()
        target.wait()
        assert not echoed(lab, b"x")  # nobody is there: said, and the end goes on
        for process in (near, far):
            process.terminate()
            code, _ = ended(process)
            assert code == 0


def listening(lab: natlab.Lab, port: int) -> bool:
    with contextlib.suppress(ConnectionRefusedError):
        text = lab.within("a", Path("/proc/thread-self/net/tcp").read_text)
        return f":{port:04X} 00000000:0000 0A" in text
    return False


def test_a_far_end_outlives_its_server() -> None:
    quick = "natpunch.RETRY_TIME = 0.5"
    with natlab.lab("port", "port") as lab:
        lab.start("b", sys.executable, "-c", ECHO)
        with punching.server(lab):
            to = ("--to", "127.0.0.1:7007")
            far = punching.peer(lab, "b", "room", *to, changed=quick)
            time.sleep(0.5)
        assert punching.read_line(far).endswith("the server has left; trying again\n")
        assert punching.read_line(far).endswith("refused; trying again\n")
        with punching.server(lab):
            time.sleep(1)
            near = punching.peer(lab, "a", "room")
            assert punching.got(near) == "direct"


@pytest.mark.parametrize("kind", ["port", "fully"])
def test_two_behind_one_nat_meet_inside(kind: str) -> None:
    with natlab.lab(kind) as lab, punching.server(lab):
        one, other = [punching.peer(lab, "a", "room") for _ in range(2)]
        for process in (one, other):
            said = punching.read_line(process)
            assert said.startswith("natpunch: direct 10.0.0.2:"), said
        punching.talk(one, other)


def test_it_works_by_ipv6_too() -> None:
    with natlab.lab() as lab:
        server = lab.start("server", *punching.words("serve", "::1"))
        assert punching.read_line(server) == (
            "natpunch: serving on [::1]:3478 and 3479\n"
        )
        lab.servers = ["::1"]
        one, other = [punching.peer(lab, "server", "room") for _ in range(2)]
        for process in (one, other):
            assert punching.read_line(process).startswith("natpunch: direct [::1]:")
        punching.talk(one, other)
