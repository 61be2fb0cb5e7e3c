"""SOCKS, a chapter of NATWork: what a client asks for in a few bytes.

Versions 4, 4a and 5 ask for the same three things: a connection to a host, a
connection from one (BIND), and a relay for datagrams (UDP ASSOCIATE).  Each is
answered with the address it happens from, outside, and what fails with a reply
and the end.  GSSAPI, which RFC 1928 section 3 asks for, is not offered: nobody
speaks it.
"""
# SPDX-License-Identifier: MIT

from __future__ import annotations

import contextlib
import errno
import io
import os
import select
import socket
import struct
import time
from collections.abc import Callable
from typing import Any

from natwork import AUTH_REQUIRED
from natwork import BAD_ADDRESS
from natwork import BAD_REQUEST
from natwork import BROKEN
from natwork import CLIENT_GONE
from natwork import COPY_SIZE
from natwork import ENDED
from natwork import HEAD_TIMEOUT
from natwork import IDLE
from natwork import INET
from natwork import INET6
from natwork import NO_METHOD
from natwork import NOBODY_CALLED
from natwork import NOT_IMPLEMENTED
from natwork import OK
from natwork import OUTSIDER
from natwork import POLLIN
from natwork import SERVER_GONE
from natwork import STREAM
from natwork import TARGET_SIZE
from natwork import Chapters
from natwork import Config
from natwork import Outcome
from natwork import Policy
from natwork import Race
from natwork import Refused
from natwork import Scoreboard
from natwork import Session
from natwork import Stream
from natwork import Uplink
from natwork import Worker
from natwork import address_of
from natwork import anonymous
from natwork import dial
from natwork import endpoint
from natwork import host_of
from natwork import judged
from natwork import leave_by
from natwork import linger
from natwork import outcome_of
from natwork import parse_authority
from natwork import printable
from natwork import reason
from natwork import remembered
from natwork import sessions
from natwork import tunnel
from natwork import unpack
from natwork import ways

VERSION = "0.1.0"

UDP_HOSTS = 4096  # hosts that may answer one UDP association
COMMANDS = {1: "CONNECT", 2: "BIND", 3: "ASSOCIATE"}
GRANTED, REJECTED = 90, 91  # version 4 tells no more than that
SocketAddress = tuple[Any, ...]  # (host, port), and flow and scope with IPv6
Sockets = dict[str, socket.socket]  # by the host of their own address


def parse_name(raw: bytes) -> str:
    """Return the host that a name stands for, lower case; raise Refused."""
    # A port has no place in it, and an IPv6 address in it no brackets.
    return parse_authority(b"[%b]" % raw if b":" in raw else raw, 1)[0]


def read_address(
    take: Callable[[int], bytes], name: Callable[[bytes], str] = parse_name
) -> tuple[str, int]:
    """Return host and port as version 5 writes them: RFC 1928 section 5.

    take(count) returns the next bytes, name() the host of a name.  Raises Refused,
    and ValueError or struct.error where they end too early.
    """
    (kind,) = struct.unpack("!B", take(1))
    if kind == 3:
        host = name(take(*struct.unpack("!B", take(1))))
    elif kind in (1, 4):
        host = unpack(take(4 * kind))
    else:
        raise Refused(BAD_ADDRESS, f"address type {kind}")
    (port,) = struct.unpack("!H", take(2))
    return host, port


