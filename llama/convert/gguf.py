"""GGUF of architecture `llama` -> the official layout. Knows the file: its keys, tensors, quantized
blocks and vocabulary. Knows nothing about models, devices or how to encode text.

Shapes: D dim, H heads, K KV heads, d = D/H, F feed-forward width, V vocabulary. The file lists
dimensions innermost first; shapes here are (out, in), as in torch.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from llama.args import ModelArgs
from llama.convert import ffn_terms, new_folder, rank_file, sidecar, write_model
from llama.rope import apply_scaling
from llama.vocabulary import LLAMA3_PATTERN

if TYPE_CHECKING:
    from gguf import ReaderTensor

# Keys under which the same tensors would compute something else: refused unless absent or 0.
OTHER_MATH = ("expert_count", "logit_scale", "residual_scale", "embedding_scale", "attention.scale")
# `tokenizer.ggml.pre` -> split pattern. SmolLM's is every digit alone, and GPT-2's rule around it.
PATTERNS = {
    "llama-bpe": LLAMA3_PATTERN,
    "smollm": r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+"
    r"|\s+(?=\p{N})|\s+(?!\S)|\s+",
}
NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5  # `tokenizer.ggml.token_type`

EMBEDDING = "token_embd.weight"
ROPE_FREQS = "rope_freqs.weight"


class _File:
    """An open GGUF: metadata by key, tensors by name. The tensors' data stay on disk."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        if not self.path.is_file():
            raise FileNotFoundError(f"no GGUF file at {path}; give the path of a .gguf file")
        try:
            from gguf import GGUFReader
        except ImportError as e:
            raise ImportError("reading GGUF needs a package: pip install 'llama3[demo]'") from e
        with open(self.path, "rb") as f:
            if f.read(4) != b"GGUF":
                raise ValueError(f"{path} is not a GGUF file; give the path of a .gguf file")
        try:
            reader = GGUFReader(self.path)
        except (ValueError, LookupError, OverflowError, TypeError) as e:
            raise ValueError(f"{path} is truncated or damaged ({e}); download it again") from e
        if reader.byte_order != "I":
            raise ValueError(f"{path} has the other byte order; run gguf-convert-endian on it")
        self.fields = reader.fields
        self.tensors: dict[str, ReaderTensor] = {t.name: t for t in reader.tensors}

    def get(self, key: str, default: Any = None) -> Any:
        """The value of `key`, or `default`."""
        try:
            return self.fields[key].contents() if key in self.fields else default
        except UnicodeDecodeError as e:
            raise ValueError(f"{self.path} is damaged in {key} ({e}); download it again") from e

    def need(self, key: str) -> Any:
        """The value of `key`, which must be there."""
        if key not in self.fields:
            raise ValueError(f"{self.path} has no {key!r}; convert the model to GGUF anew")
        return self.get(key)

    def count(self, key: str, default: int | None = None) -> int:
        """The value of `key`, which must be one positive integer."""
        value = self.need(key) if default is None else self.get(key, default)
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{self.path}: {key} is {value!r}; only one positive number will do")
        return value

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of the tensor `name`, which must be there, as torch has it."""
        if name not in self.tensors:
            raise ValueError(f"{self.path} has no tensor {name!r}; convert the model to GGUF anew")
        return tuple(int(n) for n in reversed(self.tensors[name].shape))

    def array(self, name: str) -> np.ndarray:
        """The tensor `name`, dequantized to fp32 in memory of its own."""
        from gguf.quants import dequantize

        tensor = self.tensors[name]
        try:
            values = dequantize(tensor.data, tensor.tensor_type)
        except NotImplementedError as e:
            kind = tensor.tensor_type.name
            raise ValueError(f"{self.path}: {name}: cannot read type {kind}; use another") from e
        return np.require(values, np.float32, ["C", "W"]).reshape(self.shape(name))


def read_params(path: str | Path) -> dict[str, Any]:
    """The contents of params.json for the GGUF at `path`.

    A model with Llama 3.1's RoPE scaling also gets `use_scaled_rope` and `rope_scale_factor`.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a GGUF, damaged, or not a plain Llama; the message says which.
        ImportError: the `gguf` package is missing.
    """
    return _params(_File(path))


def read_tensors(
    path: str | Path, dtype: torch.dtype = torch.bfloat16
) -> Iterator[tuple[str, torch.Tensor]]:
    """Meta's names and weights of the GGUF at `path`, dequantized one at a time.

    Query and key rows are in Meta's interleaved order already. In a tied model `output.weight` is
    the same tensor object as `tok_embeddings.weight`. The file is checked before the first tensor:
    errors are those of `read_params`, a ValueError naming an unknown or missing tensor included.
    """
    file = _File(path)
    return _tensors(file, _plan(file, _params(file)), dtype)


def read_tokenizer(path: str | Path) -> tuple[bytes, dict[str, Any]] | None:
    """The BPE vocabulary of the GGUF at `path`: a tiktoken rank file and its JSON sidecar.

    None when the file carries another kind of vocabulary, or none. Errors are those of
    `read_params`; a vocabulary that ranks alone cannot express is a ValueError.
    """
    return _tokenizer(_File(path))


def convert_gguf(src: str | Path, dst: str | Path, dtype: torch.dtype = torch.bfloat16) -> Path:
    """Write the GGUF `src` as the folder `dst` in the official layout, and return `dst`.

    The folder holds consolidated.00.pth, params.json, tokenizer.model and tokenizer.model.json, and
    appears complete or not at all. All weights are in memory once, in `dtype`. A file without a BPE
    vocabulary is converted without the two tokenizer files, with a warning.

    Raises:
        FileExistsError: `dst` exists; and all that `read_params` raises.
    """
    with new_folder(Path(dst)) as folder:
        file = _File(src)
        params = _params(file)
        tensors = _tensors(file, _plan(file, params), dtype)
        vocabulary = _tokenizer(file)
        if vocabulary is None:
            warnings.warn(f"{src} has no BPE vocabulary: add its tokenizer.model", stacklevel=2)
        write_model(folder, params, tensors, vocabulary)
    return Path(dst)


def _params(file: _File) -> dict[str, Any]:
    arch = file.need("general.architecture")
    if arch != "llama":
        raise ValueError(f"{file.path} is of architecture {arch!r}; only 'llama' can be converted")
    if file.get("split.count", 1) > 1:
        raise ValueError(f"{file.path} is one part of a split GGUF; merge the parts first")
    dim, n_heads = file.count("llama.embedding_length"), file.count("llama.attention.head_count")
    _refuse_other_math(file, dim // n_heads)
    vocab_size = file.shape(EMBEDDING)[0]
    if file.get("llama.vocab_size", vocab_size) != vocab_size:
        raise ValueError(f"{file.path}: llama.vocab_size contradicts {vocab_size} embeddings")
    multiple_of, multiplier = ffn_terms(dim, file.count("llama.feed_forward_length"))
    theta = file.get("llama.rope.freq_base", 10000.0)  # the format's own default
    params: dict[str, Any] = {
        "dim": dim,
        "n_layers": file.count("llama.block_count"),
        "n_heads": n_heads,
        "n_kv_heads": file.count("llama.attention.head_count_kv", n_heads),
        "vocab_size": vocab_size,
        "multiple_of": multiple_of,
        "ffn_dim_multiplier": multiplier,
        "norm_eps": _decimal(file.need("llama.attention.layer_norm_rms_epsilon")),
        "rope_theta": _decimal(theta),
    }
    if (factor := _rope_factor(file, dim // n_heads, theta)) != 1:
        params |= {"use_scaled_rope": True, "rope_scale_factor": _decimal(factor)}
    try:
        ModelArgs(**params)
    except ValueError as e:
        raise ValueError(f"{file.path}: {e}; convert the model to GGUF anew") from e
    return params


def _decimal(value: float) -> float:
    """The shortest decimal that fp32 stores as `value`: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(value)))


