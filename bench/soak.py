#!/usr/bin/env python3
"""Load natwork with all that happens to a gateway, and see that nothing is left over.

    python3 bench/soak.py [--seconds N] [--rate N] [--clients N]

Starts nginx as origin and natwork, and lets a few clients do what clients do:
GETs, uploads in chunks, tunnels, SOCKS where the gateway has it, aborts at bad
moments, slowness, nonsense; meanwhile workers are killed and the configuration
is read again.  Then the load stops, and what the gateway holds is compared with
what it held at rest before; its log with its counters; and both with what the
clients know they asked for.

Exit codes: 0 nothing is left over and nothing missing; 1 something is, and the
report says what; 2 bad command line.
"""

import argparse
import contextlib
import importlib.util
import os
import random
import re
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from collections.abc import Iterator
from dataclasses import dataclass
from dataclasses import field
from pathlib import Path
from typing import Any

from bench import HOST
from bench import BenchError
from bench import Place
from bench import await_listener
from bench import family
from bench import free_ports
from bench import installed
from bench import left_by
from bench import machine
from bench import prepare
from bench import read_exactly
from bench import running

# SPDX-License-Identifier: MIT

SILENCE_TIMEOUT = 30.0  # seconds a client waits for a byte
REST_TIMEOUT = 60.0  # seconds in which a gateway without clients comes to rest
RELOAD_EVERY = 10.0  # seconds
SPARES = 8
MAX_WORKERS = 96
MASTER_GROWTH = 512  # KiB that the master's memory may differ between two rests
BIG = 3_000_000  # bytes: many pipes full
OUTSIDER = "127.0.0.9"  # an address that is not inside

NONSENSE = (
    b"GET / HTTP/1.1\r\nHost: a b\r\n\r\n",
    b"GET http://a/ HTTP/1.1\r\nHost : a\r\n\r\n",
    b"GET http://a/ HTTP/1.1\r\n\r\n",
    b"GET http://a/ HTTP/3.0\r\nHost: a\r\n\r\n",
    b"GET http://a/\nHost: a\n\n",
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    b"POST http://a/ HTTP/1.1\r\nHost: a\r\nContent-Length: 1_0\r\n\r\n",
    b"POST http://a HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked, chunked\r\n\r\n",
    b"CONNECT a HTTP/1.1\r\nHost: a\r\n\r\n",
    b"GET http://a/ HTTP/1.1\r\nHost: a\r\n" + b"x: y\r\n" * 11000 + b"\r\n",
)


