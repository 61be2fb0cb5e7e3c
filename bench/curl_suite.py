#!/usr/bin/env python3
"""Run curl's own HTTP tests with natwork between curl and curl's test server.

    python3 bench/curl_suite.py
    python3 bench/curl_suite.py --through natwork privoxy --keep FOLDER
    python3 bench/curl_suite.py --keep FOLDER --only 1 31 1105 --show

Takes Debian's source package of curl (`apt-get source curl`, from a list of
sources of its own) or a tree given by --source, builds curl and its test
servers, and runs the suite's runtests.pl first without a proxy, then by its
option -P through each contender: natwork, a proxy that bench.py knows how to
start (privoxy, tinyproxy, squid), or one that runs already, HOST:PORT.

Of the tests, those count that need curl's HTTP server and no other, bring no
proxy of their own, and pass here without one.  What curl's server got and what
curl printed or wrote is compared with what the test wants, message by message,
less what a proxy has to change:

    fields of one hop, and framing (chunks, Content-Length); Via, and a Date
    that the answer did not have: RFC 9110 sections 7.6 and 6.6.1
    a Host other than the URL's: RFC 9112 section 3.2.2
    HTTP/1.0 in place of HTTP/1.1, line ends, folds, blanks around values, the
    case of names, the order of lines with different names
    the proxy's own answer to a CONNECT

The table has a second count, with the line ends of the heads compared too: most
answers of curl's server end their lines with LF alone, which a proxy that
builds its heads anew does not pass on.  All else must be the same, as must be
the exit code of curl.  A failed test has a line: why the gateway refused it, if
it did, and what differs first.

All of it runs in a network namespace with nothing but loopback, and with an
/etc/hosts that has the names which tests give to curl by --resolve; but not
with HOST:PORT.  Needs perl, a C compiler, make, unshare and mount; without
--source apt-get and dpkg-source too.  --keep holds what was built for the next
run.

Exit codes: 0 measured, whatever the figures; 1 could not measure; 2 bad command
line.
"""

import argparse
import contextlib
import fcntl
import os
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from dataclasses import field
from pathlib import Path

from bench import HOST
from bench import RECIPES
from bench import BenchError
from bench import Place
from bench import installed
from bench import left_by
from bench import machine
from bench import prepare
from bench import started
from bench import stop

# SPDX-License-Identifier: MIT

MIRROR = "http://deb.debian.org/debian"
KEYRING = "/usr/share/keyrings/debian-archive-keyring.gpg"
BUILD_TIMEOUT = 1800.0  # seconds a step of the build may take
TEST_TIMEOUT = 30.0  # seconds of silence of runtests.pl; no test needs them
INSIDE = "CURL_SUITE_INSIDE"  # set in the environment: the namespace is ours

# What the tests of HTTP can do without; --enable-debug makes more of them run.
CONFIGURE = """
    --quiet --enable-debug --disable-shared --disable-manual --disable-ldap
    --without-nghttp2 --without-libpsl --without-brotli --without-zstd
    --without-libidn2 --without-librtmp
"""

# runtests.pl takes this by -L: in place of comparing, what it would have compared
# is written down, one file for each comparison.
HOOK = r"""
no warnings 'redefine';
my $count = 0;
*main::compare = sub {
    my ($number, $name, $subject, $got, $wanted) = @_[-5 .. -1];
    my ($first, $second) = (join("", @$got), join("", @$wanted));
    open(my $file, ">", sprintf("%s/%s-%04d", $ENV{SEEN}, $number, $count++));
    printf $file "%d %d %s\n", length($first), length($second), $subject;
    print $file $first, $second;
    close($file);
    return 0;
};
1;
"""


# --- Messages ---------------------------------------------------------------

START_LINE = re.compile(rb"([A-Z]+ \S+ )?HTTP/[0-9.]+(?(1)| +[0-9]{3}.*)\r?\n?")
START = re.compile(rb"(?m)^[A-Z]+ \S+ HTTP/[0-9.]+\r?$")
FOLD = re.compile(rb"[ \t]+([^\r\n]*?)[ \t]*(\r?\n?)")
# A protocol's start line may have been cut off: then these stand alone.
ALONE = re.compile(rb"(?im)^(?:via|proxy-connection|content-length): .*\n")
CONNECTED = re.compile(rb"HTTP/1\.[01] 200 [Cc]onnection established\r?\n")
FIELD = re.compile(rb"([^\s:]+)[ \t]*:[ \t]*(.*?)[ \t]*(\r?\n?)", re.DOTALL)
NOT_COMPARED = set(
    b"connection proxy-connection keep-alive te transfer-encoding upgrade "
    b"http2-settings content-length via x-forwarded-for".split()
)


