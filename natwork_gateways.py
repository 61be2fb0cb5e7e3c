"""Gateways, a chapter of NATWork: ftp:// and gopher:// URLs, asked for by HTTP.

A browser, or curl with a proxy, asks for such a URL by a request in absolute-form
(RFC 9112 section 3.2.2) and gets an HTTP response.  Both protocols are a few lines of
text, then a stream that the relay carries; a directory or a menu becomes a page.  The
server's words in a refusal go to the client and not to the log: they may name the user.

It is not an FTP or Gopher server, and not a relay for FTP clients: those come by SOCKS
or CONNECT.  FTP is RFC 959 in passive mode, with EPSV of RFC 2428, SIZE of RFC 3659
and the URLs of RFC 1738 section 3.2; Gopher is RFC 1436 with the URLs of RFC 4266.
"""
# SPDX-License-Identifier: MIT

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Iterator
from typing import Any

import natwork
from natwork import Exchange
from natwork import Refused
from natwork import Stream

VERSION = "0.1.0"

PAGE_LIMIT = 2 * 1024 * 1024  # bytes of a directory, a menu or a text
PAGE_LINES = 20_000  # of a directory or a menu
PAGE_TIMEOUT = 600.0  # to read all of one: its client may have given up

# A line of ls -l, perhaps without a group or with blanks in owner or group; of DIR on
# Windows; or of EPLF, see https://cr.yp.to/ftp/list/eplf.html.
FTP_ENTRY = re.compile(
    r"(?:([-dl])\S*(?: +\S+){1,12}? +[0-9]+ +[A-Z][a-z]{2} +[0-9]+ +[0-9:]+ "
    r"|[0-9-]{8,10} +[0-9:]{5}[AP]M +(?:(<D)IR>|[0-9]+) +|\+[^\t]*\t)(.+)"
)
REPLY_LINE = re.compile(rb"[0-9]{3}[- \r\n]")
PASV_REPLY = re.compile(r"227[\s\S]*?(?:[0-9]{1,3},){4}([0-9]{1,3}),([0-9]{1,3})")
EPSV_REPLY = re.compile(r"229[\s\S]*?\((.)\1\1([0-9]{1,5})\1\)")
SIZE_REPLY = re.compile(r"213 +([0-9]{1,18})\r?\n")
FILE_TYPES = dict(
    word.split("=")
    for word in "css=text/css gif=image/gif gz=application/gzip htm=text/html "
    "html=text/html jpeg=image/jpeg jpg=image/jpeg pdf=application/pdf png=image/png "
    "svg=image/svg+xml txt=text/plain xml=text/xml zip=application/zip".split()
)
MARKUP = {ord(mark): f"&#{ord(mark)};" for mark in "&<>\"'"}
RESERVED = re.compile("[^A-Za-z0-9._~-]")  # RFC 3986 section 2.3


def words_of(raw: bytes) -> str:
    """Return a part of a line to a server, its bytes as Latin-1; raise Refused."""
    if re.search(rb"[\r\n\0]", raw):  # it would end the line, and begin another
        raise Refused(natwork.BAD_REQUEST, "a control byte in what is asked for")
    return raw.decode("latin-1")


def decoded(raw: bytes) -> str:
    """Return a part of a URL, decoded, as words_of() does; raise Refused."""
    return words_of(natwork.unescaped(raw))


def quoted(text: str) -> str:
    """Return text percent-encoded for a URL, as decoded() takes it."""
    return RESERVED.sub(lambda found: f"%{ord(found[0]):02X}", text)


def content_type(name: str) -> str:
    return FILE_TYPES.get(name.rpartition(".")[2].lower(), "application/octet-stream")


def run(exchange: Exchange, steps: natwork.Steps, seconds: float) -> Any:
    """Run steps that read from a server, for so many seconds at most; raise Refused."""
    end = time.monotonic() + seconds
    late = Refused(natwork.ANSWER_TIMEOUT, "the server did not answer")
    return exchange.watch.run(steps, late, end, exchange.client)


def until_end(source: Stream) -> natwork.Steps:
    """Take all that comes until a stream ends; raise Refused."""
    while len(source.received) <= PAGE_LIMIT:
        yield source.fd, natwork.POLLIN
        if not source.fill():
            return source.take(PAGE_LIMIT)
    raise Refused(natwork.BAD_RESPONSE, f"over {PAGE_LIMIT} bytes in a page")


def read_lines(exchange: Exchange, source: Stream) -> list[str]:
    """Return the lines that come until a stream ends, as Latin-1; raise Refused."""
    data: bytes = run(exchange, until_end(source), PAGE_TIMEOUT)
    if data.count(b"\n") > PAGE_LINES:
        raise Refused(natwork.BAD_RESPONSE, f"over {PAGE_LINES} lines in a page")
    return data.decode("latin-1").replace("\r\n", "\n").split("\n")


