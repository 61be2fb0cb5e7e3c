"""The pure parts of natpunch.py: what it reads, what it concludes, and its shape."""

from __future__ import annotations

import ast
import contextlib
import os
import select
import socket
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import running
import test_shape

import natpunch

SOURCE = (running.ROOT / "natpunch.py").read_text()
TREE = ast.parse(SOURCE)
FUNCTIONS = [n for n in ast.walk(TREE) if isinstance(n, ast.FunctionDef)]
HOST = "192.0.2.7"


@pytest.mark.parametrize(
    ("ports", "expected"),
    [
        ([], ("none", 0)),
        ([7], ("same", 0)),
        ([7, 7, 7], ("same", 0)),
        ([7, 8, 9], ("step", 1)),
        ([7, 9, 25], ("step", 2)),
        ([7, 8, 25], ("random", 0)),
        ([7, 7, 8], ("random", 0)),
        ([9, 8, 7], ("random", 0)),
        ([34999, 30000, 30001], ("random", 0)),
    ],
)
def test_a_nat_is_known_by_its_ports(
    ports: list[int], expected: tuple[str, int]
) -> None:
    assert natpunch.behavior([(HOST, port) for port in ports]) == expected


AT = HOST, 4000
ONE, AHEAD = [4000], [4000 + 2 * n for n in range(1, 25)]
TABLE = {
    ("same", "same"): (1, ONE),
    ("same", "step"): (1, AHEAD),
    ("step", "same"): (1, ONE),
    ("step", "step"): (24, [4024]),
    ("random", "same"): (256, ONE),
    ("step", "random"): (1, []),
    ("random", "step"): (1, []),
    ("random", "random"): (1, []),
    ("none", "same"): (1, []),
    ("same", "none"): (1, []),
}


@pytest.mark.parametrize("pair", TABLE)
def test_where_to_aim_is_the_table(pair: tuple[str, str]) -> None:
    count, ports = TABLE[pair]
    found = natpunch.aims(*pair, AT, 2 * (pair[1] == "step"))
    assert found == (count, [(HOST, port) for port in ports])


def test_a_birthday_aims_at_1024_ports_of_one_host() -> None:
    count, there = natpunch.aims("same", "random", AT, 0)
    assert count == 1 and len(set(there)) == 1024
    assert {host for host, _ in there} == {HOST}
    assert all(1024 <= port < 65536 for _, port in there)


# By address and port; what else is_private means is another machine's, or nobody's.
INSIDE = {
    "10.0.0.7 7": True,
    "172.31.255.254 1": True,
    "192.168.1.1 65535": True,
    "fd00::7 7": True,
    "8.8.8.8 9": False,
    "127.0.0.1 22": False,
    "0.0.0.0 22": False,
    "169.254.169.254 80": False,
    "192.0.2.66 9": False,
    "198.18.0.1 9": False,
    "255.255.255.255 9": False,
    "172.32.0.1 9": False,
    "fe80::1 22": False,
    "::ffff:10.0.0.7 7": False,
    "2001:db8::1 9": False,
    "10.0.0.7 0": False,
    "10.0.0.7 -1": False,
    "10.0.0.7 65536": False,
    "10.0.0.7 99999999": False,
}


@pytest.mark.parametrize("inside", INSIDE)
def test_inside_is_what_is_private_and_has_a_port(inside: str) -> None:
    host, port = inside.split()
    expected = [(host, int(port))] if INSIDE[inside] else []
    assert natpunch.inside_of(host, port) == expected


def test_no_port_is_beyond_the_last() -> None:
    last = HOST, 65530
    found = natpunch.aims("same", "step", last, 1)[1]
    assert [port for _, port in found] == [*range(65531, 65536)]
    assert natpunch.aims("step", "step", last, 1)[1] == []


