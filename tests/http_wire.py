"""HTTP on the wire: strict reading, writing, and scripted origins."""

from __future__ import annotations

import re
import socket
import threading
from collections.abc import Iterable
from dataclasses import dataclass
from dataclasses import field

import origins
import running
import wire

OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
DENIED = b"10.1.2.3"  # inside by default, so never dialed
ACCEPTED = b"HTTP/1.1 200 Connection established\r\n\r\n"
CLOSED = b"127.0.0.1:1"  # tcpmux: nobody has listened there for decades
STRICT = "error::pytest.PytestUnhandledThreadExceptionWarning"  # an origin's asserts

TOKEN = rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+"
TEXT = rb"[^\x00-\x08\x0a-\x1f\x7f]*"
STATUS_LINE = re.compile(rb"HTTP/1\.1 ([1-9][0-9][0-9]) " + TEXT)
REQUEST_LINE = re.compile(rb"(" + TOKEN + rb") ([^\x00- \x7f]+) HTTP/1\.1")
FIELD_LINE = re.compile(rb"(" + TOKEN + rb"):(" + TEXT + rb")")
CHUNK_LINE = re.compile(rb"([0-9A-Fa-f]{1,16})\r\n")  # extensions are dropped: ours
Fields = list[tuple[bytes, bytes]]


@dataclass
class Message:
    """One message as it was read, and whether it was whole."""

    start: bytes
    fields: Fields
    body: bytes = b""
    trailers: Fields = field(default_factory=list)
    complete: bool = True

    @property
    def status(self) -> int:
        return int(self.start.split(b" ")[1])

    @property
    def method(self) -> bytes:
        return self.start.split(b" ")[0]

    @property
    def target(self) -> bytes:
        return self.start.split(b" ")[1]

    def values(self, name: bytes) -> list[bytes]:
        """Return the values of the lines of this name, in order."""
        return [value for key, value in self.fields if key.lower() == name.lower()]

    def members(self, name: bytes) -> list[bytes]:
        """Return the members of a list field, in order and in lower case."""
        members = b",".join(self.values(name)).lower().split(b",")
        return [member.strip(b" \t") for member in members if member.strip(b" \t")]

    @property
    def closes(self) -> bool:
        return b"close" in self.members(b"Connection")

    @property
    def via(self) -> bytes:
        """Return the last Via member: who forwarded the message last."""
        return self.members(b"Via")[-1]


def fields_of(block: bytes) -> Fields:
    """Return the fields of a block of lines; every line must keep to the grammar."""
    matches = [FIELD_LINE.fullmatch(line) for line in block.split(b"\r\n") if line]
    assert all(matches), block
    return [(m[1], m[2].strip(b" \t")) for m in matches if m]


def read_head(connection: socket.socket) -> bytes:
    """Take one head off a socket, byte for byte, blank line included."""
    head = b""
    while not head.endswith(b"\r\n\r\n"):
        byte = connection.recv(1)
        if not byte:
            break
        head += byte
    return head


def head_of(connection: socket.socket, grammar: re.Pattern[bytes]) -> Message | None:
    """Read one head that keeps to the grammar (R2, R3, R9, R10), or None at the end."""
    if not (head := read_head(connection)):
        return None
    start, _, block = head.partition(b"\r\n")
    if not head.endswith(b"\r\n\r\n"):
        return Message(start, [], complete=False)
    assert grammar.fullmatch(start), head
    message = Message(start, fields_of(block))
    lengths = message.values(b"Content-Length")
    codings = message.values(b"Transfer-Encoding")
    assert len(lengths) + len(codings) <= 1, head  # R42, R47, R48
    assert all(re.fullmatch(rb"[0-9]+", length) for length in lengths), head
    return message


def read_line(connection: socket.socket) -> bytes:
    """Take one line off a socket, its line end included, or what comes of it."""
    line = bytearray()
    while not line.endswith(b"\n") and (byte := connection.recv(1)):
        line += byte
    return bytes(line)


