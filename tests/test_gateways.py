"""FTP and Gopher by HTTP: real servers behind the gateway, real clients before it."""

from __future__ import annotations

import base64
import contextlib
import html
import os
import re
import socket
import subprocess
import threading
import time
import urllib.parse
from collections.abc import Callable
from collections.abc import Iterator
from pathlib import Path

import addresses
import http_wire
import needs
import origins
import pytest
import running
import wait
import wire

import natwork as heart
import natwork_gateways

gateway = running.shared()
closed = running.shared("rules=")

SECRET = "s3cret word"
HOSTILE = "<b>&\"'% ?#;\u00e4.txt"
BIG = os.urandom(3_000_000)

VSFTPD = """
listen=NO
background=NO
anonymous_enable=YES
anon_root={folder}/pub
no_anon_password=YES
local_enable=YES
write_enable=YES
local_umask=022
ftpd_banner=ready
xferlog_enable=NO
pasv_enable=YES
chroot_local_user=NO
secure_chroot_dir={folder}/empty
delay_failed_login=0
"""

# So that who has no right password is told at once, and not three seconds later.
PAM = """\
auth required pam_unix.so nodelay
account required pam_unix.so
"""

MENU = """\
iWelcome <b>here</b>\t-\thost\t70\r
0A text & more\t/text.txt\t{host}\t{port}\r
1Below\t/below\t{host}\t{port}\r
7Search\t/find?a=1&b%20\t{host}\t{port}\r
9Binary\t/b "quoted".bin\t{host}\t{port}\r
hElsewhere\tURL:http://www.example.com/?a&b\t{host}\t{port}\r
hTrap\tURL:javascript:alert(1)\t{host}\t{port}\r
8Terminal\t\tbbs.example\t23\r
.\r
"""


class Inetd:
    """What inetd does: a process for each connection, which is its standard input."""

    def __init__(self, *words: str, folder: Path) -> None:
        self.words, self.folder = words, folder

    def __call__(self, connection: socket.socket, origin: origins.Origin) -> None:
        connection.setblocking(True)
        with (self.folder / "stderr").open("a") as errors:
            subprocess.run(
                [*self.words],
                stdin=connection,
                stdout=connection,
                stderr=errors,
                check=False,
                timeout=60,
            )


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    """Return a folder that every user may look into, as pytest's are not."""
    with running.public_folder() as folder:
        yield folder


@pytest.fixture(scope="module")
def site(folder: Path) -> Path:
    """Fill the public folder, and Ann's."""
    for name in ("pub/dir/below", "empty", "ann"):
        (folder / name).mkdir(parents=True)
    (folder / "pub/hello.txt").write_bytes(b"hello, ftp\n")
    (folder / "pub/empty.bin").write_bytes(b"")
    (folder / "pub/big.bin").write_bytes(BIG)
    (folder / "pub/dir" / HOSTILE).write_bytes(b"hostile")
    (folder / "pub/dir/link").symlink_to("below")
    (folder / "pub/dir/below/deep.html").write_bytes(b"<p>deep")
    (folder / "ann/private.txt").write_bytes(b"for Ann")
    os.chown(folder / "ann", 12345, 12345)
    return folder


@pytest.fixture(scope="module")
def vsftpd(site: Path) -> Callable[[str], origins.Origin]:
    """Return a function that starts vsftpd on an address; it knows a user, Ann."""
    needs.programs("vsftpd", "unshare", "openssl")
    if os.geteuid() != 0:
        needs.unavailable("vsftpd's users need root")
    hashed = subprocess.run(
        ["openssl", "passwd", "-6", SECRET], capture_output=True, text=True, check=True
    ).stdout.strip()
    for name, line in {
        "passwd": f"ann:x:12345:12345::{site}/ann:/bin/sh\n",
        "shadow": f"ann:{hashed}:20000:0:99999:7:::\n",
    }.items():
        (site / name).write_text(Path("/etc", name).read_text() + line)
        (site / name).chmod(0o644 if name == "passwd" else 0o600)
    (site / "vsftpd.conf").write_text(VSFTPD.format(folder=site))
    (site / "vsftpd").write_text(PAM)
    # Its own files of /etc: the box's stay as they are.
    mounts = " && ".join(
        f"mount --bind {site / Path(n).name} /etc/{n}"
        for n in ("passwd", "shadow", "pam.d/vsftpd")
    )
    script = f"{mounts} && exec vsftpd {site}/vsftpd.conf"
    started: dict[str, origins.Origin] = {}

    def start(host: str = "127.0.0.3") -> origins.Origin:
        if host not in started:
            words = ("unshare", "--mount", "sh", "-c", script)
            started[host] = origins.Origin(Inetd(*words, folder=site), host)
        return started[host]

    return start


@pytest.fixture(scope="module")
def gophernicus(folder: Path) -> origins.Origin:
    """Start a Gopher server, with a menu, a text and a binary."""
    needs.programs("gophernicus")
    root = folder / "gopher"
    (root / "below").mkdir(parents=True)
    words: list[str] = []
    server = origins.Origin(
        lambda c, o: Inetd(*words, folder=folder)(c, o), "127.0.0.3"
    )
    place = ("-h", server.host, "-p", str(server.port))
    words += ["gophernicus", *place, "-r", str(root), "-nm", "-nr", "-ns"]
    (root / "text.txt").write_bytes(b"one line\n.hidden\nlast line\n")
    (root / "big.zip").write_bytes(BIG)
    (root / "below/other.txt").write_text("below\n")
    return server


def url(
    server: origins.Origin, path: str = "/", scheme: str = "ftp", login: str = ""
) -> bytes:
    return f"{scheme}://{login}{server.authority}{path}".encode()


def ask(
    gateway: running.Gateway,
    target: bytes,
    *fields: bytes,
    method: bytes = b"GET",
    body=b"",
) -> http_wire.Message:
    """Ask the gateway for a URL on a new connection."""
    with gateway.connect() as client:
        return http_wire.exchange(
            client, asking(target, *fields, method=method) + body, method
        )


def asking(
    target: bytes, *fields: bytes, method: bytes = b"GET", version: bytes = b"1.1"
) -> bytes:
    lines = [b"%b %b HTTP/%b" % (method, target, version), b"Host: anything", *fields]
    return b"\r\n".join(lines) + b"\r\n\r\n"


def passive(data: origins.Origin) -> bytes:
    """Return the reply to PASV that leads to a server of data."""
    return b"227 (127,0,0,3,%d,%d)" % divmod(data.port, 256)


def giving(data: bytes) -> Callable[[socket.socket, origins.Origin], None]:
    """Return what a server does that sends some bytes and closes."""
    return lambda connection, origin: connection.sendall(data)


def settled(gateway: running.Gateway) -> int:
    """Return the number of lines in the access log, once no more come of themselves."""
    return wait.at_rest(lambda: len(gateway.lines()), 0.1)


def line_of(gateway: running.Gateway, count: int) -> dict[str, str]:
    """Return the line of the access log that follows on count others."""
    return gateway.lines(count + 1)[count]


def run(*words: str, cwd: Path, **environment: str) -> str:
    """Run a client; return what it prints."""
    done = subprocess.run(
        [*words],
        cwd=cwd,
        capture_output=True,
        text=True,
        errors="replace",
        timeout=60,
        env={"PATH": os.environ["PATH"], "HOME": str(cwd), "LANG": "C.UTF-8"}
        | environment,
    )
    assert done.returncode == 0, (words, done.returncode, done.stderr, done.stdout)
    return done.stdout


# --- FTP: files ---------------------------------------------------------------


