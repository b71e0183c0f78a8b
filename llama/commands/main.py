"""`llama3 VERB`: parses and dispatches. Imports what a verb needs when it runs."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from llama.commands.checkpoints import CheckpointCommands
from llama.commands.run import run
from llama.commands.train import TrainCommands

if TYPE_CHECKING:
    from llama import Llama
    from llama.generation import Stream


class Commands(CheckpointCommands, TrainCommands):
    """Llama 3 on this machine. `llama3 VERB --help` tells what a verb takes."""

    def complete(
        self,
        prompt: str,
        *,
        ckpt_dir: str | None = None,
        tokenizer_path: str | None = None,
        temperature: float = 0.6,
        top_p: float = 0.9,
        top_k: int = 0,
        min_p: float = 0.0,
        stop: str | None = None,
        max_gen_len: int = 64,
        max_seq_len: int | None = None,
        seed: int = 1,
        quantize: str | None = None,
        compile: bool = False,
        json: bool = False,
        logprobs: bool = False,
    ) -> None:
        """Print the continuation of PROMPT (one quoted argument).

        Args:
            ckpt_dir: a checkpoint of any layout; by default the demo model.
            tokenizer_path: its tokenizer.model; by default the one that came with it.
            temperature: randomness; 0 always takes the most probable token.
            top_p: draw from the most probable tokens that hold this much of the mass.
            top_k: draw from so many most probable tokens; 0 is no limit.
            min_p: draw from tokens at least this times as probable as the most probable one.
            stop: a text that ends the continuation.
            max_gen_len: most tokens to generate.
            max_seq_len: most tokens of prompt and answer; by default as trained, at most 4096.
            seed: the same seed draws the same tokens.
            quantize: int8 or int4 holds the layers' weights so.
            compile: decode by a compiled step.
            json: print one JSON object, when all is done.
            logprobs: with --json, also the log-probability of each token.
        """
        from llama.engine.sampling import Sampling

        if logprobs and not json:
            raise ValueError("--logprobs needs --json")
        how = asdict(Sampling(temperature, top_p, top_k, min_p))  # checked before a long load
        llama = _build(ckpt_dir, tokenizer_path, max_seq_len, 1, seed, quantize, compile)
        stops = [] if stop is None else [stop]
        _print_completion(
            llama.text_stream(
                prompt, max_gen_len=max_gen_len, stop=stops, logprobs=logprobs, **how
            ),
            prompt if json else None,
        )

    def chat(
        self,
        *,
        ckpt_dir: str | None = None,
        tokenizer_path: str | None = None,
        system: str | None = None,
        temperature: float = 0.6,
        top_p: float = 0.9,
        top_k: int = 0,
        min_p: float = 0.0,
        max_gen_len: int | None = None,
        max_seq_len: int | None = None,
        seed: int = 1,
        quantize: str | None = None,
        compile: bool = False,
    ) -> None:
        """Talk with the model; /help there lists commands. Without a terminal, a line a message.

        Args:
            ckpt_dir: an instruct checkpoint of any layout; by default the demo model.
            tokenizer_path: its tokenizer.model; by default the one that came with it.
            system: tells the model how to behave.
            temperature: randomness; 0 always takes the most probable token.
            top_p: draw from the most probable tokens that hold this much of the mass.
            top_k: draw from so many most probable tokens; 0 is no limit.
            min_p: draw from tokens at least this times as probable as the most probable one.
            max_gen_len: most tokens of an answer; by default all that fits.
            max_seq_len: most tokens of the whole dialog; by default as trained, at most 4096.
            seed: the same seed draws the same tokens.
            quantize: int8 or int4 holds the layers' weights so.
            compile: decode by a compiled step.
        """
        from llama.commands.chat import Chat, follow, lines_of_stdin
        from llama.distributed import job, tensor_parallel
        from llama.engine.sampling import Sampling

        how = asdict(Sampling(temperature, top_p, top_k, min_p))  # checked before a long load
        lines = lines_of_stdin() if job.is_leader() else iter(())
        llama = _build(ckpt_dir, tokenizer_path, max_seq_len, 1, seed, quantize, compile)
        how["max_gen_len"] = max_gen_len
        if not job.is_leader():
            follow(llama, how)
            return
        terminal = sys.stdin.isatty()
        served = Chat(llama, how, system, terminal and tensor_parallel.size() == 1).run(lines)
        tensor_parallel.broadcast_json(None)  # the others may go
        if not served and not terminal:
            raise SystemExit(1)

    def perplexity(
        self,
        file: str,
        *,
        ckpt_dir: str | None = None,
        tokenizer_path: str | None = None,
        context: int | None = None,
        stride: int | None = None,
        max_batch_size: int = 1,
        quantize: str | None = None,
        json: bool = False,
    ) -> None:
        """Tell how well a model predicts the text in FILE, to compare checkpoints by.

        Args:
            ckpt_dir: a checkpoint of any layout; by default the demo model.
            tokenizer_path: its tokenizer.model; by default the one that came with it.
            context: tokens of the sliding window; by default as trained, at most 4096.
            stride: tokens it moves on each time; by default half of it. Each token is predicted
                from at least context - stride tokens before it (but for the first ones).
            max_batch_size: windows computed at once.
            quantize: int8 or int4 holds the layers' weights so.
            json: print one JSON object.
        """
        from llama.distributed import job, tensor_parallel
        from llama.engine.scoring import check_windows, read_text

        text = read_text(file)
        if context is not None:
            stride = check_windows(context, stride)
            context = min(context, len(text.encode()) + 2)  # more than its tokens are never needed
            stride = min(stride, context - 1)
        llama = _build(ckpt_dir, tokenizer_path, context, max_batch_size, 1, quantize)
        result = llama.perplexity(tensor_parallel.broadcast_json(text), stride=stride)
        if job.is_leader():
            print(result.as_json() if json else result)

    def demo(self) -> None:
        """Fetch and convert the demo model if need be, and print its folder."""
        from llama.checkpoints.demo_model import ensure_demo_model

        print(ensure_demo_model())

    def version(self) -> None:
        """Print the version of this library."""
        from llama import __version__

        print(__version__)


def _build(
    ckpt_dir: str | None,
    tokenizer_path: str | None,
    max_seq_len: int | None,
    batch: int,
    seed: int,
    quantize: str | None,
    compile: bool = False,
) -> Llama:
    """Of a checkpoint, or the demo model."""
    from llama import Llama
    from llama.checkpoints.demo_model import cache_dir, checkpoint_or_demo

    folder, tokenizer = checkpoint_or_demo(ckpt_dir, tokenizer_path)
    if compile:  # torch's own place is emptied when the machine starts
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache_dir() / "inductor"))
    return Llama.build(
        folder, tokenizer, max_seq_len, batch, seed=seed, quantize=quantize, compile=compile
    )


def _print_completion(stream: Stream, prompt: str | None) -> None:
    """As it comes; or, if the prompt is given, all of it as one JSON object."""
    from llama.commands.chat import say
    from llama.distributed import job

    text = ""
    for piece in stream:
        text += piece.text
        if job.is_leader() and prompt is None:
            say(piece.text)
    generation = stream.generation
    assert generation is not None
    result: dict[str, Any] = {
        "prompt": prompt,
        "generation": text,
        "finish_reason": generation.finish_reason,
        "prompt_tokens": len(stream.request.prompt),
        "tokens": generation.ids,
    }
    if stream.request.logprobs:
        result["logprobs"] = generation.generated_logprobs
    if job.is_leader():
        print("" if prompt is None else json.dumps(result, ensure_ascii=False), flush=True)


def main() -> None:
    """The console script."""
    if sys.argv[1:] == ["--version"]:
        sys.argv[1] = "version"
    run(Commands(), "llama3")


if __name__ == "__main__":
    main()
