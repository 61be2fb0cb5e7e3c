#!/usr/bin/env python3
"""NATWork: carry TCP streams between the two networks of one Linux box.

A client on the inside asks, by HTTP, for a host on the outside.  NATWork
connects to it from the outside address and joins the two sockets:

    client ----> inside  [ natwork.py ]  outside ----> server
             10.0.0.1:8080            192.0.2.10

No packet is rewritten and no packet is forwarded: these are two ordinary
connections, and the kernel already knows which process owns which of them.
Each client has a process to itself, forked before the client came, so the
process table is the table that a NAT router would have to keep:

    natwork: master 8 idle 1 busy
     |- natwork: idle                                       (eight of these)
     `- natwork: 10.0.0.7:3456 > 192.0.2.10:5678 > 63.1.1.54:80 http a.example

The kernel moves the bytes, by splice(2), and bulk never enters Python.  When
the client leaves, the row in the table leaves.

This file is the heart, and complete by itself: HTTP and CONNECT, rules,
uplinks, reload, log and table.  Chapters that lie beside it are found at start:

    natwork_socks.py       SOCKS 4, 4a and 5
    natwork_redirect.py    TCP that nftables redirects here
    natwork_gateways.py    ftp:// and gopher:// URLs
    natwork_pages.py       the live table, /metrics, /proxy.pac, /lat.json
    natwork_users.py       names and passwords, sessions a client
    natwork_parents.py     other proxies to go through
    natwork_mapping.py     NAT-PMP: a machine of the inside listens on the outside
    natwork_daemon.py      -d and the pid file
    natwork_check.py       what is probably not meant; --explain; --settings

Usage:

    natwork.py [-c FILE] [-o NAME=VALUE]... [-d]     run the gateway
    natwork.py -t                                    check the configuration
    natwork.py --settings                            print natwork.conf, all explained
    natwork.py --table [--json]                      the sessions of this box (root)
    natwork.py --explain CLIENT TARGET [USER]        which rule decides, and why
    natwork.py --passwd USER                         a line for the file of users

Signals to the master: TERM and INT stop accepting and let busy workers finish
(a second one ends them now).  HUP reads the configuration again; if it is good,
new workers serve by it, with the access log opened anew, and the old workers
finish what they have.  TERM to a worker ends that one session.

Exit codes: 0 asked to stop, 1 unexpected, 2 bad command line, 78 bad
configuration.

Reading order.  Every section uses only the ones above it, so what a function
calls stands further up; within a class, methods stand in the order of events.
To follow a request, start at serve_client(); to follow the daemon, at main().
If you read only two sections, read "Relay" and "Master and workers".

It does not cache, decrypt, filter or balance, and it will not: chain it to
the programs that do.
"""
# SPDX-License-Identifier: MIT

from __future__ import annotations

import binascii
import contextlib
import errno
import fcntl
import functools
import gc
import importlib.util
import math
import mmap
import os
import re
import resource
import select
import signal
import socket
import stat
import struct
import sys
import time
import warnings
from collections.abc import Callable
from collections.abc import Generator
from collections.abc import Iterable
from collections.abc import Iterator
from http import HTTPStatus
from importlib.machinery import PathFinder
from typing import Any
from typing import NamedTuple

if sys.version_info < (3, 10):  # noqa: UP036
    sys.exit("natwork: needs Python 3.10 or later")

__version__ = "0.1.0"

# --- Limits -------------------------------------------------------------------
#
# The few numbers that are not settings, because nobody who runs a gateway
# should have to think about them.  Sizes are bytes, times are seconds.

HEAD_LIMIT = 64 * 1024  # a request or response head; Squid's limit too
LINE_LIMIT = 16 * 1024  # a request line; RFC 9112 section 3 asks for 8,000
METHOD_LIMIT = 32  # the longest registered method has 16 letters
BLANK_LIMIT = 16  # empty lines before a request line
CHUNK_LINE_LIMIT = 4096  # a chunk size with its extensions
INTERIM_LIMIT = 64  # 1xx responses to one request
COPY_SIZE = 64 * 1024  # one recv(); a read this full means that more is there
BULK_SIZE = 256 * 1024  # a body known to be this long is spliced from the start
PIPE_SIZE = 256 * 1024  # of a splice; the kernel limits what a user's pipes hold
LISTEN_BACKLOG = 4096  # net.core.somaxconn cuts it
SLOT_LIMIT = 65536  # the scoreboard's size, and so the largest max_workers

HALF_CLOSED_TIMEOUT = 240.0  # of silence in a half-closed tunnel: RFC 5382
LINGER_TIMEOUT = 2.0  # of silence in a lingering close; nginx waits 5
LINGER_LIMIT = 30.0  # for all of a lingering close, as nginx
SHORT_SILENCE = 0.5  # a client that is silent for longer may lose its worker
CROSSING_TIME = 1.0  # in which a close and a request may pass each other
ATTEMPT_DELAY = 0.25  # Connection Attempt Delay: RFC 8305 section 8
UPLINK_DELAY = 1.0  # before the next uplink is tried beside a silent one
UPLINK_REST = 30.0  # a failed uplink is tried last for this long
SURPLUS_TIME = 30.0  # an idle worker that nobody needed for this long may leave
TIME_LIMIT = 2_000_000.0  # 23 days: poll() counts milliseconds in 32 bits

INET, INET6, STREAM = socket.AF_INET, socket.AF_INET6, socket.SOCK_STREAM
POLLIN, POLLOUT = select.POLLIN, select.POLLOUT
PIPE_FLAGS = os.O_NONBLOCK | os.O_CLOEXEC

# --- Configuration ------------------------------------------------------------
#
# A setting is a line of natwork.conf and an attribute of Config; its default's
# type says how it is read.  What a setting means beyond that (an address, a
# rule) is parsed in the section that uses it, and refused there by refuse(), so
# that every error names the file, the setting and the value.

# The chapters that may lie beside this file, and the settings that need each.
CHAPTERS: dict[str, tuple[str, ...]] = {
    "socks": ("bind_ports", "udp_from_anyone"),
    "redirect": (),
    "gateways": (),
    "pages": ("gateways",),
    "users": ("users", "max_per_client"),
    "parents": ("parents",),
    "mapping": ("mappings", "max_mappings"),
    "daemon": ("pidfile",),
    "check": (),
}


def reason(error: OSError) -> str:
    """Return the system's reason in the form our messages end with."""
    if error.errno == errno.EMFILE:
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        return f"cannot open more files (limit {limit})"
    text = os.strerror(error.errno) if error.errno else str(error)
    return text[:1].lower() + text[1:]


def say(message: str) -> bool:
    """Write one line to standard error for the operator; return whether it was taken.

    The line has at most PIPE_BUF bytes, so the lines of many processes never mix.  We
    never wait: where nobody reads standard error, the line is lost.
    """
    line = f"natwork: {message}".encode(errors="replace")[: select.PIPE_BUF - 1]
    with contextlib.suppress(OSError):
        has_room = select.select([], [2], [], 0)[1]
        return bool(has_room) and os.write(2, line + b"\n") > 0
    return False


def masked(text: str) -> str:
    """Return text on one line, less what may be the password in a URL."""
    text = re.sub(":(?!//).*@", ":***@", " ".join(text.split()))
    text = re.sub("'[^']*@", "'***@", text)  # in a word that a message quotes
    # A URL that was cut has no @, and its port may be the start of a password.
    return re.sub(r"(//[^/@\s:\[]+:)(?!\*{3}@|[0-9]+(?![^/\s]))\S+", r"\1***", text)


def find_set_title() -> Any:
    """Return setproctitle's function; None, and no titles, if it is not installed.

    Only its C part is loaded: the Python package around it imports logging and
    threading, which costs every worker half a megabyte after its fork.
    """
    package: Any = PathFinder.find_spec("setproctitle")
    folders = package and package.submodule_search_locations
    spec: Any = package and PathFinder.find_spec("_setproctitle", folders)
    with contextlib.suppress(ImportError):  # it may be another interpreter's
        if spec:
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            return module.setproctitle


set_title = find_set_title() or (lambda title: None)


class ConfigError(Exception):
    """The configuration cannot be used: the text has a line for each fault."""


class Config:
    """Every setting and its default.  Times are seconds, as float."""

    listen = "*:8080"
    inside = (
        "127.0.0.0/8 ::1 10.0.0.0/8 172.16.0.0/12 192.168.0.0/16 fc00::/7"
        " 169.254.0.0/16 fe80::/10"
    )
    outside = ""
    rules = ""
    users = ""
    parents = ""
    gateways = ""
    name = ""  # empty: the host name
    spare_workers = 8
    max_workers = 2048
    max_per_client = 0
    clients_per_worker = 1000
    head_timeout = 10.0
    connect_timeout = 10.0
    idle_timeout = 300.0
    tunnel_timeout = 7440.0
    keepalive_timeout = 15.0
    drain_timeout = 30.0
    bind_ports = "0"
    udp_from_anyone = False
    mappings = False
    max_mappings = 16
    log = "-"
    log_format = "text"
    user = "nobody"
    pidfile = ""

    def __init__(self, **settings: Any) -> None:
        """Take settings as parse_setting() returns them, and any of these four."""
        self.errors: list[str] = []  # noted so far
        self.options: list[str] = []  # NAME=VALUE
        self.file = ""  # the file that was read, "" for none
        self.where: dict[str, str] = {}  # setting -> file or option it came from
        vars(self).update(settings)
        # A box that has no name yet is "(none)".
        host = re.sub(r"[^A-Za-z0-9_.-]", "", socket.gethostname())
        self.name = self.name or host or "natwork"

    def refuse(self, name: str, why: str) -> None:
        """Note why a setting is refused; examine() raises all that was noted."""
        where, value = self.where.get(name, "default"), masked(self.spelled(name))
        if len(value) > 200:  # the reason must have room on the line
            value = f"{value[:200]}..."
        self.errors.append(f"{where}: {name} = {value}: {masked(why)}")

    def parsed(self, name: str, parse: Callable[[str], Any]) -> list[Any]:
        """Return what parse() makes of a setting's parts; refuse the faulty ones."""
        found = []
        for number, part in enumerate(self.parts(name), 1):
            try:
                found.append(parse(part))
            except ValueError as error:
                line = f"line {number}: " if "\n" in getattr(self, name) else ""
                self.refuse(name, f"{line}{error}")
        return found

    def parts(self, name: str) -> list[str]:
        """Return the words of a setting; or its lines, if it is rules or parents."""
        end = "[\n;]" if name in ("rules", "parents") else r"\s"
        return [*filter(None, map(str.strip, re.split(end, getattr(self, name))))]

    def spelled(self, name: str) -> str:
        """Return the value of a setting as natwork.conf has it, in one line."""
        value = getattr(self, name)
        if isinstance(value, bool):
            return "yes" if value else "no"
        if isinstance(value, float):
            return str(value).removesuffix(".0")
        return " ".join(str(value).split())


# The default of each setting by its name, in the order of natwork.conf.
DEFAULTS: dict[str, Any] = {
    name: value
    for name, value in vars(Config).items()
    if isinstance(value, (str, int, float)) and name[0] != "_"
}

# By setting or type: the form that a value must have, and what we say otherwise.
FORMS: dict[str | type, tuple[str, str]] = {
    # RFC 9110 section 7.6.3: a pseudonym in Via is a token.
    "name": ("[A-Za-z0-9_.-]{0,255}", "must be letters, digits, dots and dashes"),
    "listen": (r"[^\0]*[^\0\s][^\0]*", "must name an address"),
    "log": (r"[^\0]+", "must be - or a file"),
    "log_format": ("text|json", "must be text or json"),
    "max_per_client": ("[0-9]{1,9}", "is not a whole number"),
    "bind_ports": (r"[^\0\s]+", "must be ports, as LOW-HIGH"),
    str: (r"[^\0]*", "has a NUL in it"),
    bool: ("yes|no", "is neither yes nor no"),
    # int() and float() alone would also take "1_0", " +5" and "nan".
    int: ("(?!0*$)[0-9]{1,9}", "is not a whole number of 1 or more"),
    float: (
        r"(?![0.]*$)[0-9]{1,9}(\.[0-9]{1,9})?",
        "is not a number of seconds above 0",
    ),
}


def parse_setting(name: str, text: str) -> Any:
    """Return the value of one setting; raise ValueError that says what is wrong."""
    if name not in DEFAULTS:
        raise ValueError("there is no such setting")
    kind = type(DEFAULTS[name])
    form, why = FORMS.get(name) or FORMS[kind]
    if not re.fullmatch(form, text):
        raise ValueError(why)
    value = text == "yes" if kind is bool else kind(text)
    if kind is float and value > TIME_LIMIT:
        raise ValueError(f"must be at most {TIME_LIMIT:.0f} s")
    return value


def read_file(path: str) -> tuple[bytes, int]:
    """Return what a regular file holds, and its mode; raise OSError.

    A pipe or a terminal is refused: we might wait for it, or read no more at a reload.
    """
    mode = os.stat(path).st_mode
    if not stat.S_ISREG(mode):
        raise OSError("it is not a regular file")
    with open(path, "rb") as file:
        return file.read(), mode


