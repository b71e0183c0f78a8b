"""`llama3 VERB`: parses and dispatches. Imports what a verb needs when it runs."""

from __future__ import annotations

import inspect
import os
import re
import signal
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

        print(convert(src, dst, to, mp, dtype, force))

    def inspect(self, path: str, max_batch_size: int = 1, max_seq_len: int = 8192) -> None:
        """Tell what checkpoint PATH is and what it needs, with a cache of that batch and length."""
        from llama.formats import open_checkpoint
        from llama.inspection import describe

        print(describe(open_checkpoint(path), max_batch_size, max_seq_len))

    def verify(self, path: str) -> None:
        """Check every file of checkpoint PATH; one line a problem, and exit code 1 if any."""
        from llama.formats import open_checkpoint, open_tokenizer
        from llama.verification import verify

        problems = verify(path, open_checkpoint)
        if not problems:
            try:
                open_tokenizer(open_checkpoint(path))
            except (ValueError, FileNotFoundError) as e:
                problems = [str(e)]
        print("\n".join(problems) if problems else f"{path}: every check passed")
        if problems:
            raise SystemExit(1)

    def download(self, repo: str, dst: str | None = None, include: str | None = None) -> None:
        """Fetch REPO from the Hugging Face hub into folder DST, then verify it.

        Args:
            include: a pattern of files, such as original/*; by default what is needed to run.
        """
        from llama.download import download

        self.verify(str(download(repo, Path(dst) if dst else None, include)))

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
    # So that whatever is half-written is removed, as it is by Ctrl-C.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        verb = [] if inspect.isfunction(component) else sys.argv[1:2]
        function = component if inspect.isfunction(component) else None
        if verb and not verb[0].startswith("-"):
            function = getattr(component, verb[0], None)
        arguments = sys.argv[1 + len(verb) :]
        if callable(function) and "--help" not in arguments:
            arguments = checked(inspect.signature(function), arguments)
        fire.Fire(component, [*verb, *arguments], name)
        sys.stdout.flush()
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except BrokenPipeError:  # the reader of our output has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ValueError, TypeError, OSError, ImportError, RuntimeError) as e:
        print(f"{name}: {e}", file=sys.stderr)
        raise SystemExit(2) from None


def checked(signature: inspect.Signature, arguments: list[str]) -> list[str]:
    """The arguments as Fire should have them.

    Fire runs the whole command before it complains of an argument that was left over, and reads a
    text such as 1e3 or a#b as something else.

    Raises:
        ValueError: an unknown flag, or more words than the command takes.
    """
    positional = [p for p in signature.parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    result: list[str] = []
    parameter: inspect.Parameter | None = None  # whose value comes next
    leading = 0
    for argument in arguments:
        if re.fullmatch("-[a-zA-Z]", argument):  # short for the one flag that begins so
            names = [name for name in signature.parameters if name[0] == argument[1]]
            argument = f"--{names[0]}" if len(names) == 1 else f"-{argument}"
        flag, equals, value = argument.partition("=")
        if flag.startswith("--"):
            name = flag[2:].replace("-", "_")
            known = signature.parameters
            parameter = known.get(name)
            if parameter is None and name.removeprefix("no") not in known:
                raise ValueError(f"unknown flag {flag}; the flags are {sorted(known)}")
            result.append(flag + (f"={_quoted(value, parameter)}" if equals else ""))
            parameter = None if equals else parameter
            continue
        if parameter is None:
            if leading == len(positional):
                raise ValueError(f"too many words: {argument!r}; quote a text with spaces")
            parameter, leading = positional[leading], leading + 1
        result.append(_quoted(argument, parameter))
        parameter = None
    return result


def _quoted(value: str, parameter: inspect.Parameter | None) -> str:
    """As a Python literal, where a text is wanted."""
    return repr(value) if parameter and "str" in str(parameter.annotation) else value


def main() -> None:
    """The console script."""
    if sys.argv[1:] == ["--version"]:
        sys.argv[1] = "version"
    run(Commands(), "llama3")


if __name__ == "__main__":
    main()
