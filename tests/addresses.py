"""Addresses that natwork.py reaches for nobody, and the box's own ones."""

from __future__ import annotations

import contextlib
import socket

# A name of 127.0.0.1 and of no other address; many boxes call ::1 localhost, too.
PLACES = {info[4][0] for info in socket.getaddrinfo("localhost", 1)}
LOCALHOST = ["localhost"] * ({"127.0.0.1"} == PLACES)

# By the word of their denial, as a client may write them.
CLOSED = {
    "loopback": """
        127.0.0.1 127.0.0.3 127.255.255.254 localhost LocalHost [::1]
        [0:0:0:0:0:0:0:1] [::ffff:127.0.0.1] [::FFFF:7F00:1] [::127.0.0.1] [::7f00:1]
        [2002:7f00:1::] [2002:7f00:0001:0:0:0:0:1] [64:ff9b::7f00:1]
        [64:ff9b::127.0.0.1] [64:ff9b:1::7f00:1] [2001:0:c000:201::80ff:fffe]
        [2001::7f00:1:0:0:0:0]
        """,
    "unspecified": "0.0.0.0 0.1.2.3 [::] [0:0:0:0:0:0:0:0] [::ffff:0.0.0.0]",
    "link-local": """
        169.254.169.254 [fe80::1] [febf::1] [::ffff:169.254.169.254]
        [64:ff9b::a9fe:a9fe] [2002:a9fe:a9fe::]
        """,
    "multicast": """
        224.0.0.1 239.255.255.250 240.0.0.1 255.255.255.255 [ff02::1] [ff0e::1]
        [::ffff:224.0.0.1] [64:ff9b::e000:1]
        """,
    "inside": """
        10.1.2.3 172.16.0.1 192.168.255.255 [fd00::1] [::ffff:10.1.2.3]
        [64:ff9b::10.1.2.3] [2002:a01:203::]
        """,
}
TARGETS = [(word, target) for word in CLOSED for target in CLOSED[word].split()]


def here(family: int, address: str) -> str:
    """Return the source address that the box would use to an address, "" for none."""
    with socket.socket(family, socket.SOCK_DGRAM) as sock:
        with contextlib.suppress(OSError):
            sock.connect((address, 53))  # no packet is sent
            return str(sock.getsockname()[0])
    return ""
