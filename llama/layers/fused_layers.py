"""All blocks of a model through one CPU operator where a step has few rows: a decoding step.

Elsewhere, and where a module is not one that the operator knows, the blocks run one by one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from llama.distributed import tensor_parallel
from llama.layers import kernels
from llama.layers.attention import KernelAttention
from llama.layers.kernel_modules import KernelFeedForward, KernelHeads, KernelLinear, KernelRMSNorm
from llama.layers.quantized_linear import BlockLinear, Int4Linear, Int8Linear
from llama.model import CacheSlice, KVCache, Layers, TransformerBlock

MAX_ROWS = 16  # B x T; as in kernels/layers.cpp
LOOKS = 100  # steps that look for hooks: torch counts a hook before it is in its module's table
# The linears that the operator knows: its name of the kind, and their tensors in its order.
LINEARS: dict[type[nn.Module], tuple[str, tuple[str, ...]]] = {
    KernelLinear: ("plain", ("weight",)),
    Int8Linear: ("int8", ("q", "scale")),
    Int4Linear: ("int4", ("packed", "scale", "zero")),
    BlockLinear: ("blocks", ("blocks",)),
}


class FusedLayers(Layers):
    """The blocks as one operator on their weights, which is made again when any is replaced."""

    _operator: Operator | None = None

    def forward(
        self,
        h: Tensor,
        freqs_cis: Tensor,
        mask: Tensor | None = None,
        cache: Sequence[KVCache] | None = None,
        at: CacheSlice | None = None,
    ) -> Tensor:
        if cache is not None and at is not None and _supports(h, freqs_cis):
            if self._operator is None or not self._operator.is_current():
                self._operator = Operator(self)
            if self._operator.supports(h.dtype, cache):
                return self._operator(h, freqs_cis, cache, at)
        return super().forward(h, freqs_cis, mask, cache, at)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FusedLayers:
        self._operator = None  # so that it does not keep what is moved
        nn.Module._apply(self, fn, recurse)
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_operator": None}  # copies make their own


def _supports(h: Tensor, freqs_cis: Tensor) -> bool:
    """Whether the operator is for these inputs. In fp32, prompts get the reference's attention."""
    B, T, _ = h.shape
    if not 0 < B * T <= MAX_ROWS or (T > 1 and h.dtype == torch.float32):
        return False
    if torch.compiler.is_compiling() or torch.is_grad_enabled() or tensor_parallel.size() > 1:
        return False
    return freqs_cis.is_complex() and kernels.supports(h)


class Operator:
    """The operator on the present weights of some blocks, if it knows all their modules."""

    def __init__(self, layers: Layers):
        self._tables = list(_tables(layers))
        self._values = _values(self._tables)
        self._hooks_made, self._looks = RemovableHandle.next_id, LOOKS
        self._hooks = list(_hooks(layers))
        self._hooked = any(self._hooks)
        self._layers: Any = None
        self._dtype: torch.dtype | None = None
        blocks = [block for block in layers if isinstance(block, TransformerBlock)]
        known = len(blocks) == len(layers) and all(map(_is_known, blocks)) and not self._hooked
        if known and len({_shape(block) for block in blocks}) == 1:
            self._dtype = blocks[0].attention_norm.weight.dtype
            self._layers = _operator_of(blocks)

    def is_current(self) -> bool:
        """Whether the blocks still have the modules, weights and hooks that they had."""
        values = _values(self._tables)
        if len(values) != len(self._values) or not all(map(is_, values, self._values)):
            return False
        if self._hooks_made != RemovableHandle.next_id:  # a module somewhere gets a hook
            self._hooks_made, self._looks = RemovableHandle.next_id, LOOKS
        if not self._hooked and not self._looks:
            return True
        self._looks = max(0, self._looks - 1)
        return self._hooked == any(self._hooks)

    def supports(self, dtype: torch.dtype, cache: Sequence[KVCache]) -> bool:
        return self._layers is not None and dtype == self._dtype == cache[0].k.dtype

    def __call__(
        self, h: Tensor, freqs_cis: Tensor, cache: Sequence[KVCache], at: CacheSlice
    ) -> Tensor:
        keys, values = [layer.k for layer in cache], [layer.v for layer in cache]
        place = {"positions": at.positions, "turns": freqs_cis, "first_row": at.first_row}
        out: Tensor = self._layers.forward(x=h, keys=keys, values=values, **place)
        return out


def _tables(layers: Layers) -> Iterator[dict[str, Any]]:
    """The dictionaries in which a change can replace what the operator reads.

    They are few: each step reads them all, from memory, because the weights have filled the caches.
    """
    yield layers.__dict__["_modules"]
    for block in layers:
        yield block.__dict__["_modules"]
        for part in block.children():
            if any(True for _ in part.children()):
                yield part.__dict__["_modules"]
        for module in block.modules():
            for name in ("_parameters", "_buffers"):
                if module.__dict__[name]:
                    yield module.__dict__[name]


def _values(tables: Iterable[dict[str, Any]]) -> list[Any]:
    return list(chain.from_iterable(map(dict.values, tables)))


def _hooks(layers: Layers) -> Iterator[dict[int, Any]]:
    """The tables of the hooks in blocks."""
    for block in layers:
        for module in block.modules():
            yield module._forward_hooks
            yield module._forward_pre_hooks


def _is_known(block: TransformerBlock) -> bool:
    """Whether the operator computes what this block does."""
    if type(block) is not TransformerBlock:
        return False
    attention, feed_forward = block.attention, block.feed_forward
    if (type(attention), type(feed_forward)) != (KernelHeads, KernelFeedForward):
        return False
    norms = block.attention_norm, block.ffn_norm
    if type(attention.core) is not KernelAttention or {*map(type, norms)} != {KernelRMSNorm}:
        return False
    if any(type(linear) not in LINEARS for linear in _linears(block)):
        return False
    tensors = chain(block.parameters(), block.buffers())
    return (
        all(t.is_cpu and t.is_contiguous() for t in tensors)
        and all(weight.dtype in kernels.KIND for weight in block.parameters())
        and (norms[0].eps, norms[0].weight.dtype) == (norms[1].eps, norms[1].weight.dtype)
    )


def _shape(block: TransformerBlock) -> tuple[Any, ...]:
    """What must be the same in all blocks."""
    attention, norm = block.attention, block.attention_norm
    heads = attention.n_local_heads, attention.n_local_kv_heads, attention.head_dim
    return *heads, block.feed_forward.w1.out_features, norm.eps, norm.weight.dtype


def _linears(block: TransformerBlock) -> list[nn.Module]:
    attention, feed_forward = block.attention, block.feed_forward
    first = [attention.wq, attention.wk, attention.wv, attention.wo]
    return [*first, feed_forward.w1, feed_forward.w2, feed_forward.w3]


def _operator_of(blocks: Sequence[TransformerBlock]) -> Any:
    tensors, kinds, counts, outputs = [], [], [], []
    for block in blocks:
        tensors += [block.attention_norm.weight, block.ffn_norm.weight]
        for linear in _linears(block):
            kind, names = LINEARS[type(linear)]
            tensors += [getattr(linear, name) for name in names]
            kinds.append(kind)
            counts.append(len(names))
            outputs.append(linear.out_features)
    attention = blocks[0].attention
    heads = [attention.n_local_heads, attention.n_local_kv_heads, attention.head_dim]
    shape = {"heads": heads, "eps": blocks[0].attention_norm.eps}
    return torch.classes.llama3.Layers(tensors, kinds, counts, outputs, **shape)
