#!/usr/bin/env python3
"""NATWork: carry TCP streams between the two networks of one Linux box.

A client on the inside asks, mostly by HTTP, for a host on the outside.
NATWork connects to it from the outside address and joins the two sockets:

    client ----> inside  [ natwork.py ]  outside ----> server
             10.0.0.1:8080            192.0.2.10

No packet is rewritten and no packet is forwarded: these are two ordinary
connections, and the kernel already knows which process owns which of them.
Each client has a process to itself, forked before the client came, so the
process table is the table that a NAT router would have to keep:

    natwork: master 8 idle 1 busy
     |- natwork: idle                                       (eight of these)
     `- natwork: 10.0.0.7:3456 > 192.0.2.10:5678 > 63.1.1.54:80 http a.example

When the talking is done the kernel moves the bytes, by splice(2), and none
of them enters Python.  When the client leaves, the row in the table leaves.

Usage:

    natwork.py [-c FILE] [-o NAME=VALUE]... [-d]     run the gateway
    natwork.py -t                                    check the configuration
    natwork.py --table [--json]                      the sessions of this box (root)
    natwork.py --explain CLIENT TARGET [USER]        which rule decides, and why
    natwork.py --passwd USER                         a line for the file of users

Settings are in natwork.conf, each explained and commented out at its default.

Signals to the master: TERM and INT stop accepting and let busy workers finish
(a second one ends them now); HUP reads the configuration again and reopens the
access log.  TERM to a worker ends that one session.  Exit codes: 0 asked to
stop, 1 unexpected, 2 bad command line, 78 bad configuration.

This file is complete by itself.  A chapter that lies beside it is found at the
start, and one line says which are there:

    natwork_socks.py       SOCKS 4, 4a and 5
    natwork_redirect.py    clients whose packets the kernel sends to our port
    natwork_gateways.py    ftp:// and gopher:// URLs
    natwork_pages.py       the live table, /metrics and /proxy.pac
    natwork_users.py       names and passwords, --passwd, max_per_client
    natwork_parents.py     other proxies to go through
    natwork_explain.py     --explain
    natwork_daemon.py      -d, and the pid file

Reading order.  Every section uses only the ones above it.  To understand a
connection, read downwards; to understand the daemon, start at main() and read
upwards.  The two sections to come for are Relay and Master and workers.

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
from collections.abc import Callable
from collections.abc import Generator
from collections.abc import Iterable
from collections.abc import Iterator
from importlib.machinery import PathFinder
from importlib.util import module_from_spec
from importlib.util import spec_from_file_location
from types import ModuleType
from typing import Any
from typing import NamedTuple
from typing import NoReturn

if sys.version_info < (3, 10):  # noqa: UP036
    sys.exit("natwork: needs Python 3.10 or later")


def load_set_title() -> Callable[[str], None] | None:
    """Return setproctitle's function; None on the bare box, which has no titles.

    Its C part alone: the package around that loads logging and threading, and
    what these do after each fork would cost every worker a quarter megabyte.
    """
    package = PathFinder.find_spec("setproctitle")
    places = package and package.submodule_search_locations
    spec = PathFinder.find_spec("_setproctitle", places) if places else None
    if not spec or not spec.loader:
        return None
    try:
        module = module_from_spec(spec)
        spec.loader.exec_module(module)
    except ImportError:  # built for another interpreter
        return None
    function: Callable[[str], None] = module.setproctitle
    return function


set_title = load_set_title()

__version__ = "0.1.0"

# --- Limits -------------------------------------------------------------------
#
# The few numbers that are not settings, because nobody who runs a gateway
# should have to think about them.  Sizes are bytes, times are seconds.

HEAD_LIMIT = 64 * 1024  # a request or response head; Squid's limit too
LINE_LIMIT = 16 * 1024  # a request line; RFC 9112 section 3 asks for 8,000
METHOD_LIMIT = 32  # the longest registered method has 16 letters
BLANK_LIMIT = 16  # empty lines before a request line, as octets
CHUNK_LINE_LIMIT = 4096  # a chunk size with its extensions
INTERIM_LIMIT = 64  # 1xx responses to one request
COPY_SIZE = 64 * 1024  # one recv(); a read this full means that more is there
BULK_SIZE = 256 * 1024  # a body known to be this long is spliced from the start
PIPE_SIZE = 256 * 1024  # asked for; 64 KiB is what one gets over the user's budget
OUT_LIMIT = 64 * 1024  # bytes gathered before they are sent
HALF_CLOSED_TIMEOUT = 240.0  # silence that ends a half-closed tunnel (RFC 5382's order)
LINGER_TIMEOUT = 2.0  # for the last bytes of a refused client; nginx waits 5
LINGER_LIMIT = 30.0  # for all that he sends before he reads them, as nginx
PARTING_TIME = 1.0  # for a kept client's last request, once others are in force
RETIRE_TIMEOUT = 5.0  # for the first workers of a new configuration
RACE_DELAY = 0.25  # between connection attempts: RFC 8305 section 8
UPLINK_DELAY = 1.0  # before the next uplink is tried beside a silent one
UPLINK_REST = 30.0  # a failed uplink is tried last for this long
SURPLUS_TIME = 30.0  # an idle worker nobody needed for this long may leave
PIPE_KEEP_TIME = 1.0  # a wait longer than this gives the pipes back
LISTEN_BACKLOG = 4096  # net.core.somaxconn cuts it
TIME_LIMIT = 2_000_000  # poll() counts milliseconds in 32 bits: these are 23 days
SLOTS = 65536  # the scoreboard's size, and so the largest max_workers
INET, INET6, STREAM = socket.AF_INET, socket.AF_INET6, socket.SOCK_STREAM
POLLIN, POLLOUT = select.POLLIN, select.POLLOUT
LINE_BYTES = 4096  # PIPE_BUF: a line no longer than this is written whole

# --- Configuration ------------------------------------------------------------
#
# A setting is a line of natwork.conf and an attribute of Config; its default's
# type says how it is read.  What a setting means beyond that (an address, a
# rule) is parsed in the section that uses it, and refused there by refuse(), so
# that every error names the file, the setting and the value.


def reason(error: OSError) -> str:
    """Return the system's reason in the form our messages end with."""
    text = os.strerror(error.errno) if error.errno else str(error)
    return text[:1].lower() + text[1:]


def say(message: str) -> bool:
    """Tell the operator: one line on standard error, whole even among processes.

    It never waits: where nobody reads, it is lost.  Returns whether it was said.
    """
    poll = select.poll()
    poll.register(2, POLLOUT)
    with contextlib.suppress(OSError):
        if poll.poll(0):
            os.write(2, f"natwork: {message}\n".encode(errors="replace")[:LINE_BYTES])
            return True
    return False


def masked(text: str) -> str:
    """Return text on one line, less what may be the password in a URL."""
    text = re.sub(":(?!//).*@", ":***@", " ".join(text.split()))
    # A URL that ends too early has no @, and what should be a port is none.
    return re.sub(
        r"(//[^/@\s:\[]+:)(?!\*\*\*@|([0-9]+|\*)(?![^/\s]))\S+", r"\1***", text
    )


class ConfigError(Exception):
    """The configuration cannot be used; the text says which part, and why."""


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
    log = "-"
    log_format = "text"
    user = "nobody"
    pidfile = ""

    def __init__(self, **settings: Any) -> None:
        """Take settings by name, parsed; raise ConfigError for one out of range."""
        self.file = ""  # it came from, "" for none
        self.where: dict[str, str] = {}  # setting -> file or option it came from
        # Defaults too: the interpreter finds what the object itself has faster.
        vars(self).update({name: getattr(Config, name) for name in self.names()})
        vars(self).update(settings)
        # A box that has no name yet is "(none)".
        self.name = self.name or re.sub(r"[^A-Za-z0-9_.-]", "", socket.gethostname())
        self.name = self.name or "natwork"

    @staticmethod
    def names() -> list[str]:
        """Return the names of all settings, in natwork.conf's order."""
        return [
            name
            for name, default in vars(Config).items()
            if isinstance(default, (str, int, float)) and not name.startswith("_")
        ]

    def refuse(self, name: str, why: str) -> ConfigError:
        """Return the error that says where a setting stands and why it is no good."""
        where = self.where.get(name, "default")
        value = masked(str(getattr(self, name)))
        return ConfigError(f"{where}: {name} = {value}: {masked(why)}")

    def check(self) -> None:
        """Raise ConfigError for a number out of range or a word out of place."""
        for name in self.names():
            value = getattr(self, name)
            if value == 0 and name == "max_per_client":
                continue
            if type(value) in (int, float) and not 0 < value < 1e9:
                raise self.refuse(name, "must be more than 0")
            if type(value) is float and value > TIME_LIMIT:
                raise self.refuse(name, f"must be at most {TIME_LIMIT} s")
        if self.max_workers > SLOTS:
            raise self.refuse("max_workers", f"must be at most {SLOTS}")
        if "spare_workers" not in self.where:
            self.spare_workers = min(self.spare_workers, self.max_workers)
        if self.spare_workers > self.max_workers:
            raise self.refuse("spare_workers", "must be at most max_workers")
        if not self.log:
            raise self.refuse("log", "must be - or a file")
        if self.log_format not in ("text", "json"):
            raise self.refuse("log_format", "must be text or json")
        # RFC 9110 section 7.6.3: a pseudonym in Via is a token.
        if not re.fullmatch(r"[\w.-]{1,255}", self.name, re.ASCII):
            raise self.refuse("name", "must be letters, digits, dots and dashes")

    def lines(self, name: str) -> list[str]:
        """Return the lines of a setting, which end at a newline or a semicolon."""
        lines = [line.strip() for line in re.split("[\n;]", getattr(self, name))]
        return [line for line in lines if line]

    def text(self) -> str:
        """Return every setting in force, in the form of natwork.conf."""
        lines = ["[natwork]"]
        for name in self.names():
            value = getattr(self, name)
            if isinstance(value, float) and value.is_integer():
                value = int(value)
            if isinstance(value, bool):
                value = "yes" if value else "no"
            if name in ("rules", "parents"):  # a line of ";..." would be a comment
                listed = map(masked, self.lines(name))
                value = "".join(f"\n    {line}" for line in listed)
            elif isinstance(value, str):
                value = " ".join(value.split())
            lines.append(f"{name} = {value}".rstrip())
        return "\n".join(lines)


def parse_setting(name: str, text: str) -> Any:
    """Return the value of one setting; raise ValueError that says what is wrong."""
    if name not in Config.names():
        raise ValueError("there is no such setting")
    if "\0" in text:
        raise ValueError("has a NUL in it")
    kind = type(getattr(Config, name))
    if kind is str:
        return text.strip()
    if kind is bool:
        if text not in ("yes", "no"):
            raise ValueError("is neither yes nor no")
        return text == "yes"
    number = {int: r"[0-9]{1,9}", float: r"[0-9]{1,9}(\.[0-9]{1,9})?"}[kind]
    # int() and float() alone would also take "1_0", " +5" and "nan".
    if not re.fullmatch(number, text, re.ASCII):
        raise ValueError("is not a whole number" if kind is int else "is not a number")
    return kind(text)


def read_file(path: str) -> tuple[bytes, int]:
    """Return what a regular file holds, and its mode; raise OSError.

    Anything else could have us wait, or say something else the next time.
    """
    flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK
    with open(path, "rb", opener=lambda name, _: os.open(name, flags)) as file:
        mode = os.fstat(file.fileno()).st_mode
        if not stat.S_ISREG(mode):
            raise OSError("it is not a regular file")
        return file.read(), mode


def read_settings(path: str) -> dict[str, str]:
    """Return the [natwork] section of an INI file; raise ConfigError."""
    import configparser  # 240 KiB that the workers never need

    parser = configparser.ConfigParser(interpolation=None, default_section="")
    parser.optionxform = str  # type: ignore[assignment,method-assign]
    try:
        # The mark of an editor and its line ends are no matter.
        text = read_file(path)[0].decode("utf-8-sig")
        text = text.replace("\r\n", "\n").replace("\r", "\n")
        parser.read_string(text)
    except (OSError, UnicodeDecodeError) as error:
        why = reason(error) if isinstance(error, OSError) else "is not UTF-8 text"
        raise ConfigError(f"{path}: {why}") from None
    except configparser.Error as error:
        number = getattr(error, "lineno", 0) or vars(error)["errors"][0][0]
        line = text.split("\n")[number - 1].strip()
        why = {
            "DuplicateOptionError": "this setting stands in the file twice",
            "DuplicateSectionError": "this section stands in the file twice",
            "MissingSectionHeaderError": "it stands before the line [natwork]",
        }.get(type(error).__name__, "it is not NAME = VALUE")
        raise ConfigError(f"{path}: line {number}: {masked(line)}: {why}") from None
    for section in parser.sections():
        if section != "natwork":
            raise ConfigError(f"{path}: [{section}]: the only section is [natwork]")
    return dict(parser["natwork"]) if parser.has_section("natwork") else {}


def own_file() -> str:
    """Return "natwork.conf", or "" where there is none."""
    try:
        os.lstat("natwork.conf")
    except FileNotFoundError:
        return ""
    except OSError:  # one that we may not see: to read it says why
        pass
    return "natwork.conf"


def load_config(path: str, options: Iterable[str]) -> Config:
    """Return the settings of a file, overridden by NAME=VALUE options.

    The path "" stands for natwork.conf, or the defaults where there is none.
    Raises ConfigError, which names file or option, setting and value.
    """
    path = path or own_file()
    found = read_settings(path) if path else {}
    given = [(path, name, text) for name, text in found.items()]
    for option in options:
        name, equals, text = option.partition("=")
        if not equals:
            raise ConfigError(f"option -o {masked(option)}: must be NAME=VALUE")
        given.append(("option -o", name.strip(), text.strip()))
    settings, where = {}, {}
    for place, name, text in given:
        try:
            settings[name], where[name] = parse_setting(name, text), place
        except ValueError as error:
            why = f"{masked(f'{name} = {text}')}: {error}"
            raise ConfigError(f"{place}: {why}") from None
    config = Config(**settings)
    config.file, config.where = path, where
    config.check()
    return config


# --- Outcomes -----------------------------------------------------------------
#
# One failure is told in four vocabularies: a word in the access log, a status
# to an HTTP client, the Proxy-Status of RFC 9209 to whoever reads the answer's
# head, and a reply to a SOCKS client.  This table is the only place that knows
# them.

ASK_OPERATOR = "Ask the operator of this gateway if you need it."
TRY_LATER = "Try again in a moment."
MEND_CLIENT = "Mend the program that sent it."
USE_CONNECT = "http://, ftp:// and gopher:// can be asked for, all else by CONNECT."
LOG_IN = "Give the server's user name and password."
SAY_WHO = "Give the name and the password that the operator gave you."
ASK_ANOTHER = "It leads to this gateway itself: ask for the host you mean."
ASK_PROXY = "To reach another host through it, send the whole URL: it is a proxy."
OWN_PAGES = "Its pages are /, /table.json, /metrics, /proxy.pac and /wpad.dat."

STATUSES = (
    "400 Bad Request,401 Unauthorized,403 Forbidden,404 Not Found,"
    "405 Method Not Allowed,407 Proxy Authentication Required,408 Request Timeout,"
    "412 Precondition Failed,414 URI Too Long,417 Expectation Failed,"
    "431 Request Header Fields Too Large,"
    "500 Internal Server Error,501 Not Implemented,502 Bad Gateway,"
    "503 Service Unavailable,504 Gateway Timeout,505 HTTP Version Not Supported"
).split(",")


class Outcome(NamedTuple):
    """How a session ended, and what the client may do about it."""

    word: str  # the access log's
    status: int  # RFC 9110 section 15
    error: str = ""  # RFC 9209 section 2.3; empty: there is nobody left to tell
    advice: str = TRY_LATER  # a sentence for the client's page
    reply: int = 1  # RFC 1928 section 6; 1 is a general failure

    def status_text(self) -> str:
        """Return the status as it stands in a status line, with its phrase."""
        return next(text for text in STATUSES if text.startswith(str(self.status)))


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
NO_LOGIN = Outcome("login-refused", 401, "http_request_error", LOG_IN)
UNCHECKED = Outcome("unchecked", 412, "http_request_error", "Ask without it.")
NOT_STORED = Outcome("not-stored", 403, "http_request_error", "Ask its owner.")
DENIED = Outcome("denied", 403, "http_request_denied", ASK_OPERATOR, 2)
AUTH_REQUIRED = Outcome("auth-required", 407, "http_request_denied", SAY_WHO, 2)
AUTH_FAILED = AUTH_REQUIRED._replace(word="auth-failed")
LOOP = Outcome("loop", 502, "proxy_loop_detected", ASK_ANOTHER, 2)
NO_PAGE = NOT_FOUND._replace(word="no-page", advice=OWN_PAGES)
BAD_METHOD = NO_PAGE._replace(word="bad-method", status=405)
BAD_HOST = DENIED._replace(word="denied-host", advice=ASK_PROXY)

NO_SUCH_HOST = Outcome("no-such-host", 502, "dns_error", "Check the host's name.", 4)
DNS_TIMEOUT = Outcome("dns-timeout", 504, "dns_timeout", reply=4)
CONNECT_TIMEOUT = Outcome("connect-timeout", 504, "connection_timeout", reply=6)
CONNECT_FAILED = Outcome("connect-failed", 502, "destination_unavailable")
CONNECT_REFUSED = Outcome("refused", 502, "connection_refused", reply=5)
CONNECT_RESET = Outcome("reset", 502, "connection_terminated", reply=5)
UNROUTABLE = Outcome("unreachable", 502, "destination_ip_unroutable", reply=3)
HOST_UNREACHABLE = UNROUTABLE._replace(reply=4)
NO_UPLINK = UNROUTABLE._replace(word="no-uplink")
NOBODY_CALLED = CONNECT_TIMEOUT._replace(word="bind-timeout")
PARENT_FAILED = Outcome("parent", 502, "destination_unavailable")  # less which way
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
    errno.ENODEV: NO_UPLINK,
    errno.EADDRNOTAVAIL: NO_UPLINK,
    errno.EHOSTUNREACH: HOST_UNREACHABLE,
    **dict.fromkeys((errno.ENETUNREACH, errno.ENETDOWN), UNROUTABLE),
    **dict.fromkeys((errno.EMFILE, errno.ENFILE, errno.EAGAIN), OVERLOAD),
    **dict.fromkeys((errno.ENOBUFS, errno.ENOMEM, errno.EADDRINUSE), OVERLOAD),
}

OUTCOMES = {o.word: o for o in list(globals().values()) if isinstance(o, Outcome)}


def outcome_of(error: OSError, other: Outcome = BROKEN) -> Outcome:
    """Return the outcome of an error of the system's, or another where none fits."""
    return OUTCOME_OF_ERRNO.get(error.errno or 0, other)


class Refused(Exception):
    """The session cannot go on: carries the Outcome, and the detail for the page."""

    def __init__(self, outcome: Outcome, detail: str = "") -> None:
        super().__init__(detail)
        self.outcome, self.detail = outcome, detail


class IdleTimeout(Exception):
    """No byte moved for as long as was allowed."""


# --- Scoreboard and session ---------------------------------------------------
#
# A worker's slot on the scoreboard says what it does now: one byte for its
# state, numbers that count, and the row of its session.  The master chooses by
# the state bytes, --table prints the rows, and when a worker dies the master
# writes the log line that it no longer can.  The scoreboard is one piece of
# memory that all processes share, and each number in it has a single writer,
# so there is no lock that a killed worker could keep.

# WAITING: for a client that says nothing.
FREE, BUSY, WAITING = range(3)
FIRST_IDLE = 16  # of the states of idle workers, one for each generation
GENERATIONS = 240

# The header, as 64-bit words.
MAGIC, MASTER, MAX_WORKERS, RETIRED_BELOW, FORKS_FAILED, LAST_SAID, LOG_CUT = range(7)
# The master's: Unix time, and slots that ever were.
FORKS, BEGAN, USED = range(7, 10)
UNTOLD = 11  # lines of the log were lost, and nobody was there to hear it
UPLINKS, UPLINK_LIMIT = 16, 64  # when each uplink last failed; any worker writes
OURS = 0x316B726F7774616E  # "natwork1"
STATES = 4096  # offset of the state bytes
# For each slot a word that stands for its client, 0 for none, and when he came.
CLIENTS = (STATES + SLOTS) // 8
ARRIVALS = CLIENTS + SLOTS
ROWS = 8 * (ARRIVALS + SLOTS)  # offset of the slots
# A slot begins with words too: which row is up; pid; bytes of the session that
# is; which of the words further on is to count one that has ended, once its log
# line is written; and of all sessions, bytes, and log lines that were lost.
WHICH, PID, UP, DOWN, ENDS, UPS, DOWNS, LOST = range(8)
HEAD = struct.Struct("8Q")  # these words
SLOT_SIZE, SLOT_HEAD = 8192, HEAD.size
ROW_SIZE = (4096 - SLOT_HEAD) // 2
# The slot's second page: connections made, and the microseconds they took; and
# the sessions that have ended, by protocol and outcome.
MADE, MADE_IN, ENDED_BY = range(512, 515)
PROTOCOLS = "- http connect upgrade socks4 socks5 udp redirect ftp gopher".split()
PROTOCOL_AT = {proto: number for number, proto in enumerate(PROTOCOLS)}
OUTCOME_AT = {word: number for number, word in enumerate(["other", *OUTCOMES])}
TARGET_SIZE = 1500  # characters of a target that the log keeps
NAME_SIZE = 1020  # of a name: RFC 1929's 255 bytes, each of which may be \x0a


