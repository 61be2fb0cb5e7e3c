#!/usr/bin/env python3
"""Measure natwork beside its peers, or against an older one, in the same rounds.

    python3 bench/bench.py                  every row, 5 rounds: some 10 minutes
    python3 bench/bench.py --quick          less of everything: about 2 minutes
    python3 bench/bench.py --against OLD.py --beside --only connect-1g get-1k-new
    python3 bench/bench.py --syscalls       system calls a request, by strace

One nginx is the origin.  natwork, an older natwork where one is named, and every
installed peer (tinyproxy, Squid, HAProxy, Privoxy, Dante, microsocks) are started
in front of it, all on loopback with free ports and configurations in a temporary
directory.  A round gives every contender the work once, and each round begins
with another contender, so that a slow minute of the machine falls on all of
them.  "direct" is the same work with nothing in between.

Each row of work ends in a table: median, lowest and highest of the rounds, how
many times as fast natwork is, and the processor time the contender itself used.
The last tables set natwork against the floors that the project set itself.  See
bench/README.md for what each row means and what the figures do not mean.

Needs nginx and wrk, and strace for --syscalls; nothing beyond Python's standard
library.  Everything started is stopped at the end, also after Ctrl-C or TERM.

Exit codes: 0 measured, whatever the figures; 1 could not measure; 2 bad command
line.
"""

import argparse
import concurrent.futures
import contextlib
import functools
import math
import multiprocessing
import os
import platform
import pwd
import re
import resource
import selectors
import shutil
import signal
import socket
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from collections.abc import Iterator
from dataclasses import dataclass
from dataclasses import field
from dataclasses import replace
from pathlib import Path

# SPDX-License-Identifier: MIT

HOST = "127.0.0.1"
GIB = 1 << 30
BUFFER_SIZE = 1 << 18  # the bulk client's; more does not fit a level 2 cache

START_TIMEOUT = 15.0  # seconds until a contender must answer
STOP_TIMEOUT = 10.0  # seconds from SIGTERM to SIGKILL
TRANSFER_TIMEOUT = 120.0  # seconds a bulk transfer may take
TUNNELS_TIMEOUT = 240.0  # seconds to open all idle tunnels
SILENCE_TIMEOUT = 20.0  # seconds one socket operation may take

IDLE_TRANSFER_SIZE = 100_000_000
IDLE_TRANSFERS = 40  # through the first tunnel, and as many through the last
SPARE_SLOTS = 200  # max_workers of the idle row, above its tunnels

CLIENTS = 8  # kept-alive connections of wrk; natwork's default of spare workers

BURST = 200  # clients that come at once
BURSTS = 6  # in a turn, each to a gateway that has just been started
REST_TIME = 0.25  # seconds in which it comes to rest before


class BenchError(Exception):
    """A reason why something cannot be measured, in one line."""


# --- Contenders -------------------------------------------------------------
#
# A recipe writes the configuration of one program and returns the command that
# runs it in the foreground.  Every program but "bare" writes an access log to a
# file, as it would in service; none caches, filters or asks for a password.  All
# else is as the program ships, natwork included, unless --tuned gives the peers
# the larger buffers that their manuals offer.


@dataclass(frozen=True)
class Place:
    """Where a run happens: its directory, its origin, the program under test."""

    folder: Path
    origin: int  # port
    python: str
    options: tuple[str, ...]  # extra NAME=VALUE settings for natwork
    tuned: bool

    def write(self, name: str, text: str) -> str:
        path = self.folder / name
        path.write_text(text)
        return str(path)

    def log(self, name: str) -> str:
        return str(self.folder / "logs" / f"{name}.log")


@dataclass
class Contender:
    """One way from the client to the origin, and the process that offers it."""

    name: str
    speaks: str  # how a tunnel is asked for: direct, http, socks or forward
    port: int
    tunnel_port: int  # the same, but with HAProxy
    process: "subprocess.Popen[bytes] | None" = None  # "direct" has none


def nginx(place: Place, port: int) -> list[str]:
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
events {{ worker_connections 8192; }}
http {{
{scratch}
    access_log off;
    sendfile on;
    tcp_nopush on;
    open_file_cache max=16;
    keepalive_timeout 600;
    keepalive_requests 1000000000;
    server {{
        listen {HOST}:{port} backlog=4096;
        root {folder}/files;
        location = /status {{ stub_status; }}
    }}
}}
"""
    path = place.write("nginx.conf", config)
    return ["nginx", "-e", place.log("nginx"), "-c", path]


OURS = {"natwork": "natwork.py", "before": "before/natwork.py"}  # in the folder


def natwork(place: Place, port: int, name: str = "natwork") -> list[str]:
    options = (
        f"listen={HOST}:{port}",
        "rules=allow to 127.0.0.0/8 port 1-65535",
        f"log={place.log(f'{name}-{port}')}",
        *place.options,
    )
    command = [place.python, str(place.folder / OURS[name])]
    return command + [word for option in options for word in ("-o", option)]


def bare(place: Place, port: int) -> list[str]:
    return [place.python, str(Path(__file__).resolve().parent / "bare.py"), str(port)]


def tinyproxy(place: Place, port: int) -> list[str]:
    config = f"""\
Listen {HOST}
Port {port}
Timeout 600
MaxClients 1000
Allow 127.0.0.0/8
LogFile "{place.log("tinyproxy")}"
LogLevel Connect
"""
    return ["tinyproxy", "-d", "-c", place.write("tinyproxy.conf", config)]


def squid(place: Place, port: int) -> list[str]:
    tuning = "read_ahead_gap 1 MB\nbuffered_logs on" if place.tuned else ""
    config = f"""\
http_port {HOST}:{port}
acl here src 127.0.0.0/8
http_access allow here
http_access deny all
cache deny all
cache_mem 0
{tuning}
access_log stdio:{place.log("squid")} squid
cache_log {place.log("squid-cache")}
cache_store_log none
netdb_filename none
pinger_enable off
pid_filename none
coredump_dir {place.folder}
visible_hostname bench
max_filedescriptors 8192
client_persistent_connections on
server_persistent_connections on
shutdown_lifetime 0 seconds
"""
    return ["squid", "-N", "-f", place.write("squid.conf", config)]


def haproxy(place: Place, port: int, tunnel_port: int) -> list[str]:
    tuning = "tune.pipesize 1048576" if place.tuned else ""
    config = f"""\
global
    maxconn 1000
    {tuning}
    log stdout format raw local0
defaults
    log global
    option splice-auto
    timeout connect 10s
    timeout client 600s
    timeout server 600s
    timeout http-keep-alive 60s
frontend browse
    mode http
    option httplog
    bind {HOST}:{port}
    default_backend origin
backend origin
    mode http
    http-reuse always
    server origin {HOST}:{place.origin}
listen forward
    mode tcp
    option tcplog
    bind {HOST}:{tunnel_port}
    server origin {HOST}:{place.origin}