def origin(place: Place, port: int) -> list[str]:
    """Configure nginx to serve files, and to take them by PUT."""
    folder = place.folder
    scratch = "\n".join(
        f"    {kind}_temp_path {folder}/scratch;"
        for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    config = f"""\
daemon off;
worker_processes 1;
pid {folder}/nginx.pid;
error_log {place.log("nginx")};
events {{ worker_connections 1024; }}
http {{
{scratch}
    access_log off;
    keepalive_timeout 3;
    server {{
        listen {HOST}:{port};
        root {folder}/files;
        location /up/ {{ dav_methods PUT; client_max_body_size 0; }}
    }}
}}
"""
    path = place.write("nginx.conf", config)
    return ["nginx", "-e", place.log("nginx"), "-c", path]


# --- The clients ------------------------------------------------------------
#
# Each visit is a function that does one thing, sees that it came out right, and
# returns how many sessions the gateway should have counted for it: at least, and
# at most, since nobody can know whether a request that was cut off was read.

Range = tuple[int, int]
NONE, ONE, PERHAPS = (0, 0), (1, 1), (0, 1)


class Wrong(Exception):
    """A client was not served as he should have been."""


@dataclass
class Visitors:
    """What the clients share: where they go, and what they have counted."""

    port: int  # the gateway's
    origin: int
    files: dict[str, bytes]
    board: Any  # the gateway's scoreboard, to read
    program: Any  # natwork.py as a module
    go: threading.Event = field(default_factory=threading.Event)
    over: threading.Event = field(default_factory=threading.Event)
    lock: threading.Lock = field(default_factory=threading.Lock)
    least: int = 0  # sessions
    most: int = 0
    active: int = 0
    visits: Counter[str] = field(default_factory=Counter)
    wrong: Counter[str] = field(default_factory=Counter)

    def connect(self, source: str = "") -> socket.socket:
        where = (source, 0) if source else None
        return socket.create_connection((HOST, self.port), SILENCE_TIMEOUT, where)

    def url(self, name: str) -> str:
        return f"http://{HOST}:{self.origin}/{name}"

    def run(self, visits: list["Visit"], seed: int, pause: float) -> None:
        """Visit the gateway again and again, until it is over."""
        dice = random.Random(seed)
        while not self.over.is_set():
            if not self.go.wait(0.2):
                continue
            visit = dice.choice(visits)
            with self.lock:
                self.active += 1
            least, most, why = 0, 1, ""
            try:
                least, most = visit(self, dice)
            except (OSError, Wrong, BenchError) as error:
                why = f"{visit.__name__}: {type(error).__name__}: {error}"
            with self.lock:
                self.active -= 1
                self.least += least
                self.most += most
                self.visits[visit.__name__] += 1
                if why:
                    self.wrong[why] += 1
            self.over.wait(dice.expovariate(1 / pause))

    def worker_of(self, client: socket.socket) -> int:
        """Return the process that serves a client, as the state table has it."""
        name = "%s:%d" % (HOST, client.getsockname()[1])
        for number in range(MAX_WORKERS):
            slot = self.program.Slot(self.board, number)
            session = slot.session()
            if session and session.client == name:
                return int(slot.words[slot.PID])
        raise Wrong("a tunnel is not in the table")


Visit = Callable[[Visitors, random.Random], Range]


def head_of(method: str, target: str, *fields: str) -> bytes:
    host = re.sub("^http://|/.*", "", target) or HOST
    lines = [f"{method} {target} HTTP/1.1", f"Host: {host}", *fields, "", ""]
    return "\r\n".join(lines).encode()


def read_head(client: socket.socket) -> tuple[int, dict[str, str], bytes]:
    """Return status and fields of an answer, and what came behind its head."""
    received = b""
    while b"\r\n\r\n" not in received:
        if not (piece := client.recv(65536)):
            raise ConnectionError(f"closed after {len(received)} bytes of a head")
        received += piece
    head, _, rest = received.partition(b"\r\n\r\n")
    line, *lines = head.decode("latin-1").split("\r\n")
    fields = dict(re.split(": *", line.lower(), maxsplit=1) for line in lines)
    return int(line.split(" ")[1]), fields, rest


def answer(client: socket.socket) -> tuple[int, bytes, bool]:
    """Read an answer with a Content-Length: status, body, whether it goes on."""
    status, fields, body = read_head(client)
    left = int(fields.get("content-length", "0")) - len(body)
    body += read_exactly(client, left)
    return status, body, fields.get("connection") != "close"


def expect(status: int, *wanted: int) -> None:
    if status not in wanted:
        raise Wrong(f"status {status}")


def reset(client: socket.socket) -> None:
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client.close()


def open_tunnel(visitors: Visitors, client: socket.socket) -> None:
    client.sendall(head_of("CONNECT", f"{HOST}:{visitors.origin}"))
    status, _, early = read_head(client)
    expect(status, 200)
    if early:
        raise Wrong("bytes behind the answer to CONNECT")


def fetch(visitors: Visitors, client: socket.socket, name: str, *fields: str) -> bool:
    """Get a file and compare it; return whether the connection goes on."""
    client.sendall(head_of("GET", visitors.url(name), *fields))
    status, body, goes_on = answer(client)
    expect(status, 200)
    if body != visitors.files[name]:
        raise Wrong(f"{name} came with {len(body)} bytes, or others")
    return goes_on


def through(visitors: Visitors, client: socket.socket, name: str, half: bool) -> None:
    """Get a file by a tunnel, perhaps closing our half of it first."""
    client.sendall(head_of("GET", f"/{name}", "Connection: close"))
    if half:
        client.shutdown(socket.SHUT_WR)
    received = b""
    while piece := client.recv(1 << 18):
        received += piece
    if received.partition(b"\r\n\r\n")[2] != visitors.files[name]:
        raise Wrong(f"{name} came otherwise through a tunnel")


def small_get(visitors: Visitors, dice: random.Random) -> Range:
    with visitors.connect() as client:
        fetch(visitors, client, "1k", *["Connection: close"] * dice.randrange(2))
    return ONE


def kept_alive(visitors: Visitors, dice: random.Random) -> Range:
    """Ask several times by one connection, which a reload may close in between."""
    count = dice.randint(2, 8)
    client = visitors.connect()
    for number in range(count):
        try:
            goes_on = fetch(visitors, client, "1k")
        except ConnectionError:
            if number == 0:
                raise
            client.close()
            client = visitors.connect()
            goes_on = fetch(visitors, client, "1k")
        if not goes_on:
            client.close()
            client = visitors.connect()
        time.sleep(dice.random() / 4)
    client.close()
    return count, count


def pipelined(visitors: Visitors, dice: random.Random) -> Range:
    with visitors.connect() as client:
        ask = head_of("HEAD", visitors.url("1k"))
        client.sendall(ask + head_of("GET", visitors.url("1k"), "Connection: close"))
        received = b""
        while piece := client.recv(65536):
            received += piece
        answered = received.count(b"HTTP/1.1 200 ")
        # A reload closes behind the answer it meets.
        if answered != 2 and not (
            answered == 1 and b"connection: close" in received.lower()
        ):
            raise Wrong(f"{answered} answers to two requests")
    return answered, answered


def big_get(visitors: Visitors, dice: random.Random) -> Range:
    with visitors.connect() as client:
        fetch(visitors, client, "big", "Connection: close")
    return ONE


def upload(visitors: Visitors, dice: random.Random) -> Range:
    """Put a file in chunks, and get it back."""
    name = f"up/{threading.get_ident()}"
    body = dice.randbytes(dice.choice((0, 10, 5000, 300_000)))
    with visitors.connect() as client:
        fields = ("Transfer-Encoding: chunked", "Connection: close")
        client.sendall(head_of("PUT", visitors.url(name), *fields))
        for start in range(0, len(body), 10_000):
            piece = body[start : start + 10_000]
            client.sendall(b"%x\r\n%b\r\n" % (len(piece), piece))
        client.sendall(b"0\r\n\r\n")
        expect(answer(client)[0], 201, 204)
    visitors.files[name] = body
    with visitors.connect() as client:
        fetch(visitors, client, name, "Connection: close")
    return 2, 2


def tunnel(visitors: Visitors, dice: random.Random) -> Range:
    with visitors.connect() as client:
        open_tunnel(visitors, client)
        time.sleep(dice.choice((0, 0, 2)))
        through(visitors, client, dice.choice(("1k", "big")), half=dice.random() < 0.5)
    return ONE


def socks(visitors: Visitors, dice: random.Random) -> Range:
    with visitors.connect() as client:
        client.sendall(b"\5\1\0")
        if read_exactly(client, 2) != b"\5\0":
            raise Wrong("SOCKS wants a password")
        where = socket.inet_aton(HOST) + visitors.origin.to_bytes(2, "big")
        client.sendall(b"\5\1\0\1" + where)
        expect(read_exactly(client, 10)[1], 0)
        through(visitors, client, dice.choice(("1k", "big")), half=dice.random() < 0.5)
    return ONE


def by_name(visitors: Visitors, dice: random.Random) -> Range:
    with visitors.connect() as client:
        where = visitors.url("1k").replace(HOST, "localhost")
        client.sendall(head_of("GET", where, "Connection: close"))
        expect(answer(client)[0], 200)
    return ONE


def leave_early(visitors: Visitors, dice: random.Random) -> Range:
    """Connect and say nothing, or half of a head, or half of a body."""
    client = visitors.connect()
    count = dice.choice((NONE, PERHAPS, PERHAPS))
    if count is PERHAPS:
        fields = ("Content-Length: 100000",)
        ask = head_of("PUT", visitors.url("up/x"), *fields) + bytes(50_000)
        client.sendall(ask[: dice.choice((1, 30, len(ask)))])
        time.sleep(dice.choice((0, 0.1)))
    dice.choice((reset, socket.socket.close))(client)
    return count


def leave_amid(visitors: Visitors, dice: random.Random) -> Range:
    """Leave amid an answer, or a tunnel."""
    client = visitors.connect()
    if dice.random() < 0.5:
        client.sendall(head_of("GET", visitors.url("big")))
        client.recv(dice.choice((1, 100_000)))
    else:
        open_tunnel(visitors, client)
        client.sendall(head_of("GET", "/big")[: dice.choice((10, 1000))])
    dice.choice((reset, socket.socket.close))(client)
    return ONE


def slow_asking(visitors: Visitors, dice: random.Random) -> Range:
    with visitors.connect() as client:
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        ask = head_of("GET", visitors.url("1k"), "Connection: close")
        for start in range(0, len(ask), 7):
            client.sendall(ask[start : start + 7])
            time.sleep(0.05)
        expect(answer(client)[0], 200)
    return ONE


def slow_reading(visitors: Visitors, dice: random.Random) -> Range:
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 16_000)
        client.settimeout(SILENCE_TIMEOUT)
        client.connect((HOST, visitors.port))
        client.sendall(head_of("GET", visitors.url("big"), "Connection: close"))
        received = 0
        while piece := client.recv(50_000):
            received += len(piece)
            time.sleep(0.01)
        if received < BIG:
            raise Wrong(f"{received} bytes for a slow reader")
    return ONE


