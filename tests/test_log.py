"""One session record: the access log, the titles, and the state table."""

from __future__ import annotations

import contextlib
import json
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import threading
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

import natwork

gateway = running.shared()
FIELDS = (  # a contract, and this is their order
    "time pid client user proto method target address source status outcome "
    "up down secs"
).split()
LINE = re.compile(" ".join(f"{name}=[!#-~]+" for name in FIELDS))  # no quote
COLUMNS = (
    "Source IP",
    "Original Source Port",
    "New Source Port",
    "Destination",
    "Protocol",
    "Host",
    "User",
    "Age",
    "Up",
    "Down",
    "PID",
)


def table(*arguments: str, cwd: Path = running.ROOT) -> str:
    """Return what --table prints of all gateways of this box, ours among them."""
    done = running.command("--table", *arguments, cwd=cwd)
    assert (done.returncode, done.stderr) == (0, ""), done
    return done.stdout


def rows(gateway: running.Gateway) -> list[dict[str, object]]:
    """Return the rows of --table --json that are this gateway's."""
    ours = gateway.workers()
    return [row for row in json.loads(table("--json")) if row["pid"] in ours]


def test_each_request_is_one_line_with_its_fields_in_order(
    natwork: running.Start, origin: origins.Start
) -> None:
    gateway, server = natwork(), origin(http_wire.Script(http_wire.sized(b"hello")))
    with gateway.connect() as client:
        name = "%s:%d" % client.getsockname()
        http_wire.exchange(client, http_wire.request(server, path=b"/a/b?c"))
        http_wire.exchange(client, http_wire.request(http_wire.DENIED))
        http_wire.exchange(
            client, http_wire.request(server, path=b"/post", method=b"POST")
        )
    lines = gateway.lines(3)
    assert [list(line) for line in lines] == [FIELDS] * 3
    assert [line["status"] for line in lines] == ["200", "403", "200"]
    assert [line["outcome"] for line in lines] == ["ok", "denied-inside", "ok"]
    assert [line["method"] for line in lines] == ["GET", "GET", "POST"]
    first, second, third = lines
    assert first["target"] == f"{server.url}/a/b"
    assert first["address"] == server.authority
    assert first["source"] == "%s:%d" % server.callers[0]
    assert (second["address"], second["source"]) == ("-", "-")
    assert {line["client"] for line in lines} == {name}
    assert {line["pid"] for line in lines} <= {str(p) for p in gateway.workers()}
    assert int(first["down"]) > 5 and int(first["up"]) > 0 and second["up"] == "0"
    assert re.fullmatch(r"[0-9]+\.[0-9]{3}", first["secs"])
    began = time.strptime(first["time"], "%Y-%m-%dT%H:%M:%SZ")  # UTC
    assert abs(time.mktime(began) - time.mktime(time.gmtime())) < 60


def test_a_tunnel_is_one_line_when_it_ends(
    natwork: running.Start, origin: origins.Start
) -> None:
    gateway, server = natwork(), origin(origins.echo)
    with http_wire.tunnel(gateway, server) as client:
        assert wire.echoes(client, b"x" * 1000)
        assert gateway.log.read_text() == ""
    (line,) = gateway.lines(1)
    assert (line["proto"], line["method"]) == ("connect", "CONNECT")
    assert (line["target"], line["address"]) == (server.authority, server.authority)
    assert (line["status"], line["outcome"]) == ("200", "closed")
    assert (line["up"], int(line["down"]) >= 1000) == ("1000", True)


def test_a_client_who_asks_nothing_has_no_line(
    natwork: running.Start, origin: origins.Start
) -> None:
    gateway = natwork("spare_workers=1", "max_workers=1")
    with gateway.connect():
        pass
    with gateway.connect() as client:
        http_wire.exchange(client, http_wire.request(http_wire.DENIED))
    assert len(gateway.lines(1)) == 1


