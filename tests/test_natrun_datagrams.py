"""natrun.py: the datagrams of unmodified programs, as if on the gateway."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import errno
import functools
import os
import re
import resource
import signal
import socket
import threading
import types
from collections.abc import Iterator
from pathlib import Path

import boxes
import kernel
import natrun_rig
import needs
import pytest
import wait
from natrun_rig import PYTHON
from natrun_rig import SERVER
from natrun_rig import SERVER6
from natrun_rig import Rig
from natrun_rig import users

import natrun

pytestmark = pytest.mark.end_to_end

OTHER = "203.0.113.81"
OWN = "192.0.2.77"  # an address of the machine inside, and not of the inside


class Echo:
    """A server of UDP that says what came from whom; "call HOST:PORT" has another."""

    def __init__(self, host: str, port: int = 0) -> None:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self.sock = socket.socket(family, socket.SOCK_DGRAM)
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 22)
        self.sock.bind((host, port))
        self.port = self.sock.getsockname()[1]
        self.got = 0
        self.place = f"[{host}]:{self.port}" if ":" in host else f"{host}:{self.port}"
        threading.Thread(target=self.run, daemon=True).start()

    def run(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                data, sender = self.sock.recvfrom(65535)
                if data == b"stop":
                    return
                self.got += 1
                if data.startswith(b"call "):
                    host, _, port = data[5:].decode().rpartition(":")
                    sender_text = b"%s:%d" % (sender[0].encode(), sender[1])
                    self.sock.sendto(b"pass " + sender_text, (host, int(port)))
                elif data == b"nothing":
                    self.sock.sendto(b"", sender)
                elif data.startswith(b"pass "):
                    host, _, port = data[5:].decode().rpartition(":")
                    self.sock.sendto(b"from a third", (host, int(port)))
                else:
                    self.sock.sendto(data + b" from " + sender[0].encode(), sender)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self.sock.sendto(b"stop", self.sock.getsockname())
        self.sock.close()


@pytest.fixture(scope="module")
def rig() -> Iterator[Rig]:
    with natrun_rig.set_up() as made:
        made.natwork("outside=203.0.113.1 2001:db8:9::1")
        made.web.write("page", b"a page")
        yield made


@pytest.fixture
def echoes(rig: Rig) -> Iterator[list[Echo]]:
    """Run four servers outside, and one on the gateway's inside address."""
    hosts = (SERVER, OTHER, SERVER, OTHER)
    make = functools.partial
    made = [rig.box.within("outside", make(Echo, host)) for host in hosts]
    made.append(rig.box.within("outside", make(Echo, SERVER6)))
    made.append(rig.box.within("gateway", make(Echo, "10.9.0.1")))
    yield made
    for one in made:
        one.close()


@pytest.fixture(scope="module")
def narrow(rig: Rig) -> Iterator[str]:
    """Run a gateway that has no IPv6 outside; return where it is."""
    folder = rig.folder / "narrow"
    folder.mkdir()
    where = "listen=10.9.0.1:8092 10.9.0.1:8093"
    gateway = rig.box.natwork(folder, where, "outside=203.0.113.1")
    yield "10.9.0.1:8092"
    gateway.stop()


@pytest.fixture(params=["wide", "narrow"])
def at(request: pytest.FixtureRequest, narrow: str) -> str:
    """Return where a gateway is, one with IPv6 outside and one without."""
    return narrow if request.param == "narrow" else natrun_rig.GATEWAY


@users
def test_one_socket_has_many_peers(rig: Rig, user: str, echoes: list[Echo]) -> None:
    places = [one.place for one in echoes[:4]]
    found = rig.probe(user, "peers", *places)
    expected = sorted([*place.rsplit(":", 1)] for place in places)
    assert [[host, str(port)] for host, port, _ in found] == expected
    assert {said for _, _, said in found} == {"hello from 203.0.113.1"}
    ((host, _, said),) = rig.probe(user, "peers", echoes[4].place)
    assert (host, said) == (SERVER6, "hello from 2001:db8:9::1")


