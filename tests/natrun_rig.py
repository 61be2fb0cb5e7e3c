"""A box whose machine inside has no way out but natrun.py, watched by tcpdump.

What natrun.py runs is a real program, as root and as a user without any right.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boxes
import kernel
import needs
import pytest
import running
import wait
import web

GATEWAY = "10.9.0.1:8080"
SERVER, SERVER6, NOBODY_THERE = "203.0.113.80", "2001:db8:9::80", "203.0.113.99"
NAME_SERVER = "192.0.2.53"  # nobody is there: natrun answers in its place
PYTHON = "/usr/bin/python3"  # which every user may run
TESTS = Path(__file__).parent
UNPRIVILEGED = "setpriv --reuid 65534 --regid 65534 --clear-groups".split()
UNPRIVILEGED += "--bounding-set=-all --inh-caps=-all".split()
# Each datagram and each SYN of the machine inside to somebody who is not inside.
ASTRAY = (
    "(ip or ip6) and (udp or (ip and tcp[tcpflags] & tcp-syn != 0) or "
    "(ip6 and ip6[6] = 6)) and ((src net 10.9.0.0/24 and not dst net 10.9.0.0/24 and "
    "not dst net 224.0.0.0/4) or (src net fd00:9::/64 and not dst net fd00:9::/64 and "
    "not dst net ff00::/8))"
)

users = pytest.mark.parametrize("user", ["root", "nobody"])


class Rig(web.Rig):
    """The box, a gateway, and the folder that all users may look into."""

    def __init__(self, box: boxes.Box, folder: Path, certificates: Path) -> None:
        super().__init__(box, folder, certificates)
        self.tool = folder / "natrun.py"
        for name in ("natrun_probe.py", "natrun_client.go"):
            shutil.copy(TESTS / name, folder / name)
        shutil.copy(running.ROOT / "natrun.py", self.tool)
        for path in folder.iterdir():
            path.chmod(0o755)
        place = Path("/etc/netns", box.name("inside"))
        (place / "resolv.conf").write_text(f"nameserver {NAME_SERVER}\n")
        (place / "nsswitch.conf").write_text("hosts: files dns\n")
        self.capture = folder / "astray.pcap"
        words = ["--immediate-mode", "-i", "lan", "-w", str(self.capture), "-U"]
        with (folder / "tcpdump.log").open("w") as errors:
            self.tcpdump = box.start(
                "gateway", "tcpdump", *words, ASTRAY, folder=folder, errors=errors
            )
        log = folder / "tcpdump.log"
        wait.until(lambda: "listening on" in log.read_text())

    def command(self, user: str, *words: str, gateway: str = GATEWAY) -> list[str]:
        """Return the words that run a program by natrun.py as a user."""
        option = ["-g", gateway] if gateway else []
        before = UNPRIVILEGED if user == "nobody" else []
        return [*before, PYTHON, str(self.tool), *option, *words]

    def natrun(
        self, user: str, *words: str, gateway: str = GATEWAY, **how: Any
    ) -> subprocess.CompletedProcess[str]:
        """Run a program by natrun.py inside, to its end."""
        home = self.home(user)
        command = self.command(user, *words, gateway=gateway)
        environment = {"HOME": str(home), "TMPDIR": str(home), **how}
        return self.box.run("inside", *command, **environment)

    def home(self, user: str) -> Path:
        """Return a folder that is a user's own."""
        home = self.folder / user
        home.mkdir(exist_ok=True)
        if user == "nobody":
            os.chown(home, 65534, 65534)
        return home

    def output(self, user: str, *words: str, **how: Any) -> str:
        """Run a program by natrun.py inside; return what it prints."""
        done = self.natrun(user, *words, **how)
        assert done.returncode == 0, (words, done.stdout, done.stderr)
        assert "Traceback" not in done.stderr and "fault" not in done.stderr
        return done.stdout

    def probe(self, user: str, *words: str, **how: Any) -> Any:
        """Run a function of natrun_probe.py by natrun.py; return what it returns."""
        script = str(self.folder / "natrun_probe.py")
        return json.loads(self.output(user, PYTHON, script, *words, **how))

    def patched(self, user: str, code: str, *words: str) -> list[str]:
        """Return the words that run natrun.py, which code has changed, as a user."""
        lines = ["import errno, sys", f"sys.path.insert(0, {str(self.folder)!r})"]
        lines += ["import natrun", code, "sys.exit(natrun.main())"]
        before = UNPRIVILEGED if user == "nobody" else []
        return [*before, PYTHON, "-B", "-c", "\n".join(lines), "-g", GATEWAY, *words]

    def start(self, user: str, *words: str, name: str = "started") -> Background:
        """Start a program by natrun.py inside."""
        command = self.command(user, *words)
        return Background(self, command, self.home(user) / name)

    @contextlib.contextmanager
    def barred(self, *places: str, how: str = "unreachable") -> Iterator[None]:
        """Let nothing go to some places past the gateway; connect() has an error."""
        with contextlib.ExitStack() as undo:
            for place in places:
                version = "-6" if ":" in place else "-4"
                route = ["ip", version, "route", "add", how, place]
                assert self.box.run("inside", *route).returncode == 0
                route[3] = "del"
                undo.callback(self.box.run, "inside", *route)
            yield

    def astray(self) -> str:
        """Return what went past the gateway."""
        return boxes_read(self.capture)

    def check(self) -> None:
        """Nothing may have gone astray, and tcpdump must have been able to see it."""
        before = self.astray()
        send = "import socket; socket.socket(2, 2).sendto(b'x', ('192.0.2.1', 9))"
        self.box.run("inside", PYTHON, "-c", send)
        wait.until(lambda: "192.0.2.1.9" in self.astray())
        assert before == "", before
        self.box.stop(self.tcpdump)
        for gateway in self.gateways:
            gateway.stop()
        callers = {entry["client"] for entry in self.web.entries()}
        assert callers <= {*boxes.OUTSIDE_ADDRESSES, SERVER}, callers  # sshd is there


