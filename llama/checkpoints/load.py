"""An open checkpoint -> a ready model on this rank's device, in the memory of one copy."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llama.checkpoints.inspect import parameter_count
from llama.checkpoints.source import Source
from llama.common.progress import progress
from llama.distributed import job, tensor_parallel
from llama.distributed.sharding import VOCABULARY, rank_part, vocabulary_share
from llama.layers.quantized_linear import check_ranks, check_scheme, quantized
from llama.layers.replace import replace_modules
from llama.model import ModelArgs, Transformer

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def pick_device(device: str | torch.device | None) -> torch.device:
    """`device`, or the best there is: cuda, then mps, then cpu. A rank gets its own GPU.

    Raises:
        ValueError: it is not there.
    """
    if device is None:
        mps = (
            torch.backends.mps.is_available() and job.is_single_process()
        )  # where ranks do not communicate
        device = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    try:
        picked = torch.device(device)
    except RuntimeError:
        raise ValueError(f"unknown device {device!r}; use 'cuda', 'mps' or 'cpu'") from None
    if picked.type == "meta" or (picked.type == "mps" and not torch.backends.mps.is_available()):
        raise ValueError(f"device {str(picked)!r} cannot be used here; use 'cpu'")
    if picked.type == "cuda":
        if not torch.cuda.is_available():
            raise ValueError("device 'cuda' was asked for, and torch finds no GPU here; use 'cpu'")
        own = picked.index is None and job.is_launched()
        if own:
            picked = torch.device("cuda", job.local_rank())
        if picked.index is not None and picked.index >= (count := torch.cuda.device_count()):
            raise ValueError(
                f"torch finds {count} GPU(s) here, and no {picked}: start no more ranks on a "
                "machine than it has, or hide them (CUDA_VISIBLE_DEVICES=) to use its CPU"
            )
        if own:
            torch.cuda.set_device(picked)  # nccl communicates on the current device
    return picked


def pick_dtype(dtype: torch.dtype | None, device: torch.device) -> torch.dtype:
    """`dtype`, or bfloat16 where `device` computes in it, else float16 (GPU) or float32 (CPU)."""
    if dtype is not None:
        if dtype not in DTYPES:
            raise TypeError(f"dtype must be one of {', '.join(map(str, DTYPES))}, not {dtype!r}")
        return dtype
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if native else torch.float16
    if device.type == "mps":
        return torch.bfloat16 if torch.backends.mps.is_macos_or_newer(14, 0) else torch.float16
    if device.type == "cpu":
        mkldnn = torch.backends.mkldnn.is_available()
        native = mkldnn and torch.ops.mkldnn._is_mkldnn_bf16_supported()
        return torch.bfloat16 if native else torch.float32
    return torch.bfloat16


def check_quantize(source: Source, args: ModelArgs, quantize: str | None) -> None:
    """Raise a ValueError unless the ranks can build the model with its weights held so."""
    if quantize is not None:
        check_scheme(quantize)
    stored = source.quantization
    if stored and quantize not in (None, stored[0]):
        raise ValueError(
            f"{source.path} is quantized already, to {stored[0]}; quantize={quantize!r} needs the "
            "original checkpoint"
        )
    if stored or quantize:
        check_ranks(args, *(stored or (quantize,)))


def read_part(source: Source, name: str, args: ModelArgs, rank: int, size: int) -> Tensor:
    """What rank `rank` of `size` holds of the tensor `name`; a view of the file if it can be.

    A share of the vocabulary that the weight does not fill ends in rows of zeros.
    """
    if size == 1:
        return source.read(name)
    weight = name.rpartition(".")[0] + ".weight"  # that codes and scales stand for
    part = rank_part(weight, args, rank, size)
    if part is None:
        return source.read_replicated(name, rank, size)
    dim, start, stop = part
    if weight not in VOCABULARY:
        return source.read_slice(name, dim, start, stop)
    absent = vocabulary_share(args, size) - (stop - start)
    rows = source.read_slice(name, dim, min(start, stop - 1), stop)  # never none, for the width
    rows = rows.narrow(0, len(rows) - (stop - start), stop - start)
    return F.pad(rows, [0, 0] * (rows.dim() - 1) + [0, absent]) if absent else rows


def load(source: Source, args: ModelArgs, device: torch.device, dtype: torch.dtype) -> Transformer:
    """Build this rank's model, without a KV cache, in evaluation mode.

    The model is laid out on the meta device, and the files' tensors become its parameters: on the
    CPU, in the stored dtype, they are the mapped file itself; on another device each tensor goes
    straight there. Tied weights are one tensor. Codes and scales keep their own dtypes.

    Raises:
        ValueError: the ranks that run cannot share a model of these sizes.
    """
    rank, size = tensor_parallel.rank(), tensor_parallel.size()
    if source.quantization is not None:
        check_ranks(args, *source.quantization)
    with torch.device("meta"):
        model = Transformer(args)
    if source.quantization is not None:
        replace_modules(model, {nn.Linear: quantized(*source.quantization)})
    weights: dict[str, Tensor] = {}
    names = list(model.state_dict())
    shown = progress(names, f"loading on {device}", len(names), "tensor")
    for name in shown if job.is_leader() else names:
        if name == "output.weight" and source.tied:
            weights[name] = weights["tok_embeddings.weight"]
        else:
            part = read_part(source, name, args, rank, size)
            kept = dtype if name.endswith(".weight") else part.dtype
            weights[name] = part.to(device=device, dtype=kept).contiguous()
    model.load_state_dict(weights, strict=True, assign=True)
    return model.eval()


def summary(source: Source, model: Transformer, seconds: float, quantize: str | None = None) -> str:
    """What was loaded, in a line, and whether its rows are longer than those it was trained for.

    Bytes are this rank's, without the KV cache.
    """
    distinct = {w.data_ptr(): w for w in model.state_dict().values()}.values()
    parameters = parameter_count(model.params, source.tied)
    size = sum(w.nbytes for w in distinct)
    w = model.norm.weight
    held = source.quantization[0] if source.quantization else quantize
    kind = str(w.dtype).removeprefix("torch.") + (f" and {held}" if held else "")
    longer, room = "", model.params.max_seq_len
    if room > source.context:
        longer = (
            f"\nIt was trained for {source.context} tokens in a row: what lies beyond them "
            f"(max_seq_len {room}) makes little sense to it"
        )
    return (
        f"Loaded {source.path}: {parameters:,} parameters, {kind} "
        f"on {w.device}, {source.n_shards} shard(s) -> {tensor_parallel.size()} rank(s), "
        f"{size / 1e9:.2f} GB, {seconds:.1f} s{longer}"
    )
