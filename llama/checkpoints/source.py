"""`Source`: the weights of an open checkpoint under Meta's names, whatever its files look like.

Knows no file format: each format has its own subclass in `formats/`. Names and shapes are those of
the whole model, not of one shard.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llama.checkpoints.formats.chat_settings import StoredTemplates
from llama.common.listing import listing
from llama.distributed.sharding import weight_shapes
from llama.layers.schemes import Scheme
from llama.model import ModelArgs

# Tokens in a row that the releases were trained for: Llama 3, and 3.1 and later.
CONTEXT, LONG_CONTEXT = 8192, 131072
SAMPLED = 1024  # numbers of a row that `sample` reads
WEIGHT_SUFFIXES = (".pth", ".safetensors", ".gguf")


def released_context(params: dict[str, Any]) -> int:
    """Tokens in a row that the release with these sizes was trained for."""
    return LONG_CONTEXT if params.get("use_scaled_rope") else CONTEXT


class Source(ABC):
    """An open checkpoint. Opening reads names and sizes; weights are read on demand.

    Attributes:
        path: the folder or file, for messages.
        params: the content of params.json, or what it would be; keyword arguments of `ModelArgs`.
        layout: "meta", "hf" or "gguf".
        n_shards: number of files that each weight is split over (1 if files do not split weights).
        tied: the output's weights are those of the embedding.
        quantization: how the linears' weights are stored; None: they are plain.
        replaces_vocabulary: `vocabulary` decides, whatever tokenizer lies beside the weights.
    """

    path: Path
    params: dict[str, Any]
    layout: str
    n_shards: int = 1
    tied: bool = False
    quantization: Scheme | None = None
    replaces_vocabulary: bool = False

    @property
    def context(self) -> int:
        """Tokens in a row that the model was trained for: from the files, else by its release."""
        return int(self.params.get("max_seq_len", released_context(self.params)))

    @abstractmethod
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """{Meta's name: shape of the whole weight}; includes "output.weight" if it is tied."""

    @abstractmethod
    def dtype(self, name: str) -> torch.dtype:
        """The dtype of `read(name)`."""

    @abstractmethod
    def read(self, name: str, dim: int = 0, start: int = 0, stop: int | None = None) -> Tensor:
        """Part `start`:`stop` along `dim` of the whole weight, as a CPU tensor.

        It is a view of the mapped file where possible; the caller must not write to it.
        """

    def read_slice(self, name: str, dim: int, start: int, stop: int) -> Tensor:
        """The part of a stored tensor that belongs to `start`:`stop` along `dim` of its weight.

        For a plain weight this is `read`; codes and scales of a quantized weight have other sizes.
        """
        return self.read(name, dim, start, stop)

    def read_replicated(self, name: str, rank: int, size: int) -> Tensor:
        """A weight that is whole on every rank, as stored for rank `rank` of `size`."""
        return self.read(name)

    def vocabulary(self) -> tuple[bytes, dict[str, Any]] | None:
        """(rank file, sidecar) of the tokenizer in the checkpoint's files, see `llama.tokenizer`.

        None: there is none.
        """
        return None

    def stop_ids(self) -> list[int]:
        """Ids that end a generation, by the checkpoint's files; some may have no token."""
        return []

    def chat_templates(self) -> StoredTemplates:
        """The chat templates in the checkpoint's files."""
        return StoredTemplates()

    def sample(self, name: str) -> bytes:
        """Some of the bytes that store the weight `name`, see `sample`."""
        return sample(self.read(name))

    def fingerprints(self) -> dict[str, str]:
        """What ranks compare to detect different checkpoints.

        {name: text}: each entry of params.json, and a hash of the files' sizes, of the norms, and
        of a few numbers of every other weight.
        """
        files = [self.path] if self.path.is_file() else self.path.iterdir()
        sizes = sorted(
            (f.name, f.stat().st_size) for f in files if f.suffix.lower() in WEIGHT_SUFFIXES
        )
        digest = hashlib.sha256(repr(sizes).encode())
        for name in sorted(self.shapes()):
            digest.update(name.encode() + self.sample(name))
        params = {f"params.json's {name}": repr(value) for name, value in self.params.items()}
        return params | {"the weights": digest.hexdigest()[:8]}

    def args(self, **build: int) -> ModelArgs:
        """Sizes of the model; `build`: values of max_seq_len and max_batch_size.

        Raises:
            ValueError: impossible sizes, or weights of other sizes.
        """
        args = ModelArgs(**(self.params | build))
        check_layers(self.shapes(), args, self.path)
        check_shapes(self.shapes(), weight_shapes(args), self.path)
        return args


def check_layers(found: Collection[str], args: ModelArgs, path: Path) -> None:
    """Check that there are at least as many weights as layers, before anything loops over layers.

    Raises:
        ValueError: there are fewer; `path` is for the message.
    """
    if args.n_layers > len(found):
        raise ValueError(
            f"the weights of {path} do not fit its sizes; missing: {args.n_layers} layers "
            f"need more than {len(found)} weights"
        )


def check_shapes(
    found: dict[str, tuple[int, ...]], expected: dict[str, tuple[int, ...]], path: Path
) -> None:
    """Check that `found` has the names and shapes of `expected`; `path` is for the message.

    Raises:
        ValueError: it has not; the message names the first few weights that differ.
    """
    problems = {
        "missing": [f"{n} {s}" for n, s in expected.items() if n not in found],
        "unknown": [f"{n} {s}" for n, s in found.items() if n not in expected],
        "wrong shape": [
            f"{n} {found[n]} instead of {s}" for n, s in expected.items() if found.get(n, s) != s
        ],
    }
    lines = [f"{kind}: {listing(names, 3)}" for kind, names in problems.items() if names]
    if lines:
        raise ValueError(f"the weights of {path} do not fit its sizes; " + "; ".join(lines))


def sample(w: Tensor) -> bytes:
    """All bytes of a vector; of a matrix SAMPLED numbers of the first, middle and last row."""
    rows = w[[0, len(w) // 2, -1], :SAMPLED] if w.dim() > 1 and w.numel() else w
    return rows.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def same_weights(a: Tensor, b: Tensor) -> bool:
    """Whether two weights are equal. Different ones mostly differ in the first row already."""
    if a.shape != b.shape:
        return False
    if a.data_ptr() == b.data_ptr() and a.stride() == b.stride() and a.dtype == b.dtype:
        return True  # stored once
    return torch.equal(a[:1], b[:1]) and torch.equal(a, b)
