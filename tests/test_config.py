"""The configuration: good files, each kind of bad file, options, natwork.conf, -t."""

from __future__ import annotations

import contextlib
import os
import pwd
import re
import select
import shlex
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import http_wire
import kernel
import needs
import pytest
import running
import wait

import natwork
import natwork_users

SHIPPED = running.ROOT / "natwork.conf"
ONE_LINE = r"natwork: [^\n]+[^\n.!]\n"
SETTING = re.compile(r"^#(\w+) =(?: (.*))?$", re.M)  # "#name = value", and no prose


def printed(*arguments: str, cwd: Path) -> str:
    """Return what -t prints for a good configuration."""
    done = running.command("-t", *arguments, cwd=cwd)
    # That an uplink is away today makes no configuration bad.
    *said, last = done.stderr.splitlines()
    said = [x for x in said if not x.endswith("is not there now")]
    assert (done.returncode, said) == (0, []) and last.startswith("natwork: ok: "), done
    return done.stdout


def names(text: str) -> list[str]:
    return re.findall(r"^(\w+) =", text, re.M)


def refused(*arguments: str, cwd: Path) -> str:
    """Return the one line that says why a configuration is no good."""
    done = running.command(*arguments, cwd=cwd)
    assert (done.returncode, done.stdout) == (78, ""), done
    assert re.fullmatch(ONE_LINE, done.stderr), done.stderr
    return done.stderr


@pytest.fixture
def tried(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[int, str, str]]:
    """Return a function that runs -t in this process, for speed: as done, and said."""
    monkeypatch.chdir(tmp_path)

    def run(*options: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["natwork", "-t", *options])
        return natwork.main(), *capfd.readouterr()

    return run


@pytest.fixture
def checked(
    tmp_path: Path, tried: Callable[..., tuple[int, str, str]]
) -> Callable[[str], str]:
    """Return a function that says why -t refuses the content of a file."""

    def check(content: str) -> str:
        (tmp_path / "bad.conf").write_text(content, encoding="utf-8")
        code, printed, why = tried("-c", "bad.conf")
        assert (code, printed) == (78, ""), printed
        assert re.fullmatch(ONE_LINE, why), why
        return why

    return check


def test_the_shipped_file_says_the_defaults(tmp_path: Path) -> None:
    shipped = SHIPPED.read_text()
    (tmp_path / "all.conf").write_text(SETTING.sub(r"\1 = \2", shipped))
    defaults = printed(cwd=tmp_path)
    assert printed("-c", "all.conf", cwd=tmp_path) == defaults
    assert [match[1] for match in SETTING.finditer(shipped)] == names(defaults)


def test_the_shipped_file_changes_nothing_as_it_is(tmp_path: Path) -> None:
    assert printed("-c", str(SHIPPED), cwd=tmp_path) == printed(cwd=tmp_path)


def test_the_shipped_file_explains_every_setting() -> None:
    lines = SHIPPED.read_text().splitlines()
    settings = [n for n, line in enumerate(lines) if SETTING.match(line)]
    bare = [lines[n] for n in settings if not re.match(r"#  ?\S|#   ", lines[n - 1])]
    assert settings and not bare, bare


GOOD = {
    "numbers": "spare_workers = 3\nmax_workers=65536\nhead_timeout = 0.25\n",
    "long times": "tunnel_timeout = 1000000\nidle_timeout = 123456.5\n",
    "rules in lines": "rules =\n  allow to 10.0.0.0/8 port 80,443\n\n  deny port 9\n",
    "rules in parts": "rules = allow from 10.0.0.7, ::1 to * ; deny user a,b\n",
    "comments": "# one\n; another\nname = a.b-c_d\n# = %(x)s ${y}\n",
    "listeners": "listen = *:0 [::1]:80 10.0.0.1:65535\n",
    "uplinks": "outside = eth0 192.0.2.1 2001:db8::1 wan.1@x\n",
    "text as it stands": "log = /var/log/a b %(c)s \"d\" 'e' #f ;g\n",
    "colon": "name : other\n",
    "limits": "max_per_client = 5\n",
    "parents": "parents = http://a.example:80 to .b scheme http; socks5://[::1]:1\n",
    "ports and yes": "bind_ports = 40000-40999\nudp_from_anyone = yes\n",
    "one port and no": "bind_ports = 40000\nudp_from_anyone = no\n",
    "nothing": "",
}


