"""Training runs: losses, checkpoint, files, options."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from benchmarks.transformers_peer import config_of
from llama import Llama, Tokenizer, Transformer
from llama.checkpoints.convert import convert
from llama.checkpoints.demo_model import checkpoint_or_demo
from llama.checkpoints.formats.hf_config import hf_name
from llama.checkpoints.inspect import describe
from llama.checkpoints.open import open_checkpoint
from llama.checkpoints.verify import verify
from llama.train.optimizer import initialize
from llama.train.pretraining import open_run, train
from tests.train.test_train_model import permuted
from tests.train.training import SMALL, losses


def test_files(full_run: Path) -> None:
    lines = [json.loads(line) for line in (full_run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 13))
    assert [line["step"] for line in lines if "val_loss" in line] == [5, 10, 12]
    assert lines[-1]["train_loss"] < lines[0]["train_loss"]
    assert all(line["tokens_per_s"] > 0 for line in lines)
    assert lines[1]["lr"] == 0.4 / 32 and lines[-1]["lr"] == pytest.approx(0)
    assert not list(full_run.rglob(".*"))  # no temporary files
    assert verify(full_run, open_checkpoint) == []


def test_same_seed_same_losses(tmp_path: Path, text: Path, full_run: Path) -> None:
    train(text, tmp_path / "again", SMALL, device="cpu")
    assert losses(tmp_path / "again") == losses(full_run)
    train(text, tmp_path / "other", replace(SMALL, seed=2), device="cpu")
    assert losses(tmp_path / "other")[0] != losses(full_run)[0]


def test_accumulation_equals_a_larger_batch(tmp_path: Path, text: Path, full_run: Path) -> None:
    settings = replace(SMALL, eval_windows=4)  # of about twenty
    train(text, tmp_path / "large", settings, device="cpu")
    train(text, tmp_path / "small", replace(settings, batch_size=1, accumulate=4), device="cpu")
    for ours, theirs in zip(losses(tmp_path / "small"), losses(tmp_path / "large"), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)
    last = losses(tmp_path / "large")[-1]["val_loss"]
    assert last != losses(full_run)[-1]["val_loss"]


def test_losses_equal_those_of_a_plain_loop(text: Path, full_run: Path) -> None:
    """With transformers' model and torch's AdamW, from the same initial weights."""
    transformers = pytest.importorskip("transformers")
    model = Transformer(SMALL.model_args(Tokenizer(full_run / "tokenizer.model").n_words))
    initialize(model, SMALL.seed)
    theirs = transformers.LlamaForCausalLM(config_of(model.params))
    weights = {hf_name(n): permuted(n, w, 16) for n, w in model.state_dict().items()}
    theirs.load_state_dict(weights)
    groups = [
        {"params": [w for w in theirs.parameters() if w.dim() == dim], "weight_decay": decay}
        for dim, decay in ((1, 0.0), (2, 0.1))
    ]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.99), foreach=False)
    ids, norms = open_run(text, full_run, SMALL, 1)["train"], []
    for step, line in enumerate(losses(full_run)):
        cosine = (1 + math.cos(math.pi * (step - 2) / 9)) / 2  # 0 at the last update, 11
        for group in optimizer.param_groups:
            group["lr"] = 0.4 / 32 * ((step + 1) / 2 if step < 2 else cosine)
        x, y = ids.batch(step, 4, 16, seed=1)
        loss = F.cross_entropy(theirs(input_ids=x).logits.flatten(0, 1), y.flatten())
        assert line["train_loss"] == pytest.approx(float(loss.detach()), rel=1e-4)
        optimizer.zero_grad()
        loss.backward()
        gradients = [w.grad for w in theirs.parameters()]
        norms.append(sum(float(g.square().sum()) for g in gradients) ** 0.5)
        for gradient in gradients:
            gradient *= min(1.0, 1.0 / norms[-1])
        optimizer.step()
    assert min(norms) < 1.0 < max(norms)  # some gradients are clipped, some are not


def test_checkpoint(tmp_path: Path, text: Path, full_run: Path) -> None:
    """It loads, generates and converts to Hugging Face and back; its loss is the best reported."""
    llama = Llama.build(full_run, None, 16, 2, device="cpu", dtype=torch.float32)
    characters = set(text.read_text(encoding="utf-8"))
    (answer,) = llama.text_completion(["the k"], temperature=1.0, max_gen_len=9)
    assert len(answer["generation"]) == 9 and set(answer["generation"]) <= characters
    with pytest.raises(ValueError, match="'X'"):
        llama.text_completion(["X"])

    convert(full_run, tmp_path / "hf", to="hf")
    convert(tmp_path / "hf", tmp_path / "back")
    # The context length is known to all readers; the tokenizer is found beside the weights.
    config = json.loads((tmp_path / "hf/config.json").read_text())
    assert config["max_position_embeddings"] == 16
    for folder in (full_run, tmp_path / "hf"):
        assert "trained for 16 tokens" in describe(open_checkpoint(folder))
        found = Llama.build(*checkpoint_or_demo(str(folder), None), None, 1, device="cpu")
        assert found.model.params.max_seq_len == 16
    back = Llama.build(tmp_path / "back", None, 16, 2, device="cpu", dtype=torch.float32)
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    held_out = text.read_text(encoding="utf-8")
    held_out = held_out[int(len(held_out) * 0.9) :]
    ids = torch.tensor(llama.tokenizer.encode(held_out, bos=False, eos=True))
    with torch.no_grad():
        windows = [ids[i : i + 17] for i in range(0, len(ids) - 1, 16)]
        logits = [theirs(input_ids=window[None, :-1]).logits[0] for window in windows]
        ours = llama.model(windows[0][None, :-1])
        torch.testing.assert_close(ours[0], logits[0], atol=1e-4, rtol=0)
        assert torch.equal(back.model(windows[0][None, :-1]), ours)
    expected = F.cross_entropy(torch.cat(logits), ids[1:])
    best = min(line["val_loss"] for line in losses(full_run) if "val_loss" in line)
    assert best == pytest.approx(float(expected), rel=1e-5)


def test_longer_than_trained(full_run: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="llama")
    Llama.build(full_run, None, 16, 1, device="cpu")
    assert "was trained for" not in caplog.text
    Llama.build(full_run, None, 17, 1, device="cpu")
    assert "was trained for 16 tokens in a row" in caplog.text


def test_best_checkpoint_is_kept(tmp_path: Path, text: Path) -> None:
    """The weights are corrupted before the last step; the checkpoint stays the earlier one."""
    settings = replace(SMALL, lr=0.01, warmup=0, final_lr=1.0, steps=10)
    train(text, tmp_path / "run", settings, device="cpu")
    good = (tmp_path / "run" / "consolidated.00.pth").read_bytes()
    state = torch.load(tmp_path / "run/train/last.pt", weights_only=True)
    state["weights"]["model.norm.weight"].neg_()
    torch.save(state, tmp_path / "run/train/last.pt")
    settings = replace(settings, steps=11)
    result = train(text, tmp_path / "run", settings, resume=True, device="cpu")
    assert losses(tmp_path / "run")[-1]["val_loss"] > result.best_loss
    assert result.best_step == 10
    assert (tmp_path / "run" / "consolidated.00.pth").read_bytes() == good


def test_prompts(tmp_path: Path, text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(text, tmp_path / "a", replace(SMALL, prompt="queen ", steps=1), device="cpu")
    assert "\n    queen " in capsys.readouterr().out
    with pytest.raises(ValueError, match="'X'"):
        train(text, tmp_path / "b", replace(SMALL, prompt="X"))
    with pytest.raises(ValueError, match="the prompt has 17 tokens"):
        train(text, tmp_path / "c", replace(SMALL, prompt="k" * 16))


def test_without_validation(tmp_path: Path, text: Path) -> None:
    result = train(text, tmp_path / "run", replace(SMALL, val_fraction=0.0), device="cpu")
    assert result.best_step == 12
    assert not any("val_loss" in line for line in losses(tmp_path / "run"))


def test_bfloat16(tmp_path: Path, text: Path, full_run: Path) -> None:
    """Matmuls in bfloat16, weights in float32: nearly the same losses."""
    train(text, tmp_path / "run", replace(SMALL, dtype="bfloat16"), device="cpu")
    last, expected = losses(tmp_path / "run")[-1], losses(full_run)[-1]
    assert last["val_loss"] != expected["val_loss"]
    assert last["val_loss"] == pytest.approx(expected["val_loss"], rel=0.01)
    weights = torch.load(tmp_path / "run/consolidated.00.pth", weights_only=True)
    assert {w.dtype for w in weights.values()} == {torch.float32}


def test_plot(tmp_path: Path, text: Path) -> None:
    pytest.importorskip("matplotlib", reason="needs matplotlib, of the extra `train`")
    train(text, tmp_path / "run", SMALL, device="cpu")
    assert (tmp_path / "run" / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_no_matplotlib(
    tmp_path: Path,
    text: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO", "llama")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)  # importing it fails
    train(text, tmp_path / "run", SMALL, device="cpu")
    assert caplog.text.count("loss.png is not drawn") == 1
    assert not (tmp_path / "run" / "loss.png").exists()


def test_tensorboard(tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ImportError, match="--tensorboard needs a package"):
        train(text, tmp_path / "a", SMALL, tensorboard=True)
    assert not list(tmp_path.iterdir())
    monkeypatch.undo()
    pytest.importorskip("tensorboard", reason="needs tensorboard")
    train(text, tmp_path / "b", SMALL, tensorboard=True, device="cpu")
    assert list((tmp_path / "b" / "train" / "tensorboard").glob("events*"))
