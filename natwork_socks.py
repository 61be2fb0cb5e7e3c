"""SOCKS, a chapter of NATWork: TCP and UDP for a client that asks in a few bytes.

Version 5 is RFC 1928, with names and passwords by RFC 1929; version 4 and its
extension 4a have no standard but their authors' notes.  A client may ask for a
connection to a host (CONNECT), for one from a host (BIND), or for a relay of datagrams
(UDP ASSOCIATE).  Each is answered with the outside address that it happens from.

It does not offer GSSAPI, which RFC 1928 section 3 asks for: no client needs it.
"""
# SPDX-License-Identifier: MIT

from __future__ import annotations

import contextlib
import errno
import io
import os
import re
import select
import socket
import struct
import time
from collections.abc import Callable
from typing import Any

import natwork
from natwork import Refused
from natwork import Worker

VERSION = "0.1.0"

UDP_PEERS = 8192  # peers that may answer one association, and their hosts
WAY_TIME = 60.0  # routes change; and a dead name server delays us once a minute
COMMANDS = {1: "CONNECT", 2: "BIND", 3: "ASSOCIATE"}
IPV4, NAME, IPV6 = 1, 3, 4  # address types: RFC 1928 section 5
NO_LOGIN, PASSWORD = 0, 2  # methods: RFC 1928 section 3
GRANTED, REJECTED = 90, 91  # version 4 has no other replies to give
NUL = re.compile(b"\0")  # ends a string in version 4
ANY_PORT = range(1)  # port 0: the kernel chooses
SocketAddress = tuple[Any, ...]  # (host, port), and flow and scope with IPv6
Connection = tuple[natwork.Stream, SocketAddress]  # and the address to reply
Way = tuple[bytes, socket.socket]  # an address, and a socket of ours to use with it


def parse_name(raw: bytes) -> str:
    """Return the host that a name stands for, in lower case; raise Refused."""
    # It may be an address; and if that is one of IPv6, it has no brackets.
    return natwork.parse_authority(b"[%b]" % raw if b":" in raw else raw, 1)[0]


def read_address(take: Callable[[int], bytes]) -> tuple[bytes, int]:
    """Return name and port of an address, by what take(count) returns; raise Refused.

    RFC 1928 section 5.  Raises ValueError if take() returns too few.
    """
    (kind,) = take(1)
    if kind == NAME:
        (size,) = take(1)
        name = take(size)
    elif kind in (IPV4, IPV6):
        name = natwork.unpack(take(4 * kind)).encode()
    else:
        raise Refused(natwork.BAD_ADDRESS, f"address type {kind}")
    high, low = take(2)
    return name, high << 8 | low


def write_address(address: SocketAddress) -> bytes:
    """Return a socket's address as version 5 writes it."""
    packed = natwork.address_of(address[0])
    return struct.pack("!B%dsH" % len(packed), len(packed) // 4, packed, address[1])


def parse_datagram(data: bytes) -> tuple[str, int, bytes]:
    """Return host, port and payload: RFC 1928 section 7; raise as read_address()."""
    message = io.BytesIO(data)
    if message.read(3) != bytes(3):
        raise Refused(natwork.BAD_REQUEST, "fragments are not reassembled")
    name, port = read_address(message.read)
    return parse_name(name), port, message.read()


def open_port(
    kind: int, where: SocketAddress, ports: range, uplink: natwork.Uplink | None = None
) -> socket.socket:
    """Return a socket at one of some ports of an address; raise OSError."""
    family = natwork.INET6 if ":" in where[0] else natwork.INET
    # The first to be tried is not to be guessed, nor contended for.
    first = int.from_bytes(os.urandom(4), "big") % len(ports)
    for port in (*ports[first:], *ports[:first]):
        sock = socket.socket(family, kind | socket.SOCK_NONBLOCK)
        try:
            if uplink and not uplink.packed:
                natwork.leave_by(sock, uplink)
            # The last connection from a port may be in TIME_WAIT.
            reuse = kind == natwork.STREAM
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, reuse)
            sock.bind((where[0], port, *where[2:]))
            if kind == natwork.STREAM:
                sock.listen(8)  # one call is expected
            return sock
        except OSError as error:
            sock.close()
            failure = error
            if error.errno != errno.EADDRINUSE:
                break
    raise failure


