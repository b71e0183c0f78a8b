"""`Llama`: checkpoints in, text out, with the methods and return types of Meta's class.

Three tiers, each on top of the one before: `Engine.step` (ids), a `Stream` (text, piece by piece),
and the completions (whole answers).
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import inspect
import logging
import threading
import time
import warnings
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypedDict, TypeVar, cast

import torch
from typing_extensions import Unpack

from llama.checkpoints.adapted import Adapters, open_adapted
from llama.checkpoints.draft import load_draft
from llama.checkpoints.load import check_quantize, load_model, summary
from llama.checkpoints.memory import check_memory
from llama.checkpoints.open import open_tokenizer
from llama.checkpoints.source import Source
from llama.common.async_reader import read_in_thread
from llama.common.dtypes import dtype_name, parse_dtype
from llama.common.errors import refuse_copies, without_frames
from llama.common.options import option
from llama.distributed import agreement, job, tensor_parallel
from llama.distributed.device import pick_device, pick_dtype
from llama.engine.checks import check_count, check_seed
from llama.engine.compiled_step import check_cache
from llama.engine.draft import Draft
from llama.engine.engine import Engine
from llama.engine.forks import check_not_forked
from llama.engine.grammar import Grammar
from llama.engine.request import FinishReason, Generation, Request, TopLogprobs
from llama.engine.sampling import Sampling, sample_top_p
from llama.engine.scoring import Perplexity, perplexity, score_ids
from llama.engine.speculation import COSTS, Speculation
from llama.layers import cuda_ops, kernels
from llama.layers.optimize import optimize, quantize_model
from llama.layers.quantized_linear import check_scheme
from llama.layers.schemes import Scheme
from llama.model import ModelArgs, Transformer
from llama.text.detokenizer import Detokenizer, check_stop
from llama.text.grammar import json_object_grammar, json_schema_grammar, regex_grammar
from llama.text.tool_prompt import Tool, ToolForm
from llama.tokenizer import ChatFormat, Dialog, Message, Tokenizer

if TYPE_CHECKING:
    from llama.explain.trace import Trace

__all__ = [
    "BuildOptions",
    "ChatPrediction",
    "CompletionPrediction",
    "GenerationOptions",
    "Llama",
    "Piece",
    "Stream",
    "sample_top_p",
]

log = logging.getLogger("llama")
DEFAULT_CONTEXT = 4096  # most positions where max_seq_len is None


class CompletionPrediction(TypedDict, total=False):
    """`tokens` and `logprobs` are present if log-probabilities were asked for.

    `top_logprobs`, if asked for, has the most probable tokens in the place of each of `tokens`.

    `error` says what is wrong with a prompt where `finish_reason` is "error".
    """

    generation: str
    tokens: list[str]
    logprobs: list[float | None]
    top_logprobs: list[list[tuple[str, float]] | None]
    finish_reason: FinishReason
    error: str


class ChatPrediction(TypedDict, total=False):
    """As `CompletionPrediction`. The message has a `stop_reason` if it ended with `<|eom_id|>`."""

    generation: Message
    tokens: list[str]
    logprobs: list[float | None]
    top_logprobs: list[list[tuple[str, float]] | None]
    finish_reason: FinishReason
    error: str


Prediction = TypeVar("Prediction", CompletionPrediction, ChatPrediction)


class MoreBuildOptions(TypedDict, total=False):
    """What `Llama.build` takes beyond Meta's parameters; see `BuildOptions`."""

    device: str | torch.device | None
    dtype: str | torch.dtype | None
    quantize: str | None
    exact: bool
    compile: bool
    speculate: bool | None
    draft: str | Path | None
    adapter: str | Path | None
    adapters: Mapping[str, str | Path] | None


