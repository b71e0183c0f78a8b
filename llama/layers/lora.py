"""Low-rank adapters (LoRA, arXiv:2106.09685) around the linears of a model. Imports no model.

Shapes: N outputs and K inputs of a linear, r rank.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain

import torch
from torch import Tensor, nn

from llama.distributed.sharding import Sizes, rank_part, shard_dim
from llama.distributed.tensor_parallel import reduce_from_ranks
from llama.layers.lora_config import TARGETS as TARGETS
from llama.layers.lora_config import LoRAConfig as LoRAConfig
from llama.layers.low_rank import adapted_linear, has_fused_gradient
from llama.layers.low_rank import add_low_rank as add_low_rank
from llama.layers.quantized_linear import row_squares
from llama.layers.replace import replace_modules

TINY = torch.finfo(torch.float32).tiny  # the least norm of a row: none is divided by 0
PARTS = ("lora_a", "lora_b", "lora_magnitude")  # parameters of a `LoRALinear`


class LoRALinear(nn.Module):
    """A linear of any kind with a low-rank update of its weight.

    In training mode the inputs of A are dropped by a mask that follows from the key alone, so a
    forward pass that is repeated (recomputation, a resumed run) repeats it; see `set_dropout_key`.

    Attributes:
        base: the linear; it may be replaced by a faster one.
        lora_a, lora_b, lora_magnitude: (r, K), (N, r), and with DoRA (N,).
        enabled: if False, the module computes what `base` computes.

    Args:
        base: plain or quantized. A and B are 0 and on its device.
        name: as in the state dict. It says how several ranks split the weight, and which masks
            dropout draws.
        dtype: of A and B: fp32 for training. Matmuls are in the dtype of the base's outputs.
    """

    lora_magnitude: nn.Parameter | None

    def __init__(
        self,
        base: nn.Module,
        config: LoRAConfig,
        name: str = "",
        dtype: torch.dtype = torch.float32,
    ):
        super().__init__()
        self.base, self.config, self.name, self.enabled = base, config, name, True
        N, K = int(base.out_features), int(base.in_features)  # type: ignore[arg-type]
        device = next(chain(base.parameters(), base.buffers())).device
        self.lora_a = nn.Parameter(torch.zeros(config.rank, K, dtype=dtype, device=device))
        self.lora_b = nn.Parameter(torch.zeros(N, config.rank, dtype=dtype, device=device))
        self.register_parameter("lora_magnitude", None)
        if config.dora:
            self.lora_magnitude = nn.Parameter(torch.ones(N, dtype=dtype, device=device))
        self._dropout_seed: int | None = None
        self._base_squares: Tensor | None = None  # |W|^2 of each row
        self._ratio: Tensor | None = None  # of evaluation mode

    def forward(self, x: Tensor) -> Tensor:
        if not self.enabled or not has_fused_gradient(x, self.base):
            return self.adapt(self.base(x), x)
        dropped, scale = self._dropped(x)
        y = adapted_linear(x, dropped, self.lora_a, self.lora_b, scale, self.base)
        return self._rescaled(y, x.dtype)

    def adapt(self, y: Tensor, x: Tensor) -> Tensor:
        """The outputs (..., N) for inputs x (..., K), given the base's outputs y."""
        if not self.enabled:
            return y
        dropped, scale = self._dropped(x)
        inputs = x if dropped is None else dropped
        return self._rescaled(add_low_rank(y, inputs, self.lora_a, self.lora_b, scale), x.dtype)

    def _dropped(self, x: Tensor) -> tuple[Tensor | None, float]:
        """x with dropout, None where there is none; and the scale that belongs to it."""
        if not self.training or not self.config.dropout:
            return None, self.config.scale
        return x * self._kept(x), self.config.scale / (1 - self.config.dropout)

    def _kept(self, x: Tensor) -> Tensor:
        """Booleans like x: the inputs that dropout keeps."""
        if self._dropout_seed is None:
            raise ValueError("dropout needs a key; call set_dropout_key before each batch")
        generator = torch.Generator(x.device).manual_seed(self._dropout_seed)
        kept = torch.empty(x.shape, dtype=torch.bool, device=x.device)
        return kept.bernoulli_(1 - self.config.dropout, generator=generator)

    def _rescaled(self, y: Tensor, dtype: torch.dtype) -> Tensor:
        """With DoRA, y times m / |V| of each row."""
        if self.lora_magnitude is None:
            return y
        return (y * self.magnitude_ratio(dtype)).to(y.dtype)

    def magnitude_ratio(self, dtype: torch.dtype) -> Tensor:
        """DoRA's m / |V| of each row, (N,); in evaluation mode computed once.

        On several ranks, all must call this at the same time.
        """
        assert self.lora_magnitude is not None
        if self._ratio is not None and not torch.is_grad_enabled():
            return self._ratio
        ratio = self.lora_magnitude / self.row_norms(dtype)
        if not (self.training or torch.is_grad_enabled() or torch.compiler.is_compiling()):
            self._ratio = ratio
        return ratio

    @torch.no_grad()
    def row_norms(self, dtype: torch.dtype) -> Tensor:
        """|V| of each row of V = W + scale * B A, (N,) fp32, without computing V.

        |V|^2 = |W|^2 + sum of (2 scale W A^T + scale^2 B A A^T) * B over the columns. On several
        ranks that split the columns, all must call this at the same time.

        Args:
            dtype: of the inputs that the base takes.
        """
        a, b, scale = self.lora_a.float(), self.lora_b.float(), self.config.scale
        products = self.base(a.to(dtype)).float().t()  # W A^T, (N, r)
        change = ((2 * products + scale * (b @ (a @ a.t()))) * b).sum(dim=1)
        return self._norms(scale * change)

    def _norms(self, change: Tensor | float = 0.0) -> Tensor:
        """Norms of the weight's rows whose squares are those of the base plus `change`."""
        if self._base_squares is None:
            self._base_squares = row_squares(self.base)
        squares = self._base_squares + change
        if shard_dim(f"{self.name}.weight") == 1:
            squares = reduce_from_ranks(squares)
        return squares.clamp(min=TINY).sqrt()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LoRALinear:
        self._base_squares = self._ratio = None  # of another device or dtype
        nn.Module._apply(self, fn, recurse)
        return self

    def train(self, mode: bool = True) -> LoRALinear:
        if mode or self.training:
            self._ratio = None
        return super().train(mode)

    def extra_repr(self) -> str:
        return f"rank={self.config.rank}, scale={self.config.scale:g}"


