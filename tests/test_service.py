"""The service: listeners, the pid file, privileges, daemon mode, the command line."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import json
import os
import platform
import pty
import pwd
import re
import resource
import shlex
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import http_wire
import kernel
import needs
import origins
import pytest
import running
import wait
import wire

import natwork as program
import natwork_daemon

PLAIN = [sys.executable, "-I", "-S", str(running.ROOT / "natwork.py")]  # alone


def answers(address: tuple[str, int]) -> bool:
    """Say whether a gateway serves at an address."""
    with socket.create_connection(address, 10) as client:
        return (
            http_wire.exchange(client, http_wire.request(http_wire.DENIED)).status
            == 403
        )


def failed(done: subprocess.CompletedProcess[str], code: int) -> str:
    """Return the one line in which a program said why it ended with this code."""
    assert done.returncode == code and not done.stdout, done
    assert re.fullmatch(r"natwork: [^\n]+[^\n.!]\n", done.stderr), done.stderr
    return done.stderr


# Listeners.


def test_every_address_is_listened_on_and_said(daemon: running.Start) -> None:
    gateway = daemon(listen="127.0.0.1:0 127.0.0.2:0\n  127.0.0.3:0")
    hosts = [host for host, _ in gateway.listening()]
    assert hosts == ["127.0.0.1", "127.0.0.2", "127.0.0.3"]
    assert all(answers(address) for address in gateway.listening())
    assert len(gateway.said()) == 4  # and the chapters


@needs.ipv6
def test_a_star_is_both_families_at_one_port(daemon: running.Start) -> None:
    gateway = daemon(listen="*:0")
    (first, port), (second, same) = gateway.listening()
    assert (first, second) == ("0.0.0.0", "::") and port == same != 0
    assert answers(("127.0.0.1", port)) and answers(("::1", port))
    with socket.create_connection(("::1", port), 10) as client:
        http_wire.exchange(client, http_wire.request(http_wire.DENIED))
        name = "[%s]:%d" % client.getsockname()[:2]
    assert name in [line["client"] for line in gateway.lines(3)]
    said = gateway.hangup()  # the pair is kept, port 0 or not
    assert said.endswith("configuration reloaded") and len(gateway.listening()) == 2
    assert answers(("127.0.0.1", port)) and answers(("::1", port))


@needs.ipv6
def test_an_ipv6_listener_stands_in_brackets(daemon: running.Start) -> None:
    gateway = daemon(listen="[::1]:0")
    place = "natwork: listening on [::1]:%d" % gateway.address[1]
    assert gateway.said()[1:] == [place]
    assert answers(("::1", gateway.address[1]))


def test_an_address_in_use_is_one_line_and_exit_1(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        where = "127.0.0.1:%d" % taken.getsockname()[1]
        why = failed(running.command("-o", f"listen={where}", cwd=tmp_path), 1)
        assert why == f"natwork: cannot listen on {where}: address already in use\n"
        # Also when it is the second, and then nothing is said of the first.
        both = f"listen=127.0.0.2:0 {where}"
        assert failed(running.command("-o", both, cwd=tmp_path), 1) == why


@needs.ipv6
def test_a_star_is_refused_when_one_family_is_in_use(tmp_path: Path) -> None:
    with socket.create_server(("::1", 0), family=socket.AF_INET6) as taken:
        port = taken.getsockname()[1]
        why = failed(running.command("-o", f"listen=*:{port}", cwd=tmp_path), 1)
        words = f"natwork: cannot listen on [::]:{port}: address already in use\n"
        assert why == words


def test_few_descriptors_are_no_endless_start(tmp_path: Path) -> None:
    words = [*running.PROGRAM, "-o", "listen=127.0.0.1:0"]
    started = {}
    for limit in range(9, 26):
        with (said := tmp_path / f"said{limit}").open("w") as errors:
            few = ["prlimit", f"--nofile={limit}", *words]
            started[said] = subprocess.Popen(few, cwd=tmp_path, stderr=errors)

    def have_begun() -> bool:
        """Return whether all serve, or have given up."""
        return all(
            process.poll() is not None or "listening on" in said.read_text()
            for said, process in started.items()
        )

    wait.until(have_begun, 20)
    time.sleep(0.3)  # what comes after that wants descriptors, too
    for process in started.values():
        process.terminate()
    codes = [process.wait(15) for process in started.values()]
    assert set(codes) <= {0, 1}, codes


@pytest.mark.parametrize("limit", [7, 8])
def test_too_few_descriptors_are_one_line_and_exit_1(
    tmp_path: Path, limit: int
) -> None:
    few = ["prlimit", f"--nofile={limit}", *running.PROGRAM, "-o", "listen=127.0.0.1:0"]
    done = subprocess.run(few, cwd=tmp_path, capture_output=True, text=True, timeout=30)
    said = done.stderr.splitlines()
    assert (done.returncode, said[-1]) == (
        1,
        f"natwork: cannot go on: cannot open more files (limit {limit})",
    )
    assert all(re.match("natwork: (listening on|chapters:) ", x) for x in said[:-1])


def test_an_address_of_another_box_is_one_line_and_exit_1(tmp_path: Path) -> None:
    why = failed(running.command("-o", "listen=192.0.2.7:0", cwd=tmp_path), 1)
    assert why.startswith("natwork: cannot listen on 192.0.2.7:0: cannot assign")


def test_a_port_can_be_taken_over_at_once(
    daemon: running.Start, origin: origins.Start
) -> None:
    first = daemon()
    with http_wire.tunnel(
        first, origin(origins.echo)
    ):  # leaves a socket in FIN_WAIT or TIME_WAIT
        first.process.terminate()
        wait.until(lambda: kernel.title(first.process.pid).endswith(" 0 idle 1 busy"))
        second = daemon(listen="127.0.0.1:%d" % first.address[1])
        assert answers(second.address)


# Sockets that systemd passes.


@contextlib.contextmanager
def activated(
    folder: Path,
    sockets: list[socket.socket],
    pid: str = "$$",
    listen: str = "listen=127.0.0.1:0",
) -> Iterator[subprocess.Popen[bytes]]:
    """Run a gateway with listening sockets as descriptors 3 and up."""
    settings = [
        f"log={folder / 'log'}",
        listen,
        "drain_timeout=5",
        f"user={running.SELF}",
    ]
    words = running.options(*filter(None, settings))
    launch = f"LISTEN_FDS={len(sockets)} LISTEN_PID={pid} exec " + shlex.join(
        [*running.PROGRAM, *words]
    )

    def hand_over() -> None:
        for number, fd in enumerate([os.dup(s.fileno()) for s in sockets]):
            os.dup2(fd, 3 + number)

    with (
        (folder / "said").open("w") as errors,
        subprocess.Popen(
            ["sh", "-c", launch],
            preexec_fn=hand_over,
            pass_fds=range(3, 3 + len(sockets)),
            stderr=errors,
            cwd=folder,
        ) as process,
    ):
        try:
            yield process
        finally:
            process.terminate()
            assert process.wait(20) == 0


@pytest.fixture
def passed() -> Iterator[list[socket.socket]]:
    # Placed out of the way: descriptors 3 to 5 are the gateway's.
    sockets = [socket.create_server((f"127.0.0.{n}", 0)) for n in (1, 2, 3)]
    yield sockets
    for sock in sockets:
        sock.close()


def test_passed_sockets_are_served_instead_of_listen(
    tmp_path: Path, passed: list[socket.socket]
) -> None:
    with activated(tmp_path, passed):
        assert all(answers(sock.getsockname()) for sock in passed)
    names = ["%s:%d" % sock.getsockname() for sock in passed]
    said = running.OF_THIS_BOX.sub("", (tmp_path / "said").read_text()).splitlines()
    # The last session may not be over yet when it is told to stop.
    listening = [line for line in said if not line.startswith("natwork: stopping")]
    idle = "natwork: listen is not used: systemd passes the listeners (natwork.socket)"
    expected = [f"natwork: listening on {name}" for name in names]
    assert listening[1:] == [*expected, idle]


def test_passed_sockets_are_left_open_for_the_next_one(
    tmp_path: Path, passed: list[socket.socket]
) -> None:
    with activated(tmp_path, passed[:1]) as process:
        where = passed[0].getsockname()
        assert answers(where)
        process.send_signal(signal.SIGHUP)
        said = tmp_path / "said"
        wait.until(lambda: "reloaded" in said.read_text())
        assert answers(where)
    with socket.create_connection(where, 10) as client:
        (accepted, name) = passed[0].accept()  # it still listens
        assert name == client.getsockname()
        accepted.close()


def test_sockets_meant_for_another_process_are_not_taken(
    tmp_path: Path, passed: list[socket.socket]
) -> None:
    with activated(tmp_path, passed[:1], pid="1"):
        said = tmp_path / "said"
        wait.until(lambda: "listening" in said.read_text())
        assert "%s:%d" % passed[0].getsockname() not in said.read_text()


def test_a_setting_that_passed_sockets_replace_is_said_to_be_idle(
    tmp_path: Path, passed: list[socket.socket]
) -> None:
    (tmp_path / "natwork.conf").write_text("[natwork]\nlisten = 127.0.0.1:0\n")
    with activated(tmp_path, passed[:1], listen="") as process:
        said = tmp_path / "said"
        wait.until(lambda: "listening" in said.read_text())
        (tmp_path / "natwork.conf").write_text("[natwork]\nlisten = 127.0.0.4:0\n")
        process.send_signal(signal.SIGHUP)
        wait.until(lambda: "configuration reloaded" in said.read_text())
        assert "natwork: listen is not used: systemd passes " in said.read_text()
        assert answers(passed[0].getsockname())


@pytest.mark.parametrize("count", ["abc", "-1"])
def test_a_number_of_sockets_that_is_none_is_one_line(
    tmp_path: Path, count: str
) -> None:
    shell = f"LISTEN_PID=$$ LISTEN_FDS={count} exec {shlex.join(running.PROGRAM)}"
    done = running.command(cwd=tmp_path, program=["sh", "-c", shell])
    why = f"natwork: cannot take LISTEN_FDS={count}: it is not a number of sockets"
    assert failed(done, 1).strip() == why


@pytest.mark.parametrize("passed", ["nothing", "a file", "unix", "not listening"])
def test_a_descriptor_that_is_no_tcp_listener_is_one_line(
    tmp_path: Path, passed: str
) -> None:
    with socket.socket(socket.AF_UNIX) as unix, socket.socket() as deaf:
        unix.bind(str(tmp_path / "door"))
        unix.listen()
        by = {
            "nothing": "<&-",
            "a file": "</dev/null",
            "unix": f"<&{unix.fileno()}",
            "not listening": f"<&{deaf.fileno()}",
        }[passed]
        words = f"LISTEN_PID=$$ LISTEN_FDS=1 exec {shlex.join(running.PROGRAM)} 3{by}"
        done = subprocess.run(
            ["bash", "-c", words],
            pass_fds=[unix.fileno(), deaf.fileno()],
            capture_output=True,
            text=True,
            cwd=tmp_path,
            timeout=30,
        )
    why = "cannot take descriptor 3 of LISTEN_FDS=1: it is no TCP socket that listens"
    assert failed(done, 1).strip() == f"natwork: {why}"


# What systemd is told.


@pytest.mark.parametrize("kind", ["path", "abstract"])
def test_systemd_is_told_of_readiness_reloads_and_the_end(
    daemon: running.Start, tmp_path: Path, kind: str
) -> None:
    path = str(tmp_path / "notify") if kind == "path" else f"@{tmp_path}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(path.replace("@", "\0"))
        manager.settimeout(20)

        def told() -> list[str]:
            return manager.recv(4096).decode().split("\n")

        def environment() -> None:
            os.environ.update(NOTIFY_SOCKET=path, WATCHDOG_USEC="2000000")

        gateway = daemon(before=environment)
        assert told() == ["READY=1"]
        for _ in range(2):  # from the master's loop, with no client to wake it
            watchdog, state = told()
            assert watchdog == "WATCHDOG=1"
            assert re.fullmatch("STATUS=[0-8] idle 0 busy", state)
        for settings in ({}, {"spare_workers": "x"}):
            gateway.hangup(**settings)
            while (words := told())[0] == "WATCHDOG=1":
                pass
            assert words[0] == "RELOADING=1" and len(words) == 2
            assert re.fullmatch("MONOTONIC_USEC=[0-9]+", words[1])
            while (words := told())[0] == "WATCHDOG=1":
                pass
            assert words == ["READY=1"]
        gateway.process.terminate()
        while (words := told())[0] == "WATCHDOG=1":
            pass
        assert words == ["STOPPING=1"]
        assert gateway.process.wait(20) == 0


def test_who_tells_systemd_does_not_wait_for_it(
    daemon: running.Start, tmp_path: Path
) -> None:
    def environment() -> None:
        os.environ["NOTIFY_SOCKET"] = str(tmp_path / "nobody")

    assert answers(daemon(before=environment).address)


# Daemon mode.


def gone(pid: int) -> bool:
    """Say whether a process has ended, though process 1 may not have noticed yet."""
    return kernel.status(pid, "State")[:1] in ("", "Z")


@contextlib.contextmanager
def detached(
    folder: Path,
    *options: str,
    close_fds: bool = True,
    program: list[str] = running.PROGRAM,
    **settings: str,
) -> Iterator[tuple[subprocess.CompletedProcess[str], int]]:
    """Run natwork.py -d; give how the launcher ended and the daemon's number."""
    pidfile = folder / settings.get("pidfile", "natwork.pid")
    settings = {
        "listen": "127.0.0.1:0",
        "log": "access.log",
        "user": "root",
        "pidfile": "natwork.pid",
        **settings,
    }
    (folder / "natwork.conf").write_text(running.configuration(settings))
    with (folder / "said").open("w") as errors:
        done = subprocess.run(
            [*program, "-d", *options],
            cwd=folder,
            stderr=errors,
            timeout=30,
            close_fds=close_fds,
        )
    pid = int(pidfile.read_text()) if pidfile.exists() else 0
    try:
        yield done, pid
    finally:
        if pid:
            os.kill(pid, signal.SIGTERM)
            wait.until(lambda: gone(pid))


