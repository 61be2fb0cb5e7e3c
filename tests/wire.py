"""Bytes on a TCP connection, whatever they mean."""

from __future__ import annotations

import contextlib
import hashlib
import socket
import struct
from collections.abc import Iterator


def read_exactly(connection: socket.socket, size: int) -> bytes:
    """Take size bytes off a socket, fewer if it ends before."""
    body = bytearray()
    while len(body) < size and (
        piece := connection.recv(min(size - len(body), 1 << 20))
    ):
        body += piece
    return bytes(body)


def read_all(connection: socket.socket) -> bytes:
    """Take what comes until the other side closes or resets."""
    everything = bytearray()
    with contextlib.suppress(ConnectionResetError):
        while piece := connection.recv(65536):
            everything += piece
    return bytes(everything)


def at_end(connection: socket.socket) -> bool:
    """Say whether the other side has closed, gracefully and with nothing unread."""
    return connection.recv(1) == b""


def send(connection: socket.socket, data: bytes) -> None:
    """Send what the other side will take: it may refuse and close before the end."""
    with contextlib.suppress(ConnectionResetError, BrokenPipeError):
        connection.sendall(data)


def drip(connection: socket.socket, data: bytes) -> None:
    """Send as send() does, each byte in a segment of its own."""
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    with contextlib.suppress(ConnectionResetError, BrokenPipeError):
        for byte in data:
            connection.send(bytes([byte]))


def reset(connection: socket.socket) -> None:
    """Close with RST instead of FIN."""
    linger = struct.pack("ii", 1, 0)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
    connection.close()


def echoes(client: socket.socket, words: bytes = b"still here") -> bool:
    """Say whether a tunnel still carries bytes there and back."""
    client.sendall(words)
    return read_exactly(client, len(words)) == words


def digest(data: bytes) -> str:
    """Return what says of megabytes whether they are the same."""
    return hashlib.sha256(data).hexdigest()


def free_port() -> int:
    """Return a port of 127.0.0.1 where nobody listens."""
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return int(sock.getsockname()[1])


@contextlib.contextmanager
def full_listener(host: str) -> Iterator[int]:
    """Give the port of a listener whose queue is full: the kernel drops every SYN."""
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.create_server((host, 0), backlog=0))
        with contextlib.suppress(TimeoutError):
            for _ in range(100):
                waiting = stack.enter_context(socket.socket())
                waiting.settimeout(0.3)
                waiting.connect(listener.getsockname())
            raise AssertionError("the queue is never full")
        yield listener.getsockname()[1]
