"""The fixtures of all tests: natwork.py, and servers for it to connect to."""

from __future__ import annotations

import sys
from collections.abc import Callable
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import origins
import pytest
import running

sys.path.insert(0, str(running.ROOT))  # tests import natwork, of this folder


def starting(folder: Path, start: running.Start) -> Iterator[running.Start]:
    """Yield a function that starts gateways, each in a folder of its own; stop them."""
    started: list[running.Gateway] = []

    def one(*options: str, **how: Any) -> running.Gateway:
        own = folder / f"gateway{len(started)}"
        own.mkdir()
        started.append(start(own, *options, **how))
        return started[-1]

    yield one
    for gateway in started:
        gateway.stop()


@pytest.fixture
def natwork(tmp_path: Path) -> Iterator[running.Start]:
    """Return a function that starts a gateway: natwork("spare_workers=2", ...)."""
    folder = tmp_path / "activated"
    folder.mkdir()
    yield from starting(folder, running.Gateway.activated)


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[running.Start]:
    """Return a function that starts a gateway with a file: daemon(rules="", ...)."""
    folder = tmp_path / "configured"
    folder.mkdir()
    yield from starting(folder, running.Gateway.configured)


@pytest.fixture
def origin() -> Iterator[origins.Start]:
    """Return a function that starts an Origin: origin(handle, "127.0.0.3")."""
    started: list[origins.Origin] = []

    def start(handle: Callable[..., None], host: str = "127.0.0.1") -> origins.Origin:
        started.append(origins.Origin(handle, host))
        return started[-1]

    yield start
    for one in started:
        one.close()