@dataclass(frozen=True)
class BuildOptions:
    """How a checkpoint is built into a `Llama`.

    Attributes:
        max_seq_len: most tokens of prompt and answer together; None: what the checkpoint was
            trained for, at most 4096.
        max_batch_size: most rows at once; more prompts take turns. The KV cache reserves
            max_batch_size x max_seq_len positions.
        model_parallel_size: ranks that share the model; None takes all. With fewer, every group of
            so many ranks (0 and 1, 2 and 3, ...) has a model and calls of its own.
        seed: of torch's global generator; each group's first rank draws for the group.
        device: None or "auto" takes cuda, then mps, then cpu.
        dtype: a torch dtype or its name ("bfloat16", "bf16"); None or "auto" takes bfloat16 where
            the device computes in it, else float16 (GPU) or float32 (CPU).
        quantize: "int8" or "int4" for the layers (an older int4 stays as stored); None: as stored.
        exact: the reference's arithmetic, bit-identical to Meta's code, instead of the fastest.
        compile: decode by a compiled step, on one rank. Without a compiler: a warning, and eager.
        speculate: propose tokens that followed the same ones earlier in the prompt or answer, and
            check several in a step: faster where an answer repeats text, with the same result.
            None: where it cannot be slower, see `speculation_of`.
        draft: a smaller checkpoint with the same vocabulary, whose model also proposes tokens.
            On one rank only.
        adapter: the folder of an adapter in PEFT's format that all requests use; None: the base.
        adapters: {name: folder} of adapters that each request chooses from; low-rank only.

    Raises:
        TypeError, ValueError: an option is of another type or out of range, or two exclude each
            other.
    """

    max_seq_len: int | None = option(
        None,
        "most tokens of prompt and answer, in a chat of the whole dialog; "
        "by default as trained, at most 4096",
    )
    max_batch_size: int = option(1, "most rows computed at once")
    model_parallel_size: int | None = option(None, "ranks that share the model; by default all")
    seed: int = option(1, "the same seed draws the same tokens")
    device: str | torch.device | None = option(
        None, "auto, cpu, cuda, cuda:1, mps, ...; by default (auto) the fastest one there is"
    )
    dtype: str | torch.dtype | None = option(
        None, "auto, bf16, fp16 or fp32; by default (auto) what suits the device"
    )
    quantize: str | None = option(
        None, "int8 or int4: keep the layers' weights in 8 or 4 bits; by default as stored"
    )
    exact: bool = option(False, "the reference's arithmetic, bit-identical to Meta's code")
    compile: bool = option(False, "decode by a compiled step")
    speculate: bool | None = option(
        None,
        "check several tokens in a step where the text repeats itself; the same result, sooner; "
        "by default on a CPU with its kernels",
    )
    draft: str | Path | None = option(
        None, "a smaller checkpoint with the same vocabulary, which proposes tokens to check"
    )
    adapter: str | Path | None = option(
        None, "the folder of an adapter of this model, as finetune and PEFT write it"
    )
    adapters: Mapping[str, str | Path] | None = option(
        None, "folders of adapters by the names that requests choose them by"
    )

    def __post_init__(self) -> None:
        check_seed(self.seed)
        size = self.model_parallel_size
        if size is not None and type(size) is not int:
            raise TypeError(f"model_parallel_size must be an integer, not {size!r}")
        if size is not None and size < 1:
            raise ValueError(f"model_parallel_size must be 1 or more, not {size}")
        if self.quantize is not None:
            check_scheme(self.quantize)
        parse_dtype(self.dtype)
        for name in ("exact", "compile"):
            if type(getattr(self, name)) is not bool:
                raise TypeError(f"{name} must be True or False, not {getattr(self, name)!r}")
        self._check_speculation()
        if self.exact and self.compile:
            raise ValueError("exact and compile: a compiled step rounds differently; choose one")
        if self.compile and job.environment().world > 1:
            raise ValueError(
                "a compiled step runs on one rank; leave compile out, or run one process"
            )
        names = self.adapters if isinstance(self.adapters, Mapping) else ()
        if self.adapters is not None and not (names and all(type(n) is str and n for n in names)):
            raise TypeError(f"adapters must be a dict of names and folders, not {self.adapters!r}")
        if self.adapter is not None and self.adapters:
            raise ValueError("adapter and adapters exclude each other: give all of them a name")
        if self.adapters and self.compile:
            raise ValueError(
                "a compiled step has the same weights for every request; leave compile out, or "
                "build with one adapter="
            )

    def _check_speculation(self) -> None:
        if self.speculate is not None and type(self.speculate) is not bool:
            raise TypeError(f"speculate must be True, False or None, not {self.speculate!r}")
        if self.draft is not None and self.speculate is False:
            raise ValueError("a draft proposes tokens, and speculate=False forbids it; choose one")
        if self.exact and (self.speculate or self.draft is not None):
            raise ValueError(
                "exact and speculate: several tokens in a step round differently; choose one"
            )
        if self.draft is not None and job.environment().world > 1:
            raise ValueError("a draft runs on one rank; leave draft out, or run one process")


class MoreOptions(TypedDict, total=False):
    """What the generating methods take beyond Meta's parameters; see `GenerationOptions`."""

    top_k: int
    min_p: float
    stop: Sequence[str]
    seed: int | Sequence[int] | None
    reuse_prefix: bool
    n: int
    presence_penalty: float
    frequency_penalty: float
    logit_bias: Mapping[int, float]
    top_logprobs: int
    grammar: Grammar | None
    time_limit: float | None
    adapter: str | None


class StreamOptions(MoreOptions, total=False):
    """Keyword arguments of a stream: those of `text_completion` but `echo`."""

    temperature: float
    top_p: float
    max_gen_len: int | None
    logprobs: bool


@dataclass(frozen=True)
class GenerationOptions:
    """What the generating methods take beyond Meta's parameters.

    Attributes:
        top_k, min_p, presence_penalty, frequency_penalty: see `Sampling`.
        stop: an answer ends before the first of these texts; `tokens` includes those of the text.
        seed: gives each row draws of its own, the same in any batch: one seed for all prompts, or
            one a prompt. None draws from torch's global generator.
        reuse_prefix: do not compute again the beginning of a prompt that is still cached from an
            earlier call. Without it a call gives the same result whatever was called before.
        n: answers to each prompt, which is computed once: rows 0 to n - 1 are those to the first
            prompt. With a seed, answer j draws with seed + j. Not for streams.
        logit_bias, top_logprobs, grammar, time_limit, adapter: see `Request`. top_logprobs needs
            logprobs.

    Raises:
        TypeError, ValueError: n is not a positive integer. Other options are checked later.
    """

    top_k: int = Sampling.top_k
    min_p: float = Sampling.min_p
    stop: Sequence[str] = ()
    seed: int | Sequence[int] | None = None
    reuse_prefix: bool = False
    n: int = 1
    presence_penalty: float = Sampling.presence_penalty
    frequency_penalty: float = Sampling.frequency_penalty
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    top_logprobs: int = 0
    grammar: Grammar | None = None
    time_limit: float | None = None
    adapter: str | None = None

    def __post_init__(self) -> None:
        if check_count("n", self.n) == 0:
            raise ValueError("n must be 1 or more, not 0")

    def sampling(self, temperature: float, top_p: float) -> Sampling:
        """These and Meta's two parameters as one."""
        names = "top_k", "min_p", "presence_penalty", "frequency_penalty"
        return Sampling(temperature, top_p, **{name: getattr(self, name) for name in names})


