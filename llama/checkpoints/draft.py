"""Opens the checkpoint of a draft model, which must have the vocabulary of the model it serves."""

from __future__ import annotations

from pathlib import Path

import torch

from llama.checkpoints.load import load_model
from llama.checkpoints.memory import check_memory
from llama.checkpoints.open import open_checkpoint, open_tokenizer
from llama.model import Transformer
from llama.tokenizer import Tokenizer


def load_draft(
    path: str | Path,
    tokenizer: Tokenizer,
    *,
    rows: int,
    room: int,
    device: torch.device,
    dtype: torch.dtype,
) -> Transformer:
    """The model of a checkpoint, for a cache of `rows` rows of `room` positions.

    Raises:
        FileNotFoundError, ValueError: as for any checkpoint; or its tokens are not those of
            `tokenizer`.
    """
    try:
        source = open_checkpoint(path)
        own = open_tokenizer(source)
    except FileNotFoundError as e:
        message = str(e).replace("ckpt_dir", "draft").replace("give the path of", "put there")
        raise FileNotFoundError(message) from None
    check_vocabulary(path, own, tokenizer)
    args = source.args(max_seq_len=room, max_batch_size=rows)
    check_memory(source, args, device, dtype)
    model = load_model(source, args, device, dtype)
    unused = own.pad_to(model.vocab_size)
    model.unused = torch.tensor(unused, device=device) if unused else None
    return model


def check_vocabulary(path: str | Path, own: Tokenizer, tokenizer: Tokenizer) -> None:
    """Raise a ValueError unless both tokenizers have the same ids, and these the same texts.

    Names of special tokens may differ, as those of reserved ones do in Meta's and Hugging Face's
    files of one release: a proposal is an id, and the model checks it.
    """
    special = [sorted(each.special_tokens.values()) for each in (own, tokenizer)]
    if own.ranks == tokenizer.ranks and special[0] == special[1]:
        return
    raise ValueError(
        f"the draft {path} has another vocabulary ({own.n_words} tokens) than the model "
        f"({tokenizer.n_words}); use a draft of the same model family"
    )
