#!/usr/bin/env python3
"""natpunch: join two machines, each behind a NAT that admits nobody, directly.

A server that both can reach tells each where the other was seen.  Both send there at
once, each NAT takes what then comes for an answer, and the server is out of it:

    A --- NAT ===+===========+=== NAT --- B
                 +-- server -+

Where no hole can be made, the server relays.  Usage:

    natpunch.py serve [ADDRESS]... [--key FILE]        the server, ports 3478 and 3479
    natpunch.py -s SERVER ROOM                         standard input and output
    natpunch.py -s SERVER ROOM --to HOST:PORT          the far end: a port, as sshd's
    natpunch.py -s SERVER ROOM --listen PORT [--udp]   a local port
    natpunch.py -s SERVER nat                          which NAT is this

Both sides have the same secret, in ~/.natpunch, in NATPUNCH_SECRET or in the file of
--secret; the server never knows it.  A server with a key (--key, NATPUNCH_KEY) serves
nobody without it.  Each peer proves the secret before a byte of payload moves.  A
stream is plain TCP, or TLS by the secret where both sides have Python 3.13; datagrams
are plain.

Exit codes: 0 done, or asked to stop (TERM, INT); 1 it could not be done; 2 bad command
line; 130 a pipe was interrupted.  Streams outlive a server or a far end that is ended.

Reading order.  Every section uses only the ones above it.  find_way() tells the story:
observe, meet, punch, or relay; then carry() does the work.

It does not move a stream to another address, and it does not speak ICE.
"""
# SPDX-License-Identifier: MIT

from __future__ import annotations

import argparse
import contextlib
import hmac
import ipaddress
import os
import random
import re
import resource
import select
import selectors
import signal
import socket
import ssl
import stat
import struct
import sys
import time
from collections.abc import Callable
from collections.abc import Iterator
from typing import Any
from typing import NamedTuple
from typing import NoReturn

if sys.version_info < (3, 10):  # noqa: UP036
    sys.exit("natpunch: needs Python 3.10 or later")

__version__ = "0.1.0"

# --- Limits -------------------------------------------------------------------
#
# Sizes are bytes, times are seconds.

PORT = 3478  # and the next one: RFC 8489 section 18.6
LINE_LIMIT = 1024  # a message between us and the server
READ_SIZE = 256 * 1024
FAN = 24  # ports that are tried ahead of a stepping NAT
BIRTHDAYS = 256  # ports of a random NAT, of which PROBES hit one with 98.3 %
PROBES = 1024  # that a round may send, at 8 in 4 ms
STEP_LIMIT = 16  # a NAT that steps further is taken for random
LOW_TTL, LOW_TTL_TIME = 2, 0.15  # leaves our NAT, and has its time to open it
BIRTHDAY_TIME = 0.7  # in which PROBES are sent
OBSERVE_TIME = 0.5  # for the server to say what it sees
ANSWER_TIME = 10.0  # for a server, a peer's proof, or a client that has not joined
PAIR_TIME = 30.0  # for a pair to have done with the server, or to want the relay
WAIT_TIME = 60.0  # unpaired; then a client joins anew, and says so
RETRY_TIME = 5.0  # of a far end whose server is away
KEEP_ALIVE = 15.0  # conntrack forgets an unanswered datagram in 30
SILENCE = 45.0  # of a hole that is then punched anew
STUN_RATE = 10  # answers to one source in a second
SOURCES = 10000  # that are answered in a second; forged ones have no end
FOREVER = float("inf")

INET6, STREAM, DGRAM = socket.AF_INET6, socket.SOCK_STREAM, socket.SOCK_DGRAM
POLLIN, POLLOUT = select.POLLIN, select.POLLOUT
# A round's time, and whether it begins with a low TTL: 6 s in all.
ROUNDS = {DGRAM: ((3, True), (3, False)), STREAM: ((2, False), (2, False), (2, True))}
NOT_YET = BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError
Address = tuple[str, int]

# --- What is said -------------------------------------------------------------

REFUSALS = {
    "full": "the server has no place now",
    "taken": "the room is taken",
    "key": "the server has another key",
    "nobody": "nobody has come",
    "gone": "the peer has left",
    "relay": "no hole could be made, and it may not be relayed",
}


class Refused(Exception):
    """The server refuses: the text is a key of REFUSALS."""


class Failure(Exception):
    """The end of a run: the line that says why, and the exit code."""

    def __init__(self, text: str, code: int = 1) -> None:
        super().__init__(text)
        self.code = code


def say(message: object) -> None:
    """Write a line to standard error; where nobody reads it, it is lost."""
    with contextlib.suppress(OSError):
        os.write(2, f"natpunch: {message}\n".encode(errors="replace"))


@contextlib.contextmanager
def trying(to: str, code: int = 1) -> Iterator[None]:
    """Turn what fails into the one line of a Failure, with nothing of the network."""
    try:
        yield
    except Refused as refused:
        raise Failure(f"cannot {to}: {REFUSALS[str(refused)]}", code) from refused
    except OSError as error:
        why = (error.strerror or str(error)).partition(" (")[0]
        raise Failure(f"cannot {to}: {why[:1].lower() + why[1:]}", code) from error
    except (ValueError, LookupError) as error:
        raise Failure(f"cannot {to}: that is not natpunch", code) from error