"""
    return ["haproxy", "-db", "-f", place.write("haproxy.conf", config)]


def privoxy(place: Place, port: int) -> list[str]:
    tuning = "connection-sharing 1\nreceive-buffer-size 262144" if place.tuned else ""
    config = f"""\
confdir {place.folder}
logdir {place.folder}/logs
logfile privoxy.log
debug 512
listen-address {HOST}:{port}
toggle 0
enable-remote-toggle 0
enable-edit-actions 0
buffer-limit 4096
{tuning}
keep-alive-timeout 60
tolerate-pipelining 1
socket-timeout 300
max-client-connections 1000
listen-backlog -1
"""
    return ["privoxy", "--no-daemon", place.write("privoxy.conf", config)]


def dante(place: Place, port: int) -> list[str]:
    unprivileged = "user.unprivileged: nobody\n" if os.geteuid() == 0 else ""
    config = f"""\
logoutput: {place.log("dante")}
internal: {HOST} port = {port}
external: {HOST}
clientmethod: none
socksmethod: none
{unprivileged}client pass {{ from: 127.0.0.0/8 to: 0.0.0.0/0 }}
socks pass {{ from: 127.0.0.0/8 to: 0.0.0.0/0 log: connect disconnect }}
"""
    path = place.write("dante.conf", config)
    return ["danted", "-f", path, "-p", str(place.folder / "dante.pid")]


def microsocks(place: Place, port: int) -> list[str]:
    return ["microsocks", "-i", HOST, "-p", str(port)]


@dataclass(frozen=True)
class Recipe:
    """How to run one contender, and how to ask for its version."""

    speaks: str
    command: Callable[..., list[str]]
    version: tuple[str, ...]  # empty where the program cannot say


# natwork and the older one, "before", stand among their peers here.  "bare" is
# nobody's peer: a mark for what Python and a process per client can do.
RECIPES = {
    "natwork": Recipe("http", natwork, ("--version",)),
    "before": Recipe("http", functools.partial(natwork, name="before"), ("--version",)),
    "bare": Recipe("http", bare, ()),
    "tinyproxy": Recipe("http", tinyproxy, ("-v",)),
    "squid": Recipe("http", squid, ("-v",)),
    "haproxy": Recipe("forward", haproxy, ("-v",)),
    "privoxy": Recipe("http", privoxy, ("--version",)),
    "dante": Recipe("socks", dante, ("-v",)),
    "microsocks": Recipe("socks", microsocks, ()),
}
BESIDE = ("direct", *[name for name in RECIPES if name not in OURS])
BINARIES = {"dante": "danted", "bare": "python3"}
PATH = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])


def installed(name: str) -> bool:
    return shutil.which(BINARIES.get(name, name), path=PATH) is not None


def free_ports(count: int) -> list[int]:
    """Return ports that nobody listens on at the moment."""
    with contextlib.ExitStack() as held:
        doors = [held.enter_context(socket.socket()) for _ in range(count)]
        for door in doors:
            door.bind((HOST, 0))
        return [door.getsockname()[1] for door in doors]


# --- Processes --------------------------------------------------------------
#
# Each program leads a session of its own, so that its whole family can be
# found, weighed and ended, however often it forks.


@contextlib.contextmanager
def running(
    name: str, command: list[str], place: Place, user: str | None = None
) -> Iterator["subprocess.Popen[bytes]"]:
    """Run a program until the block ends, its output in a file of the logs."""
    environment = {**os.environ, "PATH": PATH}
    group = pwd.getpwnam(user).pw_gid if user else None
    with open(place.log(f"{name}-output"), "wb") as output:
        process = subprocess.Popen(
            command,
            cwd=place.folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
            user=user,
            group=group,
            extra_groups=[] if user else None,
        )
    try:
        yield process
    finally:
        stop(process)


def stop(process: "subprocess.Popen[bytes]") -> None:
    """End a program and all its family: politely, then by force."""
    if process.returncode is None:
        # Not send_signal(), which collects a process that has already ended.
        os.kill(process.pid, signal.SIGTERM)
        left_by(process, time.monotonic() + STOP_TIMEOUT)
    # Before wait(): until then the number of the group cannot pass to another.
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def left_by(process: "subprocess.Popen[bytes]", deadline: float) -> bool:
    """Wait for the end of a process without collecting it."""
    choice = os.WEXITED | os.WNOHANG | os.WNOWAIT
    while os.waitid(os.P_PID, process.pid, choice) is None:
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def await_listener(
    name: str, process: "subprocess.Popen[bytes]", port: int, place: Place
) -> None:
    """Return when the port answers; raise BenchError with the program's last line."""
    deadline = time.monotonic() + START_TIMEOUT
    while not left_by(process, 0.0):
        with contextlib.suppress(OSError):
            socket.create_connection((HOST, port), timeout=1.0).close()
            return
        if time.monotonic() > deadline:
            break
        time.sleep(0.05)
    said = Path(place.log(f"{name}-output")).read_text(errors="replace").split("\n")
    last = next((line.strip() for line in reversed(said) if line.strip()), "no message")
    raise BenchError(f"{name} does not listen on {HOST}:{port}: {last}")


@contextlib.contextmanager
def started(
    place: Place, name: str, title: str, user: str | None = None
) -> Iterator[Contender]:
    """Run a contender until the block ends; yield it when it listens."""
    recipe = RECIPES[name]
    ports = free_ports(1 + (recipe.speaks == "forward"))
    with running(title, recipe.command(place, *ports), place, user) as process:
        await_listener(title, process, ports[0], place)
        yield Contender(name, recipe.speaks, ports[0], ports[-1], process)


@dataclass(frozen=True)
class Stat:
    """A process, by its /proc/PID/stat."""

    pid: int
    session: int
    ticks: int  # user and system, its own and of the children it has reaped


def family(leader: int) -> list[Stat]:
    """Return every process of a session."""
    members = []
    for entry in os.listdir("/proc"):
        if not entry.isdigit():
            continue
        try:
            text = Path(f"/proc/{entry}/stat").read_text(errors="replace")
        except OSError:
            continue  # it has just ended
        fields = text.rpartition(")")[2].split()
        member = Stat(int(entry), int(fields[3]), sum(map(int, fields[11:15])))
        if member.session == leader:
            members.append(member)
    return members