EVERY_BYTE = bytes(set(range(1, 256)) - set(b"\r\n"))
HOSTILE = {
    "every byte in the path": b"GET http://%b/%b HTTP/1.1\r\n"
    % (http_wire.DENIED, EVERY_BYTE),
    "escapes in the path": b"GET http://%b/\x1b[2J\x1b]0;x\x07 HTTP/1.1\r\n"
    % http_wire.DENIED,
    "high bytes in the path": b"GET http://%b/\xe9\xff\x80 HTTP/1.1\r\n"
    % http_wire.DENIED,
    "quotes in the path": b'GET http://%b/"\\"\\x HTTP/1.1\r\n' % http_wire.DENIED,
    "a forged field": b"GET http://%b/a_outcome=ok HTTP/1.1\r\n" % http_wire.DENIED,
    "a forged line": b"GET http://%b/a\ntime=x HTTP/1.1\r\n" % http_wire.DENIED,
    "a bare CR": b"GET http://%b/a\rtime=x HTTP/1.1\r\n" % http_wire.DENIED,
    "a long path": b"GET http://%b/%b HTTP/1.1\r\n" % (http_wire.DENIED, b"a" * 15000),
    "a long path of quotes": b"GET http://%b/%b HTTP/1.1\r\n"
    % (http_wire.DENIED, b'"' * 15000),
    "a long path of high bytes": b"GET http://%b/%b HTTP/1.1\r\n"
    % (http_wire.DENIED, b"\xff" * 15000),
    "a hostile method": b"G\x1bET http://%b/ HTTP/1.1\r\n" % http_wire.DENIED,
    "a method of all marks": b"!#$%%&'*+-.^_`|~ http://%b/ HTTP/1.1\r\n"
    % http_wire.DENIED,
    "a long method": b"%b http://%b/ HTTP/1.1\r\n" % (b"M" * 5000, http_wire.DENIED),
    "a hostile host to connect": b"CONNECT a\x07\xff\\:443 HTTP/1.1\r\n",
    "a long host to connect": b"CONNECT %b:443 HTTP/1.1\r\n" % (b"h" * 15000),
    "a long host": b"GET http://%b/ HTTP/1.1\r\n" % (b"\xe9" * 9000),
    "a hostile scheme": b"GET x\x1b://%b/ HTTP/1.1\r\n" % http_wire.DENIED,
    "a hostile version": b"GET http://%b/ HTTP/\x1b.1\r\n" % http_wire.DENIED,
    "no HTTP": b"\x16\x03\x01\xff\x00\n\n\x1b[2J\r\n",
}


@pytest.mark.parametrize("line", HOSTILE.values(), ids=HOSTILE.keys())
@pytest.mark.parametrize(
    "host", [http_wire.DENIED, b'\x1b\xff"\\'], ids=["host", "bad host"]
)
def test_hostile_bytes_stay_one_short_line_of_printable_ascii(
    gateway: running.Gateway, line: bytes, host: bytes
) -> None:
    before = gateway.log.read_bytes()
    with gateway.connect() as client:
        wire.send(client, line + b"Host: " + host + b"\r\nConnection: close\r\n\r\n")
        http_wire.read_answer(client)
    wait.until(lambda: gateway.log.read_bytes() != before)
    written = gateway.log.read_bytes()[len(before) :]
    assert len(written) <= 4096 and written.endswith(b"\n")
    assert LINE.fullmatch(written[:-1].decode("ascii"))


def test_a_stranger_is_one_line_without_an_answer(
    natwork: running.Start,
) -> None:
    gateway = natwork("inside=10.0.0.0/8")
    with gateway.connect() as client:
        name = "%s:%d" % client.getsockname()
        wire.send(client, http_wire.request(http_wire.DENIED))
        try:
            assert client.recv(1) == b""
        except ConnectionResetError:  # closed with our request unread
            pass
    (line,) = gateway.lines(1)
    assert line["client"] == name
    assert (line["outcome"], line["status"], line["down"]) == ("not-inside", "-", "0")


def test_path_query_and_password_are_not_in_the_title(
    gateway: running.Gateway, origin: origins.Start
) -> None:
    held, before = http_wire.Held(), len(gateway.log.read_text().splitlines())
    server = origin(held, "127.0.0.3")
    secrets = [b"Authorization: Basic c2VjcmV0", b"Proxy-Authorization: Basic cHc="]
    with gateway.connect() as client:
        wire.send(
            client, http_wire.request(server, *secrets, path=b"/path?token=query")
        )
        assert held.asked.wait(10)
        source = "%s:%d" % server.callers[0]
        shown = "%s:%d" % client.getsockname()
        expected = f"natwork: {shown} > {source} > {server.authority} http 127.0.0.3"
        assert kernel.title(gateway.worker_of(client)) == expected  # trap 27
        (row,) = [r for r in rows(gateway) if r["destination"] == server.authority]
        assert not {"query", "token", "/path"} & set(re.findall(r"\W?\w+", str(row)))
        held.go.set()
        assert http_wire.read_answer(client).body == b"at last"
    shown = gateway.lines(before + 1)[-1]["target"]
    assert shown == f"{server.url}/path"
    assert not re.search("token|query|c2VjcmV0|cHc=", gateway.log.read_text())


