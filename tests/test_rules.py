"""Rules: who is a client, and what may be dialed for it, by name or by address."""

from __future__ import annotations

import contextlib
import os
import re
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import addresses
import http_wire
import origins
import pytest
import running

import natwork
import natwork_users

CLIENT = "127.0.0.7"


# --- Networks and forms -------------------------------------------------------


NETWORKS = {
    "10.0.0.0/8": ("10.0.0.0", "10.255.255.255"),
    "10.1.2.3/8": ("10.0.0.0", "10.255.255.255"),
    "192.0.2.1": ("192.0.2.1", "192.0.2.1"),
    "192.0.2.1/32": ("192.0.2.1", "192.0.2.1"),
    "192.0.2.129/25": ("192.0.2.128", "192.0.2.255"),
    "192.0.2.6/31": ("192.0.2.6", "192.0.2.7"),
    "0.0.0.0/0": ("0.0.0.0", "255.255.255.255"),
    "::1": ("::1", "::1"),
    "::/128": ("::", "::"),
    "fe80::/10": ("fe80::", "febf:ffff:ffff:ffff:ffff:ffff:ffff:ffff"),
    "2001:DB8::/33": ("2001:db8::", "2001:db8:7fff:ffff:ffff:ffff:ffff:ffff"),
    "::/0": ("::", "ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff"),
}


@pytest.mark.parametrize("text", NETWORKS)
def test_a_network_is_its_first_and_last_address(text: str) -> None:
    network = natwork.parse_network(text)
    first, last = (natwork.pack(address) for address in NETWORKS[text])
    assert network == (first, last)
    assert natwork.contains([network], first) and natwork.contains([network], last)
    for beside in (int.from_bytes(first, "big") - 1, int.from_bytes(last, "big") + 1):
        if 0 <= beside < 1 << 8 * len(first):
            assert not natwork.contains([network], beside.to_bytes(len(first), "big"))
    other = bytes(4 if len(first) == 16 else 16)  # never one of the other family
    assert not natwork.contains([network], other)


@pytest.mark.parametrize(
    "text",
    """
    10 10.0.0 10.0.0.0.0 10.0.0.256 10.0.0.1/33 10.0.0.1/-1 10.0.0.1/+8 10.0.0.1/
    10.0.0.1/8/8 10.0.0.1/0x8 10.0.0.1/8.0 10.0.0.1/255.0.0.0 010.0.0.1 0x7f.1
    2130706433 127.1 /8 example.com ::1/129 ::1/ :::1 1::2::3 fe80::1%lo [::1]
    ::ffff:10.0.0 10.0.0.1/0000000008 10.0.0.1/² ::ffff:10.0.0.1 ::ffff:0:0/96
    """.split(),
)
def test_what_is_no_network_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is not an address|has no prefix|as one"):
        natwork.parse_network(text)  # traps 8, 12


FORMS = {
    "192.0.2.1": ["192.0.2.1"],
    "2001:db8::1": ["2001:db8::1"],
    "::1": ["::1"],
    "::": ["::"],
    "::ffff:0:10.0.0.1": ["::ffff:0:a00:1", "10.0.0.1"],  # IPv4-translated
    # IPv4-mapped: the kernel dials IPv4.
    "::ffff:127.0.0.1": ["127.0.0.1"],
    "::ffff:0.0.0.0": ["0.0.0.0"],
    "0:0:0:0:0:ffff:c000:201": ["192.0.2.1"],
    # IPv4-compatible, RFC 4291 section 2.5.5.1.
    "::127.0.0.1": ["::7f00:1", "127.0.0.1"],
    "::a01:203": ["::a01:203", "10.1.2.3"],
    # 6to4, RFC 3056.
    "2002:7f00:1::": ["2002:7f00:1::", "127.0.0.1"],
    "2002:a01:203:4::5": ["2002:a01:203:4::5", "10.1.2.3"],
    # Teredo, RFC 4380 section 4: the server, and the client inverted.
    "2001:0:c000:201:0:0:80ff:fffe": [
        "2001:0:c000:201:0:0:80ff:fffe",
        "192.0.2.1",
        "127.0.0.1",
    ],
    # NAT64: RFC 6052 section 2.1, and RFC 8215's local prefix at lengths 96 and 48.
    "64:ff9b::7f00:1": ["64:ff9b::7f00:1", "127.0.0.1"],
    "64:ff9b::10.1.2.3": ["64:ff9b::10.1.2.3", "10.1.2.3"],
    "64:ff9b:1::127.0.0.1": ["64:ff9b:1::127.0.0.1", "127.0.0.1"],
    "64:ff9b:1:7f00:0:100::": ["64:ff9b:1:7f00:0:100::", "127.0.0.1"],
    # Near misses.
    "2001:1::7f00:1": ["2001:1::7f00:1"],
    "2003:7f00:1::": ["2003:7f00:1::"],
    "64:ff9b:2::7f00:1": ["64:ff9b:2::7f00:1"],
    "::fffe:127.0.0.1": ["::fffe:127.0.0.1"],
    "1::ffff:127.0.0.1": ["1::ffff:127.0.0.1"],
}


@pytest.mark.parametrize("address", FORMS)
def test_an_address_is_unwrapped(address: str) -> None:
    found = natwork.embedded_addresses(natwork.pack(address))  # trap 12
    wanted = [natwork.pack(form) for form in FORMS[address]]
    if address.startswith("64:ff9b:1:"):  # every length of prefix may be looked at
        assert set(wanted) <= set(found)
    else:
        assert found == wanted


