"""PEFT's adapters <-> LoRA under Meta's names: adapter_config.json and adapter_model.safetensors.

Knows these two files, and nothing about their base.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from reprlib import repr as short
from typing import Any, NamedTuple

import torch
from torch import Tensor

from llama.checkpoints.formats.hf import SAFETENSORS_DTYPES, interleave, open_safetensors
from llama.checkpoints.formats.hf_config import LAYER_NAMES, TOP_NAMES, hf_name, meta_name
from llama.checkpoints.formats.hf_export import halve
from llama.common.extras import install_line
from llama.common.files import read_json, write_json
from llama.common.listing import listing
from llama.distributed.sharding import VOCABULARY
from llama.layers.lora import LoRAConfig

MEMORY = torch.contiguous_format
CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
# PEFT's name of a linear: Meta's.
LINEARS = {
    hf.rpartition(".")[2]: meta.rpartition(".")[2]
    for hf, meta in LAYER_NAMES.items()
    if hf.endswith("_proj")
}
PARTS = {"lora_A": "lora_a", "lora_B": "lora_b", "lora_magnitude_vector": "lora_magnitude"}
WHOLE = {"embed_tokens": "tok_embeddings.weight", "lm_head": "output.weight"}
_PART = re.compile(rf"(.+)\.({'|'.join(PARTS)})(\.weight)?")
# Options that `parse_config` reads.
READ = {
    "peft_type", "r", "lora_alpha", "lora_dropout", "target_modules", "modules_to_save", "use_dora",
    "use_rslora", "bias", "init_lora_weights", "ensure_weight_tying",
}  # fmt: skip
# Options that change no result of a trained adapter.
WITHOUT_EFFECT = {
    "base_model_name_or_path", "revision", "task_type", "auto_mapping", "inference_mode",
    "peft_version", "loftq_config", "eva_config", "corda_config", "lora_ga_config", "megatron_core",
    "qalora_group_size", "runtime_config",
}  # fmt: skip
# Values of init_lora_weights that leave the base's weights as they are.
INITIAL_VALUES = (True, False, "gaussian", "eva", "orthogonal", "mica")


class PeftConfig(NamedTuple):
    """What adapter_config.json says.

    Attributes:
        whole: Meta's names of the weights that were trained whole, by `modules_to_save`.
        tied: a tied output follows an embedding that was trained whole.
        base: the name or path of the base; None: unknown.
    """

    lora: LoRAConfig
    whole: tuple[str, ...]
    tied: bool
    base: str | None


def read_peft_config(path: Path) -> PeftConfig:
    """The content of the adapter_config.json at `path`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, or has an option that this library does not compute.
    """
    config = read_json(path)
    try:
        return parse_config(config)
    except ValueError as e:
        raise ValueError(f"{path}: {e}") from None


def parse_config(config: Mapping[str, Any]) -> PeftConfig:
    """See `read_peft_config`; messages do not name the file."""
    if (kind := config.get("peft_type")) != "LORA":
        raise ValueError(f"peft_type is {short(kind)}; only adapters of type 'LORA' can be loaded")
    initial = config.get("init_lora_weights", True)
    if initial not in INITIAL_VALUES:
        raise ValueError(
            f"init_lora_weights is {short(initial)}, which changes the base's weights; save the "
            "adapter as plain LoRA: PEFT's save_pretrained(..., "
            "path_initial_model_for_weight_conversion=)"
        )
    if (bias := config.get("bias", "none")) != "none":
        raise ValueError(
            f"bias is {short(bias)}; only adapters without biases ('none') can be loaded"
        )
    others = config.keys() - READ - WITHOUT_EFFECT
    if unknown := [
        f"{short(k)[1:-1]} ({short(config[k])})" for k in sorted(others) if _is_set(config[k])
    ]:
        raise ValueError(
            f"it sets {listing(unknown, 3)}, which this library does not compute; train without "
            "this option, or merge the adapter with PEFT (merge_and_unload) and convert the result"
        )
    whole = config.get("modules_to_save") or []
    if not isinstance(whole, list) or not all(_last(name) in WHOLE for name in whole):
        raise ValueError(f"modules_to_save is {short(whole)}; only {list(WHOLE)} can be loaded")
    for key in ("use_rslora", "use_dora", "ensure_weight_tying"):
        if type(config.get(key, False)) is not bool:
            raise ValueError(f"{key} must be true or false, not {short(config[key])}")
    lora = LoRAConfig(
        rank=config.get("r", 8),
        alpha=config.get("lora_alpha", 8),
        dropout=config.get("lora_dropout", 0.0),
        targets=_targets(config.get("target_modules")),
        rslora=config.get("use_rslora", False),
        dora=config.get("use_dora", False),
    )
    base = config.get("base_model_name_or_path")
    return PeftConfig(
        lora,
        tuple(dict.fromkeys(WHOLE[_last(name)] for name in whole)),
        config.get("ensure_weight_tying", False),
        base if isinstance(base, str) and base else None,
    )


def _is_set(value: object) -> bool:
    """Whether an option has an effect. 0 does: it may be a layer."""
    return value is not None and value is not False and value not in ("", [], {})


def _targets(modules: object) -> tuple[str, ...]:
    """Meta's names of `target_modules`: a list of linears of every layer, or "all-linear"."""
    if isinstance(modules, str) and modules.lower() == "all-linear":
        return tuple(LINEARS.values())
    if isinstance(modules, str) and modules in LINEARS:
        modules = [modules]
    if not isinstance(modules, list) or not modules:
        what = f"the pattern {short(modules)}" if isinstance(modules, str) else short(modules)
        raise ValueError(
            f"target_modules is {what}; only 'all-linear' or a list of {', '.join(LINEARS)} can be "
            "loaded: name the modules when training"
        )
    found = {LINEARS.get(_last(name)) for name in modules}
    if None in found:
        wrong = [short(name).strip("'") for name in modules if _last(name) not in LINEARS]
        raise ValueError(
            f"target_modules has {listing(wrong, 3)}; only {', '.join(LINEARS)} of every layer can "
            "be loaded; train embed_tokens and lm_head as modules_to_save"
        )
    return tuple(name for name in LINEARS.values() if name in found)


