"""Own pages, a chapter of NATWork: what a client asks of the gateway itself.

    /               the live table, for a browser
    /table.json     the same as data; ?source_port=N for what leaves from port N
    /metrics        figures for Prometheus, in its text format
    /proxy.pac      which gateway a browser asks for what; also /wpad.dat
    /lat.json       the Local Address Table: what natrun need not ask the gateway for

It is not a web server and not a way to change anything: it reads the scoreboard
and answers GET and HEAD.  All but the PAC files and /lat.json want a Host field that
names this gateway (RFC 9110 section 7.2).  A page of another site whose name is rebound
to our address sends that name, so it cannot read the table.
"""
# SPDX-License-Identifier: MIT

from __future__ import annotations

import itertools
import os
import re
import time
from collections.abc import Callable
from typing import Any

import natwork
from natwork import Exchange
from natwork import Refused
from natwork import Slot

VERSION = "0.1.0"

# The table's columns, and their keys in a row.  The page works out "Moving" itself.
NAMES = [*natwork.COLUMNS[:-1], "Moving", natwork.COLUMNS[-1]]
KEYS = [name.lower().replace(" ", "_") for name in NAMES]
ESCAPED = {ord(c): f"&#{ord(c)};" for c in "&<>\"'"}

# The script keeps the rows fresh by textContent: hostile markup is shown as text.
HTML = """\
<!doctype html>
<html lang="en">
<meta charset="utf-8">
<title>%(name)s - NATWork</title>
<meta name="viewport" content="width=device-width">
<link rel="icon" href="data:,">
<style nonce="%(nonce)s">
:root { color-scheme: light dark; --back: light-dark(#fff, #14171a);
  --text: light-dark(#1c2126, #e3e7eb); --soft: light-dark(#5c6670, #98a3ae);
  --line: light-dark(#e2e6ea, #2b3138) }
* { box-sizing: border-box; margin: 0; overflow-wrap: anywhere }
body { background: var(--back); color: var(--text); padding: 12px 16px;
  font: 13px/1.4 system-ui, sans-serif; font-variant-numeric: tabular-nums }
header, nav, #bar, dl { display: flex; flex-wrap: wrap; gap: 4px 12px;
  align-items: baseline }
h1 { font-size: 20px; margin-right: auto }
small, dt, th, p, ::before, ::placeholder { color: var(--soft); font-size: 12px;
  font-weight: normal }
a { color: inherit }
dl { gap: 4px 32px; margin: 10px 0 }
dd { font-size: 17px }
input { background: none; border: 1px solid var(--soft); border-radius: 4px;
  font: inherit; margin-left: 6px; padding: 4px 8px; width: 260px }
table { border-spacing: 0; table-layout: fixed; width: 100%% }
th, td { border-bottom: 1px solid var(--line); padding: 3px 7px; text-align: left }
td { overflow: hidden; text-overflow: ellipsis; white-space: nowrap }
th { background: var(--back); position: sticky; top: 0; vertical-align: bottom }
button { background: none; border: 0; color: inherit; cursor: pointer; font: inherit;
  padding: 4px 0; text-align: inherit }
button:hover, [aria-sort] { color: var(--text) }
[aria-sort] button::after { content: " \\25b2" }
[aria-sort="descending"] button::after { content: " \\25bc" }
tbody tr:hover { background: var(--line) }
.stale { opacity: .5 }
@media (min-width: 1201px) {
  table { margin: 8px -7px 0; table-layout: auto; width: calc(100%% + 14px) }
  .source_ip { max-width: max(14vw, 100vw - 1610px) }
  .destination { max-width: 17vw }
  .user { max-width: max(9vw, 100vw - 1700px) }
  .host { max-width: 0; width: 100%% }  /* what the others leave */
  [class$="port"], .protocol, .up, .down, .pid { min-width: 64px }
  .age, .moving { min-width: 74px }
  :is([class$="port"], .age, .up, .down, .moving, .pid) { text-align: right }
}
@media (max-width: 1200px) {  /* a card for each session */
  body { padding: 8px }
  dl { gap: 0 14px }
  :is(dt, dd) { display: inline }
  dd { font-size: 14px; margin-left: 5px }
  table, tbody { display: block }
  thead tr { display: flex; flex-wrap: wrap; gap: 0 14px; padding: 4px 0 }
  thead tr::before { content: "Sort by"; padding: 4px 0 }
  th { border: 0; padding: 0; position: static }
  tbody { display: grid; gap: 8px; align-items: start;
    grid-template-columns: repeat(auto-fill, minmax(min(340px, 100%%), 1fr)) }
  tbody tr { border: 1px solid var(--line); border-radius: 6px; padding: 6px 8px;
    display: grid; gap: 1px 6px; grid-template-columns: 7fr 8fr 7fr 8fr }
  tbody tr:hover td { white-space: normal }  /* a tap shows long names whole */
  td { border: 0; padding: 0; font-size: 12px }
  td:is(.source_ip, .destination) { grid-column: span 2 }
  td:is(.host, .age) { order: -1 }
  td.host { font-size: 13px; font-weight: bold; grid-column: span 3 }
  td.original_source_port::before { content: "port " }
  td.new_source_port::before { content: "new " }
  td:is(.up, .down, .pid)::before { content: attr(class) " " }
}
@media (scripting: none) { label { display: none } td { white-space: normal } }
</style>
<header><h1>NATWork <small>%(name)s, version %(version)s</small></h1>
<nav aria-label="The same as data"><a href="/metrics">/metrics</a>
<a href="/table.json">/table.json</a> <a href="/proxy.pac">/proxy.pac</a></nav></header>
<noscript>Without JavaScript this shows the state at loading, in seconds and bytes;
the same as data is /table.json.</noscript>
<dl>%(figures)s</dl>
<div id="bar"><label>Filter<input type="search" autocomplete="off"
placeholder="client, host, user or protocol"></label><p>Sessions: %(count)s</p></div>
<table aria-label="Sessions"><thead><tr>%(heads)s</tr></thead>
<tbody>%(rows)s</tbody></table>
<script nonce="%(nonce)s">
const heads = [...document.querySelectorAll("th")];
const [filter, count, body] =
  ["input", "p", "tbody"].map(name => document.querySelector(name));
const {compare} = new Intl.Collator("en", {numeric: true});  // 9 stands before 10
let sessions = [], before = new Map(), then = 0, column = "", way = 1;
const whole = n => n.toLocaleString("en");
const clock = s => [s / 3600, s / 60 %% 60, s %% 60].map(
  n => String(Math.max(0, Math.floor(n))).padStart(2, "0")).join(":");
function amount(n) {
  let unit = 0;
  for (; n >= 999.5 && unit < 4; unit++) n /= 1000;
  return n.toFixed(unit && n < 9.95 ? 1 : 0) + [" B", " kB", " MB", " GB", " TB"][unit];
}
const forms = {age: clock, up: amount, down: amount,
  moving: n => n ? amount(n) + "/s" : "-"};
function put(place, text) {
  if (place && place.textContent !== text) place.textContent = text;
}
function draw() {
  if (!then) return;  // the page's own rows stay until the first refresh
  const wanted = filter.value.toLowerCase().split(" ");
  const shown = sessions.filter(row => wanted.every(word => row.text.includes(word)));
  if (column) shown.sort((a, b) => way * compare(a[column] ?? "", b[column] ?? ""));
  while (body.rows.length > shown.length) body.deleteRow(-1);
  shown.forEach((row, n) => {
    const line = body.rows[n] || body.insertRow();
    heads.forEach(({className: key}, m) => {
      const cell = line.cells[m] || line.insertCell();
      cell.className = key;
      cell.title = row[key] ?? "";
      put(cell, key in forms ? forms[key](row[key]) : String(row[key] ?? "-"));
    });
  });
  if (document.body.className) return;  // stale: the line says so
  const all = whole(sessions.length);
  put(count, "Sessions: " + (filter.value ? whole(shown.length) + " of " + all : all));
}
function learn({gateway: {name, ...figures}, sessions: rows}) {
  for (const [id, value] of Object.entries(figures))
    put(document.getElementById(id), id === "uptime" ? clock(value) : whole(value));
  const now = performance.now(), moved = new Map();
  for (const row of rows) {
    const key = row.pid + " " + row.source_ip + " " + row.original_source_port;
    moved.set(key, row.up + row.down);
    const speed = (row.up + row.down - before.get(key)) / (now - then) * 1000;
    row.moving = Math.max(0, Math.round(speed)) || 0;  // NaN for a new row
    const {source_ip, host, user, protocol} = row;
    row.text = [source_ip, host, user, protocol].join(" ").toLowerCase();
  }
  [sessions, before, then] = [rows, moved, now];
  draw();
}
async function refresh() {
  try {
    const signal = AbortSignal.timeout(8000);  // a dead network gives no error
    const fresh = await (await fetch("/table.json", {signal})).json();
    document.body.className = "";
    learn(fresh);
  } catch {
    document.body.className = "stale";
    put(count, "No fresh state; this is the last one known.");
  }
  setTimeout(refresh, 2000);
}
for (const head of heads) head.firstChild.onclick = () => {
  const key = head.className;
  way = key === column ? -way : key in forms ? -1 : 1;  // the largest figure first
  column = key;
  for (const other of heads) other.removeAttribute("aria-sort");
  head.setAttribute("aria-sort", way > 0 ? "ascending" : "descending");
  draw();
};
filter.oninput = draw;
refresh();
</script>
"""
# A page loads nothing from elsewhere, runs only our inline code, and fits in no frame.
GUARDS = (
    "Cache-Control: no-store\r\nX-Content-Type-Options: nosniff\r\n"
    "X-Frame-Options: DENY\r\nCross-Origin-Resource-Policy: same-origin\r\n"
    "Content-Security-Policy: default-src 'none'; connect-src 'self'; img-src data:; "
    "script-src 'nonce-NONCE'; style-src 'nonce-NONCE'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'\r\n"
)
PAC = """\
function packed(host) {
  var found = "", sides = host.split("::"), left, right, i;
  if (/^\\d+(\\.\\d+){3}$/.test(host)) {
    left = host.split(".");
    for (i = 0; i < 4; i++) found += ("0" + (+left[i]).toString(16)).slice(-2);
  } else if (host.indexOf(":") >= 0) {
    left = sides[0].split(":");
    right = (sides[1] || "").split(":");
    while (left.length + right.length < 8) left.push("");
    for (i = 0; i < 8; i++) found += ("0000" + left.concat(right)[i]).slice(-4);
  }
  return found.replace(/^0{20}ffff/, "");
}
function FindProxyForURL(url, host) {
  var inside = [%s];
  host = host.toLowerCase().replace(/[\\[\\]]|%%.*|\\.$/g, "");
  var address = packed(host), i;
  if (!/[.:]/.test(host)) return "DIRECT";
  for (i = 0; i < inside.length; i++)
    if (address.length == inside[i][0].length &&
        inside[i][0] <= address && address <= inside[i][1]) return "DIRECT";
  return "%s";
}
"""


