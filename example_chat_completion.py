"""Chat with an instruction-tuned model. Without --ckpt_dir it runs the small demo model.

    python example_chat_completion.py
    torchrun --nproc_per_node 1 example_chat_completion.py \
        --ckpt_dir Meta-Llama-3-8B-Instruct \
        --tokenizer_path Meta-Llama-3-8B-Instruct/tokenizer.model
"""

from __future__ import annotations

from llama import run_script


def main(
    ckpt_dir: str | None = None,
    tokenizer_path: str | None = None,
    temperature: float = 0.6,
    top_p: float = 0.9,
    max_seq_len: int = 512,
    max_batch_size: int = 4,
    max_gen_len: int | None = None,
) -> None:
    """Answer four dialogs.

    Args:
        ckpt_dir: folder with params.json and consolidated.*.pth.
        tokenizer_path: the checkpoint's tokenizer.model; by default the one in ckpt_dir.
        temperature: randomness; 0 always takes the most probable token.
        top_p: draw from the most probable tokens that hold this much of the mass.
        max_seq_len: most tokens a row may have, prompt and answer together.
        max_batch_size: most rows at once.
        max_gen_len: most tokens to generate; by default all that fit.
    """
    # Imported here, so that --help is quick and run_script sets up the process before torch.
    from llama import Dialog, Llama, checkpoint_or_demo, is_leader

    folder, tokenizer = checkpoint_or_demo(ckpt_dir, tokenizer_path)
    generator = Llama.build(
        ckpt_dir=folder,
        tokenizer_path=tokenizer,
        max_seq_len=max_seq_len,
        max_batch_size=max_batch_size,
    )
    dialogs: list[Dialog] = [
        [{"role": "user", "content": "What is the capital of France?"}],
        # Several turns: the model sees its own earlier answer.
        [
            {"role": "user", "content": "What is the largest planet in the solar system?"},
            {"role": "assistant", "content": "Jupiter is the largest planet."},
            {"role": "user", "content": "What is it made of?"},
        ],
        # A system prompt sets the manner of the answers.
        [
            {"role": "system", "content": "Answer in one short sentence."},
            {"role": "user", "content": "Why is the sky blue?"},
        ],
        [
            {"role": "system", "content": "You are a friendly cook."},
            {"role": "user", "content": "What can I make with eggs and flour?"},
        ],
    ]
    results = generator.chat_completion(
        dialogs, max_gen_len=max_gen_len, temperature=temperature, top_p=top_p
    )
    if is_leader():
        for dialog, result in zip(dialogs, results, strict=True):
            for message in dialog:
                print(f"{message['role'].capitalize()}: {message['content']}\n")
            answer = result["generation"]
            print(f"> {answer['role'].capitalize()}: {answer['content']}")
            print("\n==================================\n")


if __name__ == "__main__":
    run_script(main)