def read_chunked(connection: socket.socket, message: Message) -> None:
    """Read a chunked body to its end, or to where it is cut off."""
    message.complete = False
    while line := read_line(connection):
        if not line.endswith(b"\n"):
            return
        match = CHUNK_LINE.fullmatch(line)
        assert match, line
        if not (size := int(match[1], 16)):
            break
        piece = wire.read_exactly(connection, size)
        message.body += piece
        end = wire.read_exactly(connection, 2)
        if len(piece) < size or len(end) < 2:
            return
        assert end == b"\r\n", end
    else:
        return
    block = b""
    while line := read_line(connection):
        message.complete = line == b"\r\n"
        if message.complete or not line.endswith(b"\n"):
            break
        block += line
    message.trailers = fields_of(block)


def read_body(connection: socket.socket, message: Message) -> None:
    """Read the body that the fields announce."""
    try:
        if codings := message.values(b"Transfer-Encoding"):
            assert codings == [b"chunked"], codings
            read_chunked(connection, message)
        elif lengths := message.values(b"Content-Length"):
            message.body = wire.read_exactly(connection, int(lengths[0]))
            message.complete = len(message.body) == int(lengths[0])
    except ConnectionResetError:
        message.complete = False


def read_request(connection: socket.socket) -> Message | None:
    """Read what the gateway sent on, or None at the end of the connection."""
    if (request := head_of(connection, REQUEST_LINE)) and request.complete:
        assert len(request.values(b"Host")) == 1, request
        read_body(connection, request)
    return request


def read_until_close(connection: socket.socket, message: Message) -> None:
    """Read a body that only the close delimits; a reset says it was cut off."""
    body = bytearray()
    try:
        while piece := connection.recv(65536):
            body += piece
    except ConnectionResetError:
        message.complete = False
    message.body = bytes(body)


def read_answer(connection: socket.socket, method: bytes = b"GET") -> Message:
    """Read one answer, interim ones included, as a strict client would."""
    answer = head_of(connection, STATUS_LINE)
    assert answer and answer.complete, answer
    framing = answer.values(b"Content-Length") + answer.values(b"Transfer-Encoding")
    if answer.status < 200 or answer.status == 204:
        assert not framing, answer  # R46
    elif method == b"HEAD" or answer.status == 304:
        pass  # R53
    elif method == b"CONNECT" and answer.status < 300:
        assert not framing, answer  # R67
    elif framing:
        read_body(connection, answer)
    else:
        assert answer.closes, answer
        read_until_close(connection, answer)
    return answer


def request(
    where: origins.Origin | bytes,
    *fields: bytes,
    method: bytes = b"GET",
    path: bytes = b"/",
    version: bytes = b"HTTP/1.1",
    body: bytes = b"",
) -> bytes:
    """Return a request in absolute-form; CONNECT gets its authority-form."""
    at = where if isinstance(where, bytes) else where.authority.encode()
    target = at if method == b"CONNECT" else b"http://" + at + path
    lines = [b"%b %b %b" % (method, target, version), b"Host: " + at, *fields]
    return b"\r\n".join(lines) + b"\r\n\r\n" + body


def post(
    where: origins.Origin | bytes,
    *fields: bytes,
    body: bytes = b"",
    path: bytes = b"/",
) -> bytes:
    """Return a POST request."""
    return request(where, *fields, method=b"POST", body=body, path=path)


def response(*fields: bytes, status: bytes = b"200 OK", body: bytes = b"") -> bytes:
    """Return an HTTP/1.1 response made of just these lines."""
    return b"\r\n".join([b"HTTP/1.1 " + status, *fields]) + b"\r\n\r\n" + body


def sized(body: bytes, *fields: bytes, status: bytes = b"200 OK") -> bytes:
    """Return a response with a Content-Length."""
    return response(
        b"Content-Length: %d" % len(body), *fields, status=status, body=body
    )


def chunks(*pieces: bytes, trailers: Iterable[bytes] = ()) -> bytes:
    """Return the pieces as a chunked body."""
    body = b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces)
    return body + b"0\r\n" + b"".join(line + b"\r\n" for line in trailers) + b"\r\n"


