"""A model and its tokenizer: text by the piece, and log-probabilities of given texts."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from llama.engine.engine import Engine
from llama.engine.request import Request
from llama.engine.sampling import Sampling
from llama.engine.scoring import Perplexity, perplexity, score_ids
from llama.model import Transformer
from llama.pieces import Reader, Stream
from llama.predictions import CompletionPrediction, scored
from llama.text.tool_prompt import Tool, ToolForm
from llama.tokenizer import ChatFormat, Dialog, Tokenizer


class Streaming:
    """What `Llama` can do beside Meta's methods."""

    def __init__(self, model: Transformer, tokenizer: Tokenizer):
        self.model, self.tokenizer, self.engine = model, tokenizer, Engine(model)
        self.formatter: ChatFormat | None = None
        with suppress(ValueError):  # a base model's vocabulary: chat_completion alone is refused
            self.formatter = ChatFormat(tokenizer)

    def text_stream(self, prompt: str, **options: Any) -> Stream:
        """An iterator of pieces, generated as it is read; their texts are the completion.

        Args:
            options: those of `text_completion`, without `echo`; `reuse_prefix` is on.
        """
        return self._stream(self.tokenizer.encode(prompt, bos=True, eos=False), **options)

    def chat_stream(
        self,
        dialog: Dialog,
        tools: Sequence[Tool] | None = None,
        tool_form: ToolForm = "json",
        **options: Any,
    ) -> Stream:
        """Answer one dialog, piece by piece. As `text_stream`."""
        return self._stream(self._chat_prompt(dialog, tools, tool_form), **options)

    def score(self, prompts: Sequence[str]) -> list[CompletionPrediction]:
        """Log-probability of each token of each text given those before it.

        Of a text longer than max_seq_len each token sees at least half of max_seq_len before it.

        Returns:
            what `text_completion(prompts, max_gen_len=0, logprobs=True, echo=True)` does.
        """
        ids = self._encode(prompts)
        if [] in ids:
            raise ValueError(f"prompt {ids.index([])} is empty; give at least one token")
        bos_id = self.tokenizer.bos_id
        return [scored(row, score_ids(self.engine, row, bos_id), self.tokenizer) for row in ids]

    def perplexity(self, text: str, stride: int | None = None) -> Perplexity:
        """How well the model predicts a text, in windows that move on by `stride` tokens."""
        ids = self.tokenizer.encode(text, bos=True, eos=False)
        return perplexity(self.engine, ids, len(text.encode()), self.tokenizer.bos_id, stride)

    def _encode(self, prompts: Sequence[str]) -> list[list[int]]:
        if isinstance(prompts, str) or not isinstance(prompts, Sequence):
            raise TypeError("prompts must be a list of texts; for one text give [text]")
        return [self.tokenizer.encode(text, bos=True, eos=False) for text in prompts]

    def _chat_prompt(
        self, dialog: Dialog, tools: Sequence[Tool] | None, tool_form: ToolForm
    ) -> list[int]:
        formatter = self.formatter or ChatFormat(self.tokenizer)  # which says why there is none
        return formatter.encode_dialog_prompt(dialog, tools, tool_form)

    def _stream(
        self,
        prompt: list[int],
        temperature: float = 0.6,
        top_p: float = 0.9,
        max_gen_len: int | None = None,
        logprobs: bool = False,
        *,
        stop: Sequence[str] = (),
        top_k: int = 0,
        min_p: float = 0.0,
        seed: int | None = None,
        reuse_prefix: bool = True,
    ) -> Stream:
        """Check at once, generate when iterated."""
        how = Sampling(temperature, top_p, top_k, min_p)
        stop_tokens = self.tokenizer.stop_tokens
        request = Request(prompt, max_gen_len, how, seed, stop_tokens, logprobs, reuse=reuse_prefix)
        return Stream(self.engine, request, Reader(request, self.tokenizer, stop))