def read_settings(path: str) -> tuple[dict[str, str], list[str]]:
    """Return an INI file's [natwork] section, and its faults; raise ConfigError."""
    import configparser  # 240 KiB that the workers never need

    try:
        # An editor may begin a file with a byte order mark.
        lines = read_file(path)[0].decode("utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        why = reason(error) if isinstance(error, OSError) else "is not UTF-8 text"
        raise ConfigError(f"{path}: {why}") from None
    faults: list[str] = []
    while len(faults) < 20:  # a file that is not INI has a fault in every line
        parser = configparser.ConfigParser(interpolation=None, default_section="")
        parser.optionxform = str  # type: ignore[assignment,method-assign]
        try:
            parser.read_string("\n".join(lines))
            break
        except configparser.Error as error:
            number = getattr(error, "lineno", 0) or vars(error)["errors"][0][0]
            why = {
                "DuplicateOptionError": "this setting stands in the file twice",
                "DuplicateSectionError": "this section stands in the file twice",
                "MissingSectionHeaderError": "it stands before the line [natwork]",
            }.get(type(error).__name__, "it is not NAME = VALUE")
            line = masked(lines[number - 1].strip())
            faults.append(f"{path}: line {number}: {line}: {why}")
            lines[number - 1] = ""  # then parse again, to find the next fault
    for section in sorted(set(parser.sections()) - {"natwork"}):
        faults.append(f"{path}: [{masked(section)}]: the only section is [natwork]")
    return dict(parser["natwork"]) if parser.has_section("natwork") else {}, faults


def load_config(path: str, options: list[str]) -> Config:
    """Return the settings of a file, overridden by NAME=VALUE options.

    The path "" means ./natwork.conf, else /etc/natwork/natwork.conf, else no file.
    What is wrong with a setting is noted; raises ConfigError for a file as a whole.
    """
    places = "natwork.conf", "/etc/natwork/natwork.conf"
    path = path or next(filter(os.path.lexists, places), "")
    found, errors = read_settings(path) if path else ({}, [])
    given = [(path, *pair) for pair in found.items()]
    for option in options:
        name, equals, text = map(str.strip, option.partition("="))
        if equals:
            given.append(("option -o", name, text))
        else:
            errors.append(f"option -o {masked(option)}: must be NAME=VALUE")
    settings, where = {}, {}
    for place, name, text in given:
        try:
            value = parse_setting(name, text)
        except ValueError as error:
            errors.append(f"{place}: {masked(f'{name} = {text}')}: {error}")
            continue
        if name in ("log", "users", "pidfile") and value not in ("", "-"):
            folder = os.path.dirname(path) if place == path else ""
            value = os.path.join(folder, value)  # relative to the file that names it
        settings[name], where[name] = value, place
    config = Config(file=path, options=options, where=where, errors=errors, **settings)
    if "spare_workers" not in where:
        config.spare_workers = min(config.spare_workers, config.max_workers)
    if config.spare_workers > config.max_workers:
        config.refuse("spare_workers", "must be at most max_workers")
    if config.max_workers > SLOT_LIMIT:
        config.refuse("max_workers", f"must be at most {SLOT_LIMIT}")
    return config


# --- Outcomes -----------------------------------------------------------------
#
# One failure has four names: a word in the access log, a status for an HTTP
# client, the Proxy-Status of RFC 9209 in the answer's head, and a reply code for
# a SOCKS client.  This table is the only place that knows them.

ASK_OPERATOR = "Ask the operator of this gateway if you need it."
MEND_CLIENT = "Mend the program that sent it."
USE_CONNECT = "http://, ftp:// and gopher:// can be asked for, all else by CONNECT."
SAY_WHO = "Give the name and the password that the operator gave you."
ASK_ANOTHER = "It leads to this gateway itself: ask for the host you mean."
ASK_PROXY = "To reach another host through it, send the whole URL: it is a proxy."
OWN_PAGES = "It has /, /table.json, /metrics, /proxy.pac, /wpad.dat and /lat.json."


class Outcome(NamedTuple):
    """How a session ended, and what the client may do about it."""

    word: str  # in the access log
    status: int  # RFC 9110 section 15
    error: str = ""  # RFC 9209 section 2.3; empty: an HTTP client gets no answer
    advice: str = "Try again in a moment."  # a sentence for the client's page
    reply: int = 1  # RFC 1928 section 6; 1 is a general failure

    def status_text(self) -> str:
        """Return the status as it stands in a status line, with its phrase."""
        return f"{self.status} {HTTPStatus(self.status).phrase}"


OK = Outcome("ok", 200, reply=0)
ENDED = Outcome("closed", 200, reply=0)
OUTSIDER = Outcome("not-inside", 403)
CLIENT_GONE = Outcome("client-gone", 400)
IDLE = Outcome("idle-timeout", 504)
OPERATOR = Outcome("operator", 503)
KILLED = Outcome("killed", 503)
DRAINED = Outcome("drained", 503, "proxy_internal_error")
BROKEN = Outcome("internal-error", 500, "proxy_internal_error", ASK_OPERATOR)

BAD_REQUEST = Outcome("bad-request", 400, "http_request_error", MEND_CLIENT)
HEAD_TIMEOUT = BAD_REQUEST._replace(word="head-timeout", status=408)
BODY_TIMEOUT = BAD_REQUEST._replace(word="body-timeout", status=408)
URI_TOO_LONG = BAD_REQUEST._replace(word="uri-too-long", status=414)
EXPECTATION = BAD_REQUEST._replace(word="expectation-failed", status=417)
HEAD_TOO_LARGE = BAD_REQUEST._replace(word="head-too-large", status=431)
BAD_VERSION = BAD_REQUEST._replace(word="bad-version", status=505)
NOT_IMPLEMENTED = Outcome("not-implemented", 501, "http_request_error", USE_CONNECT, 7)
BAD_ADDRESS = BAD_REQUEST._replace(word="bad-address-type", reply=8)
NO_METHOD = BAD_REQUEST._replace(word="no-method", reply=0xFF)
NOT_FOUND = Outcome("not-found", 404, "http_request_error", "Check the path.")
NO_LOGIN = NOT_FOUND._replace(
    word="login-refused", status=401, advice="Give the server's user name and password."
)
UNCHECKED = NOT_FOUND._replace(word="unchecked", status=412, advice="Ask without it.")
NOT_STORED = NOT_FOUND._replace(word="not-stored", status=403, advice="Ask its owner.")
DENIED = Outcome("denied", 403, "http_request_denied", ASK_OPERATOR, 2)
AUTH_REQUIRED = Outcome("auth-required", 407, "http_request_denied", SAY_WHO, 2)
AUTH_FAILED = AUTH_REQUIRED._replace(word="auth-failed")
LOOP = Outcome("loop", 502, "proxy_loop_detected", ASK_ANOTHER, 2)
NO_PAGE = NOT_FOUND._replace(word="no-page", advice=OWN_PAGES)
BAD_METHOD = NO_PAGE._replace(word="bad-method", status=405)
BAD_HOST = DENIED._replace(word="denied-host", advice=ASK_PROXY)

NO_SUCH_HOST = Outcome("no-such-host", 502, "dns_error", "Check the host's name.", 4)
DNS_TIMEOUT = Outcome("dns-timeout", 504, "dns_timeout", reply=6)
DNS_FAILED = Outcome("dns-failed", 504, "dns_error", reply=6)
CONNECT_TIMEOUT = Outcome("connect-timeout", 504, "connection_timeout", reply=6)
CONNECT_FAILED = Outcome("connect-failed", 502, "destination_unavailable")
CONNECT_REFUSED = Outcome("refused", 502, "connection_refused", reply=5)
CONNECT_RESET = Outcome("reset", 502, "connection_terminated", reply=5)
UNROUTABLE = Outcome("unreachable", 502, "destination_ip_unroutable", reply=3)
HOST_UNREACHABLE = UNROUTABLE._replace(reply=4)
NO_UPLINK = UNROUTABLE._replace(word="no-uplink")
NOBODY_CALLED = CONNECT_TIMEOUT._replace(word="bind-timeout")
PARENT_FAILED = Outcome("parent", 502, "destination_unavailable")  # "parent-refused"
OVERLOAD = Outcome("overload", 503, "connection_limit_reached")
AUTH_BUSY = OVERLOAD._replace(word="auth-busy")
TOO_MANY = OVERLOAD._replace(word="too-many", reply=2)

SERVER_GONE = Outcome("server-gone", 502, "connection_terminated")
BAD_RESPONSE = Outcome("bad-response", 502, "http_protocol_error", "Tell its owner.")
UPGRADE_FAILED = BAD_RESPONSE._replace(word="bad-upgrade", error="http_upgrade_failed")
ANSWER_TIMEOUT = Outcome("answer-timeout", 504, "http_response_timeout")

OUTCOME_OF_ERRNO = {
    errno.ECONNREFUSED: CONNECT_REFUSED,
    errno.ECONNRESET: CONNECT_RESET,
    errno.ETIMEDOUT: CONNECT_TIMEOUT,
    errno.EHOSTUNREACH: HOST_UNREACHABLE,
    **dict.fromkeys((errno.ENODEV, errno.EADDRNOTAVAIL), NO_UPLINK),
    **dict.fromkeys((errno.ENETUNREACH, errno.ENETDOWN), UNROUTABLE),
    **dict.fromkeys((errno.EMFILE, errno.ENFILE, errno.EAGAIN), OVERLOAD),
    **dict.fromkeys((errno.ENOBUFS, errno.ENOMEM, errno.EADDRINUSE), OVERLOAD),
    socket.EAI_NONAME: NO_SUCH_HOST,
    socket.EAI_AGAIN: DNS_FAILED,
}

OUTCOMES = {o.word: o for o in list(globals().values()) if isinstance(o, Outcome)}


def outcome_of(error: OSError, other: Outcome = BROKEN) -> Outcome:
    """Return the outcome that stands for an error's errno; other, if none does."""
    return OUTCOME_OF_ERRNO.get(error.errno or 0, other)


class Refused(Exception):
    """The session cannot go on, whatever stops it: a rule, a fault or the time."""

    def __init__(self, outcome: Outcome, detail: str = "", user: str = "") -> None:
        """Take the detail for the page, and who the client claimed to be, if known."""
        self.outcome, self.detail, self.user = outcome, detail, user


# --- Scoreboard, session and log ----------------------------------------------
#
# A worker's slot on the scoreboard says what it does now: one byte for its
# state, numbers that count, and the row of its session.  The master chooses by
# the state bytes, --table prints the rows, and when a worker dies the master
# writes the log line that it no longer can.  The scoreboard is one piece of
# memory that all processes share.  A slot has a single writer, and in the header
# the last write wins, so there is no lock that a killed worker could keep.

# SILENT: a busy worker that may be asked to leave.  A slot of natwork_mapping has 4.
FREE, IDLE_STATE, BUSY, SILENT = range(4)

OUTCOME_WORDS = ["other", *OUTCOMES]
PROTOCOLS = "- http connect upgrade socks4 socks5 udp redirect map ftp gopher".split()
TARGET_SIZE = 1000  # characters of a path that the log keeps, so that a row has room
NAME_SIZE = 1020  # of a name: RFC 1929's 255 bytes, each perhaps written as \x0a


class Scoreboard:
    """The shared memory: a header, a state byte for each slot, then the slots.

    The header has 64-bit words.  USED: how many slots ever were used.  UNREPORTED: the
    errno that lost log lines.  BEGAN, LAST_SAID, and UPLINKS (last failures): seconds.
    """

    MASTER, USED, BEGAN, FORKS, FORKS_FAILED, LAST_SAID, UNREPORTED = range(7)
    UPLINKS, UPLINK_MAX = 16, 64
    STATES = 4096  # offset of the state bytes
    SLOTS, SLOT_SIZE = STATES + SLOT_LIMIT, 8192  # their offset, and bytes of each

    def __init__(self, fd: int = -1) -> None:
        """Make one; or map that of another process, its fd, to read only."""
        size, access = self.SLOTS + SLOT_LIMIT * self.SLOT_SIZE, mmap.ACCESS_READ
        if fd < 0:
            flags, access = os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING, mmap.ACCESS_WRITE
            fd = os.memfd_create("natwork", flags)
            # Pages that are never written are never allocated: unused slots are free.
            os.ftruncate(fd, size)
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
        # If it could shrink, a process that reads it might die of SIGBUS.
        if not fcntl.fcntl(fd, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK:
            raise ValueError("this memory could shrink")
        self.fd, self.memory = fd, mmap.mmap(fd, size, access=access)
        self.words = memoryview(self.memory).cast("Q")
        self.regions: dict[str, mmap.mmap] = {}
        self.uplinks: list[Uplink] = []  # in the order of their words in the header

    def region(self, name: str, size: int) -> mmap.mmap:
        """Return memory that a chapter's processes share; ask before the first fork."""
        return self.regions.setdefault(name, mmap.mmap(-1, size))

    def used(self) -> int:
        """Return how many slots ever were used; forged memory may say too many."""
        return min(self.words[self.USED], SLOT_LIMIT)

    def states(self) -> bytes:
        """Return the state bytes of all slots that ever were used."""
        return self.memory[self.STATES : self.STATES + self.used()]

    def say(self, message: str) -> bool:
        """Say what many workers may want to say at once: one line a second.

        Returns False where a line was said in this second, or nobody reads.
        """
        second = int(time.monotonic())
        if said := self.words[self.LAST_SAID] != second and say(message):
            self.words[self.LAST_SAID] = second
        return said

    def fork(self, work: Callable[[], None]) -> int:
        """Fork a process that does some work, and return its pid; raise OSError."""
        if pid := os.fork():
            return pid
        try:
            work()
            # Not sys.exit(): we inherited the master's atexit list, pid file included.
            os._exit(0)
        except OSError as error:
            self.say(f"a process ends early: {reason(error)}")
        except Exception:
            sys.excepthook(*sys.exc_info())  # it works even if no import does
        finally:
            os._exit(1)

    def failed_recently(self, uplink: Uplink) -> bool:
        """Return whether an uplink is to be tried last."""
        failed = self.words[self.UPLINKS + self.uplinks.index(uplink) % self.UPLINK_MAX]
        return failed > 0 and time.monotonic() - failed < UPLINK_REST

    def column(self, word: int) -> list[int]:
        """Return one word of all slots that ever were used."""
        first, step = self.SLOTS // 8 + word, self.SLOT_SIZE // 8
        return self.words[first : first + self.used() * step : step].tolist()


UNSAFE = re.compile(r"[^!#-\[\]-~]")
# The host in Session.target, which is a URL, or HOST:PORT of a CONNECT.
HOST = re.compile(r"(?:[^/]*?://)?(?:\[([^]]*)\]|([^/:]*)).*")


def printable(raw: bytes, limit: int = 255) -> str:
    """Return bytes from the network as text that cannot break a log line.

    The text has no blank, no quote and at most limit characters; it is "-" for none.
    """
    text = raw[:limit].decode("latin-1")
    if UNSAFE.search(text):
        text = UNSAFE.sub(lambda match: f"\\x{ord(match[0]):02x}", text)[:limit]
        text = re.sub(r"\\(x[0-9a-f]?)?\Z", "", text)  # not cut within a \x0a
    return text or "-"


def endpoint(address: tuple[Any, ...]) -> str:
    """Return (host, port) as one writes them: IPv6 in brackets."""
    host = address[0]
    return f"[{host}]:{address[1]}" if ":" in host else f"{host}:{address[1]}"


def host_of(name: str) -> str:
    """Return the host in a text of endpoint()."""
    return name.rpartition(":")[0].strip("[]")


class Session:
    """One request, or one tunnel, and what came of it: log line, title and row.

    What is shown is printable text without blanks, "-" when there is nothing.
    """

    FIELDS = "pid client user proto method target address source status".split()

    user = method = target = address = source = status = "-"
    up = down = 0  # bytes written to the server, and to the client
    outcome = OK  # of a session that is not refused
    via = b""  # the gateways that a request has come through

    def __init__(self, client: str, pid: str, proto: str = "-") -> None:
        """Begin a session now (monotonic); client is a text of endpoint()."""
        self.began, self.pid = time.monotonic(), pid
        self.client, self.proto = client, proto

    def fields(self, user_size: int = NAME_SIZE) -> str:
        """Return what the log line and the row have in common, in the log's form."""
        return (
            f"pid={self.pid} client={self.client} user={self.user[:user_size]} "
            f"proto={self.proto} method={self.method} target={self.target} "
            f"address={self.address} source={self.source} status={self.status}"
        )

    def host(self) -> str:
        """Return the host of the target, without scheme, port and path."""
        return "".join(HOST.findall(self.target)[0])

    def title(self) -> str:
        """Return the process title: no path, no query, and the host last."""
        who = self.client if self.user == "-" else f"{self.client} {self.user[:64]}"
        way = f"{who} > {self.source} > {self.address}"
        return f"natwork: {way} {self.proto} {self.host()}"

    def line(self, outcome: str) -> str:
        """Return the line of the access log, its fields in their order."""
        seconds = time.monotonic() - self.began  # the clock may have been set meanwhile
        began = time.gmtime(time.time() - seconds)
        return (
            f"time={time.strftime('%Y-%m-%dT%H:%M:%SZ', began)} {self.fields()} "
            f"outcome={outcome} up={self.up} down={self.down} secs={seconds:.3f}"
        )


class Slot:
    """One worker's place on the scoreboard.

    It begins with words.  WHICH: the offset of the row that is whole, 0 for none.  PID:
    the worker's.  UP, DOWN: bytes of the session that goes on.  UPS, DOWNS: of all that
    have ended.  LOST: log lines.  CONNECTIONS: how many were made, CONNECTING: in how
    many microseconds.  PEER: a number for the client of the session that goes on.  The
    two rows follow, then the counts of ended sessions, by protocol and outcome.
    """

    WHICH, PID, UP, DOWN, UPS, DOWNS, LOST, CONNECTIONS, CONNECTING, PEER = range(10)
    ROWS, ROW_SIZE = 96, 1892  # bytes
    ENDED_BY = (ROWS + 2 * ROW_SIZE) // 8

    def __init__(self, board: Scoreboard, number: int) -> None:
        start = board.SLOTS + number * board.SLOT_SIZE
        self.board, self.number = board, number
        self.bytes = memoryview(board.memory)[start : start + board.SLOT_SIZE]
        self.words = self.bytes.cast("Q")

    def set_state(self, state: int) -> None:
        """Show what the worker does, to all who count: FREE, IDLE_STATE and so on."""
        self.board.memory[self.board.STATES + self.number] = state

    def clear(self, pid: int) -> None:
        """Begin without a session; the totals are the slot's, and go on growing."""
        words = self.words
        words[self.WHICH] = words[self.UP] = words[self.DOWN] = words[self.PEER] = 0
        words[self.PID] = pid  # the master says 0, the new worker then its own

    def publish(self, session: Session) -> None:
        """Put a session's row up.

        There is room for two, and a word that says which one is whole, so a
        reader never sees half a row, not even after kill -9.
        """
        row = f"{int(session.began * 1000)} {session.fields(255)}".encode()
        row = row[: self.ROW_SIZE - 1] + b"\n"
        place = self.ROWS + self.ROW_SIZE * (self.words[self.WHICH] == self.ROWS)
        self.bytes[place : place + len(row)] = row
        self.words[self.WHICH] = place

    def session(self) -> Session | None:
        """Return the session whose row is up, with its bytes so far."""
        if not (place := self.words[self.WHICH]):
            return None
        row = bytes(self.bytes[place : place + self.ROW_SIZE]).partition(b"\n")[0]
        with contextlib.suppress(ValueError):  # no worker of ours wrote this row
            began, *words = row.decode().split(" ")
            session = Session("", "")
            for name, word in zip(Session.FIELDS, words, strict=True):
                setattr(session, name, word.removeprefix(f"{name}="))
            session.up, session.down = self.words[self.UP], self.words[self.DOWN]
            session.began = float(began) / 1000
            return session
        return None

    def moved(self, up: int, down: int) -> None:
        """Show how many bytes the session has moved so far."""
        self.words[self.UP], self.words[self.DOWN] = up, down

    def settle(self, session: Session) -> None:
        """Take down the row of a session that has ended, and add up its bytes.

        The log line is written after this.  If the worker is killed between the two,
        the line is lost; the other way round, the master would write a second one.
        """
        words = self.words
        ups, downs = words[self.UPS] + session.up, words[self.DOWNS] + session.down
        # In one piece: kill -9 must not find the bytes in two places, or in none.
        head = struct.pack("6Q", 0, words[self.PID], 0, 0, ups, downs)
        self.bytes[: len(head)] = head
        words[self.PEER] = 0


@functools.lru_cache(maxsize=64)
def ended_by(proto: str, outcome: str) -> int:
    """Return which word of a slot counts the sessions of a protocol and outcome.

    However many rules there are, what they deny counts as denied.
    """
    word = outcome if outcome in OUTCOMES else outcome.partition("-")[0]
    column = OUTCOME_WORDS.index(word) if word in OUTCOMES else 0
    row = PROTOCOLS.index(proto) if proto in PROTOCOLS else 0
    return Slot.ENDED_BY + row * len(OUTCOME_WORDS) + column


def as_json(line: str) -> str:
    """Return a line of the access log as a JSON object, its numbers as numbers."""
    import json

    kinds = {"pid": int, "status": int, "up": int, "down": int, "secs": float}
    fields = dict(word.split("=", 1) for word in line.split(" "))
    shown = {k: kinds.get(k, str)(v) if v != "-" else None for k, v in fields.items()}
    return json.dumps(shown)


def sessions(board: Scoreboard) -> Iterator[tuple[int, Session]]:
    """Yield the sessions that go on, each with its worker's pid."""
    for number in range(board.used()):
        slot = Slot(board, number)
        if session := slot.session():
            yield slot.words[slot.PID], session


COLUMNS = (
    "Source IP,Original Source Port,New Source Port,Destination,Protocol,Host,User,"
    "Age,Up,Down,PID"
).split(",")


def table_rows(board: Scoreboard) -> list[dict[str, Any]]:
    """Return the state table: the four columns of a NAT router's table, and more.

    A key is the column's name in lower case, as in source_ip.
    """
    rows, keys = [], [column.lower().replace(" ", "_") for column in COLUMNS]
    for pid, one in sessions(board):
        old, new = (name.rpartition(":")[2] for name in (one.client, one.source))
        ports = [int(port) if port.isdecimal() else None for port in (old, new)]
        way = host_of(one.client), *ports, one.address, one.proto, one.host(), one.user
        age = round(time.monotonic() - one.began, 1)
        rows.append(dict(zip(keys, (*way, age, one.up, one.down, pid))))
    return rows


class AccessLog:
    """Where a line goes when a session ends.

    A line is one write of at most PIPE_BUF bytes, so that the lines of many
    workers never mix, and it never waits: what cannot be written at once is lost.
    """

    def __init__(self, config: Config) -> None:
        """Open the file, or standard output; raise OSError."""
        self.path, self.is_json = config.log, config.log_format == "json"
        flags = os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY
        path = "/proc/self/fd/1" if self.path == "-" else self.path
        # As root, follow no link outside /dev: a user that may write to the directory
        # could link to where root alone may write, and drop_root() gives it the file.
        if os.geteuid() == 0 and os.path.dirname(path) not in ("/dev", "/proc/self/fd"):
            flags |= os.O_NOFOLLOW
        try:
            # Opened again, so that O_NONBLOCK is ours and not the terminal's.
            self.fd = os.open(path, flags | os.O_CREAT, 0o640)
        except OSError as error:
            if self.path != "-":
                why = f"cannot open the access log {path}: {reason(error)}"
                raise OSError(why) from None
            self.fd = os.dup(1)  # a socket (journald's), or not ours to open again
        self.room_poll = select.poll()
        self.room_poll.register(self.fd, POLLOUT)
        self.may_block = os.get_blocking(self.fd)  # others share its flags
        if self.is_json:
            as_json("pid=-")  # load json here, and not in every worker

    def write(self, session: Session, outcome: str, slot: Slot) -> None:
        """Write the line of a session that has ended, or lose it; count the session."""
        line, board, why = session.line(outcome), slot.board, errno.EAGAIN
        data, written = f"{as_json(line) if self.is_json else line}\n".encode(), 0
        slot.settle(session)
        try:
            if not self.may_block or self.room_poll.poll(0):  # else why is EAGAIN
                while written < len(data):
                    written += os.write(self.fd, data[written:])
        except OSError as error:
            why = error.errno or errno.EIO
        # Cut off a part of a line: the file's offset is the end of what we wrote.
        if 0 < written < len(data):
            with contextlib.suppress(OSError):  # a pipe or a terminal
                os.ftruncate(self.fd, os.lseek(self.fd, -written, os.SEEK_CUR))
        if written < len(data):
            slot.words[slot.LOST] += 1
            board.words[board.UNREPORTED] = why
        slot.words[ended_by(session.proto, outcome)] += 1
        if why := board.words[board.UNREPORTED]:  # of any worker, and not said yet
            name = "" if self.path == "-" else f" {self.path}"
            lost = f"the access log{name} took no more: lines were lost"
            said = board.say(f"{lost} ({reason(OSError(why, name))})")
            board.words[board.UNREPORTED] = 0 if said else why

    def write_killed(self, slot: Slot, code: int, told: Outcome = OPERATOR) -> None:
        """Write the line of a session whose process was killed, or ended by TERM."""
        if session := slot.session():
            outcome = told if code == -signal.SIGTERM else KILLED
            self.write(session, outcome.word, slot)


# --- Relay --------------------------------------------------------------------
#
# Two sockets are open, and what enters one must leave by the other.  A Direction
# is one half of that.  Its steps are a generator that moves what it can and, when
# it can do no more, yields the socket and the event that it waits for; relay()
# runs two such generators side by side.  A few bytes are cheapest by a plain recv()
# and send().  Bulk goes by splice(2) through a pipe, socket to socket in the kernel.
# A Direction empties its pipe before it looks at its source again, so an EAGAIN from
# splice never means a full pipe, and it waits for one thing at a time.

ALL = 1 << 64  # a count that no stream reaches: until the source ends
Steps = Generator[tuple[int, int], None, Any]  # a descriptor, and its poll() events
LINE_END = re.compile(rb"\n")


def reset_on_close(sock: socket.socket, wanted: bool = True) -> None:
    """Have close() reset the connection, also the kernel's at our death; or undo it."""
    with contextlib.suppress(OSError):  # it has been closed
        value = struct.pack("ii", wanted, 0)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, value)


class Stream:
    """A socket that does not block, and the bytes received that nobody has used yet."""

    sent = 0  # bytes, since counted() was asked
    was_reset = False  # a socket reports a reset once, and then an end
    parent: Any = None  # the proxy that takes requests here, if it is one

    def __init__(self, sock: socket.socket, lost: Outcome) -> None:
        """Take over a socket; lost is the outcome when its far end goes away."""
        self.sock, self.fd, self.lost = sock, sock.fileno(), lost
        self.received = bytearray()

    def counted(self) -> int:
        """Return how many bytes were sent since this was last asked."""
        sent, self.sent = self.sent, 0
        return sent

    def take(self, count: int) -> bytes:
        """Remove and return at most count of the bytes received."""
        piece = bytes(self.received[:count])
        del self.received[:count]
        return piece

    def perform(self, call: Callable[..., Any], *arguments: Any) -> Any:
        """Return what a call on the socket returns, None if it can do nothing now.

        Raises Refused.  EPIPE: the peer had closed its side before, so what it sent is
        complete; any other error is a reset, or as bad.
        """
        try:
            return call(*arguments)
        except BlockingIOError:
            return None
        except OSError as error:
            self.was_reset = not isinstance(error, BrokenPipeError)
            raise Refused(self.lost, reason(error)) from None

    def fill(self) -> bool:
        """Receive what is there; return False at the end; raise Refused."""
        data: bytes | None = self.perform(self.sock.recv, COPY_SIZE)
        if data == b"" and self.was_reset:
            raise Refused(self.lost, "connection reset")
        self.received += data or b""
        return data != b""

    def need(self, count: int = 1) -> Steps:
        """Receive until so many bytes are there; raise Refused if it ends before."""
        while len(self.received) < count:
            yield self.fd, POLLIN
            if not self.fill():
                raise Refused(self.lost, "the connection ended too early")

    def exactly(self, count: int) -> Steps:
        """Take so many bytes; raise Refused."""
        yield from self.need(count)
        return self.take(count)

    def take_until(self, mark: re.Pattern[bytes], limit: int = HEAD_LIMIT) -> bytes:
        """Take the bytes up to and with a mark, b"" if it is not within the limit."""
        found = mark.search(self.received, 0, limit)
        return self.take(found.end()) if found else b""

    def until(
        self,
        mark: re.Pattern[bytes],
        limit: int,
        bad: Outcome,
        first: Callable[[], Iterable[tuple[int, int]]] = tuple,
    ) -> Steps:
        """Take bytes up to and with a mark; raise Refused if it is not within a limit.

        Calls first() before each wait for more: it may wait itself, or raise Refused.
        """
        while not (taken := self.take_until(mark, limit)):
            yield from first()
            if len(self.received) >= limit:
                raise Refused(bad, f"over {limit} bytes without an end")
            yield from self.need(len(self.received) + 1)
        return taken

    def send(self, data: bytes | bytearray) -> int:
        """Send what the kernel takes now; return its size; raise Refused."""
        sent: int = self.perform(self.sock.send, data) or 0
        self.sent += sent
        return sent

    def send_all(self, out: bytearray) -> Steps:
        """Send all of out, and remove from it what has left; raise Refused."""
        while out:
            del out[: self.send(out)]
            if out:
                yield self.fd, POLLOUT

    def tune(self) -> None:
        """Have small pieces leave at once, and a dead peer noticed."""
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)

    def bytes_in_flight(self) -> int:
        """Return how many bytes the kernel took to send and still has."""
        with contextlib.suppress(OSError):
            queue = fcntl.ioctl(self.fd, 0x5411, bytes(4))  # SIOCOUTQ
            return int.from_bytes(queue, sys.byteorder)
        return 0

    def end(self) -> None:
        """Say that nothing more will be sent; go on receiving."""
        with contextlib.suppress(OSError):  # the peer has gone
            self.sock.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        self.sock.close()

    def abort(self) -> None:
        """Close by a reset, so that the peer does not take a part for the whole."""
        reset_on_close(self.sock)
        self.sock.close()


