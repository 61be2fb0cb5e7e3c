"""Connecting: from where, to which address, by which line, and how it fails."""

from __future__ import annotations

import contextlib
import itertools
import os
import socket
import struct
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import addresses
import boxes
import http_wire
import kernel
import origins
import pytest
import running
import wait
import wire

import natwork

NAMED = f"name={running.NAME.decode()}"


def greet(connection: socket.socket, server: origins.Origin) -> None:
    """Serve a tunnel and a request alike."""
    connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
    connection.recv(65536)


def callers(server: origins.Origin, count: int) -> list[str]:
    """Return who called, once as many have."""
    wait.until(lambda: len(server.callers) >= count)
    return [host for host, _ in server.callers]


def written(address: tuple[str, int]) -> str:
    """Return an address and port as the log has them."""
    return ("[%s]:%d" if ":" in address[0] else "%s:%d") % address


# --- The order of attempts ----------------------------------------------------

UPLINKS = "127.0.0.2", "127.0.0.3"
FOUR, SIX = ["192.0.2.1", "192.0.2.2", "192.0.2.3"], ["2001:db8::1", "2001:db8::2"]


@pytest.mark.parametrize(
    ("addresses", "order"),
    [
        (FOUR[:1], FOUR[:1]),
        (FOUR, FOUR),
        (SIX, SIX),
        (SIX + FOUR, [SIX[0], FOUR[0], SIX[1], FOUR[1], FOUR[2]]),
        (FOUR + SIX, [FOUR[0], SIX[0], FOUR[1], SIX[1], FOUR[2]]),
        (SIX[:1] + FOUR, [SIX[0], *FOUR]),
        (FOUR + SIX[:1], [FOUR[0], SIX[0], *FOUR[1:]]),
    ],
)
def test_the_families_take_turns(
    monkeypatch: pytest.MonkeyPatch, addresses: list[str], order: list[str]
) -> None:
    answer = [(0, 0, 0, "", (address, 80)) for address in addresses]
    monkeypatch.setattr("socket.getaddrinfo", lambda *_, **__: answer)
    found = [natwork.unpack(address) for address in natwork.resolve("a.example")]
    assert found == order  # RFC 8305 section 4


