"""Check, a chapter of NATWork: what the settings do, and whether that was meant.

It refuses what a start would fail at, and names what would serve nobody.  --explain
decides about one target as the gateway would, asks the resolver and the routing table
too, and dials nothing; --settings prints natwork.conf.  Without this chapter the
gateway runs, but says less.
"""
# SPDX-License-Identifier: MIT

from __future__ import annotations

import contextlib
import difflib
import os
import re
import socket
import sys

import natwork
from natwork import Config
from natwork import say

VERSION = "0.1.0"

SERVICE_FILE, SERVICE_LOGS = "/etc/natwork/natwork.conf", "/var/log/natwork/"
# systemctl(1) makes this link when it enables natwork.socket.
SOCKET_UNIT = "/etc/systemd/system/sockets.target.wants/natwork.socket"
EVERYWHERE = frozenset(natwork.networks("0.0.0.0/0 ::/0"))


def hinted(fault: str) -> str:
    """Return the line of a fault, with what was probably meant."""
    match = re.fullmatch(r".*?: (\S+) = (.*): (.*)", fault)
    name, value, why = match.groups() if match else ("", "", "")
    near = difflib.get_close_matches(name.lower(), natwork.DEFAULTS, 1)
    if near and name not in natwork.DEFAULTS:
        return f"{fault}; did you mean {near[0]}?"
    comment = r"\s#" if name in ("rules", "parents") else r"\s[#;]"
    if re.search(comment, value):
        return f"{fault}; a comment has a line of its own"
    if re.search("[,;]", value) and name in ("listen", "inside", "outside", "gateways"):
        return f"{fault}; separate them with blanks, not commas"
    if "is not pairs" in why or "is none of" in why:
        return f"{fault}; separate the members of a list with commas, not blanks"
    if re.fullmatch("[0-9.]+ *[a-z]+", value) and "number" in why:
        return f"{fault}; write the number without a unit"
    return fault


def examine_listeners(config: Config, found: list[tuple[str, int]]) -> None:
    """Refuse two addresses of `listen` that cannot both be bound."""
    for host, port in found:
        if found.count((host, port)) > 1:
            config.refuse("listen", f"names {natwork.endpoint((host, port))} twice")
        for every in ("*", "::" if ":" in host else "0.0.0.0"):
            if host not in ("*", every) and port and (every, port) in found:
                whole = natwork.endpoint((every, port))
                config.refuse("listen", f"{whole} already includes {host}")


def examine_files(config: Config) -> None:
    """Refuse a file that a start would need to write and cannot."""
    root = os.geteuid() == 0 and config.user != "root"
    for name in ("log", "pidfile"):
        file = getattr(config, name)
        folder = os.path.dirname(file) or "."
        if file in ("", "-"):
            continue
        if root and name == "pidfile" and not os.path.exists(folder):
            folder = os.path.dirname(folder) or "."  # the start makes the other
        there = file if os.path.exists(file) else folder
        if not os.path.isdir(folder):
            config.refuse(name, "there is no such directory")
        elif os.path.isdir(file):
            config.refuse(name, "it is a directory")
        elif not os.access(there, os.W_OK):
            fixed = os.statvfs(there).f_flag & os.ST_RDONLY
            why = "read-only file system" if fixed else "permission denied"
            config.refuse(name, f"it cannot be written: {why}")


def warn_of_rules(chapters: natwork.Chapters) -> None:
    """Say which rules fit nobody, or open more than they seem to."""
    config, policy = chapters.config, chapters.policy
    if not config.users and any(rule.users for rule in policy.rules):
        say("rules: a rule with user fits nobody, users is not set")
    users = chapters.users.lines if config.users else {}
    if config.users and not users:
        say(f"users: {config.users} has none, so nobody is served")
    for rule in policy.rules:
        for user in sorted(rule.users.difference(users)) if users else ():
            say(f"rules: {user} in {rule.text!r} is not in {config.users}")
        if rule.allow and not EVERYWHERE.isdisjoint(rule.blocks):
            say(f"rules: {rule.text!r} opens loopback, this box and the inside, too")


