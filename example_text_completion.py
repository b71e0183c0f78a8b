"""Text completion with a base model. Without --ckpt_dir it runs the small demo model.

    python example_text_completion.py
    torchrun --nproc_per_node 1 example_text_completion.py \
        --ckpt_dir Meta-Llama-3-8B --tokenizer_path Meta-Llama-3-8B/tokenizer.model
"""

from __future__ import annotations

from llama import run_script


def main(
    ckpt_dir: str | None = None,
    tokenizer_path: str | None = None,
    temperature: float = 0.6,
    top_p: float = 0.9,
    max_seq_len: int = 128,
    max_gen_len: int = 64,
    max_batch_size: int = 4,
) -> None:
    """Continue four prompts.

    Args:
        ckpt_dir: folder with params.json and consolidated.*.pth.
        tokenizer_path: the checkpoint's tokenizer.model; by default the one in ckpt_dir.
        temperature: randomness; 0 always takes the most probable token.
        top_p: draw from the most probable tokens that hold this much of the mass.
        max_seq_len: most tokens a row may have, prompt and answer together.
        max_gen_len: most tokens to generate.
        max_batch_size: most rows at once.
    """
    # Imported here, so that --help is quick and run_script sets up the process before torch.
    from llama import Llama, checkpoint_or_demo, is_leader

    folder, tokenizer = checkpoint_or_demo(ckpt_dir, tokenizer_path)
    generator = Llama.build(
        ckpt_dir=folder,
        tokenizer_path=tokenizer,
        max_seq_len=max_seq_len,
        max_batch_size=max_batch_size,
    )
    prompts = [
        # A base model continues the text it is given.
        "The capital of France is",
        "Water boils when",
        "Dear diary,\n\nthis morning I opened the shutters and",
        # Few-shot: the examples are the instructions.
        "Give the opposite of each word.\n\nhot -> cold\nearly -> late\nopen -> closed\nheavy ->",
    ]
    results = generator.text_completion(
        prompts, max_gen_len=max_gen_len, temperature=temperature, top_p=top_p
    )
    if is_leader():
        for prompt, result in zip(prompts, results, strict=True):
            print(prompt)
            print(f"> {result['generation']}")
            print("\n==================================\n")


if __name__ == "__main__":
    run_script(main)
