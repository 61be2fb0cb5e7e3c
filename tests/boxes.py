"""A dual-homed box made of three network namespaces, for the end-to-end tests.

    inside             gateway                            outside
    10.9.0.2 -------- 10.9.0.1    203.0.113.1 ---------- 203.0.113.80, .81
    fd00:9::2 ------ fd00:9::1    2001:db8:9::1 ------ 2001:db8:9::80
                                  198.51.100.1 -------- 198.51.100.80  (second uplink)
                                  2001:db8:19::1 ---- 2001:db8:19::80

The gateway forwards no packet, and the machine inside knows no names: what gets
through has gone through a program. 192.0.2.80 lies behind both uplinks.

A box is named for the process that made it. One whose process was killed before
it could clean up is removed when the next box is made.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import shutil
import signal
import socket
import subprocess
from collections.abc import Callable
from collections.abc import Iterator
from pathlib import Path
from typing import IO
from typing import TypeVar

import kernel
import needs
import running
import wait

T = TypeVar("T")
Entry = dict[str, str]

PLACES = ("inside", "gateway", "outside")
SERIAL = itertools.count(1)
NAME = re.compile(r"natwork-(\d+)-\d+-(?:%s)" % "|".join(PLACES))

# What ip -batch is given, by namespace; the two veth pairs are there already.
ADDRESSES = {
    "inside": """
        link set lo up
        link set lan up
        addr add 10.9.0.2/24 dev lan
        addr add fd00:9::2/64 dev lan nodad
        route add default via 10.9.0.1
        route add default via fd00:9::1
    """,
    "gateway": """
        link set lo up
        link set lan up
        addr add 10.9.0.1/24 dev lan
        addr add fd00:9::1/64 dev lan nodad
        link set wan up
        addr add 203.0.113.1/24 dev wan
        addr add 2001:db8:9::1/64 dev wan nodad
        route add default via 203.0.113.80 metric 100
        route add default via 2001:db8:9::80 metric 100
    """,
    # The routes back are there so that only the gateway keeps the two apart.
    "outside": """
        link set lo up
        addr add 192.0.2.80/32 dev lo
        link set wan up
        addr add 203.0.113.80/24 dev wan
        addr add 203.0.113.81/24 dev wan
        addr add 2001:db8:9::80/64 dev wan nodad
        route add 10.9.0.0/24 via 203.0.113.1
        route add fd00:9::/64 via 2001:db8:9::1
    """,
}

# As on any box with two lines: an address leaves by the line that it belongs to.
SECOND_UPLINK = {
    "gateway": """
        link set wan2 up
        addr add 198.51.100.1/24 dev wan2
        addr add 2001:db8:19::1/64 dev wan2 nodad
        route add default via 198.51.100.80 metric 200
        route add default via 2001:db8:19::80 metric 200
        rule add from 203.0.113.1 lookup 101
        route add default via 203.0.113.80 table 101
        route add unreachable default metric 9999 table 101
        rule add from 198.51.100.1 lookup 102
        route add default via 198.51.100.80 table 102
        route add unreachable default metric 9999 table 102
    """,
    "outside": """
        link set wan2 up
        addr add 198.51.100.80/24 dev wan2
        addr add 2001:db8:19::80/64 dev wan2 nodad
    """,
}

# Known to the gateway alone.
NAMES = """\
203.0.113.80 www.example.com apt.example.com
203.0.113.81 www.example.net
203.0.113.80 dual-stack.example.com
2001:db8:9::80 dual-stack.example.com
2001:db8:9::80 six.example.com
203.0.113.80 half-dead.example.com
2001:db8:9::99 half-dead.example.com
192.0.2.80 far.example.com
10.9.0.2 rebound.example.com
"""
LOCALHOST = "127.0.0.1 localhost\n::1 localhost\n"

# No setting of the caller (a proxy, a language) reaches a program in the box.
ENVIRONMENT = {
    "PATH": os.environ.get("PATH", os.defpath),
    "HOME": "/nonexistent",
    "LANG": "C.UTF-8",
}

# What nginx may see of a client: the addresses of the gateway on the outside.
OUTSIDE_ADDRESSES = {
    "203.0.113.1",
    "2001:db8:9::1",
    "198.51.100.1",
    "2001:db8:19::1",
}


def needs_namespaces() -> None:
    """Skip the test where network namespaces cannot be made."""
    needs.programs("ip")
    if os.geteuid() != 0:
        needs.unavailable("network namespaces need root")
    name = f"natwork-{os.getpid()}-{next(SERIAL)}-inside"
    tried = subprocess.run(
        ["ip", "netns", "add", name], capture_output=True, text=True, check=False
    )
    remove(name)
    if tried.returncode != 0:
        needs.unavailable("no network namespaces: " + tried.stderr.strip())


def ip(*words: str, given: str | None = None) -> str:
    """Run ip; return what it prints."""
    done = subprocess.run(
        ["ip", *words], input=given, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, (words, done.stderr)
    return done.stdout


def remove(name: str) -> None:
    """Take a namespace away, with the processes in it and its files."""
    if Path("/run/netns", name).exists():
        for pid in ip("netns", "pids", name).split():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)
        ip("netns", "del", name)
    shutil.rmtree(Path("/etc/netns", name), ignore_errors=True)
    with contextlib.suppress(OSError):  # others may have theirs in it
        Path("/etc/netns").rmdir()


def sweep() -> None:
    """Remove what runs that were killed have left."""
    for folder in (Path("/run/netns"), Path("/etc/netns")):
        for path in [*folder.iterdir()] if folder.exists() else []:
            match = NAME.fullmatch(path.name)
            if match and not Path("/proc", match[1]).exists():
                remove(path.name)


class Box:
    """Three namespaces, and what runs in them."""

    def __init__(self) -> None:
        self.prefix = f"natwork-{os.getpid()}-{next(SERIAL)}"
        self.processes: list[subprocess.Popen[str]] = []

    def name(self, place: str) -> str:
        """Return the name of the namespace, as ip netns knows it."""
        assert place in PLACES, place
        return f"{self.prefix}-{place}"

    def make(self, second_uplink: bool) -> None:
        """Make the namespaces, the cables between them, addresses and names."""
        for place in PLACES:
            folder = Path("/etc/netns", self.name(place))  # ip netns exec mounts it
            folder.mkdir(parents=True)
            names = NAMES if place == "gateway" else ""
            (folder / "hosts").write_text(LOCALHOST + names)
            (folder / "nsswitch.conf").write_text("hosts: files\n")
            ip("netns", "add", self.name(place))
            for setting, value in {
                "ipv4/ip_forward": "0",
                "ipv6/conf/all/forwarding": "0",
                "ipv4/conf/all/rp_filter": "0",
                "ipv4/conf/default/rp_filter": "0",
                "ipv6/conf/all/disable_ipv6": "0",
                "ipv6/conf/default/disable_ipv6": "0",
                # Else each address is new again after a second, and Chromium
                # gives up what it loads: ERR_NETWORK_CHANGED.
                "ipv6/conf/all/accept_dad": "0",
                "ipv6/conf/default/accept_dad": "0",
            }.items():
                self.set(place, setting, value)
        self.cable("lan", "inside", "gateway")
        self.cable("wan", "gateway", "outside")
        plans = [ADDRESSES]
        if second_uplink:
            self.cable("wan2", "gateway", "outside")
            plans.append(SECOND_UPLINK)
        for plan in plans:
            for place, commands in plan.items():
                ip("-n", self.name(place), "-batch", "-", given=commands)
        assert self.get("gateway", "ipv4/ip_forward") == "0"
        assert self.get("gateway", "ipv6/conf/all/forwarding") == "0"

    def cable(self, device: str, one: str, other: str) -> None:
        """Join two namespaces; the device has the same name at both ends."""
        here, there = ("netns", self.name(one)), ("netns", self.name(other))
        ip("link", "add", device, *here, "type", "veth", "peer", device, *there)

    def clean(self) -> None:
        """Stop what runs in the namespaces and take them away."""
        with contextlib.ExitStack() as all_of_it:
            for place in PLACES:
                all_of_it.callback(remove, self.name(place))
            for process in self.processes:
                all_of_it.callback(self.stop, process)

    def within(self, place: str, function: Callable[[], T]) -> T:
        """Call a function in a namespace; the sockets it makes stay there."""
        with kernel.network(f"/run/netns/{self.name(place)}"):
            return function()

    def get(self, place: str, setting: str) -> str:
        """Return a setting below /proc/sys/net."""
        path = Path("/proc/sys/net", setting)
        return self.within(place, lambda: path.read_text().strip())

    def set(self, place: str, setting: str, value: str) -> None:
        """Change a setting below /proc/sys/net."""
        path = Path("/proc/sys/net", setting)
        self.within(place, lambda: path.write_text(value))

    def link(self, place: str, device: str, *state: str) -> None:
        """Change a device, as with "down"."""
        ip("-n", self.name(place), "link", "set", device, *state)

    def connect(
        self, place: str, address: tuple[str, int], timeout: float = 10.0
    ) -> socket.socket:
        """Return a connection from a namespace to an address."""
        return self.within(place, lambda: socket.create_connection(address, timeout))

    def command(self, place: str, *words: str) -> list[str]:
        """Return the words that run a program in a namespace."""
        return ["ip", "netns", "exec", self.name(place), *words]

    def run(
        self, place: str, *words: str, timeout: float = 60.0, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        """Run a program in a namespace to its end."""
        return subprocess.run(
            self.command(place, *words),
            capture_output=True,
            text=True,
            errors="replace",
            timeout=timeout,
            check=False,
            env={**ENVIRONMENT, **environment},
        )

    def start(
        self,
        place: str,
        *words: str,
        folder: Path,
        output: IO[str] | int = subprocess.DEVNULL,
        errors: IO[str] | int = subprocess.DEVNULL,
        **environment: str,
    ) -> subprocess.Popen[str]:
        """Start a program in a namespace; it is stopped with the box at the latest."""
        process = subprocess.Popen(
            self.command(place, *words),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=errors,
            cwd=folder,
            text=True,
            env={**ENVIRONMENT, **environment},
            start_new_session=True,
        )
        self.processes.append(process)
        return process

    def stop(self, process: subprocess.Popen[str]) -> None:
        """Stop a program that start() started, the hard way if it must be."""
        process.terminate()
        try:
            process.wait(timeout=15)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def natwork(self, folder: Path, *settings: str) -> running.Gateway:
        """Start natwork.py in the namespace between, as an operator starts it."""
        with (folder / "access.log").open("w") as log:
            gateway = running.Gateway(
                folder,
                self.command("gateway", *running.PROGRAM, *running.options(*settings)),
                stdin=subprocess.DEVNULL,
                stdout=log,
                env=ENVIRONMENT,
            )

        def ready() -> bool:  # both listeners of `*:8080` are open
            assert gateway.process.poll() is None, gateway.said()
            return len(gateway.listening()) == 2

        wait.until(ready)
        return gateway

    def link_local(self, place: str, device: str) -> str:
        """Return the link-local address of a device."""
        words = ["-6", "-o", "addr", "show", "dev", device]
        shown = ip("-n", self.name(place), *words).split()
        return next(w for w in shown if w.startswith("fe80")).partition("/")[0]

    def pids(self, place: str) -> list[int]:
        """Return the processes that live in a namespace."""
        return [int(pid) for pid in ip("netns", "pids", self.name(place)).split()]


@contextlib.contextmanager
def dual_homed(second_uplink: bool = False) -> Iterator[Box]:
    """Make a box; leave nothing of it behind."""
    needs_namespaces()
    sweep()
    box = Box()
    # Told to end, take the box down first, as at a Ctrl-C.
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        box.make(second_uplink)
        yield box
    finally:
        box.clean()
        signal.signal(signal.SIGTERM, before)
