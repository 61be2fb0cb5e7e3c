"""SOCKS with real clients and servers, from the inside to the outside of a box."""

from __future__ import annotations

import functools
import itertools
import socket
import subprocess
from collections.abc import Callable
from collections.abc import Iterator
from pathlib import Path

import needs
import pytest
import socks_wire
import wait
import web

pytestmark = pytest.mark.end_to_end

DOOR = "10.9.0.1:8080"
DOOR6 = "[fd00:9::1]:8080"

VSFTPD = """\
background=NO
listen=YES
anonymous_enable=YES
anon_root={folder}/ftp
secure_chroot_dir={folder}/empty
seccomp_sandbox=NO
pasv_enable=NO
connect_from_port_20=YES
xferlog_enable=NO
"""
SSHD = """\
ListenAddress 203.0.113.80
HostKey {folder}/host
AuthorizedKeysFile {folder}/key.pub
PidFile {folder}/sshd.pid
StrictModes no
UsePAM no
PermitRootLogin yes
"""
DANTE = """\
resolveprotocol: fake
route {{
    from: 0.0.0.0/0 to: 0.0.0.0/0 via: 10.9.0.1 port = 8080
    proxyprotocol: {protocol}
    command: connect bind udpassociate
    protocol: tcp udp
    method: none
}}
"""
PROXYCHAINS = """\
strict_chain
proxy_dns
[ProxyList]
{protocol} 10.9.0.1 8080
"""


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[web.Rig]:
    """Return a box with nginx outside and natwork running."""
    needs.programs("openssl")
    made = tmp_path / "certificates"
    made.mkdir()
    web.certificates(made)
    with web.set_up(tmp_path, made, second_uplink=False) as rig:
        yield rig


def write(rig: web.Rig, name: str, text: str) -> str:
    """Write a file; return its path."""
    path = rig.folder / name
    path.write_text(text)
    return str(path)


def output(rig: web.Rig, *words: str, **environment: str) -> str:
    """Run a program on the inside; return what it prints."""
    done = rig.box.run("inside", *words, **environment)
    assert done.returncode == 0, (words, done.stdout, done.stderr)
    return done.stdout


def listens(
    rig: web.Rig, process: subprocess.Popen[str], *words: str
) -> Callable[[], bool]:
    """Return a function that says whether a socket of the outside is open."""

    def check() -> bool:
        assert process.poll() is None
        return bool(rig.box.run("outside", "ss", "-Hln", *words).stdout)

    return check


@pytest.mark.parametrize(
    ("option", "host", "proto", "told"),
    [
        ("--socks4", "203.0.113.80", "socks4", "90"),
        ("--socks4a", "www.example.com", "socks4", "90"),
        ("--socks4a", "six.example.com", "socks4", "90"),
        ("--socks5", "203.0.113.80", "socks5", "0"),
        ("--socks5", "[2001:db8:9::80]", "socks5", "0"),
        ("--socks5-hostname", "www.example.com", "socks5", "0"),
        ("--socks5-hostname", "six.example.com", "socks5", "0"),
        ("--socks5-hostname", "dual-stack.example.com", "socks5", "0"),
    ],
)
def test_curl_gets_a_page(
    rig: web.Rig, option: str, host: str, proto: str, told: str
) -> None:
    gateway = rig.natwork()
    path = rig.web.write("page", web.some_bytes(100_000))
    always = ["--insecure", "--silent", "--show-error", "--max-time", "20"]
    always += ["--globoff", "--output", str(rig.folder / "got")]
    cases = itertools.product((DOOR, DOOR6), ("http", "https"))
    for count, (door, scheme) in enumerate(cases, 1):
        output(rig, "curl", option, door, *always, f"{scheme}://{host}{path}")
        assert (rig.folder / "got").read_bytes() == web.some_bytes(100_000)
        (rig.folder / "got").unlink()
        line, entry = gateway.lines(count)[-1], rig.web.entries(count)[-1]
        assert (line["proto"], line["status"]) == (proto, told)
        assert line["outcome"] == "closed" and entry["scheme"] == scheme
        source = f"[{entry['client']}]" if ":" in entry["client"] else entry["client"]
        assert line["source"] == f"{source}:{entry['port']}"
    assert len(gateway.lines()) == len(rig.web.entries()) == count


def test_ssh_goes_through_netcat(rig: web.Rig) -> None:
    needs.programs("ssh", "ssh-keygen", "sshd", "nc")
    gateway = rig.natwork("outside=wan")
    Path("/run/sshd").mkdir(exist_ok=True)
    for key in ("host", "key"):
        words = ["-q", "-N", "", "-t", "ed25519", "-f", str(rig.folder / key)]
        subprocess.run(["ssh-keygen", *words], check=True)
    config = write(rig, "sshd_config", SSHD.format(folder=rig.folder))
    server = rig.box.start(
        "outside", "/usr/sbin/sshd", "-D", "-f", config, folder=rig.folder
    )
    wait.until(listens(rig, server, "-t", "sport = :22"))
    options = {
        "ProxyCommand": f"nc -X 5 -x {DOOR} %h %p",
        "StrictHostKeyChecking": "no",
        "UserKnownHostsFile": "/dev/null",
        "IdentityFile": str(rig.folder / "key"),
        "IdentitiesOnly": "yes",
        "BatchMode": "yes",
    }
    words = [w for name, value in options.items() for w in ("-o", f"{name}={value}")]
    command = "head -c 1000000 /dev/zero | wc -c; echo $SSH_CLIENT"
    said = output(rig, "ssh", "-F", "none", *words, "root@203.0.113.80", command)
    size, client = said.splitlines()
    assert (size, client.split()[0]) == ("1000000", "203.0.113.1")
    (line,) = gateway.lines(1)
    assert (line["proto"], line["target"]) == ("socks5", "203.0.113.80:22")


