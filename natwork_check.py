"""Check, a chapter of NATWork: what can be read, and is probably not what was meant.

It refuses what a start would fail at, and names what would serve nobody.  Without it
the gateway runs all the same, and says less.
"""
# SPDX-License-Identifier: MIT

from __future__ import annotations

import difflib
import os
import re
import socket

import natwork
from natwork import Config

VERSION = "0.1.0"

SERVICE_FILE = "/etc/natwork/natwork.conf"
# Where a unit that listens for the service may lie: systemd.unit(5).
FOLDERS = "/etc/systemd/system", "/usr/local/lib/systemd/system", "/lib/systemd/system"
UNITS = [f"{folder}/natwork.socket" for folder in FOLDERS]


def hinted(fault: str) -> str:
    """Return the line of a fault, with what was probably meant."""
    match = re.fullmatch(r".*?: (\w+) = (.*): (.*)", fault)
    name, value, why = match.groups() if match else ("", "", "")
    near = difflib.get_close_matches(name, natwork.DEFAULTS, 1)
    if near and name not in natwork.DEFAULTS:
        return f"{fault}; did you mean {near[0]}?"
    if re.search(r"\s[#;]", value):
        return f"{fault}; a comment has a line of its own"
    if "," in value and name in ("listen", "inside", "outside", "gateways"):
        return f"{fault}; blanks stand between them, and no commas"
    if re.fullmatch("[0-9.]+ *[a-z]+", value) and "number" in why:
        return f"{fault}; it has no unit"
    return fault


def examine_listeners(config: Config) -> None:
    """Raise ConfigError if two addresses of `listen` cannot be together."""
    found = natwork.endpoints(Config(listen=config.listen))
    for host, port in found:
        if found.count((host, port)) > 1:
            twice = natwork.endpoint((host, port))
            raise config.refuse("listen", f"names {twice} twice")
        for every in ("*", "::" if ":" in host else "0.0.0.0"):
            if host not in ("*", every) and port and (every, port) in found:
                whole = natwork.endpoint((every, port))
                raise config.refuse("listen", f"{whole} has {host} in it")


def examine_files(config: Config) -> None:
    """Raise ConfigError if a file that a start would write cannot be."""
    makes = ["pidfile"] if natwork.find_user(config) else []  # its directory, too
    for name in ("log", "pidfile"):
        file = getattr(config, name)
        folder = os.path.dirname(file) or "."
        if file in ("", "-") or name in makes and not os.path.exists(folder):
            continue
        if not os.path.isdir(folder):
            raise config.refuse(name, "there is no such directory")
        there = file if os.path.exists(file) else folder
        if os.path.isdir(file) or not os.access(there, os.W_OK):
            raise config.refuse(name, "it cannot be written")


def warn_of_start(
    config: Config, held: dict[str, socket.socket], old: natwork.Generation | None
) -> None:
    """Say which settings have no effect: here, or until a restart.

    The listeners held are those that systemd passed, or of the old generation.
    """
    for name in ("user", "pidfile"):
        if old and getattr(config, name) != getattr(old.config, name):
            natwork.say(f"{name} is changed by a restart only")
            setattr(config, name, getattr(old.config, name))  # said once
    passed = any(name.startswith("systemd ") for name in held)
    before = old.config.listen if old else Config.listen
    if passed and config.listen != before:
        natwork.say("listen is not used: systemd passes the listeners (natwork.socket)")


def warn(config: Config) -> None:
    """Say what is probably not meant; raise OSError."""
    if not config.inside.split():
        natwork.say("inside: nobody is a client, it is empty")
    if not config.users and any(
        natwork.Rule(line, 0).users for line in config.lines("rules")
    ):
        natwork.say("rules: a rule with user fits nobody, users is not set")
    services = config.file == SERVICE_FILE and "LISTEN_FDS" not in os.environ
    for unit in UNITS if services and "listen" in config.where else ():
        if os.path.exists(unit):
            natwork.say(f"listen: the service does not use it, {unit} listens for it")
    theirs = {u.packed for u in map(natwork.parse_uplink, config.outside.split())}
    hosts = {host for host, _ in natwork.endpoints(Config(listen=config.listen))}
    if theirs and "*" not in hosts and {natwork.pack(host) for host in hosts} <= theirs:
        natwork.say("listen: nobody is a client at an address of outside")
    for uplink in map(natwork.parse_uplink, config.outside.split()):
        if not uplink.is_there():
            natwork.say(f"outside: {uplink.name} is not there now")
    anywhere = natwork.pack("192.0.2.1")
    device = "" if config.outside else natwork.route_to(anywhere).device
    inside = natwork.networks(config.inside)
    for packed in natwork.device_addresses(device):
        # Link-local neighbors are refused; and the addresses of IPv6 are many.
        is_global = not natwork.contains(natwork.LINK_LOCAL, packed)
        if len(packed) == 4 and is_global and natwork.contains(inside, packed):
            natwork.say(
                f"{device} leads outside and has {natwork.unpack(packed)}, an inside "
                "address: its neighbors count as clients; set outside or inside"
            )
