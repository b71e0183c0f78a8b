"""What one row of a data file says, whatever its format; held-out examples.

Knows nothing about files or token ids.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from llama.text.messages import Message
from llama.text.tool_prompt import Tool

FEW_DOCUMENTS = 20  # of fewer, the end of each is held out


@dataclass(frozen=True)
class Conversation:
    """A dialog with at least one answer.

    Attributes:
        where: file and row, for messages.
        dialog: its messages; the last is the assistant's.
        tools: what the model may call.
        not_trained: indices of the assistant's messages that are context only.
        dropped_turns: how many turns of the assistant before the first user's were left out.
    """

    where: str
    dialog: tuple[Message, ...]
    tools: tuple[Tool, ...] = ()
    not_trained: frozenset[int] = frozenset()
    dropped_turns: int = 0


@dataclass(frozen=True)
class Instruction:
    """A row of Alpaca's format: `input` may be empty."""

    where: str
    instruction: str
    input: str
    output: str


@dataclass(frozen=True)
class Document:
    """A text without roles.

    Attributes:
        begins, ends: whether the text has the document's beginning, and its end.
    """

    where: str
    text: str
    begins: bool = True
    ends: bool = True


@dataclass(frozen=True)
class Preference:
    """Two answers to one prompt, of which `chosen` is better."""

    where: str
    prompt: tuple[Message, ...]
    chosen: Message
    rejected: Message
    tools: tuple[Tool, ...] = ()


Example = Conversation | Instruction | Document | Preference


def split_examples(
    examples: Sequence[Example], fraction: float, seed: int = 0
) -> tuple[list[Example], list[Example]]:
    """(examples to train on, held-out examples). The same arguments give the same parts.

    Examples that say the same are never in both parts. Of fewer than 20 documents, the end of
    each is held out instead, as in `llama3 train`.

    Args:
        fraction: share of the distinct examples that is held out, at least one; 0 means none.

    Raises:
        ValueError: the fraction is not from 0 to below 1, or there are too few examples.
    """
    if not 0 <= fraction < 1:
        raise ValueError(f"the held-out fraction must be from 0 to below 1, not {fraction}")
    if not fraction:
        return list(examples), []
    documents = [example for example in examples if isinstance(example, Document)]
    if len(documents) == len(examples) and len(examples) < FEW_DOCUMENTS:
        return _split_texts(documents, fraction)
    keys = [_content_key(example) for example in examples]
    distinct = list(dict.fromkeys(keys))
    if len(distinct) < 2:
        raise ValueError(
            "one example cannot be split into training and held-out examples (equal ones count "
            "once); give more data, --val_data FILE, or --val_fraction 0"
        )
    count = min(max(1, round(fraction * len(distinct))), len(distinct) - 1)
    order = np.random.default_rng(seed).permutation(len(distinct))
    held = {distinct[i] for i in order[:count]}
    parts: tuple[list[Example], list[Example]] = ([], [])
    for key, example in zip(keys, examples, strict=True):
        parts[key in held].append(example)
    return parts


def _split_texts(
    documents: Sequence[Document], fraction: float
) -> tuple[list[Example], list[Example]]:
    train: list[Example] = []
    held: list[Example] = []
    for document in documents:
        cut = round(len(document.text) * (1 - fraction))
        first, last = document.text[:cut], document.text[cut:]
        if first:
            train.append(dataclasses.replace(document, text=first, ends=not last))
        if last:
            held.append(dataclasses.replace(document, text=last, begins=not first))
    return train, held


def _content_key(example: Example) -> bytes:
    """A digest of what an example says; where it stands is not part of it."""
    content = repr(dataclasses.replace(example, where=""))
    return hashlib.sha256(content.encode("utf-8", "surrogatepass")).digest()
