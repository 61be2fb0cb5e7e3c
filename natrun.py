#!/usr/bin/env python3
"""natrun: run a program as if it ran on the gateway.

On a machine of the inside that has no route out, an unmodified program resolves
names, connects, listens and sends datagrams through NATWork:

    natrun.py curl http://www.example.com/

It needs neither root nor LD_PRELOAD, so static programs and those in Go work too.
The kernel hands each connect() of the program to this process, the supervisor, and
lets the program wait (seccomp user notification).  A target that the gateway's Local
Address Table calls inside is left to the kernel.  For all others we answer:

    program ---- connect(203.0.113.80:80) = 0
                       |           ^ notification, answer
    supervisor --------+-----------+ borrows the socket, connects it to the gateway,
                                     and asks by SOCKS for 203.0.113.80:80

After that the program has an ordinary socket.  A non-blocking one gets EINPROGRESS,
and is connected to a listener of ours that never accepts, the waiting room.  When the
gateway has answered, another socket of ours connects to the program's from the room's
address (TCP simultaneous open), and a relay joins that one to the gateway.

Usage:

    natrun.py [-g GATEWAY] [-c FILE] [-v] COMMAND [ARGUMENT]...
    natrun.py [-g GATEWAY] [-c FILE] --check     what works on this machine, and why

GATEWAY is HOST, HOST:PORT, or socks5://HOST:PORT for another SOCKS server.  Without
-g: NATRUN_GATEWAY, the settings, http://wpad/lat.json, the default route, in turn.

Settings are in FILE, else ~/.config/natrun.conf, else /etc/natrun.conf: a section
[natrun], and one for each program that differs, such as [curl].

Signals go on to the command.  Exit codes: the command's; 125 if natrun fails, 126 if
the command cannot be run, 127 if it is not found.

natrun is not a fence: the fence is that the machine has no route out.  natrun(1) has
the settings, and a list of what does not go through natrun.

Reading order.  Every section uses only the ones above it.  To follow a connection,
start at Supervisor.on_connect(), and read dial() next.
"""
# SPDX-License-Identifier: MIT

from __future__ import annotations

import asyncio
import binascii
import contextlib
import ctypes
import errno
import fcntl
import functools
import getopt
import ipaddress
import json
import os
import pwd
import re
import resource
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import types
from collections import defaultdict
from collections.abc import Awaitable
from collections.abc import Callable
from collections.abc import Iterator
from dataclasses import dataclass
from dataclasses import field
from typing import Any
from typing import NamedTuple
from typing import NoReturn
from typing import TypeVar

if sys.version_info < (3, 10):  # noqa: UP036
    sys.exit("natrun: needs Python 3.10 or later")

__version__ = "0.1.0"

# --- Limits -------------------------------------------------------------------
#
# Sizes are bytes, times are seconds.

REACH_TIME = 5.0  # to connect to the gateway
ANSWER_TIME = 130.0  # for the gateway to answer: Linux tries a dead host for 127
FIND_TIME = 3.0  # to connect for a page of the gateway, and again to receive the page
QUERY_TIME = 2.0  # for a name server to answer
NAME_TIME = 5  # until a name is looked up again: SOCKS tells no time to live
LEASE = 120  # until a mapping ends that is not renewed
LOOK_TIME = 0.1  # between two looks whether a signal waits for a thread in a call
PIPE_SIZE = 1 << 18  # of a pipe for bulk; a larger one does not stay in the CPU's cache
ALIVE_TIME = 30  # until an idle connection asks if the gateway is still there
RECORDS = 4096  # in a table that must not grow for ever


class Fault(Exception):
    """natrun cannot go on; the message says why."""


class Lost(OSError):
    """The gateway itself cannot be used."""


def say(text: str) -> None:
    """Write a line on standard error; what is not printable ASCII becomes a ?."""
    line = "".join(c if " " <= c <= "~" else "?" for c in text)
    with contextlib.suppress(OSError):
        if select.select([], [2], [], 0)[1]:  # a slow reader must not hold us up
            os.write(2, f"natrun: {line}\n".encode()[: select.PIPE_BUF])


say_once = functools.cache(say)  # for what stays true for the whole run


def reason(error: Exception) -> str:
    """Return why something failed, in the system's words if it has any."""
    own = getattr(error, "strerror", "") or str(error) or type(error).__name__
    code = 0 if isinstance(error, Lost) else getattr(error, "errno", 0)
    return os.strerror(code).lower() if code in errno.errorcode else str(own)


def failure(code: int) -> OSError:
    return OSError(code, os.strerror(code))


# --- Kernel -------------------------------------------------------------------
#
# Calls that Python lacks, with numbers from <linux/seccomp.h>, prctl.h and sched.h.

LIBC = ctypes.CDLL(None, use_errno=True)
PIDFD_GETFD, PIDFD_THREAD, KCMP_FILES = 438, 0x80, 2
NOTIF_RECV, NOTIF_SEND = 0xC0502100, 0xC0182101
NOTIF_ID_VALID, NOTIF_ADDFD = 0x40082102, 0x40182103
CONTINUE, ADDFD_SETFD, ADDFD_SEND = 1, 1, 2
NEW_LISTENER, WAIT_KILLABLE_RECV = 0x08, 0x20
ERESTARTSYS = 512  # not in errno: the kernel restarts the call, or makes it EINTR
MPTCP, MSG_FASTOPEN, TCP_FASTOPEN_CONNECT = 262, 0x20000000, 30
NO_NEW_PRIVS, CHILD_SUBREAPER = 38, 36
NEWUSER, NEWNET = 0x10000000, 0x40000000


def system(function: Callable[..., int], *arguments: Any) -> int:
    """Return the result of a function of the C library; raise OSError."""
    words = [ctypes.c_ulong(a) if isinstance(a, int) else a for a in arguments]
    result = function(*words)
    if result < 0:
        raise failure(ctypes.get_errno())
    return result


def rows(*paths: str) -> Iterator[list[str]]:
    """Yield the words of each line, except the first, of tables in /proc."""
    for path in paths:
        with contextlib.suppress(FileNotFoundError), open(path) as table:
            yield from [line.split() for line in table][1:]


# --- The filter ---------------------------------------------------------------
#
# Classic BPF, which the kernel runs at each system call of the program.  It notifies us
# of the calls that may concern the outside, fails a few, and allows all others.

LOAD, AND, EQUAL, RETURN = 0x20, 0x54, 0x15, 0x06
ALLOW, NOTIFY, FAIL = 0x7FFF0000, 0x7FC00000, 0x00050000
WHOLE = 0xFFFFFFFF
# A test: the number of an argument, a mask, and the values that it may have, masked.
# Sizes from sockaddr_in to sockaddr_in6, and of sockaddr_storage.  The kernel takes
# others, too, but those are of AF_UNIX, whose calls must not be slowed down.
INTERNET = (2, WHOLE, *range(16, 29), 128)
SO_ERROR = (1, WHOLE, socket.SOL_SOCKET), (2, WHOLE, socket.SO_ERROR)
UDP = (0, WHOLE, socket.AF_INET, socket.AF_INET6), (1, 15, socket.SOCK_DGRAM)
# A call, its numbers on x86_64 and aarch64, the action, and the tests it depends on.
RULES: list[tuple[Any, ...]] = [
    ("connect", (42, 203), NOTIFY, INTERNET),
    ("bind", (49, 200), NOTIFY, INTERNET),
    ("getsockname", (51, 204), NOTIFY),
    ("getpeername", (52, 205), NOTIFY),
    ("accept", (43, 202), NOTIFY),
    ("accept4", (288, 242), NOTIFY),
    ("getsockopt", (55, 209), NOTIFY, *SO_ERROR),
    ("socket", (41, 198), NOTIFY, *UDP),
    # Libraries do without these.  MPTCP has no simultaneous open; MSG_FASTOPEN connects
    # by itself; io_uring makes calls that no filter sees.
    ("socket", (41, 198), FAIL | errno.EPROTONOSUPPORT, (2, WHOLE, MPTCP)),
    ("sendto", (44, 206), FAIL | errno.EOPNOTSUPP, (3, MSG_FASTOPEN, MSG_FASTOPEN)),
    ("sendmsg", (46, 211), FAIL | errno.EOPNOTSUPP, (2, MSG_FASTOPEN, MSG_FASTOPEN)),
    ("sendmmsg", (307, 269), FAIL | errno.EOPNOTSUPP, (3, MSG_FASTOPEN, MSG_FASTOPEN)),
    ("io_uring_setup", (425, 425), FAIL | errno.ENOSYS),
]
MACHINES = ["x86_64", "aarch64"]
MACHINE = os.uname().machine
COLUMN = MACHINES.index(MACHINE) if MACHINE in MACHINES else 0
AUDIT_ARCH, SECCOMP, KCMP = ((0xC000003E, 317, 312), (0xC00000B7, 277, 272))[COLUMN]
CALLS = {numbers[COLUMN]: name for name, numbers, *_ in RULES}


def install() -> int:
    """Put this process and its children under the filter; return the listener."""
    code = [(RETURN, 0, 0, ALLOW)]
    # Built from its end, so that the jumps have a known length: if true, if false.
    for _, numbers, action, *tests in RULES:
        rest = len(code)
        code.insert(0, (RETURN, 0, 0, action))
        for argument, mask, *values in reversed(tests):
            for n, value in enumerate(values):
                code.insert(0, (EQUAL, n, 0 if n else len(code) - rest, value))
            # The low half of an argument, in struct seccomp_data.
            code[:0] = (LOAD, 0, 0, 16 + 8 * argument), (AND, 0, 0, mask)
        code[:0] = (LOAD, 0, 0, 0), (EQUAL, 0, len(code) - rest, numbers[COLUMN])
    code[:0] = (LOAD, 0, 0, 4), (EQUAL, 1, 0, AUDIT_ARCH), (RETURN, 0, 0, ALLOW)
    # An array of struct sock_filter.
    program = b"".join(struct.pack("=HBBI", *one) for one in code)
    array = ctypes.create_string_buffer(program, len(program))
    # struct sock_fprog has a length, and on the next word a pointer.
    fields = (ctypes.c_size_t * 2)(len(code), ctypes.addressof(array))
    flags = NEW_LISTENER | WAIT_KILLABLE_RECV
    system(LIBC.prctl, NO_NEW_PRIVS, 1, 0, 0, 0)
    return system(LIBC.syscall, SECCOMP, 1, flags, ctypes.addressof(fields))


# --- Addresses ----------------------------------------------------------------


