"""Adapters of a base: read, written, and attached to a model that is being built.

Knows what belongs to which base; `formats/peft` knows the files, `layers/lora` the arithmetic.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llama.checkpoints.download import hub_name
from llama.checkpoints.formats.hf_tokenizer_import import is_rank_file, read_vocabulary
from llama.checkpoints.formats.peft import CONFIG_FILE as CONFIG_FILE
from llama.checkpoints.formats.peft import (
    WEIGHTS_FILE,
    PeftConfig,
    in_meta_order,
    read_peft_config,
    read_tensors,
    write_peft,
)
from llama.checkpoints.locate import checkpoint_folder, expand
from llama.checkpoints.source import Source, check_shapes, same_weights
from llama.common.files import damage, read_json, write_json
from llama.distributed import tensor_parallel
from llama.distributed.sharding import VOCABULARY, weight_shapes
from llama.layers.lora import LoRAConfig, add_lora, lora_modules, lora_part
from llama.model import ModelArgs, Transformer
from llama.text.rank_file import read_sidecar

BASE_FILE = "llama3_adapter.json"  # ours, beside PEFT's files
NORMS = "norms_sha256"
Vocabulary = tuple[bytes, dict[str, Any]]  # a rank file and its sidecar, see `llama.tokenizer`


@dataclass(frozen=True)
class Adapter:
    """An adapter, all of it in memory.

    Attributes:
        path: its folder.
        config: which linears are adapted, and how.
        weights: {"layers.0.attention.wq.lora_a": A, ...}, also `lora_b` and with DoRA
            `lora_magnitude`; of the whole linears, rows in Meta's order, dtypes as stored.
        whole: {name: weight} of the embedding and the output where they were trained themselves;
            they may have more rows than the base's.
        vocabulary: (rank file, sidecar) that the adapter was trained with; None: the base's.
    """

    path: Path
    config: LoRAConfig
    weights: dict[str, Tensor]
    whole: dict[str, Tensor] = field(default_factory=dict)
    vocabulary: Vocabulary | None = None


def is_adapter(path: str | Path) -> bool:
    """Whether `path` is a folder with an adapter and no checkpoint."""
    folder = Path(path)
    return (folder / CONFIG_FILE).is_file() and not _is_checkpoint(folder)


def adapter_folder(path: str | Path) -> Path:
    """The folder that holds the files of the adapter at `path`.

    Raises:
        FileNotFoundError: there is none, or a file is missing.
        ValueError: the weights are in a file that is not read.
    """
    if not isinstance(path, (str, Path)) or not str(path):
        raise TypeError(f"adapter must be the path of an adapter's folder, not {path!r}")
    name, folder = hub_name(str(path)), expand(path)
    if not folder.is_dir():
        hub = f", or download it first: llama3 download {name}" if name is not None else ""
        raise FileNotFoundError(
            f"no adapter at {folder}; give the folder that contains its {CONFIG_FILE}{hub}"
        )
    if (folder / "snapshots").is_dir():  # a repository in Hugging Face's cache
        folder = checkpoint_folder(folder)
    if not (folder / CONFIG_FILE).is_file():
        what = "a checkpoint, not an adapter" if _is_checkpoint(folder) else "no adapter"
        raise FileNotFoundError(
            f"{folder} is {what}: it has no {CONFIG_FILE}; give the folder of the adapter"
        )
    if not (folder / WEIGHTS_FILE).is_file():
        if (folder / "adapter_model.bin").is_file():
            raise ValueError(
                f"{folder} has adapter_model.bin, which may contain code and is not read; save the "
                f"adapter again with PEFT, which writes {WEIGHTS_FILE}"
            )
        raise FileNotFoundError(f"{folder} has no {WEIGHTS_FILE}; get the adapter again")
    return folder


def _is_checkpoint(folder: Path) -> bool:
    return any((folder / name).is_file() for name in ("params.json", "config.json"))


def read_adapter(path: str | Path, source: Source) -> Adapter:
    """The adapter in PEFT's folder `path`, checked against its base.

    Raises:
        FileNotFoundError: there is no adapter.
        ValueError: it is damaged, has options that are not computed here, or is of another base.
        ImportError: the `safetensors` package is missing.
    """
    folder = adapter_folder(path)
    remedy = "save or download the adapter again"
    with damage(folder, remedy):
        peft = read_peft_config(folder / CONFIG_FILE)
        args = source.args()
        stored = read_tensors(folder / WEIGHTS_FILE)
        _check_tensors(folder, peft, stored, args)
        tensors = in_meta_order(stored, args.head_dim)
        whole = {name: tensors[name] for name in VOCABULARY if name in tensors}
        check_base(folder, source)
        if peft.tied and source.tied and "tok_embeddings.weight" in whole:
            whole.setdefault("output.weight", whole["tok_embeddings.weight"])
        vocabulary = _vocabulary(folder, whole, args.vocab_size)
    weights = {name: w for name, w in tensors.items() if name not in whole}
    return Adapter(folder, peft.lora, weights, whole, vocabulary)


def adapter_shapes(
    config: LoRAConfig, whole: Mapping[str, int], args: ModelArgs
) -> dict[str, tuple[int, ...]]:
    """{name: shape} of an adapter's tensors, under Meta's names.

    Args:
        whole: {name of a weight that was trained whole: its rows}.
    """
    shapes: dict[str, tuple[int, ...]] = {name: (rows, args.dim) for name, rows in whole.items()}
    for weight, shape in weight_shapes(args).items():
        linear = weight.removesuffix(".weight")
        if linear.rpartition(".")[2] in config.targets:
            shapes[f"{linear}.lora_a"] = (config.rank, shape[1])
            shapes[f"{linear}.lora_b"] = (shape[0], config.rank)
            if config.dora:
                shapes[f"{linear}.lora_magnitude"] = (shape[0],)
    return shapes


def _check_tensors(
    folder: Path, peft: PeftConfig, tensors: Mapping[str, Tensor], args: ModelArgs
) -> None:
    """Check names and shapes of all tensors.

    Raises:
        ValueError: some differ; the message names the first few.
    """
    found = {name: tuple(w.shape) for name, w in tensors.items()}
    rows = {name: found[name][0] for name in VOCABULARY if len(found.get(name, ())) == 2}
    rows |= {name: args.vocab_size for name in peft.whole if name not in found}  # missing
    expected = adapter_shapes(peft.lora, rows, args)
    try:
        check_shapes(found, expected, folder)
    except ValueError as e:
        raise ValueError(
            f"{e}. Give the base that the adapter was trained on; if it is this one, get or save "
            "the adapter again"
        ) from None


def _vocabulary(folder: Path, whole: Mapping[str, Tensor], base_rows: int) -> Vocabulary | None:
    """`read_adapter_vocabulary`, checked against the rows of the embedding and the output.

    Raises:
        ValueError: there are other rows than the base's, and no tokenizer for them.
    """
    rows = {len(w) for w in whole.values()} or {base_rows}
    if (len(rows) > 1 or len(whole) == 1) and rows != {base_rows}:
        raise ValueError(
            f"{folder} has an embedding and an output of different sizes; train both: "
            "modules_to_save embed_tokens and lm_head"
        )
    try:
        vocabulary = read_adapter_vocabulary(folder)
    except ValueError as e:
        if rows != {base_rows}:
            raise
        warnings.warn(f"{e}. The base's tokenizer is used instead", stacklevel=3)
        return None
    if rows != {base_rows} and vocabulary is None:
        raise ValueError(
            f"{folder} has {min(rows)} rows of embeddings, the base {base_rows}, and no "
            "tokenizer; copy the tokenizer that it was trained with beside it"
        )
    return vocabulary


def read_adapter_vocabulary(folder: Path) -> Vocabulary | None:
    """The tokenizer in an adapter's folder, of this library or of Hugging Face; None: none."""
    path = folder / "tokenizer.model"
    if is_rank_file(path):
        return path.read_bytes(), read_sidecar(str(path))
    return read_vocabulary(folder)