def _refuse_other_math(file: _File, head_dim: int) -> None:
    """Refuse what params.json cannot say, instead of a model that computes something else."""
    plain: dict[str, Any] = dict.fromkeys(OTHER_MATH, 0)
    plain |= {"rope.scaling.type": "none", "rope.scale_linear": 1}
    for key in ("rope.dimension_count", "attention.key_length", "attention.value_length"):
        plain[key] = head_dim
    for key, expected in plain.items():
        if (value := file.get(f"llama.{key}", expected)) != expected:
            raise ValueError(
                f"{file.path}: llama.{key} is {value!r}; Meta's models have {expected!r} here"
            )


def _rope_factor(file: _File, head_dim: int, theta: float) -> float:
    """The factor of Llama 3.1's RoPE scaling, 1 for none.

    `rope_freqs.weight`, (d/2,), divides each frequency: by 1 where the wavelength is below 2048, by
    the factor above 8192, and in between so that the result is a blend of the two.
    """
    if ROPE_FREQS not in file.tensors:
        return 1.0
    divisors = torch.from_numpy(file.array(ROPE_FREQS))
    factor = float(divisors.max())
    freqs = theta ** -(torch.arange(0, head_dim, 2) / head_dim)  # (d/2,)
    expected = freqs / apply_scaling(freqs, factor)
    if divisors.shape != expected.shape or not torch.allclose(divisors, expected, rtol=1e-4):
        raise ValueError(f"{file.path}: {ROPE_FREQS} is not Llama 3.1's scaling of {head_dim} dims")
    return factor


