"""natpunch(1): its first screen, as written; its options and its errors."""

from __future__ import annotations

import ast
import contextlib
import os
import pwd
import re
import signal
import subprocess
import sys
from pathlib import Path

import natlab
import punching
import pytest
import readme
import test_manuals
import test_natpunch_clients
import test_natpunch_server

keys = test_natpunch_clients.keys


def test_the_first_screen_works_as_written(keys: Path, tmp_path: Path) -> None:
    text = test_manuals.section("natpunch.1", "DESCRIPTION")
    commands = re.findall(r"^\.Dl \$ (.*)$", text, re.M)
    assert readme.block("Machines behind NATs", "(").splitlines() == commands
    secret, serve, far, ssh = commands
    program = tmp_path / "natpunch"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} {punching.PROGRAM} "$@"\n')
    program.chmod(0o755)
    path = f"{tmp_path}:/usr/sbin:{os.environ.get('PATH', os.defpath)}"
    how = {"PATH": path, "HOME": str(tmp_path)}
    with natlab.lab("port", "sequential") as lab:
        server = lab.start("server", "sh", "-c", "exec " + serve, **how)
        said = punching.read_line(server)
        assert said == "natpunch: serving on 0.0.0.0:3478 and 3479\n"
        config = (keys / "sshd_config").read_text().replace("2222", "22")
        (tmp_path / "sshd_config").write_text(config)
        sshd = ["/usr/sbin/sshd", "-D", "-f", str(tmp_path / "sshd_config")]
        lab.start("a", *sshd, **how)
        lab.run("a", "sh", "-c", secret, **how)
        commands = [
            command.replace("server.example.org", lab.servers[0])
            for command in (far, ssh)
        ]
        peer = lab.start("a", "sh", "-c", "exec " + commands[0], **how)
        me = pwd.getpwuid(os.geteuid()).pw_name
        options = f"ssh -i {keys}/user -o BatchMode=yes -o StrictHostKeyChecking=no"
        options += f" -o UserKnownHostsFile={tmp_path}/known"
        command = commands[1].replace("ssh", options, 1).replace("me@", f"{me}@")
        done = lab.run("b", "sh", "-c", command + " 'echo seen'", **how)
        assert done.stdout == "seen\n", done
        shown = text.partition(".Bd -literal -offset indent\n")[2].partition(".Ed")[0]
        for said in (done.stderr, punching.read_line(peer) + punching.read_line(peer)):
            lines = [line for line in said.splitlines() if "natpunch:" in line]
            assert forms(lines) == forms(shown.splitlines())


def forms(lines: list[str]) -> list[str]:
    """Return lines without what differs from one pair to the next."""
    differs = r"\d+\.\d+\.\d+\.\d+:\d+ \(\w+-\w+, [\d.]+ s|(?<=stream is ).*"
    return [re.sub(differs, "", line) for line in lines]


def test_every_option_is_there() -> None:
    offered = set()
    for words in (["--help"], ["serve", "--help"]):
        done = subprocess.run(
            punching.words(*words), capture_output=True, text=True, timeout=30
        )
        offered |= set(re.findall(r"(?<![\w-])--?[a-z-]+\b", done.stdout))
    page = test_manuals.PAGES["natpunch.1"]
    items = re.findall(r"^\.It (Fl .*)$", page, re.M)
    listed = {"-" + word for line in items for word in re.findall(r"Fl (\S+)", line)}
    assert listed == offered


def test_help_tells_a_stranger_of_every_use() -> None:
    said = subprocess.run(
        punching.words("--help"), capture_output=True, text=True, timeout=30
    ).stdout
    for use in ("serve [ADDRESS]...", "-s SERVER ROOM --to", "-s SERVER nat"):
        assert f"    natpunch.py {use}" in said, use


def test_an_older_python_is_told_so_in_one_line() -> None:
    # What it does not know would be a syntax error, before a line has run.
    ast.parse(Path(punching.PROGRAM).read_text(), feature_version=(3, 8))
    code = "import runpy, sys; sys.version_info = (3, 9, 0); runpy.run_path"
    done = subprocess.run(
        [sys.executable, "-c", f"{code}({punching.PROGRAM!r}, None, '__main__')"],
        capture_output=True,
        text=True,
        timeout=30,
    )
    said = "natpunch: needs Python 3.10 or later\n"
    assert (done.returncode, done.stderr) == (1, said)


