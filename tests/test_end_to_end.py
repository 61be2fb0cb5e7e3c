"""Real clients on one side, real servers on the other, natwork.py between them.

Each test has a box of its own: see boxes.py. After each, the servers have seen no
address but the gateway's outside ones, and the gateway has ended well.
"""

from __future__ import annotations

import base64
import contextlib
import functools
import hashlib
import importlib.util
import itertools
import json
import shutil
import socket
import struct
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import boxes
import http_wire
import needs
import origins
import pytest
import running
import wait
import web
import wire

import natwork

pytestmark = pytest.mark.end_to_end

OTHER = "http://10.9.0.1:8079/proxy.pac"
PROXY6 = "http://[fd00:9::1]:8080"
LISTENER = ("10.9.0.1", 8080)
SNMP = Path("/proc/thread-self/net/snmp")  # of the namespace of who reads it
FORBIDDEN = {  # what the gateway does not reach for a client, by what it answers
    "203.0.113.1:80": 403,
    "10.9.0.1:80": 403,
    "10.9.0.2:80": 403,
    "10.9.0.77:80": 403,
    "127.0.0.1:80": 403,
    "127.1.2.3:80": 403,
    "0.0.0.0:80": 403,
    "169.254.1.1:80": 403,
    "[2001:db8:9::1]:80": 403,
    "[fd00:9::1]:80": 403,
    "[fd00:9::2]:80": 403,
    "[::1]:80": 403,
    "[::ffff:10.9.0.2]:80": 403,
    "localhost:80": 403,
    "rebound.example.com:80": 403,
    "www.example.com:25": 403,
    "203.0.113.1:8080": 502,
    "10.9.0.1:8080": 502,
    "127.0.0.1:8080": 502,
    "[fd00:9::1]:8080": 502,
    "[::1]:8080": 502,
}


@pytest.fixture(scope="session")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a certificate for every name, and who vouches for it."""
    needs.programs("openssl")
    folder = tmp_path_factory.mktemp("certificates")
    web.certificates(folder)
    return folder


@pytest.fixture
def rig(tmp_path: Path, certificates: Path) -> Iterator[web.Rig]:
    """Return a rig with one line to the outside."""
    with web.set_up(tmp_path, certificates, second_uplink=False) as rig:
        yield rig


@pytest.fixture
def rig2(tmp_path: Path, certificates: Path) -> Iterator[web.Rig]:
    """Return a rig with two lines to the outside."""
    with web.set_up(tmp_path, certificates, second_uplink=True) as rig:
        yield rig


# The box itself


@pytest.mark.parametrize(
    ("setting", "near", "far"),
    [
        ("ipv4/ip_forward", "10.9.0.1", "203.0.113.80"),
        ("ipv6/conf/all/forwarding", "fd00:9::1", "2001:db8:9::80"),
    ],
)
def test_only_the_gateway_keeps_the_two_networks_apart(
    setting: str, near: str, far: str
) -> None:
    """The inside reaches the gateway, and with a router there it would go on."""
    family = socket.AF_INET6 if ":" in near else socket.AF_INET
    with boxes.dual_homed() as box, contextlib.ExitStack() as servers:
        for place, host in (("gateway", near), ("outside", far)):
            listen = functools.partial(socket.create_server, (host, 80), family=family)
            servers.enter_context(box.within(place, listen))
        box.connect("inside", (near, 80)).close()
        assert box.get("gateway", setting) == "0"
        with pytest.raises(OSError):
            box.connect("inside", (far, 80), timeout=1)
        box.set("gateway", setting, "1")
        box.connect("inside", (far, 80)).close()


def test_the_inside_reaches_nothing_when_the_gateway_does_not_run(rig: web.Rig) -> None:
    rig.web.write("page", b"a page")
    for host in ("203.0.113.80", "[2001:db8:9::80]"):
        words = ["--silent", "--connect-timeout", "1", f"http://{host}/page"]
        assert rig.box.run("inside", "curl", *words).returncode in (7, 28)
    assert rig.web.entries() == []


# curl


def test_curl_gets_a_page_by_http(rig: web.Rig) -> None:
    gateway = rig.natwork()
    path = rig.web.write("page", b"a page of the outside")
    url = f"http://www.example.com{path}?query=not-logged"
    assert rig.curl(url) == "a page of the outside"
    [seen] = rig.web.entries(1)
    [line] = gateway.lines(1)
    assert seen["client"] == "203.0.113.1"
    assert seen["host"] == "www.example.com"
    assert seen["target"] == "/page?query=not-logged"
    assert seen["protocol"] == "HTTP/1.1" and seen["via"].startswith("1.1 ")
    assert line["client"].startswith("10.9.0.2:")
    assert line["proto"] == "http" and line["method"] == "GET"
    assert line["target"] == "http://www.example.com:80/page"
    assert line["address"] == "203.0.113.80:80"
    assert line["source"] == f"203.0.113.1:{seen['port']}"
    assert line["status"] == "200" and line["outcome"] == "ok"


def test_curl_gets_a_page_by_https(rig: web.Rig) -> None:
    gateway = rig.natwork()
    path = rig.web.write("page", b"a page of the outside")
    assert rig.curl(f"https://www.example.com{path}") == "a page of the outside"
    [seen] = rig.web.entries(1)
    [line] = gateway.lines(1)
    assert seen["client"] == "203.0.113.1" and seen["scheme"] == "https"
    assert seen["via"] == ""  # nothing inside the tunnel is touched
    assert line["proto"] == "connect" and line["method"] == "CONNECT"
    assert line["target"] == "www.example.com:443"
    assert line["address"] == "203.0.113.80:443"
    assert line["source"] == f"203.0.113.1:{seen['port']}"
    assert line["status"] == "200"
    assert int(line["up"]) > 0 and int(line["down"]) > 0


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_curl_gets_a_big_file_byte_for_byte(rig: web.Rig, scheme: str) -> None:
    gateway = rig.natwork()
    content = web.some_bytes(50_000_000)
    path = rig.web.write("big", content)
    got = rig.folder / "got"
    rig.curl("--output", str(got), f"{scheme}://www.example.com{path}")
    assert got.read_bytes() == content
    [line] = gateway.lines(1)
    assert int(line["down"]) >= len(content)


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_curl_puts_a_file_byte_for_byte(rig: web.Rig, scheme: str) -> None:
    """With an expectation: curl sends nothing before the server's 100."""
    rig.natwork()
    content = web.some_bytes(5_000_000)
    (rig.folder / "file").write_bytes(content)
    wait = ["--expect100-timeout", "60", "--header", "Expect: 100-continue"]
    url = f"{scheme}://www.example.com/files/put"
    rig.curl("--fail", "--upload-file", str(rig.folder / "file"), *wait, url)
    assert (rig.web.site / "files/put").read_bytes() == content
    assert rig.web.entries(1)[0]["status"] == "201"


