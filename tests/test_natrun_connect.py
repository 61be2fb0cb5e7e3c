"""natrun.py: unmodified programs connect and resolve names as if on the gateway."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import functools
import json
import os
import platform
import pty
import re
import select
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import kernel
import natrun_rig
import needs
import origins
import pytest
import running
import wait
import web
import wire
from natrun_rig import NOBODY_THERE
from natrun_rig import PYTHON
from natrun_rig import SERVER
from natrun_rig import SERVER6
from natrun_rig import Rig
from natrun_rig import users

import natrun

pytestmark = pytest.mark.end_to_end

BYTES = web.some_bytes(300_000)
JAVA = """
import java.net.*;
import java.nio.channels.*;
class Client {
    public static void main(String[] words) throws Exception {
        if (words[0].equals("get")) {
            new URL(words[1]).openStream().transferTo(System.out);
            return;
        }
        var address = new InetSocketAddress(words[1], Integer.parseInt(words[2]));
        try (Socket socket = new Socket()) {
            socket.connect(address, 20000);
            System.out.println("ok");
        } catch (Exception error) {
            System.out.println(error.getMessage());
        }
        try (SocketChannel channel = SocketChannel.open()) {
            channel.configureBlocking(false);
            channel.connect(address);
            Selector selector = Selector.open();
            channel.register(selector, SelectionKey.OP_CONNECT);
            selector.select(20000);
            channel.finishConnect();
            System.out.println("ok");
        } catch (Exception error) {
            System.out.println(error.getMessage());
        }
    }
}
"""
SSHD = """\
ListenAddress 203.0.113.80
Port 22
HostKey {folder}/host
AuthorizedKeysFile {folder}/key.pub
PidFile {folder}/sshd.pid
StrictModes no
UsePAM no
PermitRootLogin yes
AllowTcpForwarding yes
Subsystem sftp internal-sftp
"""
SSH = {
    "StrictHostKeyChecking": "no",
    "UserKnownHostsFile": "/dev/null",
    "IdentitiesOnly": "yes",
    "BatchMode": "yes",
    "LogLevel": "ERROR",
}
RULES = "rules=deny to 203.0.113.80/32 port 99; allow to 10.9.0.2/32 port 9"


@pytest.fixture(scope="module")
def rig() -> Iterator[Rig]:
    with natrun_rig.set_up() as made:
        made.natwork("outside=wan", RULES)
        made.web.write("page", b"a page")
        made.web.write("bytes", BYTES)
        # Who is not there is known to be after a second.
        made.box.set("gateway", "ipv4/neigh/wan/mcast_solicit", "1")
        yield made


@pytest.fixture(scope="module")
def sshd(rig: Rig) -> str:
    """Run a server of SSH outside; return the key of its only user."""
    needs.programs("ssh", "scp", "ssh-keygen", "sshd")
    Path("/run/sshd").mkdir(exist_ok=True)
    for key in ("host", "key"):
        words = ["-q", "-N", "", "-t", "ed25519", "-f", str(rig.folder / key)]
        subprocess.run(["ssh-keygen", *words], check=True)
    config = rig.folder / "sshd_config"
    config.write_text(SSHD.format(folder=rig.folder))
    words = ["/usr/sbin/sshd", "-D", "-f", str(config)]
    rig.box.start("outside", *words, folder=rig.folder)
    wait.until(lambda: rig.box.run("outside", "ss", "-Hltn", "sport = :22").stdout)
    return str(rig.folder / "key")


def ssh_options(rig: Rig, user: str, key: str) -> list[str]:
    """Return options that make ssh and scp ask for nothing."""
    own = rig.home(user) / "key"
    own.write_bytes(Path(key).read_bytes())
    own.chmod(0o600)
    if user == "nobody":
        os.chown(own, 65534, 65534)
    words = [w for name, value in SSH.items() for w in ("-o", f"{name}={value}")]
    return ["-F", "none", *words, "-i", str(own)]


# Real programs.


@users
@pytest.mark.parametrize(
    "words",
    [
        "curl -sS --max-time 20 -o {got} http://www.example.com/bytes",
        "curl -sS --max-time 20 -k -o {got} https://www.example.com/bytes",
        "curl -sS --max-time 20 -g -o {got} http://[2001:db8:9::80]/bytes",
        "wget -q -T 20 -t 1 -O {got} http://six.example.com/bytes",
        "wget -q -T 20 -t 1 -O {got} http://203.0.113.80/bytes",
    ],
)
def test_a_program_gets_every_byte(rig: Rig, user: str, words: str) -> None:
    needs.programs("curl", "wget")
    got = rig.home(user) / "got"
    rig.output(user, *words.format(got=got).split())
    assert got.read_bytes() == BYTES
    got.unlink()


@users
def test_a_static_program_gets_a_page(rig: Rig, user: str) -> None:
    needs.programs("busybox")
    static = subprocess.run(["ldd", "/bin/busybox"], capture_output=True, text=True)
    assert "not a dynamic executable" in static.stdout + static.stderr
    asks = "printf 'GET /page HTTP/1.0\\r\\n\\r\\n' | busybox nc www.example.com 80"
    assert rig.output(user, "busybox", "sh", "-c", asks).endswith("\n\na page")


@users
def test_a_static_go_program_gets_a_page(rig: Rig, user: str) -> None:
    client = natrun_rig.go_client(rig)
    url = "http://www.example.com/page"
    assert rig.output(user, client, "get", url) == "a page"
    local, _, peer = rig.output(user, client, "dial", f"{SERVER}:80").partition(" ")
    assert local.startswith("203.0.113.1:") and peer == f"{SERVER}:80\n"


@users
def test_node_gets_a_page(rig: Rig, user: str) -> None:
    needs.programs("node")
    script = "fetch(process.argv[1]).then(r => r.text()).then(t => console.log(t))"
    page = rig.output(user, "node", "-e", script, "http://www.example.com/page")
    assert page == "a page\n"


@users
def test_java_gets_a_page_and_the_errno(rig: Rig, user: str) -> None:
    needs.programs("java", "javac")
    source = rig.home(user) / "Client.java"
    source.write_text(JAVA)
    words = ["java", "-XX:TieredStopAtLevel=1", str(source)]
    url = "http://www.example.com/page"
    assert rig.output(user, *words, "get", url) == "a page"
    told = rig.output(user, *words, "dial", SERVER, "81").splitlines()
    assert [line.partition(" (")[0] for line in told] == ["Connection refused"] * 2
    assert rig.output(user, *words, "dial", SERVER, "80").splitlines() == ["ok"] * 2


@users
def test_ssh_and_scp_carry_every_byte(rig: Rig, user: str, sshd: str) -> None:
    options = ssh_options(rig, user, sshd)
    there, here = rig.folder / f"there-{user}", rig.home(user) / "copied"
    there.write_bytes(BYTES)
    rig.output(user, "scp", *options, f"root@{SERVER}:{there}", str(here))
    assert here.read_bytes() == BYTES
    command = "echo $SSH_CLIENT; head -c 1000000 /dev/zero | wc -c"
    said = rig.output(user, "ssh", *options, "root@www.example.com", command)
    client, size = said.splitlines()
    assert (client.split()[0], size) == ("203.0.113.1", "1000000")


@users
def test_apt_reads_a_repository(rig: Rig, user: str) -> None:
    needs.programs("apt-get")
    packages = b"Package: a\nVersion: 1\nArchitecture: all\nFilename: a.deb\n"
    packages += b"Size: 1\nSHA256: " + b"0" * 64 + b"\nDescription: a\n\n"
    rig.web.write("apt/Packages", packages)
    home = rig.home(user)
    source = home / "sources.list"
    source.write_text("deb [trusted=yes] http://apt.example.com/apt ./\n")
    for name in ("lists/partial", "cache/archives/partial"):
        (home / name).mkdir(parents=True, exist_ok=True)
    (home / "status").touch()
    if user == "nobody":
        subprocess.run(["chown", "-R", "65534:65534", str(home)], check=True)
    settings = {
        "Dir::Etc::sourcelist": str(source),
        "Dir::Etc::sourceparts": "-",
        "Dir::State::lists": str(home / "lists"),
        "Dir::State::status": str(home / "status"),
        "Dir::Cache": str(home / "cache"),
        "APT::Architecture": "amd64",
        "Acquire::Languages": "none",
        "APT::Sandbox::User": "root",
    }
    options = [f"-o{name}={value}" for name, value in settings.items()]
    said = rig.output(user, "apt-get", *options, "update")
    assert "http://apt.example.com/apt" in said
    assert any(b"Package: a" in p.read_bytes() for p in (home / "lists").glob("*Pack*"))


@users
def test_chromium_loads_a_page_with_twenty_objects(rig: Rig, user: str) -> None:
    needs.programs("chromium")
    scripts = "".join(f'<script src="/twenty/{n}.js"></script>' for n in range(20))
    done = "<script>document.title = count</script>"
    rig.web.write(
        "twenty/index.html",
        f"<script>count = 0</script>{scripts}<p id=a>{done}".encode(),
    )
    for n in range(20):
        rig.web.write(f"twenty/{n}.js", b"count++;" + b" " * 20_000)
    profile = rig.home(user) / "profile"
    words = [*web.CHROMIUM, f"--user-data-dir={profile}", "--dump-dom"]
    page = rig.output(user, *words, "http://www.example.com/twenty/index.html")
    assert "<title>20</title>" in page


# What a program sees.


@users
def test_errors_are_the_gateways(rig: Rig, user: str) -> None:
    expected = {
        f"{SERVER}:80": "ok",
        f"{SERVER}:81": "ECONNREFUSED",
        f"{SERVER}:99": "EACCES",
        f"{NOBODY_THERE}:80": "EHOSTUNREACH",
    }
    begun = "EINPROGRESS"
    for place, ways in rig.probe(user, "errors", *expected).items():
        error = expected[place]
        assert ways == {
            "blocking": [error],
            "polled": [begun, error, "ok"],
            "registered": [begun, error, "ok"],
            "again": [begun, "EALREADY", error],
            "looped": [error],
        }, place
    assert rig.probe(user, "no_such_host", "nobody.example.com") == "EAI_NONAME"
    told = rig.natrun(user, natrun_rig.go_client(rig), "dial", f"{SERVER}:81")
    assert (told.returncode, told.stdout) == (1, "connection refused\n")


def test_an_error_is_written_where_there_is_room(rig: Rig) -> None:
    found = rig.probe("nobody", "short_option", SERVER, "81")
    assert bytes(found) == bytes([errno.ECONNREFUSED]) + b"..."


@users
def test_a_gateway_that_is_away_is_named_once(rig: Rig, user: str) -> None:
    script = str(rig.folder / "natrun_probe.py")
    words = [PYTHON, script, "errors", f"{SERVER}:80"]
    done = rig.natrun(user, *words, gateway="socks5://10.9.0.1:9")
    assert done.returncode == 0
    assert done.stdout.count("ENETUNREACH") == 5
    assert done.stderr == (
        "natrun: datagrams are not carried, but for names: the gateway does not offer "
        "it\nnatrun: cannot use the gateway 10.9.0.1:9: connection refused\n"
    )


@users
def test_addresses_are_those_of_the_gateway(rig: Rig, user: str) -> None:
    found = rig.probe(user, "addresses", SERVER, "80")
    assert len(found) == 6
    for name, (before, during, local, peer, forked) in found.items():
        here, there = "203.0.113.1", SERVER
        if name.startswith("mapped"):
            here, there = f"::ffff:{here}", f"::ffff:{there}"
        if name.startswith("only"):
            here, there = "2001:db8:9::1", SERVER6
        assert before[0] in ("0.0.0.0", "::") and before[1] == 0
        assert during == ([there, 80] if "waits" in name else "ENOTCONN")
        assert (local[0], peer, forked) == (here, [there, 80], [there, 80]), name
    assert rig.probe(user, "moved", SERVER, "80") == "a page"


@users
def test_what_is_near_is_left_alone(rig: Rig, user: str) -> None:
    script = str(rig.folder / "natrun_probe.py")
    done = rig.natrun(user, "-v", PYTHON, script, "near", "10.9.0.1", "8080")
    assert done.returncode == 0, done.stderr
    assert '"loopback": true, "accepted": true' in done.stdout
    assert '"lan": ["10.9.0.1", "10.9.0.2"]' in done.stdout
    (count,) = re.findall(r"natrun: (\d+) notifications\n", done.stderr)
    assert 0 < int(count) < 20  # of 1,000 connections to AF_UNIX: none


@users
def test_the_log_says_who_it_was(rig: Rig, user: str) -> None:
    gateway = rig.gateways[0]
    before = len(gateway.lines())
    rig.output(user, "curl", "-sS", "http://www.example.com/page")
    lines = gateway.lines(before + 3)[before:]
    (name,) = [line for line in lines if line["method"] == "RESOLVE"]
    (line,) = [line for line in lines if line["method"] == "CONNECT"]
    host = os.uname().nodename
    assert line["user"] == name["user"] == f"{user};app=curl;host={host}"
    assert name["target"] == "www.example.com:0"
    assert line["target"] == f"{SERVER}:80"


def test_the_gateway_decides_what_goes_through_it(rig: Rig) -> None:
    gateway = rig.gateways[0]
    words = ["curl", "-sS", "--max-time", "3", f"http://{SERVER}/page"]
    assert rig.output("root", *words) == "a page"
    folder = rig.folder / "elsewhere"
    folder.mkdir()
    other = "inside=10.0.0.0/8 fd00::/8 203.0.113.80"
    second = rig.box.natwork(folder, "listen=10.9.0.1:8081 [fd00:9::1]:8081", other)
    # It then goes where a machine without a route sends it: nowhere.
    rig.box.within("inside", lambda: None)
    blocked = rig.box.run("inside", "ip", "route", "add", "blackhole", SERVER)
    assert blocked.returncode == 0
    try:
        done = rig.natrun("root", *words, gateway="10.9.0.1:8081")
        assert done.returncode == 7 and rig.output("root", *words) == "a page"
    finally:
        rig.box.run("inside", "ip", "route", "del", "blackhole", SERVER)
        second.stop()
    assert gateway.process.poll() is None


@users
def test_an_end_and_a_reset_go_through(rig: Rig, user: str) -> None:
    make = functools.partial(origins.Origin, say_or_reset, SERVER)
    server = rig.box.within("outside", make)
    words = [SERVER, str(server.port)]
    assert rig.probe(user, "half_closed", *words) == ["SOME WORDS"] * 2
    assert rig.probe(user, "reset", *words) == ["ECONNRESET"] * 2
    server.close()


def test_an_urgent_byte_is_not_the_end(rig: Rig) -> None:
    make = functools.partial(origins.Origin, say_or_reset, SERVER)
    server = rig.box.within("outside", make)
    code = f"""if True:
        import select, socket, time
        with socket.socket() as sock:
            sock.setblocking(False)
            sock.connect_ex(({SERVER!r}, {server.port}))
            select.select([], [sock], [], 10)
            sock.setblocking(True)
            for data, flags in (b"before", 0), (b"!", socket.MSG_OOB), (b" after", 0):
                sock.send(data, flags)
                time.sleep(0.1)
            sock.shutdown(socket.SHUT_WR)
            print(b"".join(iter(lambda: sock.recv(99), b"")).decode())"""
    assert rig.output("nobody", PYTHON, "-c", code) == "BEFORE AFTER\n"
    server.close()


def say_or_reset(connection: socket.socket, origin: origins.Origin) -> None:
    """Answer what comes until the end; or with a reset, if that is asked for."""
    said = b""
    while piece := connection.recv(100):
        said += piece
        if said == b"reset":
            return wire.reset(connection)
    connection.sendall(said.upper())


@pytest.mark.parametrize("pause", ["0", "0.5"])
@pytest.mark.parametrize("how", ["shutdown", "AF_UNSPEC"])
@pytest.mark.parametrize("first", [f"{SERVER}:80", f"{NOBODY_THERE}:80"])
@pytest.mark.parametrize("place, host", [("outside", SERVER), ("gateway", "10.9.0.1")])
def test_what_was_given_up_does_not_disturb_the_next(
    rig: Rig, place: str, host: str, first: str, how: str, pause: str
) -> None:
    make = functools.partial(origins.Origin, say_or_reset, host)
    server = rig.box.within(place, make)
    found = rig.probe("nobody", "given_up", how, pause, first, f"{host}:{server.port}")
    server.close()
    told = ["ECONNRESET"] if how == "shutdown" else []
    assert found == [*told, "ok", "SOME WORDS"] * 2


def test_a_socket_that_was_shut_down_has_an_errno(rig: Rig) -> None:
    told = rig.probe("nobody", "shut_down", f"{SERVER}:80")
    assert told[1::2] == ["ok", "ok"] and "ok" not in told[::2]


def pair() -> tuple[socket.socket, socket.socket]:
    """Return the two ends of a connection."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        here = socket.create_connection(listener.getsockname(), 10)
        there = listener.accept()[0]
        there.settimeout(10)
        return here, there