# --- Lines of `rules` ---------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("permit to *", "allow or deny"),
        ("Allow to *", "allow or deny"),
        ("to *", "allow or deny"),
        ("allow to", "pairs"),
        ("allow * to", "none of from, user, to, port"),
        ("allow to * to *", "pairs"),
        ("allow to * port 80 to example.com", "pairs"),
        ("allow via eth0", "'via'"),
        ("allow FROM 10.0.0.0/8", "'FROM'"),
        ("allow from example.com", "'example.com'"),
        ("allow from 10.0.0.0/33", "'10.0.0.0/33'"),
        ("allow from *", "'*'"),
        ("allow to 10.0.0.0/33", "'10.0.0.0/33'"),
        ("allow to 10.0.0", "'10.0.0'"),
        ("allow to 127.1", "'127.1'"),
        ("allow to ex*mple.com", "'ex*mple.com'"),
        ("allow to *.example", "'*.example'"),
        ("allow to ..example", "'..example'"),
        ("allow to example..com", "'example..com'"),
        ("allow to .", "'.'"),
        ("allow to exämple.com", "'exämple.com'"),
        ("allow to example.com:80", "'example.com:80'"),
        ("allow to http://example.com/", "'http:'"),
        ("allow to a,,b", "empty"),
        ("allow to a,", "empty"),
        ("allow to a ,,b", "empty"),
        ("allow port 0", "'0'"),
        ("allow port 65536", "'65536'"),
        ("allow port 80-", "'80-'"),
        ("allow port -80", "'-80'"),
        ("allow port 90-80", "'90-80'"),
        ("allow port 0-80", "'0-80'"),
        ("allow port 1-65536", "'1-65536'"),
        ("allow port http", "'http'"),
        ("allow port *", "'*'"),
        ("allow port +80", "'+80'"),  # trap 8
        ("allow port 8_0", "'8_0'"),
        ("allow port ８０", "'８０'"),
        ("allow port 0x50", "'0x50'"),
    ],
)
def test_a_bad_rule_is_refused_and_the_error_names_it(
    line: str, complaint: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(complaint)):
        natwork.Rule(line)
    config = natwork.Config(rules=f"deny to a; {line}")
    natwork.Policy(config)
    (error,) = config.errors
    assert re.search("rules = .*" + re.escape(complaint), error)


def test_a_rule_is_its_words_whatever_the_blanks() -> None:
    rule = natwork.Rule("  deny   to a.example , .b.example  port 80,90-99 ")
    assert rule.text == "deny to a.example,.b.example port 80,90-99"
    assert not rule.allow


# --- Verdicts -----------------------------------------------------------------

