"""Updates of LoRA: packed in bf16 beside peft, and on an int4 base with recomputation.

Weights are random, so losses say nothing. The adapter is on all seven linears, in fp32.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.gpu.models import fill, random_model
from benchmarks.gpu.record import Run
from benchmarks.gpu.timing import wait
from benchmarks.transformers_peer import config_of
from llama.layers.lora import PARTS as TRAINED
from llama.layers.lora import LoRAConfig, add_lora, initialize_lora, leaf
from llama.layers.optimize import quantize_model
from llama.model import ModelArgs
from llama.train.finetune_settings import OTHER_TARGETS, FinetuneSettings
from llama.train.objective import Objective, prepare_model
from llama.train.optimizer import make_optimizer, parameter_groups

UPDATES = 5
SETTINGS = FinetuneSettings(dtype="bfloat16")
LoRA = LoRAConfig()


def packed(run: Run) -> None:
    """A row of packed samples, by this library and by peft."""
    length = run.sizes.train_length
    lengths = (length // 2, length // 4, length // 4)
    for name, make in (("llama3", ours), ("peft", peft)):
        row = f"{name}, LoRA, packed, 1 x {length} tokens"
        run.attempt(row, measure, run, row, length, lambda make=make: make(run, lengths), least=20)


def quantized(run: Run) -> None:
    """The large shape with an int4 base; activations are computed twice."""
    length = run.sizes.train_length
    row = f"llama3, int4 LoRA, recompute, 1 x {length} tokens"

    def make() -> Callable[[], Tensor]:
        return ours(run, None, run.sizes.shape, "int4")

    run.attempt(row, measure, run, row, length, make, least=40)


def measure(run: Run, row: str, length: int, make: Callable[[], Callable[[], Tensor]]) -> None:
    """Time updates, and keep the most memory of one; building the model does not count."""
    gc.collect()
    if run.device.type == "cuda":
        torch.cuda.empty_cache()
    update = make()
    gc.collect()
    update()
    wait(run.device)
    if run.device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(run.device)
    times = []
    for _ in range(UPDATES):
        start = time.perf_counter()
        loss = float(update())  # waits for the device
        times.append(time.perf_counter() - start)
    run.figure(row, "training", "tok/s", [length / t for t in times], "higher")
    run.figure(row, "last loss", "nat", [loss / length])
    run.peak_memory(row)


def ours(
    run: Run,
    lengths: tuple[int, ...] | None,
    shape: dict[str, Any] | None = None,
    scheme: str | None = None,
) -> Callable[[], Tensor]:
    """An update of this library; it returns the loss."""
    length, device = run.sizes.train_length, run.device
    model = random_model(shape or run.sizes.train_shape, 1, length, device).train()
    quantize_model(model, scheme)
    add_lora(model, LoRA)
    initialize_lora(model, seed=1)
    prepare_model(model, recompute=scheme is not None)
    for name, weight in model.named_parameters():
        weight.requires_grad_(leaf(name) in TRAINED)
    objective = Objective(model)
    tokens, targets = rows(run, model.vocab_size)
    return updates(objective, lambda: objective(tokens, targets, lengths), device)


def peft(run: Run, lengths: tuple[int, ...]) -> Callable[[], Tensor]:
    """An update of peft and transformers, which find packed samples by their positions."""
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaForCausalLM
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    config = config_of(ModelArgs(**run.sizes.train_shape))
    config._attn_implementation = "sdpa"
    with torch.device("meta"):
        base = LlamaForCausalLM(config).to(torch.bfloat16)
    fill(base, run.device)
    base.model.rotary_emb = LlamaRotaryEmbedding(config).to(run.device)
    names = {ours: theirs for theirs, ours in OTHER_TARGETS.items()}
    options: dict[str, Any] = {"r": LoRA.rank, "lora_alpha": LoRA.alpha, "lora_dropout": 0.0}
    options["target_modules"] = [names[target] for target in LoRA.targets]
    model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **options)).train()
    tokens, targets = rows(run, config.vocab_size)
    positions = torch.cat([torch.arange(n, device=run.device) for n in lengths])[None]

    def loss_of() -> Tensor:
        output = model(
            input_ids=tokens, position_ids=positions, labels=tokens, shift_labels=targets,
            num_items_in_batch=1, use_cache=False,
        )  # fmt: skip
        loss: Tensor = output.loss
        return loss

    return updates(model, loss_of, run.device)


def updates(
    module: nn.Module, loss_of: Callable[[], Tensor], device: torch.device
) -> Callable[[], Tensor]:
    """A function: one update; it returns the sum of nats."""
    optimizer = make_optimizer(parameter_groups(module, SETTINGS), SETTINGS)

    def update() -> Tensor:
        with torch.autocast(device.type, torch.bfloat16):
            loss = loss_of()
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(module.parameters(), SETTINGS.grad_clip)
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return update


def rows(run: Run, vocab_size: int) -> tuple[Tensor, Tensor]:
    """Random ids and the ids that follow them, (1, T) each."""
    generator = torch.Generator(run.device).manual_seed(1)
    shape = (1, run.sizes.train_length + 1)
    ids = torch.randint(0, vocab_size, shape, generator=generator, device=run.device)
    return ids[:, :-1], ids[:, 1:]
