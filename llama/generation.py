"""`Llama`: checkpoints in, text out, with the methods and return types of Meta's class."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from llama.engine.request import Request
from llama.engine.sampling import Sampling, sample_top_p
from llama.opening import open_model
from llama.pieces import Piece, Reader
from llama.predictions import ChatPrediction, CompletionPrediction, finish, make_requests, run
from llama.streaming import Streaming
from llama.text.tool_prompt import Tool, ToolForm
from llama.tokenizer import Dialog, Message

__all__ = ["ChatPrediction", "CompletionPrediction", "Llama", "Piece", "sample_top_p"]


class Llama(Streaming):
    """A model and its tokenizer, ready to generate."""

    @staticmethod
    def build(
        ckpt_dir: str | Path,
        tokenizer_path: str | Path | None,
        max_seq_len: int | None,
        max_batch_size: int,
        model_parallel_size: int | None = None,
        seed: int = 1,
        *,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        quantize: str | None = None,
        exact: bool = False,
        compile: bool = False,
    ) -> Llama:
        """Load a checkpoint. May be called any number of times in a process.

        Args:
            ckpt_dir: a folder in Meta's layout (`params.json`, `consolidated.*.pth`) or Hugging
                Face's (`config.json`, `*.safetensors`), or a GGUF file.
            tokenizer_path: the checkpoint's `tokenizer.model`; None takes the one beside or in it.
            max_seq_len: most tokens of prompt and answer together; None: as trained, at most 4096.
            max_batch_size: most rows at once; more prompts take turns. The KV cache reserves
                max_batch_size x max_seq_len positions.
            model_parallel_size: ranks that share the model; None takes all that run. Fewer make
                groups of so many (0 and 1, 2 and 3, ...), each with a model and calls of its own.
            seed: of torch's global generator; each group's first rank draws for all of it.
            device: None picks cuda, then mps, then cpu.
            dtype: None picks bfloat16 where the device computes in it, else float16 or float32.
            quantize: "int8" or "int4" (groups of 32, or as stored) for the layers; None: as stored.
            exact: the reference's arithmetic, digit for digit, instead of what is fastest.
            compile: decode by a compiled step, on one rank; without a compiler warn and do without.

        Raises:
            FileNotFoundError, ValueError, TypeError: saying what to mend.
            llama.launch.RankError: another rank failed, and how.
        """
        opened = open_model(
            ckpt_dir,
            tokenizer_path,
            max_seq_len,
            max_batch_size,
            model_parallel_size,
            seed,
            device,
            dtype,
            quantize,
            exact,
            compile,
        )
        return Llama(*opened)

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
        reuse_prefix: bool = False,
    ) -> tuple[list[list[int]], list[list[float | None]] | None]:
        """Generate ids for a batch of prompts of any lengths.

        A prompt that cannot be run (say, too long) gets an empty row and a warning, and the others
        run; if none can be run, its error is raised.

        Args:
            prompt_tokens: non-empty lists of ids.
            max_gen_len: most ids to generate a row; 0 generates nothing (and with `echo` and
                `logprobs` scores the prompts).
            temperature, top_p, top_k, min_p: see `Sampling`; temperature 0 is greedy.
            logprobs: also return each id's natural log-probability under the raw distribution.
            echo: return the prompt's ids too. The first has the log-probability None.
            seed: gives each row draws of its own, the same in any batch: one seed for all rows,
                or one a row. None draws from torch's global generator.
            reuse_prefix: do not compute again the beginning of a prompt that is still cached from
                an earlier call. Off, a call gives the same digits whatever was called before.

        Returns:
            (ids a row, log-probabilities a row or None), without the stop token.
        """
        requests = make_requests(
            prompt_tokens,
            seed,
            stop_tokens=self.tokenizer.stop_tokens,
            max_gen_len=max_gen_len,
            sampling=Sampling(temperature, top_p, top_k, min_p),
            logprobs=logprobs,
            score_from=0 if logprobs and echo else None,
            reuse=reuse_prefix,
        )
        run(self.engine, requests, stacklevel=3)
        ids = [r.tokens if echo else r.ids for r in requests]
        if not logprobs:
            return ids, None
        return ids, [[*r.prompt_logprobs, *r.generated_logprobs] for r in requests]

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
        reuse_prefix: bool = False,
    ) -> list[CompletionPrediction]:
        """Continue each text. Arguments as in `generate`, and

        Args:
            max_gen_len: None is all that fits.
            stop: an answer ends before the first of these texts; `tokens` still holds theirs.
        """
        requests = make_requests(
            self._encode(prompts),
            seed,
            stop_tokens=self.tokenizer.stop_tokens,
            max_gen_len=max_gen_len,
            sampling=Sampling(temperature, top_p, top_k, min_p),
            logprobs=logprobs,
            score_from=0 if logprobs and echo else None,
            reuse=reuse_prefix,
        )
        predictions: list[CompletionPrediction] = []
        for request, text in zip(requests, self._texts(requests, stop), strict=True):
            prompt = self.tokenizer.decode(request.prompt) if echo else ""
            prediction: CompletionPrediction = {"generation": prompt + text}
            predictions.append(finish(prediction, request, self.tokenizer, logprobs, echo))
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
        reuse_prefix: bool = False,
        tools: Sequence[Tool] | None = None,
        tool_form: ToolForm = "json",
    ) -> list[ChatPrediction]:
        """Answer each dialog. Arguments as in `text_completion`, and

        Args:
            tools, tool_form: see `ChatFormat.encode_dialog_prompt`.
        """
        if isinstance(dialogs, str) or not isinstance(dialogs, Sequence):
            raise TypeError(f"dialogs must be a list of dialogs, not {type(dialogs)}")
        requests = make_requests(
            [self._chat_prompt(dialog, tools, tool_form) for dialog in dialogs],
            seed,
            stop_tokens=self.tokenizer.stop_tokens,
            max_gen_len=max_gen_len,
            sampling=Sampling(temperature, top_p, top_k, min_p),
            logprobs=logprobs,
            reuse=reuse_prefix,
        )
        predictions: list[ChatPrediction] = []
        for request, text in zip(requests, self._texts(requests, stop), strict=True):
            message: Message = {"role": "assistant", "content": text}
            if request.stop_token is not None and request.stop_token == self.tokenizer.eom_id:
                message["stop_reason"] = "end_of_message"
            prediction: ChatPrediction = {"generation": message}
            predictions.append(finish(prediction, request, self.tokenizer, logprobs))
        return predictions

    def _texts(self, requests: Sequence[Request], stop: Sequence[str]) -> list[str]:
        """Run to the end; the text of each answer."""
        readers = [Reader(request, self.tokenizer, stop) for request in requests]
        run(self.engine, requests)
        return [reader.text() for reader in readers]
