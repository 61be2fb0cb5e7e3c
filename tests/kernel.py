"""What the kernel says of a process, and what it can do to one.

A process may end while it is asked about.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import resource
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

TICK = os.sysconf("SC_CLK_TCK")  # in a second
CLONE_NEWNET = 0x40000000  # <linux/sched.h>; os.setns is new in Python 3.12
LIBC = ctypes.CDLL(None, use_errno=True)


def read(pid: int | str, name: str) -> str:
    """Return a file of /proc/PID, "" when the process has ended."""
    try:
        return Path(f"/proc/{pid}/{name}").read_text(errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return ""


def title(pid: int) -> str:
    """Return the title that ps would show."""
    return read(pid, "cmdline").partition("\0")[0]


def status(pid: int | str, name: str) -> str:
    """Return a line of /proc/PID/status."""
    match = re.search(rf"^{name}:[ \t]*(.*)$", read(pid, "status"), re.M)
    return match[1].strip() if match else ""


def number(pid: int, name: str) -> int:
    """Return the number with which a line of /proc/PID/status begins."""
    return int(status(pid, name).split()[0])


def ticks(pid: int) -> int:
    """Return the ticks of CPU that a process and its reaped children have used."""
    fields = read(pid, "stat").rpartition(")")[2].split()
    return sum(int(count) for count in fields[11:15])


def opened(pid: int, kind: str = "") -> dict[int, str]:
    """Return what a process has open of a kind, such as "pipe:", by descriptor."""
    found = {}
    for link in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            found[int(link.name)] = os.readlink(link)
    return {fd: name for fd, name in sorted(found.items()) if name.startswith(kind)}


def descriptors(pid: int) -> list[int]:
    """Return the descriptors that a process has open."""
    return list(opened(pid))


def children(pid: int) -> list[int]:
    """Return the children of a process."""
    return [int(word) for word in read(pid, f"task/{pid}/children").split()]


def group(leader: int) -> list[int]:
    """Return the processes of a process group that have not ended."""
    found = []
    for pid in (int(name) for name in os.listdir("/proc") if name.isdigit()):
        fields = read(pid, "stat").rpartition(")")[2].split()
        if fields and fields[0] not in "ZX" and int(fields[2]) == leader:
            found.append(pid)
    return found


@contextlib.contextmanager
def stopped(pid: int) -> Iterator[None]:
    """Hold a process, so that it finds all at once what comes meanwhile."""
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


@contextlib.contextmanager
def no_more_descriptors(pid: int) -> Iterator[None]:
    """Let a process keep what it has open, and open nothing more."""
    now = opened(pid)
    free = next(fd for fd in range(1 << 20) if fd not in now)
    soft, hard = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (free, hard))
    try:
        yield
    finally:
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (soft, hard))


@contextlib.contextmanager
def network(place: str) -> Iterator[None]:
    """Put this thread, and those it starts, into the network that a file stands for."""
    own = f"/proc/self/task/{threading.get_native_id()}/ns/net"
    with open(own) as back, open(place) as there:
        if LIBC.setns(there.fileno(), CLONE_NEWNET) != 0:
            error = ctypes.get_errno()
            raise OSError(error, os.strerror(error))
        try:
            yield
        finally:
            assert LIBC.setns(back.fileno(), CLONE_NEWNET) == 0


def network_of(pid: int) -> contextlib.AbstractContextManager[None]:
    """Put this thread, and those it starts, into the network of a process."""
    return network(f"/proc/{pid}/ns/net")
