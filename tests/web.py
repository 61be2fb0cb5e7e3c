"""Real web servers and clients, and a box with nginx outside."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import random
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import boxes
import needs
import running
import wait

PROXY = "http://10.9.0.1:8080"  # the gateway of a Rig

CHROMIUM = [
    "chromium",
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-features=HttpsUpgrades",
    "--no-first-run",
]


# PUT stores what GET then returns, below /files/; POST to /post/NAME does too.
NGINX = """
daemon off;
user root;
worker_processes 1;
pid {folder}/nginx.pid;
error_log {folder}/error.log;
events {{ }}
http {{
    types {{
        text/html html;
        image/svg+xml svg;
    }}
    default_type application/octet-stream;
    client_max_body_size 0;
    client_body_temp_path {folder}/body;
    proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi;
    scgi_temp_path {folder}/scgi;
    log_format entry escape=json '{{"client":"$remote_addr","port":"$remote_port",'
        '"server":"$server_addr","scheme":"$scheme","protocol":"$server_protocol",'
        '"method":"$request_method","host":"$http_host","target":"$request_uri",'
        '"status":"$status","via":"$http_via","connection":"$connection"}}';
    server {{
        listen 80;
        listen 443 ssl;
        listen [::]:80 ipv6only=on;
        listen [::]:443 ssl ipv6only=on;
        ssl_certificate {folder}/server.pem;
        ssl_certificate_key {folder}/server.key;
        access_log {folder}/access.log entry;
        root {folder}/site;
        location /files/ {{ dav_methods PUT; }}
        location /post/ {{
            proxy_method PUT;
            proxy_pass http://127.0.0.1:8001/files/;
        }}
    }}
    server {{
        listen 127.0.0.1:8001;
        access_log off;
        root {folder}/site;
        dav_methods PUT;
    }}
}}
"""

SQUID = """
http_port 127.0.0.1:{port}
{auth}
http_access {access}
http_access deny all
acl CONNECT method CONNECT
cache_mem 8 MB
access_log none
cache_log {folder}/cache.log
pid_filename none
netdb_filename none
coredump_dir {folder}
cache_effective_user proxy
shutdown_lifetime 0 seconds
visible_hostname squid.test
via on
"""


def some_bytes(size: int) -> bytes:
    """Return bytes that compress badly and are the same in every run."""
    return random.Random(size).randbytes(size)


def certificates(folder: Path) -> None:
    """Write ca.pem, which clients are to trust, server.pem and server.key."""
    new_key = "-newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes".split()
    names = {name for line in boxes.NAMES.splitlines() for name in line.split()[1:]}
    for words in (
        ["-keyout", "ca.key", "-out", "ca.pem", "-subj", "/CN=NATWork test CA"],
        ["-keyout", "server.key", "-out", "server.pem", "-subj", "/CN=www.example.com"]
        + ["-CA", "ca.pem", "-CAkey", "ca.key"]
        + ["-addext", "basicConstraints=critical,CA:FALSE"]
        + ["-addext", "subjectAltName=" + ",".join(f"DNS:{n}" for n in sorted(names))],
    ):
        subprocess.run(
            ["openssl", "req", "-x509", *new_key, "-days", "2", *words],
            cwd=folder,
            check=True,
            capture_output=True,
        )


class Nginx:
    """nginx on every address of the outside, by http and https."""

    def __init__(self, box: boxes.Box, folder: Path) -> None:
        self.folder, self.site = folder, folder / "site"
        self.authority = folder / "ca.pem"
        (self.site / "files").mkdir(parents=True)
        (folder / "nginx.conf").write_text(NGINX.format(folder=folder))
        words = ["-e", str(folder / "error.log"), "-c", str(folder / "nginx.conf")]
        with (folder / "stderr").open("w") as errors:
            self.process = box.start(
                "outside", "nginx", *words, folder=folder, errors=errors
            )
        wait.until(self.ready)

    def ready(self) -> bool:
        """Say whether nginx listens: it writes its pid file after that."""
        said = (self.folder / "stderr").read_text()
        assert self.process.poll() is None, said
        pidfile = self.folder / "nginx.pid"
        return pidfile.exists() and pidfile.read_text() != ""

    def write(self, name: str, content: bytes) -> str:
        """Put a file on the site; return its path."""
        path = self.site / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        return "/" + name

    def entries(self, count: int = 0) -> list[boxes.Entry]:
        """Return the access log, once it has count entries."""
        log = self.folder / "access.log"

        def read() -> list[str]:
            return running.whole_lines(log) if log.exists() else []

        wait.until(lambda: len(read()) >= count)
        return [json.loads(line) for line in read()]

    def fingerprint(self) -> str:
        """Return the digest of the server's public key, as Chromium wants it."""
        certificate = str(self.folder / "server.pem")
        key = subprocess.run(
            ["openssl", "x509", "-in", certificate, "-noout", "-pubkey"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        der = base64.b64decode("".join(key.splitlines()[1:-1]))
        return base64.b64encode(hashlib.sha256(der).digest()).decode()


class Rig:
    """A box, with nginx outside and gateways as the test starts them."""

    def __init__(self, box: boxes.Box, folder: Path, certificates: Path) -> None:
        self.box, self.folder, self.gateways = box, folder, list[running.Gateway]()
        shutil.copytree(certificates, folder / "web")
        self.web = Nginx(box, folder / "web")
        self.ca = str(self.web.authority)

    def natwork(self, *options: str) -> running.Gateway:
        """Start natwork.py with these settings."""
        folder = self.folder / f"gateway{len(self.gateways)}"
        folder.mkdir()
        self.gateways.append(self.box.natwork(folder, *options))
        return self.gateways[-1]

    def curl(self, *words: str, proxy: str = PROXY, place: str = "inside") -> str:
        """Run curl through the gateway; return what it prints."""
        always = ["--silent", "--show-error", "--max-time", "40", "--cacert", self.ca]
        done = self.box.run(place, "curl", *always, "--proxy", proxy, *words)
        assert done.returncode == 0, (done.returncode, done.stderr, done.stdout)
        return done.stdout

    def check(self) -> None:
        """Stop the gateways; the servers must have seen nobody else."""
        for gateway in self.gateways:
            gateway.stop()
        assert self.box.pids("gateway") == []
        callers = {entry["client"] for entry in self.web.entries()}
        assert callers <= boxes.OUTSIDE_ADDRESSES, callers


@contextlib.contextmanager
def set_up(folder: Path, certificates: Path, second_uplink: bool) -> Iterator[Rig]:
    needs.programs("nginx", "curl")
    with boxes.dual_homed(second_uplink) as box:
        rig = Rig(box, folder, certificates)
        yield rig
        rig.check()
