"""The systems that are measured: this library and others, with the same weights in one folder.

Knows nothing about processes, tables or rounds. Shapes: B rows, T ids a row, V vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import llama_cpp_peer
from benchmarks.generation import meta_model
from benchmarks.llama_cpp_peer import KINDS, SCHEMES, LlamaCpp, quantize_gguf, write_gguf
from benchmarks.random_checkpoint import RandomSource
from benchmarks.transformers_peer import transformers_forward
from llama.args import ModelArgs
from llama.checkpoints.formats.meta_export import write_meta
from llama.checkpoints.load import load_model, tune
from llama.checkpoints.open import open_checkpoint
from llama.distributed.device import pick_device
from llama.engine.compiled_step import compile_decoding
from llama.engine.engine import Engine
from llama.engine.sampling import Sampling
from llama.model import Transformer
from llama.predictions import make_requests, run

OURS = "llama3"
# Peer: the packages it needs, as they are imported and as they are installed.
PEERS = {
    "reference": {"llama_models": "llama-models"},
    "transformers": {"transformers": "transformers"},
    "llama.cpp": {"llama_cpp": "llama-cpp-python", "gguf": "gguf"},
    "llama.cpp-bf16": {"llama_cpp": "llama-cpp-python", "gguf": "gguf"},
    "exact": {},
    "bf16": {},
}
CHUNK = 512  # of a context that is computed before the timing
Forward = Callable[[Tensor, int], Tensor]  # (B, T) ids, how many are cached -> (B, V) of the last


@dataclass(frozen=True)
class Job:
    """What all systems of a run have in common.

    Attributes:
        params: as in params.json.
        folder: where `write_weights` has put the weights.
        rows, length: of the KV cache.
        precise: nothing is rounded below fp32, for a comparison.
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
        """How the table calls a system."""
        if name.startswith("llama.cpp"):
            quantized = self.quantize if name == "llama.cpp" else None
            return f"llama.cpp {SCHEMES[quantized] if quantized else KINDS[self.dtype]}"
        if name in ("reference", "transformers"):
            return name
        kind = self.quantize if name == OURS and self.quantize else self.dtype
        compiled = " compiled" if name == OURS and self.compile else ""
        return f"{OURS} {kind}{compiled}" + (" exact" if name == "exact" else "")

    def gguf(self, quantize: str | None) -> Path:
        return self.folder / f"{quantize or self.dtype}.gguf"


def check_peers(names: list[str]) -> None:
    """Raise a ValueError for an unknown or repeated one, an ImportError for one not installed."""
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
    """Write the random weights once for all who map them."""
    source = RandomSource(job.params)
    write_meta(source, None, job.folder, getattr(torch, job.dtype))
    if any(name.startswith("llama.cpp") for name in names):
        write_gguf(source, job.gguf(None), job.dtype)
    if job.quantize and "llama.cpp" in names:
        quantize_gguf(job.gguf(None), job.gguf(job.quantize), job.quantize)
        if "llama.cpp-bf16" not in names:
            job.gguf(None).unlink()


def position_bytes(args: ModelArgs, itemsize: int) -> int:
    """Of one row's keys and values of one position, in all layers."""
    return 2 * args.n_layers * args.kv_heads * args.head_dim * itemsize


def bytes_read(model: Transformer) -> int:
    """Of weights, by a decode step: all but the embedding, unless it is the output too."""
    state = model.state_dict()
    return sum(w.nbytes for n, w in state.items() if not n.startswith("tok_emb"))


