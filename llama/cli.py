"""`llama3 VERB`: parses and dispatches. Imports what a verb needs when it runs."""

from __future__ import annotations

import sys

import fire
from fire import decorators


class Commands:
    """Llama 3 on this machine. `llama3 VERB --help` tells what a verb takes."""

    @decorators.SetParseFn(str, "prompt")  # else fire would read 1e3 as a number
    def complete(
        self,
        prompt: str,
        ckpt_dir: str | None = None,
        tokenizer_path: str | None = None,
        temperature: float = 0.6,
        top_p: float = 0.9,
        max_gen_len: int = 64,
        max_seq_len: int = 2048,
        seed: int = 1,
    ) -> None:
        """Print the continuation of PROMPT by a checkpoint, or by the demo model."""
        from llama import Llama, parallel
        from llama.demo import checkpoint_or_demo

        folder, tokenizer = checkpoint_or_demo(ckpt_dir, tokenizer_path)
        llama = Llama.build(folder, tokenizer, max_seq_len, 1, seed=seed)
        [result] = llama.text_completion([prompt], temperature, top_p, max_gen_len)
        if parallel.rank() == 0:
            print(result["generation"])

    def demo(self) -> None:
        """Fetch and convert the demo model if need be, and print its folder."""
        from llama.demo import ensure_demo_model

        print(ensure_demo_model())

    def version(self) -> None:
        """Print the version of this library."""
        from llama import __version__

        print(__version__)


def main() -> None:
    """The console script: a mistake is one line on stderr and exit code 2."""
    try:
        fire.Fire(Commands, name="llama3")
    except (ValueError, TypeError, OSError, ImportError, RuntimeError) as e:
        print(f"llama3: {e}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
