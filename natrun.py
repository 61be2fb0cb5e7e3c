#!/usr/bin/env python3
"""natrun: run a program as if it ran on the gateway.

On a machine of the inside that has no route out, an unmodified program resolves
names, connects, listens and sends datagrams through NATWork:

    natrun.py curl http://www.example.com/

It needs neither root nor LD_PRELOAD, so static programs and those in Go work too.
The kernel hands each connect() of the program to this process, the supervisor, and
lets the program wait (seccomp user notification).  What the gateway's Local Address
Table calls inside goes on untouched.  For the rest the supervisor answers:

    program ---- connect(203.0.113.80:80) = 0
                       |           ^ notification, answer
    supervisor --------+-----------+ borrows the socket, connects it to the gateway,
                                     and asks by SOCKS for 203.0.113.80:80

After that the program has an ordinary socket, and nobody stands in its way.  A
socket that must not wait gets EINPROGRESS, and connects to a listener of ours that
never accepts, the waiting room.  When the gateway is there, a socket of ours calls
it from the room's address (TCP simultaneous open), and a relay joins the two.

Usage:

    natrun.py [-g GATEWAY] [-c FILE] [-v] COMMAND [ARGUMENT]...
    natrun.py [-g GATEWAY] [-c FILE] --check     what works on this machine, and why

GATEWAY is HOST, HOST:PORT, or socks5://HOST:PORT for another SOCKS server.  Else it
is found by NATRUN_GATEWAY, the settings, http://wpad/lat.json, or the default route.

Settings are in FILE, else ~/.config/natrun.conf, else /etc/natrun.conf: a section
[natrun], and one for each program that differs, such as [curl].

Signals go on to the command.  Exit codes: the command's; 125 if natrun fails, 126 if
the command cannot be run, 127 if it is not found.

Reading order.  Every section uses only the ones above it.  To follow a connection,
start at Supervisor.connect(), and read Supervisor.dial() next.

It is not a fence: the fence is that the machine has no route.  It carries neither
multicast nor ICMP.  In it, setuid programs gain no rights, and what lets nobody look
into it (ssh-agent) does not connect.
"""
# SPDX-License-Identifier: MIT

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import errno
import fcntl
import functools
import getopt
import json
import os
import platform
import re
import resource
import select
import signal
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable
from collections.abc import Coroutine
from collections.abc import Iterable
from dataclasses import dataclass
from dataclasses import field
from typing import Any
from typing import NamedTuple
from typing import NoReturn

if sys.version_info < (3, 10):  # noqa: UP036
    sys.exit("natrun: needs Python 3.10 or later")

__version__ = "0.1.0"

# --- Limits -------------------------------------------------------------------
#
# Sizes are bytes, times are seconds.

REACH_TIME = 5.0  # for the gateway to take a connection
ANSWER_TIME = 130.0  # for it to answer: Linux tries a dead host for 127
FIND_TIME = 3.0  # for a page of it
QUERY_TIME = 2.0  # for an answer about a name
NAME_TIME = 5  # that a name's address is kept: SOCKS does not say how long it holds
LEASE = 120  # that a mapping lives without being renewed
SWEEP_TIME = 10.0  # between two looks for sockets that are gone
LOOK_TIME = 0.1  # between two looks for signals to what waits
PIPE_SIZE = 1 << 18  # at once; a larger pipe does not stay in the cache
RECORDS = 4096  # of sockets, before those that are gone are looked for


class Fault(Exception):
    """natrun cannot go on; the message says why."""


class Lost(OSError):
    """The gateway itself cannot be used."""


def say(text: str) -> None:
    """Write a line on standard error, whatever was in the text."""
    line = "".join(c if " " <= c <= "~" else "?" for c in text)
    with contextlib.suppress(OSError):
        os.write(2, f"natrun: {line}\n".encode())


def reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.errno and not isinstance(error, Lost):
        known = errno.errorcode.get(error.errno) and os.strerror(error.errno)
        return (known or error.strerror or str(error)).lower()
    known = getattr(error, "strerror", "") or str(error) or type(error).__name__
    return str(known).lower()


def failure(code: int) -> OSError:
    return OSError(code, os.strerror(code))


# --- Kernel -------------------------------------------------------------------
#
# What Python has no function for.  Numbers are from <linux/seccomp.h>,
# <linux/bpf_common.h>, <asm/unistd.h> and <linux/prctl.h>.

LIBC = ctypes.CDLL(None, use_errno=True)
ANSWERED = "connect bind getsockname getpeername accept accept4 getsockopt socket"
CALLS = [*ANSWERED.split(), *"sendto sendmsg sendmmsg io_uring_setup seccomp".split()]
NUMBERS = {  # of CALLS, by machine, with its AUDIT_ARCH
    "x86_64": (0xC000003E, 42, 49, 51, 52, 43, 288, 55, 41, 44, 46, 307, 425, 317),
    "aarch64": (0xC00000B7, *(203, 200, 204, 205, 202, 242, 209, 198, 206, 211))
    + (269, 425, 277),
}
PIDFD_GETFD = 438
NOTIF_RECV, NOTIF_SEND, NOTIF_ADDFD = 0xC0502100, 0xC0182101, 0x40182103
NOTIF_ID_VALID = 0x80082102  # as kernels before 5.17 want it; later ones take both
CONTINUE, ADDFD_SETFD, ADDFD_SEND = 1, 1, 2
NEW_LISTENER, WAIT_KILLABLE_RECV = 0x08, 0x20
ERESTARTSYS = 512  # not in errno: no program is to see it
SO_COOKIE, SO_NETNS_COOKIE, TCP_FASTOPEN_CONNECT = 57, 71, 30
MSG_FASTOPEN = 0x20000000
NO_NEW_PRIVS, CHILD_SUBREAPER = 38, 36


def system(function: Callable[..., int], *arguments: Any) -> int:
    """Return what a function of the C library does; raise OSError."""
    words = [ctypes.c_ulong(a) if isinstance(a, int) else a for a in arguments]
    result = function(*words)
    if result < 0:
        raise failure(ctypes.get_errno())
    return result


def copy(function: Callable[..., int], tid: int, there: int, here: Any) -> None:
    """Copy between a buffer and the memory of a thread; raise OSError."""
    size = ctypes.sizeof(here)
    ours = (ctypes.c_size_t * 2)(ctypes.addressof(here), size)  # struct iovec
    theirs = (ctypes.c_size_t * 2)(there, size)
    if size and system(function, tid, ours, 1, theirs, 1, 0) < size:
        raise failure(errno.EFAULT)


def cookie(sock: socket.socket) -> bytes:
    """Return what a socket is known by, whoever has it."""
    return sock.getsockopt(socket.SOL_SOCKET, SO_COOKIE, 8)


# --- The filter ---------------------------------------------------------------
#
# Classic BPF, run by the kernel at each system call of the program.  It notifies us
# of what may be about the outside, and allows what it does not know.

LOAD, AND, EQUAL, RETURN = 0x20, 0x54, 0x15, 0x06
NOTIFY, ALLOW, ERROR = 0x7FC00000, 0x7FFF0000, 0x00050000
Code = list[tuple[int, int, int, int]]  # operation, jumps if true and false, number
Tests = list[tuple[int, int, tuple[int, ...]]]  # argument, mask, wanted values
WHOLE = 0xFFFFFFFF
# sockaddr_in, sockaddr_in6 and sockaddr_storage: AF_UNIX mostly has other lengths.
INTERNET: Tests = [(2, WHOLE, (16, 28, 128))]
SO_ERROR: Tests = [(1, WHOLE, (socket.SOL_SOCKET,)), (2, WHOLE, (socket.SO_ERROR,))]
UDP: Tests = [(0, WHOLE, (socket.AF_INET, socket.AF_INET6)), (1, 15, (2,))]
TESTS: dict[str, Tests] = {"connect": INTERNET, "bind": INTERNET}
TESTS |= {"getsockopt": SO_ERROR, "socket": UDP}
# What is an implicit connect(), by the argument with the flags; and what the kernel
# does by itself.  Libraries do without both.
REFUSED = {"sendto": 3, "sendmsg": 2, "sendmmsg": 3, "io_uring_setup": None}


def guarded(tests: Tests, action: int) -> Code:
    """Return code that takes an action if the arguments pass all tests, else allows."""
    code = [(RETURN, 0, 0, action), (RETURN, 0, 0, ALLOW)]
    for argument, mask, values in reversed(tests):
        rest, last = len(values) - 1, len(code) - 1
        jumps = [
            (EQUAL, rest - n, 0 if n < rest else last, value)
            for n, value in enumerate(values)
        ]
        # The low half of an argument, in struct seccomp_data.
        code = [(LOAD, 0, 0, 16 + 8 * argument), (AND, 0, 0, mask), *jumps, *code]
    return code


def assemble(machine: str, calls: Iterable[str]) -> bytes:
    """Return the filter for some calls, an array of struct sock_filter."""
    architecture, *numbers = NUMBERS[machine]
    code = [(LOAD, 0, 0, 4), (EQUAL, 1, 0, architecture), (RETURN, 0, 0, ALLOW)]
    code.append((LOAD, 0, 0, 0))  # the number of the call
    for number, name in zip(numbers, CALLS):
        if name not in calls and name not in REFUSED:
            continue
        tests, action = TESTS.get(name, []), NOTIFY
        if name in REFUSED:
            at = REFUSED[name]
            tests = [] if at is None else [(at, MSG_FASTOPEN, (MSG_FASTOPEN,))]
            action = ERROR | (errno.ENOSYS if at is None else errno.EOPNOTSUPP)
        block = guarded(tests, action)
        code += [(EQUAL, 0, len(block), number), *block]
    return b"".join(
        struct.pack("=HBBI", *one) for one in (*code, (RETURN, 0, 0, ALLOW))
    )


