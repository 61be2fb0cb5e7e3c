"""Own pages, a chapter of NATWork: what a client asks of the gateway itself.

    /               the live table, for a browser
    /table.json     the same as data
    /metrics        figures for Prometheus, in its text format
    /proxy.pac      which gateway a browser asks for what; also /wpad.dat

It is not a web server and not a way to change anything: it reads the scoreboard
and answers GET and HEAD.  All but the last two want a Host field that is this
gateway's (RFC 9110 section 7.2): a page of another site that rebinds its name to
our address sends that name, and so is not shown the table.
"""
# SPDX-License-Identifier: MIT

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

import natwork
from natwork import Exchange
from natwork import Refused
from natwork import Scoreboard

VERSION = "0.1.0"

# The script fills the page, by textContent, which makes words of what is hostile.
HTML = """\
<!doctype html>
<html lang="en">
<meta charset="utf-8">
<title>%(name)s</title>
<meta name="viewport" content="width=device-width">
<meta name="color-scheme" content="light dark">
<link rel="icon" href="data:,">
<style nonce="%(nonce)s">
body { font: 15px/1.4 system-ui, sans-serif; margin: 1.5em }
h1 { font-size: 1.3em; overflow-wrap: anywhere }
dl { display: flex; flex-wrap: wrap; gap: .6em 2em }
dt, td::before { font-size: 13px; opacity: .7 }
dd { font-size: 1.5em; margin: 0 }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { border-bottom: 1px solid #8886; padding: .3em .7em; text-align: left }
td { overflow-wrap: anywhere; vertical-align: top }
td:is(:nth-child(1), :nth-child(4), :nth-child(6), :nth-child(7)) { min-width: 9em }
:is(th, td):is(:nth-child(2), :nth-child(3), :nth-child(n + 8)) { text-align: right }
td:nth-child(n + 8) { white-space: nowrap }
.stale { opacity: .5 }
@media (max-width: 78em) {
  table, tbody { display: block }
  thead { display: none }
  tr { border: 1px solid #8886; display: grid; gap: .4em 1em; padding: .6em;
    grid-template-columns: repeat(auto-fill, minmax(6em, 1fr)); margin-bottom: .8em }
  td { border: 0; min-width: 0 !important; padding: 0; text-align: left !important }
  td:nth-child(4), td:nth-child(6) { grid-column: span 2 }
  td::before { content: attr(data-head); display: block }
}
</style>
<h1>%(name)s</h1>
<noscript>This page needs JavaScript; /table.json has the same as data.</noscript>
<dl>%(figures)s</dl>
<table><thead><tr>%(heads)s</tr></thead><tbody></tbody></table>
<p></p>
<script nonce="%(nonce)s">
const heads = [...document.querySelectorAll("th")].map(th => th.textContent);
const body = document.querySelector("tbody"), count = document.querySelector("p");
let before = new Map(), then = 0;
const two = n => String(n).padStart(2, "0"), whole = n => n.toLocaleString("en");
const clock = s => (s = Math.floor(s), Math.floor(s / 3600) + ":" +
  two(Math.floor(s / 60) %% 60) + ":" + two(s %% 60));
function put(place, text) {
  if (place && place.textContent !== text) place.textContent = text;
}
function show({gateway: {name, ...figures}, sessions}) {
  for (const [id, value] of Object.entries(figures))
    put(document.getElementById(id), id === "uptime" ? clock(value) : whole(value));
  const now = performance.now(), moved = new Map();
  while (body.rows.length > sessions.length) body.deleteRow(-1);
  sessions.forEach((row, n) => {
    const key = row.pid + " " + row.source_ip + " " + row.original_source_port;
    const speed = (row.up + row.down - before.get(key)) / (now - then) * 1000;
    moved.set(key, row.up + row.down);
    const {age, up, down, pid, ...words} = row;
    const cells = [...Object.values(words).map(word => String(word ?? "-")),
      clock(age), whole(up), whole(down),
      speed > 0 ? whole(Math.round(speed)) + "/s" : "-", String(pid)];
    const line = body.rows[n] || body.insertRow();
    cells.forEach((text, m) => {
      const cell = line.cells[m] || line.insertCell();
      cell.dataset.head = heads[m];
      put(cell, text);
    });
  });
  put(count, "Sessions: " + whole(sessions.length));
  before = moved;
  then = now;
}
async function refresh() {
  try {
    show(await (await fetch("/table.json")).json());
    document.body.className = "";
  } catch {
    document.body.className = "stale";
    put(count, "The gateway does not answer; this is what was.");
  }
  setTimeout(refresh, 2000);
}
refresh();
</script>
"""
# Nothing from elsewhere, nothing inline but ours, in nobody's frame.
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
    left = sides[0] ? sides[0].split(":") : [];
    right = sides[1] ? sides[1].split(":") : [];
    while (left.length + right.length < 8) left.push("0");
    left = left.concat(right);
    for (i = 0; i < 8; i++) found += ("000" + left[i]).slice(-4);
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


def ended(board: Scoreboard) -> dict[tuple[str, str], int]:
    """Return how many sessions have ended, by protocol and outcome."""
    counts = {}
    for proto in natwork.PROTOCOLS:
        for word in natwork.OUTCOME_WORDS:
            if count := board.total(natwork.ended_by(proto, word)):
                counts[proto, word] = count
    return counts


