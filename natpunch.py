#!/usr/bin/env python3
"""natpunch: join two machines, each behind a NAT that admits nobody, directly.

A server that both can reach tells each where the other was seen.  Both send there at
once, each NAT takes the other's packets for answers, and the server's part is done:

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
stream is TLS by the secret where both have Python 3.13, else plain, as datagrams are.

Exit codes: 0 done, or asked to stop (TERM, INT); 1 it could not be done; 2 bad command
line; 130 a pipe was interrupted.  Stopping a server or a far end ends no stream.

It does not move a stream to another address, and it does not speak ICE.  To read it,
begin at find_way() and carry(); every section uses only the ones above it.
"""
# SPDX-License-Identifier: MIT

from __future__ import annotations

import signal
import sys

if __name__ == "__main__":
    if sys.version_info < (3, 10):  # noqa: UP036
        sys.exit("natpunch: needs Python 3.10 or later")
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback from the imports below

import argparse
import contextlib
import hmac
import ipaddress
import itertools
import os
import random
import resource
import select
import selectors
import socket
import ssl
import struct
import time
from collections.abc import Callable
from collections.abc import Iterator
from typing import Any
from typing import NamedTuple

__version__ = "0.1.0"

# --- Limits -------------------------------------------------------------------
#
# Sizes are bytes, times are seconds.

PORT = 3478  # and the next one: RFC 8489 section 18.6
LINE_LIMIT = 1024  # a message between us and the server
READ_SIZE = 256 * 1024
FAN = 24  # ports that are tried ahead of a stepping NAT
BIRTHDAYS = 256  # ports of a random NAT: PROBES at random hit one of them in 98.3 %
PROBES = 1024  # at most in a round; 8 are sent every 4 ms
STEP_LIMIT = 16  # a NAT that steps further is taken for random
LOW_TTL, LOW_TTL_TIME = 2, 0.15  # passes no gateway but our NAT; time for this
BIRTHDAY_TIME = 0.7  # of which sending PROBES takes 0.5
OBSERVE_TIME = 0.5  # for the server to answer a binding request
ANSWER_TIME = 10.0  # for a server or a target to answer, for a client to join
PAIR_TIME = 8.0  # from pairing until there is a hole, or the relay
RELAY_TIME = 1.5  # the part of PAIR_TIME that is kept for the relay
WAIT_TIME = 60.0  # for a peer to join; then a client joins anew, and says so
RETRY_TIME = 1.0  # until a client tries again; for standard error to take a line
KEEP_ALIVE = 15.0  # conntrack forgets an unanswered datagram in 30
SILENCE = 45.0  # after which a hole is given up, and punched anew
STUN_RATE = 10  # answers to one source in a second
SOURCES = 10000  # answered in a second; a forger has any number of addresses
FOREVER = float("inf")

STREAM, DGRAM = socket.SOCK_STREAM, socket.SOCK_DGRAM
# A round's time, and whether it begins with a low TTL: 6 s in all.
ROUNDS = {DGRAM: ((3, True), (3, False)), STREAM: ((2, False), (2, False), (2, True))}
Address = tuple[str, int]
Socket = socket.socket
PRIVATE = "10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "fc00::/7"  # RFC 1918, 4193
RESET = socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0)  # by close()

# --- What is said -------------------------------------------------------------

REFUSALS = {
    "full": "the server has no place now",
    "taken": "the room is taken",
    "key": "the server has another key",
    "nobody": "nobody has come",
    "gone": "the peer has left",
    "relay": "no hole could be made, and it may not be relayed",
}
CHANGING = REFUSALS["full"], REFUSALS["nobody"]  # may change: we try again


class Failure(Exception):
    """The end of a run: what cannot be done, why not, and the exit code."""

    def __init__(self, to: str, why: str, code: int = 1) -> None:
        super().__init__(f"cannot {to}: {why}")
        self.why, self.code = why, code


def say(message: object) -> None:
    """Write a line to standard error, or lose it if nobody reads there."""
    with contextlib.suppress(OSError):
        line = " ".join(str(message).splitlines())
        if select.select([], [2], [], RETRY_TIME)[1]:
            os.write(2, f"natpunch: {line}\n".encode(errors="replace"))


@contextlib.contextmanager
def trying(to: str, code: int = 1, other: str = "it is not natpunch") -> Iterator[None]:
    """Turn an error into a Failure of one line, without a word that a peer sent."""
    try:
        yield
    except OSError as error:
        why = (error.strerror or str(error)).partition(" (")[0]  # less "(_ssl.c:1000)"
        raise Failure(to, why[:1].lower() + why[1:], code) from error
    except (ValueError, LookupError) as error:
        raise Failure(to, other, code) from error