def install(machine: str, code: bytes) -> int:
    """Put this process and its children under a filter; return the listener."""
    program = ctypes.create_string_buffer(code, len(code))
    # struct sock_fprog has a length, and on the next word a pointer.
    fields = (ctypes.c_size_t * 2)(len(code) // 8, ctypes.addressof(program))
    flags = NEW_LISTENER | WAIT_KILLABLE_RECV
    request = NUMBERS[machine][-1], 1, flags, ctypes.addressof(fields)
    try:
        return system(LIBC.syscall, *request)
    except PermissionError:  # without rights, a process must give up setuid first
        system(LIBC.prctl, NO_NEW_PRIVS, 1, 0, 0, 0)
        return system(LIBC.syscall, *request)


# --- Addresses ----------------------------------------------------------------


class Endpoint(NamedTuple):
    """An address and a port; IPv4 in IPv6 is taken out."""

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


Blocks = list[tuple[bytes, bytes]]  # first and last addresses
MAPPED = bytes(10) + b"\xff\xff"
NOWHERE = Endpoint(bytes(4), 0)


def unmapped(packed: bytes) -> bytes:
    return packed[12:] if packed[:12] == MAPPED and len(packed) == 16 else packed


def endpoint(address: tuple[Any, ...]) -> Endpoint:
    """Return the endpoint of an address as Python has it."""
    family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
    return Endpoint(unmapped(socket.inet_pton(family, address[0])), address[1])


def parse_sockaddr(raw: bytes) -> Endpoint | None:
    """Return the endpoint in a struct sockaddr, None if it is of another kind."""
    family, port = int.from_bytes(raw[:2], sys.byteorder), raw[2:4]
    if family == socket.AF_INET and len(raw) >= 16:
        return Endpoint(raw[4:8], int.from_bytes(port, "big"))
    if family == socket.AF_INET6 and len(raw) >= 28:
        return Endpoint(unmapped(raw[8:24]), int.from_bytes(port, "big"))
    return None


def write_sockaddr(family: int, where: Endpoint) -> bytes:
    """Return a struct sockaddr of a family; it is 0.0.0.0 if the address is wider."""
    packed, port = where.packed, where.port.to_bytes(2, "big")
    if family == socket.AF_INET:
        packed = packed if len(packed) == 4 else bytes(4)
        return struct.pack("=H2s4s8x", family, port, packed)
    packed = MAPPED + packed if len(packed) == 4 else packed
    return struct.pack("=H2s4x16s4x", family, port, packed)


def parse_blocks(text: str) -> Blocks:
    """Return the networks that a text names; raise ValueError."""
    import ipaddress

    words = text.replace(",", " ").split()
    networks = [ipaddress.ip_network(word, strict=False) for word in words]
    return [(one.network_address.packed, one[-1].packed) for one in networks]


def within(blocks: Blocks, packed: bytes) -> bool:
    size = len(packed)
    return any(len(low) == size and low <= packed <= high for low, high in blocks)


# Never reached by a gateway: this host, its links, multicast.
OWN = "0.0.0.0/8 127.0.0.0/8 169.254.0.0/16 224.0.0.0/3 ::/127 fe80::/10 ff00::/8"
PRIVATE = "10.0.0.0/8 172.16.0.0/12 192.168.0.0/16 fc00::/7"


# --- Settings -----------------------------------------------------------------
#
# What [natrun] says of programs holds for all that have no section of their own.


@dataclass(frozen=True)
class Program:
    """What the settings say of a program."""

    redirect: bool = True
    dns: str = "gateway"
    direct: Blocks = field(default_factory=list)
    direct_ports: tuple[range, ...] = ()
    listen: tuple[range, ...] = ()
    udp: str = "yes"


@dataclass
class Settings:
    """What the settings say of a run, and of programs by their names."""

    gateway: str = ""
    user: str = ""
    password: str = ""
    programs: dict[str, Program] = field(default_factory=dict)

    def of(self, name: str) -> Program:
        return self.programs.get(name) or self.programs.get("natrun") or Program()


def parse_word(words: str, text: str) -> str:
    if text not in words.split():
        raise ValueError(f"{text!r} is not one of: {words}")
    return text


def parse_ports(text: str) -> tuple[range, ...]:
    """Return ranges of ports, such as "80, 8000-8010"; raise ValueError."""
    found = []
    for word in text.replace(",", " ").split():
        low, _, high = word.partition("-")
        found.append(range(int(low), int(high or low) + 1))
        if not found[-1] or found[-1][-1] > 65535:
            raise ValueError(f"{word!r} is not a range of ports")
    return tuple(found)


PARSERS: dict[str, Callable[[str], Any]] = {
    "redirect": lambda text: parse_word("yes no", text) == "yes",
    "dns": functools.partial(parse_word, "gateway local fake"),
    "direct": parse_blocks,
    "direct_ports": parse_ports,
    "listen": parse_ports,
    "udp": functools.partial(parse_word, "yes local no"),
}


def read_settings(path: str) -> Settings:
    """Return the settings in a file; raise Fault with the first that is wrong."""
    import configparser

    parser, settings = configparser.ConfigParser(interpolation=None), Settings()
    try:
        with open(path, encoding="utf-8") as file:
            parser.read_file(file)
        common: dict[str, Any] = {}
        for section in sorted(parser, key=lambda name: name != "natrun"):
            values = dict(common)
            for name, text in parser[section].items():
                where = f"[{section}] {name}"
                if section == "natrun" and name in ("gateway", "user", "password"):
                    setattr(settings, name, text)
                elif name in PARSERS:
                    values[name] = PARSERS[name](text)
                else:
                    raise ValueError(f"there is no such setting: {' '.join(PARSERS)}")
            if section == "natrun":
                common = values
            # The kernel knows a program by 15 letters.
            settings.programs[section[:15]] = Program(**values)
    except (OSError, ValueError, configparser.Error) as error:
        at = f"{path}, {where}" if type(error) is ValueError else path
        raise Fault(f"cannot use {at}: {reason(error).splitlines()[0]}") from None
    return settings


def find_settings(path: str) -> Settings:
    """Return the settings in a file, else those of the user or the machine."""
    home = os.environ.get("XDG_CONFIG_HOME") or os.path.expanduser("~/.config")
    usual = [os.path.join(home, "natrun.conf"), "/etc/natrun.conf"]
    found = [path] if path else [*filter(os.path.exists, usual)]
    return read_settings(found[0]) if found else Settings()


# --- The gateway --------------------------------------------------------------
#
# NATWork, whose /lat.json says what it is for, or any SOCKS 5 server.

CONNECT, ASSOCIATE, RESOLVE, RESOLVE_PTR = 1, 3, 0xF0, 0xF1  # the last two are Tor's
# RFC 1928 section 6, as connect() on the gateway would say it.
REPLIES = {2: errno.EACCES, 3: errno.ENETUNREACH, 5: errno.ECONNREFUSED}
REPLIES |= {6: errno.ETIMEDOUT, 7: errno.EOPNOTSUPP, 8: errno.EAFNOSUPPORT}
DOMAIN = 3  # an address that is a name


async def receive(sock: socket.socket, size: int) -> bytes:
    """Return so many bytes, and leave the next in the socket; raise OSError."""
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
    kind = len(where.packed) // 4
    return bytes([5, command, 0, kind]) + where.packed + where.port.to_bytes(2, "big")


@dataclass(frozen=True)
class Gateway:
    """Where the gateway is, and its Local Address Table."""

    at: Endpoint
    inside: Blocks
    natwork: bool = False
    outside: Blocks = field(default_factory=list)
    domains: tuple[str, ...] = ()
    mappings: bool = False
    udp: bool = False

    def has_inside(self, packed: bytes) -> bool:
        """Return whether an address is reached without the gateway."""
        return packed == self.at.packed or within(self.inside, packed)

    def address(self, like: Endpoint) -> bytes:
        """Return the outside address that is for targets like one."""
        size = len(like.packed)
        known = [low for low, _ in self.outside if len(low) == size]
        return known[0] if known else bytes(size)

    async def reach(self, sock: socket.socket) -> None:
        """Connect a socket to the gateway; raise Lost."""
        sock.setblocking(False)
        loop, address = asyncio.get_running_loop(), self.at.pair(sock.family)
        try:
            await asyncio.wait_for(loop.sock_connect(sock, address), REACH_TIME)
        except (OSError, asyncio.TimeoutError) as error:
            raise Lost(errno.ENETUNREACH, reason(error)) from None

    async def ask(
        self,
        sock: socket.socket,
        command: int,
        where: Endpoint | bytes,
        who: list[bytes],
    ) -> tuple[bytes, int]:
        """Have it do a command; return the address or name, and port, that it answers.

        NATWork takes the name of who asks as claimed, if it has no users.  Raises
        OSError for what became of the command, Lost for the gateway.
        """
        loop, request = asyncio.get_running_loop(), request_of(command, where)
        methods = b"\2" if self.natwork else b"\0\2" if who[1] else b"\0"
        proof = b"\1" + b"".join(bytes([len(word)]) + word for word in who)
        # What NATWork answers is known beforehand, so it is told all at once.
        first = bytes([5, len(methods)]) + methods
        try:
            await loop.sock_sendall(sock, first + (self.natwork * (proof + request)))
            version, method = await receive(sock, 2)
            if version != 5 or method not in methods:
                raise Lost(errno.EACCES, "it wants another way to log in")
            if method == 2:
                await loop.sock_sendall(sock, b"" if self.natwork else proof)
                if (await receive(sock, 2))[1]:
                    raise Lost(
                        errno.EACCES,
                        "it lets in nobody without a user and password that it knows",
                    )
            await loop.sock_sendall(sock, b"" if self.natwork else request)
            _, reply, _, kind = await receive(sock, 4)
            if reply:
                raise failure(REPLIES.get(reply, errno.EHOSTUNREACH))
            size = (await receive(sock, 1))[0] if kind == DOMAIN else 4 * kind
            name = await receive(sock, size + 2)
            return name[:-2], int.from_bytes(name[-2:], "big")
        except (ConnectionResetError, BrokenPipeError) as error:
            if self.natwork:
                raise Lost(errno.ENETUNREACH, reason(error)) from None
            # ssh -D says no more of a connection that it could not make.
            raise failure(errno.ECONNREFUSED) from None

    async def fetch(self, path: str, who: list[bytes]) -> Any:
        """Return a page of it that is JSON; raise OSError, or ValueError."""
        import base64

        proof = base64.b64encode(b":".join(who)).decode()
        reader, writer = await asyncio.open_connection(*self.at.pair())
        with contextlib.closing(writer):
            login = f"Authorization: Basic {proof}\r\n" if who[1] else ""
            head = f"GET {path} HTTP/1.0\r\nHost: {self.at}\r\n{login}\r\n"
            writer.write(head.encode())
            answer, _, body = (await reader.read()).partition(b"\r\n\r\n")
        if match := re.match(rb"HTTP/1\.\d ([^2]\S+) ", answer):
            raise ValueError(f"it answers {path} with {match[1].decode()}")
        return json.loads(body)


def read_lat(at: Endpoint, lat: dict[str, Any]) -> Gateway:
    """Return a gateway by what its /lat.json says; raise KeyError or ValueError."""
    with contextlib.suppress(KeyError, OSError, ValueError):
        host, _, port = lat["socks"].rpartition(":")
        at = endpoint((host.strip("[]"), int(port)))
    domains = tuple(str(name).lower().strip(".") for name in lat.get("domains", ()))
    outside = parse_blocks(" ".join(lat.get("outside", ())))
    flags = [bool(lat.get(name)) for name in ("mappings", "udp")]
    inside = parse_blocks(" ".join([OWN, *lat["inside"]]))
    return Gateway(at, inside, True, outside, domains, *flags)


def look(text: str, port: int, named: bool) -> Gateway:
    """Return the gateway at a place; raise OSError, or ValueError for what is none.

    What was named, and speaks no HTTP, is a SOCKS server.
    """
    plain = text.startswith("socks5://")
    host = re.sub(r"^\w+://|/$", "", text)
    if match := re.fullmatch(r"\[?([^]]+?)\]?:(\d+)|\[(.+)\]", host):
        if host.count(":") == 1 or host.startswith("["):
            host, port = match[1] or match[3], int(match[2] or port)
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    at = endpoint(found[0][4])
    gateway = Gateway(at, parse_blocks(f"{OWN} {PRIVATE}"))
    if plain:
        return gateway
    page = asyncio.wait_for(gateway.fetch("/lat.json", [b"", b""]), FIND_TIME)
    try:
        return read_lat(at, asyncio.run(page))
    except (LookupError, TypeError, ValueError, TimeoutError, ConnectionResetError):
        pass
    except asyncio.TimeoutError:  # it is not yet a TimeoutError in Python 3.10
        pass
    if not named:
        raise ValueError("it has no /lat.json")
    say(f"{at} has no /lat.json, so it is taken for a SOCKS server")
    return gateway


def default_route() -> str:
    """Return the address of the router, "" if there is none."""
    with contextlib.suppress(OSError), open("/proc/net/route") as table:
        for _, target, router, *_ in map(str.split, table):
            if target == "00000000" != router:
                packed = int(router, 16).to_bytes(4, sys.byteorder)
                return socket.inet_ntop(socket.AF_INET, packed)
    return ""


def find_gateway(option: str, settings: Settings) -> Gateway:
    """Return the gateway that is named, or one that is found; raise Fault."""
    named = option or os.environ.get("NATRUN_GATEWAY") or settings.gateway
    places = [(named, 8080)] if named else [("wpad", 80), (default_route(), 8080)]
    tried, before = [], os.environ.get("RES_OPTIONS")
    for text, port in places:
        os.environ["RES_OPTIONS"] = "timeout:1 attempts:1"  # no server may be there
        try:
            return look(text, port, bool(named))
        except (OSError, ValueError) as error:
            tried.append(f"{text or 'no default route'}: {reason(error)}")
        finally:
            if before is None:
                os.environ.pop("RES_OPTIONS", None)
            else:
                os.environ["RES_OPTIONS"] = before
    what = "cannot use the gateway" if named else "cannot find a gateway (-g names it)"
    raise Fault(f"{what}: {'; '.join(tried)}")


# --- The relay ----------------------------------------------------------------
#
# A connection through the waiting room is two: to the program and to the gateway.
# One process, forked while it is small, joins them all; splice(2) moves the bytes in
# the kernel.  It goes on without the supervisor for what is under way.


def carry(source: socket.socket, sink: socket.socket) -> None:
    """Move what enters one socket to the other, to its end; pass a reset on."""
    with contextlib.ExitStack() as stack:
        out, into = os.pipe()
        stack.callback(os.close, out)
        stack.callback(os.close, into)
        try:
            while size := os.splice(source.fileno(), into, PIPE_SIZE):
                if size == 65536:  # all that it holds: bulk comes
                    with contextlib.suppress(OSError):
                        fcntl.fcntl(into, fcntl.F_SETPIPE_SZ, PIPE_SIZE)
                while size:
                    size -= os.splice(out, sink.fileno(), size)
            sink.shutdown(socket.SHUT_WR)
        except OSError:
            for sock in (source, sink):
                with contextlib.suppress(OSError):
                    linger = struct.pack("ii", 1, 0)
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                    sock.shutdown(socket.SHUT_RD)  # wakes the other direction


def carry_both(one: socket.socket, other: socket.socket) -> None:
    """Join two sockets until both directions have ended."""
    with one, other:
        back = threading.Thread(target=carry, args=(other, one))
        back.start()
        carry(one, other)
        back.join()


def relay(control: socket.socket) -> None:
    """Join the pairs of sockets that come by a socket, until it ends."""
    threading.stack_size(64 * 1024)
    while True:
        data, fds, _, _ = socket.recv_fds(control, 1, 2)
        if not data:
            return
        pair = [socket.socket(fileno=fd) for fd in fds]
        for sock in pair:
            sock.setblocking(True)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        threading.Thread(target=carry_both, args=pair).start()


def fork_relay() -> socket.socket:
    """Start the relay; return the socket by which it takes pairs."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    if os.fork():
        theirs.close()
        ours.setblocking(False)
        return ours
    ours.close()
    # A reader of our output must not wait for what is still under way.
    for fd in range(3):
        os.dup2(os.open(os.devnull, os.O_RDWR), fd)
    relay(theirs)
    for thread in threading.enumerate():
        if thread is not threading.current_thread():
            thread.join()
    os._exit(0)


# --- Names --------------------------------------------------------------------
#
# What a program sends to port 53 comes here.  The gateway looks names up, so the
# program connects to true addresses.  For a SOCKS server that cannot (RESOLVE), a
# name gets an address of 198.18.0.0/15, which no host has (RFC 2544), and is asked
# for by name later.  Names without a dot, and those of the LAT's domains, are the
# machine's own name server's.

A, PTR, AAAA, SVCB, HTTPS = 1, 12, 28, 64, 65
BAD, FAILED, NO_NAME = 1, 2, 3  # RFC 1035 section 4.1.1
QUESTION = re.compile(rb"(?s)(?:[\x01-\x3f][-\w]+)+\0(..)\0\x01")
FAKES = parse_blocks("198.18.0.0/15")


def reply_to(
    query: bytes, code: int, end: int, kind: int = 0, data: bytes = b""
) -> bytes:
    """Return the response to a query whose question ends there, with data or none."""
    flags = 0x8080 | query[2] << 8 & 0x100 | code
    counts = (int(end > 12), int(bool(data)), 0, 0)
    record = struct.pack("!HHHIH", 0xC00C, kind, 1, NAME_TIME, len(data)) + data
    head = query[:2] + struct.pack("!HHHHH", flags, *counts)
    return head + query[12:end] + (record if data else b"")


def labels_of(question: bytes) -> list[bytes]:
    """Return the labels of a name as a query has it; raise ValueError."""
    labels = []
    while question[0]:
        size = question[0] + 1
        labels.append(question[1:size])
        if len(question) <= size or b"." in labels[-1]:
            raise ValueError("not a name")
        question = question[size:]
    return labels


def reversed_address(name: bytes, kind: int) -> Endpoint | None:
    """Return the address whose name is asked for, None if none is."""
    labels = name.split(b".")[::-1]
    with contextlib.suppress(ValueError):
        if kind == PTR and labels[1] == b"in-addr" and len(labels) == 6:
            return Endpoint(bytes(map(int, labels[2:])), 0)
        if kind == PTR and labels[1] == b"ip6" and len(labels) == 34:
            return Endpoint(bytes.fromhex(b"".join(labels[2:]).decode()), 0)
    return None


def remember(table: dict[Any, Any], key: Any, value: Any) -> None:
    """Put something into a table that does not grow for ever."""
    table[key] = value
    if len(table) > RECORDS:
        del table[next(iter(table))]


class Names:
    """The addresses of names, for all programs of a run."""

    def __init__(self, gateway: Gateway, login: Callable[[str], list[bytes]]) -> None:
        self.gateway, self.login = gateway, login
        self.known: dict[bytes, tuple[float, asyncio.Future[bytes]]] = {}
        self.fakes: dict[bytes, bytes] = {}
        self.called: dict[bytes, bytes] = {}  # names by address
        self.only_fakes = False

    def is_near(self, name: bytes) -> bool:
        """Return whether a name is for the machine's own name server."""
        ends = [b"localhost", *map(str.encode, self.gateway.domains)]
        return b"." not in name or any(b"." + end in b"." + name for end in ends)

    async def answer(
        self, query: bytes, server: Endpoint, app: str, fake: bool
    ) -> bytes:
        """Return the response to a query that a program sent to a server."""
        match = QUESTION.match(query, 12)
        if len(query) < 12 or not match or query[4:6] != b"\0\1":
            return reply_to(query.ljust(12, b"\0"), BAD, 12)
        kind, end, data = int.from_bytes(match[1], "big"), match.end(), b""
        try:
            name = b".".join(labels_of(match[0])).lower()
            near, target = self.is_near(name), reversed_address(name, kind)
            if target and not self.gateway.has_inside(target.packed):
                data = await self.look_back(target, app)
                return reply_to(query, 0, end, kind, data)
            if near or kind not in (A, AAAA, SVCB, HTTPS):
                forwarded = self.forward(query, server, app, near)
                return await asyncio.wait_for(forwarded, QUERY_TIME)
            if kind in (A, AAAA):
                data = await self.look_up(name, app, fake)
            data = data if len(data) == (4 if kind == A else 16) else b""
        except (OSError, ValueError, asyncio.TimeoutError) as error:
            unknown = getattr(error, "errno", 0) == errno.EHOSTUNREACH
            return reply_to(query, NO_NAME if unknown else FAILED, end)
        return reply_to(query, 0, end, kind, data)

    async def forward(
        self, query: bytes, server: Endpoint, app: str, near: bool
    ) -> bytes:
        """Return what a name server answers, by the gateway if need be."""
        loop = asyncio.get_running_loop()
        if self.gateway.has_inside(server.packed):
            with socket.socket(server.family, socket.SOCK_DGRAM) as sock:
                sock.setblocking(False)
                sock.connect(server.pair())
                await loop.sock_sendall(sock, query)
                return await loop.sock_recv(sock, 65535)
        if near:
            raise failure(errno.EHOSTUNREACH)
        with socket.socket(self.gateway.at.family) as sock:
            await self.gateway.reach(sock)
            await self.gateway.ask(sock, CONNECT, server, self.login(app))
            # RFC 1035 section 4.2.2: by TCP, a length comes first.
            await loop.sock_sendall(sock, len(query).to_bytes(2, "big") + query)
            size = await receive(sock, 2)
            return await receive(sock, int.from_bytes(size, "big"))

    async def look_up(self, name: bytes, app: str, fake: bool) -> bytes:
        """Return the address of a name; raise OSError."""
        if not fake and not self.only_fakes:
            until, known = self.known.get(name, (0.0, None))
            if not known or until < time.monotonic():
                # A resolver asks for A and AAAA at once: that is one question.
                steps = self.resolve(RESOLVE, name + bytes(2), app)
                known = asyncio.ensure_future(steps)
                remember(self.known, name, (time.monotonic() + NAME_TIME, known))
            try:
                return await known
            except OSError as error:
                none = self.gateway.natwork or error.errno != errno.ECONNREFUSED
                if none and error.errno != errno.EOPNOTSUPP:
                    raise
        self.only_fakes = self.only_fakes or not fake
        if name not in self.fakes:
            number = (198 << 24) + (18 << 16) + 1 + len(self.fakes) % 131070
            self.fakes[name] = number.to_bytes(4, "big")
            self.called[self.fakes[name]] = name
        return self.fakes[name]

    async def look_back(self, target: Endpoint, app: str) -> bytes:
        """Return the name of an address as a query has it; raise OSError."""
        name = self.called.get(target.packed)
        name = name or await self.resolve(RESOLVE_PTR, target, app)
        labels = [label[:63] for label in name[:253].strip(b".").split(b".")]
        return b"".join(bytes([len(label)]) + label for label in labels) + b"\0"

    async def resolve(self, command: int, what: Endpoint | bytes, app: str) -> bytes:
        """Return what the gateway finds for a name or an address; raise OSError."""
        with socket.socket(self.gateway.at.family) as sock:
            await self.gateway.reach(sock)
            found, _ = await self.gateway.ask(sock, command, what, self.login(app))
            return unmapped(found)


# --- Calls --------------------------------------------------------------------


class Call:
    """A notification: a thread has made a call, and waits for our answer."""

    def __init__(self, listener: int, raw: bytes, names: dict[int, str]) -> None:
        # struct seccomp_notif, with its struct seccomp_data
        fields = struct.unpack("=QIIiIQ6Q", raw)
        self.listener, self.id, self.tid = listener, fields[0], fields[1]
        self.name, self.arguments = names[fields[3]], fields[6:]
        self.task: asyncio.Task[None] | None = None  # ends with the call
        with contextlib.suppress(OSError), open(f"/proc/{self.tid}/comm") as file:
            self.app = file.read().rstrip("\n")

    app = "?"

    def answer(self, error: int = 0, flags: int = 0) -> None:
        response = struct.pack("=QqiI", self.id, 0, -error, flags)
        with contextlib.suppress(OSError):  # it has been killed
            fcntl.ioctl(self.listener, NOTIF_SEND, response)

    def proceed(self) -> None:
        """Let the kernel do what it would have done without us."""
        self.answer(flags=CONTINUE)

    def give(self, sock: socket.socket, flags: int) -> None:
        """Answer with a new descriptor, which is a socket of ours; raise OSError."""
        sock.setblocking(not flags & socket.SOCK_NONBLOCK)
        cloexec = flags & socket.SOCK_CLOEXEC  # which is O_CLOEXEC
        raw = struct.pack("=QIIII", self.id, ADDFD_SEND, sock.fileno(), 0, cloexec)
        try:
            fcntl.ioctl(self.listener, NOTIF_ADDFD, raw)
        except OSError as error:
            if error.errno == errno.ENOENT:
                raise  # it is not there any more
            self.answer(error.errno or errno.EMFILE)

    def swap(self, old: socket.socket) -> None:
        """Put an ordinary socket in the place of one of the namespace."""
        fd = self.arguments[0] & WHOLE
        with open(f"/proc/{self.tid}/fdinfo/{fd}") as file:
            flags = int(dict(line.split(":") for line in file)["flags"], 8)
        with socket.socket(old.family, old.type) as new:
            options = socket.SO_REUSEADDR, socket.SO_REUSEPORT, socket.SO_BROADCAST
            for option in options:
                value = old.getsockopt(socket.SOL_SOCKET, option)
                new.setsockopt(socket.SOL_SOCKET, option, value)
            new.setblocking(not flags & os.O_NONBLOCK)
            fields = self.id, ADDFD_SETFD, new.fileno(), fd, flags & os.O_CLOEXEC
            fcntl.ioctl(self.listener, NOTIF_ADDFD, struct.pack("=QIIII", *fields))

    def is_alive(self) -> bool:
        try:
            fcntl.ioctl(self.listener, NOTIF_ID_VALID, struct.pack("=Q", self.id))
            return True
        except OSError:
            return False

    def status(self, *names: str) -> list[str]:
        """Return lines of /proc/TID/status; raise OSError."""
        with open(f"/proc/{self.tid}/status") as file:
            lines = dict(line.split(":", 1) for line in file)
        return [lines[name].strip() for name in names]

    def is_interrupted(self) -> bool:
        """Return whether a signal waits that the program is to see now."""
        names = "SigPnd", "ShdPnd", "SigBlk", "SigIgn"
        own, shared, blocked, ignored = (int(s, 16) for s in self.status(*names))
        return bool((own | shared) & ~blocked & ~ignored)

    def borrow(self) -> socket.socket:
        """Return the socket that the call is about; raise OSError.

        It is not a copy: what is done to it here is done there.
        """
        try:
            process = os.pidfd_open(self.tid)
        except OSError:  # it is not the first thread; PIDFD_THREAD came with Linux 6.9
            process = os.pidfd_open(int(*self.status("Tgid")))
        try:
            number = self.arguments[0] & WHOLE
            fd = system(LIBC.syscall, PIDFD_GETFD, process, number, 0)
        finally:
            os.close(process)
        try:
            if self.is_alive():  # else the number may be another's by now
                return socket.socket(fileno=fd)
            raise failure(errno.ESRCH)
        except OSError:
            os.close(fd)
            raise

    def read(self, there: int, size: int) -> bytes:
        """Return what stands in the program's memory; raise OSError."""
        here = ctypes.create_string_buffer(size)
        copy(LIBC.process_vm_readv, self.tid, there, here)
        if not self.is_alive():
            raise failure(errno.ESRCH)
        return here.raw

    def write(self, there: int, data: bytes) -> None:
        here = (ctypes.c_ubyte * len(data))(*data)
        copy(LIBC.process_vm_writev, self.tid, there, here)

    def target(self) -> Endpoint | None:
        """Return the address that connect() or bind() is about; raise OSError."""
        return parse_sockaddr(self.read(self.arguments[1], self.arguments[2] & 0xFF))

    def write_address(self, family: int, where: Endpoint) -> None:
        """Write an address where the second and third argument say; raise OSError."""
        there, size_at = self.arguments[1:3]
        raw = write_sockaddr(family, where)
        room = int.from_bytes(self.read(size_at, 4), sys.byteorder, signed=True)
        if room < 0:
            raise failure(errno.EINVAL)
        self.write(there, raw[:room])
        self.write(size_at, len(raw).to_bytes(4, sys.byteorder))


@dataclass(eq=False)
class Flow:
    """What is known of a socket that is not what the kernel takes it for."""

    peer: Endpoint | None
    local: Endpoint | None = None
    pending: bool = False
    error: int = 0  # to be told once
    waits: bool = False  # it is not O_NONBLOCK
    paired: bool = False  # it went through the waiting room
    inode: int = 0
    since: float = field(default_factory=time.monotonic)
    mapped: int = 0  # the port here that a port of the outside leads to
    listened: bool = False
    task: asyncio.Task[None] | None = None
    calls: list[Call] = field(default_factory=list)  # that wait for its end


class WaitingRoom:
    """A listener whose queue is full, so that the kernel drops each SYN to it.

    What connects to it is neither accepted nor refused, until a socket of ours
    calls from the room's address.
    """

    def __init__(self) -> None:
        self.listener = self.bound(("127.0.0.1", 0))
        self.listener.listen(0)
        self.address = self.listener.getsockname()
        self.filler = socket.create_connection(self.address)

    def bound(self, address: tuple[str, int]) -> socket.socket:
        sock = socket.socket()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        sock.bind(address)
        sock.setblocking(False)
        return sock

    def enter(self, sock: socket.socket) -> int:
        """Connect a socket that does not block; return the errno."""
        return sock.connect_ex(endpoint(self.address).pair(sock.family))

    async def meet(self, sock: socket.socket) -> socket.socket:
        """Return a socket that is connected to one that has entered; raise OSError."""
        near, loop = self.bound(self.address), asyncio.get_running_loop()
        try:
            # TCP simultaneous open: RFC 9293 section 3.5.
            address = endpoint(sock.getsockname()).pair()
            await asyncio.wait_for(loop.sock_connect(near, address), REACH_TIME)
            return near
        except BaseException:
            near.close()
            raise


def accept_now(sock: socket.socket) -> socket.socket:
    """Accept a connection if one is there; raise OSError."""
    waits = os.get_blocking(sock.fileno())
    if waits:  # another process may have been faster
        sock.setblocking(False)
    try:
        return sock.accept()[0]
    finally:
        if waits:
            sock.setblocking(True)


def netns(sock: socket.socket) -> bytes:
    """Return what the network namespace of a socket is known by."""
    return sock.getsockopt(socket.SOL_SOCKET, SO_NETNS_COOKIE, 8)


def is_connected(sock: socket.socket) -> bool:
    try:
        return bool(sock.getpeername())
    except OSError:
        return False


def free(sock: socket.socket) -> None:
    """Take from a borrowed socket what would keep it from the gateway."""
    for level, option, value in (
        (socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, bytes(4)),
        (socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b""),
        (socket.IPPROTO_TCP, TCP_FASTOPEN_CONNECT, bytes(4)),
    ):
        with contextlib.suppress(OSError):
            sock.setsockopt(level, option, value)


# --- Datagrams ----------------------------------------------------------------
#
# Sockets of UDP are made in a network namespace of the run, whose only way out is a
# cable to us.  So the kernel does all that a program can ask of such a socket.  We
# read packets off the cable and wrap them for the gateway, one association (RFC 1928
# section 7) for each port; packets that come back go in by the cable, from the
# address that they came from.

NEWUSER, NEWNET = 0x10000000, 0x40000000
RTM_NEWLINK, RTM_SETLINK, RTM_NEWADDR, RTM_NEWROUTE = 16, 19, 20, 24
UP, NOARP, NODAD = 0x1, 0x80, 0x2
SOL_PACKET, IGNORE_OUTGOING = 263, 23
CABLE = "natrun0", "natrun1"  # the namespace's end, and ours
ENDS = b"\2natru", b"\2natrU"  # their addresses, made up
SYSCTLS = {
    "ipv4/ip_nonlocal_bind": "1",
    "ipv6/ip_nonlocal_bind": "1",
    "ipv4/conf/all/rp_filter": "0",
    "ipv4/conf/natrun0/rp_filter": "0",
    "ipv4/conf/natrun0/route_localnet": "1",  # name servers are often on loopback
}
TO_IP = ENDS[0] + ENDS[1] + b"\x08\0"  # Ethernet's header
TO_IP6 = ENDS[0] + ENDS[1] + b"\x86\xdd"


def attribute(kind: int, data: bytes) -> bytes:
    """Return a struct rtattr."""
    return struct.pack("=HH", 4 + len(data), kind) + data + bytes(-len(data) % 4)


def change(sock: socket.socket, kind: int, body: bytes) -> None:
    """Have netlink do something; raise OSError."""
    flags = 0x605  # REQUEST, ACK, CREATE, EXCL
    sock.send(struct.pack("=IHHII", 16 + len(body), kind, flags, 1, 0) + body)
    (code,) = struct.unpack_from("=i", sock.recv(4096), 16)
    if code:
        raise failure(-code)


def link(end: int) -> bytes:
    """Return what netlink wants to know of an end of the cable."""
    head = struct.pack("=BxHiII", 0, 0, 0, NOARP, NOARP)
    name = attribute(3, CABLE[end].encode() + b"\0")
    # As large as a datagram can be; and one packet is one datagram.
    sizes = attribute(4, struct.pack("=I", 65535)) + attribute(40, b"\1\0\0\0")
    return head + name + attribute(1, ENDS[end]) + sizes


def make_namespace(outside: Blocks) -> socket.socket:
    """Put this process into a namespace with a cable; return its other end."""
    user, group = os.getuid(), os.getgid()
    system(LIBC.unshare, NEWUSER | NEWNET)
    maps = {"setgroups": "deny", "uid_map": f"{user} {user} 1"}
    for name, text in {**maps, "gid_map": f"{group} {group} 1"}.items():
        with open(f"/proc/self/{name}", "w") as file:
            file.write(text)
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0) as netlink:
        peer = attribute(2, attribute(1, link(1)))
        change(
            netlink, RTM_NEWLINK, link(0) + attribute(18, attribute(1, b"veth") + peer)
        )
        for name in CABLE:  # only now: an end cannot be up without the other
            index = socket.if_nametoindex(name)
            change(netlink, RTM_SETLINK, struct.pack("=BxHiII", 0, 0, index, UP, UP))
        index = socket.if_nametoindex(CABLE[0])
        for name, value in SYSCTLS.items():
            with contextlib.suppress(OSError):
                with open(f"/proc/sys/net/{name}", "w") as file:
                    file.write(value)
        for packed, _ in outside:
            family, bits = Endpoint(packed, 0).family, 8 * len(packed)
            head = struct.pack("=BBBBI", family, bits, NODAD, 0, index)
            both = attribute(1, packed) + attribute(2, packed)
            change(netlink, RTM_NEWADDR, head + both)
            scope = 253 if family == socket.AF_INET else 0
            head = struct.pack("=BBBBBBBBI", family, 0, 0, 0, 254, 3, scope, 1, 0)
            route = head + attribute(4, struct.pack("=i", index))
            with contextlib.suppress(FileExistsError):  # of two addresses
                change(netlink, RTM_NEWROUTE, route)
    cable = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
    cable.setsockopt(SOL_PACKET, IGNORE_OUTGOING, 1)
    cable.bind((CABLE[1], 3))  # ETH_P_ALL
    return cable