def _plan(file: _File, params: dict[str, Any]) -> dict[str, str]:
    """{Meta's name: the file's name} of every weight, after checking the file against it."""
    args = ModelArgs(**params)
    dim, hidden, kv_dim = args.dim, args.hidden_dim, args.kv_heads * args.head_dim
    tied = "output.weight" not in file.tensors
    top: dict[str, tuple[str, tuple[int, ...]]] = {
        "tok_embeddings": ("token_embd", (args.vocab_size, dim)),
        "norm": ("output_norm", (dim,)),
        "output": ("token_embd" if tied else "output", (args.vocab_size, dim)),
    }
    layer: dict[str, tuple[str, tuple[int, ...]]] = {
        "attention.wq": ("attn_q", (dim, dim)),
        "attention.wk": ("attn_k", (kv_dim, dim)),
        "attention.wv": ("attn_v", (kv_dim, dim)),
        "attention.wo": ("attn_output", (dim, dim)),
        "feed_forward.w1": ("ffn_gate", (hidden, dim)),
        "feed_forward.w2": ("ffn_down", (dim, hidden)),
        "feed_forward.w3": ("ffn_up", (hidden, dim)),
        "attention_norm": ("attn_norm", (dim,)),
        "ffn_norm": ("ffn_norm", (dim,)),
    }
    for i in range(args.n_layers):
        top |= {f"layers.{i}.{meta}": (f"blk.{i}.{n}", shape) for meta, (n, shape) in layer.items()}
    plan = {f"{meta}.weight": (f"{name}.weight", shape) for meta, (name, shape) in top.items()}
    if unknown := sorted(set(file.tensors) - {name for name, _ in plan.values()} - {ROPE_FREQS}):
        raise ValueError(f"{file.path}: unknown tensor {unknown[0]!r}: this is not a plain Llama")
    for name, shape in plan.values():
        if (found := file.shape(name)) != shape:
            raise ValueError(f"{file.path}: {name} is {found}; by the file's keys it is {shape}")
    return {meta: name for meta, (name, _) in plan.items()}


def _tensors(
    file: _File, plan: dict[str, str], dtype: torch.dtype
) -> Iterator[tuple[str, torch.Tensor]]:
    embedding = torch.from_numpy(file.array(EMBEDDING)).to(dtype)  # (V, D)
    for meta, name in plan.items():
        is_embedding = name == EMBEDDING  # itself, or the output tied to it
        yield meta, embedding if is_embedding else torch.from_numpy(file.array(name)).to(dtype)


def _tokenizer(file: _File) -> tuple[bytes, dict[str, Any]] | None:
    if file.get("tokenizer.ggml.model") != "gpt2":
        return None
    pre = file.need("tokenizer.ggml.pre")
    if pre not in PATTERNS:
        raise ValueError(f"{file.path}: unknown pre-tokenizer {pre!r}; known: {list(PATTERNS)}")
    ordinary, special = _vocabulary(file)
    llama3 = pre == "llama-bpe"
    add_bos = file.get("tokenizer.ggml.add_bos_token", llama3)
    bos = file.need("tokenizer.ggml.bos_token_id") if add_bos else None
    eos, pad = file.need("tokenizer.ggml.eos_token_id"), file.get("tokenizer.ggml.padding_token_id")
    merges, template = file.need("tokenizer.ggml.merges"), file.get("tokenizer.chat_template", "")
    try:
        ranks = rank_file(ordinary, merges, whole_pieces=llama3)
        return ranks, sidecar(PATTERNS[pre], special, bos, eos, pad, template)
    except ValueError as e:
        raise ValueError(f"{file.path}: {e}; use the model's own tokenizer.model") from e


def _vocabulary(file: _File) -> tuple[dict[str, int], dict[str, int]]:
    """{text: id} of the ordinary tokens, in GPT-2's characters, and of the special ones."""
    tokens, types = file.need("tokenizer.ggml.tokens"), file.need("tokenizer.ggml.token_type")
    rows = file.shape(EMBEDDING)[0] if file.tensors else len(tokens)
    if not len(tokens) == len(types) == rows:
        raise ValueError(f"{file.path}: {len(tokens)} tokens, {len(types)} types, {rows} rows")
    used = {text: i for i, text in enumerate(tokens) if types[i] != UNUSED}
    if len(used) + list(types).count(UNUSED) != len(tokens):
        raise ValueError(f"{file.path}: two tokens have the same text; convert the model anew")
    for text, i in used.items():
        if types[i] not in (NORMAL, CONTROL, USER_DEFINED):
            raise ValueError(f"{file.path}: token {text!r} is of type {types[i]}, unknown in a BPE")
    ordinary = {text: i for text, i in used.items() if types[i] == NORMAL}
    return ordinary, {text: i for text, i in used.items() if text not in ordinary}
