"""The manual pages: natwork(8), natwork.conf(5) and natpunch(1)."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import http_wire
import needs
import pytest
import running

import natwork as heart

PAGES = {
    name: (running.ROOT / "docs" / name).read_text()
    for name in ("natwork.8", "natwork.conf.5", "natrun.1", "natpunch.1")
}


def section(name: str, title: str) -> str:
    """Return a section or subsection of a page."""
    parts = re.split(r"^\.S[hs] (.*)\n", PAGES[name], flags=re.M)
    return dict(zip(parts[1::2], parts[2::2]))[title]


def examples() -> list[str]:
    """Return the commands under EXAMPLES of natwork(8)."""
    return re.findall(r"^\.Dl \$ (.*)$", section("natwork.8", "EXAMPLES"), re.M)


@pytest.mark.parametrize("name", PAGES)
def test_mandoc_has_nothing_to_say(name: str) -> None:
    needs.programs("mandoc")
    done = subprocess.run(
        ["mandoc", "-T", "lint", running.ROOT / "docs" / name],
        capture_output=True,
        text=True,
        timeout=60,
    )
    # What else is installed here is not the page's fault.
    said = re.sub(r".*(referenced manual not found|mandoc\.db).*\n", "", done.stdout)
    assert said == "", done


@pytest.mark.parametrize("name", PAGES)
def test_man_has_nothing_to_say(name: str) -> None:
    needs.programs("man", "groff")
    done = subprocess.run(
        ["man", "--warnings", "-E", "UTF-8", "-l", running.ROOT / "docs" / name],
        env={"PATH": "/usr/bin:/bin", "LANG": "C.UTF-8", "MANWIDTH": "80"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0 and done.stderr == "" and "SEE ALSO" in done.stdout


def test_every_setting_is_there_with_its_default() -> None:
    text = PAGES["natwork.conf.5"].replace("\\\n", "").replace("\\-", "-")
    given = re.findall(r"^\.It Ic (\w+) =(.*)$", text, re.M)
    default = heart.Config()
    default.name = ""  # which the host would give
    assert [(name, value.strip()) for name, value in given] == [
        (name, default.spelled(name)) for name in heart.DEFAULTS
    ]


def test_the_example_is_taken(tmp_path: Path) -> None:
    example = section("natwork.conf.5", "EXAMPLES")
    text = example.partition(".Bd -literal -offset indent\n")[2].partition(".Ed")[0]
    (tmp_path / "natwork.conf").write_text(text)
    done = running.command("-t", cwd=tmp_path)
    assert done.returncode == 0, done
    assert "outside = eth1\n" in done.stdout
    assert "deny to .ads.example" in done.stdout


def test_every_outcome_is_there_with_its_status() -> None:
    table = section("natwork.8", "Outcomes")
    rows = re.findall(r"^\.It Ic (\S+) Ta (\d+) Ta .+$", table, re.M)
    known = [(word, str(o.status)) for word, o in heart.OUTCOMES.items()]
    assert rows == known
    for word, _ in heart.CLOSED:
        assert f"denied-{word}" in table


def test_every_field_of_the_log_is_there_in_its_order(natwork: running.Start) -> None:
    gateway = natwork()
    with gateway.connect() as client:
        http_wire.exchange(client, http_wire.request(http_wire.DENIED))
    (line,) = gateway.lines(1)
    text = section("natwork.8", "ACCESS LOG")
    assert re.findall(r"^\.It Ic (\w+)$", text, re.M) == list(line)
    assert set(heart.PROTOCOLS) - {"-"} <= set(text.replace(",", " ").split())


def test_every_option_is_there() -> None:
    done = running.command("--help", cwd=running.ROOT)
    offered = set(re.findall(r"(?<![\w-])--?[a-z]+", done.stdout))
    listed = re.findall(r"^\.It (Fl .*)$", PAGES["natwork.8"], re.M)
    named = {"-" + word for line in listed for word in re.findall(r"Fl (\S+)", line)}
    assert named == offered


def test_exit_codes_and_signals_are_there() -> None:
    codes = re.findall(r"^\.It (\d+)$", section("natwork.8", "EXIT STATUS"), re.M)
    assert codes == ["0", "1", "2", "78"]
    for name in ("SIGTERM", "SIGINT", "SIGHUP"):
        assert name in section("natwork.8", "SIGNALS")