class Scoreboard:
    """The shared memory: a header, a state byte for each slot, then the slots."""

    def __init__(self, fd: int = -1) -> None:
        """Make one, or with fd map that of another process, to read only."""
        size = ROWS + SLOTS * SLOT_SIZE
        self.fd = fd
        if fd >= 0:
            if not fcntl.fcntl(fd, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK:
                raise ValueError("this memory could shrink")
            self.memory = mmap.mmap(fd, size, access=mmap.ACCESS_READ)
            self.words = memoryview(self.memory).cast("Q")
            return
        self.fd = os.memfd_create("natwork", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        # Pages nobody writes to are never allocated: unused slots cost nothing.
        os.ftruncate(self.fd, size)
        # Who maps it to read must not be able to lose it under his feet.
        fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
        self.memory = mmap.mmap(self.fd, size)
        self.words = memoryview(self.memory).cast("Q")

    def describe(self, max_workers: int) -> None:
        """Write down whose scoreboard this is; no uplink has failed yet."""
        words = self.words
        words[MAGIC], words[MASTER], words[MAX_WORKERS] = OURS, os.getpid(), max_workers
        for number in range(UPLINK_LIMIT):
            words[UPLINKS + number] = 0

    def states(self, slots: int = 0) -> bytes:
        """Return the state bytes of the first slots, or of all that ever were used."""
        return self.memory[STATES : STATES + (slots or self.words[USED])]

    def say(self, message: str) -> bool:
        """Say what many workers may want to say at once, one line a second.

        Returns whether it was said; else another one was, in this second.
        """
        second = int(time.monotonic())
        said = self.words[LAST_SAID] != second and say(message)
        if said:
            self.words[LAST_SAID] = second
        return said

    def is_tired(self, uplink: int) -> bool:
        """Return whether an uplink has failed a short while ago."""
        failed = self.words[UPLINKS + uplink] if uplink < UPLINK_LIMIT else 0
        return failed > 0 and time.monotonic() - failed < UPLINK_REST

    def note_failure(self, uplink: int) -> None:
        if uplink < UPLINK_LIMIT:
            self.words[UPLINKS + uplink] = int(time.monotonic())


@functools.lru_cache(maxsize=64)
def ended_by(proto: str, outcome: str) -> int:
    """Return where a slot counts the sessions of a protocol and an outcome.

    However many rules there are, what they deny counts as denied.
    """
    column = OUTCOME_AT.get(outcome) or OUTCOME_AT.get(outcome.partition("-")[0], 0)
    return ENDED_BY + PROTOCOL_AT.get(proto, 0) * len(OUTCOME_AT) + column


class Slot:
    """One worker's place on the scoreboard."""

    def __init__(self, board: Scoreboard, number: int) -> None:
        self.board, self.memory, self.number = board, board.memory, number
        self.base = ROWS + number * SLOT_SIZE
        self.words = board.words[self.base // 8 : (self.base + SLOT_SIZE) // 8]
        self.rows = self.base + SLOT_HEAD - ROW_SIZE  # they are the first and second
        self.head = slice(self.base, self.base + SLOT_HEAD)
        self.held = False

    def state(self, state: int) -> None:
        self.memory[STATES + self.number] = state

    def take(self, pid: int) -> None:
        """Begin with a clean row; the totals are the slot's and go on growing."""
        self.words[WHICH] = self.words[UP] = self.words[DOWN] = 0
        self.words[PID] = pid  # 0 until the worker has got this far

    def hold(self, client: str) -> None:
        """Say whose the slot is from now on."""
        words = self.board.words
        # In this order: who counts and does not see us was here before us.  And
        # hash() is the same in all processes forked from one.
        words[CLIENTS + self.number] = hash(client) & 0xFFFFFFFF | 1
        words[ARRIVALS + self.number] = time.monotonic_ns()
        self.held = True

    def let_go(self) -> None:
        """Say that the slot is nobody's."""
        words = self.board.words
        words[CLIENTS + self.number] = words[ARRIVALS + self.number] = 0
        self.held = False

    def show(self, row: bytes) -> None:
        """Put a session's row up.

        There is room for two, and a word that says which one is whole, so a
        reader never sees half a row, not even after kill -9.
        """
        words = self.words
        which = words[WHICH] % 2 + 1
        start = self.rows + ROW_SIZE * which
        row = row[: ROW_SIZE - 1] + b"\n"
        self.memory[start : start + len(row)] = row
        words[WHICH] = which

    def row(self) -> bytes:
        """Return the row that is up, or b"" for none."""
        if not (which := self.words[WHICH]):
            return b""
        start = self.rows + ROW_SIZE * which
        return self.memory[start : start + ROW_SIZE].partition(b"\n")[0]

    def moved(self, up: int, down: int) -> None:
        self.words[UP], self.words[DOWN] = up, down

    def connected(self, seconds: float) -> None:
        self.words[MADE] += 1
        self.words[MADE_IN] += int(seconds * 1e6)

    def settle(self, session: Session, outcome: str) -> None:
        """Take down the row of a session that has ended, and add up its bytes.

        Its log line is written next, and then it is counted: who is killed from
        here on gets no second line.
        """
        words, ends = self.words, ended_by(session.proto, outcome)
        ups, downs = words[UPS] + session.up, words[DOWNS] + session.down
        # In one piece: pack_into() would fill it with zeros first.
        head = HEAD.pack(0, words[PID], 0, 0, ends, ups, downs, words[LOST])
        self.memory[self.head] = head

    def count(self) -> None:
        """Count the session that has been settled, if there is one."""
        words = self.words
        if ends := words[ENDS]:
            words[ends] += 1
            words[ENDS] = 0


UNPRINTABLE = {
    code: f"\\x{code:02x}"
    for code in range(256)
    if not 0x21 <= code <= 0x7E or code in b'"\\'
}

UNSAFE = re.compile(r"[^!#-\[\]-~]")


def printable(raw: bytes, limit: int = 255) -> str:
    """Return bytes from the network as text that cannot break a log line.

    The text has no blank, no quote and at most limit characters; "-" is nothing.
    """
    text = raw[:limit].decode("latin-1")
    if UNSAFE.search(text):
        text = text.translate(UNPRINTABLE)[:limit]
        # Not cut within a \x0a.
        text = re.sub(r"\\(x[0-9a-f]?)?\Z", "", text)
    return text or "-"


def endpoint(address: tuple[Any, ...]) -> str:
    """Return an address and port as one writes them: IPv6 in brackets."""
    host = address[0]
    return f"[{host}]:{address[1]}" if ":" in host else f"{host}:{address[1]}"


def host_of(name: str) -> str:
    """Return the host of a name as endpoint() writes it."""
    return name.rpartition(":")[0].strip("[]")


@functools.lru_cache(maxsize=2)
def timestamp(second: int) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(second))


class Session:
    """What one client asked for and got: the log line, the title and the row.

    What is shown is printable text without blanks, "-" when there is nothing.
    """

    __slots__ = (
        "address,began,client,down,method,parent,pid,proto,source,status,target,up,"
        "user,via"
    ).split(",")

    def __init__(self, client: str, pid: str, proto: str = "-") -> None:
        self.began, self.pid, self.client, self.proto = time.time(), pid, client, proto
        self.user = self.method = self.target = "-"
        self.address = self.source = self.status = "-"
        self.via = b""  # the gateways that a CONNECT has come through
        self.parent: Any = None  # who takes a request, not a tunnel
        self.up = self.down = 0  # bytes written to the server, and to the client

    def row(self) -> bytes:
        """Return the row for the scoreboard; from_row() reads it again."""
        began, user = int(self.began * 1000), self.user[:255]
        return (
            f"{began} {self.pid} {self.client} {user} {self.proto} {self.method} "
            f"{self.target} {self.address} {self.source} {self.status}"
        ).encode()

    @staticmethod
    def from_row(row: bytes, up: int, down: int) -> Session:
        """Return the session of a row, with the bytes it has moved so far."""
        began, pid, client, *words = row.decode().split(" ")
        session = Session(client, str(int(pid)))
        session.began = int(began) / 1000
        session.user, session.proto, session.method = words[:3]
        session.target, session.address, session.source, session.status = words[3:]
        session.up, session.down = up, down
        return session

    def host(self) -> str:
        """Return the host of the target, without scheme, port and path."""
        scheme, found, rest = self.target.partition("://")
        whole = rest if found and "/" not in scheme else self.target
        authority = whole.partition("/")[0]
        # host_of() without its call, which would weigh in every worker.
        return authority.rpartition(":")[0].strip("[]") or authority

    def title(self) -> str:
        """Return the process title: no path, no query, and the host last."""
        who = self.client if self.user == "-" else f"{self.client} {self.user}"
        way = f"{who} > {self.source} > {self.address}"
        return f"natwork: {way} {self.proto} {self.host()}"

    def line(self, outcome: str) -> str:
        """Return the line of the access log, its fields in their order."""
        seconds = time.time() - self.began
        if seconds < 0:  # somebody has set the clock
            seconds = 0.0
        return (
            f"time={timestamp(int(self.began))} pid={self.pid} client={self.client} "
            f"user={self.user} proto={self.proto} method={self.method} "
            f"target={self.target} address={self.address} source={self.source} "
            f"status={self.status} outcome={outcome} up={self.up} down={self.down} "
            f"secs={seconds:.3f}"
        )


def as_json(line: str) -> str:
    """Return a line of the access log as a JSON object, its numbers as numbers."""
    import json

    fields: dict[str, str | float | None] = {}
    for name, text in (word.split("=", 1) for word in line.split(" ")):
        fields[name] = None if text == "-" else text
        if name in ("pid", "status", "up", "down", "secs") and text != "-":
            fields[name] = float(text) if name == "secs" else int(text)
    return json.dumps(fields)


def sessions(board: Scoreboard) -> Iterator[tuple[int, Session]]:
    """Yield the sessions that go on, each behind its worker's number."""
    for number, state in enumerate(board.states()):
        if state == FREE:
            continue
        slot = Slot(board, number)
        pid, up, down = slot.words[PID : DOWN + 1]
        try:
            yield pid, Session.from_row(slot.row(), up, down)
        except ValueError:  # no row, or none of ours
            continue


COLUMNS = (
    "Source IP,Original Source Port,New Source Port,Destination,Protocol,Host,User,"
    "Age,Up,Down,Moving,PID"
).split(",")


def table_rows(board: Scoreboard) -> list[dict[str, Any]]:
    """Return the sessions of a gateway: the four columns of the paper, and more."""
    rows = []
    for pid, session in sessions(board):
        port = session.client.rpartition(":")[2]
        new_port = session.source.rpartition(":")[2]
        rows.append(
            {
                "source_ip": host_of(session.client),
                "original_source_port": int(port),
                "new_source_port": int(new_port) if new_port.isdigit() else None,
                "destination": session.address,
                "protocol": session.proto,
                "host": session.host(),
                "user": session.user,
                "age": round(time.time() - session.began, 1),
                "up": session.up,
                "down": session.down,
                "pid": pid,
            }
        )
    return rows


class AccessLog:
    """Where a line goes when a session ends.

    A line is one write of at most PIPE_BUF bytes, so that the lines of many
    workers never mix, and it never waits: what cannot be written at once is lost.
    """

    def __init__(self, config: Config, old: AccessLog | None = None) -> None:
        """Open the file, or standard output, as the old log did; raise OSError."""
        self.path = config.log
        import json

        json.dumps("")  # once here, not in every worker, who may be unable to
        self.form, self.shared = config.log_format, False
        self.has_room = select.poll()
        flags = os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY
        if config.log != "-":
            self.fd = self.open(flags)
            return
        if old and old.path == "-":
            # Not anew: we may have lost the right to, and O_APPEND with it.
            self.fd, self.shared = os.dup(old.fd), old.shared
            self.has_room.register(self.fd, POLLOUT)
            return
        try:
            # Opened anew, so that O_NONBLOCK is ours and not the terminal's.
            self.fd = os.open("/proc/self/fd/1", flags)
        except OSError:  # a socket (journald's), or not ours to open again
            self.fd, self.shared = os.dup(1), True
            self.has_room.register(self.fd, POLLOUT)

    def open(self, flags: int) -> int:
        """Return the file, open to be appended to; raise OSError.

        Root follows no link to a file: who may write to the directory could
        have put it there, and be given what it leads to.
        """
        safe = 0 if os.geteuid() else os.O_NOFOLLOW
        try:
            return os.open(self.path, flags | os.O_CREAT | safe, 0o640)
        except OSError as error:
            if error.errno != errno.ELOOP:
                raise
        fd = os.open(self.path, flags)  # /dev/stdout is a link too
        if stat.S_ISREG(os.fstat(fd).st_mode):
            os.close(fd)
            raise OSError("it is a link: name the file itself")
        return fd

    def give_to(self, user: tuple[int, int]) -> None:
        """Let a user open it again at a reload."""
        status = os.fstat(self.fd)
        if self.path != "-" and stat.S_ISREG(status.st_mode) and status.st_nlink == 1:
            os.fchown(self.fd, *user)

    def follow(self) -> None:
        """Go on in the file that has our name now, if ours has been renamed."""
        with contextlib.suppress(OSError):
            if self.path != "-":
                flags = os.O_WRONLY | os.O_APPEND | os.O_NONBLOCK | os.O_NOCTTY
                safe = 0 if os.geteuid() else os.O_NOFOLLOW
                fd = os.open(self.path, flags | os.O_CLOEXEC | safe)
                os.dup2(fd, self.fd, False)
                os.close(fd)

    def write(self, session: Session, outcome: str, slot: Slot) -> None:
        """Settle a session that has ended and write its line, or count it as lost."""
        line = session.line(outcome)
        if self.form == "json":
            line = as_json(line)
        words, written, data = slot.board.words, 0, (line + "\n").encode()
        # Behind half a line, a disk having been full, the next begins anew.
        if cut := words[LOG_CUT]:
            data = b"\n" + data
        slot.settle(session, outcome)
        try:
            if not self.shared or self.has_room.poll(0):
                written = os.write(self.fd, data)
        except OSError:
            pass  # it is full, or nobody reads it
        if written < len(data):
            words[LOG_CUT] |= written > 0
            slot.words[LOST] += 1
            words[UNTOLD] = 1
        elif cut:
            words[LOG_CUT] = 0
        slot.count()
        if words[UNTOLD]:  # and perhaps nobody listened either
            lost = "the access log takes no more: lines are lost"
            words[UNTOLD] = not slot.board.say(lost)


# --- Relay --------------------------------------------------------------------
#
# Two sockets are open, and what enters one must leave by the other.  A lane is
# one direction of that.  Its script is a generator that moves what it can and,
# when it can do no more, yields the socket and the event it waits for; relay()
# runs two such scripts side by side.  Bulk goes by splice(2) through a pipe,
# socket to socket in the kernel; for a few bytes a plain recv() and send() is
# cheaper.  A lane empties its pipe before it looks at its source again, so an
# EAGAIN from splice never means a full pipe, and it waits for one thing at a time.

ALL = 1 << 64  # a count that no stream reaches: until the source ends
Wait = tuple[int, int]  # a descriptor, and the poll() events awaited on it
PAUSE: Wait = (-1, 0)  # until the other lane has got somewhere
Script = Generator[Wait, None, Any]
NOTHING: Script = (PAUSE for _ in ())


class Stream:
    """A socket, and the bytes received from it that nobody has used yet."""

    __slots__ = ("fd", "lost", "received", "sock", "watched")

    def __init__(self, sock: socket.socket, lost: Outcome) -> None:
        """Take over a socket that does not block.

        lost is the outcome when its far end goes away.
        """
        self.sock, self.fd, self.lost = sock, sock.fileno(), lost
        self.received = bytearray()
        self.watched = False  # in the worker's epoll for silent sockets

    def take(self, count: int) -> bytes:
        """Remove and return at most count of the bytes received."""
        piece = bytes(self.received[:count])
        del self.received[:count]
        return piece

    def fill(self) -> bool:
        """Receive more; return False at the end, or when the far end is lost."""
        try:
            data = self.sock.recv(COPY_SIZE)
        except BlockingIOError:
            raise
        except OSError:  # a reset, or keepalive's time is over
            return False
        self.received += data
        return bool(data)

    def send(self, data: bytes | bytearray, flags: int = 0) -> int:
        """Send what the kernel takes now; return its size; raise Refused."""
        try:
            return self.sock.send(data, flags)
        except BlockingIOError:
            return 0
        except OSError as error:
            raise Refused(self.lost, reason(error)) from None

    def converse(self) -> None:
        """Get ready for more than a question and its answer.

        Small pieces leave at once, and a peer who is gone is noticed in the end.
        """
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)

    def error(self) -> int:
        """Return the number of the error that has come, 0 for none, and forget it."""
        return self.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)

    def end(self) -> None:
        """Say that nothing more will be sent; go on hearing."""
        try:
            self.sock.shutdown(socket.SHUT_WR)
        except OSError:
            pass  # it has gone

    def close(self) -> None:
        self.sock.close()

    def abort(self) -> None:
        """Close by a reset, so that nobody takes what was sent for the whole."""
        with contextlib.suppress(OSError):
            self.sock.setsockopt(
                socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0)
            )
        self.sock.close()


class Watch:
    """How a worker waits for sockets, and the pipes it keeps between its clients.

    The lifeline is in every wait.  It is a pipe of which only the master holds
    the other end: when that end closes, the master is leaving or dead, and
    what goes on here must come to its end within drain_timeout.
    """

    def __init__(self, lifeline: int, drain_timeout: float) -> None:
        self.lifeline, self.drain_timeout = lifeline, drain_timeout
        self.drain_at = 0.0  # monotonic; 0 while the master lives
        self.doors: dict[int, socket.socket] = {}  # listeners, until then
        self.pipes: list[tuple[int, int]] = []
        self.wanted: dict[int, int] = {}  # what poll is set up for
        self.poll = select.poll()
        self.poll.register(lifeline, 0)

    def wait(self, wanted: dict[int, int], seconds: float) -> dict[int, int]:
        """Return the events on the descriptors wanted; {} when the time is over.

        Raises Refused(DRAINED) when drain_timeout is over.
        """
        if wanted is not self.wanted and wanted != self.wanted:
            self.wanted, self.poll = wanted, select.poll()
            for fd, events in wanted.items():
                self.poll.register(fd, events)
            if not self.drain_at:
                self.poll.register(self.lifeline, 0)  # POLLHUP comes unasked
        now = time.monotonic()
        deadline = now + seconds
        while True:
            left = deadline - now
            if self.drain_at and self.drain_at < deadline:
                left = self.drain_at - now
                if left <= 0:
                    raise Refused(DRAINED, "the gateway is stopping")
            if self.pipes and left > PIPE_KEEP_TIME:
                left = PIPE_KEEP_TIME
            ready = dict(self.poll.poll(left * 1000 if left > 0 else 0))
            if self.lifeline in ready:
                del ready[self.lifeline]
                self.poll.unregister(self.lifeline)
                self.drain()
            if ready:
                return ready
            now = time.monotonic()
            if now >= deadline:
                return ready
            self.drop_pipes()

    def drain(self) -> None:
        """Give what goes on now drain_timeout to end."""
        if not self.drain_at:
            self.drain_at = time.monotonic() + self.drain_timeout
            while self.doors:  # nobody waits in vain, and who takes over has the port
                self.doors.popitem()[1].close()
            # For a call that waits elsewhere, in the resolver: no mercy.
            signal.setitimer(signal.ITIMER_REAL, self.drain_timeout + 1)

    def pipe(self) -> tuple[int, int] | None:
        """Return an empty pipe: a kept one, or a new one; None if there is none."""
        if self.pipes:
            return self.pipes.pop()
        try:
            pipe = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError:  # no descriptors left: the bytes can still be copied
            return None
        # Refused to a user who has many pipes already: then 64 KiB, or less, do.
        with contextlib.suppress(OSError):
            fcntl.fcntl(pipe[1], 1031, PIPE_SIZE)  # F_SETPIPE_SZ, named in 3.10's fcntl
        return pipe

    def give_back(self, pipe: tuple[int, int], clean: bool) -> None:
        """Keep a pipe for its next use, unless it still holds somebody's bytes."""
        self.pipes.append(pipe)
        if not clean:
            self.drop_pipes()

    def drop_pipes(self) -> None:
        """Give the pipes back: a user's pipe memory is limited, an idle tunnel none."""
        while self.pipes:
            for fd in self.pipes.pop():
                os.close(fd)


