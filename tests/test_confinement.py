"""A hand on one client: what ends a session; and what a worker can and may hold."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import http_wire
import kernel
import needs
import origins
import pytest
import readme
import running
import wait
import wire


def is_reset(client: socket.socket) -> bool:
    """Read to the end, and say whether it was a reset."""
    try:
        while client.recv(65536):
            pass
    except ConnectionResetError:
        return True
    return False


# A hand on one client.


def test_a_tunnel_that_is_ended_is_reset_and_no_other(
    natwork: running.Start, origin: origins.Start
) -> None:
    gateway, server = natwork("spare_workers=2"), origin(origins.echo)
    gateway.ready(2)
    with (
        http_wire.tunnel(gateway, server) as one,
        http_wire.tunnel(gateway, server) as other,
    ):
        pid = gateway.worker_of(one)
        os.kill(pid, signal.SIGTERM)
        assert is_reset(one) and wire.echoes(other)
        (line,) = gateway.lines(1)
        assert (line["pid"], line["outcome"]) == (str(pid), "operator")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
@pytest.mark.parametrize("framing", [b"Content-Length: 100", b"Connection: close"])
def test_half_an_answer_that_is_ended_does_not_look_whole(
    natwork: running.Start, origin: origins.Start, framing: bytes, number: int
) -> None:
    def half(connection: socket.socket, server: origins.Origin) -> None:
        http_wire.read_head(connection)
        connection.sendall(b"HTTP/1.1 200 OK\r\n" + framing + b"\r\n\r\nhalf of it")
        connection.recv(1)

    gateway = natwork("spare_workers=2")
    gateway.ready(2)
    with (
        http_wire.tunnel(gateway, origin(origins.echo)) as other,
        gateway.connect() as client,
    ):
        wire.send(client, http_wire.request(origin(half)))
        assert b" 200 " in http_wire.read_head(client)
        assert wire.read_exactly(client, 10) == b"half of it"
        pid = gateway.worker_of(client)
        os.kill(pid, number)
        assert is_reset(client) and wire.echoes(other)
        (line,) = gateway.lines(1)
        outcome = "operator" if number == signal.SIGTERM else "killed"
        assert (line["pid"], line["outcome"]) == (str(pid), outcome)


def test_a_request_that_waits_for_its_answer_is_ended(
    natwork: running.Start, origin: origins.Start
) -> None:
    gateway, held = natwork("spare_workers=2"), http_wire.Held()
    with gateway.connect() as client:
        wire.send(client, http_wire.request(origin(held)))
        assert held.asked.wait(10)
        os.kill(gateway.worker_of(client), signal.SIGTERM)
        assert wire.read_all(client) == b""
        held.go.set()
    assert [line["outcome"] for line in gateway.lines(1)] == ["operator"]


def test_an_idle_kept_alive_client_is_ended_and_no_other(
    natwork: running.Start, origin: origins.Start
) -> None:
    gateway, server = (
        natwork("spare_workers=2", "keepalive_timeout=60"),
        origin(origins.echo),
    )
    gateway.ready(2)
    with http_wire.tunnel(gateway, server) as other, gateway.connect() as client:
        assert (
            http_wire.exchange(
                client, http_wire.request(origin(http_wire.Script()))
            ).status
            == 200
        )
        gateway.lines(1)
        os.kill(gateway.worker_of(client), signal.SIGTERM)
        assert is_reset(client) and wire.echoes(other)
    assert [line["outcome"] for line in gateway.lines(2)] == ["ok", "closed"]


def test_an_idle_worker_that_is_ended_is_replaced(natwork: running.Start) -> None:
    gateway = natwork("spare_workers=1", "max_workers=1")
    (pid,) = gateway.ready(1)
    os.kill(pid, signal.SIGTERM)
    wait.until(lambda: gateway.idle() and gateway.idle() != [pid])
    assert not gateway.lines()


@needs.root
def test_who_waits_for_a_name_is_ended_at_once(
    daemon: running.Start, tmp_path: Path
) -> None:
    resolver = tmp_path / "resolv.conf"
    resolver.write_text("nameserver 127.0.0.77\n")
    mounted = f"mount --bind {resolver} /etc/resolv.conf && exec {sys.executable}"
    program = ["unshare", "--mount", "sh", "-c", f'{mounted} "$@"', "sh"]
    with socket.socket(type=socket.SOCK_DGRAM) as silent:
        silent.bind(("127.0.0.77", 53))
        gateway = daemon(program=[*program, str(running.ROOT / "natwork.py")])
        with gateway.connect() as client:
            wire.send(client, http_wire.request(b"name.example:80"))
            silent.settimeout(10)
            silent.recv(512)
            port = client.getsockname()[1]
            rows = json.loads(running.command("--table", "--json", cwd=tmp_path).stdout)
            (pid,) = [x["pid"] for x in rows if x["original_source_port"] == port]
            ended = time.monotonic()
            os.kill(pid, signal.SIGTERM)
            assert wire.read_all(client) == b"" and time.monotonic() < ended + 1.5
        assert [line["outcome"] for line in gateway.lines(1)] == ["operator"]


def test_all_sessions_of_an_address_are_ended_as_the_readme_says(
    natwork: running.Start, origin: origins.Start
) -> None:
    section = readme.section("Watching it")
    (line,) = re.findall(r"^    (python3 .*xargs.*)$", section, re.M)
    assert line.count("10.0.0.7") == 1
    gateway, server = natwork(), origin(origins.echo)
    gateway.ready(2)
    with contextlib.ExitStack() as stack:
        clients = []
        for host in ("127.0.0.7", "127.0.0.7", "127.0.0.8"):
            client = socket.create_connection(gateway.address, 10, (host, 0))
            clients.append(stack.enter_context(client))
            http_wire.exchange(
                client, http_wire.request(server, method=b"CONNECT"), b"CONNECT"
            )
            assert wire.echoes(client)
        subprocess.run(
            line.replace("10.0.0.7", "127.0.0.7"),
            shell=True,
            cwd=running.ROOT,
            check=True,
            timeout=30,
        )
        assert is_reset(clients[0]) and is_reset(clients[1]) and wire.echoes(clients[2])
        lines = gateway.lines(2)
    assert [line["outcome"] for line in lines] == ["operator"] * 2
    assert {line["client"].partition(":")[0] for line in lines} == {"127.0.0.7"}


# Confinement.

# natwork.py, but for what it does with a client: it says what it can do.
TRIER = """
import os, socket, sys, threading
sys.path.insert(0, {root!r})
import natwork

