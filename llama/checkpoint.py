"""params.json and shards -> a ready model on this rank's device, in the memory of one copy.

Knows Meta's layout: `params.json` beside `consolidated.00.pth`, `consolidated.01.pth`, ...
"""

from __future__ import annotations

import dataclasses
import json
import pickle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llama import parallel
from llama.model import ModelArgs, Transformer

# What inference itself decides; params.json may name it, and is not asked.
DECIDED_AT_BUILD = {"max_batch_size", "max_seq_len"}
# Tables that old checkpoints carry although they follow from params.json.
IGNORED_WEIGHTS = {"rope.freqs"}


def pick_device(device: str | torch.device | None) -> torch.device:
    """`device`, or the best there is: cuda, then mps, then cpu. A rank gets its own GPU."""
    if device is None:
        mps = torch.backends.mps.is_available()
        device = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    picked = torch.device(device)
    if picked.type == "cuda":
        if not torch.cuda.is_available():
            raise ValueError("device 'cuda' was asked for, and torch finds no GPU here; use 'cpu'")
        if picked.index is None and parallel.launched():
            picked = torch.device("cuda", parallel.local_rank())
            torch.cuda.set_device(picked)  # nccl communicates on the current device
    return picked


def pick_dtype(dtype: torch.dtype | None, device: torch.device) -> torch.dtype:
    """`dtype`, or bfloat16 where `device` computes in it, else float16 (GPU) or float32 (CPU)."""
    if dtype is not None:
        if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
            raise TypeError(f"dtype must be a floating-point torch.dtype, not {dtype!r}")
        return dtype
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if native else torch.float16
    if device.type == "mps":
        return torch.bfloat16 if torch.backends.mps.is_macos_or_newer(14, 0) else torch.float16
    if device.type == "cpu":
        native = (
            torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
        )
        return torch.bfloat16 if native else torch.float32
    return torch.bfloat16


def read_params(ckpt_dir: str | Path) -> dict[str, Any]:
    """The checked contents of `params.json`.

    Raises:
        FileNotFoundError: no folder, or no params.json in it.
        ValueError: not JSON, or keys that this model does not have.
    """
    folder = Path(ckpt_dir)
    if not folder.is_dir():
        raise FileNotFoundError(f"no checkpoint folder at {folder}; check ckpt_dir")
    path = folder / "params.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"no params.json in {folder}; an official checkpoint has one beside its "
            "consolidated.*.pth (in Hugging Face repositories both lie under original/)"
        )
    try:
        params = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as e:
        raise ValueError(f"{path} is not JSON ({e}); download it again") from None
    if not isinstance(params, dict):
        raise ValueError(f"{path} holds no JSON object; download it again")
    known = {field.name for field in dataclasses.fields(ModelArgs)}
    if unknown := sorted(set(params) - known):
        raise ValueError(
            f"{path} has keys this library does not know: {unknown}. It loads the text models of "
            "Llama 3 to 3.3; vision, quantized and LoRA checkpoints are other architectures"
        )
    return {key: value for key, value in params.items() if key not in DECIDED_AT_BUILD}


def special_tokens_version(params: dict[str, Any]) -> str:
    """Which special tokens a checkpoint was trained with: only 3.1 and later scale RoPE."""
    return "llama3.1" if params.get("use_scaled_rope") else "llama3"


def find_shards(ckpt_dir: str | Path) -> list[Path]:
    """The `.pth` files in rank order."""
    shards = sorted(Path(ckpt_dir).glob("*.pth"))
    if not shards:
        raise FileNotFoundError(f"no consolidated.*.pth in {ckpt_dir}; check ckpt_dir")
    return shards


def read_shard(path: Path) -> dict[str, Tensor]:
    """Map one `.pth` into memory; nothing is read before it is used, and no code is run.

    Raises:
        ValueError: the file is truncated, is no checkpoint, or tries to run code.
    """
    try:
        weights = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except pickle.UnpicklingError as e:
        raise ValueError(
            f"{path} holds more than weights and could run code when loaded; it was refused. "
            f"Get the official file. ({str(e).splitlines()[0]})"
        ) from None
    except (RuntimeError, EOFError, ValueError) as e:
        raise ValueError(
            f"{path} is truncated or is not a torch checkpoint; download it again. "
            f"({str(e).splitlines()[0] if str(e) else type(e).__name__})"
        ) from None
    if not isinstance(weights, dict) or not all(isinstance(w, Tensor) for w in weights.values()):
        raise ValueError(f"{path} is not a state dict of tensors: this is another model's file")
    return {name: w for name, w in weights.items() if name not in IGNORED_WEIGHTS}


def check_weights(weights: dict[str, Tensor], model: Transformer, path: Path) -> None:
    """Every weight of `model` is there, of its shape, and no other.

    Raises:
        ValueError: naming the first few that are not.
    """
    expected = {name: tuple(w.shape) for name, w in model.state_dict().items()}
    found = {name: tuple(w.shape) for name, w in weights.items()}
    problems = {
        "missing": [f"{n} {s}" for n, s in expected.items() if n not in found],
        "unknown": [f"{n} {s}" for n, s in found.items() if n not in expected],
        "misshapen": [
            f"{n} {found[n]} instead of {s}" for n, s in expected.items() if found.get(n, s) != s
        ],
        "not floating-point": [n for n, w in weights.items() if not w.is_floating_point()],
    }
    lines = [
        f"{kind}: {', '.join(names[:3])}" + (f" and {len(names) - 3} more" * (len(names) > 3))
        for kind, names in problems.items()
        if names
    ]
    if lines:
        raise ValueError(f"{path} does not fit its params.json; " + "; ".join(lines))


def load(
    ckpt_dir: str | Path, args: ModelArgs, device: torch.device, dtype: torch.dtype
) -> Transformer:
    """Build the model of a checkpoint, without a KV cache, in evaluation mode.

    The model is laid out on the meta device and the shard's tensors become its parameters: on the
    CPU, in the stored dtype, they are the mapped file itself.

    Raises:
        FileNotFoundError, ValueError: see `find_shards`, `read_shard`, `check_weights`.
    """
    shards = find_shards(ckpt_dir)
    if len(shards) != parallel.size():
        raise ValueError(
            f"{ckpt_dir} has {len(shards)} shard(s) and {parallel.size()} rank(s) are running; "
            f"start with: torchrun --nproc_per_node {len(shards)} YOUR_SCRIPT"
        )
    path = shards[parallel.rank()]
    with torch.device("meta"):
        model = Transformer(args)
    weights = read_shard(path)
    check_weights(weights, model, path)
    moved: dict[int, Tensor] = {}  # tied weights stay one tensor
    for name, w in weights.items():
        key = w.data_ptr()
        if key not in moved:
            moved[key] = w.to(device=device, dtype=dtype)
        weights[name] = moved[key]
    model.load_state_dict(weights, strict=True, assign=True)
    return model.eval()
