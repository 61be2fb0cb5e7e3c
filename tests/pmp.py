"""NAT-PMP on the wire: RFC 6886, as a machine of the inside writes and reads it."""

from __future__ import annotations

import socket
import struct
from typing import NamedTuple

import boxes

PORT = 5351
OK, BAD_VERSION, NOT_AUTHORIZED, NO_ADDRESS, NO_RESOURCES, BAD_OPERATION = range(6)


class Answer(NamedTuple):
    """What the gateway says of a mapping."""

    result: int
    host_port: int = 0
    port: int = 0
    seconds: int = 0


def request(host_port: int, port: int, seconds: int, operation: int = 2) -> bytes:
    """Return a request for a mapping, of TCP unless told otherwise."""
    return struct.pack("!BBHHHI", 0, operation, 0, host_port, port, seconds)


def ask(
    box: boxes.Box, data: bytes, host: str = "10.9.0.2", gateway: str = "10.9.0.1"
) -> bytes:
    """Return what is answered to a machine's datagram, b"" for nothing in 0.5 s.

    It is asked again, as RFC 6886 section 3.1 has it, while nobody listens there.
    """

    def sent() -> socket.socket:
        sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        sock.bind((host, 0))
        sock.connect((gateway, PORT))
        return sock

    for _ in range(20):
        with box.within("inside", sent) as sock:
            sock.settimeout(0.5)
            try:
                sock.send(data)
                return sock.recv(100)
            except TimeoutError:
                return b""
            except ConnectionRefusedError:
                continue
    return b""


def mapped(
    box: boxes.Box,
    host_port: int,
    port: int = 0,
    seconds: int = 60,
    host: str = "10.9.0.2",
) -> Answer:
    """Ask for a mapping, again while nothing is answered; return the answer."""
    words = request(host_port, port, seconds)
    answer = next(filter(None, (ask(box, words, host) for _ in range(8))))
    version, operation, result, _, *rest = struct.unpack("!BBHIHHI", answer)
    assert (version, operation) == (0, 130) and rest[0] == host_port
    return Answer(result, *rest)


def address(box: boxes.Box, host: str = "10.9.0.2") -> str:
    """Return the outside address that a machine is told of, "" for none."""
    answer = ask(box, b"\0\0", host)
    version, operation, result, _, place = struct.unpack("!BBHI4s", answer)
    assert (version, operation) == (0, 128)
    return "" if result else socket.inet_ntoa(place)
