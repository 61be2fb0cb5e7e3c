"""The shape of natwork.py is part of its contract: keep it readable in one sitting."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator

import pytest
import running

SOURCE = (running.ROOT / "natwork.py").read_text()
LINES = SOURCE.splitlines()
TREE = ast.parse(SOURCE)
FUNCTIONS = [n for n in ast.walk(TREE) if isinstance(n, ast.FunctionDef)]
BRITISH = re.compile(
    "diall|neighbour|behaviour|honour|colour|favour|labell|cancell|licence|centre"
    "|(?<![a-z])(?:optim|normal|serial|initial|recogn|author|organ)is(?:e|ing|ation)",
    re.IGNORECASE,
)


def names_defined() -> Iterator[tuple[str, int]]:
    """Yield each name of the module with the line that defines it."""
    for node in TREE.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            yield node.name, node.lineno
        for target in node.targets if isinstance(node, ast.Assign) else ():
            yield from ((n.id, n.lineno) for n in ast.walk(target) if is_name(n))


def is_name(node: ast.AST) -> bool:
    return isinstance(node, ast.Name)


def names_used(node: ast.AST) -> Iterator[ast.Name]:
    """Yield the names that code uses; an annotation is a word, and may look ahead."""
    for field, value in ast.iter_fields(node):
        if field in ("annotation", "returns"):
            continue
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.Name) and isinstance(child.ctx, ast.Load):
                yield child
            elif isinstance(child, ast.AST):
                yield from names_used(child)


def stored_in(node: ast.stmt) -> set[str]:
    """Return the names that a definition assigns itself: its locals."""
    names = [n for n in ast.walk(node) if isinstance(n, ast.Name)]
    return {n.id for n in names if isinstance(n.ctx, ast.Store)}


def test_calls_point_up_the_file() -> None:
    line_of = dict(names_defined())
    down = [
        f"line {used.lineno} uses {used.id} of line {line_of[used.id]}"
        for top in TREE.body
        for used in names_used(top)
        if line_of.get(used.id, 0) > top.lineno and used.id not in stored_in(top)
    ]
    assert len(line_of) > 100 and not down, down


def test_importing_does_nothing() -> None:
    allowed = (
        ast.Import,
        ast.ImportFrom,
        ast.Try,  # of setproctitle
        ast.Assign,
        ast.AnnAssign,
        ast.FunctionDef,
        ast.ClassDef,
    )
    docstring, *body, last = TREE.body
    assert isinstance(docstring, ast.Expr) and isinstance(last, ast.If)
    others = [ast.unparse(n) for n in body if not isinstance(n, allowed)]
    # An older Python is told so in one line.
    assert len(others) == 1 and others[0].startswith("if sys.version_info < (3, 10):")
    code = "import natwork; print(natwork.__version__)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=running.ROOT,
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert re.fullmatch(r"[0-9.]+\n", done.stdout) and not done.stderr


def test_no_function_is_over_60_lines() -> None:
    long = [f.name for f in FUNCTIONS if f.end_lineno and f.end_lineno - f.lineno > 59]
    assert len(FUNCTIONS) > 100 and not long, long


@pytest.mark.parametrize("name", ["ctypes", "logging", "threading", "asyncio"])
def test_what_is_not_imported(name: str) -> None:
    pattern = rf"^\s*(import|from) {name}\b"
    assert "import" in SOURCE and not re.search(pattern, SOURCE, re.M)


def test_what_few_need_is_not_imported_at_the_top() -> None:
    # A fork costs what the master has resident: trap 28.
    top = {
        name.name
        for node in TREE.body
        if isinstance(node, ast.Import)
        for name in node.names
    }
    late = {"argparse", "configparser", "json", "traceback", "daemon", "subprocess"}
    late |= {"ftplib", "html", "mimetypes", "ssl"}
    assert "socket" in top and not top & late


def test_no_state_outlives_the_functions_that_own_it() -> None:
    assert [n.lineno for n in ast.walk(TREE) if isinstance(n, ast.Global)] == []


def test_an_exception_is_caught_by_its_name() -> None:
    caught = [n for n in ast.walk(TREE) if isinstance(n, ast.ExceptHandler)]
    broad = [
        handler.lineno
        for handler in caught
        if handler.type is None
        or isinstance(handler.type, ast.Name)
        and handler.type.id == "Exception"
    ]
    assert len(caught) > 20 and len(broad) == 1, broad  # in become_worker


def test_lines_are_at_most_88_wide_and_clean() -> None:
    assert [n for n, line in enumerate(LINES, 1) if len(line) > 88] == []
    assert [n for n, line in enumerate(LINES, 1) if line != line.rstrip()] == []
    assert "\t" not in SOURCE and SOURCE.isascii()


def test_nothing_is_left_to_do() -> None:
    words = re.compile(r"\b(TODO|FIXME|XXX|HACK)\b", re.IGNORECASE)
    assert [n for n, line in enumerate(LINES, 1) if words.search(line)] == []


def test_the_spelling_is_american() -> None:
    found = [f"{n}: {m[0]}" for n, line in enumerate(LINES, 1) for m in hits(line)]
    assert not found, found


def hits(line: str) -> list[re.Match[str]]:
    return list(BRITISH.finditer(line))


def test_the_docstring_is_manual_and_map() -> None:
    manual = ast.get_docstring(TREE) or ""
    first, blank, *_ = manual.splitlines()
    assert first.startswith("NATWork: ") and first.endswith(".") and not blank
    for word in ("Usage:", "Signals", "Exit codes", "Reading order", "It does not"):
        assert word in manual
    assert 40 <= len(manual.splitlines()) <= 60


def test_what_is_not_trivial_has_a_docstring() -> None:
    bare = [
        f"{f.name} (line {f.lineno})"
        for f in FUNCTIONS
        if not f.name.startswith("__")
        and (f.end_lineno or 0) - f.lineno > 10
        and not ast.get_docstring(f)
    ]
    assert not bare, bare


def test_the_sections_stand_in_their_order() -> None:
    sections = re.findall(r"^# --- (.+?) -+$", SOURCE, re.M)
    assert sections == [
        "Limits",
        "Configuration",
        "Outcomes",
        "Scoreboard and session",
        "Relay",
        "Master and workers",
        "Rules",
        "Users",
        "Connecting",
        "HTTP",
        "SOCKS",
        "Redirected flows",
        "Gateways",
        "Own pages",
        "Serving a client",
        "Service",
        "main",
    ]
    assert [len(line) for line in LINES if line.startswith("# --- ")] == [80] * 17


def test_it_runs_as_a_program() -> None:
    assert LINES[0] == "#!/usr/bin/env python3"
    assert (running.ROOT / "natwork.py").stat().st_mode & 0o777 == 0o755
    assert LINES[-2:] == ['if __name__ == "__main__":', "    sys.exit(main())"]