class Lane:
    """One direction of a relay: source socket to sink socket."""

    __slots__ = (
        "abandoned,broken,done,hot,moved,optional,out,patience,script,sink,source,"
        "waits,watch"
    ).split(",")

    def __init__(
        self, watch: Watch, source: Stream, sink: Stream | None, patience: float
    ) -> None:
        """Make a lane; without a sink it gets ready but sends nothing."""
        self.watch, self.source, self.sink = watch, source, sink
        self.patience = patience  # seconds without an event
        self.out = bytearray()  # to be sent before anything else
        self.moved = 0  # bytes sent so far
        self.hot = False  # the last read was full: do not wait before the next
        self.script = NOTHING
        self.waits = PAUSE
        self.done = self.abandoned = False  # it is not to go on
        self.broken = False  # because the sink was reset, and not behind its end
        self.optional = False  # its failure is not the other lane's

    def step(self) -> None:
        """Go on until the lane must wait, or its script ends."""
        try:
            self.waits = next(self.script)
        except StopIteration:
            self.done = True

    def give_up(self, refusal: Refused) -> bool:
        """Abandon the lane for a failure; return False if both lanes have failed."""
        lost = self.sink is not None and refusal.outcome is self.sink.lost
        if not (lost or self.optional):
            return False
        self.abandoned = True
        # Behind an end, which makes what came whole, a reset is a broken pipe.
        self.broken = lost and not isinstance(refusal.__context__, BrokenPipeError)
        if self.sink and not lost:
            self.sink.end()  # in mid-message: nobody takes it for the whole
        return True

    def flush(self) -> Script:
        """Send what is gathered."""
        while self.sink is None:
            yield PAUSE
        while self.out and not self.push(self.sink):
            yield self.sink.fd, POLLOUT

    def push(self, sink: Stream) -> bool:
        """Send of what is gathered what can be sent; return whether it was all."""
        sent = sink.send(self.out)
        self.moved += sent
        del self.out[:sent]
        return not self.out

    def receive(self, limit: int) -> Script:
        """Send what is gathered, then return what comes; b"" is the source's end."""
        if self.sink is None or self.out and not self.push(self.sink):
            yield from self.flush()
        while True:
            if not self.hot:
                yield self.source.fd, POLLIN
            try:
                data = self.source.sock.recv(limit)
            except BlockingIOError:
                self.hot = False
            except OSError as error:
                raise Refused(self.source.lost, reason(error)) from None
            else:
                self.hot = len(data) == COPY_SIZE
                return data

    def need(self) -> Script:
        """Receive more; the end of the source is a failure."""
        data = yield from self.receive(COPY_SIZE)
        if not data:
            raise Refused(self.source.lost, "the connection ended in mid-message")
        self.source.received += data

    def move(self, count: int) -> Script:
        """Pass count bytes on as they are, ALL until the source ends.

        Raises Refused when the source ends before count.
        """
        bulk = BULK_SIZE <= count < ALL
        while count > 0:
            if self.source.received:
                piece = self.source.take(count)
                self.out += piece
                moved = len(piece)
                if len(self.out) >= OUT_LIMIT:
                    yield from self.flush()
            elif bulk:
                moved = yield from self.splice(count)
                bulk = self.hot = moved >= COPY_SIZE
            else:
                data = yield from self.receive(min(count, COPY_SIZE))
                self.out += data
                moved = len(data)
                bulk = moved == COPY_SIZE
            if not moved and count < ALL // 2:
                raise Refused(self.source.lost, "the body ended too early")
            count -= moved or count

    def splice(self, count: int) -> Script:
        """Pass on at most count bytes through a pipe; return how many, 0 at the end.

        What the kernel will not splice, what stands behind an urgent byte, is copied.
        """
        yield from self.flush()
        assert self.sink is not None
        source, sink = self.source.fd, self.sink.fd
        urgent = False
        while True:
            if not self.hot:
                yield source, POLLIN
            held = 0
            pipe = None if urgent else self.watch.pipe()
            if not pipe:
                self.out += yield from self.receive(min(count, COPY_SIZE))
                return len(self.out)
            pipe_out, pipe_in = pipe
            try:
                held = moved = os.splice(source, pipe_in, min(count, PIPE_SIZE))
                while held:
                    try:
                        sent = os.splice(pipe_out, sink, held)
                    except BlockingIOError:
                        yield sink, POLLOUT
                    else:
                        held -= sent
                        self.moved += sent
                return moved
            except BlockingIOError:
                urgent, self.hot = not self.hot, False  # poll() said that there is more
            except OSError as error:
                side = self.sink if held else self.source
                raise Refused(side.lost, reason(error)) from None
            finally:
                self.watch.give_back(pipe, clean=not held)

    def move_all(self, other: Lane) -> Script:
        """Pass everything on, to an end that is no reset which the other lane met.

        A socket tells of a reset once, and then of an end.  Raises Refused.
        """
        yield from self.move(ALL)
        yield from self.flush()
        if other.broken:
            raise Refused(self.source.lost, "connection reset")

    def tunnel(self, other: Lane) -> Script:
        """Pass everything on, then the end of it; the other lane has its time."""
        yield from self.move_all(other)
        assert self.sink is not None
        self.sink.end()
        other.patience = min(other.patience, HALF_CLOSED_TIMEOUT)


def unsent(*streams: Stream | None) -> int:
    """Return how many bytes the kernel took for some streams and still has."""
    count = 0
    for stream in streams:
        with contextlib.suppress(OSError):
            if stream:
                queue = fcntl.ioctl(stream.fd, 0x5411, bytes(4))  # SIOCOUTQ
                count += int.from_bytes(queue, sys.byteorder)
    return count


def relay(watch: Watch, slot: Slot, up: Lane, down: Lane) -> None:
    """Run the lanes to the server and to the client until both have ended.

    Either may end first and the other goes on: a client that says its piece,
    closes its half and listens is answered.  A server that takes no more has
    perhaps answered before, so then only the lane up is abandoned; and so it is
    when it fails once it is optional.  Raises Refused when a side is lost,
    IdleTimeout when nothing moved for too long.
    """
    running = moving = [up, down]
    left = 0  # bytes that were not sent when nothing moved here
    try:
        while True:
            for lane in moving:
                try:
                    lane.step()
                except Refused as refusal:
                    if lane is down or not up.give_up(refusal):
                        raise
            if up.done or up.abandoned or down.done:
                running = [x for x in running if not x.done and not x.abandoned]
                if not running:
                    return
            wanted: dict[int, int] = {}
            patience = 0.0
            for lane in running:
                fd, events = lane.waits
                if lane.waits is not PAUSE:
                    wanted[fd] = wanted.get(fd, 0) | events
                if lane.sink:
                    # While we may still write to it, POLLHUP and POLLERR on a
                    # socket, which poll() reports unasked, mean a reset.
                    wanted.setdefault(lane.sink.fd, 0)
                patience = max(patience, lane.patience)
            slot.moved(up.moved, down.moved)
            ready = watch.wait(wanted, patience)
            moving = []
            if not ready:
                before, left = left, unsent(up.sink, down.sink)
                if left in (0, before):
                    raise IdleTimeout
                continue  # a slow reader takes what the kernel has for him
            for lane in running:
                if lane.waits[0] in ready:
                    moving.append(lane)
            if not moving and down.sink and down.sink.fd in ready:
                raise Refused(down.sink.lost, "connection reset")
            if not moving:
                up.abandoned = True
                up.broken = up.sink is not None and up.sink.error() != errno.EPIPE
    finally:
        for lane in (up, down):
            lane.script.close()  # it gives back what it holds


# --- Master and workers -------------------------------------------------------
#
# The master keeps workers forked ahead of the clients and does nothing else: it
# reads nothing from the network, resolves no name and accepts no client.  Its
# loop is reap, top up, sleep, act.  Signals wake it through the wake pipe.  Three
# more join it to its workers: through the poke pipe they have it look at the
# scoreboard; through the pressure pipe it asks waiting ones for room; and the
# lifeline, of which each generation of the configuration has one, says when to
# leave.  A byte in it means: take no more clients under these settings.  Its end
# means: the master is leaving, or dead.

MASTER_SIGNALS = [signal.SIGCHLD, signal.SIGHUP, signal.SIGINT, signal.SIGTERM]
ROOM = b"r"  # the master's "somebody silent, make room"


def notify(words: str) -> None:
    """Tell the service manager how we are, where it asks: sd_notify(3)."""
    if path := os.environ.get("NOTIFY_SOCKET"):
        # An abstract address begins with a NUL, for which "@" stands.
        where = "\0" + path[1:] if path[0] == "@" else path
        with contextlib.suppress(OSError):
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
                sock.settimeout(1)
                sock.sendto(words.encode(), where)


def select_now(listeners: Iterable[socket.socket]) -> list[socket.socket]:
    """Return the listeners at which a client waits now."""
    poll = select.poll()
    for listener in listeners:
        poll.register(listener, POLLIN)
    ready = dict(poll.poll(0))
    return [listener for listener in listeners if listener.fileno() in ready]


class Chapters:
    """What the chapters beside this file do; None where a chapter is not there."""

    def __init__(self) -> None:
        # Serve who begins with the byte 4 or 5; and a redirected flow, if it is one.
        self.socks: Callable[[Worker, Policy, Stream], None] | None = None
        self.redirect: Callable[[Worker, Policy, Stream], bool] | None = None
        self.schemes: dict[bytes, Gateway] = {}  # of a URL; b"" is origin form
        self.users: Any = None  # who asks: authenticate(), check_share(), named
        self.parents: Any = None  # who dials: dial(), readdress(), failed()


class Generation:
    """One configuration in force: its listeners, log and lifeline."""

    def __init__(
        self,
        config: Config,
        listeners: dict[str, socket.socket],
        log: AccessLog,
        serve: Callable[[Worker], None],
        number: int = 0,
    ) -> None:
        """Take listeners by name; serve is what a worker does with its client."""
        self.config, self.listeners = config, listeners
        self.log, self.serve, self.number = log, serve, number
        self.idle_state = FIRST_IDLE + number % GENERATIONS  # of its workers
        self.chapters = Chapters()
        self.workers = 0  # that live
        self.lifeline_out, self.lifeline_in = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)

    def idle(self, states: bytes) -> int:
        """Return how many of the workers of some states are its idle ones."""
        return states.count(self.idle_state)

    def descriptors(self) -> list[int]:
        """Return what is open for this generation alone."""
        found = [self.lifeline_out, self.lifeline_in, self.log.fd]
        return [fd for fd in found if fd >= 0]

    def close(self) -> None:
        for fd in self.descriptors():
            os.close(fd)


class Worker:
    """One process and its one client at a time: what serving code may use."""

    def __init__(
        self,
        generation: Generation,
        board: Scoreboard,
        slot: Slot,
        poke_in: int,
        pressure_out: int,
    ) -> None:
        """Begin in the new process; the descriptors are the master's pipes."""
        self.generation, self.config = generation, generation.config
        self.chapters = generation.chapters
        self.board = board
        self.poke_in, self.pressure_out = poke_in, pressure_out
        self.lifeline = generation.lifeline_out
        self.watch = Watch(self.lifeline, self.config.drain_timeout)
        self.listeners = {s.fileno(): s for s in generation.listeners.values()}
        self.watch.doors = self.listeners
        self.slot, self.pid = slot, os.getpid()
        self.word = str(self.pid)  # of the log
        self.client: socket.socket
        self.peer = self.name = ""  # the client's address; and with its port
        self.address: tuple[Any, ...]  # as accept() has it
        self.title = ""
        self.made_room = False
        # Made after the fork: they are no other process's.
        self.idle_poll, self.silent_poll = select.epoll(), select.epoll()
        self.idle_poll.register(self.lifeline, select.EPOLLIN)
        self.silent_poll.register(self.lifeline, select.EPOLLIN)
        self.silent_poll.register(
            self.pressure_out, select.EPOLLIN | select.EPOLLEXCLUSIVE
        )

    def run(self) -> None:
        """Serve clients, one after another, until it is time to leave."""
        for _ in range(self.config.clients_per_worker):
            self.entitle("natwork: idle")
            if not self.accept():
                break
            self.call_for_spares()
            if self.made_room:  # and has taken the one who waited: is there another?
                self.made_room = False
                self.poke()
            try:
                self.generation.serve(self)
            finally:
                if self.slot.held:  # before he sees the end, and comes again
                    self.slot.let_go()
                self.client.close()
            if self.leaving():
                break

    def accept(self) -> bool:
        """Wait for a client and take it; return False when it is time to leave."""
        surplus_at = time.monotonic() + SURPLUS_TIME
        self.attend()
        try:
            while True:
                self.slot.state(self.generation.idle_state)
                pause = PIPE_KEEP_TIME if self.watch.pipes else SURPLUS_TIME
                found = self.idle_poll.poll(pause, 8)
                # EPOLLEXCLUSIVE wakes one worker a client, so look at the listeners
                # before the lifeline.  Look after a timeout too: the worker that was
                # woken may have been killed before it accepted.
                for fd, _ in found or [(fd, 0) for fd in self.listeners]:
                    if fd in self.listeners and self.take(fd):
                        return True
                if self.lifeline in dict(found):
                    return False
                self.watch.drop_pipes()
                if not found and time.monotonic() >= surplus_at and self.is_surplus():
                    return False
        finally:
            # A busy worker is not asked by the kernel whether it sleeps.
            for fd in self.listeners:
                self.idle_poll.unregister(fd)

    def attend(self) -> None:
        """Be woken by the listeners: one worker by one client."""
        for fd in self.listeners:
            self.idle_poll.register(fd, select.EPOLLIN | select.EPOLLEXCLUSIVE)

    def take(self, fd: int) -> bool:
        """Accept a client from a listener; return whether there was one."""
        listener = self.listeners[fd]
        try:
            self.client, self.address = listener.accept()
            self.client.setblocking(False)
        except BlockingIOError:
            return False  # another worker was quicker
        except OSError as error:
            if error.errno == errno.EINVAL:  # the master has shut this listener
                self.idle_poll.unregister(fd)
                del self.listeners[fd]
            elif error.errno != errno.ECONNABORTED:
                self.board.say(f"cannot accept a client: {reason(error)}")
                self.watch.wait({}, 1.0)  # the client stays in the queue
            return False
        self.slot.state(BUSY)
        self.peer = self.address[0].removeprefix("::ffff:")
        self.name = endpoint((self.peer, self.address[1]))
        self.slot.hold(self.peer)
        return True

    def check_share(self) -> None:
        """Raise Refused if this client has max_per_client sessions besides this one."""
        if users := self.chapters.users:
            users.check_share(self)

    def asks_names(self) -> bool:
        """Return whether clients must say who they are."""
        users = self.chapters.users
        return bool(users and users.named)

    def is_surplus(self) -> bool:
        """Give up being idle; return whether enough others are."""
        # Down first, then counted: of many that ask at once, too few leave
        # rather than too many.
        self.slot.state(BUSY)
        states = self.board.states()
        return self.generation.idle(states) >= self.config.spare_workers

    def call_for_spares(self) -> None:
        """Wake the master if it has workers to fork, and does not know it."""
        states, spares = self.board.states(), self.config.spare_workers
        if self.generation.idle(states) >= spares:
            return
        limit = self.config.max_workers
        if len(states) < limit or FREE in states[:limit]:
            self.poke()

    def poke(self) -> None:
        try:
            os.write(self.poke_in, b"p")
        except OSError:
            pass  # it is full, and so the master is awake; or the master is gone

    def leaving(self) -> bool:
        """Return whether this worker should take no more requests."""
        if self.watch.drain_at:  # the master may have died
            return True
        return self.generation.number < self.board.words[RETIRED_BELOW]

    def silence(
        self, deadline: float, quiet: list[Stream], fresh: bool
    ) -> dict[int, int]:
        """Wait for a word from any of these, and make room for others if need be.

        Returns the events by descriptor; {} when it is time to go.  A fresh client
        was promised an answer: a reload does not send him away.  One who has had an
        answer has a moment to ask the next, or it would cross with our leaving.
        """
        for stream in quiet:
            if not stream.watched:
                self.silent_poll.register(stream.fd, select.EPOLLIN)
                stream.watched = True
        self.slot.state(WAITING)
        try:
            while (left := deadline - time.monotonic()) > 0:
                if self.watch.pipes and left > PIPE_KEEP_TIME:
                    left = PIPE_KEEP_TIME
                found = dict(self.silent_poll.poll(left, 8))
                for stream in quiet:
                    if stream.fd in found:
                        return found
                if self.pressure_out in found and self.is_wanted():
                    break
                if self.lifeline in found:
                    if found[self.lifeline] & select.EPOLLHUP:
                        break
                    if not fresh:  # he may be about to ask
                        deadline = min(deadline, time.monotonic() + PARTING_TIME)
                    self.silent_poll.modify(self.lifeline, 0)  # POLLHUP comes unasked
                if not found:
                    self.watch.drop_pipes()
        finally:
            self.slot.state(BUSY)
        return {}

    def is_wanted(self) -> bool:
        """Take the master's wish for room; return whether it still holds."""
        try:
            os.read(self.pressure_out, 1)
        except BlockingIOError:  # another worker was quicker
            return False
        self.made_room = bool(select_now(self.listeners.values()))
        return self.made_room

    def begin(self, session: Session) -> None:
        """Show a session that begins, before we wait for it."""
        self.slot.show(session.row())

    def proceed(self, session: Session) -> None:
        """Show what a session now knows, by the process title too."""
        self.slot.show(session.row())
        if set_title:
            self.entitle(session.title())

    def finish(self, session: Session, outcome: str) -> None:
        """Write down how a session ended."""
        if self.leaving():
            self.generation.log.follow()
        self.generation.log.write(session, outcome, self.slot)

    def entitle(self, title: str) -> None:
        if set_title and title != self.title:
            set_title(title)
            self.title = title

    def end(self, *_: object) -> None:
        """Die of TERM, and by a reset if the client has but half of his answer.

        The master writes the line: one that dies of a signal cannot.
        """
        if self.slot.words[WHICH]:  # a session is going on
            with contextlib.suppress(OSError):
                self.client.setsockopt(
                    socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0)
                )
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.kill(self.pid, signal.SIGTERM)


