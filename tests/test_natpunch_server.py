"""The server under attack: each promise of it, and what tries to break it."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import select
import signal
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Iterator
from collections.abc import Sequence
from pathlib import Path

import kernel
import natlab
import needs
import punching
import pytest
import wait

import natpunch

KEY = "a key of the server"
ROOM = "0" * 32


@pytest.fixture(scope="module")
def lab() -> Iterator[natlab.Lab]:
    with natlab.lab() as made:
        yield made


@contextlib.contextmanager
def serving(
    lab: natlab.Lab,
    *options: str,
    changed: str = "",
    before: Sequence[str] = (),
    **environment: str,
) -> Iterator[subprocess.Popen[bytes]]:
    """Run a server, perhaps with other limits, by another program; it ends well."""
    command = punching.words("serve", *lab.servers, *options, changed=changed)
    process = lab.start("server", *before, *command, **environment)
    for _ in lab.servers:
        assert "serving on" in punching.read_line(process)
    try:
        yield process
    finally:
        process.terminate()
    assert process.wait(10) == 0 and process.stderr
    os.set_blocking(process.stderr.fileno(), False)
    assert not process.stderr.read()


@pytest.fixture(scope="module")
def served() -> Iterator[natlab.Lab]:
    """Return a lab where a server runs for many tests."""
    with natlab.lab() as made, serving(made):
        yield made


def ask(sock: socket.socket, nonce: str) -> int:
    """Return as which port the server sees a connection, by STUN."""
    transaction = natpunch.COOKIE + bytes.fromhex(nonce[:16]) + os.urandom(4)
    sock.sendall(natpunch.stun(natpunch.BINDING, transaction))
    kind, same, found = natpunch.parse_stun(sock.recv(100))
    assert (kind, same) == (natpunch.SUCCESS, transaction)
    value = natpunch.hidden(found[natpunch.XOR_MAPPED], transaction)
    return int.from_bytes(value[2:4], "big")


class Client:
    """A client that says what a test wants."""

    def __init__(self, lab: natlab.Lab, place: str = "a", port: int = 3478) -> None:
        address = lab.servers[0], port
        self.sock = lab.within(place, lambda: socket.create_connection(address, 5))
        self.nonce = ""

    def say(self, line: str) -> None:
        self.sock.sendall(line.encode() + b"\n")

    def hear(self) -> str:
        """Return a line, or "" at the end, however that comes."""
        line = b""
        with contextlib.suppress(ConnectionResetError):
            while not line.endswith(b"\n"):
                if not (byte := self.sock.recv(1)):
                    break
                line += byte
        return line.decode().strip()

    def join(self, room: str = ROOM, side: str = "pipe", key: bytes = b"") -> None:
        self.say("natpunch 1")
        word, self.nonce, _ = self.hear().split()
        assert word == "natpunch"
        line = f"join {room} {side} {secrets.token_hex(16)} plain"
        self.say(f"{line} {natpunch.mac(key, self.nonce, line).hex()}")

    def see(self, lab: natlab.Lab, place: str = "a") -> int:
        """Let the server see another port of ours; return it."""
        with Client(lab, place, 3479).sock as sock:
            return ask(sock, self.nonce)


def pair(
    lab: natlab.Lab, a: str = "a", b: str = "b", room: str = "", key: bytes = b""
) -> tuple[Client, Client]:
    """Return two that have met, in a room of their own unless told otherwise."""
    one, other = Client(lab, a), Client(lab, b)
    room = room or secrets.token_hex(16)
    one.join(room, key=key)
    other.join(room, key=key)
    roles = {one.hear()[:9], other.hear()[:9]}
    assert roles == {"paired 0 ", "paired 1 "}
    return one, other


# Rooms.


def test_a_third_is_refused_and_the_pair_lives_on(lab: natlab.Lab) -> None:
    with serving(lab):
        one, other = pair(lab, room=ROOM)
        third = Client(lab)
        third.join()
        assert third.hear() == "no taken" and third.hear() == ""
        one.say("relay")
        assert one.hear() == other.hear() == "relay"
        one.sock.sendall(b"hello")
        assert other.sock.recv(5) == b"hello"
        for side in ("pipe", "call", "far"):
            third = Client(lab)
            third.join(side=side)
            assert third.hear() == "no taken"
        one.sock.close()
        assert other.sock.recv(5) == b""
        other.sock.close()

        def joined() -> bool:
            again = Client(lab)
            again.join()
            again.sock.settimeout(0.2)
            with contextlib.suppress(TimeoutError):
                return again.hear() == ""
            return True

        wait.until(joined)


def test_a_far_end_that_comes_anew_has_the_place_of_the_one_before(
    lab: natlab.Lab,
) -> None:
    # Which may be the same one, whose box has lost its power.
    with serving(lab):
        old, new, call = Client(lab, "b"), Client(lab, "b"), Client(lab)
        old.join(side="far")
        assert ask(old.sock, old.nonce)  # so it has joined, too
        new.join(side="far")
        assert old.hear() == "no taken" and old.hear() == ""
        call.join(side="call")
        assert new.hear().startswith("paired 0") and call.hear()


def test_a_far_end_takes_one_call_after_another(lab: natlab.Lab) -> None:
    with serving(lab, changed="natpunch.ANSWER_TIME = 2"):
        far = Client(lab, "b")
        far.join(side="far")
        calls = [Client(lab), Client(lab)]
        for call in calls:
            call.join()
        assert calls[0].hear().startswith("paired 1") and far.hear()
        assert not select.select([calls[1].sock], [], [], 0.2)[0]  # not by a pipe
        far.sock.close()
        assert calls[0].hear() == "no gone"
        third = Client(lab)
        third.join()  # while the far end is about to come again
        assert not select.select([third.sock], [], [], 0.2)[0]
        far = Client(lab, "b")
        far.join(side="far")
        assert calls[1].hear().startswith("paired 0")
        far.sock.close()
        assert calls[1].hear() == "no gone"
        time.sleep(3.1)  # in which it may come again
        last = Client(lab)
        last.join()  # without a far end, two pipes meet
        assert third.hear().startswith("paired 0") and last.hear()


def test_who_waits_is_sent_away_and_who_says_nothing_too(lab: natlab.Lab) -> None:
    quick = "natpunch.WAIT_TIME, natpunch.ANSWER_TIME, natpunch.PAIR_TIME = 1, 1, 1"
    with serving(lab, changed=quick):
        waiting, silent = Client(lab), Client(lab)
        waiting.join()
        assert waiting.hear() == "no nobody" and waiting.hear() == ""
        assert silent.hear() in ("no nobody", "") and silent.hear() == ""
        one, other = pair(lab)
        assert one.hear() == other.hear() == "no gone"


def waiting(lab: natlab.Lab, count: int = 16) -> list[Client]:
    """Return so many that wait, each in a room of its own."""
    clients = [Client(lab) for _ in range(count)]
    for client in clients:
        client.join(secrets.token_hex(16))
    return clients


def refused(lab: natlab.Lab, place: str = "a") -> bool:
    """Return whether one more has no place where it would wait."""
    client = Client(lab, place)
    client.join()
    return client.hear() == "no full" and client.hear() == ""


def test_sixteen_wait_from_an_address(lab: natlab.Lab) -> None:
    with serving(lab):
        clients = waiting(lab)
        wait.until(lambda: refused(lab))
        pair(lab, "b", "server")  # others do not notice
        clients.pop().sock.close()
        wait.until(lambda: joins(Client(lab)))


def test_to_be_seen_takes_no_place(lab: natlab.Lab) -> None:
    with serving(lab):
        one, other = pair(lab)
        clients = waiting(lab)
        for _ in range(3):  # as often as in a round
            assert one.see(lab) in range(1, 65536)
        assert len(clients) == 16
        assert not select.select([other.sock], [], [], 0)[0]  # the pair is one still


def joins(client: Client) -> bool:
    with contextlib.suppress(ValueError, OSError):
        client.join(secrets.token_hex(16))
        return not select.select([client.sock], [], [], 0.2)[0]
    return False


def test_so_many_wait_in_all(lab: natlab.Lab) -> None:
    with serving(lab, "--per-address", "1000"):
        clients = waiting(lab, 256)
        wait.until(lambda: refused(lab, "b"))
        assert len(clients) == 256


@pytest.mark.parametrize("limit", ["--waiting", "--per-address"])
def test_who_has_not_joined_makes_room_for_others(lab: natlab.Lab, limit: str) -> None:
    with serving(lab, limit, "4"):
        silent = [Client(lab) for _ in range(5)]
        assert silent[0].hear() == "no full" and silent[0].hear() == ""
        assert joins(Client(lab, "b"))
        assert not select.select([silent[-1].sock], [], [], 0)[0]


GUESSER = """
import os, socket, sys, time
sys.path[0] = {root!r}
import natpunch
end, guesses = time.time() + 10, 0
while time.time() < end:
    try:
        sock = socket.create_connection(({server!r}, 3478), 1)
        sock.settimeout(1)
        sock.sendall(b"natpunch 1\\n")
        nonce = sock.recv(100).decode().split()[1]
        line = f"join {{os.urandom(16).hex()}} pipe {{os.urandom(16).hex()}} plain"
        sock.sendall(f"{{line}} {{natpunch.mac(b'', nonce, line).hex()}}\\n".encode())
        sock.close()
    except (OSError, IndexError):
        pass
    guesses += 1
