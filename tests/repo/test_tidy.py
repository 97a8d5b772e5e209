"""The shape of the code is itself under test, as in tigerbeetle's tidy and tinygrad's count."""

import ast
import io
import re
import subprocess
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MAX_FILE = 400
MAX_FUNCTION = 70
# A package's ceiling is a question, not a quota: raise it in a commit that says what it buys.
CEILINGS = {"operator": 2200, "server": 12400, "kernels": 3700, "e2e": 5200, "tools": 680}


def tracked(*patterns: str) -> list[Path]:
    """Files under version control or about to be."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", *patterns],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    return [ROOT / line for line in listed.stdout.splitlines() if (ROOT / line).is_file()]


SOURCES = [p for p in tracked("*.py") if "tests" not in p.relative_to(ROOT).parts]


def code_lines(source: str) -> set[int]:
    """Lines that carry a token other than a comment, a docstring or layout."""
    docstrings: set[int] = set()
    for node in ast.walk(ast.parse(source)):
        body = getattr(node, "body", None)
        if isinstance(body, list) and body and isinstance(body[0], ast.Expr):
            value = body[0].value
            if isinstance(value, ast.Constant) and isinstance(value.value, str):
                docstrings.update(range(value.lineno, (value.end_lineno or value.lineno) + 1))
    layout = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT}
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in layout and token.type != tokenize.ENDMARKER:
            lines.update(range(token.start[0], token.end[0] + 1))
    return lines - docstrings


def test_sources_are_found() -> None:
    assert len(SOURCES) > 20


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_and_functions_can_be_held_in_the_head(path: Path) -> None:
    source = path.read_text()
    lines = code_lines(source)
    assert len(lines) <= MAX_FILE, f"{len(lines)} code lines: two rooms in one?"
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            size = len(lines & set(range(node.lineno, (node.end_lineno or node.lineno) + 1)))
            assert size <= MAX_FUNCTION, f"{node.name} has {size} code lines"


@pytest.mark.parametrize("package", sorted(CEILINGS))
def test_packages_stay_under_their_ceiling(package: str) -> None:
    total = sum(
        len(code_lines(p.read_text())) for p in SOURCES if p.relative_to(ROOT).parts[0] == package
    )
    assert total <= CEILINGS[package], f"{package}/ has {total} code lines"


def test_no_init_that_shadows_the_standard_library() -> None:
    for folder in ("operator", "server", "kernels", "tests", "tests/operator"):
        assert not (ROOT / folder / "__init__.py").exists()


def test_names_say_what_a_file_is_for() -> None:
    vague = {"utils", "util", "helpers", "helper", "common", "misc"}
    assert [p for p in SOURCES if p.stem in vague] == []


def test_no_unfinished_marks() -> None:
    mark = re.compile(r"\b(TODO|FIXME|XXX|HACK)\b")
    found = [
        f"{p.relative_to(ROOT)}:{n}"
        for p in tracked("*.py", "*.cpp", "*.h", "*.yaml", "*.md", "Dockerfile", "Makefile")
        if p != Path(__file__).resolve()
        for n, line in enumerate(p.read_text().splitlines(), 1)
        if mark.search(line)
    ]
    assert found == []


def test_every_source_file_is_on_the_map() -> None:
    """ARCHITECTURE.md names each file of the three packages, so that a newcomer finds his way."""
    text = (ROOT / "ARCHITECTURE.md").read_text()
    packages = ("operator/octavo_operator", "server/octavo", "kernels")
    missing = [
        str(p.relative_to(ROOT))
        for p in tracked("*.py", "*.cpp")
        if str(p.relative_to(ROOT)).startswith(packages)
        and p.name not in {"__init__.py", "__main__.py"}
        and f"`{p.name}`" not in text
    ]
    assert missing == []


def test_documents_name_only_what_exists() -> None:
    names = {p.name for p in tracked()}
    paths = {str(p.relative_to(ROOT)) for p in tracked()}
    targets = set(re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for document in [*tracked("*.md"), *tracked("docs/*.md")]:
        text = document.read_text()
        for verb in re.findall(r"\bmake ([a-z][a-z0-9-]*)`", text):
            assert verb in targets, f"{document.name}: make {verb}"
        for name in re.findall(r"`([A-Za-z0-9_./-]+\.(?:py|cpp|h|yaml|md|json))`", text):
            known = name in paths or Path(name).name in names or name.startswith("/")
            assert known, f"{document.relative_to(ROOT)}: {name}"
