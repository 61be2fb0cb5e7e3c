"""The units on a real systemd: process 1 of a container made from this box itself."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import boxes
import http_wire
import kernel
import machine
import needs
import origins
import pytest
import readme
import running
import wait
import wire

UNITS = running.ROOT / "systemd"
CONF, LOG = Path("etc/natwork/natwork.conf"), Path("var/log/natwork/access.log")


@pytest.fixture(scope="module")
def container() -> Iterator[machine.Container]:
    """A container in which the unit is installed as the README says."""
    with machine.booted(machine.Container) as container:
        container.run(readme.block("Install as a service", "install -D"))
        with kernel.network_of(container.leader):
            yield container


class Service:
    """The gateway that runs in the container."""

    address = ("127.0.0.1", 8080)

    def __init__(self, container: machine.Container) -> None:
        self.container, self.conf = container, container.root / CONF
        self.shipped = self.conf.read_text()

    def reload(self, *lines: str) -> subprocess.CompletedProcess[str]:
        """Write settings into the file, and ask systemd to reload."""
        before = self.reloads()
        lines = ("rules = allow to 127.0.0.0/8", *lines)
        self.conf.write_text(self.shipped + "".join(f"{line}\n" for line in lines))
        done = self.container.run("systemctl reload natwork", check=False)
        if done.returncode == 0:  # HUP was sent, and is soon obeyed
            wait.until(lambda: self.reloads() > before)
        return done

    def reloads(self) -> int:
        return self.container.journal().count("natwork: configuration reloaded\n")

    def connect(self) -> socket.socket:
        return socket.create_connection(self.address, 40)

    def get(self, origin: origins.Origin | bytes = http_wire.DENIED) -> int:
        with self.connect() as client:
            return http_wire.exchange(client, http_wire.request(origin)).status

    def tunnel(self, origin: origins.Origin) -> socket.socket:
        client = self.connect()
        client.sendall(http_wire.request(origin, method=b"CONNECT"))
        assert client.recv(65536).startswith(b"HTTP/1.1 200")
        return client

    def worker_of(self, client: socket.socket) -> int:
        """Return our number of the worker whose row in the table is this client."""
        table = self.container.run("python3 natwork.py --table --json").stdout
        (pid,) = (
            row["pid"]
            for row in json.loads(table)
            if row["original_source_port"] == client.getsockname()[1]
        )
        return self.container.pid_here(pid)


def answer(connection: socket.socket, origin: origins.Origin) -> None:
    """Be an origin that answers one request."""
    if connection.recv(65536):
        connection.sendall(http_wire.sized(b"hello"))


@pytest.fixture
def service(container: machine.Container) -> Iterator[Service]:
    """The service, running and as it was installed but for 127/8 as its outside."""
    service = Service(container)
    container.run("systemctl reset-failed natwork; systemctl start natwork")
    assert service.reload().returncode == 0
    yield service
    service.conf.write_text(service.shipped)


# What systemd says of the files alone.


def test_the_units_are_sound_and_tight() -> None:
    needs.programs("systemd-analyze")
    units = [str(path) for path in sorted(UNITS.iterdir())]
    assert [Path(unit).name for unit in units] == ["natwork.service", "natwork.socket"]
    run = {"capture_output": True, "text": True, "timeout": 60}
    done = subprocess.run(["systemd-analyze", "verify", *units], **run)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    words = ["systemd-analyze", "security", "--offline=true", "--no-pager"]
    done = subprocess.run([*words, "--threshold=11", units[0]], **run)
    level = re.search("exposure level for natwork.service: ([0-9.]+)", done.stdout)
    assert done.returncode == 0 and level and float(level[1]) <= 1.1, done


def test_the_limits_of_the_unit_belong_to_the_defaults() -> None:
    unit = dict(
        re.findall("^(\\w+)=(.*)$", (UNITS / "natwork.service").read_text(), re.M)
    )
    done = subprocess.run(
        [*running.PROGRAM, "-t"], cwd="/", capture_output=True, text=True
    )
    given = dict(re.findall("^(\\w+) = (.*)$", done.stdout, re.M))
    assert int(given["max_workers"]) + 1 < int(unit["TasksMax"])
    assert float(given["drain_timeout"]) + 7 < float(unit["TimeoutStopSec"])


def test_keepalived_takes_what_the_readme_says(tmp_path: Path) -> None:
    needs.programs("keepalived", "unshare", "ip")
    if os.geteuid() != 0:
        needs.unavailable("eth0 in a network of its own needs root")
    good = readme.block("Outgrowing one box", "global_defs")
    # As process 1, since it looks whether its parent is still the one it had.
    launch = "ip link add eth0 type veth peer name eth1; exec keepalived --log-console "
    for text, code in ((good, 0), (good.replace("priority 100", "priority 300"), 5)):
        (tmp_path / "keepalived.conf").write_text(text)
        done = subprocess.run(
            ["unshare", "--net", "--pid", "--fork", "sh", "-ec"]
            + [launch + f"--config-test --use-file={tmp_path}/keepalived.conf"],
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == code and bool(code) == bool(done.stderr), done


# On a real systemd.


def test_it_is_ready_when_systemd_says_so(
    service: Service, origin: origins.Start
) -> None:
    container = service.container
    server = origin(answer, "127.0.0.3")
    assert container.run("systemd-analyze verify natwork.service").stderr == ""
    for name, value in {
        "ActiveState": "active",
        "SubState": "running",
        "Type": "notify",
        "User": "natwork",
        "OOMPolicy": "continue",
        "NRestarts": "0",
    }.items():
        assert container.show(name) == value
    assert re.fullmatch("[0-9]+ idle [0-9]+ busy", container.show("StatusText"))
    master = container.pid_here(int(container.show("MainPID")))
    ids = container.run("id -u natwork; id -g natwork").stdout.split()
    wait.until(lambda: kernel.title(master).startswith("natwork: master "))
    for pid in [master, *kernel.children(master)]:
        assert [kernel.status(pid, name).split()[1] for name in ("Uid", "Gid")] == ids
        assert kernel.status(pid, "CapBnd") == "0000000000000000"
    command = f"curl --silent --show-error --proxy http://127.0.0.1:8080 {server.url}/"
    assert container.run(command + " --noproxy ''").stdout == "hello"


def test_the_readme_says_where_to_look(service: Service) -> None:
    for command, words in {
        "systemctl status natwork": "Active: active (running)",
        "systemd-analyze security natwork": "exposure level for natwork.service",
        "journalctl -u natwork": "natwork: listening on ",
    }.items():
        assert words in service.container.run(command).stdout


def test_the_journal_has_the_access_log(
    service: Service, origin: origins.Start
) -> None:
    server = origin(answer, "127.0.0.3")
    service.get(server)
    line = f"proto=http method=GET target={server.url}/ "
    wait.until(lambda: line in service.container.journal())
    (found,) = (x for x in service.container.journal().splitlines() if line in x)
    assert found.startswith("time=") and " outcome=ok " in found


def test_a_journal_that_hangs_loses_lines_and_stops_no_session(
    service: Service,
) -> None:
    container, wrong, over = service.container, [], threading.Event()
    number = container.run("systemctl show --value -p MainPID systemd-journald")
    journald = container.pid_here(int(number.stdout))

    def ask() -> None:
        long = http_wire.request(
            http_wire.DENIED, path=b"/" + b"x" * 3000
        )  # and so is its line
        while not over.is_set() and not wrong:
            with service.connect() as client:
                if http_wire.exchange(client, long).status != 403:
                    wrong.append(1)

    def lost() -> bool:
        with service.connect() as client:
            page = http_wire.exchange(
                client, b"GET /metrics HTTP/1.1\r\nHost: localhost:8080\r\n\r\n"
            ).body
        return int(page.split(b"\nnatwork_log_lines_lost_total ")[1].split()[0]) > 100

    threads = [threading.Thread(target=ask, daemon=True) for _ in range(4)]
    os.kill(journald, signal.SIGSTOP)
    try:
        for thread in threads:
            thread.start()
        wait.until(lambda: wrong or lost(), 60)  # its buffer holds some hundred
    finally:
        over.set()
        os.kill(journald, signal.SIGCONT)
    assert not wrong
    words = "natwork: the access log took no more: lines were lost"
    # The next session says so, if there is room for that by then.
    wait.until(lambda: service.get() == 403 and words in container.journal())


def test_the_watchdog_is_answered_but_by_a_master_that_hangs(service: Service) -> None:
    container = service.container
    dropin = container.root / "etc/systemd/system/natwork.service.d/watchdog.conf"
    dropin.parent.mkdir()
    dropin.write_text("[Service]\nWatchdogSec=2\n")
    container.run("systemctl daemon-reload; systemctl restart natwork")
    assert container.show("WatchdogUSec") == "2s"
    dropin.write_text("[Service]\nRestartSec=0\n")
    container.run("systemctl daemon-reload")
    master, stamp = container.show("MainPID"), "WatchdogTimestampMonotonic"
    before = int(container.show(stamp))
    wait.until(lambda: int(container.show(stamp)) > before + 2e6)
    assert container.show("MainPID") == master and service.get() == 403
    os.kill(container.pid_here(int(master)), signal.SIGSTOP)
    wait.until(lambda: container.show("MainPID") not in (master, "0"), 30)
    assert service.get() == 403 and container.show("NRestarts") == "1"
    dropin.unlink()
    container.run("systemctl daemon-reload")


def test_a_reload_is_tested_first(service: Service) -> None:
    container = service.container
    master = container.show("MainPID")
    said = service.reload("spare_workers = many")
    assert said.returncode != 0
    assert "natwork.conf: spare_workers = many: " in container.journal()
    assert "not reloaded" not in container.journal()  # the gateway never heard of it
    assert service.get() == 403 and container.show("ActiveState") == "active"
    assert service.reload("spare_workers = 3").returncode == 0
    wait.until(lambda: container.show("ActiveState") == "active")
    assert container.show("MainPID") == master


def test_the_log_may_be_a_file_that_is_rotated(
    service: Service, origin: origins.Start
) -> None:
    needs.programs("logrotate")
    container, log = service.container, service.container.root / LOG
    service.reload(f"log = /{LOG}")
    service.get()
    wait.until(lambda: log.read_text().count("\n") == 1)
    assert log.stat().st_mode & 0o777 == 0o640
    snippet = readme.block("Reading the log", "/var/log")
    assert snippet == (running.ROOT / "debian/natwork.logrotate").read_text()
    # After /etc/logrotate.conf, which may ask for the others to be compressed.
    (container.root / "etc/logrotate.d/natwork").write_text("compress\n" + snippet)
    with service.tunnel(origin(origins.echo, "127.0.0.3")) as client:
        before = service.reloads()
        container.run("logrotate --force /etc/logrotate.d/natwork")
        wait.until(lambda: service.reloads() > before)
        service.get()
        wait.until(lambda: log.read_text().count("\n") == 1)
        assert log.stat().st_mode & 0o777 == 0o640
        assert wire.echoes(client)
    # It began before, and is written where it began.
    old = log.with_suffix(".log.1")
    wait.until(lambda: " proto=connect " in old.read_text())
    assert log.read_text().count("\n") == 1
    assert container.run("stat -c %U /var/log/natwork").stdout == "natwork\n"


def test_no_client_is_lost_while_it_is_replaced(
    service: Service, origin: origins.Start
) -> None:
    container, server = service.container, origin(answer, "127.0.0.3")
    folder = container.root / "usr/local/bin"
    wrong: list[object] = []
    served, over = [0] * 4, threading.Event()

    def ask(number: int) -> None:
        while not over.is_set():
            try:
                assert service.get(server) == 200
                served[number] += 1
            except (OSError, AssertionError) as failure:
                wrong.append(failure)
            time.sleep(0.02)

    threads = [threading.Thread(target=ask, args=[n]) for n in range(len(served))]
    for thread in threads:
        thread.start()
    masters = set()
    try:
        for number in range(3):
            count = sum(served)
            for path in folder.glob("natwork*.py"):
                text, new = path.read_text(), path.with_suffix(".new")
                version = r'(?m)^(?:__version__|VERSION) = "'
                text, found = re.subn(version, rf"\g<0>{number}", text)
                assert found == 1, path
                new.write_text(text)
                new.chmod(path.stat().st_mode)
                new.rename(path)
            container.run("systemctl reset-failed natwork; systemctl restart natwork")
            masters.add(container.show("MainPID"))
            wait.until(lambda: wrong or sum(served) > count + 20, 20)  # noqa: B023
    finally:
        over.set()
        for thread in threads:
            thread.join()
    assert not wrong and len(masters) == 3, wrong


def test_a_session_ends_before_a_restart_and_who_comes_waits(
    service: Service, origin: origins.Start
) -> None:
    container, server = service.container, origin(origins.echo, "127.0.0.3")
    master = container.pid_here(int(container.show("MainPID")))
    with service.tunnel(server) as old:
        restart = threading.Thread(
            target=container.run, args=["systemctl restart natwork"]
        )
        restart.start()
        wait.until(lambda: len(kernel.children(master)) == 1)  # the idle have left
        assert container.show("ActiveState") == "deactivating"
        with service.connect() as new:
            new.sendall(http_wire.request(http_wire.DENIED))
            new.settimeout(0.5)
            with pytest.raises(TimeoutError):
                new.recv(1)
            assert wire.echoes(old)
            old.close()
            new.settimeout(20)
            assert new.recv(65536).startswith(b"HTTP/1.1 403")
        restart.join(30)


def memory_group() -> Path:
    """Return a new control group that can limit memory; skip where there is none."""
    for base in (Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup")):
        group = base / f"natwork-{os.getpid()}"
        with contextlib.suppress(OSError):
            group.mkdir()
            if (group / "memory.limit_in_bytes").exists():
                (group / "memory.limit_in_bytes").write_text("65536")
                return group
            if (group / "memory.max").exists():
                (group / "memory.max").write_text("65536")
                return group
            group.rmdir()
    needs.unavailable("no control group for memory here")


def test_a_worker_killed_for_memory_takes_nobody_along(
    service: Service, origin: origins.Start
) -> None:
    container, server = service.container, origin(origins.echo, "127.0.0.3")
    with service.tunnel(server) as ill, service.tunnel(server) as well:
        worker, group = service.worker_of(ill), memory_group()
        try:
            (group / "cgroup.procs").write_text(str(worker))
            with contextlib.suppress(OSError):
                for _ in range(200):  # its buffers are new pages, and too many
                    ill.sendall(bytes(65536))
                    if not ill.recv(65536):
                        break
            wait.until(lambda: not kernel.read(worker, "cmdline"))
            stat = (
                "memory.oom_control"
                if group.parent.name == "memory"
                else "memory.events"
            )
            assert re.search("^oom_kill [1-9]", (group / stat).read_text(), re.M)
        finally:
            with contextlib.suppress(OSError):
                wait.until(lambda: not (group / "cgroup.procs").read_text())
            group.rmdir()
        client = "client=%s:%d " % ill.getsockname()[:2]
        wait.until(lambda: re.search(client + ".*outcome=killed", container.journal()))
        assert wire.echoes(well) and service.get() == 403
        assert container.show("ActiveState") == "active"
        assert container.show("Result") == "success"
        assert container.show("NRestarts") == "0"


def test_the_sandbox_leaves_room_for_an_uplink_by_its_name(
    service: Service, origin: origins.Start
) -> None:
    needs.programs("ip", "unshare")
    with subprocess.Popen(["unshare", "--net", "sleep", "60"]) as outside:
        own = os.readlink("/proc/self/ns/net")
        wait.until(lambda: os.readlink(f"/proc/{outside.pid}/ns/net") != own)
        cable = f"link add wan type veth peer name lan netns {outside.pid}"
        boxes.ip(*cable.split())
        boxes.ip(*"addr add 192.0.2.1/24 dev wan".split())
        boxes.ip(*"link set wan up".split())
        with kernel.network_of(outside.pid):
            boxes.ip(*"addr add 192.0.2.2/24 dev lan".split())
            boxes.ip(*"link set lan up".split())
            server = origin(answer, "192.0.2.2")
        assert service.reload("outside = wan").returncode == 0
        assert service.get(server) == 200  # SO_BINDTODEVICE, and netlink besides
        assert server.callers[0][0] == "192.0.2.1"
        outside.kill()  # and the cable with it
    assert "outside: wan is not there" not in service.container.journal()


def test_only_the_log_can_be_written_and_only_python_be_run(service: Service) -> None:
    """What a worker could do: a program in the unit's own sandbox tries it."""
    container = service.container
    probe = (
        "import os\n"
        "for path in '/usr/bin/id', '/bin/sh':\n"
        "    try: os.execv(path, [path])\n"
        "    except PermissionError: pass\n"
        "for top, folders, _ in os.walk('/'):\n"
        "    if top == '/': folders.remove('proc')\n"
        "    try: open(top + '/x', 'w'); print('writes', top)\n"
        "    except OSError: pass\n"
    )
    (container.root / "usr/local/bin/probe.py").write_text(probe)
    unit = (container.root / "etc/systemd/system/natwork.service").read_text()
    unit = re.sub("^(Exec(Start|Reload)|Type|Restart).*\n", "", unit, flags=re.M)
    start = (
        "[Service]\nType=oneshot\nExecStart=/usr/bin/python3 /usr/local/bin/probe.py"
    )
    unit = unit.replace("[Service]", start).partition("[Install]")[0]
    (container.root / "etc/systemd/system/probe.service").write_text(unit)
    container.run("systemctl daemon-reload; systemctl start probe; journalctl --sync")
    said = container.run("journalctl -u probe -o cat -t python3").stdout
    assert said == "writes /var/log/natwork\n"


