"""A checkpoint's path -> a model ready to generate, and its tokenizer; alike on all ranks."""

from __future__ import annotations

import hashlib
import sys
import time
from pathlib import Path

import torch

from llama.checkpoints.load import check_quantize, load_model, summary, tune
from llama.checkpoints.open import open_checkpoint, open_tokenizer
from llama.distributed import job, tensor_parallel
from llama.distributed.device import pick_device, pick_dtype
from llama.engine.compiled_step import check_cache, compile_decoding
from llama.engine.request import check_seed
from llama.layers.quantized_linear import check_scheme
from llama.model import Transformer
from llama.tokenizer import Tokenizer

UNASKED = 4096  # tokens in a row, at most, where nobody says how many


def open_model(
    ckpt_dir: str | Path,
    tokenizer_path: str | Path | None,
    max_seq_len: int | None,
    max_batch_size: int,
    model_parallel_size: int | None,
    seed: int,
    device: str | torch.device | None,
    dtype: torch.dtype | None,
    quantize: str | None,
    exact: bool,
    compile: bool,
) -> tuple[Transformer, Tokenizer]:
    """What `Llama.build` is made of; its arguments and errors."""
    check_seed(seed)
    if model_parallel_size is not None and type(model_parallel_size) is not int:
        raise TypeError(f"model_parallel_size must be an integer, not {model_parallel_size!r}")
    if quantize is not None:
        check_scheme(quantize)
    check_switches(exact, compile)
    check_cache()
    start, device = time.time(), pick_device(device)
    dtype = pick_dtype(dtype, device)
    tensor_parallel.initialize(model_parallel_size, device)
    with tensor_parallel.fails_on_all_ranks():
        source = open_checkpoint(ckpt_dir)
        if max_seq_len is None:
            max_seq_len = min(source.context, UNASKED)
        args = source.args(max_seq_len=max_seq_len, max_batch_size=max_batch_size)
        check_quantize(source, args, quantize)
        tokenizer = open_tokenizer(source, tokenizer_path)
    if tensor_parallel.size() > 1:
        sizes = {"max_seq_len": max_seq_len, "max_batch_size": max_batch_size}
        how = {"device": device.type, "dtype": str(dtype), "quantize": quantize, "exact": exact}
        vocabulary = {"the tokenizer": fingerprint(tokenizer)}
        tensor_parallel.check_same_on_ranks(sizes | how | source.fingerprints() | vocabulary)
    torch.manual_seed(seed)
    with tensor_parallel.fails_on_all_ranks():
        model = load_model(source, args, device, dtype)
    with (
        tensor_parallel.ends_job_on_error()
    ):  # ranks communicate here, and one that fails must wake the others
        tune(model, None if source.quantization else quantize, exact)
    with tensor_parallel.fails_on_all_ranks():
        model.setup_cache(max_batch_size, max_seq_len)
    if job.is_leader():
        print(summary(source, model, time.time() - start, quantize), file=sys.stderr)
    if compile:
        compile_decoding(model)
    return model, tokenizer


def check_switches(exact: bool, compile: bool) -> None:
    """Raise a TypeError or ValueError unless `open_model` can take both."""
    for name, value in (("exact", exact), ("compile", compile)):
        if type(value) is not bool:
            raise TypeError(f"{name} must be True or False, not {value!r}")
    if exact and compile:
        raise ValueError("a compiled step does not keep the reference's digits; choose one")
    if compile and job.environment().world > 1:
        raise ValueError("a compiled step runs on one rank; leave compile out, or run one process")


def fingerprint(tokenizer: Tokenizer) -> str:
    """The same for equal vocabularies only."""
    digest = hashlib.sha256(b"\n".join(tokenizer.ranks))
    digest.update(repr(sorted(tokenizer.special_tokens.items())).encode())
    return digest.hexdigest()[:8]
