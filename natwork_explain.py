"""Explain, a chapter of NATWork: which rule decides about a client and a target.

It asks what the gateway would ask, of the resolver and the routing table too, says
which address would be dialed and from where, and dials nothing.
"""
# SPDX-License-Identifier: MIT

from __future__ import annotations

import contextlib
import os
import re
import socket

import natwork

VERSION = "0.1.0"


def explain_client(chapters: natwork.Chapters, client: str, user: str) -> bool:
    """Print whether a client is served; return whether it may be; raise OSError."""
    policy, scope = chapters.policy, 0
    with contextlib.suppress(OSError):  # it names no device
        scope = socket.if_nametoindex(client.partition("%")[2])
    try:
        # It comes to the address from which it would be answered.
        here = natwork.route_to(natwork.address_of(client)).source
        theirs = policy.outside() if policy.uplinks else {}
        inside = policy.is_client((client, 0, 0, scope), None)
        inside = inside and not (here and natwork.pack(here) in theirs)
    except ValueError as error:
        raise OSError(f"cannot explain: {error}") from None
    print(f"client {client}: {'inside, served' if inside else 'not inside, refused'}")
    users = chapters.users.lines if chapters.config.users else {}
    if inside and chapters.config.users and user == "-":
        print("as no user: asked for name and password first")
    elif inside and user.partition(";")[0] not in (*users, "-"):
        print(f"as {user}: refused (auth-failed), not in {chapters.config.users}")
        return False
    return inside


def parse_wanted(wanted: bytes) -> tuple[str, str, int]:
    """Return protocol, host and port of a URL, or of HOST:PORT; raise Refused."""
    if wanted[:5].lower() == b"ws://":  # which an upgrade begins
        wanted = b"http" + wanted[2:]
    if secure := re.match(rb"(?i)https://([^/?#]*)", wanted):  # asked by CONNECT
        return "connect", *natwork.parse_authority(secure[1], 443)
    if b"://" in wanted:
        target = natwork.parse_target(b"GET", wanted)
        return target.scheme.decode(), target.host, target.port
    return "connect", *natwork.parse_authority(wanted, 0)


def explain_dials(chapters: natwork.Chapters, allowed: list[bytes], port: int) -> bool:
    """Print what would be dialed for some allowed addresses; return whether any is."""
    attempts = natwork.ways_to(chapters.policy, allowed, port, chapters.board)
    if allowed and not attempts:
        print("cannot dial it: unreachable: no uplink has an address of its family")
    for attempt in attempts:
        route = natwork.route_to(attempt.packed)
        if attempt.uplink:
            there = attempt.uplink.is_there()
            missing = "" if there else ", which is not there now"
            way = f"from {attempt.uplink.name}{missing}"
        elif route.source:
            way = f"from {route.source}, by {route.device}, as the routing table has it"
        else:
            way = "but the routing table has no way there"
        print(f"would dial {natwork.endpoint(attempt.where())} {way}")
    return bool(attempts)


def explain(config: natwork.Config, words: list[str]) -> int:
    """Print which rule decides; return the exit code, 0 for what is allowed, else 1."""
    chapters = natwork.examine(config, natwork.Scoreboard())
    print(f"settings: {config.file or 'the defaults'}")
    policy, parents = chapters.policy, chapters.parents
    for host, port in config.parsed("listen", natwork.parse_endpoint):
        policy.listens_at("0.0.0.0" if host == "*" else host, port)
    # Without `users` a name is but a claim, and no rule sees it.
    client, name = words[0], "".join(words[2:]) if config.users else ""
    user = natwork.printable(os.fsencode(name), natwork.NAME_SIZE)
    if not explain_client(chapters, client, user):
        return 1
    host, addresses, parent = "", [], None
    try:
        proto, host, port = parse_wanted(os.fsencode(words[1]))
        print(f"target {natwork.endpoint((host, port))}")
        if proto == "http" and policy.means_us(host, port):
            print("answered by the gateway itself, with its own pages")
            return 0
        addresses = natwork.resolve(host)
    except natwork.Refused as refusal:
        if host and parents:
            parent = parents.that_may_know(refusal, client, user, proto, host, port)
        if not parent:
            print(f"cannot serve it: {refusal.outcome.word}: {refusal.detail}")
            return 1
        print(f"{refusal.detail}; a rule allows the name")
    allowed = []
    for packed in addresses:
        outcome, rule = policy.judge(client, user, host, port, packed)
        word = "allowed" if outcome is natwork.OK else f"refused ({outcome.word})"
        print(f"{natwork.unpack(packed)}: {word} by {rule}")
        if outcome is natwork.OK:
            allowed.append(packed)
    if parents and allowed:
        parent = parents.parent_for(proto, host, allowed)
    if parent:
        print(f"would ask the parent {parent.name}")
        return 0
    return 0 if explain_dials(chapters, allowed, port) else 1
