"""extras.py: the line that a message gives installs the extra, from any folder."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from llama.common import extras

ROOT = Path(__file__).parents[2]


def test_the_line_names_the_clone_and_an_extra_that_exists() -> None:
    *_, requirement = shlex.split(extras.install_line("train"))
    assert requirement == f"{ROOT}[train]"


def test_without_a_clone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extras, "ROOT", tmp_path)
    assert extras.install_line("hf") == "pip install 'llama3[hf]'"


def test_every_extra_that_messages_and_docs_name_exists() -> None:
    text = (ROOT / "pyproject.toml").read_text("utf-8")
    known = re.findall(r"^(\w+) = \[", text.split("[project.optional-dependencies]")[1], re.M)
    pages = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *(ROOT / "llama").rglob("*.py")]
    found = []
    for page in pages:
        content = page.read_text("utf-8")
        if page.name != "CHANGELOG.md" and page.name != "extras.py":
            assert "install 'llama3[" not in content, page  # works from an index only
        found += re.findall(r"install_line\([\"'](\w+)[\"']\)|install -e '\.\[(\w+)\]'", content)
    names = {one or other for one, other in found}
    assert {"hf", "demo", "train", "chat", "bench"} <= names <= set(known)
