"""footprint.py: computed bytes, compared with those of models that are built on 1 to 8 ranks."""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from torch.multiprocessing import start_processes
from torch.profiler import ProfilerActivity, profile

from llama import Llama, ModelArgs, Transformer
from llama.checkpoints.footprint import PREFILL_CHUNK, Footprint
from llama.common.dtypes import parse_dtype
from llama.engine.drawing import Place, draw_at
from llama.engine.engine import Engine
from llama.engine.request import Generation, Request
from llama.engine.sampling import Sampling
from llama.layers.optimize import optimize, quantize_model
from llama.layers.schemes import SCHEMES, possible_ranks
from tests.checkpoints import eight_ranks
from tests.checkpoints.eight_ranks import BATCH, CONTEXT, SHAPES, cases, storage_bytes
from tests.checkpoints.test_inspect import RELEASES, release


def planned_bytes(
    ranks: int, shape: int, tied: bool, dtype: str, scheme: str | None
) -> list[int] | None:
    args = ModelArgs(**SHAPES[shape])
    if ranks not in possible_ranks(args, SCHEMES.get(scheme or "")):
        return None
    footprint = Footprint(args, tied, ranks, dtype, SCHEMES.get(scheme or ""))
    assert sum(footprint.weights().values()) == footprint.memory(BATCH, CONTEXT)["weights"]
    return [sum(footprint.weights().values()), footprint.cache(BATCH, CONTEXT)]


@pytest.mark.slow
def test_bytes_are_those_of_models_on_1_to_8_ranks(tmp_path: Path) -> None:
    """Each rank of gloo groups allocates its part; the first one also on the meta device."""
    multiprocessing.get_context("forkserver").set_forkserver_preload(
        ["tests.checkpoints.eight_ranks"]
    )
    start_processes(eight_ranks.main, (str(tmp_path),), 8, start_method="forkserver")
    for rank in range(8):
        found = json.loads((tmp_path / f"{rank}.json").read_text())
        assert list(found) == ["1", "2", "4", "8"]
        for ranks, built in found.items():
            want = [planned_bytes(int(ranks), *case) for case in cases()]
            assert built == ([want] if rank else [want, want]), (rank, ranks)
            assert want.count(None) == (4 if ranks in "48" else 0)  # too narrow for int4


@pytest.mark.parametrize("scheme", [None, "int8", "int4"])
def test_weights_by_kind(scheme: str | None) -> None:
    model = Transformer(ModelArgs(**SHAPES[0]))
    quantize_model(model, scheme)
    optimize(model, exact=True)
    names = {
        "embedding": "tok_embeddings", "attention": ".attention.", "feed_forward": "feed_forward",
        "norms": "norm.", "output": "output",
    }  # fmt: skip
    for kind, size in (
        Footprint(model.params, False, 1, "fp32", SCHEMES.get(scheme or "")).weights().items()
    ):
        weights = (w for name, w in model.state_dict().items() if names[kind] in name)
        assert storage_bytes(weights) == size, kind


@pytest.mark.parametrize("scheme", [None, "int8", "int4"])
@pytest.mark.parametrize("tied", [False, True])
def test_memory_of_a_built_model(
    tiny_checkpoint: Callable[..., Path],
    llama3_tokenizer_path: Path,
    scheme: str | None,
    tied: bool,
) -> None:
    """Weights, KV cache and rotary table of `Llama.build`."""
    folder = tiny_checkpoint(multiple_of=32)
    if tied:
        path = folder / "consolidated.00.pth"
        weights = torch.load(path, weights_only=True)
        torch.save(weights | {"output.weight": weights["tok_embeddings.weight"]}, path)
    path = llama3_tokenizer_path
    llama = Llama.build(folder, path, 24, 2, device="cpu", dtype=torch.bfloat16, quantize=scheme)
    model = llama.model
    planned = Footprint(model.params, tied, 1, "bf16", SCHEMES.get(scheme or "")).memory(2, 24)
    assert planned["weights"] == storage_bytes(iter(model.state_dict().values()))
    assert planned["kv_cache"] == sum(c.k.nbytes + c.v.nbytes for c in llama.engine.cache)
    assert planned["rotary_table"] == model.freqs_cis.nbytes


@pytest.mark.parametrize("name", RELEASES)
def test_published_sizes(name: str) -> None:
    params, tied, count, cache = release(name)
    footprint = Footprint(ModelArgs(**params), tied)
    assert sum(footprint.weights().values()) == 2 * count
    assert footprint.cache_token() == cache


def peak_bytes(run: Callable[[], object]) -> int:
    """Peak of the bytes that torch allocates on the CPU during `run`."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        run()
    assert profiled.profiler is not None
    events = [e for e in profiled.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("scheme", [None, "int8", "int4"])
@torch.inference_mode()
def test_activations_are_close_to_torchs_peak(dtype: str, scheme: str | None) -> None:
    """The peak may be lower: kernels unpack quantized weights in smaller blocks."""
    batch, context = 8, 1024
    args = ModelArgs(256, 2, 8, 2, vocab_size=3000, max_seq_len=context, max_batch_size=batch)
    model = Transformer(args).to(parse_dtype(dtype)).eval()
    quantize_model(model, scheme)
    optimize(model)
    cache = model.new_cache(batch, context)
    request = Request([1], max_gen_len=1, sampling=Sampling(0.6, 1.0))
    generations = [Generation(request, id) for id in range(batch)]

    def step(length: int) -> None:
        """Feed each row its last `length` ids, and sample one for each."""
        tokens = torch.zeros(batch, length, dtype=torch.int64)
        h = model.hidden(tokens, torch.full((batch,), context - length), cache, context)
        draw_at(model, h, [Place(generation, generation.id * length) for generation in generations])

    step(1)  # allocates what is kept between steps
    for length in (PREFILL_CHUNK // batch, 1):
        measured = peak_bytes(partial(step, length))
        estimate = Footprint(args, False, 1, dtype, SCHEMES.get(scheme or "")).activations(
            batch, batch * length, context
        )
        assert measured < 1.1 * estimate
        if scheme is None and (dtype != "fp32" or length > 1):  # a kernel stores no scores
            assert estimate < 1.3 * measured


def test_prefill_chunk_of_the_engine() -> None:
    model = Transformer(ModelArgs(dim=32, n_layers=1, n_heads=2, vocab_size=8, max_seq_len=4))
    assert Engine(model).prefill_chunk == PREFILL_CHUNK


def test_dtypes() -> None:
    """All names of a dtype; another name is an error."""
    args = ModelArgs(**SHAPES[0])
    sizes = [Footprint(args, False, dtype=name).itemsize for name in ("bf16", "bfloat16", "fp32")]
    assert sizes == [2, 2, 4]
    for wrong in ("int8", "auto"):
        with pytest.raises(ValueError, match=f"dtype '{wrong}'"):
            Footprint(args, False, dtype=wrong)
