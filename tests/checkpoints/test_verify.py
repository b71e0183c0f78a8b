"""verify.py and its checks: a good checkpoint has no problem; each bad file is named."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from llama.checkpoints import file_checks, weight_checks
from llama.checkpoints.file_checks import find_corrupt_entry, find_foreign_content
from llama.checkpoints.formats.hf import weight_files
from llama.checkpoints.open import open_checkpoint
from llama.checkpoints.source import Source
from llama.checkpoints.verify import verify
from tests.checkpoints import gguf_files

Tiny = Callable[..., Path]
SMALL = {"vocab_size": 300}
PTH = "consolidated.00.pth"
HTML = b"\n<!DOCTYPE html><html><body>Access denied</body></html>"
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 16060617592\n"


def split(folder: Path, n: int) -> None:
    """Split the one shard into `n`."""
    from llama.distributed.sharding import shard_dim

    whole = torch.load(folder / PTH, weights_only=True)
    for rank in range(n):
        shard = {
            name: w if (dim := shard_dim(name)) is None else w.chunk(n, dim)[rank].clone()
            for name, w in whole.items()
        }
        torch.save(shard, folder / f"consolidated.{rank:02}.pth")


def write_checklist(folder: Path) -> None:
    sums = [
        f"{hashlib.md5(f.read_bytes()).hexdigest()}  {f.name}\n"
        for f in sorted(folder.iterdir())
        if f.name != "checklist.chk"
    ]
    (folder / "checklist.chk").write_text("".join(sums))


@pytest.fixture
def good(tiny_checkpoint: Tiny) -> Path:
    folder = tiny_checkpoint(**SMALL)
    (folder / "tokenizer.model").write_text("IQ== 0\n")
    write_checklist(folder)
    return folder


def poison(folder: Path, name: str, value: float, shard: int = 0) -> None:
    path = folder / f"consolidated.{shard:02}.pth"
    weights = torch.load(path, weights_only=True)
    weights[name].view(-1)[-1] = value
    torch.save(weights, path)
    write_checklist(folder)


def cut(path: Path, n: int) -> None:
    path.write_bytes(path.read_bytes()[:-n])


def edit_params(folder: Path, **changes: Any) -> None:
    path = folder / "params.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    write_checklist(folder)


def only_problem(folder: Path, opener: Callable[[Path], Source] = open_checkpoint) -> str:
    problems = verify(folder, opener)
    assert len(problems) == 1, problems
    assert "\n" not in problems[0]
    return problems[0]


def test_good(good: Path) -> None:
    assert verify(good, open_checkpoint) == []
    assert verify(str(good), open_checkpoint) == []


def test_good_shards(good: Path) -> None:
    split(good, 2)
    write_checklist(good)
    assert verify(good, open_checkpoint) == []


def test_good_without_a_checklist(good: Path) -> None:
    (good / "checklist.chk").unlink()
    assert verify(good, open_checkpoint) == []


def test_folder_original(good: Path, tmp_path: Path) -> None:
    shutil.copytree(good, tmp_path / "original")
    assert verify(tmp_path, open_checkpoint) == []
    cut(tmp_path / "original" / PTH, 1000)
    assert f"{tmp_path}/original/{PTH} is a partial download" in only_problem(tmp_path)


def test_no_checkpoint(tmp_path: Path) -> None:
    assert "does not exist; check the path" in only_problem(tmp_path / "no")
    assert "contains no checkpoint; give the folder" in only_problem(tmp_path)
    (tmp_path / "a.txt").write_text("text")
    assert "a.txt is not a whole checkpoint; give the folder" in only_problem(tmp_path / "a.txt")


def replace_by_link(path: Path) -> None:
    path.unlink()
    path.symlink_to(path.parent / "gone")


def replace_by_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


# What is done to a good checkpoint without a checklist, and a part of the problem found.
DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no params": (lambda d: (d / "params.json").unlink(), "params.json is missing; download it"),
    "params not JSON": (lambda d: (d / "params.json").write_text("{"), "params.json is not JSON"),
    "params empty": (lambda d: (d / "params.json").write_text(""), "params.json is empty;"),
    "params a list": (lambda d: (d / "params.json").write_text("[]"), "params.json"),
    "params deep": (lambda d: (d / "params.json").write_text("[" * 99999), "params.json"),
    "no weights": (lambda d: (d / PTH).unlink(), f"{PTH} is missing; download it"),
    "no tokenizer": (lambda d: (d / "tokenizer.model").unlink(), "tokenizer.model is missing"),
    "link to nothing": (
        lambda d: replace_by_link(d / PTH),
        f"{PTH} is a link to a file that does not exist; get or make it again",
    ),
    "a folder": (lambda d: replace_by_folder(d / PTH), f"{PTH} is missing"),
    "HTML": (lambda d: (d / PTH).write_bytes(HTML), f"{PTH} is an HTML page; get or make it again"),
    "LFS": (lambda d: (d / PTH).write_bytes(LFS), f"{PTH} is a Git-LFS pointer; get or"),
    "XML": (lambda d: (d / PTH).write_bytes(b"<?xml?><Error>"), "is a message of the server"),
    "empty": (lambda d: (d / PTH).write_bytes(b""), f"{PTH} is empty; get or make it again"),
    "tokenizer LFS": (
        lambda d: (d / "tokenizer.model").write_bytes(LFS), "tokenizer.model is a Git-LFS pointer",
    ),
    "no end": (lambda d: cut(d / PTH, 1000), f"{PTH} is a partial download"),
    "half": (lambda d: cut(d / PTH, (d / PTH).stat().st_size // 2), "is a partial download"),
    "other bytes": (lambda d: (d / PTH).write_bytes(b"x" * 99), "is not a torch checkpoint"),
    "other zip": (
        lambda d: zipfile.ZipFile(d / PTH, "w").writestr("a", "b"), "zip archive of something else",
    ),
    "leftover": (
        lambda d: (d / f"{PTH}.part").write_bytes(b"x"),
        f"{PTH}.part is part of an unfinished download; finish it, or remove the file",
    ),
    "incomplete": (lambda d: (d / "x.incomplete").write_bytes(b""), "x.incomplete is part of"),
    "tmp": (lambda d: (d / "x.tmp").write_bytes(b"x"), "x.tmp is part of an unfinished download"),
    "gap": (
        lambda d: (d / PTH).rename(d / "consolidated.01.pth"), "consolidated.00.pth is missing",
    ),
    "sizes": (lambda d: edit_params(d, n_layers=3), r"missing: layers.2"),
    "impossible": (lambda d: edit_params(d, dim=66), "multiple of n_heads"),
    "unknown key": (lambda d: edit_params(d, window=5), "window"),
    "NaN": (
        lambda d: poison(d, "layers.1.feed_forward.w2.weight", float("nan")),
        "NaN or infinite: layers.1.feed_forward.w2.weight; get or make it again",
    ),
    "infinity": (lambda d: poison(d, "norm.weight", float("inf")), "infinite: norm.weight;"),
    "-infinity": (
        lambda d: poison(d, "layers.0.attention.wk.weight", -float("inf")), "layers.0.attention.wk",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage(good: Path, kind: str) -> None:
    (good / "checklist.chk").unlink()
    harm, message = DAMAGE[kind]
    harm(good)
    (good / "checklist.chk").unlink(missing_ok=True)
    problem = only_problem(good)
    assert message in problem and str(good) in problem


def overwrite(path: Path, entry: str, at: int = 0) -> None:
    """Change a byte of an entry in a torch checkpoint."""
    raw = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        header = archive.getinfo(entry).header_offset
    at += header + 30 + sum(struct.unpack_from("<HH", raw, header + 26))  # after name and padding
    path.write_bytes(raw[:at] + bytes([raw[at] ^ 1]) + raw[at + 1 :])


def test_changed_bytes_without_a_checklist(good: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The numbers stay finite; the CRC-32 of the archive is wrong. One line per file."""
    (good / "checklist.chk").unlink()
    monkeypatch.setattr(file_checks, "MIB", 100)
    split(good, 2)
    assert verify(good, open_checkpoint) == []
    for i, (entry, at) in enumerate((("data/3", 333), ("data/2", 4))):
        overwrite(good / f"consolidated.0{i}.pth", f"consolidated.0{i}/{entry}", at)
    overwrite(good / "consolidated.01.pth", "consolidated.01/data/5")
    assert verify(good, open_checkpoint) == [
        f"{good / f'consolidated.0{i}.pth'} is damaged (consolidated.0{i}/{entry} has another "
        "CRC-32 than when it was written); get or make it again"
        for i, entry in enumerate(("data/3", "data/2"))
    ]


