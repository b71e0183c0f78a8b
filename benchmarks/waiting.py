"""Decoding and training under each way in which OpenMP's threads can wait, idle and loaded.

    python -m benchmarks.waiting --out waiting.json

Between two parallel regions the threads of libgomp spin for a while and then sleep. How long they
spin is read from the environment when torch is imported, so each figure is measured in a process
of its own. "Loaded" is beside one busy loop on each core. Prints a table and one JSON line, which
--out saves.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks.flags import check_counts, check_file
from benchmarks.report import Figure, finish, make_result
from benchmarks.script import run_benchmark

NAMES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "OMP_NUM_THREADS")
POLICIES: dict[str, dict[str, str]] = {
    "unset": {},
    "OMP_WAIT_POLICY=passive": {"OMP_WAIT_POLICY": "passive"},
    **{f"GOMP_SPINCOUNT={n}": {"GOMP_SPINCOUNT": n} for n in ("0", "1000", "3000", "10000")},
}
WORK = ("decode", "train")


def measure(work: str, seconds: float) -> None:
    """Print the tokens per second of `work`, after a start that does not count."""
    rounds = decoded_tokens() if work == "decode" else trained_tokens()
    next(rounds)
    tokens, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        tokens += next(rounds)
    print(json.dumps(tokens / (time.perf_counter() - start)))


def decoded_tokens() -> Iterator[int]:
    """Tokens of each step of the demo model."""
    from llama import Llama, ensure_demo_model

    llama = Llama.build(ensure_demo_model(), None, 256, 1, speculate=False)
    while True:
        for piece in llama.text_stream("Once upon a time", max_gen_len=200, temperature=0):
            yield len(piece.tokens)


def trained_tokens() -> Iterator[int]:
    """Tokens of each update of the model that `llama3 train` makes by default."""
    import torch

    from llama.model import Transformer
    from llama.train.objective import Objective
    from llama.train.optimizer import initialize, make_optimizer, parameter_groups
    from llama.train.settings import Settings

    settings = Settings()
    objective = Objective(Transformer(settings.model_args(68)))
    initialize(objective.model, settings.seed)
    optimizer = make_optimizer(parameter_groups(objective, settings), settings)
    ids = torch.randint(0, 68, (settings.batch_size, settings.max_seq_len + 1))
    while True:
        torch.autograd.backward(objective(ids[:, :-1], ids[:, 1:]))
        optimizer.step()
        optimizer.zero_grad()
        yield settings.batch_size * settings.max_seq_len


def in_a_process(work: str, seconds: float, policy: dict[str, str]) -> float:
    """What `measure` prints in a new process under a policy.

    Raises:
        RuntimeError: the process failed.
    """
    kept = {name: value for name, value in os.environ.items() if name not in NAMES}
    code = f"from benchmarks.waiting import measure; measure({work!r}, {seconds})"
    command = [sys.executable, "-c", code]
    root = Path(__file__).resolve().parents[1]
    done = subprocess.run(command, env=kept | policy, cwd=root, stdout=subprocess.PIPE, check=False)
    if done.returncode:
        raise RuntimeError(f"{work} failed under {policy}; its reason is above")
    return float(json.loads(done.stdout))


@contextmanager
def busy_loops(count: int) -> Iterator[None]:
    """A block beside `count` processes that compute without a pause."""
    loops = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()


def main(runs: int = 3, seconds: float = 4.0, out: str | None = None) -> None:
    """Measure each policy `runs` times, alternately, idle and beside a busy loop on each core.

    Args:
        seconds: how long each figure is measured.
        out: a JSON file to write.
    """
    check_counts(runs=runs)
    check_file("out", out, ".json")
    found: dict[tuple[str, str], list[float]] = {}
    load_before = os.getloadavg()[0]
    for _ in range(runs):
        for state, loops in (("idle", 0), ("loaded", os.cpu_count() or 1)):
            with busy_loops(loops):
                for work in WORK:
                    for name, policy in POLICIES.items():
                        rate = in_a_process(work, seconds, policy)
                        found.setdefault((name, f"{work}, {state}"), []).append(rate)
    figures = [
        Figure(name, column, "tok/s", rates, better="higher")
        for (name, column), rates in found.items()
    ]
    settings = {"runs": runs, "seconds": seconds, "load_before": round(load_before, 2)}
    finish(make_result("waiting", settings, figures), out)


if __name__ == "__main__":
    run_benchmark(main, "waiting")
