"""Redirected flows, a chapter of NATWork: NAT without a setting on the client.

The client knows of no proxy: nftables has sent its packets to our port (redirect),
and SO_ORIGINAL_DST says where it wanted to go.  That address is dialed, whatever the
client goes on to say.  A name in its first words, the Host of an HTTP request or the
server name of a TLS ClientHello (RFC 6066 section 3), is a claim: the log shows it and
a rule may deny it, but it opens nothing.

It does not decrypt, and it changes no byte.  A client that is refused gets a reset.
"""
# SPDX-License-Identifier: MIT

from __future__ import annotations

import contextlib
import re
import socket
import time

import natwork
from natwork import Refused
from natwork import Worker

VERSION = "0.1.0"

RECORDS = 256  # that a TLS hello may come in; nearly all come in one
NAME_LIMIT = 255  # of a longer name the end is judged: RFC 1035 section 2.3.4
SNIFF_DELAY = 0.25  # for a name that only the log wants: too short to be noticed
# The start of what some server takes for a request line: servers differ, and some take
# any word for a method, any blank, and any byte in a path.
REQUEST_BEGUN = re.compile(
    rb"[\t\v\f ]*(?:%b(?:[\t\v\f ][\t\v\f -~\x80-\xff]*\r?)?"
    rb"|[A-Za-z][!-~]*(?:[\t\v\f ][^\0\r\n]*\r?)?)?" % natwork.TOKEN
)
URL = re.compile(rb"\A[A-Za-z][A-Za-z0-9+.-]*://([^/?#]*)")
# Some servers take LF or CR for CRLF, a folded line, or a blank before the colon.
HOST_FIELD = re.compile(
    rb"(?:^|\r)host[ \t]*:(?:\s*[\t\v\f ])?(\S*)", re.IGNORECASE | re.MULTILINE
)


def original_target(client: natwork.Client) -> tuple[str, int] | None:
    """Return the host and port that a client had dialed, None if it was not redirected.

    A client that dialed an address of this box does not count as redirected.
    """
    sock, ipv4 = client.stream.sock, ":" not in client.host
    level = socket.SOL_IP if ipv4 else socket.IPPROTO_IPV6
    try:
        raw = sock.getsockopt(level, 80, 28)  # SO_ORIGINAL_DST, IP6T_SO_ORIGINAL_DST
    except OSError:  # ENOENT, ENOPROTOOPT: nothing is translated here
        return None
    packed = raw[4:8] if ipv4 else raw[8:24]
    with contextlib.suppress(OSError):  # dial() will meet it too, and say so
        if natwork.route_to(packed).local:
            return None
    return natwork.unpack(packed), int.from_bytes(raw[2:4], "big")


def server_name(data: bytes) -> list[bytes] | None:
    """Return the name in a TLS ClientHello, [] for none, None while it is not whole.

    RFC 8446 section 4.1.2, RFC 6066 section 3.  The hello may come in several records.
    Raises Refused for too many, because each recv() has us parse all of them again.
    """
    hello, at, records = bytearray(), 0, 0

    def number(at: int, size: int) -> int:
        return int.from_bytes(hello[at : at + size], "big")

    while data[at : at + 1] == b"\x16":  # a handshake record
        records += 1
        if records > RECORDS:
            raise Refused(natwork.BAD_REQUEST, "a TLS hello in too many records")
        size = int.from_bytes(data[at + 3 : at + 5], "big")
        hello += data[at + 5 : at + 5 + size]
        at += 5 + size
    if hello and hello[0] != 1:  # it is not a ClientHello
        return []
    end = 4 + number(1, 3)
    if len(hello) < end:
        return None if at >= len(data) else []  # []: another type of record follows
    at = 39 + number(38, 1)  # after version, random and session
    at += 2 + number(at, 2)  # cipher suites
    at += 3 + number(at, 1)  # compression, and the length of the extensions
    while at < end:
        if number(at, 2) == 0:  # server_name
            name = bytes(hello[at + 9 : at + 9 + number(at + 7, 2)])
            return [name] if name else []
        at += 4 + number(at + 2, 2)
    return []