def test_archives_without_checksums(good: Path) -> None:
    """torch can be set to write CRC 0; a pickle from before torch 1.6 has no CRC."""
    (good / "checklist.chk").unlink()
    weights = torch.load(good / PTH, weights_only=True)
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(weights, good / PTH)
    finally:
        torch.serialization.set_crc32_options(True)
    assert verify(good, open_checkpoint) == []
    overwrite(good / PTH, "consolidated.00/data/3")
    assert verify(good, open_checkpoint) == []
    torch.save(weights, good / PTH, _use_new_zipfile_serialization=False)
    assert find_corrupt_entry(good / PTH) is None


def test_gap_in_the_shards(good: Path) -> None:
    split(good, 4)
    write_checklist(good)
    for gone in ("01", "02"):
        (good / f"consolidated.{gone}.pth").unlink()
    problems = verify(good, open_checkpoint)
    assert len(problems) == 2
    assert all(f"consolidated.0{i}.pth is missing" in p for i, p in enumerate(problems, 1))


@pytest.mark.parametrize("name", ["layers.0.attention.wo.weight", "layers.1.ffn_norm.weight"])
def test_nan_in_the_second_shard(good: Path, name: str) -> None:
    split(good, 2)
    poison(good, name, float("nan"), shard=1)
    assert name in only_problem(good)


