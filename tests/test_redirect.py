"""Clients that know of no gateway: nftables as the README has it, and their claims."""

from __future__ import annotations

import contextlib
import itertools
import re
import smtplib
import socket
import ssl
import time
from collections.abc import Callable
from collections.abc import Iterator
from pathlib import Path

import addresses
import boxes
import http_wire
import kernel
import needs
import origins
import pytest
import readme
import running
import wait
import web
import wire

import natwork
import natwork_redirect
import natwork_users

BANNER = b"220 mail.example.com ESMTP\r\n"

# --- What a client claims -----------------------------------------------------


def hello(name: str | None) -> bytes:
    """Return a TLS ClientHello, as the ssl module says it."""
    context = ssl.create_default_context()
    context.check_hostname = False
    into, out = ssl.MemoryBIO(), ssl.MemoryBIO()
    with contextlib.suppress(ssl.SSLWantReadError):
        context.wrap_bio(into, out, server_hostname=name).do_handshake()
    return out.read()


def in_records(whole: bytes, size: int) -> bytes:
    """Return a hello cut into records of some bytes each."""
    pieces = [whole[5 + at : 5 + at + size] for at in range(0, len(whole) - 5, size)]
    return b"".join(b"\x16\3\1" + len(p).to_bytes(2, "big") + p for p in pieces)


