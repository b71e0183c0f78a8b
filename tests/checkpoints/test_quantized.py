"""formats/quantized.py and `quantize`: the stored model is the one that is quantized at build."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from llama import Llama
from llama.checkpoints.convert import convert, quantize
from llama.checkpoints.inspect import describe
from llama.checkpoints.load import load_model
from llama.checkpoints.open import open_checkpoint
from llama.checkpoints.verify import verify
from llama.distributed import tensor_parallel
from llama.layers.blocks import dequantize_blocks, quantize_blocks
from llama.layers.optimize import optimize, quantize_model
from llama.layers.quantization import quantize_int4, quantize_int8
from llama.layers.schemes import INT8, SCHEMES, Scheme, old_int4
from tests.checkpoints import gguf_files

Tiny = Callable[..., Path]
CPU = torch.device("cpu")
# One KV head of 8 rows: half a tile of int4.
SMALL = {"vocab_size": 300, "n_heads": 8, "n_kv_heads": 1, "multiple_of": 64}
PTH = "consolidated.00.pth"
CHOICES = [SCHEMES["int8"], SCHEMES["int4"], old_int4(32), old_int4(64)]
TOKENS = torch.arange(40).view(2, 20)
pytestmark = pytest.mark.filterwarnings("ignore:.*no tokenizer")


def edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Apply `change` to the dict in params.json or a shard, and write it back."""
    is_json = path.suffix == ".json"
    value = json.loads(path.read_text()) if is_json else torch.load(path, weights_only=True)
    change(value)
    path.write_text(json.dumps(value)) if is_json else torch.save(value, path)


def fill(weights: dict[str, Tensor], name: str, value: float) -> None:
    """Set one number of a weight."""
    weights[name].view(-1)[5] = value


def tie(weights: dict[str, Tensor]) -> None:
    weights["output.weight"] = weights["tok_embeddings.weight"]


def to_bf16(weights: dict[str, Tensor]) -> None:
    weights.update({name: w.bfloat16() for name, w in weights.items()})


@pytest.fixture
def folder(tiny_checkpoint: Tiny) -> Path:
    return tiny_checkpoint(**SMALL)


@pytest.fixture
def stored(folder: Path, tmp_path: Path) -> Path:
    """In the first form of int4."""
    return quantize(folder, tmp_path / "int4", old_int4())


def write_checkpoint(kind: str, folder: Path, tmp_path: Path) -> Path:
    """A checkpoint in the layout `kind`, such as "hf tied"; `folder` is one in Meta's layout."""
    if kind.startswith("gguf"):
        return gguf_files.write_gguf(tmp_path / "m.gguf", gguf_files.weights("tied" in kind))
    if kind.startswith("hf"):
        pytest.importorskip("transformers")
        from tests.checkpoints.test_hf import hf_model

        model = hf_model(intermediate_size=192, tie_word_embeddings="tied" in kind)
        model.save_pretrained(tmp_path / "hf")
        return tmp_path / "hf"
    if "tied" in kind:
        edit(folder / PTH, tie)
    if "bf16" in kind:
        edit(folder / PTH, to_bf16)
    if "two" in kind:  # the KV head is in both shards
        return convert(folder, tmp_path / "two", mp=2)
    return folder


@torch.inference_mode()
def logits(path: Path, dtype: torch.dtype, quantize: Scheme | str | None = None) -> Tensor:
    """Logits of a prefill and of one decode step."""
    source = open_checkpoint(path)
    model = load_model(source, source.args(max_seq_len=32), CPU, dtype)
    quantize_model(model, quantize)
    optimize(model)
    return torch.cat([model(TOKENS, 0), model(TOKENS[:, :1], 20)], dim=1)


