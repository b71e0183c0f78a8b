"""On a GPU in fp32 the ids are those of the CPU, and log-probabilities agree within 1e-4."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from llama import Engine, Llama, Request, Sampling
from llama.checkpoints.demo_model import FILES, NAME, cache_dir
from tests.cuda.cases import (
    DEVICE,
    SHAPES,
    assert_as_on_cpu,
    assert_close,
    greedy,
    make_engine,
    make_model,
    on_cpu,
    prompt,
)

pytestmark = pytest.mark.cuda


def test_ragged_batches(engine: Engine) -> None:
    """More requests than rows, of different lengths."""
    lengths = (3, 17, 40, 5, 100, 1)
    assert_as_on_cpu(engine.run([greedy(prompt(n), 24) for n in lengths]))


@pytest.mark.parametrize("compile", [False, True])
def test_wide_heads(compile: bool) -> None:
    engine = make_engine("heads of 128", compile=compile)
    generations = engine.run([greedy(prompt(n), 20) for n in (2, 30, 9)])
    assert_as_on_cpu(generations, "heads of 128")


def test_growing_past_256_positions(engine: Engine) -> None:
    """Also of a prompt that is longer, and beside a short row."""
    assert_as_on_cpu(engine.run([greedy(prompt(n), 30) for n in (240, 4)]))
    assert_as_on_cpu(engine.run([greedy(prompt(n), 12) for n in (505, 300, 7)]))


def test_the_last_position_of_the_cache(engine: Engine) -> None:
    [generation] = engine.run([greedy(prompt(632), 100)])
    assert generation.finish_reason == "length" and len(generation.tokens) == 640
    assert_as_on_cpu([generation])


def test_scored_prompts(engine: Engine) -> None:
    generations = engine.run([greedy(prompt(n), 0, score_from=1) for n in (2, 150, 64)])
    assert len(generations[1].prompt_logprobs) == 150
    assert_as_on_cpu(generations)


def test_reused_prefixes(engine: Engine) -> None:
    first = prompt(64, seed=1)
    [begun] = engine.run([greedy(first, 8)])
    turn = greedy([*begun.tokens, *prompt(5)], 8)
    again = engine.run([turn, turn])
    assert [generation.reused > 32 for generation in again] == [True, True]
    assert_as_on_cpu(again)


def test_seeds(engine: Engine) -> None:
    """The same draws as on the CPU, whatever runs beside them."""
    how = Sampling(0.8, 0.9)
    requests = [Request(prompt(9, seed=i), 20, how, seed=i) for i in range(5)]
    for generation in engine.run([*requests, greedy(prompt(3), 30)])[:5]:
        assert generation.ids == on_cpu(generation.request).ids


def test_requests_come_and_go(engine: Engine) -> None:
    """The number of rows changes while others run."""
    long = [engine.add(greedy(prompt(n), 40)) for n in (11, 12)]
    for _ in range(5):
        engine.step()
    short = [engine.add(greedy(prompt(n), 6)) for n in (13, 14, 15)]
    for _ in range(3):
        engine.step()
    engine.cancel(long[0].id)
    engine.cancel(short[2].id)
    late = engine.add(greedy(prompt(260), 20))
    generations = [*long, *short, late]
    engine.wait(lambda: all(generation.finish_reason for generation in generations))
    assert long[0].finish_reason == short[2].finish_reason == "cancelled" and long[0].ids
    assert_as_on_cpu(generations)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_optimized_model_is_the_plain_one(shape: str) -> None:
    """Logits of a prompt, of a part of it after the cache, and of single ids at two positions."""
    plain = make_model(shape, torch.device("cpu"))
    found, wanted = make_engine(shape).model, plain
    ids = torch.tensor([prompt(40), prompt(40, seed=1)])
    with torch.inference_mode():
        for columns, start in ((slice(0, 30), 0), (slice(30, 39), 30), (slice(39, 40), 39)):
            some = ids[:, columns]
            logits = found(some.to(DEVICE), start).cpu()
            torch.testing.assert_close(logits, wanted(some, start), rtol=0, atol=1e-4)
        starts, some = torch.tensor([20, 40]), ids[:, :1]
        logits = found(some.to(DEVICE), starts.to(DEVICE)).cpu()
        torch.testing.assert_close(logits, wanted(some, starts), rtol=0, atol=1e-4)


@pytest.mark.parametrize("compile", [False, True])
def test_bf16_differs_by_rounding(compile: bool) -> None:
    """Not more than three times as much as bf16 on the CPU does."""
    request = greedy(prompt(90), 0, score_from=1)
    exact = torch.tensor(on_cpu(request).prompt_logprobs[1:])
    cpu = Engine(make_model("heads of 64", torch.device("cpu"), torch.bfloat16))
    errors = []
    for engine in (cpu, make_engine(dtype=torch.bfloat16, compile=compile)):
        [generation] = engine.run([request])
        errors.append((torch.tensor(generation.prompt_logprobs[1:]) - exact).abs().mean())
        steps = engine.run([greedy(generation.tokens[:n], 3) for n in (30, 50)])
        for step in steps:  # and single steps, after other ids perhaps: of the first id
            wanted = on_cpu(step.request)
            if step.ids[0] == wanted.ids[0]:
                assert_close(step.generated_logprobs[:1], wanted.generated_logprobs[:1], 0.1)
    assert 0 < errors[1] < 3 * errors[0] + 1e-3


@pytest.mark.parametrize("compile", [False, True])
def test_streams(
    compile: bool, tiny_checkpoint: Callable[..., Path], byte_tokenizer_path: Path
) -> None:
    """Text by the public class, greedy and with a seed, in a stream and whole."""
    folder = tiny_checkpoint(vocab_size=512, dim=256)
    texts = []
    for device in (DEVICE, torch.device("cpu")):
        llama = Llama.build(
            folder, byte_tokenizer_path, 300, 3, device=device, dtype=torch.float32,
            compile=compile and device == DEVICE,
        )  # fmt: skip
        stream = llama.text_stream("Some words", max_gen_len=30, temperature=0.0)
        pieces = "".join(piece.text for piece in stream)
        prompts = ["Some words", "b", "and others than these"]
        answers = llama.text_completion(prompts, 0.0, max_gen_len=30)
        whole = [answer["generation"] for answer in answers]
        answers = llama.text_completion(prompts, 0.9, max_gen_len=20, seed=5)
        seeded = [answer["generation"] for answer in answers]
        assert pieces == whole[0]
        texts.append([whole, seeded])
        llama.close()
    assert texts[0] == texts[1]


@pytest.mark.parametrize("compile", [False, True])
def test_the_demo_model(compile: bool) -> None:
    folder = cache_dir() / NAME
    if not all((folder / name).is_file() for name in FILES):
        pytest.skip("the demo model is not on this machine; `llama3 download demo` fetches it")
    answers = []
    for device in (DEVICE, torch.device("cpu")):
        llama = Llama.build(
            folder, folder / "tokenizer.model", 128, 2, device=device, dtype=torch.float32,
            compile=compile and device == DEVICE,
        )  # fmt: skip
        ids = [llama.tokenizer.encode(text, bos=True, eos=False) for text in ("The sea", "One")]
        answers.append(llama.generate(ids, 24, temperature=0.0)[0])
        llama.close()
    assert answers[0] == answers[1]
