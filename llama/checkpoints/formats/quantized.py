"""Quantized checkpoints in Meta's layout: codes and scales instead of plain weights.

    params.json          ..., "quantization": {"scheme": "int4", "form": "blocks", "tied": true}
    consolidated.00.pth  layers.0.attention.wq.blocks, ...: the buffers of `BlockLinear`

Knows the files. `llama.layers.schemes` says how the weights of each scheme are stored.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llama.checkpoints.formats.meta import QUANTIZATION, find_shards, read_params, read_shard
from llama.checkpoints.source import Source, check_layers, check_shapes
from llama.common.dtypes import DTYPES
from llama.distributed.sharding import weight_shapes
from llama.layers.blocks import row_blocks
from llama.layers.quantization import rows_int4
from llama.layers.quantized_linear import quantized
from llama.layers.schemes import INT8, Form, Scheme, block_layout, find_scheme, old_int4
from llama.model import ModelArgs

PLAIN_DTYPES = tuple(DTYPES.values())
CODE_DTYPES = (torch.int8, torch.int32, torch.uint8)
MAX_CODES = 64  # of a stored number, and more: an int32 has eight
# Of params.json's "quantization"; the first form of int4 has no "form".
KEYS = {"scheme", "group", "tied", "form", "output_bits"}


def quantize_weight(name: str, w: Tensor, scheme: Scheme) -> dict[str, Tensor]:
    """{stored name: tensor} of Meta's weight `name`: codes and scales if it is a linear's.

    Raises:
        ValueError: the scheme cannot store so many columns; the message names the weight.
    """
    layer = name.removesuffix(".weight")
    if w.dim() == 1 or layer == "tok_embeddings":
        return {name: w}
    with torch.device("meta"):
        linear = nn.Linear(w.shape[1], w.shape[0], bias=False)
    linear.weight = nn.Parameter(w, requires_grad=False)
    buffers = quantized(scheme)(layer, linear).state_dict()
    return {f"{layer}.{key}": buffer for key, buffer in buffers.items()}


def stored_tensors(args: ModelArgs, scheme: Scheme) -> dict[str, Tensor]:
    """{stored name: tensor on the meta device} of a quantized model; plain weights are in bf16.

    Raises:
        ValueError: as `quantize_weight`.
    """
    tensors: dict[str, Tensor] = {}
    for name, shape in weight_shapes(args).items():
        w = torch.empty(shape, dtype=torch.bfloat16, device="meta")
        tensors |= quantize_weight(name, w, scheme)
    return tensors


def quantized_params(source: Source, scheme: Scheme) -> dict[str, Any]:
    """The content of params.json for `source` after quantization."""
    quantization: dict[str, Any] = {"scheme": scheme.name}
    if scheme.layers.kind == "groups":
        quantization["group"] = scheme.layers.group
    if scheme.layers.kind == "blocks":
        quantization |= {"form": "blocks", "output_bits": scheme.output.bits}
    if source.tied:
        quantization["tied"] = True
    return source.params | {QUANTIZATION: quantization}


class QuantizedSource(Source):
    """A folder with a quantized checkpoint. The file is mapped; tensors are read when used.

    `shapes`, `dtype` and `read` are about the stored tensors, which are whole and in one file. If
    `tied`, the output was quantized from the embedding; it has codes of its own all the same.

    Raises:
        FileNotFoundError, ValueError: see `read_params`, `find_shards` and `read_shard`.
    """

    layout = "meta"

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.params = read_params(path)
        self.quantization, self.tied = _parse_quantization(self.params.pop(QUANTIZATION), self.path)
        if self.params.get("vocab_size", -1) < 1:
            raise ValueError(f"{self.path / 'params.json'} lacks 'vocab_size'; quantize it again")
        files = find_shards(path)
        if len(files) > 1:
            raise ValueError(f"{path} is quantized and has {len(files)} shards; quantize it again")
        self.tensors = read_shard(files[0], (*PLAIN_DTYPES, *CODE_DTYPES))

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(w.shape) for name, w in self.tensors.items()}

    def dtype(self, name: str) -> torch.dtype:
        return self.tensors[name].dtype

    def read(self, name: str, dim: int = 0, start: int = 0, stop: int | None = None) -> Tensor:
        w = self.tensors[name]
        return w.narrow(dim, start, (w.shape[dim] if stop is None else stop) - start)

    def read_slice(self, name: str, dim: int, start: int, stop: int) -> Tensor:
        w, kind = self.tensors[name], name.rpartition(".")[2]
        if kind == "weight":
            return w.narrow(dim, start, stop - start)
        if dim == 0:
            if kind == "blocks":
                return row_blocks(w, start, stop)
            return rows_int4(w, start, stop) if w.dim() == 3 else w[start:stop]
        if w.dim() == 1:  # scales of whole rows
            return w
        assert self.quantization is not None
        columns = {"q": 1, "packed": 8}.get(kind, self.quantization.layers.group)
        if kind == "blocks":
            columns = block_layout(w.shape[2])[1]
        return w[:, start // columns : stop // columns]  # numbers that stand for `columns` each

    def _check_counts(self, args: ModelArgs) -> None:
        """Check that no weight is far larger than what is stored: `stored_tensors` allocates rows.

        Raises:
            ValueError: one is.
        """
        stored: Counter[str] = Counter()
        for name, w in self.tensors.items():
            stored[name.rpartition(".")[0]] += w.numel()
        for name, shape in weight_shapes(args).items():
            n = stored[name.removesuffix(".weight")]
            if n and prod(shape) > MAX_CODES * n:
                raise ValueError(
                    f"the weights of {self.path} do not fit its sizes; wrong shape: {name} has "
                    f"{n:,} numbers, too few for {shape}; correct params.json, or quantize it again"
                )

    def args(self, **build: int) -> ModelArgs:
        """See `Source.args`."""
        assert self.quantization is not None
        args = ModelArgs(**(self.params | build))
        check_layers(self.tensors, args, self.path)
        self._check_counts(args)
        try:
            expected = stored_tensors(args, self.quantization)
        except ValueError as e:
            raise ValueError(f"{self.path}: {e}; quantize it again") from None
        shapes = {name: tuple(w.shape) for name, w in expected.items()}
        try:
            check_shapes(self.shapes(), shapes, self.path)
        except ValueError as e:
            stated = self.quantization.words()
            raise ValueError(
                f'{e}; "{QUANTIZATION}" in params.json says {stated}: correct it, or quantize again'
            ) from None
        for name, w in expected.items():
            plain, found = name.endswith(".weight"), self.dtype(name)
            if found not in PLAIN_DTYPES if plain else found != w.dtype:
                wanted = "plain" if plain else w.dtype
                raise ValueError(f"{self.path}: {name} is {found}, not {wanted}; quantize it again")
        return args


def _parse_quantization(value: object, folder: Path) -> tuple[Scheme, bool]:
    """(scheme, tied) from the QUANTIZATION entry of params.json."""
    try:
        if not isinstance(value, dict) or not {"scheme"} <= set(value) <= KEYS:
            raise ValueError(f"{value!r} is not what `llama3 quantize` writes")
        scheme, tied = find_scheme(value["scheme"]), value.get("tied", False)
        if "form" in value:
            scheme = _blocks(value, scheme)
        elif "output_bits" in value:
            raise ValueError(f"{value!r} is not what `llama3 quantize` writes")
        elif scheme.name == "int4":
            scheme = old_int4(value.get("group", 32))
        if type(tied) is not bool:
            raise ValueError(f"tied must be a boolean, not {tied!r}")
    except ValueError as e:
        raise ValueError(
            f"{folder / 'params.json'}: {QUANTIZATION}: {e}; only quantized checkpoints of this "
            "library can be read: quantize the original"
        ) from None
    return scheme, tied


def _blocks(value: dict[str, Any], scheme: Scheme) -> Scheme:
    """The scheme of an entry that says `"form": "blocks"`."""
    outputs = {6: Form("blocks", 6), 8: INT8}
    bits = value.get("output_bits")
    if value["form"] != scheme.layers.kind or "group" in value or type(bits) is not int:
        raise ValueError(f"{value!r} is not what `llama3 quantize` writes")
    if bits not in outputs:
        raise ValueError(f"an output layer in {bits} bits is not possible; {sorted(outputs)} are")
    return replace(scheme, output=outputs[bits])
