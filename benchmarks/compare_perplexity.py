"""Perplexity of one text by this library and by llama.cpp, each with the demo model's weights.

Both predict the same ids: the text is cut into windows, and each id of a window but the first is
predicted from those before it.

Shapes: T ids of a window, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.flags import check_counts, check_file
from benchmarks.llama_cpp_peer import BATCH, LlamaCpp
from benchmarks.peers import (
    LLAMA_CPP,
    OURS,
    SYSTEMS,
    Job,
    check_systems,
    ours,
    title,
    write_weights,
)
from benchmarks.report import Figure, finish, make_result
from benchmarks.workers import Worker
from llama.checkpoints.demo_model import ensure_demo_model
from llama.checkpoints.open import open_checkpoint, open_tokenizer
from llama.engine.scoring import read_text

DTYPE = "bfloat16"


class Predictor:
    """A system that scores ids, as an object for a `Worker`."""

    def __init__(self, name: str, job: Job):
        program, scheme = SYSTEMS[name]
        if program == OURS:
            self.engine = ours(job, scheme)
        self.theirs: LlamaCpp | None = None
        if program == LLAMA_CPP:
            self.theirs = LlamaCpp(job.gguf(scheme), 1, job.length, precise=False)

    @torch.inference_mode()
    def perplexity(self, windows: Sequence[Sequence[int]]) -> float:
        total, n = 0.0, 0
        for ids in windows:
            logits, targets = self._logits(list(ids[:-1])), torch.tensor(ids[1:])
            total += float(F.cross_entropy(logits.float(), targets, reduction="sum"))
            n += len(targets)
        return math.exp(total / n)

    def _logits(self, ids: list[int]) -> Tensor:
        """(T, V), the prediction after each id."""
        if self.theirs is not None:
            return self.theirs.all_logits(ids)
        logits: Tensor = self.engine.model(torch.tensor([ids]), 0)[0]
        return logits


COMPARED = ",".join(name for name, made in SYSTEMS.items() if made[0] in (OURS, LLAMA_CPP))


def perplexity(
    file: str,
    systems: str = COMPARED,
    tokens: int = 8192,
    window: int = 512,
    out: str | None = None,
) -> None:
    """Measure and print.

    Args:
        file: a text in UTF-8.
        systems: names of this library's and llama.cpp's, separated by commas.
        tokens: of the text, from its beginning.
        window: tokens of a window.
        out: a JSON file to write.
    """
    check_file("out", out, ".json")
    check_counts(tokens=tokens, window=window)
    if not 2 <= window <= BATCH:
        raise ValueError(f"--window must be 2 to {BATCH}, not {window}")
    names, notes = check_systems(systems)
    if others := [name for name in names if SYSTEMS[name][0] not in (OURS, LLAMA_CPP)]:
        raise ValueError(f"--systems: {others[0]} has no perplexity here")
    source = open_checkpoint(ensure_demo_model())
    ids = open_tokenizer(source).encode(read_text(file), bos=False)[:tokens]
    windows = [ids[i : i + window] for i in range(0, len(ids) - 1, window)]
    found: dict[str, float] = {}
    with TemporaryDirectory(prefix="benchmark-") as folder:
        job = Job(dict(source.params), Path(folder), DTYPE, rows=1, length=window)
        write_weights(job, source, names)
        for name in names:
            with Worker(name, Predictor, name, job) as worker:
                found[name] = worker.call("perplexity", windows)
    figures = []
    for name, value in found.items():
        row, program = title(name, DTYPE), SYSTEMS[name][0]
        figures.append(Figure(row, "perplexity", "", [value], better="lower"))
        if program in found:  # the same program's unquantized weights
            more = 100 * (value / found[program] - 1)
            figures.append(Figure(row, "above its bfloat16", "%", [more], better="lower"))
    settings = {"file": Path(file).name, "tokens": len(ids), "window": window, "systems": names}
    result = make_result(
        "compare perplexity", settings, figures, row_heading="demo model", notes=notes
    )
    finish(result, out)