def test_a_file_is_streamed_and_the_connection_goes_on(gateway, vsftpd) -> None:
    server, count = vsftpd(), settled(gateway)
    with gateway.connect() as client:
        for path, body in (("/hello.txt", b"hello, ftp\n"), ("/big.bin", BIG)) * 2:
            answer = http_wire.exchange(client, asking(url(server, path)))
            assert (answer.status, answer.body) == (200, body)
            assert answer.values(b"Content-Length") == [b"%d" % len(body)]
            assert not answer.closes
    line = line_of(gateway, count)
    assert (line["proto"], line["method"], line["status"]) == ("ftp", "GET", "200")
    assert line["target"] == url(server, "/hello.txt").decode()
    assert line["outcome"] == "ok" and line["address"] == server.authority
    assert int(gateway.lines(count + 2)[count + 1]["down"]) > len(BIG)


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/hello.txt", b"text/plain"),
        ("/dir/below/deep.html", b"text/html"),
        ("/big.bin", b"application/octet-stream"),
        ("/empty.bin;type=i", b"application/octet-stream"),
        ("/hello.txt;type=a", b"text/plain"),
        ("/%68ello.txt", b"text/plain"),
    ],
)
def test_head_says_what_get_would(gateway, vsftpd, path: str, kind: bytes) -> None:
    target = url(vsftpd(), path)
    whole, head = ask(gateway, target), ask(gateway, target, method=b"HEAD")
    assert (whole.status, head.status) == (200, 200)
    assert whole.values(b"Content-Type") == head.values(b"Content-Type") == [kind]
    assert head.values(b"Content-Length") == [b"%d" % len(whole.body)]


def test_what_is_not_there_is_404(gateway, vsftpd) -> None:
    count = settled(gateway)
    for path in ("/nothing", "/nothing/", "/dir/nothing.txt"):
        answer = ask(gateway, url(vsftpd(), path))
        assert answer.status == 404 and b"550" in answer.body
        assert http_wire.proxy_error(answer) == b"http_request_error"
        assert not answer.closes
    assert ask(gateway, url(vsftpd(), "/nothing"), method=b"HEAD").status == 404
    assert line_of(gateway, count)["outcome"] == "not-found"


# --- FTP: directories ---------------------------------------------------------


def links(answer: http_wire.Message) -> dict[str, str]:
    """Return the links of a page, by what they are called."""
    found = re.findall(r'<a href="([^"]*)">(.*?)</a>', answer.body.decode())
    return {html.unescape(name): html.unescape(link) for link, name in found}


@pytest.mark.parametrize("path", ["/dir/", "/dir", "/dir/;type=d", "/dir;type=d"])
def test_a_directory_is_a_page_whose_links_lead_on(gateway, vsftpd, path: str) -> None:
    from urllib.parse import urljoin

    server = vsftpd()
    answer = ask(gateway, url(server, path))
    assert answer.status == 200
    assert answer.values(b"Content-Type") == [b"text/html; charset=utf-8"]
    assert b"<b>" not in answer.body and "\u00e4" in answer.body.decode()
    found = links(answer)
    named = "<b>&\"'% ?#;\u00e4.txt"
    assert set(found) == {"../", "below/", "link", named}
    base = f"http://{server.authority}{path}"  # urljoin() does not know every scheme

    def lead(name: str) -> http_wire.Message:
        on = urljoin(base, found[name]).replace("http:", "ftp:", 1)
        return ask(gateway, on.encode())

    assert lead(named).body == b"hostile"
    assert "deep.html" in links(lead("below/"))
    assert "deep.html" in links(lead("link"))
    assert "hello.txt" in links(lead("../"))


def test_the_root_is_a_page_and_head_of_it_too(gateway, vsftpd) -> None:
    for path in ("/", ""):
        assert set(links(ask(gateway, url(vsftpd(), path)))) == {
            "dir/",
            "hello.txt",
            "empty.bin",
            "big.bin",
        }
    head = ask(gateway, url(vsftpd()), method=b"HEAD")
    assert head.status == 200 and int(head.values(b"Content-Length")[0]) > 300


# --- FTP: who asks ------------------------------------------------------------


def basic(user: str, password: str) -> bytes:
    return b"Authorization: Basic " + base64.b64encode(f"{user}:{password}".encode())


def test_a_user_logs_in_by_url_or_by_field(gateway, vsftpd) -> None:
    count = settled(gateway)
    server, word = vsftpd(), SECRET.replace(" ", "%20")
    for target, *fields in (
        [url(server, "/private.txt", login=f"ann:{word}@")],
        [url(server, "/private.txt"), basic("ann", SECRET)],
        [url(server, "/private.txt", login="ann:wrong@"), basic("ann", SECRET)],
    ):
        answer = ask(gateway, target, *fields)
        assert (answer.status, answer.body) == (200, b"for Ann")
    for line in gateway.lines(count + 3)[count:]:
        assert line["target"] == url(server, "/private.txt").decode()
        assert line["user"] == "-"


def test_a_login_refused_is_401_and_nobody_is_told_the_password(
    gateway, vsftpd, site: Path
) -> None:
    server = vsftpd()
    for login, method in (
        ("ann:wrongword@", b"GET"),
        ("ann@", b"HEAD"),
        ("nobodyhere:wrongword@", b"PUT"),
    ):
        target = url(server, "/private.txt", login=login)
        fields = [b"Content-Length: 3"] if method == b"PUT" else []
        answer = ask(gateway, target, *fields, method=method)
        assert answer.status == 401
        (challenge,) = answer.values(b"WWW-Authenticate")
        realm = b'Basic realm="ftp://%b", charset="UTF-8"' % server.authority.encode()
        assert challenge == realm
        assert b"wrongword" not in answer.body and b"ann" not in answer.body
        assert answer.closes == (method == b"PUT")
    text = gateway.log.read_text() + gateway.errors.read_text()
    assert not re.search(r"wrongword|\bann\b", text) and SECRET not in text


def test_the_title_has_no_user_in_it(gateway, origin: origins.Start) -> None:
    pytest.importorskip("setproctitle")
    asked, seen = threading.Event(), threading.Event()

    def silent(connection: socket.socket, origin: origins.Origin) -> None:
        connection.sendall(b"220 hello\r\n")
        connection.recv(64)
        asked.set()
        seen.wait(10)

    server = origin(silent, "127.0.0.3")
    with gateway.connect() as client:
        client.sendall(asking(url(server, "/a/b", login="ann:word@")))
        assert asked.wait(10)
        pid = gateway.worker_of(client)
        title = Path(f"/proc/{pid}/cmdline").read_text()
        assert " ftp 127.0.0.3" in title
        assert "ann" not in title and "word" not in title and "/a" not in title
        seen.set()


# --- FTP: uploads -------------------------------------------------------------


@pytest.mark.parametrize("framing", ["sized", "chunked", "empty"])
def test_an_upload_is_stored(gateway, vsftpd, site: Path, framing: str) -> None:
    target = url(vsftpd(), f"/{framing}.up", login=f"ann:{SECRET.replace(' ', '%20')}@")
    body = b"" if framing == "empty" else BIG
    with gateway.connect() as client:
        for status in (201, 200):  # the second takes the place of the first
            if framing == "chunked":
                field, sent = (
                    b"Transfer-Encoding: chunked",
                    http_wire.chunks(body[:9], body[9:]),
                )
            else:
                field, sent = b"Content-Length: %d" % len(body), body
            answer = http_wire.exchange(
                client, asking(target, field, method=b"PUT") + sent
            )
            assert answer.status == status and not answer.closes
            assert (site / "ann" / f"{framing}.up").read_bytes() == body
    assert int(gateway.lines()[-1]["up"]) >= len(body)


def test_an_upload_that_is_announced_is_let_in(gateway, vsftpd, site: Path) -> None:
    target = url(vsftpd(), "/announced", login=f"ann:{SECRET.replace(' ', '%20')}@")
    fields = b"Content-Length: 5", b"Expect: 100-continue"
    with gateway.connect() as client:
        client.sendall(asking(target, *fields, method=b"PUT"))
        assert http_wire.read_answer(client).status == 100
        assert http_wire.exchange(client, b"hello").status == 201
    assert (site / "ann/announced").read_bytes() == b"hello"


