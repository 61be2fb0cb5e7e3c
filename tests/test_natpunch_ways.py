"""What happens to a pair: late sides, careless gateways, ends, deaths, TLS."""

from __future__ import annotations

import contextlib
import hmac
import itertools
import os
import re
import select
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
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
from test_natpunch_server import Client

import natpunch

DROP = "table ip no { chain no { type filter hook forward priority -5; "
FAMILIES = {"127.0.0.1": socket.AF_INET, "::1": socket.AF_INET6}
Pair = tuple[subprocess.Popen[bytes], subprocess.Popen[bytes]]


def new_pythons() -> list[str]:
    """Return the interpreters here that can make TLS of a secret."""
    paths = [*Path.home().glob(".pyenv/versions/3.1[3-9]*/bin/python3")]
    paths += [Path(sys.executable)]
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
    assert "the stream is " in punching.read_line(other)
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
    assert "the stream is " in punching.read_line(other)
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


@pytest.mark.parametrize("closed", ["<", ">", "2>"])
def test_what_is_closed_at_the_start_is_not_taken_for_the_stream(
    closed: str, relayed: natlab.Lab
) -> None:
    shell = ["sh", "-c", f'exec "$@" {closed}&-', "sh"]
    command = punching.words("-s", relayed.servers[0], room := f"closed {closed}")
    one = relayed.start("a", *shell, *command, **punching.ENVIRONMENT)
    other = punching.peer(relayed, "b", room)
    if closed != "<":
        write(one, b"from one")
    write(other, b"from the other")
    close(one)
    close(other)
    outputs = [process.communicate(timeout=30) for process in (one, other)]
    expected = [b"" if closed == ">" else b"from the other"]
    expected += [b"" if closed == "<" else b"from one"]
    assert [out for out, _ in outputs] == expected, outputs
    assert one.returncode == other.returncode == 0


def test_standard_output_may_be_a_socket(lab: natlab.Lab) -> None:
    # One program reads and writes at once, the other writes all before it reads.
    size = 8 << 20
    ours, theirs = socket.socketpair()
    with ours:
        command = punching.words("-s", lab.servers[0], "sockets")
        how = {"given": theirs.fileno(), "output": theirs.fileno()}
        one = lab.start("a", *command, **how, **punching.ENVIRONMENT)
        theirs.close()
        other = punching.peer(lab, "b", "sockets")
        assert punching.got(one) == punching.got(other) == "direct"
        ours.settimeout(20)
        with ThreadPoolExecutor(2) as pool:
            for work in (lambda: write(other, bytes(size)), lambda: read(other, size)):
                pool.submit(work)
            try:
                ours.sendall(bytes(size))  # times out where neither goes on
                ours.shutdown(socket.SHUT_WR)
                left = size
                while left and (data := ours.recv(left)):
                    left -= len(data)
                assert left == 0
                close(other)
                assert ended(one)[0] == ended(other)[0] == 0
            finally:
                one.kill()
                other.kill()


def test_a_descriptor_may_have_any_number(lab: natlab.Lab) -> None:
    # As those have that a birthday's sockets leave over.
    many = "natpunch.resource.setrlimit(7, (2000, 2000)); " + (
        "[natpunch.os.open('/dev/null', 0) for _ in range(1100)]"
    )
    punching.talk(*pair(lab, "direct", changed=many))


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
    with ThreadPoolExecutor(10) as pool:
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


FIREWALL = """table ip no { chain no { type filter hook input priority 0;
udp dport 7011 reject with icmp type host-prohibited; }; }"""


@pytest.mark.parametrize("by", ["host", "firewall"])
def test_datagrams_for_nobody_leave_the_hole_as_it_is(by: str, lab: natlab.Lab) -> None:
    if by == "firewall":
        lab.nft("b", FIREWALL)
    far = punching.peer(lab, "b", "nobody", "--udp", "--to", "127.0.0.1:7011")
    near = punching.peer(lab, "a", "nobody", "--udp", "--listen", "7010")
    assert punching.got(far) == punching.got(near) == "direct"
    with lab.within("a", lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) as a:
        with lab.within(
            "b", lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        ) as b:
            for _ in range(5):
                a.sendto(b"to nobody", ("127.0.0.1", 7010))
                time.sleep(0.05)  # so that each has its own refusal
            if by == "firewall":
                lab.nft("b", "delete table ip no")
            lab.within("b", lambda: b.bind(("127.0.0.1", 7011)))
            b.settimeout(0.2)

            def arrives() -> bool:
                a.sendto(b"to somebody", ("127.0.0.1", 7010))
                with contextlib.suppress(TimeoutError):
                    return b.recv(100) == b"to somebody"
                return False

            wait.until(arrives)
    assert not select_errors(near) and not select_errors(far)
    for process in (near, far):
        process.terminate()
        assert process.wait(10) == 0