@pytest.mark.parametrize("text", GOOD.values(), ids=GOOD.keys())
def test_what_is_printed_is_itself_a_configuration_file(
    tmp_path: Path, tried: Callable[..., tuple[int, str, str]], text: str
) -> None:
    (tmp_path / "good.conf").write_text(f"[natwork]\n{text}")
    code, once, said = tried("-c", "good.conf")
    # That an uplink is away today makes no configuration bad.
    no_matter = ".* is not there now|.* users is not set|.* a line of its own"
    no_matter += "|outside: .* but nobody is a client there|.* leads outside and has .*"
    assert code == 0 and re.fullmatch(
        f"((natwork: )?({no_matter})\n)*.*: ok: .*\n", said
    )
    assert bool(text) == (once != tried()[1])
    (tmp_path / "natwork.conf").write_text(once)  # found without -c
    assert tried()[:2] == (0, once)


def test_rules_given_as_an_option_survive_printing(tmp_path: Path) -> None:
    rules = "allow to a.example\n;deny to b.example\ndeny to c.example"
    done = running.command("-t", "-o", f"rules={rules}", cwd=tmp_path)
    if done.returncode == 0:  # or it may be refused
        (tmp_path / "again.conf").write_text(done.stdout)
        assert printed("-c", "again.conf", cwd=tmp_path) == done.stdout
    else:
        assert done.returncode == 78


def test_a_rule_is_printed_as_it_is_with_a_user_that_looks_like_a_password(
    tmp_path: Path,
) -> None:
    rule = "deny user al:ice@a.example to b.example"
    done = running.command("-t", "-o", f"rules={rule}", cwd=tmp_path)
    assert f"\n    {rule}\n" in done.stdout


def test_an_empty_file_is_a_good_file(tmp_path: Path) -> None:
    (tmp_path / "empty.conf").write_text("")
    assert printed("-c", "empty.conf", cwd=tmp_path) == printed(cwd=tmp_path)


BAD_SETTINGS = [
    "no_such_setting = 1",
    "Spare_workers = 1",  # names are as they are written
    "spare_workers = 1_0",  # trap 8: int() takes the first four
    "spare_workers = +5",
    "spare_workers = ٣",
    "spare_workers = 0x10",
    "spare_workers = -1",
    "spare_workers = 0",
    "spare_workers = 1.5",
    "spare_workers = 9999999999",
    "spare_workers =",
    "spare_workers = 2049",  # over max_workers
    "max_workers = 65537",
    "tunnel_timeout = 2592000",  # more milliseconds than poll() takes
    "keepalive_timeout = 2000001",
    "log = a\0b",
    "user = a\0b",
    "pidfile = a\0b",
    "max_workers = many",
    "clients_per_worker = 0",
    "head_timeout = nan",
    "head_timeout = inf",
    "head_timeout = 1e3",
    "head_timeout = -1",
    "head_timeout = 0",
    "head_timeout = 1_0",
    "head_timeout = .5",
    "head_timeout = 10 s",
    "idle_timeout =",
    "name = two words",
    'name = a"b',
    "name = a/b",
    "name = café",
    "log_format = xml",
    "log_format =",
    "listen =",
    "listen = 8080",
    "listen = localhost:8080",
    "listen = 127.1:8080",  # trap 12: libraries take it for 127.0.0.1
    "listen = ::1:8080",
    "listen = [127.0.0.1]:8080",
    "listen = 127.0.0.1:65536",
    "listen = 127.0.0.1:http",
    "listen = 127.0.0.1:8080,127.0.0.2:8080",
    "inside = 10.0.0.0/33",
    "inside = 10.0.0.0/",
    "inside = 10.0.0",
    "inside = fc00::/129",
    "inside = lan.example",
    "inside = 10.0.0.0/8,192.168.0.0/16",
    "outside = 0.0.0.0",
    "outside = ::",
    "outside = 192.0.2.256",
    "outside = name-too-long-for-a-device",
    "outside = eth0,eth1",
    "users = /dev/null",
    "users = nowhere",
    "parents = 127.0.0.1:3128",
    "parents = https://127.0.0.1:3128",
    "parents = http://127.0.0.1",
    "parents = http://127.0.0.1:3128 to",
    "parents = http://127.0.0.1:3128 to 10.0.0.0/33",
    "parents = http://127.0.0.1:3128 port 80",
    "parents = http://127.0.0.1:3128 scheme https",
    "max_per_client = -1",
    "max_per_client = 1.5",
    "bind_ports =",
    "bind_ports = 0-9",
    "bind_ports = 70000",
    "bind_ports = 9-1",
    "bind_ports = 1-2 5-6",
    "udp_from_anyone =",
    "udp_from_anyone = 1",
    "udp_from_anyone = true",
    "udp_from_anyone = yes no",
    "mappings = 1",
    "max_mappings = 0",
    "max_mappings = -1",
    "rules = permit to *",
    "rules = allow *",
    "rules = allow to",
    "rules = allow to * to *",
    "rules = allow at *",
    "rules = allow to ,",
    "rules = allow to 10.0.0.0/33",
    "rules = allow to exa$mple",
    "rules = allow from lan.example",
    "rules = deny port 0",
    "rules = deny port 65536",
    "rules = deny port 443-80",
    "rules = deny port http",
    "rules = allow to * ; oops",
]


