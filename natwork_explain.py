"""Explain, a chapter of NATWork: which rule decides about a client and a target.

It asks what the gateway would ask, and dials nothing.
"""
# SPDX-License-Identifier: MIT

from __future__ import annotations

import contextlib
import os
import re
import socket

from natwork import NAME_SIZE
from natwork import OK
from natwork import Chapters
from natwork import Config
from natwork import Policy
from natwork import Refused
from natwork import Scoreboard
from natwork import address_of
from natwork import device_addresses
from natwork import endpoint
from natwork import endpoints
from natwork import is_there
from natwork import load_config
from natwork import need_chapter
from natwork import parse_authority
from natwork import parse_target
from natwork import printable
from natwork import resolve
from natwork import route_to
from natwork import unpack
from natwork import ways

VERSION = "0.1.0"


def explain_client(config: Config, policy: Policy, client: str, user: str) -> bool:
    """Print whether a client is served; return whether he may be; raise OSError."""
    try:
        packed = address_of(client)
    except ValueError as error:
        raise OSError(f"cannot explain: {error}") from None
    inside, near = policy.placed(client)
    if inside and (policy.uplinks or near):
        scope = 0
        with contextlib.suppress(OSError):
            scope = socket.if_nametoindex(client.partition("%")[2])
        inside = policy.comes_from_inside(client, scope, None)
    if inside and policy.uplinks and (route := route_to(packed)):
        for uplink in policy.uplinks:
            if uplink.packed in device_addresses(route.device):
                print(f"if he comes to {uplink.name}, the outside: not inside, refused")
    print(f"client {client}: {'inside, served' if inside else 'not inside, refused'}")
    if inside and config.users and user == "-":
        print("as no user: asked for name and password first")
    return inside


def explain(path: str, options: list[str], words: list[str]) -> int:
    """Print which rule decides about a client and a target; dial nothing."""
    config = load_config(path, options)
    own = [("0.0.0.0" if h == "*" else h, port) for h, port in endpoints(config)]
    policy, chapters = Policy(config, own), Chapters()
    if config.parents:
        need_chapter("parents", "parents").join(chapters, config, policy)
    parents = chapters.parents
    client, wanted = words[0], os.fsencode(words[1])
    user = printable(os.fsencode("".join(words[2:])), NAME_SIZE)
    if not explain_client(config, policy, client, user):
        return 0
    host, addresses = "", []
    proto = "connect"
    try:
        if secure := re.match(rb"(?i)https://([^/?#]*)", wanted):  # asked by CONNECT
            host, port = parse_authority(secure[1], 443)
        elif b"://" in wanted:
            target, _ = parse_target(b"GET", wanted)
            host, port, proto = target.host, target.port, target.scheme.decode()
        else:
            host, port = parse_authority(wanted, 0)
        print(f"target {endpoint((host, port))}")
        if proto == "http" and policy.means_us(host, port):
            print("answered by the gateway itself, with its own pages")
            return 0
        addresses = resolve(host, port)
    except Refused as refusal:
        unknown = host and parents and parents.trusts(client, user, host, port)
        if not unknown or not parents.parent_for(proto, host, []):
            print(f"refused: {refusal.outcome.word}: {refusal.detail}")
            return 0
        print(f"{refusal.detail}; a rule allows the name")
    allowed = []
    for packed in addresses:
        outcome, rule = policy.judge(client, user, host, port, packed)
        word = "allowed" if outcome is OK else f"refused ({outcome.word})"
        print(f"{unpack(packed)}: {word} by {rule}")
        if outcome is OK:
            allowed.append(packed)
    if parents and (allowed or not addresses):
        if parent := parents.parent_for(proto, host, allowed):
            print(f"would ask the parent {parent.name}")
            return 0
    attempts = ways(policy, allowed, port, Scoreboard())
    if allowed and not attempts:
        print("refused: unreachable: no uplink has an address of its family")
    for attempt in attempts:
        route = route_to(attempt.packed)
        if attempt.uplink:
            there = "" if is_there(attempt.uplink) else ", which is not there now"
            way = f"from {attempt.uplink.name}{there}"
        elif route and route.source:
            way = f"from {route.source}, by {route.device}, as the routing table has it"
        else:
            way = "but the routing table has no way there"
        print(f"would dial {endpoint((unpack(attempt.packed), port))} {way}")
    return 0
