"""What a test needs of the machine that it runs on, and is skipped without."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import NoReturn

import pytest

root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")


def unavailable(why: str) -> NoReturn:
    """Skip the test; in CI, where everything must be there, fail it."""
    if os.environ.get("CI") == "true":
        pytest.fail(why)
    pytest.skip(why)


def programs(*names: str) -> None:
    """Skip the test if a program is missing here."""
    missing = [name for name in names if not shutil.which(name)]
    if missing:
        unavailable("not installed: " + ", ".join(missing))


def has_ipv6() -> bool:
    path = Path("/proc/net/if_inet6")
    return path.exists() and f"{1:032x}" in path.read_text()


ipv6 = pytest.mark.skipif(not has_ipv6(), reason="this box has no ::1")
