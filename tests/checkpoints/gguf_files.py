"""Small GGUF files and vocabularies for tests, written by the `gguf` and `tokenizers` packages."""

from __future__ import annotations

import base64
import functools
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import tiktoken
import tokenizers
from gguf import GGMLQuantizationType as Q
from tokenizers import models, pre_tokenizers, trainers
from torch import Tensor

from llama.checkpoints.formats.gguf import GGUFSource

DIM, HIDDEN, HEADS, KV_HEADS, LAYERS, VOCAB = 256, 768, 4, 2, 2, 500
KEYS: dict[str, Any] = {
    "general.architecture": "llama",
    "llama.block_count": LAYERS,
    "llama.embedding_length": DIM,
    "llama.feed_forward_length": HIDDEN,
    "llama.attention.head_count": HEADS,
    "llama.attention.head_count_kv": KV_HEADS,
    "llama.rope.freq_base": 100000.0,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
}
LAYER = {  # the format's documented name: Meta's name
    "attn_q": "attention.wq",
    "attn_k": "attention.wk",
    "attn_v": "attention.wv",
    "attn_output": "attention.wo",
    "ffn_gate": "feed_forward.w1",
    "ffn_down": "feed_forward.w2",
    "ffn_up": "feed_forward.w3",
    "attn_norm": "attention_norm",
    "ffn_norm": "ffn_norm",
}
META_NAMES = {
    "token_embd.weight": "tok_embeddings.weight",
    "output_norm.weight": "norm.weight",
    "output.weight": "output.weight",
} | {
    f"blk.{i}.{theirs}.weight": f"layers.{i}.{metas}.weight"
    for i in range(LAYERS)
    for theirs, metas in LAYER.items()
}
SPECIAL = {"<|endoftext|>": 497, "<|im_start|>": 498, "<|im_end|>": 499}


def weights(tied: bool = True, vocab: int = VOCAB) -> dict[str, np.ndarray]:
    """Random fp32 weights under the file's names."""
    rng = np.random.default_rng(0)
    kv = DIM // HEADS * KV_HEADS
    shapes: dict[str, tuple[int, ...]] = {"token_embd": (vocab, DIM), "output_norm": (DIM,)}
    if not tied:
        shapes["output"] = (vocab, DIM)
    for i in range(LAYERS):
        shapes |= {f"blk.{i}.{name}": (DIM, DIM) for name in ("attn_q", "attn_output")}
        shapes |= {f"blk.{i}.{name}": (kv, DIM) for name in ("attn_k", "attn_v")}
        shapes |= {f"blk.{i}.{name}": (HIDDEN, DIM) for name in ("ffn_gate", "ffn_up")}
        shapes |= {f"blk.{i}.{name}": (DIM,) for name in ("attn_norm", "ffn_norm")}
        shapes[f"blk.{i}.ffn_down"] = (DIM, HIDDEN)
    return {
        f"{name}.weight": rng.standard_normal(shape, np.float32) for name, shape in shapes.items()
    }


def write_gguf(
    path: Path,
    tensors: dict[str, np.ndarray] | None = None,
    keys: dict[str, Any] | None = None,
    raw: dict[str, tuple[np.ndarray, Q]] | None = None,
) -> Path:
    """Write `tensors` (fp32), `raw` tensors (blocks) and KEYS | `keys`, without those of None."""
    keys = KEYS | (keys or {})
    writer = gguf.GGUFWriter(path, keys["general.architecture"])
    for key, value in keys.items():
        if key == "general.architecture" or value is None:
            continue
        if isinstance(value, list):
            writer.add_array(key, value)
        else:
            kind = gguf.GGUFValueType.get_type(value)
            kind = gguf.GGUFValueType.UINT32 if type(value) is int else kind
            writer.add_key_value(key, value, kind)
    for name, values in (weights() if tensors is None else tensors).items():
        writer.add_tensor(name, values)
    for name, (blocks, kind) in (raw or {}).items():
        writer.add_tensor(name, blocks, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


PRE_TOKENIZERS = {  # as in the published tokenizer.json
    "gpt-2": pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
    "smollm": pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    ),
    "llama-bpe": pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(
                tokenizers.Regex(
                    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
                    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
                ),
                behavior="isolated",
            ),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    ),
}
TEXT = (
    "The quick brown fox don't can't we'll I'VE it's O'Neil's jumps over 3 lazy dogs in 2024 "
    "1,234.56 x=f(y); return{} def __init__(self): #!/usr/bin/env <html> a_b-c ~~ ... ?! “quoted” "
    "— naïve café Zürich Ωμέγα Привет мир 你好世界 こんにちは 한국어 العربية हिन्दी 😀👍🏽 "
    "👨‍👩‍👧 ½ Ⅷ ٣٤٥ e\u0301 \u00a0 \u2003"
)
GAPS = (" ", " ", " ", "", "  ", "   ", "\n", "\n\n", " \n ", "\t", "\r\n", " \t\n\n  ")


