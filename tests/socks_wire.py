"""SOCKS on the wire: requests, replies and datagrams, as a client writes them."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
from collections.abc import Iterator

import running
import wire

CONNECT, BIND, ASSOCIATE, RESOLVE, RESOLVE_PTR = 1, 2, 3, 0xF0, 0xF1
HELLO, AGREED = b"\5\1\0", b"\5\0"
KNOWN = b"\5\2\1\0"  # what is told to a client that has named itself
Address = tuple[str, int]


def packed(host: str) -> bytes:
    """Return a written address as bytes, b"" for a name."""
    for family in (socket.AF_INET, socket.AF_INET6):
        with contextlib.suppress(OSError):
            return socket.inet_pton(family, host)
    return b""


def named(host: str | bytes, port: int) -> bytes:
    """Return a name and port as SOCKS 5 writes them."""
    name = host if isinstance(host, bytes) else host.encode()
    return bytes([3, len(name)]) + name + struct.pack("!H", port)


def addressed(host: str, port: int) -> bytes:
    """Return an address and port as SOCKS 5 writes them; a name, if it is one."""
    if not (address := packed(host)):
        return named(host, port)
    return bytes([len(address) // 4]) + address + struct.pack("!H", port)


def login(name: bytes, password: bytes = b"any", methods: bytes = b"\2") -> bytes:
    """Return a greeting, and name and password: RFC 1929."""
    greeting = bytes([5, len(methods)]) + methods
    pair = [bytes([len(word)]) + word for word in (name, password)]
    return greeting + b"\1" + b"".join(pair)


def five(where: bytes, command: int = CONNECT) -> bytes:
    """Return a SOCKS 5 request."""
    return bytes([5, command, 0]) + where


def four(host: str, port: int, command: int = CONNECT, user: bytes = b"me") -> bytes:
    """Return a SOCKS 4 request, or 4a for a name."""
    address = packed(host) if ":" not in host else b""
    name = b"" if address else host.encode() + b"\0"
    head = struct.pack("!BBH", 4, command, port)
    return head + (address or b"\0\0\0\1") + user + b"\0" + name


def five_reply(code: int, host: str = "0.0.0.0", port: int = 0) -> bytes:
    return bytes([5, code, 0]) + addressed(host, port)


def four_reply(code: int, host: str = "0.0.0.0", port: int = 0) -> bytes:
    return struct.pack("!BBH", 0, code, port) + packed(host)


def read_address(client: socket.socket, kind: int) -> Address:
    """Take the address of a SOCKS 5 reply off a socket."""
    assert kind in (1, 4), kind
    raw = wire.read_exactly(client, 4 * kind)
    family = socket.AF_INET if kind == 1 else socket.AF_INET6
    (port,) = struct.unpack("!H", wire.read_exactly(client, 2))
    return socket.inet_ntop(family, raw), port


def read_five(client: socket.socket) -> tuple[int, Address]:
    """Take a SOCKS 5 reply off a socket; return its code and address."""
    version, code, reserved, kind = wire.read_exactly(client, 4)
    assert (version, reserved) == (5, 0)
    return code, read_address(client, kind)


def read_four(client: socket.socket) -> tuple[int, Address]:
    """Take a SOCKS 4 reply off a socket; return its code and address."""
    zero, code, port, address = struct.unpack("!BBH4s", wire.read_exactly(client, 8))
    assert zero == 0
    return code, (socket.inet_ntoa(address), port)


def ask_five(client: socket.socket, request: bytes) -> tuple[int, Address]:
    """Greet, ask, and return the code and address of the reply."""
    client.sendall(HELLO)
    assert wire.read_exactly(client, 2) == AGREED
    client.sendall(request)
    return read_five(client)


def datagram(where: bytes, payload: bytes, fragment: int = 0) -> bytes:
    """Return what a client sends to the relay: RFC 1928 section 7."""
    return bytes([0, 0, fragment]) + where + payload


class Association:
    """A client's UDP association: its control connection and its socket."""

    def __init__(
        self,
        control: socket.socket,
        host: str = "127.0.0.1",
        name: bytes = b"",
        port: int = 0,
    ) -> None:
        """Open it, by a name if there is one, for a socket of a host, at a port."""
        self.control = control
        told = KNOWN if name else AGREED
        control.sendall(login(name) if name else HELLO)
        assert wire.read_exactly(control, len(told)) == told
        control.sendall(five(addressed("0.0.0.0", port), ASSOCIATE))
        code, self.relay = read_five(control)
        assert code == 0
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self.sock = socket.socket(family, socket.SOCK_DGRAM)
        self.sock.bind((host, 0))
        self.sock.settimeout(10)

    def send(self, where: bytes, payload: bytes, fragment: int = 0) -> None:
        self.sock.sendto(datagram(where, payload, fragment), self.relay)

    def receive(self) -> tuple[Address, bytes]:
        """Return who sent a datagram, and what it says."""
        data, sender = self.sock.recvfrom(70000)
        assert sender[:2] == self.relay and data[:3] == bytes(3)
        size = 4 * data[3]
        family = {4: socket.AF_INET, 16: socket.AF_INET6}[size]
        host = socket.inet_ntop(family, data[4 : 4 + size])
        (port,) = struct.unpack_from("!H", data, 4 + size)
        return (host, port), data[6 + size :]

    def exchange(self, where: bytes, payload: bytes) -> tuple[Address, bytes]:
        self.send(where, payload)
        return self.receive()


@contextlib.contextmanager
def associated(
    gateway: running.Gateway, name: bytes = b"", port: int = 0
) -> Iterator[Association]:
    """Open a UDP association with a gateway, and close it."""
    with gateway.connect() as control:
        association = Association(control, name=name, port=port)
        with association.sock:
            yield association


class UdpEcho:
    """A UDP server that sends back what it gets, and knows who sent it."""

    def __init__(self, host: str = "127.0.0.3") -> None:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self.sock = socket.socket(family, socket.SOCK_DGRAM)
        self.sock.bind((host, 0))
        self.host, self.port = self.sock.getsockname()[:2]
        self.senders: list[Address] = []
        threading.Thread(target=self.run, daemon=True).start()

    def run(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                data, sender = self.sock.recvfrom(70000)
                if data == b"stop":
                    return
                self.senders.append(sender[:2])
                self.sock.sendto(data, sender)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self.sock.sendto(b"stop", (self.host, self.port))
        self.sock.close()