# rules; client, user; host, port, address; the word of the log, "ok" for allowed.
# "own" needs an address of this box and is shown live, below.
OUTSIDE = "93.184.216.34"
OTHERS = "built-in rule: allow the rest"
VERDICTS = [
    # No rules: the built-in ones.
    ("", "a.example", 80, OUTSIDE, "ok"),
    ("", "a.example", 80, "2606:2800:220:1::1", "ok"),
    ("", "a.example", 25, OUTSIDE, "denied-port-25"),
    ("", "a.example", 24, OUTSIDE, "ok"),
    ("", "a.example", 80, "0.0.0.0", "denied-unspecified"),
    ("", "a.example", 80, "::", "denied-unspecified"),
    ("", "a.example", 80, "127.0.0.1", "denied-loopback"),
    ("", "a.example", 80, "::1", "denied-loopback"),
    ("", "a.example", 80, "169.254.169.254", "denied-link-local"),
    ("", "a.example", 80, "fe80::1", "denied-link-local"),
    ("", "a.example", 80, "224.0.0.1", "denied-multicast"),
    ("", "a.example", 80, "255.255.255.255", "denied-multicast"),
    ("", "a.example", 80, "ff02::1", "denied-multicast"),
    ("", "a.example", 80, "10.1.2.3", "denied-inside"),
    ("", "a.example", 80, "172.31.255.255", "denied-inside"),
    ("", "a.example", 80, "172.32.0.0", "ok"),
    ("", "a.example", 80, "192.168.0.1", "denied-inside"),
    ("", "a.example", 80, "fd00::1", "denied-inside"),
    # In all their forms: trap 12.
    ("", "a.example", 80, "::ffff:127.0.0.1", "denied-loopback"),
    ("", "a.example", 80, "::127.0.0.1", "denied-loopback"),
    ("", "a.example", 80, "2002:7f00:1::", "denied-loopback"),
    ("", "a.example", 80, "64:ff9b::7f00:1", "denied-loopback"),
    ("", "a.example", 80, "64:ff9b:1::7f00:1", "denied-loopback"),
    ("", "a.example", 80, "64:ff9b:1:7f00:0:100::", "denied-loopback"),
    ("", "a.example", 80, "64:ff9b:1::5db8:d822", "ok"),
    *(
        ("", "a.example", 80, address, "denied-inside")
        for address in (
            "64:ff9b:1:6400::a00:7",  # a /96 whose 16 bits are not 0
            "64:ff9b:1:6464::a00:7",
            "64:ff9b:1:640a:0:7::",  # a /56
            "64:ff9b:1:6464:a:0:700:0",  # a /64
        )
    ),
    ("", "a.example", 80, "64:ff9b::5db8:d822", "ok"),
    ("", "a.example", 80, "2001:0:c000:201::80ff:fffe", "denied-loopback"),
    ("", "a.example", 80, "2001:0:7f00:1::", "denied-loopback"),
    ("", "a.example", 80, "::ffff:10.1.2.3", "denied-inside"),
    ("", "a.example", 80, "64:ff9b::10.1.2.3", "denied-inside"),
    ("", "a.example", 80, "2002:a9fe:a9fe::1", "denied-link-local"),
    # The first match decides.
    ("deny to *; allow to a.example", "a.example", 80, OUTSIDE, "denied-rule-1"),
    ("allow to a.example; deny to *", "a.example", 80, OUTSIDE, "ok"),
    ("allow to a.example; deny to *", "b.example", 80, OUTSIDE, "denied-rule-2"),
    ("deny", "b.example", 80, OUTSIDE, "denied-rule-1"),
    ("deny to b.example\ndeny to *", "a.example", 80, OUTSIDE, "denied-rule-2"),
    ("\n ;; deny to b.example;\n\ndeny", "a.example", 80, OUTSIDE, "denied-rule-2"),
    # A deny for the user's own reasons comes before the built-in ones.
    ("deny to *", "a.example", 80, "127.0.0.1", "denied-rule-1"),
    # An allow opens what is closed only by a CIDR that contains it.
    ("allow to *", "a.example", 80, "127.0.0.1", "denied-loopback"),
    ("allow", "a.example", 80, "127.0.0.1", "denied-loopback"),
    ("allow to a.example", "a.example", 80, "10.1.2.3", "denied-inside"),
    ("allow to .example", "a.example", 80, "10.1.2.3", "denied-inside"),
    ("allow port 80", "a.example", 80, "10.1.2.3", "denied-inside"),
    ("allow from 10.0.0.0/8", "a.example", 80, "10.1.2.3", "denied-inside"),
    ("allow to 10.1.2.3", "a.example", 80, "10.1.2.3", "ok"),
    ("allow to 10.1.0.0/16", "a.example", 80, "10.1.2.3", "ok"),
    ("allow to 10.1.0.0/16", "a.example", 80, "10.2.2.3", "denied-inside"),
    ("allow to 10.1.0.0/16,*", "a.example", 80, "10.2.2.3", "denied-inside"),
    ("allow to 127.0.0.0/8", "a.example", 80, "::ffff:127.0.0.1", "ok"),
    ("allow to ::1", "a.example", 80, "127.0.0.1", "denied-loopback"),
    ("allow to 64:ff9b::/96", "a.example", 80, "64:ff9b::7f00:1", "denied-loopback"),
    ("allow to 10.1.0.0/16 port 81", "a.example", 80, "10.1.2.3", "denied-inside"),
    ("allow to *; allow to 10.1.0.0/16", "a.example", 80, "10.1.2.3", "ok"),
    ("allow to *; deny to 10.1.2.3", "a.example", 80, "10.1.2.3", "denied-rule-2"),
    ("deny to 10.1.2.3; allow to 10.0.0.0/8", "a", 80, "10.1.2.3", "denied-rule-1"),
    # A deny fits whichever form an address has.
    ("deny to 192.0.2.0/24", "a.example", 80, "64:ff9b::192.0.2.1", "denied-rule-1"),
    ("deny to 192.0.2.0/24", "a.example", 80, "2002:c000:201::1", "denied-rule-1"),
    ("deny to 64:ff9b::/96", "a.example", 80, "64:ff9b::808:808", "denied-rule-1"),
    # Port 25 only where it is named, alone.
    ("allow port 25", "a.example", 25, OUTSIDE, "ok"),
    ("allow port 24,25", "a.example", 25, OUTSIDE, "ok"),
    ("allow port 25-25", "a.example", 25, OUTSIDE, "ok"),
    ("allow port 1-65535", "a.example", 25, OUTSIDE, "denied-port-25"),
    ("allow port 25-26", "a.example", 25, OUTSIDE, "denied-port-25"),
    ("allow to *", "a.example", 25, OUTSIDE, "denied-port-25"),
    (f"allow to {OUTSIDE}", "a.example", 25, OUTSIDE, "denied-port-25"),
    ("allow to a.example; allow port 25", "a.example", 25, OUTSIDE, "ok"),
    ("allow port 25", "a.example", 25, "10.1.2.3", "denied-inside"),
    ("allow to 10.1.2.3", "a.example", 25, "10.1.2.3", "denied-inside"),
    ("allow to 10.1.2.3 port 25", "a.example", 25, "10.1.2.3", "ok"),
    # Hosts.
    ("deny to a.example", "a.example", 80, OUTSIDE, "denied-rule-1"),
    ("deny to A.Example", "a.example", 80, OUTSIDE, "denied-rule-1"),
    ("deny to a.example.", "a.example", 80, OUTSIDE, "denied-rule-1"),
    ("deny to a.example", "a.example.", 80, OUTSIDE, "denied-rule-1"),
    ("deny to a.example", "A.EXAMPLE", 80, OUTSIDE, "denied-rule-1"),
    ("deny to a.example.", "a.example.", 80, OUTSIDE, "denied-rule-1"),
    ("deny to a.example", "b.a.example", 80, OUTSIDE, "ok"),
    ("deny to .example", "example", 80, OUTSIDE, "denied-rule-1"),
    ("deny to .example", "a.example", 80, OUTSIDE, "denied-rule-1"),
    ("deny to .example", "c.b.a.example", 80, OUTSIDE, "denied-rule-1"),
    ("deny to .EXAMPLE.", "a.example", 80, OUTSIDE, "denied-rule-1"),
    ("deny to .example", "a.example.", 80, OUTSIDE, "denied-rule-1"),
    ("deny to .example", "example.", 80, OUTSIDE, "denied-rule-1"),
    ("deny to .example", "badexample", 80, OUTSIDE, "ok"),
    ("deny to .a.example", "ba.example", 80, OUTSIDE, "ok"),
    ("deny to .example", "example.com", 80, OUTSIDE, "ok"),
    ("deny to a.example", OUTSIDE, 80, OUTSIDE, "ok"),
    # Ports.
    ("deny port 8000-8010", "a.example", 7999, OUTSIDE, "ok"),
    ("deny port 8000-8010", "a.example", 8000, OUTSIDE, "denied-rule-1"),
    ("deny port 8000-8010", "a.example", 8010, OUTSIDE, "denied-rule-1"),
    ("deny port 8000-8010", "a.example", 8011, OUTSIDE, "ok"),
    ("deny port 81, 83", "a.example", 83, OUTSIDE, "denied-rule-1"),
    ("deny port 81, 83", "a.example", 82, OUTSIDE, "ok"),
    ("deny port 65535", "a.example", 65535, OUTSIDE, "denied-rule-1"),
    # Every part that is given must fit.
    ("deny from 127.0.0.7", "a.example", 80, OUTSIDE, "denied-rule-1"),
    ("deny from 127.0.0.0/29,192.0.2.1", "a.example", 80, OUTSIDE, "denied-rule-1"),
    ("deny from 127.0.0.8/29", "a.example", 80, OUTSIDE, "ok"),
    ("deny from ::/0", "a.example", 80, OUTSIDE, "ok"),
    ("deny user ann", "a.example", 80, OUTSIDE, "denied-rule-1"),
    ("deny user bob,ann", "a.example", 80, OUTSIDE, "denied-rule-1"),
    ("deny user bob", "a.example", 80, OUTSIDE, "ok"),
    ("deny user Ann", "a.example", 80, OUTSIDE, "ok"),
    ("deny from 127.0.0.7 user ann to .example port 80", "a.example", 80, OUTSIDE, "!"),
    (
        "deny from 127.0.0.8 user ann to .example port 80",
        "a.example",
        80,
        OUTSIDE,
        "ok",
    ),
    (
        "deny from 127.0.0.7 user bob to .example port 80",
        "a.example",
        80,
        OUTSIDE,
        "ok",
    ),
    ("deny from 127.0.0.7 user ann to .test port 80", "a.example", 80, OUTSIDE, "ok"),
    (
        "deny from 127.0.0.7 user ann to .example port 81",
        "a.example",
        80,
        OUTSIDE,
        "ok",
    ),
]


