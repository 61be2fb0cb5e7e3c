"""Parents, a chapter of NATWork: other proxies to go through, as `parents` says.

A target is judged here first all the same.  For an http:// request a parent that
is an HTTP proxy is a server like any other, but for the request's first line; all
else goes by a tunnel through it.
"""
# SPDX-License-Identifier: MIT

from __future__ import annotations

import binascii
import re
import socket
import time
from typing import NamedTuple

from natwork import BAD_RESPONSE
from natwork import BLANK_LINE
from natwork import CONNECT_FAILED
from natwork import CONNECT_REFUSED
from natwork import CONNECT_TIMEOUT
from natwork import CRLF
from natwork import DENIED
from natwork import DNS_TIMEOUT
from natwork import DRAINED
from natwork import HEAD_LIMIT
from natwork import HOST_UNREACHABLE
from natwork import INTERIM_LIMIT
from natwork import LOOP
from natwork import NO_SUCH_HOST
from natwork import OVERLOAD
from natwork import PARENT_FAILED
from natwork import POLLIN
from natwork import POLLOUT
from natwork import SERVER_GONE
from natwork import UNROUTABLE
from natwork import Chapters
from natwork import Config
from natwork import Policy
from natwork import Refused
from natwork import Rule
from natwork import Session
from natwork import Worker
from natwork import address_of
from natwork import connect
from natwork import dial_addresses
from natwork import endpoint
from natwork import follow
from natwork import forms
from natwork import judged
from natwork import pack
from natwork import parse_ports
from natwork import plan
from natwork import reason
from natwork import resolve

VERSION = "0.1.0"


class Parent(NamedTuple):
    """Another proxy, and what goes through it."""

    name: str  # its URL, without user and password
    scheme: str  # http or socks5
    host: str
    port: int
    user: bytes
    password: bytes
    targets: Rule
    plain: bool  # for http:// requests alone


PARENT_URL = re.compile(
    r"(http|socks5)://(?:([^:@/]+):([^:@/]*)@)?"
    r"((\[[0-9A-Fa-f:.]+\]|[\w.-]+):([0-9]+))/?",
    re.ASCII,
)


def parse_parent(text: str) -> Parent:
    """Return the parent that a line of `parents` describes; raise ValueError.

    What it raises never quotes the line, which may hold a password.
    """
    url, *words = re.sub(r"\s*,\s*", ",", text).split()
    parts = dict(zip(words[::2], words[1::2]))
    if len(words) != 2 * len(parts) or not parts.keys() <= {"to", "scheme"}:
        raise ValueError("behind the URL stand only to TARGETS and scheme http")
    if parts.get("scheme", "http") != "http":
        raise ValueError("the only scheme to be named is http")
    match = PARENT_URL.fullmatch(url)
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
    if host[0] == "[" and len(pack(bare)) != 16:
        raise ValueError("what stands in brackets is an IPv6 address")
    return Parent(
        f"{scheme}://{at}",
        scheme,
        bare,
        parse_ports(port).start,
        name,
        secret,
        Rule(f"allow to {parts.get('to', '*')}", 0),
        "scheme" in parts,
    )


class Handshake:
    """A few words with a parent, before his socket is a tunnel; raises Refused."""

    def __init__(self, worker: Worker, sock: socket.socket, deadline: float) -> None:
        """Take a socket; deadline is for all that is said and heard."""
        self.watch, self.sock, self.deadline = worker.watch, sock, deadline

    def wait(self, events: int) -> None:
        left = self.deadline - time.monotonic()
        if left <= 0 or not self.watch.wait({self.sock.fileno(): events}, left):
            raise Refused(CONNECT_TIMEOUT, "no answer within connect_timeout")

    def say(self, data: bytes) -> None:
        while data:
            self.wait(POLLOUT)
            data = data[self.sock.send(data) :]

    def take(self, count: int, flags: int = 0) -> bytes:
        """Return what there is, at least one byte and at most so many."""
        self.wait(POLLIN)
        piece = self.sock.recv(count, flags)
        if not piece:
            raise Refused(SERVER_GONE, "the connection ended in mid-answer")
        return piece

    def hear(self, count: int) -> bytes:
        """Return so many bytes and take no more: what follows is the target's."""
        heard = b""
        while len(heard) < count:
            heard += self.take(count - len(heard))
        return heard

    def hear_head(self) -> bytes:
        """Return a response head, and take no byte behind it."""
        head, end = b"", -1
        while end < 0:
            seen = self.take(HEAD_LIMIT, socket.MSG_PEEK)
            end = (head + seen).find(BLANK_LINE)
            # Not more than was seen: what has come since may be the target's.
            head += self.sock.recv(len(seen) if end < 0 else end + 4 - len(head))
            if len(head) >= HEAD_LIMIT:
                raise Refused(BAD_RESPONSE, f"answer over {HEAD_LIMIT} bytes")
        return head