def test_curl_puts_a_stream_of_unknown_length(rig: web.Rig) -> None:
    rig.natwork()
    content = web.some_bytes(3_000_000)
    (rig.folder / "file").write_bytes(content)
    chunked = ["--header", "Transfer-Encoding: chunked", "--header", "Expect:"]
    url = "http://www.example.com/files/put"
    rig.curl("--fail", "--upload-file", str(rig.folder / "file"), *chunked, url)
    assert (rig.web.site / "files/put").read_bytes() == content


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_curl_posts_a_form(rig: web.Rig, scheme: str) -> None:
    rig.natwork()
    url = f"{scheme}://www.example.com/post/form"
    rig.curl("--fail", "--data", "one=1&two=2", url)
    assert (rig.web.site / "files/form").read_text() == "one=1&two=2"
    [seen] = rig.web.entries(1)
    assert seen["method"] == "POST" and seen["client"] == "203.0.113.1"


def test_curl_asks_for_the_head_only(rig: web.Rig) -> None:
    rig.natwork()
    path = rig.web.write("page", web.some_bytes(12_345))
    head = rig.curl("--head", f"http://www.example.com{path}").lower()
    assert "content-length: 12345" in head and "via: " in head
    assert rig.web.entries(1)[0]["method"] == "HEAD"


def test_one_connection_of_a_client_carries_requests_to_two_servers(
    rig: web.Rig,
) -> None:
    gateway = rig.natwork()
    rig.web.write("page", b"a page")
    hosts = ["www.example.com", "www.example.net"] * 3
    urls = [f"http://{host}/page" for host in hosts]
    answers = rig.curl("--write-out", " %{http_code} %{num_connects}\n", *urls)
    assert answers.splitlines() == ["a page 200 1"] + ["a page 200 0"] * 5
    seen = rig.web.entries(6)
    servers = {"www.example.com": "203.0.113.80", "www.example.net": "203.0.113.81"}
    assert [entry["host"] for entry in seen] == hosts
    assert all(entry["server"] == servers[entry["host"]] for entry in seen)
    lines = gateway.lines(6)
    assert [line["source"] for line in lines] == [
        f"203.0.113.1:{entry['port']}" for entry in seen
    ]
    assert len({line["client"] for line in lines}) == 1


def test_the_server_connection_is_kept_while_the_client_asks_the_same(
    rig: web.Rig,
) -> None:
    rig.natwork()
    rig.web.write("page", b"a page")
    rig.curl(*["http://www.example.com/page"] * 5)
    assert len({entry["connection"] for entry in rig.web.entries(5)}) == 1


def test_curl_speaks_http_1_0(rig: web.Rig) -> None:
    rig.natwork()
    path = rig.web.write("page", b"a page of the outside")
    for words in (["--http1.0"], ["--proxy1.0", "10.9.0.1:8080"]):
        for scheme in ("http", "https"):
            page = rig.curl(*words, f"{scheme}://www.example.com{path}")
            assert page == "a page of the outside"


