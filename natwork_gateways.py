"""Gateways, a chapter of NATWork: ftp:// and gopher:// URLs, asked for by HTTP.

What a browser asks of FTP and Gopher servers, it asks by HTTP, and here it is
translated.  Both protocols are a word or two in lines, then a stream that the
relay carries; a directory or a menu becomes a page.
"""
# SPDX-License-Identifier: MIT

from __future__ import annotations

import binascii
import contextlib
import re
import sys
import time
from typing import Any

from natwork import ALL
from natwork import ANSWER_TIMEOUT
from natwork import BAD_REQUEST
from natwork import BAD_RESPONSE
from natwork import CHUNKED
from natwork import CLIENT_GONE
from natwork import COPY_SIZE
from natwork import INET
from natwork import INET6
from natwork import MARKUP
from natwork import NO_LOGIN
from natwork import NOT_FOUND
from natwork import NOT_IMPLEMENTED
from natwork import NOT_STORED
from natwork import OK
from natwork import POLLIN
from natwork import SERVER_GONE
from natwork import UNCHECKED
from natwork import Chapters
from natwork import Config
from natwork import Http
from natwork import Lane
from natwork import Outcome
from natwork import Policy
from natwork import Refused
from natwork import RequestHead
from natwork import Script
from natwork import Stream
from natwork import Target
from natwork import chunked
from natwork import dial
from natwork import endpoint
from natwork import framing_lines
from natwork import http_date
from natwork import judged
from natwork import members
from natwork import reason

VERSION = "0.1.0"

PAGE_LIMIT = 4 * 1024 * 1024  # a directory or menu, for 50,000 files
PAGE_TIMEOUT = 600.0  # for all of one, which its client may no longer wait for
# As ls -l has it, or as DIR does.
FTP_ENTRY = re.compile(
    r"(?:([-dl])\S*(?: +\S+){3} +[0-9]+ +[A-Z][a-z]{2} +[0-9]+ +[0-9:]+ "
    r"|[0-9-]{8,10} +[0-9:]{5}[AP]M +(?:(<D)IR>|[0-9]+) +)(.+)"
)
PERCENT, CONTROL = re.compile(rb"%([0-9A-Fa-f]{2})"), re.compile(rb"[\r\n\0]")
FILE_TYPES = dict(
    word.split("=")
    for word in "css=text/css gif=image/gif gz=application/gzip htm=text/html "
    "html=text/html jpeg=image/jpeg jpg=image/jpeg pdf=application/pdf png=image/png "
    "svg=image/svg+xml txt=text/plain xml=text/xml zip=application/zip".split()
)
BASIC = re.compile(rb"basic +([A-Za-z0-9+/=]+)", re.IGNORECASE)
GOPHER_TYPES = {
    "0": "text/plain; charset=utf-8",
    "g": "image/gif",
    "h": "text/html; charset=utf-8",
}


class Talk:
    """A conversation in lines with a server; it passes for ftplib's socket and file."""

    def __init__(self, http: Http, server: Stream) -> None:
        self.http, self.server = http, server
        self.until = 0.0  # monotonic; when the next answer must be there
        self.heard = 0  # bytes of this answer

    def expect(self) -> None:
        """Give the server its time for an answer."""
        self.until = time.monotonic() + self.http.config.idle_timeout

    def wait(self, events: int) -> None:
        """Wait until the server is ready; raise Refused if it takes too long."""
        client = self.http.client.fd
        left = self.until - time.monotonic()
        ready = self.http.watch.wait({self.server.fd: events, client: 0}, left)
        if not ready:
            raise Refused(ANSWER_TIMEOUT, "the server did not answer")
        if client in ready:
            raise Refused(CLIENT_GONE, "connection reset")

    def sendall(self, data: bytes) -> None:
        self.expect()
        self.heard = 0
        lane = Lane(self.http.watch, self.server, self.server, 0)
        lane.out += data
        for _, events in lane.flush():
            self.wait(events)
        self.http.session.up += lane.moved

    def getpeername(self) -> tuple[Any, ...]:
        """Return the server's address, even if it has reset the connection."""
        return self.http.server_ends[0].rpartition(":")[0].strip("[]"), 0

    def fill(self) -> bool:
        """Receive more; return False at the end."""
        self.wait(POLLIN)
        try:
            data = self.server.sock.recv(COPY_SIZE)
        except OSError as error:
            raise Refused(SERVER_GONE, reason(error)) from None
        self.server.received += data
        self.heard += len(data)
        if self.heard > PAGE_LIMIT:
            raise Refused(BAD_RESPONSE, f"over {PAGE_LIMIT} bytes of talk")
        return bool(data)

    def readline(self, limit: int) -> str:
        """Return a line of at most limit bytes, "" at the end."""
        received = self.server.received
        while (end := received.find(b"\n", 0, limit)) < 0 and len(received) < limit:
            if not self.fill():
                break
        return self.server.take(end + 1 or limit).decode("latin-1")

    def lines(self) -> list[str]:
        """Return all lines that come until the end."""
        end = time.monotonic() + PAGE_TIMEOUT
        self.expect()
        while self.fill():
            self.expect()
            self.until = min(self.until, end)
        lines = self.server.take(PAGE_LIMIT).decode("latin-1").split("\n")
        return [line.rstrip("\r") for line in lines]


