"""Own pages, a chapter of NATWork: what a client asks of the gateway itself.

The live table, the same as data, figures for Prometheus, and the file that tells
a browser when to use which gateway.  A page of another site that rebinds its
name to our address sends that name in Host, and so is not shown the table.
Nothing here changes anything.
"""
# SPDX-License-Identifier: MIT

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

from natwork import BAD_HOST
from natwork import BAD_METHOD
from natwork import BEGAN
from natwork import BROKEN
from natwork import COLUMNS
from natwork import DOWNS
from natwork import ENDED
from natwork import FIRST_IDLE
from natwork import FORKS
from natwork import FORKS_FAILED
from natwork import FREE
from natwork import LOST
from natwork import MADE
from natwork import MADE_IN
from natwork import MARKUP
from natwork import MAX_WORKERS
from natwork import NO_PAGE
from natwork import OK
from natwork import OURSELVES
from natwork import OUTCOME_AT
from natwork import OUTCOMES
from natwork import OUTSIDER
from natwork import PROTOCOLS
from natwork import ROWS
from natwork import SLOT_SIZE
from natwork import UPS
from natwork import USED
from natwork import Chapters
from natwork import Config
from natwork import Http
from natwork import Outcome
from natwork import Policy
from natwork import Refused
from natwork import RequestHead
from natwork import Scoreboard
from natwork import Target
from natwork import address_of
from natwork import ended_by
from natwork import endpoint
from natwork import parse_authority
from natwork import table_rows

VERSION = "0.1.0"

HTML = """\
<!doctype html>
<html lang="en">
<meta charset="utf-8">
<title>%(name)s</title>
<meta name="viewport" content="width=device-width">
<meta name="color-scheme" content="light dark">
<link rel="icon" href="data:,">
<noscript><meta http-equiv="refresh" content="5"></noscript>
<style nonce="%(nonce)s">
body { font: 15px/1.4 system-ui, sans-serif; margin: 1.5em }
h1 { font-size: 1.3em; overflow-wrap: anywhere }
dl { display: flex; flex-wrap: wrap; gap: .6em 2em }
dt, td::before { font-size: 13px; opacity: .7 }
dd { font-size: 1.5em; margin: 0; font-variant-numeric: tabular-nums }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { border-bottom: 1px solid #8886; padding: .3em .7em; text-align: left }
th { font-weight: 600; vertical-align: bottom }
td { overflow-wrap: anywhere; vertical-align: top }
td:is(:nth-child(1), :nth-child(4), :nth-child(6), :nth-child(7)) { min-width: 9em }
:is(th, td):is(:nth-child(2), :nth-child(3), :nth-child(n + 8)) { text-align: right }
td:nth-child(n + 8) { white-space: nowrap }
.stale { opacity: .5 }
@media (max-width: 78em) {
  body { margin: 1em }
  table { display: block }
  thead { display: none }
  tbody { display: grid; gap: .8em;
    grid-template-columns: repeat(auto-fill, minmax(min(20em, 100%%), 1fr)) }
  tr { border: 1px solid #8886; border-radius: 6px; display: grid; gap: .4em 1em;
    align-content: start; grid-template-columns: repeat(3, 1fr); padding: .6em }
  td { border: 0; min-width: 0 !important; padding: 0; text-align: left !important }
  td:nth-child(-n + 3) { align-self: end }
  td:nth-child(4), td:nth-child(6) { grid-column: span 2 }
  td::before { content: attr(data-head); display: block }
}
</style>
<h1>%(name)s</h1>
<dl>%(figures)s</dl>
<table><thead><tr>%(heads)s</tr></thead><tbody>%(rows)s</tbody></table>
<p>%(count)s</p>
<script nonce="%(nonce)s">
const heads = [...document.querySelectorAll("th")].map(th => th.textContent);
const body = document.querySelector("tbody"), count = document.querySelector("p");
let before = new Map(), then = 0;
const two = n => String(n).padStart(2, "0"), whole = n => n.toLocaleString("en");
const clock = s => (s = Math.floor(s), Math.floor(s / 3600) + ":" +
  two(Math.floor(s / 60) %% 60) + ":" + two(s %% 60));
function put(place, text) {
  if (place.textContent !== text) place.textContent = text;
}
function show({gateway, sessions}) {
  const now = performance.now(), moved = new Map();
  for (const [name, value] of Object.entries(gateway)) {
    const place = document.getElementById(name);
    if (place) put(place, name === "uptime" ? clock(value) : whole(value));
  }
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


def total(board: Scoreboard, word: int) -> int:
    """Return the sum of one word of all slots that ever were used."""
    step, end = SLOT_SIZE // 8, ROWS + board.words[USED] * SLOT_SIZE
    return sum(board.words[ROWS // 8 + word : end // 8 : step])


def ended(board: Scoreboard) -> dict[tuple[str, str], int]:
    """Return how many sessions have ended, by protocol and outcome."""
    kinds = [(proto, word) for proto in PROTOCOLS for word in OUTCOME_AT]
    counts = {kind: total(board, ended_by(*kind)) for kind in kinds}
    return {kind: count for kind, count in counts.items() if count}


def figures(board: Scoreboard) -> dict[str, int]:
    """Return the master's figures."""
    states = board.states()
    idle = sum(state >= FIRST_IDLE for state in states)
    found = {
        "idle": idle,
        "busy": len(states) - states.count(FREE) - idle,
        "limit": board.words[MAX_WORKERS],
        "served": 0,
        "refused": 0,
        "failed": 0,
        "uptime": int(time.time()) - board.words[BEGAN],
    }
    for (_, word), count in ended(board).items():
        outcome = OUTCOMES.get(word, BROKEN)
        if outcome in (OK, ENDED):
            found["served"] += count
        elif outcome is OUTSIDER or outcome.error.startswith("http_request"):
            found["refused"] += count
        else:
            found["failed"] += count
    return found


