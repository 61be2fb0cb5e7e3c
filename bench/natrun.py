#!/usr/bin/env python3
"""What natrun.py costs: one table, beside SOCKS by hand and programs like it.

    .venv/bin/python bench/natrun.py [--quick]

As root, in the three namespaces of the tests: the client inside, natwork.py between,
nginx outside.  Ratios are of medians in one run.  proxychains4 and slirp4netns are
measured where they are installed.
"""
# SPDX-License-Identifier: MIT

from __future__ import annotations

import argparse
import json
import re
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import boxes  # noqa: E402
import kernel  # noqa: E402
import running  # noqa: E402
import wait  # noqa: E402
import web  # noqa: E402

GIGABYTE = 1 << 30
PYTHON = "/usr/bin/python3"
NATRUN = [PYTHON, "{tool}", "-g", "10.9.0.1:8080"]

# What runs inside: python3 -c CLIENT FUNCTION WORDS..., and prints a figure as JSON.
CLIENT = r"""
import asyncio, json, os, select, socket, struct, sys, threading, time
SERVER = ("203.0.113.80", 80)
def dial(how):
    sock = socket.socket()
    if how == "socks":
        sock.connect(("10.9.0.1", 8080))
        sock.sendall(b"\5\1\0")
        sock.recv(2)
        sock.sendall(b"\5\1\0\1" + socket.inet_aton(SERVER[0]) + b"\0\x50")
        assert sock.recv(10, socket.MSG_WAITALL)[1] == 0
    elif how == "blocks":
        sock.connect(SERVER)
    else:
        sock.setblocking(False)
        sock.connect_ex(SERVER)
        poll = select.poll()
        poll.register(sock, select.POLLOUT)
        poll.poll(10000)
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == 0
        sock.setblocking(True)
    return sock
def connects(how, count):
    times = []
    for _ in range(int(count)):
        began = time.perf_counter()
        sock = dial(how)
        times.append(time.perf_counter() - began)
        sock.close()
    return sorted(times)[len(times) // 2] * 1000
def bulk(how, size):
    sock, buffer, left = dial(how), bytearray(1 << 18), int(size)
    began = time.perf_counter()
    sock.sendall(b"GET /bulk HTTP/1.0\r\n\r\n")
    while left > 0 and (got := sock.recv_into(buffer)):
        left -= got
    assert left <= 0
    return time.perf_counter() - began
def hold(count):
    global SERVER
    SERVER = (SERVER[0], 9001)
    held = [dial("goes on") for _ in range(int(count))]
    for sock in held:
        sock.sendall(b"x")
        assert sock.recv(1000) == b"x"
    print(json.dumps(len(held)), flush=True)
    sys.stdin.read()
    return 0
def associate():
    control = socket.create_connection(("10.9.0.1", 8080))
    control.sendall(b"\5\1\0")
    control.recv(2)
    control.sendall(b"\5\3\0\1" + bytes(6))
    answer = control.recv(10, socket.MSG_WAITALL)
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    sock.connect((socket.inet_ntoa(answer[4:8]), int.from_bytes(answer[8:], "big")))
    return control, sock
def datagrams(how, port, count):
    where, head, control = (SERVER[0], int(port)), b"", None
    if how == "socks":
        control, sock = associate()
        head = b"\0\0\0\1" + socket.inet_aton(where[0]) + struct.pack("!H", where[1])
    else:
        sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        sock.connect(where)
    sock.settimeout(5)
    times = []
    for _ in range(int(count)):
        began = time.perf_counter()
        sock.send(head + b"x" * 100)
        sock.recv(2000)
        times.append(time.perf_counter() - began)
    return sorted(times)[len(times) // 2] * 1e6
def flood(port, count):
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    sock.connect((SERVER[0], int(port)))
    sock.settimeout(5)
    sock.send(b"begin")
    sock.recv(100)
    for n in range(int(count)):
        sock.send(b"y" * 100)
        if n % 64 == 63:
            time.sleep(0.0005)
    return 0
def many(count, host):
    async def run():
        slowest, going = 0.0, True
        async def tick():
            nonlocal slowest
            while going:
                began = time.perf_counter()
                await asyncio.sleep(0.005)
                slowest = max(slowest, time.perf_counter() - began - 0.005)
        ticking = asyncio.create_task(tick())
        async def one():
            try:
                _, writer = await asyncio.wait_for(asyncio.open_connection(host, 80), 2)
                writer.close()
            except (OSError, asyncio.TimeoutError):
                pass
        began = time.perf_counter()
        await asyncio.gather(*[one() for _ in range(int(count))])
        took, going = time.perf_counter() - began, False
        await ticking
        return [took, slowest * 1000]
    return asyncio.run(run())
print(json.dumps(globals()[sys.argv[1]](*sys.argv[2:])), flush=True)
"""