def test_many_clients_at_once_each_get_their_own(rig: web.Rig) -> None:
    gateway = rig.natwork()
    names = [f"file{number}" for number in range(40)]
    words = ["--parallel", "--parallel-immediate", "--parallel-max", "40"]
    for number, name in enumerate(names):
        rig.web.write(name, web.some_bytes(300_000 + number))
        scheme = "https" if number % 2 else "http"
        words += ["--output", str(rig.folder / name)]
        words += [f"{scheme}://www.example.com/{name}"]
    rig.curl(*words)
    for number, name in enumerate(names):
        assert (rig.folder / name).read_bytes() == web.some_bytes(300_000 + number)
    assert len(gateway.lines(40)) == 40


def test_a_name_that_does_not_resolve_is_said_to_be_one(rig: web.Rig) -> None:
    gateway = rig.natwork()
    answer = rig.curl("--include", "http://nowhere.example.com/")
    assert answer.startswith("HTTP/1.1 502 ") and "proxy-status: " in answer.lower()
    assert gateway.lines(1)[0]["status"] == "502"


def test_a_server_that_refuses_is_said_to_refuse(rig: web.Rig) -> None:
    rig.natwork()
    answer = rig.curl("--include", "http://www.example.com:81/")
    assert answer.startswith("HTTP/1.1 502 ") and "connection_refused" in answer


# IPv6


@pytest.mark.parametrize(
    ("host", "source"),
    [
        ("six.example.com", "2001:db8:9::1"),
        ("dual-stack.example.com", "2001:db8:9::1"),
        ("www.example.com", "203.0.113.1"),
    ],
)
def test_either_family_reaches_either_family(
    rig: web.Rig, host: str, source: str
) -> None:
    gateway = rig.natwork()
    path = rig.web.write("page", b"a page")
    cases = itertools.product((web.PROXY, PROXY6), ("http", "https"))
    for count, (proxy, scheme) in enumerate(cases, 1):
        assert rig.curl(f"{scheme}://{host}{path}", proxy=proxy) == "a page"
        assert rig.web.entries(count)[-1]["client"] == source
        line = gateway.lines(count)[-1]
        assert line["source"].strip("[").startswith(source)
        assert line["client"].startswith("[" if proxy == PROXY6 else "10.9.0.2:")


def test_an_ipv6_address_is_reached_without_a_name(rig: web.Rig) -> None:
    rig.natwork()
    path = rig.web.write("page", b"a page")
    assert rig.curl("--globoff", f"http://[2001:db8:9::80]{path}") == "a page"
    [seen] = rig.web.entries(1)
    assert seen["host"] == "[2001:db8:9::80]" and seen["client"] == "2001:db8:9::1"


def test_a_dead_ipv6_address_costs_little(rig: web.Rig) -> None:
    """RFC 8305: the next address is tried 250 ms after the first."""
    rig.natwork()
    path = rig.web.write("page", b"a page")
    began = time.monotonic()
    assert rig.curl(f"http://half-dead.example.com{path}") == "a page"
    assert time.monotonic() - began < 2
    assert rig.web.entries(1)[0]["client"] == "203.0.113.1"


# Other clients


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_wget_gets_a_file(rig: web.Rig, scheme: str) -> None:
    needs.programs("wget")
    rig.natwork()
    content = web.some_bytes(2_000_000)
    path = rig.web.write("file", content)
    got = rig.folder / "got"
    done = rig.box.run(
        "inside",
        *("wget", "--no-hsts", "--tries=1", "--timeout=20", "--output-document"),
        *(str(got), f"--ca-certificate={rig.ca}"),
        f"{scheme}://www.example.com{path}",
        http_proxy=web.PROXY,
        https_proxy=web.PROXY,
    )
    assert done.returncode == 0, done.stderr
    assert got.read_bytes() == content
    [seen] = rig.web.entries(1)
    assert seen["scheme"] == scheme and seen["client"] == "203.0.113.1"


PICTURES = 60  # picture N is N + 1 pixels wide; every other one is on another server
PICTURE = (
    '<svg xmlns="http://www.w3.org/2000/svg" width="%d" height="9"><!--%s--></svg>'
)
SCRIPT = """
function echo(message) {
    return new Promise((done, failed) => {
        const socket = new WebSocket("ws://www.example.com:8000/");
        socket.onopen = () => socket.send(message);
        socket.onmessage = event => done(event.data);
        socket.onerror = () => failed("no socket");
    });
}
async function report() {
    const whole = [...document.images].filter((one, n) => one.naturalWidth == n + 1);
    await fetch("/post/note", {method: "POST", body: "written by a script"});
    const note = await (await fetch("/files/note")).text();
    // A page that came by https may not open a socket without TLS.
    const answer = location.protocol == "http:" ? await echo("a message") : "none";
    return `${location.protocol} ${whole.length}, ${note}, ${answer}`;
}
async function run() {
    let result;
    try { result = await report(); } catch (error) { result = "failed: " + error; }
    await fetch("/post/result", {method: "POST", body: result});
}
onload = run;
"""