class Endpoint(NamedTuple):
    """An address and a port; an IPv4-mapped IPv6 address is kept as IPv4."""

    packed: bytes
    port: int

    @property
    def family(self) -> int:
        return socket.AF_INET if len(self.packed) == 4 else socket.AF_INET6

    def pair(self, family: int = 0) -> tuple[str, int]:
        """Return host and port, as a socket of a family wants them."""
        host = socket.inet_ntop(self.family, self.packed)
        mapped = family == socket.AF_INET6 and self.family == socket.AF_INET
        return f"::ffff:{host}" if mapped else host, self.port

    def __str__(self) -> str:
        host, port = self.pair()
        return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


Blocks = list[ipaddress.IPv4Network | ipaddress.IPv6Network]
MAPPED = bytes(10) + b"\xff\xff"
NOWHERE = Endpoint(bytes(4), 0)


def unmapped(packed: bytes) -> bytes:
    return packed[12:] if packed[:12] == MAPPED and len(packed) == 16 else packed


def endpoint(address: tuple[Any, ...]) -> Endpoint:
    """Return the endpoint of an address as Python's sockets tell it."""
    host, _, _ = address[0].partition("%")  # as in fe80::1%eth0
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    return Endpoint(unmapped(socket.inet_pton(family, host)), address[1])


def parse_blocks(text: str) -> Blocks:
    """Return the networks that a text names; raise ValueError."""
    words = text.replace(",", " ").split()
    return [ipaddress.ip_network(word, strict=False) for word in words]


def within(blocks: Blocks, packed: bytes) -> bool:
    address = ipaddress.ip_address(packed)
    return any(address in block for block in blocks)


# No gateway reaches these for us: this host, its links, multicast.
OWN = "0.0.0.0/8 127.0.0.0/8 169.254.0.0/16 224.0.0.0/3 ::/127 fe80::/10 ff00::/8"
LINKED = parse_blocks("::1 fe80::/10")  # no route to them leads out of a namespace
PRIVATE = "10.0.0.0/8 172.16.0.0/12 192.168.0.0/16 fc00::/7"


# --- Settings -----------------------------------------------------------------
#
# A program whose own section does not have a setting has that of [natrun].


def parse_choice(words: str, text: str) -> str:
    """Return a text that is one of some words; raise ValueError."""
    if text not in words.split():
        raise ValueError(f"{text!r} is not one of: {words}")
    return text


def parse_ports(text: str) -> set[int]:
    """Return the ports that a text names; raise ValueError."""
    found = set[int]()
    for word in text.replace(",", " ").split():
        match = re.fullmatch(r"([0-9]+)(?:-([0-9]+))?", word)
        ports = range(int(match[1]), int(match[2] or match[1]) + 1) if match else None
        if not ports or ports[-1] > 65535:
            raise ValueError(f"{word!r} is not a range of ports")
        found.update(ports)
    return found


# Those of the run stand in [natrun] only.  Each has its default and its parser.
OF_RUN = ("gateway", "user", "password")
SETTINGS: dict[str, tuple[str, Callable[[str], Any]]] = {
    **dict.fromkeys(OF_RUN, ("", str)),
    "redirect": ("yes", functools.partial(parse_choice, "yes no")),
    "dns": ("gateway", functools.partial(parse_choice, "gateway local fake")),
    "direct": ("", parse_blocks),
    "direct_ports": ("", parse_ports),
    "listen": ("", parse_ports),
    "udp": ("yes", functools.partial(parse_choice, "yes local no")),
}
Settings = types.SimpleNamespace
Programs = defaultdict[str, Settings]


def read_settings(path: str) -> Programs:
    """Return the settings of programs by their names; raise Fault with what is wrong.

    Without a path they are read from the user's file, else from the machine's.
    """
    import configparser

    home = os.environ.get("XDG_CONFIG_HOME") or os.path.expanduser("~/.config")
    found = filter(os.path.exists, [f"{home}/natrun.conf", "/etc/natrun.conf"])
    at = path = path or next(found, os.devnull)
    usual = {name: default for name, (default, _) in SETTINGS.items()}
    parser = configparser.RawConfigParser(usual, default_section="natrun")
    programs: dict[str, Settings] = {}
    try:
        with open(path, encoding="utf-8-sig") as file:
            parser.read_file(file)
        if parser.has_section("DEFAULT"):
            raise ValueError("[DEFAULT] is not a program: use [natrun] for all")
        for section, texts in parser.items():
            # /proc/PID/comm has only the first 15 bytes of a program's name.
            known = section.encode()[:15].decode(errors="replace")
            program = programs[known] = Settings()
            for name, text in texts.items():
                at = f"{path}, [{section}] {name}"
                misplaced = name in OF_RUN and parser.defaults()[name] != text
                if name not in SETTINGS or misplaced:
                    raise ValueError(f"there is no such setting: {' '.join(SETTINGS)}")
                setattr(program, name, SETTINGS[name][1](text))
    except (OSError, ValueError, configparser.Error) as error:
        raise Fault(f"cannot use {at}: {reason(error).splitlines()[0]}") from None
    return defaultdict(lambda: programs["natrun"], programs)


# --- The gateway --------------------------------------------------------------
#
# NATWork, whose /lat.json has the Local Address Table, or any other SOCKS 5 server.

CONNECT, ASSOCIATE, RESOLVE, RESOLVE_PTR = 1, 3, 0xF0, 0xF1  # the last two are Tor's
# Replies, RFC 1928 section 6, and the errno of connect() on the gateway for each.
REPLIES = {2: errno.EACCES, 3: errno.ENETUNREACH, 5: errno.ECONNREFUSED}
REPLIES |= {6: errno.ETIMEDOUT, 7: errno.EOPNOTSUPP, 8: errno.EAFNOSUPPORT}
DOMAIN = 3  # the type of an address that is a name
OWN_IPV6 = b"\xfdnatru" + bytes(9) + b"\1"  # of the namespace, if the LAT has no other
DATAGRAMS = socket.SOCK_DGRAM | socket.SOCK_NONBLOCK
PMP_PORT = 5351
LACKS = "the gateway does not offer it"
RESULTS = {2: errno.EACCES, 3: errno.ENETUNREACH, 5: errno.EOPNOTSUPP}  # NAT-PMP's
T = TypeVar("T")
NO_LAT = LookupError, TypeError, AttributeError, ValueError, ConnectionResetError
PLACE = re.compile(
    r"(https?://|socks5://)?(?:\[(.+)\]|([^:/]+|[^/]*:[^/]*:[^/]*))(?::(\d+))?/?"
)


async def timed(steps: Awaitable[T], seconds: float) -> T:
    """Return the result of steps; raise OSError, ETIMEDOUT if they take too long."""
    try:
        return await asyncio.wait_for(steps, seconds)
    except asyncio.TimeoutError:  # before Python 3.11 not the built-in TimeoutError
        raise failure(errno.ETIMEDOUT) from None


async def readable(sock: socket.socket) -> None:
    """Wait until there is something to receive or accept."""
    loop, ready = asyncio.get_running_loop(), asyncio.Event()
    loop.add_reader(sock, ready.set)
    try:
        await ready.wait()
    finally:
        loop.remove_reader(sock)


async def receive(sock: socket.socket, size: int) -> bytes:
    """Return the next bytes of a stream, exactly so many; raise OSError."""
    data = b""
    while len(data) < size:
        piece = await asyncio.get_running_loop().sock_recv(sock, size - len(data))
        if not piece:
            raise ConnectionResetError(errno.ECONNRESET, "it has closed")
        data += piece
    return data


def request_of(command: int, where: Endpoint | bytes) -> bytes:
    """Return a SOCKS request about an endpoint or a name with its port."""
    if isinstance(where, bytes):
        return bytes([5, command, 0, DOMAIN, len(where) - 2]) + where
    kind = len(where.packed) // 4  # 1 is IPv4, 4 is IPv6
    return bytes([5, command, 0, kind]) + where.packed + where.port.to_bytes(2, "big")


