"""Parents, a chapter of NATWork: other proxies to go through, as `parents` says.

A target is judged here first all the same; a parent's own address is not.  For an
http:// request a parent that is an HTTP proxy is a server like any other, but for
the request line, which names the whole URL (RFC 9112 section 3.2.2); all else goes
by a tunnel through it, asked for by CONNECT (RFC 9110 section 9.3.6) or by SOCKS 5
(RFC 1928, RFC 1929).

It does not balance and does not probe: the first parent that takes a target gets
it.  The heart's dial() calls Parents.dial(), and an exchange asks the Parent of its
server connection how to write the request, and whom to blame.
"""
# SPDX-License-Identifier: MIT

from __future__ import annotations

import binascii
import re
import time
from typing import Any
from typing import NamedTuple

import natwork
from natwork import Refused

VERSION = "0.1.0"

PARENT_URL = re.compile(
    r"(http|socks5)://(?:([^:@/]+):([^:@/]*)@)?"
    r"((\[[0-9A-Fa-f:.]+\]|[\w.-]+):([0-9]+))/?",
    re.ASCII,
)
RESPONSE = re.compile(rb"HTTP/1\.[0-9] ([1-5][0-9][0-9])( .*)?")
# What a parent's refusal is to our client; anything else: it could not connect.
OUTCOME_OF_STATUS = {
    403: natwork.DENIED,
    503: natwork.OVERLOAD,
    504: natwork.CONNECT_TIMEOUT,
}
OUTCOME_OF_REPLY = {  # RFC 1928 section 6
    2: natwork.DENIED,
    3: natwork.UNROUTABLE,
    4: natwork.HOST_UNREACHABLE,
    5: natwork.CONNECT_REFUSED,
    6: natwork.CONNECT_TIMEOUT,
}
# Faults of a server that are the parent's, if a connection leads to one.
SERVER_FAULTS = (
    "connection_terminated",
    "http_protocol_error",
    "http_response_timeout",
)


class Parent(NamedTuple):
    """Another proxy, and what goes through it."""

    name: str  # its URL, without user and password
    scheme: str  # http or socks5
    host: str
    port: int
    user: bytes
    password: bytes
    targets: natwork.Rule
    plain: bool  # for http:// requests alone

    def login(self) -> bytes:
        """Return the field line that tells the parent who we are, if it has to know."""
        if not self.user:
            return b""
        pair = binascii.b2a_base64(b"%b:%b" % (self.user, self.password), newline=False)
        return b"Proxy-Authorization: Basic %b\r\n" % pair

    def request_target(self, path: bytes, authority: bytes) -> tuple[bytes, bytes]:
        """Return the target of a request line to the parent, and a field line.

        RFC 9112 section 3.2.2: in absolute-form, and for "*" without a path.
        """
        return b"http://%b%b" % (authority, path.removeprefix(b"*")), self.login()

    def failed(self, error: Refused | OSError) -> Refused:
        """Return a refusal that says by which parent it came about."""
        if isinstance(error, OSError):
            error = Refused(natwork.SERVER_GONE, natwork.reason(error))
        if error.outcome is natwork.DRAINED:
            return error
        word = f"{natwork.PARENT_FAILED.word}-{error.outcome.word}"
        why = f"parent {self.name}: {error.detail}"
        return Refused(error.outcome._replace(word=word), why)

    def blamed(self, refusal: Refused) -> Refused:
        """Return a refusal of an exchange with the parent, as its fault if it is."""
        return (
            self.failed(refusal) if refusal.outcome.error in SERVER_FAULTS else refusal
        )


def parse_parent(text: str) -> Parent:
    """Return the parent that a line of `parents` describes; raise ValueError.

    What it raises never quotes the line, which may hold a password.
    """
    words, lists = natwork.parse_line(text, ("to", "scheme"))
    if lists.get("scheme", ["http"]) != ["http"]:
        raise ValueError("the only scheme to be named is http")
    match = PARENT_URL.fullmatch(words[0])
    if not match:
        raise ValueError("a URL is http or socks5, ://, a host, a colon and a port")
    scheme, user, password, at, host, port = match.groups(default="")
    # A ":", "@" or "/" in a user or a password is written as in any URL: %3A.
    name, secret = (
        re.sub(rb"%[0-9A-Fa-f]{2}", lambda m: bytes.fromhex(m[0][1:].decode()), part)
        for part in (user.encode(), password.encode())
    )
    if len(name) > 255 or len(secret) > 255:  # RFC 1929 section 2
        raise ValueError("a user or a password is longer than 255 bytes")
    bare = host.strip("[]").lower()
    if host[0] == "[" and len(natwork.pack(bare)) != 16:
        raise ValueError("what stands in brackets is an IPv6 address")
    return Parent(
        f"{scheme}://{at}",
        scheme,
        bare,
        natwork.parse_ports(port).start,
        name,
        secret,
        natwork.Rule(f"allow to {','.join(lists.get('to', '*'))}", 0),
        "scheme" in lists,
    )


