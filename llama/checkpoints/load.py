"""An open checkpoint -> a model on this rank's device, in the memory of one copy.

Knows which part of a weight this rank needs; a `Source` reads it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llama.checkpoints.inspect import parameter_count
from llama.checkpoints.source import Source
from llama.common.dtypes import dtype_name
from llama.common.meta_device import without_memory
from llama.common.progress import progress
from llama.distributed import job, tensor_parallel
from llama.distributed.sharding import VOCABULARY, rank_part, vocabulary_share
from llama.layers.quantized_linear import check_ranks, check_scheme, quantized
from llama.layers.replace import replace_modules
from llama.layers.schemes import TILE
from llama.model import ModelArgs, Transformer


def check_quantize(source: Source, args: ModelArgs, quantize: str | None) -> None:
    """Check that the model can be built with `quantize` on the ranks that run.

    Raises:
        ValueError: unknown scheme, or `source` is quantized to another one, or see `check_ranks`.
    """
    if quantize is not None:
        check_scheme(quantize)
    stored = source.quantization
    if stored and quantize not in (None, stored.name):
        raise ValueError(
            f"{source.path} is quantized already, to {stored.name}; quantize={quantize!r} needs "
            "the original checkpoint"
        )
    if scheme := stored or quantize:
        check_ranks(args, scheme)


def read_part(source: Source, name: str, args: ModelArgs, rank: int, size: int) -> Tensor:
    """The part of the stored tensor `name` for rank `rank` of `size`; a view if possible.

    A rank's share of the vocabulary is padded with rows of zeros if the weight has fewer rows.
    """
    if size == 1:
        return source.read(name)
    weight = name.rpartition(".")[0] + ".weight"  # which codes and scales represent
    part = rank_part(weight, args, rank, size)
    if part is None:
        return source.read_replicated(name, rank, size)
    dim, start, stop = part
    if weight not in VOCABULARY:
        return source.read_slice(name, dim, start, stop)
    share = vocabulary_share(args, size)
    if name.endswith(".blocks"):  # whole tiles; bytes of zero are weights of zero
        tiles = source.read_slice(name, dim, start, stop)
        return F.pad(tiles, (0, 0, 0, 0, 0, -(-share // TILE) - len(tiles)))
    missing = share - (stop - start)
    rows = source.read_slice(name, dim, min(start, stop - 1), stop)  # at least one, for the width
    rows = rows.narrow(0, len(rows) - (stop - start), stop - start)
    return F.pad(rows, [0, 0] * (rows.dim() - 1) + [0, missing]) if missing else rows


def load_model(
    source: Source, args: ModelArgs, device: torch.device, dtype: torch.dtype
) -> Transformer:
    """Build this rank's model, without a KV cache, in evaluation mode.

    The model is created on the meta device, and the tensors of the files become its parameters. On
    the CPU, in the stored dtype, these are the mapped file itself. Tied weights are one tensor.
    Codes and scales keep their stored dtypes.

    Raises:
        ValueError: the ranks that run cannot share a model of these sizes.
    """
    rank, size = tensor_parallel.rank(), tensor_parallel.size()
    if source.quantization is not None:
        check_ranks(args, source.quantization)
    with without_memory():
        model = Transformer(args)
    if source.quantization is not None:
        replace_modules(model, {nn.Linear: quantized(source.quantization)})
    weights: dict[str, Tensor] = {}
    names = list(model.state_dict())
    shown = progress(names, f"loading on {device}", len(names), "tensor")
    for name in shown if job.is_leader() else names:
        if name == "output.weight" and source.tied:
            weights[name] = weights["tok_embeddings.weight"]
        else:
            part = read_part(source, name, args, rank, size)
            wanted = dtype if name.endswith(".weight") else part.dtype
            weights[name] = part.to(device=device, dtype=wanted).contiguous()
    model.load_state_dict(weights, strict=True, assign=True)
    return model.eval()


def summary(source: Source, model: Transformer, seconds: float, quantize: str | None = None) -> str:
    """One line about a loaded model; a second one if max_seq_len exceeds its trained context.

    Bytes are those of this rank's weights, without the KV cache.
    """
    distinct = {w.data_ptr(): w for w in model.state_dict().values()}.values()
    parameters = parameter_count(model.params, source.tied)
    size = sum(w.nbytes for w in distinct)
    w = model.norm.weight
    scheme = source.quantization.name if source.quantization else quantize
    kind = dtype_name(w.dtype) + (f" and {scheme}" if scheme else "")
    warning, max_seq_len = "", model.params.max_seq_len
    if max_seq_len > source.context:
        warning = (
            f"\nThe model was trained for {source.context} tokens in a row: beyond them "
            f"(max_seq_len {max_seq_len}) its output is poor"
        )
    return (
        f"Loaded {source.path}: {parameters:,} parameters, {kind} "
        f"on {w.device}, {source.n_shards} shard(s) -> {tensor_parallel.size()} rank(s), "
        f"{size / 1e9:.2f} GB, {seconds:.1f} s{warning}"
    )
