"""What a program sees of its sockets: run by natrun.py, each function prints JSON."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import os
import select
import signal
import socket
import sys
import time
from typing import Any

Address = tuple[str, int]


def code(number: int) -> str:
    return errno.errorcode[number] if number else "ok"


def error_of(sock: socket.socket) -> str:
    return code(sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR))


def blocking(where: Address) -> list[str]:
    with socket.socket() as sock:
        return [code(sock.connect_ex(where))]


def polled(where: Address) -> list[str]:
    """Return how connect() began, and what SO_ERROR says twice after it."""
    with socket.socket() as sock:
        sock.setblocking(False)
        first = code(sock.connect_ex(where))
        poll = select.poll()
        poll.register(sock, select.POLLOUT)
        ((_, events),) = poll.poll(20000)
        told = [error_of(sock), error_of(sock)]
        assert bool(events & select.POLLERR) == (told[0] != "ok")
        return [first, *told]


def registered(where: Address) -> list[str]:
    """As polled(), with epoll, edge-triggered, that knew the socket before."""
    with socket.socket() as sock, select.epoll() as epoll:
        sock.setblocking(False)
        epoll.register(sock, select.EPOLLOUT | select.EPOLLIN | select.EPOLLET)
        epoll.poll(0)
        first = code(sock.connect_ex(where))
        deadline = time.monotonic() + 20
        while not (ready := epoll.poll(20)) and time.monotonic() < deadline:
            pass
        assert len(ready) == 1
        return [first, error_of(sock), error_of(sock)]


def again(where: Address) -> list[str]:
    """Return what connect() says twice while it is under way, and twice after it."""
    with socket.socket() as sock:
        sock.setblocking(False)
        said = [sock.connect_ex(where), sock.connect_ex(where)]
        select.select([], [sock], [], 20)
        return [code(number) for number in (*said, sock.connect_ex(where))]


def looped(where: Address) -> list[str]:
    """Return what asyncio says."""

    async def connect() -> str:
        try:
            _, writer = await asyncio.open_connection(*where)
            writer.close()
            return "ok"
        except OSError as error:
            return code(error.errno or 0)

    return [asyncio.run(connect())]


WAYS = {f.__name__: f for f in (blocking, polled, registered, again, looped)}


def errors(*places: str) -> dict[str, dict[str, list[str]]]:
    """Return what each way to connect says of each place, and how long it took."""
    found: dict[str, dict[str, list[str]]] = {}
    for place in places:
        host, _, port = place.rpartition(":")
        found[place] = {}
        for name, way in WAYS.items():
            found[place][name] = way((host, int(port)))
    return found


def no_such_host(name: str) -> str:
    try:
        socket.getaddrinfo(name, 80)
    except socket.gaierror as error:
        return {socket.EAI_NONAME: "EAI_NONAME"}.get(error.errno or 0, str(error))
    return "found"


def addresses(host: str, port: str) -> dict[str, Any]:
    """Return what getsockname() and getpeername() say of several sockets."""
    found: dict[str, Any] = {}
    cases = {"inet": (host, False), "mapped": (f"::ffff:{host}", False)}
    cases["only"] = ("2001:db8:9::80", True)
    for name, (where, only) in cases.items():
        for blocks in (True, False):
            family = socket.AF_INET6 if ":" in where else socket.AF_INET
            with socket.socket(family) as sock:
                if family == socket.AF_INET6:
                    option = socket.IPPROTO_IPV6, socket.IPV6_V6ONLY
                    sock.setsockopt(*option, int(only))
                before = sock.getsockname()[:2]
                sock.setblocking(blocks)
                with contextlib.suppress(BlockingIOError):
                    sock.connect((where, int(port)))
                during = peer_of(sock)
                select.select([], [sock], [], 10)
                assert error_of(sock) == "ok" and sock.getblocking() == blocks
                assert os.get_blocking(sock.fileno()) == blocks
                after = sock.getsockname()[:2], sock.getpeername()[:2]
                copy = socket.socket(fileno=os.dup(sock.fileno()))
                assert copy.getpeername()[:2] == after[1]
                forked = in_child(lambda copy=copy: copy.getpeername()[:2])
                key = f"{name} {'waits' if blocks else 'goes on'}"
                found[key] = [before, during, *after, forked]
                sock.setblocking(True)
                sock.sendall(b"GET /page HTTP/1.0\r\n\r\n")
                data = b""
                while piece := copy.recv(65536):
                    data += piece
                assert data.endswith(b"a page"), data
                copy.close()
    return found


def peer_of(sock: socket.socket) -> Any:
    try:
        return sock.getpeername()[:2]
    except OSError as error:
        return code(error.errno or 0)


def in_child(function: Any) -> Any:
    """Return what a function returns in a child."""
    reads, writes = os.pipe()
    if not os.fork():
        os.write(writes, json.dumps(function()).encode())
        os._exit(0)
    os.close(writes)
    with open(reads) as pipe:
        return json.load(pipe)


def moved(host: str, port: str) -> str:
    """Move a socket by dup2 while it connects; use it in a child."""
    sock = socket.socket()
    sock.setblocking(False)
    sock.connect_ex((host, int(port)))
    os.dup2(sock.fileno(), 77)
    sock.close()
    copy = socket.socket(fileno=77)
    select.select([], [copy], [], 10)

    def use() -> str:
        copy.setblocking(True)
        copy.sendall(b"GET /page HTTP/1.0\r\n\r\n")
        return copy.recv(65536).decode()[-6:] or copy.recv(100).decode()

    return str(in_child(use))


def ticking(host: str, port: str) -> dict[str, Any]:
    """Connect to a dead host while a timer sends a signal each 20 ms."""
    ticks = []
    signal.signal(signal.SIGALRM, lambda *_: ticks.append(1))
    signal.setitimer(signal.ITIMER_REAL, 0.02, 0.02)
    answer = blocking((host, int(port)))
    signal.setitimer(signal.ITIMER_REAL, 0)
    return {"answer": answer, "ticks": len(ticks)}


def broken(host: str, port: str) -> list[str]:
    """Connect when it is told to, after what natrun.py is about has been killed."""
    print("ready", flush=True)
    while not os.path.exists(f"{os.environ['TMPDIR']}/go"):
        time.sleep(0.01)
    return [*blocking((host, int(port))), *polled_at_once((host, int(port)))]


def polled_at_once(where: Address) -> list[str]:
    with socket.socket() as sock:
        sock.setblocking(False)
        return [code(sock.connect_ex(where))]


def near(address: str, port: str) -> dict[str, Any]:
    """Use sockets that natrun.py has no business with."""
    found: dict[str, Any] = {}
    with socket.create_server(("127.0.0.1", 0)) as listener:
        with socket.create_connection(listener.getsockname()) as sock:
            found["loopback"] = sock.getpeername() == listener.getsockname()
            accepted, peer = listener.accept()
            found["accepted"] = peer == sock.getsockname()
            accepted.close()
    with socket.create_connection((address, int(port))) as sock:
        found["lan"] = sock.getpeername()[0], sock.getsockname()[0]
    path = f"{os.environ['TMPDIR']}/socket-{os.getpid()}"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen(2000)
        for _ in range(1000):
            with socket.socket(socket.AF_UNIX) as sock:
                sock.connect(path)
    return found


def deaf(host: str, port: str) -> list[str]:
    """Connect as a program that lets nobody look into it."""
    import ctypes

    ctypes.CDLL(None).prctl(4, 0)  # PR_SET_DUMPABLE
    return blocking((host, int(port)))


def daemonized(host: str, port: str) -> None:
    """Leave a daemon behind that connects after its parent has gone."""
    if os.fork():
        os._exit(3)
    os.setsid()
    if os.fork():
        os._exit(0)
    time.sleep(0.3)
    with open(f"{os.environ['TMPDIR']}/daemon", "w") as file:
        file.write(blocking((host, int(port)))[0])
    os._exit(0)


def half_closed(host: str, port: str) -> list[Any]:
    """Send the end before the answer comes, on sockets of both kinds."""
    found = []
    for blocks in (True, False):
        with socket.socket() as sock:
            sock.setblocking(blocks)
            sock.connect_ex((host, int(port)))
            select.select([], [sock], [], 10)
            sock.setblocking(True)
            for byte in b"some words":
                sock.send(bytes([byte]))
            sock.shutdown(socket.SHUT_WR)
            said = b""
            while piece := sock.recv(100):
                said += piece
            found.append(said.decode())
    return found


def reset(host: str, port: str) -> list[str]:
    """Be reset by the server; and reset it, on sockets of both kinds."""
    found = []
    for blocks in (True, False):
        with socket.socket() as sock:
            sock.setblocking(blocks)
            sock.connect_ex((host, int(port)))
            select.select([], [sock], [], 10)
            sock.setblocking(True)
            sock.sendall(b"reset")
            try:
                found.append(str(sock.recv(100)))
            except OSError as error:
                found.append(code(error.errno or 0))
    return found


def crowd(host: str, port: str, count: str) -> int:
    """Connect many times at once; return how many have had an answer."""

    async def one() -> bool:
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(b"GET /page HTTP/1.0\r\n\r\n")
        said = await reader.read()
        writer.close()
        return said.endswith(b"a page")

    async def run() -> int:
        return sum(await asyncio.gather(*[one() for _ in range(int(count))]))

    return asyncio.run(run())


def where(place: str) -> Address:
    host, _, port = place.rpartition(":")
    return host.strip("[]"), int(port)


def peers(*places: str) -> list[Any]:
    """Write to several peers from one socket; return who answered what."""
    family = socket.AF_INET6 if "[" in places[0] else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as sock:
        sock.settimeout(10)
        for place in places:
            sock.sendto(b"hello", where(place))
        found = [sock.recvfrom(1000) for _ in places]
        return sorted([sender[0], sender[1], data.decode()] for data, sender in found)


def connected(place: str) -> list[str]:
    """Write on a connected socket; return what comes, and both addresses."""
    family = socket.AF_INET6 if "[" in place else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as sock:
        sock.settimeout(10)
        sock.connect(where(place))
        sock.send(b"hello")
        said = sock.recv(1000).decode()
        return [said, sock.getsockname()[0], sock.getpeername()[0]]


def third_party(place: str, third: str) -> list[Any]:
    """Have a third party write to the port that a peer has seen."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.settimeout(2)
        sock.sendto(b"hello", where(place))
        sock.recvfrom(1000)
        sock.sendto(b"call " + third.encode(), where(place))
        found = []
        with contextlib.suppress(TimeoutError):
            for _ in range(2):
                data, sender = sock.recvfrom(1000)
                found.append([sender[0], data.decode()])
        return sorted(found)


