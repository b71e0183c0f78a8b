"""convert.py: round trips are bit-identical; a conversion that fails leaves nothing behind."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from llama import Llama
from llama.checkpoints.convert import convert
from llama.checkpoints.open import open_checkpoint

Tiny = Callable[..., Path]
SMALL = {"vocab_size": 304, "n_heads": 8, "n_kv_heads": 4, "multiple_of": 8}


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    source = open_checkpoint(folder)
    return {name: source.read(name).clone() for name in source.shapes()}


def assert_same(a: Path, b: Path) -> None:
    """Compare names, dtypes and bits of the weights, and the sizes in params.json."""
    x, y = weights_of(a), weights_of(b)
    assert set(x) == set(y)
    for name, w in x.items():
        assert w.dtype == y[name].dtype and torch.equal(w, y[name]), name
    assert open_checkpoint(a).args() == open_checkpoint(b).args()


@pytest.fixture
def folder(tiny_checkpoint: Tiny) -> Path:
    return tiny_checkpoint(**SMALL)


@pytest.mark.filterwarnings("ignore:.*no tokenizer")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_shards_there_and_back(folder: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    path = folder / "consolidated.00.pth"
    whole = torch.load(path, weights_only=True)
    torch.save({name: w.to(dtype) for name, w in whole.items()}, path)
    at = folder
    for n in (4, 2, 8, 1):  # 8 ranks share 4 KV heads
        at = convert(at, tmp_path / f"mp{n}", mp=n)
        assert len(list(at.glob("consolidated.*.pth"))) == n
        assert {p.suffix for p in at.iterdir()} == {".pth", ".json"}
    assert_same(folder, at)
    got = torch.load(at / "consolidated.00.pth", weights_only=True)
    assert all(torch.equal(got[name], w.to(dtype)) for name, w in whole.items())


def test_tokenizer_is_copied(demo_dir: Path, tmp_path: Path) -> None:
    dst = convert(demo_dir, tmp_path / "out", mp=3)
    for name in ("tokenizer.model", "tokenizer.model.json"):
        assert (dst / name).read_text() == (demo_dir / name).read_text()
    assert_same(demo_dir, convert(dst, tmp_path / "back", mp=1))
    shard = torch.load(tmp_path / "back" / "consolidated.00.pth", weights_only=True, mmap=True)
    assert shard["output.weight"].data_ptr() == shard["tok_embeddings.weight"].data_ptr()


def test_meta_to_hf_to_meta(tiny_checkpoint: Tiny, demo_dir: Path, tmp_path: Path) -> None:
    """Bit-identical, the tokenizer too; the Hugging Face folder can be loaded directly."""
    folder = tiny_checkpoint(vocab_size=49152, ffn_dim_multiplier=1.1, use_scaled_rope=True)
    for name in ("tokenizer.model", "tokenizer.model.json"):
        (folder / name).write_bytes((demo_dir / name).read_bytes())
    hf = convert(folder, tmp_path / "hf", to="hf")
    back = convert(hf, tmp_path / "back", mp=1)
    x, y = weights_of(folder), weights_of(back)
    assert set(x) == set(y) and all(torch.equal(w, y[name]) for name, w in x.items())
    a, b = open_checkpoint(folder).args(), open_checkpoint(back).args()
    assert (a.hidden_dim, a.scale_factor, a.rope_theta) == (
        b.hidden_dim,
        b.scale_factor,
        b.rope_theta,
    )
    assert (back / "tokenizer.model").read_bytes() == (folder / "tokenizer.model").read_bytes()
    ids = []
    for path in (folder, hf, back):
        llama = Llama.build(path, None, 32, 1, device="cpu", dtype=torch.float32)
        ids.append(llama.chat_completion([[{"role": "user", "content": "Hi"}]], 0, 0, 8))
    assert ids[0] == ids[1] == ids[2]


@pytest.mark.filterwarnings("ignore:.*no tokenizer")
def test_dtype(folder: Path, tmp_path: Path) -> None:
    before, after = weights_of(folder), weights_of(convert(folder, tmp_path / "x", dtype="bf16"))
    assert all(torch.equal(after[name], w.bfloat16()) for name, w in before.items())


@pytest.mark.filterwarnings("ignore:.*no tokenizer")
def test_existing_destination(folder: Path, tmp_path: Path) -> None:
    dst = tmp_path / "out"
    dst.mkdir()
    (dst / "mine.txt").write_text("keep")
    with pytest.raises(FileExistsError, match="exists already"):
        convert(folder, dst)
    with pytest.raises(FileExistsError, match="not replaced"):  # it contains another file
        convert(folder, dst, force=True)
    assert (dst / "mine.txt").read_text() == "keep"
    (dst / "mine.txt").rename(dst / "params.json")
    convert(folder, dst, force=True)
    assert_same(folder, dst)
    link = tmp_path / "link"
    link.symlink_to(dst)
    with pytest.raises(FileExistsError):
        convert(folder, link, force=True)
    link.unlink()
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_source_is_never_overwritten(folder: Path) -> None:
    outer = folder / "outer"
    outer.mkdir()
    shutil.copytree(folder, outer / "original", ignore=shutil.ignore_patterns("outer"))
    for src, dst in [
        (folder, folder), (folder, folder.parent), (outer, outer / "original"), (outer, outer)
    ]:  # fmt: skip
        with pytest.raises(ValueError, match="the source itself"):
            convert(src, dst, force=True)
    assert weights_of(outer)
    assert weights_of(folder)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"to": "onnx"}, "'onnx'"),
        ({"dtype": "int8"}, "int8"),
        ({"mp": 3}, r"use one of \[1, 2, 4, 8\]"),
        ({"to": "hf", "mp": 2}, "mp is for"),
        ({"force": "false"}, "force must be of type bool"),
        ({"mp": True}, "mp must be of type int"),
        ({"mp": 0}, "mp must be 1 or more"),
    ],
)
def test_bad_arguments(
    folder: Path, tmp_path: Path, arguments: dict[str, object], message: str
) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        convert(folder, tmp_path / "out", **arguments)  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


@pytest.mark.filterwarnings("ignore:.*no tokenizer")
@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError("write failed")])
def test_interruption_keeps_the_old_result(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    dst = convert(folder, tmp_path / "out")
    before = sorted((p.name, p.read_bytes()) for p in dst.iterdir())

    def fail(*args: object) -> None:
        raise error

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises((KeyboardInterrupt, OSError)):
        convert(folder, dst, force=True, mp=2)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert sorted((p.name, p.read_bytes()) for p in dst.iterdir()) == before


def test_full_disk_is_an_error_before_writing(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    weights = sum(w.nbytes for w in weights_of(folder).values())
    # While a shard is written it is on the disk twice.
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=2 * weights - 1))
    with pytest.raises(OSError, match="free some or choose another disk"):
        convert(folder, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_failing_write(folder: Path, tmp_path: Path) -> None:
    """A limit on file sizes makes a write fail, as a full disk does."""
    code = f"""
import resource, signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
from llama import Llama
from llama.checkpoints.convert import convert
try:
    convert({str(folder)!r}, {str(tmp_path / "out")!r})
except OSError as e:
    print("OSError")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "OSError\n", done.stderr
    assert not list(tmp_path.iterdir())


def test_not_a_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no checkpoint folder"):
        convert(tmp_path / "nowhere", tmp_path / "out")
    (tmp_path / "file").write_text("hello")
    with pytest.raises(ValueError, match="not a GGUF"):
        convert(tmp_path / "file", tmp_path / "out")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"params\.json"):
        convert(tmp_path / "empty", tmp_path / "out")


def test_params_are_complete(folder: Path, tmp_path: Path) -> None:
    values = json.loads((folder / "params.json").read_text())
    del values["vocab_size"]
    (folder / "params.json").write_text(json.dumps(values | {"max_seq_len": 7}))
    with pytest.warns(UserWarning, match="no tokenizer"):
        dst = convert(folder, tmp_path / "out")
    got = json.loads((dst / "params.json").read_text())
    assert got["vocab_size"] == SMALL["vocab_size"] and got["max_seq_len"] == 7