def test_duplicated_kv_heads(tiny_checkpoint: Tiny) -> None:
    """As in 405B for 16 ranks: more shards than KV heads."""
    folder = tiny_checkpoint(**SMALL)
    (folder / "tokenizer.model").write_text("IQ== 0\n")
    weights = torch.load(folder / PTH, weights_only=True)
    for name, w in weights.items():
        if name.split(".")[-2] in ("wk", "wv"):
            weights[name] = w.view(2, 16, 64).repeat_interleave(2, 0).reshape(64, 64)
    torch.save(weights, folder / PTH)
    split(folder, 4)
    assert verify(folder, open_checkpoint) == []


def test_many_tensors_are_counted(good: Path) -> None:
    weights = torch.load(good / PTH, weights_only=True)
    torch.save({n: w * float("nan") for n, w in weights.items()}, good / PTH)
    write_checklist(good)
    problem = only_problem(good)
    assert "tok_embeddings.weight" in problem and f"and {len(weights) - 8} more" in problem


def test_large_tensors_are_read_in_pieces(good: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weight_checks, "ELEMENTS_AT_ONCE", 64 * 7)
    assert verify(good, open_checkpoint) == []
    poison(good, "tok_embeddings.weight", float("nan"))
    assert "tok_embeddings.weight" in only_problem(good)


def test_checklist(good: Path) -> None:
    raw = bytearray((good / PTH).read_bytes())
    raw[len(raw) // 2] ^= 1
    (good / PTH).write_bytes(raw)
    assert f"{good / PTH} is not as published: MD5" in only_problem(good)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("0" * 32 + "  other.bin", "other.bin is missing, but listed in checklist.chk; download"),
        ("0" * 32 + "  ../other", "no 'MD5 filename' on line 6; get or make it again"),
        ("no sums", "no 'MD5 filename' on line 6; get or make it again"),
        ("0" * 32 + " *params.json", "params.json is not as published: MD5"),
    ],
)
def test_checklist_lines(good: Path, line: str, message: str) -> None:
    with open(good / "checklist.chk", "a") as f:
        f.write(f"\n\n{line}\n")
    assert message in only_problem(good)


def test_md5_file_with_the_name_first(good: Path) -> None:
    lines = [line.split() for line in (good / "checklist.chk").read_text().splitlines()]
    (good / "checklist.chk").unlink()
    swapped = "".join(f"{name} {md5}\n" for md5, name in lines)
    (good / "model.md5").write_text(swapped)
    assert verify(good, open_checkpoint) == []
    (good / "model.md5").write_text(swapped.replace(lines[0][0], "0" * 32))
    assert "not as published" in only_problem(good)


def test_checklist_names_the_last_shard(good: Path) -> None:
    """Without the checklist the shards that remain look complete."""
    split(good, 2)
    write_checklist(good)
    (good / "consolidated.01.pth").unlink()
    first = verify(good, open_checkpoint)[0]
    assert "consolidated.01.pth is missing, but listed in checklist.chk" in first


def test_several_problems(good: Path) -> None:
    """Five bad files are five lines."""
    (good / "params.json").write_bytes(HTML)
    cut(good / PTH, 1000)
    (good / "tokenizer.model").write_text("other")
    (good / "x.part").write_text("")
    with open(good / "checklist.chk", "a") as f:
        f.write("0" * 32 + "  other.bin\n")
    problems = verify(good, open_checkpoint)
    assert len(problems) == 5
    for name in ("params.json", PTH, "tokenizer.model", "x.part", "other.bin"):
        assert sum(f"{good / name} is" in p for p in problems) == 1