def test_an_upload_refused_says_so(gateway, vsftpd) -> None:
    count = settled(gateway)
    for path, status in (("/x.up", 403), ("/", 400), ("/dir/", 400)):
        target = url(vsftpd(), path)
        field = b"Content-Length: 5"
        answer = ask(gateway, target, field, method=b"PUT", body=b"hello")
        assert answer.status == status and answer.closes
    outcomes = {line["outcome"] for line in gateway.lines(count + 3)[count:]}
    assert outcomes - {"not-stored", "bad-response"} == {"bad-request"}
    assert len(outcomes) == 2


def test_a_half_sent_upload_is_not_called_stored(gateway, vsftpd, site: Path) -> None:
    count = settled(gateway)
    target = url(vsftpd(), "/half", login=f"ann:{SECRET.replace(' ', '%20')}@")
    with gateway.connect() as client:
        client.sendall(asking(target, b"Content-Length: 100", method=b"PUT") + b"abc")
        wait.until(lambda: (site / "ann/half").exists())
    assert line_of(gateway, count)["outcome"] == "client-gone"


# --- FTP: what may be asked ---------------------------------------------------


@pytest.mark.parametrize(
    ("target", "method", "status"),
    [
        (b"ftp://%b/a%%0d%%0aDELE%%20b", b"GET", 400),
        (b"ftp://%b/a%%0Ab", b"PUT", 400),
        (b"ftp://%b/a%%00b", b"HEAD", 400),
        (b"ftp://us%%0aer:x@%b/", b"GET", 400),
        (b"ftp://user:x%%0d@%b/", b"GET", 400),
        (b"ftp://user:x%%00@%b/", b"GET", 400),
        (b"ftp://%b:0/", b"GET", 400),
        (b"gopher://user@%b/", b"GET", 400),
        (b"gopher://%b/0a%%0d%%0ab", b"GET", 400),
        (b"gopher://%b/0a%%00b", b"GET", 400),
        (b"gopher://%b/7a?b%%0d", b"GET", 400),
        (b"gopher://%b/7a%%09b%%09c", b"GET", 400),
        (b"gopher://%b/%%0a", b"GET", 400),
        (b"ftp://%b/", b"DELETE", 501),
        (b"ftp://%b/", b"POST", 501),
        (b"gopher://%b/", b"PUT", 501),
        (b"ftps://%b/", b"GET", 501),
    ],
)
def test_what_is_wrong_is_refused_before_anybody_is_dialed(
    gateway, origin: origins.Start, target: bytes, method: bytes, status: int
) -> None:
    server = origin(http_wire.Script(), "127.0.0.3")
    answer = ask(gateway, target % server.authority.encode(), method=method)
    assert answer.status == status
    assert http_wire.uncalled(server)


def test_a_control_byte_in_the_field_is_refused(gateway, vsftpd) -> None:
    assert ask(gateway, url(vsftpd()), basic("a\r\nDELE b", "c")).status == 400


class Ftpd:
    """An FTP server's part, whose replies are data: 200 to what has none.

    What it greets with is the reply to nothing.  If it drips, each byte comes alone.
    """

    def __init__(self, drips: bool = False, **replies: bytes) -> None:
        self.say = wire.drip if drips else wire.send
        self.replies = {"": b"220 hello"} | replies

    def __call__(self, connection: socket.socket, origin: origins.Origin) -> None:
        self.say(connection, self.replies[""] + b"\r\n")
        with connection.makefile("rb") as lines:
            for line in lines:
                origin.received.append(line)
                reply = self.replies.get(line.split()[0].decode(), b"200 well")
                self.say(connection, reply + b"\r\n")


def test_the_data_come_from_the_host_that_was_asked(
    gateway, origin: origins.Start
) -> None:
    data = origin(giving(b"from the right host"), "127.0.0.3")
    trap = origin(giving(b"from the right host"), "127.0.0.4")
    comma = b"127,0,0,4,%d,%d" % divmod(data.port, 256)
    server = origin(
        Ftpd(
            PASV=b"227 here (%b)" % comma, RETR=b"150 now\r\n226 done", SIZE=b"500 no"
        ),
        "127.0.0.3",
    )
    answer = ask(gateway, url(server, "/file"))
    assert answer.body == b"from the right host" and answer.closes
    assert not trap.callers and data.callers


@pytest.mark.parametrize(
    "passive",
    [
        b"227 here (127,0,0,3,0,0)",
        b"227 here (127,0,0,3,999,1)",
        b"227 nowhere",
        b"999",
        b"\xff\xfe",
        b"x" * 10_000,
        b"227-and so on\r\n" * 9_999,
    ],
)
def test_nonsense_from_a_server_is_502(
    gateway, origin: origins.Start, passive: bytes
) -> None:
    server = origin(Ftpd(PASV=passive, SIZE=b"213 5"), "127.0.0.3")
    assert ask(gateway, url(server, "/file")).status == 502


def test_the_data_port_is_judged_too(
    natwork: running.Start, origin: origins.Start
) -> None:
    data = origin(giving(b"data"), "127.0.0.3")
    server = origin(
        Ftpd(PASV=passive(data), RETR=b"150\r\n226", SIZE=b"213 4"), "127.0.0.3"
    )
    for port, status in ((f"{server.port}", 403), (f"{server.port},{data.port}", 200)):
        rule = f"rules=allow to 127.0.0.0/8 port {port}; deny to *"
        gateway = natwork(rule, loopback=False)
        assert ask(gateway, url(server, "/file")).status == status
    assert len(data.callers) == 1


def test_a_transfer_that_fails_is_cut_and_not_ended(
    gateway, origin: origins.Start
) -> None:
    data = origin(giving(b"half of it"), "127.0.0.3")
    for size, complete in ((b"500 no", False), (b"213 100", False)):
        server = origin(
            Ftpd(PASV=passive(data), RETR=b"150\r\n426 disk on fire", SIZE=size),
            "127.0.0.3",
        )
        answer = ask(gateway, url(server, "/file"))
        assert (answer.status, answer.complete) == (200, complete)


def test_no_step_waits_for_ever(natwork: running.Start, origin: origins.Start) -> None:
    def give(connection: socket.socket, origin: origins.Origin) -> None:
        connection.recv(1)

    data = origin(give, "127.0.0.3")
    replies = {b"PASV": passive(data), b"RETR": b"150", b"SIZE": b"213 5"}

    def silent_at(step: bytes) -> Callable[..., None]:
        def handle(connection: socket.socket, origin: origins.Origin) -> None:
            if step != b"hello":
                connection.sendall(b"220 hello\r\n")
            with connection.makefile("rb") as lines:
                for line in lines:
                    word = line.split()[0]
                    if word != step:
                        connection.sendall(replies.get(word, b"200") + b"\r\n")

        return handle

    gateway = natwork("idle_timeout=0.5")
    steps = b"hello USER PASV RETR data".split()
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(gateway.connect()) for _ in steps]
        began = time.monotonic()
        for step, client in zip(steps, clients):  # all of them wait at the same time
            target = url(origin(silent_at(step), "127.0.0.3"), "/file")
            client.sendall(asking(target))
        for step, client in zip(steps, clients):
            answer = http_wire.read_answer(client)
            assert answer.status == 504 or step == b"data" and not answer.complete
        assert time.monotonic() - began < 5


def test_a_slow_directory_leaves_its_server_time_to_end(
    natwork: running.Start, origin: origins.Start
) -> None:
    listed = threading.Event()

    def give(connection: socket.socket, origin: origins.Origin) -> None:
        for _ in range(3):  # each in time, and all together not
            connection.sendall(b"-rw-r--r-- 1 0 0 12 Nov 21 13:00 a\r\n")
            time.sleep(0.4)
        listed.set()

    data = origin(give, "127.0.0.3")

    def handle(connection: socket.socket, origin: origins.Origin) -> None:
        connection.sendall(b"220 hello\r\n")
        with connection.makefile("rb") as lines:
            for line in lines:
                replies = {b"PASV": passive(data), b"LIST": b"150 now"}
                word = line.split()[0]
                connection.sendall(replies.get(word, b"200 well") + b"\r\n")
                if word == b"LIST" and listed.wait(10):
                    time.sleep(0.3)
                    connection.sendall(b"226 done\r\n")

    gateway = natwork("idle_timeout=1")
    answer = ask(gateway, url(origin(handle, "127.0.0.3")))
    assert answer.status == 200 and answer.body.count(b">a</a>") == 3


