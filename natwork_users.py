"""Users, a chapter of NATWork: who asks, where `users` or `max_per_client` is set.

HTTP clients say who they are by Basic credentials (RFC 7617), SOCKS 5 clients by
RFC 1929; SOCKS 4 and redirected clients cannot, and are refused where `users` is
set.  scrypt takes 50 ms and 16 MiB for a password, and is meant to.  So the box
checks one at a time, and remembers each pair of name and password that was right,
in memory that all processes share, as a digest under a key that is never written
to a file.

It is not an account system: there are no groups, quotas or expiry dates.  The
heart calls identify() for an HTTP client and check_share() before each session;
natwork_socks.py calls authenticate().
"""
# SPDX-License-Identifier: MIT

from __future__ import annotations

import binascii
import contextlib
import fcntl
import os
import re
import time
from collections.abc import Iterator

import natwork
from natwork import Refused

VERSION = "0.1.0"

PASSWORD_TIMEOUT = 5.0  # to wait for a password check; then the answer is 503
VERIFIED_TIME = 600.0  # a pair of name and password is not checked again for so long
WRONG_PAUSE = 0.5  # after a wrong password, until the client may try another
LOCK_PAUSE = 0.02  # until a waiting worker tries a lock again; a check takes 0.05
SHARE_LOOKS = 20  # times to count a client's sessions before one is refused

# The shared memory: a key, then places for pairs that were right.  A place has a time
# and a digest of 24 bytes, whose first four say which place it is.  Two pairs hardly
# ever have the same place; if they do, each is checked more often, and that is all.
KEY, PLACE_SIZE, PLACES = slice(0, 32), 32, 1 << 18
# Record locks on bytes of the scoreboard: the kernel frees them when a process ends.
PASSWORD_LOCK, SHARE_LOCK = 0, 1
CLIENT_LOCKS = 16  # the first: the number of the client is added

Line = tuple[bytes, bytes]  # salt and hash
NOBODY: Line = bytes(16), bytes(32)  # checked for an unknown name; no password fits
USER_LINE = re.compile(
    rb"([^:]+):\$scrypt\$ln=14,r=8,p=1\$([A-Za-z0-9+/]{22})\$([A-Za-z0-9+/]{43})"
)


def scrypt(password: bytes, salt: bytes) -> bytes:
    """Return the hash of a password, 32 bytes: RFC 7914."""
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
    """Return the line of a user for the file."""
    salt = os.urandom(16)
    pair = salt, scrypt(password, salt)
    parts = [binascii.b2a_base64(part).rstrip(b"=\n") for part in pair]
    return b"%b:$scrypt$ln=14,r=8,p=1$%b$%b" % (name, *parts)


def parse_users(text: bytes) -> dict[str, Line]:
    """Return the salt and hash of each name in a file of users; raise ValueError."""
    users: dict[str, Line] = {}
    # An editor may begin a file with a byte order mark.
    for number, line in enumerate(text.removeprefix(b"\xef\xbb\xbf").split(b"\n"), 1):
        if not line or line.startswith(b"#"):
            continue
        match = USER_LINE.fullmatch(line)
        if not match:
            raise ValueError(f"line {number} is none that --passwd has printed")
        check_name(match[1])
        if (name := natwork.printable(match[1])) in users:
            raise ValueError(f"line {number} is the second for {name}")
        salt, wanted = (binascii.a2b_base64(p + b"==") for p in match.group(2, 3))
        users[name] = salt, wanted
    return users


def read_users(config: natwork.Config) -> dict[str, Line]:
    """Return salt and hash of each user; refuse a bad file."""
    try:
        import hashlib  # here, so that it is not loaded in every worker
        import hmac

        hashlib.scrypt(b"", salt=b"", n=2, r=1, p=1)
        hmac.compare_digest(b"", b"")
        text, mode = natwork.read_file(config.users)
        if mode & 0o007:
            raise ValueError("it must be a file that others cannot read: chmod o=")
        return parse_users(text)
    except ImportError:
        why = f"{config.user} cannot load Python's hashlib now, a restart can"
    except OSError as error:
        why = natwork.reason(error)
    except (AttributeError, ValueError) as error:
        why = str(error)
    config.refuse("users", why)
    return {}