# Outside: count datagrams, and answer those that are not of the flood.
COUNTER = r"""
import socket, sys, time
sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
sock.setsockopt(socket.SOL_SOCKET, 33, 1 << 24)  # SO_RCVBUFFORCE
sock.bind(("203.0.113.80", int(sys.argv[1])))
count, began, last = 0, 0.0, 0.0
sock.settimeout(1)
while True:
    try:
        data, sender = sock.recvfrom(2000)
    except TimeoutError:
        if count:
            print(count, count / (last - began), flush=True)
            count = 0
        continue
    if data[:1] == b"y":
        last = time.perf_counter()
        began = began if count else last
        count += 1
    else:
        sock.sendto(data, sender)
"""


# Between: a SOCKS server for which every host is 100 ms away.
SLOW = r"""
import asyncio, socket
async def serve(reader, writer):
    await reader.readexactly(3)
    writer.write(b"\5\0")
    request = await reader.readexactly(10)
    await asyncio.sleep(0.1)
    writer.write(b"\5\0\0\1" + bytes(6))
    await reader.read()
    writer.close()
async def main():
    server = await asyncio.start_server(serve, "10.9.0.1", 1090)
    await server.serve_forever()
asyncio.run(main())
"""


# Outside: a server of many connections.
ECHO = r"""
import asyncio
async def serve(reader, writer):
    while data := await reader.read(1000):
        writer.write(data)
    writer.close()
async def main():
    await (await asyncio.start_server(serve, "203.0.113.80", 9001)).serve_forever()
asyncio.run(main())
"""


class Bench:
    """The box, and the rows that have been measured."""

    def __init__(self, box: boxes.Box, folder: Path, quick: bool) -> None:
        self.box, self.folder, self.quick = box, folder, quick
        self.tool = folder / "natrun.py"
        shutil.copy(ROOT / "natrun.py", self.tool)
        self.rounds = 1 if quick else 5
        self.rows: list[tuple[str, str, str, str]] = []

    def words(self, natrun: bool, *words: str) -> list[str]:
        before = [word.format(tool=self.tool) for word in NATRUN] if natrun else []
        return [*before, *words]

    def figure(
        self, natrun: bool, *words: str, gateway: list[str] | None = None
    ) -> list[float]:
        """Return what CLIENT prints in each of some rounds."""
        found = []
        for _ in range(self.rounds):
            command = self.words(natrun, PYTHON, "-c", CLIENT, *words)
            if gateway:
                command[2:4] = gateway
            done = self.box.run("inside", *command, timeout=120)
            assert done.returncode == 0, (words, done.stderr)
            found.append(json.loads(done.stdout))
        return found

    def median(self, natrun: bool, *words: str) -> float:
        return statistics.median(self.figure(natrun, *words))

    def seconds(self, place: str, *words: str) -> float:
        """Return the median of the time that a command takes."""
        found = []
        for _ in range(self.rounds):
            began = time.perf_counter()
            done = self.box.run(place, *words, timeout=180)
            found.append(time.perf_counter() - began)
            assert done.returncode == 0, (words, done.stderr)
        return statistics.median(found)

    def transfer(self, place: str, *words: str) -> float:
        """Return the median of the time that curl says it has taken."""
        found = []
        for _ in range(self.rounds):
            done = self.box.run(place, *words, timeout=180)
            assert done.returncode == 0, (words, done.stderr)
            found.append(float(done.stdout.split()[-1]))
        return statistics.median(found)

    def row(self, name: str, figure: str, floor: str, holds: bool | None) -> None:
        verdict = "" if holds is None else "ok" if holds else "FALLS SHORT"
        self.rows.append((name, figure, floor, verdict))
        print("%-46s %-26s %-24s %s" % self.rows[-1], flush=True)


def connecting(bench: Bench) -> None:
    """Measure a connect() beside one by hand."""
    count = "100" if bench.quick else "500"
    hand = bench.median(False, "connects", "socks", count)
    bench.row("connect, SOCKS by hand", f"{hand:.2f} ms", "", None)
    for how in ("blocks", "goes on"):
        took = bench.median(True, "connects", how, count)
        text = f"{took:.2f} ms, {took - hand:+.2f}"
        bench.row(f"connect, natrun, {how}", text, "at most +1.0 ms", took - hand <= 1)