def lora_modules(model: nn.Module) -> Iterator[LoRALinear]:
    """The adapted linears of a model."""
    return (module for module in model.modules() if isinstance(module, LoRALinear))


def add_lora(model: nn.Module, config: LoRAConfig, dtype: torch.dtype = torch.float32) -> None:
    """Replace the targets of every layer by `LoRALinear`, after quantizing, before `optimize`.

    Weights get other names: layers.0.attention.wq.weight becomes layers.0.attention.wq.base.weight.
    A, B and magnitudes are parameters beside it; see `initialize_lora`.

    Args:
        dtype: of A and B.

    Raises:
        ValueError: the model has adapters, or no such linears any more.
    """
    if next(lora_modules(model), None) is not None:
        raise ValueError("this model has an adapter already; build it anew from its checkpoint")
    modules = {name: m for name, m in model.named_modules() if leaf(name) in config.targets}
    missing = set(config.targets) - {leaf(name) for name in modules}
    if missing:
        raise ValueError(f"the model has no linears {sorted(missing)}; add adapters to it first")

    def wrapped(name: str, module: nn.Module) -> nn.Module:
        if leaf(name) not in config.targets:
            return module
        return LoRALinear(module, config, name, dtype)

    replace_modules(model, {type(module): wrapped for module in modules.values()})


def leaf(name: str) -> str:
    """The last part of a module's name: "wq" of "layers.0.attention.wq"."""
    return name.rpartition(".")[2]


@torch.no_grad()
def initialize_lora(model: nn.Module, seed: int) -> None:
    """Draw A; set B to 0, and DoRA's magnitudes to the norms of the base's rows.

    A is uniform in +-1 / sqrt(K), as peft's, and follows from the seed and the module's name alone.
    With FSDP, all ranks must call this.
    """
    for module in lora_modules(model):
        a = torch.empty(module.lora_a.shape, dtype=torch.float32, device="cpu")
        generator = torch.Generator().manual_seed(seed_of(seed, module.name))
        bound = 1 / math.sqrt(a.shape[1])
        fill(module.lora_a, a.uniform_(-bound, bound, generator=generator))
        module.lora_b.zero_()
        if module.lora_magnitude is not None:
            module._base_squares = None
            fill(module.lora_magnitude, module._norms())


def fill(parameter: nn.Parameter, values: Tensor) -> None:
    """Copy the values of a whole tensor into a parameter, of which FSDP may keep a shard."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    values = values.to(parameter.device)
    if isinstance(parameter, DTensor):
        values = distribute_tensor(values, parameter.device_mesh, parameter.placements)
    parameter.copy_(values)


def lora_state(model: nn.Module) -> dict[str, Tensor]:
    """{"layers.0.attention.wq.lora_a": ...}: the parameters of a model's adapter, not copied."""
    weights = model.named_parameters()
    return {name: weight.detach() for name, weight in weights if leaf(name) in PARTS}


def lora_part(name: str, whole: Tensor, args: Sizes, rank: int, size: int) -> Tensor:
    """The part of a parameter of an adapter for rank `rank` of `size`; a view.

    B and magnitudes are split as the rows of the weight, A as its columns.
    """
    module, _, kind = name.rpartition(".")
    part = rank_part(f"{module}.weight", args, rank, size) if size > 1 else None
    if part is None or (part[0] == 1) != (kind == "lora_a"):
        return whole
    dim, start, stop = part
    return whole.narrow(dim, start, stop - start)


def set_dropout_key(model: nn.Module, seed: int, step: int, part: int) -> None:
    """Choose the masks of dropout until the next call.

    Args:
        step: the update.
        part: the micro-batch, counted over the accumulation and the ranks of an update.
    """
    for module in lora_modules(model):
        module._dropout_seed = seed_of(seed, step, part, module.name)


def seed_of(*parts: int | str) -> int:
    """A seed of a generator that follows from numbers and names."""
    digest = hashlib.sha256(repr(parts).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


@contextmanager
def without_adapter(model: nn.Module) -> Iterator[None]:
    """A block in which the model computes what it would without its adapter."""
    modules = list(lora_modules(model))
    for module in modules:
        module.enabled = False
    try:
        yield
    finally:
        for module in modules:
            module.enabled = True


def merged(
    weight: Tensor, a: Tensor, b: Tensor, config: LoRAConfig, magnitude: Tensor | None = None
) -> Tensor:
    """The weight (N, K) with its update, fp32: W + scale * B A; with DoRA m V / |V|."""
    whole = weight.float() + config.scale * (b.float() @ a.float())
    if magnitude is None:
        return whole
    norms: Tensor = torch.linalg.vector_norm(whole, dim=1).clamp(min=TINY)
    return whole * (magnitude.float() / norms).unsqueeze(1)
