"""A byte-level BPE of another format -> a tiktoken rank file and the JSON beside it (the sidecar).

Knows no file format: `gguf` and `hf_tokenizer_import` read the tokens and merges.
"""

from __future__ import annotations

import base64
import heapq
import re
from collections.abc import Iterable, Mapping
from typing import Any

# GPT-2's split pattern, and the same with every digit split from the rest of the text first.
GPT2_PATTERN = (
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
)  # fmt: skip
DIGITS_PATTERN = (
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+"
    r"|\s+(?=\p{N})|\s+(?!\S)|\s+"
)
# Tokens that end a turn, in any vocabulary that has them.
STOP_TOKENS = ("<|end_of_text|>", "<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|endoftext|>")
# A system turn that a chat template contains as literal text. Without its limit the search would be
# quadratic in templates that repeat the beginning.
_DEFAULT_SYSTEM = re.compile(
    r"<\|im_start\|>system(?:\n|\\n)((?:[^'\"{}\\]|\\.){1,1000}?)<\|im_end\|>"
)


def rank_file(tokens: Mapping[str, int], merges: Iterable[str], whole_pieces: bool) -> bytes:
    """The tiktoken rank file of a byte-level BPE: one line `base64(token) id` per token.

    tiktoken has no merges: it joins the two neighbours whose concatenation has the lowest id. This
    tokenizes like the merges only if the merges are in the order of their results' ids, and if no
    token is the concatenation of two neighbours that no merge joins. Both are checked here.

    Args:
        tokens: {text: id} of the ordinary tokens, in GPT-2's printable characters.
        merges: "left right", in the order of their priority.
        whole_pieces: a piece of text that is one token becomes that token without merging, as in
            tiktoken; otherwise merges must produce each token.

    Raises:
        ValueError: tiktoken would tokenize differently; the message names a token or a merge.
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
        if " " not in merge:
            raise ValueError(f"merge {merge!r} is not two tokens")
        left, right = (to_bytes(part) for part in merge.split(" ", 1))
        merged = ranks.get(left + right, -1)
        if merged < last or left not in ranks or right not in ranks:
            raise ValueError(
                f"merge {merge!r} is not in the order of token ids, as a rank file needs"
            )
        last = merged
        order.setdefault((left, right), len(order))
    for token in ranks:
        parts = _apply_merges(token, order)
        joins = len(parts) == 2 and all(part in ranks for part in parts)
        if joins or (len(parts) > 1 and not whole_pieces):
            raise ValueError(f"no merges produce the token {token!r}, as a rank file needs")
    return b"".join(base64.b64encode(token) + b" %d\n" % i for token, i in ranks.items())


def gpt2_bytes() -> dict[str, int]:
    """{character: byte} of GPT-2: visible bytes are themselves, the others U+0100 and up."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in visible]
    return {chr(b): b for b in visible} | {chr(256 + i): b for i, b in enumerate(others)}


def _apply_merges(token: bytes, order: dict[tuple[bytes, bytes], int]) -> list[bytes]:
    """The parts of `token` that remain after merging: first merge first, leftmost pair first.

    A part is known by the place where it starts. The time is about linear in the token's length.
    """
    n = len(token)
    parts = {i: token[i : i + 1] for i in range(n)}
    after, before = list(range(1, n + 1)), list(range(-1, n))
    pairs = ((order.get((parts[i], parts[i + 1])), i) for i in range(n - 1))
    waiting = [(priority, i) for priority, i in pairs if priority is not None]
    heapq.heapify(waiting)
    while waiting:
        priority, i = heapq.heappop(waiting)
        j = after[i]
        if i not in parts or j == n or order.get((parts[i], parts[j])) != priority:
            continue  # one of the two was merged with another part
        parts[i] += parts.pop(j)
        after[i] = after[j]
        before[after[i]] = i
        for left in (before[i], i):
            if left >= 0 and after[left] < n:
                priority = order.get((parts[left], parts[after[left]]), -1)
                if priority >= 0:
                    heapq.heappush(waiting, (priority, left))
    return list(parts.values())


def sidecar(
    pat_str: str,
    special_tokens: dict[str, int],
    bos: int | None,
    eos: int,
    pad: int | None,
    chat_template: str,
) -> dict[str, Any]:
    """The content of tokenizer.model.json (keys: see `llama.tokenizer.Tokenizer`).

    Args:
        pat_str: regular expression that splits text before the BPE.
        special_tokens: {text: id}.
        bos, eos, pad: ids in `special_tokens`; None: no such token.
        chat_template: searched for a default system prompt; it is never evaluated.

    Raises:
        ValueError: one of the ids is not that of a special token.
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
    """Resolve a quoted string's escapes: `\\n` is a newline, `\\x` is x for any other x."""
    return re.sub(r"\\(.)", lambda m: "\n" if m[1] == "n" else m[1], text, flags=re.DOTALL)