def test_a_daemon_serves_when_its_launcher_has_ended(tmp_path: Path) -> None:
    with detached(tmp_path) as (done, pid):
        assert done.returncode == 0  # trap 24: and the listener was preserved
        text = running.OF_THIS_BOX.sub("", (tmp_path / "said").read_text())
        _, said = text.splitlines()
        assert answers(("127.0.0.1", int(said.rpartition(":")[2])))
        session = kernel.read(pid, "stat").rpartition(")")[2].split()[3]
        assert int(session) != os.getsid(0)  # no terminal can hang it up
        assert kernel.status(pid, "Umask") == "0027"
        assert os.readlink(f"/proc/{pid}/fd/0") == "/dev/null"
        wait.until(lambda: kernel.title(pid).startswith("natwork: master "))
        log = tmp_path / "access.log"
        wait.until(lambda: log.read_text().count("\n") == 1)
        os.kill(pid, signal.SIGHUP)
        wait.until(lambda: "reloaded" in (tmp_path / "said").read_text())
        assert "configuration reloaded" in (tmp_path / "said").read_text()
    assert not (tmp_path / "natwork.pid").exists()
    wait.until(lambda: not kernel.group(int(session)))
    assert log.read_text().count("\n") == 1 and "\0" not in log.read_text()


def test_a_daemon_keeps_no_descriptor_of_its_launcher(tmp_path: Path) -> None:
    held = [os.open(os.devnull, os.O_RDONLY) for _ in range(80)]
    lock = os.open(tmp_path / "lock", os.O_RDWR | os.O_CREAT)
    try:
        for fd in (*held, lock):
            os.set_inheritable(fd, True)
        fcntl.flock(lock, fcntl.LOCK_EX)
        with detached(tmp_path, close_fds=False) as (done, pid):
            assert done.returncode == 0
            os.close(lock)
            with (tmp_path / "lock").open() as again:
                fcntl.flock(again, fcntl.LOCK_EX | fcntl.LOCK_NB)
            assert len(os.listdir(f"/proc/{pid}/fd")) < 40
    finally:
        for fd in held:
            os.close(fd)


