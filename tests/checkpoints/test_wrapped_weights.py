"""Weights as training loops and libraries store them. Oracle: the same weights, stored plainly."""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file, save_model
from torch import Tensor, nn

from llama.checkpoints.convert import convert, quantize
from llama.checkpoints.formats.hf import HFSource
from llama.checkpoints.load import read_part
from llama.checkpoints.open import open_checkpoint
from llama.checkpoints.verify import verify
from tests.checkpoints.test_hf import hf_model, load
from tests.checkpoints.test_meta import COUNTS, PARAMS, expected_part, whole_weights, write

State = dict[str, Tensor]


def parameters(state: State) -> dict[str, Any]:
    return {name: nn.Parameter(w) for name, w in state.items()}


def prefixed(prefix: str) -> Callable[[State], dict[str, Any]]:
    return lambda state: {prefix + name: w for name, w in state.items()}


WRAPPERS: dict[str, Callable[[State], dict[str, Any]]] = {
    "parameters": parameters,
    "model": lambda state: {"model": state, "optimizer": {"state": {0: torch.ones(2)}}, "step": 3},
    "state_dict": lambda state: {"state_dict": OrderedDict(state), "epoch": 1},
    "data parallel": prefixed("module."),
    "compiled": prefixed("_orig_mod."),
    "other names": lambda state: {"ema": 0.9, "net": {"w": prefixed("llm.")(state)}},
    "the optimizer's moments": lambda state: {
        "optim": {"state": {name: {"exp_avg": w * 0} for name, w in state.items()}},
        "net": state,
    },
    "averages beside the model": lambda state: {
        "ema": {name: w * 0 for name, w in state.items()},
        "model": state,
    },
    "numbers beside the names": lambda state: state | {"epoch": 3},
    "numbers beside a prefix": lambda state: prefixed("module.")(state) | {"ema_decay": 0.9},
    "tensors beside a prefix": lambda state: prefixed("model.")(state) | {"iter": torch.ones(1)},
    "all": lambda state: {"model": prefixed("_orig_mod.module.")(parameters(state))},
}


@pytest.mark.filterwarnings("ignore:.*no tokenizer")
@pytest.mark.parametrize("old", [False, True], ids=["zip", "pickle"])
@pytest.mark.parametrize("kind", WRAPPERS)
def test_state_dicts_in_wrappers(kind: str, old: bool, tmp_path: Path) -> None:
    weights = whole_weights(tied=False)
    write(tmp_path / "plain", weights, 2)
    folder = write(tmp_path / "c", weights, 2)
    for path in folder.glob("*.pth"):
        state = WRAPPERS[kind](torch.load(path, weights_only=True))
        torch.save(state, path, _use_new_zipfile_serialization=not old)
    source = open_checkpoint(folder)
    for m in COUNTS:
        for name, w in weights.items():
            part = read_part(source, name, source.args(), m - 1, m)
            assert type(part) is Tensor and not part.requires_grad
            assert torch.equal(part, expected_part(name, w, m - 1, m)), (name, m)
    (folder / "tokenizer.model").write_bytes(b"IQ== 0\n")
    assert verify(folder, open_checkpoint) == []
    (folder / "tokenizer.model").unlink()
    changes: list[Callable[[Path, Path], Path]] = [
        lambda src, dst: convert(src, dst, mp=1),
        lambda src, dst: quantize(src, dst, "int8"),
    ]
    for change in changes:
        contents = []
        for name in ("plain", "c"):
            out = change(tmp_path / name, tmp_path / f"{name}-{len(list(tmp_path.iterdir()))}")
            contents.append(torch.load(out / "consolidated.00.pth", weights_only=True))
        assert contents[0].keys() == contents[1].keys()
        assert all(torch.equal(contents[0][name], w) for name, w in contents[1].items())


SEVERAL: dict[str, tuple[Callable[[State], dict[str, Any]], str]] = {
    "moments": (
        lambda state: {"optimizer": {"exp_avg": {n: w * 0 for n, w in state.items()}}, "p": state},
        "optimizer, p",
    ),
    "averages": (lambda state: {"ema": state, "step": 1, "net": state}, "ema, net"),
    "two usual names": (lambda state: {"module": state, "model": state}, "model, module"),
    "inside": (lambda state: {"model": {"a": state, "b": state}}, "a, b"),
    "prefixes": (
        lambda state: prefixed("model.")(state) | prefixed("ema.")(state),
        "model.tok_embeddings.weight, ema.tok_embeddings.weight",
    ),
}


@pytest.mark.filterwarnings("ignore:.*no tokenizer")
@pytest.mark.parametrize("kind", SEVERAL)
def test_weights_of_several_models(kind: str, tmp_path: Path) -> None:
    """Which ones are the model's is not known."""
    folder = write(tmp_path / "c", whole_weights(tied=False), 1)
    path = folder / "consolidated.00.pth"
    wrap, names = SEVERAL[kind]
    torch.save(wrap(torch.load(path, weights_only=True)), path)
    with pytest.raises(ValueError, match=f"00.pth: it has .* models, {names}; save the right"):
        open_checkpoint(folder)
    (folder / "tokenizer.model").write_bytes(b"IQ== 0\n")
    assert any(names in line for line in verify(folder, open_checkpoint))


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_params_with_a_byte_order_mark(encoding: str, tmp_path: Path) -> None:
    folder = write(tmp_path / "c", whole_weights(tied=False), 1)
    (folder / "params.json").write_text(json.dumps(PARAMS), encoding=encoding)
    assert open_checkpoint(folder).params["dim"] == PARAMS["dim"]


@pytest.mark.parametrize("metadata", [True, False])
@pytest.mark.parametrize("in_config", [True, False])
def test_tied_model_of_save_model(metadata: bool, in_config: bool, tmp_path: Path) -> None:
    """`safetensors.torch.save_model` keeps one of two names of a tensor, here lm_head.weight."""
    model = hf_model(tie_word_embeddings=True)
    model.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    save_model(model, str(path))
    stored = load_file(path)
    assert "lm_head.weight" in stored and "model.embed_tokens.weight" not in stored
    if not metadata:
        save_file(stored, path)
    if not in_config:
        config = json.loads((tmp_path / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    if not metadata and not in_config:
        with pytest.raises(ValueError, match=r"missing: tok_embeddings\.weight"):
            HFSource(tmp_path).args()
        return
    source = HFSource(tmp_path)
    assert source.tied
    tokens = torch.randint(96, (2, 20))
    with torch.no_grad():
        torch.testing.assert_close(load(source)(tokens), model(tokens).logits, rtol=0, atol=1e-5)


def test_safetensors_of_a_compiled_model(tmp_path: Path) -> None:
    model = hf_model()
    model.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    expected = HFSource(tmp_path).shapes()
    save_file({f"_orig_mod.{name}": w for name, w in load_file(path).items()}, path)
    assert HFSource(tmp_path).shapes() == expected
