"""A machine with a real systemd: process 1 of a container made from this box itself."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TypeVar

import kernel
import needs
import running
import wait

PATH = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LANG": "C.UTF-8"}


class Container:
    """A copy of this box that has booted systemd, with a network of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.root = folder, folder / "root"
        self.process: subprocess.Popen[bytes] | None = None
        self.leader = 0  # our number of its process 1

    def boot(self) -> None:
        """Boot it; raise OSError or CalledProcessError where that cannot be."""
        for name in ("upper", "work", "root"):
            (self.folder / name).mkdir()
        layers = f"lowerdir=/,upperdir={self.folder}/upper,workdir={self.folder}/work"
        mount("-t", "overlay", "-o", layers, "overlay", str(self.root))
        (self.root / "etc/machine-id").write_text(os.urandom(16).hex() + "\n")
        for wants in (self.root / "etc/systemd/system").glob("*.wants"):
            shutil.rmtree(wants)  # what this box would start
        options = ["--quiet", "--register=no", "--keep-unit", "--private-network"]
        options += ["--console=pipe", f"--directory={self.root}", "--boot"]
        options += [f"--machine={os.urandom(8).hex()}"]  # no name is used twice
        options += [f"--bind-ro={running.ROOT}:/srv/natwork"]
        self.output = (self.folder / "console").open("w+")
        self.process = subprocess.Popen(
            [
                "setpriv",
                "--pdeathsig=KILL",
                "systemd-nspawn",
                *options,
                "--",
                "--unit=basic.target",
            ],
            stdin=subprocess.DEVNULL,
            stdout=self.output,
            stderr=subprocess.STDOUT,
            env=PATH,
            start_new_session=True,
        )
        wait.until(self.has_booted, 60)

    def has_booted(self) -> bool:
        assert self.process
        if self.process.poll() is not None:
            raise OSError(self.said())
        self.leader = (kernel.children(self.process.pid) or [0])[0]
        state = self.run("systemctl is-system-running", check=False).stdout.strip()
        return state in ("running", "degraded")

    def said(self) -> str:
        self.output.seek(0)
        return self.output.read()[-2000:]

    def run(self, line: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run a shell's line in it, in the copy of this directory."""
        words = ["nsenter", f"--target={self.leader}", "--mount", "--uts", "--ipc"]
        words += ["--net", "--pid", "sh", "-ec", f"cd /srv/natwork; {line}"]
        done = subprocess.run(
            words,
            env=PATH,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=90,
        )
        assert done.returncode == 0 or not check, (line, done)
        return done

    def show(self, name: str) -> str:
        """Return a property of the service."""
        return self.run(f"systemctl show --value -p {name} natwork").stdout.strip()

    def journal(self) -> str:
        """Return what the service has written, in the journal's own words."""
        self.run("journalctl --sync")
        return self.run("journalctl -u natwork -o cat").stdout

    def pid_here(self, pid: int) -> int:
        """Return our number of a process that has this one in the container."""
        for name in filter(str.isdigit, os.listdir("/proc")):
            numbers = kernel.status(int(name), "NSpid").split()
            if len(numbers) > 1 and numbers[-1] == str(pid):
                with contextlib.suppress(OSError):
                    mine = os.readlink(f"/proc/{name}/ns/pid")
                    if mine == os.readlink(f"/proc/{self.leader}/ns/pid"):
                        return int(name)
        raise AssertionError(f"no process has the number {pid}")

    def halt(self) -> None:
        """End it, whatever it does, and give its files back."""
        if self.process:
            for pid in kernel.children(self.process.pid):
                os.kill(pid, signal.SIGKILL)  # process 1: the kernel ends the others
            self.process.kill()
            self.process.wait(20)


C = TypeVar("C", bound=Container)


def mount(*words: str) -> None:
    subprocess.run(["mount", *words], check=True, capture_output=True)


@contextlib.contextmanager
def booted(kind: type[C]) -> Iterator[C]:
    """Boot a container; skip where that cannot be, and leave nothing of it behind."""
    needs.programs("systemd-nspawn", "systemctl", "nsenter", "mount")
    if os.geteuid() != 0:
        needs.unavailable("systemd-nspawn needs root")
    with contextlib.ExitStack() as undo:
        folder = Path(undo.enter_context(tempfile.TemporaryDirectory()))
        container = kind(folder)
        try:
            mount("-t", "tmpfs", "natwork", str(folder))
            undo.callback(subprocess.run, ["umount", "-R", "-l", str(folder)])
            undo.callback(container.halt)
            container.boot()
        except (OSError, AssertionError, subprocess.CalledProcessError) as error:
            needs.unavailable(f"systemd-nspawn does not boot here: {error}")
        yield container