def nonsense(visitors: Visitors, dice: random.Random) -> Range:
    with visitors.connect() as client:
        client.sendall(dice.choice(NONSENSE))
        status, _, _ = read_head(client)
        expect(status, 400, 431, 501, 505)
    return ONE


def denied(visitors: Visitors, dice: random.Random) -> Range:
    where, wanted = dice.choice((("169.254.1.1", 403), (f"{HOST}:1", 502)))
    with visitors.connect() as client:
        client.sendall(head_of("GET", f"http://{where}/", "Connection: close"))
        expect(answer(client)[0], wanted)
    return ONE


def outsider(visitors: Visitors, dice: random.Random) -> Range:
    with visitors.connect(OUTSIDER) as client:
        if client.recv(1):
            raise Wrong("a stranger was answered")
    return ONE


def ended(visitors: Visitors, dice: random.Random) -> Range:
    """Have one's own worker killed amid a tunnel, by the operator or by force."""
    with visitors.connect() as client:
        open_tunnel(visitors, client)
        number = dice.choice((signal.SIGTERM, signal.SIGTERM, signal.SIGKILL))
        os.kill(visitors.worker_of(client), number)
        with contextlib.suppress(ConnectionResetError):
            if client.recv(1):
                raise Wrong("a byte from a worker who was killed")
    return ONE


