"""What `llama3 complete` does before its first character, as far as no time is needed to tell."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
# Modules that a completion of an official checkpoint does not need, and that take time to import.
UNNEEDED = (
    "fairscale", "gguf", "huggingface_hub", "jinja2", "lm_eval", "matplotlib", "peft",
    "prompt_toolkit", "safetensors", "sympy", "tokenizers", "torch._dynamo", "torch._inductor",
    "transformers", "llama.checkpoints.adapter", "llama.checkpoints.formats.gguf",
    "llama.checkpoints.formats.hf", "llama.checkpoints.formats.peft", "llama.server", "llama.train",
)  # fmt: skip
# Calls the console script; then prints what is imported and the state of the garbage collector.
SCRIPT = """
import atexit, gc, json, sys
sys.argv = ["llama3", *sys.argv[1:]]
atexit.register(lambda: print(json.dumps(
    {"modules": sorted(sys.modules), "enabled": gc.isenabled(), "frozen": gc.get_freeze_count()})))
from llama.commands.main import main
main()
"""


def test_a_completion_imports_and_looks_through_no_more_than_it_needs(
    folder: Path, byte_tokenizer_path: Path
) -> None:
    flags = ["-m", str(folder), "--tokenizer_path", str(byte_tokenizer_path), "-n", "2"]
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, "complete", "Hi", *flags],
        capture_output=True, text=True, cwd=ROOT, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    state = json.loads(done.stdout.splitlines()[-1])
    assert not set(UNNEEDED) & set(state["modules"])
    assert {"torch", "llama.generation"} <= set(state["modules"])
    assert state["enabled"]
    assert state["frozen"] > 100_000  # the objects of torch's modules