def open_outside(
    socks: Socks, addresses: list[bytes], port: int, opened: dict[str, socket.socket]
) -> Way:
    """Return the first address that there is a way to, and a socket on that way.

    It is one of those opened, by source address, or a new one.  Raises Refused.
    """
    worker, ways, failed = socks.worker, [], []
    for attempt in natwork.ways_to(worker.policy, addresses, port, worker.board):
        family = natwork.INET if len(attempt.packed) == 4 else natwork.INET6
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            try:
                if attempt.uplink:
                    natwork.leave_by(probe, attempt.uplink)
                probe.connect(attempt.where())  # no packet is sent
                ways.append((attempt, probe.getsockname()))
            except OSError as error:
                failed.append((error, attempt))
    kind = socket.SOCK_DGRAM if socks.session.proto == "udp" else natwork.STREAM
    if kind == natwork.STREAM:
        # An FTP server calls back to the address of the control connection, no other.
        name, host = natwork.host_of, worker.client.host
        pairs = {(host, natwork.unpack(packed)) for packed in addresses}
        known = {
            name(session.source)
            for _, session in natwork.sessions(worker.board)
            if (name(session.client), name(session.address)) in pairs
        }
        ways = [way for way in ways if way[1][0] in known] or ways
    for attempt, where in ways:
        try:
            if where[0] not in opened:
                opened[where[0]] = open_port(kind, where, socks.ports, attempt.uplink)
            return attempt.packed, opened[where[0]]
        except OSError as error:
            failed.append((error, attempt))
    raise natwork.defeat(failed)


