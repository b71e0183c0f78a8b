"""A `Record` as one self-contained HTML page. The drawing is in page/*.js; this writes its data.

The page holds no more than MAX_PAGE bytes: of a long prompt it shows a part, and says so.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import math
from functools import cache
from pathlib import Path
from string import Template
from typing import Any

import torch
from torch import Tensor

from llama.common.dtypes import dtype_name
from llama.explain.record import Record

FOLDER = Path(__file__).parent / "page"
SCRIPTS = (
    "base.js", "chart.js", "tokens.js", "parts.js", "rope.js", "cache.js", "attention.js",
    "lens.js", "next.js", "start.js",
)  # fmt: skip
MAX_PAGE = 1_900_000  # bytes
TOKENS = 512  # that are listed
MAP = 96  # tokens of a map of attention, and of the lens
LENS_CELLS = 20_000  # ids of the lens
NEXT = 40  # next tokens
PIECE = 48  # bytes of a token
LENS_PIECE = 24  # bytes of a token that only the lens has
PROMPT = 2000  # characters of the prompt
EXACT = 9  # digits of a float32
HEIGHT = 720  # of the page in Jupyter, in CSS pixels


def page_of(record: Record) -> str:
    """The page, ASCII but for its own text."""
    style, script, template = assets()
    data = page_data(record)
    frame = template.substitute(style=style, script=script, policy=policy(style, script), data="")
    room = MAX_PAGE - len(frame.encode()) - len(as_data(data)) - 1000
    data["attention"] = attention_data(record, data["lens"]["tokens"], room)
    data["lens"] = lens_data(record, data["attention"]["tokens"])  # the same tokens
    return template.substitute(
        style=style, script=script, policy=policy(style, script), data=as_data(data)
    )


def embedded_page(record: Record) -> str:
    """The page in a frame of its own, for Jupyter: nothing of it reaches the notebook's page."""
    page = html.escape(page_of(record), quote=True)
    return (
        f'<iframe srcdoc="{page}" sandbox="allow-scripts" title="llama3 explain" width="100%" '
        f'height="{HEIGHT}" style="border:0"></iframe>'
    )


@cache
def assets() -> tuple[str, str, Template]:
    """The style, the script and the page around them."""
    style = (FOLDER / "page.css").read_text("utf-8")
    script = "".join((FOLDER / name).read_text("utf-8") for name in SCRIPTS)
    return style, script, Template((FOLDER / "page.html").read_text("utf-8"))


def policy(style: str, script: str) -> str:
    """The Content-Security-Policy: this style, this script and nothing else."""
    digests = [
        base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        for text in (style, script)
    ]
    return (
        f"default-src 'none'; style-src 'sha256-{digests[0]}'; script-src 'sha256-{digests[1]}'; "
        "img-src data:; base-uri 'none'; form-action 'none'"
    )