@pytest.mark.parametrize(("rules", "host", "port", "address", "word"), VERDICTS)
def test_the_first_rule_that_fits_decides(
    rules: str, host: str, port: int, address: str, word: str
) -> None:
    policy = natwork.Policy(natwork.Config(rules=rules))
    policy.listens_at("192.168.0.1", 8080)
    host, port = natwork.parse_authority(f"{host}:{port}".encode(), 0)  # as it comes
    verdict = policy.judge(CLIENT, "ann", host, port, natwork.pack(address))
    word = "denied-rule-1" if word == "!" else word
    assert (verdict[0] is natwork.OK, verdict[0].word) == (word == "ok", word)
    if match := re.fullmatch(r"denied-rule-(\d)", word):
        lines = [line.strip() for line in re.split("[\n;]", rules) if line.strip()]
        line = re.sub(", ", ",", lines[int(match[1]) - 1])
        assert verdict[1] == f"rule {match[1]}: {line}"
    elif word != "ok":
        assert word.removeprefix("denied-").replace("-", " ") in verdict[1].replace(
            "-", " "
        )


def test_a_client_has_one_address_however_it_is_written() -> None:
    policy = natwork.Policy(natwork.Config(rules="deny from 127.0.0.7"))
    packed = natwork.pack(OUTSIDE)
    for client in ("127.0.0.7", "::ffff:127.0.0.7"):
        assert policy.judge(client, "-", "a.example", 80, packed)[0] is not natwork.OK
    assert policy.judge("::127.0.0.7", "-", "a.example", 80, packed)[0] is natwork.OK


OPEN = "allow to 0.0.0.0/0, ::/0 port 1-65535, 8080"


@pytest.mark.parametrize("rules", ["", OPEN])
@pytest.mark.parametrize(
    ("listener", "address"),
    [
        ("192.168.0.1", "192.168.0.1"),
        ("192.168.0.1", "::ffff:192.168.0.1"),
        ("192.168.0.1", "64:ff9b::192.168.0.1"),
        ("192.168.0.1", "2002:c0a8:1::1"),
        ("fd00::1", "fd00::1"),
        ("0.0.0.0", "127.0.0.1"),
        ("0.0.0.0", "127.9.9.9"),
        ("0.0.0.0", "0.0.0.0"),
        ("0.0.0.0", "::ffff:127.0.0.1"),
        ("::", "::1"),
        ("::", "::"),
    ],
)
def test_no_rule_opens_the_gateways_own_listener(
    rules: str, listener: str, address: str
) -> None:
    policy = natwork.Policy(natwork.Config(rules=rules))
    policy.listens_at(listener, 8080)
    packed = natwork.pack(address)
    verdict = policy.judge(CLIENT, "-", "a.example", 8080, packed)
    assert (verdict[0] is natwork.OK, verdict[0].word) == (False, "loop")
    beside = policy.judge(CLIENT, "-", "a.example", 8081, packed)
    assert beside[0].word != "loop" and (beside[0] is natwork.OK) == bool(rules)


