"""What a program sees of its sockets: run by natrun.py, each function prints JSON."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import errno
import json
import os
import select
import signal
import socket
import stat
import struct
import sys
import threading
import time
from typing import Any

Address = tuple[str, int]
LIBC = ctypes.CDLL(None, use_errno=True)
EXIT = {"x86_64": 60, "aarch64": 93}  # the system call that ends one thread
CLONE_FILES, MPTCP = 0x400, 262


def code(number: int) -> str:
    return errno.errorcode[number] if number else "ok"


def told(error: OSError) -> str:
    return code(error.errno) if error.errno else type(error).__name__


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


def short_option(host: str, port: str) -> list[int]:
    """Return what SO_ERROR writes into four bytes, of which it is given one."""
    with socket.socket() as sock:
        sock.setblocking(False)
        sock.connect_ex((host, int(port)))
        select.select([], [sock], [], 20)
        room, size = (ctypes.c_ubyte * 4)(*b"...."), ctypes.c_uint32(1)
        option = socket.SOL_SOCKET, socket.SO_ERROR
        assert LIBC.getsockopt(sock.fileno(), *option, room, ctypes.byref(size)) == 0
        return [*room]


def again(where: Address) -> list[str]:
    """Return what connect() says twice while it is under way, and once after it.

    On a busy machine it may have ended before the second: then it is tried again.
    """
    for _ in range(20):
        with socket.socket() as sock:
            sock.setblocking(False)
            said = [sock.connect_ex(where), sock.connect_ex(where)]
            select.select([], [sock], [], 20)
            said.append(sock.connect_ex(where))
        if said[1] == errno.EALREADY:
            break
    return [code(number) for number in said]


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
    ticks: list[int] = []
    signal.signal(signal.SIGALRM, lambda *_: ticks.append(1))
    signal.setitimer(signal.ITIMER_REAL, 0.02, 0.02)
    answer = blocking((host, int(port)))
    while answer == ["ok"] and len(ticks) < 5:
        # A signal came before natrun.py heard of it, and Python takes any EINTR for
        # that of a connection which goes on.
        answer = blocking((host, int(port)))
    signal.setitimer(signal.ITIMER_REAL, 0)
    return {"answer": answer, "ticks": len(ticks)}


def shared(host: str, port: str, first: str) -> list[str]:
    """Connect to a dead host in three threads while a timer signals the process.

    The first of them blocks the signal, if that is said.  Return all that was told.
    """
    raw = struct.pack("=H", socket.AF_INET) + int(port).to_bytes(2, "big")
    raw += socket.inet_aton(host) + bytes(8)
    found = set()

    def connect() -> None:
        with socket.socket() as sock:
            while True:
                failed = LIBC.connect(sock.fileno(), raw, len(raw))
                told = ctypes.get_errno() if failed else 0
                found.add(errno.errorcode.get(told, str(told)))
                if told != errno.EINTR:
                    return

    signal.signal(signal.SIGALRM, lambda *_: None)
    threads = [threading.Thread(target=connect) for _ in range(2)]
    for thread in threads:
        thread.start()
    if first == "blocks":
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGALRM})
    signal.setitimer(signal.ITIMER_REAL, 0.2, 0.02)
    connect()
    for thread in threads:
        thread.join()
    signal.setitimer(signal.ITIMER_REAL, 0)
    return sorted(found)


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
    for size in 16, 28:  # of an address, as those of the Internet
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(f"\0{os.getpid()}".ljust(size - 2, "x"))
            listener.listen()
            with socket.socket(socket.AF_UNIX) as sock:
                sock.connect(listener.getsockname())
    return found


def deaf(host: str, port: str) -> list[str]:
    """Connect as a program that lets nobody look into it."""
    LIBC.prctl(4, 0)  # PR_SET_DUMPABLE
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


def given_up(how: str, pause: str, first: str, second: str) -> list[str]:
    """Give a connection up that is under way; return what a second one brings."""
    found = []
    for family in (socket.AF_INET, socket.AF_INET6):
        mapped = "::ffff:" if family == socket.AF_INET6 else ""
        there, then = [
            (mapped + where(place)[0], where(place)[1]) for place in (first, second)
        ]
        tries = (give_up_once(family, how, float(pause), there, then) for _ in "12345")
        found += next(told for told in tries if told)
    return found


def give_up_once(
    family: int, how: str, pause: float, there: Address, then: Address
) -> list[str] | None:
    """Do so by one socket; return None if the first was connected before."""
    found = []
    with socket.socket(family) as sock:
        sock.setblocking(False)
        assert sock.connect_ex(there) == errno.EINPROGRESS
        if how == "shutdown":
            sock.shutdown(socket.SHUT_RDWR)
            found.append(error_of(sock))
        else:
            assert LIBC.connect(sock.fileno(), bytes(16), 16) == 0  # AF_UNSPEC
        time.sleep(pause)  # has the first ended?
        if (error := sock.connect_ex(then)) == errno.EISCONN:
            return None
        assert error == errno.EINPROGRESS, error
        select.select([], [sock], [], 10)
        found.append(error_of(sock))
        time.sleep(1.5)  # the first has ended, too
        assert sock.getpeername()[:2] == then
        sock.setblocking(True)
        sock.sendall(b"some words")
        sock.shutdown(socket.SHUT_WR)
        found.append(sock.recv(100).decode())
        return found


def shut_down(place: str) -> list[str]:
    """Shut sockets down that connect; return what is told of them twice, later."""
    found = []
    for family in (socket.AF_INET, socket.AF_INET6):
        mapped = "::ffff:" if family == socket.AF_INET6 else ""
        with socket.socket(family) as sock:
            sock.setblocking(False)
            sock.connect_ex((mapped + where(place)[0], where(place)[1]))
            sock.shutdown(socket.SHUT_RDWR)
            time.sleep(0.5)
            found += [error_of(sock), error_of(sock)]
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


def unstalled(host: str, port: str, count: str) -> list[Any]:
    """Connect often to a dead host; say how that ended, and how often we went on."""

    async def one() -> str:
        try:
            await asyncio.open_connection(host, int(port))
            return "ok"
        except OSError as error:
            return code(error.errno or 0)

    async def run() -> list[Any]:
        begun, ticks = [asyncio.ensure_future(one()) for _ in range(int(count))], 0
        while not all(task.done() for task in begun):
            await asyncio.sleep(0.01)
            ticks += 1
        return [[task.result() for task in begun], ticks]

    return asyncio.run(run())


def refusals(*places: str) -> list[str]:
    return [blocking(where(place))[0] for place in places]


def held(host: str, port: str, count: str) -> int:
    """Hold many connections to a server; return how many of them it echoes on."""

    async def begin() -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await asyncio.wait_for(asyncio.open_connection(host, int(port)), 8)

    async def use(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        writer.write(b"word")
        return await asyncio.wait_for(reader.readexactly(4), 8) == b"word"

    async def run() -> int:
        begun = [begin() for _ in range(int(count))]
        ends = await asyncio.gather(*begun, return_exceptions=True)
        used = [use(*end) for end in ends if isinstance(end, tuple)]
        return (await asyncio.gather(*used, return_exceptions=True)).count(True)

    return asyncio.run(run())


def sizes(host: str, port: str, *lengths: str) -> dict[str, str]:
    """Return what connect() says of each length of an address."""
    six, found = ":" in host, {}
    family = socket.AF_INET6 if six else socket.AF_INET
    packed = socket.inet_pton(family, host)
    raw = struct.pack("=H2s", family, int(port).to_bytes(2, "big"))
    raw += (bytes(4) if six else b"") + packed
    for length in map(int, lengths):
        with socket.socket(family) as sock:
            failed = LIBC.connect(sock.fileno(), raw.ljust(128, b"\0"), length)
            found[str(length)] = code(ctypes.get_errno() if failed else 0)
    return found


def orphaned(host: str, port: str) -> None:
    """Connect from a thread when the first one has ended."""

    def connect() -> None:
        path = f"/proc/self/task/{os.getpid()}/stat"
        deadline = time.monotonic() + 10
        with open(path) as first:
            while first.read().rpartition(") ")[2][0] != "Z":
                assert time.monotonic() < deadline
                first.seek(0)
                time.sleep(0.01)
        with socket.socket() as sock:
            said = [code(sock.connect_ex((host, int(port)))), peer_of(sock)]
        print(json.dumps(said), flush=True)
        os._exit(0)

    threading.Thread(target=connect).start()
    LIBC.syscall(EXIT[os.uname().machine])


def separate(host: str, port: str) -> list[Any]:
    """Connect in a thread with descriptors of its own; say whose socket it was."""
    made, other_made, found = threading.Event(), threading.Event(), list[Any]()

    def connect() -> None:
        assert LIBC.unshare(CLONE_FILES) == 0
        sock = socket.socket()
        found.append(sock.fileno())
        made.set()
        assert other_made.wait(10)
        found.append(code(sock.connect_ex((host, int(port)))))
        found.append(peer_of(sock))
        sock.close()

    thread = threading.Thread(target=connect)
    thread.start()
    assert made.wait(10)
    with socket.socket() as own:
        assert own.fileno() == found.pop(0)  # the same number, another socket
        other_made.set()
        thread.join(20)
        return [*found, peer_of(own)]


def named(host: str, port: str) -> list[str]:
    """Connect in a thread with a name of its own."""
    found = []

    def connect() -> None:
        with open("/proc/thread-self/comm", "w") as file:
            file.write("fetch\rer")
        found.extend(blocking((host, int(port))))

    thread = threading.Thread(target=connect)
    thread.start()
    thread.join(20)
    return found


def unnamed(host: str, port: str) -> list[str]:
    """Connect in the first thread."""
    return blocking((host, int(port)))


def multipath() -> str:
    try:
        socket.socket(socket.AF_INET, socket.SOCK_STREAM, MPTCP).close()
        return "ok"
    except OSError as error:
        return told(error)


def bound_before(source: str, host: str, port: str) -> list[str]:
    """Connect sockets of IPv6 that were bound before, each in both manners."""
    found = []
    for only in (0, 1):
        for blocks in (True, False):
            with socket.socket(socket.AF_INET6) as sock:
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, only)
                sock.bind((source, 0))
                sock.setblocking(blocks)
                said = sock.connect_ex((host, int(port)))
                if said == errno.EINPROGRESS:
                    select.select([], [sock], [], 10)
                    said = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
                found.append(code(said))
    return found


def listened_before(host: str, port: str) -> list[str]:
    """Connect sockets that listen, each in both manners."""
    found = []
    for blocks in (True, False):
        with socket.create_server(("127.0.0.1", 0)) as sock:
            sock.setblocking(blocks)
            found.append(code(sock.connect_ex((host, int(port)))))
    return found


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


def emptied(place: str) -> list[str]:
    """Have a peer send nothing; return who did, and what that was."""
    family = socket.AF_INET6 if "[" in place else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as sock:
        sock.settimeout(10)
        sock.sendto(b"nothing", where(place))
        data, (host, port, *_) = sock.recvfrom(1000)
        return [f"[{host}]:{port}" if ":" in host else f"{host}:{port}", data.decode()]


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


def answer_datagrams(host: str) -> None:
    """Say where a socket is bound; wake it by itself; answer all that comes."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    near = "::1" if family == socket.AF_INET6 else "127.0.0.1"
    with socket.socket(family, socket.SOCK_DGRAM) as sock:
        sock.bind((host, 0))
        port = sock.getsockname()[1]
        print(port, flush=True)
        sock.sendto(b"wake", (near, port))
        while True:
            data, sender = sock.recvfrom(1000)
            if data == b"wake":
                print("awake", flush=True)
            else:
                sock.sendto(data + b" from " + sender[0].encode(), sender)


