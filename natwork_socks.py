"""SOCKS, a chapter of NATWork: TCP and UDP for a client that asks in a few bytes.

Version 5 is RFC 1928, with names and passwords by RFC 1929; version 4 and its
extension 4a have no standard but their authors' notes.  A client may ask for a
connection to a host (CONNECT), for one from a host (BIND), or for a relay of datagrams
(UDP ASSOCIATE).  The first two are answered with the outside address in use.  Tor's
RESOLVE and RESOLVE_PTR ask for a host's address or name, and connect to nothing.

It does not offer GSSAPI, which RFC 1928 section 3 asks for: no client needs it.
"""
# SPDX-License-Identifier: MIT

from __future__ import annotations

import contextlib
import errno
import io
import itertools
import os
import re
import select
import socket
import struct
import time
from collections.abc import Callable
from collections.abc import Iterable
from typing import Any

import natwork
from natwork import Refused

VERSION = "0.1.0"

UDP_PEERS = 8192  # peers, and hosts of peers, that may answer one association
FAILED_TIME = 9.0  # from a refusal to the close: at most ten by RFC 1928 section 6
WAY_TIME = 60.0  # to keep a Way: routes change, but a dead name server takes seconds
COMMANDS = {1: "CONNECT", 2: "BIND", 3: "ASSOCIATE", 240: "RESOLVE", 241: "RESOLVE_PTR"}
IPV4, NAME, IPV6 = 1, 3, 4  # address types: RFC 1928 section 5
NO_LOGIN, PASSWORD = 0, 2  # methods: RFC 1928 section 3
GRANTED, REJECTED = 90, 91  # version 4 has no other replies to give
NUL = re.compile(b"\0")  # ends a string in version 4
SocketAddress = tuple[Any, ...]  # (host, port), with IPv6 also flow and scope
Connection = tuple[natwork.Stream, SocketAddress]  # of a caller, and its address
Way = tuple[bytes, socket.socket]  # a host's address, and our socket on the way there


def parse_name(raw: bytes) -> str:
    """Return the host that a name stands for, in lower case; raise Refused."""
    # SOCKS writes an IPv6 address without the brackets that an authority needs.
    return natwork.parse_authority(b"[%b]" % raw if b":" in raw else raw, 1)[0]


def read_address(take: Callable[[int], bytes]) -> tuple[bytes, int]:
    """Return name and port, read by take(count); raise Refused or ValueError."""
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


def open_port(
    kind: int, where: SocketAddress, ports: Iterable[int], uplink: natwork.Uplink | None
) -> socket.socket:
    """Return a socket at the first free of some ports of an address; raise OSError."""
    family = natwork.INET6 if ":" in where[0] else natwork.INET
    for port in ports:
        sock = socket.socket(family, kind | socket.SOCK_NONBLOCK)
        try:
            if uplink and not uplink.packed:
                natwork.leave_by(sock, uplink)
            if kind == natwork.STREAM:  # the last connection may be in TIME_WAIT
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            else:  # for a burst; net.core.rmem_max cuts it
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
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


