"""An update of fine-tuning: by `llama3 finetune`'s trainer, and by peft and transformers.

Both have the same weights, adapter, rows, learning rates and optimizer.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.transformers_peer import transformers_model
from llama.checkpoints.adapter import write_adapter
from llama.checkpoints.load import load_model
from llama.distributed.device import pick_device
from llama.layers.lora import lora_state
from llama.train.batch import Batch
from llama.train.data_parallel import DataParallel
from llama.train.finetune_base import open_base
from llama.train.finetune_settings import FinetuneSettings
from llama.train.finetuning import Finetuning, base_samples
from llama.train.loop import Trainer
from llama.train.optimizer import make_optimizer, set_learning_rate
from llama.train.signals import DeferredSignals


class Update(NamedTuple):
    """What an update took.

    Attributes:
        cpu: seconds of all threads; other load on the machine changes it little.
        loss: nats per target.
        positions: inputs of the model, padding included.
    """

    seconds: float
    cpu: float
    loss: float
    positions: int
    targets: int


class Ours:
    """The trainer of `llama3 finetune`, an update at a time.

    Args:
        checkpoint: a folder.
        data: files of samples.
    """

    def __init__(self, checkpoint: str, data: Sequence[str], settings: FinetuneSettings):
        base = open_base(checkpoint)
        samples = base_samples(base, data, settings)
        ranks = DataParallel.initialize(None, pick_device(None))
        # Nothing is saved: the folder is not written to.
        self.task = Finetuning(settings, base, samples, Path("unused"), ranks)
        self.trainer = Trainer(self.task, ranks)
        self.signals = DeferredSignals()

    def update(self, step: int) -> Update:
        start, cpu = time.perf_counter(), time.process_time()
        line, _ = self.trainer.step(step, self.signals)
        seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
        batches = self.task.batches(step, 0, 1)
        positions = sum(batch.tokens.numel() for batch in batches)
        return Update(seconds, cpu, line["train_loss"], positions, self.task.target_count(step, 1))


class Peft:
    """peft around transformers' LlamaForCausalLM, beginning where `ours` is.

    Rows are padded on the right, where causal attention needs no mask: none is given, which is the
    faster way.
    """

    def __init__(self, ours: Ours):
        self.task, self.settings = ours.task, ours.task.settings
        self.device = ours.trainer.ranks.device
        self.autocast = ours.trainer.autocast
        self.model = peft_model(ours)
        weights = [w for w in self.model.parameters() if w.requires_grad]
        trained = sum(w.numel() for w in ours.trainer.objective.parameters() if w.requires_grad)
        assert sum(w.numel() for w in weights) == trained
        group = {"params": weights, "weight_decay": self.settings.weight_decay, "lr_scale": 1.0}
        self.optimizer = make_optimizer([group], self.settings)

    def update(self, step: int) -> Update:
        start, cpu = time.perf_counter(), time.process_time()
        batches = self.task.batches(step, 0, 1)
        targets = self.task.target_count(step, 1)
        set_learning_rate(self.optimizer, self.settings.scheduled_lr(step, self.task.steps))
        loss = sum(self.backward(batch, targets) for batch in batches)
        nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.grad_clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
        return Update(seconds, cpu, loss, sum(batch.tokens.numel() for batch in batches), targets)

    def backward(self, batch: Batch, targets: int) -> float:
        tokens, wanted = batch.tokens.to(self.device), batch.targets.to(self.device)
        with self.autocast:
            output = self.model(
                input_ids=tokens, labels=tokens, shift_labels=wanted, num_items_in_batch=targets
            )
        loss: Tensor = output.loss
        torch.autograd.backward(loss)
        return float(loss.detach())


def peft_model(ours: Ours) -> Any:
    """transformers' model with the base of `ours` and a copy of its adapter."""
    from peft import PeftModel

    task, device = ours.task, ours.trainer.ranks.device
    plain = load_model(task.base.source, task.args, device, task.dtype)
    model = transformers_model(plain)
    model.to(task.dtype)
    config = task.settings.lora
    weights = {n: w.float() for n, w in lora_state(ours.trainer.objective.model).items()}
    with tempfile.TemporaryDirectory() as folder:
        write_adapter(Path(folder), task.base.source, config, weights)
        return PeftModel.from_pretrained(model, folder, is_trainable=True).train()