class Gateway:
    """The gateway's address, our user there, and its Local Address Table."""

    def __init__(self, at: Endpoint, lat: dict[str, Any], programs: Programs) -> None:
        """Take what /lat.json says, or {} for a SOCKS server other than NATWork."""
        self.at, self.natwork, self.programs = at, bool(lat), programs
        if lat.get("socks"):
            host, _, port = lat["socks"].rpartition(":")
            self.at = endpoint((host.strip("[]"), int(port)))
        near = [OWN, self.at.pair()[0], *lat.get("inside", [PRIVATE])]
        self.inside = parse_blocks(" ".join(near))
        self.outside = parse_blocks(" ".join(lat.get("outside", ())))
        # The first address of each family: going backwards, it is stored last.
        self.own = {4: bytes(4), 16: OWN_IPV6}
        for block in reversed(self.outside):
            self.own[block.max_prefixlen // 8] = block.network_address.packed
        self.domains = [str(one).lower().strip(".") for one in lat.get("domains", ())]
        # NAT-PMP has no IPv6.
        self.mappings = bool(lat.get("mappings")) and len(self.at.packed) == 4
        self.udp = bool(lat.get("udp"))
        settings, self.user = programs["natrun"], str(os.getuid())
        with contextlib.suppress(KeyError):
            self.user = pwd.getpwuid(os.getuid()).pw_name
        self.user, self.password = settings.user or self.user, settings.password

    def is_near(self, app: str, target: Endpoint) -> bool:
        """Return whether a program reaches a target without the gateway."""
        program = self.programs[app]
        near = within(self.inside + program.direct, target.packed)
        return near or target.port in program.direct_ports or program.redirect == "no"

    def login(self, app: str) -> list[bytes]:
        """Return the user, with claims for the gateway's log, and the password."""
        fits = self.natwork or not self.password  # NATWork cuts a user at the ";"
        claimed = f";app={app};host={socket.gethostname()}" if fits else ""
        return [(self.user + claimed).encode()[:255], self.password.encode()[:255]]

    async def talk(self, sock: socket.socket, request: bytes, app: str) -> Endpoint:
        """Connect a socket to the gateway, and send it a program's request.

        Returns the endpoint in its answer, whose address may be a name.  Raises OSError
        if the request failed, Lost if the gateway itself cannot be used.
        """
        sock.setblocking(False)
        loop, address = asyncio.get_running_loop(), self.at.pair(sock.family)
        try:
            await timed(loop.sock_connect(sock, address), REACH_TIME)
        except OSError as error:
            raise Lost(errno.ENETUNREACH, reason(error)) from None
        try:
            return await timed(self.ask(sock, request, app), ANSWER_TIME)
        except (ConnectionResetError, BrokenPipeError) as error:
            if self.natwork:
                raise Lost(errno.ENETUNREACH, reason(error)) from None
            # ssh -D closes without a reply if it could not make the connection.
            raise failure(errno.ECONNREFUSED) from None

    async def ask(self, sock: socket.socket, request: bytes, app: str) -> Endpoint:
        """Log in over a socket, send a request, and return the endpoint answered."""
        loop, who = asyncio.get_running_loop(), self.login(app)
        methods = b"\2" if self.natwork else b"\0\2" if who[1] else b"\0"
        hello = bytes([5, len(methods)]) + methods
        proof = b"\1" + b"".join(bytes([len(word)]) + word for word in who)
        if self.natwork:  # it asks for a name in any case: it is told all at once
            hello, proof, request = hello + proof + request, b"", b""
        await loop.sock_sendall(sock, hello)
        version, method = await receive(sock, 2)
        if version != 5 or method not in methods:
            raise Lost(errno.EACCES, "it wants another way to log in")
        if method == 2:
            if proof:  # to send nothing fails, too, if a reset follows what is there
                await loop.sock_sendall(sock, proof)
            if (await receive(sock, 2))[1]:
                why = "it lets in nobody without a user and password that it knows"
                raise Lost(errno.EACCES, why)
        if request:
            await loop.sock_sendall(sock, request)
        _, reply, _, kind = await receive(sock, 4)
        if reply:
            raise failure(REPLIES.get(reply, errno.EHOSTUNREACH))
        size = (await receive(sock, 1))[0] if kind == DOMAIN else 4 * kind
        found = await receive(sock, size + 2)
        return Endpoint(unmapped(found[:-2]), int.from_bytes(found[-2:], "big"))

    def errno_of(self, error: OSError) -> int:
        """Return the errno of an error; say once if the gateway itself is to blame."""
        if isinstance(error, Lost):
            say_once(f"cannot use the gateway {self.at}: {reason(error)}")
        return max(error.errno or 0, 0) or errno.EIO  # those of names are negative

    async def map(self, *lease: int) -> bytes:
        """Have the gateway map a port, or tell its address, by NAT-PMP: RFC 6886."""
        loop, at = asyncio.get_running_loop(), Endpoint(self.at.packed, PMP_PORT)
        request = struct.pack("!BBHHHI", 0, 2, 0, *lease) if lease else bytes(2)
        with socket.socket(at.family, DATAGRAMS) as sock:
            sock.connect(at.pair())
            for pause in (0.125, 0.25, 0.5):
                with contextlib.suppress(TimeoutError, ConnectionRefusedError):
                    await loop.sock_sendall(sock, request)
                    answer = await timed(loop.sock_recv(sock, 16), pause)
                    break
                await asyncio.sleep(pause)  # section 3.1; after ECONNREFUSED, too
            else:
                raise Lost(errno.ENETUNREACH, "it does not answer NAT-PMP")
        if result := int.from_bytes(answer[2:4], "big"):
            raise failure(RESULTS.get(result, errno.EADDRNOTAVAIL))
        return answer[8:12]


async def fetch(at: Endpoint, path: str, login: bytes = b"") -> Any:
    """Return a page that is JSON; raise OSError, or ValueError."""
    proof = binascii.b2a_base64(login, newline=False).decode()
    field = f"Authorization: Basic {proof}\r\n" if login else ""
    reader, writer = await timed(asyncio.open_connection(*at.pair()), FIND_TIME)
    with contextlib.closing(writer):
        writer.write(f"GET {path} HTTP/1.0\r\nHost: {at}\r\n{field}\r\n".encode())
        page = await timed(reader.read(), FIND_TIME)
    return json.loads(page.partition(b"\r\n\r\n")[2])


def look(text: str, port: int, named: bool, programs: Programs) -> Gateway:
    """Return the gateway at a place; raise OSError, or ValueError if it is not one.

    A place that the user named is a SOCKS server if it answers no HTTP, or closes.
    """
    match = PLACE.fullmatch(text)
    if not match or int(match[4] or 0) > 65535:
        raise ValueError("it is not HOST, HOST:PORT or socks5://HOST:PORT")
    host, port = match[2] or match[3], int(match[4] or port)
    at = endpoint(socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][4])
    if match[1] != "socks5://":
        try:
            lat = asyncio.run(fetch(at, "/lat.json"))
            return Gateway(at, {"inside": lat["inside"], **lat}, programs)
        except (*NO_LAT, RecursionError):  # the last by a page of brackets
            if not named:
                raise ValueError("it has no /lat.json") from None
            say(f"{at} has no /lat.json, so it is taken for a SOCKS server")
    return Gateway(at, {}, programs)


def find_gateway(option: str, programs: Programs) -> Gateway:
    """Return the gateway that is named, or one that is found; raise Fault."""
    named = option or os.environ.get("NATRUN_GATEWAY") or programs["natrun"].gateway
    # Of default routes.  The table has addresses in hex, in this machine's byte order.
    routers = [row[2] for row in rows("/proc/net/route") if row[1] == "0" * 8 != row[2]]
    places = [(named, 8080)] if named else [("wpad", 80)]
    tried = [] if named or routers else ["no default route"]
    if routers and not named:
        places.append((socket.inet_ntoa(struct.pack("=I", int(routers[0], 16))), 8080))
    # There may be no name server.  The command does not see this: it has os.environ.
    os.putenv("RES_OPTIONS", "timeout:1 attempts:1")
    for text, port in places:
        try:
            return look(text, port, bool(named), programs)
        except (OSError, ValueError) as error:
            tried.append(f"{text}: {reason(error)}")
    what = "cannot use the gateway" if named else "cannot find a gateway (-g names it)"
    raise Fault(f"{what}: {'; '.join(tried)}")


# --- The helper ---------------------------------------------------------------
#
# A process, forked while natrun is small.  It makes the sockets of UDP, in a network
# namespace whose only way out is a cable (veth) to us.  It is also the relay of the
# waiting room: by splice(2) it joins connections to the program and the gateway, until
# they have ended.  Numbers are from <linux/rtnetlink.h> and <linux/if_link.h>.

NEWLINK, SETLINK, NEWADDR, NEWROUTE = 16, 19, 20, 24
UP_NOARP, NODAD = 0x81, 0x2
DEFAULTS = parse_blocks("0.0.0.0/0 ::/0")
JOIN = b"+"  # asks to join the two sockets that are sent with it
ESTABLISHED, CLOSED = 1, 7  # states of TCP
SYSCTLS = {
    "ipv4/ip_nonlocal_bind": "1",
    "ipv6/ip_nonlocal_bind": "1",
    "ipv4/ip_local_port_range": "16384 32767",  # the machine's own range is above
    "ipv4/conf/all/route_localnet": "1",  # name servers are often on loopback
}


def attribute(kind: int, data: bytes) -> bytes:
    """Return a struct rtattr."""
    return struct.pack("=HH", 4 + len(data), kind) + data + bytes(-len(data) % 4)


def change(netlink: socket.socket, kind: int, *parts: bytes) -> None:
    """Send a request to netlink and take its answer; raise OSError."""
    body, flags = b"".join(parts), 0x605  # REQUEST, ACK, CREATE, EXCL
    netlink.send(struct.pack("=IHHII", 16 + len(body), kind, flags, 1, 0) + body)
    (code,) = struct.unpack_from("=i", netlink.recv(4096), 16)
    if code:
        raise failure(-code)


def make_namespace(outside: Blocks, inside: Blocks) -> socket.socket:
    """Put this process into a namespace with a cable; return the cable's other end."""
    addresses, routes = [block.network_address for block in outside], {*DEFAULTS}
    if all(address.version == 4 for address in addresses):
        # The gateway carries no IPv6, so IPv6 reaches the inside only.
        addresses.append(ipaddress.ip_address(OWN_IPV6))
        routes = {DEFAULTS[0], *(block for block in inside if block.version == 6)}
    system(LIBC.unshare, NEWUSER | NEWNET)
    for name, value in SYSCTLS.items():
        with contextlib.suppress(OSError), open(f"/proc/sys/net/{name}", "w") as file:
            file.write(value)
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0) as netlink:
        # IFLA_MTU: the largest datagram fits.  IFLA_GSO_MAX_SEGS: one in each packet.
        sizes = attribute(4, struct.pack("=I", 65535)), attribute(40, b"\1\0\0\0")
        kind = attribute(18, attribute(1, b"veth"))
        change(netlink, NEWLINK, bytes(16), *sizes, kind)
        near, far = map(socket.if_nametoindex, ("veth0", "veth1"))  # indexes vary
        for index in (near, far):
            head = struct.pack("=BxHiII", 0, 0, index, UP_NOARP, UP_NOARP)
            change(netlink, SETLINK, head)
        for address in addresses:
            family, own = Endpoint(address.packed, 0).family, address.packed
            head = struct.pack("=BBBBI", family, address.max_prefixlen, NODAD, 0, near)
            change(netlink, NEWADDR, head, attribute(1, own), attribute(2, own))
        device = attribute(4, struct.pack("=i", near))
        for block in routes:
            low = block.network_address.packed
            family, bits = Endpoint(low, 0).family, block.prefixlen
            # Main table, static, unicast.
            head = struct.pack("=BBBBBBBBI", family, bits, 0, 0, 254, 4, 0, 1, 0)
            change(netlink, NEWROUTE, head, attribute(1, low), device)
    cable = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, 0)
    cable.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 22)
    cable.bind(("veth1", 3))  # ETH_P_ALL
    return cable


def state_of(sock: socket.socket) -> int:
    """Return the state of TCP, the first byte of struct tcp_info."""
    state: bytes = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)
    return state[0]


def carry(source: socket.socket, sink: socket.socket) -> None:
    """Move bytes from one socket to another until the end; pass a reset on."""
    try:
        out, into = os.pipe()
        with open(out, "rb", 0), open(into, "wb", 0):  # to close them at the end
            while True:
                if not (size := os.splice(source.fileno(), into, PIPE_SIZE)):
                    if not (data := source.recv(65536)):  # else it was an urgent byte
                        break
                    sink.sendall(data)
                if size == 65536:  # the pipe was full: bulk comes
                    with contextlib.suppress(OSError):
                        fcntl.fcntl(into, fcntl.F_SETPIPE_SZ, PIPE_SIZE)
                while size:
                    size -= os.splice(out, sink.fileno(), size)
        # A reset is told to one direction; to the other it looks like an end.
        failed = sink.getsockopt(socket.SOL_SOCKET, socket.SO_LINGER)
        if not failed and (state_of(source), state_of(sink)) != (CLOSED, ESTABLISHED):
            sink.shutdown(socket.SHUT_WR)
    except OSError:
        for sock in (source, sink):
            with contextlib.suppress(OSError):
                linger = struct.pack("ii", 1, 0)
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                sock.shutdown(socket.SHUT_RD)  # wakes the other direction's thread


