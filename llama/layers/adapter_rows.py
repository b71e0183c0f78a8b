"""Several low-rank adapters of one model, chosen for each row of a batch.

Shapes: B rows, T positions, N outputs and K inputs of a linear, r rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from llama.distributed import tensor_parallel
from llama.distributed.sharding import rank_part, shard_dim, weight_shapes
from llama.layers.lora import TINY, LoRAConfig, add_low_rank
from llama.layers.quantized_linear import weight_blocks
from llama.layers.replace import replace_modules
from llama.model import ModelArgs, Transformer

Adapters = Mapping[str, tuple[LoRAConfig, Mapping[str, Tensor]]]


class Group(NamedTuple):
    """Rows of a batch that have one adapter.

    Attributes:
        key: of the adapter's parts in every `MultiLoRALinear`.
        rows: (n,) int64; None: all rows.
    """

    key: str
    rows: Tensor | None


class AdapterRows:
    """The adapters of a model, and which of them each row of the next forward has.

    Attributes:
        names: of the adapters.
        groups: of the rows that have an adapter, as `select` made them.
    """

    def __init__(self, names: Sequence[str], model: Transformer):
        self.names = tuple(names)
        self.groups: list[Group] = []
        self._count = 0  # rows that were selected
        self._norm = model.norm  # on the device of the rows

    def select(self, rows: Sequence[str | None]) -> None:
        """The adapter of each row from now on; None is the base. No rows: the base for any batch.

        Raises:
            ValueError: there is no such adapter.
        """
        found: dict[str, list[int]] = {}
        for i, name in enumerate(rows):
            if name is not None and name not in self.names:
                known = ", ".join(self.names)
                raise ValueError(f"there is no adapter {name!r}; use one of {known}, or None")
            if name is not None:
                found.setdefault(name, []).append(i)
        device = self._norm.weight.device
        groups = []
        for name, mine in found.items():
            index = None if len(mine) == len(rows) else torch.tensor(mine, device=device)
            groups.append(Group(str(self.names.index(name)), index))
        self.groups, self._count = groups, len(rows)

    def check_rows(self, count: int) -> None:
        """Raise a ValueError if adapters were selected for another number of rows."""
        if self.groups and count != self._count:
            raise ValueError(
                f"adapters were selected for {self._count} rows, and the batch has {count}"
            )


class LowRank(nn.Module):
    """One adapter of one linear: this rank's part of A (r, K) and B (N, r).

    Args:
        factor: (N,) m / |V| of DoRA, arXiv:2402.09353, in fp32; None without.
    """

    a: Tensor
    b: Tensor
    factor: Tensor | None

    def __init__(self, a: Tensor, b: Tensor, scale: float, factor: Tensor | None):
        super().__init__()
        self.scale = scale
        for name, value in (("a", a), ("b", b), ("factor", factor)):
            self.register_buffer(name, value, persistent=False)

    def adapt(self, y: Tensor, x: Tensor) -> Tensor:
        """The outputs (B, T, N) for inputs x (B, T, K), given the base's outputs y."""
        y = add_low_rank(y, x, self.a, self.b, self.scale)
        return y if self.factor is None else (y * self.factor).to(y.dtype)


class MultiLoRALinear(nn.Module):
    """A linear to whose output each row adds scale * B A x of its own adapter.

    Rows without an adapter are the base's output.

    Args:
        base: any linear.
        parts: {key of a `Group`: its adapter}; not every adapter has one.
    """

    def __init__(self, base: nn.Module, chosen: AdapterRows, parts: dict[str, LowRank]):
        super().__init__()
        self.base, self.chosen = base, chosen
        self.parts = nn.ModuleDict(parts)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base(x)
        self.chosen.check_rows(len(x))
        for key, rows in self.chosen.groups:
            if key not in self.parts:
                continue
            part = self.parts[key]
            assert isinstance(part, LowRank)
            if rows is None:
                return part.adapt(y, x)
            mine = part.adapt(y.index_select(0, rows), x.index_select(0, rows))
            y.index_copy_(0, rows, mine)
        return y


def adapters_of(model: nn.Module) -> AdapterRows | None:
    """What `add_adapters` made of this model; None if it has no adapters."""
    found: AdapterRows | None = getattr(model, "adapters", None)
    return found


def adapter_names(model: nn.Module) -> tuple[str, ...]:
    """The names of a model's adapters."""
    chosen = adapters_of(model)
    return () if chosen is None else chosen.names


@contextmanager
def selected(model: nn.Module, rows: Sequence[str | None]) -> Iterator[None]:
    """A block in which each row of a batch has an adapter of the model, or None."""
    chosen = adapters_of(model)
    if chosen is None:
        yield
        return
    chosen.select(rows)
    try:
        yield
    finally:
        chosen.select(())