class Master:
    """Keeps spare workers waiting for clients, and sees them out."""

    def __init__(
        self, board: Scoreboard, load: Callable[[Generation | None], Generation]
    ) -> None:
        """Take what loads a generation; raise what it raises."""
        self.board, self.load = board, load
        self.generation = load(None)
        self.generations = [self.generation]  # the last is in force
        self.workers: dict[int, tuple[Slot, Generation]] = {}
        self.wake_out, self.wake_in = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self.poke_out, self.poke_in = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self.pressure_out, self.pressure_in = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self.replaced: list[Generation] = []  # whose idle workers are to leave
        self.retire_at = 0.0  # monotonic: whatever the forks of the new ones do
        self.retiring: Generation | None = None  # until its idle workers have left
        self.removed: list[socket.socket] = []  # listeners that go when they are empty
        self.stopping = self.hurried = False  # told to stop; and told so again
        self.fork_at = self.full_said_at = 0.0  # monotonic
        self.fork_failing = False
        # Not the workers'.
        self.private = [self.wake_out, self.wake_in, self.poke_out, self.pressure_in]
        self.title = ""
        # sd_watchdog_enabled(3): twice as often as would just do.
        pause = os.environ.get("WATCHDOG_USEC", "")
        self.notify_pause = (int(pause) if pause.isdigit() else 10**7) / 2e6
        self.notify_at = 0.0  # monotonic
        board.words[BEGAN] = int(time.time())

    def run(self) -> None:
        """Serve until TERM or INT, then see the busy workers out."""
        for number in MASTER_SIGNALS:
            # The workers keep this: a terminal's Ctrl-C reaches the whole group,
            # and must drain, not cut.  They listen to TERM alone.
            signal.signal(number, lambda *_: None)
        for number in (signal.SIGUSR1, signal.SIGUSR2):  # "open your log", to others
            signal.signal(number, signal.SIG_IGN)
        signal.set_wakeup_fd(self.wake_in, warn_on_full_buffer=False)
        signal.pthread_sigmask(
            signal.SIG_UNBLOCK, MASTER_SIGNALS
        )  # run() has held them
        while not self.stopping:
            with self.steady():
                self.reap()
                self.keep_spares()
                self.retire()
                self.show_title()
                for byte in self.sleep():
                    self.act(byte)
        self.drain()

    @contextlib.contextmanager
    def steady(self) -> Iterator[None]:
        """Say what the system refuses the master, and let it not be his end."""
        try:
            yield
        except OSError as error:
            self.board.say(f"the master goes on after an error: {reason(error)}")
            time.sleep(0.1)  # it may come again at once

    def sleep(self) -> bytes:
        """Wait for a signal, a poke or a second; return the bytes that woke us.

        The C half of Python's signal handling writes each signal's number into
        the wake pipe and our half does nothing, so no code of ours ever runs
        in the middle of other code of ours.
        """
        full = not self.stopping and self.is_full()
        crowded = full and self.make_room()
        poll = select.poll()
        poll.register(self.wake_out, POLLIN)
        poll.register(self.poke_out, POLLIN)
        if full and not crowded:
            for listener in self.generation.listeners.values():
                poll.register(listener, POLLIN)
        poll.poll(250 if crowded else 1000)
        try:
            with contextlib.suppress(BlockingIOError):
                os.read(self.poke_out, 65536)
            return os.read(self.wake_out, 4096)
        except BlockingIOError:
            return b""

    def act(self, byte: int) -> None:
        if byte in (signal.SIGTERM, signal.SIGINT):
            self.hurried, self.stopping = self.stopping, True
        elif byte == signal.SIGHUP and not self.stopping:
            self.reload()

    def states(self) -> bytes:
        # A reload may have lowered max_workers: who came before works on.
        limit = self.generation.config.max_workers
        return self.board.states(max(limit, self.board.words[USED]))

    def room(self, states: bytes) -> int:
        """Return how many workers there may be besides those there are."""
        there = len(states) - states.count(FREE)
        return max(0, self.generation.config.max_workers - there)

    def is_full(self) -> bool:
        """Return whether a client who comes now finds nobody."""
        states = self.states()
        return not self.room(states) and not self.generation.idle(states)

    def make_room(self) -> bool:
        """If clients wait for a worker, ask for one; return whether they do."""
        listeners = list(self.generation.listeners.values())
        if not select_now(listeners):
            return False
        if time.monotonic() >= self.full_said_at + 60:
            self.full_said_at = time.monotonic()
            limit = self.generation.config.max_workers
            say(f"all {limit} workers are busy and clients wait (max_workers)")
        with contextlib.suppress(BlockingIOError):
            os.read(self.pressure_out, 64)  # a byte nobody took wakes nobody twice
        if WAITING in self.states():
            os.write(self.pressure_in, ROOM)
        return True

    def reap(self) -> None:
        """Collect every worker that has ended, and free its slot."""
        while self.workers:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                break
            if pid not in self.workers:  # a child we inherited, as process 1 does
                continue
            slot, generation = self.workers.pop(pid)
            if status:
                self.bury(slot, os.waitstatus_to_exitcode(status))
            slot.let_go()
            slot.state(FREE)
            if status and not slot.words[PID]:  # nor would the next one get further
                self.fork_at = time.monotonic() + 1
            elif status and not self.stopping:
                # A client may have woken him and nobody else; a new worker
                # looks at the queue before it waits.
                self.spawn(1)
            generation.workers -= 1
        for generation in self.generations[:-1]:
            if not generation.workers:
                self.generations.remove(generation)
                generation.close()
        self.close_removed()
        if self.retiring and not self.retiring.idle(self.states()):
            self.retiring = None
            say("configuration reloaded")
            notify("READY=1")

    def bury(self, slot: Slot, code: int) -> None:
        """Write the log line that a worker could not write itself."""
        if row := slot.row():
            session = Session.from_row(row, slot.words[UP], slot.words[DOWN])
            ends = {-signal.SIGTERM: OPERATOR, -signal.SIGALRM: DRAINED}
            outcome = ends.get(code, KILLED).word
            self.generation.log.write(session, outcome, slot)
        slot.count()  # who was killed behind his line

    def keep_spares(self) -> None:
        """Fork until enough workers are idle or every slot is taken."""
        spares = self.generation.config.spare_workers
        missing = spares - self.generation.idle(self.states())
        if missing > 0 and time.monotonic() >= self.fork_at:
            self.spawn(missing)

    def spawn(self, count: int) -> None:
        """Fork some workers, as many as there are slots for, with little in between."""
        slots, number, states, words = [], -1, self.states(), self.board.words
        for _ in range(min(count, self.room(states))):
            number = states.index(FREE, number + 1)
            slot = Slot(self.board, number)
            # Before the fork: the worker may be busy by the time fork() returns here.
            slot.state(self.generation.idle_state)
            slot.take(0)
            slots.append(slot)
            words[USED] = max(words[USED], number + 1)
        # The end of the lifeline is the master's alone: it is his life.
        others = [*self.private, self.generation.lifeline_in]
        for generation in self.generations[:-1]:
            others += generation.descriptors()
        pids = []
        # Held across the forks: until a worker lets go of the wake pipe, a
        # signal meant for it would be read by the master as its own.
        signal.pthread_sigmask(signal.SIG_BLOCK, MASTER_SIGNALS)
        try:
            for slot in slots:
                pid = os.fork()
                if pid == 0:
                    self.become_worker(slot, others)
                pids.append(pid)
            self.fork_failing = False
        except OSError as error:
            words[FORKS_FAILED] += 1
            if not self.fork_failing:
                say(f"cannot fork a worker: {reason(error)}")
            self.fork_failing, self.fork_at = True, time.monotonic() + 1
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, MASTER_SIGNALS)
        for pid, slot in zip(pids, slots):
            words[FORKS] += 1
            self.workers[pid] = slot, self.generation
            self.generation.workers += 1
        for slot in slots[len(pids) :]:
            slot.state(FREE)

    def become_worker(self, slot: Slot, others: list[int]) -> NoReturn:
        """Serve clients in this new process, and never return."""
        status = 1
        try:
            signal.set_wakeup_fd(-1)  # or a signal to us would be the master's
            for fd in others:
                os.close(fd)
            worker = Worker(
                self.generation, self.board, slot, self.poke_in, self.pressure_out
            )
            signal.signal(signal.SIGTERM, worker.end)  # the operator's hand
            if os.geteuid() != 0:
                # Serving does not need to fork, nor threads; root is above that limit.
                resource.setrlimit(resource.RLIMIT_NPROC, (0, 0))
            signal.pthread_sigmask(signal.SIG_UNBLOCK, MASTER_SIGNALS)
            slot.take(worker.pid)
            worker.run()
            status = 0
        except Refused:  # drained before there was a client
            status = 0
        except OSError as error:
            self.board.say(f"a worker ends early: {reason(error)}")
        except Exception:
            sys.excepthook(*sys.exc_info())  # it needs nothing that is not there
        finally:
            # Not sys.exit(): we inherited the master's atexit list, pid file included.
            os._exit(status)

    def reload(self) -> None:
        """Put a new configuration in force, or say why the old one stays."""
        notify(f"RELOADING=1\nMONOTONIC_USEC={time.monotonic_ns() // 1000}")
        try:
            fresh = self.load(self.generation)
        except (ConfigError, OSError, ImportError, ValueError) as error:
            why = reason(error) if isinstance(error, OSError) else error
            say(f"configuration not reloaded, the old one stays: {why}")
            notify("READY=1")
            return
        if not os.path.sameopenfile(self.generation.log.fd, fresh.log.fd):
            self.board.words[LOG_CUT] = 0  # half a line stays where it is
        gc.collect()  # of generations gone by: their parts refer to each other
        old = self.generation
        wanted = set(fresh.listeners.values())
        had = [*self.removed, *old.listeners.values()]
        self.removed = [s for s in dict.fromkeys(had) if s not in wanted]
        # The new workers take what is still queued at a removed listener.
        for number, listener in enumerate(self.removed):
            fresh.listeners[f"removed {number}"] = listener
        self.generation = fresh
        self.generations.append(fresh)
        self.board.describe(fresh.config.max_workers)
        self.fork_at = 0.0
        self.keep_spares()
        if not self.replaced:
            self.retire_at = time.monotonic() + RETIRE_TIMEOUT
        self.replaced.append(old)
        self.retire()

    def retire(self) -> None:
        """Send the idle workers of earlier configurations away, once there are new.

        Or after a while without: it may be their room that the new ones lack.
        """
        if self.replaced and (
            not self.fork_failing or time.monotonic() >= self.retire_at
        ):
            if self.fork_failing:
                say("no worker has the new configuration: the old ones make room")
            self.board.words[RETIRED_BELOW] = self.generation.number
            for old in self.replaced:
                if old.workers:
                    os.write(old.lifeline_in, ROOM)
            self.retiring, self.replaced = self.replaced[-1], []

    def close_removed(self) -> None:
        """Shut listeners that are no longer wanted, once nobody waits there."""
        busy = select_now(self.removed)
        for listener in self.removed:
            if listener not in busy:
                # Not close() alone: busy workers have it open too.
                with contextlib.suppress(OSError):
                    listener.shutdown(socket.SHUT_RDWR)
                listener.close()
        self.removed = busy
        listeners = self.generation.listeners
        if gone := [n for n, s in listeners.items() if s.fileno() < 0]:
            for name in gone:
                del listeners[name]

    def drain(self) -> None:
        """Let busy workers finish until drain_timeout, then end them."""
        notify("STOPPING=1")
        self.board.words[RETIRED_BELOW] = self.generation.number + 1
        for generation in self.generations:
            os.close(generation.lifeline_in)
            generation.lifeline_in = -1
        for name, listener in self.generation.listeners.items():
            if not name.startswith("systemd "):  # those are not ours to shut
                with contextlib.suppress(OSError):
                    listener.shutdown(socket.SHUT_RDWR)
        patience = self.generation.config.drain_timeout
        deadline, end = time.monotonic() + patience + 2, signal.SIGTERM
        with self.steady():
            self.reap()
            states = self.states()
            if busy := states.count(BUSY):
                say(f"stopping: {busy} sessions have {patience:g} seconds to end")
        while self.workers:
            with self.steady():
                if self.hurried or time.monotonic() > deadline:
                    self.hurried = False
                    for pid in self.workers:
                        os.kill(pid, end)
                    deadline, end = time.monotonic() + 5, signal.SIGKILL
                for byte in self.sleep():
                    self.act(byte)
                self.reap()
                self.show_title()
        signal.pthread_sigmask(
            signal.SIG_BLOCK, MASTER_SIGNALS
        )  # one that comes now makes it no failure

    def show_title(self) -> None:
        states = self.states()
        idle = self.generation.idle(states)
        busy = len(states) - states.count(FREE) - idle
        title = f"natwork: master {idle} idle {busy} busy"
        if set_title and title != self.title:
            set_title(title)
            self.title = title
        if (now := time.monotonic()) >= self.notify_at:
            self.notify_at = now + self.notify_pause
            notify(f"WATCHDOG=1\nSTATUS={idle} idle {busy} busy")


# --- Rules --------------------------------------------------------------------
#
# Who is a client, and what may be dialed for him.  The addresses judged are
# the ones that will be dialed, whatever name led to them, and with every IPv4
# address that is written inside an IPv6 one.  Addresses are kept packed, as the
# kernel has them, 4 or 16 bytes: of one length they compare like numbers.


def remembered(seconds: float, ask: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that asks again only after some seconds what it has asked."""
    cached = functools.lru_cache(maxsize=256)(lambda period, *what: ask(*what))
    return lambda *what: cached(time.monotonic() // seconds, *what)


@functools.lru_cache(maxsize=64)
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
    return socket.inet_ntop(INET if len(packed) == 4 else INET6, packed)


TRANSLATED = bytes(8) + b"\xff\xff\0\0"
NAT64, NAT64_LOCAL = bytes.fromhex("0064ff9b0000000000000000"), b"\0\x64\xff\x9b\0\1"
MAPPED = bytes(10) + b"\xff\xff"


class Network(NamedTuple):
    """A block of addresses, from the first to the last."""

    first: bytes
    last: bytes


def parse_network(text: str) -> Network:
    """Return the block that "10.0.0.0/8" or "fd00::1" names; raise ValueError."""
    address, slash, length = text.partition("/")
    packed = pack(address)
    bits = 8 * len(packed)
    if packed.startswith(MAPPED):  # nothing that is judged has this form
        raise ValueError(f"{text!r} is an IPv4 address: write it as one")
    if slash and not (re.fullmatch("[0-9]{1,3}", length) and int(length) <= bits):
        raise ValueError(f"{text!r} has no prefix length from 0 to {bits}")
    hosts = (1 << bits - int(length or bits)) - 1
    first = int.from_bytes(packed, "big") & ~hosts
    return Network(*(n.to_bytes(len(packed), "big") for n in (first, first | hosts)))


def networks(text: str) -> tuple[Network, ...]:
    return tuple(parse_network(word) for word in text.split())


def contains(blocks: Iterable[Network], *found: bytes) -> bool:
    """Return whether one of some addresses lies in one of some blocks."""
    for first, last in blocks:
        for packed in found:
            if len(packed) == len(first) and first <= packed <= last:
                return True
    return False


def forms(packed: bytes) -> list[bytes]:
    """Return an address and the IPv4 addresses it stands for, if any.

    IPv4-mapped and -compatible (RFC 4291), -translated (RFC 2765), 6to4 (RFC 3056),
    Teredo (RFC 4380), NAT64 (RFC 6052, RFC 8215): each reaches an IPv4 host under
    another name.
    """
    if len(packed) == 4:
        return [packed]
    tail = packed[12:]
    if packed.startswith(MAPPED):
        return [tail]  # the kernel dials IPv4
    if packed.startswith(b"\x20\x02"):
        return [packed, packed[2:6]]
    if packed.startswith(b"\x20\x01\0\0"):
        return [packed, packed[4:8], bytes(byte ^ 255 for byte in tail)]
    if packed.startswith((NAT64, TRANSLATED)):
        return [packed, tail]
    if packed.startswith(NAT64_LOCAL):  # whose prefix may be a /48, /56, /64 or /96
        read = [packed[6:8] + packed[9:11], packed[7:8] + packed[9:12]]
        read += [packed[9:13], tail]
        return [packed, *dict.fromkeys(form for form in read if form[0])]
    if packed.startswith(bytes(12)) and tail[:2] != b"\0\0":
        return [packed, tail]
    return [packed]


def address_of(peer: str) -> bytes:
    """Return the address of a peer as the kernel names it, zone and all, packed."""
    return forms(pack(peer.partition("%")[0]))[0]


LINK_LOCAL = networks("169.254.0.0/16 fe80::/10")
CLOSED = (
    ("unspecified", networks("0.0.0.0/8 ::/128")),
    ("loopback", networks("127.0.0.0/8 ::1")),
    ("link-local", LINK_LOCAL),
    ("multicast", networks("224.0.0.0/3 ff00::/8")),  # and the reserved, and broadcast
)


def netlink(kind: int, flags: int, body: bytes) -> Iterator[bytes]:
    """Ask the kernel's routing table; yield the body of each answer; raise OSError."""
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW) as sock:
        sock.settimeout(1)
        sock.send(struct.pack("=IHHII", 16 + len(body), kind, 1 | flags, 1, 0) + body)
        while True:
            data = sock.recv(65536)
            while len(data) >= 16:
                length, answer = struct.unpack_from("=IH", data)
                if answer in (2, 3):  # NLMSG_ERROR, NLMSG_DONE
                    return
                yield data[16:length]
                data = data[(length + 3) & ~3 :]


def attributes(data: bytes) -> dict[int, bytes]:
    """Return the attributes of a netlink answer by their numbers."""
    found = {}
    while len(data) >= 4:
        length, kind = struct.unpack_from("=HH", data)
        found[kind] = data[4:length]
        data = data[(max(length, 4) + 3) & ~3 :]
    return found


class Route(NamedTuple):
    """The way the kernel would take to an address."""

    local: bool  # it is an address of this box
    device: str
    source: str


def find_route(packed: bytes) -> Route | None:
    """Return the kernel's route to an address, None if it has none; raise OSError."""
    family, size = INET if len(packed) == 4 else INET6, len(packed)
    body = struct.pack("=BB10xHH", family, 8 * size, 4 + size, 1) + packed  # RTA_DST
    for data in netlink(26, 0, body):  # RTM_GETROUTE, of which there is one
        found, device = attributes(data[12:]), ""
        index = int.from_bytes(found.get(4, b""), sys.byteorder)  # RTA_OIF
        with contextlib.suppress(OSError):  # none, or it has just gone
            device = socket.if_indextoname(index)
        source = found.get(7, b"")  # RTA_PREFSRC
        # RTN_LOCAL, _BROADCAST, _ANYCAST: this box hears what is sent there.
        return Route(data[7] in (2, 3, 4), device, unpack(source) if source else "")
    return None


# Our own addresses may change, but not between the many things that a page asks for.
route_to = remembered(1.0, find_route)


def device_addresses(device: str) -> list[bytes]:
    """Return the addresses of a network device, packed; none if it is not there.

    Raises OSError.
    """
    found: list[bytes] = []
    try:
        index = socket.if_nametoindex(device)
    except OSError:
        return found
    for data in netlink(22, 0x300, bytes(8)):  # RTM_GETADDR, NLM_F_DUMP
        if struct.unpack_from("=I", data, 4)[0] == index:
            fields = attributes(data[8:])
            found.append(fields.get(2) or fields[1])  # IFA_LOCAL, IFA_ADDRESS
    return found


def parse_ports(text: str) -> range:
    """Return the ports of "80" or "8000-8100"; raise ValueError."""
    match = re.fullmatch("([0-9]{1,5})(?:-([0-9]{1,5}))?", text)
    if match:
        low, high = int(match[1]), int(match[2] or match[1])
        if 1 <= low <= high <= 65535:
            return range(low, high + 1)
    raise ValueError(f"{text!r} is not a port from 1 to 65535, or LOW-HIGH")


class Rule:
    """One line of `rules`; None stands for a part that was not given: any."""

    __slots__ = "allow,blocks,names,ports,sources,text,users,word".split(",")

    def __init__(self, text: str, number: int) -> None:
        """Parse a line; raise ValueError."""
        # A blank behind a comma is no new word.
        verb, *words = re.sub(r"\s*,\s*", ",", text).split()
        if verb not in ("allow", "deny"):
            raise ValueError(f"{text!r} does not begin with allow or deny")
        parts = dict(zip(words[::2], words[1::2]))
        if 2 * len(parts) != len(words):
            raise ValueError(f"{text!r} is not pairs of a word and a list")
        for word in parts:
            if word not in ("from", "user", "to", "port"):
                raise ValueError(f"{word!r} is none of from, user, to, port")
        lists = {word: part.split(",") for word, part in parts.items()}
        if any("" in listed for listed in lists.values()):
            raise ValueError(f"{text!r} has an empty member in a list")
        names, blocks = set(), []
        for target in lists.get("to", ()):
            if "/" in target or ":" in target or re.fullmatch(r"[0-9.-]+", target):
                blocks.append(parse_network(target))
            elif re.fullmatch(r"\*|\.?[\w-]+(\.[\w-]+)*\.?", target, re.ASCII):
                names.add(target.lower().rstrip("."))
            else:
                raise ValueError(f"{target!r} is no CIDR, host.example, .example or *")
        self.word = f"rule-{number}"  # in the log
        self.text = " ".join([verb, *words])
        self.allow = verb == "allow"
        self.sources = tuple(map(parse_network, lists.get("from", ()))) or None
        users = (printable(user.encode()) for user in lists.get("user", ()))
        self.users = frozenset(users) or None
        self.names = frozenset(names) if "to" in lists else None
        self.blocks = tuple(blocks)
        self.ports = tuple(map(parse_ports, lists.get("port", ()))) or None

    def matches(
        self, client: bytes, user: str, host: str, port: int, found: list[bytes]
    ) -> bool:
        """Return whether every part of the rule that was given fits."""
        if self.sources is not None and not contains(self.sources, client):
            return False
        if self.users is not None and user not in self.users:
            return False
        if self.ports is not None:
            for ports in self.ports:
                if port in ports:
                    break
            else:
                return False
        return self.names is None or self.names_target(host, found)

    def names_target(self, host: str, found: list[bytes]) -> bool:
        assert self.names is not None
        if "*" in self.names or host in self.names:
            return True
        if contains(self.blocks, *found):
            return True
        # ".example" is example and everything below it.
        labels = host.split(".")
        return any("." + ".".join(labels[n:]) in self.names for n in range(len(labels)))

    def takes_mail(self) -> bool:
        """Return whether it names port 25 expressly."""
        return range(25, 26) in (self.ports or ())


class Uplink(NamedTuple):
    """A way out: a source address, or a device by name."""

    name: str
    packed: bytes  # empty for a device
    number: int  # on the scoreboard


def parse_uplink(text: str, number: int = 0) -> Uplink:
    """Return the uplink a word of `outside` names; raise ValueError."""
    with contextlib.suppress(ValueError):
        packed = pack(text)
        return Uplink(unpack(forms(packed)[0]), forms(packed)[0], number)
    # At most the kernel's IFNAMSIZ, less the final NUL; and no address misspelled.
    if not re.fullmatch(r"(?![0-9.]+\Z)[\w.@-]{1,15}", text, re.ASCII):
        raise ValueError(f"{text!r} is neither an address nor a device name")
    return Uplink(text, b"", number)


# What the rules say of one address: OK or another outcome, and the rule in words.
Verdict = tuple[Outcome, str]


def denied(word: str, rule: str) -> Verdict:
    return DENIED._replace(word=f"denied-{word}"), rule