@pytest.mark.parametrize("setting", BAD_SETTINGS)
def test_a_bad_setting_is_one_line_with_file_setting_and_value(
    checked: Callable[[str], str], setting: str
) -> None:
    name, _, value = setting.partition(" =")
    why = checked(f"[natwork]\n{setting}\n")
    # What does not stand in the file itself is a default's fault.
    assert "bad.conf: " in why or "default: " in why
    assert name in why and value.strip() in why


@pytest.mark.parametrize(
    "setting", ["spare_workers = 1_0", "listen = 8080", "rules = permit to *"]
)
def test_the_gateway_itself_does_not_start_on_a_bad_file(
    tmp_path: Path, setting: str
) -> None:
    (tmp_path / "natwork.conf").write_text(f"[natwork]\n{setting}\n")
    assert setting in refused(cwd=tmp_path)


BAD_FILES = {
    "no section header": (b"spare_workers = 4\n", "spare_workers = 4"),
    "another section": (b"[natwork]\n[squid]\nx = 1\n", "[squid]"),
    "only another section": (b"[DEFAULT]\nspare_workers = 4\n", "[DEFAULT]"),
    "section in another case": (b"[NATWork]\nspare_workers = 4\n", "[NATWork]"),
    "duplicate setting": (b"[natwork]\nname = a\nname = b\n", "name"),
    "duplicate section": (b"[natwork]\n[natwork]\n", "natwork"),
    "no equals sign": (b"[natwork]\nspare_workers\n", "spare_workers"),
    "not UTF-8": (b"[natwork]\nname = caf\xe9\n", "UTF-8"),
    "no value": (b"[natwork]\n= 5\n", "5"),
}


@pytest.mark.parametrize("content, part", BAD_FILES.values(), ids=BAD_FILES.keys())
def test_a_bad_file_is_one_line_that_names_it(
    tmp_path: Path, content: bytes, part: str
) -> None:
    (tmp_path / "bad.conf").write_bytes(content)
    why = refused("-c", "bad.conf", cwd=tmp_path)
    assert "bad.conf: " in why and part in why


@pytest.mark.parametrize(
    "content, why",
    [
        ("spare_workers = 4\n", "1: spare_workers = 4: it stands before the line "),
        ("[natwork]\n\nname a\n", "3: name a: it is not NAME = VALUE"),
        ("[natwork]\nname = a\nname = b\n", "3: name = b: this setting stands in "),
        ("[natwork]\n[natwork]\n", "2: [natwork]: this section stands in the file "),
    ],
)
def test_a_line_that_is_no_setting_is_told_by_its_number(
    tmp_path: Path, content: str, why: str
) -> None:
    (tmp_path / "bad.conf").write_text(content)
    said = refused("-c", "bad.conf", cwd=tmp_path)
    assert said.startswith(f"natwork: bad.conf: line {why}")


def test_all_lines_that_are_no_setting_are_told_and_bad_settings_too(
    tmp_path: Path,
) -> None:
    text = (
        "early = 1\n[natwork]\nname a\nmax_workers = x\nuser = a\nuser = b\n[squid]\n"
    )
    (tmp_path / "bad.conf").write_text(text)
    done = running.command("-t", "-c", "bad.conf", "-o", "x", cwd=tmp_path)
    said = [line.split(": ")[2] for line in done.stderr.splitlines()]
    assert done.returncode == 78 and done.stdout == ""
    assert set(said[:4]) == {"line 1", "line 3", "line 6", "[squid]"}
    assert "max_workers = x" in said and "must be NAME=VALUE" in done.stderr


def test_the_fault_of_a_line_is_told_however_many_lines_there_are(
    tmp_path: Path,
) -> None:
    lines = [f"    deny to host{n}.ads.example" for n in range(200)]
    faulty = ["    dney to oops.example", "    deny port http"]
    text = "\n".join(["[natwork]", "rules =", *lines, *faulty, ""])
    (tmp_path / "long.conf").write_text(text)
    done = running.command("-t", "-c", "long.conf", cwd=tmp_path)
    first, second = done.stderr.splitlines()
    assert first.endswith("'dney to oops.example' does not begin with allow or deny")
    assert ": line 201: " in first and ": line 202: " in second


def test_a_file_that_is_something_else_is_told_in_few_lines(tmp_path: Path) -> None:
    (tmp_path / "bad.conf").write_text("what is this\n" * 5000)
    done = running.command("-t", "-c", "bad.conf", cwd=tmp_path)
    assert (done.returncode, len(done.stderr.splitlines())) == (78, 20)