METRICS = {
    "build_info": ("gauge", "The version of NATWork that runs; always 1."),
    "sessions_total": ("counter", "Sessions that ended, by protocol and by outcome."),
    "bytes_total": ("counter", "Bytes of ended sessions, to servers (up) and back."),
    "connect_seconds": ("summary", "Seconds to look up a host and connect to it."),
    "workers": ("gauge", "Worker processes; an idle one waits for its next client."),
    "workers_limit": ("gauge", "The most worker processes that there may be."),
    "forks_total": ("counter", "Worker processes started since the gateway started."),
    "forks_failed_total": ("counter", "Worker processes the system refused to start."),
    "log_lines_lost_total": ("counter", "Access log lines that could not be written."),
    "start_time_seconds": ("gauge", "When the gateway started, as a Unix time."),
}
# For a client that asks by a name that is not known to be ours.
NAME_IT = (
    "Use the gateway's address. If the name is the gateway's own, the setting `name` "
    "in natwork.conf makes it known. " + natwork.ASK_PROXY
)


def ended(board: natwork.Scoreboard) -> dict[tuple[str, str], int]:
    """Return how many sessions have ended, by protocol and outcome."""
    kinds = itertools.product(natwork.PROTOCOLS, natwork.OUTCOME_WORDS)
    counts = ((kind, sum(board.column(natwork.ended_by(*kind)))) for kind in kinds)
    return {kind: count for kind, count in counts if count}