def fork_namespace(outside: Blocks) -> tuple[socket.socket, socket.socket, int]:
    """Start a process that makes sockets in a namespace; raise Fault.

    Return the socket to ask it by, the cable, and its process number.
    """
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    pid = os.fork()
    if pid:
        theirs.close()
        why, fds, _, _ = socket.recv_fds(ours, 200, 1)
        if not fds:
            raise Fault(why.decode())
        cable = socket.socket(fileno=fds[0])
        for sock in (ours, cable):
            sock.setblocking(False)
        return ours, cable, pid
    ours.close()
    try:
        cable = make_namespace(outside)
        socket.send_fds(theirs, [b"+"], [cable.fileno()])
        while asked := theirs.recv(16):
            with socket.socket(*struct.unpack("=ii", asked)) as sock:
                socket.send_fds(theirs, [b"+"], [sock.fileno()])
    except OSError as error:
        with contextlib.suppress(OSError):
            theirs.send(reason(error).encode())
    finally:
        os._exit(0)


def checksum(data: bytes) -> int:
    """Return the checksum of RFC 1071."""
    # The sum of 16-bit words, with carries added, is the number modulo 0xFFFF.
    return 0xFFFF - int.from_bytes(data + bytes(len(data) % 2), "big") % 0xFFFF