@users
def test_a_connected_socket(rig: Rig, user: str, echoes: list[Echo]) -> None:
    four = ["hello from 203.0.113.1", "203.0.113.1", SERVER]
    assert rig.probe(user, "connected", echoes[0].place) == four
    six = ["hello from 2001:db8:9::1", "2001:db8:9::1", SERVER6]
    assert rig.probe(user, "connected", echoes[4].place) == six
    client = natrun_rig.go_client(rig)
    said = rig.output(user, client, "datagram", echoes[1].place)
    assert said == "hello from 203.0.113.1\n"


def test_an_empty_datagram_comes(rig: Rig, echoes: list[Echo]) -> None:
    for one in echoes[0], echoes[4]:
        assert rig.probe("nobody", "emptied", one.place) == [one.place, ""]


def test_what_a_program_sends_last_goes_out(rig: Rig) -> None:
    echo = rig.box.within("outside", lambda: Echo(SERVER))
    for number in range(1, 6):
        command = f"echo x >/dev/udp/{SERVER}/{echo.port}"
        rig.output("nobody", "bash", "-c", command)
        wait.until(lambda number=number: echo.got == number, 5)
    echo.close()


def test_ports_of_the_namespace_are_not_the_machines(rig: Rig) -> None:
    code = """if True:
        import socket
        bound, connected = [socket.socket(2, socket.SOCK_DGRAM) for _ in range(2)]
        bound.bind(("", 0))
        connected.connect(("203.0.113.80", 9))
        print(*(sock.getsockname()[1] for sock in (bound, connected)))"""
    machines, own = rig.output("nobody", PYTHON, "-c", code).split()
    first, last = rig.box.get("inside", "ipv4/ip_local_port_range").split()
    assert int(first) <= int(machines) <= int(last)
    assert not int(first) <= int(own) <= int(last)


@pytest.mark.parametrize("port", [53, 9])
def test_what_is_neither_tcp_nor_udp_is_not_connected(rig: Rig, port: int) -> None:
    code = f"""if True:
        import errno, socket
        for kind, protocol in (socket.SOCK_RAW, 1), (socket.SOCK_DGRAM, 136):
            try:
                sock = socket.socket(socket.AF_INET, kind, protocol)
            except OSError:  # the kernel has no UDP-Lite
                continue
            print(errno.errorcode[sock.connect_ex(({SERVER!r}, {port}))])"""
    assert {*rig.output("root", PYTHON, "-c", code).split()} == {"ENETUNREACH"}


@users
def test_the_inside_is_reached_directly(
    rig: Rig, user: str, echoes: list[Echo]
) -> None:
    found = rig.probe(user, "near_datagrams", echoes[5].place)
    assert found["lan"] == [["10.9.0.1", echoes[5].port, "hello from 10.9.0.2"]]
    assert found["loopback"] == ["127.0.0.1", "pingpong"]


@pytest.mark.parametrize(
    ("host", "caller"),
    [
        *(("0.0.0.0", caller) for caller in ("itself", "inside", "gateway")),
        *(("::", caller) for caller in ("inside", "gateway")),
    ],
)
def test_a_server_on_any_address_is_reached_from_near(
    rig: Rig, host: str, caller: str
) -> None:
    script = str(rig.folder / "natrun_probe.py")
    words = [PYTHON, script, "answer_datagrams", host]
    server = rig.start("nobody", *words, name="near")
    port, six = int(server.line()), host == "::"
    if caller == "itself":
        assert server.line(1, 5) == "awake"
    else:
        own, gateway = ("fd00:9::2", "fd00:9::1") if six else ("10.9.0.2", "10.9.0.1")
        here = (own if six else "127.0.0.1"), gateway  # ::1 leads into no namespace
        there = here[0], own
        far = caller == "gateway"
        family = socket.AF_INET6 if six else socket.AF_INET
        make = functools.partial(socket.socket, family, socket.SOCK_DGRAM)
        with rig.box.within(caller, make) as sock:
            sock.settimeout(5)
            sock.sendto(b"hello", (there[far], port))
            said, sender = sock.recvfrom(1000)
        assert said.decode().replace("::ffff:", "") == f"hello from {here[far]}"
        assert sender[:2] == (there[far], port)
    server.stop()


