"""What LoRA teaches the demo model on GSM8K: a lower loss, and answers that end in "#### N".

    python -m benchmarks.gsm8k --data gsm8k-train.jsonl --val_data gsm8k-test.jsonl --work runs

For each seed: `llama3 finetune`, then greedy answers to held-out questions, and before that those
of the model as it is. What --work has is used again, so an interrupted benchmark goes on. Prints a
table and one JSON line, which --out saves; --plot draws the losses. With more --steps it trains on.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks.report import Figure, finish, make_result
from benchmarks.script import run_benchmark
from llama import Llama
from llama.checkpoints.demo_model import checkpoint_or_demo
from llama.common.files import replacing_file
from llama.train.finetune_settings import FinetuneSettings
from llama.train.finetuning import finetune
from llama.train.report import read_metrics

LONGEST = 300  # tokens of an answer
RESULT = re.compile(r"#### (-?[\d.,]*\d)$")


def gsm8k(
    data: str,
    val_data: str,
    work: str,
    checkpoint: str | None = None,
    seeds: int = 3,
    steps: int = 150,
    questions: int = 100,
    plot: str | None = None,
    out: str | None = None,
) -> None:
    """Fine-tune with the seeds 1, 2, ... and evaluate.

    Args:
        data, val_data: dialogs of one question and one answer.
        work: folder of the runs.
        questions: held-out questions to answer, spread evenly.
        plot: a PNG to draw.
    """
    base, folder = checkpoint_or_demo(checkpoint, None)[0], Path(work)
    folder.mkdir(parents=True, exist_ok=True)
    dialogs = read_dialogs(val_data)
    dialogs = dialogs[:: max(1, len(dialogs) // questions)][:questions]
    metrics: list[list[dict[str, Any]]] = []
    scores = {"before": [answers(base, None, dialogs, folder / "before.json")]}
    for seed in range(1, seeds + 1):
        run = folder / f"seed-{seed}"
        settings = FinetuneSettings(
            steps=steps, batch_size=2, pack=True, max_seq_len=512, lr=1e-3, warmup=10,
            eval_every=50, eval_windows=60, samples=0, val_data=val_data, dtype="bfloat16",
            seed=seed,
        )  # fmt: skip
        resume = (run / "train").is_dir()
        finetune(base, [data], run, settings, resume=resume, device="cpu")
        metrics.append(read_metrics(run / "metrics.jsonl"))
        after = answers(base, run, dialogs, folder / f"seed-{seed}-{steps}.json")
        scores.setdefault("after", []).append(after)
    if plot is not None:
        draw(metrics, Path(plot))
    losses = [[line["val_loss"] for line in lines if "val_loss" in line] for lines in metrics]
    fallen = [1 - line[-1] / line[0] for line in losses]
    figures = [
        Figure("before", "loss", "nat", [line[0] for line in losses]),
        Figure("after", "loss", "nat", [line[-1] for line in losses], better="lower"),
        Figure("after", "lower by", "%", [100 * x for x in fallen], better="higher"),
    ]
    for row, found in scores.items():
        for column in ("ends in #### N and stops", "correct"):
            values = [100 * score[column] for score in found]
            figures.append(Figure(row, column, "%", values, better="higher"))
    recorded = asdict(settings) | {"questions": len(dialogs), "seed": None, "seeds": seeds}
    finish(make_result("gsm8k, LoRA on the demo model", recorded, figures), out)


def read_dialogs(path: str) -> list[list[dict[str, str]]]:
    """The messages of each line."""
    lines = Path(path).read_text(encoding="utf-8").splitlines()
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


def draw(metrics: Sequence[Sequence[dict[str, Any]]], path: Path) -> None:
    """The losses of each seed by update."""
    from matplotlib.figure import Figure as Plot

    figure = Plot(figsize=(6, 3.2), layout="constrained")
    axes = figure.subplots()
    for number, lines in enumerate(metrics):
        trained = [line for line in lines if "train_loss" in line]
        held_out = [line for line in lines if "val_loss" in line]
        for found, key, style in ((trained, "train_loss", ":"), (held_out, "val_loss", "o-")):
            label = f"seed {number + 1}, held out" if key == "val_loss" else None
            x, y = [line["step"] for line in found], [line[key] for line in found]
            axes.plot(x, y, style, color=f"C{number}", linewidth=1.2, markersize=4, label=label)
    axes.set(xlabel="updates of about 1,000 tokens", ylabel="nats per token of the answers")
    axes.legend(frameon=False)
    figure.savefig(path, dpi=90)


if __name__ == "__main__":
    torch.set_num_threads(1)
    run_benchmark(gsm8k, "gsm8k")
