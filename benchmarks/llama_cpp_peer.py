"""llama.cpp through `llama-cpp-python`, with this library's weights.

Knows its file format and its C interface. Shapes: B rows, T ids in a row, V vocabulary.
"""

from __future__ import annotations

import ctypes
import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llama.checkpoints.formats.gguf import GGUF_NAMES, ROPE_FREQS
from llama.checkpoints.formats.hf_tokenizer_export import write_tokenizer
from llama.checkpoints.source import Source
from llama.distributed.sharding import weight_shapes
from llama.model import ModelArgs, apply_scaling
from llama.tokenizer import Tokenizer

CONTEXT = 131072  # positions that a file claims to be trained for
BATCH = 512  # ids that one call computes at most; llama.cpp's own default
KINDS = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}  # ggml's names of dtypes


def write_gguf(source: Source, path: Path, dtype: str, tokenizer: Tokenizer | None = None) -> None:
    """Write a GGUF file. One tensor at a time is in memory.

    Matrices are stored in `dtype`, norms in fp32 as llama.cpp requires. Rows of queries and keys
    keep Meta's order, which its architecture `llama` uses too.

    Args:
        tokenizer: of the vocabulary, which a server needs; None writes none.
    """
    import gguf

    args, kind = source.args(), gguf.GGMLQuantizationType[KINDS[dtype]]
    writer = gguf.GGUFWriter(path, "llama")
    if tokenizer is None:
        writer.add_tokenizer_model("no_vocab")
    else:
        _add_vocabulary(writer, tokenizer)
    writer.add_vocab_size(args.vocab_size)
    writer.add_context_length(CONTEXT)
    writer.add_block_count(args.n_layers)
    writer.add_embedding_length(args.dim)
    writer.add_feed_forward_length(args.hidden_dim)
    writer.add_head_count(args.n_heads)
    writer.add_head_count_kv(args.kv_heads)
    writer.add_rope_dimension_count(args.head_dim)
    writer.add_rope_freq_base(args.rope_theta)
    writer.add_layer_norm_rms_eps(args.norm_eps)
    names, float32 = _names(source), np.dtype(np.float32)
    divisors = _divisors(args)
    writer.add_tensor_info(ROPE_FREQS, divisors.shape, float32, divisors.nbytes)
    shapes = weight_shapes(args)
    size = getattr(torch, dtype).itemsize
    for meta, name in names.items():
        shape = shapes[meta]
        if len(shape) == 1:
            writer.add_tensor_info(name, shape, float32, 4 * shape[0])
        else:
            in_bytes = (shape[0], shape[1] * size)
            nbytes = in_bytes[0] * in_bytes[1]
            writer.add_tensor_info(name, in_bytes, np.dtype(np.uint8), nbytes, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.write_tensor_data(divisors)
    for meta in names:
        w = source.read(meta)
        w = w.to(torch.float32 if w.dim() == 1 else getattr(torch, dtype)).contiguous()
        writer.write_tensor_data(w.view(torch.uint8).numpy())
    writer.close()


def _add_vocabulary(writer: Any, tokenizer: Tokenizer) -> None:
    """Tokens, merges, special tokens and the chat template, from the tokenizer.json of an export.

    llama.cpp splits texts by the rules of Llama 3. Where the model has others, prompts of ids
    avoid the difference.
    """
    import gguf

    with TemporaryDirectory() as folder:
        write_tokenizer(tokenizer, Path(folder), CONTEXT)
        stored = json.loads((Path(folder) / "tokenizer.json").read_text(encoding="utf-8"))
        special = gguf.SpecialVocab(folder, load_merges=True, n_vocab=tokenizer.n_words)
    tokens = {i: text for text, i in stored["model"]["vocab"].items()}
    control = {token["id"]: token["content"] for token in stored["added_tokens"]}
    tokens |= control
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("llama-bpe")
    writer.add_token_list([tokens[i] for i in range(tokenizer.n_words)])
    kinds = gguf.TokenType
    writer.add_token_types(
        [kinds.CONTROL if i in control else kinds.NORMAL for i in range(tokenizer.n_words)]
    )
    special.add_to_gguf(writer)


def _names(source: Source) -> dict[str, str]:
    """{Meta's name: GGUF's name} of the tensors to store; a tied output is not stored."""
    names = {}
    for meta in weight_shapes(source.args()):
        if meta == "output.weight" and source.tied:
            continue
        *layer, name = meta.removesuffix(".weight").split(".", 2)
        names[meta] = (f"blk.{layer[1]}." if layer else "") + f"{GGUF_NAMES[name]}.weight"
    return names


def _divisors(args: ModelArgs) -> np.ndarray:
    """(head_dim / 2,) divisors of the RoPE frequencies."""
    freqs = args.rope_theta ** -(torch.arange(0, args.head_dim, 2).float() / args.head_dim)
    scaled = apply_scaling(freqs, args.scale_factor) if args.use_scaled_rope else freqs
    divisors: np.ndarray = (freqs / scaled).numpy()
    return divisors


def about() -> str:
    """Version, and the instruction sets it was built for."""
    import llama_cpp  # type: ignore[import-not-found,unused-ignore]

    features = llama_cpp.llama_print_system_info().decode()
    return f"llama-cpp-python {llama_cpp.__version__}: {features.strip(' |')}"


def quantize_gguf(source: Path, target: Path, scheme: str) -> None:
    """Quantize a GGUF file by llama.cpp's quantizer with its default settings.

    Args:
        scheme: Q8_0, Q4_0, Q4_K_M, ...

    Raises:
        RuntimeError: llama.cpp failed.
    """
    import llama_cpp  # type: ignore[import-not-found,unused-ignore]

    _be_quiet(llama_cpp)
    options = llama_cpp.llama_model_quantize_default_params()
    options.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{scheme}")
    options.nthread = torch.get_num_threads()
    paths = (str(path).encode() for path in (source, target))
    if llama_cpp.llama_model_quantize(*paths, ctypes.byref(options)):
        raise RuntimeError(f"llama.cpp could not quantize {source}")


def weight_bytes(path: Path) -> int:
    """Bytes of the tensors that a decode step reads: not the embedding, unless it is tied."""
    from gguf import GGUFReader

    sizes = {tensor.name: int(tensor.n_bytes) for tensor in GGUFReader(path).tensors}
    untied = "output.weight" in sizes
    return sum(n for name, n in sizes.items() if not (untied and name == "token_embd.weight"))


class LlamaCpp:
    """A model on its default settings, for up to `rows` sequences of `length` positions.

    Each number of rows has a context of its own, so that one row is not charged for others.

    Args:
        precise: fp32 attention and cache; by default llama.cpp rounds both to fp16.

    Raises:
        RuntimeError: llama.cpp failed.
    """

    def __init__(self, path: Path, rows: int, length: int, precise: bool):
        import llama_cpp  # type: ignore[import-not-found,unused-ignore]

        self.api: Any = llama_cpp
        _be_quiet(llama_cpp)
        llama_cpp.llama_backend_init()
        model = llama_cpp.llama_model_default_params()
        model.n_gpu_layers = 999 if torch.cuda.is_available() else 0
        self.model = llama_cpp.llama_model_load_from_file(str(path).encode(), model)
        if not self.model:
            raise RuntimeError(f"llama.cpp could not load {path}")
        self.length, self.precise = length, precise
        self.V = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))
        self.batch = llama_cpp.llama_batch_init(max(BATCH, rows), 0, 1)
        self.contexts: dict[int, Any] = {}  # of each number of rows
        self.cached: dict[int, int] = {}  # positions of each sequence in its cache

    def _context(self, rows: int) -> Any:
        if rows not in self.contexts:
            api = self.api
            options = api.llama_context_default_params()
            options.n_ctx = rows * -(-self.length // 256) * 256  # divided between the sequences
            options.n_batch = options.n_ubatch = BATCH
            options.n_seq_max = rows
            options.n_threads = options.n_threads_batch = torch.get_num_threads()
            if self.precise:
                options.type_k = options.type_v = api.GGML_TYPE_F32
                options.flash_attn_type = api.LLAMA_FLASH_ATTN_TYPE_DISABLED
            context = api.llama_init_from_model(self.model, options)
            if not context:
                raise RuntimeError(f"llama.cpp has no context of {options.n_ctx} positions")
            self.contexts[rows], self.cached[rows] = context, 0
        return self.contexts[rows]

    def forward(self, tokens: Tensor, position: int) -> Tensor:
        """(B, T) ids from `position` on -> (B, V) fp32 logits of the last."""
        B, T = tokens.shape
        context = self._context(B)
        if position != self.cached[B]:
            memory = self.api.llama_get_memory(context)
            for row in range(B):
                self.api.llama_memory_seq_rm(memory, row, position, -1)
        share = max(1, BATCH // B)
        for start in range(0, T, share):
            part = tokens[:, start : start + share]
            keep = "last" if start + part.shape[1] == T else "none"
            indices = self._feed(context, part.tolist(), position + start, keep)
        self.cached[B] = position + T
        return self._logits(context, indices)

    def all_logits(self, ids: list[int]) -> Tensor:
        """(T, V) fp32 logits after each of at most BATCH ids."""
        context = self._context(1)
        self.api.llama_memory_seq_rm(self.api.llama_get_memory(context), 0, 0, -1)
        self.cached[1] = len(ids)
        return self._logits(context, self._feed(context, [ids], 0, "all"))

    def _logits(self, context: Any, indices: list[int]) -> Tensor:
        rows = [self.api.llama_get_logits_ith(context, i) for i in indices]
        return torch.stack([torch.from_numpy(np.ctypeslib.as_array(r, (self.V,))) for r in rows])

    def _feed(self, context: Any, ids: list[list[int]], position: int, keep: str) -> list[int]:
        """Compute (B, T) ids in one call; returns the indices whose logits it keeps.

        Args:
            keep: of each row's ids "all", the "last", or "none".
        """
        batch, kept = self.batch, []
        batch.n_tokens = 0
        for row, values in enumerate(ids):
            for i, token in enumerate(values):
                n = batch.n_tokens
                batch.token[n], batch.pos[n] = token, position + i
                batch.n_seq_id[n], batch.seq_id[n][0] = 1, row
                batch.logits[n] = keep == "all" or (keep == "last" and i == len(values) - 1)
                if batch.logits[n]:
                    kept.append(n)
                batch.n_tokens = n + 1
        if code := self.api.llama_decode(context, batch):
            raise RuntimeError(f"llama_decode failed with code {code}")
        return kept


def _be_quiet(api: Any) -> None:
    """Discard llama.cpp's log."""
    global _silent
    _silent = api.llama_log_callback(lambda *_: None)
    api.llama_log_set(_silent, ctypes.c_void_p(0))


_silent: Any = None  # the callback; C code keeps a pointer to it
