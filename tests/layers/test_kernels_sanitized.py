"""The CPU kernels, compiled with the sanitizers of undefined behaviour and of addresses."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from llama.layers.kernels.library import HERE

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_kernels_without_undefined_behaviour(tmp_path: Path) -> None:
    if shutil.which("g++") is None:
        pytest.skip("no g++")
    environment = os.environ | {
        "CXX": "g++ -fsanitize=undefined -fno-sanitize-recover=undefined",
        "TORCH_EXTENSIONS_DIR": str(tmp_path),
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }
    names = ("kernels", "integer_kernels", "kernel_attention", "fused_layers", "blocks")
    tests = [f"tests/layers/test_{name}.py" for name in names]
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-s", "-p", "no:cacheprovider", *tests]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    report = done.stdout[-3000:] + done.stderr[-3000:]
    assert done.returncode == 0 and "runtime error" not in report, report
    assert list(tmp_path.glob("llama3_kernels_*.so")), "the kernels were not compiled"


@pytest.mark.slow
def test_integer_products_without_wrong_addresses(ops: object, tmp_path: Path) -> None:
    """In both widths of vectors; see integer_rows.cpp."""
    if shutil.which("g++") is None or "avx512-vnni" not in torch.ops.llama3.variants():
        pytest.skip("no g++, or no AVX512_VNNI")
    torch_dir, program = Path(torch.__file__).parent, tmp_path / "check"
    source = Path(__file__).with_name("integer_rows.cpp")
    flags = ["-O1", "-g", "-std=c++20", "-w", "-fsanitize=address,undefined"]
    flags += ["-fno-sanitize-recover=undefined", f"-I{torch_dir / 'include'}", f"-I{HERE}"]
    subprocess.run(["g++", *flags, str(source), "-o", str(program)], check=True, timeout=300)
    done = subprocess.run([program], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "all equal" in done.stdout, done.stdout + done.stderr[-3000:]
