"""Any source -> Hugging Face's layout: config.json and safetensors.

Knows the folder; `hf_tokenizer_export` writes tokenizer.json. Shapes: D dim, d head_dim.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llama.checkpoints.formats.hf_config import INDEX_FILE, SCALING, hf_name
from llama.checkpoints.formats.hf_tokenizer_export import write_tokenizer
from llama.checkpoints.source import Source
from llama.common.dtypes import dtype_name
from llama.common.extras import install_line
from llama.common.files import write_json
from llama.common.progress import progress
from llama.distributed.sharding import weight_shapes
from llama.model import ModelArgs
from llama.tokenizer import Tokenizer

# For an older version or none, transformers 5 may warn that Llama 3's split pattern is wrong.
TRANSFORMERS_VERSION = "5.0.0"
MAX_SHARD_BYTES = 10**9  # a larger tensor gets a file of its own


def write_hf(source: Source, tokenizer: Tokenizer, folder: Path, dtype: torch.dtype | None) -> None:
    """Write `source` into the existing `folder` as the transformers library reads it.

    The tensors of one file are in memory at a time. The output of a tied model is not written.

    Args:
        dtype: of all weights; None: the stored dtypes.

    Raises:
        ValueError: weights that do not fit the sizes.
        ImportError: the `safetensors` or `tokenizers` package is missing.
        OSError: the files cannot be written.
    """
    try:
        import safetensors.torch  # noqa: F401 - before anything is written
        import tokenizers  # noqa: F401
    except ImportError as e:
        raise ImportError(f"Hugging Face files need packages: {install_line('hf')}") from e
    args = source.args()
    stored = dtype or source.dtype("layers.0.attention.wq.weight")
    config = hf_config(args, tokenizer, stored, tied=source.tied, context=source.context)
    write_json(folder / "config.json", config)
    write_json(folder / "generation_config.json", token_ids(tokenizer))
    write_tokenizer(tokenizer, folder, source.context)
    write_weights(source, args, folder, dtype)


def token_ids(tokenizer: Tokenizer) -> dict[str, Any]:
    """The ids of special tokens for generation_config.json; null: no such token."""
    return {
        "bos_token_id": tokenizer.bos_id if tokenizer.bos_id >= 0 else None,
        "eos_token_id": list(tokenizer.stop_tokens),
        "pad_token_id": tokenizer.pad_id if tokenizer.pad_id >= 0 else None,
    }


def hf_config(
    args: ModelArgs, tokenizer: Tokenizer, dtype: torch.dtype, tied: bool, context: int
) -> dict[str, Any]:
    """The content of config.json.

    RoPE is written as in transformers 4 (`rope_theta`, `rope_scaling`), which 5 reads too.
    """
    scaling = {"rope_type": "llama3", "factor": args.scale_factor, **SCALING}
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": args.dim,
        "intermediate_size": args.hidden_dim,
        "num_hidden_layers": args.n_layers,
        "num_attention_heads": args.n_heads,
        "num_key_value_heads": args.kv_heads,
        "head_dim": args.head_dim,
        "vocab_size": args.vocab_size,
        "max_position_embeddings": context,
        "rms_norm_eps": args.norm_eps,
        "rope_theta": args.rope_theta,
        "rope_scaling": scaling if args.use_scaled_rope else None,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": tied,
        "torch_dtype": dtype_name(dtype),
        "transformers_version": TRANSFORMERS_VERSION,
        **token_ids(tokenizer),
    }


def halve(rows: Tensor, head_dim: int) -> Tensor:
    """Whole heads (heads * d, D) from Meta's order to HF's: row 2j -> j, row 2j + 1 -> d/2 + j."""
    pairs = rows.view(-1, head_dim // 2, 2, rows.shape[1])
    return pairs.transpose(1, 2).reshape(rows.shape)


def plan_files(sizes: dict[str, int]) -> list[list[str]]:
    """Distribute {name: bytes}, in order, over files of at most MAX_SHARD_BYTES."""
    files: list[list[str]] = []
    room = 0
    for name, size in sizes.items():
        if size > room or not files:
            files.append([])
            room = MAX_SHARD_BYTES
        files[-1].append(name)
        room -= size
    return files


def write_weights(source: Source, args: ModelArgs, folder: Path, dtype: torch.dtype | None) -> None:
    """Write model.safetensors, or several numbered files and their index."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    shapes = weight_shapes(args)
    if source.tied:
        del shapes["output.weight"]
    sizes = {
        name: torch.Size(shape).numel() * (dtype or source.dtype(name)).itemsize
        for name, shape in shapes.items()
    }
    files = plan_files(sizes)
    names = [f"model-{i + 1:05}-of-{len(files):05}.safetensors" for i in range(len(files))]
    if len(files) == 1:
        names = ["model.safetensors"]
    weights: dict[str, Tensor] = {}
    file_of = {n: path for path, members in zip(names, files, strict=True) for n in members}
    last = {members[-1] for members in files}
    for name in progress(shapes, "writing", total=len(shapes), unit="tensor"):
        weights[hf_name(name)] = read_hf(source, name, args.head_dim, dtype)
        if name in last:
            path = folder / file_of[name]
            try:
                save_file(weights, path, metadata={"format": "pt"})
            except SafetensorError as e:
                raise OSError(f"{path} could not be written; is the disk full? ({e})") from e
            shutil.copymode(folder / "config.json", path)  # the library lets only the owner read
            weights.clear()
    if len(files) > 1:
        where = {hf_name(name): path for name, path in file_of.items()}
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": where}
        write_json(folder / INDEX_FILE, index)


def read_hf(source: Source, name: str, head_dim: int, dtype: torch.dtype | None) -> Tensor:
    """The weight `name` in HF's row order, contiguous."""
    weight = source.read(name).to(dtype or source.dtype(name))
    if name.split(".")[-2] in ("wq", "wk"):
        weight = halve(weight, head_dim)
    return weight.contiguous()
