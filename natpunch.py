#!/usr/bin/env python3
"""natpunch: join two machines, each behind a NAT that admits nobody, directly.

A server that both can reach tells each where the other was seen.  Both send there at
once, each NAT takes what then comes for an answer, and the server is out of it:

    A --- NAT ===+===  ===+=== NAT --- B
                 +-server-+

Where no hole can be made, the server relays.  Usage:

    natpunch.py serve [ADDRESS]... [--key FILE]        the server, at ports 3478 and 3479
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
line; 130 a stream was interrupted.  Streams outlive a far end or server that is ended.

Reading order.  Every section uses only the ones above it.  find_way() has the story:
observe, meet, punch; then carry_stream() or carry_datagrams().

It does not carry a stream over to another address, and it does not speak ICE.
"""
# SPDX-License-Identifier: MIT

from __future__ import annotations

import argparse
import contextlib
import functools
import heapq
import hmac
import ipaddress
import os
import random
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
from collections import Counter
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

PORT = 3478  # and the next one; RFC 8489 section 18.6
LINE_LIMIT = 1024  # a message between us and the server
READ_SIZE = 256 * 1024
FAN = 24  # ports that are tried ahead of a stepping NAT
BIRTHDAYS = 256  # ports of a random NAT; one of PROBES hits one with 98.3 %
PROBES = 1024  # that a round may send, at 8 in 4 ms
STEP_LIMIT = 16  # a NAT that steps further is taken for random
LOW_TTL = 2  # leaves our NAT, and does not reach the peer's behind a router
LOW_TTL_TIME = 0.15  # for such a probe to open our side
OBSERVE_TIME = 0.5  # for the server to say what it sees
ANSWER_TIME = 10.0  # for a server, a peer's proof, or a client that has not joined
PAIR_TIME = 30.0  # for a pair to have done with the server, or to want the relay
WAIT_TIME = 60.0  # unpaired; then a client joins anew, and says so
KEEP_ALIVE = 15.0  # conntrack forgets an unanswered datagram in 30
SILENCE = 45.0  # of a hole that is then punched anew
STUN_RATE = 10  # answers to one source in a second
RETRY_TIME = 5.0
FOREVER = float("inf")
SOURCES = 10000  # that are answered in a second; forged ones have no end

INET, INET6 = socket.AF_INET, socket.AF_INET6
STREAM, DGRAM = socket.SOCK_STREAM, socket.SOCK_DGRAM
POLLIN, POLLOUT, POLLRDHUP = select.POLLIN, select.POLLOUT, select.POLLRDHUP
# A round's time, and whether it begins with a low TTL: 6 s in all.
ROUNDS = {DGRAM: ((3, True), (3, False)), STREAM: ((2, False), (2, False), (2, True))}
AGAIN = {DGRAM: 0.25, STREAM: 0.1}  # until the same probe, or a refused connection
NOT_YET = BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError
Address = tuple[str, int]

# --- What is said -------------------------------------------------------------
#
# A failure inside trying() ends the run with one line: what could not be done, and
# why.  What came from the network is not in it.

REFUSALS = {
    "full": "the server has no place now",
    "taken": "the room is taken",
    "key": "the server has another key",
    "differ": "one side wants a stream and the other datagrams",
    "nobody": "nobody has come",
    "gone": "the peer has left",
    "relay": "no hole could be made, and it may not be relayed",
}


class Refused(Exception):
    """The server refuses: the text is a key of REFUSALS."""


class Failure(Exception):
    """The end of a run, with exit code 1: the text says why."""


class Misuse(Exception):
    """A command line or file that cannot be used: exit code 2."""


def say(message: str) -> None:
    """Write a line to standard error; where nobody reads it, it is lost."""
    with contextlib.suppress(OSError):
        os.write(2, f"natpunch: {message}\n".encode(errors="replace"))


def reason(error: OSError) -> str:
    text = error.strerror or str(error)
    return text[:1].lower() + text[1:]


@contextlib.contextmanager
def trying(to: str) -> Iterator[None]:
    """Turn what fails into a Failure."""
    try:
        yield
    except Refused as refused:
        raise Failure(f"cannot {to}: {REFUSALS[str(refused)]}") from refused
    except OSError as error:
        raise Failure(f"cannot {to}: {reason(error)}") from error
    except (ValueError, KeyError) as error:
        raise Failure(f"cannot {to}: that is not natpunch") from error


def spelled(address: Any) -> str:
    return ("[%s]:%d" if ":" in address[0] else "%s:%d") % address[:2]


def parse_address(text: str, host: str = "", port: str = "") -> Address:
    """Return host and port of HOST:PORT, [HOST]:PORT, or less by the defaults."""
    before, colon, after = text.rpartition(":")
    if not colon or ":" in before and before[-1] != "]":
        before, after = (text, port) if port else (host, text)
    if not (after.isascii() and after.isdecimal() and 0 < int(after) < 65536):
        raise Misuse(f"cannot use {text!r}: a port is 1 to 65535")
    return before.strip("[]"), int(after)


def secret_of(variable: str, file: str, default: str = "") -> bytes:
    """Return the secret of a file, else of the environment, else of the default."""
    found = os.environ.get(variable, "").encode()
    path = file or ("" if found else os.path.expanduser(default))
    try:
        if path and (file or os.path.exists(path)):
            with open(path, "rb") as opened:
                if os.fstat(opened.fileno()).st_mode & 0o077:
                    raise Misuse(f"cannot use {path}: others may read it")
                found = opened.read(LINE_LIMIT).strip()
    except OSError as error:
        raise Misuse(f"cannot read {path}: {reason(error)}") from error
    if len(found) < 16 and (default or file or found):
        raise Misuse(f"cannot use {path or variable}: 16 characters are the least")
    return found