def answer_page(exchange: Exchange, title: str, lines: list[str]) -> None:
    """Answer with a page of preformatted lines; they are HTML, the title is text."""
    title, text = title.translate(MARKUP), "\n".join(lines)
    page = f"<!DOCTYPE html>\n<title>{title}</title>\n<h1>{title}</h1>\n"
    page += f"<pre>\n{text}\n</pre>\n"
    # The text holds the server's bytes as Latin-1; they may be UTF-8.
    page = page.encode("latin-1").decode(errors="replace")
    kind = b"Content-Type: text/html; charset=utf-8\r\nX-Content-Type-Options: nosniff"
    status = exchange.session.outcome.status_text()
    exchange.answer(status, kind + natwork.CRLF, page.encode())


def answer_file(
    exchange: Exchange, source: Stream, kind: str, size: int | None
) -> None:
    """Answer with size bytes from a server, None for all; raise Refused."""
    head = f"HTTP/1.1 200 OK\r\nContent-Type: {kind}\r\n".encode()
    # With a head before them, the server's bytes are an HTTP response.
    source.received[:0] = head + natwork.framing_lines(size) + natwork.CRLF
    exchange.carry_answer(source, b"")


# FTP.  A reply is text, whose first digit is its kind: 1 begun, 2 done, 3 go on, 4
# not now, 5 no.


def read_reply(server: Stream) -> natwork.Steps:
    """Take a reply, of many lines if a hyphen follows its code; raise Refused.

    RFC 959 section 4.2: such a reply ends at a line with the same code and a blank.
    """
    bad, limit, lines = natwork.BAD_RESPONSE, natwork.HEAD_LIMIT, bytearray()
    while len(lines) < limit:
        line = yield from server.until(natwork.LINE_END, limit, bad)
        lines += line
        if not REPLY_LINE.match(lines):
            raise Refused(bad, "a reply without a code")
        if lines[3:4] != b"-" or line[:4] == lines[:3] + b" ":
            return lines.decode("latin-1")
    raise Refused(bad, f"a reply over {limit} bytes")


def said(reply: str) -> str:
    """Return what a server said, by the first line of its reply."""
    first = reply.partition("\n")[0].strip()
    return f"the server said {first[:200]}"


def hear(exchange: Exchange, kinds: str = "") -> str:
    """Return the next reply; raise Refused if it is not of the kinds, "" for any.

    421 is never of them: it may answer any command, and says that the server leaves.
    """
    server, session = exchange.http.server, exchange.session
    assert server
    reply: str = run(exchange, read_reply(server), exchange.config.idle_timeout)
    if not kinds or reply[0] in kinds and reply[:3] != "421":
        return reply
    outcome = natwork.BAD_RESPONSE
    if reply[:2] == "55":  # it is about the file
        outcome = natwork.NOT_STORED if session.method == "PUT" else natwork.NOT_FOUND
    raise Refused(outcome, said(reply))


def ask(exchange: Exchange, command: str, kinds: str = "") -> str:
    """Send a command, and return its reply as hear() does; raise Refused."""
    server = exchange.http.server
    assert server
    exchange.watch.send(server, f"{command}\r\n".encode("latin-1"))
    exchange.session.up += server.counted()
    return hear(exchange, kinds)


def log_in(exchange: Exchange, user: str, password: str) -> None:
    """Log a user in, "" for anybody; raise Refused."""
    if hear(exchange, "12")[0] == "1":  # RFC 959 section 5.4: 120, and later 220
        hear(exchange, "2")
    if user in ("", "anonymous"):  # RFC 1635
        user, password = "anonymous", password or "anonymous@"
    reply = ask(exchange, f"USER {user}", "2345")
    if reply[0] == "3":
        reply = ask(exchange, f"PASS {password}", "2345")
    if reply[0] != "2":  # 332: it wants an account, which no URL has
        raise Refused(natwork.NO_LOGIN, said(reply))
    ask(exchange, "TYPE I", "2")


def ask_size(exchange: Exchange, path: str) -> int | None:
    """Return a file's size, None if the server does not say: RFC 3659 section 4."""
    match = SIZE_REPLY.fullmatch(ask(exchange, f"SIZE {path}"))
    return int(match[1]) if match else None


def ask_port(exchange: Exchange) -> int:
    """Return the port where the server awaits a data connection; raise Refused."""
    for command in ("EPSV", "PASV"):  # PASV is older, and for IPv4 alone
        reply, port = ask(exchange, command), 0
        if match := EPSV_REPLY.match(reply):
            port = int(match[2])
        elif match := PASV_REPLY.match(reply):
            port = int(match[1]) * 256 + int(match[2])
        if 0 < port < 65536:
            return port
    raise Refused(natwork.BAD_RESPONSE, f"no passive mode: {reply[:3]}")