def test_a_server_on_any_address_has_a_port_of_the_machine(rig: Rig) -> None:
    places = ["0.0.0.0:5400", "0.0.0.0:5400", "[::]:5400", "0.0.0.0:5400"]
    assert rig.probe("nobody", "rebound", *places) == ["ok"] * 4
    with rig.box.within("inside", lambda: Echo("127.0.0.1", 5400).sock):
        found = rig.probe("nobody", "rebound", *places, "0.0.0.0:5401")
    assert found == [*["EADDRINUSE"] * 4, "ok"]


@users
def test_loopback_is_there_in_ipv6(rig: Rig, user: str, at: str) -> None:
    found = rig.probe(user, "paired_datagrams", "::1", gateway=at)
    assert found == ["pingpong", "::1", True]


@users
def test_the_inside_is_reached_in_ipv6(rig: Rig, user: str, at: str) -> None:
    echo = rig.box.within("gateway", lambda: Echo("fd00:9::1"))
    found = rig.natrun(user, *probe(rig, "peers", echo.place), gateway=at)
    echo.close()
    expected = f'[["fd00:9::1", {echo.port}, "hello from fd00:9::2"]]\n'
    assert (found.stdout, found.stderr) == (expected, "")


@pytest.mark.parametrize("server", ["::1", "fe80::53%lan"])
def test_names_are_asked_for_at_a_server_of_ipv6(
    rig: Rig, at: str, server: str
) -> None:
    settings = Path("/etc/netns", rig.box.name("inside"), "resolv.conf")
    before = settings.read_text()
    settings.write_text(f"nameserver {server}\noptions timeout:2 attempts:1\n")
    try:
        words = ["curl", "-sS", "--max-time", "15", "http://www.example.com/page"]
        done = rig.natrun("nobody", *words, gateway=at)
    finally:
        settings.write_text(before)
    assert (done.stdout, done.stderr) == ("a page", "")


def probe(rig: Rig, *words: str) -> list[str]:
    """Return the words that run a function of natrun_probe.py."""
    return [PYTHON, str(rig.folder / "natrun_probe.py"), *words]


def test_a_fault_in_the_loop_is_a_line_and_no_traceback(rig: Rig, at: str) -> None:
    script = rig.home("nobody") / "faulty.py"
    lines = [
        "import sys",
        f"sys.path.insert(0, {str(rig.tool.parent)!r})",
        "import natrun",
        "natrun.Datagrams.read_cable = lambda self: 1 // len(self.cable.recv(1)[1:])",
        "sys.exit(natrun.main())",
    ]
    script.write_text("\n".join(lines))
    code = "from socket import *; socket(2, 2).sendto(b'x', ('203.0.113.80', 9))"
    command = [PYTHON, str(script), "-g", at, PYTHON, "-c", code]
    done = rig.box.run("inside", *command)
    assert done.returncode == 0
    assert "natrun: fault: " in done.stderr and "ZeroDivisionError" in done.stderr
    assert all(line.startswith("natrun: ") for line in done.stderr.splitlines())


@pytest.mark.parametrize(
    "settings", [f"direct = {OWN}/32", "redirect = no", "direct_ports = {port}"]
)
def test_settings_are_for_datagrams_too(rig: Rig, settings: str) -> None:
    file = rig.home("nobody") / "direct.conf"
    name = rig.box.name("inside")
    boxes.ip("-n", name, "addr", "add", f"{OWN}/32", "dev", "lo")
    servers = [rig.box.within("inside", functools.partial(Echo, OWN, 0))]
    if settings == "redirect = no":  # its names are the machine's own, too
        servers.append(rig.box.within("inside", functools.partial(Echo, OWN, 53)))
    file.write_text(f"[natrun]\n{settings.format(port=servers[0].port)}\n")
    try:
        for one in servers:
            words = probe(rig, "unconnected", one.place)
            done = rig.natrun("nobody", "-c", str(file), *words)
            assert done.stdout.startswith('"hello from '), (one.place, done)
    finally:
        for one in servers:
            one.close()
        boxes.ip("-n", name, "addr", "del", f"{OWN}/32", "dev", "lo")


@users
def test_a_program_is_given_no_socket_of_ours(rig: Rig, user: str) -> None:
    assert rig.probe(user, "inherited") == []


