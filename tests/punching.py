"""natpunch.py, running in a lab: a server, and two peers."""

from __future__ import annotations

import contextlib
import os
import re
import select
import subprocess
import sys
import time
from collections.abc import Iterator

import boxes
import running
from natlab import Lab

PROGRAM = str(running.ROOT / "natpunch.py")
SECRET = "a secret of the tests"
ENVIRONMENT = {"NATPUNCH_SECRET": SECRET}
LINE = re.compile(
    r"natpunch: (?:direct \S+ \((\w+-\w+), (\S+) s\)|relay \((\w+-\w+)\))"
)


def words(
    *arguments: str, python: str = sys.executable, changed: str = ""
) -> list[str]:
    """Return the words that run natpunch.py, perhaps with some names changed."""
    if not changed:
        return [python, PROGRAM, *arguments]
    code = f"import sys; sys.path[0] = {str(running.ROOT)!r}; import natpunch; "
    code += f"{changed}; sys.exit(natpunch.main())"
    return [python, "-c", code, *arguments]


def read_line(process: subprocess.Popen[bytes], seconds: float = 15) -> str:
    """Return the next line that a program says."""
    assert process.stderr
    fd, line, deadline = process.stderr.fileno(), b"", time.monotonic() + seconds
    while not line.endswith(b"\n"):
        left = max(0, deadline - time.monotonic())
        assert select.select([fd], [], [], left)[0], f"said nothing in time: {line!r}"
        byte = os.read(fd, 1)
        if not byte:
            break
        line += byte
    return line.decode()


def got(process: subprocess.Popen[bytes], seconds: float = 15) -> str:
    """Return what a peer got: "direct" or "relay", or what it says else."""
    while True:
        line = read_line(process, seconds)
        if match := LINE.match(line):
            return "relay" if match[3] else "direct"
        if not line or "waiting" not in line:
            return line or f"ended with {process.wait(5)}"


@contextlib.contextmanager
def server(lab: Lab, *arguments: str, **environment: str) -> Iterator[str]:
    """Run a server at both addresses; yield the address that clients are given."""
    command = words("serve", *lab.servers, *arguments)
    process = lab.start("server", *command, **environment)
    for address in lab.servers:
        said = read_line(process)
        assert said == f"natpunch: serving on {address}:3478 and 3479\n"
    yield lab.servers[0]
    process.terminate()
    assert process.wait(10) == 0 and process.stderr
    os.set_blocking(process.stderr.fileno(), False)  # a relay may have it, too
    assert b"Traceback" not in (process.stderr.read() or b"")


def peer(
    lab: Lab,
    place: str,
    *arguments: str,
    python: str = sys.executable,
    changed: str = "",
    **environment: str,
) -> subprocess.Popen[bytes]:
    """Start a peer."""
    command = words("-s", lab.servers[0], *arguments, python=python, changed=changed)
    return lab.start(place, *command, **{**ENVIRONMENT, **environment})


def pids(lab: Lab, place: str) -> list[int]:
    """Return the processes that live in a namespace."""
    return [int(pid) for pid in boxes.ip("netns", "pids", lab.name(place)).split()]


def talk(one: subprocess.Popen[bytes], other: subprocess.Popen[bytes]) -> None:
    """Let two peers send each other something, and end well."""
    for process, text in ((one, b"from one\n"), (other, b"from the other\n")):
        assert process.stdin
        process.stdin.write(text)
        process.stdin.close()
        process.stdin = None
    for process, text in ((other, b"from one\n"), (one, b"from the other\n")):
        out, said = process.communicate(timeout=15)
        assert (process.returncode, out) == (0, text), said
