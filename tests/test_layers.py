"""Who imports whom, how long files are, and that importing the package changes nothing."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

from docs.draw_architecture import FILES, ROOMS, allowed, room_of

ROOT = Path(__file__).parent.parent
PUBLIC = {"llama", "llama.model", "llama.generation", "llama.tokenizer", "llama.train"}
PUBLIC |= {"llama.evaluation"}


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_name(path): path for path in sorted((ROOT / "llama").rglob("*.py"))}


def imports(path: Path) -> set[str]:
    """Every module that a file imports, at the top, inside a function or for its types."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import; write the whole name"
            module = node.module or ""
            names = {f"{module}.{alias.name}" for alias in node.names}
            found |= names & set(MODULES) or {module}
    return found


def own(modules: Iterable[str]) -> set[str]:
    """Those of this package."""
    return {name for name in modules if name.split(".")[0] == "llama"}


IMPORTS = {name: own(imports(path)) for name, path in MODULES.items()}


def test_every_module_belongs_to_a_room() -> None:
    assert {room_of(name) for name in MODULES} == set(ROOMS)


@pytest.mark.parametrize("name", sorted(MODULES))
def test_imports_stay_within_the_rooms_below(name: str) -> None:
    for other in IMPORTS[name]:
        assert room_of(other) in allowed(room_of(name)), f"{name} may not import {other}"


def test_rooms_are_layers() -> None:
    """No two rooms import each other, and these pairs know nothing of each other."""
    for name in ROOMS:
        assert all(name not in allowed(other) for other in allowed(name) - {name}), name
        assert "common" in allowed(name)
    for one, other in [("engine", "checkpoints"), ("engine", "text"), ("model", "tokenizer")]:
        assert one not in allowed(other) and other not in allowed(one)


def test_modules_do_not_import_each_other_in_a_circle() -> None:
    circles = [group for group in strongly_connected(IMPORTS) if len(group) > 1]
    assert circles == []


def strongly_connected(graph: dict[str, set[str]]) -> Iterator[set[str]]:
    """Groups of modules that reach each other."""
    reached = {name: reachable(graph, name) for name in graph}
    left = set(graph)
    while left:
        name = min(left)
        group = {other for other in reached[name] if name in reached[other]} | {name}
        left -= group
        yield group


def reachable(graph: dict[str, set[str]], start: str) -> set[str]:
    found: set[str] = set()
    waiting = [start]
    while waiting:
        new = graph[waiting.pop()] - found
        found |= new
        waiting += new
    return found


def test_strongly_connected() -> None:
    graph = {"a": {"b"}, "b": {"c"}, "c": {"b", "d"}, "d": set()}
    assert list(strongly_connected(graph)) == [{"a"}, {"b", "c"}, {"d"}]


def test_model_imports_torch_and_distributed_only() -> None:
    found = {name.split(".")[0] for name in imports(MODULES["llama.model"])}
    assert found - set(sys.stdlib_module_names) == {"torch", "llama"}
    assert {room_of(name) for name in IMPORTS["llama.model"]} == {"distributed"}


def test_tests_mirror_the_rooms() -> None:
    folders = {path.parent.name for path in (ROOT / "tests").glob("*/test_*.py")}
    assert folders == set(ROOMS) - set(FILES) - {"llama"} | {"benchmarks", "cuda", "fuzz"}
    for name in FILES:
        assert (ROOT / "tests" / f"test_{name}.py").is_file()


@pytest.mark.parametrize("path", sorted(ROOT.glob("example_*.py")), ids=lambda path: path.stem)
def test_examples_import_public_modules_only(path: Path) -> None:
    assert own(imports(path)) <= PUBLIC


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
assert not {"gguf", "fire", "transformers", "lm_eval"} & set(sys.modules), "heavy imports"
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""


@pytest.mark.parametrize("name", sorted(MODULES))
def test_budgets(name: str) -> None:
    """A file under 300 lines, a function under 50. The model and `Llama` are one thing each."""
    text = MODULES[name].read_text(encoding="utf-8")
    if name not in ("llama.model", "llama.generation"):
        assert text.count("\n") <= 300
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            lines = (node.end_lineno or 0) - node.lineno + 1
            assert lines <= 50, f"{node.name} has {lines} lines"