@contextlib.contextmanager
def data_connection(exchange: Exchange) -> Iterator[Stream]:
    """Dial a data connection for the next command; raise Refused."""
    session, host, port = exchange.session, exchange.target.host, ask_port(exchange)
    # Keep to the address that we talk to: PASV's reply could name another host.
    ends, only = exchange.http.server_ends, natwork.host_of(session.address)
    data = natwork.dial(exchange.worker, session, host, port, only)
    session.address, session.source = ends  # the log shows the control connection
    natwork.reset_on_close(data.sock)  # a server must not take a part for the whole
    try:
        yield data
        natwork.reset_on_close(data.sock, False)
    finally:
        session.up += data.counted()
        data.close()


def ftp_entry(line: str, base: str) -> str:
    """Return a line of a directory as HTML, its link relative to the base."""
    match = FTP_ENTRY.fullmatch(line)
    if not match:
        return line.translate(MARKUP)
    kind, folder, name = match.groups()
    before = line[: match.start(3)]
    if kind == "l":
        name = name.partition(" -> ")[0]
    # In EPLF a directory has "/" among its facts.
    end = "/" if folder or kind == "d" or "/" in before[1:].split(",") else ""
    link = f'<a href="{base}{quoted(name)}{end}">{name.translate(MARKUP)}{end}</a>'
    return before.translate(MARKUP) + link + match[3][len(name) :].translate(MARKUP)


def ftp_list(exchange: Exchange, path: str) -> None:
    """Answer with a directory, as a page; raise Refused."""
    if path:
        ask(exchange, f"CWD {path}", "2")
    entries = [""]
    with data_connection(exchange) as data:
        # Some servers refuse to list an empty directory.  It is there: we are in it.
        reply = ask(exchange, "LIST", "145")
        if reply[0] == "1":
            entries = read_lines(exchange, data)
    if reply[0] == "1":
        reply = hear(exchange, "2" if any(entries) else "245")
    # RFC 959 section 4.2.1: x2x is about the connection, x3x about the login.
    if reply[:2] in ("42", "53"):
        raise Refused(natwork.BAD_RESPONSE, said(reply))
    # Links are relative: if the URL lacks its last slash, they start one level up.
    name = path.rpartition("/")[2]
    base = f"{quoted(name)}/" if name else ""
    lines = [f'<a href="{base}../">../</a>'] if path else []
    lines += [ftp_entry(line, base) for line in entries]
    answer_page(exchange, f"{exchange.session.host()}/{path}", lines)


def ftp_get(exchange: Exchange, path: str) -> None:
    """Answer with a file, or else with the directory of that name; raise Refused."""
    size = ask_size(exchange, path)
    with data_connection(exchange) as data:
        reply = ask(exchange, f"RETR {path}", "15")
        if reply[0] == "1":
            answer_file(exchange, data, content_type(path), size)
    if reply[0] == "5":
        ftp_list(exchange, path)
    elif size is None and not exchange.head_only:
        exchange.progress = exchange.BEGUN_UNTIL_CLOSE
        hear(exchange, "2")  # else the file was not whole, and the answer is cut
        exchange.progress = exchange.WHOLE


def check_put(head: natwork.RequestHead, path: str) -> None:
    """Raise Refused if a body cannot be stored as its request asks."""
    if not path or path.endswith("/"):
        raise Refused(natwork.BAD_REQUEST, "PUT without the name of a file")
    if head.value(b"content-range"):  # RFC 9110 section 14.5
        raise Refused(natwork.BAD_REQUEST, "a part is not stored as the whole")
    if head.value(b"if-match") or head.value(b"if-none-match"):
        raise Refused(natwork.UNCHECKED, "FTP cannot tell whether it holds")


def ftp_put(exchange: Exchange, path: str) -> None:
    """Store a request's body; raise Refused."""
    head, replaces = exchange.head, ask_size(exchange, path) is not None
    with data_connection(exchange) as data:
        up = natwork.Direction(exchange.client, data)
        down = natwork.Direction(data, exchange.client)
        up.steps = natwork.move_body(up, head, exchange.length or 0, framed=False)
        up.step()  # refuse a malformed body, if seen by now, before STOR empties a file
        ask(exchange, f"STOR {path}", "1")
        if exchange.length and head.expected:
            down.out += b"HTTP/1.1 100 Continue\r\n\r\n"
        exchange.join(up, down)
    hear(exchange, "2")
    if up.state == up.CANCELED:
        raise Refused(natwork.SERVER_GONE, "the server took no more")
    exchange.keep = head.keep_alive
    # RFC 9110 section 9.3.4.
    exchange.answer("200 OK" if replaces else "201 Created", b"", b"")


