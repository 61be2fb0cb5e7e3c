"""Mappings, a chapter of NATWork: a machine of the inside listens on the outside.

It asks by NAT-PMP (RFC 6886), on UDP port 5351 of the inside, for a TCP port of an
outside address.  The mapper answers; a mapping is a process that listens, and each
caller has a process that is forked from it:

    natwork: mapper
     `- natwork: map 203.0.113.1:8000 > 10.0.0.7:8000 95s left
         `- natwork: 192.0.2.7:3456 > 10.0.0.1:5678 > 10.0.0.7:8000 map 10.0.0.7

A mapping leads to the machine that asked for it and to no other.  The row of its
process on the scoreboard is all that is known of it, so the next mapper, after a
reload or a kill, finds it.  When its lease is over, the port closes and the callers
stay.  It maps no UDP, which SOCKS has, and speaks neither PCP nor UPnP.
"""
# SPDX-License-Identifier: MIT

from __future__ import annotations

import contextlib
import fcntl
import math
import os
import resource
import select
import signal
import socket
import struct
import time
from collections.abc import Callable
from typing import NamedTuple

import natwork
from natwork import Generation
from natwork import Refused
from natwork import Session
from natwork import Slot

VERSION = "0.1.0"

PORT, LEASE_LIMIT = 5351, 7200  # RFC 6886: section 3.1; in seconds, section 3.3
SLOT_COUNT, MAPPING_LIMIT = 512, 128  # of mappings and callers; of mappings alone
LOOK_TIME = 0.2  # between looks at the end of a lease
OPEN_TIME = 0.02  # between attempts at a port that another process is to let go
RELEASE_TIME = 2.0  # for it to do so
KEPT = natwork.SILENT + 1  # the state of our slots, so that no worker has one
LEASE = natwork.PEER + 1  # the word of a slot that says when its lease is over
LOCK = 2  # by this byte of the scoreboard; natwork_users.py has 0 and 1
PKTINFO, V6ONLY = 8, 26  # of ip(7) and ipv6(7); 3.10 does not name the first
# Operations with their requests' sizes, and results: sections 3.2, 3.3 and 3.5.
ADDRESS, MAP_TCP, ANSWER = 0, 2, 128
SIZES = {ADDRESS: 2, MAP_TCP: 12}
OK, BAD_VERSION, NOT_AUTHORIZED, NO_ADDRESS, NO_RESOURCES, BAD_OPERATION = range(6)


class Pool:
    """Our slots on the scoreboard, and the processes that this one has forked.

    What a process could not write down that was killed, its parent writes, or, where
    that is gone, the mapper.
    """

    def __init__(self, generation: Generation) -> None:
        self.board, self.log = generation.chapters.board, generation.log
        first = int.from_bytes(self.board.region("mapping", 8)[:], "big") - 1
        self.slots = [Slot(self.board, first + n) for n in range(SLOT_COUNT)]
        self.children: dict[int, Slot] = {}  # by pid

    def lock(self, how: int) -> None:
        fcntl.lockf(self.board.fd, how, 1, LOCK)

    def free(self) -> list[Slot]:
        return [slot for slot in self.slots if not slot.words[natwork.PID]]

    def fork(
        self, work: Callable[[Slot], None], session: Session | None, ends_at: int = 0
    ) -> bool:
        """Have a new process, with a slot, do some work; return whether it does."""
        self.lock(fcntl.LOCK_EX)
        slot = next(iter(self.free()), None)
        if slot:
            slot.clear(os.getpid())
        self.lock(fcntl.LOCK_UN)
        if not slot:
            return False
        if session:
            slot.words[LEASE] = ends_at
            slot.publish(session)
        try:
            self.children[self.board.fork(lambda: work(slot))] = slot
        except OSError as error:
            self.board.say(f"cannot fork for a mapping: {natwork.reason(error)}")
            slot.clear(0)
            return False
        return True

    def reap(self, orphans: bool = False) -> None:
        """Free the slots of our children that have ended; and those of dead parents."""
        self.lock(fcntl.LOCK_EX)
        ended = []
        while self.children:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if not pid:
                break
            ended.append((self.children.pop(pid), os.waitstatus_to_exitcode(status)))
        for slot in self.slots if orphans else ():
            pid = slot.words[natwork.PID]
            if pid and not os.path.exists(f"/proc/{pid}"):
                ended.append((slot, -signal.SIGKILL))
        for slot, code in ended:
            self.log.write_killed(slot, code)
            slot.clear(0)
        self.lock(fcntl.LOCK_UN)

    def end_all(self, *_: object) -> None:
        """End all processes that have a slot, as the master asks when time is over."""
        for slot in self.slots:
            if pid := slot.words[natwork.PID]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGTERM)