def _last(name: object) -> str:
    """`q_proj` of "self_attn.q_proj", `embed_tokens` of "model.embed_tokens"; others as they are.

    A longer path may be one layer's.
    """
    text = str(name)
    return text.rpartition(".")[2] if text in LAYER_NAMES or text in TOP_NAMES else text


def read_tensors(path: Path) -> dict[str, Tensor]:
    """{Meta's name: tensor} of an adapter_model.safetensors, rows in Hugging Face's order.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, has a tensor with an unknown name, or NaN.
        ImportError: the `safetensors` package is missing.
    """
    file = open_safetensors(path)
    tensors: dict[str, Tensor] = {}
    unknown = []
    for key in file.keys():  # noqa: SIM118 - not a mapping
        name = adapter_name(key)
        if name is None:
            unknown.append(key)
        elif name in tensors:
            raise ValueError(f"{path} has {name} twice; save the adapter again")
        elif (kind := file.get_slice(key).get_dtype()) not in SAFETENSORS_DTYPES:
            raise ValueError(f"{path}: {key} is of type {kind}; save the adapter in bf16 or fp32")
        else:
            tensors[name] = file.get_tensor(key)
    if unknown:
        raise ValueError(
            f"{path} has {listing(unknown, 3)}, which no adapter of a Llama model has; save the "
            "adapter with PEFT's save_pretrained"
        )
    for name, w in tensors.items():
        if not torch.isfinite(w).all():
            raise ValueError(f"{path}: {name} has NaN or infinite numbers; train the adapter again")
    return tensors


