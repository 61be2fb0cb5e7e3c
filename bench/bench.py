#!/usr/bin/env python3
"""Measure natwork beside its peers: the same work, in one run, as ratios.

    python3 bench/bench.py                  every row, 5 rounds: some 8 minutes
    python3 bench/bench.py --quick          less of everything: about a minute
    python3 bench/bench.py --only connect-1g get-1g --rounds 3
    python3 bench/bench.py --syscalls       system calls a request, by strace

One nginx is the origin.  natwork and every installed peer (tinyproxy, Squid,
HAProxy, Privoxy, Dante, microsocks) are started in front of it, all on loopback
with free ports and configurations in a temporary directory.  A round gives
every contender the work once, and each round begins with another contender, so
that a slow minute of the machine falls on all of them.  "direct" is the same
work with nothing in between.

Each row of work ends in a table: median, lowest and highest of the rounds, how
many times as fast natwork is, and the processor time the contender itself used.
The last table sets natwork against the floors that the project set itself.  See
bench/README.md for what each row means and what the figures do not mean.

Needs nginx and wrk, and strace for --syscalls; nothing beyond Python's standard
library.  Everything started is stopped at the end, also after Ctrl-C or TERM.

Exit codes: 0 measured, whatever the figures; 1 could not measure; 2 bad command
line.
"""

import argparse
import concurrent.futures
import contextlib
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


class BenchError(Exception):
    """What keeps a measurement from being made, in one line."""


# --- Contenders -------------------------------------------------------------
#
# A recipe writes the configuration of one program and returns the command that
# runs it in the foreground.  Every program writes an access log to a file, as
# it would in service; none caches, filters or asks for a password.  All else is
# as the program ships, natwork included, unless --tuned gives the peers the
# larger buffers that their manuals offer.


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
    tunnel_port: int = 0  # when it is not `port`
    process: "subprocess.Popen[bytes] | None" = None

    def browses(self) -> bool:
        return self.name == "direct" or self.speaks in ("http", "forward")


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


def natwork(place: Place, port: int, name: str = "natwork") -> list[str]:
    options = (
        f"listen={HOST}:{port}",
        "rules=allow to 127.0.0.0/8 port 1-65535",
        f"log={place.log(name)}",
        *place.options,
    )
    command = [place.python, str(place.folder / "natwork.py")]
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


# natwork stands among its peers here; it counts as installed when its file is.
# "bare" is nobody's peer: a mark for what Python and a process per client can do.
RECIPES = {
    "natwork": Recipe("http", natwork, ("--version",)),
    "bare": Recipe("http", bare, ()),
    "tinyproxy": Recipe("http", tinyproxy, ("-v",)),
    "squid": Recipe("http", squid, ("-v",)),
    "haproxy": Recipe("forward", haproxy, ("-v",)),
    "privoxy": Recipe("http", privoxy, ("--version",)),
    "dante": Recipe("socks", dante, ("-v",)),
    "microsocks": Recipe("socks", microsocks, ()),
}
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


@dataclass(frozen=True)
class Stat:
    """What /proc/PID/stat says of one process."""

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
    """Read an HTTP answer's head; return it and what came behind it."""
    received = b""
    while b"\r\n\r\n" not in received:
        more = stream.recv(65536)
        if not more:
            raise BenchError(f"closed after {len(received)} bytes of an answer's head")
        received += more
    head, _, rest = received.partition(b"\r\n\r\n")
    status_line = head.split(b"\r\n")[0]
    if not re.match(rb"HTTP/1\.[01] 200\b", status_line):
        raise BenchError(f"answered {status_line.decode('latin-1')}")
    return head, rest


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
    speaks = contender.speaks
    door = {"direct": port, "forward": contender.tunnel_port}
    address = (HOST, door.get(speaks, contender.port))
    stream = socket.create_connection(address, timeout=SILENCE_TIMEOUT)
    try:
        if speaks == "http":
            ask_connect(stream, port)
        if speaks == "socks":
            ask_socks(stream, port)
    except BaseException:
        stream.close()
        raise
    return stream


def ask_connect(stream: socket.socket, port: int) -> None:
    target = f"{HOST}:{port}"
    stream.sendall(f"CONNECT {target} HTTP/1.1\r\nHost: {target}\r\n\r\n".encode())
    _, early = read_answer_head(stream)
    if early:
        raise BenchError(f"sent {len(early)} bytes right behind the CONNECT answer")


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


Turn = tuple[float, float, Counter[str]]  # units a second, units of cost, faults
Work = Callable[[Place, Contender, Load], Turn]