def test_a_probe_is_known_by_key_and_role() -> None:
    one, other = natpunch.Peers(0, b"key"), natpunch.Peers(1, b"key")
    for kind in (natpunch.SYN, natpunch.ACK, natpunch.DONE, natpunch.BYE):
        probe = one.probe(kind)
        assert len(probe) == natpunch.PROBE_SIZE and other.kind_of(probe) == kind
        assert one.kind_of(probe) == b""  # our own, sent back
        assert natpunch.Peers(1, b"another").kind_of(probe) == b""
        for n in range(len(probe)):
            wrong = probe[:n] + bytes((probe[n] ^ 1,)) + probe[n + 1 :]
            assert other.kind_of(wrong) == b""
            assert other.kind_of(probe[:n]) == b""
        assert other.kind_of(probe + b"\0") == b""


@pytest.mark.parametrize("host", [HOST, "2001:db8::7"])
@pytest.mark.parametrize("cookie", [natpunch.COOKIE, b"olds"])
def test_stun_tells_an_address(host: str, cookie: bytes) -> None:
    transaction = cookie + os.urandom(12)
    request = natpunch.stun(natpunch.BINDING, transaction)
    answer, change = natpunch.stun_answer(request, (host, 50000))
    kind, same, found = natpunch.parse_stun(answer)
    assert (kind, same, change) == (natpunch.SUCCESS, transaction, 0)
    assert len(answer) == (32 if host == HOST else 44)
    answer, _ = natpunch.stun_answer(request, (host, 50000), (host, 3478))
    size, headers = (44, 28) if host == HOST else (68, 48)
    assert len(answer) == size  # as the manual says
    assert headers + size <= 1.71 * (headers + len(request))
    (value,) = found.values()
    is_new = cookie == natpunch.COOKIE
    value = natpunch.hidden(value, transaction if is_new else bytes(16))
    family = socket.AF_INET if host == HOST else socket.AF_INET6
    number = bytes((0, 1 if host == HOST else 2))
    raw = (50000).to_bytes(2, "big") + socket.inet_pton(family, host)
    assert value == number + raw
    assert list(found) == [natpunch.XOR_MAPPED if is_new else natpunch.MAPPED]


def test_a_message_of_rfc_5769_is_read() -> None:
    # Section 2.2, an IPv4 response: 192.0.2.1 port 32853.
    message = bytes.fromhex(
        "0101003c2112a442b7e7a701bc34d686fa87dfae"
        "8022000b7465737420766563746f7220"
        "002000080001a147e112a643"
        "000800142b91f599fd9e90c38c7489f92af9ba53f06be7d7"
        "80280004c07d4c96"
    )
    kind, transaction, found = natpunch.parse_stun(message)
    raw = natpunch.hidden(found[natpunch.XOR_MAPPED], transaction)[2:]
    assert kind == natpunch.SUCCESS
    assert (int.from_bytes(raw[:2], "big"), raw[2:]) == (32853, bytes((192, 0, 2, 1)))


def test_no_bytes_make_stun_fail_otherwise_than_by_value_error() -> None:
    base = natpunch.stun(natpunch.BINDING, natpunch.COOKIE + bytes(12), (3, bytes(4)))
    for at in range(len(base)):
        for value in range(256):
            message = base[:at] + bytes((value,)) + base[at + 1 :]
            try:
                natpunch.stun_answer(message, (HOST, 1))
            except ValueError:
                pass


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a.example", ("a.example", 3478)),
        ("a.example:7", ("a.example", 7)),
        ("192.0.2.1:7", ("192.0.2.1", 7)),
        ("[2001:db8::1]:7", ("2001:db8::1", 7)),
        ("[2001:db8::1]", ("2001:db8::1", 3478)),
        ("2001:db8::1", ("2001:db8::1", 3478)),
    ],
)
def test_an_address_is_read(text: str, expected: natpunch.Address) -> None:
    assert natpunch.parse_address(text, natpunch.PORT) == expected


