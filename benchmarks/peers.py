"""The systems that are measured: this library and others, with the same weights in one folder.

Knows nothing about processes, tables or rounds.

Shapes: B rows, T ids in a row, V vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import llama_cpp_peer
from benchmarks.llama_cpp_peer import KINDS, LlamaCpp, quantize_gguf, write_gguf
from benchmarks.meta_peer import meta_model
from benchmarks.ours import build, greedy
from benchmarks.random_checkpoint import SHAPES, RandomSource
from benchmarks.transformers_peer import transformers_forward
from llama.checkpoints.demo_model import ensure_demo_model
from llama.checkpoints.formats.meta_export import write_meta
from llama.checkpoints.open import open_checkpoint
from llama.checkpoints.source import Source
from llama.distributed.device import pick_device
from llama.engine.engine import Engine
from llama.engine.request import Generation
from llama.model import ModelArgs, Transformer

OURS, LLAMA_CPP, TRANSFORMERS, META = "llama3", "llama.cpp", "transformers", "Meta's code"
# {name: (program, its scheme of weights or its attention; None: the weights as stored)}
SYSTEMS: dict[str, tuple[str, str | None]] = {
    "llama3": (OURS, None),
    "llama.cpp": (LLAMA_CPP, None),
    "transformers-eager": (TRANSFORMERS, "eager"),
    "transformers-sdpa": (TRANSFORMERS, "sdpa"),
    "meta": (META, None),
    "llama3-int8": (OURS, "int8"),
    "llama.cpp-Q8_0": (LLAMA_CPP, "Q8_0"),
    "llama3-int4": (OURS, "int4"),
    "llama.cpp-Q4_0": (LLAMA_CPP, "Q4_0"),
    "llama.cpp-Q4_K_M": (LLAMA_CPP, "Q4_K_M"),
}
# {program: {module it imports: package that has it}}
PACKAGES: dict[str, dict[str, str]] = {
    OURS: {},
    LLAMA_CPP: {"llama_cpp": "llama-cpp-python", "gguf": "gguf"},
    TRANSFORMERS: {"transformers": "transformers"},
    META: {"llama_models": "llama-models"},
}
Forward = Callable[[Tensor, int], Tensor]  # (B, T) ids, cached positions -> (B, V) last logits


@dataclass(frozen=True)
class Job:
    """What all systems of a run have in common.

    Attributes:
        params: as in params.json.
        folder: contains the weights, see `write_weights`.
        dtype: of the weights that are not quantized.
        rows, length: of the KV cache.
        precise: keep attention and its cache in fp32 in all systems.
    """

    params: dict[str, Any]
    folder: Path
    dtype: str
    rows: int
    length: int
    precise: bool = False

    def gguf(self, scheme: str | None) -> Path:
        """llama.cpp's file of the weights."""
        return self.folder / f"{scheme or KINDS[self.dtype]}.gguf"


def title(name: str, dtype: str) -> str:
    """Name of a system in a table."""
    program, scheme = SYSTEMS[name]
    return f"{program} {scheme or (KINDS[dtype] if program == LLAMA_CPP else dtype)}"


def missing_package(name: str) -> str | None:
    """A package that a system needs and that is not installed."""
    packages = PACKAGES[SYSTEMS[name][0]]
    return next((p for module, p in packages.items() if find_spec(module) is None), None)


def check_systems(listed: str) -> tuple[list[str], list[str]]:
    """(systems to measure, a note about each that cannot be) of a list separated by commas.

    Raises:
        ValueError: a name is unknown or given twice, or nothing is left.
    """
    names: list[str] = []
    notes: list[str] = []
    for name in filter(None, listed.split(",")):
        if name not in SYSTEMS:
            raise ValueError(f"unknown system {name!r}; the systems are {', '.join(SYSTEMS)}")
        if name in names:
            raise ValueError(f"the system {name!r} is named twice; name it once")
        if package := missing_package(name):
            notes.append(f"{name} is skipped: it needs `pip install {package}`")
            print(notes[-1], flush=True)
        else:
            names.append(name)
    if not names:
        raise ValueError("--systems leaves nothing to measure; docs/performance.md lists systems")
    return names, notes


def open_source(shape: str) -> Source:
    """The weights of a shape.

    Raises:
        ValueError: there is no such shape.
    """
    if shape == "demo":
        return open_checkpoint(ensure_demo_model())
    if shape not in SHAPES:
        raise ValueError(f"unknown shape {shape!r}; use one of demo, {', '.join(SHAPES)}")
    params = dict(SHAPES[shape])
    if params.get("use_scaled_rope"):
        params["rope_scale_factor"] = 8.0  # the only one that Meta's published code knows
    return RandomSource(params)


def write_weights(job: Job, source: Source, names: Sequence[str]) -> None:
    """Write the weights of `source` into the job's folder, for the systems `names`."""
    write_meta(source, None, job.folder, getattr(torch, job.dtype))
    schemes = [SYSTEMS[name][1] for name in names if SYSTEMS[name][0] == LLAMA_CPP]
    if schemes:
        write_gguf(source, job.gguf(None), job.dtype)
    for scheme in filter(None, schemes):
        quantize_gguf(job.gguf(None), job.gguf(scheme), scheme)
    if schemes and None not in schemes:
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
        about: version and how it was built, if it says so.
    """

    def __init__(
        self, forward: Forward, weight_bytes: int, position_bytes: int, about: str | None = None
    ):
        self.forward = forward
        self.weight_bytes = weight_bytes
        self.position_bytes = position_bytes
        self.about = about
        self.device = pick_device(None)

    @torch.inference_mode()
    def generate(self, prompts: list[list[int]], new: int) -> tuple[list[list[int]], float, float]:
        """Returns (B, `new`) ids, seconds until every row has one, seconds for the others."""
        start = time.perf_counter()
        drawn: list[list[int]] = []
        tokens = torch.tensor(prompts, device=self.device)
        position = 0
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

    def generate(self, prompts: list[list[int]], new: int) -> tuple[list[list[int]], float, float]:
        start, first = time.perf_counter(), 0.0

        def after_step(generations: Sequence[Generation]) -> None:
            nonlocal first
            if not first and all(generation.ids for generation in generations):
                first = time.perf_counter() - start

        ids, _ = greedy(self.engine, prompts, new, after_step=after_step)
        return ids, first, time.perf_counter() - start - first


def ours(job: Job, quantize: str | None = None, exact: bool = False) -> Engine:
    """This library's engine on the weights in the job's folder."""
    source = open_checkpoint(job.folder)
    return build(source, job.rows, job.length, job.dtype, quantize=quantize, exact=exact)


def make_system(name: str, job: Job) -> System:
    """A system of a job whose weights are written."""
    program, scheme = SYSTEMS[name]
    if program == OURS:
        return Ours(ours(job, scheme))
    if program == LLAMA_CPP:
        path = job.gguf(scheme)
        theirs = LlamaCpp(path, job.rows, job.length, job.precise)
        cached = position_bytes(ModelArgs(**job.params), 2)
        return System(
            theirs.forward, llama_cpp_peer.weight_bytes(path), cached, llama_cpp_peer.about()
        )
    model = ours(replace(job, rows=1), exact=True).model
    cached = position_bytes(model.params, model.norm.weight.itemsize)
    if program == META:
        meta = meta_model(model, job.params, job.rows, job.length)
        return System(lambda t, at: meta.forward(t, at)[:, -1], bytes_read(model), cached)
    assert scheme is not None
    return System(transformers_forward(model, scheme), bytes_read(model), cached)
