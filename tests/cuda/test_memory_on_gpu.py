"""Memory of a GPU: given back, and running out of it."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from llama import Engine, Llama
from tests.cuda.cases import DEVICE, assert_as_on_cpu, greedy, make_engine, prompt

pytestmark = pytest.mark.cuda


def allocated() -> int:
    """Bytes, after everything that can be freed has been."""
    gc.collect()
    if DEVICE.type != "cuda":
        return 0
    torch.cuda.synchronize()
    torch._C._cuda_clearCublasWorkspaces()
    torch.cuda.empty_cache()
    return torch.cuda.memory_allocated()


@pytest.mark.parametrize(
    ("compile", "quantize"), [(False, None), (True, None), (False, "int4"), (False, "int8")]
)
def test_a_closed_model_gives_its_memory_back(
    compile: bool,
    quantize: str | None,
    tiny_checkpoint: Callable[..., Path],
    byte_tokenizer_path: Path,
) -> None:
    """All of it; and a second build in the same process is the same model."""
    folder, answers, sizes = tiny_checkpoint(vocab_size=512, dim=256, multiple_of=64), [], []
    before = allocated()
    for _ in range(2):
        llama = Llama.build(
            folder, byte_tokenizer_path, 300, 3, device=DEVICE, dtype=torch.bfloat16,
            compile=compile, quantize=quantize,
        )  # fmt: skip
        rows = [prompt(5), prompt(270)]
        answers.append(llama.generate(rows, max_gen_len=12, temperature=0.0)[0])
        llama.close()
        del llama
        sizes.append(allocated())
    assert answers[0] == answers[1]
    assert sizes[0] - before < 1 << 20 and sizes[1] - sizes[0] < 1 << 16


@pytest.fixture
def limited() -> Iterator[Callable[[int], None]]:
    """A function that limits this process to so many bytes more than it has."""

    def limit(more: int) -> None:
        allocated()
        total = torch.cuda.get_device_properties(DEVICE).total_memory
        torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + more) / total)

    yield limit
    torch.cuda.set_per_process_memory_fraction(1.0)


@pytest.mark.parametrize("compile", [False, True])
def test_out_of_memory_ends_one_request(
    compile: bool, gpu_only: None, limited: Callable[[int], None]
) -> None:
    engine = make_engine(compile=compile, room=16384, prefill_chunk=16384)
    engine.run([greedy(prompt(5), 8)])
    short = engine.add(greedy(prompt(6), 30))
    while len(short.ids) < 3:
        engine.step()
    limited(32 << 20)
    long = engine.add(greedy(prompt(16000), 4))
    engine.wait(lambda: short.finish_reason and long.finish_reason)
    assert long.finish_reason == "error" and isinstance(long.error, torch.OutOfMemoryError)
    assert_as_on_cpu([short])
    torch.cuda.set_per_process_memory_fraction(1.0)
    assert_as_on_cpu(engine.run([greedy(prompt(7), 10)]))
    [again] = engine.run([greedy(prompt(16000), 4)])
    assert again.error is None and len(again.ids) == 4


def test_no_memory_is_lost_from_step_to_step(gpu_only: None, compiled: Engine) -> None:
    sizes = []
    for i in range(4):
        compiled.run([greedy(prompt(n, seed=i), 10) for n in (5, 80, 300)])
        gc.collect()
        torch.cuda.synchronize()
        sizes.append(torch.cuda.memory_allocated())  # graphs need the workspaces of cuBLAS
    assert sizes[3] - sizes[1] < 1 << 16
