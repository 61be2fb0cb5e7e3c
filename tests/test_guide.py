"""The recipes of docs/guide.md with other programs, as they stand there."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from pathlib import Path

import http_wire
import kernel
import machine
import needs
import origins
import package
import pytest
import readme
import running
import wait

NAMES = "10.0.0.1 gate.example\n192.0.2.2 www.example.com\n"
LIFETIMES = [b"max-age=1"]  # of pages: the last one holds
TITLES = ("TLS between a client and the gateway", "A cache that is filled at night")
RECIPES = "".join(map(readme.section, TITLES))


def block(begins: str) -> str:
    """Return the block of the recipes that begins so."""
    (found,) = (b for b in readme.blocks(RECIPES) if b.startswith(begins))
    return found


def pages(connection: origins.socket.socket, origin: origins.Origin) -> None:
    """Be an origin whose /own may not be stored, and the rest for a second or a day."""
    if head := http_wire.read_head(connection):
        origin.received.append(head)
        may = b"private" if b"/own " in head else LIFETIMES[-1]
        date = time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime()).encode()
        fields = b"\r\nDate: %b\r\nCache-Control: %b\r\n" % (date, may)
        answer = http_wire.sized(b"page %d" % len(origin.received))
        connection.sendall(answer.replace(b"\r\n", fields, 1))


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[package.Host]:
    deb = package.build(tmp_path_factory.mktemp("package"))
    with machine.booted(package.Host) as host:
        host.run("ip addr add 10.0.0.1/24 dev lo")
        with (host.root / "etc/hosts").open("a") as hosts:
            hosts.write(NAMES)
        host.install(deb)
        yield host


@pytest.fixture(scope="module")
def outside(host: package.Host) -> Iterator[origins.Origin]:
    """The server of www.example.com."""
    with package.outside_of(host, pages, 80) as server:
        yield server


def write(host: package.Host, path: str) -> None:
    """Write a file of the guide."""
    (host.root / path[1:]).write_text(readme.file(path))


def test_a_client_speaks_tls_to_stunnel(
    host: package.Host, outside: origins.Origin
) -> None:
    needs.programs("stunnel", "openssl", "curl")
    host.run(block("openssl"))
    write(host, "/etc/stunnel/natwork.conf")
    if host.run("getent passwd stunnel", check=False).stdout:
        host.run("sed -i 's/= stunnel4/= stunnel/' /etc/stunnel/natwork.conf")
    start, ask = block("systemctl enable --now stunnel").splitlines()
    host.run(start)
    with kernel.network_of(host.leader):
        wait.until(lambda: listens("10.0.0.1", 8443))
    host.run("cp /etc/stunnel/natwork.pem /root")
    said = host.run(f"cd /root; {ask} --noproxy '' --silent --show-error --fail").stdout
    assert said.startswith("page ")
    line = r"client=127\.0\.0\.1:.* target=http://www\.example\.com:80/ .* outcome=ok "
    wait.until(lambda: re.search(line, host.journal()))
    host.run("systemctl stop stunnel@natwork")


def listens(address: str, port: int) -> bool:
    try:
        origins.socket.create_connection((address, port)).close()
    except ConnectionRefusedError:
        return False
    return True


def test_the_cache_is_filled_at_night(
    host: package.Host, outside: origins.Origin
) -> None:
    needs.programs("squid", "curl")
    write(host, "/etc/squid/squid.conf")
    conf = host.root / package.CONF[1:]
    shipped = conf.read_text()
    conf.write_text(shipped + block("parents = "))
    before, log = host.reloads(), host.root / "var/log/natwork/access.log"
    for line in block("systemctl restart squid").splitlines():
        host.run(line)
    wait.until(lambda: host.reloads() > before)
    write(host, "/usr/local/bin/natwork-refresh")
    write(host, "/etc/systemd/system/natwork-refresh.service")
    write(host, "/etc/systemd/system/natwork-refresh.timer")
    for line in block("chmod 755").splitlines():
        host.run(line)
    timers = host.run("systemctl list-timers natwork-refresh.timer").stdout
    assert " 04:" in timers and "natwork-refresh.service" in timers

    def get(path: str) -> str:
        url = f"http://www.example.com{path}"
        curl = "curl --silent --show-error --fail --noproxy '' -x http://10.0.0.1:8080"
        return host.run(f"{curl} {url}").stdout

    for path in ("/kept", "/own", "/kept", "/own", "/once"):
        get(path)
    for _ in range(2):  # as the script does it: it does not count itself
        curl = "curl --silent --noproxy '' -x http://127.0.0.1:8080 --output /dev/null"
        host.run(f"{curl} http://www.example.com/self")
    wait.until(lambda: log.read_text().count("outcome=ok") >= 7)
    wait.until(lambda: get("/kept") != get("/kept"), 20)  # max-age=1 is over
    LIFETIMES.append(b"max-age=86400")
    time.sleep(2)  # Squid counts ages in whole seconds, and 0 is not over max-age=0
    before = len(outside.received)
    host.run("systemctl start natwork-refresh")
    asked = [head.split()[:2] for head in outside.received[before:]]
    assert [b"GET", b"/kept"] in asked and [b"GET", b"/own"] not in asked, asked
    assert not [path for _, path in asked if path in (b"/once", b"/self")], asked
    before = len(outside.received)
    page = get("/kept")
    assert page == get("/kept") and len(outside.received) == before
    squid = (host.root / "var/log/squid/access.log").read_text().splitlines()
    assert re.search(
        r" TCP_(MEM_)?HIT/200 .* GET http://www.example.com/kept", squid[-1]
    )
    conf.write_text(shipped)


def test_no_block_was_left_out() -> None:
    source = Path(__file__).read_text()
    begins = tuple(re.findall(r'\bblock\("([^"]+)"\)', source))
    paths = re.findall(r'write\(host, "([^"]+)"\)', source)
    written = list(map(readme.file, paths))
    blocks = readme.blocks(RECIPES)
    others = [text for text in blocks if text not in written]
    assert len(blocks) >= 9 and [b for b in others if not b.startswith(begins)] == []


def test_what_is_to_be_installed_is_installed_here() -> None:
    packages = (running.ROOT / ".ci/packages").read_text().split()
    named = " ".join(re.findall(r"apt install ([a-z0-9 -]+)", readme.TEXT)).split()
    # The tests build the package without a compiler, for which it has no work.
    missing = set(named) - set(packages) - {"build-essential"}
    assert len(named) >= 5 and not missing, missing
    assert "apt-get" not in readme.TEXT  # one word for one thing