def cpu_seconds(contender: Contender) -> float:
    """Return the processor time that a contender's processes have used so far."""
    if contender.process is None:
        return 0.0
    ticks = sum(member.ticks for member in family(contender.process.pid))
    return ticks / os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Usage:
    """Processor seconds since some beginning: of the whole machine, and our own."""

    passed: float  # all processors together, idle or not
    busy: float
    ours: float  # the bench, its clients, the origin, the contenders

    @staticmethod
    def now(leaders: list[int]) -> "Usage":
        """Return the usage by now, ours being these sessions and this process."""
        tick = os.sysconf("SC_CLK_TCK")
        line = Path("/proc/stat").read_text().split("\n")[0]
        spent = [int(word) / tick for word in line.split()[1:9]]  # user to steal
        idle = spent[3] + spent[4]  # waiting for a disk is idle, too
        ticks = sum(m.ticks for leader in leaders for m in family(leader))
        # Interrupts count as busy: a process is charged for those it is hit by.
        return Usage(sum(spent), sum(spent) - idle, ticks / tick + sum(os.times()[:4]))

    def others_since(self, before: "Usage") -> float:
        """Return the share of the machine that went to programs not ours."""
        foreign = (self.busy - before.busy) - (self.ours - before.ours)
        return max(0.0, foreign / (self.passed - before.passed))


# --- Clients ----------------------------------------------------------------


def read_answer_head(stream: socket.socket) -> tuple[bytes, bytes]:
    """Read an HTTP answer's head; return it and what came after it."""
    received = b""
    while b"\r\n\r\n" not in received:
        more = stream.recv(65536)
        if not more:
            raise BenchError(f"closed after {len(received)} bytes of an answer's head")
        received += more
    check_status(received)
    head, _, rest = received.partition(b"\r\n\r\n")
    return head, rest


def check_status(answer: bytes) -> None:
    """Raise BenchError unless an HTTP answer says 200."""
    status_line = answer.split(b"\r\n")[0]
    if not re.match(rb"HTTP/1\.[01] 200\b", status_line):
        raise BenchError(f"answered {status_line.decode('latin-1')}")


def read_exactly(stream: socket.socket, size: int) -> bytes:
    received = b""
    while len(received) < size:
        more = stream.recv(size - len(received))
        if not more:
            raise BenchError(f"closed after {len(received)} of {size} bytes")
        received += more
    return received


def discard(stream: socket.socket, size: int) -> None:
    """Read exactly this many bytes into the same large buffer."""
    view = memoryview(bytearray(BUFFER_SIZE))
    deadline = time.monotonic() + TRANSFER_TIMEOUT
    left = size
    while left:
        count = stream.recv_into(view[: min(left, BUFFER_SIZE)])
        if not count:
            raise BenchError(f"closed {left} bytes before the end of {size}")
        left -= count
        if time.monotonic() > deadline:
            raise BenchError(f"{left} of {size} bytes missing after the deadline")


def open_tunnel(contender: Contender, port: int) -> socket.socket:
    """Return a stream to the origin's port, through a contender."""
    address = (HOST, contender.tunnel_port)
    stream = socket.create_connection(address, timeout=SILENCE_TIMEOUT)
    try:
        if contender.speaks == "http":
            ask_connect(stream, port)
        if contender.speaks == "socks":
            ask_socks(stream, port)
    except BaseException:
        stream.close()
        raise
    return stream


def connect_request(port: int) -> bytes:
    target = f"{HOST}:{port}"
    return f"CONNECT {target} HTTP/1.1\r\nHost: {target}\r\n\r\n".encode()


def ask_connect(stream: socket.socket, port: int) -> None:
    stream.sendall(connect_request(port))
    _, early = read_answer_head(stream)
    if early:
        raise BenchError(f"sent {len(early)} bytes right after the CONNECT answer")


def ask_socks(stream: socket.socket, port: int) -> None:
    """Ask a SOCKS version 5 server for a connection, as RFC 1928 says."""
    stream.sendall(b"\x05\x01\x00")
    if read_exactly(stream, 2) != b"\x05\x00":
        raise BenchError("SOCKS server wants a password")
    target = socket.inet_aton(HOST) + port.to_bytes(2, "big")
    stream.sendall(b"\x05\x01\x00\x01" + target)
    reply = read_exactly(stream, 10)
    if reply[:2] != b"\x05\x00":
        raise BenchError(f"SOCKS reply {reply[1]}")


def fetch(stream: socket.socket, target: str, port: int, size: int) -> None:
    """GET a file of known size and check that all of it arrives."""
    request = f"GET {target} HTTP/1.1\r\nHost: {HOST}:{port}\r\n\r\n"
    stream.sendall(request.encode())
    head, early = read_answer_head(stream)
    length = re.search(rb"(?im)^content-length:[ \t]*([0-9]+)", head)
    if length and int(length[1]) != size:
        raise BenchError(f"announced {int(length[1])} bytes instead of {size}")
    discard(stream, size - len(early))


def origin_requests(port: int) -> int:
    """Return how many requests the origin has received, this one included."""
    with socket.create_connection((HOST, port), timeout=SILENCE_TIMEOUT) as stream:
        request = f"GET /status HTTP/1.1\r\nHost: {HOST}\r\nConnection: close\r\n\r\n"
        stream.sendall(request.encode())
        page = b""
        while more := stream.recv(65536):
            page += more
    numbers = re.search(rb"requests\s+(\d+) (\d+) (\d+)", page)
    if numbers is None:
        raise BenchError("the origin's status page cannot be read")
    return int(numbers[3])


WRK_SCRIPT = """\
wrk.path = "http://{host}:{port}/{name}"
wrk.headers["Host"] = "{host}:{port}"
{connection}
function done(summary, latency, requests)
   local errors = summary.errors
   io.write(string.format("counted %d %d %d %d %d %d %d %d\\n",
      summary.requests, summary.duration, summary.bytes, errors.connect,
      errors.read, errors.write, errors.status, errors.timeout))
end
"""
WRK_ERRORS = ("connect error", "read error", "write error", "bad status", "time-out")


def run_wrk(
    place: Place, contender: Contender, name: str, fresh: bool, seconds: int
) -> tuple[int, float, int, Counter[str]]:
    """Return requests, seconds, bytes and faults of one run of wrk."""
    connection = 'wrk.headers["Connection"] = "close"' if fresh else ""
    script = WRK_SCRIPT.format(
        host=HOST, port=place.origin, name=name, connection=connection
    )
    path = place.write("wrk.lua", script)
    url = f"http://{HOST}:{contender.port}/"
    command = ["wrk", "-t1", f"-c{CLIENTS}", f"-d{seconds}s", "-s", path, url]
    patience = seconds + SILENCE_TIMEOUT
    answer = subprocess.run(command, capture_output=True, text=True, timeout=patience)
    counted = re.search(r"^counted ([\d ]+)$", answer.stdout, re.MULTILINE)
    if counted is None:
        reason = (answer.stderr or answer.stdout).strip().split("\n")[-1]
        raise BenchError(f"wrk failed: {reason}")
    requests, duration, size, *errors = map(int, counted[1].split())
    faults = +Counter(dict(zip(WRK_ERRORS, errors, strict=True)))
    return requests, duration / 1e6, size, faults


# --- An origin that holds ---------------------------------------------------


