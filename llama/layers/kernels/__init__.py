"""Optional CPU kernels, at the speed of reading weights and cache: y = x W^T, and attention over a
cache.

`load()` compiles the .cpp files at first use and registers their torch operators; without a
compiler it says so once and returns False, and callers keep to torch's own. Knows nothing about
models.

    llama3::linear(x, w)                            w (N, K) fp32 or bf16
    llama3::linears(x, ws)                          the same for each of several, all of one dtype
    llama3::linear_int8(x, q, scale)                q (N, K) int8, scale (N,) fp32
    llama3::linear_int4(x, packed, scale, zero, n)  as `quantize_int4` of llama/quantize.py packs
    llama3::attend(xq, keys, values, positions)     as `kernel_attention` of llama/attention.py
    llama3::rms_norm(x, w, eps), rotary(x, turns), swiglu(a, b)    as in llama/model.py
    llama3::widen_int8(q)                           q in bf16
    llama3::unpack_int4(x, packed, scale, zero, n)  the weight itself, (n, K), in x's dtype

x is (..., K), fp32 or bf16; y is (..., N) in x's dtype; sums are fp32. They have no gradients.
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

log = logging.getLogger(__name__)

HERE = Path(__file__).parent
NAMES = ("attention", "blocked", "job", "pointwise", "rows", "variants", "vectors")
SOURCES = [HERE / f"{name}.cpp" for name in ("attention", "linear", "pointwise")]
HEADERS = [HERE / f"{name}.h" for name in NAMES]
FLAGS = ["-O3", "-std=c++20", "-fPIC", "-fopenmp", "-w"]

# Up to this many rows of x the kernels beat F.linear (for int8 and int4: F.linear after
# dequantizing), whatever the matrix's size. Measured on 2 cores with AVX-512 by
# benchmarks/kernels.py.
MAX_ROWS = {"bf16": 4, "fp32": 8, "int8": 32, "int4": 32}
# The same for x in bf16 where the processor multiplies bf16 (AVX512_BF16).
ANY = 1 << 31
MAX_ROWS_BF16 = {"bf16": 64, "fp32": 8, "int8": ANY, "int4": ANY}
KIND = {torch.bfloat16: "bf16", torch.float32: "fp32"}  # dtypes of x, and of plain weights

_lock = threading.Lock()
_loaded: bool | None = None
_max_rows = dict.fromkeys(KIND, MAX_ROWS)  # by the dtype of x; of this processor, once loaded


def use(kind: str, x: Tensor) -> bool:
    """Whether the operator for weights of `kind` takes x and is the fastest; loads it if so."""
    return takes(x) and x.numel() <= _max_rows[x.dtype][kind] * x.shape[-1]


def takes(x: Tensor) -> bool:
    """Whether the operators can serve x; loads them if so."""
    if x.device.type != "cpu" or x.dtype not in KIND:
        return False
    if torch.is_grad_enabled() and x.requires_grad:
        return False
    return load() if _loaded is None else _loaded  # a constant to torch.compile once it is known


def serves(x: Tensor, *ws: Tensor) -> bool:
    """Whether the operators for these plain weights take x and are the fastest."""
    dtype = ws[0].dtype
    if dtype not in KIND or not use(KIND[dtype], x):
        return False
    grad = torch.is_grad_enabled()
    return all(
        w.dtype == dtype and w.is_contiguous() and not (grad and w.requires_grad) for w in ws
    )


def linear(x: Tensor, w: Tensor) -> Tensor:
    """F.linear(x, w), by the kernel where that is faster and no gradient is wanted."""
    if serves(x, w):
        y: Tensor = torch.ops.llama3.linear(x, w)
        return y
    return F.linear(x, w)


def load() -> bool:
    """Have the operators: compiled once per user, source and version of torch.

    False where that is impossible, or where the environment says LLAMA3_KERNELS=0. Never raises;
    the reason is logged once.
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
    """Where the compiled kernels are or would be, in TORCH_EXTENSIONS_DIR or the user's cache."""
    folder = os.environ.get("TORCH_EXTENSIONS_DIR")
    if not folder:
        cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        folder = str(Path(cache) / "torch_extensions")
    made_of = [path.read_bytes() for path in SOURCES + HEADERS]
    made_of += [text.encode() for text in (*FLAGS, torch.__version__, platform.machine())]
    digest = hashlib.sha256(b"\0".join(made_of)).hexdigest()[:16]
    return Path(folder) / f"llama3_kernels_{digest}.so"


def compiler() -> list[str]:
    """The C++ compiler: CXX as the environment says, or g++, or what the system calls c++."""
    command = shlex.split(os.environ.get("CXX", "")) or ["g++"]
    if shutil.which(command[0]):
        return command
    if "CXX" not in os.environ and shutil.which("c++"):
        return ["c++"]
    raise FileNotFoundError(f"no C++ compiler {command[0]!r}; install g++ or set CXX")


def _compile(library: Path) -> None:
    """Compile to a temporary folder and move: another process sees all of the file or none."""
    command, cache = compiler(), library.parent
    try:
        cache.mkdir(parents=True, exist_ok=True)
        if not os.access(cache, os.W_OK):
            raise PermissionError("no permission to write")
    except OSError as e:
        remedy = "set TORCH_EXTENSIONS_DIR to a folder of your own"
        raise OSError(f"cannot write to {cache} ({e}); {remedy}") from e
    print("compiling CPU kernels, once (about 20 seconds)", file=sys.stderr)
    torch_dir = Path(torch.__file__).parent
    abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"
    with tempfile.TemporaryDirectory(dir=cache, prefix="llama3_kernels_") as folder:
        linked = f"{folder}/kernels.so"
        made = {f"{folder}/{source.stem}.o": str(source) for source in SOURCES}
        compile_only = [*command, *FLAGS, abi, f"-I{torch_dir / 'include'}", "-c"]
        with ThreadPoolExecutor() as pool:
            list(pool.map(lambda out: _run([*compile_only, made[out], "-o", out]), made))
        # Linked without -fopenmp: the threads must be those of the OpenMP that torch has loaded.
        libraries = [f"-L{torch_dir / 'lib'}", "-ltorch_cpu", "-lc10"]
        _run([*command, "-shared", *made, *libraries, "-o", linked])
        os.replace(linked, library)


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    if done.returncode != 0:
        said = done.stderr.strip().splitlines() or ["it said nothing"]
        why = next((line for line in said if "error" in line), said[-1])
        remedy = "install g++, or set CXX to another compiler"
        raise RuntimeError(f"{command[0]} failed: {why}; {remedy}")
