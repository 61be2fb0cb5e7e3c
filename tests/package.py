"""The Debian package of this tree, and a machine where it is installed."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from collections.abc import Iterator
from pathlib import Path

import boxes
import kernel
import machine
import needs
import origins
import readme
import running
import wait

import natwork as heart

SOURCES = "natwork*.py natpunch.py natwork.conf *.md LICENSE pyproject.toml"
SOURCES += " systemd docs debian"
DEB = f"natwork_{heart.__version__}_all.deb"
INSTALL = readme.block("The service", "apt install")
CONF = "/etc/natwork/natwork.conf"
ENVIRONMENT = {**machine.PATH, "DEBIAN_FRONTEND": "noninteractive"}


def copy_sources(folder: Path) -> Path:
    """Copy what packages are made of into a folder; return it."""
    folder.mkdir()
    for pattern in SOURCES.split():
        for path in running.ROOT.glob(pattern):
            copy = shutil.copytree if path.is_dir() else shutil.copy
            copy(path, folder / path.name)
    return folder


def run(*words: str | Path, cwd: Path, seconds: float = 60, code: int = 0) -> str:
    """Run a program to its end, with this exit code; return what it printed."""
    done = subprocess.run(
        words,
        cwd=cwd,
        env=ENVIRONMENT,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=seconds,
    )
    assert done.returncode == code, (words, done.stdout)
    return done.stdout


def build(folder: Path) -> Path:
    """Build the package, for which no compiler has to be there (-d); return it."""
    needs.programs("dpkg-buildpackage", "dh", "dh_python3")
    source = copy_sources(folder / "natwork")
    (command,) = set(re.findall(r"`(dpkg-buildpackage [^`]+)`", readme.TEXT))
    run(*command.split(), "-d", cwd=source)
    return folder / DEB


class Host(machine.Container):
    """A container with this package, and a server on its outside."""

    def install(self, deb: Path) -> None:
        """Do as the operator does; nothing can be fetched."""
        needs.programs("apt-get", "adduser", "curl")
        if self.run("dpkg --status python3-setproctitle", check=False).returncode != 0:
            needs.unavailable("python3-setproctitle is not here")
        (self.root / "usr/sbin/policy-rc.d").unlink(missing_ok=True)  # CI's own
        shutil.copy(deb, self.root / "root")
        assert DEB in INSTALL
        self.run(f"cd /root; export DEBIAN_FRONTEND=noninteractive; yes | {INSTALL}")

    def reloads(self) -> int:
        return self.journal().count("natwork: configuration reloaded\n")

    def names(self) -> set[str]:
        """Return all files that are named for the package."""
        # Network namespaces of other tests have names in /etc/netns, also here.
        found = "find /etc /lib /run /usr /var -xdev -path /etc/netns -prune"
        return set(self.run(f"{found} -o -name '*natwork*' -print").stdout.splitlines())

    def curl(self, url: str) -> str:
        command = "curl --silent --show-error --fail --noproxy '' -x 127.0.0.1:8080"
        return self.run(f"{command} {url}").stdout


@contextlib.contextmanager
def outside_of(
    host: Host, handle: Callable[..., None], port: int = 0
) -> Iterator[origins.Origin]:
    """Yield a server on the outside of the container, 192.0.2.2."""
    needs.programs("ip", "unshare")
    with subprocess.Popen(["unshare", "--net", "sleep", "600"]) as other:
        own = os.readlink("/proc/self/ns/net")
        wait.until(lambda: os.readlink(f"/proc/{other.pid}/ns/net") != own)
        with kernel.network_of(host.leader):
            cable = f"link add wan type veth peer name lan netns {other.pid}"
            for words in (cable, "addr add 192.0.2.1/24 dev wan", "link set wan up"):
                boxes.ip(*words.split())
        with kernel.network_of(other.pid):
            for words in ("addr add 192.0.2.2/24 dev lan", "link set lan up"):
                boxes.ip(*words.split())
            server = origins.Origin(handle, "192.0.2.2", port)
        yield server
        server.close()
        other.kill()  # and the cable with it
