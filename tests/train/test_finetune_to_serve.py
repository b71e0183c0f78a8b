"""From a JSON file to an answer over HTTP, by the commands of the docs, on a tiny base."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llama import Llama
from llama.checkpoints.convert import convert
from llama.checkpoints.merge import merge
from tests.server.running import NAME, RunningServer
from tests.train.finetune_cases import write_dialogs

QUESTION, ANSWER = "Who are you?", "A tiny model."


def llama3(*arguments: object) -> str:
    """Run the command in a process of its own; return what it prints."""
    command = [sys.executable, "-m", "llama", *map(str, arguments), "-q"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_finetune_merge_convert_serve(
    tmp_path: Path, tiny_checkpoint: Callable[..., Path], byte_tokenizer_path: Path
) -> None:
    """The openai client gets the answer of the data, from the adapter and from the merged model."""
    base, adapter = tiny_checkpoint(vocab_size=512), tmp_path / "adapter"
    shutil.copy(byte_tokenizer_path, base / "tokenizer.model")
    data = write_dialogs(tmp_path / "data.jsonl", [(QUESTION, ANSWER), ("And who am I?", "You.")])
    shown = llama3("finetune", "-m", base, "--data", data, "--show", 1, "--val_fraction", 0)
    assert f"{QUESTION}<|eot_id|>" in shown and f"\n\n[[{ANSWER}<|eot_id|>]]" in shown
    where = ["-m", base, "--data", data, "--out", adapter, "--device", "cpu", "--dtype", "fp32"]
    flags = ["--val_fraction", 0, "--steps", 60, "--lr", 0.02, "--samples", 0]
    printed = llama3("finetune", *where, *flags)
    assert f"llama3 merge {base} {adapter} {adapter}-merged" in printed
    merge(base, adapter, tmp_path / "merged")
    convert(tmp_path / "merged", tmp_path / "hf", "hf")

    def answer(llama: Llama) -> str | None:
        server = RunningServer(lambda: llama).wait_until_ready()
        try:
            reply = server.openai().chat.completions.create(
                model=NAME, messages=[{"role": "user", "content": QUESTION}], temperature=0
            )
        finally:
            server.close()
        assert reply.choices[0].finish_reason == "stop"
        return reply.choices[0].message.content

    size: dict[str, Any] = {"max_seq_len": 128, "device": "cpu", "dtype": "fp32"}
    assert answer(Llama.build(base, adapter=adapter, **size)) == ANSWER
    assert answer(Llama.build(tmp_path / "hf", **size)) == ANSWER