@pytest.mark.parametrize("protocol", ["socks4", "socks5"])
def test_proxychains_gets_a_page_by_name(rig: web.Rig, protocol: str) -> None:
    needs.programs("proxychains4")
    gateway = rig.natwork()
    path = rig.web.write("page", b"a page")
    config = write(rig, "chains.conf", PROXYCHAINS.format(protocol=protocol))
    words = ["-q", "-f", config, "curl", "-sS", "--max-time", "20"]
    page = output(rig, "proxychains4", *words, f"http://www.example.com{path}")
    assert page == "a page"
    (line,) = gateway.lines(1)
    assert (line["proto"], line["target"]) == (protocol, "www.example.com:80")


def dante(rig: web.Rig, protocol: str = "socks_v5") -> dict[str, str]:
    """Return the environment that has socksify ask the gateway."""
    return {"SOCKS_CONF": write(rig, "dante.conf", DANTE.format(protocol=protocol))}


@pytest.mark.parametrize("protocol", ["socks_v4", "socks_v5"])
def test_socksify_gets_a_page(rig: web.Rig, protocol: str) -> None:
    needs.programs("socksify", "wget")
    gateway = rig.natwork()
    path = rig.web.write("page", b"a page")
    url = f"http://203.0.113.80{path}"
    words = ["wget", "-q", "-T", "20", "-t", "1", "-O", "-", url]
    assert output(rig, "socksify", *words, **dante(rig, protocol)) == "a page"
    (line,) = gateway.lines(1)
    assert line["proto"] == f"socks{protocol[-1]}"


@pytest.mark.parametrize("outside", ["", "wan", "203.0.113.1"])
def test_an_ftp_server_calls_back(rig: web.Rig, outside: str) -> None:
    needs.programs("socksify", "tnftp", "vsftpd")
    gateway = rig.natwork(f"outside={outside}", "bind_ports=41000-41003")
    folder = rig.folder
    for name in ("ftp", "empty"):
        (folder / name).mkdir()
    (folder / "ftp" / "file").write_bytes(web.some_bytes(300_000))
    config = write(rig, "vsftpd.conf", VSFTPD.format(folder=folder))
    server = rig.box.start("outside", "vsftpd", config, folder=folder)
    wait.until(listens(rig, server, "-t", "sport = :21"))
    for count, protocol in enumerate(("socks_v4", "socks_v5")):
        got = folder / protocol
        words = ["-A", "-q", "20", "-o", str(got), "ftp://203.0.113.80/file"]
        output(rig, "socksify", "tnftp", *words, **dante(rig, protocol))
        assert got.read_bytes() == web.some_bytes(300_000)
        found = gateway.lines(2 * count + 2)[2 * count :]
        assert {line["proto"] for line in found} == {f"socks{protocol[-1]}"}
        lines = {line["method"]: line for line in found}
        call = lines["BIND"]
        assert call["address"] == "203.0.113.80:20"
        host, _, port = call["source"].rpartition(":")
        assert host == "203.0.113.1" and 41000 <= int(port) <= 41003
        assert call["outcome"] == lines["CONNECT"]["outcome"] == "closed"
        assert int(call["down"]) >= 300_000


def test_drill_asks_a_name_server(rig: web.Rig) -> None:
    needs.programs("socksify", "drill", "dnsmasq")
    gateway = rig.natwork()
    words = [
        "--keep-in-foreground",
        "--no-resolv",
        "--no-hosts",
        "--conf-file=/dev/null",
    ]
    words += ["--listen-address=203.0.113.80", "--bind-interfaces", "--user=root"]
    words += ["--pid-file=", "--address=/name.example/198.51.100.7"]
    server = rig.box.start("outside", "dnsmasq", *words, folder=rig.folder)
    wait.until(listens(rig, server, "-u", "sport = :53"))
    words = ["-4", "@203.0.113.80", "name.example"]
    assert "198.51.100.7" in output(rig, "socksify", "drill", *words, **dante(rig))
    (line,) = gateway.lines(1)
    assert (line["proto"], line["address"]) == ("udp", "203.0.113.80:53")
    assert (line["source"].rpartition(":")[0], line["outcome"]) == (
        "203.0.113.1",
        "closed",
    )