print(guesses)
"""


def test_guesses_of_rooms_keep_no_pair_from_meeting(lab: natlab.Lab) -> None:
    with serving(lab):
        code = GUESSER.format(root=str(punching.running.ROOT), server=lab.servers[0])
        command = [punching.words()[0], "-c", code]
        waiting = punching.peer(lab, "a", "room")
        time.sleep(0.5)
        guessers = [lab.start("b", *command) for _ in range(2)]
        time.sleep(2)
        for _ in range(3):
            other = punching.peer(lab, "b", "room")
            assert punching.got(waiting) == punching.got(other) == "direct"
            punching.talk(waiting, other)
            waiting = punching.peer(lab, "a", "room")
        total = sum(int(g.communicate(timeout=30)[0]) for g in guessers)
        assert total > 1000
        waiting.kill()


# Lines.


@pytest.mark.parametrize(
    "line",
    [
        b"x" * (1 << 20),
        b"x\n" * 1000,
        b"\n",
        b"\xff\xfe\n",
        b"natpunch 2\n",
        b"join\n",
        b"round same 0 10.0.0.1 1\n",
        b"relay\n",
        b"see 0000000000000000\n",
        b"\0\1\0\x04" + bytes(16),
        b"\0\1\xff\xff" + bytes(2000),
        b"GET / HTTP/1.1\r\n\r\n",
        bytes(range(256)),
        b"\0" * 2000,
    ],
)
def test_nonsense_is_the_end_of_a_connection(served: natlab.Lab, line: bytes) -> None:
    client = Client(served)
    with contextlib.suppress(OSError):
        client.sock.sendall(line)
    with contextlib.suppress(OSError):
        client.sock.shutdown(socket.SHUT_WR)
    assert client.hear() in ("", "no nobody")
    pair(served)


@pytest.mark.parametrize(
    "said",
    [
        "round same 0",
        "round same 0 10.0.0.2 1 2",
        "join " + ROOM,
    ],
)
def test_nonsense_of_a_pair_ends_both(served: natlab.Lab, said: str) -> None:
    one, other = pair(served)
    one.say(said)
    assert one.hear() == "" and other.hear() == "no gone"


@pytest.mark.parametrize("after", ["join", "pair"])
def test_nobody_joins_twice(lab: natlab.Lab, after: str) -> None:
    with serving(lab):
        one, other = Client(lab), Client(lab, "b")
        if after == "pair":
            one, other = pair(lab, room=ROOM)
        if after == "join":
            one.join()
        line = f"join {ROOM} far {'0' * 32} plain"
        one.say(f"{line} {natpunch.mac(b'', one.nonce, line).hex()}")
        assert one.hear() == ""
        wrong = Client(lab)
        wrong.join(key=b"none")  # and what it says after that is not heard
        line = f"join {ROOM} pipe {'0' * 32} plain"
        wrong.say(f"{line} {natpunch.mac(b'', wrong.nonce, line).hex()}")
        assert wrong.hear() == "no key"
        third = Client(lab, "b")
        third.join()
        assert not select.select([third.sock], [], [], 0.2)[0]


@pytest.mark.parametrize("size", [1, 3, 100])
def test_messages_come_in_pieces_or_at_once(served: natlab.Lab, size: int) -> None:
    client, nonces = Client(served), ["1" * 16, "2" * 16]
    requests = [natpunch.COOKIE + bytes.fromhex(nonce) + b"mine" for nonce in nonces]
    said = b"natpunch 1\n" + b"".join(
        natpunch.stun(natpunch.BINDING, transaction) for transaction in requests
    )
    for at in range(0, len(said), size):
        client.sock.sendall(said[at : at + size])
        time.sleep(0.01)
    assert client.hear().startswith("natpunch ")
    client.sock.settimeout(5)
    for transaction in requests:
        answer = natpunch.parse_stun(client.sock.recv(32, socket.MSG_WAITALL))
        assert answer[:2] == (natpunch.SUCCESS, transaction)


# What is told.


def test_a_peer_is_told_what_was_seen_and_no_third_address(served: natlab.Lab) -> None:
    one, other = pair(served)
    seen = one.see(served), other.see(served, "b")
    for client in (one, other):
        client.say("round same 0 10.0.0.2 7")
    assert one.hear() == f"peer same 0 {served.outside['b']} {seen[1]}"
    assert other.hear() == f"peer same 0 {served.outside['a']} {seen[0]}"
    # Not a port that was not seen in this round, nor one of another host.
    stranger = Client(served, "a", 3479)
    assert ask(stranger.sock, other.nonce)
    for client in (one, other):
        client.say("round step 1 10.0.0.2 7")
    assert one.hear() == f"peer step 1 {served.outside['b']} 0"


def test_both_are_told_at_once(served: natlab.Lab) -> None:
    # The first that comes to a NAT which rejects closes it, unless the two cross.
    one, other = pair(served)
    for number in range(3):
        for client in (one, other):
            assert not select.select([one.sock, other.sock], [], [], 0.2)[0]
            client.say(f"round step {number} 10.0.0.2 7")
        for client in (one, other):
            assert client.hear().startswith(f"peer step {number} ")


def test_inside_addresses_are_told_behind_one_nat_only(served: natlab.Lab) -> None:
    one, other = pair(served, "a", "a")
    port = one.see(served)
    for client in (one, other):
        client.say("round same 0 10.0.0.7 7")
    assert other.hear() == f"peer same 0 {served.outside['a']} {port} 10.0.0.7 7"


# The relay.


def test_there_may_be_no_relay(lab: natlab.Lab) -> None:
    with serving(lab, "--no-relay"):
        one, other = pair(lab)
        one.say("relay")
        assert one.hear() == other.hear() == "no relay"


def test_a_parent_that_ignores_the_end_of_children_changes_nothing(
    lab: natlab.Lab,
) -> None:
    with serving(lab, before=["env", "--ignore-signal=CHLD"]):
        for text in (b"first", b"again"):
            one, other = pair(lab, room=ROOM)
            one.say("relay")
            assert one.hear() == other.hear() == "relay"
            one.sock.sendall(text)
            assert other.sock.recv(5) == text
            for client in (one, other):
                client.sock.close()
            wait.until(lambda: len(punching.pids(lab, "server")) == 1)


def test_a_child_that_its_parent_had_is_none_of_its_relays(lab: natlab.Lab) -> None:
    shell = ["sh", "-c", 'sleep 60 & exec "$@"', "sh"]
    with serving(lab, before=shell) as process:
        (child,) = kernel.children(process.pid)
        one, other = pair(lab)
        one.say("relay")
        assert one.hear() == other.hear() == "relay"
        os.kill(child, signal.SIGKILL)
        pair(lab)
        one.sock.sendall(b"hello")
        assert other.sock.recv(5) == b"hello"


@pytest.mark.parametrize("cap", [("--relay-bytes", "1000"), ("--relay-time", "1")])
def test_a_relay_has_its_caps(lab: natlab.Lab, cap: tuple[str, str]) -> None:
    with serving(lab, *cap):
        one, other = pair(lab)
        one.say("relay")
        assert one.hear() == other.hear() == "relay"
        one.sock.sendall(b"x" * 900)
        assert other.sock.recv(900, socket.MSG_WAITALL) == b"x" * 900
        if cap[0] == "--relay-bytes":
            one.sock.sendall(b"x" * 900)
        started = time.monotonic()
        assert other.hear() == "" and one.hear() == ""
        assert time.monotonic() - started < 4


def test_the_server_dials_nobody(lab: natlab.Lab) -> None:
    needs.programs("strace")
    with serving(lab) as process:
        (pid,) = kernel.children(process.pid) or [process.pid]
        trace = lab.start("server", "strace", "-f", "-e", "connect", "-p", str(pid))
        punching.read_line(trace)
        one, other = pair(lab)
        one.say("relay")
        assert one.hear() == other.hear() == "relay"
        one.sock.sendall(b"hello")
        assert other.sock.recv(5) == b"hello"
        trace.send_signal(signal.SIGINT)
        assert b"connect(" not in trace.communicate(timeout=10)[1]


# The key.


def test_without_the_key_there_is_nothing_but_stun(lab: natlab.Lab) -> None:
    with serving(lab, NATPUNCH_KEY=KEY):
        for key in (b"", b"another key of someone"):
            client = Client(lab)
            client.join(key=key)
            assert client.hear() == "no key" and client.hear() == ""
        client = Client(lab)
        client.join(key=KEY.encode())
        assert not select.select([client.sock], [], [], 0.2)[0]
        assert len(stun(lab, request())) == 44
        done = lab.run(
            "a", *punching.words("-s", lab.servers[0], "room"), **punching.ENVIRONMENT
        )
        assert done.returncode == 1
        assert done.stderr.endswith(": the server has another key\n")
        others = [punching.peer(lab, place, "room", NATPUNCH_KEY=KEY) for place in "ab"]
        punching.talk(*others)


def test_who_has_no_key_keeps_nobody_out_who_has_it(lab: natlab.Lab) -> None:
    slow = "natpunch.ANSWER_TIME = 60"
    with serving(lab, changed=slow, NATPUNCH_KEY=KEY):
        strangers = [Client(lab) for _ in range(16)]
        first = Client(lab)
        first.say("natpunch 1")
        assert first.hear().startswith("natpunch ")
        first.sock.close()
        one, other = pair(lab, "a", "a", key=KEY.encode())
        assert one.see(lab) and other.see(lab) and len(strangers) == 16


def test_a_proof_is_good_once(lab: natlab.Lab) -> None:
    with serving(lab, NATPUNCH_KEY=KEY):
        first = Client(lab)
        first.say("natpunch 1")
        nonce = first.hear().split()[1]
        line = f"join {ROOM} pipe {'0' * 32} plain"
        line += " " + natpunch.mac(KEY.encode(), nonce, line).hex()
        second = Client(lab)
        second.say("natpunch 1")
        second.hear()
        second.say(line)
        assert second.hear() == "no key"


# STUN.


def request(*attributes: tuple[int, bytes], cookie: bytes = natpunch.COOKIE) -> bytes:
    return natpunch.stun(natpunch.BINDING, cookie + os.urandom(12), *attributes)


def stun(lab: natlab.Lab, message: bytes, place: str = "b") -> bytes:
    """Return the answer to a message, from wherever it comes, or nothing."""
    time.sleep(0.11)  # ten a second
    kind = socket.SOCK_DGRAM
    with lab.within(place, lambda: socket.socket(socket.AF_INET, kind)) as sock:
        sock.settimeout(0.3)
        sock.sendto(message, (lab.servers[0], 3478))
        with contextlib.suppress(TimeoutError):
            return sock.recv(2000)
    return b""


UNKNOWN = [(0x0026, b"x" * 8), (0x7FFF, b""), (0x0027, b"1234")]


def test_an_answer_is_at_most_1_6_times_as_long_with_one_address() -> None:
    with natlab.lab() as lab:
        lab.servers = lab.servers[:1]
        with serving(lab):
            asked = [
                request(),
                request(cookie=b"olds"),
                request((natpunch.CHANGE, bytes(4))),
                request((natpunch.CHANGE, bytes((0, 0, 0, 6)))),
                *[request(one) for one in UNKNOWN],
                request(*UNKNOWN),
                request(*[(0x7000 + n, b"") for n in range(100)]),
                *[request((0x8022, b"x" * n)) for n in range(8)],
            ]
            for message in asked:
                answer = stun(lab, message)
                assert 20 <= len(answer) <= 1.6 * len(message)
            assert len(stun(lab, request())) == 32


def test_a_server_on_all_addresses_answers_from_the_one_that_was_asked() -> None:
    with natlab.lab() as lab:
        both, lab.servers = lab.servers, []
        with serving(lab) as process:
            assert "serving on" in punching.read_line(process)
            for at in both:
                said = lab.run("a", *punching.words("-s", at, "nat")).stdout
                for line in said.splitlines():
                    assert re.match(r"(udp|tcp): same, port \d+ seen at \S+ \S", line)
                assert len(said.splitlines()) == 2


def test_with_two_addresses_the_other_one_is_told_as_rfc_5780_wants(
    served: natlab.Lab,
) -> None:
    answer = natpunch.parse_stun(stun(served, request()))[2]
    assert set(answer) == {natpunch.XOR_MAPPED, natpunch.OTHER}
    old = stun(served, request((natpunch.CHANGE, bytes(4)), cookie=b"olds"))
    assert set(natpunch.parse_stun(old)[2]) == {natpunch.MAPPED, natpunch.CHANGED}
    assert len(old) <= 1.6 * 28


@pytest.mark.parametrize("attribute", UNKNOWN)
def test_what_must_be_understood_and_is_not_is_420(
    served: natlab.Lab, attribute: tuple[int, bytes]
) -> None:
    kind, _, found = natpunch.parse_stun(stun(served, request(attribute)))
    assert kind == natpunch.ERROR and found[natpunch.ERROR_CODE][2:] == b"\4\x14"
    assert found[natpunch.UNKNOWN] == struct.pack("!H", attribute[0])


@pytest.mark.parametrize(
    "message",
    [
        b"",
        b"\0" * 19,
        request()[:-1],
        request() + b"1234",
        natpunch.stun(natpunch.SUCCESS, natpunch.COOKIE + bytes(12)),
        b"\0\1\xff\xff" + bytes(16),
        os.urandom(500),
    ],
)
def test_what_is_no_request_has_no_answer(served: natlab.Lab, message: bytes) -> None:
    assert stun(served, message) == b""


def test_a_source_has_ten_answers_a_second(lab: natlab.Lab) -> None:
    with serving(lab):
        kind = socket.SOCK_DGRAM
        with lab.within("b", lambda: socket.socket(socket.AF_INET, kind)) as sock:
            for _ in range(3):
                for _ in range(200):
                    sock.sendto(request(), (lab.servers[0], 3478))
                time.sleep(1)
            sock.setblocking(False)
            count = 0
            with contextlib.suppress(BlockingIOError):
                while sock.recv(100):
                    count += 1
        assert 10 <= count <= 40
        assert stun(lab, request(), "a")  # another one has its own


def test_a_member_is_seen_though_its_address_has_had_its_ten(lab: natlab.Lab) -> None:
    # There may be many members behind it, and each asks three times in a round.
    with serving(lab):
        one, other = pair(lab)
        kind, token = socket.SOCK_DGRAM, bytes.fromhex(one.nonce[:16])
        with lab.within("a", lambda: socket.socket(socket.AF_INET, kind)) as sock:
            sock.connect((lab.servers[0], 3478))
            for _ in range(30):
                sock.send(request())
            mine = natpunch.COOKIE + token + b"mine"
            sock.send(natpunch.stun(natpunch.BINDING, mine))
            sock.settimeout(2)
            answers = []
            with contextlib.suppress(TimeoutError):
                while mine not in answers:
                    answers.append(sock.recv(100)[4:20])
        assert mine in answers and len(answers) <= 21  # a second may have ended
        assert not select.select([other.sock], [], [], 0)[0]  # the pair is one still


def test_a_round_has_1024_probes_of_19_bytes_at_most_2000_a_second() -> None:
    snmp = Path("/proc/thread-self/net/snmp")

    def sent() -> int:
        return int(re.findall(r"^Udp: (\d.*)$", snmp.read_text(), re.M)[0].split()[3])

    def measure() -> tuple[int, float, int]:
        """Return how many probes go in the first seconds, and in a round."""
        listener = natpunch.bound(socket.SOCK_DGRAM, socket.AF_INET)
        peers = natpunch.Peers(0, b"key")
        assert len(peers.probe(natpunch.SYN)) == 19
        at = "198.51.100.2", 4000
        count, there = natpunch.aims("same", "random", at, 0)
        assert (count, len(set(there))) == (1, 1024)
        puncher, start = natpunch.Puncher(peers, [listener]), sent()
        started = time.monotonic()
        punching = threading.Thread(target=puncher.run, args=(there, 1.75, False))
        punching.start()
        time.sleep(0.25)
        part, seconds = sent() - start, time.monotonic() - started
        punching.join()
        puncher.close()
        return part, seconds, sent() - start

    with natlab.lab() as lab:
        part, seconds, whole = lab.within("a", measure)
    assert 300 <= part <= 2000 * seconds + 20 and whole == 1024
