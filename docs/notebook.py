"""The tour as a notebook: its text, and a cell for each result of its examples.

    python -m docs.notebook        # first updates the links of the pages, then writes tour.ipynb

The outputs are those in the text, which the tests compare with what the cells compute.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator
from doctest import DocTestParser
from typing import Any

from docs import links

PAGE, NOTEBOOK = links.DOCS / "tour.md", links.DOCS / "tour.ipynb"
CODE = re.compile(r"^```pycon\n(.*?)^```$", re.MULTILINE | re.DOTALL)
ABOUT = """
This notebook is made from [tour.md](tour.md) by `python -m docs.notebook`. To run it, install
Jupyter and the library: `pip install -e '.[demo]'` in the folder of the clone.
"""


def cells_of(block: str) -> Iterator[tuple[str, str]]:
    """(source, output) of an example, cut after each result."""
    source = ""
    for example in DocTestParser().get_examples(block):
        source += example.source
        if example.want:
            yield source, example.want
            source = ""
    if source:
        yield source, ""


def output_of(source: str, text: str) -> list[dict[str, Any]]:
    """What Jupyter stores for a cell that shows `text`: the value of its last line, or prints."""
    if not text:
        return []
    if isinstance(ast.parse(source).body[-1], ast.Expr):
        data = {"text/plain": text.removesuffix("\n").splitlines(keepends=True)}
        return [
            {"output_type": "execute_result", "execution_count": None, "data": data, "metadata": {}}
        ]
    lines = text.splitlines(keepends=True)
    return [{"output_type": "stream", "name": "stdout", "text": lines}]


def notebook(page: str) -> dict[str, Any]:
    """The page as a notebook of format 4.5."""
    cells: list[dict[str, Any]] = []

    def add(kind: str, text: str, **more: Any) -> None:
        lines = text.strip("\n").splitlines(keepends=True)
        cell = {"cell_type": kind, "id": f"cell-{len(cells)}", "metadata": {}, "source": lines}
        cells.append(cell | more)

    add("markdown", ABOUT)
    for i, part in enumerate(CODE.split(page)):
        if i % 2 == 0:
            if part.strip():
                add("markdown", part)
            continue
        for source, output in cells_of(part):
            add("code", source, execution_count=None, outputs=output_of(source, output))
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    metadata = {"kernelspec": kernel, "language_info": {"name": "python"}}
    return {"cells": cells, "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}


def written(page: str) -> str:
    """The notebook's file."""
    return json.dumps(notebook(page), ensure_ascii=False, indent=1) + "\n"


if __name__ == "__main__":
    links.write()
    NOTEBOOK.write_text(written(PAGE.read_text("utf-8")), "utf-8")