@dataclass
class Message:
    """A head and what follows it, less what a proxy has to change."""

    start: bytes = b""  # empty: what stands before the first head
    fields: list[tuple[bytes, bytes, bytes]] = field(default_factory=list)
    body: bytes = b""

    def values(self, name: bytes) -> list[bytes]:
        return [value for key, value, _ in self.fields if key == name]

    def same(self, other: "Message", line_ends: bool) -> bool:
        return self.lines(other, line_ends) == other.lines(self, line_ends)

    def lines(self, other: "Message", line_ends: bool = False) -> list[bytes]:
        """Return the lines to compare with another message's."""
        dropped = set(NOT_COMPARED)
        if not (self.values(b"date") and other.values(b"date")):
            dropped.add(b"date")  # one may have been added to an answer
        hosts = self.values(b"host") + other.values(b"host")
        if len(set(hosts)) > 1 and any(x.startswith(b"127.0.0.1:") for x in hosts):
            dropped.add(b"host")
        kept = sorted(
            (x for x in self.fields if x[0] not in dropped), key=lambda x: x[0]
        )
        start = self.start if line_ends else self.start.rstrip()
        start = re.sub(rb"HTTP/1\.0", b"HTTP/1.1", start)
        head = [b"%b: %b%b" % (n, v, end if line_ends else b"") for n, v, end in kept]
        return [start, *head, self.body if start else ALONE.sub(b"", self.body)]


def unchunked(data: bytes) -> tuple[bytes, bytes] | None:
    """Return a chunked body in one piece, and what follows it; None if it is not."""
    body = b""
    while match := re.match(rb"([0-9A-Fa-f]+)[^\n]*\n", data):
        size, data = int(match[1], 16), data[match.end() :]
        if not size:
            trailers = re.match(rb"(?:[^\r\n]+\r?\n)*\r?\n?", data)
            assert trailers
            return body + trailers[0].strip(), data[trailers.end() :]
        if len(data) < size:
            return None
        body, data = body + data[:size], data[size:].lstrip(b"\r")[1:]
    return None


def messages(data: bytes) -> list[Message]:
    """Return what a stream has in messages; it may be anything."""
    found = [Message()]
    while data:
        line, newline, rest = data.partition(b"\n")
        line += newline
        if not START_LINE.fullmatch(line):
            found[-1].body, data = found[-1].body + line, rest
            continue
        message, data = Message(line), rest
        found.append(message)
        while (line := data.partition(b"\n")[0]) and line != b"\r":
            line += data[len(line) : len(line) + 1]
            if (match := FOLD.fullmatch(line)) and message.fields:
                name, value, _ = message.fields.pop()
                value, end = b"%b %b" % (value, match[1]), match[2]
            elif match := FIELD.fullmatch(line):
                name, value, end = match.groups()
            else:
                break
            message.fields.append((name.lower(), value.strip(), end))
            data = data[len(line) :]
        if line in (b"", b"\r"):
            data = data[len(line) + 1 :]
        if message.values(b"transfer-encoding") and (parts := unchunked(data)):
            message.body, data = parts
        elif message.start[:4] != b"HTTP" and message.values(b"content-length"):
            length = message.values(b"content-length")[0]
            size = int(length) if length.isdigit() else 0
            # The test may have cut out a part of the body.
            if START_LINE.match(data, size) and not START.search(data, 0, size):
                message.body, data = data[:size], data[size:]
    return [one for one in found if not CONNECTED.fullmatch(one.start)]


# --- Tests ------------------------------------------------------------------

RESULT = re.compile(r"^test ([0-9]{4,})(?: SKIPPED: (.*)|\.\.\.\[)", re.MULTILINE)
PROXY_OPTION = re.compile(
    r"(?<!no)(?:proxy|socks)|PROXYPORT|(?:^|\s)-(?:x|p)\s", re.MULTILINE
)