NO_PORTS = "0", "65535", "x", "", "-1", "\u0661", "9" * 5000


@pytest.mark.parametrize("text", [f"a:{port}" for port in NO_PORTS])
def test_what_is_no_address_is_refused(text: str) -> None:
    with pytest.raises(natpunch.Failure) as failure:
        natpunch.parse_address(text, natpunch.PORT)
    assert failure.value.code == 2


class Wire:
    """A connection of which a test says what comes."""

    def __init__(self, *pieces: bytes) -> None:
        self.pieces, self.sent = list(pieces), b""

    def recv(self, size: int) -> bytes:
        return self.pieces.pop(0) if self.pieces else b""

    def send(self, data: bytes) -> int:
        self.sent += data[:3]
        return len(data[:3])


def channel(*pieces: bytes) -> Any:
    made: Any = natpunch.Channel.__new__(natpunch.Channel)
    made.came = made.going = memoryview(b"")
    made.sock, made.ended = Wire(*pieces), False
    return made


def framed(data: bytes) -> bytes:
    """Return what a channel sends, three bytes at a time."""
    one = channel()
    assert one.write(data) == len(data)
    return bytes(one.sock.sent)


def test_frames_come_whole_however_they_are_cut() -> None:
    wire = b"".join(framed(d) for d in (b"a", b"bc" * 9, b""))
    for size in (1, 2, 3, 5, 7, len(wire)):
        pieces = [wire[at : at + size] for at in range(0, len(wire), size)]
        one = channel(*pieces)
        found = [bytes(f) for _ in pieces for f in one.read()]
        assert found == [b"a", b"bc" * 9, b""] and one.ended


@pytest.mark.parametrize(
    "pieces",
    [
        (b"",),
        (b"\0\0\0\1a", b""),
        (b"\0\0\0\0", b""),
        (b"\xff\0\0\0",),
        (b"\0\0\0\0\0\0\0\1a",),
    ],
)
def test_what_is_not_frames_is_refused(pieces: tuple[bytes, ...]) -> None:
    one = channel(*pieces)
    with pytest.raises((OSError, ValueError)):
        for _ in pieces:
            one.read()


# The shape.