@pytest.mark.parametrize("rules", ["", OPEN])
@pytest.mark.parametrize(
    ("listener", "address"),
    [("127.0.0.1", "0.0.0.0"), ("127.0.0.1", "::ffff:0.0.0.0"), ("::1", "::")],
)
def test_the_unspecified_address_is_loopback_to_who_dials_it(
    rules: str, listener: str, address: str
) -> None:
    policy = natwork.Policy(natwork.Config(rules=rules))
    policy.listens_at(listener, 8080)
    packed = natwork.pack(address)
    assert policy.judge(CLIENT, "-", "a.example", 8080, packed)[0] is not natwork.OK


# --- Live: closed addresses ---------------------------------------------------

closed = running.shared("rules=allow to *; allow port 1-65535; allow to localhost")


@pytest.mark.parametrize("method", [b"GET", b"CONNECT"])
@pytest.mark.parametrize(("word", "target"), addresses.TARGETS)
def test_a_closed_address_is_refused_and_the_rule_is_named(
    closed: running.Gateway,
    origin: origins.Start,
    capsys: pytest.CaptureFixture[str],
    word: str,
    target: str,
    method: bytes,
) -> None:
    server = origin(http_wire.Script(), "::1" if target == "[::1]" else "127.0.0.1")
    place = f"{target}:{server.port}"  # traps 12, 13
    count = len(closed.lines())
    with closed.connect() as client:
        answer = http_wire.exchange(
            client, http_wire.request(place.encode(), method=method), method
        )
        assert (answer.status, http_wire.proxy_error(answer)) == (
            403,
            b"http_request_denied",
        )
    rule = f"built-in rule: {word} addresses are not reached".encode()
    assert rule in answer.body and rule in answer.values(b"Proxy-Status")[0]
    line = closed.lines(count + 1)[count]
    assert (line["status"], line["outcome"]) == ("403", f"denied-{word}")
    assert (line["address"], line["source"]) == ("-", "-")
    assert http_wire.uncalled(server)
    rules = "rules=allow to *; allow port 1-65535; allow to localhost"
    said = explained(capsys, closed, "127.0.0.1", place, "-o", rules)
    assert f"refused (denied-{word}) by {rule.decode()}" in said


def test_an_address_of_the_gateway_itself_is_refused(natwork: running.Start) -> None:
    # So that it is none of the others: nothing but loopback is inside.
    gateway = natwork("inside=127.0.0.0/8", loopback=False)
    with socket.socket() as server:
        server.bind(("", 0))
        server.listen()
        server.settimeout(0)
        address = addresses.here(socket.AF_INET, "198.51.100.1")
        if not address or address.startswith("127."):
            if os.environ.get("CI") == "true":
                pytest.fail("this box has loopback addresses only")
            pytest.skip("this box has loopback addresses only")
        place = f"{address}:{server.getsockname()[1]}".encode()
        for method in (b"GET", b"CONNECT"):
            with gateway.connect() as client:
                answer = http_wire.exchange(
                    client, http_wire.request(place, method=method), method
                )
                assert answer.status == 403
                assert b"built-in rule: own addresses" in answer.body
        with pytest.raises(BlockingIOError):
            server.accept()
    assert [line["outcome"] for line in gateway.lines(2)] == ["denied-own"] * 2


@pytest.mark.parametrize("method", [b"GET", b"CONNECT"])
@pytest.mark.parametrize(
    "target",
    "127.1 127.0.1 0x7f.1 0x7f000001 017700000001 2130706433 0 0177.0.0.1".split(),
)
def test_what_only_a_resolver_takes_for_an_address_is_not_resolved(
    closed: running.Gateway, origin: origins.Start, target: str, method: bytes
) -> None:
    server = origin(http_wire.Script())  # trap 12
    with closed.connect() as client:
        place = f"{target}:{server.port}".encode()
        assert (
            http_wire.exchange(
                client, http_wire.request(place, method=method), method
            ).status
            == 400
        )
    assert http_wire.uncalled(server)


# --- Live: who is a client ----------------------------------------------------


@pytest.mark.parametrize(
    ("option", "peer"),
    [
        ("inside=10.0.0.0/8", "127.0.0.1"),
        ("inside=127.0.0.0/30", "127.0.0.4"),
        ("inside=::1", "127.0.0.1"),
        ("outside=127.0.0.1", "127.0.0.1"),
        ("outside=127.0.0.1", "127.0.0.9"),
        ("outside=nosuch0 127.0.0.1", "127.0.0.1"),
        ("outside=lo", "127.0.0.1"),
    ],
)
def test_who_is_not_a_client_is_closed_without_a_byte(
    natwork: running.Start, origin: origins.Start, option: str, peer: str
) -> None:
    gateway, server = natwork(option), origin(http_wire.Script())
    with socket.socket() as client:
        client.settimeout(10)
        client.bind((peer, 0))
        client.connect(gateway.address)
        assert client.recv(1) == b""
        name = "%s:%d" % client.getsockname()
        with contextlib.suppress(ConnectionError):
            client.sendall(http_wire.request(server))  # nor is anything done for it
    (line,) = gateway.lines(1)
    assert line["client"] == name
    assert (line["outcome"], line["status"]) == ("not-inside", "-")
    assert (line["up"], line["down"]) == ("0", "0")
    assert http_wire.uncalled(server)


