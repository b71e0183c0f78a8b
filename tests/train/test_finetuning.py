"""finetuning.py: what is trained, what is written, and that a killed run goes on bit-identically.

Oracle: transformers and peft, on the files that a run writes.
"""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from llama import Llama, Tokenizer
from llama.checkpoints.convert import convert, quantize
from llama.train.finetune_base import open_base
from llama.train.finetune_data import load_samples
from llama.train.finetune_settings import FinetuneSettings
from llama.train.finetuning import finetune
from llama.train.report import read_metrics
from tests.checkpoints.adapters import bases, peft, transformers
from tests.distributed.test_tensor_parallel import torchrun
from tests.train.finetune_cases import (
    prompt_and_answer,
    quick,
    sums,
    transformers_loss,
    write_dialogs,
)
from tests.train.training import contents, losses

__all__ = ["bases"]
ROOT = Path(__file__).parents[2]
HELD_OUT = sums(100, 7)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """train.jsonl and held_out.jsonl."""
    folder = tmp_path_factory.mktemp("data")
    write_dialogs(folder / "train.jsonl", sums(0, 30))
    write_dialogs(folder / "held_out.jsonl", HELD_OUT)
    return folder


def run(base: Path, data: Path, out: Path, resume: bool = False, **changes: Any) -> float:
    """Fine-tune; return the loss on the held-out rows."""
    settings = quick(val_data=str(data / "held_out.jsonl"), **changes)
    result = finetune(base, [data / "train.jsonl"], out, settings, resume=resume, device="cpu")
    assert result.step == settings.steps
    return result.best_loss


def hf_loss(tokenizer: Path, base: Path, adapter: Path | None = None) -> float:
    """The loss on the held-out rows by transformers, of a checkpoint or an adapter."""
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if adapter is not None:
        model = peft.PeftModel.from_pretrained(model, adapter)
    return transformers_loss(model.eval(), Tokenizer(tokenizer), HELD_OUT)


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("", {"pack": True}),
        ("", {"dora": True, "targets": "wq,wk,w2", "rslora": True, "recompute": True}),
        ("tied ", {"train_embeddings": True, "lora_plus": 4.0}),
    ],
)
def test_adapter_has_its_loss_in_peft(
    tmp_path: Path, bases: dict[str, Path], data: Path, kind: str, changes: dict[str, Any]
) -> None:
    base, out = bases[f"{kind}meta"], tmp_path / "run"
    before = contents(base)
    loss = run(base, data, out, **changes)
    first, *_ = read_metrics(out / "metrics.jsonl")
    hf, tokenizer = bases[f"{kind}hf"], base / "tokenizer.model"
    assert first["val_loss"] == pytest.approx(hf_loss(tokenizer, hf), abs=1e-5)
    assert loss == pytest.approx(hf_loss(tokenizer, hf, out), abs=1e-5)
    assert loss < first["val_loss"] - 0.5
    assert contents(base) == before


@pytest.mark.parametrize(
    ("kind", "method"), [("", "full"), ("tied ", "full"), ("tied ", "embeddings")]
)
def test_checkpoint_has_its_loss_in_transformers(
    tmp_path: Path, bases: dict[str, Path], data: Path, kind: str, method: str
) -> None:
    out = tmp_path / "run"
    loss = run(bases[f"{kind}meta"], data, out, method=method)
    shutil.copytree(out, tmp_path / "result", ignore=shutil.ignore_patterns("train"))
    convert(tmp_path / "result", tmp_path / "hf", "hf")
    found = hf_loss(out / "tokenizer.model", tmp_path / "hf")
    assert loss == pytest.approx(found, abs=1e-5)
    assert loss < losses(out)[0]["val_loss"] - 0.5
    old, new = (torch.load(f / "consolidated.00.pth") for f in (bases[f"{kind}meta"], out))
    changed = {name for name, w in new.items() if not torch.equal(w, old[name])}
    embeddings = {"tok_embeddings.weight", "output.weight"}
    assert changed == (embeddings if method == "embeddings" else new.keys())
    assert {w.dtype for w in new.values()} == {torch.float32}
    if kind:
        assert new["output.weight"].data_ptr() == new["tok_embeddings.weight"].data_ptr()


