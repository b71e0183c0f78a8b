"""train/continued_merges.py: learned tokens. Oracle: tiktoken, asked again after every merge."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest
import tiktoken
from hypothesis import example, given, settings
from hypothesis import strategies as st

from llama.text.long_text import pieces
from llama.text.scripts import Scripts
from llama.train import continued_merges
from llama.train.continued_merges import learn_tokens
from tests.vocabularies import extended, tokenizer_of_bytes

HAN = Scripts(["Han"])
CHINESE = "文件系统的文件名。系统文件。我们在文件系统里找文件 文件系统 root 文件。" * 3

MAKES_AN_OLD_TOKEN = [
    " 文件。 件。e文件件件件件件件件件e。件e e文。。件文",
    "件 文。e",
    "e件文文文件。件件e。件件件件e文件。件",
    "e文件件文件文件。件件件件文件 件文文 件。。e件e件。e",
]


def slow_learner(
    ranks: dict[bytes, int], pat_str: str, texts: list[str], n: int, scripts: Scripts
) -> list[bytes]:
    """The same choice of pairs, with every text encoded anew by tiktoken for each token."""
    found: list[bytes] = []
    for _ in range(n):
        new = {token: 1000 + i for i, token in enumerate(found)}
        encoding = tiktoken.Encoding(
            "slow", pat_str=pat_str, mergeable_ranks=ranks | new, special_tokens={}
        )
        pairs: Counter[tuple[bytes, bytes]] = Counter()
        singles: Counter[bytes] = Counter()
        for text in texts:
            for piece in pieces(pat_str, text):
                tokens = [encoding.decode_single_token_bytes(i) for i in encoding.encode(piece)]
                pairs.update(pairwise(tokens))
                singles.update(tokens)

        def leaves_rest(
            pair: tuple[bytes, bytes],
            new: dict[bytes, int] = new,
            singles: Counter[bytes] = singles,
            pairs: Counter[tuple[bytes, bytes]] = pairs,
        ) -> bool:
            return all(
                part not in new or singles[part] - pair.count(part) * pairs[pair] >= 2
                for part in pair
            )

        fits = [
            (-count, a + b)
            for (a, b), count in pairs.items()
            if count >= 2 and len(a + b) <= 64 and scripts.contain(a + b) and leaves_rest((a, b))
        ]
        if not fits:
            break
        found.append(min(fits)[1])
    return found


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.text("ab文件 e。é", min_size=1, max_size=40), min_size=1, max_size=4),
    st.sampled_from([None, ["Han"], ["all"]]),
    st.booleans(),
)
@example(MAKES_AN_OLD_TOKEN, ["all"], True)
def test_same_as_tiktoken_after_every_merge(
    texts: list[str], names: list[str] | None, with_unreachable: bool
) -> None:
    # Two old tokens that merging never produces: new ones make them.
    more = ["文件件".encode(), b"ab", "e文".encode()] if with_unreachable else [b"ab"]
    tokenizer = tokenizer_of_bytes(more)
    scripts = Scripts(names)
    expected = slow_learner(tokenizer.ranks, tokenizer.pat_str, texts, 12, scripts)
    if not expected:
        return
    learned = learn_tokens(tokenizer, texts, len(expected), scripts)
    assert list(learned) == expected
    assert list(learned.values()) == list(
        range(tokenizer.n_words, tokenizer.n_words + len(expected))
    )


def test_every_new_token_occurs_and_the_rest_stays() -> None:
    tokenizer = tokenizer_of_bytes()
    text = CHINESE + "the man and the cat, 100,000 éñ Ω фы 파일 ファイル"
    longer = extended(tokenizer, learn_tokens(tokenizer, [text], 12, HAN))
    ids = longer.encode(text, bos=False)
    assert set(range(tokenizer.n_words, tokenizer.n_words + 12)) <= set(ids)
    assert longer.decode(ids) == text
    assert len(ids) < len(tokenizer.encode(text, bos=False)) - 80


@settings(max_examples=200, deadline=None)
@given(text=st.text(st.characters(exclude_categories=("Cs", "Cn")), max_size=60))
def test_text_of_other_scripts_keeps_its_ids(text: str) -> None:
    han = HAN.pattern
    other = han.sub("", text)
    assert LONGER.encode(other) == PLAIN.encode(other)


PLAIN = tokenizer_of_bytes()
LONGER = extended(PLAIN, learn_tokens(PLAIN, [CHINESE, "。、《》々〇𠀀𠀀"], 14, HAN))


def test_published_vocabulary(llama3_tokenizer_path: Path) -> None:
    from llama.tokenizer import Tokenizer

    tokenizer = Tokenizer(llama3_tokenizer_path)
    longer = extended(tokenizer, learn_tokens(tokenizer, [CHINESE], 3, Scripts()))
    assert longer.n_words == 128259
    assert len(longer.encode(CHINESE)) < len(tokenizer.encode(CHINESE))
    code = Path(continued_merges.__file__).read_text("utf-8")
    assert longer.encode(code) == tokenizer.encode(code)


def test_too_few_pairs() -> None:
    with pytest.raises(
        ValueError, match=r"than 0 new tokens, not 5; give more .*, or name other scripts"
    ):
        learn_tokens(PLAIN, ["English only, English only"], 5, HAN)
    with pytest.raises(ValueError, match=r"no more than \d\d new tokens, not 5000;"):
        learn_tokens(PLAIN, [CHINESE], 5000, HAN)