@pytest.mark.parametrize(
    ("option", "peer"),
    [
        ("inside=127.0.0.0/30", "127.0.0.3"),
        ("inside=::1 127.0.0.9", "127.0.0.9"),
        ("outside=127.0.0.2", "127.0.0.1"),
        ("outside=nosuch0 127.0.0.2", "127.0.0.1"),
    ],
)
def test_who_is_a_client_is_served(
    natwork: running.Start, origin: origins.Start, option: str, peer: str
) -> None:
    gateway, server = natwork(option), origin(http_wire.Script())
    with socket.socket() as client:
        client.settimeout(10)
        client.bind((peer, 0))
        client.connect(gateway.address)
        assert http_wire.exchange(client, http_wire.request(server)).status == 200


# --- Live: rules, and --explain -----------------------------------------------


USER_LINE = natwork_users.user_line(b"", b"secret")  # of anybody


def explained(
    capsys: pytest.CaptureFixture[str],
    gateway: running.Gateway,
    client: str,
    *words: str,
) -> str:
    """Return what --explain prints of TARGET, then options, then perhaps a user.

    With a user there are users, and this is one of them.
    """
    (target, *options) = words
    user = [options.pop()] if len(options) % 2 else []
    line = os.fsencode("".join(user)) + USER_LINE
    listen = "listen=%s:%d" % gateway.address
    capsys.readouterr()
    with tempfile.NamedTemporaryFile() as file:
        if user:
            options += ["-o", f"users={file.name}"]
            file.write(line)
            file.flush()
        words = "-o", listen, *options, "--explain", client, target, *user
        code = natwork.command([*words])
    settings, _, said = capsys.readouterr().out.partition("\n")
    assert settings.startswith("settings: ")
    goes = re.search("would dial|would ask|answered by the gateway", said)
    assert code == (0 if goes else 1)
    return said


RULES = """
    deny from 127.0.0.9
    deny user ann
    deny to localhost
    deny to 127.0.0.4
    allow to 127.0.0.5 port {port}
    deny to 127.0.0.5
    deny to .denied.example
    allow to *
    allow to 127.0.0.0/28 port 1-65535
    allow to 127.0.0.14 port 25
"""

# client; target, where PORT stands for an origin's; the rule that decides
DECIDED = [
    ("127.0.0.1", "127.0.0.3:PORT", "allowed by rule 9"),
    ("127.0.0.1", "[::ffff:127.0.0.3]:PORT", "allowed by rule 9"),
    ("127.0.0.1", "127.0.0.5:PORT", "allowed by rule 5"),
    ("127.0.0.1", "127.0.0.5:1", "refused (denied-rule-6) by rule 6"),
    ("127.0.0.1", "127.0.0.4:PORT", "refused (denied-rule-4) by rule 4"),
    ("127.0.0.1", "[::ffff:7f00:4]:PORT", "refused (denied-rule-4) by rule 4"),
    ("127.0.0.1", "localhost:PORT", "refused (denied-rule-3) by rule 3"),
    ("127.0.0.1", "LOCALHOST:PORT", "refused (denied-rule-3) by rule 3"),
    ("127.0.0.9", "127.0.0.3:PORT", "refused (denied-rule-1) by rule 1"),
    ("127.0.0.1", "127.0.0.3:25", "refused (denied-loopback) by built-in rule"),
    ("127.0.0.1", "198.51.100.1:25", "refused (denied-port-25) by built-in rule"),
    ("127.0.0.1", "127.0.0.14:25", "allowed by rule 10"),
    ("127.0.0.1", "127.0.0.16:PORT", "refused (denied-loopback) by built-in rule"),
    ("127.0.0.1", "[::1]:PORT", "refused (denied-loopback) by built-in rule"),
    ("127.0.0.1", "10.0.0.1:PORT", "refused (denied-inside) by built-in rule"),
    ("127.0.0.1", "127.0.0.1:LISTENER", "refused (loop) by the gateway's own listener"),
    ("127.0.0.1", "[::ffff:127.0.0.1]:LISTENER", "refused (loop) by the gateway's own"),
    ("127.0.0.1", "nosuch.invalid:80", "cannot serve it: no-such-host: nosuch.invalid"),
    ("127.0.0.1", "127.1:PORT", "cannot serve it: bad-request"),
]


def test_explain_says_what_the_gateway_does_and_dials_nothing(
    natwork: running.Start, origin: origins.Start, capsys: pytest.CaptureFixture[str]
) -> None:
    server = origin(http_wire.Script(), "0.0.0.0")
    rules = "rules=" + RULES.format(port=server.port).strip()
    gateway = natwork(rules, f"name={running.NAME.decode()}", loopback=False)
    reached = 0
    for number, (peer, target, verdict) in enumerate(DECIDED):
        target = target.replace("PORT", str(server.port))
        target = target.replace("LISTENER", str(gateway.address[1]))
        before = len(server.callers)
        said = explained(capsys, gateway, peer, target, "-o", rules)
        assert verdict in said, target
        assert len(server.callers) == before  # explained, not dialed
        with socket.socket() as client:
            client.settimeout(10)
            client.bind((peer, 0))
            client.connect(gateway.address)
            # What GET asks of a listener of ours is answered, not dialed.
            method = b"CONNECT" if "loop" in verdict else b"GET"
            answer = http_wire.exchange(
                client, http_wire.request(target.encode(), method=method)
            )
        line = gateway.lines(number + 1)[number]
        if verdict.startswith("allowed"):
            assert answer.status in (200, 502), target  # 502: nobody listens at 25
            assert line["outcome"] in ("ok", "refused")
            reached += answer.status == 200
            assert f"would dial {line['address']} " in said
        else:
            match = re.search(r"(?:refused \(|it: )([a-z0-9-]+)", said)
            assert match and line["outcome"] == match[1], target
            assert "would dial" not in said and line["address"] == "-"
            why = re.search(r" by (.*)", said)
            assert not why or why[1].encode() in answer.body
    assert reached == len(server.callers) == 3