def figures(exchange: Exchange) -> dict[str, int]:
    """Return the gateway's figures, by name."""
    board = exchange.worker.board
    states, served, refused, failed = board.states(), 0, 0, 0
    for (_, word), count in ended(board).items():
        outcome = natwork.OUTCOMES.get(word, natwork.BROKEN)
        if outcome in (natwork.OK, natwork.ENDED):
            served += count
        elif outcome is natwork.OUTSIDER or outcome.error.startswith("http_request"):
            refused += count
        else:
            failed += count
    idle = states.count(natwork.IDLE_STATE)
    return {
        "idle": idle,
        "busy": len(states) - states.count(natwork.FREE) - idle,
        "limit": exchange.config.max_workers,
        "served": served,
        "refused": refused,
        "failed": failed,
        "uptime": int(time.time()) - board.words[natwork.BEGAN],
    }


def table_page(exchange: Exchange, nonce: str) -> str:
    """Return the page whose script, known by its nonce, shows the table."""
    *columns, last = natwork.COLUMNS
    names = figures(exchange)
    return HTML % {
        "name": exchange.config.name,
        "nonce": nonce,
        "figures": "".join(f'<div><dt>{one}<dd id="{one}">-</div>' for one in names),
        "heads": "".join(f"<th>{one}" for one in [*columns, "Moving", last]),
    }


def table_json(exchange: Exchange) -> str:
    """Return the figures and the sessions that go on, as JSON (RFC 8259)."""
    import json

    board = exchange.worker.board
    gateway = {"name": exchange.config.name, **figures(exchange)}
    return json.dumps({"gateway": gateway, "sessions": natwork.table_rows(board)})


def metrics(exchange: Exchange) -> str:
    """Return the figures in the text format of Prometheus, version 0.0.4."""
    found, board = figures(exchange), exchange.worker.board
    words = board.words
    by_kind = {
        f'{{protocol="{proto}",outcome="{word}"}}': count
        for (proto, word), count in ended(board).items()
    }
    by_way = {
        '{direction="up"}': board.total(natwork.UPS),
        '{direction="down"}': board.total(natwork.DOWNS),
    }
    by_state = {f'{{state="{state}"}}': found[state] for state in ("idle", "busy")}
    took = {
        "_sum": board.total(natwork.CONNECTING) / 1e6,
        "_count": board.total(natwork.CONNECTIONS),
    }
    values: dict[str, dict[str, Any]] = {
        "build_info": {f'{{version="{natwork.__version__}"}}': 1},
        "sessions_total": by_kind,
        "bytes_total": by_way,
        "connect_seconds": took,
        "workers": by_state,
        "workers_limit": {"": found["limit"]},
        "forks_total": {"": words[natwork.FORKS]},
        "forks_failed_total": {"": words[natwork.FORKS_FAILED]},
        "log_lines_lost_total": {"": board.total(natwork.LOST)},
        "start_time_seconds": {"": words[natwork.BEGAN]},
    }
    lines = []
    for name, (kind, told) in METRICS.items():
        lines.append(f"# HELP natwork_{name} {told}\n# TYPE natwork_{name} {kind}\n")
        lines += [f"natwork_{name}{at} {value}\n" for at, value in values[name].items()]
    return "".join(lines)


def other_gateways(config: natwork.Config) -> list[str]:
    """Return the words of `gateways`; raise ConfigError for what is not HOST:PORT."""
    words = config.gateways.split()
    for word in words:
        try:
            natwork.parse_authority(os.fsencode(word), 0)
        except Refused:
            raise config.refuse("gateways", f"{word!r} is not HOST:PORT") from None
    return words


def pac(exchange: Exchange) -> str:
    """Return the file that tells a browser what to ask which gateway for.

    The gateways stand in an order drawn from the client's address: so they share
    the clients, and each client keeps to its own.
    """
    worker, host = exchange.worker, exchange.target.host
    here, port = exchange.client.sock.getsockname()[:2]
    if not worker.policy.means_us(host, port):
        host = here.partition("%")[0].removeprefix("::ffff:")
    own = natwork.endpoint((host, port))
    left, order = sorted({own, *other_gateways(exchange.config)}), []
    number = int.from_bytes(natwork.address_of(worker.client.host), "big")
    while left:
        number, place = divmod(number, len(left))
        order.append(f"PROXY {left.pop(place)}")
    blocks = [f'["{a.hex()}", "{b.hex()}"]' for a, b in worker.policy.inside]
    return PAC % (", ".join(blocks), "; ".join(order))


def admit(exchange: Exchange) -> None:
    """Refuse a rebound name, and a user that is not known; raise Refused.

    For its own pages the gateway is an origin server: RFC 9110 section 11.6.2.  A
    client that used it as a proxy has been identified.
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
    head, nonce = exchange.head, os.urandom(16).hex()
    pac_file = "application/x-ns-proxy-autoconfig", lambda: pac(exchange)
    pages: dict[bytes, tuple[str, Callable[[], str]]] = {
        b"/": ("text/html; charset=utf-8", lambda: table_page(exchange, nonce)),
        b"/table.json": ("application/json", lambda: table_json(exchange)),
        b"/metrics": ("text/plain; version=0.0.4", lambda: metrics(exchange)),
        b"/proxy.pac": pac_file,
        b"/wpad.dat": pac_file,
    }
    page = pages.get(head.path.partition(b"?")[0])
    if page is not pac_file:
        admit(exchange)
    if not page:
        raise Refused(natwork.NO_PAGE, "the gateway has no such page")
    if head.method not in (b"GET", b"HEAD"):
        why = f"{head.method.decode()} of a page of the gateway"
        raise Refused(natwork.BAD_METHOD, why)
    kind, text = page
    lines = f"Content-Type: {kind}\r\n{GUARDS.replace('NONCE', nonce)}"
    exchange.answer("200 OK", lines.encode(), text().encode())


def join(chapters: natwork.Chapters) -> None:
    """Answer for the gateway itself from now on; raise ConfigError."""
    import json  # noqa: F401  # later a worker may be unable to read it

    other_gateways(chapters.config)
    chapters.schemes[natwork.OWN_PAGE] = own_page
