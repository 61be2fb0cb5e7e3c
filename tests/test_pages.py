"""Own pages: the live table, the metrics, the PAC file and the Local Address Table."""

from __future__ import annotations

import contextlib
import html
import ipaddress
import json
import mmap
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import browser
import http_wire
import needs
import origins
import pytest
import running
import wait
import web
import wire

import natwork as program

OTHERS = ["[fd00:9::9]:8080", "second.example:3128"]
gateway = running.shared(f"gateways={' '.join(OTHERS)}")
PAGES = {
    "/": "text/html; charset=utf-8",
    "/table.json": "application/json",
    "/metrics": "text/plain; version=0.0.4",
    "/proxy.pac": "application/x-ns-proxy-autoconfig",
    "/wpad.dat": "application/x-ns-proxy-autoconfig",
    "/lat.json": "application/json",
}
PAC = ["/proxy.pac", "/wpad.dat"]
SHOWN = [path for path in PAGES if path not in (*PAC, "/lat.json")]
CROWDED = 1000  # the first slot of crowd(), where no worker comes
NO_PID = 4194304  # and the first of its pids: PID_MAX_LIMIT of the kernel
HOSTS = [
    "www.example.com",
    "a-very-long-name-of-a-host.in.some.region.cloud.example.com",
    "x" * 63 + ".example",
    "203.0.113.77",
]
USERS = ["-", "-", "alice", "carol.jones@example.com", "u" * 200]
COUNT = "document.querySelector('p').textContent"
HOSTILE = [
    '<script>document.title="owned"</script>',
    "<b>bold</b>",
    "&lt;",
    "'\"><i>",
    "a" * 255,
]
PACPARSER = """
import json, sys, pacparser
pacparser.init()
pacparser.parse_pac_string(open(sys.argv[1]).read())
hosts = json.load(sys.stdin)
print(json.dumps([pacparser.find_proxy(f"http://{h}/", h) for h in hosts]))
"""


def curl(*words: str) -> tuple[int, dict[str, str], str]:
    """Run curl without a proxy; return status, fields and body of the answer."""
    needs.programs("curl")
    done = subprocess.run(
        ["curl", "-si", "--noproxy", "*", "--max-time", "20", *words],
        capture_output=True,
        timeout=30,
    )
    assert done.returncode == 0, done
    head, _, body = done.stdout.decode().partition("\r\n\r\n")
    line, *lines = head.split("\r\n")
    fields = dict(one.split(": ", 1) for one in lines)
    return int(line.split()[1]), fields, body


def table(gateway: running.Gateway) -> list[dict[str, object]]:
    """Return the sessions that /table.json shows."""
    sessions = json.loads(curl(gateway.url + "/table.json")[2])["sessions"]
    assert isinstance(sessions, list)
    return sessions


@pytest.mark.parametrize("path", PAGES)
def test_each_page_comes_as_what_it_is_and_is_logged(
    gateway: running.Gateway, path: str
) -> None:
    before = len(gateway.lines())
    status, fields, body = curl(gateway.url + path)
    assert (status, fields["Content-Type"]) == (200, PAGES[path])
    assert int(fields["Content-Length"]) == len(body) > 100
    assert fields["Cache-Control"] == "no-store"
    assert fields["X-Content-Type-Options"] == "nosniff"
    policy = fields["Content-Security-Policy"]
    assert "default-src 'none'" in policy and "frame-ancestors 'none'" in policy
    assert "unsafe" not in policy and "*" not in policy
    status, fields, nothing = curl("--head", gateway.url + path + "?query")
    assert (status, nothing) == (200, "") and int(fields["Content-Length"]) > 100
    first, second = gateway.lines(before + 2)[before:]
    assert (first["target"], first["method"], second["method"]) == (path, "GET", "HEAD")
    assert {line["target"] for line in (first, second)} == {path}
    assert (first["proto"], first["status"], first["outcome"]) == ("http", "200", "ok")
    assert int(first["down"]) > len(body)


def test_a_nonce_is_used_once(gateway: running.Gateway) -> None:
    seen = set()
    for _ in range(2):
        _, fields, body = curl(gateway.url)
        nonces = set(re.findall("nonce-([0-9a-f]{32})'", str(fields)))
        assert len(nonces) == 1 and nonces == set(re.findall('nonce="(.*?)"', body))
        seen |= nonces
    assert len(seen) == 2


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "LOCALHOST:1", "gate.test"])
@pytest.mark.parametrize("path", SHOWN)
def test_an_own_name_is_answered(
    gateway: running.Gateway, path: str, host: str
) -> None:
    assert curl("-H", f"Host: {host}", gateway.url + path)[0] == 200