def test_the_mark_of_an_editor_before_the_first_line_is_no_matter(
    tmp_path: Path,
) -> None:
    (tmp_path / "bom.conf").write_text("\ufeff[natwork]\nspare_workers = 3\n")
    assert "spare_workers = 3\n" in printed("-t", "-c", "bom.conf", cwd=tmp_path)


def test_a_missing_file_is_one_line_that_names_it(tmp_path: Path) -> None:
    why = refused("-c", "nowhere.conf", cwd=tmp_path)
    assert why == "natwork: nowhere.conf: no such file or directory\n"
    assert "it is not a regular file" in refused("-c", ".", cwd=tmp_path)


@pytest.mark.parametrize(
    "option", ["spare_workers=1_0", "no_such_setting=1", "rules=permit", "name", "=1"]
)
def test_a_bad_option_is_one_line_that_names_it(tmp_path: Path, option: str) -> None:
    why = refused("-o", option, cwd=tmp_path)
    assert "option -o" in why
    assert all(part in why for part in option.split("="))


def test_an_option_overrides_the_file_and_the_last_one_wins(tmp_path: Path) -> None:
    (tmp_path / "natwork.conf").write_text("[natwork]\nname = file\nuser = root\n")
    text = printed("-o", "name = first", "-o", "name=last", cwd=tmp_path)
    assert "\nname = last\n" in text and "\nuser = root\n" in text


def test_an_option_does_not_save_a_bad_file(tmp_path: Path) -> None:
    (tmp_path / "natwork.conf").write_text("[natwork]\nspare_workers = x\n")
    assert "spare_workers = x" in refused("-o", "spare_workers=1", cwd=tmp_path)


def test_an_option_still_wins_after_a_reload(
    daemon: running.Start,
) -> None:
    gateway = daemon("-o", "name=option", name="file")

    def refusal() -> bytes:
        with gateway.connect() as client:
            answer = http_wire.exchange(
                client, http_wire.request(http_wire.DENIED + b":81")
            )
        return answer.values(b"Proxy-Status")[0]

    assert refusal().startswith(b"option; ")
    gateway.hangup(name="other", rules="deny port 81")
    wait.until(lambda: b"rule 1" in refusal())  # so it has been read again
    assert refusal().startswith(b"option; ")


def test_a_file_made_after_the_start_is_read_by_a_reload(
    natwork: running.Start,
) -> None:
    gateway = natwork("user=root", loopback=False)
    file = gateway.log.parent / "natwork.conf"

    def refusal() -> bytes:
        with gateway.connect() as client:
            return http_wire.exchange(
                client, http_wire.request(http_wire.DENIED)
            ).values(b"Proxy-Status")[0]

    assert b"built-in rule" in refusal() and not file.exists()
    file.write_text("[natwork]\nrules = deny to 10.0.0.0/8\n")
    gateway.process.send_signal(signal.SIGHUP)
    wait.until(lambda: "configuration reloaded" in gateway.errors.read_text())
    assert b"rule 1" in refusal()


def test_a_file_that_has_gone_does_not_become_the_defaults(
    daemon: running.Start,
) -> None:
    gateway = daemon(name="before")
    moved = gateway.file.with_suffix(".moved")
    gateway.file.rename(moved)
    for link in (False, True):  # no file; and a link that leads nowhere
        if link:
            gateway.file.symlink_to("nowhere")
        before = len(gateway.said())
        gateway.process.send_signal(signal.SIGHUP)
        wait.until(lambda before=before: len(gateway.said()) > before)
        assert gateway.said()[before:] == [
            "natwork: configuration not reloaded, the old one stays: "
            "natwork.conf: no such file or directory"
        ]
    gateway.file.unlink()
    moved.rename(gateway.file)
    assert gateway.hangup().endswith("natwork: configuration reloaded")


def test_a_link_that_leads_nowhere_is_no_missing_file(tmp_path: Path) -> None:
    (tmp_path / "natwork.conf").symlink_to("nowhere")
    assert refused("-t", cwd=tmp_path).startswith("natwork: natwork.conf: no such file")


def test_what_is_printed_can_be_read_again(tmp_path: Path) -> None:
    text = "[natwork]\ninside = 10.0.0.0/8\n  ::1\nlisten =\n  *:1\n  127.0.0.1:2\n"
    (tmp_path / "lines.conf").write_text(text)
    once = printed("-c", "lines.conf", cwd=tmp_path)
    assert "inside = 10.0.0.0/8 ::1\n" in once and "listen = *:1 127.0.0.1:2\n" in once
    (tmp_path / "natwork.conf").write_text(once)
    assert printed(cwd=tmp_path) == once