def hold_tunnels(listener: socket.socket, path: str) -> None:
    """Be the origin of tunnels: echo each "e", answer "s" with a transfer."""
    with selectors.DefaultSelector() as streams, open(path, "rb") as file:
        streams.register(listener, selectors.EVENT_READ)
        while True:
            for key, _ in streams.select():
                if key.fileobj is listener:
                    streams.register(listener.accept()[0], selectors.EVENT_READ)
                    continue
                stream = key.fileobj
                assert isinstance(stream, socket.socket)
                if not answer_byte(stream, file.fileno()):
                    streams.unregister(stream)
                    stream.close()


def answer_byte(stream: socket.socket, file: int) -> bool:
    """Do what one byte asks for; return False when the stream has ended."""
    try:
        byte = stream.recv(1)
        if byte == b"s":
            sent = 0
            while sent < IDLE_TRANSFER_SIZE:
                left = IDLE_TRANSFER_SIZE - sent
                sent += os.sendfile(stream.fileno(), file, sent, left)
        elif byte:
            stream.sendall(byte)
    except OSError:
        return False
    return bool(byte)


@contextlib.contextmanager
def holding_origin(place: Place) -> Iterator[int]:
    """Run hold_tunnels in a process of its own; yield its port."""
    with socket.create_server((HOST, 0), backlog=4096) as listener:
        context = multiprocessing.get_context("fork")
        arguments = (listener, str(place.folder / "files" / "bulk"))
        origin = context.Process(target=hold_tunnels, args=arguments, daemon=True)
        origin.start()
        try:
            yield listener.getsockname()[1]
        finally:
            origin.kill()
            origin.join()


# --- Rows of work -----------------------------------------------------------


@dataclass(frozen=True)
class Load:
    """How much of everything a run asks for."""

    rounds: int
    bulk_size: int
    wrk_seconds: int
    tunnels: int


@dataclass
class Sample:
    """One contender's turn in one round."""

    rate: float = 0.0  # MB or requests a second; 0 when it failed
    cost: float = 0.0  # CPU seconds a GiB, or CPU microseconds a request
    faults: Counter[str] = field(default_factory=Counter)


# Units a second, units the cost is shared by (inf: it is not known), faults.
Turn = tuple[float, float, Counter[str]]
Work = Callable[[Place, Contender, Load], Turn]


@dataclass(frozen=True)
class Row:
    """One kind of work, and what natwork should reach in it."""

    title: str
    unit: str
    work: Work
    takes: tuple[str, ...]  # the contenders that can do it
    rivals: tuple[str, ...]  # natwork is set against the fastest of these
    floor: float | None = None  # how many times as fast as that it should be
    against: float | None = None  # how many times as fast as an older natwork
    needs: str = "nginx"
    socks: bool = False  # all are asked by SOCKS

    @property
    def cost_unit(self) -> str:
        return "CPU s/GiB" if self.unit == "MB/s" else "CPU us each"

    def fit(self, contenders: list[Contender]) -> list[Contender]:
        """Return those that take part, as they are spoken to in this row."""
        able = [c for c in contenders if c.name in self.takes]
        if self.socks:
            return [
                c if c.name == "direct" else replace(c, speaks="socks") for c in able
            ]
        return able


def connect_bulk(place: Place, contender: Contender, load: Load) -> Turn:
    begun = time.perf_counter()
    with open_tunnel(contender, place.origin) as stream:
        fetch(stream, "/bulk", place.origin, load.bulk_size)
    return bulk_turn(load.bulk_size, time.perf_counter() - begun)


def get_bulk(place: Place, contender: Contender, load: Load) -> Turn:
    target = f"http://{HOST}:{place.origin}/bulk"
    address = (HOST, contender.port)
    begun = time.perf_counter()
    with socket.create_connection(address, timeout=SILENCE_TIMEOUT) as stream:
        fetch(stream, target, place.origin, load.bulk_size)
    return bulk_turn(load.bulk_size, time.perf_counter() - begun)


def bulk_turn(size: int, seconds: float) -> Turn:
    return size / 1e6 / seconds, size / GIB, Counter()


def check_reached(
    place: Place, before: int, requests: int, faults: Counter[str]
) -> None:
    """Add requests that the origin has not seen to the faults."""
    # The second look at the status page is a request, too.
    reached = origin_requests(place.origin) - before - 1
    if reached < requests:
        faults["request that did not reach the origin"] += requests - reached
    if not requests:
        raise BenchError(f"no request was answered{say(faults)}")


def small_gets(name: str, size: int, fresh: bool) -> Work:
    """Return the work of fetching one small file over and over."""

    def work(place: Place, contender: Contender, load: Load) -> Turn:
        before = origin_requests(place.origin)
        requests, seconds, received, faults = run_wrk(
            place, contender, name, fresh, load.wrk_seconds
        )
        if received < requests * size:
            faults["byte missing"] += requests * size - received
        check_reached(place, before, requests, faults)
        return requests / seconds, requests / 1e6, faults

    return work


def fetch_anew(
    speaks: str, door: int, port: int, seconds: float
) -> tuple[int, float, Counter[str]]:
    """Fetch 1 KiB over and over, by a connection each; return how often and how long.

    The socket is as cheap as Python has it: a time limit of the kernel's own
    spares a poll() before each call.
    """
    request = f"GET /1k HTTP/1.1\r\nHost: {HOST}:{port}\r\nConnection: close\r\n\r\n"
    patience = struct.pack("ll", int(SILENCE_TIMEOUT), 0)
    count, faults = 0, Counter[str]()
    begun = time.perf_counter()
    while (passed := time.perf_counter() - begun) < seconds:
        try:
            with socket.socket() as stream:
                stream.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, patience)
                stream.connect((HOST, door))
                if speaks == "socks":
                    ask_socks(stream, port)
                stream.sendall(request.encode())
                size = 0
                while more := stream.recv(65536):
                    size += len(more)
            if size < 1 << 10:
                raise BenchError("answer cut short")
            count += 1
        except (BenchError, OSError) as error:
            faults[str(error)] += 1
    return count, passed, faults


def socks_new(place: Place, contender: Contender, load: Load) -> Turn:
    before = origin_requests(place.origin)
    task = (contender.speaks, contender.port, place.origin, load.wrk_seconds)
    context = multiprocessing.get_context("fork")
    with concurrent.futures.ProcessPoolExecutor(CLIENTS, context) as clients:
        done = list(clients.map(fetch_anew, *zip(*[task] * CLIENTS)))
    requests = sum(count for count, _, _ in done)
    faults = sum((fault for _, _, fault in done), Counter[str]())
    check_reached(place, before, requests, faults)
    return requests / max(passed for _, passed, _ in done), requests / 1e6, faults