def test_official_tokenizer(tiny_checkpoint: Tiny, llama3_tokenizer_path: Path) -> None:
    folder = tiny_checkpoint(dim=8, n_heads=2, n_kv_heads=1)
    shutil.copy(llama3_tokenizer_path, folder / "tokenizer.model")
    assert verify(folder, open_checkpoint) == []
    with open(folder / "tokenizer.model", "ab") as f:
        f.write(b"\n")
    assert "tokenizer.model is not Llama 3's: SHA-256" in only_problem(folder)
    (folder / "tokenizer.model.json").write_text("{}")
    assert verify(folder, open_checkpoint) == []


def raising(error: Exception) -> Callable[[Path], Source]:
    def opener(path: Path) -> Source:
        raise error

    return opener


@pytest.mark.parametrize(
    "error", [KeyError("x"), RuntimeError("a\nb"), OSError("c"), MemoryError()]
)
def test_any_error_of_opening_is_a_line(good: Path, error: Exception) -> None:
    assert str(good) in only_problem(good, raising(error))


def test_missing_package_raises(good: Path) -> None:
    with pytest.raises(ImportError):
        verify(good, raising(ImportError("pip install it")))


def test_unreadable_weights(good: Path) -> None:
    def opener(path: Path) -> Source:
        source, read = open_checkpoint(path), torch.empty
        source.read = lambda *args: read(-1)  # type: ignore[method-assign]
        return source

    assert "has weights that cannot be read: tok_embeddings.weight" in only_problem(good, opener)


def test_unreadable_folder(good: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda *args: False)
    assert "cannot be read; check its permissions" in only_problem(good)


def hf_folder(folder: Path, good: Path, files: int = 2) -> Callable[[Path], Source]:
    """Write safetensors with an index; returns an opener that opens `good` instead."""
    weights = {f"w{i}": torch.ones(8) for i in range(files)}
    for i, (name, w) in enumerate(weights.items(), 1):
        safetensors.torch.save_file({name: w}, folder / f"model-{i:05}-of-{files:05}.safetensors")
    names = {n: f"model-{i:05}-of-{files:05}.safetensors" for i, n in enumerate(weights, 1)}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    (folder / "config.json").write_text("{}")
    (folder / "tokenizer.json").write_text("{}")
    return lambda path: open_checkpoint(good)