class Users:
    """The users of one configuration, and how many sessions each client may have."""

    def __init__(self, config: natwork.Config, board: natwork.Scoreboard) -> None:
        self.lines = read_users(config) if config.users else {}
        self.limit, self.board = config.max_per_client, board
        self.memory = board.region("users", PLACE_SIZE * (1 + PLACES))
        if not any(self.memory[KEY]):
            self.memory[KEY] = os.urandom(32)

    def identify(self, worker: natwork.Worker, login: bytes) -> str:
        """Return who a client is, "-" where nobody has to say; raise Refused."""
        if not worker.config.users:
            return "-"
        if not login:
            raise Refused(natwork.AUTH_REQUIRED, "a name and a password are needed")
        name, _, password = login.partition(b":")
        return self.authenticate(worker, name, password)

    def authenticate(self, worker: natwork.Worker, name: bytes, password: bytes) -> str:
        """Return a user's name for the log, once the password is verified.

        Raises Refused.  A name may go on after a ";" with what the client says of
        itself: that is logged and not checked.
        """
        import hashlib
        import hmac

        known = natwork.printable(name.partition(b";")[0])
        salt, wanted = self.lines.get(known, NOBODY)
        # With salt and hash instead of the name: a new password makes the digest new.
        pair, key = salt + wanted + password, self.memory[KEY]
        digest = hashlib.blake2b(pair, key=key, digest_size=24).digest()
        if not self.remembers(digest):
            late_at = time.monotonic() + PASSWORD_TIMEOUT
            self.check_share(worker)  # a client that waits counts as a session, too
            # A client has one guess at a time, so it cannot keep all others waiting.
            with self.turn(worker, CLIENT_LOCKS + worker.client.number, late_at):
                with self.turn(worker, PASSWORD_LOCK, late_at):
                    # Another connection may have had this pair checked meanwhile.
                    right = self.remembers(digest) or hmac.compare_digest(
                        scrypt(password, salt), wanted
                    )
                if not right:
                    time.sleep(WRONG_PAUSE)
                    # An unknown name is not logged: it may be a password.
                    account = known if known in self.lines else ""
                    why = "the name or the password is wrong"
                    raise Refused(natwork.AUTH_FAILED, why, account)
                self.remember(digest)
        return natwork.printable(name, natwork.NAME_SIZE)

    @contextlib.contextmanager
    def turn(
        self, worker: natwork.Worker, place: int, late_at: float
    ) -> Iterator[None]:
        """Wait for a lock until a time (monotonic), and hold it; raise Refused."""
        fd = worker.client.stream.fd
        while True:
            with contextlib.suppress(OSError):  # another process has it
                fcntl.lockf(self.board.fd, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, place)
                break
            if time.monotonic() >= late_at:
                why = "too many passwords wait to be checked"
                raise Refused(natwork.AUTH_BUSY, why)
            if worker.watch.wait({fd: 0}, LOCK_PAUSE):
                raise Refused(natwork.CLIENT_GONE, "left before the password check")
        try:
            yield
        finally:
            fcntl.lockf(self.board.fd, fcntl.LOCK_UN, 1, place)

    def place(self, digest: bytes) -> slice:
        """Return where in the shared memory a digest may be."""
        first = PLACE_SIZE * (1 + int.from_bytes(digest[:4], "big") % PLACES)
        return slice(first, first + PLACE_SIZE)

    def remembers(self, digest: bytes) -> bool:
        """Return whether a digest was put here a short while ago.

        While another process writes, an old digest may seem new: its pair was right.
        """
        place = self.memory[self.place(digest)]
        age = time.monotonic() - int.from_bytes(place[:8], "big")
        return place[8:] == digest and age < VERIFIED_TIME

    def remember(self, digest: bytes) -> None:
        """Put a digest in its place, whatever was there."""
        now = int(time.monotonic()).to_bytes(8, "big")
        self.memory[self.place(digest)] = now + digest

    def check_share(self, worker: natwork.Worker) -> None:
        """Count a session that begins; raise Refused if its client has too many.

        A client may begin a session before a worker has settled the one that it saw
        end, so this counts again for a while.
        """
        if not self.limit:
            return
        own = worker.client.number
        worker.slot.words[natwork.Slot.PEER] = 0  # the password check has set it
        for _ in range(SHARE_LOOKS):
            # Its holder needs microseconds, so wait for it; a killed one loses it.
            fcntl.lockf(self.board.fd, fcntl.LOCK_EX, 1, SHARE_LOCK)
            if free := self.board.column(natwork.Slot.PEER).count(own) < self.limit:
                worker.slot.words[natwork.Slot.PEER] = own
            fcntl.lockf(self.board.fd, fcntl.LOCK_UN, 1, SHARE_LOCK)
            if free:
                return
            time.sleep(0.01)
        why = f"{worker.client.host} has {self.limit} sessions already"
        raise Refused(natwork.TOO_MANY, why)


def passwd(name: str) -> int:
    """Read a password, from a terminal twice; print a line of the file; return 0."""
    try:
        user = name.encode()
        check_name(user)
    except ValueError as error:
        raise OSError(f"cannot take {name!r} for a user: {error}") from None
    if os.isatty(0):
        import getpass

        try:
            asked = f"Password for {name}: ", "The same again: "
            first, again = (os.fsencode(getpass.getpass(words)) for words in asked)
        except EOFError:
            raise OSError("cannot take the password: the input has ended") from None
    else:
        with open(0, "rb", closefd=False) as file:
            first = again = file.readline().rstrip(b"\r\n")
    if not first or first != again:
        raise OSError("cannot take the password: it is empty, or twice not the same")
    print(os.fsdecode(user_line(user, first)))
    return 0


def join(chapters: natwork.Chapters) -> None:
    """Ask who a client is from now on, where that is wanted."""
    config = chapters.config
    if config.users or config.max_per_client:
        chapters.users = Users(config, chapters.board)