def is_there(uplink: natwork.Uplink) -> bool:
    """Return whether this box has an uplink now; raise OSError."""
    if uplink.packed:
        return bool(natwork.route_to(uplink.packed).local)
    return bool(uplink.addresses())


def warn(
    chapters: natwork.Chapters,
    held: dict[str, socket.socket],
    old: natwork.Generation | None,
) -> None:
    """Say what is probably not meant, and what has no effect; raise OSError.

    held has the listeners that systemd passed, or that the old generation has.
    """
    config, policy = chapters.config, chapters.policy
    for name in ("user", "pidfile"):
        if old and getattr(config, name) != getattr(old.config, name):
            say(f"{name} is changed by a restart only")
            setattr(config, name, getattr(old.config, name))  # so say it once
    passed = any(name.startswith("systemd ") for name in held)
    before = old.config.listen if old else ""
    if passed and "listen" in config.where and config.listen != before:
        say("listen is not used: systemd passes the listeners (natwork.socket)")
    if not policy.inside:
        say("inside: nobody is a client, it is empty")
    warn_of_rules(chapters)
    for name in ("log", "pidfile"):
        if re.search(r"\s[#;]", path := getattr(config, name)):
            say(f"{name}: it is {path!r}; a comment has a line of its own")
    theirs = {packed for uplink in policy.uplinks for packed in uplink.addresses()}
    hosts = {host for host, _ in config.parsed("listen", natwork.parse_endpoint)}
    if theirs and "*" not in hosts and {natwork.pack(host) for host in hosts} <= theirs:
        say("listen: nobody is a client at an address of outside")
    for uplink in policy.uplinks:
        if not is_there(uplink):
            say(f"outside: {uplink.name} is not there now")
    for packed in sorted(theirs):
        near = natwork.contains(natwork.LINK_LOCAL, packed)
        if natwork.contains(policy.inside, packed) and not near:
            place = natwork.unpack(packed)
            say(f"outside: {place} is an inside address, but nobody is a client there")
    device = "" if config.outside else policy.defaults()[0].device
    for packed in natwork.device_addresses(device):
        # Link-local neighbors are refused; and the addresses of IPv6 are many.
        near = len(packed) == 16 or natwork.contains(natwork.LINK_LOCAL, packed)
        if not near and natwork.contains(policy.inside, packed):
            say(
                f"{device} leads outside and has {natwork.unpack(packed)}, an inside "
                "address: its neighbors count as clients; set outside or inside"
            )


def may_read(path: str, user: str) -> bool:
    """Return whether a user may read a file, by its mode; raise OSError or KeyError."""
    import pwd

    entry, status = pwd.getpwnam(user), os.stat(path)
    group = 0o040 if status.st_gid == entry.pw_gid else 0o004
    bit = 0o400 if status.st_uid == entry.pw_uid else group
    return user == "root" or bool(status.st_mode & bit)


def warn_of_test(chapters: natwork.Chapters) -> None:
    """Say what is probably not meant, and what the service would fail at."""
    config = chapters.config
    booted = os.path.isdir("/run/systemd/system")  # sd_booted(3)
    serves = booted and os.path.realpath(config.file or ".") == SERVICE_FILE
    user = "natwork" if serves else config.user
    with contextlib.suppress(OSError, KeyError):
        if config.users and os.geteuid() == 0 and not may_read(config.users, user):
            say(f"users: {user} cannot read {config.users}: see to its group")
    if serves and "listen" in config.where and os.path.exists(SOCKET_UNIT):
        say("listen: the service does not use it, natwork.socket listens for it")
    for name in ("log", "pidfile") if serves else ():
        path = os.path.abspath(file := getattr(config, name))
        if file not in ("", "-", "/dev/null") and not path.startswith(SERVICE_LOGS):
            say(f"{name}: the service can write below {SERVICE_LOGS} only")
    warn(chapters, {}, None)


