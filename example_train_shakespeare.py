"""Train a Llama 3 on Tiny Shakespeare from nothing, then continue a prompt with it.

    curl -LO https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt
    python example_train_shakespeare.py --data input.txt

With the default sizes the model has 25 million parameters, and two CPU cores need an hour. A minute
is enough for `--dim 64 --n_layers 2 --max_seq_len 64 --steps 300`.
"""

from __future__ import annotations

from pathlib import Path

from llama import run_script


def main(
    data: str,
    out: str = "shakespeare",
    dim: int = 512,
    n_layers: int = 8,
    n_heads: int = 8,
    n_kv_heads: int = 4,
    max_seq_len: int = 256,
    batch_size: int = 10,
    steps: int = 2500,
    weight_decay: float = 1.0,
    seed: int = 1,
    resume: bool = False,
    prompt: str | None = None,
) -> None:
    """Train on the text in DATA, then continue a prompt with the checkpoint OUT.

    Args:
        data: a text file; its last tenth is used for validation only.
        out: the folder that becomes the checkpoint.
        dim: width of the model.
        n_layers: transformer blocks.
        n_heads: attention heads of each block.
        n_kv_heads: heads of keys and values.
        max_seq_len: characters that the model sees at once.
        batch_size: rows of `max_seq_len` characters in an update.
        steps: updates.
        weight_decay: ten times the usual value, because each row is seen six times.
        seed: of the first weights, the order of the rows, and the samples.
        resume: continue an interrupted run in OUT.
        prompt: what the samples, and the text at the end, begin with; by default "ROMEO:" if
            the text has it, else the text's beginning.
    """
    # Imported here, so that --help is quick and run_script sets up the process before torch.
    from llama import Llama
    from llama.train import Settings, train

    if prompt is None:
        text = Path(data).read_text("utf-8", "replace") if Path(data).is_file() else ""
        prompt = "ROMEO:" if "ROMEO:" in text else text[:5] or "\n"
    settings = Settings(
        dim=dim,
        n_layers=n_layers,
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        max_seq_len=max_seq_len,
        batch_size=batch_size,
        steps=steps,
        weight_decay=weight_decay,
        seed=seed,
        prompt=prompt,
    )
    result = train(data, out, settings, resume=resume)
    if result.signal:
        print(f"stopped after step {result.step}; the same command with --resume goes on")
        raise SystemExit(128 + result.signal)
    print(f"{out}: the model of step {result.best_step}, loss {result.best_loss:.4f}")
    llama = Llama.build(out, None, max_seq_len, 1)
    (answer,) = llama.text_completion([prompt], temperature=0.8, seed=seed)
    print(f"{prompt}{answer['generation']}")


if __name__ == "__main__":
    run_script(main)