@pytest.mark.parametrize("target", ["/a?mail=b@c&pw=token", "foo://h/?q=a@token"])
def test_no_part_of_a_query_is_in_the_log(
    gateway: running.Gateway, target: str
) -> None:
    before = len(gateway.lines())
    with gateway.connect() as client:
        wire.send(client, f"GET {target} HTTP/1.1\r\nHost: g\r\n\r\n".encode())
        assert b"token" not in http_wire.read_answer(client).body
    assert "token" not in gateway.lines(before + 1)[-1]["target"]


@pytest.mark.parametrize(
    ("target", "host"),
    [
        ("http://a.example:80/web/http://b.example/x", "a.example"),
        ("a.example:443", "a.example"),
        ("[::1]:443", "::1"),
        ("http://[::1]:80/cb/app://SECRET", "::1"),
        ("/cb/app://SECRET", ""),
        ("-", "-"),
    ],
)
def test_the_host_is_not_taken_from_the_path(target: str, host: str) -> None:
    session = natwork.Session("10.0.0.7:1", "1")
    session.target = target
    assert session.host() == host


def test_a_clock_that_is_set_makes_no_session_longer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As a box without a clock of its own does when it hears the time."""
    board = natwork.Scoreboard()
    board.words[board.USED] = 1
    session, now = natwork.Session("10.0.0.7:1", "1"), time.time()
    natwork.Slot(board, 0).publish(session)
    for step in (10 * 86400, -86400):
        monkeypatch.setattr(time, "time", lambda set_to=now + step: set_to)
        assert float(session.line("ok").rpartition("secs=")[2]) < 60
        assert 0 <= natwork.table_rows(board)[0]["age"] < 60


def test_user_and_password_in_a_target_are_written_nowhere(
    gateway: running.Gateway,
) -> None:
    targets = [b"http://me:secret@10.1.2.3/", b"http://me:secret@10.1.2.3/?secret"]
    before = len(gateway.lines())
    for target in targets:
        with gateway.connect() as client:
            head = b"GET %b HTTP/1.1\r\nHost: 10.1.2.3\r\n\r\n" % target
            assert http_wire.exchange(client, head).status in (400, 403)
    with gateway.connect() as client:
        head = b"CONNECT me:secret@10.1.2.3:443 HTTP/1.1\r\nHost: x\r\n\r\n"
        assert http_wire.exchange(client, head).status in (400, 403)
    gateway.lines(before + 3)
    assert "secret" not in gateway.log.read_text()


def test_json_lines_have_the_same_fields(
    natwork: running.Start, origin: origins.Start
) -> None:
    gateway, server = (
        natwork("log_format=json"),
        origin(http_wire.Script(http_wire.sized(b"hello"))),
    )
    with gateway.connect() as client:  # refused, and closed
        http_wire.exchange(client, http_wire.request(server, path=b'/"\\\x1b\xff'))
    wait.until(lambda: gateway.log.read_bytes().count(b"\n") == 1)
    with gateway.connect() as client:
        http_wire.exchange(client, http_wire.request(server, path=b"/plain"))
        http_wire.exchange(client, http_wire.request(http_wire.DENIED))
    wait.until(lambda: gateway.log.read_bytes().count(b"\n") == 3)
    text = gateway.log.read_bytes().decode("ascii")
    lines = [json.loads(line) for line in text.splitlines()]
    assert [list(line) for line in lines] == [FIELDS] * 3
    assert lines[1]["target"] == f"{server.url}/plain"
    assert [line["status"] for line in lines[1:]] == [200, 403]
    assert lines[2]["address"] is None and lines[1]["address"] == server.authority
    for name in ("pid", "up", "down", "secs"):
        assert all(type(line[name]) in (int, float) for line in lines), name


def test_a_long_json_line_is_short_enough_for_a_pipe(
    natwork: running.Start,
) -> None:
    gateway = natwork("log_format=json")
    with gateway.connect() as client:
        http_wire.exchange(
            client, http_wire.request(http_wire.DENIED, path=b"/" + b'"' * 15000)
        )
    wait.until(lambda: gateway.log.read_bytes().endswith(b"\n"))
    assert len(gateway.log.read_bytes()) <= 4096
    assert json.loads(gateway.log.read_text())["method"] == "GET"


def fill(pipe: int) -> None:
    """Write to a pipe until nothing more fits."""
    os.set_blocking(pipe, False)
    with pytest.raises(BlockingIOError):
        while True:
            os.write(pipe, b"." * 4096)
    os.set_blocking(pipe, True)  # the gateway must not rely on what we set


def test_a_full_pipe_loses_lines_and_stops_nobody(
    daemon: running.Start, origin: origins.Start
) -> None:
    out, into = os.pipe()
    fill(into)
    gateway = daemon(log="-", stdout=into, spare_workers="1")
    server = origin(http_wire.Script())
    for _ in range(5):
        with gateway.connect() as client:
            assert http_wire.exchange(client, http_wire.request(server)).status == 200
    gateway.at_rest()
    os.set_blocking(out, False)
    with pytest.raises(BlockingIOError):
        while True:
            assert set(os.read(out, 4096)) == set(b".")  # all five are lost
    with gateway.connect() as client:
        assert (
            http_wire.exchange(client, http_wire.request(server, path=b"/heard")).status
            == 200
        )
    os.set_blocking(out, True)
    line = read_line(out)
    if b"/heard" not in line:  # the fifth came late: an answer is before its line
        line = read_line(out)
    assert b"/heard status=" in re.sub(rb" address.*?(?= status)", b"", line)
    os.close(into)
    os.close(out)


def read_line(pipe: int) -> bytes:
    line = b""
    while not line.endswith(b"\n"):
        line += os.read(pipe, 1)
    return line


def test_a_reader_who_has_gone_stops_nobody(
    daemon: running.Start, origin: origins.Start
) -> None:
    out, into = os.pipe()
    gateway = daemon(log="-", stdout=into, spare_workers="1")
    os.close(into)
    os.close(out)  # EPIPE from here on, and perhaps SIGPIPE
    for _ in range(3):
        with gateway.connect() as client:
            assert (
                http_wire.exchange(client, http_wire.request(http_wire.DENIED)).status
                == 403
            )


@pytest.mark.parametrize("kind", ["pipe", "socket", "file"])
def test_standard_output_may_be_anything(
    daemon: running.Start, tmp_path: Path, kind: str
) -> None:
    if kind == "socket":  # as journald has it: it cannot be opened a second time
        ours, theirs = socket.socketpair()
        out, into = ours.detach(), theirs.detach()
    elif kind == "pipe":
        out, into = os.pipe()
    else:
        into = os.open(tmp_path / "out", os.O_WRONLY | os.O_CREAT)
        out = os.open(tmp_path / "out", os.O_RDONLY)
    gateway = daemon(log="-", stdout=into)
    os.close(into)
    for _ in range(2):
        with gateway.connect() as client:
            http_wire.exchange(client, http_wire.request(http_wire.DENIED))
    lines = b""

    def two() -> bool:
        nonlocal lines
        lines += os.read(out, 4096)
        return lines.count(b"\n") == 2

    wait.until(two)
    assert all(LINE.fullmatch(line) for line in lines.decode().splitlines())
    os.close(out)


@pytest.mark.parametrize("form", ["text", "json"])
def test_lines_of_many_workers_never_mix(daemon: running.Start, form: str) -> None:
    out, into = os.pipe()
    gateway = daemon(log="-", stdout=into, log_format=form, spare_workers="8")
    os.close(into)
    lines: list[bytes] = []

    def read() -> None:
        with open(out, "rb") as pipe:
            lines.extend(pipe)

    def ask() -> None:
        with gateway.connect(20) as client:
            for _ in range(25):
                http_wire.exchange(
                    client, http_wire.request(http_wire.DENIED, path=b"/" + b"x" * 3000)
                )

    reader = threading.Thread(target=read)
    askers = [threading.Thread(target=ask) for _ in range(8)]
    for thread in [reader, *askers]:
        thread.start()
    for thread in askers:
        thread.join()
    gateway.stop()
    reader.join()  # to the end of file: nobody has the pipe any more
    assert len(lines) == 200
    if form == "json":
        assert all(list(json.loads(line)) == FIELDS for line in lines)
    else:
        assert all(LINE.fullmatch(line.decode().rstrip("\n")) for line in lines)


def test_titles_tell_master_idle_and_busy_apart(
    natwork: running.Start, origin: origins.Start
) -> None:
    gateway, server = natwork("spare_workers=3"), origin(origins.echo, "127.0.0.3")
    master = gateway.process.pid
    wait.until(lambda: kernel.title(master) == "natwork: master 3 idle 0 busy")
    wait.until(lambda: len(gateway.idle()) == 3)
    with http_wire.tunnel(gateway, server) as client:
        assert wire.echoes(client)
        ends = "%s:%d" % client.getsockname(), "%s:%d" % server.callers[0]
        shown = kernel.title(gateway.worker_of(client))
        assert shown == f"natwork: {ends[0]} > {ends[1]} > {server.authority} " + (
            "connect 127.0.0.3"
        )
        wait.until(lambda: kernel.title(master) == "natwork: master 3 idle 1 busy")
    wait.until(lambda: kernel.title(master).endswith(" idle 0 busy"))
    gateway.at_rest()


def test_the_table_shows_an_open_tunnel_and_its_bytes(
    natwork: running.Start, origin: origins.Start
) -> None:
    gateway, server = natwork(), origin(origins.echo, "127.0.0.3")
    with http_wire.tunnel(gateway, server) as client:
        assert wire.echoes(client, b"x" * 50000)
        worker = gateway.worker_of(client)
        wait.until(lambda: rows(gateway)[0]["up"] == 50000)
        (row,) = rows(gateway)
        assert isinstance(row.pop("age"), float)
        assert isinstance(down := row.pop("down"), int) and down >= 50000
        assert row == {
            "source_ip": "127.0.0.1",
            "original_source_port": client.getsockname()[1],
            "new_source_port": server.callers[0][1],
            "destination": server.authority,
            "protocol": "connect",
            "host": "127.0.0.3",
            "user": "-",
            "up": 50000,
            "pid": worker,
        }
        head, *lines = table().splitlines()
        assert tuple(re.split("  +", head)) == COLUMNS
        (line,) = [line for line in lines if line.endswith(f" {worker}")]
        cells = re.split("  +", line)
        assert cells[:7] == [
            "127.0.0.1",
            str(client.getsockname()[1]),
            str(server.callers[0][1]),
            server.authority,
            "connect",
            "127.0.0.3",
            "-",
        ]
        assert cells[8:] == ["50000", str(down), str(worker)]
    wait.until(lambda: not rows(gateway))


@pytest.mark.parametrize("limit", range(9))
def test_what_is_cut_is_not_cut_within_an_escape(limit: int) -> None:
    text = r"\x0a\x0a"[: limit // 4 * 4]
    assert natwork.printable(b"\n\n", limit) == (text or "-")


FORGER = """
import fcntl, os, sys, time
sys.path.insert(0, sys.argv[1])
import natwork
board = natwork.Scoreboard()
board.words[board.MASTER], board.words[board.USED] = os.getpid(), 3
def forge(number, pid, user):
    session = natwork.Session("10.9.9.9:1", str(pid), "connect")
    session.user, session.method, session.target = user, "CONNECT", "a:1"
    session.address, session.source, session.status = "b:2", "c:3", "200"
    slot = natwork.Slot(board, number)
    slot.clear(pid)
    slot.publish(session)
    slot.set_state(natwork.BUSY)