@contextlib.contextmanager
def joined() -> Iterator[tuple[socket.socket, socket.socket]]:
    """Give a program and a target whose sockets are joined, as the helper does it."""
    (program, near), (target, server) = pair(), pair()
    ends = [socket.socket(fileno=sock.detach()) for sock in (near, server)]
    for sock in ends:
        os.set_blocking(sock.fileno(), False)  # as they come
    thread = threading.Thread(target=natrun.join, args=ends, name="join")
    thread.start()
    with program, target:
        yield program, target
    thread.join(10)
    assert not thread.is_alive()


def test_a_direction_may_begin_before_the_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    carry, data = natrun.carry, bytes(16_000_000)

    def begin(source: socket.socket, sink: socket.socket) -> None:
        if threading.current_thread().name != "join":
            time.sleep(0.5)
        carry(source, sink)

    monkeypatch.setattr(natrun, "carry", begin)
    with joined() as (program, target), ThreadPoolExecutor(1) as pool:
        sending = pool.submit(program.sendall, data)
        time.sleep(0.2)  # until there is no room
        assert wire.read_exactly(target, len(data)) == data
        sending.result()


def test_a_reset_is_no_end_to_who_sends() -> None:
    """One direction is told of it, now and then not the one that receives."""
    resets = 0
    for _ in range(20):
        with joined() as (program, target):
            target.sendall(b"half")
            assert wire.read_exactly(program, 4) == b"half"
            program.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                while True:
                    program.sendall(bytes(1 << 20))
                    time.sleep(0.01)
            program.settimeout(10)
            wire.reset(target)
            try:
                assert program.recv(1) == b""
            except ConnectionResetError:
                resets += 1
    assert resets == 20