def test_fewer_workers_mean_fewer_spare_ones_unless_they_are_named(
    tmp_path: Path,
) -> None:
    once = printed("-o", "max_workers=3", cwd=tmp_path)
    assert "spare_workers = 3\nmax_workers = 3\n" in once
    options = "-o", "max_workers=3", "-o", "spare_workers=4"
    assert "at most max_workers" in refused("-t", *options, cwd=tmp_path)


@pytest.mark.parametrize(
    ("host", "name"),
    [("(none)", "none"), ("b\xfcro.lan", "bro.lan"), ("()", "natwork")],
)
def test_a_box_without_a_proper_name_starts(
    monkeypatch: pytest.MonkeyPatch, host: str, name: str
) -> None:
    monkeypatch.setattr("socket.gethostname", lambda: host)
    assert natwork.Config().name == name


@pytest.mark.parametrize(
    "text",
    ["0.0.0.0:81 127.0.0.1:81", "[::]:81 [::1]:81", "[::1]:81 [0::1]:81", "8080"],
)
def test_listeners_that_cannot_be_together_are_refused(
    checked: Callable[[str], str], text: str
) -> None:
    why = checked(f"[natwork]\nlisten = {text}\n")
    assert why.startswith(f"natwork: bad.conf: listen = {text}: ")
    assert "twice" in why or "includes" in why or "ADDRESS:PORT" in why


def test_one_address_has_one_spelling() -> None:
    spelled = "[0::0]:1", "[::ffff:127.0.0.1]:1", "127.0.0.1:1"
    found = [natwork.parse_endpoint(text) for text in spelled]
    assert found == [("::", 1), ("127.0.0.1", 1), ("127.0.0.1", 1)]


@pytest.mark.parametrize("option", ["-t", "--version", "--help"])
def test_a_full_disk_under_what_is_printed_is_one_line(
    tmp_path: Path, option: str
) -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [*running.PROGRAM, option],
            cwd=tmp_path,
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONUNBUFFERED": ""},  # argparse says nothing of it
        )
    said = "natwork: cannot go on: no space left on device\n"
    assert (done.returncode, running.OF_THIS_BOX.sub("", done.stderr)) == (1, said)


def test_a_nul_in_the_file_changes_nothing(
    daemon: running.Start,
) -> None:
    gateway = daemon()
    said = gateway.hangup(rules="a\0b")
    assert "not reloaded" in said and said.endswith("has a NUL in it")
    assert gateway.hangup(rules="").endswith("configuration reloaded")


def test_who_does_not_read_what_is_said_stops_nobody(tmp_path: Path) -> None:
    said_out, said_in = os.pipe2(os.O_NONBLOCK)
    os.set_blocking(said_in, True)
    (tmp_path / "natwork.conf").write_text("[natwork]\nlisten = 127.0.0.1:0\n")
    process = subprocess.Popen(
        [*running.PROGRAM], cwd=tmp_path, stderr=said_in, stdout=-3
    )
    try:
        heard = ""
        while not (match := re.search(r"listening on 127.0.0.1:(\d+)\n", heard)):
            select.select([said_out], [], [], 20)
            heard += os.read(said_out, 4096).decode()
        os.set_blocking(said_in, False)  # filled by us, and read by nobody
        with contextlib.suppress(BlockingIOError):
            while os.write(said_in, b"x" * 4096):
                pass
        os.set_blocking(said_in, True)
        for _ in range(3):
            process.send_signal(signal.SIGHUP)
            for _ in range(12):
                with socket.create_connection(
                    ("127.0.0.1", int(match[1])), 10
                ) as client:
                    assert (
                        http_wire.exchange(
                            client, http_wire.request(http_wire.DENIED)
                        ).status
                        == 403
                    )
        process.terminate()
        assert process.wait(20) == 0
    finally:
        process.kill()
        process.wait()
        os.close(said_out)
        os.close(said_in)


def test_a_file_that_is_none_is_refused_and_nobody_waits_for_it(
    daemon: running.Start, tmp_path: Path
) -> None:
    os.mkfifo(tmp_path / "fifo")
    given = "[natwork]\nlisten = 127.0.0.1:0\n"
    for file in ("fifo", "/dev/stdin", "."):  # what is read twice must say the same
        words = [*running.PROGRAM, "-c", file]
        done = subprocess.run(
            words, cwd=tmp_path, input=given, capture_output=True, text=True, timeout=20
        )
        assert done.returncode == 78 and re.fullmatch(
            f"natwork: {file}: it is not a regular file\n", done.stderr
        )
    gateway = daemon()
    gateway.file.unlink()
    os.mkfifo(gateway.file)
    gateway.process.send_signal(signal.SIGHUP)
    wait.until(lambda: "it is not a regular file" in gateway.errors.read_text())
    gateway.file.unlink()
    gateway.file.mkdir()
    before = len(gateway.said())
    held = kernel.descriptors(gateway.process.pid)
    gateway.process.send_signal(signal.SIGHUP)
    wait.until(lambda: len(gateway.said()) > before)
    assert kernel.descriptors(gateway.process.pid) == held


