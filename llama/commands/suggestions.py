"""One line for each mistake in a command line, with what to type instead. Knows no verb's work."""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches
from typing import Any

# Verbs of other programs, and what does that here.
OTHER_VERBS = {
    "run": "type `llama3 chat -m CHECKPOINT`, or `llama3 complete TEXT -m CHECKPOINT`",
    "generate": "type `llama3 complete TEXT`",
    "list": "checkpoints are folders and files of yours; `llama3 inspect PATH` describes one, and "
    "`llama3 demo` prints the folder of the demo model",
    "show": "type `llama3 inspect PATH`",
    "pull": "type `llama3 download OWNER/NAME`",
    "evaluate": "type `llama3 eval --tasks TASK`",
    "sft": "type `llama3 finetune --data FILE --out DIR`",
    "fuse": "type `llama3 merge BASE ADAPTER OUT`",
    "export": "type `llama3 convert SRC DST --to hf`",
}  # fmt: skip
OTHER_VERBS |= {
    word: OTHER_VERBS[verb]
    for word, verb in {"ls": "list", "get": "pull", "fetch": "pull", "lora": "sft"}.items()
}
# Flags of other programs and of earlier versions.
OTHER_FLAGS = {
    "model": "ckpt_dir",
    "checkpoint": "ckpt_dir",
    "tokenizer": "tokenizer_path",
    "max_tokens": "max_gen_len",
    "max_new_tokens": "max_gen_len",
    "n_predict": "max_gen_len",
    "context": "max_seq_len",
    "max_model_len": "max_seq_len",
    "ctx_size": "max_seq_len",
    "batch": "max_batch_size",
    "parallel": "max_batch_size",
    "max_num_seqs": "max_batch_size",
    "batch_size": "max_batch_size",
    "temp": "temperature",
    "output": "out",
    "quantization": "quantize",
    "served_model_name": "model_name",
    "alias": "model_name",
    "system_prompt": "system",
    "lora": "adapter",
    "lora_path": "adapter",
    "adapter_path": "adapter",
    "file": "prompt_file",
    "learning_rate": "lr",
    "lora_r": "rank",
    "lora_rank": "rank",
    "lora_alpha": "alpha",
    "lora_dropout": "dropout",
    "lora_target": "targets",
    "target_modules": "targets",
    "use_rslora": "rslora",
    "use_dora": "dora",
    "num_train_epochs": "epochs",
    "num_epochs": "epochs",
    "max_steps": "steps",
    "iters": "steps",
    "per_device_train_batch_size": "batch_size",
    "gradient_accumulation_steps": "accumulate",
    "grad_accumulation_steps": "accumulate",
    "gradient_checkpointing": "recompute",
    "grad_checkpoint": "recompute",
    "warmup_steps": "warmup",
    "packing": "pack",
    "cutoff_len": "max_seq_len",
    "max_length": "max_seq_len",
    "max_seq_length": "max_seq_len",
    "model_max_length": "max_seq_len",
    "block_size": "block",
    "load_in_4bit": "quantize",
    "load_in_8bit": "quantize",
    "fine_tune_type": "method",
    "train_data": "data",
    "train_file": "data",
    "dataset": "data",
    "validation_file": "val_data",
    "output_dir": "out",
    "eval_steps": "eval_every",
}


def usage_message(error: Any, verb: str | None, parameters: Sequence[Any]) -> str:
    """The message of an error of the parser, on one line.

    Args:
        error: a UsageError.
        verb: None if no verb was given.
        parameters: those of the verb, or of `llama3` itself.
    """
    kind = type(error).__name__
    help = f"`llama3 {verb} --help`" if verb else "`llama3 --help`"
    flag = getattr(error, "option_name", None)
    if kind == "NoSuchOption":
        meant = unknown_flag(str(flag), [name for p in parameters for name in p.opts])
        return f"no flag {flag}" + (f". Did you mean {meant}?" if meant else f"; {help} lists them")
    if kind == "MissingParameter" and error.param is not None:
        explained = error.param.help
        return f"{verb} needs {typed_name(error.param)}: {explained}; {help} has examples"
    if flag is not None and "requires an argument" in error.message:
        purpose = next((p.help for p in parameters if flag in p.opts), "see " + help)
        return f"{flag} needs a value: {purpose}"
    line = " ".join(error.format_message().split()).rstrip(".")
    return f"{line}; {help} explains the flags"


def typed_name(parameter: Any) -> str:
    """`PROMPT` or `--scheme`."""
    if parameter.param_type_name == "argument":
        return str(parameter.name).upper()
    return str(parameter.opts[0])


def unknown_verb(word: str, verbs: Sequence[str]) -> str:
    """The message about a word that is no verb."""
    found = f"no verb {word!r}"
    if close := get_close_matches(word, verbs, 1):
        return f"{found}. Did you mean {close[0]}?"
    return f"{found}; {OTHER_VERBS.get(word, '`llama3 --help` lists the verbs')}"


def unknown_flag(flag: str, known: list[str]) -> str | None:
    """The flag of `known` that was probably meant by `flag`; they begin with dashes."""
    name = flag.lstrip("-").partition("=")[0].replace("-", "_")
    other = f"--{OTHER_FLAGS.get(name, '')}"
    if other in known:
        return other
    close = get_close_matches(f"--{name}", known, 1) if len(name) > 1 else []
    return close[0] if close else None


def too_many_words(command: Any, word: str) -> str:
    """The message about a word that belongs to no flag and no argument of a verb."""
    arguments = [p for p in command.params if p.param_type_name == "argument"]
    names = " ".join(map(typed_name, arguments))
    takes = f"takes {names}" if names else "takes flags only"
    quote = "; quote a text with spaces" if "PROMPT" in names else ""
    return f"too many words: {word!r}; llama3 {command.name} {takes}{quote}"