def read_packet(raw: bytes) -> tuple[Endpoint, Endpoint, bytes] | None:
    """Return source, target and payload of a packet, None if it is not UDP."""
    if raw[14] >> 4 == 4 and raw[23] == socket.IPPROTO_UDP:
        at, source, target = 14 + 4 * (raw[14] & 15), raw[26:30], raw[30:34]
    elif raw[14] >> 4 == 6 and raw[20] == socket.IPPROTO_UDP:
        at, source, target = 54, raw[22:38], raw[38:54]
    else:
        return None
    here, there, size = struct.unpack_from("!HHH", raw, at)
    return Endpoint(source, here), Endpoint(target, there), raw[at + 8 : at + size]


def write_packet(source: Endpoint, target: Endpoint, data: bytes) -> bytes:
    """Return a packet of UDP."""
    size, addresses = 8 + len(data), source.packed + target.packed
    ports = struct.pack("!HHH", source.port, target.port, size)
    if len(source.packed) == 4:  # there, UDP need not have a checksum
        head = struct.pack("!BxHxxxxBBxx", 0x45, 20 + size, 64, 17) + addresses
        head = head[:10] + checksum(head).to_bytes(2, "big") + head[12:]
        return TO_IP + head + ports + bytes(2) + data
    head = struct.pack("!BxxxHBB", 0x60, size, 17, 64) + addresses
    pseudo = addresses + struct.pack("!II", size, 17)
    total = checksum(pseudo + ports + bytes(2) + data)
    return TO_IP6 + head + ports + total.to_bytes(2, "big") + data