class Handshake:
    """A few words with a parent, before its stream is a tunnel; raises Refused."""

    def __init__(
        self, watch: natwork.Watch, server: natwork.Stream, deadline: float
    ) -> None:
        """Take a stream; deadline (monotonic) is for all that is said."""
        self.watch, self.server, self.deadline = watch, server, deadline

    def run(self, steps: natwork.Steps) -> Any:
        late, why = natwork.CONNECT_TIMEOUT, "no answer within connect_timeout"
        return self.watch.run(steps, late, why, deadline=self.deadline)

    def write(self, data: bytes) -> None:
        self.run(self.server.send_all(bytearray(data)))

    def read(self, count: int) -> bytes:
        """Return so many bytes."""
        data: bytes = self.run(self.server.exactly(count))
        return data

    def read_status(self) -> tuple[int, bytes]:
        """Return the status of a response head, and its line; take no more."""
        head = self.run(
            natwork.read_until(
                self.server,
                natwork.BLANK_LINE,
                natwork.HEAD_LIMIT,
                natwork.BAD_RESPONSE,
            )
        )
        line = head.partition(natwork.CRLF)[0]
        match = RESPONSE.fullmatch(line)
        if not match:
            raise Refused(natwork.BAD_RESPONSE, "this is not HTTP")
        return int(match[1]), line


def ask_http(talk: Handshake, parent: Parent, via: bytes, target: bytes) -> None:
    """Have a parent tunnel to HOST:PORT: RFC 9110 section 9.3.6; raise Refused."""
    lines = b"CONNECT %b HTTP/1.1\r\nHost: %b\r\nVia: %b\r\n%b\r\n"
    talk.write(lines % (target, target, via, parent.login()))
    for _ in range(natwork.INTERIM_LIMIT):
        status, line = talk.read_status()
        if status >= 300:
            outcome = OUTCOME_OF_STATUS.get(status, natwork.CONNECT_FAILED)
            why = line[9:].decode("latin-1")
            raise Refused(outcome._replace(word=str(status)), why)
        if status >= 200:
            return
    why = f"over {natwork.INTERIM_LIMIT} interim responses"
    raise Refused(natwork.BAD_RESPONSE, why)


def ask_socks(talk: Handshake, parent: Parent, host: str, port: int) -> None:
    """Have a parent connect to a host: RFC 1928 and 1929; raise Refused."""
    methods = b"\0\2" if parent.user else b"\0"
    talk.write(bytes([5, len(methods)]) + methods)
    version, method = talk.read(2)
    if version != 5:
        raise Refused(natwork.BAD_RESPONSE, "this is not SOCKS5")
    failed = natwork.CONNECT_FAILED
    if method not in methods:
        raise Refused(failed._replace(word="auth-required"), "it wants a user")
    if method == 2:
        user, password = parent.user, parent.password
        talk.write(b"\1%c%b%c%b" % (len(user), user, len(password), password))
        if talk.read(2)[1]:
            why = "it does not know our user"
            raise Refused(failed._replace(word="auth-failed"), why)
    try:
        packed = natwork.pack(host)
        address = (b"\1" if len(packed) == 4 else b"\4") + packed
    except ValueError:
        address = b"\3%c%b" % (len(host), host.encode())
    talk.write(b"\5\1\0%b%b" % (address, port.to_bytes(2, "big")))
    version, reply, _, kind = talk.read(4)
    if version != 5 or not reply and kind not in (1, 3, 4):
        raise Refused(natwork.BAD_RESPONSE, "this is not SOCKS5")
    if reply:
        outcome = OUTCOME_OF_REPLY.get(reply, failed)._replace(word=f"reply-{reply}")
        raise Refused(outcome, f"SOCKS reply {reply}")
    talk.read({1: 4, 4: 16}.get(kind) or talk.read(1)[0])
    talk.read(2)


