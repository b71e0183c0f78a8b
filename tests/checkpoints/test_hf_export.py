"""formats/hf_export.py, hf_tokenizer_export.py: weights, sizes, tokens and chats.

Oracles: transformers' `LlamaForCausalLM`, `AutoTokenizer` and `apply_chat_template`.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from llama import ModelArgs, Transformer
from llama.checkpoints.formats import hf_export
from llama.checkpoints.formats.hf import HFSource
from llama.checkpoints.formats.hf_chat_template import chat_template
from llama.checkpoints.formats.hf_export import write_hf
from llama.checkpoints.formats.hf_tokenizer_export import recover_merges, write_tokenizer
from llama.checkpoints.open import find_vocabulary
from llama.checkpoints.source import Source
from llama.tokenizer import ChatFormat, Dialog, Tokenizer
from tests.checkpoints.gguf_files import mixed_texts
from tests.models import TINY, random_weights

transformers = pytest.importorskip("transformers")


class Weights(Source):
    """A source with the weights of a new model."""

    layout = "meta"

    def __init__(self, tied: bool = False, dtype: torch.dtype = torch.float32, **changes: Any):
        self.path, self.tied = Path("weights"), tied
        self.params = TINY | {"vocab_size": 49152} | changes
        self.weights = {n: w.to(dtype) for n, w in random_weights(**self.params).items()}
        if tied:
            self.weights["output.weight"] = self.weights["tok_embeddings.weight"]
        self.reads: list[str] = []

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(w.shape) for name, w in self.weights.items()}

    def dtype(self, name: str) -> torch.dtype:
        return self.weights[name].dtype

    def read(
        self, name: str, dim: int = 0, start: int = 0, stop: int | None = None
    ) -> torch.Tensor:
        self.reads.append(name)
        w = self.weights[name]
        return w.narrow(dim, start, (w.shape[dim] if stop is None else stop) - start)


@pytest.fixture(scope="module")
def demo_tokenizer(demo_dir: Path) -> Tokenizer:
    return Tokenizer(demo_dir / "tokenizer.model")


@pytest.mark.parametrize(
    ("tied", "shard_bytes", "changes"),
    [
        (False, 10**9, {}),
        (True, 10**9, {"use_scaled_rope": True, "rope_scale_factor": 32.0, "n_kv_heads": 1}),
        (False, 10**7, {"use_scaled_rope": True, "rope_theta": 5e3, "multiple_of": 7}),
        (True, 50000, {"n_kv_heads": None, "norm_eps": 1e-6}),
    ],
)
def test_logits(
    tied: bool,
    shard_bytes: int,
    changes: dict[str, Any],
    demo_tokenizer: Tokenizer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(hf_export, "MAX_SHARD_BYTES", shard_bytes)
    source = Weights(tied, **changes)
    write_hf(source, demo_tokenizer, tmp_path, None)
    assert len(source.reads) == len(set(source.reads)) == 18 + 3 - tied
    files = sorted(tmp_path.glob("*.safetensors"))
    assert (len(files) > 1) == (shard_bytes < 10**9)
    for file in files:
        with safe_open(file, "pt") as f:
            assert f.metadata() == {"format": "pt"}
            assert "lm_head.weight" not in f.keys() or not tied  # noqa: SIM118
            # a file may exceed the limit only with a single tensor
            assert file.stat().st_size < shard_bytes + 5000 or len(f.keys()) == 1
    reference = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert reference.dtype == torch.float32
    model = Transformer(source.args(max_seq_len=256, max_batch_size=2)).eval()
    model.load_state_dict(source.weights)
    ids = torch.randint(0, 49152, (2, 150), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(reference(ids).logits, model(ids), atol=1e-4, rtol=0)
    inv_freq = reference.model.rotary_emb.inv_freq
    torch.testing.assert_close(model.freqs_cis[1].angle(), inv_freq, rtol=1e-5, atol=0)
    again = HFSource(tmp_path)
    assert ModelArgs(**again.params) == ModelArgs(
        **(
            source.params
            | {
                key: again.params[key]
                for key in ("multiple_of", "ffn_dim_multiplier", "n_kv_heads")
            }
            | ({"rope_scale_factor": 8.0} if "rope_theta" in changes else {})
        )
    )
    assert again.tied == tied
    for name, w in source.weights.items():
        assert again.read(name).equal(w), name


def test_config(demo_tokenizer: Tokenizer, tmp_path: Path) -> None:
    source = Weights(tied=True, dtype=torch.float32, use_scaled_rope=True)
    write_hf(source, demo_tokenizer, tmp_path, torch.bfloat16)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["torch_dtype"] == "bfloat16"
    assert int(config["transformers_version"].split(".")[0]) >= 5  # else 5.19 warns of the pattern
    assert config["max_position_embeddings"] == 131072
    assert config["rope_theta"] == 500000.0
    assert config["rope_scaling"] == {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1,
        "high_freq_factor": 4,
        "original_max_position_embeddings": 8192,
    }
    generation = transformers.GenerationConfig.from_pretrained(tmp_path)
    assert generation.eos_token_id == config["eos_token_id"] == [2, 0]
    assert generation.bos_token_id is None
    assert generation.pad_token_id == 2
    assert HFSource(tmp_path).dtype("norm.weight") == torch.bfloat16
    write_hf(Weights(), demo_tokenizer, tmp_path, None)
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["rope_scaling"], config["max_position_embeddings"]) == (None, 8192)


def texts(special: list[str], n: int) -> list[str]:
    """Texts of many scripts, arbitrary code points, and texts of special tokens."""
    rng = random.Random(1)
    out = mixed_texts(n // 2)
    for _ in range(n // 2):
        parts = [rng.choice(special) for _ in range(rng.randrange(3))]
        parts += [rng.choice(out[10:])[:40] for _ in range(2)]
        parts += [chr(rng.choice((rng.randrange(32, 0x3000), rng.randrange(0xE000, 0x20000))))]
        rng.shuffle(parts)
        out.append("".join(parts))
    return [*out, " " * 500, "\n" * 50, "a" * 300]


def dialogs(contents: list[str]) -> list[Dialog]:
    rng = random.Random(2)
    found: list[Dialog] = []
    for i in range(0, len(contents) - 4, 4):
        roles = ["user", "assistant", "user"]
        if rng.random() < 0.5:
            roles.insert(0, "system")
        found.append([{"role": r, "content": c} for r, c in zip(roles, contents[i:], strict=False)])  # type: ignore[typeddict-item]
    return found


def check_tokens(tokenizer: Tokenizer, folder: Path, n: int) -> None:
    """Compare ids with those of transformers: text, special tokens, BOS and chats."""
    write_tokenizer(tokenizer, folder, 8192)
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    special = list(tokenizer.special_tokens)[:20]
    written = [t for t in texts(special, n) if encodes(tokenizer, t)]
    assert len(written) > 0.7 * n
    for text in written:
        ids = tokenizer.encode(text, bos=False, eos=False, allowed_special="all")
        assert theirs.encode(text, add_special_tokens=False) == ids, repr(text)
        bos = [tokenizer.bos_id] * (tokenizer.bos_id >= 0)
        assert theirs.encode(text) == bos + ids
        assert theirs.decode(ids) == tokenizer.decode(ids)
        plain = tokenizer.encode(text, bos=False, eos=False)
        ids = theirs.encode(text, add_special_tokens=False, split_special_tokens=True)
        assert ids == plain, repr(text)
    plain_texts = [t for t in written if not any(s in t for s in tokenizer.special_tokens)]
    for dialog in dialogs(plain_texts):
        found = theirs.apply_chat_template(dialog, add_generation_prompt=True, return_dict=False)
        assert found == ChatFormat(tokenizer).encode_dialog_prompt(dialog), dialog
    for role in ("bos", "eos", "pad"):
        i = getattr(tokenizer, f"{role}_id")
        assert getattr(theirs, f"{role}_token_id") == (i if i >= 0 else None)
    assert {text: theirs.convert_tokens_to_ids(text) for text in tokenizer.special_tokens} == (
        tokenizer.special_tokens
    )


def encodes(tokenizer: Tokenizer, text: str) -> bool:
    try:  # the demo model's vocabulary lacks some characters
        tokenizer.encode(text, bos=False, eos=False)
    except ValueError:
        return False
    return True


def test_tokens_of_the_demo_model(demo_tokenizer: Tokenizer, tmp_path: Path) -> None:
    check_tokens(demo_tokenizer, tmp_path, 300)


@pytest.mark.parametrize("version", ["llama3", "llama3.1"])
def test_tokens_of_meta(version: str, llama3_tokenizer_path: Path, tmp_path: Path) -> None:
    tokenizer = Tokenizer(llama3_tokenizer_path, version)
    check_tokens(tokenizer, tmp_path, 300)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    merged = {left + right for left, right in recover_merges(tokenizer.ranks)}
    never = [t.decode() for t in tokenizer.ranks if len(t) > 1 and t not in merged and t.isascii()]
    assert len(never) > 100  # tokens that are found only as whole pieces
    for text in never:
        ids = tokenizer.encode(text, bos=False, eos=False)
        assert theirs.encode(text, add_special_tokens=False) == ids, text


def test_vocabulary_is_read_back(demo_dir: Path, demo_tokenizer: Tokenizer, tmp_path: Path) -> None:
    write_hf(Weights(), demo_tokenizer, tmp_path, None)
    found = find_vocabulary(HFSource(tmp_path))
    assert found is not None
    assert found[0] == (demo_dir / "tokenizer.model").read_bytes()
    sidecar = json.loads((demo_dir / "tokenizer.model.json").read_text("utf-8"))
    new = {"chat_templates", "template_tokens"}
    assert {k: v for k, v in found[1].items() if k not in new - set(sidecar)} == sidecar


def test_merges_through_higher_ranks() -> None:
    """A part may rank after its token; a token may result from no merge."""
    ranks = {b"a": 0, b"b": 1, b"c": 2, b"abc": 3, b"bc": 4, b"cab": 5}
    assert recover_merges(ranks) == [(b"a", b"bc"), (b"b", b"c")]


@pytest.mark.parametrize("system", ["It's C:\\new 'test'.\nTwo {{ lines }} é😀", None])
def test_default_system_is_quoted(system: str | None, demo_dir: Path, tmp_path: Path) -> None:
    tokenizer = Tokenizer(demo_dir / "tokenizer.model")
    tokenizer.default_system = system
    write_tokenizer(tokenizer, tmp_path, 8192)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    dialog: Dialog = [{"role": "user", "content": "Hi"}]
    found = theirs.apply_chat_template(dialog, add_generation_prompt=True, return_dict=False)
    assert found == ChatFormat(tokenizer).encode_dialog_prompt(dialog)
    tokenizer.chat_format = None
    assert chat_template(tokenizer) is None
