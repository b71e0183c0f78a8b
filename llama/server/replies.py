"""Pieces of answers -> chunks of a stream. A whole answer is the fold of its stream's chunks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llama.engine.request import Request
from llama.generation import Answer, Piece
from llama.server.chat_body import ChatBody
from llama.server.completion_body import CompletionBody
from llama.server.envelope import DONE, Chunk, Envelope, Usage, event, to_json
from llama.server.logprobs import ScoredToken, TokenAligner, chat_entry, completion_lists
from llama.server.tool_stream import ToolStream
from llama.tokenizer import Tokenizer

__all__ = ["DONE", "ChatReply", "CompletionReply", "event", "to_json"]


class ChatReply:
    """The reply to a chat request.

    Args:
        groups: as `chat_requests` returned them.
        model: its name.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        body: ChatBody,
        groups: Sequence[Sequence[Request]],
        model: str,
    ):
        self.usage = Usage(groups)
        self._envelope = Envelope("chatcmpl", model, body, self.usage)
        self._decode_bytes = tokenizer.decode_bytes
        self._aligners = [TokenAligner(tokenizer.decode_bytes) for _ in range(body.n)]
        names = [] if body.constrained else [tool["name"] for tool in body.offered_tools]
        self._readers = [
            ToolStream(tokenizer, names, parallel=body.parallel_tool_calls)
            for _ in range(body.n if names else 0)
        ]
        self._logprobs = body.logprobs
        self._choices = [_ChatChoice(index) for index in range(body.n)]

    def first(self) -> list[Chunk]:
        """The chunks before any piece."""
        delta = {"role": "assistant", "content": ""}
        return [self._chunk(choice.index, dict(delta)) for choice in self._choices]

    def piece(self, index: int, answer: Answer, piece: Piece) -> list[Chunk]:
        """The chunks of a piece of answer `index`; none while its text is incomplete."""
        self.usage.count(index, answer, piece)
        reader = self._readers[index] if self._readers else None
        if reader is not None:
            deltas = reader.feed(piece.tokens, piece.text, piece.finish_reason)
        else:
            deltas = [{"content": piece.text}] if piece.text else []
        entries: list[dict[str, Any]] = []
        if self._logprobs:
            tokens = self._aligners[index].feed(piece, answer.detokenizer.stopped)
            entries = [chat_entry(token, self._decode_bytes) for token in tokens]
            if entries and not deltas:
                deltas = [{"content": ""}]
        chunks = [
            self._chunk(index, delta, entries if i == 0 else []) for i, delta in enumerate(deltas)
        ]
        if piece.finish_reason is not None:
            reason = "length" if piece.finish_reason == "length" else "stop"
            if reason == "stop" and reader is not None and reader.called:
                reason = "tool_calls"
            chunks.append(self._chunk(index, {}, reason=reason))
        return chunks

    def end(self) -> list[Chunk]:
        """The chunks after the last piece."""
        return self._envelope.end("chat.completion.chunk")

    def whole(self) -> dict[str, Any]:
        """The body of the answer without a stream."""
        choices = [choice.whole(self._logprobs) for choice in self._choices]
        return self._envelope.whole("chat.completion", choices)

    def _chunk(
        self,
        index: int,
        delta: dict[str, Any],
        entries: Sequence[dict[str, Any]] = (),
        reason: str | None = None,
    ) -> Chunk:
        self._choices[index].fold(delta, entries, reason)
        logprobs = {"content": list(entries), "refusal": None} if entries else None
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
        return self._envelope.chunk("chat.completion.chunk", [choice])


class _ChatChoice:
    """What the deltas of a choice add up to."""

    def __init__(self, index: int):
        self.index = index
        self.content: list[str] = []
        self.tool_calls: list[dict[str, Any]] = []
        self.entries: list[dict[str, Any]] = []
        self.finish_reason: str | None = None

    def fold(
        self, delta: dict[str, Any], entries: Sequence[dict[str, Any]], reason: str | None
    ) -> None:
        if text := delta.get("content"):
            self.content.append(text)
        for call in delta.get("tool_calls") or ():
            if call["index"] == len(self.tool_calls):
                function = {"arguments": ""} | call["function"]
                self.tool_calls.append({"id": call["id"], "type": "function", "function": function})
            else:
                function = self.tool_calls[call["index"]]["function"]
                function["arguments"] += call["function"].get("arguments") or ""
        self.entries += entries
        self.finish_reason = reason or self.finish_reason

    def whole(self, logprobs: bool) -> dict[str, Any]:
        content = "".join(self.content)
        message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None}
        if self.tool_calls:
            message |= {"content": content or None, "tool_calls": self.tool_calls}
        return {
            "index": self.index,
            "message": message,
            "logprobs": {"content": self.entries, "refusal": None} if logprobs else None,
            "finish_reason": self.finish_reason,
        }


