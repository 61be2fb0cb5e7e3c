"""Users, a chapter of NATWork: who asks, where `users` or `max_per_client` is set.

To check a password takes scrypt 50 ms and 16 MiB, as it is meant to; so there is
one check at a time on the box, and a pair of name and password that was right is
remembered in memory that all processes share, as a digest under a key that is
never written anywhere.
"""
# SPDX-License-Identifier: MIT

from __future__ import annotations

import binascii
import contextlib
import fcntl
import functools
import mmap
import os
import re
import select
import time

from natwork import ARRIVALS
from natwork import AUTH_BUSY
from natwork import AUTH_FAILED
from natwork import CLIENT_GONE
from natwork import CLIENTS
from natwork import NAME_SIZE
from natwork import TOO_MANY
from natwork import USED
from natwork import Chapters
from natwork import Config
from natwork import Policy
from natwork import Refused
from natwork import Scoreboard
from natwork import Worker
from natwork import printable
from natwork import read_file
from natwork import reason

VERSION = "0.1.0"

PASSWORD_TIMEOUT = 5.0  # to have a password checked; then 503 and come again
TURN_TIME = 0.5  # until one who waits for a password's check looks for himself
VERIFIED_TIME = 600.0  # a pair of name and password is not checked again for so long
SHARE_LOOKS = 20  # at a client's sessions, 10 ms apart, before he has too many

SCRYPTS = 0  # of the words of the memory: passwords checked, by who holds the lock
# Where the pairs are that were right: when, and a digest of 24 bytes.
VERIFIED, VERIFIED_SETS, VERIFIED_WAYS = 32, 256, 4
NOBODY = bytes(16), bytes(32)  # checked for an unknown name; no password fits
USER_LINE = re.compile(
    rb"([^:]+):\$scrypt\$ln=14,r=8,p=1\$([A-Za-z0-9+/]{22})\$([A-Za-z0-9+/]{43})"
)


def scrypt(password: bytes, salt: bytes) -> bytes:
    """Return the hash of a password, by RFC 7914."""
    import hashlib

    # One cost for all: an unknown name must not be told by the time it takes.
    return hashlib.scrypt(password, salt=salt, n=1 << 14, r=8, p=1, dklen=32)


def check_name(name: bytes) -> None:
    """Raise ValueError for a name that a log, a rule or RFC 7617 could not hold."""
    if not re.fullmatch(rb"(?!#)[^\0-\x20:;,\x7f]{1,60}", name) or name == b"-":
        raise ValueError(
            "a name is 1 to 60 bytes, no blank, colon, semicolon or comma, no # first"
        )


def user_line(name: bytes, password: bytes) -> bytes:
    """Return the line for the file of users; raise ValueError for a bad name."""
    check_name(name)
    salt = os.urandom(16)
    pair = salt, scrypt(password, salt)
    parts = [binascii.b2a_base64(part).rstrip(b"=\n") for part in pair]
    return b"%b:$scrypt$ln=14,r=8,p=1$%b$%b" % (name, *parts)


def read_users(config: Config) -> dict[str, tuple[bytes, bytes]] | None:
    """Return salt and hash of each user, None if all may ask; raise ConfigError."""
    if not config.users:
        return None
    try:
        import hashlib  # here, so that it is not loaded in every worker
        import hmac
    except ImportError:
        why = f"{config.user} cannot load Python's hashlib now, a restart can"
        raise config.refuse("users", why) from None
    users: dict[str, tuple[bytes, bytes]] = {}
    try:
        hashlib.scrypt(b"", salt=b"", n=2, r=1, p=1)
        hmac.compare_digest(b"", b"")
        text, mode = read_file(config.users)
        if mode & 0o007:
            raise ValueError("it must be a file that others cannot read: chmod o=")
        for number, line in enumerate(text.split(b"\n"), 1):
            if not line or line.startswith(b"#"):
                continue
            match = USER_LINE.fullmatch(line)
            if not match:
                raise ValueError(f"line {number} is none that --passwd has printed")
            check_name(match[1])
            if (name := printable(match[1])) in users:
                raise ValueError(f"line {number} is the second for {name}")
            salt, wanted = (binascii.a2b_base64(p + b"==") for p in match.group(2, 3))
            users[name] = salt, wanted
    except OSError as error:
        raise config.refuse("users", reason(error)) from None
    except (AttributeError, ValueError) as error:
        raise config.refuse("users", str(error)) from None
    return users


