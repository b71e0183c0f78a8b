"""A `Record` as lines for a terminal."""

from __future__ import annotations

import math
from collections.abc import Sequence

from llama.common.dtypes import dtype_name
from llama.common.printable import printable_line
from llama.explain.record import Record

LINES = 40  # tokens that are listed
LAYERS = 8  # layers of the lens that are listed
NEXT = 8  # next tokens that are listed
PROMPT = 200  # characters of the prompt
GROUPS = {  # of stages
    "embedding": ("tok_embeddings",),
    "attention": ("attention_norm", "Attention", "rotary"),
    "feed-forward": ("ffn_norm", "FeedForward"),
    "final norm": ("Transformer.norm",),
    "output": ("Transformer.output",),
}


def terminal_text(record: Record) -> str:
    """The short form of a page."""
    parts = [header, tokens, shapes, sizes, cache, lens, following]
    return "\n\n".join("\n".join(part(record)) for part in parts)


def header(record: Record) -> list[str]:
    args, T = record.args, len(record.ids)
    lines = [f"model: {printable_line(record.name)}"] if record.name else []
    lines += [
        f"prompt: {quoted(record.text, PROMPT)}",
        f"{args.n_layers} layers of width {args.dim}, {args.n_heads} heads on {args.kv_heads} "
        f"KV heads of width {args.head_dim}, feed-forward {args.hidden_dim}, "
        f"vocabulary {args.vocab_size}, {dtype_name(record.dtype)}",
    ]
    if record.total > T:
        lines.append(f"The first {T} of the prompt's {record.total} tokens; {record.limit}.")
    return lines


def tokens(record: Record) -> list[str]:
    """Position, id, log-probability, surprise, bytes and text of each token."""
    rows = [["position", "id", "log p", "bits", "bytes", "text"]]
    scored = zip(record.ids, record.pieces, record.logprobs.tolist(), strict=True)
    for i, (token, piece, logprob) in enumerate(scored):
        known = not math.isnan(logprob)
        bits = f"{-logprob / math.log(2):.2f}" if known else "-"
        some = piece[:12].hex(" ") + " ..." * (len(piece) > 12)
        number = f"{logprob:.3f}" if known else "-"
        rows.append([str(i), str(token), number, bits, some, shown(piece)])
    left = len(rows) - 1 - LINES
    lines = aligned(rows[: LINES + 1], ">>>><<")
    return [*lines, f"... and {left} more"] if left > 0 else lines


def shapes(record: Record) -> list[str]:
    rows = [["shape of the output", "", "in model.py"]]
    for stage in record.stages:
        name = stage.name + f" (x {stage.count})" * (stage.count > 1)
        rows.append([name, " x ".join(map(str, stage.shape)), stage.module])
    return aligned(rows, "<><")


def sizes(record: Record) -> list[str]:
    """Parameters, bytes and operations of the embedding, of all layers, and of the output."""
    rows = [["part", "parameters", "bytes", "operations"]]
    total = [0, 0, 0]
    for name, words in GROUPS.items():
        found = [s for s in record.stages if any(word in s.module for word in words)]
        sums = [
            sum(getattr(s, key) for s in found) for key in ("parameters", "bytes", "operations")
        ]
        if any("embedding" in s.storage for s in found):
            name += f" ({found[0].storage})"
        rows.append([name, f"{sums[0]:,}", f"{short(sums[1])}B", short(sums[2])])
        total = [one + other for one, other in zip(total, sums, strict=True)]
    rows.append(["together", f"{total[0]:,}", f"{short(total[1])}B", short(total[2])])
    return aligned(rows, "<>>>")


def cache(record: Record) -> list[str]:
    here, whole, T = record.cache_bytes, record.ungrouped_cache_bytes, len(record.ids)
    positions = "1 position" if T == 1 else f"{T} positions"
    line = f"KV cache: {short(here)}B a position, {short(here * T)}B for {positions}"
    times = record.args.n_heads // record.args.kv_heads
    return [line + f"; without grouped heads {times} times as much" * (whole > here)]


def lens(record: Record) -> list[str]:
    """What the output would say after the last token if it came after each layer."""
    last = record.args.n_layers
    step = max(1, math.ceil(last / LAYERS))
    rows = [["logit lens", "p", "next"]]
    for layer in sorted({*range(0, last, step), last}):
        token, p = int(record.lens_ids[layer, -1, 0]), float(record.lens_probs[layer, -1, 0])
        name = "after the embedding" if layer == 0 else f"after layer {layer - 1}"
        rows.append([name, percent(p), shown(record.piece(token))])
    return aligned(rows, "<><")


def following(record: Record) -> list[str]:
    """The most probable next tokens: before, after the temperature, and as they are drawn."""
    found = record.next
    how = found.sampling
    rows = [["next token", "p", "tempered", "drawn"]]
    for i in found.raw.topk(min(NEXT, len(found.raw))).indices.tolist():
        steps = [float(probs[i]) for probs in (found.raw, found.tempered, found.final)]
        rows.append([shown(record.piece(i)), *map(percent, steps[:2]), percent(steps[2], "cut")])
    left = int((found.final > 0).sum())
    settings = f"temperature {how.temperature:g}, top_k {how.top_k}, top_p {how.top_p:g}"
    settings += f", min_p {how.min_p:g}" * (how.min_p > 0)
    noun = "token" if left == 1 else "tokens"
    return [*aligned(rows, "<>>>"), f"{settings}: {left} {noun} can be drawn"]


def shown(piece: bytes) -> str:
    """A token as a quoted text, or as bytes if it is a part of a character."""
    try:
        text = piece.decode("utf-8")
    except UnicodeDecodeError:
        return f"bytes {piece[:12].hex(' ')}"
    return quoted(text, 40)


def quoted(text: str, most: int) -> str:
    """A text in one line, at most so many characters of it."""
    line = printable_line(text[: most + 1])
    return f'"{line[:most]}..."' if len(line) > most else f'"{line}"'


def percent(p: float, zero: str = "0 %") -> str:
    if p == 0:
        return zero
    return f"{100 * p:.1f} %" if p >= 0.001 else "< 0.1 %"


def short(number: int) -> str:
    """Three digits and a prefix of a unit: "23 k"."""
    units = ("k", 10**3), ("M", 10**6), ("G", 10**9), ("T", 10**12), ("P", 10**15)
    if number < 1000:
        return f"{number} "
    unit, size = next((u for u in units if number / u[1] < 999.5), units[-1])
    return f"{number / size:.3g} {unit}"


def aligned(rows: Sequence[Sequence[str]], sides: str) -> list[str]:
    """Rows as lines with columns; `sides` has < or > for each."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(sides))]
    lines = []
    for row in rows:
        cells = [f"{c:{s}{w}}" for c, s, w in zip(row, sides, widths, strict=True)]
        lines.append("  ".join(cells).rstrip())
    return lines