def test_many_connect_at_once(rig: Rig) -> None:
    assert rig.probe("nobody", "crowd", SERVER, "80", "300") == 300


def test_many_are_connected_under_a_usual_limit(rig: Rig) -> None:
    server = rig.box.within("outside", lambda: origins.Origin(origins.echo, SERVER))
    probe = [str(rig.folder / "natrun_probe.py"), "held", SERVER, str(server.port)]
    command = rig.command("nobody", PYTHON, *probe, "300")
    limit = 'ulimit -Sn 1024 && exec "$@"'
    done = rig.box.run("inside", "sh", "-c", limit, "sh", *command)
    server.close()
    assert (done.stdout, done.stderr) == ("300\n", "")


@users
@pytest.mark.parametrize(
    ("host", "lengths"),
    [
        # Those between are of AF_UNIX, which is not to pay for it.
        (SERVER, "16 17 20 24 27 28 128"),
        (SERVER6, "24 25 27 28 128"),  # 24: SIN6_LEN_RFC2133
    ],
)
def test_an_address_may_be_of_any_length(
    rig: Rig, user: str, host: str, lengths: str
) -> None:
    with rig.barred(host):
        found = rig.probe(user, "sizes", host, "80", *lengths.split())
    assert found == dict.fromkeys(lengths.split(), "ok")


@users
@pytest.mark.parametrize("name", ["orphaned", "separate"])
def test_a_thread_connects_by_its_own_descriptor(
    rig: Rig, user: str, name: str
) -> None:
    version = tuple(map(int, re.findall(r"\d+", platform.release())[:2]))
    if version < (6, 9):
        needs.unavailable("Linux has no PIDFD_THREAD")
    found = rig.probe(user, name, SERVER, "80")
    assert found == ["ok", [SERVER, 80], *["ENOTCONN"] * (name == "separate")]


@pytest.mark.parametrize("name", ["orphaned", "separate"])
def test_before_linux_6_9_a_thread_connects_no_others_socket(
    rig: Rig, name: str
) -> None:
    words = [PYTHON, str(rig.folder / "natrun_probe.py"), name, SERVER, "80"]
    unknown = "natrun.PIDFD_THREAD = 1 << 20"  # no Linux has such a flag
    done = rig.box.run("inside", *rig.patched("nobody", unknown, *words))
    found = ["EACCES", "ENOTCONN", *["ENOTCONN"] * (name == "separate")]
    assert json.loads(done.stdout) == found, done.stderr


@users
def test_a_program_takes_tcp_for_mptcp(rig: Rig, user: str) -> None:
    assert rig.probe(user, "multipath") == "EPROTONOSUPPORT"


@users
def test_a_socket_that_listens_does_not_connect(rig: Rig, user: str) -> None:
    script = str(rig.folder / "natrun_probe.py")
    done = rig.natrun(user, PYTHON, script, "listened_before", SERVER, "80")
    assert (done.stdout, done.stderr) == ('["EISCONN", "EISCONN"]\n', "")


@users
@pytest.mark.parametrize("source", ["::", "fd00:9::2"])
def test_a_bound_socket_of_ipv6_blames_nobody_else(
    rig: Rig, user: str, source: str
) -> None:
    script = str(rig.folder / "natrun_probe.py")
    words = [PYTHON, script, "bound_before", source, SERVER6, "80"]
    done = rig.natrun(user, *words)
    assert done.returncode == 0 and "the gateway" not in done.stderr
    assert "ENETUNREACH" not in done.stdout


def test_a_port_has_one_connection_to_the_gateway_at_once(rig: Rig) -> None:
    code = f"""if True:
        import errno, socket
        socks = [socket.socket() for _ in range(2)]
        for sock in socks:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind(("0.0.0.0", 7755))
            print(errno.errorcode.get(sock.connect_ex(({SERVER!r}, 80)), "ok"))"""
    done = rig.natrun("nobody", PYTHON, "-c", code)
    assert (done.stdout, done.stderr) == ("ok\nEADDRNOTAVAIL\n", "")


