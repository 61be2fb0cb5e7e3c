"""Other people's programs: STUN clients, ssh, nc and iperf3."""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import natlab
import needs
import punching
import pytest
import wait

# By kind: stun-client's verdict, turnutils_natdiscovery's two, and our own two.
INDEPENDENT, DEPENDENT = "Endpoint Independent", "Address and Port Dependent"
VERDICTS = {
    "none": ("Independent Filter", INDEPENDENT, INDEPENDENT, "same", "nothing"),
    "full": ("Independent Filter", INDEPENDENT, INDEPENDENT, "same", "nothing"),
    "restricted": (
        "Address Dependent Filter",
        INDEPENDENT,
        "Address Dependent",
        "same",
        "address",
    ),
    "port": (
        "Port Dependent Filter",
        INDEPENDENT,
        DEPENDENT,
        "same",
        "address and port",
    ),
    "sequential": (
        "Dependent Mapping",
        DEPENDENT,
        DEPENDENT,
        "step 1",
        "address and port",
    ),
    "random": ("Dependent Mapping", DEPENDENT, DEPENDENT, "random", "address and port"),
    "fully": ("Dependent Mapping", DEPENDENT, DEPENDENT, "random", "address and port"),
}


def ask_all(kind: str) -> None:
    """Let each STUN client say what it thinks of a kind of NAT."""
    stun, mapping, filters, ours, by = VERDICTS[kind]
    with natlab.lab(kind) as lab:
        with punching.server(lab) as server:
            said = lab.run("a", "stun", server).stdout
            assert f"{stun}," in said.replace(", random port", ","), said
            if stun.endswith("Filter"):
                assert "Independent Mapping," in said
            time.sleep(1.1)  # ten answers a second are all that a source gets
            said = lab.run("a", "turnutils_natdiscovery", "-m", "-f", server).stdout
            assert f"NAT with {mapping} Mapping!" in said, said
            assert f"NAT with {filters} Filtering!" in said, said
            time.sleep(1.1)
            said = lab.run("a", *punching.words("-s", server, "nat")).stdout
            udp, tcp = said.splitlines()
            assert udp.startswith(f"udp: {ours}, port "), said
            assert udp.endswith(f", filtered by {by}"), said
            assert tcp.startswith(f"tcp: {ours}, port "), said
        lab.servers = lab.servers[:1]
        with punching.server(lab) as server:
            said = lab.run("a", "turnutils_stunclient", server).stdout
            (at,) = set(re.findall(r"UDP reflexive addr: (\S+):\d+$", said, re.M))
            assert at == lab.outside["a"], said


def test_each_kind_is_what_it_says_by_all_stun_clients() -> None:
    needs.programs("stun", "turnutils_natdiscovery", "turnutils_stunclient")
    with ThreadPoolExecutor(len(VERDICTS)) as pool:
        assert list(VERDICTS) == list(natlab.KINDS)
        list(pool.map(ask_all, VERDICTS))


# ssh, through the pairs that differ.

CONFIG = """
HostKey {folder}/host
AuthorizedKeysFile {folder}/user.pub
Port 2222
ListenAddress 127.0.0.1
StrictModes no
UsePAM no
PasswordAuthentication no
PidFile none
Subsystem sftp internal-sftp
"""


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the keys of a host and of a user, and a big file."""
    needs.programs("sshd", "ssh", "scp", "ssh-keygen")
    folder = tmp_path_factory.mktemp("ssh")
    for name in ("host", "user"):
        command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / name]
        subprocess.run(command, check=True, timeout=30)
    (folder / "sshd_config").write_text(CONFIG.format(folder=folder))
    (folder / "big").write_bytes(os.urandom(1 << 20) * 64)
    Path("/run/sshd").mkdir(exist_ok=True)
    return folder


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def login(pair: tuple[str, str], keys: Path, folder: Path) -> str:
    """Log in and copy 64 MiB; return how the two met."""
    with natlab.lab(*pair) as lab, punching.server(lab) as server:
        config = str(keys / "sshd_config")
        lab.start("b", "/usr/sbin/sshd", "-D", "-e", "-f", config)
        far = punching.peer(lab, "b", "work", "--to", "127.0.0.1:2222")
        secret = folder / "secret"
        secret.write_text(punching.SECRET)
        secret.chmod(0o600)
        proxy = punching.words("-s", server, "--secret", str(secret), "work")
        options = [
            *("-o", f"ProxyCommand={' '.join(proxy)}"),
            *("-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null"),
            *("-o", "BatchMode=yes", "-i", str(keys / "user")),
        ]
        done = lab.run("a", "ssh", *options, "root@work", "echo it is me")
        assert (done.returncode, done.stdout) == (0, "it is me\n"), done
        line = next(filter(punching.LINE.match, done.stderr.splitlines()))
        words = ["scp", "-q", *options, str(keys / "big"), f"root@work:{folder}/copy"]
        done = lab.run("a", *words, timeout=60)
        assert done.returncode == 0, done
        assert sha256(keys / "big") == sha256(folder / "copy")
        far.terminate()
        _, said = far.communicate(timeout=10)
        assert far.returncode == 0 and b"Traceback" not in said, said
        return line


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        ("port", "sequential", "direct"),
        ("sequential", "sequential", "direct"),
        ("port", "fully", "direct"),
        ("fully", "fully", "relay"),
    ],
)
def test_ssh_logs_in_and_scp_copies(
    a: str, b: str, expected: str, keys: Path, tmp_path: Path
) -> None:
    assert login((a, b), keys, tmp_path).startswith(f"natpunch: {expected} ")


# Datagrams.


@pytest.fixture
def port_by_fully() -> Iterator[natlab.Lab]:
    with natlab.lab("port", "fully") as lab, punching.server(lab):
        yield lab


def ends(lab: natlab.Lab, port: int, *udp: str, room: str = "room") -> None:
    """Start both ends of a room: a port of a's is a port of b's."""
    far = punching.peer(lab, "b", room, *udp, "--to", f"127.0.0.1:{port}")
    near = punching.peer(lab, "a", room, *udp, "--listen", str(port))
    if udp:
        assert punching.got(far) == punching.got(near) == "direct"


def test_nc_talks_by_udp(port_by_fully: natlab.Lab) -> None:
    needs.programs("nc")
    lab = port_by_fully
    far = lab.start("b", "nc", "-u", "-l", "127.0.0.1", "5005")
    ends(lab, 5005, "--udp")
    near = lab.start("a", "nc", "-u", "127.0.0.1", "5005")
    assert near.stdin and far.stdout and far.stdin and near.stdout
    near.stdin.write(b"there\n")
    near.stdin.flush()
    assert far.stdout.readline() == b"there\n"
    far.stdin.write(b"and back\n")
    far.stdin.flush()
    assert near.stdout.readline() == b"and back\n"


def test_iperf3_measures_by_udp(port_by_fully: natlab.Lab) -> None:
    needs.programs("iperf3")
    lab = port_by_fully
    lab.start("b", "iperf3", "-s", "-B", "127.0.0.1", "-p", "5201")
    ends(lab, 5201)  # its commands
    ends(lab, 5201, "--udp", room="datagrams")

    def measured() -> str:
        words = "iperf3 -u -c 127.0.0.1 -p 5201 -t 1 -b 5M -l 1200"
        done = lab.run("a", *words.split())
        return done.stdout if done.returncode == 0 else ""

    said = str(wait.until(measured, 20))
    lost, total = map(int, re.findall(r"(\d+)/(\d+) \(.*\)  receiver", said)[0])
    assert total > 300 and lost <= total // 10, said
