"""generation.py: results for good input, errors for bad input.

Item numbers are those of docs/parity.md, the deviations from the reference.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from llama import Llama

Tiny = Callable[..., Path]


@pytest.fixture(scope="module")
def tiny(tiny_checkpoint: Tiny, llama3_tokenizer_path: Path) -> Llama:
    """A random model with the real vocabulary, 64 positions, 4 rows."""
    folder = tiny_checkpoint()
    return Llama.build(folder, llama3_tokenizer_path, 64, 4, device="cpu", dtype=torch.float32)


PROMPTS = [[128000, 9, 8, 7], [128000, *range(500, 520)], [128000], [128000, *range(40)]]


def greedy_plainly(llama: Llama, prompt: list[int], n: int) -> list[int]:
    """Without cache or batch: the whole sequence through the model for each id."""
    ids = list(prompt)
    for _ in range(n):
        with torch.no_grad():
            ids.append(int(llama.model(torch.tensor([ids]))[0, -1].argmax()))
    return ids[len(prompt) :]


def test_ragged_rows_equal_each_row_alone(tiny: Llama) -> None:
    """Item 9: one prefill of whole prompts, each row with its own position."""
    got, _ = tiny.generate(PROMPTS, 12, temperature=0)
    assert got == [greedy_plainly(tiny, prompt, 12) for prompt in PROMPTS]


def test_prefill_is_one_pass(tiny: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    """Item 9: the reference fed what exceeds the shortest prompt token by token."""
    shapes: list[tuple[int, int]] = []
    hidden = tiny.model.hidden

    def spy(tokens: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        shapes.append(tuple(tokens.shape))  # type: ignore[arg-type]
        return hidden(tokens, *args, **kwargs)

    monkeypatch.setattr(tiny.model, "hidden", spy)
    tiny.generate(PROMPTS, 3, temperature=0)
    assert shapes == [(4, 41), (4, 1), (4, 1)]


def test_prefill_makes_logits_of_the_last_position_only(
    tiny: Llama, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Item 10: no (prompt, vocabulary) logits."""
    rows: list[int] = []
    logits = tiny.model.logits

    def spy(h: torch.Tensor) -> torch.Tensor:
        rows.append(h.shape[:-1].numel())
        return logits(h)

    monkeypatch.setattr(tiny.model, "logits", spy)
    tiny.generate(PROMPTS, 2, temperature=0)
    assert rows == [4, 4]


def stop_at(llama: Llama, monkeypatch: pytest.MonkeyPatch, *tokens: int) -> None:
    monkeypatch.setattr(llama.tokenizer, "stop_tokens", list(tokens))


