"""Stop strings in a batch: where a row ends, and what it returns, also with several threads."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from llama import Llama, Piece
from llama.generation import Answer


@pytest.fixture(scope="module")
def tiny(tiny_checkpoint: Callable[..., Path], llama3_tokenizer_path: Path) -> Llama:
    """A random model with the real vocabulary, 64 positions, 4 rows."""
    folder = tiny_checkpoint()
    return Llama.build(
        folder, llama3_tokenizer_path, 64, 4, device="cpu", dtype=torch.float32, speculate=False
    )


def stop_in_a_batch(llama: Llama) -> tuple[dict[str, Any], list[Any], int]:
    """(arguments, expected predictions, id count of row 0) of a batch in which row 0 stops first.

    Expected are the predictions without a stop string, cut at the first id that completes it.
    """
    texts = ["Hello", "Other text", "A third"]
    options: dict[str, Any] = {"temperature": 0, "max_gen_len": 20, "logprobs": True}
    free = llama.text_completion(texts, **options)
    stop = free[0]["tokens"][7]
    expected, used = [], []
    for prediction in free:
        n = next((i for i in range(1, 21) if stop in "".join(prediction["tokens"][:i])), 0)
        text = prediction["generation"]
        expected.append(
            {
                "generation": text[: text.index(stop)] if n else text,
                "finish_reason": "stop" if n else "length",
                "tokens": prediction["tokens"][: n or 20],
                "logprobs": pytest.approx(prediction["logprobs"][: n or 20], abs=1e-4),
            }
        )
        used.append(n or 20)
    assert used[0] < 20 and used[1:] == [20, 20]
    return {"prompts": texts, **options, "stop": [stop]}, expected, used[0]


def test_a_stop_string_ends_its_row_at_once(tiny: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments, expected, n = stop_in_a_batch(tiny)
    rows: list[int] = []
    hidden = tiny.model.hidden

    def spy(tokens: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        rows.append(len(tokens))
        return hidden(tokens, *args, **kwargs)

    monkeypatch.setattr(tiny.model, "hidden", spy)
    assert tiny.text_completion(**arguments) == expected
    assert rows == [3] * n + [2] * (20 - n)


def test_a_stop_string_cuts_at_the_same_id_whichever_thread_steps(
    tiny: Llama, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another thread steps all the time, so that ids after the stop string exist before it is read.

    Between two reads of an answer the other thread makes two steps or more.
    """
    arguments, expected, n = stop_in_a_batch(tiny)
    prompts = [tiny.tokenizer.encode(t, bos=True, eos=False) for t in arguments["prompts"]]
    more = {key: arguments[key] for key in ("temperature", "max_gen_len", "logprobs", "stop")}
    engine, ended, read = tiny.engine, threading.Event(), Answer.read
    beyond: list[int] = []  # per answer that a stop string ended: how many ids are cut off

    def read_late(answer: Answer) -> Piece | None:
        target, deadline = engine.steps + 2, time.monotonic() + 60
        while engine.steps < target and engine.busy and time.monotonic() < deadline:
            time.sleep(0.001)
        piece = read(answer)
        if piece is not None and answer.finish_reason == "stop":
            beyond.append(len(answer.generation.ids) - len(answer.ids))
        return piece

    def step_on() -> None:
        while not ended.is_set():
            engine.step()

    monkeypatch.setattr(Answer, "read", read_late)
    stepper = threading.Thread(target=step_on)
    stepper.start()
    try:
        for _ in range(3):
            assert tiny.text_completion(**arguments) == expected
        ids, scores = tiny.generate(prompts, echo=True, **more)
    finally:
        ended.set()
        stepper.join(60)
    lengths = [len(p) + count for p, count in zip(prompts, (n, 20, 20), strict=True)]
    assert [len(row) for row in ids] == lengths
    assert scores is not None and [len(row) for row in scores] == lengths
    assert len(beyond) == 4 and max(beyond) > 0 and not engine.busy