@dataclass(frozen=True)
class Row:
    """One kind of work, and what natwork should reach in it."""

    title: str
    unit: str
    cost_unit: str
    work: Work
    everyone: bool  # the SOCKS servers too
    rivals: tuple[str, ...]  # natwork is set against the fastest of these
    floor: float
    aim: tuple[str, float] | None = None
    needs: str = "nginx"
    socks: bool = False  # natwork is asked by SOCKS, beside the SOCKS servers only

    def fit(self, contenders: list[Contender]) -> list[Contender]:
        """Return who takes part, as they are spoken to in this row."""
        if self.socks:
            names = ("natwork", "bare", *SOCKS_RIVALS)
            able = [replace(c, speaks="socks") for c in contenders if c.name in names]
            return [c for c in contenders if c.name == "direct"] + able
        return [c for c in contenders if self.everyone or c.browses()]


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


def small_gets(name: str, size: int, fresh: bool) -> Work:
    """Return the work of fetching one small file over and over."""

    def work(place: Place, contender: Contender, load: Load) -> Turn:
        before = origin_requests(place.origin)
        requests, seconds, received, faults = run_wrk(
            place, contender, name, fresh, load.wrk_seconds
        )
        # The second look at the status page is a request, too.
        reached = origin_requests(place.origin) - before - 1
        if reached < requests:
            faults["request that did not reach the origin"] += requests - reached
        if received < requests * size:
            faults["byte missing"] += requests * size - received
        if not requests:
            raise BenchError(f"no request was answered{say(faults)}")
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
    direct = contender.speaks == "direct"
    door = place.origin if direct else contender.port
    task = (contender.speaks, door, place.origin, load.wrk_seconds)
    context = multiprocessing.get_context("fork")
    with concurrent.futures.ProcessPoolExecutor(CLIENTS, context) as clients:
        done = list(clients.map(fetch_anew, *zip(*[task] * CLIENTS)))
    requests = sum(count for count, _, _ in done)
    faults = sum((fault for _, _, fault in done), Counter[str]())
    # The second look at the status page is a request, too.
    reached = origin_requests(place.origin) - before - 1
    if reached < requests:
        faults["request that did not reach the origin"] += requests - reached
    if not requests:
        raise BenchError(f"no request was answered{say(faults)}")
    return requests / max(passed for _, passed, _ in done), requests / 1e6, faults


HTTP_RIVALS = ("tinyproxy", "squid", "privoxy")
SOCKS_RIVALS = ("dante", "microsocks")

ROWS = {
    "connect-1g": Row(
        title="1 GiB through CONNECT, one stream",
        unit="MB/s",
        cost_unit="CPU s/GiB",
        work=connect_bulk,
        everyone=True,
        rivals=tuple(name for name in RECIPES if name not in ("natwork", "bare")),
        floor=1.3,
        aim=("direct", 0.6),
    ),
    "get-1g": Row(
        title="1 GiB by plain GET",
        unit="MB/s",
        cost_unit="CPU s/GiB",
        work=get_bulk,
        everyone=False,
        rivals=HTTP_RIVALS,
        floor=2.0,
    ),
    "get-1k-keep": Row(
        title="1 KiB GETs, 8 kept-alive clients",
        unit="requests/s",
        cost_unit="CPU us/request",
        work=small_gets("1k", 1 << 10, fresh=False),
        everyone=False,
        rivals=("squid",),
        floor=1.4,
        aim=("haproxy", 1.0),
        needs="wrk",
    ),
    "get-100k-keep": Row(
        title="100 KiB GETs, 8 kept-alive clients",
        unit="requests/s",
        cost_unit="CPU us/request",
        work=small_gets("100k", 100 << 10, fresh=False),
        everyone=False,
        rivals=("squid",),
        floor=1.2,
        needs="wrk",
    ),
    "get-1k-new": Row(
        title="1 KiB GETs, a new connection each, 8 clients",
        unit="requests/s",
        cost_unit="CPU us/request",
        work=small_gets("1k", 1 << 10, fresh=True),
        everyone=False,
        rivals=HTTP_RIVALS,
        floor=1.1,
        needs="wrk",
    ),
    "socks-1g": Row(
        title="1 GiB through SOCKS 5, one stream",
        unit="MB/s",
        cost_unit="CPU s/GiB",
        work=connect_bulk,
        everyone=False,
        rivals=SOCKS_RIVALS,
        floor=1.3,
        socks=True,
    ),
    "socks-new": Row(
        title="1 KiB through SOCKS 5, a new connection each, 8 clients",
        unit="connections/s",
        cost_unit="CPU us/connection",
        work=socks_new,
        everyone=False,
        rivals=SOCKS_RIVALS,
        floor=1.0,
        socks=True,
    ),
}
IDLE_ROW = "idle-4000"

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


def hold_tunnels(listener: socket.socket, path: str) -> None:
    """Be the origin of idle tunnels: echo each "e", answer "s" with a transfer."""
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


def direct_rate(port: int) -> float:
    with socket.create_connection((HOST, port), timeout=SILENCE_TIMEOUT) as stream:
        return transfer_rates(stream)[0]


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