@pytest.mark.parametrize("reply", [b"450 busy", b"550 none", b"213 what", b"999 hm"])
def test_an_upload_goes_on_whatever_is_said_of_the_size(
    gateway, origin: origins.Start, reply: bytes
) -> None:
    def take(connection: socket.socket, origin: origins.Origin) -> None:
        origin.received.append(wire.read_all(connection))

    data = origin(take, "127.0.0.3")
    replies = {b"PASV": passive(data), b"STOR": b"150", b"SIZE": reply}

    def handle(connection: socket.socket, origin: origins.Origin) -> None:
        connection.sendall(b"220 hello\r\n")
        with connection.makefile("rb") as lines:
            for line in lines:
                word = line.split()[0]
                connection.sendall(replies.get(word, b"200 well") + b"\r\n")
                if word == b"STOR":
                    wait.until(lambda: data.received)
                    connection.sendall(b"226 done\r\n")

    target = url(origin(handle, "127.0.0.3"), "/file")
    with gateway.connect() as client:
        sent = asking(target, b"Content-Length: 5", method=b"PUT") + b"hello"
        assert http_wire.exchange(client, sent).status == 201
    assert data.received == [b"hello"]


def test_a_server_that_drips_for_ever_is_left(
    natwork: running.Start, origin: origins.Start
) -> None:
    def handle(connection: socket.socket, origin: origins.Origin) -> None:
        wire.drip(connection, b"220-hello\r\n")
        while True:
            connection.sendall(b"220-and\r\n")
            time.sleep(0.05)

    gateway = natwork("idle_timeout=1")
    began = time.monotonic()
    assert ask(gateway, url(origin(handle, "127.0.0.3"))).status == 504
    assert time.monotonic() - began < 5


def test_a_client_who_leaves_ends_it(
    natwork: running.Start, origin: origins.Start
) -> None:
    gateway, said = natwork(), threading.Event()

    def handle(connection: socket.socket, origin: origins.Origin) -> None:
        said.set()
        assert not connection.recv(1)

    server = origin(handle, "127.0.0.3")
    client = gateway.connect()
    client.sendall(asking(url(server)))
    assert said.wait(10)
    wire.reset(client)
    assert line_of(gateway, 0)["outcome"] == "client-gone"


@needs.ipv6
def test_an_ipv6_server_is_asked_by_epsv(gateway, vsftpd) -> None:
    answer = ask(gateway, url(vsftpd("::1"), "/hello.txt"))
    assert (answer.status, answer.body) == (200, b"hello, ftp\n")
    assert "hello.txt" in links(ask(gateway, url(vsftpd("::1"))))


def test_a_request_with_a_body_that_is_not_read_closes(gateway, vsftpd) -> None:
    with gateway.connect() as client:
        data = asking(url(vsftpd(), "/hello.txt"), b"Content-Length: 40")
        smuggled = b"GET http://smuggled.invalid/ HTTP/1.1\r\n\r\n"
        answer = http_wire.exchange(client, data + smuggled)
        assert answer.status == 200 and answer.closes
        assert wire.at_end(client)


# --- FTP: servers of every kind, R89 ------------------------------------------

WHOLE_AND_BY_BYTES = pytest.mark.parametrize("drips", [False, True])
REFUSALS = [b"%d no" % n for n in (425, 426, 450, 451, 452, 500, 501, 502, 503, 504)]
REFUSALS += [b"%d no" % n for n in (530, 532, 534, 550, 552, 553, 599)]
REFUSALS += [b"500-no\r\n 500 nor\r\n500\r\n550 this\r\n500 no", b"500"]
# Of a directory, and not of the connection or of who asks.
NOT_LISTED = [reply for reply in REFUSALS if reply[:2] not in (b"42", b"53")]


def scripted(
    origin: origins.Start, data: bytes, drips: bool = False, **replies: bytes
) -> origins.Origin:
    """Start an FTP server that gives such data, and replies as usual to all others."""
    place = origin(giving(data), "127.0.0.3")
    usual = {"PASV": passive(place), "EPSV": b"229 (|||%d|)" % place.port}
    usual |= {"USER": b"331 and?", "PASS": b"230 in", "SIZE": b"213 %d" % len(data)}
    usual |= dict.fromkeys(("RETR", "LIST"), b"150 now\r\n226 done")
    return origin(Ftpd(drips, **usual | replies), "127.0.0.3")


def commands(server: origins.Origin) -> list[str]:
    return [line.split()[0].decode() for line in server.received]


@WHOLE_AND_BY_BYTES
@pytest.mark.parametrize(
    "reply", [*REFUSALS, b"421 no", b"202 well", b"213 what", b"213", b"999 hm"]
)
def test_an_optional_command_that_fails_fails_no_transfer(
    gateway, origin: origins.Start, reply: bytes, drips: bool
) -> None:
    for command in ("SIZE", "EPSV"):
        server = scripted(origin, b"the file", drips, **{command: reply})
        answer = ask(gateway, url(server, "/file"))
        assert (answer.status, answer.body) == (200, b"the file") and answer.complete
        assert bool(answer.values(b"Content-Length")) == (command == "EPSV")
        assert commands(server).count("PASV") == (command == "EPSV")
    # What is not asked cannot fail.
    assert not {"MDTM", "FEAT"} & set(commands(server))


@WHOLE_AND_BY_BYTES
@pytest.mark.parametrize("reply", REFUSALS)
@pytest.mark.parametrize("refused", ["PASV", "EPSV"])
def test_either_passive_mode_will_do(
    gateway, origin: origins.Start, refused: str, reply: bytes, drips: bool
) -> None:
    server = scripted(origin, b"-rw-r--r-- 1 a b 3 Jan 1 10:00 c\r\n", drips)
    server.handle.replies[refused] = reply
    assert links(ask(gateway, url(server))) == {"c": "c"}
    server.handle.replies |= dict.fromkeys(("PASV", "EPSV"), reply)
    answer = ask(gateway, url(server))
    assert answer.status == 502 and b"no passive mode: " + reply[:3] in answer.body


@pytest.mark.parametrize("refused", ["PASV", "EPSV"])
def test_either_passive_mode_will_do_behind_a_parent_too(
    natwork: running.Start, origin: origins.Start, refused: str
) -> None:
    server = scripted(origin, b"data", **{refused: b"425 not by this one"})
    parent = natwork()
    gateway = natwork("parents=socks5://%s:%d" % parent.address)
    assert ask(gateway, url(server, "/file")).body == b"data"
    assert ask(parent, url(server, "/file")).status == 200


@pytest.mark.parametrize(
    ("reply", "status"),
    [
        (b"229 here (|1|127.0.0.4|PORT|)", 502),
        (b"229 here (||127.0.0.4|PORT|)", 502),
        (b"229 here 127.0.0.4 (|||PORT|)", 200),
        (b"227 here (127,0,0,4,HIGH,LOW)", 200),
        (b"227-(127,0,0,4,HIGH,LOW)\r\n227 here", 200),
        (b"227 here (127,0,0,3,0,0)", 502),
        (b"229 here (|||0|)", 502),
        (b"229 here (|||65536|)", 502),
        (b"229 here (|||-1|)", 502),
    ],
)
def test_no_other_host_is_dialed_for_data(
    gateway, origin: origins.Start, reply: bytes, status: int
) -> None:
    data = origin(giving(b"right"), "127.0.0.3")
    high, low = divmod(data.port, 256)
    for word, number in ((b"PORT", data.port), (b"HIGH", high), (b"LOW", low)):
        reply = reply.replace(word, b"%d" % number)
    # Each answers both commands so; one of them can make something of it.
    modes = dict.fromkeys(("PASV", "EPSV"), reply)
    server = scripted(origin, b"", **modes, SIZE=b"500 no")
    trap = origins.Origin(giving(b"trap"), "127.0.0.4", data.port)
    with contextlib.closing(trap):
        answer = ask(gateway, url(server, "/file"))
        assert answer.status == status and (answer.body == b"right") == (status == 200)
        assert not trap.callers


