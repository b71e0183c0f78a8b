"""The CPU kernels: compiling, loading, messages, and what only a process of its own can test."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from llama.layers import kernels

ROOT = Path(__file__).parents[2]


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
    )


LOAD = """
import logging; logging.basicConfig(level=logging.INFO)
import torch; from llama.layers import kernels
print(kernels.load(), kernels.load(), kernels.linear(torch.ones(1, 8), torch.ones(2, 8)).tolist())
"""


@pytest.fixture
def not_loaded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty folder for compiled kernels; the next `load` starts from the beginning."""
    monkeypatch.setattr(kernels, "_loaded", None)
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize(
    "environment, reason",
    [
        ({"CXX": "false"}, "false failed: no error message; install g++, or set CXX"),
        ({"CXX": "no-such-compiler"}, "no C++ compiler 'no-such-compiler'; install g++ or set CXX"),
        ({"PATH": "", "CXX": ""}, "no C++ compiler 'g++'; install g++ or set CXX"),
        ({"LLAMA3_KERNELS": "0"}, "LLAMA3_KERNELS=0"),
    ],
)
def test_without_kernels_it_says_why_and_uses_torch(
    not_loaded: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    environment: dict[str, str],
    reason: str,
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with caplog.at_level("INFO", logger="llama"):
        assert not kernels.load() and not kernels.load()
    assert caplog.text.count(reason) == 1
    assert kernels.linear(torch.ones(1, 8), torch.ones(2, 8)).tolist() == [[8.0, 8.0]]
    assert [path.name for path in not_loaded.iterdir()] in ([], ["llama3_kernels_lock"])


def test_a_folder_that_is_not_writable(
    not_loaded: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (not_loaded / "file").touch()
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(not_loaded / "file" / "below"))
    monkeypatch.setenv("CXX", "true")  # a compiler that exists; it must not be run
    with caplog.at_level("INFO", logger="llama"):
        assert not kernels.load()
    assert "below ([Errno 20]" in caplog.text and "set TORCH_EXTENSIONS_DIR" in caplog.text
    assert "compiling" not in caplog.text


def test_messages_are_one_warning_and_can_be_silenced(tmp_path: Path) -> None:
    """Without logging configured, stderr gets the reason; with logger "llama" silenced, nothing."""
    code = """
import logging, sys; from llama.layers import kernels
print(kernels.load(), kernels.load())
print("silenced", file=sys.stderr)
logging.getLogger("llama").setLevel(logging.ERROR)
kernels._loaded = None
print(kernels.load())
"""
    done = run(code, TORCH_EXTENSIONS_DIR=str(tmp_path), CXX="false")
    assert done.stdout == "False False\nFalse\n"
    warning, silenced = done.stderr.splitlines()
    assert warning.startswith("no CPU kernels, using torch's own operators: false failed")
    assert silenced == "silenced"


@pytest.mark.slow
def test_two_processes_at_once(ops: object, tmp_path: Path) -> None:
    """One compiles, both load; one library remains, and a third process compiles nothing."""
    start = [sys.executable, "-c", LOAD]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "TORCH_EXTENSIONS_DIR": str(tmp_path)}
    both = [subprocess.Popen(start, env=env, stdout=-1, stderr=-1, text=True) for _ in range(2)]
    messages = ""
    for process in both:
        out, err = process.communicate()
        assert out.startswith("True True"), err
        messages += err
    assert messages.count("compiling CPU kernels") == 1
    assert len(list(tmp_path.glob("*.so"))) == 1 and len(list(tmp_path.iterdir())) == 3
    again = run(LOAD, TORCH_EXTENSIONS_DIR=str(tmp_path))
    assert again.stdout.startswith("True True") and again.stderr == ""


def test_nothing_is_read_beyond_the_end(ops: object) -> None:
    """x and weights that end before a protected page; reading it would kill the process."""
    code = """
import ctypes, mmap, os, sys, torch
from llama.layers import kernels
from llama.layers.quantization import quantize_int4, quantize_int8
PAGE, kept = mmap.PAGESIZE, []
def guarded(t):
    pages = mmap.mmap(-1, (-(-t.nbytes // PAGE) + 1) * PAGE)
    kept.append(pages)
    end = len(pages) - PAGE
    address = ctypes.addressof(ctypes.c_char.from_buffer(pages)) + end
    assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(address), PAGE, 0) == 0
    copy = torch.frombuffer(pages, dtype=t.dtype, count=t.numel(), offset=end - t.nbytes)
    return copy.view(t.shape).copy_(t)
kernels.load()
ops = torch.ops.llama3
for variant in ops.variants():
    ops.use_variant(variant)
    for M, N, K in [(1, 1, 1), (3, 5, 31), (5, 6, 33), (13, 97, 64), (18, 18, 2080), (40, 7, 95)]:
        for dtype in (torch.float32, torch.bfloat16):
            print(variant, M, N, K, dtype)
            w = torch.randn(N, K)
            x = guarded(torch.randn(M, K).to(dtype))
            ops.linear(x, guarded(w.to(dtype)))
            ops.linear_int8(x, *map(guarded, quantize_int8(w)))
            if K % 32 == 0:
                weights = [guarded(t) for t in quantize_int4(w)]
                ops.linear_int4(x, *weights, N)
                ops.unpack_int4(x, *weights, N)
print("done", flush=True)
os._exit(0)
"""
    done = run(code)
    assert done.stdout.endswith("done\n"), (done.returncode, done.stdout[-200:], done.stderr[-500:])


def test_inductor_compiles_them(ops: object) -> None:
    """In a process of its own: inductor must be the first to import distutils."""
    code = """
import torch
from llama.layers import kernels
from llama.layers.quantization import linear_int8, quantize_int8
kernels.load()
w, x = torch.randn(24, 64), torch.randn(1, 64)
q, scale = quantize_int8(w)
def step(x):
    return torch.nn.functional.silu(kernels.linear(x, w)) * linear_int8(x, q, scale)
with torch.inference_mode():
    torch.testing.assert_close(torch.compile(step, fullgraph=True)(x), step(x))
print("same")
"""
    done = run(code)
    assert done.stdout.strip() == "same", done.stderr[-2000:]