class Watch:
    """How a worker waits for sockets.

    The lifeline is in every wait.  It is a pipe of which only the master holds the
    other end.  A byte in it, which nobody takes out, tells every worker to take no more
    requests, and to finish its own in peace.  When the master leaves or dies, the pipe
    closes, and what goes on here must come to its end within drain_timeout.
    """

    def __init__(
        self, lifeline: int, config: Config, listeners: dict[int, socket.socket]
    ) -> None:
        """Take the worker's listeners too, which are closed when the master leaves."""
        self.lifeline, self.config, self.listeners = lifeline, config, listeners
        self.drain_at = math.inf  # monotonic; known once the master leaves
        self.retired = False  # that this worker should take no more requests

    def wait(self, wanted: dict[int, int], seconds: float) -> dict[int, int]:
        """Return the events on the descriptors wanted; {} when the time is over.

        Events 0 wait for POLLERR and POLLHUP alone, which poll() reports unasked.
        Raises Refused(DRAINED) when drain_timeout is over.
        """
        now = time.monotonic()
        if now >= self.drain_at:
            raise Refused(DRAINED, "the gateway is stopping")
        # For two or three sockets, and a wait or two, epoll would cost more calls.
        poll = select.poll()
        for fd, events in wanted.items():
            poll.register(fd, events)
        if self.drain_at == math.inf:
            poll.register(self.lifeline, 0 if self.retired else POLLIN)
        left = min(seconds, self.drain_at - now)
        ready = dict(poll.poll(left * 1000 if left > 0 else 0))
        if event := ready.pop(self.lifeline, 0):
            self.retired = True
            if event & select.POLLHUP:  # the pipe is closed
                self.drain_at = time.monotonic() + self.config.drain_timeout
                while self.listeners:  # so that a successor can bind, also if we go on
                    self.listeners.popitem()[1].close()
        if ready or (left := now + seconds - time.monotonic()) <= 0:
            return ready
        return self.wait(wanted, left)  # the lifeline woke us, or drain_at has come

    def run(
        self,
        steps: Steps,
        late: Refused,
        deadline: float = math.inf,
        beside: Stream | None = None,
    ) -> Any:
        """Run steps alone, and return what they return; raise what they raise.

        Raises late when one wait takes more than idle_timeout, or when the deadline
        (monotonic) is over; and Refused when a stream beside it is reset.
        """
        try:
            while True:
                fd, events = next(steps)
                wanted = {beside.fd: 0, fd: events} if beside else {fd: events}
                left = min(self.config.idle_timeout, deadline - time.monotonic())
                if not (ready := self.wait(wanted, left)):
                    raise late
                if beside and fd not in ready:
                    raise Refused(beside.lost, "connection reset")
        except StopIteration as end:
            return end.value

    def send(self, stream: Stream, data: bytes) -> None:
        """Send all of data; raise Refused."""
        sent = stream.send(data)
        if sent < len(data):
            late = Refused(IDLE, "nothing moved")
            self.run(stream.send_all(bytearray(data[sent:])), late)


class Direction:
    """One half of a relay: what comes from the source goes to the sink.

    Bytes go from the source's received to out, where they gather until the direction
    would have to wait, and on to the sink; or through a pipe, past both.  Its owner
    sets other steps: move() and flush() for a body, pass_all() for a tunnel.
    """

    RUNNING, DONE, CANCELED = range(3)

    state = RUNNING
    waits_for: tuple[int, int]  # as the steps yield it
    may_fail = False  # a failure then cancels this direction alone

    def __init__(self, source: Stream, sink: Stream) -> None:
        self.source, self.sink = source, sink
        self.out = bytearray()  # to be sent before anything else
        self.steps = self.flush()

    def step(self) -> None:
        """Go on until the direction must wait, or its steps end; raise Refused.

        A failure to send to the server cancels this direction alone, because the server
        may have answered before; so does any failure once the direction may fail.
        """
        try:
            self.waits_for = next(self.steps)
        except StopIteration:
            self.state = self.DONE
        except Refused as refusal:
            server_lost = refusal.outcome is self.sink.lost is SERVER_GONE
            if not server_lost and not self.may_fail:
                raise
            self.state = self.CANCELED
            if not server_lost:
                self.sink.end()  # in mid-message, so it cannot look complete

    def flush(self) -> Steps:
        """Send what is gathered in out."""
        return self.sink.send_all(self.out)

    def move(self, count: int) -> Steps:
        """Pass count bytes on as they are, ALL until the source ends.

        The last of them may stay in out.  Raises Refused when the source ends early.
        """
        until_end, received = count == ALL, self.source.received
        bulk = BULK_SIZE <= count < ALL
        while count > 0:
            if received:
                size = min(count, len(received))
                self.out += received[:size]
                del received[:size]
                count -= size
                continue
            yield from self.flush()
            yield self.source.fd, POLLIN
            moved = (yield from self.splice(count)) if bulk else 0
            count -= moved
            if not moved and not self.source.fill():
                if until_end:
                    return
                raise Refused(self.source.lost, "the body ended too early")
            if moved or received:  # EAGAIN says nothing about the next bytes
                bulk = max(moved, len(received)) >= COPY_SIZE

    def splice(self, count: int) -> Steps:
        """Pass on at most count bytes through a pipe, while much comes at once.

        Returns how many.  0: there is no pipe, or splice(2) moved nothing, and recv()
        must tell why: nothing is there, or the end is, or data after an urgent byte.
        """
        try:
            pipe_out, pipe_in = os.pipe2(PIPE_FLAGS)
        except OSError:  # no descriptors left
            return 0
        source, sink, total, size = self.source, self.sink, 0, COPY_SIZE
        count = min(count, 64 * PIPE_SIZE)  # then the other direction has its turn
        try:
            # EPERM if the user has many pipes already: then 64 KiB, or less, do.
            with contextlib.suppress(OSError):
                fcntl.fcntl(pipe_in, fcntl.F_SETPIPE_SZ, PIPE_SIZE)
            while size >= COPY_SIZE and total < count:
                size = min(count - total, PIPE_SIZE)
                held = size = source.perform(os.splice, source.fd, pipe_in, size) or 0
                total += size
                while held:
                    sent = sink.perform(os.splice, pipe_out, sink.fd, held) or 0
                    if not sent:
                        yield sink.fd, POLLOUT
                    held -= sent
                    sink.sent += sent
            return total
        finally:
            os.close(pipe_out)
            os.close(pipe_in)

    def pass_all(self) -> Steps:
        """Pass everything on, then its end."""
        yield from self.move(ALL)
        self.sink.end()


def relay(
    watch: Watch, slot: Slot, up: Direction, down: Direction, *timeouts: float
) -> None:
    """Run the directions to the server and to the client until both have ended.

    Either may end first and the other goes on: a client that asks, closes its
    half and listens is answered.  A server that takes no more leaves up CANCELED, which
    the caller judges.  Raises Refused when a side is lost, or, with the outcome IDLE,
    when nothing moves for the first timeout; while one goes on alone, for the least.
    """
    server, client, in_flight = up.sink, down.sink, 0
    moving = [up, down]
    try:
        while True:
            for one in moving:
                if one.state == one.RUNNING:
                    one.step()
            running = [one for one in (up, down) if one.state == one.RUNNING]
            if not running:
                return
            slot.moved(server.sent, client.sent)
            # On a socket that we may still write to, POLLHUP and POLLERR, which poll()
            # reports unasked, mean a reset.
            wanted = {one.sink.fd: 0 for one in running}
            for fd, events in (one.waits_for for one in running):
                wanted[fd] = wanted.get(fd, 0) | events
            seconds = timeouts[0] if len(running) == 2 else min(timeouts)
            ready = watch.wait(wanted, seconds)
            moving = [one for one in running if one.waits_for[0] in ready]
            if moving:
                continue
            if client.fd in ready:
                raise Refused(client.lost, "connection reset")
            if ready:
                up.state = up.CANCELED  # the server takes no more; its recv() says why
                continue
            before = in_flight
            in_flight = server.bytes_in_flight() + client.bytes_in_flight()
            # A slow reader may be taking what the kernel holds, if that gets less.
            if in_flight in (0, before):
                raise Refused(IDLE, "nothing moved")
    finally:
        for one in (up, down):
            one.steps.close()


# --- Master and workers -------------------------------------------------------
#
# The master keeps workers forked ahead of the clients and does nothing else: it
# reads nothing from the network, resolves no name and accepts no client.  Its
# loop is top up, sleep, act, reap.  Its signals are blocked, and taken one by one
# when it sleeps, so no code of ours runs in the middle of other code of ours; a
# worker wakes it by SIGCHLD too, when spares are short.  With max_workers busy it
# asks a worker whose client is silent, by SIGURG, to leave.  All workers of one
# configuration are told to leave by their lifeline: see Watch.


def notify(words: str) -> None:
    """Tell the service manager how we are, where it asks: sd_notify(3)."""
    if path := os.environ.get("NOTIFY_SOCKET"):
        # An abstract address begins with a NUL, for which "@" stands.
        where = "\0" + path[1:] if path[0] == "@" else path
        kind = socket.AF_UNIX, socket.SOCK_DGRAM
        with contextlib.suppress(OSError), socket.socket(*kind) as sock:
            sock.settimeout(1)
            sock.sendto(words.encode(), where)


def readable(fds: Iterable[int]) -> dict[int, int]:
    """Return those descriptors that can be read now; a listener, if it has a client."""
    poll = select.poll()
    for fd in fds:
        poll.register(fd, POLLIN)
    return dict(poll.poll(0))


class Client:
    """A client's connection, and the address at its other end.

    It has SO_LINGER from its listener: any close but close() resets the connection.
    """

    def __init__(self, sock: socket.socket, address: tuple[Any, ...]) -> None:
        """Take what accept() returns."""
        sock.setblocking(False)
        self.stream = Stream(sock, CLIENT_GONE)
        self.address = address  # with the scope of a link-local one
        self.host = address[0].removeprefix("::ffff:")
        self.endpoint = endpoint((self.host, address[1]))
        # On the scoreboard; hash() of a str is equal in all forked processes.
        self.number = hash(self.host) & 0xFFFFFFFF | 1

    def close(self) -> None:
        """Close in order."""
        reset_on_close(self.stream.sock, False)
        self.stream.close()


def shut(listener: socket.socket) -> None:
    """Close a listener, in every process that has it open; queued clients are reset."""
    with contextlib.suppress(OSError):
        listener.shutdown(socket.SHUT_RDWR)
    listener.close()


class Generation(NamedTuple):
    """A configuration, and what was opened for it; the last one serves new clients.

    The names of listeners are their addresses, "systemd N" for what systemd passed, and
    "removed N" for those that close once their queue is empty.
    """

    config: Config
    listeners: dict[str, socket.socket]
    log: AccessLog
    chapters: Chapters
    lifeline_read: int
    lifeline_write: int  # the master's alone, so it closes when the master dies


class Worker:
    """A process with one client at a time: what the code that serves it may use."""

    def __init__(self, generation: Generation, slot: Slot) -> None:
        """Begin in the new process, under the configuration of a generation."""
        self.generation, self.chapters = generation, generation.chapters
        self.config, self.policy = generation.config, self.chapters.policy
        self.board, self.slot = slot.board, slot
        self.pid_text = str(os.getpid())  # as the log has it
        self.listeners = {s.fileno(): s for s in generation.listeners.values()}
        self.lifeline = generation.lifeline_read
        self.watch = Watch(self.lifeline, self.config, self.listeners)
        self.client: Client
        self.idle_poll = select.epoll()  # made after the fork: no process shares it
        self.idle_poll.register(self.lifeline, select.EPOLLIN)
        self.is_in_line = False  # for clients

    def accept(self) -> Client | None:
        """Wait for a client and return it; None when it is time to leave."""
        set_title("natwork: idle")
        self.stand_in_line(True)
        while True:
            self.slot.set_state(IDLE_STATE)
            ready = [fd for fd, _ in self.idle_poll.poll(SURPLUS_TIME, 8)]
            # EPOLLEXCLUSIVE wakes one worker a client: look here before the lifeline.
            for fd in ready:
                if fd in self.listeners and (client := self.accept_from(fd)):
                    return client
            if self.lifeline in ready:
                return None
            # Stop being idle before counting the idle: of many workers that count at
            # once, each sees fewer than there are, so too few leave, not too many.
            self.slot.set_state(BUSY)
            if not ready and self.has_spares():
                return None

    def stand_in_line(self, wanted: bool) -> None:
        """Have the kernel wake us for new clients, or not while ours stays for long.

        It asks in the order of registration and wakes the first worker that sleeps, so
        few workers serve all short clients, and their memory stays in the caches: a
        tenth less processor time a client.  But a busy worker that stays in line costs
        each new client 60 ns: a third of the rate, if 1,500 do.
        """
        if wanted == self.is_in_line:
            return
        self.is_in_line = wanted
        for fd in self.listeners:
            if wanted:
                self.idle_poll.register(fd, select.EPOLLIN | select.EPOLLEXCLUSIVE)
            else:
                self.idle_poll.unregister(fd)

    def accept_from(self, fd: int) -> Client | None:
        """Accept a client from a listener, if there is one."""
        try:
            self.client = Client(*self.listeners[fd].accept())
        except BlockingIOError:
            return None  # another worker was quicker
        except OSError as error:
            if error.errno == errno.EINVAL:  # the master has shut this listener
                self.idle_poll.unregister(fd)
                del self.listeners[fd]
            elif error.errno != errno.ECONNABORTED:
                # Stay idle: a worker forked in our place could not accept it either.
                self.board.say(f"cannot accept a client: {reason(error)}")
                time.sleep(1)  # the client stays in the queue
            return None
        self.slot.set_state(BUSY)
        if not self.has_spares():
            with contextlib.suppress(OSError):  # the master has gone
                os.kill(os.getppid(), signal.SIGCHLD)  # wakes it, as if we had ended
        return self.client

    def has_spares(self) -> bool:
        """Return whether enough workers are idle, this one not counted."""
        return self.board.states().count(IDLE_STATE) >= self.config.spare_workers

    def await_bytes(self, seconds: float, new: bool) -> bool:
        """Wait for the client's next bytes, and receive them; return whether any came.

        At a reload a new client keeps its whole time, and a kept-alive one has
        CROSSING_TIME: its request may be on the way.  When the master leaves, a new
        client has CROSSING_TIME, and a kept-alive one no time.
        """
        client, poll = self.client.stream, select.poll()
        poll.register(client.fd, POLLIN)
        poll.register(self.lifeline, 0 if new else POLLIN)  # POLLHUP comes unasked
        ready = dict(poll.poll(min(seconds, SHORT_SILENCE) * 1000))
        if not ready and seconds > SHORT_SILENCE:
            self.stand_in_line(False)
            with self.yielding():
                ready = dict(poll.poll((seconds - SHORT_SILENCE) * 1000))
        if ready.keys() == {self.lifeline} and (new or ready[self.lifeline] == POLLIN):
            poll.unregister(self.lifeline)
            ready = dict(poll.poll(CROSSING_TIME * 1000))
        try:
            return client.fd in ready and client.fill() and bool(client.received)
        except Refused:
            return False

    def hear(self, steps: Steps, late: Refused, deadline: float) -> Any:
        """Run steps that receive what the client has to say; raise Refused.

        After SHORT_SILENCE the worker may have to make room for another client.
        """
        soon = min(deadline, time.monotonic() + SHORT_SILENCE)
        try:
            return self.watch.run(steps, late, soon)
        except Refused as refusal:
            if refusal is not late:
                raise
        with self.yielding():
            return self.watch.run(steps, late, deadline)

    @contextlib.contextmanager
    def yielding(self) -> Iterator[None]:
        """Let the master ask us meanwhile to leave for another client."""
        self.slot.set_state(SILENT)
        try:
            yield
        finally:
            self.slot.set_state(BUSY)

    def leave_if_silent(self, *_: object) -> None:
        """Leave for another client, as the master asks, if ours is silent still."""
        silent = self.board.states()[self.slot.number] == SILENT
        if silent and not readable([self.client.stream.fd]):
            self.client.close()
            os._exit(0)

    def begin(self, session: Session) -> None:
        """Show a session, unless its client has too many: then raise Refused."""
        if self.chapters.users:
            self.chapters.users.check_share(self)
        self.slot.words[Slot.PEER] = self.client.number
        self.slot.publish(session)

    def proceed(self, session: Session) -> None:
        """Show what a session knows once it is connected, by the title too."""
        self.slot.publish(session)
        set_title(session.title())

    def record(
        self,
        session: Session,
        serve: Callable[[], None],
        refuse: Callable[[Refused], Outcome],
    ) -> None:
        """Serve a session, and write down how it ends, whatever becomes of it.

        refuse() tells its client why not, and returns the outcome for the log.
        """
        outcome: Outcome | None = None
        try:
            serve()
            outcome = session.outcome
        except (Refused, OSError) as error:
            if isinstance(error, OSError):
                error = Refused(outcome_of(error), reason(error))
            session.user = error.user or session.user
            outcome = refuse(error)
            if outcome in (BROKEN, OVERLOAD):  # the operator may mend it
                self.board.say(f"a session had to end: {error.detail}")
        finally:
            session.down += self.client.stream.counted()
            if not outcome:  # what nobody foresaw: half an answer must not look whole
                outcome = BROKEN
                self.client.stream.abort()
            self.generation.log.write(session, outcome.word, self.slot)