@WHOLE_AND_BY_BYTES
@pytest.mark.parametrize(
    ("reply", "rest"),
    [
        (b"220 ready\r\n", b""),
        (b"220 ready\n", b"331 who\r\n"),
        (b"220 \r\n", b"220 again\r\n"),
        (b"220\r\n", b"230 no blank, and no text\r\n"),
        (b"220-\r\n220 \r\n", b"220 again\r\n"),
        (b"220-one\r\ntwo\r\n220 three\r\n", b"220 four\r\n"),
        (b"220-one\r\n220-two\r\n220-three\r\n220 four\r\n", b""),
        (b"220-one\r\n220\r\n220\ttwo\r\n2200 three\r\n220two\r\n220 four\r\n", b""),
        (b"220-one\r\n 220 two\r\n\r\n221 three\r\n530 no\r\n220 four\r\n", b"221 x"),
        (b"220-one\r\n22\r\n2\r\n\n-220 two\r\n\xff220 three\r\n220 four\r\n", b""),
        (b"999-one\r\n220 two\r\n999 three\r\n", b"220 four\r\n"),
        (b"220-" + b"one\r\n" * 9999 + b"220 two\r\n", b"x"),
        (None, b"ready\r\n"),
        (None, b"\r\n220 ready\r\n"),
        (None, b"22 ready\r\n"),
        (None, b"2200 ready\r\n"),
        (None, b"220ready\r\n"),
        (None, b"\xb2\xb2\xb0 ready\r\n"),
        (None, b" 220 ready\r\n"),
        (None, b"220-" + b"one\r\n" * 99_999),
        (None, b"220-" + b"\n" * 99_999),
        (None, b"220 " + b"x" * 99_999),
    ],
)
def test_a_reply_ends_at_its_code_and_a_blank_and_nowhere_else(
    reply: bytes | None, rest: bytes, drips: bool
) -> None:
    sent = (reply or b"") + rest
    size = 1 if drips else 50_000  # what a socket pair takes at once
    pieces = [sent[n : n + size] for n in range(0, len(sent), size)][::-1]
    ours, theirs = socket.socketpair()
    with ours, theirs:
        server = heart.Stream(ours, heart.SERVER_GONE)
        steps = natwork_gateways.read_reply(server)
        try:
            while next(steps):
                theirs.send(pieces.pop())
        except StopIteration as end:
            assert reply and end.value == reply.decode("latin-1")
            assert bytes(server.received) + b"".join(pieces[::-1]) == rest
        except heart.Refused as refused:
            assert reply is None and refused.outcome is heart.BAD_RESPONSE


@WHOLE_AND_BY_BYTES
@pytest.mark.parametrize(
    "form",
    [
        b"N-many\r\nN last",
        b"N-\r\nN ",
        b"N-one\r\nN\r\nNtwo\r\nN-three\r\nN\tfour\r\n N five\r\n530 no\r\nN last",
        b"N-one\r\n\r\n231 in\r\n151 now\r\nN0 more\r\n226\r\n550 no\r\nN last",
    ],
)
def test_a_reply_of_many_lines_is_one_reply(
    gateway, origin: origins.Start, form: bytes, drips: bool
) -> None:
    codes = {"": b"220", "USER": b"331", "PASS": b"230", "TYPE": b"200", "SIZE": b"500"}
    codes |= {"EPSV": b"500", "CWD": b"250"}
    replies = {word: form.replace(b"N", code) for word, code in codes.items()}
    done = b"\r\n".join(form.replace(b"N", code) for code in (b"150", b"226"))
    replies |= {"RETR": done, "LIST": done}
    server = scripted(origin, b"a file", drips, **replies)
    answer = ask(gateway, url(server, "/file"))
    assert (answer.status, answer.body) == (200, b"a file") and answer.complete
    assert commands(server) == "USER PASS TYPE SIZE EPSV PASV RETR".split()
    assert ask(gateway, url(server, "/folder/")).status == 200


@WHOLE_AND_BY_BYTES
@pytest.mark.parametrize("word", ["USER", "PASS"])
@pytest.mark.parametrize(
    ("reply", "status"),
    [
        *((reply, 401) for reply in REFUSALS),
        (b"400 not you", 401),
        (b"420 not you", 401),
        (b"422 not you", 401),
        (b"430 not you", 401),
        (b"431 not you", 401),
        (b"521 not you", 401),
        (b"530-not you\r\n421 not me\r\n530 not you", 401),
        (b"530 no \xc3\x85sa", 401),  # 0x85 is a line end, too, of Latin-1
        (b"421 not now", 502),
        (b"421-not now\r\n530 not you\r\n421 not now", 502),
        (b"121 what?", 502),
        (b"621 what?", 502),
    ],
)
def test_what_a_server_says_of_a_login_is_told_to_its_client(
    gateway, origin: origins.Start, word: str, reply: bytes, status: int, drips: bool
) -> None:
    server = scripted(origin, b"", drips, **{word: reply})
    answer = ask(gateway, url(server, "/file"))
    told = b"the server said " + reply.splitlines()[0].replace(b"\xc3\x85", b"??")
    assert answer.status == status and told in answer.body


@WHOLE_AND_BY_BYTES
@pytest.mark.parametrize(
    "reply",
    [
        b"150 now\r\n226 none",
        *(before + reply for before in (b"", b"150\r\n") for reply in NOT_LISTED),
    ],
)
def test_a_directory_that_is_not_listed_is_empty(
    gateway, origin: origins.Start, reply: bytes, drips: bool
) -> None:
    server = scripted(origin, b"", drips, LIST=reply)
    for path, link in (("/a/b/", "../"), ("/a/b;type=d", "b/../")):
        answer = ask(gateway, url(server, path))
        assert answer.status == 200 and links(answer) == {"../": link}
        assert not answer.closes and answer.complete
    # As /a/b is a directory if it is not a file.
    server.handle.replies |= {"RETR": b"550 not plain", "SIZE": b"550 not plain"}
    answer = ask(gateway, url(server, "/a/b"))
    assert answer.status == 200 and links(answer) == {"../": "b/../"}


@WHOLE_AND_BY_BYTES
@pytest.mark.parametrize(
    ("path", "data", "replies", "status"),
    [
        ("/a/", b"", {"CWD": b"550 none", "LIST": b"450 none"}, 404),
        ("/a/", b"", {"CWD": b"450 none", "LIST": b"450 none"}, 502),
        ("/a/", b"", {"LIST": b"421 not now"}, 502),  # the server leaves
        ("/a/", b"", {"LIST": b"150 now\r\n421 not now"}, 502),
        ("/a/", b"", {"LIST": b"150 now\r\n425 cannot reach you"}, 502),
        ("/a/", b"", {"LIST": b"150 now\r\n426 disk on fire"}, 502),
        ("/a/", b"", {"LIST": b"425 cannot reach you"}, 502),
        ("/a/", b"", {"LIST": b"530 not you"}, 502),
        ("/a/", b"", {"LIST": b"150 now\r\n530 not you"}, 502),
        ("/a/", b"", {"LIST": b"350 what?"}, 502),
        ("/a/", b"half", {"LIST": b"150 now\r\n426 disk on fire"}, 502),
        ("/a/", b"half", {"LIST": b"150 now\r\n550 disk on fire"}, 404),
    ],
)
def test_a_directory_that_is_not_there_or_not_whole_is_not_empty(
    gateway,
    origin: origins.Start,
    path: str,
    data: bytes,
    replies: dict[str, bytes],
    status: int,
    drips: bool,
) -> None:
    server = scripted(origin, data, drips, **replies)
    assert ask(gateway, url(server, path)).status == status