def figures(exchange: Exchange) -> dict[str, int]:
    """Return the gateway's figures, by name."""
    board = exchange.worker.board
    states, counts = board.states(), dict.fromkeys(("served", "refused", "failed"), 0)
    for (_, word), count in ended(board).items():
        outcome = natwork.OUTCOMES.get(word, natwork.BROKEN)
        served = outcome in (natwork.OK, natwork.ENDED)
        denied = outcome is natwork.OUTSIDER or outcome.error == natwork.DENIED.error
        counts["served" if served else "refused" if denied else "failed"] += count
    return {
        "idle": states.count(natwork.IDLE_STATE),
        "busy": states.count(natwork.BUSY) + states.count(natwork.SILENT),
        "limit": exchange.config.max_workers,
        **counts,
        "uptime": int(time.monotonic()) - board.words[board.BEGAN],
    }


def table_row(row: dict[str, Any]) -> str:
    """Return the row of a session in HTML, its words escaped."""
    cells = ((key, "-" if row.get(key) is None else str(row[key])) for key in KEYS)
    tags = (f'<td class="{key}">{text.translate(ESCAPED)}' for key, text in cells)
    return "<tr>" + "".join(tags)


def table_page(exchange: Exchange, nonce: str) -> str:
    """Return the page whose script, known by its nonce, keeps the table fresh."""
    rows = natwork.table_rows(exchange.worker.board)
    return HTML % {
        "name": exchange.config.name,
        "version": natwork.__version__,
        "nonce": nonce,
        "figures": "".join(
            f'<div><dt>{name}<dd id="{name}">{value:,}</div>'
            for name, value in figures(exchange).items()
        ),
        "count": len(rows),
        "heads": "".join(
            f'<th class="{key}"><button type="button">{name}</button>'
            for key, name in zip(KEYS, NAMES)
        ),
        "rows": "".join(map(table_row, rows)),
    }