def write_address(address: SocketAddress) -> bytes:
    """Return an address and port as version 5 writes them."""
    packed = address_of(address[0])
    return struct.pack("!B%dsH" % len(packed), len(packed) // 4, packed, address[1])


def parse_datagram(data: bytes) -> tuple[str, int, bytes]:
    """Return host, port and payload of a client's datagram; raise Refused."""
    message = io.BytesIO(data)
    # RFC 1928 section 7: who does not put fragments together drops them.
    if message.read(3) != bytes(3):
        raise Refused(BAD_REQUEST, "a fragment, or no SOCKS datagram")
    try:
        return *read_address(message.read), message.read()
    except (ValueError, struct.error):
        raise Refused(BAD_REQUEST, "a datagram that is cut short") from None


def open_port(
    kind: int, where: SocketAddress, uplink: Uplink | None, ports: range
) -> socket.socket:
    """Return a socket at one of some ports, listening if of streams; raise OSError."""
    family = INET6 if ":" in where[0] else INET
    first = int.from_bytes(os.urandom(4), "big")  # not to be guessed, nor contended
    for number in range(len(ports)):
        port = ports[(first + number) % len(ports)]
        sock = socket.socket(family, kind | socket.SOCK_NONBLOCK)
        try:
            if uplink and not uplink.packed:
                leave_by(sock, uplink)
            if kind == STREAM:  # what is left of the port's last use is no use
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind((where[0], port, *where[2:]))
            if kind == STREAM:
                sock.listen(8)
            return sock
        except OSError as error:
            sock.close()
            if error.errno != errno.EADDRINUSE:
                raise
    raise OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE))


def known_source(board: Scoreboard, peer: str, addresses: list[bytes]) -> str:
    """Return from where a client already talks to one of some addresses, or ""."""
    hosts, last, known = {unpack(packed) for packed in addresses}, 0.0, ""
    for _, session in sessions(board):
        if host_of(session.client) == peer and host_of(session.address) in hosts:
            if session.began >= last:
                last, known = session.began, host_of(session.source)
    return known


def open_outside(
    socks: Socks, kind: int, addresses: list[bytes], port: int, opened: Sockets
) -> tuple[bytes, socket.socket]:
    """Return the first address that there is a way to, and a socket on that way.

    That is one that is open already at that source address, or a new one at a
    port of bind_ports.  Raises Refused.
    """
    board, policy = socks.worker.board, socks.policy
    race = Race(socks.watch, board)
    attempts, known = ways(policy, addresses, port, board), ""
    if kind == STREAM and len(attempts) > 1:
        # He who is to call back knows the client by the address of another session.
        known = known_source(board, socks.worker.peer, addresses)
    if known:
        attempts.sort(key=lambda attempt: attempt.leaves_from() != known)
    for attempt in attempts:
        try:
            where = attempt.source()
            if where[0] not in opened:
                sock = open_port(kind, where, attempt.uplink, policy.bind_ports)
                opened[where[0]] = sock
            return attempt.packed, opened[where[0]]
        except OSError as error:
            race.fail(attempt, error)
            if known and error.errno == errno.EADDRINUSE:
                break  # the port is wanted at this address, not at another
    raise race.defeat()