VISITS: list[Visit] = [
    *[small_get, kept_alive, upload, tunnel, leave_early, leave_amid] * 2,
    *[pipelined, big_get, by_name, slow_asking, slow_reading],
    *[nonsense, denied, outsider, ended],
]


def has_socks(port: int) -> bool:
    """Say whether the gateway speaks SOCKS, by trying."""
    with socket.create_connection((HOST, port), SILENCE_TIMEOUT) as client:
        client.sendall(b"\5\1\0")
        with contextlib.suppress(ConnectionError):
            return client.recv(2) == b"\5\0"
    return False


# --- The gateway at rest ----------------------------------------------------


@dataclass
class Rest:
    """What a gateway holds when nobody is served."""

    processes: int
    zombies: int
    descriptors: int  # of the master
    pipes: int
    shared_kib: int  # allocated of the scoreboard
    master_kib: int  # its anonymous memory
    workers: set[str]  # what a worker has open, in words; one word for all of them


def kinds(pid: int) -> Counter[str]:
    """Return what a process has open, by kind."""
    found: Counter[str] = Counter()
    for entry in os.listdir(f"/proc/{pid}/fd"):
        with contextlib.suppress(FileNotFoundError):
            link = os.readlink(f"/proc/{pid}/fd/{entry}")
            found[os.path.basename(link.partition(":[")[0])] += 1
    return found