def spelled(address: Any) -> str:
    host, port = address[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def parse_address(text: str, port: int = 0) -> Address:
    """Return host and port of HOST:PORT or [HOST]:PORT, or a host and that port."""
    host, colon, number = text.rpartition(":")
    if port and (not colon or ":" in host and host[-1] != "]"):
        host, number = text, str(port)
    if not re.fullmatch("[0-9]{1,5}", number) or not 0 < int(number) < 65535:
        raise Failure(f"cannot use {text!r}: it has no port from 1 to 65534", 2)
    return host.strip("[]"), int(number)


def secret_of(variable: str, path: str, default: str) -> bytes:
    """Return the secret of a file, else of the environment, else of a default file."""
    found = os.environ.get(variable, "").encode()
    path = path or ("" if found else os.path.expanduser(default))
    with trying(f"read {path}", 2):
        if path:
            with open(path, "rb") as file:
                if os.fstat(file.fileno()).st_mode & 0o077:
                    raise OSError("others may read it")
                found = file.read(LINE_LIMIT).strip()
    if len(found) < 16 and (path or found):
        raise Failure(f"cannot use {path or variable}: 16 characters are the least", 2)
    return found


def mac(key: bytes, *words: object) -> bytes:
    """Return 16 bytes that only an owner of the key can make of these words."""
    return hmac.digest(key, " ".join(map(str, words)).encode(), "sha256")[:16]


# --- STUN ---------------------------------------------------------------------
#
# RFC 8489, with RFC 5780 where the server has two addresses.  A transaction is the
# cookie and an identifier; that of an RFC 3489 client has no cookie.

COOKIE = bytes.fromhex("2112a442")
BINDING, SUCCESS, ERROR = 0x0001, 0x0101, 0x0111
MAPPED, CHANGE, CHANGED, ERROR_CODE, UNKNOWN = 1, 3, 5, 9, 10
XOR_MAPPED, OTHER = 0x0020, 0x802C
KNOWN = {CHANGE, 0x0006, 0x0008, 0x001C}  # and a name and proofs that nobody needs
OTHER_HOST, OTHER_PORT = 4, 2  # flags of CHANGE-REQUEST


def stun(kind: int, transaction: bytes, *attributes: tuple[int, bytes]) -> bytes:
    """Return a message."""
    body = b""
    for name, value in attributes:
        body += struct.pack("!HH", name, len(value)) + value + bytes(-len(value) % 4)
    return struct.pack("!HH", kind, len(body)) + transaction + body


def parse_stun(message: bytes) -> tuple[int, bytes, dict[int, bytes]]:
    """Return kind, transaction and attributes; raise ValueError."""
    if len(message) < 20 or len(message) - 20 != int.from_bytes(message[2:4], "big"):
        raise ValueError("not a message")
    found, rest = {}, message[20:]
    while len(rest) >= 4:
        name, size = struct.unpack_from("!HH", rest)
        found[name], rest = rest[4 : 4 + size], rest[4 + size + -size % 4 :]
    return int.from_bytes(message[:2], "big"), message[4:20], found


def hidden(raw: bytes, transaction: bytes) -> bytes:
    """Return port and host as XOR-MAPPED-ADDRESS has them, or the reverse."""
    return bytes(a ^ b for a, b in zip(raw, transaction[:2] + transaction))


def packed(address: Address, transaction: bytes = bytes(16)) -> bytes:
    """Return the value of an attribute that is an address."""
    host = ipaddress.ip_address(address[0]).packed
    raw = hidden(address[1].to_bytes(2, "big") + host, transaction)
    return bytes((0, 1 if len(host) == 4 else 2)) + raw


def stun_answer(
    message: bytes, source: Address, other: Address | None
) -> tuple[bytes, int]:
    """Return an answer, and the flags of CHANGE-REQUEST; raise ValueError.

    It is the least there is, so that a forged source gains little: 32 bytes for 20,
    or 44 where there is another address to tell.
    """
    kind, transaction, asked = parse_stun(message)
    if kind != BINDING:
        raise ValueError("not a request")
    change = int.from_bytes(asked.get(CHANGE, b""), "big") & (OTHER_HOST | OTHER_PORT)
    unknown = [name for name in asked if name < 0x8000 and name not in KNOWN]
    if unknown or change & OTHER_HOST and not other:
        names = struct.pack(f"!{len(unknown or [CHANGE])}H", *(unknown or [CHANGE]))
        code = ERROR_CODE, bytes((0, 0, 4, 20))
        return stun(ERROR, transaction, code, (UNKNOWN, names)), 0
    is_old = transaction[:4] != COOKIE
    found = [(XOR_MAPPED, packed(source, transaction))]
    if is_old:
        found = [(MAPPED, packed(source))]
    if other:
        found.append((CHANGED if is_old else OTHER, packed(other)))
    return stun(SUCCESS, transaction, *found), change


# --- Observing ----------------------------------------------------------------
#
# Three destinations from one local port: what the server sees of it is where the
# peer has to aim, and how the three differ is how our NAT behaves.


def bound(kind: int, family: int, port: int = 0) -> socket.socket:
    """Return a socket at a local port that others may share."""
    sock = socket.socket(family, kind)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    # Not for UDP: the kernel would choose a port that another socket has.
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, kind == STREAM)
    sock.bind(("", port))
    return sock


def seen_by(server: Address, sock: socket.socket, token: bytes) -> Address:
    """Return as what a server sees a socket; raise OSError, ValueError, LookupError."""
    sock.settimeout(OBSERVE_TIME)
    sock.connect(server)
    if sock.type == STREAM:
        sock.send(f"see {token.hex()}\n".encode())
        _, host, port = sock.recv(LINE_LIMIT).decode("ascii").split()
        return str(ipaddress.ip_address(host)), int(port)
    transaction = COOKIE + token + os.urandom(4)
    for _ in range(2):  # a datagram may be lost
        sock.send(stun(BINDING, transaction))
        with contextlib.suppress(TimeoutError):
            _, answered, found = parse_stun(sock.recv(LINE_LIMIT))
            raw = hidden(found[XOR_MAPPED][2:], answered)
            if answered == transaction:
                return str(ipaddress.ip_address(raw[2:])), int.from_bytes(
                    raw[:2], "big"
                )
    raise TimeoutError


def observe(
    listener: socket.socket, servers: list[Address], token: bytes
) -> list[Address]:
    """Return as what the servers see a local port, less those that are silent.

    They know by the token whom they see.
    """
    seen, port = [], listener.getsockname()[1]
    for server in servers:
        with contextlib.suppress(OSError, ValueError, LookupError):
            with bound(listener.type, listener.family, port) as sock:
                seen.append(seen_by(server, sock, token))
    return seen


def behavior(seen: list[Address]) -> tuple[str, int]:
    """Return how a NAT chooses ports, and its step, by how it was seen."""
    steps = [after[1] - before[1] for before, after in zip(seen, seen[1:])]
    if not any(steps):
        return "same" if seen else "none", 0
    if all(0 < step <= STEP_LIMIT for step in steps):
        return "step", min(steps)
    return "random", 0


# --- Punching -----------------------------------------------------------------
#
# A probe proves the secret and says which role sends it.  Role 0 says SYN, role 1
# answers ACK; the first ACK that role 0 hears names the hole, and DONE tells role 1.
# Nothing answers DONE: later ones keep the hole open.  BYE leaves it.

