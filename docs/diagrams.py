"""Boxes, arrows and tables of the tour's pictures. Computes no part of the model.

`axes` and `figure` are matplotlib's.
"""

from __future__ import annotations

import io
import math
from base64 import b64encode
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from llama import Tokenizer
from llama.model import repeat_kv

BLUE, RED, GREY, LIGHT = "#4c78a8", "#d1605e", "#8a8a8a", "#d9d9d9"
COLORS = ("#7aa6d6", "#f2b56b", "#8fc48a", "#e08a88", "#b5a1d0", "#c9a58b", "#f0a3c4", "#a9a9a9")


STYLE = {
    "svg.hashsalt": "llama3",
    "svg.fonttype": "none",
    "font.sans-serif": ["DejaVu Sans", "Verdana", "Arial"],
    "font.monospace": ["DejaVu Sans Mono", "Courier New"],
    "font.size": 8.5,
    "axes.titlesize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "figure.constrained_layout.h_pad": 0.08,
    "figure.constrained_layout.w_pad": 0.08,
}


def svg(draw: Callable[[Any], None], height: float) -> bytes:
    """A picture of 8 inches by `height`, without the date."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE)
        figure = Figure(figsize=(8, height), layout="constrained")
        draw(figure)
        file = io.BytesIO()
        figure.savefig(file, format="svg", metadata={"Date": None})
    return file.getvalue()


def box(axes: Any, corner: tuple[float, float], size: tuple[float, float], color: str) -> None:
    from matplotlib.patches import Rectangle

    axes.add_patch(
        Rectangle(corner, *size, facecolor=color, edgecolor="black", linewidth=0.7, clip_on=False)
    )


def empty(axes: Any, width: float, height: float) -> None:
    """No axes: coordinates from 0 to `width` and `height`."""
    axes.set_xlim(0, width)
    axes.set_ylim(0, height)
    axes.axis("off")


def tokens(figure: Any, vocabulary: Sequence[bytes], text: str) -> None:
    """The tokens of `text` with the first 5, 6, ... tokens of a vocabulary."""
    axes = figure.subplots()
    letters = len(set(text))
    counts = range(letters, len(vocabulary) + 1)
    empty(axes, 10, len(counts))
    for row, n in enumerate(reversed(counts)):
        lines = [f"{b64encode(token).decode()} {i}" for i, token in enumerate(vocabulary[:n])]
        tokenizer = Tokenizer.from_vocabulary("\n".join(lines).encode(), {}, "picture")
        added = "" if n == letters else f", with {vocabulary[n - 1].decode()!r}"
        axes.text(0, row + 0.5, f"vocabulary of {n}{added}", va="center")
        x = 3.0
        for id in tokenizer.encode(text, bos=False):
            token = tokenizer.decode([id])
            box(axes, (x, row + 0.12), (len(token) * 0.8 - 0.06, 0.76), COLORS[id])
            at = x + len(token) * 0.4 - 0.03
            axes.text(at, row + 0.62, token, ha="center", va="center", family="monospace", size=11)
            axes.text(at, row + 0.28, str(id), ha="center", va="center", size=7)
            x += len(token) * 0.8
        axes.text(x + 0.3, row + 0.5, str(tokenizer.encode(text, bos=False)), va="center")


def block(figure: Any, counts: Mapping[str, int], dim: int) -> None:
    """A block: the residual stream on top, its two branches below."""
    axes = figure.subplots()
    empty(axes, 16, 5)
    arrow = {"arrowstyle": "-|>", "color": "black", "linewidth": 1, "shrinkA": 0, "shrinkB": 0}
    axes.annotate("", (15.4, 4), (0.6, 4), arrowprops=arrow | {"color": BLUE, "linewidth": 2.5})
    axes.text(0.5, 4, "x", ha="right", va="center", size=11)
    axes.text(15.5, 4, "y", ha="left", va="center", size=11)
    axes.text(8, 4.4, f"residual stream (B, T, {dim})", ha="center", color=BLUE)
    axes.text(0.5, 0.2, "number of parameters below each module", size=7.5)
    branches = (
        (1.2, ("attention_norm", "attention"), ("RMSNorm", "Attention")),
        (8.4, ("ffn_norm", "feed_forward"), ("RMSNorm", "FeedForward")),
    )
    for start, names, kinds in branches:
        bends = (
            ((90, 0), (start, 4), (start + 0.9, 2)),
            ((0, 90), (start + 5.1, 2), (start + 5.6, 3.75)),
        )
        for (a, b), tail, head in bends:
            bend = {"connectionstyle": f"angle,angleA={a},angleB={b},rad=0"}
            axes.annotate("", head, tail, arrowprops=arrow | bend)
        axes.annotate("", (start + 2.8, 2.0), (start + 2.4, 2.0), arrowprops=arrow)
        places = ((start + 0.9, 1.5, COLORS[1]), (start + 2.8, 2.3, COLORS[2]))
        for name, kind, (x, width, color) in zip(names, kinds, places, strict=True):
            box(axes, (x, 1.3), (width, 1.4), color)
            axes.text(x + width / 2, 2.0, kind, ha="center", va="center")
            text = f"{name}\n{counts[name]:,}"
            axes.text(x + width / 2, 1.05, text, ha="center", va="top", size=7.5)
        axes.plot(
            start + 5.6, 4, "o", markersize=15, markerfacecolor="white", markeredgecolor="black"
        )
        axes.text(start + 5.6, 3.98, "+", ha="center", va="center", size=12)


def heads(axes: Any, queries: int, groups: int) -> None:
    """Which key-value head each query head reads."""
    read = repeat_kv(torch.arange(groups).view(1, 1, groups, 1), queries // groups).flatten()
    empty(axes, queries, 5)
    wide = queries / groups
    for g in range(groups):
        box(axes, ((g + 0.2) * wide, 0.9), (0.6 * wide, 1), COLORS[g])
        axes.text((g + 0.5) * wide, 1.4, str(g), ha="center", va="center")
    for h, g in enumerate(read.tolist()):
        axes.plot([h + 0.5, (g + 0.5) * wide], [3.1, 1.9], color=GREY, linewidth=0.6, zorder=0)
        box(axes, (h + 0.08, 3.1), (0.84, 1), COLORS[g])
        axes.text(h + 0.5, 3.6, str(h), ha="center", va="center", size=6)
    axes.text(queries / 2, 4.4, "query heads", ha="center")
    axes.text(queries / 2, 0.2, "key-value heads", ha="center")


def table(axes: Any, rows: Sequence[Sequence[float]], digits: int) -> None:
    """Numbers in cells, the larger the darker."""
    from matplotlib.colors import to_hex

    finite = [x for row in rows for x in row if math.isfinite(x)]
    low, high = min(finite), max(finite)
    for i, row in enumerate(rows):
        for j, x in enumerate(row):
            share = (x - low) / (high - low) if math.isfinite(x) else 0.0
            shade = [round(1 - share * (1 - c), 3) for c in (0.45, 0.63, 0.83)]
            box(axes, (j - 0.5, i - 0.5), (1, 1), to_hex(shade) if math.isfinite(x) else LIGHT)
            text = f"{x + 0.0:.{digits}f}" if math.isfinite(x) else "-inf"
            axes.text(j, i, text, ha="center", va="center", size=7)
    axes.set_xlim(-0.5, len(rows) - 0.5)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_aspect("equal")
    axes.tick_params(length=0)


def cache(axes: Any, titles: Sequence[str], states: Sequence[Sequence[Sequence[int]]]) -> None:
    """Rows of a cache at several times.

    Args:
        states: for each time, row and position: 0 empty, 1 written before, 2 written now, -1 beyond
            the row's end.
    """
    colors = {0: "white", 1: COLORS[0], 2: COLORS[1], -1: LIGHT}
    empty(axes, 11, 11)
    for time, (title, rows) in enumerate(zip(titles, states, strict=True)):
        top = 10.6 - 3.1 * time
        axes.text(3.5, top - 0.3, title, ha="center", va="center")
        for r, row in enumerate(rows):
            axes.text(-0.15, top - 1.1 - 0.9 * r, f"row {r}", ha="right", va="center")
            for p, state in enumerate(row):
                box(axes, (p, top - 1.5 - 0.9 * r), (1, 0.8), colors[state])
    for p in range(len(states[0][0])):
        axes.text(p + 0.5, 0.9, str(p), ha="center", va="center", size=7)
    axes.text(3.5, 0.2, "position", ha="center")
    words = (
        (2, "written now"),
        (1, "written before"),
        (-1, "beyond the\nrow's end: masked"),
        (0, "empty"),
    )
    for i, (state, word) in enumerate(words):
        box(axes, (7.5, 8.4 - 1.7 * i), (0.7, 0.8), colors[state])
        axes.text(8.4, 8.8 - 1.7 * i, word, va="center", size=7.5)