def spelled(address: Any) -> str:
    host, port = address[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def parse_address(text: str, port: int = 0) -> Address:
    """Return host and port of HOST:PORT or [HOST]:PORT, or a host and that port."""
    host, colon, number = text.rpartition(":")
    if port and (not colon or ":" in host and host[-1] != "]"):
        host, number = text, str(port)
    most = 65534 if port else 65535  # a server uses the next port, too
    if number not in map(str, range(1, most + 1)):
        raise Failure(f"use {text!r}", f"it has no port from 1 to {most}", 2)
    with trying(f"use {text!r}", 2, "it has no host"):
        if not (host := host.strip("[]")).encode("idna"):
            raise ValueError
    return host, int(number)


def secret_of(variable: str, path: str, default: str) -> bytes:
    """Return the secret of a file, else of the environment, else of a default file."""
    found = os.fsencode(os.environ.get(variable, ""))
    path = path or ("" if found else os.path.expanduser(default))
    if path:
        with trying(f"read {path}", 2), open(path, "rb") as file:
            if os.fstat(file.fileno()).st_mode & 0o077:
                raise OSError("others may read it")
            found = file.read(LINE_LIMIT).strip()
    if len(found) < 16 and (path or found):  # there may be no key at all
        raise Failure(f"use {path or variable}", "16 characters are the least", 2)
    return found


def mac(key: bytes, *words: object) -> bytes:
    """Return 16 bytes that only an owner of the key can make of these words."""
    return hmac.digest(key, os.fsencode(" ".join(map(str, words))), "sha256")[:16]


def tell(sock: Socket, *words: object) -> None:
    """Send a message; if the connection is lost, the next read shows that."""
    with contextlib.suppress(OSError):
        sock.sendall(" ".join(map(str, words)).encode() + b"\n")


def hear(sock: Socket, expected: str, until: float) -> list[str]:
    """Return the words of the server's next message; raise what trying() catches."""
    line = b""
    while line[-1:] != b"\n" and len(line) < LINE_LIMIT:
        sock.settimeout(max(until - time.monotonic(), 0.001))
        # One byte at a time: the relayed stream follows the last message at once.
        if not (byte := sock.recv(1)):
            raise OSError("the server has left")
        line += byte
    first, *words = line.decode("ascii", "replace").split()
    if first == "no":
        raise OSError(REFUSALS[words[0]])
    if first != expected:
        raise ValueError(first)
    return words


def address_of(host: str | bytes, port: str | int) -> Address:
    """Return an address from a message; raise ValueError, also for a host's name."""
    return str(ipaddress.ip_address(host)), int(port)


def inside_of(host: str, port: str) -> list[Address]:
    """Return a peer's own address if it is private, else []; raise ValueError."""
    at, number = ipaddress.ip_address(host), int(port)
    is_private = any(at in ipaddress.ip_network(network) for network in PRIVATE)
    return [(str(at), number)] if is_private and 0 < number < 65536 else []


def family_of(host: str) -> int:
    return socket.AF_INET6 if ":" in host else socket.AF_INET


# --- STUN ---------------------------------------------------------------------
#
# RFC 8489, with RFC 5780 where the server has two addresses.  A transaction is the
# cookie and an identifier; that of an RFC 3489 client has no cookie.

COOKIE = bytes.fromhex("2112a442")
BINDING, SUCCESS, ERROR = 0x0001, 0x0101, 0x0111
MAPPED, CHANGE, CHANGED, ERROR_CODE, UNKNOWN = 1, 3, 5, 9, 10
XOR_MAPPED, OTHER = 0x0020, 0x802C
KNOWN = {CHANGE, 0x0006, 0x0008, 0x001C}  # also USERNAME and MESSAGE-INTEGRITY, ignored
OTHER_HOST, OTHER_PORT = 4, 2  # flags of CHANGE-REQUEST


def stun(kind: int, transaction: bytes, *attributes: tuple[int, bytes]) -> bytes:
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


def packed(address: Address) -> bytes:
    """Return an address as the value of an attribute."""
    host = ipaddress.ip_address(address[0]).packed
    return struct.pack("!HH", 1 if len(host) == 4 else 2, address[1]) + host


def hidden(value: bytes, transaction: bytes) -> bytes:
    """Turn a value of MAPPED-ADDRESS into one of XOR-MAPPED-ADDRESS, or back."""
    return bytes(a ^ b for a, b in zip(value, bytes(2) + transaction[:2] + transaction))


def stun_answer(message: bytes, source: Address, *other: Address) -> tuple[bytes, int]:
    """Return the shortest answer, and the flags of CHANGE-REQUEST; raise ValueError."""
    kind, transaction, asked = parse_stun(message)
    if kind != BINDING:
        raise ValueError("not a request")
    change = int.from_bytes(asked.get(CHANGE, b""), "big") & (OTHER_HOST | OTHER_PORT)
    unknown = [name for name in asked if name < 0x8000 and name not in KNOWN]
    if change & OTHER_HOST and not other:
        unknown.append(CHANGE)
    if unknown:
        names = struct.pack(f"!{len(unknown)}H", *unknown)
        code = ERROR_CODE, bytes((0, 0, 4, 20))
        return stun(ERROR, transaction, code, (UNKNOWN, names)), 0
    is_old = transaction[:4] != COOKIE
    seen = packed(source) if is_old else hidden(packed(source), transaction)
    found = [(MAPPED if is_old else XOR_MAPPED, seen)]
    found += [(CHANGED if is_old else OTHER, packed(at)) for at in other]
    return stun(SUCCESS, transaction, *found), change


# --- Observing ----------------------------------------------------------------
#
# From one local port we ask two or three ports of the server where they see us.  The
# peer has to aim there.  How the answers differ tells how our NAT chooses ports.


def bound(kind: int, family: int, port: int = 0) -> Socket:
    """Return a socket at a local port, which others of ours may share for TCP."""
    sock = socket.socket(family, kind)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, kind == STREAM)
    sock.bind(("", port))
    return sock


def ask_stun(sock: Socket, server: Address, token: bytes, flags: int = 0) -> Address:
    """Return the address at which a server sees us; raise what trying() catches."""
    change = CHANGE, bytes((0, 0, 0, flags))
    request = stun(BINDING, COOKIE + token + os.urandom(4), change)  # token: who asks
    sock.settimeout(OBSERVE_TIME)
    if sock.type == STREAM:
        sock.connect(server)
    for _ in range(2):  # a datagram may be lost
        sock.sendto(request, server)
        with contextlib.suppress(TimeoutError):
            _, transaction, found = parse_stun(sock.recv(LINE_LIMIT))
            value = hidden(found[XOR_MAPPED], transaction)
            if transaction == request[4:20]:
                return address_of(value[4:], int.from_bytes(value[2:4], "big"))
    raise TimeoutError


def behavior(seen: list[Address]) -> tuple[str, int]:
    """Return how a NAT chooses ports, and its step, from where it was seen."""
    steps = [after[1] - before[1] for before, after in zip(seen, seen[1:])]
    if not any(steps):
        return "same" if seen else "none", 0
    if all(0 < step <= STEP_LIMIT for step in steps):
        return "step", min(steps)
    return "random", 0


# --- Punching -----------------------------------------------------------------
#
# A probe proves the secret and says which role sends it.  Role 0 says SYN, role 1
# answers ACK.  The first ACK tells role 0 which socket is the hole; DONE tells role 1.
# Nothing answers DONE: later ones keep the hole open.  BYE: the peer leaves.