@dataclass
class Piece:
    """A part of an answer.

    Attributes:
        text: may be empty while a character or a possible stop string is incomplete.
        tokens: the ids generated since the last piece.
        logprobs: of `tokens`, if they were asked for.
        finish_reason: "stop", "length", "timeout" or "cancelled" in the last piece, None before.
        top_logprobs: for each of `tokens` the most probable ids in its place with their
            log-probabilities, if they were asked for.
    """

    text: str
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    top_logprobs: list[TopLogprobs] = field(default_factory=list)


class Answer:
    """A generation as text, read between the engine's steps. Ends it at a stop string.

    Attributes:
        engine: None once the answer has ended.
        text: all of it so far.
        finish_reason: as the generation's, or "stop" at a stop string.
        error: the generation's, or that of a token without text.
    """

    def __init__(self, engine: Engine, generation: Generation, detokenizer: Detokenizer):
        self.engine: Engine | None = engine
        self.generation, self.detokenizer = generation, detokenizer
        self.text = ""
        self.finish_reason: FinishReason | None = None
        self.error: Exception | None = None

    @property
    def prompt(self) -> list[int]:
        """The prompt's ids; none if the engine refused it."""
        return self.generation.tokens[: len(self.generation.request.prompt)]

    @property
    def prompt_logprobs(self) -> list[float | None]:
        return self.generation.prompt_logprobs

    @property
    def ids(self) -> list[int]:
        """The generated ids that were read, including those of a stop string."""
        return self.generation.ids[: self.detokenizer.used]

    @property
    def logprobs(self) -> list[float]:
        """The log-probability of each of `ids`."""
        return self.generation.generated_logprobs[: self.detokenizer.used]

    @property
    def top_logprobs(self) -> list[TopLogprobs]:
        """The most probable ids in the place of each of `ids`."""
        return self.generation.top_logprobs[: self.detokenizer.used]

    @property
    def stop_token(self) -> int | None:
        """The stop token that ended it; None if a stop string came first."""
        return None if self.detokenizer.stopped else self.generation.stop_token

    @property
    def unread(self) -> bool:
        """Whether `read` would return something new."""
        generation = self.generation
        start = len(generation.request.prompt) + self.detokenizer.used
        return len(generation.tokens) > start or generation.finish_reason is not None

    def read(self) -> Piece | None:
        """What is new; None after the end, or if the generation failed."""
        generation, detokenizer = self.generation, self.detokenizer
        if self.finish_reason is not None:
            return None
        reason, used = generation.finish_reason, detokenizer.used
        if generation.error is not None:
            self.finish_reason, self.error = "error", generation.error
            self.end()
            return None
        new = generation.tokens[len(generation.request.prompt) + used :]
        try:
            text = detokenizer.feed(new, last=reason is not None)
        except Exception as e:  # such as an id that the tokenizer lacks: the others go on
            self.finish_reason, self.error = "error", without_frames(e)
            self.end()
            return None
        if detokenizer.stopped:
            reason = "stop"
        self.finish_reason = reason
        if reason is not None:
            self.end(reason)
        self.text += text
        n = detokenizer.used - used
        logprobs = generation.generated_logprobs[used : used + n]
        top = generation.top_logprobs[used : used + n]
        return Piece(text, new[:n], logprobs, reason, top_logprobs=top)

    def end(self, reason: FinishReason = "cancelled") -> None:
        """Cancel the generation, unless it has ended, and let go of the engine."""
        if self.engine is not None and self.generation.id:
            self.engine.cancel(self.generation.id, reason)
        self.engine = None


