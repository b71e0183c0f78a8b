"""Text and a byte-pair encoding -> more tokens of it, by continued merges. Knows no checkpoint.

tiktoken merges the neighbours whose concatenation has the lowest id. Tokens with ids above all
others are merged last, so their merges continue what the old tokens leave.
"""

from __future__ import annotations

import heapq
from collections import Counter, defaultdict
from collections.abc import Iterable

from llama.common.progress import progress
from llama.text.long_text import one_piece_encoding, pieces
from llama.text.scripts import Scripts
from llama.tokenizer import Tokenizer

LEAST = 2  # times that a new token must occur
LONGEST = 64  # bytes of a new token: a longer one is a sentence that the text repeats


def learn_tokens(
    tokenizer: Tokenizer,
    texts: Iterable[str],
    n: int,
    scripts: Scripts,
    first_id: int | None = None,
) -> dict[bytes, int]:
    """`n` new tokens, each the most frequent pair of neighbours in the text as encoded so far.

    Every new token occurs in the text: a merge that would use up a new token is not made. Text
    without characters of `scripts` keeps its ids.

    Args:
        texts: to learn from; each is encoded by itself.
        scripts: only tokens that these contain are learned.
        first_id: of the new tokens, above all of `tokenizer`; None: the next one.

    Returns:
        {token: id}, in the order of ids; to be added to the tokenizer's ranks.

    Raises:
        ValueError: the text yields fewer than `n` tokens.
    """
    merges = Merges(tokenizer, _count_pieces(tokenizer, texts, scripts), scripts)
    found: list[bytes] = []
    first_id = tokenizer.n_words if first_id is None else first_id
    for i in progress(range(n), "learning tokens", n, "token"):
        token = merges.merge_most_frequent(first_id + i)
        if token is None:
            raise ValueError(
                f"the text yields no more than {i} new tokens, not {n}; give more text of these "
                "scripts, or " + (f"ask for {i} or fewer" if i else "name other scripts")
            )
        found.append(token)
    return {token: first_id + i for i, token in enumerate(found)}


def _count_pieces(tokenizer: Tokenizer, texts: Iterable[str], scripts: Scripts) -> Counter[str]:
    """How often each piece with a character of `scripts` occurs; see `llama.text.long_text`."""
    found: Counter[str] = Counter()
    for text in progress(texts, "reading text"):
        for part, is_token in tokenizer.text_tokens.split(text):
            if not is_token:
                found.update(
                    piece
                    for piece in pieces(tokenizer.pat_str, part)
                    if scripts.pattern.search(piece)
                )
    return found


class Merges:
    """Pieces of text as parts, which are ids of tokens, and what may be merged next.

    The parts of all pieces have consecutive places. A part that was merged into the one before it
    leaves its place empty.

    Args:
        counts: {piece: how often it occurs}.
    """

    def __init__(self, tokenizer: Tokenizer, counts: Counter[str], scripts: Scripts):
        self.scripts = scripts
        self.ids = dict(tokenizer.ranks)  # {bytes: id} of all tokens, new ones too
        self.tokens = {i: token for token, i in self.ids.items()}
        self.new: set[int] = set()
        self.occurrences: Counter[int] = Counter()  # of each id
        self.parts: list[int] = []
        self.before: list[int] = []  # the place of the part before this one; -1: none
        self.after: list[int] = []
        self.weights: list[int] = []  # how often a part's piece occurs
        self.pairs: Counter[tuple[int, int]] = Counter()  # of neighbours: how often they occur
        self.places: defaultdict[tuple[int, int], list[int]] = defaultdict(list)  # perhaps
        self.changed: set[tuple[int, int]] = set()
        self.waiting: list[tuple[int, bytes, tuple[int, int]]] = []  # (-count, token, pair)
        encoding = one_piece_encoding(tokenizer.ranks)
        for piece, count in counts.items():
            self._add_piece(encoding.encode_ordinary(piece), count)
        self._queue_changed()

    def merge_most_frequent(self, new_id: int) -> bytes | None:
        """Merge the most frequent pair everywhere; of several, that of the lowest bytes.

        Returns:
            The bytes of the new token, whose id is `new_id`; None: no pair is left.
        """
        while self.waiting:
            count, token, pair = heapq.heappop(self.waiting)
            if self.pairs[pair] == -count and token not in self.ids and self._leaves_rest(pair):
                self.ids[token], self.tokens[new_id] = new_id, token
                self.new.add(new_id)
                for place in sorted(set(self.places.pop(pair))):
                    if self._pair_at(place) == pair:
                        self._join(place, new_id)
                        self._join_known(place)
                self._queue_changed()
                return token
        return None

    def _leaves_rest(self, pair: tuple[int, int]) -> bool:
        """Whether new tokens of `pair` still occur elsewhere once it is merged."""
        used = Counter(pair)
        return all(
            self.occurrences[i] - used[i] * self.pairs[pair] >= LEAST for i in used if i in self.new
        )

    def _add_piece(self, ids: list[int], weight: int) -> None:
        first, last = len(self.parts), len(self.parts) + len(ids) - 1
        self.parts += ids
        self.weights += [weight] * len(ids)
        self.before += [-1, *range(first, last)]
        self.after += [*range(first + 1, last + 1), -1]
        for place in range(first, last):
            self._count(place, weight)

    def _pair_at(self, place: int) -> tuple[int, int] | None:
        """The ids of the part at `place` and the next one; None: there is no next one."""
        after = self.after[place]
        return (self.parts[place], self.parts[after]) if after >= 0 else None

    def _count(self, place: int, times: int) -> None:
        """Count the pair at `place`, if there is one, `times` more or less."""
        if place >= 0 and (pair := self._pair_at(place)):
            self.pairs[pair] += times
            self.changed.add(pair)
            if times > 0:
                self.places[pair].append(place)

    def _join(self, place: int, joined: int) -> None:
        """Make the part at `place` and the next one the token `joined`."""
        second, weight = self.after[place], self.weights[place]
        first, third = self.before[place], self.after[second]
        for start in (first, place, second):
            self._count(start, -weight)
        self.occurrences.update({joined: weight})
        self.occurrences.subtract({self.parts[place]: weight})
        self.occurrences.subtract({self.parts[second]: weight})
        self.parts[place], self.parts[second] = joined, -1
        self.after[place], self.after[second] = third, -1
        if third >= 0:
            self.before[third] = place
        for start in (first, place):
            self._count(start, weight)

    def _join_known(self, place: int) -> None:
        """Join the part at `place` to neighbours with which it is a token already.

        An old token that its own bytes never merge to can result from a new one.
        """
        while True:
            options = []
            for start in (self.before[place], place):
                pair = self._pair_at(start) if start >= 0 else None
                joined = pair and self.ids.get(self.tokens[pair[0]] + self.tokens[pair[1]])
                if joined is not None:
                    options.append((joined, start))
            if not options:
                return
            joined, place = min(options)
            self._join(place, joined)

    def _queue_changed(self) -> None:
        """Queue the pairs whose counts have changed."""
        for pair in self.changed:
            count, token = self.pairs[pair], self.tokens[pair[0]] + self.tokens[pair[1]]
            if count >= LEAST and len(token) <= LONGEST and self.scripts.contain(token):
                heapq.heappush(self.waiting, (-count, token, pair))
        self.changed.clear()
