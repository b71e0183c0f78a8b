"""Data files -> the rows to train on and held-out rows, and what is said about them.

Knows no model.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np

from llama.text.tool_prompt import ToolForm
from llama.tokenizer import Tokenizer
from llama.train.encoding import ExampleEncoder, Template, encode_examples
from llama.train.example_files import read_examples
from llama.train.examples import Document, Example, Preference, split_examples
from llama.train.finetune_settings import BLOCK, LONGEST, FinetuneSettings
from llama.train.preference import Pairs
from llama.train.rows import Row, Rows

TEXT_PROMPT = 32  # tokens of plain text that a sample continues


class Answer(NamedTuple):
    """A prompt of the held-out rows, and the ids that follow it there."""

    prompt: list[int]
    reference: list[int]


@dataclass(frozen=True)
class Samples:
    """The data of a run.

    Attributes:
        train, validation: None: nothing is held out. Pairs for method dpo.
        max_seq_len: most tokens of a row.
        counts: {reason: how many samples or turns were left out}.
        digest: a hash of all rows.
    """

    train: Rows | Pairs
    validation: Rows | Pairs | None
    max_seq_len: int
    counts: Counter[str]
    digest: str

    def answers(self, count: int) -> list[Answer]:
        """`count` prompts of held-out rows, spread evenly, with their first answers."""
        held = self.validation if self.validation is not None else self.train
        rows = held.rows[:: 2 if isinstance(held, Pairs) else 1]  # chosen answers
        chosen = np.linspace(0, len(rows) - 1, min(count, len(rows)), dtype=int)
        return [first_answer(rows[i]) for i in chosen]

    def summary(self) -> list[str]:
        """Lines about the rows, and about what was left out."""
        train, held = self.train, self.validation
        lines = [
            f"rows: {len(train.rows):,} of up to {self.max_seq_len:,} tokens; {train.tokens:,} "
            f"tokens, {train.targets:,} of them trained; "
            + (f"{len(held.rows):,} rows held out" if held is not None else "none held out")
        ]
        if train.pack:
            full = (train.tokens - len(train.rows)) / (len(train) * self.max_seq_len)
            lines.append(f"packed: {len(train):,} rows, {full:.0%} full")
        both = [rows for rows in (train, held) if rows is not None]
        cut, dropped = sum(rows.cut for rows in both), sum(rows.dropped for rows in both)
        counts = {reason: count for reason, count in self.counts.items() if count}
        if cut:
            counts[f"cut to {self.max_seq_len} tokens"] = cut
        if dropped:
            why = "a pair is longer than" if isinstance(train, Pairs) else "no answer begins within"
            counts[f"dropped: {why} {self.max_seq_len} tokens"] = dropped
        return lines + [f"{count:,} {reason}" for reason, count in counts.items()]


def first_answer(row: Row) -> Answer:
    """The first run of trained ids and what comes before it; of a text its beginning."""
    ids = row.ids.tolist()
    start = int(np.argmax(row.trained))
    end = start + int(np.argmin([*row.trained[start:], False]))
    if start == 1 and end == len(ids):  # plain text
        start = min(TEXT_PROMPT, len(ids) - 1)
    return Answer(ids[:start], ids[start:end])


def check_ids(rows: Sequence[Row], tokenizer: Tokenizer, n_rows: int) -> None:
    """Check that the model has a row of its embedding for every id.

    Raises:
        ValueError: a token of the tokenizer has none.
    """
    highest = max(int(row.ids.max()) for row in rows)
    if highest >= n_rows:
        raise ValueError(
            f"the data need the token {tokenizer.decode([highest])!r}, whose id {highest} is "
            f"beyond the model's {n_rows} rows; give the tokenizer that came with the checkpoint"
        )


def load_samples(
    paths: Sequence[str | Path],
    settings: FinetuneSettings,
    tokenizer: Tokenizer,
    context: int,
    vocab_size: int,
) -> Samples:
    """Read, split, encode and cut the samples in `paths`.

    Args:
        context: tokens in a row that the base was trained for.
        vocab_size: rows of its embedding.

    Raises:
        FileNotFoundError, ValueError: see `read_examples`, `encode_examples` and `Rows`.
    """
    s, counts = settings, Counter[str]()
    examples = read_examples(paths, s.format, counts)
    if s.val_data is not None:
        train, held = examples, read_examples([s.val_data], s.format, counts)
    else:
        train, held = split_examples(examples, s.val_fraction, s.seed)
    _check_combination(s, train)
    if held:
        _check_combination(s, held)
    block = min(s.block or BLOCK, s.max_seq_len or context)  # longer blocks would be cut
    encoded = [_encode(part, s, tokenizer, block) for part in (train, held)]
    for part in filter(None, encoded):
        check_ids(part, tokenizer, vocab_size)
    max_seq_len = s.max_seq_len
    if max_seq_len is None:
        longest = max((len(row.ids) - 1 for part in encoded for row in part), default=1)
        max_seq_len = min(longest, s.block or LONGEST, context)
    elif max_seq_len > context:
        raise ValueError(f"max_seq_len must be at most {context}, which the base was trained for")
    rows = _batched(encoded[0], s, max_seq_len, tokenizer.pad_id)
    held_out = _batched(encoded[1], s, max_seq_len, tokenizer.pad_id) if encoded[1] else None
    return Samples(rows, held_out, max_seq_len, counts, _digest(encoded))


def _encode(
    examples: Sequence[Example], settings: FinetuneSettings, tokenizer: Tokenizer, block: int
) -> list[Row]:
    """Rows; of preferences chosen and rejected ones by turns."""
    template, form = cast(Template, settings.template), cast(ToolForm, settings.tool_form)
    if settings.method != "dpo":
        return encode_examples(examples, tokenizer, block=block, template=template, tool_form=form)
    encoder = ExampleEncoder(tokenizer, template, form)
    pairs = [encoder.pair(example) for example in examples if isinstance(example, Preference)]
    return [row for pair in pairs for row in pair]


def _batched(
    rows: Sequence[Row], settings: FinetuneSettings, max_seq_len: int, pad_id: int
) -> Rows | Pairs:
    s = settings
    common: dict[str, Any] = {
        "max_seq_len": max_seq_len,
        "batch_size": s.batch_size,
        "accumulate": s.accumulate,
        "seed": s.seed,
        "pad_id": pad_id,
    }
    if s.method == "dpo":
        return Pairs(list(zip(rows[::2], rows[1::2], strict=True)), **common)
    return Rows(rows, pack=s.pack, **common)


def _check_combination(settings: FinetuneSettings, examples: Sequence[Example]) -> None:
    """Raise a ValueError for an option that the kind of the data makes useless."""
    text = all(isinstance(example, Document) for example in examples)
    wants_pairs = settings.method == "dpo"
    for example in examples:
        if isinstance(example, Preference) != wants_pairs:
            remedy = (
                "method dpo needs a chosen and a rejected answer; use method lora"
                if wants_pairs
                else "a chosen and a rejected answer are for method dpo"
            )
            raise ValueError(f"{example.where}: {remedy}")
    if settings.block is not None and not text:
        raise ValueError("block is for plain text; samples are cut by max_seq_len")
    if settings.pack and text:
        raise ValueError("pack and plain text: its rows are full already; leave pack out")


def _digest(parts: Sequence[Sequence[Row]]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(f"{len(part)} rows".encode())
        for row in part:
            digest.update(row.ids.tobytes() + row.trained.tobytes())
    return digest.hexdigest()[:16]
