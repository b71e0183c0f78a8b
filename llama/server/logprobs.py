"""Log-probabilities of an answer's tokens, released together with their text.

The bytes of the tokens, joined, are the answer's text: tokens of a stop string are left out.
"""

from __future__ import annotations

import codecs
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from llama.engine.request import TopLogprobs
from llama.generation import Piece

LOWEST = -9999.0  # written for -inf and NaN, which JSON lacks
DecodeBytes = Callable[[Sequence[int]], bytes]


@dataclass(frozen=True)
class ScoredToken:
    """A token of a text.

    Attributes:
        bytes: its bytes, which may be part of a character.
        logprob: None for the first of a prompt.
        top: the most probable ids at its place, and their log-probabilities.
        start, end: characters of the text, from that with its first byte to that with its last.
    """

    id: int
    bytes: bytes
    logprob: float | None
    top: TopLogprobs
    start: int
    end: int


class TokenAligner:
    """Finds which characters of a text its tokens are.

    Args:
        decode_bytes: of a tokenizer.
    """

    def __init__(self, decode_bytes: DecodeBytes):
        self.decode_bytes = decode_bytes
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._characters = 0  # complete ones so far
        self._released = 0
        self._waiting: deque[ScoredToken] = deque()

    def token(self, id: int, logprob: float | None, top: TopLogprobs | None = None) -> ScoredToken:
        """The next token."""
        data, start = self.decode_bytes([id]), self._characters
        self._characters += len(self._utf8.decode(data))
        partial = bool(self._utf8.getstate()[0])
        return ScoredToken(id, data, logprob, top or [], start, self._characters + partial)

    def feed(self, piece: Piece, stopped: bool) -> list[ScoredToken]:
        """The tokens whose text has been released with this piece.

        Args:
            stopped: whether a stop string has ended the text; looked at in the last piece.
        """
        tops: Sequence[TopLogprobs] = piece.top_logprobs or [[]] * len(piece.tokens)
        for id, logprob, top in zip(piece.tokens, piece.logprobs, tops, strict=True):
            self._waiting.append(self.token(id, logprob, top))
        self._released += len(piece.text)
        tokens, end, last = [], self._released, piece.finish_reason is not None
        while self._waiting and (self._waiting[0].end <= end or (last and not stopped)):
            tokens.append(self._waiting.popleft())
        if last and self._waiting and self._waiting[0].start < end:
            tokens.append(cut(self._waiting.popleft(), end))
        return tokens


def cut(token: ScoredToken, end: int) -> ScoredToken:
    """The part of a token before character `end` of the text."""
    character = token.start - 1
    for i, byte in enumerate(token.bytes):
        if i == 0 or byte & 0xC0 != 0x80:  # the first byte of a character
            character += 1
        if character == end:
            return replace(token, bytes=token.bytes[:i], end=end)
    return token


def finite(logprob: float) -> float:
    """A number that JSON has."""
    return logprob if logprob > LOWEST else LOWEST  # also where it is NaN


def readable(data: bytes) -> str:
    r"""The text of a token; bytes that are part of a character are written as `\xe2`."""
    return data.decode("utf-8", "backslashreplace")


def chat_entry(token: ScoredToken, decode_bytes: DecodeBytes) -> dict[str, Any]:
    """As in `logprobs.content` of a chat completion, and the token's id."""
    return _entry(token.id, token.bytes, token.logprob or 0.0) | {
        "top_logprobs": [_entry(id, decode_bytes([id]), logprob) for id, logprob in token.top]
    }


def _entry(id: int, data: bytes, logprob: float) -> dict[str, Any]:
    return {
        "token": readable(data), "bytes": list(data), "logprob": finite(logprob), "id": id,
    }  # fmt: skip


def completion_lists(
    tokens: Sequence[ScoredToken], decode_bytes: DecodeBytes, offset: int = 0
) -> dict[str, list[Any]]:
    """`logprobs` of a text completion.

    Args:
        offset: of the text in the choice's text.
    """
    found: dict[str, list[Any]] = {
        "tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": [],
    }  # fmt: skip
    for token in tokens:
        name = completion_token(token.bytes)
        top: dict[str, float] | None = None
        if token.logprob is not None:
            top = {}
            for id, logprob in token.top:
                top.setdefault(completion_token(decode_bytes([id])), finite(logprob))
            top.setdefault(name, finite(token.logprob))
        found["tokens"].append(name)
        found["token_logprobs"].append(None if token.logprob is None else finite(token.logprob))
        found["top_logprobs"].append(top)
        found["text_offset"].append(offset + token.start)
    return found


def completion_token(data: bytes) -> str:
    r"""The text of a token, or `bytes:\xe2` and so on where it is part of a character."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)