def test_the_line_ends_of_an_editor_are_no_matter(tmp_path: Path) -> None:
    lines = "[natwork]", "listen = 127.0.0.1:18999", "rules = deny to *", ""
    (tmp_path / "natwork.conf").write_bytes("\r\n".join(lines).encode())
    config = natwork.load_config(str(tmp_path / "natwork.conf"), [])
    assert (config.listen, config.rules) == ("127.0.0.1:18999", "deny to *")


# --- The operator's first day -------------------------------------------------


def faults(tmp_path: Path, text: str, *options: str) -> list[str]:
    """Return the lines about a bad configuration, of -t and of a start alike."""
    (tmp_path / "natwork.conf").write_text(f"[natwork]\n{text}\n")
    tested = running.command("-t", *options, cwd=tmp_path)
    started = running.command(*options, cwd=tmp_path)
    assert (tested.returncode, tested.stdout) == (78, "")
    assert (started.returncode, started.stderr) == (78, tested.stderr)
    return tested.stderr.splitlines()


def test_all_that_is_wrong_is_said_at_once(tmp_path: Path) -> None:
    text = """
        idle_timeout = soon
        max_worker = 9
        inside = 10.0.0.0/8, 192.168.0.0/16
        listen = 127.0.0.1:80 127.0.0.1:99999
        outside = 1.2.3
        rules = allow to 10.0.0.0/8 192.168.0.0/16; allow to *; deny nothing
        users = nowhere
        bind_ports = 9-1
        user = nobody-of-that-name
    """
    said = faults(tmp_path, "\n".join(map(str.strip, text.split("\n"))))
    places = [line.removeprefix("natwork: natwork.conf: ") for line in said]
    names = [place.partition(" =")[0] for place in places]
    expected = "idle_timeout max_worker inside outside listen user users bind_ports"
    assert sorted(set(names)) == sorted([*expected.split(), "rules"])
    assert len(names) == len(set(said)) and names.count("rules") == 1


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("max_worker = 9", "; did you mean max_workers?"),
        ("keepalive_timeou = 9", "; did you mean keepalive_timeout?"),
        ("Idle-Timeout = 9", "; did you mean idle_timeout?"),
        (
            "idle_timeout = 5m",
            "is not a number of seconds above 0; write the number without a unit",
        ),
        ("idle_timeout = 5 ; or 6", "; a comment has a line of its own"),
        ("listen = *:8080 # all", "; a comment has a line of its own"),
        ("listen = *:1; *:2", "; separate them with blanks, not commas"),
        ("rules = deny to a.example port 80 443", " of a list with commas, not blanks"),
        (
            "rules = deny to a.example b.example c.example",
            "list with commas, not blanks",
        ),
        ("inside = 10.0.0.0/8, ::1", "; separate them with blanks, not commas"),
        ("listen = 127.0.0.1:65536", "'127.0.0.1:65536' has no port from 0 to 65535"),
        ("gateways = a.example:65536", "HOST:PORT (port not from 1 to 65535)"),
        ("rules = allow to a.example b", "pairs of a word and a list with commas"),
    ],
)
def test_what_was_probably_meant_is_said(tmp_path: Path, text: str, hint: str) -> None:
    assert hint in "".join(faults(tmp_path, text))


def test_a_section_that_is_a_url_keeps_its_password(tmp_path: Path) -> None:
    (tmp_path / "natwork.conf").write_text("[http://u:kQ7x@127.0.0.1:1]\na = b\n")
    done = running.command("-t", cwd=tmp_path)
    assert done.returncode == 78 and "kQ7x" not in done.stderr
    assert re.fullmatch(ONE_LINE, done.stderr)


def test_a_list_in_parts_is_not_called_a_comment(tmp_path: Path) -> None:
    (said,) = faults(tmp_path, "rules = allow to * ; deny nothing")
    assert "comment" not in said


def test_without_its_chapter_a_fault_is_said_all_the_same(tmp_path: Path) -> None:
    (tmp_path / "natwork.py").write_bytes((running.ROOT / "natwork.py").read_bytes())
    program = [sys.executable, "natwork.py"]
    said = ["-t", "-o", "max_worker=9", "-o", "listen=x"]
    done = running.command(*said, cwd=tmp_path, program=program)
    assert done.returncode == 78 and done.stderr.splitlines() == [
        "natwork: option -o: max_worker = 9: there is no such setting",
        "natwork: option -o: listen = x: 'x' is not ADDRESS:PORT, an IPv6 address in"
        " brackets",
    ]


