"""Meta's layout: params.json, and shards consolidated.00.pth, consolidated.01.pth, ...

Knows how fairscale's shards combine to whole weights. Shards are mapped into memory; a weight is
read from the disk when it is used.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llama.checkpoints.formats.wrapped_weights import unwrap
from llama.checkpoints.source import Source, same_weights, sample
from llama.common.dtypes import DTYPES
from llama.common.files import read_json
from llama.common.torch_file import load_torch
from llama.distributed.sharding import shard_dim
from llama.model import ModelArgs

# Keys of params.json that are ignored: inference chooses the value.
DECIDED_AT_BUILD = {"max_batch_size"}
# The key that this library adds for quantized weights, see `formats.quantized`.
QUANTIZATION = "quantization"
# Tensors of old checkpoints that follow from params.json.
IGNORED_WEIGHTS = {"rope.freqs"}


def read_params(ckpt_dir: str | Path) -> dict[str, Any]:
    """The content of `params.json`. All keys are checked but QUANTIZATION, which is optional.

    Raises:
        FileNotFoundError: no folder, or no params.json in it.
        ValueError: not JSON, unknown or missing keys, or impossible sizes.
    """
    folder = Path(ckpt_dir)
    if not folder.is_dir():
        raise FileNotFoundError(f"no checkpoint folder at {folder}; check ckpt_dir")
    path = folder / "params.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"no params.json in {folder}; an official checkpoint has one beside its "
            "consolidated.*.pth (in Hugging Face repositories both are under original/)"
        )
    params = read_json(path)
    known = {field.name for field in dataclasses.fields(ModelArgs)}
    if unknown := sorted(set(params) - known - {QUANTIZATION}):
        raise ValueError(
            f"{path} has keys this library does not know: {unknown}. It loads the text models of "
            "Llama 3 to 3.3; vision, LoRA and Meta's quantized checkpoints are other architectures"
        )
    if missing := [key for key in ("dim", "n_layers", "n_heads") if key not in params]:
        raise ValueError(f"{path} lacks {missing}; download it again")
    params = {key: value for key, value in params.items() if key not in DECIDED_AT_BUILD}
    try:
        ModelArgs(**{key: value for key, value in params.items() if key != QUANTIZATION})
    except ValueError as e:
        raise ValueError(f"{path}: {e}; download it again") from None
    return params


def find_shards(ckpt_dir: str | Path) -> list[Path]:
    """The `.pth` files of a folder, in rank order.

    Raises:
        FileNotFoundError: there are none, or one is missing.
    """
    shards = sorted(Path(ckpt_dir).glob("consolidated.*.pth"))
    if not shards:
        raise FileNotFoundError(f"no consolidated.*.pth in {ckpt_dir}; check ckpt_dir")
    for i, shard in enumerate(shards):
        if shard.name != f"consolidated.{i:02}.pth":
            raise FileNotFoundError(
                f"{ckpt_dir} has {shard.name} and no consolidated.{i:02}.pth; download it again"
            )
    return shards


def read_shard(
    path: Path, dtypes: Collection[torch.dtype] = tuple(DTYPES.values())
) -> dict[str, Tensor]:
    """Map the tensors of one `.pth` into memory; code in the file is not run.

    Raises:
        ValueError: see `load_torch`; or the file is not a state dict, or has tensors of other
            dtypes than `dtypes`.
    """
    content = load_torch(path, mmap=True)
    try:
        weights = unwrap(content)
    except ValueError as e:
        raise ValueError(f"{path}: {e}") from None
    if not isinstance(weights, dict) or not all(
        isinstance(name, str) and isinstance(w, Tensor) for name, w in weights.items()
    ):
        raise ValueError(f"{path} is not a state dict of tensors: it is not a Llama checkpoint")
    # Plain tensors, without the gradients that a saved nn.Parameter asks for.
    weights = {name: w.detach() for name, w in weights.items() if name not in IGNORED_WEIGHTS}
    if quantized := [name for name, w in weights.items() if w.dtype not in dtypes]:
        if quantized[0].endswith((".q", ".packed")):
            raise ValueError(
                f"{path}: {quantized[0]} was written by `llama3 quantize`, and the params.json "
                f'beside it lacks "{QUANTIZATION}"; get its params.json, or quantize it again'
            )
        raise ValueError(
            f"{path}: {quantized[0]} is {weights[quantized[0]].dtype}; quantized checkpoints need "
            "scales that this layout does not have: get the bfloat16 release"
        )
    return weights


class MetaSource(Source):
    """A folder in Meta's layout, of one or several shards.

    Raises:
        FileNotFoundError, ValueError: see `read_params`, `find_shards` and `read_shard`.
    """

    layout = "meta"

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.params = read_params(path)
        files = find_shards(path)
        self.n_shards = len(files)
        self.shards = [read_shard(file) for file in files]
        for file, shard in zip(files, self.shards, strict=True):
            different = {n: w.shape for n, w in shard.items()} != {
                n: w.shape for n, w in self.shards[0].items()
            }
            if different:
                raise ValueError(f"{file} and {files[0]} are not shards of one model")
        embedding = self.shards[0].get("tok_embeddings.weight")
        if self.params.get("vocab_size", -1) == -1 and embedding is not None:
            self.params["vocab_size"] = self.n_shards * embedding.shape[0]
        self.tied = self._tied()
        self.kv_copies = self._count_kv_copies()

    def _tied(self) -> bool:
        """Whether output and embedding are equal in every shard."""
        for shard in self.shards:
            a, b = shard.get("tok_embeddings.weight"), shard.get("output.weight")
            if a is None or b is None or not same_weights(a, b):
                return False
        return True

    def _count_kv_copies(self) -> int:
        """How many times in a row each KV head is stored; corrects params["n_kv_heads"].

        The 405B release for 16 ranks stores each of 8 heads twice, and its params.json may say 16.
        """
        args = ModelArgs(**self.params)
        copies = len(self.shards) * args.n_heads  # an upper limit
        for layer in (0, args.n_layers - 1):
            for kind in ("wk", "wv"):
                name = f"layers.{layer}.attention.{kind}.weight"
                parts = [shard[name] for shard in self.shards if name in shard]
                rows = sum(len(part) for part in parts)
                stored = rows // args.head_dim
                if len(parts) < len(self.shards) or rows % args.head_dim or stored < 2:
                    return 1  # `args` raises the error that says what is missing
                if stored <= args.kv_heads and len(parts) != stored:
                    return 1  # only a release for more ranks than heads stores heads twice
                heads = torch.cat(parts).view(stored, args.head_dim, -1)
                copies = min(copies, _count_copies(heads))
        if stored > args.kv_heads and stored // copies != args.kv_heads:
            return 1  # the heads differ: `args` raises the error that there are too many
        self.params["n_kv_heads"] = stored // copies
        return copies

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: self._shape(name) for name in self.shards[0]}

    def _shape(self, name: str) -> tuple[int, ...]:
        shape = list(self.shards[0][name].shape)
        dim = shard_dim(name) if "." in name else None
        if dim is not None and dim < len(shape):
            shape[dim] *= self.n_shards
            if self._is_kv(name):
                shape[dim] //= self.kv_copies
        return tuple(shape)

    @staticmethod
    def _is_kv(name: str) -> bool:
        return name.split(".")[-2] in ("wk", "wv")

    def dtype(self, name: str) -> torch.dtype:
        return self.shards[0][name].dtype

    def read(self, name: str, dim: int = 0, start: int = 0, stop: int | None = None) -> Tensor:
        split = shard_dim(name)
        parts = [shard[name] for shard in self.shards]
        if split is None:  # norms of the shards may differ slightly: the first one is used
            return parts[0][start:stop]
        if split != dim:
            whole = torch.cat(parts, split) if len(parts) > 1 else parts[0]
            return whole[start:stop] if dim == 0 else whole[:, start:stop]
        size = self._shape(name)[dim]
        if self.kv_copies > 1 and self._is_kv(name):
            return self._read_kv_heads(parts, start, size if stop is None else stop)
        return _concatenated_range(parts, dim, start, size if stop is None else stop)

    def _read_kv_heads(self, parts: list[Tensor], start: int, stop: int) -> Tensor:
        """Rows `start`:`stop`, which are whole KV heads, from the first copy of each head."""
        d = ModelArgs(**self.params).head_dim
        assert start % d == stop % d == 0
        firsts = [head * self.kv_copies * d for head in range(start // d, stop // d)]
        heads = [_concatenated_range(parts, 0, row, row + d) for row in firsts]
        return heads[0] if len(heads) == 1 else torch.cat(heads)

    def sample(self, name: str) -> bytes:
        return b"".join(sample(shard[name]) for shard in self.shards)

    def read_replicated(self, name: str, rank: int, size: int) -> Tensor:
        return self.shards[rank if size == self.n_shards else 0][name]


def _count_copies(heads: Tensor) -> int:
    """The greatest power of two c such that each group of c heads in a row is equal."""
    copies = 1
    while len(heads) % (2 * copies) == 0:
        groups = heads.unflatten(0, (-1, 2 * copies))
        if not all(torch.equal(groups[:, 0], groups[:, i]) for i in range(1, 2 * copies)):
            break
        copies *= 2
    return copies


def _concatenated_range(parts: list[Tensor], dim: int, start: int, stop: int) -> Tensor:
    """`torch.cat(parts, dim)[start:stop]` along `dim`; only the parts in the range are read."""
    n = parts[0].shape[dim]
    pieces = [
        part.narrow(dim, max(start - i * n, 0), min(stop - i * n, n) - max(start - i * n, 0))
        for i, part in enumerate(parts)
        if i * n < stop and start < (i + 1) * n
    ]
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim)