def start_echo(box: boxes.Box, folder: Path) -> None:
    """Start a WebSocket server that sends each message back, and wait for it."""
    needs.programs("websocketd")
    words = ["websocketd", "--address=203.0.113.80", "--port=8000", "cat"]
    box.start("outside", *words, folder=folder)

    def answers() -> bool:
        try:
            box.connect("outside", ("203.0.113.80", 8000)).close()
        except OSError:
            return False
        return True

    wait.until(answers)


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_chromium_shows_a_page(rig: web.Rig, scheme: str) -> None:
    """A page with pictures, a POST and a WebSocket, each of them by the gateway."""
    needs.programs("chromium")
    gateway = rig.natwork()
    start_echo(rig.box, rig.folder)
    page = "<!doctype html><title>A page</title>"
    for number in range(PICTURES):
        host = "www.example.net" if number % 2 else "www.example.com"
        picture = PICTURE % (number + 1, " " * 1000 * number)
        path = rig.web.write(f"{number}.svg", picture.encode())
        page += f'<img src="{scheme}://{host}{path}">'
    page += f"<script>{SCRIPT}</script>"
    rig.web.write("page.html", page.encode())
    home = rig.folder / "home"
    home.mkdir()
    with (rig.folder / "chromium").open("w") as said:
        browser = rig.box.start(
            "inside",
            *web.CHROMIUM,
            f"--user-data-dir={home / 'profile'}",
            f"--ignore-certificate-errors-spki-list={rig.web.fingerprint()}",
            f"--proxy-server={web.PROXY}",
            f"{scheme}://www.example.com/page.html",
            folder=home,
            output=said,
            errors=said,
            HOME=str(home),
        )
    result = rig.web.site / "files/result"
    wait.until(lambda: result.exists() or browser.poll() is not None, 60)
    assert result.exists(), (rig.folder / "chromium").read_text()
    rig.box.stop(browser)
    answer = "a message" if scheme == "http" else "none"
    assert result.read_text() == f"{scheme}: {PICTURES}, written by a script, {answer}"
    seen = {(entry["scheme"], entry["target"]) for entry in rig.web.entries()}
    wanted = ["/page.html", "/0.svg", "/1.svg", "/post/note", "/files/note"]
    assert {(scheme, target) for target in wanted} <= seen
    assert gateway.lines()


def browse(rig: web.Rig, home: Path, url: str) -> str:
    """Return the page as Chromium shows it that goes by the gateway's PAC file."""
    home.mkdir()
    done = rig.box.run(
        "inside",
        *web.CHROMIUM,
        f"--user-data-dir={home}",
        f"--proxy-pac-url={web.PROXY}/proxy.pac",
        "--dump-dom",
        url,
        HOME=str(home),
    )
    return done.stdout


def test_chromium_passes_over_a_gateway_that_is_gone(rig: web.Rig) -> None:
    needs.programs("chromium")
    gateway = rig.natwork("gateways=10.9.0.1:8079")
    words = [*running.PROGRAM, "-o", "listen=10.9.0.1:8079"]
    with (rig.folder / "other").open("w") as log:
        other = rig.box.start("gateway", *words, folder=rig.folder, output=log)
    wait.until(lambda: not rig.box.run("inside", "curl", "-s", OTHER).returncode)
    rig.web.write("page.html", b"<!doctype html><p>A page")
    page, used = "http://www.example.com/page.html", rig.folder / "other"
    assert "A page" in browse(rig, rig.folder / "home1", page)
    assert "page.html" in used.read_text()  # the first in this client's order
    rig.box.stop(other)
    assert "A page" in browse(rig, rig.folder / "home2", page)
    assert any("page.html" in line["target"] for line in gateway.lines(2))