class Mapping(NamedTuple):
    """A port of the outside, and the machine of the inside that it leads to."""

    generation: Generation
    session: Session  # its client is the machine, its address the port of the outside
    sock: socket.socket
    here: str  # where the machine has reached us

    def run(self, slot: Slot) -> None:
        """Be the process that listens until the lease is over; see the callers out."""
        pool, is_open = Pool(self.generation), True
        way = f"{self.session.address} > {self.session.client}"
        slot.words[natwork.PID], self.session.pid = os.getpid(), str(os.getpid())
        slot.publish(self.session)
        while is_open or pool.children:
            left = slot.words[LEASE] - time.monotonic()
            poll = select.poll()
            poll.register(self.generation.lifeline_read, 0)  # POLLHUP comes unasked
            # One mapping has no more callers than there is room for those of others.
            if is_open and len(pool.children) < len(pool.free()):
                poll.register(self.sock, natwork.POLLIN)
            rest = f"{max(0, round(left))}s left" if is_open else "over"
            natwork.set_title(f"natwork: map {way} {rest}")
            ready = dict(poll.poll(LOOK_TIME * 1000))
            pool.reap()
            if is_open and (left <= 0 or self.generation.lifeline_read in ready):
                is_open = False
                natwork.shut(self.sock)
                pool.log.write(self.session, natwork.ENDED.word, slot)
            elif is_open and ready:
                self.accept(pool)
            elif ready:  # the master leaves, and callers have a while yet
                time.sleep(LOOK_TIME)

    def accept(self, pool: Pool) -> None:
        """Have a new process serve a caller that has come."""
        with contextlib.suppress(BlockingIOError, ConnectionAbortedError):
            sock, address = self.sock.accept()
            with sock:
                client = natwork.Client(sock, address)
                pool.fork(lambda slot: self.serve(slot, client), None)

    def serve(self, slot: Slot, client: natwork.Client) -> None:
        """Be the process of a caller, and join it to the machine of the mapping."""
        self.sock.close()
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        if os.geteuid() != 0:
            resource.setrlimit(resource.RLIMIT_NPROC, (0, 0))  # as for a worker
        slot.clear(os.getpid())
        worker = natwork.Worker(self.generation, slot)
        worker.client = client
        session = Session(client.endpoint, worker.pid_text, "map")
        session.target, session.user = self.session.client, self.session.user

        def serve() -> None:
            worker.begin(session)
            server = self.dial(worker, session)
            worker.proceed(session)
            client.stream.tune()
            session.outcome = natwork.ENDED
            natwork.tunnel(worker, session, server, b"")

        def refuse(refusal: Refused) -> natwork.Outcome:
            client.stream.abort()  # no byte of ours belongs in what the two say
            return refusal.outcome

        with contextlib.closing(client):
            worker.record(session, serve, refuse)

    def dial(self, worker: natwork.Worker, session: Session) -> natwork.Stream:
        """Return a connection to the machine, from our address there; raise Refused."""
        host, port = natwork.parse_endpoint(self.session.client)
        (packed,) = natwork.judged(worker, session, host, port)
        here = natwork.Uplink(self.here, natwork.pack(self.here), 0)
        began, attempt = time.monotonic(), natwork.Attempt(packed, port, here, 0.0)
        server = natwork.Race(worker, session).run([attempt])
        worker.slot.connected(time.monotonic() - began)
        return server


