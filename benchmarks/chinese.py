"""A larger vocabulary for Chinese: the demo model with and without it, after the same updates.

    python -m benchmarks.chinese --data zh.txt --english input.txt

DATA has paragraphs between empty lines, without duplicates here; some are held out. The demo model
gets new tokens from the others (`llama3 extend-vocab`); then it and the model without them are
trained on these, with the same number of updates of as many tokens (`llama3 finetune`), once for
each seed. Measured: tokens a character and bits a byte of the held-out text, and the perplexity of
the beginning of ENGLISH. Prints a table and one JSON line, which --out saves; --plot draws.

Runs that are complete in --folder are not repeated, and one that was stopped goes on. --workers 2
trains two at a time, each with one thread.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import regex
import torch

from benchmarks.adapters import train_once
from benchmarks.flags import check_counts, check_file
from benchmarks.report import Figure, finish, make_result
from benchmarks.script import run_benchmark
from llama import Llama
from llama.checkpoints.demo_model import ensure_demo_model
from llama.tokenizer import Tokenizer
from llama.train.extend_vocabulary import extend_vocabulary
from llama.train.finetune_settings import FinetuneSettings

WINDOW = 512  # tokens of a window in which a text is measured
HELD_OUT = 12_000  # bytes of held-out text, at least
ENGLISH = 16_000  # characters


class Arm(NamedTuple):
    """One of the two models that are compared: its base, and what is trained."""

    name: str
    base: Path
    settings: dict[str, Any]

    def out(self, folder: Path, seed: int) -> Path:
        """Where the adapter of a seed is."""
        return folder / f"{self.name.split()[0]}-{seed}"


def split(data: Path, folder: Path) -> tuple[Path, Path]:
    """Write zh-train.txt and zh-held-out.txt, whole paragraphs each, drawn with a fixed seed."""
    paragraphs = list(dict.fromkeys(data.read_text("utf-8").split("\n\n")))
    order = random.Random(0).sample(paragraphs, len(paragraphs))
    held: list[str] = []
    while order and sum(len(p.encode()) for p in held) < HELD_OUT:
        held.append(order.pop(0))
    kept = set(order)
    train, rest = folder / "zh-train.txt", folder / "zh-held-out.txt"
    train.write_text("\n\n".join(p for p in paragraphs if p in kept), "utf-8")
    rest.write_text("\n\n".join(held), "utf-8")
    return train, rest


def tokens_a_character(tokenizer: Tokenizer, text: str) -> float:
    """Tokens that hold part of a Chinese character, for each Chinese character."""
    marks = b"".join(
        (b"\1" if regex.match(r"\p{Han}", c) else b"\0") * len(c.encode()) for c in text
    )
    start = count = 0
    for i in tokenizer.encode(text, bos=False):
        stop = start + len(tokenizer.decode_bytes([i]))
        count += 1 in marks[start:stop]
        start = stop
    return count / len(regex.findall(r"\p{Han}", text))


def measure(base: Path, adapter: Path | None, chinese: str, english: str) -> dict[str, float]:
    """Bits a byte of the one text, perplexity of the other."""
    llama = Llama.build(base, max_seq_len=WINDOW, max_batch_size=1, adapter=adapter, device="cpu")
    zh, en = llama.perplexity(chinese), llama.perplexity(english)
    return {"bits": zh.bits_per_byte, "perplexity": en.perplexity}


def curve(out: Path, bytes_per_token: float) -> list[tuple[int, float]]:
    """(updates, bits a byte of the held-out text) at each evaluation of a run."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    scale = 1 / bytes_per_token / math.log(2)
    return [(line["step"], line["val_loss"] * scale) for line in lines if "val_loss" in line]


def arms_of(plain: Path, extended: Path, common: dict[str, Any], embeddings_lr: float) -> list[Arm]:
    """The base and the extended one, of which the new rows are trained too."""
    first = Tokenizer(plain / "tokenizer.model").n_words
    rows = {"train_embeddings": True, "embeddings_from": first, "embeddings_lr": embeddings_lr}
    return [
        Arm("without new tokens", plain, common),
        Arm("with new tokens", extended, common | rows),
    ]


def train_all(arms: Sequence[Arm], root: Path, text: Path, seeds: int, workers: int) -> None:
    """Train each arm with each seed, `workers` at a time."""
    jobs = [
        (arm.base, arm.out(root, seed), text, FinetuneSettings(**arm.settings, seed=seed))
        for seed in range(seeds)
        for arm in arms
    ]
    one_thread: dict[str, Any] = {"initializer": torch.set_num_threads, "initargs": (1,)}
    with ProcessPoolExecutor(workers, get_context("spawn"), **one_thread) as pool:
        list(pool.map(train_once, *zip(*jobs, strict=True)))


