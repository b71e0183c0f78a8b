"""The pictures of the tour, drawn from what the library's own functions compute.

    python -m docs.figures                 # all, or: python -m docs.figures rope cache

They are SVG without date, so that the same version of matplotlib draws the same bytes. What is
drawn is rounded first, because last digits differ between processors.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from docs import diagrams
from docs.diagrams import BLUE, COLORS, GREY, LIGHT, RED
from llama import ModelArgs, Sampling, Transformer
from llama.checkpoints.footprint import Footprint
from llama.distributed.sharding import weight_shapes
from llama.engine.sampling import distribution, limited
from llama.model import DotProductAttention as Attend
from llama.model import FeedForward, RMSNorm, apply_scaling, precompute_freqs_cis
from llama.train import Settings
from llama.train.objective import Objective
from llama.train.optimizer import initialize, make_optimizer, parameter_groups, set_learning_rate

FOLDER = Path(__file__).parent / "figures"
VOCABULARY = 128256
SIZES = {"1B": (2048, 16, 32, 8), "8B": (4096, 32, 32, 8), "70B": (8192, 80, 64, 8)}
WIDTHS = {"1B": (256, 1.5), "8B": (1024, 1.3), "70B": (4096, 1.3)}
ARGS = {
    name: ModelArgs(*SIZES[name], vocab_size=VOCABULARY, multiple_of=k, ffn_dim_multiplier=x)
    for name, (k, x) in WIDTHS.items()
}


def rounded(x: Tensor, digits: int = 4) -> list[Any]:
    """A tensor as nested lists of rounded numbers."""
    values: list[Any] = x.detach().double().round(decimals=digits).tolist()
    return values


def tokens(figure: Any) -> None:
    diagrams.tokens(figure, [b"l", b"o", b"w", b"e", b"r", b"lo", b"low", b"er"], "lower")


def parameters(figure: Any) -> None:
    """Shares of the parameters, without the norms; tied weights count once."""
    axes = figure.subplots()
    parts = ("embedding and output", "attention", "feed-forward")
    for row, (name, args) in enumerate(reversed(ARGS.items())):
        counts = dict.fromkeys(parts, 0)
        for weight, shape in weight_shapes(args).items():
            kind = weight.split(".")[2 if weight.startswith("layers") else 0]
            part = {"attention": parts[1], "feed_forward": parts[2]}.get(kind, parts[0])
            if "norm" not in kind and not (name == "1B" and kind == "output"):
                counts[part] += math.prod(shape)
        total, left = sum(counts.values()), 0.0
        for color, part in zip(COLORS, parts, strict=False):
            share = 100 * counts[part] / total
            axes.barh(row, share, left=left, color=color, label=part if row == 0 else None)
            axes.text(left + share / 2, row, f"{share:.0f}%", ha="center", va="center", size=7.5)
            left += share
    axes.set_yticks(range(3), [f"{name}" for name in reversed(ARGS)])
    axes.set_xlabel("share of the parameters, in percent (1B: embedding and output are one matrix)")
    axes.set_xlim(0, 100)
    axes.legend(ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1.0), frameon=False)


def block(figure: Any) -> None:
    args = ARGS["8B"]
    counts = {name: math.prod(shape) for name, shape in weight_shapes(args, 1).items()}
    sums = {
        part: sum(n for name, n in counts.items() if f".{part}." in name)
        for part in ("attention_norm", "attention", "ffn_norm", "feed_forward")
    }
    diagrams.block(figure, sums, args.dim)


def norm(figure: Any) -> None:
    axes = figure.subplots()
    x = 1.3 * torch.randn(40, 2, generator=torch.Generator().manual_seed(1)).clamp(-2.2, 2.2)
    before, after = rounded(x), rounded(RMSNorm(2)(x))
    for a, b in zip(before, after, strict=True):
        axes.plot(*zip(a, b, strict=True), color=LIGHT, linewidth=0.8, zorder=1)
    axes.scatter(*zip(*before, strict=True), color=GREY, s=14, label="x", zorder=2)
    axes.scatter(*zip(*after, strict=True), color=RED, s=14, label="RMSNorm(x)", zorder=3)
    turn = torch.linspace(0, 2 * math.pi, 61)
    circle = math.sqrt(2) * torch.stack([turn.cos(), turn.sin()])
    axes.plot(*rounded(circle), color=RED, linewidth=0.6, zorder=1)
    axes.set_aspect("equal")
    axes.legend(loc="center left", bbox_to_anchor=(1.02, 0.5), frameon=False)
    axes.set_xlabel("component 0")
    axes.set_ylabel("component 1")


def heads(figure: Any) -> None:
    left, right = figure.subplots(1, 2, width_ratios=(2, 1))
    diagrams.heads(left, ARGS["8B"].n_heads, ARGS["8B"].kv_heads)
    for row, name in enumerate(("8B", "70B")):
        args = ARGS[name]
        plain = ModelArgs(args.dim, args.n_layers, args.n_heads, vocab_size=VOCABULARY)
        for shift, each, color in ((0.2, args, BLUE), (-0.2, plain, GREY)):
            size = Footprint(each, tied=False).cache_token() * 8192 / 2**30
            at = 1.2 - row + shift
            right.barh(at, size, height=0.38, color=color)
            right.text(size + 0.3, at, f"{size:g} (K = {each.kv_heads})", va="center")
    right.set_yticks([1.2, 0.2], ["8B", "70B"])
    right.set_xlim(0, 29)
    right.set_title("GiB of cache for 8,192 positions")


def rope(figure: Any) -> None:
    """Pair 0 turns by 1 radian a position: dots, and the curve between them."""
    positions, pairs = 101, (0, 8, 16, 24)
    freqs_cis = precompute_freqs_cis(128, positions, 500000.0)
    between = torch.linspace(0, positions - 1, 601)
    turned = torch.cos(between * freqs_cis[1, 0].angle())
    rows = figure.subplots(len(pairs), 1, sharex=True)
    for axes, pair, color in zip(rows, pairs, COLORS, strict=False):
        cosines = rounded(freqs_cis.real[:, pair], 3)
        axes.plot(range(positions), cosines, "-" if pair else ".", color=color)
        axes.set_ylabel(f"pair {pair}", rotation=0, ha="right", va="center")
        axes.set_ylim(-1.2, 1.2)
        axes.set_yticks([-1, 1])
    rows[0].plot(rounded(between, 3), rounded(turned, 3), color=COLORS[0], linewidth=0.5)
    rows[0].set_title("cosine of the angle; base 500,000, D = 128; dots: positions")
    rows[-1].set_xlabel("position")
    rows[-1].set_xlim(0, positions - 1)


def scaling(figure: Any) -> None:
    axes = figure.subplots()
    freqs = precompute_freqs_cis(128, 2, 500000.0)[1].angle()
    wavelengths = rounded(2 * math.pi / freqs, 2)
    axes.axvspan(2048, 8192, color=LIGHT, alpha=0.5, linewidth=0)
    for factor, color in ((8.0, BLUE), (32.0, RED)):
        ratio = rounded(apply_scaling(freqs, factor) / freqs)
        axes.plot(wavelengths, ratio, ".", color=color, label=f"factor {factor:.0f}")
    axes.set_xscale("log")
    axes.set_xlabel("wavelength of the pair, in positions; grey: 2,048 to 8,192")
    axes.set_ylabel("scaled / unscaled frequency")
    axes.set_ylim(0, 1.05)
    axes.legend(frameon=False)


def attention(figure: Any) -> None:
    T = 5
    generator = torch.Generator().manual_seed(3)
    q, k = (torch.randn(1, T, 1, 8, generator=generator) for _ in range(2))
    scores = q[0, :, 0] @ k[0, :, 0].T / math.sqrt(8)
    masked = scores.masked_fill(~torch.ones(T, T, dtype=torch.bool).tril(), -math.inf)
    identity = torch.eye(T).view(1, T, 1, T)  # with these values the result is the weights
    weights = Attend()(q, k, identity, None)[0, :, 0]
    titles = ("scores: q k^T / sqrt(D)", "with the mask", "softmax: each row sums to 1")
    for axes, title, x in zip(
        figure.subplots(1, 3), titles, (scores, masked, weights), strict=True
    ):
        digits = 2 if x is weights else 1
        diagrams.table(axes, rounded(x, digits), digits)
        axes.set_title(title)
        axes.set_xlabel("key's position")
    figure.axes[0].set_ylabel("query's position")


def cache(figure: Any) -> None:
    left, right = figure.subplots(1, 2, width_ratios=(1.3, 1))
    model = Transformer(ModelArgs(dim=8, n_layers=1, n_heads=2, vocab_size=10, max_seq_len=7))
    kept, lengths = model.new_cache(2, 7), [0, 0]
    states = []
    for ids, new in (
        ([[1, 2, 3, 4], [5, 6, 0, 0]], (4, 2)),
        ([[7], [8]], (1, 1)),
        ([[9], [1]], (1, 1)),
    ):
        before = kept[0].k.clone()
        with torch.no_grad():
            model.hidden(torch.tensor(ids), torch.tensor(lengths), kept)
        lengths = [a + b for a, b in zip(lengths, new, strict=True)]
        written = (kept[0].k != before).flatten(2).any(-1)
        filled = (kept[0].k != 0).flatten(2).any(-1)
        own = torch.arange(7) < torch.tensor(lengths).unsqueeze(1)
        states.append((filled.int() + (written & own).int() - 2 * (filled & ~own).int()).tolist())
    diagrams.cache(left, ("after prompts of 4 and 2", "after a step", "after another"), states)
    prompt, answer = 1000, range(1, 1001)
    right.plot(
        answer, [sum(range(prompt, prompt + n)) for n in answer], color=GREY, label="without"
    )
    right.plot(answer, [prompt + n - 1 for n in answer], color=BLUE, label="with a cache")
    right.set_yscale("log")
    right.set_xlabel("tokens of answer, after a prompt of 1,000")
    right.set_title("positions computed")
    right.legend(frameon=False)


def swiglu(figure: Any) -> None:
    axes = figure.subplots()
    layer = FeedForward(ModelArgs(dim=2, n_heads=1, multiple_of=1))
    for linear, column in ((layer.w1, 0), (layer.w3, 1), (layer.w2, 0)):
        linear.weight.data.fill_(0)[0, column] = 1
    gate = torch.linspace(-5, 4, 91)
    for value, color in zip((2.0, 1.0, 0.5, -1.0), COLORS, strict=False):
        y = layer(torch.stack([gate, torch.full_like(gate, value)], dim=-1))[:, 0]
        axes.plot(rounded(gate), rounded(y), color=color, label=f"w3 x = {value:g}")
    axes.axhline(0, color=LIGHT, linewidth=0.8, zorder=0)
    axes.set_xlabel("w1 x")
    axes.set_ylabel("silu(w1 x) * w3 x")
    axes.legend(frameon=False)


def sampling(figure: Any) -> None:
    logits = torch.tensor([[3.2, 2.9, 2.1, 1.9, 1.5, 1.2, 0.8, 0.5, 0.2, -0.3, -0.8, -1.5]])
    probs = limited(logits, Sampling(temperature=1.0))
    sharper = limited(logits, Sampling(temperature=0.6))
    drawn = distribution(logits, Sampling(temperature=0.6, top_p=0.9))
    titles = ("softmax of the logits", "temperature 0.6", "top_p 0.9: drawn from these")
    panels = figure.subplots(1, 3, sharey=True)
    for axes, title, x in zip(panels, titles, (probs, sharper, drawn), strict=True):
        axes.bar(range(12), rounded(x[0]), color=BLUE)
        axes.set_title(title)
        axes.set_xlabel("id, the most probable first")
        axes.set_xticks(range(0, 12, 2))
    for bar, p in zip(panels[1].patches, drawn[0].tolist(), strict=True):
        bar.set_color(BLUE if p > 0 else GREY)
    panels[1].plot(range(12), rounded(sharper[0].cumsum(0)), ".-", color=RED, label="sum")
    panels[1].axhline(0.9, color=RED, linewidth=0.8, linestyle="--", label="top_p = 0.9")
    panels[1].bar([0], [0], color=GREY, label="cut by top_p")
    panels[1].legend(frameon=False, loc="center right")
    panels[0].set_ylabel("probability")


def training(figure: Any) -> None:
    """Left: the schedule of `llama3 train` by default. Right: 60 updates on one sentence."""
    left, right = figure.subplots(1, 2)
    usual = Settings()
    left.plot([1000 * usual.lr_at(step) for step in range(0, usual.steps, 10)], color=BLUE)
    left.set_xticks([0, 50, 100, 150, 200], [0, 500, 1000, 1500, 2000])
    left.set_title("schedule of 2,000 updates")
    left.set_ylabel("learning rate in 1e-3")
    left.set_xlabel("update")
    text = torch.tensor([list(b"the capital of france is paris.")])
    settings = Settings(dim=32, n_layers=2, n_heads=2, lr=0.003, warmup=10, steps=60)
    model = Transformer(settings.model_args(vocab_size=128))
    initialize(model, seed=1)
    loss_of, n = Objective(model), text.shape[1] - 1
    optimizer = make_optimizer(parameter_groups(model, settings), settings)
    losses = []
    for step in range(settings.steps):
        set_learning_rate(optimizer, settings.lr_at(step))
        optimizer.zero_grad()
        loss = loss_of(text[:, :-1], text[:, 1:]) / n
        loss.backward()
        optimizer.step()
        losses.append(round(loss.item(), 2))
    right.plot(losses, color=RED)
    right.text(2, losses[0], f"random weights: {losses[0]:.1f}", va="center", color=RED)
    right.axhline(math.log(128), color=GREY, linewidth=0.8, linestyle="--")
    right.text(59, math.log(128) - 0.4, "ln 128: all ids equally probable", ha="right", color=GREY)
    right.set_title("a run of 60 updates on one sentence of 31 bytes")
    right.set_ylabel("loss in nats per token")
    right.set_xlabel("update")


# Each picture and its height in inches; all are 8 wide.
PICTURES: dict[str, tuple[Callable[[Any], None], float]] = {
    "tokens": (tokens, 2.3),
    "parameters": (parameters, 2.2),
    "block": (block, 2.6),
    "norm": (norm, 3.2),
    "heads": (heads, 2.4),
    "rope": (rope, 3.2),
    "scaling": (scaling, 2.8),
    "attention": (attention, 3.2),
    "cache": (cache, 2.9),
    "swiglu": (swiglu, 2.8),
    "sampling": (sampling, 2.5),
    "training": (training, 2.6),
}


def drawn(name: str) -> bytes:
    """The SVG of a picture."""
    return diagrams.svg(*PICTURES[name])


def main(names: Sequence[str]) -> None:
    FOLDER.mkdir(exist_ok=True)
    for name in names or PICTURES:
        (FOLDER / f"{name}.svg").write_bytes(drawn(name))


if __name__ == "__main__":
    main(sys.argv[1:])
