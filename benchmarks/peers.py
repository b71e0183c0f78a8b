"""The systems that are measured: this library and others, with the same weights in one folder.

Knows nothing about processes, tables or rounds.

Shapes: B rows, T ids in a row, V vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import llama_cpp_peer
from benchmarks.llama_cpp_peer import KINDS, SCHEMES, LlamaCpp, quantize_gguf, write_gguf
from benchmarks.meta_peer import meta_model
from benchmarks.ours import build, greedy
from benchmarks.random_checkpoint import RandomSource
from benchmarks.transformers_peer import transformers_forward
from llama.checkpoints.formats.meta_export import write_meta
from llama.checkpoints.open import open_checkpoint
from llama.distributed.device import pick_device
from llama.engine.engine import Engine
from llama.engine.request import Generation
from llama.model import ModelArgs, Transformer

OURS = "llama3"
# {peer: {module it imports: package that has it}}
PEERS: dict[str, dict[str, str]] = {
    "reference": {"llama_models": "llama-models"},
    "transformers": {"transformers": "transformers"},
    "llama.cpp": {"llama_cpp": "llama-cpp-python", "gguf": "gguf"},
    "llama.cpp-bf16": {"llama_cpp": "llama-cpp-python", "gguf": "gguf"},
    "exact": {},
    "bf16": {},
}
CHUNK = 512  # ids that a call computes at most, of the context before the prompts
Forward = Callable[[Tensor, int], Tensor]  # (B, T) ids, cached positions -> (B, V) last logits


@dataclass(frozen=True)
class Job:
    """What all systems of a run have in common.

    Attributes:
        params: as in params.json.
        folder: contains the weights, see `write_weights`.
        quantize: scheme of this library and of llama.cpp, or None.
        compile: compile this library's decode step.
        rows, length: of the KV cache.
        precise: keep attention and its cache in fp32 in all systems.
    """

    params: dict[str, Any]
    folder: Path
    dtype: str
    quantize: str | None
    compile: bool
    rows: int
    length: int
    precise: bool = False

    def title(self, name: str) -> str:
        """Name of a system in the table."""
        if name.startswith("llama.cpp"):
            quantized = self.quantize if name == "llama.cpp" else None
            return f"llama.cpp {SCHEMES[quantized] if quantized else KINDS[self.dtype]}"
        if name in ("reference", "transformers"):
            return name
        kind = self.quantize if name == OURS and self.quantize else self.dtype
        compiled = " compiled" if name == OURS and self.compile else ""
        return f"{OURS} {kind}{compiled}" + (" exact" if name == "exact" else "")

    def gguf(self, quantize: str | None) -> Path:
        """llama.cpp's file of the weights."""
        return self.folder / f"{quantize or self.dtype}.gguf"


def check_peers(names: list[str]) -> None:
    """Raise a ValueError for an unknown or repeated peer, an ImportError for a missing package."""
    for i, name in enumerate(names):
        if name not in PEERS:
            raise ValueError(f"unknown peer {name!r}; the peers are {', '.join(PEERS)}")
        if name in names[:i]:
            raise ValueError(f"the peer {name!r} is named twice; name it once")
        for module, package in PEERS[name].items():
            if find_spec(module) is None:
                raise ImportError(
                    f"the peer {name!r} needs `pip install {package}` (docs/performance.md says "
                    "how), or leave it out"
                )


def write_weights(job: Job, names: list[str]) -> None:
    """Write the random weights into the job's folder, for the systems `names`."""
    source = RandomSource(job.params)
    write_meta(source, None, job.folder, getattr(torch, job.dtype))
    if any(name.startswith("llama.cpp") for name in names):
        write_gguf(source, job.gguf(None), job.dtype)
    if job.quantize and "llama.cpp" in names:
        quantize_gguf(job.gguf(None), job.gguf(job.quantize), job.quantize)
        if "llama.cpp-bf16" not in names:
            job.gguf(None).unlink()


def position_bytes(args: ModelArgs, itemsize: int) -> int:
    """Bytes of the keys and values of one position of one row, in all layers."""
    return 2 * args.n_layers * args.kv_heads * args.head_dim * itemsize


