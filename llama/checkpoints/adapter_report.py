"""What `inspect` and `verify` say about an adapter's folder, without its base."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from llama.checkpoints.adapter import adapter_folder, read_adapter_vocabulary
from llama.checkpoints.file_checks import find_damage
from llama.checkpoints.formats.peft import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    PeftConfig,
    read_peft_config,
    read_tensors,
)
from llama.common.dtypes import dtype_name
from llama.common.files import damage
from llama.common.listing import listing
from llama.distributed.sharding import VOCABULARY
from llama.layers.lora import LoRAConfig
from llama.text.rank_file import parse_ranks

GET_AGAIN = "save or download the adapter again"


def describe_folder(path: str | Path) -> str:
    """A text of aligned lines: base, method, targets, sizes.

    Raises:
        FileNotFoundError, ValueError: the folder has no adapter, or a damaged one.
    """
    folder, peft, tensors = _open(path)
    lora = peft.lora
    scaled = f"scale {lora.scale:g}" + (" (rsLoRA)" if lora.rslora else "")
    whole = [
        f"{name.removesuffix('.weight')} of {len(tensors[name]):,} rows"
        for name in VOCABULARY
        if name in tensors
    ]
    size = sum(w.nbytes for w in tensors.values())
    dtypes = ", ".join(sorted({dtype_name(w.dtype) for w in tensors.values()}))
    rows = [
        ("layout", "adapter in PEFT's format: give it as --adapter, beside its base"),
        ("base", peft.base or "unknown"),
        ("method", f"{'DoRA' if lora.dora else 'LoRA'} of rank {lora.rank}, {scaled}"),
        ("targets", f"{', '.join(lora.targets)} of {_layers(tensors)} layers"),
        *[("whole", ", ".join(whole))] * bool(whole),
        ("vocabulary", _vocabulary(folder)),
        ("parameters", f"{sum(w.numel() for w in tensors.values()):,}"),
        ("stored as", f"{dtypes}, {size / 1e6:,.1f} MB ({size:,} bytes)"),
    ]
    return "\n".join(f"{label:<12}{text}" for label, text in rows)


def adapter_problems(path: str | Path) -> list[str]:
    """Problems of an adapter's files, one line each with its remedy; [] if there are none."""
    try:
        folder = adapter_folder(path)
        for name in (CONFIG_FILE, WEIGHTS_FILE):
            if what := find_damage(folder / name):
                return [f"{folder / name} is {what}; {GET_AGAIN}"]
        _, peft, tensors = _open(folder)
        _vocabulary(folder)
    except (ValueError, OSError) as e:
        return [" ".join(str(e).split())]
    return [
        f"{folder / WEIGHTS_FILE} {what}: {listing(names, 3)}; {GET_AGAIN}"
        for what, names in (
            ("lacks", _missing(peft, tensors)),
            ("has tensors of another rank", _of_another_rank(peft.lora, tensors)),
        )
        if names
    ]


def _open(path: str | Path) -> tuple[Path, PeftConfig, dict[str, Tensor]]:
    """(folder, options, tensors) of an adapter."""
    folder = adapter_folder(path)
    with damage(folder, GET_AGAIN):
        return folder, read_peft_config(folder / CONFIG_FILE), read_tensors(folder / WEIGHTS_FILE)


def _layers(tensors: Mapping[str, Tensor]) -> int:
    """Number of layers, by the highest one that is adapted."""
    return 1 + max((int(name.split(".")[1]) for name in tensors if "lora_" in name), default=-1)


def _missing(peft: PeftConfig, tensors: Mapping[str, Tensor]) -> list[str]:
    """Names that the options ask for."""
    parts = ("lora_a", "lora_b", *["lora_magnitude"] * peft.lora.dora)
    names = [
        f"layers.{layer}.{_block(target)}.{target}.{part}"
        for layer in range(max(min(_layers(tensors), len(tensors)), 1))
        for target in peft.lora.targets
        for part in parts
    ]
    return [name for name in (*peft.whole, *names) if name not in tensors]


def _of_another_rank(lora: LoRAConfig, tensors: Mapping[str, Tensor]) -> list[str]:
    """Names of A and B whose rank differs from the options'."""
    dims = {"lora_a": 0, "lora_b": -1}
    kinds = {name: dims.get(name.rpartition(".")[2]) for name in tensors}
    return [
        name
        for name, dim in kinds.items()
        if dim is not None and tensors[name].shape[dim : dim + 1 or None] != (lora.rank,)
    ]


def _block(target: str) -> str:
    return "attention" if target in ("wq", "wk", "wv", "wo") else "feed_forward"


def _vocabulary(folder: Path) -> str:
    """Whether the adapter has a vocabulary of its own."""
    found = read_adapter_vocabulary(folder)
    if found is None:
        return "the base's"
    return f"its own, of {len(parse_ranks(found[0], str(folder))):,} ordinary tokens"