def test_a_bad_configuration_is_not_tried_again(service: Service) -> None:
    container = service.container
    service.conf.write_text("[natwork]\nspare_workers = many\n")
    assert container.run("systemctl restart natwork", check=False).returncode != 0
    wait.until(lambda: container.show("ActiveState") == "failed")
    assert container.show("ExecMainStatus") == "78"
    assert container.show("NRestarts") == "0"
    service.conf.write_text(service.shipped)
    container.run("systemctl reset-failed natwork natwork.socket")
    container.run("systemctl start natwork.socket natwork")
    assert service.get() == 403


def test_stopped_it_has_left_with_nothing_behind(service: Service) -> None:
    container = service.container
    with service.connect():
        container.run("systemctl stop natwork.socket natwork")
    assert container.show("ActiveState") == "inactive"
    assert container.show("Result") == "success"
    assert container.show("ExecMainStatus") == "0"
    assert container.run("pgrep -u natwork", check=False).stdout == ""
    with pytest.raises(ConnectionRefusedError):
        service.connect()
    container.run("systemctl start natwork.socket natwork")
    assert service.get() == 403


def test_without_the_socket_unit_listen_holds(service: Service) -> None:
    container = service.container
    service.conf.write_text(service.shipped + "listen = 127.0.0.9:8081\n")
    container.run("systemctl disable --now natwork.socket; systemctl restart natwork")
    assert "natwork: listening on 127.0.0.9:8081\n" in container.journal()
    service.address = ("127.0.0.9", 8081)
    assert service.get() == 403
    undo = re.search(r"To undo this: `([^`]+)`", readme.TEXT)
    assert undo and container.run(undo[1])
    assert container.run("systemctl is-active natwork").stdout == "active\n"


