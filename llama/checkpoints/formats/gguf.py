"""GGUF files of architecture `llama`, read as weights under Meta's names.

Knows the file: its keys, tensors, quantized blocks and vocabulary. Knows no device and does not
encode text. The file lists dimensions innermost first; shapes here are (out, in), as in torch.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch

from llama.checkpoints.formats.chat_settings import StoredTemplates, read_gguf_templates
from llama.checkpoints.formats.gguf_header import GGUFHeader, read_header
from llama.checkpoints.formats.gguf_parts import check_parts, find_parts
from llama.checkpoints.formats.gguf_vocabulary import read_vocabulary, stop_ids
from llama.checkpoints.formats.params import ffn_terms
from llama.checkpoints.source import Source, check_layers, sample
from llama.common.extras import install_line
from llama.common.files import damage
from llama.distributed.sharding import weight_shapes
from llama.model import ModelArgs, apply_scaling

# Keys that change what the tensors compute: refused unless absent or 0.
UNSUPPORTED_KEYS = (
    "expert_count", "logit_scale", "residual_scale", "embedding_scale", "attention.scale",
)  # fmt: skip
LLAMA3_ROWS = 128256

GGUF_NAMES = {  # Meta's name: the file's
    "tok_embeddings": "token_embd", "norm": "output_norm", "output": "output",
    "attention.wq": "attn_q", "attention.wk": "attn_k", "attention.wv": "attn_v",
    "attention.wo": "attn_output", "feed_forward.w1": "ffn_gate", "feed_forward.w2": "ffn_down",
    "feed_forward.w3": "ffn_up", "attention_norm": "attn_norm", "ffn_norm": "ffn_norm",
}  # fmt: skip
EMBEDDING = "token_embd.weight"
ROPE_FREQS = "rope_freqs.weight"


class _File:
    """An open GGUF file: metadata by key, tensors by name. Tensors are read from disk when used.

    Args:
        path: the file. If it is split, any of its parts: all are opened, in order.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        paths = find_parts(self.path)
        parts = [_open(part) for part in paths]
        self.fields = parts[0].fields  # the others have only the keys of the split
        check_parts(paths, parts)
        self.tensors = {tensor.name: tensor for part in parts for tensor in part.tensors}

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
        if type(value) is not int or value < 1:
            raise ValueError(f"{self.path}: {key} must be one positive integer, not {value!r:.80}")
        return value

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of the tensor `name`, as in torch; a ValueError if the file lacks it."""
        if name not in self.tensors:
            raise ValueError(f"{self.path} has no tensor {name!r}; convert the model to GGUF again")
        return self.tensors[name].shape[::-1]

    def array(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """A copy in fp32 of rows `start`:`stop` of the tensor `name`."""
        try:
            return self.tensors[name].array(start, stop)
        except NotImplementedError as e:
            raise ValueError(f"{self.path}: {name}: cannot read {e}; use another") from e


def _open(path: Path) -> GGUFHeader:
    """The header of one file; a ValueError if it is damaged or is not a GGUF."""
    try:
        return read_header(path)
    except ImportError as e:
        raise ImportError(f"reading GGUF needs a package: {install_line('demo')}") from e
    except ValueError as e:
        raise ValueError(f"{path} is {e}; give the path of a whole .gguf file") from None


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

    def sample(self, name: str) -> bytes:
        rows = self.file.tensors[self.names[name]].rows()
        some = rows[[0, len(rows) // 2, -1]] if rows.ndim > 1 else rows  # a copy, or small
        return sample(torch.from_numpy(np.array(some)))

    def vocabulary(self) -> tuple[bytes, dict[str, Any]] | None:
        """See `Source.vocabulary`; None also for another kind of vocabulary than BPE.

        Raises:
            ValueError: a vocabulary that a rank file cannot express.
        """
        with damage(self.path, "convert the model to GGUF again"):
            return read_vocabulary(self.file)

    def stop_ids(self) -> list[int]:
        return stop_ids(self.file)

    def chat_templates(self) -> StoredTemplates:
        """See `Source.chat_templates`."""
        return read_gguf_templates(self.file.get)


def _read_params(file: _File) -> dict[str, Any]:
    """The content of params.json that says the same as the file's keys."""
    arch = file.need("general.architecture")
    if arch != "llama":
        raise ValueError(f"{file.path} is of architecture {arch!r}; only 'llama' can be converted")
    dim, n_heads = file.count("llama.embedding_length"), file.count("llama.attention.head_count")
    _check_keys(file, dim // n_heads)
    vocab_size = file.shape(EMBEDDING)[0]
    if file.get("llama.vocab_size", vocab_size) > vocab_size:  # the embeddings may be padded
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
    freqs = theta ** -(torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)  # (d/2,)
    expected = freqs / apply_scaling(freqs, factor)
    if divisors.shape != expected.shape or not torch.allclose(divisors, expected, rtol=1e-4):
        raise ValueError(f"{file.path}: {ROPE_FREQS} is not Llama 3.1's scaling of {head_dim} dims")
    return factor


def _map_names(file: _File, params: dict[str, Any]) -> dict[str, str]:
    """{Meta's name: the file's name} of every weight.

    Raises:
        ValueError: a weight is missing or has another shape, or the file has other tensors.
    """
    args = ModelArgs(**params)
    check_layers(file.tensors, args, file.path)
    shapes = weight_shapes(args)
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