def burst(door: int, request: bytes) -> tuple[float, Counter[str]]:
    """Let BURST clients ask at once; return the seconds to the last answer, faults."""
    faults = Counter[str]()
    with contextlib.ExitStack() as held:
        waiting = held.enter_context(selectors.DefaultSelector())
        streams = [held.enter_context(socket.socket()) for _ in range(BURST)]
        for stream in streams:
            stream.setblocking(False)
        begun = time.perf_counter()
        for stream in streams:
            stream.connect_ex((HOST, door))
            waiting.register(stream, selectors.EVENT_WRITE, bytearray())
        while waiting.get_map():
            left = begun + SILENCE_TIMEOUT - time.perf_counter()
            ready = waiting.select(left) if left > 0 else []
            if not ready:
                faults["client without an answer in time"] += len(waiting.get_map())
                break
            for key, _ in ready:
                try:
                    if ask_or_listen(key, waiting, request):
                        waiting.unregister(key.fileobj)
                except (BenchError, OSError) as error:
                    faults[str(error)] += 1
                    waiting.unregister(key.fileobj)
        return time.perf_counter() - begun, faults


def ask_or_listen(
    key: selectors.SelectorKey, waiting: selectors.BaseSelector, request: bytes
) -> bool:
    """Take one client of a burst a step further; return whether it has its answer."""
    stream, answer = key.fileobj, key.data
    assert isinstance(stream, socket.socket)
    if key.events == selectors.EVENT_WRITE:
        stream.sendall(request)
        waiting.modify(stream, selectors.EVENT_READ, answer)
        return False
    if not (more := stream.recv(65536)):
        raise BenchError(f"closed after {len(answer)} bytes of an answer's head")
    answer += more
    if b"\r\n\r\n" not in answer:
        return False
    check_status(bytes(answer))
    return True


def burst_connect(place: Place, contender: Contender, load: Load) -> Turn:
    """Send some bursts; those in which a client is not answered are not timed.

    Each has a gateway of its own: natwork keeps the workers that a burst called for
    half a minute, and the next one would find them.  The start is not to be told
    from the burst in the processor time, which is therefore left out.
    """
    seconds, faults = [], Counter[str]()
    with holding_origin(place) as port:
        for _ in range(BURSTS):
            with started(place, contender.name, f"{contender.name}-burst") as gateway:
                time.sleep(REST_TIME)
                took, wrong = burst(gateway.port, connect_request(port))
            faults += wrong
            if not wrong:
                seconds.append(took)
    if not seconds:
        raise BenchError(f"no burst was answered whole{say(faults)}")
    return BURST / statistics.median(seconds), math.inf, faults


HTTP_RIVALS = ("tinyproxy", "squid", "privoxy")
SOCKS_RIVALS = ("dante", "microsocks")
HTTP = ("direct", *OURS, "bare", "haproxy", *HTTP_RIVALS)
SOCKS = ("direct", *OURS, "bare", *SOCKS_RIVALS)

ROWS = {
    "connect-1g": Row(
        title="1 GiB through CONNECT, one stream",
        unit="MB/s",
        work=connect_bulk,
        takes=("direct", *RECIPES),
        rivals=(*HTTP_RIVALS, *SOCKS_RIVALS, "haproxy"),
        floor=1.2,
        against=0.95,
    ),
    "get-1g": Row(
        title="1 GiB by plain GET",
        unit="MB/s",
        work=get_bulk,
        takes=HTTP,
        rivals=HTTP_RIVALS,
        against=0.95,
    ),
    "get-1k-keep": Row(
        title="1 KiB GETs, 8 kept-alive clients",
        unit="requests/s",
        work=small_gets("1k", 1 << 10, fresh=False),
        takes=HTTP,
        rivals=("squid",),
        floor=1.1,
        against=0.9,
        needs="wrk",
    ),
    "get-100k-keep": Row(
        title="100 KiB GETs, 8 kept-alive clients",
        unit="requests/s",
        work=small_gets("100k", 100 << 10, fresh=False),
        takes=HTTP,
        rivals=("squid",),
        against=0.9,
        needs="wrk",
    ),
    "get-1k-new": Row(
        title="1 KiB GETs, a new connection each, 8 clients",
        unit="requests/s",
        work=small_gets("1k", 1 << 10, fresh=True),
        takes=HTTP,
        rivals=("squid",),
        floor=1.0,
        against=0.8,
        needs="wrk",
    ),
    "burst-200": Row(
        title="200 clients at once by CONNECT, until the last has its answer",
        unit="clients/s",
        work=burst_connect,
        takes=(*OURS, *HTTP_RIVALS),
        rivals=HTTP_RIVALS,
        against=1.0,
    ),
    "socks-1g": Row(
        title="1 GiB through SOCKS 5, one stream",
        unit="MB/s",
        work=connect_bulk,
        takes=SOCKS,
        rivals=SOCKS_RIVALS,
        socks=True,
    ),
    "socks-new": Row(
        title="1 KiB through SOCKS 5, a new connection each, 8 clients",
        unit="connections/s",
        work=socks_new,
        takes=SOCKS,
        rivals=SOCKS_RIVALS,
        against=0.8,
        socks=True,
    ),
}
IDLE_ROW = "idle-4000"
IDLE_MOST = {"refused": 0, "dropped": 0, "Pss a tunnel, KiB": 1400}

Results = dict[str, list[Sample]]  # contender -> its samples


def measure(row: Row, place: Place, contenders: list[Contender], load: Load) -> Results:
    """Let every contender work once a round, each round beginning with another."""
    results: Results = {contender.name: [] for contender in contenders}
    for turn in range(load.rounds):
        first = turn % len(contenders)
        for contender in contenders[first:] + contenders[:first]:
            note(f"{row.title}: round {turn + 1} of {load.rounds}, {contender.name}")
            results[contender.name].append(take_turn(row, place, contender, load))
    return results


def take_turn(row: Row, place: Place, contender: Contender, load: Load) -> Sample:
    before = cpu_seconds(contender)
    try:
        rate, amount, faults = row.work(place, contender, load)
    except (BenchError, OSError, subprocess.SubprocessError) as error:
        return Sample(faults=Counter([f"failed: {error}"]))
    return Sample(rate, (cpu_seconds(contender) - before) / amount, faults)


# --- Idle tunnels -----------------------------------------------------------


def transfer_rates(*streams: socket.socket) -> list[float]:
    """Return the speeds of open streams, in MB/s, of many transfers in turn.

    Three processes share two cores: a transfer goes fast or slow by where the
    scheduler puts them, and they stay there for a while.
    """
    seconds = dict.fromkeys(streams, 0.0)
    for _ in range(IDLE_TRANSFERS):
        for stream in streams:
            begun = time.perf_counter()
            stream.sendall(b"s")
            discard(stream, IDLE_TRANSFER_SIZE)
            seconds[stream] += time.perf_counter() - begun
    return [IDLE_TRANSFERS * IDLE_TRANSFER_SIZE / 1e6 / s for s in seconds.values()]