def status(pid: int, name: str) -> str:
    text = Path(f"/proc/{pid}/status").read_text()
    match = re.search(rf"^{name}:\s*(\S+)", text, re.M)
    return match[1] if match else ""


def until(check: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + REST_TIMEOUT
    while not check():
        if time.monotonic() > deadline:
            raise BenchError(f"not within {REST_TIMEOUT:g} s: {what}")
        time.sleep(0.05)


@dataclass
class Gateway:
    """The running natwork, seen from outside of it."""

    master: int
    board: Any
    program: Any
    said: Path

    def workers(self) -> list[int]:
        return [m.pid for m in family(self.master) if m.pid != self.master]

    def is_quiet(self) -> bool:
        """Say whether each of its workers is idle."""
        resting = self.program.FREE, self.program.IDLE_STATE
        return all(state in resting for state in self.board.states())

    def reload(self) -> None:
        count = self.said.read_text().count("configuration reloaded")
        os.kill(self.master, signal.SIGHUP)
        until(
            lambda: self.said.read_text().count("configuration reloaded") > count,
            "a reload",
        )

    def worker_words(self) -> set[str]:
        """Return in words what the workers have open: one word if it is the same."""
        words = set()
        for pid in self.workers():
            with contextlib.suppress(FileNotFoundError):
                held = kinds(pid)
                words.add(", ".join(f"{held[kind]} {kind}" for kind in sorted(held)))
        return words

    def same_words(self) -> set[str]:
        """Return what the workers have open, once it is the same, if it ever is.

        A worker keeps its pipes for a moment; and a new one closes first what is the
        master's.
        """
        with contextlib.suppress(BenchError):
            until(lambda: len(self.worker_words()) == 1, "workers hold the same")
        return self.worker_words()

    def rest(self) -> Rest:
        """Wait until nothing goes on, and see what there is."""
        until(self.is_quiet, "no worker is busy")
        workers = self.same_words()
        self.reload()  # so that there are spare workers, and nobody else
        until(lambda: len(self.workers()) == SPARES, f"{SPARES} workers")
        held = kinds(self.master)
        # Twice the same memory: Python's mmap has a descriptor of its own.
        boards = {
            os.stat(f"/proc/{self.master}/fd/{fd}").st_blocks // 2
            for fd in os.listdir(f"/proc/{self.master}/fd")
            if "memfd:natwork" in os.readlink(f"/proc/{self.master}/fd/{fd}")
        }
        return Rest(
            len(self.workers()) + 1,
            sum(status(pid, "State") == "Z" for pid in self.workers()),
            sum(held.values()),
            held["pipe"],
            max(boards),
            int(status(self.master, "RssAnon")),
            workers | self.same_words(),
        )

    def total(self, name: str) -> int:
        """Return a number of the scoreboard, added up over all slots."""
        word = getattr(self.program.Slot, name)
        slots = (self.program.Slot(self.board, n) for n in range(MAX_WORKERS))
        return sum(slot.words[word] for slot in slots)


# --- The report -------------------------------------------------------------


@dataclass
class Report:
    """What was found, line by line, and whether all of it was as it should be."""

    good: bool = True

    def line(self, what: str, found: str, good: bool) -> None:
        self.good &= good
        print(f"{what:<34} {found:<40} {'ok' if good else 'WRONG'}")

    def flat(self, what: str, before: int, after: int, slack: int = 0) -> None:
        self.line(what, f"{before} -> {after}", after <= before + slack)

    def compare(self, before: Rest, after: Rest) -> None:
        for what in ("processes", "zombies", "descriptors", "pipes"):
            self.flat(what, getattr(before, what), getattr(after, what))
        # A slot that is used for the first time costs its page.
        self.flat(
            "shared memory, KiB", before.shared_kib, after.shared_kib, 4 * MAX_WORKERS
        )
        self.flat(
            "master's memory, KiB", before.master_kib, after.master_kib, MASTER_GROWTH
        )
        same = before.workers == after.workers and len(after.workers) == 1
        self.line("each worker holds", "; ".join(sorted(after.workers)), same)

    def log(self, path: Path, gateway: Gateway, visitors: Visitors) -> None:
        """Compare the log with the counters, and with what the clients asked."""
        lines = [
            dict(word.partition("=")[::2] for word in line.split(" "))
            for line in path.read_text().splitlines()
        ]
        odd = [line for line in lines if list(line) != list(lines[0])]
        self.line("lines that are no lines", str(len(odd)), not odd)
        pages = gateway.program.load_chapter("pages", "this")
        lost, ended = gateway.total("LOST"), pages.ended(gateway.board)
        sessions = sum(ended.values())
        self.line("lines lost", str(lost), lost == 0)
        least, most = visitors.least, visitors.most
        asked = f"{len(lines)}; asked for {least} to {most}"
        self.line("lines", asked, least <= len(lines) <= most)
        self.line(
            "sessions by the counters", str(sessions), sessions == len(lines) + lost
        )
        for word, name in (("UPS", "up"), ("DOWNS", "down")):
            counted, logged = gateway.total(word), sum(int(x[name]) for x in lines)
            found = f"{counted}; by the log {logged}"
            self.line(f"bytes {name} by the counters", found, counted == logged)
        ends = Counter(line["outcome"] for line in lines)
        print("outcomes:", ", ".join(f"{n} {w}" for w, n in ends.most_common()))


@contextlib.contextmanager
def clients(visitors: Visitors, count: int, rate: float) -> Iterator[None]:
    """Let clients come while the block runs."""
    visits = VISITS + [socks] * 2 * has_socks(visitors.port)
    visitors.most += 1  # that was perhaps a session
    threads = [
        threading.Thread(target=visitors.run, args=(visits, seed, count / rate))
        for seed in range(count)
    ]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        visitors.over.set()
        for thread in threads:
            thread.join(2 * SILENCE_TIMEOUT)


def load(gateway: Gateway, visitors: Visitors, seconds: float) -> None:
    """Have visitors for some time, with a reload now and then, until all have left."""
    visitors.go.set()
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0:
        time.sleep(min(left, RELOAD_EVERY))
        gateway.reload()
    visitors.go.clear()
    until(lambda: visitors.active == 0, "all clients have left")


def load_program(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location("natwork", path)
    if not spec or not spec.loader:
        raise BenchError(f"{path} is no Python program")
    module = importlib.util.module_from_spec(spec)
    sys.modules["natwork"] = module
    spec.loader.exec_module(module)
    return module


@contextlib.contextmanager
def started(
    place: Place, natwork: Path, options: list[str]
) -> Iterator[tuple[Gateway, Visitors, Path]]:
    """Run the origin and the gateway while the block runs."""
    port, log = free_ports(1)[0], place.folder / "logs" / "access.log"
    settings = [
        f"listen={HOST}:{port}",
        "inside=127.0.0.1",
        "rules=allow to 127.0.0.0/8,::1 port 1-65535",
        f"spare_workers={SPARES}",
        f"max_workers={MAX_WORKERS}",
        "clients_per_worker=100",
        f"log={log}",
        *options,
    ]
    command = [place.python, str(place.folder / "natwork.py")]
    command += [word for setting in settings for word in ("-o", setting)]
    program = load_program(natwork)
    with (
        running("nginx", origin(place, place.origin), place) as server,
        running("natwork", command, place) as process,
    ):
        await_listener("nginx", server, place.origin, place)
        await_listener("natwork", process, port, place)
        said = Path(place.log("natwork-output"))
        board: list[Any] = []

        def described() -> bool:
            found = program.boards()
            board[:] = [found[process.pid]] if process.pid in found else []
            return bool(board)

        until(described, "a scoreboard of the gateway")
        folder = place.folder / "files"
        files = {name: (folder / name).read_bytes() for name in ("1k", "big")}
        gateway = Gateway(process.pid, board[0], program, said)
        yield gateway, Visitors(port, place.origin, files, board[0], program), log
        os.kill(process.pid, signal.SIGTERM)
        if not left_by(process, time.monotonic() + REST_TIMEOUT):
            raise BenchError("natwork does not end")
        if process.wait():
            raise BenchError(f"natwork ended with {process.returncode}")


def run(arguments: argparse.Namespace) -> bool:
    """Soak the gateway, print the report, and return whether all was well."""
    if not installed("nginx"):
        raise BenchError("nginx is not installed; apt-get install nginx")
    report, began = Report(), time.monotonic()
    with contextlib.ExitStack() as held:
        folder = Path(held.enter_context(tempfile.TemporaryDirectory(prefix="soak-")))
        prepare(folder, arguments.natwork, 0)
        (folder / "files" / "up").mkdir()
        (folder / "files" / "up").chmod(0o777)
        (folder / "files" / "big").write_bytes(random.Random(1).randbytes(BIG))
        place = Place(folder, free_ports(1)[0], arguments.python, (), False)
        print(machine())
        gateway, visitors, log = held.enter_context(
            started(place, arguments.natwork, arguments.option)
        )
        with clients(visitors, arguments.clients, arguments.rate):
            load(gateway, visitors, min(120.0, arguments.seconds / 5))
            before = gateway.rest()
            left = arguments.seconds - (time.monotonic() - began)
            load(gateway, visitors, max(left, arguments.seconds / 5))
            after = gateway.rest()
        visits = sum(visitors.visits.values())
        seconds = time.monotonic() - began
        print(f"{visits} visits by {arguments.clients} clients in {seconds:.0f} s:")
        print(", ".join(f"{n} {what}" for what, n in visitors.visits.most_common()))
        report.compare(before, after)
        report.log(log, gateway, visitors)
        wrong = sum(visitors.wrong.values())
        report.line("visits that went wrong", str(wrong), not wrong)
        for why, count in visitors.wrong.most_common(10):
            print(f"  {count} x {why}")
        lines = Counter(re.sub("[0-9]+", "N", x) for x in gateway.said.open())
        report.line("tracebacks", "none", "Traceback" not in gateway.said.read_text())
        for text, count in lines.most_common(10):
            print(f"  {count} x {text.rstrip()}")
    return report.good


def main() -> int:
    here = Path(__file__).resolve().parent
    parser = argparse.ArgumentParser(prog="soak.py", description="Soak natwork.")
    add = parser.add_argument
    add("--seconds", type=float, default=60.0, help="how long (60)")
    add("--rate", type=float, default=40.0, help="visits a second (40)")
    add("--clients", type=int, default=12, help="at once (12)")
    add("--python", default=sys.executable, help="the interpreter that runs natwork")
    add("--natwork", type=Path, default=here.parent / "natwork.py", metavar="FILE")
    add("-o", "--option", action="append", default=[], metavar="NAME=VALUE")
    arguments = parser.parse_args()
    # Raised as an exception, so that everything started is stopped.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("soak: terminated"))
    try:
        good = run(arguments)
    except (BenchError, OSError, subprocess.SubprocessError) as error:
        print(f"soak: {error}", file=sys.stderr)
        return 1
    print("nothing is left over, nothing is missing" if good else "NOT WELL: see above")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