@torch.no_grad()
def add_adapters(model: Transformer, adapters: Adapters) -> AdapterRows:
    """Give a loaded model adapters, of which each row of a batch may have one.

    It is called after quantization and before `optimize`. With several ranks all call it at the
    same time, and each keeps its own parts of A and B, in the model's dtype.

    Args:
        adapters: {name: (config, whole tensors)}: "layers.0.attention.wq.lora_a" (r, K),
            ".lora_b" (N, r), and with DoRA ".lora_magnitude" (N,), in Meta's order of rows.

    Returns:
        `model.adapters`, which is also in each linear.

    Raises:
        ValueError: no adapters, or a tensor that does not fit the model.
    """
    if adapters_of(model) is not None:
        raise ValueError("this model has adapters already; build it anew with all of them")
    if not adapters or not all(isinstance(name, str) and name for name in adapters):
        raise ValueError(f"give at least one adapter, each with a name, not {list(adapters)}")
    chosen = AdapterRows(list(adapters), model)
    wanted: dict[str, list[str]] = {}  # {linear: the adapters that it has}
    for name, (config, tensors) in adapters.items():
        for linear in linears_of(tensors):
            check_shapes(name, linear, config, tensors, model.params)
            wanted.setdefault(linear, []).append(name)

    def wrap(name: str, base: nn.Module) -> nn.Module:
        if name not in wanted:
            return base
        parts = {}
        for adapter in wanted[name]:
            config, tensors = adapters[adapter]
            parts[str(chosen.names.index(adapter))] = low_rank(name, base, config, tensors, model)
        return MultiLoRALinear(base, chosen, parts)

    kinds = {type(model.get_submodule(name)) for name in wanted}
    table: dict[type[nn.Module], Callable[[str, nn.Module], nn.Module]] = dict.fromkeys(kinds, wrap)
    replace_modules(model, table)
    model.adapters = chosen  # type: ignore[assignment]
    return chosen


def linears_of(tensors: Mapping[str, Tensor]) -> list[str]:
    """The linears that an adapter changes: "layers.0.attention.wq", ..."""
    return sorted({name.rpartition(".")[0] for name in tensors})


def check_shapes(
    adapter: str,
    linear: str,
    config: LoRAConfig,
    tensors: Mapping[str, Tensor],
    args: ModelArgs,
) -> None:
    """Raise a ValueError unless the whole tensors of a linear are there and fit the model."""
    shape = weight_shapes(args).get(f"{linear}.weight", ())
    if len(shape) != 2 or shard_dim(f"{linear}.weight") is None or "layers" not in linear:
        raise ValueError(f"adapter {adapter}: the model has no linear {linear} to adapt")
    N, K = shape
    wanted: dict[str, tuple[int, ...]] = {
        "lora_a": (config.rank, K),
        "lora_b": (N, config.rank),
    }
    if config.dora:
        wanted["lora_magnitude"] = (N,)
    for end, size in wanted.items():
        tensor = tensors.get(f"{linear}.{end}")
        if tensor is None:
            raise ValueError(f"adapter {adapter}: {linear}.{end} is missing")
        if tuple(tensor.shape) != size:
            raise ValueError(
                f"adapter {adapter}: {linear}.{end} is {tuple(tensor.shape)}, and this model "
                f"needs {size}; is it an adapter of another base?"
            )


def low_rank(
    linear: str,
    base: nn.Module,
    config: LoRAConfig,
    tensors: Mapping[str, Tensor],
    model: Transformer,
) -> LowRank:
    """This rank's part of an adapter of one linear."""
    weight = model.norm.weight
    a, b = tensors[f"{linear}.lora_a"], tensors[f"{linear}.lora_b"]
    m = tensors[f"{linear}.lora_magnitude"] if config.dora else None
    part = rank_part(
        f"{linear}.weight", model.params, tensor_parallel.rank(), tensor_parallel.size()
    )
    assert part is not None
    dim, start, stop = part
    if dim == 1:
        a = a[:, start:stop]
    else:
        b, m = b[start:stop], None if m is None else m[start:stop]
    a, b = (t.to(weight.device, torch.float32) for t in (a, b))
    factor = None
    if m is not None:
        squares = adapted_squares(base, config.scale, a, b)
        if dim == 1:  # each rank has some columns of every row
            squares = tensor_parallel.reduce_from_ranks(squares)
        factor = m.to(weight.device, torch.float32) / squares.clamp(min=TINY).sqrt()
    # Clones: a view would keep the whole tensors.
    a, b = (x.to(weight.dtype).clone(memory_format=torch.contiguous_format) for x in (a, b))
    return LowRank(a, b, config.scale, factor)


def adapted_squares(base: nn.Module, scale: float, a: Tensor, b: Tensor) -> Tensor:
    """|V|^2 of each row of V = W + scale * B A: (N,) fp32."""
    found, start = [], 0
    for rows in weight_blocks(base):
        part = b[start : start + len(rows)]
        found.append((rows + scale * (part @ a)).square().sum(1))
        start += len(rows)
    return torch.cat(found)
