"""A byte-level BPE of another format -> a tiktoken rank file and the JSON beside it (the sidecar).

Knows no file format: `gguf` and `hf_tokenizer_import` read the tokens and merges.
"""

from __future__ import annotations

import base64
import heapq
import re
from collections.abc import Collection, Iterable, Mapping, Sequence, Set
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
# More ids without a token than this, and than tokens, mean a damaged file.
MAX_UNUSED = 1024
# Names of tokens that mark turns: <|user|>, and with DeepSeek's bars.
_MARK = re.compile(r"<[|\uff5c].*[|\uff5c]>", re.DOTALL)


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
        try:
            return bytes([byte_of[c] for c in text])
        except KeyError:
            raise ValueError(f"token {text!r} is not in GPT-2's byte characters") from None

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
    *,
    ordinary: Collection[int] = (),
    stop_ids: Iterable[int] = (),
    text_tokens: Mapping[str, Sequence[str]] | None = None,
    token_flags: Mapping[str, Sequence[str]] | None = None,
) -> dict[str, Any]:
    """The content of tokenizer.model.json (keys: see `llama.tokenizer.Tokenizer`).

    The chat format is the one whose tokens there are; a chat template can say another.

    Args:
        pat_str: regular expression that splits text before the BPE.
        special_tokens: {text: id}.
        bos, eos, pad: ids; None: no such token.
        ordinary: ids of the ordinary tokens; if given, ids of no token are unused.
        stop_ids: more ids that end a generation; those without a token are ignored.
        text_tokens: {text: flags} of tokens that text stands for.
        token_flags: {text: flags} of the other special tokens.

    Raises:
        ValueError: bos, eos or pad is no token's id, or most ids have no token.
    """
    name_of: dict[int | None, str | int | None] = {None: None, **{i: i for i in ordinary}}
    name_of |= {i: text for text, i in special_tokens.items()}
    unused = _unused_ids({*ordinary, *special_tokens.values()}) if ordinary else []
    for role, i in (("bos", bos), ("eos", eos), ("pad", pad)):
        if i not in name_of:
            raise ValueError(f"the {role} token {i} is not in the vocabulary")
    stops = [name_of[eos], *(text for text in STOP_TOKENS if text in special_tokens)]
    stops += [name_of[i] for i in stop_ids if i in name_of]
    control = {name_of[bos], name_of[pad], *stops}
    found, flags = _found_in_text(text_tokens or {}, control, token_flags or {})
    optional = {"text_tokens": found, "token_flags": flags, "unused_ids": unused}
    return {
        "pat_str": pat_str,
        "special_tokens": special_tokens,
        "bos_token": name_of[bos],
        "eos_token": name_of[eos],
        "pad_token": name_of[pad],
        "stop_tokens": list(dict.fromkeys(stops)),
        "chat_format": _chat_format(special_tokens),
        "default_system": None,
        **{key: value for key, value in optional.items() if value},
    }


def _chat_format(special_tokens: Collection[str]) -> str | None:
    """The chat format whose tokens there are."""
    if "<|im_start|>" in special_tokens:
        return "chatml"
    return "llama3" if "<|start_header_id|>" in special_tokens else None


def _unused_ids(used: Set[int]) -> list[int]:
    """The ids below the highest one in `used` that are not in it."""
    count = max(used, default=-1) + 1
    if count > 2 * len(used) + MAX_UNUSED:
        raise ValueError(f"there is a token {count - 1}, and only {len(used)} tokens")
    return [i for i in range(count) if i not in used]


def _found_in_text(
    tokens: Mapping[str, Sequence[str]],
    control: Set[str | int | None],
    token_flags: Mapping[str, Sequence[str]],
) -> tuple[dict[str, Sequence[str]], dict[str, Sequence[str]]]:
    """`tokens` that are found in text, and the flags of the others with those in `token_flags`.

    Tokens in `control` and those that mark turns are not found: a user could forge a turn.
    """
    found = {
        text: flags
        for text, flags in tokens.items()
        if text not in control and not _MARK.fullmatch(text)
    }
    others = {**token_flags, **tokens}
    return found, {text: flags for text, flags in others.items() if flags and text not in found}