@pytest.mark.parametrize(("rules", "host", "port", "address", "word"), VERDICTS)
def test_explain_says_what_the_rules_say(
    closed: running.Gateway,
    capsys: pytest.CaptureFixture[str],
    rules: str,
    host: str,
    port: int,
    address: str,
    word: str,
) -> None:
    # A literal: what a name leads to is not ours to say.
    policy = natwork.Policy(natwork.Config(rules=rules))
    place = natwork.endpoint((address, port))
    verdict = policy.judge(CLIENT, "ann", address, port, natwork.pack(address))
    said = explained(capsys, closed, CLIENT, place, "-o", f"rules={rules}", "ann")
    refused = f"refused ({verdict[0].word})"
    decision = f"{'allowed' if verdict[0] is natwork.OK else refused} by {verdict[1]}\n"
    assert f": {decision}" in said
    assert ("would dial" in said) == (verdict[0] is natwork.OK)


def test_explain_knows_the_user_and_who_is_no_client(
    closed: running.Gateway, capsys: pytest.CaptureFixture[str]
) -> None:
    rules = "rules=deny user ann"
    for words, decision in ((["ann"], "refused (denied-rule-1)"), ([], "allowed by")):
        said = explained(capsys, closed, CLIENT, f"{OUTSIDE}:80", "-o", rules, *words)
        assert decision in said and f"client {CLIENT}: inside, served" in said
    said = explained(capsys, closed, "192.0.2.9", f"{OUTSIDE}:80")
    assert said == "client 192.0.2.9: not inside, refused\n"
    said = explained(capsys, closed, "127.0.0.1", f"{OUTSIDE}:80", "-o", "outside=lo")
    assert said == (
        "client 127.0.0.1: not inside, refused\n"
        "its address is in inside, and the way to it leads outside\n"
    )


@pytest.mark.parametrize("address", ["0.0.0.0", "::"])
def test_who_may_bind_for_anyone_may_not_dial_this_box(address: str) -> None:
    """To dial the unspecified address is to dial the loopback one."""

    def outcome(rules: str, port: int) -> str:
        policy = natwork.Policy(natwork.Config(rules=rules))
        return policy.verdict(CLIENT, "-", address, port, natwork.pack(address))[0].word

    anyone = "allow to 0.0.0.0/32, ::/128"
    assert outcome(anyone, 0) == "ok"
    assert outcome(anyone, 22) == "denied-unspecified"
    assert outcome(f"{anyone}, 127.0.0.1, ::1", 22) == "ok"


