"""What the documentation names exists: tests, files, sections, verbs, modules, and its drawing."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from docs import list_fields
from docs.draw_architecture import PAGE, drawn
from tests.test_layers import PUBLIC, ROOT, own

PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
TEXT = {path: path.read_text("utf-8") for path in PAGES}
CODE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
every_page = pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)


def anchor(heading: str) -> str:
    """A heading's address, as GitHub makes it."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def test_the_drawing_is_that_of_the_table() -> None:
    page = PAGE.read_text("utf-8")
    assert page == drawn(page), "run: python docs/draw_architecture.py"


def test_the_tables_of_fields_are_those_of_the_server() -> None:
    page = list_fields.PAGE.read_text("utf-8")
    assert page == list_fields.written(page), "run: python docs/list_fields.py"


@every_page
def test_links_lead_somewhere(path: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", CODE.sub("", TEXT[path])):
        if "://" in link:
            continue
        name, _, section = link.partition("#")
        target = (path.parent / name).resolve() if name else path
        assert target.exists(), link
        if section and target.suffix == ".md":  # lines of code: tests/test_tour.py
            headings = re.findall(r"^#+ (.*)$", CODE.sub("", TEXT[target]), re.MULTILINE)
            assert section in map(anchor, headings), link


def test_parity_names_tests_that_exist() -> None:
    text = TEXT[ROOT / "docs" / "parity.md"]
    sources = "".join(path.read_text("utf-8") for path in (ROOT / "tests").rglob("*.py"))
    tests = re.findall(r"^def (test_\w+)", sources, re.MULTILINE)
    for name in re.findall(r"`(test_\w+)`", text):
        assert name in tests, name
    paths = re.findall(r"`(tests/[\w/*]+\.py)`", text)
    assert paths
    for pattern in paths:
        assert list(ROOT.glob(pattern)), pattern


@every_page
def test_python_code_imports_public_modules_only(path: Path) -> None:
    for block in re.findall(r"^```python\n(.*?)^```$", TEXT[path], re.MULTILINE | re.DOTALL):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom):
                assert own([node.module or ""]) <= PUBLIC, node.module
            if isinstance(node, ast.Import):
                assert own(alias.name for alias in node.names) <= PUBLIC


def test_readme_stays_short() -> None:
    lines = TEXT[ROOT / "README.md"].splitlines()
    assert len(lines) <= 150
    assert all(len(line) <= 100 for line in lines if not line.startswith("|"))