def decoded(raw: bytes) -> str:
    """Return a part of a URL decoded, its bytes as Latin-1; raise Refused."""
    part = PERCENT.sub(lambda match: bytes.fromhex(match[1].decode()), raw)
    if CONTROL.search(part):  # it would end the line, and begin another
        raise Refused(BAD_REQUEST, "a control byte in the target")
    return part.decode("latin-1")


def quoted(text: str) -> str:
    """Return what decoded() decodes, with no byte that means something in a URL."""
    return re.sub(r"[^A-Za-z0-9._~-]", lambda match: f"%{ord(match[0]):02X}", text)


def content_type(name: str) -> str:
    return FILE_TYPES.get(name.rpartition(".")[2].lower(), "application/octet-stream")


def gopher_text(down: Lane) -> Script:
    """Pass text on, less the dot at its end, and one before others: RFC 1436."""
    held, begun = b"\n", False  # as if another line went before
    while data := (yield from down.receive(COPY_SIZE)):
        held += data
        cut = max(0, len(held) - 5)
        while held.endswith((b"\n", b"\n."), 0, cut):
            cut -= 1
        if cut:
            down.out += held[:cut].replace(b"\n..", b"\n.")[not begun :]
            held, begun = held[cut:], True
    held = re.sub(rb"\n\.\r?\n?\Z", b"\n", held).replace(b"\n..", b"\n.")
    down.out += held[not begun :]


def answer_page(http: Http, status: str, title: str, lines: list[str]) -> None:
    """Answer with a page of preformatted lines, which are HTML; the title is not."""
    title, text = title.translate(MARKUP), "\n".join(lines)
    page = (
        f"<!DOCTYPE html>\n<title>{title}</title>\n<h1>{title}</h1>\n"
        f"<pre>\n{text}\n</pre>\n"
    )
    # As Latin-1 the text had the server's bytes, which UTF-8 may be or not.
    page = page.encode("latin-1").decode(errors="replace")
    kind = b"Content-Type: text/html; charset=utf-8\r\nX-Content-Type-Options: nosniff"
    http.answer(status, kind + b"\r\n", page.encode())


def answer_stream(
    http: Http, source: Stream, kind: str, size: int | None, text: bool = False
) -> None:
    """Answer with what comes from a server: size bytes, or None for up to its end.

    text: it is Gopher's, which ends with a line of a dot.  Raises Refused.
    """
    bare = http.session.method == "HEAD"
    http.answered, http.session.status = True, "200"
    http.endless = size is None and not bare
    http.keep &= not http.endless and not http.worker.leaving()
    up = Lane(http.watch, http.client, source, http.config.idle_timeout)
    down = Lane(http.watch, source, http.client, http.config.idle_timeout)
    lines = b"Content-Type: %b\r\n%b" % (kind.encode(), framing_lines(size))
    if not http.keep:
        lines += b"Connection: close\r\n"
    date = http_date(int(time.time()))
    down.out += b"HTTP/1.1 200 OK\r\nDate: %b\r\n%b\r\n" % (date, lines)
    http.worker.begin(http.session)

    def pass_on() -> Script:
        if text and not bare:
            yield from gopher_text(down)
        elif not bare:
            yield from down.move(ALL if size is None else size)
        yield from down.flush()

    try:
        down.script = pass_on()
        http.join(up, down)
    except Refused:
        http.answered = down.moved > 0  # else it can still become another answer
        raise