class Master:
    """Keeps spare workers waiting for clients, and sees them out."""

    SIGNALS = [signal.SIGCHLD, signal.SIGHUP, signal.SIGINT, signal.SIGTERM]

    def __init__(
        self,
        board: Scoreboard,
        generation: Generation,
        load: Callable[[Generation], Generation],
        serve: Callable[[Worker], bool],
        fds: list[int],
    ) -> None:
        """Take the first generation, what loads another, and what serves one client.

        serve() returns False when it is time to leave.  The fds are the master's alone.
        """
        self.board, self.load, self.serve, self.fds = board, load, serve, fds
        self.generation = generation
        self.generations = [generation]  # the older ones finish what they have
        self.workers: dict[int, tuple[Slot, Generation]] = {}  # by pid
        self.mappers: dict[int, Generation] = {}  # by pid: one, and those that drain
        self.stopping = self.reloading = False
        self.killed = 0  # workers that were killed, and are not replaced yet
        self.told = OPERATOR  # the outcome of a session whose worker is told to end
        # When to do what next, monotonic; fork_at is 0 unless the last fork failed.
        self.fork_at = self.say_full_at = self.notify_at = 0.0
        self.kill_at = math.inf
        board.words[board.MASTER] = os.getpid()
        board.words[board.BEGAN] = int(time.monotonic())

    def run(self) -> None:
        """Serve until TERM or INT, then see the busy workers out."""
        # SIG_IGN outlives exec(2), and with it the kernel would reap in our place.
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        while self.workers or self.mappers or not self.stopping:
            try:
                if not self.stopping:
                    self.keep_spares()
                    self.see_old_out()
                self.kill_late()
                self.show_title()
                self.sleep()
                self.reap()
            except OSError as error:
                self.board.say(f"the master goes on after an error: {reason(error)}")
                time.sleep(0.1)  # it may come again at once

    def sleep(self) -> None:
        """Wait for a signal, and act on it, or for the time to look around."""
        limit = self.generation.config.max_workers
        full = len(self.workers) >= limit and not self.idle(self.generation)
        if full and not self.stopping:
            self.make_room(limit)
        # First these two: of all pending signals the kernel gives the lowest, HUP.
        taken = signal.sigtimedwait([signal.SIGINT, signal.SIGTERM], 0)
        taken = taken or signal.sigtimedwait(self.SIGNALS, 0.25 if full else 1.0)
        number = taken.si_signo if taken else 0
        if number in (signal.SIGTERM, signal.SIGINT):
            self.stop()
        elif number == signal.SIGHUP and not self.stopping:
            self.reload()

    def idle(self, generation: Generation) -> int:
        """Return how many workers of a generation are idle."""
        states = self.board.states()
        own = [slot for slot, one in self.workers.values() if one is generation]
        return sum(states[slot.number] == IDLE_STATE for slot in own)

    def make_room(self, limit: int) -> None:
        """Have a worker with a silent client leave, if others wait for a worker."""
        if not readable(s.fileno() for s in self.generation.listeners.values()):
            return
        if time.monotonic() >= self.say_full_at:
            self.say_full_at = time.monotonic() + 60
            say(f"all {limit} workers are busy and clients wait (max_workers)")
        states = self.board.states()
        for pid, (slot, _) in self.workers.items():
            if states[slot.number] == SILENT:
                os.kill(pid, signal.SIGURG)  # which nobody sends by mistake
                self.workers[pid] = self.workers.pop(pid)  # the next time, another
                return

    def reap(self) -> None:
        """Collect every worker that has ended, and free its slot."""
        while self.workers or self.mappers:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                break
            if self.mappers.pop(pid, None) and status:
                self.fork_at = time.monotonic() + 1
            if pid not in self.workers:  # a child we inherited, as process 1 does
                continue
            slot, _ = self.workers.pop(pid)
            if status:
                code = os.waitstatus_to_exitcode(status)
                self.generation.log.write_killed(slot, code, self.told)
            slot.set_state(FREE)
            slot.words[slot.PEER] = 0  # of a client that had logged in, and not asked
            # A client may have woken it alone; a new worker looks at the queue first.
            self.killed += status != 0
            if status and not slot.words[slot.PID]:  # at its start: so would the next
                self.fork_at = time.monotonic() + 1

    def keep_spares(self) -> None:
        """Fork the mapper, and workers until enough are idle or max_workers live."""
        if time.monotonic() < self.fork_at:
            return
        config, mapper = self.generation.config, self.generation.chapters.mapper
        missing = max(config.spare_workers - self.idle(self.generation), self.killed)
        try:
            if mapper and self.generation not in self.mappers.values():
                pid = self.board.fork(lambda: self.become(mapper, self.generation))
                self.mappers[pid] = self.generation
            for _ in range(min(missing, config.max_workers - len(self.workers))):
                self.spawn()
            self.fork_at, self.killed = 0.0, 0
        except OSError as error:
            self.board.words[self.board.FORKS_FAILED] += 1
            if not self.fork_at:
                say(f"cannot fork a worker: {reason(error)}")
            self.fork_at = time.monotonic() + 1

    def spawn(self) -> None:
        """Fork one worker; raise OSError."""
        board, words = self.board, self.board.words
        number = board.memory.find(bytes([FREE]), board.STATES) - board.STATES
        slot = Slot(board, number)
        # Before the fork: the worker may be busy by the time fork() returns here.
        words[board.USED] = max(words[board.USED], number + 1)
        slot.clear(0)
        slot.set_state(IDLE_STATE)
        try:
            pid = board.fork(lambda: self.become(self.serve_clients, slot))
        except OSError:
            slot.set_state(FREE)
            raise
        words[board.FORKS] += 1
        self.workers[pid] = slot, self.generation

    def become(self, work: Callable[[Any], None], what: Any) -> None:
        """Do some work in this new process, less what belongs to the master alone."""
        for fd in [*self.fds, *(one.lifeline_write for one in self.generations)]:
            os.close(fd)
        # Where memory is short, the kernel then kills one of us, and not the master.
        score = "/proc/self/oom_score_adj"
        with contextlib.suppress(OSError), open(score, "r+") as file:
            file.write(str(int(file.read()) + 100))
        signal.pthread_sigmask(signal.SIG_UNBLOCK, self.SIGNALS)
        work(what)

    def serve_clients(self, slot: Slot) -> None:
        """Be a worker, until it is time to leave."""
        worker = Worker(self.generation, slot)
        signal.signal(signal.SIGURG, worker.leave_if_silent)  # sent by the master
        if os.geteuid() != 0:
            # Serving needs neither fork nor threads; root is above that limit.
            resource.setrlimit(resource.RLIMIT_NPROC, (0, 0))
        # If it fails before clear(), the master waits a second before the next fork.
        worker.stand_in_line(True)
        slot.clear(os.getpid())
        for _ in range(worker.config.clients_per_worker):
            if readable([worker.lifeline]) or not self.serve(worker):
                return

    def reload(self) -> None:
        """Put a new configuration in force, or say why the old one stays."""
        notify(f"RELOADING=1\nMONOTONIC_USEC={time.monotonic_ns() // 1000}")
        old = self.generation
        try:
            fresh = self.load(old)
        except (ConfigError, OSError, ImportError, ValueError, MemoryError) as error:
            why = reason(error) if isinstance(error, OSError) else str(error)
            for line in why.splitlines() or ["no memory for it"]:
                say(f"configuration not reloaded, the old one stays: {line}")
            notify("READY=1")
            return
        # The new workers take what is still queued at a removed listener.
        for listener in set(old.listeners.values()) - set(fresh.listeners.values()):
            fresh.listeners[f"removed {listener.fileno()}"] = listener
        for fd in (old.log.fd, old.lifeline_read):  # its workers have their own copies
            os.close(fd)
        self.generation, self.reloading, self.fork_at = fresh, True, 0.0
        self.generations.append(fresh)
        self.keep_spares()
        with contextlib.suppress(BrokenPipeError):  # no worker of it is left
            os.write(old.lifeline_write, b"d")  # its workers take no more requests
        gc.collect()  # of generations gone by: their parts refer to each other

    def see_old_out(self) -> None:
        """Say when no idle worker is left that would take a client by old settings.

        Close the lifelines that no process has, and removed listeners without a queue.
        """
        if self.reloading and not any(map(self.idle, self.generations[:-1])):
            self.reloading = False
            say("configuration reloaded")
            notify("READY=1")
        for generation in self.generations[:-1]:
            used = [one for _, one in self.workers.values()]
            if generation not in [*used, *self.mappers.values()]:
                self.generations.remove(generation)
                os.close(generation.lifeline_write)
        listeners = self.generation.listeners
        for name in [name for name in listeners if name.startswith("removed ")]:
            if not readable([listeners[name].fileno()]):
                shut(listeners.pop(name))

    def stop(self) -> None:
        """Let busy workers finish until drain_timeout; told again, end them now."""
        if self.stopping:
            self.kill_at, self.told = min(self.kill_at, time.monotonic()), OPERATOR
            return
        self.stopping, self.told = True, DRAINED
        notify("STOPPING=1")
        for generation in self.generations:
            os.close(generation.lifeline_write)
        for name, listener in self.generation.listeners.items():
            if not name.startswith("systemd "):  # those are not ours to shut
                shut(listener)
        seconds = self.generation.config.drain_timeout
        self.kill_at = time.monotonic() + seconds + 2  # workers end by themselves first
        if count := len(list(sessions(self.board))):
            say(f"stopping: sessions that have {seconds:g} s to end: {count}")

    def kill_late(self) -> None:
        """End the processes that have not left in time, after 5 s more by SIGKILL."""
        late = time.monotonic() - self.kill_at
        for pid in (*self.workers, *self.mappers) if late >= 0 else ():
            os.kill(pid, signal.SIGKILL if late >= 5 else signal.SIGTERM)

    def show_title(self) -> None:
        """Show how many workers are idle and busy, to ps and to the service manager."""
        idle = self.idle(self.generation)
        busy = len(self.workers) - idle
        set_title(f"natwork: master {idle} idle {busy} busy")
        if (now := time.monotonic()) >= self.notify_at:
            self.notify_at = now + 1
            notify(f"WATCHDOG=1\nSTATUS={idle} idle {busy} busy")


# --- Rules --------------------------------------------------------------------
#
# Which peers are clients, and what may be dialed for them.  The addresses judged
# are the ones that will be dialed, whatever name led to them, and with every IPv4
# address that is embedded in an IPv6 one.  Addresses are kept packed, as the
# kernel has them, 4 or 16 bytes: of one length they compare like numbers.


def pack(address: str) -> bytes:
    """Return an address's 4 or 16 bytes; raise ValueError for anything else.

    inet_pton() is strict: it takes no 127.1, 0x7f.1 or 010.0.0.1.
    """
    try:
        return socket.inet_pton(INET6 if ":" in address else INET, address)
    except (OSError, ValueError):
        raise ValueError(f"{address!r} is not an address") from None


@functools.lru_cache(maxsize=64)
def unpack(packed: bytes) -> str:
    """Return an address of 4 or 16 bytes as text."""
    return socket.inet_ntop(INET if len(packed) == 4 else INET6, packed)


MAPPED = bytes(10) + b"\xff\xff"  # ::ffff:0:0/96


def embedded_addresses(packed: bytes) -> list[bytes]:
    """Return an address and the IPv4 addresses that it stands for, if any."""
    if len(packed) == 4:
        return [packed]
    tail, found = packed[12:], []
    if packed.startswith(MAPPED):  # RFC 4291
        return [tail]  # the kernel dials IPv4
    if packed.startswith(b"\x20\x02"):  # 6to4, RFC 3056
        found = [packed[2:6]]
    elif packed.startswith(b"\x20\x01\0\0"):  # Teredo, RFC 4380
        found = [packed[4:8], bytes(byte ^ 255 for byte in tail)]
    elif packed.startswith(b"\0\x64\xff\x9b\0\1"):  # NAT64, RFC 8215
        # RFC 6052 section 2.2: the prefix may be a /48, /56, /64 or /96.
        forms = [packed[6:8] + packed[9:11], packed[7:8] + packed[9:12]]
        found = [form for form in [*forms, packed[9:13], tail] if form[0]]
    elif packed[:12] in (b"\0\x64\xff\x9b" + bytes(8), bytes(8) + b"\xff\xff\0\0"):
        found = [tail]  # NAT64, RFC 6052; translated, RFC 2765
    elif packed[:12] == bytes(12) and tail[:2] != bytes(2):  # compatible, RFC 4291
        found = [tail]
    return [packed, *found]


@functools.lru_cache(maxsize=64)
def address_of(peer: str) -> bytes:
    """Return the address of a peer as the kernel names it, zone and all, packed."""
    return embedded_addresses(pack(peer.partition("%")[0]))[0]


def parse_network(text: str) -> tuple[bytes, bytes]:
    """Return first and last address of "10.0.0.0/8" or "fd00::1"; raise ValueError."""
    address, slash, length = text.partition("/")
    packed = pack(address)
    bits = 8 * len(packed)
    if packed.startswith(MAPPED):  # nothing that is judged has this form
        raise ValueError(f"{text!r} is an IPv4 address: write it as one")
    if slash and not (re.fullmatch("[0-9]{1,3}", length) and int(length) <= bits):
        raise ValueError(f"{text!r} has no prefix length from 0 to {bits}")
    hosts = (1 << bits - int(length or bits)) - 1
    first = int.from_bytes(packed, "big") & ~hosts
    size = len(packed)
    return first.to_bytes(size, "big"), (first | hosts).to_bytes(size, "big")


def networks(text: str) -> tuple[tuple[bytes, bytes], ...]:
    return tuple(parse_network(word) for word in text.split())


def contains(blocks: Iterable[tuple[bytes, bytes]], *found: bytes) -> bool:
    """Return whether one of some addresses lies in one of some blocks."""
    for first, last in blocks:
        for packed in found:
            if first <= packed <= last and len(packed) == len(first):
                return True
    return False


LINK_LOCAL = networks("169.254.0.0/16 fe80::/10")
CLOSED = (
    ("unspecified", networks("0.0.0.0/8 ::/128")),
    ("loopback", networks("127.0.0.0/8 ::1")),
    ("link-local", LINK_LOCAL),
    ("multicast", networks("224.0.0.0/3 ff00::/8")),  # and the reserved, and broadcast
)


def parts_of(data: bytes, form: str) -> Iterator[tuple[int, bytes]]:
    """Yield number and content of each part of netlink data, by its header's form."""
    size = struct.calcsize(form)  # a length, which counts the header too, comes first
    while len(data) >= size:
        length, number, *_ = struct.unpack_from(form, data)
        yield number, data[size:length]
        data = data[(max(length, size) + 3) & ~3 :]  # parts begin at multiples of 4


def netlink(kind: int, flags: int, body: bytes) -> Iterator[bytes]:
    """Ask the kernel's routing table; yield the body of each answer; raise OSError."""
    form = "=IHHII"
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW) as sock:
        sock.settimeout(1)
        sock.send(struct.pack(form, 16 + len(body), kind, flags, 1, 0) + body)
        while True:
            for answer, content in parts_of(sock.recv(65536), form):
                if answer in (2, 3):  # NLMSG_ERROR, NLMSG_DONE
                    return
                yield content


class Route(NamedTuple):
    """The way the kernel would take to an address."""

    local: bool  # it is an address of this box
    device: str
    source: bytes  # packed, empty if there is none


def find_route(packed: bytes) -> Route:
    """Return the kernel's route to an address; raise OSError."""
    family, size = INET if len(packed) == 4 else INET6, len(packed)
    body = struct.pack("=BB10xHH", family, 8 * size, 4 + size, 1) + packed  # RTA_DST
    for data in netlink(26, 1, body):  # RTM_GETROUTE, NLM_F_REQUEST: one answer
        found = dict(parts_of(data[12:], "=HH"))
        index = int.from_bytes(found.get(4, b""), sys.byteorder)  # RTA_OIF
        device = socket.if_indextoname(index)
        # RTN_LOCAL, _BROADCAST, _ANYCAST: this box hears what is sent there.
        return Route(data[7] in (2, 3, 4), device, found.get(7, b""))  # RTA_PREFSRC
    return Route(False, "", b"")  # there is none