def ftp(exchange: Exchange) -> None:
    """Answer a request for an ftp:// URL; raise Refused."""
    head, session, target = exchange.head, exchange.session, exchange.target
    session.proto = "ftp"
    if session.method not in ("GET", "HEAD", "PUT"):
        raise Refused(natwork.NOT_IMPLEMENTED, "ftp:// has GET, HEAD and PUT")
    path, kind = decoded(target.path[1:]), target.path[-7:].lower()
    if kind in (b";type=a", b";type=i", b";type=d"):
        path = path[:-7]
    user, colon, password = words_of(head.login(b"authorization")).partition(":")
    if not colon:
        user, _, password = map(decoded, target.login.partition(b":"))
    if session.method == "PUT":
        check_put(head, path)
    exchange.worker.begin(session)
    with contextlib.closing(exchange.http) as http:
        http.dial(session, target.host, target.port)
        exchange.worker.proceed(session)
        log_in(exchange, user, password)
        if session.method == "PUT":
            ftp_put(exchange, path)
        elif path.endswith("/") or not path or kind == b";type=d":
            ftp_list(exchange, path)
        else:
            ftp_get(exchange, path)


# Gopher.


def gopher_item(item: str) -> str:
    """Return a line of a menu as HTML."""
    kind = item[:1]
    if "\t" not in item and kind not in "i3":
        return item.translate(MARKUP)  # not an item: a server that has none says why
    name, selector, host, port, *_ = (*item[1:].split("\t"), "", "", "")
    text = name.translate(MARKUP)
    if kind in ("", "i", "3") or not host:
        return text
    place = natwork.endpoint((host, port or "70"))
    if kind == "h" and re.match("URL:(https?|ftp|gopher)://", selector):
        link = selector[4:]
    elif kind in "8T":
        link = f"telnet://{place}/"
    else:
        link = f"gopher://{place}/{quoted(kind)}{quoted(selector)}"
    return f'<a href="{link.translate(MARKUP)}">{text}</a>'


def gopher_selector(path: bytes) -> tuple[str, str]:
    """Return type and selector of a path without its first slash; raise Refused."""
    bare, _, query = path.partition(b"?")
    text = decoded(bare)
    if text[:1] != "7":  # RFC 4266 section 2.1: only a search has a query
        text = decoded(path) or "1"
    elif query:
        text += "\t" + decoded(query.removeprefix(b"q=").replace(b"+", b" "))
    if text.count("\t") > 1 or text < " ":
        raise Refused(natwork.BAD_REQUEST, "a control byte in the target")
    return text[0], text[1:]


def gopher_text(exchange: Exchange, server: Stream) -> None:
    """Answer with a text, less the dots that RFC 1436 adds: the last, and one of two.

    Some servers add none, so a dot ends the text only in its last line.
    """
    data: bytes = run(exchange, until_end(server), PAGE_TIMEOUT)
    text = re.sub(rb"(?m)^\.\r?\n?\Z", b"", data)
    kind = b"Content-Type: text/plain; charset=utf-8\r\n"
    exchange.answer("200 OK", kind, re.sub(rb"(?m)^\.\.", b".", text))


def gopher(exchange: Exchange) -> None:
    """Answer a request for a gopher:// URL; raise Refused."""
    session, target = exchange.session, exchange.target
    session.proto = "gopher"
    if session.method not in ("GET", "HEAD"):
        raise Refused(natwork.NOT_IMPLEMENTED, "gopher:// has GET and HEAD")
    session.target = session.target.partition("%09")[0]  # less the query
    kind, selector = gopher_selector(target.path[1:])
    exchange.worker.begin(session)
    if kind == "7" and "\t" not in selector:
        natwork.judged(exchange.worker, session, target.host, target.port)
        form = '<form>Search for: <input name="q"> <input type="submit"></form>'
        return answer_page(exchange, target.host, [form])
    with contextlib.closing(exchange.http) as http:
        server = http.dial(session, target.host, target.port)
        exchange.worker.proceed(session)
        exchange.watch.send(server, f"{selector}\r\n".encode("latin-1"))
        session.up += server.counted()
        if kind == "0":
            return gopher_text(exchange, server)
        if kind not in "17":
            known = {"g": "image/gif", "h": "text/html; charset=utf-8"}
            media = known.get(kind) or content_type(selector)
            return answer_file(exchange, server, media, None)
        items = read_lines(exchange, server)
        if "." in items:
            del items[items.index(".") :]
        if items and items[0].startswith("3"):  # an error
            session.outcome = natwork.NOT_FOUND
        lines = [gopher_item(item) for item in items]
        answer_page(exchange, f"{target.host}/{kind}{selector}", lines)


def join(chapters: natwork.Chapters) -> None:
    """Answer for two more schemes from now on."""
    chapters.schemes |= {b"ftp": ftp, b"gopher": gopher}