def test_a_port_that_was_taken_is_the_socket_unit_s_again(service: Service) -> None:
    container, active = service.container, "systemctl is-active natwork.socket"
    container.run("systemctl stop natwork.socket natwork")
    with socket.create_server(service.address):
        container.run("systemctl start natwork.socket natwork", check=False)
    # The service comes by itself, with listeners that end with it.
    wait.until(lambda: container.show("ActiveState") == "active", 20)
    assert container.run(active, check=False).stdout == "failed\n"
    mend = re.search(r"Under systemd, once the port is free, `([^`]+)`", readme.TEXT)
    assert mend and container.run(mend[1])
    assert container.run(active).stdout == "active\n" and service.get() == 403


def test_other_listeners_are_those_of_the_socket_unit(service: Service) -> None:
    container, units = service.container, service.container.root / "etc/systemd/system"
    dropin = units / "natwork.socket.d/override.conf"  # of `systemctl edit`
    dropin.parent.mkdir()
    dropin.write_text("[Socket]\nListenStream=\nListenStream=127.0.0.9:8081\n")
    container.run("systemctl daemon-reload; systemctl restart natwork")
    assert service.get() == 403  # at the old ones, still
    change = re.search(r"`(systemctl stop natwork.socket natwork; [^`]+)`", readme.TEXT)
    assert change and container.run(change[1])
    with pytest.raises(ConnectionRefusedError):
        service.connect()
    service.address = ("127.0.0.9", 8081)
    assert service.get() == 403
    dropin.unlink()
    container.run(f"systemctl daemon-reload; {change[1]}")


