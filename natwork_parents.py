"""Parents, a chapter of NATWork: other proxies to go through, as `parents` says.

The rules judge a target first, as without parents, but not a parent's own address.
For an http:// request an HTTP parent is a server like any other, except that the
request line names the whole URL (RFC 9112 section 3.2.2).  All else goes through a
tunnel that we ask for by CONNECT (RFC 9110 section 9.3.6) or by SOCKS 5 (RFC 1928,
RFC 1929).  SOCKS BIND and datagrams never go by a parent.

It does not balance and does not probe: the first parent that takes a target gets
it.  The heart's dial() calls Parents.dial(), and an exchange asks the Parent of its
server connection how to write the request, and whom to blame.
"""
# SPDX-License-Identifier: MIT

from __future__ import annotations

import re
import time
from typing import NamedTuple

import natwork
from natwork import Refused
from natwork import Session
from natwork import Stream
from natwork import Worker

VERSION = "0.1.0"

URL = re.compile(r"(http|socks5)://(?:([^:@/]+:[^:@/]*)@)?([^@/]+:[0-9]+)/?")
# A parent does not know our user, or wants one where we have none.
UNKNOWN = natwork.CONNECT_FAILED._replace(advice=natwork.ASK_OPERATOR)
# A parent's refusal, as an outcome for our client; any other is CONNECT_FAILED.
REFUSALS = {
    403: natwork.DENIED,  # an HTTP status
    407: UNKNOWN,
    503: natwork.OVERLOAD,
    504: natwork.CONNECT_TIMEOUT,
    2: natwork.DENIED,  # a reply of SOCKS: RFC 1928 section 6
    3: natwork.UNROUTABLE,
    4: natwork.HOST_UNREACHABLE,
    5: natwork.CONNECT_REFUSED,
    6: natwork.CONNECT_TIMEOUT,
}
# Errors of RFC 9209 that are not a parent's fault, but the client's or this gateway's.
OTHERS = "", "http_request_error", "http_upgrade_failed", "proxy_internal_error"
OURS = natwork.OVERLOAD, natwork.NO_UPLINK


class Parent(NamedTuple):
    """Another proxy, and what goes through it."""

    name: str  # its URL, without user and password
    scheme: str  # http or socks5
    host: str
    port: int
    login: bytes  # user:password, as the URL spells it
    targets: natwork.Rule
    plain: bool  # for http:// requests alone

    def login_line(self) -> bytes:
        """Return the field line that tells the parent who we are, if it has to know."""
        line = b"Proxy-Authorization: Basic %b\r\n"
        return line % natwork.credentials(self.login) if self.login else b""

    def request_target(
        self, method: bytes, path: bytes, authority: bytes
    ) -> tuple[bytes, bytes]:
        """Return the target of a request line to the parent, and a field line.

        RFC 9112 section 3.2.2: in absolute-form, and for "*" without a path.
        """
        # RFC 9110 section 9.3.8: the answer to TRACE shows the client all of it.
        login = b"" if method == b"TRACE" else self.login_line()
        return b"http://%b%b" % (authority, path.removeprefix(b"*")), login

    def blamed(self, refusal: Refused) -> Refused:
        """Return a refusal that names this parent, if the fault is the parent's."""
        outcome, why = refusal.outcome, f"parent {self.name}: {refusal.detail}"
        if outcome.error in OTHERS or outcome in OURS:
            return refusal
        word = f"{natwork.PARENT_FAILED.word}-{outcome.word}"
        return Refused(outcome._replace(word=word), why)

    def ask_http(self, server: Stream, via: bytes, target: bytes) -> natwork.Steps:
        """Have the parent tunnel to a target: RFC 9110 section 9.3.6; raise Refused."""
        lines = b"CONNECT %b HTTP/1.1\r\nHost: %b\r\nVia: %b\r\n%b\r\n"
        request = lines % (target, target, via, self.login_line())
        yield from server.send_all(bytearray(request))
        bad, end = natwork.BAD_RESPONSE, natwork.HEAD_END
        for _ in range(natwork.INTERIM_LIMIT):
            head = yield from server.until(end, natwork.HEAD_LIMIT, bad)
            answer = natwork.ResponseHead(head)
            if answer.status >= 300:
                outcome = REFUSALS.get(answer.status, natwork.CONNECT_FAILED)
                why = answer.line[9:].decode("latin-1").strip()
                raise Refused(outcome._replace(word=str(answer.status)), why)
            if answer.status >= 200:
                return
        raise Refused(bad, f"over {natwork.INTERIM_LIMIT} interim responses")

    def ask_socks(self, server: Stream, host: str, port: int) -> natwork.Steps:
        """Have the parent connect to a host: RFC 1928 and 1929; raise Refused."""
        user, _, password = map(natwork.unescaped, self.login.partition(b":"))
        methods = b"\0\2" if user else b"\0"
        yield from server.send_all(bytearray([5, len(methods), *methods]))
        version, method = yield from server.exactly(2)
        if version != 5:
            raise Refused(natwork.BAD_RESPONSE, "this is not SOCKS5")
        failed = natwork.CONNECT_FAILED
        if method not in methods:
            raise Refused(UNKNOWN._replace(word="auth-required"), "it wants a user")
        if method == 2:
            login = b"\1%c%b%c%b" % (len(user), user, len(password), password)
            yield from server.send_all(bytearray(login))
            if (yield from server.exactly(2))[1]:
                why = "it does not know our user"
                raise Refused(UNKNOWN._replace(word="auth-failed"), why)
        try:
            packed = natwork.pack(host)
            address = (b"\1" if len(packed) == 4 else b"\4") + packed
        except ValueError:
            address = b"\3%c%b" % (len(host), host.encode())
        request = b"\5\1\0%b%b" % (address, port.to_bytes(2, "big"))
        yield from server.send_all(bytearray(request))
        version, reply, _, kind = yield from server.exactly(4)
        if version != 5 or not reply and kind not in (1, 3, 4):
            raise Refused(natwork.BAD_RESPONSE, "this is not SOCKS5")
        if reply:
            outcome = REFUSALS.get(reply, failed)._replace(word=f"reply-{reply}")
            raise Refused(outcome, f"SOCKS reply {reply}")
        size = {1: 4, 4: 16}.get(kind) or (yield from server.exactly(1))[0]
        yield from server.exactly(size + 2)

    def dial(self, worker: Worker, session: Session, host: str, port: int) -> Stream:
        """Return a connection that leads to a target by this parent; raise Refused.

        For an http:// request and an HTTP parent there is no tunnel: the parent is the
        server, and the stream's parent says so.
        """
        policy, found = worker.policy, natwork.resolve(self.host)
        if policy.is_own_listener(found, self.port):
            # Via would show the loop only with HTTP, not with SOCKS.
            raise Refused(natwork.LOOP, "it is this gateway")
        deadline = time.monotonic() + worker.config.connect_timeout
        # An uplink leads outside; a parent on the inside or on this box needs none.
        inside = [packed for packed in found if policy.closes(packed)]
        outside = [packed for packed in found if packed not in inside]
        attempts = [natwork.Attempt(one, self.port, None, 0.0) for one in inside]
        attempts += natwork.ways_to(policy, outside, self.port, worker.board)
        server = natwork.Race(worker, session).run(attempts)
        if self.scheme == "socks5":
            steps = self.ask_socks(server, host, port)
        elif session.proto == "http":
            server.parent = self
            return server
        else:
            via = b"%b1.1 %b" % (session.via, worker.config.name.encode())
            target = natwork.endpoint((host, port)).encode()
            steps = self.ask_http(server, via, target)
        late = Refused(natwork.CONNECT_TIMEOUT, "no answer within connect_timeout")
        try:
            worker.watch.run(steps, late, deadline)
        except Refused:
            server.close()
            raise
        server.counted()  # what was said to the parent is not the session's
        return server


