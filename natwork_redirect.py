"""Redirected flows, a chapter of NATWork: NAT without a setting on the client.

A client that knows of no proxy, whose packets the kernel sent to our port.  We
dial the address that he dialed, whatever he goes on to say.  The name in his
first words is a claim: it may be written down, and it may be denied.
"""
# SPDX-License-Identifier: MIT

from __future__ import annotations

import contextlib
import re
import socket
import time

from natwork import BROKEN
from natwork import CLIENT_GONE
from natwork import COPY_SIZE
from natwork import ENDED
from natwork import HEAD_LIMIT
from natwork import HEAD_TIMEOUT
from natwork import IDLE
from natwork import LOOP
from natwork import OK
from natwork import POLLIN
from natwork import SERVER_GONE
from natwork import SITE
from natwork import TOKEN
from natwork import Chapters
from natwork import Config
from natwork import Lane
from natwork import Outcome
from natwork import Policy
from natwork import Refused
from natwork import Session
from natwork import Stream
from natwork import Worker
from natwork import address_of
from natwork import anonymous
from natwork import dial
from natwork import endpoint
from natwork import outcome_of
from natwork import pack
from natwork import printable
from natwork import reason
from natwork import route_to
from natwork import tunnel
from natwork import unpack

VERSION = "0.1.0"

CLAIM_DELAY = 0.25  # for a redirected client's half sentence that no rule waits for
# What may yet become a request line to some server: some take any word for a method,
# any blank, and any byte in a path.
CLAIMING = re.compile(
    rb"[\t\v\f ]*(?:%b(?:[\t\v\f ][\t\v\f -~\x80-\xff]*\r?)?"
    rb"|[A-Za-z][!-~]*(?:[\t\v\f ][^\0\r\n]*\r?)?)?" % TOKEN
)
# Some take LF or CR for CRLF, or a folded line, or a blank before the colon.
CLAIMED_HOST = re.compile(rb"(?:^|\r)host[ \t]*:\s*(\S*)", re.IGNORECASE | re.MULTILINE)


def redirected_from(worker: Worker) -> tuple[str, int] | None:
    """Return where a client wanted to go before he was redirected, None if to us."""
    four = ":" not in worker.peer
    level = socket.SOL_IP if four else socket.IPPROTO_IPV6
    try:
        raw = worker.client.getsockopt(level, 80, 28)  # SO_ORIGINAL_DST, of both
    except OSError:  # ENOENT, ENOPROTOOPT: nothing is translated here
        return None
    host = unpack(raw[4:8] if four else raw[8:24])
    here = worker.client.getsockname()[0].partition("%")[0].removeprefix("::ffff:")
    return None if host == here else (host, int.from_bytes(raw[2:4], "big"))


def server_names(data: bytes) -> list[bytes] | None:
    """Return the name in a TLS ClientHello, None while it is not whole.

    RFC 8446 section 4.1.2, RFC 6066 section 3; in as many records as it may come.
    """
    hello, at = bytearray(), 0

    def number(at: int, size: int) -> int:
        return int.from_bytes(hello[at : at + size], "big")

    while data[at : at + 1] == b"\x16":
        size = int.from_bytes(data[at + 3 : at + 5], "big")
        hello += data[at + 5 : at + 5 + size]
        at += 5 + size
    if hello and hello[0] != 1:
        return []
    end = 4 + number(1, 3)
    if len(hello) < end:
        return None if at >= len(data) else []
    at = 39 + number(38, 1)  # behind version, random and session
    at += 2 + number(at, 2)  # cipher suites
    at += 3 + number(at, 1)  # compression, and the length of the extensions
    while at < end:
        if number(at, 2) == 0:
            return [bytes(hello[at + 9 : at + 9 + number(at + 7, 2)])]
        at += 4 + number(at + 2, 2)
    return []


