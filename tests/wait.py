"""Waiting for what happens soon, instead of sleeping for as long as it may take."""

from __future__ import annotations

import time
from collections.abc import Callable


def until(check: Callable[[], object], seconds: float = 10.0) -> object:
    """Return the first true answer of check(), asked again until a deadline."""
    deadline = time.monotonic() + seconds
    while not (answer := check()):
        assert time.monotonic() < deadline, f"not within {seconds} s: {check}"
        time.sleep(0.01)
    return answer


def at_rest(read: Callable[[], int], seconds: float = 0.3) -> int:
    """Return a number once it has stayed the same for some time."""
    seen, since = read(), time.monotonic()

    def check() -> bool:
        nonlocal seen, since
        if (now := read()) != seen:
            seen, since = now, time.monotonic()
        return time.monotonic() - since > seconds

    until(check, 20)
    return seen