def test_of_thousands_of_addresses_a_few_are_tried(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    every = [f"198.18.{n >> 8}.{n & 255}" for n in range(4000)]
    test_the_families_take_turns(monkeypatch, every, every[:32])


@pytest.mark.parametrize(
    ("outside", "failed", "order"),
    [
        ("", {}, [("", SIX[0]), ("", FOUR[0])]),
        ("a b", {}, [("a", SIX[0]), ("a", FOUR[0]), ("b", SIX[0]), ("b", FOUR[0])]),
        ("a b", {0: 1}, [("b", SIX[0]), ("b", FOUR[0]), ("a", SIX[0]), ("a", FOUR[0])]),
        ("a b", {0: 29, 1: 31}, [("b", SIX[0]), ("b", FOUR[0])]),
        ("a b", {0: 31}, [("a", SIX[0]), ("a", FOUR[0])]),
        ("a b", {0: 1, 1: 1}, [("a", SIX[0]), ("a", FOUR[0])]),
        # A source address is of one family.
        ("192.0.2.9 fd00::9", {}, [("192.0.2.9", FOUR[0]), ("fd00::9", SIX[0])]),
        ("192.0.2.9", {}, [("192.0.2.9", FOUR[0])]),
        ("192.0.2.8 192.0.2.9", {}, [("192.0.2.8", FOUR[0]), ("192.0.2.9", FOUR[0])]),
    ],
)
def test_uplinks_go_by_preference_and_failed_ones_last(
    outside: str, failed: dict[int, float], order: list[tuple[str, str]]
) -> None:
    board = natwork.Scoreboard()
    policy = natwork.Chapters(natwork.Config(outside=outside), board).policy
    for number, ago in failed.items():
        board.words[board.UPLINKS + number] = int(time.monotonic() - ago)
    addresses = [natwork.pack(SIX[0]), natwork.pack(FOUR[0])]
    attempts = natwork.ways_to(policy, addresses, 80, board)
    found = [(a.uplink.name if a.uplink else "", a.packed) for a in attempts]
    assert [(n, natwork.unpack(p)) for n, p in found][: len(order)] == order


def test_a_family_with_an_uplink_of_its_own_is_raced_as_a_family() -> None:
    outside = "2001:db8::5 203.0.113.5 203.0.113.6"
    chapters = natwork.Chapters(natwork.Config(outside=outside), natwork.Scoreboard())
    addresses = [natwork.pack(SIX[0]), natwork.pack(FOUR[0])]
    attempts = natwork.ways_to(chapters.policy, addresses, 80, chapters.board)
    begins = [(a.uplink.name, a.at) for a in attempts if a.uplink]
    delay, later = natwork.ATTEMPT_DELAY, natwork.ATTEMPT_DELAY + natwork.UPLINK_DELAY
    assert begins == [*zip(outside.split(), (0.0, delay, later))]


def test_a_failed_uplink_is_known_in_another_order() -> None:
    one, other = uplinks_of(" ".join(UPLINKS)).uplinks
    race = race_of(-1)
    board = race.worker.board
    race.asked = dict.fromkeys((one, other), False)
    with socket.socket() as sock:
        won = natwork.Attempt(b"\x7f\0\0\1", 80, other, 0.0)
        race.pending[won] = sock
        race.win(won)
    policy = uplinks_of(" ".join(reversed(UPLINKS)))
    attempts = natwork.ways_to(policy, [natwork.pack("127.0.0.1")], 80, board)
    assert [attempt.uplink for attempt in attempts] == [other, one]


def test_no_two_uplinks_share_what_is_remembered_of_them() -> None:
    board = natwork.Scoreboard()
    every = [f"a{n}" for n in range(board.UPLINK_MAX)]
    for outside in (" ".join(every[:-1]), " ".join([every[-1], *every])):  # and HUP
        policy = natwork.Chapters(natwork.Config(outside=outside), board).policy
    last, *others, _ = policy.uplinks
    board.words[board.UPLINKS + board.uplinks.index(last)] = int(time.monotonic())
    assert [one.name for one in others] == every[:-1]
    assert not any(map(board.failed_recently, others)) and board.failed_recently(last)


def test_an_uplink_does_not_wait_for_all_addresses_of_a_name() -> None:
    config = natwork.Config(outside="a b 192.0.2.9 fd00::9")
    chapters = natwork.Chapters(config, natwork.Scoreboard())
    addresses = [natwork.pack(f"192.0.2.{n}") for n in range(100, 140)]
    addresses.insert(1, natwork.pack(SIX[0]))
    attempts = natwork.ways_to(chapters.policy, addresses, 80, chapters.board)
    begins: dict[str, list[float]] = {}
    for attempt in attempts:
        assert attempt.uplink
        begins.setdefault(attempt.uplink.name, []).append(attempt.at)
    assert {name: times[0] for name, times in begins.items()} == {
        "a": 0.0,
        "b": natwork.UPLINK_DELAY,
        "192.0.2.9": 2 * natwork.UPLINK_DELAY,
        "fd00::9": 2 * natwork.UPLINK_DELAY,
    }
    assert [len(times) for times in begins.values()] == [41, 41, 40, 1]
    for times in begins.values():
        for before, after in itertools.pairwise(times):
            assert after - before == pytest.approx(natwork.ATTEMPT_DELAY)


# --- Source addresses ---------------------------------------------------------


@pytest.mark.parametrize(
    ("outside", "target", "source"),
    [
        ("127.0.0.2", "127.0.0.3", "127.0.0.2"),
        ("127.0.0.2", "[::ffff:127.0.0.3]", "127.0.0.2"),
        ("127.0.0.2", "localhost", "127.0.0.2"),
        ("127.0.0.2 127.0.0.4", "127.0.0.3", "127.0.0.2"),
        ("127.0.0.2 ::1", "[::1]", "::1"),
        ("::1 127.0.0.2", "127.0.0.3", "127.0.0.2"),
        ("::1", "[::1]", "::1"),
        # Not an address of this box: the second serves.
        ("198.51.100.77 127.0.0.2", "127.0.0.3", "127.0.0.2"),
        ("198.51.100.77 198.51.100.78 127.0.0.2", "127.0.0.3", "127.0.0.2"),
        ("2001:db8::77 ::1", "[::1]", "::1"),
        ("nosuch0 127.0.0.2", "127.0.0.3", "127.0.0.2"),
    ],
)
def test_the_server_is_called_from_the_outside_address(
    natwork: running.Start,
    origin: origins.Start,
    outside: str,
    target: str,
    source: str,
) -> None:
    server = origin(greet, "::1" if target == "[::1]" else "0.0.0.0")
    gateway = natwork(f"outside={outside}")  # trap 15
    place = f"{target}:{server.port}".encode()
    for count, method in enumerate((b"GET", b"CONNECT"), 1):
        with gateway.connect() as client:
            assert (
                http_wire.exchange(
                    client, http_wire.request(place, method=method), method
                ).status
                == 200
            )
        assert callers(server, count) == [source] * count
        line = gateway.lines(count)[-1]
        assert line["source"] == written(server.callers[-1])
        assert line["address"].endswith(f":{server.port}")


def test_a_kept_connection_has_the_source_it_was_dialed_from(
    natwork: running.Start, origin: origins.Start
) -> None:
    gateway, server = (
        natwork("outside=127.0.0.2"),
        origin(http_wire.Script(), "127.0.0.3"),
    )
    with gateway.connect() as client:
        for _ in range(3):
            assert http_wire.exchange(client, http_wire.request(server)).status == 200
    assert callers(server, 1) == ["127.0.0.2"]
    sources = {line["source"] for line in gateway.lines(3)}
    assert sources == {"127.0.0.2:%d" % server.callers[0][1]}


# --- Failures -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("outside", "target", "word", "status", "error"),
    [
        ("", "127.0.0.3:1", "refused", 502, b"connection_refused"),
        ("127.0.0.2", "127.0.0.3:1", "refused", 502, b"connection_refused"),
        ("127.0.0.2 127.0.0.4", "127.0.0.3:1", "refused", 502, b"connection_refused"),
        ("", "[::1]:1", "refused", 502, b"connection_refused"),
        ("", "nosuch.invalid:80", "no-such-host", 502, b"dns_error"),
        # What is near is not behind a device of the outside.
        ("nosuch0", "127.0.0.3:1", "refused", 502, b"connection_refused"),
        ("127.0.0.2", "[::1]:1", "unreachable", 502, b"destination_ip_unroutable"),
        ("::1", "127.0.0.3:1", "unreachable", 502, b"destination_ip_unroutable"),
        (
            "198.51.100.77",
            "127.0.0.3:1",
            "no-uplink",
            502,
            b"destination_ip_unroutable",
        ),
        # The target's answer says more than the other uplink's want of a route.
        ("nosuch0 127.0.0.2", "127.0.0.3:1", "refused", 502, b"connection_refused"),
        ("127.0.0.2 nosuch0", "127.0.0.3:1", "refused", 502, b"connection_refused"),
    ],
)
def test_a_failure_has_its_outcome(
    natwork: running.Start,
    outside: str,
    target: str,
    word: str,
    status: int,
    error: bytes,
) -> None:
    gateway = natwork(f"outside={outside}", NAMED, "spare_workers=1")
    dialed = target if word == "refused" else "-"  # and not where no way begins
    for count, method in enumerate((b"GET", b"CONNECT"), 1):
        with gateway.connect() as client:
            answer = http_wire.exchange(
                client, http_wire.request(target.encode(), method=method), method
            )
        assert (answer.status, http_wire.proxy_error(answer)) == (status, error)
        line = gateway.lines(count)[-1]
        assert (line["outcome"], line["status"]) == (word, str(status))
        assert (line["address"], line["source"]) == (dialed, "-")