class Policy:
    """Who is a client, and what is dialed how: from `inside` to `bind_ports`."""

    def __init__(self, config: Config, listeners: Iterable[tuple[Any, ...]]) -> None:
        """Parse the settings; listeners are the gateway's own addresses and ports.

        Raises ConfigError.
        """
        self.listeners: dict[int, list[bytes]] = {}  # port -> addresses
        self.listens(listeners)
        self.own_names = "localhost", config.name.lower()
        # The line that we add to a message, by its sender's minor version.
        self.via = [f"Via: 1.{minor} {config.name}\r\n".encode() for minor in (0, 1)]
        try:
            setting = "inside"
            self.inside = networks(config.inside)
            setting, lines = "rules", config.lines("rules")
            self.rules = [Rule(line, n) for n, line in enumerate(lines, 1)]
            setting, words = "outside", config.outside.split()
            self.uplinks = [parse_uplink(word, n) for n, word in enumerate(words)]
            setting, ports = "bind_ports", config.bind_ports
            self.bind_ports = range(1) if ports == "0" else parse_ports(ports)
        except ValueError as error:
            raise config.refuse(setting, str(error)) from None
        self.closed = (*CLOSED, ("inside", self.inside))
        self.placed = functools.lru_cache(maxsize=64)(self.place)

    def listens(self, listeners: Iterable[tuple[Any, ...]]) -> None:
        """Learn addresses and ports of the gateway itself."""
        for host, port, *_ in listeners:
            self.listeners.setdefault(port, []).append(pack(host.partition("%")[0]))

    def place(self, peer: str) -> tuple[bool, bool]:
        """Return whether a peer is inside, and whether its address is link-local."""
        packed = address_of(peer)
        return contains(self.inside, packed), contains(LINK_LOCAL, packed)

    def is_client(
        self, peer: str, address: tuple[Any, ...], sock: socket.socket
    ) -> bool:
        """Return whether a peer is on the inside, and came to us from there.

        address is his as accept() has it: it names the device of a link-local one.
        """
        inside, near = self.placed(peer)
        if not inside or not self.uplinks and not near:
            return inside
        scope = address[3] if near and len(address) == 4 else 0
        return self.comes_from_inside(peer, scope, address_of(sock.getsockname()[0]))

    def comes_from_inside(self, peer: str, scope: int, here: bytes | None) -> bool:
        """Return whether a peer of an inside address has come from there.

        here is the address of ours that he came to, None for one of the inside.
        """
        near, route = self.placed(peer)[1], route_to(address_of(peer))
        devices = {route.device} if route else set()
        if near and scope:
            # Each device has these addresses: the one he came by says his side.
            devices = {socket.if_indextoname(scope)}
        for uplink in self.uplinks:
            if here == uplink.packed or not uplink.packed and uplink.name in devices:
                return False
            if not uplink.packed and here in device_addresses(uplink.name):
                return False
        return not near or not self.lead_outside(devices)

    def lead_outside(self, devices: set[str]) -> bool:
        """Return whether one of some devices is the way to the outside."""
        sources = {uplink.packed for uplink in self.uplinks}
        if sources:
            return any(sources.intersection(device_addresses(d)) for d in devices)
        routes = [route_to(pack("192.0.2.1")), route_to(pack("2001:db8::1"))]
        return any(route.device in devices for route in routes if route)

    def is_ours(self, found: list[bytes], port: int) -> bool:
        """Return whether a port of some address is a listener of ours: a loop."""
        for address in self.listeners.get(port, ()):
            for packed in found:
                # Who dials the unspecified address reaches the loopback one.
                if address == packed or not any(packed):
                    return True
                route = None if any(address) else route_to(packed)
                if route and route.local:  # it listens on every address of this box
                    return True
        return False

    def means_us(self, host: str, port: int) -> bool:
        """Return whether a host is this gateway, by name or address, at a listener."""
        if port not in self.listeners:
            return False
        try:
            packed = b"" if host in self.own_names else forms(pack(host))[0]
            return not packed or any(packed) and self.is_ours([packed], port)
        except ValueError:
            return False

    def is_near(self, packed: bytes) -> bool:
        """Return whether an address is one of the inside, or of this box alone."""
        return any(contains(blocks, *forms(packed)) for _, blocks in self.closed)

    def closes(self, found: list[bytes]) -> str:
        """Return which built-in rule denies an address, "" if none does."""
        for word, blocks in self.closed:
            if contains(blocks, *found):
                return word
        for packed in found:
            if (route := route_to(packed)) and route.local:
                return "own"
        return ""

    def judge(
        self,
        client: str,
        user: str,
        host: str,
        port: int,
        packed: bytes,
        redirected: bool = False,
    ) -> Verdict:
        """Return what the first rule that fits says of dialing an address.

        host is what the client asked for, lower case; packed what it led to.
        """
        user = user.partition(";")[0]  # behind it stands what he says of himself
        host = host.rstrip(".")
        # Who was redirected did not choose a gateway to send his mail through.
        mail = port == 25 and not redirected
        found = forms(packed)
        if self.is_ours(found, port):
            return LOOP, "the gateway's own listener"
        who = address_of(client)
        for rule in self.rules:
            if not rule.matches(who, user, host, port, found):
                continue
            text = f"{rule.word.replace('-', ' ')}: {rule.text}"
            if not rule.allow:
                return denied(rule.word, text)
            # What an allow does not name expressly stays closed: on to the next.
            if mail and not rule.takes_mail():
                continue
            for form in found:
                if not contains(rule.blocks, form):
                    break
            else:
                return OK, text
            if not self.closes(found):
                return OK, text
        if closed := self.closes(found):
            return denied(closed, f"built-in rule: {closed} addresses are not reached")
        if mail:
            return denied("port-25", "built-in rule: port 25 (mail) is not reached")
        return OK, "built-in rule: allow the rest"


# --- Connecting ---------------------------------------------------------------
#
# One way out for every protocol: resolve once, judge each address, and dial the
# judged ones and no other, so that no name can lead elsewhere the second time.
# Addresses are raced as in RFC 8305, so a dead family costs a quarter second;
# uplinks are raced likewise, so a dead line costs one.

IP_BIND_ADDRESS_NO_PORT = 24  # 3.10's socket module lacks the name


def leave_by(sock: socket.socket, uplink: Uplink) -> None:
    """Make a socket that has no address yet leave by an uplink; raise OSError."""
    if uplink.packed:
        # The whole port range for each target, not one for all of them.
        sock.setsockopt(socket.SOL_IP, IP_BIND_ADDRESS_NO_PORT, 1)
        sock.bind((uplink.name, 0))
    else:
        # A source address alone leaves the device to the routing table.
        device = uplink.name.encode()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, device)


class Attempt:
    """One connection to be tried."""

    __slots__ = ("at", "packed", "port", "uplink")

    def __init__(
        self, packed: bytes, port: int, uplink: Uplink | None, at: float
    ) -> None:
        """Take an address and a port; at is seconds after the race has begun."""
        self.packed, self.port, self.uplink, self.at = packed, port, uplink, at

    def source(self) -> tuple[Any, ...]:
        """Return the socket address it would come from, port aside; raise OSError."""
        family = INET if len(self.packed) == 4 else INET6
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            if self.uplink:
                leave_by(probe, self.uplink)
            probe.connect((unpack(self.packed), 9))  # no packet is sent
            return probe.getsockname()  # type: ignore[no-any-return]

    def leaves_from(self) -> str:
        """Return the address it would come from, "" if there is no way."""
        try:
            return str(self.source()[0])
        except OSError:
            return ""


Winner = tuple[socket.socket, Attempt]


def retime(waiting: list[Attempt], uplink: Uplink | None, at: float) -> None:
    """Have the next attempt by an uplink begin at a time, and its others behind it.

    Other uplinks keep theirs: it is not for them that one of its attempts failed.
    """
    own = [attempt for attempt in waiting if attempt.uplink == uplink]
    shift = at - own[-1].at if own else 0.0
    for attempt in own:
        attempt.at += shift
    waiting.sort(key=lambda attempt: attempt.at, reverse=True)


def resolve(host: str, port: int) -> list[bytes]:
    """Return the addresses of a host, best first; raise Refused."""
    try:
        return forms(pack(host))[:1]
    except ValueError:
        pass  # it is a name
    began = time.monotonic()
    # The resolver goes on waiting behind a handler of ours.
    handler = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        # As bytes: a str would load the IDNA tables, a megabyte in every worker.
        found = socket.getaddrinfo(host.encode(), port, type=socket.SOCK_STREAM)
    except (socket.gaierror, UnicodeError) as error:
        # The resolver says "try again" of silence and of a refusal alike.
        silent = error.args[0] == socket.EAI_AGAIN and time.monotonic() > began + 1.5
        why = error.args[1] if len(error.args) == 2 else "not a host name"
        outcome = DNS_TIMEOUT if silent else NO_SUCH_HOST
        raise Refused(outcome, f"{host}: {why}") from None
    finally:
        signal.signal(signal.SIGTERM, handler)
    return list(dict.fromkeys(address_of(str(info[4][0])) for info in found))


def interleave(addresses: list[bytes]) -> list[bytes]:
    """Return addresses with the families taking turns, RFC 8305 section 4."""
    first = [a for a in addresses if len(a) == len(addresses[0])]
    second = [a for a in addresses if len(a) != len(addresses[0])]
    turns = [a for pair in zip(first, second) for a in pair]
    return turns + first[len(second) :] + second[len(first) :]


def direct(addresses: list[bytes], port: int) -> list[Attempt]:
    """Return the attempts in their order, by whichever way the routing table has."""
    attempts: list[Attempt] = []
    if len(addresses) > 1:
        addresses = interleave(addresses)
    for packed in addresses:
        attempts.append(Attempt(packed, port, None, len(attempts) * RACE_DELAY))
    return attempts


def plan(
    addresses: list[bytes], port: int, uplinks: list[Uplink], board: Scoreboard
) -> list[Attempt]:
    """Return the attempts in their order: uplinks side by side, failed ones last."""
    if not uplinks:
        return direct(addresses, port)
    attempts: list[Attempt] = []
    if len(addresses) > 1:
        addresses = interleave(addresses)
    begin = 0.0  # of an uplink, which does not wait for all of the one before
    seen: set[int] = set()  # families, as address lengths, that have a way
    for way in sorted(uplinks, key=lambda uplink: board.is_tired(uplink.number)):
        usable = [
            packed
            for packed in addresses
            if not way.packed or len(way.packed) == len(packed)
        ]
        # The second source address of one line, for the other family, is no
        # second line: it does not wait for the first to fail.
        fresh = {len(packed) for packed in usable} - seen
        if attempts and usable:
            begin += RACE_DELAY if fresh else UPLINK_DELAY
        for number, packed in enumerate(usable):
            at = begin + number * RACE_DELAY
            attempts.append(Attempt(packed, port, way, at))
        seen |= fresh
    return sorted(attempts, key=lambda attempt: attempt.at)


def follow(first: list[Attempt], then: list[Attempt]) -> list[Attempt]:
    """Return some attempts, and others that begin behind the last of them."""
    for attempt in then if first else ():
        attempt.at += first[-1].at + RACE_DELAY
    return first + then


def ways(
    policy: Policy, addresses: list[bytes], port: int, board: Scoreboard
) -> list[Attempt]:
    """Return the attempts at addresses that may be dialed, in their order.

    What is near us is not behind a device of the outside: who answers there for
    such an address is somebody else.
    """
    uplinks, near = policy.uplinks, []
    by_address = [uplink for uplink in uplinks if uplink.packed]
    if len(by_address) < len(uplinks):
        near = [packed for packed in addresses if policy.is_near(packed)]
    far = [packed for packed in addresses if packed not in near]
    return follow(plan(near, port, by_address, board), plan(far, port, uplinks, board))


# What a target itself has answered; any other error is the way's.
ANSWERS = ConnectionRefusedError, ConnectionResetError


class Race:
    """Connection attempts side by side, of which the first to succeed wins."""

    def __init__(self, watch: Watch, board: Scoreboard) -> None:
        self.watch, self.board = watch, board
        self.pending: dict[int, Winner] = {}
        self.asked: dict[Uplink, float] = {}  # since when, monotonic
        self.failed: list[tuple[OSError, Attempt]] = []
        self.last: Attempt | None = None  # that was dialed
        self.refused: set[bytes] = set()  # addresses that would say no again

    def run(self, attempts: list[Attempt], timeout: float) -> Winner:
        """Return the socket that connected first; raise Refused if none does.

        timeout is for all attempts together, in seconds.
        """
        now = began = time.monotonic()
        deadline = now + timeout
        waiting = attempts[::-1]  # the next is the last
        try:
            while True:
                while waiting and (not self.pending or now >= began + waiting[-1].at):
                    attempt, running = waiting.pop(), len(self.pending)
                    early = began + attempt.at - now
                    if early > 0:  # nothing is under way: all come sooner by that
                        for other in waiting:
                            other.at -= early
                    if attempt.packed not in self.refused:
                        if winner := self.start(attempt):
                            return winner
                    delay = RACE_DELAY if len(self.pending) > running else 0.0
                    if waiting:
                        retime(waiting, attempt.uplink, now - began + delay)
                if not self.pending:
                    raise self.defeat()
                until = min(began + waiting[-1].at, deadline) if waiting else deadline
                wanted = dict.fromkeys(self.pending, POLLOUT)
                ready = self.watch.wait(wanted, until - now)
                now = time.monotonic()
                for fd in ready:
                    _, attempt = self.pending[fd]
                    if winner := self.settle(fd):
                        return winner
                    retime(waiting, attempt.uplink, now - began)
                if now >= deadline:
                    raise Refused(CONNECT_TIMEOUT, f"no answer within {timeout:g} s")
        finally:
            for sock, _ in self.pending.values():
                sock.close()

    def start(self, attempt: Attempt) -> Winner | None:
        """Begin an attempt; return it if it has succeeded at once."""
        family = INET if len(attempt.packed) == 4 else INET6
        where = unpack(attempt.packed), attempt.port
        try:
            sock = socket.socket(family, STREAM | socket.SOCK_NONBLOCK)
        except OSError as error:
            return self.fail(attempt, error)
        try:
            if attempt.uplink:
                leave_by(sock, attempt.uplink)
            self.last = attempt
            number = sock.connect_ex(where)
            if number == errno.EADDRNOTAVAIL:  # no port is left, as EAGAIN once said
                number = errno.EAGAIN
            if number not in (0, errno.EINPROGRESS):
                raise OSError(number, os.strerror(number))
        except OSError as error:
            sock.close()
            return self.fail(attempt, error)
        if attempt.uplink:
            self.asked.setdefault(attempt.uplink, time.monotonic())
        if not number:
            return self.win(sock, attempt)
        self.pending[sock.fileno()] = sock, attempt
        return None

    def settle(self, fd: int) -> Winner | None:
        """Return the attempt of a descriptor that is ready, if it succeeded."""
        sock, attempt = self.pending.pop(fd)
        if number := sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
            sock.close()
            return self.fail(attempt, OSError(number, os.strerror(number)))
        return self.win(sock, attempt)

    def fail(self, attempt: Attempt, error: OSError) -> Winner | None:
        self.failed.append((error, attempt))
        if isinstance(error, ANSWERS):
            self.refused.add(attempt.packed)
        return None

    def win(self, sock: socket.socket, attempt: Attempt) -> Winner:
        """Return the attempt that won, and remember which uplinks were too slow."""
        # An uplink has failed if it was asked first, had its time or an error and no
        # answer, and another has won; not if it has no way there: that costs nothing,
        # and other targets may have one.
        if attempt.uplink:
            late = time.monotonic() - UPLINK_DELAY
            heard = [a.uplink for e, a in self.failed if isinstance(e, ANSWERS)]
            lost = [a.uplink for e, a in self.failed if not isinstance(e, ANSWERS)]
            for uplink, since in self.asked.items():
                if uplink == attempt.uplink:
                    break
                if uplink not in heard and (since <= late or uplink in lost):
                    self.board.note_failure(uplink.number)
        self.last = attempt
        return sock, attempt

    def defeat(self) -> Refused:
        """Return the refusal that fits the attempts that failed."""
        if not self.failed:
            why = "no uplink has an address of the target's family"
            return Refused(UNROUTABLE, why)
        # An answer of the target says more than the want of a route.
        error, attempt = max(self.failed, key=lambda f: isinstance(f[0], ANSWERS))
        outcome = outcome_of(error, CONNECT_FAILED)
        where = endpoint((unpack(attempt.packed), attempt.port))
        return Refused(outcome, f"{where}: {reason(error)}")


def judged(
    worker: Worker,
    policy: Policy,
    session: Session,
    host: str,
    port: int,
    only: str = "",
) -> list[bytes]:
    """Return the addresses of a host that may be dialed; raise Refused if none may."""
    allowed: list[bytes] = []
    peer, user, refusal = worker.peer, session.user, None
    redirected = session.proto == "redirect"
    for packed in [pack(only)] if only else resolve(host, port):
        outcome, rule = policy.judge(peer, user, host, port, packed, redirected)
        if outcome is OK:
            allowed.append(packed)
        else:
            refusal = Refused(outcome, f"{unpack(packed)}: {rule}")
    if not allowed:
        raise refusal or Refused(NO_SUCH_HOST, f"{host} has no address")
    return allowed


CRLF, BLANK_LINE = b"\r\n", b"\r\n\r\n"


def connect(worker: Worker, session: Session, attempts: list[Attempt]) -> socket.socket:
    """Return the connection that is there first; the session learns its two ends.

    Of attempts that all fail it learns the address dialed last.
    """
    race = Race(worker.watch, worker.board)
    try:
        sock, _ = race.run(attempts, worker.config.connect_timeout)
        session.source = endpoint(sock.getsockname())
    finally:
        if last := race.last:
            session.address = endpoint((unpack(last.packed), last.port))
    return sock


def dial_addresses(
    worker: Worker, policy: Policy, session: Session, addresses: list[bytes], port: int
) -> socket.socket:
    """Return a connection to one of the addresses that may be dialed; raise Refused."""
    if policy.uplinks:  # else no call for nothing: each weighs in every worker
        attempts = ways(policy, addresses, port, worker.board)
    else:
        attempts = direct(addresses, port)
    return connect(worker, session, attempts)


def dial(
    worker: Worker,
    policy: Policy,
    session: Session,
    host: str,
    port: int,
    only: str = "",
) -> socket.socket:
    """Return a connection to a target, for a session that learns its two ends.

    Of the host's addresses it may be told to take only one.  Raises Refused.
    """
    began = time.monotonic()
    session.parent = None
    if parents := worker.chapters.parents:
        sock: socket.socket = parents.dial(worker, policy, session, host, port, only)
    else:
        addresses = judged(worker, policy, session, host, port, only)
        sock = dial_addresses(worker, policy, session, addresses, port)
    worker.slot.connected(time.monotonic() - began)
    return sock


def deliver(watch: Watch, client: Stream) -> None:
    """Wait until a client has what was sent to him, or takes no more of it.

    RFC 9110 section 9.3.6: a reset would take back what he has not.
    """
    left, deadline = 0, 0.0
    with contextlib.suppress(Refused):
        while count := unsent(client):
            now = time.monotonic()
            if count != left:
                left, deadline = count, now + LINGER_TIMEOUT
            if now >= deadline or watch.wait({client.fd: 0}, 0.05):
                return


def tunnel(
    worker: Worker, session: Session, client: Stream, server: Stream, opening: bytes
) -> None:
    """Join a client and his server, after a few bytes to the client, until both end.

    Closes the server.  Raises Refused when a side is lost or silent for too
    long; then both were reset, because the end of a stream is here the end of
    what it says.
    """
    server.converse()
    up = Lane(worker.watch, client, server, worker.config.tunnel_timeout)
    down = Lane(worker.watch, server, client, worker.config.tunnel_timeout)
    up.script, down.script = up.tunnel(down), down.tunnel(up)
    down.out += opening
    try:
        relay(worker.watch, worker.slot, up, down)
        if up.abandoned:
            raise Refused(SERVER_GONE, "the server took no more")
    except (Refused, IdleTimeout) as error:
        server.abort()
        if isinstance(error, Refused) and error.outcome is SERVER_GONE:
            deliver(worker.watch, client)
        client.abort()
        if isinstance(error, Refused):
            raise
        raise Refused(IDLE, "nothing moved") from None
    finally:
        session.up += up.moved
        session.down += down.moved
        server.close()


def linger(worker: Worker, client: Stream) -> None:
    """Part so that the last answer arrives: RFC 9112 section 9.6.

    To close a socket with unread bytes resets it, and the reset may overtake
    the answer; so these are read and thrown away for a moment, or for longer
    while he sends and has not taken it all.
    """
    began = heard = time.monotonic()
    taken = False
    client.end()
    with contextlib.suppress(OSError, Refused):
        while True:
            if not taken and not unsent(client):
                taken = True
                worker.slot.let_go()  # he knows that it is over, and may come again
            now = time.monotonic()
            end = began + (LINGER_TIMEOUT if taken else LINGER_LIMIT)
            left = min(end, heard + LINGER_TIMEOUT) - now
            if left <= 0:
                return
            pause = left if taken else 0.05
            if worker.watch.wait({client.fd: POLLIN}, pause):
                if not client.sock.recv(COPY_SIZE):
                    return
                heard = time.monotonic()


# --- HTTP ---------------------------------------------------------------------
#
# Heads are parsed strictly into parts, and what is sent on is built from the
# parts: two parsers that disagree on a malformed line are how requests are
# smuggled, so there is nothing here for a second parser to disagree with.  Each
# request on a kept-alive connection is parsed, judged and routed by itself.

TCHAR = rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]"  # RFC 9110 section 5.6.2
TOKEN = TCHAR + b"+"
# By its first letter HTTP is told from SOCKS.
REQUEST_LINE = re.compile(
    rb"([A-Za-z]%b*) ([!-~\x80-\xff]+) HTTP/([0-9]\.[0-9])" % TCHAR
)
STATUS_LINE = re.compile(
    rb"HTTP/([0-9])\.([0-9]) ([1-5][0-9][0-9])(?: ([\t -~\x80-\xff]*))?"
)
# RFC 9112 section 5.1: a space before the colon is an error in a request, and
# to be removed from a response.  A folded line, a bare CR or LF match neither.
REQUEST_FIELDS = re.compile(rb"(?:%b:[\t -~\x80-\xff]*\r\n)*" % TOKEN)
RESPONSE_FIELDS = re.compile(rb"(?:%b[\t ]*:[\t -~\x80-\xff]*\r\n)*" % TOKEN)
FIELD = re.compile(rb"([^:\t ]+)[\t ]*:([^\r]*)\r\n")
SPOILED = re.compile(rb"(?<!\r)\n|\r(?!\n|\Z)|\0")  # in a head that is not all there
DIGITS = re.compile(rb"[0-9]{1,19}")
QUOTED = rb'"(?:[\t !#-\[\]-~\x80-\xff]|\\[\t -~\x80-\xff])*"'
CHUNK_LINE = re.compile(
    rb"([0-9A-Fa-f]{1,16})(?:[\t ]*;[\t ]*%b(?:[\t ]*=[\t ]*(?:%b|%b))?)*\r\n"
    % (TOKEN, TOKEN, QUOTED)
)
SITE = re.compile(rb"([A-Za-z][A-Za-z0-9+.-]*)://([^/?#]*)")
AUTHORITY = re.compile(rb"(\[[0-9A-Fa-f:.]+\]|[0-9A-Za-z._~-]{1,255})(?::([0-9]*))?")
HOST = re.compile(
    rb"(?:\[([0-9A-Fa-f:.]+)\]|(?:[0-9A-Za-z._~!$&'()*+;=-]|%[0-9A-Fa-f]{2})*)"
    rb"(?::[0-9]*)?"
)

