"""What LoRA and DPO teach the demo model on GSM8K: a lower loss, answers that end in "#### N".

    python -m benchmarks.gsm8k --data gsm8k-train.jsonl --val_data gsm8k-test.jsonl --work runs

For each seed: `llama3 finetune`; then the model answers some of the training questions, and DPO on
its merged weights prefers the data's solution to each answer that does not stop. Measured before,
between and after: the loss of held-out answers, and how greedy answers to held-out questions end.
What --work has from the same --steps, --asked and --questions is used again, so an interrupted
benchmark goes on. Prints a table and one JSON line, which --out saves; --plot draws the losses of
the first part.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.adapters import train_once
from benchmarks.report import Figure, finish, make_result
from benchmarks.script import run_benchmark
from llama import Llama
from llama.checkpoints.demo_model import checkpoint_or_demo
from llama.checkpoints.merge import merge
from llama.common.files import replacing_file
from llama.train.data_parallel import DataParallel
from llama.train.finetune_base import open_base
from llama.train.finetune_settings import FinetuneSettings
from llama.train.finetuning import Finetuning, base_samples
from llama.train.loop import Trainer
from llama.train.report import read_metrics

LONGEST = 300  # tokens of an answer
RESULT = re.compile(r"#### (-?[\d.,]*\d)$")


def gsm8k(
    data: str,
    val_data: str,
    work: str,
    checkpoint: str | None = None,
    seeds: str = "1,2,3",
    steps: int = 150,
    asked: int = 400,
    questions: int = 100,
    plot: str | None = None,
    out: str | None = None,
) -> None:
    """Fine-tune with each seed and evaluate.

    Args:
        data, val_data: dialogs of one question and one answer.
        work: folder of the runs.
        asked: training questions whose answers DPO learns from.
        questions: held-out questions to answer, spread evenly.
        plot: a PNG to draw.
    """
    base = checkpoint_or_demo(checkpoint, None)[0]
    folder = Path(work) / f"{steps}-updates-{asked}-asked-{questions}-questions"
    folder.mkdir(parents=True, exist_ok=True)
    held_out = spread(read_dialogs(val_data), questions)
    numbers = [int(seed) for seed in str(seeds).strip("()").split(",") if seed.strip()]
    found = [run_seed(base, folder, data, val_data, held_out, steps, asked, n) for n in numbers]
    if plot is not None:
        draw(numbers, [run.metrics for run in found], Path(plot))
    rows: dict[str, list[dict[str, float]]] = {
        "before": [found[0].before | answers(base, None, held_out, folder / "before.json")],
        "LoRA": [run.tuned for run in found],
        "LoRA, then DPO": [run.preferring for run in found],
    }
    first, figures = rows["before"][0]["loss"], []
    for row, scores in rows.items():
        losses = [score["loss"] for score in scores]
        figures.append(Figure(row, "loss", "nat", losses, better="lower"))
        lower = [100 * (1 - loss / first) for loss in losses]
        figures.append(Figure(row, "lower by", "%", lower, better="higher"))
        for column in ("ends in #### N and stops", "correct"):
            values = [100 * score[column] for score in scores]
            figures.append(Figure(row, column, "%", values, better="higher"))
    recorded = {"steps": steps, "asked": asked, "questions": len(held_out), "seeds": numbers}
    recorded |= {"lora": changed(tuning(steps, val_data, 0)), "dpo": changed(preferring(0))}
    finish(make_result("gsm8k, LoRA and DPO on the demo model", recorded, figures), out)


class Found(NamedTuple):
    """What was measured for a seed: {"loss", "ends in #### N and stops", "correct"}."""

    metrics: list[dict[str, Any]]  # of the first part
    before: dict[str, float]  # the loss alone
    tuned: dict[str, float]
    preferring: dict[str, float]


def run_seed(
    base: Path,
    folder: Path,
    data: str,
    val_data: str,
    held_out: Sequence[Any],
    steps: int,
    asked: int,
    seed: int,
) -> Found:
    """Train with a seed, unless that was done already, and evaluate."""
    runs = {kind: folder / f"{kind}-{seed}" for kind in ("lora", "merged", "dpo", "result")}
    settings = tuning(steps, val_data, seed)
    train_once(base, Path(data), runs["lora"], settings)
    metrics = read_metrics(runs["lora"] / "metrics.jsonl")
    losses = [line["val_loss"] for line in metrics if "val_loss" in line]
    tuned = {"loss": min(losses)}
    tuned |= answers(base, runs["lora"], held_out, folder / f"lora-{seed}.json")
    if not runs["merged"].exists():
        merge(base, runs["lora"], runs["merged"])
    pairs = folder / f"pairs-{seed}.jsonl"
    if not pairs.exists():
        dialogs = spread(read_dialogs(data), asked)
        answers(base, runs["lora"], dialogs, folder / f"asked-{seed}.json")
        write_pairs(dialogs, folder / f"asked-{seed}.json", pairs)
    train_once(runs["merged"], pairs, runs["dpo"], preferring(seed))
    if not runs["result"].exists():
        merge(runs["merged"], runs["dpo"], runs["result"])
    after = {"loss": held_out_loss(runs["result"], val_data, settings)}
    after |= answers(runs["result"], None, held_out, folder / f"dpo-{seed}.json")
    return Found(metrics, {"loss": losses[0]}, tuned, after)


def tuning(steps: int, val_data: str, seed: int) -> FinetuneSettings:
    """LoRA on the data."""
    return FinetuneSettings(
        steps=steps, batch_size=2, pack=True, max_seq_len=512, lr=1e-3, warmup=10,
        eval_every=50, eval_windows=60, samples=0, val_data=val_data, dtype="bfloat16", seed=seed,
    )  # fmt: skip


def preferring(seed: int) -> FinetuneSettings:
    """One epoch of DPO on the pairs."""
    return FinetuneSettings(
        method="dpo", epochs=1.0, batch_size=2, accumulate=4, lr=1e-4, warmup=2,
        val_fraction=0.03, eval_every=1000, samples=0, dtype="bfloat16", seed=seed,
    )  # fmt: skip


def changed(settings: FinetuneSettings) -> dict[str, Any]:
    """The settings that are not the defaults, but for files and the seed."""
    default = FinetuneSettings(method=settings.method)
    found = {k: v for k, v in asdict(settings).items() if v != getattr(default, k)}
    return {"method": settings.method} | {
        k: v for k, v in found.items() if k not in ("seed", "val_data")
    }


def held_out_loss(checkpoint: Path, val_data: str, settings: FinetuneSettings) -> float:
    """As the evaluations of a run with these settings: nats a token of the held-out answers."""
    base = open_base(checkpoint, None)
    samples = base_samples(base, [val_data], settings)
    ranks = DataParallel.initialize(None, torch.device("cpu"))
    task = Finetuning(settings, base, samples, checkpoint, ranks)
    return Trainer(task, ranks).evaluate()["val_loss"]


def write_pairs(dialogs: Sequence[Any], answered: Path, pairs: Path) -> None:
    """Preferences for the dialogs' own answers over those that did not stop."""
    rows = zip(dialogs, json.loads(answered.read_text("utf-8")), strict=True)
    found = [
        {"prompt": dialog[:-1], "chosen": dialog[-1]["content"], "rejected": text}
        for dialog, (text, reason) in rows
        if reason != "stop"
    ]
    if not found:
        raise ValueError(f"every answer in {answered} stops, so DPO has nothing to learn")
    with replacing_file(pairs) as partial:
        partial.write_text("".join(json.dumps(row) + "\n" for row in found), encoding="utf-8")