def mac(key: bytes, *words: object) -> bytes:
    """Return 16 bytes that only an owner of the key can make of these words."""
    return hmac.digest(key, " ".join(map(str, words)).encode(), "sha256")[:16]


# --- STUN ---------------------------------------------------------------------
#
# RFC 8489, over UDP and TCP; with two addresses RFC 5780, too; and a client of
# RFC 3489 has no cookie at the head of its transaction.

COOKIE = bytes.fromhex("2112a442")
BINDING, SUCCESS, ERROR = 0x0001, 0x0101, 0x0111
MAPPED, CHANGE, CHANGED, ERROR_CODE, UNKNOWN = 1, 3, 5, 9, 10
XOR_MAPPED, OTHER = 0x0020, 0x802C
KNOWN = {CHANGE, 0x0006, 0x0008, 0x001C}  # and a name and its proofs, to be ignored
OTHER_HOST, OTHER_PORT = 4, 2  # flags of CHANGE-REQUEST


def stun(kind: int, transaction: bytes, *attributes: tuple[int, bytes]) -> bytes:
    """Return a message."""
    packed = [
        struct.pack("!HH", name, len(value)) + value + bytes(-len(value) % 4)
        for name, value in attributes
    ]
    body = b"".join(packed)
    return struct.pack("!HH", kind, len(body)) + transaction + body


def parse_stun(message: bytes) -> tuple[int, bytes, dict[int, bytes]]:
    """Return kind, transaction and attributes; raise ValueError."""
    if len(message) < 20 or len(message) - 20 != int.from_bytes(message[2:4], "big"):
        raise ValueError("not a message")
    found, rest = {}, message[20:]
    while rest:
        if len(rest) < 4:
            raise ValueError("not an attribute")
        name, size = struct.unpack_from("!HH", rest)
        found[name] = rest[4 : 4 + size]
        rest = rest[4 + size + -size % 4 :]
    return int.from_bytes(message[:2], "big"), message[4:20], found


def pack_address(address: Address, transaction: bytes = bytes(16)) -> bytes:
    """Return an address as an attribute has it, hidden from NATs that meddle."""
    host = ipaddress.ip_address(address[0]).packed
    raw = address[1].to_bytes(2, "big") + host
    hidden = [a ^ b for a, b in zip(raw, transaction[:2] + transaction)]
    return bytes((0, 1 if len(host) == 4 else 2, *hidden))


def unpack_address(value: bytes, transaction: bytes = bytes(16)) -> Address:
    raw = bytes(a ^ b for a, b in zip(value[2:], transaction[:2] + transaction))
    return str(ipaddress.ip_address(raw[2:])), int.from_bytes(raw[:2], "big")