class Association:
    """A client's UDP association, RFC 1928 section 7: datagrams there and back.

    The client sends from the address of its control connection, from any port.  What
    a peer sends goes to the client's port that wrote last to that peer, or to its host.
    """

    def __init__(self, socks: Socks) -> None:
        """Open a port where the client has reached us; raise OSError."""
        self.socks, self.worker, self.session = socks, socks.worker, socks.session
        here = socks.client.sock.getsockname()
        self.inner = open_port(socket.SOCK_DGRAM, here, [0], None)
        # By peer, and by host (port 0): the port that wrote last.  The newest is last.
        self.writers: dict[tuple[bytes, int], SocketAddress] = {}
        self.way = natwork.remembered(WAY_TIME, self.find_way)
        self.refusal: Refused | None = None  # of the latest way that was refused

    def run(self) -> None:
        """Carry datagrams until the control connection ends; raise Refused."""
        self.worker.stand_in_line(False)
        control, seconds = self.socks.client, self.worker.config.idle_timeout
        ends_at = time.monotonic() + seconds
        while (left := ends_at - time.monotonic()) > 0:
            sockets = {s.fileno(): s for s in (self.inner, *self.socks.outer.values())}
            wanted = dict.fromkeys((control.fd, *sockets), natwork.POLLIN)
            ready = self.worker.watch.wait(wanted, left)
            has_sent = self.inner.fileno() in ready  # datagrams go out before we end
            if control.fd in ready and not has_sent and not control.fill():
                if self.refusal and self.session.target == "-":
                    raise self.refusal  # no datagram went out: this is why
                return
            control.received.clear()
            for fd in ready.keys() & sockets.keys():
                # What is malformed, unwanted or too long is dropped.
                with contextlib.suppress(OSError, Refused, ValueError):
                    self.pass_on(sockets[fd])
                    ends_at = time.monotonic() + seconds
        raise Refused(natwork.IDLE, "no datagram moved")

    def pass_on(self, sock: socket.socket) -> None:
        """Receive a datagram and send it, or raise why not."""
        data, sender = sock.recvfrom(natwork.COPY_SIZE)
        if sock is self.inner:
            self.session.up += self.send_out(io.BytesIO(data), sender)
        else:
            self.session.down += self.send_in(data, sender)
        self.worker.slot.moved(self.session.up, self.session.down)

    def send_out(self, message: io.BytesIO, sender: SocketAddress) -> int:
        """Send what the client wants sent; return its size, or raise why not."""
        if natwork.address_of(sender[0]) != natwork.address_of(self.worker.client.host):
            raise Refused(natwork.OUTSIDER, "not the client's address")
        if message.read(3) != bytes(3):
            raise Refused(natwork.BAD_REQUEST, "fragments are not reassembled")
        name, port = read_address(message.read)
        host, payload = parse_name(name), message.read()
        if not (way := self.way(host, port)):
            raise Refused(natwork.DENIED, "there is no way to it")
        packed, sock = way
        there = natwork.unpack(packed), port
        sock.sendto(payload, there)
        for peer in (packed, port), (packed, 0):  # hosts are forgotten after ports
            self.writers.pop(peer, None)
            self.writers[peer] = sender
        while len(self.writers) > UDP_PEERS:
            del self.writers[next(iter(self.writers))]
        if self.session.target == "-":
            self.session.target = natwork.endpoint((host, port))
            self.session.address = natwork.endpoint(there)
            self.session.source = natwork.endpoint(sock.getsockname())
            self.worker.proceed(self.session)
        return len(payload)

    def find_way(self, host: str, port: int) -> Way | None:
        """Return a host's address and our socket; None, and note why, if refused."""
        try:
            addresses = natwork.judged(self.worker, self.session, host, port)
            return self.socks.open_outside(addresses, port)
        except Refused as refusal:
            self.refusal = refusal
        return None

    def send_in(self, data: bytes, sender: SocketAddress) -> int:
        """Send the client what came for it; return its size, or raise Refused."""
        packed, port = natwork.address_of(sender[0]), sender[1]
        writer = self.writers.get((packed, port)) or self.writers.get((packed, 0))
        if not writer:
            if not self.worker.config.udp_from_anyone:
                raise Refused(natwork.OUTSIDER, "it was not written to")
            natwork.judged(self.worker, self.session, natwork.unpack(packed), port)
            *_, writer = self.writers.values()  # ValueError if the client has not sent
        self.inner.sendto(bytes(3) + write_address(sender) + data, writer)
        return len(data)

    def close(self) -> None:
        for sock in (self.inner, *self.socks.outer.values()):
            sock.close()