# What a parent's refusal is to our client; anything else: it could not connect.
PARENT_STATUS = {403: DENIED, 503: OVERLOAD, 504: CONNECT_TIMEOUT}
PARENT_REPLY = {  # RFC 1928 section 6
    2: DENIED,
    3: UNROUTABLE,
    4: HOST_UNREACHABLE,
    5: CONNECT_REFUSED,
    6: CONNECT_TIMEOUT,
}


def basic(parent: Parent) -> bytes:
    """Return the field line that says to a parent who we are, if he wants to know."""
    if not parent.user:
        return b""
    pair = b"%b:%b" % (parent.user, parent.password)
    return b"Proxy-Authorization: Basic " + binascii.b2a_base64(pair)[:-1] + CRLF


def ask_http(talk: Handshake, parent: Parent, via: bytes, at: bytes) -> None:
    """Have a parent tunnel to HOST:PORT: RFC 9110 section 9.3.6; raise Refused."""
    lines = b"CONNECT %b HTTP/1.1\r\nHost: %b\r\nVia: %b\r\n%b\r\n"
    talk.say(lines % (at, at, via, basic(parent)))
    status, count = 100, 0
    while status < 200:
        count += 1
        if count > INTERIM_LIMIT:
            raise Refused(BAD_RESPONSE, f"over {INTERIM_LIMIT} interim responses")
        line = talk.hear_head().partition(CRLF)[0]
        match = re.fullmatch(rb"HTTP/1\.[0-9] ([1-5][0-9][0-9])( .*)?", line)
        if not match:
            raise Refused(BAD_RESPONSE, "this is not HTTP")
        status = int(match[1])
    if status >= 300:
        outcome = PARENT_STATUS.get(status, CONNECT_FAILED)._replace(word=str(status))
        raise Refused(outcome, line[9:].decode("latin-1"))


def ask_socks(talk: Handshake, parent: Parent, host: str, port: int) -> None:
    """Have a parent connect to a host: RFC 1928 and 1929; raise Refused."""
    methods = b"\0\2" if parent.user else b"\0"
    talk.say(bytes([5, len(methods)]) + methods)
    version, method = talk.hear(2)
    if version != 5:
        raise Refused(BAD_RESPONSE, "this is not SOCKS5")
    if method not in methods:
        raise Refused(CONNECT_FAILED._replace(word="auth-required"), "it wants a user")
    if method == 2:
        user, password = parent.user, parent.password
        talk.say(b"\1%c%b%c%b" % (len(user), user, len(password), password))
        if talk.hear(2)[1]:
            outcome = CONNECT_FAILED._replace(word="auth-failed")
            raise Refused(outcome, "it does not know our user")
    try:
        packed = pack(host)
        to = (b"\1" if len(packed) == 4 else b"\4") + packed
    except ValueError:
        name = host.encode()
        to = b"\3%c%b" % (len(name), name)
    talk.say(b"\5\1\0%b%b" % (to, port.to_bytes(2, "big")))
    version, reply, _, kind = talk.hear(4)
    if version != 5 or not reply and kind not in (1, 3, 4):
        raise Refused(BAD_RESPONSE, "this is not SOCKS5")
    if reply:
        outcome = PARENT_REPLY.get(reply, CONNECT_FAILED)
        raise Refused(outcome._replace(word=f"reply-{reply}"), f"SOCKS reply {reply}")
    talk.hear({1: 4, 4: 16}.get(kind) or talk.hear(1)[0])
    talk.hear(2)


