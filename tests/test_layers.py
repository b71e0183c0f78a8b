"""A file imports only from the rows above it; importing the package changes nothing."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# Top to bottom; files of one row do not import each other. docs/architecture.md draws this.
ROWS = [
    {"llama.args", "llama.download", "llama.kernels", "llama.launch", "llama.progress",
     "llama.rope", "llama.sampling", "llama.splitting", "llama.tools", "llama.vocabulary"},
    {"llama.attention", "llama.damage", "llama.parallel", "llama.python_list", "llama.quantize",
     "llama.request", "llama.source", "llama.tokenizer"},
    {"llama.command_line", "llama.linears", "llama.model", "llama.shards", "llama.inspection",
     "llama.verification", "llama.tool_calls"},
    {"llama.kernel_layers"},
    {"llama.checkpoint", "llama.compilation", "llama.footprint", "llama.passes",
     "llama.quantized_shard", "llama.slots"},
    {"llama.engine"},
    {"llama.convert"},  # what the converters share
    {"llama.convert.gguf", "llama.convert.hf_config", "llama.convert.hf_tokenizer",
     "llama.convert.meta"},
    {"llama.convert.hf_export", "llama.convert.hf_vocabulary"},
    {"llama.convert.hf"},
    {"llama.formats", "llama.pieces", "llama.predictions"},
    {"llama.opening", "llama.plan", "llama.scoring"},
    {"llama.streaming"},
    {"llama.conversion", "llama.generation"},
    {"llama"},  # the public names
    {"llama.chat", "llama.checkpoint_commands", "llama.demo", "llama.train"},
    {"llama.train.data", "llama.train.learn_tokenizer", "llama.train.ranks", "llama.train.report",
     "llama.train.settings", "llama.train.signals"},
    {"llama.train.optimizer", "llama.train.state"},
    {"llama.train.loop"},
    {"llama.train.command"},
    {"llama"},
]  # fmt: skip
ROW_OF = {name: i for i, row in enumerate(ROWS) for name in row}


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


FILES = {module_name(path): path for path in sorted((ROOT / "llama").rglob("*.py"))}


def imported_modules(path: Path) -> set[str]:
    """Every module of this package that a file imports, at the top or inside a function."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import; write the whole name"
            module = node.module or ""
            names = {f"{module}.{alias.name}" for alias in node.names}
            submodules = names & set(FILES)
            found |= submodules or {module}
    return {name for name in found if name.split(".")[0] == "llama"}


def test_every_file_has_a_row() -> None:
    assert set(FILES) == set(ROW_OF)


@pytest.mark.parametrize("name", sorted(FILES))
def test_imports_only_from_rows_above(name: str) -> None:
    for other in imported_modules(FILES[name]):
        assert ROW_OF[other] < ROW_OF[name], f"{name} may not import {other}"


def test_importing_changes_nothing() -> None:
    code = """
import os, sys, warnings, torch, numpy
import fairscale.nn.model_parallel, tiktoken  # what the packages themselves do is not ours
before = (dict(os.environ), torch.get_default_dtype(), torch.get_default_device(),
          torch.initial_seed(), torch.get_rng_state().tolist(), torch.get_num_threads(),
          torch.is_grad_enabled(), sys.stdout, sys.stderr, list(sys.path), list(warnings.filters))
import llama, llama.model, llama.generation, llama.tokenizer
after = (dict(os.environ), torch.get_default_dtype(), torch.get_default_device(),
         torch.initial_seed(), torch.get_rng_state().tolist(), torch.get_num_threads(),
         torch.is_grad_enabled(), sys.stdout, sys.stderr, list(sys.path), list(warnings.filters))
assert before == after
assert not torch.distributed.is_initialized() and not torch.cuda.is_initialized()
assert not {"gguf", "fire", "transformers"} & set(sys.modules), "heavy imports"
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""


def test_budgets() -> None:
    """A file under 300 lines, a function under 50."""
    for path in FILES.values():
        text = path.read_text(encoding="utf-8")
        assert text.count("\n") <= 300, path
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                lines = (node.end_lineno or 0) - node.lineno + 1
                assert lines <= 50, f"{path}: {node.name} has {lines} lines"