def remembered(seconds: float, ask: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that keeps an answer for some seconds at most."""
    cached = functools.lru_cache(maxsize=256)(lambda period, *what: ask(*what))
    return lambda *what: cached(time.monotonic() // seconds, *what)


def find_addresses(device: str) -> list[bytes]:
    """Return the addresses of a device, packed, if it is there; raise OSError."""
    found, names = [], dict(socket.if_nameindex())
    for data in netlink(22, 0x301, bytes(8)):  # RTM_GETADDR, NLM_F_REQUEST, _DUMP
        if names.get(struct.unpack_from("=I", data, 4)[0]) == device:
            fields = dict(parts_of(data[8:], "=HH"))
            found.append(fields.get(2) or fields[1])  # IFA_LOCAL, IFA_ADDRESS
    return found


# Both may change, but a browser asks for a page's many parts within a second.
route_to = remembered(1.0, find_route)
device_addresses = remembered(1.0, find_addresses)


def parse_ports(text: str) -> range:
    """Return the ports of "80" or "8000-8100"; raise ValueError."""
    if match := re.fullmatch("([0-9]{1,5})(?:-([0-9]{1,5}))?", text):
        low, high = int(match[1]), int(match[2] or match[1])
        if 1 <= low <= high <= 65535:
            return range(low, high + 1)
    raise ValueError(f"{text!r} is not a port from 1 to 65535, or LOW-HIGH")


def parse_line(
    text: str, known: tuple[str, ...]
) -> tuple[list[str], dict[str, list[str]]]:
    """Return a line's words, and for each known one the list that follows it.

    Raises ValueError, which does not quote the line: it may hold a password.
    """
    # A blank after a comma begins no new word.
    words = re.sub(r"\s*,\s*", ",", text).split()
    lists = {word: listed.split(",") for word, listed in zip(words[1::2], words[2::2])}
    if 2 * len(lists) + 1 != len(words):
        raise ValueError("the rest is not pairs of a word and a list with commas")
    for word, listed in lists.items():
        if word not in known:
            raise ValueError(f"{word!r} is none of {', '.join(known)}")
        if "" in listed:
            raise ValueError("a list has an empty member")
    return words, lists


class Rule:
    """One line of `rules`; a part that was not given is empty, and fits all."""

    SOME_PORT = -1  # to ask whether a target may be dialed at some port

    def __init__(self, text: str) -> None:
        """Parse a line; raise ValueError."""
        if text.split()[0] not in ("allow", "deny"):
            raise ValueError(f"{text!r} does not begin with allow or deny")
        words, lists = parse_line(text, ("from", "user", "to", "port"))
        names, blocks = set(), []
        for target in lists.get("to", ()):
            if "/" in target or ":" in target or re.fullmatch(r"[0-9.-]+", target):
                blocks.append(parse_network(target))
            elif re.fullmatch(r"\*|\.?[\w-]+(\.[\w-]+)*\.?", target, re.ASCII):
                names.add(target.lower().rstrip("."))
            else:
                raise ValueError(f"{target!r} is no CIDR, host.example, .example or *")
        self.text = " ".join(words)
        self.allow = words[0] == "allow"
        self.sources = [parse_network(source) for source in lists.get("from", ())]
        self.users = {printable(user.encode()) for user in lists.get("user", ())}
        self.names, self.blocks = names, blocks
        self.ports = [parse_ports(ports) for ports in lists.get("port", ())]
        self.names_mail = range(25, 26) in self.ports  # 25 itself, not 1-1024

    def matches(
        self, client: bytes, user: str, host: str, port: int, found: list[bytes]
    ) -> bool:
        """Return whether the rule fits a client, its user, and a target as found."""
        if self.sources and not contains(self.sources, client):
            return False
        if self.users and user not in self.users:
            return False
        some = port == self.SOME_PORT and self.allow  # any port that is allowed will do
        if self.ports and not some and not any(port in ports for ports in self.ports):
            return False
        if not self.names and not self.blocks or contains(self.blocks, *found):
            return True
        # ".example" is example and everything below it.
        labels = host.split(".")
        above = ("." + ".".join(labels[n:]) for n in range(len(labels)))
        return not self.names.isdisjoint(["*", host, *above])


class Uplink(NamedTuple):
    """A way out: a source address, or a device by name."""

    name: str
    packed: bytes  # empty for a device

    def addresses(self) -> list[bytes]:
        """Return the addresses that a connection may leave from; raise OSError."""
        return [self.packed] if self.packed else [*device_addresses(self.name)]


def parse_uplink(text: str) -> Uplink:
    """Return the uplink that a word of `outside` names; raise ValueError."""
    with contextlib.suppress(ValueError):
        if any(packed := address_of(text)):
            return Uplink(unpack(packed), packed)
    # At most the kernel's IFNAMSIZ, less the final NUL; and not a misspelled address.
    if not re.fullmatch(r"(?![0-9.]+\Z)[\w.@-]{1,15}", text, re.ASCII):
        raise ValueError(f"{text!r} is no address to leave from and no device name")
    return Uplink(text, b"")


class Policy:
    """Which peers are clients, and what may be dialed: `inside`, `outside`, `rules`."""

    # An address of the outside, to ask the way to and never to dial; by its size.
    ANYWHERE = {4: pack("192.0.2.1"), 16: pack("2001:db8::1")}

    def __init__(self, config: Config) -> None:
        """Parse the settings; what is wrong is noted in the configuration."""
        self.listeners: dict[int, list[bytes]] = {}  # port -> addresses
        self.own_names = "localhost", config.name.lower()
        self.inside = config.parsed("inside", parse_network)
        self.rules = config.parsed("rules", Rule)
        self.ports = range(1)  # 0, for the kernel to choose one
        if config.bind_ports != "0":
            (self.ports,) = config.parsed("bind_ports", parse_ports) or [self.ports]
        self.uplinks = config.parsed("outside", parse_uplink)
        self.closed = (*CLOSED, ("inside", self.inside))
        # judge() is verdict(), remembered: without it a request costs a fifth more.
        self.judge = remembered(1.0, self.verdict)

    def listens_at(self, host: str, port: int) -> None:
        """Take note of a listener of the gateway itself, which is not dialed."""
        self.listeners.setdefault(port, []).append(pack(host.partition("%")[0]))

    def is_client(self, address: tuple[Any, ...], sock: socket.socket | None) -> bool:
        """Return whether a peer is on the inside, and came to us from there.

        address is what accept() returns; without a socket the caller has looked which
        address the peer came to.  A peer of the outside may have an address that is in
        `inside`: between two NATs, a link-local one, or one that its network routes to
        it.  Then it comes to an address of the outside, or our answers leave by its
        device and not from an address of the inside.  Raises OSError.
        """
        packed, scope = address_of(address[0]), address[3] if len(address) == 4 else 0
        if not contains(self.inside, packed):
            return False
        route = route_to(packed)
        device = socket.if_indextoname(scope) if scope else route.device
        link_local = contains(LINK_LOCAL, packed, route.source)
        if link_local:  # every network has these: the device must have an inside one
            own = [a for a in device_addresses(device) if not contains(LINK_LOCAL, a)]
            if not contains(self.inside, *own):
                return False
        here = address_of(sock.getsockname()[0]) if sock and self.uplinks else b""
        theirs = {one for uplink in self.uplinks for one in uplink.addresses()}
        if here in theirs or device in [uplink.name for uplink in self.uplinks]:
            return False
        if contains(self.inside, route.source) and not link_local:
            return True
        leads_outside = device in [way.device for way in self.defaults()]
        return not leads_outside and theirs.isdisjoint(device_addresses(device))

    def defaults(self) -> list[Route]:
        """Return the default routes of both families; raise OSError."""
        return [route_to(there) for there in self.ANYWHERE.values()]

    def outside(self) -> dict[bytes, Uplink | None]:
        """Return the addresses that the outside sees, each with its uplink.

        Without uplinks they are those of the default routes.  Raises OSError.
        """
        found = {packed: way for way in self.uplinks for packed in way.addresses()}
        if not self.uplinks:
            found = {way.source: None for way in self.defaults() if way.source}
        return {
            packed: uplink
            for packed, uplink in found.items()
            if route_to(packed).local and not contains(LINK_LOCAL, packed)
        }

    def is_own_listener(self, found: list[bytes], port: int) -> bool:
        """Return whether a port of some address is a listener of ours: a loop.

        The unspecified address, all zeros, is the loopback one when it is dialed; a
        listener that has it listens on every address of this box.
        """
        ours = self.listeners.get(port, [])
        if any(packed in ours for packed in found) or not all(map(any, found)):
            return bool(ours)
        return not all(map(any, ours)) and any(route_to(one).local for one in found)

    def means_us(self, host: str, port: int) -> bool:
        """Return whether a host is this gateway, by name or address, at a listener."""
        if port not in self.listeners:
            return False
        if host in self.own_names:
            return True
        with contextlib.suppress(ValueError):  # it is another name
            packed = address_of(host)
            return any(packed) and self.is_own_listener([packed], port)
        return False

    def closes(self, packed: bytes) -> str:
        """Return which built-in rule denies an address, "" if none does."""
        found = embedded_addresses(packed)
        for word, blocks in self.closed:
            if contains(blocks, *found):
                return word
        return "own" if any(route_to(one).local for one in found) else ""

    def verdict(
        self, peer: str, user: str, host: str, port: int, packed: bytes, proto: str = ""
    ) -> tuple[Outcome, str]:
        """Return what the first rule that fits says of dialing an address: OK or not.

        With it comes the rule in words.  host is what the client asked for, in lower
        case; packed is what it led to.
        """
        user = user.partition(";")[0]  # after it stands what the client says of itself
        host = host.rstrip(".")
        closed = self.closes(packed)
        if proto == "map" and closed == "inside":  # that machine asked for the mapping
            closed = ""
        # A redirected client did not choose a gateway to send its mail through.
        mail = port == 25 and proto != "redirect"
        found = embedded_addresses(packed)
        if self.is_own_listener(found, port):
            return LOOP, "the gateway's own listener"
        if port > 0 and not any(packed):  # dialed, it is the loopback address
            found.append(pack("127.0.0.1" if len(packed) == 4 else "::1"))
        client = address_of(peer)
        for number, rule in enumerate(self.rules, 1):
            if not rule.matches(client, user, host, port, found):
                continue
            text = f"rule {number}: {rule.text}"
            if not rule.allow:
                return DENIED._replace(word=f"denied-rule-{number}"), text
            # A closed address, and mail, need an allow that names them: see the next.
            named = all(contains(rule.blocks, one) for one in found)
            if (not mail or rule.names_mail) and (named or not closed):
                return OK, text
        if not closed and not mail:
            return OK, "built-in rule: allow the rest"
        what = f"{closed} addresses are" if closed else "port 25 (mail) is"
        outcome = DENIED._replace(word=f"denied-{closed or 'port-25'}")
        return outcome, f"built-in rule: {what} not reached"


# --- Connecting ---------------------------------------------------------------
#
# One way out for every protocol: resolve once, judge each address, and dial the
# judged ones and no other, so that no name can lead elsewhere the second time.
# Addresses are raced as in RFC 8305, so a dead family costs a quarter second;
# uplinks are raced likewise, so a dead one costs a second.


def leave_by(sock: socket.socket, uplink: Uplink) -> None:
    """Make a socket that has no address yet leave by an uplink; raise OSError."""
    if uplink.packed:
        # IP_BIND_ADDRESS_NO_PORT, which 3.10 does not name: each target then has the
        # whole port range to itself, and not a part of one for all.
        sock.setsockopt(socket.SOL_IP, 24, 1)
        sock.bind((uplink.name, 0))
    else:
        # A source address alone leaves the device to the routing table.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, uplink.name.encode())


def resolve(host: str) -> list[bytes]:
    """Return the addresses of a host, best first; raise Refused."""
    with contextlib.suppress(ValueError):  # it is a name
        return [address_of(host)]
    began = time.monotonic()
    try:
        # As bytes: a str would load the IDNA tables, a megabyte in every worker.
        found = socket.getaddrinfo(host.encode(), None, type=STREAM)
    except socket.gaierror as error:
        outcome = outcome_of(error, NO_SUCH_HOST)
        # EAI_AGAIN may be silence or a refusal; only silence takes so long.
        if outcome is DNS_FAILED and time.monotonic() > began + 1.5:
            outcome = DNS_TIMEOUT
        raise Refused(outcome, f"{host}: {error.args[1]}") from None
    addresses = [*dict.fromkeys(address_of(str(info[4][0])) for info in found)][:32]
    # The families take turns: RFC 8305 section 4.
    family = {size: [a for a in addresses if len(a) == size] for size in (4, 16)}
    return sorted(addresses, key=lambda packed: family[len(packed)].index(packed))


class Attempt(NamedTuple):
    """One connection to be tried."""

    packed: bytes
    port: int
    uplink: Uplink | None  # None: by the routing table
    at: float  # seconds after the first, if none fails before

    def where(self) -> tuple[str, int]:
        return unpack(self.packed), self.port


def ways_to(
    policy: Policy, addresses: list[bytes], port: int, board: Scoreboard
) -> list[Attempt]:
    """Return the attempts at addresses that may be dialed, in their order.

    Uplinks go side by side, failed ones last.  An address of the inside is not dialed
    by a device of the outside: another host could answer for it there.
    """
    uplinks = policy.uplinks
    order = sorted(uplinks, key=board.failed_recently)
    named = {len(uplink.packed) for uplink in uplinks}  # sizes; 0 of a device
    closed = [one for one in addresses if 0 in named and policy.closes(one)]
    attempts: list[Attempt] = []
    begins: dict[int, float] = {}  # of a family's next uplink, by the family's size
    # None leaves the way to the routing table.  Without uplinks it is the only way;
    # beside devices it leads to the inside, if no source address of the family does.
    for way in [None, *order]:
        if not way:
            by_table = closed if uplinks else addresses
            usable = [packed for packed in by_table if len(packed) not in named]
        elif way.packed:
            usable = [packed for packed in addresses if len(packed) == len(way.packed)]
        else:
            usable = [packed for packed in addresses if packed not in closed]
        # An uplink does not wait until the one before has tried all its addresses.
        sizes, first = {*map(len, usable)}, ATTEMPT_DELAY if attempts else 0.0
        begin = max((begins.get(size, first) for size in sizes), default=0.0)
        begins |= dict.fromkeys(sizes, begin + UPLINK_DELAY)
        for number, packed in enumerate(usable):
            attempts.append(Attempt(packed, port, way, begin + number * ATTEMPT_DELAY))
    return sorted(attempts, key=lambda attempt: attempt.at)


class Race:
    """Connection attempts side by side, of which the first to succeed wins.

    When one has failed, the next begins at once, and those after it as much earlier.
    """

    # The target itself answers with these; any other error is one of the way there.
    ANSWERS = ConnectionRefusedError, ConnectionResetError

    def __init__(self, worker: Worker, session: Session) -> None:
        self.worker, self.session = worker, session
        self.waiting: list[Attempt] = []  # the next one stands at the end
        self.due = 0.0  # when the next one begins, monotonic
        self.pending: dict[Attempt, socket.socket] = {}
        self.failed: list[tuple[OSError, Attempt]] = []
        # The uplinks asked, in their order, and whether they brought an answer.
        self.asked: dict[Uplink | None, bool] = {}

    def run(self, attempts: list[Attempt]) -> Stream:
        """Return the connection that is there first; raise Refused if none is.

        The session learns its two ends; or, if all fail, the last address tried.
        """
        timeout = self.worker.config.connect_timeout  # for all attempts together
        deadline = time.monotonic() + timeout
        self.waiting = attempts[::-1]
        try:
            while (now := time.monotonic()) < deadline:
                if self.waiting and (now >= self.due or not self.pending):
                    self.start(self.waiting.pop(), now)
                if server := self.ask():
                    return server
                if not self.pending and not self.waiting:
                    raise self.defeat(self.failed)
                until = min(self.due, deadline) if self.waiting else deadline
                wanted = {sock.fileno(): POLLOUT for sock in self.pending.values()}
                self.worker.watch.wait(wanted, until - now)
            raise Refused(CONNECT_TIMEOUT, f"no answer within {timeout:g} s")
        finally:
            for sock in self.pending.values():
                sock.close()

    def start(self, attempt: Attempt, now: float) -> None:
        """Begin an attempt, and give it its time."""
        if self.waiting:
            self.due = now + self.waiting[-1].at - attempt.at
        family = INET if len(attempt.packed) == 4 else INET6
        try:
            sock = socket.socket(family, STREAM | socket.SOCK_NONBLOCK)
            self.pending[attempt] = sock
            if attempt.uplink:
                leave_by(sock, attempt.uplink)
            self.session.address = endpoint(attempt.where())
            # Whatever connect() says, ask() calls it again, and acts on that.
            if sock.connect_ex(attempt.where()) == errno.EINPROGRESS:
                self.asked.setdefault(attempt.uplink, False)
        except OSError as error:
            self.fail(error, attempt)

    def ask(self) -> Stream | None:
        """Return the connection of an attempt that has succeeded, if there is one."""
        for attempt, sock in [*self.pending.items()]:
            # Called again, connect() tells what has become of the first call.
            number = sock.connect_ex(attempt.where())
            if number in (0, errno.EISCONN):
                return self.win(attempt)
            if number == errno.EADDRNOTAVAIL and route_to(attempt.packed).source:
                number = errno.EAGAIN  # said by connect(): no port is left
            if number not in (errno.EINPROGRESS, errno.EALREADY):
                self.fail(OSError(number, os.strerror(number)), attempt)
        return None

    def fail(self, error: OSError, attempt: Attempt) -> None:
        """Remember an attempt that failed; the next one begins at once."""
        self.due = 0.0
        self.failed.append((error, attempt))
        if isinstance(error, self.ANSWERS):  # it would say the same by another uplink
            self.waiting = [one for one in self.waiting if one.packed != attempt.packed]
            self.asked[attempt.uplink] = True
        if attempt in self.pending:
            self.pending.pop(attempt).close()

    def win(self, attempt: Attempt) -> Stream:
        """Return the connection that won, and remember which uplinks were too slow.

        An uplink has failed if it was asked before the winner and brought no answer.
        If connect() failed at once, it was not asked: it may reach other targets.
        """
        board = self.worker.board
        for uplink, has_answered in self.asked.items():
            if uplink == attempt.uplink:
                break
            if uplink and not has_answered:
                word = board.UPLINKS + board.uplinks.index(uplink) % board.UPLINK_MAX
                board.words[word] = int(time.monotonic())
        sock = self.pending.pop(attempt)
        self.session.source = endpoint(sock.getsockname())
        self.session.address = endpoint(attempt.where())
        return Stream(sock, SERVER_GONE)

    @staticmethod
    def defeat(failed: list[tuple[OSError, Attempt]]) -> Refused:
        """Return the refusal that fits attempts that have all failed."""
        if not failed:
            why = "no uplink has an address of the target's family"
            return Refused(UNROUTABLE, why)
        # An answer of the target says more than the want of a route.
        error, attempt = max(failed, key=lambda one: isinstance(one[0], Race.ANSWERS))
        why = f"{endpoint(attempt.where())}: {reason(error)}"
        return Refused(outcome_of(error, CONNECT_FAILED), why)


def judged(
    worker: Worker, session: Session, host: str, port: int, only: str = ""
) -> list[bytes]:
    """Return the addresses of a host that may be dialed; raise Refused if none may."""
    allowed: list[bytes] = []
    peer, proto = worker.client.host, session.proto
    user = session.user if worker.config.users else "-"  # a name that nobody checked
    for packed in [pack(only)] if only else resolve(host):
        outcome, rule = worker.policy.judge(peer, user, host, port, packed, proto)
        if outcome is OK:
            allowed.append(packed)
    if not allowed:
        raise Refused(outcome, f"{unpack(packed)}: {rule}")  # of the last address
    return allowed


def dial(
    worker: Worker, session: Session, host: str, port: int, only: str = ""
) -> Stream:
    """Return a connection to a target, or to only this address of it; raise Refused."""
    began = time.monotonic()
    if worker.chapters.parents:
        server: Stream = worker.chapters.parents.dial(worker, session, host, port, only)
    else:
        addresses = judged(worker, session, host, port, only)
        attempts = ways_to(worker.policy, addresses, port, worker.board)
        server = Race(worker, session).run(attempts)
    worker.slot.words[Slot.CONNECTIONS] += 1
    worker.slot.words[Slot.CONNECTING] += int((time.monotonic() - began) * 1e6)
    return server


def deliver(watch: Watch, peer: Stream) -> None:
    """Wait until a peer has what was sent to it, or takes no more of it.

    RFC 9110 section 9.3.6: a reset would discard what has not arrived.
    """
    left, deadline, limit = 0, 0.0, time.monotonic() + HALF_CLOSED_TIMEOUT
    with contextlib.suppress(Refused):
        while count := peer.bytes_in_flight():
            now = time.monotonic()
            if count != left:
                left, deadline = count, min(now + LINGER_TIMEOUT, limit)
            if now >= deadline or watch.wait({peer.fd: 0}, 0.05):
                return


def linger(watch: Watch, client: Stream, limit: float = LINGER_LIMIT) -> None:
    """Close in stages, so that the last answer arrives: RFC 9112 section 9.6.

    To close a socket with unread bytes resets it, and the reset may overtake the
    answer; so what the client still sends is read and thrown away, as nginx does.
    """
    client.end()
    deadline = time.monotonic() + limit
    with contextlib.suppress(Refused):
        while (left := deadline - time.monotonic()) > 0:
            ready = watch.wait({client.fd: POLLIN}, min(left, LINGER_TIMEOUT))
            if not ready or not client.fill():
                return
            client.received.clear()


def tunnel(worker: Worker, session: Session, server: Stream, opening: bytes) -> None:
    """Join a client and its server, after a few bytes to the client, until both end.

    Closes the server.  Raises Refused when a side is lost or silent for too long; then
    both were reset, because a tunnel has no mark of its end but that of the stream.
    """
    client, watch = worker.client.stream, worker.watch
    worker.stand_in_line(False)
    server.tune()
    reset_on_close(server.sock)  # as the client's is, whatever ends this process
    up, down = Direction(client, server), Direction(server, client)
    up.steps, down.steps = up.pass_all(), down.pass_all()
    down.out += opening
    try:
        timeouts = worker.config.tunnel_timeout, HALF_CLOSED_TIMEOUT
        relay(watch, worker.slot, up, down, *timeouts)
        if up.state == up.CANCELED:
            raise Refused(SERVER_GONE, "the server took no more")
        reset_on_close(server.sock, False)
    except Refused as refusal:
        if refusal.outcome in (SERVER_GONE, CLIENT_GONE):
            deliver(watch, client if refusal.outcome is SERVER_GONE else server)
        client.abort()
        # A server that has more to send answers the client's close by a reset.
        if refusal.outcome is SERVER_GONE and up.state == up.DONE:
            raise Refused(CLIENT_GONE, "the client had gone before") from None
        raise
    finally:
        session.up += server.counted()
        server.close()


# --- HTTP messages ------------------------------------------------------------
#
# Heads are parsed strictly into parts, and what is sent on is built from the
# parts: two parsers that disagree on a malformed line are how requests are
# smuggled, so there is nothing here for a second parser to disagree with.

CRLF = b"\r\n"
HEAD_END = re.compile(rb"\n\r?\n")  # without a CR too, which only a response may lack
TCHAR = rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]"  # RFC 9110 section 5.6.2
TOKEN = TCHAR + b"+"
TEXT = rb"[\t -~\x80-\xff]*"  # of field values and phrases: section 5.5
# A request line begins with a letter, and SOCKS with 4 or 5.
REQUEST_LINE = re.compile(
    rb"([A-Za-z]%b*) ([!-~\x80-\xff]+) HTTP/([0-9])\.([0-9])" % TCHAR
)
# Some servers say HTTP/2 in HTTP/1, or put in a blank; Shoutcast's call 1.0 ICY.
STATUS = rb"(HTTP/1\.[0-9]|HTTP/2(?:\.0)?|ICY) +([1-9][0-9][0-9])"
# Whole field lines, and the end of a head; a folded one, a bare CR or LF do not match.
FIELD_LINES = re.compile(rb"(?:%b:%b\r\n)*\r\n" % (TOKEN, TEXT))
RESPONSE_HEAD = re.compile(
    rb"%b(?: +((?! )%b))?\r\n(%b)" % (STATUS, TEXT, FIELD_LINES.pattern)
)
# RFC 9112 section 5.1: the blanks are an error in a request, removed from a response.
FAULTY_FIELD = re.compile(rb"(%b)[\t ]*:([^\n]*)" % TOKEN)
# RFC 9112 section 7.1.1: extensions have no effect, but may hide no line end.
QUOTED = rb'"(?:[\t !#-\[\]-~\x80-\xff]|\\[\t -~\x80-\xff])*"'
CHUNK_LINE = re.compile(
    rb"([0-9A-Fa-f]{1,16})(?:[\t ]*;[\t ]*%b(?:[\t ]*=[\t ]*(?:%b|%b))?)*\r\n"
    % (TOKEN, TOKEN, QUOTED)
)
FAULTY_CHUNK_LINE = re.compile(rb"([0-9A-Fa-f]{1,16})[\t ]*(?:;[^\r\n\0]*)?\r\n")
# Brackets must hold a colon, so that an IPv4 address is not taken in them.
AUTHORITY = re.compile(
    rb"(\[[0-9A-Fa-f]*:[0-9A-Fa-f:.]*\]|[0-9A-Za-z._~-]{1,255})(?::([0-9]*))?"
)
# A fragment is not a part of what is asked for: RFC 9110 section 7.1.
ABSOLUTE_FORM = re.compile(rb"([A-Za-z][A-Za-z0-9+.-]*)://([^/?#]*)([^#]*)(?:#.*)?")
# What the log leaves out of a target: all before an @, and the query, because both may
# hold a password.  In a gopher URL the query begins with %09.
BEFORE_AT_OR_QUERY = re.compile(rb"\A[^?#]*[?#].*@.*|\A.*@|(?:[?#]|%09).*", re.DOTALL)

UPGRADE_LINES = b"Connection: upgrade\r\nUpgrade: %b\r\n"  # RFC 9110 section 7.8
DEFAULT_PORTS = {b"http": 80, b"ftp": 21, b"gopher": 70}
OWN_PAGE = b""  # the scheme of a request in origin-form: it is for the gateway itself
CHUNKED = -1  # in place of a body's length
# RFC 9110 section 7.6.1, and what this hop alone may read.
HOP_BY_HOP = frozenset(
    b"connection proxy-connection proxy-authorization keep-alive te transfer-encoding "
    b"upgrade http2-settings".split()
)
# Naming these in Connection must not strip what others rely on.
END_TO_END = frozenset(
    b"authorization cache-control content-length cookie date forwarded host set-cookie "
    b"via x-forwarded-for expect max-forwards".split()
)
NOT_NAMED = HOP_BY_HOP | END_TO_END | {b"close"}
# RFC 9110 section 6.5.1: framing, routing and identity do not come in trailers.
NOT_IN_TRAILERS = (HOP_BY_HOP | END_TO_END).union(
    b"content-encoding content-range content-type range trailer proxy-authenticate "
    b"www-authenticate".split()
)

REWRITTEN = HOP_BY_HOP | {b"content-length", b"via"}  # read here, and written anew


def members(listed: bytes) -> list[bytes]:
    """Return the members of a list field, in lower case."""
    parts = listed.lower().split(b",")
    return [member for part in parts if (member := part.strip(b" \t"))]


def take_fields(
    lines: bytes, names: set[bytes] | frozenset[bytes]
) -> tuple[dict[bytes, bytes], bytes]:
    """Take from whole field lines those of some names, in lower case.

    Returns these, each from all its lines (RFC 9110 section 5.3), and the other lines.
    """
    fields: dict[bytes, bytes] = {}
    others = []
    for line in lines.split(CRLF):
        name, _, value = line.partition(b":")
        if (name := name.lower()) in names:
            value = value.strip(b" \t")
            if name in fields:
                value = b"%b, %b" % (fields[name], value)
            fields[name] = value
        else:
            others.append(line)
    return fields, CRLF.join(others)


def read_fields(
    section: bytes, names: frozenset[bytes]
) -> tuple[dict[bytes, bytes], bytes, list[bytes]]:
    """Return the fields that are read here, the lines that travel on, and the options.

    The options are those of Connection; what it names does not travel on.
    """
    fields, forwarded = take_fields(section[:-2], names)  # less the empty line
    options = fields.get(b"connection", b"").lower().replace(b",", b" ").split()
    if options and not NOT_NAMED.issuperset(options):
        forwarded = take_fields(forwarded, set(options) - NOT_NAMED)[1]
    return fields, forwarded, options


@functools.lru_cache(maxsize=64)
def parse_authority(raw: bytes, default: int) -> tuple[str, int]:
    """Return host and port of "host:port"; default 0 demands one.  Raises Refused."""
    if not (match := AUTHORITY.fullmatch(raw)):
        raise Refused(BAD_REQUEST, "malformed host or port")
    name, digits = match.groups()
    if not digits and not default:
        raise Refused(BAD_REQUEST, "no port in the target, which must be HOST:PORT")
    # RFC 3986 section 3.2.3: a port may begin with any number of zeros.
    port = int(digits.lstrip(b"0")[:6] or b"0") if digits else default
    if not 0 < port < 65536:
        raise Refused(BAD_REQUEST, "port not from 1 to 65535")
    host = name.decode().lower()
    # A host that ends in a number is an IPv4 address or nothing: resolvers take
    # 127.1, 0x7f.1 and 2130706433 for 127.0.0.1.
    last = host.removesuffix(".").rpartition(".")[2]
    bare = host.strip("[]")
    if bare != host or re.fullmatch("[0-9]+|0x[0-9a-f]*", last):
        try:
            pack(bare)
        except ValueError as error:
            raise Refused(BAD_REQUEST, str(error)) from None
    return bare, port


def parse_request_line(line: bytes) -> tuple[bytes, bytes, int]:
    """Return method, target and minor version; raise Refused if it is not for us."""
    if len(line) > LINE_LIMIT:
        raise Refused(URI_TOO_LONG, f"request line over {LINE_LIMIT} bytes")
    if not (match := REQUEST_LINE.fullmatch(line)):
        raise Refused(BAD_REQUEST, "malformed request line")
    method, target, major, minor = match.groups()
    if major != b"1":
        raise Refused(BAD_VERSION, f"HTTP/{major.decode()}, and not HTTP/1")
    if len(method) > METHOD_LIMIT:
        raise Refused(NOT_IMPLEMENTED, f"method of over {METHOD_LIMIT} letters")
    return method, target, int(minor != b"0")


def check_response_begun(received: bytearray) -> tuple[()]:
    """Refuse what does not begin as a response; raise Refused."""
    if LINE_END.search(received) and not re.match(STATUS + rb"[\r\n ]", received):
        raise Refused(BAD_RESPONSE, "malformed status line")
    return ()


def mended(head: bytes) -> bytes:
    """Return a response head without the faults that cannot mislead; raise Refused.

    Lines may end with LF alone or be folded, there may be blanks before a colon and
    control bytes in a value; a line that is not a field is left out.
    """
    if b"\0" in head or b"\n\r\r" in head:
        raise Refused(BAD_RESPONSE, "NUL, or a line of CRs, in the head")
    # A fold becomes a NUL, and in a value that becomes a blank.  A name with a fold in
    # it does not match, and a status line ends at its fold.
    head = re.sub(rb"(?<![\t ])[\t ]*\r?\n[\t ]+", b"\0", head)
    line, *others = (line.removesuffix(b"\r") for line in head.split(b"\n"))
    fields = [match for match in map(FAULTY_FIELD.fullmatch, others) if match]
    lines = [line.partition(b"\0")[0], *(b"%b:%b" % match.groups() for match in fields)]
    clean = [re.sub(rb"[\0-\x08\x0b-\x1f\x7f]", b" ", line) for line in lines]
    return CRLF.join([*clean, b"", b""])


@functools.lru_cache(maxsize=1)
def date_line(second: int) -> bytes:
    """Return the field line for a Unix time: RFC 9110 sections 5.6.7 and 6.6.1."""
    form = "Date: %a, %d %b %Y %H:%M:%S GMT\r\n"
    return time.strftime(form, time.gmtime(second)).encode()


def parse_length(digits: bytes, bad: Outcome) -> int:
    """Return a Content-Length; raise Refused with an outcome."""
    # 18 digits are more than was ever sent, and fit in 63 bits.
    if not digits.isdigit() or len(digits) > 18:
        raise Refused(bad, "invalid Content-Length")
    return int(digits)


class RequestHead:
    """A request head, parsed; minor is the second digit of its version."""

    READ = REWRITTEN | {b"host", b"expect", b"max-forwards"}

    def __init__(self, head: bytes) -> None:
        """Split a whole head into its parts; raise Refused."""
        line, _, section = head.partition(CRLF)
        self.method, self.target, self.minor = parse_request_line(line)
        if not FIELD_LINES.fullmatch(section):
            raise Refused(BAD_REQUEST, "malformed field line")
        self.fields, self.forwarded, self.options = read_fields(section, self.READ)
        # RFC 9112 section 3.2: one, and only one; it may be empty.
        host = self.fields.get(b"host")
        if host is None and self.minor and self.method != b"CONNECT":
            raise Refused(BAD_REQUEST, "no Host field")
        self.host = parse_authority(host, 80)[0] if host else ""
        # RFC 9112 section 9.3: a proxy never keeps an HTTP/1.0 client's connection.
        self.keep_alive = self.minor == 1 and b"close" not in self.options
        self.upgrade = self.offered() if b"upgrade" in self.options else b""
        # RFC 9110 section 10.1.1: to be ignored in HTTP/1.0.
        self.expected = self.fields.get(b"expect", b"").lower() if self.minor else b""

    def length(self) -> int | None:
        """Return a body's length, CHUNKED, or None if no field says it; raise Refused.

        RFC 9112 sections 6.1 to 6.3; where it leaves a choice, the stricter one.
        """
        digits = self.fields.get(b"content-length")
        if b"transfer-encoding" in self.fields:
            codings = members(self.fields[b"transfer-encoding"])
            if digits is not None or not self.minor:
                why = "Transfer-Encoding with Content-Length, or in HTTP/1.0"
                raise Refused(BAD_REQUEST, why)
            if codings[-1:] != [b"chunked"] or codings.count(b"chunked") > 1:
                why = "Transfer-Encoding does not end in one chunked"
                raise Refused(BAD_REQUEST, why)
            if len(codings) > 1:  # not a fault, but we have no other coding
                raise Refused(NOT_IMPLEMENTED, "a transfer coding other than chunked")
            return CHUNKED
        return None if digits is None else parse_length(digits, BAD_REQUEST)

    def value(self, name: bytes) -> bytes:
        """Return what any field says, by its name in lower case; else b""."""
        return take_fields(self.forwarded, {name})[0].get(name, b"")

    def login(self, name: bytes) -> bytes:
        """Return user:password of a Basic field, b"" if it has none: RFC 7617."""
        field = self.fields.get(name) or self.value(name)  # two lines: no match
        match = re.fullmatch(rb"(?i:basic) +([A-Za-z0-9+/]+=*)", field)
        with contextlib.suppress(binascii.Error):
            return binascii.a2b_base64(match[1]) if match else b""
        return b""

    def offered(self) -> bytes:
        """Return the protocols of an upgrade that may travel: RFC 9110 section 7.8.

        None travels if Connection names other fields for it: we have left those out.
        HTTP/2 never does: the server speaks with us, and we do not speak it.
        """
        if not self.minor or not NOT_NAMED.issuperset(self.options):
            return b""
        offered = self.fields.get(b"upgrade", b"").split(b",")
        known = (x for x in offered if x.strip(b" \t").lower() not in (b"", b"h2c"))
        return b",".join(known).strip(b" \t")


class ResponseHead:
    """A response head, parsed; minor is the second digit of its version."""

    READ = REWRITTEN | {b"date"}

    def __init__(self, head: bytes) -> None:
        """Split a whole head into its parts; raise Refused."""
        match = RESPONSE_HEAD.fullmatch(head) or RESPONSE_HEAD.fullmatch(mended(head))
        if not match:
            raise Refused(BAD_RESPONSE, "malformed status line")
        version, status, phrase, section = match.groups(b"")
        self.status = int(status)
        self.minor = 0 if version in (b"HTTP/1.0", b"ICY") else 1
        self.line = b"HTTP/1.1 %b %b\r\n" % (status, phrase)
        self.fields, self.forwarded, self.options = read_fields(section, self.READ)
        self.keep_alive = self.minor == 1 and b"close" not in self.options
        if date := self.fields.get(b"date"):
            if date.count(b",") > 1:  # two lines: keep the first, with its own comma
                date = b",".join(date.split(b",")[:2])
            self.forwarded += b"Date: %b\r\n" % date
        elif self.status >= 200:
            self.forwarded += date_line(int(time.time()))
        self.upgrade = self.fields.get(b"upgrade", b"")
        if self.upgrade and self.status in (101, 426):  # RFC 9110 section 15.5.22
            self.forwarded += UPGRADE_LINES % self.upgrade

    def length(self) -> int | None:
        """Return a body's length as for a request, but mend what has one meaning.

        A length beside chunked does not count, and equal ones are one.  Raises Refused.
        """
        if b"transfer-encoding" in self.fields:
            codings = members(self.fields[b"transfer-encoding"])
            codings = [coding for coding in codings if coding != b"identity"]
            if codings == [b"chunked"]:
                return CHUNKED
            if codings:
                raise Refused(BAD_RESPONSE, "Transfer-Encoding is not one chunked")
        digits = self.fields.get(b"content-length", b"")
        if b"," in digits:
            lengths = set(members(digits))
            if len(lengths) != 1:
                raise Refused(BAD_RESPONSE, "lengths that differ")
            digits = lengths.pop()
        return parse_length(digits, BAD_RESPONSE) if digits else None


def unescaped(part: bytes) -> bytes:
    """Return a part of a URL as it is meant: RFC 3986 section 2.1."""
    return re.sub(b"%([0-9A-Fa-f]{2})", lambda m: bytes([int(m[1], 16)]), part)


def credentials(login: bytes) -> bytes:
    """Return user:password, as a URL spells it, for a Basic field: RFC 7617."""
    plain = unescaped(login)
    return binascii.b2a_base64(plain if b":" in plain else plain + b":", newline=False)


class Target(NamedTuple):
    """Where a request wants to go: RFC 9112 section 3.2."""

    host: str  # lower case; IPv6 without brackets
    port: int
    authority: bytes  # for Host, as the client spelled it
    scheme: bytes
    login: bytes = b""  # user:password, as the URL spells it
    path: bytes = b""  # for the request line to the server: origin-form, or *

    def shown(self) -> str:
        """Return it as the log has it: less user and query, printable."""
        where, path = endpoint((self.host, self.port)), self.path.partition(b"?")[0]
        if not path:  # it is a CONNECT
            return where
        url = f"{self.scheme.decode()}://{where}"
        return url if path == b"*" else url + printable(path, TARGET_SIZE - len(url))


def parse_target(method: bytes, raw: bytes) -> Target:
    """Return the target of a request in authority- or absolute-form; raise Refused."""
    if method == b"CONNECT":
        return Target(*parse_authority(raw, 0), raw, b"")
    if not (match := ABSOLUTE_FORM.fullmatch(raw)):
        raise Refused(BAD_REQUEST, "this is a proxy: the target must be a whole URL")
    scheme, authority, path = match.groups()
    user, at, authority = authority.rpartition(b"@")
    scheme = scheme.lower()
    if scheme not in DEFAULT_PORTS:
        raise Refused(NOT_IMPLEMENTED, f"scheme {printable(scheme, 20)}")
    form = rb"[0-9A-Za-z._~%!$&'()*+,;=:-]*"  # RFC 3986 section 3.2.1
    fits = not at or scheme == b"ftp" or scheme == b"http" and re.fullmatch(form, user)
    if not fits:
        raise Refused(BAD_REQUEST, "malformed user name in the target")
    host, port = parse_authority(authority, DEFAULT_PORTS[scheme])
    if path[:1] != b"/":
        path = b"*" if method == b"OPTIONS" and not path else b"/" + path
    return Target(host, port, authority.removesuffix(b":"), scheme, user, path)


def framing_lines(length: int | None) -> bytes:
    """Return the field line that says how long a body is, if one does."""
    if length is None:
        return b""
    if length == CHUNKED:
        return b"Transfer-Encoding: chunked\r\n"
    return b"Content-Length: %d\r\n" % length


def answer_head(line: bytes, fields: bytes, length: int | None, keep: bool) -> bytes:
    """Return the head of an answer: status line and field lines are whole lines."""
    end = CRLF if keep else b"Connection: close\r\n\r\n"
    return b"%b%b%b%b" % (line, fields, framing_lines(length), end)


def move_body(
    one: Direction, head: RequestHead | ResponseHead, size: int, framed: bool = True
) -> Steps:
    """Move a message's body: size bytes, ALL until the end, or CHUNKED.

    Chunks, RFC 9112 section 7.1, stay chunks or (not framed) become bare.  Raises
    Refused when they are malformed.
    """
    if size != CHUNKED:
        yield from one.move(size)
        return (yield from one.flush())
    source, strict, left = one.source, isinstance(head, RequestHead), HEAD_LIMIT
    form = CHUNK_LINE if strict else FAULTY_CHUNK_LINE
    bad = BAD_REQUEST if strict else BAD_RESPONSE
    while True:
        line = yield from source.until(LINE_END, CHUNK_LINE_LIMIT, bad, one.flush)
        match = form.fullmatch(line)
        if not match or (size := int(match[1], 16)) >= 1 << 63:
            raise Refused(bad, "malformed chunk size")
        left -= len(line) - len(match[1]) - len(CRLF)  # for all chunk extensions
        if strict and left < 0:
            raise Refused(bad, f"chunk extensions of over {HEAD_LIMIT} bytes")
        if not size:
            break
        if framed:
            one.out += b"%x\r\n" % size
        yield from one.move(size)
        if len(source.received) < 2:
            yield from one.flush()
        if (yield from source.exactly(2)) != CRLF:
            raise Refused(bad, "chunk longer than its size")
        if framed:
            one.out += CRLF
    # Put the last size's line end back: HEAD_END wants it if there are no trailers.
    source.received[:0] = CRLF
    section = yield from source.until(HEAD_END, HEAD_LIMIT, bad, one.flush)
    if not FIELD_LINES.fullmatch(section, 2):
        if strict or re.search(b"[^\r]\n", section):
            raise Refused(bad, "malformed field line in the trailers")
        section = mended(section)
    if framed:
        one.out += b"0" + take_fields(section, NOT_IN_TRAILERS.union(head.options))[1]
    yield from one.flush()


# --- HTTP exchanges -----------------------------------------------------------
#
# Each request on a kept-alive connection is parsed, judged and routed by itself.
# Most requests end with their head, and most answers come whole with theirs:
# that is the plain way through an exchange, told first.  Directions are for what
# has a body that is still on its way.  A response is what a server sends; an answer
# is what the client gets, from there or from us.


class HttpConnection:
    """A client's HTTP connection, and the server connection that is kept for it."""

    server: Stream | None = None
    server_for = "", "", 0  # the user, host and port it was dialed for
    server_ends = "-", "-"  # its address and source, for the log
    answered_at = 0.0  # monotonic
    blanks = 0  # empty lines before this request
    expecting: tuple[bytes, bytes] | None = None  # method and target that got a 417

    def __init__(self, worker: Worker) -> None:
        """Take over a worker's client, of which the first bytes have been received."""
        self.worker, self.client = worker, worker.client.stream
        self.drop_blanks()

    def await_request(self) -> bool:
        """Wait for the next request of a kept-alive client; return whether it comes."""
        self.blanks = 0
        deadline = time.monotonic() + self.worker.config.keepalive_timeout
        while self.drop_blanks():
            left = max(0.0, deadline - time.monotonic())
            if not self.worker.await_bytes(left, new=False):
                return False
        return True

    def drop_blanks(self) -> bool:
        """Drop empty lines before a request; return whether nothing else is there.

        RFC 9112 section 2.2.  There may be a few; the next is a malformed request.
        """
        received = self.client.received
        while received[:2] == CRLF and self.blanks < BLANK_LIMIT:
            del received[:2]
            self.blanks += 1
        return not received or received == b"\r"

    def dial(self, session: Session, host: str, port: int) -> Stream:
        """Replace the server connection by a new one, and return it; raise Refused."""
        self.close()
        self.server = dial(self.worker, session, host, port)
        self.server_for = session.user, host, port
        self.server_ends = session.address, session.source
        return self.server

    def close(self) -> None:
        """Close the connection to the server, if there is one."""
        if self.server:
            self.server.close()
        self.server = None


class Exchange:
    """One request and its answer."""

    IDEMPOTENT = {b"GET", b"HEAD", b"OPTIONS", b"TRACE", b"PUT", b"DELETE"}
    # How much was sent.  NOTHING: at most whole interim responses.  BEGUN: a part of a
    # response.  BEGUN_UNTIL_CLOSE: a part of one that only the close ends.
    NOTHING, BEGUN, BEGUN_UNTIL_CLOSE, WHOLE = range(4)

    head: RequestHead  # once it is understood
    target: Target
    head_only = False  # the method is HEAD
    length: int | None = None  # of the request's body
    progress = NOTHING
    keep = False  # the client's connection goes on after the answer
    continued = False  # the client was told to send its body
    server_keeps = False  # the server's connection goes on after its answer
    switching: ResponseHead | None = None  # the answer that takes an upgrade

    def __init__(self, http: HttpConnection) -> None:
        """Begin with the next request of a connection."""
        self.http, self.worker, self.client = http, http.worker, http.client
        self.config, self.watch = http.worker.config, http.worker.watch
        who = self.worker.client.endpoint
        self.session = Session(who, self.worker.pid_text, "http")

    def serve(self) -> None:
        """Read a request, learn who asks for what, and see to it; raise Refused."""
        head = self.read_head()
        target = self.target = self.find_target(head)
        if head.target[:1] == b"/":  # our own pages identify the client by themselves
            return self.by_chapter(target)
        self.identify(b"proxy-authorization")
        if head.method in (b"TRACE", b"OPTIONS") and self.ends_here(head):
            return
        if head.method == b"CONNECT":
            return self.serve_connect(target)
        if target.scheme == b"http":
            return self.forward(head, target)
        self.by_chapter(target)

    # The request: read, parse, decide.

    def read_head(self) -> RequestHead:
        """Take a request head off the client, and parse it; raise Refused."""
        raw = self.client.take_until(HEAD_END) or self.await_head()
        self.head_only, session = raw[:5] == b"HEAD ", self.session
        head = self.head = RequestHead(raw)
        session.method = head.method.decode()  # a token is printable
        self.length = head.length()
        if head.method == b"CONNECT":
            session.proto = "connect"
            if self.length:
                raise Refused(BAD_REQUEST, "CONNECT with a body")
        else:
            self.keep = head.keep_alive and not self.length  # with a body: see reply()
        if head.expected and set(members(head.expected)) != {b"100-continue"}:
            raise Refused(EXPECTATION, "an expectation other than 100-continue")
        asked, self.http.expecting = self.http.expecting, None
        # After a 417, anything but the same request, less Expect, may be the late body.
        if asked and (head.expected or asked != (head.method, head.target)):
            raise Refused(BAD_REQUEST._replace(error=""))  # without an answer
        return head

    def await_head(self) -> bytes:
        """Wait for a whole request head, and take it off the client; raise Refused."""
        deadline = time.monotonic() + self.config.head_timeout
        late = Refused(HEAD_TIMEOUT, "the request head did not come to its end")
        return bytes(self.worker.hear(self.receive_head(), late, deadline))

    def receive_head(self) -> Steps:
        """Take a whole request head; raise Refused."""
        client = self.client
        while self.http.drop_blanks():
            yield from client.need(len(client.received) + 1)
        steps = client.until(HEAD_END, HEAD_LIMIT, HEAD_TOO_LARGE, self.check_begun)
        return (yield from steps)

    def check_begun(self) -> tuple[()]:
        """Refuse a head that does not begin as one; raise Refused."""
        received = self.client.received
        self.head_only = received[:5] == b"HEAD "
        if not (received[:1].isalpha() or received[:1] == b"\r"):
            socks = "SOCKS, which needs natwork_socks.py"
            what = socks if received[0] in (4, 5) else "not HTTP"
            raise Refused(BAD_REQUEST, f"this is {what}")
        if LINE_END.search(received) or len(received) > LINE_LIMIT:
            line = received[: LINE_LIMIT + 2].partition(b"\n")[0].removesuffix(b"\r")
            parse_request_line(bytes(line))
        return ()

    def identify(self, field: bytes) -> None:
        """Learn by a field who asks: RFC 9110 section 3.3; raise Refused."""
        if users := self.worker.chapters.users:
            self.session.user = users.identify(self.worker, self.head.login(field))

    def find_target(self, head: RequestHead) -> Target:
        """Return where the request wants to go, and tell the log; raise Refused."""
        session, raw = self.session, head.target
        if raw[:1] == b"/" and head.method != b"CONNECT":  # origin-form
            path = BEFORE_AT_OR_QUERY.sub(b"", raw)
            session.target = printable(path, TARGET_SIZE)
            return Target(head.host, 0, b"", OWN_PAGE, path=raw)
        if raw == b"*" and head.method == b"OPTIONS":  # it asks the gateway
            session.target = "*"
            return Target("", 0, b"", b"*")
        if head.upgrade and raw[:5].lower() == b"ws://":  # RFC 6455's
            raw = b"http" + raw[2:]
        target = parse_target(head.method, raw)
        session.target = target.shown()
        if via := head.fields.get(b"via"):  # RFC 9110 section 7.6.3
            session.via, name = via + b", ", self.config.name.lower().encode()
            if any(member.split()[1:2] == [name] for member in members(via)):
                raise Refused(LOOP, "the request has been here before, says its Via")
        policy = self.worker.policy
        if target.scheme == b"http" and policy.means_us(target.host, target.port):
            return target._replace(scheme=OWN_PAGE)
        return target

    def ends_here(self, head: RequestHead) -> bool:
        """Answer TRACE or OPTIONS if it may go no further; return whether that is so.

        Else lower its Max-Forwards by one: RFC 9110 section 7.6.2.  Raises Refused.
        """
        if head.method == b"TRACE" and self.length is not None:
            raise Refused(BAD_REQUEST, "TRACE with a body")
        hops = head.fields.get(b"max-forwards")
        if hops is not None:
            if not re.fullmatch(rb"[0-9]{1,32}", hops):
                raise Refused(BAD_REQUEST, "invalid Max-Forwards")
            head.fields[b"max-forwards"] = b"%d" % (int(hops) - 1)
        if head.target != b"*" and (hops is None or int(hops) > 0):
            return False
        if head.method == b"TRACE":
            raise Refused(NOT_IMPLEMENTED, "TRACE is not answered by this gateway")
        methods = b"Allow: CONNECT, DELETE, GET, HEAD, OPTIONS, PATCH, POST, PUT\r\n"
        self.answer("200 OK", methods, b"")
        return True

    # What travels on.

    def by_chapter(self, target: Target) -> None:
        """Answer what a chapter answers, by the target's scheme; raise Refused."""
        if serve := self.worker.chapters.schemes.get(target.scheme):
            return serve(self)
        if target.scheme == OWN_PAGE:
            why = "the gateway's own pages need natwork_pages.py"
            raise Refused(NO_PAGE._replace(advice=ASK_OPERATOR), why)
        why = f"{target.scheme.decode()}:// needs natwork_gateways.py"
        raise Refused(NOT_IMPLEMENTED._replace(advice=ASK_OPERATOR), why)

    def serve_connect(self, target: Target) -> None:
        """Answer a CONNECT and carry its bytes: RFC 9110 section 9.3.6."""
        session = self.session
        self.http.close()  # no request can follow that could use it
        self.worker.begin(session)
        server = dial(self.worker, session, target.host, target.port)
        answer = b"HTTP/1.1 200 Connection established\r\n\r\n"
        self.join_as_tunnel(server, "200", answer)

    def join_as_tunnel(self, server: Stream, status: str, answer: bytes) -> None:
        """Answer, and pass on all that comes after it, both ways; raise Refused."""
        session = self.session
        session.status, session.outcome = status, ENDED
        self.progress, self.keep = self.BEGUN, False  # so refuse() writes nothing
        self.worker.proceed(session)
        tunnel(self.worker, session, server, answer)

    def forward(self, head: RequestHead, target: Target) -> None:
        """Send a request on to its server, and the answer back; raise Refused."""
        session, http = self.session, self.http
        # RFC 9110 section 9.2.2: only an idempotent request may be sent again.  So send
        # no other to a server that has waited long: it may be closing just now.
        repeatable = not self.length and head.method in self.IDEMPOTENT
        stale = not repeatable and time.monotonic() - http.answered_at > CROSSING_TIME
        # The rules have let this client dial these, and look at nothing else.
        asked = session.user, target.host, target.port
        kept = http.server if asked == http.server_for and not stale else None
        # If it can be read, it has ended, or has bytes unasked: RFC 9112 section 6.3.
        if kept and readable([kept.fd]):
            kept = None
        if kept:
            session.address, session.source = http.server_ends
        self.worker.begin(session)
        if kept:
            try:
                return self.carry(kept)
            except Refused as refusal:
                # Send it again if the server closed and had answered nothing.
                answered = self.progress or self.client.sent or kept.received
                lost = refusal.outcome.error == SERVER_GONE.error and not answered
                if not lost or not repeatable:
                    raise
        server = http.dial(session, target.host, target.port)
        self.worker.proceed(session)
        self.carry(server)

    def carry(self, server: Stream) -> None:
        """Carry a request to its server and the answer back; raise Refused."""
        keeps = False
        try:
            carry = self.carry_both if self.length else self.carry_answer
            carry(server, self.request_head(server))
            # RFC 9112 section 6.3: what comes unasked belongs to no request.
            keeps = self.server_keeps and not server.received
            self.http.answered_at = time.monotonic()
        except Refused as refusal:
            if server.parent:  # it is to blame for what it did to the connection
                raise server.parent.blamed(refusal) from None
            raise
        finally:
            self.session.up += server.counted()
            if not keeps:
                self.http.close()

    def carry_answer(self, server: Stream, request: bytes) -> None:
        """The plain way: send a head, and pass on the answer; raise Refused."""
        watch, client = self.watch, self.client
        watch.send(server, request)
        self.worker.slot.moved(server.sent, 0)  # for the table, while we wait
        late = Refused(ANSWER_TIMEOUT, "the server did not answer")
        response = watch.run(self.read_response(server), late, beside=client)
        if response.status == 101:
            return self.switch(server, response)
        head, size = self.decide_answer(response)
        if 0 <= size <= len(server.received):  # the answer has come whole
            watch.send(client, head + server.take(size))
            self.progress = self.WHOLE
            return
        up, down = Direction(client, server), Direction(server, client)
        down.steps = self.send_answer(down, response, head, size)
        self.join(up, down)  # up has nothing to send, and is done at once

    def carry_both(self, server: Stream, request: bytes) -> None:
        """Carry a request's body, and its answer, at the same time; raise Refused."""
        server.tune()
        up, down = Direction(self.client, server), Direction(server, self.client)
        up.out += request  # it leaves with what has come of the body
        up.steps = move_body(up, self.head, self.length or 0)
        down.steps = self.reply(up, down, request)
        self.join(up, down)
        if self.switching:
            self.switch(server, self.switching)
        if up.state != up.DONE:  # no request can follow a part of this one
            self.server_keeps = False
            self.keep = self.keep and bool(self.http.expecting)  # but after a 417

    def join(self, up: Direction, down: Direction) -> None:
        """Carry both ways what there is to carry; raise Refused."""
        self.worker.stand_in_line(False)
        try:
            relay(self.watch, self.worker.slot, up, down, self.config.idle_timeout)
        except Refused as refusal:
            if refusal.outcome is not IDLE or self.progress >= self.BEGUN:
                raise
            if up.state == up.RUNNING and up.waits_for[0] == self.client.fd:
                raise Refused(BODY_TIMEOUT, "the request body did not end") from None
            raise Refused(ANSWER_TIMEOUT, "the server did not answer") from None

    def request_head(self, server: Stream) -> bytes:
        """Return the head of the request as it travels on."""
        head, authority = self.head, self.target.authority
        extra = self.via_line(head) + framing_lines(self.length)
        if hops := head.fields.get(b"max-forwards"):
            extra += b"Max-Forwards: %b\r\n" % hops
        if self.target.login and not head.value(b"authorization"):  # the URL had it
            extra += b"Authorization: Basic %b\r\n" % credentials(self.target.login)
        if self.length and head.expected:
            extra += b"Expect: 100-continue\r\n"
        if head.upgrade:
            extra += UPGRADE_LINES % head.upgrade
        elif not self.length and not self.keep:
            # There will be no other request, and the side that closes first keeps its
            # port in TIME_WAIT for a minute: let that be the server.
            extra += b"Connection: close\r\n"
        method, target = head.method, self.target.path
        if server.parent:
            target, login = server.parent.request_target(method, target, authority)
            extra += login
        line = b"%b %b HTTP/1.1\r\nHost: %b\r\n" % (method, target, authority)
        return b"%b%b%b\r\n" % (line, head.forwarded, extra)

    def reply(self, up: Direction, down: Direction, request: bytes) -> Steps:
        """Read and send the answer while the request's body is still on its way up."""
        response = yield from self.read_response(up.sink)
        if response.status == 101:
            self.switching = response  # once the body has been sent
            return
        up.may_fail = True
        # RFC 9110 section 10.1.1: a client that was not told to go on may never send
        # its body; unless it has begun to.
        begun = up.sink.sent + len(up.out) > len(request)
        if self.head.expected and not self.continued and not begun:
            up.state = up.CANCELED
            if response.status == 417 and not self.client.received:
                # The client may ask the same again, without Expect.
                self.http.expecting = self.head.method, self.head.target
        cut = up.state == up.CANCELED and not self.http.expecting
        self.keep = self.head.keep_alive and not cut
        head, size = self.decide_answer(response, up.state == up.RUNNING)
        yield from self.send_answer(down, response, head, size)
        # A server that answers and closes will not read the rest of the request.
        # And if only the close ends the answer, the client must see it now.
        if up.state == up.RUNNING and not self.server_keeps:
            up.state = up.CANCELED

    def send_answer(
        self, down: Direction, response: ResponseHead, head: bytes, size: int
    ) -> Steps:
        """Send the head of an answer, and the body of a known size; raise Refused."""
        before = self.client.sent
        self.worker.slot.publish(self.session)
        down.out += head
        try:
            yield from move_body(down, response, size, self.head.minor == 1)
        except Refused:
            if self.client.sent == before:
                self.progress = self.NOTHING  # it can still become another answer
            raise
        self.progress = self.WHOLE

    def read_response(self, server: Stream) -> Steps:
        """Pass interim responses on; return the head of the next; raise Refused."""
        bad, inspect = BAD_RESPONSE, lambda: check_response_begun(server.received)
        for _ in range(INTERIM_LIMIT):
            raw = yield from server.until(HEAD_END, HEAD_LIMIT, bad, inspect)
            response = ResponseHead(raw)
            response.forwarded += self.via_line(response)
            if response.status >= 200 or response.status == 101:
                return response
            self.continued |= response.status == 100
            if self.head.minor == 1:  # RFC 9110 section 15.2: not to an HTTP/1.0 client
                self.progress = self.BEGUN
                lines = response.line + response.forwarded + CRLF
                yield from self.client.send_all(bytearray(lines))
                self.progress = self.NOTHING
        raise Refused(bad, f"{INTERIM_LIMIT} interim responses and no other")

    def decide_answer(
        self, response: ResponseHead, goes_on: bool = False
    ) -> tuple[bytes, int]:
        """Decide how the answer ends, and which of the two connections goes on.

        Returns its head, and the size of what follows: CHUNKED, or ALL that comes until
        the close.  While the request still goes on, a server that closes ends both
        connections.  Raises Refused.
        """
        parent = self.http.server and self.http.server.parent
        if response.status == 407 and parent:  # it is us that the parent does not know
            unknown = BAD_RESPONSE._replace(word="407", advice=ASK_OPERATOR)
            raise Refused(unknown, "it wants a user")
        told = None if response.status == 204 else response.length()
        # A length beside chunked does not count; a server with both is not asked again.
        doubtful = told == CHUNKED and b"content-length" in response.fields
        size = ALL if told is None else told
        if self.head_only or response.status in (204, 304):
            # RFC 9112 section 6.3: no body follows, whatever length the head tells.
            size, told = 0, (None if told == CHUNKED else told)
        self.server_keeps = response.keep_alive and size != ALL and not doubtful
        self.progress = self.BEGUN
        if self.watch.retired or goes_on and not self.server_keeps:
            self.keep = False
        if size == ALL or size == CHUNKED and self.head.minor == 0:
            self.progress, self.keep, told = self.BEGUN_UNTIL_CLOSE, False, None
        self.session.status = str(response.status)
        return answer_head(response.line, response.forwarded, told, self.keep), size

    def via_line(self, head: RequestHead | ResponseHead) -> bytes:
        """Return the Via line of a message, with ours: RFC 9110 section 7.6.3."""
        ours = b"1.%d %b" % (head.minor, self.config.name.encode())
        earlier = head.fields.get(b"via")
        return b"Via: %b\r\n" % (b"%b, %b" % (earlier, ours) if earlier else ours)

    def switch(self, server: Stream, response: ResponseHead) -> None:
        """Make it a tunnel, if the server took what was offered; raise Refused."""
        taken = set(members(response.upgrade))
        if not taken or not taken.issubset(members(self.head.upgrade)):
            raise Refused(UPGRADE_FAILED, "the server changed to what was not offered")
        self.session.proto = "upgrade"
        self.join_as_tunnel(server, "101", response.line + response.forwarded + CRLF)

    # Answers of our own.

    def answer(self, status: str, lines: bytes, body: bytes) -> None:
        """Send an answer of the gateway itself; raise Refused if it cannot be whole."""
        self.session.status = status[:3]
        keep = self.keep and not readable([self.worker.lifeline])
        lines = date_line(int(time.time())) + lines
        head = answer_head(f"HTTP/1.1 {status}\r\n".encode(), lines, len(body), keep)
        self.progress, self.keep = self.BEGUN_UNTIL_CLOSE, False  # a part is reset
        self.watch.send(self.client, head if self.head_only else head + body)
        self.progress, self.keep = self.WHOLE, keep

    def refuse(self, refusal: Refused) -> Outcome:
        """Tell the client why not, or cut its answer short; return the outcome."""
        outcome, session = refusal.outcome, self.session
        if session.method != "-" and session.target == "-":
            # A target that was not understood may have a password anywhere.
            bare = BEFORE_AT_OR_QUERY.sub(b"", self.head.target)
            session.target = printable(bare, TARGET_SIZE)
        # Perhaps it is the body that follows a 417, sent too late.
        stray = session.method == "-" and self.http.expecting
        if self.progress != self.NOTHING or not outcome.error or stray:
            self.keep = False
            # Half an answer must not look whole: RFC 9112 section 8.
            if self.progress == self.BEGUN_UNTIL_CLOSE:
                if outcome.error == SERVER_GONE.error:  # or a parent's fault
                    deliver(self.watch, self.client)
                self.client.abort()
            return outcome
        # After these, and before the end of a body, we cannot find the next request.
        if outcome.status in (400, 408, 414, 417, 431, 501, 505) or self.length:
            self.keep = False
        with contextlib.suppress(Refused):  # the client may have gone
            page = self.explain(outcome, refusal.detail)
            self.answer(outcome.status_text(), *page)
        return outcome

    def lingers(self) -> bool:
        """Return whether the client may say more after a whole answer, before a close.

        A client that said close, and sent nothing after that, left no byte unread: our
        close is then not a reset.
        """
        if self.keep or self.progress in (self.BEGUN, self.BEGUN_UNTIL_CLOSE):
            return False
        more = self.session.method == "-" or self.head.keep_alive or self.length
        return bool(more or self.client.received or readable([self.client.fd]))

    def explain(self, outcome: Outcome, detail: str) -> tuple[bytes, bytes]:
        """Return field lines and text that say what was refused, and why."""
        name, session = self.config.name, self.session
        why = "".join(c if " " <= c <= "~" else "?" for c in detail) or outcome.word
        known = session.method != "-"
        asked = f"{session.method} {session.target}" if known else "this request"
        # RFC 9209 section 2: a token where it is one, else a string.
        own = name if name[:1].isalpha() else f'"{name}"'
        details = why.replace("\\", "/").replace('"', "'")
        lines = (
            f'Proxy-Status: {own}; error={outcome.error}; details="{details}"\r\n'
            "Content-Type: text/plain; charset=utf-8\r\nCache-Control: no-store\r\n"
            "X-Content-Type-Options: nosniff\r\n"
        )
        server = self.target.authority.decode() if outcome is NO_LOGIN else ""
        realm = f"ftp://{server}" if server else name
        basic = f'Basic realm="{realm}", charset="UTF-8"'
        more = {
            401: f"WWW-Authenticate: {basic}\r\n",
            405: "Allow: GET, HEAD\r\n",
            407: f"Proxy-Authenticate: {basic}\r\n",
            503: "Retry-After: 5\r\n",
        }
        lines += more.get(outcome.status, "")
        did = "refused" if outcome.error == DENIED.error else "could not serve"
        page = (
            f"{outcome.status_text()}\n\n{name} (NATWork) {did} {asked}\n\n"
            f"Why: {why}.\nWhat to do: {outcome.advice}\n"
        )
        return lines.encode(), page.encode()


# --- Serving a client ---------------------------------------------------------
#
# The table of what chapters may take over; and what a worker does with the client
# that has just come: serve_client() tells it from accept() to the line in the log.


class Chapters:
    """What the chapters beside this file do; None where a chapter is not there."""

    def __init__(self, config: Config, board: Scoreboard) -> None:
        self.config, self.policy, self.board = config, Policy(config), board
        board.uplinks += [x for x in self.policy.uplinks if x not in board.uplinks]
        # socks() serves a client whose first byte is 4 or 5; redirect() one that the
        # kernel redirected to us, and returns whether the client is such a one.
        self.socks: Callable[[Worker], None] | None = None
        self.redirect: Callable[[Worker], bool] | None = None
        # These answer a request, by its URL's scheme; OWN_PAGE is origin-form.
        self.schemes: dict[bytes, Callable[[Exchange], None]] = {}
        self.users: Any = None  # has identify() and check_share()
        self.parents: Any = None  # has dial()
        self.pid_file: Any = None  # holds it, and yields its descriptor
        self.checks: Any = None  # has hinted() and warn()
        # This is a process beside the workers, and may fork.
        self.mapper: Callable[[Generation], None] | None = None


def chapter_file(name: str) -> str:
    """Return where a chapter lies, if it is there: beside this file."""
    folder = os.path.dirname(os.path.realpath(__file__))
    return os.path.join(folder, f"natwork_{name}.py")


def load_chapter(name: str, option: str = "") -> Any:
    """Return a chapter; None, or for an option ConfigError, if it is not there."""
    path = chapter_file(name)
    if not os.path.lexists(path):
        if option:
            raise ConfigError(f"{option} needs {path}, which is not there")
        return None
    # A script is "__main__": without this, the chapters would import a second copy.
    sys.modules["natwork"] = sys.modules[__name__]
    sys.path.insert(0, os.path.dirname(path))
    try:
        module = importlib.import_module(f"natwork_{name}")
    except Exception as error:  # a chapter may raise anything
        why = " ".join(f"{type(error).__name__}: {error}".split())
        text = f"{path}: it is no chapter of natwork {__version__}: {why}"
        raise ConfigError(text) from None
    finally:
        del sys.path[0]
    version = getattr(module, "VERSION", "unknown")
    if version != __version__:
        raise ConfigError(f"{path}: its version is {version}, not {__version__}")
    return module


def admit(worker: Worker, client: Client) -> bool:
    """Return whether a client may be here; one that may not gets no byte."""
    try:
        inside = worker.policy.is_client(client.address, client.stream.sock)
        outcome = OK if inside else OUTSIDER
    except OSError as error:
        outcome = outcome_of(error)
        worker.board.say(f"cannot tell where a client comes from: {reason(error)}")
    if outcome is not OK:
        session = Session(client.endpoint, worker.pid_text)
        worker.generation.log.write(session, outcome.word, worker.slot)
    return outcome is OK


def serve_client(worker: Worker) -> bool:
    """Serve one client, from accept() to its lines in the log, if it says a word.

    Returns False when there is none, because it is time to leave.
    """
    client, chapters = worker.accept(), worker.chapters
    if not client:
        return False
    with contextlib.closing(client):
        if not admit(worker, client):
            return True
        if chapters.redirect and chapters.redirect(worker):
            return True
        if not worker.await_bytes(worker.config.head_timeout, new=True):
            return True
        if client.stream.received[0] in (4, 5) and chapters.socks:
            chapters.socks(worker)
            return True
        with contextlib.closing(HttpConnection(worker)) as http:
            asks = True
            while asks:
                # serve() reads a request, finds its target, asks who sends it, has the
                # rules judge that, dials it and carries the answer.  refuse() tells the
                # client what stopped it on this way.  record() writes the line.
                exchange = Exchange(http)
                worker.record(exchange.session, exchange.serve, exchange.refuse)
                asks = exchange.keep and http.await_request()
            if exchange.lingers():
                with worker.yielding():
                    linger(worker.watch, client.stream)
    return True


# --- Service ------------------------------------------------------------------
#
# From the command line to the master's loop: listeners (our own, or those that
# systemd holds for us), the log, and then no more privileges.


def parse_endpoint(text: str) -> tuple[str, int]:
    """Return host ("*" for all addresses) and port of HOST:PORT; raise ValueError."""
    if not (match := re.fullmatch(r"(\[[^]]*:[^]]*\]|[^:[]+):([0-9]+)", text)):
        raise ValueError(f"{text!r} is not ADDRESS:PORT, an IPv6 address in brackets")
    if len(match[2]) > 5 or int(match[2]) > 65535:
        raise ValueError(f"{text!r} has no port from 0 to 65535")
    host, port = match[1].strip("[]"), int(match[2])
    if host != "*":
        host = unpack(embedded_addresses(pack(host))[0])  # in one form, to be compared
    return host, port


def passed_listeners() -> dict[str, socket.socket]:
    """Return the sockets that systemd passed, sd_listen_fds(3); {} if none."""
    if os.environ.get("LISTEN_PID") != str(os.getpid()):
        return {}
    given, listeners = os.environ.get("LISTEN_FDS", "0"), {}
    if not re.fullmatch("[0-9]{1,3}", given):
        raise OSError(f"cannot take LISTEN_FDS={given}: it is not a number of sockets")
    for fd in range(3, 3 + int(given)):
        listens = False
        with contextlib.suppress(OSError):  # it is not open, or no socket
            sock = listeners[f"systemd {fd}"] = socket.socket(fileno=fd)
            listens = bool(sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))
        if not listens or sock.family not in (INET, INET6) or sock.type != STREAM:
            what = f"descriptor {fd} of LISTEN_FDS={given}"
            raise OSError(f"cannot take {what}: it is no TCP socket that listens")
    return listeners