def figures_of(
    arm: Arm, outs: Sequence[Path], zh: str, en: str, before: float
) -> tuple[list[Figure], list[list[tuple[int, float]]]]:
    """The figures of an arm's adapters, and their curves. `before`: the base's perplexity."""
    tokenizer = Tokenizer(arm.base / "tokenizer.model")
    bytes_per_token = len(zh.encode()) / len(tokenizer.encode(zh, bos=False))
    found = [measure(arm.base, out, zh, en) for out in outs]
    bits, perplexity = ([f[key] for f in found] for key in ("bits", "perplexity"))
    worse = [100 * (p / before - 1) for p in perplexity]
    ratio = [tokens_a_character(tokenizer, zh)]
    figures = [
        Figure(arm.name, "tokens a Chinese character", "", ratio, better="lower"),
        Figure(arm.name, "held-out Chinese", "bits/byte", bits, better="lower"),
        Figure(arm.name, "English perplexity", "", perplexity, better="lower"),
        Figure(arm.name, "English, more than the base", "%", worse, better="lower"),
    ]
    return figures, [curve(out, bytes_per_token) for out in outs]


def measure_all(
    arms: Sequence[Arm], root: Path, seeds: int, zh: str, en: str
) -> tuple[list[Figure], dict[str, list[list[tuple[int, float]]]]]:
    """The figures of the base and of each arm, and the curves of each arm's runs."""
    before = measure(arms[0].base, None, zh, en)
    figures = [
        Figure("the demo model", "held-out Chinese", "bits/byte", [before["bits"]]),
        Figure("the demo model", "English perplexity", "", [before["perplexity"]]),
    ]
    curves = {}
    for arm in arms:
        outs = [arm.out(root, seed) for seed in range(seeds)]
        found, curves[arm.name] = figures_of(arm, outs, zh, en, before=before["perplexity"])
        figures += found
    return figures, curves


def save_plot(curves: dict[str, list[list[tuple[int, float]]]], path: Path) -> None:
    """Draw every run's curve, a color for each arm."""
    from matplotlib.figure import Figure as Canvas

    canvas = Canvas(figsize=(7, 4), layout="constrained")
    axes = canvas.subplots()
    for color, (arm, runs) in enumerate(curves.items()):
        for i, points in enumerate(runs):
            label = None if i else arm
            axes.plot(*zip(*points, strict=True), "o-", ms=3, color=f"C{color}", label=label)
    axes.set(xlabel="updates", ylabel="bits per byte of held-out Chinese text")
    axes.grid(alpha=0.3)
    axes.legend()
    canvas.savefig(path, format="png", dpi=100)


def main(
    data: str,
    english: str,
    folder: str = "chinese-runs",
    tokens: int = 4000,
    initial: str = "shares",
    updates: int = 200,
    batch_size: int = 2,
    block: int = 256,
    rank: int = 16,
    lr: float = 2e-3,
    embeddings_lr: float = 0.15,
    seeds: int = 3,
    workers: int = 1,
    out: str | None = None,
    plot: str | None = None,
) -> None:
    """Train both models with each seed, and measure them.

    Args:
        data: Chinese text, UTF-8, paragraphs between empty lines.
        english: English text; its first 16,000 characters are measured.
        folder: for the split text, the extended model and the adapters.
        initial: what the new rows begin as, see `llama3 extend-vocab`.
        embeddings_lr: the learning rate of the new rows, as a multiple of lr.
        workers: how many models are trained at a time.
        out: a JSON file to write.
        plot: a PNG file to write.
    """
    check_counts(tokens=tokens, updates=updates, seeds=seeds, workers=workers)
    check_file("out", out, ".json")
    root = Path(folder)
    root.mkdir(parents=True, exist_ok=True)
    text, held_out = split(Path(data), root)
    plain, extended = ensure_demo_model(), root / "extended"
    if not extended.exists():
        extend_vocabulary(plain, [text], extended, tokens, scripts=["Han"], initial=initial)
    common: dict[str, Any] = {
        "format": "text", "val_data": str(held_out), "method": "lora", "rank": rank, "lr": lr,
        "steps": updates, "batch_size": batch_size, "block": block, "samples": 0,
        "eval_every": max(1, updates // 5),
    }  # fmt: skip
    arms = arms_of(plain, extended, common, embeddings_lr)
    train_all(arms, root, text, seeds, workers)
    zh, en = held_out.read_text("utf-8"), Path(english).read_text("utf-8")[:ENGLISH]
    figures, curves = measure_all(arms, root, seeds, zh, en)
    if plot is not None:
        save_plot(curves, Path(plot))
    settings = arms[1].settings | {"tokens": tokens, "initial": initial, "seeds": seeds}
    del settings["val_data"]
    finish(make_result("chinese vocabulary", settings, figures, curves=curves), out)


if __name__ == "__main__":
    run_benchmark(main, "chinese")
