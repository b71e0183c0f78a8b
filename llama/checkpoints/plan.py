"""Plans a deployment: memory of each rank, what fits a device, upper bounds of the speed.

Calculates from a model's sizes. Loads no weights, and imports torch only to open a checkpoint.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from llama.checkpoints.footprint import PREFILL_CHUNK, Footprint
from llama.checkpoints.hardware import (
    Hardware,
    collective_latency,
    gpu,
    parse_compute,
    parse_latency,
    parse_size,
)
from llama.checkpoints.serving import as_lines, collective_time, largest, serving
from llama.common.options import option
from llama.distributed.sharding import Sizes
from llama.layers.schemes import find_scheme


@dataclass
class Release:
    """The published sizes of a model, as `llama.model.ModelArgs` calculates them."""

    dim: int
    n_layers: int
    n_heads: int
    hidden_dim: int
    kv_heads: int = 8
    vocab_size: int = 128256
    max_seq_len: int = 131072

    @property
    def head_dim(self) -> int:
        return self.dim // self.n_heads


SHAPES = {
    "1b": Release(2048, 16, 32, 8192),
    "3b": Release(3072, 28, 24, 8192),
    "8b": Release(4096, 32, 32, 14336),
    "70b": Release(8192, 80, 64, 28672),
    "405b": Release(16384, 126, 128, 53248),
}
FIRST_CONTEXT = 8192  # of Llama 3, before 3.1
TIED = ("1b", "3b")
RELEASES = {
    "3-8b": "8b", "3.1-8b": "8b", "3-70b": "70b", "3.1-70b": "70b", "3.3-70b": "70b",
    "3.1-405b": "405b", "3.2-1b": "1b", "3.2-3b": "3b",
}  # fmt: skip


@dataclass(frozen=True)
class PlanOptions:
    """A model, how it is run, and the device: the flags of `llama3 plan`."""

    shape: str | None = option(
        None, "an official model, such as 8b, 70b, 405b or 3.1-8b; or else give ckpt_dir"
    )
    ckpt_dir: str | None = option(None, "a checkpoint of any layout")
    ranks: int = option(1, "processes that share the model, each with a device of its own")
    max_batch_size: int = option(1, "rows of the KV cache")
    max_seq_len: int = option(8192, "tokens of each row of the KV cache")
    dtype: str | None = option(
        None, "bf16, fp16 or fp32, of weights and cache; by default (auto) bf16"
    )
    quantize: str | None = option(None, "int8 or int4, of the layers' weights")
    device_memory: str | None = option(None, "memory of each device, such as 80GB")
    memory_bandwidth: str | None = option(None, "of each device, such as 3.35TB/s")
    interconnect: str | None = option(None, "bandwidth from each rank to others, such as 450GB/s")
    compute: str | None = option(None, "bf16 operations a second of a device, such as 989TFLOPS")
    latency: str | None = option(
        None, "of a collective, such as 15us; by default nccl's estimate for NVLink and 8-GPU nodes"
    )
    gpu: str | None = option(None, "a100, h100, h200 or l40s: the figures above that you leave out")
    prompt_tokens: int | None = option(None, "tokens of a request, to estimate requests a second")
    answer_tokens: int | None = option(None, "tokens of its answer")


def make_plan(options: PlanOptions) -> dict[str, Any]:
    """The figures of `report` for these options.

    Raises:
        ValueError, FileNotFoundError: an option is wrong; the message says how to correct it.
    """
    if (options.shape is None) == (options.ckpt_dir is None):
        raise ValueError("give either --shape or --ckpt_dir")
    scheme = None if options.quantize is None else find_scheme(options.quantize)
    args: Sizes
    if options.shape is not None:
        args, tied = release(options.shape)
    else:
        from llama.checkpoints.load import check_quantize
        from llama.checkpoints.open import open_checkpoint

        assert options.ckpt_dir is not None
        source = open_checkpoint(options.ckpt_dir)
        args, tied = source.args(max_seq_len=source.context), source.tied
        check_quantize(source, args, options.quantize)
        scheme = source.quantization or scheme
    dtype = "bf16" if options.dtype in (None, "auto") else str(options.dtype)
    footprint = Footprint(args, tied, options.ranks, dtype, scheme)
    hardware, context = hardware_of(options), options.max_seq_len
    figures = report(footprint, options.max_batch_size, context, hardware)
    prompt, answer = options.prompt_tokens, options.answer_tokens
    if prompt is not None and answer is not None:
        figures["serving"] = serving(footprint, hardware, prompt, answer, context)
    elif prompt is not None or answer is not None:
        raise ValueError("give both --prompt_tokens and --answer_tokens")
    return figures


def hardware_of(options: PlanOptions) -> Hardware:
    """The hardware that the options describe; what they leave out is that of `gpu`.

    Raises:
        ValueError: an option is wrong.
    """
    known = gpu(options.gpu) if options.gpu is not None else Hardware()
    if options.gpu is not None and options.dtype in ("fp32", "float32"):
        known = replace(known, compute=None)  # the table has bfloat16's
    changes: dict[str, Any] = {"latency": collective_latency(options.ranks)}
    if options.device_memory is not None:
        changes["memory"] = parse_size(options.device_memory, "device_memory")
    for name in ("memory_bandwidth", "interconnect"):
        if (text := getattr(options, name)) is not None:
            changes[name] = parse_size(text, name, rate=True)
    if options.compute is not None:
        changes["compute"] = parse_compute(options.compute)
    if options.latency is not None:
        changes["latency"] = parse_latency(options.latency)
    return replace(known, **changes)


def release(name: str) -> tuple[Release, bool]:
    """(sizes, whether the output is tied) of an official model, such as "8b" or "3.1-8b".

    Raises:
        ValueError: there is no such model.
    """
    shape = RELEASES.get(name.lower(), name.lower())
    if shape not in SHAPES:
        raise ValueError(f"unknown shape {name!r}; use one of {[*SHAPES, *RELEASES]}")
    sizes = SHAPES[shape]
    if name.startswith("3-"):
        sizes = replace(sizes, max_seq_len=FIRST_CONTEXT)
    return sizes, shape in TIED


def report(
    footprint: Footprint,
    batch: int,
    context: int,
    hardware: Hardware | None = None,
) -> dict[str, Any]:
    """All figures by name: bytes, tokens a second, counts.

    Args:
        batch, context: rows of the cache, and positions of each.
        hardware: without a figure of it, what fits or the speed that it limits is left out.

    Raises:
        ValueError: a number is not positive.
    """
    for name, value in (("max_batch_size", batch), ("max_seq_len", context)):
        if type(value) is not int or value < 1:
            raise ValueError(f"{name} must be a positive integer, not {value!r}")
    args, hardware, scheme = footprint.args, hardware or Hardware(), footprint.scheme
    out: dict[str, Any] = {
        "dim": args.dim, "n_layers": args.n_layers, "n_heads": args.n_heads,
        "n_kv_heads": args.kv_heads, "hidden_dim": args.hidden_dim, "vocab_size": args.vocab_size,
        "tied": footprint.tied, "dtype": footprint.dtype,
        "quantize": scheme.name if scheme else None,
        "linears": scheme.words() if scheme else None,
        "ranks": footprint.ranks, "batch": batch, "context": context,
        "trained_context": args.max_seq_len,
        "ranks_a_kv_head": max(footprint.ranks // args.kv_heads, 1),
        "weights_by_kind": footprint.weights(), **footprint.memory(batch, context),
        "needed": footprint.needed(batch, context),
        "possible_ranks": footprint.possible_ranks(),
        "sent_a_token": footprint.sent(), "collectives_a_step": footprint.collectives(),
        "latency": hardware.latency,
        "read_a_step": footprint.read(batch, context),
    }  # fmt: skip
    if (memory := hardware.memory) is not None:
        others = [replace(footprint, ranks=n) for n in out["possible_ranks"]]
        out |= {
            "device_memory": memory,
            "fits": out["needed"] <= memory,
            "left": memory - out["needed"],
            "largest_context": largest(lambda n: footprint.needed(batch, n) <= memory),
            "largest_batch": largest(lambda n: footprint.needed(n, context) <= memory),
            "fitting_ranks": [p.ranks for p in others if p.needed(batch, context) <= memory],
        }
    return out | {"tokens_a_second": _rates(footprint, hardware, batch, out["read_a_step"])}


def _rates(footprint: Footprint, hardware: Hardware, batch: int, read: int) -> dict[str, float]:
    """Tokens a second of all rows, by what limits them: one of the two, or both in turn."""
    seconds = {}
    if hardware.memory_bandwidth is not None:
        seconds["memory"] = read / hardware.memory_bandwidth
    collectives = collective_time(footprint, hardware, batch * footprint.sent(), 1)
    if collectives and (seconds or hardware.interconnect is not None):
        seconds["interconnect"] = collectives
    if len(seconds) == 2:
        seconds["both"] = sum(seconds.values())
    return {name: batch / t for name, t in seconds.items()}


def as_text(figures: dict[str, Any]) -> str:
    """A `report` as aligned lines, one for each figure."""
    f = figures
    copies = f["ranks_a_kv_head"]
    shape = f"dim {f['dim']}, {f['n_layers']} layers, feed-forward {f['hidden_dim']}"
    heads = f"{f['n_heads']} heads, {f['n_kv_heads']} KV heads"
    tied = ", output tied to the embedding" if f["tied"] else ""
    lines = [
        ("model", f"{shape}, {heads}, {f['vocab_size']} tokens"),
        ("held as", f["dtype"] + (f", linears in {f['linears']}" if f["linears"] else "") + tied),
        ("ranks", f"{f['ranks']}" + (f", each KV head on {copies} of them" if copies > 1 else "")),
        ("on each rank", ""),
    ]
    lines += [(f"  {label}", f"{_gb(b)} {b:>18,}  {what}") for label, b, what in _amounts(f)]
    lines.append(("possible ranks", ", ".join(map(str, f["possible_ranks"]))))
    if "device_memory" in f:
        lines += _memory_lines(f)
    if f["ranks"] > 1:
        each = f"{f['latency'] * 1e6:.1f} us each and the transfer"
        collectives = f"{f['collectives_a_step']} collectives a step, {each}"
        lines.append(("a token sends", f"{f['sent_a_token'] / 1e6:.2f} MB a rank; {collectives}"))
    lines.append(("a step reads", f"{_gb(f['read_a_step']).strip()} a rank, its rows full"))
    limits = {"interconnect": "collectives", "both": "both in turn"}
    for name, rate in f["tokens_a_second"].items():
        by = limits.get(name, name)
        lines.append(("at most", f"{rate:.1f} tok/s, {rate / f['batch']:.1f} a row, by {by}"))
    if "serving" in f:
        lines += as_lines(f["serving"], f["context"])
    return "\n".join(f"{label:<17}{text}".rstrip() for label, text in lines)


def _amounts(f: dict[str, Any]) -> list[tuple[str, int, str]]:
    """(label, bytes, explanation) of everything in a rank's memory."""
    batch, context = f["batch"], f["context"]
    chunk = f"activations of a {PREFILL_CHUNK}-token chunk, est."
    return [
        *((kind.replace("_", "-"), b, "") for kind, b in f["weights_by_kind"].items()),
        ("weights", f["weights"], "all of the above"),
        ("KV cache", f["kv_cache"], f"{batch} x {context} tokens"),
        ("rotary table", f["rotary_table"], f"{context} positions"),
        ("prefill", f["prefill_activations"], chunk),
        ("decode", f["decode_activations"], f"activations of a step of {batch}, est."),
        ("needed", f["needed"], "weights, cache, table, the larger activations"),
    ]


def _memory_lines(f: dict[str, Any]) -> list[tuple[str, str]]:
    """The lines about a device's memory."""
    memory, left = _gb(f["device_memory"]).strip(), _gb(abs(f["left"])).strip()
    verdict = f"fits, {left} left" if f["fits"] else f"does not fit, {left} too little"
    rows = f"{f['batch']} row" + "s" * (f["batch"] > 1)
    trained = f"trained for {f['trained_context']}"
    return [
        ("ranks that fit", ", ".join(map(str, f["fitting_ranks"])) or "none"),
        ("device memory", f"{memory}: {verdict}"),
        ("largest context", f"{f['largest_context']} tokens in {rows} ({trained})"),
        ("largest batch", f"{f['largest_batch']} rows of {f['context']} tokens"),
    ]


def _gb(size: int) -> str:
    return f"{size / 1e9:>9.2f} GB"
