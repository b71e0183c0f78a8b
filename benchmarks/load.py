"""What building a checkpoint costs: seconds, and memory that is this process's own.

    python -m benchmarks.load --ckpt_dir /tmp/random-8b

Prints one JSON line. "anonymous" is memory that no file backs (Linux only), in GiB, the KV cache
as far as it was touched included; the weights are pages of the mapped checkpoint.
"""

from __future__ import annotations

import json
import time
from pathlib import Path

from llama import Llama
from llama.commands.script import run_script


def resident_bytes(kind: str) -> int:
    """Resident memory of this process by /proc: "RssAnon", "RssFile" or "RssShmem"."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{kind}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"this kernel does not report {kind}")


def anonymous_bytes() -> int:
    """Resident memory of this process that no file backs."""
    return resident_bytes("RssAnon")


def main(ckpt_dir: str, max_seq_len: int = 512, tokens: int = 8) -> None:
    """Build twice (the second finds the files in the page cache), then decode a few tokens."""
    result: dict[str, float | str] = {"ckpt_dir": ckpt_dir}
    for run in ("first", "second"):
        before, start = anonymous_bytes(), time.perf_counter()
        llama = Llama.build(ckpt_dir, None, max_seq_len, 1)
        result[f"build_s_{run}"] = round(time.perf_counter() - start, 2)
        own = anonymous_bytes() - before
        result[f"anonymous_GiB_{run}"] = round(own / 2**30, 3)
    llama.generate([[1, 2, 3]], 1, temperature=0)  # reads every page of the weights
    seconds = {}
    for n in (1, tokens + 1):
        start = time.perf_counter()
        llama.generate([[1, 2, 3]], n, temperature=0)
        seconds[n] = time.perf_counter() - start
    result["decode_tok_per_s"] = round(tokens / (seconds[tokens + 1] - seconds[1]), 3)
    result["anonymous_GiB_after_decode"] = round(anonymous_bytes() / 2**30, 3)
    print(json.dumps(result))


if __name__ == "__main__":
    run_script(main, "benchmarks.load")
