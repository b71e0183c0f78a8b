"""`Llama`: checkpoints in, text out, with the methods and return types of Meta's class."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypedDict

import torch

from llama import checkpoint, engine, parallel
from llama.formats import open_checkpoint, open_tokenizer
from llama.model import Transformer
from llama.pieces import Piece, RowText, check_stop
from llama.sampling import Sampling, sample_top_p
from llama.tokenizer import ChatFormat, Dialog, Message, Tokenizer

__all__ = ["ChatPrediction", "CompletionPrediction", "Llama", "Piece", "Sampling", "sample_top_p"]


class CompletionPrediction(TypedDict, total=False):
    """`tokens` and `logprobs` are there when log-probabilities were asked for."""

    generation: str
    tokens: list[str]
    logprobs: list[float | None]
    finish_reason: engine.FinishReason


class ChatPrediction(TypedDict, total=False):
    """`tokens` and `logprobs` are there when log-probabilities were asked for."""

    generation: Message
    tokens: list[str]
    logprobs: list[float | None]
    finish_reason: engine.FinishReason


class Llama:
    """A model and its tokenizer, ready to generate."""

    @staticmethod
    def build(
        ckpt_dir: str | Path,
        tokenizer_path: str | Path | None,
        max_seq_len: int,
        max_batch_size: int,
        model_parallel_size: int | None = None,
        seed: int = 1,
        *,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> Llama:
        """Load a checkpoint. May be called any number of times in a process.

        Args:
            ckpt_dir: a folder in Meta's layout (`params.json`, `consolidated.*.pth`) or Hugging
                Face's (`config.json`, `*.safetensors`), or a GGUF file.
            tokenizer_path: the checkpoint's `tokenizer.model`; None takes the one beside or in it.
            max_seq_len: most tokens a row may have, prompt and answer together.
            max_batch_size: most rows at once. The KV cache reserves
                max_batch_size x max_seq_len positions.
            model_parallel_size: ranks that share the model; None takes all that run.
            seed: of torch's global generator, on every rank.
            device: None picks cuda, then mps, then cpu.
            dtype: None picks bfloat16 where the device computes in it, else float16 or float32.

        Raises:
            FileNotFoundError, ValueError, TypeError: saying what to mend.
        """
        start = time.time()
        if type(seed) is not int or not -(2**63) <= seed < 2**64:
            raise TypeError(f"seed must be an integer of 64 bits, not {seed!r}")
        if model_parallel_size is not None and type(model_parallel_size) is not int:
            raise TypeError(f"model_parallel_size must be an integer, not {model_parallel_size!r}")
        source = open_checkpoint(ckpt_dir)
        args = source.args(max_seq_len=max_seq_len, max_batch_size=max_batch_size)
        tokenizer = open_tokenizer(source, tokenizer_path)
        device = checkpoint.pick_device(device)
        dtype = checkpoint.pick_dtype(dtype, device)
        parallel.initialize(model_parallel_size, device)
        torch.manual_seed(seed)
        model = checkpoint.load(source, args, device, dtype)
        model.setup_cache(max_batch_size, max_seq_len)
        if parallel.rank() == 0:
            print(checkpoint.summary(source, model, time.time() - start), file=sys.stderr)
        return Llama(model, tokenizer)

    def __init__(self, model: Transformer, tokenizer: Tokenizer):
        self.model = model
        self.tokenizer = tokenizer
        self._in_use = threading.Lock()
        self.formatter: ChatFormat | None
        try:
            self.formatter = ChatFormat(tokenizer)
        except ValueError:  # a base model's vocabulary: chat_completion alone is refused
            self.formatter = None

    def generate(
        self,
        prompt_tokens: Sequence[Sequence[int]],
        max_gen_len: int,
        temperature: float = 0.6,
        top_p: float = 0.9,
        logprobs: bool = False,
        echo: bool = False,
        *,
        top_k: int = 0,
        min_p: float = 0.0,
        seed: int | Sequence[int] | None = None,
    ) -> tuple[list[list[int]], list[list[float | None]] | None]:
        """Generate ids for a batch of prompts of any lengths.

        Args:
            prompt_tokens: non-empty lists of ids.
            max_gen_len: most ids to generate a row; 0 generates nothing (and with `echo` and
                `logprobs` scores the prompts).
            temperature, top_p, top_k, min_p: see `Sampling`; temperature 0 is greedy.
            logprobs: also return each id's natural log-probability under the raw distribution.
            echo: return the prompt's ids too. The first has the log-probability None.
            seed: gives each row draws of its own, the same in any batch: one seed for all rows,
                or one a row. None draws from torch's global generator.

        Returns:
            (ids a row, log-probabilities a row or None), without the stop token.
        """
        how = Sampling(temperature, top_p, top_k, min_p)
        rows = engine.make_rows(prompt_tokens, max_gen_len, self.model, seed)
        for _ in self._run(rows, how, logprobs, logprobs and echo):
            pass
        ids = [row.prompt + row.ids if echo else row.ids for row in rows]
        if not logprobs:
            return ids, None
        return ids, [[*row.prompt_logprobs, *row.logprobs] for row in rows]

    def text_completion(
        self,
        prompts: Sequence[str],
        temperature: float = 0.6,
        top_p: float = 0.9,
        max_gen_len: int | None = None,
        logprobs: bool = False,
        echo: bool = False,
        *,
        stop: Sequence[str] = (),
        top_k: int = 0,
        min_p: float = 0.0,
        seed: int | Sequence[int] | None = None,
    ) -> list[CompletionPrediction]:
        """Continue each text. Arguments as in `generate`, and

        Args:
            max_gen_len: None is all that fits.
            stop: an answer ends before the first of these texts; `tokens` still holds theirs.
        """
        if isinstance(prompts, str) or not isinstance(prompts, Sequence):
            raise TypeError("prompts must be a list of texts; for one text give [text]")
        how = Sampling(temperature, top_p, top_k, min_p)
        ids = [self.tokenizer.encode(text, bos=True, eos=False) for text in prompts]
        rows = engine.make_rows(ids, self._most(max_gen_len), self.model, seed)
        texts = self._texts(rows, how, logprobs, logprobs and echo, stop)
        predictions: list[CompletionPrediction] = []
        for row, text in zip(rows, texts, strict=True):
            prompt = self.tokenizer.decode(row.prompt) if echo else ""
            prediction: CompletionPrediction = {
                "generation": prompt + text,
                "finish_reason": row.finish_reason or "length",
            }
            if logprobs:
                tokens = row.prompt + row.ids if echo else row.ids
                prediction["tokens"] = [self.tokenizer.decode([t]) for t in tokens]
                prediction["logprobs"] = [*row.prompt_logprobs, *row.logprobs]
            predictions.append(prediction)
        return predictions

    def chat_completion(
        self,
        dialogs: Sequence[Dialog],
        temperature: float = 0.6,
        top_p: float = 0.9,
        max_gen_len: int | None = None,
        logprobs: bool = False,
        *,
        stop: Sequence[str] = (),
        top_k: int = 0,
        min_p: float = 0.0,
        seed: int | Sequence[int] | None = None,
    ) -> list[ChatPrediction]:
        """Answer each dialog. Arguments as in `text_completion`."""
        if isinstance(dialogs, str) or not isinstance(dialogs, Sequence):
            raise TypeError(f"dialogs must be a list of dialogs, not {type(dialogs)}")
        how = Sampling(temperature, top_p, top_k, min_p)
        ids = [self._chat_prompt(dialog) for dialog in dialogs]
        rows = engine.make_rows(ids, self._most(max_gen_len), self.model, seed)
        predictions: list[ChatPrediction] = []
        for row, text in zip(rows, self._texts(rows, how, logprobs, False, stop), strict=True):
            prediction: ChatPrediction = {
                "generation": {"role": "assistant", "content": text},
                "finish_reason": row.finish_reason or "length",
            }
            if logprobs:
                prediction["tokens"] = [self.tokenizer.decode([t]) for t in row.ids]
                prediction["logprobs"] = [*row.logprobs]
            predictions.append(prediction)
        return predictions

    def text_stream(self, prompt: str, **options: Any) -> Iterator[Piece]:
        """Continue one text, piece by piece, as it is generated.

        Args:
            options: those of `text_completion`, without `echo`.

        Yields:
            pieces whose texts together are the completion. Closing the iterator ends generation.
        """
        return self._pieces(self.tokenizer.encode(prompt, bos=True, eos=False), **options)

    def chat_stream(self, dialog: Dialog, **options: Any) -> Iterator[Piece]:
        """Answer one dialog, piece by piece. As `text_stream`."""
        return self._pieces(self._chat_prompt(dialog), **options)

    def _chat_prompt(self, dialog: Dialog) -> list[int]:
        formatter = self.formatter or ChatFormat(self.tokenizer)  # which says why there is none
        return formatter.encode_dialog_prompt(dialog)

    def _most(self, max_gen_len: int | None) -> int:
        return self.model.params.max_seq_len - 1 if max_gen_len is None else max_gen_len

    def _run(
        self, rows: list[engine.Row], how: Sampling, logprobs: bool, score_prompts: bool
    ) -> Iterator[list[engine.Row]]:
        """The engine's steps, one caller at a time: there is one KV cache."""
        if not self._in_use.acquire(blocking=False):
            raise RuntimeError(
                "this Llama is generating already; finish or close that stream, or build another"
            )
        try:
            stop_tokens = set(self.tokenizer.stop_tokens)
            yield from engine.stream(self.model, rows, stop_tokens, how, logprobs, score_prompts)
        finally:
            self._in_use.release()

    def _texts(
        self,
        rows: list[engine.Row],
        how: Sampling,
        logprobs: bool,
        score_prompts: bool,
        stop: Sequence[str],
    ) -> list[str]:
        """Run to the end; the text of each row."""
        readers = {id(row): RowText(row, self.tokenizer, check_stop(stop)) for row in rows}
        texts = dict.fromkeys(readers, "")
        for active in self._run(rows, how, logprobs, score_prompts):
            for row in active:
                texts[id(row)] += readers[id(row)].read().text
        return list(texts.values())

    def _pieces(
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
    ) -> Iterator[Piece]:
        """Check at once, generate when iterated."""
        how = Sampling(temperature, top_p, top_k, min_p)
        rows = engine.make_rows([prompt], self._most(max_gen_len), self.model, seed)
        reader = RowText(rows[0], self.tokenizer, check_stop(stop))

        def pieces() -> Iterator[Piece]:
            if rows[0].finish_reason is not None:  # no room, or nothing asked for
                yield reader.read()
            for _ in self._run(rows, how, logprobs, False):
                yield reader.read()

        return pieces()