class Association:
    """A port of the namespace, and how its datagrams leave the machine."""

    def __init__(self, here: Endpoint) -> None:
        self.here = here
        self.relayed: socket.socket | None = None  # by the gateway, once it is open
        self.queue: list[bytes] = []  # until then
        self.near: dict[int, socket.socket] = {}  # by family, to the inside
        self.task: asyncio.Task[None] | None = None


class Datagrams:
    """The datagrams of a run."""

    def __init__(self, gateway: Gateway, names: Names, app: str, dns: str) -> None:
        """Make the namespace; raise Fault."""
        self.gateway, self.names, self.app, self.dns = gateway, names, app, dns
        self.maker, self.cable, self.pid = fork_namespace(gateway.outside)
        self.asked: list[Call] = []  # for sockets, in order
        self.associations: dict[Endpoint, Association] = {}
        self.queries: set[asyncio.Task[None]] = set()
        self.login = names.login(app)
        # Asked for each datagram.
        self.has_inside = functools.lru_cache(RECORDS)(gateway.has_inside)
        self.head = functools.lru_cache(RECORDS)(
            lambda there: bytes(3) + request_of(0, there)[3:]
        )

    def serve(self) -> None:
        loop = asyncio.get_running_loop()
        loop.add_reader(self.cable, self.read_cable)
        loop.add_reader(self.maker, self.hand_out)
        self.sweeping = loop.create_task(self.sweep())

    def make(self, call: Call) -> None:
        """Have socket() answered with one of the namespace; raise OSError."""
        family, kind, _ = call.arguments[:3]
        self.maker.send(struct.pack("=ii", family & WHOLE, kind & 15))
        self.asked.append(call)

    def hand_out(self) -> None:
        """Answer a call with the socket that has been made for it."""
        _, fds, _, _ = socket.recv_fds(self.maker, 1, 1)
        if not fds:  # its maker has been killed
            asyncio.get_running_loop().remove_reader(self.maker)
            for call in self.asked:
                call.answer(errno.EIO)
            return
        with socket.socket(fileno=fds[0]) as sock, contextlib.suppress(OSError):
            call = self.asked.pop(0)
            call.give(sock, call.arguments[1])

    def read_cable(self) -> None:
        """Carry what programs have sent."""
        with contextlib.suppress(BlockingIOError):
            for _ in range(64):  # then others have their turn
                packet = read_packet(self.cable.recv(65535 + 54))
                if packet:
                    with contextlib.suppress(OSError):  # one lost datagram
                        self.carry(*packet)

    def carry(self, here: Endpoint, there: Endpoint, data: bytes) -> None:
        """Send a datagram to where it goes; raise OSError."""
        one = self.associations.get(here)
        if not one:
            one = self.associations[here] = Association(here)
        loop = asyncio.get_running_loop()
        if there.port == 53 and self.dns != "local":
            task = loop.create_task(self.answer(here, there, data))
            self.queries.add(task)
            task.add_done_callback(self.queries.discard)
        elif self.has_inside(there.packed):
            family = there.family
            if family not in one.near:
                sock = one.near[family] = socket.socket(family, socket.SOCK_DGRAM)
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
                sock.setblocking(False)
                loop.add_reader(sock, self.read, one, sock)
            one.near[family].sendto(data, there.pair())
        else:
            message = self.head(there) + data
            if one.relayed:
                one.relayed.send(message)
            elif len(one.queue) < 64:
                one.queue.append(message)
            if not one.task:
                one.task = loop.create_task(self.associate(one))

    async def answer(self, here: Endpoint, there: Endpoint, query: bytes) -> None:
        fake = self.dns == "fake"
        found = await self.names.answer(query, there, self.app, fake)
        self.inject(there, here, found)

    def inject(self, source: Endpoint, target: Endpoint, data: bytes) -> None:
        """Put a datagram into the namespace."""
        with contextlib.suppress(OSError):  # one lost datagram
            self.cable.send(write_packet(source, target, data))

    def read(self, one: Association, sock: socket.socket) -> None:
        """Take what the inside answers or the gateway passes on: RFC 1928 section 7."""
        with contextlib.suppress(OSError):
            for _ in range(64):
                data, sender = sock.recvfrom(65535)
                if sock is not one.relayed:
                    self.inject(endpoint(sender), one.here, data)
                elif len(data) > 10 and data[:3] == bytes(3) and data[3] in (1, 4):
                    at = 4 + 4 * data[3]
                    source = Endpoint(
                        data[4:at], int.from_bytes(data[at : at + 2], "big")
                    )
                    self.inject(source, one.here, data[at + 2 :])

    async def associate(self, one: Association) -> None:
        """Open an association with the gateway, and keep it until it ends."""
        loop = asyncio.get_running_loop()
        try:
            with socket.socket(self.gateway.at.family) as control:
                await self.gateway.reach(control)
                # From the same port of the outside, where it is free.
                where, who = Endpoint(bytes(4), one.here.port), self.login
                host, port = await self.gateway.ask(control, ASSOCIATE, where, who)
                relay = Endpoint(host if any(host) else self.gateway.at.packed, port)
                with socket.socket(relay.family, socket.SOCK_DGRAM) as sock:
                    sock.setblocking(False)
                    sock.connect(relay.pair())
                    loop.add_reader(sock, self.read, one, sock)
                    one.relayed = sock
                    try:
                        for message in one.queue:
                            sock.send(message)
                        one.queue.clear()
                        await receive(control, 1)
                    finally:
                        loop.remove_reader(sock)
        except OSError as error:
            if not one.relayed:
                say(f"cannot send datagrams by {self.gateway.at}: {reason(error)}")
        finally:
            one.relayed, one.task = None, None

    async def sweep(self) -> None:
        """End associations of sockets that have been closed, now and then."""
        while True:
            await asyncio.sleep(SWEEP_TIME)
            ports = set()
            for name in ("udp", "udp6"):
                with open(f"/proc/{self.pid}/net/{name}") as table:
                    lines = [line.split() for line in table][1:]
                    ports |= {int(line[1].rpartition(":")[2], 16) for line in lines}
            for here in [*self.associations]:
                if here.port not in ports:
                    self.end(self.associations.pop(here))

    def end(self, one: Association) -> None:
        if one.task:
            one.task.cancel()
        for sock in one.near.values():
            asyncio.get_running_loop().remove_reader(sock)
            sock.close()


