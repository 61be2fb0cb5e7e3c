"""The asking user, and the share of the gateway: users, passwords, max_per_client."""

from __future__ import annotations

import base64
import contextlib
import fcntl
import hashlib
import mmap
import os
import pty
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from collections.abc import Iterator
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
import natwork_users
from natwork import printable

NAMED = f"name={running.NAME.decode()}"
SECRET, OTHER = b"kQ7-secret", b"vX3-secret"  # of alice, and of bob
BUSY_HOUSE = ("max_workers=700", "spare_workers=16")


@pytest.fixture(scope="module")
def users(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a file of two users, as --passwd makes its lines."""
    path = tmp_path_factory.mktemp("users") / "users"
    write(path, (b"alice", SECRET), (b"bob", OTHER))
    return path


def write(path: Path, *pairs: tuple[bytes, bytes]) -> Path:
    """Write a file of users that only its owner reads."""
    lines = [natwork_users.user_line(name, password) for name, password in pairs]
    path.write_bytes(b"\n".join([b"# who may ask", *lines, b""]))
    path.chmod(0o600)
    return path


def basic(name: bytes, password: bytes) -> bytes:
    """Return the field line with which a client names himself."""
    return b"Proxy-Authorization: Basic " + base64.b64encode(name + b":" + password)


ALICE, BOB = basic(b"alice", SECRET), basic(b"bob", OTHER)
WRONG = basic(b"alice", b"wrong")


def board(gateway: running.Gateway) -> natwork.Scoreboard:
    """Return the scoreboard of a gateway, to read."""
    fd = os.open(board_link(gateway), os.O_RDONLY)
    try:
        return natwork.Scoreboard(fd)
    finally:
        os.close(fd)


def board_link(gateway: running.Gateway) -> str:
    """Return the way to the scoreboard of a gateway, once it has started."""
    wait.until(lambda: kernel.title(gateway.process.pid).startswith("natwork: master"))
    folder = f"/proc/{gateway.process.pid}/fd"
    links = [f"{folder}/{name}" for name in os.listdir(folder)]
    return next(x for x in links if os.readlink(x).startswith("/memfd:natwork "))


def memory(gateway: running.Gateway) -> bytes:
    """Return what is shared: the scoreboard as far as it is used, and the pairs."""
    size = natwork.Scoreboard.SLOTS + 64 * natwork.Scoreboard.SLOT_SIZE
    return bytes(board(gateway).memory[:size]) + pairs(gateway)


def pairs(gateway: running.Gateway) -> bytes:
    """Return the memory of the pairs of name and password that were right."""
    board_link(gateway)  # it has started
    pid, places = gateway.process.pid, 1 + natwork_users.PLACES
    size = natwork_users.PLACE_SIZE * places
    with open(f"/proc/{pid}/maps") as maps, open(f"/proc/{pid}/mem", "rb", 0) as mem:
        for line in maps:
            begin, end = (int(x, 16) for x in line.split()[0].split("-"))
            if "/dev/zero" in line and 0 <= end - begin - size < mmap.PAGESIZE:
                mem.seek(begin)
                return mem.read(size)
    raise AssertionError("there is no such memory")


# Statements that make a gateway write down each check of a password.
COUNTING = (
    "import natwork_users as users, os",
    "file, scrypt = open('checks', 'ab', buffering=0), users.scrypt",
    "users.scrypt = lambda *pair: file.write(b'.') and scrypt(*pair)",
)
# Here a client that guesses need not wait for long.
SHORT = {"natwork_users.WRONG_PAUSE": 0.02}
HASTY, COUNTED = running.program(SHORT), running.program(SHORT, *COUNTING)


def checks(gateway: running.Gateway) -> int:
    """Return how many passwords have been put through scrypt, of COUNTED."""
    return (gateway.folder / "checks").stat().st_size


# --- The file and --passwd ----------------------------------------------------


def passwd(name: str, given: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*running.PROGRAM, "--passwd", name],
        input=given,
        capture_output=True,
        text=True,
        timeout=30,
    )


def fits(line: str, name: str, password: bytes) -> bool:
    """Say whether a line is of a user and a password, by its own parameters."""
    match = re.fullmatch(
        r"(.+):\$scrypt\$ln=(\d+),r=(\d+),p=(\d+)\$([^$]+)\$([^$]+)\n", line
    )
    assert match and match[1] == name, line
    salt, wanted = (base64.b64decode(match[n] + "==") for n in (5, 6))
    cost, r, p = (int(match[n]) for n in (2, 3, 4))
    assert 128 * r << cost == 16 << 20 and len(salt) == 16  # bytes of memory
    return wanted == hashlib.scrypt(password, salt=salt, n=1 << cost, r=r, p=p)[:32]


def test_passwd_prints_a_salted_line() -> None:
    one, other = (passwd("zo\u00eb", "g\u00e9heim 1\ng\u00e9heim 1\n") for _ in "ab")
    assert (one.returncode, one.stderr) == (0, "")
    assert fits(one.stdout, "zo\u00eb", "g\u00e9heim 1".encode())
    assert one.stdout != other.stdout


def test_passwd_asks_twice_at_a_terminal() -> None:
    master, slave = pty.openpty()
    process = subprocess.Popen(
        [*running.PROGRAM, "--passwd", "alice"],
        stdin=slave,
        stdout=subprocess.PIPE,
        stderr=slave,
        start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, 0x540E, 0),  # TIOCSCTTY
    )
    os.close(slave)
    said = b""
    for prompts in (1, 2):
        while said.count(b": ") < prompts:
            said += os.read(master, 1024)
        os.write(master, SECRET + b"\n")
    out, _ = process.communicate(timeout=30)
    with contextlib.suppress(OSError):
        said += os.read(master, 1024)
    os.close(master)
    assert process.returncode == 0 and fits(out.decode(), "alice", SECRET)
    assert SECRET not in said


@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("alice", "\n\n"),
        ("alice", ""),
        ("al ice", "one\none\n"),
        ("al:ice", "one\none\n"),
        ("alice;x", "one\none\n"),
        ("alice,bob", "one\none\n"),
        ("-", "one\none\n"),
        ("#alice", "one\none\n"),
        ("", "one\none\n"),
        ("a" * 61, "one\none\n"),
        ("al\udcff", "one\none\n"),
    ],
)
def test_passwd_refuses_what_would_not_work(name: str, given: str) -> None:
    done = passwd(name, given)
    assert (done.returncode, done.stdout) == (1, "")
    assert re.fullmatch(r"natwork: cannot take [^\n]+\n", done.stderr)
    assert "one" not in done.stderr


GOOD = natwork_users.user_line(b"alice", SECRET).decode()
HASH = GOOD.rpartition("$")[2]
BAD_FILES = {
    "others may read": (GOOD, 0o604, "others"),
    "others may write": (GOOD, 0o602, "others"),
    "others may run": (GOOD, 0o601, "others"),
    "twice": (f"{GOOD}\n{GOOD}", 0o600, "line 2"),
    "no hash": ("alice", 0o600, "line 1"),
    "plain password": (f"alice:{SECRET.decode()}", 0o600, "line 1"),
    "blank behind": (f"{GOOD} ", 0o600, "line 1"),
    "blank in the name": (f"al ice{GOOD[5:]}", 0o600, "blank"),
    "semicolon": (f"alice;x{GOOD[5:]}", 0o600, "semicolon"),
    "colon": (f"alice:x{GOOD[5:]}", 0o600, "line 1"),
    "no name": (GOOD[5:], 0o600, "line 1"),
    "other cost": (GOOD.replace("ln=14", "ln=30"), 0o600, "line 1"),
    "cut": (f"# fine\n{GOOD[:-1]}", 0o600, "line 2"),
    "carriage return": (f"{GOOD}\r", 0o600, "line 1"),
}


@pytest.mark.parametrize(("text", "mode", "part"), BAD_FILES.values(), ids=BAD_FILES)
def test_a_bad_file_is_one_line_without_secrets(
    tmp_path: Path, text: str, mode: int, part: str
) -> None:
    path = tmp_path / "users"
    path.write_text(text + "\n", newline="")
    path.chmod(mode)
    for arguments in (["-t"], []):
        done = running.command(*arguments, "-o", "users=users", cwd=tmp_path)
        assert (done.returncode, done.stdout) == (78, "")
        assert re.fullmatch(r"natwork: option -o: users = [^\n]+\n", done.stderr)
        assert part in done.stderr
        assert SECRET.decode() not in done.stderr and HASH not in done.stderr


def test_a_file_that_is_none_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo", 0o600)
    for name, why in {"nowhere": "no such file", "fifo": "file", ".": "a"}.items():
        done = running.command("-t", "-o", f"users={name}", cwd=tmp_path)
        assert done.returncode == 78 and why in done.stderr


def test_the_group_may_read_it(tmp_path: Path, users: Path) -> None:
    (tmp_path / "users").write_text(users.read_text())
    (tmp_path / "users").chmod(0o640)
    done = running.command("-t", "-o", "users=users", cwd=tmp_path)
    assert done.returncode == 0 and "\nusers = users\n" in done.stdout


# --- Asking -------------------------------------------------------------------


def test_without_a_name_the_answer_is_407(
    natwork: running.Start, origin: origins.Start, users: Path
) -> None:
    gateway, server = (
        natwork(f"users={users}", NAMED, program=HASTY),
        origin(http_wire.Script()),
    )
    for fields in (
        [],
        [b"Proxy-Authorization: Basic"],
        [b"Proxy-Authorization: Basic !"],
        [b"Proxy-Authorization: Basic YQ="],
        [ALICE.replace(b"Basic", b"Bearer")],
        [ALICE, ALICE],
        [ALICE, BOB],
        [ALICE.replace(b"Proxy-", b"")],
        [WRONG],
        [basic(b"alice", b"")],
        [basic(b"", SECRET)],
        [basic(b"", b"")],
        [basic(b"nobody", SECRET)],
        [basic(b"bob", SECRET)],
        [basic(b"Alice", SECRET)],
        [basic(b"alice ", SECRET)],
        [basic(b"alice\0", SECRET)],
        [basic(b"-", b"")],
    ):
        answer = http_wire.ask(gateway, server, *fields)
        assert answer.status == 407, fields
        (challenge,) = answer.values(b"Proxy-Authenticate")  # R37
        assert challenge == b'Basic realm="gate.test", charset="UTF-8"'
        assert http_wire.proxy_error(answer) == b"http_request_denied"
    assert not server.callers


def test_who_is_known_is_served_and_his_password_stays_here(
    natwork: running.Start, origin: origins.Start, users: Path
) -> None:
    gateway, server = (
        natwork(f"users={users}", NAMED, program=HASTY),
        origin(http_wire.Script()),
    )
    for field in (ALICE, ALICE.replace(b"Basic", b"bAsIc")):
        assert http_wire.ask(gateway, server, field).status == 200
        assert not server.handle.requests[-1].values(b"Proxy-Authorization")  # R37
    assert [line["user"] for line in gateway.lines(2)] == ["alice", "alice"]


def test_the_connection_goes_on_after_a_407(
    natwork: running.Start, origin: origins.Start, users: Path
) -> None:
    gateway, server = (
        natwork(f"users={users}", NAMED, program=HASTY),
        origin(http_wire.Script()),
    )
    with gateway.connect() as client:
        assert http_wire.exchange(client, http_wire.request(server)).status == 407
        assert (
            http_wire.exchange(client, http_wire.request(server, WRONG)).status == 407
        )
        assert (
            http_wire.exchange(client, http_wire.request(server, ALICE)).status == 200
        )
        # Each request by itself: R62.
        assert http_wire.exchange(client, http_wire.request(server)).status == 407
        assert http_wire.exchange(client, http_wire.request(server, BOB)).status == 200
        assert (
            http_wire.exchange(client, http_wire.request(server, WRONG)).status == 407
        )
        assert http_wire.exchange(client, http_wire.request(server, BOB)).status == 200
    found = [(x["user"], x["outcome"]) for x in gateway.lines(7)]
    refused, failed = ("-", "auth-required"), ("alice", "auth-failed")
    bob = ("bob", "ok")
    assert found == [refused, failed, ("alice", "ok"), refused, bob, failed, bob]
    # Another user is another server connection: R62.
    assert len(server.callers) == 2


def test_it_closes_after_a_407_where_it_must(
    natwork: running.Start, origin: origins.Start, users: Path
) -> None:
    gateway, server = (
        natwork(f"users={users}", NAMED, program=HASTY),
        origin(http_wire.Script()),
    )
    body = b"Content-Length: 3"
    for data in (
        http_wire.request(server, method=b"CONNECT"),  # R69
        http_wire.request(server, body, method=b"POST", body=b"abc"),  # R56
    ):
        with gateway.connect() as client:
            answer = http_wire.exchange(client, data + http_wire.request(server, ALICE))
            assert answer.status == 407 and answer.closes and wire.at_end(client)
    assert not server.callers


def test_a_407_to_a_body_that_waits_comes_at_once(
    natwork: running.Start, origin: origins.Start, users: Path
) -> None:
    gateway, server = (
        natwork(f"users={users}", NAMED, program=HASTY),
        origin(http_wire.Script()),
    )
    fields = b"Content-Length: 3", b"Expect: 100-continue"
    with gateway.connect() as client:  # R63
        answer = http_wire.exchange(
            client, http_wire.request(server, *fields, method=b"PUT")
        )
        assert answer.status == 407 and answer.closes


def test_trace_and_options_are_not_for_strangers(
    natwork: running.Start, origin: origins.Start, users: Path
) -> None:
    gateway, server = (
        natwork(f"users={users}", NAMED, program=HASTY),
        origin(http_wire.Script()),
    )
    for method, known in (b"TRACE", 501), (b"OPTIONS", 200):
        for fields, status in ((), 407), ((ALICE,), known):
            with gateway.connect() as client:
                hops = (b"Max-Forwards: 0", *fields)
                answer = http_wire.exchange(
                    client, http_wire.request(server, *hops, method=method)
                )
                assert answer.status == status
                assert ALICE[-20:] not in answer.body


def test_the_own_pages_are_for_users_and_the_pac_file_for_all(
    natwork: running.Start, users: Path
) -> None:
    gateway = natwork(f"users={users}", NAMED, program=HASTY)
    at = b"Host: %b:%d" % (gateway.address[0].encode(), gateway.address[1])

    def get(path: bytes, *fields: bytes) -> http_wire.Message:
        lines = [b"GET %b HTTP/1.1" % path, at, *fields]
        with gateway.connect() as client:
            return http_wire.exchange(client, b"\r\n".join(lines) + b"\r\n\r\n")

    mine, wrong = ALICE.replace(b"Proxy-", b""), WRONG.replace(b"Proxy-", b"")
    for path in (b"/", b"/table.json", b"/metrics"):
        for fields in ([], [wrong], [ALICE]):
            answer = get(path, *fields)
            assert answer.status == 401
            (challenge,) = answer.values(b"WWW-Authenticate")
            assert challenge.startswith(b"Basic ") and b"pid" not in answer.body
        assert get(path, mine).status == 200
        # By way of the gateway as a proxy it is the proxy that asks.
        whole = b"http://%b%b" % (at[6:], path)
        assert get(whole, mine).status == 407
        assert get(whole, ALICE).status == 200
    for path in (b"/proxy.pac", b"/wpad.dat", b"/lat.json"):
        assert get(path).status == 200
    assert {line["user"] for line in gateway.lines(20)} == {"-", "alice"}
    counted = get(b"/metrics", mine).body
    assert b'outcome="auth-failed"} 3' in counted
    assert b'outcome="auth-required"} 9' in counted


def test_without_a_file_what_a_client_calls_himself_is_ignored(
    natwork: running.Start, origin: origins.Start
) -> None:
    gateway, server = natwork(NAMED), origin(http_wire.Script())
    for field in (ALICE, b"Proxy-Authorization: x y z"):
        assert http_wire.ask(gateway, server, field).status == 200
    assert {line["user"] for line in gateway.lines(2)} == {"-"}


def test_a_name_may_carry_what_the_client_says_of_itself(
    natwork: running.Start, origin: origins.Start, users: Path
) -> None:
    rules = "rules=deny user bob; allow user alice to 127.0.0.0/8"
    gateway = natwork(f"users={users}", rules, loopback=False, program=COUNTED)
    server = origin(origins.echo)
    for name in (b"alice;app=ftp;host=pc1", b'alice;a b\n"x"', b"alice;", b"alice"):
        with gateway.connect() as client:
            client.sendall(
                http_wire.request(server, basic(name, SECRET), method=b"CONNECT")
            )
            assert b" 200 " in http_wire.read_head(client)
            assert f" {printable(name)} > " in kernel.title(gateway.worker_of(client))
            assert wire.echoes(client)
    assert http_wire.ask(gateway, server, basic(b"bob;alice", OTHER)).status == 403
    found = [(line["user"], line["outcome"]) for line in gateway.lines(5)]
    assert sorted(found) == [
        ("alice", "closed"),
        ("alice;", "closed"),
        (r"alice;a\x20b\x0a\x22x\x22", "closed"),
        ("alice;app=ftp;host=pc1", "closed"),
        ("bob;alice", "denied-rule-1"),
    ]
    assert checks(gateway) == 2  # one for each user, whatever else it says


def test_what_a_client_says_of_itself_is_logged_whole(
    natwork: running.Start, origin: origins.Start, users: Path
) -> None:
    gateway, server = natwork(f"users={users}"), origin(origins.echo)
    name = b"alice;" + "\u00fc".encode() * 124  # RFC 1929 has room for 255
    with gateway.connect() as client:
        client.sendall(login(name, SECRET) + socks5(server) + b"early")
        assert wire.read_exactly(client, 4)[:4] == b"\5\2\1\0"
        assert wire.read_exactly(client, 15)[10:] == b"early"
    (line,) = gateway.lines(1)
    assert line["user"] == "alice;" + r"\xc3\xbc" * 124


def test_a_name_need_not_be_ascii(
    tmp_path: Path, natwork: running.Start, origin: origins.Start
) -> None:
    name = "zo\u00eb".encode()
    path = write(tmp_path / "users", (name, SECRET))
    rules = "rules=deny user other; allow user zo\u00eb to 127.0.0.0/8"
    gateway = natwork(f"users={path}", rules, loopback=False)
    assert (
        http_wire.ask(gateway, origin(http_wire.Script()), basic(name, SECRET)).status
        == 200
    )
    assert gateway.lines(1)[0]["user"] == r"zo\xc3\xab"


@pytest.mark.parametrize("way", [[], ["--proxytunnel"]])
def test_curl_names_its_user(
    natwork: running.Start, origin: origins.Start, users: Path, way: list[str]
) -> None:
    needs.programs("curl")
    gateway, server = natwork(f"users={users}"), origin(http_wire.Script())

    def curl(*words: str) -> str:
        always = ["--silent", "--noproxy", "", "--proxy", gateway.url, *way]
        code = ["--output", os.devnull, "--write-out", "%{http_code} %{http_connect}"]
        done = subprocess.run(
            ["curl", *always, *code, *words, server.url],
            capture_output=True,
            text=True,
            timeout=30,
        )
        return done.stdout

    user = f"alice:{SECRET.decode()}"
    assert "407" in curl()
    assert "407" in curl("--proxy-user", "alice:wrong")
    assert curl("--proxy-user", user).startswith("200")
    assert curl("--proxy-user", user, "--proxy-anyauth").startswith("200")


# --- SOCKS --------------------------------------------------------------------


def login(name: bytes, password: bytes) -> bytes:
    """Return the greeting and the name and password of RFC 1929."""
    return b"\5\1\2\1%c%b%c%b" % (len(name), name, len(password), password)


def socks5(origin: origins.Origin) -> bytes:
    return b"\5\1\0\1" + socket.inet_aton(origin.host) + origin.port.to_bytes(2, "big")


@pytest.mark.parametrize("say", [wire.send, wire.drip])
def test_socks5_asks_for_name_and_password(
    natwork: running.Start, origin: origins.Start, users: Path, say: Callable[..., None]
) -> None:
    gateway, server = natwork(f"users={users}"), origin(origins.echo)
    with gateway.connect() as client:
        say(client, login(b"alice;app=ssh", SECRET) + socks5(server) + b"early")
        assert wire.read_exactly(client, 4) == b"\5\2\1\0"
        assert wire.read_exactly(client, 10)[:2] == b"\5\0"
        assert wire.read_exactly(client, 5) == b"early"
    line = gateway.lines(1)[0]
    assert (line["user"], line["proto"]) == ("alice;app=ssh", "socks5")


def test_socks_is_not_for_strangers(natwork: running.Start, users: Path) -> None:
    gateway = natwork(f"users={users}")
    cases = [
        (login(b"alice", b"wrong"), b"\5\2\1\1", "auth-failed"),
        (login(b"nobody", SECRET), b"\5\2\1\1", "auth-failed"),
        (login(b"", b""), b"\5\2\1\1", "auth-failed"),
        (login(b"n" * 255, b"p" * 255), b"\5\2\1\1", "auth-failed"),  # R73
        (login(b"alice", SECRET).replace(b"\2\1", b"\2\2"), b"\5\2\1\1", "bad-request"),
        (b"\5\1\0", b"\5\xff", "auth-required"),
        (b"\5\2\0\1", b"\5\xff", "auth-required"),
        (b"\4\1\0\1\x7f\0\0\1alice\0", b"\0\x5b" + bytes(6), "auth-required"),
        (b"\4\1\0\1\0\0\0\1alice\0a\0", b"\0\x5b" + bytes(6), "auth-required"),
    ]
    for count, (said, answer, word) in enumerate(cases, 1):
        with gateway.connect() as client:
            client.sendall(said)
            assert wire.read_all(client) == answer
        line = gateway.lines(count)[-1]
        account = "alice" if count == 1 else "-"  # what is nobody's may be a password
        assert (line["outcome"], line["user"]) == (word, account)


def test_one_table_and_one_memory_serve_socks_and_http(
    natwork: running.Start, origin: origins.Start, users: Path
) -> None:
    needs.programs("curl")
    gateway, server = (
        natwork(f"users={users}", program=COUNTED),
        origin(http_wire.Script(http_wire.sized(b"a page"))),
    )
    host = "%s:%d" % gateway.address
    for way in ("--socks5", "--socks5-hostname", "--proxy"):
        words = ["curl", "--silent", "--noproxy", "", way, host]
        words += ["--proxy-user", f"alice:{SECRET.decode()}", server.url]
        done = subprocess.run(words, capture_output=True, timeout=30)
        assert done.stdout == b"a page", done
    assert checks(gateway) == 1
    assert [line["user"] for line in gateway.lines(3)] == ["alice"] * 3


def test_what_is_too_many_is_reply_2(
    natwork: running.Start, origin: origins.Start
) -> None:
    gateway, server = natwork("max_per_client=1"), origin(origins.echo)
    with gateway.connect() as first:
        first.sendall(b"\5\1\0" + socks5(server))
        assert wire.read_exactly(first, 12)[:4] == b"\5\0\5\0"
        with gateway.connect() as second:
            second.sendall(b"\5\1\0" + socks5(server))
            assert wire.read_all(second) == b"\5\0\5\2\0\1" + bytes(6)
    assert {line["outcome"] for line in gateway.lines(2)} == {"too-many", "closed"}


# --- What a check costs -------------------------------------------------------


def at_once(count: int, work: Callable[[int], None]) -> list[threading.Thread]:
    """Start threads that wait for each other before they begin their work."""
    barrier = threading.Barrier(count)

    def one(number: int) -> None:
        barrier.wait(20)
        work(number)

    threads = [threading.Thread(target=one, args=[n]) for n in range(count)]
    for thread in threads:
        thread.start()
    return threads


def test_thirty_connections_at_once_cost_one_check(
    natwork: running.Start, origin: origins.Start, users: Path
) -> None:
    gateway, server = (
        natwork(f"users={users}", "spare_workers=32", program=COUNTED),
        origin(http_wire.Script()),
    )
    statuses: list[int] = []

    def browse(number: int) -> None:
        statuses.append(http_wire.ask(gateway, server, ALICE).status)

    for thread in at_once(30, browse):
        thread.join(30)
    assert statuses == [200] * 30 and checks(gateway) == 1
    assert http_wire.ask(gateway, server, WRONG).status == 407 and checks(gateway) == 2
    assert http_wire.ask(gateway, server, ALICE).status == 200 and checks(gateway) == 2


def test_a_client_that_guesses_keeps_nobody_else_from_logging_in(
    natwork: running.Start, origin: origins.Start, users: Path
) -> None:
    counted = running.program({}, *COUNTING)
    gateway = natwork(f"users={users}", "spare_workers=64", program=counted)
    server = origin(http_wire.Script())
    guesses, began = [], time.monotonic()
    for number in range(40):
        guesses.append(gateway.connect(60))
        field = basic(b"alice", b"guess %d" % number)
        guesses[-1].sendall(http_wire.request(server, field))
    with socket.socket() as client:
        client.bind(("127.0.0.7", 0))
        client.settimeout(10)
        client.connect(gateway.address)
        assert (
            http_wire.exchange(client, http_wire.request(server, ALICE)).status == 200
        )
    # One guess at a time, and after a wrong one none for WRONG_PAUSE; and alice's own.
    pauses = (time.monotonic() - began) / natwork_users.WRONG_PAUSE
    assert checks(gateway) <= 2 + pauses
    for guess in guesses:
        wire.reset(guess)


def test_guesses_count_as_sessions_of_their_client(
    natwork: running.Start, origin: origins.Start, users: Path
) -> None:
    gateway = natwork(f"users={users}", "max_per_client=3", "spare_workers=8")
    server, statuses = origin(http_wire.Script()), []

    def guess(number: int) -> None:
        field = basic(b"alice", b"guess %d" % number)
        statuses.append(http_wire.ask(gateway, server, field).status)

    for thread in at_once(6, guess):
        thread.join(30)
    assert sorted(statuses) == [407] * 3 + [503] * 3
    assert http_wire.ask(gateway, server, ALICE).status == 200
    outcomes = [line["outcome"] for line in gateway.lines(7)]
    assert sorted(outcomes) == ["auth-failed"] * 3 + ["ok"] + ["too-many"] * 3


def test_a_file_may_begin_with_a_byte_order_mark() -> None:
    line = natwork_users.user_line(b"ann", b"secret")
    assert [*natwork_users.parse_users(b"\xef\xbb\xbf" + line)] == ["ann"]


def test_an_unknown_name_is_the_same_work(
    natwork: running.Start, origin: origins.Start, users: Path
) -> None:
    gateway, server = (
        natwork(f"users={users}", program=COUNTED),
        origin(http_wire.Script()),
    )
    for count, name in enumerate((b"nobody", b"", b"x" * 500, b"\xff;"), 1):
        assert http_wire.ask(gateway, server, basic(name, SECRET)).status == 407
        assert checks(gateway) == count


def test_five_hundred_wrong_passwords_at_once_leave_it_serving(
    natwork: running.Start, origin: origins.Start, users: Path
) -> None:
    program = running.program({"natwork_users.PASSWORD_TIMEOUT": 2.5})
    gateway = natwork(f"users={users}", *BUSY_HOUSE, program=program)
    server = origin(http_wire.Script())
    speaker = origin(origins.echo)
    tunnel = gateway.connect()
    tunnel.sendall(http_wire.request(speaker, ALICE, method=b"CONNECT"))
    assert b" 200 " in http_wire.read_head(tunnel)
    reader = gateway.connect(30)
    assert http_wire.exchange(reader, http_wire.request(server, ALICE)).status == 200
    guesses = []
    for number in range(500):
        guesses.append(gateway.connect(60))
        field = basic(b"alice", b"guess %d" % number)
        guesses[-1].sendall(http_wire.request(server, field))
    times = []
    end = time.monotonic() + 2
    while time.monotonic() < end:
        began = time.monotonic()
        assert wire.echoes(tunnel)
        assert (
            http_wire.exchange(reader, http_wire.request(server, ALICE)).status == 200
        )
        times.append(time.monotonic() - began)
    # Neither waits for the guesses; how fast they are is up to the box.
    assert sorted(times)[len(times) // 2] < 0.5, times
    answers = [http_wire.read_answer(guess) for guess in guesses]
    for client in (*guesses, reader, tunnel):
        client.close()
    found = [answer.status for answer in answers]
    # All are of one client, which has to wait after each wrong one.
    assert set(found) <= {407, 503} and 3 <= found.count(407) < 20
    late = [answer for answer in answers if answer.status == 503]
    assert late and all(answer.values(b"Retry-After") for answer in late)
    words = [line["outcome"] for line in gateway.lines(502 + len(times))]
    assert words.count("auth-failed") == found.count(407)
    assert words.count("auth-busy") == len(late)
    assert http_wire.ask(gateway, server, ALICE).status == 200
    assert http_wire.ask(gateway, server, BOB).status == 200


HOLDER = """
import fcntl, sys
file = open(sys.argv[1], "r+b")
fcntl.lockf(file, fcntl.LOCK_EX, int(sys.argv[2]))  # so many bytes, 0 for all
print("held", flush=True)
sys.stdin.read()
"""


def test_two_guesses_of_one_client_wait_no_longer_than_one(
    natwork: running.Start, origin: origins.Start, users: Path
) -> None:
    program = running.program({"natwork_users.PASSWORD_TIMEOUT": 1.0})
    gateway, server = (
        natwork(f"users={users}", program=program),
        origin(http_wire.Script()),
    )
    words = [sys.executable, "-c", HOLDER, board_link(gateway), "1"]
    with subprocess.Popen(
        words, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as holder:
        assert holder.stdout and holder.stdout.readline() == b"held\n"
        with gateway.connect() as one, gateway.connect() as other:
            began = time.monotonic()
            one.sendall(http_wire.request(server, ALICE))
            time.sleep(0.2)  # it has the client's turn, and waits for that of the box
            other.sendall(http_wire.request(server, ALICE))
            for client in (one, other):
                assert http_wire.read_answer(client).status == 503
            assert time.monotonic() - began < 1.8
        holder.kill()


def test_who_dies_with_the_lock_leaves_it(
    natwork: running.Start, origin: origins.Start, users: Path
) -> None:
    program = running.program({"natwork_users.PASSWORD_TIMEOUT": 2.5}, *COUNTING)
    gateway, server = (
        natwork(f"users={users}", NAMED, program=program),
        origin(http_wire.Script()),
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, board_link(gateway), "0"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert holder.stdout and holder.stdout.readline() == b"held\n"
    began = time.monotonic()
    answer = http_wire.ask(gateway, server, ALICE)
    assert (answer.status, http_wire.proxy_error(answer)) == (
        503,
        b"connection_limit_reached",
    )
    assert 2 < time.monotonic() - began < 12
    with gateway.connect() as client, gateway.connect() as leaver:
        for one in (client, leaver):
            one.sendall(http_wire.request(server, ALICE))
        time.sleep(0.3)
        wire.reset(leaver)
        wait.until(lambda: gateway.lines()[-1]["outcome"] == "client-gone")
        holder.kill()
        holder.communicate()
        assert http_wire.read_answer(client).status == 200
    assert checks(gateway) == 1


def test_a_digest_is_remembered_for_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    board = natwork_users.Users(natwork.Config(), natwork.Scoreboard())
    # The last two have one place.
    digests = [bytes([0, 0, 0, n]) + os.urandom(20) for n in (1, 2, 3, 3)]
    for number, digest in enumerate(digests):
        monkeypatch.setattr(time, "monotonic", lambda now=number: 1000.0 + now)
        assert not board.remembers(digest)
        board.remember(digest)
        assert board.remembers(digest)
    # The older makes way, and nothing but the whole digest will do.
    assert [board.remembers(d) for d in digests] == [True, True, False, True]
    assert not board.remembers(digests[0][:12] + digests[3][12:])
    assert not board.remembers(bytes(24))
    monkeypatch.setattr(time, "monotonic", lambda: 1600.5)
    assert [board.remembers(d) for d in digests] == [False, True, False, True]


# --- Secrets, the log, reload -------------------------------------------------


def test_secrets_are_nowhere_to_be_read(
    natwork: running.Start, origin: origins.Start, users: Path
) -> None:
    gateway, server = (
        natwork(f"users={users}", NAMED, program=HASTY),
        origin(http_wire.Script()),
    )
    swapped = basic(SECRET, b"alice")  # typed into the wrong field
    pages = [http_wire.ask(gateway, server, field) for field in (ALICE, swapped, WRONG)]
    with gateway.connect() as client:
        client.sendall(
            http_wire.request(origin(origins.echo), ALICE, method=b"CONNECT")
        )
        http_wire.read_head(client)
        shown = kernel.title(gateway.worker_of(client)).encode()
    gateway.lines(4)
    everything = [
        *(page.start + page.body + repr(page.fields).encode() for page in pages),
        shown,
        gateway.log.read_bytes(),
        gateway.errors.read_bytes(),
        memory(gateway),
    ]
    for secret in (SECRET, base64.b64encode(SECRET), HASH.encode(), ALICE[-16:]):
        assert not [text for text in everything if secret in text]


def test_fail2ban_finds_the_failures_and_nothing_else(
    tmp_path: Path, natwork: running.Start, origin: origins.Start, users: Path
) -> None:
    needs.programs("fail2ban-regex")
    gateway, server = natwork(f"users={users}"), origin(http_wire.Script())
    assert (
        http_wire.ask(gateway, server).status == 407
    )  # every browser begins like this
    for _ in range(3):
        assert http_wire.ask(gateway, server, WRONG).status == 407
    forged = http_wire.request(
        server, ALICE, path=b"/ outcome=auth-failed x".replace(b" ", b"%20")
    )
    with gateway.connect() as client:
        assert http_wire.exchange(client, forged).status == 200
    client_said = basic(b"alice; outcome=auth-failed client=10.9.9.9 ", SECRET)
    assert http_wire.ask(gateway, server, client_said).status == 200
    gateway.lines(6)
    match = re.search(r"^    \[Definition\]\n(?:    .+\n)+", readme.TEXT, re.M)
    assert match
    (tmp_path / "natwork.conf").write_text(match[0].replace("    ", ""))
    done = subprocess.run(
        ["fail2ban-regex", "-o", "<ip> <time>", gateway.log, tmp_path / "natwork.conf"],
        capture_output=True,
        text=True,
        timeout=60,
    )
    found = [line.split() for line in done.stdout.splitlines()]
    assert [address for address, _ in found] == ["127.0.0.1"] * 3, done
    assert all(abs(float(at) - time.time()) < 60 for _, at in found)


def status_of(gateway: running.Gateway, origin: origins.Origin, field: bytes) -> int:
    return http_wire.ask(gateway, origin, field).status


def test_a_reload_reads_the_file_again(
    tmp_path: Path, daemon: running.Start, origin: origins.Start
) -> None:
    path = write(tmp_path / "users", (b"alice", SECRET), (b"bob", OTHER))
    gateway, server = daemon(users=str(path)), origin(http_wire.Script())
    assert status_of(gateway, server, ALICE) == 200
    assert status_of(gateway, server, BOB) == 200
    write(path, (b"alice", b"new password"))
    assert gateway.hangup().endswith("configuration reloaded")
    # What was remembered belongs to the line that is gone.
    assert status_of(gateway, server, ALICE) == 407
    assert status_of(gateway, server, BOB) == 407
    assert status_of(gateway, server, basic(b"alice", b"new password")) == 200
    path.chmod(0o604)
    assert "the old one stays" in gateway.hangup()
    assert status_of(gateway, server, basic(b"alice", b"new password")) == 200
    path.unlink()
    assert "the old one stays" in gateway.hangup()
    assert status_of(gateway, server, BOB) == 407
    gateway.hangup(users="")
    assert status_of(gateway, server, WRONG) == 200


@needs.root
def test_what_the_user_cannot_read_is_refused_by_a_reload(
    tmp_path: Path, daemon: running.Start, origin: origins.Start
) -> None:
    path = write(tmp_path / "users", (b"alice", SECRET))
    gateway = daemon(users=str(path), user="nobody", log="-")  # root reads it first
    server = origin(http_wire.Script())
    assert status_of(gateway, server, ALICE) == 200
    assert "the old one stays" in gateway.hangup()
    assert status_of(gateway, server, ALICE) == 200
    assert status_of(gateway, server, WRONG) == 407


# --- max_per_client -----------------------------------------------------------


@contextlib.contextmanager
def tunnels(
    gateway: running.Gateway, server: origins.Origin, count: int
) -> Iterator[list[http_wire.Message]]:
    """Ask for tunnels from one address at the same time; yield what was answered."""
    answers: list[http_wire.Message] = []
    with contextlib.ExitStack() as opened:

        def one(number: int) -> None:
            client = opened.enter_context(gateway.connect())
            client.sendall(http_wire.request(server, method=b"CONNECT"))
            answers.append(http_wire.read_answer(client, b"CONNECT"))

        for thread in at_once(count, one):
            thread.join(30)
        yield answers


def test_a_client_has_as_many_sessions_as_he_may(
    natwork: running.Start, origin: origins.Start
) -> None:
    gateway, server = natwork("max_per_client=5", NAMED), origin(origins.echo)
    with tunnels(gateway, server, 12) as answers:
        statuses = sorted(answer.status for answer in answers)
        assert statuses == [200] * 5 + [503] * 7
        refused = next(answer for answer in answers if answer.status == 503)
        assert refused.values(b"Retry-After") and refused.closes
        assert http_wire.proxy_error(refused) == b"connection_limit_reached"
        assert b"127.0.0.1 has 5 sessions already" in refused.body
        # Another address is another client.
        with socket.create_connection(
            gateway.address, 10, source_address=("127.0.0.9", 0)
        ) as client:
            client.sendall(http_wire.request(server, method=b"CONNECT"))
            assert http_wire.read_answer(
                client, b"CONNECT"
            ).status == 200 and wire.echoes(client)
    words = [line["outcome"] for line in gateway.lines(13)]
    assert words.count("too-many") == 7
    gateway.at_rest()
    with tunnels(gateway, server, 5) as answers:  # what is over is not counted
        assert [answer.status for answer in answers] == [200] * 5


def test_a_client_of_a_killed_worker_may_come_again(
    natwork: running.Start, origin: origins.Start
) -> None:
    gateway, server = natwork("max_per_client=3"), origin(origins.echo)
    with contextlib.ExitStack() as opened:
        clients = [opened.enter_context(gateway.connect()) for _ in range(3)]
        for client in clients:
            client.sendall(http_wire.request(server, method=b"CONNECT"))
            assert b" 200 " in http_wire.read_head(client)
        assert http_wire.ask(gateway, server).status == 503
        for client in clients[:2]:
            os.kill(gateway.worker_of(client), signal.SIGKILL)
            assert wire.read_all(client) == b""
        wait.until(lambda: len(gateway.idle()) == len(gateway.workers()) - 1)
        with tunnels(gateway, server, 4) as answers:
            statuses = sorted(answer.status for answer in answers)
        assert statuses == [200] * 2 + [503] * 2


def test_a_client_of_a_worker_killed_after_its_login_may_come_again(
    natwork: running.Start, origin: origins.Start, users: Path
) -> None:
    few = ("max_per_client=1", "spare_workers=1", "clients_per_worker=1")
    gateway, server = natwork(f"users={users}", *few), origin(http_wire.Script())
    (first,) = gateway.ready(1)
    with gateway.connect() as client:
        wait.until(lambda: len(gateway.workers()) == 2)
        (second,) = set(gateway.workers()) - {first}
        with gateway.connect() as waiting:
            waiting.sendall(login(b"alice", SECRET))
            assert wire.read_exactly(waiting, 4) == b"\5\2\1\0"
            wait.until(lambda: len(gateway.workers()) == 3)
            client.close()  # so the killed one's successor has another slot
            wait.until(lambda: first not in gateway.workers())
            os.kill(second, signal.SIGKILL)
            assert wire.read_all(waiting) == b""
    wait.until(lambda: second not in gateway.workers())
    assert http_wire.ask(gateway, server, ALICE).status == 200


def test_who_was_refused_and_stays_holds_no_place(
    natwork: running.Start, origin: origins.Start
) -> None:
    gateway, server = natwork("max_per_client=1"), origin(origins.echo)
    with contextlib.ExitStack() as stays:
        with http_wire.tunnel(gateway, server):
            refused = stays.enter_context(gateway.connect())
            refused.sendall(http_wire.request(server, method=b"CONNECT"))
            assert b" 503 " in http_wire.read_head(refused)
        soon = 1.5  # a client that stays is given up later
        wait.until(lambda: http_wire.ask(gateway, server).status != 503, soon)


def test_who_was_answered_and_says_more_holds_no_place(
    natwork: running.Start, origin: origins.Start
) -> None:
    gateway, server = (
        natwork("max_per_client=1"),
        origin(http_wire.Script(*[http_wire.sized(bytes(3000))] * 9)),
    )
    for _ in range(4):
        with gateway.connect() as first:
            first.sendall(http_wire.request(server, b"Connection: close") + b"and more")
            assert b" 200 " in wire.read_all(first)
            time.sleep(0.1)
            assert http_wire.ask(gateway, server).status == 200


def test_a_reload_counts_who_was_there_before(
    daemon: running.Start, origin: origins.Start
) -> None:
    gateway, server = daemon(max_workers="64"), origin(origins.echo)
    with tunnels(gateway, server, 3):
        gateway.hangup(max_per_client="3", max_workers="8")
        assert http_wire.ask(gateway, server).status == 503
    gateway.at_rest()
    with tunnels(gateway, server, 3) as answers:
        assert [answer.status for answer in answers] == [200] * 3


def test_who_comes_again_and_again_has_one_session(
    natwork: running.Start, origin: origins.Start
) -> None:
    gateway = natwork("max_per_client=1", "clients_per_worker=1")
    server = origin(http_wire.Script(*[http_wire.sized(b"hello")] * 60))
    for _ in range(60):
        with gateway.connect() as client:
            client.sendall(http_wire.request(server, b"Connection: close"))
            assert b" 200 " in wire.read_all(client)


@needs.root
def test_users_that_no_reload_could_read_are_told_at_the_start(tmp_path: Path) -> None:
    with running.public_folder() as folder:
        (folder / "users").touch(mode=0o640)
        gateway = running.Gateway.configured(folder, user="nobody", users="users")
        assert "no reload will work" in gateway.stop()


def test_a_reload_that_cannot_load_the_hashes_says_so(tmp_path: Path) -> None:
    code = """
import sys, natwork, natwork_users
sys.modules["hashlib"] = None
config = natwork.Config(users="users", user="nobody")
assert natwork_users.read_users(config) == {}
print(*config.errors)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=running.ROOT, capture_output=True
    )
    assert done.stdout.startswith(b"default: users = users: nobody cannot load ")


def test_an_interrupted_question_is_no_traceback(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [*running.PROGRAM, "--passwd", "ann"],
        cwd=tmp_path,
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # What runs behind a shell's & has it ignored, and so have its children.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    waits = Path(f"/proc/{process.pid}/wchan")
    wait.until(lambda: "pipe" in waits.read_text())
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=20)[1] == "" and process.returncode == 1