@pytest.mark.parametrize("outside", ["", "wan", "203.0.113.1 2001:db8:9::1"])
def test_datagrams_of_either_family_go_to_either_family(
    rig: web.Rig, outside: str
) -> None:
    gateway = rig.natwork(f"outside={outside}")
    servers = [
        rig.box.within("outside", functools.partial(socks_wire.UdpEcho, host))
        for host in ("203.0.113.80", "2001:db8:9::80", "203.0.113.81")
    ]
    near = rig.box.link_local("gateway", "lan")
    doors = ("10.9.0.1", "10.9.0.2"), ("fd00:9::1", "fd00:9::2"), (near, "::")
    for count, (door, here) in enumerate(doors, 1):
        scope = "%lan" if door == near else ""

        def associate(
            where: str = door + scope, here: str = here
        ) -> socks_wire.Association:
            return socks_wire.Association(
                socket.create_connection((where, 8080), 10), here
            )

        client = rig.box.within("inside", associate)
        assert client.relay[0] == door
        relay = client.relay + client.control.getpeername()[2:]  # with the scope
        for server in servers:
            where = socks_wire.addressed(server.host, server.port)
            client.sock.sendto(socks_wire.datagram(where, b"x"), relay)
            assert client.receive() == ((server.host, server.port), b"x")
            known = "2001:db8:9::1" if ":" in server.host else "203.0.113.1"
            assert server.senders[-1][0] == known
        client.sock.close()
        client.control.close()
        line = gateway.lines(count)[-1]
        assert (line["proto"], line["up"]) == ("udp", "3")
    for server in servers:
        server.close()


@pytest.mark.parametrize("outside", ["", "wan", "203.0.113.1 2001:db8:9::1"])
def test_anyone_may_call_where_a_rule_says_so(rig: web.Rig, outside: str) -> None:
    rules = "deny to 203.0.113.81/32; allow to 0.0.0.0/32, ::/128"
    gateway = rig.natwork(f"outside={outside}", f"rules={rules}")
    cases = [("0.0.0.0", "203.0.113.1", "203.0.113.80")]
    cases += [("::", "2001:db8:9::1", "2001:db8:9::80")]
    for count, (anyone, here, host) in enumerate(cases, 1):
        client = rig.box.connect("inside", ("10.9.0.1", 8080))
        asked = socks_wire.five(socks_wire.addressed(anyone, 0), socks_wire.BIND)
        code, where = socks_wire.ask_five(client, asked)
        assert (code, where[0]) == (0, here)

        def call(
            source: str, where: socks_wire.Address = where
        ) -> Callable[[], socket.socket]:
            return lambda: socket.create_connection(where, 10, (source, 0))

        if ":" not in host:  # the rules judge who calls, too
            with rig.box.within("outside", call("203.0.113.81")) as denied:
                assert denied.recv(1) == b""
        with rig.box.within("outside", call(host)) as server:
            assert socks_wire.read_five(client) == (0, server.getsockname()[:2])
            server.sendall(b"x")
            assert client.recv(1) == b"x"
        client.close()
        line = gateway.lines(count)[-1]
        assert (line["method"], line["outcome"]) == ("BIND", "closed")


def test_nobody_may_call_by_a_way_that_is_not_there(rig: web.Rig) -> None:
    gateway = rig.natwork("rules=allow to 0.0.0.0/32")
    assert rig.box.run("gateway", "ip", "route", "del", "default").returncode == 0
    client = rig.box.connect("inside", ("10.9.0.1", 8080))
    asked = socks_wire.five(socks_wire.addressed("0.0.0.0", 0), socks_wire.BIND)
    assert socks_wire.ask_five(client, asked) == (3, ("0.0.0.0", 0))
    client.close()
    assert gateway.lines(1)[0]["outcome"] == "unreachable"


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["www.example.com"], "203.0.113.80"),
        (["dual-stack.example.com"], "203.0.113.80"),  # IPv4 first
        (["six.example.com"], "2001:db8:9::80"),
        (["-x", "203.0.113.81"], "www.example.net"),
    ],
)
def test_tor_resolve_is_told(rig: web.Rig, words: list[str], told: str) -> None:
    needs.programs("tor-resolve")
    gateway = rig.natwork("rules=allow to .example.com, 203.0.113.81 port 443; deny")
    asked = output(rig, "tor-resolve", "-p", "8080", *words, "10.9.0.1")
    assert asked == f"{told}\n"
    line = gateway.lines(1)[-1]
    assert (line["outcome"], line["source"]) == ("ok", "-")


@pytest.mark.parametrize(
    ("words", "outcome"),
    [
        (["nosuch.example.com"], "no-such-host"),
        (["rebound.example.com"], "denied-inside"),  # 10.9.0.2
        (["-x", "203.0.113.1"], "denied-own"),
        (["-x", "203.0.113.99"], "no-such-host"),
    ],
)
def test_tor_resolve_is_refused(rig: web.Rig, words: list[str], outcome: str) -> None:
    needs.programs("tor-resolve")
    gateway = rig.natwork()
    done = rig.box.run("inside", "tor-resolve", "-p", "8080", *words, "10.9.0.1")
    assert done.returncode != 0 and done.stdout == ""
    assert gateway.lines(1)[0]["outcome"] == outcome