def open_listeners(
    config: Config, held: dict[str, socket.socket], undo: contextlib.ExitStack
) -> dict[str, socket.socket]:
    """Return the listeners that systemd passed, or one for each address of `listen`.

    Those held go on; undo will close what is opened here.  Raises OSError.
    """
    open_one = functools.partial(socket.create_server, backlog=LISTEN_BACKLOG)
    listeners = {name: s for name, s in held.items() if name.startswith("systemd ")}
    # By address too: a removed listener that still has a queue may be wanted again.
    kept = {endpoint(s.getsockname()): s for s in held.values()} | held
    for host, port in [] if listeners else config.parsed("listen", parse_endpoint):
        for here in ("0.0.0.0", "::") if host == "*" else (host,):
            name, family = endpoint((here, port)), INET6 if ":" in here else INET
            try:
                sock = kept.get(name) or undo.enter_context(
                    open_one((here, port), family=family)
                )
            except OSError as error:
                if host == "*" and here == "::" and error.errno != errno.EADDRINUSE:
                    continue  # a box without IPv6
                raise OSError(f"cannot listen on {name}: {reason(error)}") from None
            listeners[name] = sock
            port = sock.getsockname()[1]  # what the kernel picked for 0 is for both
    for sock in listeners.values():
        sock.setblocking(False)
        # Linux hands these down to every socket that is accepted.
        reset_on_close(sock)  # so half an answer never looks whole: Client.close()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listeners


