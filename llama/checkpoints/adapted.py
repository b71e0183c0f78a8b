"""A base and its adapters, opened to build a model.

`AdaptedSource` is a base with the weights and the vocabulary that come with an adapter.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from llama.checkpoints.formats.chat_settings import StoredTemplates, read_hf_templates
from llama.checkpoints.open import find_vocabulary, open_checkpoint
from llama.checkpoints.source import Source, sample
from llama.distributed.sharding import VOCABULARY
from llama.model import ModelArgs, Transformer
from llama.text.rank_file import parse_ranks

if TYPE_CHECKING:  # a model without adapters does without these modules
    from llama.checkpoints.adapter import Adapter


@dataclass(frozen=True)
class Adapters:
    """The adapters that a model is built with.

    Attributes:
        only: the one that all requests use.
        named: those that requests choose from, by name.
    """

    only: Adapter | None
    named: dict[str, Adapter]

    def attach(self, model: Transformer) -> None:
        """Add the adapters to a loaded model. All ranks call it at the same time."""
        if self.only is not None:
            from llama.checkpoints.adapter import attach_adapter

            attach_adapter(model, self.only)
        elif self.named:
            from llama.layers.adapter_rows import add_adapters

            add_adapters(model, {name: (a.config, a.weights) for name, a in self.named.items()})

    def fingerprints(self) -> dict[str, str]:
        """What ranks compare to detect different adapters, see `Source.fingerprints`."""
        found = {f"the adapter {name}": fingerprint(a) for name, a in self.named.items()}
        return found if self.only is None else found | {"the adapter": fingerprint(self.only)}

    def lines(self) -> list[str]:
        """A line about each adapter."""
        found = [f"With the adapter {n}, {_line(a)}" for n, a in self.named.items()]
        return found if self.only is None else [*found, f"With the adapter {_line(self.only)}"]


def _line(adapter: Adapter) -> str:
    """Folder, method, rank, targets, number of parameters."""
    config, tensors = adapter.config, (adapter.weights | adapter.whole).values()
    whole = "".join(f", {name.removesuffix('.weight')} whole" for name in adapter.whole)
    return (
        f"{adapter.path}: {'DoRA' if config.dora else 'LoRA'} of rank {config.rank}, "
        f"alpha {config.alpha:g}, on {', '.join(config.targets)}{whole}: "
        f"{sum(w.numel() for w in tensors):,} parameters"
    )


def open_adapted(
    path: str | Path, adapter: str | Path | None, adapters: Mapping[str, str | Path] | None
) -> tuple[Source, Adapters]:
    """The checkpoint at `path` with its adapters, see `BuildOptions`.

    Raises:
        FileNotFoundError, ValueError, TypeError, ImportError: see `open_checkpoint` and
            `read_adapter`; or a named adapter that is more than low-rank.
    """
    source = open_checkpoint(path)
    if adapter is None and not adapters:
        return source, Adapters(None, {})
    from llama.checkpoints.adapter import read_adapter

    if adapter is not None:
        only = read_adapter(adapter, source)
        return AdaptedSource(source, only), Adapters(only, {})
    named = {name: read_adapter(folder, source) for name, folder in (adapters or {}).items()}
    for name, found in named.items():
        if found.whole:
            raise ValueError(
                f"adapter {name}: {found.path} has {' and '.join(found.whole)} of its own, which "
                "requests cannot choose; build with this adapter alone, or merge it into a "
                "checkpoint: llama3 merge"
            )
        if _has_other_tokens(found, source):
            warnings.warn(
                f"adapter {name}: {found.path} was trained with other tokens than the base's, "
                "which requests get; build with this adapter alone, or give its tokenizer",
                stacklevel=3,
            )
    return source, Adapters(None, named)


def _has_other_tokens(adapter: Adapter, base: Source) -> bool:
    """Whether an adapter comes with a tokenizer whose ordinary tokens differ from the base's."""
    found = adapter.vocabulary and find_vocabulary(base)
    if not found or adapter.vocabulary is None:
        return False
    theirs = parse_ranks(adapter.vocabulary[0], str(adapter.path))
    return theirs != parse_ranks(found[0], str(base.path))


class AdaptedSource(Source):
    """The base of an adapter, with the embedding and the output that were trained whole.

    Linears are the base's: `attach_adapter` adds A and B to the model. The output of a quantized
    base is quantized in the same way.
    """

    def __init__(self, base: Source, adapter: Adapter):
        from llama.checkpoints.adapter import equal_halves
        from llama.checkpoints.formats.quantized import quantize_weight

        self.base, self.adapter = base, adapter
        self.path, self.layout, self.n_shards = base.path, base.layout, base.n_shards
        self.quantization = base.quantization
        self.replaces_vocabulary = adapter.vocabulary is not None or base.replaces_vocabulary
        rows = {len(w) for w in adapter.whole.values()} or {base.params["vocab_size"]}
        self.params = base.params | {"vocab_size": max(rows)}
        self.tied = base.tied and (not adapter.whole or equal_halves(adapter.whole))
        self._whole: dict[str, Tensor] = {}
        for name, w in adapter.whole.items():
            scheme = base.quantization
            self._whole |= quantize_weight(name, w.float(), scheme) if scheme else {name: w}

    @property
    def context(self) -> int:
        return self.base.context

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return self.base.shapes() | {name: tuple(w.shape) for name, w in self._whole.items()}

    def args(self, **build: int) -> ModelArgs:
        """See `Source.args`. The adapter was checked when it was read."""
        return replace(self.base.args(**build), vocab_size=self.params["vocab_size"])

    def dtype(self, name: str) -> torch.dtype:
        return self._whole[name].dtype if name in self._whole else self.base.dtype(name)

    def read(self, name: str, dim: int = 0, start: int = 0, stop: int | None = None) -> Tensor:
        if name not in self._whole:
            return self.base.read(name, dim, start, stop)
        w = self._whole[name]
        return w.narrow(dim, start, (w.shape[dim] if stop is None else stop) - start)

    def read_slice(self, name: str, dim: int, start: int, stop: int) -> Tensor:
        if name not in self._whole:
            return self.base.read_slice(name, dim, start, stop)
        return self._whole[name].narrow(dim, start, stop - start)  # rows, also of codes and scales

    def read_replicated(self, name: str, rank: int, size: int) -> Tensor:
        return self.base.read_replicated(name, rank, size)

    def vocabulary(self) -> tuple[bytes, dict[str, Any]] | None:
        return self.adapter.vocabulary or self.base.vocabulary()

    def stop_ids(self) -> list[int]:
        return self.base.stop_ids()

    def chat_templates(self) -> StoredTemplates:
        """The adapter's, if it has any."""
        stored = read_hf_templates(self.adapter.path)
        return stored if stored.sources else self.base.chat_templates()

    def sample(self, name: str) -> bytes:
        return sample(self._whole[name]) if name in self._whole else self.base.sample(name)

    def fingerprints(self) -> dict[str, str]:
        """Those of the base; `Adapters` has the adapter's."""
        return self.base.fingerprints()


def fingerprint(adapter: Adapter) -> str:
    """A short text that differs for adapters with different options or weights."""
    digest = hashlib.sha256(repr(adapter.config).encode())
    for name, w in sorted((adapter.weights | adapter.whole).items()):
        part = sample(w) if name in VOCABULARY else w.contiguous().view(torch.uint8).numpy()
        digest.update(name.encode() + bytes(part))
    return digest.hexdigest()[:8]
