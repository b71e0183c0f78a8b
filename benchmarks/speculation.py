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
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
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
from llama.engine.request import Generation
from llama.engine.speculation import COSTS, POSITIONS, Speculation, Speculator
from llama.generation import build_draft
from llama.layers.optimize import optimize, quantize_model
from llama.model import Transformer
from llama.tokenizer import ChatFormat, Tokenizer

ROOM = 1024  # positions of the cache
GAIN = "ratio by medians of steps"
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


@dataclass
class Answer:
    """One answer, without the step that computed its prompt.

    Attributes:
        steps: (positions, seconds) of each.
    """

    generation: Generation
    tokens: int
    steps: list[tuple[int, float]]

    @property
    def seconds(self) -> float:
        """A token."""
        return sum(seconds for _, seconds in self.steps) / self.tokens

    def seconds_by(self, medians: Mapping[int, float]) -> float:
        """A token, if each step took the median of all steps with so many positions."""
        return sum(medians[positions] for positions, _ in self.steps) / self.tokens


def decode(engine: Engine, request: Request) -> Answer:
    """Answer a prompt; the time counts from its first token on."""
    generation = engine.add(request)
    while not generation.ids and not generation.finish_reason:
        engine.step()
    before, steps = len(generation.ids), []
    while not generation.finish_reason:
        proposed, start = generation.proposed, time.perf_counter()
        engine.step()
        steps.append((generation.proposed - proposed + 1, time.perf_counter() - start))
    return Answer(generation, max(1, len(generation.ids) - before), steps)


def medians_of_steps(answers: Iterable[Answer]) -> dict[int, float]:
    """{positions: median seconds} of all steps."""
    found: dict[int, list[float]] = {}
    for answer in answers:
        for positions, seconds in answer.steps:
            found.setdefault(positions, []).append(seconds)
    return {positions: statistics.median(some) for positions, some in found.items()}


def answers(
    size: str = "135m",
    dtype: str = "bfloat16",
    quantize: str | None = None,
    prompts: str = "repeating,ordinary",
    new: int = 128,
    rounds: int = 3,
    temperature: float = 0.0,
    draft: str | None = None,
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
        draft: a checkpoint that also proposes; "demo" is the demo model.
        out: a JSON file to write.
    """
    check(size, dtype, quantize)
    check_counts(new=new, rounds=rounds)
    check_file("out", out, ".json")
    model, tokenizer = build(size, dtype, quantize)
    options = Speculation(costs=COSTS[quantize or dtype])
    drafted = build_draft(ensure_demo_model() if draft == "demo" else draft, model, tokenizer)
    kinds = {kind: chosen(kind) for kind in prompts.split(",")}
    requests = {
        name: Request(
            ids_of(tokenizer, *prompt), new, Sampling(temperature, 0.9), 1,
            stop_tokens=tokenizer.stop_tokens,
        )
        for asked in kinds.values() for name, prompt in asked.items()
    }  # fmt: skip
    ways = {"without": Speculator(None), "with": Speculator(options, drafted)}
    figures = measured(Engine(model), ways, requests, rounds)
    figures += [figure for kind, asked in kinds.items() for figure in summary(kind, asked, figures)]
    settings: dict[str, Any] = {"size": size, "dtype": dtype, "quantize": quantize}
    settings |= {"prompts": prompts, "new": new, "rounds": rounds, "temperature": temperature}
    settings |= {"draft": draft}
    finish(make_result("speculation", settings, figures, row_heading="prompt"), out)


def measured(
    engine: Engine, ways: Mapping[str, Speculator], requests: Mapping[str, Request], rounds: int
) -> list[Figure]:
    """Answer alternately in both ways: a row for each request."""
    found: dict[str, dict[str, list[Answer]]] = {}
    for name, request in requests.items():
        found[name] = {way: [] for way in ways}
        for _ in range(rounds):
            for way, engine.speculator in ways.items():
                found[name][way].append(decode(engine, request))
    medians = medians_of_steps(x for each in found.values() for some in each.values() for x in some)
    return [figure for name in found for figure in figures_of(name, found[name], medians)]


def summary(kind: str, names: Iterable[str], figures: Sequence[Figure]) -> list[Figure]:
    """The median and the lowest ratio of some prompts; nothing for one prompt."""
    ratios = [f.runs[0] for f in figures if f.row in names and f.column == GAIN]
    if len(ratios) == 1:
        return []
    median, lowest = statistics.median(ratios), min(ratios)
    return [
        Figure(f"{kind}: median", GAIN, "", [median], better="higher"),
        Figure(f"{kind}: lowest", GAIN, "", [lowest], better="higher"),
    ]


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


def figures_of(
    name: str, found: Mapping[str, Sequence[Answer]], medians: Mapping[int, float]
) -> list[Figure]:
    """A row of the table.

    Args:
        found: the answers without and with speculation.
        medians: of all steps, by positions. A gain by these does not depend on when the machine
            was busy.
    """
    speeds = {way: [1 / answer.seconds for answer in some] for way, some in found.items()}
    without, last = found["without"][-1], found["with"][-1]
    ratio = statistics.median(speeds["with"]) / statistics.median(speeds["without"])
    gain = without.seconds_by(medians) / last.seconds_by(medians)
    return [
        *(Figure(name, way, "tok/s", some, better="higher") for way, some in speeds.items()),
        Figure(name, "ratio", "", [ratio], better="higher"),
        Figure(name, GAIN, "", [gain], better="higher"),
        Figure(name, "tokens", "", [len(last.generation.ids)]),
        Figure(name, "proposed", "", [last.generation.proposed]),
        Figure(name, "accepted", "", [last.generation.accepted]),
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
        row = f"{size} {quantize or dtype}, {n} position{'s' * (n > 1)}"
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