def table_data(exchange: Exchange) -> dict[str, Any]:
    """Return the figures and the sessions that go on, for JSON (RFC 8259).

    With ?source_port=N it has only those that leave from port N; raise Refused.
    """
    rows = natwork.table_rows(exchange.worker.board)
    query = exchange.target.path.partition(b"?")[2]
    if asked := re.search(b"(?:^|&)source_port=([^&]*)", query):
        if not re.fullmatch(b"[0-9]{1,5}", asked[1]):
            raise Refused(natwork.BAD_REQUEST, "source_port is not a port's number")
        rows = [row for row in rows if row["new_source_port"] == int(asked[1])]
    gateway = {"name": exchange.config.name, **figures(exchange)}
    return {"gateway": gateway, "sessions": rows}


def metrics(exchange: Exchange) -> str:
    """Return the figures in the text format of Prometheus, version 0.0.4."""
    found, board = figures(exchange), exchange.worker.board
    words, total = board.words, [sum(board.column(n)) for n in range(Slot.PEER)]
    since_1970 = round(time.time() - time.monotonic())  # when monotonic() was 0
    values: list[tuple[str, str, float]] = [
        ("build_info", f'{{version="{natwork.__version__}"}}', 1),
        *(
            ("sessions_total", f'{{protocol="{proto}",outcome="{word}"}}', count)
            for (proto, word), count in ended(board).items()
        ),
        ("bytes_total", '{direction="up"}', total[Slot.UPS]),
        ("bytes_total", '{direction="down"}', total[Slot.DOWNS]),
        ("connect_seconds", "_sum", total[Slot.CONNECTING] / 1e6),
        ("connect_seconds", "_count", total[Slot.CONNECTIONS]),
        ("workers", '{state="idle"}', found["idle"]),
        ("workers", '{state="busy"}', found["busy"]),
        ("workers_limit", "", found["limit"]),
        ("forks_total", "", words[board.FORKS]),
        ("forks_failed_total", "", words[board.FORKS_FAILED]),
        ("log_lines_lost_total", "", total[Slot.LOST]),
        ("start_time_seconds", "", words[board.BEGAN] + since_1970),
    ]
    lines = []
    for name, (kind, told) in METRICS.items():
        lines.append(f"# HELP natwork_{name} {told}\n# TYPE natwork_{name} {kind}\n")
        own = ((at, value) for one, at, value in values if one == name)
        lines += [f"natwork_{name}{at} {value}\n" for at, value in own]
    return "".join(lines)


