"""Line numbers of the tours' links to code, found by the names that the links show.

    python -m docs.links

A link is [`Class.method`](../llama/file.py#L1-L9). Imports nothing of the package.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path

DOCS = Path(__file__).parent
PAGES = (DOCS / "tour.md", DOCS / "tour.zh.md")
LINK = re.compile(r"\[`([\w.]+)`\]\(\.\./(llama/[\w/]+\.py)#(L[\dL-]+)\)")


@cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text("utf-8"))


def find(body: Sequence[ast.stmt], name: str) -> ast.stmt | None:
    """The class, function or assignment called `name`, such as "RMSNorm.forward"."""
    first, _, rest = name.partition(".")
    for node in body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name == first:
            return find(node.body, rest) if rest else node
        targets = node.targets if isinstance(node, ast.Assign) and not rest else []
        if any(isinstance(each, ast.Name) and each.id == first for each in targets):
            return node
    return None


def lines(path: str, name: str) -> str:
    """The lines of `name` in a file of the repository, as GitHub writes them: "L120-L133".

    Raises:
        ValueError: the file has no such name.
    """
    node = find(parsed(DOCS.parent / path).body, name)
    if node is None:
        raise ValueError(f"{path} has no {name}; correct the link in docs/tour.md and tour.zh.md")
    return f"L{node.lineno}-L{node.end_lineno}"


def linked(page: str) -> str:
    """The page's text with the lines where the names are now."""
    return LINK.sub(lambda m: f"[`{m[1]}`](../{m[2]}#{lines(m[2], m[1])})", page)


def write() -> None:
    for page in PAGES:
        page.write_text(linked(page.read_text("utf-8")), "utf-8")


if __name__ == "__main__":
    write()