@pytest.mark.parametrize("scheme", CHOICES, ids=Scheme.words)
@pytest.mark.parametrize(
    "kind", ["meta", "meta tied", "meta bf16", "meta two", "hf", "hf tied", "gguf", "gguf tied"]
)
def test_bit_identical_to_quantizing_at_build(
    kind: str, scheme: Scheme, folder: Path, tmp_path: Path
) -> None:
    src = write_checkpoint(kind, folder, tmp_path)
    dst = quantize(src, tmp_path / "dst", scheme)
    half = kind.startswith("gguf") or "bf16" in kind
    for dtype in [torch.bfloat16] * half + [torch.float32] * (not kind.startswith("gguf")):
        assert torch.equal(logits(dst, dtype), logits(src, dtype, scheme))
    assert verify(dst, open_checkpoint) == [f"{dst / 'tokenizer.model'} is missing; download it"]
    assert open_checkpoint(dst).tied == ("tied" in kind)


def int4_plain(weights: dict[str, Tensor], name: str, n: int, group: int) -> Tensor:
    """The dequantized weight (n, columns): code i is in bits 4i to 4i + 3 of packed[t, b, r]."""
    packed, scale, zero = (weights[f"{name}.{key}"] for key in ("packed", "scale", "zero"))
    w = torch.empty(n, packed.shape[1] * 8)
    for row in range(n):
        for column in range(w.shape[1]):
            t, r, g = row // 16, row % 16, column // group
            code = (int(packed[t, column // 8, r]) >> 4 * (column % 8)) & 15
            w[row, column] = code * scale[t, g, r].float() + zero[t, g, r].float()
    return w


def test_written_files(folder: Path, tmp_path: Path) -> None:
    """Names, sizes and numbers, by plain arithmetic."""
    edit(folder / PTH, to_bf16)
    (folder / "tokenizer.model").write_text("IQ== 0\n")
    (folder / "tokenizer.model.json").write_text('{"pat_str": "."}\n')
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    original = torch.load(folder / PTH, weights_only=True)
    for form, most in ((SCHEMES["int8"], 0.8), (old_int4(32), 0.7), (old_int4(64), 0.65)):
        scheme, group = form.name, form.layers.group
        dst = quantize(folder, tmp_path / f"{scheme}{group}", form)
        assert {path.name for path in dst.iterdir()} == {
            "params.json", PTH, "tokenizer.model", "tokenizer.model.json",
        }  # fmt: skip
        assert (dst / "tokenizer.model").read_bytes() == before["tokenizer.model"]
        entry = json.loads((dst / "params.json").read_text())["quantization"]
        assert entry == (
            {"scheme": "int8"} if scheme == "int8" else {"scheme": scheme, "group": group}
        )
        weights = torch.load(dst / PTH, weights_only=True)
        expected = 0
        for name, w in original.items():
            layer = name.removesuffix(".weight")
            if w.dim() == 1 or layer == "tok_embeddings":
                assert torch.equal(weights[name], w)
                expected += 2 * w.numel()
            elif scheme == "int8" or layer == "output":
                q, scale = weights[f"{layer}.q"], weights[f"{layer}.scale"]
                near = q * scale.unsqueeze(1)
                assert ((near - w.float()).abs() <= scale.unsqueeze(1) * 0.501).all()
                expected += w.numel() + 4 * len(w)
            else:
                rows = -(-len(w) // 16) * 16  # in tiles of 16
                expected += rows * w.shape[1] // 2 + 4 * rows * w.shape[1] // group
        assert expected == sum(w.nbytes for w in weights.values())
        size = (dst / PTH).stat().st_size
        assert expected < size < expected + 40_000
        if scheme == "int4":
            name = "layers.1.attention.wk"
            w = original[f"{name}.weight"].float()
            near = int4_plain(weights, name, len(w), group)
            step = (w.view(8, -1, group).amax(2) - w.view(8, -1, group).amin(2)) / 15
            assert ((near - w).abs().view(8, -1, group).amax(2) < 0.7 * step).all()
        assert sum(w.nbytes for w in weights.values()) < most * sum(
            w.nbytes for w in original.values()
        )
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_written_blocks(folder: Path, tmp_path: Path) -> None:
    """The present int4: names, sizes, numbers, and an output layer in 8 bits."""
    edit(folder / PTH, to_bf16)
    dst = quantize(folder, tmp_path / "int4", "int4")
    entry = {"scheme": "int4", "form": "blocks", "output_bits": 6}
    assert json.loads((dst / "params.json").read_text())["quantization"] == entry
    weights = torch.load(dst / PTH, weights_only=True)
    original = torch.load(folder / PTH, weights_only=True)
    for name, w in original.items():
        layer = name.removesuffix(".weight")
        if w.dim() == 1 or layer == "tok_embeddings":
            assert torch.equal(weights.pop(name), w)
            continue
        blocks, bits = weights.pop(f"{layer}.blocks"), 6 if layer == "output" else 4
        assert torch.equal(blocks, quantize_blocks(w, bits))
        near = dequantize_blocks(blocks, len(w))
        assert (near - w.float()).norm() < (0.02 if bits == 6 else 0.09) * w.float().norm()
    assert not weights
    text = describe(open_checkpoint(dst))
    assert "\nstored as   int4, the output in 6 bits: " in text
    assert verify(dst, open_checkpoint) == [f"{dst / 'tokenizer.model'} is missing; download it"]
    eight = quantize(folder, tmp_path / "8", replace(SCHEMES["int4"], output=INT8))
    assert "int4, the output in 8 bits: " in describe(open_checkpoint(eight))
    names = set(torch.load(eight / PTH, weights_only=True))
    assert {"output.q", "output.scale", "layers.0.attention.wq.blocks"} < names
    assert logits(eight, torch.float32).isfinite().all()
    edit(dst / "params.json", lambda params: params["quantization"].update(output_bits=8))
    with pytest.raises(ValueError, match=r"output\.q.* says int4, the output in 8 bits"):
        open_checkpoint(dst).args()


def test_quantization_in_blocks_of_rows() -> None:
    """1,100 rows are three blocks; each tile quantized alone has the same codes."""
    w = torch.randn(1100, 64)
    for quantize_ in (quantize_int8, quantize_int4):
        whole = quantize_(w)
        parts = [quantize_(rows) for rows in w.split(16)]
        for i, tensor in enumerate(whole):
            assert torch.equal(tensor, torch.cat([part[i] for part in parts]))
            meta = quantize_(w.to("meta"))[i]
            assert (meta.shape, meta.dtype) == (tensor.shape, tensor.dtype)


def test_tensors_are_the_mapped_file(stored: Path) -> None:
    """Codes, scales, and plain weights in the stored dtype, are not copied."""
    source = open_checkpoint(stored)
    model = load_model(source, source.args(max_seq_len=32), CPU, torch.float32)
    path = os.path.realpath(stored / PTH)
    mapped = [
        [int(end, 16) for end in line.split()[0].split("-")]
        for line in Path("/proc/self/maps").read_text().splitlines()
        if line.endswith(path)
    ]
    state = model.state_dict()
    assert mapped and len(state) == 2 * (7 * 3 + 2) + 2 + 2
    for name, w in state.items():
        assert any(low <= w.data_ptr() < high for low, high in mapped), name


def test_dtype_applies_to_plain_weights_only(stored: Path) -> None:
    source = open_checkpoint(stored)
    model = load_model(source, source.args(max_seq_len=32), CPU, torch.float16)
    for name, w in model.state_dict().items():
        kind = torch.float16 if name.endswith(".weight") else source.dtype(name)
        assert w.dtype == kind, name
    assert model(TOKENS).isfinite().all()


def test_read_parts(stored: Path) -> None:
    source = open_checkpoint(stored)
    name = "layers.0.attention.wo.packed"
    whole = torch.load(stored / PTH, weights_only=True)[name]
    assert torch.equal(source.read(name), whole)
    assert torch.equal(source.read(name, 1, 2, 5), whole[:, 2:5])
    assert torch.equal(source.read(name, 0, 1), whole[1:])


def test_build_with_quantize(
    tiny_checkpoint: Tiny,
    llama3_tokenizer_path: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    folder = tiny_checkpoint(multiple_of=64)
    dst = quantize(folder, tmp_path / "int8", "int8")
    prompts = [[128000, 9, 8, 7], [128000, *range(500, 520)]]

    def ids(path: Path, **options: Any) -> object:
        options |= {"device": "cpu", "dtype": torch.float32}
        llama = Llama.build(path, llama3_tokenizer_path, 64, 2, **options)
        return llama.generate(prompts, 10, temperature=0, logprobs=True)

    want = ids(folder, quantize="int8", exact=True)
    for how in ({}, {"quantize": "int8"}):
        caplog.clear()
        caplog.set_level("INFO", logger="llama")
        assert ids(dst, exact=True, **how) == want
        assert "parameters, float32 and int8 on cpu" in caplog.text
    with pytest.raises(ValueError, match=r"is quantized already, to int8; quantize='int4' needs"):
        ids(dst, quantize="int4")
    with pytest.raises(ValueError, match="unknown scheme 'int5'"):
        ids(dst, quantize="int5")


def test_too_many_ranks_are_an_error_before_reading(
    stored: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """wo has 64 columns, which are two groups."""
    source = open_checkpoint(stored)
    monkeypatch.setattr(source, "read", lambda *part: pytest.fail("weights were read"))
    monkeypatch.setattr(tensor_parallel, "size", lambda: 4)
    with pytest.raises(ValueError, match=r"16 columns of each of 4 ranks; use one of \[1, 2\]"):
        load_model(source, source.args(), CPU, torch.float32)


def test_inspect(folder: Path, tmp_path: Path) -> None:
    """Computed by hand: 2 layers of dim 64, feed-forward 192, 8 KV rows, vocabulary 300."""
    edit(folder / PTH, to_bf16)
    layers = 2 * (2 * 64 * 64 + 2 * 8 * 64 + 3 * 192 * 64)
    plain = 300 * 64 + 5 * 64
    rows = 2 * (2 * 64 + 2 * 8 + 2 * 192 + 64) + 300
    for tied in (False, True):
        if tied:
            edit(folder / PTH, tie)
        text = describe(open_checkpoint(quantize(folder, tmp_path / f"8{tied}", "int8")))
        assert f"\nparameters  {layers + plain + 300 * 64 * (not tied):,}\n" in text
        codes = layers + 300 * 64 + 4 * rows
        bits = 8 * codes / (layers + 300 * 64)
        assert f"\nstored as   int8: {bits:.2f} bits a weight\n" in text
        assert "\n            embedding and norms in bfloat16\n" in text
        assert f" ({codes + 2 * plain:,} bytes)\n" in text
        assert ("quantized from the embedding" in text) == tied
    text = describe(open_checkpoint(quantize(folder, tmp_path / "4", old_int4(64))))
    assert "\nstored as   int4 in groups of 64, the output in 8 bits: " in text
    assert "\nranks       1 " in text and text.count("of weights each") == 1


BAD_ARGUMENTS: dict[str, tuple[dict[str, Any], str]] = {
    "scheme": ({"scheme": "int5"}, r"unknown scheme 'int5'; use one of \['int8', 'int4'\]"),
    "no scheme": ({"scheme": None}, "unknown scheme None"),
}


@pytest.mark.parametrize("kind", BAD_ARGUMENTS)
def test_bad_arguments(folder: Path, tmp_path: Path, kind: str) -> None:
    arguments, message = BAD_ARGUMENTS[kind]
    with pytest.raises(ValueError, match=message):
        quantize(folder, tmp_path / "out", **arguments)
    assert not list(tmp_path.iterdir())


def test_bad_source_and_destination(folder: Path, stored: Path, tmp_path: Path) -> None:
    """Quantized twice, converted back, onto another folder, onto itself, not finite."""
    before = {path: path.read_bytes() for path in stored.iterdir()}
    writes: list[Callable[[], Path]] = [
        lambda: quantize(stored, tmp_path / "x", "int8"),
        lambda: convert(stored, tmp_path / "x"),
        lambda: convert(stored, tmp_path / "x", to="hf"),
    ]
    for write in writes:
        with pytest.raises(ValueError, match=r"int4 is quantized already \(int4\).* the original"):
            write()
    with pytest.raises(FileExistsError, match="exists already; remove it or choose another folder"):
        quantize(folder, stored, "int8")
    for dst in (folder, folder.parent):
        with pytest.raises(ValueError, match="contains the source itself"):
            quantize(folder, dst, "int8")
    with pytest.raises(FileNotFoundError):
        quantize(tmp_path / "nowhere", tmp_path / "x", "int8")
    for value in (float("nan"), float("inf"), -float("inf")):
        edit(folder / PTH, partial(fill, name="layers.1.feed_forward.w2.weight", value=value))
        for scheme in ("int8", "int4"):
            with pytest.raises(ValueError, match=r"layers\.1\.feed_forward\.w2\.weight of .*NaN"):
                quantize(folder, tmp_path / "x", scheme)
    assert {path: path.read_bytes() for path in stored.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["int4"]


def test_full_disk_is_an_error_before_writing(
    folder: Path, stored: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needed = 2 * sum(w.nbytes for w in torch.load(stored / PTH, weights_only=True).values())
    usage = shutil.disk_usage(tmp_path)
    for free in (needed - 1, needed):
        monkeypatch.setattr(shutil, "disk_usage", lambda path, free=free: usage._replace(free=free))
        if free < needed:
            with pytest.raises(OSError, match="free some or choose another disk"):
                quantize(folder, tmp_path / "x", old_int4())
        else:
            quantize(folder, tmp_path / "x", old_int4())


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_killed_while_writing(folder: Path, tmp_path: Path, number: int) -> None:
    """There is no result. After any signal that can be caught nothing else is left either."""
    code = f"""
import os, sys, torch
from llama.commands.main import main
save = torch.save
def save_and_die(state, path):
    save(state, path)
    os.kill(os.getpid(), {int(number)})
torch.save = save_and_die
sys.argv = ["llama3", "quantize", {str(folder)!r}, {str(tmp_path / "out")!r}, "--scheme=int8"]
main()
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True)
    assert done.returncode in (130, 143, -signal.SIGKILL)
    left = [path.name for path in tmp_path.iterdir()]
    assert "out" not in left and (number == signal.SIGKILL or not left)


def test_verify_names_damage(stored: Path, tmp_path: Path) -> None:
    """Each damage is one line of `verify`."""
    params, pth = stored / "params.json", stored / PTH
    (stored / "tokenizer.model").write_text("IQ== 0\n")
    good = params.read_bytes(), pth.read_bytes()

    def problem() -> str:
        [line] = verify(stored, open_checkpoint)
        params.write_bytes(good[0])
        pth.write_bytes(good[1])
        return line

    assert verify(stored, open_checkpoint) == []
    wq = "layers.0.attention.wq"
    for value in (float("nan"), float("inf")):
        edit(pth, partial(fill, name=f"{wq}.scale", value=value))
        assert f"NaN or infinite: {wq}.scale" in problem()
    edit(pth, lambda w: w.pop(f"{wq}.zero"))
    assert f"missing: {wq}.zero (4, 2, 16)" in problem()
    edit(pth, lambda w: w.update({f"{wq}.packed": w[f"{wq}.packed"][:2]}))
    assert f"wrong shape: {wq}.packed (2, 8, 16) instead of (4, 8, 16)" in problem()
    edit(pth, lambda w: w.update({f"{wq}.scale": w[f"{wq}.scale"].float()}))
    assert f"{wq}.scale is torch.float32, not torch.bfloat16; quantize it again" in problem()
    edit(pth, lambda w: w.update({"norm.weight": w["norm.weight"].to(torch.int8)}))
    assert "norm.weight is torch.int8, not plain" in problem()
    edit(params, lambda p: p["quantization"].update(group=64))
    line = problem()
    assert f"wrong shape: {wq}.scale (4, 2, 16) instead of (4, 1, 16)" in line
    assert (
        '"quantization" in params.json says int4 in groups of 64, the output in 8 bits: correct it'
        in line
    )
    edit(params, lambda p: p.update(quantization={"scheme": "int8"}))
    assert '"quantization" in params.json says int8: correct it' in problem()
    edit(params, lambda p: p.pop("vocab_size"))
    assert "lacks 'vocab_size'; quantize it again" in problem()
    edit(params, lambda p: p.pop("quantization"))
    line = problem()
    assert f"{wq}.packed was written by `llama3 quantize`" in line
    assert 'the params.json beside it lacks "quantization"' in line
    shutil.copy(pth, stored / "consolidated.01.pth")
    assert "has 2 shards; quantize it again" in problem()


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("quantization_args", {"scheme": "spinquant", "group_size": 32}, "keys this library does"),
        ("quantization", {"scheme": "fp8"}, "unknown scheme 'fp8'.* quantize the original"),
        ("quantization", {"scheme": "int4", "group_size": 32}, "not what `llama3 quantize` writes"),
        ("quantization", {"scheme": "int4", "group": 32.0}, r"groups of 32\.0 weights"),
        ("quantization", {"scheme": ["int4"]}, "unknown scheme"),
        ("quantization", {"scheme": "int8", "tied": 1}, "tied must be a boolean"),
        ("quantization", {"scheme": "int8", "form": "blocks"}, "not what `llama3 quantize`"),
        ("quantization", {"scheme": "int4", "form": "blocks"}, "not what `llama3 quantize`"),
        ("quantization", {"scheme": "int4", "output_bits": 6}, "not what `llama3 quantize`"),
        ("quantization", {"scheme": "int4", "form": "x", "output_bits": 6}, "not what"),
        (
            "quantization",
            {"scheme": "int4", "form": "blocks", "output_bits": 5},
            "output layer in 5",
        ),
        ("quantization", None, "None is not what"),
        ("quantization", "int4", "'int4' is not what"),
    ],
)
def test_other_quantization_formats(stored: Path, key: str, value: object, message: str) -> None:
    edit(stored / "params.json", lambda params: params.update({key: value}))
    with pytest.raises(ValueError, match=message):
        open_checkpoint(stored)


def test_plain_weights_with_a_quantization_entry(folder: Path) -> None:
    edit(folder / "params.json", lambda params: params.update(quantization={"scheme": "int8"}))
    with pytest.raises(ValueError, match=r"missing: layers\.0\.attention\.wq\.q \(64, 64\)"):
        open_checkpoint(folder).args()


@pytest.mark.slow
def test_commands(demo_dir: Path, tmp_path: Path) -> None:
    """`llama3 quantize`, `verify` and `complete`, compared with `complete --quantize`."""

    def llama3(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "llama", *arguments]
        return subprocess.run(command, capture_output=True, text=True)

    dst = tmp_path / "int4"
    done = llama3("quantize", str(demo_dir), str(dst), "--scheme", "int4")
    assert (done.returncode, done.stdout) == (0, f"{dst}\n"), done.stderr
    assert llama3("verify", str(dst)).stdout == f"{dst}: every check passed\n"
    ask = ["complete", "The capital of France is", "--json", "--temperature=0", "--logprobs"]
    ask += ["--max_gen_len=12", "--ckpt_dir"]
    got = llama3(*ask, str(dst))
    assert json.loads(got.stdout) == json.loads(
        llama3(*ask, str(demo_dir), "--quantize", "int4").stdout
    )
    assert "Paris" in got.stdout and " and int4 on cpu" in got.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["int4"]