# FTP: RFC 959, RFC 2428; its URLs: RFC 1738 section 3.2.


def ftp_login(head: RequestHead, target: Target) -> tuple[str, str]:
    """Return user and password, the request's or the URL's; raise Refused."""
    user, _, password = target.login.partition(b":")
    login = decoded(user), decoded(password)
    match = BASIC.fullmatch(b"".join(head.fields.names.get(b"authorization", [])))
    if match:
        with contextlib.suppress(binascii.Error):
            user, _, password = binascii.a2b_base64(match[1]).partition(b":")
            if CONTROL.search(user + password):
                raise Refused(BAD_REQUEST, "a control byte in the login")
            login = user.decode("latin-1"), password.decode("latin-1")
    return login


def ftp_enter(server: Any, login: tuple[str, str]) -> bool:
    """Log in; return False if the server will not have this user and password."""
    import ftplib

    server.sock.expect()
    while server.getresp()[:1] == "1":  # RFC 959 section 5.4: 120, and then 220
        pass
    try:
        server.login(*login)
    except ftplib.error_perm:
        return False
    server.voidcmd("TYPE I")
    return True


def ftp_failure(method: bytes, code: str) -> Refused:
    """Return the refusal that fits an FTP server's reply."""
    if code[:2] == "55":
        outcome = NOT_STORED if method == b"PUT" else NOT_FOUND
        return Refused(outcome, f"the server said {code}")
    if code[:1] in ("4", "5"):
        return Refused(BAD_RESPONSE, f"the server said {code}")
    return Refused(BAD_RESPONSE, "the server spoke no FTP, or left")


def ftp_passive(http: Http, server: Any) -> tuple[str, int]:
    """Return where the server waits for a data connection; raise Refused.

    It is asked by PASV over IPv4 and by EPSV over IPv6; where a parent may have led
    to it nobody knows over which.
    """
    import ftplib

    six = ":" in http.server_for[1] or server.sock.server.sock.family == INET6
    families = [INET6, INET] if six else [INET, INET6]
    for server.af in families if http.worker.chapters.parents else families[:1]:
        try:
            address, port = server.makepasv()
            return address, port
        except ftplib.Error as error:  # which says nothing of the file
            why = f"no passive mode: {str(error)[:3]}"
    raise Refused(BAD_RESPONSE, why)


def ftp_data(http: Http, server: Any, words: str) -> Stream:
    """Return the data connection for a command, once that is accepted; raise Refused.

    It goes to the address that we talk to, whatever the server names: ftplib does
    not trust it either.
    """
    session, host = http.session, http.server_for[1]
    address, port = ftp_passive(http, server)
    if not 0 < port < 65536:
        raise ValueError("port")
    sock = dial(http.worker, http.policy, session, host, port, address)
    session.address, session.source = http.server_ends
    data = Stream(sock, SERVER_GONE)
    try:
        if server.sendcmd(words)[:1] != "1":
            raise ValueError("reply")
    except BaseException:
        data.close()
        raise
    return data


def ftp_end(server: Any) -> None:
    """Hear from the server that a transfer was whole; raise ftplib's error if not."""
    server.sock.expect()
    server.voidresp()


def ftp_entry(line: str, base: str) -> str:
    """Return a line of a directory as HTML, its link relative to the base."""
    match = FTP_ENTRY.fullmatch(line)
    if not match:
        return line.translate(MARKUP)
    kind, folder, name = match.groups()
    if kind == "l":
        name = name.partition(" -> ")[0]
    end = "/" if folder or kind == "d" else ""
    before = line[: match.start(3)].translate(MARKUP)
    link = f'<a href="{base}{quoted(name)}{end}">{name.translate(MARKUP)}{end}</a>'
    return before + link + match[3][len(name) :].translate(MARKUP)


def ftp_list(http: Http, server: Any, path: str) -> None:
    """Answer with a directory, as a page."""
    if path:
        server.cwd(path)
    with contextlib.closing(ftp_data(http, server, "LIST")) as data:
        entries = Talk(http, data).lines()
    ftp_end(server)
    # Relative links, which a URL without its last slash resolves one level up.
    slash = path.endswith("/") or not path
    base = "" if slash else quoted(path.rpartition("/")[2]) + "/"
    lines = [f'<a href="{"../" if slash else "./"}">../</a>'] if path else []
    lines += [ftp_entry(line, base) for line in entries]
    answer_page(http, "200 OK", f"{http.session.host()}/{path}", lines)