def rebound(*places: str) -> list[str]:
    """Bind a socket of UDP to each place, one after the other; say how that went."""
    found = []
    for place in places:
        family = socket.AF_INET6 if "[" in place else socket.AF_INET
        with socket.socket(family, socket.SOCK_DGRAM) as sock:
            try:
                sock.bind(where(place))
                assert sock.getsockname()[1] == where(place)[1]
                sock.sendto(b"hello", ("::1" if "[" in place else "127.0.0.1", 9))
                found.append("ok")
            except OSError as error:
                found.append(told(error))
    return found


def paired_datagrams(host: str) -> list[Any]:
    """Exchange datagrams between two sockets on one address."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as server:
        server.bind((host, 0))
        server.settimeout(5)
        with socket.socket(family, socket.SOCK_DGRAM) as client:
            client.settimeout(5)
            try:
                client.connect(server.getsockname()[:2])
                client.send(b"ping")
                data, sender = server.recvfrom(100)
                server.sendto(data + b"pong", sender[:2])
                said, peer = client.recvfrom(100)
                return [said.decode(), sender[0], peer[:2] == server.getsockname()[:2]]
            except OSError as error:
                return [told(error)]


def burst(place: str, count: str) -> None:
    """Send many datagrams without a pause, in turn on four sockets that are used."""
    socks = [socket.socket(socket.AF_INET, socket.SOCK_DGRAM) for _ in range(4)]
    for sock in socks:
        sock.settimeout(10)
        sock.connect(where(place))
        sock.send(b"first")
        sock.recv(100)
    for number in range(int(count)):
        socks[number % 4].send(b"%d" % number)
    signal.pause()  # its sockets are there until it is told to end


def unconnected(place: str) -> str:
    """Send a datagram on a socket that is not connected; return what came."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.settimeout(3)
        try:
            sock.sendto(b"hello", where(place))
            return sock.recv(1000).decode()
        except OSError as error:
            return told(error)