def test_paths_in_a_file_count_from_the_file(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "there/n.conf").write_text("[natwork]\nlog = a.log\npidfile = p\n")
    said = printed("-c", "there/n.conf", cwd=tmp_path)
    assert "log = there/a.log\n" in said and "pidfile = there/p\n" in said
    said = printed("-c", "there/n.conf", "-o", "log=b.log", cwd=tmp_path)
    assert "log = b.log\n" in said
    (tmp_path / "natwork.conf").write_text("[natwork]\nlog = -\npidfile =\n")
    assert "log = -\n" in printed(cwd=tmp_path)


def in_etc(tmp_path: Path, text: str, booted: str = "systemd") -> list[str]:
    """Return what runs natwork.py where /etc/natwork/natwork.conf has some text.

    The box looks as if it had booted systemd, or something else.
    """
    folder = tmp_path / "etc/natwork"
    folder.mkdir(parents=True)
    (folder / "natwork.conf").write_text(text)
    shutil.copy("/etc/passwd", tmp_path / "etc")
    inner = f"mount --bind {tmp_path}/etc /etc && mount -t tmpfs run /run && "
    inner += f'mkdir -p /run/{booted}/system && exec "$@"'
    return ["unshare", "--mount", "sh", "-c", inner, "sh", *running.PROGRAM]


@needs.root
def test_a_log_that_the_service_could_not_write_is_named(tmp_path: Path) -> None:
    program = in_etc(tmp_path, f"[natwork]\nlog = {tmp_path}/access.log\n")
    done = running.command("-t", cwd=tmp_path, program=program)
    warning = "natwork: log: the service can write below /var/log/natwork/ only\n"
    assert done.returncode == 0 and warning in done.stderr
    fine = "natwork: ok: /etc/natwork/natwork.conf\n"
    words = "-t", "-o", "log=/dev/null"
    assert running.command(*words, cwd=tmp_path, program=program).stderr == fine
    # /var/log may be a link: the path that the service opens is the same.
    (tmp_path / "log/natwork").mkdir(parents=True)
    link = f'mount -t tmpfs var /var && ln -s {tmp_path}/log /var && exec "$@"'
    words = "-t", "-o", "log=/var/log/natwork/access.log"
    program[6:6] = ["sh", "-c", link, "sh"]
    assert running.command(*words, cwd=tmp_path, program=program).stderr == fine


@needs.root
def test_a_box_without_systemd_has_no_service_to_speak_of(tmp_path: Path) -> None:
    text = f"[natwork]\nlisten = 127.0.0.1:0\nlog = {tmp_path}/access.log\n"
    program = in_etc(tmp_path, text, booted="other")
    unit = tmp_path / "etc/systemd/system/sockets.target.wants/natwork.socket"
    unit.parent.mkdir(parents=True)
    unit.touch()
    said = running.command("-t", cwd=tmp_path, program=program).stderr
    assert said == "natwork: ok: /etc/natwork/natwork.conf\n"


def test_a_pid_file_two_directories_away_is_refused(tmp_path: Path) -> None:
    done = running.command("-t", "-o", "pidfile=a/b/pid", cwd=tmp_path)
    assert done.returncode == 78 and "there is no such directory" in done.stderr


@needs.root
def test_the_file_in_etc_is_read_where_there_is_none_here(tmp_path: Path) -> None:
    program, where = in_etc(tmp_path, "[natwork]\nname = of-etc\n"), tmp_path
    done = running.command("-t", cwd=where, program=program)
    assert done.stderr == "natwork: ok: /etc/natwork/natwork.conf\n"
    assert "name = of-etc\n" in done.stdout
    words = "--explain", "127.0.0.7", "192.0.2.1:80"
    done = running.command(*words, cwd=where, program=program)
    assert done.stdout.startswith("settings: /etc/natwork/natwork.conf\n")
    (where / "natwork.conf").write_text("[natwork]\nname = of-here\n")
    done = running.command("-t", cwd=where, program=program)
    assert done.stderr == "natwork: ok: natwork.conf\n"
    assert "name = of-here\n" in done.stdout


@needs.root
def test_a_listen_that_the_service_does_not_use_is_said(tmp_path: Path) -> None:
    program = in_etc(tmp_path, "[natwork]\nlisten = 127.0.0.1:0\n")
    words = (
        "natwork: listen: the service does not use it, natwork.socket listens for it"
    )
    unit = tmp_path / "etc/systemd/system/sockets.target.wants/natwork.socket"
    unit.parent.mkdir(parents=True)
    said = running.command("-t", cwd=tmp_path, program=program).stderr.splitlines()
    assert words not in said  # it is not enabled
    unit.write_text("[Socket]\n")
    for file in ("/etc/natwork/natwork.conf", "/etc/natwork/../natwork/natwork.conf"):
        done = running.command("-t", "-c", file, cwd=tmp_path, program=program)
        said = done.stderr.splitlines()
        assert words in said and said[-1].startswith("natwork: ok: ")
    (tmp_path / "other.conf").write_text("[natwork]\nlisten = 127.0.0.1:0\n")
    words = "-t", "-c", "other.conf"
    other = running.command(*words, cwd=tmp_path, program=program).stderr
    assert other == "natwork: ok: other.conf\n"