@dataclass
class Verdict:
    """How a test went."""

    skipped: str = ""  # why
    failed: str = ""  # why
    line_ends: bool = True  # those of the heads are the same, too


def section(text: str, name: str) -> str:
    match = re.search(rf"<{name}(?: [^>]*)?>(.*?)</{name}>", text, re.DOTALL)
    return match[1] if match else ""


def chosen(tests: Path) -> list[int]:
    """Return the numbers of the tests of HTTP that bring no proxy of their own."""
    numbers = []
    for path in tests.glob("data/test[0-9]*"):
        text = path.read_text("latin-1")
        client = re.sub(r"(?s)<features>.*?</features>", "", section(text, "client"))
        keywords = section(text, "keywords")
        if section(text, "server").split() != ["http"]:
            continue
        if not (re.search("proxy|SOCKS", keywords) or PROXY_OPTION.search(client)):
            numbers.append(int(path.name[4:]))
    return sorted(numbers)


def names(tests: Path) -> set[str]:
    """Return the names of hosts under which tests ask for curl's server."""
    found = set()
    for number in chosen(tests):
        text = (tests / f"data/test{number}").read_text("latin-1")
        asked = section(text, "client")
        found.update(re.findall(r"(?<![\w.-])([\w.-]{1,60}):%HTTPPORT", asked))
    return {name for name in found if re.search("[A-Za-z]", name)}


def shortened(text: bytes) -> str:
    shown = text.decode("latin-1").encode("unicode_escape").decode()
    return shown if len(shown) < 100 else shown[:60] + "..." + shown[-30:]


def difference(subject: str, got: list[Message], wanted: list[Message]) -> str:
    """Say in a line what differs first."""
    for one, other in zip(got, wanted):
        if not one.same(other, False):
            mine, theirs = one.lines(other), other.lines(one)
            extra = [x for x in mine if x not in theirs]
            missing = [x for x in theirs if x not in mine]
            if extra or missing:
                there = shortened(extra[0]) if extra else "nothing"
                said = shortened(missing[0]) if missing else "nothing"
                return f"{subject}: {there!r} in place of {said!r}"
            return f"{subject}: another order"
    return f"{subject}: {len(got) - 1} messages in place of {len(wanted) - 1}"


def judge(number: int, said: str, seen: Path) -> Verdict:
    """Return how a test went, by what runtests.pl said and what it would compare."""
    verdict, refusal = Verdict(), ""
    for path in sorted(seen.glob(f"{number}-*")):
        line, _, data = path.read_bytes().partition(b"\n")
        first, second, subject = line.decode("latin-1").split(" ", 2)
        parts = data[: int(first)], data[int(first) :][: int(second)]
        got, wanted = messages(parts[0]), messages(parts[1])
        if why := re.search(rb"\nWhy: (.*)\.\n", parts[0]):  # on the gateway's page
            refusal = f"refused: {why[1].decode('latin-1')}"
        both = list(zip(got, wanted))
        if len(got) != len(wanted) or not all(x.same(y, False) for x, y in both):
            verdict.failed = verdict.failed or difference(subject, got, wanted)
        verdict.line_ends &= all(x.same(y, True) for x, y in both)
    if not re.search(r" OK \(", said):
        code = re.search(r"returned ([0-9]+), when expecting ([0-9, ]+)", said)
        why = f"exit code {code[1]} in place of {code[2].strip()}" if code else ""
        if "no content at all" in said:
            why = "the server was not asked"
        last = [line.strip() for line in said.splitlines() if line.strip()]
        verdict.failed = verdict.failed or why or last[-1] if last else "no verdict"
    if verdict.failed and refusal:
        verdict.failed = f"{refusal} ({verdict.failed})"
    return verdict