def parse_parent(text: str) -> Parent:
    """Return the parent that a line of `parents` describes.

    Raises ValueError, which does not quote the line: it may hold a password.
    """
    words, lists = natwork.parse_line(text, ("to", "scheme"))
    if lists.get("scheme", ["http"]) != ["http"]:
        raise ValueError("the only scheme to be named is http")
    match = URL.fullmatch(words[0])
    if not match:
        raise ValueError("a URL is http or socks5, ://, a host, a colon and a port")
    scheme, login, authority = match.groups(default="")
    try:
        host, port = natwork.parse_authority(authority.encode(), 0)
    except Refused as refusal:
        raise ValueError(refusal.detail) from None
    # A ":", "@" or "/" in a user or a password is written as in any URL: %3A.
    parts = map(natwork.unescaped, login.encode().split(b":"))
    if any(len(part) > 255 for part in parts):  # RFC 1929 section 2
        raise ValueError("a user or a password is longer than 255 bytes")
    targets = natwork.Rule(f"allow to {','.join(lists.get('to', '*'))}")
    shown, plain = f"{scheme}://{authority}", "scheme" in lists
    return Parent(shown, scheme, host, port, login.encode(), targets, plain)


class Parents:
    """The parents of one configuration, and what goes through them."""

    def __init__(self, parents: list[Parent], policy: natwork.Policy) -> None:
        self.parents, self.policy = parents, policy

    def parent_for(self, proto: str, host: str, found: list[bytes]) -> Parent | None:
        """Return the first parent that takes a target, None if we dial it ourselves."""
        known = [one for packed in found for one in natwork.embedded_addresses(packed)]
        for parent in self.parents:
            if proto == "http" or not parent.plain:
                if parent.targets.matches(b"", "", host.rstrip("."), 0, known):
                    return parent
        return None

    def that_may_know(
        self, refusal: Refused, client: str, user: str, proto: str, host: str, port: int
    ) -> Parent | None:
        """Return the parent for a name that we could not resolve, None for no parent.

        The parent may resolve it, but only a rule that allows the name lets it go on.
        """
        if not refusal.outcome.error.startswith("dns_"):
            return None
        peer, name = natwork.address_of(client), user.partition(";")[0]
        for rule in self.policy.rules:
            if rule.matches(peer, name, host.rstrip("."), port, []):
                if not rule.allow:
                    return None
                if rule.names and (port != 25 or rule.names_mail):
                    return self.parent_for(proto, host, [])
        return None

    def dial(
        self, worker: Worker, session: Session, host: str, port: int, only: str
    ) -> Stream:
        """Return a connection to a target, perhaps by a parent; raise Refused."""
        client, proto = worker.client.host, session.proto
        user = session.user if worker.config.users else "-"  # a name nobody checked
        try:
            addresses = natwork.judged(worker, session, host, port)
            parent = self.parent_for(proto, host, addresses)
        except Refused as refusal:
            parent = self.that_may_know(refusal, client, user, proto, host, port)
            if not parent:
                raise
        if parent:
            try:
                return parent.dial(worker, session, host, port)
            except Refused as refusal:
                raise parent.blamed(refusal) from None
        if only:
            addresses = natwork.judged(worker, session, host, port, only)
        attempts = natwork.ways_to(self.policy, addresses, port, worker.board)
        return natwork.Race(worker, session).run(attempts)


def join(chapters: natwork.Chapters) -> None:
    """Dial by way of parents from now on, if there are any."""
    if parents := chapters.config.parsed("parents", parse_parent):
        chapters.parents = Parents(parents, chapters.policy)
