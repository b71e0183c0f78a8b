"""Other formats <-> the official layout: what the converters share. Knows no format of its own.

Params in Meta's terms, a folder that appears whole, a byte-level BPE as ranks and a sidecar.
"""

from __future__ import annotations

import base64
import itertools
import os
import re
import shutil
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from llama.args import ModelArgs

# A turn ends at any of these, where the vocabulary has them.
STOP_TOKENS = ("<|end_of_text|>", "<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|endoftext|>")
# A system turn written out in a chat template, inside one of its quoted strings or outside them.
_DEFAULT_SYSTEM = re.compile(r"<\|im_start\|>system(?:\n|\\n)((?:[^'\"{}\\]|\\.)+?)<\|im_end\|>")


def ffn_terms(dim: int, hidden: int) -> tuple[int, float | None]:
    """(multiple_of, ffn_dim_multiplier) that params.json needs for a feed-forward of `hidden`.

    Values that Meta has published come first; any other width becomes a multiple of itself.

    Raises:
        ValueError: `dim` is not even and positive, or `hidden` not positive.
    """
    if hidden < 1:
        raise ValueError(f"the feed-forward must have a positive width, not {hidden}")
    for multiplier in (None, 1.3, 1.2, 1.5, 1.0):
        for multiple_of in (256, 1024, 4096):
            args = ModelArgs(
                dim=dim, n_heads=1, multiple_of=multiple_of, ffn_dim_multiplier=multiplier
            )
            if args.hidden_dim == hidden:
                return multiple_of, multiplier
    # Half a unit above `hidden`, so that no rounding takes the product below it.
    return hidden, (hidden + 0.5) / int(2 * (4 * dim) / 3)


def is_checkpoint_folder(path: Path) -> bool:
    """Whether a folder holds nothing but files that a conversion writes."""
    suffixes = {".pth", ".json", ".model", ".safetensors"}
    return (
        path.is_dir()
        and not path.is_symlink()
        and all(f.is_file() and f.suffix in suffixes for f in path.iterdir())
    )


@contextmanager
def new_folder(dst: Path, force: bool = False) -> Iterator[Path]:
    """A temporary folder beside `dst` that takes its name when the block ends: all or nothing.

    Whatever ends the block early, an interrupt included, removes the temporary folder and leaves
    `dst` as it was.

    Args:
        force: replace a `dst` that exists, once the new one is whole; it must hold nothing but a
            checkpoint's files.

    Raises:
        FileExistsError: `dst` exists, before the block or after it, and not `force`; or `force`
            would delete something else.
        OSError: it cannot be written.
    """
    remedy = f"{dst} exists already; remove it or choose another folder"
    if os.path.lexists(dst) and not (force and is_checkpoint_folder(dst)):
        if force:
            remedy = f"{dst} is not a folder of a checkpoint alone: it is not replaced"
        raise FileExistsError(remedy)
    tmp, old = (dst.with_name(f".{dst.name}.{uuid.uuid4().hex}.tmp") for _ in range(2))
    try:
        tmp.mkdir(parents=True)
        yield tmp
        if force and dst.exists():
            os.rename(dst, old)
        try:
            os.rename(tmp, dst)
        except OSError as e:
            if dst.exists():  # another process was faster
                raise FileExistsError(remedy) from e
            raise
    except BaseException as e:
        shutil.rmtree(tmp, ignore_errors=True)
        if old.exists() and not dst.exists():
            os.rename(old, dst)
        if isinstance(e, OSError) and (said := _said(e, tmp, dst)):
            raise OSError(said) from e
        raise
    shutil.rmtree(old, ignore_errors=True)


def _said(e: OSError, tmp: Path, dst: Path) -> str | None:
    """What an error of writing in `tmp`, whose name the user does not know, says of `dst`."""
    if e.errno is None:  # one of ours
        return str(e).replace(str(tmp), str(dst)) if str(tmp) in str(e) else None
    at = str(e.filename or tmp)
    if not at.startswith(str(tmp)) and not str(tmp).startswith(at):
        return None
    return f"{dst} cannot be written ({e.strerror}); choose another folder or disk"