def run_tests(
    tree: Path, numbers: list[int], proxy: str, folder: Path, limit: float, show: bool
) -> dict[int, Verdict]:
    """Run tests through a proxy, or with none; return how each went."""
    seen = folder / "seen"
    shutil.rmtree(seen, ignore_errors=True)
    seen.mkdir()
    (folder / "hook.pl").write_text(HOOK)
    command = ["perl", "-I.", "./runtests.pl", "-n", "-a", "-L"]
    command.append(f"{folder}/hook.pl")
    command += ["-P", proxy] if proxy else []
    output = folder / "runtests"
    with open(output, "wb") as file:
        process = subprocess.Popen(
            [*command, *map(str, numbers)],
            cwd=tree / "tests",
            env={**os.environ, "SEEN": str(seen), "LC_ALL": "C"},
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
            start_new_session=True,
        )
        try:
            if not await_end(process, output, tree, time.monotonic() + limit):
                note(f"the limit of {limit:.0f} s is over; the rest has no verdict")
        finally:
            stop(process)
            stop_servers(tree)
    said = output.read_text("latin-1")
    found = list(RESULT.finditer(said))
    verdicts = {}
    for match, end in zip(found, [x.start() for x in found[1:]] + [len(said)]):
        number, text = int(match[1]), said[match.end() : end]
        if match[2]:
            verdicts[number] = Verdict(skipped=match[2])
            continue
        verdicts[number] = judge(number, text, seen)
        if show:
            print(f"--- test {number}: {verdicts[number].failed or 'ok'}")
            print(text)
            for path in sorted(seen.glob(f"{number}-*")):
                print(path.read_text("latin-1"))
    if not verdicts:
        raise BenchError(f"runtests.pl ran nothing: {said.strip()[-300:]}")
    return verdicts


def await_end(
    process: "subprocess.Popen[bytes]", output: Path, tree: Path, deadline: float
) -> bool:
    """Wait until runtests.pl has ended; end a curl that hangs.  Return whether it has.

    Most tests bring no limit of time, since nothing hangs without a proxy.
    """
    size, since = 0, time.monotonic()
    while not left_by(process, time.monotonic() + 1.0):
        now = time.monotonic()
        if now > deadline:
            return False
        if output.stat().st_size != size:
            size, since = output.stat().st_size, now
        elif now - since > TEST_TIMEOUT:
            end_clients(tree)
            since = now
    return True


def end_clients(tree: Path) -> None:
    """End each curl, and each other client of the tests, of a tree."""
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            program = os.readlink(process / "exe")
            if program.startswith((f"{tree}/src/", f"{tree}/tests/libtest/")):
                os.kill(int(process.name), signal.SIGTERM)


def stop_servers(tree: Path) -> None:
    """End the test servers that a runtests.pl which was stopped has left."""
    for path in tree.glob("tests/**/.*_server.pid"):
        with contextlib.suppress(OSError, ValueError):
            pid = int(path.read_text().split()[0])
            called = Path(f"/proc/{pid}/cmdline").read_bytes()
            if str(tree).encode() in called or b"server/sws" in called:
                os.kill(pid, signal.SIGTERM)


# --- Curl -------------------------------------------------------------------