DEFAULT_PORTS = {b"http": 80, b"ftp": 21, b"gopher": 70}
OURSELVES = b""  # the scheme of what is asked of the gateway itself
NUMBER = re.compile("[0-9]+|0x[0-9a-f]*")
USER_OR_QUERY = re.compile(rb"(?<=//)[^/?#]*@|\A[^/?#]*@|(?:\?|%09).*", re.DOTALL)
BEFORE_AT_OR_QUERY = re.compile(rb"\A.*@|(?:\?|%09).*", re.DOTALL)

Names = dict[bytes, list[bytes]]

MISUNDERSTOOD = (400, 408, 414, 417, 431, 501, 505)
SERVER_FAULTS = (
    "connection_terminated http_protocol_error http_response_timeout".split()
)
CHUNKED = -1  # a body's length: known chunk by chunk
OTHER_CODING = "a transfer coding other than chunked"
ENDLESS = -2  # a response body's length: until the connection closes
# RFC 9110 section 7.6.1, and what this hop alone may read.
HOP_BY_HOP = frozenset(
    b"connection proxy-connection proxy-authorization keep-alive te transfer-encoding "
    b"upgrade".split()
)
# Dropped from every message, to be written anew; and from requests only.
REWRITTEN = HOP_BY_HOP | {b"content-length"}
REWRITTEN_ASKED = REWRITTEN | {b"host", b"expect"}
# Naming these in Connection must not strip what others rely on.
END_TO_END = frozenset(
    b"authorization cache-control content-length cookie date forwarded host set-cookie "
    b"via x-forwarded-for".split()
)
# RFC 9110 section 6.5.1: framing, routing and identity do not come in trailers.
NOT_IN_TRAILERS = (HOP_BY_HOP | END_TO_END).union(
    b"content-encoding content-range content-type expect max-forwards range trailer "
    b"proxy-authenticate www-authenticate".split()
)
IDEMPOTENT = {b"GET", b"HEAD", b"OPTIONS", b"TRACE", b"PUT", b"DELETE"}


def members(names: Names, name: bytes) -> list[bytes]:
    """Return the members of a list field, lower case, from all its lines."""
    listed: list[bytes] = []
    for line in names.get(name, ()):
        for part in line.split(b","):
            if member := part.strip(b" \t").lower():
                listed.append(member)
    return listed


def is_host(value: bytes) -> bool:
    """Return whether a Host field is one: RFC 9112 section 3.2, RFC 3986."""
    match = HOST.fullmatch(value)
    if not match or not match[1]:
        return bool(match)
    try:
        return len(pack(match[1].decode())) == 16
    except ValueError:
        return False


class Fields:
    """The field lines of a head, parsed, and what follows from them alone."""

    __slots__ = ("fault", "length", "lines", "names", "onward", "options")

    def __init__(self, section: bytes, asked: bool) -> None:
        """Take a section of whole lines, asked: of a request; raise ValueError."""
        if not (REQUEST_FIELDS if asked else RESPONSE_FIELDS).fullmatch(section):
            raise ValueError("malformed field line")
        self.lines: list[tuple[bytes, bytes]] = []
        self.names: Names = {}  # lower case -> values, in their order
        for name, text in FIELD.findall(section):
            value = text.strip(b" \t")
            self.lines.append((name, value))
            self.names.setdefault(name.lower(), []).append(value)
        for host in self.names.get(b"host", ()):
            if asked and not is_host(host):
                raise ValueError("invalid Host field")
        self.options = members(self.names, b"connection")
        # The lines that travel on: not those of one hop, by their name or
        # because Connection says so.
        dropped = REWRITTEN_ASKED if asked else REWRITTEN
        if self.options:
            dropped = dropped | (set(self.options) - END_TO_END)
        self.onward = self.without(dropped)
        self.length, self.fault = self.framing()

    def framing(self) -> tuple[int | None, str]:
        """Return the length of the body, None where they say nothing; or their fault.

        RFC 9112 sections 6.1 to 6.3; where it leaves a choice, the stricter one.
        """
        lengths = self.names.get(b"content-length")
        if b"transfer-encoding" in self.names:
            codings = members(self.names, b"transfer-encoding")
            if lengths:
                return CHUNKED, "both Content-Length and Transfer-Encoding"
            if codings[-1:] != [b"chunked"] or codings.count(b"chunked") > 1:
                return CHUNKED, "Transfer-Encoding does not end in one chunked"
            return CHUNKED, OTHER_CODING if len(codings) > 1 else ""
        if not lengths:
            return None, ""
        if len(lengths) > 1 or not DIGITS.fullmatch(lengths[0]):
            return None, "invalid Content-Length"
        length = int(lengths[0])
        return length, "Content-Length beyond all measure" if length >= 1 << 63 else ""

    def without(self, dropped: frozenset[bytes]) -> bytes:
        """Return the lines less those dropped, by their names in lower case."""
        kept: list[bytes] = []
        for name, value in self.lines:
            if name.lower() not in dropped:
                kept += name, b": ", value, CRLF
        return b"".join(kept)


def parse_request_line(line: bytes) -> tuple[bytes, bytes, int]:
    """Return method, target and minor version; raise Refused."""
    if len(line) > LINE_LIMIT:
        raise Refused(URI_TOO_LONG, f"request line over {LINE_LIMIT} bytes")
    match = REQUEST_LINE.fullmatch(line)
    if not match:
        raise Refused(BAD_REQUEST, "malformed request line")
    method, target, version = match.groups()
    if version[:1] != b"1":
        raise Refused(BAD_VERSION, f"HTTP/{version[:1].decode()}, and not HTTP/1")
    if len(method) > METHOD_LIMIT:
        raise Refused(NOT_IMPLEMENTED, f"method of over {METHOD_LIMIT} letters")
    return method, target, 0 if version == b"1.0" else 1


def parse_status_line(line: bytes) -> tuple[int, bytes, int]:
    """Return status, the line as it travels on, and minor version; raise Refused."""
    match = STATUS_LINE.fullmatch(line)
    if not match or match[1] != b"1":
        raise Refused(BAD_RESPONSE, "malformed status line")
    _, minor, status, reason = match.groups(b"")
    onward = b"HTTP/1.1 %b %b\r\n" % (status, reason)
    return int(status), onward, 0 if minor == b"0" else 1


class RequestHead:
    """A request head, parsed; minor is the second digit of its version.

    path is that of its target, once that is parsed.
    """

    __slots__ = ("fields", "method", "minor", "path", "target")

    def __init__(self, head: bytes) -> None:
        """Split a head, without its empty line, into its parts; raise Refused."""
        line, _, section = head.partition(CRLF)
        self.method, self.target, self.minor = parse_request_line(line)
        self.path = self.target
        try:
            self.fields = Fields(section, True)
        except ValueError as error:
            raise Refused(BAD_REQUEST, str(error)) from None
        # RFC 9112 section 3.2: one, and only one.
        hosts = len(self.fields.names.get(b"host", ()))
        if hosts != 1 and (hosts or self.minor):
            raise Refused(BAD_REQUEST, f"{hosts or 'no'} Host fields")


class ResponseHead:
    """A response head, parsed; minor is the second digit of its version."""

    __slots__ = ("fields", "line", "minor", "status")

    def __init__(self, head: bytes) -> None:
        """Split a head, without its empty line, into its parts; raise Refused."""
        line, _, section = head.partition(CRLF)
        self.status, self.line, self.minor = parse_status_line(line)
        try:
            self.fields = Fields(section, False)
        except ValueError as error:
            raise Refused(BAD_RESPONSE, str(error)) from None


def body_length(head: RequestHead | ResponseHead, bad: Outcome) -> int | None:
    """Return a body's length by its fields, CHUNKED, or None: the fields say nothing.

    Raises Refused with the outcome given.
    """
    fields = head.fields
    if fields.length == CHUNKED and not head.minor:
        raise Refused(bad, fields.fault or "Transfer-Encoding in HTTP/1.0")
    if fields.fault:
        # In a request such a coding is no fault, but nothing that we do.
        lacking = fields.fault is OTHER_CODING and bad is BAD_REQUEST
        raise Refused(NOT_IMPLEMENTED if lacking else bad, fields.fault)
    return fields.length


class Target:
    """Where a request wants to go, but for its path: RFC 9112 section 3.2."""

    __slots__ = ("authority", "host", "login", "port", "scheme", "shown")

    def __init__(
        self,
        host: str,
        port: int,
        authority: bytes,
        scheme: bytes = b"http",
        login: bytes = b"",
    ) -> None:
        self.host, self.port = host, port  # lower case; IPv6 without brackets
        self.authority = authority  # for Host, as the client spelled it
        self.scheme = scheme
        self.login = login  # user:password of an ftp URL, as it is spelled there
        self.shown = b"%b://%b" % (scheme, endpoint((host, port)).encode())


@functools.lru_cache(maxsize=32)
def parse_authority(raw: bytes, default: int) -> tuple[str, int]:
    """Return host and port of "host:port"; default 0 demands one.  Raises Refused."""
    match = AUTHORITY.fullmatch(raw)
    if not match:
        raise Refused(BAD_REQUEST, "malformed host or port in the target")
    digits = (match[2] or b"").lstrip(b"0")  # of which there may be any number
    port = int(digits[:6] or b"0") if match[2] else default
    if not match[2] and not default:
        raise Refused(BAD_REQUEST, "no port in the target, which must be HOST:PORT")
    if not 0 < port < 65536:
        raise Refused(BAD_REQUEST, "port not from 1 to 65535 in the target")
    host = match[1].decode().lower()
    # What ends in a number is an IPv4 address or nothing: resolvers take 127.1,
    # 0x7f.1 and 2130706433 for 127.0.0.1.
    last = host.removesuffix(".").rpartition(".")[2]
    if host[0] == "[" or NUMBER.fullmatch(last):
        bare = host.strip("[]")
        try:
            if (len(pack(bare)) == 16) != (host[0] == "["):
                raise ValueError(f"{host!r} is not an IPv6 address")
        except ValueError as error:
            raise Refused(BAD_REQUEST, str(error)) from None
        host = bare
    return host, port


def parse_site(raw: bytes) -> Target:
    """Return the target of a URL that ends before its path; raise Refused."""
    match = SITE.fullmatch(raw)
    if not match:
        raise Refused(BAD_REQUEST, "this is a proxy: the target must be a whole URL")
    scheme = match[1].lower()
    if scheme not in DEFAULT_PORTS:
        raise Refused(NOT_IMPLEMENTED, f"scheme {printable(scheme, 20)}")
    login, at, authority = match[2].rpartition(b"@")
    if at and scheme != b"ftp":
        raise Refused(BAD_REQUEST, "user name in the target")
    host, port = parse_authority(authority, DEFAULT_PORTS[scheme])
    return Target(host, port, authority.removesuffix(b":"), scheme, login)


def parse_target(method: bytes, raw: bytes) -> tuple[Target, bytes]:
    """Return the target of a request in authority- or absolute-form, and its path.

    The path is as the request line to a server has it: origin-form, or *.
    Raises Refused.
    """
    if method == b"CONNECT":
        return Target(*parse_authority(raw, 0), raw), b""
    pieces = raw.split(b"/", 3)
    site = raw if len(pieces) < 4 else raw[: -1 - len(pieces[3])]
    if b"?" in site:
        site = site.partition(b"?")[0]
    path = raw[len(site) :]
    if b"#" in raw and SITE.match(raw):
        raise Refused(BAD_REQUEST, "fragment in the target")
    target = parse_site(site)
    if not path or path[:1] != b"/":
        path = b"*" if method == b"OPTIONS" and not path else b"/" + path
    return target, path


def host_named(head: RequestHead) -> str:
    """Return the host that the Host field names, "" for none."""
    with contextlib.suppress(Refused):
        return parse_authority(head.fields.names.get(b"host", [b""])[0], 80)[0]
    return ""


def credentials(value: bytes) -> tuple[bytes, bytes] | None:
    """Return name and password of a Basic value, RFC 7617; None for anything else."""
    scheme, _, text = value.partition(b" ")
    if scheme.lower() != b"basic":
        return None
    try:
        name, _, password = binascii.a2b_base64(text).partition(b":")
    except ValueError:
        return None
    return name, password


def anonymous(worker: Worker) -> str:
    """Return the user of a client who gives no name; raise Refused if he must."""
    if worker.asks_names():
        raise Refused(AUTH_REQUIRED, "a name and a password are needed")
    return "-"


def framing_lines(length: int | None) -> bytes:
    if length is None or length == ENDLESS:
        return b""
    if length == CHUNKED:
        return b"Transfer-Encoding: chunked\r\n"
    return b"Content-Length: %d\r\n" % length


def read_line(lane: Lane, limit: int, bad: Outcome) -> Script:
    """Take one line off a lane's source, CRLF included; raise Refused."""
    received = lane.source.received
    while (end := received.find(b"\n", 0, limit)) < 0:
        if len(received) >= limit:
            why = f"line over {limit} bytes" if limit > 2 else "chunk beyond its size"
            raise Refused(bad, f"{why} in a chunked body")
        yield from lane.need()
    line = lane.source.take(end + 1)
    if not line.endswith(b"\r\n"):
        raise Refused(bad, "bare LF in a chunked body")
    return line


def chunked(
    lane: Lane, head: RequestHead | ResponseHead, framed: bool, bad: Outcome
) -> Script:
    """Move a message's chunked body, as chunks or (not framed) bare.

    RFC 9112 section 7.1.  Raises Refused with the outcome bad when it is malformed.
    """
    while True:
        line = yield from read_line(lane, CHUNK_LINE_LIMIT, bad)
        match = CHUNK_LINE.fullmatch(line)
        if not match or (size := int(match[1], 16)) >= 1 << 63:
            raise Refused(bad, "malformed chunk size")
        if not size:
            break
        if framed:
            lane.out += b"%x\r\n" % size
        yield from lane.move(size)
        if (yield from read_line(lane, 2, bad)) != b"\r\n":
            raise Refused(bad, "chunk longer than its size")
        if framed:
            lane.out += b"\r\n"
    section = b""
    while (line := (yield from read_line(lane, HEAD_LIMIT, bad))) != b"\r\n":
        section += line
        if len(section) > HEAD_LIMIT:
            raise Refused(bad, f"trailers over {HEAD_LIMIT} bytes")
    try:
        trailers = Fields(section, True)
    except ValueError as error:
        raise Refused(bad, str(error)) from None
    if framed:
        dropped = NOT_IN_TRAILERS | set(head.fields.options)
        lane.out += b"0\r\n%b\r\n" % trailers.without(dropped)


@functools.lru_cache(maxsize=1)
def http_date(second: int) -> bytes:
    """Return a time as an IMF-fixdate, RFC 9110 section 5.6.7."""
    return time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(second)).encode()