def rank_file(tokens: Mapping[str, int], merges: Iterable[str], whole_pieces: bool) -> bytes:
    """A byte-level BPE as a tiktoken rank file: a line `base64(token) id` for each token.

    tiktoken knows no merges: it joins the two neighbours whose union has the lowest id. That is the
    same tokenization only if the merges are in the order of their products' ids, and if no token
    is the union of two neighbours that no merge would join. Both are checked here.

    Args:
        tokens: the ordinary tokens, in GPT-2's printable characters, with their ids.
        merges: "left right", first merge first.
        whole_pieces: the tokenizer takes a piece of text that is one token as it is, like
            tiktoken; otherwise each token must be reachable by merges.

    Raises:
        ValueError: tiktoken would tokenize otherwise; the message names a token.
    """
    byte_of = gpt2_bytes()

    def to_bytes(text: str) -> bytes:
        if not set(text) <= set(byte_of):
            raise ValueError(f"token {text!r} is not in GPT-2's byte characters")
        return bytes(byte_of[c] for c in text)

    ranks = {to_bytes(text): i for text, i in sorted(tokens.items(), key=lambda item: item[1])}
    order: dict[tuple[bytes, bytes], int] = {}
    last = 0
    for merge in merges:
        left, right = (to_bytes(part) for part in merge.split(" ", 1))
        product = ranks.get(left + right, -1)
        if product < last or left not in ranks or right not in ranks:
            raise ValueError(f"merge {merge!r} is out of the order of token ids: no rank file fits")
        last = product
        order.setdefault((left, right), len(order))
    for token in ranks:
        parts = _apply_merges(token, order)
        joins = len(parts) == 2 and all(part in ranks for part in parts)
        if joins or (len(parts) > 1 and not whole_pieces):
            raise ValueError(f"merges do not make the token {token!r}: no rank file fits")
    return b"".join(base64.b64encode(token) + b" %d\n" % i for token, i in ranks.items())


def gpt2_bytes() -> dict[str, int]:
    """GPT-2 writes a byte as itself where that is visible, the others in turn from U+0100 on."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in visible]
    return {chr(b): b for b in visible} | {chr(256 + i): b for i, b in enumerate(others)}


def _apply_merges(token: bytes, order: dict[tuple[bytes, bytes], int]) -> list[bytes]:
    """What merging leaves of `token`: the earliest merge first, the leftmost of equals."""
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 1:
        never = len(order)
        pairs = enumerate(itertools.pairwise(parts))
        first, i = min((order.get(pair, never), i) for i, pair in pairs)
        if first == never:
            break
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts


def sidecar(
    pat_str: str,
    special_tokens: dict[str, int],
    bos: int | None,
    eos: int,
    pad: int | None,
    chat_template: str,
) -> dict[str, Any]:
    """The JSON beside a tokenizer.model (keys: see `llama.tokenizer.Tokenizer`).

    Args:
        bos, eos, pad: ids among `special_tokens`; None is no such token.
        chat_template: data to look for a default system text in; it is never evaluated.

    Raises:
        ValueError: one of the ids is not a special token's.
    """
    text_of: dict[int | None, str | None] = {i: text for text, i in special_tokens.items()}
    text_of[None] = None
    for role, i in (("bos", bos), ("eos", eos), ("pad", pad)):
        if i not in text_of:
            raise ValueError(f"the {role} token {i} is not a special token")
    stops = [text_of[eos], *(text for text in STOP_TOKENS if text in special_tokens)]
    chatml = "<|im_start|>" in special_tokens
    found = _DEFAULT_SYSTEM.search(chat_template) if chatml else None
    llama3 = "llama3" if "<|start_header_id|>" in special_tokens else None
    return {
        "pat_str": pat_str,
        "special_tokens": special_tokens,
        "bos_token": text_of[bos],
        "eos_token": text_of[eos],
        "pad_token": text_of[pad],
        "stop_tokens": list(dict.fromkeys(stops)),
        "chat_format": "chatml" if chatml else llama3,
        "default_system": _unescape(found[1]) if found else None,
    }


def _unescape(text: str) -> str:
    """The text of a template's quoted string: `\\n` is a newline, `\\x` any other x itself."""
    return re.sub(r"\\(.)", lambda m: "\n" if m[1] == "n" else m[1], text, flags=re.DOTALL)