def clock(seconds: float) -> str:
    minutes, second = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{second:02}"


def table_page(http: Http, nonce: str) -> str:
    """Return the live table as it is now; its script goes on from there."""

    def cells(row: dict[str, Any]) -> str:
        *words, age, up, down, pid = row.values()
        texts = ["-" if word is None else str(word) for word in words]
        texts += [clock(age), f"{up:,}", f"{down:,}", "-", str(pid)]
        return "".join(
            f'<td data-head="{head}">{text.translate(MARKUP)}'
            for head, text in zip(COLUMNS, texts)
        )

    board = http.worker.board
    rows, found = table_rows(board), figures(board)
    shown = {name: f"{count:,}" for name, count in found.items()}
    shown["uptime"] = clock(found["uptime"])
    return HTML % {
        "name": http.config.name,
        "nonce": nonce,
        "figures": "".join(
            f'<div><dt>{name}<dd id="{name}">{text}</div>'
            for name, text in shown.items()
        ),
        "heads": "".join(f"<th>{head}" for head in COLUMNS),
        "rows": "".join(f"<tr>{cells(row)}" for row in rows),
        "count": f"Sessions: {len(rows):,}",
    }


def table_json(http: Http) -> str:
    import json

    board = http.worker.board
    gateway = {"name": http.config.name, **figures(board)}
    return json.dumps({"gateway": gateway, "sessions": table_rows(board)})


def metrics(board: Scoreboard) -> str:
    """Return the figures in the text format of Prometheus."""
    found, words = figures(board), board.words
    by_kind = {
        f'{{protocol="{proto}",outcome="{word}"}}': count
        for (proto, word), count in ended(board).items()
    }
    by_way = {
        '{direction="up"}': total(board, UPS),
        '{direction="down"}': total(board, DOWNS),
    }
    by_state = {f'{{state="{state}"}}': found[state] for state in ("idle", "busy")}
    took = {"_sum": total(board, MADE_IN) / 1e6, "_count": total(board, MADE)}
    lost = {"": total(board, LOST)}
    families: list[tuple[str, str, str, dict[str, Any]]] = [
        ("sessions_total", "counter", "Sessions that have ended.", by_kind),
        ("bytes_total", "counter", "Bytes that these have moved.", by_way),
        ("connect_seconds", "summary", "From a target to a connection.", took),
        ("workers", "gauge", "Workers, by what they do.", by_state),
        ("workers_limit", "gauge", "The most that there may be.", {"": found["limit"]}),
        ("forks_total", "counter", "Workers that began.", {"": words[FORKS]}),
        ("forks_failed_total", "counter", "And could not.", {"": words[FORKS_FAILED]}),
        ("log_lines_lost_total", "counter", "What the log did not take.", lost),
        ("start_time_seconds", "gauge", "When it began.", {"": words[BEGAN]}),
    ]
    lines = []
    for name, kind, told, values in families:
        lines.append(f"# HELP natwork_{name} {told}\n# TYPE natwork_{name} {kind}\n")
        lines += [f"natwork_{name}{at} {value}\n" for at, value in values.items()]
    return "".join(lines)


