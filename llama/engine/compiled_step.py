"""A decoding step through torch.compile, and on CUDA as one graph. Knows nothing about requests.

Only a step of one new position a row is compiled: it has few shapes, and there the cost of
launching small operations matters. One block is compiled and serves every layer. Numbers of rows
and of cached positions are symbolic, so that no request causes another compilation.
"""

from __future__ import annotations

import inspect
import logging
import os
import time
import warnings
from collections.abc import Callable, Hashable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llama.common.files import check_writable
from llama.layers.adapter_rows import adapter_names
from llama.model import KVCache, Transformer, TransformerBlock

log = logging.getLogger("llama")

# A step reads this many cached positions, or twice as many, and so on: a CUDA graph for each.
SHORTEST = 256


class CompiledStep:
    """A compiled `model.hidden` for decoding: one new id for each of rows 0 to B - 1 of the cache.

    On CUDA, weights and cache must keep their addresses, which the graphs contain.

    Args:
        model: optimized (its rotation must take real numbers; see `kernel_modules.rotate`).
        cache: of each layer.
    """

    def __init__(self, model: Transformer, cache: Sequence[KVCache]):
        self.model, self.cache = model, cache
        self.unused = model.unused  # kept, because graphs contain its address
        self.graphs: dict[Hashable, Graph] = {}
        self.pool: Any = None  # memory that the graphs share: one runs at a time
        self.graphed = model.norm.weight.is_cuda
        options: dict[str, Any] = {"dynamic": True}
        if "isolate_recompiles" in inspect.signature(torch.compile).parameters:
            options["isolate_recompiles"] = True  # models of a process do not use up one limit
        self.block: Callable[..., Tensor] = torch.compile(TransformerBlock.forward, **options)

    @torch.inference_mode()
    def __call__(self, tokens: Tensor, start_pos: Tensor, cache_len: int) -> Tensor:
        """(B, 1) ids at the (B,) positions `start_pos`, all below cache_len: (B, 1, dim).

        On CUDA the result is overwritten by the next call.
        """
        length = self.length(cache_len)

        def step(tokens: Tensor, start_pos: Tensor) -> Tensor:
            return self.hidden(tokens, start_pos, length)

        return self.repeat((len(tokens), length), step, tokens, start_pos)

    def length(self, cache_len: int) -> int:
        """How many positions a step reads for rows that end before cache_len: one of few sizes."""
        room = self.cache[0].k.shape[1]
        return min(max(SHORTEST, 1 << (cache_len - 1).bit_length()), room)

    def repeat(self, key: Hashable, step: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        """step(*inputs), on CUDA by the graph that was captured for this key.

        Args:
            key: of the graph: all that `step` depends on, except the values of the inputs.
        """
        if not self.graphed:
            return step(*inputs)
        if key not in self.graphs:
            out = step(*inputs)  # so that what cannot be compiled ends here
            try:
                self.pool = self.pool or torch.cuda.graph_pool_handle()
                self.graphs[key] = Graph(step, inputs, self.pool)
            except RuntimeError as e:  # such as no memory left: requests go on without graphs
                warnings.warn(f"decoding without CUDA graphs: {e}", stacklevel=2)
                self.graphed, self.graphs = False, {}
            return out
        return self.graphs[key](*inputs)

    def hidden(self, tokens: Tensor, start_pos: Tensor, length: int) -> Tensor:
        """`Transformer.hidden`, with every layer through the one compiled block."""
        model, (B, T) = self.model, tokens.shape
        freqs_cis, mask, at = model.locate((B, T), start_pos, self.cache, length)
        freqs = torch.view_as_real(freqs_cis)  # torch.compile has no complex numbers
        h = model.embed(tokens)
        for layer, cache in zip(model.layers, self.cache, strict=True):
            h = self.block(layer, h, freqs, mask, cache, at)
        out: Tensor = model.norm(h)
        return out

    @torch.inference_mode()
    def warm_up(self) -> None:
        """Compile for any number of rows and positions. The cache is empty before and after."""
        rows, room = self.cache[0].k.shape[:2]
        device = self.model.norm.weight.device
        try:
            for n in sorted({1, min(2, rows), rows}):
                for length in (1, room):
                    tokens = torch.zeros(n, 1, dtype=torch.long, device=device)
                    start_pos = torch.zeros(n, dtype=torch.long, device=device)
                    self.hidden(tokens, start_pos, self.length(length))
        finally:
            for cache in self.cache:
                for row in range(rows):
                    cache.clear(row, 0, 1)


class Graph:
    """A step as a CUDA graph: one launch instead of one for each operation.

    Args:
        inputs: tensors on the GPU; calls give others of these shapes, which may be pinned.
        pool: of the graph's memory.
    """

    def __init__(self, step: Callable[..., Tensor], inputs: Sequence[Tensor], pool: Any):
        self.inputs = [x.clone() for x in inputs]
        device = self.inputs[0].device
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        self.graph = torch.cuda.CUDAGraph()
        # By default the stream is one of the current device, and other threads must not use CUDA.
        options = {"pool": pool, "stream": stream, "capture_error_mode": "thread_local"}
        with torch.random.fork_rng([device]):  # capturing must not change what is drawn later
            with torch.cuda.stream(stream):  # what happens once, such as compiling, is not captured
                step(*self.inputs)
            torch.cuda.current_stream(device).wait_stream(stream)
            with torch.cuda.device(device), torch.cuda.graph(self.graph, **options):
                self.out = step(*self.inputs)

    def __call__(self, *inputs: Tensor) -> Tensor:
        for own, given in zip(self.inputs, inputs, strict=True):
            own.copy_(given, non_blocking=True)
        self.graph.replay()
        return self.out


def check_cache() -> None:
    """Warn of a TORCHINDUCTOR_CACHE_DIR that cannot be written, and let torch use another folder.

    torch creates that folder even where nothing is compiled, and raises if it cannot.
    """
    if not (chosen := os.environ.get("TORCHINDUCTOR_CACHE_DIR")):
        return
    try:
        check_writable(Path(chosen))
    except OSError as e:
        del os.environ["TORCHINDUCTOR_CACHE_DIR"]
        warnings.warn(
            f"cannot keep compiled code in {chosen} ({e}); set TORCHINDUCTOR_CACHE_DIR to a "
            "folder of your own",
            stacklevel=4,
        )


def compile_step(model: Transformer, cache: Sequence[KVCache]) -> CompiledStep | None:
    """A compiled step over an empty cache; None, with a warning, where compiling is impossible.

    Raises:
        ValueError: the model has adapters that are chosen per request.
    """
    if adapter_names(model):
        raise ValueError(
            "a compiled step has the same weights for every request: leave compile out, build with "
            "one adapter=, or merge it first: llama3 merge"
        )
    log.info("compiling a block for decoding (up to a minute, then cached)")
    start, step = time.time(), CompiledStep(model, cache)
    try:
        step.warm_up()
    except Exception as e:  # the classes of dynamo and inductor differ from release to release
        reason = str(e).strip().splitlines()[0] if str(e).strip() else type(e).__name__
        needed = "triton and a C++ compiler" if step.graphed else "a C++ compiler"
        remedy = f"it needs {needed}: install g++ or set CXX"
        warnings.warn(f"decoding is not compiled: {reason}; {remedy}", stacklevel=3)
        return None
    log.info("compiled in %.1f s", time.time() - start)
    return step