class Socks:
    """One client's SOCKS session, from the version's byte on."""

    def __init__(self, worker: natwork.Worker) -> None:
        """Take a worker whose client has sent its first byte."""
        self.worker, self.client = worker, worker.client.stream
        self.version = self.client.received[0]
        name, proto = worker.client.endpoint, f"socks{self.version}"
        self.session = natwork.Session(name, worker.pid_text, proto)
        self.session.outcome = natwork.ENDED
        self.users = worker.chapters.users if worker.config.users else None
        self.deadline = time.monotonic() + worker.config.head_timeout  # of the request
        # What refuse() sends: bytes, b"" for the reply of an outcome, None for nothing.
        self.owed = b"" if self.version == 4 else None  # version 5: after the methods
        self.wanted = 0  # the port that the client wants its datagrams to leave from
        self.outer: dict[str, socket.socket] = {}  # on the outside, by source address

    def serve(self) -> None:
        """Read a request and do what it asks for; raise Refused."""
        session = self.session
        command, name, port = self.ask4() if self.version == 4 else self.ask5()
        session.method = COMMANDS.get(command, "-")
        if session.method == "ASSOCIATE" and self.version == 5:
            self.wanted = port  # the host is ignored: the client sends from its own
            return self.associate()
        session.target = natwork.printable(name)
        host = parse_name(name)
        session.target = natwork.endpoint((host, port))
        if self.version == 4 and self.users:
            raise Refused(natwork.AUTH_REQUIRED, "version 4 has no passwords")
        self.worker.begin(session)
        if session.method.startswith("RESOLVE") and self.version == 5:
            return self.look_up(host, port)
        if session.method == "BIND":
            server, address = self.bind(host)
        elif session.method != "CONNECT":
            raise Refused(natwork.NOT_IMPLEMENTED, f"command {command}")
        elif not port:
            raise Refused(natwork.BAD_REQUEST, "port 0")
        else:
            server = natwork.dial(self.worker, session, host, port)
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
        return refusal.outcome

    def run(self, steps: natwork.Steps) -> bytes:
        """Return what steps take from the client; raise Refused, also if too late."""
        late = Refused(natwork.HEAD_TIMEOUT, "the request did not come to its end")
        taken: bytes = self.worker.hear(steps, late, self.deadline)
        return taken

    def take(self, count: int) -> bytes:
        return self.run(self.client.exactly(count))

    def take_text(self) -> bytes:
        """Take at most 255 bytes and the NUL after them; raise Refused."""
        return self.run(self.client.until(NUL, 256, natwork.BAD_REQUEST))[:-1]

    def ask4(self) -> tuple[int, bytes, int]:
        """Return command, name and port of a version 4 or 4a request; raise Refused."""
        command, port, packed = struct.unpack("!xBH4s", self.take(8))
        self.take_text()  # a user name that nothing proves
        if packed[:3] == bytes(3) and packed[3]:  # 4a: a name follows
            return command, self.take_text(), port
        return command, natwork.unpack(packed).encode(), port

    def ask5(self) -> tuple[int, bytes, int]:
        """Return command, name and port: RFC 1928 section 4; raise Refused."""
        self.log_in(self.take(self.take(2)[1]))
        self.owed = b""
        version, command, reserved = self.take(3)
        if version != 5 or reserved:
            raise Refused(natwork.BAD_REQUEST, "not a SOCKS request")
        return command, *read_address(self.take)

    def log_in(self, methods: bytes) -> None:
        """Agree on a method, and learn the user: RFC 1928 section 3; raise Refused."""
        # Without `users` any name will do: it is only a claim, and logged.
        method = PASSWORD if self.users or PASSWORD in methods else NO_LOGIN
        if method not in methods:
            self.owed = bytes([5, natwork.NO_METHOD.reply])
            self.session.status = str(natwork.NO_METHOD.reply)
            outcome = natwork.AUTH_REQUIRED if method else natwork.NO_METHOD
            raise Refused(outcome, f"method {method} is not offered")
        self.send(bytes([5, method]))
        if method == NO_LOGIN:
            return
        self.owed = b"\1\1"
        if self.take(1) != b"\1":  # RFC 1929
            raise Refused(natwork.BAD_REQUEST, "not a name and a password")
        name, password = (self.take(self.take(1)[0]) for _ in range(2))
        user = natwork.printable(name, natwork.NAME_SIZE)
        if self.users:
            user = self.users.authenticate(self.worker, name, password)
        self.session.user = user
        self.send(b"\1\0")

    def send(self, data: bytes) -> None:
        """Send a few bytes, for which a new connection has room; raise Refused."""
        self.worker.watch.send(self.client, data)

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

    def look_up(self, host: str, port: int) -> None:
        """Reply with an address of a host, or its name (Tor's commands); raise Refused.

        The host must be allowed at the port that was sent, or if it is 0, at some.
        """
        session, at = self.session, port or natwork.Rule.SOME_PORT
        allowed = natwork.judged(self.worker, session, host, at)
        # IPv4 first: the client cannot say which it wants.
        found = natwork.unpack(min(allowed, key=len))
        session.address = natwork.endpoint((found, port))
        reply = self.reply(natwork.OK, (found, 0))
        if session.method == "RESOLVE_PTR":
            named = socket.getnameinfo((found, 0), socket.NI_NAMEREQD)[0]
            name = parse_name(os.fsencode(named)).encode()
            reply = reply[:3] + b"%c%c%b\0\0" % (NAME, len(name), name)
        self.send(reply)
        self.owed, session.outcome = None, natwork.OK

    def open_outside(self, addresses: list[bytes], port: int) -> Way:
        """Return the first address that there is a way to, and a socket on that way.

        Addresses with the same source address share a socket.  Raises Refused.
        """
        worker, ways, failed = self.worker, [], []
        for attempt in natwork.ways_to(worker.policy, addresses, port, worker.board):
            family = natwork.INET if len(attempt.packed) == 4 else natwork.INET6
            try:
                with socket.socket(family, socket.SOCK_DGRAM) as probe:
                    if attempt.uplink:
                        natwork.leave_by(probe, attempt.uplink)
                    probe.connect(attempt.where())  # no packet is sent
                    ways.append((attempt, probe.getsockname()))
            except OSError as error:
                failed.append((error, attempt))
        kind = socket.SOCK_DGRAM if self.session.proto == "udp" else natwork.STREAM
        if kind == natwork.STREAM:
            # An FTP server calls the source address of the client's session with it.
            host_of, client = natwork.host_of, worker.client.host
            pairs = {(client, natwork.unpack(packed)) for packed in addresses}
            known = {
                host_of(session.source)
                for _, session in natwork.sessions(worker.board)
                if (host_of(session.client), host_of(session.address)) in pairs
            }
            ways = [way for way in ways if way[1][0] in known] or ways
        ports, lot = worker.policy.ports, int.from_bytes(os.urandom(4), "big")
        # Try the wanted port first, else one that nobody can guess.
        first = ports.index(self.wanted) if self.wanted in ports else lot % len(ports)
        for attempt, where in ways:
            try:
                if where[0] not in self.outer:
                    order = itertools.chain(ports[first:], ports[:first])
                    self.outer[where[0]] = open_port(kind, where, order, attempt.uplink)
                return attempt.packed, self.outer[where[0]]
            except OSError as error:
                failed.append((error, attempt))
        raise natwork.Race.defeat(failed)

    def bind(self, host: str) -> Connection:
        """Return a connection from a host: RFC 1928 section 4; raise Refused."""
        worker, session, anywhere = self.worker, self.session, natwork.Policy.ANYWHERE
        # The host may call from any port, and no rule with ports fits port 0.
        allowed = natwork.judged(worker, session, host, 0)
        expected = [one for one in allowed if self.version == 5 or len(one) == 4]
        there = [one if any(one) else anywhere[len(one)] for one in expected]
        _, listener = self.open_outside(there, 0)
        with listener:
            here = listener.getsockname()
            session.source = natwork.endpoint(here)
            self.send(self.reply(natwork.OK, here))
            worker.proceed(session)
            if there != expected:
                expected = []  # 0.0.0.0 or :: is anyone: await_call() judges callers
            server, address = self.await_call(listener, expected)
        session.address = natwork.endpoint(address)
        return server, address

    def await_call(self, listener: socket.socket, expected: list[bytes]) -> Connection:
        """Return the first call from an expected host, [] for anyone; raise Refused."""
        # The host may take as long to call as a server may take to answer.
        deadline = time.monotonic() + self.worker.config.idle_timeout
        # Not POLLIN: what the client sends before the call is for the host that calls.
        wanted = {listener.fileno(): natwork.POLLIN, self.client.fd: select.POLLRDHUP}
        while (left := deadline - time.monotonic()) > 0:
            ready = self.worker.watch.wait(wanted, left)
            if self.client.fd in ready:
                raise Refused(natwork.CLIENT_GONE, "closed before the call")
            with contextlib.suppress(BlockingIOError, ConnectionError):
                sock, address = listener.accept()
                with contextlib.suppress(Refused):
                    worker, session = self.worker, self.session
                    allowed = expected or natwork.judged(worker, session, address[0], 0)
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


def serve(worker: natwork.Worker) -> None:
    """Serve a client whose first byte, 4 or 5, has been received."""
    socks = Socks(worker)
    worker.record(socks.session, socks.serve, socks.refuse)
    if socks.owed is not None:  # refused: the reply may still be on its way
        with worker.yielding():
            natwork.linger(worker.watch, socks.client, FAILED_TIME)


def join(chapters: natwork.Chapters) -> None:
    """Serve SOCKS clients from now on."""
    chapters.socks = serve