class Association:
    """A client's UDP association, RFC 1928 section 7: datagrams there and back.

    The client is who has the control connection's address, at the port he wrote
    from first.
    """

    def __init__(self, socks: Socks) -> None:
        """Open the relay port where the client has reached us; raise OSError."""
        self.socks, self.worker, self.config = socks, socks.worker, socks.config
        self.session, self.client = socks.session, socks.client
        host, *others = self.client.sock.getsockname()
        packed = address_of(host)  # a socket of both families has it mapped
        where = unpack(packed), *(others if len(packed) == 16 else (0,))
        self.inner = open_port(socket.SOCK_DGRAM, where, None, range(1))
        self.outer: Sockets = {}
        self.client_at: SocketAddress | None = None
        self.hosts: dict[bytes, None] = {}  # he wrote to, the latest last
        # Routes change; and a dead name server stops us but once a minute.
        self.way = remembered(60.0, self.find_way)
        self.refusal: Refused | None = None  # of a datagram, by rules or resolver

    def run(self) -> None:
        """Carry datagrams until the control connection ends; raise Refused."""
        deadline = time.monotonic() + self.config.idle_timeout
        while (left := deadline - time.monotonic()) > 0:
            sockets = {s.fileno(): s for s in (self.inner, *self.outer.values())}
            wanted = dict.fromkeys((self.client.fd, *sockets), POLLIN)
            ready = self.worker.watch.wait(wanted, left)
            if self.client.fd in ready and not self.client.fill():
                if self.refusal and self.session.target == "-":
                    raise self.refusal  # no datagram went out: this is why
                return
            self.client.received.clear()
            for fd in ready:
                if fd in sockets and self.pass_on(sockets[fd]):
                    deadline = time.monotonic() + self.config.idle_timeout
        raise Refused(IDLE, "no datagram moved")

    def close(self) -> None:
        for sock in (self.inner, *self.outer.values()):
            sock.close()

    def pass_on(self, sock: socket.socket) -> bool:
        """Receive and send one datagram; return False if it was dropped.

        That is what becomes of all that is unwanted, unroutable or too long.
        """
        session = self.session
        try:
            data, sender = sock.recvfrom(COPY_SIZE)
            if sock is self.inner:
                session.up += self.send_out(data, sender)
            else:
                session.down += self.send_in(data, sender)
        except (OSError, Refused):
            return False
        self.worker.slot.moved(session.up, session.down)
        return True

    def send_out(self, data: bytes, sender: SocketAddress) -> int:
        """Send what the client wants sent; return its size, or raise Refused."""
        if address_of(sender[0]) != address_of(self.worker.peer):
            raise Refused(OUTSIDER, "not the client's address")
        if self.client_at and self.client_at[1] != sender[1]:
            raise Refused(OUTSIDER, "not the client's first port")
        host, port, payload = parse_datagram(data)
        self.client_at = sender
        way = self.way(host, port)
        if isinstance(way, Refused):
            self.refusal = way
            raise way
        packed, sock = way
        sock.sendto(payload, (unpack(packed), port))
        self.hosts.pop(packed, None)
        self.hosts[packed] = None
        if len(self.hosts) > UDP_HOSTS:
            del self.hosts[next(iter(self.hosts))]
        if self.session.target == "-":
            self.session.target = printable(
                endpoint((host, port)).encode(), TARGET_SIZE
            )
            self.session.address = endpoint((unpack(packed), port))
            self.session.source = endpoint(sock.getsockname())
            self.worker.proceed(self.session)
        return len(payload)

    def find_way(self, host: str, port: int) -> tuple[bytes, socket.socket] | Refused:
        """Return a host's address and the socket to use, or why it may not be used."""
        policy, kind = self.socks.policy, socket.SOCK_DGRAM
        try:
            addresses = judged(self.worker, policy, self.session, host, port)
            return open_outside(self.socks, kind, addresses, port, self.outer)
        except Refused as refusal:
            return refusal

    def send_in(self, data: bytes, sender: SocketAddress) -> int:
        """Send the client what came for him; return its size, or raise Refused."""
        packed = address_of(sender[0])
        if packed not in self.hosts and not self.welcomes(packed, sender[1]):
            raise Refused(OUTSIDER, "a host that the client has not written to")
        assert self.client_at  # who opened the socket has written from there
        self.inner.sendto(bytes(3) + write_address(sender) + data, self.client_at)
        return len(data)

    def welcomes(self, packed: bytes, port: int) -> bool:
        """Return whether a host may write to the client first."""
        policy, who, user = self.socks.policy, self.worker.peer, self.session.user
        return (
            self.config.udp_from_anyone
            and policy.judge(who, user, unpack(packed), port, packed)[0] is OK
        )


