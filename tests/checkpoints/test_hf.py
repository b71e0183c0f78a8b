"""formats/hf.py and hf_config.py: weights, sizes and unsupported models of Hugging Face folders.

Oracle: transformers' `LlamaForCausalLM`.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from llama import Transformer
from llama.checkpoints.convert import convert, quantize
from llama.checkpoints.formats.hf import HFSource
from llama.checkpoints.open import open_checkpoint

transformers = pytest.importorskip("transformers")

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 176,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 96,
    "max_position_embeddings": 256,
}
LLAMA3 = {
    "rope_type": "llama3",
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def hf_model(dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """A model of transformers with seeded weights, also in the norms."""
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES | changes)).eval()
    generator = torch.Generator().manual_seed(0)
    for name, w in model.named_parameters():
        noise = torch.randn(w.shape, generator=generator)
        w.data = (1 + 0.1 * noise if "norm" in name else noise * w.shape[1] ** -0.5).to(dtype)
    return model  # its RoPE table stays fp32


def load(source: HFSource) -> Transformer:
    model = Transformer(source.args(max_seq_len=256, max_batch_size=2))
    model.load_state_dict({name: source.read(name).float() for name in source.shapes()})
    return model.eval()


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hf")
    hf_model().save_pretrained(folder)
    return folder


@pytest.fixture
def copied(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "copy"))


def edit(path: Path, **changes: Any) -> None:
    value = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(value | changes))


@pytest.mark.parametrize(
    ("dtype", "shard", "changes"),
    [
        (torch.float32, "1GB", {}),
        (torch.float32, "50KB", {"num_key_value_heads": 4, "tie_word_embeddings": True}),
        (torch.bfloat16, "20KB", {"num_key_value_heads": 1, "intermediate_size": 37}),
        (torch.bfloat16, "1GB", {"rope_parameters": LLAMA3 | {"factor": 8.0, "rope_theta": 5e5}}),
        (
            torch.float32,
            "1GB",
            {
                "rope_parameters": LLAMA3 | {"factor": 32.0, "rope_theta": 5e5},
                "tie_word_embeddings": True,
                "rms_norm_eps": 1e-5,
                "hidden_size": 128,
            },
        ),
        (torch.float32, "1GB", {"rope_parameters": {"rope_type": "default", "rope_theta": 77.0}}),
    ],
)
def test_logits(dtype: torch.dtype, shard: str, changes: dict[str, Any], tmp_path: Path) -> None:
    reference = hf_model(dtype, **changes)
    reference.save_pretrained(tmp_path, max_shard_size=shard)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (shard != "1GB")
    source = HFSource(tmp_path)
    assert (source.layout, source.n_shards) == ("hf", 1)
    assert source.tied == changes.get("tie_word_embeddings", False)
    assert {source.dtype(name) for name in source.shapes()} == {dtype}
    model, reference = load(source), reference.float()
    ids = torch.randint(0, 96, (2, 200), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(model(ids), reference(ids).logits, atol=1e-4, rtol=0)
    inv_freq = reference.model.rotary_emb.inv_freq
    torch.testing.assert_close(model.freqs_cis[1].angle(), inv_freq, rtol=1e-5, atol=0)


@pytest.mark.parametrize("key", ["rope_type", "type"])
def test_rope_of_transformers_4(key: str, copied: Path) -> None:
    config = json.loads((copied / "config.json").read_text())
    del config["rope_parameters"]
    scaling = {k: v for k, v in LLAMA3.items() if k != "rope_type"} | {key: "llama3", "factor": 32}
    for rope, factor in ((scaling, 32), (None, None), ({"type": "default"}, None)):
        text = json.dumps(config | {"rope_theta": 1234.5, "rope_scaling": rope})
        (copied / "config.json").write_text(text)
        params = HFSource(copied).params
        assert params["rope_theta"] == 1234.5
        assert params.get("rope_scale_factor") == factor
        assert params.get("use_scaled_rope", False) == (factor is not None)


def test_permutation_by_index(saved: Path) -> None:
    stored = load_file(saved / "model.safetensors")
    source, d = HFSource(saved), 16
    for ours, theirs, heads in (("wq", "q_proj", 4), ("wk", "k_proj", 2)):
        meta = source.read(f"layers.1.attention.{ours}.weight")
        hf = stored[f"model.layers.1.self_attn.{theirs}.weight"]
        assert meta.shape == hf.shape
        for head in range(heads):
            for j in range(d // 2):
                assert meta[head * d + 2 * j].equal(hf[head * d + j])
                assert meta[head * d + 2 * j + 1].equal(hf[head * d + d // 2 + j])


def test_read_parts(saved: Path) -> None:
    source = HFSource(saved)
    for name, (rows, *columns) in source.shapes().items():
        whole = source.read(name)
        assert source.read(name, 0, rows // 2, rows).equal(whole[rows // 2 :])
        if columns:
            assert source.read(name, 1, 16, 48).equal(whole[:, 16:48])
    with pytest.raises(AssertionError):
        source.read("layers.0.attention.wq.weight", 0, 8, 24)


def test_reading_a_part_reads_only_its_pages(saved: Path, tmp_path: Path) -> None:
    big = torch.ones(2048, 2048)
    edit(tmp_path / "config.json", **json.loads((saved / "config.json").read_text()))
    edit(tmp_path / "config.json", hidden_size=2048, num_attention_heads=32, head_dim=64)
    edit(tmp_path / "config.json", tie_word_embeddings=True)
    names = ("model.embed_tokens", "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.up_proj")
    path = tmp_path / "model.safetensors"
    save_file({f"{name}.weight": big.clone() for name in names}, path)
    source = HFSource(tmp_path)

    def resident() -> int:
        smaps = Path("/proc/self/smaps")
        if not smaps.exists():
            pytest.skip("no /proc")
        maps = re.split(r"\n(?=[0-9a-f]+-[0-9a-f]+ )", smaps.read_text())
        return sum(int(re.findall(r"Rss: +(\d+)", m)[0]) for m in maps if str(path) in m)

    up = "layers.0.feed_forward.w3.weight"
    assert source.read(up).data_ptr() == source.read(up, 0, 0, 5).data_ptr()
    before = resident()
    assert source.read("layers.0.attention.wq.weight", 0, 64, 128).sum() == 64 * 2048
    assert source.read(up, 0, 100, 110).sum() == 10 * 2048
    assert resident() - before < 6000, "KB of 49152; neighbouring pages come along"


def test_tied_weights(copied: Path) -> None:
    path = copied / "model.safetensors"
    weights = load_file(path)
    assert not HFSource(copied).tied
    other = weights["model.embed_tokens.weight"].clone()
    other[-1, -1] += 1
    save_file(weights | {"lm_head.weight": other}, path)
    assert not HFSource(copied).tied
    edit(copied / "config.json", tie_word_embeddings=True)
    with pytest.raises(ValueError, match="tie_word_embeddings"):
        HFSource(copied)
    other[-1, -1] = weights["model.embed_tokens.weight"][-1, -1]
    for tied in (True, False):
        save_file(weights | {"lm_head.weight": other}, path)
        edit(copied / "config.json", tie_word_embeddings=tied)
        source = HFSource(copied)
        assert source.tied
        output, embedding = (source.read(f"{n}.weight") for n in ("output", "tok_embeddings"))
        assert output.data_ptr() == embedding.data_ptr()
    del weights["lm_head.weight"]
    save_file(weights, path)
    with pytest.raises(ValueError, match=r"no lm_head\.weight"):  # and not tied
        HFSource(copied)
    edit(copied / "config.json", tie_word_embeddings=True)
    assert HFSource(copied).tied


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"model_type": "mistral"}, "model_type is 'mistral'"),
        ({"model_type": None}, "model_type is None"),
        ({"attention_bias": True}, "attention_bias is True"),
        ({"mlp_bias": True}, "mlp_bias is True"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"head_dim": 32}, "head_dim is 32"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantized"),
        ({"auto_map": {"AutoModelForCausalLM": "modeling.Own"}}, "auto_map"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4}}, "'yarn'"),
        ({"rope_parameters": {"type": "linear", "factor": 4}}, "'linear'"),
        ({"rope_parameters": LLAMA3}, "no factor"),
        ({"rope_parameters": LLAMA3 | {"factor": "8"}}, "rope_scale_factor"),
        ({"rope_parameters": LLAMA3 | {"factor": 8, "low_freq_factor": 2}}, "low_freq_factor 2"),
        ({"rope_parameters": LLAMA3 | {"factor": 8, "high_freq_factor": 1}}, "high_freq_factor 1"),
        (
            {"rope_parameters": LLAMA3 | {"original_max_position_embeddings": 4096}},
            "embeddings 4096",
        ),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"rope_parameters": 3}, "must be an object"),
        ({"hidden_size": "64"}, "hidden_size must be a positive integer"),
        ({"num_hidden_layers": None}, "num_hidden_layers must be"),
        ({"num_key_value_heads": 3}, "n_kv_heads must divide"),
        ({"intermediate_size": 0}, "intermediate_size must be"),
        ({"vocab_size": 97}, "wrong shape: tok_embeddings"),
        ({"num_hidden_layers": 3}, r"missing: layers\.2"),
        ({"num_hidden_layers": 1}, r"unknown: layers\.1"),
    ],
)
def test_unsupported_configs(changes: dict[str, Any], match: str, copied: Path) -> None:
    edit(copied / "config.json", **changes)
    with pytest.raises(ValueError, match=match) as caught:
        HFSource(copied).args()
    assert str(copied) in str(caught.value)


def test_harmless_keys(copied: Path) -> None:
    edit(copied / "config.json", pretraining_tp=2, use_cache=False, head_dim=None, mlp_bias=None)
    weights = load_file(copied / "model.safetensors")
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    save_file(weights, copied / "model.safetensors")
    HFSource(copied).args()


@pytest.mark.parametrize(
    "name", ["score.weight", "model.layers.0.self_attn.q_proj.bias", "model.layers.00.input_x"]
)
def test_unknown_weights(name: str, copied: Path) -> None:
    weights = load_file(copied / "model.safetensors") | {name: torch.ones(2)}
    save_file(weights, copied / "model.safetensors")
    with pytest.raises(ValueError, match=re.escape(f"unknown: {name}")):
        HFSource(copied).args()


def test_quantized_weights(copied: Path) -> None:
    weights = load_file(copied / "model.safetensors")
    weights["model.norm.weight"] = torch.ones(64, dtype=torch.int8)
    save_file(weights, copied / "model.safetensors")
    with pytest.raises(ValueError, match=r"model\.norm\.weight is of type I8"):
        HFSource(copied)


@pytest.mark.filterwarnings("ignore:.*no tokenizer")
@pytest.mark.parametrize("length", [256, 2048, 8192, 32768])
def test_the_trained_context_survives(length: int, copied: Path, tmp_path: Path) -> None:
    """Meta's files do not say it; those that are made here do."""
    edit(copied / "config.json", max_position_embeddings=length)
    meta = convert(copied, tmp_path / "meta")
    small = quantize(copied, tmp_path / "int8", "int8")
    for folder in (copied, meta, small):
        assert open_checkpoint(folder).context == length
    assert ("max_seq_len" in json.loads((meta / "params.json").read_text())) == (length != 8192)
