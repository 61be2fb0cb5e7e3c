"""natrun.py: the datagrams of unmodified programs, as if on the gateway."""

from __future__ import annotations

import contextlib
import functools
import re
import socket
import threading
from collections.abc import Iterator

import natrun_rig
import needs
import pytest
from natrun_rig import PYTHON
from natrun_rig import SERVER
from natrun_rig import SERVER6
from natrun_rig import Rig
from natrun_rig import users

pytestmark = pytest.mark.end_to_end

OTHER = "203.0.113.81"


class Echo:
    """A server of UDP that says what came from whom; "call HOST:PORT" has another."""

    def __init__(self, host: str, port: int = 0) -> None:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self.sock = socket.socket(family, socket.SOCK_DGRAM)
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 22)
        self.sock.bind((host, port))
        self.port = self.sock.getsockname()[1]
        self.place = f"[{host}]:{self.port}" if ":" in host else f"{host}:{self.port}"
        threading.Thread(target=self.run, daemon=True).start()

    def run(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                data, sender = self.sock.recvfrom(65535)
                if data == b"stop":
                    return
                if data.startswith(b"call "):
                    host, _, port = data[5:].decode().rpartition(":")
                    sender_text = b"%s:%d" % (sender[0].encode(), sender[1])
                    self.sock.sendto(b"pass " + sender_text, (host, int(port)))
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


@users
def test_the_inside_is_reached_directly(
    rig: Rig, user: str, echoes: list[Echo]
) -> None:
    found = rig.probe(user, "near_datagrams", echoes[5].place)
    assert found["lan"] == [["10.9.0.1", echoes[5].port, "hello from 10.9.0.2"]]
    assert found["loopback"] == ["127.0.0.1", "pingpong"]


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
        "natrun: datagrams are not carried, but for names: no space left on device",
        "natrun: datagrams go nowhere here, but for names",
    ]
    assert "Network is unreachable" in done.stderr
    settings = rig.home(user) / "none.conf"
    settings.write_text("[natrun]\nudp = no\n")
    probe = [PYTHON, script, "make_datagram_socket"]
    inner = rig.command("root", "-c", str(settings), *probe)
    words = [*before, "unshare", "-U", "-r", "sh", "-c", limit, "sh", *inner]
    assert rig.box.run("inside", *words).stdout == '"EACCES"\n'