def test_a_dead_host_stalls_no_loop(rig: Rig) -> None:
    told, ticks = rig.probe("nobody", "unstalled", NOBODY_THERE, "80", "5")
    assert told == ["EHOSTUNREACH"] * 5 and ticks > 20


def test_a_target_that_resets_at_once_has_been_connected(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What the gateway answers counts, though its reset is there before it is read."""
    answer, over = b"\5\2\1\0\5\0\0\1\xcb\0\x71\1\4\1", threading.Event()
    receive = natrun.receive

    def serve(connection: socket.socket, origin: origins.Origin) -> None:
        connection.recv(1000)
        connection.sendall(answer)
        wire.reset(connection)
        over.set()

    async def receive_late(sock: socket.socket, size: int) -> bytes:
        assert over.wait(10)
        return await receive(sock, size)

    monkeypatch.setattr(natrun, "receive", receive_late)
    programs = natrun.read_settings(os.devnull)
    with contextlib.closing(origins.Origin(serve)) as server, socket.socket() as sock:
        at = natrun.endpoint((server.host, server.port))
        gateway = natrun.Gateway(at, {"inside": []}, programs)
        request = natrun.request_of(natrun.CONNECT, natrun.endpoint((SERVER, 80)))
        steps = gateway.talk(sock, request, "probe")
        assert asyncio.run(steps) == natrun.endpoint(("203.0.113.1", 1025))


def test_a_page_of_brackets_is_no_table() -> None:
    def serve(connection: socket.socket, origin: origins.Origin) -> None:
        connection.recv(1000)
        connection.sendall(b"HTTP/1.0 200 OK\r\n\r\n" + b"[" * 100_000)

    programs = natrun.read_settings(os.devnull)
    with contextlib.closing(origins.Origin(serve)) as server:
        with pytest.raises(ValueError, match="has no /lat.json"):
            natrun.look(server.host, server.port, False, programs)


@users
def test_each_reply_of_socks_has_its_errno(rig: Rig, user: str) -> None:
    make = functools.partial(origins.Origin, reply_as_asked, "10.9.0.1")
    server = rig.box.within("gateway", make)
    places = [f"{SERVER}:{reply}" for reply in range(1, 9)]
    script = str(rig.folder / "natrun_probe.py")
    gateway = f"socks5://10.9.0.1:{server.port}"
    done = rig.natrun(user, PYTHON, script, "refusals", *places, gateway=gateway)
    server.close()
    assert json.loads(done.stdout) == [
        *("EHOSTUNREACH", "EACCES", "ENETUNREACH", "EHOSTUNREACH"),
        *("ECONNREFUSED", "ETIMEDOUT", "ENOTSUP", "EAFNOSUPPORT"),
    ]


def reply_as_asked(connection: socket.socket, origin: origins.Origin) -> None:
    """Refuse a SOCKS request, with the port that is asked for as the reply."""
    methods = wire.read_exactly(connection, 2)[1]
    wire.read_exactly(connection, methods)
    connection.sendall(b"\5\0")
    reply = wire.read_exactly(connection, 10)[9]
    connection.sendall(bytes([5, reply, 0, 1]) + bytes(6))


# Signals, processes, faults.


@users
def test_a_timer_ticks_while_a_dead_host_is_dialed(rig: Rig, user: str) -> None:
    found = rig.probe(user, "ticking", NOBODY_THERE, "80")
    # The kernel may know already that nobody is there, and then it takes less long.
    assert found["answer"] == ["EHOSTUNREACH"] and found["ticks"] > 2


@pytest.mark.parametrize("first", ["takes", "blocks"])
def test_no_thread_is_told_an_errno_of_the_kernel(rig: Rig, first: str) -> None:
    found = rig.probe("nobody", "shared", NOBODY_THERE, "80", first)
    assert "EHOSTUNREACH" in found and {*found} <= {"EHOSTUNREACH", "EINTR"}


@users
def test_a_dead_supervisor_lets_nothing_through(rig: Rig, user: str) -> None:
    go = rig.home(user) / "go"
    go.unlink(missing_ok=True)
    script = str(rig.folder / "natrun_probe.py")
    words = [f"TMPDIR={rig.home(user)}", PYTHON, script, "broken", SERVER, "80"]
    running_ = rig.start(user, "env", *words, name="broken")
    assert running_.line() == "ready"
    os.kill(running_.supervisor, signal.SIGKILL)
    running_.process.wait(10)
    go.touch()
    wait.until(lambda: len(running_.said()) > 1)
    assert running_.said()[1] == '["ENOSYS", "ENOSYS"]'
    go.unlink()


@users
@pytest.mark.parametrize(
    "number",
    [
        *(signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGALRM),
        *(signal.SIGVTALRM, signal.SIGIO, signal.SIGPWR, signal.SIGTSTP),
        signal.SIGRTMIN + 1,
    ],
)
def test_signals_reach_the_command(rig: Rig, user: str, number: int) -> None:
    told = f"trap 'echo got {number}; exit 7' {number}; echo ready; "
    command = told + "while :; do sleep 0.1; done"
    started = rig.start(user, "sh", "-c", command, name="signals")
    assert started.line() == "ready"
    try:
        started.process.send_signal(number)
        assert started.process.wait(10) == 7
    finally:
        for pid in rig.box.pids("inside"):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    assert started.said() == ["ready", f"got {number}"]


def test_a_terminals_interrupt_is_seen_once(rig: Rig) -> None:
    needs.programs("script")
    seen = rig.home("root") / "seen"
    command = f"trap 'echo x >>{seen}' INT; echo ready; sleep 1; sleep 1; exit 5"
    inner = rig.command("root", "sh", "-c", command)
    words = rig.box.command("inside", *inner[:-1], '"$COMMAND"')
    line = "exec " + " ".join(words)
    terminal = subprocess.Popen(
        ["script", "-qec", line, "/dev/null"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "COMMAND": command, "SHELL": "/bin/sh"},
    )
    assert terminal.stdin and terminal.stdout
    assert terminal.stdout.readline() == b"ready\r\n"
    terminal.stdin.write(b"\x03")
    terminal.stdin.flush()
    assert terminal.wait(20) == 5
    terminal.stdin.close()
    terminal.stdout.close()
    assert seen.read_text() == "x\n"


class Terminal:
    """A terminal, what is run there, and what it shows."""

    def __init__(self, *words: str) -> None:
        self.pid, self.fd = pty.fork()
        if not self.pid:
            os.execvpe(words[0], words, {**os.environ, "PS1": "$ "})
        self.said = b""

    def until(self, mark: bytes) -> None:
        """Wait until it has shown something."""
        deadline = time.monotonic() + 20
        while mark not in self.said and time.monotonic() < deadline:
            if select.select([self.fd], [], [], 0.1)[0]:
                self.said += os.read(self.fd, 4096)
        assert mark in self.said, self.said

    def close(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        os.close(self.fd)
        os.waitpid(self.pid, 0)


@pytest.mark.parametrize(
    "command",
    [
        "kill -STOP $$; exit 6",
        "trap '' TSTP; echo rea'dy'; sleep 1; exit 6",
        # No shell that forks: what is stopped before it is sleep stops no parent.
        f"echo rea'dy'; exec {PYTHON} -c 'import time; time.sleep(1); exit(6)'",
    ],
)
def test_who_is_stopped_gives_the_shell_its_terminal(rig: Rig, command: str) -> None:
    words = shlex.join(rig.command("root", "sh", "-c", command))
    terminal = Terminal(*rig.box.command("inside", "bash", "--norc", "-i"))
    with contextlib.closing(terminal):
        os.write(terminal.fd, words.encode() + b"; echo ended $?\n")
        if "echo" in command:
            terminal.until(b"ready")
            os.write(terminal.fd, b"\x1a")  # Ctrl-Z
        if "trap" not in command:  # else it is not heeded
            terminal.until(b"Stopped")
            os.write(terminal.fd, b"fg; echo ended $?\n")
        terminal.until(b"ended 6")
        assert terminal.said.count(b"Stopped") == ("trap" not in command)


def test_a_shell_that_suspends_itself_has_the_terminal_again(rig: Rig) -> None:
    words = shlex.join(rig.command("root", "bash", "--norc", "-i"))
    terminal = Terminal(*rig.box.command("inside", "bash", "--norc", "-i"))
    with contextlib.closing(terminal):
        os.write(terminal.fd, words.encode() + b"; echo ended $?\n")
        for n in b"1", b"2":
            os.write(terminal.fd, b"echo with'in' " + n + b"\n")
            terminal.until(b"within " + n)
            os.write(terminal.fd, b"suspend\n")
            terminal.until(b"Stopped")
            os.write(terminal.fd, b"echo with'out' " + n + b"\n")
            terminal.until(b"without " + n)
            terminal.said = b""
            os.write(terminal.fd, b"fg; echo ended $?\n")
            terminal.until(b"bash --norc -i")
            terminal.until(b"$ ")
        os.write(terminal.fd, b"exit 6\n")
        terminal.until(b"ended 6")


def test_a_hangup_of_the_terminal_reaches_the_command(rig: Rig) -> None:
    seen = rig.home("root") / "hangup"
    loop = "for n in $(seq 200); do sleep 0.1; done"
    told = f"trap 'echo x >>{seen}; exit 5' HUP; echo ready; {loop}"
    terminal = Terminal(
        *rig.box.command("inside", *rig.command("root", "sh", "-c", told))
    )
    try:
        terminal.until(b"ready")
        os.close(terminal.fd)
        wait.until(lambda: os.waitpid(terminal.pid, os.WNOHANG)[0])
    finally:
        for pid in rig.box.pids("inside"):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    assert seen.read_text() == "x\n"


def test_ctrl_z_stops_nothing_where_there_is_no_shell(rig: Rig) -> None:
    curl = f"curl -sS http://{SERVER}/page"
    inner = rig.command("root", "sh", "-c", f"echo rea'dy'; sleep 1; {curl}")
    terminal = Terminal(*rig.box.command("inside", *inner))
    with contextlib.closing(terminal):
        terminal.until(b"ready")
        os.write(terminal.fd, b"\x1a")
        terminal.until(b"a page")


@pytest.mark.parametrize("line", ["{} & wait; echo ended", "sh -c '{}; echo ended'"])
def test_who_is_stopped_and_let_go_on_by_another_goes_on(rig: Rig, line: str) -> None:
    script = rig.home("root") / "stopped.sh"
    curl = f"curl -sS http://{SERVER}/page"
    script.write_text(f"(sleep 0.3; kill -CONT $$) & kill -STOP $$; {curl}\n")
    words = shlex.join(rig.command("root", "sh", str(script)))
    terminal = Terminal(*rig.box.command("inside", "bash", "--norc", "-i"))
    with contextlib.closing(terminal):
        os.write(terminal.fd, line.format(words).encode() + b"\n")
        terminal.until(b"a page")


def test_a_parent_may_ignore_its_children(rig: Rig) -> None:
    command = rig.command("nobody", "sh", "-c", "exit 3")
    ignoring = "trap '' CHLD; exec \"$@\""
    done = rig.box.run("inside", "bash", "-c", ignoring, "bash", *command)
    assert (done.returncode, done.stderr) == (3, "")


def test_the_command_has_the_signals_that_were_blocked(rig: Rig) -> None:
    code = "import signal; print(*map(int, signal.pthread_sigmask(0, [])))"
    inner = rig.command("root", PYTHON, "-c", code)
    before = (
        "import os, signal, sys; signal.pthread_sigmask(signal.SIG_BLOCK, {10, 34});"
        " os.execvp(sys.argv[1], sys.argv[1:])"
    )
    done = rig.box.run("inside", PYTHON, "-c", before, *inner)
    assert done.stdout in ("10 34\n", "34 10\n"), done


def test_it_does_not_wait_for_who_reads_its_errors(rig: Rig) -> None:
    words = rig.command("nobody", "-v", "curl", "-sS", f"http://{SERVER}/page")
    full = (
        "import os, sys; read, write = os.pipe(); os.set_blocking(write, False)\n"
        "try:\n while os.write(write, bytes(4096)): pass\n"
        "except OSError: os.set_blocking(write, True); os.dup2(write, 2)\n"
        "os.set_inheritable(read, True); os.execvp(sys.argv[1], sys.argv[1:])"
    )
    done = rig.box.run("inside", "timeout", "20", PYTHON, "-c", full, *words)
    assert (done.returncode, done.stdout) == (0, "a page")


def test_where_no_descriptor_is_left_a_socket_is_as_it_was(rig: Rig) -> None:
    code = f"""if True:
        import errno, os, socket
        with socket.socket() as sock:
            print(errno.errorcode[sock.connect_ex(({SERVER!r}, 80))])
            print(os.get_blocking(sock.fileno()), sock.getsockname())"""
    barred = "def dup(sock): raise OSError(errno.EMFILE, 'none')"
    patch = f"{barred}\nnatrun.socket.socket.dup = dup"
    words = rig.patched("nobody", patch, PYTHON, "-c", code)
    done = rig.box.run("inside", *words)
    assert done.stdout == "EMFILE\nTrue ('0.0.0.0', 0)\n", done


def test_where_no_thread_is_left_one_connection_is_lost(rig: Rig) -> None:
    script = rig.home("nobody") / "threadless.py"
    script.write_text(
        "import sys, threading\n"
        f"sys.path.insert(0, {str(rig.tool.parent)!r})\n"
        "import natrun\n"
        "class Thread(threading.Thread):\n"
        "    fails = [True]\n"
        "    def start(self):\n"
        "        if self.fails and self.fails.pop():\n"
        "            raise RuntimeError('cannot start new thread')\n"
        "        super().start()\n"
        "threading.Thread = Thread\n"
        "sys.exit(natrun.main())\n"
    )
    curl = f"curl -sS --max-time 4 http://{SERVER}/page"
    words = ["-g", natrun_rig.GATEWAY, "sh", "-c", f"{curl}; echo then; {curl}"]
    done = rig.box.run("inside", PYTHON, str(script), *words)
    assert done.stdout == "then\na page", done


def test_an_agent_serves_while_others_are_connected(rig: Rig) -> None:
    needs.programs("ssh-agent", "ssh-add")
    held = f"import socket; s = socket.create_connection(({SERVER!r}, 80)); input()"
    command = (
        f'mkfifo "$0"; "{PYTHON}" -c "$1" <"$0" & exec 3>"$0"; sleep 1;'
        ' timeout 5 ssh-add -l; echo "code $?"; exec 3>&-; wait; kill $SSH_AGENT_PID'
    )
    pipe = rig.home("nobody") / "hold"
    pipe.unlink(missing_ok=True)
    inner = ["sh", "-c", command, str(pipe), held]
    done = rig.natrun("nobody", "ssh-agent", *inner)
    assert "code 1\n" in done.stdout, done  # it is there, and has no identities


def test_it_runs_without_input_and_errors(rig: Rig) -> None:
    probe = [PYTHON, str(rig.folder / "natrun_probe.py")]
    command = rig.command("nobody", *probe, "crowd", SERVER, "80", "20")
    closed = 'exec "$@" <&- 2>&-'
    done = rig.box.run("inside", "timeout", "20", "sh", "-c", closed, "sh", *command)
    assert (done.returncode, done.stdout) == (0, "20\n")


@users
def test_it_ends_as_the_command_ends(rig: Rig, user: str) -> None:
    assert rig.natrun(user, "sh", "-c", "exit 9").returncode == 9
    assert rig.natrun(user, "true").returncode == 0
    killed = rig.start(user, "sh", "-c", "kill -KILL $$", name="killed")
    assert killed.process.wait(10) == -signal.SIGKILL
    lost = rig.natrun(user, "/nonexistent/program")
    assert (lost.returncode, lost.stderr) == (
        127,
        "natrun: cannot run /nonexistent/program: no such file or directory\n",
    )
    barred = rig.natrun(user, "/etc")
    assert (barred.returncode, barred.stderr) == (
        126,
        "natrun: cannot run /etc: permission denied\n",
    )


@users
def test_a_daemon_outlives_the_command(rig: Rig, user: str) -> None:
    home = rig.home(user)
    (home / "daemon").unlink(missing_ok=True)
    script = str(rig.folder / "natrun_probe.py")
    done = rig.natrun(user, PYTHON, script, "daemonized", SERVER, "80")
    assert done.returncode == 3  # the command's own, after the last has gone
    assert (home / "daemon").read_text() == "ok"


def test_a_signal_ends_it_when_the_command_has_ended(rig: Rig) -> None:
    shell = ["sh", "-c", "sleep 60 & echo $!; exit 3"]
    started = rig.start("nobody", *shell, name="ended")
    daemon = int(started.line())
    try:
        here = functools.partial(kernel.children, started.supervisor)
        wait.until(lambda: daemon in here() and len(here()) == 2)  # and the relay
        started.process.send_signal(signal.SIGWINCH)  # which ends nothing
        time.sleep(0.2)
        assert started.process.poll() is None
        started.process.send_signal(signal.SIGINT)
        assert started.process.wait(5) == -signal.SIGINT
        assert started.err.read_text() == ""
    finally:
        os.kill(daemon, signal.SIGKILL)


def test_an_interrupt_ends_it_before_there_is_a_command(rig: Rig) -> None:
    with rig.box.within("gateway", lambda: socket.create_server(("10.9.0.1", 0))) as it:
        place = "10.9.0.1:%d" % it.getsockname()[1]  # which says nothing
        command = rig.command("nobody", "true", gateway=place)
        started = natrun_rig.Background(rig, command, rig.home("nobody") / "early")
        it.settimeout(10)
        with it.accept()[0]:
            started.process.send_signal(signal.SIGINT)
            assert started.process.wait(5) == -signal.SIGINT
    assert started.err.read_text() == ""


def test_an_interrupt_that_is_ignored_stays_so(rig: Rig) -> None:
    code = "import signal; print(signal.getsignal(signal.SIGINT) == signal.SIG_IGN)"
    command = shlex.join(rig.command("nobody", PYTHON, "-c", code))
    done = rig.box.run("inside", "sh", "-c", f"trap '' INT; exec {command}")
    assert done.stdout == "True\n"


@users
def test_it_does_not_run_in_itself(rig: Rig, user: str) -> None:
    inner = rig.command("root", "true")
    done = rig.natrun(user, *inner)
    assert (done.returncode, done.stderr) == (
        125,
        "natrun: cannot install the filter: it runs in another natrun\n",
    )


def test_what_lets_nobody_look_into_it_does_not_connect(rig: Rig) -> None:
    script = str(rig.folder / "natrun_probe.py")
    done = rig.natrun("nobody", PYTHON, script, "deaf", SERVER, "80")
    assert done.stdout == '["EACCES"]\n'
    assert done.stderr == (
        "natrun: cannot look into python3: not dumpable, or Yama forbids it: it does "
        "not connect\n"
    )
    assert rig.probe("root", "deaf", SERVER, "80") == ["ok"]  # root may look


# Gateways and settings.


@users
@pytest.mark.parametrize("kind", ["microsocks", "ssh", "danted"])
def test_another_server_of_socks_will_do(
    rig: Rig, user: str, kind: str, sshd: str
) -> None:
    options = ssh_options(rig, "root", sshd)
    config = rig.folder / "danted.conf"
    config.write_text(
        "logoutput: stderr\ninternal: 10.9.0.1 port = 1082\nexternal: wan\n"
        "socksmethod: none\nclientmethod: none\nuser.privileged: root\n"
        "user.unprivileged: nobody\n"
        "client pass { from: 0/0 to: 0/0 }\nsocks pass { from: 0/0 to: 0/0 }\n"
    )
    forward = ["-N", "-D", "10.9.0.1:1081", *options, f"root@{SERVER}"]
    command, port = {
        "microsocks": (["microsocks", "-i", "10.9.0.1", "-p", "1080"], 1080),
        "ssh": (["ssh", *forward], 1081),
        "danted": (["danted", "-f", str(config)], 1082),
    }[kind]
    needs.programs(command[0])
    server = rig.box.start("gateway", *command, folder=rig.folder)
    listens = ["ss", "-Hltn", f"sport = :{port}"]
    wait.until(lambda: rig.box.run("gateway", *listens).stdout)
    # sshd looks names up outside.
    hosts = Path("/etc/netns", rig.box.name("outside"), "hosts")
    url = "http://www.example.com/page" if kind != "ssh" else "http://localhost.x/page"
    hosts.write_text(hosts.read_text() + f"{SERVER} localhost.x\n")
    for gateway in (f"10.9.0.1:{port}", f"socks5://10.9.0.1:{port}"):
        words = ["curl", "-sS", "--max-time", "20"]
        if kind != "ssh":  # it was started before the name was known
            assert rig.output(user, *words, url, gateway=gateway) == "a page"
        url = f"http://{SERVER}/page"
        assert rig.output(user, *words, url, gateway=gateway) == "a page"
    refused = [PYTHON, str(rig.folder / "natrun_probe.py"), "errors", f"{SERVER}:81"]
    told = rig.natrun(user, *refused, gateway=f"10.9.0.1:{port}").stdout
    assert told.count("ECONNREFUSED") == 5 or kind == "ssh"
    rig.box.stop(server)


@users
def test_the_gateway_is_found(rig: Rig, user: str) -> None:
    words = ["curl", "-sS", f"http://{SERVER}/page"]
    named = {"NATRUN_GATEWAY": "10.9.0.1"}
    assert rig.output(user, *words, gateway="", **named) == "a page"
    hosts = Path("/etc/netns", rig.box.name("inside"), "hosts")
    before = hosts.read_text()
    hosts.write_text(before + "192.0.2.99 wpad\n")  # no route: the default route's
    lost = rig.box.run("inside", "ip", "route", "add", "unreachable", "192.0.2.99")
    assert lost.returncode == 0
    try:
        assert rig.output(user, *words, gateway="") == "a page"
    finally:
        hosts.write_text(before)
        rig.box.run("inside", "ip", "route", "del", "unreachable", "192.0.2.99")
    settings = rig.home(user) / "natrun.conf"
    settings.write_text("[natrun]\ngateway = 10.9.0.1:8080\n")
    assert rig.output(user, "-c", str(settings), *words, gateway="") == "a page"


@users
def test_settings_are_for_a_program(rig: Rig, user: str) -> None:
    settings = rig.home(user) / "natrun.conf"
    settings.write_text("[natrun]\ndirect_ports = 80\n[curl]\ndirect_ports =\n")
    option = ["-c", str(settings)]
    blocked = ["ip", "route", "add", "unreachable", SERVER]
    assert rig.box.run("inside", *blocked).returncode == 0
    try:
        url = f"http://{SERVER}/page"
        assert rig.output(user, *option, "curl", "-sS", url) == "a page"
        direct = rig.natrun(user, *option, "wget", "-q", "-t", "1", url)
        assert direct.returncode == 4  # wget: network failure
        settings.write_text("[natrun]\nredirect = yes\n[curl]\nredirect = no\n")
        assert rig.natrun(user, *option, "curl", "-sS", url).returncode == 7
        settings.write_text("[natrun]\ndns = fake\n")
        page = rig.output(user, *option, "curl", "-sS", "http://www.example.com/page")
        assert page == "a page"
    finally:
        blocked[2] = "del"
        rig.box.run("inside", *blocked)
    line = rig.gateways[0].lines()[-1]
    assert line["target"] == "www.example.com:80"


@users
def test_a_thread_has_the_settings_of_its_program(rig: Rig, user: str) -> None:
    settings = rig.home(user) / "threads.conf"
    settings.write_text("[python3]\nredirect = no\n")
    script = str(rig.folder / "natrun_probe.py")
    words = ["-c", str(settings), PYTHON, script]
    with rig.barred(SERVER):
        for name in ("unnamed", "named"):
            said = rig.output(user, *words, name, SERVER, "80")
            assert said == '["EHOSTUNREACH"]\n', name


# The kernel's 15 bytes of the last end within a letter.
@pytest.mark.parametrize(
    "name", ["curl", "averylongprogramname", "fourteen-bytes\xfcr"]
)
def test_names_are_looked_up_as_the_asking_program_has_it(rig: Rig, name: str) -> None:
    program = rig.folder / "programs" / name
    program.parent.mkdir(exist_ok=True)
    shutil.copy("/usr/bin/curl", program)
    settings = rig.home("nobody") / "names.conf"
    settings.write_text(f"[{name}]\ndns = fake\n")
    get = [str(program), "-sS", "http://www.example.com/page"]
    # The first is run by another program, the second is the first word itself.
    words = get if name != "curl" else ["sh", "-c", '"$@"; exit', "sh", *get]
    gateway = rig.gateways[0]
    before = len(gateway.lines())
    assert rig.output("nobody", "-c", str(settings), *words) == "a page"
    connects = [
        line["target"]
        for line in gateway.lines(before + 2)[before:]
        if line["method"] == "CONNECT"
    ]
    assert connects == ["www.example.com:80"]


def with_users(rig: Rig, name: str, *options: str) -> tuple[running.Gateway, Path]:
    """Start a gateway that knows one user; return it, and the user's settings."""
    words = [sys.executable, str(running.ROOT / "natwork.py"), "--passwd", "ann"]
    line = subprocess.run(words, input="secret\n", capture_output=True, text=True)
    folder = rig.folder / name
    folder.mkdir()
    (folder / "users").write_text(line.stdout)
    (folder / "users").chmod(0o640)
    shutil.chown(folder / "users", group="nogroup")  # natwork becomes nobody
    settings = rig.home("nobody") / f"{name}.conf"
    settings.write_text("[natrun]\nuser = ann\npassword = secret\n")
    where = "listen=10.9.0.1:8097 10.9.0.1:8098"
    usual = [f"users={folder / 'users'}", "mappings=yes", "outside=wan"]
    ports = "bind_ports=25000-25009"
    return rig.box.natwork(folder, where, *usual, ports, *options), settings


def test_a_user_keeps_a_port_without_a_connection(rig: Rig) -> None:
    gateway, settings = with_users(rig, "idle", "idle_timeout=2")
    script = str(rig.folder / "natrun_probe.py")
    words = ["-g", "10.9.0.1:8097", "-c", str(settings), PYTHON, script]
    words += ["serve", "203.0.113.1:25002", "1"]
    command = rig.patched("nobody", "natrun.LEASE = 3", *words)
    server = natrun_rig.Background(rig, command, rig.home("nobody") / "idle")
    try:
        assert server.line() == '["203.0.113.1", 25002]'
        listens = ["ss", "-Hltn", "src 203.0.113.1 sport = :25002"]
        deadline = time.monotonic() + 4
        while time.monotonic() < deadline:
            assert rig.box.run("gateway", *listens).stdout
            time.sleep(0.1)
    finally:
        for pid in rig.box.pids("inside"):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)
        server.process.wait(10)
        gateway.stop()