class Verified:
    """The pairs that were right, in memory that all processes share, and a lock."""

    def __init__(self) -> None:
        size = VERIFIED + 32 * VERIFIED_SETS * VERIFIED_WAYS
        self.fd = os.memfd_create("users", os.MFD_CLOEXEC)
        os.ftruncate(self.fd, size)
        self.memory = mmap.mmap(self.fd, size)
        self.words = memoryview(self.memory).cast("Q")
        self.secret = os.urandom(32)  # known to this gateway's processes alone
        self.turn_out, self.turn_in = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)

    def lock(self) -> bool:
        """Take the lock for the one password check at a time, if nobody has it.

        It is a record lock: the kernel frees it when its process ends.
        """
        try:
            fcntl.lockf(self.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
        return True

    def unlock(self) -> None:
        """Let go of the lock, and wake the one who has waited for it longest."""
        fcntl.lockf(self.fd, fcntl.LOCK_UN)
        with contextlib.suppress(BlockingIOError):  # there are enough wake-ups
            os.write(self.turn_in, b"t")

    def places(self, digest: bytes) -> list[int]:
        """Return the offsets at which a digest may stand."""
        first = VERIFIED + 32 * VERIFIED_WAYS * (digest[0] % VERIFIED_SETS)
        return [first + 32 * way for way in range(VERIFIED_WAYS)]

    def remembers(self, digest: bytes) -> bool:
        """Return whether a digest was put here a short while ago."""
        now = time.monotonic()
        for place in self.places(digest):
            # Written last and read first, the time never makes a digest young.
            since = self.words[place // 8]
            if since and now - since < VERIFIED_TIME:
                if self.memory[place + 8 : place + 32] == digest:
                    return True
        return False

    def remember(self, digest: bytes) -> None:
        """Put a digest in the place of the oldest; for the holder of the lock."""
        place = min(self.places(digest), key=lambda place: self.words[place // 8])
        self.words[place // 8] = 0
        self.memory[place + 8 : place + 32] = digest
        self.words[place // 8] = int(time.monotonic())


@functools.lru_cache(maxsize=1)
def verified() -> Verified:
    """Return the one that there is; it is made before the first fork that needs it."""
    return Verified()


def verify(
    pairs: Verified, digest: bytes, password: bytes, line: tuple[bytes, bytes]
) -> None:
    """Check a password by its line, with the lock held; raise Refused."""
    import hmac

    if pairs.remembers(digest):  # another of his connections was quicker
        return
    salt, wanted = line
    pairs.words[SCRYPTS] += 1
    if not hmac.compare_digest(scrypt(password, salt), wanted):
        raise Refused(AUTH_FAILED, "the name or the password is wrong")
    pairs.remember(digest)


def came_before(board: Scoreboard, number: int) -> int:
    """Return how many sessions of a slot's client came before this one."""
    clients = board.words[CLIENTS : CLIENTS + board.words[USED]].tolist()
    same = [n for n, client in enumerate(clients) if client == clients[number]]
    for _ in range(10):
        came = {n: board.words[ARRIVALS + n] for n in same}
        if all(came.values()):
            break
        time.sleep(0.001)  # one is just coming: is he before us?
    return sum((came[n], n) < (came[number], number) for n in same)


class Users:
    """Who may ask under one configuration, and in how many sessions at once."""

    def __init__(self, lines: dict[str, tuple[bytes, bytes]] | None) -> None:
        """Take salt and hash of each user, None if all may ask."""
        self.lines = lines
        self.named = lines is not None  # clients must say who they are

    def authenticate(self, worker: Worker, name: bytes, password: bytes) -> str:
        """Return a user's name for the log, once the password is verified.

        Raises Refused.  A name may go on behind a ";" with what the client knows
        of itself: that is logged and not checked.
        """
        if self.lines is None:
            return "-"
        import hashlib

        pairs = verified()
        bare = printable(name.partition(b";")[0])
        line = self.lines.get(bare, NOBODY)
        # The salt and the hash stand for the name: a new password is a new pair.
        pair = b"".join((*line, password))
        digest = hashlib.blake2b(pair, key=pairs.secret, digest_size=24).digest()
        whole = printable(name, NAME_SIZE)
        if pairs.remembers(digest):
            return whole
        deadline = time.monotonic() + PASSWORD_TIMEOUT
        with select.epoll() as turns:
            # Exclusive: a check that ends wakes one, and the first who came.
            turns.register(pairs.turn_out, select.EPOLLIN | select.EPOLLEXCLUSIVE)
            while not pairs.lock():
                if time.monotonic() >= deadline:
                    raise Refused(AUTH_BUSY, "too many passwords wait to be checked")
                # Not longer: who was to wake us may have been killed.
                if turns.poll(TURN_TIME):
                    with contextlib.suppress(BlockingIOError):
                        os.read(pairs.turn_out, 64)
                if worker.watch.wait({worker.client.fileno(): 0}, 0):
                    raise Refused(CLIENT_GONE, "left before the password was checked")
        try:
            verify(pairs, digest, password, line)
        finally:
            pairs.unlock()
        return whole

    def check_share(self, worker: Worker) -> None:
        """Raise Refused if this client has max_per_client sessions besides this one."""
        limit = worker.config.max_per_client
        if not limit:
            return
        for _ in range(SHARE_LOOKS):
            if came_before(worker.board, worker.slot.number) < limit:
                return
            time.sleep(0.01)  # he may have seen the end of one before its worker
        raise Refused(TOO_MANY, f"{worker.peer} has {limit} sessions already")


def passwd(name: str) -> int:
    """Read a password twice, and print a line for the file of users."""
    user = os.fsencode(name)
    try:
        check_name(user)
    except ValueError as error:
        raise OSError(f"cannot take {name!r} for a user: {error}") from None
    if os.isatty(0):
        import getpass

        try:
            first = os.fsencode(getpass.getpass(f"Password for {name}: "))
            again = os.fsencode(getpass.getpass("The same again: "))
        except EOFError:
            raise OSError("cannot take the password: the input has ended") from None
    else:
        with open(0, "rb", closefd=False) as file:
            first, again = (file.readline().rstrip(b"\r\n") for _ in range(2))
    if not first or first != again:
        raise OSError("cannot take the password: it is empty, or twice not the same")
    print(os.fsdecode(user_line(user, first)))
    return 0


def join(chapters: Chapters, config: Config, policy: Policy) -> None:
    """Ask who a client is from now on, where that is wanted; raise ConfigError."""
    lines = read_users(config)
    if lines is not None:
        verified()
    if lines is not None or config.max_per_client:
        chapters.users = Users(lines)