def as_data(value: Any) -> str:
    """JSON in ASCII for a script element: no character of it means anything to HTML."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def page_data(record: Record) -> dict[str, Any]:
    """All that the page shows but attention."""
    shown, T = min(len(record.ids), TOKENS), len(record.ids)
    lens, following = lens_data(record, MAP), next_data(record)
    known = {*record.ids[:shown], following["after"], *(row[0] for row in following["rows"])}
    most = dict.fromkeys(lens["ids"], LENS_PIECE) | dict.fromkeys(known, PIECE)
    logprobs = [
        None if math.isnan(x) else digits(x, EXACT) for x in record.logprobs[:shown].tolist()
    ]
    return {
        "model": model_data(record),
        "prompt": record.text[:PROMPT] + "…" * (len(record.text) > PROMPT),
        "tokens": {"count": T, "total": record.total, "limit": record.limit},
        "ids": record.ids[:shown],
        "special": [i for i, special in enumerate(record.special[:shown]) if special],
        "logprobs": logprobs,
        "texts": {i: piece_data(record.piece(i), most[i]) for i in sorted(most)},
        "stages": [
            [
                s.name,
                s.module,
                list(s.shape),
                s.count,
                s.parameters,
                s.bytes,
                s.operations,
                s.storage,
            ]
            for s in record.stages
        ],
        "rope": {
            "frequencies": [digits(x, 7) for x in record.frequencies.tolist()],
            "unscaled": [digits(x, 7) for x in record.unscaled_frequencies.tolist()],
        },
        "cache": {"position": record.cache_bytes, "ungrouped": record.ungrouped_cache_bytes},
        "lens": lens,
        "next": following,
    }


def model_data(record: Record) -> dict[str, Any]:
    args = record.args
    names = [
        *("dim", "n_layers", "n_heads", "kv_heads", "head_dim", "hidden_dim", "vocab_size"),
        *("norm_eps", "rope_theta", "use_scaled_rope", "scale_factor"),
    ]
    about = {"name": record.name, "dtype": dtype_name(record.dtype)}
    return {name: getattr(args, name) for name in names} | about


def piece_data(piece: bytes, most: int) -> str | list[Any]:
    """The bytes of a token in hexadecimal; of a long one the first, and how many it has."""
    return piece.hex() if len(piece) <= most else [piece[:most].hex(), len(piece)]


def lens_data(record: Record, most: int) -> dict[str, Any]:
    """The lens of the first tokens: for each state, token and rank the id and the probability."""
    states, T, k = record.lens_ids.shape
    shown = max(1, min(T, most, LENS_CELLS // (states * k)))
    ids, probs = record.lens_ids[:, :shown], record.lens_probs[:, :shown]
    return {
        "tokens": shown,
        "k": k,
        "ids": ids.flatten().tolist(),
        "probs": [digits(x, 6) for x in probs.flatten().tolist()],
    }


def next_data(record: Record) -> dict[str, Any]:
    """The most probable next tokens at each step, and how many are left after each."""
    found, how = record.next, record.next.sampling
    steps = (found.raw, found.tempered, found.limited, found.final)
    top = found.raw.topk(min(NEXT, len(found.raw))).indices.tolist()
    return {
        "after": record.ids[-1],
        "sampling": {
            "temperature": how.temperature,
            "top_k": how.top_k,
            "min_p": how.min_p,
            "top_p": how.top_p,
        },
        "rows": [[i, *(digits(float(probs[i]), EXACT) for probs in steps)] for i in top],
        "left": [int((probs > 0).sum()) for probs in steps],
    }


def attention_data(record: Record, most: int, room: int) -> dict[str, Any]:
    """Attention over the first tokens, at most `most`, in as many layers as fit `room` bytes.

    The weights are integers of one or two bytes, rounded: 255 or 65,535 is 1. Of each map only what
    is not masked, row by row.
    """
    L, H = record.attention.shape[:2]
    shown = most
    while shown > 8 and fitting(shown, H, room) < min(L, 4):
        shown -= 8
    pairs = H * shown * (shown + 1) // 2
    width = 2 if fitting(shown, H, room) >= 2 * L else 1
    count = max(1, min(L, fitting(shown, H, room) // width))
    layers = sorted({round(i * (L - 1) / max(count - 1, 1)) for i in range(count)})
    maps = record.attention[layers, :, :shown, :shown]
    rows, columns = torch.tril_indices(shown, shown, device="cpu")
    weights = maps[:, :, rows, columns]
    assert weights.numel() == len(layers) * pairs
    return {"tokens": shown, "layers": layers, "width": width, "data": packed(weights, width)}


def fitting(shown: int, heads: int, room: int) -> int:
    """How many layers' maps fit, with one byte a weight."""
    return room * 3 // 4 // (heads * shown * (shown + 1) // 2)


def packed(weights: Tensor, width: int) -> str:
    """Numbers from 0 to 1 as little-endian integers, in base64."""
    codes = (weights.flatten() * (2 ** (8 * width) - 1)).round().to(torch.int32)
    parts = [(codes >> (8 * i)) & 255 for i in range(width)]
    return base64.b64encode(
        bytes(torch.stack(parts, 1).flatten().to(torch.uint8).tolist())
    ).decode()


def digits(x: float, n: int) -> float:
    """Rounded to `n` significant digits."""
    return float(f"{x:.{n}g}")