MAGIC, PROBE_SIZE = b"\xf5\x9d", 19
SYN, ACK, DONE, BYE = b"\1", b"\2", b"\3", b"\4"
REPLIES: tuple[dict[bytes, bytes], ...] = ({SYN: SYN, ACK: DONE}, {SYN: ACK})
LAST = ACK, DONE  # by role


class Peers(NamedTuple):
    """What the two of us know, and which of them we are."""

    role: int
    key: bytes

    def probe(self, kind: bytes, role: int) -> bytes:
        return MAGIC + kind + mac(self.key, role, kind.hex())

    def say(self, sock: socket.socket, kind: bytes) -> None:
        """Send a probe, or lose it."""
        with contextlib.suppress(OSError):
            sock.send(self.probe(kind, self.role), socket.MSG_DONTWAIT)

    def kind_of(self, data: bytes) -> bytes:
        """Return which probe of the peer this is, or nothing."""
        right = self.probe(data[2:3], 1 - self.role)
        return data[2:3] if hmac.compare_digest(data, right) else b""


class Sight(NamedTuple):
    """A peer's NAT, as the server sees it."""

    host: str
    port: int  # the last one seen
    behavior: str  # same, step or random; none if nothing was seen
    step: int
    inside: list[Address]  # of a peer behind the same NAT as we