def measure_idle(place: Place, load: Load) -> str:
    """Hold thousands of tunnels open as an ordinary user; return the report."""
    raise_limit(resource.RLIMIT_NOFILE)
    raise_limit(resource.RLIMIT_NPROC)
    user = "nobody" if os.geteuid() == 0 else None
    python, number = interpreter_for(user, place.python)
    [port] = free_ports(1)
    count = load.tunnels
    options = (*place.options, f"max_workers={count + SPARE_SLOTS}")
    place = replace(place, python=python, options=options)
    gateway = Contender("natwork", "http", port)
    with contextlib.ExitStack() as held:
        origin = held.enter_context(holding_origin(place))
        name = "natwork-idle"
        command = natwork(place, port, name)
        process = held.enter_context(running(name, command, place, user))
        await_listener(name, process, port, place)
        direct = [direct_rate(origin)]
        empty = available_kib()
        # Closed before the gateway is stopped: nothing is left to drain.
        streams_held = held.enter_context(contextlib.ExitStack())
        first = streams_held.enter_context(open_tunnel(gateway, origin))
        [alone] = transfer_rates(first)
        begun = time.perf_counter()
        streams, refusals = open_tunnels(gateway, origin, count - 1, streams_held)
        took = time.perf_counter() - begun
        streams.insert(0, first)
        note("idle tunnels: weighing the processes")
        full = available_kib()
        members = family(process.pid)
        memory = sum((memory_kib(member.pid) for member in members), Counter[str]())
        again, crowded = transfer_rates(first, streams[-1])
        direct.append(direct_rate(origin))
        dropped = count_dropped(streams)
        note("")
    lines = [
        f"{IDLE_ROW}: {count} idle CONNECT tunnels; natwork only, as an ordinary user, "
        f"under Python {number}",
        "",
        "| figure | value | floor |",
        "|---|---:|---|",
        f"| refused | {len(refusals)}{say(Counter(refusals))} | 0 |",
        f"| dropped | {dropped} | 0 |",
        f"| opened in | {took:.1f} s | |",
        f"| gateway processes | {len(members)} | |",
        f"| Pss a tunnel | {memory['Pss'] / count:.0f} KiB | at most 1100, aim 600 |",
        f"| Private_Dirty a tunnel | {memory['Private_Dirty'] / count:.0f} KiB | |",
        f"| MemAvailable lost a tunnel | {(empty - full) / count:.0f} KiB | |",
        f"| 100 MB through the first tunnel, alone | {alone:.0f} MB/s | |",
        f"| 100 MB through the first again, among all | {again:.0f} MB/s | |",
        f"| 100 MB through the last, in turn with it | {crowded:.0f} MB/s | |",
        f"| last / first | {crowded / again:.2f} | at least 0.80 |",
        f"| direct, before and after | {direct[0]:.0f}, {direct[1]:.0f} MB/s | |",
    ]
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


def median_cost(samples: list[Sample]) -> float:
    return statistics.median([s.cost for s in samples if s.rate] or [0.0])


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
        cost = f"{median_cost(samples):.{2 if row.unit == 'MB/s' else 0}f}"
        lines.append(
            f"| {contender} | {median_rate(samples):.0f} | {spread} "
            f"| {times(ratio(results, contender))} "
            f"| {cost if contender != 'direct' else ''} |"
        )
    for contender in ranked:
        faults = sum((sample.faults for sample in results[contender]), Counter[str]())
        if faults:
            lines.append(f"! {contender}{say(faults)}")
    return "\n".join(lines)


def summary(measured: dict[str, Results]) -> str:
    """Return the table that sets natwork against its floors."""
    lines = [
        "| row | natwork | fastest of its rivals | ratio | floor | aim | of direct |",
        "|---|---:|---|---:|---:|---|---:|",
    ]
    for name, results in measured.items():
        row = ROWS[name]
        rivals = [rival for rival in row.rivals if median_rate(results.get(rival, []))]
        rivals.sort(key=lambda rival: -median_rate(results[rival]))
        value = ratio(results, rivals[0]) if rivals else None
        verdict = ""
        if value is not None:
            verdict = " met" if value >= row.floor else " MISSED"
        aim = "-"
        if row.aim:
            aim = f"{times(ratio(results, row.aim[0]))} {row.aim[0]} ({row.aim[1]})"
        lines.append(
            f"| {name} | {median_rate(results.get('natwork', [])):.0f} {row.unit} "
            f"| {rivals[0] if rivals else '-'} | {times(value)} "
            f"| {row.floor}{verdict} | {aim} | {times(ratio(results, 'direct'))} |"
        )
    return "\n".join(lines)


