"""Processes forked from one that has built a model: refused with a remedy, which works."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CODE = """
import os, sys, torch
from llama import Llama, ModelArgs, Transformer
from llama.engine.engine import Engine
from llama.engine.request import Request
from llama.engine.sampling import Sampling

def make():
    torch.manual_seed(0)
    args = ModelArgs(dim=512, n_layers=2, n_heads=8, vocab_size=900, max_seq_len=64)
    return Engine(Transformer(args).eval())

def ids(engine):
    [generation] = engine.run([Request([1, 2, 3] * 9, 4, Sampling(temperature=0))])
    if generation.error is not None:
        raise generation.error
    return generation.ids

def in_child(work):
    read, write = os.pipe()
    if (pid := os.fork()) == 0:
        try:
            result = str(work())
        except BaseException as e:
            result = f"{type(e).__name__}: {e}"
        os.write(write, result.encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as f:
        result = f.read()
    os.waitpid(pid, 0)
    return result

torch.set_num_threads(2)
"""


def run(code: str) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", CODE + code],
        env={**os.environ, "PYTHONPATH": str(ROOT), "LLAMA3_KERNELS": "0"},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_process_says_what_to_do() -> None:
    """Without the check each of these but the last waited for ever."""
    used, build, one, parent = run(
        "engine = make(); want = ids(engine)\n"
        "print(in_child(lambda: ids(engine)))\n"
        "print(in_child(lambda: Llama.build('here', None, 9, 1, device='cpu')))\n"
        "print(in_child(lambda: (torch.set_num_threads(1), ids(engine) == want)))\n"
        "print(ids(engine) == want)\n"
    )
    for message in (used, build):
        assert message.startswith("RuntimeError: this process was forked")
        assert "get_context('spawn')" in message and "set_num_threads(1)" in message
    assert one == "(None, True)" and parent == "True"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_model_of_the_forked_process_alone_runs() -> None:
    assert len(eval(run("print(in_child(lambda: ids(make())))")[0])) == 4