@pytest.mark.parametrize(
    "host",
    ["evil.example", "127.0.0.1.evil.example", "10.1.2.3", "[2001:db8::1]", "", "a b"],
)
@pytest.mark.parametrize("path", [*SHOWN, "/nothing"])
def test_a_name_that_was_rebound_is_refused(
    gateway: running.Gateway, path: str, host: str
) -> None:
    field = f"Host: {host}" if host else "Host;"
    status, fields, body = curl("-H", field, gateway.url + path)
    assert status == (400 if " " in host else 403)
    assert "natwork_" not in body and "sessions" not in body
    # Somebody may have meant well, and the operator not have said so.
    assert status == 400 or "`name` in natwork.conf" in body


@pytest.mark.parametrize("path", PAC)
@pytest.mark.parametrize("host", ["wpad", "wpad.evil.example", '"+alert(1)+"', "0"])
def test_the_pac_file_answers_any_host_and_never_quotes_it(
    gateway: running.Gateway, path: str, host: str
) -> None:
    status, _, body = curl("-H", f"Host: {host}", gateway.url + path)
    port = gateway.address[1]
    assert status in (200, 400) and "wpad" not in body and "alert" not in body
    assert status == 400 or f"PROXY 127.0.0.1:{port}" in body


def test_an_outsider_gets_none_of_it(natwork: running.Start) -> None:
    gateway = natwork("inside=10.0.0.0/8")
    for path in PAGES:
        with gateway.connect() as client:
            wire.send(
                client, f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode()
            )
            with contextlib.suppress(ConnectionResetError):
                assert client.recv(1) == b""


@pytest.mark.parametrize("path", [*PAGES, "/nothing"])
@pytest.mark.parametrize("method", ["POST", "DELETE", "OPTIONS", "TRACE"])
def test_only_get_and_head(gateway: running.Gateway, path: str, method: str) -> None:
    for more in ([], ["-H", "Max-Forwards: 0"]):  # and no page asks for less
        status, fields, _ = curl("-X", method, *more, gateway.url + path)
        assert status == (405 if path in PAGES else 404)
        assert path not in PAGES or fields["Allow"] == "GET, HEAD"


def test_a_page_asked_for_with_a_body_closes(gateway: running.Gateway) -> None:
    with gateway.connect() as client:
        data = b"GET /metrics HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\n\r\n"
        answer = http_wire.exchange(client, data + b"GET /")
        assert (answer.status, answer.closes) == (200, True)


def test_a_connection_goes_on_after_a_page(
    gateway: running.Gateway, origin: origins.Start
) -> None:
    server = origin(http_wire.Script(), "127.0.0.3")
    with gateway.connect() as client:
        for _ in range(2):
            page = b"GET /table.json HTTP/1.1\r\nHost: localhost\r\n\r\n"
            assert http_wire.exchange(client, page).status == 200
            assert http_wire.exchange(client, http_wire.request(server)).body == b"ok"


def test_a_browser_that_uses_the_proxy_gets_the_pages_too(
    gateway: running.Gateway,
) -> None:
    for host in (b"127.0.0.1", b"localhost", b"gate.test"):
        with gateway.connect() as client:
            at = b"%b:%d" % (host, gateway.address[1])
            answer = http_wire.exchange(client, http_wire.request(at, path=b"/metrics"))
            assert answer.status == 200 and b"natwork_workers" in answer.body
            assert (
                http_wire.exchange(client, http_wire.request(at, path=b"/no")).status
                == 404
            )
    with gateway.connect() as client:  # what the Host field says is ignored
        data = b"GET http://gate.test:%d/ HTTP/1.1\r\nHost: evil.example\r\n\r\n"
        assert http_wire.exchange(client, data % gateway.address[1]).status == 200


# --- The table ----------------------------------------------------------------


def test_the_table_is_the_same_in_both_places(
    natwork: running.Start, origin: origins.Start
) -> None:
    gateway, server = natwork(), origin(origins.echo, "127.0.0.3")
    with http_wire.tunnel(gateway, server) as client, http_wire.tunnel(gateway, server):
        assert wire.echoes(client, b"x" * 5000)
        wait.until(lambda: 5000 in [row["up"] for row in table(gateway)])
        done = running.command("--table", "--json", cwd=gateway.log.parent)
        ours = gateway.workers()
        told = [row for row in json.loads(done.stdout) if row["pid"] in ours]
        shown = table(gateway)
        assert len(shown) == 2 and [list(row) for row in shown] == [list(told[0])] * 2
        for row in (*told, *shown):
            del row["age"]
        assert told == shown
        heads = re.findall("<th [^>]*><button[^>]*>([^<]*)", curl(gateway.url)[2])
        assert heads == [*program.COLUMNS[:-1], "Moving", program.COLUMNS[-1]]
    wait.until(lambda: not table(gateway))