def test_a_user_logs_in(rig: Rig) -> None:
    user = "nobody"
    gateway, settings = with_users(rig, "login")
    get = ["curl", "-sS", "http://www.example.com/page"]
    at = "10.9.0.1:8097"
    assert rig.output(user, "-c", str(settings), *get, gateway=at) == "a page"
    named = f"ann;app=curl;host={os.uname().nodename}"
    assert {line["user"] for line in gateway.lines(3)[1:]} == {named}
    script = str(rig.folder / "natrun_probe.py")
    bind = ["-c", str(settings), PYTHON, script, "bind_to", "203.0.113.1:25001"]
    assert rig.output(user, *bind, gateway=at) == '[["203.0.113.1", 25001]]\n'
    connect = [PYTHON, script, "errors", f"{SERVER}:80"]
    refused = rig.natrun(user, *connect, gateway=at)
    assert refused.stdout.count("EACCES") == 5
    assert refused.stderr == (
        f"natrun: cannot use the gateway {at}: it lets in nobody without a user and "
        "password that it knows\n"
    )
    for option, word in ([], "no, it lets in nobody "), (["-c", str(settings)], "yes"):
        told = rig.natrun(user, *option, "--check", gateway=at).stderr
        assert f"natrun: login: {word}" in told
    unknown = rig.natrun(user, *get, gateway=at)  # a name is asked for first
    assert unknown.stderr.startswith(refused.stderr), unknown
    gateway.stop()


