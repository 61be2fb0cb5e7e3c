"""Mappings, a chapter of NATWork: a machine of the inside listens on the outside.

It asks by NAT-PMP (RFC 6886), on UDP port 5351 of the inside, for a TCP port of an
outside address.  The mapper answers; a mapping is a process that listens, and each
caller has a process that is forked from it:

    natwork: mapper
     `- natwork: map 203.0.113.1:8000 > 10.0.0.7:8000 95s left
         `- natwork: 192.0.2.7:3456 > 10.0.0.1:5678 > 10.0.0.7:8000 map 10.0.0.7

A mapping leads to the machine that asked for it and to no other.  All that is known
of it stands in its slot on the scoreboard, where the next mapper finds it after a
reload or a kill.  When its lease is over, the port closes and the callers stay.
The chapter maps no UDP, which SOCKS relays, and speaks neither PCP nor UPnP.
"""
# SPDX-License-Identifier: MIT

from __future__ import annotations

import contextlib
import fcntl
import functools
import math
import os
import resource
import select
import signal
import socket
import struct
import time
from collections.abc import Callable

import natwork
from natwork import Session
from natwork import Slot

VERSION = "0.1.0"

PORT, LEASE_LIMIT = 5351, 7200  # RFC 6886: section 3.1; in seconds, section 3.3
SLOT_COUNT, MAPPING_LIMIT = 512, 128  # of mappings and callers; of mappings alone
LOOK_TIME = 0.2  # between looks at the end of a lease
OPEN_TIME = 0.02  # between attempts to bind a port that the last mapper still has
RELEASE_TIME = 2.0  # for that mapper to close it, before we complain
KEPT = natwork.SILENT + 1  # the state of our slots: the master gives workers free ones
# Words of a slot: when its lease ends, by monotonic_ns(); and the parent of the process
# that has the slot.  A slot that no process has is free: its Slot.PID is 0.
LEASE, PARENT = Slot.PEER + 1, Slot.PEER + 2
LOCK = 2  # a byte of the scoreboard, as in natwork_users.py, which has 0 and 1
PKTINFO = 8  # IP_PKTINFO of ip(7), which 3.10 does not name
# Operations and results: sections 3.2, 3.3 and 3.5.
ADDRESS, MAP_TCP, ANSWER = 0, 2, 128
OK, BAD_VERSION, NOT_AUTHORIZED, NO_ADDRESS, NO_RESOURCES, BAD_OPERATION = range(6)
SILENCE = -1  # no answer is sent


def is_gone(pid: int) -> bool:
    """Return whether a process has ended; it stays a zombie where init reaps nobody."""
    with contextlib.suppress(OSError):  # it is not there, or another user's
        os.kill(pid, 0)
        return natwork.stat_of(pid)[:1] == [b"Z"]
    return True


