"""The Debian package, made of this tree and installed in a container with systemd."""

from __future__ import annotations

import importlib.metadata
import re
import shlex
import sys
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

import http_wire
import kernel
import machine
import needs
import origins
import package
import pytest
import readme
import running
import test_manuals
import wait

import natwork as heart

DEBIAN = running.ROOT / "debian"


@pytest.fixture(scope="module")
def deb(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return package.build(tmp_path_factory.mktemp("package"))


def hello(connection: origins.socket.socket, origin: origins.Origin) -> None:
    """Be an origin that answers one request."""
    if connection.recv(65536):
        connection.sendall(http_wire.sized(b"hello"))


@pytest.fixture(scope="module")
def bare() -> Iterator[package.Host]:
    """A container where it is not installed yet, nor has ever been."""
    with machine.booted(package.Host) as host:
        yield host


@pytest.fixture(scope="module")
def before(bare: package.Host) -> set[str]:
    return bare.names()


@pytest.fixture(scope="module")
def host(bare: package.Host, before: set[str], deb: Path) -> package.Host:
    """The container after `apt install`, and nothing else."""
    bare.install(deb)
    return bare


@pytest.fixture(scope="module")
def outside(bare: package.Host) -> Iterator[origins.Origin]:
    with package.outside_of(bare, hello) as server:
        yield server


# What can be said of the files.


def test_the_version_stands_in_one_place() -> None:
    first = (DEBIAN / "changelog").read_text().partition("\n")[0]
    assert first.startswith(f"natwork ({heart.__version__}) ")
    assert (
        f'version = "{heart.__version__}"'
        not in (running.ROOT / "pyproject.toml").read_text()
    )
    assert f"\n## {heart.__version__}" in (running.ROOT / "CHANGES.md").read_text()


def test_lintian_finds_nothing(deb: Path) -> None:
    needs.programs("lintian")
    words = ["lintian", "--allow-root", "--fail-on=error,warning", "--info", deb]
    package.run(*words, cwd=deb.parent)


def test_the_package_has_all_modules_and_pages(deb: Path) -> None:
    listed = package.run("dpkg-deb", "--contents", deb, cwd=deb.parent)
    names = {line.split()[5] for line in listed.splitlines()}
    modules = [path.name for path in running.ROOT.glob("nat*.py")]
    assert len(modules) > 1
    assert {f"./usr/share/natwork/{name}" for name in modules} <= names
    pages = "man8/natwork.8", "man5/natwork.conf.5", "man1/natrun.1", "man1/natpunch.1"
    for name in [f"{page}.gz" for page in pages]:
        assert f"./usr/share/man/{name}" in names
    assert not [name for name in names if "/test" in name or name.endswith(".pyc")]


def test_a_wheel_has_all_modules_and_pages(tmp_path: Path) -> None:
    if int(importlib.metadata.version("setuptools").partition(".")[0]) < 77:
        needs.unavailable("setuptools is older than 77 and knows no license by name")
    source, python = package.copy_sources(tmp_path / "natwork"), sys.executable
    pip = [python, "-m", "pip", "--no-cache-dir", "--disable-pip-version-check"]
    words = "wheel --verbose --no-index --no-deps --no-build-isolation .".split()
    # What is deprecated fails one day, where somebody has a newer setuptools.
    assert "Deprecat" not in package.run(*pip, *words, cwd=source)
    (wheel,) = source.glob("*.whl")
    assert wheel.name.startswith(f"natwork-{heart.__version__}-py3-none-any")
    modules = {path.name for path in running.ROOT.glob("nat*.py")}
    with zipfile.ZipFile(wheel) as file:
        names = {Path(name).name for name in file.namelist()}
        top = {name for name in file.namelist() if "/" not in name}
    pages = {"natwork.8", "natwork.conf.5", "natrun.1", "natpunch.1"}
    assert top == modules and pages <= names
    package.run(python, "-m", "venv", "--without-pip", "venv", cwd=tmp_path)
    words = ["--python", tmp_path / "venv/bin/python", "install", "--no-index"]
    package.run(*pip, *words, "--quiet", "--no-deps", wheel, cwd=tmp_path)
    said = package.run(tmp_path / "venv/bin/natwork", "--version", cwd=tmp_path)
    assert said == f"natwork {heart.__version__}\n"
    words = ["--explain", "127.0.0.7", "http://127.0.0.1/"]  # a chapter's work
    said = package.run(tmp_path / "venv/bin/natwork", *words, cwd=tmp_path, code=1)
    assert "denied-loopback" in said
    assert (tmp_path / "venv/share/man/man8/natwork.8").exists()


# In a container.


def test_installed_alone_it_serves_curl(
    host: package.Host, outside: origins.Origin
) -> None:
    assert host.curl(f"{outside.url}/") == "hello"
    for unit in ("natwork.service", "natwork.socket"):
        said = host.run(f"systemctl is-active {unit}; systemctl is-enabled {unit}")
        assert said.stdout == "active\nenabled\n"
    line = f"method=GET target={outside.url}/ address=192.0.2.2:"
    wait.until(lambda: line in host.journal())
    assert "natwork: chapters: socks redirect" in host.journal()
    assert host.show("User") == "natwork" and host.show("NRestarts") == "0"


def test_its_files_belong_to_whom_they_should(host: package.Host) -> None:
    said = host.run(f"stat -c '%A %U %G' {package.CONF} /var/log/natwork").stdout
    assert said == "-rw-r----- root natwork\ndrwxr-x--- natwork natwork\n"
    said = host.run("getent passwd natwork; id -G natwork; id -g natwork").stdout
    assert ":/nonexistent:/usr/sbin/nologin\n" in said
    assert len(said.split("\n")[1].split()) == 1  # in no other group
    version = host.run("cd / && natwork --version").stdout
    assert version == f"natwork {heart.__version__}\n"


def test_the_units_are_those_of_the_tree_at_other_places(host: package.Host) -> None:
    for name in ("natwork.service", "natwork.socket"):
        shipped = (running.ROOT / "systemd" / name).read_text().splitlines()
        installed = (host.root / "lib/systemd/system" / name).read_text().splitlines()
        assert len(shipped) == len(installed)
        for one, other in zip(shipped, installed):
            one = one.replace(
                "/usr/local/bin/natwork.py", "/usr/share/natwork/natwork.py"
            )
            assert one == other or one.startswith("Documentation=")
        assert "/usr/local/bin" not in "\n".join(installed)
    assert host.run("systemd-analyze verify --man=no natwork.service").stderr == ""


def test_what_the_unit_runs_is_there_with_the_package(host: package.Host) -> None:
    unit = host.run("systemctl cat natwork.service").stdout
    depends = host.run("dpkg-query --show --showformat '${Depends}' natwork").stdout
    for path in sorted(
        set(re.findall(r"(?m)^Exec\w+=\+?(/usr/bin/\S+|/bin/\S+)", unit))
    ):
        where = "*" + path.removeprefix("/usr")  # /bin and /usr/bin are one directory
        owner = host.run(f"dpkg-query --search '{where}'").stdout.partition(":")[0]
        assert owner.removesuffix("-minimal") in re.findall(r"[\w-]+", depends), path


def test_a_change_is_reloaded(host: package.Host) -> None:
    conf, before = host.root / package.CONF[1:], host.reloads()
    shipped = conf.read_text()
    conf.write_text(shipped + "spare_workers = 3\n")
    host.run("systemctl reload natwork")
    wait.until(lambda: host.reloads() > before)
    conf.write_text(shipped)


def test_an_upgrade_restarts_it_and_keeps_the_listeners(
    host: package.Host, outside: origins.Origin
) -> None:
    conf = host.root / package.CONF[1:]
    shipped = conf.read_text()
    conf.write_text(shipped + "# mine\n")
    conf.chmod(0o440)
    show = "systemctl show --value -p ActiveEnterTimestampMonotonic natwork.socket"
    opened, master = host.run(show).stdout, host.show("MainPID")
    host.run(f"dpkg --install /root/{package.DEB}")  # over itself: as an upgrade
    assert host.run(show).stdout == opened and host.show("MainPID") != master
    assert host.curl(f"{outside.url}/") == "hello"
    assert (
        conf.read_text().endswith("# mine\n") and conf.stat().st_mode & 0o777 == 0o440
    )
    conf.write_text(shipped)
    host.run(f"chmod 640 {package.CONF}")


def test_the_log_is_rotated(host: package.Host, outside: origins.Origin) -> None:
    needs.programs("logrotate")
    conf, log = host.root / package.CONF[1:], host.root / "var/log/natwork/access.log"
    shipped = conf.read_text()
    conf.write_text(shipped + "log = /var/log/natwork/access.log\n")
    host.run("systemctl restart natwork")
    host.curl(f"{outside.url}/old")
    wait.until(lambda: "/old " in log.read_text())
    before = host.reloads()
    host.run("logrotate --force /etc/logrotate.d/natwork")
    wait.until(lambda: host.reloads() > before)
    host.curl(f"{outside.url}/new")
    wait.until(lambda: "/new " in log.read_text())
    assert "/old " in log.with_suffix(".log.1").read_text()
    host.run("systemctl stop natwork.socket natwork")
    host.run("logrotate --force /etc/logrotate.d/natwork")  # nobody to be told
    conf.write_text(shipped)
    host.run("systemctl start natwork.socket natwork")


def test_fail2ban_finds_who_guesses_passwords(host: package.Host) -> None:
    needs.programs("fail2ban-regex")
    stamp = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    form = f"time={stamp} pid=1 client=%s user=- proto=http method=GET target=http://a/"
    form += " address=- source=- status=407 outcome=%s up=0 down=9 secs=0.000\n"
    text = form % ("10.0.0.7:1", "auth-failed") + form % ("10.0.0.8:1", "ok")
    (host.root / "root/access.log").write_text(text)
    words = "fail2ban-regex --out '<ip>' /root/access.log"
    assert host.run(f"{words} natwork").stdout == "10.0.0.7\n"


def test_bash_completes_its_words(host: package.Host) -> None:
    script = "/usr/share/bash-completion/completions/natwork"
    for line, words in {
        "natwork --ta": ["--table"],
        "natwork -o spare": ["spare_workers="],
        "natwork -c /etc/natwork/": [package.CONF],
    }.items():
        number = len(line.split()) - 1
        command = f"COMP_WORDS=({line}); COMP_CWORD={number}; _natwork natwork"
        command = f". {script}; {command}; printf '%s\\n' \"${{COMPREPLY[@]}}\""
        for who in ("", "setpriv --reuid=games --regid=games --clear-groups "):
            if not who or "/etc/natwork" not in line:  # which others may not read
                said = host.run(f"{who}bash -uc {shlex.quote(command)}")
                assert said.stdout.split() == words, said
    said = host.run("cd / && natwork --help").stdout
    offered = set(
        re.findall(r"(?<![\w-])--?[a-z]+", (host.root / script[1:]).read_text())
    )
    assert set(re.findall(r"(?<![\w-])--?[a-z]+", said)) - {"-h"} <= offered


def test_the_examples_of_the_manual_work(
    host: package.Host, outside: origins.Origin
) -> None:
    expected = {
        "natwork -t": "listen = *:8080\n",
        "natwork --explain": "192.0.2.2: allowed by ",
        "natwork --passwd": "",
        "natwork --table": "",
        "ps": "natwork: master ",
        "curl": "hello",
        "systemctl": "",
    }
    host.run("ip address replace 10.0.0.1/24 dev lo")
    for command in test_manuals.examples():
        begins = next(words for words in expected if command.startswith(words))
        command = command.replace("http://192.0.2.2", outside.url)
        said = host.run(f"cd /root; yes sesame | {{ {command}; }}").stdout
        assert expected[begins] in said, command
    assert (host.root / "root/users").read_text().startswith("alice:")


def test_purged_it_leaves_nothing(
    host: package.Host, before: set[str], deb: Path
) -> None:
    host.run("cd / && natwork -t")  # as root, who may write anywhere
    host.run("echo alice:x >/etc/natwork/users")  # the operator's own
    for unit in ("natwork.service", "natwork.socket"):  # of `systemctl edit`
        host.run(
            f"cd /etc/systemd/system; mkdir {unit}.d; touch {unit}.d/override.conf"
        )
    assert "`apt purge natwork`" in readme.section("The service")
    host.run("export DEBIAN_FRONTEND=noninteractive; yes | apt purge natwork")
    assert host.names() - before == set()
    for unit in ("natwork.service", "natwork.socket"):
        assert host.run(f"systemctl cat {unit}", check=False).returncode != 0
    assert host.run("pgrep -u natwork", check=False).stdout == ""
    assert host.run("dpkg --list natwork", check=False).stdout.count("\nii ") == 0
    with kernel.network_of(host.leader), pytest.raises(ConnectionRefusedError):
        origins.socket.create_connection(("127.0.0.1", 8080))
    for table in ("passwd", "group"):
        assert host.run(f"getent {table} natwork", check=False).stdout == ""
    host.install(deb)  # and once more
    assert host.run("systemctl is-active natwork").stdout == "active\n"