def join(near: socket.socket, server: socket.socket) -> None:
    """Relay between two sockets until both directions have ended."""
    with near, server:
        for sock in (near, server):
            sock.setblocking(True)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, ALIVE_TIME)
        back = threading.Thread(target=carry, args=(server, near))
        back.start()
        carry(near, server)
        back.join()


def give(control: socket.socket, make: Callable[..., socket.socket], *how: Any) -> None:
    """Send the socket that a function makes, or the errno of why there is none."""
    try:
        with make(*how) as made:  # EMFILE holds if the receiver has no descriptor left
            socket.send_fds(control, [b"%d" % errno.EMFILE], [made.fileno()])
    except Exception as error:
        control.send(b"%d" % (getattr(error, "errno", 0) or errno.EIO))


def help_out(control: socket.socket, *blocks: Blocks) -> None:
    """Make and join sockets, until nobody asks and nothing is under way."""
    # Else a reader of natrun's output would wait until the helper ends.
    for fd in range(3):
        os.dup2(os.open(os.devnull, os.O_RDWR), fd)
    threading.stack_size(128 * 1024)  # glibc takes no less on ARM64
    give(control, make_namespace, *blocks)
    while True:
        asked, fds, _, _ = socket.recv_fds(control, 8, 2)
        if not asked:
            break
        if asked != JOIN:
            give(control, socket.socket, *struct.unpack("=ii", asked))
            continue
        socks = [socket.socket(fileno=fd) for fd in fds]
        if len(socks) == 2:  # fewer come if this process has no descriptor left
            with contextlib.suppress(RuntimeError):  # no thread can start
                threading.Thread(target=join, args=socks).start()
    for thread in threading.enumerate()[1:]:
        thread.join()


class Helper:
    """The helper, as the supervisor sees it."""

    def __init__(self, *blocks: Blocks) -> None:
        self.control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.pid, self.turn = os.fork(), asyncio.Lock()
        if not self.pid:
            try:
                self.control.close()
                help_out(theirs, *blocks)
            finally:
                os._exit(0)
        theirs.close()
        self.barred = ""  # why there is no namespace
        try:
            self.cable = self.take()
        except OSError as error:
            self.barred = f"the kernel gives no namespace: {reason(error)}"
        self.control.setblocking(False)  # we must not wait for a helper that is stopped

    def take(self) -> socket.socket:
        """Receive the socket that the helper has made; raise OSError."""
        said, fds, _, _ = socket.recv_fds(self.control, 8, 1)
        if fds:
            os.set_inheritable(fds[0], False)
            return socket.socket(fileno=fds[0])
        raise failure(int(said or errno.EIO))  # nothing is said if it has been killed

    async def make(self, family: int, kind: int) -> socket.socket:
        """Return a socket of the namespace; raise OSError."""
        async with self.turn:
            self.control.send(struct.pack("=ii", family, kind))
            await readable(self.control)
            made = self.take()
        made.setsockopt(socket.IPPROTO_UDP, 102, 1)  # UDP_NO_CHECK6_RX
        return made

    def join(self, *socks: socket.socket) -> None:
        """Have the helper relay between two sockets; raise OSError."""
        try:
            socket.send_fds(self.control, [JOIN], [sock.fileno() for sock in socks])
        except OSError as error:
            say_once(f"the helper takes no connection: {reason(error)}")
            raise


# --- Names --------------------------------------------------------------------
#
# We answer what a program sends to port 53.  The gateway looks names up, so the program
# connects to true addresses.  Another SOCKS server cannot: then a name gets an address
# of 198.18.0.0/15, which no host has (RFC 2544), and connect() to that asks the server
# for the name.  Names without a dot, and those of the LAT's domains, are asked of the
# machine's own name server.

A, PTR, AAAA, SVCB, HTTPS = 1, 12, 28, 64, 65
FAILED, NO_NAME, TRUNCATED = 2, 3, 0x200  # RFC 1035 section 4.1.1
NAME = re.compile(rb"(?!.{254})[-\w]+(\.[-\w]+)*")


def read_question(query: bytes) -> tuple[bytes, int, int]:
    """Return the name and type that a query asks for, and where its question ends.

    The name is empty if this is not a query for one name: RFC 1035 section 4.1.
    """
    labels, at, one = [], 12, b"\0\1"  # QDCOUNT 1, and class IN
    with contextlib.suppress(IndexError):
        while size := query[at]:
            labels.append(query[at + 1 : at + 1 + size])
            at += 1 + size
        name, kind, end = b".".join(labels).lower(), query[at + 1 : at + 3], at + 5
        if query[4:6] == query[at + 3 : end] == one and NAME.fullmatch(name):
            return name, int.from_bytes(kind, "big"), end
    return b"", 0, 12


def reply_to(query: bytes, end: int, code: int, kind: int, data: bytes) -> bytes:
    """Return the response to a query whose question ends at end, with data if any."""
    flags = 0x8080 | query[2] << 8 & 0x100 | code
    record = struct.pack("!HHHIH", 0xC00C, kind, 1, NAME_TIME, len(data)) + data
    head = query[:2] + struct.pack("!HHHHH", flags, end > 12, bool(data), 0, 0)
    return head + query[12:end] + (record if data else b"")


def reversed_address(name: bytes) -> bytes:
    """Return the address that a name of in-addr.arpa or ip6.arpa stands for."""
    with contextlib.suppress(ValueError):
        *digits, zone, _ = name.split(b".")
        if zone == b"in-addr" and len(digits) == 4:
            return bytes(map(int, digits[::-1]))
        if zone == b"ip6" and len(digits) == 32:
            return bytes.fromhex(b"".join(digits[::-1]).decode())
    return b""


class Names:
    """The addresses of names, for all programs of a run."""

    def __init__(self, gateway: Gateway) -> None:
        self.gateway = gateway
        self.known: dict[bytes, asyncio.Future[bytes]] = {}
        self.called: dict[bytes, bytes] = {}  # names by fake address

    async def answer(
        self, query: bytes, server: Endpoint, app: str, reply: Callable[[bytes], Any]
    ) -> None:
        """Answer a query that a program sent to a name server, by calling reply."""
        query = query.ljust(12, b"\0")  # at least a whole head
        (name, kind, end), code, data, response = read_question(query), 0, b"", b""
        target = reversed_address(name) if kind == PTR else b""
        ends = tuple(f".{one}".encode() for one in ("localhost", *self.gateway.domains))
        local = b"." not in name or (b"." + name).endswith(ends)
        try:
            if target and not within(self.gateway.inside, target):
                data = await self.look_back(target, app)
            elif local and not within(self.gateway.inside, server.packed):
                code = NO_NAME  # a server outside does not know it
            elif local or kind not in (A, AAAA, SVCB, HTTPS):
                response = await timed(self.forward(query, server, app), QUERY_TIME)
                room = int.from_bytes(query[end + 3 : end + 5], "big")  # by RFC 6891
                if len(response) > max(room, 512):
                    response, code = b"", TRUNCATED  # it is to ask again, by TCP
            elif kind in (A, AAAA):  # SVCB and HTTPS get an answer without data
                found = await self.look_up(name, app)
                data = found if len(found) == (4 if kind == A else 16) else b""
        except OSError as error:
            unknown = self.gateway.errno_of(error) == errno.EHOSTUNREACH
            code = NO_NAME if unknown else FAILED
        with contextlib.suppress(OSError):  # the reply is lost, as a datagram may be
            reply(response or reply_to(query, end, code, kind, data))

    async def forward(self, query: bytes, server: Endpoint, app: str) -> bytes:
        """Return a name server's answer, through the gateway if it is outside."""
        loop = asyncio.get_running_loop()
        if within(self.gateway.inside, server.packed):
            with socket.socket(server.family, DATAGRAMS) as sock:
                sock.connect(server.pair())
                await loop.sock_sendall(sock, query)
                return await loop.sock_recv(sock, 65535)
        with socket.socket(self.gateway.at.family) as sock:
            await self.gateway.talk(sock, request_of(CONNECT, server), app)
            # RFC 1035 section 4.2.2: by TCP, a length comes first.
            await loop.sock_sendall(sock, len(query).to_bytes(2, "big") + query)
            return await receive(sock, int.from_bytes(await receive(sock, 2), "big"))

    async def look_up(self, name: bytes, app: str) -> bytes:
        """Return the address of a name; raise OSError."""
        if self.gateway.programs[app].dns == "fake" or not self.gateway.natwork:
            return self.fake(name)
        if name not in self.known:
            # A resolver asks for A and AAAA at once: look up once for both.
            steps = self.resolve(request_of(RESOLVE, name + bytes(2)), app)
            self.known[name] = asyncio.ensure_future(steps)
            asyncio.get_running_loop().call_later(NAME_TIME, self.known.pop, name)
        return await self.known[name]

    def fake(self, name: bytes) -> bytes:
        """Return an address that stands for a name."""
        for number in range(binascii.crc32(name), 1 << 33):
            address = (0xC6120001 + number % 131071).to_bytes(4, "big")  # 198.18.0.1
            if self.called.setdefault(address, name) == name:
                break
        if len(self.called) > RECORDS:
            del self.called[next(iter(self.called))]
        return address

    async def look_back(self, target: bytes, app: str) -> bytes:
        """Return the name of an address as a PTR record has it; raise OSError."""
        request = request_of(RESOLVE_PTR, Endpoint(target, 0))
        name = self.called.get(target) or await self.resolve(request, app)
        labels = [label[:63] for label in name[:253].strip(b".").split(b".")]
        return b"".join(bytes([len(label)]) + label for label in labels) + b"\0"

    async def resolve(self, request: bytes, app: str) -> bytes:
        """Return what the gateway finds for a name or an address; raise OSError."""
        with socket.socket(self.gateway.at.family) as sock:
            return (await self.gateway.talk(sock, request, app)).packed


# --- Calls --------------------------------------------------------------------

