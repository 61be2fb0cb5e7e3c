"""What README.md and docs/guide.md say: their sections, blocks and files."""

from __future__ import annotations

import re

import running

FILES = ("README.md", "docs/guide.md")
TEXT = "\n".join((running.ROOT / name).read_text() for name in FILES)


def section(title: str) -> str:
    """Return the section of this title, of whichever file has it."""
    found = re.split(r"^##? (.*)\n", TEXT, flags=re.M)
    parts = [text for name, text in zip(found[1::2], found[2::2]) if name == title]
    assert len(parts) == 1, (title, len(parts))
    return parts[0]


def blocks(text: str = TEXT) -> list[str]:
    """Return the blocks of code of a text, without their indentation."""
    found = re.findall(r"(?<=\n\n)(?:    .*\n(?:\n+(?=    ))?)+", "\n" + text)
    return [re.sub("^    ", "", one, flags=re.M) for one in found]


def block(title: str, begins: str) -> str:
    """Return the block of a section that begins with these words."""
    found = [one for one in blocks(section(title)) if one.startswith(begins)]
    assert len(found) == 1, (title, begins, found)
    return found[0]


def file(path: str) -> str:
    """Return the block that is to be the file of this path."""
    after = re.findall(rf"`{path}`[^`\n]*:\n\n((?:    .*\n)+)", TEXT)
    assert len(after) == 1, (path, after)
    return re.sub("^    ", "", after[0], flags=re.M)
