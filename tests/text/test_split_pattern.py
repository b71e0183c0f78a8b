"""text/split_pattern.py: published patterns are accepted, those of quadratic time are not."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import pytest

from llama.checkpoints.formats.bpe_ranks import DIGITS_PATTERN, GPT2_PATTERN
from llama.text.rank_file import LLAMA3_PATTERN
from llama.text.split_pattern import check_pattern
from llama.tokenizer import Tokenizer

PUBLISHED = {
    "llama3": LLAMA3_PATTERN,
    "gpt2": GPT2_PATTERN,
    "digits": DIGITS_PATTERN,
    "r50k": r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s",
    "cl100k": r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+"
    r"| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]|\s+(?!\S)|\s",
    "qwen": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",
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
        ("a|" * 3000 + ".", "more than 4096 characters"),
    ],
)
def test_refused(pattern: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.model"
    path.write_bytes(b"".join(base64.b64encode(bytes([i])) + b" %d\n" % i for i in range(256)))
    (tmp_path / "tokenizer.model.json").write_text(json.dumps({"pat_str": pattern}))
    with pytest.raises(ValueError, match=f"tokenizer.model.json: the split pattern .*{message}"):
        Tokenizer(path)
