"""Runs many requests, a few queued at a time. Knows no task."""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Iterator, Sequence
from itertools import zip_longest

from llama.engine.request import Request
from llama.generation import Answer, Llama
from llama.text.detokenizer import Detokenizer
from llama.tokenizer import Tokenizer


def interleaved(groups: Sequence[Hashable], rows: int) -> list[int]:
    """An order of indices in which members of a group follow each other at most `rows` apart.

    A group's first member then leaves its context in a row of the cache, and each other one starts
    from it, while every step computes a member of `rows` groups.

    Args:
        groups: of each index. Groups come in the order of their first member.
        rows: of the cache.
    """
    members: dict[Hashable, list[int]] = {}
    for i, group in enumerate(groups):
        members.setdefault(group, []).append(i)
    blocks, order = list(members.values()), []
    for start in range(0, len(blocks), rows):
        for turn in zip_longest(*blocks[start : start + rows]):
            order += [i for i in turn if i is not None]
    return order


def run(
    llama: Llama, requests: Sequence[Request], stops: Sequence[Sequence[str]]
) -> Iterator[tuple[int, Answer]]:
    """Run requests, and yield (index, answer) as each ends.

    Args:
        stops: stop strings of each request.

    Raises:
        ValueError: a request cannot be run.
    """
    engine, decode = llama.engine, llama.tokenizer.decode_bytes
    waiting, running = deque(enumerate(requests)), dict[int, Answer]()
    try:
        while waiting or running:
            while waiting and len(running) < 2 * len(engine.cache[0].k):
                i, request = waiting.popleft()
                running[i] = Answer(engine, engine.add(request), Detokenizer(decode, stops[i]))
            engine.step()
            for i, answer in list(running.items()):
                while answer.unread and answer.finish_reason is None:
                    answer.read()
                if answer.error is not None:
                    raise answer.error
                if answer.finish_reason is not None:
                    yield i, running.pop(i)
    finally:
        for answer in running.values():
            answer.end()


def text_of(answer: Answer, tokenizer: Tokenizer) -> str:
    """The answer without special tokens, up to a stop string.

    As in lm-eval's own models, the text of a special token may hold a stop string, which ends the
    answer but is not part of it.
    """
    special = set(tokenizer.special_tokens.values())
    text = tokenizer.decode([i for i in answer.ids if i not in special])
    found = [at for at in map(text.find, answer.detokenizer.stop) if at >= 0]
    return text[: min(found)] if found else text