WHOLE = {  # first words -> the names in them
    "get": (b"GET / HTTP/1.1\r\nHost: a.example\r\n\r\n", [b"a.example"]),
    "port": (b"GET / HTTP/1.1\r\nHost: A.example.:8080\r\n\r\n", [b"A.example."]),
    "late": (b"GET / HTTP/1.1\r\nA: b\r\nhost:a.example\r\n\r\n", [b"a.example"]),
    "lf": (b"GET / HTTP/1.1\nHost: a.example\n\n", [b"a.example"]),
    "mixed": (b"GET / HTTP/1.1\r\nHost: a.example\n\r\n", [b"a.example"]),
    "blank": (b"GET / HTTP/1.1\r\nHost\t : a.example\r\n\r\n", [b"a.example"]),
    "folded": (b"GET / HTTP/1.1\r\nHost:\r\n a.example\r\n\r\n", [b"a.example"]),
    "spaces": (b"GET  /  HTTP/1.1\r\nHost: a.example\r\n\r\n", [b"a.example"]),
    "two": (b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n", [b"a", b"b"]),
    "absolute": (
        b"GET http://u@b:80/ HTTP/1.1\r\nHost: a\r\n\r\n",
        [b"a", b"u@b", b"b"],
    ),
    "a port that is none": (b"GET / HTTP/1.1\r\nHost: ads:x\r\n\r\n", [b"ads"]),
    "two ports": (b"GET / HTTP/1.1\r\nHost: ads:80:80\r\n\r\n", [b"ads"]),
    "a name behind the port": (
        b"GET / HTTP/1.1\r\nHost: ads:x@good\r\n\r\n",
        [b"ads", b"good"],
    ),
    "a bracket behind the port": (
        b"GET / HTTP/1.1\r\nHost: ads.example:]\r\n\r\n",
        [b"ads.example"],
    ),
    "an empty one first": (b"GET / HTTP/1.1\r\nHost:\r\nHost: b\r\n\r\n", [b"b"]),
    "an empty one": (b"GET / HTTP/1.1\r\nHost:\r\nUser-Agent: b\r\n\r\n", []),
    "brackets": (b"GET / HTTP/1.1\r\nHost: [::1]:80\r\n\r\n", [b"::1"]),
    "a blank first": (b" GET / HTTP/1.1\r\nHost: a\r\n\r\n", [b"a"]),
    "a control byte": (b"GET /\1 HTTP/1.1\r\nHost: a\r\n\r\n", [b"a"]),
    "a vertical tab": (b"GET\v/ HTTP/1.1\r\nHost: a\r\n\r\n", [b"a"]),
    "no method": (b"G[T / HTTP/1.1\r\nHost: a\r\n\r\n", [b"a"]),
    "cr": (b"GET / HTTP/1.1\r\nX: y\rHost: a\r\n\r\n", [b"a"]),
    "a digit first": (b"1GET / HTTP/1.1\r\nHost: a\r\n\r\n", [b"a"]),
    "none": (b"GET / HTTP/1.0\r\n\r\n", []),
    "empty": (b"GET / HTTP/1.1\r\nHost:\r\n\r\n", []),
    "tls": (hello("a.example"), [b"a.example"]),
    "records": (in_records(hello("a.example"), 7), [b"a.example"]),
    "nameless": (hello(None), []),
}
NEITHER = {
    "ssh": b"SSH-2.0-OpenSSH_9.2\r\n",
    "ehlo": b"EHLO me\r\n",
    "rtsp": b"OPTIONS rtsp://a/ RTSP/1.0\r\n",
    "a line": b"hello world\n",
    "old": b"GET /\r\n",
    "amqp": b"AMQP\0",
    "binary": b"\0\1\2",
    "hl7": b"\x0bMSH|^~\\&|A B|\rEVN|x\r\x1c\r",
    "modem": b"ATZ\r",
    "git": b"0032git-upload-pack /p\0host=a\0",
    "ldap": b"0\x0c\2\1",
    "high": b"\xff\xfb",
    "alert": b"\x16\3\1\0\1\2",
    "not hello": b"\x16\3\1\0\5\2aaaa",
    "torn hello": b"\x16\3\1\0\5\1\0\0\x50aGET",
}


@pytest.mark.parametrize("case", WHOLE)
def test_a_claim_is_found_whole_and_no_earlier(case: str) -> None:
    words, names = WHOLE[case]
    assert natwork_redirect.claimed_names(words) == names
    for cut in range(len(words)):
        early = natwork_redirect.claimed_names(words[:cut])
        assert early is None or early == names and words[cut:] in (b"\n", b"\r\n")
    assert natwork_redirect.claimed_names(words + b"more\r\n\r\n") == names


@pytest.mark.parametrize("case", NEITHER)
def test_what_claims_nothing_is_known_at_once(case: str) -> None:
    assert natwork_redirect.claimed_names(NEITHER[case]) == []


@pytest.mark.parametrize(
    "garbage",
    [
        hello("a.example")[:50] + b"\xff" * 2000,
        b"\x16\3\1\xff\xff\1\0\0\xff" + b"\xff" * 255,
        b"\x16\3\1\0\4\1\0\0\0",
        b"\x16\3\1\0\0" * 1000,
        b"GET" + b" " * 65536,
        b"GET / HTTP/1.1\r\n" + b"host" * 16384,
        b"GET / HTTP/1.1\r\nhost" + b" " * 65536 + b"\r\n\r\n",
        b"\r\n" * 32768,
    ],
)
def test_garbage_is_looked_at_quickly(garbage: bytes) -> None:
    began = time.monotonic()
    with contextlib.suppress(natwork.Refused):
        natwork_redirect.claimed_names(garbage)
    assert time.monotonic() - began < 0.5  # trap 9


def test_a_hello_in_too_many_records_is_refused() -> None:
    """Each byte more would have all of them looked at again."""
    whole = hello("a.example")
    assert natwork_redirect.claimed_names(in_records(whole, 7)) == [b"a.example"]
    with pytest.raises(natwork.Refused):
        natwork_redirect.claimed_names(in_records(whole, 1))


@pytest.mark.parametrize(("word", "target"), addresses.TARGETS)
def test_a_closed_address_is_refused_to_the_redirected_too(
    word: str, target: str
) -> None:
    rules = "allow to *; allow port 1-65535; allow to localhost; allow to .example"
    policy = natwork.Policy(natwork.Config(rules=rules))
    with contextlib.suppress(ValueError):  # a name is never dialed here
        packed = natwork.pack(target.strip("[]"))
        for claim in (natwork.unpack(packed), "localhost", "a.example"):
            verdict = policy.judge("10.0.0.7", "-", claim, 80, packed, "redirect")
            assert verdict[0].word == f"denied-{word}"


@pytest.mark.parametrize(
    ("rules", "port", "word"),
    [
        ("", 25, "ok"),
        ("allow to *", 25, "ok"),
        ("allow port 1-100", 25, "ok"),
        ("deny port 25", 25, "denied-rule-1"),
        ("deny to *", 80, "denied-rule-1"),
        ("allow to a.example; deny to *", 80, "denied-rule-2"),
    ],
)
def test_mail_is_open_and_a_name_opens_nothing(
    rules: str, port: int, word: str
) -> None:
    policy = natwork.Policy(natwork.Config(rules=rules))
    packed = natwork.pack("198.51.100.1")
    verdict = policy.judge("10.0.0.7", "-", "198.51.100.1", port, packed, "redirect")
    assert verdict[0].word == word


# --- In a box -----------------------------------------------------------------


class Rig:
    """A box whose gateway redirects, with nginx and whatever a test adds outside."""

    def __init__(self, box: boxes.Box, folder: Path) -> None:
        self.box, self.folder, self.started = box, folder, 0
        (folder / "web").mkdir()
        web.certificates(folder / "web")
        self.web = web.Nginx(box, folder / "web")
        self.web.write("index.html", b"hello from the outside")
        self.gateway: running.Gateway  # the one that the last test started

    def natwork(self, *options: str) -> running.Gateway:
        self.started += 1
        folder = self.folder / f"gateway{self.started}"
        folder.mkdir()
        self.gateway = self.box.natwork(folder, *options)
        return self.gateway

    def nft(self, text: str) -> None:
        """Put these nftables rules in force instead of those that are."""
        path = self.folder / "rules.nft"
        path.write_text("flush ruleset\n" + text)
        done = self.box.run("gateway", "nft", "-f", str(path))
        assert done.returncode == 0, done.stderr

    def curl(self, *words: str, place: str = "inside") -> str:
        """Run curl, which knows of no proxy; return what it prints."""
        ca = str(self.web.authority)
        names = "www.example.com:80:203.0.113.80", "www.example.com:443:203.0.113.80"
        always = ["-sS", "--max-time", "20", "--cacert", ca]
        always += [word for name in names for word in ("--resolve", name)]
        done = self.box.run(place, "curl", *always, *words)
        assert done.returncode == 0, (done.returncode, done.stderr, done.stdout)
        return done.stdout

    def server(
        self, handle: Callable[..., None], host: str, port: int = 0
    ) -> origins.Origin:
        """Start a server outside, at a port of its own choice or at this one."""
        return self.box.within("outside", lambda: origins.Origin(handle, host, port))

    def connect(self, host: str, port: int) -> socket.socket:
        """Return a client's connection to an address outside, as it thinks."""
        return self.box.connect("inside", (host, port))

    def line(self, number: int = 0) -> dict[str, str]:
        return self.gateway.lines(number + 1)[number]


def readme_lines() -> str:
    """Return the nftables lines of the README, exactly."""
    lines = r"^    nft -f - <<'END'\n(.*?)^    END$"
    match = re.search(lines, readme.TEXT, re.M | re.S)
    assert match
    return match[1]


@pytest.fixture(scope="module")
def whole_rig(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    needs.programs("nginx", "curl", "openssl", "nft")
    with boxes.dual_homed() as box:
        rig = Rig(box, tmp_path_factory.mktemp("redirect"))
        yield rig
        callers = {entry["client"] for entry in rig.web.entries()}
        assert callers <= boxes.OUTSIDE_ADDRESSES, callers


@pytest.fixture
def rig(whole_rig: Rig) -> Iterator[Rig]:
    whole_rig.nft(readme_lines())
    yield whole_rig
    if whole_rig.started:  # a test of the rules alone starts none
        whole_rig.gateway.stop()
    assert whole_rig.box.pids("gateway") == []


@pytest.mark.end_to_end
@pytest.mark.parametrize("host", ["203.0.113.1", "2001:db8:9::1"])
def test_connections_from_outside_stay_and_new_ones_are_dropped(
    whole_rig: Rig, host: str
) -> None:
    box, here = whole_rig.box, (host, 2222)
    whole_rig.nft("")  # and so nobody has looked at connections before
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = box.within("gateway", lambda: socket.create_server(here, family=family))
    with listener, box.connect("outside", here) as old:
        served = listener.accept()[0]
        with served:
            whole_rig.nft(readme_lines())
            old.settimeout(10)
            served.settimeout(10)
            old.sendall(b"the client speaks first")
            assert served.recv(100) == b"the client speaks first"
            served.sendall(b"and is answered")
            assert old.recv(100) == b"and is answered"
        with pytest.raises(TimeoutError):
            box.within("outside", lambda: socket.create_connection(here, 2))


FOUR, SIX = "203.0.113.80", "2001:db8:9::80"
both = pytest.mark.parametrize("host", [FOUR, SIX])


@pytest.mark.end_to_end
def test_curl_needs_no_setting(rig: Rig) -> None:
    rig.natwork()
    body = "hello from the outside"
    for number, (url, name, address) in enumerate(
        [
            ("http://www.example.com/", "www.example.com", f"{FOUR}:80"),
            ("https://www.example.com/", "www.example.com", f"{FOUR}:443"),
            (f"http://{FOUR}/", FOUR, f"{FOUR}:80"),
            (f"http://[{SIX}]/", f"[{SIX}]", f"[{SIX}]:80"),
        ]
    ):
        assert rig.curl(url) == body
        line = rig.line(number)
        port = address.rpartition(":")[2]
        assert line["proto"] == "redirect" and line["outcome"] == "closed"
        assert line["target"] == f"{name}:{port}" and line["address"] == address
        assert line["method"] == line["status"] == "-"
        assert rig.web.entries()[-1]["client"] == (
            "2001:db8:9::1" if name[0] == "[" else "203.0.113.1"
        )
        assert int(line["up"]) > 50 and int(line["down"]) > 200
    name = "six.example.com"
    at = "--resolve", f"{name}:443:[{SIX}]"
    assert rig.curl(*at, f"https://{name}/") == body
    assert rig.line(4)["target"] == f"{name}:443"


@pytest.mark.end_to_end
@both
def test_openssl_shakes_hands(rig: Rig, host: str) -> None:
    rig.natwork()
    at = f"[{host}]:443" if ":" in host else f"{host}:443"
    words = "-connect", at, "-servername", "www.example.com", "-verify_return_error"
    trust = "-CAfile", str(rig.web.authority)
    done = rig.box.run("inside", "openssl", "s_client", "-brief", *words, *trust)
    assert done.returncode == 0 and "Verification: OK" in done.stderr, done.stderr
    assert rig.line()["target"] == "www.example.com:443"
    # Without a name there is no claim, and the address is what was asked for.
    words = "-connect", at, "-noservername"
    done = rig.box.run("inside", "openssl", "s_client", "-brief", *words)
    assert done.returncode == 0 and rig.line(1)["target"] == at


def mail(connection: socket.socket, origin: origins.Origin) -> None:
    """Be an SMTP server, who speaks first."""
    connection.sendall(BANNER)
    with connection.makefile("rb") as lines:
        for line in lines:
            origin.received.append(line)
            connection.sendall(
                b"221 bye\r\n" if line[:4].upper() == b"QUIT" else b"250 well\r\n"
            )
            if line[:4].upper() == b"QUIT":
                return


@pytest.mark.end_to_end
@both
def test_a_server_that_speaks_first_is_heard_at_once(rig: Rig, host: str) -> None:
    # Though there is a rule that makes us wait for what a client claims.
    rig.natwork("rules=deny to .ads.example")
    server = rig.server(mail, host, 25)  # and port 25 is open here
    with rig.connect(host, 25) as client:
        began = time.monotonic()
        assert wire.read_exactly(client, len(BANNER)) == BANNER
        assert time.monotonic() - began < 0.2

    def talk() -> bytes:
        with smtplib.SMTP(host, 25, timeout=10) as client:
            return client.noop()[1]

    assert rig.box.within("inside", talk) == b"well"
    assert server.received[0].lower().startswith(b"noop")
    wait.until(lambda: len(rig.gateway.lines()) == 2)
    assert {line["outcome"] for line in rig.gateway.lines()} == {"closed"}
    where = f"[{host}]:25" if ":" in host else f"{host}:25"
    assert rig.line()["target"] == rig.line()["address"] == where


@pytest.mark.end_to_end
def test_who_asks_the_gateway_itself_is_served_as_ever(rig: Rig) -> None:
    gateway = rig.natwork()
    body = rig.curl("--proxy", web.PROXY, f"http://{FOUR}/")
    assert body == "hello from the outside" and rig.line()["proto"] == "http"
    proxy = ["--proxy", "http://[fd00:9::1]:8080", "--proxytunnel"]
    assert rig.curl(*proxy, f"http://{FOUR}/") == body
    assert gateway.lines(2)[1]["proto"] == "connect"


@pytest.mark.end_to_end
def test_the_outside_gets_no_connection(rig: Rig) -> None:
    rig.natwork()
    for address in ("203.0.113.1", "2001:db8:9::1"):
        with pytest.raises(TimeoutError):
            rig.box.connect("outside", (address, 8080), timeout=1)
    assert rig.gateway.lines() == []


@pytest.mark.end_to_end
def test_the_lines_may_be_loaded_again(rig: Rig) -> None:
    before = rig.box.run("gateway", "nft", "list", "ruleset").stdout
    assert before.count("table ") == 1 and before.count("iifname") == 3
    path = rig.folder / "again.nft"
    path.write_text(readme_lines())
    for _ in range(2):  # with no flush before it
        done = rig.box.run("gateway", "nft", "-f", str(path))
        assert done.returncode == 0, done.stderr
    assert rig.box.run("gateway", "nft", "list", "ruleset").stdout == before


@pytest.mark.end_to_end
def test_ssh_from_outside_is_kept_by_its_line(rig: Rig) -> None:
    at = ("203.0.113.1", 22)
    with rig.box.within("gateway", lambda: socket.create_server(at)):
        with pytest.raises(TimeoutError):
            rig.box.connect("outside", at, timeout=1)
        rig.nft(readme_lines().replace("# iifname", "iifname"))
        rig.box.connect("outside", at).close()
    rig.natwork()


@pytest.mark.end_to_end
@both
def test_quic_is_rejected_at_once(rig: Rig, host: str) -> None:
    rig.natwork()

    def knock() -> None:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        with socket.socket(family, socket.SOCK_DGRAM) as sock:
            sock.settimeout(5)
            sock.connect((host, 443))
            sock.send(b"initial")
            sock.recv(1)

    with pytest.raises(ConnectionRefusedError):
        rig.box.within("inside", knock)


@pytest.mark.end_to_end
def test_dnsmasq_is_the_resolver(rig: Rig) -> None:
    needs.programs("dnsmasq")
    match = re.search(r"`(dnsmasq [^`]+)`", readme.TEXT)
    assert match
    rig.natwork()
    keep = "--keep-in-foreground", "--no-resolv", "--pid-file="
    folder = Path("/etc/netns", rig.box.name("inside"))
    (folder / "nsswitch.conf").write_text("hosts: files dns\n")
    (folder / "resolv.conf").write_text("nameserver 10.9.0.1\noptions timeout:1\n")
    process = rig.box.start("gateway", *match[1].split(), *keep, folder=rig.folder)
    try:
        at = "http://www.example.net/"
        words = "curl", "-sS", "--retry", "9", "--retry-all-errors", "--max-time", "9"
        done = rig.box.run("inside", *words, at)
        assert done.stdout == "hello from the outside", done.stderr
        assert rig.line()["target"] == "www.example.net:80"
        assert rig.line()["address"] == "203.0.113.81:80"
    finally:
        rig.box.stop(process)
        (folder / "nsswitch.conf").write_text("hosts: files\n")
        (folder / "resolv.conf").unlink()


# Claims


def note(connection: socket.socket, origin: origins.Origin) -> None:
    """Keep what comes, and say so; like a web server, not of empty lines before it."""
    while data := connection.recv(65536):
        if not origin.received and not data.strip():
            continue
        origin.received.append(data)
        connection.sendall(b"got it")


@pytest.mark.end_to_end
def test_what_is_claimed_is_not_dialed(rig: Rig) -> None:
    rig.natwork()  # trap 14
    server = rig.server(note, FOUR)
    with rig.connect(FOUR, server.port) as client:
        client.sendall(b"GET / HTTP/1.1\r\nHost: 203.0.113.81:80\r\n\r\n")
        assert client.recv(64) == b"got it"
    line = rig.line()
    assert line["target"] == f"203.0.113.81:{server.port}"
    assert line["address"] == server.authority


CLAIMS = [
    b"GET / HTTP/1.1\r\nHost: www.ads.example\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: WWW.ads.example.:80\r\n\r\n",
    b"\r\n\nGET / HTTP/1.1\nHost: www.ads.example\n\n",
    b"GET / HTTP/1.1\r\nHost: fine\r\nHost: ads.example\r\n\r\n",
    b"GET http://ads.example/ HTTP/1.1\r\nHost: fine\r\n\r\n",
    hello("www.ads.example"),
    in_records(hello("ads.example"), 9),
]


@pytest.mark.end_to_end
@both
def test_a_denied_claim_ends_it_before_the_server_hears(rig: Rig, host: str) -> None:
    rig.natwork("rules=allow to a.example; deny to .ads.example")
    server = rig.server(note, host)
    ways = itertools.product(CLAIMS, (socket.socket.sendall, wire.drip))
    for number, (words, send) in enumerate(ways):
        with rig.connect(host, server.port) as client:
            send(client, words)
            with pytest.raises(ConnectionResetError):
                assert client.recv(1) == b"never"
        line = rig.line(number)
        assert line["outcome"] == "denied-rule-2", words
        assert "ads.example" in line["target"] and line["address"] == server.authority
        # Empty lines have no name in them, and went on.
        assert int(line["up"]) == len(words) - len(words.lstrip(b"\r\n"))
    wait.until(lambda: len(server.callers) == 2 * len(CLAIMS))
    assert b"".join(server.received).strip() == b""


@pytest.mark.end_to_end
def test_of_a_name_without_end_its_end_is_judged(rig: Rig) -> None:
    """A rule would otherwise look at each of its domains, and there are thousands."""
    gateway = rig.natwork("rules=deny to .ads.example")
    server = rig.server(note, FOUR)
    with rig.connect(FOUR, server.port) as client:
        client.sendall(
            b"GET / HTTP/1.1\r\nHost: %bads.example\r\n\r\n" % (b"a." * 20_000)
        )
        with pytest.raises(ConnectionResetError):
            assert client.recv(1) == b"never"
    line = rig.line()
    assert line["outcome"] == "denied-rule-1"
    assert line["target"].endswith(f".ads.example:{server.port}")
    peak = [kernel.number(pid, "VmHWM") for pid in gateway.workers()]
    assert max(peak) < 100_000  # KiB


@pytest.mark.end_to_end
def test_an_allowed_claim_opens_nothing(rig: Rig) -> None:
    rig.natwork("rules=allow to www.example.com; deny to *")
    # It may be refused as early as in connect().
    with contextlib.suppress(ConnectionError), rig.connect(FOUR, 80) as client:
        client.sendall(b"GET / HTTP/1.1\r\nHost: www.example.com\r\n\r\n")
        assert client.recv(1) == b""
    assert rig.line()["outcome"] == "denied-rule-2" and rig.line()["address"] == "-"


@pytest.mark.end_to_end
def test_a_rule_for_all_names_wants_none(rig: Rig) -> None:
    rig.natwork("rules=allow to 203.0.113.0/24; deny to *", "head_timeout=1")
    server = rig.server(note, FOUR)
    with rig.connect(FOUR, server.port) as client:
        client.sendall(b"JDWP-Handshake")
        assert client.recv(64) == b"got it"


@pytest.mark.end_to_end
def test_half_a_sentence_waits_only_where_a_rule_wants_the_rest(rig: Rig) -> None:
    server, half = rig.server(note, FOUR), b"GET / HTTP/1.1\r\nHost: a.exa"
    rig.natwork()
    with rig.connect(FOUR, server.port) as client:
        began = time.monotonic()
        client.sendall(half)
        assert client.recv(64) == b"got it" and server.received == [half]
        assert time.monotonic() - began < 2
    rig.line()
    rig.gateway.stop()
    gateway = rig.natwork("rules=deny to .ads.example", "head_timeout=1")
    with rig.connect(FOUR, server.port) as client:
        client.sendall(half)
        with pytest.raises(ConnectionResetError):
            client.recv(1)
    assert gateway.lines(1)[0]["outcome"] == "head-timeout"
    with rig.connect(FOUR, server.port) as client:  # the last words, though cut off
        client.sendall(b"PING")
        client.shutdown(socket.SHUT_WR)
        assert wire.read_all(client) == b"got it"
    with rig.connect(FOUR, server.port) as client:
        client.sendall(b"GET / HTTP/1.1\r\nHost: ads.example")
        client.shutdown(socket.SHUT_WR)
        with pytest.raises(ConnectionResetError):
            assert client.recv(1) == b"never"
    assert gateway.lines(3)[2]["outcome"] == "denied-rule-1"
    with rig.connect(FOUR, server.port) as client:  # a gopher's or finger's question
        client.sendall(b"\r\n")
        assert client.recv(64) == b"got it"
    gateway.lines(4)
    with rig.connect(FOUR, server.port) as client:
        client.sendall(b"G")
        wire.reset(client)
    assert gateway.lines(5)[4]["outcome"] == "client-gone"
    assert server.received[1:] == [b"PING", b"\r\n"]


# Loops, and what is not reached

LOOSE = """
table inet natwork {
    chain clients {
        type nat hook prerouting priority dstnat
        iifname "lan" meta l4proto tcp redirect to :8080
    }
}
"""
REFUSED = [
    ("10.77.0.5", 80, "denied-inside"),
    ("172.16.0.1", 80, "denied-inside"),
    ("192.168.255.255", 80, "denied-inside"),
    ("fd77::5", 80, "denied-inside"),
    ("2002:a01:203::", 80, "denied-inside"),
    ("64:ff9b::10.1.2.3", 80, "denied-inside"),
    ("64:ff9b::127.0.0.1", 80, "denied-loopback"),
    ("2002:7f00:1::", 80, "denied-loopback"),
    ("2002:a9fe:a9fe::", 80, "denied-link-local"),
    ("64:ff9b::10.9.0.1", 8080, "loop"),
    ("203.0.113.80", 1, "refused"),
]


@pytest.mark.end_to_end
def test_a_loop_or_closed_address_is_refused_without_a_byte(rig: Rig) -> None:
    rig.nft(LOOSE)
    rig.natwork("rules=allow to *")
    for number, (host, port, word) in enumerate(REFUSED):
        with contextlib.suppress(ConnectionError):
            with rig.connect(host, port) as client:
                assert client.recv(1) == b"", host
        line = rig.line(number)
        assert (line["proto"], line["outcome"]) == ("redirect", word), host
        dialed = f"{host}:{port}" if word == "refused" else "-"
        assert (line["address"], line["down"]) == (dialed, "0")


@pytest.mark.end_to_end
def test_each_port_of_each_address_of_ours_is_the_gateway_itself(rig: Rig) -> None:
    rig.nft(LOOSE)
    rig.natwork()
    for number, host in enumerate(("10.9.0.1", "203.0.113.1", "2001:db8:9::1")):
        with rig.connect(host, (3128, 80, 8080)[number]) as client:
            client.sendall(
                b"GET http://%b/ HTTP/1.1\r\nHost: a\r\n\r\n" % FOUR.encode()
            )
            assert http_wire.read_answer(client).status == 200
        assert rig.line(number)["proto"] == "http"


@pytest.mark.end_to_end
def test_the_gateway_does_not_serve_what_itself_sends(rig: Rig) -> None:
    # Were this redirected to itself, each worker would call the next.
    output = "type nat hook output priority -100; ip daddr 203.0.113.80 tcp dport 80 "
    rig.nft(f"table inet loop {{ chain out {{ {output} redirect to :8080; }}; }}")
    rig.natwork("inside=0.0.0.0/0", "spare_workers=2")
    with contextlib.suppress(ConnectionError):
        with rig.box.connect("gateway", (FOUR, 80)) as client:
            assert client.recv(1) == b""
    assert rig.line()["outcome"] == "loop" and len(rig.gateway.lines()) == 1


@pytest.mark.end_to_end
def test_a_client_who_is_silent_is_ended(rig: Rig) -> None:
    rig.natwork("tunnel_timeout=1")
    server = rig.server(note, FOUR)
    with rig.connect(FOUR, server.port) as client, pytest.raises(ConnectionResetError):
        client.recv(1)
    assert rig.line()["outcome"] == "idle-timeout"


@pytest.mark.end_to_end
def test_who_cannot_say_his_name_is_refused_where_there_are_users(rig: Rig) -> None:
    users = rig.folder / "users"
    users.write_bytes(natwork_users.user_line(b"alice", b"secret") + b"\n")
    users.chmod(0o600)
    rig.natwork(f"users={users}")
    before = len(rig.web.entries())
    with contextlib.suppress(ConnectionError), rig.connect(FOUR, 80) as client:
        assert wire.read_all(client) == b""
    assert rig.line()["outcome"] == "auth-required"
    assert len(rig.web.entries()) == before


@pytest.mark.end_to_end
def test_the_redirected_have_their_share_and_no_more(rig: Rig) -> None:
    rig.natwork("max_per_client=2")
    server = rig.server(mail, FOUR)
    with contextlib.ExitStack() as opened:
        for _ in range(2):
            client = opened.enter_context(rig.connect(FOUR, server.port))
            assert wire.read_exactly(client, len(BANNER)) == BANNER
        address = FOUR, server.port
        with contextlib.suppress(ConnectionError), rig.connect(*address) as third:
            assert wire.read_all(third) == b""
        assert rig.line()["outcome"] == "too-many"


@pytest.mark.end_to_end
def test_a_parent_takes_the_redirected_by_a_tunnel(rig: Rig) -> None:
    parent = rig.server(
        http_wire.Parent(b"HTTP/1.1 200 x\r\n\r\nhello"), "203.0.113.81"
    )
    rig.natwork(f"parents=http://{parent.authority}")
    with rig.connect(FOUR, 2525) as client:
        assert wire.read_exactly(client, 5) == b"hello"
        client.sendall(b"there")
        assert wire.read_exactly(client, 5) == b"there"
    assert rig.line()["address"] == parent.authority
    (head,) = parent.handle.heads
    assert head.startswith(b"CONNECT 203.0.113.80:2525 HTTP/1.1\r\n")