# In place of an errno: the kernel is to do the call itself; the call is answered.
PROCEED, ANSWERED = -1, -2


class Call:
    """A notification: a thread has made a call, and waits for our answer."""

    def __init__(self, listener: int) -> None:
        """Receive a notification; raise OSError."""
        raw = bytearray(80)  # the kernel wants zeros
        fcntl.ioctl(listener, NOTIF_RECV, raw)
        # struct seccomp_notif, with its struct seccomp_data
        self.id, self.tid, _, number, *_ = fields = struct.unpack("=QIIiIQ6Q", raw)
        self.listener, self.name, self.arguments = listener, CALLS[number], fields[6:]
        self.fd = fields[6] & WHOLE  # the socket, if the call has one

    @functools.cached_property
    def app(self) -> str:
        """Return the name of the program, whatever a thread of it is called."""
        with contextlib.suppress(OSError):
            process = int(self.read_proc("status")["Tgid"])
            with open(f"/proc/{process}/comm", errors="replace") as file:
                return file.read().rstrip("\n")
        return "?"

    def answer(self, error: int) -> None:
        proceed = error == PROCEED
        fields = self.id, 0, 0 if proceed else -error, CONTINUE if proceed else 0
        with contextlib.suppress(OSError):  # the caller has been killed
            fcntl.ioctl(self.listener, NOTIF_SEND, struct.pack("=QqiI", *fields))

    def give(self, sock: socket.socket, flags: int, fd: int | None = None) -> None:
        """Answer with a new descriptor of our socket, or put the socket in place of fd.

        Flags are O_NONBLOCK and O_CLOEXEC, or their equals SOCK_NONBLOCK, SOCK_CLOEXEC.
        """
        sock.setblocking(not flags & os.O_NONBLOCK)
        how = ADDFD_SEND if fd is None else ADDFD_SETFD
        fields = self.id, how, sock.fileno(), fd or 0, flags & os.O_CLOEXEC
        fcntl.ioctl(self.listener, NOTIF_ADDFD, struct.pack("=QIIII", *fields))

    def check(self) -> None:
        """Raise OSError if nobody waits for the answer any more."""
        fcntl.ioctl(self.listener, NOTIF_ID_VALID, struct.pack("=Q", self.id))

    def read_proc(self, name: str) -> dict[str, str]:
        """Return the lines of a file about the thread in /proc; raise OSError."""
        with open(f"/proc/{self.tid}/{name}", errors="replace", newline="\n") as file:
            return dict(line.split(":", 1) for line in file)

    def interruption(self) -> int:
        """Return the errno if the caller is dead or has to see a signal; else 0.

        A signal to the process goes to its first thread.  If that blocks it, the kernel
        does not say which thread gets it, so answer EINTR: ERESTARTSYS is only for the
        thread that has a signal, and for a stop, for which all threads must stop.
        """
        try:
            self.check()
            status = self.read_proc("status")
            first = self.read_proc(f"task/{int(status['Tgid'])}/status")
        except OSError as error:  # ENOENT: it is dead; else no descriptor is left
            return ERESTARTSYS if error.errno == errno.ENOENT else 0
        names = "SigPnd", "ShdPnd", "SigBlk", "SigIgn"
        own, shared, blocked, ignored = (int(status[name], 16) for name in names)
        own, shared = own & ~(blocked | ignored), shared & ~(blocked | ignored)
        if own or "T" in first["State"] or shared and first["Pid"] == status["Pid"]:
            return ERESTARTSYS
        barred = -1 if "Z" in first["State"] else int(first["SigBlk"], 16)  # -1: all
        return errno.EINTR if shared & barred else 0

    async def wait(self, steps: Awaitable[T]) -> T:
        """Return the result of steps; cancel them for a signal, and raise OSError.

        WAIT_KILLABLE_RECV leaves it to us: the kernel would end a connect() half done.
        """
        task = asyncio.ensure_future(steps)
        while not (await asyncio.wait({task}, timeout=LOOK_TIME))[0]:
            if error := self.interruption():
                task.cancel()
                await asyncio.wait({task})  # until it has let go of the socket
                raise failure(error)
        return task.result()

    def borrow(self) -> socket.socket:
        """Return the socket that the call is about; raise OSError.

        It shares the program's file description: what we set on it is set there.
        """
        try:
            process = os.pidfd_open(self.tid, PIDFD_THREAD)
        except OSError:  # before Linux 6.9, if the first thread has the same
            first = int(self.read_proc("status")["Tgid"])
            if LIBC.syscall(KCMP, self.tid, first, KCMP_FILES, 0, 0) > 0:
                raise failure(errno.EPERM) from None
            process = os.pidfd_open(first)
        with open(process, "rb", 0):  # which closes it
            fd = system(LIBC.syscall, PIDFD_GETFD, process, self.fd, 0)
        try:
            self.check()  # else the tid may be that of another thread by now
            return socket.socket(fileno=fd)
        except OSError:
            os.close(fd)
            raise

    def copy(self, function: Callable[..., int], there: int, here: Any) -> None:
        """Copy between the program's memory and a buffer; raise OSError."""
        size = ctypes.sizeof(here)
        ours = (ctypes.c_size_t * 2)(ctypes.addressof(here), size)  # struct iovec
        theirs = (ctypes.c_size_t * 2)(there, size)
        if size and system(function, self.tid, ours, 1, theirs, 1, 0) < size:
            raise failure(errno.EFAULT)

    def read(self, there: int, size: int) -> bytes:
        """Return what stands in the program's memory; raise OSError."""
        here = ctypes.create_string_buffer(size)
        self.copy(LIBC.process_vm_readv, there, here)
        self.check()
        return here.raw

    def write(self, raw: bytes, there: int, size_at: int) -> int:
        """Write raw, as much as has room, and its size; return or raise the errno."""
        room = int.from_bytes(self.read(size_at, 4), sys.byteorder, signed=True)
        if room < 0:
            return errno.EINVAL
        size = len(raw).to_bytes(4, sys.byteorder)
        for at, data in (there, raw[:room]), (size_at, size):
            self.copy(LIBC.process_vm_writev, at, (ctypes.c_ubyte * len(data))(*data))
        return 0

    def target(self) -> Endpoint | None:
        """Return the endpoint in a call's sockaddr, if it is of IP; raise OSError."""
        raw = self.read(self.arguments[1], self.arguments[2] & 0xFF)  # struct sockaddr
        family, port = int.from_bytes(raw[:2], sys.byteorder), raw[2:4]
        parts: dict[int, bytes] = {socket.AF_INET: raw[4:8], socket.AF_INET6: raw[8:24]}
        if len(packed := parts.get(family, b"")) not in (4, 16):
            return None
        return Endpoint(unmapped(packed), int.from_bytes(port, "big"))

    def write_address(self, family: int, where: Endpoint) -> int:
        """Write a sockaddr, 0.0.0.0 for IPv6 in AF_INET; return or raise the errno."""
        raw = family.to_bytes(2, sys.byteorder) + where.port.to_bytes(2, "big")
        is_ipv4 = where.family == socket.AF_INET
        if family == socket.AF_INET:
            raw += (where.packed if is_ipv4 else bytes(4)) + bytes(8)
        else:
            raw += bytes(4) + MAPPED * is_ipv4 + where.packed + bytes(4)
        return self.write(raw, *self.arguments[1:3])


@dataclass
class Flow:
    """What we know of a socket, and the kernel does not."""

    app: str = ""  # the program that connects it (TCP), or that got it from us (UDP)
    peer: Endpoint = NOWHERE
    local: Endpoint = NOWHERE
    waits: bool = False  # it was a blocking socket when connect() began
    task: asyncio.Task[int] | None = None  # its errno is told once
    copy: socket.socket | None = None  # our descriptor of it, while it connects
    mapped: int = 0  # its port here, if the gateway maps one to it
    since: float = 0.0  # when it was mapped or renewed
    accepted: list[tuple[socket.socket, Any]] = field(default_factory=list)  # not given

    @property
    def pending(self) -> bool:
        return bool(self.task and not self.task.done())

    def give_up(self) -> None:
        """Forget a connect(): what is still under way must not meet the next one."""
        self.peer, self.task = NOWHERE, None
        if self.copy:
            self.copy.close()


def copy_options(old: socket.socket, new: socket.socket) -> None:
    """Copy the options that a program may have set on a socket before bind()."""
    for option in socket.SO_REUSEADDR, socket.SO_REUSEPORT, socket.SO_BROADCAST:
        value = old.getsockopt(socket.SOL_SOCKET, option)
        new.setsockopt(socket.SOL_SOCKET, option, value)


def free(sock: socket.socket) -> None:
    """Clear the options that would keep a socket from the gateway."""
    for level, option, value in (
        (socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, bytes(4)),
        (socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b""),
        (socket.IPPROTO_TCP, TCP_FASTOPEN_CONNECT, bytes(4)),
    ):
        with contextlib.suppress(OSError):
            sock.setsockopt(level, option, value)


# --- Datagrams ----------------------------------------------------------------
#
# The program's socket of UDP is in the namespace, where the kernel does all its calls.
# We read packets off the cable and wrap them for the gateway, one association (RFC 1928
# section 7) for each address and port.  For each port there is one socket outside the
# namespace: what it receives goes in by the cable, with the sender as its source.

ANYBODY = b"\xff" * 6  # broadcast: the cable has one other end


def read_packet(raw: bytes) -> tuple[Endpoint, Endpoint, bytes] | None:
    """Return source, target and payload of a packet, None if it is not UDP."""
    if raw[0] >> 4 == 4 and raw[9] == socket.IPPROTO_UDP:
        at, source, target = 4 * (raw[0] & 15), raw[12:16], raw[16:20]
    elif raw[0] >> 4 == 6 and raw[6] == socket.IPPROTO_UDP:
        at, source, target = 40, raw[8:24], raw[24:40]
    else:
        return None
    here, there, size = struct.unpack_from("!HHH", raw, at)
    return Endpoint(source, here), Endpoint(target, there), raw[at + 8 : at + size]


@dataclass
class Association:
    """A port of the namespace, and how its datagrams leave the machine."""

    here: Endpoint
    app: str  # the program whose settings hold
    relay: Endpoint | None = None  # the gateway's, once it has told that
    queue: list[bytes] = field(default_factory=list)  # messages until then
    task: asyncio.Task[None] | None = None