CASES = {
    "[natrun]\nredirct = no\n": "[natrun] redirct: there is no such setting: ",
    "[curl]\nredirect = maybe\n": "[curl] redirect: 'maybe' is not one of: yes no",
    "[curl]\ndirect = 10.0.0.0/99\n": "[curl] direct: '10.0.0.0/99' does not appear",
    "[curl]\nlisten = 70000\n": "[curl] listen: '70000' is not a range of ports",
    "gateway = x\n": "File contains no section headers",
    "[curl]\nredirect = Yes\n": "[curl] redirect: 'Yes' is not one of: yes no",
    "[curl]\nlisten = -5\n": "[curl] listen: '-5' is not a range of ports",
    "\ufeff[curl]\nredirect = maybe\n": "[curl] redirect: 'maybe' is not one of: ",
    "[DEFAULT]\nredirect = no\n": "[DEFAULT]",
}


@pytest.mark.parametrize("text", CASES)
def test_bad_settings_are_told(tmp_path: Path, text: str) -> None:
    settings = tmp_path / "natrun.conf"
    settings.write_text(text)
    done = local("-c", str(settings), "-g", "socks5://127.0.0.1:1", "true")
    assert done.returncode == 125 and done.stdout == ""
    assert done.stderr.startswith(f"natrun: cannot use {settings}")
    assert CASES[text] in done.stderr and done.stderr.count("\n") == 1