def test_it_stands_alone() -> None:
    for node in ast.walk(TREE):
        names = [n.name for n in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        assert {name.partition(".")[0] for name in names} <= sys.stdlib_module_names
    for path in running.ROOT.glob("natwork*.py"):
        assert "import natpunch" not in path.read_text()


def test_it_has_the_form_of_the_others() -> None:
    assert test_shape.used_before(TREE) == []
    lines = SOURCE.splitlines()
    assert [line for line in lines if len(line) > 88 or line != line.rstrip()] == []
    assert SOURCE.isascii() and "\t" not in SOURCE
    assert not test_shape.BRITISH.search(SOURCE)
    assert not test_shape.FORBIDDEN.search(SOURCE)
    sizes = sorted((f.end_lineno or 0) - f.lineno + 1 for f in FUNCTIONS)
    assert sizes[len(sizes) // 2] <= 10 and sizes[-1] <= 50
    long = [f for f in FUNCTIONS if (f.end_lineno or 0) - f.lineno > 10]
    assert [f.name for f in long if not ast.get_docstring(f)] == []
    assert lines[0] == "#!/usr/bin/env python3"
    assert Path(natpunch.__file__).stat().st_mode & 0o777 == 0o755
    assert natpunch.__version__ == test_shape.heart.__version__


def test_what_came_before_the_hole_was_there_is_not_from_the_peer() -> None:
    with contextlib.ExitStack() as stack:
        ours, peer, other = (
            stack.enter_context(socket.socket(type=socket.SOCK_DGRAM)) for _ in range(3)
        )
        for sock in (ours, peer, other):
            sock.bind(("127.0.0.1", 0))
        other.sendto(b"not the peer's", ours.getsockname())
        ours.connect(peer.getsockname())
        peer.sendto(b"the peer's", ours.getsockname())
        hole = natpunch.Datagrams(ours, natpunch.Peers(0, b"key"))
        assert [hole.read(), hole.read()] == [[], [b"the peer's"]]


def test_a_hole_is_not_silent_if_something_has_come_meanwhile() -> None:
    ours, peer = [socket.socket(type=socket.SOCK_DGRAM) for _ in range(2)]
    with ours, peer:
        peer.bind(("127.0.0.1", 0))
        ours.connect(peer.getsockname())
        hole = natpunch.Datagrams(ours, natpunch.Peers(0, b"key"))
        for _ in range(2):
            hole.heard_at -= natpunch.SILENCE + 1  # as if we had been stopped
            peer.sendto(b"here", ours.getsockname())
            assert hole.read() == [b"here"]
        hole.heard_at -= natpunch.SILENCE + 1
        with pytest.raises(OSError, match="silent"):
            hole.read()


def test_a_hole_is_kept_open_before_a_nat_forgets_it() -> None:
    ours, peer = [socket.socket(type=socket.SOCK_DGRAM) for _ in range(2)]
    with ours, peer:
        peer.bind(("127.0.0.1", 0))
        ours.connect(peer.getsockname())
        hole = natpunch.Datagrams(ours, natpunch.Peers(0, b"key"))
        # The next look at it is half a KEEP_ALIVE away.
        hole.told_at -= natpunch.KEEP_ALIVE / 2 + 1
        assert hole.read() == []
        peer.settimeout(5)
        probe = peer.recv(100)
        assert natpunch.Peers(1, b"key").kind_of(probe) == natpunch.DONE


def test_a_puncher_leaves_no_descriptor_behind() -> None:
    before = os.listdir("/proc/self/fd")
    listener = natpunch.bound(socket.SOCK_STREAM, socket.AF_INET)
    puncher = natpunch.Puncher(natpunch.Peers(0, b"key"), [listener])
    puncher.close()  # and nothing waits for the garbage collector
    assert os.listdir("/proc/self/fd") == before


def test_no_port_is_given_twice() -> None:
    with contextlib.ExitStack() as stack:
        made = [natpunch.bound(socket.SOCK_DGRAM, socket.AF_INET) for _ in range(700)]
        ports = {stack.enter_context(sock).getsockname()[1] for sock in made}
    assert len(ports) == 700


def test_a_server_that_was_not_heard_is_asked_again_and_a_connection_kept() -> None:
    meeting: Any = natpunch.Meeting.__new__(natpunch.Meeting)
    meeting.nonce, meeting.held = bytes(16), contextlib.ExitStack()
    seen, taken = [], []

    def answer(server: socket.socket, count: int) -> None:
        for _ in range(count):
            sock, at = server.accept()
            taken.append(sock)
            sock.sendall(natpunch.stun_answer(sock.recv(100), at)[0])

    with contextlib.ExitStack() as stack:
        servers = [stack.enter_context(socket.socket()) for _ in range(2)]
        for server in servers:
            server.bind(("127.0.0.1", 0))
        meeting.servers = [server.getsockname() for server in servers]
        for server, count in zip(servers, (2, 1)):  # the second refuses us at first
            server.listen()
            threading.Thread(target=answer, args=[server, count], daemon=True).start()
            listener = natpunch.bound(socket.SOCK_STREAM, socket.AF_INET)
            at = "127.0.0.1", stack.enter_context(listener).getsockname()[1]
            seen.append(meeting.observe(listener) == [at] * (len(seen) + 1))
        assert seen == [True, True]
        for sock in taken:
            sock.settimeout(10)
            assert not select.select([sock], [], [], 0)[0]
        meeting.held.close()
        for sock in taken:
            assert sock.recv(1) == b""
            sock.close()


def test_it_keeps_to_its_size() -> None:
    assert SOURCE.count("\n") <= 1148