for number, pid in enumerate(map(int, sys.argv[2:])):
    forge(number, pid, "\\x1b[31mroot")
if child := os.fork():
    forge(2, child, "\\x1b[31mred")
    print("ready", child, flush=True)
time.sleep(60)
"""


def test_a_board_that_is_forged_has_no_more_slots_than_there_are() -> None:
    board = natwork.Scoreboard()
    board.words[board.USED] = (1 << 64) - 1
    assert len(board.states()) == len(board.column(0)) == natwork.SLOT_LIMIT


def test_the_table_of_another_names_no_process_that_is_not_his(tmp_path: Path) -> None:
    words = [
        sys.executable,
        "-B",
        "-c",
        FORGER,
        str(running.ROOT),
        "1",
        str(os.getpid()),
    ]
    with subprocess.Popen(
        words, stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as forger:
        try:
            assert forger.stdout
            child = int(forger.stdout.readline().split()[1])
            done = running.command("--table", "--json", cwd=tmp_path)
            found = [r for r in json.loads(done.stdout) if r["source_ip"] == "10.9.9.9"]
            assert [row["pid"] for row in found] == [child]
            shown = running.command("--table", cwd=tmp_path).stdout
            assert "?[31mred" in shown and "\x1b" not in shown
        finally:
            os.killpg(forger.pid, signal.SIGKILL)


def test_an_idle_gateway_has_an_empty_table(
    natwork: running.Start,
) -> None:
    gateway = natwork()
    wait.until(lambda: gateway.idle())
    assert rows(gateway) == []
    assert tuple(re.split("  +", table().splitlines()[0])) == COLUMNS


@pytest.mark.parametrize("form", [[], ["--json"]])
def test_no_table_without_a_gateway(tmp_path: Path, form: list[str]) -> None:
    # In a /proc of its own: other gateways may run on this box.
    alone = ["unshare", "--pid", "--fork", "--mount-proc"]
    alone += ["--user", "--map-root-user"] if os.geteuid() else []
    done = running.command(
        "--table", *form, cwd=tmp_path, program=[*alone, *running.PROGRAM]
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert re.fullmatch("natwork: cannot show the table: [^\n]+\n", done.stderr)


def test_a_dead_gateway_is_not_in_the_table(
    daemon: running.Start, origin: origins.Start
) -> None:
    gateway = daemon()
    with http_wire.tunnel(gateway, origin(origins.echo)) as client:
        worker = gateway.worker_of(client)
        gateway.expected = -signal.SIGKILL
        gateway.process.kill()
        gateway.process.wait(10)
        done = running.command("--table", "--json", cwd=running.ROOT)
        assert done.returncode == 1 or worker not in [
            row["pid"] for row in json.loads(done.stdout)
        ]


def test_log_and_table_agree_after_kill_9(
    natwork: running.Start, origin: origins.Start
) -> None:
    gateway, server = natwork(), origin(origins.echo)
    clients = [http_wire.tunnel(gateway, server) for _ in range(6)]
    pids = [gateway.worker_of(client) for client in clients]
    assert all(wire.echoes(client, b"12345") for client in clients)
    wait.until(lambda: [row["up"] for row in rows(gateway)] == [5] * 6)
    for pid in pids[:3]:
        os.kill(pid, signal.SIGKILL)
    lines = gateway.lines(3)
    assert {line["pid"] for line in lines} == {str(pid) for pid in pids[:3]}
    assert all(line["outcome"] == "killed" and line["up"] == "5" for line in lines)
    assert {line["client"] for line in lines} == {
        "%s:%d" % client.getsockname() for client in clients[:3]
    }
    assert {row["pid"] for row in rows(gateway)} == set(pids[3:])
    assert all(wire.echoes(client) for client in clients[3:])
    for client in clients:
        client.close()
    lines = gateway.lines(6)
    assert [line["outcome"] for line in lines[3:]] == ["closed"] * 3
    assert len(lines) == 6 and rows(gateway) == []


def test_a_session_is_in_one_table_only_once_its_slot_is_used_again(
    natwork: running.Start, origin: origins.Start
) -> None:
    gateway = natwork("spare_workers=1", "max_workers=1")
    server = origin(origins.echo)
    for _ in range(3):
        with http_wire.tunnel(gateway, server) as client:
            assert len(rows(gateway)) == 1
            os.kill(gateway.worker_of(client), signal.SIGKILL)
        wait.until(lambda: gateway.idle())
        assert rows(gateway) == []
    assert [line["outcome"] for line in gateway.lines(3)] == ["killed"] * 3


def served(gateway: running.Gateway) -> bool:
    """Say whether a gateway answers a request, which it denies."""
    with socket.create_connection(gateway.address, 10) as client:
        client.sendall(b"GET http://10.1.2.3/ HTTP/1.1\r\nHost: 10.1.2.3\r\n\r\n")
        return client.recv(12) == b"HTTP/1.1 403"


def test_a_reload_does_not_write_over_what_the_shell_opened(
    daemon: running.Start, tmp_path: Path
) -> None:
    user = "root" if os.geteuid() else "nobody"  # who may not open it again
    with (tmp_path / "out").open("wb") as out:  # by ">", without O_APPEND
        gateway = daemon(log="-", user=user, stdout=out.fileno())
    assert served(gateway) and served(gateway)
    gateway.hangup()
    assert served(gateway)
    lines = wait.until(lambda: (tmp_path / "out").read_text().splitlines()[2:] and 1)
    lines = (tmp_path / "out").read_text().splitlines()
    assert len(lines) == 3 and all(line.startswith("time=") for line in lines)


def test_messages_do_not_write_over_lines_of_the_same_file(tmp_path: Path) -> None:
    both = ["sh", "-c", 'exec "$@" >&2', "sh"]  # as by ">file 2>&1", without O_APPEND
    gateway = running.Gateway.activated(
        tmp_path, "log=-", program=[*both, *running.PROGRAM]
    )
    for _ in range(3):
        assert served(gateway)
    wait.until(lambda: gateway.errors.read_text().count("time=") == 3)
    gateway.process.send_signal(signal.SIGHUP)
    wait.until(lambda: "configuration reloaded\n" in gateway.errors.read_text())
    assert served(gateway)
    lines = gateway.stop().splitlines()
    assert all(line.startswith(("natwork: ", "time=")) for line in lines), lines
    assert len([line for line in lines if LINE.fullmatch(line)]) == 4


def test_what_is_said_into_the_log_itself_appends_too(tmp_path: Path) -> None:
    log = tmp_path / "log"
    both = ["sh", "-c", f'exec "$@" 2>{log}', "sh"]  # without O_APPEND
    gateway = running.Gateway.activated(
        tmp_path,
        f"log={log}",
        f"user={running.SELF}",
        program=[*both, *running.PROGRAM],
    )
    for _ in range(3):
        assert served(gateway)
    wait.until(lambda: log.read_text().count("time=") == 3)
    gateway.process.send_signal(signal.SIGHUP)
    wait.until(lambda: "configuration reloaded\n" in log.read_text())
    said = running.OF_THIS_BOX.sub("", log.read_text()).splitlines()
    assert len([line for line in said if line.startswith("time=")]) == len(said) - 3
    os.truncate(log, 0)
    gateway.process.send_signal(signal.SIGHUP)
    reloaded = "natwork: configuration reloaded\n"
    wait.until(lambda: running.OF_THIS_BOX.sub("", log.read_text()) == reloaded)
    gateway.stop()


def test_a_line_that_is_lost_takes_nothing_from_the_log(
    daemon: running.Start, tmp_path: Path
) -> None:
    log = tmp_path / "old.log"
    log.write_bytes(b"an older line\n" * 400)
    shutil.chown(log, running.SELF)
    old, size = log.read_bytes(), (log.stat().st_size, resource.RLIM_INFINITY)
    gateway = daemon(log=str(log), spare_workers="2")
    wait.until(lambda: len(gateway.workers()) == 2)
    for pid in (gateway.process.pid, *gateway.workers()):
        resource.prlimit(pid, resource.RLIMIT_FSIZE, size)  # it takes no byte more
    assert served(gateway)
    wait.until(lambda: lost_lines(gateway))
    assert log.read_bytes() == old


@pytest.mark.parametrize("rotated", [False, True])
def test_half_a_line_is_not_joined_by_the_next(
    daemon: running.Start, rotated: bool
) -> None:
    gateway = daemon()

    def limit(size: int) -> None:
        """Let the gateway's files be this large and no larger, as a full disk does."""
        for pid in (gateway.process.pid, *gateway.workers()):
            resource.prlimit(pid, resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

    gateway.ready(8)  # one that is forked between the two has the old limit
    limit(1000)
    for _ in range(12):
        assert served(gateway)  # a lost line stops no session
    wait.until(lambda: lost_lines(gateway))
    limit(resource.RLIM_INFINITY)
    if rotated:
        gateway.log.rename(gateway.log.with_suffix(".old"))
        gateway.hangup()
    assert served(gateway)
    wait.until(gateway.log.read_text)
    wait.until(lambda: " secs=" in gateway.log.read_text().splitlines()[-1])
    lines = gateway.log.read_text().splitlines()
    assert all(line.startswith("time=") for line in lines)
    assert all(line.count("time=") == 1 for line in lines) and len(lines) < 13


def lost_lines(gateway: running.Gateway) -> bool:
    """Say whether the gateway has said which file lost lines, and why."""
    form = r"natwork: the access log /\S+ took no more: lines were lost \([a-z ]+\)"
    lost = [line for line in gateway.said() if "lines were lost" in line]
    assert all(re.fullmatch(form, line) for line in lost), lost
    return bool(lost)


def test_a_lost_line_that_is_said_later_has_its_reason(
    capfd: pytest.CaptureFixture[str],
) -> None:
    config = natwork.Config()
    config.log = "/dev/full"
    log, board = natwork.AccessLog(config), natwork.Scoreboard()
    board.words[board.LAST_SAID] = int(time.monotonic())  # another one had its turn
    slot = natwork.Slot(board, 0)
    log.write(natwork.Session("10.0.0.7:1", "1"), "ok", slot)
    board.words[board.LAST_SAID] = 0
    with open("/dev/null", "wb") as file:
        os.dup2(file.fileno(), log.fd)  # there is room again
    log.write(natwork.Session("10.0.0.7:1", "1"), "ok", slot)
    lost = "the access log /dev/full took no more: lines were lost"
    assert capfd.readouterr().err == f"natwork: {lost} (no space left on device)\n"


def test_a_full_disk_loses_lines_and_no_session(
    daemon: running.Start, tmp_path: Path
) -> None:
    if os.geteuid() != 0:
        needs.unavailable("a disk that is full needs a mount, and that root")
    disk, small = tmp_path / "disk", ["-t", "tmpfs", "-o", "size=64k", "natwork"]
    log = disk / "log"
    disk.mkdir()
    subprocess.run(["mount", *small, disk], check=True)
    try:
        gateway = daemon(log=str(log), spare_workers="2")
        assert served(gateway)
        wait.until(log.read_text)
        with contextlib.suppress(OSError), (disk / "filler").open("wb") as filler:
            while filler.write(b"." * 1024):
                filler.flush()
        for _ in range(40):  # the page that the log has may take a few
            assert served(gateway)
        wait.until(lambda: lost_lines(gateway))
        there = len(running.whole_lines(log))  # and perhaps half a line
        (disk / "filler").unlink()
        assert served(gateway) and served(gateway)
        wait.until(lambda: len(running.whole_lines(log)) >= there + 2)
        lines = running.whole_lines(log)
        assert len(lines) < 43 and LINE.fullmatch(lines[-1])
        gateway.stop()
    finally:
        subprocess.run(["umount", "-l", disk], check=True)


# What other programs make of it, as the README tells them.


def test_fail2ban_finds_who_knocks_from_outside(
    natwork: running.Start, tmp_path: Path
) -> None:
    needs.programs("fail2ban-regex")
    gateway = natwork("inside=10.0.0.0/8", loopback=False)
    with gateway.connect() as client:
        assert not client.recv(1)
    (line,) = gateway.lines(1)
    assert line["outcome"] == "not-inside"
    # Another who cannot tell a password, in a zone of its own; and one who forges.
    real = gateway.log.read_text()
    ipv6 = real.replace("127.0.0.1:", "[2001:db8::7]:")
    words = "proto=http method=GET target=http://a/outcome=not-inside"
    good = real.replace("outcome=not-inside", "outcome=ok").replace("target=-", words)
    text = real + ipv6.replace("=not-inside", "=auth-failed") + good
    gateway.log.write_text(text)
    filters = tmp_path / "natwork.conf"
    filters.write_text(readme.block("Reading the log", "[Definition]"))
    for zone in ("UTC", "America/New_York"):
        done = subprocess.run(
            ["fail2ban-regex", "--out", "<ip> <time>", gateway.log, filters],
            env={**os.environ, "TZ": zone},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=60,
        )
        rows = [row.split() for row in done.stdout.splitlines()]
        assert [row[0] for row in rows] == ["127.0.0.1", "2001:db8::7"], done
        assert all(abs(float(row[1]) - time.time()) < 60 for row in rows)


def test_a_shared_log_may_have_any_descriptor() -> None:
    code = """
import os, socket, resource, natwork
soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
reader, writer = socket.socketpair()
os.dup2(writer.fileno(), 1)
held = [os.dup(2) for _ in range(1100)]
log = natwork.AccessLog(natwork.Config())
assert log.may_block and log.fd > 1024
slot = natwork.Slot(natwork.Scoreboard(), 0)
log.write(natwork.Session("10.0.0.7:1", "1"), "ok", slot)
os.write(2, reader.recv(4096))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=running.ROOT, capture_output=True, text=True
    )
    assert re.fullmatch(r"time=.* client=10.0.0.7:1 .* outcome=ok .*\n", done.stderr)