MAGIC, PROBE_SIZE = b"\xf5\x9d", 19
SYN, ACK, DONE, BYE = b"\1", b"\2", b"\3", b"\4"
REPLIES = {(0, SYN): [SYN], (1, SYN): [ACK], (0, ACK): [DONE] * 3}  # a DONE may be lost
LAST = ACK, DONE  # the probe that makes a hole, by the role that hears it


class Peers(NamedTuple):
    """The role that we have of two, and the key that both have."""

    role: int
    key: bytes

    def probe(self, kind: bytes, is_theirs: bool = False) -> bytes:
        return MAGIC + kind + mac(self.key, self.role ^ is_theirs, kind.hex())

    def say(self, sock: Socket, kind: bytes, there: Any = None) -> None:
        """Send a probe, or lose it."""
        with contextlib.suppress(OSError):
            sock.sendmsg([self.probe(kind)], (), 0, there)

    def kind_of(self, data: bytes) -> bytes:
        """Return which probe of the peer this is, or nothing."""
        right = self.probe(data[2:3], True)
        return data[2:3] if hmac.compare_digest(data, right) else b""


def aims(mine: str, theirs: str, at: Address, step: int) -> tuple[int, list[Address]]:
    """Return from how many ports to send, and where to; nowhere if it is hopeless.

    Two stepping NATs fan in: our probes open the next FAN ports of our NAT, and the
    peer aims at the middle of them, so that others may take some ports meanwhile.
    """
    host, last = at
    table = {
        ("same", "same"): (1, [last]),
        ("same", "step"): (1, [last + step * n for n in range(1, FAN + 1)]),
        ("same", "random"): (1, random.sample(range(1024, 65536), PROBES)),
        ("step", "same"): (1, [last]),
        ("step", "step"): (FAN, [last + step * FAN // 2]),
        ("random", "same"): (BIRTHDAYS, [last]),
    }
    count, ports = table.get((mine, theirs), (1, []))
    return count, [(host, port) for port in ports if 0 < port < 65536]


class Puncher:
    """Sockets that try to reach the peer."""

    def __init__(self, peers: Peers, listeners: list[Socket]) -> None:
        self.peers, self.listeners = peers, listeners
        self.selector = selectors.PollSelector()  # epoll needs a descriptor
        for sock in listeners:
            if sock.type == STREAM:
                sock.listen()
            self.watch(sock, selectors.EVENT_READ)

    def watch(self, sock: Socket, event: int = selectors.EVENT_WRITE) -> None:
        """Watch a socket; EVENT_WRITE tells when connect() is done, or has failed."""
        sock.setblocking(False)
        self.selector.register(sock, event, sock)

    def shoot(self, sock: Socket, there: Address, ttl: int) -> None:
        """Send a probe, or begin to connect, from a listener's port; raise OSError."""
        if is_tcp := sock.type == STREAM:
            sock = bound(STREAM, sock.family, sock.getsockname()[1])
            self.watch(sock)
        # IPv6 ignores it.  Without NAT no gateway is addressed, so none takes a probe.
        sock.setsockopt(socket.IPPROTO_IP, socket.IP_TTL, ttl)
        if is_tcp:
            sock.connect_ex(there)  # EADDRNOTAVAIL while an earlier one is under way
        else:
            self.peers.say(sock, SYN, there)
        sock.setsockopt(socket.IPPROTO_IP, socket.IP_TTL, -1)  # as usual

    def act(self, sock: Socket, event: int) -> Socket | None:
        """Act on a socket that is ready; return it if it is the hole now."""
        role, is_tcp = self.peers.role, sock.type == STREAM
        if is_tcp and sock in self.listeners:
            self.watch(sock.accept()[0])
            return None
        if event == selectors.EVENT_WRITE:  # connected; or else recvfrom() fails next
            self.selector.modify(sock, selectors.EVENT_READ, sock)
            if role == 0:
                self.peers.say(sock, SYN)
            return None
        data, there = b"", None
        with contextlib.suppress(OSError):
            data, there = sock.recvfrom(PROBE_SIZE)  # no payload that follows the last
        kind = self.peers.kind_of(data)
        if is_tcp and not kind:
            self.selector.unregister(sock)
            sock.close()
        for reply in REPLIES.get((role, kind), [])[: 1 if is_tcp else 3]:
            self.peers.say(sock, reply, there)
        if kind == LAST[role] and there:
            sock.connect(there)
        return sock if kind == LAST[role] else None

    def wait(self, until: float) -> Socket | None:
        """Return the hole, if there is one by that time."""
        left = 1.0  # after the time is over, look once more
        while left and self.selector.get_map():
            left = max(until - time.monotonic(), 0)
            for key, event in self.selector.select(left):
                with contextlib.suppress(OSError):
                    if hole := self.act(key.data, event):
                        self.selector.unregister(hole)  # so that close() leaves it open
                        return hole
        return None

    def run(self, there: list[Address], seconds: float, low_ttl: bool) -> Socket | None:
        """Send from each listener to each address; return the hole, once there is one.

        A probe with a low TTL opens our NAT and does not reach the peer's.  If that
        gateway accepted a probe, it could not give the peer the port that we aim at.
        """
        start, is_tcp = time.monotonic(), self.listeners[0].type == STREAM
        pairs = list(itertools.product(self.listeners, there))
        interval, pause = 0.1 if is_tcp else 0.25, LOW_TTL_TIME
        if len(pairs) >= BIRTHDAYS:
            # One side must have sent all PROBES before a probe of the other arrives.
            interval, pause, low_ttl = seconds, BIRTHDAY_TIME, low_ttl or not is_tcp
        passes = [(n * interval, -1) for n in range(int(seconds / interval))]
        if low_ttl and len(pairs) <= BIRTHDAYS:
            passes = [(0.0, LOW_TTL), *((pause + at, ttl) for at, ttl in passes)]
        shots = itertools.product(passes, enumerate(pairs))
        for (at, ttl), (n, pair) in itertools.islice(shots, PROBES):
            if hole := self.wait(start + at + n // 8 * 0.004):
                return hole
            with contextlib.suppress(OSError):  # no descriptor is left
                self.shoot(*pair, ttl)
        return self.wait(start + seconds * (1 + self.peers.role / 10))  # 1 awaits DONE

    def close(self) -> None:
        for key in [*self.selector.get_map().values()]:
            key.data.close()


# --- Meeting ------------------------------------------------------------------
#
# Two clients that name the same room are a pair.  Each tells the server how its NAT
# behaves and hears where the other was seen.  The connection on which they do so
# becomes the relay, if they want one.


def keep_alive(sock: Socket) -> None:
    """Let the kernel end a connection whose other side is silent for too long."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name in (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL):
        sock.setsockopt(socket.IPPROTO_TCP, name, int(KEEP_ALIVE))
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 2)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


class Meeting:
    """A connection to the server, and what was agreed there with the peer."""

    def __init__(self, options: Any, seconds: float = ANSWER_TIME) -> None:
        """Connect; raise what trying() catches."""
        self.options, self.kind = options, DGRAM if options.udp else STREAM
        seconds = min(seconds, ANSWER_TIME)
        self.sock = socket.create_connection(options.server, seconds)
        self.held = contextlib.ExitStack()
        keep_alive(self.sock)
        tell(self.sock, "natpunch 1")
        nonce, *others = hear(self.sock, "natpunch", time.monotonic() + seconds)
        self.nonce, (host, port) = bytes.fromhex(nonce), self.sock.getpeername()[:2]
        self.servers = [(host, port), (host, port + 1), *[(at, port) for at in others]]

    def observe(self, listener: Socket) -> list[Address]:
        """Return where the servers see a local port; forget silent servers."""
        seen, place = {}, (listener.family, listener.getsockname()[1])
        for server in self.servers:
            sock = bound(STREAM, *place) if listener.type == STREAM else listener.dup()
            self.held.enter_context(sock)  # close() may make the NAT forget the port
            with contextlib.suppress(OSError, ValueError, LookupError):
                seen[server] = ask_stun(sock, server, self.nonce[:8])
        self.servers = [*seen] if len(seen) > 1 else self.servers  # one is too few
        return [*seen.values()]

    def enter(self, seconds: float) -> Meeting:
        """Wait in the room for a peer; raise what trying() catches."""
        mine = [os.urandom(16).hex(), "tls" if getattr(ssl, "HAS_PSK", 0) else "plain"]
        room = mac(self.options.secret, "room", self.options.room, int(self.kind)).hex()
        line = " ".join(("join", room, self.options.side, *mine))
        tell(self.sock, line, mac(self.options.key, self.nonce.hex(), line).hex())
        role, *theirs = hear(self.sock, "paired", time.monotonic() + seconds)
        self.ends_at = time.monotonic() + PAIR_TIME
        # Both lists are in the key: where a server altered one, the keys differ.
        both = [mine, theirs] if role == "0" else [theirs, mine]
        key = mac(self.options.secret, "peers", int(self.kind), both)
        self.peers = Peers(int(role), key)
        self.tls = self.kind == STREAM and mine[1] == theirs[1] == "tls"
        return self

    def punch(self, seconds: float, low_ttl: bool) -> tuple[Socket | None, str]:
        """Observe, tell, punch; return the hole, or None, and the pair of behaviors."""
        listeners = [bound(self.kind, self.sock.family)]
        mine, step = behavior(self.observe(listeners[0]))
        here = self.sock.getsockname()[0], listeners[0].getsockname()[1]
        tell(self.sock, "round", mine, step, *here)
        theirs, their_step, host, port, *inner = hear(self.sock, "peer", self.ends_at)
        if theirs not in ("same", "step", "random", "none"):
            raise ValueError("not a behavior")
        count, there = aims(mine, theirs, address_of(host, port), int(their_step))
        there[:0] = inside_of(*inner) if len(inner) == 2 else []
        there = [at for at in there if family_of(at[0]) == self.sock.family]
        with contextlib.suppress(OSError):  # EMFILE: go on with fewer
            while len(listeners) < count:
                listeners.append(bound(self.kind, self.sock.family))
        left = self.ends_at - RELAY_TIME - time.monotonic()
        seconds = max(min(seconds, left), 0.1) if there else 0
        with contextlib.closing(Puncher(self.peers, listeners)) as puncher, self.held:
            return puncher.run(there, seconds, low_ttl), f"{mine}-{theirs}"


def meet(options: Any) -> Meeting:
    """Return a meeting with a peer, once one has come; raise Failure."""
    ends_at, said, said_at = time.monotonic() + options.wait, "", 0.0
    stays = options.wait == FOREVER and options.side != "pipe"  # also after errors
    to = f"meet in {options.room} at {spelled(options.server)}"
    while (left := ends_at - time.monotonic()) > 0:
        try:
            with trying(to):
                return Meeting(options, left).enter(min(left, WAIT_TIME + ANSWER_TIME))
        except Failure as failure:
            why, now = failure.why, time.monotonic()
            if now >= ends_at:
                break
            if why not in CHANGING and (why in REFUSALS.values() or not stays):
                raise
            if why != said or now >= said_at + WAIT_TIME:
                say(f"{failure}; waiting")
                said, said_at = why, now
            time.sleep(RETRY_TIME)
    raise Failure(to, f"nobody came in {options.wait:g} s")


def find_way(meeting: Meeting) -> tuple[Socket, str]:
    """Return a hole to the peer, else the relay, and its name; raise Failure."""
    started, server = time.monotonic(), meeting.sock
    with trying("reach the peer"):
        for seconds, low_ttl in ROUNDS[meeting.kind]:
            hole, pair = meeting.punch(seconds, low_ttl)
            if hole:
                took, at = time.monotonic() - started, spelled(hole.getpeername())
                server.close()
                return hole, f"direct {at} ({pair}, {took:.2f} s)"
            if "none" in pair or "random" in pair and "same" not in pair:
                break  # no round will help
        if meeting.options.direct_only:
            raise OSError(REFUSALS["relay"])
        if meeting.peers.role == 0:  # role 1 has a hole only if role 0 has it, too
            tell(server, "relay")
        hear(server, "relay", meeting.ends_at)
        with contextlib.closing(Puncher(meeting.peers, [])) as puncher:
            puncher.watch(server)  # both prove the secret here as on a hole
            if not puncher.wait(meeting.ends_at):
                raise OSError("the peer has left, or has another secret")
        return server, f"relay ({pair})"


# --- Carrying -----------------------------------------------------------------
#
# A stream crosses in frames, each a size and so many bytes.  An empty one is the end
# of its direction, so that a peer that dies is not taken for one that is done.
# Datagrams cross a hole as they are, and the relay in frames.

NOT_YET = BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError


def with_tls(sock: Socket, peers: Peers) -> Any:
    """Return a connection in TLS that the secret alone authenticates."""
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
    return context.wrap_socket(sock, server_side=not is_client)


class Channel:
    """A connection to the peer, and the frames on it."""

    def __init__(self, sock: Socket, meeting: Meeting) -> None:
        """Begin TLS where both can; raise OSError."""
        keep_alive(sock)
        sock.settimeout(ANSWER_TIME)
        self.sock = with_tls(sock, meeting.peers) if meeting.tls else sock
        self.sock.setblocking(False)
        self.source = self.sink = self.sock.fileno()  # for poll()
        self.came, self.going = memoryview(b""), memoryview(b"")  # parts of frames
        self.ended, self.close = False, self.sock.close

    def read(self) -> list[Any]:
        """Return the frames that have come; raise OSError or ValueError."""
        data, found = self.sock.recv(READ_SIZE), []
        if not data:  # a peer leaves after both ends, when carry() reads no more
            raise OSError("the peer has vanished")
        self.came = memoryview(bytes(self.came) + data)
        while len(self.came) >= 4:
            size = int.from_bytes(self.came[:4], "big")
            if self.ended or size > READ_SIZE:
                raise ValueError("not a frame")
            if len(self.came) < 4 + size:
                break
            found.append(self.came[4 : 4 + size])
            self.came, self.ended = self.came[4 + size :], size == 0
        return found

    def write(self, data: Any) -> int:
        """Send a frame, or the rest of it where it was begun."""
        self.going = self.going or memoryview(len(data).to_bytes(4, "big") + data)
        while self.going:
            self.going = self.going[self.sock.send(self.going) :]
        return len(data)


class Datagrams:
    """A local port of datagrams, or with peers the hole that they cross."""

    def __init__(self, sock: Socket, peers: Peers | None = None) -> None:
        self.sock, self.peers = sock, peers
        self.source = self.sink = sock.fileno()
        self.client: Any = None  # the last that wrote to a local port
        self.heard_at = self.told_at = time.monotonic()
        sock.setblocking(False)

    def read(self) -> list[Any]:
        """Return a datagram of payload, if one has come; raise OSError."""
        data, source, now = b"", self.client, time.monotonic()
        with contextlib.suppress(OSError):  # nothing came, or one of ours was refused
            data, source = self.sock.recvfrom(READ_SIZE)
        if not self.peers:
            self.client = source
            return [data] if data else []  # an empty one would be an end
        if now > self.told_at + KEEP_ALIVE / 2:  # carry() calls this as often
            self.peers.say(self.sock, DONE)  # which keeps the hole open
            self.told_at = now
        if source != self.sock.getpeername():  # none, or it came before connect()
            if now > self.heard_at + SILENCE:
                raise OSError(f"the peer was silent for {SILENCE:g} s")
            return []
        self.heard_at, kind = now, self.peers.kind_of(data)
        if kind == BYE:
            raise OSError("the peer has left")
        if kind in (SYN, ACK):
            self.peers.say(self.sock, DONE)
        return [data] if data and not kind else []

    def write(self, data: Any) -> int:
        """Send a datagram, or lose it."""
        with contextlib.suppress(OSError):
            self.sock.sendmsg([data], (), 0, self.client)
        return len(data)

    def close(self) -> None:
        if self.peers:
            self.peers.say(self.sock, BYE)
        self.sock.close()


class Pipe:
    """Standard input and output, or two descriptors of one connection."""

    def __init__(self, sock: Socket | None = None, left: float = FOREVER) -> None:
        self.source, self.sink, self.left = 0, 1, left  # bytes that may be read
        if sock:
            keep_alive(sock)
            self.source, self.sink = os.dup(sock.fileno()), os.dup(sock.fileno())
        if not os.isatty(self.sink):  # a shell shares its flags
            os.set_blocking(self.sink, False)

    def read(self) -> list[Any]:
        """Return what has come, empty at the end; raise OSError, also at the limit."""
        data = memoryview(os.read(self.source, READ_SIZE))
        self.left -= len(data)
        if self.left < 0:
            raise OSError("no more may be relayed")
        return [data]

    def write(self, data: Any) -> int:
        """Write; without data, end this direction."""
        if data:
            return os.write(self.sink, data)
        with contextlib.suppress(OSError), socket.socket(fileno=self.sink) as sock:
            sock.shutdown(socket.SHUT_WR)  # ENOTCONN if the other side has gone
            sock.setsockopt(*RESET[:2], bytes(8))  # all is written: no reset
        os.closerange(self.sink, self.sink + 1)  # if not a socket, it is still open
        return 0


def carry(way: Channel | Datagrams | Pipe, local: Pipe | Datagrams) -> None:
    """Carry both ways until both end, or nobody reads; raise OSError, ValueError."""
    ended: set[Any] = set()
    # Source, sink, and the data on its way; empty data is the end.  The peer is read
    # first: it may leave as soon as it has our end.
    ways: list[tuple[Any, Any, list[Any]]] = [(way, local, []), (local, way, [])]
    while len(ended) < 2:
        silent = {s.sink for s in ended if isinstance(s, Pipe)}  # watched for errors
        readers = {s.source for s, _, data in ways if not data and s.sink not in silent}
        writers = {sink.sink for _, sink, data in ways if data}
        poll = select.poll()  # select() takes no descriptor above 1023
        for fd in readers | writers | silent:
            wanted = select.POLLIN * (fd in readers) + select.POLLOUT * (fd in writers)
            poll.register(fd, wanted)
        ready = dict(poll.poll(KEEP_ALIVE / 2 * 1000))
        if any(ready.get(fd, 0) & ~select.POLLOUT for fd in silent):
            return  # nobody reads what the peer may still send
        for source, sink, data in ways:
            with contextlib.suppress(*NOT_YET):
                # Datagrams.read() keeps a hole open, also when nothing has come.
                is_ready = source.source in ready or isinstance(source, Datagrams)
                if not data and is_ready:
                    data += source.read()
                while data:
                    if rest := data[0][sink.write(data[0]) :]:
                        data[0] = rest
                    elif not data.pop(0):
                        ended.add(source)


# --- The server ---------------------------------------------------------------
#
# It observes, introduces and relays.  It tells of a client the address that it saw, so
# nobody can aim a peer at a third address.  It never dials: a process of its own
# joins two connections that the server accepted.


class Member:
    """A connection to the server."""

    def __init__(self, sock: Socket, source: Address, places: list[Address]) -> None:
        self.sock, self.source, self.places, self.buffer = sock, source, places, b""
        # --per-address counts by it: a customer has an IPv4 address, or an IPv6 /64.
        self.network = ipaddress.ip_address(source[0]).packed[:8]
        self.nonce, self.ends_at = os.urandom(16), time.monotonic() + ANSWER_TIME
        self.room = self.side = ""  # the side: far (--to), call (--listen) or pipe
        self.words: list[str] = []  # of its join, for the peer
        self.peer: Member | None = None
        self.port = 0  # as which it was last seen, in this round
        self.told: tuple[Any, ...] = ()  # of this round, for the peer

    def take(self) -> bytes:
        """Return the next message, once all of it has come: a line, or one of STUN."""
        size = self.buffer.find(b"\n") + 1
        if self.buffer[:1] == b"\0":  # RFC 8489 section 6.2.2
            size = 20 + int.from_bytes(self.buffer[2:4], "big")
        message = self.buffer[:size] if size <= len(self.buffer) else b""
        self.buffer = self.buffer[len(message) :]
        return message


class Server:
    """Members, whom it introduces to one another."""

    def __init__(self, options: Any) -> None:
        """Open all sockets; raise Failure."""
        self.options, self.selector = options, selectors.DefaultSelector()
        self.udp: dict[Address, Socket] = {}
        self.members: dict[bytes, Member] = {}  # by token
        self.relays: dict[int, str] = {}  # pid -> room
        self.far_until: dict[str, float] = {}  # rooms whose far end may come again
        self.asked: dict[str, int] = {}  # of STUN, by source, in this second
        for host, port in options.addresses:
            others = [at for at, _ in options.addresses if at != host]
            hosts = host, *[at for at in others if family_of(at) == family_of(host)][:1]
            for ports in ((port, port + 1), (port + 1, port)):
                # The flags of CHANGE-REQUEST, halved, are the index: see observe().
                places = [(at, number) for at in hosts for number in ports]
                with trying(f"listen on {spelled(places[0])}"):
                    self.listen(places)
            say(f"serving on {spelled((host, port))} and {port + 1}")

    def listen(self, places: list[Address]) -> None:
        """Open the first of these places for both transports; raise OSError."""
        host, _ = here = places[0]
        tcp = socket.create_server(here, family=family_of(host), backlog=1024)
        udp = self.udp[here] = socket.socket(family_of(host), DGRAM)
        # At a wildcard address IP_PKTINFO says which one was asked, and must answer.
        if host == "0.0.0.0":
            udp.setsockopt(socket.IPPROTO_IP, 8, 1)  # IP_PKTINFO
        if host == "::":
            udp.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            udp.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_RECVPKTINFO, 1)
        udp.bind(here)
        for sock, act in ((tcp, self.accept), (udp, self.observe)):
            sock.setblocking(False)
            self.selector.register(sock, selectors.EVENT_READ, (act, sock, places))

    def run(self) -> None:
        """Serve until a signal."""
        while True:
            self.asked.clear()
            until = (now := time.monotonic()) + 1
            self.far_until = {r: at for r, at in self.far_until.items() if at > now}
            for member in [m for m in self.members.values() if m.ends_at < now]:
                self.drop(member, "gone" if member.peer else "nobody")
            while (left := until - time.monotonic()) > 0:
                ready = self.selector.select(left)
                while self.relays and (pid := os.waitpid(-1, os.WNOHANG)[0]):
                    self.relays.pop(pid, "")  # first: a member may join its room
                for key, _ in ready:
                    act, *what = key.data
                    act(*what)

    def note(self, token: bytes, source: Address) -> bool:
        """Remember the port of the member with a token; return whether there is one."""
        if (member := self.members.get(token)) and member.source[0] == source[0]:
            member.port = source[1]
            return True
        return False

    def observe(self, sock: Socket, places: list[Address]) -> None:
        """Answer a datagram, from the address and port that it asks for."""
        with contextlib.suppress(OSError, ValueError):
            message, pktinfo, _, source = sock.recvmsg(LINE_LIMIT, LINE_LIMIT)
            answer, change = stun_answer(message, source[:2], *places[3:])
            if not self.note(message[8:16], source):
                count = self.asked.get(source[0], 0)
                if count >= STUN_RATE or len(self.asked) >= SOURCES:
                    return
                self.asked[source[0]] = count + 1
            self.udp[places[change // OTHER_PORT]].sendmsg([answer], pktinfo, 0, source)

    def accept(self, sock: Socket, places: list[Address]) -> None:
        """Take a connection; if there are too many, drop the oldest for it."""
        try:
            connection, source = sock.accept()
        except OSError:
            return time.sleep(0.01)  # EMFILE: let one be closed
        member = Member(connection, source[:2], places)
        connection.setblocking(False)
        self.members[member.nonce[:8]] = member
        self.selector.register(connection, selectors.EVENT_READ, (self.read, member))
        self.make_room(member)

    def make_room(self, member: Member) -> None:
        """Drop one if too many wait: the newest in a room, or the oldest in none."""
        waiting = [m for m in self.members.values() if not m.peer]
        alike = [m for m in waiting if bool(m.room) == bool(member.room)]
        near = [m for m in alike if m.network == member.network]
        limits = self.options.per_address, self.options.waiting
        for crowd, limit in zip((near, alike), limits):
            if len(crowd) > limit:
                return self.drop(member if member.room else crowd[0], "full")

    def drop(self, member: Member, why: str = "") -> None:
        """Forget a member, and then its peer."""
        if self.members.pop(member.nonce[:8], None):
            if why:
                tell(member.sock, "no", why)
            if member.side == "far":
                self.far_until[member.room] = time.monotonic() + ANSWER_TIME
            self.selector.unregister(member.sock)
            member.sock.close()
            if member.peer:
                self.drop(member.peer, why if why == "relay" else "gone")

    def read(self, member: Member) -> None:
        """Act on what a member sends; drop it at its end, or at nonsense."""
        try:
            # A full buffer without a message is an end, too: recv(0) returns nothing.
            if not (data := member.sock.recv(LINE_LIMIT - len(member.buffer))):
                return self.drop(member)
            member.buffer += data
            # A message may have the member dropped.
            while member.nonce[:8] in self.members and (message := member.take()):
                self.obey(member, message)
        except (OSError, ValueError):
            self.drop(member)

    def obey(self, member: Member, message: bytes) -> None:
        """Act on one message; raise ValueError or OSError."""
        if message[:1] == b"\0":
            self.note(message[8:16], member.source)
            return member.sock.sendall(stun_answer(message, member.source)[0])
        word, *rest = message.decode("ascii").split()
        if [word, *rest] == ["natpunch", "1"]:
            others = [host for host, _ in member.places[2:3]]
            tell(member.sock, "natpunch", member.nonce.hex(), *others)
        elif word == "join" and len(rest) == 5 and not member.words:
            room, member.side, *member.words, proof = rest
            right = mac(self.options.key, member.nonce.hex(), word, *rest[:-1]).hex()
            if not hmac.compare_digest(right, proof):
                return self.drop(member, "key")
            self.join(member, room)
        elif word == "round" and len(rest) == 4 and member.peer:
            is_near = member.source[0] == member.peer.source[0]  # behind one NAT
            seen = member.source[0], member.port, *rest[2:] * is_near
            member.told, member.port = (*rest[:2], *seen), 0
            if member.peer.told:  # both now: a NAT may refuse what does not cross
                tell(member.sock, "peer", *member.peer.told)
                tell(member.peer.sock, "peer", *member.told)
                member.told = member.peer.told = ()
        elif [word, *rest] == ["relay"] and member.peer:
            self.relay(member, member.peer)
        else:
            raise ValueError("not a message")

    def join(self, member: Member, room: str) -> None:
        """Pair a member, or let it wait; a room without a far end is for one pair."""
        here = [m for m in self.members.values() if m.room == room]
        has_far = room in self.far_until or "far" in [m.side for m in (member, *here)]
        if not has_far and any(m.peer for m in here) or room in self.relays.values():
            return self.drop(member, "taken")
        keep_alive(member.sock)
        member.room, member.ends_at = room, time.monotonic() + WAIT_TIME
        for other in [m for m in here if not m.peer]:
            both = member.side, other.side  # while there is a far end, only it pairs
            if both == ("far", "far"):
                self.drop(other, "taken")  # its machine may have lost its power
            elif "far" in both or not has_far and both != ("call", "call"):
                return self.pair(other, member)
        self.make_room(member)

    def pair(self, one: Member, two: Member) -> None:
        """Tell two members of one another."""
        for role, (member, peer) in enumerate(((one, two), (two, one))):
            member.peer, member.ends_at = peer, time.monotonic() + PAIR_TIME
            tell(member.sock, "paired", role, *peer.words)

    def relay(self, one: Member, two: Member) -> None:
        """Join two members' connections in a process."""
        if self.options.no_relay or len(self.relays) >= self.options.relays:
            return self.drop(one, "relay")
        for member in (one, two):
            tell(member.sock, "relay")
        pid, socks = os.fork(), (one.sock, two.sock)
        if pid == 0:
            try:
                for key in self.selector.get_map().values():
                    if key.fileobj not in socks:
                        os.close(key.fd)  # or the server's close() would end nothing
                signal.setitimer(signal.ITIMER_REAL, min(self.options.relay_time, 1e9))
                carry(*[Pipe(sock, self.options.relay_bytes) for sock in socks])
            finally:
                os._exit(0)
        # A far end takes its next call meanwhile: its room does not count as taken.
        self.relays[pid] = "" if "far" in (one.side, two.side) else one.room
        one.peer = None  # or drop() would write "gone" into the relayed stream
        self.drop(one)
        self.drop(two)


# --- main ---------------------------------------------------------------------


def join(options: Any, meeting: Meeting, local: Any) -> None:
    """Find a way to the peer, then the target, and carry between; raise Failure."""
    sock, name = find_way(meeting)
    with trying(f"carry {'datagrams' if options.udp else 'the stream'}"):
        is_udp = sock.type == DGRAM  # the relay is TCP
        way = Datagrams(sock, meeting.peers) if is_udp else Channel(sock, meeting)
        with contextlib.closing(way):
            say(name)  # from here on, stop() makes closing() tell the peer
            if not options.udp:
                why = "plain: TLS needs Python 3.13 on both sides"
                say(f"the stream is {'encrypted' if meeting.tls else why}")
            if not local:
                with trying(f"connect to {spelled(options.to)}"):
                    local = socket.create_connection(options.to, ANSWER_TIME)
                local.setsockopt(*RESET)
            carry(way, Pipe(local) if isinstance(local, Socket) else local)


def run(work: Callable[..., object], *what: Any) -> int:
    """Do this work; return the exit code: 0, or that of a Failure."""
    try:
        work(*what)
    except Failure as failure:
        say(failure)
        return failure.code
    return 0


def join_all(options: Any) -> None:
    """Join one peer after another, each stream in a process; raise Failure."""
    at, listener, local = options.to or options.listen, socket.socket(), None
    with trying(f"use {spelled(at)}"):
        if options.udp:
            sock = socket.socket(family_of(at[0]), DGRAM)
            (sock.connect if options.to else sock.bind)(at)
            local = Datagrams(sock)
        elif options.listen:
            listener = socket.create_server(at, family=family_of(at[0]))
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    while True:
        with trying("take a client"):  # one at a time: others wait in the backlog
            client = None if options.udp or options.to else listener.accept()[0]
            if client:
                client.setsockopt(*RESET)  # the listener's own may come too late
        meeting = meet(options)
        try:
            with trying("start a process"):
                if local:
                    join(options, meeting, local)
                elif os.fork() == 0:
                    listener.close()
                    os._exit(run(join, options, meeting, client))
        except Failure as failure:
            if failure.why == REFUSALS["relay"]:
                raise
            say(f"{failure}; meeting again")
        for sock in filter(None, (client, meeting.sock)):
            sock.close()


def filtering(meeting: Meeting) -> str:
    """Return by what a NAT lets a datagram in: RFC 5780 section 4.4."""
    sock = bound(DGRAM, meeting.sock.family)  # a port that has sent nowhere else
    for flags, what in ((OTHER_HOST | OTHER_PORT, "nothing"), (OTHER_PORT, "address")):
        with contextlib.suppress(TimeoutError):
            ask_stun(sock, meeting.servers[0], meeting.nonce[:8], flags)
            return what
    return "address and port"


def tell_nat(options: Any) -> None:
    """Print which NAT this is."""
    with trying(f"ask {spelled(options.server)}"):
        for name, kind in (("udp", DGRAM), ("tcp", STREAM)):
            meeting = Meeting(options)
            listener = bound(kind, meeting.sock.family)
            seen = meeting.observe(listener)
            how = " ".join(map(str, behavior(seen))).removesuffix(" 0")
            ports = " ".join(map(spelled, seen)) or "nowhere"
            text = f"{name}: {how}, port {listener.getsockname()[1]} seen at {ports}"
            if kind == DGRAM and len(seen) > 2:
                text += f", filtered by {filtering(meeting)}"
            with trying("tell which NAT this is"):
                os.write(1, f"{text}\n".encode())


def be_client(options: Any) -> None:
    """Do as a client what the command line wants; raise Failure."""
    options.server = parse_address(options.server, PORT)
    options.key = secret_of("NATPUNCH_KEY", options.key, "")
    if options.room == "nat":
        if options.to or options.listen:
            raise Failure("use --to or --listen with nat", "it is not a room", 2)
        return tell_nat(options)
    options.secret = secret_of("NATPUNCH_SECRET", options.secret, "~/.natpunch")
    options.side = "far" if options.to else "call" if options.listen else "pipe"
    if options.udp and options.side == "pipe":
        raise Failure("use --udp", "it needs --to or --listen", 2)
    options.to = parse_address(options.to) if options.to else None
    if at := options.listen:
        options.listen = parse_address(at if ":" in at else f"127.0.0.1:{at}")
    if options.side == "pipe":
        return join(options, meet(options), Pipe())
    join_all(options)


def serve(options: Any) -> None:
    """Do as a server what the command line wants; raise Failure."""
    options.key = secret_of("NATPUNCH_KEY", options.key, "")
    options.addresses = [parse_address(text, PORT) for text in options.addresses]
    if len({port for _, port in options.addresses}) > 1:
        raise Failure("serve", "all addresses must have the same port", 2)
    for host, _ in options.addresses:
        with trying(f"serve {host}", 2, "it is not an address"):
            ipaddress.ip_address(host)
    Server(options).run()


def positive(text: str) -> float:
    """Return a number above 0; raise ValueError."""
    if not (number := float(text)) > 0:
        raise ValueError
    return number


def main() -> int:
    """Do what the command line wants; return the exit code."""
    # If descriptor 0, 1 or 2 is closed, a socket would take its number: open it.
    while (fd := os.open(os.devnull, os.O_RDWR)) < 3:
        pass
    os.close(fd)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # SIG_IGN is inherited
    serves = sys.argv[1:2] == ["serve"]
    parser = argparse.ArgumentParser("natpunch.py serve" if serves else "natpunch.py")
    parser.description = __doc__
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add("--version", action="version", version=f"natpunch {__version__}")
    add("--key", default="", metavar="FILE", help="of the server")
    if serves:
        add("addresses", nargs="*", default=["0.0.0.0"])
        add("--no-relay", action="store_true")
        add("--waiting", type=positive, default=256, metavar="N")  # to join, or to pair
        add("--per-address", type=positive, default=16, metavar="N")  # in one network
        add("--relays", type=positive, default=64, metavar="N")
        add("--relay-bytes", type=positive, default=1 << 40, metavar="N")  # each way
        add("--relay-time", type=positive, default=86400, metavar="N")
    else:
        add("-s", "--server", required=True)
        add("room", metavar="ROOM", help="or nat, to ask which it is")
        add("--secret", default="", metavar="FILE")
        end = parser.add_mutually_exclusive_group()
        end.add_argument("--to", metavar="HOST:PORT")
        end.add_argument("--listen", metavar="PORT")
        add("--udp", action="store_true")
        add("--wait", type=positive, default=FOREVER, metavar="SECONDS")
        add("--direct-only", action="store_true")
    options = parser.parse_args(sys.argv[1 + serves :])

    def stop(*_: object) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)  # a second one changes nothing
        sys.exit(0 if serves or options.to or options.listen else 130)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]  # for BIRTHDAYS and members
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    return run(serve if serves else be_client, options)


if __name__ == "__main__":
    sys.exit(main())