@pytest.mark.parametrize(
    ("line", "name"),
    [
        ("11-21-26  02:00PM       <DIR>          dos folder", "dos folder/"),
        ("11-21-2026  02:00AM            1234 a file.txt", "a file.txt"),
        ("-rw-r--r--    1 0    0     12 Nov 21 13:00 a file", "a file"),
        ("drwxr-xr-x    2 0    0   4096 Jan 01  2020 below", "below/"),
        ("lrwxrwxrwx 1 0 0 5 Jan 01  2020 link -> below", "link"),
        ("-rw-r--r-- 1 0 0 12 Nov 21 13:00  blanks  in it ", " blanks  in it "),
        ("-rw-rw-r--+ 1 0 0 12 Nov 21 13:00 listed", "listed"),
        # Without a group, and more.
        ("-rw-r--r--   1 ann     12 Nov 21 13:00 alone", "alone"),
        ("drwxr-xr-x   2 ann   4096 Jan 01  2020 alone", "alone/"),
        ("lrwxrwxrwx 1 ann 5 Jan 01  2020 link -> below", "link"),
        ("d [R----F--] supervisor   512 Jan 16 18:53 login", "login/"),
        ("-------r--   326  1391972  1392298 Nov 22  1995 Mega.sit", "Mega.sit"),
        ("drwxrwxr-x   folder   2 May 10  1996 network", "network/"),
        # With blanks in owner or group.
        ("-rw-r--r-- 1 Domain Users 0 12 Nov 21 13:00 x", "x"),
        ("-rw-r--r-- 1 ann Domain Users 12 Nov 21 13:00 x y", "x y"),
        ("drwxr-xr-x 1 Ann B. Smith  Domain 7 Users 12 Nov 21 2020 x", "x/"),
        ("-rw-r--r-- 1 a b 12 Nov 21 13:00 5 Nov 21 13:00 x", "5 Nov 21 13:00 x"),
        # EPLF.
        ("+i8388621.29609,m824255902,/,\tname", "name/"),
        ("+i8388621.44468,m839956783,r,s10376,\tRFCEPLF", "RFCEPLF"),
        ("+/,\tname", "name/"),
        ("+m1,/,r,\ta, /,b", "a, /,b/"),
        ("+r,up644,s9,\ta\tb", "a\tb"),
        ("+r,x/,/y,\tname", "name"),
        ("+\tname", "name"),
        # What names nothing.
        ("+/,", ""),
        ("+/,\t", ""),
        ("total 12", ""),
        ("-rw-r--r-- 1 0 0 12 Nov 21 13:00 ", ""),
        ("", ""),
    ],
)
def test_a_listing_keeps_its_links_whoever_writes_it(line: str, name: str) -> None:
    entry = natwork_gateways.ftp_entry(line, "base/")
    text = re.sub("<a.*?>|</a>", "", entry)
    assert html.unescape(text).replace("/", "") == line.replace("/", "")
    found = dict(re.findall('<a href="([^"]*)">(.*?)</a>', entry))
    assert list(found.values()) == [name][: bool(name)]
    end = "/" if name.endswith("/") else ""
    link = f"base/{urllib.parse.quote(name.removesuffix('/'), safe='')}{end}"
    assert list(found) == [link][: bool(name)]


HOSTILE_NAMES = [
    '"><script>alert(1)</script>',
    "' onclick='alert(1)",
    "</pre></html><!--",
    "..",
    "../../etc/passwd",
    "/etc/passwd",
    "//elsewhere.example/",
    "http://elsewhere.example/",
    "javascript:alert(1)",
    "a\rDELE b",
    "a\nDELE <b>",
    "a?b#c;type=d%2e%2e",
    "\x00\x01\x7f\x80\xff",
    "a -> <b>",
]


@pytest.mark.parametrize("name", HOSTILE_NAMES)
@pytest.mark.parametrize(
    "form", ["-rw-r--r-- 1 <b> <i> 3 Jan 1 10:00 {}\r\n", "+<b>,/,{}\t{}\r\n"]
)
def test_a_hostile_name_is_a_name(
    gateway, origin: origins.Start, form: str, name: str
) -> None:
    server = scripted(origin, form.format(name, name).encode("latin-1"))
    answer = ask(gateway, url(server, "/a/"))
    assert answer.status == 200
    # Nothing but links, to names in this directory, and to what is above it.
    text = answer.body.partition(b"<pre>")[2].replace(b"\n</pre>\n", b"")
    for tag in re.findall(b"<[^>]*>", text):
        assert re.fullmatch(b'<a href="([A-Za-z0-9._~%-]+/?)">|</a>', tag), tag