def many(count: str, *places: str) -> dict[str, int]:
    """Exchange many datagrams with several peers; none may have a wrong source."""
    wanted, sent, got, wrong = int(count), 0, 0, 0
    targets = [where(place) for place in places]
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 22)
        sock.settimeout(2)
        with contextlib.suppress(TimeoutError):
            while got < wanted:
                while sent < wanted and sent - got < 64:
                    target = targets[sent % len(targets)]
                    sock.sendto(b"to %s:%d" % (target[0].encode(), target[1]), target)
                    sent += 1
                data, sender = sock.recvfrom(1000)
                got += 1
                named = b"to %s:%d" % (sender[0].encode(), sender[1])
                wrong += not data.startswith(named)
    return {"sent": sent, "got": got, "wrong": wrong}


def near_datagrams(place: str) -> dict[str, Any]:
    """Use UDP inside: the LAN, and loopback between two sockets of the run."""
    found: dict[str, Any] = {"lan": peers(place)}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as server:
        server.bind(("127.0.0.1", 0))
        server.settimeout(5)
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
            client.settimeout(5)
            client.sendto(b"ping", server.getsockname())
            data, sender = server.recvfrom(100)
            server.sendto(data + b"pong", sender)
            found["loopback"] = [sender[0], client.recv(100).decode()]
    return found