# --- Mappings -----------------------------------------------------------------
#
# A program that listens on the outside address listens on this machine, and the
# gateway passes on to it who calls there: NAT-PMP, RFC 6886.


PMP_PORT = 5351
RESULTS = {2: errno.EACCES, 3: errno.ENETUNREACH, 5: errno.EOPNOTSUPP}


async def readable(sock: socket.socket) -> None:
    """Wait until there is something to read, or to accept."""
    loop = asyncio.get_running_loop()
    ready = asyncio.Event()
    loop.add_reader(sock, ready.set)
    try:
        await ready.wait()
    finally:
        loop.remove_reader(sock)


def inodes() -> set[int]:
    """Return the inodes of TCP sockets that listen or are connected."""
    found = set()
    for path in "/proc/net/tcp", "/proc/net/tcp6":
        with contextlib.suppress(OSError), open(path) as table:
            found |= {int(line.split()[9]) for line in table if ":" in line[:8]}
    return found


class Mappings:
    """The mappings of a run: they are renewed as long as somebody listens."""

    def __init__(self, gateway: Gateway, who: list[bytes]) -> None:
        self.gateway, self.who = gateway, who
        self.held: dict[bytes, Flow] = {}  # by the listener's cookie
        self.task: asyncio.Task[None] | None = None

    async def ask(self, internal: int, external: int, seconds: int) -> int:
        """Have the gateway map a port, or unmap it; return the port outside."""
        at, loop = (
            Endpoint(self.gateway.at.packed, PMP_PORT),
            asyncio.get_running_loop(),
        )
        request = struct.pack("!BBHHHI", 0, 2, 0, internal, external, seconds)
        with socket.socket(at.family, socket.SOCK_DGRAM) as sock:
            sock.setblocking(False)
            sock.connect(at.pair())
            for patience in (0.25, 0.5, 1.0):
                await loop.sock_sendall(sock, request)
                with contextlib.suppress(asyncio.TimeoutError, ConnectionRefusedError):
                    answer = await asyncio.wait_for(loop.sock_recv(sock, 64), patience)
                    _, code, result, _ = struct.unpack_from("!BBHI", answer)
                    if code == 130 and result == 0 and answer[8:10] == request[4:6]:
                        return int.from_bytes(answer[10:12], "big")
                    raise failure(RESULTS.get(result, errno.EADDRNOTAVAIL))
        raise failure(errno.ENETUNREACH)

    async def add(self, sock: socket.socket, where: Endpoint) -> Flow:
        """Bind a socket, and map a port of the outside to it; raise OSError."""
        anywhere = "::" if sock.family == socket.AF_INET6 else ""
        if not where.port:
            sock.bind((anywhere, 0))
        internal = where.port or sock.getsockname()[1]
        if self.who[1] and not self.task:  # of users, only who has a session may map
            self.task = asyncio.ensure_future(self.stay())
            await asyncio.sleep(LOOK_TIME)
        external = await self.ask(internal, internal, LEASE)
        try:
            if where.port:
                if external != where.port:
                    raise failure(errno.EADDRINUSE)
                sock.bind((anywhere, where.port))
        except OSError:
            await self.ask(internal, 0, 0)
            raise
        flow = Flow(None, Endpoint(where.packed, external), mapped=internal)
        self.held[cookie(sock)] = flow
        return flow

    async def stay(self) -> None:
        """Keep a session open."""
        with socket.socket(self.gateway.at.family) as control:
            with contextlib.suppress(OSError):
                await self.gateway.reach(control)
                await self.gateway.ask(control, ASSOCIATE, NOWHERE, self.who)
                await receive(control, 1)
        self.task = None

    async def keep(self) -> None:
        """Renew mappings in use, and end those whose listener is gone."""
        while True:
            await asyncio.sleep(1)
            live, now = inodes() if self.held else set(), time.monotonic()
            for number, one in [*self.held.items()]:
                one.listened = one.listened or one.inode in live
                over = one.listened or now > one.since + LEASE
                with contextlib.suppress(OSError):
                    if one.inode not in live and over:
                        del self.held[number]
                        await self.ask(one.mapped, 0, 0)
                    elif now > one.since + LEASE / 2 and one.local:
                        one.since = now
                        await self.ask(one.mapped, one.local.port, LEASE)

    async def end(self) -> None:
        """Unmap all."""
        ends = [self.ask(one.mapped, 0, 0) for one in self.held.values()]
        await asyncio.gather(*ends, return_exceptions=True)


# --- The supervisor -----------------------------------------------------------
#
# One process answers the calls of all processes of a run, in one event loop in which
# nothing may block.  What fails here is an answer, too, and never "go on".


def user_name() -> str:
    import pwd

    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        return str(os.getuid())