def test_the_lines_for_nft_are_there_after_a_boot(service: Service) -> None:
    needs.programs("nft")
    container = service.container
    lines = readme.block("Three recipes", "nft -f").splitlines()[1:-1]
    path, table = container.root / "etc/nftables.conf", "nft list table inet natwork"
    path.write_text(path.read_text() + "\n".join(lines) + "\n")
    assert container.run(table, check=False).returncode != 0
    container.run("systemctl enable nftables")
    assert container.run("systemctl is-enabled nftables").stdout == "enabled\n"
    try:
        container.run("systemctl start nftables")  # as at the next boot
        assert "redirect to :8080" in container.run(table).stdout
    finally:
        container.run("systemctl disable --now nftables")


def test_an_upgrade_brings_new_units(service: Service) -> None:
    container, unit = service.container, UNITS / "natwork.service"
    installed = container.root / "etc/systemd/system/natwork.service"
    installed.write_text(unit.read_text().replace("1024", "1023"))
    lines = readme.block("Install as a service", "install -D").splitlines()
    assert "Upgrade: run the first five lines again" in readme.TEXT
    container.run("\n".join([*lines[:5], "systemctl restart natwork"]))
    assert installed.read_text() == unit.read_text()
    assert container.show("LimitNOFILE") == "1024"
    assert service.conf.read_text() != service.shipped  # as the operator has it


def test_uninstalled_it_leaves_nothing(service: Service) -> None:
    container = service.container
    container.run("/usr/local/bin/natwork.py -t")  # as root, who may write anywhere
    container.run(readme.block("Install as a service", "systemctl disable"))
    for name in ("natwork.service", "natwork.socket"):
        assert container.run(f"systemctl cat {name}", check=False).returncode != 0
    assert container.run("getent passwd natwork", check=False).stdout == ""
    found = "find /etc /run /usr/local /var -xdev -path /etc/netns -prune"
    left = container.run(f"{found} -o -name '*natwork*' -print").stdout
    assert left in ("", "/etc/logrotate.d/natwork\n"), left
    # So that it can be installed once more.
    container.run(readme.block("Install as a service", "install -D"))
    assert service.get() == 403