def explain_client(chapters: natwork.Chapters, client: str, user: str) -> bool:
    """Print whether a client is served; return whether it may be; raise OSError."""
    policy, scope = chapters.policy, 0
    with contextlib.suppress(OSError):  # it names no device
        scope = socket.if_nametoindex(client.partition("%")[2])
    try:
        # Assume that the client dials the address that would answer it.
        here = natwork.route_to(natwork.address_of(client)).source
        theirs = policy.outside() if policy.uplinks else {}
        inside = policy.is_client((client, 0, 0, scope), None) and here not in theirs
    except ValueError as error:
        raise OSError(f"cannot explain: {error}") from None
    print(f"client {client}: {'inside, served' if inside else 'not inside, refused'}")
    if not inside and natwork.contains(policy.inside, natwork.address_of(client)):
        print("its address is in inside, and the way to it leads outside")
    users = chapters.users.lines if chapters.config.users else {}
    if inside and chapters.config.users and user == "-":
        print("as no user: asked for name and password first")
    elif inside and user.partition(";")[0] not in (*users, "-"):
        print(f"as {user}: refused (auth-failed), not in {chapters.config.users}")
        return False
    return inside


def parse_wanted(wanted: bytes) -> tuple[str, str, int]:
    """Return protocol, host and port of a URL, or of HOST:PORT; raise Refused."""
    if wanted[:5].lower() == b"ws://":  # an upgrade of http://
        wanted = b"http" + wanted[2:]
    if secure := re.match(rb"(?i)(?:http|ws)s://([^/?#]*)", wanted):  # by CONNECT
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
            missing = "" if is_there(attempt.uplink) else ", which is not there now"
            way = f"from {attempt.uplink.name}{missing}"
        elif route.source:
            source = natwork.unpack(route.source)
            way = f"from {source}, by {route.device}, as the routing table has it"
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
    # Without `users` a name is only a claim, and no rule sees it.
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


def join(chapters: natwork.Chapters) -> None:
    """Say from now on what is probably not meant."""
    chapters.checks = sys.modules[__name__]


