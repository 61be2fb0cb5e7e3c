"""natrun.py: unmodified programs listen on the gateway's outside address."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import sys
import threading
import time
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boxes
import kernel
import natrun_rig
import needs
import origins
import pmp
import pytest
import wait
import web
import wire
from natrun_rig import PYTHON
from natrun_rig import SERVER
from natrun_rig import Rig
from natrun_rig import users

import natrun

pytestmark = pytest.mark.end_to_end

OUTSIDE = "203.0.113.1"
MAPPINGS = 64  # at once
VSFTPD = """\
background=NO
listen=YES
anonymous_enable=YES
anon_root={folder}/ftp
secure_chroot_dir={folder}/empty
seccomp_sandbox=NO
pasv_enable=NO
connect_from_port_20=YES
xferlog_enable=YES
dual_log_enable=YES
vsftpd_log_file={folder}/vsftpd.log
log_ftp_protocol=YES
"""
NODE = """\
const server = require('net').createServer(socket => {
  socket.end(socket.remoteAddress + ':' + socket.remotePort);
});
server.listen(Number(process.argv[2]), process.argv[1], () => {
  console.log(server.address().address + ':' + server.address().port);
});
"""


@pytest.fixture(scope="module")
def rig() -> Iterator[Rig]:
    with natrun_rig.set_up() as made:
        limits = ["bind_ports=20000-29999", f"max_mappings={MAPPINGS}"]
        made.natwork("outside=203.0.113.1", "mappings=yes", *limits)
        yield made


@pytest.fixture(scope="module")
def wide() -> Iterator[Rig]:
    """Return a rig whose gateway has three addresses outside."""
    with natrun_rig.set_up() as made:
        address = ["addr", "add", "203.0.113.2/24", "dev", "wan"]
        boxes.ip("-n", made.box.name("gateway"), *address)
        outside = "outside=203.0.113.1 203.0.113.2 2001:db8:9::1"
        made.natwork(outside, "mappings=yes", "bind_ports=20000-29999")
        yield made


def call(rig: Rig, port: int, asks: bytes = b"") -> tuple[str, socket.socket]:
    """Call a port of the outside; return what is said until the end, and the socket."""

    def connect() -> socket.socket:
        return socket.create_connection((OUTSIDE, port), 10)

    sock, said = rig.box.within("outside", connect), b""
    sock.sendall(asks)
    while piece := sock.recv(1000):
        said += piece
    return said.decode(), sock


def is_open(rig: Rig, port: int) -> bool:
    """Return whether somebody listens there outside."""
    words = ["ss", "-Hltn", f"src {OUTSIDE} sport = :{port}"]
    return bool(rig.box.run("gateway", *words).stdout)


def call_often(
    rig: Rig, port: int, count: int, asks: bytes = b""
) -> list[tuple[str, str]]:
    """Call many times at once; return what was said, and who called."""
    found: list[tuple[str, str]] = []

    def one() -> None:
        said, sock = call(rig, port, asks)
        with sock:
            found.append((said, "%s:%d" % sock.getsockname()))

    threads = [threading.Thread(target=one) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def end_all(rig: Rig) -> None:
    """End the servers inside."""
    for pid in rig.box.pids("inside"):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)


@users
def test_a_server_knows_its_callers(rig: Rig, user: str) -> None:
    script = str(rig.folder / "natrun_probe.py")
    words = [PYTHON, script, "serve", f"{OUTSIDE}:20100", "50"]
    server = rig.start(user, *words, name="serve")
    assert json.loads(server.line()) == [OUTSIDE, 20100]
    found = call_often(rig, 20100, 50)
    assert len(found) == 50
    for said, caller in found:
        peer, local = json.loads(said)
        assert "%s:%d" % tuple(peer) == caller and local == [OUTSIDE, 20100]
    end_all(rig)
    server.process.wait(10)
    wait.until(lambda: not is_open(rig, 20100), 2)


@users
@pytest.mark.parametrize("kind", ["go", "node"])
def test_servers_of_other_languages(rig: Rig, user: str, kind: str) -> None:
    needs.programs("node")
    words = [natrun_rig.go_client(rig), "serve", f"{OUTSIDE}:20200"]
    if kind == "node":
        words = ["node", "-e", NODE, OUTSIDE, "20200"]
    server = rig.start(user, *words, name=kind)
    assert server.line() == f"{OUTSIDE}:20200"
    found = call_often(rig, 20200, 50)
    assert len(found) == 50
    for said, caller in found:
        assert said.strip() == caller
    server.stop()
    wait.until(lambda: not is_open(rig, 20200), 5)


@users
def test_a_web_server_logs_its_callers(rig: Rig, user: str) -> None:
    words = [PYTHON, "-u", "-m", "http.server", "-b", OUTSIDE, "20300"]
    server = rig.start(user, *words, name="http")
    assert f"on {OUTSIDE} port 20300" in server.line()
    wait.until(lambda: is_open(rig, 20300))
    found = call_often(rig, 20300, 50, b"GET / HTTP/1.0\r\n\r\n")
    assert ["Directory listing" in said for said, _ in found] == [True] * 50
    wait.until(lambda: server.err.read_text().count(f"{SERVER} - - [") == 50)
    server.stop()


@users
def test_a_port_that_is_taken_is_refused(rig: Rig, user: str) -> None:
    taken = rig.box.within("gateway", lambda: socket.create_server((OUTSIDE, 20400)))
    with taken:
        places = [f"{OUTSIDE}:20400", f"{OUTSIDE}:0", f"{OUTSIDE}:20401"]
        found = rig.probe(user, "bind_to", *places)
        again = rig.probe(user, "bind_again", places[0], places[2])
    assert again == ["EADDRINUSE", [OUTSIDE, 20401]]
    assert found[0] == "EADDRINUSE" and found[2] == [OUTSIDE, 20401]
    assert found[1][0] == OUTSIDE and 20000 <= found[1][1] <= 29999


@users
def test_a_port_of_another_run_stays_there(rig: Rig, user: str) -> None:
    script = str(rig.folder / "natrun_probe.py")
    words = [PYTHON, script, "serve", f"{OUTSIDE}:20450", "1"]
    server = rig.start(user, *words, name="first")
    assert json.loads(server.line()) == [OUTSIDE, 20450]
    assert rig.probe(user, "bind_to", f"{OUTSIDE}:20450") == ["EADDRINUSE"]
    deadline = (
        time.monotonic() + 2
    )  # the gateway closes a port a while after it is told
    try:
        while time.monotonic() < deadline:
            said, sock = call(rig, 20450)
            with sock:
                assert json.loads(said)[0] == [*sock.getsockname()]
    finally:
        end_all(rig)
        server.process.wait(10)


def with_a_short_lease(
    rig: Rig, user: str, *words: str, name: str
) -> natrun_rig.Background:
    """Start a program by natrun.py, whose mappings live for 3 s.

    The first try to renew each fails.
    """
    patch = """
