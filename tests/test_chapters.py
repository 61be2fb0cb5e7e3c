"""The heart alone, and what a chapter beside it may not be."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import http_wire
import origins
import pytest
import running
import wait
import wire

import natwork as heart

NAMES = list(heart.CHAPTERS)


def laid(folder: Path, *chapters: str) -> list[str]:
    """Lay natwork.py and some chapters into a folder; return what runs it there."""
    folder.mkdir()
    for name in ("natwork", *(f"natwork_{chapter}" for chapter in chapters)):
        shutil.copy(running.ROOT / f"{name}.py", folder)
    return [sys.executable, "-I", "-S", str(folder / "natwork.py")]


@pytest.fixture
def alone(tmp_path: Path) -> list[str]:
    """Return what runs natwork.py where nothing is beside it."""
    return laid(tmp_path / "alone")


@pytest.fixture
def bare(natwork: running.Start, alone: list[str]) -> running.Gateway:
    return natwork(program=alone)


def refused(done: subprocess.CompletedProcess[str]) -> str:
    """Return the one line that says why a configuration is no good."""
    assert (done.returncode, done.stdout) == (78, ""), done
    assert re.fullmatch("natwork: [^\n]+\n", done.stderr), done.stderr
    return done.stderr


# The heart alone.


def test_alone_it_serves_get_and_connect(
    bare: running.Gateway, origin: origins.Start
) -> None:
    server = origin(http_wire.Script(http_wire.sized(b"hello")))
    assert http_wire.ask(bare, server).body == b"hello"
    with http_wire.tunnel(bare, origin(origins.echo)) as client:
        assert wire.echoes(client)
    assert "natwork: chapters: none; settings: the defaults" in bare.said()


def test_alone_it_prints_all_settings_if_none_explained(
    alone: list[str], tmp_path: Path
) -> None:
    done = running.command("--settings", cwd=tmp_path, program=alone)
    assert done.returncode == 0 and done.stderr == ""
    shipped = (running.ROOT / "natwork.conf").read_text()
    listed = re.findall(r"^(#[a-z_]+) =", shipped, re.M)
    assert re.findall(r"^(#[a-z_]+) =", done.stdout, re.M) == listed
    (tmp_path / "natwork.conf").write_text(done.stdout.replace("#", ""))
    done = running.command("-t", cwd=tmp_path, program=alone)
    assert done.returncode == 0
    assert done.stderr == "natwork: ok: natwork.conf\n"


@pytest.mark.parametrize("greeting", [b"\5\1\0", b"\4\1\0\x50\x7f\0\0\1\0"])
def test_alone_it_refuses_socks_as_it_does_garbage(
    bare: running.Gateway, greeting: bytes
) -> None:
    with bare.connect() as client:
        client.sendall(greeting)
        answer = wire.read_all(client)
    assert answer.startswith(b"HTTP/1.1 400 ") and b"natwork_socks.py" in answer
    assert bare.lines(1)[0]["outcome"] == "bad-request"


@pytest.mark.parametrize("scheme", ["ftp", "gopher"])
def test_alone_it_names_what_a_scheme_needs(bare: running.Gateway, scheme: str) -> None:
    with bare.connect() as client:
        line = f"GET {scheme}://127.0.0.1/0a HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"
        answer = http_wire.exchange(client, line.encode())
    assert answer.status == 501 and b"natwork_gateways.py" in answer.body
    assert b"ftp:// and gopher:// can" not in answer.body
    assert bare.lines(1)[0]["outcome"] == "not-implemented"


def test_alone_it_has_no_pages(bare: running.Gateway) -> None:
    host = b"%s:%d" % (bare.address[0].encode(), bare.address[1])
    for target in (b"/", b"/proxy.pac", b"http://" + host + b"/metrics"):
        with bare.connect() as client:
            lines = b"GET %b HTTP/1.1\r\nHost: %b\r\n\r\n" % (target, host)
            answer = http_wire.exchange(client, lines)
        assert answer.status == 404 and b"natwork_pages.py" in answer.body
        assert b"Its pages are" not in answer.body
    assert [line["outcome"] for line in bare.lines(3)] == ["no-page"] * 3


# A word of the command line, and the chapter that does what it says.
DONE = {
    ("--passwd", "ann"): "users",
    ("--explain", "127.0.0.1", "192.0.2.1:80"): "check",
    ("-d",): "daemon",
    ("-d", "-o", "pidfile=natwork.pid"): "daemon",
}


@pytest.mark.parametrize("words", DONE)
def test_alone_it_names_what_a_word_needs(
    tmp_path: Path, alone: list[str], words: tuple[str, ...]
) -> None:
    said = refused(running.command(*words, cwd=tmp_path, program=alone))
    assert said.startswith(f"natwork: {words[0]} needs ")
    assert f"/natwork_{DONE[words]}.py, which is not there" in said


def test_alone_it_has_no_pid_file(tmp_path: Path, alone: list[str]) -> None:
    for words in (["-t"], ["-o", "listen=127.0.0.1:0"]):
        words += ["-o", "pidfile=natwork.pid"]
        said = refused(running.command(*words, cwd=tmp_path, program=alone))
        assert said.startswith("natwork: option -o: pidfile = natwork.pid: needs ")
        assert "/natwork_daemon.py, which is not there" in said


# What a chapter may not be.


GIVEN = {
    "bind_ports": ("socks", "5000-5009"),
    "udp_from_anyone": ("socks", "yes"),
    "gateways": ("pages", "10.0.0.2:8080"),
    "users": ("users", "/etc/natwork/users"),
    "max_per_client": ("users", "9"),
    "parents": ("parents", "http://127.0.0.1:3128"),
    "mappings": ("mapping", "yes"),
    "max_mappings": ("mapping", "4"),
}


@pytest.mark.parametrize("setting", GIVEN)
def test_a_setting_names_the_chapter_that_it_lacks(
    tmp_path: Path, alone: list[str], setting: str
) -> None:
    chapter, value = GIVEN[setting]
    for words in (["-t"], ["-o", "listen=127.0.0.1:0"]):
        words += ["-o", f"{setting}={value}"]
        said = refused(running.command(*words, cwd=tmp_path, program=alone))
        assert said.startswith(f"natwork: option -o: {setting} = ")
        assert f"/natwork_{chapter}.py" in said


def test_what_is_given_as_it_is_by_default_lacks_nothing(
    tmp_path: Path, alone: list[str]
) -> None:
    printed = running.command("-t", cwd=tmp_path, program=alone).stdout
    (tmp_path / "natwork.conf").write_text(printed)
    assert running.command("-t", cwd=tmp_path, program=alone).stdout == printed


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ('VERSION = "0.0.9"\n', "its version is 0.0.9, not "),
        ("", "its version is unknown, not "),
        ("def join(:\n", "SyntaxError"),
        ("from natwork import nothing\n", "ImportError"),
        ("1 / 0\n", "ZeroDivisionError"),
        ("raise ValueError('''one\ntwo''')\n", "ValueError: one two"),
        ("x = '\xff'\n", "SyntaxError"),
    ],
)
def test_a_chapter_that_is_none_is_refused(
    tmp_path: Path, alone: list[str], text: str, why: str
) -> None:
    path = tmp_path / "alone/natwork_socks.py"
    path.write_bytes(text.encode("latin-1"))
    for words in (["-t"], ["-o", "listen=127.0.0.1:0"]):
        said = refused(running.command(*words, cwd=tmp_path, program=alone))
        assert said.startswith(f"natwork: {path}: ") and why in said


def test_a_reload_names_the_chapter_that_a_setting_lacks(
    daemon: running.Start, alone: list[str], tmp_path: Path
) -> None:
    gateway = daemon(program=alone)
    # One that comes later is no chapter until a restart.
    shutil.copy(running.ROOT / "natwork_socks.py", tmp_path / "alone")
    said = gateway.hangup(bind_ports="5000")
    assert "not reloaded" in said and "natwork_socks.py" in said


# Where they are found.


@pytest.fixture
def linked(tmp_path: Path) -> Iterator[list[str]]:
    """Return what runs it by a link that is elsewhere."""
    laid(tmp_path / "there", *NAMES)
    (tmp_path / "natwork").symlink_to(tmp_path / "there/natwork.py")
    yield [sys.executable, "-I", "-S", str(tmp_path / "natwork")]


def test_chapters_are_found_and_said(natwork: running.Start, linked: list[str]) -> None:
    words = f"natwork: chapters: {' '.join(NAMES)}"
    for program in ({}, {"program": linked}):
        gateway = natwork(**program)
        wait.until(lambda g=gateway: g.said())
        assert gateway.said()[0].startswith(words + "; settings: ")


def test_the_heart_is_one_module(tmp_path: Path) -> None:
    program = laid(tmp_path / "here", "socks")
    with (tmp_path / "here/natwork_socks.py").open("a") as file:
        file.write(
            'import natwork, sys\nassert natwork is sys.modules["__main__"]\n'
            "assert natwork.Worker.__module__ == '__main__'\n"
            'print("one", flush=True)\n'
        )
    done = running.command("-t", cwd=tmp_path, program=program)
    assert done.returncode == 0 and done.stdout.startswith("one\n[natwork]\n"), done


def test_imported_the_heart_is_that_module(tmp_path: Path) -> None:
    code = (
        "import natwork, sys; natwork.load_chapter('socks'); import natwork_socks; "
        "print(natwork_socks.natwork is natwork, '__main__' != natwork.__name__)"
    )
    laid(tmp_path / "here", "socks")
    done = running.command(cwd=tmp_path / "here", program=[sys.executable, "-c", code])
    assert done.stdout == "True True\n", done


FAULTY = """
import natwork

VERSION = natwork.__version__


def serve(exchange):
    exchange.watch.send(exchange.client, b"HTTP/1.1 200 OK\\r\\n\\r\\nhalf")
    raise LookupError("of a chapter")


def join(chapters):
    chapters.schemes[natwork.OWN_PAGE] = serve
"""


def test_what_a_fault_cuts_off_does_not_look_whole(
    natwork: running.Start, tmp_path: Path
) -> None:
    program = laid(tmp_path / "here")
    (tmp_path / "here/natwork_pages.py").write_text(FAULTY)
    gateway = natwork(program=program)
    with gateway.connect() as client:
        client.sendall(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
        assert wire.read_exactly(client, 23) == b"HTTP/1.1 200 OK\r\n\r\nhalf"
        with pytest.raises(ConnectionResetError):
            client.recv(1)
    (line,) = gateway.lines(1)
    assert line["outcome"] == "internal-error"
    wait.until(lambda: "LookupError: of a chapter\n" in gateway.errors.read_text())
    gateway.errors.write_text("")  # and nobody else has seen a traceback
