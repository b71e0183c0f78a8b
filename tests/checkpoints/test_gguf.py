"""formats/gguf.py: weights and sizes of small files that the `gguf` package writes.

Oracles: the `gguf` package for the weights, Meta's code for RoPE.
"""

from __future__ import annotations

import json
import math
import warnings
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Q

from llama import ModelArgs, Transformer
from llama.checkpoints.convert import convert
from llama.checkpoints.formats.gguf import GGUFSource
from llama.checkpoints.load import load_model
from llama.checkpoints.open import open_checkpoint
from tests.checkpoints.gguf_files import (
    DIM,
    HEADS,
    KV_HEADS,
    LAYERS,
    META_NAMES,
    VOCAB,
    read_params,
    read_tensors,
    read_tokenizer,
    vocabulary_keys,
    weights,
    write_gguf,
)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tied fp32 model with a vocabulary."""
    path = tmp_path_factory.mktemp("gguf") / "plain.gguf"
    return write_gguf(path, keys=vocabulary_keys("smollm"))


# Offsets of the fp16 scales in a block: random bytes there could be infinite.
K_QUANTS = {Q.Q2_K: (80, 82), Q.Q3_K: (108,), Q.Q4_K: (0, 2), Q.Q5_K: (0, 2), Q.Q6_K: (208,)}
ERROR = {  # largest error for normally distributed weights; fp32 is exact
    Q.F32: 0, Q.F16: 2e-3, Q.BF16: 2e-2, Q.Q8_0: 0.03,
    Q.Q5_0: 0.3, Q.Q5_1: 0.3, Q.Q4_0: 0.6, Q.Q4_1: 0.6,
}  # fmt: skip


def blocks_of(kind: Q, values: np.ndarray) -> np.ndarray:
    """`values` in blocks of `kind`, or random blocks if the package cannot write this type."""
    if kind not in K_QUANTS:
        return np.asarray(gguf.quants.quantize(values, kind))
    n_values, n_bytes = gguf.GGML_QUANT_SIZES[kind]
    rng = np.random.default_rng(values.size)
    blocks = rng.integers(0, 256, (values.size // n_values, n_bytes), np.uint8)
    for start in K_QUANTS[kind]:
        blocks[:, start + 1] &= 0x3B  # a finite scale below 1
    return blocks.reshape(values.shape[0], -1)


@pytest.mark.parametrize("kind", [*ERROR, *K_QUANTS], ids=lambda kind: kind.name)
def test_tensor_types(kind: Q, tmp_path: Path) -> None:
    source = weights(tied=False)
    raw = {name: (blocks_of(kind, w), kind) for name, w in source.items() if w.ndim == 2}
    norms = {name: w for name, w in source.items() if w.ndim == 1}
    path = write_gguf(tmp_path / "m.gguf", norms, raw=raw)
    found = read_tensors(path)
    assert set(found) == set(META_NAMES.values())
    for name, w in source.items():
        got = found[META_NAMES[name]]
        if name in raw:
            expected = gguf.quants.dequantize(raw[name][0], kind).reshape(w.shape)
            assert np.abs(w - expected).max() <= ERROR.get(kind, math.inf)
        else:
            expected = w
        assert got.dtype == torch.float32
        np.testing.assert_array_equal(got.numpy(), expected)


def test_tied_weights(plain: Path) -> None:
    found = read_tensors(plain)
    assert GGUFSource(plain).tied
    assert torch.equal(found["output.weight"], found["tok_embeddings.weight"])
    for name, w in weights().items():
        assert torch.equal(found[META_NAMES[name]], torch.from_numpy(w))
    model = Transformer(ModelArgs(**read_params(plain)))
    model.load_state_dict(found, strict=True)


def test_tensors_are_copies(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf")
    found = read_tensors(path)
    with open(path, "r+b") as f:  # a mapped tensor would change
        f.write(bytes(path.stat().st_size))
    for name, w in weights().items():
        np.testing.assert_array_equal(found[META_NAMES[name]].numpy(), w)


def test_params(plain: Path) -> None:
    params = read_params(plain)
    multiple_of = params.pop("multiple_of")
    assert (multiple_of, params.pop("ffn_dim_multiplier")) == (256, None)
    assert params == {
        "dim": DIM,
        "n_layers": LAYERS,
        "n_heads": HEADS,
        "n_kv_heads": KV_HEADS,
        "vocab_size": VOCAB,
        "norm_eps": 1e-5,  # not the nearest fp32 number
        "rope_theta": 100000.0,
    }


def test_default_params(tmp_path: Path) -> None:
    source = weights() | {
        f"blk.{i}.attn_{name}.weight": np.zeros((DIM, DIM), np.float32)
        for i in range(LAYERS)
        for name in "kv"
    }
    keys = {"llama.attention.head_count_kv": None, "llama.rope.freq_base": None}
    path = write_gguf(tmp_path / "m.gguf", source, keys)
    assert read_params(path)["n_kv_heads"] == HEADS
    assert read_params(path)["rope_theta"] == 10000.0
    assert len(read_tensors(path)) == len(META_NAMES)


def llama31_divisors(factor: float, head_dim: int = DIM // HEADS) -> np.ndarray:
    """As converters write them: 1 below wavelength 2048, `factor` above 8192, a blend between."""
    divisors = []
    for i in range(head_dim // 2):
        wavelength = 2 * math.pi * 100000.0 ** (2 * i / head_dim)
        if wavelength < 2048:
            divisors.append(1.0)
        elif wavelength > 8192:
            divisors.append(factor)
        else:
            smooth = (8192 / wavelength - 1) / 3
            divisors.append(1 / ((1 - smooth) / factor + smooth))
    assert {1.0, factor} < set(divisors)  # all three ranges are present
    return np.array(divisors, np.float32)


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_rope_scaling(factor: float, tmp_path: Path) -> None:
    divisors = llama31_divisors(factor)
    path = write_gguf(tmp_path / "m.gguf", weights() | {"rope_freqs.weight": divisors})
    params = read_params(path)
    assert params["use_scaled_rope"] is True
    assert params["rope_scale_factor"] == factor
    assert set(read_tensors(path)) == set(META_NAMES.values())
    if factor == 8:  # the factor in Meta's code
        from llama_models.llama3.model import apply_scaling

        freqs = 100000.0 ** (-torch.arange(0, DIM // HEADS, 2) / (DIM // HEADS))
        assert torch.allclose(freqs / torch.from_numpy(divisors), apply_scaling(freqs))


def test_rope_divisors_of_one(tmp_path: Path) -> None:
    ones = np.ones(DIM // HEADS // 2, np.float32)
    path = write_gguf(tmp_path / "m.gguf", weights() | {"rope_freqs.weight": ones})
    assert "use_scaled_rope" not in read_params(path)


@pytest.mark.parametrize(
    "divisors",
    [
        llama31_divisors(8.0)[::-1].copy(),
        llama31_divisors(8.0)[:-1].copy(),
        llama31_divisors(8.0) * 2,
        np.full(DIM // HEADS // 2, 4.0, np.float32),
        np.full(DIM // HEADS // 2, np.nan, np.float32),
    ],
    ids=["reversed", "short", "doubled", "linear", "nan"],
)
def test_unsupported_rope_scaling(divisors: np.ndarray, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", weights() | {"rope_freqs.weight": divisors})
    with pytest.raises(ValueError, match="rope_freqs"):
        read_params(path)


def test_convert(plain: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    dst = tmp_path / "new" / "model"
    assert convert(plain, dst) == dst
    assert [p.name for p in dst.parent.iterdir()] == ["model"]
    state = torch.load(dst / "consolidated.00.pth", weights_only=True, mmap=True)
    expected = read_tensors(plain)
    assert set(state) == set(expected)
    assert all(torch.equal(state[name], expected[name].bfloat16()) for name in expected)
    assert state["output.weight"].data_ptr() == state["tok_embeddings.weight"].data_ptr()
    stored = 2 * sum(w.size for w in weights().values())  # bytes without a second tied weight
    assert (dst / "consolidated.00.pth").stat().st_size < stored + VOCAB * DIM
    assert json.loads((dst / "params.json").read_text()) == read_params(plain)
    found = read_tokenizer(plain)
    assert found is not None
    assert (dst / "tokenizer.model").read_bytes() == found[0]
    assert json.loads((dst / "tokenizer.model.json").read_text("utf-8")) == found[1]
    assert capfd.readouterr().out == ""


def test_convert_to_another_dtype(plain: Path, tmp_path: Path) -> None:
    folder = convert(plain, tmp_path / "out", dtype="fp32")
    state = torch.load(folder / "consolidated.00.pth", weights_only=True)
    np.testing.assert_array_equal(state["norm.weight"], weights()["output_norm.weight"])


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_failing_conversion_leaves_nothing(
    error: type[BaseException], plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object) -> None:
        assert len(list(tmp_path.iterdir())) == 1  # the temporary folder
        raise error

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(error):
        convert(plain, tmp_path / "out")
    with pytest.raises(FileNotFoundError):
        convert(tmp_path / "absent.gguf", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_convert_does_not_overwrite(plain: Path, tmp_path: Path) -> None:
    (tmp_path / "keep").write_text("mine")
    with pytest.raises(FileExistsError, match="remove it or choose another"):
        convert(plain, tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["keep"]


@pytest.mark.parametrize("kind", [Q.F32, Q.Q4_1, Q.Q6_K], ids=lambda kind: kind.name)
def test_logits_of_quantized_weights(kind: Q, tmp_path: Path) -> None:
    """The loaded file, compared with weights that the `gguf` package dequantizes."""
    raw = {name: (blocks_of(kind, w), kind) for name, w in weights(False).items() if w.ndim == 2}
    norms = {name: w for name, w in weights(False).items() if w.ndim == 1}
    path = write_gguf(tmp_path / "m.gguf", norms, raw=raw)
    source = open_checkpoint(path)
    model = load_model(source, source.args(max_seq_len=32), torch.device("cpu"), torch.float32)
    oracle = Transformer(source.args(max_seq_len=32))
    oracle.load_state_dict({
        META_NAMES[t.name]: torch.from_numpy(gguf.quants.dequantize(t.data, t.tensor_type).copy())
        for t in gguf.GGUFReader(path).tensors
    })  # fmt: skip
    tokens = torch.arange(20).unsqueeze(0)
    with torch.inference_mode():
        assert torch.equal(model(tokens), oracle(tokens))


def test_warning_for_llama_31_without_rope_scaling(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llama.checkpoints.formats.gguf.LLAMA3_ROWS", VOCAB)
    for context, warned in ((8192, 0), (131072, 1)):
        path = write_gguf(tmp_path / f"{context}.gguf", keys={"llama.context_length": context})
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            read_params(path)
        assert sum("lacks its RoPE scaling" in str(w.message) for w in caught) == warned