@pytest.mark.parametrize(
    "line",
    [
        b"-rw-r--r-- 1 a b 3 Jan 1 10:00 f\r\n",
        b"+/,\t" + b'"' * 200 + b"\n",
        b"d a a 1 Jan",
        b"d" + b" a 1 Jan 1 1:1" * 20 + b"\n",
        b"+/,/,/,",
        b"d ",
        b"\n",
    ],
)
def test_megabytes_of_a_listing_are_read_or_refused_soon(
    gateway, origin: origins.Start, line: bytes
) -> None:
    for size in (3 << 19, 3 << 20):
        listing = line * (size // len(line))
        fits = size < 2 << 20 and listing.count(b"\n") <= 20_000
        server = scripted(origin, listing)
        began = time.monotonic()
        answer = ask(gateway, url(server))
        assert answer.status == (200 if fits else 502)
        assert time.monotonic() - began < 15


@WHOLE_AND_BY_BYTES
def test_curl_and_wget_read_from_servers_that_refuse(
    gateway, origin: origins.Start, tmp_path: Path, drips: bool
) -> None:
    needs.programs("curl", "wget")
    many = b"331-who\r\n331\r\n530 no\r\n331 and?"
    listing = b"+i8388621.29609,m824255902,/,\tname\r\n"
    ls = b"-rw-r--r-- 1 ann Domain Users 12 Nov 21 13:00 a file\r\n"
    cases: list[tuple[str, bytes, dict[str, bytes], str]] = [
        ("/file", b"the file", {"PASV": b"502 no"}, "the file"),
        ("/file", b"the file", {"EPSV": b"502 no"}, "the file"),
        ("/file", b"the file", {"SIZE": b"502 no"}, "the file"),
        ("/file", b"the file", {"USER": many, "SIZE": b"450 no"}, "the file"),
        ("/a/", b"", {"LIST": b"550 none"}, '<a href="../">'),
        ("/a/", b"", {"LIST": b"450 none"}, '<a href="../">'),
        ("/", b"", {"LIST": b"550 none"}, "<pre>"),
        ("/", b"", {"LIST": b"450 none"}, "<pre>"),
        ("/a/", listing, {}, '<a href="name/">name/</a>'),
        ("/a/", ls, {"PASV": b"502 no"}, '<a href="a%20file">a file</a>'),
    ]
    proxy = {"ftp_proxy": gateway.url, "no_proxy": ""}
    for path, data, replies, expected in cases:
        target = url(scripted(origin, data, drips, **replies), path).decode()
        curl = "curl", "-sSf", "-m", "20", "--noproxy", "", "-x", gateway.url, target
        wget = "wget", "-q", "-t", "1", "-T", "20", "-O", "-", target
        for words in (curl, wget):
            text = run(*words, cwd=tmp_path, **proxy)
            assert text == expected or path.endswith("/") and expected in text
    refusing = url(scripted(origin, b"", drips, PASS=b"430 no"), "/file").decode()
    curl = "curl", "-sS", "-m", "20", "--noproxy", "", "-x", gateway.url, refusing
    assert run(*curl, "-w", "%{http_code}", cwd=tmp_path).endswith("401")


# --- Gopher -------------------------------------------------------------------


def menu(connection: socket.socket, origin: origins.Origin) -> None:
    """Be a Gopher server with one menu, and note the selectors."""
    origin.received.append(connection.makefile("rb").readline())
    text = MENU.format(host=origin.host, port=origin.port)
    connection.sendall(text.encode())


def test_a_menu_is_a_page(gateway, origin: origins.Start) -> None:
    server, count = origin(menu, "127.0.0.3"), settled(gateway)
    for path in ("", "/", "/1", "/1/"):
        answer = ask(gateway, url(server, path, "gopher"))
        assert answer.status == 200 and not answer.closes
        assert answer.values(b"Content-Type") == [b"text/html; charset=utf-8"]
    assert server.received == [b"\r\n"] * 3 + [b"/\r\n"]
    assert b"Welcome &#60;b&#62;here" in answer.body and b"javascript" not in re.sub(
        rb'href="gopher:[^"]*"', b"", answer.body
    )
    found, at = links(answer), f"gopher://{server.authority}"
    assert found == {
        "A text & more": f"{at}/0%2Ftext.txt",
        "Below": f"{at}/1%2Fbelow",
        "Search": f"{at}/7%2Ffind%3Fa%3D1%26b%2520",
        "Binary": f"{at}/9%2Fb%20%22quoted%22.bin",
        "Elsewhere": "http://www.example.com/?a&b",
        "Trap": f"{at}/hURL%3Ajavascript%3Aalert%281%29",
        "Terminal": "telnet://bbs.example:23/",
    }
    line = line_of(gateway, count)
    assert (line["proto"], line["outcome"]) == ("gopher", "ok")
    assert line["target"] == f"gopher://{server.authority}/"


def test_a_search_asks_and_then_searches(gateway, origin: origins.Start) -> None:
    server, count = origin(menu, "127.0.0.3"), settled(gateway)
    answer = ask(gateway, url(server, "/7/find%3Fa", "gopher"))
    assert b'<input name="q">' in answer.body and server.received == []
    for query in ("?q=two+words", "?two%20words", "%09two%20words"):
        answer = ask(gateway, url(server, f"/7/find%3Fa{query}", "gopher"))
        assert answer.status == 200
    assert server.received == [b"/find?a\ttwo words\r\n"] * 3
    for line in gateway.lines(count + 4)[count:]:
        assert line["target"] == f"gopher://{server.authority}/7/find%3Fa"


@pytest.mark.parametrize("path", ["/0/cgi?x=1", "/1/menu?a&b", "/g/pic?", "/0/a%3Fb"])
def test_only_a_search_has_a_query(gateway, origin: origins.Start, path: str) -> None:
    server = origin(menu, "127.0.0.3")  # RFC 4266 section 2.1
    assert ask(gateway, url(server, path, "gopher")).status == 200
    selector = path[2:].replace("%3F", "?").encode()
    assert server.received == [selector + b"\r\n"]


@pytest.mark.parametrize(
    ("sent", "got"),
    [
        (b"one\r\ntwo\r\n.\r\n", b"one\r\ntwo\r\n"),
        (b"one\n.\n", b"one\n"),
        (b".\r\n", b""),
        (b"", b""),
        (b"no dot", b"no dot"),
        (b"a line.\r\n", b"a line.\r\n"),
        (b"..dot\r\nno..\r\n...\r\n..\r\n.\r\n", b".dot\r\nno..\r\n..\r\n.\r\n"),
        (b"..", b"."),
        (b"x" * 70_000 + b"\n..y", b"x" * 70_000 + b"\n.y"),
        (b"x" * 200_000 + b"\r\n.\r\n", b"x" * 200_000 + b"\r\n"),
    ],
)
def test_a_text_ends_before_its_dot(
    gateway, origin: origins.Start, sent: bytes, got: bytes
) -> None:
    def handle(connection: socket.socket, origin: origins.Origin) -> None:
        connection.makefile("rb").readline()
        wire.drip(connection, sent) if len(sent) < 99 else connection.sendall(sent)

    answer = ask(gateway, url(origin(handle, "127.0.0.3"), "/0/text", "gopher"))
    assert answer.body == got and not answer.closes and answer.complete
    assert answer.values(b"Content-Type") == [b"text/plain; charset=utf-8"]


def test_a_broken_stream_is_cut(gateway, origin: origins.Start) -> None:
    def handle(connection: socket.socket, origin: origins.Origin) -> None:
        connection.makefile("rb").readline()
        connection.sendall(b"begun")
        time.sleep(0.2)
        wire.reset(connection)

    answer = ask(gateway, url(origin(handle, "127.0.0.3"), "/9/file", "gopher"))
    assert answer.status == 200 and not answer.complete


def test_gophernicus_is_read(gateway, gophernicus: origins.Origin) -> None:
    found = links(ask(gateway, url(gophernicus, "/", "gopher")))
    assert any("text.txt" in name for name in found), found
    text = ask(gateway, url(gophernicus, "/0/text.txt", "gopher"))
    assert text.body.replace(b"\r", b"") == b"one line\n.hidden\nlast line\n"
    assert ask(gateway, url(gophernicus, "/9/big.zip", "gopher")).body == BIG
    head = ask(gateway, url(gophernicus, "/9/big.zip", "gopher"), method=b"HEAD")
    assert head.values(b"Content-Type") == [b"application/zip"]
    assert ask(gateway, url(gophernicus, "/1/nothing/", "gopher")).status == 404


# --- Real clients -------------------------------------------------------------


def test_curl_gets_and_puts(gateway, vsftpd, site: Path, tmp_path: Path) -> None:
    needs.programs("curl")
    server = vsftpd()
    curl = "curl", "-sS", "--max-time", "30", "--noproxy", "", "-x", gateway.url
    assert (
        run(*curl, url(server, "/hello.txt").decode(), cwd=tmp_path) == "hello, ftp\n"
    )
    run(*curl, "-o", "got", url(server, "/big.bin").decode(), cwd=tmp_path)
    assert (tmp_path / "got").read_bytes() == BIG
    at = url(server, "/by-curl").decode()
    words = "-u", f"ann:{SECRET}", "-T", "got", "-w", "%{http_code}"
    assert run(*curl, *words, at, cwd=tmp_path) == "201"
    assert (site / "ann/by-curl").read_bytes() == BIG
    code = "-o", "/dev/null", "-w", "%{http_code}"
    assert run(*curl, *code, "-u", "ann:no", at, cwd=tmp_path) == "401"
    assert run(*curl, *code, "-I", at, cwd=tmp_path) == "404"


def test_wget_gets(gateway, vsftpd, tmp_path: Path) -> None:
    needs.programs("wget")
    at = url(vsftpd(), "/dir/below/").decode()
    proxy = {"ftp_proxy": gateway.url, "no_proxy": ""}
    run(
        "wget",
        "-q",
        "-T",
        "20",
        "-O",
        "big",
        at + "../../big.bin",
        cwd=tmp_path,
        **proxy,
    )
    assert (tmp_path / "big").read_bytes() == BIG
    login = f"ann:{SECRET.replace(' ', '%20')}@"
    private = url(vsftpd(), "/private.txt", login=login).decode()
    run("wget", "-q", "-T", "20", "-O", "private", private, cwd=tmp_path, **proxy)
    assert (tmp_path / "private").read_bytes() == b"for Ann"
    page = run("wget", "-q", "-T", "20", "-O", "-", at, cwd=tmp_path, **proxy)
    assert "deep.html" in page


def test_lynx_reads_both(
    gateway, vsftpd, gophernicus: origins.Origin, tmp_path: Path
) -> None:
    needs.programs("lynx")
    proxies = {"ftp_proxy": gateway.url + "/", "gopher_proxy": gateway.url + "/"}
    count = settled(gateway)
    for target, words in (
        (url(vsftpd(), "/hello.txt"), ["hello, ftp"]),
        (url(vsftpd(), "/"), ["dir/", "big.bin", f"ftp://{vsftpd().authority}/dir/"]),
        (url(gophernicus, "/1/below", "gopher"), ["other.txt"]),
        (url(gophernicus, "/0/text.txt", "gopher"), ["last line"]),
    ):
        text = run("lynx", "-dump", target.decode(), cwd=tmp_path, **proxies)
        assert all(word in text for word in words), text
    protos = [line["proto"] for line in gateway.lines(count + 4)[count:]]
    assert protos == ["ftp", "ftp", "gopher", "gopher"]


# --- The same rules -----------------------------------------------------------


@pytest.mark.parametrize("scheme", ["ftp", "gopher"])
@pytest.mark.parametrize(("word", "target"), addresses.TARGETS)
def test_a_closed_address_is_refused_by_every_scheme(
    closed, origin: origins.Start, word: str, target: str, scheme: str
) -> None:
    server = origin(http_wire.Script(), "::1" if target == "[::1]" else "127.0.0.1")
    number = addresses.TARGETS.index((word, target))
    end = f":{server.port}/{'17'[number % 2]}{number}"  # a menu, or a search's form
    url = f"{scheme}://{target}{end}"  # traps 12, 13
    answer = ask(closed, url.encode())
    assert (answer.status, http_wire.proxy_error(answer)) == (
        403,
        b"http_request_denied",
    )

    def lines() -> list[dict[str, str]]:
        return [x for x in closed.lines() if x["target"].endswith(end)]

    wait.until(lambda: [x for x in lines() if x["proto"] == scheme])
    assert {line["outcome"] for line in lines()} == {f"denied-{word}"}
    assert http_wire.uncalled(server)


@pytest.mark.parametrize("scheme", [b"ftp", b"gopher"])
@pytest.mark.parametrize("target", "127.1 0x7f.1 017700000001 2130706433 0".split())
def test_only_an_address_is_an_address(
    closed, origin: origins.Start, target: str, scheme: bytes
) -> None:
    server = origin(http_wire.Script())
    place = f"{target}:{server.port}".encode()
    assert ask(closed, b"%b://%b/" % (scheme, place)).status == 400
    assert http_wire.uncalled(server)


@pytest.mark.parametrize("scheme", [b"ftp", b"gopher"])
def test_the_gateway_itself_and_mail_are_refused(gateway, scheme: bytes) -> None:
    port = gateway.address[1]
    answer = ask(gateway, b"%b://127.0.0.1:%d/" % (scheme, port))
    assert (answer.status, http_wire.proxy_error(answer)) == (
        502,
        b"proxy_loop_detected",
    )
    answer = ask(gateway, b"%b://198.51.100.1:25/" % scheme)
    assert answer.status == 403 and b"port 25" in answer.body


# --- What strangers found -----------------------------------------------------


@pytest.mark.parametrize(
    ("field", "status"),
    [
        (b"Content-Range: bytes 4-8/9", 400),
        (b'If-Match: "x"', 412),
        (b"If-None-Match: *", 412),
    ],
)
def test_what_ftp_cannot_do_is_not_done_to_the_whole_file(
    gateway, origin: origins.Start, field: bytes, status: int
) -> None:
    server = origin(http_wire.Script(), "127.0.0.3")
    fields = field, b"Content-Length: 5"
    answer = ask(gateway, url(server, "/f"), *fields, method=b"PUT", body=b"hello")
    assert answer.status == status and answer.closes
    assert http_wire.uncalled(server)


def test_a_malformed_body_empties_no_file(gateway, origin: origins.Start) -> None:
    data = origin(http_wire.Recorder(), "127.0.0.3")
    here = b"227 here (127,0,0,3,%d,%d)" % divmod(data.port, 256)
    server = origin(Ftpd(PASV=here, SIZE=b"500 no"), "127.0.0.3")
    answer = ask(
        gateway,
        url(server, "/f"),
        b"Transfer-Encoding: chunked",
        method=b"PUT",
        body=b"zz\r\n",
    )
    assert answer.status == 400 and answer.closes
    assert any(line.startswith(b"PASV") for line in server.received)
    assert not any(line.startswith(b"STOR") for line in server.received)


def test_a_server_that_has_no_passive_mode_is_not_a_missing_file(
    gateway, origin: origins.Start
) -> None:
    server = origin(Ftpd(PASV=b"550 no", SIZE=b"213 5"), "127.0.0.3")
    count = settled(gateway)
    answer = ask(gateway, url(server, "/file"))
    assert answer.status == 502 and b"no passive mode: 550" in answer.body
    assert line_of(gateway, count)["outcome"] == "bad-response"
    assert not any(line.startswith(b"CWD") for line in server.received)


@pytest.mark.parametrize(
    ("said", "shown", "outcome"),
    [
        (b"3It is not here\t\terror\t1\r\n.\r\n", b"It is not here", "not-found"),
        (b"Error: it is not here\r\n", b"\nError: it is not here", "ok"),
        (b"iWelcome\r\n.\r\n", b"\nWelcome", "ok"),
    ],
)
def test_what_a_gopher_says_instead_of_a_menu_is_shown(
    gateway, origin: origins.Start, said: bytes, shown: bytes, outcome: str
) -> None:
    def handle(connection: socket.socket, origin: origins.Origin) -> None:
        connection.makefile("rb").readline()
        connection.sendall(said)

    count = settled(gateway)
    answer = ask(gateway, url(origin(handle, "127.0.0.3"), "/1/x", "gopher"))
    assert shown in answer.body
    line = line_of(gateway, count)
    assert (line["outcome"], line["status"]) == (outcome, str(answer.status))


@pytest.mark.parametrize(
    "target",
    [
        "ftp://ann:kQ/7@h.example/x",
        "ftp://ann:kQ#7@h.example/x",
        "ftp:/ann:kQ7@h.example/x",
        "ftp://ann:k?Q7@h.example/x",
        "http://ann:kQ/7@h.example/x",
        "http:/ann:kQ7@h.example/x",
        "//ann:kQ7@h.example/x",
    ],
)
def test_a_password_in_the_wrong_place_is_told_to_nobody(gateway, target: str) -> None:
    count = settled(gateway)
    answer = ask(gateway, target.encode())
    assert answer.status in (400, 403, 404)
    line = line_of(gateway, count)
    for place in (line["target"], answer.body.decode()):
        assert "kQ" not in place and "ann" not in place, place


def test_a_page_that_is_cut_short_ends_the_connection(
    natwork: running.Start, origin: origins.Start
) -> None:
    listing = b"".join(
        b"-rw-r--r-- 1 a b 3 Jan 1 10:00 %b%05d\r\n" % (b'"' * 50, n)
        for n in range(20000)
    )  # of which the page is five times as long

    data = origin(giving(listing), "127.0.0.3")
    server = origin(Ftpd(PASV=passive(data), LIST=b"150 now\r\n226 done"), "127.0.0.3")
    gateway = natwork("idle_timeout=1")
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.settimeout(20)
        client.connect(gateway.address)
        client.sendall(asking(url(server)) + asking(b"http://localhost/nope"))
        (line,) = gateway.lines(1)  # without a byte read
        with pytest.raises(ConnectionResetError):
            while data := client.recv(65536):
                assert b"HTTP/1.1 4" not in data
    assert (line["outcome"], line["status"]) == ("idle-timeout", "200")


def test_a_server_may_ask_to_wait_before_it_greets(
    gateway, origin: origins.Start
) -> None:
    for greeting, status in (
        (b"120 wait a moment\r\n220 now", 200),
        (b"120-wait\r\n220 not yet\r\n120 a moment\r\n220-now\r\n220 ready", 200),
        (b"120 wait a moment\r\n421 no", 502),
        (b"120 wait a moment\r\n" * 9999, 502),
    ):
        server = scripted(origin, b"here", **{"": greeting})
        assert ask(gateway, url(server, "/file")).status == status


def test_a_page_that_comes_for_ever_is_given_up(
    natwork: running.Start, origin: origins.Start
) -> None:
    def drip(connection: socket.socket, origin: origins.Origin) -> None:
        while True:
            connection.sendall(b"i")
            time.sleep(0.02)

    gateway = natwork(program=running.program({"natwork_gateways.PAGE_TIMEOUT": 0.5}))
    target = b"gopher://%b/1/" % origin(drip, "127.0.0.3").authority.encode()
    assert ask(gateway, target).status == 504
    assert gateway.lines(1)[0]["outcome"] == "answer-timeout"