def find_user(config: Config) -> tuple[int, int] | None:
    """Return user and group to become, None if we are not root.

    A user that the settings name must exist in any case: a restart would need it.
    """
    import pwd

    leaves_root = os.geteuid() == 0 and config.user != "root"
    if leaves_root or "user" in config.where:
        try:
            entry = pwd.getpwnam(config.user)
            return (entry.pw_uid, entry.pw_gid) if leaves_root else None
        except KeyError:
            config.refuse("user", "there is no such user")
    return None


def examine(config: Config, board: Scoreboard) -> Chapters:
    """Return the policy of a configuration, and what the chapters do under it.

    What passes here can be put in force.  Raises ConfigError, with all that is wrong.
    """
    chapters, listens = Chapters(config, board), config.parsed("listen", parse_endpoint)
    find_user(config)
    for name, settings in CHAPTERS.items():
        # A value that is the default asks for nothing.
        asked = [s for s in settings if getattr(config, s) != DEFAULTS[s]]
        # Loaded at the start, and not later, when it may be of another version.
        if module := sys.modules.get(f"natwork_{name}"):
            module.join(chapters)
        elif asked:
            config.refuse(asked[0], f"needs {chapter_file(name)}, which is not there")
    if chapters.checks:
        chapters.checks.examine_listeners(config, listens)
    if config.errors:
        hinted = chapters.checks.hinted if chapters.checks else str
        raise ConfigError("\n".join(map(hinted, dict.fromkeys(config.errors))))
    return chapters