def mixed_texts(n: int) -> list[str]:
    """Words of many scripts, numbers, code and runs of whitespace, in random order."""
    rng = random.Random(0)
    words = TEXT.split(" ")
    texts = ["", " ", "\n", "  7", "a 1", "7  ", "'s", "' s", "12345", "    return 12 ** 3  \n\n"]
    while len(texts) < n:
        parts = (rng.choice(words) + rng.choice(GAPS) for _ in range(rng.randrange(1, 30)))
        texts.append(rng.choice(GAPS) + "".join(parts))
    return texts


def reference_bpe(
    vocab: dict[str, int], merges: list[str], pre: str, ignore_merges: bool
) -> tokenizers.Tokenizer:
    pairs = [(left, right) for left, right in (merge.split(" ") for merge in merges)]
    bpe = tokenizers.Tokenizer(models.BPE(vocab, pairs, ignore_merges=ignore_merges))
    bpe.pre_tokenizer = PRE_TOKENIZERS[pre]
    return bpe


def tiktoken_bpe(ranks: bytes, sidecar: dict[str, Any]) -> Callable[[str], list[int]]:
    """An encoder from a rank file and its sidecar. Bytes without a token are skipped."""
    lines = (line.split() for line in ranks.splitlines())
    table = {base64.b64decode(token): int(rank) for token, rank in lines}
    n_words = max(*table.values(), *sidecar["special_tokens"].values()) + 1
    absent = [bytes([b]) for b in range(256) if bytes([b]) not in table]
    encoding = tiktoken.Encoding(
        name="test",
        pat_str=sidecar["pat_str"],
        mergeable_ranks=table | {byte: n_words + i for i, byte in enumerate(absent)},
        special_tokens=sidecar["special_tokens"],
    )
    return lambda text: [i for i in encoding.encode_ordinary(text) if i < n_words]


@functools.cache
def trained() -> tuple[list[str], list[str]]:
    """(tokens in id order, merges) of a BPE of 497 tokens that is trained here."""
    bpe = tokenizers.Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=497,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(mixed_texts(100), trainer)
    model = json.loads(bpe.to_str())["model"]
    assert len(model["vocab"]) == 497
    return sorted(model["vocab"], key=model["vocab"].get), [" ".join(m) for m in model["merges"]]


def vocabulary_keys(
    pre: str,
    special: dict[str, int] = SPECIAL,
    tokens: list[str] | None = None,
    merges: list[str] | None = None,
) -> dict[str, Any]:
    """GGUF keys of a vocabulary: 497 ordinary tokens (default: `trained`) and the special ones."""
    tokens, merges = tokens or trained()[0], merges or trained()[1]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": [*tokens, *special],
        "tokenizer.ggml.token_type": [1] * len(tokens) + [3] * len(special),
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.bos_token_id": len(tokens) + 1,
        "tokenizer.ggml.eos_token_id": len(tokens) + 2,
    }


def read_params(path: Path) -> dict[str, Any]:
    return GGUFSource(path).params


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All weights in fp32 under Meta's names."""
    source = GGUFSource(path)
    return {name: source.read(name) for name in source.shapes()}


def read_tokenizer(path: Path) -> tuple[bytes, dict[str, Any]] | None:
    return GGUFSource(path).vocabulary()
