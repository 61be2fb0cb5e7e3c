"""Servers of the tests' own, that natwork.py connects to."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable


class Origin:
    """A TCP server whose whole behaviour is one function of the test.

    handle(connection, origin) runs in a thread for each connection accepted.
    """

    ports: set[int] = set()  # that any origin has had

    def __init__(
        self, handle: Callable[..., None], host: str = "127.0.0.1", port: int = 0
    ) -> None:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        while True:
            self.listener = socket.create_server(
                (host, port), family=family, backlog=512
            )
            self.host, self.port = self.listener.getsockname()[:2]
            if port or self.port not in self.ports:
                break
            self.listener.close()  # the log has an earlier origin's lines with it
        self.ports.add(self.port)
        name = f"[{host}]" if ":" in host else host
        self.authority = f"{name}:{self.port}"
        self.url = f"http://{self.authority}"
        self.callers: list[tuple[str, int]] = []  # who connected, in order
        self.received: list[bytes] = []  # heads and bodies, as the test stores them
        self.handle = handle
        threading.Thread(target=self.run, daemon=True).start()

    def run(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, caller = self.listener.accept()
                connection.settimeout(20)
                self.callers.append(caller[:2])
                serve = threading.Thread(target=self.one, args=[connection])
                serve.daemon = True
                serve.start()

    def one(self, connection: socket.socket) -> None:
        with contextlib.suppress(OSError), connection:
            self.handle(connection, self)

    def close(self) -> None:
        """Take no more connections."""
        with contextlib.suppress(OSError):
            self.listener.shutdown(socket.SHUT_RDWR)  # close() leaves accept() waiting
        self.listener.close()


def echo(connection: socket.socket, origin: Origin) -> None:
    """Send back what comes, and then the end."""
    while data := connection.recv(65536):
        connection.sendall(data)
    connection.shutdown(socket.SHUT_WR)


Start = Callable[..., Origin]  # the fixture: start(handle, "127.0.0.3")