HF_DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "named": (lambda d: (d / "model-00002-of-00002.safetensors").unlink(), "00002.safetensors is"),
    "no names": (
        lambda d: (d / "model.safetensors.index.json").write_text("{}"), "has no weight_map",
    ),
    "no config": (lambda d: (d / "config.json").unlink(), "config.json is missing; download it"),
    "no tokenizer": (lambda d: (d / "tokenizer.json").unlink(), "tokenizer.json is missing"),
    "short": (
        lambda d: cut(d / "model-00001-of-00002.safetensors", 5), "is a partial download (",
    ),
    "header": (
        lambda d: (d / "model-00001-of-00002.safetensors").write_bytes(b"\x50\0\0\0\0\0\0\0{"),
        "it ends inside its header",
    ),
    "no header": (
        lambda d: (d / "model-00001-of-00002.safetensors").write_bytes(b"x" * 50),
        "is not a safetensors file",
    ),
    "long": (
        lambda d: (d / "model-00001-of-00002.safetensors").open("ab").write(b"x"), "is damaged (",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", HF_DAMAGE)
def test_hugging_face_damage(good: Path, tmp_path: Path, kind: str) -> None:
    opener = hf_folder(tmp_path, good)
    assert verify(tmp_path, opener) == []
    harm, message = HF_DAMAGE[kind]
    harm(tmp_path)
    assert message in only_problem(tmp_path, opener)


def test_hugging_face_without_weights(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "tokenizer.json").write_text("{}")
    assert "has no model.safetensors; download it" in only_problem(tmp_path)
    (tmp_path / "pytorch_model.bin").touch()
    assert "only .bin files: save it as safetensors" in only_problem(tmp_path)


def remove(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).unlink()


def rename_to(folder: Path, name: str, index: str | None) -> None:
    """The weights in one file, beside an old index with this content, or None."""
    (folder / "model-00001-of-00002.safetensors").rename(folder / name)
    remove(folder, "model-00002-of-00002.safetensors", *([] if index else [INDEX]))
    if index:
        (folder / INDEX).write_text(index)


INDEX = "model.safetensors.index.json"
FILES: dict[str, tuple[Callable[[Path], Any], str | None]] = {
    "no index": (lambda d: remove(d, INDEX), None),
    "no index and one missing": (
        lambda d: remove(d, INDEX, "model-00002-of-00002.safetensors"), "00002-of-00002",
    ),
    "one file and an old index": (
        lambda d: rename_to(d, "model.safetensors", '{"weight_map": {"a": "gone.safetensors"}}'),
        None,
    ),
    "one file and an empty index": (lambda d: rename_to(d, "model.safetensors", "{}"), None),
    "an index without names": (lambda d: (d / INDEX).write_text("{}"), "has no weight_map"),
    "an index of another folder": (
        lambda d: (d / INDEX).write_text('{"weight_map": {"a": "../a"}}'), "outside its folder",
    ),
    "other names": (lambda d: rename_to(d, "x.safetensors", None), "has no model.safetensors"),
}  # fmt: skip


@pytest.mark.parametrize("kind", FILES)
def test_verify_expects_the_files_that_are_opened(kind: str, good: Path, tmp_path: Path) -> None:
    opener = hf_folder(tmp_path, good)
    change, message = FILES[kind]
    change(tmp_path)
    if message is None:
        assert weight_files(tmp_path) and verify(tmp_path, opener) == []
        return
    assert message in only_problem(tmp_path, opener)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        weight_files(tmp_path)


@pytest.fixture(scope="module")
def whole_gguf(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """Two tensors, an array of strings, and metadata values of several types."""
    import gguf
    import numpy as np

    path = tmp_path_factory.mktemp("gguf") / "a.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_custom_alignment(64)
    writer.add_array("words", ["a", "bb", ""])
    writer.add_array("numbers", [1, 2, 3])
    writer.add_bool("flag", True)
    writer.add_float64("float", 1.5)
    writer.add_tensor("a", np.ones((4, 32), np.float32))
    quantized = gguf.quants.quantize(np.ones((4, 32), np.float32), gguf.GGMLQuantizationType.Q8_0)
    writer.add_tensor("b", quantized, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.read_bytes()


def test_gguf_cut_anywhere(good: Path, tmp_path: Path, whole_gguf: bytes) -> None:
    """A file without the last byte of the last tensor always has a problem."""
    path = tmp_path / "a.gguf"
    path.write_bytes(whole_gguf)
    opener = lambda path: open_checkpoint(good)  # noqa: E731
    assert verify(path, opener) == verify(tmp_path, opener) == []
    padding = -4 * 34 % 64
    for n in [*range(1, len(whole_gguf) - padding, 41), len(whole_gguf) - padding - 1]:
        path.write_bytes(whole_gguf[:n])
        assert "a.gguf is " in only_problem(path, opener), n
    assert "is a partial download (" in only_problem(path, opener)


def test_gguf_with_a_nonsensical_header(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 1, 1) + b"\xff" * 4000)
    assert "a.gguf is damaged (a name has 18,4" in only_problem(path)
    nested = struct.pack("<IQ", 9, 1) * 5000  # an array of an array of an array ...
    path.write_bytes(
        b"GGUF"
        + struct.pack("<IQQ", 3, 1, 1)
        + struct.pack("<Q", 0)
        + struct.pack("<I", 9)
        + nested
    )
    assert "a.gguf is " in only_problem(path)
    path.write_bytes(b"GGML" * 9)
    assert "a.gguf is not a GGUF file" in only_problem(path)


def test_real_gguf(tmp_path: Path) -> None:
    path = tmp_path / "real.gguf"
    gguf_files.write_gguf(path)
    assert verify(path, open_checkpoint) == []
    (tmp_path / "other.gguf").write_bytes(path.read_bytes())
    assert "contains 2 GGUF files; give the path of one" in only_problem(tmp_path)


def test_find_foreign_content(tmp_path: Path) -> None:
    path = tmp_path / "a"
    for content, expected in (
        (b"", "empty"),
        (HTML, "an HTML page"),
        (b"<html lang=en>", "an HTML page"),
        (LFS, "a Git-LFS pointer"),
        (b'{"error":"Access to model x is restricted"}', "a message of the server"),
        (b'{"dim": 1}', None),
        (b"PK\x03\x04", None),
    ):
        path.write_bytes(content)
        assert find_foreign_content(path) == expected