def dial_parent(
    worker: Worker,
    policy: Policy,
    session: Session,
    parent: Parent,
    target: tuple[str, int],
) -> socket.socket:
    """Return a connection that leads to a target through a parent; raise Refused.

    For an http:// request and a parent that takes such it is one to the parent,
    and session.parent says so.
    """
    found = resolve(parent.host, parent.port)
    if policy.is_ours(found, parent.port):
        raise Refused(LOOP, "it is this gateway")  # SOCKS has no Via to tell
    deadline = time.monotonic() + worker.config.connect_timeout
    # What is near us is not reached by way of the outside.
    near = [packed for packed in found if policy.closes(forms(packed))]
    far = [packed for packed in found if packed not in near]
    attempts = follow(
        plan(near, parent.port, [], worker.board),
        plan(far, parent.port, policy.uplinks, worker.board),
    )
    sock = connect(worker, session, attempts)
    talk = Handshake(worker, sock, deadline)
    try:
        if parent.scheme == "socks5":
            ask_socks(talk, parent, *target)
        elif session.proto == "http":
            session.parent = parent
        else:
            via = b"%b1.1 %b" % (session.via, worker.config.name.encode())
            ask_http(talk, parent, via, endpoint(target).encode())
    except BaseException:
        sock.close()
        raise
    return sock


def parent_failed(parent: Parent, error: Refused | OSError) -> Refused:
    """Return a refusal that says by which parent it came about."""
    if isinstance(error, OSError):
        error = Refused(SERVER_GONE, reason(error))
    if error.outcome is DRAINED:
        return error
    outcome = error.outcome._replace(word=f"{PARENT_FAILED.word}-{error.outcome.word}")
    return Refused(outcome, f"parent {parent.name}: {error.detail}")


def readdress(head: bytes, authority: bytes, parent: Parent) -> bytes:
    """Return a request that is ready for its server as one for a parent.

    RFC 9112 section 3.2.2: in absolute-form, and for "*" without a path.
    """
    method, rest = head.split(b" ", 1)
    line, lines = rest.removeprefix(b"*").split(CRLF, 1)
    url = b"http://" + authority + line
    return b"%b %b\r\n%b%b" % (method, url, basic(parent), lines)


class Parents:
    """The parents of one configuration, and what goes through them."""

    def __init__(self, parents: list[Parent], rules: list[Rule]) -> None:
        self.parents, self.rules = parents, rules

    def parent_for(self, proto: str, host: str, found: list[bytes]) -> Parent | None:
        """Return the first parent that takes a target, None where we dial it."""
        for parent in self.parents:
            if proto == "http" or not parent.plain:
                known = [form for packed in found for form in forms(packed)]
                if parent.targets.names_target(host.rstrip("."), known):
                    return parent
        return None

    def trusts(self, client: str, user: str, host: str, port: int) -> bool:
        """Return whether a rule allows a name of which no address is known here."""
        who, bare, name = address_of(client), user.partition(";")[0], host.rstrip(".")
        for rule in self.rules:
            if rule.matches(who, bare, name, port, []):
                if not rule.allow:
                    return False
                if rule.names and (port != 25 or rule.takes_mail()):
                    return True
        return False

    def dial(
        self,
        worker: Worker,
        policy: Policy,
        session: Session,
        host: str,
        port: int,
        only: str,
    ) -> socket.socket:
        """Do what dial() says where a parent may take the target, as `parents` says."""
        unknown = None
        addresses: list[bytes] = []
        try:
            addresses = judged(worker, policy, session, host, port)
        except Refused as refusal:
            # A parent may know the name, if it is one that may be asked for.
            nameless = refusal.outcome in (NO_SUCH_HOST, DNS_TIMEOUT)
            if not nameless or not self.trusts(worker.peer, session.user, host, port):
                raise
            unknown = refusal
        if parent := self.parent_for(session.proto, host, addresses):
            try:
                return dial_parent(worker, policy, session, parent, (host, port))
            except (OSError, Refused) as error:
                raise parent_failed(parent, error) from None
        if unknown:
            raise unknown
        if only:
            addresses = judged(worker, policy, session, host, port, only)
        return dial_addresses(worker, policy, session, addresses, port)

    readdress = staticmethod(readdress)
    failed = staticmethod(parent_failed)


def join(chapters: Chapters, config: Config, policy: Policy) -> None:
    """Dial by way of parents from now on, if there are any; raise ConfigError."""
    try:
        parents = [parse_parent(line) for line in config.lines("parents")]
    except ValueError as error:
        raise config.refuse("parents", str(error)) from None
    if parents:
        chapters.parents = Parents(parents, policy.rules)