def spread(dialogs: Sequence[Any], count: int) -> list[Any]:
    """`count` of the dialogs at equal distances."""
    return list(dialogs[:: max(1, len(dialogs) // count)][:count])


def read_dialogs(path: str) -> list[list[dict[str, str]]]:
    """The messages of each line."""
    with open(path, encoding="utf-8") as lines:  # text may have other ends of lines inside
        return [json.loads(line)["messages"] for line in lines]


def answers(
    base: Path, adapter: Path | None, dialogs: Sequence[Any], kept: Path
) -> dict[str, float]:
    """Shares of the greedy answers that end as those of the data, and that are correct.

    Args:
        kept: a file with the answers; if it exists, it is read instead.
    """
    if not kept.exists():
        with Llama.build(base, adapter=adapter, max_seq_len=1024, max_batch_size=20) as llama:
            prompts = [dialog[:-1] for dialog in dialogs]
            found = llama.chat_completion(prompts, temperature=0.0, max_gen_len=LONGEST)
        content = [(a["generation"]["content"], a["finish_reason"]) for a in found]
        with replacing_file(kept) as partial:
            partial.write_text(json.dumps(content, indent=1), encoding="utf-8")
    given = [(result(text), reason) for text, reason in json.loads(kept.read_text("utf-8"))]
    wanted = [result(dialog[-1]["content"]) for dialog in dialogs]
    ended = [number is not None and reason == "stop" for number, reason in given]
    right = [number == right for (number, _), right in zip(given, wanted, strict=True) if number]
    return {
        "ends in #### N and stops": sum(ended) / len(dialogs),
        "correct": sum(right) / len(dialogs),
    }


def result(answer: str) -> str | None:
    """The number at the end of an answer in the form of the data, without commas."""
    found = RESULT.search(answer.strip())
    return found[1].replace(",", "") if found else None


def draw(seeds: Sequence[int], metrics: Sequence[Sequence[dict[str, Any]]], path: Path) -> None:
    """The losses of each seed by update."""
    from matplotlib.figure import Figure as Plot

    figure = Plot(figsize=(6, 3.2), layout="constrained")
    axes = figure.subplots()
    for number, lines in enumerate(metrics):
        trained = [line for line in lines if "train_loss" in line]
        held_out = [line for line in lines if "val_loss" in line]
        for found, key, style in ((trained, "train_loss", ":"), (held_out, "val_loss", "o-")):
            label = f"seed {seeds[number]}, held out" if key == "val_loss" else None
            x, y = [line["step"] for line in found], [line[key] for line in found]
            axes.plot(x, y, style, color=f"C{number}", linewidth=1.2, markersize=4, label=label)
    axes.set(xlabel="updates of about 1,000 tokens", ylabel="nats per token of the answers")
    axes.legend(frameon=False)
    figure.savefig(path, dpi=90)


if __name__ == "__main__":
    torch.set_num_threads(1)
    run_benchmark(gsm8k, "gsm8k")
