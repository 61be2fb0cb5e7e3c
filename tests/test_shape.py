"""The shape of natwork.py is part of its contract: keep it readable in one sitting.

Its chapters are held to what fits them too.
"""

from __future__ import annotations

import ast
import io
import re
import subprocess
import sys
import tokenize
from collections.abc import Iterator

import pytest
import readme
import running

import natwork as heart

SOURCE = (running.ROOT / "natwork.py").read_text()
LINES = SOURCE.splitlines()
TREE = ast.parse(SOURCE)
FUNCTIONS = [n for n in ast.walk(TREE) if isinstance(n, ast.FunctionDef)]
CHAPTERS = {
    path.stem: path.read_text() for path in sorted(running.ROOT.glob("natwork_*.py"))
}
BRITISH = re.compile(
    "diall|neighbour|behaviour|honour|colour|favour|labell|cancell(?!edError)|licence|centre"
    "|(?<![a-z])(?:optim|normal|serial|initial|recogn|author|organ)is(?:e|ing|ation)",
    re.IGNORECASE,
)


def names_defined(tree: ast.Module) -> Iterator[tuple[str, int]]:
    """Yield each name of a module with the line that defines it."""
    for node in tree.body:
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


def used_before(tree: ast.Module) -> list[str]:
    """Return where a module uses names that stand further down."""
    line_of = dict(names_defined(tree))
    return [
        f"line {used.lineno} uses {used.id} of line {line_of[used.id]}"
        for top in tree.body
        for used in names_used(top)
        if line_of.get(used.id, 0) > top.lineno and used.id not in stored_in(top)
    ]


def test_calls_point_up_the_file() -> None:
    assert len(dict(names_defined(TREE))) > 100 and used_before(TREE) == []


def test_importing_does_nothing() -> None:
    allowed = (
        ast.Import,
        ast.ImportFrom,
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


def test_no_function_is_over_50_lines() -> None:
    long = [f.name for f in FUNCTIONS if f.end_lineno and f.end_lineno - f.lineno > 49]
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
    # Around what a forked process does, and around what stands in a chapter.
    assert len(caught) > 20 and len(broad) == 2, broad


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
        "Scoreboard, session and log",
        "Relay",
        "Master and workers",
        "Rules",
        "Connecting",
        "HTTP messages",
        "HTTP exchanges",
        "Serving a client",
        "Service",
        "main",
    ]
    assert {len(line) for line in LINES if line.startswith("# --- ")} == {80}


def test_it_runs_as_a_program() -> None:
    assert LINES[0] == "#!/usr/bin/env python3"
    assert (running.ROOT / "natwork.py").stat().st_mode & 0o777 == 0o755
    assert LINES[-2:] == ['if __name__ == "__main__":', "    sys.exit(main())"]


# The chapters.


def test_the_heart_names_every_chapter() -> None:
    manual = ast.get_docstring(TREE) or ""
    listed = re.findall(r"^    (natwork_\w+)\.py ", manual, re.M)
    assert sorted(listed) == sorted(CHAPTERS)
    assert set(CHAPTERS) == {f"natwork_{name}" for name in heart.CHAPTERS}


def test_a_box_that_installs_it_gets_every_chapter() -> None:
    text = (running.ROOT / "pyproject.toml").read_text()
    for name in CHAPTERS:
        assert text.count(f'"{name}"') == 1 == text.count(f'"{name}.py"'), name


def test_the_heart_imports_no_chapter() -> None:
    assert not re.search(r"^\s*(?:import|from) natwork", SOURCE, re.M)


@pytest.mark.parametrize("name", CHAPTERS)
def test_a_chapter_uses_the_heart_and_no_other_chapter(name: str) -> None:
    tree, ours = ast.parse(CHAPTERS[name]), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            ours |= {n.name for n in node.names if n.name.startswith("natwork")}
        if isinstance(node, ast.ImportFrom) and node.module:
            ours |= {node.module} if node.module.startswith("natwork") else set()
    assert ours == {"natwork"}


@pytest.mark.parametrize("name", CHAPTERS)
def test_a_chapter_has_the_form_of_one(name: str) -> None:
    text = CHAPTERS[name]
    tree = ast.parse(text)
    version = heart.__version__
    assert text.count(f'\nVERSION = "{version}"\n') == 1
    what = r"(?s)[A-Z][\w, -]+, a chapter of NATWork: .*\."
    assert re.fullmatch(what, ast.get_docstring(tree) or "")
    assert used_before(tree) == []
    allowed = (
        ast.Import,
        ast.ImportFrom,
        ast.Assign,
        ast.AnnAssign,
        ast.FunctionDef,
        ast.ClassDef,
    )
    assert [ast.unparse(n) for n in tree.body[1:] if not isinstance(n, allowed)] == []
    functions = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)]
    for f in functions:
        size = (f.end_lineno or 0) - f.lineno
        told = size <= 10 or f.name == "__init__" or ast.get_docstring(f)
        assert size <= 49 and told, f.name
    top = [f for f in tree.body if isinstance(f, ast.FunctionDef)]
    joins = [f for f in top if f.name == "join" and len(f.args.args) == 1]
    assert len(joins) == (name.removeprefix("natwork_") in heart.CHAPTERS)