class Exchange:
    """One request and its answer, both on their way at the same time.

    Most requests end with their head, and most answers come whole with theirs:
    these need no relay.  The lanes are for the others.
    """

    def __init__(
        self, http: Http, head: RequestHead, target: Target, length: int | None
    ) -> None:
        """Get a request ready for its server; raise Refused for a malformed body."""
        self.http, self.head, self.length, self.target = http, head, length, target
        self.server: Stream
        self.server_keeps = False
        self.heard = False  # the server has answered a byte
        self.continued = False  # the client was told to send its body
        self.upgraded = False  # the answer was 101: here begins a tunnel
        self.offered: list[bytes] = []
        fields = head.fields
        if head.minor and b"upgrade" in fields.options:  # RFC 9110 section 7.8
            self.offered = fields.names.get(b"upgrade", [])
        self.is_plain = not (length or self.offered)  # nothing follows the head
        self.out = self.request_head()
        self.sent = 0  # bytes of it, before there was a lane
        self.rest = b""  # of an answer of which the client took but a part
        self.up: Lane | None = None
        if not self.is_plain:
            up = self.up = Lane(http.watch, http.client, None, http.config.idle_timeout)
            up.out += self.out
            up.script = self.ask(up)
            # It takes what has come, and stops: what is malformed reaches nobody.
            up.step()

    def run(self, server: Stream) -> Outcome:
        """Carry the request to its server and the answer back; raise Refused."""
        http, self.server = self.http, server
        if http.parent:
            before = self.out
            parents = http.worker.chapters.parents
            self.out = parents.readdress(before, self.target.authority, http.parent)
            if self.up:
                self.up.out[: len(before)] = self.out
        if self.is_plain:
            self.exchange_heads()
        else:
            server.converse()
            self.exchange_bodies()
        if self.upgraded:
            return ENDED
        # RFC 9112 section 6.3: what comes unasked belongs to no request.
        up = self.up
        if not self.server_keeps or server.received or up and up.abandoned:
            http.drop_server()
        if up and up.abandoned:
            http.keep = False
        if up and not http.keep:
            http.lingers = http.wants_more or up.abandoned or http.talks_on()
        return OK

    def exchange_heads(self) -> None:
        """Send a request that ends with its head, and pass the answer on."""
        http, whole, failed = self.http, False, True
        try:
            whole, failed = self.answer_at_once(), False
        except IdleTimeout:
            raise Refused(ANSWER_TIMEOUT, "the server did not answer") from None
        finally:
            if whole or failed:
                http.session.up += self.sent
            if failed:
                http.drop_server()
        if not whole:
            self.exchange_bodies()

    def exchange_bodies(self) -> None:
        """Carry what is left of a request and of its answer, both ways at once."""
        http, server, up = self.http, self.server, self.up
        patience = http.config.idle_timeout
        if not up:
            up = self.up = Lane(http.watch, http.client, server, patience)
            up.out += self.out[self.sent :]
            up.moved, up.script = self.sent, up.flush()
        up.sink = server
        down = self.down = Lane(http.watch, server, http.client, patience)
        down.out += self.rest
        down.script = down.flush() if self.rest else self.reply(up, down)
        http.join(up, down)

    def answer_at_once(self) -> bool:
        """Send a head, and pass the answer on if it comes whole with its own.

        Return whether that is all.  Raises Refused and IdleTimeout.
        """
        http, server, client = self.http, self.server, self.http.client
        self.sent = server.send(self.out)
        if self.sent < len(self.out):
            return False
        http.worker.slot.moved(self.sent, 0)  # for whoever looks while we wait
        if not http.watch.wait(http.answering, http.config.idle_timeout):
            raise IdleTimeout
        try:
            data = server.sock.recv(COPY_SIZE)
        except OSError:
            return False
        self.heard = bool(data)
        head, end, body = data.partition(BLANK_LINE)
        whole = False
        if end and len(head) <= HEAD_LIMIT - 4:
            response = ResponseHead(head + CRLF)
            length, size = self.lengths(response)
            whole = response.status >= 200 and size == len(body)
        if not whole:
            server.received += data
            return False
        self.decide(response, length)
        answer = self.response_head(response, length) + body
        sent = client.send(answer, 0 if http.keep else socket.MSG_MORE)
        http.session.down += sent
        if sent < len(answer):
            self.rest = answer[sent:]
        elif not http.keep:
            client.end()  # the last of a connection leaves together with this
            http.lingers = http.wants_more or http.talks_on()
        return not self.rest

    def request_head(self) -> bytes:
        """Return the head of the request as it travels on."""
        head, names = self.head, self.head.fields.names
        onward, extra = head.fields.onward, framing_lines(self.length)
        if b"max-forwards" in names and head.method in (b"TRACE", b"OPTIONS"):
            onward = re.sub(rb"(?im)^max-forwards:.*\r\n", b"", onward)
            extra += b"Max-Forwards: %d\r\n" % (int(names[b"max-forwards"][0]) - 1)
        if self.length and head.minor == 1 and members(names, b"expect"):
            extra += b"Expect: 100-continue\r\n"
        if self.offered:
            offered = b", ".join(self.offered)
            extra += b"Connection: upgrade\r\nUpgrade: %b\r\n" % offered
        elif self.is_plain and not self.http.keep:
            # Nobody will ask again.  And of the two it is who closes first that
            # keeps his port for a minute.
            extra += b"Connection: close\r\n"
        line = b"%b %b HTTP/1.1\r\nHost: %b\r\n"
        line %= head.method, head.path, self.target.authority
        return b"".join([line, onward, self.http.via[head.minor], extra, CRLF])

    def ask(self, up: Lane) -> Script:
        """The lane up: the head, the body, and perhaps a tunnel behind it."""
        if self.length == CHUNKED:
            yield from chunked(up, self.head, True, BAD_REQUEST)
        elif self.length:
            yield from up.move(self.length)
        yield from up.flush()
        if self.offered and not self.http.answered:
            yield PAUSE  # reply() goes on with us when it knows
        if self.upgraded:
            yield from up.tunnel(self.down)

    def reply(self, up: Lane, down: Lane) -> Script:
        """The lane down: interim answers, the answer, its body."""
        http, head = self.http, self.head
        for count in range(INTERIM_LIMIT + 1):
            response = yield from self.read_response(down)
            if response.status >= 200 or response.status == 101:
                break
            if count == INTERIM_LIMIT:
                raise Refused(BAD_RESPONSE, f"over {INTERIM_LIMIT} interim responses")
            self.continued |= response.status == 100
            if head.minor == 1:  # RFC 9110 section 15.2: never to an HTTP/1.0 client
                down.out += self.onward(response) + b"\r\n"
                try:
                    yield from down.flush()
                finally:
                    http.midway = bool(down.out)
        if response.status == 101:
            yield from self.switch(response, up, down)
            return
        length, size = self.lengths(response)
        self.decide(response, length)
        self.go_on(up)
        http.worker.begin(http.session)
        before = down.moved
        try:
            down.out += self.response_head(response, length)
            if size == CHUNKED:
                yield from chunked(down, response, head.minor == 1, BAD_RESPONSE)
            elif size == ENDLESS:
                yield from down.move_all(up)
            elif size <= len(down.source.received):
                down.out += down.source.take(size)  # it has come with the head
            else:
                yield from down.move(size)
            yield from down.flush()
        except Refused:
            # An answer of which nothing was sent can still become another.
            http.answered = down.moved > before
            raise
        # Who answers and leaves wants no more; and who waits for the close to come
        # cannot wait for the rest of the request.
        up.abandoned |= not up.done and (http.endless or not self.server_keeps)
        http.endless = False  # it has come to its end

    def read_response(self, down: Lane) -> Script:
        """Take a response head off the server; raise Refused."""
        received, looked = down.source.received, 0
        while (end := received.find(BLANK_LINE, looked, HEAD_LIMIT)) < 0:
            if len(received) >= HEAD_LIMIT:
                raise Refused(BAD_RESPONSE, f"response head over {HEAD_LIMIT} bytes")
            if SPOILED.search(received, looked):
                raise Refused(BAD_RESPONSE, "bare CR or LF, or NUL, in the head")
            if received.find(b"\r\n", looked) >= 0:
                parse_status_line(bytes(received.partition(b"\r\n")[0]))
            looked = max(0, len(received) - 3)
            yield from down.need()
            self.heard = True
        return ResponseHead(down.source.take(end + 4)[:-2])

    def lengths(self, response: ResponseHead) -> tuple[int | None, int]:
        """Return the length that a response tells, and that of what follows its head.

        RFC 9112 section 6.3: to HEAD, and with a 304, a length is told of nothing.
        """
        if response.status == 204:
            return None, 0
        length = body_length(response, BAD_RESPONSE)
        if self.head.method == b"HEAD" or response.status == 304:
            return None if length == CHUNKED else length, 0
        if length is None:
            length = ENDLESS
        return length, length

    def decide(self, response: ResponseHead, length: int | None) -> None:
        """Decide which of the two connections goes on after this answer."""
        http = self.http
        if response.status == 407 and http.parent:  # it is us whom he does not know
            raise Refused(BAD_RESPONSE._replace(word="407"), "it wants a user")
        http.answered = True
        http.session.status = str(response.status)
        closing = response.minor == 0 or b"close" in response.fields.options
        self.server_keeps = not closing and length != ENDLESS
        http.endless = length == ENDLESS or length == CHUNKED and self.head.minor == 0
        if http.keep and (http.endless or http.worker.leaving()):
            http.keep = False

    def go_on(self, up: Lane) -> None:
        """Decide what becomes of a request that is under way when its answer comes."""
        http, up.optional = self.http, True
        if not up.done and up.waits is PAUSE:
            up.step()  # its offer was refused
        if not up.done and not self.is_plain:
            # RFC 9110 section 10.1.1: a client that was not told to go on may not
            # send its body, ever; unless it has begun to, or is of HTTP/1.0.
            begun = up.moved + len(up.out) > len(self.out)
            expects = self.head.minor and members(self.head.fields.names, b"expect")
            waiting = bool(expects) and not (self.continued or begun)
            up.abandoned |= waiting
            http.keep &= self.server_keeps and not up.abandoned

    def onward(self, response: ResponseHead) -> bytes:
        """Return the head of a response as it travels on, less its last lines."""
        return response.line + response.fields.onward + self.http.via[response.minor]

    def response_head(self, response: ResponseHead, length: int | None) -> bytes:
        """Return the head of a final response as it travels on."""
        fields, via = response.fields, self.http.via[response.minor]
        lines = [response.line, fields.onward, via]
        if b"date" not in fields.names:
            lines.append(b"Date: %b\r\n" % http_date(int(time.time())))
        if self.head.minor == 1 or length != CHUNKED:
            lines.append(framing_lines(length))
        if response.status == 426 and b"upgrade" in fields.names:
            # RFC 9110 section 15.5.22: it must say to what.
            wanted = b", ".join(fields.names[b"upgrade"])
            lines.append(b"Connection: upgrade\r\nUpgrade: %b\r\n" % wanted)
        lines.append(CRLF if self.http.keep else b"Connection: close\r\n\r\n")
        return b"".join(lines)

    def switch(self, response: ResponseHead, up: Lane, down: Lane) -> Script:
        """Turn the exchange into a tunnel, if the server took what was offered."""
        http = self.http
        chosen = response.fields.names.get(b"upgrade", [])
        taken = set(members({b"": chosen}, b""))
        if not taken or not taken <= set(members({b"": self.offered}, b"")):
            raise Refused(UPGRADE_FAILED, "the server changed to what nobody offered")
        http.keep = False
        http.answered = http.endless = self.upgraded = True
        http.session.proto, http.session.status = "upgrade", "101"
        http.worker.proceed(http.session)
        up.patience = down.patience = http.config.tunnel_timeout
        down.out += self.onward(response)
        lines = b"Connection: upgrade\r\nUpgrade: %b\r\n\r\n"
        down.out += lines % b", ".join(chosen)
        yield from down.flush()
        if up.waits is PAUSE:
            up.step()
        yield from down.tunnel(up)


MARKUP = str.maketrans(
    {"&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;", "'": "&#39;"}
)  # in HTML, for the chapters that write it
Gateway = Callable[["Http", RequestHead, Target, "int | None"], Outcome]


class Http:
    """One client's HTTP connection, and the server connection kept for it."""

    def __init__(
        self,
        worker: Worker,
        policy: Policy,
        client: Stream,
        gateways: dict[bytes, Gateway],
    ) -> None:
        """Serve a client, and those schemes by the gateways given."""
        self.worker, self.config, self.watch = worker, worker.config, worker.watch
        self.policy, self.client, self.gateways = policy, client, gateways
        self.via = policy.via
        self.server: Stream | None = None
        self.answering: dict[int, int]  # what is awaited while it is to answer
        self.server_for = "", "", 0  # the user, host and port it was dialed for
        self.server_ends = "-", "-"  # its address and source, for the log
        self.parent: Any = None  # where the server is one
        self.shown: list[bytes] | None = []  # as last verified, None for nothing
        self.user = "-"
        self.blanks = 0  # octets of empty lines before a request
        self.session: Session

    def serve(self) -> None:
        """Answer requests until the connection is over."""
        try:
            fresh = True  # his first byte is there
            while fresh or self.await_request():
                fresh = False
                self.one()
                if self.lingers:
                    linger(self.worker, self.client)
                if not self.keep:
                    return
                self.blanks = 0
        finally:
            if self.server:
                self.drop_server()

    def one(self) -> None:
        """Answer one request, whatever becomes of it, and write it down."""
        self.head: RequestHead | None = None
        self.keep = False  # the client's connection goes on after this one
        self.wants_more = False  # the client wants it to
        self.answered = False  # a final answer has begun
        self.midway = False  # an interim one has, and has not ended
        self.bare = False  # it was asked for by HEAD
        self.endless = False  # and nothing but the close will end it
        self.lingers = False  # the close is to be staged
        session = self.session = Session(self.worker.name, self.worker.word, "http")
        outcome = BROKEN
        try:
            outcome = self.request()
        except Refused as refusal:
            # What he did to a connection that leads to him is the parent's fault.
            if self.parent and refusal.outcome.error in SERVER_FAULTS:
                refusal = self.worker.chapters.parents.failed(self.parent, refusal)
            outcome = refusal.outcome
            self.name_target()
            self.refuse(refusal)
        except OSError as error:
            outcome = outcome_of(error)
            self.refuse(Refused(outcome, reason(error)))
        finally:
            self.worker.finish(session, outcome.word)

    def name_target(self) -> None:
        """Let the log know the target, as it was spelled if it was not understood."""
        if self.head and self.session.target == "-":
            secret = USER_OR_QUERY
            try:
                parse_target(self.head.method, self.head.target)
            except Refused:  # it may have a password where nobody looks for one
                secret = BEFORE_AT_OR_QUERY
            bare = secret.sub(b"", self.head.target)
            self.session.target = printable(bare, TARGET_SIZE)

    def await_request(self) -> bool:
        """Wait for the first byte of a request; return whether there is one."""
        client, server = self.client, self.server
        received = client.received
        deadline = time.monotonic() + self.config.keepalive_timeout
        while not received or received[:1] == b"\r" and self.drop_blanks():
            quiet = [client, server] if server else [client]
            spoken = self.worker.silence(deadline, quiet, False)
            if not spoken:
                return False
            if server and server.fd in spoken:
                # It closed, or it says what nobody asked: RFC 9112 section 6.3.
                self.drop_server()
                server = None
            if client.fd in spoken and not client.fill():
                return False
        return True

    def drop_blanks(self) -> bool:
        """Drop empty lines before a request, and return whether nothing is left.

        RFC 9112 section 2.2.  There may be a few; the next one is a malformed request.
        """
        received = self.client.received
        while received.startswith(CRLF) and self.blanks < BLANK_LIMIT:
            del received[:2]
            self.blanks += 2
        return not received

    def talks_on(self) -> bool:
        """Return whether a client who wanted to leave has all the same said more."""
        if self.client.received:
            return True
        size = bytearray(4)  # writable, or ioctl() would make an error of it before
        fcntl.ioctl(self.client.fd, 0x541B, size)  # FIONREAD
        return any(size)

    def dial(self, host: str, port: int) -> Stream:
        """Replace the server connection by a new one, and return it; raise Refused."""
        if self.server:
            self.drop_server()
        self.parent = None
        session = self.session
        self.server = Stream(
            dial(self.worker, self.policy, session, host, port), SERVER_GONE
        )
        self.answering = {self.server.fd: POLLIN, self.client.fd: 0}
        self.server_for = session.user, host, port
        self.server_ends = session.address, session.source
        self.parent = session.parent
        return self.server

    def drop_server(self) -> None:
        if self.server:
            self.server.close()
        self.server = None

    # A request: read, parse, decide.

    def read_head(self) -> bytes:
        """Take a request head off the client, without its empty line; raise Refused."""
        received = self.client.received
        looked, deadline = 0, 0.0
        while True:
            if received[:1] == b"\r":  # its LF may have come behind it
                self.drop_blanks()
            self.bare = received[:5] == b"HEAD "
            if (end := received.find(BLANK_LINE, looked, HEAD_LIMIT)) >= 0:
                return self.client.take(end + 4)[:-2]
            self.check_begun(received, looked)
            looked = max(0, len(received) - 3)
            deadline = deadline or time.monotonic() + self.config.head_timeout
            left = deadline - time.monotonic()
            if not self.watch.wait({self.client.fd: POLLIN}, left):
                raise Refused(HEAD_TIMEOUT, "the request head did not come to its end")
            if not self.client.fill():
                raise Refused(CLIENT_GONE, "closed inside the request head")

    def check_begun(self, received: bytearray, looked: int) -> None:
        """Refuse a head that can no longer become a good one; raise Refused.

        What stands before looked has been checked.
        """
        if received and not (received[:1].isalpha() or received[:1] == b"\r"):
            is_socks = received[0] in (4, 5) and not self.worker.chapters.socks
            what = "SOCKS, for which natwork_socks.py is needed" if is_socks else ""
            raise Refused(BAD_REQUEST, f"this is {what or 'not HTTP'}")
        if received.find(b"\r\n", looked) >= 0 or len(received) > LINE_LIMIT:
            line = received[: LINE_LIMIT + 2].partition(CRLF)[0].removesuffix(b"\r")
            parse_request_line(bytes(line))
        if SPOILED.search(received, looked):
            raise Refused(BAD_REQUEST, "bare CR or LF, or NUL, in the request head")
        if len(received) >= HEAD_LIMIT:
            raise Refused(HEAD_TOO_LARGE, f"request head over {HEAD_LIMIT} bytes")

    def request(self) -> Outcome:
        """Read and answer one request; return the outcome, or raise Refused."""
        raw = self.read_head()
        head = self.head = RequestHead(raw)
        session, method, fields = self.session, head.method, head.fields
        session.method = method.decode()  # a token is printable
        if method == b"CONNECT":
            return self.connect(head)
        if self.config.max_per_client:
            self.worker.check_share()
        length = body_length(head, BAD_REQUEST)
        # RFC 9112 section 9.3: never with an HTTP/1.0 client behind a proxy.
        self.keep = head.minor == 1 and b"close" not in fields.options
        self.wants_more = self.keep
        own = head.target[:1] == b"/"
        if not own:  # our own pages ask by themselves
            self.identify(fields.names, b"proxy-authorization")
        if b"expect" in fields.names and head.minor == 1:
            if set(members(fields.names, b"expect")) - {b"100-continue"}:
                raise Refused(EXPECTATION, "an expectation other than 100-continue")
        if own:
            bare = USER_OR_QUERY.sub(b"", head.target)
            session.target = printable(bare, TARGET_SIZE)
            target = Target(host_named(head), 0, b"", OURSELVES)
            return self.gateway(OURSELVES)(self, head, target, length)
        if method in (b"TRACE", b"OPTIONS") and self.is_last_hop(head, length):
            return self.answer_here(head, raw)
        target, head.path = parse_target(method, head.target)
        scheme, path = target.scheme, head.path
        if b"?" in path:
            path = path.partition(b"?")[0]
        place = target.shown if path == b"*" else target.shown + path
        session.target = printable(place, TARGET_SIZE)
        if b"via" in fields.names:
            self.check_via(fields.names)
        if scheme == b"http":
            if not self.policy.means_us(target.host, target.port):
                return self.forward(head, target, length)
            scheme = OURSELVES
        return self.gateway(scheme)(self, head, target, length)

    def gateway(self, scheme: bytes) -> Gateway:
        """Return what answers for a scheme; raise Refused where its chapter is not."""
        if scheme in self.gateways:
            return self.gateways[scheme]
        if scheme == OURSELVES:
            why = "the gateway's own pages need natwork_pages.py"
            raise Refused(NO_PAGE._replace(advice=ASK_OPERATOR), why)
        why = f"{scheme.decode()}:// needs natwork_gateways.py"
        raise Refused(NOT_IMPLEMENTED._replace(advice=ASK_OPERATOR), why)

    def identify(self, names: Names, field: bytes) -> None:
        """Learn who sends this request: RFC 9110 section 3.3; raise Refused."""
        shown = names.get(field)
        if shown != self.shown:
            pair = credentials(shown[0]) if shown and len(shown) == 1 else None
            users = self.worker.chapters.users
            if pair and users:
                self.user = users.authenticate(self.worker, *pair)
            else:
                self.user = anonymous(self.worker)
            self.shown = shown
        self.session.user = self.user

    def check_via(self, names: Names) -> None:
        """Refuse what has been here before: RFC 9110 section 7.6.3; raise Refused."""
        self.session.via = b", ".join(names[b"via"]) + b", "
        for member in members(names, b"via"):
            if member.split()[1:2] == [self.config.name.lower().encode()]:
                raise Refused(LOOP, "the request has been here before, says its Via")

    def is_last_hop(self, head: RequestHead, length: int | None) -> bool:
        """Return whether TRACE or OPTIONS may go no further; RFC 9110 section 7.6.2."""
        if head.method == b"TRACE" and length is not None:
            raise Refused(BAD_REQUEST, "TRACE with a body")
        if length:
            self.keep = False  # should it be answered here, its body is not read
        values = head.fields.names.get(b"max-forwards", [])
        if len(values) > 1 or values and not re.fullmatch(rb"[0-9]{1,32}", values[0]):
            raise Refused(BAD_REQUEST, "invalid Max-Forwards")
        if values and int(values[0]) == 0 or head.target == b"*":
            return True
        self.keep = self.wants_more
        return False

    def answer_here(self, head: RequestHead, raw: bytes) -> Outcome:
        """Answer TRACE with what has arrived, and OPTIONS with what is possible."""
        self.name_target()
        if head.method == b"OPTIONS":
            line = b"Allow: CONNECT, GET, HEAD, POST, PUT, DELETE, OPTIONS, TRACE\r\n"
            echo = b""
        elif head.target == b"*":
            raise Refused(BAD_REQUEST, "* is a target for OPTIONS only")
        else:
            secret = frozenset({b"proxy-authorization", b"authorization", b"cookie"})
            fields = head.fields.without(secret)
            line = b"Content-Type: message/http\r\n"
            echo = b"%b\r\n%b\r\n" % (raw.partition(b"\r\n")[0], fields)
        self.answer("200 OK", line, echo)
        self.lingers = not self.keep
        return OK

    # Answers of our own.

    def answer(self, status: str, lines: bytes, body: bytes) -> None:
        """Send an answer of the gateway itself; raise Refused if it cannot be whole."""
        self.session.status = status[:3]
        self.keep = self.keep and not self.worker.leaving()
        date = http_date(int(time.time()))
        head = b"HTTP/1.1 %b\r\nDate: %b\r\n%b" % (status.encode(), date, lines)
        head += b"Content-Length: %d\r\n" % len(body)
        if not self.keep:
            head += b"Connection: close\r\n"
        if self.bare:
            body = b""
        lane = Lane(self.watch, self.client, self.client, self.config.idle_timeout)
        lane.out += head + b"\r\n" + body
        self.answered = True
        try:
            for fd, events in lane.flush():
                if not self.watch.wait({fd: events}, lane.patience):
                    raise Refused(IDLE, "the client takes no more")
        except Refused:
            self.keep = False
            self.client.abort()  # what comes next would be taken for the rest of it
            raise
        finally:
            self.session.down += lane.moved

    def refuse(self, refusal: Refused) -> None:
        """Tell the client why not; where an answer has begun, cut it short."""
        outcome, head = refusal.outcome, self.head
        if self.answered or self.midway or not outcome.error:
            self.keep = False
            # Half an answer must not look whole: RFC 9112 section 8.
            if self.endless:
                if outcome.error == SERVER_GONE.error:  # or a parent's fault
                    deliver(self.watch, self.client)
                self.client.abort()
            return
        # What was not understood has no end from which to go on.
        if not head or head.method == b"CONNECT" or outcome.status in MISUNDERSTOOD:
            self.keep = False
        if self.keep and head and body_length(head, BAD_REQUEST):
            self.keep = False  # its body is not read
        with contextlib.suppress(Refused):  # he may have gone
            self.answer(outcome.status_text(), *self.explain(outcome, refusal.detail))
        self.lingers = not self.keep

    def explain(self, outcome: Outcome, detail: str) -> tuple[bytes, bytes]:
        """Return field lines and text that say what was refused, and why."""
        name, session = self.config.name, self.session
        why = "".join(c if " " <= c <= "~" else "?" for c in detail) or outcome.word
        asked = f"{session.method} {session.target}" if self.head else "this request"
        # RFC 9209 section 2: a token where it is one, else a string.
        who = name if name[:1].isalpha() else f'"{name}"'
        details = why.replace("\\", "/").replace('"', "'")
        lines = (
            f'Proxy-Status: {who}; error={outcome.error}; details="{details}"\r\n'
            "Content-Type: text/plain; charset=utf-8\r\nCache-Control: no-store\r\n"
            "X-Content-Type-Options: nosniff\r\n"
        )
        if outcome.status == 503:
            lines += "Retry-After: 5\r\n"
        if outcome.status == 405:
            lines += "Allow: GET, HEAD\r\n"
        if outcome.advice is SAY_WHO:
            field = "WWW" if outcome.status == 401 else "Proxy"
            lines += f'{field}-Authenticate: Basic realm="{name}", charset="UTF-8"\r\n'
        page = (
            f"{outcome.status_text()}\n\n{name} (NATWork) refused {asked}\n\n"
            f"Why: {why}.\nWhat to do: {outcome.advice}\n"
        )
        return lines.encode(), page.encode()

    # What travels on.

    def connect(self, head: RequestHead) -> Outcome:
        """Answer a CONNECT and carry its bytes: RFC 9110 section 9.3.6."""
        session = self.session
        session.proto = "connect"
        self.worker.check_share()
        if body_length(head, BAD_REQUEST) is not None:
            raise Refused(BAD_REQUEST, "CONNECT with a body")
        self.identify(head.fields.names, b"proxy-authorization")
        if b"via" in head.fields.names:
            self.check_via(head.fields.names)
        target, _ = parse_target(head.method, head.target)
        session.target = printable(endpoint((target.host, target.port)).encode())
        self.worker.begin(session)
        server = self.dial(target.host, target.port)
        session.status = "200"
        self.worker.proceed(session)
        self.answered = self.endless = True
        opening = b"HTTP/1.1 200 Connection established\r\n\r\n"
        tunnel(self.worker, session, self.client, server, opening)
        return ENDED

    def join(self, up: Lane, down: Lane) -> None:
        """Carry both ways what there is to carry.

        Raises Refused.  Where the end of a stream is the end of a message, a
        failure is passed on as a reset.
        """
        failed = True
        try:
            relay(self.watch, self.worker.slot, up, down)
            failed = self.endless and up.abandoned
        except IdleTimeout:
            if self.answered:
                raise Refused(IDLE, "nothing moved") from None
            if not up.done and up.waits[0] == self.client.fd:
                raise Refused(BODY_TIMEOUT, "the request body did not end") from None
            raise Refused(ANSWER_TIMEOUT, "the server did not answer") from None
        finally:
            self.session.up += up.moved
            self.session.down += down.moved
            if failed and self.server:
                if self.endless:
                    self.server.abort()
                self.drop_server()
        if failed:
            raise Refused(SERVER_GONE, "the server took no more")

    def forward(self, head: RequestHead, target: Target, length: int | None) -> Outcome:
        """Send a request on and its answer back; return the outcome."""
        session, worker = self.session, self.worker
        wanted = session.user, target.host, target.port
        exchange = Exchange(self, head, target, length)
        if self.server:
            with contextlib.suppress(BlockingIOError):
                self.server.fill()  # it closed, or it says what nobody asked
                self.drop_server()
        # Who may dial a place may go on asking it: the rules see no more.
        if self.server and self.server_for == wanted:
            session.address, session.source = self.server_ends
            worker.begin(session)
            try:
                return exchange.run(self.server)
            except Refused as refusal:
                # RFC 9110 section 9.2.2: only what had no effect goes out again,
                # on a connection that closed before it heard the request.
                lost = refusal.outcome is SERVER_GONE and not exchange.heard
                if not lost or length or head.method not in IDEMPOTENT:
                    raise
                exchange = Exchange(self, head, target, length)
        worker.begin(session)
        server = self.dial(target.host, target.port)
        worker.proceed(session)
        return exchange.run(server)