@pytest.mark.parametrize("by", ["client", "server"])
def test_datagrams_that_may_not_be_relayed_are_given_up(by: str) -> None:
    options = ("--direct-only",) if by == "client" else ()
    with natlab.lab("fully", "fully") as lab:
        with punching.server(lab, *["--no-relay"][len(options) :]):
            ends = [("a", "--listen", "7002"), ("b", "--to", "127.0.0.1:9")]
            for process in [
                punching.peer(lab, at, "room", "--udp", *how, *options)
                for at, *how in ends
            ]:
                assert ended(process, 20) == (
                    1,
                    "natpunch: cannot reach the peer: "
                    "no hole could be made, and it may not be relayed",
                )


def test_a_stream_that_may_not_be_relayed_costs_one_call(relayed: natlab.Lab) -> None:
    # The NAT of the next one may be another.
    late = "make = natpunch.socket.create_server; natpunch.socket.create_server = "
    late += "lambda *at, **how: (make(*at, **how), natpunch.time.sleep(0.5))[0]"
    far = punching.peer(relayed, "b", "calls", "--to", "127.0.0.1:9", "--direct-only")
    words = "--listen", "7022", "--direct-only"  # the first caller comes at once
    near = punching.peer(relayed, "a", "calls", *words, changed=late)
    wait.until(lambda: listening(relayed, 7022))
    here = ("127.0.0.1", 7022)
    for _ in range(2):
        with relayed.within("a", lambda: socket.create_connection(here, 5)) as client:
            with pytest.raises(ConnectionResetError):
                client.recv(1)
        for process in (near, far):
            said = punching.read_line(process)
            assert said.endswith("could be made, and it may not be relayed\n"), said
    for process in (near, far):
        process.terminate()
        assert process.wait(10) == 0


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
    " lambda sock, *words: tell(sock, *(('round', 'same', 0, '203.0.113.66', 9)"
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
    pythons = {*NEW_PYTHONS, sys.executable}
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


# Of the words that a peer hears: its role, and the other's nonce and what it can.
ALTERED = {
    "another word": "[role, words[0], 'other']",
    "more words": "[role, *([*more, *words] if role == '0' else [*words, *more])]",
}


@pytest.mark.parametrize("how", ALTERED)
def test_a_server_that_alters_what_was_agreed_gets_no_pair(
    how: str, lab: natlab.Lab
) -> None:
    # As one that wants a stream to be plain would.
    alters = (
        "natpunch.ANSWER_TIME = 1; natpunch.ROUNDS = {1: ((0.3, False),)}; "
        "hear = natpunch.hear; "
        "alter = lambda role, *words, more=['0', 'plain']: "
        f"{ALTERED[how]}; "
        "natpunch.hear = lambda sock, word, until: alter(*hear(sock, word, until))"
        " if word == 'paired' else hear(sock, word, until)"
    )
    peers = [punching.peer(lab, at, "altered", changed=alters) for at in "ab"]
    for process in peers:
        code, said = ended(process, 30)
        assert code == 1 and said.startswith("natpunch: cannot reach the peer: ")


# A server that is none, or that a peer has lied to.


@contextlib.contextmanager
def pretending(*answers: str, hangs: bool = True) -> Iterator[str]:
    """Be a server that says these lines, one after each of the client's, and no more.

    What it sees of other connections it keeps to itself.
    """
    over = threading.Event()

    def pretend() -> None:
        client, _ = listener.accept()
        with client, client.makefile("rb") as lines:
            for answer in answers:
                lines.readline()
                client.sendall(answer.encode() + b"\n")
            if not hangs:
                client.shutdown(socket.SHUT_RDWR)
            with contextlib.suppress(OSError):
                while not over.is_set():
                    listener.accept()[0].close()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        with ThreadPoolExecutor(1) as pool:
            pool.submit(pretend)
            address = listener.getsockname()
            try:
                yield "%s:%d" % address
            finally:
                over.set()
                for _ in range(2):  # one for each accept() that may be waiting
                    socket.create_connection(address).close()


