"""A decoding step through torch.compile, and on CUDA as one graph. Knows nothing about requests.

Only a step of one new position a row is compiled: its shapes are few, and it is where the cost of
launching small operations shows. One block is compiled and serves every layer. Numbers of rows and
of cached positions are symbols, so that no request makes it compile anew.
"""

from __future__ import annotations

import inspect
import os
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llama.attention import CacheSlice
from llama.distributed import job
from llama.model import Transformer, TransformerBlock

# A step reads this many cached positions, or twice as many, and so on: a CUDA graph for each.
SHORTEST = 256

Step = Callable[[Tensor, Tensor], Tensor]  # (B, 1) ids and (B,) positions -> (B, 1, dim)


class CompiledStep:
    """`model.hidden` for one new position of each of the cache's first rows.

    On CUDA, weights must stay where they are: a graph holds their addresses.
    """

    def __init__(self, model: Transformer):
        self.model = model
        self.graphs: dict[tuple[int, int], Graph] = {}
        self.pool: Any = None  # memory that the graphs share: one runs at a time
        self.cache: object = None  # whose addresses the graphs hold
        self.graphed = model.norm.weight.is_cuda
        options: dict[str, Any] = {"dynamic": True}
        if "isolate_recompiles" in inspect.signature(torch.compile).parameters:
            options["isolate_recompiles"] = True  # models of a process do not use up one limit
        if model.norm.weight.is_cuda:  # one row's products become fused reductions, as in gpt-fast
            options["options"] = {"coordinate_descent_tuning": True}
        self.forward = torch.compile(TransformerBlock.forward, **options)

    def block(
        self,
        layer: TransformerBlock,
        x: Tensor,
        freqs_cis: Tensor,
        mask: Tensor | None,
        at: CacheSlice | None,
    ) -> Tensor:
        """What `hidden` calls for each layer; compilers know no complex numbers."""
        out: Tensor = self.forward(layer, x, torch.view_as_real(freqs_cis), mask, at)
        return out

    @torch.inference_mode()
    def __call__(self, tokens: Tensor, start_pos: Tensor, cache_len: int) -> Tensor:
        """(B, 1) ids at the (B,) positions `start_pos`, all below cache_len: (B, 1, dim).

        On CUDA the result is overwritten by the next call.
        """
        cache = next(self.model.caches())
        length = min(max(SHORTEST, 1 << (cache_len - 1).bit_length()), cache.k.shape[1])

        def step(tokens: Tensor, start_pos: Tensor) -> Tensor:
            return self.model.hidden(tokens, start_pos, length, block=self.block)

        if not self.graphed:
            return step(tokens, start_pos)
        if cache is not self.cache:
            self.cache, self.graphs = cache, {}
        key = (len(tokens), length)
        if key not in self.graphs:
            out = step(tokens, start_pos)  # so that what cannot be compiled ends here
            try:
                self.pool = self.pool or torch.cuda.graph_pool_handle()
                self.graphs[key] = Graph(step, tokens, start_pos, self.pool)
            except RuntimeError as e:  # such as no memory left: requests go on without
                warnings.warn(f"decoding without CUDA graphs: {e}", stacklevel=2)
                self.graphed, self.graphs = False, {}
                return out
        return self.graphs[key](tokens, start_pos)


class Graph:
    """A step as a CUDA graph: one launch instead of one for each operation."""

    def __init__(self, step: Step, tokens: Tensor, start_pos: Tensor, pool: Any):
        self.tokens, self.start_pos = tokens.clone(), start_pos.clone()
        stream = torch.cuda.Stream(tokens.device)
        stream.wait_stream(torch.cuda.current_stream(tokens.device))
        with torch.cuda.stream(stream):  # what happens once, such as compiling, is not captured
            step(self.tokens, self.start_pos)
        torch.cuda.current_stream(tokens.device).wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        # By default the stream is one of the current device, and other threads must keep still.
        options = {"pool": pool, "stream": stream, "capture_error_mode": "thread_local"}
        with torch.cuda.device(tokens.device), torch.cuda.graph(self.graph, **options):
            self.out = step(self.tokens, self.start_pos)

    def __call__(self, tokens: Tensor, start_pos: Tensor) -> Tensor:
        self.tokens.copy_(tokens)
        self.start_pos.copy_(start_pos)
        self.graph.replay()
        return self.out


def check_cache() -> None:
    """Have torch take a folder of its own, with a warning, for one that cannot be written.

    It makes TORCHINDUCTOR_CACHE_DIR even where nothing is compiled, and fails if it cannot.
    """
    if not (chosen := os.environ.get("TORCHINDUCTOR_CACHE_DIR")):
        return
    try:
        Path(chosen).mkdir(parents=True, exist_ok=True)
        if not os.access(chosen, os.W_OK):
            raise PermissionError("no permission to write")
    except OSError as e:
        del os.environ["TORCHINDUCTOR_CACHE_DIR"]
        warnings.warn(
            f"cannot keep what is compiled in {chosen} ({e}); set TORCHINDUCTOR_CACHE_DIR to a "
            "folder of your own",
            stacklevel=4,
        )


def compile_decoding(model: Transformer) -> bool:
    """Have the engine decode by a compiled step, and compile it now, for any number of rows.

    The model has an empty cache, which this leaves empty. Where compiling is impossible (no C++
    compiler, or no triton) a warning says why, and the model stays as it was.

    Returns:
        whether it is compiled.
    """
    if job.is_leader():
        print("compiling a block for decoding (up to a minute, then cached)", file=sys.stderr)
    start, step = time.time(), CompiledStep(model)
    rows, room = next(model.caches()).k.shape[:2]
    device = model.norm.weight.device
    try:
        for n in sorted({1, min(2, rows), rows}):
            for length in (1, room):
                tokens = torch.zeros(n, 1, dtype=torch.long, device=device)
                step(tokens, torch.zeros(n, dtype=torch.long, device=device), length)
    except Exception as e:  # dynamo's and inductor's own classes differ from release to release
        reason = str(e).strip().splitlines()[0] if str(e).strip() else type(e).__name__
        needed = "triton and a C++ compiler" if step.graphed else "a C++ compiler"
        remedy = f"it needs {needed}: install g++ or set CXX"
        warnings.warn(f"decoding is not compiled: {reason}; {remedy}", stacklevel=3)
        return False
    finally:
        for cache in model.caches():
            for row in range(rows):
                cache.clear(row, 0, 1)
    model.compiled = step
    if job.is_leader():
        print(f"compiled in {time.time() - start:.1f} s", file=sys.stderr)
    return True