def test_embeddings_are_trained_beside_weights_of_another_dtype(
    tmp_path: Path, bases: dict[str, Path], data: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Also the printed answers compute in one dtype."""
    out = tmp_path / "run"
    run(bases["meta"], data, out, method="embeddings", dtype="bfloat16")
    assert losses(out)[-1]["val_loss"] < losses(out)[0]["val_loss"] - 0.5
    assert "answer 1: " in capfd.readouterr().out


@pytest.mark.parametrize("stored", [False, True])
def test_quantized_base(tmp_path: Path, bases: dict[str, Path], data: Path, stored: bool) -> None:
    """The adapter has its loss on the quantized base, computed by `Llama`."""
    base, out = bases["meta"], tmp_path / "run"
    changes: dict[str, Any] = {} if stored else {"quantize": "int8"}
    if stored:
        base = quantize(base, tmp_path / "int8", "int8")
    loss = run(base, data, out, **changes)
    llama = Llama.build(base, adapter=out, device="cpu", dtype="fp32", max_seq_len=128, **changes)
    nats, count = 0.0, 0
    for dialog in HELD_OUT:
        prompt, answer = prompt_and_answer(llama.tokenizer, *dialog)
        _, logprobs = llama.generate([prompt + answer], 0, logprobs=True, echo=True)
        assert logprobs is not None
        nats -= sum(p for p in logprobs[0][len(prompt) :] if p is not None)
        count += len(answer)
    assert loss == pytest.approx(nats / count, rel=1e-3)
    assert loss < losses(out)[0]["val_loss"] - 0.5


def flags(base: Path, data: Path, out: Path, **changes: Any) -> list[str]:
    """The command line of `run`."""
    settings = vars(quick(val_data=str(data / "held_out.jsonl"), **changes))
    defaults = vars(FinetuneSettings())
    where = ["-m", str(base), "--data", str(data / "train.jsonl"), "--out", str(out)]
    return ["finetune", *where, "--device", "cpu"] + [
        f"--{name}" if value is True else f"--{name}={value}"
        for name, value in settings.items()
        if value != defaults[name]
    ]


KILL = """
import os, signal
from llama.train.report import Report

write = Report.write

def write_and_die(self, line):
    write(self, line)
    if line["step"] == 5:
        os.kill(os.getpid(), signal.SIGKILL)

Report.write = write_and_die
from llama.commands.main import main
main()
"""


@pytest.mark.parametrize(
    "changes", [{"dropout": 0.3, "pack": True}, {"method": "full", "accumulate": 2}]
)
def test_killed_run_goes_on_bit_identically(
    tmp_path: Path, bases: dict[str, Path], data: Path, changes: dict[str, Any]
) -> None:
    changes = changes | {"recompute": True}
    whole, out = tmp_path / "whole", tmp_path / "killed"
    run(bases["meta"], data, whole, **changes)
    command = [sys.executable, "-c", KILL, *flags(bases["meta"], data, out, **changes)]
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == -9, done.stderr
    assert losses(out)[-1]["step"] == 5
    run(bases["meta"], data, out, resume=True, **changes)
    assert losses(out) == losses(whole)
    name = "consolidated.00.pth" if "method" in changes else "adapter_model.safetensors"
    assert (out / name).read_bytes() == (whole / name).read_bytes()


@pytest.mark.parametrize(
    ("parallel", "changes"),
    [
        ("fsdp", {"train_embeddings": True, "recompute": True}),
        pytest.param("ddp", {"quantize": "int8"}, marks=pytest.mark.slow),
        pytest.param("fsdp", {"quantize": "int8", "pack": True}, marks=pytest.mark.slow),
        pytest.param("fsdp", {"method": "full"}, marks=pytest.mark.slow),
    ],
)
def test_two_ranks_match_one(
    tmp_path: Path, bases: dict[str, Path], data: Path, parallel: str, changes: dict[str, Any]
) -> None:
    """Two ranks with two rows each against one with four, half of the run resumed."""
    base, one, two = bases["tied meta"], tmp_path / "one", tmp_path / "two"
    changes = changes | {"samples": 0, "steps": 4, "eval_every": 2, "final_lr": 1.0, "lr": 1e-3}
    run(base, data, one, **changes)
    changes |= {"batch_size": 2, "parallel": parallel}
    torchrun(2, "-m", "llama", *flags(base, data, two, **changes | {"steps": 2}))
    torchrun(2, "-m", "llama", *flags(base, data, two, **changes), "--resume")
    for ours, theirs in zip(losses(two), losses(one), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)


def test_full_disk(tmp_path: Path, bases: dict[str, Path], data: Path) -> None:
    """A limit on file size makes writes fail as a full disk does; the adapter there stays."""
    out = tmp_path / "run"
    run(bases["meta"], data, out)
    before = contents(out)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        with pytest.raises(OSError, match=r"could not be written; is the disk full\?"):
            run(bases["meta"], data, out, resume=True, steps=8)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    after = contents(out)
    assert {*after} == {*before}
    name = "adapter_model.safetensors"
    assert after[name] == before[name]
    assert run(bases["meta"], data, out, resume=True, steps=8) < 9


def test_inputs_that_are_refused(tmp_path: Path, bases: dict[str, Path], data: Path) -> None:
    """One line each that says what to do; nothing is written."""
    meta, int8 = bases["meta"], tmp_path / "int8"
    quantize(meta, int8, "int8")
    before = {*tmp_path.iterdir()}
    cases: list[tuple[Path, dict[str, Any], str]] = [
        (int8, {"method": "full"}, "int8 is quantized .* give the original checkpoint, or use"),
        (int8, {"train_embeddings": True}, "also its output layer, .* with --quantize int8"),
        (int8, {"quantize": "int4"}, "quantized already, to int8"),
        (meta, {"quantize": "int4"}, "groups of 32 do not divide 176 columns"),
        (meta, {"max_seq_len": 9000}, "max_seq_len must be at most 8192"),
        (meta, {"max_seq_len": 3}, "no row is left of 30: in none does an answer begin within"),
        (meta, {"block": 64}, "block is for plain text"),
        (meta, {"format": "alpaca"}, "train.jsonl, line 1: .*'messages' of the format messages"),
        (meta, {"parallel": "ddp"}, "--parallel ddp needs: torchrun"),
    ]
    for base, changes, message in cases:
        with pytest.raises(ValueError, match=message):
            run(base, data, tmp_path / "run", **changes)
        assert {*tmp_path.iterdir()} == before, message
    with pytest.raises(FileNotFoundError, match="contains no run to resume"):
        run(meta, data, tmp_path / "run", resume=True)


def test_data_that_need_a_token_without_a_row(bases: dict[str, Path], data: Path) -> None:
    """As where a tokenizer has more special tokens than the model has rows."""
    base = open_base(bases["meta"])
    inputs = [data / "train.jsonl"], quick(), base.tokenizer, 8192
    end = base.tokenizer.special_tokens["<|eot_id|>"]
    with pytest.raises(ValueError, match=r"need the token '<\|eot_id\|>', whose id .* beyond the"):
        load_samples(*inputs, end)
    assert load_samples(*inputs, end + 1).max_seq_len > 0


def test_base_with_a_number_that_is_not_finite(
    tmp_path: Path, bases: dict[str, Path], data: Path
) -> None:
    base = shutil.copytree(bases["meta"], tmp_path / "base")
    state = torch.load(base / "consolidated.00.pth")
    state["norm.weight"][0] = torch.nan
    torch.save(state, base / "consolidated.00.pth")
    with pytest.raises(
        ValueError, match=r"loss is nan at step 0; .* Check the base: llama3 verify"
    ):
        run(base, data, tmp_path / "out")