def test_listeners_on_a_device_of_outside_alone_serve_nobody(tmp_path: Path) -> None:
    done = running.command(
        "-t", "-o", "outside=lo", "-o", "listen=127.0.0.1:1", cwd=tmp_path
    )
    said = "natwork: listen: nobody is a client at an address of outside\n"
    assert done.returncode == 0 and said in done.stderr


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        (
            "rules=allow to 0.0.0.0/0",
            "rules: 'allow to 0.0.0.0/0' opens loopback, this box and the inside, too",
        ),
        (
            "outside=127.0.0.1",
            "outside: 127.0.0.1 is an inside address, but nobody is a client there",
        ),
        ("users=empty", "users: empty has none, so nobody is served"),
        ("rules=deny user Ann", "rules: Ann in 'deny user Ann' is not in one"),
    ],
)
def test_what_is_probably_not_meant_is_said(
    tmp_path: Path, setting: str, said: str
) -> None:
    (tmp_path / "empty").touch(mode=0o600)
    one = tmp_path / "one"
    one.touch(mode=0o600)
    one.write_bytes(natwork_users.user_line(b"ann", b"secret") + b"\n")
    words = "-t", "-o", "users=one", "-o", setting
    for harmless in ("rules=allow to 10.0.0.0/8", "rules=deny user ann"):
        done = running.command(*words[:-1], harmless, cwd=tmp_path)
        assert said not in done.stderr
    done = running.command(*words, cwd=tmp_path)
    assert done.returncode == 0 and f"natwork: {said}\n" in done.stderr


@needs.root
def test_a_file_of_users_that_the_user_may_not_read_is_said(tmp_path: Path) -> None:
    users = tmp_path / "users"
    users.write_text("")
    users.chmod(0o640)
    words = "-t", "-o", "users=users", "-o"
    said = "natwork: users: nobody cannot read users: see to its group\n"
    assert said in running.command(*words, "user=nobody", cwd=tmp_path).stderr
    assert said not in running.command(*words, "user=root", cwd=tmp_path).stderr
    os.chown(users, 0, pwd.getpwnam("nobody").pw_gid)
    assert said not in running.command(*words, "user=nobody", cwd=tmp_path).stderr


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("inside=", "inside: nobody is a client, it is empty"),
        ("rules=deny user a", "rules: a rule with user fits nobody, users is not set"),
        ("log=a # b", "log: it is 'a # b'; a comment has a line of its own"),
        (
            "listen=127.0.0.1:1 [::1]:1",
            "listen: nobody is a client at an address of outside",
        ),
    ],
)
def test_what_serves_nobody_is_said(tmp_path: Path, setting: str, said: str) -> None:
    outside = ["-o", "outside=127.0.0.1 ::1"]
    done = running.command("-t", *outside, "-o", setting, cwd=tmp_path)
    assert done.returncode == 0 and f"natwork: {said}\n" in done.stderr
    good = "-o", "rules=allow to *; deny", "-o", "listen=*:1"
    quiet = running.command("-t", *outside, *good, cwd=tmp_path)
    text = "natwork: outside: %s is an inside address, but nobody is a client there\n"
    assert quiet.stderr == text % "::1" + text % "127.0.0.1" + (
        "natwork: ok: the defaults\n"
    )


@pytest.mark.parametrize("option", ["-t", "--help"])
def test_a_reader_that_has_enough_is_no_fault(tmp_path: Path, option: str) -> None:
    shell = f"{shlex.join([*running.PROGRAM, option])} | true; echo ${{PIPESTATUS[0]}}"
    done = running.command(cwd=tmp_path, program=["bash", "-c", shell])
    said = "natwork: ok: the defaults\n" if option == "-t" else ""
    assert done.stdout == "0\n" and done.stderr in ("", said)


def test_the_settings_are_built_in_as_they_are_shipped(tmp_path: Path) -> None:
    done = running.command("--settings", cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, SHIPPED.read_text(), "")
    (tmp_path / "natwork.conf").write_text(done.stdout)
    assert printed(cwd=tmp_path) == printed("-c", str(SHIPPED), cwd=tmp_path)


def test_the_help_names_the_port_the_places_and_an_example(tmp_path: Path) -> None:
    said = " ".join(running.command("--help", cwd=tmp_path).stdout.split())
    for words in ("port 8080", "/etc/natwork/natwork.conf", "natwork.py -o listen="):
        assert words in said