class Stream:
    """An iterator over the pieces of one answer, which is generated as it is read.

    Streams of one `Llama` may run at the same time, in one thread or in several: each step of the
    engine advances all that have begun. `close` (from any thread), the end of a `with` block, or
    the last reference going away ends the generation.

    Attributes:
        request: what was asked.
        generation: what has been generated; its id is 0 until the first piece is read. Its error
            is None after it was raised.
    """

    def __init__(self, engine: Engine, tokenizer: Tokenizer, request: Request, stop: Sequence[str]):
        self._closed = True  # in case the request is refused
        engine.check(request)
        self.request, self.generation = request, Generation(request)
        detokenizer = Detokenizer(tokenizer.decode_bytes, stop)
        self._answer, self._lock = Answer(engine, self.generation, detokenizer), threading.Lock()
        self._closed = False

    __reduce_ex__ = refuse_copies

    def __iter__(self) -> Iterator[Piece]:
        return self

    def __next__(self) -> Piece:
        answer, engine = self._answer, self._answer.engine
        if engine is None:
            raise StopIteration
        try:
            with self._lock:
                if not self.generation.id and not self._closed:
                    engine.queue(self.generation)
                    if self._closed:  # by another thread, meanwhile
                        engine.cancel(self.generation.id)
            while not self._closed:
                engine.wait(lambda: answer.unread or self._closed)
                with self._lock:
                    piece = answer.read()
                    if answer.finish_reason is not None:
                        self._closed = True
                if piece is not None and (piece.tokens or piece.finish_reason):
                    return piece
                if answer.error is not None:
                    self._raise_error()
        except BaseException:
            self.close()
            raise
        raise StopIteration

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()

    def close(self) -> None:
        """End the generation, free its slot at once, and let go of the model."""
        if not self._closed:
            self._closed = True
            self._answer.end()

    def _raise_error(self) -> NoReturn:
        """Raise the answer's error, and keep no reference to it.

        Its traceback has the frames of the callers: with the stream they would be a cycle.
        """
        error, self._answer.error, self.generation.error = self._answer.error, None, None
        assert error is not None
        try:
            raise error from None
        finally:
            del error


