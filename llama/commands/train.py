"""The verb of `llama3` that trains. Imports what it needs when it runs."""

from __future__ import annotations

from llama.train.settings import Settings


class TrainCommands:
    """`llama3 train`."""

    # fmt: off
    def train(
        self, *, data: str, out: str, resume: bool = False, tokenizer: str = "char",
        dim: int = 128, n_layers: int = 4, n_heads: int = 4, n_kv_heads: int | None = None,
        multiple_of: int = 256, rope_theta: float | None = None, max_seq_len: int = 64,
        batch_size: int = 12, accumulate: int = 1, steps: int = 2000,
        lr: float | None = None, final_lr: float = 0.0, warmup: int = 100, beta1: float = 0.9,
        beta2: float = 0.99, weight_decay: float = 0.1, grad_clip: float = 1.0, seed: int = 1,
        val_fraction: float = 0.1, test_fraction: float = 0.0, eval_every: int = 250,
        eval_windows: int = 2048, prompt: str | None = None, dtype: str | None = None,
        recompute: bool = False, parallel: str | None = None, tensorboard: bool = False,
    ) -> None:
        """Train a model from nothing on the text in DATA; folder OUT becomes its checkpoint.

        Ctrl-C saves and ends; the same command with --resume goes on.

        Args:
            data: a text file, or a folder of .txt and .md files.
            tokenizer: char, bpe:N (N tokens, learnt from the text), or a tokenizer.model.
            multiple_of: the feed-forward, 8/3 of dim wide, is rounded up to a multiple of this.
            rope_theta: base of the rotary frequencies; by default 16 * max_seq_len.
            max_seq_len: tokens of a row; the model knows no longer texts.
            batch_size: rows that each process computes at once.
            accumulate: so many batches make one update.
            lr: the highest learning rate; by default 0.4 / dim.
            final_lr: what the last update still has of it, from 0 to 1.
            warmup: updates until it is reached, at most half of steps.
            grad_clip: longest gradient; 0 is any.
            val_fraction: of each file, its end, to tell the loss by; test_fraction of it is unused.
            eval_every: updates between evaluations, which also save and print a sample.
            eval_windows: rows of validation text to evaluate, at most.
            prompt: what samples continue; by default the validation text's first token.
            dtype: float32, or bfloat16 for products; by default where the device has it.
            recompute: compute activations twice instead of keeping them: slower, less memory.
            parallel: ddp or fsdp, under torchrun: each process trains on rows of its own.
            tensorboard: also write OUT/train/tensorboard.
        """
        settings = Settings(
            dim, n_layers, n_heads, n_kv_heads, multiple_of, rope_theta, max_seq_len, tokenizer,
            val_fraction, test_fraction, batch_size, accumulate, steps, lr, final_lr, warmup,
            beta1, beta2, weight_decay, grad_clip, seed, eval_every, eval_windows, dtype,
            recompute, parallel, prompt,
        )
        run(data, out, settings, resume, tensorboard)
    # fmt: on


def run(
    data: str, out: str, settings: Settings, resume: bool = False, tensorboard: bool = False
) -> None:
    """Train, and say how it ended; exit code 130 or 143 where a signal ended it."""
    from llama.distributed import job
    from llama.train.loop import train

    result = train(data, out, settings, resume=resume, tensorboard=tensorboard)
    if job.is_leader():
        if result.signal:
            print(f"stopped after step {result.step}; the same command with --resume goes on")
        if result.best_step:
            print(f"{out}: the model of step {result.best_step}, loss {result.best_loss:.4f}")
    if result.signal:
        raise SystemExit(128 + result.signal)