def open_tunnels(
    gateway: Contender, port: int, count: int, held: contextlib.ExitStack
) -> tuple[list[socket.socket], list[str]]:
    """Open idle tunnels one after another; return them and what went wrong."""
    streams: list[socket.socket] = []
    refusals: list[str] = []
    deadline = time.monotonic() + TUNNELS_TIMEOUT
    while len(streams) + len(refusals) < count:
        if len(streams) % 200 == 0:
            note(f"idle tunnels: {len(streams)} of {count}")
        try:
            streams.append(held.enter_context(open_tunnel(gateway, port)))
        except (BenchError, OSError) as error:
            refusals.append(str(error))
        if time.monotonic() > deadline:
            missing = count - len(streams) - len(refusals)
            refusals += ["not opened in time"] * missing
    return streams, refusals


def count_dropped(streams: list[socket.socket]) -> int:
    """Send a byte through every tunnel and count those that do not return it."""
    dropped = 0
    for stream in streams:
        with contextlib.suppress(OSError):
            stream.sendall(b"e")
    for stream in streams:
        try:
            dropped += stream.recv(1) != b"e"
        except OSError:
            dropped += 1
    return dropped


def memory_kib(pid: int) -> Counter[str]:
    """Return what smaps_rollup says of a process, in KiB; nothing if it has ended."""
    try:
        text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    except OSError:
        return Counter()
    return Counter(
        {name: int(size) for name, size in re.findall(r"(?m)^(\w+):\s+(\d+) kB$", text)}
    )


def available_kib() -> int:
    text = Path("/proc/meminfo").read_text()
    return int(text.partition("MemAvailable:")[2].split()[0])


def raise_limit(kind: int) -> None:
    """Allow ourselves and our children as much as the hard limit does."""
    _, hard = resource.getrlimit(kind)
    resource.setrlimit(kind, (hard, hard))


def interpreter_for(user: str | None, wanted: str) -> tuple[str, str]:
    """Return a Python the user may run, the wanted one if possible; its version."""
    question = ["-c", "import platform; print(platform.python_version())"]
    for python in (wanted, "/usr/local/bin/python3", "/usr/bin/python3"):
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            answer = subprocess.run(
                [python, *question],
                check=True,
                capture_output=True,
                text=True,
                user=user,
                cwd="/",
                timeout=START_TIMEOUT,
            )
            return python, answer.stdout.strip()
    raise BenchError(f"{user or 'this user'} cannot run {wanted}; choose with --python")


def idle_figures(
    place: Place, name: str, count: int, user: str | None
) -> tuple[dict[str, float], Counter[str]]:
    """Hold many tunnels open through one natwork; return its figures, and refusals."""
    with contextlib.ExitStack() as held:
        origin = held.enter_context(holding_origin(place))
        gateway = held.enter_context(started(place, name, f"{name}-idle", user))
        assert gateway.process is not None
        empty = available_kib()
        # Closed before the gateway is stopped: nothing is left to drain.
        streams_held = held.enter_context(contextlib.ExitStack())
        begun = time.perf_counter()
        streams, refusals = open_tunnels(gateway, origin, count, streams_held)
        took = time.perf_counter() - begun
        if not streams:
            raise BenchError(f"{name} opens no tunnel{say(Counter(refusals))}")
        note("idle tunnels: weighing the processes")
        lost = empty - available_kib()
        members = family(gateway.process.pid)
        memory = sum((memory_kib(member.pid) for member in members), Counter[str]())
        first, last = transfer_rates(streams[0], streams[-1])
        dropped = count_dropped(streams)
        note("")
    figures = {
        "refused": len(refusals),
        "dropped": dropped,
        "opened in, s": round(took, 1),
        "gateway processes": len(members),
        "Pss a tunnel, KiB": round(memory["Pss"] / count),
        "Private_Dirty a tunnel, KiB": round(memory["Private_Dirty"] / count),
        "MemAvailable lost a tunnel, KiB": round(lost / count),
        "100 MB through the first, MB/s": round(first),
        "100 MB through the last, MB/s": round(last),
        "last / first": round(last / first, 2),
    }
    return figures, Counter(refusals)


def measure_idle(place: Place, names: list[str], load: Load) -> str:
    """Hold idle tunnels as an ordinary user, one natwork at a time; return a table."""
    raise_limit(resource.RLIMIT_NOFILE)
    raise_limit(resource.RLIMIT_NPROC)
    user = "nobody" if os.geteuid() == 0 else None
    python, number = interpreter_for(user, place.python)
    options = (*place.options, f"max_workers={load.tunnels + SPARE_SLOTS}")
    place = replace(place, python=python, options=options)
    measured = [idle_figures(place, name, load.tunnels, user) for name in names]
    lines = [
        f"{IDLE_ROW}: {load.tunnels} idle CONNECT tunnels, as an ordinary user, "
        f"under Python {number}",
        "",
        f"| figure | {' | '.join(names)} | floor |",
        "|---|" + "---:|" * len(names) + "---|",
    ]
    for what, value in measured[0][0].items():
        cells = " | ".join(str(figures[what]) for figures, _ in measured)
        floor = ""
        if what in IDLE_MOST:
            verdict = "met" if value <= IDLE_MOST[what] else "MISSED"
            floor = f"at most {IDLE_MOST[what]}: {verdict}"
        lines.append(f"| {what} | {cells} | {floor} |")
    lines += [f"! {name}{say(r)}" for name, (_, r) in zip(names, measured) if r]
    return "\n".join(lines)


# --- System calls -----------------------------------------------------------


@contextlib.contextmanager
def traced(process: int, place: Place) -> Iterator[None]:
    """Let strace count the calls of a session while the block runs."""
    pids = [member.pid for member in family(process)]
    output, messages = place.folder / "strace.txt", place.folder / "strace-messages"
    command = ["strace", "-f", "-c", "-o", str(output)]
    for pid in pids:
        command += ["-p", str(pid)]
    with open(messages, "wb") as stderr:
        tracer = subprocess.Popen(command, stderr=stderr, start_new_session=True)
    try:
        deadline = time.monotonic() + START_TIMEOUT
        # A process may end before strace comes to it; that, too, is a line.
        while len(re.findall(rb"attached\n|attach: ", messages.read_bytes())) < len(
            pids
        ):
            if left_by(tracer, 0.0) or time.monotonic() > deadline:
                said = messages.read_text(errors="replace").strip().split("\n")
                raise BenchError(f"strace does not attach: {said[-1]}")
            time.sleep(0.05)
        yield
        os.kill(tracer.pid, signal.SIGINT)
        left_by(tracer, time.monotonic() + STOP_TIMEOUT)
    finally:
        stop(tracer)


