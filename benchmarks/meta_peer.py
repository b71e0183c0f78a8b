"""Meta's published Transformer with this library's weights, and the published decode loop.

Needs PyPI's `llama-models`. Runs on the CPU, in a process group of one.
"""

from __future__ import annotations

import tempfile
from typing import Any

import torch
from torch import Tensor

from llama.model import Transformer


def meta_model(ours: Transformer, params: dict[str, Any], rows: int, length: int) -> Any:
    """Build it with copies of the weights; call it once in a process.

    Args:
        params: as in params.json.
        rows, length: of its KV cache.
    """
    import fairscale.nn.model_parallel.initialize as fs_init
    import torch.distributed as dist
    from llama_models.llama3.args import ModelArgs  # type: ignore[import-untyped,unused-ignore]
    from llama_models.llama3.model import Transformer as Meta  # type: ignore[import-untyped,unused-ignore]

    store = tempfile.NamedTemporaryFile()  # noqa: SIM115 - open as long as the group
    dist.init_process_group("gloo", init_method=f"file://{store.name}", rank=0, world_size=1)
    fs_init.initialize_model_parallel(1)
    params = {"norm_eps": 1e-5} | params
    torch.set_default_dtype(ours.norm.weight.dtype)
    meta = Meta(ModelArgs(**params, max_batch_size=rows, max_seq_len=length))
    torch.set_default_dtype(torch.float32)
    meta.load_state_dict(ours.state_dict(), strict=True)
    return meta.eval()


@torch.inference_mode()
def reference_loop(model: Any, prompts: list[list[int]], new: int) -> list[list[int]]:
    """Greedy ids by the published loop.

    It prefills as many positions as the shortest prompt has, then computes one position of all
    rows a step.
    """
    total = max(map(len, prompts)) + new
    tokens = torch.full((len(prompts), total), -1)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = torch.tensor(prompt)
    in_prompt, before = tokens >= 0, 0
    for position in range(min(map(len, prompts)), total):
        logits: Tensor = model.forward(tokens[:, before:position], before)
        drawn = logits[:, -1].argmax(-1)
        tokens[:, position] = torch.where(in_prompt[:, position], tokens[:, position], drawn)
        before = position
    return [row[len(p) : len(p) + new].tolist() for row, p in zip(tokens, prompts, strict=True)]
