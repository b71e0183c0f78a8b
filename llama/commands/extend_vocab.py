"""`llama3 extend-vocab`."""

from __future__ import annotations

import shlex
from typing import Annotated

from llama.commands.checkpoints import CHECKPOINT
from llama.commands.model import check_local
from llama.commands.terminal import print_report


def extend_vocab(
    base: Annotated[str, CHECKPOINT],
    *,
    data: Annotated[list[str], "a text file, or a folder of .txt and .md files; may be repeated"],
    tokens: Annotated[int, "how many new tokens to learn"],
    out: Annotated[str, "the folder to write"],
    scripts: Annotated[
        str | None,
        "scripts of the new tokens, such as Han,Hangul, or all; by default all but Latin, so that "
        "English and code keep their tokens",
    ] = None,
    initial: Annotated[
        str,
        "what new rows of the model are: shares (the mean of the tokens that each is made of, and "
        "as probable as it is in the text; runs the model), parts (only the first) or mean (of all "
        "old rows); these two need less memory",
    ] = "shares",
    to: Annotated[
        str | None, "meta (the official layout) or hf (Hugging Face); by default like BASE"
    ] = None,
) -> None:
    """Add tokens, learned from a text, to a checkpoint's vocabulary.

    The new rows of the model must be trained afterwards, with `llama3 finetune`.

    Examples:
        llama3 extend-vocab Llama-3-8B --data zh.txt --tokens 4000 --scripts Han --out base-zh
    """
    from llama.train.extend_vocabulary import extend_vocabulary

    check_local(base)
    names = None if scripts is None else scripts.replace(",", " ").split()
    done = extend_vocabulary(base, data, out, tokens, scripts=names, initial=initial, to=to)
    first, last = min(done.tokens.values()), max(done.tokens.values())
    n = max(done.characters, 1)
    print_report(
        f"{done.path}: {len(done.tokens):,} new tokens, ids {first} to {last}\n"
        f"the text takes {done.before:,} -> {done.after:,} tokens, "
        f"{done.before / n:.2f} -> {done.after / n:.2f} a character\n"
        "train the new rows next:\n"
        f"  llama3 finetune -m {shlex.quote(out)} --data {shlex.quote(data[0])} --format text "
        f"--method embeddings --embeddings_from {first} --out {shlex.quote(out + '-trained')}"
    )