def in_meta_order(tensors: Mapping[str, Tensor], head_dim: int) -> dict[str, Tensor]:
    """The tensors of `read_tensors` with rows in Meta's order. Their shapes must be right."""
    return {name: _reordered(name, w, head_dim, interleave) for name, w in tensors.items()}


def adapter_name(key: str) -> str | None:
    """Meta's name of PEFT's tensor `key`; None: adapters of a Llama model have no such tensor.

    States that were not saved by `save_pretrained` also have the adapter's name, "default".
    """
    key = key.removeprefix(PREFIX).replace(".modules_to_save.", ".").replace(".default", "")
    if part := _PART.fullmatch(key):
        linear = (meta_name(f"{part[1]}.weight") or "").removesuffix(".weight")
        known = linear.rpartition(".")[2] in LINEARS.values()
        return f"{linear}.{PARTS[part[2]]}" if known else None
    name = meta_name(key)
    return name if name in VOCABULARY else None


def peft_name(name: str) -> str:
    """PEFT's name of an adapter's tensor; the inverse of `adapter_name`."""
    linear, _, part = name.rpartition(".")
    if part == "weight":
        return PREFIX + hf_name(name)
    stem = PREFIX + hf_name(f"{linear}.weight").removesuffix(".weight")
    theirs = next(peft for peft, ours in PARTS.items() if ours == part)
    return f"{stem}.{theirs}" + (".weight" if part != "lora_magnitude" else "")


def _reordered(name: str, w: Tensor, head_dim: int, reorder: Any) -> Tensor:
    """`w` with the rows of B and of the magnitude of wq and wk moved by `interleave` or `halve`."""
    linear, _, part = name.rpartition(".")
    if linear.rpartition(".")[2] not in ("wq", "wk") or part == "lora_a":
        return w
    columns = w.unsqueeze(1) if w.dim() == 1 else w
    return reorder(columns, head_dim).view(w.shape)  # type: ignore[no-any-return]


def write_peft(
    folder: Path,
    config: LoRAConfig,
    tensors: Mapping[str, Tensor],
    *,
    head_dim: int,
    tied: bool,
    base: str | None,
) -> None:
    """Write the two files into an existing folder.

    Args:
        tensors: {Meta's name: tensor}: A, B, magnitudes, and weights that were trained whole.
        tied: the output of a tied base follows the embedding among `tensors`.
        base: the name or path of the base.

    Raises:
        ImportError: the `safetensors` package is missing.
        OSError: the files cannot be written.
    """
    try:
        from safetensors import SafetensorError
        from safetensors.torch import save_file
    except ImportError as e:
        raise ImportError(f"adapters need a package: {install_line('hf')}") from e
    whole = [theirs for theirs, ours in WHOLE.items() if ours in tensors]
    options = peft_options(config) | {
        "base_model_name_or_path": base,
        "modules_to_save": whole or None,
        "ensure_weight_tying": tied,
    }
    write_json(folder / CONFIG_FILE, options)
    ordered = {n: _reordered(n, w.detach().cpu(), head_dim, halve) for n, w in tensors.items()}
    written = {peft_name(n): w.clone(memory_format=MEMORY) for n, w in ordered.items()}
    path = folder / WEIGHTS_FILE
    try:
        save_file(written, path, metadata={"format": "pt"})
    except SafetensorError as e:
        raise OSError(f"{path} could not be written; is the disk full? ({e})") from e
    shutil.copymode(folder / CONFIG_FILE, path)  # the library lets only the owner read


def peft_options(config: LoRAConfig) -> dict[str, Any]:
    """The options of adapter_config.json that follow from `config`."""
    names = {ours: theirs for theirs, ours in LINEARS.items()}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "inference_mode": True,
        "r": config.rank,
        "lora_alpha": config.alpha,
        "lora_dropout": config.dropout,
        "target_modules": [names[target] for target in config.targets],
        "use_rslora": config.rslora,
        "use_dora": config.dora,
        "bias": "none",
    }
