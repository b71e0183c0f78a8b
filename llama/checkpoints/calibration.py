"""Quantizes a model layer by layer, with the inputs that a text gives its linears.

One layer's weights and the text's hidden states are in memory at a time. Knows no file layout.

Shapes: B windows of T tokens, N outputs and K inputs of a linear.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from llama.checkpoints.source import Source
from llama.common.meta_device import without_memory
from llama.common.progress import progress
from llama.distributed.sharding import weight_shapes
from llama.layers.blocks import dequantize_blocks
from llama.layers.gptq import compensated_blocks, inverse_factor
from llama.layers.schemes import Scheme
from llama.model import ModelArgs, RMSNorm, TransformerBlock, precompute_freqs_cis
from llama.tokenizer import Tokenizer

BATCH = 2048  # tokens computed at once

Function = Callable[[Tensor], Tensor]
# (w (N, K), U of `inverse_factor` (K, K), bits) -> blocks, as `compensated_blocks`
Rounding = Callable[[Tensor, Tensor, int], Tensor]


@dataclass(frozen=True)
class Calibration:
    """The text of a calibration, and how much of it is used.

    Attributes:
        text: of the kind that the model is for; some hundred kilobytes.
        windows: the most windows of it that are used, spread evenly.
        max_seq_len: tokens of a window, at most as many as the model was trained for.
    """

    text: str
    windows: int = 128
    max_seq_len: int = 512

    def __post_init__(self) -> None:
        for name, least in (("windows", 1), ("max_seq_len", 2)):
            value = getattr(self, name)
            if type(value) is not int or value < least:
                raise ValueError(f"{name} must be {least} or more, not {value!r}")


def cut_windows(calibration: Calibration, tokenizer: Tokenizer, context: int) -> Tensor:
    """(B, T) ids; each window starts with the begin token, if there is one.

    Args:
        context: tokens in a row that the model was trained for.

    Raises:
        ValueError: the text has fewer tokens than a window.
    """
    ids = tokenizer.encode(calibration.text, bos=False, eos=False)
    begin = [tokenizer.bos_id] if tokenizer.bos_id >= 0 else []
    length = min(calibration.max_seq_len, context) - len(begin)
    count = min(len(ids) // length, calibration.windows)
    if count < 1:
        raise ValueError(
            f"the calibration text has {len(ids)} tokens, and a window needs {length}; give more "
            "text (some hundred kilobytes), or a smaller max_seq_len"
        )
    last = len(ids) - length
    starts = [last * i // max(count - 1, 1) for i in range(count)]
    rows = [begin + ids[start : start + length] for start in starts]
    return torch.tensor(rows, dtype=torch.int64, device="cpu")


def calibrated_weights(
    source: Source,
    dtype: torch.dtype | None,
    scheme: Scheme,
    ids: Tensor,
    rounding: Rounding = compensated_blocks,
) -> Iterator[tuple[str, Tensor]]:
    """(stored name, tensor) of each weight of a quantized model, in the order of Meta's files.

    Args:
        dtype: to which all weights are rounded first; None: the stored dtypes.
        scheme: one that stores weights in blocks.
        ids: (B, T), of the text.
        rounding: makes the blocks of a linear.

    Raises:
        ValueError: NaN or infinite numbers in a weight, or in what the model computes of the text.
    """
    args = source.args()

    def read(name: str) -> Tensor:
        w = source.read(name)
        if not w.isfinite().all():
            raise ValueError(
                f"{name} of {source.path} has NaN or infinite numbers; run `llama3 verify`"
            )
        return w.to(dtype or w.dtype)

    embedding = read("tok_embeddings.weight")
    yield "tok_embeddings.weight", embedding
    text = Text(embedding, ids, args)
    names = [name for name in weight_shapes(args) if name.startswith("layers.0.")]
    for i in progress(range(args.n_layers), "calibrating", args.n_layers, "layer"):
        weights = {name: read(name) for name in (n.replace("0", str(i), 1) for n in names)}
        blocks = quantize_layer(i, weights, text, bits=scheme.layers.bits, rounding=rounding)
        for name, w in weights.items():
            layer = name.removesuffix(".weight")
            yield (f"{layer}.blocks", blocks[layer]) if layer in blocks else (name, w)
    norm = RMSNorm(args.dim, args.norm_eps)
    norm.weight = nn.Parameter(read("norm.weight"), requires_grad=False)
    yield "norm.weight", norm.weight.data
    output = embedding if source.tied else read("output.weight")
    yield "output.blocks", rounding(output, text.factor("output", norm), scheme.output.bits)


class Text:
    """The hidden states of a text before a layer, in batches (B, T, dim).

    Attributes:
        dtype: of the hidden states and of the weights that compute the next ones.
    """

    def __init__(self, embedding: Tensor, ids: Tensor, args: ModelArgs):
        self.args = args
        self.dtype = torch.bfloat16 if embedding.dtype == torch.bfloat16 else torch.float32
        rows = max(BATCH // ids.shape[1], 1)
        self.batches = [embedding[part].to(self.dtype) for part in ids.split(rows)]
        self.freqs_cis = precompute_freqs_cis(
            args.head_dim,
            ids.shape[1],
            args.rope_theta,
            args.use_scaled_rope,
            args.scale_factor,
        )

    def factor(self, reader: str, inputs: Function) -> Tensor:
        """`inverse_factor` for the linear `reader`, which reads `inputs(hidden states)`.

        Raises:
            ValueError: these are NaN or infinite.
        """
        moments: Tensor | None = None
        for h in self.batches:
            x = inputs(h).flatten(0, 1).float()
            moments = x.T @ x if moments is None else moments.addmm_(x.T, x)
        assert moments is not None
        if not moments.isfinite().all():
            raise ValueError(
                f"{reader}: its inputs are NaN or infinite with the calibration text; check the "
                "model with `llama3 perplexity`"
            )
        return inverse_factor(moments)

    def add(self, outputs: Function) -> None:
        """Add `outputs(hidden states)` to the hidden states."""
        for h in self.batches:
            h += outputs(h)


def make_layer(i: int, weights: dict[str, Tensor], text: Text) -> TransformerBlock:
    """Layer i, which computes in the text's dtype, with these weights under Meta's names."""
    with without_memory():
        layer = TransformerBlock(i, text.args)
    own = {n.removeprefix(f"layers.{i}."): w.to(text.dtype) for n, w in weights.items()}
    layer.load_state_dict(own, assign=True)
    return layer.requires_grad_(False)


def quantize_layer(
    i: int, weights: dict[str, Tensor], text: Text, *, bits: int, rounding: Rounding
) -> dict[str, Tensor]:
    """{linear: blocks} of layer i, such as "layers.0.attention.wq"; `text` passes the layer.

    The linears are quantized in the order of their use: each reads what the quantized ones before
    it have computed.
    """
    prefix, blocks = f"layers.{i}.", dict[str, Tensor]()
    layer = make_layer(i, weights, text)
    attention, ffn = layer.attention, layer.feed_forward

    def attend(h: Tensor) -> Tensor:
        out: Tensor = attention(layer.attention_norm(h), text.freqs_cis)
        return out

    def feed(h: Tensor) -> Tensor:
        out: Tensor = ffn(layer.ffn_norm(h))
        return out

    def quantize(factor: Tensor, *names: str) -> None:
        for name in names:
            w, linear = weights[f"{prefix}{name}.weight"], layer.get_submodule(name)
            blocks[prefix + name] = rounding(w, factor, bits)
            rounded = dequantize_blocks(blocks[prefix + name], len(w))
            linear.weight = nn.Parameter(rounded.to(text.dtype), requires_grad=False)

    factor = text.factor(f"{prefix}attention.wq", layer.attention_norm)
    quantize(factor, "attention.wq", "attention.wk", "attention.wv")
    with without(attention, "wo"):
        factor = text.factor(f"{prefix}attention.wo", attend)
    quantize(factor, "attention.wo")
    text.add(attend)
    factor = text.factor(f"{prefix}feed_forward.w1", layer.ffn_norm)
    quantize(factor, "feed_forward.w1", "feed_forward.w3")
    with without(ffn, "w2"):
        factor = text.factor(f"{prefix}feed_forward.w2", feed)
    quantize(factor, "feed_forward.w2")
    text.add(feed)
    return blocks


@contextmanager
def without(module: nn.Module, last: str) -> Iterator[None]:
    """In this block, `module` returns what its linear `last` reads."""
    linear = module.get_submodule(last)
    setattr(module, last, nn.Identity())
    yield
    setattr(module, last, linear)
