"""The verbs of `llama3` that need a checkpoint's files and run no model. Imports when one runs."""

from __future__ import annotations

from pathlib import Path


class CheckpointCommands:
    """`llama3 convert`, `quantize`, `plan`, `inspect`, `verify`, `download`."""

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
        from llama.checkpoints.convert import convert

        print(convert(src, dst, to, mp, dtype, force))

    def quantize(self, src: str, dst: str, scheme: str, group: int | None = None) -> None:
        """Write checkpoint SRC, of any layout, as folder DST with weights of 8 or 4 bits.

        Args:
            scheme: int8, or int4 (the output layer in int8).
            group: 32, 64 or 128 inputs share a scale in int4; by default 32.
        """
        from llama.checkpoints.convert import quantize

        print(quantize(src, dst, scheme, group))

    def inspect(self, path: str, max_batch_size: int = 1, max_seq_len: int | None = None) -> None:
        """Tell what checkpoint PATH is and what it needs, with a cache of that batch and length."""
        from llama.checkpoints.inspect import describe
        from llama.checkpoints.open import open_checkpoint

        print(describe(open_checkpoint(path), max_batch_size, max_seq_len))

    def plan(
        self,
        *,
        shape: str | None = None,
        ckpt_dir: str | None = None,
        ranks: int = 1,
        batch: int = 1,
        context: int = 8192,
        dtype: str = "bf16",
        quantize: str | None = None,
        device_memory: str | None = None,
        memory_bandwidth: str | None = None,
        interconnect: str | None = None,
        json: bool = False,
    ) -> None:
        """Tell what each of RANKS ranks needs, what fits, and how fast it can be at most.

        Args:
            shape: an official model, such as 8b, 70b or 405b; or else give ckpt_dir.
            device_memory: of a rank, such as 80GB.
            memory_bandwidth: what a rank reads, such as 3.35TB/s.
            interconnect: what a rank sends, such as 450GB/s.
        """
        from llama.commands.plan import plan

        sizes = (device_memory, memory_bandwidth, interconnect)
        print(plan(shape, ckpt_dir, ranks, batch, context, dtype, quantize, *sizes, as_json=json))

    def verify(self, path: str) -> None:
        """Check every file of checkpoint PATH; one line a problem, and exit code 1 if any."""
        from llama.checkpoints.open import open_checkpoint, open_tokenizer
        from llama.checkpoints.verify import verify

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
        from llama.checkpoints.download import download

        self.verify(str(download(repo, Path(dst) if dst else None, include)))