def test_a_burst_of_datagrams_goes_through(rig: Rig) -> None:
    echo = rig.box.within("outside", lambda: Echo(SERVER))
    started = rig.start("nobody", *probe(rig, "burst", echo.place, "400"), name="burst")
    wait.until(lambda: echo.got >= 4)
    wait.at_rest(lambda: echo.got, 1)
    started.process.terminate()
    echo.close()
    assert echo.got == 404


def test_a_dead_gateway_is_told_once_and_nothing_comes_late(rig: Rig) -> None:
    home, where = rig.home("nobody"), "listen=10.9.0.1:8094 10.9.0.1:8095"
    folders = [rig.folder / "first", rig.folder / "again"]
    for folder in folders:
        folder.mkdir()
    echo = rig.box.within("outside", lambda: Echo(SERVER))
    gateway = rig.box.natwork(folders[0], where)
    inner = ["env", f"TMPDIR={home}", *probe(rig, "outlasting", echo.place)]
    command = rig.command("nobody", *inner, gateway="10.9.0.1:8094")
    started = natrun_rig.Background(rig, command, home / "outlasting")
    assert started.line() == "stopped"
    os.killpg(gateway.process.pid, signal.SIGKILL)
    gateway.process.wait(10)
    (home / "stopped").touch()
    assert started.line(1) == "again"
    gateway = rig.box.natwork(folders[1], where)
    (home / "again").touch()
    found = started.line(2, 30)
    gateway.stop()
    echo.close()
    assert started.process.wait(10) == 0
    said = started.err.read_text().splitlines()
    told = [line for line in said if "datagrams" in line]
    blame = "natrun: cannot send datagrams by 10.9.0.1:8094: connection "
    assert told[-1] == f"{blame}refused"
    assert told[:-1] in ([], [f"{blame}reset by peer"])  # while it was being killed
    assert '"first"' in found and '"last"' in found and "stale" not in found


def test_a_gateway_that_had_no_power_is_missed(rig: Rig, echoes: list[Echo]) -> None:
    address = ["ip", "addr", "add", "10.9.0.3/24", "dev", "lan"]
    assert rig.box.run("gateway", *address).returncode == 0
    folders = [rig.folder / "before", rig.folder / "after"]
    for folder in folders:
        folder.mkdir()
    listen = "listen=10.9.0.3:8096 10.9.0.3:8097"
    gateway = rig.box.natwork(folders[0], listen)
    words = ["-g", "10.9.0.3:8096", *probe(rig, "outliving", SERVER, echoes[0].place)]
    command = rig.patched("nobody", "natrun.ALIVE_TIME = 5", *words)
    started = natrun_rig.Background(rig, command, rig.home("nobody") / "outliving")
    assert started.line() == "ready"
    rig.box.run("gateway", "ip", "addr", "del", *address[3:])  # it tells nobody
    os.killpg(gateway.process.pid, signal.SIGKILL)
    gateway.process.wait(10)
    rig.box.run("gateway", *address)
    gateway = rig.box.natwork(folders[1], listen)
    assert started.line(1, 40) == '["ECONNRESET", "hello"]'
    gateway.stop()
    assert started.process.wait(10) == 0
    rig.box.run("gateway", "ip", "addr", "del", *address[3:])


@pytest.mark.parametrize("anyone", ["yes", "no"])
def test_a_third_party(rig: Rig, echoes: list[Echo], anyone: str) -> None:
    folder = rig.folder / f"anyone-{anyone}"
    folder.mkdir()
    settings = ["listen=10.9.0.1:8090", f"udp_from_anyone={anyone}"]
    gateway = rig.box.natwork(folder, *settings, "listen=10.9.0.1:8090 10.9.0.1:8091")
    words = ["third_party", echoes[0].place, echoes[1].place]
    found = rig.probe("nobody", *words, gateway="10.9.0.1:8090")
    assert found == ([[OTHER, "from a third"]] if anyone == "yes" else [])
    gateway.stop()


