"""Mappings: machines of the inside listen on the outside, by NAT-PMP."""

from __future__ import annotations

import contextlib
import json
import re
import socket
import threading
from collections.abc import Callable
from collections.abc import Iterator
from pathlib import Path

import boxes
import kernel
import needs
import pmp
import pytest
import running
import wait
import wire

import natwork as heart

pytestmark = pytest.mark.end_to_end

Start = Callable[..., running.Gateway]
OUTSIDE, SECOND = "203.0.113.1", "198.51.100.1"
WEB = "10.9.0.3"  # a second machine of the inside


@pytest.fixture(scope="module")
def box() -> Iterator[boxes.Box]:
    with boxes.dual_homed(second_uplink=True) as box:
        boxes.ip("-n", box.name("inside"), "addr", "add", f"{WEB}/24", "dev", "lan")
        yield box


@pytest.fixture
def start(box: boxes.Box, tmp_path: Path) -> Iterator[Start]:
    """Return a function that starts a gateway with mappings; stop it at the end."""
    started = []

    def one(*settings: str) -> running.Gateway:
        own = tmp_path / f"gateway{len(started)}"
        own.mkdir()
        file, log = own / "natwork.conf", own / "access.log"
        both = {"mappings": "yes", "outside": OUTSIDE, "spare_workers": "2"}
        both |= dict(setting.split("=", 1) for setting in settings)
        file.write_text(running.configuration(both))
        with log.open("w") as output:
            command = box.command("gateway", *running.PROGRAM, "-c", str(file))
            gateway = running.Gateway(
                own, command, stdout=output, env=boxes.ENVIRONMENT
            )
        gateway.file, gateway.settings = file, both
        started.append(gateway)
        wait.until(lambda: mapper(gateway))
        return gateway

    tmp_path.chmod(0o755)
    yield one
    for gateway in started:
        gateway.stop()
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


def rows(box: boxes.Box) -> list[dict[str, object]]:
    """Return the state table, as the operator sees it."""
    words = [*running.PROGRAM, "--table", "--json"]
    done = box.run("gateway", *words)
    assert done.returncode == 0, done
    found = json.loads(done.stdout)
    assert isinstance(found, list)
    return found


def lines(gateway: running.Gateway, method: str = "-") -> list[dict[str, str]]:
    """Return the lines of callers, or those of mappings themselves."""
    return [x for x in gateway.lines() if (x["proto"], x["method"]) == ("map", method)]


def counted(box: boxes.Box, *settings: str) -> int:
    """Return how many sessions of mappings the metrics count."""
    url = "http://10.9.0.1:8080/metrics"
    text = box.run("inside", "curl", "-s", "--max-time", "10", *settings, url).stdout
    found = re.findall(r'^natwork_sessions_total{protocol="map",.*} (\d+)$', text, re.M)
    return sum(map(int, found))


def refused(box: boxes.Box, port: int, host: str = OUTSIDE) -> bool:
    """Return whether nothing listens on a port of the outside."""
    try:
        box.connect("outside", (host, port)).close()
    except ConnectionRefusedError:
        return True
    return False


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
        (own, row) = sorted(rows(box), key=lambda row: row["pid"] == pid)
        assert (own["pid"], own["destination"]) == (mapping, f"{OUTSIDE}:8000")
        assert (own["source_ip"], own["original_source_port"]) == ("10.9.0.2", port)
        assert (row["protocol"], row["destination"]) == ("map", f"10.9.0.2:{port}")
        place = f"{row['source_ip']}:{row['original_source_port']}"
        assert place == client and seen == f"10.9.0.1:{row['new_source_port']}"
        # As the server may ask who it is.
        url = f"http://10.9.0.1:8080/table.json?source_port={seen.split(':')[1]}"
        told = json.loads(box.run("inside", "curl", "-s", url).stdout)
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
    assert pmp.mapped(box, port, 8000, 1).seconds == 1
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
        (pmp.request(80, 80, 60, 1), b"\0\x81\0\5"),  # UDP
        (pmp.request(80, 80, 60, 3), b"\0\x83\0\5"),
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


@pytest.fixture(scope="module")
def one_gateway(
    box: boxes.Box, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[running.Gateway]:
    folder = tmp_path_factory.mktemp("one")
    gateway = box.natwork(folder, "mappings=yes", f"outside={OUTSIDE}")
    wait.until(lambda: mapper(gateway))
    yield gateway
    gateway.stop()