def tell_fault(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """Say what has gone wrong in steps that should never fail."""
    error = context.get("exception")
    say(f"fault: {type(error).__name__}: {error or context.get('message')}")


class Supervisor:
    """The answers to the calls of a run."""

    datagrams: Datagrams | None = None

    def __init__(
        self, settings: Settings, gateway: Gateway, relay: socket.socket, verbose: bool
    ) -> None:
        self.settings, self.gateway, self.relay = settings, gateway, relay
        self.verbose, self.notified, self.said = verbose, 0, set[str]()
        self.names, self.room = Names(gateway, self.login), WaitingRoom()
        self.flows: dict[bytes, Flow] = {}  # by cookie
        self.unsettled: set[bytes] = set()  # cookies of flows with something to tell
        self.limit = RECORDS
        self.waiting: dict[int, Call] = {}
        self.looking: asyncio.Task[None] | None = None
        self.tasks: set[asyncio.Task[None]] = set()
        self.mappings = Mappings(gateway, self.login("natrun"))
        self.kept: dict[bytes, list[socket.socket]] = {}  # accepted for nobody yet
        self.server = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.asked: dict[int, tuple[Endpoint, str, bool]] = {}  # by the asker's port
        self.stories: dict[str, Callable[[Call], None]] = {
            "connect": self.connect,
            "getsockopt": self.getsockopt,
            "getsockname": self.getsockname,
            "getpeername": self.getpeername,
            "socket": self.make_socket,
            "bind": self.bind,
            "accept": self.accept,
            "accept4": self.accept,
        }

    def calls(self) -> list[str]:
        """Return the calls that it is to be notified of."""
        programs = self.settings.programs.values()
        refused = any(program.udp == "no" for program in programs)
        without = set() if self.datagrams or refused else {"socket"}
        if not self.gateway.mappings:
            without |= {"accept", "accept4", *({"bind"} if without else ())}
        return [name for name in self.stories if name not in without]

    def login(self, app: str) -> list[bytes]:
        """Return the user that the gateway's log is to have, and a password."""
        user, password = self.settings.user or user_name(), self.settings.password
        if not password:
            user = f"{user};app={app};host={socket.gethostname()}"
        return [user.encode()[:255], password.encode()[:255]]

    def once(self, text: str) -> None:
        """Say what holds for the whole run."""
        if text not in self.said:
            self.said.add(text)
            say(text)

    def start(self, steps: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(steps)
        self.tasks.add(task)  # asyncio itself does not keep it
        task.add_done_callback(self.tasks.discard)
        return task

    def carry_datagrams(self, app: str) -> None:
        """Have datagrams carried, if gateway and kernel can; say why not."""
        if not self.gateway.udp:
            return
        try:
            dns = self.settings.of(app).dns
            self.datagrams = Datagrams(self.gateway, self.names, app, dns)
        except Fault as fault:
            self.once(f"datagrams are not carried, but for names: {fault}")

    async def serve(self, listener: int, machine: str) -> None:
        """Answer the calls that a listener brings, until none can come."""
        loop, over = asyncio.get_running_loop(), asyncio.Event()
        loop.set_exception_handler(tell_fault)
        names = dict(zip(NUMBERS[machine][1:], CALLS))
        self.server.bind(("127.0.0.1", 0))
        self.server.setblocking(False)
        loop.add_reader(self.server, self.read_query)
        if self.datagrams:
            self.datagrams.serve()
        poll = select.poll()
        poll.register(listener, select.POLLIN)

        def take() -> None:
            raw = bytearray(80)  # the kernel wants zeros
            # NOTIF_RECV would wait: all others may have been killed.
            for _, events in poll.poll(0):
                if not events & select.POLLIN:
                    loop.remove_reader(listener)  # POLLHUP: nobody is left
                    return over.set()
                with contextlib.suppress(FileNotFoundError):  # killed since
                    fcntl.ioctl(listener, NOTIF_RECV, raw)
                    self.notified += 1
                    self.handle(Call(listener, bytes(raw), names))

        loop.add_reader(listener, take)
        keeping = self.start(self.mappings.keep())
        await over.wait()
        keeping.cancel()
        await self.mappings.end()

    def handle(self, call: Call) -> None:
        """Answer a call, or begin to."""
        try:
            self.stories.get(call.name, Call.proceed)(call)
        except OSError as error:
            if error.errno == errno.EPERM:
                why = "not dumpable, so its connections are refused"
                self.once(f"cannot look into {call.app}: {why}")
            code = errno.EACCES if error.errno == errno.EPERM else error.errno
            call.answer(code or errno.EIO)
        except Exception as error:
            say(f"fault in {call.name}: {type(error).__name__}: {error}")
            call.answer(errno.EIO)

    def is_near(self, app: str, target: Endpoint) -> bool:
        """Return whether a program reaches a target without the gateway."""
        program = self.settings.of(app)
        near = self.gateway.has_inside(target.packed)
        ports = any(target.port in ports for ports in program.direct_ports)
        direct = near or ports or within(program.direct, target.packed)
        return direct or not program.redirect

    def connect(self, call: Call) -> None:
        """Answer connect(): the story that the rest serves."""
        target = call.target()
        if not target or self.is_near(call.app, target) and target.port != 53:
            return call.proceed()
        sock = call.borrow()
        flow = self.flows.get(cookie(sock))
        if sock.type != socket.SOCK_STREAM or self.is_near(call.app, target):
            with sock:
                return self.connect_datagrams(call, sock, target)
        if flow and (flow.pending or flow.error) or is_connected(sock):
            with sock:
                return self.connect_again(call, sock, flow)
        flow = Flow(target, pending=True, waits=os.get_blocking(sock.fileno()))
        flow.paired = not flow.waits or self.gateway.at.family > sock.family
        sock.setblocking(False)
        free(sock)
        if flow.paired and (code := self.room.enter(sock)) != errno.EINPROGRESS:
            self.give_back(sock, flow)
            return call.answer(code or errno.EIO)
        self.record(sock, flow)
        if flow.waits:
            self.hold(call, flow)
        else:
            call.answer(errno.EINPROGRESS)
        flow.task = self.start(self.dial(sock, flow, call.app))

    async def dial(self, sock: socket.socket, flow: Flow, app: str) -> None:
        """Have the gateway connect to the target of a flow, and settle it."""
        gateway, error, target = self.gateway, errno.EIO, flow.peer or NOWHERE
        try:
            server = socket.socket(gateway.at.family) if flow.paired else sock
            with contextlib.ExitStack() as stack:
                if flow.paired:
                    stack.enter_context(server)
                await gateway.reach(server)
                name = self.names.called.get(target.packed, b"")
                where = name + target.port.to_bytes(2, "big") if name else target
                asked = gateway.ask(server, CONNECT, where, self.login(app))
                host, port = await asyncio.wait_for(asked, ANSWER_TIME)
                if len(host) in (4, 16) and any(host):
                    flow.local = Endpoint(unmapped(host), port)
                if flow.paired:
                    with await self.room.meet(sock) as near:
                        await self.join(near, server)
            error = 0
        except Lost as lost:
            error = lost.errno or errno.ENETUNREACH
            self.once(f"cannot use the gateway {gateway.at}: {reason(lost)}")
        except asyncio.TimeoutError:
            error = errno.ETIMEDOUT
        except OSError as failed:
            error = failed.errno or errno.EIO
        finally:
            self.settle(sock, flow, error)

    async def join(self, near: socket.socket, server: socket.socket) -> None:
        """Hand two sockets to the relay; raise OSError."""
        while True:
            with contextlib.suppress(BlockingIOError):  # its queue is full
                pair = [near.fileno(), server.fileno()]
                socket.send_fds(self.relay, [b"+"], pair)
                return
            await asyncio.sleep(LOOK_TIME)

    def record(self, sock: socket.socket, flow: Flow) -> None:
        """Keep what is known of a socket, until it is gone."""
        flow.inode = os.fstat(sock.fileno()).st_ino
        self.flows[cookie(sock)] = flow
        if flow.pending:
            self.unsettled.add(cookie(sock))
        if len(self.flows) > self.limit:
            live = inodes()
            old = time.monotonic() - ANSWER_TIME
            for number, one in [*self.flows.items()]:
                if one.inode not in live and not one.pending and one.since < old:
                    self.forget(number)
            self.limit = max(RECORDS, 2 * len(self.flows))

    def forget(self, number: bytes) -> None:
        self.flows.pop(number, None)
        self.unsettled.discard(number)

    def give_back(self, sock: socket.socket, flow: Flow) -> None:
        """Let go of a borrowed socket, as it was."""
        if flow.waits:  # else the program may have changed it meanwhile
            sock.setblocking(True)
        sock.close()

    def settle(self, sock: socket.socket, flow: Flow, error: int) -> None:
        """Let the program learn how its connect() ended, by the socket or the call."""
        flow.pending, flow.error, number = False, error, cookie(sock)
        with contextlib.suppress(OSError):
            if not error:
                self.unsettled.discard(number)
            elif flow.waits:
                # AF_UNSPEC: as if it had never been connected.
                system(LIBC.connect, sock.fileno(), bytes(16), 16)
                sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            else:
                # As after a true failure: EPOLLERR, EPOLLHUP and EPOLLOUT.
                sock.shutdown(socket.SHUT_RDWR)
        self.give_back(sock, flow)
        calls, flow.calls = flow.calls, []
        for call in calls:
            if self.waiting.pop(call.id, None) and call.name == "connect":
                call.answer(error)
                if error:
                    self.forget(number)
            else:
                self.handle(call)
        if self.verbose:
            say(f"{flow.peer}: {os.strerror(error) if error else 'connected'}")

    def connect_again(self, call: Call, sock: socket.socket, flow: Flow | None) -> None:
        """Answer connect() on a socket that has been connected, or tried to."""
        if is_connected(sock) and not (flow and flow.pending and flow.waits):
            return call.answer(errno.EISCONN)
        assert flow
        if flow.error:
            sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            self.forget(cookie(sock))
            return call.answer(flow.error)
        if flow.waits or os.get_blocking(sock.fileno()):
            return self.hold(call, flow)
        call.answer(errno.EALREADY)

    def make_socket(self, call: Call) -> None:
        """Answer socket() of UDP: it is one of the namespace."""
        program, protocol = self.settings.of(call.app), call.arguments[2]
        if program.udp == "no":
            call.answer(errno.EACCES)
        elif not self.datagrams or program.udp == "local" or protocol not in (0, 17):
            call.proceed()
        else:
            self.datagrams.make(call)

    def connect_datagrams(
        self, call: Call, sock: socket.socket, target: Endpoint
    ) -> None:
        """Answer connect() of what is no stream: a query is for our name server."""
        if self.datagrams and netns(sock) != netns(self.server):
            return call.proceed()
        program = self.settings.of(call.app)
        ours = program.redirect and program.dns != "local" and target.port == 53
        if not ours or sock.type != socket.SOCK_DGRAM:
            if self.is_near(call.app, target):
                return call.proceed()
            self.once("datagrams go nowhere here, but for names")
            return call.answer(errno.ENETUNREACH)
        free(sock)
        sock.connect(endpoint(self.server.getsockname()).pair(sock.family))
        meant = target, call.app, program.dns == "fake"
        remember(self.asked, sock.getsockname()[1], meant)
        self.record(sock, Flow(target))
        call.answer()

    def read_query(self) -> None:
        """Begin to answer a query that came to our name server."""
        with contextlib.suppress(OSError):
            query, sender = self.server.recvfrom(65535)
            server, app, fake = self.asked.get(sender[1], (NOWHERE, "?", False))

            async def answer() -> None:
                found = await self.names.answer(query, server, app, fake)
                with contextlib.suppress(OSError):
                    self.server.sendto(found, sender)

            self.start(answer())

    def getsockopt(self, call: Call) -> None:
        """Answer getsockopt() of SO_ERROR: a failure is told once."""
        if not self.unsettled:
            return call.proceed()
        with call.borrow() as sock:
            number = cookie(sock)
            flow = self.flows.get(number) if number in self.unsettled else None
            if not flow or flow.pending and not flow.waits:
                return call.proceed()
            if flow.pending:
                return self.hold(call, flow)
            sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        _, _, _, there, size_at, _ = call.arguments
        call.write(there, flow.error.to_bytes(4, sys.byteorder))
        call.write(size_at, (4).to_bytes(4, sys.byteorder))
        self.forget(number)
        call.answer()

    def getsockname(self, call: Call) -> None:
        """Answer with the address that the gateway connected from."""
        if not self.flows:
            return call.proceed()
        with call.borrow() as sock:
            flow = self.flows.get(cookie(sock))
            if not flow or flow.error or sock.type != socket.SOCK_STREAM:
                return call.proceed()
            family, port = sock.family, sock.getsockname()[1]
        # A guess as long as it is under way, and for a server that does not say.
        guess = Endpoint(self.gateway.address(flow.peer or NOWHERE), port)
        call.write_address(family, flow.local or guess)
        call.answer()

    def getpeername(self, call: Call) -> None:
        """Answer with the address that the program meant."""
        if not self.flows:
            return call.proceed()
        with call.borrow() as sock:
            flow, family = self.flows.get(cookie(sock)), sock.family
            if not flow or not flow.peer:
                return call.proceed()
            # Out of the waiting room, it is connected before the flow is settled.
            if flow.pending and flow.waits or not is_connected(sock):
                return call.answer(errno.ENOTCONN)
        call.write_address(family, flow.peer)
        call.answer()

    def bind(self, call: Call) -> None:
        """Answer bind(): to the outside address, or to a port that is to be there."""
        where, program = call.target(), self.settings.of(call.app)
        if not where:
            return call.proceed()
        outside = within(self.gateway.outside, where.packed)
        listens = any(where.port in ports for ports in program.listen)
        near = any(where.packed) and self.gateway.has_inside(where.packed)
        listens = listens and not any(where.packed)
        if not (outside or listens or near and self.datagrams):
            return call.proceed()
        sock = call.borrow()
        if sock.type == socket.SOCK_STREAM and not near and self.gateway.mappings:
            self.hold(call)
            call.task = self.start(self.map(call, sock, where))
            return
        with sock:
            ours = sock.type == socket.SOCK_DGRAM and netns(sock) != netns(self.server)
            if near and ours:
                call.swap(sock)
        call.proceed()

    async def map(self, call: Call, sock: socket.socket, where: Endpoint) -> None:
        """Bind a socket to a port that the gateway has outside."""
        error = 0
        with sock:
            try:
                self.record(sock, await self.mappings.add(sock, where))
            except OSError as failed:
                error = failed.errno or errno.EIO
        self.waiting.pop(call.id, None)
        call.answer(error)

    def accept(self, call: Call) -> None:
        """Answer accept() on a socket that has a port outside."""
        if not self.mappings.held:
            return call.proceed()
        sock = call.borrow()
        if cookie(sock) not in self.mappings.held:
            sock.close()
            return call.proceed()
        self.hold(call)
        call.task = self.start(self.take_caller(call, sock))

    async def take_caller(self, call: Call, sock: socket.socket) -> None:
        """Accept a connection, and say who it is that called."""
        with sock:
            waits, kept = os.get_blocking(sock.fileno()), cookie(sock)
            queue = self.kept.setdefault(kept, [])
            try:
                while not queue:
                    try:
                        queue.append(accept_now(sock))
                    except BlockingIOError:
                        if not waits:
                            raise
                        await readable(sock)
                # It stays in the queue until it is delivered: a signal may come.
                one = queue.pop(0)
                try:
                    await self.present(call, one, self.flows[kept])
                except BaseException:
                    queue.insert(0, one)
                    raise
                one.close()
            except OSError as error:
                call.answer(error.errno or errno.EIO)
            finally:
                self.waiting.pop(call.id, None)

    async def present(self, call: Call, one: socket.socket, flow: Flow) -> None:
        """Give a caller to the program, with its true address; raise OSError."""
        peer, local = endpoint(one.getpeername()), flow.local or NOWHERE
        who = self.login("natrun")
        path = f"/table.json?source_port={peer.port}"
        # The row may be written after the connection has been made.
        for pause in (0, 0.01, 0.1) if peer.packed == self.gateway.at.packed else ():
            await asyncio.sleep(pause)
            failures = OSError, ValueError, LookupError, asyncio.TimeoutError
            with contextlib.suppress(*failures):
                page = self.gateway.fetch(path, who)
                row = (await asyncio.wait_for(page, FIND_TIME))["sessions"][0]
                peer = endpoint((row["source_ip"], row["original_source_port"]))
                break
        here = local.packed if any(local.packed) else self.gateway.address(NOWHERE)
        self.record(one, Flow(peer, Endpoint(here, local.port)))
        if call.arguments[1]:
            call.write_address(one.family, peer)
        call.give(one, call.arguments[3] if call.name == "accept4" else 0)

    def hold(self, call: Call, flow: Flow | None = None) -> None:
        """Let a call wait, for the end of a flow or of its own task."""
        self.waiting[call.id] = call
        if flow:
            flow.calls.append(call)
        if not self.looking or self.looking.done():
            self.looking = self.start(self.look_after())

    async def look_after(self) -> None:
        """Let signals interrupt calls that wait, and end what the dead wait for.

        The kernel does not: it would let the program give a connect() up half done.
        """
        while self.waiting:
            await asyncio.sleep(LOOK_TIME)
            for call in [*self.waiting.values()]:
                alive = call.is_alive()
                with contextlib.suppress(OSError):
                    if call.task and call.task.done():  # by a fault in it
                        call.answer(errno.EIO)
                    elif alive and not call.is_interrupted():
                        continue
                del self.waiting[call.id]
                for flow in [one for one in self.flows.values() if call in one.calls]:
                    flow.calls.remove(call)
                    if not alive and not flow.calls and flow.task:
                        flow.task.cancel()
                if call.task:
                    call.task.cancel()
                # The kernel runs the handler, then restarts the call or gives EINTR.
                call.answer(ERESTARTSYS)


# --- The command --------------------------------------------------------------

# What a person or a service manager sends; the rest mean a fault, or stop and go on.
PASSED = {
    getattr(signal, f"SIG{n}") for n in "HUP INT QUIT TERM USR1 USR2 WINCH".split()
}
SI_KERNEL = 0x80
YAMA = "/proc/sys/kernel/yama/ptrace_scope"


class Command:
    """The program that is run, and how it ended."""

    def __init__(self, words: list[str], machine: str, code: bytes) -> None:
        """Start it under a filter, whose listener is taken; raise Fault."""
        said, go = os.pipe(), os.pipe()
        self.code: int | None = None
        limits = resource.getrlimit(resource.RLIMIT_NOFILE)
        self.pid = os.fork()
        if not self.pid:
            os.close(go[1])
            self.become(words, machine, code, said[1], go[0])
        # Each connection that is dialed is a descriptor here.
        resource.setrlimit(resource.RLIMIT_NOFILE, (limits[1], limits[1]))
        os.close(said[1])
        number = os.read(said[0], 16)
        if not number:
            self.leave()
        with open(os.pidfd_open(self.pid)) as process:
            try:
                arguments = process.fileno(), int(number), 0
                self.listener = system(LIBC.syscall, PIDFD_GETFD, *arguments)
            except OSError as error:
                raise Fault(f"cannot take the listener: {reason(error)}") from None
        os.write(go[1], b"+")

    def become(
        self, words: list[str], machine: str, code: bytes, said: int, go: int
    ) -> NoReturn:
        """Become the command, in the child."""
        try:
            listener = install(machine, code)
        except OSError as error:
            told = {errno.EBUSY: "it runs in another natrun"}
            told[errno.EINVAL] = "the kernel is older than Linux 5.19"
            why = told.get(error.errno or 0) or reason(error)
            say(f"cannot install the filter: {why}")
            os._exit(125)
        # Not by a call that the filter has: nobody answers it yet.
        os.write(said, b"%d" % listener)
        if not os.read(go, 1):
            os._exit(125)
        os.close(listener)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {*PASSED, signal.SIGCHLD})
        for number in (signal.SIGPIPE, signal.SIGXFSZ):  # Python ignores them
            signal.signal(number, signal.SIG_DFL)
        try:
            os.execvp(words[0], words)
        except OSError as error:
            say(f"cannot run {words[0]}: {reason(error)}")
            os._exit(127 if error.errno == errno.ENOENT else 126)

    def attend(self, loop: asyncio.AbstractEventLoop) -> NoReturn:
        """Bring signals to a loop: the work of a thread."""
        while True:
            info = signal.sigwaitinfo({*PASSED, signal.SIGCHLD})
            # A terminal's Ctrl-C has reached the command, too.
            if info.si_code != SI_KERNEL or info.si_signo == signal.SIGCHLD:
                loop.call_soon_threadsafe(self.take, info.si_signo)

    def take(self, number: int) -> None:
        """Reap the dead, or pass a signal on."""
        if number == signal.SIGCHLD:
            return self.reap(os.WNOHANG)
        with contextlib.suppress(OSError):
            os.kill(self.pid, number) if self.code is None else self.leave()

    def reap(self, flags: int) -> None:
        """Reap the dead; children of the command come to us when they lose it."""
        with contextlib.suppress(ChildProcessError):
            while self.code is None or flags:
                pid, status = os.waitpid(-1, flags)
                if not pid:
                    return
                if pid == self.pid:
                    self.code = os.waitstatus_to_exitcode(status)

    def leave(self) -> NoReturn:
        """End as the command has ended."""
        self.reap(0)
        code = self.code or 0
        if code < 0:
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # it has left its own
            with contextlib.suppress(OSError, ValueError):
                signal.signal(-code, signal.SIG_DFL)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {-code})
            os.kill(os.getpid(), -code)
        os._exit(code)


