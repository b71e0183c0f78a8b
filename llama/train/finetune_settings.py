"""`FinetuneSettings`: the options of fine-tuning. Knows nothing about tensors or files."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import ClassVar

from llama.common.options import option
from llama.layers.lora import TARGETS, LoRAConfig
from llama.layers.quantized_linear import check_scheme
from llama.text.tool_prompt import check_form
from llama.train.settings import TrainerSettings

METHODS = ("lora", "full", "embeddings", "dpo")
ADAPTERS = ("lora", "dpo")  # methods that train an adapter
FORMATS = ("auto", "alpaca", "sharegpt", "messages", "text", "preference")
TEMPLATES = ("auto", "chat", "alpaca")
LONGEST = 2048  # tokens of a row where max_seq_len is None, at most
BLOCK = 512  # tokens of a row of plain text
# Alpaca trained 7B whole with 2e-5; LoRA takes about ten times as much, because B A begins at 0 and
# moves few directions. Chinese-LLaMA trained embeddings with 2e-4. Preferences take less, as the
# model must stay near its reference.
LEARNING_RATES = {"lora": 2e-4, "full": 2e-5, "embeddings": 2e-4, "dpo": 5e-5}
# Names by Hugging Face of the linears, for messages.
OTHER_TARGETS = {
    "q_proj": "wq", "k_proj": "wk", "v_proj": "wv", "o_proj": "wo",
    "gate_proj": "w1", "down_proj": "w2", "up_proj": "w3",
}  # fmt: skip


@dataclass(frozen=True)
class FinetuneSettings(TrainerSettings):
    """How a checkpoint is fine-tuned: the flags of `llama3 finetune`.

    Raises:
        ValueError: a value is out of range, or two exclude each other.
    """

    method: str = option(
        "lora",
        "lora (an adapter), full (all weights), embeddings (only those and the output) or dpo (an "
        "adapter, on pairs of answers)",
    )
    format: str = option(
        "auto",
        "of the data: alpaca, sharegpt, messages, text, preference; by default (auto) by its keys",
    )
    template: str = option(
        "auto",
        "prompt of dialogs and instructions: chat (the model's), or alpaca (for base models); "
        "by default (auto) chat where the model has one",
    )
    rank: int = option(8, "LoRA: rows of A and columns of B")
    alpha: float | None = option(None, "LoRA: B A is scaled by alpha / rank; by default 2 * rank")
    dropout: float = option(0.0, "LoRA: share of A's inputs that is set to 0 in training")
    targets: str = option(",".join(TARGETS), "LoRA: the linears of each layer that it adapts")
    rslora: bool = option(False, "LoRA: scale by alpha / sqrt(rank), which suits high ranks")
    lora_plus: float = option(1.0, "LoRA: learning rate of B as a multiple of A's; LoRA+ takes 16")
    dora: bool = option(False, "LoRA: also train the length of each row of the weights (DoRA)")
    beta: float = option(0.1, "DPO: how strongly the model is kept near the base")
    quantize: str | None = option(
        None, "LoRA: int8 or int4, keep the base's weights in 8 or 4 bits (QLoRA)"
    )
    train_embeddings: bool = option(
        False, "LoRA: also train embeddings and output whole, as new tokens need"
    )
    embeddings_from: int = option(
        0,
        "of embeddings and output train only the rows from this id on, such as the first new id of "
        "`llama3 extend-vocab`",
    )
    embeddings_lr: float = option(
        1.0, "learning rate of embeddings and output as a multiple of the others'"
    )
    pack: bool = option(False, "fill rows of max_seq_len with several samples each")
    block: int | None = option(None, f"tokens of a row of plain text; by default {BLOCK}")
    max_seq_len: int | None = option(
        None,
        "tokens of a row; longer samples are cut or dropped; "
        f"by default as the longest, at most {LONGEST} and what the model was trained for",
    )
    val_fraction: float = option(0.05, "share of the samples that is held out to measure the loss")
    val_data: str | None = option(None, "a file of held-out samples, instead of val_fraction")
    epochs: float = option(3.0, "how many times each sample is trained on")
    steps: int | None = option(None, "updates, instead of epochs")
    batch_size: int = option(8, "rows that each process computes at once")
    lr: float | None = option(
        None, "the highest learning rate; by default 2e-4, with method full 2e-5, with dpo 5e-5"
    )
    warmup: int = option(10, "updates until lr is reached, at most half of all")
    beta2: float = option(0.999, "AdamW's decay of the mean of the squared gradients")
    weight_decay: float = option(0.0, "AdamW's weight decay")
    eval_every: int = option(100, "updates between evaluations, which also save and print answers")
    eval_windows: int = option(512, "held-out rows to evaluate, at most")
    samples: int = option(2, "held-out prompts to answer at each evaluation")
    tool_form: str = option(
        "json", "how tool calls are written: json, python_list or function_tag; see docs/chat.md"
    )

    may_change: ClassVar[frozenset[str]] = TrainerSettings.may_change | {"epochs", "samples"}

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, known in (("method", METHODS), ("format", FORMATS), ("template", TEMPLATES)):
            if getattr(self, name) not in known:
                raise ValueError(
                    f"unknown {name} {getattr(self, name)!r}; use one of {', '.join(known)}"
                )
        for name in ("max_seq_len", "steps", "block"):
            if getattr(self, name) is not None:
                self.check(name, int, lambda n: n >= 1, "a positive integer")
        self.check("samples", int, lambda n: n >= 0, "an integer from 0 on")
        self.check("embeddings_from", int, lambda n: n >= 0, "an integer from 0 on")
        for name in ("epochs", "lora_plus", "embeddings_lr", "beta"):
            self.check(name, float, lambda x: 0 < x < math.inf, "a positive number")
        self.check("val_fraction", float, lambda x: 0 <= x < 1, "a number from 0 to below 1")
        for name in ("rslora", "dora", "train_embeddings", "pack"):
            self.check(name, bool, lambda _: True, "True or False")
        if self.quantize is not None:
            check_scheme(self.quantize)
        check_form(self.tool_form)
        self._check_combination()

    def _check_combination(self) -> None:
        """Raise a ValueError for two options that exclude each other, or one without effect."""
        if self.adapts:
            self.lora  # noqa: B018  its checks
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        of_lora = ("rank", "alpha", "dropout", "targets", "rslora", "lora_plus", "dora")
        given = [name for name in of_lora if getattr(self, name) != defaults[name]]
        if not self.adapts and given:
            raise ValueError(f"{given[0]} is for method lora, not {self.method}; leave it out")
        if not self.adapts and self.quantize is not None:
            raise ValueError(
                f"quantize and method {self.method}: quantized weights cannot be trained; "
                "use method lora, or leave quantize out"
            )
        if self.method in ("full", "embeddings") and self.train_embeddings:
            raise ValueError(
                f"train_embeddings: method {self.method} trains them anyway; leave it out"
            )
        if self.method == "dpo" and (self.train_embeddings or self.pack):
            name = "pack" if self.pack else "train_embeddings"
            raise ValueError(f"{name} and method dpo exclude each other; leave {name} out")
        if self.method != "dpo" and self.beta != defaults["beta"]:
            raise ValueError("beta is for method dpo; leave it out")
        if self.embeddings_from and self.method == "lora" and not self.train_embeddings:
            raise ValueError("embeddings_from needs train_embeddings: LoRA trains no row otherwise")
        if self.embeddings_from and self.method == "full":
            raise ValueError("embeddings_from: method full trains all rows; leave it out")
        if self.embeddings_from and self.parallel == "fsdp":
            raise ValueError("embeddings_from: parallel fsdp cannot train some rows only; use ddp")
        if self.val_data is not None and self.val_fraction != defaults["val_fraction"]:
            raise ValueError("val_data and val_fraction: give one of them")
        if self.steps is not None and self.epochs != defaults["epochs"]:
            raise ValueError("steps and epochs: give one of them")

    @property
    def adapts(self) -> bool:
        """Whether the result is an adapter."""
        return self.method in ADAPTERS

    @property
    def lora(self) -> LoRAConfig:
        """The adapter's options."""
        targets = tuple(name.strip() for name in self.targets.split(",") if name.strip())
        for name in targets:
            if name in OTHER_TARGETS:
                raise ValueError(f"targets: {name} is called {OTHER_TARGETS[name]} here")
        alpha = 2.0 * self.rank if self.alpha is None else self.alpha
        return LoRAConfig(
            self.rank, alpha, self.dropout, targets, rslora=self.rslora, dora=self.dora
        )

    @property
    def peak_lr(self) -> float:
        return LEARNING_RATES[self.method] if self.lr is None else self.lr