def costs(measured: dict[str, Results]) -> str:
    """Return the processor time each contender itself used, one column a row."""
    names = [name for name in RECIPES if any(name in r for r in measured.values())]
    units = " | ".join(f"{name}: {ROWS[name].cost_unit}" for name in measured)
    lines = [f"| cpu | {units} |", "|---|" + "---:|" * len(measured)]
    for name in names:
        cells = []
        for row, results in measured.items():
            digits = 2 if ROWS[row].unit == "MB/s" else 0
            ran = median_rate(results.get(name, []))
            cells.append(f"{median_cost(results[name]):.{digits}f}" if ran else "-")
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
    if name == "natwork":
        command = [place.python, str(place.folder / "natwork.py")]
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
    """Lay out the directory: the origin's files, the logs, a copy of natwork.

    Its chapters go with it.
    """
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
    if program.exists():
        shutil.copy(program, folder / "natwork.py")
        for chapter in program.parent.glob("natwork_*.py"):
            shutil.copy(chapter, folder)


def start_contenders(
    place: Place,
    names: list[str],
    origin: "subprocess.Popen[bytes]",
    held: contextlib.ExitStack,
) -> list[Contender]:
    """Start what is installed; say in a line what is missing or does not start.

    The first contender is "direct", whose process is the origin itself.
    """
    contenders = [Contender("direct", "direct", place.origin, process=origin)]
    for name in names:
        recipe = RECIPES[name]
        port, tunnel_port = free_ports(2)
        contender = Contender(name, recipe.speaks, port, tunnel_port)
        if name == "natwork" and not (place.folder / "natwork.py").exists():
            print("bench: natwork.py is not there, its line is missing")
            continue
        if name != "natwork" and not installed(name):
            print(f"bench: {name} is not installed, its line is missing")
            continue
        ports = [port, tunnel_port] if recipe.speaks == "forward" else [port]
        try:
            process = held.enter_context(
                running(name, recipe.command(place, *ports), place)
            )
            await_listener(name, process, port, place)
        except (BenchError, OSError) as error:
            print(f"bench: {error}; its line is missing")
            continue
        contender.process = process
        contenders.append(contender)
    return contenders


def show_rows(
    place: Place, contenders: list[Contender], names: list[str], load: Load
) -> None:
    """Measure the rows and print a table after each, then the two over all."""
    measured: dict[str, Results] = {}
    leaders = [c.process.pid for c in contenders if c.process]
    for name in names:
        row = ROWS[name]
        fit = row.fit(contenders)
        before = Usage.now(leaders)
        measured[name] = measure(row, place, fit, load)
        others = Usage.now(leaders).others_since(before)
        note("")
        print(table(name, row, measured[name], load))
        print(f"other programs took {others:.0%} of the machine\n", flush=True)
    if measured:
        print(f"{costs(measured)}\n\n{summary(measured)}\n")


def show_syscalls(place: Place, contenders: list[Contender], seconds: int) -> None:
    gateways = [c for c in contenders if c.name == "natwork"]
    if not gateways:
        raise BenchError("cannot count system calls: natwork does not run")
    for title, fresh in (("kept-alive", False), ("a new connection each", True)):
        text = count_syscalls(place, gateways[0], f"1 KiB, {title}", fresh, seconds)
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
    names = ["natwork"] if arguments.syscalls else arguments.beside
    names = [name for name in names if any(row in ROWS for row in rows)] or names[:1]
    before = os.getloadavg()[0]
    with contextlib.ExitStack() as held:
        folder = Path(held.enter_context(tempfile.TemporaryDirectory(prefix="bench-")))
        prepare(folder, arguments.natwork, load.bulk_size)
        [origin] = free_ports(1)
        place = Place(
            folder, origin, arguments.python, tuple(arguments.option), arguments.tuned
        )
        process = held.enter_context(running("nginx", nginx(place, origin), place))
        await_listener("nginx", process, origin, place)
        contenders = start_contenders(place, names, process, held)
        versions = ["nginx"] + [c.name for c in contenders[1:]]
        print(f"{machine()}; load before {before:.1f}")
        print(", ".join(f"{n} {version(n, place)}".strip() for n in versions), "\n")
        show_rows(place, contenders, [row for row in rows if row in ROWS], load)
        if arguments.syscalls:
            show_syscalls(place, contenders, load.wrk_seconds + 1)
        if IDLE_ROW in rows and (folder / "natwork.py").exists():
            print(measure_idle(place, load))


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
    add("--beside", nargs="+", choices=list(RECIPES), default=list(RECIPES))
    add("--quick", action="store_true", help="less of everything, one round")
    add("--syscalls", action="store_true", help="count system calls a request, only")
    add("--tuned", action="store_true", help="give the peers larger buffers")
    add("--python", default=sys.executable, help="the interpreter that runs natwork")
    add("--natwork", type=Path, default=here.parent / "natwork.py", metavar="FILE")
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
