"""Optional CPU kernels for decoding: linears and attention limited only by memory bandwidth.

`load()` compiles the .cpp files at first use and registers their torch operators. Where that is
impossible it logs the reason once and returns False, and callers use torch's own operators. Knows
nothing about models.

    llama3::linear(x, w)                            x w^T; w (N, K) fp32 or bf16
    llama3::linears(x, ws)                          the same for several w of one dtype
    llama3::linear_int8(x, q, scale)                q (N, K) int8, scale (N,) fp32
    llama3::linear_blocks(x, blocks, n)             blocks as in layers/blocks.py; n rows
    llama3::unpack_blocks(x, blocks, n)             the dequantized weight, (n, K), in x's dtype
    llama3::linear_int4(x, packed, scale, zero, n)  packed as by `quantize_int4`
    llama3::attend(xq, keys, values, positions)     as `KernelAttention` in layers/attention.py
    llama3::rms_norm(x, w, eps), rotary(x, turns), swiglu(a, b)    as in llama/model.py
    llama3::widen_int8(q)                           q in bf16
    llama3::unpack_int4(x, packed, scale, zero, n)  the dequantized weight, (n, K), in x's dtype

x is (..., K), fp32 or bf16; results are (..., N) in x's dtype; sums are fp32. No operator has a
gradient. On processors with integer dot products (`llama3::variants` names one that ends in -vnni)
int8 weights are multiplied with x in 8 bits, see activations.h; a row's result does not depend on
the rows beside it there.
"""

from __future__ import annotations

import ctypes
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from llama.layers.kernels.library import library_path as library_path
from llama.layers.kernels.library import open_library
from llama.layers.schemes import block_layout

log = logging.getLogger("llama")

# Up to this many rows of x the kernels are faster than F.linear (int8 and int4: than dequantizing
# and F.linear) for every size of matrix. Measured on 2 cores with AVX-512 by benchmarks/kernels.py.
MAX_ROWS = {"bf16": 4, "fp32": 8, "int8": 32, "int4": 32, "blocks": 32}
# The same for x in bf16 on processors with AVX512_BF16 instructions.
ANY = 1 << 31
MAX_ROWS_BF16 = dict.fromkeys(MAX_ROWS, ANY) | {"fp32": 8}
MAX_ROWS_AMX = MAX_ROWS_BF16 | {"bf16": 64}  # where torch multiplies bf16 by AMX, for more rows
KIND = {torch.bfloat16: "bf16", torch.float32: "fp32"}  # dtypes of x and of plain weights

# {operator: what it gives for tensors of the meta device}, which torch.compile asks for.
SHAPED: dict[str, Callable[..., Any]] = {
    "linear": lambda x, w: _shaped(x, w.shape[0]),
    "linears": lambda x, ws: [_shaped(x, w.shape[0]) for w in ws],
    "linear_int8": lambda x, q, scale: _shaped(x, q.shape[0]),
    "linear_int4": lambda x, packed, scale, zero, n: _shaped(x, n),
    "linear_blocks": lambda x, blocks, n: _shaped(x, n),
    "unpack_blocks": lambda x, blocks, n: _unpacked(x, blocks, n),
    "attend": lambda xq, keys, values, positions: xq.new_empty(xq.shape),
    "rms_norm": lambda x, w, eps: x.new_empty(x.shape),
    "rotary": lambda x, turns: x.new_empty(x.shape),
    "swiglu": lambda a, b: a.new_empty(a.shape),
    "widen_int8": lambda q: q.to(torch.bfloat16),
    "unpack_int4": lambda x, packed, scale, zero, n: x.new_empty(n, packed.shape[1] * 8),
}

_registered: list[torch.library.Library] = []  # which forget their functions when deleted
_lock = threading.Lock()
_loaded: bool | None = None
_max_rows = dict.fromkeys(KIND, MAX_ROWS)  # {dtype of x: limits}; `_load` sets this processor's


def supports(x: Tensor) -> bool:
    """Whether the operators can run on x, by its device, dtype and gradient. May load them."""
    if x.device.type != "cpu" or x.dtype not in KIND:
        return False
    if torch.is_grad_enabled() and x.requires_grad:
        return False
    return load() if _loaded is None else _loaded  # once loaded, a constant to torch.compile


def is_fastest(kind: str, x: Tensor) -> bool:
    """Whether the linear for weights of `kind` (a key of MAX_ROWS) supports x and beats torch's."""
    return supports(x) and x.numel() <= _max_rows[x.dtype][kind] * x.shape[-1]


def is_fastest_with(x: Tensor, *ws: Tensor) -> bool:
    """Whether the linear supports x and these plain weights of one dtype, and beats torch's."""
    dtype = ws[0].dtype
    if dtype not in KIND or not is_fastest(KIND[dtype], x):
        return False
    grad = torch.is_grad_enabled()
    return all(
        w.dtype == dtype and w.is_contiguous() and not (grad and w.requires_grad) for w in ws
    )


def linear(x: Tensor, w: Tensor) -> Tensor:
    """F.linear(x, w), by the kernel where it is faster and no gradient is needed."""
    if is_fastest_with(x, w):
        y: Tensor = torch.ops.llama3.linear(x, w)
        return y
    return F.linear(x, w)


def load() -> bool:
    """Register the operators, which are compiled once per user, source and version of torch.

    Returns:
        False where that is impossible or the environment variable LLAMA3_KERNELS is 0. Never
        raises: the reason is logged once.
    """
    global _loaded
    with _lock:
        if _loaded is None:
            try:
                _loaded = _load()
            except (OSError, RuntimeError, subprocess.SubprocessError) as e:
                log.warning("no CPU kernels, using torch's own operators: %s", e)
                _loaded = False
        return _loaded


def _load() -> bool:
    if os.environ.get("LLAMA3_KERNELS") == "0":
        log.info("LLAMA3_KERNELS=0: no CPU kernels")
        return False
    if sys.platform != "linux":
        log.info("no CPU kernels on %s, only on Linux", sys.platform)
        return False
    with open_library() as file:
        # By the open file: a path could lead elsewhere by now.
        ctypes.CDLL(f"/proc/self/fd/{file.fileno()}")
    variants = torch.ops.llama3.variants()
    if "avx512bf16" in variants:
        amx = "amx_bf16" in Path("/proc/cpuinfo").read_text()
        _max_rows[torch.bfloat16] = MAX_ROWS_AMX if amx else MAX_ROWS_BF16
    if variants[0].endswith("-vnni"):  # blocks: only those of AVX-512, see blocks.cpp
        any_rows = {"int8", "blocks"} if variants[0].startswith("avx512") else {"int8"}
        for dtype, limits in _max_rows.items():
            _max_rows[dtype] = limits | dict.fromkeys(any_rows, ANY)
    meta = torch.library.Library("llama3", "IMPL", "Meta")  # `register_fake` takes 20 ms
    for name, shaped in SHAPED.items():
        meta.impl(name, shaped)
    _registered.append(meta)
    return True


def _shaped(x: Tensor, n: int) -> Tensor:
    return x.new_empty(*x.shape[:-1], n)


def _unpacked(x: Tensor, blocks: Tensor, n: int) -> Tensor:
    return x.new_empty(n, blocks.shape[1] * block_layout(blocks.shape[2])[1])