class Mapper:
    """The process that answers NAT-PMP, and forks one for each mapping."""

    def __init__(self, generation: Generation) -> None:
        """Begin in the new process, which takes no clients."""
        self.hosts = set()  # where clients reach us by IPv4
        for sock in generation.listeners.values():
            host = sock.getsockname()[0]
            if host == "::" and not sock.getsockopt(socket.IPPROTO_IPV6, V6ONLY):
                host = "0.0.0.0"
            self.hosts |= set() if ":" in host else {host}
            sock.close()
        self.hosts = {"0.0.0.0"} & self.hosts or self.hosts
        self.generation, self.pool = generation._replace(listeners={}), Pool(generation)
        self.config, self.policy = generation.config, generation.policy
        self.sockets: dict[int, socket.socket] = {}
        self.patient_until = time.monotonic() + RELEASE_TIME

    def run(self) -> None:
        """Answer until it is time to leave; then wait for mappings and callers."""
        signal.signal(signal.SIGALRM, signal.SIG_IGN)  # our children count on us
        pool, timeout = self.pool, self.config.drain_timeout
        watch = natwork.Watch(self.generation.lifeline_read, timeout, self.sockets)
        while not watch.retired:
            if not self.sockets:
                self.open()
            wanted = dict.fromkeys(self.sockets, natwork.POLLIN)
            for fd in watch.wait(wanted, LOOK_TIME if wanted else OPEN_TIME):
                with contextlib.suppress(OSError, KeyError):  # it will be asked again
                    self.receive(self.sockets[fd])
            self.look()
        natwork.set_title("natwork: mapper that leaves")
        while self.sockets:
            self.sockets.popitem()[1].close()
        while pool.children or (
            watch.drain_at < math.inf and len(pool.free()) < SLOT_COUNT
        ):
            if watch.drain_at < math.inf:
                signal.signal(signal.SIGTERM, pool.end_all)
            with contextlib.suppress(Refused):  # the time is over for them, not for us
                watch.wait({}, LOOK_TIME)
            time.sleep(OPEN_TIME)
            pool.reap(orphans=True)

    def open(self) -> None:
        """Listen where machines ask; say why not, if the mapper before us has left."""
        try:
            for host in self.hosts:
                sock = socket.socket(natwork.INET, socket.SOCK_DGRAM)
                self.sockets[sock.fileno()] = sock
                sock.setblocking(False)
                sock.setsockopt(socket.SOL_IP, PKTINFO, 1)
                sock.bind((host, PORT))
                natwork.set_title("natwork: mapper")
        except OSError as error:
            while self.sockets:
                self.sockets.popitem()[1].close()
            if time.monotonic() > self.patient_until:
                self.patient_until = math.inf
                why = natwork.reason(error)
                natwork.say(f"cannot answer NAT-PMP at {host}:{PORT}: {why}")

    def look(self) -> None:
        """Free what has ended, and end the mappings that are no longer due."""
        self.pool.reap(orphans=True)
        found = self.mappings()
        users = self.users() if found else set()
        for slot, one in found:
            host, place = map(natwork.host_of, (one.client, one.address))
            due = (host, one.user) in users or not self.config.users
            if not due or not natwork.route_to(natwork.pack(place)).local:
                slot.words[LEASE] = 0

    def receive(self, sock: socket.socket) -> None:
        """Answer a datagram, if it has come from the inside; raise OSError.

        It must have come by the device that leads to its sender: what the outside sends
        in the name of a machine of the inside opens nothing.
        """
        data, notes, _, peer = sock.recvmsg(64, socket.CMSG_SPACE(12))
        index, here, asked = struct.unpack("=I4s4s", notes[0][2])
        device = natwork.route_to(natwork.pack(peer[0])).device
        if here != asked or device != socket.if_indextoname(index):
            return
        if self.policy.uplinks and here in self.policy.outside():
            return
        if not self.policy.is_client(peer, None):
            return
        if answer := self.answer(data, peer[0], natwork.unpack(here)):
            info = socket.SOL_IP, PKTINFO, struct.pack("=I4s4s", 0, here, here)
            sock.sendmsg([answer], [info], 0, peer)

    def answer(self, data: bytes, host: str, here: str) -> bytes:
        """Return the answer to what a machine asks, b"" for what is no request."""
        if len(data) < 2 or data[1] >= ANSWER:
            return b""
        operation, result, rest = data[1], OK, b""
        if data[0]:
            result = BAD_VERSION
        elif operation not in SIZES:
            result = BAD_OPERATION
        elif len(data) != SIZES[operation]:
            return b""
        elif operation == ADDRESS:
            rest = next(iter(self.places(host)), bytes(4))
            result = OK if any(rest) else NO_ADDRESS
        else:
            port, wanted, seconds = struct.unpack("!4xHHI", data)
            seconds = min(seconds, LEASE_LIMIT)
            result, wanted = self.map(host, here, port, wanted, seconds)
            rest = struct.pack("!HHI", port, wanted, 0 if result else seconds)
        age = int(time.time()) - self.pool.board.words[natwork.BEGAN]
        return struct.pack("!BBHI", 0, ANSWER + operation, result, max(0, age)) + rest

    def mappings(self, host: str = "") -> list[tuple[Slot, Session]]:
        """Return the mappings, or those of a machine."""
        rows = [(slot, row) for slot in self.pool.slots if (row := slot.row())]
        found = [(slot, Session.from_row(row, 0, 0)) for slot, row in rows]
        return [
            (slot, one)
            for slot, one in found
            if one.method == "MAP" and host in ("", natwork.host_of(one.client))
        ]

    def users(self) -> set[tuple[str, str]]:
        """Return the machines with sessions of users, and these."""
        found = [one for _, one in natwork.sessions(self.pool.board)]
        return {
            (natwork.host_of(one.client), one.user)
            for one in found
            if one.user != "-" and one.proto != "map"
        }

    def places(self, host: str) -> dict[bytes, natwork.Uplink | None]:
        """Return the outside addresses for a machine; with a mapping, only its own."""
        mine = [natwork.host_of(one.address) for _, one in self.mappings(host)]
        outside = self.policy.outside()
        kept = {natwork.pack(place) for place in mine} or outside.keys()
        return {
            place: way
            for place, way in outside.items()
            if len(place) == 4 and place in kept
        }

    def map(
        self, host: str, here: str, port: int, wanted: int, seconds: int
    ) -> tuple[int, int]:
        """Make, renew or end a mapping as a machine asks; return result and port."""
        mine = {
            int(one.client.rpartition(":")[2]): (slot, one)
            for slot, one in self.mappings(host)
        }
        if not seconds:
            for number, (slot, _) in mine.items():
                slot.words[LEASE] *= port not in (0, number)
            return OK, 0
        packed, ends_at = natwork.pack(host), int(time.monotonic()) + seconds
        users = (
            sorted(user for at, user in self.users() if at == host)
            if self.config.users
            else ["-"]
        )
        inside = self.policy.closes(packed) == "inside"
        if not users or not port or not inside or natwork.route_to(packed).local:
            return NOT_AUTHORIZED, 0
        if port in mine:
            slot, one = mine.pop(port)
            wanted = int(one.address.rpartition(":")[2])
            if slot.words[natwork.PID] in self.pool.children:
                slot.words[LEASE] = ends_at
                return OK, wanted
            # An earlier mapper made it, under earlier settings: make it anew.
            slot.words[LEASE], until = 0, time.monotonic() + RELEASE_TIME
            while slot.row() and time.monotonic() < until:
                time.sleep(OPEN_TIME)
        if (
            len(mine) >= self.config.max_mappings
            or len(self.mappings()) >= MAPPING_LIMIT
        ):
            return NO_RESOURCES, 0
        if not (sock := self.listen(host, wanted)):
            return NO_RESOURCES, 0
        session = Session(natwork.endpoint((host, port)), "-", "map")
        session.method, session.user = "MAP", users[0]
        session.address = natwork.endpoint(sock.getsockname())
        mapping = Mapping(self.generation, session, sock, here)
        with sock:
            if not self.pool.fork(
                lambda slot: self.become(mapping, slot), session, ends_at
            ):
                return NO_RESOURCES, 0
            return OK, int(sock.getsockname()[1])

    def become(self, mapping: Mapping, slot: Slot) -> None:
        """Be the process of a mapping, and the mapper no more."""
        for sock in self.sockets.values():
            sock.close()
        mapping.run(slot)

    def listen(self, host: str, wanted: int) -> socket.socket | None:
        """Return a socket that listens on the outside, at the wanted port if it may."""
        ports, places = self.policy.ports, self.places(host)
        fits = wanted in (ports if any(ports) else range(1024, 65536))
        first = int.from_bytes(os.urandom(2), "big") % len(ports)
        for port in [*[wanted] * fits, *ports[first:], *ports[:first]]:
            for place, uplink in places.items():
                sock = socket.socket(
                    natwork.INET, natwork.STREAM | socket.SOCK_NONBLOCK
                )
                with contextlib.suppress(OSError):  # the port has another owner
                    if uplink and not uplink.packed:
                        natwork.leave_by(sock, uplink)
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                    sock.bind((natwork.unpack(place), port))
                    sock.listen(64)
                    natwork.reset_on_close(sock)  # handed down to each caller's socket
                    if sock.getsockname()[1] not in self.policy.listeners:
                        return sock
                sock.close()
        return None


def join(chapters: natwork.Chapters) -> None:
    """Have a mapper from now on, and slots for its processes, where it is wanted."""
    config, board = chapters.config, chapters.board
    if not config.mappings:
        return
    most = natwork.SLOT_LIMIT - SLOT_COUNT
    if config.max_workers > most:
        config.note("max_workers", f"must be at most {most} with mappings")
    memory, used = board.region("mapping", 8), board.words[natwork.USED]
    if not any(memory[:]):
        memory[:] = (used + 1).to_bytes(8, "big")
        states = slice(natwork.STATES + used, natwork.STATES + used + SLOT_COUNT)
        board.memory[states] = bytes([KEPT]) * SLOT_COUNT
        board.words[natwork.USED] += SLOT_COUNT
    chapters.mapper = lambda generation: Mapper(generation).run()
