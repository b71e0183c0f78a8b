"""A checkpoint's weights under Meta's names, whole, whatever their files look like.

Knows which weight is split over ranks and how; each format has its own `Source`.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llama.distributed.sharding import weight_shapes
from llama.model import ModelArgs

# Tokens in a row that the releases were trained for: Llama 3, and 3.1 and later.
CONTEXT, LONG_CONTEXT = 8192, 131072
WEIGHT_FILES = (".pth", ".safetensors", ".gguf")


class Source(ABC):
    """An open checkpoint. Opening reads sizes and names; weights are read when asked for.

    Attributes:
        path: the folder or file, for messages.
        params: what params.json says, or would say; makes a `ModelArgs`.
        layout: "meta", "hf" or "gguf".
        n_shards: how many files the weights are split over (1 where files do not split weights).
        tied: the output's weights are the embedding's.
        quantization: (scheme, group) of the linears' weights, see `linears.quantized`; None: plain.
    """

    path: Path
    params: dict[str, Any]
    layout: str
    n_shards: int = 1
    tied: bool = False
    quantization: tuple[str, int] | None = None

    @property
    def context(self) -> int:
        """Tokens in a row that it was trained for: as the files say, else as the releases were."""
        released = LONG_CONTEXT if self.params.get("use_scaled_rope") else CONTEXT
        return int(self.params.get("max_seq_len", released))

    @abstractmethod
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """{Meta's name: whole shape} of what the files hold, "output.weight" included if tied."""

    @abstractmethod
    def dtype(self, name: str) -> torch.dtype:
        """What `read(name)` returns."""

    @abstractmethod
    def read(self, name: str, dim: int = 0, start: int = 0, stop: int | None = None) -> Tensor:
        """Part `start`:`stop` along `dim` of the whole weight, a CPU tensor.

        A view of the mapped file where that is possible; the caller must not write to it.
        """

    def read_slice(self, name: str, dim: int, start: int, stop: int) -> Tensor:
        """Rows (dim 0) or columns (1) `start`:`stop` of a weight; of codes and scales, theirs."""
        return self.read(name, dim, start, stop)

    def read_replicated(self, name: str, rank: int, size: int) -> Tensor:
        """A weight that every rank has all of, as rank `rank` of `size` should have it."""
        return self.read(name)

    def vocabulary(self) -> tuple[bytes, dict[str, Any]] | None:
        """The tokenizer that the files carry: (rank file, sidecar), see `llama.tokenizer`."""
        return None

    def fingerprints(self) -> dict[str, str]:
        """A short text for the sizes and one for the weights, by which ranks compare theirs."""
        files = [self.path] if self.path.is_file() else self.path.iterdir()
        sizes = sorted((f.name, f.stat().st_size) for f in files if f.suffix in WEIGHT_FILES)
        norm = hashlib.sha256(
            repr(sizes).encode() + self.read("norm.weight").float().numpy().tobytes()
        )
        params = {f"params.json's {name}": repr(value) for name, value in self.params.items()}
        return params | {"the weights": norm.hexdigest()[:8]}

    def args(self, **build: int) -> ModelArgs:
        """Sizes of the model; `build` gives max_seq_len and max_batch_size.

        Raises:
            ValueError: impossible sizes, or weights that do not fit them.
        """
        args = ModelArgs(**(self.params | build))
        check_shapes(self.shapes(), weight_shapes(args), self.path)
        return args


def check_shapes(
    found: dict[str, tuple[int, ...]], expected: dict[str, tuple[int, ...]], path: Path
) -> None:
    """Every weight is there, of its shape, and no other.

    Raises:
        ValueError: naming the first few that are not.
    """
    problems = {
        "missing": [f"{n} {s}" for n, s in expected.items() if n not in found],
        "unknown": [f"{n} {s}" for n, s in found.items() if n not in expected],
        "misshapen": [
            f"{n} {found[n]} instead of {s}" for n, s in expected.items() if found.get(n, s) != s
        ],
    }
    lines = [
        f"{kind}: {', '.join(names[:3])}" + f" and {len(names) - 3} more" * (len(names) > 3)
        for kind, names in problems.items()
        if names
    ]
    if lines:
        raise ValueError(f"the weights of {path} do not fit its sizes; " + "; ".join(lines))