class Llama:
    """A model and its tokenizer, ready to generate. `close`, or a `with` block, frees its memory.

    Attributes:
        model, tokenizer, engine: the parts; see their classes.
        formatter: the chat format; None if there is none, or its template cannot be used.
    """

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer,
        speculation: Speculation | None = None,
        draft: Draft | None = None,
    ):
        self.model, self.tokenizer = model, tokenizer
        self.engine = Engine(model, speculation=speculation, draft=draft)
        rows, device = model.vocab_size, model.norm.weight.device
        unused = tokenizer.pad_to(rows)
        model.unused = torch.tensor(unused, device=device) if unused else None
        self.formatter: ChatFormat | None = None
        with suppress(ValueError):  # a base model: only the chat methods are refused
            self.formatter = ChatFormat(tokenizer)

    __reduce_ex__ = refuse_copies

    @staticmethod
    def build(
        ckpt_dir: str | Path,
        tokenizer_path: str | Path | None = None,
        max_seq_len: int | None = BuildOptions.max_seq_len,
        max_batch_size: int = BuildOptions.max_batch_size,
        model_parallel_size: int | None = BuildOptions.model_parallel_size,
        seed: int = BuildOptions.seed,
        **more: Unpack[MoreBuildOptions],
    ) -> Llama:
        """Load a checkpoint. May be called any number of times in a process.

        Args:
            ckpt_dir: a folder in Meta's layout (`params.json`, `consolidated.*.pth`) or Hugging
                Face's (`config.json`, `*.safetensors`), or a GGUF file.
            tokenizer_path: the checkpoint's `tokenizer.model`; None takes the one beside or in it.
            max_seq_len, max_batch_size, model_parallel_size, seed: see `BuildOptions`.
            more: the other fields of `BuildOptions`, such as `device`, `dtype` and `adapter`.

        Raises:
            FileNotFoundError, ValueError, TypeError: saying what to do.
            llama.RankError: another rank failed, and how.
        """
        check_keywords(Llama.build, more, BuildOptions)
        options = BuildOptions(max_seq_len, max_batch_size, model_parallel_size, seed, **more)
        start, device = time.time(), pick_device(options.device)
        dtype = pick_dtype(options.dtype, device)
        prepare_process(device, options)
        with agreement.fails_on_all_ranks():
            source, adapters = open_adapted(ckpt_dir, options.adapter, options.adapters)
            args = sizes_to_build(source, options)
            check_quantize(source, args, options.quantize)
            check_memory(source, args, device, dtype, options.quantize)
            tokenizer = open_tokenizer(source, tokenizer_path)
        check_same_build(source, adapters, tokenizer, args, options, device, dtype)
        torch.manual_seed(seed)
        with agreement.fails_on_all_ranks():
            model = load_model(source, args, device, dtype)
        with tensor_parallel.ends_job_on_error():  # ranks communicate here and must not wait
            quantize_model(model, None if source.quantization else options.quantize)
            adapters.attach(model)
            optimize(model, options.exact)
        with agreement.fails_on_all_ranks():
            llama = Llama(model, tokenizer, *proposers(model, tokenizer, source, options))
        if job.is_leader():
            loaded = summary(source, model, time.time() - start, options.quantize)
            for line in (loaded, *adapters.lines(), chat_summary(llama)):
                log.info(line)
        if options.compile:
            llama.engine.compile()
        return llama

    def __repr__(self) -> str:
        if not hasattr(self, "model"):
            return "Llama(closed)"
        args, w, ranks = self.model.params, self.model.norm.weight, tensor_parallel.size()
        dtype = str(w.dtype).removeprefix("torch.")
        return (
            f"Llama(dim={args.dim}, n_layers={args.n_layers}, n_heads={args.n_heads}, "
            f"vocab_size={args.vocab_size}, max_seq_len={args.max_seq_len}, "
            f"max_batch_size={args.max_batch_size}, dtype={dtype}, device={w.device}, "
            f"ranks={ranks})"
        )

    def __enter__(self) -> Llama:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End all requests and free the weights and the KV cache. May be called again."""
        if not hasattr(self, "model"):
            return
        device = self.model.norm.weight.device
        self.engine.close()
        del self.model, self.engine
        if device.type == "cuda":
            torch.cuda.empty_cache()

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            closed = ": this Llama is closed; build another" * (name in ("model", "engine"))
            raise AttributeError(f"Llama has no attribute {name!r}{closed}")

    def generate(
        self,
        prompt_tokens: Sequence[Sequence[int]],
        max_gen_len: int,
        temperature: float = Sampling.temperature,
        top_p: float = Sampling.top_p,
        logprobs: bool = False,
        echo: bool = False,
        **more: Unpack[MoreOptions],
    ) -> tuple[list[list[int]], list[list[float | None]] | None]:
        """Generate ids for a batch of prompts of any lengths.

        A prompt that cannot be run (for example, too long) gets an empty row and a warning, and the
        others run; if none can be run, the first one's error is raised.

        Args:
            prompt_tokens: non-empty lists of ids.
            max_gen_len: most ids to generate a row; 0 generates nothing (and with `echo` and
                `logprobs` scores the prompts).
            temperature, top_p: see `Sampling`; temperature 0 is greedy.
            logprobs: also return each id's natural log-probability under the raw distribution.
            echo: return the prompt's ids too. The first has the log-probability None.
            more: see `GenerationOptions`; all but `top_logprobs`.

        Returns:
            (ids a row, log-probabilities a row or None), without the stop token.
        """
        check_keywords(self.generate, more, GenerationOptions)
        options = GenerationOptions(**more)
        if options.top_logprobs:
            raise ValueError(
                "generate does not return top_logprobs: use text_completion, a stream or the engine"
            )
        requests = self._requests(
            prompt_tokens,
            options,
            max_gen_len=max_gen_len,
            sampling=options.sampling(temperature, top_p),
            logprobs=logprobs,
            score_from=0 if logprobs and echo else None,
        )
        answers = self._run(requests, options, decode=bool(options.stop))
        ids = [[*a.prompt, *a.ids] if echo else a.ids for a in answers]
        if not logprobs:
            return ids, None
        return ids, [[*a.prompt_logprobs, *a.logprobs] for a in answers]

    def text_completion(
        self,
        prompts: Sequence[str],
        temperature: float = Sampling.temperature,
        top_p: float = Sampling.top_p,
        max_gen_len: int | None = None,
        logprobs: bool = False,
        echo: bool = False,
        **more: Unpack[MoreOptions],
    ) -> list[CompletionPrediction]:
        """Continue each text.

        Args:
            max_gen_len: None is all that fits.
            temperature, top_p, logprobs, echo, more: as in `generate`.
        """
        check_keywords(self.text_completion, more, GenerationOptions)
        options = GenerationOptions(**more)
        requests = self._requests(
            self._encode(prompts),
            options,
            max_gen_len=max_gen_len,
            sampling=options.sampling(temperature, top_p),
            logprobs=logprobs,
            score_from=0 if logprobs and echo else None,
        )
        predictions: list[CompletionPrediction] = []
        for answer in self._run(requests, options):
            prompt = self.tokenizer.decode(answer.generation.request.prompt) if echo else ""
            prediction: CompletionPrediction = {"generation": prompt + answer.text}
            predictions.append(self._finish(prediction, answer, logprobs, echo))
        return predictions

    def chat_completion(
        self,
        dialogs: Sequence[Dialog],
        temperature: float = Sampling.temperature,
        top_p: float = Sampling.top_p,
        max_gen_len: int | None = None,
        logprobs: bool = False,
        *,
        tools: Sequence[Tool] | None = None,
        tool_form: ToolForm = "json",
        **more: Unpack[MoreOptions],
    ) -> list[ChatPrediction]:
        """Answer each dialog.

        Args:
            tools, tool_form: see `ChatFormat.encode_dialog_prompt`.
            temperature, top_p, max_gen_len, logprobs, more: as in `text_completion`.
        """
        if not is_list(dialogs) or any(isinstance(dialog, Mapping) for dialog in dialogs):
            raise TypeError(
                "dialogs must be a list of dialogs, which are lists of messages; for one dialog "
                "give [dialog]"
            )
        check_keywords(self.chat_completion, more, GenerationOptions)
        options = GenerationOptions(**more)
        requests = self._requests(
            [self._chat_prompt(dialog, tools, tool_form) for dialog in dialogs],
            options,
            max_gen_len=max_gen_len,
            sampling=options.sampling(temperature, top_p),
            logprobs=logprobs,
        )
        predictions: list[ChatPrediction] = []
        for answer in self._run(requests, options):
            message: Message = {"role": "assistant", "content": answer.text}
            if answer.stop_token is not None and answer.stop_token == self.tokenizer.eom_id:
                message["stop_reason"] = "end_of_message"
            prediction: ChatPrediction = {"generation": message}
            predictions.append(self._finish(prediction, answer, logprobs))
        return predictions

    def text_stream(self, prompt: str, **options: Unpack[StreamOptions]) -> Stream:
        """An iterator of pieces, generated as it is read; their texts make up the completion.

        Args:
            options: those of `text_completion`, without `echo`. `reuse_prefix` is on by default.
        """
        return self._stream(self.tokenizer.encode(prompt, bos=True, eos=False), **options)

    def chat_stream(
        self,
        dialog: Dialog,
        tools: Sequence[Tool] | None = None,
        tool_form: ToolForm = "json",
        **options: Unpack[StreamOptions],
    ) -> Stream:
        """Answer one dialog, piece by piece. As `text_stream`."""
        return self._stream(self._chat_prompt(dialog, tools, tool_form), **options)

    def text_stream_async(
        self, prompt: str, **options: Unpack[StreamOptions]
    ) -> AsyncGenerator[Piece, None]:
        """`text_stream` for asyncio: `async for piece in llama.text_stream_async(prompt)`.

        The event loop goes on: a thread encodes the prompt and makes the steps, which all streams
        share. The end of the loop, `aclose`, or a cancelled task ends the generation and frees its
        slot. Mistakes are raised when the first piece is awaited. One rank only.
        """
        return read_in_thread(lambda: self.text_stream(prompt, **options))

    def chat_stream_async(
        self,
        dialog: Dialog,
        tools: Sequence[Tool] | None = None,
        tool_form: ToolForm = "json",
        **options: Unpack[StreamOptions],
    ) -> AsyncGenerator[Piece, None]:
        """Answer one dialog, piece by piece, for asyncio. As `text_stream_async`."""
        return read_in_thread(lambda: self.chat_stream(dialog, tools, tool_form, **options))

    def score(
        self, prompts: Sequence[str], adapter: str | None = None
    ) -> list[CompletionPrediction]:
        """Log-probability of each token of each text given those before it.

        In a text longer than max_seq_len each token sees at least half of max_seq_len before it.

        Args:
            adapter: see `Request`.

        Returns:
            what `text_completion(prompts, max_gen_len=0, logprobs=True, echo=True)` does.
        """
        rows = self._encode(prompts)
        if [] in rows:
            raise ValueError(f"prompt {rows.index([])} is empty; give at least one token")
        return [
            {
                "generation": self.tokenizer.decode(ids),
                "tokens": [self.tokenizer.decode([i]) for i in ids],
                "logprobs": score_ids(self.engine, ids, self.tokenizer.bos_id, adapter=adapter),
                "finish_reason": "length",
            }
            for ids in rows
        ]

    def perplexity(
        self, text: str, stride: int | None = None, adapter: str | None = None
    ) -> Perplexity:
        """How well the model predicts a text, in windows that advance by `stride` tokens."""
        ids = self.tokenizer.encode(text, bos=True, eos=False)
        size, bos = len(text.encode()), self.tokenizer.bos_id
        return perplexity(self.engine, ids, size, bos_id=bos, stride=stride, adapter=adapter)

    def explain(
        self,
        prompt: str | Sequence[Message] | Sequence[int],
        temperature: float = Sampling.temperature,
        top_p: float = Sampling.top_p,
        top_k: int = Sampling.top_k,
        *,
        min_p: float = Sampling.min_p,
        max_tokens: int = 256,
        adapter: str | None = None,
        name: str = "",
    ) -> Trace:
        """What the model computes for a prompt: tensors, a text (`str`) and a page (`save`).

        The model is not changed, and may generate meanwhile. On one rank only.

        Args:
            prompt: a text, as `text_completion` takes it, a dialog to answer, or ids.
            temperature, top_p, top_k, min_p: how the next token would be drawn, see `Sampling`.
            max_tokens: of a longer prompt, the first so many tokens are computed, and a warning
                is logged.
            adapter: see `Request`.
            name: of the checkpoint, which the text and the page show.
        """
        from llama.explain.compute import check_text, trace_ids

        how = Sampling(temperature, top_p, top_k, min_p)
        if isinstance(prompt, str):
            check_text(prompt)
            ids: Sequence[int] = self.tokenizer.encode(prompt, bos=True, eos=False)
        elif isinstance(prompt, Mapping) or (
            is_list(prompt) and any(isinstance(part, Mapping) for part in prompt)
        ):
            ids = self._chat_prompt(cast(Dialog, prompt), None, "json")
        else:
            ids = cast("Sequence[int]", prompt)
        return trace_ids(
            self.model,
            self.tokenizer,
            ids,
            how,
            max_tokens=max_tokens,
            adapter=adapter,
            name=name,
        )

    def json_grammar(self, schema: Mapping[str, Any] | bool | None = None) -> Grammar:
        """A `grammar=` for JSON that a JSON schema accepts; None: any JSON object.

        Compile it once and use it for any number of answers. Needs the extra `serve`.

        Raises:
            TypeError, ValueError: it is no schema, too large, or has a keyword that is not
                supported.
        """
        if schema is None:
            return json_object_grammar(self.tokenizer, self.model.vocab_size)
        return json_schema_grammar(self.tokenizer, schema, self.model.vocab_size)

    def regex_grammar(self, pattern: str) -> Grammar:
        """A `grammar=` for text that a regular expression matches as a whole, in Rust's syntax."""
        return regex_grammar(self.tokenizer, pattern, self.model.vocab_size)

    def _encode(self, prompts: Sequence[str]) -> list[list[int]]:
        if not is_list(prompts):
            raise TypeError("prompts must be a list of texts; for one text give [text]")
        return [self.tokenizer.encode(text, bos=True, eos=False) for text in prompts]

    def _chat_prompt(
        self, dialog: Dialog, tools: Sequence[Tool] | None, tool_form: ToolForm
    ) -> list[int]:
        if isinstance(dialog, Mapping):
            raise TypeError("a dialog is a list of messages; for one message give [message]")
        formatter = self.formatter or ChatFormat(self.tokenizer)  # raises, saying why there is none
        return formatter.encode_dialog_prompt(dialog, tools, tool_form)

    def _requests(
        self, prompts: Sequence[Sequence[int]], options: GenerationOptions, **fields: Any
    ) -> list[Request]:
        """Requests, n for each prompt; `fields` are those of every `Request`, and `name` of one.

        Raises:
            TypeError, ValueError: no such batch is possible.
        """
        if not is_list(prompts) or any(isinstance(prompt, int) for prompt in prompts):
            raise TypeError(
                "prompts must be a list of lists of token ids; for one prompt give [prompt]"
            )
        if not prompts:
            raise ValueError("the batch is empty; give at least one prompt")
        seeds: list[Any] = [options.seed] * len(prompts)
        if isinstance(options.seed, Sequence) and not isinstance(options.seed, (str, bytes)):
            seeds = list(options.seed)
        if len(seeds) != len(prompts):
            raise TypeError(f"seed must be one integer, or one a prompt, not {options.seed!r}")
        if options.top_logprobs and not fields["logprobs"]:
            raise ValueError("top_logprobs needs logprobs=True")
        fields |= {"stop_tokens": self.tokenizer.stop_tokens, "reuse": options.reuse_prefix}
        for name in ("logit_bias", "top_logprobs", "grammar", "time_limit", "adapter"):
            fields[name] = getattr(options, name)
        for seed in seeds:
            if seed is not None:
                check_seed(seed)
        return [
            Request(prompt, seed=one, **({"name": f"prompt {i}"} | fields))
            for i, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True))
            for one in ([None] * options.n if seed is None else range(seed, seed + options.n))
        ]

    def _run(
        self, requests: Sequence[Request], options: GenerationOptions, decode: bool = True
    ) -> list[Answer]:
        """Run to the end. Failed requests give a warning each; if all fail, the first error.

        Args:
            decode: False where only ids are wanted; the tokenizer may then lack some of them.
        """
        stop = options.stop
        check_stop(stop)
        decode_bytes = self.tokenizer.decode_bytes if decode else lambda ids: b""
        answers: list[Answer] = []

        def read(generations: Sequence[Generation]) -> None:
            for generation in generations[len(answers) :]:
                answers.append(Answer(self.engine, generation, Detokenizer(decode_bytes, stop)))
            for answer in answers:
                answer.read()

        read(self.engine.run(requests, read, options.n))
        errors = [answer.error for answer in answers if answer.error is not None]
        if len(errors) == len(requests):
            first = errors[0]
            try:
                raise first
            finally:  # no cycle of traceback, frame and error, which would keep the memory
                del first, errors, answers
        for error in errors if tensor_parallel.rank() == 0 else ():
            warnings.warn(str(error), stacklevel=3)
        return answers

    def _finish(
        self, prediction: Prediction, answer: Answer, logprobs: bool, echo: bool = False
    ) -> Prediction:
        """Add to a prediction the fields that texts and dialogs have in common."""
        prediction["finish_reason"] = answer.finish_reason or "length"
        if answer.error is not None:
            prediction["error"] = str(answer.error)
        elif logprobs:
            tokens = [*answer.prompt, *answer.ids] if echo else answer.ids
            prediction["tokens"] = [self.tokenizer.decode([t]) for t in tokens]
            prediction["logprobs"] = [*answer.prompt_logprobs, *answer.logprobs]
            if answer.generation.request.top_logprobs:
                top = [*answer.generation.prompt_top_logprobs, *answer.top_logprobs]
                prediction["top_logprobs"] = [
                    None if one is None else [(self.tokenizer.decode([t]), x) for t, x in one]
                    for one in top
                ]
        return prediction

    def _stream(
        self,
        prompt: list[int],
        temperature: float = Sampling.temperature,
        top_p: float = Sampling.top_p,
        max_gen_len: int | None = None,
        logprobs: bool = False,
        **more: Unpack[MoreOptions],
    ) -> Stream:
        """Check the arguments now, generate when iterated."""
        check_keywords(self._stream, more, GenerationOptions)
        options = dataclasses.replace(GenerationOptions(reuse_prefix=True), **more)
        if options.n != 1:
            raise ValueError("n is not for streams: a stream is one answer; begin n streams")
        [request] = self._requests(
            [prompt],
            options,
            max_gen_len=max_gen_len,
            sampling=options.sampling(temperature, top_p),
            logprobs=logprobs,
            name="the prompt",
        )
        return Stream(self.engine, self.tokenizer, request, options.stop)


