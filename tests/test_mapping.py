"""Mappings: machines of the inside listen on the outside, by NAT-PMP."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from collections.abc import Iterator
from pathlib import Path

import boxes
import http_wire
import kernel
import needs
import pmp
import pytest
import running
import socks_wire
import wait
import wire

import natwork as heart
import natwork_users

pytestmark = pytest.mark.end_to_end

Start = Callable[..., running.Gateway]
OUTSIDE, SECOND = "203.0.113.1", "198.51.100.1"
WEB = "10.9.0.3"  # a second machine of the inside


@pytest.fixture(scope="module")
def box() -> Iterator[boxes.Box]:
    with boxes.dual_homed(second_uplink=True) as box:
        boxes.ip("-n", box.name("inside"), "addr", "add", f"{WEB}/24", "dev", "lan")
        yield box


def stop(gateway: running.Gateway) -> None:
    """Stop a gateway; nobody of it is left, but orphans that init has yet to reap."""
    if gateway.process.poll() is None:
        gateway.process.send_signal(signal.SIGTERM)
    assert gateway.process.wait(timeout=40) == gateway.expected
    assert "Traceback" not in gateway.errors.read_text()

    def left() -> list[int]:
        group = kernel.group(gateway.process.pid)
        return [
            pid for pid in group if kernel.status(pid, "State")[:1] not in ("", "Z")
        ]

    assert not left() if gateway.expected == 0 else wait.until(lambda: not left())


@pytest.fixture
def folder() -> Iterator[Path]:
    """Return a folder that the gateway, which is no longer root, may read in."""
    with running.public_folder() as folder:
        yield folder


@pytest.fixture
def start(box: boxes.Box, folder: Path) -> Iterator[Start]:
    """Return a function that starts a gateway with mappings; stop it at the end."""
    started: list[running.Gateway] = []

    def one(*settings: str, program: list[str] = running.PROGRAM) -> running.Gateway:
        own = folder / f"gateway{len(started)}"
        own.mkdir()
        file, log = own / "natwork.conf", own / "access.log"
        both = {"mappings": "yes", "outside": OUTSIDE, "spare_workers": "2"}
        both |= dict(setting.split("=", 1) for setting in settings)
        file.write_text(running.configuration(both))
        with log.open("w") as output:
            command = box.command("gateway", *program, "-c", str(file))
            gateway = running.Gateway(
                own, command, stdout=output, env=boxes.ENVIRONMENT
            )
        gateway.file, gateway.settings = file, both
        started.append(gateway)
        wait.until(lambda: mapper(gateway))
        return gateway

    yield one
    for gateway in started:
        stop(gateway)
        assert box.pids("gateway") == []


@pytest.fixture
def echo(box: boxes.Box) -> Iterator[Callable[..., int]]:
    """Return a function that starts an echo server on the inside, for its port."""
    listeners = []

    def start(host: str = "10.9.0.2", port: int = 0) -> int:
        listener = box.within("inside", lambda: socket.create_server((host, port)))
        listeners.append(listener)
        threading.Thread(target=serve, args=[listener], daemon=True).start()
        return int(listener.getsockname()[1])

    yield start
    for listener in listeners:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()


def serve(listener: socket.socket) -> None:
    """Send each client back what it says, after its address."""
    with contextlib.suppress(OSError):
        while True:
            client, address = listener.accept()
            threading.Thread(target=answer, args=[client, address], daemon=True).start()


def answer(client: socket.socket, address: tuple[str, int]) -> None:
    with client, contextlib.suppress(OSError):
        client.sendall(b"%b\n" % heart.endpoint(address).encode())
        while data := client.recv(65536):
            client.sendall(data)


def mapper(gateway: running.Gateway) -> int:
    """Return the mapper that answers now, 0 if there is none."""
    found = [p for p in gateway.workers() if kernel.title(p) == "natwork: mapper"]
    return found[-1] if found else 0


def mappings(gateway: running.Gateway) -> dict[int, str]:
    """Return the titles of the mappings, by process."""
    titles = {p: kernel.title(p) for p in kernel.group(gateway.process.pid)}
    return {p: t for p, t in titles.items() if t.startswith("natwork: map ")}


def called(box: boxes.Box, port: int, host: str = OUTSIDE) -> tuple[socket.socket, str]:
    """Return a connection from the outside to a mapping, and who the server saw."""
    caller = box.connect("outside", (host, port))
    seen = b""
    while not seen.endswith(b"\n"):
        seen += wire.read_exactly(caller, 1)
    return caller, seen.decode().strip()


def page(box: boxes.Box, path: str) -> bytes:
    """Return a page of the gateway."""
    with box.connect("inside", ("10.9.0.1", 8080)) as client:
        data = b"GET %b HTTP/1.1\r\nHost: localhost\r\n\r\n" % path.encode()
        answer = http_wire.exchange(client, data)
    assert answer.status == 200
    return answer.body


def rows(box: boxes.Box) -> list[dict[str, object]]:
    """Return the rows of mappings in the state table."""
    found = json.loads(page(box, "/table.json"))["sessions"]
    return [row for row in found if row["protocol"] == "map"]


def shown(box: boxes.Box, mapped: bool = True) -> list[dict[str, object]]:
    """Return the same, or all the rest, as the operator sees it."""
    done = box.run("gateway", *running.PROGRAM, "--table", "--json")
    assert done.returncode == 0, done
    rows = json.loads(done.stdout)
    return [row for row in rows if (row["protocol"] == "map") == mapped]


def lines(gateway: running.Gateway, method: str = "-") -> list[dict[str, str]]:
    """Return the lines of callers, or those of mappings themselves."""
    return [x for x in gateway.lines() if (x["proto"], x["method"]) == ("map", method)]


def counted(box: boxes.Box) -> int:
    """Return how many sessions of mappings the metrics count."""
    text = page(box, "/metrics").decode()
    found = re.findall(r'^natwork_sessions_total{protocol="map",.*} (\d+)$', text, re.M)
    return sum(map(int, found))


def refused(box: boxes.Box, port: int, host: str = OUTSIDE) -> bool:
    """Return whether nothing listens on a port of the outside; call nobody."""
    listening = box.run("gateway", "ss", "-Hltn", "src", f"{host}:{port}")
    return not listening.stdout


# --- One mapping --------------------------------------------------------------


def test_natpmpc_makes_renews_and_ends_a_mapping(
    box: boxes.Box, start: Start, echo: Callable[..., int]
) -> None:
    needs.programs("natpmpc")
    gateway, port = start(), echo()

    def natpmpc(*words: str) -> str:
        done = box.run("inside", "natpmpc", "-g", "10.9.0.1", *words)
        assert done.returncode == 0, done
        return done.stdout

    assert f"Public IP address : {OUTSIDE}" in natpmpc()
    told = f"Mapped public port 8000 protocol TCP to local port {port} liftime 60"
    for wanted in ("8000", "8001"):  # it keeps the port that it has
        assert told in natpmpc("-a", wanted, str(port), "tcp", "60")
    (title,) = mappings(gateway).values()
    way = re.escape(f"{OUTSIDE}:8000 > 10.9.0.2:{port}")
    assert re.fullmatch(rf"natwork: map {way} (60|59|58)s left", title)
    caller, seen = called(box, 8000)
    with caller:
        assert seen.startswith("10.9.0.1:") and wire.echoes(caller)
        natpmpc("-a", "8000", str(port), "tcp", "0")
        wait.until(lambda: refused(box, 8000))
        assert wire.echoes(caller)  # what is under way stays
    wait.until(lambda: not mappings(gateway))
    (line,) = lines(gateway, "MAP")
    assert (line["client"], line["address"]) == (f"10.9.0.2:{port}", f"{OUTSIDE}:8000")
    assert line["outcome"] == "closed"


def test_a_caller_is_a_process_a_row_and_a_line(
    box: boxes.Box, start: Start, echo: Callable[..., int]
) -> None:
    gateway, port = start(), echo()
    assert pmp.mapped(box, port, 8000) == (pmp.OK, port, 8000, 60)
    caller, seen = called(box, 8000)
    client = "%s:%d" % caller.getsockname()
    with caller:
        way = f"natwork: {client} > {seen} > 10.9.0.2:{port} map 10.9.0.2"
        group = kernel.group(gateway.process.pid)
        (pid,) = wait.until(lambda: [p for p in group if kernel.title(p) == way])
        (mapping,) = mappings(gateway)
        assert kernel.children(mapping) == [pid]
        assert kernel.children(mapper(gateway)) == [mapping]
        (own, row) = sorted(shown(box), key=lambda row: row["pid"] == pid)
        assert (own["pid"], own["destination"]) == (mapping, f"{OUTSIDE}:8000")
        assert (own["source_ip"], own["original_source_port"]) == ("10.9.0.2", port)
        assert (row["protocol"], row["destination"]) == ("map", f"10.9.0.2:{port}")
        place = f"{row['source_ip']}:{row['original_source_port']}"
        assert place == client and seen == f"10.9.0.1:{row['new_source_port']}"
        # As the server may ask who it is.
        told = json.loads(page(box, f"/table.json?source_port={seen.split(':')[1]}"))
        assert [one["pid"] for one in told["sessions"]] == [pid]
        caller.sendall(b"x" * 300_000)
        caller.shutdown(socket.SHUT_WR)  # and what comes back is whole
        assert wire.read_all(caller) == b"x" * 300_000
    (line,) = wait.until(lambda: lines(gateway))
    assert (line["client"], line["source"], line["target"]) == (
        client,
        seen,
        f"10.9.0.2:{port}",
    )
    assert (line["outcome"], line["up"]) == ("closed", "300000")
    wait.until(lambda: counted(box) == 1)


def test_a_title_is_not_taken_for_threads(
    box: boxes.Box, start: Start, echo: Callable[..., int]
) -> None:
    # From 3.12 on os.fork() splits /proc/self/stat, with the title, at its spaces.
    program = ["nice", "-n", "5", sys.executable, str(running.ROOT / "natwork.py")]
    gateway, port = start(program=program), echo()
    assert pmp.mapped(box, port, 8000).port == 8000
    caller, _ = called(box, 8000)
    with caller:
        assert wire.echoes(caller)
    wait.until(lambda: lines(gateway))
    assert "Warning" not in gateway.errors.read_text()


def test_many_call_at_once(
    box: boxes.Box, start: Start, echo: Callable[..., int]
) -> None:
    gateway, port = start(), echo()
    assert pmp.mapped(box, port, 8000).port == 8000
    with contextlib.ExitStack() as stack:
        callers = [called(box, 8000) for _ in range(50)]
        for caller, _ in callers:
            stack.enter_context(caller)
        assert len({seen for _, seen in callers}) == 50
        assert all(wire.echoes(caller) for caller, _ in callers)
        assert len(rows(box)) == 51
    wait.until(lambda: len(lines(gateway)) == 50)
    wait.until(lambda: len(rows(box)) == 1)


def test_a_lease_ends_its_port_and_no_caller(
    box: boxes.Box, start: Start, echo: Callable[..., int]
) -> None:
    gateway, port = start(), echo()
    assert pmp.mapped(box, port, 8000, 2).seconds == 2
    caller, _ = called(box, 8000)
    with caller:
        wait.until(lambda: refused(box, 8000))
        (title,) = mappings(gateway).values()
        assert title.endswith(" over") and wire.echoes(caller)
        # Its port is free again, for others too, and it is not in the table.
        assert pmp.mapped(box, echo(WEB), 8000, host=WEB).port == 8000
        assert wire.echoes(caller)
        assert len(rows(box)) == 2
    wait.until(lambda: len(mappings(gateway)) == 1)


def test_what_is_given_back_may_be_asked_for_at_once(
    box: boxes.Box, start: Start, echo: Callable[..., int]
) -> None:
    gateway, port = start(), echo()
    for _ in range(5):
        assert pmp.mapped(box, port, 8000).port == 8000
        assert pmp.mapped(box, port, 0, 0).result == pmp.OK
    assert pmp.mapped(box, port, 8000).port == 8000
    caller, _ = called(box, 8000)
    with caller:
        assert wire.echoes(caller)
    wait.until(lambda: len(lines(gateway, "MAP")) == 5)


def test_a_machine_that_maps_and_unmaps_delays_no_other(
    box: boxes.Box, start: Start
) -> None:
    start()
    waited = 0.0

    def shout() -> None:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            sock.sendto(pmp.request(7000, 7000, 60), ("10.9.0.1", pmp.PORT))

    for _ in range(5):
        assert pmp.mapped(box, 7000, 7000).port == 7000
        assert pmp.mapped(box, 7000, 0, 0).result == pmp.OK
        box.within("inside", shout)
        began = time.monotonic()
        assert pmp.address(box, WEB)
        waited += time.monotonic() - began
    assert waited < 0.5


def test_a_lease_is_two_hours_at_most(box: boxes.Box, start: Start) -> None:
    start()
    assert pmp.mapped(box, 8000, 8000, 1 << 31).seconds == 7200
    assert pmp.mapped(box, 8000, 8000, 7201).seconds == 7200


@pytest.mark.parametrize("how", ["nobody", "reset"])
def test_where_nobody_answers_a_caller_is_reset(
    box: boxes.Box, start: Start, echo: Callable[..., int], how: str
) -> None:
    gateway, port = start(), 9 if how == "nobody" else echo()
    assert pmp.mapped(box, port, 8000).port == 8000
    with box.connect("outside", (OUTSIDE, 8000)) as caller:
        if how == "reset":
            wire.read_exactly(caller, 1)
            wire.reset(caller)
        else:
            with pytest.raises(ConnectionResetError):
                wire.read_exactly(caller, 1)
    (line,) = wait.until(lambda: lines(gateway))
    assert line["outcome"] == ("refused" if how == "nobody" else "client-gone")


# --- Programs as they are -----------------------------------------------------

MAGNET = "magnet:?xt=urn:btih:" + 40 * "0"
LIBTORRENT = """
import libtorrent, time
session = libtorrent.session({
    "listen_interfaces": "10.9.0.2:6881", "enable_natpmp": True, "enable_upnp": False,
    "enable_lsd": False, "enable_dht": False,
    "alert_mask": libtorrent.alert.category_t.port_mapping_notification,
})
ends_at = time.time() + 20
while time.time() < ends_at:
    session.wait_for_alert(500)
    for alert in session.pop_alerts():
        if alert.what() == "portmap":
            raise SystemExit(alert.message())