def test_a_listener_that_does_not_answer_is_a_timeout(natwork: running.Start) -> None:
    gateway = natwork(NAMED, "connect_timeout=1")
    with wire.full_listener("127.0.0.3") as port:
        place = b"127.0.0.3:%d" % port
        with gateway.connect() as client:
            answer = http_wire.exchange(
                client, http_wire.request(place, method=b"CONNECT"), b"CONNECT"
            )
    assert (answer.status, http_wire.proxy_error(answer)) == (
        504,
        b"connection_timeout",
    )
    assert gateway.lines(1)[0]["outcome"] == "connect-timeout"


def test_a_client_is_told_when_descriptors_run_out_and_served_when_they_return(
    natwork: running.Start, origin: origins.Start
) -> None:
    gateway, server = natwork(NAMED, *running.ALONE), origin(http_wire.Script())
    pid = gateway.only_worker()
    options = http_wire.request(b"a", method=b"OPTIONS").replace(b"http://a/", b"*")
    with gateway.connect() as client:
        assert http_wire.exchange(client, options).status == 200
        with kernel.no_more_descriptors(pid):  # trap 22
            for _ in range(3):
                answer = http_wire.exchange(client, http_wire.request(server))
                assert answer.status == 503 and not answer.closes
                assert http_wire.proxy_error(answer) == b"connection_limit_reached"
                assert answer.values(b"Retry-After")[0].isdigit()
        assert http_wire.exchange(client, http_wire.request(server)).status == 200
    assert len(server.callers) == 1
    assert gateway.workers() == [pid]
    outcomes = [x["outcome"] for x in gateway.lines(6) if x["method"] == "GET"]
    assert outcomes == ["overload"] * 3 + ["ok"]


# IPv6 that leads to an IPv4 address, and what is nobody's.
STANDS_FOR = ("[::127", "[2002:", "[64:", "0.0.0.0", "[::ffff:0.")
opened = running.shared("rules=allow to 0.0.0.0/0, ::/0 port 1-65535")


@pytest.mark.parametrize("method", [b"GET", b"CONNECT"])
@pytest.mark.parametrize(
    "spelling",
    """
    127.0.0.1 [::ffff:127.0.0.1] [::FFFF:7F00:1] [::127.0.0.1] [2002:7f00:1::]
    [64:ff9b::127.0.0.1] 0.0.0.0 [::ffff:0.0.0.0]
    """.split()
    + addresses.LOCALHOST
    + [name.upper() for name in addresses.LOCALHOST],
)
def test_the_gateway_does_not_call_itself_whatever_the_rules(
    opened: running.Gateway, spelling: str, method: bytes
) -> None:
    place = b"%b:%d" % (spelling.encode(), opened.address[1])
    count = len(opened.lines())
    with opened.connect() as client:
        answer = http_wire.exchange(
            client, http_wire.request(place, method=method), method
        )
    (line,) = opened.lines(count + 1)[count:]
    if method == b"GET" and not spelling.startswith(STANDS_FOR):
        # An address that is ours as it stands: we answer, and dial nobody.
        assert (line["outcome"], line["address"]) == ("ok", "-")
        assert answer.status == 200 and not answer.values(b"Via")
        return
    assert (line["outcome"], line["address"]) == ("loop", "-")
    assert (answer.status, http_wire.proxy_error(answer)) == (
        502,
        b"proxy_loop_detected",
    )


# --- A box with two lines, and a name server that may lie ---------------------

A, AAAA = 1, 28  # RFC 1035, RFC 3596
SERVFAIL = "-"  # in place of addresses