class Datagrams:
    """The datagrams of a run."""

    def __init__(
        self, names: Names, helper: Helper, flows: dict[int, Flow], app: str
    ) -> None:
        self.gateway, self.names, self.flows = names.gateway, names, flows
        self.helper, self.cable, self.app = helper, helper.cable, app
        self.cable.setblocking(False)
        # Of our sockets: AF_INET6 carries IPv4 too, but the machine may have no IPv6.
        self.family = socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET
        self.socks: dict[int, socket.socket] = {}  # by port
        self.associations: dict[Endpoint, Association] = {}
        self.relays: dict[Endpoint, Association] = {}
        # Cached, for it is asked for each datagram.
        self.is_near = functools.lru_cache(RECORDS)(names.gateway.is_near)

    def read_cable(self) -> None:
        """Carry the datagrams that programs have sent."""
        with contextlib.suppress(OSError):  # no packet is left, or one cannot be sent
            for _ in range(64):  # then other tasks have their turn
                if packet := read_packet(self.cable.recv(65535 + 40)):
                    self.carry(*packet)

    def carry(self, here: Endpoint, there: Endpoint, data: bytes) -> None:
        """Answer a query, or send a datagram to the gateway or near; raise OSError."""
        if not (one := self.associations.get(here)):
            flow = self.flows.get(self.ports().get(here.port, 0))
            one = Association(here, flow.app if flow else self.app)
            self.associations[here] = one
        if there.port == 53 and self.gateway.programs[one.app].dns != "local":
            reply = functools.partial(self.inject, there, here)
            asyncio.ensure_future(self.names.answer(data, there, one.app, reply))
            return
        if self.is_near(one.app, there):
            return self.send(here.port, there, data)
        message = bytes(3) + request_of(0, there)[3:] + data  # RFC 1928 section 7
        if one.relay:
            self.send(here.port, one.relay, message)
        elif len(one.queue) < 64:
            one.queue.append(message)
        if not one.task:
            one.task = asyncio.ensure_future(self.associate(one))

    def ports(self) -> dict[int, int]:
        """Return the inodes of the sockets of the namespace, by port."""
        tables = [f"/proc/{self.helper.pid}/net/{name}" for name in ("udp", "udp6")]
        return {int(row[1][-4:], 16): int(row[9]) for row in rows(*tables)}

    def open(self, port: int, bound: socket.socket | None = None) -> socket.socket:
        """Return a new socket of ours for a port, bound if a program's socket is."""
        sock = socket.socket(self.family, DATAGRAMS)
        free(sock)
        if bound:
            copy_options(bound, sock)
            sock.bind(("", port))
            port = sock.getsockname()[1]
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
        self.socks[port] = sock
        asyncio.get_running_loop().add_reader(sock, self.read, port, sock)
        return sock

    def bind(self, sock: socket.socket, port: int) -> None:
        """Bind a socket to a port, of the machine and the namespace; raise OSError."""
        self.sweep()  # the socket that had the port may be closed by now
        if port not in self.socks:  # else another socket shares it
            port = self.open(port, sock).getsockname()[1]
        sock.bind(("", port))

    def send(self, port: int, there: Endpoint, data: bytes) -> None:
        """Send something from a port; raise OSError."""
        (self.socks.get(port) or self.open(port)).sendto(data, there.pair(self.family))

    def inject(self, source: Endpoint, target: Endpoint, data: bytes) -> None:
        """Put a datagram without UDP's checksum into the namespace; raise OSError."""
        size, addresses = 8 + len(data), source.packed + target.packed
        kind = 0x86DD  # EtherType
        head = struct.pack("!BxxxHBB", 0x60, size, 17, 64) + addresses
        if source.family == socket.AF_INET:
            kind = 0x0800
            head = struct.pack("!BxHxxxxBBxx", 0x45, 20 + size, 64, 17) + addresses
            # RFC 1071: the 16-bit words, added with carries, are head modulo 0xFFFF.
            checksum = 0xFFFF - int.from_bytes(head, "big") % 0xFFFF
            head = head[:10] + checksum.to_bytes(2, "big") + head[12:]
        head += struct.pack("!HHHxx", source.port, target.port, size)
        self.cable.sendto(head + data, ("veth1", kind, 0, 0, ANYBODY))

    def read(self, port: int, sock: socket.socket) -> None:
        """Inject what the inside or the gateway has sent: RFC 1928 section 7."""
        with contextlib.suppress(OSError):
            for _ in range(64):
                data, sender = sock.recvfrom(65535)
                source = endpoint(sender)
                if not (one := self.relays.get(source)):
                    own = self.gateway.own[len(source.packed)]
                    self.inject(source, Endpoint(own, port), data)
                elif len(data) > 9 and data[:3] == bytes(3) and data[3] in (1, 4):
                    at = 4 + 4 * data[3]
                    there = int.from_bytes(data[at : at + 2], "big")
                    self.inject(Endpoint(data[4:at], there), one.here, data[at + 2 :])

    async def associate(self, one: Association) -> None:
        """Open an association with the gateway, and keep it until it ends."""
        try:
            with socket.socket(self.gateway.at.family) as control:
                control.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
                control.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, ALIVE_TIME)
                # The gateway takes the same port outside, if that is free.
                request = request_of(ASSOCIATE, Endpoint(bytes(4), one.here.port))
                relay = await self.gateway.talk(control, request, one.app)
                one.relay, self.relays[relay] = relay, one
                while one.queue:
                    self.send(one.here.port, relay, one.queue.pop(0))
                await receive(control, 1)  # the gateway ends it by a close
        except OSError as error:
            if not one.relay:
                say_once(f"cannot send datagrams by {self.gateway.at}: {reason(error)}")
        finally:
            self.relays.pop(one.relay or NOWHERE, None)
            one.relay, one.task = None, None
            one.queue.clear()

    def sweep(self) -> None:
        """End the associations of sockets that have been closed."""
        ports = self.ports()
        for here, one in [*self.associations.items()]:
            if here.port not in ports and not one.queue:
                del self.associations[here]
                if one.task:
                    one.task.cancel()
        for port in self.socks.keys() - ports.keys():
            asyncio.get_running_loop().remove_reader(self.socks[port])
            self.socks.pop(port).close()


# --- The command --------------------------------------------------------------

# Not passed on: signals that cannot be caught, or mean a fault of natrun itself; and
# TTIN and TTOU, which the terminal sends to natrun and the command, to stop both.
KEPT = "KILL STOP SEGV BUS FPE ILL ABRT TRAP SYS PIPE XFSZ TTIN TTOU"
HANDLED = signal.valid_signals() - {getattr(signal, f"SIG{n}") for n in KEPT.split()}
SI_KERNEL = 0x80


class Command:
    """The program that is run, and how it ended."""

    def __init__(self, words: list[str], mask: set[Any], files: Any) -> None:
        """Start it under the filter, with the signal mask and file limit natrun got."""
        ours, theirs = socket.socketpair()

        def prepare() -> None:
            """Put the new process under the filter."""
            try:
                listener = install()
            except OSError as error:
                told = {errno.EBUSY: "it runs in another natrun"}
                told[errno.EINVAL] = "the kernel is older than Linux 5.19"
                why = told.get(error.errno or 0) or reason(error)
                say(f"cannot install the filter: {why}")
                os._exit(125)
            # By sendmsg(), of which the filter does not notify: nobody answers yet.
            socket.send_fds(theirs, [b"+"], [listener])
            resource.setrlimit(resource.RLIMIT_NOFILE, files)
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)

        try:
            self.process = subprocess.Popen(
                words, env=os.environ, close_fds=False, preexec_fn=prepare
            )
        except OSError as error:
            say(f"cannot run {words[0]}: {reason(error)}")
            sys.exit(127 if error.errno == errno.ENOENT else 126)
        theirs.close()
        with ours:
            _, fds, _, _ = socket.recv_fds(ours, 1, 1)
        if not fds:
            self.leave()
        self.listener = fds[0]
        bits = sum(1 << number - 1 for number in HANDLED).to_bytes(128, "little")
        self.signals = system(LIBC.signalfd, -1, bits, 0)

    def take(self) -> None:
        """Reap the dead, or pass a signal on."""
        # struct signalfd_siginfo
        number, _, code = struct.unpack_from("=Iii", os.read(self.signals, 128))
        if number == signal.SIGCHLD:
            # Orphans of the command are our children, too: run() makes us a subreaper.
            with contextlib.suppress(ChildProcessError):
                while (one := os.waitpid(-1, os.WNOHANG | os.WUNTRACED))[0]:
                    if one[0] == self.process.pid:
                        self.follow(one[1])
        elif code != SI_KERNEL or number == signal.SIGHUP:  # else the tty tells both
            with contextlib.suppress(OSError):
                os.kill(self.process.pid, number)

    def follow(self, status: int) -> None:
        """Stop when the command stops; when it has ended, let signals act on natrun."""
        if os.WIFSTOPPED(status):
            # A shell with job control waits until natrun stops too, also if the command
            # is a shell that suspended itself.  Others may not know to continue natrun.
            with contextlib.suppress(OSError), open("/dev/tty") as tty:
                fd, own, shell = tty.fileno(), os.getpgrp(), os.getpgid(os.getppid())
                front = os.tcgetpgrp(fd)
                if front in (own, self.process.pid) and own != shell:
                    # By SIGTSTP, which the kernel drops if no shell could continue us.
                    os.kill(os.getpid(), signal.SIGTSTP)  # merges with a pending one
                    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTSTP})
                    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTSTP})
                    if front != own:  # the command is that shell, and was in front
                        os.tcsetpgrp(fd, front)
        else:
            self.process.returncode = os.waitstatus_to_exitcode(status)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, HANDLED - {signal.SIGCHLD})

    def leave(self) -> NoReturn:
        """End as the command has ended."""
        if (code := self.process.wait()) < 0:
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # no second core file
            with contextlib.suppress(OSError, ValueError):
                signal.signal(-code, signal.SIG_DFL)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {-code})
            os.kill(os.getpid(), -code)
        os._exit(code)


# --- The supervisor -----------------------------------------------------------
#
# One process answers the calls of all processes of a run, in one event loop in which
# nothing may block.  Each call is a task.  If we fail at a call that leads out, answer
# an errno: PROCEED might lead past the gateway.


