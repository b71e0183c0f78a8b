"""Chat formats with tools: of this library and of Meta."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from llama.tokenizer import ChatFormat, Tokenizer


@pytest.fixture(scope="module")
def ours(llama3_tokenizer_path: Path) -> ChatFormat:
    return ChatFormat(Tokenizer(llama3_tokenizer_path, "llama3.1"))


@pytest.fixture(scope="module")
def meta(llama3_tokenizer_path: Path) -> Any:
    from llama_models.llama3.chat_format import ChatFormat as MetaChatFormat
    from llama_models.llama3.tokenizer import Tokenizer as MetaTokenizer

    return MetaChatFormat(MetaTokenizer(llama3_tokenizer_path))
