"""What the README says."""

from __future__ import annotations

import re

import running

TEXT = (running.ROOT / "README.md").read_text()


def section(title: str) -> str:
    """Return a section of the README."""
    return TEXT.partition(f"\n## {title}\n")[2].partition("\n## ")[0]


def block(title: str, begins: str) -> str:
    """Return the block of code of a section that begins with these words."""
    blocks = re.findall(r"(?:^(?:    .*)?\n)+", section(title), re.M)
    found = [b for b in blocks if b.strip().startswith(begins)]
    assert len(found) == 1, (title, begins, blocks)
    return re.sub("^    ", "", found[0].strip("\n"), flags=re.M) + "\n"