def bulk(bench: Bench) -> None:
    """Measure a gigabyte beside curl --socks5 and others."""
    size = GIGABYTE // (8 if bench.quick else 1)
    url = "http://203.0.113.80/bulk"
    curl = ["curl", "-sS", "-o", "/dev/null", "-w", "%{time_total}"]
    base = bench.transfer("inside", *curl, "--socks5", "10.9.0.1:8080", url)
    bench.row("1 GiB, curl --socks5", f"{size / base / 1e6:.0f} MB/s", "", None)
    for how, floor in (("blocks", 0.95), ("goes on", 0.80)):
        took = bench.median(True, "bulk", how, str(size))
        name = f"1 GiB, natrun, {how}"
        bench.row(name, f"{base / took:.2f} x", f">= {floor}", base / took >= floor)
    took = bench.seconds("inside", *bench.words(True, *curl, url))
    bench.row(
        "1 GiB, natrun curl", f"{base / took:.2f} x", ">= 0.8", base / took >= 0.8
    )
    if shutil.which("proxychains4"):
        config = bench.folder / "chains.conf"
        config.write_text("strict_chain\n[ProxyList]\nsocks5 10.9.0.1 8080\n")
        words = ["proxychains4", "-q", "-f", str(config), *curl, url]
        chained = bench.transfer("inside", *words)
        bench.row("1 GiB, proxychains4 curl", f"{base / chained:.2f} x", "", None)
    if shutil.which("slirp4netns"):
        slirp = with_slirp(bench, *curl, url)
        name = "1 GiB, natrun curl beside slirp4netns"
        ratio = slirp / took
        bench.row(name, f"{ratio:.2f} x", ">= 1.5", ratio >= 1.5)


def with_slirp(bench: Bench, *words: str) -> float:
    """Return how long a command takes behind slirp4netns, on the gateway."""
    held = bench.box.start(
        "gateway", "unshare", "-n", "sleep", "1000", folder=bench.folder
    )
    own = kernel.read(held.pid, "net/dev")
    wait.until(lambda: kernel.read(held.pid, "net/dev") != own)
    slirp = ["slirp4netns", "-c", "--mtu=65520", str(held.pid), "tap0"]
    started = bench.box.start("gateway", *slirp, folder=bench.folder)
    wait.until(lambda: "tap0" in kernel.read(held.pid, "net/dev"))
    time.sleep(1)
    took = bench.transfer("gateway", "nsenter", "-n", "-t", str(held.pid), *words)
    bench.box.stop(started)
    bench.box.stop(held)
    return took


def udp(bench: Bench) -> None:
    """Measure datagrams: how long there and back, and how many a second."""
    output = bench.folder / "counted"
    with output.open("w") as file:
        counter = bench.box.start(
            "outside", PYTHON, "-c", COUNTER, "9000", folder=bench.folder, output=file
        )
    time.sleep(0.5)
    hand = bench.median(False, "datagrams", "socks", "9000", "1000")
    took = bench.median(True, "datagrams", "natrun", "9000", "1000")
    text = f"{hand:.0f} us, natrun {took - hand:+.0f}"
    bench.row("datagram there and back", text, "at most +200 us", took - hand <= 200)
    sent = 20_000 if bench.quick else 100_000
    for number in range(bench.rounds):
        words = [PYTHON, "-c", CLIENT, "flood", "9000", str(sent)]
        done = bench.box.run("inside", *bench.words(True, *words), timeout=120)
        assert done.returncode == 0, done.stderr
        wait.until(lambda n=number: output.read_text().count("\n") > n, 20)
    lines = [line.split() for line in output.read_text().splitlines()]
    rate = statistics.median(float(speed) for _, speed in lines)
    part = statistics.median(int(count) / sent for count, _ in lines)
    text = f"{rate:.0f}/s, {part:.0%} arrive"
    bench.row("datagrams, one way", text, ">= 20,000/s", rate >= 20_000)
    bench.box.stop(counter)


def untouched(bench: Bench) -> None:
    """Measure a system call that is none of natrun's business."""
    count = 200_000 if bench.quick else 2_000_000
    words = ["dd", "if=/dev/zero", "of=/dev/null", "bs=1", f"count={count}"]
    speeds = {}
    for natrun in (False, True):
        found = []
        for _ in range(bench.rounds):
            done = bench.box.run("inside", *bench.words(natrun, *words), timeout=120)
            seconds = re.search(r", ([0-9.]+) s, ", done.stderr)
            assert seconds, done.stderr
            found.append(float(seconds[1]) / count / 2 * 1e9)
        speeds[natrun] = min(found)
    cost = speeds[True] - speeds[False]
    text = f"{speeds[False]:.0f} ns, {cost:+.0f}"
    bench.row("a system call that is not ours", text, "at most +30 ns", cost <= 30)