@users
def test_names_are_asked_for_in_every_way(rig: Rig, user: str) -> None:
    needs.programs("drill", "node", "getent")
    assert rig.probe(user, "query", "www.example.com") == SERVER
    said = rig.output(user, "getent", "ahosts", "dual-stack.example.com")
    assert said.startswith(SERVER)
    assert SERVER6 in rig.output(user, "getent", "ahosts", "six.example.com")
    drilled = rig.output(user, "drill", "@8.8.8.8", "www.example.com")
    assert re.search(rf"^www\.example\.com\.\s+5\s+IN\s+A\s+{SERVER}$", drilled, re.M)
    none = rig.output(user, "drill", "nobody.example.com")
    assert "rcode: NXDOMAIN" in none
    back = rig.output(user, "drill", "-x", SERVER)
    assert re.search(r"PTR\s+www\.example\.com", back)
    client = natrun_rig.go_client(rig)
    assert rig.output(user, client, "lookup", "www.example.com") == f"[{SERVER}]\n"
    script = "require('dns').resolve4('www.example.com', (e, a) => console.log(e, a))"
    assert rig.output(user, "node", "-e", script) == f"null [ '{SERVER}' ]\n"


def test_no_datagram_of_many_has_a_wrong_source(rig: Rig, echoes: list[Echo]) -> None:
    places = [one.place for one in echoes[:4]]
    found = rig.probe("nobody", "many", "100000", *places)
    assert found["wrong"] == 0 and found["sent"] >= 99_000
    assert found["got"] > 0.99 * found["sent"]


@users
def test_settings_keep_datagrams_local(rig: Rig, user: str, echoes: list[Echo]) -> None:
    settings = rig.home(user) / "udp.conf"
    script = str(rig.folder / "natrun_probe.py")
    settings.write_text("[natrun]\nudp = no\n")
    words = ["-c", str(settings), PYTHON, script]
    assert rig.output(user, *words, "make_datagram_socket") == '"EACCES"\n'
    settings.write_text("[natrun]\nudp = no\n[python3]\nudp = local\n")
    said = rig.output(user, *words, "near_datagrams", echoes[5].place)
    assert '"hello from 10.9.0.2"' in said
    connect = f"import socket; socket.socket(2, 2).connect(({SERVER!r}, 9))"
    rig.output(user, "-c", str(settings), PYTHON, "-c", connect)
    # Names are asked for, still.
    page = rig.output(
        user, "-c", str(settings), "curl", "-sS", "http://203.0.113.80/page"
    )
    assert page == "a page"


@users
def test_without_a_namespace_there_are_names(
    rig: Rig, user: str, echoes: list[Echo]
) -> None:
    script = str(rig.folder / "natrun_probe.py")
    limit = 'echo 0 >/proc/sys/user/max_user_namespaces; exec "$@"'
    inner = rig.command(
        "root",
        "sh",
        "-c",
        f"curl -sS http://www.example.com/page; "
        f"{PYTHON} {script} errors {SERVER}:80; {PYTHON} {script} connected "
        f"{echoes[0].place}",
    )
    before = natrun_rig.UNPRIVILEGED if user == "nobody" else []
    words = [*before, "unshare", "-U", "-r", "sh", "-c", limit, "sh", *inner]
    done = rig.box.run("inside", *words)
    assert done.stdout.startswith('a page{"203.0.113.80:80": {"blocking": ["ok"]')
    said = [line for line in done.stderr.splitlines() if line.startswith("natrun: ")]
    assert said == [
        "natrun: datagrams are not carried, but for names: the kernel gives no "
        "namespace: no space left on device"
    ]
    assert "Network is unreachable" in done.stderr
    settings = rig.home(user) / "none.conf"
    settings.write_text("[natrun]\nudp = no\n")
    probe = [PYTHON, script, "make_datagram_socket"]
    inner = rig.command("root", "-c", str(settings), *probe)
    words = [*before, "unshare", "-U", "-r", "sh", "-c", limit, "sh", *inner]
    assert rig.box.run("inside", *words).stdout == '"EACCES"\n'


def without_namespaces(rig: Rig, user: str, *words: str) -> list[str]:
    """Return the words that run others where nobody may make a namespace."""
    limit = 'echo 0 >/proc/sys/user/max_user_namespaces; exec "$@"'
    before = natrun_rig.UNPRIVILEGED if user == "nobody" else []
    return [*before, "unshare", "-U", "-r", "sh", "-c", limit, "sh", *words]


