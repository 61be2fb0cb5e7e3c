"""Every command of README.md and docs/guide.md, as it stands, at its own addresses.

The box is the one of the README's first picture: 10.0.0.0/24 is the inside, and the
outside, 192.0.2.0/24, has a server for each name.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import boxes
import http_wire
import needs
import pytest
import readme
import running
import wait
import web

pytestmark = pytest.mark.end_to_end


# What the two have for a shell, by how it begins, under the test that runs it; and
# what looks like it, under the reason why none does.
RUNS = {
    "test_readme.test_the_first_screen": [
        "python3 natwork.py",
        "curl -x http://10.0.0.1:8080 http:",
        "time=",
        "natwork: master",
        "ps -ef",
        "natwork.py --table",
    ],
    "test_readme.test_pip_installs_it": ["python3 -m venv venv"],
    "test_readme.test_the_configuration_is_taken": [
        "[natwork]",
        "python3 natwork.py -t",
        "natwork.py -t",
    ],
    "test_readme.test_the_rules_are_explained": [
        "python3 natwork.py --explain",
        "natwork.py --explain",
    ],
    "test_readme.test_it_detaches": ["user = natwork", "install -d", "natwork.py -c"],
    "test_readme.test_a_user_is_asked_for_her_password": [
        "python3 natwork.py --passwd",
        "python3 natwork.py -o users",
        "curl -x http://10.0.0.1:8080 -U",
    ],
    "test_readme.test_the_settings_of_clients": ["export", "echo", "git"],
    "test_readme.test_a_limit": ["natwork.py -o max"],
    "test_readme.test_squid_is_the_parent": ['natwork.py -o "parents'],
    "test_readme.test_socks_by_curl": ["curl --socks5-hostname"],
    "test_readme.test_natrun_runs_a_program": [
        "python3 natrun.py -g 10.0.0.1 curl",
        "python3 natrun.py -g 10.0.0.1 --check",
    ],
    "test_readme.test_socks_by_ssh": ["ssh"],
    "test_readme.test_an_ftp_server_calls_back": ["socksify tnftp"],
    "test_readme.test_a_name_server_is_asked": ["socksify drill"],
    "test_readme.test_a_name_is_asked_for": ["tor-resolve"],
    "test_readme.test_a_machine_is_called": [
        "natwork.py -o mappings",
        "natpmpc",
        "natwork: mapper",
    ],
    "test_readme.test_ftp": [
        "curl -x http://10.0.0.1:8080 ftp:",
        "curl -x http://10.0.0.1:8080 -T",
    ],
    "test_readme.test_gopher": ["gopher_proxy"],
    "test_readme.test_own_pages": [
        "curl http://10.0.0.1:8080/table.json",
        "curl 'http://10.0.0.1:8080/table.json?source_port=",
        "curl http://10.0.0.1:8080/metrics",
    ],
    "test_readme.test_chromium_finds_its_way": ["chromium"],
    "test_confinement.test_all_sessions_of_an_address_are_ended_as_the_readme_says": [
        "python3 natwork.py --table"
    ],
    "test_log.test_fail2ban_finds_who_knocks_from_outside": ["[Definition]"],
    "test_redirect.rig": ["nft -f"],
    "test_redirect.test_dnsmasq_is_the_resolver": ["dnsmasq"],
    "test_systemd.container": [
        "install -D -m 755",
        "install -D -m 640 -g natwork natwork.conf",
        "install -D -m 644 -t /usr/local/bin",
        "install -D -m 644 -t /usr/local/share",
        "install -D -m 644 -t /etc",
        "useradd",
        "systemctl daemon-reload",
        "systemctl enable --now natwork.socket",
    ],
    "test_systemd.test_the_lines_for_nft_are_there_after_a_boot": [
        "systemctl enable nftables"
    ],
    "test_systemd.test_uninstalled_it_leaves_nothing": [
        "systemctl disable --now natwork.socket natwork.service",
        "rm -f /usr",
        "rm -r /etc/systemd",
        "rm -r /etc/natwork",
        "userdel",
    ],
    "test_systemd.test_the_readme_says_where_to_look": [
        "systemctl status",
        "systemd-analyze security",
        "journalctl -u natwork",
    ],
    "test_systemd.test_the_journal_has_the_access_log": ["journalctl -u natwork -o"],
    "test_systemd.test_a_reload_is_tested_first": ["systemctl reload"],
    "test_systemd.test_the_log_may_be_a_file_that_is_rotated": ["/var/log/natwork/"],
    "test_systemd.test_keepalived_takes_what_the_readme_says": ["global_defs"],
    "test_systemd.test_no_client_is_lost_while_it_is_replaced": [
        "systemctl restart natwork"
    ],
    "test_systemd.test_without_the_socket_unit_listen_holds": [
        "systemctl disable --now natwork.socket;",
        "systemctl stop natwork; systemctl enable --now natwork.socket natwork",
    ],
    "test_systemd.test_a_port_that_was_taken_is_the_socket_unit_s_again": [
        "systemctl stop natwork; systemctl start",
    ],
    "test_systemd.test_other_listeners_are_those_of_the_socket_unit": [
        "systemctl stop natwork.socket natwork; systemctl start",
    ],
    "test_systemd.test_stopped_it_has_left_with_nothing_behind": [
        "systemctl stop",
        "systemctl start",
        "systemctl reset-failed",
    ],
    ".ci/run runs it": ["python3 -m venv .venv"],
    "test_manuals.test_man_has_nothing_to_say": ["man -l"],
    "test_natpunch_manual.test_the_first_screen_works_as_written": [
        "(umask 077",
        "natpunch serve",
        "natpunch -s",
        "ssh -o ProxyCommand='natpunch",
    ],
    "package.build": ["dpkg-buildpackage"],
    "package.Host": ["apt install ./natwork"],
    "test_package.test_purged_it_leaves_nothing": ["apt purge"],
    "test_guide.test_a_client_speaks_tls_to_stunnel": [
        "openssl",
        "foreground = yes",
        "systemctl enable --now stunnel",
        "curl --proxy-cacert",
    ],
    "test_guide.test_the_cache_is_filled_at_night": [
        "http_port",
        "parents = ",
        "systemctl restart squid",
        "#!/bin/sh",
        "[Unit]",
        "[Timer]",
        "chmod 755",
        "systemctl enable --now natwork-refresh",
    ],
    "test_guide.test_what_is_to_be_installed_is_installed_here": [
        "apt install python3-setproctitle",
        "apt install python3-setproctitle python3-daemon",
        "apt install build-essential",
        "apt install stunnel4",
        "apt install squid",
    ],
    "takes long: bench/README.md has what it says": ["python3 bench/bench.py"],
    "opens an editor": ["systemctl edit natwork", "systemctl edit natwork.socket"],
    "no part of NATWork": ["journalctl -k"],
    "a picture": ["inside"],
    "a synopsis": ["natwork.py [-c"],
    "what a recipe is for": ["curl -x https:"],
}
KEYS = sorted(key for keys in RUNS.values() for key in keys)
WHOLE = ("inside", "[", "/var", "global_defs", "nft", "natwork: ", "natwork.py [")
WHOLE += ("foreground", "http_port", "parents", "user = natwork", "#!")
PROGRAM = re.compile(
    r"(?:natwork\.py|python3|pipx?|curl|chromium|ps|ssh|nft|dnsmasq|apt(?:-get)?|git"
    r"|man|useradd|systemctl|journalctl|systemd-analyze|dpkg-buildpackage) [^`]+"
)
FORM = re.compile(r"\b[A-Z]{3,}\b")  # it has a word to be replaced


def pieces() -> Iterator[str]:
    """Generate the commands and blocks of the README and the guide."""
    for found in re.findall(r"(?:^    .*\n)+", readme.TEXT, re.M):
        block = re.sub("^    ", "", found, flags=re.M).strip()
        yield from [block] if block.startswith(WHOLE) else block.splitlines()
    for span in re.findall(
        "`([^`]+)`", re.sub(r"^    .*\n", "", readme.TEXT, flags=re.M)
    ):
        if PROGRAM.fullmatch(span) and not FORM.search(span):
            yield span


def key_of(piece: str) -> str:
    """Return the longest key that a piece begins with."""
    keys = [key for key in KEYS if piece.startswith(key)]
    assert keys, f"no test runs this: {piece}"
    return max(keys, key=len)


def the(begins: str) -> str:
    """Return the piece of the README or the guide that begins so."""
    (piece,) = {piece for piece in pieces() if key_of(piece) == begins}
    return piece


def test_every_command_has_its_test() -> None:
    assert sorted(key_of(piece) for piece in set(pieces())) == KEYS
    for where, keys in RUNS.items():
        file, _, name = where.partition(".")
        path = running.ROOT / "tests" / f"{file}.py"
        if path.exists():
            text, kind = path.read_text(), "class" if name[0].isupper() else "def"
            assert f"\n{kind} {name}(" in text, where
            body = text.partition(f"\ndef {name}(")[2].partition("\ndef ")[0]
            if file == "test_readme":
                assert all(key in body for key in keys), where


# The box of the README, and what is in it.

NETWORK = {
    "inside": ["10.0.0.7/24 dev lan"],
    "gateway": ["10.0.0.1/24 dev lan", "192.0.2.10/24 dev wan"],
    "outside": [f"192.0.2.{n}/24 dev wan" for n in (21, 22, 53, 70)],
}
HOSTS = """\
192.0.2.80 www.example.com
192.0.2.21 ftp.example.org
192.0.2.22 host.example
192.0.2.70 gopher.example.org
"""
SERVERS = {  # by what ss calls their sockets
    "192.0.2.22:22": "/usr/sbin/sshd -D -f {folder}/sshd_config",
    "0.0.0.0:21": "vsftpd {folder}/vsftpd.conf",
    "192.0.2.53:53": "dnsmasq --keep-in-foreground --conf-file=/dev/null --user=root"
    " --no-resolv --no-hosts --pid-file= --listen-address=192.0.2.53 --bind-interfaces"
    " --address=/www.example.com/192.0.2.80",
    "192.0.2.70:70": "systemd-socket-activate --inetd --accept --listen=192.0.2.70:70"
    " gophernicus -h gopher.example.org -r {folder}/gopher -nm -nr -ns",
}
FILES = {
    "sshd_config": """
        ListenAddress 192.0.2.22
        HostKey {folder}/host
        AuthorizedKeysFile {folder}/key.pub
        PidFile none
        StrictModes no
        UsePAM no
        PermitRootLogin yes
    """,
    "vsftpd.conf": """
        background=NO
        listen=YES
        anonymous_enable=YES
        anon_root={folder}/ftp
        local_enable=YES
        write_enable=YES
        seccomp_sandbox=NO
        xferlog_enable=NO
        secure_chroot_dir={folder}/empty
    """,
    "site/index.html": "<p>hello, web",
    "ftp/pub/hello.txt": "hello, ftp",
    "gopher/hello.txt": "hello, gopher",
    "notes.txt": "hello, Ann",
    # What is in /etc of the inside: whom ssh trusts, where socksify finds the
    # gateway, and how Chromium does without a screen.
    "ssh/ssh_config": """
        IdentityFile {folder}/key
        StrictHostKeyChecking no
        UserKnownHostsFile /dev/null
    """,
    "dante.conf": """
        resolveprotocol: fake
        route {{
            from: 0.0.0.0/0 to: 0.0.0.0/0 via: 10.0.0.1 port = 8080
            proxyprotocol: socks_v5
            command: connect bind udpassociate
            protocol: tcp udp
            method: none
        }}
    """,
    "chromium.d/flags": f'CHROMIUM_FLAGS="{" ".join(web.CHROMIUM[1:])} --dump-dom"',
}


class Town:
    """The box with its servers, and the gateway that a test has started."""

    def __init__(self, box: boxes.Box, folder: Path) -> None:
        self.box, self.folder = box, folder
        self.gateway: subprocess.Popen[str] | None = None
        here = f"{folder}:{Path(sys.executable).parent}:{boxes.ENVIRONMENT['PATH']}"
        self.environment = {"PATH": here, "HOME": str(folder), "TERM": "xterm"}
        for place, addresses in NETWORK.items():
            batch = "".join(f"addr add {address}\n" for address in addresses)
            boxes.ip("-n", box.name(place), "-batch", "-", given=batch)
        self.etc("gateway", "hosts", boxes.LOCALHOST + HOSTS)
        for name, text in FILES.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            lines = text.format(folder=folder).strip().splitlines()
            (folder / name).write_text("".join(x.strip() + "\n" for x in lines))
        for path in running.ROOT.glob("nat*.py"):
            shutil.copy(path, folder)
        self.people()
        for name in ("ssh", "dante.conf", "chromium.d"):
            # It may be on another file system.
            shutil.move(folder / name, Path("/etc/netns", box.name("inside"), name))
        (folder / "web").mkdir()
        web.certificates(folder / "web")
        self.web = web.Nginx(box, folder / "web")
        self.web.write("index.html", (folder / "site/index.html").read_bytes())
        for at, command in SERVERS.items():
            words = command.format(folder=folder).split()
            process = box.start("outside", *words, folder=folder)
            wait.until(lambda p=process, a=at: self.listens(p, a))

    def etc(self, place: str, name: str, text: str) -> None:
        """Write a file that is in /etc at this place only."""
        Path("/etc/netns", self.box.name(place), name).write_text(text)

    def people(self) -> None:
        """Let Ann log in outside by her password, and root from inside by a key."""
        for name in ("empty", "ann"):
            (self.folder / name).mkdir()
        shutil.chown(self.folder / "ann", 12345)
        words = ["openssl", "passwd", "-6", "password"]
        hashed = subprocess.run(words, capture_output=True, text=True, check=True)
        for name, line in {
            "passwd": f"ann:x:12345:12345::{self.folder}/ann:/bin/sh\n",
            "shadow": f"ann:{hashed.stdout.strip()}:20000:0:99999:7:::\n",
        }.items():
            self.etc("outside", name, Path("/etc", name).read_text() + line)
        Path("/run/sshd").mkdir(exist_ok=True)
        for key in ("host", "key"):
            words = ["ssh-keygen", "-q", "-N", "", "-f", str(self.folder / key)]
            subprocess.run(words, check=True)

    def listens(self, process: subprocess.Popen[str], at: str) -> bool:
        assert process.poll() is None, process.args
        return f" {at} " in self.box.run("outside", "ss", "-Hltn").stdout

    def run(self, place: str, command: str, given: str = "") -> str:
        """Run a command of the README, with this typed to it; return what it prints."""
        done = subprocess.run(
            self.box.command(place, "bash", "-c", command),
            input=given,
            capture_output=True,
            text=True,
            timeout=60,
            cwd=self.folder,
            env={**boxes.ENVIRONMENT, **self.environment},
            start_new_session=True,  # no terminal: what is typed comes from there
        )
        assert done.returncode == 0, (command, done)
        return done.stdout

    def start(self, command: str) -> None:
        """Run a command of the README that serves; wait until it does."""
        said = self.folder / "said"
        with (self.folder / "log").open("w") as log, said.open("w") as errors:
            process = self.gateway = self.box.start(
                "gateway",
                *("bash", "-c", f"exec {command}"),
                folder=self.folder,
                output=log,
                errors=errors,
                **self.environment,
            )

        def ready() -> bool:
            assert process.poll() is None, said.read_text()
            return said.read_text().count("natwork: listening on ") == 2

        wait.until(ready)

    def lines(self, count: int = 1) -> list[str]:
        """Return the access log, once it has so many lines."""
        log = self.folder / "log"
        wait.until(lambda: log.read_text().count("\n") >= count)
        return log.read_text().splitlines()

    def entry(self) -> boxes.Entry:
        """Return the fields of the only line."""
        (line,) = self.lines()
        return dict(word.split("=", 1) for word in line.split(" "))

    def stop(self) -> None:
        """Stop the gateway, if one runs; it must end well."""
        if self.gateway:
            self.gateway.terminate()
            assert self.gateway.wait(40) == 0, (self.folder / "said").read_text()
            self.gateway = None


@pytest.fixture(scope="module")
def whole_town() -> Iterator[Town]:
    needs.programs(
        "nginx", "openssl", "sshd", "ssh-keygen", "vsftpd", "dnsmasq", "ss", "bash"
    )
    needs.programs("systemd-socket-activate", "gophernicus")
    with boxes.dual_homed() as box, running.public_folder() as folder:
        yield Town(box, folder)  # whose servers have users of their own


@pytest.fixture
def idle_town(whole_town: Town) -> Iterator[Town]:
    """The town before a test has started the gateway, if it does."""
    yield whole_town
    whole_town.stop()


@pytest.fixture
def town(idle_town: Town) -> Town:
    """The town with the gateway running."""
    idle_town.start(the("python3 natwork.py"))
    return idle_town


def form(line: str) -> str:
    """Return a line with nothing in it that is another each time."""
    line = re.sub(r"(?<=[.\d]):\d{5}\b", ":PORT", line)
    return re.sub(r"\b(time|pid|up|down|secs)=[\d.TZ:-]+", r"\1=N", line)


def test_the_first_screen(idle_town: Town) -> None:
    needs.programs("curl", "ps")
    town = idle_town
    town.start(the("python3 natwork.py"))
    page = town.run("inside", the("curl -x http://10.0.0.1:8080 http:"))
    assert page == "<p>hello, web\n"
    (line,), sample = town.lines(), the("time=")
    assert form(line) == form(sample)
    digits = [re.sub(r"\d+", "1", x.partition(" client=")[0]) for x in (line, sample)]
    assert digits[0] == digits[1]  # a time has the form of a time
    with town.box.connect("inside", ("10.0.0.1", 8080)) as client:
        client.sendall(b"CONNECT www.example.com:80 HTTP/1.1\r\nHost: x\r\n\r\n")
        assert http_wire.read_head(client).startswith(b"HTTP/1.1 200 ")
        samples = {form(title) for title in the("natwork: master").splitlines()}

        def titles() -> set[str]:
            shown = town.run("gateway", the("ps -ef"))
            return {form(x) for x in re.findall("natwork: .*", shown)}

        wait.until(lambda: samples <= titles())
        port = client.getsockname()[1]
        table = town.run("gateway", the("natwork.py --table"))
        assert re.search(rf"^10\.0\.0\.7 +{port} ", table, re.M), table


def test_pip_installs_it(tmp_path: Path) -> None:
    for name in ("nat*.py", "pyproject.toml", "README.md", "LICENSE"):
        for path in running.ROOT.glob(name):
            shutil.copy(path, tmp_path)
    shutil.copytree(running.ROOT / "docs", tmp_path / "docs")
    for command in (
        the("python3 -m venv venv"),
        "cd / && $OLDPWD/venv/bin/natwork --version",
        "venv/bin/python -c 'import daemon, setproctitle'",
    ):
        done = subprocess.run(
            ["bash", "-c", command],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=300,
        )
        if re.search("NewConnectionError|NameResolutionError", done.stderr):
            needs.unavailable("pip reaches no index")
        assert done.returncode == 0, (command, done)


def test_the_configuration_is_taken(idle_town: Town) -> None:
    conf = idle_town.folder / "natwork.conf"
    conf.write_text(the("[natwork]") + "\n")
    for command in (the("python3 natwork.py -t"), the("natwork.py -t")):
        printed = idle_town.run("gateway", f"{command} 2>&1")
        assert "listen = 10.0.0.1:8080\n" in printed and "outside = eth1\n" in printed
        assert printed.endswith("natwork: ok: natwork.conf\n")
    said = idle_town.run("gateway", "natwork.py --explain 10.0.0.7 10.1.0.1:443 || :")
    conf.unlink()
    assert said.startswith("settings: natwork.conf\n")
    assert "10.1.0.1: allowed by rule 2" in said, said


def test_the_rules_are_explained(idle_town: Town) -> None:
    for command in (the("python3 natwork.py --explain"), the("natwork.py --explain")):
        said = idle_town.run("gateway", command)  # which exits with 0
        assert "192.0.2.80" in said and "allow" in said


def test_the_picture_is_there() -> None:
    (path,) = re.findall(r"^!\[.+\]\((.+)\)$", readme.TEXT, re.M)
    head = (running.ROOT / path).read_bytes()[:24]
    assert head.startswith(b"\x89PNG") and int.from_bytes(head[16:20], "big") == 1280


def test_it_detaches(idle_town: Town) -> None:
    needs.programs("curl")
    town, local = idle_town, f"{idle_town.folder}/usr/local"
    lines = readme.block("Install as a service", "install -D").splitlines()
    steps = [line for line in lines if not re.search("systemd|systemctl", line)]
    # These directories are there in this one only, but for /usr/local.
    folders = "for at in etc run var/log; do mkdir -p $at; mount --bind $at /$at; done"
    steps = ["cp -a /etc .", folders, f"cd {running.ROOT}", *steps]
    steps += [f"echo '{the('user = natwork')}' >>/etc/natwork/natwork.conf"]
    steps += [the("install -d"), f"PATH={local}/bin:$PATH", the("natwork.py -c")]
    town.run("gateway", "set -e; " + "\n".join(steps).replace("/usr/local", local))
    town.run("inside", the("curl -x http://10.0.0.1:8080 http:"))
    pid = int((town.folder / "run/natwork/natwork.pid").read_text())
    log, said = (
        town.folder / "var/log" / name for name in ("natwork", "natwork.messages")
    )
    os.kill(pid, signal.SIGHUP)
    wait.until(lambda: "natwork: configuration reloaded\n" in said.read_text())
    os.kill(pid, signal.SIGTERM)
    wait.until(lambda: not town.box.pids("gateway"))
    assert " status=200 outcome=ok " in (log / "access.log").read_text()
    assert said.owner() == "root" and not list((town.folder / "run/natwork").iterdir())


def test_a_user_is_asked_for_her_password(idle_town: Town) -> None:
    needs.programs("curl")
    town = idle_town
    town.run("gateway", the("python3 natwork.py --passwd"), "open sesame\n")
    town.start(the("python3 natwork.py -o users"))
    ask = the("curl -x http://10.0.0.1:8080 -U")
    assert "hello, web" in town.run("inside", ask, "open sesame\n")
    assert town.entry()["user"] == "alice"
    assert "hello, web" not in town.run("inside", ask, "open, wheat\n")


def test_the_settings_of_clients(town: Town) -> None:
    needs.programs("curl", "apt-get", "git")
    site = town.folder / "web/site"
    (site / "debian").mkdir()
    (site / "debian/Packages").touch()
    made = "git init -q w && cd w && git -c user.name=a -c user.email=a@b commit -qm a"
    made += " --allow-empty && git clone -q --bare . x.git && cd x.git"
    town.run("outside", f"cd web/site && {made} && git update-server-info")
    plain = "curl http://www.example.com/"
    assert "hello" in town.run("inside", f"{the('export')}; {plain}")
    assert town.entry()["proto"] == "http"
    own = the("curl http://10.0.0.1:8080/table.json")  # no_proxy has its address
    assert "sessions" in town.run("inside", f"{the('export')}; {own}")
    apt = Path("/etc/netns", town.box.name("inside"), "apt")
    (apt / "apt.conf.d").mkdir(parents=True)
    (town.folder / "state/lists/partial").mkdir(parents=True)
    (town.folder / "cache/archives/partial").mkdir(parents=True)
    source = "deb [trusted=yes] http://www.example.com/debian ./\n"
    (apt / "sources.list").write_text(source)
    settings = [
        f'Dir::State "{town.folder}/state";',
        f'Dir::Cache "{town.folder}/cache";',
        'Acquire::Languages "none";',
        'APT::Sandbox::User "root";',
        'APT::Update::Error-Mode "any";',
    ]
    (apt / "apt.conf").write_text("\n".join(settings))
    town.run("inside", f"{the('echo')}; apt-get update")
    assert any("/debian/./Packages" in line for line in town.lines(3))
    # The machine inside knows no name, so git has come through the gateway.
    clone = "git clone http://www.example.com/w/x.git clone"
    town.run("inside", f"{the('git')} && {clone} && git -C clone log")


def test_a_limit(idle_town: Town) -> None:
    needs.programs("curl")
    idle_town.start(the("natwork.py -o max"))
    idle_town.run("inside", the("curl -x http://10.0.0.1:8080 http:"))
    assert idle_town.entry()["outcome"] == "ok"


def test_squid_is_the_parent(idle_town: Town) -> None:
    needs.programs("squid", "curl")
    town, folder = idle_town, idle_town.folder
    text = web.SQUID.format(port=3128, folder=folder, auth="", access="allow all")
    (folder / "squid.conf").write_text(text)
    (folder / "cache.log").touch()
    shutil.chown(folder / "cache.log", "proxy")
    words = ["squid", "-N", "-f", str(folder / "squid.conf")]
    squid = town.box.start("gateway", *words, folder=folder)
    wait.until(lambda: ":3128 " in town.box.run("gateway", "ss", "-Hltn").stdout)
    town.start(the('natwork.py -o "parents'))
    page = town.run("inside", the("curl -x http://10.0.0.1:8080 http:"))
    assert "hello, web" in page and town.entry()["address"] == "127.0.0.1:3128"
    town.box.stop(squid)


def test_socks_by_curl(town: Town) -> None:
    needs.programs("curl")
    assert "hello, web" in town.run("inside", the("curl --socks5-hostname"))
    assert town.entry()["proto"] == "socks5"


def test_natrun_runs_a_program(town: Town) -> None:
    needs.programs("curl")
    # A machine that asks a name server, although none is there.
    town.etc("inside", "nsswitch.conf", "hosts: files dns\n")
    town.etc("inside", "resolv.conf", "nameserver 10.0.0.1\n")
    said = town.run("inside", the("python3 natrun.py -g 10.0.0.1 curl"))
    town.etc("inside", "nsswitch.conf", "hosts: files\n")
    assert "hello, web" in said
    lines = "".join(town.lines(3))
    assert "method=RESOLVE target=www.example.com" in lines
    assert "method=CONNECT target=192.0.2.80:80" in lines
    town.run("inside", the("python3 natrun.py -g 10.0.0.1 --check"))


def test_socks_by_ssh(town: Town) -> None:
    needs.programs("ssh", "nc")
    said = town.run("inside", the("ssh"), "echo from $SSH_CLIENT\n")
    assert "from 192.0.2.10 " in said
    assert town.entry()["target"] == "host.example:22"


def test_an_ftp_server_calls_back(town: Town) -> None:
    needs.programs("socksify", "tnftp")
    said = town.run("inside", the("socksify tnftp"), "ls pub\nquit\n")
    assert "hello.txt" in said
    assert "method=BIND" in "".join(town.lines(2))


def test_a_name_server_is_asked(town: Town) -> None:
    needs.programs("socksify", "drill")
    said = town.run("inside", the("socksify drill"))
    assert re.search(r"^www\.example\.com\.\s.*\s192\.0\.2\.80$", said, re.M), said
    assert town.entry()["proto"] == "udp"


def test_a_name_is_asked_for(town: Town) -> None:
    needs.programs("tor-resolve")
    assert town.run("inside", the("tor-resolve")) == "192.0.2.80\n"
    assert town.entry()["method"] == "RESOLVE"


def test_a_machine_is_called(idle_town: Town) -> None:
    needs.programs("natpmpc", "curl")
    town = idle_town
    town.start(the("natwork.py -o mappings"))
    words = "python3 -m http.server --bind 10.0.0.7 --directory site 8000".split()
    server = town.box.start("inside", *words, folder=town.folder)
    wait.until(lambda: ":8000 " in town.box.run("inside", "ss", "-Hltn").stdout)
    said = town.run("inside", the("natpmpc"))
    assert "Public IP address : 192.0.2.10" in said
    assert "Mapped public port 8000 protocol TCP to local port 8000 liftime" in said
    titles = subprocess.run(
        ["ps", "-eo", "args"], capture_output=True, text=True, check=True
    ).stdout
    for title in the("natwork: mapper").splitlines()[:2]:
        assert title.partition(":8000 3")[0] in titles
    page = town.run("outside", "curl --silent http://192.0.2.10:8000/index.html")
    assert "hello, web" in page
    assert town.entry()["proto"] == "map"
    town.box.stop(server)


def test_ftp(town: Town) -> None:
    needs.programs("curl")
    page = town.run("inside", the("curl -x http://10.0.0.1:8080 ftp:"))
    assert 'href="hello.txt"' in page
    town.run("inside", the("curl -x http://10.0.0.1:8080 -T"))
    assert (town.folder / "ann/notes.txt").read_text() == "hello, Ann\n"


def test_gopher(town: Town) -> None:
    needs.programs("lynx")
    # Its keyboard is silent until the page is there, and then gone.
    keyboard = "until grep -qs hello.txt screen; do sleep 0.1; done"
    town.run("inside", f"{keyboard} | {the('gopher_proxy')} >screen")
    assert town.entry()["proto"] == "gopher"


def test_own_pages(town: Town) -> None:
    needs.programs("curl")
    ask = the("curl http://10.0.0.1:8080/table.json")
    table = json.loads(town.run("inside", ask))
    assert table["gateway"]["busy"] == 1  # with this very request
    one = the("curl 'http://10.0.0.1:8080/table.json?source_port=")
    with town.box.connect("inside", ("10.0.0.1", 8080)) as client:
        client.sendall(b"CONNECT www.example.com:80 HTTP/1.1\r\nHost: x\r\n\r\n")
        assert http_wire.read_head(client).startswith(b"HTTP/1.1 200 ")
        (row,) = json.loads(town.run("inside", ask))["sessions"]
        port = str(row["new_source_port"])
        found = json.loads(town.run("inside", one.replace("40022", port)))
        assert [other["pid"] for other in found["sessions"]] == [row["pid"]]
        other = one.replace("40022", "1")
        assert json.loads(town.run("inside", other))["sessions"] == []
    metrics = town.run("inside", the("curl http://10.0.0.1:8080/metrics"))
    assert "natwork_sessions_total" in metrics


def test_chromium_finds_its_way(town: Town) -> None:
    needs.programs("chromium")
    assert "hello, web" in town.run("inside", the("chromium"))
    lines = "".join(town.lines(2))
    assert "/proxy.pac" in lines and "target=http://www.example.com:80/ " in lines
