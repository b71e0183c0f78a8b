"""What building a checkpoint costs: seconds, and memory that is this process's own.

    python -m benchmarks.load --ckpt_dir /tmp/random-8b

Prints a table and one JSON line, which --out saves. Anonymous memory is memory that no file backs
(Linux only); it includes the pages of the KV cache that were touched. The weights are pages of the
mapped checkpoint and not part of it.
"""

from __future__ import annotations

import time

from benchmarks.flags import check_counts, check_file
from benchmarks.memory import anonymous_bytes
from benchmarks.report import Figure, finish, make_result
from benchmarks.script import run_benchmark
from llama import Llama


def main(ckpt_dir: str, max_seq_len: int = 512, tokens: int = 8, out: str | None = None) -> None:
    """Build twice, then decode. The second build finds the files in the page cache.

    Args:
        max_seq_len: positions of the KV cache.
        tokens: how many to decode.
        out: a JSON file to write.
    """
    check_counts(max_seq_len=max_seq_len, tokens=tokens)
    check_file("out", out, ".json")
    figures = []
    for run in ("first", "second"):
        before, start = anonymous_bytes(), time.perf_counter()
        llama = Llama.build(ckpt_dir, None, max_seq_len, 1, speculate=False)
        seconds, own = time.perf_counter() - start, anonymous_bytes() - before
        figures += [
            Figure(f"build, {run}", "value", "s", [seconds], better="lower"),
            Figure(
                f"anonymous memory of build, {run}", "value", "GiB", [own / 2**30], better="lower"
            ),
        ]
    llama.generate([[1, 2, 3]], 1, temperature=0)  # reads every page of the weights
    times = {}
    for n in (1, tokens + 1):
        start = time.perf_counter()
        llama.generate([[1, 2, 3]], n, temperature=0)
        times[n] = time.perf_counter() - start
    speed = tokens / (times[tokens + 1] - times[1])
    whole = anonymous_bytes() / 2**30
    figures += [
        Figure("decode, one row", "value", "tok/s", [speed], better="higher"),
        Figure("anonymous memory after decoding", "value", "GiB", [whole], better="lower"),
    ]
    settings = {"ckpt_dir": ckpt_dir, "max_seq_len": max_seq_len, "tokens": tokens}
    finish(make_result("load", settings, figures), out)


if __name__ == "__main__":
    run_benchmark(main, "load")