def ftp_get(http: Http, server: Any, path: str) -> None:
    """Answer with a file, or else with the directory of that name."""
    import ftplib

    size: int | None = None
    with contextlib.suppress(ftplib.error_perm, ValueError):
        size = server.size(path)
    if size is not None and not 0 <= size < 1 << 63:
        size = None
    if http.session.method == "HEAD" and size is not None:
        return answer_stream(http, server.sock.server, content_type(path), size)
    try:
        data = ftp_data(http, server, f"RETR {path}")
    except ftplib.error_perm:
        return ftp_list(http, server, path)
    with contextlib.closing(data):
        answer_stream(http, data, content_type(path), size)
    if http.endless:
        ftp_end(server)  # or what has come was not all, and must not look so


def ftp_upload(http: Http, head: RequestHead, path: str, length: int | None) -> Lane:
    """Return the lane of a body that is to be stored; raise Refused.

    What has come of it is checked before any file is emptied for it.
    """
    names = head.fields.names
    if not path or path.endswith("/"):
        raise Refused(BAD_REQUEST, "PUT without the name of a file")
    if b"content-range" in names:  # RFC 9110 section 14.5
        raise Refused(BAD_REQUEST, "a part of a file would be stored as the whole")
    if b"if-match" in names or b"if-none-match" in names:
        raise Refused(UNCHECKED, "FTP cannot tell whether If-Match holds")
    up = Lane(http.watch, http.client, None, http.config.idle_timeout)

    def store() -> Script:
        if length == CHUNKED:
            yield from chunked(up, head, False, BAD_REQUEST)
        elif length:
            yield from up.move(length)
        yield from up.flush()

    up.script = store()
    up.step()
    return up


def ftp_put(http: Http, server: Any, path: str, up: Lane, expects: bool) -> None:
    """Store a request's body, for which the client expects a word; raise Refused."""
    import ftplib

    done = "201 Created"
    with contextlib.suppress(ftplib.Error, ValueError):
        if server.size(path) is not None:  # RFC 9110 section 9.3.4: it replaces one
            done = "200 OK"
    up.sink = data = ftp_data(http, server, f"STOR {path}")
    down = Lane(http.watch, data, http.client, http.config.idle_timeout)
    if expects:
        down.out += b"HTTP/1.1 100 Continue\r\n\r\n"
    try:
        down.script = down.flush()
        http.join(up, down)
    except BaseException:
        data.abort()  # or the server would take a part for the whole
        raise
    data.close()
    ftp_end(server)
    if up.abandoned:
        raise Refused(SERVER_GONE, "the server took no more")
    http.keep = http.wants_more and not http.worker.leaving()
    http.answer(done, b"", b"")


def ftp(http: Http, head: RequestHead, target: Target, length: int | None) -> Outcome:
    """Answer a request for an ftp:// URL; return the outcome, or raise Refused."""
    import ftplib

    http.session.proto = "ftp"
    http.keep &= not length  # until its body is read
    if head.method not in (b"GET", b"HEAD", b"PUT"):
        raise Refused(NOT_IMPLEMENTED, "an ftp:// URL takes GET, HEAD and PUT")
    path, kind = decoded(head.path[1:]), head.path[-7:].lower()
    if kind in (b";type=a", b";type=i", b";type=d"):
        path = path[:-7]
    login, outcome = ftp_login(head, target), OK
    if head.method == b"PUT":
        body = ftp_upload(http, head, path, length)
    http.worker.begin(http.session)
    talk = Talk(http, http.dial(target.host, target.port))
    server = ftplib.FTP(encoding="latin-1")
    server.sock = server.file = talk  # type: ignore[assignment]
    try:
        http.worker.proceed(http.session)
        if not ftp_enter(server, login):
            outcome = NO_LOGIN
            lines, page = http.explain(outcome, "the server refused the login")
            realm = b'WWW-Authenticate: Basic realm="ftp://%b"\r\n' % target.authority
            http.answer(outcome.status_text(), realm + lines, page)
        elif head.method == b"PUT":
            expects = members(head.fields.names, b"expect") if head.minor else []
            ftp_put(http, server, path, body, bool(length and expects))
        elif path.endswith("/") or not path or kind == b";type=d":
            ftp_list(http, server, path)
        else:
            ftp_get(http, server, path)
    except (ftplib.Error, EOFError, ValueError) as error:
        # The reply's number only: its text may name the user.
        raise ftp_failure(head.method, str(error)[:3]) from None
    finally:
        http.drop_server()
    http.lingers = not http.keep
    return outcome