def counted_calls(place: Place) -> list[tuple[str, int, int]]:
    """Return name, calls and errors from the table that strace wrote."""
    calls = []
    for line in (place.folder / "strace.txt").read_text().split("\n"):
        words = line.split()
        if len(words) in (5, 6) and words[3].isdigit() and words[-1] != "total":
            errors = int(words[4]) if len(words) == 6 else 0
            calls.append((words[-1], int(words[3]), errors))
    return sorted(calls, key=lambda call: -call[1])


def count_syscalls(
    place: Place, gateway: Contender, title: str, fresh: bool, seconds: int
) -> str:
    """Return the table of system calls that one kind of request costs."""
    assert gateway.process is not None
    # Once before: what only a first client makes the gateway do is not counted.
    run_wrk(place, gateway, "1k", fresh, 1)
    with traced(gateway.process.pid, place):
        requests, _, _, faults = run_wrk(place, gateway, "1k", fresh, seconds)
    if not requests:
        raise BenchError(f"no request was answered under strace{say(faults)}")
    calls = counted_calls(place)
    lines = [
        f"system calls a request: {title}; {requests} requests" + say(faults),
        "",
        "| call | a request | of these failing |",
        "|---|---:|---:|",
    ]
    for name, count, errors in calls:
        if count / requests >= 0.005:
            failing = f"{errors / requests:.2f}" if errors else ""
            lines.append(f"| {name} | {count / requests:.2f} | {failing} |")
    total = sum(count for _, count, _ in calls) / requests
    lines.append(f"| all | {total:.2f} | |")
    return "\n".join(lines)


# --- Report -----------------------------------------------------------------


def note(text: str) -> None:
    """Show on a terminal what is being done; an empty text wipes it away."""
    if sys.stderr.isatty():
        print(f"\r\x1b[K{text[:78]}", end="", file=sys.stderr, flush=True)


def say(faults: Counter[str]) -> str:
    return "".join(f", {count} x {fault}" for fault, count in faults.items())


def median_rate(samples: list[Sample]) -> float:
    return statistics.median([s.rate for s in samples if s.rate] or [0.0])


def median_cost(row: Row, samples: list[Sample]) -> str:
    cost = statistics.median([s.cost for s in samples if s.rate] or [0.0])
    return f"{cost:.{2 if row.unit == 'MB/s' else 0}f}" if cost else "-"


def ratio(results: Results, name: str) -> float | None:
    """Return how many times as fast as a contender natwork is, if both ran."""
    ours = median_rate(results.get("natwork", []))
    theirs = median_rate(results.get(name, []))
    return ours / theirs if ours and theirs else None


def times(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f} x"