def answer_to(
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
    if change & OTHER_HOST and not other:
        unknown.append(CHANGE)
    if unknown:
        names = b"".join(name.to_bytes(2, "big") for name in unknown)
        code = ERROR_CODE, bytes((0, 0, 4, 20))
        return stun(ERROR, transaction, code, (UNKNOWN, names)), 0
    if transaction[:4] == COOKIE:
        found = [(XOR_MAPPED, pack_address(source, transaction))]
    else:
        found = [(MAPPED, pack_address(source))]
    if other:
        name = OTHER if transaction[:4] == COOKIE else CHANGED
        found.append((name, pack_address(other)))
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


def port_of(sock: socket.socket) -> int:
    return int(sock.getsockname()[1])


def observe(
    listener: socket.socket, servers: list[Address], token: bytes
) -> list[Address]:
    """Return as what servers see a local port, less those that are silent.

    They know by the token whom they see.
    """
    seen = []
    for server in servers:
        transaction = COOKIE + token + os.urandom(4)
        with (
            contextlib.suppress(OSError, ValueError, KeyError),
            bound(listener.type, listener.family, port_of(listener)) as sock,
        ):
            sock.settimeout(OBSERVE_TIME)
            sock.connect(server)
            sock.send(stun(BINDING, transaction))
            _, answered, found = parse_stun(sock.recv(LINE_LIMIT))
            if answered == transaction:
                seen.append(unpack_address(found[XOR_MAPPED], transaction))
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
# answers ACK; the first ACK that role 0 hears is on the hole, and DONE tells role 1.
# Nothing answers DONE, so later ones keep the hole open, and BYE leaves it.

MAGIC, PROBE_SIZE = b"\xf5\x9d", 19
SYN, ACK, DONE, BYE = b"\1", b"\2", b"\3", b"\4"
REPLIES: tuple[dict[bytes, bytes], ...] = ({SYN: SYN, ACK: DONE}, {SYN: ACK})  # by role


class Sight(NamedTuple):
    """A peer's NAT, as the server sees it."""

    host: str
    port: int  # the last one seen
    behavior: str  # same, step, random; none if nothing was seen
    step: int
    inside: list[Address]  # where a peer behind our own NAT is


class Peers(NamedTuple):
    """What the two of us know, and which of them we are."""

    role: int
    key: bytes

    def probe(self, kind: bytes, role: int) -> bytes:
        return MAGIC + kind + mac(self.key, role, kind[0])

    def say(self, sock: socket.socket, kind: bytes) -> None:
        """Send a probe, or lose it."""
        with contextlib.suppress(OSError):
            sock.send(self.probe(kind, self.role), socket.MSG_DONTWAIT)

    def kind_of(self, data: bytes) -> bytes:
        """Return which probe of the peer this is, or nothing."""
        if len(data) != PROBE_SIZE:
            return b""
        right = self.probe(data[2:3], 1 - self.role)
        return data[2:3] if hmac.compare_digest(data, right) else b""


def aims(mine: str, theirs: Sight) -> tuple[int, list[Address]]:
    """Return from how many ports to send, and where to; nowhere if it is hopeless.

    Two stepping NATs fan in: each probe of ours takes one of our next ports, so that
    whichever of them the peer aims at has been opened towards it.
    """
    ahead = [theirs.port + theirs.step * n for n in range(1, FAN + 1)]
    table = {
        ("same", "same"): (1, [theirs.port]),
        ("same", "step"): (1, ahead),
        ("same", "random"): (1, random.sample(range(1024, 65536), PROBES)),
        ("step", "same"): (1, [theirs.port]),
        ("step", "step"): (FAN, ahead[FAN // 2 - 1 : FAN // 2]),
        ("random", "same"): (BIRTHDAYS, [theirs.port]),
    }
    count, ports = table.get((mine, theirs.behavior), (1, []))
    there = [(theirs.host, port) for port in ports if port < 65536]
    return count, theirs.inside + there


def set_ttl(sock: socket.socket, ttl: int) -> None:
    """Set how many routers a packet may pass; -1 is as many as usual."""
    if sock.family == INET6:
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_UNICAST_HOPS, ttl)
    else:
        sock.setsockopt(socket.IPPROTO_IP, socket.IP_TTL, ttl)


class Puncher:
    """Sockets that try to reach the peer: TCP and UDP differ little here."""

    def __init__(self, peers: Peers, listeners: list[socket.socket], kind: int) -> None:
        self.peers, self.kind, self.left = peers, kind, PROBES
        self.listeners = {sock.fileno(): sock for sock in listeners}
        self.socks: dict[int, socket.socket] = {}
        self.aimed: dict[tuple[int, Address], socket.socket] = {}
        self.parts: dict[int, bytes] = {}  # of a probe, by connection
        self.poll = select.poll()
        for sock in listeners:
            self.poll.register(sock, POLLIN)
            if kind == STREAM:
                sock.listen()

    def add(self, sock: socket.socket) -> None:
        """Watch a socket; a connection can be written to when it has been made."""
        sock.setblocking(False)
        self.socks[sock.fileno()] = sock
        self.poll.register(sock, POLLOUT if self.kind == STREAM else POLLIN)

    def drop(self, fd: int) -> None:
        self.poll.unregister(fd)
        self.socks.pop(fd).close()
        self.parts.pop(fd, None)

    def shoot(self, listener: socket.socket, there: Address, ttl: int) -> socket.socket:
        """Return the socket that aims from a port at an address, having sent."""
        sock = self.aimed.get((listener.fileno(), there))
        if not sock or sock.fileno() < 0:
            sock = bound(self.kind, listener.family, port_of(listener))
            self.aimed[listener.fileno(), there] = sock
            self.add(sock)
            set_ttl(sock, ttl)
            sock.connect_ex(there)
            self.left -= self.kind == STREAM
        if self.kind == DGRAM:
            self.peers.say(sock, SYN)
            self.left -= 1
        set_ttl(sock, -1)
        return sock

    def take(self, sock: socket.socket, data: bytes) -> socket.socket | None:
        """Answer a probe; return the socket if that was the last one."""
        kind, role = self.peers.kind_of(data), self.peers.role
        if kind in REPLIES[role]:
            self.peers.say(sock, REPLIES[role][kind])
        return sock if kind == (ACK, DONE)[role] else None

    def accept(self, listener: socket.socket) -> socket.socket | None:
        """Take what comes from elsewhere than where we aim."""
        if self.kind == STREAM:
            self.add(listener.accept()[0])
            return None
        data, source = listener.recvfrom(PROBE_SIZE + 1, socket.MSG_DONTWAIT)
        if not self.peers.kind_of(data):
            return None
        return self.take(self.shoot(listener, source[:2], -1), data)

    def begin(self, fd: int) -> None:
        """Let role 0 speak on a connection that has been made."""
        if self.socks[fd].getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
            return self.drop(fd)
        self.parts[fd] = b""
        self.poll.modify(fd, POLLIN)
        if self.peers.role == 0:
            self.peers.say(self.socks[fd], SYN)

    def act(self, fd: int) -> socket.socket | None:
        """Act on a socket that is ready; return the hole once it is one."""
        if fd in self.listeners:
            return self.accept(self.listeners[fd])
        if self.kind == STREAM and fd not in self.parts:
            return self.begin(fd)
        part = self.parts.get(fd, b"")
        data = self.socks[fd].recv(PROBE_SIZE - len(part))  # payload may follow
        if self.kind == STREAM:
            if not data:
                return self.drop(fd)
            data = part + data
            self.parts[fd] = data if len(data) < PROBE_SIZE else b""
        return self.take(self.socks[fd], data)

    def run(
        self, there: list[Address], seconds: float, low_ttl: bool = False
    ) -> socket.socket | None:
        """Send from every port to everywhere; return the hole, once there is one.

        A probe with a low TTL opens our side and does not reach the other, where a
        gateway might take it for its own, and with it the port that we hope for.
        """
        start = time.monotonic()
        pairs = [(sock, at) for sock in self.listeners.values() for at in there]
        low_ttl = low_ttl and len(pairs) <= BIRTHDAYS
        again = AGAIN[self.kind] if len(pairs) < BIRTHDAYS else seconds
        due = [(start + n // 8 * 0.004, n, low_ttl) for n in range(len(pairs))]
        while (now := time.monotonic()) < start + seconds:
            while due and due[0][0] <= now and self.left:
                _, n, is_low = heapq.heappop(due)
                with contextlib.suppress(OSError):
                    self.shoot(*pairs[n], LOW_TTL if is_low else -1)
                pause = LOW_TTL_TIME if is_low else again
                heapq.heappush(due, (now + pause, n, False))
            soon = due[0][0] if due and self.left else start + seconds
            for fd, _ in self.poll.poll(max(soon - now, 0) * 1000 + 1):
                with contextlib.suppress(OSError):
                    if hole := self.act(fd):
                        return self.socks.pop(hole.fileno())
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
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, int(KEEP_ALIVE))
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, int(KEEP_ALIVE))
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(SILENCE * 1000))
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


class Meeting:
    """A connection to the server, and to the peer that was found there."""

    def __init__(self, options: Any) -> None:
        """Connect; raise OSError, ValueError or Refused."""
        self.options, self.kind = options, DGRAM if options.udp else STREAM
        self.sock = socket.create_connection(options.server, ANSWER_TIME)
        keep_alive(self.sock)
        self.tell("natpunch 1")
        nonce, other = self.hear("natpunch")
        self.nonce = bytes.fromhex(nonce)
        host, port = self.sock.getpeername()[:2]
        hosts = [host] if other == "-" else [host, other]
        self.servers = [(host, port), (host, port + 1), (other, port)][: len(hosts) + 1]

    def enter(self, seconds: float) -> None:
        """Wait in the room for a peer; raise OSError, ValueError or Refused."""
        options = self.options
        can = "tls" if hasattr(ssl.SSLContext, "set_psk_client_callback") else "plain"
        mine = f"{os.urandom(16).hex()} {can}"
        room = mac(options.secret, "room", options.room).hex()
        line = f"join {room} {self.kind:d} {options.side} {mine}"
        self.tell(line, mac(options.key, self.nonce.hex(), line).hex())
        self.sock.settimeout(max(seconds, 0.1))
        role, *words = self.hear("paired")
        self.sock.settimeout(PAIR_TIME)
        both = [mine, " ".join(words)] if role == "0" else [" ".join(words), mine]
        # What was agreed is in the key, so nobody has altered it on the way.
        text = "\n".join((str(int(self.kind)), *both))
        key = hmac.digest(options.secret, text.encode(), "sha256")
        self.peers = Peers(int(role) & 1, key)
        self.tls = can == words[1] == "tls" and self.kind == STREAM

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
        if first == "no":
            raise Refused(words[0])
        if first != expected:
            raise ValueError(first)
        return words

    def compare(
        self, listener: socket.socket, seen: list[Address]
    ) -> tuple[str, Sight]:
        """Tell how our NAT behaves; return what the server makes of it, and the peer's."""
        inside = self.sock.getsockname()[0], port_of(listener)
        last = seen[-1][1] if seen else 0
        self.tell("round", *behavior(seen), last, *inside)
        mine, host, port, kind, step, *inner = self.hear("peer")
        within = [(str(ipaddress.ip_address(inner[0])), int(inner[1]))] if inner else []
        address = str(ipaddress.ip_address(host))
        return mine, Sight(address, int(port), kind, int(step), within)

    def punch(self, low_ttl: bool, seconds: float) -> tuple[socket.socket | None, str]:
        """Observe, meet, punch: return a hole, if there is one, and for which pair."""
        listener = bound(self.kind, self.sock.family)
        seen = observe(listener, self.servers, self.nonce[:8])
        mine, theirs = self.compare(listener, seen)
        count, there = aims(mine, theirs)
        others = [bound(self.kind, listener.family) for _ in range(1, count)]
        puncher = Puncher(self.peers, [listener, *others], self.kind)
        try:
            hole = puncher.run(there, seconds if there else 0, low_ttl)
        finally:
            puncher.close()
        return hole, f"{mine}-{theirs.behavior}"

    def relay(self) -> socket.socket:
        """Return the relayed connection, once the peer has proved the secret."""
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
            except Refused as refused:
                if str(refused) not in ("full", "nobody"):
                    raise
                say(f"waiting in {options.room}: {REFUSALS[str(refused)]}")
                time.sleep(str(refused) == "full")
            except TimeoutError:
                if time.monotonic() < ends_at:
                    raise
        raise OSError(f"nobody came in {options.wait:g} s")


def find_way(meeting: Meeting) -> tuple[socket.socket, bool]:
    """Return a connection to the peer, and whether it is direct; raise Failure."""
    started = time.monotonic()
    with trying("reach the peer"):
        for seconds, low_ttl in ROUNDS[meeting.kind]:
            hole, pair = meeting.punch(low_ttl, seconds)
            if hole:
                took = time.monotonic() - started
                at = spelled(hole.getpeername())
                say(f"direct {at} ({pair}, {took:.2f} s)")
                meeting.sock.close()
                return hole, True
            if "none" in pair or "random" in pair and "same" not in pair:
                break  # the table has nothing for them
        if meeting.options.direct_only:
            raise Refused("relay")
        way = meeting.relay()
        say(f"relay ({pair})")
        return way, False


# --- Carrying -----------------------------------------------------------------
#
# A stream crosses in frames, each a size and so many bytes.  An empty one is the end
# of its direction, so that a peer that dies is not taken for one that is done.
# Datagrams cross a hole as they are, and the relay in frames.


def with_tls(sock: socket.socket, peers: Peers) -> ssl.SSLSocket:
    """Return a connection in TLS, by the secret and nothing else."""
    psk = mac(peers.key, "tls")
    kind = ssl.PROTOCOL_TLS_CLIENT if peers.role else ssl.PROTOCOL_TLS_SERVER
    context: Any = ssl.SSLContext(kind)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    # Role 0, if it declined the secret, would have to show a certificate, and
    # verify_mode stays CERT_REQUIRED with none to trust.
    context.check_hostname = False
    if peers.role:
        context.set_psk_client_callback(lambda hint: ("peer", psk))
    else:
        context.set_psk_server_callback(lambda identity: psk)
    made: ssl.SSLSocket = context.wrap_socket(sock, server_side=not peers.role)
    return made


class Channel:
    """A connection to the peer, and the frames on it."""

    def __init__(self, sock: socket.socket, meeting: Meeting) -> None:
        """Begin TLS where both can; raise OSError."""
        keep_alive(sock)
        sock.settimeout(ANSWER_TIME)
        self.sock = with_tls(sock, meeting.peers) if meeting.tls else sock
        self.buffer, self.ended = b"", False

    def seal(self, data: bytes) -> bytes:
        return len(data).to_bytes(4, "big") + data

    def send(self, data: bytes) -> None:
        """Send a datagram, or lose it where the way is full; raise OSError."""
        if data and select.select([], [self.sock], [], 0)[1]:
            self.sock.sendall(self.seal(data))

    def receive(self) -> list[bytes]:
        """Return the frames that have come; raise OSError."""
        data = self.sock.recv(READ_SIZE)
        while isinstance(self.sock, ssl.SSLSocket) and self.sock.pending():
            data += self.sock.recv(READ_SIZE)
        if not data:
            raise OSError("the peer has vanished")
        found, at, self.buffer = [], 0, self.buffer + data
        while len(self.buffer) >= at + 4 and not self.ended:
            size = int.from_bytes(self.buffer[at : at + 4], "big")
            if size > READ_SIZE:
                raise ValueError("too long")
            if len(self.buffer) < at + 4 + size:
                break
            found.append(self.buffer[at + 4 : at + 4 + size])
            self.ended, at = size == 0, at + 4 + size
        self.buffer = self.buffer[at:]
        return found


class Hole:
    """A hole that datagrams cross, used as a channel is."""

    def __init__(self, sock: socket.socket, peers: Peers) -> None:
        self.sock, self.peers, self.ended = sock, peers, False
        self.heard_at = self.told_at = time.monotonic()

    def send(self, data: bytes) -> None:
        with contextlib.suppress(OSError):
            self.sock.send(data)

    def receive(self) -> list[bytes]:
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


def carry_datagrams(
    way: Channel | Hole, local: socket.socket, client: Address | None
) -> None:
    """Carry datagrams of the client that wrote last; raise OSError or ValueError."""
    poll = select.poll()
    poll.register(way.sock, POLLIN)
    poll.register(local, POLLIN)
    while not way.ended:
        ready = dict(poll.poll(KEEP_ALIVE * 500))
        if isinstance(way, Hole) or way.sock.fileno() in ready:
            for data in way.receive():
                with contextlib.suppress(OSError):
                    if client:
                        local.sendto(data, client)
        with contextlib.suppress(BlockingIOError, ConnectionRefusedError):
            data, client = local.recvfrom(READ_SIZE, socket.MSG_DONTWAIT)
            way.send(data)


def carry_stream(
    channel: Channel, source: int, sink: int, finish: Callable[[], object]
) -> None:
    """Carry what comes from a descriptor, and to one; raise OSError or ValueError."""
    sock, asking, finished = channel.sock, True, False
    up = down = memoryview(b"")  # what is to be written
    sock.setblocking(False)
    while asking or up or down or not channel.ended:
        # A peer that has ended both directions closes the connection.
        hears = POLLRDHUP if channel.ended else 0 if down else POLLIN
        wanted = {sock.fileno(): hears | (POLLOUT if up else 0)}
        if asking and not up:
            wanted[source] = POLLIN
        if down:
            wanted[sink] = wanted.get(sink, 0) | POLLOUT
        poll = select.poll()
        for fd, events in wanted.items():
            poll.register(fd, events)
        ready = dict(poll.poll())
        if channel.ended and ready.get(sock.fileno(), 0) & POLLRDHUP:
            return
        if asking and not up and ready.get(source, 0) & ~POLLOUT:
            data = os.read(source, READ_SIZE)
            asking, up = bool(data), memoryview(channel.seal(data))
        if up:
            with contextlib.suppress(*NOT_YET):
                up = up[sock.send(up) :]
        if not channel.ended and not down and sock.fileno() in ready:
            with contextlib.suppress(*NOT_YET):
                down = memoryview(b"".join(channel.receive()))
        if down:
            with contextlib.suppress(BlockingIOError):
                down = down[os.write(sink, down) :]
        if channel.ended and not down and not finished:
            finished = True
            finish()


# --- The server ---------------------------------------------------------------
#
# It observes, introduces and relays.  What it says of a client is what it saw, so
# nobody can aim a peer at a third address.  It never dials: two processes, one for
# each direction, join two connections that it accepted.


class Member:
    """A connection to the server."""

    def __init__(self, sock: socket.socket, source: Address) -> None:
        self.sock, self.source, self.buffer = sock, source, b""
        # Counted together: a customer has an address, or a /64 of IPv6.
        self.network = ipaddress.ip_address(source[0]).packed[:8]
        self.nonce = os.urandom(16)
        self.ends_at = time.monotonic() + ANSWER_TIME
        self.room = self.side = ""
        self.words: list[str] = []  # that the peer is told
        self.peer: Member | None = None
        self.ports: set[int] = set()  # as which it was seen in this round
        self.said: list[str] = []  # in this round

    def tell(self, *words: object) -> None:
        """Send a line; the end of a client that is lost will be read."""
        with contextlib.suppress(OSError):
            self.sock.send(" ".join(map(str, words)).encode() + b"\n")


def is_private(host: str) -> bool:
    address = ipaddress.ip_address(host)
    return address.is_private and not address.is_loopback


def pour(source: socket.socket, sink: socket.socket, left: int) -> None:
    """Copy one direction to its end; at a failure, or at a limit, end both."""
    with contextlib.suppress(OSError):
        while (data := source.recv(READ_SIZE)) and (left := left - len(data)) > 0:
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
        self.port = options.addresses[0][1]
        self.udp: dict[Address, socket.socket] = {}
        self.members: set[Member] = set()
        self.tokens: dict[bytes, Member] = {}
        self.rooms: dict[str, list[Member]] = {}  # who waits
        self.taken: set[str] = set()  # rooms that a pair has
        self.far_until: dict[str, float] = {}  # rooms where pipes want the far end
        self.relays: dict[int, str] = {}  # pid -> room
        self.counts: Counter[bytes] = Counter()  # unpaired members, by network
        self.asked: Counter[str] = Counter()  # of STUN, by source, in this second
        self.second = 0.0
        for host, port in options.addresses:
            for number in (port, port + 1):
                with trying("listen on " + spelled((host, number))):
                    self.listen((host, number))
            say(f"serving on {spelled((host, port))} and {port + 1}")

    def listen(self, here: Address) -> None:
        """Open an address for both transports; raise OSError."""
        family = INET6 if ":" in here[0] else INET
        for kind, act in ((STREAM, self.accept), (DGRAM, self.observe)):
            sock = socket.socket(family, kind | socket.SOCK_NONBLOCK)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, kind == STREAM)
            if family == INET6:
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            sock.bind(here)
            if kind == STREAM:
                sock.listen(1024)
            else:
                self.udp[here] = sock
            run = functools.partial(act, sock, here)
            self.selector.register(sock, selectors.EVENT_READ, run)

    def other(self, here: Address) -> Address | None:
        """Return the other address, with the other port, where there are two."""
        for host, port in self.options.addresses:
            if host != here[0] and (":" in host) == (":" in here[0]):
                return host, 2 * port + 1 - here[1]
        return None

    def run(self) -> None:
        """Serve until a signal."""
        while True:
            for key, _ in self.selector.select(1.0):
                key.data()
            if (now := time.monotonic()) >= self.second + 1:
                self.second = now
                self.sweep(now)

    def sweep(self, now: float) -> None:
        """Forget what is over: once a second."""
        self.asked.clear()
        for member in [member for member in self.members if member.ends_at < now]:
            self.refuse(member, "gone" if member.peer else "nobody")
        self.far_until = {r: at for r, at in self.far_until.items() if at > now}
        for pid in list(self.relays):
            if os.waitpid(pid, os.WNOHANG)[0]:
                self.taken.discard(self.relays.pop(pid))

    def note(self, message: bytes, source: Address) -> None:
        """Remember as whom a member was seen, if that is where it comes from."""
        member = self.tokens.get(message[8:16])
        if member and member.source[0] == source[0] and len(member.ports) < FAN:
            member.ports.add(source[1])

    def observe(self, sock: socket.socket, here: Address) -> None:
        """Answer a datagram."""
        with contextlib.suppress(OSError, ValueError):
            message, (host, port, *_) = sock.recvfrom(LINE_LIMIT)
            other = self.other(here)
            answer, change = answer_to(message, (host, port), other)
            if self.asked[host] >= STUN_RATE or len(self.asked) >= SOURCES:
                return
            self.asked[host] += 1
            self.note(message, (host, port))
            away = other[0] if other and change & OTHER_HOST else here[0]
            number = 2 * self.port + 1 - here[1] if change & OTHER_PORT else here[1]
            self.udp[away, number].sendto(answer, (host, port))

    def accept(self, sock: socket.socket, here: Address) -> None:
        """Take a connection, or close it where there are too many."""
        try:
            connection, source = sock.accept()
        except OSError:
            return time.sleep(0.01)  # no file is left: let one be closed
        member, options = Member(connection, source[:2]), self.options
        per_address = self.counts[member.network] >= 4 * options.per_address
        if per_address or self.counts.total() >= 4 * options.waiting:
            return connection.close()
        connection.setblocking(False)
        keep_alive(connection)
        self.counts[member.network] += 1
        self.members.add(member)
        self.tokens[member.nonce[:8]] = member
        run = functools.partial(self.read, member, here)
        self.selector.register(connection, selectors.EVENT_READ, run)

    def forget(self, member: Member) -> None:
        """Close our copy of a member's connection."""
        self.members.remove(member)
        self.selector.unregister(member.sock)
        del self.tokens[member.nonce[:8]]
        member.sock.close()

    def drop(self, member: Member) -> None:
        """Forget a member that has not been yet, and refuse its peer."""
        if member not in self.members:
            return
        self.forget(member)
        if member.peer:
            member.peer.peer, peer = member, member.peer
            self.taken.discard(member.room)
            self.refuse(peer, "gone")
        else:
            self.leave(member)

    def leave(self, member: Member) -> None:
        """Count a member no more among those that wait."""
        self.counts[member.network] -= 1
        if not self.counts[member.network]:
            del self.counts[member.network]
        waiting = self.rooms.get(member.room, [])
        if member in waiting:
            waiting.remove(member)
            if not waiting:
                del self.rooms[member.room]

    def refuse(self, member: Member, why: str) -> None:
        member.tell("no", why)
        self.drop(member)

    def read(self, member: Member, here: Address) -> None:
        """Act on what a member sends; drop it when that is its end, or nonsense."""
        try:
            data = member.sock.recv(LINE_LIMIT)
            if not data:
                return self.drop(member)
            member.buffer += data
            while self.act(member, here):
                pass
        except (OSError, ValueError):
            self.drop(member)

    def act(self, member: Member, here: Address) -> bool:
        """Act on one message; return whether there was a whole one; raise ValueError."""
        buffer = member.buffer
        if buffer[:1] == b"\0":  # STUN; our own messages are lines
            size = 20 + int.from_bytes(buffer[2:4], "big")
            whole = len(buffer) >= size
        else:
            size = buffer.find(b"\n") + 1
            whole = size > 0
        if size > LINE_LIMIT or not whole and len(buffer) >= LINE_LIMIT:
            raise ValueError("too long")
        if not whole or member not in self.members:
            return False
        message, member.buffer = buffer[:size], buffer[size:]
        if message[0]:
            self.obey(member, here, message.decode("ascii").split())
        else:
            self.note(message, member.source)
            other = self.other(here)
            member.sock.send(answer_to(message, member.source, other)[0])
        return True

    def obey(self, member: Member, here: Address, words: list[str]) -> None:
        """Act on one line; raise ValueError."""
        match words:
            case ["natpunch", "1"]:
                other = self.other(here)
                member.tell("natpunch", member.nonce.hex(), other[0] if other else "-")
            case ["join", room, kind, side, nonce, can, proof] if not member.room:
                line = " ".join(words[:-1])
                right = mac(self.options.key, member.nonce.hex(), line).hex()
                if not hmac.compare_digest(right, proof):
                    return self.refuse(member, "key")
                member.words = [nonce, can]
                member.room, member.side = f"{room} {kind}", side
                self.join(member)
            case ["round", *_] if member.peer and len(words) == 6:
                self.compare(member, member.peer, words[1:])
            case ["relay"] if member.peer:
                self.relay(member, member.peer)
            case _:
                raise ValueError("not a message")

    def join(self, member: Member) -> None:
        """Pair a member, or let it wait."""
        room, side, now = member.room, member.side, time.monotonic()
        waiting = self.rooms.setdefault(room, [])
        sides = [other.side for other in waiting]
        if room in self.taken or side == "far" and "far" in sides:
            return self.refuse(member, "taken")
        if side == "far":
            self.far_until[room] = now + WAIT_TIME
        for other in waiting:
            both = {side, other.side}
            if "far" in both or "pipe" in both and room not in self.far_until:
                return self.pair(other, member)
        ours = [m for ms in self.rooms.values() for m in ms]
        near = [m for m in ours if m.network == member.network]
        if len(ours) >= self.options.waiting or len(near) >= self.options.per_address:
            member.room = ""
            return self.refuse(member, "full")
        waiting.append(member)
        member.ends_at = now + WAIT_TIME

    def pair(self, one: Member, two: Member) -> None:
        """Tell two members of one another."""
        for role, (member, peer) in enumerate(((one, two), (two, one))):
            self.leave(member)
            member.peer, member.ends_at = peer, time.monotonic() + PAIR_TIME
            member.tell("paired", role, *peer.words)
        if "far" not in (one.side, two.side):
            self.taken.add(one.room)

    def compare(self, member: Member, peer: Member, words: list[str]) -> None:
        """Tell both where the other was seen, once both have said how."""
        kind, step, port, host, inside = words
        if int(port) not in member.ports or not 0 <= int(step) <= STEP_LIMIT:
            kind, port = "none", "0"
        member.said = [kind, str(int(step)), str(int(port)), host, str(int(inside))]
        if len(peer.said) != 5:
            return
        for one, two in ((member, peer), (peer, member)):
            kind, step, port, host, inside = two.said
            same_side = one.source[0] == two.source[0] and is_private(host)
            seen = [two.source[0], port, kind, step]
            one.tell("peer", one.said[0], *seen, *[host, inside] * same_side)
        for one in (member, peer):
            one.said, one.ports = [], set()

    def relay(self, member: Member, peer: Member) -> None:
        """Join two members' connections in two processes, once both want it."""
        if self.options.no_relay or len(self.relays) >= self.options.relays:
            return self.refuse(member, "relay")
        member.said = ["relay"]
        if peer.said != ["relay"]:
            return
        for one in (member, peer):
            one.tell("relay")
        pid = os.fork()
        if pid == 0:
            self.become_relay([member.sock, peer.sock])
        self.relays[pid] = member.room
        self.forget(member)
        self.forget(peer)

    def become_relay(self, socks: list[socket.socket]) -> NoReturn:
        """Copy between two connections in two processes, and end."""
        for key in list(self.selector.get_map().values()):
            if key.fileobj not in socks:
                key.fileobj.close()
        self.selector.close()
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)
        for sock in socks:
            sock.setblocking(True)
        other = os.fork()
        signal.alarm(self.options.relay_time)
        one, two = socks if other else socks[::-1]
        pour(one, two, self.options.relay_bytes)
        if other:
            os.waitpid(other, 0)
        os._exit(0)