class System:
    """One that continues prompts greedily through a KV cache.

    Args:
        forward: computes ids after those that are cached, and drops what is cached beyond them.
        weight_bytes: that a decode step reads.
        position_bytes: that it reads of a cached position of a row.
    """

    def __init__(self, forward: Forward, weight_bytes: int, position_bytes: int):
        self.forward = forward
        self.weight_bytes = weight_bytes
        self.position_bytes = position_bytes
        self.context: list[list[int]] = []
        self.device = pick_device(None)

    @torch.inference_mode()
    def fill(self, context: list[list[int]]) -> None:
        """Cache these ids, which come before every prompt: (B, N)."""
        self.context = context
        tokens = torch.tensor(context, device=self.device)
        for start in range(0, tokens.shape[1], CHUNK):
            self.forward(tokens[:, start : start + CHUNK], start)

    @torch.inference_mode()
    def generate(self, prompts: list[list[int]], new: int) -> tuple[list[list[int]], float, float]:
        """(B, `new`) ids, seconds until the first of each row, seconds for the others."""
        start, drawn = time.perf_counter(), []
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
    """This library by its engine."""

    def __init__(self, model: Transformer):
        args = model.params
        super().__init__(
            lambda tokens, position: model(tokens, position)[:, -1],
            bytes_read(model),
            position_bytes(args, next(model.caches()).k.itemsize),
        )
        self.engine = Engine(model)

    def _run(self, prompts: list[list[int]], new: int, watch: Callable[[], object]) -> list[Any]:
        requests = make_requests(
            prompts,
            None,
            max_gen_len=new,
            sampling=Sampling(0.0),
            reuse=bool(self.context),
            watch=watch,
        )
        run(self.engine, requests)
        return requests

    def fill(self, context: list[list[int]]) -> None:
        self.context = context
        self._run(context, 1, lambda: None)

    def generate(self, prompts: list[list[int]], new: int) -> tuple[list[list[int]], float, float]:
        context = self.context or [[] for _ in prompts]
        waiting = len(prompts)  # rows without an id
        start, first = time.perf_counter(), 0.0

        def watch() -> None:
            nonlocal waiting, first
            waiting -= 1
            if waiting == 0:
                first = time.perf_counter() - start

        whole = [before + prompt for before, prompt in zip(context, prompts, strict=True)]
        requests = self._run(whole, new, watch)
        end = time.perf_counter()
        assert all(request.reused == len(context[0]) for request in requests)
        if self.context:  # the cache holds no more than this again
            self._run(self.context, 1, lambda: None)
        return [request.ids for request in requests], first, end - start - first


def load(job: Job, quantize: str | None, exact: bool, compile: bool) -> Transformer:
    """This library's model of the weights in the folder, with an empty cache."""
    source = open_checkpoint(job.folder)
    args = source.args(max_seq_len=job.length, max_batch_size=job.rows)
    dtype = getattr(torch, job.dtype)
    model = load_model(source, args, pick_device(None), dtype)
    tune(model, quantize, exact)
    if quantize is not None:  # let go of the mapped file that it was made from
        for parameter in model.parameters():
            parameter.data = parameter.data.clone()
    model.setup_cache(job.rows, job.length)
    if compile and not compile_decoding(model):
        raise RuntimeError("the step cannot be compiled here; leave out --compile")
    return model


def make(name: str, job: Job) -> System:
    """The system `name` of a job whose weights are written."""
    if name.startswith("llama.cpp"):
        path = job.gguf(job.quantize if name == "llama.cpp" else None)
        theirs = LlamaCpp(path, job.rows, job.length, job.precise)
        cached = position_bytes(ModelArgs(**job.params), 2)
        return System(theirs.forward, llama_cpp_peer.weight_bytes(path), cached)
    if name in ("reference", "transformers"):
        model = load(job, None, True, False)
        cached = position_bytes(model.params, model.norm.weight.itemsize)
        if name == "reference":
            meta = meta_model(model, job.params, job.rows, job.length)
            return System(lambda t, at: meta.forward(t, at)[:, -1], bytes_read(model), cached)
        return System(transformers_forward(model), bytes_read(model), cached)
    mine = name == OURS
    return Ours(load(job, job.quantize if mine else None, name == "exact", job.compile and mine))