class Background:
    """A program that runs by natrun.py, and what it has written."""

    def __init__(self, rig: Rig, command: list[str], out: Path) -> None:
        self.out, self.err = out.with_suffix(".out"), out.with_suffix(".err")
        with self.out.open("w") as output, self.err.open("w") as errors:
            self.process = rig.box.start(
                "inside", *command, folder=rig.folder, output=output, errors=errors
            )

    def said(self) -> list[str]:
        return running.whole_lines(self.out)

    def line(self, number: int = 0, seconds: float = 15) -> str:
        """Return a line of what it writes, once it is there."""

        def ready() -> bool:
            assert self.process.poll() is None or len(self.said()) > number, (
                self.err.read_text()
            )
            return len(self.said()) > number

        wait.until(ready, seconds)
        return self.said()[number]

    @property
    def supervisor(self) -> int:
        return self.process.pid

    def child(self) -> int:
        """Return the process of the command: the relay was started before it."""
        return max(kernel.children(self.supervisor))

    def stop(self) -> int:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        return self.process.wait(15)


def boxes_read(capture: Path) -> str:
    """Return what tcpdump has captured, as text."""
    words = ["tcpdump", "-n", "-r", str(capture)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    return done.stdout


@contextlib.contextmanager
def set_up() -> Iterator[Rig]:
    """Make a box with nginx outside, and watch what leaves the machine inside."""
    needs.programs("nginx", "curl", "tcpdump", "setpriv", "openssl")
    with running.public_folder() as folder, tempfile.TemporaryDirectory() as made:
        web.certificates(Path(made))
        with boxes.dual_homed() as box:
            rig = Rig(box, folder, Path(made))
            yield rig
            rig.check()


def go_client(rig: Rig) -> str:
    """Return the static Go client, built if it is not there."""
    needs.programs("go")
    client = rig.folder / "client"
    if not client.exists():
        environment = {
            "PATH": os.environ["PATH"],
            "HOME": os.environ.get("HOME", "/"),  # its cache serves the next module
            "CGO_ENABLED": "0",
            "GO111MODULE": "off",
        }
        source = str(rig.folder / "natrun_client.go")
        words = ["go", "build", "-o", str(client), source]
        subprocess.run(words, env=environment, check=True, timeout=200)
    return str(client)
