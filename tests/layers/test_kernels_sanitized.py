"""The tests of the CPU kernels again, compiled with the sanitizer of undefined behaviour."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

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
    tests = "tests/layers/test_kernels.py"
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-s", "-p", "no:cacheprovider", tests]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    report = done.stdout[-3000:] + done.stderr[-3000:]
    assert done.returncode == 0 and "runtime error" not in report, report
    assert list(tmp_path.glob("llama3_kernels_*.so")), "the kernels were not compiled"