def test_a_daemon_is_no_larger_where_more_descriptors_are_allowed(
    tmp_path: Path,
) -> None:
    """Debian 12's python-daemon would have a set of them all."""
    debian = "/usr/bin/python3"
    if subprocess.run([debian, "-c", "import daemon"], capture_output=True).returncode:
        needs.unavailable(f"{debian} has no python-daemon")
    sizes, most = [], min(resource.getrlimit(resource.RLIMIT_NOFILE)[1], 1 << 20)
    for hard in (1024, most):
        limit = ["prlimit", f"--nofile=1024:{hard}"]
        program = [*limit, debian, str(running.ROOT / "natwork.py")]
        with detached(tmp_path, program=program) as (done, pid):
            assert done.returncode == 0
            assert resource.prlimit(pid, resource.RLIMIT_NOFILE) == (1024, hard)
            sizes.append(kernel.number(pid, "RssAnon"))
    assert sizes[1] < sizes[0] + 700, sizes


def test_a_daemon_that_cannot_start_is_told_by_its_launcher(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        where = "127.0.0.1:%d" % taken.getsockname()[1]
        with detached(tmp_path, listen=where) as (done, pid):
            assert (done.returncode, pid) == (1, 0)
    said = (tmp_path / "said").read_text()
    assert said == f"natwork: cannot listen on {where}: address already in use\n"


def test_a_daemon_without_a_directory_is_told_by_its_launcher(tmp_path: Path) -> None:
    (tmp_path / "gone").mkdir()
    words = shlex.join([*running.PROGRAM, "-d", "-o", "listen=127.0.0.1:0"])
    script = f"cd gone && rmdir ../gone && exec {words}"
    done = subprocess.run(
        ["sh", "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=30
    )
    assert failed(done, 1) == "natwork: cannot go on: no such file or directory\n"


def test_a_badly_configured_daemon_is_told_by_its_launcher(tmp_path: Path) -> None:
    with detached(tmp_path, spare_workers="x") as (done, pid):
        assert (done.returncode, pid) == (78, 0)
    said = (tmp_path / "said").read_text()
    assert said.count("\n") == 1 and "spare_workers = x: " in said


def test_a_daemon_needs_python_daemon(tmp_path: Path) -> None:
    done = running.command(
        "-d", "-o", "listen=127.0.0.1:0", cwd=tmp_path, program=PLAIN
    )
    assert "apt install python3-daemon" in failed(done, 1)


def test_a_second_daemon_is_refused_by_its_launcher(tmp_path: Path) -> None:
    (tmp_path / "natwork.pid").write_text("4194304\n")  # stale: nobody has it locked
    with detached(tmp_path) as (done, pid):
        assert done.returncode == 0 and pid != 4194304
        second = running.command("-d", "-o", "log=-", cwd=tmp_path)
        why = "natwork: another natwork holds the pid file natwork.pid\n"
        assert (second.returncode, second.stderr) == (1, why)
        assert int((tmp_path / "natwork.pid").read_text()) == pid
    assert not (tmp_path / "natwork.pid").exists()


def test_a_daemon_detaches_whatever_its_standard_input_is(tmp_path: Path) -> None:
    # python-daemon takes a socket there for inetd's, and would stay in the session.
    settings = {
        "listen": "127.0.0.1:0",
        "log": "log",
        "pidfile": "pid",
        "user": running.SELF,
    }
    (tmp_path / "natwork.conf").write_text(running.configuration(settings))
    with socket.create_server(("127.0.0.1", 0)) as terminal:
        done = subprocess.run(
            [*running.PROGRAM, "-d"],
            cwd=tmp_path,
            stdin=terminal,
            stderr=-3,
            timeout=30,
        )
    pid = int((tmp_path / "pid").read_text())
    assert done.returncode == 0 and os.getsid(pid) != os.getsid(0)
    os.kill(pid, signal.SIGTERM)
    wait.until(lambda: gone(pid))


@needs.root
def test_a_daemon_of_nobody_has_port_80_and_removes_its_pid_file() -> None:
    if not (unshare := shutil.which("unshare")):
        needs.unavailable("not installed: unshare")
    with contextlib.ExitStack() as undo:
        folder = undo.enter_context(running.public_folder())
        pidfile = folder / "run" / "natwork.pid"  # its directory is made
        settings = {"listen": "*:80", "log": "log", "pidfile": str(pidfile)}
        (folder / "natwork.conf").write_text(running.configuration(settings))
        launch = "ip link set lo up; exec " + shlex.join([*running.PROGRAM, "-d"])
        done = subprocess.run(
            [unshare, "--net", "sh", "-ec", launch], cwd=folder, timeout=30
        )
        assert done.returncode == 0
        pid = int(pidfile.read_text())
        undo.callback(lambda: gone(pid) or os.kill(pid, signal.SIGKILL))
        with kernel.network_of(pid):
            assert answers(("127.0.0.1", 80))
        nobody = str(pwd.getpwnam("nobody").pw_uid)
        assert kernel.status(pid, "Uid").split() == [nobody] * 4
        os.kill(pid, signal.SIGTERM)
        wait.until(lambda: gone(pid))
        assert not pidfile.exists() and pidfile.parent.exists()
        assert (folder / "log").stat().st_mode & 0o777 == 0o640


# The pid file.


def test_a_pid_file_that_is_removed_while_it_is_awaited_is_no_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "natwork.pid"
    first = natwork_daemon.lock_pidfile(str(path), None)
    lock = fcntl.flock

    def late(fd: int, how: int) -> None:
        """Get the lock when its owner has just left."""
        monkeypatch.setattr(fcntl, "flock", lock)
        path.unlink()
        os.close(first)
        lock(fd, how)

    monkeypatch.setattr(fcntl, "flock", late)
    second = natwork_daemon.lock_pidfile(str(path), None)
    assert os.path.samestat(os.fstat(second), path.stat())
    os.close(second)


def test_the_pid_file_is_there_while_the_gateway_is(daemon: running.Start) -> None:
    gateway = daemon(pidfile="natwork.pid")
    pidfile = gateway.folder / "natwork.pid"
    written = f"{gateway.process.pid}\n"
    wait.until(lambda: pidfile.exists() and pidfile.read_text() == written)
    gateway.stop()
    assert not pidfile.exists()


@needs.root
def test_it_is_said_that_no_reload_will_work() -> None:
    """The parents' passwords in the file may have made it root's alone."""
    with running.public_folder() as folder:
        mask = os.umask(0o077)
        gateway = running.Gateway.configured(folder, user="nobody")
        os.umask(mask)
        who = "natwork: nobody cannot read natwork.conf, so no reload will work"
        wait.until(lambda: any(line.startswith(who) for line in gateway.said()))
        gateway.stop()


def test_a_stale_pid_file_is_taken_over(daemon: running.Start, tmp_path: Path) -> None:
    pidfile = tmp_path / "stale.pid"
    pidfile.write_text("4194304 and more of it\n")
    gateway = daemon(pidfile=str(pidfile))
    wait.until(lambda: pidfile.read_text() == f"{gateway.process.pid}\n")


def test_a_second_gateway_with_one_pid_file_is_refused(daemon: running.Start) -> None:
    gateway = daemon(pidfile="natwork.pid")
    pidfile, written = gateway.folder / "natwork.pid", f"{gateway.process.pid}\n"
    wait.until(lambda: pidfile.exists() and pidfile.read_text() == written)
    done = running.command("-o", "log=-", cwd=gateway.folder)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    last = done.stderr.splitlines()[-1]
    assert last == "natwork: another natwork holds the pid file natwork.pid"
    assert pidfile.read_text() == written
    assert answers(gateway.address)


def test_a_gateway_that_drains_leaves_the_pid_file_of_the_next_one(
    daemon: running.Start, origin: origins.Start, tmp_path: Path
) -> None:
    pidfile = tmp_path / "natwork.pid"
    first = daemon(pidfile=str(pidfile))
    with http_wire.tunnel(first, origin(origins.echo)):
        wait.until(pidfile.exists)
        first.process.send_signal(signal.SIGTERM)
        pidfile.unlink()  # by an operator that does not wait for it
        second = daemon(pidfile=str(pidfile))
        written = f"{second.process.pid}\n"
        wait.until(lambda: pidfile.exists() and pidfile.read_text() == written)
    first.stop()
    assert pidfile.read_text() == written


def test_the_workers_of_a_killed_master_do_not_hold_the_pid_file(
    daemon: running.Start, origin: origins.Start, tmp_path: Path
) -> None:
    pidfile = str(tmp_path / "natwork.pid")
    gateway = daemon(pidfile=pidfile, drain_timeout="3")
    with http_wire.tunnel(gateway, origin(origins.echo)) as client:
        gateway.expected = -signal.SIGKILL
        gateway.process.kill()
        gateway.process.wait(10)
        assert wire.echoes(client) and answers(daemon(pidfile=pidfile).address)


@pytest.mark.parametrize("kind", ["a link", "a pipe", "a folder"])
def test_a_pid_file_that_is_no_file_is_refused(tmp_path: Path, kind: str) -> None:
    pidfile, target = tmp_path / "natwork.pid", tmp_path / "target"
    target.write_text("not a number of ours")
    if kind == "a link":
        pidfile.symlink_to(target)
    elif kind == "a pipe":
        os.mkfifo(pidfile)
    else:
        pidfile.mkdir()
    options = ("-o", "listen=127.0.0.1:0", "-o", f"pidfile={pidfile}")
    why = failed(running.command(*options, cwd=tmp_path), 1)
    assert f"the pid file {pidfile}: " in why
    assert target.read_text() == "not a number of ours"


def test_a_pid_file_with_another_name_is_not_emptied(tmp_path: Path) -> None:
    """Whoever owns the directory may have linked a file of root's there."""
    kept = tmp_path / "kept"
    kept.write_text("root's\n")
    os.link(kept, tmp_path / "natwork.pid")
    options = ("-o", "listen=127.0.0.1:0", "-o", "pidfile=natwork.pid")
    done = running.command(*options, cwd=tmp_path)
    last = done.stderr.splitlines()[-1]
    assert done.returncode == 1 and last.endswith("or has another name")
    assert kept.read_text() == "root's\n"


def test_a_daemon_says_that_its_log_is_a_terminal(tmp_path: Path) -> None:
    shown, terminal = pty.openpty()
    with os.fdopen(shown, "rb"), os.fdopen(terminal, "wb") as out:
        words = [*running.PROGRAM, "-d", "-o", "listen=127.0.0.1:0", "-o", "log=-"]
        words += ["-o", "listen=nonsense"]  # so it ends at once
        done = subprocess.run(
            words, cwd=tmp_path, stdout=out, stderr=subprocess.PIPE, timeout=30
        )
    assert done.returncode == 78
    assert b"natwork: log: - is this terminal, which a daemon leaves" in done.stderr


def test_a_pid_file_nowhere_is_one_reason_and_exit_1(tmp_path: Path) -> None:
    options = ("-o", "listen=127.0.0.1:0", "-o", "pidfile=/nowhere/at/all.pid")
    done = running.command(*options, cwd=tmp_path)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    last = done.stderr.splitlines()[-1]
    assert "/nowhere/at/all.pid" in last and last.endswith("no such file or directory")


def test_a_log_nowhere_is_one_line_and_exit_1(tmp_path: Path) -> None:
    options = ("-o", "listen=127.0.0.1:0", "-o", "log=/nowhere/log")
    why = failed(running.command(*options, cwd=tmp_path), 1)
    assert why.startswith("natwork: cannot open the access log /nowhere/log: no such")


# Privileges.


@needs.root
def test_root_becomes_nobody_for_good(daemon: running.Start) -> None:
    gateway = daemon(user="nobody", pidfile="natwork.pid")
    nobody = pwd.getpwnam("nobody")
    wait.until(lambda: len(gateway.idle()) == 8)
    for pid in [gateway.process.pid, *gateway.workers()]:
        assert set(kernel.status(pid, "Uid").split()) == {str(nobody.pw_uid)}
        assert set(kernel.status(pid, "Gid").split()) == {str(nobody.pw_gid)}
        assert kernel.status(pid, "Groups") == ""
        assert (
            int(kernel.status(pid, "CapEff"), 16)
            == int(kernel.status(pid, "CapPrm"), 16)
            == 0
        )
    assert answers(gateway.address)
    assert gateway.lines(1)  # opened while it could
    gateway.stop()
    # The folder is not nobody's: then an empty file is what may stay.
    pidfile = gateway.folder / "natwork.pid"
    assert not pidfile.exists() or not pidfile.read_text()


@needs.root
def test_root_that_may_become_nobody_else_is_one_line_and_exit_1(
    tmp_path: Path,
) -> None:
    needs.programs("setpriv")
    tmp_path.chmod(0o777)
    words = ["setpriv", "--bounding-set=-setuid,-setgid", *running.PROGRAM]
    options = ("-o", "listen=127.0.0.1:0", "-o", "log=log", "-o", "user=nobody")
    done = running.command(*options, cwd=tmp_path, program=words)
    last = done.stderr.splitlines()[-1]
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert last == "natwork: cannot become nobody: operation not permitted"


@needs.root
def test_a_reload_that_asks_for_lost_privileges_is_refused_whole() -> None:
    with running.public_folder() as folder:
        gateway = running.Gateway.configured(folder, user="nobody", spare_workers="2")
        gateway.log.chmod(0o666)
        with socket.create_server(("127.0.0.1", 0)) as free:
            new = "127.0.0.1:%d" % free.getsockname()[1]
        wait.until(lambda: len(gateway.idle()) == 2)
        files = os.listdir(f"/proc/{gateway.process.pid}/fd")
        for settings in (
            {"log": str(folder / "new.log")},  # in a folder of root's
            {"listen": "127.0.0.1:0 192.0.2.7:80", "log": str(gateway.log)},
        ):
            settings["listen"] = f"127.0.0.1:0 {new} " + settings.get("listen", "")
            said = gateway.hangup(**settings)
            assert said.startswith("natwork: configuration not reloaded, ")
            assert answers(gateway.address)
            assert os.listdir(f"/proc/{gateway.process.pid}/fd") == files
        gateway.file.chmod(0o600)  # a file that only root may read
        assert "permission denied" in gateway.hangup()
        gateway.file.chmod(0o644)
        said = gateway.hangup(listen="127.0.0.1:0", log=str(gateway.log))
        assert said.endswith("configuration reloaded")
        assert answers(gateway.address)
        gateway.stop()


@needs.root
@pytest.mark.parametrize("text", ["", "root's\n"])
def test_root_gives_no_file_away_that_has_been_used(text: str) -> None:
    with running.public_folder() as folder:
        kept = folder / "kept"
        kept.write_text(text)
        gateway = running.Gateway.configured(folder, user="nobody", log=str(kept))
        wait.until(lambda: len(gateway.idle()) == 8)
        assert kept.stat().st_uid == (0 if text else pwd.getpwnam("nobody").pw_uid)
        gateway.stop()


@needs.root
def test_root_follows_no_link_where_the_log_should_be(tmp_path: Path) -> None:
    secret, made = tmp_path / "secret", tmp_path / "made"
    secret.write_text("root's\n")
    secret.chmod(0o600)
    for target in (secret, made):
        log = tmp_path / f"{target.name}.log"
        log.symlink_to(target)
        done = running.command(
            "-o", "listen=127.0.0.1:0", "-o", f"log={log}", cwd=tmp_path
        )
        assert done.returncode == 1 and "Traceback" not in done.stderr
        assert f"cannot open the access log {log}: " in done.stderr
    assert secret.read_text() == "root's\n" and secret.stat().st_uid == 0
    assert not made.exists()


@needs.root
def test_a_gateway_started_by_root_can_be_reloaded() -> None:
    with running.public_folder() as folder:
        # Its log was made by root.
        gateway = running.Gateway.configured(folder, user="nobody")
        assert gateway.hangup().endswith("configuration reloaded")
        gateway.stop()


@needs.root
def test_an_unknown_user_is_one_line_and_exit_78(tmp_path: Path) -> None:
    for check in ([], ["-t"]):
        why = failed(
            running.command(*check, "-o", "user=no-such-user", cwd=tmp_path), 78
        )
        assert why.startswith("natwork: option -o: user = no-such-user: ")


def test_user_and_pid_file_need_a_restart(daemon: running.Start) -> None:
    gateway = daemon()
    before = len(gateway.said())
    running = gateway.settings["user"]
    user = "daemon" if running != "daemon" else "root"
    gateway.hangup(user=user, pidfile="other.pid")
    said = gateway.said()[before:]
    assert "natwork: user is changed by a restart only" in said
    assert "natwork: pidfile is changed by a restart only" in said
    assert answers(gateway.address) and not (gateway.folder / "other.pid").exists()
    before = len(gateway.said())
    assert "user = no-such-user: " in gateway.hangup(user="no-such-user")
    gateway.hangup(user=running, pidfile="")
    assert not [line for line in gateway.said()[before:] if "restart" in line]


def test_a_reload_says_what_is_not_there(daemon: running.Start) -> None:
    gateway = daemon()
    gateway.hangup(outside="nosuch0")
    assert "natwork: outside: nosuch0 is not there now" in gateway.said()


# The command line.


def test_the_version_is_printed(tmp_path: Path) -> None:
    done = running.command("--version", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"natwork {program.__version__}\n"


def test_help_names_what_there_is(tmp_path: Path) -> None:
    done = running.command("--help", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    for word in ("--config", "--option", "--daemon", "--test", "--table", "--explain"):
        assert word in done.stdout


@pytest.mark.parametrize(
    "words",
    [
        ["--nonsense"],
        ["natwork.conf"],
        ["-c"],
        ["-o"],
        ["--json"],
        ["--explain"],
        ["--explain", "10.0.0.1"],
        ["--explain", "10.0.0.1", "a.example", "user", "more"],
    ],
    ids=" ".join,
)
def test_a_bad_command_line_exits_2(tmp_path: Path, words: list[str]) -> None:
    done = running.command(*words, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("usage: natwork") and "Traceback" not in done.stderr


def test_a_test_of_the_configuration_opens_nothing(
    daemon: running.Start, tmp_path: Path
) -> None:
    gateway = daemon(pidfile="natwork.pid")
    wait.until((gateway.folder / "natwork.pid").exists)
    where = "listen=127.0.0.1:%d" % gateway.address[1]
    done = running.command("-t", "-o", where, cwd=gateway.folder)  # in use, and locked
    assert (done.returncode, done.stderr) == (0, "natwork: ok: natwork.conf\n")
    done = running.command("-t", "-o", "log=new.log", cwd=tmp_path)
    assert done.returncode == 0 and not (tmp_path / "new.log").exists()


def test_the_exit_code_of_a_gateway_that_was_asked_to_stop_is_0(
    daemon: running.Start,
) -> None:
    for number in (signal.SIGTERM, signal.SIGINT):
        gateway = daemon()
        gateway.process.send_signal(number)  # at once: it may still be starting
        assert gateway.process.wait(20) == 0


def test_a_hangup_while_it_starts_is_no_end(daemon: running.Start) -> None:
    for _ in range(3):
        gateway = daemon()
        gateway.process.send_signal(signal.SIGHUP)
        assert answers(gateway.address)


@pytest.mark.parametrize(
    "setting, why",
    [
        ("log=/nowhere/log", "there is no such directory"),
        ("log=.", "it is a directory"),
        ("log=/proc/version/log", "there is no such directory"),
        ("pidfile=/", "it is a directory"),
        ("listen=*:8080 *:8080", "names *:8080 twice"),
        ("listen=[::1]:0 127.0.0.1:0 [::1]:0", "names [::1]:0 twice"),
        ("listen=127.0.0.1:80 *:80", "*:80 already includes 127.0.0.1"),
    ],
)
def test_a_test_finds_what_a_start_would_fail_at(
    tmp_path: Path, setting: str, why: str
) -> None:
    said = failed(running.command("-t", "-o", setting, cwd=tmp_path), 78)
    value = setting.replace("=", " = ", 1)
    assert said == f"natwork: option -o: {value}: {why}\n"


@needs.root
def test_a_test_by_another_user_finds_what_it_may_not_write() -> None:
    with running.public_folder() as folder:
        as_nobody = ["setpriv", "--reuid=nobody", "--clear-groups", *running.PROGRAM]
        done = running.command("-t", "-o", "log=log", cwd=folder, program=as_nobody)
        assert failed(done, 78).endswith(
            " log = log: it cannot be written: permission denied\n"
        )


# A bare box.


def test_without_setproctitle_it_serves_and_says_so_once(
    daemon: running.Start, origin: origins.Start
) -> None:
    gateway = daemon(program=PLAIN)
    words = "natwork: setproctitle is not installed (apt install "
    with http_wire.tunnel(gateway, origin(origins.echo)) as client:
        assert wire.echoes(client)
    assert answers(gateway.address)
    gateway.hangup()
    said = [line for line in gateway.said() if "setproctitle" in line]
    assert len(said) == 1 and said[0].startswith(words)
    done = running.command("--table", "--json", cwd=gateway.folder, program=PLAIN)
    assert done.returncode == 0 and isinstance(json.loads(done.stdout), list)


def test_nothing_is_said_of_setproctitle_where_it_is(daemon: running.Start) -> None:
    gateway = daemon()
    wait.until(lambda: kernel.title(gateway.process.pid).startswith("natwork: master "))
    assert len(gateway.said()) == 2  # with the chapters


# What Python 3.12 does at a fork where a title has blanks.
WARNER = f"""
import os, runpy, sys, warnings
fork = os.fork
def warn():
    text = "This process (pid=1) is multi-threaded, use of fork() may lead to deadlocks"
    warnings.warn(text, DeprecationWarning, 2)
    return fork()
os.fork, sys.argv[0] = warn, {str(running.ROOT / "natwork.py")!r}
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_nothing_is_said_of_threads_that_there_are_not(daemon: running.Start) -> None:
    gateway = daemon(program=[sys.executable, "-c", WARNER])
    assert answers(gateway.address)
    assert "multi-threaded" not in gateway.errors.read_text()


def forbid_ipv6() -> None:
    """Have the kernel refuse this process AF_INET6 sockets, as a box without IPv6."""
    number = {"x86_64": 41, "aarch64": 198}[platform.machine()]  # of socket(2)
    code = [  # classic BPF over struct seccomp_data: seccomp(2)
        (0x20, 0, 0, 0),  # load the system call's number
        (0x15, 0, 3, number),  # another one: allow
        (0x20, 0, 0, 16),  # load its first argument
        (0x15, 0, 1, socket.AF_INET6),  # another family: allow
        (0x06, 0, 0, 0x00050000 | errno.EAFNOSUPPORT),
        (0x06, 0, 0, 0x7FFF0000),
    ]
    filters = b"".join(struct.pack("HBBI", *line) for line in code)
    buffer = ctypes.create_string_buffer(filters, len(filters))
    rules = struct.pack("HxxxxxxP", len(code), ctypes.addressof(buffer))
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.prctl(38, 1, 0, 0, 0) == 0  # PR_SET_NO_NEW_PRIVS
    assert libc.prctl(22, 2, rules, 0, 0) == 0  # PR_SET_SECCOMP, to filter


def test_no_ipv6_is_no_error(daemon: running.Start) -> None:
    gateway = daemon(listen="*:0", before=forbid_ipv6)
    ((host, port),) = gateway.listening()
    assert host == "0.0.0.0" and answers(("127.0.0.1", port))
    assert len(gateway.said()) == 2  # with the chapters


@needs.root
def test_a_firewall_on_the_loopback_device_does_not_hold_the_start_up(
    tmp_path: Path,
) -> None:
    needs.programs("ip", "nft", "unshare")
    table = "table inet no { chain in { type filter hook input priority 0; drop; }; }"
    script = f"ip link set lo up && nft '{table}' && exec \"$@\""
    words = ["-o", "listen=127.0.0.1:0", "-o", "user=root"]
    told = str(tmp_path / "told")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as service:
        service.bind(told)
        service.settimeout(30)  # it would take two minutes
        with subprocess.Popen(
            ["unshare", "--net", "sh", "-c", script, "sh", *running.PROGRAM, *words],
            cwd=tmp_path,
            env=os.environ | {"NOTIFY_SOCKET": told},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        ) as gateway:
            try:
                assert service.recv(100) == b"READY=1"
            finally:
                gateway.terminate()
            assert gateway.wait(30) == 0


def test_a_gateway_leaves_nothing_but_what_it_was_told_to_write(
    daemon: running.Start,
) -> None:
    gateway: running.Gateway = daemon()
    assert answers(gateway.address)
    gateway.stop()
    names = {path.name for path in gateway.log.parent.iterdir()}
    assert names == {"access.log", "natwork.conf", "stderr"}


def test_a_closed_standard_output_is_not_the_scoreboard(daemon: running.Start) -> None:
    gateway = daemon(before=lambda: os.close(1))
    assert answers(gateway.address)
    assert os.readlink(f"/proc/{gateway.process.pid}/fd/1") == os.devnull


def test_a_daemon_lets_go_of_a_pipe_that_its_caller_reads(tmp_path: Path) -> None:
    settings = {
        "listen": "127.0.0.1:0",
        "log": "log",
        "pidfile": "pid",
        "user": running.SELF,
    }
    (tmp_path / "natwork.conf").write_text(running.configuration(settings))
    done = running.command("-d", cwd=tmp_path)  # it reads both outputs to their ends
    pid = int((tmp_path / "pid").read_text())
    os.kill(pid, signal.SIGTERM)
    assert done.returncode == 0 and "listening on" in done.stderr
    wait.until(lambda: gone(pid))


def test_bytes_that_are_no_text_are_explained_too(tmp_path: Path) -> None:
    done = running.command(
        "--explain", "127.0.0.7", "http://\udcff\udcfe/", cwd=tmp_path
    )
    assert done.returncode == 1 and "bad-request" in done.stdout
