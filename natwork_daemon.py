"""Daemon, a chapter of NATWork: detach, and have a pid file, where no systemd is.

The process that was started, the launcher, waits until clients are served and exits
with 0; or, after a line that says why, with the code of a start that failed.
python-daemon does the detaching.
"""
# SPDX-License-Identifier: MIT

from __future__ import annotations

import contextlib
import fcntl
import os
import resource
import stat
import sys
from collections.abc import Iterator

import natwork

VERSION = "0.1.0"


def lock_pidfile(path: str, user: tuple[int, int] | None) -> int:
    """Return the pid file, open and locked while we live; raise OSError.

    The gateway gives up root, and can then remove the file only from a directory of
    its own user's, so make the directory if it is missing.
    """
    folder = os.path.dirname(path)
    try:
        if user and folder and not os.path.exists(folder):
            os.mkdir(folder, 0o755)
            os.chown(folder, *user, follow_symlinks=False)
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
    except OSError as error:
        why = natwork.reason(error)
        raise OSError(f"cannot open the pid file {path}: {why}") from None
    status = os.fstat(fd)
    if not stat.S_ISREG(status.st_mode) or status.st_nlink > 1:
        why = "it is no regular file, or has another name"
        raise OSError(f"cannot use the pid file {path}: {why}")
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise OSError(f"another natwork holds the pid file {path}") from None
    if os.fstat(fd).st_nlink:
        os.ftruncate(fd, 0)
        return fd
    os.close(fd)
    return lock_pidfile(path, user)  # its last owner has just removed it


@contextlib.contextmanager
def pid_file(path: str, user: tuple[int, int] | None) -> Iterator[int]:
    """Hold a pid file, and remove it at the end.

    Yields the descriptor of the file, which is still empty; raises OSError.
    """
    fd = lock_pidfile(path, user)
    try:
        yield fd
    finally:
        os.ftruncate(fd, 0)
        # Without privileges the directory may refuse: then an empty file stays.
        with contextlib.suppress(OSError):
            if os.path.samestat(os.stat(path), os.fstat(fd)):  # no later one's
                os.unlink(path)


def run_daemon(config: natwork.Config) -> int:
    """Detach, run the gateway after the launcher, and return the launcher's code."""
    # python-daemon 2 (Debian 12) asks for the hard limit when it is imported, and makes
    # a set of all descriptors below it, which may take gigabytes.  It closes no others,
    # so tell it a limit just above those that are open.
    bound = max(map(int, os.listdir("/proc/self/fd"))) + 1
    getrlimit, resource.getrlimit = resource.getrlimit, lambda _: (bound, bound)
    try:
        import daemon
    except ImportError:
        missing = "python-daemon is not installed (apt install python3-daemon)"
        raise OSError(f"cannot detach: {missing}") from None
    finally:
        resource.getrlimit = getrlimit
    if config.log == "-" and os.isatty(1):
        natwork.say("log: - is this terminal, which a daemon leaves: name a file")
    news_out, news_in = os.pipe2(0)
    if os.fork():
        os.close(news_in)
        news = os.read(news_out, 1)  # b"": the daemon has died
        return news[0] if news else 1
    os.close(news_out)

    def ready() -> None:
        """Drop output that is not a file or the log, and let the launcher go."""
        with open(os.devnull, "r+b") as null:
            for fd in (1, 2):
                wanted = fd == 1 and config.log == "-" and not os.isatty(fd)
                if not wanted and not stat.S_ISREG(os.fstat(fd).st_mode):
                    os.dup2(null.fileno(), fd)
        os.write(news_in, b"\0")

    def serve() -> int:
        """Detach, and run the gateway to its end."""
        daemon.DaemonContext(
            umask=0o027,
            detach_process=True,  # else it guesses from standard input
            working_directory=os.getcwd(),
            files_preserve=[news_in],
            stdout=sys.stdout,
            stderr=sys.stderr,
            signal_map={},
        ).open()
        return natwork.run(config, ready)

    status = natwork.guard(serve)
    with contextlib.suppress(OSError):  # the launcher has gone
        os.write(news_in, bytes([status]))
    os._exit(status)


def join(chapters: natwork.Chapters) -> None:
    """Hold a pid file from now on, if one is wanted."""
    if chapters.config.pidfile:
        chapters.pid_file = pid_file