class NameServer:
    """Answers A and AAAA from a table: name -> lists of addresses, one a question.

    The last list of a name is given again and again; None is no answer at all.
    """

    def __init__(self, sock: socket.socket, table: dict[str, list[str | None]]) -> None:
        self.sock, self.table = sock, table
        self.asked: list[tuple[str, int]] = []
        threading.Thread(target=self.run, daemon=True).start()

    def run(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                question, who = self.sock.recvfrom(512)
                if answer := self.answer(question):
                    self.sock.sendto(answer, who)

    def answer(self, question: bytes) -> bytes:
        labels, at = [], 12
        while length := question[at]:
            labels.append(question[at + 1 : at + 1 + length].decode())
            at += 1 + length
        name, kind = ".".join(labels), int.from_bytes(question[at + 1 : at + 3], "big")
        turns = self.table.get(name.lower())
        turn = self.asked.count((name, kind))
        self.asked.append((name, kind))
        found = turns[min(turn, len(turns) - 1)] if turns else ""
        if found is None:
            return b""
        family = {A: socket.AF_INET, AAAA: socket.AF_INET6}.get(kind)
        packed = [
            socket.inet_pton(family, address)
            for address in found.removeprefix(SERVFAIL).split()
            if family and (":" in address) == (kind == AAAA)
        ]
        flags = 0x8580 if turns else 0x8583  # no such name
        if found == SERVFAIL:
            flags = 0x8582
        head = question[:2] + struct.pack("!HHHHH", flags, 1, len(packed), 0, 0)
        records = b"".join(
            b"\xc0\x0c" + struct.pack("!HHIH", kind, 1, 0, len(one)) + one
            for one in packed
        )
        return head + question[12 : at + 5] + records


# 192.0.2.80 is behind both lines; what else is in 192.0.2.0/24 answers nobody.
TABLE: dict[str, list[str | None]] = {
    "far.example": ["192.0.2.80"],
    "dead-first.example": ["192.0.2.99 203.0.113.80"],
    "dead-family.example": ["2001:db8:9::99 203.0.113.80"],
    "refusing-first.example": ["203.0.113.80 203.0.113.81"],
    "all-dead.example": ["192.0.2.91 192.0.2.92 192.0.2.93 192.0.2.94 192.0.2.95"],
    "rebinding.example": ["203.0.113.80", "10.9.0.2"],
    "mixed.example": ["10.9.0.2 203.0.113.80"],
    "inside.example": ["10.9.0.2"],
    "mapped.example": ["::ffff:10.9.0.2"],
    "a.denied.example": ["203.0.113.80"],
    "silent.example": [None],
    "failing.example": [SERVFAIL],
}

ROUTES = """
    route add unreachable 198.18.0.1
    route add prohibit 198.18.0.2
    route add blackhole 198.18.0.3
"""


class Lines:
    """A box between two networks, one at a time a gateway in it, and servers."""

    def __init__(self, box: boxes.Box) -> None:
        self.box, self.origins = box, list[origins.Origin]()
        folder = Path("/etc/netns", box.name("gateway"))
        (folder / "nsswitch.conf").write_text("hosts: files dns\n")
        (folder / "resolv.conf").write_text("nameserver 203.0.113.80\n")
        boxes.ip("-n", box.name("gateway"), "-batch", "-", given=ROUTES)
        sock = box.within("outside", lambda: socket.socket(type=socket.SOCK_DGRAM))
        sock.bind(("203.0.113.80", 53))
        self.names = NameServer(sock, TABLE)

    def origin(self, host: str, place: str = "outside") -> origins.Origin:
        """Start a server that greets its callers."""
        self.origins.append(self.box.within(place, lambda: origins.Origin(greet, host)))
        return self.origins[-1]

    def client(self, seconds: float = 10.0) -> socket.socket:
        """Return a client's connection to the gateway from the inside."""
        return self.box.connect("inside", ("10.9.0.1", 8080), seconds)

    def ask(self, place: str, seconds: float = 10.0) -> http_wire.Message:
        """Return the answer to a CONNECT; its body is the server's greeting."""
        with self.client(seconds) as client:
            data = http_wire.request(place.encode(), method=b"CONNECT")
            return http_wire.exchange(client, data, b"CONNECT")


@pytest.fixture(scope="module")
def box() -> Iterator[Lines]:
    """Return a box with two lines to the outside."""
    with boxes.dual_homed(second_uplink=True) as made:
        lines = Lines(made)
        yield lines
        lines.names.sock.close()


@pytest.fixture
def lines(box: Lines) -> Iterator[Lines]:
    """Return the box, without the servers and questions of the test before."""
    box.names.asked.clear()
    yield box
    for server in box.origins:
        server.close()
    box.origins.clear()


@pytest.fixture
def gateway(lines: Lines, tmp_path: Path) -> Iterator[running.Start]:
    """Return a function that starts natwork.py in the box."""
    with contextlib.ExitStack() as stack:

        def start(*options: str) -> running.Gateway:
            started = lines.box.natwork(tmp_path, NAMED, *options)
            stack.callback(started.stop)
            return started

        yield start
    assert lines.box.pids("gateway") == []


@pytest.mark.parametrize("name", ["dead-first", "dead-family"])
def test_a_dead_address_does_not_keep_the_next_one_waiting(
    lines: Lines, gateway: running.Start, name: str
) -> None:
    started, server = gateway("connect_timeout=60"), lines.origin("203.0.113.80")
    answer = lines.ask(f"{name}.example:{server.port}", seconds=5)  # not 60
    assert answer.status == 200
    assert callers(server, 1) == ["203.0.113.1"]
    assert started.lines(1)[0]["address"] == server.authority


def test_the_next_address_is_tried_when_one_refuses(
    lines: Lines, gateway: running.Start
) -> None:
    started, server = gateway(), lines.origin("203.0.113.81")
    assert lines.ask(f"refusing-first.example:{server.port}").status == 200
    assert started.lines(1)[0]["address"] == server.authority


def test_the_time_to_connect_is_for_all_addresses_together(
    lines: Lines, gateway: running.Start
) -> None:
    started = gateway("connect_timeout=1", "outside=wan wan2")
    answer = lines.ask("all-dead.example:80", seconds=4)  # not ten times one
    assert (answer.status, http_wire.proxy_error(answer)) == (
        504,
        b"connection_timeout",
    )
    assert started.lines(1)[0]["outcome"] == "connect-timeout"


@pytest.mark.parametrize(
    ("target", "word", "status", "error"),
    [
        ("198.18.0.1:80", "unreachable", 502, b"destination_ip_unroutable"),
        ("198.18.0.2:80", "connect-failed", 502, b"destination_unavailable"),
        ("198.18.0.3:80", "connect-failed", 502, b"destination_unavailable"),
        ("203.0.113.80:1", "refused", 502, b"connection_refused"),
        ("nosuch.example:80", "no-such-host", 502, b"dns_error"),
        ("silent.example:80", "dns-timeout", 504, b"dns_timeout"),
        ("failing.example:80", "dns-failed", 504, b"dns_error"),
        ("inside.example:80", "denied-inside", 403, b"http_request_denied"),
        ("mapped.example:80", "denied-inside", 403, b"http_request_denied"),
    ],
)
def test_a_failure_on_the_way_has_its_outcome(
    lines: Lines,
    gateway: running.Start,
    target: str,
    word: str,
    status: int,
    error: bytes,
) -> None:
    started = gateway()
    answer = lines.ask(target, seconds=20)
    (line,) = started.lines(1)
    assert (answer.status, http_wire.proxy_error(answer)) == (status, error)
    dialed = target if target[:1].isdigit() else "-"
    assert (line["outcome"], line["address"]) == (word, dialed)


def test_socks_tells_no_name_from_no_answer(
    lines: Lines, gateway: running.Start
) -> None:
    gateway()
    for name, reply in (b"nosuch.example", 4), (b"failing.example", 6):
        with lines.client() as client:
            asked = b"\5\1\0\3%c%b\0\x50" % (len(name), name)
            client.sendall(b"\5\1\0" + asked)
            assert wire.read_exactly(client, 4) == b"\5\0\5%c" % reply


def test_a_drain_does_not_wait_for_a_silent_name_server(
    lines: Lines, gateway: running.Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RES_OPTIONS", "timeout:30 attempts:1")
    started = gateway("drain_timeout=0.5")
    with lines.client() as client:
        client.sendall(http_wire.request(b"silent.example:80", method=b"CONNECT"))
        wait.until(lambda: lines.names.asked)
        started.process.terminate()
        assert wire.read_all(client) == b""
        assert started.process.wait(20) == 0
    (line,) = started.lines(1)
    assert line["outcome"] == "drained"


def test_a_name_is_resolved_once_and_the_judged_address_is_dialed(
    lines: Lines, gateway: running.Start
) -> None:
    started, server = gateway(), lines.origin("203.0.113.80")
    victim = lines.origin("10.9.0.2", "inside")
    place = f"rebinding.example:{server.port}"
    assert lines.ask(place).status == 200  # trap 13
    assert lines.names.asked.count(("rebinding.example", A)) == 1
    assert started.lines(1)[0]["address"] == server.authority
    assert lines.ask(f"rebinding.example:{victim.port}").status == 403  # judged anew
    assert lines.names.asked.count(("rebinding.example", A)) == 2
    assert victim.callers == []


def test_of_the_addresses_of_a_name_only_the_allowed_are_dialed(
    lines: Lines, gateway: running.Start
) -> None:
    started, server = gateway(), lines.origin("203.0.113.80")
    assert lines.ask(f"mixed.example:{server.port}").status == 200  # trap 13
    victim = lines.origin("10.9.0.2", "inside")
    assert lines.ask(f"mixed.example:{victim.port}").status == 502  # and no other
    assert victim.callers == []
    dialed = {server.authority, f"203.0.113.80:{victim.port}"}
    assert {x["address"] for x in started.lines(2)} == dialed


def test_a_host_rule_holds_however_the_name_is_written(
    lines: Lines, gateway: running.Start
) -> None:
    started, server = gateway("rules=deny to .denied.example"), lines.origin("0.0.0.0")
    for name in ("a.denied.example", "A.Denied.Example", "a.denied.example."):
        assert lines.ask(f"{name}:{server.port}").status == 403
    assert [x["outcome"] for x in started.lines(3)] == ["denied-rule-1"] * 3
    assert server.callers == []


@pytest.mark.parametrize(
    ("outside", "source"),
    [
        ("wan2", "198.51.100.1"),  # the routing table alone prefers wan
        ("nosuch0 wan2", "198.51.100.1"),
        ("203.0.113.77 wan2", "198.51.100.1"),
        ("wan wan2", "203.0.113.1"),
    ],
)
@pytest.mark.parametrize("user", ["nobody", "root"])
def test_a_device_is_an_uplink_without_any_privilege(
    lines: Lines, gateway: running.Start, outside: str, source: str, user: str
) -> None:
    started = gateway(f"outside={outside}", f"user={user}")
    server = lines.origin("192.0.2.80")
    assert lines.ask(server.authority).status == 200
    assert callers(server, 1) == [source]  # trap 15
    assert started.lines(1)[0]["source"] == written(server.callers[0])


def test_an_uplink_that_failed_goes_last_for_a_while(
    lines: Lines, gateway: running.Start
) -> None:
    gateway("outside=wan wan2")
    server = lines.origin("192.0.2.80")
    assert lines.ask(server.authority).status == 200
    lines.box.link("outside", "wan", "arp", "off")
    boxes.ip("-n", lines.box.name("gateway"), "neigh", "flush", "dev", "wan")
    try:
        assert lines.ask(server.authority).status == 200
    finally:
        lines.box.link("outside", "wan", "arp", "on")
    # The line is whole again, but nobody is made to find that out.
    assert lines.ask(server.authority).status == 200
    lost = "203.0.113.1", "198.51.100.1", "198.51.100.1"
    assert callers(server, 3) == list(lost)


def test_uplinks_that_are_not_there_cost_no_time(
    lines: Lines, gateway: running.Start
) -> None:
    """Three that are gone, one that is silent: a second, and not four."""
    gateway("outside=gone0 gone1 gone2 wan wan2", "connect_timeout=2.5")
    server = lines.origin("192.0.2.80")
    lines.box.link("outside", "wan", "arp", "off")
    boxes.ip("-n", lines.box.name("gateway"), "neigh", "flush", "dev", "wan")
    try:
        assert lines.ask(server.authority).status == 200
    finally:
        lines.box.link("outside", "wan", "arp", "on")
    assert callers(server, 1) == ["198.51.100.1"]


def test_an_answer_to_a_head_that_is_still_on_its_way(
    lines: Lines, gateway: running.Start
) -> None:
    def early(connection: socket.socket, server: origins.Origin) -> None:
        connection.sendall(http_wire.sized(b"no", status=b"431 Too Large"))
        server.received.append(wire.read_all(connection))

    started = gateway()
    server = lines.box.within("outside", lambda: origins.Origin(early, "192.0.2.80"))
    lines.origins.append(server)
    server.listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2304)
    fields = [b"X-%d: %b" % (n, b"y" * 1000) for n in range(62)]
    before = lines.box.get("gateway", "ipv4/tcp_wmem")
    lines.box.set("gateway", "ipv4/tcp_wmem", "4096 4096 4096")
    try:
        with lines.client() as client:
            answer = http_wire.exchange(client, http_wire.request(server, *fields))
            assert (answer.status, answer.body) == (431, b"no")
    finally:
        lines.box.set("gateway", "ipv4/tcp_wmem", before)
    assert started.lines(1)[0]["status"] == "431"


@pytest.mark.parametrize("outside", ["wan", "2001:db8:9::1 wan"])
def test_what_a_rule_opens_on_the_inside_is_not_sought_outside(
    lines: Lines, gateway: running.Start, outside: str
) -> None:
    gateway(f"outside={outside}", "rules=allow to 10.9.0.0/24")
    near = lines.origin("10.9.0.2", "inside")
    assert lines.ask(near.authority).status == 200
    with lines.client() as client:
        port = near.port.to_bytes(2, "big")
        client.sendall(b"\5\1\0\5\2\0\1" + bytes([10, 9, 0, 2]) + port)
        assert wire.read_exactly(client, 2) == b"\5\0"
        reply = wire.read_exactly(client, 10)
        assert reply[:8] == b"\5\0\0\1" + bytes([10, 9, 0, 1])
        where = "10.9.0.1", int.from_bytes(reply[8:], "big")
        with lines.box.connect("inside", where, 10):  # a BIND is called back
            assert wire.read_exactly(client, 8) == b"\5\0\0\1" + bytes([10, 9, 0, 2])
    listener = lines.box.within("inside", lambda: socket.socket(type=socket.SOCK_DGRAM))
    asking = lines.box.within("inside", lambda: socket.socket(type=socket.SOCK_DGRAM))
    with listener, asking, lines.client() as client:
        listener.settimeout(10)
        listener.bind(("10.9.0.2", 0))
        client.sendall(b"\5\1\0\5\3\0\1" + bytes(6))
        assert wire.read_exactly(client, 2) == b"\5\0"
        reply = wire.read_exactly(client, 10)
        to = bytes([10, 9, 0, 2]) + listener.getsockname()[1].to_bytes(2, "big")
        where = "10.9.0.1", int.from_bytes(reply[8:], "big")
        asking.sendto(b"\0\0\0\1" + to + b"hello", where)
        data, sender = listener.recvfrom(64)
        assert (data, sender[0]) == (b"hello", "10.9.0.1")


def test_a_bind_is_where_its_caller_knows_the_client(
    lines: Lines, gateway: running.Start
) -> None:
    started = gateway("outside=wan wan2", "bind_ports=41000")
    server = lines.origin("192.0.2.80")
    ask = b"\5\1\0\5%c\0\1" + bytes([192, 0, 2, 80])
    port = server.port.to_bytes(2, "big")

    def socks(stack: contextlib.ExitStack, command: int) -> bytes:
        """Return the reply to a request, and keep its connection."""
        client = stack.enter_context(lines.client())
        client.sendall(ask % command + port)
        assert wire.read_exactly(client, 2) == b"\5\0"
        return wire.read_exactly(client, 10)

    first = bytes([203, 0, 113, 1])
    with contextlib.ExitStack() as stack:
        assert socks(stack, 1)[4:8] == first  # CONNECT, as of an FTP client
        lines.box.link("outside", "wan", "arp", "off")
        boxes.ip("-n", lines.box.name("gateway"), "neigh", "flush", "dev", "wan")
        try:
            assert lines.ask(server.authority).status == 200  # by the second line
            started.lines(1)  # it is over, and the first session is the latest again
        finally:
            lines.box.link("outside", "wan", "arp", "on")
        started.lines(1)  # that session is over, and the latest one no more
        assert socks(stack, 2)[4:8] == first
        # The port is taken there, and another address would be of no use.
        assert socks(stack, 2)[1] == 1
    lost = "203.0.113.1", "198.51.100.1"
    assert callers(server, 2) == list(lost)


def uplinks_of(outside: str) -> natwork.Policy:
    """Return the policy of a gateway with some uplinks."""
    return natwork.Policy(natwork.Config(outside=outside))


def race_of(lifeline: int) -> natwork.Race:
    """Return a race with what it needs of a worker."""
    board, policy = natwork.Scoreboard(), uplinks_of(" ".join(UPLINKS))
    board.uplinks = [*policy.uplinks, *uplinks_of("192.0.2.1").uplinks]
    worker = SimpleNamespace(
        watch=natwork.Watch(lifeline, natwork.Config(drain_timeout=1.0), {}),
        board=board,
        policy=policy,
        config=natwork.Config(connect_timeout=20.0),
    )
    return natwork.Race(worker, natwork.Session("127.0.0.1:1", "1"))


@contextlib.contextmanager
def racing(deaf: list[str], port: int) -> Iterator[natwork.Race]:
    """Give a race in which a port of some hosts, its queue full, answers nothing."""
    lifeline, end = os.pipe()
    with contextlib.ExitStack() as stack:
        for fd in (lifeline, end):
            stack.callback(os.close, fd)
        for host in deaf:
            full = stack.enter_context(socket.create_server((host, port)))
            full.listen(0)
            stack.enter_context(socket.create_connection((host, port)))
        yield race_of(lifeline)


def test_an_uplink_that_has_no_way_to_a_target_has_not_failed(
    origin: origins.Start,
) -> None:
    server, packed = origin(http_wire.Script()), natwork.pack("127.0.0.1")
    # The first source address is not of this box: its attempt ends as it begins.
    policy = uplinks_of("192.0.2.1 127.0.0.2")
    with racing([], server.port) as race:
        board = race.worker.board
        attempts = natwork.ways_to(policy, [packed], server.port, board)
        race.run(attempts).close()
    assert race.session.source.startswith(f"{policy.uplinks[1].name}:")
    assert len(race.failed) == 1
    assert not any(map(board.failed_recently, policy.uplinks))


def test_an_uplink_asked_later_has_not_failed_when_the_first_wins(
    origin: origins.Start,
) -> None:
    server = origin(http_wire.Script(), "127.0.1.9")
    hosts = [f"127.0.1.{n}" for n in range(1, 6)]
    policy = uplinks_of(" ".join(UPLINKS))
    addresses = [natwork.pack(host) for host in [*hosts, "127.0.1.9"]]
    with racing(hosts, server.port) as race:
        board = race.worker.board
        attempts = natwork.ways_to(policy, addresses, server.port, board)
        race.run(attempts).close()
    assert race.session.source.startswith(f"{policy.uplinks[0].name}:")
    assert set(race.asked) == set(policy.uplinks)
    assert not any(map(board.failed_recently, policy.uplinks))


@pytest.mark.parametrize("refusing", [0, 1])
def test_a_failure_brings_all_later_attempts_forward(
    origin: origins.Start, refusing: int
) -> None:
    server = origin(http_wire.Script(), "127.0.1.9")
    first, second = uplinks_of(" ".join(UPLINKS)).uplinks
    attempts = [
        natwork.Attempt(natwork.pack(host), server.port, uplink, at)
        for host, uplink, at in (
            ("127.0.1.1", first, 0.0),
            ("127.0.1.2", (first, second)[refusing], 0.3),  # nobody listens there
            ("127.0.1.3", second, 60.0),  # at once then, whosever it is
            ("127.0.1.9", first, 60.3),  # and this as much earlier
        )
    ]
    with racing(["127.0.1.1", "127.0.1.3"], server.port) as race:
        began = time.monotonic()
        race.run(attempts).close()
        took = time.monotonic() - began
    assert race.session.address == f"127.0.1.9:{server.port}"
    assert [attempt for _, attempt in race.failed] == [attempts[1]]
    assert 0.6 <= took < 10


def test_a_target_that_has_refused_is_not_asked_by_the_next_uplink(
    origin: origins.Start,
) -> None:
    policy, packed = uplinks_of(" ".join(UPLINKS)), natwork.pack("127.0.1.2")
    port = origin(http_wire.Script()).port  # of another address
    with racing([], port) as race:
        attempts = natwork.ways_to(policy, [packed], port, race.worker.board)
        began = time.monotonic()
        with pytest.raises(natwork.Refused) as refused:
            race.run(attempts)
    assert refused.value.outcome.word == "refused"
    assert [attempt.uplink for attempt in attempts] == policy.uplinks
    assert [*race.asked] == policy.uplinks[:1]
    assert time.monotonic() - began < natwork.UPLINK_DELAY


@pytest.mark.parametrize(
    ("error", "failed"),
    [
        (None, True),
        (OSError(113, "no route to host"), True),
        (ConnectionRefusedError(111, "refused"), False),  # it brought an answer
    ],
)
def test_an_uplink_has_failed_that_was_asked_first_and_brought_nothing(
    error: OSError | None, failed: bool
) -> None:
    ways = uplinks_of(" ".join(UPLINKS)).uplinks
    race = race_of(-1)
    board = race.worker.board
    lost, won = (natwork.Attempt(b"\x7f\0\0\1", 80, way, 0.0) for way in ways)
    race.asked = dict.fromkeys(ways, False)
    if error:
        race.fail(error, lost)
    with socket.socket() as sock:
        race.pending[won] = sock
        assert race.win(won).sock is sock
    assert [*map(board.failed_recently, ways)] == [failed, False]


def test_an_answer_of_the_target_is_not_the_uplinks_failure(
    lines: Lines, gateway: running.Start
) -> None:
    gateway("outside=wan wan2")
    server = lines.origin("192.0.2.80")
    answer = lines.ask("192.0.2.80:1")
    assert http_wire.proxy_error(answer) == b"connection_refused"
    assert lines.ask(server.authority).status == 200
    assert callers(server, 1) == ["203.0.113.1"]  # wan is preferred as before


@pytest.mark.parametrize("outside", ["203.0.113.1", "wan", ""])
def test_the_ports_of_a_source_address_serve_every_target_anew(
    lines: Lines, gateway: running.Start, outside: str
) -> None:
    ports = "ipv4/ip_local_port_range"
    before = lines.box.get("gateway", ports)
    gateway(f"outside={outside}")
    servers = [lines.origin(host) for host in ("203.0.113.80", "203.0.113.81") * 3]
    lines.box.set("gateway", ports, "40000 40001")  # trap 16
    try:
        with contextlib.ExitStack() as stack:
            for server in servers:  # six at once, by two ports
                client = stack.enter_context(lines.client())
                place = server.authority.encode()
                client.sendall(http_wire.request(place, method=b"CONNECT"))
                assert http_wire.read_head(client).startswith(b"HTTP/1.1 200 ")
                assert wire.read_exactly(client, 15) == b"HTTP/1.1 200 OK"
    finally:
        lines.box.set("gateway", ports, before)


@pytest.mark.parametrize("outside", ["203.0.113.1", ""])
def test_a_box_without_a_free_port_is_overloaded(
    lines: Lines, gateway: running.Start, outside: str
) -> None:
    ports = "ipv4/ip_local_port_range"
    before = lines.box.get("gateway", ports)
    started, server = gateway(f"outside={outside}"), lines.origin("203.0.113.80")
    place = server.authority.encode()
    lines.box.set("gateway", ports, "40000 40001")
    try:
        with contextlib.ExitStack() as stack:
            for _ in range(2):
                client = stack.enter_context(lines.client())
                client.sendall(http_wire.request(place, method=b"CONNECT"))
                assert http_wire.read_head(client).startswith(b"HTTP/1.1 200 ")
            answer = lines.ask(server.authority)
            assert started.lines(1)[0]["outcome"] == "overload"  # trap 22
            assert (answer.status, len(answer.values(b"Retry-After"))) == (503, 1)
    finally:
        lines.box.set("gateway", ports, before)


def test_a_box_whose_ipv6_is_off_has_no_uplink_and_is_not_overloaded(
    tmp_path: Path,
) -> None:
    with boxes.dual_homed() as box:
        box.set("gateway", "ipv6/conf/all/disable_ipv6", "1")
        started = box.natwork(tmp_path)
        with box.connect("inside", ("10.9.0.1", 8080)) as client:
            data = http_wire.request(b"[2001:db8:9::80]:80", method=b"CONNECT")
            answer = http_wire.exchange(client, data, b"CONNECT")
        line = started.lines(1)[0]
        started.stop()
    assert (answer.status, line["outcome"]) == (502, "no-uplink")


def test_a_device_has_the_address_that_it_has_when_it_is_used(
    lines: Lines, gateway: running.Start
) -> None:
    started = gateway("outside=wan2")
    server, here = lines.origin("198.51.100.80"), lines.box.name("gateway")
    assert lines.ask(server.authority).status == 200
    started.lines(1)  # it is over before its address goes, or would never end
    old, new = (f"198.51.100.{n}/24 dev wan2".split() for n in (1, 2))
    boxes.ip("-n", here, "addr", "del", *old)
    with contextlib.ExitStack() as stack:
        stack.callback(boxes.ip, "-n", here, "addr", "add", *old)
        boxes.ip("-n", here, "addr", "add", *new)
        stack.callback(boxes.ip, "-n", here, "addr", "del", *new)
        assert lines.ask(server.authority).status == 200  # trap 15
        started.lines(2)
    assert callers(server, 2) == ["198.51.100.1", "198.51.100.2"]