def inherited() -> list[str]:
    """Return the sockets that were open before this program opened any."""
    found = []
    for fd in map(int, os.listdir("/proc/self/fd")):
        with contextlib.suppress(OSError):
            if fd > 2 and stat.S_ISSOCK(os.fstat(fd).st_mode):
                found.append(os.readlink(f"/proc/self/fd/{fd}"))
    return found


def outliving(host: str, place: str) -> list[str]:
    """Hold a connection and a socket of UDP; return how both do when it ends."""
    with socket.socket() as tcp, socket.socket(type=socket.SOCK_DGRAM) as udp:
        tcp.settimeout(20)
        tcp.connect((host, 80))
        udp.settimeout(0.5)
        udp.connect(where(place))
        udp.send(b"hello")
        udp.recv(100)
        print("ready", flush=True)
        try:
            ended = tcp.recv(100).decode()
        except OSError as error:
            ended = told(error)
        for _ in range(20):
            with contextlib.suppress(OSError):
                udp.send(b"hello")
                return [ended, udp.recv(5).decode()]
        return [ended, "nothing"]


def outlasting(place: str) -> list[str]:
    """Send datagrams while the gateway is away, and when it has come back.

    It goes on at each file that it is told to wait for.
    """
    folder = os.environ["TMPDIR"]

    def reached(name: str) -> None:
        print(name, flush=True)
        deadline = time.monotonic() + 60
        while not os.path.exists(f"{folder}/{name}"):
            assert time.monotonic() < deadline
            time.sleep(0.01)

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.settimeout(10)
        sock.connect(where(place))
        sock.send(b"first")
        found = [sock.recv(100).decode().split()[0]]
        reached("stopped")
        for number in range(100):
            sock.send(b"stale%d" % number)
            time.sleep(0.01)
        reached("again")
        sock.settimeout(0.5)
        deadline = time.monotonic() + 15
        while "last" not in found and time.monotonic() < deadline:
            with contextlib.suppress(OSError):
                sock.send(b"last")
                found.append(sock.recv(100).decode().split()[0])
        return found