@users
def test_a_socket_of_the_inside_reaches_nothing_else(
    rig: Rig, user: str, echoes: list[Echo]
) -> None:
    code = """if True:
        import errno, socket
        sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        sock.bind(("10.9.0.2", 0))
        sock.settimeout(5)
        for host, port in %r:
            try:
                sock.sendto(b"hello", (host, port))
                print(sock.recv(99).decode())
            except OSError as error:
                print(errno.errorcode[error.errno])"""
    places = [one.sock.getsockname() for one in (echoes[5], echoes[0])]
    said = rig.output(user, PYTHON, "-c", code % places)
    assert said == "hello from 10.9.0.2\nENETUNREACH\n"


@users
@pytest.mark.parametrize("kind", ["a plain server", "no namespace"])
def test_datagrams_that_are_not_carried_are_told(
    rig: Rig, user: str, echoes: list[Echo], kind: str
) -> None:
    gateway = "socks5://10.9.0.1:8080" if kind == "a plain server" else "10.9.0.1:8080"
    # What is not connected goes where the machine's routes lead: here nowhere.
    with rig.barred(SERVER, how="blackhole"):
        words = probe(rig, "unconnected", echoes[0].place)
        if kind == "a plain server":
            command = rig.command(user, *words, gateway=gateway)
        else:
            inner = rig.command("root", *words, gateway=gateway)
            command = without_namespaces(rig, user, *inner)
        done = rig.box.run("inside", *command)
    assert (done.returncode, done.stdout) == (0, '"EINVAL"\n')
    assert done.stderr.count("natrun: datagrams are not carried") == 1


def test_a_stopped_helper_stops_nobody_else(rig: Rig) -> None:
    home = rig.home("nobody")
    words = ["env", f"TMPDIR={home}", *probe(rig, "beside", f"{SERVER}:80")]
    started = rig.start("nobody", *words, name="stopped")
    assert started.line() == "ready"
    helper = min(kernel.children(started.supervisor))  # the command was started later
    os.kill(helper, signal.SIGSTOP)
    try:
        (home / "beside").touch()
        assert started.line(1) == "connected before"
    finally:
        os.kill(helper, signal.SIGCONT)
    assert started.line(2) == '"made"'
    assert started.process.wait(10) == 0


@pytest.fixture
def helper() -> Iterator[natrun.Helper]:
    """Start a helper, as a test has changed it."""
    made = natrun.Helper([], [])
    yield made
    made.control.close()
    os.waitpid(made.pid, 0)


@pytest.fixture
def tunnel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Show the device that a new namespace has where the kernel has its module."""
    names = [*socket.if_nameindex(), (77, "tunl0")]
    monkeypatch.setattr(socket, "if_nameindex", lambda: names)


@pytest.fixture
def faulty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the namespace fail in a way that nobody thought of."""
    monkeypatch.setattr(natrun, "make_namespace", lambda *_: {}["namespace"])


def test_a_namespace_may_have_other_devices(
    tunnel: None, helper: natrun.Helper
) -> None:
    assert helper.barred == ""


def test_a_helper_outlives_a_fault(faulty: None, helper: natrun.Helper) -> None:
    assert helper.barred == "the kernel gives no namespace: input/output error"
    asyncio.run(helper.make(socket.AF_INET, socket.SOCK_DGRAM)).close()


@pytest.mark.parametrize("code", [errno.EPERM, errno.EACCES, errno.ENOSPC])
def test_a_program_is_told_why_it_has_no_socket(code: int) -> None:
    one, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with one, other:
        other.send(b"%d" % code)
        helper = types.SimpleNamespace(control=one)
        with pytest.raises(OSError, match=os.strerror(code)) as told:
            natrun.Helper.take(helper)  # type: ignore[arg-type]
    assert told.value.errno == code