def test_a_misspelt_setting_of_a_run_shows_all_there_are(tmp_path: Path) -> None:
    settings = tmp_path / "natrun.conf"
    settings.write_text("[natrun]\ngatway = 10.9.0.1\n")
    done = local("-c", str(settings), "true")
    told = "[natrun] gatway: there is no such setting: "
    assert done.returncode == 125 and told in done.stderr
    shown = done.stderr.partition(told)[2].split()
    assert {"gateway", "user", "password", "redirect", "udp"} <= {*shown}


def test_an_empty_command_is_told() -> None:
    done = local("-g", "socks5://127.0.0.1:1", "")
    assert done.returncode in (125, 127)
    assert done.stderr.startswith("natrun: cannot run ")
    assert done.stderr.count("\n") == 1


def local(*words: str) -> subprocess.CompletedProcess[str]:
    """Run natrun.py here."""
    return subprocess.run(
        [sys.executable, str(running.ROOT / "natrun.py"), *words],
        capture_output=True,
        text=True,
        timeout=30,
        env={"PATH": os.environ["PATH"], "HOME": "/nonexistent"},
    )


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["-g", "127.0.0.1:1", "true"], "cannot use the gateway: 127.0.0.1:1: conn"),
        (["-c", "/nonexistent", "true"], "cannot use /nonexistent: no such file or"),
        (["-g", "socks5://127.0.0.1:1"], "cannot run nothing: "),
        (["-x", "true"], "option -x not recognized"),
        (["-g", "socks4://a", "true"], "cannot use the gateway: socks4://a: it is not"),
        (["-g", "a:99999", "true"], "cannot use the gateway: a:99999: it is not HOST,"),
    ],
)
def test_a_bad_command_line_is_told(words: list[str], told: str) -> None:
    done = local(*words)
    assert done.returncode == 125 and done.stderr.startswith(f"natrun: {told}")
    assert done.stderr.count("\n") == 1