def starting(bench: Bench) -> None:
    """Measure the start, and memory of what runs beside the command."""
    plain = bench.seconds("inside", "true")
    took = bench.seconds("inside", *bench.words(True, "true")) - plain
    bench.row("start", f"{took * 1000:.0f} ms", "at most 150 ms", took <= 0.15)
    echo = [PYTHON, "-c", ECHO]
    server = bench.box.start("outside", *echo, folder=bench.folder)
    listens = ["ss", "-Hltn", "sport = :9001"]
    wait.until(lambda: bench.box.run("outside", *listens).stdout)
    count = 100 if bench.quick else 500
    command = bench.words(True, PYTHON, "-c", CLIENT, "hold", str(count))
    output = bench.folder / "held"
    started = running.subprocess.Popen(
        bench.box.command("inside", *command),
        stdin=running.subprocess.PIPE,
        stdout=output.open("w"),
        text=True,
    )
    wait.until(lambda: output.read_text(), 60)
    memory = {pid: pss(pid) for pid in (started.pid, *kernel.children(started.pid))}
    relay = min(kernel.children(started.pid))
    text = f"{count} held, {memory[relay]:.0f} MB"
    bench.row(
        "relay, connections in progress", text, "under 100 MB", memory[relay] < 100
    )
    assert started.stdin
    started.stdin.close()
    started.wait(30)
    bench.box.stop(server)
    idle = bench.box.start(
        "inside", *bench.words(True, "sleep", "100"), folder=bench.folder
    )
    time.sleep(1)
    ours = [
        pid
        for pid in kernel.children(idle.pid)
        if "natrun" in kernel.title(pid) or "python" in kernel.title(pid)
    ]
    total = sum(pss(pid) for pid in (idle.pid, *ours))
    bench.row("memory, all of natrun", f"{total:.0f} MB", "at most 30 MB", total <= 30)
    bench.box.stop(idle)


def pss(pid: int) -> float:
    """Return the memory of a process in MB, shared pages by their part."""
    match = re.search(r"^Pss:\s+(\d+)", kernel.read(pid, "smaps_rollup"), re.M)
    return int(match[1]) / 1024 if match else 0.0


def looping(bench: Bench) -> None:
    """Measure 20 connections of asyncio to a host 100 ms away, and to a dead one."""
    words = [PYTHON, "-c", SLOW]
    slow = bench.box.start("gateway", *words, folder=bench.folder)
    listens = ["ss", "-Hltn", "sport = :1090"]
    wait.until(lambda: bench.box.run("gateway", *listens).stdout)
    gateway = ["-g", "socks5://10.9.0.1:1090"]
    found = bench.figure(True, "many", "20", "203.0.113.80", gateway=gateway)
    took = statistics.median(one[0] for one in found)  # type: ignore[index]
    stall = max(one[1] for one in found)  # type: ignore[index]
    text = f"{took:.2f} s, stall {stall:.0f} ms"
    floor, holds = "at most 0.4 s, 100 ms", took <= 0.4 and stall <= 100
    bench.row("asyncio, 20 connects, 100 ms away", text, floor, holds)
    bench.box.stop(slow)
    dead = bench.figure(True, "many", "1", "203.0.113.99")
    stall = max(one[1] for one in dead)  # type: ignore[index]
    text = f"stall {stall:.0f} ms"
    bench.row("asyncio, a dead host", text, "at most 50 ms", stall <= 50)


PARTS: list[Callable[[Bench], None]] = [
    connecting,
    bulk,
    udp,
    untouched,
    starting,
    looping,
]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one round of each")
    parser.add_argument("--only", nargs="*", default=[], help="these parts only")
    options = parser.parse_args()
    with boxes.dual_homed() as box, tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        web.certificates(folder)
        (folder / "web").mkdir()
        for file in ("server.pem", "server.key", "ca.pem"):
            shutil.copy(folder / file, folder / "web" / file)
        server = web.Nginx(box, folder / "web")
        server.write("page", b"a page")
        size = GIGABYTE // (8 if options.quick else 1)
        with (server.site / "bulk").open("wb") as file:
            file.truncate(size)
        own = folder / "gateway"
        own.mkdir()
        gateway = box.natwork(own, "outside=203.0.113.1", "log=/dev/null")
        bench = Bench(box, folder, options.quick)
        print("%-46s %-26s %-24s" % ("what", "figure", "floor"))
        for part in PARTS:
            if not options.only or part.__name__ in options.only:
                part(bench)
        gateway.stop()
    return int(any(row[3] == "FALLS SHORT" for row in bench.rows))


if __name__ == "__main__":
    sys.exit(main())