# --- Which NAT is this --------------------------------------------------------


def filtering(meeting: Meeting, listener: socket.socket) -> str:
    """Return whose datagrams a NAT lets in, by RFC 5780 section 4.4."""
    by = "address and port" if len(meeting.servers) > 2 else "port, perhaps by address"
    both = [(OTHER_HOST | OTHER_PORT, "nothing"), (OTHER_PORT, "address")]
    for flags, what in both if len(meeting.servers) > 2 else both[1:]:
        request = stun(
            BINDING, COOKIE + os.urandom(12), (CHANGE, bytes((0, 0, 0, flags)))
        )
        for _ in range(2):
            with contextlib.suppress(OSError):
                listener.sendto(request, meeting.servers[0])
                listener.settimeout(OBSERVE_TIME)
                while True:
                    answer = listener.recv(LINE_LIMIT)
                    if answer[4:20] == request[4:20]:
                        return what if len(meeting.servers) > 2 else "at most " + what
    return by


def tell_nat(options: Any) -> None:
    """Print how the NAT behaves."""
    with trying(f"reach {spelled(options.server)}"):
        meeting = Meeting(options)
        for name, kind in (("udp", DGRAM), ("tcp", STREAM)):
            listener = bound(kind, meeting.sock.family)
            seen = observe(listener, meeting.servers, meeting.nonce[:8])
            what, step = behavior(seen)
            text = f"{what} {step}" if step else what
            filters = f"; filtering by {filtering(meeting, listener)}" * (kind == DGRAM)
            print(
                f"{name}: {text}; {port_of(listener)} seen as {' '.join(map(spelled, seen))}{filters}"
            )