class Supervisor:
    """The answers to the calls of a run.

    on_NAME() answers the call NAME: an errno, PROCEED or ANSWERED; or raises OSError.
    """

    def __init__(self, gateway: Gateway, app: str, verbose: bool) -> None:
        self.gateway, self.programs, self.verbose = gateway, gateway.programs, verbose
        self.helper = Helper(gateway.outside, gateway.inside)
        # The waiting room: its queue is full, so the kernel drops each SYN to it.  So a
        # connect() to it is neither accepted nor refused, until meet() connects back.
        near = "127.0.0.1", 0
        self.listener = socket.create_server(near, backlog=0, reuse_port=True)
        self.room = endpoint(self.listener.getsockname())
        self.filler = socket.create_connection(self.room.pair(), REACH_TIME)
        self.names, self.notified = Names(gateway), 0
        self.datagrams: Datagrams | None = None
        self.flows: dict[int, Flow] = {}  # by inode
        # The kernel removes sockets that nobody has open any more, and lists the rest.
        self.live = select.epoll()
        self.server = socket.socket(socket.AF_INET, DATAGRAMS)  # our name server
        self.server.bind(near)
        self.asked: dict[int, tuple[Endpoint, str]] = {}  # by the asker's port
        self.session = socket.socket()  # a user's, see lease()
        barred = self.helper.barred if gateway.udp else LACKS
        if not barred:
            self.datagrams = Datagrams(self.names, self.helper, self.flows, app)
        elif self.programs["natrun"].udp == "yes":
            say(f"datagrams are not carried, but for names: {barred}")

    async def serve(self, command: Command) -> None:
        """Answer the calls of a command and its children, and end as it did."""
        loop, listener = asyncio.get_running_loop(), command.listener
        poll = select.poll()
        loop.set_exception_handler(lambda _, found: say(f"fault: {found}"))
        over = loop.create_future()  # canceled when no process is under the filter
        loop.add_reader(command.signals, command.take)
        loop.add_reader(self.server, self.read_query)
        if self.datagrams:
            loop.add_reader(self.datagrams.cable, self.datagrams.read_cable)
        poll.register(listener, select.POLLIN)

        def take() -> None:
            """Take a call if poll() sees one: NOTIF_RECV blocks when it was killed."""
            for _, events in poll.poll(0):
                if not events & select.POLLIN:
                    over.cancel()
                    return
                with contextlib.suppress(FileNotFoundError):  # killed since
                    loop.create_task(self.answer(Call(listener)))
                    self.notified += 1

        loop.add_reader(listener, take)
        while not over.done():
            await asyncio.wait({over}, timeout=1)
            with contextlib.suppress(OSError):  # no descriptor is left
                await self.tidy()
                if self.datagrams:
                    self.datagrams.sweep()
        loop.remove_reader(listener)
        last = self.datagrams.associations.values() if self.datagrams else ()
        for _ in range(100):  # for a second, while the gateway is asked to carry them
            if any(one.queue for one in last):
                await asyncio.sleep(0.01)
        ports = {flow.mapped for flow in self.flows.values()} - {0}
        unmapped = [self.gateway.map(port, 0, 0) for port in ports]
        await asyncio.gather(*unmapped, return_exceptions=True)
        if self.verbose:
            say(f"{self.notified} notifications")
        command.leave()

    async def answer(self, call: Call) -> None:
        """Find the answer to a call, and give it."""
        answer = PROCEED
        method = getattr(self, f"on_{call.name}")
        leads_out = call.name in ("connect", "bind", "socket")
        try:
            if leads_out:
                answer = await method(call)
            elif self.flows:  # all other calls need us for a flow only
                with call.borrow() as sock:
                    answer = await method(call, sock, self.flow_of(sock))
        except OSError as error:
            answer = self.gateway.errno_of(error)
            if answer == errno.EPERM and not leads_out:
                answer = PROCEED
            elif answer == errno.EPERM:
                answer, why = errno.EACCES, "not dumpable, or Yama forbids it"
                say_once(f"cannot look into {call.app}: {why}: it does not connect")
        except Exception as error:
            answer = errno.EIO
            say(f"fault in {call.name}: {type(error).__name__}: {error}")
        if answer != ANSWERED:
            call.answer(answer)

    def flow_of(self, sock: socket.socket) -> Flow:
        """Return what is known of a socket, if anything."""
        return self.flows.get(os.fstat(sock.fileno()).st_ino) or Flow()

    def record(self, sock: socket.socket, **known: Any) -> Flow:
        """Keep what is known of a socket, until it is gone."""
        flow = self.flows.setdefault(os.fstat(sock.fileno()).st_ino, Flow())
        vars(flow).update(known)
        with contextlib.suppress(FileExistsError):
            self.live.register(sock, 0)
        return flow

    async def on_connect(self, call: Call) -> int:
        """Have the gateway connect: the story that the rest serves."""
        if not (target := call.target()):
            return PROCEED
        near = self.gateway.is_near(call.app, target)
        if near and target.port != 53 and not within(LINKED, target.packed):
            if self.flows:  # the socket may have led elsewhere, and been given up
                with contextlib.suppress(OSError), call.borrow() as sock:
                    if sock.proto != socket.IPPROTO_TCP or state_of(sock) == CLOSED:
                        self.flow_of(sock).give_up()
            return PROCEED
        with call.borrow() as sock:
            if sock.proto != socket.IPPROTO_TCP or near:
                return self.connect_datagrams(call, sock, target, near)
            flow, waits = self.flow_of(sock), os.get_blocking(sock.fileno())
            # After EINTR a program may connect again.  While the first connect() is
            # under way, a blocking socket is at O_NONBLOCK, and flow.waits tells it.
            if waits or flow.waits or not flow.pending:
                first, error = flow.task, await self.end_of(call, flow, sock)
                if error or first and flow.waits:  # else connect_ex() tells
                    return error
            free(sock)
            family = self.gateway.at.family
            # If a bound IPv6 socket cannot reach IPv4, connect_ex() to the room fails.
            bound = family < sock.family and sock.getsockname()[1] > 0
            paired = not waits or family > sock.family or bound
            copy = sock.dup()  # before connect_ex(): it may raise EMFILE
            sock.setblocking(False)
            there = self.room if paired else self.gateway.at
            error = sock.connect_ex(there.pair(sock.family))
            known = 0, errno.EISCONN, errno.EALREADY, errno.EADDRNOTAVAIL
            if error != errno.EINPROGRESS and (paired or error in known):
                sock.setblocking(waits)
                copy.close()
                return error if error in known else errno.EADDRNOTAVAIL
            flow.give_up()
            flow = self.record(sock, peer=target, waits=waits, app=call.app, copy=copy)
            flow.task = asyncio.ensure_future(self.dial(copy, flow, paired))
            return await self.end_of(call, flow, sock) if waits else errno.EINPROGRESS

    async def dial(self, sock: socket.socket, flow: Flow, paired: bool) -> int:
        """Have the gateway connect to the target of a flow; return the errno."""
        gateway, target, error = self.gateway, flow.peer, 0
        try:
            name = self.names.called.get(target.packed, b"")
            where = name + target.port.to_bytes(2, "big") if name else target
            with socket.socket(gateway.at.family) if paired else sock.dup() as server:
                local = await gateway.talk(server, request_of(CONNECT, where), flow.app)
                if len(local.packed) in (4, 16) and any(local.packed):
                    flow.local = local
                if paired:
                    await self.meet(sock, server)
        except OSError as failed:
            error = gateway.errno_of(failed)
        if self.verbose:
            say(f"{target}: {os.strerror(error) if error else 'connected'}")
        with sock, contextlib.suppress(OSError):
            if flow.waits:  # else only the program has set O_NONBLOCK
                sock.setblocking(True)
            if paired and not flow.waits and state_of(sock) == CLOSED:
                error = 0  # the program gave it up, and SO_ERROR says so
            if error:  # AF_UNSPEC: who polls sees EPOLLERR, EPOLLHUP and EPOLLOUT
                system(LIBC.connect, sock.fileno(), bytes(16), 16)
        return error

    async def meet(self, sock: socket.socket, server: socket.socket) -> None:
        """Join a server to a socket in the waiting room; raise OSError."""
        with socket.socket(type=socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as near:
            near.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            near.bind(self.room.pair())
            loop, there = asyncio.get_running_loop(), endpoint(sock.getsockname())
            # TCP simultaneous open: RFC 9293 section 3.5.
            await timed(loop.sock_connect(near, there.pair()), REACH_TIME)
            self.helper.join(near, server)

    async def end_of(self, call: Call, flow: Flow, sock: socket.socket) -> int:
        """Wait for the end of a connect(), and return its errno; 0 if it was told."""
        error = await call.wait(asyncio.shield(flow.task)) if flow.task else 0
        flow.task = None
        if error:
            sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)  # clears the kernel's
            flow.peer = NOWHERE
        return error

    async def on_getsockopt(self, call: Call, sock: socket.socket, flow: Flow) -> int:
        """Tell by SO_ERROR why a connect() has failed."""
        # After EINTR, a blocking socket is writable before the target answers: wait.
        early = flow.pending and not flow.waits
        if early or not (error := await self.end_of(call, flow, sock)):
            return PROCEED
        return call.write(error.to_bytes(4, sys.byteorder), *call.arguments[3:5])

    async def on_getsockname(self, call: Call, sock: socket.socket, flow: Flow) -> int:
        """Tell a flow's own address outside; as on_getpeername(), that of its peer."""
        where = flow.local if call.name == "getsockname" else flow.peer
        if not where.port:  # it is not known yet, or the server does not say
            return PROCEED
        if call.name == "getpeername":
            # A blocking one may be at the gateway only; for others, the kernel knows.
            if flow.pending and flow.waits:
                return errno.ENOTCONN
            sock.getpeername()  # raises ENOTCONN if it is not connected
        return call.write_address(sock.family, where)

    on_getpeername = on_getsockname

    async def on_socket(self, call: Call) -> int:
        """Make a socket of UDP in the namespace."""
        family, kind, protocol = (number & WHOLE for number in call.arguments[:3])
        udp = self.programs[call.app].udp
        if udp == "no":
            return errno.EACCES
        local = udp == "local" or self.programs[call.app].redirect == "no"
        if not self.datagrams or local or protocol not in (0, 17):
            return PROCEED
        with await self.helper.make(family, kind & 15) as sock:
            self.record(sock, app=call.app)
            call.give(sock, kind)
        return ANSWERED

    def connect_datagrams(
        self, call: Call, sock: socket.socket, target: Endpoint, near: bool
    ) -> int:
        """Answer for sockets other than TCP: queries go to our own name server."""
        program = self.programs[call.app]
        udp = sock.proto == socket.IPPROTO_UDP
        query = udp and target.port == 53 and program.redirect == "yes"
        ours = query and program.dns != "local"
        private = udp and bool(self.flow_of(sock).app)  # of the namespace
        if private and within(LINKED, target.packed):
            sock, private = self.swap(call, sock), False
        if private or not ours and (near or udp and program.udp == "local"):
            return PROCEED
        if not ours:
            return errno.ENETUNREACH
        free(sock)
        sock.connect(endpoint(self.server.getsockname()).pair(sock.family))
        self.asked[sock.getsockname()[1]] = target, call.app
        self.record(sock, peer=target)
        return 0

    def read_query(self) -> None:
        """Begin to answer a query that came to our name server."""
        with contextlib.suppress(OSError):
            query, sender = self.server.recvfrom(65535)
            server, app = self.asked.get(sender[1], (NOWHERE, "?"))
            steps = self.names.answer(
                query, server, app, lambda found: self.server.sendto(found, sender)
            )
            asyncio.ensure_future(steps)

    async def on_bind(self, call: Call) -> int:
        """Bind to the outside address, or to a port that is mapped there."""
        if not (where := call.target()):
            return PROCEED
        anywhere = not any(where.packed)
        listens = anywhere and where.port in self.programs[call.app].listen
        outside = listens or within(self.gateway.outside, where.packed)
        with call.borrow() as sock:
            if sock.proto == socket.IPPROTO_TCP:
                if outside and self.gateway.mappings and not sock.getsockname()[1]:
                    return await self.map(sock, where)
            elif self.datagrams and self.flow_of(sock).app:
                if anywhere:
                    self.datagrams.bind(sock, where.port)
                    return 0
                if within(self.gateway.inside, where.packed):
                    self.swap(call, sock).close()
        return PROCEED

    async def map(self, sock: socket.socket, where: Endpoint) -> int:
        """Bind a socket, and map a port of the outside to it; raise OSError."""
        gateway, anywhere = self.gateway, "::" if sock.family == socket.AF_INET6 else ""
        if anywhere and sock.getsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY):
            return PROCEED  # the gateway connects to it by IPv4
        # NAT-PMP has no choice of an address.
        if any(where.packed) and where.packed != gateway.own[4]:
            return errno.EADDRNOTAVAIL
        await self.tidy()  # the gateway's limit counts the mappings of closed sockets
        with socket.socket(sock.family) as probe:  # if refused, sock must stay unbound
            copy_options(sock, probe)
            probe.bind((anywhere, where.port))
            port = probe.getsockname()[1]
            here = await self.lease(port, where)
            # Another thread may have bound it meanwhile.
            if where.port and where != here or sock.getsockname()[1]:
                await self.unmap(port)
                return errno.EADDRINUSE
        sock.bind((anywhere, port))
        self.record(sock, local=here, mapped=port, since=time.monotonic())
        return 0

    async def lease(self, port: int, where: Endpoint) -> Endpoint:
        """Map a port for a time; return its endpoint outside, or raise OSError."""
        gateway = self.gateway
        if gateway.password:  # a user needs a session to map; an idle one ends
            session = socket.socket(gateway.at.family)
            request = request_of(ASSOCIATE, NOWHERE)
            await timed(gateway.talk(session, request, "natrun"), REACH_TIME)
            self.session.close()
            self.session = session
        answer = await gateway.map(port, where.port or port, LEASE)
        place = await gateway.map() if any(where.packed) else where.packed
        here = Endpoint(place, int.from_bytes(answer[2:], "big"))
        if here != where and where in [flow.local for flow in self.flows.values()]:
            say_once(f"{where} is not free on the gateway, and is asked for again")
            await gateway.map(port, 0, 0)  # renewals would keep the wrong one
        return here

    async def unmap(self, port: int) -> None:
        """End the mapping of a port, unless it is 0 or a socket still has it."""
        if port and all(flow.mapped != port for flow in self.flows.values()):
            await self.gateway.map(port, 0, 0)

    def swap(self, call: Call, old: socket.socket) -> socket.socket:
        """Put an ordinary socket in the place of one of the namespace; return it."""
        flags = int(call.read_proc(f"fdinfo/{call.fd}")["flags"], 8)
        new = socket.socket(old.family, old.type)
        copy_options(old, new)
        # SO_DONTROUTE: nothing that it sends elsewhere may go past the gateway.
        new.setsockopt(socket.SOL_SOCKET, socket.SO_DONTROUTE, 1)
        call.give(new, flags, call.fd)
        return new

    async def on_accept(self, call: Call, sock: socket.socket, flow: Flow) -> int:
        """Accept a connection at a mapped port, and tell the caller's true address."""
        if not flow.mapped:
            return PROCEED
        poll = select.poll()
        poll.register(sock, select.POLLIN)
        # A connection that poll() sees stays there: the program accepts by us only.
        while not flow.accepted and not poll.poll(0):
            if not os.get_blocking(sock.fileno()):
                return errno.EAGAIN
            await call.wait(readable(sock))
        one, address = flow.accepted.pop(0) if flow.accepted else sock.accept()
        try:
            peer = await self.caller(endpoint(address), endpoint(one.getsockname()))
            here = flow.local.packed if any(flow.local.packed) else self.gateway.own[4]
            self.record(one, peer=peer, local=Endpoint(here, flow.local.port))
            if call.arguments[1]:
                call.write_address(one.family, peer)
            call.give(one, call.arguments[3] if call.name == "accept4" else 0)
        except BaseException:
            flow.accepted.append((one, address))  # for the next call
            raise
        one.close()
        return ANSWERED

    on_accept4 = on_accept

    async def caller(self, peer: Endpoint, own: Endpoint) -> Endpoint:
        """Return the true address of a caller, which the gateway's table has."""
        gateway, path = self.gateway, f"/table.json?source_port={peer.port}"
        login = b":".join(gateway.login("natrun")) if gateway.password else b""
        with contextlib.suppress(OSError):
            # The row may be written after the connection has been made.
            for pause in (0, 0.01, 0.1) if peer.packed == gateway.at.packed else ():
                await asyncio.sleep(pause)
                with contextlib.suppress(ValueError, LookupError):
                    rows = (await fetch(gateway.at, path, login))["sessions"]
                    row, *_ = [row for row in rows if row["destination"] == str(own)]
                    return endpoint((row["source_ip"], row["original_source_port"]))
        return peer

    async def tidy(self) -> None:
        """Forget sockets that are gone; renew the mappings of those that are there."""
        with open(f"/proc/self/fdinfo/{self.live.fileno()}") as file:
            live = {int(inode, 16) for inode in re.findall(r"ino:(\w+)", file.read())}
        now, steps = time.monotonic(), list[Awaitable[Any]]()
        for number, flow in [*self.flows.items()]:
            if number not in live:
                del self.flows[number]
                steps.append(self.unmap(flow.mapped))
            elif flow.mapped and flow.peer == NOWHERE and now - flow.since > LEASE / 4:
                flow.since = now
                steps.append(self.lease(flow.mapped, flow.local))
        await asyncio.gather(*steps, return_exceptions=True)