@users
def test_it_says_what_works(rig: Rig, user: str) -> None:
    done = rig.natrun(user, "--check")
    said = [line.removeprefix("natrun: ") for line in done.stderr.splitlines()]
    assert done.returncode == 0 and said[0].startswith("Linux ")
    assert said[-6:] == [
        "namespace: yes",
        "programs: yes",
        f"gateway: {natrun_rig.GATEWAY}, NATWork",
        "login: yes",
        "datagrams: yes",
        "listening: no, the gateway does not offer it",
    ]
    lost = rig.natrun(user, "--check", gateway="10.9.0.1:9")
    assert lost.returncode == 125
    assert lost.stderr.endswith(
        "natrun: programs: yes\n"
        "natrun: cannot use the gateway: 10.9.0.1:9: connection refused\n"
    )


@pytest.mark.parametrize("name", ["process_vm_readv", "syscall"])
def test_it_says_that_it_cannot_look_into_a_program(rig: Rig, name: str) -> None:
    # Of system calls by number, only that which borrows a socket fails.
    patch = f"""
real = natrun.LIBC.{name}
def barred(number, *words):
    if {name!r} != "syscall" or number.value == natrun.PIDFD_GETFD:
        natrun.ctypes.set_errno(errno.EPERM)
        return -1
    return real(number, *words)
natrun.LIBC.{name} = barred"""
    done = rig.box.run("inside", *rig.patched("nobody", patch, "--check"))
    assert done.returncode == 125
    assert "natrun: cannot look into python3: not dumpable, or Y" in done.stderr
    assert "PermissionError: [Errno 13] Permission denied\n" in done.stderr
    assert "natrun: programs: no\n" in done.stderr


def test_the_inside_is_reached_if_the_socket_cannot_be_looked_at(rig: Rig) -> None:
    patch = """
real, connects = natrun.Call.borrow, []
def borrow(call):
    connects.extend([call] * (call.name == "connect"))
    if len(connects) > 1:
        raise OSError(errno.EMFILE, "no descriptor is left")
    return real(call)
natrun.Call.borrow = borrow"""
    dial = "import socket; a, b = socket.socket(), socket.socket(); "
    dial += f"a.connect(({SERVER!r}, 80)); b.connect(('10.9.0.1', 8080)); print('ok')"
    words = [PYTHON, "-c", dial]
    done = rig.box.run("inside", *rig.patched("nobody", patch, *words))
    assert done.stdout == "ok\n", done.stderr


def test_its_threads_have_the_stack_that_arm64_wants(rig: Rig) -> None:
    patch = """
real = natrun.threading.stack_size
def stack_size(size):
    assert size >= 131072  # PTHREAD_STACK_MIN of glibc there
    return real(size)
natrun.threading.stack_size = stack_size"""
    done = rig.box.run("inside", *rig.patched("nobody", patch, "--check"))
    assert "natrun: namespace: yes\n" in done.stderr


def test_it_checks_with_the_settings_that_are_named(rig: Rig) -> None:
    settings = rig.home("nobody") / "check.conf"
    settings.write_text("[natrun]\ngateway = 10.9.0.1:9\n")
    option = ["-c", str(settings), "--check"]
    lost = rig.natrun("nobody", *option, gateway="")
    assert lost.returncode == 125 and "10.9.0.1:9: connection" in lost.stderr
    settings.write_text("[natrun]\ngateway = 10.9.0.1:8080\n[curl]\nudp = local\n")
    done = rig.natrun("nobody", *option, gateway="")
    assert done.returncode == 0 and "\nnatrun: programs: yes\n" in done.stderr
    settings.write_text("[curl]\ngateway = 10.9.0.1:8080\n")
    misplaced = rig.natrun("nobody", *option, gateway="")
    assert "[curl] gateway: there is no such setting: " in misplaced.stderr


def test_what_works_is_found_with_the_settings_that_are_named(rig: Rig) -> None:
    home = rig.home("nobody")
    good, bad = home / "good.conf", home / "bad" / "natrun.conf"
    bad.parent.mkdir()
    good.write_text(f"[natrun]\ngateway = {natrun_rig.GATEWAY}\n")
    bad.write_text("[natrun]\nredirect = perhaps\n")  # of the user; not the one named
    usual = {"XDG_CONFIG_HOME": str(bad.parent), "gateway": ""}
    done = rig.natrun("nobody", "-c", str(good), "--check", **usual)
    assert "\nnatrun: programs: yes\n" in done.stderr
    assert done.returncode == 0 and "perhaps" not in done.stderr


def test_a_gateway_that_does_not_answer_is_told(rig: Rig) -> None:
    with contextlib.ExitStack() as stack:
        enter = stack.enter_context
        make = functools.partial(socket.create_server, ("10.9.0.1", 0))
        # It takes the connection, and says nothing.
        silent = enter(rig.box.within("gateway", make)).getsockname()[1]
        full = wire.full_listener("10.9.0.1")
        ports = silent, rig.box.within("gateway", lambda: enter(full))
        places = [*(f"10.9.0.1:{port}" for port in ports), "10.9.0.99:8080"]
        pool = enter(ThreadPoolExecutor(len(places)))
        asked = [
            pool.submit(rig.natrun, "nobody", "echo", "run", gateway=place)
            for place in places
        ]
        told = [future.result() for future in asked]
    for place, done in zip(places, told):
        assert (done.returncode, done.stdout) == (125, "")
        assert done.stderr.startswith(f"natrun: cannot use the gateway: {place}: ")
        assert done.stderr.count("\n") == 1


def test_it_says_what_it_is() -> None:
    assert local("--version").stdout.startswith("natrun 0.")
    assert "Usage:" in local("--help").stdout


def test_nothing_is_left_of_a_run(rig: Rig) -> None:
    rig.output("root", "curl", "-sS", f"http://{SERVER}/page")
    wait.until(lambda: rig.box.pids("inside") == [])
    assert kernel.children(os.getpid()) is not None