# --- main ---------------------------------------------------------------------


def run(work: Callable[[], object], stopped: int = 0) -> int:
    """Return the exit code of what is done."""
    try:
        work()
        return 0
    except Failure as failure:
        say(str(failure))
        return 1
    except Misuse as misuse:
        say(str(misuse))
        return 2
    except KeyboardInterrupt:
        return stopped


def carry(
    meeting: Meeting, source: int, sink: int, finish: Callable[[], object]
) -> None:
    """Carry one stream; raise Failure."""
    way, _ = find_way(meeting)
    with trying("carry the stream"):
        channel = Channel(way, meeting)
        say(
            "the stream is "
            + (
                f"encrypted"
                if meeting.tls
                else "plain: TLS needs Python 3.13 on both sides"
            )
        )
        carry_stream(channel, source, sink, finish)


def carry_socket(meeting: Meeting, sock: socket.socket) -> None:
    sock.setblocking(False)
    fd = sock.fileno()
    carry(meeting, fd, fd, functools.partial(sock.shutdown, socket.SHUT_WR))


def carry_pipe(options: Any) -> None:
    """Join standard input and output with the peer."""
    sink = 1
    with contextlib.suppress(OSError):
        if stat.S_ISFIFO(os.fstat(1).st_mode):
            # Ours alone: others may share the one that we have.
            sink = os.open("/proc/self/fd/1", os.O_WRONLY | os.O_NONBLOCK)
    carry(meet(options), 0, sink, lambda: [os.close(fd) for fd in {1, sink}])