class CompletionReply:
    """The reply to a request for text completions. Arguments as those of `ChatReply`."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        body: CompletionBody,
        groups: Sequence[Sequence[Request]],
        model: str,
    ):
        self.usage = Usage(groups)
        self._envelope = Envelope("cmpl", model, body, self.usage)
        self._tokenizer, self._body = tokenizer, body
        count = len(groups) * body.n
        self._aligners = [TokenAligner(tokenizer.decode_bytes) for _ in range(count)]
        self._choices = [_TextChoice(index) for index in range(count)]

    def first(self) -> list[Chunk]:
        """No chunk comes before the first piece."""
        return []

    def piece(self, index: int, answer: Answer, piece: Piece) -> list[Chunk]:
        """The chunks of a piece of answer `index`; the first has the prompt, with `echo`."""
        self.usage.count(index, answer, piece)
        chunks = []
        choice = self._choices[index]
        if self._body.echo and not choice.begun:
            chunks.append(self._echo(index, answer))
        choice.begun = True
        lists = None
        if self._body.logprobs is not None:
            tokens = self._aligners[index].feed(piece, answer.detokenizer.stopped)
            if tokens:
                lists = completion_lists(tokens, self._tokenizer.decode_bytes, choice.echoed)
        if piece.text or lists:
            chunks.append(self._chunk(index, piece.text, lists))
        if piece.finish_reason is not None:
            reason = "length" if piece.finish_reason == "length" else "stop"
            chunks.append(self._chunk(index, "", self._stop_token(index, answer), reason))
        return chunks

    def _stop_token(self, index: int, answer: Answer) -> dict[str, list[Any]] | None:
        """With `echo`, the log-probability of the stop token, which the text lacks.

        lm-eval asks for one token, and takes all log-probabilities but the last as the prompt's.
        """
        generation, body = answer.generation, self._body
        if not body.echo or body.logprobs is None or answer.stop_token is None:
            return None
        assert generation.stop_score is not None
        length = self._choices[index].length
        token = ScoredToken(
            answer.stop_token,
            self._tokenizer.decode_bytes([answer.stop_token]),
            *generation.stop_score,
            start=length,
            end=length,
        )
        return completion_lists([token], self._tokenizer.decode_bytes)

    def end(self) -> list[Chunk]:
        """The chunks after the last piece."""
        return self._envelope.end("text_completion")

    def whole(self) -> dict[str, Any]:
        """The body of the answer without a stream."""
        choices = [choice.whole(self._body.logprobs is not None) for choice in self._choices]
        return self._envelope.whole("text_completion", choices)

    def _echo(self, index: int, answer: Answer) -> Chunk:
        """The prompt, as it was given, and the log-probabilities of its ids."""
        given = self._body.prompt[index // self._body.n]
        ids = answer.prompt
        text = given if isinstance(given, str) else self._tokenizer.decode(ids)
        self._choices[index].echoed = len(text)
        if self._body.logprobs is None:
            return self._chunk(index, text, None)
        aligner = TokenAligner(self._tokenizer.decode_bytes)
        tops = answer.generation.prompt_top_logprobs or [None] * len(ids)
        tokens = []
        for id, logprob, top in zip(ids, answer.prompt_logprobs, tops, strict=True):
            tokens.append(aligner.token(id, logprob, top))
            if isinstance(given, str) and len(tokens) == 1 and id == self._tokenizer.bos_id:
                aligner = TokenAligner(self._tokenizer.decode_bytes)  # it is not in the text
        lists = completion_lists(tokens, self._tokenizer.decode_bytes)
        return self._chunk(index, text, lists)

    def _chunk(
        self,
        index: int,
        text: str,
        logprobs: dict[str, list[Any]] | None,
        reason: str | None = None,
    ) -> Chunk:
        self._choices[index].fold(text, logprobs, reason)
        choice = {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}
        return self._envelope.chunk("text_completion", [choice])


class _TextChoice:
    """What the chunks of a choice add up to."""

    def __init__(self, index: int):
        self.index, self.begun, self.echoed = index, False, 0
        self.text: list[str] = []
        self.logprobs: dict[str, list[Any]] = {}
        self.finish_reason: str | None = None

    @property
    def length(self) -> int:
        """Characters of the text so far."""
        return sum(map(len, self.text))

    def fold(self, text: str, logprobs: dict[str, list[Any]] | None, reason: str | None) -> None:
        self.text.append(text)
        for name, values in (logprobs or {}).items():
            self.logprobs.setdefault(name, []).extend(values)
        self.finish_reason = reason or self.finish_reason

    def whole(self, logprobs: bool) -> dict[str, Any]:
        lists = {name: self.logprobs.get(name, []) for name in completion_lists([], lambda _: b"")}
        return {
            "index": self.index,
            "text": "".join(self.text),
            "logprobs": lists if logprobs else None,
            "finish_reason": self.finish_reason,
        }