# --- Serving a client ---------------------------------------------------------
#
# What a worker does with the one who has just come: see whether he may be here,
# and find out what he speaks.  What is not HTTP is in the chapters: files beside
# this one, which are loaded at the start if they are there, and known by what
# they have put into the table, and by nothing else.

# A chapter, and the settings that need it.
CHAPTERS: dict[str, tuple[str, ...]] = {
    "socks": ("bind_ports", "udp_from_anyone"),
    "redirect": (),
    "gateways": (),
    "pages": ("gateways",),
    "users": ("users", "max_per_client"),
    "parents": ("parents",),
}


def chapter_file(name: str) -> str:
    """Return where a chapter is, if it is there: beside this file."""
    folder = os.path.dirname(os.path.realpath(__file__))
    return os.path.join(folder, f"natwork_{name}.py")


def load_chapter(name: str) -> ModuleType | None:
    """Return a chapter, None if it is not there; raise ConfigError if it is no good.

    What it imports from natwork is this module, and not a second one, also where
    this is the program and called __main__.
    """
    sys.modules["natwork"] = sys.modules[__name__]
    path, whole = chapter_file(name), f"natwork_{name}"
    module = sys.modules.get(whole)
    if not module and os.path.lexists(path):
        spec = spec_from_file_location(whole, path)
        assert spec and spec.loader
        module = sys.modules[whole] = module_from_spec(spec)
        try:
            spec.loader.exec_module(module)
        except Exception as error:  # it may say anything
            del sys.modules[whole]
            why = " ".join(f"{type(error).__name__}: {error}".split())
            text = f"{path}: it is no chapter of natwork {__version__}: {why}"
            raise ConfigError(text) from None
    version = getattr(module, "VERSION", "unknown")
    if module and version != __version__:
        raise ConfigError(f"{path}: its version is {version}, not {__version__}")
    return module


def need_chapter(name: str, what: str) -> ModuleType:
    """Return a chapter that something needs; raise ConfigError."""
    module = load_chapter(name)
    if not module:
        raise ConfigError(f"{what} needs {chapter_file(name)}, which is not there")
    return module


def find_chapters() -> dict[str, ModuleType]:
    """Return the chapters that are there; raise ConfigError."""
    found = {name: load_chapter(name) for name in CHAPTERS}
    return {name: module for name, module in found.items() if module}


def join_chapters(
    found: dict[str, ModuleType], config: Config, policy: Policy
) -> Chapters:
    """Return the table of the chapters found, for one configuration.

    Raises ConfigError.
    """
    chapters = Chapters()
    for name, settings in CHAPTERS.items():
        if module := found.get(name):
            module.join(chapters, config, policy)
            continue
        for setting in settings:
            # What is given as it is by default asks for nothing.
            if getattr(config, setting) != getattr(Config, setting):
                why = f"needs {chapter_file(name)}, which is not there"
                raise config.refuse(setting, why)
    return chapters


def await_first_byte(worker: Worker, client: Stream) -> bool:
    """Wait for who has just come to speak; return whether he does."""
    # Who has just come makes no room for who comes next.
    seconds = worker.config.head_timeout
    if worker.watch.wait({client.fd: POLLIN}, min(1.0, seconds)):
        return client.fill()
    deadline = time.monotonic() + seconds
    return bool(worker.silence(deadline, [client], True)) and client.fill()


def serve_client(policy: Policy, worker: Worker) -> None:
    """Serve one client from the first byte to the last."""
    client = Stream(worker.client, CLIENT_GONE)
    try:
        inside = policy.is_client(worker.peer, worker.address, worker.client)
        outcome = OK if inside else OUTSIDER
    except OSError as error:  # the kernel does not say where he comes from
        outcome = outcome_of(error)
    if outcome is not OK:
        # Without a byte: a stranger learns nothing, not even what this is.
        worker.finish(Session(worker.name, worker.word), outcome.word)
        return
    chapters = worker.chapters
    if chapters.redirect and chapters.redirect(worker, policy, client):
        return
    try:
        speaks = client.fill()  # it has probably come with the connection
    except BlockingIOError:
        speaks = await_first_byte(worker, client)
    if not speaks:
        return
    if client.received[0] in (4, 5) and chapters.socks:
        chapters.socks(worker, policy, client)
    else:
        Http(worker, policy, client, chapters.schemes).serve()


# --- Service ------------------------------------------------------------------
#
# From the command line to the master's loop: listeners (our own, or those that
# systemd holds for us), the log, the pid file, and then no more privileges.


def parse_endpoint(text: str) -> tuple[str, int]:
    """Return host ("*" for all addresses) and port of HOST:PORT; raise ValueError."""
    host, _, port = text.rpartition(":")
    bare = host.removeprefix("[").removesuffix("]")
    if not re.fullmatch("[0-9]{1,5}", port) or int(port) > 65535:
        raise ValueError(f"{text!r} is not ADDRESS:PORT")
    if host != "*":
        if not host:
            raise ValueError(f"{text!r} is not ADDRESS:PORT")
        packed = pack(bare)
        if (":" in bare) != (host == f"[{bare}]"):
            raise ValueError(f"{text!r}: an IPv6 address stands in brackets")
        bare = unpack(forms(packed)[0])  # in the one form that others are compared with
    return bare, int(port)


def endpoints(config: Config) -> list[tuple[str, int]]:
    """Return the hosts and ports of `listen`; raise ConfigError."""
    try:
        found = [parse_endpoint(word) for word in config.listen.split()]
    except ValueError as error:
        raise config.refuse("listen", str(error)) from None
    if not found:
        raise config.refuse("listen", "must name an address")
    for host, port in found:
        if found.count((host, port)) > 1:
            raise config.refuse("listen", f"names {endpoint((host, port))} twice")
        for every in ("*", "::" if ":" in host else "0.0.0.0"):
            if host not in ("*", every) and port and (every, port) in found:
                whole = endpoint((every, port))
                raise config.refuse("listen", f"{whole} has {host} in it")
    return found


def listen(host: str, port: int) -> socket.socket:
    """Return a listening socket, for IPv6 alone if its host is; raise OSError."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    return socket.create_server((host, port), family=family, backlog=LISTEN_BACKLOG)


def passed_listeners() -> dict[str, socket.socket]:
    """Return the sockets that systemd passed, sd_listen_fds(3); {} if none."""
    if os.environ.get("LISTEN_PID") != str(os.getpid()):
        return {}
    given, listeners = os.environ.get("LISTEN_FDS", "0"), {}
    if not re.fullmatch("[0-9]{1,3}", given):
        raise OSError(f"cannot take LISTEN_FDS={given}: it is not a number of sockets")
    for fd in range(3, 3 + int(given)):
        listeners[f"systemd {fd}"] = sock = socket.socket(fileno=fd)
        if sock.family not in (INET, INET6) or sock.type != STREAM:
            raise OSError(f"cannot listen on descriptor {fd}: it is not for TCP")
    return listeners


def open_listeners(
    config: Config, kept: dict[str, socket.socket], undo: contextlib.ExitStack
) -> dict[str, socket.socket]:
    """Return a listener for each address of `listen`, the kept ones among them.

    What is opened here, undo closes.  Raises ConfigError or OSError.
    """
    listeners: dict[str, socket.socket] = {}
    for host, port in endpoints(config):
        for here in ("0.0.0.0", "::") if host == "*" else (host,):
            name = endpoint((here, port))
            try:
                sock = kept.get(name) or undo.enter_context(listen(here, port))
            except OSError as error:
                if host == "*" and here == "::" and error.errno != errno.EADDRINUSE:
                    continue  # a box without IPv6
                raise OSError(f"cannot listen on {name}: {reason(error)}") from None
            listeners[name] = sock
            port = sock.getsockname()[1]  # 0 picks one for both
    return listeners


def check_user(config: Config) -> tuple[int, int]:
    """Return the numbers of `user` and of its group; raise ConfigError."""
    import pwd

    try:
        entry = pwd.getpwnam(config.user)
    except KeyError:
        raise config.refuse("user", "there is no such user") from None
    return entry.pw_uid, entry.pw_gid


def find_user(config: Config) -> tuple[int, int] | None:
    """Return user and group to become, None if we are not root; raise ConfigError."""
    if os.geteuid() != 0 or config.user == "root":
        return None
    return check_user(config)


def is_there(uplink: Uplink) -> bool:
    """Return whether this box has an uplink now."""
    if not uplink.packed:
        return bool(device_addresses(uplink.name))
    route = route_to(uplink.packed)
    return bool(route and route.local)


def warn_of_outside(config: Config) -> None:
    """Say what about the way out is probably not meant."""
    for uplink in map(parse_uplink, config.outside.split()):
        if not is_there(uplink):
            say(f"outside: {uplink.name} is not there now")
    route = None if config.outside else route_to(pack("192.0.2.1"))
    device = route.device if route else ""
    for packed in device_addresses(device):
        if contains(LINK_LOCAL, packed) or len(packed) != 4:
            continue  # these neighbors are refused; those of IPv6 are many
        if contains(networks(config.inside), packed):
            say(
                f"{device} leads outside and has {unpack(packed)}, an inside "
                "address: its neighbors count as clients; set outside or inside"
            )


def load_generation(
    path: str,
    options: list[str],
    passed: dict[str, socket.socket],
    found: dict[str, ModuleType],
    old: Generation | None,
) -> Generation:
    """Return the configuration in force from now on, ready to serve.

    Raises ConfigError or OSError; then nothing has changed.
    """
    # The file that was there at the start does not become no file.
    config = load_config(path or (old.config.file if old else ""), options)
    # Refused before anything is opened.
    policy = Policy(config, [])
    chapters = join_chapters(found, config, policy)
    if old and config.user != old.config.user:
        check_user(config)
    # By address too: one that was removed may still have clients in its queue.
    held = old.listeners if old else {}
    kept = {endpoint(s.getsockname()): s for s in held.values()} | held
    with contextlib.ExitStack() as undo:
        listeners = passed or open_listeners(config, kept, undo)
        fresh = [sock for sock in listeners.values() if sock not in kept.values()]
        for sock in fresh:
            sock.setblocking(False)
            # Linux hands these down to every socket that is accepted.
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        policy.listens(sock.getsockname() for sock in listeners.values())
        try:
            log = AccessLog(config, old.log if old else None)
        except OSError as error:
            why = f"cannot open the access log {config.log}: {reason(error)}"
            raise OSError(why) from None
        undo.callback(os.close, log.fd)
        serve = functools.partial(serve_client, policy)
        number = old.number + 1 if old else 0
        generation = Generation(config, listeners, log, serve, number)
        generation.chapters = chapters
        undo.pop_all()
    if not old:
        say(f"chapters: {' '.join(found) or 'none'}")
    for sock in fresh:
        say(f"listening on {endpoint(sock.getsockname())}")
    if old:
        for name in ("user", "pidfile"):
            running = getattr(old.config, name)
            if getattr(config, name) != running:
                say(f"{name} is changed by a restart only")
                setattr(config, name, running)
        with contextlib.suppress(OSError):
            warn_of_outside(config)
    if old and passed and config.listen != old.config.listen:
        say("listen is not used: systemd passes the listeners (natwork.socket)")
    return generation


def warm() -> None:
    """Do once, before the forks, what each worker would do for the first time.

    The first name that is resolved loads the resolver, a megabyte; and what lives
    now is kept from the collector, which would write to pages that all share.
    """
    with contextlib.suppress(OSError):
        socket.getaddrinfo(b"localhost", 80, type=socket.SOCK_STREAM)
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000)


def run(path: str, options: list[str], ready: Callable[[], None]) -> int:
    """Run the gateway until it is told to stop; return the exit code.

    Calls ready() when clients are served.  Raises ConfigError or OSError when
    it cannot start.
    """
    config = load_config(path, options)
    user = find_user(config)
    # Whoever reads that we listen may send us a signal: it waits for the master.
    signal.pthread_sigmask(signal.SIG_BLOCK, MASTER_SIGNALS)
    # Silence from a name server must not outlast the client's patience.
    os.environ.setdefault("RES_OPTIONS", "timeout:2 attempts:2")
    try:
        route_to(pack("127.0.0.1"))  # or we could not tell this box from others
    except OSError as error:
        raise OSError(f"cannot ask the kernel for a route: {reason(error)}") from None
    found = find_chapters()
    passed = passed_listeners()
    board = Scoreboard()
    daemon = need_chapter("daemon", "pidfile") if config.pidfile else None
    pidfile = daemon.lock_pidfile(config.pidfile, user) if daemon else -1
    try:
        load = functools.partial(load_generation, path, options, passed, found)
        master = Master(board, load)
        if pidfile >= 0:
            master.private.append(pidfile)
            os.ftruncate(pidfile, 0)
            os.write(pidfile, b"%d\n" % os.getpid())
        warn_of_outside(config)
        if not set_title:
            say("setproctitle is not installed: process titles will be missing")
        if user:
            master.generation.log.give_to(user)
            os.setgroups([])
            os.setgid(user[1])
            os.setuid(user[0])
            if config.users and not os.access(config.users, os.R_OK):
                who = f"{config.user} cannot read {config.users}"
                say(f"users: {who}, so no reload will work: see to its group")
        board.describe(config.max_workers)
        if os.sched_getscheduler(0) == os.SCHED_OTHER:  # else somebody has chosen
            # Who is waked lets the one who runs go on: less to and fro.
            with contextlib.suppress(OSError):  # a sandbox may forbid it
                os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
        warm()
        ready()
        notify("READY=1")
        master.run()
    finally:
        if daemon:
            daemon.remove_pidfile(config.pidfile, pidfile)
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
        say(str(error))
        return 78
    except OSError as error:
        # Those of ours have a text and no number.
        say(f"cannot go on: {reason(error)}" if error.errno else reason(error))
        with contextlib.suppress(OSError), open(os.devnull, "w") as null:
            os.dup2(null.fileno(), 1)  # what nobody takes is not tried again
        return 1
    except KeyboardInterrupt:
        return 1


# --- main ---------------------------------------------------------------------


def boards() -> Iterator[Scoreboard]:
    """Yield the scoreboard of each gateway of this box that we may look at.

    Another network namespace is another box.
    """
    here = os.readlink("/proc/self/ns/net")
    for pid in sorted(int(name) for name in os.listdir("/proc") if name.isdigit()):
        folder = f"/proc/{pid}/fd"
        # Any process may give its memory our name: what does not fit is not ours.
        with contextlib.suppress(OSError, ValueError, struct.error):
            if os.readlink(f"/proc/{pid}/ns/net") != here:
                continue
            for name in os.listdir(folder):
                link = f"{folder}/{name}"
                if os.readlink(link).startswith("/memfd:natwork "):
                    fd = os.open(link, os.O_RDONLY)
                    board = Scoreboard(fd)
                    os.close(fd)
                    if (board.words[MAGIC], board.words[MASTER]) == (OURS, pid):
                        yield board
                        break


def parent_of(pid: int) -> int:
    """Return the process whose child a process is, 0 if it has ended."""
    with contextlib.suppress(OSError), open(f"/proc/{pid}/stat", "rb") as file:
        return int(file.read().rpartition(b")")[2].split()[1])
    return 0


def print_table(as_json: bool) -> int:
    """Print the state table of the gateway that runs on this box."""
    tables = [(board.words[MASTER], table_rows(board)) for board in boards()]
    if not tables:
        raise OSError(
            "cannot show the table: no gateway that you may look at runs on this box"
        )
    rows = []
    for master, table in tables:
        # Any user may have made that board, and what is printed here may be killed.
        rows += [row for row in table if parent_of(row["pid"]) == master]
    if as_json:
        import json

        print(json.dumps(rows, indent=1))
        return 0
    lines = [[head for head in COLUMNS if head != "Moving"]]
    for row in rows:
        cells = ["-" if cell is None else str(cell) for cell in row.values()]
        lines.append([re.sub("[^!-~]", "?", cell) for cell in cells])
    widths = [max(map(len, column)) for column in zip(*lines)]
    for line in lines:
        print("  ".join(c.ljust(w) for c, w in zip(line, widths)).rstrip())
    return 0


def check_file(config: Config, name: str, makes_folder: bool) -> None:
    """Raise ConfigError for a file that we could not write; open nothing."""
    path = getattr(config, name)
    folder = os.path.dirname(path) or "."
    if path in ("", "-") or makes_folder and not os.path.exists(folder):
        return
    if not os.path.isdir(folder):
        raise config.refuse(name, "there is no such directory")
    there = path if os.path.exists(path) else folder
    if os.path.isdir(path) or not os.access(there, os.W_OK):
        raise config.refuse(name, "it cannot be written")


def check(path: str, options: list[str]) -> int:
    """Print every setting in force, or raise ConfigError."""
    config = load_config(path, options)
    join_chapters(find_chapters(), config, Policy(config, []))
    endpoints(config)
    if config.pidfile:
        need_chapter("daemon", "pidfile")
    warn_of_outside(config)
    check_file(config, "log", False)
    check_file(config, "pidfile", bool(find_user(config)))
    print(config.text())
    return 0


def command(arguments: list[str]) -> int:
    """Do what the command line says; return the exit code."""
    import argparse

    parser = argparse.ArgumentParser(
        prog="natwork", description=(__doc__ or "").partition("\n")[0]
    )
    add = parser.add_argument
    add("-c", "--config", metavar="FILE", help="settings (default: ./natwork.conf)")
    add(
        "-o",
        "--option",
        metavar="NAME=VALUE",
        action="append",
        default=[],
        help="override one setting; may be repeated",
    )
    add("-d", "--daemon", action="store_true", help="detach from the terminal")
    add("-t", "--test", action="store_true", help="check and print the settings")
    add("--table", action="store_true", help="print the sessions of this box")
    add("--json", action="store_true", help="with --table: as JSON")
    add(
        "--explain",
        nargs="+",
        metavar=("CLIENT", "TARGET"),
        help="say which rule decides: CLIENT TARGET [USER]",
    )
    add("--passwd", metavar="USER", help="print a line for the file of users")
    add("--version", action="version", version=f"natwork {__version__}")
    given = parser.parse_args(arguments)
    if given.json and not given.table:
        parser.error("--json goes with --table")
    if given.explain and len(given.explain) not in (2, 3):
        parser.error("--explain takes CLIENT TARGET [USER]")
    path = given.config or ""
    if given.table:
        return print_table(given.json)
    if given.explain:
        tell = need_chapter("explain", "--explain").explain
        return int(tell(path, given.option, given.explain))
    if given.passwd is not None:
        return int(need_chapter("users", "--passwd").passwd(given.passwd))
    if given.test:
        return check(path, given.option)
    if given.daemon:
        return int(need_chapter("daemon", "-d").run_daemon(path, given.option))
    return run(path, given.option, lambda: None)


def main() -> int:
    """Run the command line; return the exit code: 0, 1, 2 or 78 (EX_CONFIG)."""
    # Were one of these closed, the next file opened would take its number, and
    # what is meant for the operator would be written there.
    while (fd := os.open(os.devnull, os.O_RDWR)) < 3:
        pass
    os.close(fd)
    return guard(lambda: command(sys.argv[1:]))


if __name__ == "__main__":
    sys.exit(main())