def spawn(work: Callable[[], object]) -> None:
    """Do something in a process of its own."""
    if os.fork() == 0:
        os._exit(run(work))


def answer_calls(options: Any) -> None:
    """Be the far end of a room, for one stream after another."""

    def work() -> None:
        with trying("connect to " + spelled(options.to)):
            sock = socket.create_connection(options.to, ANSWER_TIME)
        carry_socket(meeting, sock)

    while True:
        meeting = meet_again(options)
        spawn(work)
        meeting.sock.close()


def meet_again(options: Any) -> Meeting:
    """Return a meeting, also when the server is away for a time; raise Failure."""
    while True:
        try:
            return meet(options)
        except Failure as failure:
            if isinstance(failure.__cause__, Refused) or options.wait < FOREVER:
                raise
            say(f"{failure}; trying again")
            time.sleep(RETRY_TIME)


def take_calls(options: Any) -> None:
    """Carry each connection to a local port."""
    with trying(f"listen on 127.0.0.1:{options.listen}"):
        listener = socket.create_server(("127.0.0.1", options.listen))
    while True:
        sock, _ = listener.accept()
        spawn(lambda: carry_socket(meet(options), sock))
        sock.close()


def carry_all_datagrams(options: Any) -> None:
    """Carry datagrams, by one way to the peer after another."""
    local, client = socket.socket(INET, DGRAM), options.to
    with trying("open the local port"):
        if client:
            local.connect(client)
        else:
            local.bind(("127.0.0.1", options.listen))
    while True:
        meeting = meet_again(options)
        try:
            way, direct = find_way(meeting)
            with trying("carry datagrams"):
                hole = Hole(way, meeting.peers) if direct else Channel(way, meeting)
                carry_datagrams(hole, local, client)
        except Failure as failure:
            say(f"{failure}; meeting again")