@contextlib.contextmanager
def asking(
    server: str, *options: str, changed: str = ""
) -> Iterator[subprocess.Popen[bytes]]:
    """Run a peer that asks a server of this machine."""
    with subprocess.Popen(
        punching.words("-s", server, "room", *options, changed=changed),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, **punching.ENVIRONMENT},
    ) as process:
        try:
            yield process
        finally:
            process.kill()


MEETS = f"natpunch {'0' * 32}", f"paired 0 {'0' * 32} plain"
HOPELESS = "peer random 0 127.0.0.1 9"


def hung(*answers: str) -> None:
    """Let a client meet a server, or a peer, that stops there."""
    with pretending(*answers) as server, asking(server) as process:
        code, said = ended(process, 24)  # 8 s are what a result takes at most
        assert code == 1 and said.startswith("natpunch: cannot reach the peer: ")


def test_a_server_or_a_peer_that_hangs_is_given_up() -> None:
    at_once(hung, [MEETS, (*MEETS, HOPELESS)])


def test_a_server_that_drips_is_given_up_in_time() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:

        def drip() -> None:
            with contextlib.suppress(OSError):
                for _ in range(200):
                    theirs.send(b"x")
                    time.sleep(0.05)

        thread = threading.Thread(target=drip)
        thread.start()
        began = time.monotonic()
        with pytest.raises(TimeoutError):
            natpunch.hear(ours, "x", began + 0.3)
        assert time.monotonic() - began < 2
        ours.close()
        thread.join()


@pytest.mark.parametrize("end", ["pipe", "far end"])
def test_a_server_that_hangs_in_the_room_is_left(end: str) -> None:
    quick = "natpunch.WAIT_TIME, natpunch.ANSWER_TIME = 1, 0.5"
    options = ("--to", "127.0.0.1:9") if end == "far end" else ()
    with pretending(MEETS[0]) as server:
        with asking(server, *options, changed=quick) as process:
            said = f"natpunch: cannot meet in room at {server}: timed out"
            if end == "far end":
                assert punching.read_line(process, 5) == f"{said}; waiting\n"
            else:
                assert ended(process, 5) == (1, said)


def test_a_server_that_hangs_is_waited_for_as_long_as_told() -> None:
    with pretending() as server, asking(server, "--wait", "0.3") as process:
        code, said = ended(process, 7)
        assert code == 1 and said.endswith(": nobody came in 0.3 s")


def test_a_peer_that_goes_when_it_is_relayed_has_left_at_once() -> None:
    with pretending(*MEETS, HOPELESS, "relay", hangs=False) as server:
        with asking(server) as process:
            why = "the (peer has left, or has another secret|server has left)"
            said = punching.read_line(process, 5)
            assert re.fullmatch(f"natpunch: cannot reach the peer: {why}\n", said)
            assert ended(process, 5) == (1, "")


TOLD = [
    "peer same 0 127.0.0.1 -1",
    "peer same 0 127.0.0.1 9 10.1.1.1 99999999",
    "peer same 0 127.0.0.1 9 10.1.1.1",
    "peer step -9999999 127.0.0.1 9",
    "peer \33[31m 0 127.0.0.1 9",
]


def hear_of_a_peer(told: str, *options: str) -> None:
    """Let a client be told something of its peer."""
    with pretending(*MEETS, told) as server, asking(server, *options) as process:
        said = punching.read_line(process, 24)
        assert said.startswith("natpunch: cannot reach the peer: "), said
        assert "\33" not in said


def test_what_is_told_of_a_peer_is_no_traceback() -> None:
    udp = ("--udp", "--to", "127.0.0.1:9")
    at_once(hear_of_a_peer, [(told, *how) for told in TOLD for how in ((), udp)])


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


def echoed(lab: natlab.Lab, text: bytes, seconds: float = 15) -> bool:
    """Return whether a text comes back through a local port of a."""
    place = ("127.0.0.1", 7008)
    with lab.within("a", socket.socket) as sock:
        sock.settimeout(seconds)
        with contextlib.suppress(ConnectionError):  # as the target's would be
            sock.connect(place)
            sock.sendall(text)
            with contextlib.suppress(OSError):  # "not connected": it was just now
                sock.shutdown(socket.SHUT_WR)
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


