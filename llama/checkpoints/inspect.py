"""A description of a checkpoint: sizes, memory, rank counts. Reads the tokenizer, no weights."""

from __future__ import annotations

from collections import Counter
from math import prod

from llama.checkpoints.open import find_vocabulary, tokenizer_of
from llama.checkpoints.source import CONTEXT, Source
from llama.common.dtypes import dtype_name
from llama.distributed.sharding import rank_part, weight_shapes
from llama.layers.schemes import TILE, possible_ranks
from llama.model import ModelArgs

LAYOUTS = {"meta": "Meta", "hf": "Hugging Face", "gguf": "GGUF"}


def parameter_count(args: ModelArgs, tied: bool) -> int:
    """Number of parameters; an output tied to the embedding is not counted."""
    shapes = weight_shapes(args)
    return sum(prod(shapes[name]) for name in _own_weights(shapes, tied))


def cache_bytes(args: ModelArgs, batch: int, seq: int, dtype_bytes: int = 2) -> int:
    """Bytes of the KV cache for `batch` rows of `seq` tokens, summed over all ranks.

    With more ranks than KV heads several ranks cache the same head; it is counted once.
    """
    return batch * seq * 2 * args.n_layers * args.kv_heads * args.head_dim * dtype_bytes


def describe(source: Source, max_batch_size: int = 1, max_seq_len: int | None = None) -> str:
    """A text of aligned lines: sizes, memory and rank counts of an open checkpoint.

    Args:
        max_batch_size: rows of the KV cache.
        max_seq_len: tokens in each row; None: what the model was trained for, at most 8192.

    Raises:
        ValueError: impossible sizes, weights of other sizes, see `Source.args`, or the vocabulary
            of another model, see `open_tokenizer`.
    """
    if max_seq_len is None:
        max_seq_len = min(CONTEXT, source.context)
    args = source.args(max_batch_size=max_batch_size, max_seq_len=max_seq_len)
    weights = sum(_stored_bytes(source).values())
    cache = cache_bytes(args, max_batch_size, max_seq_len)
    scaled = f"scaled by {args.scale_factor:g}" if args.use_scaled_rope else "not scaled"
    tied = "quantized from the embedding" if source.quantization else "tied to the embedding"
    plain = [("", f"embedding and norms in {_plain_dtypes(source)}")] if source.quantization else []
    is_gguf = source.layout == "gguf"
    shards = f"{source.n_shards} shard" + "s" * (source.n_shards > 1)
    rows = [
        ("layout", f"{LAYOUTS.get(source.layout, source.layout)}, {shards}"),
        ("shape", f"dim {args.dim}, {args.n_layers} layers, feed-forward {args.hidden_dim}"),
        ("heads", f"{args.n_heads}, with {args.kv_heads} KV heads, of {args.head_dim}"),
        ("vocabulary", _vocabulary(source)),
        ("parameters", f"{parameter_count(args, source.tied):,}"),
        ("output", tied if source.tied else "weights of its own"),
        ("read as" if is_gguf else "stored as", _stored_format(source, args)),
        *plain,
        *[("", "building makes bf16 of it by default: half of these bytes")] * is_gguf,
        ("weights", f"{_with_unit(weights)} ({weights:,} bytes)"),
        ("context", f"trained for {source.context} tokens"),
        ("RoPE", f"theta {args.rope_theta:g}, {scaled}"),
        ("KV cache", f"{_with_unit(cache)} in bf16 for {max_batch_size} x {max_seq_len} tokens"),
        ("", f"{cache_bytes(args, 1, 1):,} bytes a token"),
    ]
    for i, ranks in enumerate(possible_ranks(args, source.quantization)):
        each = _with_unit(rank_bytes(source, args, ranks))
        rows.append(("" if i else "ranks", f"{ranks:<4} {each:>9} of weights each"))
    return "\n".join(f"{label:<12}{text}" for label, text in rows)


def _vocabulary(source: Source) -> str:
    """The number of tokens, and of rows if it is another one."""
    rows = source.params["vocab_size"]
    try:
        vocabulary = find_vocabulary(source)
    except ValueError as e:
        return f"{rows} rows; its tokenizer cannot be read: {e}"
    if vocabulary is None:
        return f"{rows} tokens"
    tokens = tokenizer_of(source, vocabulary).n_words
    return f"{tokens} tokens" + (f", {rows} rows of embeddings" if rows != tokens else "")


def rank_bytes(source: Source, args: ModelArgs, size: int) -> int:
    """Bytes of the weights of each of `size` ranks, in their stored dtypes."""
    total, parts = 0, {}
    shapes, stored = weight_shapes(args), source.shapes()
    for name, n in _stored_bytes(source).items():
        weight = name.rpartition(".")[0] + ".weight"
        kind = name.split(".")[-2]
        if size > 1 and kind not in parts:  # all layers are split in the same way
            parts[kind] = rank_part(weight, args, 0, size)
        shape, (dim, start, stop) = stored[name], parts.get(kind) or (None, 0, 0)
        if dim == 0:
            tile = TILE if len(shape) == 3 else 1  # rows of an int4 tile
            n = n // shape[0] * -(-(stop - start) // tile)
        elif dim == 1 and len(shape) > 1:  # not scales of whole rows: they are on every rank
            n = n * (stop - start) // shapes[weight][1]
        total += n
    return total


def _own_weights(shapes: dict[str, tuple[int, ...]], tied: bool) -> list[str]:
    """All names but that of an output that is tied to the embedding."""
    return [name for name in shapes if not (tied and name == "output.weight")]


def _stored_bytes(source: Source) -> dict[str, int]:
    """{name: bytes} of the stored tensors, without a tied output."""
    shapes = source.shapes()
    own = _own_weights(shapes, source.tied)
    return {name: prod(shapes[name]) * source.dtype(name).itemsize for name in own}


def _stored_format(source: Source, args: ModelArgs) -> str:
    """The dtypes; for quantized weights the scheme and the bits per weight, scales included."""
    if source.quantization is None:
        return _plain_dtypes(source)
    plain = prod(weight_shapes(args)["tok_embeddings.weight"]) + (2 * args.n_layers + 1) * args.dim
    stored = _stored_bytes(source)
    codes = sum(n for name, n in stored.items() if not name.endswith(".weight"))
    bits = 8 * codes / (parameter_count(args, tied=False) - plain)
    return f"{source.quantization.words()}: {bits:.2f} bits a weight"


def _plain_dtypes(source: Source) -> str:
    """The dtypes of the plain weights; if several, with their shares of the bytes."""
    count: Counter[str] = Counter()
    for name, n in _stored_bytes(source).items():
        if not name.endswith(".weight"):
            continue
        count[dtype_name(source.dtype(name))] += n
    if len(count) == 1:
        return next(iter(count))
    total = sum(count.values())
    return ", ".join(f"{dtype} ({n / total:.1%} of the bytes)" for dtype, n in count.most_common())


def _with_unit(n: int) -> str:
    """`n` bytes in decimal units, such as "1.50 GB"."""
    for unit, bytes_ in (("TB", 10**12), ("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if n >= bytes_:
            return f"{n / bytes_:.2f} {unit}"
    return f"{n} B"