def attempt(what):
    try:
        return str(what())
    except (OSError, RuntimeError) as error:
        return str(error)

def serve(worker):
    client = worker.accept()
    if not client:
        return False
    with socket.socket() as new:  # what it needs it still can
        pass
    lines = [
        attempt(os.fork),
        attempt(threading.Thread(target=print).start),
        attempt(lambda: socket.getaddrinfo(b"localhost", 80)[0][4][1]),
    ]
    client.stream.sock.sendall("\\n".join(lines).encode())
    client.stream.close()
    return True

natwork.warm = lambda generation: None
natwork.serve_client = serve
natwork.main()
"""


def test_a_worker_can_neither_fork_nor_start_a_thread(daemon: running.Start) -> None:
    script = TRIER.format(root=str(running.ROOT))
    gateway = daemon(program=[sys.executable, "-c", script], user="nobody")
    with gateway.connect() as client:
        fork, thread, name = wire.read_all(client).decode().split("\n")
    assert fork.startswith("[Errno 11] ")  # EAGAIN
    assert thread == "can't start new thread" and name == "80"
    # And the master still can.
    for pid in gateway.workers():
        os.kill(pid, signal.SIGKILL)
    with gateway.connect() as client:
        assert wire.read_all(client)


def test_a_worker_is_limited_and_the_master_is_not(natwork: running.Start) -> None:
    gateway = natwork()
    for pid in [gateway.process.pid, *gateway.ready(8)]:
        limits = Path(f"/proc/{pid}/limits").read_text()
        is_none = bool(re.search(r"^Max processes +0 +0 ", limits, re.M))
        assert is_none == (pid != gateway.process.pid), limits


def test_a_worker_holds_no_descriptor_but_its_own(
    daemon: running.Start, origin: origins.Start
) -> None:
    gateway = daemon(
        listen="127.0.0.1:0 127.0.0.2:0", pidfile="natwork.pid", drain_timeout="2"
    )
    server, master = origin(origins.echo), gateway.process.pid
    gateway.ready(8)
    # Clients of two generations, while a third one serves.
    with http_wire.tunnel(gateway, server), http_wire.tunnel(gateway, server):
        gateway.hangup()
        with http_wire.tunnel(gateway, server):
            gateway.hangup()
            workers = gateway.ready(8)
            listeners = kernel.opened(master, "socket:").values()
            assert len(listeners) == 2
            for pid in workers:
                here = kernel.opened(pid)
                numbers = {here.pop(n) for n in (0, 1, 2)}
                assert not any(link.startswith("socket:") for link in numbers)
                found = sorted(re.sub(r":\[\d+\]", "", x) for x in here.values())
                assert found == [
                    "/memfd:natwork (deleted)",  # the scoreboard: its map,
                    "/memfd:natwork (deleted)",  # and itself
                    str(gateway.log),
                    "anon_inode:[eventpoll]",  # to be idle
                    "pipe",  # the lifeline
                    "socket",
                    "socket",
                ], (kernel.title(pid), here)
                assert sorted(kernel.opened(pid, "socket:").values()) == sorted(
                    listeners
                )


def memory(pid: int) -> bytes:
    """Return all that a process has in its memory, of the scoreboard the first MiB."""
    pieces = []
    with open(f"/proc/{pid}/maps") as maps, open(f"/proc/{pid}/mem", "rb", 0) as mem:
        for line in maps:
            begin, end = (int(x, 16) for x in line.split()[0].split("-"))
            size = min(end - begin, 1 << 20) if "memfd:" in line else end - begin
            with contextlib.suppress(OSError, ValueError, OverflowError):
                mem.seek(begin)
                pieces.append(mem.read(size))
    return b"".join(pieces)


@needs.root
@pytest.mark.parametrize("leaves", [False, True], ids=["who is there", "who was"])
def test_no_worker_contains_bytes_of_another_ones_client(
    natwork: running.Start, origin: origins.Start, leaves: bool
) -> None:
    gateway = natwork("clients_per_worker=1", "spare_workers=3", "log_format=json")
    secret = b"S3cr3t-of-A"  # this process's own copies are not looked at
    server = origin(http_wire.Script(http_wire.OK))
    with (
        gateway.connect() as client,
        http_wire.tunnel(gateway, origin(origins.echo)) as open_one,
    ):
        fields = (b"Cookie: name=" + secret, b"Content-Length: 30")
        body = (secret + bytes(30))[:30]
        asked = http_wire.request(
            server, *fields, method=b"POST", path=b"/?q=" + secret, body=body
        )
        assert http_wire.exchange(client, asked).status == 200
        assert wire.echoes(open_one, secret)
        hers = {gateway.worker_of(client), gateway.worker_of(open_one)}
        assert all(secret in memory(pid) for pid in hers)  # it can be found at all
        if leaves:
            client.close()
            open_one.close()
            wait.until(lambda: not hers & set(gateway.workers()))
        with http_wire.tunnel(gateway, origin(origins.echo)) as another:
            assert wire.echoes(another)
            gateway.ready(3)
            others = {gateway.process.pid, *gateway.workers()} - hers
            assert gateway.worker_of(another) in others and len(others) >= 5
            assert not [pid for pid in others if secret in memory(pid)]
