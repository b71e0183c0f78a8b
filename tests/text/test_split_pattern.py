"""text/split_pattern.py: published patterns are accepted, those of quadratic time are not."""

from __future__ import annotations

from pathlib import Path

import pytest

from llama.checkpoints.formats.bpe_ranks import DIGITS_PATTERN, GPT2_PATTERN
from llama.text.rank_file import LLAMA3_PATTERN
from llama.text.split_pattern import check_pattern
from llama.tokenizer import Tokenizer
from tests.test_tokenizer import write_small

PUBLISHED = {
    "llama3": LLAMA3_PATTERN,
    "gpt2": GPT2_PATTERN,
    "digits": DIGITS_PATTERN,
    "r50k": r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s",
    "cl100k": r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+"
    r"| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]|\s+(?!\S)|\s",
    "qwen": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",
    "gpt-4o": r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+"
    r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    "deepseek-v3": r"\p{N}{1,3}|[一-龥\u3040-ゟ\u30a0-ヿ]+|[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~]"
    r"[A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+",
    "kimi-k2": r"[\p{Han}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*"
    r"[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    "bloom": r" ?[^(\s|[.,!?…。，、।۔،])]+",  # noqa: RUF001
    "starcoder": r"\p{N}|'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
    r"|\s+",
    "counted spaces, as jais-2": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s{512}(?!\S)|\s{2}(?!\S)|\s{1}",
    "flags of the whole pattern": r"(?i)'s|\s+(?!\S)|.",
    "a lookbehind in another alternative": r"a+|(?<=b)c|(?<!\S)d|.",
    "a class of brackets": r"[()+*\]]+(?![)*+])|.",
    "a bounded lookahead": r"a(?=b{1,3})|.",
    "escapes": r"\(\?=\*\+(?!\*)|\\1|.",
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_accepted(name: str) -> None:
    check_pattern(PUBLISHED[name], "a.json")


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        (r"(?=.*b)a|.", "a repeat without an end in a lookahead"),
        (r"(?!(x|y+)z)a|.", "a repeat without an end"),
        (r"(?<=a{3,})b|.", "a repeat without an end"),
        (r"((?!(?:[a-z]*)!))a|.", "a repeat without an end"),
        (r"(a)\1|.", "a back-reference"),
        ("(?x) a # a parenthesis )\n|.", "the flag x"),
        ("(?ix: a # ( \n)|.", "the flag x"),
        (r"(?#()(?=.*b)a|.", "a repeat without an end in a lookahead"),
        (r"[\s\S]+?(?=zz)|[\s\S]", "a lazy repeat"),
        (r"(?:a|b)*?(?!c)|[\s\S]", "a lazy repeat"),
        (r"a{2,}?(?=c)|[\s\S]", "a lazy repeat"),
        (r"a+(?<=b)|[\s\S]", "a lookbehind after a repeat"),
        (r"(?:a+|c)d?(?:(?<!b)e)|[\s\S]", "a lookbehind after a repeat"),
        ("a|" * 3000 + ".", "more than 4096 characters"),
    ],
)
def test_refused(pattern: str, message: str, tmp_path: Path) -> None:
    path = write_small(tmp_path, {"pat_str": pattern})
    with pytest.raises(ValueError, match=f"tokenizer.model.json: the split pattern .*{message}"):
        Tokenizer(path)