def check_gateway(word: str) -> None:
    """Raise ValueError for a word of `gateways` that is not HOST:PORT."""
    try:
        natwork.parse_authority(os.fsencode(word), 0)
    except Refused as refusal:
        raise ValueError(f"{word!r} is not HOST:PORT ({refusal.detail})") from None


def pac(exchange: Exchange) -> str:
    """Return the file that tells a browser what to ask which gateway for.

    The client's address determines the order of the gateways, so clients spread over
    them, and each client keeps to one.
    """
    worker, host = exchange.worker, exchange.target.host
    here, port = exchange.client.sock.getsockname()[:2]
    if not worker.policy.means_us(host, port):
        host = natwork.unpack(natwork.address_of(here))
    own = natwork.endpoint((host, port))
    left, order = sorted({own, *exchange.config.gateways.split()}), []
    number = int.from_bytes(natwork.address_of(worker.client.host), "big")
    while left:
        number, place = divmod(number, len(left))
        order.append(f"PROXY {left.pop(place)}")
    blocks = [f'["{a.hex()}", "{b.hex()}"]' for a, b in worker.policy.inside]
    return PAC % (", ".join(blocks), "; ".join(order))


def local_address_table(exchange: Exchange) -> dict[str, Any]:
    """Return what natrun needs to tell which targets to ask us for; raise OSError.

    The domain of the inside is what follows the first dot of `name`.
    """
    worker, config = exchange.worker, exchange.config
    here, port = exchange.client.sock.getsockname()[:2]
    return {
        "inside": config.inside.split(),
        "outside": [natwork.unpack(packed) for packed in worker.policy.outside()],
        "domains": config.name.lower().split(".", 1)[1:],
        "socks": natwork.endpoint((natwork.unpack(natwork.address_of(here)), port)),
        "mappings": config.mappings,
        "udp": worker.chapters.socks is not None,
    }


def admit(exchange: Exchange) -> None:
    """Refuse a rebound name, and a client without a known user; raise Refused.

    For its own pages the gateway is an origin server: RFC 9110 section 11.6.2.  If the
    client asked it as a proxy, that has settled the user.
    """
    host, port = exchange.target.host, exchange.client.sock.getsockname()[1]
    if not exchange.worker.policy.means_us(host, port):
        why = f"{host or 'no host'} is not this gateway"
        raise Refused(natwork.BAD_HOST._replace(advice=NAME_IT), why)
    if exchange.session.user != "-":
        return
    try:
        exchange.identify(b"authorization")
    except Refused as refusal:
        if refusal.outcome.status == 407:
            refusal.outcome = refusal.outcome._replace(status=401)
        raise


def own_page(exchange: Exchange) -> None:
    """Answer what was asked of the gateway itself; raise Refused."""
    import json

    method, nonce = exchange.session.method, os.urandom(16).hex()
    pac_file = "application/x-ns-proxy-autoconfig", lambda: pac(exchange)
    lat_file = "application/json", lambda: json.dumps(local_address_table(exchange))
    pages: dict[bytes, tuple[str, Callable[[], str]]] = {
        b"/": ("text/html; charset=utf-8", lambda: table_page(exchange, nonce)),
        b"/table.json": ("application/json", lambda: json.dumps(table_data(exchange))),
        b"/metrics": ("text/plain; version=0.0.4", lambda: metrics(exchange)),
        b"/proxy.pac": pac_file,
        b"/wpad.dat": pac_file,
        b"/lat.json": lat_file,
    }
    page = pages.get(exchange.target.path.partition(b"?")[0])
    if page not in (pac_file, lat_file):
        admit(exchange)
    if not page:
        raise Refused(natwork.NO_PAGE, "the gateway has no such page")
    if method not in ("GET", "HEAD"):
        raise Refused(natwork.BAD_METHOD, f"{method} of a page of the gateway")
    kind, text = page
    lines = f"Content-Type: {kind}\r\n{GUARDS.replace('NONCE', nonce)}"
    exchange.answer("200 OK", lines.encode(), text().encode())


def join(chapters: natwork.Chapters) -> None:
    """Answer for the gateway itself from now on."""
    import json  # noqa: F401  # later a worker may be unable to read it

    chapters.config.parsed("gateways", check_gateway)
    chapters.schemes[natwork.OWN_PAGE] = own_page