def claimed_names(data: bytes) -> list[bytes] | None:
    """Return the names in a client's first bytes, None while there may be more."""
    if data[:1] == b"\x16":
        return server_name(data)
    line, newline, _ = data.partition(b"\n")
    if not newline:
        return None if REQUEST_BEGUN.fullmatch(data) else []
    words = line.split()
    if len(words) < 3 or not words[-1].startswith(b"HTTP/"):
        return []
    if not (end := natwork.HEAD_END.search(data)):
        return None
    names = HOST_FIELD.findall(data, 0, end.end()) + URL.findall(words[1])
    # Of "a:b@c" some servers take a for the host, and others c: both are claims.
    names += [name.rpartition(b"@")[2] for name in names]
    hosts = [n if n[:1] == b"[" else n.partition(b":")[0] for n in names]
    bare = [host.partition(b"]")[0].removeprefix(b"[") for host in hosts]
    return [name for name in dict.fromkeys(bare) if name]


def sniff(
    worker: Worker, session: natwork.Session, server: natwork.Stream, strict: bool
) -> list[bytes]:
    """Receive a client's hello or request head; return the names in it.

    Its bytes stay in the client's stream.  There are no names if the server speaks
    first.  Raises Refused; if strict, also when the hello or head does not end in time.
    """
    client, watch, config = worker.client.stream, worker.watch, worker.config
    if server.received:  # it came with a parent's answer
        return []
    wanted = {client.fd: natwork.POLLIN, server.fd: natwork.POLLIN}
    ready = watch.wait(wanted, config.tunnel_timeout)
    if not ready:
        raise Refused(natwork.IDLE, "nothing moved")
    deadline = time.monotonic() + (config.head_timeout if strict else SNIFF_DELAY)
    while ready and len(client.received) <= natwork.HEAD_LIMIT:
        if server.fd in ready:
            return []
        if not client.fill():  # a server may take a head that ends so
            return claimed_names(bytes(client.received) + b"\n\n") or []
        # Pass empty lines on at once: in finger and gopher one is a whole question,
        # and an HTTP server ignores them before a request.
        blank = len(client.received) - len(client.received.lstrip(b"\r\n"))
        watch.send(server, client.take(blank))
        session.up += server.counted()
        names = claimed_names(bytes(client.received))
        if names is not None:
            return names
        ready = watch.wait(wanted, deadline - time.monotonic())
    if strict:
        raise Refused(natwork.HEAD_TIMEOUT, "the first bytes did not come to their end")
    return []


def redirect(worker: Worker, session: natwork.Session, host: str, port: int) -> None:
    """Join a redirected client to the address that it dialed; raise Refused."""
    if worker.config.users:
        raise Refused(natwork.AUTH_REQUIRED, "a redirected client cannot log in")
    if natwork.route_to(natwork.address_of(worker.client.host)).local:
        raise Refused(natwork.LOOP, "this box redirects what it sends itself")
    worker.begin(session)
    with contextlib.closing(natwork.dial(worker, session, host, port)) as server:
        worker.proceed(session)
        # A rule for "*" decides without a name.
        denies = [rule.names - {"*"} for rule in worker.policy.rules if not rule.allow]
        strict = any(denies)
        for claim in sniff(worker, session, server, strict):
            name = claim.rstrip(b".")[-NAME_LIMIT:].lower()
            session.target = natwork.endpoint((natwork.printable(name), port))
            natwork.judged(worker, session, name.decode("latin-1"), port, host)
            worker.proceed(session)
        session.outcome = natwork.ENDED
        natwork.tunnel(worker, session, server, b"")


def serve(worker: Worker) -> bool:
    """Serve a client if it was redirected; return whether it was."""
    client = worker.client
    target = original_target(client)
    if not target:
        return False
    session = natwork.Session(client.endpoint, worker.pid_text, "redirect")
    session.target = natwork.endpoint(target)

    def refuse(refusal: Refused) -> natwork.Outcome:
        client.stream.abort()  # no byte of ours belongs in what the two say
        return refusal.outcome

    worker.record(session, lambda: redirect(worker, session, *target), refuse)
    return True


def join(chapters: natwork.Chapters) -> None:
    """Serve redirected flows from now on."""
    chapters.redirect = serve
