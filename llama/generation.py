"""`Llama`: checkpoints in, text out, with the methods and return types of Meta's class."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from numbers import Integral
from pathlib import Path
from typing import TypedDict

import torch

from llama import checkpoint, engine, parallel
from llama.formats import open_checkpoint, open_tokenizer
from llama.model import Transformer
from llama.sampling import sample_top_p
from llama.tokenizer import ChatFormat, Dialog, Message, Tokenizer

__all__ = ["ChatPrediction", "CompletionPrediction", "Llama", "sample_top_p"]


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
    ) -> tuple[list[list[int]], list[list[float | None]] | None]:
        """Generate ids for a batch of prompts of any lengths.

        Args:
            prompt_tokens: non-empty lists of ids.
            max_gen_len: most ids to generate a row; 0 generates nothing (and with `echo` and
                `logprobs` scores the prompts).
            temperature: 0 is greedy.
            top_p: mass of the nucleus, in [0, 1].
            logprobs: also return each id's natural log-probability under the raw distribution.
            echo: return the prompt's ids too. The first has the log-probability None.

        Returns:
            (ids a row, log-probabilities a row or None), without the stop token.
        """
        rows = self._rows(prompt_tokens, max_gen_len, temperature, top_p, logprobs, echo)
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
    ) -> list[CompletionPrediction]:
        """Continue each text. Arguments as in `generate`; max_gen_len None is all that fits."""
        if isinstance(prompts, str) or not isinstance(prompts, Sequence):
            raise TypeError("prompts must be a list of texts; for one text give [text]")
        ids = [self.tokenizer.encode(text, bos=True, eos=False) for text in prompts]
        rows = self._rows(ids, max_gen_len, temperature, top_p, logprobs, echo)
        predictions: list[CompletionPrediction] = []
        for row in rows:
            tokens = row.prompt + row.ids if echo else row.ids
            prediction: CompletionPrediction = {
                "generation": self.tokenizer.decode(tokens),
                "finish_reason": row.finish_reason,
            }
            if logprobs:
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
    ) -> list[ChatPrediction]:
        """Answer each dialog. Arguments as in `generate`; max_gen_len None is all that fits."""
        if not isinstance(dialogs, Sequence):
            raise TypeError(f"dialogs must be a list of dialogs, not {type(dialogs)}")
        formatter = self.formatter or ChatFormat(self.tokenizer)
        ids = [formatter.encode_dialog_prompt(dialog) for dialog in dialogs]
        rows = self._rows(ids, max_gen_len, temperature, top_p, logprobs, echo=False)
        predictions: list[ChatPrediction] = []
        for row in rows:
            prediction: ChatPrediction = {
                "generation": {"role": "assistant", "content": self.tokenizer.decode(row.ids)},
                "finish_reason": row.finish_reason,
            }
            if logprobs:
                prediction["tokens"] = [self.tokenizer.decode([t]) for t in row.ids]
                prediction["logprobs"] = [*row.logprobs]
            predictions.append(prediction)
        return predictions

    def _rows(
        self,
        prompts: Sequence[Sequence[int]],
        max_gen_len: int | None,
        temperature: float,
        top_p: float,
        logprobs: bool,
        echo: bool,
    ) -> list[engine.Row]:
        """Check everything a caller can get wrong, then generate."""
        if max_gen_len is None:
            max_gen_len = self.model.params.max_seq_len - 1
        check_sampling(max_gen_len, temperature, top_p)
        self._check_prompts(prompts)
        return engine.generate(
            self.model,
            prompts,
            max_gen_len,
            set(self.tokenizer.stop_tokens),
            temperature=temperature,
            top_p=top_p,
            logprobs=logprobs,
            score_prompts=logprobs and echo,
        )

    def _check_prompts(self, prompts: Sequence[Sequence[int]]) -> None:
        params = self.model.params
        if not isinstance(prompts, Sequence):
            raise TypeError(f"prompts must be a list of lists of token ids, not {type(prompts)}")
        if not prompts:
            raise ValueError("the batch is empty; give at least one prompt")
        if len(prompts) > params.max_batch_size:
            raise ValueError(
                f"{len(prompts)} prompts are more than max_batch_size {params.max_batch_size}; "
                "build with more, or send them in several batches"
            )
        for i, prompt in enumerate(prompts):
            if isinstance(prompt, (str, bytes)) or not isinstance(prompt, Sequence):
                raise TypeError(f"prompt {i} must be a list of token ids, not {type(prompt)}")
            if not prompt:
                raise ValueError(f"prompt {i} is empty; give at least one token")
            if len(prompt) > params.max_seq_len:
                raise ValueError(
                    f"prompt {i} has {len(prompt)} tokens, more than max_seq_len "
                    f"{params.max_seq_len}; shorten it or build with more"
                )
            for token in prompt:
                if not isinstance(token, Integral) or isinstance(token, bool):
                    raise TypeError(f"prompt {i} holds {token!r}, which is not a token id")
                if not 0 <= token < params.vocab_size:
                    raise ValueError(
                        f"prompt {i} holds the token id {token}; ids are 0 to "
                        f"{params.vocab_size - 1}"
                    )


def check_sampling(max_gen_len: int, temperature: float, top_p: float) -> None:
    """Raise a TypeError or ValueError for what cannot be sampled with."""
    if type(max_gen_len) is not int:
        raise TypeError(f"max_gen_len must be an integer, not {max_gen_len!r}")
    if max_gen_len < 0:
        raise ValueError(f"max_gen_len must be 0 or more, not {max_gen_len}")
    for name, value in (("temperature", temperature), ("top_p", top_p)):
        if not isinstance(value, (int, float)) or isinstance(value, bool):
            raise TypeError(f"{name} must be a number, not {value!r}")
    if not 0 <= temperature < float("inf"):
        raise ValueError(f"temperature must be 0 or more, not {temperature}")
    if not 0 <= top_p <= 1:
        raise ValueError(f"top_p must lie between 0 and 1, not {top_p}")
