"""Greedy ids and log-probabilities of an exported folder, by another engine.

    python engine_job.py JOB RESULT

Runs in a process of its own, whose Python need not have this library: imports nothing of it.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def by_vllm(job: dict[str, Any]) -> dict[str, Any]:
    """The answers of vLLM in float32; `SamplingParams` and `LLM` as of vLLM 0.32."""
    from vllm import LLM, SamplingParams

    llm = LLM(
        model=job["folder"],
        dtype="float32",
        max_model_len=1024,
        tensor_parallel_size=job["ranks"],
        enforce_eager=True,
    )
    greedy = SamplingParams(temperature=0, max_tokens=job["new"], ignore_eos=True)
    score = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=1)
    answers = llm.generate([{"prompt_token_ids": ids} for ids in job["prompts"]], greedy)
    chats = llm.chat(job["dialogs"], greedy)
    [scored] = llm.generate([{"prompt_token_ids": job["scored"]}], score)
    steps = zip(scored.prompt_logprobs[1:], job["scored"][1:], strict=True)
    return {
        "ids": [list(answer.outputs[0].token_ids) for answer in answers],
        "chat_prompts": [list(chat.prompt_token_ids) for chat in chats],
        "chat_ids": [list(chat.outputs[0].token_ids) for chat in chats],
        "logprobs": [step[i].logprob for step, i in steps],
    }


def by_transformers(job: dict[str, Any]) -> dict[str, Any]:
    """The answers of transformers in float32."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(job["folder"], dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(job["folder"])

    def greedy(ids: list[int]) -> list[int]:
        row = torch.tensor([ids])
        out = model.generate(
            row, attention_mask=torch.ones_like(row), do_sample=False, max_new_tokens=job["new"]
        )
        new: list[int] = out[0, len(ids) :].tolist()
        return new

    chat_prompts = [
        tokenizer.apply_chat_template(dialog, add_generation_prompt=True, return_dict=False)
        for dialog in job["dialogs"]
    ]
    scored = torch.tensor([job["scored"]])
    with torch.no_grad():
        logprobs = model(scored).logits[0, :-1].log_softmax(-1)
    return {
        "ids": [greedy(ids) for ids in job["prompts"]],
        "chat_prompts": chat_prompts,
        "chat_ids": [greedy(ids) for ids in chat_prompts],
        "logprobs": logprobs.gather(1, scored[0, 1:, None])[:, 0].tolist(),
    }


if __name__ == "__main__":
    job = json.loads(Path(sys.argv[1]).read_text("utf-8"))
    engine = {"vllm": by_vllm, "transformers": by_transformers}[job["engine"]]
    Path(sys.argv[2]).write_text(json.dumps(engine(job)), "utf-8")