@pytest.mark.parametrize("name", CHAPTERS)
def test_a_chapter_is_clean(name: str) -> None:
    text = CHAPTERS[name]
    lines = text.splitlines()
    assert [line for line in lines if len(line) > 88 or line != line.rstrip()] == []
    assert text.isascii() and "\t" not in text and not BRITISH.search(text)
    assert not re.search(r"\b(TODO|FIXME|XXX|HACK)\b", text, re.IGNORECASE)
    assert not re.search(r"^\s*(import|from) (ctypes|logging|threading)\b", text, re.M)
    assert not re.search(r"^\s*(global\b|except:|except Exception\b)", text, re.M)
    assert not re.search(r"^(import|from) (json|ftplib|hashlib|daemon)\b", text, re.M)


# The sizes are part of the design: at a limit, the simpler form is found.
SIZES = {"natwork": 3856, "natwork_mapping": 407, "natwork_pages": 443}
FORBIDDEN = re.compile(
    r"^\s*(?:import|from) _(?!_future__)|\bCodeType\b|\bopmap\b|__code__|__wrapped__"
    r"|gc\.get_objects|sys\.setprofile|\b_accept\b",
    re.MULTILINE,
)


@pytest.mark.parametrize("name", ["natwork", *CHAPTERS])
def test_a_file_keeps_to_its_size(name: str) -> None:
    text = CHAPTERS.get(name, SOURCE)
    assert text.count("\n") <= SIZES.get(name, 440)
    assert not FORBIDDEN.search(text)


def test_the_readme_keeps_to_its_size_and_tells_that_of_the_heart() -> None:
    text = (running.ROOT / "README.md").read_text()
    told = re.search(r"in one file of under ([0-9,]+) lines", text)
    assert told and SOURCE.count("\n") < int(told[1].replace(",", ""))
    assert text.count("\n") <= 150
    # Tables, pictures and commands are as wide as they have to be.
    prose = re.sub(r"^(?:\||!|    ).*", "", readme.TEXT, flags=re.M)
    assert [line for line in prose.splitlines() if len(line) > 120] == []


def test_names_are_few_and_a_fifth_of_the_lines_is_prose() -> None:
    assert len(dict(names_defined(TREE))) <= 250
    told = [n for n in ast.walk(TREE) if isinstance(n, (ast.Module, ast.ClassDef))]
    strings = [n.body[0] for n in [*told, *FUNCTIONS] if ast.get_docstring(n)]
    prose = {n for s in strings for n in range(s.lineno, (s.end_lineno or 0) + 1)}
    tokens = tokenize.generate_tokens(io.StringIO(SOURCE).readline)
    prose |= {t.start[0] for t in tokens if t.type == tokenize.COMMENT}
    assert len(prose) >= 0.22 * len(LINES)


def test_a_function_is_short() -> None:
    sizes = sorted((f.end_lineno or 0) - f.lineno + 1 for f in FUNCTIONS)
    assert sizes[len(sizes) // 2] <= 10


def test_the_heart_has_few_pipes_and_few_times() -> None:
    assert SOURCE.count("os.pipe") <= 4
    limits = SOURCE.partition("# --- Limits ")[2].partition("# --- Configuration ")[0]
    assert len(re.findall(r"^[A-Z_]+ = [0-9.]+\.[0-9]+\b", limits, re.M)) <= 10


# The companion of a client: one file, complete by itself.

NATRUN = (running.ROOT / "natrun.py").read_text()
NATRUN_LIMIT = 1825  # the design asks for 950


def test_natrun_has_the_form_of_a_program() -> None:
    lines, tree = NATRUN.splitlines(), ast.parse(NATRUN)
    assert lines[0] == "#!/usr/bin/env python3"
    assert (running.ROOT / "natrun.py").stat().st_mode & 0o777 == 0o755
    assert lines[-2:] == ['if __name__ == "__main__":', "    sys.exit(main())"]
    assert NATRUN.count(f'\n__version__ = "{heart.__version__}"\n') == 1
    assert [n for n, line in enumerate(lines, 1) if len(line) > 88] == []
    assert NATRUN.isascii() and "\t" not in NATRUN and not BRITISH.search(NATRUN)
    assert not re.search(r"\b(TODO|FIXME|XXX|HACK)\b", NATRUN, re.IGNORECASE)
    assert not re.search(r"^\s*(global\b|except:)", NATRUN, re.M)
    assert not re.search(
        r"^\s*(?:import|from) (?:natwork|_(?!_future__))", NATRUN, re.M
    )
    assert used_before(tree) == []


def test_natruns_functions_are_short_and_told() -> None:
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    functions = [n for n in ast.walk(ast.parse(NATRUN)) if isinstance(n, kinds)]
    sizes = sorted((f.end_lineno or 0) - f.lineno + 1 for f in functions)
    assert sizes[len(sizes) // 2] <= 12 and sizes[-1] <= 50
    bare = [
        f.name
        for f in functions
        if f.name != "__init__"
        and (f.end_lineno or 0) - f.lineno > 10
        and not ast.get_docstring(f)
    ]
    assert not bare, bare


def test_natrun_keeps_to_its_size() -> None:
    assert NATRUN.count("\n") <= NATRUN_LIMIT


def test_natrun_is_installed() -> None:
    text = (running.ROOT / "pyproject.toml").read_text()
    assert text.count('"natrun"') == 1 == text.count('"natrun.py"')