class Parents:
    """The parents of one configuration, and what goes through them."""

    def __init__(self, parents: list[Parent], policy: natwork.Policy) -> None:
        self.parents, self.policy = parents, policy

    def parent_for(self, proto: str, host: str, found: list[bytes]) -> Parent | None:
        """Return the first parent that takes a target, None where we dial it."""
        known = [one for packed in found for one in natwork.embedded_addresses(packed)]
        for parent in self.parents:
            if proto == "http" or not parent.plain:
                if parent.targets.matches(b"", "", host.rstrip("."), 0, known):
                    return parent
        return None

    def trusts(self, client: str, user: str, host: str, port: int) -> bool:
        """Return whether a rule allows a name of which no address is known here."""
        peer, name = natwork.address_of(client), user.partition(";")[0]
        for rule in self.policy.rules:
            if rule.matches(peer, name, host.rstrip("."), port, []):
                if not rule.allow:
                    return False
                if rule.names and (port != 25 or rule.names_mail):
                    return True
        return False

    def dial(
        self,
        worker: natwork.Worker,
        session: natwork.Session,
        host: str,
        port: int,
        only: str,
    ) -> natwork.Stream:
        """Return a connection to a target, as the heart's dial(), perhaps by a parent.

        Raises Refused.
        """
        unknown = None
        addresses: list[bytes] = []
        try:
            addresses = natwork.judged(worker, session, host, port)
        except Refused as refusal:
            # A parent may know the name, if it is one that may be asked for.
            nameless = refusal.outcome in (natwork.NO_SUCH_HOST, natwork.DNS_TIMEOUT)
            client = worker.client.host
            if not nameless or not self.trusts(client, session.user, host, port):
                raise
            unknown = refusal
        if parent := self.parent_for(session.proto, host, addresses):
            try:
                return self.dial_parent(worker, session, parent, host, port)
            except (OSError, Refused) as error:
                raise parent.failed(error) from None
        if unknown:
            raise unknown
        if only:
            addresses = natwork.judged(worker, session, host, port, only)
        attempts = natwork.ways_to(self.policy, addresses, port, worker.board)
        return natwork.Race(worker, session).run(attempts)

    def dial_parent(
        self,
        worker: natwork.Worker,
        session: natwork.Session,
        parent: Parent,
        host: str,
        port: int,
    ) -> natwork.Stream:
        """Return a connection that leads to a target through a parent; raise Refused.

        For an http:// request and a parent that takes such it is one to the parent,
        and the stream says so.
        """
        policy = self.policy
        found = natwork.resolve(parent.host, parent.port)
        if policy.is_own_listener(found, parent.port):
            # SOCKS has no Via that would tell.
            raise Refused(natwork.LOOP, "it is this gateway")
        deadline = time.monotonic() + worker.config.connect_timeout
        # A parent inside or on this box is not reached by way of the outside.
        inside = [packed for packed in found if policy.closes(packed)]
        outside = [packed for packed in found if packed not in inside]
        attempts = [
            natwork.Attempt(packed, parent.port, None, 0.0) for packed in inside
        ]
        attempts += natwork.ways_to(policy, outside, parent.port, worker.board)
        server = natwork.Race(worker, session).run(attempts)
        talk = Handshake(worker.watch, server, deadline)
        try:
            if parent.scheme == "socks5":
                ask_socks(talk, parent, host, port)
            elif session.proto == "http":
                server.parent = parent
            else:
                via = b"%b1.1 %b" % (session.via, worker.config.name.encode())
                ask_http(talk, parent, via, natwork.endpoint((host, port)).encode())
            server.counted()  # what was said to the parent is not the session's
        except BaseException:
            server.close()
            raise
        return server


def join(
    chapters: natwork.Chapters,
    config: natwork.Config,
    policy: natwork.Policy,
    board: natwork.Scoreboard,
) -> None:
    """Dial by way of parents from now on, if there are any; raise ConfigError."""
    try:
        parents = [parse_parent(line) for line in config.lines("parents")]
    except ValueError as error:
        raise config.refuse("parents", str(error)) from None
    if parents:
        chapters.parents = Parents(parents, policy)