def other_gateways(config: Config) -> list[str]:
    """Return the words of `gateways`; raise ConfigError for what is not HOST:PORT."""
    for word in config.gateways.split():
        try:
            parse_authority(os.fsencode(word), 0)
        except Refused:
            raise config.refuse("gateways", f"{word!r} is not HOST:PORT") from None
    return config.gateways.split()


def pac(http: Http, host: str) -> str:
    """Return the file that tells a browser what to ask which gateway for.

    The gateways stand in an order drawn from the client's address: so they share
    the clients, and each client keeps to his.
    """
    here, port = http.client.sock.getsockname()[:2]
    if not http.policy.means_us(host, port):
        host = here.partition("%")[0].removeprefix("::ffff:")
    left, order = sorted({endpoint((host, port)), *other_gateways(http.config)}), []
    number = int.from_bytes(address_of(http.worker.peer), "big")
    while left:
        number, place = divmod(number, len(left))
        order.append(f"PROXY {left.pop(place)}")
    blocks = [f'["{a.hex()}", "{b.hex()}"]' for a, b in http.policy.inside]
    return PAC % (", ".join(blocks), "; ".join(order))


def log_in(http: Http, head: RequestHead) -> None:
    """Learn who asks for a page of ours; raise Refused."""
    try:
        http.identify(head.fields.names, b"authorization")
    except Refused as refusal:
        if refusal.outcome.status != 407:
            raise
        outcome = refusal.outcome._replace(status=401)
        raise Refused(outcome, refusal.detail) from None


def own_page(
    http: Http, head: RequestHead, target: Target, length: int | None
) -> Outcome:
    """Answer what was asked of the gateway itself; raise Refused."""
    board, nonce, host = http.worker.board, os.urandom(16).hex(), target.host
    browser_file = "application/x-ns-proxy-autoconfig", lambda: pac(http, host)
    pages: dict[bytes, tuple[str, Callable[[], str]]] = {
        b"/": ("text/html; charset=utf-8", lambda: table_page(http, nonce)),
        b"/table.json": ("application/json", lambda: table_json(http)),
        b"/metrics": ("text/plain; version=0.0.4", lambda: metrics(board)),
        b"/proxy.pac": browser_file,
        b"/wpad.dat": browser_file,
    }
    page = pages.get(head.path.partition(b"?")[0])
    if page is not browser_file:
        if not http.policy.means_us(host, http.client.sock.getsockname()[1]):
            raise Refused(BAD_HOST, f"{host or 'no host'} is not this gateway")
        if http.session.user == "-":
            log_in(http, head)
    if not page:
        raise Refused(NO_PAGE, "the gateway has no such page")
    if head.method not in (b"GET", b"HEAD"):
        raise Refused(BAD_METHOD, f"{head.method.decode()} of a page of the gateway")
    http.keep &= not length  # a body is not read
    kind, text = page[0], page[1]()
    lines = f"Content-Type: {kind}\r\n{GUARDS.replace('NONCE', nonce)}"
    http.answer("200 OK", lines.encode(), text.encode())
    http.lingers = not http.keep
    return OK


def join(chapters: Chapters, config: Config, policy: Policy) -> None:
    """Answer for the gateway itself from now on; raise ConfigError."""
    other_gateways(config)
    chapters.schemes[OURSELVES] = own_page