def test_more_calls_than_the_server_has_places_are_all_carried() -> None:
    with natlab.lab("port", "port") as lab, punching.server(lab):
        target = lab.start("b", sys.executable, "-c", ECHO)
        assert punching.read_line(target) == "ready\n"
        near = punching.peer(lab, "a", "calls", "--listen", "7008")
        wait.until(lambda: listening(lab, 7008))

        def call(number: int) -> str:
            try:
                return "echoed" if echoed(lab, b"%d" % number, 40) else "cut off"
            except OSError as error:
                return str(error)

        with ThreadPoolExecutor(40) as pool:
            calls = pool.map(call, range(40))
            time.sleep(0.5)
            assert not select_errors(near)  # all but one have not met the server
            far = punching.peer(lab, "b", "calls", "--to", "127.0.0.1:7007")
            answers = {*calls}
        assert answers == {"echoed"} and far.poll() is None


def abort(sock: socket.socket) -> None:
    """Reset a connection."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


def test_a_client_may_end_or_go_while_it_waits() -> None:
    here, there = ("127.0.0.1", 7008), ("127.0.0.1", 7007)
    with natlab.lab() as lab, punching.server(lab):
        near = punching.peer(lab, "a", "calls", "--listen", "7008")
        wait.until(lambda: listening(lab, 7008))

        def client() -> socket.socket:
            return lab.within("a", lambda: socket.create_connection(here, 15))

        for end in (socket.socket.close, abort) * 9:
            end(client())
        with client() as first, client() as last:
            first.shutdown(socket.SHUT_WR)  # as nc -N does without input
            last.sendall(b"still here")
            with lab.within("b", lambda: socket.create_server(there)) as target:
                target.settimeout(15)
                punching.peer(lab, "b", "calls", "--to", "127.0.0.1:7007")
                said = []
                for _ in range(20):
                    with target.accept()[0] as server:
                        with contextlib.suppress(ConnectionResetError):
                            server.sendall(b"hello")
                            said.append(server.recv(10, socket.MSG_WAITALL))
                assert set(said) == {b"", b"still here"}
                for sock in (first, last):
                    assert sock.recv(5, socket.MSG_WAITALL) == b"hello"
        assert near.poll() is None


def test_a_stream_outlives_its_listener_and_does_not_hold_the_port() -> None:
    with natlab.lab() as lab, punching.server(lab):
        target = lab.start("b", sys.executable, "-c", ECHO)
        assert punching.read_line(target) == "ready\n"
        punching.peer(lab, "b", "calls", "--to", "127.0.0.1:7007")
        near = punching.peer(lab, "a", "calls", "--listen", "7008")
        wait.until(lambda: listening(lab, 7008))
        here = ("127.0.0.1", 7008)
        with lab.within("a", lambda: socket.create_connection(here, 5)) as client:
            client.settimeout(15)
            client.sendall(b"one")
            assert client.recv(3, socket.MSG_WAITALL) == b"one"
            for place, port in (("a", "sport = 7008"), ("b", "dport = 7007")):
                said = lab.run(place, "ss", "-Htno", *port.split()).stdout
                assert "timer:(keepalive" in said, said  # its machine may vanish
            near.terminate()
            assert near.wait(10) == 0
            client.sendall(b"two")
            assert client.recv(3, socket.MSG_WAITALL) == b"two"
            with pytest.raises(ConnectionRefusedError):
                lab.within("a", lambda: socket.create_connection(here, 5)).close()
            punching.peer(lab, "a", "calls", "--listen", "7008")
            wait.until(lambda: listening(lab, 7008))
            assert echoed(lab, b"three")


# As a user who may have four processes, and read all the same what Python imports.
USER = f"setpriv --ruid {20000 + os.getpid() % 40000}"
LIMITED = f"{USER} --bounding-set -sys_admin,-sys_resource prlimit --nproc=4"


@pytest.mark.parametrize("end", ["--to", "--listen"])
def test_a_fork_that_fails_costs_one_call(end: str) -> None:
    needs.programs("setpriv", "prlimit")
    with natlab.lab() as lab, punching.server(lab):
        target = lab.start("b", sys.executable, "-c", ECHO)
        assert punching.read_line(target) == "ready\n"
        sleep = [*USER.split(), "sleep", "60"]
        others = [lab.start("middle", *sleep) for _ in range(3)]
        for process in others:
            wait.until(lambda: kernel.title(process.pid) == "sleep")  # noqa: B023
        ends = {}
        for place, *how in (("b", "--to", "127.0.0.1:7007"), ("a", "--listen", "7008")):
            words = LIMITED.split() if how[0] == end else []
            words += punching.words("-s", lab.servers[0], "calls", *how)
            ends[how[0]] = lab.start(place, *words, **punching.ENVIRONMENT)
        wait.until(lambda: listening(lab, 7008))
        with lab.within("a", socket.socket) as client:
            client.connect_ex(("127.0.0.1", 7008))  # it may be reset at once
            said = punching.read_line(ends[end])
        why = "resource temporarily unavailable"
        assert re.fullmatch(f"natpunch: cannot .*: {why}.*\n", said), said
        for process in others:
            process.kill()
            process.wait(10)
        assert echoed(lab, b"again")
        assert not [name for name, process in ends.items() if process.poll()]


NO_FILE = "lambda *_: (_ for _ in ()).throw(OSError(24, 'Too many open files'))"


def test_a_local_port_that_can_take_nobody_says_so(lab: natlab.Lab) -> None:
    none = f"natpunch.socket.socket.accept = {NO_FILE}"
    near = punching.peer(lab, "a", "calls", "--listen", "7023", changed=none)
    assert ended(near) == (1, "natpunch: cannot take a client: too many open files")


def test_a_call_without_descriptors_ends_alone(lab: natlab.Lab) -> None:
    none = f"natpunch.os.dup = {NO_FILE}"
    punching.peer(lab, "b", "dup", "--to", "127.0.0.1:9")
    near = punching.peer(lab, "a", "dup", "--listen", "7024", changed=none)
    wait.until(lambda: listening(lab, 7024))
    for _ in range(2):
        with lab.within("a", socket.socket) as client:
            client.connect_ex(("127.0.0.1", 7024))
            while "direct" in (said := punching.read_line(near)) or " is " in said:
                pass
            assert said == "natpunch: cannot carry the stream: too many open files\n"
        wait.until(lambda: not kernel.children(near.pid))
    near.terminate()
    assert ended(near) == (0, "")


def test_a_far_end_dials_nobody_for_who_does_not_prove_the_secret(
    lab: natlab.Lab,
) -> None:
    there = ("127.0.0.1", 7018)
    with lab.within("b", lambda: socket.create_server(there)) as target:
        far = punching.peer(lab, "b", "proof", "--to", "127.0.0.1:7018")
        room = hmac.digest(punching.SECRET.encode(), b"room proof 1", "sha256")[:16]
        client = Client(lab, "a")
        client.join(room.hex(), "call")
        _, role, *_ = client.hear().split()
        client.say("round random 0 10.0.0.2 9")
        assert client.hear().startswith("peer ")
        client.sock.settimeout(15)
        if role == "0":
            client.say("relay")
        assert client.hear() == "relay"
        assert not select.select([target], [], [], 0.5)[0]
        client.sock.close()
        far.kill()


@pytest.mark.parametrize("cut", ["caller", "client", "target"])
@pytest.mark.parametrize("way", ["direct", "relay"])
def test_a_stream_that_is_cut_off_does_not_look_complete(
    way: str, cut: str, lab: natlab.Lab, relayed: natlab.Lab
) -> None:
    where, room = lab if way == "direct" else relayed, f"cut {cut}"
    port = 7200 + 2 * next(ROOMS)
    here, there = ("127.0.0.1", port), ("127.0.0.1", port + 1)
    with where.within("b", lambda: socket.create_server(there)) as listener:
        far = punching.peer(where, "b", room, "--to", f"127.0.0.1:{port + 1}")
        near = punching.peer(where, "a", room, "--listen", str(port))
        wait.until(lambda: listening(where, port))
        client = where.within("a", lambda: socket.create_connection(here, 5))
        client.settimeout(15)
        listener.settimeout(15)
        target, _ = listener.accept()
        target.settimeout(15)
        for one, other in ((client, target), (target, client)):
            one.sendall(b"half")
            assert other.recv(4, socket.MSG_WAITALL) == b"half"
        if cut == "caller":
            for pid in kernel.children(near.pid):
                os.kill(pid, signal.SIGKILL)
        else:
            abort(client if cut == "client" else target)
        with pytest.raises(ConnectionResetError):
            assert (client if cut == "target" else target).recv(1) != b""
    for process in (near, far):
        process.terminate()
        assert process.wait(10) == 0


@pytest.mark.parametrize("gone", ["client", "target"])
def test_a_side_that_goes_after_its_end_is_noticed(gone: str, lab: natlab.Lab) -> None:
    room, port = f"gone {gone}", 7400 + 2 * next(ROOMS)
    here, there = ("127.0.0.1", port), ("127.0.0.1", port + 1)
    with lab.within("b", lambda: socket.create_server(there)) as listener:
        far = punching.peer(lab, "b", room, "--to", f"127.0.0.1:{port + 1}")
        near = punching.peer(lab, "a", room, "--listen", str(port))
        wait.until(lambda: listening(lab, port))
        client = lab.within("a", lambda: socket.create_connection(here, 5))
        listener.settimeout(15)
        with client, listener.accept()[0] as target:
            ends = client, target
            one, other = ends if gone == "client" else ends[::-1]
            one.shutdown(socket.SHUT_WR)
            other.settimeout(15)
            assert other.recv(1) == b""
            assert all(kernel.children(process.pid) for process in (near, far))
            abort(one)
            for process in (near, far):
                wait.until(lambda: not kernel.children(process.pid))  # noqa: B023
    for process in (near, far):
        process.terminate()
        assert process.wait(10) == 0


def test_few_files_are_no_failure() -> None:
    needs.programs("prlimit")
    quick = "natpunch.PAIR_TIME, natpunch.RELAY_TIME = 2.5, 2.0"
    with natlab.lab("fully", "port") as lab, punching.server(lab):
        words = punching.words("-s", lab.servers[0], "room", changed=quick)
        limited = ["prlimit", "--nofile=40", *words]
        one = lab.start("a", *limited, **punching.ENVIRONMENT)
        other = punching.peer(lab, "b", "room", changed=quick)
        assert punching.got(one) == punching.got(other) in ("direct", "relay")
        punching.talk(one, other)


def test_a_far_end_that_comes_anew_takes_the_calls() -> None:
    end = ("b", "room", "--to", "127.0.0.1:9")
    with natlab.lab() as lab, punching.server(lab):

        def connections() -> str:
            return lab.run("b", "ss", "-Htin", "dport", "=", ":3478").stdout

        old = punching.peer(lab, *end)
        wait.until(lambda: re.search("bytes_acked:[0-9]{3}", connections()))  # joined
        with kernel.stopped(old.pid):  # as one whose box has lost its power
            new = punching.peer(lab, *end)
            wait.until(lambda: "CLOSE-WAIT" in connections() or new.poll())
            caller = punching.peer(lab, "a", "room")
            assert punching.got(new) == "direct"
            assert punching.got(caller) == "direct"
        assert ended(old)[1].endswith(": the room is taken")
        new.terminate()
        assert new.wait(10) == 0


@pytest.mark.parametrize("is_udp", [False, True])
@pytest.mark.parametrize("hosts", [("::1", "127.0.0.1"), ("127.0.0.1", "::1")])
def test_a_local_end_may_have_an_address_of_ipv6(
    is_udp: bool, hosts: tuple[str, str], lab: natlab.Lab
) -> None:
    kind = socket.SOCK_DGRAM if is_udp else socket.SOCK_STREAM
    room, port = f"six {next(ROOMS)}", 7300 + 2 * next(ROOMS)
    client, target = [
        lab.within(place, lambda: socket.socket(FAMILIES[host], kind))  # noqa: B023
        for place, host in zip("ab", hosts)
    ]
    with client, target:
        lab.within("b", lambda: target.bind((hosts[1], port + 1)))
        if not is_udp:
            target.listen()
        udp = ["--udp"] * is_udp
        spelled = [f"[{hosts[0]}]:{port}", f"[{hosts[1]}]:{port + 1}"]
        near = punching.peer(lab, "a", room, *udp, "--listen", spelled[0])
        far = punching.peer(lab, "b", room, *udp, "--to", spelled[1])
        if is_udp:
            for process in [near, far][:: 1 if hosts[0] == "::1" else -1]:
                assert punching.got(process) == "direct"
        for sock in (client, target):
            sock.settimeout(15)

        def connects() -> bool:
            assert near.poll() is None, punching.read_line(near)
            return client.connect_ex((hosts[0], port)) == 0

        wait.until(connects)
        client.sendall(b"hello")
        server = target if is_udp else target.accept()[0]
        data, source = server.recvfrom(5)
        assert data == b"hello"
        server.sendto(b"world", source) if is_udp else server.sendall(b"world")
        assert client.recv(5) == b"world"
    for process in (near, far):
        process.terminate()
        assert process.wait(10) == 0


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
        assert punching.read_line(far).endswith("the server has left; waiting\n")
        assert punching.read_line(far).endswith("refused; waiting\n")
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


def test_no_hole_is_tried_between_ipv4_and_ipv6() -> None:
    with natlab.lab() as lab:
        server = lab.start("server", *punching.words("serve", "127.0.0.1", "::1"))
        for _ in range(2):
            assert "natpunch: serving on" in punching.read_line(server)
        pair = []
        for lab.servers in (["127.0.0.1"], ["::1"]):
            pair.append(punching.peer(lab, "server", "room"))
        began = time.monotonic()
        for process in pair:
            assert punching.read_line(process) == "natpunch: relay (same-same)\n"
        assert time.monotonic() - began < 5  # the rounds have six seconds
        punching.talk(*pair)


# Time: a reader that pauses, a peer that is gone, a server that is away.

QUICK = "natpunch.KEEP_ALIVE, natpunch.SILENCE, natpunch.RETRY_TIME = 1.0, 2.0, 0.3"
KINDS = {"direct": ("port", "port"), "relay": ("fully", "fully")}


@contextlib.contextmanager
def written(lab: natlab.Lab) -> Iterator[Pair]:
    """Yield a writer with more to write than is read, and its reader."""
    kinds = [punching.peer(lab, at, "much", changed=QUICK) for at in "ab"]
    assert punching.got(kinds[0]) == punching.got(kinds[1])
    with ThreadPoolExecutor(1) as pool:

        def fill() -> None:
            with contextlib.suppress(BrokenPipeError):
                write(kinds[0], bytes(30_000_000))
                close(kinds[0])

        pool.submit(fill)
        yield kinds[0], kinds[1]


@pytest.mark.parametrize("way", KINDS)
def test_a_reader_may_pause(way: str) -> None:
    with natlab.lab(*KINDS[way]) as lab, punching.server(lab), written(lab) as pair:
        time.sleep(3)  # longer than a peer may be silent
        close(pair[1])
        assert pair[1].stdout and len(pair[1].stdout.read()) == 30_000_000
        assert [process.wait(15) for process in pair] == [0, 0]


def test_a_peer_that_answers_nothing_has_gone() -> None:
    with natlab.lab("port", "port") as lab, punching.server(lab):
        peers = [punching.peer(lab, at, "silent", changed=QUICK) for at in "ab"]
        assert punching.got(peers[0]) == punching.got(peers[1]) == "direct"
        time.sleep(0.5)  # all that was sent has been answered
        lab.nft("nat_b", DROP + "meta l4proto tcp drop; }; }")
        for process in peers:
            assert "the stream is " in punching.read_line(process)
            said = punching.read_line(process)  # standard input is open still
            assert said == "natpunch: cannot carry the stream: connection timed out\n"
            assert ended(process)[0] == 1


def test_calls_wait_for_a_server_that_is_away() -> None:
    with natlab.lab() as lab:
        target = lab.start("b", sys.executable, "-c", ECHO)
        assert punching.read_line(target) == "ready\n"
        for at, *how in (("b", "--to", "127.0.0.1:7007"), ("a", "--listen", "7008")):
            punching.peer(lab, at, "calls", *how, changed=QUICK)
        wait.until(lambda: listening(lab, 7008))
        with ThreadPoolExecutor(1) as pool:
            answer = pool.submit(echoed, lab, b"early", 30)
            time.sleep(1)  # in which it is refused some times
            with punching.server(lab):
                assert answer.result()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_changes_nothing(lab: natlab.Lab, number: int) -> None:
    for pause in (0, 0.001, 0.01, 0.02, 0.04):
        peer = punching.peer(lab, "a", "signals", "--listen", "7021")
        wait.until(lambda: listening(lab, 7021))
        peer.send_signal(number)
        time.sleep(pause)
        peer.send_signal(number)
        assert ended(peer) == (0, "")