class Mapper:
    """The process that answers NAT-PMP, then what it forks: a mapping, and a caller.

    Each mapping and caller has a slot on the scoreboard, and frees it when it ends.
    If it was killed, the next sweep by another process logs it and frees its slot.
    """

    def __init__(self, generation: natwork.Generation) -> None:
        """Begin in the new process, which takes no clients."""
        while generation.listeners:
            generation.listeners.popitem()[1].close()
        self.generation, self.log = generation, generation.log
        self.config, self.policy = generation.config, generation.chapters.policy
        self.board = board = generation.chapters.board
        self.began = board.words[board.BEGAN]  # the epoch: section 3.6
        states = enumerate(board.states())
        self.slots = [Slot(board, n) for n, state in states if state == KEPT]
        places = [place for some in self.policy.listeners.values() for place in some]
        # Where we do not listen yet.  :: takes IPv4 too, and 0.0.0.0 covers the rest.
        hosts = {place[-4:] for place in places if len(place) == 4 or not any(place)}
        self.closed = {natwork.unpack(host) for host in {bytes(4)} & hosts or hosts}
        self.sockets: dict[int, socket.socket] = {}
        self.patient_until = time.monotonic() + RELEASE_TIME

    def run(self) -> None:
        """Answer until it is time to leave; then see mappings and callers out."""
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel is to reap for us
        lifeline = self.generation.lifeline_read
        watch = natwork.Watch(lifeline, self.config, self.sockets)
        look = natwork.remembered(OPEN_TIME, self.look)  # not for each datagram
        with contextlib.suppress(natwork.Refused):  # drain_timeout is over already
            while not watch.retired:
                try:
                    self.open()
                    wanted = dict.fromkeys(self.sockets, natwork.POLLIN)
                    is_patient = self.closed and self.patient_until < math.inf
                    ready = watch.wait(wanted, OPEN_TIME if is_patient else LOOK_TIME)
                    look()
                    for fd in ready.keys() & self.sockets.keys():
                        self.receive(self.sockets[fd])
                except OSError as error:
                    why = natwork.reason(error)
                    self.board.say(f"the mapper goes on after an error: {why}")
                    time.sleep(OPEN_TIME)  # it may come again at once
        natwork.set_title("natwork: mapper that leaves")
        signal.signal(signal.SIGTERM, self.end_all)
        self.close()
        is_last = False
        # After a reload the next mapper has the others; if the master has gone, we do.
        while (self.count(0) < SLOT_COUNT) if is_last else self.count(os.getpid()):
            time.sleep(LOOK_TIME)
            self.sweep()
            is_last = natwork.readable([lifeline])[lifeline] & select.POLLHUP > 0
        with contextlib.suppress(ChildProcessError):
            os.waitpid(-1, 0)  # until none is left, since SIGCHLD is ignored

    def open(self) -> None:
        """Listen where machines ask; after RELEASE_TIME, say why we cannot."""
        for host in [*self.closed]:
            sock = socket.socket(natwork.INET, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
            try:
                sock.setsockopt(socket.SOL_IP, PKTINFO, 1)
                sock.bind((host, PORT))
                self.sockets[sock.fileno()] = sock
                self.closed.discard(host)
                natwork.set_title("natwork: mapper")
            except OSError as error:
                sock.close()
                if time.monotonic() > self.patient_until:
                    self.patient_until = math.inf
                    why = f"at {host}:{PORT}: {natwork.reason(error)}"
                    natwork.say(f"cannot answer NAT-PMP {why}")

    def close(self) -> None:
        while self.sockets:
            self.sockets.popitem()[1].close()

    # The slots on the scoreboard, and the processes that have them.

    def lock(self, how: int) -> None:
        fcntl.lockf(self.board.fd, how, 1, LOCK)

    def count(self, parent: int) -> int:
        """Return how many slots a process's children have; for 0, how many are free."""
        words = (slot.words for slot in self.slots)
        return [one[Slot.PID] and one[PARENT] for one in words].count(parent)

    def fork(self, session: Session, work: Callable[[Slot], None], lease: int) -> bool:
        """Fork a process, with a slot, to do some work; return whether there is one."""
        self.lock(fcntl.LOCK_EX)
        slot = next((one for one in self.slots if not one.words[Slot.PID]), None)
        if slot:
            slot.clear(os.getpid())  # ours, until we know the new process's pid
            slot.words[LEASE], slot.words[PARENT] = lease, os.getpid()
            slot.publish(session)
            begin = functools.partial(self.begin, session, work, slot)
            try:
                slot.words[Slot.PID] = self.board.fork(begin)
            except OSError as error:
                self.board.say(f"cannot fork for a mapping: {natwork.reason(error)}")
                slot.clear(0)
                slot = None
        self.lock(fcntl.LOCK_UN)
        return slot is not None

    def begin(self, session: Session, work: Callable[[Slot], None], slot: Slot) -> None:
        """Do some work in this new process, until the operator or end_all() ends it."""

        def end(*_: object) -> None:  # a new caller may still have its mapping's
            if slot.words[Slot.PID] == os.getpid():
                self.log.write_killed(slot, -signal.SIGTERM)
                slot.clear(0)
            os._exit(1)

        signal.signal(signal.SIGTERM, end)
        session.pid = str(os.getpid())
        slot.publish(session)
        self.close()
        work(slot)
        slot.clear(0)

    def sweep(self) -> None:
        """Log the sessions of processes that were killed, and free their slots."""
        self.lock(fcntl.LOCK_EX)
        for slot in self.slots:
            if slot.words[Slot.PID] and is_gone(slot.words[Slot.PID]):
                self.log.write_killed(slot, -signal.SIGKILL)
                slot.clear(0)
        self.lock(fcntl.LOCK_UN)

    def end_all(self, *_: object) -> None:
        """End mappings and callers: the master sends TERM when their time is over."""
        for pid in filter(None, [slot.words[Slot.PID] for slot in self.slots]):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)

    # What the mapper is asked.

    def look(self) -> None:
        """Sweep, and end the mappings whose outside address or user has gone."""
        self.sweep()
        found = self.mappings()
        users = self.users() if found and self.config.users else {}
        for slot, one in found:
            at = natwork.pack(natwork.host_of(one.address))
            if not natwork.route_to(at).local:
                slot.words[LEASE], self.began = 0, int(time.monotonic())
            elif self.config.users and self.who(one) not in users:
                slot.words[LEASE] = 0

    def receive(self, sock: socket.socket) -> None:
        """Answer a datagram, if it has come from the inside; raise OSError.

        It must have come by the device that leads to its sender, so that a host of the
        outside which forges an inside address opens nothing.
        """
        data, notes, _, peer = sock.recvmsg(64, socket.CMSG_SPACE(12))
        index, here, asked = struct.unpack("=I4s4s", notes[0][2])
        route, policy = natwork.route_to(natwork.pack(peer[0])), self.policy
        is_near = route.device == socket.if_indextoname(index) and not route.local
        is_inside = here == asked and not (policy.uplinks and here in policy.outside())
        if not (is_near and is_inside and policy.is_client(peer, None)):
            return  # a broadcast, too: then here and asked differ
        self.here = natwork.Uplink(natwork.unpack(here), here)
        if answer := self.answer(data, peer[0]):
            info = socket.SOL_IP, PKTINFO, struct.pack("=I4s4s", 0, here, here)
            sock.sendmsg([answer], [info], 0, peer)

    def answer(self, data: bytes, host: str) -> bytes:
        """Return the answer to what a machine asks, b"" for what is no request."""
        if len(data) < 2 or data[1] >= ANSWER:
            return b""
        (version, operation), result, rest = data[:2], BAD_OPERATION, b""
        if version:
            result = BAD_VERSION
        elif operation > MAP_TCP:  # section 3.5: the rest goes back as it came
            return struct.pack("!BBH", 0, ANSWER + operation, result) + data[4:]
        elif len(data) != (2 if operation == ADDRESS else 12):
            return b""
        elif operation == ADDRESS:
            rest = natwork.pack(next(iter(self.places(host)), "0.0.0.0"))
            result = OK if any(rest) else NO_ADDRESS
        else:
            port, wanted, seconds = struct.unpack("!4xHHI", data)
            seconds, mapped = min(seconds, LEASE_LIMIT), 0
            if operation == MAP_TCP:  # and not UDP
                result, mapped = self.map(host, port, wanted, seconds)
            if result == SILENCE:
                return b""
            rest = struct.pack("!HHI", port, mapped, 0 if result else seconds)
        age = int(time.monotonic()) - self.began
        return struct.pack("!BBHI", 0, ANSWER + operation, result, age) + rest

    def mappings(self, host: str = "") -> list[tuple[Slot, Session]]:
        """Return the mappings, or those of a machine."""
        found = ((slot, slot.session()) for slot in self.slots)
        every = [(slot, one) for slot, one in found if one and one.method == "MAP"]
        return [own for own in every if host in ("", natwork.host_of(own[1].client))]

    @staticmethod
    def who(session: Session) -> tuple[str, str]:
        """Return machine and user of a session, less what the user says of itself."""
        return natwork.host_of(session.client), session.user.partition(";")[0]

    def users(self) -> dict[tuple[str, str], str]:
        """Return users with what they say of themselves, by machine and user."""
        found = [one for _, one in natwork.sessions(self.board) if one.proto != "map"]
        known = self.generation.chapters.users.lines  # a removed user may be there yet
        return {self.who(one): one.user for one in found if self.who(one)[1] in known}

    def places(self, host: str) -> dict[str, natwork.Uplink | None]:
        """Return the outside addresses for a machine; with mappings, only theirs."""
        mine = {natwork.host_of(one.address) for _, one in self.mappings(host)}
        outside = self.policy.outside().items()
        places = {natwork.unpack(p): way for p, way in outside if len(p) == 4}
        return {p: way for p, way in places.items() if p in mine} or places

    def map(self, host: str, port: int, wanted: int, seconds: int) -> tuple[int, int]:
        """Make, renew or end a mapping as a machine asks; return result and port."""
        key, now = natwork.endpoint((host, port)), time.monotonic_ns()
        mine = {one.client: (slot, one) for slot, one in self.mappings(host)}
        if not seconds:
            for client, (slot, _) in mine.items():
                if not port or client == key:  # port 0: all of them
                    slot.words[LEASE] = 0
            return OK, 0
        users, ends_at = ["-"], now + seconds * 10**9
        if self.config.users:
            users = sorted(user for (at, _), user in self.users().items() if at == host)
        if not users or not port or self.policy.closes(natwork.pack(host)) != "inside":
            return NOT_AUTHORIZED, 0
        if key in mine:
            slot, one = mine[key]
            if slot.words[PARENT] == os.getpid() and slot.words[LEASE] > now:
                slot.words[LEASE] = ends_at
                return OK, int(one.address.rpartition(":")[2])
            # It is over, or has an earlier mapper's settings: end it.  The machine gets
            # no answer, asks again (RFC 6886 section 3.1), and then gets a new one.
            slot.words[LEASE] = 0
            return SILENCE, 0
        full = len(mine) >= self.config.max_mappings
        full = full or len(self.mappings()) >= MAPPING_LIMIT
        if full or not (listener := self.listen(host, wanted)):
            return NO_RESOURCES if self.places(host) else NO_ADDRESS, 0
        self.listener, self.session = listener, Session(key, "-", "map")
        self.session.method, self.session.user = "MAP", users[0]
        self.session.address = natwork.endpoint(listener.getsockname())
        with listener:
            made = self.fork(self.session, self.hold, ends_at)
            return (OK, listener.getsockname()[1]) if made else (NO_RESOURCES, 0)

    def listen(self, host: str, wanted: int) -> socket.socket | None:
        """Return a socket that listens on the outside, at the wanted port if it can."""
        ports, places = self.policy.ports, self.places(host)
        fits = wanted in (ports if any(ports) else range(1024, 65536))
        for port in [*[wanted] * fits, *ports]:
            for place, uplink in places.items():
                with contextlib.suppress(OSError):  # the port has another owner
                    sock = socket.create_server((place, port), backlog=64)
                    if uplink and not uplink.packed:
                        natwork.leave_by(sock, uplink)
                    sock.setblocking(False)
                    natwork.reset_on_close(sock)  # accept(2) passes it on
                    if sock.getsockname()[1] not in self.policy.listeners:
                        return sock
                    sock.close()
        return None

    # The process of a mapping.

    def hold(self, slot: Slot) -> None:
        """Take callers until the lease is over, and see them out."""
        session, fd = self.session, self.listener.fileno()
        watch = natwork.Watch(self.generation.lifeline_read, self.config, {})
        title = f"natwork: map {session.address} > {session.client}"
        with contextlib.suppress(natwork.Refused):  # drain_timeout is over already
            while (left := (slot.words[LEASE] - time.monotonic_ns()) / 1e9) > 0:
                natwork.set_title(f"{title} {left:.0f}s left")
                if watch.wait({fd: natwork.POLLIN}, LOOK_TIME):
                    self.accept()
                if watch.drain_at < math.inf:  # the master leaves
                    break
        natwork.set_title(f"{title} over")
        natwork.shut(self.listener)
        self.log.write(session, natwork.ENDED.word, slot)
        while self.count(os.getpid()):
            time.sleep(LOOK_TIME)
            self.sweep()

    def accept(self) -> None:
        """Have a new process serve a caller that has come, once there is room."""
        every = filter(None, map(Slot.session, self.slots))
        machines = [natwork.host_of(one.target) for one in every]
        # A machine may have as many callers as there are free slots for others.
        if machines.count(natwork.host_of(self.session.client)) >= self.count(0):
            return time.sleep(LOOK_TIME)
        try:
            sock, address = self.listener.accept()
            with sock:
                client = natwork.Client(sock, address)
                session = Session(client.endpoint, "-", "map")
                session.target, session.user = self.session.client, self.session.user
                self.fork(session, functools.partial(self.serve, client, session), 0)
        except OSError as error:
            self.board.say(f"cannot take a caller: {natwork.reason(error)}")
            time.sleep(LOOK_TIME)

    # The process of a caller.

    def serve(self, client: natwork.Client, session: Session, slot: Slot) -> None:
        """Join a caller to a mapping's machine, from the address that it asked."""
        self.listener.close()
        if os.geteuid() != 0:
            resource.setrlimit(resource.RLIMIT_NPROC, (0, 0))  # as for a worker
        worker = natwork.Worker(self.generation, slot)
        worker.client, session.outcome = client, natwork.ENDED

        def carry() -> None:
            worker.begin(session)
            host, port = natwork.parse_endpoint(session.target)
            (packed,) = natwork.judged(worker, session, host, port)
            attempt = natwork.Attempt(packed, port, self.here, 0.0)
            server = natwork.Race(worker, session).run([attempt])
            worker.proceed(session)
            client.stream.tune()
            natwork.tunnel(worker, session, server, b"")
            client.close()  # by a FIN: if we end before this, it is a reset

        worker.record(session, carry, lambda refusal: refusal.outcome)


def join(chapters: natwork.Chapters) -> None:
    """Have a mapper, and slots for its processes, where `mappings` asks for it."""
    config, board = chapters.config, chapters.board
    if not config.mappings:
        return
    most = natwork.SLOT_LIMIT - SLOT_COUNT
    if config.max_workers > most:
        config.refuse("max_workers", f"must be at most {most} with mappings")
    if KEPT not in board.states():
        first = board.STATES + board.words[board.USED]
        board.memory[first : first + SLOT_COUNT] = bytes([KEPT]) * SLOT_COUNT
        board.words[board.USED] += SLOT_COUNT
    chapters.mapper = lambda generation: Mapper(generation).run()