def claimed_names(data: bytes) -> list[bytes] | None:
    """Return the names that a client's first words claim, None while more may come."""
    if data[:1] == b"\x16":
        return server_names(data)
    line, newline, _ = data.partition(b"\n")
    if not newline:
        return None if CLAIMING.fullmatch(data) else []
    words = line.split()
    if len(words) < 3 or not words[-1].startswith(b"HTTP/"):
        return []
    if not (end := re.search(rb"\n\r?\n", data)):
        return None
    names = CLAIMED_HOST.findall(data[: end.end()])
    if absolute := SITE.match(words[1]):
        names.append(absolute[2])
    # Servers differ: what is before "@", or behind ":", may be anything to them.
    names += [name.rpartition(b"@")[2] for name in names]
    hosts = [name if b"]" in name else name.partition(b":")[0] for name in names]
    bare = [host.partition(b"]")[0].removeprefix(b"[") for host in hosts]
    return [name for name in dict.fromkeys(bare) if name]


def hear_out(
    worker: Worker, session: Session, client: Stream, server: Stream, strict: bool
) -> list[bytes]:
    """Keep a client's first words until they are whole; return the names they claim.

    Who lets the server speak first claims nothing.  Raises Refused; strict: also
    for words that do not come to their end.
    """
    watch, config, received = worker.watch, worker.config, client.received
    lane = Lane(watch, client, server, 0)
    wanted = {client.fd: POLLIN, server.fd: POLLIN}
    ready = watch.wait(wanted, config.tunnel_timeout)
    if not ready:
        raise Refused(IDLE, "nothing moved")
    deadline = time.monotonic() + (config.head_timeout if strict else CLAIM_DELAY)
    while ready:
        if server.fd in ready:
            return []
        try:
            data = client.sock.recv(COPY_SIZE)
        except OSError as error:
            raise Refused(CLIENT_GONE, reason(error)) from None
        received += data
        if not data:
            return claimed_names(bytes(received) + b"\n\n") or []
        # A blank line is a question by itself in finger and gopher, and before
        # HTTP it says nothing.
        lane.out += client.take(len(received) - len(received.lstrip(b"\r\n")))
        if lane.out and not lane.push(server):
            raise Refused(SERVER_GONE, "the server took no more")
        session.up = lane.moved
        names = claimed_names(bytes(received))
        if names is not None:
            return names
        if len(received) > HEAD_LIMIT:
            break
        ready = watch.wait(wanted, deadline - time.monotonic())
    if strict:
        raise Refused(HEAD_TIMEOUT, "the first words did not come to their end")
    return []


def redirect(
    worker: Worker, policy: Policy, session: Session, client: Stream, port: int
) -> Outcome:
    """Connect a redirected client with the address he dialed; raise Refused."""
    host, peer = session.host(), worker.peer
    worker.check_share()
    session.user = anonymous(worker)
    if (route := route_to(address_of(peer))) and route.local:
        raise Refused(LOOP, "this box redirects what it sends itself")
    worker.begin(session)
    server = Stream(dial(worker, policy, session, host, port), SERVER_GONE)
    with contextlib.closing(server):
        worker.proceed(session)
        strict = any(rule.names and not rule.allow for rule in policy.rules)
        for name in hear_out(worker, session, client, server, strict):
            session.target = endpoint((printable(name.lower()), port))
            claim = name.decode("latin-1").lower()
            outcome, rule = policy.judge(
                peer, session.user, claim, port, pack(host), True
            )
            if outcome is not OK:
                raise Refused(outcome, rule)
            worker.proceed(session)
        tunnel(worker, session, client, server, b"")
    return ENDED


def serve_redirected(
    worker: Worker, policy: Policy, client: Stream, host: str, port: int
) -> None:
    """Serve a redirected client; he gets no byte of ours, and a reset for a refusal."""
    session = Session(worker.name, worker.word, "redirect")
    session.target = endpoint((host, port))
    outcome = BROKEN
    try:
        outcome = redirect(worker, policy, session, client, port)
    except Refused as refusal:
        outcome = refusal.outcome
    except OSError as error:
        outcome = outcome_of(error)
    finally:
        if outcome is not ENDED:
            client.abort()
        worker.finish(session, outcome.word)


def serve(worker: Worker, policy: Policy, client: Stream) -> bool:
    """Serve a client if he was redirected; return whether he was."""
    target = redirected_from(worker)
    if target:
        serve_redirected(worker, policy, client, *target)
    return bool(target)


def join(chapters: Chapters, config: Config, policy: Policy) -> None:
    """Serve redirected flows from now on."""
    chapters.redirect = serve