def main() -> int:
    """Do what the command line wants; return the exit code."""
    parser = argparse.ArgumentParser(
        prog="natpunch",
        usage="natpunch.py serve [ADDRESS]... | -s SERVER ROOM | -s SERVER nat",
    )
    parser.add_argument("--version", action="version", version=__version__)
    parser.add_argument("--key", default="", metavar="FILE")
    serves = sys.argv[1:2] == ["serve"]
    if serves:
        parser.add_argument("addresses", nargs="*", metavar="ADDRESS")
        parser.add_argument("--no-relay", action="store_true")
        for name, number in {
            "waiting": 256,
            "per-address": 16,
            "relays": 64,
            "relay-bytes": 1 << 40,
            "relay-time": 86400,
        }.items():
            parser.add_argument(f"--{name}", type=int, default=number, metavar="N")
    else:
        parser.add_argument("-s", "--server", required=True)
        parser.add_argument("room", metavar="ROOM")
        parser.add_argument("--secret", default="", metavar="FILE")
        parser.add_argument("--to", metavar="HOST:PORT")
        parser.add_argument("--listen", type=int, metavar="PORT")
        parser.add_argument("--udp", action="store_true")
        parser.add_argument("--wait", type=float, default=FOREVER, metavar="SECONDS")
        parser.add_argument("--direct-only", action="store_true")
    options = parser.parse_args(sys.argv[1 + serves :])
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return run(
        functools.partial(serve if serves else work, options),
        0 if serves or options.to or options.listen else 130,
    )


def serve(options: Any) -> None:
    options.key = secret_of("NATPUNCH_KEY", options.key)
    options.addresses = [
        parse_address(text, text, str(PORT))
        for text in options.addresses or ["0.0.0.0"]
    ]
    Server(options).run()


def work(options: Any) -> None:
    options.key = secret_of("NATPUNCH_KEY", options.key)
    options.server = parse_address(options.server, "", str(PORT))
    if options.room == "nat":
        return tell_nat(options)
    options.secret = secret_of("NATPUNCH_SECRET", options.secret, "~/.natpunch")
    if (
        options.to
        and options.listen
        or options.udp
        and not (options.to or options.listen)
    ):
        raise Misuse("cannot ...")
    options.to = parse_address(options.to, "127.0.0.1") if options.to else None
    options.side = "far" if options.to else "call" if options.listen else "pipe"
    if options.udp:
        return carry_all_datagrams(options)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    if options.to:
        answer_calls(options)
    elif options.listen:
        take_calls(options)
    else:
        carry_pipe(options)


if __name__ == "__main__":
    sys.exit(main())