def open_generation(chapters: Chapters, old: Generation | None = None) -> Generation:
    """Return a configuration that is in force from now on, ready to serve.

    It goes on with the listeners of the old one, the first with those that systemd
    passed.  Raises OSError; then nothing has changed.
    """
    config, held = chapters.config, old.listeners if old else passed_listeners()
    with contextlib.ExitStack() as undo:
        listeners = open_listeners(config, held, undo)
        log = AccessLog(config)
        undo.callback(os.close, log.fd)
        lifeline = os.pipe2(PIPE_FLAGS)
        undo.pop_all()
    if not old:
        found = " ".join(name for name in CHAPTERS if f"natwork_{name}" in sys.modules)
        say(f"chapters: {found or 'none'}; settings: {config.file or 'the defaults'}")
    for sock in listeners.values():
        chapters.policy.listens_at(*sock.getsockname()[:2])
        if not old or sock not in held.values():
            say(f"listening on {endpoint(sock.getsockname())}")
    with contextlib.suppress(OSError):
        if chapters.checks:
            chapters.checks.warn(chapters, held, old)
    return Generation(config, listeners, log, chapters, *lifeline)


def serve_nobody(generation: Generation) -> None:
    """Serve a client of our own, whose tunnel leads back to us, and times out at once.

    What the interpreter writes down when code runs for the first time is then shared
    by all workers: half a megabyte of each.  Raises OSError.
    """
    # With spare_workers=0 it lacks none, so it does not wake the master for more.
    config = Config(rules="allow to 127.0.0.1", tunnel_timeout=0.001, spare_workers=0)
    config.log = os.devnull
    board, log, lifeline = Scoreboard(), AccessLog(config), generation[-2:]
    chapters = Chapters(config, board)
    with contextlib.ExitStack() as stack:
        for _ in range(8):  # raise OSError where accept_from() would wait for one
            stack.callback(os.close, os.dup(lifeline[0]))
        stack.pop_all().close()
        stack.callback(os.close, board.fd)
        stack.callback(os.close, log.fd)
        listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        client = stack.enter_context(socket.socket())
        client.settimeout(1)  # a firewall may drop it
        client.connect(listener.getsockname())
        port = listener.getsockname()[1]
        client.sendall(b"CONNECT 127.0.0.1:%d HTTP/1.1\r\nHost:\r\n\r\n" % port)
        own = Generation(config, {"": listener}, log, chapters, *lifeline)
        serve_client(Worker(own, Slot(board, 0)))


def warm(generation: Generation) -> None:
    """Do once, before the forks, what each worker would do for the first time.

    The first name that is resolved loads the resolver, a megabyte.  And what lives
    now is kept from the garbage collector, which would write to pages that all share.
    """
    with contextlib.suppress(OSError):
        socket.getaddrinfo(b"localhost", 80, type=STREAM)
    with contextlib.suppress(OSError):  # a box without a loopback device
        serve_nobody(generation)
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000)


def drop_root(user: tuple[int, int], config: Config, log: AccessLog) -> None:
    """Become a user, by uid and gid, that can open the log again at a reload."""
    status = os.fstat(log.fd)
    is_new = stat.S_ISREG(status.st_mode) and not status.st_size
    try:
        if log.path != "-" and is_new and status.st_nlink == 1:
            os.fchown(log.fd, *user)
        os.setgroups([])
        os.setgid(user[1])
        os.setuid(user[0])
    except OSError as error:  # a container may have taken the capabilities
        raise OSError(f"cannot become {config.user}: {reason(error)}") from None
    needed = ("users", os.R_OK), ("file", os.R_OK), ("log", os.W_OK)
    for path, how in ((getattr(config, name), how) for name, how in needed):
        if path not in ("", "-") and not os.access(path, how):
            who = f"{config.user} cannot {'read' if how == os.R_OK else 'open'} {path}"
            say(f"{who}, so no reload will work: see to its owner and group")


def run(config: Config, ready: Callable[[], None]) -> int:
    """Run the gateway until it is told to stop; return the exit code.

    Calls ready() when clients are served; raises ConfigError or OSError before that.
    """
    board, fds = Scoreboard(), []
    chapters, user = examine(config, board), find_user(config)

    def load_next(old: Generation) -> Generation:
        # The file of the start, by its name: if it has gone, that is an error.
        fresh = load_config(old.config.file, old.config.options)
        return open_generation(examine(fresh, board), old)

    # A signal may come as soon as we say "listening on": it waits for the master.
    signal.pthread_sigmask(signal.SIG_BLOCK, Master.SIGNALS)
    # Workers ignore these: Ctrl-C must drain, and not cut.  The master still takes INT
    # and HUP, which are blocked.  USR1 and USR2 tell other programs to open their log.
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    try:
        route_to(pack("127.0.0.1"))  # or we could not tell this box from others
    except OSError as error:
        raise OSError(f"cannot ask the kernel for a route: {reason(error)}") from None
    with contextlib.ExitStack() as undo:
        if chapters.pid_file:
            fds.append(undo.enter_context(chapters.pid_file(config.pidfile, user)))
        first = open_generation(chapters)
        master = Master(board, first, load_next, serve_client, fds)
        for fd in fds:
            os.write(fd, b"%d\n" % os.getpid())
        if not find_set_title():
            missing = "setproctitle is not installed (apt install python3-setproctitle)"
            say(f"{missing}: process titles will be missing")
        if user:
            drop_root(user, config, first.log)
        if os.sched_getscheduler(0) == os.SCHED_OTHER:  # else somebody has chosen
            # SCHED_BATCH: a process that wakes does not preempt the one that runs.
            with contextlib.suppress(OSError):  # a sandbox may forbid it
                os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
        warm(first)
        ready()
        notify("READY=1")
        master.run()
    return 0


def guard(work: Callable[[], int]) -> int:
    """Return the exit code of some work: its own, 1 or 78, said in one line."""
    try:
        try:
            return work()
        finally:  # even when argparse has printed, and raises SystemExit
            if sys.stdout:  # None if it was closed
                sys.stdout.flush()
    except ConfigError as error:
        for line in str(error).splitlines():
            say(line)
        return 78
    except OSError as error:
        nobody_reads = isinstance(error, BrokenPipeError)  # as by "| head"
        if not nobody_reads:  # an OSError that we made has a text and no errno
            say(f"cannot go on: {reason(error)}" if error.errno else reason(error))
        with contextlib.suppress(OSError), open(os.devnull, "w") as null:
            os.dup2(null.fileno(), 1)  # what nobody takes is not tried again
        return 0 if nobody_reads else 1
    except KeyboardInterrupt:
        return 1


# --- main ---------------------------------------------------------------------


def boards() -> dict[int, Scoreboard]:
    """Return the scoreboards of this box's gateways that we may look at, by master.

    Another network namespace is another box.
    """
    import glob

    found, here = {}, os.readlink("/proc/self/ns/net")
    for link in glob.iglob("/proc/[0-9]*/fd/*"):
        pid = int(link.split("/")[2])
        # Any process may give its memory our name: what does not fit is not ours.
        with contextlib.suppress(OSError, ValueError):
            if not os.readlink(link).startswith("/memfd:natwork "):
                continue
            with open(os.open(link, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:
                board = Scoreboard(file.fileno())
            is_here = os.readlink(f"/proc/{pid}/ns/net") == here
            if is_here and board.words[board.MASTER] == pid:
                found[pid] = board
    return found


def stat_of(pid: int) -> list[bytes]:
    """Return state, parent, group, session and more of a process, [] if it is gone."""
    with contextlib.suppress(OSError), open(f"/proc/{pid}/stat", "rb") as file:
        return file.read().rpartition(b")")[2].split()
    return []


def print_table(in_json: bool) -> int:
    """Print the state table of the gateway that runs on this box."""
    found, rows = boards(), []
    if not found:
        why = "no gateway that you may look at runs on this box"
        raise OSError(f"cannot show the table: {why}")
    for master, board in sorted(found.items()):
        # Any user may have made that board, and an operator may kill what it shows: so
        # show only processes of one session with the master, setsid(2).
        ours = stat_of(master)[3:4]
        rows += [row for row in table_rows(board) if stat_of(row["pid"])[3:4] == ours]
    if in_json:
        import json

        print(json.dumps(rows, indent=1))
        return 0
    values = [["-" if x is None else str(x) for x in row.values()] for row in rows]
    widths = [max(map(len, column)) for column in zip(COLUMNS, *values)]
    for line in (COLUMNS, *values):
        text = "  ".join(c.ljust(w) for c, w in zip(line, widths)).rstrip()
        print(re.sub("[^ -~]", "?", text))
    return 0


def print_settings(config: Config, mark: str = "") -> None:
    """Print every setting in the form of natwork.conf, with a mark before each."""
    print("[natwork]")
    for name in DEFAULTS:
        text = config.spelled(name)
        if name in ("rules", "parents"):  # a line of ";..." would be a comment
            hide = masked if name == "parents" else str  # a rule has no password
            text = "".join(f"\n    {hide(line)}" for line in config.parts(name))
        print(f"{mark}{name} = {text}".rstrip(), flush=True)


def check(config: Config) -> int:
    """Print every setting, if a start would not fail by one; raise ConfigError."""
    checks: Any = sys.modules.get("natwork_check")
    if checks:
        checks.examine_files(config)
    chapters = examine(config, Scoreboard())
    if checks:
        checks.warn_of_test(chapters)
    print_settings(config)
    say(f"ok: {config.file or 'the defaults'}")
    return 0


def command(arguments: list[str]) -> int:
    """Do what the command line says; return the exit code."""
    import argparse

    parser = argparse.ArgumentParser(
        prog="natwork",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description=(__doc__ or "").partition("\n")[0],
        epilog="It listens on port 8080 unless told otherwise, as by:\n  "
        "natwork.py -o listen=10.0.0.1:3128 -o log=/var/log/natwork/access.log",
    )
    add = parser.add_argument
    places = "./natwork.conf, else /etc/natwork/natwork.conf"
    add("-c", "--config", metavar="FILE", help=f"settings (default: {places})")
    add("-o", "--option", metavar="NAME=VALUE", action="append", help="a setting")
    add("-d", "--daemon", action="store_true", help="detach from the terminal")
    add("-t", "--test", action="store_true", help="check and print the settings")
    add("--settings", action="store_true", help="print natwork.conf, all explained")
    add("--table", action="store_true", help="print the sessions of this box")
    add("--json", action="store_true", help="with --table: as JSON")
    add("--explain", nargs="+", metavar="WORD", help="rule for CLIENT TARGET [USER]")
    add("--passwd", metavar="USER", help="print a line for the file of users")
    add("--version", action="version", version=f"natwork {__version__}")
    given = parser.parse_args(arguments)
    if given.json and not given.table:
        parser.error("--json goes with --table")
    if given.explain and len(given.explain) not in (2, 3):
        parser.error("--explain takes CLIENT TARGET [USER]")
    if given.table:
        return print_table(given.json)
    if given.passwd is not None:
        return int(load_chapter("users", "--passwd").passwd(given.passwd))
    if given.settings:
        if checks := load_chapter("check"):
            print(checks.SETTINGS, end="")
        else:
            print_settings(Config(), "#")
        return 0
    for name in CHAPTERS:
        load_chapter(name)
    config = load_config(given.config or "", given.option or [])
    if given.explain:
        explain = load_chapter("check", "--explain").explain
        return int(explain(config, given.explain))
    if given.test:
        return check(config)
    if given.daemon:
        return int(load_chapter("daemon", "-d").run_daemon(config))
    return run(config, lambda: None)


def main() -> int:
    """Run the command line; return the exit code: 0, 1, 2 or 78 (EX_CONFIG)."""
    # If one of 0, 1 and 2 is closed, the next file opened takes its number, and what
    # is meant for the operator would be written there.
    while (fd := os.open(os.devnull, os.O_RDWR)) < 3:
        pass
    os.close(fd)
    # Silence from a name server must not outlast the client's patience.
    os.environ.setdefault("RES_OPTIONS", "timeout:2 attempts:2")
    # Python 3.12 counts threads where it finds none: a blank in a title misleads it.
    warnings.filterwarnings("ignore", "This process .*is multi-threaded")
    for fd in (1, 2):  # both may be one file, which may be cut and begin anew
        with contextlib.suppress(OSError):
            fcntl.fcntl(fd, fcntl.F_SETFL, fcntl.fcntl(fd, fcntl.F_GETFL) | os.O_APPEND)
    return guard(lambda: command(sys.argv[1:]))


if __name__ == "__main__":
    sys.exit(main())
