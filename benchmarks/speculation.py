"""Speculation: decoding with and without it, alternately, on prompts that are in the repository.

    python -m benchmarks.speculation answers
    python -m benchmarks.speculation answers --size 1b --new 64 --prompts repeating --rounds 1
    python -m benchmarks.speculation costs --size 1b --quantize int8

The model is the demo model; with --size 1b it is widened to 1.25e9 parameters, see
`benchmarks.widened_model`. A prompt is computed once, and its time is not counted. `costs` measures
what a check of several tokens takes, of which `llama.engine.speculation` has a table.
Prints a table and one JSON line, which --out saves.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch

from benchmarks.flags import check_counts, check_file, check_model
from benchmarks.report import Figure, finish, make_result
from benchmarks.script import run_benchmark
from benchmarks.speculation_prompts import ORDINARY, REPEATING
from benchmarks.widened_model import widened
from llama import Llama, Request, Sampling, ensure_demo_model
from llama.checkpoints.open import open_checkpoint, open_tokenizer
from llama.common.dtypes import parse_dtype
from llama.engine.engine import Engine
from llama.engine.speculation import COSTS, POSITIONS, Speculation, Speculator
from llama.layers.optimize import optimize, quantize_model
from llama.model import Transformer
from llama.tokenizer import ChatFormat, Tokenizer

ROOM = 1024  # positions of the cache
PROMPTS = {"repeating": REPEATING, "ordinary": {text: (text, "") for text in ORDINARY}}


def build(size: str, dtype: str, quantize: str | None) -> tuple[Transformer, Tokenizer]:
    """The demo model, or as large as 1B, with its tokenizer."""
    folder = ensure_demo_model()
    tokenizer = open_tokenizer(open_checkpoint(folder), None)
    if size == "1b":
        model = widened(folder, ROOM).to(parse_dtype(dtype))
        quantize_model(model, quantize)
        optimize(model)
    else:
        llama = Llama.build(folder, max_seq_len=ROOM, device="cpu", dtype=dtype, quantize=quantize)
        model = llama.model
    unused = tokenizer.pad_to(model.vocab_size)
    model.unused = torch.tensor(unused, device="cpu") if unused else None
    return model, tokenizer


def ids_of(tokenizer: Tokenizer, asked: str, begins: str) -> list[int]:
    """A chat prompt and the beginning of its answer."""
    prompt = ChatFormat(tokenizer).encode_dialog_prompt([{"role": "user", "content": asked}])
    return prompt + tokenizer.encode(begins, bos=False, eos=False)


def decode(engine: Engine, request: Request) -> tuple[float, Any]:
    """(seconds a token after the first, the generation)."""
    generation = engine.add(request)
    engine.wait(lambda: generation.ids or generation.finish_reason)
    before, start = len(generation.ids), time.perf_counter()
    engine.wait(lambda: generation.finish_reason)
    seconds = time.perf_counter() - start
    return seconds / max(1, len(generation.ids) - before), generation


def answers(
    size: str = "135m",
    dtype: str = "bfloat16",
    quantize: str | None = None,
    prompts: str = "repeating,ordinary",
    new: int = 128,
    rounds: int = 3,
    temperature: float = 0.0,
    out: str | None = None,
) -> None:
    """Answer each prompt with and without speculation.

    Args:
        size: 135m (the demo model) or 1b.
        dtype: bfloat16 or float32.
        quantize: int8 or int4.
        prompts: repeating, ordinary, or the beginning of a prompt's name; several with commas.
        new: tokens of an answer.
        rounds: of all prompts.
        temperature: 0 is greedy; else with a seed and top_p 0.9.
        out: a JSON file to write.
    """
    check(size, dtype, quantize)
    check_counts(new=new, rounds=rounds)
    check_file("out", out, ".json")
    model, tokenizer = build(size, dtype, quantize)
    options = Speculation(costs=COSTS[quantize or dtype])
    engine = Engine(model)
    ways = {"without": Speculator(None), "with": Speculator(options)}
    figures = []
    for kind in prompts.split(","):
        ratios = []
        for name, (asked, begins) in chosen(kind).items():
            request = Request(
                ids_of(tokenizer, asked, begins), new, Sampling(temperature, 0.9), 1,
                stop_tokens=tokenizer.stop_tokens,
            )  # fmt: skip
            seconds: dict[str, list[float]] = {which: [] for which in ways}
            last: Any = None
            for _ in range(rounds):
                for which, engine.speculator in ways.items():
                    found, last = decode(engine, request)
                    seconds[which].append(found)
            figures += figures_of(name, seconds, last)
            ratios.append(median_ratio(seconds))
        figures.append(Figure(f"{kind}: median", "gain", "", [statistics.median(ratios)]))
        figures.append(Figure(f"{kind}: lowest", "gain", "", [min(ratios)]))
    settings: dict[str, Any] = {"size": size, "dtype": dtype, "quantize": quantize}
    settings |= {"prompts": prompts, "new": new, "rounds": rounds, "temperature": temperature}
    finish(make_result("speculation", settings, figures, row_heading="prompt"), out)


def chosen(kind: str) -> dict[str, tuple[str, str]]:
    """The prompts of a kind, or those whose name begins so.

    Raises:
        ValueError: there is none.
    """
    if kind in PROMPTS:
        return PROMPTS[kind]
    every = PROMPTS["repeating"] | PROMPTS["ordinary"]
    found = {name: prompt for name, prompt in every.items() if name.startswith(kind)}
    if not found:
        raise ValueError(f"there is no prompt {kind!r}; use repeating or ordinary")
    return found


def median_ratio(seconds: dict[str, list[float]]) -> float:
    """The gain: median time without over median time with."""
    return statistics.median(seconds["without"]) / statistics.median(seconds["with"])


def figures_of(name: str, seconds: dict[str, list[float]], last: Any) -> list[Figure]:
    """A row of the table.

    Args:
        last: the last generation with speculation.
    """
    speeds = [
        Figure(name, which, "tok/s", [1 / x for x in some], better="higher")
        for which, some in seconds.items()
    ]
    return [
        *speeds,
        Figure(name, "gain", "", [median_ratio(seconds)], better="higher"),
        Figure(name, "tokens", "", [len(last.ids)]),
        Figure(name, "proposed", "", [last.proposed]),
        Figure(name, "accepted", "", [last.accepted]),
    ]


def costs(
    size: str = "135m",
    dtype: str = "bfloat16",
    quantize: str | None = None,
    seconds: float = 8.0,
    out: str | None = None,
) -> None:
    """Time a step of 1, 2, 4, 8 and 16 positions, alternately, after 256 cached ones.

    Args:
        size, dtype, quantize, out: as of `answers`.
        seconds: of measuring.
    """
    check(size, dtype, quantize)
    check_file("out", out, ".json")
    model, _ = build(size, dtype, quantize)
    cache = model.new_cache(1, ROOM)
    times: dict[int, list[float]] = {n: [] for n in POSITIONS}
    with torch.inference_mode():
        model.hidden(torch.zeros(1, 256, dtype=torch.long, device="cpu"), 0, cache)
        end = time.perf_counter() + seconds
        while time.perf_counter() < end or len(times[1]) < 3:
            for n, some in times.items():
                tokens = torch.arange(n, dtype=torch.long, device="cpu").unsqueeze(0)
                start = time.perf_counter()
                model.logits(model.hidden(tokens, 256, cache)[0]).argmax(-1).tolist()
                some.append(time.perf_counter() - start)
    one = statistics.median(times[1])
    figures = []
    for n, some in times.items():
        row = f"{n} positions"
        figures.append(Figure(row, "step", "ms", [1e3 * x for x in some], better="lower"))
        figures.append(Figure(row, "relative", "", [statistics.median(some) / one]))
    settings = {"size": size, "dtype": dtype, "quantize": quantize, "seconds": seconds}
    finish(make_result("speculation, costs", settings, figures), out)


def check(size: str, dtype: str, quantize: str | None) -> None:
    """Check the names of a size, a dtype and a quantization scheme."""
    if size not in ("135m", "1b"):
        raise ValueError(f"unknown size {size!r}; use 135m or 1b")
    check_model(size, dtype, quantize)


if __name__ == "__main__":
    run_benchmark({"answers": answers, "costs": costs}, "speculation")