# Gopher: RFC 1436; its URLs: RFC 4266.


def gopher_item(item: str) -> str:
    """Return a line of a menu as HTML."""
    kind = item[:1]
    if "\t" not in item and kind not in "i3":
        return item.translate(MARKUP)  # not a menu's: what some say who have nothing
    name, selector, host, port, *_ = (*item[1:].split("\t"), "", "", "")
    text = name.translate(MARKUP)
    if kind in ("", "i", "3") or not host:
        return text
    place = endpoint((host, port or "70"))
    if kind == "h" and re.match("URL:(https?|ftp|gopher)://", selector):
        link = selector[4:]
    elif kind in "8T":
        link = f"telnet://{place}/"
    else:
        link = f"gopher://{place}/{quoted(kind)}{quoted(selector)}"
    return f'<a href="{link.translate(MARKUP)}">{text}</a>'


def gopher_menu(http: Http, talk: Talk, title: str) -> Outcome:
    """Answer with a menu, as a page; what begins with an error is a 404."""
    items = talk.lines()
    if "." in items:
        del items[items.index(".") :]
    missing = bool(items) and items[0].startswith("3")
    status = NOT_FOUND.status_text() if missing else "200 OK"
    answer_page(http, status, title, [gopher_item(item) for item in items])
    return NOT_FOUND if missing else OK


def gopher(
    http: Http, head: RequestHead, target: Target, length: int | None
) -> Outcome:
    """Answer a request for a gopher:// URL; return the outcome, or raise Refused."""
    http.session.proto = "gopher"
    http.session.target = http.session.target.partition("%09")[0]  # less the query
    http.keep &= not length  # a body is not read
    path, _, query = head.path[1:].partition(b"?")
    text = decoded(path) or "1"
    if text[0] != "7":  # RFC 4266 section 2.1: there is a query in a search only
        text, query = decoded(head.path[1:]) or "1", b""
    if query:
        text += "\t" + decoded(query.removeprefix(b"q=").replace(b"+", b" "))
    kind, selector = text[0], text[1:]
    if selector.count("\t") > 1 or kind < " ":
        raise Refused(BAD_REQUEST, "a control byte in the target")
    if head.method not in (b"GET", b"HEAD"):
        raise Refused(NOT_IMPLEMENTED, "a gopher:// URL takes GET and HEAD")
    worker, session, outcome = http.worker, http.session, OK
    worker.begin(session)
    if kind == "7" and "\t" not in selector:
        judged(worker, http.policy, session, target.host, target.port)
        form = '<form>Search for: <input name="q"> <input type="submit"></form>'
        answer_page(http, "200 OK", target.host, [form])
    else:
        talk = Talk(http, http.dial(target.host, target.port))
        worker.proceed(session)
        try:
            talk.sendall(f"{selector}\r\n".encode("latin-1"))
            if kind in "17":
                outcome = gopher_menu(http, talk, f"{target.host}/{decoded(path)}")
            else:
                media = GOPHER_TYPES.get(kind) or content_type(selector)
                answer_stream(http, talk.server, media, None, kind == "0")
        finally:
            http.drop_server()
    http.lingers = not http.keep
    return outcome


def load_ftplib() -> None:
    """Load what FTP needs while we may still read Python's library.

    Without the TLS that it would load and we do not use, three megabytes in every
    worker.
    """
    if "ftplib" in sys.modules:
        return
    ssl = sys.modules.get("ssl")
    sys.modules["ssl"] = None  # type: ignore[assignment]
    import ftplib  # noqa: F401

    del sys.modules["ssl"]
    if ssl:
        sys.modules["ssl"] = ssl


def join(chapters: Chapters, config: Config, policy: Policy) -> None:
    """Answer for two more schemes from now on."""
    load_ftplib()
    chapters.schemes[b"ftp"] = ftp
    chapters.schemes[b"gopher"] = gopher
