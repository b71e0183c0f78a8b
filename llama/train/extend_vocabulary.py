"""Text and a checkpoint -> the checkpoint with more tokens, which are learned from the text."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from llama.checkpoints.convert import default_dtype, open_for_conversion, write_checkpoint
from llama.checkpoints.extended import INITIAL, ExtendedSource, Shares, first_new_id
from llama.checkpoints.load import load_model
from llama.checkpoints.locate import expand
from llama.checkpoints.memory import check_memory
from llama.checkpoints.open import open_tokenizer
from llama.checkpoints.source import Source
from llama.common.progress import progress
from llama.distributed.device import pick_device, pick_dtype
from llama.text.scripts import Scripts
from llama.train.continued_merges import learn_tokens
from llama.train.data import Corpus

WINDOW, WINDOWS = 256, 16  # tokens at once, and how often, of the text whose states are computed


class Extension(NamedTuple):
    """What `extend_vocabulary` did.

    Attributes:
        path: the folder written.
        tokens: {token: id}, the new ones.
        characters: of the text.
        before, after: how many tokens the text has in the old vocabulary and in the new one.
    """

    path: Path
    tokens: dict[bytes, int]
    characters: int
    before: int
    after: int


def extend_vocabulary(
    base: str | Path,
    data: Sequence[str | Path],
    out: str | Path,
    n: int,
    *,
    scripts: Collection[str] | None = None,
    initial: str = "shares",
    to: str | None = None,
) -> Extension:
    """Write the checkpoint `base` with `n` more tokens as the folder `out`, see `learn_tokens`.

    All old ids stay.

    Args:
        base: a checkpoint of any layout, not quantized.
        data: text files, or folders of .txt and .md files.
        scripts: see `Scripts`.
        initial: what the new rows begin as, see `llama.checkpoints.extended`; "shares" runs it.
        to: "meta" or "hf": the layout of `out`; None: Hugging Face's for a base in it, else Meta's.

    Raises:
        FileExistsError: `out` exists.
        FileNotFoundError: no checkpoint, tokenizer or text.
        ValueError: damaged or unfit files, unknown scripts, or the text yields fewer tokens.
        OSError: the disk is full.
    """
    _check_options(n, initial, to)
    chosen = Scripts(scripts)
    base, out = expand(base), expand(out)
    source = open_for_conversion(base, out)
    if os.path.lexists(out):
        raise FileExistsError(f"{out} exists already; remove it or choose another folder")
    to = to or ("hf" if source.layout == "hf" else "meta")
    tokenizer = open_tokenizer(source)
    first_id = first_new_id(source, tokenizer)
    if to == "meta":
        _check_shards(source, first_id, n)
    texts = [text for path in data for text in Corpus(path, 0, 0).texts()]
    before = [tokenizer.encode(text, bos=False) for text in texts]
    tokens = learn_tokens(tokenizer, texts, n, chosen, first_id=first_id)
    encode = open_tokenizer(ExtendedSource(source, tokens)).encode
    after = [encode(text, bos=False) for text in texts]
    shares = None
    if initial == "shares":
        shares = Shares(mean_state(source, before), log_odds(after, tokens.values()))
    longer = ExtendedSource(source, tokens, initial, shares)
    write_checkpoint(longer, out, to, default_dtype(source))
    sizes = [sum(map(len, ids)) for ids in (texts, before, after)]
    return Extension(out, tokens, *sizes)


def log_odds(texts: Sequence[Sequence[int]], new: Collection[int]) -> Tensor:
    """See `Shares`. Every new id occurs in `texts`."""
    counts = Counter(i for ids in texts for i in ids)
    found = torch.tensor([counts[i] for i in new], dtype=torch.float64)
    return found.log() - math.log(max(1, counts.total() - int(found.sum())))


@torch.inference_mode()
def mean_state(source: Source, texts: Sequence[Sequence[int]]) -> Tensor:
    """The mean normed state before the output, (D,) float64, over windows spread over `texts`.

    Raises:
        ValueError: the model does not fit in memory, or the state is not finite.
    """
    ids = [i for text in texts for i in text]
    size, device = min(WINDOW, source.context), pick_device(None)
    args, dtype = source.args(max_seq_len=size, max_batch_size=1), pick_dtype(None, device)
    try:
        check_memory(source, args, device, dtype)
    except ValueError as e:
        raise ValueError(f"shares runs the model: {e}; or begin with parts instead") from None
    model = load_model(source, args, device, dtype)
    total, count = torch.zeros(model.params.dim, dtype=torch.float64), 0
    starts = range(0, len(ids), max(size, len(ids) // WINDOWS))[:WINDOWS]
    for start in progress(starts, "states of the text", len(starts), "window"):
        window = torch.tensor([ids[start : start + size]], device=device)
        total += model.hidden(window)[0].double().sum(0).cpu()
        count += window.numel()
    if not total.isfinite().all():
        raise ValueError(f"{source.path}: its states are NaN or infinite; run `llama3 verify`")
    return total / count


def _check_shards(source: Source, first_id: int, n: int) -> None:
    """Raise a ValueError if the rows cannot be split over the shards of Meta's layout."""
    rows, shards = first_id + n, source.n_shards
    if rows % shards:
        raise ValueError(
            f"{source.path} has {shards} shards, and {rows} tokens cannot be split over them: "
            f"ask for {n + -rows % shards} tokens, or write --to hf"
        )


def _check_options(n: int, initial: str, to: str | None) -> None:
    """Raise a ValueError for an option of `extend_vocabulary` that is out of range."""
    if to not in ("meta", "hf", None):
        raise ValueError(f"cannot write {to!r}; use 'meta' or 'hf'")
    if initial not in INITIAL:
        raise ValueError(f"initial must be one of {', '.join(INITIAL)}, not {initial!r}")
    if type(n) is not int or n < 1:
        raise ValueError(f"tokens must be 1 or more, not {n!r}")