class Socks:
    """One client's SOCKS session, from the version's byte on."""

    def __init__(self, worker: Worker, policy: Policy, client: Stream) -> None:
        """Take a client whose first byte has been received."""
        self.worker, self.config, self.watch = worker, worker.config, worker.watch
        self.policy, self.client = policy, client
        self.version = client.received[0]
        self.session = Session(worker.name, worker.word, f"socks{self.version}")
        self.owes_reply = self.version == 4  # in 5 a choice of method comes first
        self.deadline = time.monotonic() + self.config.head_timeout

    def serve(self) -> None:
        """Do what is asked for, whatever becomes of it, and write it down."""
        outcome = BROKEN
        try:
            self.obey(*(self.ask4() if self.version == 4 else self.ask5()))
            outcome = ENDED
        except Refused as refusal:
            outcome = refusal.outcome
            self.refuse(outcome)
        except OSError as error:
            outcome = outcome_of(error)
            self.refuse(outcome)
        finally:
            self.worker.finish(self.session, outcome.word)

    # What is asked.

    def take(self, count: int) -> bytes:
        """Take count bytes off the client; raise Refused if they do not come."""
        while len(self.client.received) < count:
            self.receive()
        return self.client.take(count)

    def take_text(self) -> bytes:
        """Take the bytes before a NUL, and the NUL; raise Refused."""
        while (end := self.client.received.find(0, 0, 256)) < 0:
            if len(self.client.received) > 255:
                raise Refused(BAD_REQUEST, "a name of over 255 bytes")
            self.receive()
        return self.client.take(end + 1)[:-1]

    def receive(self) -> None:
        left = self.deadline - time.monotonic()
        if not self.watch.wait({self.client.fd: POLLIN}, left):
            raise Refused(HEAD_TIMEOUT, "the request did not come to its end")
        if not self.client.fill():
            raise Refused(CLIENT_GONE, "closed inside the request")

    def ask4(self) -> tuple[int, str, int]:
        """Return command, host and port of a version 4 or 4a request."""
        command, port, packed = struct.unpack("!xBH4s", self.take(8))
        self.take_text()  # a user id that nobody vouches for
        if packed[:3] == bytes(3) and packed[3]:  # 4a: a name comes behind it
            return command, self.name(self.take_text()), port
        return command, unpack(packed), port

    def ask5(self) -> tuple[int, str, int]:
        """Return command, host and port of a version 5 request: RFC 1928."""
        self.choose_method(self.take(self.take(2)[1]))
        self.owes_reply = True
        version, command, reserved = self.take(3)
        if version != 5 or reserved:
            raise Refused(BAD_REQUEST, "this is no SOCKS request")
        # Where an ASSOCIATE says it will send from is no target, and may be anything.
        return command, *read_address(
            self.take, printable if command == 3 else self.name
        )

    def name(self, raw: bytes) -> str:
        """Return the host of a name, which the log has even if it is none."""
        self.session.target = printable(raw)
        return parse_name(raw)

    def choose_method(self, methods: bytes) -> None:
        """Agree on how the client says who he is: section 3; raise Refused."""
        named = self.worker.asks_names()
        method = 2 if named else 0
        if method not in methods:
            self.session.status = str(NO_METHOD.reply)
            self.send(bytes([5, NO_METHOD.reply]))
            linger(self.worker, self.client)
            outcome = AUTH_REQUIRED if named else NO_METHOD
            raise Refused(outcome, "the one method we want is not offered")
        self.send(bytes([5, method]))
        if named:
            self.log_in()

    def log_in(self) -> None:
        """Learn who the client is: RFC 1929; raise Refused."""
        version, size = self.take(2)
        name = self.take(size)
        password = self.take(self.take(1)[0])
        try:
            if version != 1:
                raise Refused(BAD_REQUEST, "this is no name and password")
            users = self.worker.chapters.users
            self.session.user = users.authenticate(self.worker, name, password)
        except Refused:
            self.send(b"\1\1")
            linger(self.worker, self.client)
            raise
        self.send(b"\1\0")

    # What is answered.

    def send(self, data: bytes) -> None:
        """Send an answer: a few bytes, for which a new connection has room."""
        try:
            self.client.sock.sendall(data)
        except OSError as error:
            raise Refused(CLIENT_GONE, reason(error)) from None
        self.session.down += len(data)

    def reply(self, outcome: Outcome, address: SocketAddress = ("0.0.0.0", 0)) -> bytes:
        """Return the reply that tells an outcome, with the address it is about."""
        if self.version == 5:
            self.session.status = str(outcome.reply)
            return bytes([5, outcome.reply, 0]) + write_address(address)
        code = REJECTED if outcome.reply else GRANTED
        self.session.status = str(code)
        packed = address_of(address[0])
        if len(packed) == 16:  # there is no room for it
            packed = bytes(4)
        return struct.pack("!BBH4s", 0, code, address[1], packed)

    def refuse(self, outcome: Outcome) -> None:
        """Tell the client that it cannot be done, if he waits to hear it."""
        if self.owes_reply:
            with contextlib.suppress(Refused):
                self.send(self.reply(outcome))
                linger(self.worker, self.client)

    # What is done.

    def obey(self, command: int, host: str, port: int) -> None:
        """Do what the client asks for; raise Refused."""
        session = self.session
        session.method = COMMANDS.get(command, "-")
        if command == 3 and self.version == 5:
            session.proto = "udp"
        else:
            session.target = printable(endpoint((host, port)).encode(), TARGET_SIZE)
        self.worker.check_share()
        if self.version == 4:
            session.user = anonymous(self.worker)
        if session.proto == "udp":
            return self.associate()
        if command not in (1, 2):
            raise Refused(NOT_IMPLEMENTED, f"command {command}")
        self.worker.begin(session)
        if command == 2:
            return self.bind(host, port)
        if not port:
            raise Refused(BAD_REQUEST, "port 0")
        server = dial(self.worker, self.policy, session, host, port)
        return self.join(server, server.getsockname())

    def join(self, server: socket.socket, address: SocketAddress) -> None:
        """Tell the client of his connection, and carry what is said on it."""
        opening = self.reply(OK, address)
        self.worker.proceed(self.session)
        self.owes_reply = False
        stream = Stream(server, SERVER_GONE)
        tunnel(self.worker, self.session, self.client, stream, opening)

    def bind(self, host: str, port: int) -> None:
        """Let a host call the client: RFC 1928 section 4; raise Refused."""
        worker, session = self.worker, self.session
        expected = judged(worker, self.policy, session, host, port)
        if self.version == 4:
            expected = [packed for packed in expected if len(packed) == 4]
        _, listener = open_outside(self, STREAM, expected, port, {})
        with listener:
            session.source = endpoint(listener.getsockname())
            first = self.reply(OK, listener.getsockname())
            worker.proceed(session)
            self.send(first)
            server, address = self.admit(listener, expected)
        session.address = endpoint(address)
        self.join(server, address)

    def admit(
        self, listener: socket.socket, expected: list[bytes]
    ) -> tuple[socket.socket, SocketAddress]:
        """Return the first connection from an expected host; raise Refused.

        A server may take as long to call as it may take to answer.
        """
        deadline = time.monotonic() + self.config.idle_timeout
        # The client may have said something already: that is for the server.
        wanted = {listener.fileno(): POLLIN, self.client.fd: select.POLLRDHUP}
        while (left := deadline - time.monotonic()) > 0:
            ready = self.watch.wait(wanted, left)
            if self.client.fd in ready:
                raise Refused(CLIENT_GONE, "closed before anybody called")
            with contextlib.suppress(BlockingIOError, ConnectionError):
                server, address = listener.accept()
                if address_of(address[0]) in expected:
                    server.setblocking(False)
                    return server, address
                server.close()
        raise Refused(NOBODY_CALLED, "the expected host did not call")

    def associate(self) -> None:
        """Relay the client's datagrams; raise Refused."""
        with contextlib.closing(Association(self)) as association:
            self.send(self.reply(OK, association.inner.getsockname()))
            self.worker.proceed(self.session)
            self.owes_reply = False
            association.run()


def serve(worker: Worker, policy: Policy, client: Stream) -> None:
    """Serve a client whose first byte, 4 or 5, has been received."""
    Socks(worker, policy, client).serve()


def join(chapters: Chapters, config: Config, policy: Policy) -> None:
    """Serve SOCKS clients from now on."""
    chapters.socks = serve