def test_it_says_which_version_it_is() -> None:
    command = [sys.executable, str(punching.PROGRAM), "--version"]
    said = subprocess.run(command, capture_output=True, text=True, timeout=30).stdout
    assert re.fullmatch(r"natpunch [0-9.]+\n", said)


def test_exit_codes_are_there() -> None:
    text = test_manuals.section("natpunch.1", "EXIT STATUS")
    assert re.findall(r"^\.It (\d+)$", text, re.M) == ["0", "1", "2", "130"]


ERRORS = {
    "no server": (1, "-s 127.0.0.1:9 room", "cannot meet in room at 127.0.0.1:9: "),
    "no port": (2, "-s 127.0.0.1:70000 room", "cannot use '127.0.0.1:70000': "),
    "no way": (2, "-s 127.0.0.1 room --udp", "cannot use --udp: it needs "),
    "no file": (2, "-s 127.0.0.1 room --secret /no", "cannot read /no: no such file"),
    "no target": (2, "-s 127.0.0.1 room --to host", "cannot use 'host': "),
    "taken port": (1, "-s 127.0.0.1 room --listen {port}", "cannot use 127.0.0.1:"),
    "taken, udp": (1, "-s 127.0.0.1 room --udp --listen {udp}", "cannot use 127.0.0.1"),
    "taken server": (1, "serve 127.0.0.1:{port}", "cannot listen on 127.0.0.1:"),
    "no host": (2, "-s 127.0.0.1 room --to :22", "cannot use ':22': it has no host"),
    "no address": (2, "serve localhost", "cannot serve localhost: it is not an add"),
    "nat with an end": (2, "-s 127.0.0.1 nat --to 127.0.0.1:22", "cannot use --to"),
    "two ports": (2, "serve 127.0.0.1:7 127.0.0.2:8", "cannot serve: "),
    "no name": (2, "-s a..b room", "cannot use 'a..b': it has no host"),
    "no nat": (1, "-s 127.0.0.1:9 nat", "cannot ask 127.0.0.1:9: connection refused"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_what_cannot_be_is_said_in_one_line(name: str) -> None:
    code, words, said = ERRORS[name]
    import socket

    with socket.create_server(("127.0.0.1", 0)) as taken:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp:
            udp.bind(("127.0.0.1", 0))
            numbers = {"port": taken.getsockname()[1], "udp": udp.getsockname()[1]}
            done = subprocess.run(
                punching.words(*words.format(**numbers).split()),
                env={**os.environ, **punching.ENVIRONMENT},
                capture_output=True,
                text=True,
                timeout=30,
            )
    assert (done.returncode, done.stdout) == (code, "")
    assert re.fullmatch(f"natpunch: {re.escape(said)}.*\n", done.stderr), done.stderr
    assert "it is not natpunch" not in done.stderr  # nobody has been asked
    assert "(" not in done.stderr  # as "(while attempting to bind on address ...)"


def test_what_cannot_be_written_is_said_in_one_line() -> None:
    with natlab.lab() as lab, punching.server(lab), open("/dev/full", "wb") as full:
        command = punching.words("-s", lab.servers[0], "nat")
        process = lab.start("a", *command, output=full.fileno())
        _, said = process.communicate(timeout=15)
        expected = b"natpunch: cannot tell which NAT this is: no space left on device\n"
        assert (process.returncode, said) == (1, expected)


def test_a_line_that_nobody_reads_is_lost() -> None:
    reader, writer = os.pipe()
    try:
        os.set_blocking(writer, False)
        with contextlib.suppress(BlockingIOError):
            while True:
                os.write(writer, bytes(65536))
        os.set_blocking(writer, True)
        quick = "natpunch.RETRY_TIME = 0.1"
        command = punching.words("-s", "127.0.0.1:9", "room", changed=quick)
        environment = {**os.environ, **punching.ENVIRONMENT}
        with subprocess.Popen(command, stderr=writer, env=environment) as process:
            try:
                assert process.wait(10) == 1
            finally:
                process.kill()
    finally:
        os.close(reader)
        os.close(writer)


@pytest.mark.parametrize(
    "words",
    ["serve --relay-time 0", "serve --per-address -1", "serve --relays x"]
    + [f"-s 127.0.0.1 room --wait {text}" for text in ("nan", "0", "-1", "x")],
)
def test_a_number_that_cannot_be_is_refused(words: str) -> None:
    command = punching.words(*words.split())
    done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    assert done.returncode == 2 and "error: argument --" in done.stderr


# With a byte that is not UTF-8, as the environment and the command line may have it.
LATIN = "caf\udce9, au lait and without sugar"


@pytest.mark.parametrize("what", ["secret", "key", "room"])
def test_a_secret_a_key_and_a_room_are_of_any_bytes(what: str) -> None:
    room, key = "room", {}
    environment = dict(punching.ENVIRONMENT)
    if what == "room":
        room = LATIN
    elif what == "key":
        key = {"NATPUNCH_KEY": LATIN}
    else:
        environment = {"NATPUNCH_SECRET": LATIN}
    with natlab.lab() as lab, punching.server(lab, **key):
        both = [punching.peer(lab, at, room, **environment, **key) for at in "ab"]
        assert [punching.got(process) for process in both] == ["direct", "direct"]
        punching.talk(*both)


# Run as a program, which is interrupted while it imports the longest of its imports.
INTERRUPTED = """
import os, runpy, signal, sys
class Interrupt:
    def find_spec(name, *_):
        if name == "ssl":
            sys.meta_path.remove(Interrupt)
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Interrupt)
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_an_interrupt_is_one_from_the_start() -> None:
    words = punching.words("-s", "127.0.0.1:9", "room")
    done = subprocess.run(
        [words[0], "-c", INTERRUPTED, *words[1:]],
        env={**os.environ, **punching.ENVIRONMENT},
        capture_output=True,
        text=True,
        timeout=30,
    )
    # A shell says 130 of both.
    assert done.stderr == "" and done.returncode in (130, -signal.SIGINT)


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o604])
def test_a_secret_that_others_may_read_is_none(mode: int, tmp_path: Path) -> None:
    path = tmp_path / "secret"
    path.write_text(punching.SECRET)
    path.chmod(mode)
    words = punching.words("-s", "127.0.0.1:9", "room", "--secret", str(path))
    done = subprocess.run(words, capture_output=True, text=True, timeout=30)
    assert done.returncode == 2 and done.stderr.endswith(": others may read it\n")
    path.chmod(0o600)
    path.write_text("short")
    done = subprocess.run(words, capture_output=True, text=True, timeout=30)
    assert done.returncode == 2 and "16 characters" in done.stderr


def test_a_peer_that_never_comes_is_waited_for_as_long_as_told() -> None:
    with natlab.lab() as lab, punching.server(lab):
        waiting = punching.peer(lab, "a", "room", "--wait", "1")
        said = punching.read_line(waiting)
        assert said.endswith(": nobody came in 1 s\n") and waiting.wait(5) == 1


ENDS: dict[str, tuple[list[str], list[str]]] = {
    "pipe": ([], []),
    "to": (["--to", "127.0.0.1:9"], []),
    "udp": (["--udp", "--to", "127.0.0.1:9"], ["--udp", "--listen", "7002"]),
    "udp, listen": (["--udp", "--listen", "7002"], ["--udp", "--to", "127.0.0.1:9"]),
}


@pytest.mark.parametrize("end", ENDS)
def test_a_server_without_a_place_is_waited_for(end: str) -> None:
    mine, theirs = ENDS[end]
    with natlab.lab() as lab, punching.server(lab):
        clients = test_natpunch_server.waiting(lab)
        waiting = punching.peer(lab, "a", "room", *mine)
        said = punching.read_line(waiting)
        assert said.endswith(": the server has no place now; waiting\n")
        for client in clients:
            client.sock.close()
        other = punching.peer(lab, "b", "room", *theirs)
        assert punching.got(waiting) == punching.got(other) == "direct"


def test_a_place_is_waited_for_as_long_as_told() -> None:
    with natlab.lab() as lab, punching.server(lab):
        clients = test_natpunch_server.waiting(lab)
        process = punching.peer(lab, "a", "room", "--wait", "3")
        _, said = process.communicate(timeout=10)
        first, last = said.decode().splitlines()  # once, though it is tried again
        assert first.endswith(": the server has no place now; waiting")
        assert process.returncode == 1 and last.endswith(": nobody came in 3 s"), said
        assert len(clients) == 16


def test_it_is_said_that_nobody_has_come() -> None:
    with natlab.lab() as lab:
        quick = "natpunch.WAIT_TIME = 1"
        lab.start("server", *punching.words("serve", *lab.servers, changed=quick))
        waiting = punching.peer(lab, "a", "room", "--wait", "5")
        while "refused" in (said := punching.read_line(waiting)):
            waiting = punching.peer(lab, "a", "room", "--wait", "5")
        assert said.endswith(": nobody has come; waiting\n")
        other = punching.peer(lab, "b", "room")
        assert punching.got(waiting) == punching.got(other) == "direct"