def is_list(value: object) -> bool:
    """Whether it is a list or another sequence, and no text."""
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes))


def check_keywords(method: Callable[..., Any], given: Iterable[str], options: type) -> None:
    """Raise a TypeError for a keyword that neither `method` nor a dataclass of options has."""
    own = [name for name in inspect.signature(method).parameters if name not in ("self", "more")]
    known = {*own, *(f.name for f in dataclasses.fields(options))}
    for name in given:
        if name not in known:
            close = difflib.get_close_matches(name, known, 1)
            hint = f"did you mean {close[0]!r}?" if close else f"use some of {sorted(known)}"
            raise TypeError(f"unknown argument {name!r}; {hint}")


def prepare_process(device: torch.device, options: BuildOptions) -> None:
    """What a process does before it opens a checkpoint; several ranks meet here."""
    check_cache()
    check_not_forked(device)
    if device.type == "cpu" and not options.exact and job.environment().world > 1:
        kernels.load()  # compiling, once for all, may take longer than ranks wait in a step
    if device.type == "cuda":
        cuda_ops.load()
    tensor_parallel.initialize(options.model_parallel_size, device)


def sizes_to_build(source: Source, options: BuildOptions) -> ModelArgs:
    """The sizes of a checkpoint's model and of its KV cache."""
    max_seq_len = options.max_seq_len
    if max_seq_len is None:
        max_seq_len = min(source.context, DEFAULT_CONTEXT)
    return source.args(max_seq_len=max_seq_len, max_batch_size=options.max_batch_size)