def aims(mine: str, theirs: Sight) -> tuple[int, list[Address]]:
    """Return from how many ports to send, and where to; nowhere if it is hopeless.

    Two stepping NATs fan in: each probe of ours takes one of our next ports, so that
    whichever of them the peer aims at has been opened towards it.
    """
    last = [theirs.port]
    ahead = [theirs.port + theirs.step * n for n in range(1, FAN + 1)]
    table = {
        ("same", "same"): (1, last),
        ("same", "step"): (1, ahead),
        ("same", "random"): (1, random.sample(range(1024, 65536), PROBES)),
        ("step", "same"): (1, last),
        ("step", "step"): (FAN, ahead[FAN // 2 - 1 : FAN // 2]),
        ("random", "same"): (BIRTHDAYS, last),
    }
    count, ports = table.get((mine, theirs.behavior), (1, []))
    return count, theirs.inside + [
        (theirs.host, port) for port in ports if port < 65536
    ]


class Puncher:
    """Sockets that try to reach the peer; TCP and UDP differ little here."""

    def __init__(self, peers: Peers, listeners: list[socket.socket], kind: int) -> None:
        self.peers, self.is_tcp, self.left = peers, kind == STREAM, PROBES
        self.listeners = {sock.fileno(): sock for sock in listeners}
        self.socks: dict[int, socket.socket] = {}
        self.aimed: dict[tuple[int, Address], socket.socket] = {}
        self.poll = select.poll()
        for sock in listeners:
            self.poll.register(sock, POLLIN)
            if self.is_tcp:
                sock.listen()

    def add(self, sock: socket.socket) -> None:
        """Watch a socket; a connection can be written to once it has been made."""
        sock.setblocking(False)
        self.socks[sock.fileno()] = sock
        self.poll.register(sock, POLLOUT if self.is_tcp else POLLIN)

    def shoot(self, fd: int, there: Address, ttl: int = -1) -> socket.socket:
        """Return the socket that aims from a listener's port, having sent."""
        sock, listener = self.aimed.get((fd, there)), self.listeners[fd]
        level, name = socket.IPPROTO_IP, socket.IP_TTL
        if listener.family == INET6:
            level, name = socket.IPPROTO_IPV6, socket.IPV6_UNICAST_HOPS
        if not sock or sock.fileno() < 0:
            sock = bound(listener.type, listener.family, listener.getsockname()[1])
            self.aimed[fd, there] = sock
            self.add(sock)
            sock.setsockopt(level, name, ttl)
            sock.connect_ex(there)
            self.left -= self.is_tcp
        if not self.is_tcp:
            self.peers.say(sock, SYN)
            self.left -= 1
        sock.setsockopt(level, name, -1)  # as usual
        return sock

    def act(self, fd: int, event: int) -> socket.socket | None:
        """Act on a socket that is ready; return the hole once it is one."""
        role, sock = self.peers.role, self.listeners.get(fd) or self.socks[fd]
        if self.is_tcp and fd in self.listeners:
            self.add(sock.accept()[0])
            return None
        if event & POLLOUT and not sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
            self.poll.modify(fd, POLLIN)
            if role == 0:
                self.peers.say(sock, SYN)
            return None
        # Not a byte more: after the last probe comes payload.
        data, source = b"", ("", 0)
        with contextlib.suppress(OSError):
            data, source = sock.recvfrom(PROBE_SIZE)
        kind = self.peers.kind_of(data)
        if not kind:
            if self.is_tcp:
                self.poll.unregister(fd)
                self.socks.pop(fd).close()
            return None
        if fd in self.listeners:  # a datagram from elsewhere than where we aim
            sock = self.shoot(fd, source[:2])
        for _ in range(3 if kind == ACK and not self.is_tcp else 1):  # it may be lost
            if kind in REPLIES[role]:
                self.peers.say(sock, REPLIES[role][kind])
        return sock if kind == LAST[role] else None

    def run(
        self, there: list[Address], seconds: float, low_ttl: bool = False
    ) -> socket.socket | None:
        """Send from every port to everywhere; return the hole, once there is one.

        A probe with a low TTL opens our side and does not reach the other, where a
        gateway might take it for its own, and with it the port that we hope for.
        """
        now = start = time.monotonic()
        pairs = [(fd, at) for fd in self.listeners for at in there]
        again, pause = 0.1 if self.is_tcp else 0.25, LOW_TTL_TIME
        if len(pairs) >= BIRTHDAYS:
            # The peer has to have sent to all its ports before we are seen there.
            again, pause, low_ttl = seconds, BIRTHDAY_TIME, low_ttl or not self.is_tcp
        ttl = LOW_TTL if low_ttl and len(pairs) <= BIRTHDAYS else -1
        due = [(start + n // 8 * 0.004, pair, ttl) for n, pair in enumerate(pairs)]
        while now < start + seconds:
            while due and due[0][0] <= now and self.left > 0:
                _, pair, ttl = due.pop(0)
                with contextlib.suppress(OSError):
                    self.shoot(*pair, ttl)
                due.append((now + (again if ttl < 0 else pause), pair, -1))
            soon = due[0][0] if due and self.left > 0 else start + seconds
            for fd, event in self.poll.poll(max(soon - now, 0) * 1000 + 1):
                with contextlib.suppress(OSError):
                    if hole := self.act(fd, event):
                        return self.socks.pop(hole.fileno())
            now = time.monotonic()
        return None

    def close(self) -> None:
        for sock in (*self.listeners.values(), *self.socks.values()):
            sock.close()


# --- Meeting ------------------------------------------------------------------
#
# Two clients that name the same room are a pair.  Each tells the server how its NAT
# behaves and hears where the other was seen.  The connection on which they do so
# becomes the relay, if they want one.


def keep_alive(sock: socket.socket) -> None:
    """Let the kernel end a connection whose other side is silent for too long."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name in (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL):
        sock.setsockopt(socket.IPPROTO_TCP, name, int(KEEP_ALIVE))
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(SILENCE * 1000))
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


class Meeting:
    """A connection to the server, and what was agreed there with the peer."""

    def __init__(self, options: Any) -> None:
        """Connect; raise OSError, ValueError, LookupError or Refused."""
        self.options, self.kind = options, DGRAM if options.udp else STREAM
        self.sock = socket.create_connection(options.server, ANSWER_TIME)
        keep_alive(self.sock)
        self.tell("natpunch 1")
        nonce, *others = self.hear("natpunch")
        self.nonce, (host, port) = bytes.fromhex(nonce), self.sock.getpeername()[:2]
        # The first is host1:p, then host1:p+1 and host2:p.
        self.servers = [(host, port), (host, port + 1), *[(at, port) for at in others]]

    def enter(self, seconds: float) -> None:
        """Wait in the room for a peer; raise as __init__()."""
        has_psk = getattr(ssl, "HAS_PSK", False)  # from Python 3.13
        mine = [os.urandom(16).hex(), "tls" if has_psk else "plain"]
        room = mac(self.options.secret, "room", self.options.room).hex()
        line = " ".join(("join", room, str(int(self.kind)), self.options.side, *mine))
        self.tell(line, mac(self.options.key, self.nonce.hex(), line).hex())
        self.sock.settimeout(max(seconds, 0.1))
        role, *theirs = self.hear("paired")
        self.sock.settimeout(PAIR_TIME)
        # What was agreed is in the key: nobody has altered it on the way.
        both = [mine, theirs] if role == "0" else [theirs, mine]
        text = f"{self.kind:d} {both}".encode()
        self.peers = Peers(int(role), hmac.digest(self.options.secret, text, "sha256"))
        self.tls = self.kind == STREAM and mine[1] == theirs[1] == "tls"

    def tell(self, *words: object) -> None:
        self.sock.sendall(" ".join(map(str, words)).encode() + b"\n")

    def hear(self, expected: str) -> list[str]:
        """Return the words of the server's next line; raise as __init__()."""
        line = b""
        while not line.endswith(b"\n") and len(line) < LINE_LIMIT:
            # Byte by byte: after the last line comes what is relayed.
            if not (byte := self.sock.recv(1)):
                raise OSError("the server has left")
            line += byte
        first, *words = line.decode("ascii").split()
        if first == "no" and words[0] in REFUSALS:
            raise Refused(words[0])
        if first != expected:
            raise ValueError(first)
        return words

    def compare(self, here: Address, seen: list[Address]) -> tuple[str, Sight]:
        """Tell how our NAT behaves; return what counts of it, and the peer's."""
        self.tell("round", *behavior(seen), seen[-1][1] if seen else 0, *here)
        mine, host, port, kind, step, *inner = self.hear("peer")
        inside = [(str(ipaddress.ip_address(inner[0])), int(inner[1]))] if inner else []
        address = str(ipaddress.ip_address(host))
        return mine, Sight(address, int(port), kind, int(step), inside)

    def punch(self, seconds: float, low_ttl: bool) -> tuple[socket.socket | None, str]:
        """Observe, meet, punch; return the hole, or None, and for which pair."""
        listeners = [bound(self.kind, self.sock.family)]
        seen = observe(listeners[0], self.servers, self.nonce[:8])
        here = self.sock.getsockname()[0], listeners[0].getsockname()[1]
        mine, theirs = self.compare(here, seen)
        count, there = aims(mine, theirs)
        with contextlib.suppress(OSError):  # as many as we may have files
            while len(listeners) < count:
                listeners.append(bound(self.kind, self.sock.family))
        puncher = Puncher(self.peers, listeners, self.kind)
        try:
            hole = puncher.run(there, seconds if there else 0, low_ttl)
        finally:
            puncher.close()
        return hole, f"{mine}-{theirs.behavior}"

    def relay(self) -> socket.socket:
        """Return the relayed connection, once the peer has proved the secret."""
        if self.options.direct_only:
            raise Refused("relay")
        self.tell("relay")
        self.hear("relay")
        puncher = Puncher(self.peers, [], STREAM)
        puncher.add(self.sock)
        if not puncher.run([], ANSWER_TIME):
            raise OSError("the peer does not prove the secret")
        return self.sock


def meet(options: Any) -> Meeting:
    """Return a meeting with a peer, once one has come; raise Failure."""
    ends_at = time.monotonic() + options.wait
    with trying(f"meet in {options.room} at {spelled(options.server)}"):
        while (left := ends_at - time.monotonic()) > 0:
            meeting = Meeting(options)
            try:
                meeting.enter(min(left, 2 * WAIT_TIME))
                return meeting
            except TimeoutError:
                meeting.sock.close()
            except Refused as refused:
                if str(refused) not in ("full", "nobody"):
                    raise
                say(f"waiting in {options.room}: {REFUSALS[str(refused)]}")
                time.sleep(str(refused) == "full")
        raise OSError(f"nobody came in {options.wait:g} s")


def find_way(meeting: Meeting) -> tuple[socket.socket, bool]:
    """Return a connection to the peer, and whether it is direct; raise Failure."""
    started = time.monotonic()
    with trying("reach the peer"):
        for seconds, low_ttl in ROUNDS[meeting.kind]:
            hole, pair = meeting.punch(seconds, low_ttl)
            if hole:
                took, at = time.monotonic() - started, spelled(hole.getpeername())
                say(f"direct {at} ({pair}, {took:.2f} s)")
                meeting.sock.close()
                return hole, True
            if "none" in pair or "random" in pair and "same" not in pair:
                break  # no round will help
        way = meeting.relay()
        say(f"relay ({pair})")
        return way, False


# --- Carrying -----------------------------------------------------------------
#
# A stream crosses in frames, each a size and so many bytes.  An empty one is the end
# of its direction, so that a peer that dies is not taken for one that is done.
# Datagrams cross a hole as they are, and the relay in frames.


def with_tls(sock: socket.socket, peers: Peers) -> ssl.SSLSocket:
    """Return a connection in TLS, by the secret and by nothing else."""
    psk, is_client = mac(peers.key, "tls"), peers.role == 1
    kind = ssl.PROTOCOL_TLS_CLIENT if is_client else ssl.PROTOCOL_TLS_SERVER
    context: Any = ssl.SSLContext(kind)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    if is_client:
        # A server that declines the secret has to show a certificate: verify_mode
        # stays CERT_REQUIRED, and none is trusted.
        context.check_hostname = False
        context.set_psk_client_callback(lambda hint: ("peer", psk))
    else:
        context.set_psk_server_callback(lambda identity: psk)
    made: ssl.SSLSocket = context.wrap_socket(sock, server_side=not is_client)
    return made


class Channel:
    """A connection to the peer, and the frames on it."""

    def __init__(self, sock: socket.socket, meeting: Meeting) -> None:
        """Begin TLS where both can; raise OSError."""
        keep_alive(sock)
        sock.settimeout(ANSWER_TIME)
        self.sock = with_tls(sock, meeting.peers) if meeting.tls else sock
        self.sock.setblocking(False)
        self.buffer, self.ended, self.gone = b"", False, False

    def seal(self, data: bytes) -> bytes:
        return len(data).to_bytes(4, "big") + data

    def send(self, data: Any) -> int:
        return self.sock.send(data)

    def close(self) -> None:
        self.sock.close()

    def receive(self) -> list[Any]:
        """Return the frames that have come; raise OSError or ValueError."""
        data = self.sock.recv(READ_SIZE)
        while isinstance(self.sock, ssl.SSLSocket) and self.sock.pending():
            data += self.sock.recv(READ_SIZE)
        self.gone = not data
        if self.gone and not self.ended:
            raise OSError("the peer has vanished")
        found, at, buffer = [], 0, memoryview(self.buffer + data)
        while len(buffer) >= at + 4:
            size = int.from_bytes(buffer[at : at + 4], "big")
            if self.ended or size > READ_SIZE:
                raise ValueError("not a frame")
            if len(buffer) < at + 4 + size:
                break
            found.append(buffer[at + 4 : at + 4 + size])
            self.ended, at = size == 0, at + 4 + size
        self.buffer = bytes(buffer[at:])
        return found


class Hole:
    """A hole that datagrams cross, used as a channel is."""

    def __init__(self, sock: socket.socket, meeting: Meeting) -> None:
        self.sock, self.peers, self.ended, self.gone = sock, meeting.peers, False, False
        self.heard_at = self.told_at = time.monotonic()

    def seal(self, data: bytes) -> bytes:
        return data

    def send(self, data: Any) -> int:
        """Send a datagram, or lose it."""
        with contextlib.suppress(OSError):
            self.sock.send(data)
        return len(data)

    def close(self) -> None:
        self.peers.say(self.sock, BYE)
        self.sock.close()

    def receive(self) -> list[Any]:
        """Return a datagram, if one has come, and keep the hole open; raise OSError."""
        now = time.monotonic()
        if now > self.told_at + KEEP_ALIVE:
            self.peers.say(self.sock, DONE)
            self.told_at = now
        if now > self.heard_at + SILENCE:
            raise OSError(f"the peer was silent for {SILENCE:g} s")
        with contextlib.suppress(BlockingIOError, ConnectionRefusedError):
            data = self.sock.recv(READ_SIZE)
            self.heard_at, kind = now, self.peers.kind_of(data)
            if kind == BYE:
                raise OSError("the peer has left")
            if kind in (SYN, ACK):
                self.peers.say(self.sock, DONE)
            return [] if kind else [data]
        return []


class Local(NamedTuple):
    """What is carried for: a pipe, a connection, or datagrams."""

    source: int
    read: Callable[[], bytes]
    sink: int
    write: Callable[[Any], int]
    finish: Callable[[], object]


def carry(way: Channel | Hole, local: Local) -> None:
    """Carry both ways until both have ended; raise OSError or ValueError."""
    peer, asking, up = way.sock.fileno(), True, memoryview(b"")
    down: list[Any] = []
    while not way.gone and (asking or up or down or not way.ended):
        wanted = {peer: (0 if down else POLLIN) | (POLLOUT if up else 0)}
        if asking and not up:
            wanted[local.source] = POLLIN
        if down:
            wanted[local.sink] = wanted.get(local.sink, 0) | POLLOUT
        poll = select.poll()
        for fd, events in wanted.items():
            if events:
                poll.register(fd, events)
        ready = dict(poll.poll(KEEP_ALIVE * 500))
        with contextlib.suppress(*NOT_YET):
            if asking and not up and local.source in ready:
                data = local.read()
                asking, up = bool(data), memoryview(way.seal(data))
        with contextlib.suppress(*NOT_YET):
            while up:
                up = up[way.send(up) :]
        with contextlib.suppress(*NOT_YET):
            if not down and (peer in ready or isinstance(way, Hole)):
                down = way.receive()
        with contextlib.suppress(*NOT_YET):
            while down:
                if not down[0]:
                    local.finish()
                else:
                    down[0] = down[0][local.write(down[0]) :]
                down = down if down[0] else down[1:]


# --- The server ---------------------------------------------------------------
#
# It observes, introduces and relays.  What it says of a client is what it saw, so
# nobody can aim a peer at a third address.  It never dials: two processes, one for
# each direction, join two connections that it accepted.


class Member:
    """A connection to the server."""

    def __init__(self, sock: socket.socket, source: Address, here: Address) -> None:
        self.sock, self.source, self.here, self.buffer = sock, source, here, b""
        # Counted together: a customer has an address, or a /64 of IPv6.
        self.network = ipaddress.ip_address(source[0]).packed[:8]
        self.nonce, self.ends_at = os.urandom(16), time.monotonic() + ANSWER_TIME
        self.room = self.side = ""
        self.words: list[str] = []  # for the peer
        self.peer: Member | None = None
        self.ports: set[int] = set()  # as which it was seen in this round
        self.said: list[str] = []  # in this round

    def tell(self, *words: object) -> None:
        """Send a line; the end of a client that is lost will be read."""
        with contextlib.suppress(OSError):
            self.sock.send(" ".join(map(str, words)).encode() + b"\n")


def pour(source: socket.socket, sink: socket.socket, left: int) -> None:
    """Copy one direction to its end; at a failure, or at a limit, end both."""
    with contextlib.suppress(OSError):
        while (data := source.recv(READ_SIZE)) and (left := left - len(data)) >= 0:
            sink.sendall(data)
        if not data:
            return sink.shutdown(socket.SHUT_WR)
    for sock in (source, sink):
        with contextlib.suppress(OSError):
            sock.shutdown(socket.SHUT_RDWR)


class Server:
    """Rooms, and the connections of those that are in them."""

    def __init__(self, options: Any) -> None:
        """Open all sockets; raise Failure."""
        self.options, self.selector = options, selectors.DefaultSelector()
        self.udp: dict[Address, socket.socket] = {}
        self.members: dict[bytes, Member] = {}  # by token
        self.rooms: dict[str, list[Member]] = {}  # who waits, and pairs of pipes
        self.far_until: dict[str, float] = {}  # rooms where a pipe wants the far end
        self.relays: dict[int, str] = {}  # pid -> room
        self.asked: dict[str, int] = {}  # of STUN, by source, in this second
        for host, first in options.addresses:
            for here in ((host, first), (host, first + 1)):
                with trying(f"listen on {spelled(here)}"):
                    self.listen(here)
            say(f"serving on {spelled((host, first))} and {first + 1}")

    def listen(self, here: Address) -> None:
        """Open an address for both transports; raise OSError."""
        family = INET6 if ":" in here[0] else socket.AF_INET
        tcp = socket.create_server(here, family=family, backlog=1024)
        udp = self.udp[here] = socket.socket(family, DGRAM)
        if family == INET6:
            udp.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        udp.bind(here)
        for sock, act in ((tcp, self.accept), (udp, self.observe)):
            sock.setblocking(False)
            self.selector.register(sock, selectors.EVENT_READ, (act, sock, here))

    def other(self, here: Address) -> Address | None:
        """Return the other address, with the other port, where there are two."""
        for host, port in self.options.addresses:
            if host != here[0] and (":" in host) == (":" in here[0]):
                return host, 2 * port + 1 - here[1]
        return None

    def run(self) -> None:
        """Serve until a signal."""
        second = 0.0
        while True:
            for key, _ in self.selector.select(1.0):
                act, *what = key.data
                act(*what)
            if (now := time.monotonic()) >= second + 1:
                second = now
                self.sweep(now)

    def sweep(self, now: float) -> None:
        """Forget what is over."""
        self.asked.clear()
        self.far_until = {r: at for r, at in self.far_until.items() if at > now}
        for member in [m for m in self.members.values() if m.ends_at < now]:
            self.drop(member, "gone" if member.peer else "nobody")
        self.reap()

    def reap(self) -> None:
        """Forget relays that have ended, and so free their rooms."""
        for pid in [p for p in self.relays if os.waitpid(p, os.WNOHANG)[0]]:
            del self.relays[pid]

    def note(self, token: bytes, source: Address) -> None:
        """Remember as whom a member was seen, if that is where it comes from."""
        member = self.members.get(token)
        if member and member.source[0] == source[0] and len(member.ports) < FAN:
            member.ports.add(source[1])

    def observe(self, sock: socket.socket, here: Address) -> None:
        """Answer a datagram."""
        with contextlib.suppress(OSError, ValueError):
            message, (host, port, *_) = sock.recvfrom(LINE_LIMIT)
            other, count = self.other(here), self.asked.get(host, 0)
            answer, change = stun_answer(message, (host, port), other)
            if count >= STUN_RATE or len(self.asked) >= SOURCES:
                return
            self.asked[host] = count + 1
            self.note(message[8:16], (host, port))
            away = other[0] if other and change & OTHER_HOST else here[0]
            flipped = 2 * self.options.addresses[0][1] + 1 - here[1]
            at = flipped if change & OTHER_PORT else here[1]
            self.udp[away, at].sendto(answer, (host, port))

    def accept(self, sock: socket.socket, here: Address) -> None:
        """Take a connection, unless too many are waiting."""
        try:
            connection, source = sock.accept()
        except OSError:
            return time.sleep(0.01)  # no file is left: let one be closed
        member = Member(connection, source[:2], here)
        unpaired = [m.network for m in self.members.values() if not m.peer]
        near = unpaired.count(member.network)
        if near >= self.options.per_address or len(unpaired) >= self.options.waiting:
            member.tell("no", "full")
            return connection.close()
        connection.setblocking(False)
        self.members[member.nonce[:8]] = member
        self.selector.register(connection, selectors.EVENT_READ, (self.read, member))

    def drop(self, member: Member, why: str = "") -> None:
        """Forget a member, and then its peer."""
        if self.members.pop(member.nonce[:8], None):
            if why:
                member.tell("no", why)
            self.selector.unregister(member.sock)
            member.sock.close()
            self.leave(member)
            if member.peer:
                self.drop(member.peer, why if why == "relay" else "gone")

    def leave(self, member: Member) -> None:
        """Leave the room."""
        room, member.room = member.room, ""
        there = [other for other in self.rooms.pop(room, []) if other is not member]
        if there:
            self.rooms[room] = there

    def read(self, member: Member) -> None:
        """Act on what a member sends; drop it at its end, or at nonsense."""
        try:
            data = member.sock.recv(LINE_LIMIT)
            *lines, member.buffer = (member.buffer + data).split(b"\n")
            if not data or max(map(len, (*lines, member.buffer))) >= LINE_LIMIT:
                return self.drop(member)
            for line in lines:
                if member.nonce[:8] in self.members:  # it may have been refused
                    self.obey(member, line.decode("ascii").split())
        except BlockingIOError:
            return
        except (OSError, ValueError):
            self.drop(member)

    def obey(self, member: Member, words: list[str]) -> None:
        """Act on one line; raise ValueError."""
        match words:
            case ["see", token]:
                self.note(bytes.fromhex(token), member.source)
                member.tell("seen", *member.source)
            case ["natpunch", "1"]:
                other = self.other(member.here) or ()
                member.tell("natpunch", member.nonce.hex(), *other[:1])
            case ["join", room, kind, side, nonce, can, proof] if not member.words:
                line = " ".join(words[:-1])
                right = mac(self.options.key, member.nonce.hex(), line).hex()
                member.words, member.side = [nonce, can], side
                if hmac.compare_digest(right, proof):
                    return self.join(member, f"{room} {kind}")
                self.drop(member, "key")
            case ["round", _, _, _, _, _] if member.peer:
                self.compare(member, member.peer, words[1:])
            case ["relay"] if member.peer:
                self.relay(member, member.peer)
            case _:
                raise ValueError("not a message")

    def join(self, member: Member, room: str) -> None:
        """Pair a member, or let it wait."""
        self.reap()
        here, now = self.rooms.get(room, []), time.monotonic()
        waiting = [other for other in here if not other.peer]
        far = member.side == "far" and any(other.side == "far" for other in waiting)
        if far or waiting != here or room in self.relays.values():
            return self.drop(member, "taken")
        keep_alive(member.sock)
        member.room, member.ends_at = room, now + WAIT_TIME
        if member.side == "far":
            self.far_until[room] = member.ends_at
        self.rooms[room] = [*here, member]
        for other in waiting:
            sides = {member.side, other.side}
            if "far" in sides or "pipe" in sides and room not in self.far_until:
                return self.pair(other, member)

    def pair(self, one: Member, two: Member) -> None:
        """Tell two members of one another; a far end makes room for its next call."""
        for role, (member, peer) in enumerate(((one, two), (two, one))):
            member.peer, member.ends_at = peer, time.monotonic() + PAIR_TIME
            member.tell("paired", role, *peer.words)
            if "far" in (one.side, two.side):
                self.leave(member)

    def compare(self, member: Member, peer: Member, words: list[str]) -> None:
        """Tell both where the other was seen, once both have said how."""
        kind, step, port, host, inside = words
        if int(port) not in member.ports or not 0 <= int(step) <= STEP_LIMIT:
            kind, step, port = "none", "0", "0"
        address = ipaddress.ip_address(host)
        is_private = address.is_private and not address.is_loopback
        member.said = [kind, str(int(step)), str(int(port))]
        member.said += [str(address), str(int(inside))] if is_private else []
        if not peer.said or peer.said == ["relay"]:
            return
        for one, two in ((member, peer), (peer, member)):
            kind, step, port, *inner = two.said
            inner = inner if one.source[0] == two.source[0] else []
            one.tell("peer", one.said[0], two.source[0], port, kind, step, *inner)
        for one in (member, peer):
            one.said, one.ports = [], set()

    def relay(self, member: Member, peer: Member) -> None:
        """Join two members' connections in two processes, once both want it."""
        if self.options.no_relay or len(self.relays) >= self.options.relays:
            return self.drop(member, "relay")
        member.said = ["relay"]
        if peer.said != ["relay"]:
            return
        member.tell("relay")
        peer.tell("relay")
        pid = os.fork()
        if pid == 0:
            self.become_relay(member.sock, peer.sock)
        self.relays[pid], member.peer, peer.peer = member.room, None, None
        self.drop(member)
        self.drop(peer)

    def become_relay(self, one: socket.socket, two: socket.socket) -> NoReturn:
        """Copy between two connections in two processes, and end."""
        low, high = sorted((one.fileno(), two.fileno()))
        for start, end in ((3, low), (low + 1, high), (high + 1, 1 << 20)):
            os.closerange(start, end)  # or no end of a member would be seen
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)
        one.setblocking(True)
        two.setblocking(True)
        other = os.fork()
        signal.alarm(self.options.relay_time)
        pour(*((one, two) if other else (two, one)), self.options.relay_bytes)
        if other:
            os.waitpid(other, 0)
        os._exit(0)


# --- main ---------------------------------------------------------------------


def run(work: Callable[[], object], stopped: int = 0) -> int:
    """Return the exit code of what is done."""
    try:
        work()
    except Failure as failure:
        say(failure)
        return failure.code
    except KeyboardInterrupt:
        return stopped
    return 0


def serve(options: Any) -> None:
    """Be a server."""
    options.key = secret_of("NATPUNCH_KEY", options.key, "")
    options.addresses = [
        parse_address(at, PORT) for at in options.addresses or ["0.0.0.0"]
    ]
    if len({port for _, port in options.addresses}) > 1:
        raise Failure("cannot serve: all addresses must have the same port", 2)
    Server(options).run()


def filtering(meeting: Meeting) -> str:
    """Return what a datagram is let in by: RFC 5780 section 4.4."""
    has_two = len(meeting.servers) > 2
    listener = bound(DGRAM, meeting.sock.family)  # which has sent nowhere else
    tests = {OTHER_HOST | OTHER_PORT: "nothing", OTHER_PORT: "address"}
    for flags, what in tests.items():
        change = CHANGE, bytes((0, 0, 0, flags))
        request = stun(BINDING, COOKIE + os.urandom(12), change)
        for _ in range(2 if has_two or flags == OTHER_PORT else 0):
            listener.sendto(request, meeting.servers[0])
            if select.select([listener], [], [], OBSERVE_TIME)[0]:
                answer = parse_stun(listener.recv(LINE_LIMIT))
                if answer[:2] == (SUCCESS, request[4:20]):
                    return what if has_two else f"{what} at most"
    return "port, and perhaps address" if not has_two else "address and port"


def tell_nat(options: Any) -> None:
    """Print which NAT this is."""
    options.udp = True
    with trying(f"ask {spelled(options.server)}"):
        meeting = Meeting(options)
        for name, kind in (("udp", DGRAM), ("tcp", STREAM)):
            listener = bound(kind, meeting.sock.family)
            seen = observe(listener, meeting.servers, meeting.nonce[:8])
            how, step = behavior(seen)
            text = f"{name}: {how} {step or ''}".rstrip()
            ports = " ".join(map(spelled, seen)) or "nowhere"
            text += f", port {listener.getsockname()[1]} seen at {ports}"
            if kind == DGRAM and seen:
                text += f", filtered by {filtering(meeting)}"
            print(text)


def carry_stream(meeting: Meeting, local: Local) -> None:
    """Carry one stream to the peer; raise Failure."""
    way, _ = find_way(meeting)
    with trying("carry the stream"):
        channel = Channel(way, meeting)
        why = "plain: TLS needs Python 3.13 on both sides"
        say(f"the stream is {'encrypted' if meeting.tls else why}")
        carry(channel, local)


def carry_socket(meeting: Meeting, sock: socket.socket) -> None:
    """Carry a connection; raise Failure."""
    sock.setblocking(False)
    fd = sock.fileno()

    def finish() -> None:
        with contextlib.suppress(OSError):  # it may have gone
            sock.shutdown(socket.SHUT_WR)

    carry_stream(
        meeting, Local(fd, lambda: sock.recv(READ_SIZE), fd, sock.send, finish)
    )


def carry_pipe(options: Any) -> None:
    """Join standard input and output with the peer; raise Failure."""
    sink = 1
    with contextlib.suppress(OSError):
        if stat.S_ISFIFO(os.fstat(1).st_mode):
            # Not to block, as our own: others may share the one that we were given.
            sink = os.open("/proc/self/fd/1", os.O_WRONLY | os.O_NONBLOCK)

    def finish() -> None:
        for fd in {1, sink}:
            os.close(fd)

    def write(data: Any) -> int:
        return os.write(sink, data)

    local = Local(0, lambda: os.read(0, READ_SIZE), sink, write, finish)
    carry_stream(meet(options), local)


def meet_again(options: Any) -> Meeting:
    """Return a meeting, also after a time without a server; raise Failure."""
    while True:
        try:
            return meet(options)
        except Failure as failure:
            if isinstance(failure.__cause__, Refused) or options.wait < FOREVER:
                raise
            say(f"{failure}; trying again")
            time.sleep(RETRY_TIME)


def spawn(work: Callable[[], object]) -> None:
    """Do something in a process of its own."""
    if os.fork() == 0:
        os._exit(run(work))


def answer_calls(options: Any) -> None:
    """Be the far end of a room, for one stream after another; raise Failure."""

    def answer(meeting: Meeting) -> None:
        with trying(f"connect to {spelled(options.to)}"):
            sock = socket.create_connection(options.to, ANSWER_TIME)
        carry_socket(meeting, sock)

    while True:
        meeting = meet_again(options)
        spawn(lambda: answer(meeting))  # noqa: B023
        meeting.sock.close()


def take_calls(options: Any) -> None:
    """Carry each connection to a local port; raise Failure."""
    with trying(f"listen on {spelled(options.listen)}"):
        listener = socket.create_server(options.listen)
    while True:
        sock, _ = listener.accept()
        spawn(lambda: carry_socket(meet(options), sock))  # noqa: B023
        sock.close()


def carry_datagrams(options: Any) -> None:
    """Carry datagrams, by one way after another; raise Failure."""
    sock, client = socket.socket(socket.AF_INET, DGRAM), options.to

    def read() -> bytes:
        nonlocal client
        data, client = sock.recvfrom(READ_SIZE)
        if not data:
            raise BlockingIOError  # one of no bytes would be an end: it is lost
        return data

    def write(data: Any) -> int:
        with contextlib.suppress(OSError):
            if client:
                sock.sendto(data, client)  # the one that wrote last
        return len(data)

    with trying("open the local port"):
        sock.setblocking(False)
        if client:
            sock.connect(client)
        else:
            sock.bind(options.listen)
    local = Local(sock.fileno(), read, sock.fileno(), write, lambda: None)
    while True:
        meeting = meet_again(options)
        try:
            way, is_direct = find_way(meeting)
            with trying("carry datagrams"):
                hole = Hole(way, meeting) if is_direct else Channel(way, meeting)
                with contextlib.closing(hole):
                    carry(hole, local)
        except Failure as failure:
            say(f"{failure}; meeting again")


def be_client(options: Any) -> None:
    """Do as a client what the command line wants; raise Failure."""
    options.server = parse_address(options.server, PORT)
    options.key = secret_of("NATPUNCH_KEY", options.key, "")
    if options.room == "nat":
        return tell_nat(options)
    options.secret = secret_of("NATPUNCH_SECRET", options.secret, "~/.natpunch")
    if options.udp and not options.to and not options.listen:
        raise Failure("cannot use --udp without --to or --listen", 2)
    options.side = "far" if options.to else "call" if options.listen else "pipe"
    options.to = parse_address(options.to) if options.to else None
    if options.listen:
        at = options.listen
        options.listen = parse_address(at if ":" in at else f"127.0.0.1:{at}")
    if options.udp:
        carry_datagrams(options)
    elif options.to or options.listen:
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)
        (answer_calls if options.to else take_calls)(options)
    else:
        carry_pipe(options)


def main() -> int:
    """Do what the command line wants; return the exit code."""
    serves = sys.argv[1:2] == ["serve"]
    parser = argparse.ArgumentParser("natpunch.py serve" if serves else "natpunch.py")
    parser.add_argument("--version", action="version", version=__version__)
    parser.add_argument("--key", default="", metavar="FILE", help="of the server")
    if serves:
        parser.add_argument("addresses", nargs="*", metavar="ADDRESS")
        parser.add_argument("--no-relay", action="store_true")
        for name, number in (
            ("--waiting", 256),  # unpaired connections
            ("--per-address", 16),  # of these
            ("--relays", 64),
            ("--relay-bytes", 1 << 40),  # each way of each
            ("--relay-time", 86400),
        ):
            parser.add_argument(name, type=int, default=number, metavar="N")
    else:
        parser.add_argument("-s", "--server", required=True)
        parser.add_argument("room", metavar="ROOM", help="or nat, to ask which it is")
        parser.add_argument("--secret", default="", metavar="FILE")
        end = parser.add_mutually_exclusive_group()
        end.add_argument("--to", metavar="HOST:PORT")
        end.add_argument("--listen", metavar="PORT")
        parser.add_argument("--udp", action="store_true")
        parser.add_argument("--wait", type=float, default=FOREVER, metavar="SECONDS")
        parser.add_argument("--direct-only", action="store_true")
    options = parser.parse_args(sys.argv[1 + serves :])
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    is_pipe = not serves and not options.to and not options.listen
    return run(lambda: (serve if serves else be_client)(options), 130 * is_pipe)


if __name__ == "__main__":
    sys.exit(main())