def test_the_figures_are_those_of_the_master(
    natwork: running.Start, origin: origins.Start
) -> None:
    gateway = natwork("spare_workers=3", "max_workers=9")
    server = origin(origins.echo, "127.0.0.3")
    with gateway.connect() as client:
        assert (
            http_wire.exchange(client, http_wire.request(http_wire.DENIED)).status
            == 403
        )
        assert (
            http_wire.exchange(client, http_wire.request(http_wire.CLOSED)).status
            == 502
        )
    asked = 0
    with http_wire.tunnel(gateway, server):

        def found() -> dict[str, object]:
            nonlocal asked
            asked += 1
            answer = json.loads(curl(gateway.url + "/table.json")[2])["gateway"]
            assert isinstance(answer, dict)
            return answer

        # While we ask, one of the three is not idle.
        figures = wait.until(lambda: (f := found())["idle"] in (2, 3) and f)
        assert isinstance(figures, dict)
        assert (figures["limit"], figures["busy"]) == (9, 2)  # the tunnel, and we
        assert (figures["refused"], figures["failed"]) == (1, 1)
        # Each of our questions before this one, and neither of the two above.
        assert figures["served"] == asked - 1 and 0 <= figures["uptime"] < 60


def scoreboard(gateway: running.Gateway) -> program.Scoreboard:
    """Return the scoreboard of a gateway, to write on it as no client could."""
    gateway.ready(1)
    folder = Path(f"/proc/{gateway.process.pid}/fd")
    links = {os.readlink(link): link for link in folder.iterdir()}
    (link,) = [link for name, link in links.items() if "memfd:natwork" in name]
    board = program.Scoreboard(fd := os.open(link, os.O_RDWR))
    size = program.Scoreboard.SLOTS + program.SLOT_LIMIT * program.Scoreboard.SLOT_SIZE
    board.memory = mmap.mmap(fd, size)
    board.words = memoryview(board.memory).cast("Q")
    os.close(fd)
    return board


def deface(gateway: running.Gateway, pids: list[int]) -> None:
    """Write hostile words into the rows of some workers."""
    board = scoreboard(gateway)
    slots = [program.Slot(board, number) for number in range(50)]
    rows = [slot for slot in slots if slot.words[slot.PID] in pids and slot.session()]
    assert len(rows) == len(pids) == len(HOSTILE)
    for slot, words in zip(rows, HOSTILE):
        session = slot.session()
        assert session
        session.user = words
        session.target = words.replace("/", ":") + ":443"
        slot.publish(session)