def check_same_build(
    source: Source,
    adapters: Adapters,
    tokenizer: Tokenizer,
    args: ModelArgs,
    options: BuildOptions,
    device: torch.device,
    dtype: torch.dtype,
) -> None:
    """Raise a ValueError on every rank if the ranks build different models."""
    if tensor_parallel.size() == 1:
        return
    fields: dict[str, Any] = {
        "max_seq_len": args.max_seq_len,
        "max_batch_size": args.max_batch_size,
    }
    fields |= {"device": device.type, "dtype": str(dtype), "quantize": options.quantize}
    fields |= {
        "exact": options.exact,
        "speculate": options.speculate,
        "the tokenizer": fingerprint(tokenizer),
    }
    agreement.check_same_on_ranks(fields | source.fingerprints() | adapters.fingerprints())


def proposers(
    model: Transformer, tokenizer: Tokenizer, source: Source, options: BuildOptions
) -> tuple[Speculation | None, Draft | None]:
    """What `Llama` takes beside model and tokenizer."""
    speculation = speculation_of(model, source.quantization, options)
    return speculation, build_draft(options.draft, model, tokenizer)


def speculation_of(
    model: Transformer, stored: Scheme | None, options: BuildOptions
) -> Speculation | None:
    """How a model speculates.

    By default where it cannot be slower: with the CPU kernels, for which the costs were measured.

    Args:
        stored: the checkpoint's quantization.
    """
    w = model.norm.weight
    kind = stored.name if stored else options.quantize or dtype_name(w.dtype)
    wanted = options.speculate
    if wanted is None and not options.exact and not options.compile:  # kernels may be compiled
        measured = w.device.type == "cpu" and kind in COSTS and kernels.load()
        wanted = all(tensor_parallel.gather_json(measured))
    if not wanted and options.draft is None:
        return None
    if w.device.type != "cpu":
        kind = "compiled" if options.compile else "gpu"
    return Speculation(costs=COSTS.get(kind, COSTS["float32"]))


