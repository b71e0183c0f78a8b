"""The tour's notebook is the page, and its cells compute the outputs that it stores.

The cells run here in a plain process, one after the other: they use nothing of IPython, so a kernel
(ipykernel, pyzmq, and a socket between two processes) would test Jupyter and not the notebook.
"""

from __future__ import annotations

import ast
import contextlib
import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from docs import notebook
from tests.test_layers import ROOT


def run(path: Path) -> int:
    """Run the code cells in one namespace and compare what they show; the number of cells."""
    names: dict[str, Any] = {}
    cells = [c for c in json.loads(path.read_text("utf-8"))["cells"] if c["cell_type"] == "code"]
    for cell in cells:
        source = "".join(cell["source"])
        body = ast.parse(source).body
        last = body.pop() if isinstance(body[-1], ast.Expr) else None
        shown = io.StringIO()
        with contextlib.redirect_stdout(shown):
            exec(compile(ast.Module(body, []), "cell", "exec"), names)
            if isinstance(last, ast.Expr):
                value = eval(compile(ast.Expression(last.value), "cell", "eval"), names)
                shown.write(repr(value))
        stored = [o["data"]["text/plain"] if "data" in o else o["text"] for o in cell["outputs"]]
        text = "".join(line for lines in stored for line in lines)
        assert shown.getvalue() == text, f"{source}\nshows {shown.getvalue()!r}, not {text!r}"
    return len(cells)


def test_notebook_is_up_to_date() -> None:
    page = notebook.PAGE.read_text("utf-8")
    stored = notebook.NOTEBOOK.read_text("utf-8")
    assert stored == notebook.written(page), "run: python -m docs.notebook"


def test_notebook_keeps_the_text() -> None:
    """Its cells in order are the page without the marks of code and outputs."""
    cells = notebook.notebook("a\n\n```pycon\n>>> x = 1\n>>> x\n1\n>>> x + 1\n2\n```\n\nb\n")[
        "cells"
    ]
    assert ["".join(cell["source"]) for cell in cells[1:]] == ["a", "x = 1\nx", "x + 1", "b"]
    assert cells[2]["outputs"][0]["data"] == {"text/plain": ["1"]}


def test_notebook_runs(demo_dir: Path) -> None:
    code = "from tests.test_tour_notebook import run, notebook; print(run(notebook.NOTEBOOK))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 30