def chromium(folder: Path, *words: str) -> tuple[str, str]:
    """Run Chromium without a head; return what it prints and what it says."""
    needs.programs("chromium")
    done = subprocess.run(
        [*web.CHROMIUM, f"--user-data-dir={folder / 'profile'}", *words],
        env={"PATH": os.environ["PATH"], "HOME": str(folder), "LANG": "C.UTF-8"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done
    return done.stdout, done.stderr


@pytest.fixture
def defaced(natwork: running.Start, origin: origins.Start) -> Iterator[running.Gateway]:
    """Return a gateway with tunnels whose rows hold hostile words."""
    gateway, server = natwork("name=gate.test"), origin(origins.echo, "127.0.0.3")
    with contextlib.ExitStack() as stack:
        clients = [
            stack.enter_context(http_wire.tunnel(gateway, server)) for _ in HOSTILE
        ]
        deface(gateway, [gateway.worker_of(client) for client in clients])
        yield gateway


def test_hostile_words_are_words(defaced: running.Gateway) -> None:
    page = curl(defaced.url)[2]
    for part in ("<b>", "<i>", "owned</", 'owned"'):
        assert part not in page
    assert "/table.json" in page.partition("<noscript>")[2].partition("</noscript>")[0]
    assert {str(row["user"]) for row in table(defaced)} == set(HOSTILE)


def test_a_browser_refreshes_the_table_in_place(
    defaced: running.Gateway, tmp_path: Path
) -> None:
    found, said = chromium(
        tmp_path,
        "--enable-logging=stderr",
        "--virtual-time-budget=5000",
        "--dump-dom",
        defaced.url,
    )
    assert "CONSOLE" not in said, said  # nor a word of the security policy
    assert "<title>gate.test - NATWork</title>" in found
    assert "<body>" in found.replace(' class=""', "")
    cells = [html.unescape(text) for text in re.findall("<td[^>]*>([^<]*)", found)]
    assert set(HOSTILE) <= set(cells) and len(cells) == 12 * len(HOSTILE)
    assert not re.search("<(b|i|img)>", found)
    assert "Sessions: 5" in found
    assert '<dd id="limit">2,048</dd>' in found
    targets = Counter(line["target"] for line in defaced.lines(3))
    assert targets["/"] == 1 and targets["/table.json"] >= 2


def crowd(gateway: running.Gateway, count: int) -> list[program.Slot]:
    """Put sessions on the scoreboard, as if there were workers that serve them."""
    board, dice = scoreboard(gateway), random.Random(count)
    slots = [program.Slot(board, CROWDED + number) for number in range(count)]
    for number, slot in enumerate(slots):
        client, host = "10.0.%d.%d" % divmod(number, 250), dice.choice(HOSTS)
        address = "203.0.113.%d" % dice.randint(1, 254)
        if number % 10 == 9:
            client = f"fd00:1234:5678:9abc:def0:1234:5678:{number:x}"
            address = f"2001:db8:1234:5678:9abc:def0:1234:{number:x}"
        slot.clear(NO_PID + number)
        slot.moved(dice.randint(0, 99999), 10 ** dice.randint(0, 12))
        session = program.Session(
            program.endpoint((client, dice.randint(32768, 60999))),
            str(NO_PID + number),
            dice.choice(program.PROTOCOLS[1:]),
        )
        session.began -= dice.randint(0, 400000)
        session.target, session.user = f"{host}:443", dice.choice(USERS)
        session.address = program.endpoint((address, 443))
        session.source = f"198.51.100.7:{20000 + number}"
        slot.publish(session)
    board.words[program.Scoreboard.USED] = CROWDED + count
    return slots


def open_page(page: browser.Browser, gateway: running.Gateway, count: int) -> None:
    """Go to the table, and wait until the script has filled it."""
    page.call("Page.navigate", url=gateway.url)
    wait.until(lambda: page.run("document.querySelector('td[title]') !== null"))
    assert page.run(COUNT) == f"Sessions: {count}"


def column(page: browser.Browser, key: str) -> list[str]:
    """Return the words of one column, from the first row to the last."""
    cells = f"document.querySelectorAll('td.{key}')"
    found = page.run(f"Array.from({cells}, cell => cell.textContent)")
    assert isinstance(found, list)
    return found


def sort_by(page: browser.Browser, key: str) -> str:
    """Sort by a column, from the keyboard; return in which order it says it is."""
    page.run(f"document.querySelector('th.{key} button').focus()")
    page.press("Enter")
    assert page.run("document.querySelectorAll('[aria-sort]').length") == 1
    return str(page.run(f"document.querySelector('th.{key}').ariaSort"))


@pytest.mark.parametrize("count", [12, 500])
def test_the_table_fits_every_screen(
    natwork: running.Start, tmp_path: Path, count: int
) -> None:
    gateway = natwork("name=gate.test")
    crowd(gateway, count)
    with browser.chromium(tmp_path) as page:
        for width in (browser.PHONE, 768, 1201, browser.LAPTOP, browser.DESKTOP):
            page.resize(width)
            open_page(page, gateway, count)
            page.picture(tmp_path / f"{count}-{width}.png")
            root = "document.documentElement"
            wide, room = page.run(f"[{root}.scrollWidth, {root}.clientWidth]")
            assert wide <= room <= width == page.run("innerWidth")
            heights = page.run(
                "Array.from(document.querySelectorAll('tbody tr'), r => r.offsetHeight)"
            )
            assert len(heights) == count
            assert max(heights) < (30 if width > 1200 else 100), (width, max(heights))
            heads = "document.querySelectorAll('th button')"
            cut = f"Array.from({heads}).filter(b => b.scrollWidth > b.clientWidth)"
            assert page.run(cut + ".map(b => b.textContent)") == []
            for key in ("age", "up", "down", "moving", "pid", "new_source_port"):
                cells = f"document.querySelectorAll('td.{key}')"
                cut = f"Array.from({cells}).filter(c => c.scrollWidth > c.clientWidth)"
                assert page.run(cut + ".map(c => c.textContent)") == [], width


def test_a_refresh_keeps_filter_order_and_focus(
    natwork: running.Start, tmp_path: Path
) -> None:
    gateway = natwork()
    slots = crowd(gateway, 40)
    for number, slot in enumerate(slots):
        slot.moved(0, 1000 * number)
    with browser.chromium(tmp_path) as page:
        open_page(page, gateway, 40)
        assert sort_by(page, "down") == "descending"
        assert column(page, "down") == [
            *(f"{number} kB" for number in range(39, 9, -1)),
            *(f"{number}.0 kB" for number in range(9, 0, -1)),
            "0 B",
        ]
        assert sort_by(page, "down") == "ascending"
        page.run("document.querySelector('input').focus()")
        page.type("FTP")
        served = [row for row in table(gateway) if row["protocol"] == "ftp"]
        assert 1 < len(served) < 20
        assert page.run(COUNT) == f"Sessions: {len(served)} of 40"
        assert set(column(page, "protocol")) == {"ftp"}
        wanted = [f"{row['pid']}" for row in served]
        assert column(page, "pid") == wanted
        first = next(
            slot for slot in slots if str(slot.words[program.Slot.PID]) == wanted[0]
        )
        first.moved(0, 2_345_678_901)
        wait.until(lambda: "2.3 GB" in column(page, "down"))
        assert column(page, "pid") == [*wanted[1:], wanted[0]]
        assert column(page, "moving")[-1].endswith("B/s")
        title = "[...document.querySelectorAll('td.down')].pop().title"
        assert page.run(title) == "2345678901"
        assert page.run("document.activeElement.value") == "FTP"
        assert page.run("document.querySelector('[aria-sort]').className") == "down"
        page.run("document.querySelector('input').select()")
        page.type("10.0.0.1 ")
        assert "10.0.0.1" in column(page, "source_ip")
        sort_by(page, "source_ip")
        ordered = sorted(column(page, "source_ip"), key=ipaddress.ip_address)
        assert column(page, "source_ip") == ordered and len(ordered) > 5


def test_a_stale_table_says_so_whatever_is_filtered(
    natwork: running.Start, tmp_path: Path
) -> None:
    gateway = natwork()
    crowd(gateway, 3)
    with browser.chromium(tmp_path) as page:
        open_page(page, gateway, 3)
        gateway.stop()
        stale = "No fresh state; this is the last one known."
        wait.until(lambda: page.run(COUNT) == stale)
        page.run("document.querySelector('input').focus()")
        page.type("10.")
        assert page.run(COUNT) == stale
        page.complaints.clear()  # of the fetch that failed


def test_words_that_are_sorted_and_filtered_stay_words(
    defaced: running.Gateway, tmp_path: Path
) -> None:
    with browser.chromium(tmp_path) as page:
        for width in (browser.PHONE, browser.LAPTOP):
            page.resize(width)
            open_page(page, defaced, len(HOSTILE))
            sort_by(page, "user")
            assert sorted(column(page, "user")) == sorted(HOSTILE)
            root = "document.documentElement"
            assert page.run(f"{root}.scrollWidth <= {root}.clientWidth")
            page.run("document.querySelector('input').focus()")
            page.type("<B>")
            assert column(page, "user") == ["<b>bold</b>"]
            assert page.run("document.querySelector('td *')") is None
            assert page.run("document.title") == "gate.test - NATWork"


def test_the_table_is_there_without_javascript(
    defaced: running.Gateway, tmp_path: Path
) -> None:
    with browser.chromium(tmp_path) as page:
        page.call("Emulation.setScriptExecutionDisabled", value=True)
        page.call("Page.navigate", url=defaced.url)
        wait.until(lambda: page.run("document.readyState") == "complete")
        assert sorted(column(page, "user")) == sorted(HOSTILE)
        assert page.run("document.querySelector('td *')") is None
        assert page.run("document.querySelector('label').offsetHeight") == 0
        assert "JavaScript" in str(page.run("document.body.innerText"))
    assert {line["target"] for line in defaced.lines(1)} == {"/"}


def test_the_table_has_a_heading_links_and_the_colors_that_one_prefers(
    natwork: running.Start, tmp_path: Path
) -> None:
    gateway = natwork("name=gate.test")
    crowd(gateway, 1)
    with browser.chromium(tmp_path) as page:
        seen = set()
        for scheme in ("light", "dark"):
            page.set_scheme(scheme)
            open_page(page, gateway, 1)
            seen.add(page.run("getComputedStyle(document.body).backgroundColor"))
        assert len(seen) == 2
        heading = page.run("document.querySelector('h1').innerText")
        assert heading == f"NATWork gate.test, version {program.__version__}"
        links = page.run("Array.from(document.links, a => a.getAttribute('href'))")
        assert links == ["/metrics", "/table.json", "/proxy.pac"]
        assert page.run("document.querySelector('input').labels[0].innerText") == (
            "Filter"
        )


def test_one_row_is_asked_for_by_its_source_port(natwork: running.Start) -> None:
    gateway = natwork()
    crowd(gateway, 20)
    for query, count in (
        ("source_port=20007", 1),
        ("a=b&source_port=20007", 1),
        ("source_port=1", 0),
        ("port=1", 20),
        ("", 20),
    ):
        body = curl(f"{gateway.url}/table.json?{query}")[2]
        rows = json.loads(body)["sessions"]
        assert len(rows) == count, query
        assert count != 1 or rows[0]["new_source_port"] == 20007
    for word in ("", "x", "-1", "1x", "123456", "%31"):
        status, _, body = curl(f"{gateway.url}/table.json?source_port={word}")
        assert status == 400 and "source_port" in body, word


@pytest.mark.parametrize("size", ["1400,800", "390,1600"])
def test_a_browser_shows_the_table(
    defaced: running.Gateway, tmp_path: Path, size: str
) -> None:
    picture = tmp_path / "table.png"
    time = "--virtual-time-budget=5000"  # for the script to fill the table
    shot = f"--screenshot={picture}", f"--window-size={size}", time
    chromium(tmp_path, *shot, defaced.url)
    data = picture.read_bytes()
    width = int.from_bytes(data[16:20], "big")
    assert width == int(size.split(",")[0]) and len(data) > 20000


# --- Metrics ------------------------------------------------------------------


def measured(gateway: running.Gateway) -> dict[str, float]:
    """Return the metrics by name and labels."""
    lines = curl(gateway.url + "/metrics")[2].splitlines()
    pairs = [line.rsplit(" ", 1) for line in lines if not line.startswith("#")]
    return {name: float(value) for name, value in pairs}


def test_promtool_finds_no_fault_with_the_metrics(gateway: running.Gateway) -> None:
    needs.programs("promtool")
    curl("-H", "Host: evil.example", gateway.url)
    done = subprocess.run(
        ["promtool", "check", "metrics"],
        input=curl(gateway.url + "/metrics")[2],
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def mix(gateway: running.Gateway, server: origins.Origin, web: origins.Origin) -> None:
    """Be a client of every kind, one after another."""
    for target in (web, web, http_wire.DENIED, http_wire.CLOSED, b"nowhere.invalid"):
        with gateway.connect() as client:
            http_wire.exchange(client, http_wire.request(target))
    with gateway.connect() as client:
        http_wire.exchange(client, b"nonsense\r\n\r\n")
    with http_wire.tunnel(gateway, server) as client:
        assert wire.echoes(client, b"x" * 70000)
    wire.reset(http_wire.tunnel(gateway, server))


def test_the_metrics_add_up_with_the_log(
    natwork: running.Start, origin: origins.Start
) -> None:
    gateway = natwork("spare_workers=4", "rules=deny port 9;allow to 127.0.0.0/8")
    server, web = (
        origin(origins.echo, "127.0.0.3"),
        origin(http_wire.Script(), "127.0.0.3"),
    )
    for _ in range(5):
        mix(gateway, server, web)
        with gateway.connect() as client:
            http_wire.exchange(client, http_wire.request(b"127.0.0.3:9"))
        with contextlib.ExitStack() as stack:
            clients = [
                stack.enter_context(http_wire.tunnel(gateway, server)) for _ in range(6)
            ]
            assert all(wire.echoes(client) for client in clients)
            pids = [gateway.worker_of(client) for client in clients]
            time.sleep(0.05)  # for the workers to write down what has moved
            for pid in pids[:4]:
                os.kill(pid, signal.SIGKILL)
            os.kill(pids[4], signal.SIGTERM)
            for client in clients[:5]:
                with contextlib.suppress(ConnectionResetError):
                    assert client.recv(1) == b""
    gateway.lines(5 * (9 + 6))

    def agreed() -> tuple[dict[str, float], list[dict[str, str]]] | None:
        metrics = measured(gateway)
        lines = gateway.lines()[:-1]  # the last is of the metrics themselves
        ended = sum(n for name, n in metrics.items() if "sessions" in name)
        return (metrics, lines) if ended == len(lines) else None

    found = wait.until(agreed)
    assert isinstance(found, tuple)
    metrics, lines = found
    kinds = Counter(
        'natwork_sessions_total{protocol="%s",outcome="%s"}'
        % (line["proto"], re.sub("denied-.*", "denied", line["outcome"]))
        for line in lines
    )
    assert kinds == {name: n for name, n in metrics.items() if "sessions" in name}
    assert len(kinds) >= 8, kinds
    for way in ("up", "down"):
        moved = sum(int(line[way]) for line in lines)
        assert metrics['natwork_bytes_total{direction="%s"}' % way] == moved
    # A source port may serve two targets.
    pairs = {(line["source"], line["address"]) for line in lines}
    made = sum(source != "-" for source, _ in pairs)
    assert metrics["natwork_connect_seconds_count"] == made
    assert 0 < metrics["natwork_connect_seconds_sum"] < 20
    assert metrics["natwork_forks_total"] >= 4 + 25
    assert metrics["natwork_log_lines_lost_total"] == 0
    assert metrics['natwork_workers{state="busy"}'] == 1
    assert metrics["natwork_workers_limit"] == 2048


def test_the_metrics_name_the_version_and_explain_themselves(
    gateway: running.Gateway,
) -> None:
    found = measured(gateway)
    assert found['natwork_build_info{version="%s"}' % program.__version__] == 1
    told = re.findall("# HELP (.*?) (.*)", curl(gateway.url + "/metrics")[2])
    assert len(told) == len(dict(told)) == 10
    for name, text in told:
        assert len(text.split()) >= 5 and text.endswith("."), name
    assert {re.sub("(_sum|_count)?([{].*)?$", "", name) for name in found} == {
        *dict(told)
    }


def test_every_outcome_has_a_place_of_its_own() -> None:
    words = {o.word for o in vars(program).values() if isinstance(o, program.Outcome)}
    places = {program.ended_by(p, w) for p in program.PROTOCOLS for w in words}
    assert len(places) == len(words) * len(program.PROTOCOLS)
    assert (
        min(places) >= program.Slot.ENDED_BY
        and max(places) < program.Scoreboard.SLOT_SIZE // 8
    )
    assert program.ended_by("new", "new") not in places
    denied = program.ended_by("http", "denied")
    for word in ("denied-rule-7", "denied-port-25", "denied-link-local"):
        assert program.ended_by("http", word) == denied


# --- The PAC file -------------------------------------------------------------


def evaluate(path: Path, hosts: list[str]) -> list[str]:
    """Return what a PAC file says of hosts, with Debian's python3-pacparser."""
    python = "/usr/bin/python3"
    probe = [python, "-c", "import pacparser"]
    if subprocess.run(probe, capture_output=True, timeout=30).returncode:
        needs.unavailable("not installed: python3-pacparser")
    done = subprocess.run(
        [python, "-c", PACPARSER, str(path)],
        input=json.dumps(hosts),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stderr) == (0, ""), done
    answers = json.loads(done.stdout)
    assert isinstance(answers, list) and len(answers) == len(hosts)
    return answers


def some_addresses(count: int) -> list[str]:
    """Return addresses of both families, half of them near the inside."""
    dice, found = random.Random(4), []
    blocks = program.networks(program.Config.inside)
    for number in range(count):
        size = 4 if number % 2 else 16
        raw = dice.randbytes(size)
        if number % 4 > 1:
            near = dice.choice([b for b in blocks if len(b[0]) == size])
            edge = int.from_bytes(dice.choice(near), "big") + dice.randint(-3, 3)
            raw = (edge % (1 << 8 * size)).to_bytes(size, "big")
        found.append(str(ipaddress.ip_address(raw)))
    return [*found, "::ffff:a00:1", "::ffff:c000:201", "::", "::1", "1::", "1:2::8:9"]


def test_the_pac_file_knows_inside_from_outside(
    gateway: running.Gateway, tmp_path: Path
) -> None:
    path = tmp_path / "proxy.pac"
    path.write_text(curl(gateway.url + "/proxy.pac")[2])
    blocks = program.networks(program.Config.inside)
    addresses = some_addresses(1000)
    wanted = [program.contains(blocks, program.address_of(a)) for a in addresses]
    answers = evaluate(path, addresses)
    assert [answer == "DIRECT" for answer in answers] == wanted
    assert 200 < sum(wanted) < 800
    proxies = {answer for answer in answers if answer != "DIRECT"}
    assert len(proxies) == 1
    named = re.findall("PROXY ([^;]+)(?:; |$)", proxies.pop())
    assert sorted(named) == sorted([*OTHERS, "127.0.0.1:%d" % gateway.address[1]])
    assert evaluate(path, ["printer", "localhost", "printer."]) == ["DIRECT"] * 3
    names = ["www.example.com", "10.0.0.1.example.com", "10.example", "a.b", "a.10"]
    assert "DIRECT" not in evaluate(path, [*names, "1.2.3", "10.0.0.1:x"])


def test_the_pac_file_offers_the_name_that_was_asked(gateway: running.Gateway) -> None:
    port = gateway.address[1]
    for host in ("localhost", "gate.test", "127.0.0.1"):
        body = curl("-H", f"Host: {host}:{port}", gateway.url + "/proxy.pac")[2]
        assert f"PROXY {host}:{port}" in body


def test_gateways_share_their_clients(natwork: running.Start) -> None:
    gateway = natwork(f"gateways={' '.join(OTHERS)}")
    orders = []
    for last in range(1, 31):
        with socket.create_connection(
            gateway.address, 10, source_address=(f"127.0.0.{last}", 0)
        ) as client:
            data = b"GET /proxy.pac HTTP/1.1\r\nHost: wpad\r\n\r\n"
            body = http_wire.exchange(client, data).body.decode()
            assert http_wire.exchange(client, data).body.decode() == body
        orders.append(tuple(re.findall('PROXY ([^;"]+)', body)))
    assert all(len(set(order)) == 3 for order in orders)
    assert sorted(Counter(order[0] for order in orders).values()) == [10, 10, 10]
    assert len(set(orders)) == 6


@pytest.mark.parametrize(
    "word", ["b", "b:", "b:0", "b:65536", ":80", "fd00::1:80", "1.2:80", '";x:80']
)
def test_a_gateway_that_is_none_is_refused(word: str, tmp_path: Path) -> None:
    for how in (["-t"], ["-o", "listen=127.0.0.1:0"]):
        done = running.command(
            *how, "-o", f"gateways=a.example:80 {word}", cwd=tmp_path
        )
        assert done.returncode == 78 and "gateways" in done.stderr, done
        assert repr(word) in done.stderr


# --- The Local Address Table --------------------------------------------------


def lat(gateway: running.Gateway, *words: str) -> dict[str, object]:
    """Return what /lat.json says, asked by curl with some words more."""
    status, _, body = curl(*words, gateway.url + "/lat.json")
    table = json.loads(body)
    assert status == 200 and isinstance(table, dict)
    return table


def test_the_local_address_table_tells_where_one_is(natwork: running.Start) -> None:
    inside = ["127.0.0.0/8", "::1", "10.1.0.0/16"]
    gateway = natwork(f"inside={' '.join(inside)}", "outside=127.0.0.2 127.0.0.3")
    host, port = gateway.address
    assert lat(gateway) == {
        "inside": inside,
        "outside": ["127.0.0.2", "127.0.0.3"],
        "domains": [],
        "socks": f"{host}:{port}",
        "mappings": False,
        "udp": True,
    }


def test_its_outside_is_what_this_box_has_now(natwork: running.Start) -> None:
    # TEST-NET-3 has nobody.
    gateway = natwork("outside=203.0.113.9 nosuch0 127.0.0.4")
    assert lat(gateway)["outside"] == ["127.0.0.4"]


def test_without_uplinks_its_outside_is_where_the_default_routes_leave_from(
    natwork: running.Start,
) -> None:
    found = [
        program.find_route(there).source for there in program.Policy.ANYWHERE.values()
    ]
    assert lat(natwork())["outside"] == [program.unpack(one) for one in found if one]


@pytest.mark.parametrize(
    "name, domains", [("gate", []), ("Gate.Corp.example", ["corp.example"])]
)
def test_its_domain_is_that_of_the_gateway(
    natwork: running.Start, name: str, domains: list[str]
) -> None:
    assert lat(natwork(f"name={name}"))["domains"] == domains


@pytest.mark.parametrize("host", ["wpad", "gate.evil.example"])
def test_it_answers_any_host_and_never_quotes_it(
    gateway: running.Gateway, host: str
) -> None:
    assert lat(gateway, "-H", f"Host: {host}") == lat(gateway)


@needs.ipv6
def test_its_socks_is_the_address_by_which_one_came(tmp_path: Path) -> None:
    gateway = running.Gateway.configured(tmp_path, listen="[::]:0 127.0.0.1:0")
    for (_, port), host in zip(gateway.listening(), ("[::1]", "127.0.0.1")):
        _, _, body = curl(f"http://{host}:{port}/lat.json")
        assert json.loads(body)["socks"] == f"{host}:{port}"
    gateway.stop()


def test_without_its_chapter_there_is_no_udp(tmp_path: Path) -> None:
    for name in ("natwork.py", "natwork_pages.py"):
        (tmp_path / name).write_bytes((running.ROOT / name).read_bytes())
    command = [sys.executable, str(tmp_path / "natwork.py")]
    gateway = running.Gateway.activated(tmp_path, program=command)
    assert lat(gateway)["udp"] is False
    gateway.stop()
