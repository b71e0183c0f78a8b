"""`llama3 VERB`: parses and dispatches. Imports what a verb needs when it runs."""

from __future__ import annotations

import inspect
import itertools
import os
import sys
from pathlib import Path
from typing import Any

import fire


class Commands:
    """Llama 3 on this machine. `llama3 VERB --help` tells what a verb takes."""

    def complete(
        self,
        prompt: str,
        *,
        ckpt_dir: str | None = None,
        tokenizer_path: str | None = None,
        temperature: float = 0.6,
        top_p: float = 0.9,
        max_gen_len: int = 64,
        max_seq_len: int = 2048,
        seed: int = 1,
    ) -> None:
        """Print the continuation of PROMPT (one quoted argument).

        Args:
            ckpt_dir: a checkpoint of any layout; by default the demo model.
            tokenizer_path: its tokenizer.model; by default the one that came with it.
            temperature: randomness; 0 always takes the most probable token.
            top_p: draw from the most probable tokens that hold this much of the mass.
            max_gen_len: most tokens to generate.
            max_seq_len: most tokens of prompt and answer together.
            seed: the same seed draws the same tokens.
        """
        from llama import Llama, parallel
        from llama.demo import checkpoint_or_demo
        from llama.sampling import Sampling

        how = Sampling(temperature, top_p)  # checked before a long load
        folder, tokenizer = checkpoint_or_demo(ckpt_dir, tokenizer_path)
        llama = Llama.build(folder, tokenizer, max_seq_len, 1, seed=seed)
        pieces = llama.text_stream(
            prompt, temperature=how.temperature, top_p=how.top_p, max_gen_len=max_gen_len
        )
        for piece in pieces:
            if parallel.rank() == 0:
                print(piece.text, end="", flush=True)
        if parallel.rank() == 0:
            print()

    def convert(
        self,
        src: str,
        dst: str,
        to: str = "meta",
        mp: int | None = None,
        dtype: str | None = None,
        force: bool = False,
    ) -> None:
        """Write checkpoint SRC (Meta's or Hugging Face's folder, or a GGUF file) as folder DST.

        Args:
            to: meta (the official layout) or hf (Hugging Face).
            mp: shards of the official layout; by default as many as SRC has.
            dtype: bf16, fp16 or fp32; by default what is stored (bf16 from a GGUF).
            force: replace DST if it exists.
        """
        from llama.conversion import convert

        print(convert(str(src), str(dst), to, mp, dtype, force))

    def inspect(self, path: str, max_batch_size: int = 1, max_seq_len: int = 8192) -> None:
        """Tell what checkpoint PATH is and what it needs, with a cache of that batch and length."""
        from llama.formats import open_checkpoint
        from llama.inspection import describe

        print(describe(open_checkpoint(str(path)), max_batch_size, max_seq_len))

    def verify(self, path: str) -> None:
        """Check every file of checkpoint PATH; one line a problem, and exit code 1 if any."""
        from llama.formats import open_checkpoint
        from llama.verification import verify

        problems = verify(str(path), open_checkpoint)
        print("\n".join(problems) if problems else f"{path}: every check passed")
        if problems:
            raise SystemExit(1)

    def download(self, repo: str, dst: str | None = None, include: str | None = None) -> None:
        """Fetch REPO from the Hugging Face hub into folder DST, then verify it.

        Args:
            include: a pattern of files, such as original/*; by default what is needed to run.
        """
        from llama.download import download

        self.verify(str(download(repo, None if dst is None else Path(dst), include)))

    def demo(self) -> None:
        """Fetch and convert the demo model if need be, and print its folder."""
        from llama.demo import ensure_demo_model

        print(ensure_demo_model())

    def version(self) -> None:
        """Print the version of this library."""
        from llama import __version__

        print(__version__)


def run(component: Any, name: str) -> None:
    """Run a function or an object's methods as a command line.

    A mistake is one line on stderr and exit code 2; Ctrl-C is exit code 130.
    """
    try:
        refuse_unknown_arguments(component, sys.argv[1:])
        fire.Fire(component, name=name)
        sys.stdout.flush()
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except BrokenPipeError:  # the reader of our output has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ValueError, TypeError, OSError, ImportError, RuntimeError) as e:
        print(f"{name}: {e}", file=sys.stderr)
        raise SystemExit(2) from None


def refuse_unknown_arguments(component: Any, arguments: list[str]) -> None:
    """Fire would run the whole command before it complains of an argument that was left over."""
    function = component
    if not inspect.isfunction(component):
        function = getattr(component, arguments[0], None) if arguments else None
        arguments = arguments[1:]
    if not callable(function) or "--help" in arguments or "--" in arguments:
        return
    parameters = inspect.signature(function).parameters.values()
    positional = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    leading = list(itertools.takewhile(lambda a: not a.startswith("--"), arguments))
    if len(leading) > len(positional):
        raise ValueError(f"too many words: {leading[len(positional)]!r}; quote a text with spaces")
    known = {p.name for p in parameters}
    for argument in arguments:
        flag = argument.split("=")[0]
        name = flag[2:].replace("-", "_")
        if flag.startswith("--") and not {name, name.removeprefix("no")} & known:
            raise ValueError(f"unknown flag {flag}; the flags are {sorted(known)}")


def main() -> None:
    """The console script."""
    arguments = sys.argv[1:]
    if len(arguments) > 1 and arguments[0] == "complete" and not arguments[1].startswith("--"):
        sys.argv[2] = repr(arguments[1])  # else Fire would read 1e3 as a number
    if arguments == ["--version"]:
        sys.argv[1] = "version"
    run(Commands(), "llama3")


if __name__ == "__main__":
    main()