def exchange(connection: socket.socket, data: bytes, method: bytes = b"GET") -> Message:
    """Send a request and read its answer."""
    wire.send(connection, data)
    return read_answer(connection, method)


class Script:
    """An origin's part: what it answers, in order, and the requests it got.

    The last answer is given again and again.  A close-delimited answer, or an
    empty one, ends the connection.
    """

    def __init__(self, *answers: bytes, close: bool = False) -> None:
        self.answers, self.close = list(answers or (OK,)), close
        self.requests: list[Message] = []

    def __call__(self, connection: socket.socket, origin: origins.Origin) -> None:
        while request := read_request(connection):
            self.requests.append(request)
            answer = self.answers.pop(0) if self.answers[1:] else self.answers[0]
            self.send(connection, answer)
            if self.close or not answer:
                return

    def send(self, connection: socket.socket, answer: bytes) -> None:
        connection.sendall(answer)


class Recorder:
    """An origin's part: it answers nothing, and keeps what each caller has sent."""

    def __init__(self) -> None:
        self.ended = threading.Semaphore(0)

    def __call__(self, connection: socket.socket, origin: origins.Origin) -> None:
        sent = b""
        while piece := connection.recv(65536):
            sent += piece
        origin.received.append(sent)
        self.ended.release()


class Held:
    """An origin that answers a request only when the test lets it."""

    def __init__(self) -> None:
        self.asked, self.go = threading.Event(), threading.Event()

    def __call__(self, connection: socket.socket, origin: origins.Origin) -> None:
        if head := connection.recv(65536):
            origin.received.append(head)
            self.asked.set()
            self.go.wait(20)
            connection.sendall(sized(b"at last"))
            connection.recv(1)


class Parent:
    """A proxy that says what it is told to a CONNECT, and then echoes."""

    def __init__(self, answer: bytes, dripping: bool = False) -> None:
        self.answer, self.dripping = answer, dripping
        self.heads: list[bytes] = []

    def __call__(self, connection: socket.socket, origin: origins.Origin) -> None:
        self.heads.append(read_head(connection))
        (wire.drip if self.dripping else socket.socket.sendall)(connection, self.answer)
        origins.echo(connection, origin)


def ask(
    gateway: running.Gateway,
    where: origins.Origin | bytes,
    *fields: bytes,
    **parts: bytes,
) -> Message:
    """Return the answer to one request on a connection of its own."""
    with gateway.connect(30) as client:
        method = parts.get("method", b"GET")
        return exchange(client, request(where, *fields, **parts), method)


def forwarded(
    gateway: running.Gateway, origin: origins.Origin, *fields: bytes, **parts: bytes
) -> Message:
    """Send a request through the gateway; return what the scripted origin got."""
    answer = ask(gateway, origin, *fields, **parts)
    assert answer.status == 200, answer
    return origin.handle.requests[-1]


def tunnel(
    gateway: running.Gateway,
    origin: origins.Origin,
    early: bytes = b"",
    buffer: int = 0,
) -> socket.socket:
    """Return a client's end of an open tunnel; buffer is the size of what it can hold.

    Early bytes are sent with the request, which does not wait for the answer.
    """
    client = gateway.connect(20, buffer)
    client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    client.sendall(request(origin, method=b"CONNECT") + early)
    head = read_head(client)
    assert head == ACCEPTED, head
    return client


def uncalled(origin: origins.Origin) -> bool:
    """Say whether nobody has called a scripted origin: we do, and are the first."""
    with socket.create_connection((origin.host, origin.port), 10) as probe:
        exchange(probe, request(origin))
        return origin.callers[0] == probe.getsockname()[:2]


def proxy_error(answer: Message) -> bytes:
    """Return the error that the gateway's own member of Proxy-Status names (R41)."""
    (status,) = answer.values(b"Proxy-Status")
    match = re.fullmatch(
        re.escape(running.NAME) + rb'; ?error=([a-z_]+)(?:; ?details="[ -~]*")?', status
    )
    assert match, status
    return match[1]