def bytes_read(model: Transformer) -> int:
    """Bytes of the weights that a decode step reads: not the embedding, unless it is tied."""
    state = model.state_dict()
    return sum(w.nbytes for n, w in state.items() if not n.startswith("tok_emb"))


class System:
    """A model with a KV cache that continues prompts greedily.

    Args:
        forward: computes ids at a position, and forgets what is cached from there on.
        weight_bytes: weights that a decode step reads.
        position_bytes: keys and values that it reads for each cached position of a row.
    """

    def __init__(self, forward: Forward, weight_bytes: int, position_bytes: int):
        self.forward = forward
        self.weight_bytes = weight_bytes
        self.position_bytes = position_bytes
        self.context: list[list[int]] = []
        self.device = pick_device(None)

    @torch.inference_mode()
    def fill(self, context: list[list[int]]) -> None:
        """Cache (B, N) ids, which then precede every prompt."""
        self.context = context
        tokens = torch.tensor(context, device=self.device)
        for start in range(0, tokens.shape[1], CHUNK):
            self.forward(tokens[:, start : start + CHUNK], start)

    @torch.inference_mode()
    def generate(self, prompts: list[list[int]], new: int) -> tuple[list[list[int]], float, float]:
        """Returns (B, `new`) ids, seconds until every row has one, seconds for the others."""
        start = time.perf_counter()
        drawn: list[list[int]] = []
        tokens = torch.tensor(prompts, device=self.device)
        position = len(self.context[0]) if self.context else 0
        for _ in range(new):
            logits = self.forward(tokens, position)
            position += tokens.shape[1]
            tokens = logits.argmax(-1, keepdim=True)
            drawn.append(tokens.flatten().tolist())
            if len(drawn) == 1:
                first = time.perf_counter() - start
        ids = [list(row) for row in zip(*drawn, strict=True)]
        return ids, first, time.perf_counter() - start - first


class Ours(System):
    """This library's engine."""

    def __init__(self, engine: Engine):
        model, self.engine = engine.model, engine
        super().__init__(
            lambda tokens, position: model(tokens, position)[:, -1],
            bytes_read(model),
            position_bytes(model.params, engine.cache[0].k.itemsize),
        )

    def fill(self, context: list[list[int]]) -> None:
        self.context = context
        greedy(self.engine, context, 1, reuse=True)

    def generate(self, prompts: list[list[int]], new: int) -> tuple[list[list[int]], float, float]:
        context = self.context or [[] for _ in prompts]
        start, first = time.perf_counter(), 0.0

        def after_step(generations: Sequence[Generation]) -> None:
            nonlocal first
            if not first and all(generation.ids for generation in generations):
                first = time.perf_counter() - start

        whole = [before + prompt for before, prompt in zip(context, prompts, strict=True)]
        ids, reused = greedy(self.engine, whole, new, bool(self.context), after_step)
        end = time.perf_counter()
        assert reused == [len(context[0])] * len(prompts)
        if self.context:  # leave the cache as `fill` did
            greedy(self.engine, self.context, 1, reuse=True)
        return ids, first, end - start - first


def ours(
    job: Job, quantize: str | None = None, exact: bool = False, compile: bool = False
) -> Engine:
    """This library's engine on the weights in the job's folder."""
    return build(
        open_checkpoint(job.folder),
        job.rows,
        job.length,
        job.dtype,
        quantize=quantize,
        exact=exact,
        compile=compile,
    )


def make_system(name: str, job: Job) -> System:
    """A system of a job whose weights are written."""
    if name.startswith("llama.cpp"):
        path = job.gguf(job.quantize if name == "llama.cpp" else None)
        theirs = LlamaCpp(path, job.rows, job.length, job.precise)
        cached = position_bytes(ModelArgs(**job.params), 2)
        return System(theirs.forward, llama_cpp_peer.weight_bytes(path), cached)
    if name in ("reference", "transformers"):
        model = ours(job, exact=True).model
        cached = position_bytes(model.params, model.norm.weight.itemsize)
        if name == "reference":
            meta = meta_model(model, job.params, job.rows, job.length)
            return System(lambda t, at: meta.forward(t, at)[:, -1], bytes_read(model), cached)
        return System(transformers_forward(model), bytes_read(model), cached)
    if name == OURS:
        return Ours(ours(job, job.quantize, compile=job.compile))
    return Ours(ours(job, exact=name == "exact"))