SETTINGS = """\
# natwork.conf: every setting of NATWork, commented out at its default.
#
# Take the # away to change one, then ask "natwork.py -t" whether it is right
# and send HUP to the master.  A bad file changes nothing, and natwork prints all
# its faults at once.  Times are seconds, at most 2000000.  Paths count from the
# directory of this file, which is the one that -c names, else ./natwork.conf,
# else /etc/natwork/natwork.conf.  Some settings need a file beside natwork.py; if
# it is missing, natwork refuses them and names the file.

[natwork]

# --- Where do clients come from? ----------------------------------------------

# Addresses and ports to accept clients on, separated by blanks.  "*" stands for
# every address of the box, IPv4 and IPv6; port 0 lets the kernel pick one.
# Sockets that systemd passes take the place of this setting; each start says so if
# it is set all the same.
#listen = *:8080

# The inside: networks whose machines may be clients, and whose addresses are
# not reached through the gateway.  Other peers get no answer, not one byte.
#inside = 127.0.0.0/8 ::1 10.0.0.0/8 172.16.0.0/12 192.168.0.0/16 fc00::/7 \
169.254.0.0/16 fe80::/10

# --- Where do we leave? -------------------------------------------------------

# Ways out, best first: source addresses or device names, separated by blanks.
# If the target does not answer by one of them within a second, the next is tried
# beside it (one with an address of the other family after 0.25 s).  A way out that
# failed is tried last for half a minute.  If a rule opens an address of the inside,
# it is not dialed by a device named here.  Empty: the routing table decides.
#outside =

# What may be reached: lines (or parts between ";") of
#   allow|deny [from NETWORKS] [user NAMES] [to TARGETS] [port PORTS]
# Each part is a list with commas, and the first line that fits decides.  TARGETS
# are networks, host.example, .example (that name and all below it) or *.  After
# your lines come the built-in ones: addresses of this box, loopback, link-local,
# multicast, unspecified and inside addresses are denied, port 25 is denied except
# to redirected clients, and the rest is allowed.  An allow opens a denied address
# only if a network in its "to" contains it, and port 25 only if its "port" says 25.
# No allow believes a name that a redirected client claims.  For SOCKS BIND the
# rules judge the host that may call, whatever its port.  A call from anyone needs
# "allow to 0.0.0.0/32, ::/128", and then the rules judge each caller.
#   rules =
#       deny to .ads.example
#       allow from 10.0.0.7 to 10.1.0.0/16 port 80,443
#       deny port 1-1023 from 10.0.9.0/24
#rules =

# Who may ask: a file of lines that "natwork.py --passwd NAME" prints, readable
# by "user" and its group alone (chmod 640).  HTTP and SOCKS5 clients must then
# name themselves, others (SOCKS4, redirected) are refused, and a rule may have a
# name in "user".  Empty: everybody on the inside; the name that a SOCKS5 client
# gives is logged, but proves nothing.
#   natwork.py --passwd alice >>users; curl -x http://10.0.0.1:8080 -U alice ...
#users =

# Through which other proxies: lines (or parts between ";") of
#   http://[USER:PASSWORD@]HOST:PORT | socks5://...  [to TARGETS] [scheme http]
# The first line that takes the target is used; targets that no line takes are
# dialed.  "scheme http" takes http:// requests alone, no tunnels.  TARGETS are as
# in rules, and the rules judge the target first all the same.  A name that cannot
# be resolved here goes to the parent only if an allow names it.  A cache for all
# plain requests:
#   parents = http://127.0.0.1:3128 scheme http
#parents =

# Other NATWork boxes, as HOST:PORT, that /proxy.pac offers a browser beside this
# one.  The browser's address for automatic setup is http://GATEWAY:8080/proxy.pac.
# The client's address gives the order; the browser passes over a dead box.
#gateways =

# The name of this gateway in Via, in Proxy-Status and on its pages.  Clients may
# ask for the pages by this name, besides the addresses.  Gateways that are chained
# need different names, or they take each other for a loop.  The part after the
# first dot is the domain of the inside in /lat.json.  Empty: the host name.
#name =

# --- How many? ----------------------------------------------------------------

# Workers that are kept idle: the largest burst of clients that is served without
# waiting for a fork.  If this is not set, and max_workers is less, it is as many.
#spare_workers = 8

# Clients at once; each has a process.  Further ones wait in the kernel's queue.
#max_workers = 2048

# Sessions at once from one client address; a further one is refused.  0: no limit.
#max_per_client = 0

# Clients that one worker serves, one after another, before a fresh worker takes
# its place.  1 gives every client a new process.
#clients_per_worker = 1000

# --- How long? ----------------------------------------------------------------

# For the first byte of a client, then for a whole request head, or SOCKS request.
#head_timeout = 10

# For a connection to the target, all its addresses together.
#connect_timeout = 10

# Without a byte in an HTTP exchange, without a datagram, or without the call that
# BIND waits for.
#idle_timeout = 300

# Without a byte in a tunnel (at most 240 after one side has ended).  RFC 5382 asks
# for 2 h 4 min.
#tunnel_timeout = 7440

# A kept-alive client may be silent for this long between two requests.
#keepalive_timeout = 15

# Busy workers may go on for this long after TERM.
#drain_timeout = 30

# --- What is opened on the outside, for clients? ------------------------------

# Ports that clients open on the outside: for BIND, where a server calls the client
# back, for UDP ASSOCIATE, which takes the port that the client asks for, if it is
# free and in this range, and for mappings.  LOW-HIGH, or 0 to let the kernel
# choose.  A firewall on the outside must let these ports in.
#bind_ports = 0

# Deliver datagrams from hosts that the client has not written to: yes or no.
# Games and voice between two such boxes may need it.
#udp_from_anyone = no

# Answer NAT-PMP (RFC 6886) on UDP port 5351 of the inside: yes or no.  A machine
# of the inside can then get a TCP port of an outside address, for itself and for
# two hours at most, from bind_ports or, if that is 0, from 1024 on.  The rules judge
# each caller: "from" is its address, "to" and "port" are the machine's.
#mappings = no

# Mappings at once for one machine.
#max_mappings = 16

# --- What is written down, and as whom? ---------------------------------------

# The access log: "-" is standard output, other values are a file.  HUP opens it anew.
#log = -

# "text" (name=value, with one blank between) or "json" (one object a line).
#log_format = text

# The user to become once the listeners are open, if root starts the gateway.
#user = nobody

# A file for the process ID of the master, written after the listeners are open, and
# locked while the gateway lives.  Root makes its directory if need be, for "user",
# so that the gateway can remove the file at the end.
#pidfile =
"""