def make_datagram_socket() -> str:
    try:
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM).close()
        return "ok"
    except OSError as error:
        return code(error.errno or 0)


def beside(place: str) -> str:
    """Connect when it is told to, while a socket of UDP is asked for."""
    made = threading.Event()

    def make() -> None:
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM).close()
        made.set()

    print("ready", flush=True)
    while not os.path.exists(f"{os.environ['TMPDIR']}/beside"):
        time.sleep(0.01)
    threading.Thread(target=make).start()
    for _ in range(3):
        with socket.create_connection(where(place), 10):
            time.sleep(0.1)
    print("connected before" if not made.is_set() else "connected after", flush=True)
    return "made" if made.wait(10) else "not made"


def bind_to(*places: str) -> list[Any]:
    """Bind a listener to each place; return its address, or the error."""
    found: list[Any] = []
    kept = []
    for place in places:
        sock = socket.socket(socket.AF_INET6 if "[" in place else socket.AF_INET)
        kept.append(sock)
        try:
            sock.bind(where(place))
            sock.listen()
            found.append(sock.getsockname())
        except OSError as error:
            found.append(code(error.errno or 0))
    return found


def bind_both(port: str) -> list[Any]:
    """Listen on any address, with a socket for IPv4 and one for IPv6 only."""
    with (
        socket.create_server(("0.0.0.0", int(port))) as four,
        socket.socket(socket.AF_INET6) as six,
    ):
        six.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        six.bind(("::", int(port)))
        six.listen()
        return [four.getsockname()[:2], six.getsockname()[:2]]


def bind_twice(host: str, *ports: str) -> list[Any]:
    """Bind one socket to several ports at once; return the port that it has."""
    sock, ready = socket.socket(), threading.Barrier(len(ports))

    def bind(port: int) -> None:
        ready.wait()
        with contextlib.suppress(OSError):
            sock.bind((host, port))

    threads = [threading.Thread(target=bind, args=[int(port)]) for port in ports]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    print(sock.getsockname()[1], flush=True)
    signal.pause()
    return []


def bind_again(*places: str) -> list[Any]:
    """Bind one listener to the first place that can be had; say how that went."""
    found: list[Any] = []
    with socket.socket() as sock:
        for place in places:
            try:
                sock.bind(where(place))
                sock.listen()
                return [*found, sock.getsockname()]
            except OSError as error:
                found.append(told(error))
    return found


def fleeting(host: str, port: str, server: str) -> None:
    """Listen for a moment, and connect from a port of the outside; wait."""
    ports = range(int(port), int(port) + 4)
    for number in ports:
        with socket.socket() as sock:
            sock.bind((host, number))
            if number % 2:
                sock.listen()
            else:
                sock.connect(where(server))
    print(json.dumps([*ports]), flush=True)
    signal.pause()


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
