"""Optional CPU kernels for decoding: linears and attention limited only by memory bandwidth.

`load()` compiles the .cpp files at first use and registers their torch operators. Where that is
impossible it logs the reason once and returns False, and callers use torch's own operators. Knows
nothing about models.

    llama3::linear(x, w)                            x w^T; w (N, K) fp32 or bf16
    llama3::linears(x, ws)                          the same for several w of one dtype
    llama3::linear_int8(x, q, scale)                q (N, K) int8, scale (N,) fp32
    llama3::linear_int4(x, packed, scale, zero, n)  packed as by `quantize_int4`
    llama3::attend(xq, keys, values, positions)     as `KernelAttention` in layers/attention.py
    llama3::rms_norm(x, w, eps), rotary(x, turns), swiglu(a, b)    as in llama/model.py
    llama3::widen_int8(q)                           q in bf16
    llama3::unpack_int4(x, packed, scale, zero, n)  the dequantized weight, (n, K), in x's dtype

x is (..., K), fp32 or bf16; results are (..., N) in x's dtype; sums are fp32. No operator has a
gradient.
"""

from __future__ import annotations

import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from llama.common.files import check_writable

log = logging.getLogger("llama")

HERE = Path(__file__).parent
NAMES = ("attention", "blocked", "job", "pointwise", "rows", "variants", "vectors")
SOURCES = [HERE / f"{name}.cpp" for name in ("attention", "linear", "pointwise")]
HEADERS = [HERE / f"{name}.h" for name in NAMES]
FLAGS = ["-O3", "-std=c++20", "-fPIC", "-fopenmp", "-w"]

# Up to this many rows of x the kernels are faster than F.linear (int8 and int4: than dequantizing
# and F.linear) for every size of matrix. Measured on 2 cores with AVX-512 by benchmarks/kernels.py.
MAX_ROWS = {"bf16": 4, "fp32": 8, "int8": 32, "int4": 32}
# The same for x in bf16 on processors with AVX512_BF16 instructions.
ANY = 1 << 31
MAX_ROWS_BF16 = {"bf16": 64, "fp32": 8, "int8": ANY, "int4": ANY}
KIND = {torch.bfloat16: "bf16", torch.float32: "fp32"}  # dtypes of x and of plain weights

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
    library = library_path()
    if not library.exists():
        _compile(library)
    torch.ops.load_library(library)
    if "avx512bf16" in torch.ops.llama3.variants():
        _max_rows[torch.bfloat16] = MAX_ROWS_BF16
    torch.library.register_fake("llama3::linear", lambda x, w: _fake(x, w.shape[0]))
    torch.library.register_fake("llama3::linears", lambda x, ws: [_fake(x, w.shape[0]) for w in ws])
    torch.library.register_fake("llama3::linear_int8", lambda x, q, scale: _fake(x, q.shape[0]))
    torch.library.register_fake("llama3::attend", lambda xq, k, v, at: xq.new_empty(xq.shape))
    torch.library.register_fake("llama3::rms_norm", lambda x, w, eps: x.new_empty(x.shape))
    torch.library.register_fake("llama3::rotary", lambda x, turns: x.new_empty(x.shape))
    torch.library.register_fake("llama3::swiglu", lambda a, b: a.new_empty(a.shape))
    torch.library.register_fake("llama3::widen_int8", lambda q: q.to(torch.bfloat16))
    torch.library.register_fake("llama3::linear_int4", lambda x, p, scale, zero, n: _fake(x, n))
    torch.library.register_fake(
        "llama3::unpack_int4", lambda x, p, scale, zero, n: x.new_empty(n, p.shape[1] * 8)
    )
    return True


def _fake(x: Tensor, n: int) -> Tensor:
    return x.new_empty(*x.shape[:-1], n)


def library_path() -> Path:
    """The file of the compiled kernels, in TORCH_EXTENSIONS_DIR or else in the user's cache."""
    folder = os.environ.get("TORCH_EXTENSIONS_DIR")
    if not folder:
        cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        folder = str(Path(cache) / "torch_extensions")
    inputs = [path.read_bytes() for path in SOURCES + HEADERS]
    inputs += [text.encode() for text in (*FLAGS, torch.__version__, platform.machine())]
    digest = hashlib.sha256(b"\0".join(inputs)).hexdigest()[:16]
    return Path(folder) / f"llama3_kernels_{digest}.so"


def compiler() -> list[str]:
    """The C++ compiler's command line: the environment variable CXX, else g++, else c++."""
    command = shlex.split(os.environ.get("CXX", "")) or ["g++"]
    if shutil.which(command[0]):
        return command
    if "CXX" not in os.environ and shutil.which("c++"):
        return ["c++"]
    raise FileNotFoundError(f"no C++ compiler {command[0]!r}; install g++ or set CXX")


def _compile(library: Path) -> None:
    """Compile into a temporary folder, then rename: other processes never see a partial file."""
    command, cache = compiler(), library.parent
    try:
        check_writable(cache)
    except OSError as e:
        remedy = "set TORCH_EXTENSIONS_DIR to a folder of your own"
        raise OSError(f"cannot write to {cache} ({e}); {remedy}") from e
    log.info("compiling CPU kernels, once (about 20 seconds)")
    torch_dir = Path(torch.__file__).parent
    abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"
    with tempfile.TemporaryDirectory(dir=cache, prefix="llama3_kernels_") as folder:
        linked = f"{folder}/kernels.so"
        objects = {f"{folder}/{source.stem}.o": str(source) for source in SOURCES}
        compile_only = [*command, *FLAGS, abi, f"-I{torch_dir / 'include'}", "-c"]
        with ThreadPoolExecutor() as pool:
            list(pool.map(lambda out: _run([*compile_only, objects[out], "-o", out]), objects))
        # Linked without -fopenmp: the threads must be those of the OpenMP that torch has loaded.
        libraries = [f"-L{torch_dir / 'lib'}", "-ltorch_cpu", "-lc10"]
        _run([*command, "-shared", *objects, *libraries, "-o", linked])
        os.replace(linked, library)


def _run(command: list[str]) -> None:
    """Run a compiler; a RuntimeError has the first line of its output that names an error."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines() or ["no error message"]
        reason = next((line for line in lines if "error" in line), lines[-1])
        remedy = "install g++, or set CXX to another compiler"
        raise RuntimeError(f"{command[0]} failed: {reason}; {remedy}")