def test_explain_takes_a_name_that_proves_nothing_as_the_gateway_does(
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = "-o", "rules=deny user ann", "--explain", CLIENT, f"{OUTSIDE}:80", "ann"
    assert natwork.command([*words]) == 0
    assert "allowed by built-in rule" in capsys.readouterr().out


def test_explain_knows_a_user_who_is_not_ascii(
    closed: running.Gateway, capsys: pytest.CaptureFixture[str]
) -> None:
    for user in ("zo\u00eb", "a\\b"):
        words = f"{OUTSIDE}:80", "-o", f"rules=deny user {user}", user
        assert "refused (denied-rule-1)" in explained(capsys, closed, CLIENT, *words)


def test_explain_knows_the_link_local_as_the_gateway_does(
    closed: running.Gateway,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    routes = {"169.254.7.1": "wan", "169.254.8.1": "lan", "192.0.2.1": "wan"}
    routes["169.254.6.1"] = "down"  # without the address that tells it is outside

    def route_to(packed: bytes) -> natwork.Route:
        return natwork.Route(False, routes.get(natwork.unpack(packed), ""), b"")

    monkeypatch.setattr(natwork, "route_to", route_to)
    devices = {"wan": ["203.0.113.1"], "lan": ["10.9.0.1"], "down": ["169.254.6.6"]}
    monkeypatch.setattr(
        natwork, "device_addresses", lambda name: [*map(natwork.pack, devices[name])]
    )
    for client in ("169.254.7.1", "169.254.6.1"):
        said = explained(capsys, closed, client, f"{OUTSIDE}:80")
        assert said.startswith(f"client {client}: not inside, refused\n")
    said = explained(capsys, closed, "169.254.8.1", f"{OUTSIDE}:80")
    assert "client 169.254.8.1: inside, served\n" in said


def test_explain_makes_no_connection(tmp_path: Path) -> None:
    if not any(
        os.access(f"{folder}/strace", os.X_OK)
        for folder in os.environ["PATH"].split(":")
    ):
        if os.environ.get("CI") == "true":
            pytest.fail("not installed: strace")
        pytest.skip("not installed: strace")
    program = [*running.PROGRAM, "-o", "outside=192.0.2.1"]
    trace = ["strace", "-f", "-e", "trace=%network", "-o", str(tmp_path / "trace")]
    for target in ("127.0.0.1:80", "localhost:80", f"{OUTSIDE}:443"):
        done = subprocess.run(
            [*trace, *program, "--explain", "127.0.0.1", target],
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert "client 127.0.0.1: inside" in done.stdout
        assert done.returncode == (0 if "would dial" in done.stdout else 1)
        calls = (tmp_path / "trace").read_text()
        assert "exited with" in calls
        assert "AF_NETLINK" in calls  # the routing table
        assert not re.search(r"AF_INET6?, SOCK_STREAM", calls), calls


@pytest.mark.parametrize(
    "setting", ["max_per_client=3", "bind_ports=1024-2000", "gateways=a:1"]
)
def test_explain_knows_the_settings_of_chapters(tmp_path: Path, setting: str) -> None:
    words = "-o", setting, "--explain", "127.0.0.7", "192.0.2.1:80"
    done = running.command(*words, cwd=tmp_path)
    assert done.returncode in (0, 1) and "allowed by" in done.stdout, done


@pytest.mark.parametrize("port", ["0008443", "8443", "00000000000000000008443"])
def test_a_port_is_all_of_its_digits(closed: running.Gateway, port: str) -> None:
    answer, count = b"", len(closed.lines())
    with closed.connect() as client:
        answer = http_wire.exchange(
            client, http_wire.request(f"127.0.0.1:{port}".encode())
        ).body
    assert b"denied" in answer or b"refused" in answer
    assert closed.lines(count + 1)[count]["target"] == "http://127.0.0.1:8443/"
    assert natwork.parse_authority(f"h:{port}".encode(), 0) == ("h", 8443)


def test_explain_takes_what_a_browser_takes(
    closed: running.Gateway, capsys: pytest.CaptureFixture[str]
) -> None:
    for target, place in (
        (f"https://{OUTSIDE}/path", f"{OUTSIDE}:443"),
        (f"https://{OUTSIDE}:8443", f"{OUTSIDE}:8443"),
        (f"WSS://{OUTSIDE}/path", f"{OUTSIDE}:443"),
        (f"HTTPS://{OUTSIDE}?q=1/", f"{OUTSIDE}:443"),
        (f"http://{OUTSIDE}/", f"{OUTSIDE}:80"),
    ):
        said = explained(capsys, closed, CLIENT, target)
        assert f"target {place}\n" in said and "allowed by" in said
    assert "HOST:PORT" in explained(capsys, closed, CLIENT, OUTSIDE)


def test_explain_says_what_keeps_an_uplink_from_it(
    closed: running.Gateway, capsys: pytest.CaptureFixture[str]
) -> None:
    def said(client: str, outside: str, target: str) -> str:
        return explained(capsys, closed, client, target, "-o", f"outside={outside}")

    four, six = f"{OUTSIDE}:80", "[2001:db8::80]:80"
    assert "no uplink has an address of its family" in said(CLIENT, "192.0.2.1", six)
    assert "from nosuch0, which is not there now" in said(CLIENT, "nosuch0", four)
    assert "not there" not in said(CLIENT, "127.0.0.1", four)
    refused = "client 127.0.0.1: not inside, refused\n"
    assert said("127.0.0.1", "lo", four).startswith(refused)


def test_explain_says_that_users_are_asked_first(
    closed: running.Gateway, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file = tmp_path / "users"
    file.touch(mode=0o600)
    words = f"{OUTSIDE}:80", "-o", f"users={file}"
    assert "as no user: asked for" in explained(capsys, closed, CLIENT, *words)
    assert "as no user" not in explained(capsys, closed, CLIENT, *words, "ann")
    assert (
        natwork.command(["-o", f"users={file}", "--explain", CLIENT, "a:1", "b"]) == 1
    )
    assert "as b: refused (auth-failed), not in " in capsys.readouterr().out


def test_an_uplink_may_be_written_as_mapped() -> None:
    uplink = natwork.parse_uplink("::ffff:192.0.2.1")
    assert (uplink.name, uplink.packed) == ("192.0.2.1", natwork.pack("192.0.2.1"))


NO_ROUTES = """
import errno, os, runpy, socket, sys
class Deaf(socket.socket):
    def __init__(self, family=-1, *more, **named):
        if family == socket.AF_NETLINK:
            raise OSError(errno.EAFNOSUPPORT, os.strerror(errno.EAFNOSUPPORT))
        super().__init__(family, *more, **named)
socket.socket = Deaf
sys.argv[:2] = [sys.argv[1]]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_a_kernel_that_tells_no_routes_is_told_at_the_start(tmp_path: Path) -> None:
    # Which addresses are this box's own could not be known.
    done = subprocess.run(
        [sys.executable, "-c", NO_ROUTES, running.ROOT / "natwork.py"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert re.fullmatch("natwork: cannot ask the kernel for a route: .*\n", done.stderr)


def test_what_cannot_be_asked_of_the_routes_is_not_allowed() -> None:
    code = """
import os, resource, natwork
policy = natwork.Policy(natwork.Config())
policy.judge("127.0.0.1", "-", "h", 80, natwork.pack("192.0.2.1"))
resource.setrlimit(resource.RLIMIT_NOFILE, (3, 3))
try:
    print(policy.judge("127.0.0.1", "-", "h", 80, natwork.pack("192.0.2.2")))
except OSError as error:
    print(os.strerror(error.errno))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=running.ROOT, capture_output=True, text=True
    )
    assert done.stdout == "Too many open files\n", done