def query(name: str) -> str:
    """Ask a name server by a socket that is not connected; return the address."""
    labels = b"".join(bytes([len(one)]) + one.encode() for one in name.split("."))
    asked = b"\0\7\1\0\0\1\0\0\0\0\0\0" + labels + b"\0\0\1\0\1"
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.settimeout(5)
        sock.sendto(asked, ("198.51.100.53", 53))
        answer, sender = sock.recvfrom(1000)
        assert sender == ("198.51.100.53", 53) and answer[:2] == asked[:2]
        return socket.inet_ntoa(answer[-4:])


def make_datagram_socket() -> str:
    try:
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM).close()
        return "ok"
    except OSError as error:
        return code(error.errno or 0)


def bind_to(*places: str) -> list[Any]:
    """Bind a listener to each place; return its address, or the error."""
    found: list[Any] = []
    kept = []
    for place in places:
        sock = socket.socket()
        kept.append(sock)
        try:
            sock.bind(where(place))
            sock.listen()
            found.append(sock.getsockname())
        except OSError as error:
            found.append(code(error.errno or 0))
    return found


def serve(place: str, count: str) -> list[Any]:
    """Accept so many callers, in three processes; say who each was."""
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind(where(place))
    listener.listen(100)
    print(json.dumps(listener.getsockname()), flush=True)
    for number in range(3):
        if number == 2 or not os.fork():
            while True:
                sock, peer = listener.accept()
                assert sock.getblocking() and peer == sock.getpeername()
                local = sock.getsockname()[:2]
                sock.sendall(json.dumps([peer, local]).encode())
                sock.close()
    return []


def waiting(place: str) -> float:
    """Wait in accept() until SIGTERM; its handler leaves."""
    listener = socket.socket()
    listener.bind(where(place))
    listener.listen()

    def leave(*_: Any) -> None:
        print("handled", flush=True)
        os._exit(4)

    signal.signal(signal.SIGTERM, leave)
    print("ready", flush=True)
    listener.accept()
    return 0.0


def main() -> None:
    function = globals()[sys.argv[1]]
    print(json.dumps(function(*sys.argv[2:])), flush=True)


if __name__ == "__main__":
    main()