natrun.LEASE, real, tries = 3, natrun.Gateway.map, []
async def map(self, *words):
    tries.append(words)
    if words and tries.count(words) == 2:
        raise natrun.failure(errno.ETIMEDOUT)
    return await real(self, *words)
natrun.Gateway.map = map"""
    command = rig.patched(user, patch, *words)
    return natrun_rig.Background(rig, command, rig.home(user) / name)


@users
def test_a_port_used_for_a_moment_is_given_back(rig: Rig, user: str) -> None:
    first = {"root": "20460", "nobody": "20470"}[user]
    script = str(rig.folder / "natrun_probe.py")
    words = [PYTHON, script, "fleeting", OUTSIDE, first, f"{SERVER}:80"]
    program = with_a_short_lease(rig, user, *words, name="fleeting")
    ports = json.loads(program.line())
    try:
        wait.until(lambda: not any(is_open(rig, port) for port in ports), 15)
        assert program.process.poll() is None
    finally:
        program.stop()


@users
def test_an_address_that_cannot_be_had_is_refused(wide: Rig, user: str) -> None:
    assert wide.probe(user, "bind_to", "[2001:db8:9::1]:20100") == ["EADDRNOTAVAIL"]
    # The second address of IPv4 is opened itself, or not at all.
    script = str(wide.folder / "natrun_probe.py")
    words = [PYTHON, script, "serve", "203.0.113.2:20101", "1"]
    server = wide.start(user, *words, name="second")
    wait.until(lambda: server.said() or server.process.poll() is not None)
    shown = wide.box.run("gateway", "ss", "-Hltn", "sport = :20101").stdout
    if server.said():
        assert "203.0.113.2:20101" in shown
    else:
        assert "[Errno 99]" in server.err.read_text()  # EADDRNOTAVAIL
    assert f"{OUTSIDE}:20101" not in shown
    end_all(wide)
    server.process.wait(10)


def test_a_port_that_another_address_has_free_is_refused(wide: Rig) -> None:
    place, others = f"{OUTSIDE}:20110", ["ss", "-Hltn", "src 203.0.113.2"]
    with wide.box.within("gateway", lambda: socket.create_server((OUTSIDE, 20110))):
        assert wide.probe("nobody", "bind_to", place) == ["EADDRINUSE"]
        wait.until(lambda: not wide.box.run("gateway", *others).stdout)
        assert pmp.mapped(wide.box, 9, 20110).port == 20110
    # A machine keeps to its address: what may have any port is told of it.
    ((host, port),) = wide.probe("nobody", "bind_to", f"{OUTSIDE}:0")
    assert host == "203.0.113.2" and port != 20110
    pmp.ask(wide.box, pmp.request(9, 0, 0))
    wait.until(lambda: not wide.box.run("gateway", *others).stdout)
    assert wide.probe("nobody", "bind_to", place) == [[OUTSIDE, 20110]]


@users
def test_a_port_of_the_settings_is_outside_too(rig: Rig, user: str) -> None:
    settings = rig.home(user) / "listen.conf"
    settings.write_text("[natrun]\nlisten = 20500-20510\n")
    script = str(rig.folder / "natrun_probe.py")
    words = ["-c", str(settings), PYTHON, script, "serve", "0.0.0.0:20505", "1"]
    server = rig.start(user, *words, name="settings")
    assert json.loads(server.line()) == ["0.0.0.0", 20505]
    said, sock = call(rig, 20505)
    with sock:
        assert json.loads(said)[0] == [*sock.getsockname()]
        assert json.loads(said)[1] == [OUTSIDE, 20505]
    # The inside calls it directly.
    near = rig.box.within(
        "gateway", lambda: socket.create_connection(("10.9.0.2", 20505), 10)
    )
    with near:
        assert json.loads(near.recv(1000))[0] == [*near.getsockname()]
    end_all(rig)
    server.process.wait(10)
    wait.until(lambda: not is_open(rig, 20505), 5)


@users
def test_a_server_has_a_socket_for_each_family(rig: Rig, user: str) -> None:
    settings = rig.home(user) / "both.conf"
    settings.write_text("[natrun]\nlisten = 20520\n")
    script = str(rig.folder / "natrun_probe.py")
    words = ["-c", str(settings), PYTHON, script, "bind_both", "20520"]
    assert rig.output(user, *words) == '[["0.0.0.0", 20520], ["::", 20520]]\n'


def test_a_port_that_is_not_bound_is_given_back(rig: Rig) -> None:
    ports = ["20530", "20531", "20532"]
    script = str(rig.folder / "natrun_probe.py")
    server = rig.start("nobody", PYTHON, script, "bind_twice", OUTSIDE, *ports)
    port = server.line()
    others = {*map(int, ports)} - {int(port)}
    try:
        assert is_open(rig, int(port)) and len(others) == 2
        wait.until(lambda: not any(is_open(rig, one) for one in others), 5)
    finally:
        server.stop()


def test_a_killed_run_leaves_when_its_lease_is_over(rig: Rig) -> None:
    user = "nobody"
    script = str(rig.folder / "natrun_probe.py")
    words = [PYTHON, script, "serve", f"{OUTSIDE}:20600", "1"]
    server = with_a_short_lease(rig, user, *words, name="lease")
    assert json.loads(server.line()) == [OUTSIDE, 20600]
    deadline = time.monotonic() + 4
    while time.monotonic() < deadline:
        assert is_open(rig, 20600)  # it is renewed, if not the first time
        time.sleep(0.1)
    os.kill(server.supervisor, signal.SIGKILL)
    server.process.wait(10)
    end_all(rig)
    wait.until(lambda: not is_open(rig, 20600), 15)


def test_a_port_that_was_lost_is_asked_for_again(rig: Rig) -> None:
    script = str(rig.folder / "natrun_probe.py")
    words = [PYTHON, script, "serve", f"{OUTSIDE}:20620", "1"]
    server = with_a_short_lease(rig, "nobody", *words, name="lost")
    assert json.loads(server.line()) == [OUTSIDE, 20620]
    with kernel.stopped(server.supervisor):
        # As when the gateway has been restarted, and somebody was faster.
        pmp.ask(rig.box, pmp.request(20620, 0, 0))
        wait.until(lambda: not is_open(rig, 20620))
        place = OUTSIDE, 20620
        other = rig.box.within("gateway", lambda: socket.create_server(place))
    with other:
        told = f"natrun: {OUTSIDE}:20620 is not free on the gateway"
        wait.until(lambda: told in server.err.read_text())
    wait.until(lambda: is_open(rig, 20620))
    end_all(rig)
    server.process.wait(10)


BOUND_AND_CONNECTED = """\
import socket, time
sock = socket.create_connection(("203.0.113.80", 80), 10, ("203.0.113.1", 20640))
print("connected", flush=True)
time.sleep(30)
"""


def test_a_socket_that_connects_needs_no_port_outside(rig: Rig) -> None:
    words = [PYTHON, "-c", BOUND_AND_CONNECTED]
    program = with_a_short_lease(rig, "nobody", *words, name="bound")
    assert program.line() == "connected"
    wait.until(lambda: not is_open(rig, 20640), 15)
    assert "not free" not in program.err.read_text()
    program.stop()


RESET_FIRST = """\
import socket, sys
listener = socket.create_server(("203.0.113.1", 20750))
print("ready", flush=True)
sys.stdin.readline()
for _ in range(2):
    with listener.accept()[0] as caller:
        caller.settimeout(5)
        try:
            print(caller.recv(9), flush=True)
        except OSError as error:
            print(type(error).__name__, flush=True)
