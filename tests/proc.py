"""What the kernel says of a worker: descriptors, memory, CPU; and limits on it."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import time
from collections.abc import Callable
from collections.abc import Iterator
from pathlib import Path

from conftest import Gateway
from conftest import eventually
from wire import read_answer

# One worker, so that it is known who serves the next client, and whoever runs
# the tests may change its limits.
ALONE = ("spare_workers=1", "max_workers=1", "user=root")


def only_worker(gateway: Gateway) -> int:
    """Return the worker of a gateway that has but one, once it has served somebody."""
    with gateway.connect() as client:
        client.sendall(b"OPTIONS * HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
        assert read_answer(client).status == 200
    (pid,) = gateway.workers()
    return pid


def links(pid: int, kind: str) -> int:
    """Count a process's open descriptors of a kind, such as "pipe:"."""
    count = 0
    for link in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            count += os.readlink(link).startswith(kind)
    return count


def status(pid: int, name: str) -> int:
    """Return a number from /proc/PID/status."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return int(next(x for x in lines if x.startswith(f"{name}:")).split()[1])


def ticks(pid: int) -> int:
    """Return the clock ticks of CPU that a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])


def at_rest(read: Callable[[], int], seconds: float = 0.3) -> int:
    """Return a number once it has stayed the same for some time."""
    seen, since = read(), time.monotonic()

    def check() -> bool:
        nonlocal seen, since
        if (now := read()) != seen:
            seen, since = now, time.monotonic()
        return time.monotonic() - since > seconds

    eventually(check, 20)
    return seen


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
    now = {int(link.name) for link in Path(f"/proc/{pid}/fd").iterdir()}
    free = next(fd for fd in range(1 << 20) if fd not in now)
    soft, hard = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (free, hard))
    try:
        yield
    finally:
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (soft, hard))