def make_repository(folder: Path, count: int) -> dict[str, bytes]:
    """Make a flat repository of packages; return their files."""
    files = {}
    for number in range(count):
        package = folder / f"tree{number}"
        (package / "DEBIAN").mkdir(parents=True)
        (package / "content").write_bytes(web.some_bytes(20_000 + number))
        control = f"""\
            Package: natwork-test-{number}
            Version: 1.0
            Architecture: all
            Maintainer: Nobody <nobody@example.com>
            Description: a package to fetch
            """
        (package / "DEBIAN/control").write_text(
            "".join(
                line.strip() + "\n" for line in control.splitlines() if line.strip()
            )
        )
        name = f"natwork-test-{number}_1.0_all.deb"
        subprocess.run(
            ["dpkg-deb", "--root-owner-group", "-Znone", "--build", package, name],
            cwd=folder,
            check=True,
            capture_output=True,
        )
        files[name] = (folder / name).read_bytes()
        shutil.rmtree(package)
    for what, name in (("packages", "Packages"), ("release", "Release")):
        listing = subprocess.run(
            ["apt-ftparchive", what, "."], cwd=folder, check=True, capture_output=True
        )
        (folder / name).write_bytes(listing.stdout)
    return files


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_apt_updates_and_fetches_packages(rig: web.Rig, scheme: str) -> None:
    """apt sends its requests one after the other, ten at a time."""
    needs.programs("apt-get", "dpkg-deb", "apt-ftparchive")
    gateway = rig.natwork()
    (rig.web.site / "debian").mkdir()
    files = make_repository(rig.web.site / "debian", 12)
    apt = rig.folder / "apt"  # all that this apt knows of is below it
    for name in (
        "etc/apt/apt.conf.d",
        "etc/apt/preferences.d",
        "etc/apt/trusted.gpg.d",
        "var/lib/apt/lists/partial",
        "var/lib/dpkg",
        "var/cache/apt/archives/partial",
        "var/log/apt",
    ):
        (apt / name).mkdir(parents=True)
    (apt / "var/lib/dpkg/status").write_text("")
    (apt / "etc/apt/sources.list").write_text(
        f"deb [trusted=yes] {scheme}://apt.example.com/debian ./\n"
    )
    settings = [
        f'Dir "{apt}";',
        f'Dir::State::status "{apt}/var/lib/dpkg/status";',
        f'Acquire::https::CAInfo "{rig.ca}";',
        'Acquire::Retries "0";',
        'Acquire::Languages "none";',
        'APT::Sandbox::User "root";',
        'APT::Update::Error-Mode "any";',
    ]
    (rig.folder / "apt.conf").write_text("\n".join(settings))
    config = str(rig.folder / "apt.conf")
    done = rig.box.run(
        "inside",
        *("apt-get", "update"),
        APT_CONFIG=config,
        http_proxy=web.PROXY,
        https_proxy=web.PROXY,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    packages = [name.split("_")[0] for name in files]
    done = rig.box.run(
        "inside",
        *("apt-get", "--yes", "--download-only", "install", *packages),
        *("-o", f"Acquire::{scheme}::Proxy={web.PROXY}"),
        APT_CONFIG=config,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    archives = apt / "var/cache/apt/archives"
    assert {path.name: path.read_bytes() for path in archives.glob("*.deb")} == files
    seen = [entry for entry in rig.web.entries() if entry["target"].endswith(".deb")]
    assert len(seen) == len(files) and {e["scheme"] for e in seen} == {scheme}
    kinds = {line["proto"] for line in gateway.lines(1)}
    assert kinds == {"http" if scheme == "http" else "connect"}


# Upgrade


def upgrade_request(authority: str, path: str, key: str) -> bytes:
    return (
        f"GET http://{authority}{path} HTTP/1.1\r\nHost: {authority}\r\n"
        "Connection: Upgrade\r\nUpgrade: websocket\r\n"
        f"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: {key}\r\n\r\n"
    ).encode()


def text_frame(text: bytes, mask: bytes) -> bytes:
    """Return a short text frame as a client sends it (RFC 6455, 5.2)."""
    masked = bytes(byte ^ mask[i % 4] for i, byte in enumerate(text))
    return struct.pack("!BB", 0x81, 0x80 | len(text)) + mask + masked


def test_a_websocket_becomes_a_tunnel(rig: web.Rig) -> None:
    gateway = rig.natwork()
    start_echo(rig.box, rig.folder)
    key = base64.b64encode(web.some_bytes(16)).decode()
    with rig.box.connect("inside", LISTENER) as client:
        client.sendall(upgrade_request("www.example.com:8000", "/", key))
        head = http_wire.read_head(client).decode()
        assert head.startswith("HTTP/1.1 101 "), head
        magic = key + "258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
        accept = base64.b64encode(hashlib.sha1(magic.encode()).digest()).decode()
        assert f"sec-websocket-accept: {accept.lower()}" in head.lower()
        for text in (b"a message", b"and another"):
            client.sendall(text_frame(text, b"mask"))
            assert wire.read_exactly(client, 2) == bytes([0x81, len(text)])
            assert wire.read_exactly(client, len(text)) == text
    [line] = gateway.lines(1)
    assert line["proto"] == "upgrade" and line["status"] == "101"
    assert line["address"] == "203.0.113.80:8000"
    assert line["source"].startswith("203.0.113.1:")


def test_a_refused_upgrade_stays_http(rig: web.Rig) -> None:
    rig.natwork()
    path = rig.web.write("page", b"a page")
    with rig.box.connect("inside", LISTENER) as client:
        for _ in range(2):
            client.sendall(upgrade_request("www.example.com", path, "a" * 22 + "=="))
            assert http_wire.read_head(client).startswith(b"HTTP/1.1 200 ")
            assert wire.read_exactly(client, 6) == b"a page"


# Which machine is a client, and what is reached


@pytest.mark.parametrize("address", ["203.0.113.1", "2001:db8:9::1"])
def test_the_outside_is_closed_without_a_byte(rig: web.Rig, address: str) -> None:
    gateway = rig.natwork()
    path = rig.web.write("page", b"a page")
    for count, said in enumerate(
        (
            b"",
            b"GET http://www.example.com/page HTTP/1.1\r\nHost: a\r\n\r\n",
            b"GET / HTTP/1.1\r\nHost: 203.0.113.1:8080\r\n\r\n",
            b"CONNECT www.example.com:80 HTTP/1.1\r\nHost: a\r\n\r\n",
        )
    ):
        with rig.box.connect("outside", (address, 8080)) as stranger:
            try:
                stranger.sendall(said)
            except ConnectionError:
                pass  # closed already, which is right
            assert wire.read_all(stranger) == b""
        line = gateway.lines(count + 1)[count]
        assert line["client"].strip("[").startswith(address[:-1])
    assert rig.web.entries() == []
    assert rig.curl(f"http://www.example.com{path}") == "a page"  # others are served


@pytest.mark.parametrize("outside", ["", "203.0.113.1", "wan", "wan2"])
@pytest.mark.parametrize("place", ["203.0.113.1", "10.9.0.1"])
def test_a_peer_routed_here_from_outside_is_no_client(
    rig: web.Rig, outside: str, place: str
) -> None:
    """Its address may be in `inside`: the outside has private networks, too."""
    gateway = rig.natwork(f"outside={outside}")
    words = "-n", rig.box.name("outside")
    boxes.ip(*words, "address", "add", "192.168.55.5/32", "dev", "lo")
    boxes.ip(*words, "route", "add", "10.9.0.1/32", "via", "203.0.113.1")
    try:
        url = f"http://{place}:8080/table.json"
        ask = "curl", "--silent", "--max-time", "5", "--interface", "192.168.55.5", url
        done = rig.box.run("outside", *ask)
        assert done.returncode in (52, 56) and done.stdout == ""
        assert gateway.lines(1)[0]["outcome"] == "not-inside"
    finally:
        boxes.ip(*words, "address", "del", "192.168.55.5/32", "dev", "lo")
        boxes.ip(*words, "route", "del", "10.9.0.1/32")


def test_an_outside_address_serves_nobody_where_outside_is_set(rig: web.Rig) -> None:
    rig.natwork("outside=203.0.113.1")
    request = b"GET / HTTP/1.1\r\nHost: 203.0.113.1:8080\r\n\r\n"
    with rig.box.connect("inside", ("203.0.113.1", 8080)) as client:
        try:
            client.sendall(request)
        except ConnectionError:
            pass
        assert wire.read_all(client) == b""


def ignore(connection: socket.socket, origin: origins.Origin) -> None:
    """Close a connection without a word."""


@pytest.mark.parametrize("method", ["GET", "CONNECT"])
def test_the_inside_and_the_gateway_itself_are_not_reached(
    rig: web.Rig, method: str
) -> None:
    gateway = rig.natwork()
    victims = [
        rig.box.within(place, functools.partial(origins.Origin, ignore, host))
        for place, host in (("inside", "10.9.0.2"), ("gateway", "127.0.0.1"))
    ]
    targets = dict(FORBIDDEN)
    targets.update({victim.authority: 403 for victim in victims})
    code = "%{http_code}" if method == "GET" else "%{http_connect}"
    answers = {}
    for target in targets:
        words = ["--proxytunnel"] if method == "CONNECT" else []
        url = f"http://{target}/"
        always = ["--silent", "--globoff", "--output", "/dev/null", "--max-time", "20"]
        always += ["--proxy", web.PROXY, "--write-out", code]
        done = rig.box.run("inside", "curl", *always, *words, url)
        answers[target] = int(done.stdout)
    if method == "GET":  # the gateway answers itself, and dials nobody
        targets.update({target: 200 for target in targets if targets[target] == 502})
    assert answers == targets
    for line in gateway.lines(len(targets)):
        assert line["address"] == line["source"] == "-", line
    for victim in victims:
        assert victim.callers == []
        victim.listener.close()
    assert rig.web.entries() == []


def test_a_rule_opens_an_address_inside(rig: web.Rig) -> None:
    def handle(connection: socket.socket, origin: origins.Origin) -> None:
        http_wire.read_head(connection)
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\ninside")

    server = rig.box.within("inside", lambda: origins.Origin(handle, "10.9.0.2"))
    rig.natwork("rules=allow to 10.9.0.2/32")
    assert rig.curl(server.url + "/") == "inside"
    assert [caller[0] for caller in server.callers] == ["10.9.0.1"]
    server.listener.close()


# Uplinks


@pytest.mark.parametrize("outside", ["203.0.113.1", "wan"])
def test_the_outside_is_reached_from_where_outside_says(
    rig: web.Rig, outside: str
) -> None:
    gateway = rig.natwork(f"outside={outside}")
    path = rig.web.write("page", b"a page")
    for url in (
        f"http://www.example.com{path}",
        f"https://www.example.com{path}",
        f"http://203.0.113.81{path}",
    ):
        assert rig.curl(url) == "a page"
    seen = rig.web.entries(3)
    assert {entry["client"] for entry in seen} == {"203.0.113.1"}
    assert sorted(line["source"] for line in gateway.lines(3)) == sorted(
        f"203.0.113.1:{entry['port']}" for entry in seen
    )


@pytest.mark.parametrize("outside", ["2001:db8:9::1", "wan"])
def test_the_outside_is_reached_by_ipv6_too(rig: web.Rig, outside: str) -> None:
    rig.natwork(f"outside={outside}")
    path = rig.web.write("page", b"a page")
    assert rig.curl(f"http://six.example.com{path}") == "a page"
    assert rig.web.entries(1)[0]["client"] == "2001:db8:9::1"


@pytest.mark.parametrize(
    ("outside", "first"),
    [
        ("203.0.113.1 198.51.100.1", "203.0.113.1"),
        ("198.51.100.1 203.0.113.1", "198.51.100.1"),
        ("wan wan2", "203.0.113.1"),
        ("wan2 wan", "198.51.100.1"),
        ("wan2 203.0.113.1", "198.51.100.1"),
        ("wan2", "198.51.100.1"),
    ],
)
def test_the_first_uplink_is_preferred(rig2: web.Rig, outside: str, first: str) -> None:
    gateway = rig2.natwork(f"outside={outside}")
    path = rig2.web.write("page", b"a page")
    for scheme in ("http", "https"):
        assert rig2.curl(f"{scheme}://far.example.com{path}") == "a page"
    assert [entry["client"] for entry in rig2.web.entries(2)] == [first, first]
    assert {line["source"].split(":")[0] for line in gateway.lines(2)} == {first}


@pytest.mark.parametrize("outside", ["203.0.113.1 198.51.100.1", "wan wan2"])
def test_the_second_uplink_serves_when_the_first_is_down(
    rig2: web.Rig, outside: str
) -> None:
    rig2.natwork(f"outside={outside}")
    path = rig2.web.write("page", b"a page")
    url = f"http://far.example.com{path}"
    assert rig2.curl(url) == "a page"
    rig2.box.link("gateway", "wan", "down")
    for scheme in ("http", "https", "http"):
        assert rig2.curl(f"{scheme}://far.example.com{path}") == "a page"
    callers = [entry["client"] for entry in rig2.web.entries(4)]
    assert callers == ["203.0.113.1"] + ["198.51.100.1"] * 3


@pytest.mark.parametrize("outside", ["203.0.113.1 198.51.100.1", "wan wan2"])
def test_an_uplink_that_swallows_everything_costs_a_second(
    rig2: web.Rig, outside: str
) -> None:
    """The line is up, but what is sent on it is answered by nobody."""
    rig2.natwork(f"outside={outside}")
    path = rig2.web.write("page", b"a page")
    rig2.box.link("outside", "wan", "arp", "off")
    url = f"http://far.example.com{path}"
    began = time.monotonic()
    assert rig2.curl(url) == "a page"
    first = time.monotonic() - began
    assert first < 4
    assert rig2.curl(url) == "a page"
    assert time.monotonic() - began - first < 1  # it goes last for a while
    callers = [entry["client"] for entry in rig2.web.entries(2)]
    assert callers == ["198.51.100.1"] * 2


# What an operator sees


def test_the_gateway_runs_as_nobody(rig: web.Rig) -> None:
    rig.natwork()
    wait.until(lambda: len(rig.box.pids("gateway")) == 1 + 8)
    for pid in rig.box.pids("gateway"):
        status = Path(f"/proc/{pid}/status").read_text()
        fields = dict(
            line.split(":\t", 1) for line in status.splitlines() if "\t" in line
        )
        assert "0" not in fields["Uid"].split(), (pid, fields["Uid"])
        assert "0" not in fields["Gid"].split(), (pid, fields["Gid"])
        assert "0" not in fields["Groups"].split(), (pid, fields["Groups"])
        assert int(fields["CapEff"], 16) == int(fields["CapPrm"], 16) == 0


def test_a_gateway_behind_another_nat_says_who_its_clients_are(rig: web.Rig) -> None:
    """All that such a gateway sees of the outside has an address of the inside."""
    for words in (
        "addr del 203.0.113.1/24 dev wan",
        "addr add 192.168.1.2/24 dev wan",
        "route add default via 192.168.1.1",
    ):
        boxes.ip("-n", rig.box.name("gateway"), *words.split())
    gateway = rig.natwork()
    words = "192.168.1.2, an inside address"
    wait.until(lambda: words in gateway.errors.read_text())


def open_tunnel(rig: web.Rig) -> socket.socket:
    """Return a client's end of a tunnel to nginx."""
    client = rig.box.connect("inside", LISTENER)
    client.sendall(
        b"CONNECT www.example.com:443 HTTP/1.1\r\nHost: www.example.com\r\n\r\n"
    )
    assert http_wire.read_head(client).startswith(b"HTTP/1.1 200 ")
    return client


def test_the_table_shows_an_open_tunnel(rig: web.Rig) -> None:
    """By a port of its own: another gateway of this machine may have rows too."""
    gateway = rig.natwork()

    def rows() -> list[list[str]]:
        done = rig.box.run("gateway", *running.PROGRAM, "--table")
        assert done.returncode == 0, done.stderr
        cells = [row.split() for row in done.stdout.splitlines()]
        return [row for row in cells if row[:2] == ["10.9.0.2", port]]

    with open_tunnel(rig) as client:
        port = str(client.getsockname()[1])
        [row] = rows()
        assert row[3:6] == ["203.0.113.80:443", "connect", "www.example.com"]
        done = rig.box.run("gateway", *running.PROGRAM, "--table", "--json")
        assert done.returncode == 0, done.stderr
        entries = [map(str, entry.values()) for entry in json.loads(done.stdout)]
        assert row[:6] in [list(entry)[:6] for entry in entries]
    [line] = gateway.lines(1)
    assert line["source"] == f"203.0.113.1:{row[2]}"
    wait.until(lambda: not rows())  # the client left, and its row with it


def test_ps_shows_who_serves_whom(rig: web.Rig) -> None:
    needs.programs("ps")
    if importlib.util.find_spec("setproctitle") is None:
        needs.unavailable("setproctitle is not installed")
    gateway = rig.natwork()
    master = str(gateway.process.pid)

    def titles() -> list[str]:
        words = ["ps", "-ww", "-o", "args=", "--pid", master, "--ppid", master]
        return rig.box.run("gateway", *words).stdout.splitlines()

    with open_tunnel(rig) as client:
        port = client.getsockname()[1]
        wait.until(lambda: "natwork: master 8 idle 1 busy" in titles())
        shown = titles()
    assert shown.count("natwork: idle") == 8, shown
    [busy] = [t for t in shown if t.startswith(f"natwork: 10.9.0.2:{port} > ")]
    _, source, target_and_more = busy.split(" > ")
    target, protocol, host = target_and_more.split(" ")
    assert source.startswith("203.0.113.1:") and target == "203.0.113.80:443"
    assert (protocol, host) == ("connect", "www.example.com")
    wait.until(lambda: not any(f":{port} " in title for title in titles()))


def test_the_gateway_uses_no_packet_forwarding_of_the_kernel(rig: web.Rig) -> None:
    rig.natwork()
    path = rig.web.write("page", b"a page")
    assert rig.curl(f"http://www.example.com{path}") == "a page"
    assert rig.box.get("gateway", "ipv4/ip_forward") == "0"
    assert rig.box.get("gateway", "ipv6/conf/all/forwarding") == "0"
    counters = rig.box.within("gateway", lambda: SNMP.read_text().splitlines())
    names, values = (line.split()[1:] for line in counters if line.startswith("Ip:"))
    assert dict(zip(names, values, strict=True))["ForwDatagrams"] == "0"


@pytest.mark.parametrize("outside", ["", "wan", "203.0.113.1"])
def test_a_link_local_neighbor_inside_is_a_client(rig: web.Rig, outside: str) -> None:
    rig.natwork(f"outside={outside}")
    path = rig.web.write("page", b"a page")
    # Each device has a route to them all; the one outside is to be the first.
    route = ("-6", "route", "replace", "fe80::/64", "dev", "wan", "metric", "1")
    boxes.ip("-n", rig.box.name("gateway"), *route)
    near = rig.box.link_local("gateway", "lan")
    assert rig.curl(
        f"http://www.example.com{path}", proxy=f"http://[{near}%25lan]:8080"
    )

    def ask() -> bytes:
        """Come from such an address to one that is not."""
        with socket.socket(socket.AF_INET6) as client:
            client.settimeout(10)
            device = socket.if_nametoindex("lan")
            client.bind((rig.box.link_local("inside", "lan"), 0, 0, device))
            client.connect(("fd00:9::1", 8080))
            client.sendall(b"GET http://10.1.2.3/ HTTP/1.1\r\nHost: 10.1.2.3\r\n\r\n")
            return client.recv(12)

    assert rig.box.within("inside", ask) == b"HTTP/1.1 403"


def test_the_anycast_address_of_a_network_is_our_own(rig: web.Rig) -> None:
    rig.box.set("gateway", "ipv6/conf/all/forwarding", "1")  # a router has them
    network = natwork.pack("2001:db8:9::")
    route = rig.box.within("gateway", lambda: natwork.route_to(network))
    assert route and route.local


def test_a_link_local_neighbor_outside_is_no_client(rig: web.Rig) -> None:
    rig.natwork()
    path = rig.web.write("page", b"a page")
    address = rig.box.link_local("gateway", "wan")
    proxy, url = f"http://[{address}%25wan]:8080", f"http://www.example.com{path}"
    words = "curl", "--silent", "--max-time", "5", "--proxy", proxy, url
    done = rig.box.run("outside", *words)
    assert done.returncode in (52, 56) and done.stdout == ""