"""


@users
def test_a_caller_that_resets_before_accept_is_one_caller(rig: Rig, user: str) -> None:
    go = rig.home(user) / "go"
    go.unlink(missing_ok=True)
    os.mkfifo(go, 0o666)
    words = ["sh", "-c", 'exec "$0" -c "$1" <"$2"', PYTHON, RESET_FIRST, str(go)]
    server = rig.start(user, *words, name="reset")
    with go.open("w") as line:
        assert server.line() == "ready"
        for reset in (True, False):
            sock = rig.box.within(
                "outside", lambda: socket.create_connection((OUTSIDE, 20750), 10)
            )
            if reset:
                time.sleep(0.3)  # it passes the gateway
                wire.reset(sock)
                time.sleep(0.3)
        sock.sendall(b"hello")
        line.write("go\n")
    assert server.line(1) == "ConnectionResetError"
    assert server.line(2) == "b'hello'"
    sock.close()
    assert server.process.wait(10) == 0


@users
def test_a_signal_is_handled_while_accept_waits(rig: Rig, user: str) -> None:
    script = str(rig.folder / "natrun_probe.py")
    words = [PYTHON, script, "waiting", f"{OUTSIDE}:20700"]
    server = rig.start(user, *words, name="waiting")
    assert server.line() == "ready"
    time.sleep(0.3)
    server.process.send_signal(signal.SIGTERM)
    assert server.line(1, 2) == "handled"
    assert server.process.wait(10) == 4


ACCEPT_IN_A_THREAD = """\
import os, socket, threading, time
listener = socket.create_server(("203.0.113.1", 20760))
def take():
    listener.accept()[0].sendall(b"taken")
    os._exit(0)
