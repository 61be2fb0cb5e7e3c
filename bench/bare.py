#!/usr/bin/env python3
"""Carry streams with a process per client and nothing else: a mark for the bench.

    python3 bench/bare.py PORT

What it does is what no program of this design in this language can leave out:
accept, read the target, connect, say so, pass bytes on, close.  It has no rules,
no log, no titles and no scoreboard, parses nothing beyond the target, and sends
a request on as it came.  The distance from here to microsocks or Privoxy is
what Python and a process per client cost; the distance from natwork to here is
what natwork does for it.  Do not run it where others can reach it.
"""

import os
import select
import signal
import socket
import sys

# SPDX-License-Identifier: MIT

WORKERS = 16
SIZE = 65536  # bytes a recv()


def dial(host: bytes, port: int) -> socket.socket:
    return socket.create_connection((host.decode(), port))


def ask_socks(client: socket.socket) -> tuple[socket.socket, bytes]:
    """Serve SOCKS 5 to an IPv4 address, one message a segment."""
    client.sendall(b"\5\0")
    asked = client.recv(SIZE)
    host = socket.inet_ntoa(asked[4:8]).encode()
    server = dial(host, int.from_bytes(asked[8:10], "big"))
    client.sendall(b"\5\0\0\1" + bytes(6))
    return server, b""


def ask_http(client: socket.socket, asked: bytes) -> tuple[socket.socket, bytes]:
    """Serve CONNECT and any other method; all that follows goes to the same host."""
    method, target = asked.split(b" ", 2)[:2]
    authority = target.removeprefix(b"http://").partition(b"/")[0]
    host, _, port = authority.partition(b":")
    server = dial(host, int(port or 80))
    if method == b"CONNECT":
        client.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
        asked = b""
    return server, asked


def serve(client: socket.socket) -> None:
    """Serve one client; the end of either side is the end of both."""
    asked = client.recv(SIZE)
    if not asked:
        return
    server, rest = ask_socks(client) if asked[0] == 5 else ask_http(client, asked)
    with server:
        server.sendall(rest)
        ways = {client.fileno(): (client, server), server.fileno(): (server, client)}
        poll = select.poll()
        for fd in ways:
            poll.register(fd, select.POLLIN)
        while True:
            for fd, _ in poll.poll():
                source, sink = ways[fd]
                if not (data := source.recv(SIZE)):
                    return
                sink.sendall(data)


def work(door: socket.socket) -> None:
    while True:
        client, _ = door.accept()
        with client:
            try:
                serve(client)
            except (OSError, ValueError):
                pass  # a client who leaves, or makes no sense


def main() -> None:
    door = socket.create_server(("127.0.0.1", int(sys.argv[1])), backlog=4096)
    workers = []
    for _ in range(WORKERS):
        if not (pid := os.fork()):
            work(door)
        workers.append(pid)
    try:
        signal.sigwait({signal.SIGTERM, signal.SIGINT})
    finally:
        for pid in workers:
            os.kill(pid, signal.SIGKILL)


if __name__ == "__main__":
    main()
