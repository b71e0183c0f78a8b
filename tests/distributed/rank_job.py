"""A command that test_faults.py runs on several ranks, one of which fails.

    torchrun --nproc_per_node 2 tests/distributed/rank_job.py --ckpt_dir DIR --fault kill

Writes "started" to stdout when all ranks generate.
"""

from __future__ import annotations

import os
import signal
import sys
import time

import torch

from llama import Llama
from llama.commands.script import run_script
from llama.distributed import job
from llama.engine.request import Request
from llama.engine.sampling import Sampling
from llama.layers import quantized_linear


def main(ckpt_dir: str, fault: str = "none", elsewhere: str | None = None) -> None:
    """Generate. Rank 1 fails at its tenth step or while quantizing, or reads `elsewhere`."""
    fails = not job.is_leader()
    folder = elsewhere if fails and elsewhere else ckpt_dir
    scheme = "int8" if fault == "quantize" else None
    if scheme and fails:
        setattr(quantized_linear, "quantize_int8", lambda *_: fail("memory"))  # noqa: B010 - not exported
    llama = Llama.build(folder, None, 200, 1, device="cpu", dtype=torch.float32, quantize=scheme)
    steps = 0

    def count_step() -> None:
        nonlocal steps
        steps += 1
        if steps == 3 and job.is_leader():
            sys.stdout.write("started\n")
            sys.stdout.flush()
        if steps == 10 and fails:
            fail(fault)
        time.sleep(0.02)

    original = llama.model.hidden

    def hidden(*args: object, **kwargs: object) -> torch.Tensor:
        count_step()
        out: torch.Tensor = original(*args, **kwargs)  # type: ignore[arg-type]
        return out

    llama.model.hidden = hidden  # type: ignore[method-assign]
    while fault != "none" or steps == 0:
        llama.engine.add(Request([1, 2, 3], 190, Sampling(1.0), seed=steps, reuse=False))
        while llama.engine.busy:
            llama.engine.step()


def fail(fault: str) -> None:
    """Fail in the way that `fault` names."""
    if fault == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif fault == "memory":
        raise torch.OutOfMemoryError("tried to allocate 3.00 GiB")
    elif fault == "bug":
        raise KeyError("a bug")
    elif fault == "hang":
        time.sleep(3600)
    elif fault == "exit":
        sys.exit(3)


if __name__ == "__main__":
    run_script(main, "job")