class Association:
    """A client's UDP association, RFC 1928 section 7: datagrams there and back.

    They come from the address of the client's control connection, from any port.
    A peer's answers go to the port that wrote to it last, or at least to its host.
    """

    def __init__(self, socks: Socks) -> None:
        """Open a port where the client has reached us; raise OSError."""
        self.socks, self.worker, self.session = socks, socks.worker, socks.session
        here = socks.client.sock.getsockname()
        self.inner = open_port(socket.SOCK_DGRAM, here, ANY_PORT)
        self.outer: dict[str, socket.socket] = {}  # by source address
        self.client_at: SocketAddress = ()  # where its latest datagram came from
        # The same by peer, and by host with port 0; the latest is the last.
        self.writers: dict[tuple[bytes, int], SocketAddress] = {}
        self.way = natwork.remembered(WAY_TIME, self.find_way)
        self.refusal: Refused | None = None  # of the latest refused datagram
        # Monotonic; what is dropped does not put it off.
        self.ends_at = time.monotonic() + self.worker.config.idle_timeout

    def run(self) -> None:
        """Carry datagrams until the control connection ends; raise Refused."""
        control = self.socks.client
        while (left := self.ends_at - time.monotonic()) > 0:
            sockets = {s.fileno(): s for s in (self.inner, *self.outer.values())}
            wanted = dict.fromkeys((control.fd, *sockets), natwork.POLLIN)
            ready = self.worker.watch.wait(wanted, left)
            if control.fd in ready and not control.fill():
                if self.refusal and self.session.target == "-":
                    raise self.refusal  # no datagram went out: this is why
                return
            control.received.clear()
            for fd in ready.keys() & sockets.keys():
                # What is malformed, unwanted or too long is dropped.
                with contextlib.suppress(OSError, Refused, ValueError):
                    self.pass_on(sockets[fd])
        raise Refused(natwork.IDLE, "no datagram moved")

    def pass_on(self, sock: socket.socket) -> None:
        """Receive a datagram and send it, or raise why not."""
        data, sender = sock.recvfrom(natwork.COPY_SIZE)
        if sock is self.inner:
            self.session.up += self.send_out(data, sender)
        else:
            self.session.down += self.send_in(data, sender)
        self.worker.slot.moved(self.session.up, self.session.down)
        self.ends_at = time.monotonic() + self.worker.config.idle_timeout

    def send_out(self, data: bytes, sender: SocketAddress) -> int:
        """Send what the client wants sent; return its size, or raise Refused."""
        if natwork.address_of(sender[0]) != natwork.address_of(self.worker.client.host):
            raise Refused(natwork.OUTSIDER, "not the client's address")
        host, port, payload = parse_datagram(data)
        self.client_at = sender
        way = self.way(host, port)
        if isinstance(way, Refused):
            self.refusal = way
            raise way
        packed, sock = way
        there = natwork.unpack(packed), port
        sock.sendto(payload, there)
        for peer in (packed, port), (packed, 0):  # a host goes after its ports
            self.writers.pop(peer, None)
            self.writers[peer] = sender
        while len(self.writers) > UDP_PEERS:
            del self.writers[next(iter(self.writers))]
        session = self.session
        if session.target == "-":
            session.target = natwork.endpoint((host, port))
            session.address = natwork.endpoint(there)
            session.source = natwork.endpoint(sock.getsockname())
            self.worker.proceed(session)
        return len(payload)

    def find_way(self, host: str, port: int) -> Way | Refused:
        """Return a host's address and the socket to use, or why it may not be used."""
        try:
            addresses = self.socks.consult(natwork.judged, host, port)
            return open_outside(self.socks, addresses, port, self.outer)
        except Refused as refusal:
            return refusal

    def send_in(self, data: bytes, sender: SocketAddress) -> int:
        """Send the client what came for it; return its size, or raise Refused."""
        packed, port = natwork.address_of(sender[0]), sender[1]
        writer = self.writers.get((packed, port)) or self.writers.get((packed, 0))
        if not writer:
            if not self.worker.config.udp_from_anyone:
                raise Refused(natwork.OUTSIDER, "it was not written to")
            self.socks.consult(natwork.judged, natwork.unpack(packed), port)
            writer = self.client_at  # it has written: that opened the socket
        self.inner.sendto(bytes(3) + write_address(sender) + data, writer)
        return len(data)

    def close(self) -> None:
        for sock in (self.inner, *self.outer.values()):
            sock.close()