def do(command: list[str], folder: Path) -> None:
    """Run a step of the build; raise BenchError with its last line if it fails."""
    note(" ".join(command)[:100])
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(
            command,
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
        try:
            code = process.wait(BUILD_TIMEOUT)
        finally:
            stop(process)
        if code:
            output.seek(0)
            said = output.read().decode(errors="replace").strip().splitlines()
            raise BenchError(f"{command[0]} ended with {code}: {' '.join(said[-1:])}")


def fetch_source(folder: Path) -> Path:
    """Get Debian's source package of curl; return the tree."""
    release = dict(
        line.split("=", 1) for line in Path("/etc/os-release").read_text().splitlines()
    )
    suite = release.get("VERSION_CODENAME", "stable").strip('"')
    lists, source = folder / "lists", folder / "source"
    for one in (lists / "partial", source):
        one.mkdir(parents=True, exist_ok=True)
    sources = folder / "sources.list"
    sources.write_text(f"deb-src [signed-by={KEYRING}] {MIRROR} {suite} main\n")
    apt = ["apt-get", "-q", "-o", f"Dir::Etc::sourcelist={sources}"]
    apt += ["-o", "Dir::Etc::sourceparts=-", "-o", f"Dir::State::lists={lists}"]
    apt += ["-o", "APT::Sandbox::User=root"]
    do([*apt, "update"], source)
    do([*apt, "source", "curl"], source)
    (tree,) = (path for path in source.iterdir() if path.is_dir())
    return tree


def build(arguments: argparse.Namespace, folder: Path) -> Path:
    """Return a tree of curl in which the tests can run."""
    tree = folder / "curl"
    if (tree / "built").exists():
        return tree
    shutil.rmtree(tree, ignore_errors=True)
    if arguments.source:
        note(f"copying {arguments.source}")
        shutil.copytree(arguments.source, tree, symlinks=True)
    else:
        fetch_source(folder).rename(tree)
    if not (tree / "configure").exists():
        do(["autoreconf", "-fi"], tree)
    if not (tree / "config.status").exists():
        tls = "--with-openssl" if has_openssl() else "--without-ssl"
        do(["nice", "./configure", *CONFIGURE.split(), tls], tree)
    for path in tree.glob("*/checksrc.pl"):  # whose opinion of a patch ends a build
        path.write_text("exit 0;\n")
    for part in (".", "tests"):
        do(["nice", "make", "-s", "-j2", "-C", part], tree)
    (tree / "built").touch()
    return tree


def has_openssl() -> bool:
    return Path("/usr/include/openssl/ssl.h").exists()


# --- The run ----------------------------------------------------------------


def note(text: str) -> None:
    print(f"curl_suite: {text}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def contender(place: Place, name: str) -> Iterator[str]:
    """Run a proxy until the block ends; yield where it listens."""
    if ":" in name:
        yield name
        return
    with started(place, name, name) as one:
        yield f"{HOST}:{one.port}"


def furnish(folder: Path) -> None:
    """Set the namespace's interface lo up, and give it an /etc/hosts."""
    with socket.socket() as door:  # SIOCSIFFLAGS, IFF_UP: netdevice(7)
        fcntl.ioctl(door, 0x8914, struct.pack("16sh22x", b"lo", 1))
    hosts = folder / "hosts"
    called = ["localhost", *sorted(names(folder / "curl" / "tests"))]
    hosts.write_text("".join(f"{HOST} {name}\n" for name in called))
    command = ["mount", "--bind", str(hosts), "/etc/hosts"]
    subprocess.run(command, check=True, timeout=10)


def report(name: str, verdicts: dict[int, Verdict], count: int) -> None:
    """Print the failed tests of a contender, and a count of the reasons."""
    failed = {n: v.failed for n, v in verdicts.items() if v.failed}
    print(f"\n{len(failed)} of {count} failed through {name}:\n")
    print("| test | why |\n|---:|---|")
    for number, why in failed.items():
        print(f"| {number} | {why.replace('|', '/')} |")
    kinds = Counter(re.sub(r" in place of.*| \(.*", "", x) for x in failed.values())
    print("\nThe most frequent of these:\n")
    for why, times in kinds.most_common(15):
        if times > 1:
            print(f"* {times} x {why}")


def run(arguments: argparse.Namespace, folder: Path) -> None:
    """Run the tests without a proxy and through each; print what came of it."""
    tree = folder / "curl"
    version = re.search(
        r'LIBCURL_VERSION "([^"]*)"', (tree / "include/curl/curlver.h").read_text()
    )
    numbers = chosen(tree / "tests")
    if arguments.only:
        numbers = [number for number in numbers if number in arguments.only]
    if not numbers:
        raise BenchError("none of these tests is one of HTTP without a proxy")
    print(machine())
    options = ("rules=allow to 127.0.0.0/8, ::1 port 1-65535", *arguments.option)
    with tempfile.TemporaryDirectory(prefix="curl-suite-") as name:
        scratch = Path(name)
        prepare(scratch, arguments.natwork, 0)
        place = Place(scratch, 0, arguments.python, options, False)
        limit = arguments.seconds
        note(f"{len(numbers)} tests without a proxy")
        plain = run_tests(tree, numbers, "", scratch, limit, False)
        good = [n for n, v in plain.items() if not v.skipped and not v.failed]
        skipped = sum(bool(verdict.skipped) for verdict in plain.values())
        print(
            f"curl {version[1] if version else '?'}: {len(numbers)} tests of HTTP bring"
            f" no proxy; without one {len(good)} pass here, {skipped} are skipped"
        )
        if not good:
            raise BenchError("no test passes without a proxy")
        rows, reports = [], []
        for through in arguments.through:
            note(f"{len(good)} tests through {through}")
            with contender(place, through) as proxy:
                found = run_tests(tree, good, proxy, scratch, limit, arguments.show)
            verdicts = {n: found.get(n, Verdict(failed="no verdict")) for n in good}
            passed = [v for v in verdicts.values() if not v.skipped and not v.failed]
            skipped = sum(bool(v.skipped) for v in verdicts.values())
            rows.append(
                f"| {through} | {len(passed)} | {sum(v.line_ends for v in passed)} |"
                f" {len(good) - len(passed) - skipped} | {skipped} |"
            )
            note(rows[-1])
            reports.append((through, verdicts))
    print("\n| through | passed | with line ends | failed | skipped |")
    print("|---|---:|---:|---:|---:|")
    print("\n".join(rows))
    for through, verdicts in reports:
        report(through, verdicts, len(good))


def parse_arguments() -> argparse.Namespace:
    here = Path(__file__).resolve().parent
    peers = [name for name in ("privoxy", "tinyproxy", "squid") if name in RECIPES]
    parser = argparse.ArgumentParser(
        prog="curl_suite.py", description="Run curl's HTTP tests through natwork."
    )
    add = parser.add_argument
    add("--through", nargs="+", default=["natwork"], metavar="NAME|HOST:PORT")
    add("--source", type=Path, metavar="DIR", help="a tree of curl, built or not")
    add("--keep", type=Path, metavar="DIR", help="where the built tree is kept")
    add("--only", nargs="+", type=int, metavar="N", help="these tests only")
    add("--show", action="store_true", help="print all that was compared")
    add("--seconds", type=float, default=1200.0, help="limit of one pass (1200)")
    add("--python", default=sys.executable, help="the interpreter that runs natwork")
    add("--natwork", type=Path, default=here.parent / "natwork.py", metavar="FILE")
    add("-o", "--option", action="append", default=[], metavar="NAME=VALUE")
    arguments = parser.parse_args()
    for name in arguments.through:
        if ":" not in name and name not in ["natwork", *peers]:
            parser.error(f"{name} is none of natwork, {', '.join(peers)}, HOST:PORT")
    return arguments


def isolated(arguments: argparse.Namespace, folder: Path) -> int:
    """Run this program again in a network of its own; return its exit code."""
    command = ["unshare", "--net", "--mount"]
    command += [] if os.geteuid() == 0 else ["--map-root-user"]
    command += [sys.executable, *sys.argv, "--keep", str(folder)]
    process = subprocess.Popen(
        command, env={**os.environ, INSIDE: "1"}, start_new_session=True
    )
    try:
        return process.wait()
    finally:
        stop(process)


def measure(arguments: argparse.Namespace) -> int:
    """Build what is not built, and run; return an exit code."""
    needed = ["perl", "make", "cc", "unshare", "mount"]
    needed += [] if arguments.source else ["apt-get", "dpkg-source"]
    peers = [name for name in arguments.through if ":" not in name]
    needed += [name for name in peers if name != "natwork"]
    if missing := [name for name in needed if not installed(name)]:
        raise BenchError("not installed: " + ", ".join(missing))
    with contextlib.ExitStack() as held:
        if arguments.keep:
            folder = arguments.keep.resolve()
            folder.mkdir(parents=True, exist_ok=True)
        else:
            folder = Path(held.enter_context(tempfile.TemporaryDirectory()))
        if INSIDE not in os.environ:
            folder.chmod(0o755)
            build(arguments, folder)
            if len(peers) == len(arguments.through):
                return isolated(arguments, folder)
        else:
            furnish(folder)
        run(arguments, folder)
    return 0


def main() -> int:
    arguments = parse_arguments()
    for signum in (signal.SIGTERM, signal.SIGHUP):
        # Raised as an exception, so that everything started is stopped.
        signal.signal(signum, lambda number, _: sys.exit(f"curl_suite: {number}"))
    try:
        return measure(arguments)
    except (BenchError, OSError, subprocess.SubprocessError) as error:
        print(f"curl_suite: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("curl_suite: interrupted", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