def build_draft(path: str | Path | None, model: Transformer, tokenizer: Tokenizer) -> Draft | None:
    """The draft model of a checkpoint, on the device and in the dtype of `model`; None for None.

    Raises:
        FileNotFoundError, ValueError: as `Llama.build`, or see `load_draft`.
    """
    if path is None:
        return None
    room, w = model.params.max_seq_len, model.norm.weight
    rows = Speculation.rows
    small = load_draft(path, tokenizer, rows=rows, room=room, device=w.device, dtype=w.dtype)
    optimize(small)
    cost = weight_bytes(small) / weight_bytes(model)
    draft = Draft(small, rows, room, model.vocab_size, cost)
    cache = sum(layer.k.nbytes + layer.v.nbytes for layer in draft.cache)
    log.info(
        "Draft %s: %.2f GB of weights, %.2f GB of KV cache; a step costs %.0f %% of the model's",
        path, weight_bytes(small) / 1e9, cache / 1e9, 100 * cost,
    )  # fmt: skip
    return draft


def weight_bytes(model: Transformer) -> int:
    """Bytes of this rank's weights; tied ones count once."""
    return sum({w.data_ptr(): w.nbytes for w in model.state_dict().values()}.values())


def chat_summary(llama: Llama) -> str:
    """One line about the chat format."""
    try:
        return f"Chat format: {(llama.formatter or ChatFormat(llama.tokenizer)).description}"
    except ValueError as e:
        return f"Chat format: none ({e})"


def fingerprint(tokenizer: Tokenizer) -> str:
    """A short text that is the same for equal vocabularies only."""
    digest = hashlib.sha256(b"\n".join(tokenizer.ranks))
    digest.update(repr(sorted(tokenizer.special_tokens.items())).encode())
    flags = tokenizer.text_tokens.flags, tokenizer.token_flags
    digest.update(repr((tokenizer.stop_tokens, flags)).encode())
    digest.update(repr(sorted(tokenizer.chat_templates.items())).encode())
    return digest.hexdigest()[:8]