class Socks:
    """One client's SOCKS session, from the version's byte on."""

    def __init__(self, ports: range, worker: Worker) -> None:
        """Take a worker whose client has sent its first byte; ports: bind_ports."""
        self.ports, self.worker, self.client = ports, worker, worker.client.stream
        self.version = self.client.received[0]
        name, proto = worker.client.endpoint, f"socks{self.version}"
        self.session = natwork.Session(name, worker.pid_text, proto)
        self.session.outcome = natwork.ENDED
        users = worker.chapters.users
        self.users = users if users and users.required else None  # None: all may ask
        self.deadline = time.monotonic() + worker.config.head_timeout  # of the request
        # What a refusal has to say, b"" for its reply, None for nothing.
        self.owed = b"" if self.version == 4 else None  # in 5 a method comes first
        self.lingers = False  # the client may not have its last bytes yet

    def serve(self) -> None:
        """Read a request and do what it asks for; raise Refused."""
        session = self.session
        command, name, port = self.ask4() if self.version == 4 else self.ask5()
        session.method = COMMANDS.get(command, "-")
        if session.method == "ASSOCIATE" and self.version == 5:
            return self.associate()  # its address is where the client may send from
        session.target = natwork.printable(name)
        host = parse_name(name)
        session.target = natwork.endpoint((host, port))
        if self.version == 4 and self.users:
            raise Refused(natwork.AUTH_REQUIRED, "version 4 has no passwords")
        self.worker.begin(session)
        if session.method == "BIND":
            server, address = self.bind(host)
        elif session.method != "CONNECT":
            raise Refused(natwork.NOT_IMPLEMENTED, f"command {command}")
        elif not port:
            raise Refused(natwork.BAD_REQUEST, "port 0")
        else:
            server = self.consult(natwork.dial, host, port)
            address = server.sock.getsockname()
        opening = self.reply(natwork.OK, address)
        self.worker.proceed(session)
        self.owed = None
        natwork.tunnel(self.worker, session, server, opening)

    def refuse(self, refusal: Refused) -> natwork.Outcome:
        """Tell the client, if it waits for an answer; return the outcome."""
        if self.owed is not None:
            with contextlib.suppress(Refused):
                self.send(self.owed or self.reply(refusal.outcome, ("0.0.0.0", 0)))
                self.lingers = True
        return refusal.outcome

    def run(self, steps: natwork.Steps) -> bytes:
        """Return what steps take off the client; raise Refused, also if it is late."""
        late, why = natwork.HEAD_TIMEOUT, "the request did not come to its end"
        taken: bytes = self.worker.watch.run(steps, late, why, deadline=self.deadline)
        return taken

    def take(self, count: int) -> bytes:
        return self.run(self.client.exactly(count))

    def take_text(self) -> bytes:
        """Take at most 255 bytes and the NUL after them; raise Refused."""
        steps = natwork.read_until(self.client, NUL, 256, natwork.BAD_REQUEST)
        return self.run(steps)[:-1]

    def ask4(self) -> tuple[int, bytes, int]:
        """Return command, name and port of a version 4 or 4a request; raise Refused."""
        command, port, packed = struct.unpack("!xBH4s", self.take(8))
        self.take_text()  # a user name that nothing proves
        if packed[:3] == bytes(3) and packed[3]:  # 4a: a name follows
            return command, self.take_text(), port
        return command, natwork.unpack(packed).encode(), port

    def ask5(self) -> tuple[int, bytes, int]:
        """Return command, name and port: RFC 1928 section 4; raise Refused."""
        self.choose_method(self.take(self.take(2)[1]))
        self.owed = b""
        version, command, reserved = self.take(3)
        if version != 5 or reserved:
            raise Refused(natwork.BAD_REQUEST, "not a SOCKS request")
        return command, *read_address(self.take)

    def choose_method(self, methods: bytes) -> None:
        """Agree on a way to log in: RFC 1928 section 3; raise Refused."""
        # Without `users` each name is right: a claim, for the log.
        method = PASSWORD if self.users or PASSWORD in methods else NO_LOGIN
        if method not in methods:
            self.owed = bytes([5, natwork.NO_METHOD.reply])
            self.session.status = str(natwork.NO_METHOD.reply)
            outcome = natwork.AUTH_REQUIRED if method else natwork.NO_METHOD
            raise Refused(outcome, f"method {method} is not offered")
        self.send(bytes([5, method]))
        if method == PASSWORD:
            self.log_in()

    def log_in(self) -> None:
        """Learn the user by name and password: RFC 1929; raise Refused."""
        self.owed = b"\1\1"
        if self.take(1) != b"\1":
            raise Refused(natwork.BAD_REQUEST, "not a name and a password")
        name, password = (self.take(self.take(1)[0]) for _ in range(2))
        user = natwork.printable(name, natwork.NAME_SIZE)
        if self.users:
            user = self.users.authenticate(self.worker, name, password)
        self.session.user = user
        self.send(b"\1\0")

    def consult(self, ask: Callable[..., Any], host: str, port: int) -> Any:
        """Return what judged() or dial() does, by rules that see no claimed name."""
        session, user = self.session, self.session.user
        session.user = user if self.users else "-"
        try:
            return ask(self.worker, session, host, port)
        finally:
            session.user = user

    def send(self, data: bytes) -> None:
        """Send a few bytes, for which a new connection has room; raise Refused."""
        watch, seconds = self.worker.watch, self.worker.config.head_timeout
        watch.send(self.client, data, "the client takes no reply", seconds)
        self.session.down += self.client.counted()

    def reply(self, outcome: natwork.Outcome, address: SocketAddress) -> bytes:
        """Return the reply for an outcome, with an address: RFC 1928 section 6."""
        if self.version == 5:
            self.session.status = str(outcome.reply)
            return bytes([5, outcome.reply, 0]) + write_address(address)
        code = REJECTED if outcome.reply else GRANTED
        self.session.status = str(code)
        packed = natwork.address_of(address[0])
        packed = packed if len(packed) == 4 else bytes(4)  # no room for IPv6
        return struct.pack("!BBH4s", 0, code, address[1], packed)

    def bind(self, host: str) -> Connection:
        """Return a connection from a host: RFC 1928 section 4; raise Refused."""
        worker, session = self.worker, self.session
        # It may call from any port, so rules with ports do not speak of it.
        allowed = self.consult(natwork.judged, host, 0)
        expected = [one for one in allowed if self.version == 5 or len(one) == 4]
        there = [
            one if any(one) else natwork.Policy.ANYWHERE[len(one)] for one in expected
        ]
        _, listener = open_outside(self, there, 0, {})
        with listener:
            here = listener.getsockname()
            session.source = natwork.endpoint(here)
            self.send(self.reply(natwork.OK, here))
            worker.proceed(session)
            if there != expected:
                expected = []  # anyone, as the rules judge each that calls
            server, address = self.await_call(listener, expected)
        session.address = natwork.endpoint(address)
        return server, address

    def await_call(self, listener: socket.socket, expected: list[bytes]) -> Connection:
        """Return the first connection from an expected host; raise Refused."""
        # It may take as long to call as a server may take to answer.
        deadline = time.monotonic() + self.worker.config.idle_timeout
        # Not POLLIN: what the client says already is for the host.
        wanted = {listener.fileno(): natwork.POLLIN, self.client.fd: select.POLLRDHUP}
        while (left := deadline - time.monotonic()) > 0:
            ready = self.worker.watch.wait(wanted, left)
            if self.client.fd in ready:
                raise Refused(natwork.CLIENT_GONE, "closed before the call")
            with contextlib.suppress(BlockingIOError, ConnectionError):
                sock, address = listener.accept()
                with contextlib.suppress(Refused):
                    allowed = expected or self.consult(natwork.judged, address[0], 0)
                    if natwork.address_of(address[0]) in allowed:
                        sock.setblocking(False)
                        return natwork.Stream(sock, natwork.SERVER_GONE), address
                sock.close()
        raise Refused(natwork.NOBODY_CALLED, "the expected host did not call")

    def associate(self) -> None:
        """Relay the client's datagrams; raise Refused."""
        self.session.proto = "udp"
        self.worker.begin(self.session)
        with contextlib.closing(Association(self)) as association:
            self.send(self.reply(natwork.OK, association.inner.getsockname()))
            self.worker.proceed(self.session)
            self.owed = None
            association.run()


def serve(ports: range, worker: Worker) -> None:
    """Serve a client whose first byte, 4 or 5, has been received."""
    socks = Socks(ports, worker)
    worker.record(socks.session, socks.serve, socks.refuse)
    if socks.lingers:
        natwork.linger(worker.watch, socks.client)


def join(chapters: natwork.Chapters) -> None:
    """Serve SOCKS clients from now on; raise ConfigError for bad bind_ports."""
    config = chapters.config
    text = config.bind_ports
    words = [] if text == "0" else [text]
    found = config.parsed("bind_ports", natwork.parse_ports, words)
    ports = found[0] if found else ANY_PORT
    chapters.socks = lambda worker: serve(ports, worker)