def test_a_socket_that_there_is_no_room_for_is_told() -> None:
    one, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    with one, other:
        natrun.give(other, socket.socket)
        helper = types.SimpleNamespace(control=one)
        resource.setrlimit(resource.RLIMIT_NOFILE, (0, limits[1]))
        try:
            with pytest.raises(OSError, match="Too many open files"):
                natrun.Helper.take(helper)  # type: ignore[arg-type]
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_sockets_that_cannot_be_looked_up_are_not_gone() -> None:
    datagrams = natrun.Datagrams.__new__(natrun.Datagrams)
    datagrams.helper = types.SimpleNamespace(pid=os.getpid())  # type: ignore[assignment]
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind(("127.0.0.1", 0))
        resource.setrlimit(resource.RLIMIT_NOFILE, (0, limits[1]))
        try:
            with pytest.raises(OSError, match="Too many open files"):
                datagrams.ports()
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        assert sock.getsockname()[1] in datagrams.ports()


def make_names() -> natrun.Names:
    settings = types.SimpleNamespace(user="", password="", dns="gateway")
    programs = collections.defaultdict(lambda: settings)
    return natrun.Names(natrun.Gateway(natrun.NOWHERE, {}, programs))


@pytest.mark.parametrize(
    "query", [b"", b"\7", b"\7\7\1\0\0\1", bytes(40), b"\xff" * 40]
)
def test_what_is_no_query_is_refused(query: bytes) -> None:
    said: list[bytes] = []
    server = natrun.Endpoint(b"\x08\x08\x08\x08", 53)
    asyncio.run(make_names().answer(query, server, "?", said.append))
    (head,) = said
    assert head[:2] == query.ljust(2, b"\0")[:2] and head[2] & 0x80 and head[3] & 0xF


@pytest.mark.parametrize("length", [253, 254, 299])
def test_a_name_of_any_length_is_answered(length: int) -> None:
    name = (b"a" * 49 + b".") * 6
    labels = name[:length].split(b".")
    question = b"".join(bytes([len(one)]) + one for one in labels) + b"\0"
    query = b"\7\7\1\0\0\1" + bytes(6) + question + b"\0\1\0\1"
    said: list[bytes] = []
    names, server = make_names(), natrun.Endpoint(b"\x08\x08\x08\x08", 53)
    names.gateway.natwork = True
    with contextlib.suppress(ValueError):
        asyncio.run(names.answer(query, server, "?", said.append))
    assert len(said) == 1 and said[0][:2] == query[:2]


@pytest.mark.parametrize(
    ("option", "size", "fits"),
    [
        (b"", 512, True),
        (b"", 513, False),
        (b"\0\0\x29\4\xd0" + bytes(6), 1232, True),  # RFC 6891 section 6.1.2
        (b"\0\0\x29\4\xd0" + bytes(6), 1233, False),
        (b"\0\0\x29\0\0" + bytes(6), 512, True),
    ],
)
def test_an_answer_without_room_is_to_be_asked_for_by_tcp(
    monkeypatch: pytest.MonkeyPatch, option: bytes, size: int, fits: bool
) -> None:
    question = b"\3www\7example\3com\0\0\x10\0\1"  # TXT
    query = b"\7\7\1\0\0\1" + bytes(5) + bytes([bool(option)]) + question + option
    names, server = make_names(), natrun.Endpoint(b"\x08\x08\x08\x08", 53)
    said: list[bytes] = []

    async def forward(*_: object) -> bytes:
        return b"a" * size

    monkeypatch.setattr(names, "forward", forward)
    asyncio.run(names.answer(query, server, "?", said.append))
    # QR, TC, RD and RA, and the question as the only record.
    cut = b"\7\7\x83\x80\0\1" + bytes(6) + question
    assert said == [b"a" * size if fits else cut]


def test_fake_names_do_not_grow_for_ever() -> None:
    names = make_names()
    found = [names.fake(b"%d.example" % n) for n in range(natrun.RECORDS + 10)]
    assert len({*found}) == len(found) and len(names.called) == natrun.RECORDS
    assert names.fake(b"20.example") == found[20] != names.fake(b"1.example")


@users
def test_what_is_not_carried_is_not_said_to_work(rig: Rig, user: str) -> None:
    command = without_namespaces(rig, user, *rig.command("root", "--check"))
    done = rig.box.run("inside", *command)
    assert "natrun: namespace: no, " in done.stderr
    assert "natrun: datagrams: no, " in done.stderr
