"""GGUF files of architecture `llama`, read as weights under Meta's names.

Knows the file: its keys, tensors, quantized blocks and vocabulary. Knows no device and does not
encode text. The file lists dimensions innermost first; shapes here are (out, in), as in torch.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from llama.checkpoints.formats.bpe_ranks import DIGITS_PATTERN, rank_file, sidecar
from llama.checkpoints.formats.params import ffn_terms
from llama.checkpoints.source import Source
from llama.common.extras import install_line
from llama.distributed.sharding import weight_shapes
from llama.model import ModelArgs, apply_scaling
from llama.text.rank_file import LLAMA3_PATTERN

if TYPE_CHECKING:
    from gguf import ReaderTensor

# Keys that change what the tensors compute: refused unless absent or 0.
UNSUPPORTED_KEYS = (
    "expert_count", "logit_scale", "residual_scale", "embedding_scale", "attention.scale",
)  # fmt: skip
# `tokenizer.ggml.pre`: split pattern.
PATTERNS = {"llama-bpe": LLAMA3_PATTERN, "smollm": DIGITS_PATTERN}
ALIASES = {"llama3": "llama-bpe", "llama-v3": "llama-bpe"}
LLAMA3_ROWS = 128256  # the first Llama 3 files do not name their pre-tokenizer
NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5  # `tokenizer.ggml.token_type`

GGUF_NAMES = {  # Meta's name: the file's
    "tok_embeddings": "token_embd", "norm": "output_norm", "output": "output",
    "attention.wq": "attn_q", "attention.wk": "attn_k", "attention.wv": "attn_v",
    "attention.wo": "attn_output", "feed_forward.w1": "ffn_gate", "feed_forward.w2": "ffn_down",
    "feed_forward.w3": "ffn_up", "attention_norm": "attn_norm", "ffn_norm": "ffn_norm",
}  # fmt: skip
EMBEDDING = "token_embd.weight"
ROPE_FREQS = "rope_freqs.weight"


class _File:
    """An open GGUF file: metadata by key, tensors by name. Tensors are read from disk when used."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        if not self.path.is_file():
            raise FileNotFoundError(f"no GGUF file at {path}; give the path of a .gguf file")
        try:
            from gguf import GGUFReader
        except ImportError as e:
            raise ImportError(f"reading GGUF needs a package: {install_line('demo')}") from e
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
        """The value of `key`; a ValueError if the file lacks it."""
        if key not in self.fields:
            raise ValueError(f"{self.path} has no {key!r}; convert the model to GGUF again")
        return self.get(key)

    def count(self, key: str, default: int | None = None) -> int:
        """The value of `key`; a ValueError if it is not a positive integer."""
        value = self.need(key) if default is None else self.get(key, default)
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{self.path}: {key} must be one positive integer, not {value!r}")
        return value

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of the tensor `name`, as in torch; a ValueError if the file lacks it."""
        if name not in self.tensors:
            raise ValueError(f"{self.path} has no tensor {name!r}; convert the model to GGUF again")
        return tuple(int(n) for n in reversed(self.tensors[name].shape))

    def array(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """A copy in fp32 of rows `start`:`stop` of the tensor `name`."""
        from gguf.quants import dequantize

        tensor = self.tensors[name]
        try:
            values = dequantize(tensor.data[start:stop], tensor.tensor_type)
        except NotImplementedError as e:
            kind = tensor.tensor_type.name
            raise ValueError(f"{self.path}: {name}: cannot read type {kind}; use another") from e
        return np.require(values, np.float32, ["C", "W"]).reshape(-1, *self.shape(name)[1:])


class GGUFSource(Source):
    """An open GGUF file; weights are dequantized to fp32 when they are read.

    Query and key rows are stored in Meta's order: nothing is permuted.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a GGUF, damaged, or not a plain Llama.
        ImportError: the `gguf` package is missing.
    """

    layout = "gguf"

    def __init__(self, path: str | Path):
        self.file = _File(path)
        self.path = self.file.path
        self.params = _read_params(self.file)
        self.names = _map_names(self.file, self.params)
        self.tied = self.names["output.weight"] == EMBEDDING

    @property
    def context(self) -> int:
        """See `Source.context`."""
        return self.file.count("llama.context_length", super().context)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {meta: self.file.shape(name) for meta, name in self.names.items()}

    def dtype(self, name: str) -> torch.dtype:
        return torch.float32

    def read(
        self, name: str, dim: int = 0, start: int = 0, stop: int | None = None
    ) -> torch.Tensor:
        if dim == 0:
            return torch.from_numpy(self.file.array(self.names[name], start, stop))
        return torch.from_numpy(self.file.array(self.names[name]))[:, start:stop]

    def vocabulary(self) -> tuple[bytes, dict[str, Any]] | None:
        """See `Source.vocabulary`; None also for another kind of vocabulary than BPE.

        Raises:
            ValueError: a vocabulary that a rank file cannot express.
        """
        return _read_tokenizer(self.file)


def _read_params(file: _File) -> dict[str, Any]:
    """The content of params.json that says the same as the file's keys."""
    arch = file.need("general.architecture")
    if arch != "llama":
        raise ValueError(f"{file.path} is of architecture {arch!r}; only 'llama' can be converted")
    if file.get("split.count", 1) > 1:
        raise ValueError(f"{file.path} is one part of a split GGUF; merge the parts first")
    dim, n_heads = file.count("llama.embedding_length"), file.count("llama.attention.head_count")
    _check_keys(file, dim // n_heads)
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
        raise ValueError(f"{file.path}: {e}; convert the model to GGUF again") from e
    return params


def _decimal(value: float) -> float:
    """The shortest decimal with the same fp32 value: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(value)))


def _check_keys(file: _File, head_dim: int) -> None:
    """Raise a ValueError for settings that params.json cannot express."""
    fixed: dict[str, Any] = dict.fromkeys(UNSUPPORTED_KEYS, 0)
    fixed |= {"rope.scaling.type": "none", "rope.scale_linear": 1, "rope.scaling.factor": 1}
    for key in ("rope.dimension_count", "attention.key_length", "attention.value_length"):
        fixed[key] = head_dim
    for key, expected in fixed.items():
        if (value := file.get(f"llama.{key}", expected)) != expected:
            raise ValueError(
                f"{file.path}: llama.{key} is {value!r}; Meta's models have {expected!r} here"
            )


def _rope_factor(file: _File, head_dim: int, theta: float) -> float:
    """The factor of Llama 3.1's RoPE scaling; 1: no scaling.

    The file stores divisors of the frequencies, `rope_freqs.weight` of shape (head_dim / 2,): 1 for
    wavelengths below 2048, the factor above 8192, and values between in between.
    """
    if ROPE_FREQS not in file.tensors:
        if file.shape(EMBEDDING)[0] == LLAMA3_ROWS and file.get("llama.context_length", 0) > 8192:
            warnings.warn(
                f"{file.path} looks like Llama 3.1 and lacks its RoPE scaling, as the first such "
                "files did: answers to long prompts will be poor; get a newer conversion",
                stacklevel=2,
            )
        return 1.0
    divisors = torch.from_numpy(file.array(ROPE_FREQS))
    factor = float(divisors.max())
    freqs = theta ** -(torch.arange(0, head_dim, 2) / head_dim)  # (d/2,)
    expected = freqs / apply_scaling(freqs, factor)
    if divisors.shape != expected.shape or not torch.allclose(divisors, expected, rtol=1e-4):
        raise ValueError(f"{file.path}: {ROPE_FREQS} is not Llama 3.1's scaling of {head_dim} dims")
    return factor


def _map_names(file: _File, params: dict[str, Any]) -> dict[str, str]:
    """{Meta's name: the file's name} of every weight.

    Raises:
        ValueError: a weight is missing or has another shape, or the file has other tensors.
    """
    shapes = weight_shapes(ModelArgs(**params))
    names: dict[str, str] = {}
    for meta in shapes:
        *layer, name = meta.removesuffix(".weight").split(".", 2)
        prefix = f"blk.{layer[1]}." if layer else ""
        names[meta] = f"{prefix}{GGUF_NAMES[name]}.weight"
    if "output.weight" not in file.tensors:  # tied
        names["output.weight"] = EMBEDDING
    if unknown := sorted(set(file.tensors) - set(names.values()) - {ROPE_FREQS}):
        raise ValueError(f"{file.path}: unknown tensor {unknown[0]!r}: this is not a plain Llama")
    for meta, shape in shapes.items():
        if (found := file.shape(names[meta])) != shape:
            raise ValueError(
                f"{file.path}: {names[meta]} is {found}; by the file's keys it is {shape}"
            )
    return names


def _read_tokenizer(file: _File) -> tuple[bytes, dict[str, Any]] | None:
    """(rank file, sidecar), see `Source.vocabulary`."""
    if file.get("tokenizer.ggml.model") != "gpt2":
        return None
    rows = file.shape(EMBEDDING)[0]
    unnamed = rows == LLAMA3_ROWS and file.get("tokenizer.ggml.pre") is None
    pre = "llama-bpe" if unnamed else file.need("tokenizer.ggml.pre")
    pre = ALIASES.get(pre, pre)
    if pre not in PATTERNS:
        raise ValueError(f"{file.path}: unknown pre-tokenizer {pre!r}; known: {list(PATTERNS)}")
    ordinary, special = _read_tokens(file)
    llama3 = PATTERNS[pre] == LLAMA3_PATTERN
    add_bos = file.get("tokenizer.ggml.add_bos_token", llama3)
    bos = file.need("tokenizer.ggml.bos_token_id") if add_bos else None
    eos, pad = file.need("tokenizer.ggml.eos_token_id"), file.get("tokenizer.ggml.padding_token_id")
    if pad in ordinary.values():  # some files name an ordinary token, which cannot pad
        pad = None
    merges, template = file.need("tokenizer.ggml.merges"), file.get("tokenizer.chat_template", "")
    try:
        ranks = rank_file(ordinary, merges, whole_pieces=llama3)
        return ranks, sidecar(
            PATTERNS[pre], special, bos=bos, eos=eos, pad=pad, chat_template=template
        )
    except ValueError as e:
        raise ValueError(f"{file.path}: {e}; use the model's own tokenizer.model") from e


def _read_tokens(file: _File) -> tuple[dict[str, int], dict[str, int]]:
    """{text: id} of the ordinary tokens, in GPT-2's characters, and of the special tokens."""
    tokens, types = file.need("tokenizer.ggml.tokens"), file.need("tokenizer.ggml.token_type")
    rows = file.shape(EMBEDDING)[0]
    if not len(tokens) == len(types) == rows:
        raise ValueError(f"{file.path}: {len(tokens)} tokens, {len(types)} types, {rows} rows")
    if len(set(tokens)) != len(tokens):
        raise ValueError(f"{file.path}: two tokens have the same text; convert the model again")
    for text, kind in zip(tokens, types, strict=True):
        if kind not in (NORMAL, CONTROL, USER_DEFINED, UNUSED):
            raise ValueError(f"{file.path}: token {text!r} is of type {kind}, unknown in a BPE")
    ids = {text: i for i, text in enumerate(tokens)}
    ordinary = {text: i for text, i in ids.items() if types[i] == NORMAL}
    # Unused ids are special tokens: the model has a row for each and may sample it.
    return ordinary, {text: i for text, i in ids.items() if text not in ordinary}