"""


def test_transmission_is_forwarded(box: boxes.Box, start: Start, folder: Path) -> None:
    needs.programs("transmission-cli", "upnpc")
    gateway, said = start(), folder / "said"
    words = ["-m", "-D", "-p", "51413", "-w", str(folder), "-g", str(folder / "conf")]
    with said.open("w") as errors:
        program = box.start(
            "inside", "transmission-cli", *words, MAGNET, folder=folder, errors=errors
        )
    # Meanwhile: UPnP finds nothing.
    done = box.run("inside", "upnpc", "-s")
    assert done.returncode != 0 and "No IGD UPnP Device found" in done.stderr
    wait.until(lambda: "Port 51413 forwarded successfully" in said.read_text(), 40)
    (title,) = mappings(gateway).values()
    assert title.startswith(f"natwork: map {OUTSIDE}:51413 > 10.9.0.2:51413 ")
    box.stop(program)


def test_libtorrent_is_told_its_port(box: boxes.Box, start: Start) -> None:
    gateway = start()
    # It asks by PCP first, and for UDP too.
    done = box.run("inside", "/usr/bin/python3", "-c", LIBTORRENT)
    told = "successfully mapped port using NAT-PMP. local: 10.9.0.2 external port: "
    if "No module" in done.stderr:
        needs.unavailable("not installed: python3-libtorrent")
    assert done.stderr.strip() == told + "TCP/6881"
    gateway.process.terminate()  # it may have given its port back, too
    (line,) = gateway.lines(1)
    assert (line["client"], line["address"]) == ("10.9.0.2:6881", f"{OUTSIDE}:6881")


# --- Who may have what --------------------------------------------------------


@pytest.mark.parametrize(
    ("rules", "word"),
    [
        ("deny from 203.0.113.80", "denied-rule-1"),
        ("deny to 10.9.0.2", "denied-rule-1"),
        (
            "allow from 203.0.113.0/24 port 8000; deny from 203.0.113.80",
            "denied-rule-2",
        ),
        ("deny from 10.0.0.0/8", "closed"),
        ("deny from 203.0.113.81", "closed"),
    ],
)
def test_the_rules_judge_each_caller(
    box: boxes.Box, start: Start, echo: Callable[..., int], rules: str, word: str
) -> None:
    gateway, port = start(f"rules={rules}"), echo()
    assert pmp.mapped(box, port, 8000).port == 8000
    with box.connect("outside", (OUTSIDE, 8000)) as caller:
        caller.shutdown(socket.SHUT_WR)
        if word == "closed":
            assert wire.read_all(caller)
        else:
            with pytest.raises(ConnectionResetError):
                wire.read_exactly(caller, 1)
    assert [x["outcome"] for x in wait.until(lambda: lines(gateway))] == [word]


def test_mail_is_not_let_in_without_a_rule(box: boxes.Box, start: Start) -> None:
    gateway = start()
    assert pmp.mapped(box, 25, 8025).port == 8025
    with box.connect("outside", (OUTSIDE, 8025)) as caller:
        with pytest.raises(ConnectionResetError):
            wire.read_exactly(caller, 1)
    (line,) = wait.until(lambda: lines(gateway))
    assert line["outcome"] == "denied-port-25"


def test_a_machine_has_max_mappings_at_most(box: boxes.Box, start: Start) -> None:
    start("max_mappings=2")
    assert pmp.mapped(box, 8000).result == pmp.mapped(box, 8001).result == pmp.OK
    assert pmp.mapped(box, 8002).result == pmp.NO_RESOURCES
    assert pmp.mapped(box, 8001).result == pmp.OK  # it has this one
    assert pmp.mapped(box, 8002, host=WEB).result == pmp.OK
    assert pmp.mapped(box, 8000, 0, 0).result == pmp.OK
    wait.until(lambda: pmp.mapped(box, 8002).result == pmp.OK)


def test_a_port_is_one_of_bind_ports(box: boxes.Box, start: Start) -> None:
    start("bind_ports=1023-1025")
    assert pmp.mapped(box, 80, 1024).port == 1024
    # An unprivileged gateway cannot open the first; another is given for what is not.
    assert pmp.mapped(box, 81, 8000).port == 1025
    assert pmp.mapped(box, 82, 1025).result == pmp.NO_RESOURCES


@pytest.mark.parametrize("wanted", [0, 80, 1023, 8080])
def test_without_bind_ports_it_is_from_1024_on_and_no_own_one(
    box: boxes.Box, start: Start, wanted: int
) -> None:
    start("listen=10.9.0.1:8080 [fd00:9::1]:8080")
    port = pmp.mapped(box, 8000, wanted).port
    assert port >= 1024 and port != 8080


def test_two_machines_do_not_share_a_port(
    box: boxes.Box, start: Start, echo: Callable[..., int]
) -> None:
    start()
    one, other = echo(), echo(WEB)
    assert pmp.mapped(box, one, 8000).port == 8000
    answer = pmp.mapped(box, other, 8000, host=WEB)  # it may be content with another
    assert answer.result == pmp.OK and answer.port != 8000
    assert pmp.address(box, WEB) == OUTSIDE
    caller, _ = called(box, answer.port)
    caller.close()


def test_with_two_addresses_each_machine_has_its_own(
    box: boxes.Box, start: Start, echo: Callable[..., int]
) -> None:
    gateway = start("outside=wan wan2")
    one, other = echo(), echo(WEB)
    assert pmp.mapped(box, one, 8000).port == 8000
    assert pmp.mapped(box, other, 8000, host=WEB).port == 8000
    assert (pmp.address(box), pmp.address(box, WEB)) == (OUTSIDE, SECOND)
    # A machine keeps to its address, and so does what it maps next.
    assert pmp.mapped(box, 8001, 8001, host=WEB).port == 8001
    for host in (OUTSIDE, SECOND):
        caller, seen = called(box, 8000, host)
        with caller:
            assert seen.startswith("10.9.0.1:") and wire.echoes(caller)
    wait.until(lambda: len(lines(gateway)) == 2)
    targets = {line["address"] for line in lines(gateway)}
    assert targets == {f"10.9.0.2:{one}", f"{WEB}:{other}"}
    places = {row["destination"] for row in rows(box)}
    assert places == {f"{OUTSIDE}:8000", f"{SECOND}:8000", f"{SECOND}:8001"}


def test_an_address_that_goes_takes_its_mappings_and_the_epoch_along(
    box: boxes.Box, start: Start
) -> None:
    addr, place = ["-n", box.name("gateway"), "addr"], ["203.0.113.9/24", "dev", "wan"]
    # As if it ran since the box began.
    program = running.program(
        {},
        "import natwork_mapping as m; begin = m.Mapper.__init__",
        "old = lambda board: board.words.__setitem__(board.BEGAN, 0)",
        "m.Mapper.__init__ = lambda s, g: old(g.chapters.board) or begin(s, g)",
    )

    def age() -> int:
        return int.from_bytes(pmp.ask(box, b"\0\0")[4:8], "big")

    boxes.ip(*addr, "add", *place)
    try:
        start("outside=203.0.113.9", program=program)
        assert pmp.mapped(box, 8000, 8000).port == 8000
        assert age() > 20
    finally:
        boxes.ip(*addr, "del", *place)
    wait.until(lambda: refused(box, 8000, "203.0.113.9"))
    assert age() < 20  # RFC 6886 section 3.6
    assert pmp.mapped(box, 8000).result == pmp.NO_ADDRESS
    assert not pmp.address(box)


@pytest.mark.parametrize("outside", ["", "wan", "wan wan2"])
def test_programs_are_told_of_it(box: boxes.Box, start: Start, outside: str) -> None:
    start(f"outside={outside}", "name=gate.corp.example")
    table = json.loads(page(box, "/lat.json"))
    both = [OUTSIDE, "2001:db8:9::1"]
    if "wan2" in outside:
        both += [SECOND, "2001:db8:19::1"]
    assert sorted(table["outside"]) == sorted(both) and table["outside"][0] == OUTSIDE
    assert (table["mappings"], table["socks"]) == (True, "10.9.0.1:8080")
    assert table["domains"] == ["corp.example"]
    # Without uplinks a machine is told the same.
    assert pmp.address(box) == OUTSIDE


# --- Users --------------------------------------------------------------------


def test_with_users_a_machine_must_have_logged_in(
    box: boxes.Box, start: Start, echo: Callable[..., int], folder: Path
) -> None:
    users = folder / "users"
    users.write_bytes(natwork_users.user_line(b"alice", b"secret") + b"\n")
    users.chmod(0o640)
    shutil.chown(users, group="nogroup")
    gateway, port = start(f"users={users}", "rules=deny user bob"), echo()
    assert pmp.mapped(box, port, 8000).result == pmp.NOT_AUTHORIZED
    asks = socks_wire.five(socks_wire.addressed("0.0.0.0", 0), socks_wire.ASSOCIATE)
    with box.connect("inside", ("10.9.0.1", 8080)) as control:
        control.sendall(socks_wire.login(b"alice;app=web", b"secret") + asks)
        assert wire.read_exactly(control, 8)[:6] == socks_wire.KNOWN + b"\5\0"
        # Another machine has logged in nowhere.
        assert pmp.mapped(box, port, 8001, host=WEB).result == pmp.NOT_AUTHORIZED
        assert pmp.mapped(box, port, 8000) == (pmp.OK, port, 8000, 60)
        caller, _ = called(box, 8000)
        with caller:
            assert wire.echoes(caller)
            assert [row["user"] for row in shown(box)] == ["alice;app=web"] * 2
            # Another program of hers keeps it, whatever that is called.
            with box.connect("inside", ("10.9.0.1", 8080)) as other:
                other.sendall(socks_wire.login(b"alice;app=ftp", b"secret") + asks)
                assert wire.read_exactly(other, 8)[:6] == socks_wire.KNOWN + b"\5\0"
                control.close()
                wait.until(lambda: len(shown(box, mapped=False)) == 1)
                time.sleep(0.5)
                assert not refused(box, 8000)
            wait.until(lambda: refused(box, 8000))
            assert wire.echoes(caller)
    assert pmp.mapped(box, port, 8000).result == pmp.NOT_AUTHORIZED
    assert pmp.mapped(box, port, 0, 0).result == pmp.OK  # there is none
    (line,) = wait.until(lambda: lines(gateway))
    assert line["user"] == "alice;app=web"


def test_a_user_who_was_removed_maps_no_more(
    box: boxes.Box, start: Start, echo: Callable[..., int], folder: Path
) -> None:
    users = folder / "users"

    def know(name: bytes) -> None:
        users.write_bytes(natwork_users.user_line(name, b"secret") + b"\n")

    know(b"alice")
    users.chmod(0o640)
    shutil.chown(users, group="nogroup")
    gateway, port = start(f"users={users}"), echo()
    asks = socks_wire.five(socks_wire.addressed("0.0.0.0", 0), socks_wire.ASSOCIATE)
    with box.connect("inside", ("10.9.0.1", 8080)) as control:
        control.sendall(socks_wire.login(b"alice", b"secret") + asks)
        assert wire.read_exactly(control, 8)[:6] == socks_wire.KNOWN + b"\5\0"
        assert pmp.mapped(box, port, 8000).result == pmp.OK
        know(b"carol")
        before = mapper(gateway)
        assert "configuration reloaded" in gateway.hangup()
        wait.until(lambda: mapper(gateway) not in (0, before))
        assert pmp.mapped(box, port, 8001).result == pmp.NOT_AUTHORIZED
        assert len(shown(box, mapped=False)) == 1  # her session goes on


def test_callers_that_are_left_count(
    box: boxes.Box, start: Start, echo: Callable[..., int]
) -> None:
    """Else one machine could call itself by mappings that end, and take all slots."""
    start(program=running.program({"natwork_mapping.SLOT_COUNT": 12}))
    with contextlib.ExitStack() as stack:
        for number in range(4):
            assert pmp.mapped(box, echo(), 8000 + number).result == pmp.OK
            stack.enter_context(called(box, 8000 + number)[0])
            if number < 3:
                assert pmp.mapped(box, 0, 0, 0).result == pmp.OK
                wait.until(lambda: refused(box, 8000 + number))  # noqa: B023
        # Four slots are left, and four callers of the machine.
        late = stack.enter_context(box.connect("outside", (OUTSIDE, 8003)))
        assert pmp.mapped(box, echo(WEB), 8004, host=WEB).result == pmp.OK
        stack.enter_context(called(box, 8004)[0])
        late.setblocking(False)
        with pytest.raises(BlockingIOError):
            late.recv(1)


def test_a_machine_with_many_callers_keeps_its_mapping_at_a_reload(
    box: boxes.Box, start: Start, echo: Callable[..., int]
) -> None:
    few = running.program({"natwork_mapping.SLOT_COUNT": 12})
    gateway, port = start(program=few), echo()
    assert pmp.mapped(box, port, 8000).port == 8000
    with contextlib.ExitStack() as stack:
        for _ in range(4):
            stack.enter_context(called(box, 8000)[0])
        before = mapper(gateway)
        assert "configuration reloaded" in gateway.hangup()
        wait.until(lambda: mapper(gateway) not in (0, before))
        assert pmp.mapped(box, port, 8000).port == 8000
        stack.enter_context(called(box, 8000)[0])


# --- Processes that end before their time -------------------------------------


def agree(box: boxes.Box, gateway: running.Gateway, count: int) -> None:
    """Wait until the log and the counters say the same of so many sessions."""

    def same() -> bool:
        ended = [line for line in gateway.lines() if line["proto"] == "map"]
        return len(ended) == counted(box) == count

    wait.until(same)


@pytest.mark.parametrize(
    ("number", "word"), [(signal.SIGKILL, "killed"), (signal.SIGTERM, "operator")]
)
def test_a_caller_that_is_killed_has_its_line(
    box: boxes.Box, start: Start, echo: Callable[..., int], number: int, word: str
) -> None:
    gateway, port = start(), echo()
    assert pmp.mapped(box, port, 8000).port == 8000
    (caller, _), (other, _) = called(box, 8000), called(box, 8000)
    with caller, other:
        client = caller.getsockname()
        (pid,) = {r["pid"] for r in rows(box) if r["original_source_port"] == client[1]}
        os.kill(int(str(pid)), number)
        with pytest.raises(ConnectionResetError):
            wire.read_exactly(caller, 1)
        assert wire.echoes(other)
        (line,) = wait.until(lambda: lines(gateway))
        assert (line["outcome"], line["client"]) == (word, "%s:%d" % client)
        assert len(rows(box)) == 2
    wait.until(lambda: len(rows(box)) == 1)
    agree(box, gateway, 2)


def test_a_mapping_that_is_killed_leaves_its_callers(
    box: boxes.Box, start: Start, echo: Callable[..., int]
) -> None:
    gateway, port = start(), echo()
    assert pmp.mapped(box, port, 8000).port == 8000
    (caller, _), (other, _) = called(box, 8000), called(box, 8000)
    with caller, other:
        (mapping,) = mappings(gateway)
        orphans = kernel.children(mapping)
        os.kill(mapping, signal.SIGKILL)
        wait.until(lambda: refused(box, 8000))
        (line,) = wait.until(lambda: lines(gateway, "MAP"))
        assert line["outcome"] == "killed"
        assert wire.echoes(caller) and wire.echoes(other)
        # They are in the table still, and one that is killed now has its line.
        for table in (rows, shown):
            assert sorted(int(str(x["pid"])) for x in table(box)) == sorted(orphans)
        os.kill(orphans[0], signal.SIGKILL)
        (line,) = wait.until(lambda: lines(gateway))
        assert line["outcome"] == "killed" and line["pid"] == str(orphans[0])
        # The machine asks again before its lease is over, and gets the port again.
        assert pmp.mapped(box, port, 8000).port == 8000
    agree(box, gateway, 3)
    assert len(rows(box)) == 1


def test_a_mapper_that_is_killed_has_a_successor_that_knows_all(
    box: boxes.Box, start: Start, echo: Callable[..., int]
) -> None:
    gateway, port = start(), echo()
    assert pmp.mapped(box, port, 8000).port == 8000
    caller, _ = called(box, 8000)
    with caller:
        killed, before = mapper(gateway), set(mappings(gateway))
        os.kill(killed, signal.SIGKILL)
        wait.until(lambda: mapper(gateway) not in (0, killed))
        assert wire.echoes(caller) and set(mappings(gateway)) == before
        another, _ = called(box, 8000)
        with another:
            assert wire.echoes(another)
            # It makes the mapping anew when it is renewed: RFC 6886 section 3.3.
            assert pmp.mapped(box, port, 8000) == (pmp.OK, port, 8000, 60)
            third, _ = called(box, 8000)
            with third:
                assert all(map(wire.echoes, (caller, another, third)))
                assert pmp.mapped(box, port, 8000, 0).result == pmp.OK
                wait.until(lambda: refused(box, 8000))
    agree(box, gateway, 5)
    assert not rows(box)


def test_a_master_that_is_killed_takes_the_mappings_along(
    box: boxes.Box, start: Start, echo: Callable[..., int]
) -> None:
    gateway, port = start("drain_timeout=2"), echo()
    gateway.expected = -signal.SIGKILL
    assert pmp.mapped(box, port, 8000).port == 8000
    caller, _ = called(box, 8000)
    with caller:
        os.kill(gateway.process.pid, signal.SIGKILL)
        gateway.process.wait()
        wait.until(lambda: refused(box, 8000))
        assert wire.echoes(caller)  # as with a worker, it has drain_timeout
        with pytest.raises(ConnectionResetError):
            wire.read_exactly(caller, 1)
    stop(gateway)
    (line,) = lines(gateway)
    assert line["outcome"] == "drained"


def test_a_mapping_that_has_no_descriptor_left_goes_on(
    box: boxes.Box, start: Start, echo: Callable[..., int]
) -> None:
    gateway, port = start("user=root"), echo()
    assert pmp.mapped(box, port, 8000).port == 8000
    (mapping,), answers = wait.until(lambda: mappings(gateway)), mapper(gateway)

    def said(what: str) -> bool:
        return f"natwork: {what}: " in gateway.errors.read_text()

    with kernel.no_more_descriptors(answers):
        wait.until(lambda: said("the mapper goes on after an error"))
        assert pmp.ask(box, b"\0\0") == b""
    with box.connect("outside", (OUTSIDE, 8000)) as ahead:
        wire.read_exactly(ahead, 1)
        with kernel.no_more_descriptors(mapping):
            caller = box.connect("outside", (OUTSIDE, 8000))
            wait.until(lambda: said("cannot take a caller"))
        with caller:
            wire.read_exactly(caller, 1)  # it was in the kernel's queue
    assert list(mappings(gateway)) == [mapping] and mapper(gateway) == answers


def test_one_machine_does_not_take_all_room(
    box: boxes.Box, start: Start, echo: Callable[..., int]
) -> None:
    few = running.program({"natwork_mapping.SLOT_COUNT": 9})
    gateway, one, other = start(program=few), echo(), echo(WEB)
    assert pmp.mapped(box, one, 8000).port == 8000
    assert pmp.mapped(box, other, 8001, host=WEB).port == 8001
    with contextlib.ExitStack() as stack:
        callers = []
        for _ in range(6):
            caller = box.connect("outside", (OUTSIDE, 8000))
            callers.append(stack.enter_context(caller))
        # Seven slots are left: the first machine has more than half of no others'.
        wait.until(lambda: len(rows(box)) == 2 + 4)
        for _ in range(2):
            caller, _ = called(box, 8001)
            stack.enter_context(caller)
        assert len(rows(box)) == 2 + 6
        for caller in callers[:4]:
            caller.close()
        for caller in callers[4:]:  # whose turn it is now
            wire.read_exactly(caller, 1)
    wait.until(lambda: len(rows(box)) == 2)
    agree(box, gateway, 8)


def test_a_process_that_cannot_be_forked_is_said(
    box: boxes.Box, start: Start, echo: Callable[..., int]
) -> None:
    faulty = running.program(
        {},
        "import os; fork, master = os.fork, os.getpid()",
        "fail = lambda: (_ for _ in ()).throw(BlockingIOError(11, ''))",
        "os.fork = lambda: fork() if os.getpid() == master else next(fail())",
    )
    gateway = start(program=faulty)
    assert pmp.mapped(box, echo(), 8000).result == pmp.NO_RESOURCES
    said = "natwork: cannot fork for a mapping: resource temporarily unavailable"
    wait.until(lambda: said in gateway.said())
    assert not rows(box) and not mappings(gateway) and not lines(gateway, "MAP")


BIRTH = "import os; import natwork_mapping as m; begin = m.Mapper.begin"


def test_a_mapping_that_is_killed_at_its_birth_leaves_nothing(
    box: boxes.Box, start: Start
) -> None:
    dies = "m.Mapper.begin = lambda *_: os.kill(os.getpid(), 9)"
    gateway = start(program=running.program({}, BIRTH, dies))
    assert pmp.mapped(box, 8000, 8000).port == 8000
    (line,) = wait.until(lambda: lines(gateway, "MAP"))
    assert line["outcome"] == "killed"
    wait.until(lambda: not rows(box))


def test_a_caller_that_is_ended_at_its_birth_leaves_the_mapping(
    box: boxes.Box, start: Start, echo: Callable[..., int]
) -> None:
    ends = (
        "m.Mapper.begin = lambda self, session, *rest: "
        "(session.method == 'MAP' or os.kill(os.getpid(), 15),"
        " begin(self, session, *rest))"
    )
    gateway = start(program=running.program({}, BIRTH, ends))
    assert pmp.mapped(box, echo(), 8000).port == 8000
    with box.connect("outside", (OUTSIDE, 8000)) as caller:
        with pytest.raises(ConnectionResetError):
            wire.read_exactly(caller, 1)
    (line,) = wait.until(lambda: lines(gateway))
    assert line["outcome"] == "killed" and not lines(gateway, "MAP")
    assert len(rows(box)) == 1


# --- Drain and reload ---------------------------------------------------------


def test_a_gateway_that_stops_sees_callers_out(
    box: boxes.Box, start: Start, echo: Callable[..., int]
) -> None:
    gateway, port = start(), echo()
    assert pmp.mapped(box, port, 8000).port == 8000
    caller, _ = called(box, 8000)
    with caller:
        gateway.process.send_signal(signal.SIGTERM)
        wait.until(lambda: refused(box, 8000))
        assert pmp.ask(box, b"\0\0") == b"" and wire.echoes(caller)
        assert gateway.process.poll() is None
    gateway.process.wait(timeout=10)
    assert [line["outcome"] for line in lines(gateway)] == ["closed"]
    assert [line["outcome"] for line in lines(gateway, "MAP")] == ["closed"]


def test_a_gateway_without_time_to_stop_writes_its_mappings_down(
    box: boxes.Box, start: Start
) -> None:
    gateway = start("drain_timeout=0.05")
    assert pmp.mapped(box, 8000, 8000).port == 8000
    wait.until(lambda: mappings(gateway))
    stop(gateway)  # and there is no traceback
    assert [line["outcome"] for line in lines(gateway, "MAP")] == ["closed"]


@pytest.mark.parametrize("late", [False, True])
def test_callers_that_do_not_leave_are_ended(
    box: boxes.Box, start: Start, echo: Callable[..., int], late: bool
) -> None:
    gateway, port = start(f"drain_timeout={1 if late else 30}"), echo()
    assert pmp.mapped(box, port, 8000).port == 8000
    (orphan, _), (mapping,) = called(box, 8000), mappings(gateway)
    os.kill(mapping, signal.SIGKILL)
    wait.until(lambda: lines(gateway, "MAP"))  # the mapper has seen it
    assert pmp.mapped(box, port, 8000).port == 8000
    caller, _ = called(box, 8000)
    with caller, orphan:
        gateway.process.send_signal(signal.SIGTERM)
        wait.until(lambda: refused(box, 8000))
        if not late:
            gateway.process.send_signal(signal.SIGTERM)  # now
        for one in (caller, orphan):
            with pytest.raises(ConnectionResetError):
                wire.read_exactly(one, 1)
    # The second TERM, at the end, is to meet nobody who has yet to write a line.
    both = wait.until(lambda: len(lines(gateway)) == 2 and lines(gateway))
    stop(gateway)
    assert {line["outcome"] for line in both} == {"drained" if late else "operator"}


def test_a_reload_keeps_mappings_and_gives_them_its_rules(
    box: boxes.Box, start: Start, echo: Callable[..., int]
) -> None:
    gateway, port = start(), echo()
    assert pmp.mapped(box, port, 8000).port == 8000
    caller, _ = called(box, 8000)
    with caller:
        old = mapper(gateway)
        assert "configuration reloaded" in gateway.hangup(
            rules="deny from 203.0.113.81"
        )
        wait.until(lambda: mapper(gateway) not in (0, old))
        assert kernel.title(old) == "natwork: mapper that leaves"
        another, _ = called(box, 8000)
        another.close()
        old = mapper(gateway)
        gateway.hangup(rules="deny from 203.0.113.80")
        wait.until(lambda: mapper(gateway) not in (0, old))
        # It goes on under the rules that it began with until it is renewed.
        another, _ = called(box, 8000)
        another.close()
        assert pmp.mapped(box, port, 8000).port == 8000
        with box.connect("outside", (OUTSIDE, 8000)) as denied:
            with pytest.raises(ConnectionResetError):
                wire.read_exactly(denied, 1)
        assert wire.echoes(caller)
    wait.until(lambda: len(kernel.children(gateway.process.pid)) == 3)
    agree(box, gateway, 5)
    assert len(rows(box)) == 1


def test_mappings_are_turned_off_and_on(
    box: boxes.Box, start: Start, echo: Callable[..., int]
) -> None:
    gateway, port = start(), echo()
    assert pmp.mapped(box, port, 8000, 2).port == 8000
    gateway.hangup(mappings="no")
    wait.until(lambda: not mapper(gateway))
    assert pmp.ask(box, b"\0\0") == b""
    wait.until(lambda: refused(box, 8000))  # when its lease is over
    wait.until(lambda: len(kernel.children(gateway.process.pid)) == 2)
    gateway.hangup(mappings="yes")
    assert pmp.mapped(box, port, 8000).port == 8000
    caller, _ = called(box, 8000)
    caller.close()


def test_off_the_port_is_closed(box: boxes.Box, tmp_path: Path) -> None:
    gateway = box.natwork(tmp_path, f"outside={OUTSIDE}")

    def asked() -> None:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            sock.settimeout(10)
            sock.connect(("10.9.0.1", pmp.PORT))
            sock.send(b"\0\0")
            with pytest.raises(ConnectionRefusedError):
                sock.recv(100)

    box.within("inside", asked)
    gateway.stop()


TAKEN = "natwork: cannot answer NAT-PMP at 10.9.0.1:5351: address already in use"
HERE = "mappings=yes", "listen=10.9.0.1:8080 [::1]:8080"


def other_server(box: boxes.Box) -> socket.socket:
    """Return a socket that has the port of the mapper."""

    def other() -> socket.socket:
        sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        sock.bind(("10.9.0.1", pmp.PORT))
        return sock

    return box.within("gateway", other)


def test_another_server_at_its_port_is_said_once(
    box: boxes.Box, tmp_path: Path
) -> None:
    with other_server(box):
        gateway = box.natwork(tmp_path, *HERE)
        wait.until(lambda: TAKEN in gateway.said())
        time.sleep(0.5)
        assert gateway.said().count(TAKEN) == 1 and not mapper(gateway)
    wait.until(lambda: mapper(gateway))
    assert pmp.address(box) == OUTSIDE
    gateway.stop()


@pytest.mark.parametrize("leaves", [False, True])
def test_another_server_at_its_port_is_waited_for_at_leisure(
    box: boxes.Box, tmp_path: Path, leaves: bool
) -> None:
    # Were it looked for as often as while an earlier mapper leaves, it would be too
    # late here.
    limits = {"natwork_mapping.RELEASE_TIME": 0, "natwork_mapping.OPEN_TIME": 90}
    with other_server(box), pytest.MonkeyPatch.context() as patch:
        patch.setattr(running, "PROGRAM", running.program(limits))
        gateway = box.natwork(tmp_path, *HERE, "drain_timeout=0.05")
        wait.until(lambda: TAKEN in gateway.said())
        if not leaves:
            gateway.stop()  # in good order
    if leaves:
        wait.until(lambda: mapper(gateway))
        gateway.stop()


# --- From where it is asked ---------------------------------------------------


def test_the_outside_is_not_answered(box: boxes.Box, start: Start) -> None:
    gateway = start()

    def silent(source: str, to: str) -> bool:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            sock.setsockopt(socket.SOL_IP, 19, 1)  # IP_TRANSPARENT
            sock.bind((source, 0))
            sock.settimeout(0.2)
            sock.sendto(pmp.request(8000, 8000, 60), (to, pmp.PORT))
            try:
                sock.recv(100)
            except TimeoutError:
                return True
        return False

    # The third speaks for a machine of the inside, to which no answer may go.
    for source in ("203.0.113.80", "198.51.100.80", "10.9.0.2", "10.9.0.77"):
        for to in (OUTSIDE, SECOND, "10.9.0.1"):
            assert box.within("outside", lambda s=source, t=to: silent(s, t))
    assert not mappings(gateway)


def test_an_outside_address_is_no_place_to_ask(box: boxes.Box, start: Start) -> None:
    gateway = start()
    assert pmp.ask(box, pmp.request(8000, 8000, 60), gateway=OUTSIDE) == b""
    assert pmp.ask(box, pmp.request(8000, 8000, 60))
    wait.until(lambda: mappings(gateway))


def test_the_gateway_itself_is_not_mapped(box: boxes.Box, start: Start) -> None:
    gateway = start()

    def silent(source: str) -> bool:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            sock.bind((source, 0))
            sock.settimeout(0.5)
            sock.sendto(pmp.request(22, 8000, 60), (source, pmp.PORT))
            with pytest.raises(TimeoutError):
                sock.recv(100)
        return True

    for source in ("10.9.0.1", "127.0.0.1"):
        assert box.within("gateway", lambda s=source: silent(s))
    assert not mappings(gateway)


# --- The protocol -------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "answer"),
    [
        (b"", b""),
        (b"\0", b""),
        (b"\0\0\0", b""),
        (b"\0\2", b""),
        (pmp.request(80, 80, 60)[:-1], b""),
        (pmp.request(80, 80, 60) + b"\0", b""),
        (b"\0\x80" + bytes(10), b""),  # an answer, of which nobody was asked
        (b"\0\xff", b""),
        (b"\2\1" + bytes(58), b"\0\x81\0\1"),  # MAP of PCP, which then falls back
        (b"\2\0" + bytes(1098), b"\0\x80\0\1"),
        (b"\1\0", b"\0\x80\0\1"),
    ],
)
def test_what_is_no_request_that_is_served(
    box: boxes.Box, one_gateway: running.Gateway, data: bytes, answer: bytes
) -> None:
    told = pmp.ask(box, data)
    assert told[:4] == answer and len(told) == (8 if answer else 0)
    assert not mappings(one_gateway)


def test_what_is_not_served_is_answered_in_its_form(
    box: boxes.Box, one_gateway: running.Gateway
) -> None:
    # RFC 6886 section 3.5: for UDP as for TCP; else the request itself.
    told = pmp.ask(box, pmp.request(80, 81, 60, 1))
    assert told[:4] + told[8:10] + told[12:] == b"\0\x81\0\5\0\x50" + bytes(4)
    for rest in (b"", b"1", bytes(range(60))):
        assert pmp.ask(box, b"\0\3ab" + rest) == b"\0\x83\0\5" + rest
    assert not mappings(one_gateway)


@pytest.fixture(scope="module")
def one_gateway(
    box: boxes.Box, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[running.Gateway]:
    folder = tmp_path_factory.mktemp("one")
    gateway = box.natwork(folder, "mappings=yes", f"outside={OUTSIDE}")
    wait.until(lambda: mapper(gateway))
    yield gateway
    gateway.stop()