def table(name: str, row: Row, results: Results, load: Load) -> str:
    """Return the table of one row of work, the fastest contender first."""
    if row.unit == "MB/s" and load.bulk_size != GIB:
        what = f"{row.title} (only {load.bulk_size >> 20} MiB)"
    else:
        what = row.title
    lines = [
        f"{name}: {what}; {row.unit}, median of {load.rounds}",
        "",
        f"| contender | median | lowest | highest | natwork is | {row.cost_unit} |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    ranked = sorted(results, key=lambda name: -median_rate(results[name]))
    for contender in ranked:
        samples = results[contender]
        rates = [sample.rate for sample in samples if sample.rate] or [0.0]
        spread = f"{min(rates):.0f} | {max(rates):.0f}"
        lines.append(
            f"| {contender} | {median_rate(samples):.0f} | {spread} "
            f"| {times(ratio(results, contender))} | {median_cost(row, samples)} |"
        )
    for contender in ranked:
        faults = sum((sample.faults for sample in results[contender]), Counter[str]())
        if faults:
            lines.append(f"! {contender}{say(faults)}")
    return "\n".join(lines)


def judge(value: float | None, floor: float | None) -> str:
    """Return a floor, and whether a ratio, as it is shown, reaches it."""
    if floor is None or value is None:
        return "-" if floor is None else f"{floor}"
    return f"{floor} {'met' if round(value, 2) >= floor else 'MISSED'}"


def summary(measured: dict[str, Results]) -> str:
    """Return the table that sets natwork against its peers and floors."""
    lines = [
        "| row | natwork | fastest rival | ratio | floor | beside | of direct |",
        "|---|---:|---|---:|---|---|---:|",
    ]
    for name, results in measured.items():
        row, able = ROWS[name], [n for n in BESIDE[1:] if ratio(results, n)]
        ranked = sorted(able, key=lambda n: -median_rate(results[n]))
        rival = next((n for n in ranked if n in row.rivals), "-")
        value = ratio(results, rival)
        beside = [f"{n} {times(ratio(results, n))}" for n in ranked if n != rival]
        lines.append(
            f"| {name} | {median_rate(results['natwork']):.0f} {row.unit} "
            f"| {rival} | {times(value)} | {judge(value, row.floor)} "
            f"| {', '.join(beside)} | {times(ratio(results, 'direct'))} |"
        )
    return "\n".join(lines)


def against(measured: dict[str, Results]) -> str:
    """Return the table that sets natwork against the older one."""
    lines = [
        "| against | natwork | before | ratio | lowest - highest round | floor |",
        "|---|---:|---:|---:|---:|---|",
    ]
    for name, results in measured.items():
        row, value = ROWS[name], ratio(results, "before")
        pairs = zip(results["natwork"], results["before"])
        rounds = [new.rate / old.rate for new, old in pairs if new.rate and old.rate]
        spread = f"{min(rounds):.2f} - {max(rounds):.2f}" if rounds else "-"
        lines.append(
            f"| {name} | {median_rate(results['natwork']):.0f} {row.unit} "
            f"| {median_rate(results['before']):.0f} | {times(value)} "
            f"| {spread} | {judge(value, row.against)} |"
        )
    return "\n".join(lines)


def costs(measured: dict[str, Results]) -> str:
    """Return the processor time each contender itself used, one column a row."""
    names = [name for name in RECIPES if any(name in r for r in measured.values())]
    units = " | ".join(f"{name}: {ROWS[name].cost_unit}" for name in measured)
    lines = [f"| cpu | {units} |", "|---|" + "---:|" * len(measured)]
    for name in names:
        cells = [median_cost(ROWS[row], r.get(name, [])) for row, r in measured.items()]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def machine() -> str:
    """Describe processor, memory, kernel, its TCP and Python in a line."""
    cpu = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    memory = int(Path("/proc/meminfo").read_text().split()[1]) / (1 << 20)
    kernel = ".".join(platform.release().split(".")[:2])
    tcp = Path("/proc/sys/net/ipv4/tcp_congestion_control").read_text().strip()
    return (
        f"{os.cpu_count()} x {cpu[1] if cpu else platform.machine()}, "
        f"{memory:.0f} GiB, Linux {kernel} with {tcp}, bench under Python "
        f"{platform.python_version()}"
    )


def version(name: str, place: Place) -> str:
    """Return the number a program gives as its version, or an empty text."""
    command = [shutil.which(BINARIES.get(name, name), path=PATH) or name]
    if name in OURS:
        command = [place.python, str(place.folder / OURS[name])]
    question = ["-v"] if name == "nginx" else RECIPES[name].version
    if not question:
        return ""
    answer = subprocess.run(
        [*command, *question],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=START_TIMEOUT,
    )
    found = re.search(rb"\d+(\.\d+)+", answer.stdout)
    return found[0].decode() if found else ""


# --- main -------------------------------------------------------------------


def prepare(folder: Path, program: Path, bulk_size: int) -> None:
    """Lay out the directory: the origin's files, the logs, a copy of natwork."""
    # The programs change to users of their own and must still reach in here.
    folder.chmod(0o755)
    for name in ("files", "logs", "scratch"):
        (folder / name).mkdir()
        (folder / name).chmod(0o777)
    (folder / "files" / "1k").write_bytes(b"k" * (1 << 10))
    (folder / "files" / "100k").write_bytes(b"h" * (100 << 10))
    with open(folder / "files" / "bulk", "wb") as bulk:
        bulk.truncate(bulk_size)
    with open(folder / "files" / "bulk", "rb") as bulk:
        while bulk.read(BUFFER_SIZE):
            pass  # so that the first round, too, finds it in memory
    copy_program(program, folder)


def copy_program(program: Path, folder: Path) -> None:
    """Copy a natwork.py, whatever its name, and the chapters natwork_*.py beside it."""
    folder.mkdir(exist_ok=True)
    folder.chmod(0o755)
    for chapter in program.parent.glob("natwork_*.py"):
        shutil.copy(chapter, folder)
    shutil.copy(program, folder / "natwork.py")


def start_contenders(
    place: Place, names: list[str], held: contextlib.ExitStack
) -> list[Contender]:
    """Start what is installed; say in a line what is missing or does not start."""
    contenders = []
    for name in names:
        if name == "direct":
            contenders.append(Contender(name, name, place.origin, place.origin))
            continue
        if name not in OURS and not installed(name):
            print(f"bench: {name} is not installed, its line is missing")
            continue
        try:
            contenders.append(held.enter_context(started(place, name, name)))
        except (BenchError, OSError) as error:
            if name in OURS:
                raise
            print(f"bench: {error}; its line is missing")
    return contenders


def show_rows(
    place: Place,
    contenders: list[Contender],
    names: list[str],
    load: Load,
    leaders: list[int],
) -> dict[str, Results]:
    """Measure the rows, print a table after each, and return what was measured."""
    measured: dict[str, Results] = {}
    for name in names:
        row = ROWS[name]
        fit = row.fit(contenders)
        before = Usage.now(leaders)
        measured[name] = measure(row, place, fit, load)
        others = Usage.now(leaders).others_since(before)
        note("")
        print(table(name, row, measured[name], load))
        print(f"other programs took {others:.0%} of the machine\n", flush=True)
    return measured


def show_syscalls(place: Place, contenders: list[Contender], seconds: int) -> None:
    for gateway in contenders:
        for title, fresh in (("kept-alive", False), ("a new connection each", True)):
            title = f"{gateway.name}, 1 KiB, {title}"
            text = count_syscalls(place, gateway, title, fresh, seconds)
            print(f"{text}\n", flush=True)


def run(arguments: argparse.Namespace) -> None:
    load = Load(arguments.rounds or 5, GIB, 2, 4000)
    if arguments.quick:
        load = Load(arguments.rounds or 1, GIB >> 3, 1, 400)
    rows = [] if arguments.syscalls else arguments.only or [*ROWS, IDLE_ROW]
    tools = ["nginx"] + ["strace", "wrk"] * arguments.syscalls
    tools += [ROWS[row].needs for row in rows if row in ROWS]
    for tool in tools:
        if not installed(tool):
            raise BenchError(f"{tool} is not installed; apt-get install {tool}")
    ours = list(OURS) if arguments.against else ["natwork"]
    beside = arguments.beside if any(row in ROWS for row in rows) else []
    load_before = os.getloadavg()[0]
    with contextlib.ExitStack() as held:
        folder = Path(held.enter_context(tempfile.TemporaryDirectory(prefix="bench-")))
        prepare(folder, arguments.natwork, load.bulk_size)
        if arguments.against:
            copy_program(arguments.against, folder / "before")
        [origin] = free_ports(1)
        place = Place(
            folder, origin, arguments.python, tuple(arguments.option), arguments.tuned
        )
        process = held.enter_context(running("nginx", nginx(place, origin), place))
        await_listener("nginx", process, origin, place)
        contenders = start_contenders(place, [*ours, *beside], held)
        versions = ["nginx"] + [c.name for c in contenders if c.name != "direct"]
        print(f"{machine()}; load before {load_before:.1f}")
        print(", ".join(f"{n} {version(n, place)}".strip() for n in versions), "\n")
        leaders = [process.pid] + [c.process.pid for c in contenders if c.process]
        worked = [row for row in rows if row in ROWS]
        measured = show_rows(place, contenders, worked, load, leaders)
        if arguments.syscalls:
            show_syscalls(place, contenders, load.wrk_seconds + 1)
        if IDLE_ROW in rows:
            print(f"{measure_idle(place, ours, load)}\n", flush=True)
        if measured:
            print(f"{costs(measured)}\n\n{summary(measured)}\n")
        if measured and arguments.against:
            print(against(measured))


def parse_arguments() -> argparse.Namespace:
    here = Path(__file__).resolve().parent
    parser = argparse.ArgumentParser(
        prog="bench.py",
        description="Measure natwork beside its peers.",
        epilog="rows: " + " ".join([*ROWS, IDLE_ROW]),
    )
    add = parser.add_argument
    add("--rounds", type=int, metavar="N", help="rounds a row (5)")
    add("--only", nargs="+", choices=[*ROWS, IDLE_ROW], metavar="ROW")
    add("--beside", nargs="*", choices=BESIDE, default=BESIDE, metavar="NAME")
    add("--quick", action="store_true", help="less of everything, one round")
    add("--syscalls", action="store_true", help="count system calls a request, only")
    add("--tuned", action="store_true", help="give the peers larger buffers")
    add("--python", default=sys.executable, help="the interpreter that runs natwork")
    add("--natwork", type=Path, default=here.parent / "natwork.py", metavar="FILE")
    add("--against", type=Path, metavar="FILE", help="an older natwork.py")
    add("-o", "--option", action="append", default=[], metavar="NAME=VALUE")
    return parser.parse_args()


def main() -> int:
    arguments = parse_arguments()
    for signum in (signal.SIGTERM, signal.SIGHUP):
        # Raised as an exception, so that everything started is stopped.
        signal.signal(signum, lambda number, _: sys.exit(f"bench: signal {number}"))
    try:
        run(arguments)
    except (BenchError, OSError, subprocess.SubprocessError) as error:
        note("")
        print(f"bench: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        note("")
        print("bench: interrupted", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