# --- main ---------------------------------------------------------------------


def run(words: list[str], gateway: Gateway, verbose: bool) -> None:
    """Run a command to its end, and end as it did; raise Fault."""
    if MACHINE not in MACHINES:
        raise Fault(f"cannot run on {MACHINE}, only on {' and '.join(MACHINES)}")
    # A daemon of the command stays our descendant, which Yama lets us look into.
    system(LIBC.prctl, CHILD_SUBREAPER, 1, 0, 0, 0)
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, HANDLED)
    # If it is ignored, as our parent may have left it, the kernel reaps in our place.
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    # Each connection is a descriptor here, and some in the helper.
    files = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (files[1], files[1]))
    supervisor = Supervisor(gateway, os.path.basename(words[0])[:15], verbose)
    asyncio.run(supervisor.serve(Command(words, mask, files)))


def check(given: dict[str, str], programs: Programs) -> int:
    """Say what works on this machine, and what does not and why."""
    say(f"Linux {os.uname().release} on {MACHINE}, Python {sys.version.split()[0]}")
    barred = Helper([], []).barred
    say(f"namespace: {'no, ' + barred if barred else 'yes'}")
    # A program for which we read memory and borrow a socket, but need no gateway.
    code = "import socket, sys; sys.tracebacklimit = 0; socket.socket().bind(('', 0))"
    if not (pid := os.fork()):  # natrun there says what the kernel does not allow
        run([sys.executable, "-c", code], Gateway(NOWHERE, {"udp": 1}, programs), False)
    failed = os.waitpid(pid, 0)[1]
    say(f"programs: {'no' if failed else 'yes'}")
    gateway = find_gateway(given.get("-g", ""), programs)
    say(f"gateway: {gateway.at}, {'NATWork' if gateway.natwork else 'a SOCKS server'}")
    works = {"login": "", "datagrams": barred if gateway.udp else LACKS}
    works["listening"] = "" if gateway.mappings else LACKS
    try:
        request = request_of(RESOLVE, b"localhost\0\0")
        asyncio.run(Names(gateway).resolve(request, "natrun"))
    except OSError as error:  # any but Lost is an answer to a user that is let in
        works["login"] = reason(error) if isinstance(error, Lost) else ""
    for name, why in works.items():
        say(f"{name}: {'no, ' + why if why else 'yes'}")
    return 125 if failed else 0


def main() -> int:
    """Run natrun's command line; return an exit code if it could not."""
    names = ["gateway=", "config=", "check", "help", "version"]
    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # Python's own ends in a traceback
    # Open 0, 1 and 2, or the command takes a socket of ours for its input or output.
    while (fd := os.open(os.devnull, os.O_RDWR)) < 3:
        os.set_inheritable(fd, True)
    os.close(fd)
    try:
        options, words = getopt.getopt(sys.argv[1:], "g:c:vh", names)
        given = {{"--gateway": "-g", "--config": "-c"}.get(n, n): v for n, v in options}
        if given.keys() & {"-h", "--help", "--version"}:
            print(f"natrun {__version__}" if "--version" in given else __doc__)
            return 0
        programs = read_settings(given.get("-c", ""))
        if "--check" in given:
            return check(given, programs)
        gateway = find_gateway(given.get("-g", ""), programs)
        if words[:1] in ([], [""]):
            raise Fault("cannot run nothing: natrun.py [-g GATEWAY] COMMAND...")
        run(words, gateway, "-v" in given)
    except (Fault, getopt.GetoptError) as fault:
        say(str(fault))
    except OSError as error:
        say(f"cannot go on: {reason(error)}")
    return 125


if __name__ == "__main__":
    sys.exit(main())
