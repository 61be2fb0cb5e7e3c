"""Two peers behind NATs of chosen kinds, and a server, in network namespaces.

    a ---- nat_a ----+----- nat_b ---- b
                   middle
                     |
                   server

The middle is a bridge, or a router, which a packet of a low TTL does not pass.  Both
peers are 10.0.0.2.  A lab is named for the process that made it; one whose process was
killed before it could clean up is removed when the next lab is made.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import signal
import subprocess
import threading
from collections.abc import Callable
from collections.abc import Iterator
from pathlib import Path
from typing import TypeVar

import boxes
import kernel
import needs

T = TypeVar("T")
SERIAL = itertools.count(1)
NAME = re.compile(r"natpunch-(\d+)-\d+-\w+")
PLACES = ("a", "nat_a", "b", "nat_b", "middle", "server")
SETTING_UP = threading.Lock()  # the kernel makes one namespace at a time anyway
# By whether there is a router: the addresses outside, and the servers'.
OUTSIDE = {
    False: ("198.51.100.1", "198.51.100.2", ["198.51.100.8", "198.51.100.9"]),
    True: ("198.51.100.1", "203.0.113.1", ["192.0.2.8", "192.0.2.9"]),
}

# What a kind has in postrouting, in prerouting and in forward.
MASQUERADE = 'oifname "wan" masquerade'
TO_PEER = 'iifname "wan" dnat to 10.0.0.2'
PORTS = ", ".join(f"{n} : {30000 + n}" for n in range(5000))
KINDS = {
    "none": (MASQUERADE, TO_PEER, 'iifname "wan" accept'),
    "full": (MASQUERADE, TO_PEER, "ct status dnat accept"),
    "restricted": (
        MASQUERADE,
        'iifname "wan" meta l4proto { tcp, udp }'
        " ip saddr . meta l4proto . th dport @known dnat to 10.0.0.2",
        'oifname "wan" meta l4proto { tcp, udp }'
        " add @known { ip daddr . meta l4proto . th sport }; ct status dnat accept",
    ),
    "port": (MASQUERADE, "", ""),
    "sequential": (
        'oifname "wan" meta l4proto { tcp, udp }'
        " snat to OUT : numgen inc mod 5000 map { PORTS }",
        "",
        "",
    ),
    "random": (MASQUERADE + " random", "", ""),
    "fully": (MASQUERADE + " fully-random", "", ""),
}
# A gateway that takes what is sent to itself too early would give a port away that a
# peer counts on, so it drops it; unless it is one of the careless kind.
RULES = """
table ip nat {
    set known {
        type ipv4_addr . inet_proto . inet_service
        size 65535
        flags dynamic,timeout
        timeout 2m
    }
    chain pre {
        type nat hook prerouting priority dstnat
        BEFORE
    }
    chain post {
        type nat hook postrouting priority srcnat
        AFTER
    }
    chain through {
        type filter hook forward priority filter; policy drop;
        ct state established,related accept
        THROUGH
        iifname "lan" accept
    }
    chain own {
        type filter hook input priority filter
        OWN
    }
}
"""


def rules(kind: str, outside: str, careless: bool) -> str:
    """Return what nft is given to make a NAT of a kind."""
    after, before, through = KINDS[kind]
    words = {
        "AFTER": after.replace("PORTS", PORTS).replace("OUT", outside),
        "BEFORE": before,
        "THROUGH": through.replace("; ", "\n"),
        "OWN": "" if careless else 'iifname "wan" ct state new drop',
    }
    text = RULES
    for word, rule in words.items():
        text = text.replace(f" {word}\n", f" {rule}\n")
    return text


def device(name: str, address: str, gateway: str = "") -> str:
    """Return the ip commands that bring up a device with an address."""
    text = f"link set lo up\nlink set {name} up\naddr add {address}/24 dev {name}\n"
    return text + (f"route add default via {gateway}\n" if gateway else "")


class Lab:
    """The namespaces of one pair, and what runs in them."""

    def __init__(self, kinds: tuple[str, str], router: bool, careless: str) -> None:
        self.prefix = f"natpunch-{os.getpid()}-{next(SERIAL)}"
        self.kinds, self.router, self.careless = kinds, router, careless
        self.processes: list[subprocess.Popen[bytes]] = []
        *outside, self.servers = OUTSIDE[router]
        self.outside = dict(zip("ab", map(str, outside)))

    def name(self, place: str) -> str:
        """Return the name of the namespace, as ip netns knows it."""
        assert place in PLACES, place
        return f"{self.prefix}-{place}"

    def ip(self, place: str, commands: str) -> None:
        boxes.ip("-n", self.name(place), "-batch", "-", given=commands)

    def cable(self, one: str, here: str, other: str, there: str) -> None:
        near, far = ("netns", self.name(one)), ("netns", self.name(other))
        boxes.ip("link", "add", here, *near, "type", "veth", "peer", there, *far)

    def make(self) -> None:
        """Make the namespaces, the cables, the addresses and the NATs."""
        boxes.ip(
            "-batch", "-", given="".join(f"netns add {self.name(p)}\n" for p in PLACES)
        )
        for side in "ab":
            self.cable(side, "lan", f"nat_{side}", "lan")
            self.cable(f"nat_{side}", "wan", "middle", f"to_{side}")
            self.ip(side, device("lan", "10.0.0.2", "10.0.0.1"))
        self.cable("server", "wan", "middle", "to_server")
        gateways = dict.fromkeys(("a", "b", "server"), "")
        if self.router:
            gateways = {
                "a": "198.51.100.254",
                "b": "203.0.113.254",
                "server": "192.0.2.254",
            }
            text = "".join(device(f"to_{name}", at) for name, at in gateways.items())
        else:
            text = "link add wire type bridge\nlink set wire up\n" + "".join(
                f"link set to_{name} master wire up\n" for name in gateways
            )
        self.ip("middle", text)
        self.ip("server", device("wan", self.servers[0], gateways["server"]))
        self.ip("server", f"addr add {self.servers[1]}/24 dev wan\n")
        for side, kind in zip("ab", self.kinds):
            gate = f"nat_{side}"
            self.ip(gate, device("lan", "10.0.0.1"))
            self.ip(gate, device("wan", self.outside[side], gateways[side]))
            self.set(gate, "ipv4/ip_forward", "1")
            text = rules(kind, self.outside[side], side in self.careless)
            self.nft(gate, text)
        self.set("middle", "ipv4/ip_forward", str(int(self.router)))

    def nft(self, place: str, text: str) -> None:
        """Give rules to nft in a namespace."""
        done = subprocess.run(
            self.command(place, "nft", "-f", "-"),
            input=text,
            capture_output=True,
            text=True,
            timeout=30,
        )
        assert done.returncode == 0, done.stderr

    def within(self, place: str, function: Callable[[], T]) -> T:
        """Call a function in a namespace; the sockets it makes stay there."""
        with kernel.network(f"/run/netns/{self.name(place)}"):
            return function()

    def set(self, place: str, setting: str, value: str) -> None:

        path = Path("/proc/sys/net", setting)
        self.within(place, lambda: path.write_text(value))

    def command(self, place: str, *words: str) -> list[str]:
        """Return the words that run a program in a namespace."""
        return ["ip", "netns", "exec", self.name(place), *words]

    def run(
        self, place: str, *words: str, timeout: float = 30, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        """Run a program in a namespace to its end."""
        return subprocess.run(
            self.command(place, *words),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=timeout,
            env={**boxes.ENVIRONMENT, **environment},
        )

    def start(
        self,
        place: str,
        *words: str,
        given: int | None = subprocess.PIPE,
        output: int = subprocess.PIPE,
        errors: int = subprocess.PIPE,
        **environment: str,
    ) -> subprocess.Popen[bytes]:
        """Start a program in a namespace; it ends with the lab at the latest."""
        process = subprocess.Popen(
            self.command(place, *words),
            stdin=given,
            stdout=output,
            stderr=errors,
            env={**boxes.ENVIRONMENT, **environment},
            start_new_session=True,
        )
        self.processes.append(process)
        return process

    def clean(self) -> None:
        """Stop what runs in the namespaces and take them away."""
        for place in PLACES:
            with contextlib.suppress(AssertionError):
                for pid in boxes.ip("netns", "pids", self.name(place)).split():
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(int(pid), signal.SIGKILL)
        for process in self.processes:
            process.wait(10)
            for stream in (process.stdin, process.stdout, process.stderr):
                if stream:
                    with contextlib.suppress(OSError):
                        stream.close()
        names = [p for p in PLACES if Path("/run/netns", self.name(p)).exists()]
        boxes.ip(
            "-batch", "-", given="".join(f"netns del {self.name(p)}\n" for p in names)
        )


def sweep() -> None:
    """Remove what runs that were killed have left."""
    folder = Path("/run/netns")
    for path in [*folder.iterdir()] if folder.exists() else []:
        match = NAME.fullmatch(path.name)
        if match and not Path("/proc", match[1]).exists():
            boxes.remove(path.name)


@contextlib.contextmanager
def lab(
    a: str = "none", b: str = "none", router: bool = False, careless: str = ""
) -> Iterator[Lab]:
    """Make a lab with NATs of two kinds; leave nothing of it behind.

    The careless gateways, "a", "b" or "ab", answer what is sent to themselves.
    """
    needs.programs("ip", "nft")
    boxes.needs_namespaces()
    sweep()
    made = Lab((a, b), router, careless)
    try:
        made.make()
        yield made
    finally:
        made.clean()