def test_stop_token_ends_its_row_alone(tiny: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    """Item 9: a finished row is no longer decoded or sampled; the others do not change."""
    stop_at(tiny, monkeypatch)
    free, free_scores = tiny.generate(PROMPTS, 12, temperature=0, logprobs=True)
    stop = free[1][4]
    stop_at(tiny, monkeypatch, stop)
    batches: list[int] = []
    hidden = tiny.model.hidden

    def spy(tokens: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        batches.append(len(tokens))
        return hidden(tokens, *args, **kwargs)

    monkeypatch.setattr(tiny.model, "hidden", spy)
    got, scores = tiny.generate(PROMPTS, 12, temperature=0, logprobs=True)
    want = [ids[: ids.index(stop)] if stop in ids else ids for ids in free]
    assert got == want and len(got[1]) <= 4
    assert free_scores is not None and scores is not None
    for a, b in zip(scores, free_scores, strict=True):
        assert a == pytest.approx(b[: len(a)], abs=1e-5)
    assert [len(s) for s in scores] == [len(ids) for ids in got]
    assert min(batches) < 4


def test_echo_keeps_a_prompt_that_holds_a_stop_token(
    tiny: Llama, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Item 6: the reference cut at the first stop token anywhere, inside the prompt too."""
    stop_at(tiny, monkeypatch, 8)
    [got], _ = tiny.generate([PROMPTS[0]], 3, temperature=0, echo=True)
    assert got[:4] == PROMPTS[0]


def test_budgets_and_finish_reasons(tiny: Llama) -> None:
    """Item 9: a prompt that fills max_seq_len yields nothing and says why; others go on."""
    full, nearly = list(range(64)), list(range(61))
    got, _ = tiny.generate([full, nearly, PROMPTS[0]], 10, temperature=0)
    assert [len(ids) for ids in got] == [0, 3, 10]
    text = tiny.tokenizer.decode(nearly[:20])
    for prediction in tiny.text_completion([text], max_gen_len=2, temperature=0):
        assert prediction["finish_reason"] == "length"


def test_finish_reason_stop(tiny: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    stop_at(tiny, monkeypatch, *range(128256))
    [prediction] = tiny.text_completion(["Hello"], logprobs=True)
    assert prediction == {"generation": "", "finish_reason": "stop", "tokens": [], "logprobs": []}


def test_logprobs_are_raw_and_aligned(tiny: Llama) -> None:
    """Item 5: no shift if nothing is generated; the first token has no log-probability."""
    for n in (0, 5):
        torch.manual_seed(3)
        ids, scores = tiny.generate(PROMPTS, n, temperature=0.7, logprobs=True, echo=True)
        assert scores is not None
        for row, got in zip(ids, scores, strict=True):
            raw = torch.log_softmax(tiny.model(torch.tensor([row]))[0], -1)
            want = [raw[i, t].item() for i, t in enumerate(row[1:])]
            assert got[0] is None and got[1:] == pytest.approx(want, abs=1e-4)


def test_max_gen_len_0_generates_nothing(tiny: Llama) -> None:
    assert tiny.generate(PROMPTS, 0) == ([[]] * 4, None)
    assert tiny.generate(PROMPTS, 0, echo=True) == (PROMPTS, None)
    assert tiny.generate(PROMPTS, 0, logprobs=True) == ([[]] * 4, [[]] * 4)


def test_padding_id_in_a_prompt_is_an_ordinary_id(tiny: Llama) -> None:
    """Item 17: no id has a special meaning in a batch."""
    prompt = [128000, 0, 128004, 5]
    got, _ = tiny.generate([prompt, PROMPTS[1]], 4, temperature=0, echo=True)
    assert got[0] == prompt + greedy_plainly(tiny, prompt, 4)


def test_same_seed_same_ids(tiny: Llama) -> None:
    runs = []
    for seed in (5, 5, 6):
        torch.manual_seed(seed)
        runs.append(tiny.generate(PROMPTS, 8, temperature=1.0)[0])
    assert runs[0] == runs[1] != runs[2]


def test_nans_in_the_cache_do_not_reach_later_calls(tiny: Llama) -> None:
    """Half precision can overflow: its NaNs must not reach later calls or other rows."""
    want, _ = tiny.generate(PROMPTS, 6, temperature=0)
    for cache in tiny.engine.cache:
        cache.k.fill_(float("nan"))
        cache.v.fill_(float("nan"))
    tiny.engine._arranged = False  # as after an interrupt: nothing cached is reused
    assert tiny.generate(PROMPTS, 6, temperature=0)[0] == want


def test_tiny_temperature_is_greedy(tiny: Llama) -> None:
    greedy, _ = tiny.generate(PROMPTS[:1], 5, temperature=0)
    assert tiny.generate(PROMPTS[:1], 5, temperature=1e-42)[0] == greedy


def test_seeded_rows_do_not_depend_on_their_batch(tiny: Llama) -> None:
    together, _ = tiny.generate(PROMPTS, 10, temperature=1.0, seed=[1, 2, 3, 4])
    for i, prompt in enumerate(PROMPTS):
        torch.manual_seed(i * 7)  # the global generator is not used
        assert tiny.generate([prompt], 10, temperature=1.0, seed=i + 1)[0] == [together[i]]
    same, _ = tiny.generate([PROMPTS[0]] * 2, 10, temperature=1.0, seed=5)
    assert same[0] == same[1]
    for wrong in ("x", [1], 1.5):
        with pytest.raises(TypeError, match="seed"):
            tiny.generate(PROMPTS, 2, seed=wrong)  # type: ignore[arg-type]


def test_predictions(tiny: Llama) -> None:
    [plain] = tiny.text_completion(["Hello"], temperature=0, max_gen_len=4)
    [full] = tiny.text_completion(["Hello"], temperature=0, max_gen_len=4, logprobs=True, echo=True)
    assert set(plain) == {"generation", "finish_reason"}
    assert full["generation"] == "<|begin_of_text|>Hello" + plain["generation"]
    assert full["tokens"][:2] == ["<|begin_of_text|>", "Hello"] and len(full["logprobs"]) == 6
    [chat] = tiny.chat_completion([[{"role": "user", "content": "Hi"}]], 0, 0.9, 4, logprobs=True)
    assert chat["generation"]["role"] == "assistant"
    assert len(chat["tokens"]) == len(chat["logprobs"]) == 4


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"prompt_tokens": []}, ValueError, "empty"),
        ({"prompt_tokens": [[]]}, ValueError, "prompt 0 is empty"),
        ({"prompt_tokens": [[1] * 65]}, ValueError, "max_seq_len 64"),
        ({"prompt_tokens": ["text"]}, TypeError, "token ids"),
        ({"prompt_tokens": [[1, "a"]]}, TypeError, "'a'"),
        ({"prompt_tokens": [[1.5]]}, TypeError, r"1\.5"),
        ({"prompt_tokens": [5]}, TypeError, "token ids"),
        ({"prompt_tokens": None}, TypeError, "list"),
        ({"prompt_tokens": torch.tensor([[1, 2]])}, TypeError, "list"),
        ({"prompt_tokens": [[128256]]}, ValueError, "128256; ids are 0 to 128255"),
        ({"prompt_tokens": [[-1]]}, ValueError, "-1"),
        ({"max_gen_len": -1}, ValueError, "max_gen_len"),
        ({"max_gen_len": 1.0}, TypeError, "max_gen_len"),
        ({"temperature": -0.1}, ValueError, "temperature"),
        ({"temperature": float("nan")}, ValueError, "temperature"),
        ({"temperature": "hot"}, TypeError, "temperature"),
        ({"top_p": -0.1}, ValueError, "top_p"),
        ({"top_p": 1.1}, ValueError, "top_p"),
        ({"top_p": None}, TypeError, "top_p"),
    ],
)
def test_bad_input(
    tiny: Llama, change: dict[str, Any], error: type[Exception], message: str
) -> None:
    arguments: dict[str, Any] = {"prompt_tokens": [[1, 2]], "max_gen_len": 2} | change
    with pytest.raises(error, match=message):
        tiny.generate(**arguments)
    assert tiny.generate([[1, 2]], 1, temperature=0)[0]  # later calls work


def test_one_bad_prompt_does_not_stop_the_others(tiny: Llama) -> None:
    good = PROMPTS[0]
    want, _ = tiny.generate([good], 5, temperature=0)
    with pytest.warns(UserWarning, match="prompt 1 has 65 tokens, more than max_seq_len 64"):
        got, scores = tiny.generate(
            [good, [1] * 65, good], 5, temperature=0, logprobs=True, echo=True
        )
    assert got == [good + want[0], [], good + want[0]]
    assert scores is not None and [len(row) for row in scores] == [9, 0, 9]
    texts = ["Hello", "word " * 70]
    with pytest.warns(UserWarning, match="prompt 1"):
        fine, refused = tiny.text_completion(texts, temperature=0, max_gen_len=3)
    assert (fine["finish_reason"], refused["finish_reason"]) == ("length", "error")
    assert refused["generation"] == "" and "max_seq_len 64" in refused["error"]
    assert "error" not in fine


def test_more_prompts_than_slots_take_turns(tiny: Llama) -> None:
    prompts = [[128000, i, i + 1] for i in range(11)]
    got, _ = tiny.generate(prompts, 6, temperature=0)
    assert got == [tiny.generate([prompt], 6, temperature=0)[0][0] for prompt in prompts]


def test_bad_texts_and_dialogs(tiny: Llama) -> None:
    with pytest.raises(TypeError, match="list of texts"):
        tiny.text_completion("Hello")
    with pytest.raises(TypeError, match="str"):
        tiny.text_completion([None])  # type: ignore[list-item]
    with pytest.raises(ValueError, match="empty"):
        tiny.text_completion([])
    with pytest.raises(ValueError, match="unknown role"):
        tiny.chat_completion([[{"role": "robot", "content": "x"}]])  # type: ignore[typeddict-item]
    with pytest.raises(TypeError, match="list"):
        tiny.chat_completion([{"role": "user", "content": "x"}])  # type: ignore[list-item]


def test_empty_text_without_bos(demo: Llama) -> None:
    with pytest.raises(ValueError, match="prompt 0 is empty"):
        demo.text_completion([""])