threading.Thread(target=take).start()
print("ready", flush=True)
time.sleep(30)
"""


def test_a_program_stops_while_a_thread_accepts(rig: Rig) -> None:
    server = rig.start("nobody", PYTHON, "-c", ACCEPT_IN_A_THREAD, name="threads")
    assert server.line() == "ready"
    time.sleep(0.3)
    child = server.child()
    tasks = [f"{child}/task/{name}" for name in os.listdir(f"/proc/{child}/task")]

    def states() -> list[str]:
        return [kernel.status(task, "State")[0] for task in tasks]

    os.kill(child, signal.SIGSTOP)
    wait.until(lambda: states() == ["T", "T"])
    os.kill(child, signal.SIGCONT)
    said, sock = call(rig, 20760)
    sock.close()
    assert said == "taken" and server.process.wait(10) == 0


@pytest.fixture(scope="module")
def vsftpd(rig: Rig) -> Path:
    """Run an FTP server outside that only calls back; return its log."""
    needs.programs("vsftpd")
    for name in ("ftp", "empty"):
        (rig.folder / name).mkdir()
    (rig.folder / "ftp" / "file").write_bytes(web.some_bytes(300_000))
    config = rig.folder / "vsftpd.conf"
    config.write_text(VSFTPD.format(folder=rig.folder))
    rig.box.start("outside", "vsftpd", str(config), folder=rig.folder)
    wait.until(lambda: rig.box.run("outside", "ss", "-Hltn", "sport = :21").stdout)
    return rig.folder / "vsftpd.log"


@users
def test_an_ftp_server_calls_back(rig: Rig, user: str, vsftpd: Path) -> None:
    needs.programs("tnftp", "curl")
    got = rig.home(user) / "file"
    url = f"ftp://{SERVER}/file"
    vsftpd.write_text("")
    rig.output(user, "tnftp", "-A", "-q", "20", "-o", str(got), url)
    assert got.read_bytes() == web.some_bytes(300_000)
    for option in ("--eprt", "--disable-eprt"):
        got.unlink()
        words = ["-sS", "--max-time", "20", "-P", "-", option, "-o", str(got), url]
        rig.output(user, "curl", *words)
        assert got.read_bytes() == web.some_bytes(300_000)
    listed = rig.output(user, "curl", "-sS", "-P", "-", f"ftp://{SERVER}/")
    assert "300000" in listed
    log = vsftpd.read_text()
    assert f"EPRT |1|{OUTSIDE}|" in log
    assert f"PORT {OUTSIDE.replace('.', ',')}," in log
    assert '"226 ' in log and '"500 ' not in log


@users
def test_more_files_come_by_ftp_than_mappings_at_once(
    rig: Rig, user: str, vsftpd: Path
) -> None:
    needs.programs("tnftp")
    names = [f"small{number}" for number in range(MAPPINGS + 16)]
    for name in names:
        (rig.folder / "ftp" / name).write_text(name)
    got = rig.home(user) / "small"
    got.mkdir()
    if user == "nobody":
        os.chown(got, 65534, 65534)
    get = f"cd {got} && echo 'mget small*' | timeout 50 tnftp -A -a -i {SERVER}"
    rig.natrun(user, "sh", "-c", get)
    assert {path.name: path.read_text() for path in got.iterdir()} == {
        name: name for name in names
    }


def test_mappings_that_are_off_are_told(rig: Rig) -> None:
    folder = rig.folder / "off"
    folder.mkdir()
    where = "listen=10.9.0.1:8095 10.9.0.1:8096"
    gateway = rig.box.natwork(folder, "outside=203.0.113.1", where)
    script = str(rig.folder / "natrun_probe.py")
    words = [PYTHON, script, "bind_to", f"{OUTSIDE}:20800"]
    done = rig.natrun("root", *words, gateway="10.9.0.1:8095")
    assert done.stdout == '["EADDRNOTAVAIL"]\n'
    gateway.stop()


def test_a_gateway_that_does_not_map_is_named(rig: Rig) -> None:
    probe = [PYTHON, str(rig.folder / "natrun_probe.py"), "bind_to"]
    patch = "natrun.PMP_PORT = 9"
    words = rig.patched("nobody", patch, *probe, f"{OUTSIDE}:20810")
    done = rig.box.run("inside", *words)
    assert done.stdout == '["ENETUNREACH"]\n'
    assert done.stderr == (
        f"natrun: cannot use the gateway {natrun_rig.GATEWAY}: it does not answer "
        "NAT-PMP\n"
    )


def test_a_silent_gateway_is_asked_once_who_calls(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(natrun, "FIND_TIME", 0.05)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        at = natrun.endpoint(silent.getsockname())
        gateway = types.SimpleNamespace(at=at, password="")
        self = types.SimpleNamespace(gateway=gateway)
        peer = natrun.Endpoint(at.packed, 9)
        steps = natrun.Supervisor.caller(self, peer, at)  # type: ignore[arg-type]
        assert asyncio.run(steps) == peer
        silent.setblocking(False)
        silent.accept()[0].close()
        with pytest.raises(BlockingIOError):
            silent.accept()


def test_who_leaves_the_gateway_by_the_same_port_is_not_who_calls() -> None:
    def row(destination: str, host: str) -> dict[str, Any]:
        there = {"source_ip": host, "original_source_port": 1234}
        return {"destination": destination, **there}

    rows = [row("203.0.113.80:80", "10.9.0.3"), row("10.9.0.2:8000", SERVER)]
    page = b"HTTP/1.0 200 OK\r\n\r\n" + json.dumps({"sessions": rows}).encode()

    def serve(connection: socket.socket, origin: origins.Origin) -> None:
        connection.recv(1000)
        connection.sendall(page)

    with contextlib.closing(origins.Origin(serve)) as server:
        at = natrun.Endpoint(socket.inet_aton("127.0.0.1"), server.port)
        gateway = types.SimpleNamespace(at=at, password="")
        self = types.SimpleNamespace(gateway=gateway)
        peer, own = at._replace(port=9), natrun.endpoint(("10.9.0.2", 8000))
        steps = natrun.Supervisor.caller(self, peer, own)  # type: ignore[arg-type]
        assert asyncio.run(steps) == natrun.endpoint((SERVER, 1234))


def test_a_mapper_that_is_away_for_a_moment_is_asked_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind(("127.0.0.1", 0))
        place = sock.getsockname()
    monkeypatch.setattr(natrun, "PMP_PORT", place[1])

    def answer() -> None:
        time.sleep(0.2)
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            sock.bind(place)
            sock.settimeout(10)
            sender = sock.recvfrom(100)[1]
            sock.sendto(b"\0\x80" + bytes(6) + socket.inet_aton(OUTSIDE), sender)

    thread = threading.Thread(target=answer)
    thread.start()
    self = types.SimpleNamespace(at=natrun.endpoint(place))
    found = asyncio.run(natrun.Gateway.map(self))  # type: ignore[arg-type]
    thread.join()
    assert found == socket.inet_aton(OUTSIDE)


def lines(rig: Rig) -> list[Any]:
    return [line for line in rig.gateways[0].lines() if line["proto"] == "map"]


def test_the_gateway_logs_each_caller(rig: Rig) -> None:
    callers = [line for line in lines(rig) if line["client"].startswith(SERVER)]
    assert len(callers) > 100 and sys.version_info
