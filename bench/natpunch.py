#!/usr/bin/env python3
"""The bench of natpunch.py: how fast it punches, carries and relays, and what it holds.

    python3 bench/natpunch.py [--quick]

As root.  It makes the labs of tests/natlab.py, and prints one table with the floors.
Everything is a ratio of one run: each round gives the work once to each contender.
"""

from __future__ import annotations

import argparse
import os
import re
import resource
import shlex
import socket
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tests"), str(ROOT)]

import natlab  # noqa: E402
import punching  # noqa: E402

SINK = "cat >/dev/null"
RELAYED = "natpunch.aims = lambda *_: (1, [])"


def punch_times(kinds: tuple[str, str], runs: int) -> list[float]:
    """Return the seconds that a pair says it took, run by run; 99 without a hole."""
    found = []
    with natlab.lab(*kinds) as lab, punching.server(lab):
        for _ in range(runs):
            peers = [punching.peer(lab, place, "room") for place in "ab"]
            times = []
            for process in peers:
                match = punching.LINE.match(punching.read_line(process))
                times.append(float(match[2]) if match and match[2] else 99.0)
            punching.talk(*peers)
            found.append(max(times))
    return sorted(found)


def timed(lab: natlab.Lab, far: str, near: str, ready: float) -> float:
    """Return the MB a second that go from a to b, by their shell commands."""
    sink = lab.start("b", "sh", "-c", far, **punching.ENVIRONMENT)
    time.sleep(ready)
    started = time.monotonic()
    source = lab.start("a", "sh", "-c", near, **punching.ENVIRONMENT)
    assert sink.wait(120) == 0, sink.communicate()
    seconds = time.monotonic() - started
    source.wait(20)
    return SIZE / seconds / 1e6


def shell(words: list[str]) -> str:
    return shlex.join(words) + " 2>/dev/null"


def contenders(lab: natlab.Lab) -> dict[str, tuple[str, str]]:
    """Return the commands of the far side and of the near one, by name."""
    zeros = f"head -c {SIZE} /dev/zero"
    ours = shell(punching.words("-s", lab.servers[0], "room"))
    relayed = shell(punching.words("-s", lab.servers[0], "room", changed=RELAYED))
    to, proxy = lab.outside["b"], f"{lab.servers[0]}:8080"
    return {
        "natpunch, direct": (f"{ours} </dev/null | {SINK}", f"{zeros} | {ours}"),
        "nc": (f"nc -l 7001 </dev/null | {SINK}", f"{zeros} | nc -N {to} 7001"),
        "natpunch, relayed": (
            f"{relayed} </dev/null | {SINK}",
            f"{zeros} | {relayed}",
        ),
        "nc by natwork's CONNECT": (
            f"nc -l 7001 </dev/null | {SINK}",
            f"{zeros} | nc -N -X connect -x {proxy} {to} 7001",
        ),
    }


def throughput(rounds: int) -> dict[str, float]:
    """Return the median of each contender."""
    found: dict[str, list[float]] = {}
    with natlab.lab("full", "full") as lab, punching.server(lab):
        options = [f"listen={lab.servers[0]}:8080", "inside=198.51.100.0/24"]
        options += ["rules=allow to 0.0.0.0/0 port 1-65535"]
        words = [word for option in options for word in ("-o", option)]
        command = [sys.executable, str(ROOT / "natwork.py"), *words]
        lab.start("server", *command, errors=subprocess.DEVNULL)
        time.sleep(1)
        names = list(contenders(lab).items())
        for number in range(rounds):
            for name, (far, near) in names[number % 4 :] + names[: number % 4]:
                found.setdefault(name, []).append(timed(lab, far, near, 0.5))
    return {name: statistics.median(speeds) for name, speeds in found.items()}


def idle_server() -> float:
    """Return the MB that a server has with 1,000 clients waiting."""
    limits = ["--waiting", "1000", "--per-address", "1000"]
    with natlab.lab() as lab, punching.server(lab, *limits):
        import natpunch

        def join(number: int) -> socket.socket:
            sock = socket.create_connection((lab.servers[0], 3478), 5)
            sock.sendall(b"natpunch 1\n")
            nonce = sock.recv(200).decode().split()[1]
            line = f"join {number:032x} pipe {'0' * 32} plain"
            proof = natpunch.mac(b"", nonce, line).hex()
            sock.sendall(f"{line} {proof}\n".encode())
            return sock

        socks = lab.within("a", lambda: [join(number) for number in range(1000)])
        time.sleep(1)
        (pid,) = punching.pids(lab, "server")
        text = Path(f"/proc/{pid}/status").read_text()
        assert all(sock.fileno() > 0 for sock in socks)
        rss = int(re.findall(r"VmRSS:\s+(\d+)", text)[0]) * 1024 / 1e6
        for sock in socks:
            sock.close()
        return rss


def row(name: str, value: str, floor: str, good: bool) -> None:
    print(f"| {name} | {value} | {floor} | {'yes' if good else 'NO'} |", flush=True)


def main() -> None:
    """Print the table."""
    print("| what | measured | floor | kept |\n|---|---|---|---|")
    for kinds, most in ((("port", "port"), 0.5), (("sequential", "sequential"), 0.5)):
        times = punch_times(kinds, RUNS)
        name = f"punch, {kinds[0]} x {kinds[1]}, the slowest of {RUNS}"
        row(name, f"{times[-1]:.2f} s", f"{most} s", times[-1] <= most)
    times = punch_times(("port", "fully"), RUNS)
    slow = times[RUNS * 19 // 20 - 1]
    name = f"punch, port x fully random, {RUNS * 19 // 20} of {RUNS}"
    row(name, f"{slow:.2f} s", "3 s", slow <= 3)
    speed = throughput(ROUNDS)
    for name, value in speed.items():
        print(f"| {name} | {value:.0f} MB/s | | |")
    ratio = speed["natpunch, direct"] / speed["nc"]
    row("direct, beside nc", f"{ratio:.2f} x", "0.9 x", ratio >= 0.9)
    ratio = speed["natpunch, relayed"] / speed["nc by natwork's CONNECT"]
    row("relayed, beside CONNECT", f"{ratio:.2f} x", "0.5 x", ratio >= 0.5)
    rss = idle_server()
    row("server, 1,000 waiting", f"{rss:.1f} MB", "40 MB", rss <= 40)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="an eighth of the work")
    IS_QUICK = parser.parse_args().quick
    SIZE = (1 << 27) if IS_QUICK else (1 << 30)
    RUNS, ROUNDS = (5, 1) if IS_QUICK else (20, 5)
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    assert os.geteuid() == 0, "the labs need root"
    main()
