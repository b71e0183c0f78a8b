"""What cannot fit is refused before it is allocated; what fits is not refused."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from llama import Llama
from llama.checkpoints.convert import quantize
from llama.checkpoints.memory import check_memory, gigabytes, host_memory
from llama.checkpoints.open import open_checkpoint
from llama.common.dtypes import parse_dtype

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
# The demo model: 30 layers, 3 key-value heads of 64, 134,515,008 parameters in bf16, tied.
PARAMETERS = 134_515_008
CACHE_TOKEN, ROTARY_TOKEN = 2 * 30 * 3 * 64, 32 * 8  # numbers; bytes

opened = cache(open_checkpoint)


def check(
    folder: Path,
    free: int | None,
    batch: int,
    context: int,
    dtype: str = "bf16",
    device: torch.device = CPU,
    scheme: str | None = None,
) -> None:
    source, as_torch = opened(folder), parse_dtype(dtype)
    assert as_torch is not None
    args = source.args(max_seq_len=context, max_batch_size=batch)
    check_memory(source, args, device, as_torch, scheme, lambda _: free)


@pytest.mark.parametrize(
    ("device", "dtype", "weights"),
    [
        (CPU, "bf16", 0),  # the mapped file
        (CPU, "fp32", 4 * PARAMETERS),
        (GPU, "bf16", 2 * PARAMETERS),
        (GPU, "fp16", 2 * PARAMETERS),
    ],
    ids=str,
)
def test_the_last_byte_decides(
    demo_dir: Path, device: torch.device, dtype: str, weights: int
) -> None:
    batch, context, item = 3, 5000, 4 if dtype == "fp32" else 2
    needed = weights + batch * context * CACHE_TOKEN * item + context * ROTARY_TOKEN
    check(demo_dir, needed, batch, context, dtype, device)
    check(demo_dir, None, batch, context, dtype, device)  # unknown
    with pytest.raises(ValueError, match=r"max_seq_len 5000 with max_batch_size 3 needs"):
        check(demo_dir, needed - 1, batch, context, dtype, device)


def test_quantizing_a_gpu_begins_with_the_plain_weights(demo_dir: Path) -> None:
    check(demo_dir, 2 * PARAMETERS, 1, 16, device=GPU, scheme="int8")
    with pytest.raises(ValueError, match=r"needs 0\.27 GB"):
        check(demo_dir, 2 * PARAMETERS - 1, 1, 16, device=GPU, scheme="int8")


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("context", [10**6, 10**8, 2**31 - 1])
def test_what_the_message_proposes_fits(demo_dir: Path, batch: int, context: int) -> None:
    free = 3 * 10**9
    with pytest.raises(ValueError, match=r"3\.00 GB are free on cpu; use max_seq_len") as caught:
        check(demo_dir, free, batch, context)
    found = re.search(r"use max_seq_len (\d+)$", str(caught.value))
    assert found is not None
    check(demo_dir, free, batch, int(found[1]))
    assert int(found[1]) * batch * CACHE_TOKEN * 2 > 0.7 * free  # and is not much too small


def test_more_rows_than_fit(demo_dir: Path) -> None:
    with pytest.raises(ValueError, match=r"use max_seq_len 512 or max_batch_size (\d+)") as caught:
        check(demo_dir, 10**9, 64, 1024)
    rows = int(str(caught.value).split()[-1])
    check(demo_dir, 10**9, rows, 1024)
    assert rows > 16
    with pytest.raises(ValueError, match=r"use max_seq_len \d+ with max_batch_size 1$"):
        check(demo_dir, 10**9, 10**6, 10**6)


def test_weights_that_do_not_fit(demo_dir: Path) -> None:
    with pytest.raises(
        ValueError, match=r"`llama3 quantize --scheme int8` makes the weights 0\.19"
    ):
        check(demo_dir, 2 * 10**8, 1, 64, device=GPU)
    with pytest.raises(ValueError, match="use more ranks, each with memory of its own"):
        check(demo_dir, 10**6, 1, 64, device=GPU)


def test_ranks_of_one_machine_share_its_memory(
    demo_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needed = 64 * (2 * CACHE_TOKEN + ROTARY_TOKEN)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    check(demo_dir, 4 * needed, 1, 64)
    with pytest.raises(ValueError, match="max_seq_len 64"):
        check(demo_dir, 4 * needed - 1, 1, 64)


@pytest.mark.parametrize("more", [{}, {"dtype": "bf16"}, {"quantize": "int8"}, {"stored": True}])
def test_what_a_build_allocates_is_never_refused(
    tiny_checkpoint: Callable[..., Path],
    byte_tokenizer_path: Path,
    tmp_path: Path,
    more: dict[str, Any],
) -> None:
    """Compared with the tensors of the model that was built."""
    folder, options = tiny_checkpoint(vocab_size=512), {"dtype": "fp32"} | more
    if options.pop("stored", False):
        with pytest.warns(UserWarning, match="has no tokenizer"):
            quantize(folder, tmp_path / "int8", "int8")
        folder = tmp_path / "int8"
    llama = Llama.build(folder, byte_tokenizer_path, 48, 5, device="cpu", **options)
    tensors = [*llama.model.state_dict().values(), llama.model.freqs_cis]
    tensors += [t for layer in llama.engine.cache for t in (layer.k, layer.v)]
    size = sum({t.data_ptr(): t.nbytes for t in tensors}.values())
    check(folder, size, 5, 48, options["dtype"], scheme=options.get("quantize"))
    kv = sum(layer.k.nbytes + layer.v.nbytes for layer in llama.engine.cache)
    with pytest.raises(ValueError, match="max_seq_len 48 with max_batch_size 5"):
        check(folder, kv, 5, 48, options["dtype"], scheme=options.get("quantize"))


@pytest.mark.skipif(host_memory() is None, reason="this system does not say what is free")
def test_build_refuses_at_once(demo_dir: Path) -> None:
    with pytest.raises(ValueError, match=r"needs .* GB of it for the KV cache.* use max_seq_len"):
        Llama.build(demo_dir, None, 2**31 - 1, 1, device="cpu")


def write(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


MEMINFO = {"proc/meminfo": "MemTotal: 9000 kB\nMemAvailable:  5000 kB\nSwapFree: 100 kB\nHuge: x\n"}
V2 = {
    "proc/self/cgroup": "0::/a/b\n",
    "sys/fs/cgroup/a/b/memory.max": "max\n",
    "sys/fs/cgroup/a/b/memory.current": "9\n",
    "sys/fs/cgroup/a/memory.max": "4096000\n",
    "sys/fs/cgroup/a/memory.current": "3072000\n",
    "sys/fs/cgroup/a/memory.stat": "anon 1\nactive_file 1000\ninactive_file 24\n",
}
V1 = {
    "proc/self/cgroup": "5:cpu,cpuacct:/\n4:memory:/docker/x\n0::/\n",
    "sys/fs/cgroup/memory/memory.limit_in_bytes": "4096000\n",
    "sys/fs/cgroup/memory/memory.usage_in_bytes": "3072000\n",
    "sys/fs/cgroup/memory/memory.stat": "active_file 7\ntotal_active_file 1000\n"
    "inactive_file 7\ntotal_inactive_file 24\n",
}


@pytest.mark.parametrize(
    ("files", "free"),
    [
        ({}, None),
        ({"proc/meminfo": "MemTotal: 9000 kB\n"}, None),
        (MEMINFO, 5100 * 1024),
        (MEMINFO | V2, 1024000 + 1024 + 100 * 1024),
        (MEMINFO | V1, 1024000 + 1024 + 100 * 1024),
        (MEMINFO | V2 | {"sys/fs/cgroup/a/memory.max": f"{2**63}\n"}, 5100 * 1024),
    ],
    ids=["no Linux", "an old Linux", "no groups", "version 2", "version 1", "no limit"],
)
def test_memory_that_is_available(tmp_path: Path, files: dict[str, str], free: int | None) -> None:
    """A group's page cache can be dropped, and counts as free."""
    write(tmp_path, files)
    assert host_memory(tmp_path) == free


def test_this_machine_has_memory() -> None:
    free = host_memory()
    assert free is None or 0 < free < 2**50


def test_gigabytes() -> None:
    assert [gigabytes(n) for n in (1, 1_234_567_890, 23 * 10**12)] == [
        "0.00 GB",
        "1.23 GB",
        "23,000 GB",
    ]