def base_digests(source: Source) -> list[str]:
    """Hashes of a base's norms, of which all layouts and quantizations of a model share one.

    Rounded to bf16, and to fp16 and bf16: a copy of an fp32 model may be in either.
    """
    digests = hashlib.sha256(), hashlib.sha256()
    for name, shape in weight_shapes(source.args()).items():
        if len(shape) == 1:
            norm = source.read(name)
            for digest, w in zip(digests, (norm, norm.half()), strict=True):
                rounded = w.to(torch.bfloat16).contiguous()
                digest.update(rounded.view(torch.uint8).numpy().tobytes())
    return [digest.hexdigest() for digest in digests]


def check_base(folder: Path, source: Source) -> None:
    """Check that the adapter in `folder` was trained on `source`, if a file of ours says on what.

    Raises:
        ValueError: it was trained on a model with other norms.
    """
    path = folder / BASE_FILE
    known = read_json(path).get(NORMS) if path.is_file() else None
    if isinstance(known, list) and not set(map(str, known)) & set(base_digests(source)):
        base = read_peft_config(folder / CONFIG_FILE).base
        raise ValueError(
            f"{folder} was trained on another model than {source.path} (their norms differ); give "
            f"its base{f', {base}' if base else ''}"
        )


def write_adapter(
    folder: Path,
    source: Source,
    config: LoRAConfig,
    weights: Mapping[str, Tensor],
    *,
    whole: Mapping[str, Tensor] | None = None,
    vocabulary: Vocabulary | None = None,
) -> None:
    """Write an adapter of the base `source` into an existing folder, in PEFT's format.

    A block of `common.files.new_folder` makes the folder appear complete.

    Args:
        weights, whole, vocabulary: see `Adapter`. Any device and dtype; None: the base's.

    Raises:
        ValueError: tensors are missing, unknown or of a wrong shape, or not finite.
        ImportError: the `safetensors` package is missing.
        OSError: the files cannot be written.
    """
    args, tensors = source.args(), {**weights, **(whole or {})}
    rows = {name: len(w) for name, w in (whole or {}).items()}
    shapes = {name: tuple(w.shape) for name, w in tensors.items()}
    check_shapes(shapes, adapter_shapes(config, rows, args), folder)
    for name, w in tensors.items():
        if not torch.isfinite(w).all():
            raise ValueError(f"{name} has NaN or infinite numbers; the adapter is not written")
    tied = source.tied and equal_halves(whole or {})
    base = str(source.path.absolute())
    write_peft(folder, config, tensors, head_dim=args.head_dim, tied=tied, base=base)
    write_json(folder / BASE_FILE, {NORMS: base_digests(source)})
    if vocabulary is not None:
        (folder / "tokenizer.model").write_bytes(vocabulary[0])
        if vocabulary[1]:
            write_json(folder / "tokenizer.model.json", vocabulary[1])


def equal_halves(whole: Mapping[str, Tensor]) -> bool:
    """Whether `whole` has an embedding and an output, and both are the same."""
    embedding, output = (whole.get(name) for name in VOCABULARY)
    return embedding is not None and output is not None and same_weights(embedding, output)


def attach_adapter(model: Transformer, adapter: Adapter) -> None:
    """Add this rank's parts of an adapter to the linears of a loaded model, in evaluation mode.

    The weights that were trained whole come with `AdaptedSource`.
    """
    rank, size = tensor_parallel.rank(), tensor_parallel.size()
    # DoRA's magnitudes stay in fp32.
    dtype = torch.float32 if adapter.config.dora else model.norm.weight.dtype
    add_lora(model, adapter.config, dtype)
    state = dict(model.named_parameters())
    with torch.no_grad():
        for name, w in adapter.weights.items():
            state[name].copy_(lora_part(name, w, model.params, rank, size))
        model.eval()
        if adapter.config.dora:  # now: torch.compile would compile it again for each layer
            for module in lora_modules(model):
                module.magnitude_ratio(model.norm.weight.dtype)