# --- main ---------------------------------------------------------------------


def run(words: list[str], settings: Settings, gateway: Gateway, verbose: bool) -> None:
    """Run a command to its end, and end as it did; raise Fault."""
    machine = platform.machine()
    if machine not in NUMBERS:
        raise Fault(f"cannot run on {machine}, only on {' and '.join(NUMBERS)}")
    # What becomes a daemon stays a descendant, whom Yama lets us look into.
    system(LIBC.prctl, CHILD_SUBREAPER, 1, 0, 0, 0)
    signal.pthread_sigmask(signal.SIG_BLOCK, {*PASSED, signal.SIGCHLD})
    control = fork_relay()
    supervisor = Supervisor(settings, gateway, control, verbose)
    supervisor.carry_datagrams(os.path.basename(words[0]))
    command = Command(words, machine, assemble(machine, supervisor.calls()))

    async def serve() -> None:
        loop = asyncio.get_running_loop()
        threading.Thread(target=command.attend, args=[loop], daemon=True).start()
        await supervisor.serve(command.listener, machine)
        if verbose:
            say(f"{supervisor.notified} notifications")
        command.leave()

    asyncio.run(serve())


def check(option: list[str], settings: Settings) -> int:
    """Say what works on this machine, and what does not and why."""
    machine = platform.machine()
    say(f"Linux {platform.release()} on {machine}, Python {platform.python_version()}")
    with contextlib.suppress(OSError), open(YAMA) as file:
        level = int(file.read())
        say(f"Yama: {level}, {'which will do' if level < 2 else 'only root may run'}")
    try:
        fork_namespace([])
        say("namespace: yes")
    except Fault as fault:
        say(f"namespace: no, {fault}: of datagrams, only names are carried")
    gateway = find_gateway("".join(option), settings)
    what = "NATWork" if gateway.natwork else "a SOCKS server"
    say(f"gateway: {gateway.at}, {what}")
    for name, have in (("datagrams", gateway.udp), ("listening", gateway.mappings)):
        say(f"{name}: {'yes' if have else 'no, the gateway does not offer it'}")
    # It says itself what the kernel does not let it do.
    words = [sys.executable, sys.argv[0], *(["-g", *option] if option else []), "true"]
    code = os.spawnv(os.P_WAIT, sys.executable, words)
    say(f"programs: {'no' if code else 'yes'}")
    return 125 if code else 0


def main() -> int:
    """Run natrun's command line; return an exit code if it could not."""
    names = ["gateway=", "config=", "check", "help", "version"]
    try:
        options, words = getopt.getopt(sys.argv[1:], "g:c:vh", names)
        given = {{"--gateway": "-g", "--config": "-c"}.get(n, n): v for n, v in options}
        if given.keys() & {"-h", "--help", "--version"}:
            version = "--version" in given
            print(f"natrun {__version__}" if version else __doc__)
            return 0
        settings = find_settings(given.get("-c", ""))
        if "--check" in given:
            return check([given["-g"]] if "-g" in given else [], settings)
        gateway = find_gateway(given.get("-g", ""), settings)
        if not words:
            raise Fault("cannot run nothing: natrun.py [-g GATEWAY] COMMAND...")
        run(words, settings, gateway, "-v" in given)
    except (Fault, getopt.GetoptError) as fault:
        say(str(fault))
    except OSError as error:
        say(f"cannot go on: {reason(error)}")
    return 125


if __name__ == "__main__":
    sys.exit(main())
